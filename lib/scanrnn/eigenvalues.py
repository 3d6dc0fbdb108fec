r"""Parametrisations λ(ω) of the eigenvalues of a linear recurrence, λ = ν e^{iθ}, and how they are initialised.

    Cartesian      λ = a + ib
    Polar          λ = ν e^{iθ}
    Exponential    λ = exp(-e^{ω_ν} + i e^{ω_θ})                     the LRU's (Orvieto et al. 2023)
    ExponentialModulus   λ = exp(-e^{ω_ν} + iθ)                      the same, with a signed phase
    Optimal        λ = tanh(ω_ν) e^{iθ},  θ = ω_θ (1 - ν²)/(ν √(1 + ν²))   of Zucchet & Orvieto (2024)

Each is a module whose leaves are real; calling it returns λ. `from_eigenvalues` refuses a λ that is not allowed;
where the values are traced, the module returns NaN instead. `normalizer` is the factor γ(λ) that gives the state the
variance 1, tied to λ; `LearnedNormalizer` starts there and is then a parameter of its own.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Complex, Float, PRNGKeyArray

from ._checks import is_abstract, require_inexact, require_integer, require_values
from .theory import state_variance


class Eigenvalues(eqx.Module):
    """A parametrisation: calling it returns the eigenvalues, complex, of the shape of its parameters."""

    @abc.abstractmethod
    def __call__(self) -> Complex[Array, "..."]:
        """The eigenvalues λ."""


class Cartesian(Eigenvalues):
    r"""$\lambda = a + ib$. Nothing keeps $|\lambda|$ below 1."""

    real: Float[Array, "..."]  # a
    imag: Float[Array, "..."]  # b

    def __call__(self) -> Complex[Array, "..."]:
        return jax.lax.complex(self.real, self.imag)

    @classmethod
    def from_eigenvalues(cls, lam: Complex[Array, "..."]) -> "Cartesian":
        """The module that returns `lam`. `ValueError` unless |λ| < 1, `TypeError` for what is not floating point."""
        lam = _eigenvalues(lam)
        return cls(lam.real, lam.imag)


class Polar(Eigenvalues):
    r"""$\lambda = \nu e^{i\theta}$. Nothing keeps $\nu$ between 0 and 1."""

    nu: Float[Array, "..."]  # ν
    theta: Float[Array, "..."]  # θ, radians

    def __call__(self) -> Complex[Array, "..."]:
        return _polar(self.nu, self.theta)

    @classmethod
    def from_eigenvalues(cls, lam: Complex[Array, "..."]) -> "Polar":
        """The module that returns `lam`, with θ in (-π, π]. Errors: as `Cartesian.from_eigenvalues`."""
        lam = _eigenvalues(lam)
        return cls(jnp.abs(lam), jnp.angle(lam))


class Exponential(Eigenvalues):
    r"""$\lambda=\exp(-e^{\omega_\nu}+ie^{\omega_\theta})$, the LRU's: $\nu<1$, also when rounded, and $\theta>0$.

    $e^{\omega_\nu}$ is the rate of decay per step, so a change of $\omega_\nu$ changes the memory $1/(1-\nu)$ by a
    factor, whatever the memory is.
    """

    omega_nu: Float[Array, "..."]  # ω_ν = log(-log ν)
    omega_theta: Float[Array, "..."]  # ω_θ = log θ, θ in radians

    def __call__(self) -> Complex[Array, "..."]:
        return _polar(_below_one(jnp.exp(-jnp.exp(self.omega_nu))), jnp.exp(self.omega_theta))

    @classmethod
    def from_eigenvalues(cls, lam: Complex[Array, "..."]) -> "Exponential":
        """The module that returns `lam`, with its phase counted in (0, 2π).

        Raises `ValueError` unless 0 < |λ| < 1 and λ is not real and positive, whose phase 0 has no logarithm;
        `TypeError` for what is not floating point.
        """
        lam = _nonzero(_eigenvalues(lam))
        allowed = "not real and positive, since the phase 0 has no logarithm"
        lam = _allowed(lam, allowed, lambda z: jnp.angle(z) != 0)
        theta = jnp.angle(lam)
        theta = jnp.where(theta < 0, theta + 2 * jnp.pi, theta)
        return cls(jnp.log(-jnp.log(jnp.abs(lam))), jnp.log(theta))


class ExponentialModulus(Eigenvalues):
    r"""$\lambda=\exp(-e^{\omega_\nu}+i\theta)$: the modulus as in `Exponential`, the phase itself, of either sign."""

    omega_nu: Float[Array, "..."]  # ω_ν = log(-log ν)
    theta: Float[Array, "..."]  # θ, radians

    def __call__(self) -> Complex[Array, "..."]:
        return _polar(_below_one(jnp.exp(-jnp.exp(self.omega_nu))), self.theta)

    @classmethod
    def from_eigenvalues(cls, lam: Complex[Array, "..."]) -> "ExponentialModulus":
        """The module that returns `lam`, with θ in (-π, π].

        Raises `ValueError` unless 0 < |λ| < 1, `TypeError` for what is not floating point.
        """
        lam = _nonzero(_eigenvalues(lam))
        return cls(jnp.log(-jnp.log(jnp.abs(lam))), jnp.angle(lam))


class Optimal(Eigenvalues):
    r"""$\lambda=\tanh(\omega_\nu)\,e^{i\theta}$ with $\theta=\omega_\theta\,\frac{1-\nu^2}{\nu\sqrt{1+\nu^2}}$.

    It solves $\mathrm d\nu/\mathrm d\omega_\nu=1-\nu^2$ and
    $\partial\theta/\partial\omega_\theta=\frac{1-\nu^2}{\nu\sqrt{1+\nu^2}}$, so that the normalised one-dimensional
    loss has the curvature 1 along $\omega_\theta$ everywhere, and along $\omega_\nu$ where θ = 0. At $\omega_\nu=0$ the
    phase is not defined, and λ is NaN.
    """

    omega_nu: Float[Array, "..."]  # ω_ν = artanh ν
    omega_theta: Float[Array, "..."]  # ω_θ = θ ν √(1 + ν²)/(1 - ν²)

    def __call__(self) -> Complex[Array, "..."]:
        nu = jnp.tanh(self.omega_nu)
        rest = 1 / jnp.cosh(self.omega_nu) ** 2  # 1 - ν² without cancellation
        return _polar(_below_one(nu), self.omega_theta * rest / (nu * jnp.sqrt(1 + nu**2)))

    @classmethod
    def from_eigenvalues(cls, lam: Complex[Array, "..."]) -> "Optimal":
        """The module that returns `lam`, with θ in (-π, π].

        Raises `ValueError` unless 0 < |λ| < 1, `TypeError` for what is not floating point.
        """
        lam = _nonzero(_eigenvalues(lam))
        omega_nu = jnp.arctanh(jnp.abs(lam))
        nu, rest = jnp.tanh(omega_nu), 1 / jnp.cosh(omega_nu) ** 2  # as when called, so that rounding meets itself
        return cls(omega_nu, jnp.angle(lam) * nu * jnp.sqrt(1 + nu**2) / rest)


def ring(
    key: PRNGKeyArray, n: int, *, min_modulus: float, max_modulus: float, max_phase: float = np.pi
) -> Complex[Array, " {n}"]:
    r"""n eigenvalues drawn uniformly, in area, from a ring or a sector of it; (n,).

    $\nu=\sqrt{\nu_{\min}^2+u\,(\nu_{\max}^2-\nu_{\min}^2)}$ with u ~ U[0, 1), and θ ~ U[-`max_phase`, `max_phase`].

    Raises `ValueError` unless n >= 1, 0 <= `min_modulus` <= `max_modulus` <= 1 and 0 <= `max_phase` <= π; `TypeError`
    for an n that is not an integer. Where the values are traced, the result is NaN instead.
    """
    require_integer("n", n, minimum=1)
    _require_ring(min_modulus, max_modulus, max_phase)
    modulus_key, phase_key = jax.random.split(key)
    u = jax.random.uniform(modulus_key, (n,))
    nu = jnp.sqrt(min_modulus**2 + u * (max_modulus**2 - min_modulus**2))
    nu = jnp.where(_is_ring(min_modulus, max_modulus, max_phase), nu, jnp.nan)
    return _polar(_below_one(nu), jax.random.uniform(phase_key, (n,), minval=-max_phase, maxval=max_phase))


def squash_spectrum(
    matrix: Float[Array, "*batch n n"], *, min_modulus: float, max_modulus: float = 1.0, max_phase: float = np.pi
) -> Float[Array, "*batch n n"]:
    r"""The matrix with its eigenvectors kept and its eigenvalues moved into a ring; (..., n, n), real.

    With $M=V\,\mathrm{diag}(l)\,V^{-1}$ it is $\Re[V\,\mathrm{diag}(l')\,V^{-1}]$,

    $$|l'|=\nu_{\min}+(\nu_{\max}-\nu_{\min})\tanh|l|,\qquad \arg l'=\arg l\cdot\frac{\theta_{\max}}\pi .$$

    So linear networks with a given memory are drawn (Zucchet & Orvieto 2024): M Gaussian of variance 1/n. Conjugate
    pairs stay pairs. A real negative eigenvalue has the phase π, which no conjugate balances: with `max_phase` below π,
    where taking the real part acts, it becomes $|l'|\cos\theta_{\max}$, of a smaller modulus.

    Raises `ValueError` unless 0 <= min_modulus <= max_modulus <= 1, 0 <= max_phase <= π and the matrices are square;
    where the values are traced, the result is NaN instead. JAX has eigenvectors on the CPU, and on few GPUs.
    """
    _require_ring(min_modulus, max_modulus, max_phase)
    require_inexact("matrix", matrix)
    if jnp.ndim(matrix) < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"matrix must be square, (..., n, n), got shape {jnp.shape(matrix)}")
    lam, vectors = jnp.linalg.eig(matrix)
    modulus = min_modulus + (max_modulus - min_modulus) * jnp.tanh(jnp.abs(lam))
    moved = _polar(modulus, jnp.angle(lam) * (max_phase / np.pi))
    result = jnp.linalg.solve(vectors.mT, (vectors * moved[..., None, :]).mT).mT.real
    return jnp.where(_is_ring(min_modulus, max_modulus, max_phase), result, jnp.nan)


def _require_ring(min_modulus: float, max_modulus: float, max_phase: float) -> None:
    require_values("max_modulus", max_modulus, "between 0 and 1", lambda r: (r >= 0) & (r <= 1))
    if not is_abstract((min_modulus, max_modulus)):
        allowed = f"between 0 and max_modulus = {max_modulus}"
        require_values("min_modulus", min_modulus, allowed, lambda r: (r >= 0) & (r <= max_modulus))
    require_values("max_phase", max_phase, "between 0 and π", lambda t: (t >= 0) & (t <= np.pi))


def _is_ring(min_modulus: Any, max_modulus: Any, max_phase: Any) -> Any:
    ordered = (min_modulus >= 0) & (min_modulus <= max_modulus) & (max_modulus <= 1)
    return ordered & (max_phase >= 0) & (max_phase <= np.pi)


def normalizer(lam: ArrayLike, rho: ArrayLike = 0.0) -> Float[Array, "..."]:
    r"""$\gamma(\lambda)=(\mathbb E|h|^2)^{-1/2}$: with it, $h_t=\lambda h_{t-1}+\gamma x_t$ has the variance 1.

    $\sqrt{1-|\lambda|^2}$ for white input (the LRU's), $|1-\lambda|$ for a constant one. Errors: as
    `scanrnn.theory.state_variance`.
    """
    return 1 / jnp.sqrt(state_variance(lam, rho))


class LearnedNormalizer(eqx.Module):
    r"""A normaliser that is a parameter of its own, $\gamma=e^{\omega_\gamma}$, as in the LRU: it ignores λ."""

    omega_gamma: Float[Array, "..."]  # ω_γ = log γ

    def __call__(self, lam: Complex[Array, "..."]) -> Float[Array, "..."]:
        """γ, whatever `lam` is now."""
        return jnp.exp(self.omega_gamma)

    @classmethod
    def from_eigenvalues(cls, lam: ArrayLike, rho: ArrayLike = 0.0) -> "LearnedNormalizer":
        """The module that starts at `normalizer(lam, rho)`. Errors: as `normalizer`."""
        return cls(jnp.log(normalizer(lam, rho)))


class DirectNormalizer(eqx.Module):
    r"""A normaliser that is a parameter of its own, stored as γ itself, which may become negative: it ignores λ."""

    gamma: Float[Array, "..."]  # γ

    def __call__(self, lam: Complex[Array, "..."]) -> Float[Array, "..."]:
        """γ, whatever `lam` is now."""
        return self.gamma


def _polar(nu: Array, theta: Array) -> Array:
    return jax.lax.complex(nu * jnp.cos(theta), nu * jnp.sin(theta))


def _below_one(nu: Array) -> Array:
    """ν, far enough from ±1 that rounding does not carry the modulus of ν e^{iθ} there."""
    limit = 1 - 4 * float(jnp.finfo(nu.dtype).eps)
    return jnp.clip(nu, -limit, limit)


def _eigenvalues(lam: Any) -> Array:
    try:
        array = jnp.asarray(lam)
    except (TypeError, ValueError):
        raise TypeError(f"lam must be a number or an array of numbers, got {lam!r}") from None
    require_inexact("lam", array)
    if not jnp.iscomplexobj(array):
        array = jax.lax.complex(array, jnp.zeros_like(array))
    return _allowed(array, "of modulus below 1", lambda z: abs(z) < 1)


def _nonzero(lam: Array) -> Array:
    return _allowed(lam, "nonzero", lambda z: z != 0)


def _allowed(lam: Array, allowed: str, is_allowed: Callable[[Any], Any]) -> Array:
    require_values("lam", lam, allowed, is_allowed)
    return jnp.where(is_allowed(lam), lam, complex(np.nan, np.nan))
