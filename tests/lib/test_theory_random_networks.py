"""Closed forms against sampling, quadrature by another hand, exact limits and networks."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.integrate
import scipy.special

from scanrnn.cells import VanillaCell, gaussian
from scanrnn.lyapunov import lyapunov_exponents
from scanrnn.recurrence import scan_cell
from scanrnn.sensitivity import estimate
from scanrnn.theory import (
    _random_networks,
    gain_sensitivity,
    gaussian_log_determinant,
    gaussian_product_exponents,
    gaussian_product_spread,
    mean_field,
)


def coin_flips(seed, steps):
    return jr.bernoulli(jr.key(seed), 0.5, (steps,)).astype(float)


# --- products of Gaussian matrices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7])
def test_exponents_are_the_expected_logarithms_of_chi_squared_variables(n):
    gain, samples = 1.3, 20_000
    exponents = gaussian_product_exponents(n, gain)
    assert exponents.shape == (n,)
    # The rows of R in J = Q R: half the log of g²/N times a χ² with N, N - 1, ... 1 degrees of freedom.
    matrices = jr.normal(jr.key(n), (samples, n, n)) * gain / np.sqrt(n)
    r = jax.jit(jax.vmap(lambda j: jnp.linalg.qr(j)[1]))(matrices)
    logs = jnp.log(jnp.abs(jnp.diagonal(r, axis1=1, axis2=2)))
    mean, standard_error = estimate(logs)
    assert jnp.max(jnp.abs(mean - exponents) / standard_error) < 4
    # Var of ½ log χ²_N; a sample variance has standard error Var √((kurtosis - 1) / samples), kurtosis <= 9 here.
    np.testing.assert_allclose(jnp.var(logs[:, 0]), gaussian_product_spread(n), rtol=4 * np.sqrt(8 / samples))

    determinants = estimate(jnp.linalg.slogdet(matrices)[1] / n)
    difference = jnp.abs(determinants.mean - gaussian_log_determinant(n, gain))
    assert difference < 4 * determinants.standard_error


def test_gaussian_product_identities():
    exponents = gaussian_product_exponents(64, 0.7)
    assert (jnp.diff(exponents) < 0).all()
    np.testing.assert_allclose(exponents - jnp.log(0.7), gaussian_product_exponents(64), rtol=0, atol=1e-14)
    np.testing.assert_allclose(gaussian_log_determinant(64, 0.7), jnp.mean(exponents), rtol=0, atol=1e-14)
    # One unit: E log|g z| = log g - (γ + log 2) / 2, with variance π²/8.
    np.testing.assert_allclose(gaussian_product_exponents(1, 2.0)[0], np.log(2) - (np.euler_gamma + np.log(2)) / 2)
    np.testing.assert_allclose(gaussian_product_spread(1), np.pi**2 / 8)
    # ψ(x) = log x - 1/2x - 1/12x² + O(x⁻⁴) and ψ'(x) = 1/x + 1/2x² + 1/6x³ - ...
    n = 1000
    np.testing.assert_allclose(gaussian_product_exponents(n)[0], -1 / (2 * n) - 1 / (6 * n**2), rtol=1e-6)
    np.testing.assert_allclose(gaussian_product_spread(n), 1 / (2 * n) + 1 / (2 * n**2), rtol=2e-6)
    # Stirling: the mean differs from log g - ½ by O(log N / N).
    assert abs(gaussian_log_determinant(n, 1.5) - (np.log(1.5) - 0.5)) < np.log(n) / n


def test_typical_and_mean_square_rate_differ_by_the_spread():
    # log ‖J v‖² is log χ²_N: its mean is 2 Λ_1, and the logarithm of the mean of χ²_N / N is 0. Between the two lies
    # the variance of log ‖J v‖ (to leading order in 1/N, as for any cumulant generating function).
    n = 200
    np.testing.assert_allclose(-gaussian_product_exponents(n)[0], gaussian_product_spread(n), rtol=2 / n)


# --- mean field -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [0.3, 0.9])
def test_without_input_or_bias_nothing_saturates(gain):
    result = mean_field(gain, jnp.zeros(5))
    np.testing.assert_array_equal(result.variances, jnp.zeros(5))
    np.testing.assert_allclose(result.leading_exponent, np.log(gain), rtol=0, atol=1e-14)
    np.testing.assert_allclose(result.mean_exponent, np.log(gain) - 0.5, rtol=0, atol=1e-14)


@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_a_linear_network_does_not_see_its_input(gain):
    powers = jnp.array([1.0, 0.0, 4.0, 2.0])
    result = mean_field(gain, powers, activation=lambda x: x, max_bias=0.3)
    np.testing.assert_allclose(result.leading_exponent, np.log(gain), rtol=0, atol=1e-14)
    np.testing.assert_allclose(result.mean_exponent, np.log(gain) - 0.5, rtol=0, atol=1e-14)
    # E x² = v + E b², and E b² = 0.3² / 3.
    v = [1.0]
    for power in powers[:-1]:
        v.append(gain**2 * (v[-1] + 0.03) + power)
    np.testing.assert_allclose(result.variances, v, rtol=1e-13)


def test_a_relu_lets_half_of_the_units_through():
    result = mean_field(1.2, jnp.array([1.0, 2.0, 0.0]), activation=jax.nn.relu)
    np.testing.assert_allclose(result.leading_exponent, 0.5 * np.log(1.2**2 / 2), rtol=0, atol=1e-13)
    assert jnp.isneginf(result.mean_exponent)
    np.testing.assert_allclose(result.variances, [1.0, 0.72 + 1.0, 0.72 * 1.72 + 2.0], rtol=1e-13)


def test_erf_has_closed_forms():
    # E erf(√v z)² = (2/π) arcsin(2v / (1 + 2v)) and E erf'(√v z)² = (4/π) / √(1 + 4v) (Williams 1997).
    v = 1.7
    result = mean_field(1.5, jnp.full(2, v), activation=jax.scipy.special.erf)
    np.testing.assert_allclose(result.variances[1], 1.5**2 * 2 / np.pi * np.arcsin(2 * v / (1 + 2 * v)) + v, rtol=1e-12)
    leading = [0.5 * np.log(1.5**2 * 4 / np.pi / np.sqrt(1 + 4 * x)) for x in result.variances]
    np.testing.assert_allclose(result.leading_exponent, np.mean(leading), rtol=0, atol=1e-12)
    # log erf' = log(2/√π) - x²
    mean = [np.log(1.5) - 0.5 + np.log(2 / np.sqrt(np.pi)) - x for x in result.variances]
    np.testing.assert_allclose(result.mean_exponent, np.mean(mean), rtol=0, atol=1e-12)


@pytest.mark.parametrize("variance", [0.3, 4.0, 20.0])
@pytest.mark.parametrize("max_bias", [0.0, 0.1, 2.0])
def test_averages_equal_adaptive_quadrature(variance, max_bias):
    gain, scale = 1.4, np.sqrt(variance)

    def average(function):
        def over_z(b):
            density = lambda z: np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * function(scale * z + b)  # noqa: E731
            kink = -b / scale
            return scipy.integrate.quad(density, -12, 12, points=[kink], limit=200, epsabs=1e-12, epsrel=1e-12)[0]

        if max_bias == 0:
            return over_z(0.0)
        return scipy.integrate.quad(over_z, 0, max_bias, epsabs=1e-11, epsrel=1e-11)[0] / max_bias

    log_slope = lambda x: 2 * (np.log(2) - np.logaddexp(x, -x))  # noqa: E731  # of tanh
    first = mean_field(gain, jnp.array([variance]), max_bias=max_bias)
    leading = 0.5 * np.log(gain**2 * average(lambda x: np.exp(2 * log_slope(x))))
    np.testing.assert_allclose(first.leading_exponent, leading, rtol=0, atol=1e-9)
    np.testing.assert_allclose(first.mean_exponent, np.log(gain) - 0.5 + average(log_slope), rtol=0, atol=1e-9)
    second = mean_field(gain, jnp.array([variance, 0.0]), max_bias=max_bias).variances[1]
    np.testing.assert_allclose(second, gain**2 * average(lambda x: np.tanh(x) ** 2) + variance, rtol=1e-9)


@pytest.mark.parametrize(("power", "tolerance"), [(1.0, 1e-13), (20.0, 1e-13), (100.0, 2e-6)])
def test_the_nodes_suffice(monkeypatch, power, tolerance):
    coarse = mean_field(2.0, jnp.full(3, power), max_bias=0.1)
    monkeypatch.setattr(_random_networks, "_NODES", 3000)
    monkeypatch.setattr(_random_networks, "_BIAS_NODES", 20)
    fine = mean_field(2.0, jnp.full(3, power), max_bias=0.1)
    assert fine.leading_exponent != coarse.leading_exponent  # the nodes did change
    np.testing.assert_allclose(coarse.leading_exponent, fine.leading_exponent, rtol=0, atol=tolerance)
    np.testing.assert_allclose(coarse.mean_exponent, fine.mean_exponent, rtol=1e-12, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_strong_input_saturates_without_underflow(dtype):
    # E log tanh' = -2 E log cosh x, and log cosh x = |x| - log 2 + log(1 + e^-2|x|) with E|x| = √(2v/π).
    with jax.enable_x64(dtype == jnp.float64):
        result = mean_field(1.0, jnp.asarray(np.full(4, 400.0), dtype))
        mean = float(result.mean_exponent)
    expected = -0.5 - 2 * np.mean(np.sqrt(2 * np.asarray(result.variances, float) / np.pi) - np.log(2))
    # The last term is at most the density at 0, 0.02, times its integral π²/12; it counts twice.
    assert -2 * 0.02 * np.pi**2 / 12 < mean - expected < 0


@pytest.mark.parametrize(("gain", "expected"), [(1.0, -0.3165), (2.0, 0.0970)])
def test_fair_bits_with_a_small_bias(gain, expected):
    samples = [mean_field(gain, coin_flips(s, 2100), max_bias=0.1, transient=100).leading_exponent for s in range(4)]
    mean, standard_error = estimate(jnp.stack(samples))
    # Within the spread over bit sequences, and half a unit of the last digit that was given.
    assert abs(mean - expected) < 4 * standard_error + 5e-5
    assert standard_error < 0.004


def test_bias_is_averaged_with_its_own_distribution():
    # Monte-Carlo over units that each keep their b: x = √v z + b.
    v, max_bias, units = 1.5, 3.0, 200_000
    z, b = jr.normal(jr.key(0), (units,)), jr.uniform(jr.key(1), (units,)) * max_bias
    slopes = 1 / jnp.cosh(jnp.sqrt(v) * z + b) ** 2
    squares, logs = estimate(slopes**2), estimate(jnp.log(slopes))
    result = mean_field(1.0, jnp.array([v]), max_bias=max_bias)
    assert abs(jnp.exp(2 * result.leading_exponent) - squares.mean) < 4 * squares.standard_error
    assert abs(result.mean_exponent + 0.5 - logs.mean) < 4 * logs.standard_error


def mean_exponent(cell, state, inputs, transient=0):
    """(1/N) Σ Λ_i of a tanh network without any QR: log|det J diag(φ')| = log|det J| + Σ log φ'."""

    def step(x, s):
        return cell(s, x), jnp.mean(-2 * jnp.log(jnp.cosh(x)))

    _, logs = jax.lax.scan(step, state, inputs)
    return jnp.linalg.slogdet(cell.recurrent_weight)[1] / state.size + jnp.mean(logs[transient:])


@jax.jit
@partial(jax.vmap, in_axes=(0, None, None))
def measured_mean_exponent(key, max_bias, inputs):
    """Of a network of 100 units of gain 1.3, after 50 steps."""
    cell_key, state_key = jr.split(key)

    def bias_init(key, shape):
        return max_bias * jr.uniform(key, shape)

    cell = VanillaCell(1, 100, recurrent_init=gaussian(1.3), bias_init=bias_init, key=cell_key)
    return mean_exponent(cell, jr.normal(state_key, (100,)), inputs, transient=50)


@pytest.mark.parametrize("max_bias", [0.1, 1.0])
def test_mean_exponent_of_a_network_of_100_units(max_bias):
    n, gain, transient = 100, 1.3, 50
    inputs = coin_flips(5, 250 + transient)[:, None]
    mean, standard_error = estimate(measured_mean_exponent(jr.split(jr.key(0), 24), max_bias, inputs))
    predicted = mean_field(gain, inputs[:, 0] ** 2, max_bias=max_bias, transient=transient).mean_exponent
    # E log|det J| / N of N = 100 differs from its limit log g - ½ by `shift`; the currents' laws do by O(1/N).
    shift = gaussian_log_determinant(n, gain) - (np.log(gain) - 0.5)
    assert abs(mean - (predicted + shift)) < 4 * standard_error + 2 / n
    assert standard_error < 0.03
    # The test can tell: a bias that is left out would be seen.
    if max_bias == 1.0:
        no_bias = mean_field(gain, inputs[:, 0] ** 2, transient=transient).mean_exponent
        assert abs(mean - (no_bias + shift)) > 4 * standard_error + 2 / n


def test_the_sum_rule_used_above_agrees_with_measured_exponents():
    n, steps = 12, 200
    cell = VanillaCell(1, n, key=jr.key(0))
    inputs = coin_flips(1, steps)[:, None]
    measured = jnp.mean(lyapunov_exponents(cell, jnp.zeros(n), inputs, n))
    np.testing.assert_allclose(measured, mean_exponent(cell, jnp.zeros(n), inputs), rtol=0, atol=1e-10)


def test_mean_field_is_traceable_and_differentiable():
    powers = coin_flips(0, 200)

    def leading(gain):
        return mean_field(gain, powers, max_bias=0.1, transient=20).leading_exponent

    gains = jnp.array([0.5, 1.0, 2.0])
    together = jax.jit(jax.vmap(leading))(gains)
    np.testing.assert_allclose(together, [leading(gain) for gain in gains], rtol=0, atol=1e-13)
    step = 1e-5  # differences: step² |f'''| ~ 1e-10
    np.testing.assert_allclose(jax.grad(leading)(1.0), (leading(1 + step) - leading(1 - step)) / (2 * step), rtol=1e-7)


def test_the_transient_is_run_and_not_averaged():
    powers = coin_flips(0, 30)
    all_steps = [mean_field(1.5, powers, transient=t).leading_exponent for t in (0, 10)]
    first = mean_field(1.5, powers[:10]).leading_exponent
    np.testing.assert_allclose(30 * all_steps[0], 10 * first + 20 * all_steps[1], rtol=0, atol=1e-13)
    integers = mean_field(1.5, powers.astype(int)).leading_exponent  # bits may come as integers
    np.testing.assert_allclose(integers, all_steps[0], rtol=0, atol=1e-14)


def test_a_silent_start_has_a_derivative_in_the_gain():
    # v = 0 for two steps: Λ_1 is log g there, and √v has no slope.
    powers = jnp.array([0.0, 0.0, 1.0, 0.0])

    def leading(gain):
        return mean_field(gain, powers).leading_exponent

    np.testing.assert_array_equal(mean_field(1.5, powers).variances[:3], 0.0)
    step = 1e-5  # differences: step² |f'''| ~ 1e-10
    difference = (leading(1.5 + step) - leading(1.5 - step)) / (2 * step)
    np.testing.assert_allclose(jax.jit(jax.grad(leading))(1.5), difference, rtol=1e-8)
    assert jnp.isfinite(slopes_of_sensitivity(1.5, powers).to_gain).all()


# --- sensitivity to the weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [0.3, 0.9])
def test_a_linear_network_in_its_stationary_state(gain):
    # .81^250 < 1e-22 is left of the start
    result = gain_sensitivity(gain, jnp.full(250, 2.0), activation=lambda x: x)
    v = 2.0 / (1 - gain**2)
    close = partial(np.testing.assert_allclose, rtol=1e-12)
    close(result.variances[-1], v)
    close(result.to_gain[-1], v * (1 + gain**2) / (1 - gain**2) ** 2)
    close(result.to_weights[-1], v / (1 - gain**2))
    close(result.growth, gain**2)


def test_a_linear_network_step_by_step():
    # x_t = Σ_k (g Ĵ)^k u_{t-k}: with p the powers of u, v_t = Σ g^{2k} p, w_t = Σ k² g^{2k-2} p, Q_t = Σ k g^{2k-2} p
    gain, powers = 1.3, np.array([2.0, 0.5, 0.0, 3.0, 1.0])
    result = gain_sensitivity(gain, jnp.asarray(powers), activation=lambda x: x)
    for t in range(5):
        p = np.concatenate([powers[:t][::-1], powers[:1]])  # of u_t, u_{t-1}, ... u_1 and the start x_0
        k = np.arange(t + 1)
        np.testing.assert_allclose(result.variances[t], np.sum(gain ** (2 * k) * p), rtol=1e-13)
        np.testing.assert_allclose(result.to_gain[t], np.sum(k**2 * gain ** (2.0 * k - 2) * p), rtol=1e-13)
        np.testing.assert_allclose(result.to_weights[t], np.sum(k * gain ** (2.0 * k - 2) * p), rtol=1e-13)


def test_sensitivity_and_mean_field_say_the_same():
    powers = coin_flips(0, 30).at[0].set(1.0)
    for activation in (jnp.tanh, jax.nn.relu):
        field = mean_field(1.4, powers, activation=activation)
        result = gain_sensitivity(1.4, powers, activation=activation)
        np.testing.assert_allclose(result.variances, field.variances, rtol=1e-13)
        np.testing.assert_allclose(jnp.mean(jnp.log(result.growth)), 2 * field.leading_exponent, rtol=0, atol=1e-13)
        # what it does to a perturbation of the weights: Q gains the same at each step as v gains from the network
        gained = result.to_weights[1:] - result.growth[:-1] * result.to_weights[:-1]
        np.testing.assert_allclose(1.4**2 * gained, result.variances[1:] - powers[:-1], rtol=0, atol=1e-12)


slopes_of_sensitivity = jax.jit(jax.jacfwd(gain_sensitivity))


@pytest.mark.parametrize("gain", [0.7, 1.5])
def test_the_recursion_equals_quadrature_in_the_plane(gain):
    # (x, y) is Gaussian with the covariance c = E xy = ½ dE x²/dg, which autodiff knows without the recursion for c.
    powers = jnp.array([1.0, 0.3, 2.0, 0.0])
    result = gain_sensitivity(gain, powers)
    slopes = slopes_of_sensitivity(gain, powers).variances
    nodes, weights = np.polynomial.hermite_e.hermegauss(150)
    weights = np.outer(weights, weights) / (2 * np.pi)
    z1, z2 = np.meshgrid(nodes, nodes, indexing="ij")
    for t in range(3):
        v, w, c = float(result.variances[t]), float(result.to_gain[t]), float(slopes[t]) / 2
        assert c**2 <= v * w
        x = np.sqrt(v) * z1
        y = c / np.sqrt(v) * z1 + np.sqrt(w - c**2 / v) * z2
        new = np.sum(weights * (np.tanh(x) + gain * y / np.cosh(x) ** 2) ** 2)
        # Gauss-Hermite with 150 nodes, for a function with poles at ±iπ/2√v: measured, against 100 nodes
        np.testing.assert_allclose(result.to_gain[t + 1], new, rtol=1e-6)


@jax.jit
@partial(jax.vmap, in_axes=(0, None, None))
def sensitivity_of_a_network(key, gain, inputs):
    """Mean squares over units of x_t, ∂x_t/∂g and (1/N²) ‖∂x_t/∂J‖², t = 1 ... T, for 300 units."""
    n = 300
    cell_key, start_key, direction_key = jr.split(key, 3)
    cell = VanillaCell(1, n, key=cell_key)
    start = jr.normal(start_key, (n,)) * jnp.abs(inputs[0])

    def states(matrix):
        return scan_cell(eqx.tree_at(lambda c: c.recurrent_weight, cell, matrix), start, inputs)[1]

    unit = cell.recurrent_weight
    x, y = jax.jvp(lambda g: states(g * unit), (gain,), (jnp.ones(()),))
    # Along Z with independent entries of variance 1, E_Z ‖∂x·Z‖² = ‖∂x/∂J‖².
    z = jax.jvp(states, (gain * unit,), (jr.normal(direction_key, (n, n)),))[1]
    return jnp.stack([jnp.mean(x**2, axis=1), jnp.mean(y**2, axis=1), jnp.sum(z**2, axis=1) / n**2])


@pytest.mark.parametrize("gain", [0.9, 1.5])
@pytest.mark.parametrize("seed", [None, 5])
def test_networks_of_300_units(gain, seed):
    steps = 8
    inputs = jnp.ones(steps) if seed is None else coin_flips(seed, steps).at[0].set(1.0)
    samples = sensitivity_of_a_network(jr.split(jr.key(0), 20), jnp.asarray(gain), inputs[:, None])
    mean, standard_error = estimate(samples)
    theory = gain_sensitivity(gain, jnp.append(inputs, 0.0) ** 2)
    predicted = jnp.stack([theory.variances, theory.to_gain, theory.to_weights])[:, 1:]
    # Corrections to N → ∞ are of relative order 1/N: measured at N = 75 and 150 with many networks, at most 6/N.
    assert (jnp.abs(mean / predicted - 1) < 4 * standard_error / predicted + 6 / 300).all()
    assert (standard_error / predicted < 0.08).all()


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused_by_name():
    for function in (gaussian_product_exponents, gaussian_product_spread, gaussian_log_determinant):
        with pytest.raises(ValueError, match="n must be at least 1, got 0"):
            function(0)
        with pytest.raises(TypeError, match=r"n must be an integer, got 2\.0"):
            function(2.0)  # pyright: ignore[reportArgumentType]
    for gain in (0.0, -1.0, float("nan"), float("inf")):
        for function in (gaussian_product_exponents, gaussian_log_determinant):
            with pytest.raises(ValueError, match=f"gain must be positive and finite, got {gain}"):
                function(3, gain)
    for function in (mean_field, gain_sensitivity):
        for gain in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"gain must be positive and finite, got {gain}"):
                function(gain, jnp.ones(3))
        with pytest.raises(ValueError, match=r"gain must have 0 axes, got shape \(2,\)"):
            function(jnp.ones(2), jnp.ones(3))
        for power in (-1.0, jnp.nan, jnp.inf):
            message = rf"input_powers must be non-negative and finite, got {power} at .*\(1,\)"
            with pytest.raises(ValueError, match=message):
                function(1.0, jnp.array([1.0, power]))
        with pytest.raises(ValueError, match=r"input_powers must have 1 axes, got shape \(3, 1\)"):
            function(1.0, jnp.ones((3, 1)))
        with pytest.raises(ValueError, match="input_powers must have at least one time step"):
            function(1.0, jnp.ones(0))
    with pytest.raises(ValueError, match="transient must be between 0 and 2, got 3"):
        mean_field(1.0, jnp.ones(3), transient=3)
    with pytest.raises(ValueError, match="max_bias must be finite, got nan"):
        mean_field(1.0, jnp.ones(3), max_bias=float("nan"))


def test_traced_nonsense_gives_nan():
    assert jnp.isnan(jax.jit(gaussian_product_exponents, static_argnums=0)(3, -1.0)).all()
    result = jax.jit(lambda p: mean_field(1.0, p))(jnp.array([1.0, jnp.nan, 1.0]))
    assert jnp.isnan(result.leading_exponent)
    assert jnp.isnan(result.mean_exponent)
    result = jax.jit(lambda g: mean_field(g, jnp.ones(3)))(-1.0)  # g² alone would hide the sign
    assert jnp.isnan(result.leading_exponent)
    bad = jnp.array([-1.0, jnp.nan, jnp.inf])
    gains, powers = jnp.concatenate([bad, jnp.ones(3)]), jnp.concatenate([jnp.ones(3), bad])
    results = jax.jit(jax.vmap(lambda g, p: gain_sensitivity(g, jnp.stack([p, 1.0, 1.0]))))(gains, powers)
    for entries in (results.variances, results.to_gain, results.to_weights):
        assert jnp.isnan(entries[:, 1:]).all()
    assert jnp.isnan(results.growth).all()
