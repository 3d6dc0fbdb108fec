"""Readers of bits against plain loops, and their training, with and without flossing, against one written by hand."""

from dataclasses import replace
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scanrnn import flossing
from scanrnn.cells import gaussian, tanh
from scanrnn.flossing import Flossing, bit_loss, clip_each, learn_bits, reader, vanilla
from scanrnn.lyapunov import floss, flossing_loss, lyapunov_exponents
from scanrnn.tasks import delayed_copy, fair_bits

N, LENGTH, BATCH, EVERY = 4, 12, 3, 4
DELAYS = (1, 3)
COLUMNS = ("accuracy", "loss", "first", "last", "gradient")  # of the stretches

# The same operations compiled otherwise; a gradient through 12 steps adds up some 100 roundings, and Adam's first steps
# divide it by its own size.
same: Any = {"rtol": 1e-9, "atol": 1e-12}


# --- students ---------------------------------------------------------------------------------------------------------


def gru(d_in, d_hidden, *, key):
    return eqx.nn.GRUCell(d_in, d_hidden, key=key)


def lstm(d_in, d_hidden, *, key):
    return eqx.nn.LSTMCell(d_in, d_hidden, key=key)


def bits(seed, d_in=1):
    return jnp.stack([fair_bits(key, LENGTH, d_in) for key in jr.split(jr.key(seed), BATCH)])


def test_the_logits_of_a_vanilla_network_are_those_of_a_loop():
    student, inputs = vanilla(d_hidden=N, d_in=2, batch=BATCH, key=jr.key(0)), bits(1, 2)
    cell: Any = student.cell
    J, W, b, w = map(np.asarray, (cell.recurrent_weight, cell.input_weight, cell.bias, student.weight))
    got = student(inputs)
    assert got.shape == (BATCH, LENGTH)
    for i, sequence in enumerate(np.asarray(inputs)):
        x = np.asarray(student.initial_states[i])
        for t, s in enumerate(sequence):
            x = J @ np.tanh(x) + W @ s + b
            np.testing.assert_allclose(got[i, t], w @ x + 1e-3, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("make", "states"), [(gru, 1), (lstm, 2)], ids=["GRU", "LSTM"])
def test_the_logits_of_gated_cells_are_read_from_the_first_array_of_the_state(make, states):
    student, inputs = reader(make, d_hidden=N, states=states, batch=BATCH, key=jr.key(0)), bits(1)
    student = eqx.tree_at(lambda s: s.bias, student, jnp.array(0.7))
    cell, got = eqx.filter_jit(student.cell), student(inputs)
    for i in range(BATCH):
        state = jax.tree.map(lambda leaf, i=i: leaf[i], student.initial_states)
        for t in range(LENGTH):
            state = cell(inputs[i, t], state)
            h = state[0] if states == 2 else state
            np.testing.assert_allclose(got[i, t], student.weight @ h + 0.7, rtol=1e-12, atol=1e-12)
    if states == 2:
        assert isinstance(student.initial_states, tuple)
        c = student.initial_states[1]
        assert c.shape == (BATCH, N)
        assert jnp.max(jnp.abs(c - student.initial_states[0])) > 0.01


def assert_standard_normal(draws):
    # Of n of them the mean has variance 1/n, the mean square 2/n and the mean fourth power 96/n; five deviations.
    for power, want, spread in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        assert abs(np.mean(draws**power) - want) < 5 * np.sqrt(spread / draws.size)


def test_the_vanilla_network_has_the_distribution_of_the_paper():
    n, count = 8, 400
    make = jax.jit(jax.vmap(lambda key: vanilla(d_hidden=n, d_in=2, batch=1, key=key)))
    students = make(jr.split(jr.key(0), count))
    cell: Any = students.cell
    for draws, variance in ((cell.recurrent_weight, 1 / n), (cell.input_weight, 1.0), (students.weight, 1.0)):
        draws = np.ravel(draws) / np.sqrt(variance)
        assert_standard_normal(draws)
    biases = np.ravel(cell.bias)
    assert 0 <= biases.min() < 0.001
    assert 0.099 < biases.max() <= 0.1
    assert abs(np.mean(biases) - 0.05) < 5 * 0.1 / np.sqrt(12 * biases.size)
    np.testing.assert_array_equal(students.bias, np.full(count, 1e-3))
    assert cell.activation is tanh


