"""Losses from impulse responses against running both systems on sampled inputs, sums and automatic differentiation."""

import cmath
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scanrnn import identification
from scanrnn.eigenvalues import Cartesian
from scanrnn.layers import LRU, DiagonalRNN, LinearRNN
from scanrnn.sensitivity import estimate
from scanrnn.theory import finite_hessian_overlap, hessian_overlap, population_loss, sampled_loss

EPS = np.finfo(float).eps

STUDENTS = {
    name: getattr(identification, name)
    for name in (
        "rnn",
        "block_diagonal",
        "block_diagonal_wide",
        "dense_from_blocks",
        "complex_diagonal",
        "complex_gamma",
        "complex_gamma_released",
        "lru",
        "lru_signed_phase",
    )
}


# --- all students against simulation ----------------------------------------------------------------------------------

SEQUENCES, CHUNK, DIRECTIONS = 100_000, 500, 8


def with_slopes(value, gradient, directions):
    """The value, and the gradient's products with the directions."""
    products = jax.tree.map(lambda g, d: d.reshape(DIRECTIONS, -1) @ g.ravel(), gradient, directions)
    return jnp.concatenate([value[None], sum(jax.tree.leaves(products))])


@eqx.filter_jit
def simulated(system, student, directions, keys, length):
    """½|Δy|² per step, and its slopes along the directions, of sequences that both networks are run on."""
    parameters, rest = eqx.partition(student, eqx.is_inexact_array)

    def of_sequence(key):
        inputs = jr.normal(key, (length, 1))
        wanted = system(inputs)

        def loss(parameters):
            return 0.5 * jnp.sum((eqx.combine(parameters, rest)(inputs) - wanted) ** 2) / length

        if directions is None:
            return loss(parameters)[None]
        return with_slopes(*jax.value_and_grad(loss)(parameters), directions)

    return jax.lax.map(jax.vmap(of_sequence), keys.reshape(-1, CHUNK)).reshape(keys.size, -1)


@eqx.filter_jit
def exact(system, student, directions, length):
    parameters, rest = eqx.partition(student, eqx.is_inexact_array)

    def loss(parameters):
        kernel = eqx.combine(parameters, rest).impulse_response(length)
        return population_loss(kernel, system.impulse_response(length))

    value, gradient = jax.value_and_grad(loss)(parameters)
    if directions is None:
        return value[None]
    return with_slopes(value, gradient, directions)


def setting(name) -> tuple[LinearRNN, Any]:
    """A teacher and a student that is not it: slow eigenvalues, whose memory exceeds the sequence."""
    where = {"min_modulus": 0.9, "max_phase": 1.0}
    return identification.fresh(**where, seed=3).system, STUDENTS[name](**where, key=jr.key(7))


def random_directions(student):
    """In each parameter an independent N(0, 1); a leading axis of 8."""
    leaves, structure = jax.tree.flatten(eqx.filter(student, eqx.is_inexact_array))
    keys = jr.split(jr.key(11), len(leaves))
    draws = [jr.normal(key, (DIRECTIONS, *leaf.shape)) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, draws)


def assert_exact_is_the_mean(name, length, with_gradient, sequences=SEQUENCES):
    system, student = setting(name)
    directions = random_directions(student) if with_gradient else None
    mean, standard_error = estimate(simulated(system, student, directions, jr.split(jr.key(13), sequences), length))
    expected = exact(system, student, directions, length)
    assert expected.shape == ((1 + DIRECTIONS,) if with_gradient else (1,))
    assert np.all(np.abs(mean - expected) < 4 * standard_error)
    # sharp: the loss is known to a percent, most slopes too
    assert standard_error[0] < 0.01 * expected[0]
    assert np.median(standard_error / np.abs(expected)) < 0.05


