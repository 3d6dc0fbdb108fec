"""Hessians against JAX's own, concentration against exact arithmetic, rates against Adam written out by hand."""

import math
from fractions import Fraction
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
from jax.flatten_util import ravel_pytree
from scipy.special import ndtr

from scanrnn.curvature import (
    concentration,
    coordinates_for,
    effective_learning_rate,
    gauss_newton,
    groups,
    hessian,
    released_effective_learning_rate,
    residual_jacobian,
    top_eigenvalue,
)
from scanrnn.eigenvalues import Exponential, LearnedNormalizer, ring
from scanrnn.layers import S5, DiagonalRNN, LinearRNN
from scanrnn.theory import population_loss

EPS = np.finfo(float).eps
T = 12


def make(name, key) -> Any:
    if name == "linear":
        return LinearRNN(1, 3, 1, key=key)
    if name == "s5":
        return S5(1, 3, 1, key=key)
    lam = ring(jr.key(5), 3, min_modulus=0.5, max_modulus=0.9)
    return DiagonalRNN(
        1,
        3,
        1,
        eigenvalues=Exponential.from_eigenvalues(lam),
        normalization=LearnedNormalizer.from_eigenvalues(lam),
        key=key,
    )


LAYERS = pytest.mark.parametrize("name", ["linear", "diagonal", "s5"])


def flattened(function, parameters):
    """The same function of one flat vector, and the vector."""
    trained, rest = eqx.partition(parameters, eqx.is_inexact_array)
    flat, unravel = ravel_pytree(trained)
    return (lambda p: function(eqx.combine(unravel(p), rest))), flat


