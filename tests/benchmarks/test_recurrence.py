"""How fast the linear recurrence is, beside its peers' way and beside the memory.

Run by `make bench`; never part of the test suite. Per shape (batch, T, N): the value and gradient of mean |h|^2 with
respect to the coefficients, shared by the batch, and the inputs, complex64. Three ways take turns in one run:
`linear_recurrence`; the peers' way, `lax.associative_scan` with JAX's own gradient; and a copy of the inputs, from
which follows the least time that the memory's bandwidth allows.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from scanrnn.recurrence import linear_recurrence

SHAPES = [(1, 1024, 64), (16, 1024, 64), (1, 16384, 64), (8, 4096, 256), (1, 1024, 1024)]
CASES = [(*shape, False) for shape in SHAPES] + [(8, 4096, 64, True)]
# The least that any way must move: inputs read and states written going forward (their gradient needs them), states
# read and the inputs' gradient written going back. A copy reads once and writes once.
COPIES = 2


def peer(coefficients, inputs):
    def then(first, second):
        (a1, b1), (a2, b2) = first, second
        return a2 * a1, a2 * b1 + b2

    return lax.associative_scan(then, (jnp.broadcast_to(coefficients, inputs.shape), inputs))[1]


def value_and_gradient(recurrence):
    def loss(coefficients, inputs):
        states = jax.vmap(recurrence, in_axes=(None, 0))(coefficients, inputs)
        return jnp.mean(states.real**2 + states.imag**2)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def arguments(batch, length, hidden, per_step):
    rng = np.random.default_rng(0)
    shape = (length, hidden) if per_step else (hidden,)
    coefficients = rng.uniform(0.9, 0.999, shape) * np.exp(1j * rng.uniform(-np.pi, np.pi, shape))
    inputs = rng.normal(size=(batch, length, hidden, 2)).view(complex)[..., 0]
    return jnp.asarray(coefficients, jnp.complex64), jnp.asarray(inputs, jnp.complex64)


def seconds(function, *args):
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


@pytest.fixture(scope="module")
def table():
    """Collects the rows and prints them, with the geometric mean, when the module is done."""
    rows = []
    yield rows
    if rows:
        print(f"\n\n{'(batch, T, N)':>18} {'a':>6} {'ours ms':>9} {'peer ms':>9} {'ratio':>6} {'x memory limit':>15}")
        for name, kind, ours, theirs, copy in rows:
            distance = ours / (COPIES * copy)
            print(f"{name:>18} {kind:>6} {1e3 * ours:9.3f} {1e3 * theirs:9.3f} {theirs / ours:6.2f} {distance:15.1f}")
        ratios = [theirs / ours for _, _, ours, theirs, _ in rows]
        mean = np.exp(np.mean(np.log(ratios)))
        print(f"geometric mean {mean:.2f} (wanted: 4), smallest {min(ratios):.2f} (wanted: 2)")


@pytest.mark.parametrize(("batch", "length", "hidden", "per_step"), CASES)
def test_value_and_gradient(benchmark, table, batch, length, hidden, per_step):
    args = arguments(batch, length, hidden, per_step)
    ours, theirs = value_and_gradient(linear_recurrence), value_and_gradient(peer)
    copy = jax.jit(lambda coefficients, inputs: jnp.copy(inputs))
    rivals = {"peer": (theirs, []), "copy": (copy, [])}

    # What is compared must compute the same: both round for `length` steps, in single precision.
    tolerance = 8 * length * np.finfo(np.float32).eps
    for got, want in zip(jax.tree.leaves(ours(*args)), jax.tree.leaves(theirs(*args)), strict=True):
        assert jnp.max(jnp.abs(got - want)) <= tolerance * jnp.max(jnp.abs(want))
    copy(*args).block_until_ready()

    def rivals_first():  # they take turns, so that a busy moment of the machine meets all of them
        for function, times in rivals.values():
            times.append(seconds(function, *args))

    benchmark.pedantic(
        lambda: jax.block_until_ready(ours(*args)), setup=rivals_first, rounds=20, warmup_rounds=2, iterations=1
    )
    mine = benchmark.stats.stats.median
    peer_time, copy_time = (float(np.median(times)) for _, times in rivals.values())
    table.append((str((batch, length, hidden)), "(T, N)" if per_step else "(N,)", mine, peer_time, copy_time))
    benchmark.extra_info.update(ratio=peer_time / mine, times_memory_limit=mine / (COPIES * copy_time))


@pytest.mark.parametrize("hidden", [1, 64])
def test_time_grows_linearly(benchmark, hidden):
    """A canary: in jaxlib 0.11.1 a loop that writes little in a step took a time that grows as T squared."""
    step = value_and_gradient(linear_recurrence)
    lengths = [1024 * 2**k for k in range(7)]
    per_step = {}
    for length in lengths:
        args = arguments(1, length, hidden, per_step=False)
        seconds(step, *args)
        per_step[length] = min(seconds(step, *args) for _ in range(5)) / length
    benchmark.pedantic(lambda: jax.block_until_ready(step(*args)), rounds=5)
    benchmark.extra_info["nanoseconds_per_step"] = {str(length): 1e9 * t for length, t in per_step.items()}
    print(f"\nN = {hidden}: ns per step", {length: round(1e9 * t) for length, t in per_step.items()})
    # Linear: a constant, but for the caches, which the longest sequence leaves. Quadratic: 64 times.
    assert per_step[lengths[-1]] < 8 * per_step[lengths[0]]