def test_the_parts_of_the_vanilla_network_can_be_changed():
    def filled(value):
        return lambda key, shape: jnp.full(shape, value)

    student = jax.jit(partial(vanilla, d_hidden=N, recurrent_init=filled(0.25), activation=jax.nn.relu, batch=1))
    cell: Any = student(key=jr.key(0)).cell
    np.testing.assert_array_equal(cell.recurrent_weight, np.full((N, N), 0.25))
    assert cell.activation is jax.nn.relu
    narrow = reader(counting, d_hidden=N, weight_init=filled(3.0), batch=1, key=jr.key(0))
    np.testing.assert_array_equal(narrow.weight, np.full(N, 3.0))


def counting(d_in, d_hidden, *, key):
    """A cell that shows the draws, the number of steps and the inputs."""
    return lambda input, state: jax.tree.map(lambda leaf: leaf + 1 + 1e6 * jnp.sum(input), state)


@pytest.mark.parametrize("states", [1, 2])
def test_initial_states_are_normal_draws_after_100_steps_without_input(states):
    student = reader(counting, d_hidden=8, states=states, d_in=2, batch=500, key=jr.key(0))
    drawn = jax.tree.leaves(student.initial_states)
    assert isinstance(student.initial_states, tuple) == (states == 2)
    assert [leaf.shape for leaf in drawn] == [(500, 8)] * states
    for draws in drawn:
        assert_standard_normal(np.ravel(draws) - 100)
    if states == 2:  # independent draws: the mean of 4000 products has variance 1/4000
        assert abs(np.mean((drawn[0] - 100) * (drawn[1] - 100))) < 5 / np.sqrt(4000)
    assert student.weight.shape == (8,)


def test_the_states_of_a_network_are_relaxed_by_itself():
    student = vanilla(d_hidden=N, batch=BATCH, key=jr.key(3))
    cell: Any = student.cell
    x = np.asarray(jr.normal(jr.split(jr.key(3), 3)[1], (1, BATCH, N)))[0]
    for _ in range(100):
        x = np.tanh(x) @ np.asarray(cell.recurrent_weight).T + np.asarray(cell.bias)
    # the errors of 100 steps, each of which multiplies them by less than 2 and mostly shrinks them
    np.testing.assert_allclose(student.initial_states, x, rtol=0, atol=1e-10)


# --- clipping ---------------------------------------------------------------------------------------------------------

entries = st.lists(st.floats(-10, 10).filter(lambda x: x == 0 or abs(x) > 1e-3), min_size=6, max_size=6)


@jax.jit
def clipped(gradient, max_norm):
    # a positive number is asked for before anything is traced
    transformation = clip_each(1.0)
    scaled = jax.tree.map(lambda leaf: leaf / max_norm, gradient)
    updates, _ = transformation.update(scaled, transformation.init(gradient))
    return jax.tree.map(lambda leaf: leaf * max_norm, updates)


@settings(max_examples=60, deadline=None)
@given(matrix=entries, vector=entries, max_norm=st.floats(0.1, 30))
def test_every_array_is_clipped_by_its_own_norm(matrix, vector, max_norm):
    gradient = {"a": jnp.array(matrix).reshape(2, 3), "b": {"c": jnp.array(vector), "d": jnp.array(vector[0])}}
    got = clipped(gradient, max_norm)
    assert jax.tree.structure(got) == jax.tree.structure(gradient)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(gradient), strict=True):
        norm = np.sqrt(np.sum(np.asarray(other) ** 2))
        np.testing.assert_allclose(one, np.asarray(other) * min(1.0, max_norm / norm if norm > 0 else 1.0), rtol=1e-14)


