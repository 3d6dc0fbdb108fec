r"""Linear recurrences that are diagonal, complex and read by a real part.

h_t = λ ⊙ h_{t-1} + γ(λ) ⊙ B x_t,        y_t = Re(C h_t) + D x_t
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, PRNGKeyArray

from .._checks import require_inexact, require_integer, require_values
from ..eigenvalues import Eigenvalues, Exponential, LearnedNormalizer, ring
from ..recurrence import linear_recurrence
from ._base import (
    LinearLayer,
    apply_complex,
    as_inputs,
    kernel_from_factors,
    real_part,
    require_sizes,
    scaled_normal,
)

Normalization = Callable[[Array], Array]


class _Diagonal(LinearLayer):
    """What both layers are made of; only how they are initialised differs."""

    parametrization: Eigenvalues  # λ(ω)
    normalization: Normalization | None  # γ(λ)
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
        eigenvalues: Eigenvalues,
        normalization: Normalization | None = None,
        key: PRNGKeyArray,
    ):
        require_sizes(d_in=d_in, d_hidden=d_hidden, d_out=d_out)
        _check_eigenvalues(eigenvalues, d_hidden)
        if normalization is not None and not callable(normalization):
            raise TypeError(f"normalization must be a function of λ or None, got {type(normalization).__name__}")
        input_real_key, input_imag_key, output_real_key, output_imag_key, feedthrough_key = jax.random.split(key, 5)
        self.parametrization = eigenvalues
        self.normalization = normalization
        self.input_real = scaled_normal(input_real_key, (d_hidden, d_in), 1 / d_hidden)
        self.input_imag = scaled_normal(input_imag_key, (d_hidden, d_in), 1 / d_hidden)
        self.output_real = scaled_normal(output_real_key, (d_out, d_hidden), 1 / d_out)
        self.output_imag = scaled_normal(output_imag_key, (d_out, d_hidden), 1 / d_out)
        self.feedthrough = scaled_normal(feedthrough_key, (d_out, d_in), 1 / d_out)
        self._input_matrix()  # so that a normaliser that does not fit is refused here

    @property
    def _d_in(self) -> int:
        return self.feedthrough.shape[-1]

    def eigenvalues(self) -> Complex[Array, " hidden"]:
        """λ; (N,)."""
        lam = self.parametrization()
        return lam if jnp.iscomplexobj(lam) else jax.lax.complex(lam, jnp.zeros_like(lam))

    def states(self, inputs: Float[Array, "time input"]) -> Complex[Array, "time hidden"]:
        """h after each step; (T, d_hidden), complex."""
        inputs = as_inputs(inputs, self.feedthrough)
        return linear_recurrence(self.eigenvalues(), apply_complex(self._input_matrix(), inputs))

    def __call__(self, inputs: Float[Array, "time input"]) -> Float[Array, "time output"]:
        """y; (T, d_out)."""
        inputs = as_inputs(inputs, self.feedthrough)
        return real_part(self.output_real, self.output_imag, self.states(inputs)) + inputs @ self.feedthrough.T

    def impulse_response(self, length: int) -> Float[Array, "{length} output input"]:
        r"""$\kappa_k=\Re(C\lambda^k\gamma B)$, and D more at k = 0; (length, d_out, d_in).

        Errors: as every linear layer's. The layer is not run: 16 powers of λ act on B, and powers of $\lambda^{16}$ on
        C.
        """
        require_integer("length", length, minimum=1)
        lam, weight = self.eigenvalues(), self._input_matrix()
        powers = _powers(lam, _STRIDE)
        strides = _powers(powers[-1] * lam, -(-length // _STRIDE))
        first = jnp.moveaxis(powers[:, :, None] * weight[None], 0, 1)  # (d_hidden, stride, d_in)
        second = strides[:, None] * jax.lax.complex(self.output_real, self.output_imag)[None]
        return kernel_from_factors(
            jnp.concatenate([second.real, -second.imag], axis=2),  # Re(zw) as a product of real matrices
            jnp.concatenate([first.real, first.imag], axis=0),
            self.feedthrough,
            length,
        )

    def _input_matrix(self) -> Complex[Array, "hidden input"]:
        """diag(γ) B."""
        matrix = jax.lax.complex(self.input_real, self.input_imag)
        if self.normalization is None:
            return matrix
        lam = self.eigenvalues()
        gamma = jnp.asarray(self.normalization(lam))
        require_inexact("what normalization returns", gamma)
        if gamma.shape != lam.shape:
            raise ValueError(f"normalization must return one γ for each λ, shape {lam.shape}, got {gamma.shape}")
        return gamma[:, None].astype(matrix.dtype) * matrix


class DiagonalRNN(_Diagonal):
    r"""The complex diagonal network, $h_t=\lambda\odot h_{t-1}+\gamma(\lambda)\odot Bx_t$, $y_t=\Re(Ch_t)+Dx_t$.

    **Arguments:** the sizes; `eigenvalues`, a module of `scanrnn.eigenvalues` that returns λ of shape (d_hidden,);
    `normalization`, a function or module that maps λ to γ of the same shape (`scanrnn.eigenvalues.normalizer`, tied to
    λ, or a `LearnedNormalizer`), or None for γ = 1; `key`.

    The eigenvalues need not come in conjugate pairs. With γ = 1 this is the "complex diagonal RNN" of Zucchet & Orvieto
    (2024). Initialised as theirs: each part of B ~ N(0, 1/d_hidden), each part of C ~ N(0, 1/d_out), D ~ N(0, 1/d_out).
    Parameters are real: those of `eigenvalues` and `normalization`, and the two parts of B and C.

    Raises `ValueError` for a size below 1 or where λ or γ does not have the shape (d_hidden,); `TypeError` for sizes
    that are not integers, `eigenvalues` or `normalization` that cannot be called, or that return integers.
    """

    __init__ = _Diagonal.__init__  # else type checkers make one up from the fields


class LRU(_Diagonal):
    r"""The linear recurrent unit (Orvieto et al. 2023), $h_t=\lambda\odot h_{t-1}+\gamma\odot Bx_t$ with

    $$\lambda=\exp(-e^{\omega_\nu}+ie^{\omega_\theta}),\qquad\gamma=e^{\omega_\gamma},\qquad y_t=\Re(Ch_t)+Dx_t .$$

    - Normaliser: γ starts at $\sqrt{1-|\lambda|^2}$, so that white input of variance 1 gives state i the variance
      $\sum_j|B_{ij}|^2$ whatever its memory, and is then a parameter of its own.
    - Reparametrisation: $\mathrm d\nu/\mathrm d\omega_\nu=\nu\log\nu\approx-(1-\nu)$.

    `min_modulus`, `max_modulus` and `max_phase` say where λ starts: uniform on the ring, as `scanrnn.eigenvalues.ring`,
    phases counted mod 2π. B, C and D as `DiagonalRNN`.

    Raises `ValueError` unless sizes are at least 1, 0 <= min_modulus <= max_modulus <= 1, 0 < max_modulus and
    0 < max_phase <= π (a phase of 0 has no logarithm); `TypeError` for sizes that are not integers.
    """

    def __init__(
        self,
        d_in: int,
        d_hidden: int,
        d_out: int,
        *,
        min_modulus: float,
        max_modulus: float,
        max_phase: float = np.pi,
        key: PRNGKeyArray,
    ):
        require_sizes(d_in=d_in, d_hidden=d_hidden, d_out=d_out)
        require_values("max_phase", max_phase, "positive and at most π", lambda t: (t > 0) & (t <= np.pi))
        require_values("max_modulus", max_modulus, "positive and at most 1", lambda r: (r > 0) & (r <= 1))
        eigenvalues_key, weights_key = jax.random.split(key)
        lam = ring(eigenvalues_key, d_hidden, min_modulus=min_modulus, max_modulus=max_modulus, max_phase=max_phase)
        eigenvalues, normalization = Exponential.from_eigenvalues(lam), LearnedNormalizer.from_eigenvalues(lam)
        super().__init__(d_in, d_hidden, d_out, eigenvalues=eigenvalues, normalization=normalization, key=weights_key)


_STRIDE = 16  # of the powers of λ in the impulse response


def _powers(lam: Complex[Array, " hidden"], count: int) -> Complex[Array, "{count} hidden"]:
    """λ^k for k < count, by doubling."""
    powers, factor = jnp.ones_like(lam)[None], lam
    while len(powers) < count:
        powers = jnp.concatenate([powers, powers * factor[None]])
        factor = factor * factor
    return powers[:count]


def _check_eigenvalues(eigenvalues: Eigenvalues, d_hidden: int) -> None:
    if not callable(eigenvalues):
        raise TypeError(f"eigenvalues must be a module of scanrnn.eigenvalues, got {type(eigenvalues).__name__}")
    lam = eigenvalues()
    require_inexact("what eigenvalues returns", lam)
    if jnp.shape(lam) != (d_hidden,):
        raise ValueError(f"eigenvalues must return the shape (d_hidden,) = ({d_hidden},), got {jnp.shape(lam)}")
