"""The linear recurrence: closed forms against double sums, 50-digit arithmetic, autodiff, simulation and limits."""

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
import scipy.linalg
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scanrnn.recurrence import linear_recurrence
from scanrnn.sensitivity import estimate
from scanrnn.tasks import autoregressive
from scanrnn.theory import (
    hessian_overlap,
    power_spectrum,
    reparametrized_sensitivity,
    sensitivity_variance,
    state_overlap,
    state_variance,
)

ROUNDOFF = 2.0**-53  # the largest relative error of one rounding
ROUNDINGS = (
    64  # an upper bound of how many of them pile up in a formula: about 20 operations, complex ones count thrice
)

mp: Any = mpmath.mp.clone()
mp.dps = 50


# --- where the formulas are tried -------------------------------------------------------------------------------------

CORNERS = (0.0, 1.0, 0.5, 1 - 1e-6, 1 - 1e-12)
rhos = st.one_of(
    st.sampled_from(CORNERS),
    st.floats(0, 1),
    st.floats(0, 16).map(lambda digits: 1 - 10**-digits),
    st.floats(0, 20).map(lambda digits: 10**-digits),
)
phases = st.one_of(st.sampled_from((0.0, np.pi / 4, np.pi / 2, -np.pi / 2, np.pi, 1e-6)), st.floats(-np.pi, np.pi))


def moduli(largest):
    """In [0, largest], the logarithm of 1 - |λ| as often spread evenly as |λ| itself."""
    near = st.floats(0, -np.log10(1 - largest)).map(lambda digits: min(1 - 10**-digits, largest))
    return st.one_of(st.floats(0, largest), near)


def eigenvalues(largest):
    """Real numbers of both signs as floats, others as complex."""
    positive = moduli(largest)
    return st.one_of(positive, positive.map(lambda nu: -nu), st.builds(cmath.rect, positive, phases))


def conditioning(a, b, rho):
    """A bound of the relative error of S, by Σ|terms|, of which |S| is a small part where it almost vanishes.

    1 - p is found with an error of a few roundings, so relative to itself with 1/|1 - p| times as many; it enters as
    its third power. Of the terms, only the two in 1 + p can cancel: |1 + p| is replaced by 2.
    """
    p = a * b
    curly = 2 * abs(1 - rho * p) ** 2 + 2 * rho * abs(p) * abs(1 - a) * abs(1 - b)
    return (rho**2 + (1 - rho) * (1 + rho) * curly / abs(1 - p) ** 3) / abs((1 - rho * a) * (1 - rho * b)) ** 2


# --- against the definition -------------------------------------------------------------------------------------------


def double_sums(a, b, rho):
    """Σ ρ^|k-l| a^k b^l and Σ kl ρ^|k-l| a^{k-1} b^{l-1}, with the sums of the moduli of their terms."""
    largest = max(abs(a), abs(b), 1e-3)
    # What lies beyond K terms is below 2 r^K (K + 1/(1 - r)) / (1 - r)³; S >= 1/16 for conjugate pairs.
    length, rest = 8, 1 - largest
    while 2 * largest**length * (length + 1 / rest) / rest**3 > 1e-12:
        length += length // 4
    k = np.arange(length)
    # Extended precision where the machine has it: for λ = -.98, ρ = 1 eight digits cancel in the sum.
    coupling = scipy.linalg.toeplitz(np.longdouble(rho) ** k)
    powers = [np.cumprod(np.concatenate([[1], np.full(length - 1, z)]).astype(np.clongdouble)) for z in (a, b)]
    values, sizes = [], []
    for weights in (np.ones(length), k + 1):
        left, right = (weights.astype(np.longdouble) * power for power in powers)
        values.append(complex(left @ (coupling @ right.real) + 1j * (left @ (coupling @ right.imag))))
        sizes.append(float(abs(left) @ (coupling @ abs(right))))
    return values, sizes


@settings(deadline=None, max_examples=25)
@given(first=eigenvalues(0.98), second=eigenvalues(0.98), rho=rhos)
@example(first=-0.98, second=0.98, rho=1.0)
@example(first=0.98, second=0.98, rho=1 - 1e-6)
@example(first=cmath.rect(0.98, 1.0), second=cmath.rect(0.98, 1.0), rho=0.9)
def test_closed_forms_equal_the_double_sums(first, second, rho):
    rounding = float(np.finfo(np.longdouble).eps)
    for a, b in ((first, np.conj(first)), (first, second)):
        (overlap, hessian), (overlap_size, hessian_size) = double_sums(a, b, rho)
        np.testing.assert_allclose(state_overlap(a, b, rho), overlap, rtol=1e-9, atol=rounding * overlap_size + 1e-12)
        scale = conditioning(a, b, rho)
        np.testing.assert_allclose(
            hessian_overlap(a, b, rho), hessian, rtol=0, atol=1e-9 * scale + rounding * hessian_size + 1e-12
        )
        if (a, b) == (first, np.conj(first)):  # real and positive
            np.testing.assert_allclose(state_variance(a, rho), overlap.real, rtol=1e-9, atol=rounding * overlap_size)
            np.testing.assert_allclose(
                sensitivity_variance(a, rho), hessian.real, rtol=1e-9, atol=rounding * hessian_size
            )


