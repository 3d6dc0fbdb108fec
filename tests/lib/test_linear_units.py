"""Measured moments of linear units against the closed forms, against plain sums, and against each other."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scanrnn import theory
from scanrnn.linear_units import linear_moments, local_growth
from scanrnn.tasks import autoregressive, oscillation


def polar(nu, theta):
    return jax.lax.complex(nu * jnp.cos(theta), nu * jnp.sin(theta))


@settings(max_examples=10, deadline=None)
@given(st.floats(0.0, 0.9), st.floats(-np.pi, np.pi), st.integers(0, 2**31 - 1))
def test_moments_are_those_of_the_sums_over_the_past(nu, theta, seed):
    x = np.asarray(jr.normal(jr.key(seed), (30, 3)))
    lam = nu * np.exp(1j * theta)
    k = np.arange(30)
    kernels = lam**k, np.where(k > 0, k * lam ** np.maximum(k - 1, 0), 0)
    samples = []
    for kernel in kernels:
        states = np.stack([np.convolve(kernel, column)[:30] for column in x.T], axis=1)
        samples.append(np.mean(np.abs(states[20:]) ** 2, axis=0))
    moments = linear_moments(jnp.asarray(lam), jnp.asarray(x), transient=20)
    for got, want in zip(moments, samples, strict=True):
        # rounding of sums of 30 terms, which do not cancel in the squares
        np.testing.assert_allclose(got.mean, want.mean(), rtol=1e-12)
        np.testing.assert_allclose(got.standard_error, want.std(ddof=1) / np.sqrt(3), rtol=1e-10)


@pytest.mark.parametrize("rho", [0.0, 0.9, 1.0])
def test_moments_agree_with_theory(rho):
    lam = jnp.array([[0.0, 0.5], [0.9, -0.8]])  # the shape is kept
    x = autoregressive(jr.key(3), 400, rho, (4000,))
    moments = linear_moments(lam, x, transient=200)  # 20 memories: a bias of e^-40
    for got, formula in zip(moments, (theory.state_variance, theory.sensitivity_variance), strict=True):
        assert got.mean.shape == lam.shape
        assert jnp.max(jnp.abs(got.mean - formula(lam, rho)) / got.standard_error) < 4


def test_moments_for_an_oscillating_input_are_those_of_its_spectrum():
    r, phi = 0.9, 1.0
    lam = polar(0.9, jnp.linspace(-np.pi, np.pi, 7))
    moments = linear_moments(lam, oscillation(jr.key(4), 400, r, phi, (1000,)), transient=200)
    spectrum = lambda w: (theory.power_spectrum(w - phi, r) + theory.power_spectrum(w + phi, r)) / 2  # noqa: E731
    for got, want in zip(moments, theory.spectral_moments(lam, spectrum), strict=True):
        assert jnp.max(jnp.abs(got.mean - want) / got.standard_error) < 4


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_growth_is_the_slope_of_the_closed_form(rho):
    lam = jnp.array([0.8, 0.95])
    growth = local_growth(lam, autoregressive(jr.key(5), 800, rho, (4000,)), transient=400)
    for got, formula in zip(growth, (theory.state_variance, theory.sensitivity_variance), strict=True):
        slope = (1 - lam) * jax.vmap(jax.grad(lambda z, f=formula: jnp.log(f(z, rho))))(lam)
        assert jnp.max(jnp.abs(got.mean - slope) / got.standard_error) < 4


def test_growth_is_that_of_the_moments():
    """The exponents are exact derivatives of the measured moments, so finite differences see them without noise."""
    x = autoregressive(jr.key(6), 200, 0.5, (8,))
    growth, step = local_growth(0.9, x, transient=100), 1e-5
    below, above = (linear_moments(0.9 + s * step, x, transient=100) for s in (-1, 1))
    for got, low, high in zip(growth, below, above, strict=True):
        slope = 0.1 * (jnp.log(high.mean) - jnp.log(low.mean)) / (2 * step)
        np.testing.assert_allclose(got.mean, slope, rtol=1e-6)  # the central difference errs by step² f''' / 6


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.0, np.zeros((4, 2)), 0), ValueError, "lam must be of modulus below 1, got 1.0"),
        ((0.5, np.zeros(4), 0), ValueError, r"inputs must have 2 axes, got shape \(4,\)"),
        ((0.5, np.zeros((4, 2)), 4), ValueError, "transient must be between 0 and 3, got 4"),
        (
            (0.5, np.zeros((4, 1)), 0),
            ValueError,
            r"inputs must have at least two copies \(columns\), got shape \(4, 1\)",
        ),
        ((0.5, np.zeros((0, 2)), 0), ValueError, "at least one time step"),
        ((0, np.zeros((4, 2)), 0), TypeError, "lam must be floating point"),
        ((0.5, np.zeros((4, 2), int), 0), TypeError, "inputs must be floating point"),
    ],
)
def test_bad_arguments(arguments, error, message):
    lam, inputs, transient = arguments
    for function in (linear_moments, local_growth):
        with pytest.raises(error, match=message):
            function(lam, inputs, transient=transient)


def test_growth_needs_a_real_eigenvalue():
    with pytest.raises(TypeError, match="lam must be real, got complex128"):
        local_growth(0.5j, jnp.zeros((4, 2)), transient=0)


def test_traced_eigenvalues_outside_the_disc_give_nan():
    moments = jax.jit(lambda lam: linear_moments(lam, jnp.ones((4, 2)), transient=0))(1.5)
    assert all(jnp.isnan(value).all() for value in jax.tree.leaves(moments))
