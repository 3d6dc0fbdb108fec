"""A state as a point of R^N: pytrees are ravelled, a complex entry is its real and its imaginary part."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree


def flatten(state: PyTree) -> Array:
    """The N real coordinates of a state."""
    return ravel_pytree(_to_real(state))[0]


def unflatten(like: PyTree) -> Callable[[Array], Any]:
    """The inverse of `flatten` for states shaped as `like`."""
    _, unravel = ravel_pytree(_to_real(like))

    def restore(real, z):
        return jax.lax.complex(real[0], real[1]) if jnp.iscomplexobj(z) else real

    return lambda flat: jax.tree.map(restore, unravel(flat), like)


def _to_real(state: PyTree) -> PyTree:
    return jax.tree.map(lambda z: jnp.stack([z.real, z.imag]) if jnp.iscomplexobj(z) else jnp.asarray(z), state)