def exact(a, b, rho):
    """F and ∂α∂β F in 50 digits, the latter from the derivatives of log F: another formula than the library's."""
    a, b, rho = mp.mpc(a), mp.mpc(b), mp.mpf(rho)
    p, q = 1 - a * b, 1 - rho**2 * a * b
    overlap = q / (p * (1 - rho * a) * (1 - rho * b))
    to_a = b / p - rho**2 * b / q + rho / (1 - rho * a)
    to_b = a / p - rho**2 * a / q + rho / (1 - rho * b)
    return overlap, overlap * (to_a * to_b + 1 / p**2 - rho**2 / q**2)


@settings(deadline=None, max_examples=150)
@given(lam=eigenvalues(0.9999), rho=rhos)
@example(lam=0.9999, rho=1 - 1e-12)
@example(lam=cmath.rect(0.9999, np.pi / 2), rho=1 - 1e-6)
@example(lam=-0.9999, rho=1.0)
def test_variances_equal_the_same_in_fifty_digits(lam, rho):
    overlap, hessian = exact(lam, np.conj(lam), rho)
    tolerance = ROUNDINGS * ROUNDOFF / (1 - abs(lam) ** 2)  # see `conditioning`: no terms cancel here
    assert tolerance < 1e-9
    np.testing.assert_allclose(state_variance(lam, rho), float(overlap.real), rtol=tolerance)
    np.testing.assert_allclose(sensitivity_variance(lam, rho), float(hessian.real), rtol=tolerance)


@settings(deadline=None, max_examples=150)
@given(distance=st.floats(1e-16, 1), sign=st.sampled_from((-1, 1)), digits=st.floats(0, 16), rho=rhos)
def test_variances_of_real_eigenvalues_are_exact_to_rounding(distance, sign, digits, rho):
    # 1 - λ² = (1 - λ)(1 + λ) has no rounding worth naming, so nothing grows as λ → ±1
    lam = sign * max(0.0, 1 - distance * 10**-digits - ROUNDOFF)
    overlap, hessian = exact(lam, lam, rho)
    np.testing.assert_allclose(state_variance(lam, rho), float(overlap.real), rtol=ROUNDINGS * ROUNDOFF)
    np.testing.assert_allclose(sensitivity_variance(lam, rho), float(hessian.real), rtol=ROUNDINGS * ROUNDOFF)


@settings(deadline=None, max_examples=150)
@given(first=eigenvalues(0.9999), second=eigenvalues(0.9999), rho=rhos, conjugate=st.floats(-6, 0))
@example(first=0.9999j, second=0.9999j, rho=0.0, conjugate=0.0)  # 1 + p = 2e-4: S almost vanishes
def test_overlaps_of_any_pair_equal_the_same_in_fifty_digits(first, second, rho, conjugate):
    # Pairs near a conjugate one, where S is largest, are rare by chance: move the second one there.
    for other in (second, np.conj(first) * cmath.exp(1j * 10**conjugate)):
        overlap, hessian = exact(first, other, rho)
        tolerance = ROUNDINGS * ROUNDOFF / abs(1 - first * other)
        assert tolerance < 1e-9
        np.testing.assert_allclose(state_overlap(first, other, rho), complex(overlap), rtol=tolerance)
        atol = tolerance * conditioning(first, other, rho)
        np.testing.assert_allclose(hessian_overlap(first, other, rho), complex(hessian), rtol=0, atol=atol)


def generating_function(a, b, rho):
    return (1 - rho**2 * a * b) / ((1 - a * b) * (1 - rho * a) * (1 - rho * b))


def mixed_derivative(function):
    """∂α∂β, complex."""
    to_a = jax.jacfwd(function, argnums=0, holomorphic=True)
    return jax.jit(jax.jacfwd(to_a, argnums=1, holomorphic=True))


DERIVATIVES = [mixed_derivative(f) for f in (generating_function, state_overlap)]


@settings(deadline=None, max_examples=100)
@given(first=eigenvalues(0.98), second=eigenvalues(0.98), rho=rhos)
def test_hessian_overlap_is_the_derivative_of_the_generating_function(first, second, rho):
    arguments = [jnp.asarray(complex(z)) for z in (first, second, rho)]  # strict promotion: one dtype in `jacfwd`
    ours = hessian_overlap(first, second, rho)
    scale = conditioning(first, second, rho)
    np.testing.assert_allclose(DERIVATIVES[0](*arguments), ours, rtol=0, atol=1e-9 * scale)
    np.testing.assert_allclose(DERIVATIVES[1](*arguments[:2], rho), ours, rtol=0, atol=1e-9 * scale)


# --- against simulation -----------------------------------------------------------------------------------------------

# |λ|^250 · 250 < 1e-5: what is left of the start at zero is below a thousandth of the standard error.
STEPS, UNITS = 250, 8_000


@jax.jit
def simulated(key, lam, rho):
    """(h, ∂h/∂λ) of independent units after many steps."""
    inputs = autoregressive(key, STEPS, rho, (UNITS,))
    coefficients = jnp.full(UNITS, lam)
    states, derivatives = jax.jvp(
        lambda a: linear_recurrence(a, inputs), (coefficients,), (jnp.ones_like(coefficients),)
    )
    return states[-1], derivatives[-1]


