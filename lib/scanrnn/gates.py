r"""Measured: what a gate does to the memory of single units, and to the Jacobian of a whole gated network.

SimpleGRU:  h_t = z_t h_{t-1} + (1 - z_t) W x_t,    z_t = σ(b + σ_x V x_t + σ_h U h_{t-1}),    b = log T'

Where the gates stand still (σ_x = σ_h = 0) each unit is the one of `scanrnn.theory.gated_state_variance`, with the
input's autocovariance. `gated_unit_sample` measures h² and (∂h/∂b)² for any σ_x and σ_h; `state_jacobians` the matrices
∂h_Δ/∂h_0 of any cell, such as a `chrono_gru`, whose entries say which units talk to which over time.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ._checks import require_finite, require_inexact, require_integer, require_rank, require_values, time_length
from ._tangent import Cell, push, real_map
from .cells import chrono
from .recurrence import check_differentiable, scan_cell
from .sensitivity import unit_sensitivity


class SimpleGRU(eqx.Module):
    r"""A GRU with a linear candidate that reads the input only, and no reset gate (Zucchet & Orvieto 2024, Fig. 15).

    $$h_t=z_t\odot h_{t-1}+(1-z_t)\odot Wx_t,\qquad z_t=\sigma(b+\sigma_xVx_t+\sigma_hUh_{t-1})$$

    W, V, U are Gaussian of variance 1 over their number of columns, so that $Wx_t$ has the autocovariance that the
    features of the input have on average; $b=\log T'$ with T' ~ U[`min_time`, `max_time`], so that the gate's time
    scale at rest is 1/(1 - σ(b)) = 1 + T'. `input_scale` is σ_x and `state_scale` σ_h; both are kept in the weights.

    Raises `ValueError` for a size below 1, unless 0 < min_time <= max_time < ∞, and for a scale that is negative or not
    finite; `TypeError` for sizes that are not integers.
    """

    candidate_weight: Float[Array, "hidden input"]  # W
    gate_input_weight: Float[Array, "hidden input"]  # σ_x V
    gate_state_weight: Float[Array, "hidden hidden"]  # σ_h U
    bias: Float[Array, " hidden"]  # b

    def __init__(
        self,
        d_in: int,
        d_hidden: int,
        *,
        min_time: float,
        max_time: float,
        input_scale: float,
        state_scale: float,
        key: PRNGKeyArray,
    ):
        _require(d_in, d_hidden, min_time, max_time, input_scale, state_scale)
        candidate_key, input_key, state_key, time_key = jax.random.split(key, 4)
        self.candidate_weight = jax.random.normal(candidate_key, (d_hidden, d_in)) / d_in**0.5
        self.gate_input_weight = jax.random.normal(input_key, (d_hidden, d_in)) * (input_scale / d_in**0.5)
        self.gate_state_weight = jax.random.normal(state_key, (d_hidden, d_hidden)) * (state_scale / d_hidden**0.5)
        self.bias = jnp.log(jax.random.uniform(time_key, (d_hidden,), minval=min_time, maxval=max_time))

    def __call__(self, input: Float[Array, " input"], state: Float[Array, " hidden"]) -> Float[Array, " hidden"]:
        argument = self.bias + self.gate_input_weight @ input + self.gate_state_weight @ state
        return _keep(argument, state, self.candidate_weight @ input)


class GatedUnits(NamedTuple):
    """One number for each unit: its time scale at rest, 1/(1 - σ(b)), and h² and (∂h/∂b)² after the last step."""

    time: Float[Array, " hidden"]
    state_square: Float[Array, " hidden"]
    sensitivity_square: Float[Array, " hidden"]


def gated_unit_sample(
    key: PRNGKeyArray,
    inputs: Float[Array, "time input"],
    d_hidden: int,
    *,
    min_time: float,
    max_time: float,
    input_scale: float,
    state_scale: float,
) -> GatedUnits:
    r"""$h_i^2$ and $(\partial h_i/\partial b_i)^2$ at the last step, for the `SimpleGRU` that `key` makes; each (N,).

    $h_0=0$. The derivative is each unit's own, through the whole past. Where no unit reads another (`state_scale` = 0)
    one forward pass gives all of them. Else unit i also acts on itself through the others: the matrix
    $\partial h_t/\partial b$ is carried along, N³ multiplications a step, and its diagonal taken. (The rows' sums, all
    that one pass could give, and squared random probes are both something else.)

    Units that see one input are not independent: their squares share the chance of its d_in features, of relative size
    √(2/d_in). An error bar should be taken over samples with an input each.

    Raises `ValueError` unless the inputs have two axes, finite entries and a time step, and as `SimpleGRU`; `TypeError`
    for inputs that are not floating point, or complex.
    """
    require_inexact("inputs", inputs)
    require_rank("inputs", inputs, 2)
    time_length("inputs", inputs)
    require_finite("inputs", inputs)
    if jnp.iscomplexobj(inputs):
        raise TypeError(f"inputs must be real, got {inputs.dtype}")
    cell = SimpleGRU(
        inputs.shape[1],
        d_hidden,
        min_time=min_time,
        max_time=max_time,
        input_scale=input_scale,
        state_scale=state_scale,
        key=key,
    )
    measure = _own_derivatives if state_scale == 0 else _coupled_derivatives
    state, derivative = measure(cell, jnp.asarray(inputs, cell.bias.dtype))
    return GatedUnits(1 + jnp.exp(cell.bias), state**2, derivative**2)


def bin_by_time(
    times: Float[ArrayLike, "samples hidden"],
    values: Float[ArrayLike, "samples hidden"],
    edges: Float[ArrayLike, " edges"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per bin of time scales: the mean time, the mean value, and its standard error over samples; (bins,) each.

    A sample counts with the mean over its units in the bin, and not at all where it has none: units of one network
    share their inputs, so they are not independent.

    Raises `ValueError` unless times and values have the same two axes, the edges ascend, and every bin holds units of
    at least two samples.
    """
    time, value, edge = np.asarray(times), np.asarray(values), np.asarray(edges)
    if time.ndim != 2 or time.shape != value.shape:
        raise ValueError(f"times and values must have one shape (samples, units), got {time.shape} and {value.shape}")
    if edge.ndim != 1 or len(edge) < 2 or not (np.diff(edge) > 0).all():
        raise ValueError(f"edges must ascend along one axis, at least two, got {edge}")
    centres, means, errors = [], [], []
    for low, high in itertools.pairwise(edge):
        inside = (time >= low) & (time < high)
        counts = inside.sum(axis=1)
        if np.sum(counts > 0) < 2:
            raise ValueError(f"the bin from {low} to {high} must hold units of at least two samples, got {counts}")
        per_sample = np.where(inside, value, 0).sum(axis=1)[counts > 0] / counts[counts > 0]
        centres.append(time[inside].mean())
        means.append(per_sample.mean())
        errors.append(per_sample.std(ddof=1) / np.sqrt(len(per_sample)))
    return np.array(centres), np.array(means), np.array(errors)


