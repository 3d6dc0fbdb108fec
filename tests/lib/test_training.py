"""Descent in one scan, against the same steps taken one by one and against closed forms."""

from collections.abc import Callable

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

from scanrnn.training import descend


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
