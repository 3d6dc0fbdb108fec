r"""Input processes and tasks.

autoregressive:  x_t = ρ x_{t-1} + √(1 - ρ²) ε_t,   ε_t ~ N(0, 1),   so that  E[x_t x_{t+k}] = ρ^|k|
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._checks import require_integer, require_rank, require_values
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
