"""One system in many coordinates: the impulse response stays, and each form has the properties that name it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from scanrnn.curvature import concentration, coordinates_for, gauss_newton, groups, residual_jacobian
from scanrnn.eigenvalues import Cartesian, Exponential, ExponentialModulus, LearnedNormalizer, Optimal, Polar
from scanrnn.layers import LRU, S5, LinearRNN
from scanrnn.realizations import (
    balanced,
    change_basis,
    diagonal,
    oscillating_teacher,
    real_blocks,
    rotated,
    zero_order_hold,
)

T = 60


def with_real_eigenvalues() -> LinearRNN:
    """Two inputs, three outputs; the eigenvalues 0.9 e^{±0.5i}, 0.7 and -0.6, in a random basis."""
    pair = 0.9 * np.array([[np.cos(0.5), -np.sin(0.5)], [np.sin(0.5), np.cos(0.5)]])
    blocks = jax.scipy.linalg.block_diag(jnp.array(pair), jnp.array([[0.7]]), jnp.array([[-0.6]]))
    keys = jr.split(jr.key(3), 4)
    basis = jr.normal(keys[0], (4, 4)) + 2 * jnp.eye(4)
    recurrent = basis @ blocks @ jnp.linalg.inv(basis)
    return LinearRNN.from_weights(
        recurrent, jr.normal(keys[1], (4, 2)), jr.normal(keys[2], (3, 4)), jr.normal(keys[3], (3, 2))
    )


SYSTEMS = {
    "oscillating": lambda: oscillating_teacher(jr.key(0), 2),
    "real eigenvalues": with_real_eigenvalues,
    "blocks": lambda: LinearRNN(2, 6, 2, blocks=3, min_modulus=0.5, max_modulus=0.9, key=jr.key(1)),
    "one unit": lambda: LinearRNN.from_weights(
        *(jnp.array([[x]]) for x in (-0.8, 0.5, 2.0, 1.0))  # a single, real eigenvalue
    ),
}
FORMS: dict[str, Any] = {
    "rotated": lambda s: rotated(s, jr.key(7)),
    "sheared": lambda s: change_basis(s, jnp.array(2 * np.eye(len(s.input_weight)) + np.tri(len(s.input_weight)))),
    "balanced": balanced,
    "real blocks": real_blocks,
    "diagonal": diagonal,
    "diagonal, unit eigenvectors": lambda s: diagonal(s, unit_eigenvectors=True),
    "diagonal, normalized": lambda s: diagonal(s, normalized=True),
    "polar": lambda s: diagonal(s, Polar),
    "exponential modulus": lambda s: diagonal(s, ExponentialModulus, normalized=True, unit_eigenvectors=True),
    "optimal": lambda s: diagonal(s, Optimal),
    "zero-order hold": zero_order_hold,
    "zero-order hold, unit eigenvectors": lambda s: zero_order_hold(s, step=0.1, unit_eigenvectors=True),
}
EACH_SYSTEM = pytest.mark.parametrize("system", [make() for make in SYSTEMS.values()], ids=SYSTEMS.keys())
EACH_FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def assert_close(got, wanted, tolerance=1e-9):
    """Beside the largest entry. Bases of condition number 10⁴ would cost that many roundings, twice: 1e-12."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def assert_same_set(got, wanted):
    """Eigenvalues in any order."""
    distance = np.abs(np.asarray(got)[:, None] - np.asarray(wanted)[None])
    assert len(set(distance.argmin(axis=1))) == len(got) == len(wanted)
    assert distance.min(axis=1).max() < 1e-9


@EACH_SYSTEM
@EACH_FORM
def test_the_impulse_response_stays(system, form):
    wanted = system.impulse_response(T)
    other = form(system)
    assert_close(other.impulse_response(T), wanted)
    # and running it gives the same outputs
    inputs = jr.normal(jr.key(2), (20, system.feedthrough.shape[1]))
    assert_close(other(inputs), system(inputs))


