r"""A unit behind a gate that stands still, h_t = z h_{t-1} + (1 - z) y_t with z = σ(b), and its derivative ∂h/∂b.

The input y is stationary with autocovariance E[y_t y_{t+k}] = Σ_j c_j ρ_j^|k|. Every term adds its own part, so let
there be one, with c = 1. Two units with gates α and β overlap as G(α, β) = (1-α)(1-β) F(α, β, ρ), F of `state_overlap`;
since the gate's slope is dz/db = z(1-z), E h² = G(z, z) and E(∂_b h)² = z²(1-z)² ∂_α∂_β G(z, z). With s = 1 - z,
r = 1 - ρ and n = 1 - ρz = r + ρs this is a sum in which no term is negative, hence exact as z → 1 and ρ → 1:

    E h²      = s [ρ²s + r(1+ρ)/(1+z)] / n²
    E(∂_b h)² = z²s [r²ρ²s + r(1+ρ) {(r - ρzs)² + n²}/(1+z)³] / n⁴

Only after many times max{1/(1-z), 1/(1-ρ)} steps is this what one measures. T steps after h_0 = 0, write y as a first
value of variance 1 and independent innovations of variance 1 - ρ², each of which then decays as ρ^j. If a_j(z) is what
such a decay, begun j steps ago, has left in h, and d_j = dz/db · a_j'(z), then

    E h² = a_T² + (1-ρ²) Σ_{j<T} a_j²,        E(∂_b h)² = d_T² + (1-ρ²) Σ_{j<T} d_j².

With e_j = a_j - ρ^j, from a_0 = d_0 = 0 and e_0 = -1,

    a_j = z a_{j-1} + s ρ^{j-1},    e_j = z e_{j-1} + r ρ^{j-1},    d_j = z d_{j-1} + zs e_{j-1}.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from .._checks import require_integer, require_rank, require_values
from . import _arguments


def gated_state_variance(
    z: ArrayLike, powers: ArrayLike, correlations: ArrayLike, *, length: int | None = None
) -> Float[Array, "..."]:
    r"""$\mathbb E h^2$ of $h_t=z\,h_{t-1}+(1-z)\,y_t$ with $\mathbb E[y_ty_{t+k}]=\sum_jc_j\rho_j^{|k|}$; z's shape.

    Stationary, or `length` = T steps after $h_0=0$:

    $$\sum_jc_j\frac{(1-z)(1+\rho_jz)}{(1+z)(1-\rho_jz)}
      \qquad\text{or}\qquad \sum_{k,l<T}w_kw_lR(k-l),\quad w_k=(1-z)z^k.$$

    `z` is the gate's value, of any shape; `powers` $c_j$ and `correlations` $\rho_j$ are numbers or of shape (J,). The
    finite one takes T steps of J numbers for each z. Near 1 the result is as exact as 1 - z is. Source: Zucchet &
    Orvieto (2024), Fig. 15; the finite form is ours.

    Raises `ValueError` unless z is in [0, 1), the powers finite and not negative, the correlations in [0, 1] and of a
    shape that fits, T at least 1; `TypeError` for what is not real, or a T that is not an integer. Traced values that
    are not allowed give NaN.
    """
    z, powers, rho = _arguments_of(z, powers, correlations)
    if length is None:
        return _total(powers, _state(z[..., None], rho))
    require_integer("length", length, minimum=1)
    return _total(powers, _finite(z[..., None], rho, length)[0])


def gated_sensitivity_variance(
    z: ArrayLike, powers: ArrayLike, correlations: ArrayLike, *, length: int | None = None
) -> Float[Array, "..."]:
    r"""$\mathbb E(\partial h/\partial b)^2$, $z=\sigma(b)$: how strongly the same unit answers to its gate's bias.

    Stationary, or `length` = T steps after $h_0=0$:

    $$z^2(1-z)^2\,\partial_\alpha\partial_\beta G(z,z)\qquad\text{or}\qquad
      \sum_{k,l<T}u_ku_lR(k-l),\quad u_k=z(1-z)\frac{\mathrm d}{\mathrm dz}(1-z)z^k.$$

    For white input the first is $2z^2(1-z)/(1+z)^3$. Arguments, errors and source: `gated_state_variance`.
    """
    z, powers, rho = _arguments_of(z, powers, correlations)
    if length is None:
        return _total(powers, _sensitivity(z[..., None], rho))
    require_integer("length", length, minimum=1)
    return _total(powers, _finite(z[..., None], rho, length)[1])


def released_gated_sensitivity_variance(
    z: ArrayLike, powers: ArrayLike, correlations: ArrayLike
) -> Float[Array, "..."]:
    r"""What the notebook released with Zucchet & Orvieto (2024) draws for $\mathbb E(\partial_bh)^2$ in Fig. 15.

    $$z^2(1-z)^2\,(1+\partial_\alpha)(1+\partial_\beta)\,G(z,z)=z^2(1-z)^2\,(G+2\,\partial_\alpha G
      +\partial_\alpha\partial_\beta G)$$

    Kept to show the difference: only the term with both derivatives belongs there. For the paper's input it is 36 % too
    low at z = 1/2 and 1 % at z = 1 - 1/256. Arguments and errors: `gated_state_variance`.
    """
    z, powers, rho = _arguments_of(z, powers, correlations)
    return _total(powers, _released_sensitivity(z[..., None], rho))


# What follows, for one term of unit power, is compiled once for each shape, also where the caller does not compile.


@jax.jit
def _state(z: Array, rho: Array) -> Array:
    s, r, n = _distances(z, rho)
    return s * (rho**2 * s + r * (1 + rho) / (1 + z)) / n**2


@jax.jit
def _sensitivity(z: Array, rho: Array) -> Array:
    s, r, n = _distances(z, rho)
    curly = (r - rho * z * s) ** 2 + n**2
    return z**2 * s * (r**2 * rho**2 * s + r * (1 + rho) * curly / (1 + z) ** 3) / n**4


@jax.jit
def _released_sensitivity(z: Array, rho: Array) -> Array:
    s, r, n = _distances(z, rho)
    slope = r / n**2 * ((1 + rho) * z / (1 + z) ** 2 - (rho**2 * s + r * (1 + rho) / (1 + z)) / n)  # ∂_α G
    return _sensitivity(z, rho) + (z * s) ** 2 * (_state(z, rho) + 2 * slope)


@partial(jax.jit, static_argnames="length")
def _finite(z: Array, rho: Array, length: int) -> tuple[Array, Array]:
    """Both variances after `length` steps."""
    s, r, _ = _distances(z, rho)

    def step(_, carry):
        (a, e, d, decay), (of_state, of_derivative) = carry
        sums = of_state + a**2, of_derivative + d**2
        return (z * a + s * decay, z * e + r * decay, z * d + z * s * e, rho * decay), sums

    one = jnp.ones_like(s)
    start = (0 * one, -one, 0 * one, one), (0 * one, 0 * one)
    (a, _, d, _), (of_state, of_derivative) = jax.lax.fori_loop(0, length, step, start)
    innovation = r * (1 + rho)
    return a**2 + innovation * of_state, d**2 + innovation * of_derivative


def _distances(z: Array, rho: Array) -> tuple[Array, Array, Array]:
    """1 - z, 1 - ρ and 1 - ρz, the last without cancellation."""
    s, r = 1 - z, 1 - rho
    return jnp.broadcast_to(s, jnp.broadcast_shapes(z.shape, rho.shape)), r, r + rho * s


def _total(powers: Array, parts: Array) -> Array:
    return jnp.sum(powers * parts, axis=-1)


def _arguments_of(z: ArrayLike, powers: ArrayLike, correlations: ArrayLike) -> tuple[Array, Array, Array]:
    """z; and c, ρ with the axes of z before their own."""
    z = _allowed("z", z, "in [0, 1)", lambda z: (z >= 0) & (z < 1))
    powers = _allowed("powers", powers, "finite and not negative", lambda c: (c >= 0) & (c < np.inf))
    rho = _arguments.correlation("correlations", correlations)
    require_rank("powers", powers, 0, 1)
    require_rank("correlations", rho, 0, 1)
    with jax.numpy_dtype_promotion("standard"):  # here precisions may mix
        dtype = jnp.result_type(z, powers, rho)
    powers, rho = _arguments.together(powers=powers, correlations=rho)
    terms = (1,) * z.ndim + (max(powers.size, 1),)
    return z.astype(dtype), powers.astype(dtype).reshape(terms), rho.astype(dtype).reshape(terms)


def _allowed(name: str, value: ArrayLike, allowed: str, is_allowed: Callable) -> Array:
    array = _arguments.real(name, value)
    require_values(name, array, allowed, is_allowed)
    return array * jnp.where(is_allowed(array), 1.0, jnp.nan)  # a factor: of a traced value the slope is NaN too