def test_clipping_at_a_few_norms():
    gradient: Any = {"large": jnp.array([3.0, 4.0]), "small": jnp.array([[0.3, -0.4]]), "zero": jnp.zeros(2)}
    gradient |= {"single": jnp.array([6.0, 8.0], jnp.float32), "none": None}

    def clip(max_norm):
        return clip_each(max_norm).update(gradient, optax.EmptyState())[0]

    got: Any = clip(1.0)
    np.testing.assert_allclose(got["large"], [0.6, 0.8], rtol=1e-15)
    np.testing.assert_array_equal(got["small"], gradient["small"])  # left alone, though the whole is larger
    np.testing.assert_array_equal(got["zero"], [0, 0])
    np.testing.assert_allclose(got["single"], [0.6, 0.8], rtol=1e-6)
    assert got["single"].dtype == jnp.float32
    assert got["none"] is None
    untouched = clip(np.inf)
    for one, other in zip(jax.tree.leaves(untouched), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_array_equal(one, other)
    lost: Any = clip_each(1.0).update({"nan": jnp.array([jnp.nan, 1.0])}, optax.EmptyState())[0]
    assert jnp.isnan(lost["nan"][0])  # so that a training sees it


@pytest.mark.parametrize("max_norm", [0.0, -1.0, np.nan])
def test_norms_that_are_not_positive_are_refused(max_norm):
    with pytest.raises(ValueError, match=f"max_norm must be positive, got {max_norm}"):
        clip_each(max_norm)


# --- the loss ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    logits=st.lists(st.integers(-240, 240).map(lambda i: i / 8), min_size=6, max_size=6),
    targets=st.lists(st.booleans(), min_size=6, max_size=6),
    mask=st.lists(st.booleans(), min_size=6, max_size=6).filter(any),
)
@example(logits=[0.0] * 6, targets=[True] * 6, mask=[True] * 6)  # on the fence is a 1
def test_the_loss_is_the_mean_surprise_of_the_scored_steps(logits, targets, mask):
    r, y, scored = np.reshape(logits, (2, 3)), np.reshape(targets, (2, 3)), np.reshape(mask, (2, 3))
    answers: Any = lambda inputs: jnp.array(r) + 0 * inputs[..., 0]  # noqa: E731
    inputs = jnp.zeros((2, 3, 1))
    loss, accuracy = bit_loss(answers, inputs, jnp.array(y, float)[..., None], jnp.array(scored, float))
    # -log p of the right answer, p = 1/(1 + e^∓r), in a form that loses nothing
    surprise = np.logaddexp(0, np.where(y, -r, r))
    np.testing.assert_allclose(loss, np.sum(surprise[scored]) / np.sum(scored), rtol=1e-13)
    np.testing.assert_allclose(accuracy, np.mean(((r >= 0) == y)[scored]), rtol=1e-15)


def test_wrong_answers_where_nothing_is_scored_do_not_matter():
    answers: Any = lambda inputs: jnp.array([[-9.0, 2.0, -2.0]])  # noqa: E731
    targets, mask = jnp.array([[[1.0], [1.0], [1.0]]]), jnp.array([[0.0, 1.0, 1.0]])
    loss, accuracy = bit_loss(answers, jnp.zeros((1, 3, 1)), targets, mask)
    assert accuracy == 0.5
    np.testing.assert_allclose(loss, (np.log1p(np.exp(-2)) + np.log1p(np.exp(2))) / 2, rtol=1e-15)


# --- training ---------------------------------------------------------------------------------------------------------

small = partial(vanilla, d_hidden=N)
RATE, CLIP, FLOSS_RATE = 0.02, 0.3, 0.01
SIZES: dict[str, Any] = {"length": LENGTH, "batch": BATCH, "epochs": 3 * EVERY, "every": EVERY, "max_norm": CLIP}
FLOSSING = Flossing(2, steps=5, later=3, target=-0.4, length=16, transient=4, learning_rate=FLOSS_RATE)


def learn(seed: Any = 0, rate: Any = RATE, gain: Any = 1.0, how: Flossing | None = None, **options):
    student = partial(small, recurrent_init=lambda key, shape: gain * gaussian()(key, shape))
    fitting = {"student": student, "task": delayed_copy, "delays": DELAYS, "spectrum": 2, **SIZES} | options
    return learn_bits({"seed": seed}, flossing=how, learning_rate=rate, **fitting)


# What the loop by hand is made of, compiled once
adam, flosser = optax.adam(RATE), optax.adam(FLOSS_RATE)
window = partial(fair_bits, length=16)


def draw(key, delay):
    return jax.vmap(lambda k: delayed_copy(k, LENGTH, delay))(jr.split(key, BATCH))


@eqx.filter_jit
def step(student, state, key, delay):
    """Loss, accuracy, norm of the gradient with respect to the initial states, and what follows."""
    values, gradient = eqx.filter_value_and_grad(lambda s: bit_loss(s, *draw(key, delay)), has_aux=True)(student)
    clipped = jax.tree.map(lambda g: g * jnp.minimum(1, CLIP / jnp.sqrt(jnp.sum(g**2))), gradient)
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes
        updates, state = adam.update(clipped, state)
        return *values, jnp.linalg.norm(gradient.initial_states), eqx.apply_updates(student, updates), state


