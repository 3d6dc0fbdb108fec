"""Moments for inputs of any spectrum, against closed forms where there are any and against sums elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scanrnn import theory


@settings(max_examples=30, deadline=None)
@given(st.floats(0.0, 0.99), st.floats(-np.pi, np.pi), st.floats(0.0, 0.95))
def test_geometric_correlations_give_the_closed_forms(nu, theta, rho):
    lam = jnp.asarray(nu * np.exp(1j * theta))
    moments = theory.spectral_moments(lam, lambda omega: theory.power_spectrum(omega, rho))
    # The rule errs by nodes · 0.99^16384 < 1e-60: what is left is rounding, over 1 - ν² = 0.02 cubed.
    np.testing.assert_allclose(moments.state_variance, theory.state_variance(lam, rho), rtol=1e-11)
    np.testing.assert_allclose(moments.sensitivity_variance, theory.sensitivity_variance(lam, rho), rtol=1e-10)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 0.9), st.floats(-np.pi, np.pi), st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=4))
def test_a_moving_average_gives_the_sum_over_its_kernel(nu, theta, weights):
    """x = Σ w_j ε_{t-j}: the kernel of h is λ^k convolved with w, the spectrum |Σ w_j e^{ijω}|²."""
    lam, k = nu * np.exp(1j * theta), np.arange(1000)  # 0.9^1000 = 1e-46
    kernels = lam**k, np.where(k > 0, k * lam ** np.maximum(k - 1, 0), 0)
    powers = np.arange(len(weights))[:, None]
    spectrum = lambda w: jnp.abs(jnp.asarray(weights) @ jnp.exp(1j * powers * w[None]).astype(complex)) ** 2  # noqa: E731
    with jax.numpy_dtype_promotion("standard"):
        moments = theory.spectral_moments(jnp.asarray(lam), spectrum)
    scale = np.sum(np.square(weights))
    for got, kernel in zip(moments, kernels, strict=True):
        want = np.sum(np.abs(np.convolve(kernel, weights)) ** 2)
        # rounding is relative to the largest possible sum, as weights of mixed sign may cancel
        bound = len(weights) * scale * np.sum(np.abs(kernel) ** 2)
        assert abs(got - want) <= 1e-12 * bound + 1e-300


def test_shapes_and_real_eigenvalues():
    lam = jnp.array([[0.1, 0.5, -0.3], [0.0, 0.9, 0.99]])
    moments = theory.spectral_moments(lam, jnp.ones_like)
    np.testing.assert_allclose(moments.state_variance, theory.state_variance(lam), rtol=1e-12)
    np.testing.assert_allclose(moments.sensitivity_variance, theory.sensitivity_variance(lam), rtol=1e-12)


def test_refusals():
    with pytest.raises(ValueError, match=r"lam must be of modulus below 1, got 1\.0"):
        theory.spectral_moments(1.0, jnp.ones_like)
    with pytest.raises(ValueError, match="nodes must be at least 1, got 0"):
        theory.spectral_moments(0.5, jnp.ones_like, nodes=0)
    assert jnp.isnan(jax.jit(lambda lam: theory.spectral_moments(lam, jnp.ones_like).state_variance)(1.5))