@pytest.mark.parametrize("make", [rotated, balanced, real_blocks, diagonal, zero_order_hold])
def test_single_precision_is_kept(make):
    system = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), with_real_eigenvalues())
    other = make(system, jr.key(0)) if make is rotated else make(system)
    assert {leaf.dtype for leaf in jax.tree.leaves(eqx.filter(other, eqx.is_inexact_array))} == {jnp.dtype("float32")}
    assert_close(other.impulse_response(20), system.impulse_response(20), 1e-4)  # 1e-9 times ε₃₂/ε₆₄ were 0.5


# --- dense forms ------------------------------------------------------------------------------------------------------


def residuals(layer):
    """Whose half square is the expected loss per step, but for the teacher, which does not matter to derivatives."""
    weights = jnp.sqrt(1 - jnp.arange(T) / T)
    return weights[:, None, None] * layer.impulse_response(T)


def spectrum(layer):
    return np.linalg.eigvalsh(gauss_newton(residuals, layer))


@EACH_SYSTEM
def test_rotations_keep_the_hessian_s_spectrum_and_singular_values(system):
    system = change_basis(system, jnp.eye(len(system.input_weight)))  # dense, also where it had blocks
    other = rotated(system, jr.key(7))
    assert_close(spectrum(other), spectrum(system), 1e-8)
    assert_close(
        np.linalg.svd(other.matrix(), compute_uv=False), np.linalg.svd(system.matrix(), compute_uv=False), 1e-12
    )
    np.testing.assert_allclose(jnp.sum(other.input_weight**2), jnp.sum(system.input_weight**2), rtol=1e-12)
    if len(system.input_weight) > 1:
        sheared = FORMS["sheared"](system)  # other coordinates do not
        assert np.abs(spectrum(sheared) - spectrum(system)).max() > 0.01 * spectrum(system).max()


def test_rotations_differ_between_keys_and_run_inside_jit():
    system = with_real_eigenvalues()
    one, other = (eqx.filter_jit(rotated)(system, key) for key in jr.split(jr.key(0)))
    assert np.abs(one.recurrent - other.recurrent).max() > 0.01
    assert_close(one.recurrent, rotated(system, jr.split(jr.key(0))[0]).recurrent, 1e-12)


@EACH_SYSTEM
def test_balanced_systems_are_as_easy_to_reach_as_to_see(system):
    def gramians(s):
        matrix, b, c = (np.asarray(x) for x in (s.matrix(), s.input_weight, s.output_weight))
        reach, see, power = np.zeros_like(matrix), np.zeros_like(matrix), np.eye(len(matrix))
        for _ in range(4000):  # 0.993^8000 < 1e-24
            reach, see = reach + power @ b @ b.T @ power.T, see + power.T @ c.T @ c @ power
            power = power @ matrix
        return reach, see

    reach, see = gramians(balanced(system))
    hankel = np.diag(reach)
    assert_close(reach, np.diag(hankel), 1e-9)
    assert_close(see, np.diag(hankel), 1e-9)
    assert np.all(np.diff(hankel) <= 0)
    # Hankel singular values: roots of the eigenvalues of the Gramians' product, in any coordinates
    reach, see = gramians(system)
    expected = np.sort(np.sqrt(np.linalg.eigvals(reach @ see).real))[::-1]
    assert_close(hankel, expected, 1e-9)


