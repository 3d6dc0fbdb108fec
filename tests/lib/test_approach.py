"""Networks brought to an exponent, their sensitivity against closed forms, and plain gradient descent from them."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from scanrnn import approach
from scanrnn.curvature import hessian
from scanrnn.flossing import BitReader, bit_loss
from scanrnn.lyapunov import lyapunov_exponents
from scanrnn.tasks import delayed_copy

N, WINDOWS = 6, 16
EPS = np.finfo(float).eps


def before(cell, state, inputs, target, key):
    """The way that leaves the network as it was drawn."""
    return cell


def leading(cell, state, windows):
    """Λ_1 on each of the windows."""
    transient = windows.shape[1] // 4
    return jax.vmap(lambda window: lyapunov_exponents(cell, state, window, 1, transient=transient)[0])(windows)


@partial(jax.jit, static_argnames="way")  # seeds and targets are arguments of one program
def brought(seed, target, way):
    """A network before and after, and its exponent before and after on fresh windows."""
    point = {"seed": seed, "target": target}
    old, state, key = approach.network(point, way=before, d_hidden=N)
    new, _, _ = approach.network(point, way=way, d_hidden=N)
    windows = jax.vmap(lambda k: approach.plain_bits(k, 2000))(jr.split(key, WINDOWS))
    return old, new, *jax.lax.map(lambda cell: leading(cell, state, windows), stacked(old, new))


def stacked(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def kept(old, new):
    """Whether all but J is the same."""
    return all((getattr(old, name) == getattr(new, name)).all() for name in ("input_weight", "bias"))


def common_factor(old, new):
    """By which all of J was multiplied."""
    factors = np.asarray(new.recurrent_weight) / np.asarray(old.recurrent_weight)
    np.testing.assert_allclose(factors, np.full(factors.shape, factors[0, 0]), rtol=4 * EPS)
    return factors[0, 0]


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_plain_and_signed_bits():
    plain, signed = approach.plain_bits(jr.key(0), 4000), approach.signed_bits(jr.key(0), 4000)
    assert plain.shape == signed.shape == (4000, 1)
    assert set(np.unique(plain)) == {0, 1}
    np.testing.assert_array_equal(signed, 2 * plain - 1)
    assert abs(jnp.mean(signed)) < 5 / np.sqrt(4000)


# --- ways -------------------------------------------------------------------------------------------------------------


# Small networks do not reach every exponent: with a large gain their units stay where they are. These do.
@pytest.mark.parametrize(("seed", "target"), [(0, -0.3), (1, -0.3), (5, -0.05)])
def test_the_gain_brings_the_exponent_to_the_target_also_on_other_inputs(seed, target):
    old, new, exponents_before, exponents = brought(seed, target, way=approach.scaled)
    assert 0.1 < common_factor(old, new) < 10
    assert kept(old, new)
    assert new.activation is old.activation
    # g was found on a window of 3000 steps, which deviates like one of these, or less; the mean of 16 of them deviates
    # by a quarter of that. Bisection leaves log(100)/2^16 of log g.
    spread = jnp.std(exponents, ddof=1) * np.sqrt(1 + 1 / WINDOWS)
    assert abs(jnp.mean(exponents) - target) < 4 * spread + 1e-3
    assert 4 * spread + 1e-3 < 0.07 < abs(jnp.mean(exponents_before) - target)


def test_gains_are_exact_where_the_exponent_is_linear_in_their_logarithm_and_end_at_their_bounds():
    def gain(target):
        def way(cell, state, inputs, target, key):
            plain = approach.linear(cell, state, inputs, jnp.zeros(()), key)  # Λ_1 = log g
            return approach.scaled(plain, state, inputs, target, key, length=400)

        cell, _, _ = approach.network({"seed": 0, "target": target}, way=way, d_hidden=1)
        return jnp.abs(cell.recurrent_weight[0, 0])

    targets = jnp.array([-0.7, 0.4, 9.0, -9.0])
    want = [-0.7, 0.4, np.log(10), -np.log(10)]
    np.testing.assert_allclose(jnp.log(jax.lax.map(gain, targets)), want, rtol=0, atol=np.log(100) / 2**16)


def test_the_linear_network_has_the_spectral_radius_and_the_exponents_of_its_target():
    @jax.jit
    def both(seed, target):
        point, options = {"seed": seed, "target": target}, {"inputs": approach.signed_bits, "d_hidden": N}
        old, new = (approach.network(point, way=way, **options)[0] for way in (before, approach.linear))
        return old, new, approach.portrait(point, way=approach.linear, **options, length=1600, walkers=8)

    for seed, target in ((1, -0.2), (2, 0.01)):
        old, new, got = both(seed, target)
        common_factor(old, new)
        assert kept(old, new)
        np.testing.assert_array_equal(new.activation(jnp.array([-3.0, 0.5])), [-3.0, 0.5])
        values, vectors = np.linalg.eig(new.recurrent_weight)
        np.testing.assert_allclose(np.abs(values).max(), np.exp(target), rtol=64 * EPS)
        np.testing.assert_allclose(got["radius"], np.exp(target), rtol=64 * EPS)
        np.testing.assert_allclose(got["norm"], np.linalg.norm(new.recurrent_weight, 2), rtol=64 * EPS)
        np.testing.assert_allclose(got["eigenvector_condition"], np.linalg.cond(vectors), rtol=1e-10)
        # The Jacobian is constant, so all windows and walkers say the same, up to where within its turn a complex pair
        # begins and ends: that is bounded, so 1/T of it in 600 steps and 800.
        np.testing.assert_allclose(got["first"], target, rtol=0, atol=4 / 600)
        np.testing.assert_allclose(got["mean_square"], target, rtol=0, atol=4 / 800)


def few_flossings(*arguments):
    return approach.flossed(*arguments, num_exponents=1, steps=60)


def test_flossing_moves_the_exponent_towards_the_target():
    old, new, exponents_before, exponents = brought(0, -0.9, way=few_flossings)
    error_before, error = (abs(jnp.mean(x) + 0.9) for x in (exponents_before, exponents))
    spread = jnp.std(exponents - exponents_before, ddof=1) / np.sqrt(WINDOWS)
    assert error < error_before - 4 * spread
    assert not kept(old, new)  # W and b are moved too
    # Adam's 60 steps of 1e-3 each, but for the first few, whose averages are of little
    assert 0 < jnp.max(jnp.abs(new.recurrent_weight - old.recurrent_weight)) < 2 * 60 * 1e-3


def test_a_tuned_student_has_the_exponent_that_was_asked_for():
    @jax.jit
    def tuned(key, window_key):
        student = approach.tuned(d_hidden=N, exponent=-0.2, batch=2, key=key)
        windows = jax.vmap(lambda k: approach.plain_bits(k, 2000))(jr.split(window_key, WINDOWS))
        return student, leading(student.cell, student.initial_states[1], windows)

    student, exponents = tuned(jr.key(0), jr.key(1))
    assert isinstance(student, BitReader)
    assert student.initial_states.shape == (2, N)
    spread = jnp.std(exponents, ddof=1) * np.sqrt(1 + 1 / WINDOWS)  # as above
    assert abs(jnp.mean(exponents) + 0.2) < 4 * spread + 1e-3
    assert 4 * spread + 1e-3 < 0.05
    with pytest.raises(ValueError, match="d_in must be between 1 and 1, got 2"):
        approach.tuned(d_hidden=N, exponent=-0.1, d_in=2, batch=2, key=jr.key(0))


# --- portraits --------------------------------------------------------------------------------------------------------

COLUMNS = (
    *("first", "mean_square", "total", "incoherent", "total_median", "incoherent_median"),
    *("variance", "activity", "norm", "radius", "eigenvector_condition"),
)
LONG, SETTLED = 2000, 200


@partial(jax.jit, static_argnames="inputs")
def of_one_unit(seed, target, inputs):
    """A portrait of the linear network of one unit, and the cell, state and inputs it is made from."""
    point = {"seed": seed, "target": target}
    options: Any = {"way": approach.linear, "inputs": inputs, "d_hidden": 1}
    cell, state, key = approach.network(point, **options)
    got = approach.portrait(point, **options, length=LONG, transient=SETTLED, walkers=4)
    return got, cell, state, inputs(jr.split(key)[0], LONG)


def weights(cell):
    """λ, w and b of x' = λ x + w s + b."""
    return float(cell.recurrent_weight[0, 0]), float(cell.input_weight[0, 0]), float(cell.bias[0])