def deviation(samples, value):
    """In standard errors."""
    mean, standard_error = estimate(samples)
    return abs(mean - value) / standard_error


@pytest.mark.parametrize("rho", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("lam", [0.93, -0.7, cmath.rect(0.92, 0.3)])
def test_variances_are_what_a_simulation_shows(lam, rho):
    state, derivative = simulated(jr.key(0), lam, rho)
    assert deviation(jnp.abs(state) ** 2, state_variance(lam, rho)) < 4
    assert deviation(jnp.abs(derivative) ** 2, sensitivity_variance(lam, rho)) < 4


@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_overlaps_are_what_a_simulation_shows(rho):
    first, second = cmath.rect(0.9, 0.5), cmath.rect(0.8, -0.7)
    runs = [simulated(jr.key(1), lam, rho) for lam in (first, second)]  # the same key: the same inputs
    for (x, y), value in zip(
        zip(*runs, strict=True), (state_overlap(first, second, rho), hessian_overlap(first, second, rho)), strict=True
    ):
        assert deviation((x * y).real, value.real) < 4
        assert deviation((x * y).imag, value.imag) < 4
        assert deviation((x * y.conj()).real, value.real) > 4  # no conjugate is taken


# --- special cases and identities -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(lam=eigenvalues(0.9999), rho=rhos)
def test_limits_of_the_correlation(lam, rho):
    # tolerances: as in `test_variances_equal_the_same_in_fifty_digits`, twice, as both sides are rounded
    squared, distance = abs(lam) ** 2, abs(1 - lam)
    rest = (1 - abs(lam)) * (1 + abs(lam))
    close = partial(np.testing.assert_allclose, rtol=2 * ROUNDINGS * ROUNDOFF / rest)
    close(state_variance(lam), 1 / rest)
    close(sensitivity_variance(lam), (1 + squared) / rest**3)
    close(state_variance(lam, 1.0), distance**-2)
    close(sensitivity_variance(lam, 1.0), distance**-4)
    if isinstance(lam, float):
        close(state_variance(lam, rho), (1 + rho * lam) / ((1 - rho * lam) * rest))
        numerator = (1 + squared) * (1 - squared * rho**2) + 2 * rest * lam * rho
        denominator = rest**3 * (1 - lam * rho) ** 2
        # the terms of the textbook numerator cancel: its error is that of numbers as large as 1
        rounding = 16 * ROUNDOFF / denominator
        relative = 2 * ROUNDINGS * ROUNDOFF / (rest * (1 - abs(lam) * rho))
        close(sensitivity_variance(lam, rho), numerator / denominator, rtol=relative, atol=rounding)


@settings(deadline=None)
@given(first=eigenvalues(0.9999), second=eigenvalues(0.9999), rho=rhos)
def test_symmetry_and_conjugation(first, second, rho):
    tolerance = 2 * ROUNDINGS * ROUNDOFF / abs(1 - first * second)
    for function, scale in (
        (state_overlap, abs(state_overlap(first, second, rho))),
        (hessian_overlap, conditioning(first, second, rho)),
    ):
        value = function(first, second, rho)
        np.testing.assert_allclose(function(second, first, rho), value, rtol=0, atol=tolerance * scale)
        conjugate = function(np.conj(first), np.conj(second), rho)
        np.testing.assert_allclose(conjugate, jnp.conj(value), rtol=0, atol=tolerance * scale)
        assert jnp.iscomplexobj(value) == any(isinstance(z, complex) for z in (first, second))
    tolerance = 2 * ROUNDINGS * ROUNDOFF / (1 - abs(first) ** 2)
    pair = first, np.conj(first), rho
    np.testing.assert_allclose(state_overlap(*pair), state_variance(first, rho), rtol=tolerance)
    np.testing.assert_allclose(hessian_overlap(*pair), sensitivity_variance(first, rho), rtol=tolerance)


def test_white_and_constant_inputs_have_simple_overlaps():
    a, b = jnp.asarray(0.9 + 0.3j), jnp.asarray(-0.2 + 0.7j)
    np.testing.assert_allclose(hessian_overlap(a, b), (1 + a * b) / (1 - a * b) ** 3, rtol=1e-14)
    np.testing.assert_allclose(hessian_overlap(a, b, 1.0), ((1 - a) * (1 - b)) ** -2, rtol=1e-14)
    np.testing.assert_allclose(hessian_overlap(0.0, 0.0, 0.3), 1.0, rtol=1e-14)  # h_t = x_t, ∂h_t = h_{t-1}
    np.testing.assert_allclose(state_overlap(0.0, b, 0.3), 1 / (1 - 0.3 * b), rtol=1e-14)


# Re-run of the released notebook (its figures 1 and 2) or, for the last five, of the exact formula (its figure 8, where
# the notebook's own numerator is wrong; λ0 = .99 e^{iπ/4}).
LAM0 = cmath.rect(0.99, np.pi / 4)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (lambda: state_variance(0.9, 0.9), 50.13850415512468),
        (lambda: state_variance(0.99), 50.25125628140696),
        (lambda: sensitivity_variance(0.5), 2.962962962962963),
        (lambda: sensitivity_variance(0.99, 0.999), 86829526.25014696),
        (lambda: sensitivity_variance(0.9999, 0.999), 495647998018614.6),
        (lambda: sensitivity_variance(0.9999, 1.0), 1e16),
        (lambda: (1 - 0.99**2) * state_variance(0.99, 0.9), 17.348623853211013),
        (lambda: (1 - 0.99**2) * state_variance(0.99, 0.999), 180.9836214740664),
        (lambda: released_figure_2(0.5, 0.9), 1.1801761361167942),
        (lambda: released_figure_2(0.99, 1.0), 197.00834168900053),
        (lambda: released_figure_2(0.9999, 0.9), 9.499041482015866),
        (lambda: abs(hessian_overlap(LAM0, LAM0)), 0.51004898250303),
        (lambda: abs(hessian_overlap(LAM0.conjugate(), LAM0, 0.9)), 88908.95449133757),
        (lambda: abs(hessian_overlap(0.99, LAM0, 0.9)), 129.5882224691049),
        (lambda: abs(hessian_overlap(0.99, LAM0, 0.99)), 4310.793938597089),
        (lambda: abs(hessian_overlap(cmath.rect(0.5, -np.pi / 4), LAM0, 0.999)), 3.2115916310815837),
    ],
)
def test_known_numbers(value, expected):
    np.testing.assert_allclose(
        value(), expected, rtol=1e-9
    )  # the re-run's own formulas cancel: see its 1.0000000000009e16


