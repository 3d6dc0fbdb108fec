"""Run a recurrence over time.

A linear recurrence h_t = a_t h_{t-1} + b_t (elementwise in the N hidden units) and a cell
h_t = cell(x_t, h_{t-1}): one function each, both with time as the leading axis.

Written for all times at once, the linear recurrence is a bidiagonal linear system, (I - A S) h = b, where S moves a
sequence one step later. So it is given to JAX as a linear solve: the tangents of its solution solve the same
system, the cotangents solve the transposed one, which is the recurrence run the other way, and the gradient with
respect to the coefficients is one product outside the loop. No loop is ever differentiated.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Inexact, PyTree, Shaped

from ._checks import require_finite, require_inexact, require_rank, time_length

_METHODS = ("auto", "sequential", "associative")


def linear_recurrence(
    coefficients: Inexact[ArrayLike, "*time hidden"],
    inputs: Inexact[ArrayLike, "time hidden"],
    initial_state: Inexact[ArrayLike, " hidden"] | None = None,
    *,
    reverse: bool = False,
    method: Literal["auto", "sequential", "associative"] = "auto",
) -> Inexact[Array, "time hidden"]:
    r"""All states of the linear recurrence $h_t = a_t h_{t-1} + b_t$, $t = 0, \dots, T - 1$.

    **Arguments:**

    - `coefficients`: $a$, of shape `(N,)` (the same at all times) or `(T, N)`; real or complex.
    - `inputs`: $b$, of shape `(T, N)`; real or complex.
    - `initial_state`: $h_{-1}$, of shape `(N,)`; zero by default. With `reverse` it is $h_T$.
    - `reverse`: run from the last time to the first, $h_t = a_t h_{t+1} + b_t$.
    - `method`: `"sequential"` is a loop of T steps; `"associative"` is a parallel prefix scan of depth log T, with
        more work and memory (Blelloch, 1990). `"auto"` is sequential if JAX's default backend is the CPU and
        associative otherwise. The values and derivatives of all agree up to rounding.

    **Returns:**

    The states $h$, of shape `(T, N)`; entry $t$ is $h_t$ in both directions. Their dtype is the one to which the
    arguments' dtypes promote: real coefficients with complex inputs give complex states and real gradients.

    **Raises:** `TypeError` if an array is not floating point; `ValueError` if a shape does not fit, T is 0 or the
    method is unknown. Values are not looked at: NaN or infinity in gives NaN or infinity out.
    """
    arrays = {"coefficients": jnp.asarray(coefficients), "inputs": jnp.asarray(inputs)}
    if initial_state is not None:
        arrays["initial_state"] = jnp.asarray(initial_state)
    _check_arrays(arrays)
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, _METHODS))}, got {method!r}")
    if method == "auto":
        method = "sequential" if jax.default_backend() == "cpu" else "associative"
    run = _sequential if method == "sequential" else _associative

    with jax.numpy_dtype_promotion("standard"):  # here, and only here, dtypes may mix
        dtype = jnp.result_type(*arrays.values())
    return _solve(**{name: array.astype(dtype) for name, array in arrays.items()}, reverse=reverse, run=run)


def _check_arrays(arrays: dict[str, Array]) -> None:
    for name, array in arrays.items():
        require_inexact(name, array)
    shape = arrays["inputs"].shape
    require_rank("inputs", arrays["inputs"], 2)
    time_length("inputs", arrays["inputs"])
    fitting = {"inputs": (shape,), "coefficients": (shape[1:], shape), "initial_state": (shape[1:],)}
    for name, array in arrays.items():
        if array.shape not in fitting[name]:
            allowed = " or ".join(map(str, fitting[name]))
            raise ValueError(f"{name} must have shape {allowed} to fit inputs of shape {shape}, got {array.shape}")


@partial(jax.jit, static_argnames=("reverse", "run"))  # without jit, each eager call would compile anew
def _solve(
    coefficients: Array, inputs: Array, initial_state: Array | None = None, *, reverse: bool, run: Callable
) -> Array:
    """Solve (I - A S) h = b by `run(coefficients, inputs, reverse)`."""
    if initial_state is not None:  # it acts as one more input at the first step
        start = -1 if reverse else 0
        first = coefficients if coefficients.ndim == 1 else coefficients[start]
        inputs = inputs.at[start].add(first * initial_state)

    later, earlier = slice(1, None), slice(None, -1)
    if reverse:
        later, earlier = earlier, later

    def residual(states):
        # slices, not a shifted copy: from them JAX derives the coefficients' gradient as one fused sum
        a = coefficients if coefficients.ndim == 1 else coefficients[later]
        return states.at[later].add(-jnp.broadcast_to(a, states[later].shape) * states[earlier])

    def solve(_, inputs):
        return run(coefficients, inputs, reverse)

    def solve_transposed(_, cotangents):
        after = coefficients if coefficients.ndim == 1 else _before(coefficients, not reverse)
        return run(after, cotangents, not reverse)

    return lax.custom_linear_solve(residual, inputs, solve, solve_transposed)


def _before(sequence: Array, reverse: bool) -> Array:
    """S: what came one step before, in the direction of the recurrence; zero at its start."""
    zero = jnp.zeros_like(sequence[:1])
    return jnp.concatenate([sequence[1:], zero] if reverse else [zero, sequence[:-1]])


def _sequential(coefficients: Array, inputs: Array, reverse: bool) -> Array:
    length = len(inputs)

    def step(i, carry):
        state, states = carry
        t = length - 1 - i if reverse else i
        a = coefficients if coefficients.ndim == 1 else lax.dynamic_index_in_dim(coefficients, t, keepdims=False)
        state = a * state + lax.dynamic_index_in_dim(states, t, keepdims=False)
        return state, lax.dynamic_update_index_in_dim(states, state, t, 0)

    # Each input is overwritten by its state where it lies. Stacking the states with `lax.scan` would, under vmap,
    # move time to the front and back again: on a CPU that takes as long as the recurrence.
    return lax.fori_loop(0, length, step, (jnp.zeros_like(inputs[0]), inputs))[1]


def _associative(coefficients: Array, inputs: Array, reverse: bool) -> Array:
    def then(first, second):
        (a1, b1), (a2, b2) = first, second
        return a2 * a1, a2 * b1 + b2

    steps = (jnp.broadcast_to(coefficients, inputs.shape), inputs)
    return lax.associative_scan(then, steps, reverse=reverse)[1]


def check_cell(cell: Callable, state: PyTree, inputs: PyTree[Shaped[Array, "time ..."]]) -> None:
    """Refuse what cannot be run over time; looks at shapes and dtypes only, so it costs nothing at run time.

    **Arguments:** as in `scan_cell`.

    **Raises:** `ValueError` if the inputs have no time step, or if `cell(inputs[0], state)` does not have the
    structure, shapes and dtypes of `state`.
    """
    time_length("inputs", inputs)
    state = _abstract(state)
    first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), _abstract(inputs))
    returned = _abstract(eqx.filter_eval_shape(cell, first, state))
    if not eqx.tree_equal(returned, state):
        raise ValueError(
            f"cell must return a state like the one it received, {_describe(state)}, got {_describe(returned)}"
        )


def check_differentiable(cell: Callable, state: PyTree, inputs: PyTree[Shaped[Array, "time ..."]]) -> None:
    """Refuse, beside what `check_cell` refuses, what has no meaningful derivative.

    **Raises:** `TypeError` for a state that is not floating point; `ValueError` where the state or the inputs are not
    finite (a traced array has no values yet, and is not looked at), and as `check_cell`.
    """
    time_length("inputs", inputs)
    require_inexact("state", state)
    require_finite("state", state)
    require_finite("inputs", inputs)
    check_cell(cell, state, inputs)


def scan_cell(cell: Callable, state: PyTree, inputs: PyTree[Shaped[Array, "time ..."]]) -> tuple[PyTree, PyTree]:
    r"""Run a cell over time: $h_t = \mathrm{cell}(x_t, h_{t-1})$.

    **Arguments:**

    - `cell`: `cell(input, state) -> state`, Equinox's own convention (`eqx.nn.GRUCell`, `eqx.nn.LSTMCell`, …).
    - `state`: $h_{-1}$, any pytree of arrays (an LSTM's is a tuple).
    - `inputs`: $x$, an array or pytree of arrays with time as leading axis.

    **Returns:** the final state, and the pytree of the states after each step, with time as leading axis.

    **Raises:** `ValueError` as `check_cell`.
    """
    check_cell(cell, state, inputs)
    return _scan_cell(cell, jax.tree.map(jnp.asarray, state), inputs)


@eqx.filter_jit  # as above: one compilation for each kind of cell and shape
def _scan_cell(cell: Callable, state: PyTree, inputs: PyTree) -> tuple[PyTree, PyTree]:
    def step(state: Any, x: Any) -> tuple[Any, Any]:
        state = cell(x, state)
        return state, state

    return lax.scan(step, state, inputs)


def _abstract(tree: PyTree) -> PyTree:
    # np.shape, since jnp.shape of older JAX refuses what is abstract already
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf)), tree)


def _describe(tree: PyTree) -> str:
    return eqx.tree_pformat(tree, struct_as_array=True)