def assert_close(got, wanted, tolerance):
    """Beside the largest entry: the others are differences of terms of its size."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def knot(p):
    """A loss with all kinds of second derivatives, and an array that is not trained."""
    x, y = p["x"], p["y"]
    return jnp.sum(x**3) * jnp.sin(y[0, 0]) + jnp.exp(x[0] * y[1, 1]) + p["count"].astype(x.dtype) * x[1] ** 2


KNOT = {"x": jnp.array([0.5, -0.3, 0.8]), "y": jnp.array([[0.2, 0.7], [1.1, -0.4]]), "count": jnp.array(3)}


# --- Hessians ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_the_hessian_is_that_of_jax_for_every_batch(batch):
    loss, flat = flattened(knot, KNOT)
    got = hessian(knot, KNOT, batch=batch)
    assert got.shape == (7, 7)
    assert_close(got, jax.hessian(loss)(flat), 64 * EPS)  # some ten operations, differentiated in another order
    assert got[0, 0] != 0
    # in closed form: ∂²/∂y₁₁² of exp(x₀ y₁₁)
    np.testing.assert_allclose(got[6, 6], 0.5**2 * np.exp(0.5 * -0.4), rtol=16 * EPS)


@LAYERS
def test_the_hessian_of_the_population_loss_is_that_of_jax(name):
    student, teacher = make(name, jr.key(0)), make(name, jr.key(1)).impulse_response(T)
    loss = lambda s: population_loss(s.impulse_response(T), teacher)  # noqa: E731
    flat_loss, flat = flattened(loss, student)
    expected = jax.jit(jax.hessian(flat_loss))(flat)
    # 12 powers of eigenvalues of at most 1, differentiated twice: some 1000 roundings of terms of the largest's size
    for batch in (5, 32):
        assert_close(hessian(loss, student, batch=batch), expected, 1e-10)


@LAYERS
def test_gauss_newton_is_the_hessian_where_nothing_is_left_and_only_there(name):
    teacher, other = make(name, jr.key(0)), make(name, jr.key(1))
    weights = jnp.sqrt(1 - jnp.arange(T) / T)

    def residuals(target, s):
        return weights[:, None, None] * (s.impulse_response(T) - target)

    for target, same in ((teacher.impulse_response(T), True), (other.impulse_response(T), False)):
        rest = partial(residuals, target)
        exact = hessian(lambda s, target=target: population_loss(s.impulse_response(T), target), teacher)
        approximate = gauss_newton(rest, teacher)
        gap = np.abs(exact - approximate).max() / np.abs(exact).max()
        assert gap < 1e-10 if same else gap > 1e-3


@pytest.mark.parametrize("rows", [2, 40])
def test_the_jacobian_wide_and_tall(rows):
    def residuals(p):
        return jnp.sin(jnp.arange(2.0 * rows).reshape(rows, 2) * p["x"][0]) * p["y"][0, 0] + jnp.sum(p["x"][1:] ** 2)

    flat_residuals, flat = flattened(residuals, KNOT)
    got = residual_jacobian(residuals, KNOT)
    assert got.shape == (2 * rows, 7)
    expected = jax.jacobian(flat_residuals)(flat).reshape(2 * rows, 7)
    assert_close(got, expected, 16 * EPS)
    assert_close(gauss_newton(residuals, KNOT), expected.T @ expected, 16 * EPS * 2 * rows)


@LAYERS
def test_groups_cover_all_coordinates_in_the_order_of_the_hessian(name):
    layer = make(name, jr.key(0))
    flat, _ = ravel_pytree(eqx.filter(layer, eqx.is_inexact_array))
    named = groups(layer)
    covered = np.concatenate([np.arange(flat.size)[where] for where in named.values()])
    np.testing.assert_array_equal(covered, np.arange(flat.size))
    for path, where in named.items():
        array = layer
        for part in path.split("."):
            array = getattr(array, part)
        np.testing.assert_array_equal(flat[where], np.ravel(array))
    expected = {
        "linear": ["recurrent", "input_weight", "output_weight", "feedthrough"],
        "diagonal": ["parametrization.omega_nu", "parametrization.omega_theta", "normalization.omega_gamma"],
        "s5": ["log_decay", "frequency", "log_step"],
    }[name]
    assert list(named)[: len(expected)] == expected


def test_groups_leave_out_what_is_not_trained():
    assert groups(KNOT) == {"['x']": slice(0, 3), "['y']": slice(3, 7)}
    diagonal = np.diag(hessian(lambda p: jnp.sum(p["y"] ** 2), KNOT))
    np.testing.assert_array_equal(diagonal[groups(KNOT)["['y']"]], 2.0)
    np.testing.assert_array_equal(diagonal[groups(KNOT)["['x']"]], 0.0)


def test_arrays_of_both_precisions():
    parameters = {"x": jnp.ones(2, jnp.float32), "y": jnp.array([2.0])}
    got = hessian(lambda p: jnp.sum(p["x"].astype(float) ** 3) * p["y"][0], parameters)
    np.testing.assert_array_equal(got, [[12, 0, 3], [0, 12, 3], [3, 3, 0]])


def test_single_precision_is_kept():
    p = jnp.ones(3, jnp.float32)
    assert hessian(lambda p: jnp.sum(p**3), p).dtype == gauss_newton(jnp.sin, p).dtype == jnp.float32


@pytest.mark.parametrize("function", [hessian, gauss_newton, residual_jacobian, partial(top_eigenvalue, key=jr.key(0))])
@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"n": jnp.array(1)}, ValueError, "parameters must hold a floating-point array, got .*i64"),
        ((), ValueError, "parameters must hold a floating-point array, got"),
        (jnp.ones(2, complex), TypeError, "parameters must be real .* got complex128"),
        ({"a": jnp.ones(2), "b": jnp.ones(1, complex)}, TypeError, "parameters must be real"),
    ],
)
def test_parameters_that_cannot_be_differentiated_are_refused(function, parameters, error, message):
    with pytest.raises(error, match=message):
        function(lambda p: jnp.array(0.0), parameters)


def test_a_batch_of_none_is_refused():
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        hessian(knot, KNOT, batch=0)
    with pytest.raises(TypeError, match="batch must be an integer"):
        hessian(knot, KNOT, batch=2.0)  # pyright: ignore[reportArgumentType]


# --- concentration ----------------------------------------------------------------------------------------------------


def least_count(vector, mass):
    """The definition, in exact arithmetic."""
    squares = sorted((Fraction(float(x)) ** 2 for x in vector), reverse=True)
    wanted, held = mass * sum(squares), Fraction(0)
    for count, square in enumerate(squares):
        if held >= wanted:
            return count
        held += square
    return len(squares)


entries = st.one_of(st.floats(-1, 1), st.sampled_from([0.0, 1.0, 1e-3]))


@settings(deadline=None, max_examples=100)
@given(vector=st.lists(entries, min_size=7, max_size=7), mass=st.floats(1e-3, 1))
@example(vector=[1.0] * 7, mass=3 / 7)
@example(vector=[1.0] * 7, mass=1.0)
@example(vector=[1e-200] * 7, mass=0.9)  # whose squares are 0
@example(vector=[1e200, 0, 0, 0, 0, 0, 1e200], mass=0.9)  # whose squares overflow
def test_the_count_is_the_least_that_holds_the_mass(vector, mass):
    got = coordinates_for(jnp.array(vector), mass)
    # what falls short of the mass by rounding alone counts as reached: 8 + 2 log₂ 7 < 14 roundings, and the sum's own
    slack = Fraction(mass) * (1 - Fraction(32 * EPS))
    assert least_count(vector, slack) <= got <= least_count(vector, Fraction(mass))


@settings(deadline=None, max_examples=50)
@given(
    vector=st.lists(entries, min_size=7, max_size=7),
    order=st.permutations(range(7)),
    signs=st.lists(st.sampled_from([-1.0, 1.0]), min_size=7, max_size=7),
    power=st.integers(-900, 900),
)
def test_order_sign_and_scale_do_not_matter(vector, order, signs, power):
    vector = np.where(np.abs(vector) < 1e-30, 0.0, vector)  # so that the smallest scale loses no digits
    changed = (vector * signs)[list(order)] * 2.0**power
    assert coordinates_for(jnp.array(changed)) == coordinates_for(jnp.array(vector))


def test_axes_flat_vectors_and_exact_masses():
    np.testing.assert_array_equal(coordinates_for(-3.0 * jnp.eye(5)), np.ones(5))
    for n in (1, 3, 10, 37, 170, 1000):
        for scale in (1.0, 1 / math.sqrt(n), 0.3):
            flat = jnp.full(n, scale)
            assert coordinates_for(flat) == math.ceil(Fraction(9, 10) * n)
            assert coordinates_for(flat, 1.0) == n
            for tenths in range(1, 10):  # at multiples of ten the mass is reached exactly
                assert coordinates_for(flat, tenths / 10) == math.ceil(Fraction(tenths, 10) * n)
    assert coordinates_for(jnp.array([3.0, 4.0]), 0.64) == 1  # 16 of 25
    assert coordinates_for(jnp.array([3.0, 4.0]), 0.6401) == 2
    assert coordinates_for(jnp.array([3.0 + 4.0j, 0.0, 1.0j])) == 1  # 25 of 26
    assert coordinates_for(jnp.ones(10, jnp.float32)) == 9
    assert coordinates_for(jnp.zeros(4)) == 0
    np.testing.assert_array_equal(coordinates_for(jnp.array([[0.0, 0.0], [0.0, 1.0]])), [0, 1])


def test_a_gaussian_vector_needs_some_44_per_cent_of_its_coordinates():
    # |z| > τ holds the mass 2[τφ(τ) + Q(τ)], and is the fraction 2Q(τ) of the coordinates.
    tail = lambda tau: 1 - ndtr(tau)  # noqa: E731
    mass = lambda tau: 2 * (tau * np.exp(-(tau**2) / 2) / np.sqrt(2 * np.pi) + tail(tau))  # noqa: E731
    low, high = 0.0, 5.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if mass(middle) > 0.9 else (low, middle)
    tau, fraction = low, 2 * tail(low)
    assert round(fraction, 2) == 0.44
    z = np.asarray(jr.normal(jr.key(0), (20_000,)))
    counted = np.asarray(coordinates_for(jnp.array(z))) / z.size
    # Delta method: the threshold moves so that the mass is held again.
    beyond = np.abs(z) > tau
    influence = beyond - (z**2 * beyond - 0.9 * z**2) / tau**2
    assert abs(counted - fraction) < 4 * influence.std() / np.sqrt(z.size)
    assert influence.std() / np.sqrt(z.size) < 0.005


def test_eigenvectors_along_the_axes_and_rotated():
    spectrum = jnp.exp(-jnp.arange(60.0) / 4)
    along = jnp.diag(spectrum)
    assert concentration(along) == 1
    basis = jr.orthogonal(jr.key(0), 60)
    rotated = basis @ along @ basis.T
    # The eigenvectors are columns of Q: directions drawn uniformly, so nearly Gaussian vectors.
    expected = np.mean([least_count(column, Fraction(9, 10)) for column in np.asarray(basis).T[:6]])
    assert concentration(rotated) == pytest.approx(expected, abs=1e-12)
    assert 0.35 * 60 < expected < 0.55 * 60
    assert concentration(rotated, top=1) == least_count(np.asarray(basis)[:, 0], Fraction(9, 10))
    assert concentration(rotated, mass=1.0) == 60
    assert concentration(along.astype(jnp.float32)).dtype == jnp.float32
    # the largest eigenvalues, not the first ones
    mixed = jnp.eye(4).at[:2, :2].set(jnp.array([[2.0, -1.0], [-1.0, 2.0]]))  # 3 along (1, -1), 1 thrice
    assert concentration(mixed, top=1) == 2
    assert concentration(jnp.diag(jnp.array([0.1, 5.0, 0.2])).at[0, 2].set(0.05).at[2, 0].set(0.05), top=1) == 1


def test_traced_values_that_are_not_finite_are_marked():
    vectors = jnp.array([[1.0, 1.0], [jnp.nan, 1.0], [jnp.inf, 1.0]])
    np.testing.assert_array_equal(jax.jit(coordinates_for)(vectors), [2, -1, -1])
    traced = jax.jit(partial(concentration, top=2))
    assert jnp.isnan(traced(jnp.full((3, 3), jnp.nan)))
    assert traced(jnp.eye(3)) == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: coordinates_for(jnp.ones(3), 0.0), ValueError, r"mass must be above 0 and at most 1, got 0\.0"),
        (lambda: coordinates_for(jnp.ones(3), 1.1), ValueError, r"mass must be above 0 and at most 1, got 1\.1"),
        (lambda: coordinates_for(jnp.ones(3), np.nan), ValueError, "mass must be above 0 and at most 1, got nan"),
        (lambda: coordinates_for(jnp.ones(3, int)), TypeError, "vectors must be floating point .* got int64"),
        (lambda: coordinates_for(jnp.array(1.0)), ValueError, r"vectors must have at least one axis .* got shape \(\)"),
        (lambda: coordinates_for(jnp.ones((2, 0))), ValueError, r"one coordinate, got shape \(2, 0\)"),
        (lambda: coordinates_for(jnp.array([1, np.nan])), ValueError, r"vectors must be finite, got nan at index \(1"),
        (lambda: concentration(jnp.ones(3)), ValueError, r"matrix must have 2 axes, got shape \(3,\)"),
        (lambda: concentration(jnp.ones((2, 3))), ValueError, r"matrix must be square, got shape \(2, 3\)"),
        (lambda: concentration(jnp.eye(3)), ValueError, "top must be between 1 and 3, got 6"),
        (lambda: concentration(jnp.eye(3), top=0), ValueError, "top must be between 1 and 3, got 0"),
        (lambda: concentration(jnp.eye(3), top=1, mass=2), ValueError, "mass must be above 0 and at most 1, got 2"),
        (lambda: concentration(jnp.eye(3, dtype=int), top=1), TypeError, "matrix must be floating point"),
        (lambda: concentration(jnp.full((2, 2), jnp.nan), top=1), ValueError, "matrix must be finite, got nan"),
    ],
)
def test_vectors_and_masses_that_do_not_fit_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- the largest eigenvalue -------------------------------------------------------------------------------------------


class Quadratic(eqx.Module):
    """½ pᵀAp, whose Hessian is A wherever p is; a module, so that one program serves all A of a size."""

    matrix: jax.Array

    def __call__(self, p):
        return 0.5 * p @ self.matrix @ p


def with_eigenvalues(values, seed) -> Quadratic:
    basis = jr.orthogonal(jr.key(seed), len(values))
    return Quadratic(basis @ jnp.diag(jnp.array(values)) @ basis.T)


def largest(quadratic, steps, seed=0):
    return float(top_eigenvalue(quadratic, jnp.zeros(len(quadratic.matrix)), steps=steps, key=jr.key(seed)))


P = 5
seeds = st.integers(0, 2**31 - 1)
# Of P orthonormal directions and P products of P terms each
rounding = 64 * P**2 * EPS


@settings(deadline=None, max_examples=60)
@given(values=st.lists(st.integers(-100, 100), min_size=P, max_size=P, unique=True), seed=seeds)
@example(values=[-100, 99, 1, 2, 3], seed=0)
@example(values=[0, -1, -2, -3, -4], seed=0)
def test_the_largest_eigenvalue_is_exact_once_there_are_as_many_steps_as_parameters(values, seed):
    size = max(map(abs, values))
    winners = [value for value in values if abs(value) == size]  # two, if they are opposite
    quadratic = with_eigenvalues([float(value) for value in values], seed)
    before = 0.0
    for steps in (1, 3):
        got = abs(largest(quadratic, steps, seed))
        assert got <= size * (1 + rounding)
        assert got >= before - rounding * size  # Cauchy: Rayleigh quotients of a space that grows
        before = got
    for steps in (P, 50):
        got = largest(quadratic, steps, seed)
        np.testing.assert_allclose(got, min(winners, key=lambda value: abs(value - got)), rtol=0, atol=rounding * size)


def test_a_single_step_is_the_curvature_along_a_random_direction():
    quadratic, key = with_eigenvalues([3.0, 1.0, -2.0, 0.5, 0.0], 1), jr.key(7)
    direction = jr.normal(key, (P,))
    want = direction @ quadratic.matrix @ direction / (direction @ direction)
    np.testing.assert_allclose(largest(quadratic, 1, 7), want, rtol=0, atol=3 * rounding)


@pytest.mark.parametrize("top", [-3.0, 3.0])
def test_few_steps_find_an_eigenvalue_that_stands_out(top):
    quadratic, key = with_eigenvalues([top, *np.linspace(-1, 1, 19)], 2), jr.key(0)
    vectors = jnp.linalg.eigh(quadratic.matrix)[1]
    start = jr.normal(key, (20,))
    cosine = vectors[:, 0 if top < 0 else -1] @ start / jnp.linalg.norm(start)
    for steps in (2, 6):
        # Kaniel and Saad: (λ₁ - λₙ) tan² / T², with the Chebyshev polynomial T of degree steps - 1 at
        # 1 + 2 (λ₁ - λ₂) / (λ₂ - λₙ) = 3
        bound = 4 * (1 / cosine**2 - 1) / np.cosh((steps - 1) * np.arccosh(3)) ** 2
        error = abs(top) - abs(largest(quadratic, steps))
        assert -64 * 20**2 * EPS < error < bound
    assert bound < 1e-3


# Fewer different eigenvalues than parameters: the directions run out, and what is left of the next one is rounding.
@settings(deadline=None, max_examples=60)
@given(values=st.lists(st.integers(-2, 2), min_size=P, max_size=P), turned=st.booleans(), seed=seeds)
@example(values=[1, 1, 1, 1, 1], turned=False, seed=0)
@example(values=[0, 0, 0, 0, 0], turned=False, seed=0)
@example(values=[0, 0, -1, 0, 0], turned=False, seed=5)
@example(values=[0, 0, -1, 0, 0], turned=True, seed=0)
@example(values=[0, 2, -2, 0, 0], turned=False, seed=0)
def test_the_largest_eigenvalue_where_eigenvalues_are_repeated(values, turned, seed):
    numbers = [float(value) for value in values]
    quadratic = with_eigenvalues(numbers, seed) if turned else Quadratic(jnp.diag(jnp.array(numbers)))
    got, size = largest(quadratic, P, seed), max(map(abs, values))
    np.testing.assert_allclose(abs(got), size, rtol=0, atol=rounding * size)
    assert min(abs(got - value) for value in values) <= rounding * size


def test_the_largest_eigenvalue_of_a_pytree_is_that_of_its_hessian():
    values = np.linalg.eigvalsh(hessian(knot, KNOT))
    want = values[np.argmax(np.abs(values))]
    got = top_eigenvalue(knot, KNOT, key=jr.key(0))
    assert got.shape == ()
    np.testing.assert_allclose(got, want, rtol=64 * 7**2 * EPS)
    traced = jax.jit(lambda p, key: top_eigenvalue(knot, p, steps=7, key=key))(KNOT, jr.key(0))
    np.testing.assert_allclose(traced, want, rtol=64 * 7**2 * EPS)
    # of the negative of the loss it is the same one, with the other sign
    np.testing.assert_allclose(top_eigenvalue(lambda p: -knot(p), KNOT, key=jr.key(0)), -want, rtol=64 * 7**2 * EPS)


def test_the_largest_eigenvalue_in_single_precision():
    got = top_eigenvalue(lambda p: jnp.sum(p**3), jnp.arange(4, dtype=jnp.float32), key=jr.key(0))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 18, rtol=64 * 4**2 * float(np.finfo(np.float32).eps))


def test_no_step_is_refused():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        top_eigenvalue(knot, KNOT, steps=0, key=jr.key(0))
    with pytest.raises(TypeError, match=r"steps must be an integer, got 2\.0"):
        top_eigenvalue(knot, KNOT, steps=2.0, key=jr.key(0))  # pyright: ignore[reportArgumentType]


# --- effective learning rates -----------------------------------------------------------------------------------------

ETA, B1, B2 = 0.02, 0.9, 0.999
SUPREMUM = (1 - B1) / math.sqrt((1 - B2) * (1 - B1**2 / B2))  # by Cauchy-Schwarz


def after(optimizer, gradients):
    """The optimiser's state after these gradients."""

    def step(state, gradient):
        return optimizer.update(gradient, state)[1], None

    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(jax.tree.map(lambda g: g[0], gradients))
        state = jax.tree.map(jnp.asarray, state)
        return jax.jit(lambda state: jax.lax.scan(step, state, gradients)[0])(state)


