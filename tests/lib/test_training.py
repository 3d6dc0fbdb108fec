"""Descent in one scan, against the same steps taken one by one and against closed forms."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Array

from scanrnn import training
from scanrnn.training import descend, train


class Line(eqx.Module):
    """A pytree with all kinds of leaves: two arrays to train, one of integers, one function."""

    slope: Array
    offset: Array
    count: Array
    activation: Callable

    def __call__(self, x):
        return self.activation(self.slope * x + self.offset)


def line() -> Line:
    return Line(jnp.array(0.3), jnp.array(-0.2), jnp.array(7), jnp.tanh)


def misfit(model: Line) -> Array:
    x = jnp.linspace(-1.0, 1.0, 5)
    return jnp.mean((jax.vmap(model)(x) - jnp.tanh(2 * x + 1)) ** 2)


def count_down() -> optax.GradientTransformation:
    """Every step subtracts 1, whatever the gradient."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda leaf: -jnp.ones_like(leaf), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


optimizers = {
    "sgd": optax.sgd(0.3),
    "adam": optax.adam(0.03),
    "schedule": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(optax.cosine_decay_schedule(0.1, 12))),
}


@pytest.mark.parametrize("optimizer", optimizers.values(), ids=optimizers.keys())
def test_takes_the_same_steps_as_a_loop(optimizer):
    trained, history = descend(misfit, line(), optimizer, 12)
    model = line()
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
        for k in range(12):
            loss, gradient = eqx.filter_value_and_grad(misfit)(model)
            # compiled and eager arithmetic differ by a rounding or two a step; twelve steps of rate 0.3 amplify little
            np.testing.assert_allclose(history.loss[k], loss, rtol=1e-12)
            np.testing.assert_allclose(history.parameters.slope[k], model.slope, rtol=1e-12)
            updates, state = optimizer.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
            model = eqx.apply_updates(model, updates)
    np.testing.assert_allclose(trained.slope, model.slope, rtol=1e-12)
    np.testing.assert_allclose(trained.offset, model.offset, rtol=1e-12)
    assert history.steps_taken == 12


