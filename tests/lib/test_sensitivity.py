"""Gradients and sensitivities, measured term by term, against automatic differentiation and closed forms."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from scanrnn.cells import VanillaCell
from scanrnn.lyapunov import long_term_jacobian
from scanrnn.recurrence import linear_recurrence, scan_cell
from scanrnn.sensitivity import (
    backpropagated_errors,
    coherence,
    estimate,
    gradient_terms,
    loss_along_gradient,
    mean_squares,
    parameter_sensitivity,
    squared_norm,
    state_derivative,
    unit_sensitivity,
)

T, D_IN, N = 12, 2, 4


class Scalar(eqx.Module):
    """h' = λ h + x."""

    decay: Array

    def __call__(self, input, state):
        return self.decay * state + input


class Rotation(eqx.Module):
    """h' = ν exp(iθ) h + x: a complex state, real parameters."""

    modulus: Array
    phase: Array

    def __call__(self, input, state):
        return self.modulus * jnp.exp(1j * self.phase) * state + input


def setting(kind) -> tuple[Any, Any, Array, Any]:
    """A cell, a state, inputs, and an error of the state's structure."""
    keys = jr.split(jr.key(0), 6)
    vector = lambda key: jr.normal(key, (N,))  # noqa: E731
    inputs = jr.normal(keys[0], (T, D_IN))
    if kind == "lstm":
        cell = eqx.nn.LSTMCell(D_IN, N, key=keys[1])
        return cell, (vector(keys[2]), vector(keys[3])), inputs, (vector(keys[4]), vector(keys[5]))
    if kind == "gru":
        return eqx.nn.GRUCell(D_IN, N, key=keys[1]), vector(keys[2]), inputs, vector(keys[4])
    cell = VanillaCell(D_IN, N, bias_init=jax.nn.initializers.normal(0.5), key=keys[1])
    return cell, vector(keys[2]), inputs, vector(keys[4])


KINDS = pytest.mark.parametrize("kind", ["vanilla", "gru", "lstm"])


def loss(cell, state, inputs, error):
    """<error, h_T>, whose error at T is `error`."""
    final, _ = scan_cell(cell, state, inputs)
    return ravel_pytree(final)[0] @ ravel_pytree(error)[0]


def assert_close(one, other, atol):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


# --- gradients --------------------------------------------------------------------------------------------------------

# Sums of T = 12 terms of order one in float64.
ROUNDING = 1e-13


@KINDS
def test_the_terms_sum_to_the_gradient(kind):
    cell, state, inputs, error = setting(kind)
    terms = eqx.filter_jit(gradient_terms)(cell, state, inputs, error)
    expected = eqx.filter_jit(eqx.filter_grad(loss))(cell, state, inputs, error)
    assert all(leaf.shape[0] == T for leaf in jax.tree.leaves(terms))
    sums = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), terms)
    assert_close(jax.tree.leaves(sums), jax.tree.leaves(expected), ROUNDING)
    assert squared_norm(sums) > 0.1  # not zero against zero


@KINDS
def test_each_term_is_what_the_parameters_of_that_step_contribute(kind):
    cell, state, inputs, error = setting(kind)
    terms = eqx.filter_jit(gradient_terms)(cell, state, inputs, error)
    parameters, rest = eqx.partition(cell, eqx.is_inexact_array)
    copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (T, *leaf.shape)), parameters)

    def unshared(copies):  # step t uses its own copy of the parameters
        step = lambda h, now: (eqx.combine(now[0], rest)(now[1], h), None)  # noqa: E731
        final, _ = jax.lax.scan(step, state, (copies, inputs))
        return ravel_pytree(final)[0] @ ravel_pytree(error)[0]

    expected = jax.jit(jax.grad(unshared))(copies)
    assert_close(jax.tree.leaves(terms), jax.tree.leaves(expected), ROUNDING)


