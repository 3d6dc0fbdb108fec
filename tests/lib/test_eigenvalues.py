"""Parametrisations: there and back, the curvature each gives to the loss, where they stay; the ring; normalisers."""

import cmath
import re
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scanrnn.eigenvalues import (
    Cartesian,
    DirectNormalizer,
    Eigenvalues,
    Exponential,
    ExponentialModulus,
    LearnedNormalizer,
    Optimal,
    Polar,
    normalizer,
    ring,
    squash_spectrum,
)
from scanrnn.layers import DiagonalRNN
from scanrnn.recurrence import linear_recurrence
from scanrnn.sensitivity import estimate
from scanrnn.tasks import autoregressive
from scanrnn.theory import one_dim_hessian, one_dim_loss, state_variance

ALL = (Cartesian, Polar, Exponential, ExponentialModulus, Optimal)
parametrizations = pytest.mark.parametrize("parametrization", ALL)

moduli = st.one_of(
    st.floats(1e-6, 1, exclude_max=True),
    st.floats(0.01, 15).map(lambda digits: 1 - 10**-digits),
    st.floats(-6, 0, exclude_max=True).map(lambda digits: 10**digits),
)
phases = st.one_of(
    st.sampled_from((1e-290, -1e-290, 1e-17, -1e-17, np.pi / 2, np.pi, -np.pi)),
    st.floats(-np.pi, np.pi).filter(lambda theta: theta != 0),
)


# --- there and back ---------------------------------------------------------------------------------------------------


@parametrizations
@settings(deadline=None)
@given(nu=moduli, theta=phases)
@example(nu=1 - 2**-53, theta=0.1)
@example(nu=1e-6, theta=3.0)
def test_from_eigenvalues_and_back(parametrization, nu, theta):
    lam = cmath.rect(nu, theta)
    if np.abs(lam) >= 1:  # when rounded
        lam *= 1 - 2**-51
    if parametrization is Exponential and abs(lam.imag) < 1e-300 and lam.real > 0:
        return  # the phase is 0, or such a small number that JAX makes it 0
    module = parametrization.from_eigenvalues(jnp.asarray(lam))
    assert all(jnp.isfinite(leaf) for leaf in jax.tree.leaves(module))
    # relative to |λ|, so that small ones are not let off
    np.testing.assert_allclose(module(), lam, rtol=0, atol=1e-12 * abs(lam))


@pytest.mark.parametrize("parametrization", [Cartesian, Polar, ExponentialModulus, Optimal])
def test_the_phase_zero_and_real_eigenvalues(parametrization):
    lam = jnp.array([0.5, 1e-6, 0.999, -0.3])
    module = parametrization.from_eigenvalues(lam)
    assert jnp.iscomplexobj(module())
    np.testing.assert_allclose(module(), lam, rtol=0, atol=1e-15)


def test_the_parameters_are_what_the_docstrings_say():
    nu, theta = 0.8, -2.5
    lam = jnp.asarray(cmath.rect(nu, theta))
    close = partial(np.testing.assert_allclose, rtol=1e-14)
    cartesian = Cartesian.from_eigenvalues(lam)
    close([cartesian.real, cartesian.imag], [nu * np.cos(theta), nu * np.sin(theta)])
    polar = Polar.from_eigenvalues(lam)
    close([polar.nu, polar.theta], [nu, theta])
    exponential = Exponential.from_eigenvalues(lam)  # phases counted in (0, 2π)
    close([exponential.omega_nu, exponential.omega_theta], [np.log(-np.log(nu)), np.log(theta + 2 * np.pi)])
    signed = ExponentialModulus.from_eigenvalues(lam)
    close([signed.omega_nu, signed.theta], [np.log(-np.log(nu)), theta])
    optimal = Optimal.from_eigenvalues(lam)
    factor = nu * np.sqrt(1 + nu**2) / (1 - nu**2)
    close([optimal.omega_nu, optimal.omega_theta], [np.arctanh(nu), theta * factor])