@settings(deadline=None, max_examples=20)
@given(
    start=st.floats(1e-3, 5), curvature=st.floats(0.1, 2), rate=st.floats(0.01, 0.9), steps=st.sampled_from([1, 2, 17])
)
def test_gradient_descent_on_a_parabola_is_geometric(start, curvature, rate, steps):
    def loss(parameters):
        p, curvature = parameters["p"], jax.lax.stop_gradient(parameters["curvature"])
        return 0.5 * curvature * p**2

    parameters = {"p": jnp.array(start), "curvature": jnp.array(curvature)}
    trained, history = descend(loss, parameters, optax.sgd(rate), steps)
    exact = start * (1 - rate * curvature) ** np.arange(steps + 1)
    # each step rounds its three products and sums, and the exact power its factor: in units of the largest value,
    # which is the first, since |1 - rate curvature| < 1
    tolerance = 8 * steps * np.finfo(float).eps * start
    np.testing.assert_allclose([*history.parameters["p"], trained["p"]], exact, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(history.parameters["curvature"], np.full(steps, curvature))


def test_history_belongs_to_the_moment_before_each_step():
    _, history = descend(misfit, line(), optax.adam(0.05), 9)
    assert history.loss.shape == history.parameters.slope.shape == (9,)
    assert history.parameters.slope[0] == line().slope
    visited = eqx.filter_vmap(lambda arrays: misfit(eqx.combine(arrays, line())))(history.parameters)
    np.testing.assert_allclose(history.loss, visited, rtol=1e-12)  # the same arithmetic, compiled another way


def test_keeps_what_is_not_trained():
    trained, history = descend(misfit, line(), optax.adam(0.05), 3)
    assert trained.activation is line().activation
    assert trained.count == 7
    assert history.parameters.count is None
    assert trained.slope != line().slope


def test_the_optimizers_state_is_carried():
    # Adam's steps have the length of its rate while the gradient keeps its size and sign; without its state it would
    # also do so after the gradient has shrunk to a hundredth, where with it the average of the past says less than a
    # quarter: m / √v with 0.9 and 0.999.
    def kink(p):
        return jnp.where(p > 0, p, 0.01 * p)

    _, history = descend(kink, jnp.array(0.0955), optax.adam(1e-2), 40)
    steps = -np.diff(history.parameters)
    np.testing.assert_allclose(steps[:9], 1e-2, rtol=1e-6)  # ε = 1e-8 in the denominator
    assert steps[-1] < 0.25e-2


def test_vmap_over_starts_agrees_with_one_by_one():
    starts = jr.normal(jr.key(0), (5, 3))
    loss = lambda p: jnp.sum(jnp.cosh(p))  # noqa: E731
    together, histories = jax.vmap(lambda p: descend(loss, p, optax.adam(0.1), 20))(starts)
    for i, start in enumerate(starts):
        alone, history = descend(loss, start, optax.adam(0.1), 20)
        np.testing.assert_allclose(together[i], alone, rtol=1e-12, atol=1e-13)  # vectorised cosh rounds differently
        np.testing.assert_allclose(histories.loss[i], history.loss, rtol=1e-12)
    np.testing.assert_array_equal(histories.steps_taken, np.full(5, 20))


@pytest.mark.parametrize("steps", [4, 5, 50])
def test_stops_at_the_first_loss_that_is_not_finite(steps):
    start = jnp.array(3.5)  # log of 3.5, 2.5, 1.5, 0.5, and then of -0.5
    if steps == 4:
        trained, history = descend(jnp.log, start, count_down(), steps)
    else:
        with pytest.warns(RuntimeWarning, match=f"stopped at step 4 of {steps}, where the loss .* nan"):
            trained, history = descend(jnp.log, start, count_down(), steps)
    assert trained == -0.5
    assert history.steps_taken == 4
    np.testing.assert_array_equal(history.parameters, np.maximum(3.5 - np.arange(steps), -0.5))
    np.testing.assert_array_equal(np.isfinite(history.loss), np.arange(steps) < 4)


def test_stops_at_the_first_gradient_that_is_not_finite():
    root = lambda p: jnp.sqrt(jnp.abs(p))  # noqa: E731
    with pytest.warns(RuntimeWarning, match="stopped at step 2 of 6, where the gradient was not finite"):
        trained, history = descend(root, jnp.array(2.0), count_down(), 6)
    assert trained == 0
    np.testing.assert_array_equal(history.loss, np.sqrt([2.0, 1.0, 0, 0, 0, 0]))


def test_under_vmap_only_the_diverging_run_stops():
    trained, history = jax.vmap(lambda p: descend(jnp.log, p, count_down(), 6))(jnp.array([3.5, 100.0]))
    np.testing.assert_array_equal(history.steps_taken, [4, 6])
    np.testing.assert_array_equal(trained, [-0.5, 94.0])


def test_keeps_single_precision():
    trained, history = descend(lambda p: jnp.sum(p**2), jnp.ones(2, jnp.float32), optax.adam(np.float64(0.1)), 5)
    assert trained.dtype == history.loss.dtype == history.parameters.dtype == jnp.float32


def test_compiles_once():
    traces = []

    def loss(p):
        traces.append(p)
        return p**2

    optimizer = optax.sgd(0.1)
    descend(loss, jnp.array(1.0), optimizer, 3)
    first = len(traces)
    descend(loss, jnp.array(2.0), optimizer, 3)
    assert len(traces) == first + 1  # the check of the loss's shape, which runs nothing


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.0}, TypeError, "steps must be an integer, got 2.0"),
        ({"optimizer": 0.1}, TypeError, "optimizer must have init and update, .* got 0.1"),
        ({"parameters": jnp.array(1j)}, TypeError, "parameters must be real .* got complex128"),
        ({"parameters": jnp.array(1)}, ValueError, "parameters must hold a floating-point array, got .*i64"),
        ({"parameters": jnp.array(jnp.nan)}, ValueError, "parameters must be finite, got nan"),
        ({"loss": lambda p: jnp.stack([p, p])}, ValueError, r"loss must return a scalar, got shape \(2,\)"),
        ({"loss": lambda p: jax.lax.complex(p, p)}, TypeError, "loss must return a real .* got complex128"),
        ({"loss": lambda p: jnp.sign(p).astype(int)}, TypeError, "loss must return a real .* got int64"),
    ],
)
def test_refuses(arguments, error, message):
    fitting = {"loss": jnp.square, "parameters": jnp.array(1.0), "optimizer": optax.sgd(0.1), "steps": 3}
    with pytest.raises(error, match=message):
        descend(**(fitting | arguments))