def released_figure_2(lam, rho):
    """(1 - λ²)(dλ/dω)² E(∂h/∂λ)² for λ = exp(-e^ω), γ held."""
    omega, gamma = jnp.log(-jnp.log(lam)), jnp.sqrt((1 - lam) * (1 + lam))
    return reparametrized_sensitivity(lambda w: (jnp.exp(-jnp.exp(w)), gamma), omega, rho)


# --- the one law behind it --------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(rho=st.floats(0, 0.99), start=st.floats(-10, 10), n=st.sampled_from((1, 2, 3, 7, 32)))
def test_the_power_spectrum_averages_to_the_variance(rho, start, n):
    # The mean over n equally spaced phases θ_j keeps the lags that are multiples of n:
    # Σ_m ρ^|mn| e^{imnθ_0} = S of the process of correlation ρ^n at the phase nθ_0. Its mean, n → ∞, is 1.
    theta = start + 2 * np.pi * np.arange(n) / n
    q = rho**n * cmath.exp(1j * n * start)
    expected = (1 + 2 * q / (1 - q)).real
    # phases up to 20 are rounded to 4e-15, and the slope of log S is at most 2/(1 - ρ)
    tolerance = 1e-13 / (1 - rho)
    np.testing.assert_allclose(jnp.mean(power_spectrum(theta, rho)), expected, rtol=0, atol=tolerance * 2 / (1 - rho))
    fine = 2 * np.pi * np.arange(4096) / 4096  # ρ^4096 < 2e-18
    np.testing.assert_allclose(jnp.mean(power_spectrum(fine, rho)), 1.0, rtol=1e-12)


@settings(deadline=None)
@given(theta=st.floats(-np.pi, np.pi), rho=rhos)
def test_the_power_spectrum_equals_the_same_in_fifty_digits(theta, rho):
    phase, r = mp.mpf(theta), mp.mpf(rho)
    if rho < 1 or abs(theta) > 1e-100:
        expected = (1 - r**2) / abs(1 - r * mp.expj(phase)) ** 2
        np.testing.assert_allclose(power_spectrum(theta, rho), float(expected), rtol=ROUNDINGS * ROUNDOFF)
    np.testing.assert_allclose(power_spectrum(-theta, rho), power_spectrum(theta, rho), rtol=ROUNDINGS * ROUNDOFF)


def test_the_power_spectrum_of_a_constant():
    np.testing.assert_array_equal(power_spectrum(np.array([0.1, 3.0]), 1.0), [0.0, 0.0])
    assert jnp.isnan(power_spectrum(0.0, 1.0))


@settings(deadline=None)
@given(theta=st.floats(-np.pi, np.pi), rho=st.floats(0, 0.99))
def test_near_the_unit_circle_only_the_spectrum_at_the_phase_matters(theta, rho):
    distances = np.array([1e-5, 2e-5, 4e-5])
    lam = (1 - distances) * cmath.exp(1j * theta)
    rest = distances * (2 - distances)
    limit = power_spectrum(theta, rho)
    # Both depend on 1 - |λ| smoothly, on the scale 1 - ρ, so each order of the error is the ratio of the two times the
    # one before, with coefficients of a few units. Rounding: that of 1 - |λ|², see `conditioning`.
    scale = distances / (1 - rho)
    rounding = 3 * ROUNDINGS * ROUNDOFF / rest.min()
    for ratio in (rest * state_variance(lam, rho) / limit, rest**3 * sensitivity_variance(lam, rho) / (2 * limit)):
        error = ratio - 1
        assert (abs(error) < 10 * scale + rounding).all()
        # in proportion: twice the distance, twice the error
        assert (abs(error[1:] - 2 * error[:-1]) < 30 * scale[1:] ** 2 + 3 * rounding).all()