def by_hand(gradients, eta=ETA, eps=1e-8):
    """Adam's moments written out: η/(√v̂ + ε) after these gradients, and η m̂'/(√v̂' + ε) after one more, of 1."""
    m, v = np.zeros_like(gradients[0]), np.zeros_like(gradients[0])
    for g in gradients:
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
    n = len(gradients)
    clean = eta / (np.sqrt(v / (1 - B2**n)) + eps)
    m, v = B1 * m + (1 - B1), B2 * v + (1 - B2)
    return clean, eta * (m / (1 - B1 ** (n + 1))) / (np.sqrt(v / (1 - B2 ** (n + 1))) + eps)


@jax.jit
def _released(history):
    optimizer = optax.adam(ETA)
    return released_effective_learning_rate(optimizer, after(optimizer, history)) / ETA


def released(history):
    """The released code's rate in units of η, after a history of gradients of one parameter."""
    return np.asarray(_released(jnp.array(history)))


# 1 - β₂ⁿ and what Optax makes of it lose as many digits as 1/(1 - β₂) = 1000 has
close: Any = partial(np.testing.assert_allclose, rtol=1e4 * EPS)


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_both_rates_are_adam_s_written_out_by_hand(steps):
    gradients = np.array(jr.normal(jr.key(steps), (steps, 4))) * [1e-3, 0.1, 1.0, 30.0]
    optimizer = optax.adam(ETA)
    state = after(optimizer, {"a": jnp.array(gradients), "b": jnp.array(gradients[:, 0])})
    clean, shown = by_hand(gradients)
    got = effective_learning_rate(state, ETA)
    close(got["a"], clean)
    close(got["b"], clean[0])
    close(released_effective_learning_rate(optimizer, state)["a"], shown)


