r"""State-space layers: a differential equation h' = A h + B x, sampled with a step Δ while x is held.

h_t = e^{ΔA} h_{t-1} + A⁻¹(e^{ΔA} - 1) B x_t            zero-order hold; A⁻¹(e^{ΔA} - 1) ≈ Δ
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, PRNGKeyArray

from .._checks import require_values
from ..recurrence import linear_recurrence
from ._base import (
    Layer,
    LinearLayer,
    apply_complex,
    as_inputs,
    inverse_softplus,
    real_part,
    require_range,
    require_sizes,
    scaled_normal,
)


class S4D(LinearLayer):
    r"""The diagonal S4 (Gu et al. 2022): for each input feature f, n = `d_hidden` complex states of its own.

    $$\lambda=e^{\Delta A},\qquad h_t=\lambda\odot h_{t-1}+\frac{\lambda-1}{A}\odot B\,x_t,\qquad
      u_t=2\,\Re\sum_j C_jh_{t,j}+Dx_t,\qquad y_t=Wu_t$$

    with $A=-e^{a}+i\omega$ and $\Delta=e^{\delta}$, one Δ per feature; the 2 stands for the conjugate half of the
    states, which is not computed. W, of shape (d_out, d_in), mixes the features.

    - Normaliser: $(\lambda-1)/A$. If the memory is long because Δ is small, $1-|\lambda|\approx\Delta|\Re A|$, and this
      is $\approx\Delta\propto1-|\lambda|$; for real λ it is $(1-\lambda)/|A|$, the factor that constant input asks for.
      If it is long because Re A is small, it tends to Δ and does not fall with $1-|\lambda|$.
    - Reparametrisation: $\log|\lambda|=-e^{\delta+a}$, exponential in both parameters.

    **Arguments:** the sizes (d_hidden is counted per feature); Δ starts log-uniform in [`min_step`, `max_step`],
    $\Re A=-$`decay`, $\Im A_j=\pi j$ for j = 0 ... n - 1 (S4D-Lin), B = 1, $\mathbb E|C|^2=1$, D ~ N(0, 1),
    W ~ N(0, 1/d_in). So with d_hidden = 1 the eigenvalues are real. All parameters are real.

    Raises `ValueError` for a size below 1, unless 0 < min_step <= max_step < ∞ and 0 < decay < ∞; `TypeError` for sizes
    that are not integers.
    """

    log_decay: Float[Array, "input hidden"]  # a
    frequency: Float[Array, "input hidden"]  # ω, radians per unit of time
    log_step: Float[Array, " input"]  # δ
    input_real: Float[Array, "input hidden"]  # Re B
    input_imag: Float[Array, "input hidden"]  # Im B
    output_real: Float[Array, "input hidden"]  # Re C
    output_imag: Float[Array, "input hidden"]  # Im C
    feedthrough: Float[Array, " input"]  # D
    mixing: Float[Array, "output input"]  # W

    def __init__(
        self,
        d_in: int,
        d_hidden: int,
        d_out: int,
        *,
        min_step: float = 1e-3,
        max_step: float = 1e-1,
        decay: float = 0.5,
        key: PRNGKeyArray,
    ):
        require_sizes(d_in=d_in, d_hidden=d_hidden, d_out=d_out)
        step_key, output_real_key, output_imag_key, feedthrough_key, mixing_key = jax.random.split(key, 5)
        shape = (d_in, d_hidden)
        self.log_decay, self.frequency = _s4d_lin(shape, decay)
        self.log_step = _log_steps(step_key, d_in, min_step, max_step)
        self.input_real, self.input_imag = jnp.ones(shape), jnp.zeros(shape)
        self.output_real = scaled_normal(output_real_key, shape, 1 / 2)
        self.output_imag = scaled_normal(output_imag_key, shape, 1 / 2)
        self.feedthrough = scaled_normal(feedthrough_key, (d_in,), 1)
        self.mixing = scaled_normal(mixing_key, (d_out, d_in), 1 / d_in)

    @property
    def _d_in(self) -> int:
        return self.mixing.shape[-1]

    def eigenvalues(self) -> Complex[Array, " states"]:
        """λ, feature by feature; (d_in · d_hidden,). One of each conjugate pair."""
        return self._hold()[0].ravel()

    def states(self, inputs: Float[Array, "time input"]) -> Complex[Array, "time states"]:
        """h after each step, feature by feature; (T, d_in · d_hidden), complex."""
        inputs = as_inputs(inputs, self.mixing)
        lam, factor = self._hold()
        weight = factor * jax.lax.complex(self.input_real, self.input_imag)
        drive = inputs[:, :, None].astype(weight.dtype) * weight[None]
        return linear_recurrence(lam.ravel(), drive.reshape(len(inputs), -1))

    def __call__(self, inputs: Float[Array, "time input"]) -> Float[Array, "time output"]:
        """y; (T, d_out)."""
        inputs = as_inputs(inputs, self.mixing)
        h = self.states(inputs).reshape(len(inputs), *self.output_real.shape)
        read = lambda part, weight: jnp.einsum("tfn,fn->tf", part, weight)  # noqa: E731
        outputs = 2 * (read(h.real, self.output_real) - read(h.imag, self.output_imag))
        return (outputs + inputs * self.feedthrough[None]) @ self.mixing.T

    def _hold(self) -> tuple[Complex[Array, "input hidden"], Complex[Array, "input hidden"]]:
        return _zero_order_hold(self.log_decay, self.frequency, self.log_step[:, None])


class S5(LinearLayer):
    r"""S5 (Smith et al. 2023): S4D's recurrence with one state of N = `d_hidden` numbers for all features.

    $$\lambda=e^{\Delta A},\qquad h_t=\lambda\odot h_{t-1}+\frac{\lambda-1}{A}\odot Bx_t,\qquad
      y_t=2\,\Re(Ch_t)+Dx_t$$

    with $A=-e^{a}+i\omega$ and $\Delta=e^{\delta}$, one Δ per state. Normaliser and reparametrisation are S4D's.

    **Arguments:** as `S4D`, with N = d_hidden. A starts as S4D's (the paper starts from the spectrum of another matrix,
    HiPPO-LegS's normal part); $\mathbb E|B|^2=1/$d_in, $\mathbb E|C|^2=1/$d_hidden, D ~ N(0, 1/d_in). Errors: as `S4D`.
    """

    log_decay: Float[Array, " hidden"]  # a
    frequency: Float[Array, " hidden"]  # ω, radians per unit of time
    log_step: Float[Array, " hidden"]  # δ
    input_real: Float[Array, "hidden input"]  # Re B
    input_imag: Float[Array, "hidden input"]  # Im B
    output_real: Float[Array, "output hidden"]  # Re C
    output_imag: Float[Array, "output hidden"]  # Im C
    feedthrough: Float[Array, "output input"]  # D

    def __init__(
        self,
        d_in: int,
        d_hidden: int,
        d_out: int,
        *,
        min_step: float = 1e-3,
        max_step: float = 1e-1,
        decay: float = 0.5,
        key: PRNGKeyArray,
    ):
        require_sizes(d_in=d_in, d_hidden=d_hidden, d_out=d_out)
        step_key, input_real_key, input_imag_key, output_real_key, output_imag_key, feedthrough_key = jax.random.split(
            key, 6
        )
        self.log_decay, self.frequency = _s4d_lin((d_hidden,), decay)
        self.log_step = _log_steps(step_key, d_hidden, min_step, max_step)
        self.input_real = scaled_normal(input_real_key, (d_hidden, d_in), 1 / (2 * d_in))
        self.input_imag = scaled_normal(input_imag_key, (d_hidden, d_in), 1 / (2 * d_in))
        self.output_real = scaled_normal(output_real_key, (d_out, d_hidden), 1 / (2 * d_hidden))
        self.output_imag = scaled_normal(output_imag_key, (d_out, d_hidden), 1 / (2 * d_hidden))
        self.feedthrough = scaled_normal(feedthrough_key, (d_out, d_in), 1 / d_in)

    @property
    def _d_in(self) -> int:
        return self.feedthrough.shape[-1]

    def eigenvalues(self) -> Complex[Array, " hidden"]:
        """λ; (N,). One of each conjugate pair."""
        return self._hold()[0]

    def states(self, inputs: Float[Array, "time input"]) -> Complex[Array, "time hidden"]:
        """h after each step; (T, N), complex."""
        inputs = as_inputs(inputs, self.feedthrough)
        lam, factor = self._hold()
        weight = factor[:, None] * jax.lax.complex(self.input_real, self.input_imag)
        return linear_recurrence(lam, apply_complex(weight, inputs))

    def __call__(self, inputs: Float[Array, "time input"]) -> Float[Array, "time output"]:
        """y; (T, d_out)."""
        inputs = as_inputs(inputs, self.feedthrough)
        return 2 * real_part(self.output_real, self.output_imag, self.states(inputs)) + inputs @ self.feedthrough.T

    def _hold(self) -> tuple[Complex[Array, " hidden"], Complex[Array, " hidden"]]:
        return _zero_order_hold(self.log_decay, self.frequency, self.log_step)


class SelectiveSSM(Layer):
    r"""The selective state-space layer of Mamba (Gu & Dao 2023): step, input and output weights read the input.

    For channel f (an input feature) and its n = `d_hidden` real states j,

    $$\Delta_t=\mathrm{softplus}(W_\Delta x_t+b_\Delta),\qquad\lambda_{t,fj}=e^{-\Delta_{t,f}e^{a_{fj}}},\qquad
      h_{t,fj}=\lambda_{t,fj}h_{t-1,fj}+\Delta_{t,f}\,B_j(x_t)\,x_{t,f},$$

    $$u_{t,f}=\sum_jC_j(x_t)\,h_{t,fj}+D_fx_{t,f},\qquad y_t=Wu_t,\qquad B(x)=W_Bx+b_B,\quad C(x)=W_Cx+b_C .$$

    - Normaliser: $\Delta_t$. Where it is small, $1-\lambda\approx\Delta e^a$, so it is $\propto1-\lambda$, as S4D's. If
      the memory is long because $e^a$ is small, it does not fall.
    - Reparametrisation: $\log\lambda=-\Delta e^a$; exponential in a, and in $b_\Delta$ where Δ is small.

    **Arguments:** as `S4D`; for x = 0 the steps start log-uniform in [`min_step`, `max_step`] and
    $e^{a_{fj}}=$ `decay` · (j + 1). Weights W ~ N(0, 1/d_in), D ~ N(0, 1), $b_B=b_C=0$. Mamba has no such biases, and
    gives $W_\Delta$ a low rank; with them selectivity can be switched off, by setting $W_\Delta=W_B=W_C=0$ and
    $b_B=b_C=1$ with `eqx.tree_at`. Errors: as `S4D`.
    """

    log_decay: Float[Array, "input hidden"]  # a
    step_weight: Float[Array, "input input"]  # W_Δ
    step_bias: Float[Array, " input"]  # b_Δ
    input_weight: Float[Array, "hidden input"]  # W_B
    input_bias: Float[Array, " hidden"]  # b_B
    output_weight: Float[Array, "hidden input"]  # W_C
    output_bias: Float[Array, " hidden"]  # b_C
    feedthrough: Float[Array, " input"]  # D
    mixing: Float[Array, "output input"]  # W

    def __init__(
        self,
        d_in: int,
        d_hidden: int,
        d_out: int,
        *,
        min_step: float = 1e-3,
        max_step: float = 1e-1,
        decay: float = 1.0,
        key: PRNGKeyArray,
    ):
        require_sizes(d_in=d_in, d_hidden=d_hidden, d_out=d_out)
        _require_decay(decay)
        step_key, bias_key, input_key, output_key, feedthrough_key, mixing_key = jax.random.split(key, 6)
        self.log_decay = jnp.broadcast_to(jnp.log(decay * jnp.arange(1.0, d_hidden + 1)), (d_in, d_hidden))
        self.step_weight = scaled_normal(step_key, (d_in, d_in), 1 / d_in)
        self.step_bias = inverse_softplus(jnp.exp(_log_steps(bias_key, d_in, min_step, max_step)))
        self.input_weight = scaled_normal(input_key, (d_hidden, d_in), 1 / d_in)
        self.input_bias = jnp.zeros(d_hidden)
        self.output_weight = scaled_normal(output_key, (d_hidden, d_in), 1 / d_in)
        self.output_bias = jnp.zeros(d_hidden)
        self.feedthrough = scaled_normal(feedthrough_key, (d_in,), 1)
        self.mixing = scaled_normal(mixing_key, (d_out, d_in), 1 / d_in)

    def states(self, inputs: Float[Array, "time input"]) -> Float[Array, "time states"]:
        """h after each step, channel by channel; (T, d_in · d_hidden)."""
        inputs = as_inputs(inputs, self.mixing)
        step = self._steps(inputs)
        weight = inputs @ self.input_weight.T + self.input_bias[None]
        drive = (step * inputs)[:, :, None] * weight[:, None]
        return linear_recurrence(self.coefficients(inputs), drive.reshape(len(inputs), -1))

    def coefficients(self, inputs: Float[Array, "time input"]) -> Float[Array, "time states"]:
        """λ_t, channel by channel; (T, d_in · d_hidden)."""
        step = self._steps(as_inputs(inputs, self.mixing))
        return jnp.exp(-step[:, :, None] * jnp.exp(self.log_decay)[None]).reshape(len(inputs), -1)

    def __call__(self, inputs: Float[Array, "time input"]) -> Float[Array, "time output"]:
        """y; (T, d_out)."""
        inputs = as_inputs(inputs, self.mixing)
        h = self.states(inputs).reshape(len(inputs), *self.log_decay.shape)
        weight = inputs @ self.output_weight.T + self.output_bias[None]
        outputs = jnp.einsum("tfn,tn->tf", h, weight) + inputs * self.feedthrough[None]
        return outputs @ self.mixing.T

    def _steps(self, inputs: Array) -> Array:
        """Δ_t; (T, d_in)."""
        return jax.nn.softplus(inputs @ self.step_weight.T + self.step_bias[None])


def _zero_order_hold(log_decay: Array, frequency: Array, log_step: Array) -> tuple[Array, Array]:
    """λ = e^{ΔA} and (λ - 1)/A."""
    poles = jax.lax.complex(-jnp.exp(log_decay), frequency)
    step = jnp.exp(log_step).astype(poles.dtype)
    return jnp.exp(step * poles), step * _mean_exponential(step * poles)


def _mean_exponential(z: Array) -> Array:
    """(e^z - 1)/z, the mean of e^{sz} over 0 < s < 1; near 0 by its series, whose derivatives do not cancel either."""
    small = jnp.abs(z) < 0.1
    near, far = jnp.where(small, z, 0), jnp.where(small, 1, z)
    series = jnp.ones_like(z)
    for k in range(10, 1, -1):  # 1 + z/2 (1 + z/3 (1 + ...)); what is left out is below 0.1^10/11! = 3e-18
        series = 1 + near / k * series
    return jnp.where(small, series, jnp.expm1(far) / far)


def _s4d_lin(shape: tuple[int, ...], decay: float) -> tuple[Array, Array]:
    """log(-Re A) and Im A."""
    _require_decay(decay)
    return jnp.full(shape, np.log(decay).item()), jnp.broadcast_to(jnp.pi * jnp.arange(0.0, shape[-1]), shape)


def _log_steps(key: PRNGKeyArray, n: int, min_step: float, max_step: float) -> Float[Array, " {n}"]:
    require_range("min_step", min_step, "max_step", max_step)
    return jax.random.uniform(key, (n,), minval=jnp.log(min_step), maxval=jnp.log(max_step))


def _require_decay(decay: float) -> None:
    require_values("decay", decay, "positive and finite", lambda x: (x > 0) & np.isfinite(x))