# --- derivatives, transformations and precision -----------------------------------------------------------------------


def moments(x, y, rho):
    """E|h|² and E|∂h|² of λ = x + iy."""
    lam = jax.lax.complex(x, y)
    return jnp.stack([state_variance(lam, rho), sensitivity_variance(lam, rho)])


moment_gradients = jax.jit(jax.jacfwd(moments, argnums=(0, 1, 2)))
moment_hessians = jax.jit(jax.jacfwd(jax.jacrev(moments, argnums=(0, 1, 2)), argnums=(0, 1, 2)))


@settings(deadline=None, max_examples=15)
@given(lam=eigenvalues(0.95), rho=rhos)
@example(lam=0.0, rho=0.5)
@example(lam=0.95, rho=1.0)
@example(lam=0.5, rho=0.0)
def test_first_and_second_derivatives_equal_numerical_ones_in_fifty_digits(lam, rho):
    point = complex(lam).real, complex(lam).imag, rho
    gradients, hessians = np.array(moment_gradients(*point)), np.array(moment_hessians(*point))
    for i in range(2):

        def moment(x, y, r, i=i):
            return exact(mp.mpc(x, y), mp.mpc(x, -y), r)[i].real

        def differentiate(order):
            return float(mp.diff(moment, point, tuple(order)))

        unit = np.eye(3, dtype=int)
        expected = np.array([differentiate(unit[a]) for a in range(3)])
        np.testing.assert_allclose(gradients[:, i], expected, rtol=0, atol=1e-9 * abs(expected).max() + 1e-15)
        expected = np.array([[differentiate(unit[a] + unit[b]) for a in range(3)] for b in range(3)])
        np.testing.assert_allclose(hessians[:, :, i], expected, rtol=0, atol=1e-9 * abs(expected).max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-14), (jnp.float32, 2e-5)])
def test_derivatives_in_both_precisions(dtype, tolerance):
    # tolerances: 30 units in the last place for 64 bits, 150 for 32, where ν = .9 costs a digit
    lam, rho = jnp.asarray(0.9, dtype), jnp.asarray(1.0, dtype)
    close = partial(np.testing.assert_allclose, rtol=tolerance)
    x = float(lam)
    slope, curvature = (
        [jax.jit(d(f)) for f in (state_variance, sensitivity_variance)] for d in (jax.grad, jax.hessian)
    )
    close(slope[0](lam, 0 * rho), 2 * x / (1 - x * x) ** 2, rtol=2 * tolerance)
    close(slope[1](lam, rho), 4 / (1 - x) ** 5, rtol=5 * tolerance)
    close(curvature[0](lam, rho), 6 / (1 - x) ** 4, rtol=5 * tolerance)
    # ∂F/∂ρ at ρ = 0 is Σ_k 2λ^{2k+1} = 2λ/(1 - λ²)
    close(jax.grad(state_variance, argnums=1)(lam, 0 * rho), 2 * x / (1 - x * x), rtol=2 * tolerance)
    zero = jnp.zeros((), dtype)
    close(slope[0](zero, rho), 2.0)
    close(curvature[0](zero, zero), 2.0)
    close(curvature[1](zero, zero), 8.0)  # (1 + λ²)/(1 - λ²)³ = 1 + 4λ² + …
    for function in (state_variance, sensitivity_variance):
        values = (function(lam), function(lam, 0), function(lam, rho), jax.jit(function)(lam, 0.5))
        for value in (*values, function(jax.lax.complex(lam, zero), 0.5)):
            assert value.dtype == dtype
    for function in (state_overlap, hessian_overlap):
        assert function(lam, 0.5).dtype == dtype
        assert function(lam, jax.lax.complex(lam, zero)).dtype == jnp.result_type(jax.lax.complex(lam, zero))
        assert function(lam, 0.5j, 0).dtype == jnp.result_type(jax.lax.complex(lam, zero))
    assert power_spectrum(lam, 0.5).dtype == dtype


def test_transformations_change_nothing():
    lam = jnp.array([0.3 + 0.1j, -0.9, 0.99j, 0.0])
    rho = jnp.array([0.0, 0.5, 1.0])
    for function in (state_variance, sensitivity_variance):
        table = function(lam[:, None], rho)
        assert table.shape == (4, 3)
        assert not jnp.iscomplexobj(table)
        one_by_one = jax.jit(jax.vmap(jax.vmap(function, in_axes=(None, 0)), in_axes=(0, None)))(lam, rho)
        np.testing.assert_allclose(one_by_one, table, rtol=1e-13)
    for function in (state_overlap, hessian_overlap):
        table = function(lam[:, None], lam[:3])
        assert table.shape == (4, 3)
        one_by_one = jax.jit(jax.vmap(jax.vmap(function, in_axes=(None, 0)), in_axes=(0, None)))(lam, lam[:3])
        np.testing.assert_allclose(one_by_one, table, rtol=1e-13)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(power_spectrum))(rho, rho / 2), power_spectrum(rho, rho / 2), rtol=1e-13
    )


