"""Gated units and Jacobians, measured: against the equations, finite differences, theory and the paper's numbers."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from scanrnn.gates import (
    SimpleGRU,
    bin_by_time,
    chrono_gru,
    gated_unit_sample,
    jacobian_entries,
    off_diagonal,
    sample_off_diagonal,
    state_jacobians,
)
from scanrnn.lyapunov import long_term_jacobian
from scanrnn.recurrence import scan_cell
from scanrnn.sensitivity import estimate
from scanrnn.tasks import autoregressive
from scanrnn.theory import gated_sensitivity_variance, gated_state_variance, released_gated_sensitivity_variance

POWERS, CORRELATIONS = np.array([0.332, 0.043056426671195004]), np.array([0.0, 0.9970052541497257])
LOOSE = {"min_time": 1.0, "max_time": 16.0, "input_scale": 1.0, "state_scale": 1.0}


def surrogate(key, length, features, dtype=float):
    """Independent features with the autocovariance that the paper finds in word embeddings."""
    white_key, slow_key = jr.split(key)
    slow = autoregressive(slow_key, length, CORRELATIONS[1], (features,))
    inputs = jnp.sqrt(POWERS[0]) * jr.normal(white_key, (length, features)) + jnp.sqrt(POWERS[1]) * slow
    return inputs.astype(dtype)


# --- single units -----------------------------------------------------------------------------------------------------


def test_one_step_is_the_equation():
    cell = SimpleGRU(3, 5, **LOOSE, key=jr.key(0))
    x, h = jr.normal(jr.key(1), (3,)), jr.normal(jr.key(2), (5,))
    z = 1 / (1 + np.exp(-(cell.bias + cell.gate_input_weight @ x + cell.gate_state_weight @ h)))
    np.testing.assert_allclose(cell(x, h), z * h + (1 - z) * (cell.candidate_weight @ x), rtol=1e-13)
    assert ((np.exp(cell.bias) >= 1) & (np.exp(cell.bias) <= 16)).all()


def test_weights_have_the_variances_asked_for():
    loose = {"min_time": 1.0, "max_time": 2.0}
    cell = SimpleGRU(100, 200, input_scale=3.0, state_scale=0.5, **loose, key=jr.key(0))
    for weight, variance in ((cell.candidate_weight, 0.01), (cell.gate_input_weight, 0.09)):
        assert jnp.var(weight) == pytest.approx(variance, rel=0.05)
    assert jnp.var(cell.gate_state_weight) == pytest.approx(0.25 / 200, rel=0.05)
    still = SimpleGRU(100, 200, input_scale=0.0, state_scale=0.0, **loose, key=jr.key(0))
    assert not still.gate_input_weight.any()
    assert not still.gate_state_weight.any()


@pytest.mark.parametrize("state_scale", [0.0, 1.0, 3.0])
def test_the_sample_is_each_units_own_derivative(state_scale):
    scales = {"min_time": 1.0, "max_time": 16.0, "input_scale": 1.0, "state_scale": state_scale}
    inputs = jr.normal(jr.key(1), (30, 4))
    cell = SimpleGRU(4, 6, **scales, key=jr.key(0))
    sample = gated_unit_sample(jr.key(0), inputs, 6, **scales)

    def last(bias):
        moved = eqx.tree_at(lambda cell: cell.bias, cell, bias)
        return scan_cell(moved, jnp.zeros(6), inputs)[0]

    step = 1e-5
    differences = [(last(cell.bias + step * e) - last(cell.bias - step * e)) / (2 * step) for e in jnp.eye(6)]
    matrix = jnp.stack(differences, axis=1)  # ∂h_i/∂b_j
    np.testing.assert_allclose(sample.time, 1 / (1 - jax.nn.sigmoid(cell.bias)), rtol=1e-12)
    np.testing.assert_allclose(sample.state_square, last(cell.bias) ** 2, rtol=1e-12)
    np.testing.assert_allclose(sample.sensitivity_square, jnp.diagonal(matrix) ** 2, rtol=1e-6, atol=1e-12)
    # the sum over all units, which one forward pass gives, is the same only where the units are alone
    one_pass = jnp.sum(matrix, axis=1) ** 2
    assert np.allclose(one_pass, sample.sensitivity_square, rtol=1e-6, atol=1e-12) == (state_scale == 0)


@pytest.mark.parametrize("time", [2.0, 256.0])
def test_constant_gates_give_the_finite_theory_in_fig_15(time):
    length, samples = 512, 64
    still = {"min_time": time - 1, "max_time": time - 1, "input_scale": 0.0, "state_scale": 0.0}

    @jax.jit
    def means(key):
        cell_key, input_key = jr.split(key)
        units = gated_unit_sample(cell_key, surrogate(input_key, length, 32), 32, **still)
        return jnp.mean(units.state_square), jnp.mean(units.sensitivity_square)

    state, sensitivity = (estimate(m) for m in jax.lax.map(means, jr.split(jr.key(0), samples)))
    z = 1 - 1 / time
    for measured, function in ((state, gated_state_variance), (sensitivity, gated_sensitivity_variance)):
        finite = function(z, POWERS, CORRELATIONS, length=length)
        assert abs(measured.mean - finite) < 4 * measured.standard_error
    # what the sensitivity is not: fast units exclude the released formula, slow ones the stationary state
    law = released_gated_sensitivity_variance if time == 2 else gated_sensitivity_variance
    wrong = law(z, POWERS, CORRELATIONS)
    assert abs(sensitivity.mean - wrong) > 4 * sensitivity.standard_error


# --- Jacobians --------------------------------------------------------------------------------------------------------


def test_state_jacobians_are_long_term_jacobians():
    inputs, steps = jr.normal(jr.key(1), (12, 3)), [0, 1, 1, 5, 12]
    gru = chrono_gru(jr.key(0), 3, 4, **LOOSE)
    lstm = eqx.nn.LSTMCell(3, 2, key=jr.key(2))
    for cell, state, checked in ((gru, jr.normal(jr.key(3), (4,)), (3, 4)), (lstm, (jnp.zeros(2), jnp.ones(2)), (4,))):
        jacobians = state_jacobians(cell, state, inputs, steps)
        np.testing.assert_array_equal(jacobians[0], np.eye(4))
        np.testing.assert_array_equal(jacobians[1], jacobians[2])
        for i in checked:
            expected = long_term_jacobian(cell, state, inputs[: steps[i]])
            np.testing.assert_allclose(jacobians[i], expected, rtol=1e-12, atol=1e-15)


def test_chrono_gru_is_made_as_it_says():
    size, d_in = 256, 768
    cell = chrono_gru(jr.key(0), d_in, size, min_time=2.0, max_time=9.0, input_scale=0.5, state_scale=3.0)
    into = cell.weight_ih.reshape(3, size, d_in)
    for weight, variance in zip(into, (0.25 * 2 / d_in, 0.25 * 2 / d_in, 2 / d_in), strict=True):
        assert jnp.var(weight) == pytest.approx(variance, rel=0.02)
    for weight in cell.weight_hh.reshape(3, size, size):
        np.testing.assert_allclose(weight @ weight.T, 9 * np.eye(size), atol=1e-12)
    assert cell.bias is not None
    reset, update, new = np.exp(cell.bias.reshape(3, size))
    assert ((update >= 2) & (update <= 9)).all()
    np.testing.assert_array_equal([reset, new], np.ones((2, size)))


@pytest.mark.parametrize("max_time", [1.0, 16.0])
def test_gates_that_stand_still_forget_geometrically(max_time):
    still = {"min_time": 1.0, "max_time": max_time, "input_scale": 0.0, "state_scale": 0.0}
    cell = chrono_gru(jr.key(0), 3, 4, **still)
    steps = np.array([1, 2, 4, 8, 12])
    jacobians = state_jacobians(cell, jnp.zeros(4), jr.normal(jr.key(1), (12, 3)), steps)
    assert cell.bias is not None
    time = np.exp(cell.bias[4:8])
    expected = (time / (1 + time))[None] ** steps[:, None]
    np.testing.assert_allclose(jnp.diagonal(jacobians, axis1=1, axis2=2), expected, rtol=1e-12)
    np.testing.assert_array_equal(off_diagonal(jacobians), np.zeros((5, 12)))
    if max_time == 1:
        np.testing.assert_array_equal(expected[:, 0], 0.5**steps)


# ∂h_Δ/∂h_0 at Δ = 1, 2, 4, ...: our re-run of the released notebook on the surrogate input, another draw of everything
FIG_14 = {
    (256.0, 1.0): (
        [0.97483, 0.95556, 0.91569, 0.85265, 0.76051, 0.62309, 0.44499, 0.25289],
        [0.001939, 0.002565, 0.004200, 0.005510, 0.006272, 0.007897, 0.008562, 0.007663],
    ),
    (16.0, 3.0): (
        [0.83739, 0.70579, 0.49740, 0.28226, 0.11986],
        [0.020187, 0.027747, 0.036301, 0.042304, 0.039568],
    ),
}


@pytest.mark.parametrize(("max_time", "state_scale"), FIG_14)
def test_fig_14_at_the_papers_size(max_time, state_scale):
    diagonal, others = FIG_14[max_time, state_scale]
    scales = {"min_time": 1.0, "max_time": max_time, "input_scale": 1.0, "state_scale": state_scale}
    cell = chrono_gru(jr.key(1), 768, 256, **scales)
    steps = 2 ** np.arange(len(diagonal))
    jacobians = state_jacobians(cell, jnp.zeros(256), surrogate(jr.key(42), steps[-1], 768), steps)
    entries = jacobian_entries(jacobians)
    # the spread between draws of the network: 1 to 5 % and 3 to 15 %
    np.testing.assert_allclose(entries.diagonal_mean, diagonal, rtol=0.1)
    np.testing.assert_allclose(entries.off_diagonal_rms, others, rtol=0.3)


def test_entries_are_those_of_the_matrices():
    jacobians = jr.normal(jr.key(0), (3, 5, 5))
    entries = jacobian_entries(jacobians)
    for i, matrix in enumerate(np.asarray(jacobians)):
        others = np.array([matrix[r, c] for r in range(5) for c in range(5) if r != c])
        np.testing.assert_array_equal(off_diagonal(jacobians)[i], others)
        diagonal = np.diag(matrix)
        expected = (
            diagonal.mean(),
            np.median(diagonal),
            diagonal.max(),
            np.sqrt((others**2).mean()),
            abs(others).max(),
        )
        np.testing.assert_allclose([field[i] for field in entries], expected, rtol=1e-13)


def test_sampled_entries_are_different_ones_of_the_rows_asked_for():
    jacobians = jnp.arange(2 * 6 * 6.0).reshape(2, 6, 6)  # each entry tells its place
    everything = sample_off_diagonal(jr.key(0), jacobians, 30)
    np.testing.assert_array_equal(np.sort(everything), off_diagonal(jacobians))
    first = np.asarray(sample_off_diagonal(jr.key(0), jacobians, 7, rows=2))
    assert len(set(first[0])) == 7
    assert (first[0] < 12).all()
    np.testing.assert_array_equal(first[1], first[0] + 36)


def test_the_first_rows_are_only_some_units():
    # Bug 12: the first 8 of 256 rows are 8 receiving units, and at Δ = 1 a unit receives in proportion to 1 - z.
    draw = {"min_time": 1.0, "max_time": 256.0, "input_scale": 1.0, "state_scale": 1.0}
    inputs = jr.normal(jr.key(1), (1, 768)) * 0.6

    def ratios(key):
        jacobian = state_jacobians(chrono_gru(key, 768, 256, **draw), jnp.zeros(256), inputs, [1])
        rms = jacobian_entries(jacobian).off_diagonal_rms[0]
        entries = (sample_off_diagonal(jr.key(0), jacobian, 512, rows=rows) for rows in (8, None))
        return [float(jnp.sqrt(jnp.mean(sample**2)) / rms) for sample in entries]

    first, everywhere = np.transpose([ratios(key) for key in jr.split(jr.key(0), 7)])
    assert np.median(first) < 0.8
    assert abs(np.median(everywhere) - 1) < 0.15


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bad", "error", "message"),
    [
        ("min_time", 0.0, ValueError, r"^min_time must be positive and finite, got 0\.0"),
        ("max_time", 0.5, ValueError, r"^max_time must be finite and at least min_time = 1\.0, got 0\.5"),
        ("input_scale", -1.0, ValueError, r"^input_scale must be finite and not negative, got -1\.0"),
        ("state_scale", np.nan, ValueError, r"^state_scale must be finite and not negative, got nan"),
        ("d_hidden", 0, ValueError, r"^d_hidden must be at least 1, got 0"),
        ("d_hidden", 2.0, TypeError, r"^d_hidden must be an integer, got 2\.0"),
    ],
)
def test_networks_that_cannot_be_are_refused(name, bad, error, message):
    arguments = {"d_hidden": 4, **LOOSE, name: bad}
    for make in (
        partial(SimpleGRU, 3, key=jr.key(0)),
        partial(chrono_gru, jr.key(0), 3),
        partial(gated_unit_sample, jr.key(0), jnp.ones((2, 3))),
    ):
        with pytest.raises(error, match=message):
            make(**arguments)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (jnp.ones(3), ValueError, r"^inputs must have 2 axes, got shape \(3,\)"),
        (jnp.ones((0, 3)), ValueError, r"^inputs must have at least one time step"),
        (jnp.full((2, 3), jnp.nan), ValueError, r"^inputs must be finite, got nan at index \(0, 0\)"),
        (jnp.ones((2, 3), int), TypeError, r"^inputs must be floating point"),
        (jnp.ones((2, 3), complex), TypeError, r"^inputs must be real, got complex128"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, error, message):
    with pytest.raises(error, match=message):
        gated_unit_sample(jr.key(0), inputs, 4, **LOOSE)


def test_single_precision_inputs_are_taken():
    inputs = surrogate(jr.key(1), 30, 4, jnp.float32)
    for scale in (0.0, 1.0):
        units = gated_unit_sample(jr.key(0), inputs, 6, **{**LOOSE, "state_scale": scale})
        assert all(jnp.isfinite(field).all() for field in units)


def test_steps_and_matrices_that_do_not_fit_are_refused():
    cell, inputs = chrono_gru(jr.key(0), 3, 4, **LOOSE), jnp.ones((5, 3))
    for steps, error, message in (
        ([], ValueError, r"^steps must hold at least one number on one axis, got shape \(0,\)"),
        ([[1]], ValueError, r"^steps must hold .*, got shape \(1, 1\)"),
        ([3, 2], ValueError, r"^steps must not decrease, got \[3, 2\]"),
        ([6], ValueError, r"^each of steps must be between 0 and 5, got 6"),
        ([-1], ValueError, r"^each of steps must be between 0 and 5, got -1"),
        ([1.0], TypeError, r"^each of steps must be an integer, got 1\.0"),
    ):
        with pytest.raises(error, match=message):
            state_jacobians(cell, jnp.zeros(4), inputs, steps)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"^state must be floating point"):
        state_jacobians(cell, jnp.zeros(4, int), inputs, [1])
    for bad in (jnp.ones(3), jnp.ones((2, 3)), jnp.ones((1, 1))):
        for function in (off_diagonal, jacobian_entries, partial(sample_off_diagonal, jr.key(0), count=1)):
            with pytest.raises(ValueError, match=r"^jacobians must end in two axes of one length, at least 2, got"):
                function(jacobians=bad)
    with pytest.raises(ValueError, match=r"^rows must be between 1 and 4, got 5"):
        sample_off_diagonal(jr.key(0), jnp.eye(4), 1, rows=5)
    with pytest.raises(ValueError, match=r"^count must be between 1 and 6, got 7"):
        sample_off_diagonal(jr.key(0), jnp.eye(4), 7, rows=2)


def test_bins_are_means_over_the_units_of_a_sample_and_then_over_samples():
    times = np.array([[1.0, 1.5, 3.0], [1.2, 3.0, 3.5], [5.0, 3.0, 3.0]])
    values = np.array([[1.0, 3.0, 7.0], [4.0, 1.0, 2.0], [9.0, 4.0, 6.0]])
    centres, means, errors = bin_by_time(times, values, np.array([1.0, 2.0, 4.0]))
    assert np.allclose(centres, [(1 + 1.5 + 1.2) / 3, (3 + 3 + 3.5 + 3 + 3) / 5], rtol=1e-14)
    assert np.allclose(means, [(2 + 4) / 2, (7 + 1.5 + 5) / 3], rtol=1e-14)
    assert np.allclose(errors[0], np.std([2, 4], ddof=1) / np.sqrt(2), rtol=1e-14)


@pytest.mark.parametrize(
    ("times", "edges", "match"),
    [
        (np.ones(3), [0.0, 2.0], "one shape"),
        (np.ones((2, 2)), [2.0, 1.0], "ascend"),
        (np.ones((2, 2)), [2.0, 3.0], "at least two samples"),
    ],
)
def test_bins_refuse(times, edges, match):
    with pytest.raises(ValueError, match=match):
        bin_by_time(times, np.ones((2, 2)), np.array(edges))
