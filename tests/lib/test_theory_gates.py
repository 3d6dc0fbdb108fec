"""A unit behind a constant gate: against the Toeplitz form, autodiff, 50 digits, simulation, limits and the paper."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import mpmath
import numpy as np
import pytest
import scipy.linalg
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scanrnn.recurrence import linear_recurrence
from scanrnn.sensitivity import estimate, unit_sensitivity
from scanrnn.tasks import autoregressive
from scanrnn.theory import (
    gated_sensitivity_variance,
    gated_state_variance,
    released_gated_sensitivity_variance,
    reparametrized_sensitivity,
    state_variance,
)

mp: Any = mpmath.mp.clone()
mp.dps = 60

# The autocovariance .332 δ_k + .0431 · .997^k that the paper fits to word embeddings (Fig. 12), and its time of memory.
POWERS, CORRELATIONS = np.array([0.332, 0.043056426671195004]), np.array([0.0, 0.9970052541497257])
MEMORY = 1 / (1 - CORRELATIONS[1])
PAIR = (gated_state_variance, gated_sensitivity_variance)
ALL = (*PAIR, released_gated_sensitivity_variance)

gates = st.one_of(st.sampled_from((0.0, 0.5, 0.9)), st.floats(0, 0.99), st.floats(0.1, 2).map(lambda d: 1 - 10**-d))
rhos = st.one_of(st.sampled_from((0.0, 1.0, 0.5)), st.floats(0, 1), st.floats(0.1, 8).map(lambda d: 1 - 10**-d))


def exact(z, rho):
    """E h², E(∂_b h)² and the released formula in 60 digits, from the definition and numerical derivatives of it."""
    z, rho = mp.mpf(z), mp.mpf(rho)

    def overlap(a, b):
        return (1 - a) * (1 - b) * (1 - rho**2 * a * b) / ((1 - rho * a) * (1 - rho * b) * (1 - a * b))

    both = mp.diff(overlap, (z, z), (1, 1), h=mp.mpf(10) ** -22)
    once = mp.diff(overlap, (z, z), (1, 0), h=mp.mpf(10) ** -22)
    slope = (z * (1 - z)) ** 2
    return [float(v) for v in (overlap(z, z), slope * both, slope * (overlap(z, z) + 2 * once + both))]


# --- the stationary state ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(z=st.one_of(gates, st.floats(2, 9).map(lambda d: 1 - 10**-d)), rho=rhos)
@example(z=1 - 1e-6, rho=0.99999)
@example(z=1 - 1e-9, rho=1 - 1e-8)
@example(z=1e-9, rho=0.5)
def test_stationary_variances_equal_the_same_in_sixty_digits(z, rho):
    state, sensitivity, released = exact(z, rho)
    np.testing.assert_allclose(gated_state_variance(z, 1.0, rho), state, rtol=1e-14)
    np.testing.assert_allclose(gated_sensitivity_variance(z, 1.0, rho), sensitivity, rtol=1e-14, atol=1e-35)
    largest = sensitivity + (z * (1 - z)) ** 2  # here terms of both signs meet
    np.testing.assert_allclose(
        released_gated_sensitivity_variance(z, 1.0, rho), released, rtol=1e-13, atol=1e-13 * largest
    )


@settings(deadline=None, max_examples=25)
@given(bias=st.floats(-4, 4), rho=st.floats(0, 0.99))
def test_it_is_the_linear_unit_with_a_gate_for_normalizer(bias, rho):
    z = jax.nn.sigmoid(bias)
    np.testing.assert_allclose(gated_state_variance(z, 1.0, rho), (1 - z) ** 2 * state_variance(z, rho), rtol=1e-12)
    by_law = reparametrized_sensitivity(lambda w: (jax.nn.sigmoid(w), jax.nn.sigmoid(-w)), bias, rho)
    np.testing.assert_allclose(gated_sensitivity_variance(z, 1.0, rho), by_law, rtol=1e-9)


def test_white_and_constant_input():
    z = jnp.array([0.0, 0.3, 0.9, 1 - 1e-9])
    np.testing.assert_allclose(gated_state_variance(z, 2.0, 0.0), 2 * (1 - z) / (1 + z), rtol=1e-14)
    np.testing.assert_allclose(gated_sensitivity_variance(z, 2.0, 0.0), 4 * z**2 * (1 - z) / (1 + z) ** 3, rtol=1e-14)
    # a constant input is what any gate lets through in the end
    np.testing.assert_allclose(gated_state_variance(z, 2.0, 1.0), jnp.full(4, 2.0), rtol=1e-14)
    np.testing.assert_array_equal(gated_sensitivity_variance(z, 2.0, 1.0), jnp.zeros(4))


def test_it_is_the_papers_curve_and_the_released_one_is_not():
    time = jnp.array([2.0, 10.0, 100.0, 256.0])
    z = 1 - 1 / time
    ours = gated_sensitivity_variance(z, POWERS, CORRELATIONS)
    released = released_gated_sensitivity_variance(z, POWERS, CORRELATIONS)
    np.testing.assert_allclose(ours, [0.024640036, 0.008363349, 0.004598493, 0.005590798], rtol=1e-6)
    np.testing.assert_allclose(released, [0.015756989, 0.007254971, 0.004510396, 0.005547584], rtol=1e-6)
    np.testing.assert_allclose(1 - released / ours, [0.361, 0.133, 0.019, 0.008], atol=5e-4)
    np.testing.assert_allclose(
        gated_state_variance(jnp.array([0.8, 0.99]), POWERS, CORRELATIONS), [0.079379019, 0.034829119], rtol=1e-6
    )


# --- after a finite time ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(z=gates, rho=rhos, length=st.sampled_from((1, 2, 3, 40)))
@example(z=1 - 1e-6, rho=0.99999, length=40)
@example(z=0.9, rho=1.0, length=40)
def test_finite_variances_equal_the_toeplitz_form(z, rho, length):
    k, s = np.arange(length), 1 - z
    weights = s * z**k
    slopes = z * s * (s * k * z ** np.maximum(k - 1, 0) - z**k)
    covariance = scipy.linalg.toeplitz(rho**k)
    for function, w in zip(PAIR, (weights, slopes), strict=True):
        scale = abs(w) @ covariance @ abs(w)
        np.testing.assert_allclose(
            function(z, 1.0, rho, length=length), w @ covariance @ w, rtol=1e-12, atol=1e-13 * scale
        )


@pytest.mark.parametrize("bias", [-1.0, 0.0, 4.0])
def test_finite_variances_equal_autodiff_of_the_unit(bias):
    length = 60

    def last(bias, inputs):
        def step(h, y):
            return jax.nn.sigmoid(bias) * h + jax.nn.sigmoid(-bias) * y, None

        return jax.lax.scan(step, jnp.zeros(()), inputs)[0]

    weights = jax.grad(last, argnums=1)
    at, lags = (jnp.asarray(bias), jnp.zeros(length)), np.arange(length)
    covariance = scipy.linalg.toeplitz(sum(c * r**lags for c, r in zip(POWERS, CORRELATIONS, strict=True)))
    for function, w in zip(PAIR, (weights(*at), jax.jacfwd(weights)(*at)), strict=True):
        z = jax.nn.sigmoid(at[0])
        np.testing.assert_allclose(function(z, POWERS, CORRELATIONS, length=length), w @ covariance @ w, rtol=1e-12)


@settings(deadline=None, max_examples=15)
@given(z=st.floats(0, 0.98), rho=st.floats(0, 0.99))
@example(z=0.98, rho=0.98)
@example(z=0.98, rho=0.99)
def test_ten_times_the_longest_memory_is_stationary(z, rho):
    for function in PAIR:
        stationary = function(z, 1.0, rho)
        np.testing.assert_allclose(function(z, 1.0, rho, length=1000), stationary, rtol=2e-6, atol=1e-20)


def test_how_long_the_stationary_value_takes():
    def error(function, time, length):
        z = 1 - 1 / time
        finite = function(z, POWERS, CORRELATIONS, length=round(length))
        return float(finite / function(z, POWERS, CORRELATIONS)) - 1

    for function in PAIR:
        for time in (2.0, 32.0, 256.0, 2000.0):
            assert abs(error(function, time, 10 * max(time, MEMORY))) < 1e-6
    # After once the longest memory it is not there; nor for slow units after the paper's 512 steps (Fig. 15):
    assert error(gated_state_variance, 256.0, MEMORY) == pytest.approx(-0.29, abs=5e-3)
    assert error(gated_state_variance, 256.0, 512) == pytest.approx(-0.109, abs=5e-4)
    assert error(gated_sensitivity_variance, 256.0, 512) == pytest.approx(-0.223, abs=5e-4)
    assert abs(error(gated_sensitivity_variance, 32.0, 512)) < 1e-2


def test_a_simulation_shows_the_finite_values():
    length, copies, time = 512, 2000, jnp.array([2.0, 16.0, 256.0])
    white_key, slow_key = jr.split(jr.key(0))
    inputs = jnp.sqrt(POWERS[0]) * jr.normal(white_key, (length, copies))
    inputs += jnp.sqrt(POWERS[1]) * autoregressive(slow_key, length, CORRELATIONS[1], (copies,))

    @jax.jit
    def last(bias):
        def states(bias):
            return linear_recurrence(jax.nn.sigmoid(bias), jax.nn.sigmoid(-bias)[None] * inputs)

        h, derivative = unit_sensitivity(states, jnp.full(copies, bias))
        return h[-1] ** 2, derivative[-1] ** 2

    for t in time:
        for samples, function in zip(last(jnp.log(t - 1)), PAIR, strict=True):
            measured = estimate(samples)
            finite = function(1 - 1 / t, POWERS, CORRELATIONS, length=length)
            assert abs(measured.mean - finite) < 4 * measured.standard_error
    slow = function(1 - 1 / time[-1], POWERS, CORRELATIONS)  # the stationary sensitivity is excluded
    assert abs(measured.mean - slow) > 5 * measured.standard_error
    fast = estimate(last(0.0)[1])  # and so is the released formula, T = 2
    released = released_gated_sensitivity_variance(0.5, POWERS, CORRELATIONS)
    assert abs(fast.mean - released) > 8 * fast.standard_error


# --- shapes, transformations, bad input -------------------------------------------------------------------------------


def test_any_shape_and_every_transformation():
    z = jnp.linspace(0.0, 0.95, 6).reshape(2, 3)
    for function in (*ALL, *(partial(f, length=7) for f in PAIR)):
        table = function(z, POWERS, CORRELATIONS)
        assert table.shape == (2, 3)
        parts = [function(z, c, r) for c, r in zip(POWERS, CORRELATIONS, strict=True)]
        np.testing.assert_allclose(table, parts[0] + parts[1], rtol=1e-13)
        one_by_one = jax.jit(jax.vmap(jax.value_and_grad(lambda z, f=function: f(z, POWERS, CORRELATIONS))))
        values, slopes = one_by_one(jnp.concatenate([z.ravel(), jnp.array([0.5 - 1e-5, 0.5, 0.5 + 1e-5])]))
        np.testing.assert_allclose(values[:6], table.ravel(), rtol=1e-12)
        np.testing.assert_allclose(slopes[7], (values[8] - values[6]) / 2e-5, rtol=1e-6)
    # a number in single precision stays so
    assert gated_state_variance(jnp.float32(0.5), 1, 0).dtype == jnp.float32


@pytest.mark.parametrize("bad", [1.0, -0.1, 2.0, np.inf, np.nan])
def test_gates_outside_the_interval_are_refused(bad):
    for function in ALL:
        with pytest.raises(ValueError, match=r"^z must be (in \[0, 1\)|finite), got " + re.escape(str(bad))):
            function(bad, POWERS, CORRELATIONS)
        assert jnp.isnan(jax.jit(partial(function, powers=1.0, correlations=0.5))(bad))
        assert jnp.isnan(jax.jit(jax.grad(partial(function, powers=1.0, correlations=0.5)))(bad))


def test_what_does_not_describe_an_autocovariance_is_refused():
    for function in ALL:
        for powers, correlations, message in (
            (-1.0, 0.5, r"^powers must be finite and not negative, got -1.0"),
            (1.0, 1.5, r"^correlations must be in \[0, 1\], got 1.5"),
            (np.ones(2), np.array([0.1, 0.2, 0.3]), r"^powers and correlations must have shapes that broadcast"),
            (np.ones((2, 2)), 0.5, r"^powers must have 0 or 1 axes, got shape \(2, 2\)"),
            (1.0, np.full((2, 2), 0.5), r"^correlations must have 0 or 1 axes, got shape \(2, 2\)"),
        ):
            with pytest.raises(ValueError, match=message):
                function(0.5, powers, correlations)
        with pytest.raises(TypeError, match=r"^z must be real, got complex numbers"):
            function(0.5j, 1.0, 0.0)
        with pytest.raises(TypeError, match=r"^powers must be a number or an array of numbers"):
            function(0.5, "1", 0.0)  # pyright: ignore[reportArgumentType]
        assert jnp.isnan(jax.jit(lambda c, f=function: f(0.5, c, 0.5))(-1.0))
        assert jnp.isnan(jax.jit(lambda r, f=function: f(0.5, 1.0, r))(1.5))


def test_lengths_that_are_no_lengths_are_refused():
    for function in PAIR:
        with pytest.raises(ValueError, match=r"^length must be at least 1, got 0$"):
            function(0.5, 1.0, 0.0, length=0)
        with pytest.raises(TypeError, match=r"^length must be an integer, got 2.0"):
            function(0.5, 1.0, 0.0, length=2.0)  # pyright: ignore[reportArgumentType]
