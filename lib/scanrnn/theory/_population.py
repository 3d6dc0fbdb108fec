r"""Losses of linear systems from their impulse responses κ, without simulating a network.

A linear system that starts from the state zero answers y_t = Σ_k κ_k x_{t-k}. Teacher and student driven by the same
input differ by Δy_t = Σ_k Δκ_k x_{t-k}, and for white inputs of unit variance the products of different inputs average
to nothing. Lag k occurs in T - k of the T steps:

    L = E[1/T Σ_t ½|Δy_t|²] = ½ Σ_{k<T} (1 - k/T) |Δκ_k|² .
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Inexact

from .._checks import require_inexact, require_integer, require_rank
from . import _arguments


def population_loss(
    student_kernel: Float[Array, "time output input"], teacher_kernel: Float[Array, "time output input"]
) -> Float[Array, ""]:
    r"""The expected loss per step of a sequence of T white inputs, exactly: $\frac12\sum_k(1-k/T)\,|\Delta\kappa_k|^2$.

    Both impulse responses have the shape (T, d_out, d_in), as a linear layer's `impulse_response(T)`; $|\cdot|^2$ sums
    over outputs and inputs. The state starts at zero, so this includes the transient: it is what the mean of
    `sampled_loss` over draws of the inputs tends to.

    Raises `ValueError` unless both have the same shape (T, d_out, d_in), T >= 1; `TypeError` unless they are real
    floating point.
    """
    gap = _gap(student_kernel, teacher_kernel)
    length = len(gap)
    weights = 1 - jnp.arange(length, dtype=gap.dtype) / length
    return 0.5 * jnp.sum(weights * jnp.sum(gap**2, axis=(1, 2)))


def sampled_loss(
    student_kernel: Float[Array, "time output input"],
    teacher_kernel: Float[Array, "time output input"],
    inputs: Float[Array, "time input"],
) -> Float[Array, ""]:
    r"""The loss per step on one sequence of inputs, $\frac1T\sum_t\frac12|\sum_{k\le t}\Delta\kappa_k\,x_{t-k}|^2$.

    It is that of running both systems from the state zero, at the price of one product: the convolution is written as
    a Toeplitz matrix, which a batch of sequences (`jax.vmap` over `inputs`) shares.

    Raises `ValueError` and `TypeError` as `population_loss`, and unless `inputs` has the shape (T, d_in).
    """
    gap = _gap(student_kernel, teacher_kernel)
    require_inexact("inputs", inputs)
    if inputs.shape != (gap.shape[0], gap.shape[2]):
        raise ValueError(f"inputs must have shape (T, d_in) = {(gap.shape[0], gap.shape[2])}, got {inputs.shape}")
    length, d_out, d_in = gap.shape
    lag = np.arange(length)[:, None] - np.arange(length)[None]  # t - s
    toeplitz = jnp.where((lag >= 0)[:, :, None, None], gap[np.maximum(lag, 0)], 0)
    outputs = jnp.moveaxis(toeplitz, 2, 1).reshape(length * d_out, length * d_in) @ inputs.ravel()
    return 0.5 * jnp.sum(outputs**2) / length


def finite_hessian_overlap(lam_i: ArrayLike, lam_j: ArrayLike, length: int) -> Inexact[Array, "..."]:
    r"""`hessian_overlap` for white inputs and sequences of T = `length` steps from the state zero,

    $$S_T(\alpha,\beta)=\sum_{k=1}^{T-1}\Big(1-\frac kT\Big)k^2(\alpha\beta)^{k-1}
      \;\xrightarrow{T\to\infty}\;\frac{1+\alpha\beta}{(1-\alpha\beta)^3} .$$

    Shapes of the eigenvalues broadcast. Raises `ValueError` unless |λ| < 1, `length` is at least 1 and the shapes
    broadcast; `TypeError` for what is not a number. Traced eigenvalues outside give NaN.
    """
    require_integer("length", length, minimum=1)
    a, b = _arguments.together(lam_i=_arguments.eigenvalue("lam_i", lam_i), lam_j=_arguments.eigenvalue("lam_j", lam_j))
    with jax.numpy_dtype_promotion("standard"):
        return _finite_overlap(a * b, length)


def _finite_overlap(p: Array, length: int) -> Array:
    # By Horner's rule: all partial sums are bounded by the sum of the moduli, and no power is stored.
    lags = np.arange(1, length)
    weights = (1 - lags / length) * lags**2.0

    def step(total: Array, weight: Array) -> tuple[Array, None]:
        return total * p + weight, None

    weights = jnp.asarray(weights[::-1], dtype=jnp.real(p).dtype)
    return jax.lax.scan(step, jnp.zeros_like(p), weights)[0]


def _gap(student_kernel: Array, teacher_kernel: Array) -> Array:
    for name, kernel in {"student_kernel": student_kernel, "teacher_kernel": teacher_kernel}.items():
        require_inexact(name, kernel)
        require_rank(name, kernel, 3)
        if jnp.iscomplexobj(kernel):
            raise TypeError(f"{name} must be real, got {kernel.dtype}")
    if student_kernel.shape != teacher_kernel.shape or len(student_kernel) == 0:
        raise ValueError(
            "student_kernel and teacher_kernel must have one shape (T, d_out, d_in) with T >= 1, "
            f"got {student_kernel.shape} and {teacher_kernel.shape}"
        )
    return student_kernel - teacher_kernel
