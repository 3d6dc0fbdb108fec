r"""Products of Gaussian matrices, and vanilla networks in the limit of many units.

Products of Gaussian matrices, J_ij ~ N(0, g²/N) drawn afresh at every step (Newman 1986), with ψ the digamma function:

    Λ_i = log g + ½ [ψ((N - i + 1)/2) + log(2/N)],        (1/2t) log E‖J_t ... J_1 v‖² = log g  for |v| = 1.

A vanilla network x' = Jφ(x) + W s + b in the limit N → ∞, where x_t - b is Gaussian of variance v_t (Sompolinsky et
al. 1988; in discrete time with input, Molgedey et al. 1992), ⟨·⟩ the mean over t:

    v_{t+1} = g² E φ(x_t)² + σ_w² |s_t|²,    Λ_1 = ½ ⟨log g² E φ'(x_t)²⟩,    (1/N) Σ Λ_i = log g - ½ + ⟨E log|φ'(x_t)|⟩.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import digamma, polygamma
from jaxtyping import Array, Float

from .._checks import require_finite, require_integer, require_rank, require_values, time_length

# Trapezoid rule on ±9 standard deviations: for tanh, whose poles lie π/2 off the axis, exact to rounding up to v = 25,
# and to 1e-6 in Λ_1 at v = 100. An even number, so that no node sits on the kink of a ReLU.
_NODES = 400
_BIAS_NODES = 8  # Gauss-Legendre


def gaussian_product_exponents(n: int, gain: float = 1.0) -> Float[Array, " n"]:
    r"""Lyapunov exponents of a product of independent Gaussian N × N matrices of variance g²/N; (N,), nats per step.

    $\Lambda_i = \log g + \tfrac12\big[\psi(\tfrac{N-i+1}2) + \log\tfrac2N\big]$. Reason: in Gram-Schmidt, $R_{ii}^2$ is
    $g^2/N$ times a χ² variable with N - i + 1 degrees of freedom, and $\mathbb E\log\chi^2_m = \psi(m/2)+\log 2$.

    Raises `ValueError` unless n >= 1 and gain is positive and finite; `TypeError` for an n that is not an integer.
    """
    require_integer("n", n, minimum=1)
    _require_gain(gain)
    degrees = jnp.arange(n, 0, -1, dtype=float)
    return jnp.log(gain) + 0.5 * (digamma(degrees / 2) + jnp.log(2.0 / n))


def gaussian_product_spread(n: int) -> Float[Array, ""]:
    r"""t times the variance of the leading exponent of the same product over t steps, $\tfrac14\psi'(N/2)$.

    Each step adds an independent ½ log χ² with N degrees of freedom. Errors as in `gaussian_product_exponents`.
    """
    require_integer("n", n, minimum=1)
    return 0.25 * polygamma(1, jnp.asarray(n / 2))


def gaussian_log_determinant(n: int, gain: float = 1.0) -> Float[Array, ""]:
    r"""$\mathbb E\log|\det J|/N$ of one Gaussian matrix, the mean of `gaussian_product_exponents`.

    It tends to log g - ½ as N → ∞. Errors as in `gaussian_product_exponents`.
    """
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

    `input_powers` holds $\sigma_w^2|s_t|^2$, the variance that the input of step t adds across units. Each unit has its
    own b ~ U[0, `max_bias`] for ever. With $x_t = \sqrt{v_t}\,z + b$, z ~ N(0, 1) independent of b,
    $v_{t+1} = g^2\,\mathbb E\varphi(x_t)^2 + \sigma_w^2|s_t|^2$ from $v_0 = \sigma_w^2|s_0|^2$, and

    $$\Lambda_1 = \tfrac12\langle\log g^2\,\mathbb E\varphi'(x_t)^2\rangle_t,\qquad
      \tfrac1N\sum_i\Lambda_i = \log g-\tfrac12+\langle\mathbb E\log|\varphi'(x_t)|\rangle_t .$$

    For one given input sequence nothing fluctuates in this limit, so Λ_1 is its typical and its mean-square rate; over
    random sequences the rate still differs from one to the next. The first `transient` steps are not averaged. Without
    any input or bias v stays at 0, which is unstable for g > 1: a network started elsewhere does not come there. Where
    φ' is 0 with positive probability (ReLU), the mean exponent is -inf.

    Differentiable in the gain, and in the powers where v > 0. Raises `ValueError` for a gain that is not one positive
    and finite number, T = 0, or powers that are negative or not finite; where these are traced, NaN stands instead.
    """
    gain, input_powers = _network(gain, input_powers)
    require_integer("transient", transient, minimum=0, maximum=len(input_powers) - 1)
    require_finite("max_bias", max_bias)
    variances, leading, mean = _mean_field(gain, input_powers, _quadrature(max_bias), activation)
    return MeanField(variances, jnp.mean(leading[transient:]), jnp.mean(mean[transient:]))


