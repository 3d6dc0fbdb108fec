"""One linear unit under another: loss and Hessian against sums, 50-digit arithmetic, autodiff and simulation."""

import cmath
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import mpmath
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from scanrnn.eigenvalues import normalizer
from scanrnn.recurrence import linear_recurrence
from scanrnn.sensitivity import estimate
from scanrnn.theory import one_dim_hessian, one_dim_loss, sensitivity_variance

ROUNDOFF = 2.0**-53  # the largest relative error of one rounding
ROUNDINGS = (
    64  # an upper bound of how many of them pile up in a formula: about 20 operations, complex ones count thrice
)

mp: Any = mpmath.mp.clone()
mp.dps = 50

phases = st.one_of(st.sampled_from((0.0, np.pi / 2, np.pi)), st.floats(-np.pi, np.pi))
normalizations = pytest.mark.parametrize("normalized", [False, True])


def moduli(largest):
    """In [0, largest], the logarithm of 1 - |λ| as often spread evenly as |λ| itself."""
    near = st.floats(0, -np.log10(1 - largest)).map(lambda digits: min(1 - 10**-digits, largest))
    return st.one_of(st.floats(0, largest), near)


def eigenvalues(largest):
    """Real numbers of both signs as floats, others as complex."""
    positive = moduli(largest)
    return st.one_of(positive, positive.map(lambda nu: -nu), st.builds(cmath.rect, positive, phases))


def exact(lam, star, normalized):
    """The loss as in the definition, in 50 digits."""
    lam, star = mp.mpc(lam), mp.mpc(star)
    a, b = 1 - abs(lam) ** 2, 1 - abs(star) ** 2
    common = mp.re(1 / (1 - lam * mp.conj(star)))
    return float(1 - mp.sqrt(a * b) * common if normalized else (1 / a + 1 / b - 2 * common) / 2)


def conditioning(*lams):
    """Relative error: 1 - |λ|² is found with an error of a few roundings, so relative to itself with more."""
    return ROUNDINGS * ROUNDOFF / (1 - max(map(abs, lams)) ** 2)


# --- the loss ---------------------------------------------------------------------------------------------------------


@normalizations
@settings(deadline=None)
@given(lam=eigenvalues(0.98), star=eigenvalues(0.98))
def test_the_loss_equals_the_sum_of_squared_differences(lam, star, normalized):
    assume(abs(lam - star) > 1e-5)  # nearer, the sum itself loses more digits than are asked for
    k = np.arange(1500)  # .98^3000 < 1e-26
    gammas = [np.sqrt(1 - abs(z) ** 2) if normalized else 1.0 for z in (lam, star)]
    expected = 0.5 * np.sum(abs(gammas[0] * lam**k - gammas[1] * star**k) ** 2)
    np.testing.assert_allclose(one_dim_loss(lam, star, normalized=normalized), expected, rtol=1e-9)


@normalizations
@settings(deadline=None, max_examples=200)
@given(star=eigenvalues(0.9999), digits=st.floats(0, 14), direction=phases)
@example(star=0.9999, digits=8.0, direction=0.0)
@example(star=0.0, digits=8.0, direction=0.0)
@example(star=cmath.rect(0.9999, np.pi / 4), digits=8.0, direction=1.0)
def test_the_loss_is_exact_however_close_to_the_minimum(star, digits, direction, normalized):
    lam = star + 10**-digits * cmath.exp(1j * direction)
    assume(lam != star and abs(lam) <= 0.9999)
    expected = exact(lam, star, normalized)
    tolerance = conditioning(lam, star)
    assert tolerance < 1e-9
    np.testing.assert_allclose(one_dim_loss(lam, star, normalized=normalized), expected, rtol=tolerance)


real_eigenvalues = st.builds(
    lambda sign, digits: sign * (1 - max(10**-digits, ROUNDOFF)), st.sampled_from((-1, 1)), st.floats(0, 16)
)


@normalizations
@settings(deadline=None)
@given(lam=real_eigenvalues, star=real_eigenvalues)
def test_real_eigenvalues_lose_nothing_to_rounding(lam, star, normalized):
    # 1 - λ² = (1 - λ)(1 + λ) has no rounding worth naming, so nothing grows as λ → ±1
    close = partial(np.testing.assert_allclose, rtol=ROUNDINGS * ROUNDOFF)
    close(one_dim_loss(lam, star, normalized=normalized), exact(lam, star, normalized), atol=1e-40)  # 50 digits
    x = mp.mpf(lam)
    power = 2 if normalized else 3
    expected = float((1 if normalized else 1 + x**2) / (1 - x**2) ** power)
    close(one_dim_hessian(lam, normalized=normalized)[0, 0], expected)