@parametrizations
@pytest.mark.parametrize("precision", [64, 32])
def test_leaves_are_real_and_keep_shape_and_precision(parametrization, precision):
    dtype, complex_dtype = (jnp.float64, jnp.complex128) if precision == 64 else (jnp.float32, jnp.complex64)
    lam = ring(jr.key(0), 6, min_modulus=0.5, max_modulus=0.999).reshape(2, 3).astype(complex_dtype)
    module = parametrization.from_eigenvalues(lam)
    leaves = jax.tree.leaves(module)
    assert len(leaves) == 2
    assert all(leaf.dtype == dtype and leaf.shape == (2, 3) for leaf in leaves)
    assert module().dtype == complex_dtype
    # in 32 bits the rounding of ω_ν = 6 or θ/(1 - ν) is 2^-22
    np.testing.assert_allclose(module(), lam, rtol=0, atol=1e-12 if precision == 64 else 2e-6)
    with pytest.raises(TypeError, match="abstract"):
        Eigenvalues()  # pyright: ignore[reportAbstractUsage]


@parametrizations
def test_modules_under_transformations(parametrization):
    lam = ring(jr.key(1), 5, min_modulus=0.1, max_modulus=0.99)

    def there_and_back(z):
        return parametrization.from_eigenvalues(z)()

    np.testing.assert_allclose(jax.jit(jax.vmap(there_and_back))(lam), lam, rtol=0, atol=1e-13)

    def distance(module):
        return jnp.sum(jnp.abs(module() - 0.5) ** 2)

    gradient = eqx.filter_grad(distance)(parametrization.from_eigenvalues(lam))
    # the chain rule, with differences of the module for its slope
    module, step = parametrization.from_eigenvalues(lam), 1e-6
    for leaf, of in zip(jax.tree.leaves(gradient), range(2), strict=True):
        up, down = (moved(module, of, sign * step) for sign in (1, -1))
        slope = (up() - down()) / (2 * step)
        expected = 2 * ((lam - 0.5).conj() * slope).real
        np.testing.assert_allclose(leaf, expected, rtol=1e-6, atol=1e-8)  # step² |f'''|, and rounding over the step


def moved(module, leaf, by):
    leaves, structure = jax.tree.flatten(module)
    leaves[leaf] = leaves[leaf] + by
    return jax.tree.unflatten(structure, leaves)


# --- where they stay --------------------------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None)
@given(omega_nu=finite, omega_theta=st.floats(max_value=700, allow_nan=False, allow_infinity=False))
@example(omega_nu=-40.0, omega_theta=0.0)  # exp(-e^-40) is 1 when rounded
@example(omega_nu=-1e300, omega_theta=-1e300)
@example(omega_nu=1e300, omega_theta=700.0)
def test_the_exponential_ones_stay_in_the_disc(omega_nu, omega_theta):
    for dtype in (jnp.float64, jnp.float32):
        # beyond, e^{ω_θ} overflows and the phase is lost
        angle = min(omega_theta, 80.0) if dtype == jnp.float32 else omega_theta
        modulus = jnp.asarray(np.clip(omega_nu, -1e38, 1e38), dtype)
        by_logarithm = Exponential(modulus, jnp.asarray(max(angle, -1e38), dtype))()
        signed = ExponentialModulus(modulus, jnp.asarray(np.clip(omega_theta, -1e3, 1e3), dtype))()
        for lam in (by_logarithm, signed):
            assert jnp.abs(lam) < 1
            assert state_variance(lam) >= 1  # and the theory takes it


@settings(deadline=None)
@given(omega_nu=finite.filter(lambda omega: abs(omega) > 1e-3), omega_theta=st.floats(-1e6, 1e6))
@example(omega_nu=40.0, omega_theta=1.0)  # tanh 40 is 1 when rounded
@example(omega_nu=-800.0, omega_theta=1.0)  # cosh 800 overflows
def test_the_optimal_one_stays_in_the_disc(omega_nu, omega_theta):
    lam = Optimal(jnp.asarray(omega_nu), jnp.asarray(omega_theta))()
    assert jnp.abs(lam) < 1
    assert state_variance(lam) >= 1