def by_hand(delay, epochs=(), seed=0):
    """The same run as a plain loop at one delay, flossed before these epochs.

    Four keys: of the student, of training, of flossing, of the test; of the second and third one for each stretch.
    """
    student_key, train_key, floss_key, test_key = jr.split(jr.key(seed), 4)
    student: Any = small(batch=BATCH, key=student_key)
    state, floss_state, delay = adam.init(eqx.filter(student, eqx.is_array)), None, jnp.array(delay)
    columns = {name: [] for name in COLUMNS}
    for stretch in range(3):
        if stretch * EVERY in epochs:
            student, floss_state = flossed(student, floss_state, jr.fold_in(floss_key, stretch), 3 if stretch else 5)
        key = jr.fold_in(train_key, stretch)
        first, last = exponents_of(student, key)
        columns["first"].append(first)
        columns["last"].append(last)
        columns["gradient"].append(step(student, state, key, delay)[2])
        losses, accuracies = [], []
        for k in range(EVERY):
            loss, accuracy, _, student, state = step(student, state, jr.fold_in(key, k), delay)
            losses.append(loss)
            accuracies.append(accuracy)
        columns["loss"].append(np.mean(losses))
        columns["accuracy"].append(np.mean(accuracies))
    ends = [step(student, state, key, delay)[1] for key in jr.split(test_key, 16)]
    return columns | {"accuracy_end": np.mean(ends)}


@eqx.filter_jit
def floss_step(cell, initial, state, key):
    def loss(cell):
        return flossing_loss(lyapunov_exponents(cell, initial, fair_bits(key, 16), 2, transient=4), -0.4)

    with jax.numpy_dtype_promotion("standard"):
        updates, state = flosser.update(eqx.filter_grad(loss)(cell), state)
        return eqx.apply_updates(cell, updates), state


def flossed(student, state, key, steps):
    cell, initial = student.cell, student.initial_states[0]
    state = flosser.init(eqx.filter(cell, eqx.is_array)) if state is None else state
    for k in range(steps):
        cell, state = floss_step(cell, initial, state, jr.fold_in(key, k))
    return eqx.tree_at(lambda s: s.cell, student, cell), state


def exponents_of(student, key):
    """On 100 bits after a transient of 50; they are those of training, if it is longer."""
    return lyapunov_exponents(student.cell, student.initial_states[0], fair_bits(key, 150), 2, transient=50)


SCHEDULES = {"none": None, "twice": (0, 2 * EVERY), "later": (EVERY,)}
# One program each; seeds, rates and gains are arguments of it.
RUNS = {
    name: jax.jit(partial(learn, how=None if epochs is None else replace(FLOSSING, epochs=epochs)))
    for name, epochs in SCHEDULES.items()
}


@pytest.fixture(scope="module")
def runs():
    return {name: run(0, RATE, 1.0) for name, run in RUNS.items()}


def test_columns_have_axes_of_delays_and_stretches(runs):
    for run in runs.values():
        shapes = {name: column.shape for name, column in run.items()}
        assert shapes == dict.fromkeys(COLUMNS, (2, 3)) | dict.fromkeys(("accuracy_end", "diverged"), (2,))
        assert run["diverged"].dtype == bool
        assert not run["diverged"].any()
        assert np.all(run["first"] > run["last"])


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_is_a_plain_loop(runs, name):
    for i, delay in enumerate(DELAYS):
        for column, values in by_hand(delay, SCHEDULES[name] or ()).items():
            np.testing.assert_allclose(runs[name][column][i], values, **same)


def test_flossing_before_training_is_shared_by_all_delays(runs):
    student_key, train_key, floss_key, _ = jr.split(jr.key(0), 4)
    student, state = small(batch=BATCH, key=student_key), None
    first_state: Any = student.initial_states[0]
    options: Any = {"num_exponents": 2, "target": -0.4, "steps": 5, "transient": 4, "key": jr.fold_in(floss_key, 0)}
    cell, state, _ = floss(student.cell, first_state, window, optimizer=flosser, optimizer_state=state, **options)
    student = eqx.tree_at(lambda s: s.cell, student, cell)
    want = exponents_of(student, jr.fold_in(train_key, 0))
    for name, exponent in zip(("first", "last"), want, strict=True):
        np.testing.assert_allclose(runs["twice"][name][:, 0], np.full(2, exponent), **same)
        assert np.abs(runs["none"][name][:, 0] - exponent).min() > 1e-3


