"""Damped Gauss-Newton steps against linear algebra, against the same steps in NumPy, and against rotated parameters."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from scanrnn import realizations
from scanrnn.layers import LinearRNN
from scanrnn.training import levenberg_marquardt

EPS = np.finfo(float).eps


# --- linear problems --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(4, 9), (5, 5), (12, 4)])
def test_solves_linear_least_squares(rows, columns):
    matrix, target = jr.normal(jr.key(0), (rows, columns)), jr.normal(jr.key(1), (rows,))
    start = jr.normal(jr.key(2), (columns,))
    solved, record = levenberg_marquardt(lambda p: matrix @ p - target, start, 60)
    # Steps are combinations of the rows: of all solutions it finds the one nearest to the start.
    expected = start + np.linalg.pinv(matrix) @ (target - matrix @ start)
    np.testing.assert_allclose(solved, expected, rtol=0, atol=1e-9)
    least = 0.5 * np.sum((matrix @ expected - target) ** 2)
    assert record.loss[-1] <= least * (1 + 1e-9) + 1e-25
    assert record.loss.shape == record.observed.shape == (60,)
    assert record.steps_taken == 60


def test_without_damping_one_step_is_enough():
    matrix, target = jr.normal(jr.key(0), (3, 6)), jr.normal(jr.key(1), (3,))
    solved, record = levenberg_marquardt(lambda p: matrix @ p - target, jnp.zeros(6), 1, damping=1e-12)
    np.testing.assert_allclose(matrix @ solved, target, atol=1e-9)
    np.testing.assert_allclose(record.loss, [0.5 * np.sum(target**2)], rtol=8 * EPS)


# --- nonlinear problems -----------------------------------------------------------------------------------------------


def curved(p):
    """Rosenbrock's valley, with two more residuals and a parameter of another shape."""
    x, y = p["x"], p["y"][0, 0]
    return jnp.stack([10 * (y - x**2), 1 - x, 0.3 * jnp.sin(3 * y + x), 0.1 * x * y])


def valley(x=-1.2, y=1.0):
    return {"x": jnp.array(x), "y": jnp.array([[y]]), "count": jnp.array(3)}


def by_hand(flat, steps, damping):
    """The usual form, (JᵀJ + μI)⁻¹Jᵀr, which is the same step."""

    def residuals(flat):
        return curved({"x": flat[0], "y": flat[1].reshape(1, 1)})

    jacobian_of, residuals = jax.jit(jax.jacfwd(residuals)), jax.jit(residuals)
    p, mu, losses, dampings = np.array(flat), None, [], []
    for _ in range(steps):
        r, jacobian = np.asarray(residuals(p)), np.asarray(jacobian_of(p))
        if mu is None:
            mu = damping * np.max(np.sum(jacobian**2, axis=1))
        losses.append(0.5 * r @ r)
        dampings.append(mu)
        trial = p - np.linalg.solve(jacobian.T @ jacobian + mu * np.eye(2), jacobian.T @ r)
        after = np.asarray(residuals(trial))
        if after @ after < r @ r:
            p, mu = trial, mu / 3
        else:
            mu = 4 * mu
    return p, np.array(losses), np.array(dampings)


@pytest.mark.parametrize("damping", [1e-6, 1e-3, 1.0])
def test_takes_the_steps_of_the_usual_form(damping):
    end, record = levenberg_marquardt(curved, valley(), 15, damping=damping)
    p, losses, dampings = by_hand([-1.2, 1.0], 15, damping)
    # 15 steps; each solves a system whose condition number is at most max JJᵀ/μ, 10⁸ at the end of 15 thirds
    np.testing.assert_allclose(record.loss, losses, rtol=1e-6)
    np.testing.assert_allclose([end["x"], end["y"][0, 0]], p, rtol=1e-6)
    np.testing.assert_allclose(record.observed, dampings, rtol=1e-12)
    assert end["count"] == 3
    assert end["y"].shape == (1, 1)


def test_the_damping_falls_after_success_and_grows_after_failure():
    # so little of it that the first trial, down the valley's wall, overshoots
    _, record = levenberg_marquardt(curved, valley(), 40, damping=1e-9)
    ratios, fell = record.observed[1:] / record.observed[:-1], np.diff(record.loss) < 0
    np.testing.assert_allclose(ratios, np.where(fell, 1 / 3, 4.0), rtol=4 * EPS)
    assert 0 < fell.sum() < len(fell)  # both occur
    gradient = jax.jacobian(lambda x, y: curved({"x": x, "y": y.reshape(1, 1)}), argnums=(0, 1))(
        jnp.array(-1.2), jnp.array(1.0)
    )
    np.testing.assert_allclose(record.observed[0], 1e-9 * np.max(gradient[0] ** 2 + gradient[1] ** 2), rtol=16 * EPS)


def test_goes_down_and_never_up():
    target = LinearRNN(1, 3, 1, min_modulus=0.5, max_modulus=0.9, key=jr.key(0)).impulse_response(25)
    start = LinearRNN(1, 3, 1, min_modulus=0.5, max_modulus=0.9, key=jr.key(1))
    _, record = levenberg_marquardt(lambda s: s.impulse_response(25) - target, start, 80)
    assert np.all(np.diff(record.loss) <= 0)
    assert record.loss[-1] < 1e-20 * record.loss[0]  # a teacher of the student's kind: nothing is left


