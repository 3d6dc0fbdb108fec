r"""Networks brought to the same leading exponent Λ_1 in different ways, and what their sensitivity is there.

    flossed       Λ_1, ..., Λ_k are trained towards the target
    scaled        J → g J, with g found by bisection
    linear        φ(x) = x, and J scaled to the spectral radius e^{Λ_1}

The derivative is a sum over the past, ∂x_t/∂J = Σ_τ M_{t,τ} G_τ. If its terms are orthogonal, its mean square is that
of the products, Σ_k E‖M_k‖², which grows as 1/|Λ_ms| while the mean-square rate Λ_ms is negative
(`scanrnn.lyapunov.mean_square_exponent`); if they all point the same way, as 1/Λ_ms². `portrait` measures both on one
network, `descend_from` what plain gradient descent makes of it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from ._checks import require_integer, require_values
from .cells import Initializer, VanillaCell, gaussian
from .curvature import top_eigenvalue
from .flossing import BitReader, Flossing, bit_loss, vanilla
from .lyapunov import floss, lyapunov_exponents, mean_square_exponent
from .recurrence import scan_cell
from .sensitivity import coherence
from .tasks import delayed_copy, fair_bits
from .training import train

Inputs = Callable[[PRNGKeyArray, int], Float[Array, "time 1"]]
Way = Callable[[VanillaCell, Array, Inputs, Array, PRNGKeyArray], VanillaCell]  # cell, state, inputs, target, key


def plain_bits(key: PRNGKeyArray, length: int) -> Float[Array, "time 1"]:
    """0 or 1, as in the tasks: half of their power is their mean, which does not change from step to step."""
    return fair_bits(key, length)


def signed_bits(key: PRNGKeyArray, length: int) -> Float[Array, "time 1"]:
    """-1 or 1, of mean zero."""
    return 2 * fair_bits(key, length) - 1


# Ways ----------------------------------------------------------------------------------------------------------------


def flossed(
    cell: VanillaCell,
    state: Array,
    inputs: Inputs,
    target: Array,
    key: PRNGKeyArray,
    *,
    num_exponents: int = 1,
    steps: int = 500,
) -> VanillaCell:
    """The cell after `steps` steps of flossing its k leading exponents to the target; all else as in `Flossing`."""
    how = Flossing(num_exponents)
    options: Any = {"num_exponents": num_exponents, "steps": steps, "transient": how.transient, "target": target}
    optimizer = optax.adam(how.learning_rate)
    moved: Any = floss(cell, state, lambda k: inputs(k, how.length), optimizer=optimizer, key=key, **options)[0]
    return moved


def scaled(
    cell: VanillaCell,
    state: Array,
    inputs: Inputs,
    target: Array,
    key: PRNGKeyArray,
    *,
    length: int = 3000,
    halvings: int = 16,
) -> VanillaCell:
    r"""The cell with J → g J, where g in [0.1, 10] is found by bisection, so that $\Lambda_1$ is the target.

    On one sequence of inputs for all g: there Λ_1(g) is smooth, and it increases, but for small ripples. Not in very
    small networks, whose units can stay saturated: a target out of reach ends at g = 10, so look at what was achieved.
    """
    sequence = inputs(key, length)

    def with_gain(log_gain: Array) -> VanillaCell:
        return eqx.tree_at(lambda c: c.recurrent_weight, cell, jnp.exp(log_gain) * cell.recurrent_weight)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        above = lyapunov_exponents(with_gain(middle), state, sequence, 1, transient=length // 4)[0] > target
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    low, high = jax.lax.fori_loop(0, halvings, halve, (jnp.log(jnp.asarray(0.1)), jnp.log(jnp.asarray(10.0))))
    return with_gain((low + high) / 2)


def linear(cell: VanillaCell, state: Array, inputs: Inputs, target: Array, key: PRNGKeyArray) -> VanillaCell:
    r"""The same network without its nonlinearity, J scaled to the spectral radius $e^{\Lambda_1}$, exactly."""
    del state, inputs
    weight = cell.recurrent_weight
    weight = jnp.exp(target) / jnp.max(jnp.abs(jnp.linalg.eigvals(weight))) * weight
    plain = VanillaCell(cell.input_weight.shape[1], len(weight), activation=_identity, key=key)
    arrays = lambda c: (c.recurrent_weight, c.input_weight, c.bias)  # noqa: E731
    return eqx.tree_at(arrays, plain, (weight, cell.input_weight, cell.bias))


def _identity(x: Array) -> Array:
    return x


# Measurements --------------------------------------------------------------------------------------------------------


def portrait(
    point: Mapping[str, Any],
    *,
    way: Way,
    recurrent_init: Initializer | None = None,
    inputs: Inputs = plain_bits,
    d_hidden: int = 32,
    length: int = 4000,
    transient: int = 1000,
    walkers: int = 256,
) -> dict[str, Array]:
    r"""One network, drawn with `seed` and brought to `target` in one way, looked at in a window of its own.

    **Returns** `first`, the achieved $\Lambda_1$; `mean_square`, the mean-square rate, from as many walkers; `total`
    and `incoherent`, the time averages of the two sums of `scanrnn.sensitivity.coherence` for θ = J, and, with
    `_median`, the medians over time; `variance`, that of a unit's state over time, averaged over the units; `activity`,
    the time average of $\|\varphi(x)\|^2$; `norm`, $\|J\|_2$; `radius`, its spectral radius; and
    `eigenvector_condition`, how far J is from normal.

    Raises `ValueError` unless 0 <= transient < length.
    """
    require_integer("length", length, minimum=1)
    require_integer("transient", transient, minimum=0, maximum=length - 1)
    cell, state, key = network(point, way=way, recurrent_init=recurrent_init, inputs=inputs, d_hidden=d_hidden)
    window_key, walker_key = jr.split(key)
    sequence = inputs(window_key, length)
    only_j = eqx.tree_at(lambda c: c.recurrent_weight, jax.tree.map(lambda _: False, cell), replace=True)
    sums = coherence(cell, state, sequence, trainable=only_j)
    total, incoherent = sums.total[transient:], sums.incoherent[transient:]
    states = scan_cell(cell, state, sequence)[1][transient:]
    values, vectors = jnp.linalg.eig(cell.recurrent_weight)
    walks = jax.vmap(lambda k: inputs(k, 1000))(jr.split(walker_key, walkers))
    return {
        "first": lyapunov_exponents(cell, state, sequence, 1, transient=transient)[0],
        "mean_square": mean_square_exponent(cell, state, walks, transient=200),
        "total": jnp.mean(total),
        "incoherent": jnp.mean(incoherent),
        "total_median": jnp.median(total),
        "incoherent_median": jnp.median(incoherent),
        "variance": jnp.mean(jnp.var(states, axis=0)),
        "activity": jnp.mean(jnp.sum(cell.activation(states) ** 2, axis=1)),
        "norm": jnp.linalg.norm(cell.recurrent_weight, 2),
        "radius": jnp.max(jnp.abs(values)),
        "eigenvector_condition": jnp.linalg.cond(vectors),
    }


def network(
    point: Mapping[str, Any],
    *,
    way: Way,
    recurrent_init: Initializer | None = None,
    inputs: Inputs = plain_bits,
    d_hidden: int = 32,
) -> tuple[VanillaCell, Array, PRNGKeyArray]:
    """The network of a point, its state to start from, and a key for what is to be done with it."""
    network_key, way_key, key = jr.split(jr.key(point["seed"]), 3)
    init = gaussian() if recurrent_init is None else recurrent_init
    student = vanilla(d_hidden=d_hidden, recurrent_init=init, batch=1, key=network_key)
    state = student.initial_states[0]
    cell: Any = student.cell
    return way(cell, state, inputs, jnp.asarray(point["target"], float), way_key), state, key


def descend_from(
    point: Mapping[str, Any],
    *,
    way: Way,
    rates: Sequence[float],
    recurrent_init: Initializer | None = None,
    inputs: Inputs = plain_bits,
    d_hidden: int = 32,
    delay: int = 5,
    length: int = 100,
    batch: int = 16,
    steps: int = 500,
) -> dict[str, Array]:
    """Plain gradient descent, nothing clipped, on a delayed copy, from the network of a point, at each of the rates.

    **Returns** `first`, the achieved Λ_1; `start`, the loss at the start, on one batch; `sharpness`, the eigenvalue of
    its Hessian that is largest in modulus; and `end`, along an axis of the rates, the mean loss of the last twentieth
    of the steps, NaN if the training stopped. Readout weights have variance 1/N, so that the loss starts near log 2.
    The task's inputs are `plain_bits`, whatever the network was brought to its exponent with.

    Raises `ValueError` unless `steps` is a multiple of 20.
    """
    require_integer("steps", steps, minimum=1)
    if steps % 20:
        raise ValueError(f"steps must be a multiple of 20, got {steps}")
    cell, state, key = network(point, way=way, recurrent_init=recurrent_init, inputs=inputs, d_hidden=d_hidden)
    read_key, train_key, sharp_key, window_key = jr.split(key, 4)
    states = jnp.broadcast_to(state, (batch, d_hidden))
    narrow = jax.nn.initializers.normal(d_hidden**-0.5)
    student = BitReader(cell, states, weight_init=narrow, key=read_key)

    def loss(student: BitReader, key: PRNGKeyArray) -> Array:
        draw = jax.vmap(lambda k: delayed_copy(k, length, delay))
        return bit_loss(student, *draw(jr.split(key, batch)))[0]

    def end(rate: Array) -> Array:
        _, _, record = train(loss, student, optax.sgd(rate), steps, key=train_key)
        return jnp.where(record.steps_taken < steps, jnp.nan, jnp.mean(record.loss[-(steps // 20) :]))

    at_start = partial(loss, key=sharp_key)
    return {
        "first": lyapunov_exponents(cell, state, inputs(window_key, 3000), 1, transient=500)[0],
        "start": at_start(student),
        "sharpness": top_eigenvalue(at_start, student, steps=50, key=sharp_key),
        "end": jax.vmap(end)(jnp.asarray(rates)),
    }


def tuned(
    *,
    d_hidden: int,
    exponent: float,
    recurrent_init: Initializer | None = None,
    d_in: int = 1,
    batch: int,
    key: PRNGKeyArray,
) -> BitReader:
    r"""A student of `scanrnn.flossing` whose recurrent weights were `scaled` until $\Lambda_1$ was `exponent`.

    Raises `ValueError` for a `d_in` other than 1.
    """
    require_integer("d_in", d_in, minimum=1, maximum=1)
    student_key, scale_key = jr.split(key)
    student = vanilla(d_hidden=d_hidden, recurrent_init=recurrent_init, batch=batch, key=student_key)
    cell: Any = student.cell
    state = student.initial_states[0]
    return eqx.tree_at(
        lambda s: s.cell, student, scaled(cell, state, plain_bits, jnp.asarray(exponent, float), scale_key)
    )


# Tables of portraits -------------------------------------------------------------------------------------------------


def matched(
    table: Mapping[str, np.ndarray], exponent: float, column: str, *, within: float = 1.4
) -> Float[np.ndarray, " networks"]:
    """`column` of each network (seed) of a table, where its achieved exponent `first` is `exponent` up to a factor.

    A network with several such rows counts once, with their mean; one without any is left out. Raises `ValueError`
    unless `exponent` is negative and `within` above 1.
    """
    require_values("exponent", exponent, "negative", lambda x: x < 0)
    require_values("within", within, "above 1", lambda x: x > 1)
    ratio = table["first"] / exponent
    near = (ratio > 1 / within) & (ratio < within) & np.isfinite(table[column])
    seeds = table["seed"][near]
    return np.array([np.mean(table[column][near][seeds == seed]) for seed in np.unique(seeds)])


def powers(
    table: Mapping[str, np.ndarray], column: str, rate: str = "first", *, nearest: float = 0.008, farthest: float = 0.15
) -> Float[np.ndarray, " networks"]:
    r"""p of each network (seed), fitted to $y - y_0\propto|r|^p$ for negative r between `nearest` and `farthest`.

    y is `column` and r is `rate`, a typical or a mean-square rate; $y_0$ is y at the network's lowest target, the part
    of the modes that are fast whatever the first does. Rows without excess over it are left out, and networks with
    fewer than three rows.
    """
    found = []
    for seed in np.unique(table["seed"]):
        rows = {name: values[table["seed"] == seed] for name, values in table.items()}
        distance, excess = -rows[rate], rows[column] - rows[column][np.argmin(rows["target"])]
        here = (distance > nearest) & (distance < farthest) & (excess > 0) & np.isfinite(excess)
        if here.sum() >= 3:
            found.append(np.polyfit(np.log(distance[here]), np.log(excess[here]), 1)[0])
    return np.array(found)
