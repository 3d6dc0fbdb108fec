"""The experiments of chapter 6 at a size of seconds: against what they are made of, and where the answer is known."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from scanrnn import learning, propagation
from scanrnn.deep import BatchNorm, LayerNorm
from scanrnn.embeddings import text_embeddings
from scanrnn.learning import count_parameters, learn_delayed_copy, propagate, propagate_while_training, width_for
from scanrnn.tasks import delayed_copy

FEATURES, WIDTH, DEPTH, LENGTH, BATCH = 3, 4, 1, 8, 5
few = partial(learning.surrogate, features=FEATURES)
SIZES: dict[str, Any] = {"width": WIDTH, "depth": DEPTH, "length": LENGTH, "batch": BATCH}
COLUMNS = {
    "loss": (),
    "forward": (DEPTH + 1,),
    "memory_measured": (DEPTH,),
    **dict.fromkeys(("eigenvalues", "modulus", "phase", "recurrent", "rest"), (DEPTH,)),
    "all_rest": (),
    "all_but_recurrent": (),
}

# The same program, or the same operations fused otherwise: some 100 roundings.
ROUNDING = 1e-12


def close(got, want, rtol=ROUNDING):
    np.testing.assert_allclose(got, want, rtol=rtol, atol=0)


def stack_of(key, memory, d_in=FEATURES, layer=propagation.lru, norm=None, width=WIDTH, depth=DEPTH):
    return propagation.make(layer, memory, d_in=d_in, width=width, depth=depth, norm=norm, key=key)


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_the_surrogate_has_the_paper_s_second_moments():
    x = np.asarray(learning.surrogate(jr.key(0), 40, 3, features=500))
    assert x.shape == (40, 3, 500)
    moments = np.mean(x[:, :1] * x, axis=(0, 2))
    want = 0.0431 * 0.997005 ** np.arange(3) + np.array([0.332, 0, 0])
    # n = 20,000 independent products of numbers of variance 0.375, each of variance 2 · 0.375² at most; five deviations
    np.testing.assert_allclose(moments, want, rtol=0, atol=5 * 0.375 * np.sqrt(2 / 20_000))


def test_text_is_drawn_without_replacement_from_the_start_of_the_sequences():
    drawn = np.asarray(learning.text(jr.key(0), 128, 16))
    whole = np.asarray(text_embeddings()[:, :16])
    assert drawn.shape == (128, 16, 384)
    rows = [np.flatnonzero((whole == sequence).all(axis=(1, 2))) for sequence in drawn]
    assert sorted(int(row[0]) for row in rows) == list(range(128))
    assert len(learning.text(jr.key(1), 2, 512)[0]) == 512


def test_draws_of_text_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="batch must be between 1 and 128, got 129"):
        learning.text(jr.key(0), 129, 4)
    with pytest.raises(ValueError, match="length must be between 1 and 512, got 513"):
        learning.text(jr.key(0), 2, 513)


# --- propagation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "norm"), [("lru", LayerNorm), ("complex_rnn", BatchNorm)])
def test_propagate_is_the_measurement_of_one_stack_on_one_batch(kind, norm):
    layer = getattr(propagation, kind)
    got = propagate({"seed": 3, "memory": 7.0}, layer=layer, norm=norm, inputs=few, **SIZES)
    assert {name: np.shape(column) for name, column in got.items()} == COLUMNS

    stack_key, input_key = jr.split(jr.key(3))
    measured = propagation.measure(stack_of(stack_key, 7.0, layer=layer, norm=norm), few(input_key, BATCH, LENGTH))
    close(got["loss"], measured.loss)
    close(got["forward"], measured.forward)
    close(got["memory_measured"], measured.memory)
    present = {"lru": ["modulus", "phase"], "complex_rnn": ["eigenvalues"]}[kind]
    for name in ("eigenvalues", "modulus", "phase"):
        assert np.isfinite(got[name]).all() == (name in present)
        close(got[name], measured.per_layer(name) if name in present else np.full(DEPTH, np.nan))
    for block in range(DEPTH):
        recurrent, rest = (measured.gradients[block][name] for name in ("recurrent", "feedforward"))
        close(got["recurrent"][block], recurrent.mean_square)
        both = recurrent.mean_square * recurrent.size + rest.mean_square * rest.size
        close(got["rest"][block], both / (recurrent.size + rest.size))
    for column, names in (
        ("all_rest", ("recurrent", "feedforward", "encoder", "decoder")),
        ("all_but_recurrent", ("feedforward", "encoder", "decoder")),
    ):
        groups = [part[name] for part in (*measured.gradients, measured.ends) for name in names if name in part]
        total = sum(group.mean_square * group.size for group in groups)
        close(got[column], total / sum(group.size for group in groups))


def test_other_seeds_draw_other_stacks_and_other_inputs():
    layer, norm = propagation.lru, LayerNorm
    first, second = (
        propagate({"seed": seed, "memory": 7.0}, layer=layer, norm=norm, inputs=few, **SIZES) for seed in (3, 4)
    )
    for name in ("loss", "forward", "memory_measured", "recurrent"):
        assert np.all(np.asarray(first[name]) != np.asarray(second[name]))


def train_and_measure(rate, **options):
    point = {"seed": 3, "memory": 7.0, "learning_rate": rate}
    return propagate_while_training(point, layer=propagation.lru, norm=LayerNorm, inputs=few, **SIZES, **options)


def test_training_is_measured_before_it_starts_and_at_its_checkpoints():
    got = train_and_measure(0.01, steps=6, checkpoints=2)
    shapes = {name: np.shape(column) for name, column in got.items()}
    assert shapes == {name: (3, *shape) for name, shape in COLUMNS.items()} | {"curve": (6,), "steps_taken": ()}
    assert got["steps_taken"] == 6

    stack_key, input_key, train_key = jr.split(jr.key(3), 3)
    stack = stack_of(stack_key, 7.0, norm=LayerNorm)
    want = learning.summary(propagation.measure(stack, few(input_key, BATCH, LENGTH)))
    for name in COLUMNS:
        close(got[name][0], want[name])
        moved = np.asarray(got[name][1:]) != np.asarray(got[name][:-1])
        assert moved.all() or name == "eigenvalues"  # which a linear recurrent unit has not
    first = few(jr.fold_in(train_key, 0), BATCH, LENGTH)
    close(got["curve"][0], propagation.reconstruction_loss(stack, first))
    assert len(np.unique(got["curve"])) == 6  # a new batch at each step


def test_checkpoints_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="checkpoints must divide steps = 10, got 4"):
        train_and_measure(0.01, steps=10, checkpoints=4)
    with pytest.raises(ValueError, match="checkpoints must be at least 1, got 0"):
        train_and_measure(0.01, steps=10, checkpoints=0)


# --- the delayed copy -------------------------------------------------------------------------------------------------


def learn(delay, rate, *, layer: Any = propagation.lru, seed=0, length=24, batch=16, steps=20, norm: Any = LayerNorm):
    point = {"seed": seed, "delay": delay, "learning_rate": rate}
    sizes: dict[str, Any] = {"width": 8, "depth": 1, "length": length, "batch": batch, "steps": steps}
    return learn_delayed_copy(point, layer=layer, norm=norm, **sizes)


def test_without_steps_it_is_the_surprise_of_the_stack_as_drawn():
    delay, length = 3, 10
    got = learn(delay, 0.0, length=length, batch=4)
    stack_key, train_key, test_key = jr.split(jr.key(0), 3)
    stack = stack_of(stack_key, float(delay), d_in=1, norm=LayerNorm, width=8, depth=1)
    draw = jax.jit(jax.vmap(lambda key: delayed_copy(key, length, delay)[0]))
    run = eqx.filter_jit(lambda bits: jax.vmap(stack)(2 * bits - 1)[..., 0])

    def scores(key, count):
        bits = np.asarray(draw(jr.split(key, count)))
        assert set(np.unique(bits)) == {0, 1}
        return np.asarray(run(bits))[:, delay:], bits[:, :-delay, 0]  # scored once the bit has been seen

    losses = []
    for k in range(20):
        logits, targets = scores(jr.fold_in(train_key, k), 4)
        p = 1 / (1 + np.exp(-logits))
        losses.append(-np.mean(np.log2(np.where(targets == 1, p, 1 - p))))
    close(got["curve"], losses)
    close(got["final_loss"], losses[-1])
    logits, targets = scores(test_key, 64)
    close(got["accuracy"], np.mean((logits > 0) == (targets == 1)))
    assert not got["diverged"]


def nothing(width, memory, *, key):
    """A layer that remembers nothing."""
    return lambda stream: stream


def test_without_memory_it_stays_at_chance():
    got = learn(3, 0.02, layer=nothing, length=43, steps=60)
    # The logits tend to 0, where the loss is 1 bit: for logits of size s it is 1 + s²/(8 ln 2), and the mean of
    # n = 3 · 16 · 40 sampled bits deviates by s/(2 ln 2 √n). With s < 0.5 (a rate of 0.02 and the noise of a gradient)
    # that is below 0.05 and, five deviations, 0.04.
    np.testing.assert_allclose(got["final_loss"], 1, rtol=0, atol=0.09)
    # What it says is a function of x_t, so that right and wrong are 64 · 40 fair, independent coins; five deviations.
    np.testing.assert_allclose(got["accuracy"], 0.5, rtol=0, atol=5 * 0.5 / np.sqrt(64 * 40))


def test_a_linear_recurrent_unit_learns_to_copy_and_then_makes_no_error():
    got = learn(1, 0.03, steps=200)
    assert got["final_loss"] < 0.05  # a loss of 0.05 bits is an error in some 100 bits; chance is 1
    assert got["accuracy"] == 1  # exactly: the steps before the first bit has come are not counted
    assert got["curve"].shape == (20,)
    assert got["curve"][0] > 0.5
    assert got["curve"][-1] == got["final_loss"]


def broken(width, memory, *, key):
    """A layer with a value and no derivative."""
    return lambda stream: stream + jnp.sqrt(0 * stream)


def test_a_run_that_diverges_has_no_loss():
    with pytest.warns(RuntimeWarning, match="train stopped at step 0 of 20, where the gradient was not finite"):
        got = learn(3, 0.02, layer=broken)
    assert got["diverged"]
    assert np.isnan(got["final_loss"])
    assert np.isfinite(got["curve"]).all()  # the loss of the parameters at which it stopped


def test_points_may_be_traced():
    def run(delay, rate, seed):
        return learn(delay, rate, seed=seed, norm=BatchNorm)

    batch = jax.eval_shape(jax.vmap(run), *map(jnp.asarray, ([1, 2], [0.01, 0.1], [0, 1])))
    assert {name: column.shape for name, column in batch.items()} == {
        "final_loss": (2,),
        "accuracy": (2,),
        "diverged": (2,),
        "curve": (2, 20),
    }


def test_points_and_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="steps must be a multiple of 20, got 30"):
        learn(3, 0.02, steps=30)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        learn(3, 0.02, steps=0)
    with pytest.raises(ValueError, match="delay must be between 0 and 23, got 24"):
        learn(24, 0.02)
    with pytest.raises(ValueError, match=r"memory must be at least 1 and finite, got 0\.0"):
        learn(0, 0.02)


# --- sizes ------------------------------------------------------------------------------------------------------------


def parameters_by_hand(kind, d, depth, norm):
    layer = {"lru": 3 * d + 5 * d * d, "gru": 6 * d * d + 4 * d, "lstm": 8 * d * d + 4 * d}[kind]
    return 2 * d + d + 1 + depth * (layer + 2 * (d * d + d) + (0 if norm is None else 2 * d))


@pytest.mark.parametrize("kind", ["lru", "gru", "lstm"])
def test_parameters_are_counted(kind):
    for d, depth, norm in ((1, 1, None), (5, 2, LayerNorm), (6, 3, BatchNorm)):
        counted = count_parameters(getattr(propagation, kind), d, depth=depth, norm=norm)
        assert counted == parameters_by_hand(kind, d, depth, norm)


@pytest.mark.parametrize("wanted", [1, 100, 247, 248, 249, 300, 1000])
def test_the_width_is_that_of_the_nearest_count(wanted):
    width = width_for(propagation.lru, wanted, norm=LayerNorm)
    distances = [abs(parameters_by_hand("lru", d, 2, LayerNorm) - wanted) for d in range(1, 20)]
    assert width == 1 + int(np.argmin(distances))


def test_numbers_of_parameters_out_of_range_are_refused():
    with pytest.raises(ValueError, match="parameters must be at least 1, got 0"):
        width_for(propagation.lru, 0)
    with pytest.raises(TypeError, match=r"parameters must be an integer, got 1000\.0"):
        width_for(propagation.lru, 1000.0)  # type: ignore[arg-type]