@KINDS
def test_errors_are_the_tails_jacobians_applied_to_the_last_error(kind):
    cell, state, inputs, error = setting(kind)
    errors = eqx.filter_jit(backpropagated_errors)(cell, state, inputs, error)
    last = ravel_pytree(error)[0]
    _, states = scan_cell(cell, state, inputs)
    for t in (0, 5, T - 1):
        at_t = state if t == 0 else jax.tree.map(lambda leaf, t=t: leaf[t - 1], states)
        jacobian = eqx.filter_jit(long_term_jacobian)(cell, at_t, inputs[t:])
        row, _ = ravel_pytree(jax.tree.map(lambda leaf, t=t: leaf[t], errors))
        np.testing.assert_allclose(row, jacobian.T @ last, rtol=0, atol=ROUNDING)
    assert_close(jax.tree.map(lambda leaf: leaf[T], errors), error, 0)
    expected = jax.grad(lambda h: loss(cell, h, inputs, error))(state)
    assert_close(jax.tree.map(lambda leaf: leaf[0], errors), expected, ROUNDING)


def test_errors_of_a_complex_state_follow_jaxs_convention():
    cell = Rotation(jnp.array(0.9), jnp.array(0.7))
    inputs, start = jr.normal(jr.key(0), (T, 3)).astype(complex), jnp.array([1.0 + 2j, 0.5j, -1.0 + 0j])
    error = jnp.array([1.0 - 1j, 2.0 + 0j, 0.3j])
    errors = backpropagated_errors(cell, start, inputs, error)
    eigenvalue = 0.9 * np.exp(0.7j)
    powers = eigenvalue ** np.arange(T, -1, -1)
    np.testing.assert_allclose(errors, powers[:, None] * np.asarray(error), rtol=1e-12)
    # δ_T = ∂L/∂h_T in the sense of jax.grad, for L = Re Σ error h_T, makes every row such a gradient.
    gradient = jax.grad(lambda h: jnp.sum((error * scan_cell(cell, h, inputs)[0]).real))(start)
    np.testing.assert_allclose(errors[0], gradient, rtol=1e-12)


# --- sensitivity of the state to the parameters -----------------------------------------------------------------------


@KINDS
def test_sensitivity_equals_brute_force_differentiation(kind):
    cell, state, inputs, _ = setting(kind)
    parameters, rest = eqx.partition(cell, eqx.is_inexact_array)
    theta, unravel = ravel_pytree(parameters)

    def states(theta):
        later = scan_cell(eqx.combine(unravel(theta), rest), state, inputs)[1]
        return jnp.concatenate(jax.tree.leaves(later), axis=1)

    jacobian = jax.jit(jax.jacrev(states))(theta)
    measured = eqx.filter_jit(parameter_sensitivity)(cell, state, inputs)
    assert measured.shape == (T,)
    np.testing.assert_allclose(measured, jnp.sum(jacobian**2, axis=(1, 2)), rtol=1e-12)


def test_sensitivity_of_a_complex_state_counts_both_parts():
    cell = Rotation(jnp.array(0.9), jnp.array(0.7))
    inputs = jr.normal(jr.key(0), (T, 3)).astype(complex)

    def states(modulus, phase):
        return scan_cell(Rotation(modulus, phase), jnp.zeros(3, complex), inputs)[1]

    by_modulus, by_phase = jax.jacfwd(states, (0, 1))(cell.modulus, cell.phase)
    expected = jnp.sum(jnp.abs(by_modulus) ** 2 + jnp.abs(by_phase) ** 2, axis=1)
    np.testing.assert_allclose(parameter_sensitivity(cell, jnp.zeros(3, complex), inputs), expected, rtol=1e-12)