# --- train ------------------------------------------------------------------------------------------------------------


def noisy(model: Line, key) -> Array:
    """A loss that draws its sample."""
    x = jr.normal(key, (7,))
    return jnp.mean((jax.vmap(model)(x) - jnp.tanh(2 * x + 1)) ** 2)


LOOPS = pytest.mark.parametrize("optimizer", optimizers.values(), ids=optimizers.keys())


def by_hand(loss, optimizer, steps):
    """A plain loop: models before each step and after the last, losses, states of the optimiser before each step."""
    model, models, losses, states = line(), [], [], []
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
        for k in range(steps):
            value, gradient = eqx.filter_value_and_grad(loss)(model, k)
            models.append(model)
            losses.append(value)
            states.append(state)
            updates, state = optimizer.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
            model = eqx.apply_updates(model, updates)
    return [*models, model], losses, [*states, state]


# Compiled and eager arithmetic differ by a rounding or two a step; twelve steps amplify little, as with `descend`.
same: Any = {"rtol": 1e-12, "atol": 1e-13}


def assert_same_leaves(got, want):
    got, want = (jax.tree.leaves(eqx.filter(tree, eqx.is_array)) for tree in (got, want))
    assert len(got) == len(want) > 0
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, **same)


@LOOPS
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("every", [1, 4, 12])
def test_train_takes_the_steps_of_a_loop_and_returns_the_state(optimizer, stochastic, every):
    key = jr.key(5)
    loss = (lambda model, k: noisy(model, jr.fold_in(key, k))) if stochastic else lambda model, k: misfit(model)
    models, losses, states = by_hand(loss, optimizer, 12)
    trained, state, record = (
        train(noisy, line(), optimizer, 12, key=key, every=every)
        if stochastic
        else train(misfit, line(), optimizer, 12, every=every)
    )
    assert_same_leaves(trained, models[-1])
    assert trained.activation is jnp.tanh
    assert jax.tree.structure(state) == jax.tree.structure(states[-1])
    if jax.tree.leaves(state):  # plain gradient descent has none
        assert_same_leaves(state, states[-1])
    np.testing.assert_allclose(record.loss, losses, **same)
    assert record.observed is None
    assert record.steps_taken == 12


def test_each_step_draws_with_its_own_key():
    def loss(p, key):
        return p + jr.normal(key)  # a gradient of 1, so that p counts down

    trained, _, record = train(loss, jnp.array(0.0), count_down(), 20, key=jr.key(3), every=5)
    drawn = jnp.stack([jr.normal(jr.fold_in(jr.key(3), k)) for k in range(20)])
    np.testing.assert_allclose(record.loss, drawn - np.arange(20.0), rtol=0, atol=1e-14)
    assert trained == -20
    assert not jnp.isclose(train(loss, jnp.array(0.0), count_down(), 20, key=jr.key(4))[2].loss, record.loss).any()


@pytest.mark.parametrize("every", [1, 4, 12])
@pytest.mark.parametrize("stochastic", [False, True])
def test_what_the_loss_returns_beside_its_value_is_kept_at_each_step(every, stochastic):
    optimizer, key = optimizers["adam"], jr.key(5) if stochastic else None

    def loss(model, *keys):
        value = noisy(model, *keys) if keys else misfit(model)
        return value, {"both": jnp.stack([model.slope, model.offset]), "count": model.count, "nothing": None}

    trained, state, record = train(loss, line(), optimizer, 12, key=key, has_aux=True, every=every)
    models, losses, states = by_hand(
        lambda model, k: loss(model, *([] if key is None else [jr.fold_in(key, k)]))[0], optimizer, 12
    )
    assert_same_leaves((trained, state), (models[-1], states[-1]))
    np.testing.assert_allclose(record.loss, losses, **same)
    both = [[model.slope, model.offset] for model in models[:-1]]  # before each step
    np.testing.assert_allclose(record.auxiliary["both"], both, **same)
    np.testing.assert_array_equal(record.auxiliary["count"], np.full(12, 7))
    assert record.auxiliary["nothing"] is None


