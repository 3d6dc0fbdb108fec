r"""Input processes and tasks.

autoregressive:  x_t = ρ x_{t-1} + √(1 - ρ²) ε_t,   ε_t ~ N(0, 1),   so that  E[x_t x_{t+k}] = ρ^|k|
oscillation:     the same with a complex ρ = r e^{iφ}, its real part,  E[x_t x_{t+k}] = r^|k| cos(φk)
two_exponential: white noise and an autoregressive process, added,  E[x_t x_{t+k}] = white [k = 0] + slow ρ^|k|
delayed_copy:    y_t = x_{t-delay} for bits x_t, once there is such a bit
delayed_xor:     y_t = x_{t-delay} ⊕ x_{t-2 delay} ⊕ ..., of 2, 4, 8 ... such bits
spatial_xor:     y_t = the ⊕ of several inputs, delay steps ago
LinearTeacher:   h_t = A h_{t-1} + B x_t,  y_t = C h_t + D x_t,  x_t ~ N(0, 1),  the eigenvalues of A in a ring
"""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from . import _resources
from ._checks import require_finite, require_integer, require_rank, require_values
from .eigenvalues import squash_spectrum
from .layers import LinearRNN
from .recurrence import linear_recurrence


def autoregressive(
    key: PRNGKeyArray, length: int, rho: float | Float[Array, ""], shape: tuple[int, ...] = ()
) -> Float[Array, "time *shape"]:
    r"""A stationary Gaussian AR(1) process of unit variance, $\mathbb E[x_t x_{t+k}] = \rho^{|k|}$; (length, *shape).

    The entries of `shape` are independent copies. ρ = 0 is white noise, ρ = 1 one draw repeated for ever. The first
    value is drawn from the stationary law, so there is no transient to skip.

    Raises `ValueError` unless ρ is one number in [0, 1] and `length` at least 1; a traced ρ outside gives NaN.
    """
    require_integer("length", length, minimum=1)
    require_rank("rho", rho, 0)
    require_values("rho", rho, "in [0, 1]", lambda r: (r >= 0) & (r <= 1))
    noise = jax.random.normal(key, (length, *shape))
    rho = jnp.asarray(rho, noise.dtype)
    rho = jnp.where((rho >= 0) & (rho <= 1), rho, jnp.nan)
    scaled = (jnp.sqrt(1 - rho**2) * noise).at[0].set(noise[0])
    flat = scaled.reshape(length, -1)
    return linear_recurrence(jnp.broadcast_to(rho, flat.shape[1:]), flat).reshape(noise.shape)


def oscillation(
    key: PRNGKeyArray, length: int, persistence: float, phase: float, shape: tuple[int, ...] = ()
) -> Float[Array, "time *shape"]:
    r"""A stationary Gaussian oscillation, $\mathbb E[x_tx_{t+k}]=r^{|k|}\cos\varphi k$; (length, *shape).

    $x_t=\mathrm{Re}\,z_t$ with $z_t=r\,e^{i\varphi}z_{t-1}+\sqrt{1-r^2}\,\epsilon_t$, the real and the imaginary part
    of $\epsilon_t$ being independent N(0, 1). `persistence` is r, `phase` is φ in radians per step: a period of 2π/φ
    steps that drifts over 1/(1 - r) of them. The spectrum is $\tfrac12[S_r(\omega-\varphi)+S_r(\omega+\varphi)]$ with
    $S_r$ = `theory.power_spectrum(·, r)`. The entries of `shape` are independent copies; the start is stationary.

    Raises `ValueError` unless r is one number in [0, 1], φ one finite number and `length` at least 1; traced values
    that are not allowed give NaN.
    """
    require_integer("length", length, minimum=1)
    for name, value in {"persistence": persistence, "phase": phase}.items():
        require_rank(name, value, 0)
    require_values("persistence", persistence, "in [0, 1]", lambda r: (r >= 0) & (r <= 1))
    require_finite("phase", phase)
    noise = jax.random.normal(key, (2, length, *shape))
    r, phi = jnp.asarray(persistence, noise.dtype), jnp.asarray(phase, noise.dtype)
    r = jnp.where((r >= 0) & (r <= 1), r, jnp.nan)
    scaled = (jnp.sqrt(1 - r**2) * noise).at[:, 0].set(noise[:, 0]).reshape(2, length, -1)
    turn = jnp.broadcast_to(jax.lax.complex(r * jnp.cos(phi), r * jnp.sin(phi)), scaled.shape[2:])
    return linear_recurrence(turn, jax.lax.complex(scaled[0], scaled[1])).real.reshape(noise.shape[1:])


