r"""Input processes and tasks.

autoregressive:  x_t = ρ x_{t-1} + √(1 - ρ²) ε_t,   ε_t ~ N(0, 1),   so that  E[x_t x_{t+k}] = ρ^|k|
oscillation:     the same with a complex ρ = r e^{iφ}, its real part,  E[x_t x_{t+k}] = r^|k| cos(φk)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._checks import require_finite, require_integer, require_rank, require_values
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