def test_without_has_aux_nothing_is_kept():
    assert train(misfit, line(), optimizers["sgd"], 12)[2].auxiliary is None


@LOOPS
def test_two_halves_with_the_state_carried_are_one_whole(optimizer):
    # Step numbers, and so keys, start again with each call: a loss without a key.
    whole, whole_state, record = train(misfit, line(), optimizer, 12)
    halfway, state, first = train(misfit, line(), optimizer, 6)
    end, end_state, second = train(misfit, halfway, optimizer, 6, optimizer_state=state)
    assert_same_leaves(end, whole)
    assert jax.tree.structure(end_state) == jax.tree.structure(whole_state)
    if jax.tree.leaves(whole_state):  # plain gradient descent has none
        assert_same_leaves(end_state, whole_state)
        afresh, _, _ = train(misfit, halfway, optimizer, 6)
        assert jnp.abs(afresh.slope - end.slope) > 1e-3
    np.testing.assert_allclose(np.concatenate([first.loss, second.loss]), record.loss, **same)


def test_going_on_compiles_nothing():
    traces = []

    def loss(p):
        traces.append(p)
        return jnp.sum(p**2)

    optimizer = optax.adam(0.1)
    p, state, _ = train(loss, jnp.ones(2), optimizer, 3)
    first = len(traces)
    train(loss, p, optimizer, 3, optimizer_state=state)
    assert len(traces) == first + 1  # the check of the loss's shape, which runs nothing


@pytest.mark.parametrize("function", [descend, train])
def test_the_warning_points_to_the_caller(function):
    with pytest.warns(RuntimeWarning, match=f"^{function.__name__} stopped at step 4 of 6") as caught:
        function(jnp.log, jnp.array(3.5), count_down(), 6)
    assert caught[0].filename == __file__


@LOOPS
@pytest.mark.parametrize("every", [1, 3, 12])
def test_train_observes_before_every_few_steps(optimizer, every):
    models, _, states = by_hand(lambda model, k: misfit(model), optimizer, 12)

    def observe(model, state, k):
        assert model.activation is jnp.tanh  # the whole model
        return {"at": k, "slope": model.slope, "count": model.count, "state": state}

    observed: Any = train(misfit, line(), optimizer, 12, observe=observe, every=every)[2].observed
    steps = range(0, 12, every)
    np.testing.assert_array_equal(observed["at"], steps)
    np.testing.assert_array_equal(observed["count"], np.full(len(steps), 7))
    np.testing.assert_allclose(observed["slope"], [models[k].slope for k in steps], **same)
    leaves = [jax.tree.leaves(states[k]) for k in steps]
    for got, want in zip(jax.tree.leaves(observed["state"]), zip(*leaves, strict=True), strict=True):
        np.testing.assert_allclose(got, np.stack(want), **same)


def test_descend_is_train_that_keeps_all_parameters():
    optimizer = optimizers["schedule"]
    trained, history = descend(misfit, line(), optimizer, 12)
    keep = lambda model, state, k: eqx.filter(model, eqx.is_inexact_array)  # noqa: E731
    other, _, record = train(misfit, line(), optimizer, 12, observe=keep)
    assert eqx.tree_equal(trained, other)
    assert eqx.tree_equal(history.parameters, record.observed)
    np.testing.assert_array_equal(history.loss, record.loss)


