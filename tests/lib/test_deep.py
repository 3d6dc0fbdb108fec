"""The residual stack and its norms against the equations written out in NumPy, with every layer in it."""

from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from scanrnn.deep import BatchNorm, LayerNorm, ResidualStack
from scanrnn.eigenvalues import Cartesian, ring
from scanrnn.layers import GRU, LRU, LSTM, RGLRU, S4D, S5, DiagonalRNN, LinearRNN, MinGRU, SelectiveSSM

D_IN, D, D_OUT, T, COUNT = 3, 4, 2, 6, 5
INPUTS = np.random.default_rng(0).normal(size=(COUNT, T, D_IN))

EIGENVALUES = ring(jr.key(9), D, min_modulus=0.5, max_modulus=0.9)
MAKERS: dict[str, Any] = {
    "linear": LinearRNN,
    "diagonal": lambda *sizes, key: DiagonalRNN(*sizes, eigenvalues=Cartesian.from_eigenvalues(EIGENVALUES), key=key),
    "lru": lambda *sizes, key: LRU(*sizes, min_modulus=0.5, max_modulus=0.9, key=key),
    "s4d": S4D,
    "s5": S5,
    "selective": SelectiveSSM,
    "rglru": RGLRU,
    "mingru": MinGRU,
    "gru": GRU,
    "lstm": LSTM,
}
NORMS: dict[str, Any] = {"none": None, "layer": LayerNorm, "batch": BatchNorm}

# Two blocks of some 50 roundings each, of numbers below 20 (asserted); no norm divides by less than 0.05 (asserted),
# which magnifies what came before it: 2 · 50 · 20 · eps / 0.05 = 9e-12.
ROUNDING = 1e-11


def make(kind="lru", norm=None, depth=2) -> Any:
    layers = [MAKERS[kind](D, D, D, key=key) for key in jr.split(jr.key(1), depth)]
    return ResidualStack(D_IN, D, D_OUT, layers=layers, norm=norm, key=jr.key(0))


