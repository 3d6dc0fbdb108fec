r"""How fast small differences grow or shrink along a trajectory: long-term Jacobians and Lyapunov exponents.

A cell maps x_{t-1} to x_t. With D_t = ∂x_t/∂x_{t-1}, the long-term Jacobian is M_t = D_t ... D_1. Its singular values
behave as exp(Λ_i t); the rates Λ_1 ≥ ... ≥ Λ_N are the Lyapunov exponents, in nats per step. They are found without
ever forming M_t, by carrying k orthonormal directions along and re-orthonormalising them:

    D_t Q_{t-1} = Q_t R_t,      Λ_i = mean over t of log |R_t,ii|.

`floss` trains a cell until its exponents are where they are wanted (Engelken 2023):

    L = mean over i ≤ k of (Λ_i - target)².

Every function takes any cell `cell(input, state) -> state`. N counts real coordinates of the state: a pytree is
ravelled (an LSTM has 2 × hidden), a complex state is seen as R^{2N}, in which each log|λ| comes twice.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ._checks import require_finite, require_inexact, require_integer, time_length
from ._real import flatten
from ._tangent import Cell, orthonormalize, push, push_along, random_directions, real_map
from .recurrence import check_differentiable
from .training import run_training


def local_exponents(
    cell: Cell,
    state: PyTree,
    inputs: PyTree,
    num_exponents: int,
    *,
    interval: int = 1,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "blocks num_exponents"]:
    r"""$\log|R_{ii}|$ of each block of $\ell$ = `interval` steps, $D_{t+\ell}\cdots D_{t+1} Q_t = Q_{t+\ell} R$.

    In nats; (T / interval, k). For k = N their sum over i is exactly $\log|\det|$ of the block's Jacobian.
    Differentiable in everything: the trajectory, Q and R. A long interval loses digits, since R's condition number
    grows with it.

    The first directions come from the QR decomposition of a Gaussian (N, k) matrix drawn with `key`; `None` stands for
    `jax.random.key(0)`. A singular Jacobian gives -inf, or, where rounding hides the zero, a value without
    meaning: nothing is resolved that lies log(1/ε) (36 nats in float64, 16 in float32) below the first. NaN in traced
    inputs gives NaN.

    Raises `ValueError` where T = 0, k is not in 1 ... N, T is not a multiple of `interval`, the inputs or the state are
    not finite, or the cell's new state differs in structure, shape or dtype from the old one; `TypeError` for an
    integer state.
    """
    _check(cell, state, inputs, "num_exponents", num_exponents)
    _require_multiple("the number of steps T", time_length("inputs", inputs), interval)
    return _local_exponents(cell, state, inputs, num_exponents, 0, interval, key)


def lyapunov_exponents(
    cell: Cell,
    state: PyTree,
    inputs: PyTree,
    num_exponents: int,
    *,
    transient: int = 0,
    interval: int = 1,
    key: PRNGKeyArray | None = None,
) -> Float[Array, " num_exponents"]:
    r"""The k leading Lyapunov exponents, mean over t of $\log|R_{t,ii}|$, in nats per step, descending; (k,).

    The first `transient` steps are run, so that trajectory and directions settle, and not counted. The rest must be a
    multiple of `interval`, the number of steps between two QR decompositions. `key`, differentiability and errors are
    those of `local_exponents`; also `ValueError` if `transient` leaves no step to count.

    The finite-time bias is O(1/T). Where the Jacobian is constant with eigenvalues of distinct moduli, a transient
    makes it exponentially small; for complex pairs it stays O(1/T). Method: Benettin et al. (1980); for recurrent
    networks Engelken, Wolf & Abbott (2023).
    """
    _check(cell, state, inputs, "num_exponents", num_exponents)
    length = time_length("inputs", inputs)
    require_integer("transient", transient, minimum=0, maximum=length - 1)
    _require_multiple("the number of counted steps, T - transient,", length - transient, interval)
    logs = _local_exponents(cell, state, inputs, num_exponents, transient, interval, key)
    return -jnp.sort(-jnp.mean(logs, axis=0) / interval)


def long_term_jacobian(cell: Cell, state: PyTree, inputs: PyTree) -> Float[Array, "state state"]:
    r"""$M_T = \partial x_T/\partial x_0 = D_T\cdots D_1$; (N, N).

    A plain product: its small singular values drown in rounding once the condition number passes 1/ε (36 nats in
    float64, 16 in float32). Use `log_condition_number` beyond. Errors as in `local_exponents`.
    """
    _check(cell, state, inputs)
    return _long_term_jacobian(cell, state, inputs)


def log_condition_number(
    cell: Cell,
    state: PyTree,
    inputs: PyTree,
    num_directions: int,
    *,
    key: PRNGKeyArray | None = None,
) -> Float[Array, " time"]:
    r"""$\log\kappa_2$ of the long-term Jacobian on k directions, $P_t = R_t\cdots R_1$, after each step; (T,), in nats.

    It grows as $(\Lambda_1-\Lambda_k)\,t$. The product itself would overflow, and lose its small singular values at 36
    nats. So it is kept as $P = \mathrm{diag}(e^{\ell})\,U$ with logarithmic row scales ℓ and U upper triangular with
    unit diagonal (up to sign), which stays of order one; then $\kappa = \|P\|\,\|P^{-1}\|$, each norm of a matrix whose
    scale was taken out first. A direction that is lost (a zero R_ii) gives +inf from then on. `key` and errors are
    those of `local_exponents`.
    """
    _check(cell, state, inputs, "num_directions", num_directions)
    return _log_condition_number(cell, state, inputs, num_directions, key)


def mean_square_exponent(
    cell: Cell,
    state: PyTree,
    inputs: PyTree,
    *,
    transient: int = 0,
    key: PRNGKeyArray | None = None,
) -> Float[Array, ""]:
    r"""The mean-square rate $\lim_t \frac1{2t}\log\mathbb E\|M_t v\|^2$ over random inputs, in nats per step; a scalar.

    Never below the typical rate $\Lambda_1=\lim_t\frac1t\mathbb E\log\|M_t v\|$; the two agree if growth does not
    fluctuate. `inputs` holds independent samples of the input, (walkers, T, ...), whose steps must be independent of
    each other too: a resampled walker takes another's past and keeps its own future, so with correlated steps the
    result is too low.

    A plain average over samples fails as soon as rarer sequences carry the mean than were drawn. So the walkers are
    resampled after each step in proportion to $\|Dv\|^2$, and the rate is the mean over t of ½ log of the walkers' mean
    $\|Dv\|^2$; its bias is O(1/walkers). The first `transient` steps are not counted. Method: Vanneste (2010).

    `key` draws directions and resampling; `None` stands for `jax.random.key(0)`. Errors as in `lyapunov_exponents`.
    """
    walkers = time_length("inputs", inputs)
    require_finite("inputs", inputs)
    _check(cell, state, jax.tree.map(lambda leaf: leaf[0], inputs))
    by_time = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), inputs)
    require_integer("transient", transient, minimum=0, maximum=time_length("inputs", by_time) - 1)
    return jnp.mean(_local_mean_squares(cell, state, by_time, walkers, key)[transient:])


# Gradient flossing ---------------------------------------------------------------------------------------------------


class FlossingHistory(NamedTuple):
    """What happened at each step of `floss`, before it was taken.

    - `loss`: `flossing_loss` of the exponents; (steps,)
    - `exponents`: the k leading ones, of one short window of inputs; (steps, k)
    - `steps_taken`: how many were taken; fewer than `steps` if a loss or a gradient was not finite
    """

    loss: Float[Array, " steps"]
    exponents: Float[Array, "steps num_exponents"]
    steps_taken: Int[Array, ""]


def flossing_loss(
    exponents: Float[Array, " num_exponents"], target: float | Float[Array, "..."] = 0.0
) -> Float[Array, ""]:
    r"""$\frac1k\sum_{i\le k}(\Lambda_i-\mathrm{target})^2$, in squared nats per step; one target, or one for each.

    Raises `ValueError` for targets of another shape or not finite, `TypeError` for exponents that are not floating
    point.
    """
    require_inexact("exponents", exponents)
    exponents = jnp.asarray(exponents)
    _check_target(target, exponents.shape)
    return jnp.mean((exponents - jnp.asarray(target, exponents.dtype)) ** 2)


def _check_target(target: float | Array, shape: tuple[int, ...]) -> None:
    if jnp.shape(target) not in ((), shape):
        raise ValueError(f"target must be one number or have the shape {shape}, got shape {jnp.shape(target)}")
    require_finite("target", target)


def floss(
    cell: Cell,
    state: PyTree,
    sample_inputs: Callable[[PRNGKeyArray], PyTree],
    *,
    num_exponents: int,
    target: float | Float[Array, "..."] = 0.0,
    steps: int,
    optimizer: optax.GradientTransformation,
    optimizer_state: PyTree | None = None,
    trainable: Any = eqx.is_inexact_array,
    transient: int = 0,
    interval: int = 1,
    progress: bool = False,
    key: PRNGKeyArray,
) -> tuple[Cell, PyTree, FlossingHistory]:
    r"""`steps` steps of an optimiser down `flossing_loss` of the k leading exponents: gradient flossing.

    **Arguments:** `sample_inputs(key)` draws the inputs of one step, of fixed length T; `state` is where each of these
    sequences starts; `target`, one number or one for each exponent, the largest first; `trainable`, which leaves of the
    cell are moved, as in `equinox.filter`; `optimizer_state`, what the last call returned, to go on with it;
    `progress`, to show a bar. `transient` and `interval` are those of `lyapunov_exponents`. With k near N keep the
    interval at 1: the gradient divides by R, whose condition number grows with it.

    **Returns** the cell, the optimiser's state, and the `FlossingHistory`.

    The gradient passes through the trajectory, Q and R. One step costs about two steps of training on a few times as
    many inputs; the QR decompositions are O(N k²) each. Everything is one compiled scan, which serves further calls
    with the same `sample_inputs`, `optimizer` and sizes. Method: Engelken (2023).

    At the first loss or gradient that is not finite it **stops**: cell and optimiser's state stay as they were before,
    `history.steps_taken` is the number of that step, and a `RuntimeWarning` says so (traced: look there).

    **Raises** as `lyapunov_exponents` and `scanrnn.training.train`: `ValueError` also if no leaf is trainable.
    """
    require_inexact("state", state)
    require_finite("state", state)
    require_integer("num_exponents", num_exponents, minimum=1, maximum=flatten(state).size)
    _check_target(target, (num_exponents,))
    moved, fixed = eqx.partition(cell, trainable)
    if not any(eqx.is_inexact_array(leaf) for leaf in jax.tree.leaves(moved)):
        raise ValueError("trainable must choose at least one floating-point array of the cell, got none")
    target = jnp.asarray(target, flatten(state).dtype)
    loss = _Flossing(fixed, state, target, sample_inputs, num_exponents, transient, interval)
    moved, optimizer_state, record = run_training(
        "floss",
        loss,
        moved,
        optimizer,
        steps,
        key=key,
        has_aux=True,
        optimizer_state=optimizer_state,
        progress=progress,
    )
    return (
        eqx.combine(moved, fixed),
        optimizer_state,
        FlossingHistory(record.loss, record.auxiliary, record.steps_taken),
    )


class _Flossing(eqx.Module):
    """The loss as a module: its arrays are traced, so that other values of them need no other program."""

    fixed: PyTree
    state: PyTree
    target: Array
    sample_inputs: Callable[[PRNGKeyArray], PyTree]
    num_exponents: int = eqx.field(static=True)
    transient: int = eqx.field(static=True)
    interval: int = eqx.field(static=True)

    def __call__(self, moved: PyTree, key: PRNGKeyArray) -> tuple[Array, Array]:
        exponents = lyapunov_exponents(
            eqx.combine(moved, self.fixed),
            self.state,
            self.sample_inputs(key),
            self.num_exponents,
            transient=self.transient,
            interval=self.interval,
        )
        return flossing_loss(exponents, self.target), exponents


# What follows is compiled once for each kind of cell and shape, also where the caller does not compile.


@eqx.filter_jit
def _local_exponents(
    cell: Cell, state: PyTree, inputs: PyTree, count: int, transient: int, interval: int, key: PRNGKeyArray | None
) -> Array:
    """log|R_ii| of each block of `interval` steps after the transient."""
    step, start = real_map(cell, state)

    def block(carry, inputs):
        x, pushed = push_along(step, carry, inputs)
        q, logs = orthonormalize(pushed)
        return (x, q), logs

    def run(carry, first, last, interval):
        blocks = jax.tree.map(lambda leaf: leaf[first:last].reshape(-1, interval, *leaf.shape[1:]), inputs)
        return jax.lax.scan(block, carry, blocks)

    carry, remainder = (start, random_directions(key, start, count)), transient % interval
    if remainder:
        carry, _ = run(carry, 0, remainder, remainder)
    carry, _ = run(carry, remainder, transient, interval)
    return run(carry, transient, time_length("inputs", inputs), interval)[1]


@eqx.filter_jit
def _long_term_jacobian(cell: Cell, state: PyTree, inputs: PyTree) -> Array:
    step, start = real_map(cell, state)
    carry = (start, jnp.eye(start.size, dtype=start.dtype))
    return push_along(step, carry, inputs)[1]


@eqx.filter_jit
def _log_condition_number(
    cell: Cell, state: PyTree, inputs: PyTree, count: int, key: PRNGKeyArray | None
) -> Float[Array, " time"]:
    step, start = real_map(cell, state)
    identity = jnp.eye(count, dtype=start.dtype)

    def advance(carry, input):
        x, q, scales, unit = carry
        x, pushed = push(step, x, q, input)
        q, r = jnp.linalg.qr(pushed)
        new_scales = scales + jnp.log(jnp.abs(jnp.diagonal(r)))
        # Rows are ordered by decay, so these factors do not grow. The lower triangle is zero: it must not be inf * 0.
        factors = jnp.triu(jnp.exp(jnp.triu(scales[None, :] - new_scales[:, None])))
        unit = (r * factors) @ unit
        return (x, q, new_scales, unit), _log_condition(new_scales, unit, identity)

    carry = (start, random_directions(key, start, count), jnp.zeros(count, start.dtype), identity)
    return jax.lax.scan(advance, carry, inputs)[1]


@eqx.filter_jit
def _local_mean_squares(cell: Cell, state: PyTree, inputs: PyTree, walkers: int, key: PRNGKeyArray | None) -> Array:
    """½ log of the walkers' mean ‖Dv‖² at each step; the inputs here have time before walkers."""
    step, start = real_map(cell, state)
    direction_key, resampling_key = jax.random.split(jax.random.key(0) if key is None else key)

    def push(x, v, input):
        return jax.jvp(lambda x: step(input, x), (x,), (v,))

    def advance(carry, now):
        (x, v), (input, offset) = carry, now
        x, v = jax.vmap(push)(x, v, input)
        powers = jnp.sum(v**2, axis=1)
        ranks = (jnp.arange(walkers, dtype=powers.dtype) + offset) / walkers  # systematic resampling: the least noise
        chosen = jnp.searchsorted(jnp.cumsum(powers) / jnp.sum(powers), ranks).clip(max=walkers - 1)
        v = v / jnp.sqrt(powers)[:, None]
        return (x[chosen], v[chosen]), 0.5 * jnp.log(jnp.mean(powers))

    states = jnp.broadcast_to(start, (walkers, start.size))
    directions = jax.random.normal(direction_key, states.shape, start.dtype)
    directions = directions / jnp.linalg.norm(directions, axis=1, keepdims=True)
    offsets = jax.random.uniform(resampling_key, (time_length("inputs", inputs),), start.dtype)
    return jax.lax.scan(advance, (states, directions), (inputs, offsets))[1]


def _log_condition(scales: Array, unit: Array, identity: Array) -> Array:
    """log κ of diag(exp(scales)) @ unit, with `unit` upper triangular and well conditioned."""
    highest, lowest = jnp.max(scales), jnp.min(scales)
    inverse = jax.scipy.linalg.solve_triangular(unit, identity)
    norm = jnp.linalg.norm(jnp.exp(scales - highest)[:, None] * unit, 2)
    inverse_norm = jnp.linalg.norm(inverse * jnp.exp(lowest - scales)[None, :], 2)
    condition = (highest + jnp.log(norm)) - (lowest - jnp.log(inverse_norm))
    return jnp.where(jnp.isneginf(lowest), jnp.inf, condition)


def _check(cell: Cell, state: PyTree, inputs: PyTree, name: str = "num_directions", count: int = 1) -> None:
    """Refuse what none of these functions can use; `name` is what the caller's signature calls `count`."""
    check_differentiable(cell, state, inputs)
    require_integer(name, count, minimum=1, maximum=flatten(state).size)


def _require_multiple(name: str, length: int, interval: int) -> None:
    require_integer("interval", interval, minimum=1)
    if length % interval:
        raise ValueError(f"{name} must be a multiple of interval = {interval}, got {length}")
