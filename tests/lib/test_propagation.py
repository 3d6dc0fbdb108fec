"""Losses, variances and gradients of deep stacks against a direct computation, and the memory of each layer."""

import re
from functools import cache
from itertools import pairwise
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from scanrnn import propagation
from scanrnn.deep import BatchNorm, LayerNorm
from scanrnn.layers import GRU, LRU
from scanrnn.propagation import effective_memory, make, measure, reconstruction_loss
from scanrnn.sensitivity import mean_squares

D_IN, WIDTH, DEPTH, COUNT, T = 3, 4, 2, 5, 6
SEQUENCES = jnp.asarray(np.random.default_rng(0).normal(size=(COUNT, T, D_IN)))
MEMORY = 7.0

# The arrays that set the eigenvalues of each stack's layers, and which of them sets what.
SETTERS = {
    "complex_rnn": {"parametrization.real": "eigenvalues", "parametrization.imag": "eigenvalues"},
    "lru": {"parametrization.omega_nu": "modulus", "parametrization.omega_theta": "phase"},
    "gru": {},
    "lstm": {},
    "s4d": {"log_decay": "modulus", "log_step": "modulus", "frequency": "phase"},
    "s5": {"log_decay": "modulus", "log_step": "modulus", "frequency": "phase"},
    "selective_ssm": {"log_decay": "modulus", "step_bias": "modulus"},
    "rg_lru": {"decay": "modulus"},
}
EVERY = pytest.mark.parametrize("kind", SETTERS)
NORMS: dict[str, Any] = {"none": None, "layer": LayerNorm, "batch": BatchNorm}


@cache
def stack_of(kind, norm=None) -> Any:
    return make(getattr(propagation, kind), MEMORY, d_in=D_IN, width=WIDTH, depth=DEPTH, norm=norm, key=jr.key(1))


@cache
def measured(kind, norm=None):
    return measure(stack_of(kind, norm), SEQUENCES)


@eqx.filter_jit
def directly(stack, sequences):
    """Streams, loss and its gradient, with the loss written out."""

    def loss(stack):
        outputs, streams = jax.vmap(stack.propagate, axis_name="batch")(sequences)
        errors = [outputs[:, t] - sequences[:, t - 1] for t in range(1, T)]  # ŷ_t against x_{t-1}
        return 0.5 * jnp.mean(jnp.stack(errors) ** 2), streams

    (value, streams), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(stack)
    return streams, value, gradient


# --- measure ----------------------------------------------------------------------------------------------------------


# Groups are found by name, so a few kinds stand for all; `test_every_array_has_one_group` has the names of the rest.
@pytest.mark.parametrize(("kind", "norm"), [("complex_rnn", "none"), ("lru", "layer"), ("gru", "batch")])
def test_is_the_loss_the_streams_and_the_gradients_of_the_whole_stack(kind, norm):
    stack, got = stack_of(kind, NORMS[norm]), measured(kind, NORMS[norm])
    streams, loss, gradient = directly(stack, SEQUENCES)
    # the same products in another order: some 100 roundings in each, of which squares have twice as many
    rtol = 1e-12
    np.testing.assert_allclose(got.loss, loss, rtol=rtol)
    np.testing.assert_allclose(reconstruction_loss(stack, SEQUENCES), loss, rtol=rtol)
    squares = [np.mean([streams[b, l] ** 2 for b in range(COUNT)]) for l in range(DEPTH + 1)]  # noqa: E741
    np.testing.assert_allclose(got.forward, squares, rtol=rtol)

    everything: dict[str, list] = {"encoder": [], "decoder": []}
    for name in everything:
        linear = getattr(gradient, name)
        everything[name] = [linear.weight, linear.bias]
        check_group(got.ends[name], everything[name], rtol)
    for block, groups in zip(gradient.blocks, got.gradients, strict=True):
        own = by_group(kind, block)
        assert groups.keys() == own.keys()
        for name, arrays in own.items():
            check_group(groups[name], arrays, rtol)
            everything.setdefault(name, []).extend(arrays)
    sizes = [sum(group.size for group in groups.values()) for groups in (*got.gradients, got.ends)]
    assert sum(sizes) == sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(stack, eqx.is_inexact_array)))
    for names in (["feedforward"], ["recurrent", "feedforward", "encoder", "decoder"], list(everything)):
        entries = np.concatenate([np.ravel(array) for name in names for array in everything[name]])
        np.testing.assert_allclose(got.pooled(*names), np.mean(entries**2), rtol=rtol)
    pairs = [np.concatenate([np.ravel(a) for a in jax.tree.leaves(block)]) for block in gradient.blocks]
    layers = got.per_layer(*(name for name in everything if name not in got.ends))
    np.testing.assert_allclose(layers, [np.mean(entries**2) for entries in pairs], rtol=rtol)