def test_rotated_parameters_take_the_same_path():
    target = LinearRNN(1, 4, 1, min_modulus=0.5, key=jr.key(0)).impulse_response(20)
    start = LinearRNN(1, 4, 1, min_modulus=0.5, key=jr.key(1))

    def path(student, steps):
        trained, record = levenberg_marquardt(lambda s: s.impulse_response(20) - target, student, steps)
        return np.asarray(trained.impulse_response(20)), np.asarray(record.loss)

    other = realizations.rotated(start, jr.key(2))
    sheared = realizations.change_basis(start, jnp.diag(jnp.array([1.0, 2.0, 4.0, 8.0])))
    for steps in (1, 6):
        kernel, losses = path(start, steps)
        turned, turned_losses = path(other, steps)
        np.testing.assert_allclose(turned, kernel, rtol=0, atol=1e-8 * np.abs(kernel).max())
        np.testing.assert_allclose(turned_losses, losses, rtol=1e-8)
    # in other coordinates the damping means something else
    assert np.abs(path(sheared, 6)[0] - kernel).max() > 1e-4 * np.abs(kernel).max()


def test_stays_where_a_trial_is_not_finite_until_the_step_is_short_enough():
    # r = log p from p = 20: the undamped step leads to 20 - 20 log 20 < 0, where there is no logarithm
    end, record = levenberg_marquardt(lambda p: jnp.log(p)[None], jnp.array(20.0), 60, damping=1e-6)
    stayed = np.asarray(record.loss) == record.loss[0]
    assert 3 < stayed.sum() < 30
    assert np.all(np.isfinite(record.loss))
    np.testing.assert_allclose(record.observed[1:][stayed[1:]] / record.observed[:-1][stayed[1:]], 4.0, rtol=4 * EPS)
    np.testing.assert_allclose(end, 1.0, rtol=1e-9)
    # where no step helps, all stays as it was
    stuck, record = levenberg_marquardt(lambda p: (1 + 0 * p)[None], jnp.array(2.0), 5)
    assert stuck == 2.0
    np.testing.assert_array_equal(record.loss, 0.5)


def test_the_damping_recovers_from_underflow():
    # Twice the same residual: JJᵀ is singular, and its factor does not exist without damping. The smallest number times
    # JJᵀ's diagonal, below 1, is 0 at first; from 2e-308 it takes 500 steps of a factor 4 to be felt.
    def twice(p):
        return jnp.stack([0.5 * p - 1, 0.5 * p - 1])

    end, record = levenberg_marquardt(twice, jnp.array(0.0), 700, damping=5e-324)
    assert np.all(record.observed > 0)
    np.testing.assert_allclose(end, 2.0, rtol=1e-6)


# --- transformations and arguments ------------------------------------------------------------------------------------


def test_vmap_over_starts_agrees_with_one_by_one():
    starts = jnp.array([[-1.2, 1.0], [0.5, 2.0], [3.0, -1.0]])

    def start(x, y):
        return {"x": x, "y": y.reshape(1, 1)}

    run = lambda x, y: levenberg_marquardt(curved, start(x, y), 8)  # noqa: E731
    together, records = jax.vmap(run)(starts[:, 0], starts[:, 1])
    for i, (x, y) in enumerate(starts):
        alone, record = run(x, y)
        np.testing.assert_allclose(together["x"][i], alone["x"], rtol=1e-8)
        np.testing.assert_allclose(records.loss[i], record.loss, rtol=1e-8, atol=1e-20)
    np.testing.assert_array_equal(records.steps_taken, np.full(3, 8))


def test_residuals_of_any_shape_and_modules_with_other_leaves():
    class Line(eqx.Module):
        slope: Any
        activation: Any

        def __call__(self, x):
            return self.activation(self.slope * x)

    def misfit(line):
        x = jnp.linspace(-1.0, 1.0, 6)
        return (line(x) - jnp.tanh(2 * x)).reshape(2, 3)

    end, _ = levenberg_marquardt(misfit, Line(jnp.array(0.3), jnp.tanh), 20)
    np.testing.assert_allclose(end.slope, 2.0, rtol=1e-9)
    assert end.activation is jnp.tanh


def test_single_precision_is_kept():
    end, record = levenberg_marquardt(lambda p: p - 2, jnp.ones(3, jnp.float32), 12)
    assert end.dtype == record.loss.dtype == record.observed.dtype == jnp.float32
    np.testing.assert_allclose(end, 2.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.0}, TypeError, r"steps must be an integer, got 2\.0"),
        ({"damping": 0.0}, ValueError, r"damping must be positive and finite, got 0\.0"),
        ({"damping": -1.0}, ValueError, "damping must be positive and finite, got -1"),
        ({"damping": np.inf}, ValueError, "damping must be positive and finite, got inf"),
        ({"parameters": jnp.array([1j])}, TypeError, "parameters must be real .* got complex128"),
        ({"parameters": jnp.array([1])}, ValueError, "parameters must hold a floating-point array, got .*i64"),
        ({"parameters": jnp.array([jnp.nan])}, ValueError, "parameters must be finite, got nan"),
        ({"residuals": lambda p: jax.lax.complex(p, p)}, TypeError, "residuals must return real .* got complex128"),
        ({"residuals": lambda p: jnp.sign(p).astype(int)}, TypeError, "residuals must return real .* got int64"),
    ],
)
def test_refuses(arguments, error, message):
    fitting: Any = {"residuals": jnp.sin, "parameters": jnp.array([1.0]), "steps": 3}
    with pytest.raises(error, match=message):
        partial(levenberg_marquardt, **(fitting | arguments))()