@cache
def filled(kind="lru", norm=None) -> Any:
    """A stack with arbitrary parameters: no bias is 0, no γ is 1, and no two are the same."""
    random = np.random.default_rng(1)
    shapes = eqx.filter_eval_shape(make, kind, norm)
    fill = lambda leaf: jnp.asarray(0.5 * random.normal(size=leaf.shape))  # noqa: E731
    return jax.tree.map(lambda leaf: fill(leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf, shapes)


@eqx.filter_jit
def run(stack, batch):
    return jax.vmap(stack.propagate, axis_name="batch")(batch)


def close(got, want, atol=ROUNDING):
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


# --- the equations ----------------------------------------------------------------------------------------------------


def affine(linear, x):
    return x @ np.asarray(linear.weight).T + np.asarray(linear.bias)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def normalised(x, axes, epsilon, weight, bias):
    mean = x.mean(axes, keepdims=True)
    variance = ((x - mean) ** 2).mean(axes, keepdims=True)
    assert variance.min() > 0.05**2
    return (x - mean) / np.sqrt(variance + epsilon) * np.asarray(weight) + np.asarray(bias)


def by_hand(norm, x):
    if isinstance(norm, LayerNorm):
        return normalised(x, 2, 1e-6, norm.norm.weight, norm.norm.bias)
    if isinstance(norm, BatchNorm):
        return normalised(x, (0, 1), 1e-5, norm.weight, norm.bias)
    return x


@pytest.mark.parametrize("norm", NORMS)
def test_is_the_documented_stack(norm):
    stack = filled("lru", NORMS[norm])
    stream = affine(stack.encoder, INPUTS)
    streams = [stream]
    for block in stack.blocks:
        u = gelu(np.stack([block.layer(s) for s in by_hand(block.norm, stream)]))
        v = by_hand(block.norm, u)  # the same norm, its γ and β not those it starts with
        stream = stream + affine(block.value, v) / (1 + np.exp(-affine(block.gate, v)))
        streams.append(stream)
    outputs, measured = run(stack, INPUTS)
    assert max(np.abs(s).max() for s in streams) < 20
    close(np.moveaxis(measured, 1, 0), streams)
    close(outputs, affine(stack.decoder, stream))
    assert min(np.ptp(a - b) for a, b in zip(streams[1:], streams, strict=False)) > 0.1  # every block does something


def test_a_call_gives_the_outputs_that_propagate_gives():
    stack = filled("lru", LayerNorm)
    close(stack(INPUTS[0]), stack.propagate(INPUTS[0]).outputs)
    assert stack.propagate(INPUTS[0]).streams.shape == (3, T, D)


def test_the_layer_receives_the_normalised_stream():
    stream = jr.normal(jr.key(2), (T, D))
    for norm in (LayerNorm, BatchNorm):
        block = filled("lru", norm).blocks[0]
        close(block.layer_inputs(stream), by_hand(block.norm, np.asarray(stream)[None])[0])
    np.testing.assert_array_equal(filled("lru").blocks[0].layer_inputs(stream), stream)


def test_the_linear_maps_start_as_the_paper_s():
    d = 60
    sequence = jax.ShapeDtypeStruct((T, d), float)
    stack = ResidualStack(30, d, 60, layers=[lambda x: x] * 2, norm=LayerNorm, key=jr.key(0))
    assert eqx.filter_eval_shape(stack.blocks[0], sequence).shape == (T, d)
    linears = [stack.encoder, stack.decoder, *(getattr(b, n) for b in stack.blocks for n in ("value", "gate"))]
    for linear in linears:
        scaled = np.asarray(linear.weight) * np.sqrt(linear.weight.shape[1])
        # a mean square of n ≥ 30 · 60 normal numbers has the standard deviation √(2/n); five of them
        np.testing.assert_allclose(np.mean(scaled**2), 1, atol=5 * np.sqrt(2 / scaled.size))
        np.testing.assert_array_equal(linear.bias, np.zeros(len(linear.bias)))
    entries = np.concatenate([np.ravel(linear.weight) * np.sqrt(linear.weight.shape[1]) for linear in linears])
    assert len(np.unique(np.round(entries, 12))) > 0.999 * len(entries)  # every map has a key of its own
    assert eqx.tree_equal(make("lru", BatchNorm), make("lru", BatchNorm))


def test_blocks_do_not_share_their_norms():
    first, second = (block.norm for block in make("lru", BatchNorm).blocks)
    assert first is not second


# --- the norms --------------------------------------------------------------------------------------------------------

SCALES = np.array([1e-3, 1.0, 10.0, 300.0])  # of the features, around ε and far above it
SHIFTED = jnp.asarray(5 + SCALES * np.random.default_rng(3).normal(size=(COUNT, T, D)))


def test_a_layer_norm_has_the_moments_it_promises_at_each_step():
    got = jax.vmap(LayerNorm(D))(SHIFTED / 300)
    variance = np.var(SHIFTED / 300, axis=2)
    close(np.mean(got, axis=2), 0, 1e-14)  # 4 roundings of numbers below 2
    close(np.var(got, axis=2), variance / (variance + 1e-6), 1e-13)
    constant = LayerNorm(D)(jnp.full((T, D), 3.0))  # ε keeps what does not vary finite
    np.testing.assert_array_equal(constant, np.zeros((T, D)))


def test_a_batch_norm_has_the_moments_it_promises_over_the_batch_and_time():
    got = jax.vmap(BatchNorm(D), axis_name="batch")(SHIFTED)
    variance = np.var(SHIFTED, axis=(0, 1))
    # the mean of about 5 is taken off numbers that vary by 1e-3 and divided by √ε: 30 · 5 · eps / √1e-5 = 1e-11
    close(np.mean(got, axis=(0, 1)), 0, 1e-11)
    close(np.var(got, axis=(0, 1)), variance / (variance + 1e-5), 1e-10)
    assert np.ptp(np.mean(got, axis=1)) > 0.1  # of the batch, not of each sequence


def test_a_batch_norm_shares_moments_over_the_named_batch_only():
    norm = BatchNorm(D)
    alone = np.stack([norm(s) for s in SHIFTED])
    close(jax.vmap(norm)(SHIFTED), alone, 1e-10)  # no name, nothing shared
    shared = jax.vmap(norm, axis_name="batch")(SHIFTED)
    assert np.abs(shared - alone).max() > 0.1
    # one long sequence and a batch of its pieces have the same moments
    close(norm(SHIFTED.reshape(-1, D)).reshape(SHIFTED.shape), shared, 1e-10)


@pytest.mark.parametrize("norm", NORMS)
def test_the_order_of_the_batch_does_not_matter(norm):
    order = np.array([3, 0, 4, 1, 2])
    stack = filled("lru", NORMS[norm])
    for one, other in zip(run(stack, INPUTS[order]), run(stack, INPUTS), strict=True):
        close(one, other[order])


# --- every layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
def test_the_future_does_not_reach_the_past(kind):
    stack = filled(kind, LayerNorm)
    changed = INPUTS[:2].copy()
    changed[:, 4:] += 1
    (outputs, streams), (new_outputs, new_streams) = run(stack, INPUTS[:2]), run(stack, changed)
    assert outputs.shape == (2, T, D_OUT)
    assert np.isfinite(outputs).all()
    np.testing.assert_array_equal(outputs[:, :4], new_outputs[:, :4])
    np.testing.assert_array_equal(streams[:, :, :4], new_streams[:, :, :4])
    assert (np.asarray(outputs[:, 4:]) != np.asarray(new_outputs[:, 4:])).all()


def test_a_batch_norm_looks_at_the_whole_batch_and_all_times():
    stack = filled("lru", BatchNorm)
    changed = INPUTS.copy()
    changed[0, -1] += 1
    assert (np.asarray(run(stack, changed).outputs) != np.asarray(run(stack, INPUTS).outputs)).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", MAKERS)
def test_parameters_are_real_and_outputs_of_their_precision(kind, norm):
    shapes = eqx.filter_eval_shape(make, kind, NORMS[norm])
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes) if hasattr(leaf, "dtype")} == {jnp.dtype(float)}
    single = jax.tree.map(lambda a: a.astype(jnp.float32) if eqx.is_inexact_array(a) else a, filled(kind, NORMS[norm]))
    assert {a.dtype for a in jax.eval_shape(single.propagate, INPUTS[0])} == {jnp.dtype(jnp.float32)}