@pytest.mark.parametrize("decay", [0.5, 0.8])
def test_stationary_sensitivity_of_a_scalar_linear_recurrence(decay):
    # White inputs of unit variance: E (dh/dλ)² = (1 + λ²) / (1 - λ²)³ once λ^2t has died out, 0.8^200 = 4e-20.
    samples = 4000
    inputs = jr.normal(jr.key(1), (samples, 100, 1))
    measure = jax.jit(jax.vmap(lambda x: parameter_sensitivity(Scalar(jnp.array(decay)), jnp.zeros(1), x)[-1]))
    mean, standard_error = estimate(measure(inputs))
    expected = (1 + decay**2) / (1 - decay**2) ** 3
    assert abs(mean - expected) < 4 * standard_error
    assert standard_error < 0.05 * expected


def test_sensitivity_needs_memory_for_one_step_only():
    # 10⁴ parameters over 1000 steps: all steps at once would be 8 GB.
    cell = VanillaCell(1, 100, key=jr.key(0))
    measure = jax.jit(lambda state, inputs: parameter_sensitivity(cell, state, inputs))
    shapes = jax.ShapeDtypeStruct((100,), float), jax.ShapeDtypeStruct((1000, 1), float)
    memory = measure.lower(*shapes).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 1e9


# --- coherence --------------------------------------------------------------------------------------------------------


@KINDS
def test_coherence_is_the_sensitivity_and_the_sum_of_its_terms_squared_one_by_one(kind):
    cell, state, inputs, _ = setting(kind)
    measured = coherence(cell, state, inputs[:5])
    assert measured.total.shape == measured.incoherent.shape == (5,)
    np.testing.assert_array_equal(measured.total, parameter_sensitivity(cell, state, inputs[:5]))

    theta, unravel = ravel_pytree(eqx.filter(cell, eqx.is_inexact_array))
    start, restore = ravel_pytree(state)

    @jax.jit
    def step(theta, h, input):
        new = lambda theta, h: ravel_pytree(eqx.combine(unravel(theta), cell)(input, restore(h)))[0]  # noqa: E731
        return new(theta, h), *jax.jacobian(new, argnums=(0, 1))(theta, h)

    # With M_{t,τ} = D_t ... D_{τ+1}: for each t all the M_{t,τ} G_τ, dense, one for each τ <= t.
    h, products, totals, incoherent = start, [], [], []
    for input in inputs[:5]:
        h, direct, jacobian = (np.asarray(array) for array in step(theta, h, input))
        products = [*(jacobian @ product for product in products), direct]
        totals.append(np.sum(np.sum(products, axis=0) ** 2))
        incoherent.append(sum(np.sum(product**2) for product in products))
    np.testing.assert_allclose(measured.total, totals, rtol=1e-12)  # sums of five such terms
    np.testing.assert_allclose(measured.incoherent, incoherent, rtol=1e-12)
    # with one step there is one term, and later they do not happen to be orthogonal
    np.testing.assert_allclose(measured.total[0], measured.incoherent[0], rtol=1e-14)
    assert abs(measured.total[-1] / measured.incoherent[-1] - 1) > 1e-3