@normalizations
@settings(deadline=None)
@given(lam=eigenvalues(0.9999), star=eigenvalues(0.9999), turn=phases)
def test_the_loss_is_symmetric_and_does_not_see_a_common_turn(lam, star, turn, normalized):
    loss = partial(one_dim_loss, normalized=normalized)
    value, rotation = loss(lam, star), cmath.exp(1j * turn)
    assert value >= 0
    assert loss(lam, lam) == 0
    assert not normalized or value <= 2  # two unit vectors
    close = partial(np.testing.assert_allclose, rtol=2 * conditioning(lam, star))
    close(loss(star, lam), value)
    close(loss(np.conj(lam), np.conj(star)), value)
    # The turned numbers are rounded, by |λ| ROUNDOFF, which is felt where they almost coincide; L ∝ |λ - λ*|².
    gap = abs(lam - star)
    if gap > 1e-6:
        close(loss(lam * rotation, star * rotation), value, rtol=4 * conditioning(lam, star) + 8 * ROUNDOFF / gap)


@normalizations
@pytest.mark.parametrize(("lam", "star"), [(0.5, 0.9), (cmath.rect(0.9, 0.5), cmath.rect(0.85, 0.2))])
def test_the_loss_is_what_a_simulation_shows(lam, star, normalized):
    steps, units = 200, 8_000  # .9^200 < 1e-9 is left of the start at zero
    inputs = jr.normal(jr.key(0), (steps, units))

    def output(z):
        state = linear_recurrence(jnp.full(units, z), inputs)[-1]
        return state * jnp.asarray(normalizer(z), state.dtype) if normalized else state

    mean, standard_error = estimate(0.5 * jnp.abs(output(lam) - output(star)) ** 2)
    assert abs(mean - one_dim_loss(lam, star, normalized=normalized)) < 4 * standard_error
    assert abs(mean - one_dim_loss(lam, star, normalized=not normalized)) > 4 * standard_error


# Re-run of the released notebook: its figure 1 B, 1 C (λ = λ* e^{iΔθ}) and 6 (first column).
@pytest.mark.parametrize(
    ("lam", "star", "normalized", "expected"),
    [
        (0.999, 0.36, False, 249.13788947282396),
        (0.95, 0.92, False, 0.44690552503052494),
        (0.0, 0.99, False, 24.62562814070348),
        (0.9, 0.99, False, 18.582895161466396),
        (cmath.rect(0.36, 0.031415926535897934), 0.36, False, 0.00010953016847170538),
        (-0.36, 0.36, False, 0.26362793701049825),
        (cmath.rect(0.92, 0.3141592653589793), 0.92, False, 4.678233844944169),
        (cmath.rect(0.99, 0.031415926535897934), 0.99, False, 35.29903575187658),
        (0.5, 0.36, True, 0.014682445037846104),
        (0.9, 0.99, True, 0.43587305909566154),
        (np.exp(-np.exp(-2.0)), 0.99, True, 0.4923223452323692),
        (np.tanh(0.5), 0.36, True, 0.007530971977387058),
    ],
)
def test_known_losses(lam, star, normalized, expected):
    # near the minimum the notebook's own formula loses 4 of its 16 digits
    np.testing.assert_allclose(one_dim_loss(lam, star, normalized=normalized), expected, rtol=1e-11)


# --- its Hessian ------------------------------------------------------------------------------------------------------


def polar_loss(nu, theta, star, normalized):
    return one_dim_loss(jax.lax.complex(nu * jnp.cos(theta), nu * jnp.sin(theta)), star, normalized=normalized)


@partial(jax.jit, static_argnums=2)
def measured_hessian(nu, theta, normalized):
    star = jax.lax.complex(nu * jnp.cos(theta), nu * jnp.sin(theta))
    hessian = jax.hessian(polar_loss, argnums=(0, 1))(nu, theta, star, normalized)
    return jnp.array(hessian)


