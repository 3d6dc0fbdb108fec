r"""What deep stacks learn: a delayed copy, and what training does to the signals that pass through them.

    delayed copy      x_t ∈ {0, 1},  y_t = x_{t-τ},   L = mean over t >= τ of -log₂ p(y_t),   p = σ(±ŷ_t)

so a loss of 1 bit is chance, and 0 is a copy without error. Each function makes one run from a point of a grid, as
`scanrnn.sweep` calls it: seeds, rates, delays and memories are numbers in the point, all else is bound to the function.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from . import propagation
from ._checks import require_integer
from .deep import Norm, ResidualStack
from .embeddings import COUNT, LENGTH, text_embeddings
from .propagation import MakeLayer, Propagation
from .tasks import delayed_copy, two_exponential
from .training import train

Draw = Callable[[PRNGKeyArray, int, int], Array]  # key, batch, length → (batch, length, features)


# Inputs --------------------------------------------------------------------------------------------------------------


def surrogate(key: PRNGKeyArray, batch: int, length: int, *, features: int = 768) -> Float[Array, "batch time feature"]:
    """Draws of `tasks.two_exponential` with the paper's constants, independent features."""
    return jnp.moveaxis(two_exponential(key, length, (batch, features)), 1, 0)


def text(key: PRNGKeyArray, batch: int, length: int) -> Float[Array, "batch time feature"]:
    """The first `length` steps of `batch` of the 128 text sequences, drawn without replacement.

    Raises `ValueError` unless 1 <= batch <= 128 and 1 <= length <= 512.
    """
    require_integer("batch", batch, minimum=1, maximum=COUNT)
    require_integer("length", length, minimum=1, maximum=LENGTH)
    whole = text_embeddings()
    return jr.choice(key, whole, (batch,), replace=False)[:, :length]


# Runs ----------------------------------------------------------------------------------------------------------------


def propagate(
    point: Mapping[str, Any],
    *,
    layer: MakeLayer,
    norm: Callable[[int], Norm] | None = None,
    inputs: Draw = surrogate,
    width: int = 256,
    depth: int = 4,
    length: int = 512,
    batch: int = 16,
) -> dict[str, Array]:
    """One stack with `memory`, drawn with `seed`, and one batch of inputs: `summary` of its `propagation.measure`."""
    stack_key, input_key = jr.split(jr.key(point["seed"]))
    sequences = inputs(input_key, batch, length)
    d_in = sequences.shape[-1]
    stack = propagation.make(layer, point["memory"], d_in=d_in, width=width, depth=depth, norm=norm, key=stack_key)
    return summary(propagation.measure(stack, sequences))


def propagate_while_training(
    point: Mapping[str, Any],
    *,
    layer: MakeLayer,
    norm: Callable[[int], Norm] | None = None,
    inputs: Draw = surrogate,
    width: int = 64,
    depth: int = 4,
    length: int = 256,
    batch: int = 16,
    steps: int = 300,
    checkpoints: int = 3,
) -> dict[str, Array]:
    """`propagate` before training and at equally spaced checkpoints of it: each entry with a leading axis of these.

    Adam at `learning_rate` on `propagation.reconstruction_loss`, a batch drawn anew at each step; measured on one
    batch of its own. Also `curve`, the loss of each step, and `steps_taken`. `ValueError` unless `checkpoints` divides
    `steps`.
    """
    require_integer("checkpoints", checkpoints, minimum=1)
    if steps % checkpoints:
        raise ValueError(f"checkpoints must divide steps = {steps}, got {checkpoints}")
    stack_key, input_key, train_key = jr.split(jr.key(point["seed"]), 3)
    sequences = inputs(input_key, batch, length)
    d_in = sequences.shape[-1]
    stack = propagation.make(layer, point["memory"], d_in=d_in, width=width, depth=depth, norm=norm, key=stack_key)

    def loss(stack: ResidualStack, key: PRNGKeyArray) -> Array:
        return propagation.reconstruction_loss(stack, inputs(key, batch, length))

    def observe(stack: ResidualStack, *_: Any) -> dict[str, Array]:
        return summary(propagation.measure(stack, sequences))

    optimizer = optax.adam(point["learning_rate"])
    every = steps // checkpoints
    trained, _, record = train(loss, stack, optimizer, steps, key=train_key, observe=observe, every=every)
    last = observe(trained)
    measured = {name: jnp.concatenate([record.observed[name], last[name][None]]) for name in last}
    return measured | {"curve": record.loss, "steps_taken": record.steps_taken}


