"""Run a recurrence over time.

A linear recurrence h_t = a_t h_{t-1} + b_t (elementwise in the N hidden units) and a cell
h_t = cell(x_t, h_{t-1}): one function each, both with time as the leading axis.

Written as one equation over all times, the linear recurrence is a bidiagonal system (I - A S) h = b, where S
shifts by one step. Its derivative is again a linear recurrence with the same coefficients,
dh_t = a_t dh_{t-1} + (da_t h_{t-1} + db_t), so that is how it is differentiated here: the gradient with respect
to the coefficients becomes one product outside the loop instead of an accumulation inside it, and forward mode,
reverse mode and their compositions all follow from the one rule.
"""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact, PyTree, Shaped

from ._checks import require_inexact, require_rank, time_length

_METHODS = ("auto", "sequential", "associative")


def linear_recurrence(
    coefficients: Inexact[Array, "*time hidden"],
    inputs: Inexact[Array, "time hidden"],
    initial_state: Inexact[Array, " hidden"] | None = None,
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
    coefficients, inputs = jnp.asarray(coefficients), jnp.asarray(inputs)
    require_inexact("coefficients", coefficients)
    require_inexact("inputs", inputs)
    require_rank("coefficients", coefficients, 1, 2)
    require_rank("inputs", inputs, 2)
    time_length("inputs", inputs)
    allowed = (inputs.shape[1:], inputs.shape)
    if coefficients.shape not in allowed:
        raise ValueError(
            f"coefficients must have shape {allowed[0]} or {allowed[1]} to fit inputs of shape {inputs.shape}, "
            f"got {coefficients.shape}"
        )
    if initial_state is None:
        initial_state = jnp.zeros_like(inputs[0])
    initial_state = jnp.asarray(initial_state)
    require_inexact("initial_state", initial_state)
    if initial_state.shape != inputs.shape[1:]:
        raise ValueError(
            f"initial_state must have shape {inputs.shape[1:]} to fit inputs of shape {inputs.shape}, "
            f"got {initial_state.shape}"
        )
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, _METHODS))}, got {method!r}")

    with jax.numpy_dtype_promotion("standard"):  # the one place where dtypes may mix
        dtype = jnp.result_type(coefficients, inputs, initial_state)
    if method == "auto":
        method = "sequential" if jax.default_backend() == "cpu" else "associative"
    run = _sequential if method == "sequential" else _associative
    return run(coefficients.astype(dtype), inputs.astype(dtype), initial_state.astype(dtype), reverse)


def _with_derivative(run: Callable) -> Callable:
    """Give `run(coefficients, inputs, initial_state, reverse)` the recurrence's own derivative."""
    run = jax.custom_jvp(run, nondiff_argnums=(3,))

    @run.defjvp
    def _derivative(reverse, primals, tangents):
        coefficients, inputs, initial_state = primals
        d_coefficients, d_inputs, d_initial_state = tangents
        states = run(coefficients, inputs, initial_state, reverse)
        before = [states[1:], initial_state[None]] if reverse else [initial_state[None], states[:-1]]
        forcing = jnp.broadcast_to(d_coefficients, states.shape) * jnp.concatenate(before) + d_inputs
        return states, run(coefficients, forcing, d_initial_state, reverse)

    return run


@_with_derivative
def _sequential(coefficients, inputs, initial_state, reverse):
    per_step = coefficients.ndim == 2

    def step(state, now):
        a, b = now if per_step else (coefficients, now)
        state = a * state + b
        return state, state

    return lax.scan(step, initial_state, (coefficients, inputs) if per_step else inputs, reverse=reverse)[1]


@_with_derivative
def _associative(coefficients, inputs, initial_state, reverse):
    def then(first, second):
        (a1, b1), (a2, b2) = first, second
        return a2 * a1, a2 * b1 + b2

    coefficients = jnp.broadcast_to(coefficients, inputs.shape)
    start = -1 if reverse else 0
    inputs = inputs.at[start].add(coefficients[start] * initial_state)
    return lax.associative_scan(then, (coefficients, inputs), reverse=reverse)[1]


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

    def step(state: Any, x: Any) -> tuple[Any, Any]:
        state = cell(x, state)
        return state, state

    return lax.scan(step, jax.tree.map(jnp.asarray, state), inputs)


def _abstract(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree)


def _describe(tree: PyTree) -> str:
    return eqx.tree_pformat(tree, struct_as_array=True)
