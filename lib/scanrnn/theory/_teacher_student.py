r"""One linear unit learns from another: h_t = λ h_{t-1} + x_t imitates h*_t = λ* h*_{t-1} + x_t, white x of variance 1.

With A = 1 - |λ|², B = 1 - |λ*|², C = 1 - λλ̄* and d² = |λ - λ*|², so that |C|² = AB + d² and 2 Re C = A + B + d²,

    L  = ½ E|h - h*|²               = ½ d² (A + B - AB) / (A B |C|²),
    L_γ = ½ E|√A h - √B h*|²        = [d² (1 - ½√(AB)) - ½√(AB) (√A - √B)²] / |C|².

Written so, nothing cancels near the minimum.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from . import _arguments


def one_dim_loss(lam: ArrayLike, lam_star: ArrayLike, *, normalized: bool = False) -> Float[Array, "..."]:
    r"""The loss ½ E|h - h*|² of a student λ under a teacher λ*, stationary, for white input of unit variance.

    $$L=\tfrac12\Big[\frac1{1-|\lambda|^2}+\frac1{1-|\lambda^*|^2}-2\,\mathrm{Re}\frac1{1-\lambda\bar\lambda^*}\Big],
      \qquad L_\gamma = 1-\gamma\gamma^*\,\mathrm{Re}\frac1{1-\lambda\bar\lambda^*},$$

    the second with `normalized=True`: both states are multiplied by their $\gamma=\sqrt{1-|\lambda|^2}$, so that their
    variance is 1 (and the derivative runs through γ). Real or complex eigenvalues whose shapes broadcast; outputs are
    complex where the eigenvalues are. Differentiable to any order, at the minimum and at 0 too.

    Raises `ValueError` unless |λ| < 1, |λ*| < 1 and the shapes broadcast; `TypeError` for what is not a number. Where
    the values are traced, the result is NaN instead.
    """
    lam, star = _arguments.together(
        lam=_arguments.eigenvalue("lam", lam), lam_star=_arguments.eigenvalue("lam_star", lam_star)
    )
    return _loss(lam, star, normalized)


def one_dim_hessian(lam: ArrayLike, *, normalized: bool = False) -> Float[Array, "... 2 2"]:
    r"""The Hessian of `one_dim_loss` at λ = λ*, in the polar coordinates (ν, θ) of λ = ν e^{iθ}; (..., 2, 2).

    It is diagonal, and does not depend on θ:

    $$H_{\nu\nu}=\frac{1+\nu^2}{(1-\nu^2)^3},\; H_{\theta\theta}=\nu^2H_{\nu\nu},\qquad\text{normalised: }
      H_{\nu\nu}=\frac1{(1-\nu^2)^2},\; H_{\theta\theta}=\frac{\nu^2(1+\nu^2)}{(1-\nu^2)^2}.$$

    In other coordinates ω it becomes $D^\top HD$ with $D=\partial(\nu,\theta)/\partial\omega$, since the gradient is
    zero at the minimum. Errors: as `one_dim_loss`.
    """
    lam = _arguments.eigenvalue("lam", lam)
    return _hessian(lam, normalized)


@partial(jax.jit, static_argnums=2)
def _loss(lam: Array, star: Array, normalized: bool) -> Array:
    a, b = _one_minus_squared_modulus(lam), _one_minus_squared_modulus(star)
    real_gap, imag_gap = lam.real - star.real, lam.imag - star.imag
    gap = real_gap**2 + imag_gap**2
    c = a * b + gap
    if not normalized:
        return 0.5 * gap * (a + b - a * b) / (a * b * c)
    root = jnp.sqrt(a) * jnp.sqrt(b)
    moduli = real_gap * (lam.real + star.real) + imag_gap * (lam.imag + star.imag)  # |λ|² - |λ*|²
    roots = moduli / (jnp.sqrt(a) + jnp.sqrt(b))
    return (gap * (1 - root / 2) - root * roots**2 / 2) / c


@partial(jax.jit, static_argnums=1)
def _hessian(lam: Array, normalized: bool) -> Array:
    squared, rest = _arguments.squared_modulus(lam), _one_minus_squared_modulus(lam)
    if normalized:
        moduli, phases = 1 / rest**2, squared * (1 + squared) / rest**2
    else:
        moduli = (1 + squared) / rest**3
        phases = squared * moduli
    zero = 0 * moduli  # NaN where the rest is
    return jnp.stack([jnp.stack([moduli, zero], axis=-1), jnp.stack([zero, phases], axis=-1)], axis=-2)


def _one_minus_squared_modulus(lam: Array) -> Array:
    return (1 - lam.real) * (1 + lam.real) - (lam.imag**2 if jnp.iscomplexobj(lam) else 0.0)
