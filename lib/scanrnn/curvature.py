r"""Hessians of small networks, how concentrated their eigenvectors are, and what an adaptive optimiser makes of them.

    H = ∂²L/∂p²,      with L = ½|r|²:   H = JᵀJ + Σ_k r_k ∂²r_k/∂p²,    J = ∂r/∂p   (JᵀJ: Gauss-Newton)

At a minimum without residual both are the same. Parameters are counted one after the other, as `jax.flatten_util`
ravels the floating-point arrays of a pytree; `groups` says which are whose.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ._checks import require_finite, require_inexact, require_integer, require_rank, require_values

# Hessians ------------------------------------------------------------------------------------------------------------


def hessian(
    loss: Callable[[Any], Float[Array, ""]], parameters: PyTree, *, batch: int = 32
) -> Float[Array, "parameters parameters"]:
    r"""$\partial^2L/\partial p\,\partial p'$ of `loss(parameters)`, over all floating-point arrays; (P, P).

    `batch` rows at a time, each the derivative of the gradient along one coordinate, so that the memory needed is that
    of `batch` gradients and of the result. Raises `ValueError` for parameters without such an array or `batch` below 1.
    """
    require_integer("batch", batch, minimum=1)
    flat, rebuild = _ravel(parameters)
    return _hessian(loss, flat, rebuild, batch)


def gauss_newton(
    residuals: Callable[[Any], Float[Array, "..."]], parameters: PyTree
) -> Float[Array, "parameters parameters"]:
    r"""$J^\top J$ with $J=\partial r/\partial p$ of `residuals(parameters)`; (P, P).

    It is the Hessian of $\tfrac12|r|^2$ where r = 0. Errors: as `hessian`.
    """
    jacobian = residual_jacobian(residuals, parameters)
    return jacobian.T @ jacobian


def residual_jacobian(
    residuals: Callable[[Any], Float[Array, "..."]], parameters: PyTree
) -> Float[Array, "residuals parameters"]:
    r"""$J=\partial r/\partial p$ of `residuals(parameters)`, all its entries in a row; (R, P). Errors: as `hessian`."""
    flat, rebuild = _ravel(parameters)
    return _jacobian(residuals, flat, rebuild)


def groups(parameters: PyTree) -> dict[str, slice]:
    """Which coordinates belong to which array: its name ("recurrent", "parametrization.real") and their slice."""
    trained = eqx.filter(parameters, eqx.is_inexact_array)
    named, start = {}, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
        name = jax.tree_util.keystr(path).lstrip(".")
        named[name] = slice(start, start + leaf.size)
        start += leaf.size
    return named


def coordinates_for(vectors: Float[Array, "... coordinates"], mass: float = 0.9) -> Int[Array, "..."]:
    r"""How concentrated a vector is: the least number of coordinates with at least `mass` of $\sum_iv_i^2$; (...).

    1 for a vector along an axis; for a Gaussian vector of P coordinates about 0.44 P at a mass of 0.9; 0 for a vector
    of zeros. A sum that falls short by rounding alone counts as reached, so with a mass of 1 coordinates below some
    1e-7 of the largest (in float64) do not count.

    Raises `ValueError` unless 0 < mass <= 1 and all entries are finite (where they are traced: -1 for a vector that is
    not), `TypeError` for what is not floating point.
    """
    require_inexact("vectors", vectors)
    require_values("mass", mass, "above 0 and at most 1", lambda m: (m > 0) & (m <= 1))
    if jnp.ndim(vectors) == 0 or jnp.shape(vectors)[-1] == 0:
        raise ValueError(f"vectors must have at least one axis and one coordinate, got shape {jnp.shape(vectors)}")
    require_finite("vectors", vectors)
    sizes = jnp.sort(jnp.abs(vectors), axis=-1)[..., ::-1]
    largest = sizes[..., :1]
    held = jnp.cumsum((sizes / jnp.where(largest > 0, largest, 1)) ** 2, axis=-1)
    rounding = (8 + 2 * math.log2(held.shape[-1])) * float(jnp.finfo(held.dtype).eps)  # sums are taken in a tree
    count = 1 + jnp.sum(held < float(mass) * (1 - rounding) * held[..., -1:], axis=-1)
    return jnp.where(jnp.isfinite(held[..., -1]), jnp.where(largest[..., 0] > 0, count, 0), -1)


def concentration(
    matrix: Float[Array, "parameters parameters"], *, top: int = 6, mass: float = 0.9
) -> Float[Array, ""]:
    """Mean of `coordinates_for` over the eigenvectors of the `top` largest eigenvalues of a symmetric matrix.

    Raises `ValueError` unless the matrix is square and finite (where it is traced: NaN) and 1 <= top <= its size, and
    as `coordinates_for`.
    """
    require_rank("matrix", matrix, 2)
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix must be square, got shape {matrix.shape}")
    require_integer("top", top, minimum=1, maximum=len(matrix))
    require_inexact("matrix", matrix)
    require_finite("matrix", matrix)
    vectors = jnp.linalg.eigh(matrix)[1].T[-top:]
    mean = jnp.mean(coordinates_for(vectors, mass), dtype=matrix.dtype)
    return jnp.where(jnp.isfinite(matrix).all(), mean, jnp.nan)


def top_eigenvalue(
    loss: Callable[[Any], Float[Array, ""]], parameters: PyTree, *, steps: int = 50, key: PRNGKeyArray
) -> Float[Array, ""]:
    r"""The eigenvalue of the Hessian of `loss(parameters)` that is largest in modulus, without the Hessian.

    By `steps` steps of the Lanczos iteration from a random direction, every new direction made orthogonal to all
    earlier ones; a step costs one derivative of the gradient. The result never exceeds the true one in modulus, and is
    exact (but for rounding) once there are as many steps as parameters; more are not taken.

    Raises `ValueError` for parameters without a floating-point array or `steps` below 1.
    """
    require_integer("steps", steps, minimum=1)
    flat, rebuild = _ravel(parameters)
    return _top_eigenvalue(loss, flat, rebuild, min(int(steps), flat.size), key)


@eqx.filter_jit  # one compilation for each kind of loss and shape
def _top_eigenvalue(loss: Callable, flat: Array, rebuild: Callable, steps: int, key: PRNGKeyArray) -> Array:
    gradient = jax.grad(lambda p: loss(rebuild(p)))

    def orthogonal(vector: Array, basis: Array) -> Array:
        return vector - basis.T @ (basis @ vector)

    def step(carry: tuple[Array, Array], k: Array) -> tuple[tuple[Array, Array], Array]:
        basis, direction = carry
        basis = basis.at[k].set(direction)
        image = jax.jvp(gradient, (flat,), (direction,))[1]
        once = orthogonal(image, basis)
        rest = orthogonal(once, basis)  # twice is enough
        length = jnp.linalg.norm(rest)
        new = length > 0.7 * jnp.linalg.norm(once)  # else only rounding is left, and the basis is complete
        return (basis, jnp.where(new, rest / jnp.where(new, length, 1), 0)), image

    start = jax.random.normal(key, flat.shape, flat.dtype)
    carry = jnp.zeros((steps, flat.size), flat.dtype), start / jnp.linalg.norm(start)
    (basis, _), images = jax.lax.scan(step, carry, jnp.arange(steps))
    values = jnp.linalg.eigvalsh(basis @ images.T)
    return values[jnp.argmax(jnp.abs(values))]


@eqx.filter_jit
def _hessian(loss: Callable, flat: Array, rebuild: Callable, batch: int) -> Array:
    gradient = jax.grad(lambda p: loss(rebuild(p)))
    along = lambda direction: jax.jvp(gradient, (flat,), (direction,))[1]  # noqa: E731
    return jax.lax.map(along, jnp.eye(flat.size, dtype=flat.dtype), batch_size=min(batch, flat.size))


@eqx.filter_jit
def _jacobian(residuals: Callable, flat: Array, rebuild: Callable) -> Array:
    flattened = lambda p: jnp.ravel(residuals(rebuild(p)))  # noqa: E731
    wide = jax.eval_shape(flattened, flat).size < flat.size
    return (jax.jacrev if wide else jax.jacfwd)(flattened)(flat)


def _ravel(parameters: PyTree) -> tuple[Array, Callable[[Array], Any]]:
    trained, rest = eqx.partition(parameters, eqx.is_inexact_array)
    if not jax.tree.leaves(trained):
        raise ValueError(f"parameters must hold a floating-point array, got {eqx.tree_pformat(parameters)}")
    for leaf in jax.tree.leaves(trained):
        if jnp.iscomplexobj(leaf):
            raise TypeError(f"parameters must be real (hold real and imaginary part apart), got {leaf.dtype}")
    with jax.numpy_dtype_promotion("standard"):  # arrays may differ in precision
        flat, unravel = ravel_pytree(trained)
    return flat, eqx.Partial(_rebuild, unravel, rest)


def _rebuild(unravel: Callable, rest: PyTree, flat: Array) -> Any:
    return eqx.combine(unravel(flat), rest)


# Learning rates of adaptive optimisers -------------------------------------------------------------------------------


def effective_learning_rate(
    state: PyTree, learning_rate: Float[Array, ""] | float, *, b2: float = 0.999, eps: float = 1e-8
) -> PyTree:
    r"""Adam's step per unit of averaged gradient, $\eta/(\sqrt{\hat v}+\epsilon)$; a pytree like the parameters.

    `state` is that of an Optax chain with `scale_by_adam` in it, after at least one step; $\hat v=v/(1-\beta_2^n)$.
    Always positive, and up to $\eta/\epsilon$ where gradients vanish. Raises `ValueError` where no such state is found.
    """
    adam = _adam_state(state)
    correction = 1 - b2 ** adam.count.astype(jnp.result_type(float))
    with jax.numpy_dtype_promotion("standard"):  # the parameters' dtype need not be the default one
        return jax.tree.map(lambda v: jnp.asarray(learning_rate / (jnp.sqrt(v / correction) + eps), v.dtype), adam.nu)


def released_effective_learning_rate(optimizer: optax.GradientTransformation, state: PyTree) -> PyTree:
    r"""The "effective learning rate" of the released code: minus the update if the next gradient were 1 everywhere.

    For Adam it is $\eta\,\hat m'/(\sqrt{\hat v'}+\epsilon)$ with $m'=\beta_1m+(1-\beta_1)$, $v'=\beta_2v+(1-\beta_2)$.
    The momentum m of past gradients adds to it or takes from it, so it may be negative. Where gradients are much
    smaller than 0.03 it is $0.1\,\eta/\sqrt{0.001}=3.16\,\eta$, however small they are. No history of gradients gives
    more than $7.27\,\eta$, the square root of $\frac{(1-\beta_1)^2}{1-\beta_2}\big/(1-\frac{\beta_1^2}{\beta_2})$
    (Cauchy-Schwarz). Errors: as `effective_learning_rate`.
    """
    ones = jax.tree.map(jnp.ones_like, _adam_state(state).nu)
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes
        return jax.tree.map(jnp.negative, optimizer.update(ones, state)[0])


def _adam_state(state: PyTree) -> Any:
    is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)  # noqa: E731
    found = [node for node in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(node)]
    if len(found) != 1:
        raise ValueError(f"state must hold the state of one scale_by_adam, got {len(found)} of them")
    return found[0]
