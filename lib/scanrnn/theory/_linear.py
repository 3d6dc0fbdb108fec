r"""Moments of the linear recurrence h_t = λ h_{t-1} + x_t in its stationary state, |λ| < 1, E[x_t x_{t+k}] = ρ^|k|.

With p = αβ, and all terms arranged so that none cancels as λ → 1 or ρ → 1,

    F = [ρ² + (1 - ρ²)/(1 - p)] / [(1 - ρα)(1 - ρβ)],
    S = [ρ² + (1 - ρ²){(1 + p)(1 - ρp)² + 2ρp(1 - α)(1 - β)}/(1 - p)³] / [(1 - ρα)(1 - ρβ)]².

For β = ᾱ every term is real and not negative.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Inexact

from . import _arguments


def state_overlap(lam_i: ArrayLike, lam_j: ArrayLike, rho: ArrayLike = 0.0) -> Inexact[Array, "..."]:
    r"""$F(\lambda_i,\lambda_j,\rho)=\mathbb E[h_ih_j]$ of two states that the same real input drives.

    $$F(\alpha,\beta,\rho)=\sum_{k,l\ge0}\alpha^k\beta^l\rho^{|k-l|}
      =\frac{1-\rho^2\alpha\beta}{(1-\alpha\beta)(1-\rho\alpha)(1-\rho\beta)}$$

    No conjugate is taken: $\mathbb E|h|^2=F(\lambda,\bar\lambda)$. The eigenvalues may be real or complex, of any
    shapes that broadcast with that of ρ; the result is complex if one of them is.

    Raises `ValueError` unless |λ| < 1, ρ is in [0, 1] and the shapes broadcast; `TypeError` for what is not a number,
    or a complex ρ. Values that are traced cannot be looked at: there the result, and its derivatives, are NaN.
    """
    a, b, rho = _arguments.together(
        lam_i=_arguments.eigenvalue("lam_i", lam_i),
        lam_j=_arguments.eigenvalue("lam_j", lam_j),
        rho=_arguments.correlation("rho", rho),
    )
    with jax.numpy_dtype_promotion("standard"):  # here real and complex may mix
        return _overlap(a, b, rho)


def hessian_overlap(lam_i: ArrayLike, lam_j: ArrayLike, rho: ArrayLike = 0.0) -> Inexact[Array, "..."]:
    r"""$S(\lambda_i,\lambda_j,\rho)=\partial_{\lambda_i}\partial_{\lambda_j}F=\mathbb E[\partial h_i\,\partial h_j]$.

    $$S(\alpha,\beta,\rho)=\sum_{k,l\ge1}kl\,\alpha^{k-1}\beta^{l-1}\rho^{|k-l|}$$

    It is what the entries of the Hessian of a linear network's loss are made of. For white input,
    $S=(1+\alpha\beta)/(1-\alpha\beta)^3$. Shapes and errors: as `state_overlap`.
    """
    a, b, rho = _arguments.together(
        lam_i=_arguments.eigenvalue("lam_i", lam_i),
        lam_j=_arguments.eigenvalue("lam_j", lam_j),
        rho=_arguments.correlation("rho", rho),
    )
    with jax.numpy_dtype_promotion("standard"):
        return _hessian_overlap(a, b, rho)


def state_variance(lam: ArrayLike, rho: ArrayLike = 0.0) -> Float[Array, "..."]:
    r"""$\mathbb E|h|^2$ of the stationary state; for real λ, $\frac{1+\rho\lambda}{(1-\rho\lambda)(1-\lambda^2)}$.

    $(1-|\lambda|^2)^{-1}$ for white input (ρ = 0), $|1-\lambda|^{-2}$ for a constant one (ρ = 1). Real λ or complex, of
    any shape that broadcasts with that of ρ. Differentiable in λ and ρ. Errors: as `state_overlap`.
    """
    return _state_variance(*_lam_and_rho(lam, rho))


def sensitivity_variance(lam: ArrayLike, rho: ArrayLike = 0.0) -> Float[Array, "..."]:
    r"""$\mathbb E|\partial h/\partial\lambda|^2=S(\lambda,\bar\lambda,\rho)$: how strongly the state answers to λ.

    For real λ it is
    $\frac{(1+\lambda^2)(1-\lambda^2\rho^2)+2(1-\lambda^2)\lambda\rho}{(1-\lambda^2)^3(1-\lambda\rho)^2}$:
    $(1+\lambda^2)/(1-\lambda^2)^3$ for white input, $(1-\lambda)^{-4}$ for a constant one. Shapes and errors: as
    `state_variance`.
    """
    return _sensitivity_variance(*_lam_and_rho(lam, rho))


def power_spectrum(phase: ArrayLike, rho: ArrayLike) -> Float[Array, "..."]:
    r"""$S_x(\theta)=\sum_k\rho^{|k|}e^{ik\theta}=\frac{1-\rho^2}{|1-\rho e^{i\theta}|^2}$, the input's power at θ.

    Its mean over the circle is the input's variance, 1. For ρ = 1 it is 0 but at θ = 0, where it is NaN.

    Raises `ValueError` unless ρ is in [0, 1] and the shapes broadcast; `TypeError` for arguments that are not real.
    """
    phase, rho = _arguments.together(phase=_arguments.real("phase", phase), rho=_arguments.correlation("rho", rho))
    return _power_spectrum(phase, rho)


def reparametrized_sensitivity(
    law: Callable[[Array], tuple[ArrayLike, ArrayLike]], omega: ArrayLike, rho: ArrayLike = 0.0
) -> Float[Array, "..."]:
    r"""$\mathbb E|\mathrm dh/\mathrm d\omega|^2$ of $h_t=\lambda(\omega)\,h_{t-1}+\gamma(\omega)\,x_t$.

    `law` maps one real ω to the pair (λ, γ), each real or complex. Where γ is a parameter of its own, let it return a γ
    that does not depend on ω; where γ is tied to λ, the derivative runs through both:

    $$\mathbb E|\mathrm d_\omega h|^2
      =\partial_{\omega_1}\partial_{\omega_2}\big[\gamma(\omega_1)\,\bar\gamma(\omega_2)
      \,F(\lambda(\omega_1),\bar\lambda(\omega_2),\rho)\big]_{\omega_1=\omega_2=\omega}
      =|\gamma'|^2F+2\,\mathrm{Re}(\gamma'\bar\gamma\,\bar\lambda'\,\partial_\beta F)+|\gamma\lambda'|^2S.$$

    Shapes of ω and ρ broadcast. Errors: as `state_overlap`, for λ(ω) and ρ; `TypeError` for a complex ω, and
    `ValueError` for a law that does not return two numbers.
    """
    omega, rho = _arguments.together(omega=_arguments.real("omega", omega), rho=_arguments.correlation("rho", rho))
    with jax.numpy_dtype_promotion("standard"):  # the user's law may mix real and complex
        _require_pair(jax.eval_shape(law, jax.ShapeDtypeStruct((), omega.dtype)))

        def floating(omega):
            return tuple(1.0 * jnp.asarray(number) for number in law(omega))

        flat = omega.ravel()
        values, slopes = jax.vmap(lambda w: jax.jvp(floating, (w,), (jnp.ones_like(w),)))(flat)
        lam = _arguments.eigenvalue("the λ that law returns", values[0])
        return _chain_rule(lam, values[1], *slopes, rho.ravel()).reshape(omega.shape)


def _require_pair(returned: Any) -> None:
    shapes = jax.tree.map(lambda leaf: leaf.shape, returned)
    if shapes != ((), ()):
        raise ValueError(f"law must return a pair of numbers (λ, γ) for one ω, got shapes {shapes}")


# What follows is compiled once for each shape, also where the caller does not compile.


@jax.jit
def _overlap(a: Array, b: Array, rho: Array) -> Array:
    return _plateau(rho, _one_minus_product(a, b)) / (_one_minus(rho, a) * _one_minus(rho, b))


@jax.jit
def _hessian_overlap(a: Array, b: Array, rho: Array) -> Array:
    p, rest = a * b, _one_minus_product(a, b)
    curly = (1 + p) * _one_minus(rho, p, rest) ** 2 + 2 * rho * p * (1 - a) * (1 - b)
    return (rho**2 + (1 - rho) * (1 + rho) * curly / rest**3) / (_one_minus(rho, a) * _one_minus(rho, b)) ** 2


@jax.jit
def _state_variance(lam: Array, rho: Array) -> Array:
    rest, _, near = _conjugate_pair(lam, rho)
    return _plateau(rho, rest) / near


@jax.jit
def _sensitivity_variance(lam: Array, rho: Array) -> Array:
    rest, distance, near = _conjugate_pair(lam, rho)
    p = _arguments.squared_modulus(lam)
    curly = (1 + p) * _one_minus(rho, p, rest) ** 2 + 2 * rho * p * distance
    return (rho**2 + (1 - rho) * (1 + rho) * curly / rest**3) / near**2


@jax.jit
def _power_spectrum(phase: Array, rho: Array) -> Array:
    # |1 - ρe^{iθ}|² = (1 - ρ)² + 4ρ sin²(θ/2)
    return (1 - rho) * (1 + rho) / ((1 - rho) ** 2 + 4 * rho * jnp.sin(phase / 2) ** 2)


@jax.jit
def _chain_rule(lam: Array, gamma: Array, lam_slope: Array, gamma_slope: Array, rho: Array) -> Array:
    rest, _, near = _conjugate_pair(lam, rho)
    # ∂_β F(λ, λ̄) = [λ(1 - ρ²)/(1 - p)² + ρ(1 - ρ²p)/((1 - p)(1 - ρλ̄))] / |1 - ρλ|²
    to_beta = lam * (1 - rho) * (1 + rho) / rest**2 + rho * _plateau(rho, rest) / _one_minus(rho, jnp.conj(lam))
    cross = gamma_slope * jnp.conj(gamma * lam_slope) * to_beta / near
    to_gamma = _arguments.squared_modulus(gamma_slope) * _state_variance(lam, rho)
    return to_gamma + 2 * cross.real + _arguments.squared_modulus(gamma * lam_slope) * _sensitivity_variance(lam, rho)


def _plateau(rho: Array, rest: Array) -> Array:
    """(1 - ρ²p)/(1 - p), for rest = 1 - p."""
    return rho**2 + (1 - rho) * (1 + rho) / rest


def _one_minus_product(a: Array, b: Array) -> Array:
    """1 - αβ, exact where both are close to 1."""
    return (1 - a) + a * (1 - b)


def _one_minus(rho: Array, z: Array, rest: Array | None = None) -> Array:
    """1 - ρz, exact where both are close to 1; `rest` is 1 - z where that is known better than by subtraction."""
    return (1 - rho) + rho * (1 - z if rest is None else rest)


def _lam_and_rho(lam: ArrayLike, rho: ArrayLike) -> list[Array]:
    return _arguments.together(lam=_arguments.eigenvalue("lam", lam), rho=_arguments.correlation("rho", rho))


def _conjugate_pair(lam: Array, rho: Array) -> tuple[Array, Array, Array]:
    """1 - |λ|², |1 - λ|² and |1 - ρλ|², each exact for λ close to 1, and with derivatives everywhere."""
    real = lam.real
    imag_squared = lam.imag**2 if jnp.iscomplexobj(lam) else jnp.zeros_like(real)
    rest = (1 - real) * (1 + real) - imag_squared
    return rest, (1 - real) ** 2 + imag_squared, _one_minus(rho, real) ** 2 + rho**2 * imag_squared