def by_group(kind, block) -> dict[str, list]:
    """The arrays of a block, those that set the eigenvalues picked out by hand."""
    found: dict[str, list] = {}
    chosen = set()
    for path, name in SETTERS[kind].items():
        array = block.layer
        for part in path.split("."):
            array = getattr(array, part)
        found.setdefault(name, []).append(array)
        chosen.add(id(array))
    found["recurrent"] = [leaf for leaf in jax.tree.leaves(block.layer) if id(leaf) not in chosen]
    found["feedforward"] = jax.tree.leaves((block.norm, block.value, block.gate))
    return found


def check_group(group, arrays, rtol):
    entries = np.concatenate([np.ravel(array) for array in arrays])
    assert group.size == len(entries)
    assert group.mean_square > 0
    np.testing.assert_allclose(group.mean_square, np.mean(entries**2), rtol=rtol)


@EVERY
def test_every_array_has_one_group(kind):
    shapes = eqx.filter_eval_shape(lambda: stack_of(kind, LayerNorm))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes.blocks[0])]
    groups = {path.lstrip("."): propagation.group(path.lstrip(".")) for path in paths}
    want = {f"layer.{name}": group for name, group in SETTERS[kind].items()}
    assert {name: group for name, group in groups.items() if group not in ("recurrent", "feedforward")} == want
    assert all((group == "feedforward") != name.startswith("layer.") for name, group in groups.items())
    block = stack_of(kind).blocks[0]
    sizes = {name: found.size for name, found in mean_squares(block, propagation.group).items()}
    assert sizes == {name: sum(map(np.size, arrays)) for name, arrays in by_group(kind, block).items()}
    assert sum(sizes.values()) == sum(map(np.size, jax.tree.leaves(eqx.filter(block, eqx.is_inexact_array))))


def test_groups_that_a_stack_does_not_have_are_refused():
    got = measured("gru", BatchNorm)
    with pytest.raises(ValueError, match=r"groups must be among \['feedforward', 'recurrent'\], got \('modulus',\)"):
        got.per_layer("modulus")
    with pytest.raises(ValueError, match=r"among \['decoder', 'encoder', 'feedforward', 'recurrent'\], got \(\)"):
        got.pooled()


def test_other_memories_seeds_and_inputs_are_not_compiled_again():
    compiled = []

    @jax.custom_jvp
    def counted(x):
        compiled.append(None)  # runs when it is traced only
        return x

    counted.defjvps(lambda tangent, primal, x: tangent)

    class Counted(LRU):
        def __call__(self, inputs):
            return counted(super().__call__(inputs))

    def layer(width, memory, *, key):
        made = propagation.lru(width, memory, key=key)
        return eqx.tree_at(jax.tree.leaves, shell(width, key), jax.tree.leaves(made))

    def shell(width, key):
        kind: Any = Counted
        return kind(width, width, width, min_modulus=0.5, max_modulus=0.9, key=key)

    losses = set()
    for seed, memory in enumerate((2.0, 30.0, 400.0)):
        stack = make(layer, memory, d_in=D_IN, width=WIDTH, depth=1, key=jr.key(seed))
        compiled.clear()
        losses.add(float(measure(stack, SEQUENCES + seed).loss))
        assert bool(compiled) == (seed == 0)
    assert len(losses) == 3
    compiled.clear()
    measure(stack, SEQUENCES[:, :-1])  # another shape is
    assert compiled