@pytest.mark.parametrize("name", STUDENTS)
def test_the_exact_loss_is_the_mean_of_simulated_sequences(name):
    assert_exact_is_the_mean(name, 24, with_gradient=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_the_exact_loss_and_its_gradient_are_the_means_of_simulated_sequences(name):
    assert_exact_is_the_mean(name, 40, with_gradient=True)


@pytest.mark.slow
def test_the_exact_loss_and_its_gradient_are_the_means_at_the_paper_s_length():
    assert_exact_is_the_mean("block_diagonal", 300, with_gradient=True, sequences=20_000)


# --- identities -------------------------------------------------------------------------------------------------------


def pair(kind, d_in, d_out) -> tuple[Any, Any]:
    """Two different layers of one kind."""

    def make(key):
        if kind == "linear":
            return LinearRNN(d_in, 6, d_out, blocks=3, min_modulus=0.5, key=key)
        return LRU(d_in, 5, d_out, min_modulus=0.5, max_modulus=0.99, key=key)

    make = eqx.filter_jit(make)
    return make(jr.key(0)), make(jr.key(1))


SYSTEMS = pytest.mark.parametrize(
    ("kind", "d_in", "d_out", "length"),
    [("linear", 1, 1, 21), ("linear", 2, 3, 37), ("lru", 3, 2, 5), ("lru", 1, 1, 16), ("linear", 2, 2, 1)],
)


@SYSTEMS
def test_the_population_loss_is_the_expectation_over_white_inputs(kind, d_in, d_out, length):
    # Δy = M x for a matrix whose columns are the answers to a unit impulse at each time and input. With E[x xᵀ] = 1 the
    # expected ½|Mx|² is ½ tr MᵀM.
    one, other = pair(kind, d_in, d_out)
    impulses = jnp.eye(length * d_in).reshape(length * d_in, length, d_in)
    columns, got = jax.jit(
        lambda impulses: (
            jax.vmap(lambda x: one(x) - other(x))(impulses),
            population_loss(one.impulse_response(length), other.impulse_response(length)),
        )
    )(impulses)
    expected = 0.5 * np.sum(np.asarray(columns) ** 2) / length
    assert got.shape == ()
    # each impulse response errs by some 20 roundings a step, of sizes near that of the difference
    np.testing.assert_allclose(got, expected, rtol=40 * (length + 1) * EPS)


@SYSTEMS
def test_the_sampled_loss_is_that_of_running_both_systems(kind, d_in, d_out, length):
    one, other = pair(kind, d_in, d_out)
    inputs = jr.normal(jr.key(2), (4, length, d_in))

    @jax.jit
    def all_ways(inputs):
        kernels = one.impulse_response(length), other.impulse_response(length)
        ran = jax.vmap(lambda x: 0.5 * jnp.sum((one(x) - other(x)) ** 2) / length)(inputs)
        alone = jnp.stack([sampled_loss(*kernels, x) for x in inputs])
        return ran, jax.vmap(sampled_loss, (None, None, 0))(*kernels, inputs), alone

    expected, batched, alone = all_ways(inputs)
    # as above, and sums over the length · d_in inputs of the past
    for got in (batched, alone):
        np.testing.assert_allclose(got, expected, rtol=40 * (length + 1) * d_in * EPS)


sizes = st.sampled_from([(1, 1, 1), (1, 2, 3), (2, 3, 1), (12, 1, 2), (11, 2, 2)])  # each is compiled once


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), shape=sizes)
def test_both_losses_are_their_sums(seed, shape):
    rng = np.random.default_rng(seed)
    length, _, d_in = shape
    student, teacher, inputs = rng.normal(size=shape), rng.normal(size=shape), rng.normal(size=(length, d_in))
    gap, expected, drawn = student - teacher, 0.0, 0.0
    for t in range(length):
        expected += 0.5 * sum(np.sum(gap[k] ** 2) for k in range(t + 1)) / length
        drawn += 0.5 * np.sum(sum(gap[k] @ inputs[t - k] for k in range(t + 1)) ** 2) / length
    # a sum of at most 12 · 9 squares, each of a sum of 36 products; the squares of entries below 6 · 6 · 36
    np.testing.assert_allclose(jax.jit(population_loss)(student, teacher), expected, rtol=120 * EPS)
    got = jax.jit(sampled_loss)(student, teacher, inputs)
    np.testing.assert_allclose(got, drawn, rtol=1e-12)


def test_a_perfect_student_has_no_loss_and_the_order_does_not_matter():
    kernel, other = jr.normal(jr.key(0), (2, 9, 2, 3))
    inputs = jr.normal(jr.key(1), (9, 3))
    assert population_loss(kernel, kernel) == sampled_loss(kernel, kernel, inputs) == 0
    assert population_loss(kernel, other) == population_loss(other, kernel)
    assert sampled_loss(kernel, other, inputs) == sampled_loss(other, kernel, inputs)
    # the last lag occurs once in T steps, the first T times: white input of variance 1
    for lag in (0, 8):
        impulse = jnp.zeros((9, 1, 1)).at[lag].set(2.0)
        np.testing.assert_allclose(population_loss(impulse, 0 * impulse), 2 * (9 - lag) / 9, rtol=4 * EPS)


def test_losses_keep_single_precision():
    kernel = jnp.ones((5, 1, 1), jnp.float32)
    assert population_loss(kernel, 0 * kernel).dtype == jnp.float32
    assert sampled_loss(kernel, 0 * kernel, jnp.ones((5, 1), jnp.float32)).dtype == jnp.float32


KERNEL = np.ones((5, 2, 3))


