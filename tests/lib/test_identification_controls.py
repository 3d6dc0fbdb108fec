"""The controls of chapter 5: students in other coordinates, Gauss-Newton, effective rates by array."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from scanrnn import curvature, identification
from scanrnn.theory import population_loss

WHERE = {"min_modulus": 0.9, "max_phase": 3.0}
POINT = {"nu0": 0.5, "max_phase": 3.0, "learning_rate": 1e-3, "seed": 3, "teacher_seed": 4}


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes
        yield


def test_rotated_blocks_are_the_dense_network_from_blocks_in_other_coordinates():
    key = jr.key(0)
    turned = identification.rotated_blocks(**WHERE, key=key)
    start = identification.dense_from_blocks(**WHERE, key=jr.split(key)[0])
    kernel = np.asarray(start.impulse_response(40))
    # 40 products of 64 × 64 matrices, each rounding by about 64 ε of what it multiplies
    np.testing.assert_allclose(
        turned.impulse_response(40), kernel, rtol=0, atol=40 * 64 * 2e-16 * float(abs(kernel).max())
    )
    assert np.mean(np.abs(turned.matrix()) < 1e-6) < 0.01
    assert np.mean(start.matrix() == 0) > 0.9
    # a rotation keeps all distances
    np.testing.assert_allclose(jnp.linalg.norm(turned.matrix()), jnp.linalg.norm(start.matrix()), rtol=1e-12)


def test_the_zero_order_hold_student_starts_on_the_ring_with_unit_decay():
    student = identification.zero_order_hold(**WHERE, key=jr.key(1))
    lam = np.asarray(student.eigenvalues())
    assert np.all((np.abs(lam) >= 0.9 - 1e-12) & (np.abs(lam) < 1))
    np.testing.assert_array_equal(student.log_decay, 0)  # Re A = -1
    np.testing.assert_allclose(jnp.exp(student.log_step), -np.log(np.abs(lam)), rtol=1e-9)  # Δ = -log ν


def test_gauss_newton_learns_and_reports_the_loss_of_what_it_learnt():
    run = partial(
        identification.identify_by_gauss_newton,
        student=identification.block_diagonal,
        teacher=identification.fresh,
        steps=40,
        length=30,
        every=10,
    )
    columns = jax.jit(run)(POINT)
    assert columns["curve"].shape == (4,)
    assert np.all(np.diff(columns["curve"]) <= 0)  # a step that does not lower the loss is not taken
    assert columns["final_loss"] <= columns["curve"][-1]
    assert columns["final_loss"] < 1e-3 * columns["zero_loss"]
    assert not columns["diverged"]
    target = identification.fresh(min_modulus=0.5, max_phase=3.0, seed=4).impulse_response(30)
    np.testing.assert_allclose(columns["zero_loss"], population_loss(0 * target, target), rtol=1e-9)


def test_rates_by_array_are_per_base_rate_and_in_the_order_of_the_groups():
    run = partial(
        identification.identify,
        student=identification.lru,
        teacher=identification.fresh,
        steps=60,
        length=20,
        every=20,
        optimizer=identification.constant_adam,
        observe=identification.rates_by_group,
    )
    small, large = (jax.jit(run)(POINT | {"learning_rate": rate}) for rate in (1e-12, 1e-11))
    names = curvature.groups(identification.lru(**WHERE, key=jr.key(0)))
    for kind in ("released", "clean"):
        assert small[kind].shape == (3, len(names), len(identification.SUMMARY))
        # The student all but stands still, so that the ratios are the same. What its steps change is proportional to
        # the rate, and largest where a gradient is close to 0: 0.8 % at a rate of 1e-8, hence 8e-6 here.
        np.testing.assert_allclose(small[kind][1:], large[kind][1:], rtol=1e-4)
        quantiles = np.asarray(small[kind][1:, :, :5])
        assert np.all(np.diff(quantiles, axis=-1) >= 0)
    assert np.all(small["clean"][1:, :, 0] > 0)
    assert np.all(np.abs(small["released"][1:, :, :5]) < 7.28)  # the supremum of the proposition, 7.270
