"""How fast a student imitates the linear teacher, beside the usual way, at the size of the paper's runs.

Run by `make bench`; never part of the test suite. Width 64, sequences of T = 300 white inputs, Adam, float32.

- A sampled step: the loss of 128 sequences, its gradient and Adam's update. Ours goes through the impulse response, as
  `identify` with `batch`; the usual way runs the network on each sequence: a `lax.scan` over time of the dense
  recurrence, or for the LRU `lax.associative_scan`, as published codes have it. The usual way is given the teacher's
  outputs, which cost it nothing. They take turns in one run, and must have the same gradient.
- A step down the expected loss of 40 runs side by side, as sweeps do it: milliseconds per run and step.
"""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax import lax

from scanrnn import identification, theory
from scanrnn.training import train

BATCH, T, RUNS, STEPS = 128, 300, 40, 25
WHERE = {"min_modulus": 0.99, "max_phase": 0.1}
TARGETS = {"rnn": 0.4, "lru": 0.25}  # milliseconds per run and step


def ours(student, target, inputs, outputs):
    kernel = student.impulse_response(T)
    return jnp.mean(jax.vmap(theory.sampled_loss, (None, None, 0))(kernel, target, inputs))


def scanned(student, inputs):
    """The dense network, step by step."""
    A, B, C, D = student.recurrent[0], student.input_weight, student.output_weight, student.feedthrough

    def step(h, x):
        h = A @ h + B @ x
        return h, C @ h + D @ x

    return lax.scan(step, jnp.zeros(len(A), A.dtype), inputs)[1]


def associative(student, inputs):
    """The LRU as published codes have it."""
    lam = jnp.exp(-jnp.exp(student.parametrization.omega_nu) + 1j * jnp.exp(student.parametrization.omega_theta))
    gamma = jnp.exp(student.normalization.omega_gamma)
    B = (student.input_real + 1j * student.input_imag) * gamma[:, None]
    C = student.output_real + 1j * student.output_imag

    def then(first, second):
        (a1, b1), (a2, b2) = first, second
        return a2 * a1, a2 * b1 + b2

    driven = jax.vmap(lambda x: B @ x.astype(B.dtype))(inputs)
    states = lax.associative_scan(then, (jnp.repeat(lam[None], len(inputs), axis=0), driven))[1]
    return jax.vmap(lambda h, x: (C @ h).real + student.feedthrough @ x)(states, inputs)


STUDENTS = {"rnn": (identification.rnn, scanned), "lru": (identification.lru, associative)}


def single(tree):
    """In float32, whatever JAX's default."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if eqx.is_inexact_array(leaf) else leaf, tree)


def step_of(loss, optimizer):
    @eqx.filter_jit
    def step(student, state, *data):
        value, gradient = eqx.filter_value_and_grad(loss)(student, *data)
        updates, state = optimizer.update(gradient, state)
        return eqx.apply_updates(student, updates), state, value, gradient

    return step


def seconds(function, *arguments):
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


@pytest.fixture(scope="module")
def table():
    rows = []
    yield rows
    if rows:
        print("\n")
    for row in rows:
        print(row)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_sampled_step(benchmark, table, name):
    make, run = STUDENTS[name]
    student = single(make(**WHERE, key=jr.key(0)))
    teacher = single(identification.authors(**WHERE, seed=0))
    inputs = jr.normal(jr.key(1), (BATCH, T, 1), jnp.float32)
    outputs = jax.jit(jax.vmap(teacher.system))(inputs)
    data = teacher.impulse_response(T), inputs, outputs

    def usual(student, target, inputs, outputs):
        predicted = jax.vmap(run, (None, 0))(student, inputs)
        return 0.5 * jnp.mean(jnp.sum((predicted - outputs) ** 2, axis=2))

    optimizer = optax.adam(1e-3)
    state = optimizer.init(eqx.filter(student, eqx.is_inexact_array))
    step, rival = step_of(ours, optimizer), step_of(usual, optimizer)

    # What is compared must compute the same: both round for T steps, in single precision.
    tolerance = 8 * T * np.finfo(np.float32).eps
    (*_, value, gradient), (*_, expected, want) = step(student, state, *data), rival(student, state, *data)
    assert abs(value - expected) <= tolerance * abs(expected)
    for got, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(want), strict=True):
        assert got.dtype == wanted.dtype == jnp.float32
        assert jnp.max(jnp.abs(got - wanted)) <= tolerance * jnp.max(jnp.abs(wanted))

    times = []

    def rival_first():  # they take turns, so that a busy moment of the machine meets both
        times.append(seconds(rival, student, state, *data))

    benchmark.pedantic(
        lambda: jax.block_until_ready(step(student, state, *data)),
        setup=rival_first,
        rounds=10,
        warmup_rounds=2,
        iterations=1,
    )
    mine, theirs = benchmark.stats.stats.median, float(np.median(times))
    benchmark.extra_info["ratio"] = theirs / mine
    table.append(
        f"{name}: a sampled step {1e3 * mine:.2f} ms, the usual way {1e3 * theirs:.2f} ms: ratio {theirs / mine:.1f}"
    )
    assert mine < theirs


@pytest.mark.parametrize("name", STUDENTS)
def test_exact_steps_of_many_runs(benchmark, table, name):
    make, _ = STUDENTS[name]
    teacher = single(identification.authors(**WHERE, seed=0))
    target = teacher.impulse_response(T)
    students = single(eqx.filter_jit(eqx.filter_vmap(lambda key: make(**WHERE, key=key)))(jr.split(jr.key(0), RUNS)))

    def loss(student):
        return theory.population_loss(student.impulse_response(T), target)

    @eqx.filter_jit
    @eqx.filter_vmap
    def descent(student):
        return train(loss, student, optax.adam(1e-5), STEPS)[2]  # so slow that none explodes

    record = descent(students)
    assert record.loss.dtype == jnp.float32
    np.testing.assert_array_equal(record.steps_taken, np.full(RUNS, STEPS))
    assert np.mean(record.loss[:, -1]) < np.mean(record.loss[:, 0])
    benchmark.pedantic(lambda: jax.block_until_ready(descent(students)), rounds=5, iterations=1)
    each = 1e3 * benchmark.stats.stats.median / (RUNS * STEPS)
    benchmark.extra_info["milliseconds per run and step"] = each
    table.append(f"{name}: an exact step {each:.3f} ms per run, {RUNS} of them side by side (wanted: {TARGETS[name]})")
