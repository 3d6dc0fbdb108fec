"""The one place where arguments are refused.

Static facts (shapes, dtypes, lengths) are known while JAX traces, so they are always checked. Values are
checked only where they exist: inside `jit`, `vmap` or `scan` an array is abstract and `require_values`
does nothing. The public docstrings say what the result is then (NaN).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def is_abstract(value: Any) -> bool:
    """Whether any array inside `value` is a tracer, that is, has no value yet."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value))


def require_values(name: str, value: Any, allowed: str, is_allowed: Callable[[np.ndarray], Any]) -> None:
    """Raise `ValueError` naming the first entry of `value` for which `is_allowed` is false."""
    if is_abstract(value):
        return
    array = np.asarray(value)
    good = np.broadcast_to(np.asarray(is_allowed(array)), array.shape)
    if not good.all():
        index = tuple(int(i) for i in np.argwhere(~good)[0])
        where = f" at index {index}" if index else ""
        raise ValueError(f"{name} must be {allowed}, got {array[index]}{where}")


def require_finite(name: str, value: Any) -> None:
    """Raise `ValueError` where an array of the pytree `value` holds NaN or infinity."""
    for leaf in jax.tree.leaves(value):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            require_values(name, leaf, "finite", np.isfinite)


def require_inexact(name: str, value: Any) -> None:
    """Raise `TypeError` unless every array of the pytree `value` is real or complex floating point."""
    for leaf in jax.tree.leaves(value):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(f"{name} must be floating point (real or complex), got {dtype}")


def require_rank(name: str, array: Any, *ranks: int) -> None:
    """Raise `ValueError` unless `array` has one of the given numbers of axes."""
    if jnp.ndim(array) not in ranks:
        allowed = " or ".join(str(rank) for rank in ranks)
        raise ValueError(f"{name} must have {allowed} axes, got shape {jnp.shape(array)}")


def require_integer(name: str, value: Any, *, minimum: int, maximum: int | None = None) -> None:
    """Raise `TypeError` unless `value` is an integer, `ValueError` unless minimum <= value <= maximum."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    if value < minimum or (maximum is not None and value > maximum):
        allowed = f"at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"
        raise ValueError(f"{name} must be {allowed}, got {value}")


def time_length(name: str, inputs: Any) -> int:
    """The common length of the leading (time) axis of the pytree `inputs`; an error if it is 0 or not common."""
    leaves = jax.tree.leaves(inputs)
    if not leaves or any(jnp.ndim(leaf) == 0 for leaf in leaves):
        raise ValueError(f"{name} must have time as leading axis, got shapes {[jnp.shape(x) for x in leaves]}")
    lengths = {jnp.shape(leaf)[0] for leaf in leaves}
    if len(lengths) > 1:
        raise ValueError(f"{name} must have one common time length, got {sorted(lengths)}")
    (length,) = lengths
    if length == 0:
        raise ValueError(f"{name} must have at least one time step, got shapes {[jnp.shape(x) for x in leaves]}")
    return length
