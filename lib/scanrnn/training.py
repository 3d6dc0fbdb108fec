r"""One compiled training loop: every step of gradient descent inside a single scan, with all that happened on record.

    l_k = L(p_k),   g_k = ∇L(p_k),   (u_k, s_{k+1}) = optimizer(g_k, s_k, p_k),   p_{k+1} = p_k + u_k

The optimiser's state s_k travels with the parameters p_k from step to step. `descend` keeps every p_k, for few
parameters; `train` keeps what it is told to, draws a sample at each step if the loss wants one, and shows a bar.
"""

import itertools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from tqdm import tqdm

from ._checks import is_abstract, require_finite, require_integer, require_values


class History(NamedTuple):
    """What happened at each step k = 0 ... steps - 1 of `descend`.

    - `loss`: $L(p_k)$, before the step is taken; (steps,)
    - `parameters`: the floating-point arrays $p_k$, with a leading axis of that length; `None` for all other leaves
    - `steps_taken`: how many steps were taken; fewer than `steps` if a loss or a gradient was not finite, and then
      also the number k of that step
    """

    loss: Float[Array, " steps"]
    parameters: PyTree
    steps_taken: Int[Array, ""]


class Record(NamedTuple):
    """What happened in `train`.

    - `loss`: $L(p_k)$, before step k is taken; (steps,)
    - `observed`: what `observe` returned before the steps 0, `every`, 2 `every` ..., along a leading axis; or `None`
    - `steps_taken`: as `History.steps_taken`
    - `auxiliary`: what the loss returned beside its value at each step, along a leading axis; or `None`
    """

    loss: Float[Array, " steps"]
    observed: PyTree
    steps_taken: Int[Array, ""]
    auxiliary: PyTree = None