def test_inside_chains_with_clipping_and_schedules():
    schedule = lambda k: ETA / (1.0 + k)  # noqa: E731
    optimizer = optax.chain(optax.clip(0.5), optax.adam(schedule))
    gradients = np.array(jr.normal(jr.key(0), (6, 5)))
    state = after(optimizer, jnp.array(gradients))
    # clipped to ±½ one by one, the probe of 1 as well; the seventh step has the rate η/7
    clipped = np.clip(gradients, -0.5, 0.5)
    clean, shown = by_hand(2 * clipped, eta=ETA / 7, eps=2e-8)  # steps do not see the scale; ε does
    close(released_effective_learning_rate(optimizer, state), shown)
    close(effective_learning_rate(state, ETA / 7), 2 * clean)
    # other constants
    state = after(optax.adam(ETA, b2=0.9, eps=0.1), jnp.ones((3, 2)))
    close(effective_learning_rate(state, ETA, b2=0.9, eps=0.1), np.full(2, ETA / 1.1))


def test_single_precision_rates():
    optimizer = optax.adam(ETA)
    state = after(optimizer, jnp.ones((3, 2), jnp.float32))
    for rates in (
        effective_learning_rate(state, ETA),
        effective_learning_rate(state, jnp.array(ETA)),
        released_effective_learning_rate(optimizer, state),
    ):
        assert rates.dtype == jnp.float32
        # 1 - 0.999³ in single precision is known to one part in ε₃₂/0.003
        np.testing.assert_allclose(rates, ETA, rtol=float(np.finfo(np.float32).eps) / 0.001)