def two_exponential(
    key: PRNGKeyArray,
    length: int,
    shape: tuple[int, ...] = (),
    *,
    white: float | Float[Array, ""] = 0.332,
    slow: float | Float[Array, ""] = 0.043056426671195004,
    rho: float | Float[Array, ""] = 0.9970052541497257,
) -> Float[Array, "time *shape"]:
    r"""White noise plus a slow process, $\mathbb E[x_tx_{t+k}]=\mathrm{slow}\,\rho^{|k|}$ for k ≠ 0; (length, *shape).

    $x_t=\sqrt{\mathrm{white}}\,w_t+\sqrt{\mathrm{slow}}\,u_t$ and $\mathbb E x_t^2=\mathrm{white}+\mathrm{slow}$.
    Here w is white and u is `autoregressive` with correlation ρ: Gaussian of unit variance, independent of one another,
    stationary from the first step. The entries of `shape` are independent copies. The defaults are what Zucchet &
    Orvieto (2024) fitted to the token embeddings of a BERT (their Fig. 12): $\mathbb E x^2=0.375$, and a slow part that
    lasts 1/(1 - ρ) = 334 steps.

    Raises `ValueError` unless white and slow are one number each, at least 0 and finite, ρ one in [0, 1] and `length`
    at least 1; traced values that are not allowed give NaN.
    """
    variances = {"white": white, "slow": slow}
    for name, value in variances.items():
        require_rank(name, value, 0)
        require_values(name, value, "at least 0 and finite", lambda v: (v >= 0) & np.isfinite(v))
    white_key, slow_key = jax.random.split(key)
    memory = autoregressive(slow_key, length, rho, shape)
    noise = jax.random.normal(white_key, memory.shape)
    return _root(white, noise.dtype) * noise + _root(slow, noise.dtype) * memory


def _root(variance: float | Float[Array, ""], dtype: np.dtype) -> Array:
    value = jnp.asarray(variance, dtype)
    return jnp.sqrt(jnp.where((value >= 0) & jnp.isfinite(value), value, jnp.nan))


def fair_bits(key: PRNGKeyArray, length: int, d_in: int = 1) -> Float[Array, "time d_in"]:
    """Independent bits, 0 or 1 with probability ½ each, as floats; (length, d_in).

    Raises `ValueError` for a length or a `d_in` below 1, `TypeError` for one that is not an integer.
    """
    require_integer("length", length, minimum=1)
    require_integer("d_in", d_in, minimum=1)
    return jax.random.bernoulli(key, 0.5, (length, d_in)).astype(float)


BitTask = tuple[Float[Array, "time d_in"], Float[Array, "time 1"], Float[Array, "time"]]


def delayed_copy(key: PRNGKeyArray, length: int, delay: int | Int[Array, ""]) -> BitTask:
    r"""Bits to be repeated `delay` steps later: inputs, targets, (length, 1) each, and mask, (length,).

    $x_t\in\{0,1\}$ are fair independent bits, $y_t=x_{t-\mathrm{delay}}$. The mask is 1 where that bit has been seen,
    from t = delay on, and 0 before, where the targets are 0 too. `delay` may be traced: one program serves all delays.

    Raises `ValueError` unless 0 <= delay < length and `length` is at least 1, `TypeError` for a delay that is not an
    integer; a traced delay outside gives targets NaN.
    """
    return _parity_of_the_past(fair_bits(key, length), delay, 1)


def delayed_xor(key: PRNGKeyArray, length: int, delay: int | Int[Array, ""], order: int = 1) -> BitTask:
    r"""The parity of n = 2^order earlier bits, $y_t=x_{t-d}\oplus x_{t-2d}\oplus\dots\oplus x_{t-nd}$ with d = `delay`.

    Inputs, targets, (length, 1) each, and mask, (length,): 1 from t = n·delay on, where all these bits have been seen,
    and 0 before. A delay of 0 gives targets 0. Engelken (2023) calls n·delay the delay for n = 2; the released code
    takes the number that is meant here, and scores one step more, for which the oldest bit had not been seen.

    Raises `ValueError` unless 0 <= n·delay < length, `order` is at least 1 and `length` at least 1; `TypeError` for
    what is not an integer; a traced delay outside gives targets NaN.
    """
    require_integer("order", order, minimum=1)
    return _parity_of_the_past(fair_bits(key, length), delay, 2**order)