@normalizations
@settings(deadline=None)
@given(nu=moduli(0.9999), theta=phases)
@example(nu=0.0, theta=0.0)
def test_the_hessian_equals_autodiff_of_the_loss(nu, theta, normalized):
    formula = one_dim_hessian(cmath.rect(nu, theta), normalized=normalized)
    # the formula's error, once more for the loss, which holds the third power of 1 - ν²; beside the largest entry
    atol = 8 * conditioning(nu) * float(jnp.max(formula))
    np.testing.assert_allclose(measured_hessian(nu, theta, normalized), formula, rtol=0, atol=atol)


@settings(deadline=None)
@given(lam=eigenvalues(0.9999))
def test_the_hessian_in_closed_form(lam):
    nu, rest = abs(lam), (1 - abs(lam)) * (1 + abs(lam))
    close = partial(np.testing.assert_allclose, rtol=4 * conditioning(lam), atol=1e-300)
    plain, normalized = one_dim_hessian(lam), one_dim_hessian(lam, normalized=True)
    close(plain, np.diag([1, nu**2]) * (1 + nu**2) / rest**3)
    close(normalized, np.diag([1, nu**2 * (1 + nu**2)]) / rest**2)
    # Gauss-Newton: at a minimum of value 0 the Hessian is the sensitivity
    close(plain[0, 0], sensitivity_variance(lam))


def test_known_hessians():
    # Re-run of the released notebook (its figure 6), which plots π² times the second derivative in the phase.
    def entry(lam, i):
        return one_dim_hessian(lam, normalized=True)[i, i]

    np.testing.assert_allclose(entry(0.92, 1), 66.23980034722219, rtol=1e-12)
    np.testing.assert_allclose(np.pi**2 * entry(0.92, 1), 653.7606250342246, rtol=1e-12)
    np.testing.assert_allclose(np.pi**2 * entry(0.99, 1), 48367.21770024061, rtol=1e-12)
    for lam, expected in ((0.36, 0.1785552302657415), (0.92, 0.24942143033861622)):  # in ω of ν = exp(-e^ω)
        np.testing.assert_allclose(entry(lam, 0) * (lam * np.log(lam)) ** 2, expected, rtol=1e-12)


def test_a_small_step_from_the_minimum_costs_what_the_hessian_says():
    nu, theta = 0.97, 0.7
    star = cmath.rect(nu, theta)
    for normalized in (False, True):
        formula = one_dim_hessian(star, normalized=normalized)
        for step in (np.array([1e-6, 0.0]), np.array([0.0, 1e-6]), np.array([1e-6, -2e-6])):
            loss = one_dim_loss(cmath.rect(nu + step[0], theta + step[1]), star, normalized=normalized)
            # next order: |step|/(1 - ν); and the rounding of λ beside |step|
            np.testing.assert_allclose(loss, 0.5 * step @ formula @ step, rtol=1e-3)


# --- derivatives, transformations and precision -----------------------------------------------------------------------


@normalizations
@pytest.mark.parametrize("precision", [64, 32])
def test_derivatives_at_the_minimum_and_at_zero(precision, normalized):
    dtype, complex_dtype = (jnp.float64, jnp.complex128) if precision == 64 else (jnp.float32, jnp.complex64)
    tolerance = 10 * ROUNDINGS * float(jnp.finfo(dtype).eps) / 2  # 1 - ν² is about .1

    def cartesian(point, star):
        return one_dim_loss(jax.lax.complex(point[0], point[1]), star, normalized=normalized)

    def real(x, star):
        return one_dim_loss(x, star, normalized=normalized)

    gradient, hessian = jax.jit(jax.grad(cartesian)), jax.jit(jax.hessian(cartesian))
    for star in (0.95, 0.0, 0.6 - 0.7j):
        number = jnp.asarray(complex(star), complex_dtype)
        point = jnp.stack([number.real, number.imag])
        assert gradient(point, number).dtype == dtype
        np.testing.assert_array_equal(gradient(point, number), 0.0)
        # Cartesian axes at the phase θ: the polar Hessian, turned, since (dx, dy) is a turn of (dν, ν dθ)
        nu = abs(star)
        polar = np.array(one_dim_hessian(star, normalized=normalized))
        metric = np.diag([polar[0, 0], polar[1, 1] / nu**2]) if nu else np.eye(2) * polar[0, 0]
        c, s = (np.real(star) / nu, np.imag(star) / nu) if nu else (1.0, 0.0)
        turn = np.array([[c, -s], [s, c]])
        expected = turn @ metric @ turn.T
        atol = tolerance * float(abs(expected).max())
        np.testing.assert_allclose(hessian(point, number), expected, rtol=0, atol=atol)
    zero, teacher = jnp.zeros((), dtype), jnp.asarray(0.9, dtype)
    # around λ = 0: L = ½[1 + λ² + 1/B - 2(1 + λλ* + (λλ*)²)] …, and γ = 1 - λ²/2
    b, x = 1 - 0.9**2, 0.9
    slope = -np.sqrt(b) * x if normalized else -x
    curvature = np.sqrt(b) * (1 - 2 * x * x) if normalized else 1 - 2 * x * x
    np.testing.assert_allclose(jax.jit(jax.grad(real))(zero, teacher), slope, rtol=tolerance)
    np.testing.assert_allclose(jax.jit(jax.hessian(real))(zero, teacher), curvature, rtol=tolerance)
    assert real(teacher, 0.5).dtype == real(teacher, 0).dtype == real(teacher, 0.1j).dtype == dtype
    assert one_dim_hessian(teacher, normalized=normalized).dtype == dtype