def test_the_optimal_one_has_no_phase_at_zero():
    assert jnp.isnan(Optimal(jnp.zeros(()), jnp.ones(()))())


# --- what they do to the loss -----------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def curvature(parametrization, lam):
    """The Hessian in ω of the normalised loss at its minimum, of each λ."""

    def hessian(lam):
        module = parametrization.from_eigenvalues(lam)
        leaves, structure = jax.tree.flatten(module)

        def loss(omega):
            return one_dim_loss(jax.tree.unflatten(structure, list(omega))(), lam, normalized=True)

        return jax.hessian(loss)(jnp.stack(leaves))

    return jax.vmap(hessian)(lam)


def grid():
    """ν from .05 to .9999 and phases all around; (ν, θ), flat."""
    near_one = 1 - np.logspace(-4, np.log10(0.95), 60)
    nu, theta = np.meshgrid(near_one, np.linspace(-np.pi, np.pi, 41))
    return nu.ravel(), theta.ravel()


def test_the_optimal_curvature_is_one_in_the_phase_everywhere_and_in_the_modulus_at_phase_zero():
    nu, theta = grid()
    hessian = curvature(Optimal, jnp.asarray(nu * np.exp(1j * theta)))
    np.testing.assert_allclose(hessian[:, 1, 1], 1.0, rtol=0, atol=1e-6)
    real = hessian[theta == 0]
    assert len(real) == 60
    np.testing.assert_allclose(real, np.broadcast_to(np.eye(2), real.shape), rtol=0, atol=1e-6)


