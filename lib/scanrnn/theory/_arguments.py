"""How the closed forms take eigenvalues and correlations: checked, of one precision, broadcast against each other.

Where a value is known and not allowed, it is an error; where it is traced, it is replaced by NaN, which then runs
through the result and its derivatives.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._checks import is_abstract, require_values


def eigenvalue(name: str, value: Any) -> Array:
    """Real or complex, |value| < 1."""
    return _checked(name, value, "of modulus below 1", lambda lam: squared_modulus(lam) < 1)


def correlation(name: str, value: Any) -> Array:
    """Real, 0 <= value <= 1."""
    return _checked(name, _real(name, value), "in [0, 1]", lambda rho: (rho >= 0) & (rho <= 1))


def real(name: str, value: Any) -> Array:
    """Real and finite."""
    return _checked(name, _real(name, value), "finite", lambda x: abs(x) < np.inf)


def together(**arrays: Array) -> list[Array]:
    """The arrays broadcast to one shape and cast to one precision, each real or complex as it was."""
    shapes = {name: array.shape for name, array in arrays.items()}
    try:
        shape = np.broadcast_shapes(*shapes.values())
    except ValueError:
        listed = " and ".join(f"{name} of shape {shape}" for name, shape in shapes.items())
        raise ValueError(f"{' and '.join(shapes)} must have shapes that broadcast, got {listed}") from None
    with jax.numpy_dtype_promotion("standard"):  # here dtypes may mix
        real = jnp.result_type(*(jnp.real(array) for array in arrays.values()))
        mixed = jnp.result_type(real, jnp.complex64)
    return [jnp.broadcast_to(a.astype(mixed if jnp.iscomplexobj(a) else real), shape) for a in arrays.values()]


def squared_modulus(z: Array) -> Array:
    """|z|² without a square root, so that it has derivatives at 0."""
    return z.real**2 + z.imag**2 if jnp.iscomplexobj(z) else z**2


def _real(name: str, value: Any) -> Any:
    if np.iscomplexobj(value):
        raise TypeError(f"{name} must be real, got complex numbers")
    return value


def _checked(name: str, value: Any, allowed: str, is_allowed: Callable[[Any], Any]) -> Array:
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number or an array of numbers, got {value!r}") from None
    if jnp.issubdtype(array.dtype, jnp.integer):
        with jax.numpy_dtype_promotion("standard"):
            array = array * 1.0  # 0 and 1 are values that one writes without a point, of no precision of their own
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        raise TypeError(f"{name} must be real or complex numbers, got {array.dtype}")
    require_values(name, array, allowed, is_allowed)
    if not is_abstract(array):
        return array
    return array * jnp.where(is_allowed(array), 1.0, jnp.nan)  # a factor: its slope is NaN too