@pytest.mark.parametrize(("steps", "every"), [(4, 2), (6, 1), (6, 3), (50, 10)])
def test_train_stops_at_the_first_loss_that_is_not_finite(steps, every):
    start = jnp.array(3.5)  # log of 3.5, 2.5, 1.5, 0.5, and then of -0.5
    run = lambda: train(jnp.log, start, count_down(), steps, observe=lambda p, s, k: p, every=every)  # noqa: E731
    if steps == 4:
        trained, _, record = run()
    else:
        with pytest.warns(RuntimeWarning, match=f"^train stopped at step 4 of {steps}, where the loss .* nan"):
            trained, _, record = run()
    assert trained == -0.5
    assert record.steps_taken == 4
    np.testing.assert_array_equal(np.isfinite(record.loss), np.arange(steps) < 4)
    np.testing.assert_array_equal(record.observed, np.maximum(3.5 - np.arange(0, steps, every), -0.5))


def test_train_stops_at_the_first_gradient_that_is_not_finite_and_keeps_the_state():
    root = lambda p: jnp.sqrt(jnp.abs(p))  # noqa: E731
    optimizer = optax.chain(optax.scale_by_adam(), count_down())
    with pytest.warns(RuntimeWarning, match="^train stopped at step 2 of 6, where the gradient was not finite"):
        trained, state, record = train(root, jnp.array(2.0), optimizer, 6)
    assert trained == 0
    assert record.steps_taken == 2
    np.testing.assert_array_equal(record.loss, np.sqrt([2.0, 1.0, 0, 0, 0, 0]))
    assert state[0].count == 2  # two steps, not three
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_under_vmap_the_other_trainings_go_on():
    def loss(p, key):
        return jnp.log(p) + 0 * jr.normal(key)

    run = lambda p, key: train(loss, p, count_down(), 6, key=key, every=2, observe=lambda p, s, k: p)  # noqa: E731
    trained, _, record = jax.vmap(run)(jnp.array([3.5, 100.0, 1.5]), jr.split(jr.key(0), 3))
    np.testing.assert_array_equal(record.steps_taken, [4, 6, 2])
    np.testing.assert_array_equal(trained, [-0.5, 94.0, -0.5])
    np.testing.assert_array_equal(record.observed, [[3.5, 1.5, -0.5], [100, 98, 96], [1.5, -0.5, -0.5]])
    np.testing.assert_array_equal(np.isfinite(record.loss[1]), True)


def test_vmap_over_keys_agrees_with_one_by_one():
    keys = jr.split(jr.key(1), 3)
    run = lambda key: train(noisy, line(), optax.adam(0.03), 10, key=key)  # noqa: E731
    together = eqx.filter_vmap(run, out_axes=eqx.if_array(0))(keys)
    for i, key in enumerate(keys):
        alone = run(key)
        for got, want in zip(*(jax.tree.leaves(eqx.filter(r, eqx.is_array)) for r in (together, alone)), strict=True):
            np.testing.assert_allclose(got[i], want, **same)


def test_train_keeps_single_precision():
    start = jnp.ones(2, jnp.float32)
    trained, state, record = train(lambda p: jnp.sum(p**2), start, optax.adam(np.float64(0.1)), 5)
    assert trained.dtype == record.loss.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((state[0].mu, state[0].nu)))


# --- the bar ----------------------------------------------------------------------------------------------------------


def test_a_bar_shows_up_and_changes_no_number(capsys):
    arguments = (noisy, line(), optax.adam(0.03), 40)
    options = {"key": jr.key(0), "every": 10, "observe": lambda model, state, k: model.slope}
    plain = train(*arguments, **options)
    assert capsys.readouterr().err == ""
    shown = train(*arguments, **options, progress=True)
    bar = capsys.readouterr().err
    assert "40/40" in bar
    assert "step" in bar
    assert f"loss {float(shown[2].loss[-1]):.3g}" in bar
    for got, want in zip(*(jax.tree.leaves(eqx.filter(r, eqx.is_array)) for r in (shown, plain)), strict=True):
        # the callback may keep XLA from fusing as before: a rounding or two a step
        np.testing.assert_allclose(got, want, **same)


class Recorder:
    """In place of a bar: what it is told."""

    made: list["Recorder"]

    def __init__(self, total, unit):
        self.total, self.n, self.seen = total, 0, []
        self.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return False

    def set_postfix_str(self, text, refresh):
        self.seen.append(text)

    def update(self, by):
        self.n += by
        self.seen.append(self.n)