class GainSensitivity(NamedTuple):
    """What the mean-field theory of a vanilla network says of its answer to its weights, after each step."""

    variances: Float[Array, " time"]  # of the currents x_t across units
    to_gain: Float[Array, " time"]  # E(∂x_t/∂g)² of one unit
    to_weights: Float[Array, " time"]  # ‖∂x_t/∂J‖² / N²
    growth: Float[Array, " time"]  # χ_t = g² E φ'(x_t)², by which a step multiplies a squared perturbation


def gain_sensitivity(
    gain: float | Float[Array, ""],
    input_powers: Float[Array, " time"],
    *,
    activation: Callable[[Array], Array] = jnp.tanh,
) -> GainSensitivity:
    r"""Mean-field theory (N → ∞) of how $x_{t+1}=g\hat J\varphi(x_t)+Ws_t$ answers to g and to $J=g\hat J$.

    Ĵ_ij ~ N(0, 1/N). With $y_t=\partial x_t/\partial g$, a unit's $(x_t,y_t)$ is jointly Gaussian, of variances
    $v_t$ and $w_t$ and covariance $c_t$; since $y_{t+1}=\hat J[\varphi(x_t)+g\varphi'(x_t)\,y_t]$,

    $$\begin{aligned}
      v_{t+1}&=g^2\,\mathbb E\varphi^2+\sigma_w^2|s_t|^2,\qquad
      c_{t+1}=g\,\mathbb E[\varphi\,(\varphi+g\varphi'y)],\\
      w_{t+1}&=\mathbb E(\varphi+g\varphi'y)^2,\qquad
      q_{t+1}=\mathbb E\varphi^2+g^2\,\mathbb E\varphi'^2\;q_t .
    \end{aligned}$$

    $q_t=\|\partial x_t/\partial J\|_F^2/N^2$. In a linear network $w=v(1+g^2)/(1-g^2)^2$ and $q=v/(1-g^2)$ in the
    stationary state. `input_powers` holds $\sigma_w^2|s_t|^2$; the state starts at $v_0=\sigma_w^2|s_0|^2$, and knows
    nothing of g. Entry t of each result belongs to $x_t$. Raises `ValueError` as `mean_field`.
    """
    gain, input_powers = _network(gain, input_powers)
    nodes, weights = map(jnp.asarray, _normal_quadrature())
    return _gain_sensitivity(gain, input_powers, nodes, weights, activation)


@eqx.filter_jit  # without it, each call would compile the scan anew
def _mean_field(gain: Array, input_powers: Array, quadrature: tuple, activation: Callable) -> tuple:
    nodes, weights, biases = quadrature
    slope = jnp.vectorize(jax.grad(lambda x: activation(x)))

    def advance(variance, power):
        x = _root(variance) * nodes + biases
        derivative = slope(x)
        log_derivative = _log_tanh_slope(x) if activation is jnp.tanh else jnp.log(jnp.abs(derivative))
        leading = 0.5 * jnp.log(gain**2 * jnp.sum(weights * derivative**2))
        mean = jnp.log(gain) - 0.5 + jnp.sum(weights * log_derivative)
        new = gain**2 * jnp.sum(weights * activation(x) ** 2) + power
        return new, (variance, leading, mean)

    return jax.lax.scan(advance, input_powers[0], input_powers)[1]


