"""The Hessian in the eigenvalues against automatic differentiation, simulated sequences, and its double sum."""

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

from scanrnn.eigenvalues import Cartesian
from scanrnn.layers import DiagonalRNN
from scanrnn.recurrence import linear_recurrence
from scanrnn.sensitivity import estimate
from scanrnn.theory import eigenvalue_hessian, finite_hessian_overlap, hessian_overlap, population_loss

EPS = np.finfo(float).eps

LAM: Any = np.array([0.9 * np.exp(0.4j), 0.8 * np.exp(-2j), 0.95, -0.7])
WEIGHT: Any = np.array([0.5 - 0.3j, 1.1, -0.4j, 0.7 + 0.2j])
N = len(LAM)


def assert_close(got, wanted, tolerance):
    """Beside the largest entry."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


# --- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 40, 300])
def test_it_is_the_derivative_of_the_population_loss_of_a_diagonal_network(length):
    student = DiagonalRNN(1, N, 1, eigenvalues=Cartesian.from_eigenvalues(LAM), key=jr.key(0))

    def loss(parts):
        moved = eqx.tree_at(lambda f: f.parametrization, student, Cartesian(parts[:N], parts[N:]))
        return population_loss(moved.impulse_response(length), student.impulse_response(length))

    expected = jax.jit(jax.hessian(loss))(jnp.concatenate([LAM.real, LAM.imag]))
    b = np.asarray(student.input_real) + 1j * np.asarray(student.input_imag)
    c = np.asarray(student.output_real) + 1j * np.asarray(student.output_imag)
    got = eigenvalue_hessian(LAM, c[0] * b[:, 0], length=length)
    assert got.shape == (2 * N, 2 * N)
    # powers of λ known to k roundings, and sums of `length` terms
    assert_close(got, expected, 40 * length * EPS)
    wrong = eigenvalue_hessian(LAM, (c[0] * b[:, 0]).conj(), length=length)
    assert np.abs(wrong - expected).max() > 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("rho", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("length", [None, 30])
def test_it_is_symmetric_and_positive_semidefinite(rho, length):
    got = np.asarray(eigenvalue_hessian(LAM, WEIGHT, rho, length=length))
    assert_close(got, got.T, 16 * EPS)
    assert np.linalg.eigvalsh(got).min() > -100 * EPS * np.abs(got).max()
    assert np.linalg.eigvalsh(got).max() > 1


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.95])
def test_long_sequences_are_stationary(rho):
    limit = np.asarray(eigenvalue_hessian(LAM, WEIGHT, rho))
    gaps = [
        np.abs(eigenvalue_hessian(LAM, WEIGHT, rho, length=length) - limit).max() / np.abs(limit).max()
        for length in (2_000, 20_000)
    ]
    # S - S_T = O(1/T): the memory of |∂h|² is some 3/(1 - 0.95²) = 30 steps, and of the input up to 20 more
    assert 0 < gaps[1] < 100 / 20_000
    np.testing.assert_allclose(gaps[0] / gaps[1], 10, rtol=1e-3)


def test_constant_input_by_hand():
    # ρ = 1: the state is x Σ λᵏ, its derivative x/(1 - λ)². The output moves by Re[w dλ/(1 - λ)²], x² = 1 on average.
    slope = WEIGHT / (1 - LAM) ** 2
    gradient = np.concatenate([slope.real, -slope.imag])
    assert_close(eigenvalue_hessian(LAM, WEIGHT, 1.0), np.outer(gradient, gradient), 1e3 * EPS)
    # two steps: y₁ knows nothing of λ, y₂ moves by Re[w dλ] x₁
    gradient = np.concatenate([WEIGHT.real, -WEIGHT.imag])
    for rho in (0.0, 0.7):
        assert_close(eigenvalue_hessian(LAM, WEIGHT, rho, length=2), np.outer(gradient, gradient) / 2, 8 * EPS)
    assert np.all(eigenvalue_hessian(LAM, WEIGHT, 0.5, length=1) == 0)


# --- simulated sequences ----------------------------------------------------------------------------------------------

SEQUENCES, CHUNK = 20_000, 500


@eqx.filter_jit
def simulated(keys, rho, length):
    """1/T Σ_t of the products of the output's slopes in (Re λ, Im λ), for each sequence of an AR(1) input."""
    lam, weight = jnp.asarray(LAM), jnp.asarray(WEIGHT)

    def of_sequence(key):
        noise = jr.normal(key, (length, 1))
        scale = jnp.sqrt(1 - rho**2) * jnp.ones((length, 1))
        inputs = linear_recurrence(jnp.array([rho]), noise * scale.at[0].set(1.0))  # stationary from the first step
        state = linear_recurrence(lam, jnp.broadcast_to(inputs, (length, N)).astype(lam.dtype))
        before = jnp.concatenate([jnp.zeros((1, N), lam.dtype), state[:-1]])
        slope = linear_recurrence(lam, before) * weight[None]  # ∂h_t = λ ∂h_{t-1} + h_{t-1}
        gradient = jnp.concatenate([slope.real, -slope.imag], axis=1)
        return gradient.T @ gradient / length

    return jax.lax.map(jax.vmap(of_sequence), keys.reshape(-1, CHUNK)).reshape(-1, 2 * N, 2 * N)


