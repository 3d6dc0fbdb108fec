r"""One linear system in several coordinates: what it computes is the same, its parameters are not.

    h' = S h :      A' = S A S⁻¹,   B' = S B,   C' = C S⁻¹,   D' = D,      so that   C'A'^k B' = C A^k B .

A loss that depends on the impulse response alone has in other coordinates the Hessian of the same function of other
parameters: another spectrum, other eigenvectors.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Complex, Float, PRNGKeyArray

from ._checks import is_abstract, require_integer, require_values
from .eigenvalues import Cartesian, LearnedNormalizer
from .layers import S5, DiagonalRNN, LinearRNN


def oscillating_teacher(
    key: PRNGKeyArray, pairs: int, *, min_modulus: float = 0.99, max_modulus: float = 0.993
) -> LinearRNN:
    r"""A system of `pairs` conjugate pairs in a random basis, the teacher of the paper's Hessians; n = 2 · pairs.

    $\lambda=(\nu_{\min}+(\nu_{\max}-\nu_{\min})\,u)\,e^{2\pi iu'}$ with u and u' uniform, and
    $A=U^{-1}\,\mathrm{diag}(\lambda)\,U$, the rows of U Gaussian, in conjugate pairs; B ~ N(0, 1), C ~ N(0, 1/n),
    D ~ N(0, 1).

    Raises `ValueError` unless pairs >= 1 and 0 <= min_modulus <= max_modulus < 1.
    """
    require_integer("pairs", pairs, minimum=1)
    require_values("max_modulus", max_modulus, "at least 0 and below 1", lambda r: (r >= 0) & (r < 1))
    allowed = f"between 0 and max_modulus = {max_modulus}"
    require_values("min_modulus", min_modulus, allowed, lambda r: (r >= 0) & (r <= max_modulus))
    modulus_key, phase_key, real_key, imag_key, input_key, output_key, feedthrough_key = jr.split(key, 7)
    n = 2 * pairs
    nu = min_modulus + (max_modulus - min_modulus) * jr.uniform(modulus_key, (pairs,))
    theta = 2 * jnp.pi * jr.uniform(phase_key, (pairs,))
    rows = jax.lax.complex(jr.normal(real_key, (pairs, n)), jr.normal(imag_key, (pairs, n)))
    lam = _with_conjugates(jax.lax.complex(nu * jnp.cos(theta), nu * jnp.sin(theta)))
    basis = _with_conjugates(rows)
    recurrent = jnp.linalg.solve(basis, lam[:, None] * basis).real
    return LinearRNN.from_weights(
        recurrent,
        jr.normal(input_key, (n, 1)),
        jr.normal(output_key, (1, n)) / np.sqrt(n).item(),
        jr.normal(feedthrough_key, (1, 1)),
    )


def change_basis(system: LinearRNN, basis: Float[Array, "n n"]) -> LinearRNN:
    """The system with the state S h; dense. Raises `ValueError` unless S is (n, n) and, if it is known, invertible."""
    n = len(system.input_weight)
    if jnp.shape(basis) != (n, n):
        raise ValueError(f"basis must have shape {(n, n)}, got {jnp.shape(basis)}")
    undo = jnp.linalg.inv(basis)
    if not is_abstract(undo) and not jnp.isfinite(undo).all():
        raise ValueError(f"basis must be invertible, got {basis}")
    return LinearRNN.from_weights(
        basis @ system.matrix() @ undo, basis @ system.input_weight, system.output_weight @ undo, system.feedthrough
    )


def rotated(system: LinearRNN, key: PRNGKeyArray) -> LinearRNN:
    """The system in orthonormal coordinates drawn at random: distances between parameters stay as they are."""
    return change_basis(system, jr.orthogonal(key, len(system.input_weight), dtype=system.input_weight.dtype))


def balanced(system: LinearRNN) -> LinearRNN:
    r"""The system in the coordinates in which states are as easy to reach as to see.

    There the Gramians $\sum_kA^kBB^\top A^{\top k}$ and $\sum_kA^{\top k}C^\top CA^k$ are the same diagonal matrix
    (Moore 1981); its entries are the Hankel singular values, in descending order. Not for tracing.

    Raises `ValueError` unless all |λ| are below 1 and the input reaches, and the output sees, all of the state.
    """
    matrix = system.matrix()
    require_values("|λ| of the system", jnp.abs(system.eigenvalues()), "below 1", lambda r: r < 1)
    reach = _gramian(matrix, system.input_weight)
    see = _gramian(matrix.T, system.output_weight.T)
    left = jnp.linalg.cholesky(reach)
    vectors, squares, _ = jnp.linalg.svd(left.T @ see @ left)
    hankel = jnp.sqrt(squares)
    if not (jnp.isfinite(hankel).all() and hankel[-1] > 0):
        raise ValueError(f"all of the state must be reached and seen, got Hankel singular values {hankel}")
    return change_basis(system, jnp.linalg.inv(left @ vectors / jnp.sqrt(hankel)[None]))


def real_blocks(system: LinearRNN) -> LinearRNN:
    r"""The system with A of real blocks: $\nu\cos\theta$ on the diagonal and $\mp\nu\sin\theta$ beside it.

    One block of 2 × 2 for each conjugate pair, a single entry for a real eigenvalue; each scaled so that its parts of B
    and of C have the same length. A stays a dense matrix of parameters. Not for tracing.
    """
    lam, vectors = (np.asarray(x) for x in jnp.linalg.eig(system.matrix()))
    columns, sizes = [], []
    for value, vector in zip(lam, vectors.T, strict=True):
        if value.imag >= 0:  # one of each pair
            columns += [vector.real] if value.imag == 0 else [vector.real, -vector.imag]
            sizes.append(1 if value.imag == 0 else 2)
    dtype = system.input_weight.dtype
    blocks = change_basis(system, jnp.linalg.inv(jnp.asarray(np.stack(columns, axis=1), dtype)))
    starts = np.cumsum([0, *sizes[:-1]])
    norms = [
        np.sqrt(np.add.reduceat(np.sum(np.asarray(weight) ** 2, axis=axis), starts))
        for weight, axis in ((blocks.output_weight, 0), (blocks.input_weight, 1))
    ]
    return change_basis(blocks, jnp.diag(jnp.asarray(np.repeat(np.sqrt(norms[0] / norms[1]), sizes), dtype)))


def diagonal(
    system: LinearRNN,
    parametrization: type[Any] = Cartesian,
    *,
    normalized: bool = False,
    unit_eigenvectors: bool = False,
) -> DiagonalRNN:
    r"""The system as a complex diagonal network: one unit for each eigenvalue, both of a conjugate pair.

    `parametrization` is a class of `scanrnn.eigenvalues`. With `normalized`, B is divided by a `LearnedNormalizer` at
    $\gamma=\sqrt{1-|\lambda|^2}$: with `Exponential` this is an LRU. Units are scaled so that each one's parts of B
    (before that) and of C have the same length; with `unit_eigenvectors` as eigenvectors of norm 1 give them, which is
    what the released code does. Not for tracing.

    A must have distinct eigenvalues. Raises `ValueError` for a λ that `parametrization` does not allow: with
    `Exponential` a real and positive one.
    """
    lam, weight_in, weight_out = _modes(system, unit_eigenvectors)
    normalizer = LearnedNormalizer.from_eigenvalues(lam) if normalized else None
    layer = DiagonalRNN(
        *_sizes(system),
        eigenvalues=parametrization.from_eigenvalues(lam),
        normalization=normalizer,
        key=jr.key(0),
    )
    gamma = 1.0 if normalizer is None else normalizer(lam)[:, None]
    return _with_weights(layer, weight_in.real / gamma, weight_in.imag / gamma, weight_out, system.feedthrough)


def zero_order_hold(system: LinearRNN, *, step: float = 0.01, unit_eigenvectors: bool = False) -> S5:
    r"""The system as an `S5` whose steps are all Δ = `step`: $\lambda=e^{\Delta A}$, one state for each eigenvalue.

    Scaled as `diagonal`, so that $(\lambda-1)A^{-1}B$ is that layer's B. Not for tracing.
    """
    require_values("step", step, "positive and finite", lambda x: (x > 0) & np.isfinite(x))
    lam, weight_in, weight_out = _modes(system, unit_eigenvectors)
    poles = jnp.log(lam) / step
    d_in, d_hidden, d_out = _sizes(system)
    layer = S5(d_in, d_hidden, d_out, key=jr.key(0))
    times = jnp.log(-poles.real), poles.imag, jnp.full(d_hidden, np.log(step).item(), lam.real.dtype)
    layer = eqx.tree_at(lambda s: (s.log_decay, s.frequency, s.log_step), layer, times)
    weight_in = weight_in * (poles / (lam - 1))[:, None]
    return _with_weights(layer, weight_in.real, weight_in.imag, weight_out / 2, system.feedthrough)


def in_five_bases(system: LinearRNN, key: PRNGKeyArray) -> dict[str, LinearRNN | DiagonalRNN]:
    """The system as it is ("random"), its real blocks "rotated" by `key`, "balanced", in "real blocks", "diagonal"."""
    blocks = real_blocks(system)
    return {
        "random": system,
        "rotated": rotated(blocks, key),
        "balanced": balanced(system),
        "real blocks": blocks,
        "diagonal": diagonal(system),
    }


def _with_conjugates(first: Complex[Array, "pairs ..."]) -> Complex[Array, "2*pairs ..."]:
    return jnp.stack([first, jnp.conj(first)], axis=1).reshape(2 * len(first), *first.shape[1:])


def _gramian(matrix: Array, weight: Array) -> Array:
    """The G with G = A G Aᵀ + B Bᵀ: a linear system in its n² entries."""
    n = len(matrix)
    return jnp.linalg.solve(
        jnp.eye(n * n, dtype=matrix.dtype) - jnp.kron(matrix, matrix), (weight @ weight.T).ravel()
    ).reshape(n, n)


def _modes(system: LinearRNN, unit_eigenvectors: bool) -> tuple[Array, Array, Array]:
    """λ, V⁻¹B and CV."""
    lam, vectors = jnp.linalg.eig(system.matrix())
    with jax.numpy_dtype_promotion("standard"):
        weight_in, weight_out = jnp.linalg.solve(vectors, system.input_weight + 0j), system.output_weight @ vectors
    if unit_eigenvectors:
        return lam, weight_in, weight_out
    ratio = jnp.linalg.norm(weight_out, axis=0) / jnp.linalg.norm(weight_in, axis=1)
    scale = jnp.sqrt(ratio).astype(lam.dtype)
    return lam, weight_in * scale[:, None], weight_out / scale[None]


def _sizes(system: LinearRNN) -> tuple[int, int, int]:
    return system.input_weight.shape[1], system.input_weight.shape[0], system.output_weight.shape[0]


def _with_weights(layer: Any, input_real: Array, input_imag: Array, weight_out: Array, feedthrough: Array) -> Any:
    where = lambda s: (s.input_real, s.input_imag, s.output_real, s.output_imag, s.feedthrough)  # noqa: E731
    return eqx.tree_at(where, layer, (input_real, input_imag, weight_out.real, weight_out.imag, feedthrough))