def test_the_optimal_curvature_elsewhere_in_closed_form():
    # θ = ω_θ f(ν) with f = (1 - ν²)/(ν √(1 + ν²)) and dν/dω_ν = 1 - ν², so
    #   ∂θ/∂ω_ν = θ (1 - ν²) d log f/dν = -θ [2ν + (1 - ν²)/ν + ν (1 - ν²)/(1 + ν²)] = -θ (1 + 3ν²)/(ν (1 + ν²)),
    # and at a minimum the Hessian in ω is DᵀHD.
    nu, theta = grid()
    hessian = np.array(curvature(Optimal, jnp.asarray(nu * np.exp(1j * theta))))
    of_phase = nu**2 * (1 + nu**2) / (1 - nu**2) ** 2
    by_nu = -theta * (1 + 3 * nu**2) / (nu * (1 + nu**2))
    by_theta = (1 - nu**2) / (nu * np.sqrt(1 + nu**2))
    np.testing.assert_allclose(hessian[:, 0, 0], 1 + of_phase * by_nu**2, rtol=1e-6)
    np.testing.assert_allclose(hessian[:, 0, 1], of_phase * by_nu * by_theta, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(hessian[:, 1, 0], hessian[:, 0, 1], rtol=1e-9, atol=1e-9)


def test_the_optimal_curvature_at_known_points():
    # from an independent derivation, to the digits given
    at = curvature(Optimal, jnp.asarray(0.99 * np.exp(1j * np.pi / np.array([100, 4]))))
    np.testing.assert_allclose(at[0], [[20.54, -4.42], [-4.42, 1]], rtol=0, atol=5e-3)
    np.testing.assert_allclose(at[1], [[12214.6, -110.5], [-110.5, 1]], rtol=0, atol=5e-2)
    assert 1.4e8 < np.linalg.cond(at[1]) < 1.6e8


def test_the_exponential_curvature():
    nu, theta = grid()
    keep = theta > 0
    nu, theta = nu[keep], theta[keep]
    for turn in (0.0, np.pi):  # phases in (0, π] and, beyond π, up to 2π
        angle = np.where(theta + turn < 2 * np.pi - 1e-9, theta + turn, 1.0)
        hessian = curvature(Exponential, jnp.asarray(nu * np.exp(1j * angle)))
        np.testing.assert_allclose(hessian[:, 0, 0], (nu * np.log(nu) / (1 - nu**2)) ** 2, rtol=1e-6)
        of_phase = angle**2 * nu**2 * (1 + nu**2) / (1 - nu**2) ** 2
        np.testing.assert_allclose(hessian[:, 1, 1], of_phase, rtol=1e-6)
        # zero, beside the geometric mean of the two
        scale = np.sqrt(hessian[:, 0, 0] * hessian[:, 1, 1])
        np.testing.assert_allclose(hessian[:, 0, 1] / scale, 0.0, rtol=0, atol=1e-6)
    np.testing.assert_allclose(hessian[nu.argmax(), 0, 0], 1 / 4, rtol=1e-3)  # ν → 1


def test_the_polar_curvature_is_the_library_s():
    nu, theta = grid()
    lam = jnp.asarray(nu * np.exp(1j * theta))
    expected = one_dim_hessian(lam, normalized=True)
    scale = np.sqrt(np.array(expected[:, 0, 0] * expected[:, 1, 1]))[:, None, None]
    np.testing.assert_allclose(curvature(Polar, lam) / scale, expected / scale, rtol=1e-6, atol=1e-6)


def test_the_curvature_of_a_signed_phase_is_the_exponential_one_in_the_modulus_and_the_polar_one_in_the_phase():
    nu, theta = grid()
    hessian = curvature(ExponentialModulus, jnp.asarray(nu * np.exp(1j * theta)))
    of_modulus, of_phase = (nu * np.log(nu) / (1 - nu**2)) ** 2, nu**2 * (1 + nu**2) / (1 - nu**2) ** 2
    np.testing.assert_allclose(hessian[:, 0, 0], of_modulus, rtol=1e-6)
    np.testing.assert_allclose(hessian[:, 1, 1], of_phase, rtol=1e-6)
    np.testing.assert_allclose(hessian[:, 0, 1] / np.sqrt(of_modulus * of_phase), 0.0, rtol=0, atol=1e-6)


# --- the ring ---------------------------------------------------------------------------------------------------------


def kolmogorov_smirnov(samples):
    """√n times the largest distance of the empirical distribution from the uniform one on [0, 1]."""
    n, ordered = len(samples), np.sort(samples)
    k = np.arange(n)
    return np.sqrt(n) * max((ordered - k / n).max(), ((k + 1) / n - ordered).max())


@pytest.mark.parametrize(
    ("low", "high", "max_phase"), [(0.9, 0.99, np.pi), (0.0, 1.0, np.pi), (0.5, 0.6, 0.1), (0.99, 1.0, np.pi / 50)]
)
def test_the_ring_is_filled_uniformly(low, high, max_phase):
    n = 20_000
    lam = ring(jr.key(0), n, min_modulus=low, max_modulus=high, max_phase=max_phase)
    assert lam.shape == (n,)
    nu, theta = np.abs(lam), np.angle(lam)
    assert (nu >= low * (1 - 1e-15)).all()
    assert (nu <= high * (1 + 1e-15)).all()
    assert (nu < 1).all()
    assert (abs(theta) <= max_phase * (1 + 1e-12)).all()
    # Area below ν and angle below θ are uniform: P(√n D > 3) < 2 exp(-2 · 3²) = 3e-8.
    area, angle = (nu**2 - low**2) / (high**2 - low**2), (theta / max_phase + 1) / 2
    assert kolmogorov_smirnov(area) < 3
    assert kolmogorov_smirnov(angle) < 3
    assert kolmogorov_smirnov((nu - low) / (high - low)) > 3 or high - low < 0.2  # the modulus itself is not
    # and they are independent: √n times a correlation is a standard normal
    assert abs(np.corrcoef(area, angle)[0, 1]) * np.sqrt(n) < 5


def test_the_ring_is_reproducible_and_takes_limits():
    draw = partial(ring, n=7, min_modulus=0.3, max_modulus=0.8)
    np.testing.assert_array_equal(draw(jr.key(3)), draw(jr.key(3)))
    assert (draw(jr.key(3)) != draw(jr.key(4))).all()
    np.testing.assert_allclose(jnp.abs(ring(jr.key(0), 9, min_modulus=0.7, max_modulus=0.7)), 0.7, rtol=1e-15)
    sector = ring(jr.key(0), 9, min_modulus=0.5, max_modulus=1.0, max_phase=0.0)
    np.testing.assert_array_equal(sector.imag, 0.0)
    assert (sector.real >= 0.5).all()
    edge = ring(jr.key(0), 1000, min_modulus=1.0, max_modulus=1.0)  # below 1 even here, so that the theory takes it
    assert (jnp.abs(edge) < 1).all()
    assert jnp.isfinite(state_variance(edge)).all()
    together = jax.jit(jax.vmap(lambda low: ring(jr.key(0), 50, min_modulus=low, max_modulus=0.9)))(
        jnp.array([0.2, 0.8])
    )
    assert (jnp.min(jnp.abs(together), axis=1) > jnp.array([0.2, 0.8])).all()


def test_bad_rings_are_refused():
    with pytest.raises(TypeError, match=r"^n must be an integer, got 3\.0"):
        ring(jr.key(0), 3.0, min_modulus=0.1, max_modulus=0.2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^n must be at least 1, got 0$"):
        ring(jr.key(0), 0, min_modulus=0.1, max_modulus=0.2)
    for high in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match=rf"^max_modulus must be between 0 and 1, got {high}$"):
            ring(jr.key(0), 3, min_modulus=0.0, max_modulus=high)
    for low in (-0.1, 0.6, np.nan):
        with pytest.raises(ValueError, match=rf"^min_modulus must be between 0 and max_modulus = 0\.5, got {low}$"):
            ring(jr.key(0), 3, min_modulus=low, max_modulus=0.5)
    for phase in (-0.1, 3.2, np.nan):
        with pytest.raises(ValueError, match=rf"^max_phase must be between 0 and π, got {phase}$"):
            ring(jr.key(0), 3, min_modulus=0.1, max_modulus=0.5, max_phase=phase)
    traced = jax.jit(lambda high: ring(jr.key(0), 3, min_modulus=0.6, max_modulus=high))
    assert jnp.isnan(traced(1.1)).all()
    assert jnp.isnan(traced(0.5)).all()
    assert jnp.isfinite(traced(0.7)).all()


# --- a spectrum moved into a ring ------------------------------------------------------------------------------------


def gaussian(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[-1])


squash = jax.jit(squash_spectrum)


def eigensystem(matrix):
    """Eigenvalues, eigenvectors and how much both are amplified by them: the condition of the eigenvectors."""
    lam, vectors = np.linalg.eig(matrix)
    return lam, vectors, np.linalg.cond(vectors)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.sampled_from([1, 2, 3, 8]),
    low=st.floats(0, 1),
    high=st.floats(0, 1),
    max_phase=st.one_of(st.just(np.pi), st.floats(0, np.pi)),
)
@example(seed=0, n=8, low=0.0, high=1.0, max_phase=np.pi)
@example(seed=0, n=8, low=0.99, high=1.0, max_phase=0.0)
def test_eigenvectors_stay_and_eigenvalues_move_by_the_law(seed, n, low, high, max_phase):
    low, high = sorted((low, high))
    matrix = gaussian(seed, n, n)
    lam, vectors, condition = eigensystem(matrix)
    moved = (low + (high - low) * np.tanh(np.abs(lam))) * np.exp(1j * np.angle(lam) * max_phase / np.pi)
    # what no conjugate balances keeps its real part: for a real negative eigenvalue |l'| cos(max_phase)
    moved = np.where(np.imag(lam) == 0, moved.real, moved)
    result = squash(jnp.asarray(matrix), min_modulus=low, max_modulus=high, max_phase=max_phase)
    assert result.dtype == float
    assert result.shape == (n, n)
    # V and l are found with an error of cond(V) n eps, and once more amplified by V⁻¹
    error = np.abs(np.asarray(result) @ vectors - vectors * moved).max()
    assert error < 10 * n * condition**2 * np.finfo(float).eps