@pytest.mark.parametrize(("rho", "length"), [(0.0, 25), (0.8, 25), (0.5, 60)])
def test_it_is_the_mean_of_simulated_sequences(rho, length):
    mean, standard_error = estimate(simulated(jr.split(jr.key(1), SEQUENCES), jnp.array(rho), length))
    expected = eigenvalue_hessian(LAM, WEIGHT, rho, length=length)
    assert np.all(np.abs(mean - expected) <= 4 * standard_error)  # 36 different entries; both 0 where Re w = 0 = Im λ
    assert np.median(standard_error[expected != 0] / np.abs(expected[expected != 0])) < 0.1
    for rival in (eigenvalue_hessian(LAM, WEIGHT, rho), eigenvalue_hessian(LAM, WEIGHT, rho + 0.1, length=length)):
        assert np.any(np.abs(mean - rival) > 8 * standard_error)


# --- the overlap it is made of ----------------------------------------------------------------------------------------

inside = st.one_of(st.floats(-0.99, 0.99), st.builds(cmath.rect, st.floats(0, 0.99), st.floats(-np.pi, np.pi)))


@settings(deadline=None, max_examples=30)
@given(alpha=inside, beta=inside, rho=st.floats(0, 1), length=st.sampled_from([1, 2, 5, 24]))
@example(alpha=0.99, beta=0.99j, rho=1.0, length=24)
@example(alpha=0.0, beta=0.5, rho=0.0, length=5)
def test_the_finite_overlap_is_its_double_sum(alpha, beta, rho, length):
    k = np.arange(1, length)[:, None]
    l = k.T  # noqa: E741
    terms = (1 - np.maximum(k, l) / length) * k * l * alpha ** (k - 1.0) * beta ** (l - 1.0) * rho ** np.abs(k - l)
    # powers of complex numbers to k roundings, thrice for their products; sums of `length` and of its square
    tolerance = (24 * length + length**2) * EPS * np.abs(terms).sum()
    assert abs(finite_hessian_overlap(alpha, beta, length, rho) - terms.sum()) <= tolerance


@pytest.mark.parametrize(("alpha", "beta"), [(0.9, 0.8), (0.9j, 0.8 - 0.1j), (0.95, 0.9 * np.exp(2j))])
@pytest.mark.parametrize("rho", [0.3, 0.9])
def test_the_finite_overlap_of_correlated_inputs_tends_to_the_infinite_one(alpha, beta, rho):
    limit = hessian_overlap(alpha, beta, rho)
    gaps = [length * (limit - finite_hessian_overlap(alpha, beta, length, rho)) for length in (1_000, 10_000)]
    # T (S - S_T) → Σ max(k, l) k l α^{k-1} β^{l-1} ρ^{|k-l|}, up to 0.95^1000 = 5e-23; T times the roundings of S
    k = np.arange(1.0, 800)[:, None]
    rate = np.sum(np.maximum(k, k.T) * k * k.T * alpha ** (k - 1) * beta ** (k.T - 1) * rho ** np.abs(k - k.T))
    moduli = float(jnp.abs(hessian_overlap(abs(alpha), abs(beta), rho)))
    for length, gap in zip((1_000, 10_000), gaps, strict=True):
        np.testing.assert_allclose(gap, rate, rtol=1e-9, atol=500 * EPS * length * moduli)
    assert abs(rate) > 0.1


# --- arguments --------------------------------------------------------------------------------------------------------


def test_real_and_complex_numbers_may_mix():
    real: Any = np.array([0.5, -0.3])
    wanted = eigenvalue_hessian(real + 0j, np.array([1 + 0j, 2j]), 0.3, length=9)
    assert_close(eigenvalue_hessian(real, np.array([1, 2j]), 0.3, length=9), wanted, 8 * EPS)
    weight: Any = np.array([1, 2])
    assert_close(eigenvalue_hessian(real + 0j, weight, 0.3), eigenvalue_hessian(real, weight * 1.0, 0.3), 8 * EPS)
    single = jnp.asarray(LAM, jnp.complex64), jnp.asarray(WEIGHT, jnp.complex64)
    for length in (None, 9):
        assert eigenvalue_hessian(*single, 0.3, length=length).dtype == jnp.float32


def test_inside_jit():
    for length in (None, 9):
        compiled = jax.jit(lambda lam, weight, length=length: eigenvalue_hessian(lam, weight, 0.3, length=length))
        assert_close(compiled(LAM, WEIGHT), eigenvalue_hessian(LAM, WEIGHT, 0.3, length=length), 64 * EPS)
        assert np.isnan(compiled(2 * LAM, WEIGHT)).any()


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((LAM, WEIGHT[:3]), {}, ValueError, r"must both have shape \(n,\), got \(4,\) and \(3,\)"),
        ((0.5, 1.0), {}, ValueError, r"must both have shape \(n,\), got \(\) and \(\)"),
        ((LAM[None], WEIGHT[None]), {}, ValueError, r"must both have shape \(n,\), got \(1, 4\) and \(1, 4\)"),
        ((LAM / 0.9, WEIGHT), {}, ValueError, "lam_i must be of modulus below 1, got"),
        ((LAM, WEIGHT, 1.5), {}, ValueError, r"rho must be in \[0, 1\], got 1\.5"),
        ((LAM, WEIGHT, -0.1), {"length": 5}, ValueError, r"rho must be in \[0, 1\], got -0\.1"),
        ((LAM, WEIGHT), {"length": 0}, ValueError, "length must be at least 1, got 0"),
        ((LAM, WEIGHT), {"length": 5.0}, TypeError, r"length must be an integer, got 5\.0"),
        ((LAM, WEIGHT, 0.5j), {}, TypeError, "rho must be real"),
        ((LAM, WEIGHT, np.full(2, 0.5)), {"length": 5}, ValueError, r"rho must have 0 axes, got shape \(2,\)"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        eigenvalue_hessian(*arguments, **keywords)
