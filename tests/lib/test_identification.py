"""One run of system identification against the same training written out, and against plain NumPy."""

from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from scanrnn import curvature, identification, theory
from scanrnn.identification import identify
from scanrnn.layers import LinearRNN
from scanrnn.training import train

POINT = {"nu0": 0.9, "max_phase": 1.0, "learning_rate": 1e-3, "seed": 3, "teacher_seed": 5}
WHERE = {"min_modulus": 0.9, "max_phase": 1.0}
STEPS, EVERY, LENGTH = 20, 5, 30


@pytest.fixture(scope="module", autouse=True)
def small_students():
    """What is trained here need not be wide."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identification, "WIDTH", 8)
        yield


DEFAULTS = {
    "student": identification.lru,
    "teacher": identification.fresh,
    "steps": STEPS,
    "length": LENGTH,
    "every": EVERY,
}
fresh = jax.jit(identification.fresh)


@cache
def compiled(**options):
    return jax.jit(partial(identify, **options))


def run(point=POINT, **options):
    """As a sweep runs it: compiled, all numbers of the point traced."""
    return compiled(**(DEFAULTS | options))(point)


def rates(peak, steps=STEPS, floor=1e-7):
    """The cosine from the peak to the floor; before each step."""
    return floor + (peak - floor) * (1 + np.cos(np.pi * np.arange(steps + 1) / steps)) / 2


def by_hand(student, batch):
    """Losses before each step, and the last layer, by a Python loop."""
    system = fresh(**WHERE, seed=5)
    target = system.impulse_response(LENGTH)
    student_key, data_key = jr.split(jr.key(3))
    layer = eqx.filter_jit(student)(**WHERE, key=student_key)

    def loss(layer, k):
        if batch is None:
            weights = 1 - jnp.arange(LENGTH) / LENGTH
            return 0.5 * jnp.sum(weights * (layer.impulse_response(LENGTH) - target)[:, 0, 0] ** 2)
        inputs = jr.normal(jr.fold_in(data_key, k), (batch, LENGTH, 1))
        return jnp.mean(jax.vmap(lambda x: 0.5 * jnp.mean((layer(x) - system.system(x)) ** 2))(inputs))

    @eqx.filter_jit
    def step(layer, state, k, rate):
        value, gradient = eqx.filter_value_and_grad(loss)(layer, k)
        updates, state = unit.update(gradient, state)  # of rate 1, rescaled here
        return value, eqx.apply_updates(layer, jax.tree.map(lambda u: rate * u, updates)), state

    losses, unit = [], optax.adam(1.0)
    with jax.numpy_dtype_promotion("standard"):
        state = unit.init(eqx.filter(layer, eqx.is_inexact_array))
        for k, rate in enumerate(rates(1e-3)[:STEPS]):
            value, layer, state = step(layer, state, jnp.asarray(k), jnp.asarray(rate))
            losses.append(value)
    return np.array(losses), layer, target


STUDENTS = {
    "lru": identification.lru,
    "complex_gamma": identification.complex_gamma,
    "rnn": partial(identification.rnn, width=8),
    "blocks": partial(identification.rnn, width=8, blocks=4),
}


@pytest.mark.parametrize(
    ("name", "batch"), [("lru", None), ("lru", 4), ("rnn", None), ("rnn", 4), ("blocks", None), ("complex_gamma", None)]
)
def test_a_run_is_the_training_written_out(name, batch):
    losses, layer, target = by_hand(STUDENTS[name], batch)
    columns = run(student=STUDENTS[name], batch=batch)
    assert set(columns) == {
        "final_loss",
        "diverged",
        "zero_loss",
        "exact_loss",
        "negative_eigenvalues",
        "curve",
    }
    # Adam divides by the size of the gradient, so its rounding errors count as relative ones: twenty steps of 1e-3
    # with gradients known to 1e-13. A loss of a run and of impulse responses differ by 1e-14 themselves.
    close = partial(np.testing.assert_allclose, rtol=1e-9)
    close(columns["curve"], losses.reshape(-1, EVERY).mean(axis=1))
    assert columns["final_loss"] == columns["curve"][-1]
    assert not columns["diverged"]
    close(columns["exact_loss"], theory.population_loss(layer.impulse_response(LENGTH), target))
    close(columns["zero_loss"], 0.5 * np.sum((1 - np.arange(LENGTH) / LENGTH) * np.asarray(target)[:, 0, 0] ** 2))
    assert columns["curve"].shape == (STEPS // EVERY,)
    # it learns, and sampled losses are not the exact ones
    assert columns["exact_loss"] < losses[0] if batch is None else True
    if batch is not None:
        assert not np.isclose(columns["curve"], run(student=STUDENTS[name])["curve"], rtol=1e-3).any()


def test_the_final_loss_is_that_of_train():
    system = fresh(**WHERE, seed=5)
    target = system.impulse_response(LENGTH)
    start = eqx.filter_jit(identification.lru)(**WHERE, key=jr.split(jr.key(3))[0])
    rate = lambda k: 1e-7 + (1e-3 - 1e-7) * 0.5 * (1 + jnp.cos(jnp.pi * k / STEPS))  # noqa: E731
    trained, _, record = train(
        lambda layer: theory.population_loss(layer.impulse_response(LENGTH), target), start, optax.adam(rate), STEPS
    )
    columns = run()
    np.testing.assert_allclose(columns["final_loss"], np.mean(record.loss[-EVERY:]), rtol=1e-10)
    exact = theory.population_loss(trained.impulse_response(LENGTH), target)
    np.testing.assert_allclose(columns["exact_loss"], exact, rtol=1e-10)


def test_the_same_point_gives_the_same_result_and_another_seed_another():
    columns = run()
    for name, column in run().items():
        np.testing.assert_array_equal(column, columns[name])
    same_teacher, same_student = run(POINT | {"seed": 4}), run(POINT | {"teacher_seed": 6})
    assert same_teacher["zero_loss"] == columns["zero_loss"]
    assert same_student["zero_loss"] != columns["zero_loss"]
    for other in (same_teacher, same_student, run(POINT | {"nu0": 0.91}), run(POINT | {"learning_rate": 2e-3})):
        assert (other["curve"] != columns["curve"]).all()
    # the seed is that of the data too
    sampled, again, other = (run(POINT | {"seed": seed}, batch=2)["curve"] for seed in (3, 3, 4))
    np.testing.assert_array_equal(sampled, again)
    assert (sampled != other).all()


def test_points_side_by_side_agree_with_one_by_one():
    points = {name: jnp.asarray([value] * 2) for name, value in POINT.items()} | {"seed": jnp.array([3, 4])}
    options = {"student": identification.lru, "teacher": identification.fresh, "steps": STEPS, "every": EVERY}
    together = jax.jit(jax.vmap(partial(identify, length=LENGTH, **options)))(points)
    for i, seed in enumerate((3, 4)):
        for name, column in run(POINT | {"seed": seed}).items():
            np.testing.assert_allclose(together[name][i], column, rtol=1e-9)  # Adam, as above


def test_a_run_that_diverges_is_flagged():
    point = {name: jnp.asarray([value] * 2) for name, value in POINT.items()}
    point |= {"learning_rate": jnp.array([1e12, 1e-6])}
    options = {"student": STUDENTS["rnn"], "teacher": identification.fresh, "optimizer": optax.sgd}
    columns = jax.jit(jax.vmap(partial(identify, steps=STEPS, every=EVERY, length=LENGTH, **options)))(point)
    np.testing.assert_array_equal(columns["diverged"], [True, False])
    np.testing.assert_array_equal(np.isnan(columns["final_loss"]), [True, False])
    np.testing.assert_array_equal(np.isfinite(columns["zero_loss"]), True)
    assert np.isfinite(columns["curve"][1]).all()
    assert not np.isfinite(columns["curve"][0]).all()


def test_real_negative_eigenvalues_of_the_teacher_are_counted():
    counts = []
    for seed in range(6):
        matrix = fresh(min_modulus=0.5, max_phase=np.pi, seed=seed).system.matrix()
        lam = np.linalg.eigvals(np.asarray(matrix))
        counts.append(int(np.sum((lam.imag == 0) & (lam.real < 0))))
    assert len(set(counts)) > 1
    # with all phases kept they are still negative; with phases below π/2 none is
    kept = [
        run(POINT | {"nu0": 0.5, "max_phase": np.pi, "teacher_seed": seed})["negative_eigenvalues"] for seed in range(6)
    ]
    assert kept == counts
    assert run(POINT | {"max_phase": 1.0, "teacher_seed": int(np.argmax(counts))})["negative_eigenvalues"] == 0
    assert identification._real_negative(jnp.array([-0.5, -0.5 + 1e-3j, -0.5 - 1e-3j, 0.5, 0.0])) == 1


@pytest.mark.parametrize(("rate", "floor"), [(1e-3, 1e-7), (1e-5, 1e-7), (1e-6, 1e-8), (1e-12, 1e-14)])
def test_the_learning_rate_falls_along_a_cosine(rate, floor):
    seen = run(
        POINT | {"learning_rate": rate},
        every=1,
        observe=lambda layer, state, optimizer, learning_rate: {"rate": learning_rate},
    )["rate"]
    np.testing.assert_allclose(seen, rates(rate, floor=floor)[:-1], rtol=1e-12)
    np.testing.assert_allclose(seen[0], rate, rtol=1e-12)
    assert (np.diff(seen) < 0).all()
    # the optimiser is given the same: plain gradient descent moves by it. One step short of the end it is near the end.
    assert floor < seen[-1] < floor + rate * (np.pi / STEPS) ** 2 / 4 * 1.01


def test_the_optimizer_is_given_the_schedule():
    given = []

    def optimizer(schedule):
        given.append(schedule)
        return optax.sgd(schedule)

    run(optimizer=optimizer, observe=lambda layer, state, chosen, rate: {"rate": rate})
    with jax.numpy_dtype_promotion("standard"):
        # traced with the point's learning rate, so a fresh one, outside of jit
        identify(
            POINT, student=identification.lru, teacher=identification.fresh, steps=STEPS, every=5, optimizer=optimizer
        )
        ends = [float(given[-1](k)) for k in (0, STEPS // 2, STEPS, 10 * STEPS)]
    np.testing.assert_allclose(ends, [1e-3, (1e-3 + 1e-7) / 2, 1e-7, 1e-7], rtol=1e-12)


def test_what_is_observed_comes_along():
    seen = run(
        student=STUDENTS["rnn"],
        observe=lambda layer, state, optimizer, rate: {"weights": layer.recurrent, "count": state[0].count},
    )
    np.testing.assert_array_equal(seen["count"], [0, 5, 10, 15])
    start = STUDENTS["rnn"](**WHERE, key=jr.split(jr.key(3))[0])
    assert seen["weights"].shape == (4, 1, 8, 8)
    np.testing.assert_allclose(seen["weights"][0], start.recurrent, rtol=0, atol=1e-12)
    np.testing.assert_allclose(seen["curve"], run(student=STUDENTS["rnn"])["curve"], rtol=1e-9)


def test_the_observed_rates_are_adam_s():
    columns = run(
        student=STUDENTS["rnn"],
        observe=lambda layer, state, optimizer, rate: (
            identification.rates_of_recurrent_weights(layer, state, optimizer, rate)
            | {"m": state[0].mu.recurrent, "v": state[0].nu.recurrent, "learning_rate": rate}
        ),
    )
    assert set(identification.OBSERVED) < set(columns)
    for e, k in enumerate((0, 5, 10, 15)):
        m, v, rate = (np.asarray(columns[name][e]) for name in ("m", "v", "learning_rate"))
        m, v = 0.9 * m + 0.1, 0.999 * v + 0.001  # as if the next gradient were 1
        released = rate * m / (1 - 0.9 ** (k + 1)) / (np.sqrt(v / (1 - 0.999 ** (k + 1))) + 1e-8)
        expected = 10 ** np.mean(np.log10(np.maximum(released, 0) + 1e-8))
        np.testing.assert_allclose(columns["released_rate"][e], expected, rtol=1e-10)
        np.testing.assert_allclose(columns["negative"][e], np.mean(released <= 0), rtol=1e-14)
        if k:  # before the first step there is no second moment
            correction = 1 - 0.999**k
            clean = rate / (np.sqrt(np.asarray(columns["v"][e]) / correction) + 1e-8)
            expected = 10 ** np.mean(np.log10(clean))
            np.testing.assert_allclose(columns["rate"][e], expected, rtol=1e-10)
    assert curvature is identification.curvature


# --- teachers and students --------------------------------------------------------------------------------------------


def test_teachers():
    one, other = (identification.authors(**WHERE, seed=seed) for seed in (0, 1))
    assert eqx.tree_equal(one, other)
    assert eqx.tree_equal(one, identification.LinearTeacher.released(**WHERE))
    first, again, second = (fresh(**WHERE, seed=seed) for seed in (0, 0, 1))
    assert eqx.tree_equal(first, again)
    assert not eqx.tree_equal(first, second)
    assert first.system.recurrent.shape == one.system.recurrent.shape == (1, 10, 10)


@pytest.fixture
def at_the_paper_s_width(monkeypatch):
    monkeypatch.setattr(identification, "WIDTH", 64)


@pytest.mark.usefixtures("at_the_paper_s_width")
@pytest.mark.parametrize(
    ("name", "parameters", "blocks"),
    [
        ("block_diagonal", 257, 32),
        ("block_diagonal_wide", 513, 64),
        ("dense_from_blocks", 4225, 1),
        ("complex_diagonal", 385, None),
        ("complex_gamma", 449, None),
        ("complex_gamma_released", 449, None),
        ("lru", 449, None),
        ("lru_signed_phase", 449, None),
        ("rnn", 4225, 1),
    ],
)
def test_students_are_the_paper_s(name, parameters, blocks):
    student = eqx.filter_jit(getattr(identification, name))(min_modulus=0.9, max_phase=0.5, key=jr.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(student, eqx.is_inexact_array))) == parameters
    lam = np.asarray(student.eigenvalues())
    assert student.impulse_response(3).shape == (3, 1, 1)
    if blocks is None:
        assert ((np.abs(lam) >= 0.9 - 1e-12) & (np.abs(lam) < 1)).all()
        assert 0.4 < np.abs(np.angle(lam)).max() <= 0.5 + 1e-12
    else:
        assert student.recurrent.shape == (blocks, lam.size // blocks, lam.size // blocks)
        assert np.abs(lam).min() < 0.5  # from modulus 0 on, whatever min_modulus
        assert np.abs(np.angle(lam[np.abs(np.imag(lam)) > 1e-6])).max() <= 0.5


@pytest.mark.usefixtures("at_the_paper_s_width")
def test_how_students_differ():
    start = {"min_modulus": 0.9, "max_phase": 0.5, "key": jr.key(0)}
    blocks, dense = identification.block_diagonal(**start), identification.dense_from_blocks(**start)
    assert isinstance(dense, LinearRNN)
    np.testing.assert_array_equal(dense.matrix(), blocks.matrix())
    np.testing.assert_allclose(dense.impulse_response(40), blocks.impulse_response(40), rtol=0, atol=1e-12)
    plain, gamma, released, signed = (
        getattr(identification, name)(**start)
        for name in ("complex_diagonal", "complex_gamma", "complex_gamma_released", "lru_signed_phase")
    )
    lam = np.asarray(plain.eigenvalues())
    for other in (gamma, released, signed):  # the same draw
        np.testing.assert_allclose(other.eigenvalues(), lam, rtol=0, atol=1e-13)
        np.testing.assert_array_equal(other.input_real, plain.input_real)
    np.testing.assert_allclose(gamma.normalization(lam), np.sqrt(1 - np.abs(lam) ** 2), rtol=1e-11)
    np.testing.assert_allclose(released.normalization(lam), np.sqrt(1 - np.real(lam) ** 2), rtol=1e-11)
    np.testing.assert_allclose(signed.normalization(lam), np.sqrt(1 - np.abs(lam) ** 2), rtol=1e-11)
    assert (np.asarray(signed.parametrization.theta) < 0).any()