SEEDS = {1: 1, -1: 0}  # one whose λ is positive, and one whose is not


@pytest.mark.parametrize("inputs", [approach.plain_bits, approach.signed_bits])
@pytest.mark.parametrize("sign", SEEDS)
def test_a_portrait_is_that_of_its_trajectory(inputs, sign):
    got, cell, state, sequence = of_one_unit(SEEDS[sign], -0.3, inputs)
    assert set(got) == set(COLUMNS)
    assert all(value.shape == () for value in got.values())
    lam, w, b = weights(cell)
    assert np.sign(lam) == sign
    np.testing.assert_allclose(abs(lam), np.exp(-0.3), rtol=4 * EPS)
    x, z, y, states, total, incoherent = float(state[0]), 0.0, 0.0, [], [], []
    for s in np.asarray(sequence)[:, 0]:
        z, y = lam * z + x, lam**2 * y + x**2  # Σ λ^k x, and the squares of its terms
        x = lam * x + w * s + b
        states.append(x)
        total.append(z**2)
        incoherent.append(y)
    x, total, incoherent = (np.array(sums)[SETTLED:] for sums in (states, total, incoherent))
    want = {
        "first": -0.3,
        "mean_square": -0.3,  # the Jacobian does not fluctuate
        "total": np.mean(total),
        "incoherent": np.mean(incoherent),
        "total_median": np.median(total),
        "incoherent_median": np.median(incoherent),
        "variance": np.var(x),
        "activity": np.mean(x**2),
        "norm": np.exp(-0.3),
        "radius": np.exp(-0.3),
        "eigenvector_condition": 1.0,
    }
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-12, err_msg=name)


