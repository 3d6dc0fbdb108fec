"""The four Hessians of Zucchet & Orvieto (2024), Figs. 4 and 9, beside the usual way.

Run by `make bench`; never part of the test suite. A teacher of four states as a dense network, a complex diagonal one,
one of the LRU's kind and one with a zero-order hold: 25, 25, 29 and 29 parameters, sequences of T = 300, float64. Ours
is the expected Hessian, from the Jacobian of the impulse response. The usual way is `jax.hessian` of the loss of 64
sequences that the networks are run on. Both are compiled once and used once, so compilation counts; they take
turns. They must have the same eigenvalues, up to what the choice of 64 sequences explains.
"""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from scanrnn import curvature, realizations
from scanrnn.eigenvalues import Exponential

BATCH, T = 64, 300
FORMS = {
    "dense": lambda s: s,
    "complex diagonal": lambda s: realizations.diagonal(s, unit_eigenvectors=True),
    "LRU": lambda s: realizations.diagonal(s, Exponential, normalized=True, unit_eigenvectors=True),
    "zero-order hold": lambda s: realizations.zero_order_hold(s, unit_eigenvectors=True),
}
SIZES = {"dense": 25, "complex diagonal": 25, "LRU": 29, "zero-order hold": 29}


@pytest.fixture(scope="module", autouse=True)
def double_precision():
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def ours(layer):
    occurs = jnp.sqrt(1 - jnp.arange(T) / T)
    return curvature.gauss_newton(lambda s: occurs * s.impulse_response(T)[:, 0, 0], layer)


def usual(layer, inputs):
    flat, unravel = ravel_pytree(eqx.filter(layer, eqx.is_inexact_array))
    rest = eqx.filter(layer, eqx.is_inexact_array, inverse=True)
    run = lambda p: jax.vmap(eqx.combine(unravel(p), rest))(inputs)  # noqa: E731
    wanted = run(flat)

    def loss(p):
        return 0.5 * jnp.mean(jnp.sum((run(p) - wanted) ** 2, axis=2))

    return jax.jit(jax.hessian(loss))(flat)


def seconds(function, *arguments):
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start, np.asarray(result)


def sampling_errors(layer, directions):
    """Of the curvature along each of the directions on a batch: √(2 tr (GᵀG)² / 64)/T, G the Toeplitz matrix of ∂κ."""
    jacobian = curvature.residual_jacobian(lambda s: s.impulse_response(T)[:, 0, 0], layer)
    lag = np.arange(T)[:, None] - np.arange(T)
    errors = []
    for gradient in (np.asarray(jacobian) @ directions).T:
        toeplitz = np.where(lag >= 0, gradient[lag % T], 0)
        errors.append(np.sqrt(2 * np.sum((toeplitz.T @ toeplitz) ** 2) / BATCH) / T)
    return np.array(errors)


def test_four_hessians(benchmark):
    system = realizations.oscillating_teacher(jr.key(0), 2)
    inputs = jr.normal(jr.key(1), (BATCH, T, 1))
    layers = {name: make(system) for name, make in FORMS.items()}
    mine, theirs = {}, {}

    def all_four():
        for name, layer in layers.items():
            mine[name] = seconds(ours, layer)
            theirs[name] = seconds(usual, layer, inputs)

    benchmark.pedantic(all_four, rounds=1, iterations=1)  # once: compilation is what it is about

    for name, layer in layers.items():
        (time_ours, matrix), (time_usual, sampled) = mine[name], theirs[name]
        assert matrix.shape == sampled.shape == (SIZES[name],) * 2
        assert matrix.dtype == sampled.dtype == np.float64
        values, vectors = np.linalg.eigh(matrix)
        vectors = vectors[:, values > 1e-10 * values[-1]]
        assert vectors.shape[1] == 9
        expected = np.einsum("pi,pq,qi->i", vectors, matrix, vectors)
        measured = np.einsum("pi,pq,qi->i", vectors, sampled, vectors)
        assert np.all(np.abs(measured - expected) < 4 * sampling_errors(layer, vectors))
        print(
            f"\n{name}: {time_ours:.2f} s, the usual way {time_usual:.2f} s: ratio {time_usual / time_ours:.1f}", end=""
        )
    total, usual_total = (sum(seconds for seconds, _ in times.values()) for times in (mine, theirs))
    benchmark.extra_info["ratio"] = usual_total / total
    print(f"\nall four: {total:.2f} s (wanted: at most 10), the usual way {usual_total:.2f} s")
    assert total < 30