@EACH_SYSTEM
def test_real_blocks_are_rotations_times_a_scale(system):
    other = real_blocks(system)
    matrix, n = np.array(other.matrix()), len(system.input_weight)
    assert other.recurrent.shape == (1, n, n)  # dense as a parameter
    found, i = [], 0
    while i < n:
        if i + 1 < n and abs(matrix[i, i + 1]) > 1e-6:
            block = matrix[i : i + 2, i : i + 2]
            a, b = block[0, 0], block[1, 0]
            assert_close(block, np.array([[a, -b], [b, a]]))
            found += [a + 1j * b, a - 1j * b]
            size = 2
        else:
            found += [matrix[i, i]]
            size = 1
        matrix[i : i + size, i : i + size] = 0
        part = slice(i, i + size)
        np.testing.assert_allclose(
            jnp.linalg.norm(other.input_weight[part]), jnp.linalg.norm(other.output_weight[:, part]), rtol=1e-9
        )
        i += size
    assert np.abs(matrix).max() < 1e-9  # nothing beside the blocks
    assert_same_set(np.array(found), system.eigenvalues())


def test_real_eigenvalues_are_single_entries():
    matrix = np.asarray(real_blocks(with_real_eigenvalues()).matrix())
    singles = [i for i in range(4) if np.abs(np.delete(matrix[i], i)).max() < 1e-9]
    assert len(singles) == 2
    np.testing.assert_allclose(np.sort(matrix[singles, singles]), [-0.6, 0.7], rtol=1e-9)


# --- diagonal forms ---------------------------------------------------------------------------------------------------


def weights(layer):
    real = np.asarray(layer.input_real), np.asarray(layer.output_real)
    imag = np.asarray(layer.input_imag), np.asarray(layer.output_imag)
    return real[0] + 1j * imag[0], real[1] + 1j * imag[1]


@EACH_SYSTEM
@pytest.mark.parametrize("parametrization", [Cartesian, Polar])
def test_diagonal_has_one_unit_for_each_eigenvalue(system, parametrization):
    layer = diagonal(system, parametrization)
    assert isinstance(layer.parametrization, parametrization)
    assert layer.normalization is None
    lam = np.asarray(layer.eigenvalues())
    assert_same_set(lam, system.eigenvalues())
    b, c = weights(layer)
    np.testing.assert_allclose(np.linalg.norm(b, axis=1), np.linalg.norm(c, axis=0), rtol=1e-9)
    # pairs stay pairs: units of conjugate eigenvalues have conjugate weights
    for i, j in enumerate(np.argmin(np.abs(lam[:, None] - lam.conj()), axis=1)):
        np.testing.assert_allclose(b[i], b[j].conj(), rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(c[:, i], c[:, j].conj(), rtol=1e-8, atol=1e-9)
    np.testing.assert_array_equal(layer.feedthrough, system.feedthrough)


@EACH_SYSTEM
def test_unit_eigenvectors_are_those_of_the_matrix(system):
    layer = diagonal(system, unit_eigenvectors=True)
    b, c = weights(layer)
    lam, vectors = np.linalg.eig(np.asarray(system.matrix()))
    order = np.argmin(np.abs(np.asarray(layer.eigenvalues())[:, None] - lam), axis=1)
    # up to a phase of each unit
    assert_close(np.abs(c), np.abs(np.asarray(system.output_weight) @ vectors)[:, order])
    assert_close(np.abs(b), np.abs(np.linalg.solve(vectors, np.asarray(system.input_weight)))[order])
    if len(system.input_weight) > 1:
        assert np.abs(np.linalg.norm(b, axis=1) / np.linalg.norm(c, axis=0) - 1).max() > 0.01


def test_normalized_and_exponential_it_is_an_lru_in_kind():
    system = oscillating_teacher(jr.key(0), 2)
    layer = diagonal(system, Exponential, normalized=True)
    published = LRU(1, 4, 1, min_modulus=0.5, max_modulus=0.9, key=jr.key(0))
    assert groups(layer) == groups(published)
    assert sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(layer, eqx.is_inexact_array))) == 29
    normalization: Any = layer.normalization
    assert isinstance(normalization, LearnedNormalizer)
    gamma = np.asarray(normalization(layer.eigenvalues()))
    np.testing.assert_allclose(gamma, np.sqrt(1 - np.abs(layer.eigenvalues()) ** 2), rtol=1e-9)
    # B is divided, so that γB is the plain form's
    plain, (b, c) = diagonal(system), weights(layer)
    assert_close(gamma[:, None] * b, weights(plain)[0])
    assert_close(c, weights(plain)[1])
    assert_close(layer.impulse_response(T), system.impulse_response(T))
    with pytest.raises(ValueError, match="lam must be not real and positive"):
        diagonal(with_real_eigenvalues(), Exponential)