def quadratic_mean(coefficients, mean):
    """E z² of z = mean + Σ c_j s_j with white signs s, and the standard deviation of its average over the window."""
    lags = np.correlate(coefficients, coefficients, "full")[len(coefficients) - 1 :]  # Σ_j c_j c_{j+k}
    # If s were Gaussian, cov(z²_t, z²_{t+k}) = 2 R_k² + 4 mean² R_k; signs have less kurtosis, and so vary less.
    variance = np.sum((2 * lags**2 + 4 * mean**2 * lags) * np.where(np.arange(len(lags)) > 0, 2, 1))
    return lags[0] + mean**2, np.sqrt(variance / (LONG - SETTLED))


@pytest.mark.parametrize("sign", SEEDS)
@pytest.mark.parametrize("target", [-0.5, -0.2])
def test_sums_over_the_past_of_a_linear_unit_have_their_closed_forms(target, sign):
    for inputs, power, level in ((approach.signed_bits, 1.0, 0.0), (approach.plain_bits, 0.5, 0.5)):
        got, cell, *_ = of_one_unit(SEEDS[sign], target, inputs)
        lam, w, b = weights(cell)
        w, b = power * w, b + level * w  # a bit is ½ + ½ sign
        k = np.arange(200.0)  # |λ|^200 < 1e-17
        # x = b/(1-λ) + w Σ λ^k s, and z = Σ λ^k x = b/(1-λ)² + w Σ k λ^(k-1) s
        activity, spread = quadratic_mean(w * lam**k, b / (1 - lam))
        np.testing.assert_allclose(activity, w**2 / (1 - lam**2) + (b / (1 - lam)) ** 2, rtol=1e-12)
        assert abs(got["activity"] - activity) < 5 * spread
        # incoherent = Σ λ^2k x²: the same average, but for its ends, 1/(1-λ²) times as large
        assert abs((1 - lam**2) * got["incoherent"] - activity) < 5 * spread
        total, spread = quadratic_mean(w * k * lam ** np.maximum(k - 1, 0) * (k > 0), b / (1 - lam) ** 2)
        closed = w**2 * (1 + lam**2) / (1 - lam**2) ** 3 + b**2 / (1 - lam) ** 4
        np.testing.assert_allclose(total, closed, rtol=1e-12)
        assert abs(got["total"] - total) < 5 * spread
        assert 5 * spread < total


def test_the_constant_part_of_plain_bits_adds_up():
    ratios = {}
    for inputs in (approach.plain_bits, approach.signed_bits):
        got, *_ = of_one_unit(SEEDS[1], -0.1, inputs)
        ratios[inputs] = got["total"] / got["incoherent"]
    lam = np.exp(-0.1)
    white, constant = (1 + lam**2) / (1 - lam**2), (1 + lam) / (1 - lam)  # 10 and 20, where all of it is one or other
    assert ratios[approach.plain_bits] > 1.2 * ratios[approach.signed_bits]
    assert ratios[approach.plain_bits] < constant * 1.5
    assert white / 1.5 < ratios[approach.signed_bits]


