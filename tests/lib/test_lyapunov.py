"""Exponents against closed forms, dense linear algebra, finite differences and 120-digit arithmetic."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from scanrnn.cells import ElmanCell, VanillaCell, gaussian
from scanrnn.lyapunov import (
    local_exponents,
    log_condition_number,
    long_term_jacobian,
    lyapunov_exponents,
    mean_square_exponent,
)
from scanrnn.sensitivity import estimate
from scanrnn.theory import gaussian_product_exponents, gaussian_product_spread, mean_field

# Compiled once for each shape; a plain call traces and compiles its scan anew, which takes most of the time here.
local_logs = eqx.filter_jit(local_exponents)
exponents = eqx.filter_jit(lyapunov_exponents)
log_conditions = eqx.filter_jit(log_condition_number)


def multiply(matrix, state):
    """The cell whose input is its own Jacobian."""
    return matrix @ state


def repeat(matrix, steps):
    return jnp.broadcast_to(matrix, (steps, *matrix.shape))


def network(seed, n, steps, gain=1.0, kind: type[VanillaCell | ElmanCell] = VanillaCell):
    """A small driven network: (cell, state, inputs)."""
    cell_key, input_key, state_key = jr.split(jr.key(seed), 3)
    cell = kind(1, n, recurrent_init=gaussian(gain), key=cell_key)
    return cell, jr.normal(state_key, (n,)), jr.normal(input_key, (steps, 1))


def bits(key, steps):
    return jr.bernoulli(key, 0.5, (steps, 1)).astype(float)


# --- closed forms -----------------------------------------------------------------------------------------------------


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), spacing=st.floats(0.1, 0.4))
def test_linear_map_with_real_separated_eigenvalues(seed, spacing):
    n = 5
    eigenvalues = jnp.exp(-spacing * jnp.arange(1.0, n + 1)) * jr.rademacher(jr.key(seed), (n,), float)
    basis = jnp.eye(n) + 0.2 * jr.normal(jr.key(seed), (n, n)) / n  # well conditioned
    matrix = basis @ jnp.diag(eigenvalues) @ jnp.linalg.inv(basis)
    measured = exponents(multiply, jnp.ones(n), repeat(matrix, 600), n, transient=400)
    # Directions turn into place as exp(-spacing * transient) <= exp(-40) = 4e-18; 200 steps are the next test's.
    np.testing.assert_allclose(measured, jnp.log(jnp.abs(eigenvalues)), rtol=0, atol=1e-10)


def test_linear_map_after_a_transient_of_200_steps():
    eigenvalues = jnp.exp(-0.2 * jnp.arange(1.0, 7.0))
    basis = jr.normal(jr.key(1), (6, 6))
    matrix = basis @ jnp.diag(eigenvalues) @ jnp.linalg.inv(basis)
    measured = lyapunov_exponents(multiply, jnp.ones(6), repeat(matrix, 2000), 6, transient=200)
    np.testing.assert_allclose(measured, jnp.log(eigenvalues), rtol=0, atol=1e-10)


def test_complex_pairs_converge_as_one_over_time():
    matrix = jr.normal(jr.key(0), (12, 12)) / np.sqrt(12)
    expected = np.sort(np.log(np.abs(np.linalg.eigvals(matrix))))[::-1]

    measured = exponents(multiply, jnp.ones(12), repeat(matrix, 4400), 12, transient=400)
    np.testing.assert_allclose(measured, expected, rtol=0, atol=1e-3)

    # The local rate of a pair oscillates, so |error| T is bounded and does not shrink: that is the 1/T law.
    logs = local_logs(multiply, jnp.ones(12), repeat(matrix, 16_400), 12)[400:]
    steps = np.array([1000, 2000, 4000, 8000, 16_000])
    means = [np.sort(np.mean(logs[:count], axis=0))[::-1] for count in steps]
    errors = np.max(np.abs(means - expected), axis=1)
    assert (errors * steps).max() < 4.0
    assert -1.5 < np.polyfit(np.log(steps), np.log(errors), 1)[0] < -0.5


@pytest.mark.parametrize("interval", [1, 5])
def test_orthogonal_map_neither_grows_nor_shrinks(interval):
    matrix = jax.nn.initializers.orthogonal()(jr.key(0), (8, 8))
    measured = lyapunov_exponents(multiply, jnp.ones(8), repeat(matrix, 100), 8, interval=interval)
    np.testing.assert_allclose(measured, 0.0, atol=1e-13)  # a few ulp a step, averaged


def test_independent_gaussian_products_have_the_spectrum_of_newman():
    n, steps = 8, 20_000
    matrices = jr.normal(jr.key(3), (steps, n, n)) / np.sqrt(n)
    logs = local_exponents(multiply, jnp.ones(n), matrices, n)
    # log R_ii are independent over i and t, half the logarithm of a chi-squared variable: variance ψ'(m/2)/4 each.
    standard_errors = jnp.std(logs, axis=0, ddof=1) / np.sqrt(steps)
    z = (jnp.mean(logs, axis=0) - gaussian_product_exponents(n)) / standard_errors
    assert jnp.max(jnp.abs(z)) < 4
    np.testing.assert_allclose(jnp.var(logs[:, 0], ddof=1), gaussian_product_spread(n), rtol=4 * np.sqrt(3 / steps))


@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_mean_field_predicts_the_leading_exponent_of_a_large_network(gain):
    n, steps, transient = 400, 2000, 200
    inputs = bits(jr.key(5), steps + transient)
    predicted = mean_field(gain, inputs[:, 0] ** 2, max_bias=0.1, transient=transient).leading_exponent
    bias_init = jax.nn.initializers.uniform(0.1)
    cell = VanillaCell(1, n, recurrent_init=gaussian(gain), bias_init=bias_init, key=jr.key(6))
    (measured,) = exponents(cell, jr.normal(jr.key(7), (n,)), inputs, 1, transient=transient)
    # Between networks of N = 400 the standard deviation is 0.008; the O(1/N) shift at g = 1 is about +0.01.
    assert abs(measured - predicted) < 0.03


def test_two_matrices_of_spectral_radius_zero_can_explode_together():
    a, b = jnp.array([[0.0, 2.0], [0.0, 0.0]]), jnp.array([[0.0, 0.0], [2.0, 0.0]])
    inputs = jnp.stack([b, a] * 50)  # first b, so that a b = diag(4, 0) acts on the first axis
    (measured,) = lyapunov_exponents(multiply, jnp.ones(2), inputs, 1, interval=2, transient=2)
    np.testing.assert_allclose(measured, np.log(2), rtol=0, atol=1e-14)


# --- identities -------------------------------------------------------------------------------------------------------


@eqx.filter_jit
def log_determinants(cell, state, inputs):
    """log|det D_t| and κ(D_t) at every step, of dense Jacobians."""

    def step(state, input):
        jacobian = jax.jacfwd(lambda h: cell(input, h))(state)
        return cell(input, state), (jnp.linalg.slogdet(jacobian)[1], jnp.linalg.cond(jacobian))

    return jax.lax.scan(step, state, inputs)[1]


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), gain=st.floats(0.3, 2.5))
def test_exponents_sum_to_the_log_determinant_at_every_step(seed, gain):
    n = 8
    cell, state, inputs = network(seed, n, 60, gain, ElmanCell)
    inputs = 0.3 * inputs  # a saturated tanh makes a Jacobian that no algorithm in float64 resolves
    sums = jnp.sum(local_logs(cell, state, inputs, n), axis=1)
    determinants, conditions = log_determinants(cell, state, inputs)
    # Both routes lose N ε κ(D_t), times a small constant.
    assert (jnp.abs(sums - determinants) <= 1e-12 + 10 * n * np.finfo(float).eps * conditions).all()


def test_exponents_sum_to_the_log_determinant_of_well_conditioned_jacobians_to_ten_digits():
    matrices = repeat(jnp.eye(8), 60) + 0.1 * jr.normal(jr.key(0), (60, 8, 8))
    sums = jnp.sum(local_logs(multiply, jnp.ones(8), matrices, 8), axis=1)
    assert jnp.linalg.cond(matrices).max() < 100  # 8 ε κ < 2e-13
    np.testing.assert_allclose(sums, jnp.linalg.slogdet(matrices)[1], rtol=0, atol=1e-12)


def test_current_and_activity_form_share_their_spectrum():
    vanilla, state, inputs = network(0, 12, 4000)
    elman = ElmanCell(1, 12, key=jr.key(0))
    elman = eqx.tree_at(
        lambda c: (c.recurrent_weight, c.input_weight, c.bias),
        elman,
        (vanilla.recurrent_weight, vanilla.input_weight, vanilla.bias),
    )
    one = lyapunov_exponents(vanilla, state, inputs, 6)
    other = lyapunov_exponents(elman, jnp.tanh(state), inputs, 6)
    # The products differ by one diag(φ') at each end: a bounded factor, hence O(1/T).
    np.testing.assert_allclose(one, other, rtol=0, atol=20 / 4000)
    assert jnp.max(jnp.abs(one - other)) > 0


@pytest.mark.parametrize("interval", [2, 5])
def test_the_interval_between_decompositions_does_not_matter(interval):
    cell, state, inputs = network(1, 16, 205)
    every = exponents(cell, state, inputs, 8, transient=5)
    rarely = exponents(cell, state, inputs, 8, transient=5, interval=interval)
    np.testing.assert_allclose(rarely, every, rtol=0, atol=1e-10)  # κ(R) ε of a block of five steps


def test_transient_steps_turn_the_directions_but_are_not_counted():
    cell, state, inputs = network(2, 6, 50)
    logs = local_logs(cell, state, inputs, 3)
    expected = -jnp.sort(-jnp.mean(logs[17:], axis=0))
    np.testing.assert_allclose(exponents(cell, state, inputs, 3, transient=17), expected, atol=1e-14)


@pytest.mark.parametrize("count", [8, 16])
def test_gradient_against_finite_differences(count):
    cell, state, inputs = network(3, 16, 55)
    parameters, rest = eqx.partition(cell, eqx.is_inexact_array)
    theta, unravel = ravel_pytree(parameters)

    @jax.jit
    def loss(theta):
        return jnp.mean(local_exponents(eqx.combine(unravel(theta), rest), state, inputs, count) ** 2)

    direction = jr.normal(jr.key(9), theta.shape)
    step = 1e-6  # central differences: error ~ step² |f'''| + ε |f| / step, near 1e-9
    differences = (loss(theta + step * direction) - loss(theta - step * direction)) / (2 * step)
    np.testing.assert_allclose(differences, jax.jit(jax.grad(loss))(theta) @ direction, rtol=1e-5)


def test_lstm_equals_a_numpy_loop_over_dense_jacobians():
    n, steps, count = 5, 40, 7
    cell = eqx.nn.LSTMCell(2, n, key=jr.key(0))
    state = (jr.normal(jr.key(1), (n,)), jr.normal(jr.key(2), (n,)))
    inputs = jr.normal(jr.key(3), (steps, 2))
    measured = local_logs(cell, state, inputs, count, key=jr.key(4))

    flat, unravel = ravel_pytree(state)
    step = jax.jit(lambda x, s: ravel_pytree(cell(s, unravel(x)))[0])
    jacobian = jax.jit(jax.jacrev(step))
    x, q = flat, np.linalg.qr(np.asarray(jr.normal(jr.key(4), (2 * n, count))))[0]
    for t in range(steps):
        q, r = np.linalg.qr(np.asarray(jacobian(x, inputs[t])) @ q)
        np.testing.assert_allclose(measured[t], np.log(np.abs(np.diag(r))), rtol=0, atol=1e-9)
        x = step(x, inputs[t])


def test_a_complex_state_has_every_exponent_twice():
    eigenvalues = jnp.array([0.9 * jnp.exp(0.3j), 0.5 * jnp.exp(-1.0j), 0.2 + 0j])
    cell = lambda input, state: eigenvalues * state + input  # noqa: E731
    inputs = jr.normal(jr.key(0), (300, 3)).astype(complex)
    measured = exponents(cell, jnp.zeros(3, complex), inputs, 6, transient=200)
    np.testing.assert_allclose(measured, np.repeat(np.log(np.abs(eigenvalues)), 2), rtol=0, atol=1e-12)


def test_transformations_and_the_documented_start():
    cell, state, inputs = network(4, 6, 30)
    plain = local_exponents(cell, state, inputs, 2)
    jitted = local_logs(cell, state, inputs, 2)
    np.testing.assert_allclose(jitted, plain, rtol=0, atol=1e-12)
    np.testing.assert_allclose(local_logs(cell, state, inputs, 2, key=jr.key(0)), jitted, rtol=0, atol=1e-12)
    batched = jax.vmap(lambda s: local_exponents(cell, s, inputs, 2))(jnp.stack([state, -state]))
    np.testing.assert_allclose(batched[0], plain, rtol=0, atol=1e-12)
    assert not np.allclose(local_logs(cell, state, inputs, 2, key=jr.key(1))[0], plain[0])


# --- long-term Jacobians ----------------------------------------------------------------------------------------------


def test_long_term_jacobian_equals_automatic_differentiation():
    cell, state, inputs = network(5, 7, 20)

    def final(state):
        return jax.lax.scan(lambda h, s: (cell(s, h), None), state, inputs)[0]

    np.testing.assert_allclose(long_term_jacobian(cell, state, inputs), jax.jacrev(final)(state), atol=1e-14)


def test_long_term_jacobian_of_a_complex_state_is_in_real_and_imaginary_parts():
    multipliers = jnp.array([[0.3 + 0.4j, -1.0 + 2.0j]])
    jacobian = long_term_jacobian(lambda s, h: (s * h[0], 3.0 * h[1]), (jnp.ones(2, complex), jnp.ones(1)), multipliers)
    real, imaginary = np.diag([0.3, -1.0]), np.diag([0.4, 2.0])
    expected = np.block([[real, -imaginary, np.zeros((2, 1))], [imaginary, real, np.zeros((2, 1))], [np.zeros(4), 3.0]])
    np.testing.assert_allclose(jacobian, expected, atol=1e-15)


def exact_log_condition(matrices, start):
    """log κ₂ of the product on the columns of `start`, in 120-digit arithmetic, after each step."""
    with mpmath.workdps(120):
        product = mpmath.matrix(start.tolist())
        logs = []
        for matrix in matrices:
            product = mpmath.matrix(matrix.tolist()) * product
            values = sorted(mpmath.eigsy(product.T * product, eigvals_only=True))
            logs.append(float(mpmath.log(values[-1] / values[0]) / 2))
    return np.array(logs)


@pytest.mark.parametrize("count", [2, 5])
def test_condition_number_far_beyond_float64(count):
    n, steps = 5, 60
    matrices = np.asarray(jr.normal(jr.key(8), (steps, n, n)) / np.sqrt(n))
    measured = log_condition_number(multiply, jnp.ones(n), jnp.asarray(matrices), count, key=jr.key(4))
    start = np.linalg.qr(np.asarray(jr.normal(jr.key(4), (n, count))))[0]
    # Each R is accurate to ε κ(D), relative; logarithms add these up: 60 steps × 1e-16 × 1e2 (the worst κ ~ 1e2).
    np.testing.assert_allclose(measured, exact_log_condition(matrices, start), rtol=0, atol=1e-9)
    if count == n:
        assert measured[-1] > 60  # nats; a product in float64 saturates at 36


def test_condition_number_equals_a_plain_svd_while_that_still_works():
    cell, state, inputs = network(6, 6, 4)
    values = np.linalg.svd(long_term_jacobian(cell, state, inputs), compute_uv=False)
    measured = log_condition_number(cell, state, inputs, 6)[-1]
    np.testing.assert_allclose(measured, np.log(values[0] / values[-1]), rtol=0, atol=1e-8)


# --- the mean-square rate ---------------------------------------------------------------------------------------------


def test_mean_square_rate_of_a_random_product_is_an_eigenvalue():
    # E ‖M v‖² is linear in v vᵀ: its growth is the spectral radius of E[A ⊗ A], exactly.
    matrices = jnp.array([[[0.5, 2.0], [0.0, 0.5]], [[0.5, 0.0], [2.0, 0.5]]])
    exact = 0.5 * np.log(np.abs(np.linalg.eigvals(np.mean([np.kron(a, a) for a in matrices], axis=0))).max())
    runs, walkers, steps = 8, 500, 220
    inputs = matrices[jr.bernoulli(jr.key(0), 0.5, (runs, walkers, steps)).astype(int)]
    rates = jax.jit(jax.vmap(lambda x, key: mean_square_exponent(multiply, jnp.ones(2), x, transient=20, key=key)))(
        inputs, jr.split(jr.key(1), runs)
    )
    mean, standard_error = estimate(rates)
    assert abs(mean - exact) < 4 * standard_error
    typical = lyapunov_exponents(multiply, jnp.ones(2), inputs[0, 0], 1, transient=20)[0]
    assert standard_error < 0.001
    assert exact > typical + 0.01  # the two rates differ, so the test can tell them apart


def test_mean_square_rate_without_fluctuations_is_the_typical_rate():
    inputs = jnp.broadcast_to(jnp.diag(jnp.array([0.9, 0.5])), (10, 300, 2, 2))
    rate = mean_square_exponent(multiply, jnp.ones(2), inputs, transient=100)
    np.testing.assert_allclose(rate, np.log(0.9), rtol=0, atol=1e-13)


def test_mean_square_rate_refuses_bad_arguments():
    inputs = jnp.zeros((4, 5, 2, 2))
    with pytest.raises(ValueError, match="transient must be between 0 and 4, got 5"):
        mean_square_exponent(multiply, jnp.ones(2), inputs, transient=5)
    with pytest.raises(ValueError, match=r"inputs must be finite, got nan at index \(3, 0, 0, 0\)"):
        mean_square_exponent(multiply, jnp.ones(2), inputs.at[3].set(jnp.nan))
    with pytest.raises(ValueError, match="inputs must have at least one time step"):
        mean_square_exponent(multiply, jnp.ones(2), inputs[:, :0])


# --- bad input --------------------------------------------------------------------------------------------------------


def call(function, cell=multiply, state=None, inputs=None, count=2, **options):
    state = jnp.ones(3) if state is None else state
    inputs = repeat(jnp.eye(3), 6) if inputs is None else inputs
    return function(cell, state, inputs, count, **options)


@pytest.mark.parametrize("function", [local_exponents, lyapunov_exponents, log_condition_number])
def test_bad_arguments_are_refused_by_name(function):
    name = "num_directions" if function is log_condition_number else "num_exponents"
    with pytest.raises(ValueError, match=rf"{name} must be between 1 and 3, got 4"):
        call(function, count=4)
    with pytest.raises(ValueError, match=rf"{name} must be between 1 and 3, got 0"):
        call(function, count=0)
    with pytest.raises(ValueError, match="inputs must have at least one time step"):
        call(function, inputs=jnp.zeros((0, 3, 3)))
    with pytest.raises(ValueError, match=r"inputs must be finite, got nan at index \(2, 0, 1\)"):
        call(function, inputs=repeat(jnp.eye(3), 6).at[2, 0, 1].set(jnp.nan))
    with pytest.raises(ValueError, match=r"state must be finite, got inf at index \(1,\)"):
        call(function, state=jnp.array([0.0, jnp.inf, 0.0]))
    with pytest.raises(TypeError, match=r"state must be floating point .* got int"):
        call(function, state=jnp.ones(3, int))
    with pytest.raises(ValueError, match="cell must return a state"):
        call(function, cell=lambda matrix, state: jnp.ones(4))


def test_bad_lengths_are_refused_by_name():
    with pytest.raises(ValueError, match="number of steps T must be a multiple of interval = 4, got 6"):
        call(local_exponents, interval=4)
    with pytest.raises(ValueError, match="T - transient, must be a multiple of interval = 3, got 4"):
        call(lyapunov_exponents, interval=3, transient=2)
    with pytest.raises(ValueError, match="transient must be between 0 and 5, got 6"):
        call(lyapunov_exponents, transient=6)
    with pytest.raises(ValueError, match="interval must be at least 1, got 0"):
        call(local_exponents, interval=0)


def test_traced_nan_gives_nan_not_an_error():
    bad = repeat(jnp.eye(3), 6).at[2].set(jnp.nan)
    assert jnp.isnan(jax.jit(lambda inputs: call(lyapunov_exponents, inputs=inputs))(bad)).all()


def test_a_singular_jacobian_gives_minus_infinity():
    assert jnp.isneginf(call(local_exponents, inputs=repeat(jnp.diag(jnp.array([1.0, 0.0, 0.0])), 6), count=3)[-1, 2])


def test_a_lost_direction_makes_the_condition_number_infinite_for_good():
    inputs = repeat(jnp.diag(jnp.array([1.0, 0.9, 0.8])), 6).at[2].set(jnp.diag(jnp.array([1.0, 0.9, 0.0])))
    conditions = call(log_condition_number, inputs=inputs, count=3)
    np.testing.assert_array_equal(jnp.isposinf(conditions), np.arange(6) >= 2)
    bad = jax.jit(lambda inputs: call(log_condition_number, inputs=inputs, count=3))(inputs.at[4].set(jnp.nan))
    assert jnp.isnan(bad[4:]).all()  # NaN is not mistaken for a lost direction


def test_condition_number_in_single_precision():
    matrices = jr.normal(jr.key(8), (1000, 4, 4)) / 2.0
    double = log_conditions(multiply, jnp.ones(4), matrices, 4)
    single = log_conditions(multiply, jnp.ones(4, jnp.float32), matrices.astype(jnp.float32), 4)
    # Rounding the matrices perturbs log κ by a random walk of steps κ(D) ε ~ 1e-6, 3e-5 after 1000 of them, and a few
    # nearly singular D of κ ~ 1e4 add 1e-3 each: far less than the log κ of some 1000 nats, all beyond a plain product.
    assert double[-1] > 500
    np.testing.assert_allclose(single, double, rtol=0, atol=2e-2)


@pytest.mark.parametrize("function", [local_exponents, lyapunov_exponents, log_condition_number])
def test_a_second_call_compiles_nothing(function):
    traced = []

    def cell(input, state):
        traced.append(state)
        return jnp.tanh(state + input)

    inputs = jnp.ones((6, 3))
    function(cell, jnp.ones(3), inputs, 2)
    before = len(traced)
    function(cell, jnp.zeros(3), 2 * inputs, 2)
    assert len(traced) == before + 1  # the check of the cell's shapes looks once