# --- other coordinates ------------------------------------------------------------------------------------------------


def decay(omega):
    return jnp.exp(-jnp.exp(omega))


def white_normalizer(lam):
    return jnp.sqrt((1 - lam) * (1 + lam))


# Each as a function of (ω, γ, ρ), compiled once; those that hold γ use it.
gate_tied = jax.jit(
    lambda omega, _, rho: reparametrized_sensitivity(lambda w: (jax.nn.sigmoid(w), jax.nn.sigmoid(-w)), omega, rho)
)
gate_held = jax.jit(
    lambda omega, gamma, rho: reparametrized_sensitivity(lambda w: (jax.nn.sigmoid(w), gamma), omega, rho)
)
lru_tied = jax.jit(
    lambda omega, _, rho: reparametrized_sensitivity(lambda w: (decay(w), white_normalizer(decay(w))), omega, rho)
)
lru_held = jax.jit(lambda omega, gamma, rho: reparametrized_sensitivity(lambda w: (decay(w), gamma), omega, rho))


def test_a_gated_unit_with_its_input_gate_tied_or_held():
    # three digits of an independent derivation, whose Monte-Carlo gave .1125 for the first
    omega = np.log(9.0)  # σ(ω) = .9
    np.testing.assert_allclose(gate_tied(omega, 0.1, 0.9), 0.1131, rtol=0, atol=5e-5)
    np.testing.assert_allclose(gate_held(omega, 0.1, 0.9), 0.304, rtol=0, atol=5e-4)


@settings(deadline=None, max_examples=50)
@given(omega=st.floats(-3, 9), rho=rhos)
def test_a_gate_under_any_input_equals_the_same_in_fifty_digits(omega, rho):
    def overlap(first, second):
        a, b = (1 / (1 + mp.exp(-w)) for w in (first, second))
        return (1 - a) * (1 - b) * exact(a, b, rho)[0].real

    expected = float(mp.diff(overlap, (omega, omega), (1, 1)))
    # For ρ → 1 the gate's two effects cancel (h → x, whatever it does): the error is that of its parts, of which
    # (dλ/dω)² γ² S is the largest. It is λ itself that is rounded here, to ROUNDOFF/(1 - λ) of its distance from 1.
    rest = 1 / (1 + np.exp(omega))
    largest = float(gate_held(omega, rest, rho))
    actual = gate_tied(omega, rest, rho)
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=ROUNDINGS * ROUNDOFF / rest * largest)
    if rho == 1:
        assert expected == pytest.approx(0, abs=1e-30)


@settings(deadline=None)
@given(digits=st.floats(0.1, 4))
def test_the_lru_with_its_normalizer_tied_or_separate(digits):
    lam = 1 - 10**-digits
    omega, held = np.log(-np.log(lam)), white_normalizer(lam)
    # λ is rounded when it is computed from ω, which changes 1 - λ by ROUNDOFF/(1 - λ)
    close = partial(np.testing.assert_allclose, rtol=ROUNDINGS * ROUNDOFF * 10**digits)
    slope = (lam * np.log(lam)) ** 2 / (1 - lam**2) ** 2
    separate, tied = lru_held(omega, held, 0.0), lru_tied(omega, held, 0.0)
    close(separate, slope * (1 + lam**2))
    close(tied, slope)
    # as λ → 1; λ ln λ/(1 - λ²) = -½ (1 - ½(1 - λ) …), so the errors are below 1 - λ
    assert abs(separate - 1 / 2) < 10**-digits
    assert abs(tied - 1 / 4) < 10**-digits


along_modulus = jax.jit(lambda nu, turn, gamma, rho: reparametrized_sensitivity(lambda w: (w * turn, gamma), nu, rho))
along_phase = jax.jit(
    lambda nu, theta, gamma, rho: reparametrized_sensitivity(lambda w: (nu * jnp.exp(1j * w), gamma), theta, rho)
)


@settings(deadline=None, max_examples=50)
@given(nu=moduli(0.9999), theta=phases, gamma=st.floats(0.01, 10), rho=rhos)
def test_with_a_constant_factor_it_is_the_chain_rule(nu, theta, gamma, rho):
    by_lambda = gamma**2 * sensitivity_variance(cmath.rect(nu, theta), rho)
    close = partial(np.testing.assert_allclose, rtol=4 * ROUNDINGS * ROUNDOFF / (1 - nu**2))
    close(along_modulus(nu, cmath.exp(1j * theta), complex(gamma), rho), by_lambda)
    close(along_modulus(nu, cmath.exp(1j * theta), gamma * 1j, rho), by_lambda)  # of γ only |γ| counts
    close(along_phase(nu, theta, gamma, rho), nu**2 * by_lambda)


def spiral(twist, winding):
    """A law whose λ and γ are both complex and both depend on ω."""

    def law(w):
        return jnp.tanh(w) * jnp.exp(1j * twist * w), (1 + w**2) * jnp.exp(1j * winding * w)

    return law


@jax.jit
def spiral_by_formula(omega, twist, winding, rho):
    return reparametrized_sensitivity(spiral(twist, winding), omega, rho)