def spatial_xor(key: PRNGKeyArray, length: int, delay: int | Int[Array, ""], d_in: int = 2) -> BitTask:
    r"""The parity of several inputs `delay` steps ago, $y_t=x_{t-d,1}\oplus\dots\oplus x_{t-d,n}$ with n = `d_in`.

    Inputs (length, d_in), targets (length, 1), and mask (length,), 1 from t = delay on. Engelken (2023) names such a
    task; its generator is not in the released code, so this definition is ours. Errors: as `delayed_copy`, and
    `ValueError` for a `d_in` below 1.
    """
    inputs = fair_bits(key, length, d_in)
    _, targets, mask = _parity_of_the_past(jnp.mod(jnp.sum(inputs, axis=1, keepdims=True), 2), delay, 1)
    return inputs, targets, mask


def _parity_of_the_past(bits: Array, delay: int | Int[Array, ""], taps: int) -> BitTask:
    """Bits (T, 1), their parity at t - delay, ..., t - taps · delay, and where all of these are at least 0."""
    most = (len(bits) - 1) // taps
    require_rank("delay", delay, 0)
    if not jnp.issubdtype(jnp.result_type(delay), jnp.integer):
        raise TypeError(f"delay must be an integer, got {delay!r} of type {jnp.result_type(delay)}")
    require_values("delay", delay, f"between 0 and {most}", lambda d: (d >= 0) & (d <= most))
    delay = jnp.asarray(delay, int)
    seen = (jnp.arange(len(bits)) >= taps * delay).astype(bits.dtype)
    ones = sum(jnp.roll(bits, tap * delay, axis=0) for tap in range(1, taps + 1))
    targets = jnp.where((delay >= 0) & (delay <= most), jnp.mod(ones, 2) * seen[:, None], jnp.nan)
    return bits, targets, seen


class LinearTeacher(eqx.Module):
    r"""A random linear system with one input and one output, for a student to imitate (Zucchet & Orvieto 2024).

    $$h_t=Ah_{t-1}+Bx_t,\qquad y_t=Ch_t+Dx_t,\qquad x_t\sim\mathcal N(0,1)\text{ white},$$

    with n = `d_hidden`; A is Gaussian of variance 1/n, its eigenvalues moved by `scanrnn.eigenvalues.squash_spectrum`;
    B ~ N(0, 1), C ~ N(0, 1/n), D ~ N(0, 1).

    Raises `ValueError` unless n >= 1, 0 <= min_modulus <= max_modulus <= 1 and 0 <= max_phase <= π; `TypeError` for an
    n that is not an integer. Where the values are traced, the system is NaN instead.
    """

    system: LinearRNN

    def __init__(
        self,
        d_hidden: int,
        *,
        min_modulus: float,
        max_modulus: float = 1.0,
        max_phase: float = np.pi,
        key: PRNGKeyArray,
    ):
        require_integer("d_hidden", d_hidden, minimum=1)
        recurrent_key, input_key, output_key, feedthrough_key = jax.random.split(key, 4)
        self.system = LinearRNN.from_weights(
            squash_spectrum(
                jax.random.normal(recurrent_key, (d_hidden, d_hidden)) / np.sqrt(d_hidden).item(),
                min_modulus=min_modulus,
                max_modulus=max_modulus,
                max_phase=max_phase,
            ),
            jax.random.normal(input_key, (d_hidden, 1)),
            jax.random.normal(output_key, (1, d_hidden)) / np.sqrt(d_hidden).item(),
            jax.random.normal(feedthrough_key, (1, 1)),
        )

    @classmethod
    def released(cls, *, min_modulus: float, max_phase: float = 3.14) -> "LinearTeacher":
        """The one teacher behind all published runs: the paper's loader ignores its seed (d_hidden = 10).

        `max_phase` is 3.14 there, not π. Errors: as `squash_spectrum`.
        """
        draws = json.loads(_resources.find("results/zo24-teacher.json").read_text(encoding="utf-8"))
        matrix, *rest = (jnp.asarray(draws[name], float) for name in ("A0", "B", "C", "D"))
        recurrent = squash_spectrum(matrix, min_modulus=min_modulus, max_phase=max_phase)
        like = cls(len(recurrent), min_modulus=0.0, key=jax.random.key(0))
        return eqx.tree_at(lambda teacher: teacher.system, like, LinearRNN.from_weights(recurrent, *rest))

    def eigenvalues(self) -> Array:
        """λ; (n,), complex."""
        return self.system.eigenvalues()

    def impulse_response(self, length: int) -> Float[Array, "{length} 1 1"]:
        """κ_k = C A^k B, and D more at k = 0; (length, 1, 1)."""
        return self.system.impulse_response(length)

    def sample(self, key: PRNGKeyArray, length: int) -> tuple[Float[Array, "time 1"], Float[Array, "time 1"]]:
        """One sequence of white inputs, and the outputs, from the state zero; each (length, 1)."""
        require_integer("length", length, minimum=1)
        inputs = jax.random.normal(key, (length, 1))
        return inputs, self.system(inputs)