def test_flossing_during_training_changes_only_what_follows(runs):
    before = [by_hand(delay, (0,)) for delay in DELAYS]
    before = {column: np.array([run[column] for run in before]) for column in COLUMNS}
    for name, other, stretch in (("twice", before, 2), ("later", runs["none"], 1)):
        for column in COLUMNS:
            got, want = runs[name][column], other[column]
            np.testing.assert_allclose(got[:, :stretch], want[:, :stretch], **same)  # also where flossing is not due
            if column != "accuracy":  # of few answers, which may be the same
                assert np.abs(got[:, stretch] - want[:, stretch]).min() > 1e-6


@pytest.mark.parametrize("rate", [np.nan, 1e300])
def test_a_run_that_diverges_is_flagged(rate):
    got = RUNS["none"](0, rate, 1.0)
    assert got["diverged"].all()
    # the first loss and all before it are of the student as it was
    assert np.isfinite(got["first"][:, 0]).all()
    assert not np.isfinite(got["loss"]).any()


def test_other_seeds_are_other_students_and_other_sequences(runs):
    got = RUNS["none"](1, RATE, 1.0)
    for name in ("loss", "first", "last", "gradient"):
        assert np.all(got[name] != runs["none"][name])


@pytest.mark.parametrize(("name", "rate"), [("twice", RATE), ("later", 0.0)])
def test_a_flossing_that_stops_is_flagged_and_training_goes_on(name, rate):
    got = RUNS[name](0, rate, 0.0)  # all exponents of this network are minus infinity, until training moves it
    assert got["diverged"].all()
    assert np.isneginf(got["first"][:, 0]).all()
    assert np.isfinite(got["loss"]).all()
    assert not RUNS["none"](0, rate, 0.0)["diverged"].any()


def nothing(width, memory, *, key) -> Any:
    """A layer that remembers nothing, which is compiled sooner than others."""
    return lambda stream: stream


stack = partial(flossing.stack, nothing, memory=3.0, width=4, depth=1)


def test_a_stack_learns_but_has_no_exponents():
    got = jax.jit(partial(learn, student=stack, delays=(0,), epochs=40, every=20))(0)
    for name in ("first", "last", "gradient"):
        np.testing.assert_array_equal(got[name], np.full((1, 2), np.nan))
    assert not got["diverged"].any()
    assert got["loss"][0, 1] < got["loss"][0, 0] < 3 * np.log(2)
    assert got["accuracy"].shape == (1, 2)


def test_a_stack_sees_each_sequence_of_bits_as_signs():
    @jax.jit
    def both_ways(key, inputs):
        student = stack(batch=BATCH, key=key)
        return student(inputs), jax.lax.map(lambda sequence: student.stack(2 * sequence - 1)[:, 0], inputs)

    together, one_by_one = both_ways(jr.key(5), bits(0))
    assert together.shape == (BATCH, LENGTH)
    assert len(np.unique(together)) == 2
    np.testing.assert_allclose(together, one_by_one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"how": replace(FLOSSING, epochs=(0, 3))},
            ValueError,
            r"epochs of flossing must be multiples of every = 4 below 12, got \(0, 3\)",
        ),
        ({"how": replace(FLOSSING, epochs=(12,))}, ValueError, r"multiples of every = 4 below 12, got \(12,\)"),
        ({"how": replace(FLOSSING, epochs=(-4,))}, ValueError, r"multiples of every = 4 below 12, got \(-4,\)"),
        (
            {"how": FLOSSING, "student": stack},
            ValueError,
            "student must be a BitReader to be flossed, got StackReader",
        ),
        ({"every": 5}, ValueError, "every must divide epochs = 12, got 5"),
        ({"every": 24}, ValueError, "every must divide epochs = 12, got 24"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"every": 4.0}, TypeError, r"every must be an integer, got 4\.0"),
        ({"max_norm": 0.0}, ValueError, r"max_norm must be positive, got 0\.0"),
    ],
)
def test_schedules_and_students_that_do_not_fit_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(partial(learn, **options), 0)
