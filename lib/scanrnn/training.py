r"""One compiled training loop: every step of gradient descent inside a single scan, with all that happened on record.

    l_k = L(p_k),   g_k = ∇L(p_k),   (u_k, s_{k+1}) = optimizer(g_k, s_k, p_k),   p_{k+1} = p_k + u_k

The optimiser's state s_k travels with the parameters p_k from step to step.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from ._checks import is_abstract, require_finite, require_integer


class History(NamedTuple):
    """What happened at each step k = 0 ... steps - 1.

    - `loss`: $L(p_k)$, before the step is taken; (steps,)
    - `parameters`: the floating-point arrays $p_k$, with a leading axis of that length; `None` for all other leaves
    - `steps_taken`: how many steps were taken; fewer than `steps` if a loss or a gradient was not finite, and then
      also the number k of that step
    """

    loss: Float[Array, " steps"]
    parameters: PyTree
    steps_taken: Int[Array, ""]


def descend(
    loss: Callable[[Any], Float[Array, ""]],
    parameters: PyTree,
    optimizer: optax.GradientTransformation,
    steps: int,
) -> tuple[PyTree, History]:
    r"""`steps` steps of an Optax optimiser down `loss(parameters)`, the same loss at each step.

    **Returns** the parameters after the last step, and the `History`. Everything runs in one compiled scan; it can be
    batched over `parameters` with `jax.vmap`. The floating-point arrays of the pytree `parameters` are trained, all
    other leaves stay. They keep their dtype, whatever the optimiser's arithmetic promotes to.

    At the first loss or gradient that is not finite the descent **stops**: the parameters stay at $p_k$, where it
    happened, `history.steps_taken` is k, and a `RuntimeWarning` says so. Where the values are traced (under `vmap` or
    `jit`) nobody can be warned: look at `steps_taken`.

    **Raises** `TypeError` for `steps` that is not an integer, an optimiser without `init` and `update`, complex
    parameters (hold them as real and imaginary part: JAX's gradient is the conjugate, and Adam would share one
    second moment for both) or a loss that is not real; `ValueError` for `steps` below 1, parameters without a
    floating-point array, parameters that are not finite, or a loss that is not a scalar.
    """
    require_integer("steps", steps, minimum=1)
    if not (callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))):
        raise TypeError(f"optimizer must have init and update, as Optax's have, got {optimizer!r}")
    _check_parameters(parameters)
    _check_loss(loss, parameters)
    trained, history = _descend(loss, parameters, optimizer, steps)
    if not is_abstract(history.steps_taken) and history.steps_taken < steps:
        k = int(history.steps_taken)
        kind = "gradient" if np.isfinite(history.loss[k]) else "loss"
        warnings.warn(
            f"descend stopped at step {k} of {steps}, where the {kind} was not finite (loss {history.loss[k]})",
            RuntimeWarning,
            stacklevel=2,
        )
    return trained, history


@eqx.filter_jit  # without it, each eager call would compile anew
def _descend(loss: Callable, parameters: PyTree, optimizer: Any, steps: int) -> tuple[PyTree, History]:
    trained, rest = eqx.partition(parameters, eqx.is_inexact_array)

    def value(trained: PyTree) -> Array:
        return loss(eqx.combine(trained, rest))

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        trained, state, running, taken = carry
        loss_now, gradient = jax.value_and_grad(value)(trained)
        running &= _all_finite((loss_now, gradient))
        updates, new_state = optimizer.update(gradient, state, trained)
        new = eqx.apply_updates(trained, updates), new_state
        new = jax.tree.map(lambda new, old: jnp.where(running, jnp.asarray(new, old.dtype), old), new, (trained, state))
        return (*new, running, taken + running), (loss_now, trained)

    with jax.numpy_dtype_promotion("standard"):  # Optax mixes the dtypes of rates and parameters
        state = jax.tree.map(jnp.asarray, optimizer.init(trained))
        start = trained, state, jnp.array(True), jnp.array(0)
        (trained, _, _, taken), (losses, visited) = lax.scan(step, start, length=steps)
    return eqx.combine(trained, rest), History(losses, visited, taken)


def _all_finite(tree: PyTree) -> Array:
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]).all()


def _check_parameters(parameters: PyTree) -> None:
    trained = [leaf for leaf in jax.tree.leaves(parameters) if eqx.is_inexact_array(leaf)]
    if not trained:
        raise ValueError(f"parameters must hold a floating-point array, got {eqx.tree_pformat(parameters)}")
    for leaf in trained:
        if jnp.iscomplexobj(leaf):
            raise TypeError(f"parameters must be real (hold real and imaginary part apart), got {leaf.dtype}")
    require_finite("parameters", trained)


def _check_loss(loss: Callable, parameters: PyTree) -> None:
    with jax.numpy_dtype_promotion("standard"):
        value = eqx.filter_eval_shape(loss, parameters)
    shape, dtype = np.shape(value), jnp.result_type(value)
    if shape != ():
        raise ValueError(f"loss must return a scalar, got shape {shape}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"loss must return a real floating-point number, got {dtype}")