def descend(
    loss: Callable[[Any], Float[Array, ""]],
    parameters: PyTree,
    optimizer: optax.GradientTransformation,
    steps: int,
) -> tuple[PyTree, History]:
    r"""`steps` steps of an Optax optimiser down `loss(parameters)`, the same loss at each step, every p_k kept.

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
    trained, _, record = run_training(
        "descend",
        loss,
        parameters,
        optimizer,
        steps,
        key=None,
        optimizer_state=None,
        has_aux=False,
        observe=_parameters,
        progress=False,
    )
    return trained, History(record.loss, record.observed, record.steps_taken)


def train(
    loss: Callable[..., Any],
    parameters: PyTree,
    optimizer: optax.GradientTransformation,
    steps: int,
    *,
    key: PRNGKeyArray | None = None,
    optimizer_state: PyTree | None = None,
    has_aux: bool = False,
    observe: Callable[[Any, Any, Any], PyTree] | None = None,
    every: int = 1,
    progress: bool = False,
) -> tuple[PyTree, PyTree, Record]:
    r"""`steps` steps of an Optax optimiser down `loss(parameters)`, or `loss(parameters, key)` with a fresh key a step.

    **Arguments:** `key`, for a loss that draws its own sample: step k calls it with `jax.random.fold_in(key, k)`;
    `optimizer_state`, what an earlier training returned, to go on with it; `has_aux`, if the loss returns a pair, its
    value and something to keep for the record, as in `jax.grad`;
    `observe(parameters, optimizer_state, k)`, called before step k for every `every`-th k; `progress`, to show a bar
    (of one training, not of a batch of them; see `scanrnn.sweep` for that). A schedule belongs into the optimiser.

    **Returns** the parameters and the optimiser's state after the last step, and the `Record`.

    Otherwise as `descend`: one compiled scan, batched with `jax.vmap`, and it **stops** at the first loss or gradient
    that is not finite.

    **Raises** as `descend`, and `ValueError` unless `every` divides `steps` and, with `has_aux`, the loss returns a
    pair.
    """
    options = {"optimizer_state": optimizer_state, "has_aux": has_aux, "observe": observe, "every": every}
    return run_training("train", loss, parameters, optimizer, steps, key=key, progress=progress, **options)


def run_training(
    name: str,
    loss: Callable[..., Any],
    parameters: PyTree,
    optimizer: optax.GradientTransformation,
    steps: int,
    *,
    key: PRNGKeyArray | None,
    optimizer_state: PyTree | None,
    has_aux: bool,
    observe: Callable[[Any, Any, Any], PyTree] | None = None,
    every: int = 1,
    progress: bool,
) -> tuple[PyTree, PyTree, Record]:
    """`train` under the name of the public function that calls it, which its warning gives."""
    arguments = () if key is None else (key,)
    _check(loss, parameters, optimizer, steps, *arguments, has_aux=has_aux)
    require_integer("every", every, minimum=1)
    if steps % every:
        raise ValueError(f"every must divide steps = {steps}, got {every}")
    if optimizer_state is None:
        with jax.numpy_dtype_promotion("standard"):
            optimizer_state = optimizer.init(eqx.filter(parameters, eqx.is_inexact_array))
    run = partial(_train, loss, parameters, optimizer, steps, key, observe, every, has_aux, optimizer_state)
    if not progress:
        result = run(None)
    else:
        with tqdm(total=steps, unit="step") as bar:
            number = next(_numbers)
            _bars[number] = bar
            try:
                result = jax.block_until_ready(run(jnp.asarray(number)))
                jax.effects_barrier()
            finally:
                del _bars[number]
    _warn(name, steps, result[2])
    return result


def levenberg_marquardt(
    residuals: Callable[[Any], Float[Array, " residuals"]], parameters: PyTree, steps: int, *, damping: float = 1e-3
) -> tuple[PyTree, Record]:
    r"""`steps` damped Gauss-Newton steps down $L=\tfrac12|r|^2$, for more parameters than residuals.

    $$p_{k+1}=p_k-J^\top(JJ^\top+\mu_kI)^{-1}r_k,\qquad J=\partial r/\partial p,$$

    if that lowers the loss, and then $\mu_{k+1}=\mu_k/3$; otherwise $p_{k+1}=p_k$ and $\mu_{k+1}=4\mu_k$. The first μ
    is `damping` times the largest diagonal entry of $JJ^\top$. The system to solve has the size of the residuals;
    Optimistix has the usual form, for many residuals and few parameters. Steps do not change when parameters are
    rotated; without the damping, what they do to the residuals would not change in any other coordinates either.

    **Returns** the parameters, and the `Record`, whose `observed` are the μ. Batched with `jax.vmap`. Raises
    `ValueError` and `TypeError` as `descend` does for its parameters and steps, and unless `damping` is positive.
    """
    _check(lambda _: jnp.zeros(()), parameters, optax.identity(), steps)
    require_values("damping", damping, "positive and finite", lambda x: (x > 0) & np.isfinite(x))
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(eqx.filter_eval_shape(residuals, parameters))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"residuals must return real floating-point numbers, got {dtype}")
    return _levenberg_marquardt(residuals, parameters, steps, damping)


@eqx.filter_jit
def _levenberg_marquardt(residuals: Callable, parameters: PyTree, steps: int, damping: float) -> tuple[PyTree, Record]:
    trained, rest = eqx.partition(parameters, eqx.is_inexact_array)
    start, unravel = ravel_pytree(trained)
    at = lambda p: jnp.ravel(residuals(eqx.combine(unravel(p), rest)))  # noqa: E731

    def step(carry: tuple, _: None) -> tuple[tuple, tuple]:
        p, r, mu, taken = carry
        jacobian = jax.jacrev(at)(p)
        gram = jacobian @ jacobian.T
        mu = jnp.where(taken == 0, damping * jnp.max(jnp.diag(gram)), mu)
        mu = jnp.maximum(mu, float(jnp.finfo(mu.dtype).tiny))  # 0 could not grow again
        factor = jax.scipy.linalg.cho_factor(gram + mu * jnp.eye(len(r), dtype=r.dtype))
        trial = p - jacobian.T @ jax.scipy.linalg.cho_solve(factor, r)
        r_trial = at(trial)
        loss, better = 0.5 * jnp.sum(r**2), jnp.sum(r_trial**2) < jnp.sum(r**2)  # false if not finite
        p, r = jnp.where(better, trial, p), jnp.where(better, r_trial, r)
        return (p, r, jnp.where(better, mu / 3, 4 * mu), taken + 1), (loss, mu)

    carry = start, at(start), jnp.zeros((), start.dtype), jnp.array(0)
    (end, _, _, taken), (losses, dampings) = lax.scan(step, carry, length=steps)
    return eqx.combine(unravel(end), rest), Record(losses, dampings, taken)


@eqx.filter_jit  # without it, each eager call would compile anew
def _train(
    loss: Callable,
    parameters: PyTree,
    optimizer: Any,
    steps: int,
    key: PRNGKeyArray | None,
    observe: Callable | None,
    every: int,
    has_aux: bool,
    state: PyTree,
    bar: Array | None,
) -> tuple[PyTree, PyTree, Record]:
    trained, rest = eqx.partition(parameters, eqx.is_inexact_array)

    def value(trained: PyTree, k: Array) -> tuple[Array, PyTree]:
        whole = eqx.combine(trained, rest)
        result = loss(whole) if key is None else loss(whole, jr.fold_in(key, k))
        return result if has_aux else (result, None)

    def step(carry: Any, k: Array) -> tuple[Any, Any]:
        trained, state, running, taken = carry
        (loss_now, auxiliary), gradient = jax.value_and_grad(value, has_aux=True)(trained, k)
        running &= _all_finite((loss_now, gradient))
        updates, new_state = optimizer.update(gradient, state, trained)
        new = eqx.apply_updates(trained, updates), new_state
        new = jax.tree.map(lambda new, old: jnp.where(running, jnp.asarray(new, old.dtype), old), new, (trained, state))
        return (*new, running, taken + running), (loss_now, auxiliary)

    def stretch(carry: Any, first: Array) -> tuple[Any, Any]:
        observed = None if observe is None else observe(eqx.combine(carry[0], rest), carry[1], first)
        carry, (losses, auxiliary) = lax.scan(step, carry, first + jnp.arange(every))
        if bar is not None:
            jax.debug.callback(_show, bar, first + every, losses[-1])
        return carry, (losses, auxiliary, observed)

    with jax.numpy_dtype_promotion("standard"):  # Optax mixes the dtypes of rates and parameters
        start = trained, jax.tree.map(jnp.asarray, state), jnp.array(True), jnp.array(0)
        (trained, state, _, taken), by_stretch = lax.scan(stretch, start, jnp.arange(0, steps, every))
    losses, auxiliary, observed = by_stretch
    auxiliary = jax.tree.map(lambda leaf: leaf.reshape(steps, *leaf.shape[2:]), auxiliary)
    return eqx.combine(trained, rest), state, Record(losses.ravel(), observed, taken, auxiliary)


_bars: dict[int, tqdm] = {}  # a compiled loop finds its bar by its number, so that it need not be compiled for each
_numbers = itertools.count()


def _show(number: Any, step: Any, loss: Any) -> None:
    bar = _bars.get(int(number))
    if bar is not None:
        bar.set_postfix_str(f"loss {float(loss):.3g}", refresh=False)
        bar.update(int(step) - bar.n)


def _parameters(parameters: PyTree, *_: Any) -> PyTree:
    return eqx.filter(parameters, eqx.is_inexact_array)


def _all_finite(tree: PyTree) -> Array:
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]).all()


def _check(
    loss: Callable, parameters: PyTree, optimizer: Any, steps: int, *arguments: Any, has_aux: bool = False
) -> None:
    require_integer("steps", steps, minimum=1)
    if not (callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))):
        raise TypeError(f"optimizer must have init and update, as Optax's have, got {optimizer!r}")
    trained = [leaf for leaf in jax.tree.leaves(parameters) if eqx.is_inexact_array(leaf)]
    if not trained:
        raise ValueError(f"parameters must hold a floating-point array, got {eqx.tree_pformat(parameters)}")
    for leaf in trained:
        if jnp.iscomplexobj(leaf):
            raise TypeError(f"parameters must be real (hold real and imaginary part apart), got {leaf.dtype}")
    require_finite("parameters", trained)
    with jax.numpy_dtype_promotion("standard"):
        value = eqx.filter_eval_shape(loss, parameters, *arguments)
    if has_aux:
        if not (isinstance(value, tuple) and len(value) == 2):
            raise ValueError(f"loss must return a pair, since has_aux is set, got {eqx.tree_pformat(value)}")
        value = value[0]
    shape, dtype = np.shape(value), jnp.result_type(value)
    if shape != ():
        raise ValueError(f"loss must return a scalar, got shape {shape}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"loss must return a real floating-point number, got {dtype}")


def _warn(name: str, steps: int, record: Record) -> None:
    if not is_abstract(record.steps_taken) and record.steps_taken < steps:
        k = int(record.steps_taken)
        kind = "gradient" if np.isfinite(record.loss[k]) else "loss"
        warnings.warn(
            f"{name} stopped at step {k} of {steps}, where the {kind} was not finite (loss {record.loss[k]})",
            RuntimeWarning,
            stacklevel=4,
        )
