"""Closed forms against sampling, quadrature by another hand, exact limits and networks."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.integrate
import scipy.special

from scanrnn import theory
from scanrnn.cells import VanillaCell, gaussian
from scanrnn.lyapunov import lyapunov_exponents
from scanrnn.sensitivity import estimate
from scanrnn.theory import gaussian_log_determinant, gaussian_product_exponents, gaussian_product_spread, mean_field


def coin_flips(seed, steps):
    return jr.bernoulli(jr.key(seed), 0.5, (steps,)).astype(float)


# --- products of Gaussian matrices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7])
def test_exponents_are_the_expected_logarithms_of_chi_squared_variables(n):
    gain, samples = 1.3, 40_000
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
    monkeypatch.setattr(theory, "_NODES", 3000)
    monkeypatch.setattr(theory, "_BIAS_NODES", 20)
    fine = mean_field(2.0, jnp.full(3, power), max_bias=0.1)
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


@pytest.mark.parametrize("max_bias", [0.1, 1.0])
def test_mean_exponent_of_a_network_of_100_units(max_bias):
    n, gain, steps, transient, networks = 100, 1.3, 250, 50, 32
    inputs = coin_flips(5, steps + transient)[:, None]

    @jax.jit
    @jax.vmap
    def measure(key):
        cell_key, state_key = jr.split(key)
        bias_init = jax.nn.initializers.uniform(max_bias)
        cell = VanillaCell(1, n, recurrent_init=gaussian(gain), bias_init=bias_init, key=cell_key)
        return mean_exponent(cell, jr.normal(state_key, (n,)), inputs, transient)

    mean, standard_error = estimate(measure(jr.split(jr.key(0), networks)))
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
        with pytest.raises(ValueError, match=f"gain must be positive and finite, got {gain}"):
            mean_field(gain, jnp.ones(3))
    for power in (-1.0, jnp.nan, jnp.inf):
        with pytest.raises(ValueError, match=rf"input_powers must be non-negative and finite, got {power} at .*\(1,\)"):
            mean_field(1.0, jnp.array([1.0, power]))
    with pytest.raises(ValueError, match=r"input_powers must have 1 axes, got shape \(3, 1\)"):
        mean_field(1.0, jnp.ones((3, 1)))
    with pytest.raises(ValueError, match="input_powers must have at least one time step"):
        mean_field(1.0, jnp.ones(0))
    with pytest.raises(ValueError, match="transient must be between 0 and 2, got 3"):
        mean_field(1.0, jnp.ones(3), transient=3)
    with pytest.raises(ValueError, match="max_bias must be finite, got nan"):
        mean_field(1.0, jnp.ones(3), max_bias=float("nan"))


def test_traced_nonsense_gives_nan():
    assert jnp.isnan(jax.jit(gaussian_product_exponents, static_argnums=0)(3, -1.0)).all()
    result = jax.jit(lambda p: mean_field(1.0, p))(jnp.array([1.0, jnp.nan, 1.0]))
    assert jnp.isnan(result.leading_exponent)
    assert jnp.isnan(result.mean_exponent)