@jax.jit
def spiral_by_definition(omega, twist, winding, rho):
    law = spiral(twist, winding)

    def covariance(first, second):
        (a, gamma), (b, other) = law(first), law(second)
        return (gamma * other.conj() * generating_function(a, b.conj(), rho)).real

    return jax.jacfwd(jax.jacfwd(covariance, argnums=0), argnums=1)(omega, omega)


@settings(deadline=None, max_examples=50)
@given(omega=st.floats(-1.5, 1.5), twist=st.floats(-2, 2), winding=st.floats(-2, 2), rho=rhos)
@example(omega=1.5, twist=1.0, winding=2.0, rho=0.9)
def test_complex_laws_equal_autodiff_of_the_definition(omega, twist, winding, rho):
    with jax.numpy_dtype_promotion("standard"):  # the law mixes real and complex
        actual = spiral_by_formula(omega, twist, winding, rho)
        expected = spiral_by_definition(omega, twist, winding, rho)
        held = jnp.abs(1 + omega**2) ** 2 * (1 + twist**2) * sensitivity_variance(np.tanh(omega), rho)
    # The terms may cancel, none is larger than about the one in S of a real λ; 1 - |λ|² > .18.
    np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-11 * float(held))


def test_reparametrized_sensitivity_is_what_a_simulation_shows():
    rho = 0.9
    inputs = autoregressive(jr.key(2), STEPS, rho, (UNITS,))

    @partial(jax.jit, static_argnums=0)
    def last_derivative(law, omega):
        def state(w):
            lam, gamma = law(w)
            return linear_recurrence(jnp.broadcast_to(lam, UNITS), gamma * inputs)[-1]

        return jax.jvp(state, (omega,), (jnp.ones(()),))[1]

    def turning(w):
        lam = jax.lax.complex(decay(w) * jnp.cos(1 + w), decay(w) * jnp.sin(1 + w))
        return lam, jnp.sqrt(1 - decay(w) ** 2)

    def gate(w):
        return jax.nn.sigmoid(w), jax.nn.sigmoid(-w)

    def held_gate(w):
        return jax.nn.sigmoid(w), 0.1

    for law, at in ((gate, jnp.log(9.0)), (held_gate, jnp.log(9.0)), (turning, jnp.asarray(-2.5))):
        samples = jnp.abs(last_derivative(law, at)) ** 2
        assert deviation(samples, reparametrized_sensitivity(law, at, rho)) < 4


def test_reparametrized_sensitivity_broadcasts_and_transforms():
    omega, rho = jnp.linspace(-6.0, 1.0, 5)[:, None], jnp.array([0.0, 0.9, 1.0])

    def sensitivity(omega, rho):
        return reparametrized_sensitivity(lambda w: (decay(w), white_normalizer(decay(w))), omega, rho)

    table = sensitivity(omega, rho)
    assert table.shape == (5, 3)
    one_by_one = jax.jit(jax.vmap(jax.vmap(sensitivity, in_axes=(None, 0)), in_axes=(0, None)))(omega[:, 0], rho)
    np.testing.assert_allclose(one_by_one, table, rtol=1e-12)
    # for white input it is λ² ln² λ/(1 - λ²)², as above; its own slope, at λ = 1/e:
    slope = jax.jit(jax.grad(sensitivity))(0.0, 0.0)
    expected = jax.grad(lambda w: (decay(w) * jnp.exp(w) / (1 - decay(w) ** 2)) ** 2)(0.0)
    np.testing.assert_allclose(slope, expected, rtol=1e-13)


# --- bad input --------------------------------------------------------------------------------------------------------

ONE_EIGENVALUE = (state_variance, sensitivity_variance)
TWO_EIGENVALUES = (partial(state_overlap, 0.5), partial(hessian_overlap, 0.5))


@pytest.mark.parametrize("bad", [1.0, -1.0, 1, 2.0, 1j, 0.8 + 0.8j, np.nan, np.inf, complex("nan")])
def test_eigenvalues_outside_the_disc_are_refused(bad):
    for name, functions in (("lam", ONE_EIGENVALUE), ("lam_j", TWO_EIGENVALUES)):
        for function in functions:
            with pytest.raises(ValueError, match=rf"^{name} must be of modulus below 1, got {shown(bad)}$"):
                function(bad)
            with pytest.raises(ValueError, match=rf"^{name} must be .*, got {shown(bad)} at index \(1,\)$"):
                function(np.array([0.1, bad]))
    with pytest.raises(ValueError, match=r"^lam_i must be of modulus below 1"):
        state_overlap(bad, 0.5)
    with pytest.raises(ValueError, match=r"^lam_i must be of modulus below 1"):
        hessian_overlap(bad, 0.5)


def shown(bad):
    return re.escape(str(bad if isinstance(bad, complex) else float(bad)))


def test_traced_eigenvalues_outside_the_disc_give_nan():
    real = jnp.array([1.0, -1.0, 2.0, jnp.nan, jnp.inf])
    for function in (*ONE_EIGENVALUE, *TWO_EIGENVALUES):
        assert jnp.isnan(jax.jit(function)(real)).all()
        assert jnp.isnan(jax.jit(function)(jax.lax.complex(0.8 * real, 0.8 * real))).all()
        values, slopes = jax.jit(jax.vmap(jax.value_and_grad(function)))(real)
        assert jnp.isnan(values).all()
        assert jnp.isnan(slopes).all()
        # and the good ones beside them are not touched
        np.testing.assert_allclose(jax.jit(function)(jnp.array([0.5, 1.0]))[0], function(0.5), rtol=1e-14)


