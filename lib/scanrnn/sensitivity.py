r"""Measured, on any cell: how errors travel back through time, and how the state answers to the parameters.

For a loss that reads the last state with error vector δ_T = ∂L/∂h_T,

    δ_{t-1} = D_tᵀ δ_t,        dL/dθ = Σ_t  (∂h_t/∂θ)ᵀ δ_t     (∂ at fixed h_{t-1}),

`backpropagated_errors` returns the δ_t and `gradient_terms` the terms of the sum. Every function measures one sequence;
`estimate` turns a sample of such measurements into a mean with its standard error.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Inexact, PyTree

from ._checks import require_finite, require_inexact, require_integer, require_rank
from ._real import flatten, unflatten
from .recurrence import check_differentiable, scan_cell

Cell = Callable[[Any, Any], Any]


class Estimate(NamedTuple):
    """A sample mean and its standard error, the sample's standard deviation over √n."""

    mean: Array
    standard_error: Array


def estimate(samples: Float[Array, "samples ..."]) -> Estimate:
    """The mean over the leading axis and its standard error; `ValueError` for fewer than two samples.

    A sample that is not finite makes both results not finite: divergences are never dropped.
    """
    samples = jnp.asarray(samples)
    if samples.ndim == 0 or samples.shape[0] < 2:
        raise ValueError(f"samples must have a leading axis of at least 2, got shape {samples.shape}")
    return Estimate(jnp.mean(samples, axis=0), jnp.std(samples, axis=0, ddof=1) / math.sqrt(samples.shape[0]))


def squared_norm(tree: PyTree, *, keep_axes: int = 0) -> Float[Array, "..."]:
    """Σ|·|² over all the arrays of a pytree, except over their first `keep_axes` axes (time, samples).

    Leaves that are not floating-point arrays are passed over. `ValueError` where none is left or one has too few axes.
    """
    require_integer("keep_axes", keep_axes, minimum=0)
    leaves = [leaf for leaf in jax.tree.leaves(tree) if eqx.is_inexact_array(leaf)]
    if not leaves or any(leaf.ndim < keep_axes for leaf in leaves):
        raise ValueError(
            f"tree must hold floating-point arrays of at least keep_axes = {keep_axes} axes, "
            f"got shapes {[leaf.shape for leaf in leaves]}"
        )
    squares = [jnp.sum(jnp.abs(leaf) ** 2, axis=tuple(range(keep_axes, leaf.ndim))) for leaf in leaves]
    return jnp.sum(jnp.stack(squares), axis=0)


class GroupMean(NamedTuple):
    """A group of arrays: the mean square of their entries, and how many entries they have."""

    mean_square: Array
    size: int


def mean_squares(tree: PyTree, group: Callable[[str], str]) -> dict[str, GroupMean]:
    r"""$\frac1n\sum_i|g_i|^2$ over the n entries of each group of arrays of a pytree, of a gradient say.

    `group` maps the name of an array, its path ("blocks[0].layer.input_real"), to the name of its group. Arrays that
    are not floating point are passed over. Entries that are not finite make their group not finite, where they are
    traced; otherwise **raises** `ValueError` naming the first array that holds one, and where no array is left.
    """
    sums: dict[str, list[Array]] = {}
    sizes: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(eqx.filter(tree, eqx.is_inexact_array)):
        array = jax.tree_util.keystr(path).lstrip(".")
        require_finite(f"the array {array}", leaf)
        name = group(array)
        sums.setdefault(name, []).append(jnp.sum(jnp.abs(leaf) ** 2))
        sizes[name] = sizes.get(name, 0) + leaf.size
    if not sums:
        raise ValueError(f"tree must hold a floating-point array, got {eqx.tree_pformat(tree)}")
    return {name: GroupMean(jnp.sum(jnp.stack(sums[name])) / sizes[name], sizes[name]) for name in sums}


def backpropagated_errors(cell: Cell, state: PyTree, inputs: PyTree, error: PyTree) -> PyTree:
    r"""$\delta_t = M_{T,t}^\top\,\delta_T = \partial L/\partial h_t$ for t = 0 ... T; a state with leading axis T + 1.

    `error` is δ_T, shaped as the state. Row t belongs to h_t, so row T is `error` and row 0 the gradient with respect
    to the initial state. Errors raised: as `gradient_terms`.
    """
    _check_error(cell, state, inputs, error)
    return _backpropagate(cell, state, inputs, error)[1]


def gradient_terms(cell: Cell, state: PyTree, inputs: PyTree, error: PyTree) -> PyTree:
    r"""The T terms of the gradient, $(\partial h_t/\partial\theta)^\top\delta_t$ at fixed $h_{t-1}$.

    Term t is what the use of the parameters at step t contributes; their sum over t is dL/dθ. The result is the cell
    with a leading axis T on each floating-point array, and `None` for all else.

    Raises `ValueError` where T = 0, the inputs, state or error are not finite, `error` differs in structure, shape or
    dtype from the state, or the cell's new state does; `TypeError` for an integer state. NaN in traced arguments gives
    NaN.
    """
    _check_error(cell, state, inputs, error)
    return _gradient_terms(cell, state, inputs, error)