def learn_delayed_copy(
    point: Mapping[str, Any],
    *,
    layer: MakeLayer,
    norm: Callable[[int], Norm] | None = None,
    width: int = 32,
    depth: int = 2,
    length: int = 256,
    batch: int = 16,
    steps: int = 1000,
) -> dict[str, Array]:
    """One stack learns to copy over `delay` steps, its layers' memory starting at the delay; Adam at `learning_rate`.

    **Returns** `final_loss`, in bits per scored step, the mean over the last twentieth of the steps, NaN if the run
    diverged; `accuracy` on 64 sequences not seen before; `diverged`; and `curve`, the loss in 20 stretches.

    Raises `ValueError` unless `steps` is a multiple of 20.
    """
    require_integer("steps", steps, minimum=1)
    if steps % 20:
        raise ValueError(f"steps must be a multiple of 20, got {steps}")
    stack_key, train_key, test_key = jr.split(jr.key(point["seed"]), 3)
    memory: Any = jnp.asarray(point["delay"], float)
    stack = propagation.make(layer, memory, d_in=1, width=width, depth=depth, norm=norm, key=stack_key)

    def scores(stack: ResidualStack, key: PRNGKeyArray, count: int) -> tuple[Array, Array, Array]:
        draw = jax.vmap(lambda k: delayed_copy(k, length, point["delay"]))
        bits, targets, mask = draw(jr.split(key, count))
        return jax.vmap(stack, axis_name="batch")(2 * bits - 1)[..., 0], targets[..., 0], mask

    def loss(stack: ResidualStack, key: PRNGKeyArray) -> Array:
        logits, targets, mask = scores(stack, key, batch)
        surprise = optax.sigmoid_binary_cross_entropy(logits, targets) / np.log(2).item()
        return jnp.sum(surprise * mask) / jnp.sum(mask)

    trained, _, record = train(loss, stack, optax.adam(point["learning_rate"]), steps, key=train_key)
    logits, targets, mask = scores(trained, test_key, 64)
    right = jnp.where((logits > 0) == (targets > 0.5), mask, 0)
    curve = jnp.mean(record.loss.reshape(20, -1), axis=1)
    diverged = record.steps_taken < steps
    return {
        "final_loss": jnp.where(diverged, jnp.nan, curve[-1]),
        "accuracy": jnp.sum(right) / jnp.sum(mask),
        "diverged": diverged,
        "curve": curve,
    }


def summary(measured: Propagation) -> dict[str, Array]:
    """A `Propagation` as arrays with names; those of groups that the stack has not are NaN.

    `rest` is the mean squared gradient of all parameters of a block that do not set its eigenvalues, and `all_rest`
    that of the whole network, the encoder and the decoder included.
    """
    depth = len(measured.gradients)
    columns = {"loss": measured.loss, "forward": measured.forward, "memory_measured": measured.memory}
    for name in EIGENVALUE_GROUPS:
        present = name in measured.gradients[0]
        columns[name] = measured.per_layer(name) if present else jnp.full(depth, jnp.nan)
    columns["recurrent"] = measured.per_layer("recurrent")
    columns["rest"] = measured.per_layer("recurrent", "feedforward")
    columns["all_rest"] = measured.pooled("recurrent", "feedforward", "encoder", "decoder")
    columns["all_but_recurrent"] = measured.pooled("feedforward", "encoder", "decoder")
    return columns


EIGENVALUE_GROUPS = ("eigenvalues", "modulus", "phase")


def width_for(layer: MakeLayer, parameters: int, *, depth: int = 2, norm: Callable[[int], Norm] | None = None) -> int:
    """The width at which a stack of one input and one output has the number of parameters nearest to `parameters`.

    Raises `ValueError` for fewer than one, `TypeError` for what is not an integer.
    """
    require_integer("parameters", parameters, minimum=1)
    sizes: dict[int, int] = {}
    while not sizes or max(sizes.values()) < parameters:
        width = len(sizes) + 1
        sizes[width] = count_parameters(layer, width, depth=depth, norm=norm)
    return min(sizes, key=lambda width: abs(sizes[width] - parameters))


def count_parameters(layer: MakeLayer, width: int, *, depth: int = 2, norm: Callable[[int], Norm] | None = None) -> int:
    """The number of trained real numbers of such a stack."""
    make = partial(propagation.make, layer, 10.0, d_in=1, width=width, depth=depth, norm=norm)
    stack = eqx.filter_eval_shape(make, key=jr.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(stack) if jnp.issubdtype(leaf.dtype, jnp.inexact))