@pytest.mark.parametrize("step", [0.01, 0.3])
@EACH_SYSTEM
def test_zero_order_hold_is_the_diagonal_form_in_continuous_time(system, step):
    layer, plain = zero_order_hold(system, step=step), diagonal(system)
    assert isinstance(layer, S5)
    np.testing.assert_allclose(jnp.exp(layer.log_step), step, rtol=1e-14)
    assert_close(layer.eigenvalues(), np.asarray(plain.eigenvalues()))
    poles = -np.exp(layer.log_decay) + 1j * np.asarray(layer.frequency)
    assert_close(np.exp(step * poles), np.asarray(plain.eigenvalues()))
    b, c = weights(layer)
    held = ((np.exp(step * poles) - 1) / poles)[:, None] * b
    assert_close(held, weights(plain)[0])
    assert_close(2 * c, weights(plain)[1])  # S5 reads twice the real part


@pytest.mark.parametrize("step", [0.0, -0.1, np.inf, np.nan])
def test_steps_that_are_not_positive_are_refused(step):
    with pytest.raises(ValueError, match="step must be positive and finite, got"):
        zero_order_hold(with_real_eigenvalues(), step=step)


# --- the teacher ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [1, 3])
def test_the_teacher_s_eigenvalues_come_in_pairs_on_the_ring(pairs):
    for key in jr.split(jr.key(0), 5):
        teacher = oscillating_teacher(key, pairs)
        n = 2 * pairs
        shapes = [leaf.shape for leaf in jax.tree.leaves(teacher)]
        assert shapes == [(1, n, n), (n, 1), (1, n), (1, 1)]
        lam: Any = np.asarray(teacher.eigenvalues())
        assert np.all((np.abs(lam) > 0.99 - 1e-9) & (np.abs(lam) < 0.993 + 1e-9))
        upper = lam[lam.imag > 0]
        assert len(upper) == pairs
        assert_same_set(lam, np.concatenate([upper, upper.conj()]))