def parameter_sensitivity(cell: Cell, state: PyTree, inputs: PyTree) -> Float[Array, " time"]:
    r"""$\|\mathrm dh_t/\mathrm d\theta\|_F^2$ after each step, over all parameters and state coordinates; (T,).

    Total derivatives, through the whole past, by forward accumulation in real coordinates:
    $\mathrm d_\theta h_t = D_t\,\mathrm d_\theta h_{t-1} + \partial_\theta h_t$. With N coordinates and P parameters it
    holds an (N, P) matrix and does N²P multiplications a step.
    Errors raised: as `gradient_terms`; also `TypeError` for complex parameters.
    """
    return coherence(cell, state, inputs).total


class Coherence(NamedTuple):
    """Two sums over the past, after each step; (T,) each. `total / incoherent` is 1 where the terms are orthogonal."""

    total: Float[Array, " time"]
    incoherent: Float[Array, " time"]


def coherence(cell: Cell, state: PyTree, inputs: PyTree, *, trainable: Any = eqx.is_inexact_array) -> Coherence:
    r"""`parameter_sensitivity`, and what it would be if the uses of the parameters at different times did not add up.

    With the long-term Jacobians $M_{t,\tau}=\partial h_t/\partial h_\tau$ and the direct derivatives
    $G_\tau=\partial_\theta h_\tau$,

    $$\mathrm{total}_t=\Big\|\sum_{\tau\le t}M_{t,\tau}G_\tau\Big\|_F^2,\qquad
    \mathrm{incoherent}_t=\sum_{\tau\le t}\|M_{t,\tau}G_\tau\|_F^2 .$$

    The second is what the Jacobian products alone imply. It is the trace of $S_t=D_tS_{t-1}D_t^\top+G_tG_t^\top$, so
    it costs N³ a step. Where products of Jacobians grow in the mean square, both sums overflow, the second first, in
    single precision after some hundred steps. `trainable`, as in `equinox.filter`, says which leaves of the cell are θ.
    Errors raised: as `parameter_sensitivity`, and `ValueError` if there are none.
    """
    check_differentiable(cell, state, inputs)
    chosen = jax.tree.map(eqx.is_inexact_array, eqx.filter(cell, trainable, replace=0))
    parameters, rest = eqx.partition(cell, chosen)
    leaves = jax.tree.leaves(parameters)
    if not leaves:
        raise ValueError("cell must have a floating-point array among its trainable leaves, got none")
    if any(jnp.iscomplexobj(leaf) for leaf in leaves):
        raise TypeError("cell must have real parameters (complex ones as real and imaginary parts), got complex arrays")
    return Coherence(*_coherence(parameters, rest, state, inputs))


def unit_sensitivity(
    states: Callable[[Array], Array], parameter: Float[Array, " hidden"]
) -> tuple[Inexact[Array, "time hidden"], Inexact[Array, "time hidden"]]:
    r"""All states and the derivative of each unit's state with respect to its own parameter, both (T, N).

    `states` maps one real number for each unit, $\omega$ of shape (N,), to the states $h$ of shape (T, N), real or
    complex. The second result is $\sum_j\partial h_{t,i}/\partial\omega_j$, through the whole past, by one forward pass
    whatever N is. That is $\mathrm dh_{t,i}/\mathrm d\omega_i$ where a unit depends on its own parameter only, as in a
    diagonal recurrence; where units read each other's states the other terms join.

    Raises `ValueError` unless `parameter` has one axis and `states` returns two, of which the last is as long;
    `TypeError` for a `parameter` or states that are not floating point, or a complex `parameter`.
    """
    require_inexact("parameter", parameter)
    parameter = jnp.asarray(parameter)
    if jnp.iscomplexobj(parameter):
        raise TypeError(f"parameter must be real, got {parameter.dtype}")
    require_rank("parameter", parameter, 1)
    h, derivative = jax.jvp(states, (parameter,), (jnp.ones_like(parameter),))
    if not eqx.is_array(h):
        raise TypeError(f"states must return one array, got {type(h).__name__}")
    require_inexact("what states returns", h)
    if h.ndim != 2 or h.shape[1:] != parameter.shape:
        raise ValueError(f"states must return the shape (T, N) with N = {parameter.size}, got {h.shape}")
    return h, derivative


