"""What the layers share: how they take their inputs, and how complex weights are drawn and applied by real products."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Inexact, PRNGKeyArray

from .._checks import require_inexact, require_integer, require_rank, require_values, time_length


class Layer(eqx.Module):
    """A map of sequences, un-batched, that starts from the state zero."""

    @abc.abstractmethod
    def states(self, inputs: Float[Array, "time input"]) -> Inexact[Array, "time hidden"]:
        """The recurrent state after each step."""

    @abc.abstractmethod
    def coefficients(self, inputs: Float[Array, "time input"]) -> Inexact[Array, "time hidden"]:
        """What the recurrent state of each unit is multiplied by at each step: λ, or the gate that keeps the state."""

    @abc.abstractmethod
    def __call__(self, inputs: Float[Array, "time input"]) -> Float[Array, "time output"]:
        """The output at each step."""


class LinearLayer(Layer):
    """A layer that is linear and the same at all times, hence a convolution with its impulse response."""

    @property
    @abc.abstractmethod
    def _d_in(self) -> int:
        """The number of input features."""

    @abc.abstractmethod
    def eigenvalues(self) -> Complex[Array, " hidden"]:
        """λ, one for each coordinate of the state, in the order of `states`."""

    def coefficients(self, inputs: Float[Array, "time input"]) -> Complex[Array, "time hidden"]:
        """λ, the same at each step; (T, N)."""
        lam = self.eigenvalues()
        inputs = as_inputs(inputs, jnp.empty((0, self._d_in), lam.real.dtype))
        return jnp.broadcast_to(lam, (len(inputs), lam.size))

    def impulse_response(self, length: int) -> Float[Array, "{length} output input"]:
        r"""The first `length` matrices $\kappa_k$ of $y_t=\sum_{k=0}^{t}\kappa_k\,x_{t-k}$; (length, d_out, d_in).

        Entry (k, o, i) is output o, k steps after a unit impulse at input i. Raises `ValueError` unless length >= 1,
        `TypeError` unless it is an integer.
        """
        require_integer("length", length, minimum=1)
        impulses = jnp.zeros((self._d_in, length, self._d_in)).at[:, 0].set(jnp.eye(self._d_in))
        return jnp.moveaxis(jax.vmap(self)(impulses), 0, -1)


def as_inputs(inputs: Any, weight: Array) -> Float[Array, "time input"]:
    """`inputs` as (T, d_in) in the precision of `weight`, an array of the layer whose last axis is d_in."""
    require_inexact("inputs", inputs)
    inputs = jnp.asarray(inputs)
    if jnp.iscomplexobj(inputs):
        raise TypeError(f"inputs must be real, got {inputs.dtype}")
    require_rank("inputs", inputs, 2)
    time_length("inputs", inputs)
    width = weight.shape[-1]
    if inputs.shape[1] != width:
        raise ValueError(f"inputs must have shape (T, d_in) with d_in = {width}, got {inputs.shape}")
    return inputs.astype(weight.dtype)


def kernel_from_factors(
    second: Float[Array, "strides output hidden"],
    first: Float[Array, "hidden stride input"],
    feedthrough: Float[Array, "output input"],
    length: int,
) -> Float[Array, "{length} output input"]:
    r"""$\kappa_{sa+b}=$ second_a · first_b (stride s), the feedthrough added at time 0; by one real product.

    All `length` matrices $CA^kB$ from few: $C(A^s)^a$ for each a and $A^bB$ for b < s.
    """
    strides, d_out, hidden = second.shape
    _, stride, d_in = first.shape
    product = second.reshape(strides * d_out, hidden) @ first.reshape(hidden, stride * d_in)
    kernel = jnp.moveaxis(product.reshape(strides, d_out, stride, d_in), 2, 1).reshape(-1, d_out, d_in)
    return kernel[:length].at[0].add(feedthrough)


def require_sizes(**sizes: int) -> None:
    """Raise unless every size is an integer of at least 1."""
    for name, size in sizes.items():
        require_integer(name, size, minimum=1)


def require_range(low_name: str, low: float, high_name: str, high: float) -> None:
    """Raise `ValueError` unless 0 < low <= high < ∞."""
    require_values(low_name, low, "positive and finite", lambda x: (x > 0) & np.isfinite(x))
    allowed = f"finite and at least {low_name} = {low}"
    require_values(high_name, high, allowed, lambda x: (x >= low) & np.isfinite(x))


def scaled_normal(key: PRNGKeyArray, shape: tuple[int, ...], variance: float) -> Float[Array, "..."]:
    """Independent entries N(0, variance)."""
    return np.sqrt(variance).item() * jax.random.normal(key, shape)


def inverse_softplus(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The ω with log(1 + e^ω) = x > 0, without overflow for large x or cancellation for small x."""
    return x + jnp.log(-jnp.expm1(-x))


def apply_complex(
    weight: Complex[Array, "hidden input"], x: Float[Array, "time input"]
) -> Complex[Array, "time hidden"]:
    """Wx at each time, for real x, by two real products."""
    return jax.lax.complex(x @ weight.real.T, x @ weight.imag.T)


def real_part(
    real: Float[Array, "output hidden"], imag: Float[Array, "output hidden"], states: Complex[Array, "time hidden"]
) -> Float[Array, "time output"]:
    """Re[(real + i imag) h] at each time, by two real products."""
    return states.real @ real.T - states.imag @ imag.T