def test_transformations_change_nothing():
    lam, star = jnp.array([0.3 + 0.1j, -0.9, 0.99j, 0.0]), jnp.array([0.5, 0.99])
    for normalized in (False, True):
        loss = partial(one_dim_loss, normalized=normalized)
        table = loss(lam[:, None], star)
        assert table.shape == (4, 2)
        one_by_one = jax.jit(jax.vmap(jax.vmap(loss, in_axes=(None, 0)), in_axes=(0, None)))(lam, star)
        np.testing.assert_allclose(one_by_one, table, rtol=1e-13)
        hessian = partial(one_dim_hessian, normalized=normalized)
        stacked = hessian(lam.reshape(2, 2))
        assert stacked.shape == (2, 2, 2, 2)
        np.testing.assert_allclose(jax.jit(jax.vmap(hessian))(lam), stacked.reshape(4, 2, 2), rtol=1e-13)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [1.0, -1.0, 1, 2.0, 1j, 0.8 + 0.8j, np.nan, np.inf])
def test_eigenvalues_outside_the_disc_are_refused(bad):
    shown = re.escape(str(bad if isinstance(bad, complex) else float(bad)))
    for function, name in (
        (lambda z: one_dim_loss(z, 0.5), "lam"),
        (lambda z: one_dim_loss(0.5, z), "lam_star"),
        (one_dim_hessian, "lam"),
    ):
        with pytest.raises(ValueError, match=rf"^{name} must be of modulus below 1, got {shown}$"):
            function(bad)
        with pytest.raises(ValueError, match=rf"^{name} must be of modulus below 1, got {shown} at index \(1,\)$"):
            function(np.array([0.1, bad]))


@normalizations
def test_traced_eigenvalues_outside_the_disc_give_nan(normalized):
    real = jnp.array([1.0, -1.0, 2.0, jnp.nan, jnp.inf])
    loss = partial(one_dim_loss, normalized=normalized)
    for function in (lambda z: loss(z, 0.5), partial(loss, 0.5)):
        assert jnp.isnan(jax.jit(function)(jax.lax.complex(0.8 * real, 0.8 * real))).all()
        values, slopes = jax.jit(jax.vmap(jax.value_and_grad(function)))(real)
        assert jnp.isnan(values).all()
        assert jnp.isnan(slopes).all()
    hessian = jax.jit(partial(one_dim_hessian, normalized=normalized))(real)
    assert jnp.isnan(hessian).all()


@pytest.mark.parametrize("bad", ["0.5", True, None, [0.1, "b"]])
def test_what_is_not_a_number_is_refused(bad):
    kind = "(a number or an array of numbers|real or complex numbers), got"
    with pytest.raises(TypeError, match=rf"^lam must be {kind}"):
        one_dim_loss(bad, 0.5)
    with pytest.raises(TypeError, match=rf"^lam_star must be {kind}"):
        one_dim_loss(0.5, bad)
    with pytest.raises(TypeError, match=rf"^lam must be {kind}"):
        one_dim_hessian(bad)


def test_shapes_that_do_not_broadcast_are_named():
    message = r"^lam and lam_star must have shapes that broadcast, got lam of shape \(2,\) and lam_star of shape \(3,\)"
    for loss in (one_dim_loss, jax.jit(one_dim_loss)):
        with pytest.raises(ValueError, match=message):
            loss(jnp.full(2, 0.5), jnp.full(3, 0.5))
