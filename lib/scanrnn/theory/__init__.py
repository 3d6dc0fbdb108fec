r"""Closed forms. Nothing here simulates a network or imports one.

Linear recurrence h_t = λ h_{t-1} + x_t, E[x_t x_{t+k}] = ρ^|k|. Everything follows from how two states driven by the
same input overlap,

    F(α, β, ρ) = E[h_α h_β] = (1 - ρ²αβ) / [(1 - αβ)(1 - ρα)(1 - ρβ)],

    E|h|² = F(λ, λ̄),        E|∂h/∂λ|² = ∂_α ∂_β F(λ, λ̄),        S(λ_i, λ_j) = ∂_α ∂_β F(λ_i, λ_j).

Linear teacher and student in one dimension, white input:  L = ½ E|h - h*|² for h with λ and h* with λ*.

Linear teacher and student of any size, from their impulse responses, white input, T steps from the state zero:
L = ½ Σ_k (1 - k/T) |Δκ_k|².

A unit behind a constant gate, h_t = z h_{t-1} + (1 - z) y_t with z = σ(b): E h² and E(∂h/∂b)².

Random networks: exponents of products of Gaussian matrices, and the mean-field theory of a vanilla network.
"""

from ._gates import (
    gated_sensitivity_variance,
    gated_state_variance,
    released_gated_sensitivity_variance,
)
from ._linear import (
    hessian_overlap,
    power_spectrum,
    reparametrized_sensitivity,
    sensitivity_variance,
    state_overlap,
    state_variance,
)
from ._population import eigenvalue_hessian, finite_hessian_overlap, population_loss, sampled_loss
from ._random_networks import (
    GainSensitivity,
    MeanField,
    gain_sensitivity,
    gaussian_log_determinant,
    gaussian_product_exponents,
    gaussian_product_spread,
    mean_field,
)
from ._spectrum import SpectralMoments, spectral_moments
from ._teacher_student import one_dim_hessian, one_dim_loss

__all__ = [
    "GainSensitivity",
    "MeanField",
    "SpectralMoments",
    "eigenvalue_hessian",
    "finite_hessian_overlap",
    "gain_sensitivity",
    "gated_sensitivity_variance",
    "gated_state_variance",
    "gaussian_log_determinant",
    "gaussian_product_exponents",
    "gaussian_product_spread",
    "hessian_overlap",
    "mean_field",
    "one_dim_hessian",
    "one_dim_loss",
    "population_loss",
    "power_spectrum",
    "released_gated_sensitivity_variance",
    "reparametrized_sensitivity",
    "sampled_loss",
    "sensitivity_variance",
    "spectral_moments",
    "state_overlap",
    "state_variance",
]
