"""What a step of gradient flossing costs, beside a step of training, at the size of Engelken's runs (2023).

Run by `make bench`; never part of the test suite. 80 units, float32, Adam for both:

- training: 16 sequences of T = 300 bits, the loss, its gradient, clipped, and the update;
- flossing: the 75 leading exponents of a window of 55 steps of which the first 16 are not counted, their loss, the
  gradient through the trajectory, Q and R, and the update.

Both are the library's own loops, `train` and `floss`, of ten steps in a call, compiled before; the calls take turns in
one run. Reported are milliseconds per step, and the ratio of the medians.
"""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

from scanrnn.flossing import bit_loss, clip_each, vanilla
from scanrnn.lyapunov import floss, flossing_loss, lyapunov_exponents
from scanrnn.tasks import delayed_xor, fair_bits
from scanrnn.training import train

N, EXPONENTS, WINDOW, TRANSIENT = 80, 75, 55, 16
LENGTH, BATCH, DELAY, STEPS = 300, 16, 20, 10
WANTED = 2.2


def loss(student, key):
    draw = jax.vmap(lambda k: delayed_xor(k, LENGTH, DELAY))
    return bit_loss(student, *draw(jr.split(key, BATCH)))[0]


descent = optax.chain(clip_each(0.03), optax.adam(1e-3))
adam = optax.adam(1e-3)
window = partial(fair_bits, length=WINDOW)


def training(student):
    return train(loss, student, descent, STEPS, key=jr.key(1))[2]


def flossing(student):
    options = {"num_exponents": EXPONENTS, "steps": STEPS, "transient": TRANSIENT, "optimizer": adam}
    return floss(student.cell, student.initial_states[0], window, key=jr.key(2), **options)[2]


def seconds(function, *arguments):
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def test_a_flossing_step_beside_a_training_step(benchmark):
    student = vanilla(d_hidden=N, batch=BATCH, key=jr.key(0))

    # What is timed must be the steps: compiled, in single precision, and none of them left out.
    record, history = training(student), flossing(student)
    assert record.loss.dtype == history.loss.dtype == jnp.float32
    assert record.steps_taken == history.steps_taken == STEPS
    first = window(jr.fold_in(jr.key(2), 0))
    options: Any = {"num_exponents": EXPONENTS, "transient": TRANSIENT}
    exponents = lyapunov_exponents(student.cell, student.initial_states[0], first, **options)
    # 55 products and decompositions in single precision; the smallest exponents are the least exact
    np.testing.assert_allclose(history.exponents[0], exponents, rtol=0, atol=1e-3)
    np.testing.assert_allclose(history.loss[0], flossing_loss(exponents), rtol=1e-3)

    times = []

    def training_first():  # they take turns, so that a busy moment of the machine meets both
        times.append(seconds(training, student))

    benchmark.pedantic(
        lambda: jax.block_until_ready(flossing(student)),
        setup=training_first,
        rounds=10,
        warmup_rounds=1,
        iterations=1,
    )
    mine, other = benchmark.stats.stats.median / STEPS, float(np.median(times)) / STEPS
    benchmark.extra_info["ratio"] = mine / other
    print(
        f"\na step of flossing {1e3 * mine:.1f} ms, of training {1e3 * other:.1f} ms: ratio {mine / other:.2f} "
        f"(wanted: at most {WANTED})"
    )
    assert mine < 2 * WANTED * other
