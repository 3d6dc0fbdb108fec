"""Input processes against the moments that they promise."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scanrnn.tasks import autoregressive, oscillation

COPIES, LENGTH = 20_000, 6
draw = jax.jit(lambda key, rho: autoregressive(key, LENGTH, rho, (COPIES,)))


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, 1.0])
def test_unit_variance_and_geometric_autocorrelation_from_the_first_step(rho):
    x = draw(jr.key(0), rho)
    # Every row holds independent N(0, 1) copies. For two standard normals of correlation c, Var(x y) = 1 + c².
    assert jnp.max(jnp.abs(jnp.mean(x, axis=1))) < 4 / np.sqrt(COPIES)
    for s in range(LENGTH):
        for t in range(s, LENGTH):
            correlation = rho ** (t - s)
            measured = jnp.mean(x[s] * x[t])
            assert abs(measured - correlation) < 4 * np.sqrt((1 + correlation**2) / COPIES), (s, t)


def test_every_value_is_gaussian():
    x = draw(jr.key(1), 0.9)
    # For N(0, 1): Var(x⁴) = 96, and the distribution function lies within 1.95 / √n of Φ with probability 0.999.
    assert jnp.max(jnp.abs(jnp.mean(x**4, axis=1) - 3)) < 4 * np.sqrt(96 / COPIES)
    ranks = (np.arange(COPIES) + 0.5) / COPIES
    distance = jnp.abs(jax.scipy.stats.norm.cdf(jnp.sort(x[-1])) - ranks)
    assert jnp.max(distance) < 1.95 / np.sqrt(COPIES)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), rho=st.floats(0.0, 1.0))
def test_it_is_the_recurrence_of_its_equation(seed, rho):
    x = np.asarray(draw(jr.key(seed), rho))[:, :50]
    noise = np.asarray(jr.normal(jr.key(seed), (LENGTH, COPIES)))[:, :50]
    np.testing.assert_array_equal(x[0], noise[0])
    np.testing.assert_allclose(x[1:], rho * x[:-1] + np.sqrt(1 - rho**2) * noise[1:], rtol=0, atol=1e-14)


def test_the_ends_of_the_range():
    constant = autoregressive(jr.key(0), 50, 1, (3,))  # an integer is welcome
    np.testing.assert_array_equal(constant, np.broadcast_to(constant[0], (50, 3)))
    np.testing.assert_array_equal(autoregressive(jr.key(0), 50, 0, (3,)), jr.normal(jr.key(0), (50, 3)))


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (0,)])
def test_shapes(shape):
    x = autoregressive(jr.key(0), 4, 0.5, shape)
    assert x.shape == (4, *shape)
    assert x.dtype == float
    assert autoregressive(jr.key(0), 1, 0.5, shape).shape == (1, *shape)


def test_copies_are_independent():
    x = autoregressive(jr.key(3), 10_000, 0.5, (2,))
    # Long-run variance of the product of two independent AR(1) series: (1 + ρ²) / (1 - ρ²) = 5 / 3.
    assert abs(jnp.mean(x[:, 0] * x[:, 1])) < 4 * np.sqrt(5 / 3 / 10_000)


def test_keys():
    one, again, other = (autoregressive(jr.key(k), 5, 0.5) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not jnp.any(one == other)


def test_traced_correlations():
    rhos = jnp.array([0.0, 0.3, 1.0, 1.5, -0.1, jnp.nan])
    rows = jax.jit(jax.vmap(lambda rho: autoregressive(jr.key(0), 5, rho)))(rhos)
    for rho, row in zip(rhos[:3], rows[:3], strict=True):
        np.testing.assert_allclose(row, autoregressive(jr.key(0), 5, rho), rtol=0, atol=1e-14)
    assert jnp.isnan(rows[3:]).all()  # outside [0, 1]: NaN


def test_gradient_in_the_correlation():
    def loss(rho):
        return jnp.sum(autoregressive(jr.key(0), 30, rho) ** 2)

    gradient = jax.jit(jax.grad(loss))
    for rho in (0.0, 0.5, 0.95):
        step = 1e-6  # differences: error ~ step² |f'''| + ε |f| / step, below 1e-7
        differences = (loss(rho + step) - loss(rho - step)) / (2 * step) if rho else gradient(rho)
        assert jnp.isfinite(gradient(rho))
        np.testing.assert_allclose(gradient(rho), differences, rtol=1e-5, atol=1e-6)


def test_bad_arguments_are_refused_by_name():
    for rho in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"rho must be in \[0, 1\], got {rho}"):
            autoregressive(jr.key(0), 5, rho)
    with pytest.raises(ValueError, match=r"rho must have 0 axes, got shape \(2,\)"):
        autoregressive(jr.key(0), 5, jnp.array([0.5, 0.6]), (2,))
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        autoregressive(jr.key(0), 0, 0.5)
    with pytest.raises(TypeError, match=r"length must be an integer, got 5\.0"):
        autoregressive(jr.key(0), 5.0, 0.5)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("persistence", "phase"), [(0.0, 1.0), (0.9, 1.0), (1.0, 2.5), (0.7, 0.0)])
def test_oscillation_has_the_autocorrelation_of_a_damped_cosine(persistence, phase):
    x = oscillation(jr.key(7), LENGTH, persistence, phase, (COPIES,))
    assert x.shape == (LENGTH, COPIES)
    for s in range(LENGTH):
        for t in range(s, LENGTH):
            correlation = persistence ** (t - s) * np.cos(phase * (t - s))
            # as above: Var(x y) = 1 + c² for standard normals of correlation c
            assert abs(jnp.mean(x[s] * x[t]) - correlation) < 4 * np.sqrt((1 + correlation**2) / COPIES), (s, t)


def test_oscillation_without_rotation_is_the_autoregressive_process_of_its_real_noise():
    # the imaginary part never reaches the real one; the noise is drawn as the first of two blocks
    x = oscillation(jr.key(8), 50, 0.8, 0.0, (3,))
    noise = jr.normal(jr.key(8), (2, 50, 3))[0]
    want = [noise[0]]
    for epsilon in noise[1:]:
        want.append(0.8 * want[-1] + 0.6 * epsilon)
    np.testing.assert_allclose(x, np.stack(want), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.5, 1.0), "length must be at least 1, got 0"),
        ((5, 1.5, 1.0), r"persistence must be in \[0, 1\], got 1.5"),
        ((5, jnp.zeros(2), 1.0), r"persistence must have 0 axes, got shape \(2,\)"),
        ((5, 0.5, float("inf")), "phase must be finite, got inf"),
    ],
)
def test_oscillation_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        oscillation(jr.key(0), *arguments)


def test_a_traced_persistence_outside_its_range_gives_nan():
    assert jnp.isnan(jax.jit(lambda r: oscillation(jr.key(0), 5, r, 1.0))(1.5)).all()
