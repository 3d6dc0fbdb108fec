"""Input processes against the moments that they promise."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scanrnn import _resources
from scanrnn.tasks import (
    LinearTeacher,
    autoregressive,
    delayed_copy,
    delayed_xor,
    fair_bits,
    oscillation,
    spatial_xor,
    two_exponential,
)
from scanrnn.theory import population_loss

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


# --- white noise and a slow process -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("white", "slow", "rho"), [(0.3, 0.7, 0.9), (2.0, 0.0, 0.5), (0.0, 2.0, 0.5), (0.5, 1.5, 1.0)])
def test_two_exponential_has_the_autocovariance_of_its_two_parts_from_the_first_step(white, slow, rho):
    x = two_exponential(jr.key(11), LENGTH, (COPIES,), white=white, slow=slow, rho=rho)
    assert x.shape == (LENGTH, COPIES)
    variance = white + slow
    assert jnp.max(jnp.abs(jnp.mean(x, axis=1))) < 4 * np.sqrt(variance / COPIES)
    for s in range(LENGTH):
        for t in range(s, LENGTH):
            covariance = slow * rho ** (t - s) + white * (s == t)
            # Var(x y) = v² + c² for two normals of variance v and covariance c
            error = np.sqrt((variance**2 + covariance**2) / COPIES)
            assert abs(jnp.mean(x[s] * x[t]) - covariance) < 4 * error, (s, t)


def test_two_exponential_is_the_sum_of_what_its_equation_says():
    white_key, slow_key = jr.split(jr.key(12))
    want = np.sqrt(0.3) * jr.normal(white_key, (50, 2)) + np.sqrt(0.7) * autoregressive(slow_key, 50, 0.8, (2,))
    x = two_exponential(jr.key(12), 50, (2,), white=0.3, slow=0.7, rho=0.8)
    np.testing.assert_allclose(x, want, rtol=0, atol=1e-14)
    traced = jax.jit(lambda w, s, r: two_exponential(jr.key(12), 50, (2,), white=w, slow=s, rho=r))(0.3, 0.7, 0.8)
    np.testing.assert_allclose(traced, want, rtol=0, atol=1e-14)


def test_two_exponential_is_the_paper_s_unless_told_otherwise():
    x = two_exponential(jr.key(13), 200, (COPIES,))[jnp.array([0, 199])]
    slow, rho = 0.043056426671195004, 0.9970052541497257
    variance, covariance = 0.332 + slow, slow * rho**199
    assert jnp.max(jnp.abs(jnp.mean(x**2, axis=1) - variance)) < 4 * np.sqrt(2 / COPIES) * variance
    error = np.sqrt((variance**2 + covariance**2) / COPIES)
    assert abs(jnp.mean(x[0] * x[1]) - covariance) < 4 * error
    assert covariance > 6 * error  # so that the slow part is seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"white": -0.1}, "white must be at least 0 and finite, got -0.1"),
        ({"slow": float("nan")}, "slow must be at least 0 and finite, got nan"),
        ({"slow": np.inf}, "slow must be at least 0 and finite, got inf"),
        ({"white": np.zeros(2)}, r"white must have 0 axes, got shape \(2,\)"),
        ({"rho": 1.1}, r"rho must be in \[0, 1\], got 1.1"),
    ],
)
def test_two_exponential_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        two_exponential(jr.key(0), 5, **options)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        two_exponential(jr.key(0), 0)


@pytest.mark.parametrize("name", ["white", "slow", "rho"])
def test_a_traced_parameter_of_two_exponential_that_is_not_allowed_gives_nan(name):
    assert jnp.isnan(jax.jit(lambda value: two_exponential(jr.key(0), 5, **{name: value}))(-0.5)).all()


# --- a delayed copy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [0, 1, 7, 19])
def test_the_target_is_the_bit_of_delay_steps_ago(delay):
    inputs, targets, mask = delayed_copy(jr.key(2), 20, delay)
    assert inputs.shape == targets.shape == (20, 1)
    assert mask.shape == (20,)
    assert inputs.dtype == targets.dtype == mask.dtype == float
    assert set(np.unique(inputs)) == {0.0, 1.0}
    np.testing.assert_array_equal(targets[delay:], inputs[: 20 - delay])
    np.testing.assert_array_equal(targets[:delay], np.zeros((delay, 1)))
    np.testing.assert_array_equal(mask, np.arange(20) >= delay)
    traced = jax.jit(lambda d: delayed_copy(jr.key(2), 20, d))
    for value in (delay, np.int32(delay), jnp.int32(delay)):
        for one, another in zip(traced(value), (inputs, targets, mask), strict=True):
            np.testing.assert_array_equal(one, another)
        again = delayed_copy(jr.key(2), 20, value)  # pyright: ignore[reportArgumentType]
        for one, another in zip(again, (inputs, targets, mask), strict=True):
            np.testing.assert_array_equal(one, another)


def test_one_program_serves_all_delays_and_those_outside_give_nan():
    delays = jnp.arange(-1, 7)
    inputs, targets, mask = jax.jit(jax.vmap(lambda d: delayed_copy(jr.key(4), 6, d)))(delays)
    assert (inputs == inputs[:1]).all()
    np.testing.assert_array_equal(jnp.isnan(targets).all(axis=(1, 2)), (delays < 0) | (delays > 5))
    for i in range(1, 7):
        np.testing.assert_array_equal(targets[i], delayed_copy(jr.key(4), 6, int(delays[i]))[1])
        assert mask[i].sum() == 6 - int(delays[i])


def test_the_bits_are_fair_and_independent():
    bits = delayed_copy(jr.key(6), COPIES, 0)[0][:, 0] * 2 - 1
    # signs: mean and products of neighbours have mean 0 and variance 1
    assert abs(jnp.mean(bits)) < 4 / np.sqrt(COPIES)
    for lag in (1, 2, 5):
        assert abs(jnp.mean(bits[lag:] * bits[:-lag])) < 4 / np.sqrt(COPIES - lag)
    assert (delayed_copy(jr.key(7), 50, 0)[0] != delayed_copy(jr.key(8), 50, 0)[0]).any()


@pytest.mark.parametrize(
    ("length", "delay", "error", "message"),
    [
        (5, 5, ValueError, "delay must be between 0 and 4, got 5"),
        (5, -1, ValueError, "delay must be between 0 and 4, got -1"),
        (5, np.array([1, 2]), ValueError, r"delay must have 0 axes, got shape \(2,\)"),
        (0, 0, ValueError, "length must be at least 1, got 0"),
        (5, 2.0, TypeError, r"delay must be an integer, got 2\.0 of type float"),
        (5, True, TypeError, "delay must be an integer, got True of type bool"),
    ],
)
def test_delays_that_cannot_be_are_refused(length, delay, error, message):
    with pytest.raises(error, match=message):
        delayed_copy(jr.key(0), length, delay)


# --- bits and their parities ------------------------------------------------------------------------------------------


def test_fair_bits_are_fair_and_independent_of_each_other():
    bits = fair_bits(jr.key(6), COPIES, 3)
    assert bits.shape == (COPIES, 3)
    assert bits.dtype == float
    assert set(np.unique(bits)) == {0.0, 1.0}
    signs = np.asarray(bits) * 2 - 1
    # signs: mean and products of different ones have mean 0 and variance 1
    assert np.abs(signs.mean(axis=0)).max() < 4 / np.sqrt(COPIES)
    for lag in (0, 1, 2, 5):
        products = signs[lag:].T @ signs[: COPIES - lag] / (COPIES - lag)
        if lag == 0:
            np.testing.assert_array_equal(np.diag(products), 1)
            products = products - np.eye(3)
        assert np.abs(products).max() < 4 / np.sqrt(COPIES - lag), lag
    assert fair_bits(jr.key(6), 7).shape == (7, 1)
    np.testing.assert_array_equal(fair_bits(jr.key(6), 50), fair_bits(jr.key(6), 50))
    assert (fair_bits(jr.key(6), 50) != fair_bits(jr.key(7), 50)).any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "length must be at least 1, got 0"),
        ((5.0,), TypeError, r"length must be an integer, got 5\.0 of type float"),
        ((5, 0), ValueError, "d_in must be at least 1, got 0"),
        ((5, 2.0), TypeError, r"d_in must be an integer, got 2\.0 of type float"),
        ((5, True), TypeError, "d_in must be an integer, got True of type bool"),
    ],
)
def test_fair_bits_refuse(arguments, error, message):
    with pytest.raises(error, match=message):
        fair_bits(jr.key(0), *arguments)


def parities(bits, taps):
    """By a loop: of the bits at the times t - taps, as far as all of these are there; 0 elsewhere. Targets and mask."""
    targets, mask = [], []
    for t in range(len(bits)):
        seen = all(t >= tap for tap in taps)
        parity = 0
        for tap in taps if seen else []:
            for bit in bits[t - tap]:
                parity ^= int(bit)
        targets.append([float(parity)])
        mask.append(float(seen))
    return np.array(targets), np.array(mask)


xor = jax.jit(delayed_xor, static_argnums=(1, 3))  # compiled once for each length and order


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), length=st.sampled_from([1, 9, 30]), order=st.integers(1, 3), data=st.data())
def test_delayed_xor_is_the_parity_of_earlier_bits(seed, length, order, data):
    delay = data.draw(st.integers(0, (length - 1) // 2**order))
    inputs, targets, mask = xor(jr.key(seed), length, delay, order)
    np.testing.assert_array_equal(inputs, fair_bits(jr.key(seed), length))
    want, seen = parities(np.asarray(inputs), [n * delay for n in range(1, 2**order + 1)])
    np.testing.assert_array_equal(targets, want)
    np.testing.assert_array_equal(mask, seen)
    assert inputs.dtype == targets.dtype == mask.dtype == float
    assert targets.shape == (length, 1)
    # from there on and not before
    assert mask.sum() == length - 2**order * delay
    assert mask[2**order * delay] == 1


def test_delayed_xor_of_order_one_is_the_exclusive_or_of_two_bits():
    bits, targets, mask = (np.asarray(array) for array in delayed_xor(jr.key(1), 40, 7))
    s, y = bits[:, 0].astype(bool), targets[:, 0].astype(bool)
    np.testing.assert_array_equal(y[14:], s[7:33] ^ s[:26])
    assert not y[:14].any()
    np.testing.assert_array_equal(mask, np.arange(40) >= 14)
    assert 0 < y.sum() < 26


@pytest.mark.parametrize("order", [1, 2])
def test_a_traced_delay_of_delayed_xor_gives_the_same_and_one_outside_gives_nan(order):
    delays = jnp.arange(-1, 7)
    inputs, targets, mask = jax.jit(jax.vmap(lambda d: delayed_xor(jr.key(4), 12, d, order)))(delays)
    largest = {1: 5, 2: 2}[order]  # 2 · 5 and 4 · 2 are below 12
    outside = (delays < 0) | (delays > largest)
    np.testing.assert_array_equal(jnp.isnan(targets).all(axis=(1, 2)), outside)
    np.testing.assert_array_equal(jnp.isnan(targets).any(axis=(1, 2)), outside)
    for i in np.flatnonzero(~outside):
        static = delayed_xor(jr.key(4), 12, int(delays[i]), order)
        for one, another in zip((inputs[i], targets[i], mask[i]), static, strict=True):
            np.testing.assert_array_equal(one, another)


@pytest.mark.parametrize("order", [1, 2])
def test_a_part_of_the_bits_tells_nothing_about_the_parity(order):
    delay, taps = 3, 2**order
    bits, targets, mask = (np.asarray(array) for array in delayed_xor(jr.key(8), COPIES, delay, order))
    first = taps * delay
    n = COPIES - first
    assert mask.sum() == n
    y = 2 * targets[first:, 0] - 1
    tapped = np.stack([2 * bits[first - m * delay : COPIES - m * delay, 0] - 1 for m in range(1, taps + 1)])
    for left_out in range(taps):
        # the product of all the others is the best guess of their own, and the correlation of two signs their product
        some = np.prod(np.delete(tapped, left_out, axis=0), axis=0)
        assert abs(np.mean(some * y)) < 4 / np.sqrt(n)
    assert np.abs(tapped @ y / n).max() < 4 / np.sqrt(n)  # nor does a single one
    np.testing.assert_array_equal(-np.prod(-tapped, axis=0), y)  # but all of them


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((10, 5), ValueError, "delay must be between 0 and 4, got 5"),
        ((11, 6), ValueError, "delay must be between 0 and 5, got 6"),
        ((10, 3, 2), ValueError, "delay must be between 0 and 2, got 3"),
        ((10, -1), ValueError, "delay must be between 0 and 4, got -1"),
        ((10, 2.0), TypeError, r"delay must be an integer, got 2\.0 of type float"),
        ((10, np.array([1, 2])), ValueError, r"delay must have 0 axes, got shape \(2,\)"),
        ((0, 0), ValueError, "length must be at least 1, got 0"),
        ((10, 1, 0), ValueError, "order must be at least 1, got 0"),
        ((10, 1, 1.0), TypeError, r"order must be an integer, got 1\.0 of type float"),
    ],
)
def test_delayed_xor_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        delayed_xor(jr.key(0), *arguments)


@pytest.mark.parametrize("d_in", [1, 2, 5])
@pytest.mark.parametrize("delay", [0, 1, 19])
def test_spatial_xor_is_the_parity_of_the_inputs_of_delay_steps_ago(d_in, delay):
    inputs, targets, mask = spatial_xor(jr.key(2), 20, delay, d_in)
    np.testing.assert_array_equal(inputs, fair_bits(jr.key(2), 20, d_in))
    want, seen = parities(np.asarray(inputs), [delay])
    np.testing.assert_array_equal(targets, want)
    np.testing.assert_array_equal(mask, seen)
    assert targets.dtype == mask.dtype == float
    if d_in == 1:
        for one, another in zip((inputs, targets, mask), delayed_copy(jr.key(2), 20, delay), strict=True):
            np.testing.assert_array_equal(one, another)
    if d_in == 2:
        np.testing.assert_array_equal(spatial_xor(jr.key(2), 20, delay)[1], targets)  # two, unless told otherwise


def test_a_single_input_tells_nothing_about_the_spatial_parity():
    inputs, targets, mask = (np.asarray(array) for array in spatial_xor(jr.key(9), COPIES, 4, 3))
    n = COPIES - 4
    assert mask.sum() == n
    past, y = 2 * inputs[:n] - 1, 2 * targets[4:, 0] - 1
    assert np.abs(past.T @ y / n).max() < 4 / np.sqrt(n)
    np.testing.assert_array_equal(np.prod(past, axis=1), y)  # of three: the parity is odd if the product is positive


def test_a_traced_delay_of_spatial_xor_gives_the_same_and_one_outside_gives_nan():
    delays = jnp.arange(-1, 8)
    _, targets, mask = jax.jit(jax.vmap(lambda d: spatial_xor(jr.key(4), 6, d, 3)))(delays)
    outside = (delays < 0) | (delays > 5)
    np.testing.assert_array_equal(jnp.isnan(targets).all(axis=(1, 2)), outside)
    for i in np.flatnonzero(~outside):
        _, want, seen = spatial_xor(jr.key(4), 6, int(delays[i]), 3)
        np.testing.assert_array_equal(targets[i], want)
        np.testing.assert_array_equal(mask[i], seen)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((5, 5), ValueError, "delay must be between 0 and 4, got 5"),
        ((5, -1), ValueError, "delay must be between 0 and 4, got -1"),
        ((5, 2.0), TypeError, r"delay must be an integer, got 2\.0 of type float"),
        ((0, 0), ValueError, "length must be at least 1, got 0"),
        ((5, 1, 0), ValueError, "d_in must be at least 1, got 0"),
        ((5, 1, 2.0), TypeError, r"d_in must be an integer, got 2\.0 of type float"),
    ],
)
def test_spatial_xor_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        spatial_xor(jr.key(0), *arguments)


# --- a teacher --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 40])
def test_a_sample_of_the_teacher_is_its_input_convolved_with_its_impulse_response(length):
    teacher = LinearTeacher(10, min_modulus=0.9, key=jr.key(0))
    inputs, outputs = teacher.sample(jr.key(1), length)
    assert inputs.shape == outputs.shape == (length, 1)
    np.testing.assert_array_equal(inputs, jr.normal(jr.key(1), (length, 1)))
    kernel = np.asarray(teacher.impulse_response(length))
    assert kernel.shape == (length, 1, 1)
    x = np.asarray(inputs)[:, 0]
    want = np.convolve(kernel[:, 0, 0], x)[:length]
    # 40 steps of 10 products, then as many of sums, none of which amplifies: relative to the largest possible sum
    scale = np.convolve(np.abs(kernel[:, 0, 0]), np.abs(x))[:length].max()
    np.testing.assert_allclose(outputs[:, 0], want, rtol=0, atol=40 * 20 * np.finfo(float).eps * scale)
    # by the definition: C A^k B, D more at 0
    system = teacher.system
    A, B, C, D = map(np.asarray, (system.matrix(), system.input_weight, system.output_weight, system.feedthrough))
    powers = np.array([C @ np.linalg.matrix_power(A, k) @ B + (D if k == 0 else 0) for k in range(length)])
    np.testing.assert_allclose(kernel, powers, rtol=0, atol=40 * 20 * np.finfo(float).eps * np.abs(powers).max())
    np.testing.assert_array_equal(teacher.eigenvalues(), system.eigenvalues())


def test_the_law_of_fresh_teachers():
    n, count = 10, 400
    make = lambda key: LinearTeacher(n, min_modulus=0.5, max_modulus=0.9, max_phase=1.0, key=key).system  # noqa: E731
    systems = eqx.filter_jit(eqx.filter_vmap(make))(jr.split(jr.key(0), count))
    assert systems.recurrent.shape == (count, 1, n, n)
    for name, variance in {"input_weight": 1, "output_weight": 1 / n, "feedthrough": 1}.items():
        draws = np.asarray(getattr(systems, name)).ravel()
        assert abs(draws.mean()) < 4 * np.sqrt(variance / draws.size), name
        assert abs(draws.var() / variance - 1) < 4 * np.sqrt(2 / draws.size), name
        assert abs(np.mean(draws**4) / variance**2 - 3) < 4 * np.sqrt(96 / draws.size), name  # not truncated
    lam = np.linalg.eigvals(np.asarray(systems.recurrent)[:, 0])
    pairs = lam[np.abs(np.imag(lam)) > 1e-6]
    assert len(pairs) > 2000
    assert ((np.abs(pairs) > 0.5 - 1e-9) & (np.abs(pairs) < 0.9)).all()
    assert np.abs(np.angle(pairs)).max() < 1
    # undo it: with all phases kept, the matrix behind has independent entries N(0, 1/n)
    whole = LinearTeacher(80, min_modulus=0.5, max_modulus=0.9, key=jr.key(1)).system.matrix()
    lam, vectors = np.linalg.eig(np.asarray(whole))
    before = np.arctanh((np.abs(lam) - 0.5) / 0.4) * np.exp(1j * np.angle(lam))
    entries = np.real((vectors * before) @ np.linalg.inv(vectors)).ravel()
    assert abs(entries.mean()) < 4 * np.sqrt(1 / 80 / 6400)
    assert abs(entries.var() * 80 - 1) < 4 * np.sqrt(2 / 6400)


def test_the_key_makes_the_teacher():
    one, again, other = (LinearTeacher(4, min_modulus=0.5, key=jr.key(k)) for k in (0, 0, 1))
    assert eqx.tree_equal(one, again)
    for leaf, another in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (leaf != another).all()
    np.testing.assert_array_equal(one.sample(jr.key(2), 5)[1], again.sample(jr.key(2), 5)[1])
    assert (one.sample(jr.key(2), 5)[0] != one.sample(jr.key(3), 5)[0]).all()


@pytest.fixture(params=["float64", "float32"])
def precision(request):
    """As in the other tests, or as the paper's code: JAX's default."""
    jax.config.update("jax_enable_x64", request.param == "float64")
    yield jnp.dtype(request.param)
    jax.config.update("jax_enable_x64", True)


def test_the_released_teacher_is_the_paper_s(precision):

    @eqx.filter_jit
    def numbers():
        teacher = LinearTeacher.released(min_modulus=0.99)
        kernel = teacher.impulse_response(300)
        loss = population_loss(jnp.zeros_like(kernel), kernel)
        return loss, jnp.abs(teacher.eigenvalues()).max(), jax.tree.leaves(teacher)

    loss, slowest, leaves = numbers()
    assert all(leaf.dtype == precision for leaf in [loss, *leaves])
    # the published loss of predicting zero, and the slowest of the published eigenvalues, to the digits given
    np.testing.assert_allclose(loss, 118.686, rtol=1e-4)
    np.testing.assert_allclose(slowest, 0.996875, rtol=0, atol=1e-5)


def test_the_released_teacher_keeps_the_draws_it_was_made_of():
    draws = json.loads(_resources.find("results/zo24-teacher.json").read_text(encoding="utf-8"))
    system = LinearTeacher.released(min_modulus=0.9, max_phase=1.0).system
    for name, field in (("B", "input_weight"), ("C", "output_weight"), ("D", "feedthrough")):
        np.testing.assert_array_equal(getattr(system, field), draws[name])
    matrix = np.array(draws["A0"])
    lam, vectors = np.linalg.eig(matrix)
    moved = (0.9 + 0.1 * np.tanh(np.abs(lam))) * np.exp(1j * np.angle(lam) / np.pi)
    moved = np.where(np.imag(lam) == 0, moved.real, moved)
    # V and λ to rounding, amplified twice by the condition of V
    rounding = 100 * np.finfo(float).eps * np.linalg.cond(vectors) ** 2
    assert rounding < 1e-9
    np.testing.assert_allclose(np.asarray(system.matrix()) @ vectors, vectors * moved, rtol=0, atol=rounding)
    default, at_the_paper_s_phase = (
        LinearTeacher.released(min_modulus=0.9, **options) for options in ({}, {"max_phase": 3.14})
    )
    assert eqx.tree_equal(default, at_the_paper_s_phase)
    assert not eqx.tree_equal(default, LinearTeacher.released(min_modulus=0.9, max_phase=np.pi))


@pytest.mark.parametrize(
    ("size", "options", "error", "message"),
    [
        (0, {"min_modulus": 0.5}, ValueError, "d_hidden must be at least 1, got 0"),
        (2.0, {"min_modulus": 0.5}, TypeError, r"d_hidden must be an integer, got 2\.0"),
        (3, {"min_modulus": -0.1}, ValueError, "min_modulus must be between 0 and max_modulus = 1.0, got -0.1"),
        (3, {"min_modulus": 0.9, "max_modulus": 0.8}, ValueError, "min_modulus must be .* = 0.8, got 0.9"),
        (3, {"min_modulus": 0.5, "max_modulus": 1.1}, ValueError, "max_modulus must be between 0 and 1, got 1.1"),
        (3, {"min_modulus": 0.5, "max_phase": 3.2}, ValueError, "max_phase must be between 0 and π, got 3.2"),
    ],
)
def test_teachers_that_cannot_be_are_refused(size, options, error, message):
    with pytest.raises(error, match=message):
        LinearTeacher(size, **options, key=jr.key(0))
    if size == 3 and "max_modulus" not in options:
        with pytest.raises(error, match=message):
            LinearTeacher.released(**options)


def test_samples_of_no_length_are_refused_and_traced_teachers_out_of_range_are_nan():
    teacher = LinearTeacher(3, min_modulus=0.5, key=jr.key(0))
    for call in (teacher.impulse_response, lambda length: teacher.sample(jr.key(0), length)):
        with pytest.raises(ValueError, match="length must be at least 1, got 0"):
            call(0)
        with pytest.raises(TypeError, match=r"length must be an integer, got 5\.0"):
            call(5.0)  # pyright: ignore[reportArgumentType]
    kernel = jax.jit(jax.vmap(lambda low: LinearTeacher.released(min_modulus=low).impulse_response(6)[:, 0, 0]))
    np.testing.assert_array_equal(jnp.isnan(kernel(jnp.array([0.5, 1.5]))).any(axis=1), [False, True])
