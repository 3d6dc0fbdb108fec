r"""Closed forms. Nothing here simulates a network or imports one.

Products of independent Gaussian matrices, J_ij ~ N(0, g²/N) drawn afresh at every step (Newman 1986), ψ the digamma function:

    Λ_i = log g + ½ [ψ((N - i + 1)/2) + log(2/N)],        ½ log E‖J_t ... J_1 v‖² / t = log g.

A vanilla network x' = Jφ(x) + W s + b in the limit N → ∞, where x_t is Gaussian of variance v_t (Sompolinsky et al. 1988;
in discrete time with input, Molgedey et al. 1992):

    v_{t+1} = g² E φ(x_t)² + σ_w² |s_t|²,      Λ_1 = ½ ⟨log g² E φ'(x_t)²⟩_t,      (1/N) Σ Λ_i = log g - ½ + ⟨E log|φ'(x_t)|⟩_t.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import digamma, polygamma
from jaxtyping import Array, Float

from ._checks import require_finite, require_integer, require_rank, require_values

_NODES = 201  # of the trapezoid rule on ±9 standard deviations: exact to rounding for φ analytic within π/2 of the axis
_BIAS_NODES = 8  # Gauss-Legendre


def gaussian_product_exponents(n: int, gain: float = 1.0) -> Float[Array, " n"]:
    r"""Lyapunov exponents of a product of independent Gaussian N × N matrices of variance g²/N; (N,), nats per step.

    $\Lambda_i = \log g + \tfrac12\big[\psi(\tfrac{N-i+1}2) + \log\tfrac2N\big]$. Reason: in Gram-Schmidt, $R_{ii}^2$ is $g^2/N$ times a
    χ² variable with N - i + 1 degrees of freedom, and $\mathbb E\log\chi^2_m = \psi(m/2)+\log 2$.
    """
    require_integer("n", n, minimum=1)
    require_values("gain", gain, "positive", lambda g: g > 0)
    degrees = jnp.arange(n, 0, -1, dtype=float)
    return jnp.log(gain) + 0.5 * (digamma(degrees / 2) + jnp.log(2.0 / n))


def gaussian_product_spread(n: int) -> Float[Array, ""]:
    r"""t · Var of the finite-time leading exponent of the same product, $\tfrac14\psi'(N/2)$: each step adds an independent ½ log χ²_N."""
    require_integer("n", n, minimum=1)
    return 0.25 * polygamma(1, jnp.asarray(n / 2))


def gaussian_log_determinant(n: int, gain: float = 1.0) -> Float[Array, ""]:
    r"""$\mathbb E\log|\det J|/N$ of one Gaussian matrix: the mean of `gaussian_product_exponents`; → log g - ½ as N → ∞."""
    return jnp.mean(gaussian_product_exponents(n, gain))


class MeanField(NamedTuple):
    """What the mean-field theory of a vanilla network says."""

    variances: Float[Array, " time"]  # of the currents x_t across units, without the bias
    leading_exponent: Float[Array, ""]  # Λ_1, nats per step
    mean_exponent: Float[Array, ""]  # (1/N) Σ Λ_i, nats per step


def mean_field(
    gain: float | Float[Array, ""],
    input_powers: Float[Array, " time"],
    *,
    max_bias: float = 0.0,
    activation: Callable[[Array], Array] = jnp.tanh,
    transient: int = 0,
) -> MeanField:
    r"""Mean-field theory (N → ∞) of $x_{t+1} = J\varphi(x_t) + W s_t + b$, for Gaussian J with variance g²/N.

    `input_powers` holds $\sigma_w^2|s_t|^2$, the variance that the input of step t adds across units; b ~ U[0, `max_bias`].
    The variance of the currents obeys $v_{t+1} = g^2\,\mathbb E\varphi(x_t)^2 + \sigma_w^2|s_t|^2$ with $x_t = \sqrt{v_t}\,z + b$, and

    $$\Lambda_1 = \tfrac12\langle\log g^2\,\mathbb E\varphi'(x_t)^2\rangle_t,\qquad
      \tfrac1N\sum_i\Lambda_i = \log g-\tfrac12+\langle\mathbb E\log|\varphi'(x_t)|\rangle_t .$$

    In this limit the typical and the mean-square rate coincide. The first `transient` steps are not averaged.
    Raises `ValueError` for a gain that is not positive, T = 0, or powers that are negative or not finite.
    """
    require_rank("input_powers", input_powers, 1)
    require_integer("transient", transient, minimum=0, maximum=input_powers.shape[0] - 1)
    require_values("gain", gain, "positive", lambda g: g > 0)
    require_finite("input_powers", input_powers)
    require_values("input_powers", input_powers, "non-negative", lambda p: p >= 0)
    nodes, weights, biases = _quadrature(max_bias)
    slope = jnp.vectorize(jax.grad(lambda x: activation(x)))

    def advance(variance, power):
        x = jnp.sqrt(variance) * nodes + biases
        phi, derivative = activation(x), slope(x)
        leading = 0.5 * jnp.log(gain**2 * jnp.sum(weights * derivative**2))
        mean = jnp.log(gain) - 0.5 + jnp.sum(weights * jnp.log(jnp.abs(derivative)))
        new = gain**2 * jnp.sum(weights * phi**2) + power
        return new, (variance, leading, mean)

    _, (variances, leading, mean) = jax.lax.scan(advance, input_powers[0], input_powers)
    return MeanField(variances, jnp.mean(leading[transient:]), jnp.mean(mean[transient:]))


def _quadrature(max_bias: float) -> tuple[Array, Array, Array]:
    """Nodes z, joint weights and biases b of the average over z ~ N(0, 1) and b ~ U[0, max_bias]."""
    z = np.linspace(-9.0, 9.0, _NODES)
    z_weights = np.exp(-(z**2) / 2)
    points, b_weights = np.polynomial.legendre.leggauss(_BIAS_NODES)
    biases = max_bias * (points + 1) / 2
    weights = np.outer(z_weights / z_weights.sum(), b_weights / 2)
    return tuple(jnp.asarray(a) for a in (np.repeat(z, _BIAS_NODES), weights.ravel(), np.tile(biases, _NODES)))