def test_moduli_and_phases_after_the_squash():
    matrix = gaussian(1, 200, 12, 12)
    low, high, max_phase = 0.9, 0.95, 1.0
    lam = np.linalg.eigvals(np.asarray(squash(matrix, min_modulus=low, max_modulus=high, max_phase=max_phase)))
    is_complex = np.abs(lam.imag) > 1e-6
    real = lam[~is_complex].real
    assert is_complex.sum() > 1000
    assert len(real) > 200
    # conjugate pairs stay in the ring and in the sector
    moduli, phases = np.abs(lam[is_complex]), np.abs(np.angle(lam[is_complex]))
    assert ((moduli > low - 1e-9) & (moduli < high)).all()
    assert phases.max() < max_phase
    assert (np.sort(lam.imag) + np.sort(lam.imag)[:, ::-1] < 1e-9).all()
    # real ones: positive, and those that were negative shortened by cos(max_phase)
    kept, shortened = real[real > 0.75], real[real < 0.75]
    assert ((kept > low - 1e-9) & (kept < high)).all()
    assert ((shortened > (low - 1e-9) * np.cos(max_phase)) & (shortened < high * np.cos(max_phase))).all()
    assert 0.3 < len(kept) / len(real) < 0.7


def test_the_squash_of_known_matrices():
    close = partial(np.testing.assert_allclose, rtol=0, atol=1e-14)
    tanh = partial(squash_spectrum, min_modulus=0.2, max_modulus=0.7)
    of = lambda modulus: 0.2 + 0.5 * np.tanh(modulus)  # noqa: E731
    close(tanh(jnp.diag(jnp.array([2.0, -0.5, 0.0]))), np.diag([of(2), -of(0.5), of(0)]))
    close(tanh(jnp.diag(jnp.array([2.0, -0.5])), max_phase=1.0), np.diag([of(2), of(0.5) * np.cos(1)]))
    close(tanh(jnp.diag(jnp.array([2.0, -0.5])), max_phase=np.pi / 2), np.diag([of(2), 0]))
    turn = lambda angle: np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])  # noqa: E731
    close(tanh(jnp.asarray(3 * turn(2.0)), max_phase=0.6), of(3) * turn(2 * 0.6 / np.pi))
    # triangular: the eigenvectors (1, 0) and (1, 1) stay, which the transposed matrix does not have
    sheared = tanh(jnp.array([[1.0, 1.0], [0.0, 2.0]]))
    close(sheared, [[of(1), of(2) - of(1)], [0, of(2)]])


