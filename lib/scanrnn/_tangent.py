"""A cell as a map of R^N, and tangent directions carried along its trajectory: x → f(x), Q → D Q with D = ∂f/∂x."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from ._real import flatten, unflatten

Cell = Callable[[Any, Any], Any]


def real_map(cell: Cell, state: PyTree) -> tuple[Callable[[Any, Array], Array], Array]:
    """The cell as a map of R^N, and the state as a point of it."""
    restore = unflatten(state)
    return lambda input, x: flatten(cell(input, restore(x))), flatten(state)


def random_directions(key: PRNGKeyArray | None, like: Array, count: int) -> Array:
    """`count` orthonormal directions at random."""
    key = jax.random.key(0) if key is None else key
    return jnp.linalg.qr(jax.random.normal(key, (like.size, count), like.dtype))[0]


def push(step: Callable[[Any, Array], Array], x: Array, directions: Array, input: Any) -> tuple[Array, Array]:
    """One step of the state and of the tangent directions: (f(x), D Q)."""
    new_x, derivative = jax.linearize(lambda x: step(input, x), x)
    return new_x, jax.vmap(derivative, in_axes=1, out_axes=1)(directions)


def push_along(step: Callable[[Any, Array], Array], carry: tuple[Array, Array], inputs: PyTree) -> tuple[Array, Array]:
    """`push` over all steps of the inputs."""

    def advance(carry, input):
        x, directions = carry
        return push(step, x, directions, input), None

    return jax.lax.scan(advance, carry, inputs)[0]


@jax.custom_jvp
def orthonormalize(matrix: Array) -> tuple[Array, Array]:
    r"""Q of the QR decomposition of a tall matrix, and log|R_ii|; R's signs are arbitrary, and cancel.

    With C = dA R^{-1} and S = Q^T C, the logarithms' differential is the diagonal of S, and dQ = C - Q (S - W), where W
    is the antisymmetric matrix with the strict lower triangle of S. JAX's own rule also forms dR, which nobody reads.
    """
    q, r = jnp.linalg.qr(matrix)
    return q, jnp.log(jnp.abs(jnp.diagonal(r)))


@orthonormalize.defjvp
def _orthonormalize_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[tuple, tuple]:
    q, r = jnp.linalg.qr(primals[0])
    c = jax.lax.linalg.triangular_solve(r, tangents[0])
    s = q.T @ c
    lower = jnp.tril(s, -1)
    values = q, jnp.log(jnp.abs(jnp.diagonal(r)))
    return values, (c - q @ (s - lower + lower.T), jnp.diagonal(s))