def test_the_teacher_s_law():
    count, low, high = 4000, 0.5, 0.9
    draw = jax.jit(jax.vmap(lambda key: oscillating_teacher(key, 1, min_modulus=low, max_modulus=high)))
    teachers = draw(jr.split(jr.key(1), count))
    lam = np.asarray(jnp.linalg.eigvals(teachers.recurrent[:, 0]))[:, 0]
    u, phase = (np.abs(lam) - low) / (high - low), np.abs(np.angle(lam)) / np.pi
    for uniform in (u, phase):
        # the distribution function, by Kolmogorov: 2 exp(-2 · 2.3²) = 5e-5
        gap = np.abs(np.sort(uniform) - (np.arange(count) + 0.5) / count).max()
        assert gap < 2.3 / np.sqrt(count)
    for weight, variance in ((teachers.input_weight, 1), (teachers.output_weight, 1 / 2), (teachers.feedthrough, 1)):
        squares = np.asarray(weight).reshape(count, -1) ** 2 / variance
        # a square of a Gaussian has the variance 2
        assert abs(squares.mean() - 1) < 4 * np.sqrt(2 / squares.size)
        assert abs(np.mean(weight)) < 4 * np.sqrt(variance / squares.size)
        assert abs(np.mean(squares**2) - 3) < 4 * np.sqrt(96 / squares.size)  # E z⁸ - 9 = 96
    # The real and imaginary part of the rows of U are a Gaussian matrix G with A = G⁻¹RG and R a rotation times ν.
    # |A|² - 2ν² = 4ν² sin²θ sinh²(s) with s the logarithm of G's condition number, and for a Gaussian 2 × 2 matrix
    # P(κ > x) = 2x/(x² + 1), with median 2 + √3.
    sine = np.abs(np.sin(np.angle(lam)))
    excess = np.sum(np.asarray(teachers.recurrent) ** 2, axis=(1, 2, 3)) - 2 * np.abs(lam) ** 2
    condition = np.exp(np.arcsinh(np.sqrt(np.maximum(excess, 0)) / (np.sqrt(2) * np.sqrt(2) * np.abs(lam) * sine)))
    above = np.mean(condition > 2 + np.sqrt(3))
    assert abs(above - 0.5) < 4 * 0.5 / np.sqrt(count)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pairs": 0}, ValueError, "pairs must be at least 1, got 0"),
        ({"pairs": 2.0}, TypeError, "pairs must be an integer"),
        ({"max_modulus": 1.0}, ValueError, r"max_modulus must be at least 0 and below 1, got 1\.0"),
        ({"min_modulus": 0.995}, ValueError, r"min_modulus must be between 0 and max_modulus = 0\.993, got 0\.995"),
        ({"min_modulus": -0.1}, ValueError, r"min_modulus must be between 0"),
    ],
)
def test_teachers_that_cannot_be_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        oscillating_teacher(jr.key(0), **({"pairs": 2} | arguments))


@pytest.mark.parametrize(
    ("basis", "message"),
    [
        (jnp.eye(3), r"basis must have shape \(4, 4\), got \(3, 3\)"),
        (jnp.ones(4), r"basis must have shape \(4, 4\), got \(4,\)"),
        (jnp.ones((4, 4)), "basis must be invertible"),
    ],
)
def test_bases_that_do_not_fit_are_refused(basis, message):
    with pytest.raises(ValueError, match=message):
        change_basis(with_real_eigenvalues(), basis)


def test_systems_that_cannot_be_balanced_are_refused():
    system = with_real_eigenvalues()
    growing = eqx.tree_at(lambda s: s.recurrent, system, 2 * system.recurrent)
    with pytest.raises(ValueError, match=r"\|λ\| of the system must be below 1, got 1\.[248]"):
        balanced(growing)
    for where in (lambda s: s.input_weight, lambda s: s.output_weight):
        with pytest.raises(ValueError, match="all of the state must be reached and seen"):
            balanced(eqx.tree_at(where, system, replace_fn=jnp.zeros_like))


# --- known numbers ----------------------------------------------------------------------------------------------------

# The released notebook's teacher (Zucchet & Orvieto 2024, Fig. 4), and the largest eigenvalues of the Hessian of its
# loss on a batch of 64 sampled sequences of 300 steps, from a re-run of that notebook.
KNOWN_SYSTEM = (
    [
        [-1.4247412550487388, -1.5329170486627648, -0.38871581451957826, 1.2379928998062288],
        [0.007940461682874461, -0.6328705387122632, 0.7550464504272069, 0.9610731194628641],
        [0.11484895897874503, 0.7160967315683567, -0.04868582285477918, 0.8405691757496423],
        [-0.32673464958774767, -1.1527603743610935, -0.217082054050369, 0.02656856269758001],
    ],
    [[0.6721794544389568], [-2.6350841896776593], [1.642194415740619], [0.6193112440755779]],
    [[0.6827156955186438, -0.4191951593030349, 0.2536809405968809, 0.6006502489021232]],
    [[-1.7753179982959968]],
)
LENGTH, BATCH = 300, 64
KNOWN_EIGENVALUES = {
    "dense": (5.436e6, 3.086e6, 1.852e6, 1.448e6, 2.218e5, 914.0, 194.8, 65.42, 0.8201),
    "diagonal": (1.5314e6, 1.1766e6, 6.465e5, 6.452e5, 702.1, 196.7, 187.6, 91.78, 0.8215),
}