def test_a_batch_of_matrices_and_their_precision():
    matrices = gaussian(2, 3, 2, 5, 5)
    together = squash_spectrum(jnp.asarray(matrices), min_modulus=0.3, max_phase=2.0)
    assert together.shape == (3, 2, 5, 5)
    alone = [squash_spectrum(jnp.asarray(m), min_modulus=0.3, max_phase=2.0) for m in matrices.reshape(-1, 5, 5)]
    np.testing.assert_allclose(together.reshape(-1, 5, 5), np.stack(alone), rtol=0, atol=1e-12)
    single = squash_spectrum(jnp.asarray(matrices, jnp.float32), min_modulus=0.3, max_phase=2.0)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, together, rtol=0, atol=1e-4)  # amplified by eigenvectors, twice


def test_a_squash_that_is_not_possible_is_refused():
    matrix = jnp.eye(3)
    for high in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match=rf"^max_modulus must be between 0 and 1, got {high}$"):
            squash_spectrum(matrix, min_modulus=0.0, max_modulus=high)
    for low in (-0.1, 0.6, np.nan):
        with pytest.raises(ValueError, match=rf"^min_modulus must be between 0 and max_modulus = 0\.5, got {low}$"):
            squash_spectrum(matrix, min_modulus=low, max_modulus=0.5)
    for phase in (-0.1, 3.2, np.nan):
        with pytest.raises(ValueError, match=rf"^max_phase must be between 0 and π, got {phase}$"):
            squash_spectrum(matrix, min_modulus=0.0, max_phase=phase)
    for shape in ((3,), (), (3, 2), (3, 3, 2)):
        with pytest.raises(ValueError, match=rf"^matrix must be square, .* got shape {re.escape(str(shape))}$"):
            squash_spectrum(jnp.ones(shape), min_modulus=0.0)
    with pytest.raises(TypeError, match=r"^matrix must be floating point .* got int64$"):
        squash_spectrum(jnp.eye(3, dtype=int), min_modulus=0.0)