def chrono_gru(
    key: PRNGKeyArray,
    d_in: int,
    d_hidden: int,
    *,
    min_time: float,
    max_time: float,
    input_scale: float,
    state_scale: float,
) -> eqx.nn.GRUCell:
    r"""An `equinox.nn.GRUCell` whose gates and memory one can turn (Zucchet & Orvieto 2024, Fig. 14).

    $$z_t=\sigma(W_zx_t+U_zh_{t-1}+b_z),\quad r_t=\sigma(W_rx_t+U_rh_{t-1}),\quad
      h_t=z_t\odot h_{t-1}+(1-z_t)\odot\tanh(W_nx_t+r_t\odot U_nh_{t-1})$$

    - `min_time`, `max_time`: $b_z=\log T'$ with T' uniform between them, by `scanrnn.cells.chrono`; the other biases 0.
    - `input_scale` σ_x: W_z and W_r are σ_x times Gaussian matrices of variance 2/d_in; W_n is such a matrix itself.
    - `state_scale` σ_h: U_z, U_r and U_n are σ_h times random orthogonal matrices.

    The candidate's U_n is scaled too, so that for σ_x = σ_h = 0 no unit reads another and
    $\partial h_\Delta/\partial h_0=\mathrm{diag}(z^\Delta)$, z = T'/(1 + T'). Errors: as `SimpleGRU`.
    """
    _require(d_in, d_hidden, min_time, max_time, input_scale, state_scale)
    input_key, state_key, time_key = jax.random.split(key, 3)
    cell = eqx.nn.GRUCell(d_in, d_hidden, key=key)  # in Equinox's order: reset, update, new; all is replaced below
    of_input = jax.random.normal(input_key, (3, d_hidden, d_in)) * (2 / d_in) ** 0.5
    of_state = jax.vmap(lambda key: jax.random.orthogonal(key, d_hidden))(jax.random.split(state_key, 3))
    weights = (
        of_input.at[:2].multiply(input_scale).reshape(3 * d_hidden, d_in),
        state_scale * of_state.reshape(3 * d_hidden, d_hidden),
    )
    cell = eqx.tree_at(lambda cell: (cell.weight_ih, cell.weight_hh), cell, weights)
    return chrono(time_key, cell, min_time, max_time)