# --- bad input --------------------------------------------------------------------------------------------------------


def refused(error, message, *, d_in: Any = D_IN, d_model: Any = D, d_out: Any = D_OUT, layers: Any = None, **options):
    layers = [make_layer()] if layers is None else layers
    with pytest.raises(error, match=message):
        ResidualStack(d_in, d_model, d_out, layers=layers, **options, key=jr.key(0))


@cache
def make_layer(d_in=D, d_out=D):
    return GRU(d_in, D, d_out, key=jr.key(0))


def test_sizes_that_are_not_positive_integers_are_refused():
    for name in ("d_in", "d_model", "d_out"):
        refused(ValueError, f"{name} must be at least 1, got 0", **{name: 0})
        refused(TypeError, f"{name} must be an integer, got 4.0", **{name: 4.0})


def test_layers_that_do_not_fit_are_refused():
    refused(ValueError, "layers must hold at least one layer, got none", layers=[])
    changed = r"layers\[1\] must keep the width d_model = 4, got outputs of shape \(3, 5\) for inputs \(3, 4\)"
    refused(ValueError, changed, layers=[make_layer(), make_layer(d_out=5)])
    takes = r"layers\[0\] must map \(T, d_model\) to \(T, d_model\) with d_model = 4: .* d_in = 5"
    refused(ValueError, takes, layers=[make_layer(d_in=5)])
    shorter = r"layers\[0\] must keep the width d_model = 4, got outputs of shape \(2, 4\)"
    refused(ValueError, shorter, layers=[lambda x: x[1:]])
    refused(TypeError, r"layers\[0\] must be a map of sequences, got 'lru'", layers=["lru"])


def test_norms_that_do_not_fit_are_refused():
    refused(TypeError, "norm must be None or make a norm from the width, as LayerNorm does, got 'layer'", norm="layer")

    def halves(width):
        return lambda x: x[:, : width // 2]

    refused(ValueError, r"the norm that halves makes must keep the width .* got outputs of shape \(3, 2\)", norm=halves)
    refused(TypeError, "the norm that str makes must be a map of sequences, got '4'", norm=str)


def test_inputs_that_do_not_fit_are_refused():
    cases = [
        (np.ones(D_IN), ValueError, r"inputs must have 2 axes, got shape \(3,\)"),
        (np.ones((T, D)), ValueError, r"inputs must have shape \(T, d_in\) with d_in = 3, got \(6, 4\)"),
        (np.ones((0, D_IN)), ValueError, "inputs must have at least one time step"),
        (np.ones((T, D_IN), int), TypeError, "inputs must be floating point .* got int64"),
        (np.ones((T, D_IN), complex), TypeError, "inputs must be real, got complex128"),
    ]
    for inputs, error, message in cases:
        with pytest.raises(error, match=message):
            filled()(inputs)