@pytest.fixture
def bars(monkeypatch):
    monkeypatch.setattr(training, "tqdm", type("Fresh", (Recorder,), {"made": []}))
    return training.tqdm.made  # pyright: ignore[reportAttributeAccessIssue]


def test_the_bar_moves_every_few_steps_and_shows_the_loss_of_the_last_one(bars):
    # p = 20, 19, ...: the loss of step k is 20 - k
    train(lambda p: p, jnp.array(20.0), count_down(), 12, every=4, progress=True)
    (bar,) = bars
    assert bar.total == 12
    assert bar.seen == ["loss 17", 4, "loss 13", 8, "loss 9", 12]
    assert not training._bars  # nothing is left behind


def test_a_second_training_with_a_bar_is_not_compiled_anew(bars):
    traces = []

    def loss(p):
        traces.append(p)
        return p**2

    optimizer = optax.sgd(0.1)
    counts = []
    for start in (1.0, 2.0, 3.0):
        train(loss, jnp.array(start), optimizer, 6, every=3, progress=True)
        counts.append(len(traces))
    assert len(bars) == 3
    assert [bar.n for bar in bars] == [6, 6, 6]  # each call finds its own
    # one trace a call checks the loss's shape and runs nothing
    assert np.diff(counts).tolist() == [1, 1]
    assert counts[0] > 1


def test_a_bar_goes_away_after_an_error_or_a_divergence(bars, monkeypatch):
    with pytest.warns(RuntimeWarning, match="stopped at step 4 of 6"):
        train(jnp.log, jnp.array(3.5), count_down(), 6, every=3, progress=True)
    assert bars[0].seen == ["loss 0.405", 3, "loss nan", 6]  # log 1.5; then stopped

    def broken(*arguments):
        assert training._bars
        raise RuntimeError("broken")

    monkeypatch.setattr(training, "_train", broken)
    with pytest.raises(RuntimeError, match="broken"):
        train(jnp.log, jnp.array(3.5), count_down(), 6, progress=True)
    assert not training._bars


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.0}, TypeError, "steps must be an integer, got 2.0"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"every": 1.0}, TypeError, "every must be an integer, got 1.0"),
        ({"every": 4}, ValueError, "every must divide steps = 6, got 4"),
        ({"every": 12}, ValueError, "every must divide steps = 6, got 12"),
        ({"optimizer": 0.1}, TypeError, "optimizer must have init and update, .* got 0.1"),
        ({"parameters": jnp.array(1j)}, TypeError, "parameters must be real .* got complex128"),
        ({"parameters": jnp.array(1)}, ValueError, "parameters must hold a floating-point array, got .*i64"),
        ({"parameters": jnp.array(jnp.nan)}, ValueError, "parameters must be finite, got nan"),
        ({"loss": lambda p: jnp.stack([p, p])}, ValueError, r"loss must return a scalar, got shape \(2,\)"),
        (
            {"loss": lambda p, key: jr.normal(key, (2,)) * p, "key": jr.key(0)},
            ValueError,
            r"loss must return a scalar, got shape \(2,\)",
        ),
        ({"loss": lambda p: jax.lax.complex(p, p)}, TypeError, "loss must return a real .* got complex128"),
        ({"has_aux": True}, ValueError, r"loss must return a pair, since has_aux is set, got .*(float64|f64)"),
        (
            {"loss": lambda p: (p, p, p), "has_aux": True},
            ValueError,
            r"(?s)loss must return a pair, since has_aux is set, got \(.*, .*, .*\)",
        ),
        ({"loss": lambda p: [p, p], "has_aux": True}, ValueError, "loss must return a pair, since has_aux is set"),
        (
            {"loss": lambda p: (jnp.stack([p, p]), p), "has_aux": True},
            ValueError,
            r"loss must return a scalar, got shape \(2,\)",
        ),
    ],
)
def test_train_refuses(arguments, error, message):
    fitting = {"loss": jnp.square, "parameters": jnp.array(1.0), "optimizer": optax.sgd(0.1), "steps": 6}
    with pytest.raises(error, match=message):
        train(**(fitting | arguments))