def state_jacobians(
    cell: Cell, state: PyTree, inputs: PyTree, steps: Sequence[int] | np.ndarray
) -> Float[Array, "steps state state"]:
    r"""$\partial h_\Delta/\partial h_0$ for each number of steps Δ in `steps`; (len(steps), N, N).

    Entry (i, j) is how much coordinate i of the state answers, Δ steps later, to coordinate j. The `long_term_jacobian`
    of the first Δ inputs, all found in one run, N²·(cost of a product) a step. Plain products: their small entries are
    right, their small singular values are not. The numbers must not decrease; 0 gives the identity.

    Raises `ValueError` unless `steps` holds such integers, at least one, none beyond the length of the inputs; else as
    `scanrnn.lyapunov.long_term_jacobian`. Not differentiable in reverse mode.
    """
    check_differentiable(cell, state, inputs)
    length = time_length("inputs", inputs)
    if np.ndim(steps) != 1 or len(steps) == 0:
        raise ValueError(f"steps must hold at least one number on one axis, got shape {np.shape(steps)}")
    for step in steps:
        require_integer("each of steps", step, minimum=0, maximum=length)
    numbers = np.asarray(steps, dtype=np.int32)
    if (np.diff(numbers) < 0).any():
        raise ValueError(f"steps must not decrease, got {numbers.tolist()}")
    return _state_jacobians(cell, state, inputs, jnp.asarray(numbers))


def off_diagonal(jacobians: Float[Array, "*batch state state"]) -> Float[Array, "*batch pairs"]:
    r"""All the N (N - 1) entries off the diagonal, row after row: first all those of unit 0, as the receiving one.

    Raises `ValueError` unless the last two axes are equally long and at least 2.
    """
    n = _require_square(jacobians)
    rows = jnp.reshape(jacobians, (*jacobians.shape[:-2], n * n))
    return rows[..., np.flatnonzero(~np.eye(n, dtype=bool))]


class JacobianEntries(NamedTuple):
    """Of each Jacobian: mean, median and maximum of its diagonal; root mean square and maximum modulus off it."""

    diagonal_mean: Float[Array, "*batch"]
    diagonal_median: Float[Array, "*batch"]
    diagonal_max: Float[Array, "*batch"]
    off_diagonal_rms: Float[Array, "*batch"]
    off_diagonal_max: Float[Array, "*batch"]


def jacobian_entries(jacobians: Float[Array, "*batch state state"]) -> JacobianEntries:
    """The summary of each (N, N) matrix, over *all* its entries. `ValueError` as `off_diagonal`."""
    others = off_diagonal(jacobians)
    diagonal = jnp.diagonal(jacobians, axis1=-2, axis2=-1)
    return JacobianEntries(
        jnp.mean(diagonal, axis=-1),
        jnp.median(diagonal, axis=-1),
        jnp.max(diagonal, axis=-1),
        jnp.sqrt(jnp.mean(others**2, axis=-1)),
        jnp.max(jnp.abs(others), axis=-1),
    )


