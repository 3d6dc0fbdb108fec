r"""Measured, on single linear units h_t = λ h_{t-1} + x_t: the moments of which `theory` has the closed forms.

Every column of the inputs drives its own copy of each unit; a copy's average over time is one sample, and the spread
between copies gives the standard error. The derivatives ∂h/∂λ and ∂²h/∂λ² come from forward-mode differentiation.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ._checks import require_inexact, require_integer, require_rank, require_values, time_length
from .recurrence import linear_recurrence
from .sensitivity import Estimate, estimate


class Moments(NamedTuple):
    """A quantity of the state h, and the same one of its derivative ∂h/∂λ; each with its standard error."""

    state: Estimate
    sensitivity: Estimate


def linear_moments(lam: ArrayLike, inputs: Float[Array, "time copies"], *, transient: int) -> Moments:
    r"""$\mathbb E|h|^2$ and $\mathbb E|\partial h/\partial\lambda|^2$, from the steps after the first `transient` ones.

    `lam` holds real or complex eigenvalues of any shape, which is the shape of the four results; every one of them sees
    all the copies. The state starts at 0: a transient of some 7/(1 - |λ|) steps leaves a bias below 0.1 per cent.

    Raises `ValueError` unless |λ| < 1, the inputs have two axes, at least one step after the transient and at least two
    copies; `TypeError` for an array that is not floating point. NaN where λ is traced and not allowed.
    """
    lam, inputs = _check(lam, inputs, transient)
    squares = _mean_products(lam, inputs, transient, order=1)
    return Moments(*(_shaped(estimate(squares[i][i]), lam.shape) for i in (0, 1)))


def local_growth(lam: ArrayLike, inputs: Float[Array, "time copies"], *, transient: int) -> Moments:
    r"""The local exponents $-\partial\log\mathbb Ey^2/\partial\log(1-\lambda)$ of y = h and of y = ∂h/∂λ, for real λ.

    Both are $2(1-\lambda)\,\mathbb E[y\,\partial_\lambda y]/\mathbb Ey^2$, a ratio of two means over the copies, whose
    standard error is that of its linearisation. Shapes and errors: as `linear_moments`; also `TypeError` for complex λ.
    """
    if jnp.iscomplexobj(lam):
        raise TypeError(f"lam must be real, got {jnp.result_type(lam)}")
    lam, inputs = _check(lam, inputs, transient)
    products = _mean_products(lam, inputs, transient, order=2)
    scale = 2 * (1 - lam).ravel()

    def ratio(above: Array, below: Array) -> Estimate:
        mean = jnp.mean(below, axis=0)
        value = jnp.mean(above, axis=0) / mean
        error = estimate((above - value[None] * below) / mean[None]).standard_error
        return _shaped(Estimate(scale * value, scale * error), lam.shape)

    return Moments(*(ratio(products[i][i + 1], products[i][i]) for i in (0, 1)))


@eqx.filter_jit
def _mean_products(lam: Array, inputs: Array, transient: int, *, order: int) -> list[list[Array]]:
    """⟨y_i ȳ_j⟩ over time for y_0 = h, y_1 = ∂h/∂λ, y_2 = ∂²h/∂λ²: entry [i][j] has shape (copies, units)."""
    copies, units = inputs.shape[1], lam.size
    driven = jnp.repeat(inputs, units, axis=1)  # column (copy, unit)

    def states(lam: Array) -> Array:
        return linear_recurrence(jnp.tile(lam, copies), driven)

    def with_derivatives(lam: Array, order: int) -> tuple[Array, ...]:
        if order == 0:
            return (states(lam),)
        lower, raised = jax.jvp(lambda z: with_derivatives(z, order - 1), (lam,), (jnp.ones_like(lam),))
        return (*lower, raised[-1])

    late = [y[transient:] for y in with_derivatives(lam.ravel(), order)]
    means = [[jnp.mean((a * jnp.conj(b)).real, axis=0).reshape(copies, units) for b in late] for a in late]
    return means


def _shaped(samples: Estimate, shape: tuple[int, ...]) -> Estimate:
    return Estimate(samples.mean.reshape(shape), samples.standard_error.reshape(shape))


def _check(lam: Any, inputs: Any, transient: int) -> tuple[Array, Array]:
    lam, inputs = jnp.asarray(lam), jnp.asarray(inputs)
    require_inexact("lam", lam)
    require_inexact("inputs", inputs)
    require_values("lam", lam, "of modulus below 1", lambda z: abs(z) < 1)
    require_rank("inputs", inputs, 2)
    require_integer("transient", transient, minimum=0, maximum=time_length("inputs", inputs) - 1)
    if inputs.shape[1] < 2:
        raise ValueError(f"inputs must have at least two copies (columns), got shape {inputs.shape}")
    return lam * jnp.where(jnp.abs(lam) < 1, 1.0, jnp.nan).astype(lam.dtype), inputs