@pytest.mark.parametrize("bad", [-0.1, 1.1, 2, np.nan, np.inf, -1e-300])
def test_correlations_outside_the_interval_are_refused(bad):
    for function in (*(partial(f, 0.5) for f in ONE_EIGENVALUE), *(partial(f, 0.5) for f in TWO_EIGENVALUES)):
        with pytest.raises(ValueError, match=rf"^rho must be in \[0, 1\], got {float(bad)}$"):
            function(bad)
    with pytest.raises(ValueError, match=r"^rho must be in \[0, 1\]"):
        power_spectrum(0.1, bad)
    with pytest.raises(ValueError, match=r"^rho must be in \[0, 1\]"):
        reparametrized_sensitivity(lambda w: (w, 1.0), 0.1, bad)


def test_traced_correlations_outside_the_interval_give_nan():
    bad = jnp.array([-0.1, 1.1, 2.0, jnp.nan, jnp.inf])
    functions = (*ONE_EIGENVALUE, *TWO_EIGENVALUES, power_spectrum)
    for function in (*(partial(f, 0.5) for f in functions), lambda rho: lru_tied(-1.0, 0.0, rho)):
        values, slopes = jax.jit(jax.vmap(jax.value_and_grad(function)))(bad)
        assert jnp.isnan(values).all()
        assert jnp.isnan(slopes).all()


@pytest.mark.parametrize("bad", ["0.5", True, None, [0.1, "b"], np.array([False]), object()])
def test_what_is_not_a_number_is_refused(bad):
    calls = {
        "lam": (state_variance, sensitivity_variance),
        "lam_i": (lambda x: state_overlap(x, 0.5), lambda x: hessian_overlap(x, 0.5)),
        "lam_j": TWO_EIGENVALUES,
        "rho": [partial(f, 0.5) for f in (*ONE_EIGENVALUE, *TWO_EIGENVALUES, power_spectrum)],
        "phase": (lambda x: power_spectrum(x, 0.5),),
        "omega": (lambda x: reparametrized_sensitivity(lambda w: (w, 1.0), x),),
    }
    for name, functions in calls.items():
        for function in functions:
            with pytest.raises(
                TypeError, match=rf"^{name} must be (a number or an array of numbers|real or complex num)"
            ):
                function(bad)


def test_what_must_be_real_is():
    for function in (*(partial(f, 0.5) for f in ONE_EIGENVALUE), *(partial(f, 0.5) for f in TWO_EIGENVALUES)):
        with pytest.raises(TypeError, match=r"^rho must be real, got complex numbers$"):
            function(0.5 + 0j)
    with pytest.raises(TypeError, match=r"^phase must be real, got complex numbers$"):
        power_spectrum(0.1j, 0.5)
    with pytest.raises(TypeError, match=r"^omega must be real, got complex numbers$"):
        reparametrized_sensitivity(lambda w: (w, 1.0), 0.1j)
    with pytest.raises(ValueError, match=r"^phase must be finite, got inf$"):
        power_spectrum(np.inf, 0.5)
    assert jnp.isnan(jax.jit(power_spectrum)(np.inf, 0.5))


def test_shapes_that_do_not_broadcast_are_named():
    two, three = jnp.full(2, 0.5), jnp.full(3, 0.5)
    message = r"must have shapes that broadcast, got .* of shape \(2,\) .*and rho of shape \(3,\)"
    for function in (*ONE_EIGENVALUE, *TWO_EIGENVALUES, power_spectrum):
        for call in (function, jax.jit(function)):
            with pytest.raises(ValueError, match=message):
                call(two, three)
    with pytest.raises(ValueError, match=r"lam_i of shape \(2,\) and lam_j of shape \(3,\)"):
        state_overlap(two, three)
    with pytest.raises(ValueError, match=message):
        reparametrized_sensitivity(lambda w: (w, 1.0), two, three)


def test_laws_that_leave_the_disc_or_return_something_else_are_refused():
    def growing(w):
        return jnp.exp(w), jnp.ones(())

    with pytest.raises(
        ValueError, match=r"^the λ that law returns must be of modulus below 1, got 1\.0 at index \(1,\)$"
    ):
        reparametrized_sensitivity(growing, jnp.array([-1.0, 0.0]))
    traced = jax.jit(lambda w: reparametrized_sensitivity(growing, w))(jnp.array([-1.0, 0.0, 1.0]))
    np.testing.assert_array_equal(jnp.isnan(traced), [False, True, True])
    for law in (lambda w: w, lambda w: (w, None), lambda w: (w, w, w), lambda w: (jnp.full(3, w), w)):
        with pytest.raises(ValueError, match=r"^law must return a pair of numbers \(λ, γ\) for one ω, got shapes"):
            reparametrized_sensitivity(law, 0.5)  # pyright: ignore[reportArgumentType]