def sample_off_diagonal(
    key: PRNGKeyArray, jacobians: Float[Array, "*batch state state"], count: int, *, rows: int | None = None
) -> Float[Array, "*batch {count}"]:
    """`count` of the entries off the diagonal at random, no entry twice, the same ones of each matrix.

    Of all rows, or of the first `rows`. The latter is how the notebook released with Zucchet & Orvieto (2024) chose
    them for Fig. 14: 8 rows of 256, that is, how 8 units listen to all the others. What it shows depends on the time
    scales that these 8 happen to have.

    Raises `ValueError` as `off_diagonal`, and unless 1 <= rows <= N and 1 <= count <= rows · (N - 1); `TypeError` for
    numbers that are not integers.
    """
    n = _require_square(jacobians)
    if rows is None:
        rows = n
    require_integer("rows", rows, minimum=1, maximum=n)
    require_integer("count", count, minimum=1, maximum=rows * (n - 1))
    chosen = jax.random.choice(key, rows * (n - 1), (count,), replace=False)
    return off_diagonal(jacobians)[..., chosen]


# What follows is compiled once for each shape, also where the caller does not compile.


@eqx.filter_jit
def _own_derivatives(cell: SimpleGRU, inputs: Array) -> tuple[Array, Array]:
    """h and ∂h_i/∂b_i after the last step, where no unit reads another."""
    candidate, drive = inputs @ cell.candidate_weight.T, inputs @ cell.gate_input_weight.T

    def states(bias):
        def step(h, now):
            new = _keep(bias + now[0], h, now[1])
            return new, new

        return jax.lax.scan(step, jnp.zeros_like(bias), (drive, candidate))[1]

    h, derivative = unit_sensitivity(states, cell.bias)
    return h[-1], derivative[-1]


@eqx.filter_jit
def _coupled_derivatives(cell: SimpleGRU, inputs: Array) -> tuple[Array, Array]:
    """The same where they do: the diagonal of ∂h/∂b."""

    def last(bias):
        moved = eqx.tree_at(lambda cell: cell.bias, cell, bias)
        h = scan_cell(moved, jnp.zeros_like(bias), inputs)[0]
        return h, h

    derivatives, h = jax.jacfwd(last, has_aux=True)(cell.bias)
    return h, jnp.diagonal(derivatives)


@eqx.filter_jit
def _state_jacobians(cell: Cell, state: PyTree, inputs: PyTree, steps: Array) -> Array:
    step, start = real_map(cell, state)

    def advance(t, carry):
        x, directions = carry
        return push(step, x, directions, jax.tree.map(lambda leaf: leaf[t], inputs))

    def to(carry, span):
        first, end = span
        carry = jax.lax.fori_loop(first, end, advance, carry)
        return carry, carry[1]

    before = jnp.concatenate([jnp.zeros_like(steps[:1]), steps[:-1]])
    return jax.lax.scan(to, (start, jnp.eye(start.size, dtype=start.dtype)), (before, steps))[1]


def _keep(argument: Array, state: Array, candidate: Array) -> Array:
    """z h + (1 - z) y for z = σ(argument); 1 - σ(x) = σ(-x), without cancellation."""
    return jax.nn.sigmoid(argument) * state + jax.nn.sigmoid(-argument) * candidate


def _require_square(jacobians: Any) -> int:
    shape = jnp.shape(jacobians)
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 2:
        raise ValueError(f"jacobians must end in two axes of one length, at least 2, got shape {shape}")
    return shape[-1]


def _require(
    d_in: int, d_hidden: int, min_time: float, max_time: float, input_scale: float, state_scale: float
) -> None:
    require_integer("d_in", d_in, minimum=1)
    require_integer("d_hidden", d_hidden, minimum=1)
    require_values("min_time", min_time, "positive and finite", lambda t: (t > 0) & np.isfinite(t))
    allowed = f"finite and at least min_time = {min_time}"
    require_values("max_time", max_time, allowed, lambda t: (t >= min_time) & np.isfinite(t))
    for name, scale in {"input_scale": input_scale, "state_scale": state_scale}.items():
        require_values(name, scale, "finite and not negative", lambda s: (s >= 0) & np.isfinite(s))