@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        (KERNEL[0], KERNEL, ValueError, r"student_kernel must have 3 axes, got shape \(2, 3\)"),
        (KERNEL, KERNEL[:, 0], ValueError, r"teacher_kernel must have 3 axes, got shape \(5, 3\)"),
        (KERNEL, KERNEL[:4], ValueError, r"one shape \(T, d_out, d_in\) with T >= 1, got \(5, 2, 3\) and \(4, 2, 3\)"),
        (KERNEL, KERNEL[:, :1], ValueError, r"one shape .* got \(5, 2, 3\) and \(5, 1, 3\)"),
        (KERNEL[:0], KERNEL[:0], ValueError, r"with T >= 1, got \(0, 2, 3\) and \(0, 2, 3\)"),
        (KERNEL.astype(int), KERNEL, TypeError, "student_kernel must be floating point .* got int64"),
        (KERNEL, KERNEL.astype(complex), TypeError, "teacher_kernel must be real, got complex128"),
    ],
)
def test_kernels_that_do_not_fit_are_refused(student, teacher, error, message):
    student, teacher = jnp.asarray(student), jnp.asarray(teacher)
    with pytest.raises(error, match=message):
        population_loss(student, teacher)
    with pytest.raises(error, match=message):
        sampled_loss(student, teacher, jnp.ones((len(student), 3)))


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (np.ones((4, 3)), ValueError, r"inputs must have shape \(T, d_in\) = \(5, 3\), got \(4, 3\)"),
        (np.ones((5, 2)), ValueError, r"inputs must have shape \(T, d_in\) = \(5, 3\), got \(5, 2\)"),
        (np.ones(5), ValueError, r"inputs must have shape \(T, d_in\) = \(5, 3\), got \(5,\)"),
        (np.ones((2, 5, 3)), ValueError, r"inputs must have shape \(T, d_in\) = \(5, 3\), got \(2, 5, 3\)"),
        (np.ones((5, 3), int), TypeError, "inputs must be floating point .* got int64"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, error, message):
    with pytest.raises(error, match=message):
        sampled_loss(jnp.asarray(KERNEL), jnp.asarray(KERNEL), jnp.asarray(inputs))


# --- the Hessian of finite sequences ----------------------------------------------------------------------------------

inside = st.one_of(
    st.floats(-0.999, 0.999), st.builds(cmath.rect, st.floats(0, 0.999), st.floats(-np.pi, np.pi)), st.just(0.0)
)


@settings(deadline=None, max_examples=40)
@given(alpha=inside, beta=inside, length=st.sampled_from([1, 2, 3, 10, 41]))
@example(alpha=0.999, beta=-0.999, length=41)
@example(alpha=0.5j, beta=0.5, length=41)
def test_the_finite_overlap_is_the_double_sum_over_steps_and_lags(alpha, beta, length):
    p = alpha * beta
    products = [k**2 * p ** (k - 1) for t in range(length) for k in range(1, t + 1)]
    got = finite_hessian_overlap(alpha, beta, length)
    assert jnp.iscomplexobj(got) == (isinstance(alpha, complex) or isinstance(beta, complex))
    # Powers and sums of T steps err by some 2T roundings of the sum of moduli each, complex products thrice that; the
    # sum here by as many roundings as it has terms
    tolerance = (24 * length + length**2) * EPS * sum(map(abs, products)) / length
    assert abs(got - sum(products) / length) <= tolerance


@settings(deadline=None, max_examples=20)
@given(alpha=inside, beta=inside, rho=st.floats(0, 1), length=st.sampled_from([1, 2, 3, 12]))
@example(alpha=0.9, beta=-0.5, rho=1.0, length=12)
def test_the_finite_overlap_of_correlated_inputs_is_the_sum_over_steps_and_pairs_of_lags(alpha, beta, rho, length):
    products = [
        k * l * alpha ** (k - 1) * beta ** (l - 1) * rho ** abs(k - l)
        for t in range(length)
        for k in range(1, t + 1)
        for l in range(1, t + 1)  # noqa: E741
    ]
    got = finite_hessian_overlap(alpha, beta, length, rho)
    # as above
    tolerance = (24 * length + len(products)) * EPS * sum(map(abs, products)) / length
    assert abs(got - sum(products) / length) <= tolerance


@pytest.mark.parametrize(("alpha", "beta"), [(0.9, 0.8), (-0.9, 0.95), (0.9j, 0.8 - 0.1j), (0.95, 0.9 * np.exp(2j))])
def test_the_finite_overlap_tends_to_the_infinite_one_as_one_over_the_length(alpha, beta):
    # T (S_∞ - S_T) = Σ_{k<T} k³ p^(k-1) + T Σ_{k>=T} k² p^(k-1) → Σ k³ p^(k-1) = (1 + 4p + p²)/(1 - p)⁴
    p, limit = alpha * beta, hessian_overlap(alpha, beta)
    moduli = float(hessian_overlap(abs(alpha), abs(beta)))
    rate = (1 + 4 * p + p**2) / (1 - p) ** 4
    for length in (500, 2000):  # |p| < 0.86: 0.86^500 < 1e-32
        gap = length * (limit - finite_hessian_overlap(alpha, beta, length))
        # T times the roundings of the sums, relative to the sum of the moduli, which count 1/(1 - |p|) < 7 times
        np.testing.assert_allclose(gap, rate, rtol=0, atol=500 * EPS * length * moduli)
    # and does not coincide with it
    assert abs(finite_hessian_overlap(alpha, beta, 500) / limit - 1) > 1e-3


