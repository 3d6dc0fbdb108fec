r"""Hessians of small networks, how concentrated their eigenvectors are, and what an adaptive optimiser makes of them.

H = ∂²L/∂p²,      at a minimum without residual  H = Σ_k w_k J_k J_kᵀ  with  J = ∂κ/∂p  (Gauss-Newton)
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

# Learning rates of adaptive optimisers -------------------------------------------------------------------------------


def effective_learning_rate(
    state: PyTree, learning_rate: Float[Array, ""] | float, *, b2: float = 0.999, eps: float = 1e-8
) -> PyTree:
    r"""Adam's step per unit of averaged gradient, $\eta/(\sqrt{\hat v}+\epsilon)$; a pytree like the parameters.

    `state` is that of an Optax chain with `scale_by_adam` in it, after at least one step; $\hat v=v/(1-\beta_2^n)$.
    Always positive, and without bound where gradients vanish. Raises `ValueError` where no such state is found.
    """
    adam = _adam_state(state)
    correction = 1 - b2 ** adam.count.astype(jnp.result_type(float))
    return jax.tree.map(lambda v: learning_rate / (jnp.sqrt(v / correction) + eps), adam.nu)


def released_effective_learning_rate(optimizer: optax.GradientTransformation, state: PyTree) -> PyTree:
    r"""The "effective learning rate" of the released code: minus the update if the next gradient were 1 everywhere.

    For Adam it is $\eta\,\hat m'/(\sqrt{\hat v'}+\epsilon)$ with $m'=\beta_1m+(1-\beta_1)$, $v'=\beta_2v+(1-\beta_2)$.
    The momentum m of past gradients adds to it or takes from it, so it may be negative. Where gradients are much
    smaller than 0.03 it is $0.1\,\eta/\sqrt{0.001}=3.16\,\eta$, however small they are. Errors: as
    `effective_learning_rate`.
    """
    ones = jax.tree.map(jnp.ones_like, _adam_state(state).nu)
    return jax.tree.map(jnp.negative, optimizer.update(ones, state)[0])


def _adam_state(state: PyTree) -> Any:
    is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)  # noqa: E731
    found = [node for node in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(node)]
    if len(found) != 1:
        raise ValueError(f"state must hold the state of one scale_by_adam, got {len(found)} of them")
    return found[0]