def state_derivative(cell: Cell, direction: PyTree, state: PyTree, inputs: PyTree) -> tuple[PyTree, PyTree]:
    r"""All states $h_t(\theta)$ and their derivatives along v, $\partial_\epsilon h_t(\theta+\epsilon v)$ at ε = 0.

    `direction` is v, a pytree like the cell with an array of the same shape for each of its floating-point arrays,
    zero where nothing moves. Total derivatives, through the whole past, by forward-mode differentiation: as cheap as
    running the cell twice. The initial state stays as it is. Both results have time as leading axis.
    Errors raised: as `gradient_terms`; also `ValueError` for a direction that does not fit.
    """
    check_differentiable(cell, state, inputs)
    parameters, rest = eqx.partition(cell, eqx.is_inexact_array)
    tangent = eqx.filter(direction, eqx.is_inexact_array)
    allowed, got = (jax.tree.map(jnp.shape, tree) for tree in (parameters, tangent))
    if allowed != got:
        raise ValueError(f"direction must be like the cell, with arrays of shapes {allowed}, got {got}")
    return _state_derivative(parameters, rest, tangent, state, inputs)


def loss_along_gradient(
    loss: Callable[[Any], Float[Array, ""]], cell: PyTree, lengths: Float[Array, " lengths"]
) -> tuple[Float[Array, ""], Float[Array, " lengths"], Float[Array, ""]]:
    r"""The loss before and after steps of given lengths against its gradient, and the gradient's norm.

    After a step of length $x$ the parameters are $\theta - x\,\nabla L/\|\nabla L\|$, the norm taken over all of them.
    How far the loss keeps falling is how far the gradient can be trusted. NaN where the gradient is zero.

    Raises `ValueError` unless `lengths` has one axis and finite entries.
    """
    require_rank("lengths", lengths, 1)
    require_finite("lengths", lengths)
    before, gradient = eqx.filter_value_and_grad(loss)(cell)
    norm = jnp.sqrt(squared_norm(gradient))

    def after(length):
        return loss(eqx.apply_updates(cell, jax.tree.map(lambda g: -length * g / norm, gradient)))

    return before, jax.vmap(after)(lengths), norm


# What follows is compiled once for each kind of cell and shape, also where the caller does not compile.


@eqx.filter_jit
def _gradient_terms(cell: Cell, state: PyTree, inputs: PyTree, error: PyTree) -> PyTree:
    states, errors = _backpropagate(cell, state, inputs, error)
    previous = jax.tree.map(lambda leaf: leaf[:-1], states)
    received = jax.tree.map(lambda leaf: leaf[1:], errors)
    parameters, rest = eqx.partition(cell, eqx.is_inexact_array)

    def term(input, h, delta):
        _, pullback = jax.vjp(lambda theta: eqx.combine(theta, rest)(input, h), parameters)
        return pullback(delta)[0]

    return jax.vmap(term)(inputs, previous, received)


@eqx.filter_jit
def _coherence(parameters: PyTree, rest: PyTree, state: PyTree, inputs: PyTree) -> tuple[Array, Array]:
    theta, unravel = ravel_pytree(parameters)
    start, restore = flatten(state), unflatten(state)

    def step(theta, x, input):
        return flatten(eqx.combine(unravel(theta), rest)(input, restore(x)))

    def advance(carry, input):
        x, total, incoherent = carry
        direct, jacobian = jax.jacrev(step, argnums=(0, 1))(theta, x, input)
        total = jacobian @ total + direct
        incoherent = jacobian @ incoherent @ jacobian.T + direct @ direct.T
        return (step(theta, x, input), total, incoherent), (jnp.sum(total**2), jnp.trace(incoherent))

    shapes = (start.size, theta.size), (start.size, start.size)
    initial = start, *(jnp.zeros(shape, start.dtype) for shape in shapes)
    return jax.lax.scan(advance, initial, inputs)[1]


@eqx.filter_jit
def _state_derivative(parameters: PyTree, rest: PyTree, tangent: PyTree, state: PyTree, inputs: PyTree):
    def states(theta):
        return scan_cell(eqx.combine(theta, rest), state, inputs)[1]

    return jax.jvp(states, (parameters,), (tangent,))


@eqx.filter_jit
def _backpropagate(cell: Cell, state: PyTree, inputs: PyTree, error: PyTree) -> tuple[PyTree, PyTree]:
    """All states h_0 ... h_T and all errors δ_0 ... δ_T."""
    _, later = scan_cell(cell, state, inputs)
    states = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), state, later)

    def back(delta, step):
        input, h = step
        _, pullback = jax.vjp(lambda h: cell(input, h), h)
        return pullback(delta)[0], delta

    previous = jax.tree.map(lambda leaf: leaf[:-1], states)
    first, received = jax.lax.scan(back, error, (inputs, previous), reverse=True)
    return states, jax.tree.map(lambda head, rest: jnp.concatenate([head[None], rest]), first, received)


def _check_error(cell: Cell, state: PyTree, inputs: PyTree, error: PyTree) -> None:
    check_differentiable(cell, state, inputs)
    require_finite("error", error)
    allowed, got = (jax.tree.map(lambda x: (jnp.result_type(x).name, jnp.shape(x)), t) for t in (state, error))
    if allowed != got:
        raise ValueError(f"error must be like the state, {allowed}, got {got}")