def test_the_finite_overlap_under_broadcasting_and_tracing():
    lam = jnp.asarray([0.5, -0.3, 0.9])
    table = finite_hessian_overlap(lam[:, None], lam[None], 7)
    assert table.shape == (3, 3)
    entry = [[finite_hessian_overlap(a, b, 7) for b in lam] for a in lam]
    np.testing.assert_allclose(table, entry, rtol=8 * EPS)
    traced = jax.jit(lambda lam: finite_hessian_overlap(lam, 0.5, 7))
    np.testing.assert_allclose(traced(lam), finite_hessian_overlap(lam, 0.5, 7), rtol=8 * EPS)
    np.testing.assert_array_equal(jnp.isnan(traced(jnp.array([0.5, 1.0, -1.5]))), [False, True, True])
    assert finite_hessian_overlap(jnp.float32(0.5), jnp.float32(0.5), 7).dtype == jnp.float32
    assert finite_hessian_overlap(jnp.complex64(0.5), jnp.float32(0.5), 7).dtype == jnp.complex64


@pytest.mark.parametrize("length", [2, 300])
def test_the_hessian_of_a_diagonal_student_is_made_of_it(length):
    # κ_k = Re Σ w_i λ_i^k with w = c b. In direction u of λ_i, u = 1 (real part) or i (imaginary part), its derivative
    # is Re[u w_i k λ_i^(k-1)], and Re x Re y = ½ Re(x y + x ȳ). At the minimum the Hessian is the sum of products.
    lam: Any = np.array([0.9 * np.exp(0.4j), 0.8 * np.exp(-2j), 0.95, -0.7 + 0j])
    student = DiagonalRNN(1, 4, 1, eigenvalues=Cartesian.from_eigenvalues(lam), key=jr.key(0))

    def loss(parts):
        moved = eqx.tree_at(lambda f: f.parametrization, student, Cartesian(parts[0], parts[1]))
        return population_loss(moved.impulse_response(length), student.impulse_response(length))

    hessian = jax.jit(jax.hessian(loss))(jnp.stack([lam.real, lam.imag]))
    w = (np.asarray(student.output_real) + 1j * np.asarray(student.output_imag))[0] * (
        np.asarray(student.input_real) + 1j * np.asarray(student.input_imag)
    )[:, 0]
    weights = np.array([1, 1j])[:, None] * w  # (direction, unit)
    plain = np.asarray(finite_hessian_overlap(lam[:, None], lam[None], length))
    crossed = np.asarray(finite_hessian_overlap(lam[:, None], lam[None].conj(), length))
    expected = 0.5 * np.real(
        np.einsum("ui,vj,ij->uivj", weights, weights, plain)
        + np.einsum("ui,vj,ij->uivj", weights, weights.conj(), crossed)
    )
    # sums of `length` terms and phases k θ of powers known to k roundings, relative to the largest entry
    np.testing.assert_allclose(hessian, expected, rtol=0, atol=40 * length * EPS * np.abs(expected).max())
    assert np.abs(expected).max() > 1e-2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.0, 0.5, 3), ValueError, r"lam_i must be of modulus below 1, got 1\.0"),
        ((0.5, 0.8 + 0.8j, 3), ValueError, r"lam_j must be of modulus below 1, got \(0\.8\+0\.8j\)"),
        ((0.5, np.array([0.1, np.nan]), 3), ValueError, r"lam_j must be of modulus below 1, got nan at index \(1,\)"),
        (("0.5", 0.5, 3), TypeError, "lam_i must be a number or an array of numbers, got '0.5'"),
        ((0.5, True, 3), TypeError, "lam_j must be real or complex numbers, got bool"),
        ((np.full(2, 0.5), np.full(3, 0.5), 3), ValueError, r"lam_i of shape \(2,\) and lam_j of shape \(3,\)"),
        ((0.5, 0.5, 0), ValueError, "length must be at least 1, got 0"),
        ((0.5, 0.5, 3.0), TypeError, r"length must be an integer, got 3\.0"),
    ],
)
def test_arguments_of_the_finite_overlap_that_do_not_fit_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        finite_hessian_overlap(*arguments)