@pytest.mark.parametrize("found", [0, 2])
def test_rates_need_the_state_of_one_adam(found):
    optimizer = optax.sgd(0.1) if found == 0 else optax.chain(optax.adam(0.1), optax.adam(0.1))
    state = after(optimizer, jnp.ones((2, 3)))
    message = f"state must hold the state of one scale_by_adam, got {found} of them"
    with pytest.raises(ValueError, match=message):
        effective_learning_rate(state, 0.1)
    with pytest.raises(ValueError, match=message):
        released_effective_learning_rate(optimizer, state)


@pytest.mark.parametrize("size", [0.0, 1e-6, -1e-6])
def test_the_released_rate_of_small_gradients_says_only_that_they_are_small(size):
    # m' = 0.1 and v' = 0.001, whatever the gradients below 0.03; 0.999^30000 = 1e-13
    assert released(np.full(30_000, size)) == pytest.approx(0.1 / math.sqrt(0.001), rel=1e-4)
    assert released([size]) == pytest.approx((0.1 / 0.19) / math.sqrt(0.001 / 0.001999), rel=1e-4)
    assert 0.1 / math.sqrt(0.001) == pytest.approx(3.1623, abs=1e-4)


def test_the_released_rate_approaches_its_supremum_where_gradients_grow_geometrically():
    assert pytest.approx(7.2703, abs=1e-4) == SUPREMUM
    # the oldest first; 0.999^30000 = 1e-13 is what is left of the corrections, ε = 1e-8 beside a root of 0.03
    history = (B1 / B2) ** np.arange(30_000.0, 0, -1)
    assert released(history) == pytest.approx(SUPREMUM, rel=1e-6)
    assert released(history) < SUPREMUM
    # neither faster nor slower growth does better
    assert released((B1 / B2 * 0.98) ** np.arange(30_000.0, 0, -1)) < released(history) * (1 - 1e-4)
    assert released((B1 / B2 * 1.02) ** np.arange(30_000.0, 0, -1)) < released(history) * (1 - 1e-4)


HISTORY = 40


@settings(deadline=None, max_examples=50)
@given(
    recent=st.lists(st.floats(-10, 10), min_size=HISTORY, max_size=HISTORY),
    quiet=st.sampled_from([0, 100, 10_000]),
    growth=st.floats(0.8, 1.0),
    mixture=st.floats(0, 1),
)
@example(recent=[0.0] * HISTORY, quiet=10_000, growth=B1 / B2, mixture=0.0)
def test_no_history_exceeds_the_supremum(recent, quiet, growth, mixture):
    geometric = growth ** np.arange(float(HISTORY), 0, -1)
    history = np.concatenate([np.zeros(quiet), mixture * np.array(recent) + (1 - mixture) * geometric])
    assert abs(released(history)) <= SUPREMUM * (1 + 1e4 * EPS)


def test_the_released_rate_is_negative_after_gradients_of_the_other_sign():
    # m' = 0.9 · (-1) + 0.1 and v' = 1 after many gradients of -1; the clean rate is η
    history = np.full(30_000, -1.0)
    assert released(history) == pytest.approx(-0.8, rel=1e-6)
    state = after(optax.adam(ETA), jnp.array(history))
    assert effective_learning_rate(state, ETA) == pytest.approx(ETA, rel=1e-6)
