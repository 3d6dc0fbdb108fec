r"""Networks that learn bits over a delay, with and without gradient flossing (Engelken 2023).

    x_t = J φ(x_{t-1}) + W s_t + b,     p_t = σ(w·x_t + c),     L = mean over scored t of -log p(y_t)

s_t are fair bits and y_t what a task of `scanrnn.tasks` asks for. One epoch is one step of Adam on a fresh batch, so
the accuracy on that batch before the step is an accuracy on unseen sequences; the states x_0, one for each sequence of
the batch, are trained too. `learn_bits` makes one run from a point of a grid, as `scanrnn.sweep` calls it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ._checks import require_integer, require_values
from .cells import Initializer, VanillaCell, gaussian
from .deep import LayerNorm, ResidualStack
from .lyapunov import floss, lyapunov_exponents
from .propagation import MakeLayer
from .propagation import make as make_stack
from .recurrence import scan_cell
from .sensitivity import squared_norm
from .tasks import BitTask, fair_bits
from .training import train

# Students ------------------------------------------------------------------------------------------------------------


class BitReader(eqx.Module):
    """A cell whose state is read out linearly: $r_t=w\\cdot x_t+c$, x being the first array of the state (an LSTM's h).

    `initial_states` has one state for each sequence of a batch, along a leading axis.
    """

    cell: Callable[[Array, PyTree], PyTree]
    initial_states: PyTree
    weight: Float[Array, " hidden"]
    bias: Float[Array, ""]

    def __init__(
        self, cell: Callable, initial_states: PyTree, *, weight_init: Initializer | None = None, key: PRNGKeyArray
    ):
        size = jax.tree.leaves(initial_states)[0].shape[-1]
        weight_init = jax.nn.initializers.normal(1.0) if weight_init is None else weight_init
        self.cell = cell
        self.initial_states = initial_states
        self.weight = weight_init(key, (1, size))[0]
        self.bias = jnp.asarray(1e-3)

    def __call__(self, inputs: Float[Array, "batch time d_in"]) -> Float[Array, "batch time"]:
        """The logits r_t."""
        states = jax.vmap(lambda state, s: scan_cell(self.cell, state, s)[1])(self.initial_states, inputs)
        return jax.tree.leaves(states)[0] @ self.weight + self.bias


class StackReader(eqx.Module):
    """A deep stack in the place of a `BitReader`; it has no cell, so it cannot be flossed."""

    stack: ResidualStack

    def __call__(self, inputs: Float[Array, "batch time d_in"]) -> Float[Array, "batch time"]:
        """The logits."""
        return jax.vmap(self.stack, axis_name="batch")(2 * inputs - 1)[..., 0]


Student = BitReader | StackReader


class MakeStudent(Protocol):
    """A function that draws a student for batches of a given size."""

    def __call__(self, *, d_in: int, batch: int, key: PRNGKeyArray) -> Student: ...


def vanilla(
    *,
    d_hidden: int,
    recurrent_init: Initializer | None = None,
    activation: Callable[[Array], Array] | None = None,
    d_in: int = 1,
    batch: int,
    key: PRNGKeyArray,
) -> BitReader:
    """Engelken's network: J ~ N(0, 1/N), W and w ~ N(0, 1), b ~ U(0, 0.1), φ = tanh."""
    init = gaussian() if recurrent_init is None else recurrent_init
    options: Any = {} if activation is None else {"activation": activation}
    make = partial(VanillaCell, recurrent_init=init, bias_init=_small_biases, **options)
    return reader(make, d_hidden=d_hidden, d_in=d_in, batch=batch, key=key)


def reader(
    make: Callable[..., Callable],
    *,
    d_hidden: int,
    weight_init: Initializer | None = None,
    states: int = 1,
    d_in: int = 1,
    batch: int,
    key: PRNGKeyArray,
) -> BitReader:
    """A `BitReader` of the cell `make(d_in, d_hidden, key=key)`, whose state is so many arrays of size `d_hidden`.

    Its initial states are drawn from N(0, 1) and relaxed for 100 steps without input, as the released code does.
    """
    cell_key, state_key, weight_key = jr.split(key, 3)
    cell = make(d_in, d_hidden, key=cell_key)
    draws = jr.normal(state_key, (states, batch, d_hidden))
    start = draws[0] if states == 1 else tuple(draws)
    relaxed = jax.vmap(lambda state: scan_cell(cell, state, jnp.zeros((100, d_in)))[0])(start)
    return BitReader(cell, relaxed, weight_init=weight_init, key=weight_key)


def stack(
    layer: MakeLayer, *, memory: float, width: int, depth: int = 2, d_in: int = 1, batch: int, key: PRNGKeyArray
) -> StackReader:
    """A residual stack of `scanrnn.deep` with layer normalisation; the size of the batch does not matter to it."""
    del batch
    return StackReader(make_stack(layer, memory, d_in=d_in, width=width, depth=depth, norm=LayerNorm, key=key))


def _small_biases(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    return jr.uniform(key, shape, maxval=0.1)


# Training ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flossing:
    """When a student is flossed and how, in the first `num_exponents`.

    `steps` steps before epoch 0, if that is one of the `epochs`, and `later` steps before each other one of them. The
    defaults are the released code's: windows of 55 steps, the first 16 of which are not counted, target 0.
    """

    num_exponents: int
    epochs: tuple[int, ...] = (0,)
    steps: int = 500
    later: int = 500
    target: float = 0.0
    length: int = 55
    transient: int = 16
    learning_rate: float = 1e-3


def clip_each(max_norm: float) -> optax.GradientTransformation:
    """Every array of the gradient scaled down to `max_norm`, if its own Euclidean norm is larger."""
    require_values("max_norm", max_norm, "positive", lambda norm: norm > 0)

    def clip(gradient: Any, _: Any) -> Array:
        norm = jnp.linalg.norm(gradient.ravel())
        return gradient * jnp.minimum(1.0, max_norm / norm).astype(gradient.dtype)  # 0 stays 0: min(1, inf) = 1

    return optax.stateless_with_tree_map(clip)


def bit_loss(student: Student, inputs: Array, targets: Array, mask: Array) -> tuple[Array, Array]:
    """The loss in nats per scored step of a batch, and the accuracy."""
    logits = student(inputs)
    surprise = optax.sigmoid_binary_cross_entropy(logits, targets[..., 0])
    right = (logits >= 0) == (targets[..., 0] > 0.5)
    scored = jnp.sum(mask)
    return jnp.sum(surprise * mask) / scored, jnp.sum(jnp.where(right, mask, 0)) / scored


def learn_bits(
    point: Mapping[str, Any],
    *,
    student: MakeStudent,
    task: Callable[..., BitTask],
    delays: Sequence[int],
    flossing: Flossing | None = None,
    d_in: int = 1,
    length: int = 300,
    batch: int = 16,
    epochs: int = 3000,
    every: int = 100,
    optimizer: Callable[..., optax.GradientTransformation] = optax.adam,
    learning_rate: float = 1e-3,
    max_norm: float = 0.03,
    spectrum: int = 1,
) -> dict[str, Array]:
    """One student, drawn with `seed`, learns the task at each of the delays; each entry has a leading axis of these.

    The student is the same at the start for all delays, and so is its first flossing. What follows is recorded in
    stretches of `every` epochs, along a second axis: `accuracy` and `loss`, the mean over the stretch; and, measured at
    its beginning but after a flossing, `first` and `last`, the exponents Λ_1 and Λ_k with k = `spectrum` on a sequence
    of its own, and `gradient`, the norm of ∂L/∂x_0 over a batch (all NaN if the student is no `BitReader`). Also
    `accuracy_end`, that of 16 batches after the last epoch, and `diverged`, if a loss or gradient was not finite.

    `max_norm` is that of `clip_each` before the optimiser; infinity is none. Raises `ValueError` unless `every` divides
    `epochs` and the epochs of the flossing, and for the latter if the student is not a `BitReader`.
    """
    require_integer("every", every, minimum=1)
    require_integer("epochs", epochs, minimum=1)
    if epochs % every:
        raise ValueError(f"every must divide epochs = {epochs}, got {every}")
    student_key, train_key, floss_key, test_key = jr.split(jr.key(point["seed"]), 4)
    whole = student(d_in=d_in, batch=batch, key=student_key)
    if flossing is not None:
        if not isinstance(whole, BitReader):
            raise ValueError(f"student must be a BitReader to be flossed, got {type(whole).__name__}")
        if any(epoch % every or not 0 <= epoch < epochs for epoch in flossing.epochs):
            raise ValueError(
                f"the epochs of flossing must be multiples of every = {every} below {epochs}, got {flossing.epochs}"
            )
    due = np.isin(np.arange(0, epochs, every), () if flossing is None else flossing.epochs)
    descent = optax.chain(clip_each(max_norm), optimizer(learning_rate))
    flosser = _Flosser(flossing, d_in)
    start, rest = eqx.partition(whole, eqx.is_inexact_array)
    floss_state, floss_ok = flosser.init(start), jnp.array(True)
    if due[0]:
        start, floss_state, floss_ok = flosser(start, rest, floss_state, jr.fold_in(floss_key, 0), first=True)

    def draw(key: PRNGKeyArray, delay: Array) -> BitTask:
        return jax.vmap(lambda k: task(k, length, delay))(jr.split(key, batch))

    def learn(delay: Array) -> dict[str, Array]:
        def loss(trained: PyTree, key: PRNGKeyArray) -> tuple[Array, Array]:
            return bit_loss(eqx.combine(trained, rest), *draw(key, delay))

        def stretch(carry: tuple, now: tuple[Array, Array]) -> tuple[tuple, dict[str, Array]]:
            (trained, state, floss_state, fine), (index, due) = carry, now
            key = jr.fold_in(floss_key, index)
            trained, floss_state, flossed = jax.lax.cond(
                due & (index > 0),
                lambda trained, state: flosser(trained, rest, state, key, first=False),
                lambda trained, state: (trained, state, jnp.array(True)),
                trained,
                floss_state,
            )
            key = jr.fold_in(train_key, index)
            measured = _measure(eqx.combine(trained, rest), loss, trained, key, spectrum, length, d_in)
            options = {"key": key, "optimizer_state": state, "has_aux": True}
            trained, state, record = train(loss, trained, descent, every, **options)
            fine &= flossed & (record.steps_taken == every)
            kept = {"accuracy": jnp.mean(record.auxiliary), "loss": jnp.mean(record.loss)} | measured
            return (trained, state, floss_state, fine), kept

        with jax.numpy_dtype_promotion("standard"):
            carry = start, jax.tree.map(jnp.asarray, descent.init(start)), floss_state, floss_ok
        (trained, _, _, fine), columns = jax.lax.scan(stretch, carry, (jnp.arange(len(due)), jnp.asarray(due)))
        ends = jax.lax.map(lambda key: loss(trained, key)[1], jr.split(test_key, 16))
        return columns | {"accuracy_end": jnp.mean(ends), "diverged": ~fine}

    return jax.vmap(learn)(jnp.asarray(delays))


class _Flosser:
    """Flossing, if it is due, of the arrays of a student; all else of it is `rest`."""

    def __init__(self, how: Flossing | None, d_in: int):
        self.how = how
        if how is not None:
            self.optimizer = optax.adam(how.learning_rate)
            self.sample = partial(fair_bits, length=how.length, d_in=d_in)

    def init(self, trained: Any) -> PyTree:
        """The optimiser's state at the start."""
        with jax.numpy_dtype_promotion("standard"):
            return None if self.how is None else jax.tree.map(jnp.asarray, self.optimizer.init(trained.cell))

    def __call__(
        self, trained: Any, rest: Any, state: PyTree, key: PRNGKeyArray, *, first: bool
    ) -> tuple[Any, PyTree, Array]:
        """The student, the optimiser's state, and whether all steps were taken."""
        how = self.how
        if how is None:
            return trained, state, jnp.array(True)
        steps = how.steps if first else how.later
        cell, state, history = floss(
            eqx.combine(trained.cell, rest.cell),
            jax.tree.map(lambda leaf: leaf[0], trained.initial_states),
            self.sample,
            num_exponents=how.num_exponents,
            target=how.target,
            steps=steps,
            optimizer=self.optimizer,
            optimizer_state=state,
            transient=how.transient,
            key=key,
        )
        flossed = eqx.tree_at(lambda student: student.cell, trained, eqx.filter(cell, eqx.is_inexact_array))
        return flossed, state, history.steps_taken == steps


def _measure(
    student: Student, loss: Callable, trained: Any, key: PRNGKeyArray, spectrum: int, length: int, d_in: int
) -> dict[str, Array]:
    """Λ_1, Λ_k and the norm of the gradient with respect to the initial states."""
    if not isinstance(student, BitReader):
        return dict.fromkeys(("first", "last", "gradient"), jnp.array(jnp.nan))
    state = jax.tree.map(lambda leaf: leaf[0], student.initial_states)
    bits = fair_bits(key, max(length, 100) + 50, d_in)
    exponents = lyapunov_exponents(student.cell, state, bits, spectrum, transient=50)
    gradient = jax.grad(lambda trained: loss(trained, key)[0])(trained)
    norm = jnp.sqrt(squared_norm(gradient.initial_states))
    return {"first": exponents[0], "last": exponents[-1], "gradient": norm}