@KINDS
def test_total_is_the_derivative_of_the_states_with_respect_to_the_chosen_leaves(kind):
    cell, state, inputs, _ = setting(kind)
    name = "recurrent_weight" if kind == "vanilla" else "weight_hh"
    chosen = eqx.tree_at(lambda c: getattr(c, name), jax.tree.map(lambda _: False, cell), replace=True)
    weight = getattr(cell, name)

    @jax.jit
    @jax.jacfwd
    def derivative(weight):
        moved = eqx.tree_at(lambda c: getattr(c, name), cell, weight)
        return jnp.concatenate(jax.tree.leaves(scan_cell(moved, state, inputs)[1]), axis=1)

    want = jnp.sum(derivative(weight) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(coherence(cell, state, inputs, trainable=chosen).total, want, rtol=1e-12)
    by_function = coherence(cell, state, inputs, trainable=lambda leaf: leaf is weight)
    np.testing.assert_allclose(by_function.total, want, rtol=1e-12)
    assert parameter_sensitivity(cell, state, inputs)[-1] > 1.01 * want[-1]  # the others count too


def test_leaves_together_have_the_incoherent_sum_of_the_leaves_alone():
    cell, state, inputs, _ = setting("vanilla")
    parts = [
        coherence(cell, state, inputs, trainable=lambda leaf, part=part: leaf is part) for part in jax.tree.leaves(cell)
    ]
    whole = coherence(cell, state, inputs)
    np.testing.assert_allclose(whole.incoherent, sum(part.incoherent for part in parts), rtol=1e-12)
    np.testing.assert_allclose(whole.total, sum(part.total for part in parts), rtol=1e-12)


def test_the_recurrent_weight_enters_by_the_activity_before_it():
    # ∂x_τ/∂J_ij = δ_i φ(x_{τ-1})_j, so that ‖M G_τ‖² = ‖M‖² |φ(x_{τ-1})|².
    cell, state, inputs, _ = setting("vanilla")
    measured = coherence(cell, state, inputs, trainable=lambda leaf: leaf is cell.recurrent_weight)
    states = [state, *scan_cell(cell, state, inputs)[1]]
    J = np.asarray(cell.recurrent_weight)
    want = []
    for t in range(1, T + 1):
        product, total = np.eye(N), 0.0
        for tau in range(t, 0, -1):  # product is M_{t,τ}
            total += np.sum(product**2) * np.sum(np.tanh(states[tau - 1]) ** 2)
            product = product @ J @ np.diag(1 / np.cosh(states[tau - 1]) ** 2)
        want.append(total)
    np.testing.assert_allclose(measured.incoherent, want, rtol=1e-12)


@settings(max_examples=20, deadline=None)
@given(decay=st.floats(-0.95, 0.95), drive=st.floats(0.1, 3.0))
def test_coherence_of_a_scalar_linear_cell_at_its_fixed_point(decay, drive):
    # h stays at h* = x / (1 - λ), so that each G_τ is h*, and M_{t,τ} = λ^(t-τ):
    # total = h*² (Σ λ^k)² and incoherent = h*² Σ λ^2k.
    fixed_point = drive / (1 - decay)
    inputs = jnp.full((T, 1), drive)
    total, incoherent = coherence(Scalar(jnp.array(decay)), jnp.array([fixed_point]), inputs)
    t = np.arange(1, T + 1)
    sums = [(1 - ratio**t) / (1 - ratio) for ratio in (decay, decay**2)]
    # The fixed point is held to ε / (1 - λ), relative, and the closed form loses ε / (1 - λ) as well: 20 ε each.
    np.testing.assert_allclose(total, (fixed_point * sums[0]) ** 2, rtol=1e-12)
    np.testing.assert_allclose(incoherent, fixed_point**2 * sums[1], rtol=1e-12)
    np.testing.assert_allclose(total / incoherent, sums[0] ** 2 / sums[1], rtol=1e-12)
    assert total[0] == incoherent[0]  # with one step
    if abs(decay) > 0.01:
        assert (total[-1] > incoherent[-1]) == (decay > 0)  # a slow mode adds up, an alternating one cancels


def test_coherence_of_a_complex_state_counts_both_parts():
    # dh/dν = exp(iθ) h and dh/dθ = i ν exp(iθ) h add up with the powers of the eigenvalue, which only turn and shrink.
    cell = Rotation(jnp.array(0.9), jnp.array(0.7))
    inputs = jr.normal(jr.key(0), (T, 3)).astype(complex)
    states = np.array([np.zeros(3), *scan_cell(cell, jnp.zeros(3, complex), inputs)[1]])
    direct = (1 + 0.9**2) * np.sum(np.abs(states[:-1]) ** 2, axis=1)
    want = [sum(0.9 ** (2 * (t - tau)) * direct[tau] for tau in range(t + 1)) for t in range(T)]
    measured = coherence(cell, jnp.zeros(3, complex), inputs)
    np.testing.assert_allclose(measured.incoherent, want, rtol=1e-12)
    np.testing.assert_allclose(measured.total, parameter_sensitivity(cell, jnp.zeros(3, complex), inputs), rtol=1e-14)


def test_coherence_refuses_what_it_cannot_differentiate():
    cell = Rotation(jnp.array(0.9 + 0.1j), jnp.array(0.7))
    state, inputs = jnp.ones(3, complex), jnp.ones((4, 3), complex)
    with pytest.raises(ValueError, match="cell must have a floating-point array among its trainable leaves, got none"):
        coherence(cell, state, inputs, trainable=lambda leaf: False)
    with pytest.raises(ValueError, match="cell must have a floating-point array among its trainable leaves, got none"):
        coherence(lambda input, state: 0.5 * state, jnp.ones(3), jnp.ones((4, 3)))
    with pytest.raises(TypeError, match=r"cell must have real parameters .* got complex arrays"):
        coherence(cell, state, inputs)


# --- one parameter for each unit --------------------------------------------------------------------------------------


def two_parameters(kind):
    """States of shape (T, N) as a function of one real number for each unit."""
    inputs = jr.normal(jr.key(0), (T, N))
    if kind == "real":
        return lambda omega: linear_recurrence(jnp.tanh(omega), inputs)
    if kind == "complex":
        return lambda omega: linear_recurrence(jnp.exp(jax.lax.complex(-jnp.exp(omega), omega)), inputs)
    mixing = jr.normal(jr.key(1), (N, N)) / 4  # units that read each other's states
    cell = lambda input, state: jnp.tanh(mixing @ state + input)  # noqa: E731
    return lambda omega: scan_cell(cell, jnp.zeros(N), omega[None] * inputs)[1]


@pytest.mark.parametrize("kind", ["real", "complex", "coupled"])
def test_unit_sensitivity_sums_the_rows_of_the_whole_jacobian(kind):
    states, omega = two_parameters(kind), jnp.array([-1.0, 0.1, 0.5, 0.9])
    h, derivative = unit_sensitivity(states, omega)
    jacobian = jax.jacfwd(states)(omega)  # (T, N, N)
    np.testing.assert_array_equal(h, states(omega))
    np.testing.assert_allclose(derivative, jnp.sum(jacobian, axis=2), rtol=0, atol=ROUNDING)
    own = jnp.diagonal(jacobian, axis1=1, axis2=2)
    if kind == "coupled":
        assert jnp.max(jnp.abs(derivative - own)) > 0.1
    else:
        np.testing.assert_allclose(derivative, own, rtol=0, atol=ROUNDING)


def test_stationary_unit_sensitivity_of_many_time_scales_at_once():
    lam = jnp.array([0.3, 0.6, 0.8])  # 0.8^200 = 4e-20
    inputs = jr.normal(jr.key(1), (4000, 100, 3))
    measure = jax.jit(jax.vmap(lambda x: unit_sensitivity(lambda lam: linear_recurrence(lam, x), lam)[1][-1] ** 2))
    mean, standard_error = estimate(measure(inputs))
    expected = (1 + lam**2) / (1 - lam**2) ** 3
    assert jnp.all(jnp.abs(mean - expected) < 4 * standard_error)
    assert jnp.all(standard_error < 0.05 * expected)


def test_unit_sensitivity_refuses_what_has_no_own_parameter():
    states, omega = two_parameters("real"), jnp.zeros(N)
    with pytest.raises(ValueError, match=r"parameter must have 1 axes, got shape \(2, 4\)"):
        unit_sensitivity(states, jnp.zeros((2, N)))
    with pytest.raises(TypeError, match=r"parameter must be floating point .* got int64"):
        unit_sensitivity(states, jnp.zeros(N, int))
    with pytest.raises(TypeError, match="parameter must be real, got complex128"):
        unit_sensitivity(states, jnp.zeros(N, complex))
    for wrong in (lambda omega: omega, lambda omega: states(omega)[:, :2], lambda omega: states(omega)[None]):
        with pytest.raises(ValueError, match=r"states must return the shape \(T, N\) with N = 4, got \("):
            unit_sensitivity(wrong, omega)
    with pytest.raises(TypeError, match=r"what states returns must be floating point .* got int64"):
        unit_sensitivity(lambda omega: states(omega).astype(int), omega)
    with pytest.raises(TypeError, match="states must return one array, got tuple"):
        unit_sensitivity(lambda omega: (states(omega), states(omega)), omega)  # pyright: ignore[reportArgumentType]


# --- statistics -------------------------------------------------------------------------------------------------------


def test_estimate():
    samples = jnp.array([[1.0, 4.0], [2.0, 4.0], [6.0, 4.0]])
    mean, standard_error = estimate(samples)
    np.testing.assert_allclose(mean, [3.0, 4.0])
    np.testing.assert_allclose(standard_error, [np.sqrt(7.0 / 3), 0.0], atol=1e-15)  # variance (4 + 1 + 9) / 2 = 7
    for one in (estimate(jnp.array([1.0, 3.0])), estimate(jnp.array([1, 3]))):
        assert one.mean == 2.0
        np.testing.assert_allclose(one.standard_error, 1.0)  # sd √2, over √2
    single = estimate(jnp.array([1.0, 3.0], jnp.float32))
    assert single.mean.dtype == single.standard_error.dtype == jnp.float32


def test_two_standard_errors_cover_the_mean_as_often_as_they_promise():
    mean, standard_error = estimate(jr.normal(jr.key(0), (100, 2000)))
    covered = jnp.mean(jnp.abs(mean) < 2 * standard_error)
    # Student's t with 99 degrees of freedom: 95.2 %, with a binomial standard error of 0.48 %.
    assert abs(covered - 0.952) < 4 * 0.0048


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_divergence_is_never_dropped(bad):
    mean, standard_error = estimate(jnp.array([1.0, bad, 2.0]))
    assert not jnp.isfinite(mean)
    assert not jnp.isfinite(standard_error)


@pytest.mark.parametrize("samples", [jnp.ones(1), jnp.ones(()), jnp.ones((0, 3)), jnp.ones((1, 5))])
def test_too_few_samples_are_refused(samples):
    with pytest.raises(ValueError, match="samples must have a leading axis of at least 2, got shape"):
        estimate(samples)


def test_squared_norm():
    tree = {"a": jnp.array([[3.0, 4.0], [0.0, 1.0]]), "b": (jnp.array([1.0, 2.0]), None, "label", jnp.arange(2))}
    np.testing.assert_allclose(squared_norm(tree), 25 + 1 + 5)
    np.testing.assert_allclose(squared_norm(tree, keep_axes=1), [25 + 1, 1 + 4])
    np.testing.assert_allclose(squared_norm(jnp.array([3.0 + 4.0j])), 25.0)
    assert squared_norm(jnp.ones((2, 3, 4)), keep_axes=2).shape == (2, 3)
    with pytest.raises(ValueError, match=r"at least keep_axes = 2 axes, got shapes \[\(2, 2\), \(2,\)\]"):
        squared_norm(tree, keep_axes=2)
    with pytest.raises(ValueError, match=r"tree must hold floating-point arrays .* got shapes \[\]"):
        squared_norm({"a": jnp.arange(3)})
    with pytest.raises(ValueError, match="keep_axes must be at least 0, got -1"):
        squared_norm(tree, keep_axes=-1)


def test_mean_squares():
    tree = {
        "a": jnp.array([[3.0, 4.0], [0.0, 1.0]]),
        "b": (jnp.array([1.0, 2.0]), None, "label", jnp.arange(2), jnp.array([3.0 + 4.0j])),
    }
    names = []

    def group(name):
        names.append(name)
        return "all but one" if name != "['b'][0]" else "one"

    got = mean_squares(tree, group)
    assert names == ["['a']", "['b'][0]", "['b'][4]"]
    assert {name: found.size for name, found in got.items()} == {"all but one": 5, "one": 2}
    # weighted by entries, not by arrays
    np.testing.assert_allclose(got["all but one"].mean_square, (9 + 16 + 1 + 25) / 5, rtol=1e-15)
    np.testing.assert_allclose(got["one"].mean_square, (1 + 4) / 2, rtol=1e-15)
    cell = VanillaCell(D_IN, N, key=jr.key(0))
    inside = mean_squares({"cell": cell}, lambda name: name)
    assert sum(found.size for found in inside.values()) == sum(map(np.size, jax.tree.leaves(cell)))
    assert set(mean_squares(cell, lambda name: name)) == {name.removeprefix("['cell'].") for name in inside}


def test_mean_squares_refuses_what_is_not_finite_by_name():
    tree = {"a": jnp.ones(3), "b": [jnp.ones(2), jnp.array([[1.0, jnp.inf]])]}
    with pytest.raises(ValueError, match=r"the array \['b'\]\[1\] must be finite, got inf at index \(0, 1\)"):
        mean_squares(tree, lambda name: "all")
    traced = jax.jit(lambda tree: mean_squares(tree, lambda name: name[2]))(tree)
    assert np.isfinite(traced["a"].mean_square)
    assert not np.isfinite(traced["b"].mean_square)
    for empty in ({}, {"a": jnp.arange(3), "b": None}):
        with pytest.raises(ValueError, match="tree must hold a floating-point array, got"):
            mean_squares(empty, lambda name: "all")


# --- bad input --------------------------------------------------------------------------------------------------------


def call(function, cell=None, state=None, inputs=None, error=None):
    cell = Scalar(jnp.array(0.5)) if cell is None else cell
    state = jnp.ones(3) if state is None else state
    inputs = jnp.ones((4, 3)) if inputs is None else inputs
    error = jnp.ones(3) if error is None else error
    without_error = function in (parameter_sensitivity, coherence)
    return function(cell, state, inputs) if without_error else function(cell, state, inputs, error)


@pytest.mark.parametrize("function", [backpropagated_errors, gradient_terms, parameter_sensitivity, coherence])
def test_bad_arguments_are_refused_by_name(function):
    with pytest.raises(ValueError, match="inputs must have at least one time step"):
        call(function, inputs=jnp.ones((0, 3)))
    with pytest.raises(ValueError, match=r"inputs must be finite, got nan at index \(2, 1\)"):
        call(function, inputs=jnp.ones((4, 3)).at[2, 1].set(jnp.nan))
    with pytest.raises(ValueError, match=r"state must be finite, got inf at index \(0,\)"):
        call(function, state=jnp.array([jnp.inf, 0.0, 0.0]))
    with pytest.raises(TypeError, match=r"state must be floating point \(real or complex\), got int"):
        call(function, state=jnp.ones(3, int))
    with pytest.raises(ValueError, match="cell must return a state like the one it received"):
        call(function, cell=lambda input, state: jnp.ones(4))


@pytest.mark.parametrize("function", [backpropagated_errors, gradient_terms])
def test_an_error_unlike_the_state_is_refused(function):
    with pytest.raises(ValueError, match=r"error must be like the state, \('float64', \(3,\)\), got .*\(4,\)"):
        call(function, error=jnp.ones(4))
    with pytest.raises(ValueError, match=r"error must be like the state, .* got \('float32', \(3,\)\)"):
        call(function, error=jnp.ones(3, jnp.float32))
    with pytest.raises(ValueError, match="error must be like the state"):
        call(function, error=(jnp.ones(3), jnp.ones(3)))
    with pytest.raises(ValueError, match=r"error must be finite, got nan at index \(1,\)"):
        call(function, error=jnp.array([0.0, jnp.nan, 0.0]))


def test_complex_parameters_are_refused():
    with pytest.raises(TypeError, match=r"cell must have real parameters .* got complex arrays"):
        parameter_sensitivity(Scalar(jnp.array(0.5 + 0.1j)), jnp.ones(3, complex), jnp.ones((4, 3), complex))


@pytest.mark.parametrize("function", [backpropagated_errors, gradient_terms, parameter_sensitivity, coherence])
def test_traced_nan_gives_nan(function):
    class Square(Scalar):
        def __call__(self, input, state):
            return self.decay * (state + input) ** 2

    cell = Square(jnp.array(0.1))
    bad = jnp.ones((4, 3)).at[1, 0].set(jnp.nan)
    result = jax.jit(lambda inputs: call(function, cell=cell, inputs=inputs))(bad)
    assert any(jnp.isnan(leaf).any() for leaf in jax.tree.leaves(result))


def test_numpy_arguments_are_welcome():
    cell, state, inputs, error = setting("vanilla")
    expected = backpropagated_errors(cell, state, inputs, error)
    measured = backpropagated_errors(cell, np.asarray(state), np.asarray(inputs), np.asarray(error))
    np.testing.assert_allclose(measured, expected, rtol=0, atol=ROUNDING)


def test_loss_along_the_gradient_of_a_parabola():
    theta, lengths = jnp.array([3.0, 4.0]), jnp.array([0.0, 1.0, 5.0, 9.0])
    before, after, norm = loss_along_gradient(lambda x: 0.5 * jnp.sum(x**2), theta, lengths)
    np.testing.assert_allclose([before, norm], [12.5, 5.0], rtol=1e-15)
    np.testing.assert_allclose(after, 0.5 * (5.0 - lengths) ** 2, rtol=0, atol=1e-14)


def test_loss_along_the_gradient_refuses_bad_lengths():
    with pytest.raises(ValueError, match=r"lengths must have 1 axes, got shape \(\)"):
        loss_along_gradient(jnp.sum, jnp.ones(2), jnp.asarray(1.0))
    with pytest.raises(ValueError, match=r"lengths must be finite, got nan at index \(1,\)"):
        loss_along_gradient(jnp.sum, jnp.ones(2), jnp.array([1.0, jnp.nan]))


@KINDS
def test_the_derivative_along_a_direction_is_a_difference_quotient(kind):
    cell, state, inputs, _ = setting(kind)
    parameters, unravel = ravel_pytree(eqx.filter(cell, eqx.is_inexact_array))
    direction = unravel(jr.normal(jr.key(9), parameters.shape))
    states, derivatives = state_derivative(cell, direction, state, inputs)
    assert_close(states, scan_cell(cell, state, inputs)[1], 1e-14)
    step = 1e-5
    moved = [scan_cell(eqx.apply_updates(cell, jax.tree.map(lambda v, s=s: s * step * v, direction)), state, inputs)[1]
             for s in (1, -1)]  # fmt: skip
    quotient = jax.tree.map(lambda above, below: (above - below) / (2 * step), *moved)
    assert_close(derivatives, quotient, 1e-6)  # step² times a third derivative, and rounding over the step: 1e-11


def test_the_squared_derivatives_along_a_basis_sum_to_the_sensitivity():
    cell, state, inputs, _ = setting("vanilla")
    parameters, unravel = ravel_pytree(eqx.filter(cell, eqx.is_inexact_array))
    along = lambda v: state_derivative(cell, unravel(v), state, inputs)[1]  # noqa: E731
    total = jnp.sum(jax.vmap(along)(jnp.eye(parameters.size)) ** 2, axis=(0, 2))
    np.testing.assert_allclose(total, parameter_sensitivity(cell, state, inputs), rtol=1e-12)


def test_a_direction_unlike_the_cell_is_refused():
    cell, state, inputs, _ = setting("vanilla")
    with pytest.raises(ValueError, match="direction must be like the cell, with arrays of shapes"):
        state_derivative(cell, eqx.tree_at(lambda c: c.bias, cell, jnp.zeros(N + 1)), state, inputs)
