"""Orthonormalisation against NumPy, JAX's own derivative of the QR decomposition, and finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scanrnn._tangent import orthonormalize

EPS = np.finfo(float).eps
SHAPES = [(6, 3), (4, 4), (5, 1), (1, 1)]  # tall, square, one direction, one number
tall_and_square = pytest.mark.parametrize("shape", SHAPES, ids=str)


def own(matrix):
    """The same by JAX's own rule."""
    q, r = jnp.linalg.qr(matrix)
    return q, jnp.log(jnp.abs(jnp.diagonal(r)))


def draw(seed, shape, scale=1.0):
    """A matrix, a direction in which it moves, and a cotangent of each result."""
    matrix_key, direction_key, q_key, log_key = jr.split(jr.key(seed), 4)
    cotangents = jr.normal(q_key, shape), jr.normal(log_key, shape[1:])
    return scale * jr.normal(matrix_key, shape), scale * jr.normal(direction_key, shape), cotangents


def slack(matrix):
    """How many roundings a derivative may be off: of each factor 1/R some N κ, and of N such products."""
    n, k = matrix.shape
    return 64 * n * k * EPS * np.linalg.cond(matrix) ** 2


@tall_and_square
def test_the_directions_are_orthonormal_and_span_what_they_did(shape):
    for seed in range(10):
        matrix = np.asarray(draw(seed, shape)[0])
        q, logs = map(np.asarray, orthonormalize(jnp.asarray(matrix)))
        assert q.shape == shape
        assert logs.shape == shape[1:]
        np.testing.assert_allclose(q.T @ q, np.eye(shape[1]), rtol=0, atol=8 * shape[0] * EPS)
        r = q.T @ matrix
        size = np.linalg.norm(matrix)
        np.testing.assert_allclose(q @ r, matrix, rtol=0, atol=8 * shape[0] * EPS * size)
        np.testing.assert_allclose(np.tril(r, -1), np.zeros_like(r), rtol=0, atol=8 * shape[0] * EPS * size)
        want = np.log(np.abs(np.diag(np.linalg.qr(matrix)[1])))
        np.testing.assert_allclose(logs, want, rtol=0, atol=8 * shape[0] * EPS * np.linalg.cond(matrix))


# Compiled once for each shape
along = jax.jit(lambda matrix, direction: jax.jvp(orthonormalize, (matrix,), (direction,)))
along_own = jax.jit(lambda matrix, direction: jax.jvp(own, (matrix,), (direction,)))


@tall_and_square
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), power=st.integers(-30, 30))
def test_the_derivative_along_a_direction_is_that_of_the_qr_decomposition(shape, seed, power):
    matrix, direction, _ = draw(seed, shape, 2.0**power)
    got, moved = along(matrix, direction)
    want, expected = along_own(matrix, direction)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)  # signs too: the derivative is of this very decomposition
    for one, other in zip(moved, expected, strict=True):
        assert one.shape == other.shape
        # neither result changes if matrix and direction are scaled, so their sizes are those of ‖dA‖/σ
        size = np.linalg.norm(direction) / np.linalg.norm(matrix, -2)
        np.testing.assert_allclose(one, other, rtol=0, atol=slack(matrix) * size)


@tall_and_square
def test_the_gradient_is_that_of_the_qr_decomposition_under_vmap_and_jit(shape):
    cases = [draw(seed, shape) for seed in range(4)]
    matrices, _, cotangents = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cases)

    def pulled(function):
        return lambda matrix, cotangents: jax.vjp(function, matrix)[1](cotangents)[0]

    one_by_one = jax.jit(pulled(orthonormalize))
    batched = jax.jit(jax.vmap(pulled(orthonormalize)))(matrices, cotangents)
    expected = jax.jit(jax.vmap(pulled(own)))(matrices, cotangents)
    for i, (matrix, direction, both) in enumerate(cases):
        size = sum(np.linalg.norm(cotangent) for cotangent in both) / np.linalg.norm(matrix, -2)
        for got in (one_by_one(matrix, both), batched[i]):
            np.testing.assert_allclose(got, expected[i], rtol=0, atol=slack(matrix) * size)
        # forwards and backwards are transposes of one another
        forwards = sum(jnp.sum(c * moved) for c, moved in zip(both, along(matrix, direction)[1], strict=True))
        tolerance = slack(matrix) * size * np.linalg.norm(direction)
        np.testing.assert_allclose(forwards, jnp.sum(direction * batched[i]), rtol=0, atol=tolerance)
    assert np.abs(expected).min() > 0


@tall_and_square
def test_the_derivative_against_finite_differences(shape):
    step = 1e-6  # central differences: error ~ step² |f'''| + ε |f| / step, near 1e-9 for a condition number of some 10
    for seed in (0, 1, 3):
        matrix, direction, _ = draw(seed, shape)
        assert np.linalg.cond(matrix) < 50
        moved = along(matrix, direction)[1]
        ahead, behind = (orthonormalize(matrix + sign * step * direction) for sign in (1, -1))
        for got, one, other in zip(moved, ahead, behind, strict=True):
            np.testing.assert_allclose(got, (one - other) / (2 * step), rtol=0, atol=1e-6)


def test_the_second_derivative_is_that_of_the_qr_decomposition():
    matrix, direction, cotangents = draw(0, (4, 2))

    def slope(function, matrix):
        return jax.jvp(function, (matrix,), (direction,))[1]

    @jax.jit
    def curvatures(matrix, other):
        return [jax.jvp(partial(slope, f), (matrix,), (other,))[1] for f in (orthonormalize, own)]

    for got, want in zip(*curvatures(matrix, cotangents[0]), strict=True):
        assert np.abs(want).max() > 0.1
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_single_precision_stays_single():
    matrix, direction, _ = (jax.tree.map(lambda leaf: leaf.astype(jnp.float32), x) for x in draw(0, (4, 2)))
    values, moved = along(matrix, direction)
    assert {leaf.dtype for leaf in (*values, *moved)} == {jnp.dtype(jnp.float32)}