def test_a_traced_squash_that_is_not_possible_gives_nan():
    allowed = {"min_modulus": 0.5, "max_modulus": 0.9, "max_phase": 1.0}
    assert jnp.isfinite(squash(jnp.asarray(gaussian(3, 4, 4)), **allowed)).all()
    for name, values in {
        "min_modulus": (-0.1, 0.95, np.nan),
        "max_modulus": (0.4, 1.1, np.nan),
        "max_phase": (-0.1, 3.2, np.nan),
    }.items():
        for value in values:
            assert jnp.isnan(squash(jnp.asarray(gaussian(3, 4, 4)), **(allowed | {name: value}))).all(), (name, value)


# --- normalisers ------------------------------------------------------------------------------------------------------


def test_the_normalizer_gives_the_state_unit_variance():
    lam, rho = ring(jr.key(0), 20, min_modulus=0.0, max_modulus=0.9999)[:, None], jnp.array([0.0, 0.9, 1.0])
    gamma = normalizer(lam, rho)
    assert gamma.shape == (20, 3)
    # 1 - |λ|² >= 2e-4 is found with an error of a few roundings
    np.testing.assert_allclose(gamma**2 * state_variance(lam, rho), 1.0, rtol=1e-14)
    np.testing.assert_allclose(gamma[:, 0], jnp.sqrt(1 - jnp.abs(lam[:, 0]) ** 2), rtol=1e-11)
    np.testing.assert_allclose(gamma[:, 2], jnp.abs(1 - lam[:, 0]), rtol=1e-11)
    np.testing.assert_array_equal(normalizer(lam), gamma[:, :1])  # white input if not said


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_a_normalized_state_has_unit_variance_when_simulated(rho):
    units, lam = 8_000, cmath.rect(0.9, 0.4)
    states = linear_recurrence(jnp.full(units, lam), autoregressive(jr.key(0), 200, rho, (units,)))
    mean, standard_error = estimate(normalizer(lam, rho) ** 2 * jnp.abs(states[-1]) ** 2)
    assert abs(mean - 1) < 4 * standard_error


def test_a_learned_normalizer_starts_there_and_then_ignores_the_eigenvalues():
    lam = ring(jr.key(0), 5, min_modulus=0.5, max_modulus=0.99)
    for rho in (0.0, 0.9):
        module = LearnedNormalizer.from_eigenvalues(lam, rho)
        assert [leaf.dtype for leaf in jax.tree.leaves(module)] == [jnp.float64]
        np.testing.assert_allclose(module(lam), normalizer(lam, rho), rtol=1e-14)
        np.testing.assert_array_equal(module(0 * lam), module(lam))
    gradient = jax.grad(lambda x: jnp.sum(LearnedNormalizer.from_eigenvalues(lam)(x * lam)))(1.0)
    assert gradient == 0
    # tied, it is not: dγ/dν = -ν/γ
    tied = jax.grad(lambda nu: normalizer(nu))(0.6)
    np.testing.assert_allclose(tied, -0.6 / 0.8, rtol=1e-14)