@eqx.filter_jit
def _gain_sensitivity(
    gain: Array, input_powers: Array, nodes: Array, weights: Array, activation: Callable
) -> GainSensitivity:
    slope = jnp.vectorize(jax.grad(lambda x: activation(x)))

    def average(values):
        return jnp.sum(weights * values)

    def advance(carry, power):
        v, c, w, q = carry
        x = _root(v) * nodes
        f, df = activation(x), slope(x)
        tilt = jnp.where(v > 0, c / jnp.where(v > 0, v, 1.0), 0.0)  # E[y | x] = tilt · x
        growth = gain**2 * average(df**2)
        coupling = gain * tilt * average(x * f * df)
        new_c = gain * (average(f**2) + coupling)
        new_w = average(f**2) + 2 * coupling + gain**2 * tilt**2 * average((x * df) ** 2) + growth * (w - tilt * c)
        return (gain**2 * average(f**2) + power, new_c, new_w, average(f**2) + growth * q), (v, w, q, growth)

    start = (input_powers[0], *(jnp.zeros_like(input_powers[0]),) * 3)
    return GainSensitivity(*jax.lax.scan(advance, start, input_powers)[1])


def _network(gain: float | Float[Array, ""], input_powers: Float[Array, " time"]) -> tuple[Array, Array]:
    """Both checked; where they are traced, NaN in place of what is not allowed."""
    input_powers = jnp.asarray(input_powers, float)
    require_rank("gain", gain, 0)
    require_rank("input_powers", input_powers, 1)
    time_length("input_powers", input_powers)
    _require_gain(gain)
    require_values("input_powers", input_powers, "non-negative and finite", lambda p: (p >= 0) & np.isfinite(p))
    gain = jnp.asarray(gain, input_powers.dtype)
    gain = jnp.where((gain > 0) & jnp.isfinite(gain), gain, jnp.nan)
    return gain, jnp.where((input_powers >= 0) & jnp.isfinite(input_powers), input_powers, jnp.nan)


def _root(variance: Array) -> Array:
    """√v, with the slope 0 at v = 0: infinite, it would make NaN of the derivative in g, which is 0 there."""
    return jnp.where(variance == 0, 0.0, jnp.sqrt(jnp.where(variance == 0, 1.0, variance)))


def _require_gain(gain: float | Float[Array, ""]) -> None:
    require_values("gain", gain, "positive and finite", lambda g: (g > 0) & np.isfinite(g))


def _log_tanh_slope(x: Array) -> Array:
    """-2 log cosh x. The logarithm of 1 - tanh² is -inf beyond |x| = 19 (9 in float32), which the outer nodes reach."""
    return 2 * (jnp.log(2.0) - jnp.abs(x) - jnp.log1p(jnp.exp(-2 * jnp.abs(x))))


def _normal_quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Nodes z and weights of the average over z ~ N(0, 1)."""
    z = np.linspace(-9.0, 9.0, _NODES)
    weights = np.exp(-(z**2) / 2)
    return z, weights / weights.sum()


def _quadrature(max_bias: float) -> tuple[Array, Array, Array]:
    """Nodes z, joint weights and biases b of the average over z ~ N(0, 1) and b ~ U[0, max_bias]."""
    z, z_weights = _normal_quadrature()
    points, b_weights = np.polynomial.legendre.leggauss(_BIAS_NODES)
    biases = max_bias * (points + 1) / 2
    weights = np.outer(z_weights, b_weights / 2)
    return jnp.asarray(np.repeat(z, _BIAS_NODES)), jnp.asarray(weights.ravel()), jnp.asarray(np.tile(biases, _NODES))
