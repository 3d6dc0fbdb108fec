r"""Any stationary input, by its power spectrum S_x(ω) = Σ_k R(k) e^{ikω}.

A filter with kernel a_k and transfer function A(ω) = Σ_k a_k e^{-ikω} has an output of variance ⟨|A(ω)|² S_x(ω)⟩, the
mean being over the circle. For h and ∂h/∂λ, |A|² is |1 - λe^{-iω}|^{-2} and |1 - λe^{-iω}|^{-4}.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from .._checks import require_integer
from . import _arguments


class SpectralMoments(NamedTuple):
    """What one linear unit makes of an input with a given spectrum."""

    state_variance: Float[Array, "..."]  # E|h|²
    sensitivity_variance: Float[Array, "..."]  # E|∂h/∂λ|²


def spectral_moments(
    lam: ArrayLike, spectrum: Callable[[Float[Array, " nodes"]], Float[Array, " nodes"]], *, nodes: int = 16384
) -> SpectralMoments:
    r"""$\mathbb E|h|^2$ and $\mathbb E|\partial h/\partial\lambda|^2$ for a real input with the spectrum $S_x(\omega)$.

    $$\mathbb E|h|^2=\Big\langle\frac{S_x(\omega)}{|1-\lambda e^{-i\omega}|^2}\Big\rangle_\omega,\qquad
      \mathbb E\Big|\frac{\partial h}{\partial\lambda}\Big|^2=
      \Big\langle\frac{S_x(\omega)}{|1-\lambda e^{-i\omega}|^4}\Big\rangle_\omega$$

    `spectrum` maps phases in radians per step to power; its mean over the circle is the input's variance. The averages
    are taken over `nodes` phases, evenly spaced from 0. Where the spectrum is smooth on the scale of 2π/`nodes` their
    relative error is of the order of `nodes` |λ|^`nodes`, so |λ| up to 1 - 40/`nodes` is safe. Real or complex λ of any
    shape.

    Raises `ValueError` unless |λ| < 1 and `nodes` >= 1, `TypeError` for what is not a number. A traced |λ| >= 1
    gives NaN.
    """
    require_integer("nodes", nodes, minimum=1)
    lam = _arguments.eigenvalue("lam", lam)
    omega = jnp.arange(nodes, dtype=lam.real.dtype) * (2 * jnp.pi / nodes)
    real, imag = (jnp.broadcast_to(part[..., None], (*lam.shape, nodes)) for part in (lam.real, _imag(lam)))
    cosine, sine = (jnp.broadcast_to(f(omega), real.shape) for f in (jnp.cos, jnp.sin))
    squared = (1 - real * cosine - imag * sine) ** 2 + (imag * cosine - real * sine) ** 2  # |1 - λe^{-iω}|²
    power = jnp.broadcast_to(spectrum(omega), real.shape)
    return SpectralMoments(jnp.mean(power / squared, axis=-1), jnp.mean(power / squared**2, axis=-1))


def _imag(lam: Array) -> Array:
    return lam.imag if jnp.iscomplexobj(lam) else jnp.zeros_like(lam)