def test_gradients_that_are_not_finite_are_refused_by_name():
    stack = stack_of("lru", LayerNorm)
    with pytest.raises(ValueError, match=r"the array norm\.norm\.weight must be finite, got nan"):
        measure(stack, SEQUENCES.at[1, 2, 0].set(jnp.nan))
    broken = eqx.tree_at(lambda s: s.blocks[1].gate.bias, stack, jnp.full(WIDTH, jnp.nan))
    with pytest.raises(ValueError, match=r"the array [\w.]+ must be finite, got nan at index"):
        measure(broken, SEQUENCES)
    # where only the decoder's gradient overflows it is the decoder that is named
    large = eqx.tree_at(lambda s: s.decoder, stack, replace_fn=lambda d: jax.tree.map(jnp.zeros_like, d))
    large = eqx.tree_at(lambda s: s.encoder.bias, large, jnp.full(WIDTH, 1e200))
    with pytest.raises(ValueError, match=r"the array decoder\.weight must be finite, got "):
        measure(large, 1e150 * SEQUENCES)


def test_measure_may_be_traced():
    shapes = eqx.filter_eval_shape(measure, stack_of("lru", LayerNorm), SEQUENCES)
    assert [shapes.loss.shape, shapes.forward.shape, shapes.memory.shape] == [(), (DEPTH + 1,), (DEPTH,)]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((T, D_IN), r"sequences must have 3 axes, got shape (6, 3)"),
        ((COUNT, 2, D_IN), r"sequences must have at least 3 steps, got shape (5, 2, 3)"),
        ((COUNT, T, D_IN + 1), r"inputs must have shape (T, d_in) with d_in = 3, got (6, 4)"),
    ],
)
def test_sequences_that_do_not_fit_are_refused(shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        measure(stack_of("lru", LayerNorm), jnp.ones(shape))


# --- memory -----------------------------------------------------------------------------------------------------------


def test_the_memory_of_a_linear_layer_is_that_of_its_median_eigenvalue():
    layer = LRU(3, 5, 2, min_modulus=0.5, max_modulus=0.99, key=jr.key(0))
    inputs = SEQUENCES[0]
    # 5 units, so that the median is one of them; logarithms of moduli near 1 lose two digits
    want = np.median(-1 / np.log(np.abs(layer.eigenvalues())))
    np.testing.assert_allclose(effective_memory(layer, inputs), want, rtol=1e-13)


def test_the_memory_of_a_gru_that_reads_nothing_is_that_of_its_biases():
    layer = GRU(3, 5, 2, key=jr.key(0))
    layer = eqx.tree_at(lambda f: (f.cell.weight_ih, f.cell.weight_hh), layer, replace_fn=jnp.zeros_like)
    layer = eqx.tree_at(lambda f: f.cell.bias, layer, jnp.linspace(-3.0, 4.0, 15))
    update = np.linspace(-3.0, 4.0, 15)[5:10]  # Equinox's order: reset, update, new
    want = np.median(1 / np.log1p(np.exp(-update)))  # -log σ(b)
    np.testing.assert_allclose(effective_memory(layer, SEQUENCES[0]), want, rtol=1e-13)


def test_gates_that_move_forget_at_their_mean_rate():
    layer = GRU(3, 5, 2, key=jr.key(0))
    gates = np.asarray(layer.coefficients(SEQUENCES[0]))
    want = np.median([1 / np.mean([-np.log(gates[t, i]) for t in range(T)]) for i in range(5)])
    np.testing.assert_allclose(effective_memory(layer, SEQUENCES[0]), want, rtol=1e-13)
    assert np.ptp(gates, axis=0).min() > 1e-2


def test_measure_has_the_mean_memory_over_a_few_sequences():
    stack, got = stack_of("gru", BatchNorm), measured("gru", BatchNorm)
    few = SEQUENCES[:4]
    streams = jax.vmap(stack.propagate, axis_name="batch")(few).streams
    for i, block in enumerate(stack.blocks):
        # the batch norm by hand: its γ is 1 and its β 0 at initialisation
        stream = np.asarray(streams[:, i])
        centred = stream - stream.mean((0, 1))
        received = centred / np.sqrt((centred**2).mean((0, 1)) + 1e-5)
        want = np.mean([effective_memory(block.layer, jnp.asarray(x)) for x in received])
        np.testing.assert_allclose(got.memory[i], want, rtol=1e-12)


# What the memory of each stack's layers is, in units of the one asked for, if all that can move stands still:
# |λ| in [1 - 1/t, 1 - 1/(2t)], Δ Re A in [1/(2t), 1/t], a in [exp(-1/t), exp(-1/(2t))]: between t and 2t, and half a
# step less where the modulus is linear; chrono's σ(log u), u in [t, 2t], is 1/log(1 + 1/u) = u + 1/2.
@EVERY
def test_layers_have_the_memory_that_was_asked_for(kind):
    memory = 100.0
    layer = getattr(propagation, kind)(40, memory, key=jr.key(2))
    silent = jnp.zeros((1, 40))  # state 0 and input 0, so that gates are where their biases put them
    rates = -np.log(np.abs(np.asarray(layer.coefficients(silent))))[0]
    if kind == "selective_ssm":
        rates = rates.reshape(40, 4)[:, 0]  # the slowest of its four states
    elif kind == "s4d":
        np.testing.assert_allclose(rates.reshape(40, 4), rates.reshape(40, 4)[:, :1].repeat(4, 1), rtol=1e-9)
    times = 1 / rates
    assert np.all(times >= memory - 0.51)
    assert np.all(times <= 2 * memory + 0.51)
    assert np.ptp(times) > 0.7 * memory  # 40 draws: they leave a third of a uniform range open once in 10^5 times
    assert abs(layer(jnp.ones((2, 40))).mean()) < 10


def test_gated_layers_start_with_the_paper_s_kernels():
    for kind, gates in (("gru", 3), ("lstm", 4)):
        layer = getattr(propagation, kind)(30, 10.0, key=jr.key(0))
        square = np.asarray(layer.cell.weight_hh).reshape(gates, 30, 30)
        for kernel in square:
            np.testing.assert_allclose(kernel @ kernel.T, np.eye(30), rtol=0, atol=1e-13)
        assert all(np.abs(a - b).max() > 0.1 for a, b in pairwise(square))
        inputs = np.asarray(layer.cell.weight_ih)
        # a mean square of n normal numbers has the standard deviation √(2/n); five of them
        np.testing.assert_allclose(30 / 2 * np.mean(inputs**2), 1, atol=5 * np.sqrt(2 / inputs.size))
        x = jr.normal(jr.key(1), (3, 30))
        states = layer.states(x)
        if kind == "gru":  # no readout: its state is what the layer returns
            np.testing.assert_array_equal(layer(x), states)
        else:
            assert np.all(np.abs(layer(x)) <= np.abs(np.tanh(states)))


@EVERY
def test_the_memory_may_be_traced(kind):
    layer = getattr(propagation, kind)

    def traced(memory):
        return make(layer, memory, d_in=D_IN, width=WIDTH, depth=DEPTH, key=jr.key(1))

    want = stack_of(kind)
    shapes = eqx.filter_eval_shape(traced, jnp.asarray(MEMORY))
    assert [x.shape for x in jax.tree.leaves(shapes)] == [x.shape for x in jax.tree.leaves(want)]
    if kind == "lru":  # compiled, which takes seconds
        got = eqx.filter_jit(traced)(jnp.asarray(MEMORY))
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            # fused operations round differently; 1 - |λ| ≈ 1/14 loses one digit in it
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", ["complex_rnn", "lru"])
def test_phases_stay_below_the_largest(kind):
    lam = getattr(propagation, kind)(200, 10.0, max_phase=0.1, key=jr.key(0)).eigenvalues()
    phases = np.abs(np.angle(lam))
    assert phases.max() <= 0.1 * (1 + 1e-12)
    assert phases.max() > 0.09  # 200 draws: all below nine tenths once in 10^9 times


def test_every_layer_has_a_key_of_its_own():
    first, second = stack_of("lru").blocks
    assert not eqx.tree_equal(first.layer, second.layer)
    assert not eqx.tree_equal(first.value, second.value)


@pytest.mark.parametrize("memory", [0.5, 0.0, -3.0, np.nan, np.inf])
def test_memories_out_of_range_are_refused(memory):
    with pytest.raises(ValueError, match=f"memory must be at least 1 and finite, got {memory}"):
        make(propagation.lru, memory, d_in=D_IN, width=WIDTH, key=jr.key(0))


def test_sizes_out_of_range_are_refused():
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        make(propagation.lru, MEMORY, d_in=D_IN, width=WIDTH, depth=0, key=jr.key(0))
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        make(propagation.gru, MEMORY, d_in=D_IN, width=0, key=jr.key(0))
    with pytest.raises(ValueError, match="d_in must be at least 1, got 0"):
        make(propagation.lru, MEMORY, d_in=0, width=WIDTH, key=jr.key(0))