def test_windows_without_a_counted_step_are_refused():
    options: Any = {"way": before, "d_hidden": 1}
    with pytest.raises(ValueError, match="transient must be between 0 and 9, got 10"):
        approach.portrait({"seed": 0, "target": 0.0}, length=10, transient=10, **options)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        approach.portrait({"seed": 0, "target": 0.0}, length=0, **options)


# --- descents ---------------------------------------------------------------------------------------------------------

DELAY, LENGTH, BATCH, HIDDEN = 2, 10, 3, 3


@jax.jit
def descents(seed, rates):
    sizes: dict[str, Any] = {"d_hidden": HIDDEN, "delay": DELAY, "length": LENGTH, "batch": BATCH, "steps": 40}
    return approach.descend_from({"seed": seed, "target": 0.0}, way=before, rates=rates, **sizes)


@jax.jit
def rebuilt(seed):
    """The student at the start, the key of its training, its loss and the Hessian of it, and its exponent."""
    cell, state, key = approach.network({"seed": seed, "target": 0.0}, way=before, d_hidden=HIDDEN)
    read_key, train_key, sharp_key, window_key = jr.split(key, 4)
    init = lambda key, shape: jr.normal(key, shape) / np.sqrt(HIDDEN).item()  # noqa: E731
    student = BitReader(cell, jnp.stack([state] * BATCH), weight_init=init, key=read_key)
    at_start = partial(loss, key=sharp_key)
    window = approach.plain_bits(window_key, 3000)
    exponent = lyapunov_exponents(cell, state, window, 1, transient=500)[0]
    return student, train_key, at_start(student), hessian(at_start, student), exponent


def loss(student, key):
    draws = jax.vmap(lambda k: delayed_copy(k, LENGTH, DELAY))(jr.split(key, BATCH))
    return bit_loss(student, *draws)[0]


RATES = jnp.array([1e-3, 0.3, jnp.inf])


def test_a_descent_starts_from_the_loss_and_its_hessian():
    got = descents(4, RATES)
    shapes = {name: value.shape for name, value in got.items()}
    assert shapes == {"first": (), "start": (), "sharpness": (), "end": (3,)}
    _, _, start, matrix, exponent = rebuilt(4)
    np.testing.assert_allclose(got["start"], start, rtol=1e-12)
    values = np.linalg.eigvalsh(matrix)
    assert len(values) == HIDDEN**2 + 2 * HIDDEN + BATCH * HIDDEN + HIDDEN + 1 < 50  # so that Lanczos is exact
    np.testing.assert_allclose(got["sharpness"], values[np.argmax(np.abs(values))], rtol=64 * 50**2 * EPS)
    np.testing.assert_allclose(got["first"], exponent, rtol=1e-9)


def test_a_descent_is_a_plain_loop_and_has_no_loss_if_it_stopped():
    got = descents(4, RATES)["end"]
    student, train_key, *_ = rebuilt(4)

    @jax.jit
    def step(student, rate, key):
        value, gradient = eqx.filter_value_and_grad(loss)(student, key)
        return value, eqx.apply_updates(student, jax.tree.map(lambda g: -rate * g, gradient))

    for end, rate in zip(got[:2], (1e-3, 0.3), strict=True):
        losses, moved = [], student
        for k in range(40):
            value, moved = step(moved, rate, jr.fold_in(train_key, k))
            losses.append(value)
        np.testing.assert_allclose(end, np.mean(losses[-2:]), rtol=1e-9)  # the last twentieth
    assert got[1] < got[0]
    assert np.isnan(got[2])
    np.testing.assert_array_equal(np.isnan(descents(4, jnp.array([1e300, 1e-3, jnp.nan]))["end"]), [True, False, True])


def test_the_readout_of_a_descent_is_narrow():
    # w ~ N(0, 1/N) and the entries of x are of order one, so that logits are, and their surprise is log 2 + r²/8.
    starts = [descents(seed, RATES)["start"] for seed in range(8)]
    assert np.log(2) < np.mean(starts) < 1.5 * np.log(2)


@pytest.mark.parametrize(
    ("steps", "error", "message"),
    [
        (30, ValueError, "steps must be a multiple of 20, got 30"),
        (0, ValueError, "steps must be at least 1, got 0"),
        (20.0, TypeError, r"steps must be an integer, got 20\.0"),
    ],
)
def test_steps_without_a_last_twentieth_are_refused(steps, error, message):
    with pytest.raises(error, match=message):
        approach.descend_from({"seed": 0, "target": 0.0}, way=before, rates=(0.1,), steps=steps)