def sampling_error(gradient):
    """Of the curvature along one direction on the batch, relative to the expected one.

    `gradient` is ∂κ/∂p along the direction. On inputs x it moves the outputs by Gx, G a Toeplitz matrix, and the
    curvature is |Gx|²/T, whose variance is 2 tr (GᵀG)²/T² for Gaussian x.
    """
    time = np.arange(LENGTH)
    toeplitz = np.where(time[:, None] >= time, gradient[(time[:, None] - time) % LENGTH], 0)
    gram = toeplitz.T @ toeplitz
    return np.sqrt(2 * np.sum(gram**2) / BATCH) / np.trace(gram)


@pytest.mark.parametrize("name", ["dense", "diagonal"])
def test_known_hessians(name):
    system = LinearRNN.from_weights(*map(jnp.array, KNOWN_SYSTEM))
    layer = system if name == "dense" else diagonal(system, unit_eigenvectors=True)
    occurs = jnp.sqrt(1 - jnp.arange(LENGTH) / LENGTH)
    weighted = lambda s: occurs * s.impulse_response(LENGTH)[:, 0, 0]  # noqa: E731
    matrix = gauss_newton(weighted, layer)
    assert matrix.shape == (25, 25)
    lam, vectors = np.linalg.eigh(matrix)
    lam, vectors = lam[::-1], vectors[:, ::-1]
    known = np.array(KNOWN_EIGENVALUES[name])
    np.testing.assert_allclose(lam[:9], known, rtol=0.1)  # about one standard error, see below
    # To first order an eigenvalue moves by the curvature's error along its eigenvector. The second order spreads close
    # eigenvalues apart and lowers the small ones, by less.
    jacobian = np.asarray(residual_jacobian(lambda s: s.impulse_response(LENGTH)[:, 0, 0], layer))
    errors = np.array([sampling_error(jacobian @ vectors[:, i]) for i in range(9)])
    assert np.all((errors[:4] > 0.07) & (errors[:4] < 0.12))  # a long memory: a sequence has few independent parts
    np.testing.assert_allclose(errors[8], np.sqrt(2 / (BATCH * LENGTH)), rtol=0.05)  # the feedthrough's has none
    assert np.all(np.abs(known / lam[:9] - 1) < 3 * errors)
    # rank 2n + 1: what the impulse response depends on, n poles, n residues and the feedthrough
    assert np.sum(lam > 1e-10 * lam[0]) == 9
    counts = np.asarray(coordinates_for(jnp.array(vectors.T[:6])))
    if name == "diagonal":
        np.testing.assert_array_equal(counts, 2)
        assert concentration(matrix) == 2
    else:
        assert np.all(counts >= 5)
        assert concentration(matrix) == counts.mean()


def test_known_hessians_need_the_scaling_of_unit_eigenvectors():
    # How units are scaled does not matter to the directions of λ, but to those of B and C. Where both have the same
    # length, their eigenvectors are spread over both.
    system = LinearRNN.from_weights(*map(jnp.array, KNOWN_SYSTEM))
    occurs = jnp.sqrt(1 - jnp.arange(LENGTH) / LENGTH)
    matrix = gauss_newton(lambda s: occurs * s.impulse_response(LENGTH)[:, 0, 0], diagonal(system))
    lam = np.linalg.eigvalsh(matrix)[::-1][:9]
    np.testing.assert_allclose(lam[:4], KNOWN_EIGENVALUES["diagonal"][:4], rtol=0.1)  # those of λ, which know CB alone
    assert np.all(np.abs(lam[4:8] / KNOWN_EIGENVALUES["diagonal"][4:8] - 1) > 0.5)
    assert concentration(matrix, top=4) == 2
    assert 2.5 < concentration(matrix) < 3.2