def test_a_direct_normalizer_is_its_parameter_and_ignores_the_eigenvalues():
    lam, gamma = ring(jr.key(0), 5, min_modulus=0.5, max_modulus=0.99), jnp.array([0.5, -0.5, 0.0, 2.0, 1e-9])
    module = DirectNormalizer(gamma)
    np.testing.assert_array_equal(module(lam), gamma)  # also negative
    np.testing.assert_array_equal(module(0 * lam), gamma)
    assert jax.grad(lambda x: jnp.sum(module(x * lam)))(1.0) == 0
    slopes = jax.grad(lambda module: jnp.sum(module(lam) ** 2))(module)
    np.testing.assert_array_equal(slopes.gamma, 2 * gamma)  # γ itself is the parameter, not its logarithm
    # in a layer it scales what each state is given
    plain, scaled = (
        DiagonalRNN(2, 5, 1, eigenvalues=Cartesian.from_eigenvalues(lam), normalization=n, key=jr.key(1))
        for n in (None, module)
    )
    inputs = jr.normal(jr.key(2), (6, 2))
    # relative to each state: products by γ are rounded at another place, six times
    want = np.asarray(gamma) * np.asarray(plain.states(inputs))
    np.testing.assert_allclose(scaled.states(inputs), want, rtol=1e-13, atol=1e-15)


# --- bad input --------------------------------------------------------------------------------------------------------


@parametrizations
@pytest.mark.parametrize("bad", [1.0, -1.0, 2.0, 1j, 0.8 + 0.8j, np.nan, np.inf])
def test_eigenvalues_outside_the_disc_are_refused(parametrization, bad):
    shown = re.escape(str(np.complex128(bad)))
    with pytest.raises(ValueError, match=rf"^lam must be of modulus below 1, got {shown}$"):
        parametrization.from_eigenvalues(jnp.asarray(bad))
    with pytest.raises(ValueError, match=rf"^lam must be .*, got {shown} at index \(1,\)$"):
        parametrization.from_eigenvalues(jnp.asarray(np.array([0.1j, bad])))


def test_where_there_is_no_logarithm_or_no_phase_it_is_an_error():
    for parametrization in (Exponential, ExponentialModulus, Optimal):
        with pytest.raises(ValueError, match=r"^lam must be nonzero, got 0j at index \(1,\)$"):
            parametrization.from_eigenvalues(jnp.array([0.5j, 0.0]))
    for lam in (0.5, 0.5 + 0j, complex(0.5, -0.0)):
        with pytest.raises(ValueError, match=r"^lam must be not real and positive, since the phase 0 has no logarithm"):
            Exponential.from_eigenvalues(jnp.asarray(lam))
    for parametrization in (Cartesian, Polar):
        assert parametrization.from_eigenvalues(jnp.zeros(()))() == 0


@parametrizations
def test_traced_eigenvalues_that_are_not_allowed_give_nan(parametrization):
    lam = jnp.array([0.5j, 1.0, -1.0, 2j, jnp.nan, 0.8 + 0.8j, 0.0, 0.5])
    traced = jnp.isnan(jax.jit(lambda z: parametrization.from_eigenvalues(z)())(lam))
    zero, positive = parametrization not in (Cartesian, Polar), parametrization is Exponential
    np.testing.assert_array_equal(traced, [False, True, True, True, True, True, zero, positive])


@parametrizations
@pytest.mark.parametrize("bad", [0, np.array([0, 1]), True, "0.5", None, [0.1, "b"]])
def test_what_is_not_floating_point_is_refused(parametrization, bad):
    with pytest.raises(TypeError, match=r"^lam must be (floating point|a number or an array of numbers)"):
        parametrization.from_eigenvalues(bad)


def test_normalizers_refuse_what_the_theory_refuses():
    for function in (normalizer, LearnedNormalizer.from_eigenvalues):
        with pytest.raises(ValueError, match=r"^lam must be of modulus below 1, got 1\.0$"):
            function(1.0)
        with pytest.raises(ValueError, match=r"^rho must be in \[0, 1\], got 1\.5$"):
            function(0.5, 1.5)
        with pytest.raises(TypeError, match=r"^lam must be a number"):
            function("0.5")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"lam of shape \(2,\) and rho of shape \(3,\)$"):
        normalizer(jnp.full(2, 0.5), jnp.full(3, 0.5))
    assert jnp.isnan(jax.jit(normalizer)(1.0))
