r"""Losses of linear systems from their impulse responses κ, without simulating a network.

A linear system that starts from the state zero answers y_t = Σ_k κ_k x_{t-k}. Teacher and student driven by the same
input differ by Δy_t = Σ_k Δκ_k x_{t-k}, and for white inputs of unit variance the products of different inputs average
to nothing. Lag k occurs in T - k of the T steps:

    L = E[1/T Σ_t ½|Δy_t|²] = ½ Σ_{k<T} (1 - k/T) |Δκ_k|² .
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Inexact

from .._checks import require_inexact, require_integer, require_rank
from . import _arguments
from ._linear import hessian_overlap


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
    toeplitz = jnp.moveaxis(_toeplitz(gap), 2, 1).reshape(length * d_out, length * d_in)
    return 0.5 * jnp.sum((toeplitz @ inputs.ravel()) ** 2) / length


def finite_hessian_overlap(lam_i: ArrayLike, lam_j: ArrayLike, length: int, rho: float = 0.0) -> Inexact[Array, "..."]:
    r"""`hessian_overlap` averaged over the T = `length` steps of a sequence that starts from the state zero,

    $$S_T(\alpha,\beta,\rho)=\sum_{k,l=1}^{T-1}\Big(1-\frac{\max(k,l)}T\Big)\,kl\,\alpha^{k-1}\beta^{l-1}\rho^{|k-l|}
      \;\xrightarrow{T\to\infty}\;S(\alpha,\beta,\rho) .$$

    For white input only k = l is left: $S_T=\sum_k(1-k/T)\,k^2(\alpha\beta)^{k-1}$.

    Shapes of the eigenvalues broadcast; one ρ. Raises `ValueError` unless |λ| < 1, ρ is one number in [0, 1], `length`
    is at least 1 and the shapes broadcast; `TypeError` for what is not a number. Traced values outside give NaN.
    """
    require_integer("length", length, minimum=1)
    require_rank("rho", rho, 0)
    a, b, correlation = _arguments.together(
        lam_i=_arguments.eigenvalue("lam_i", lam_i),
        lam_j=_arguments.eigenvalue("lam_j", lam_j),
        rho=_arguments.correlation("rho", rho),
    )
    with jax.numpy_dtype_promotion("standard"):
        return _finite_overlap(a, b, correlation.ravel()[0], length)


def eigenvalue_hessian(
    lam: Inexact[ArrayLike, " n"],
    weight: Inexact[ArrayLike, " n"],
    rho: float = 0.0,
    *,
    length: int | None = None,
) -> Float[Array, "2*n 2*n"]:
    r"""The Hessian of a diagonal network's loss at its teacher, with respect to (Re λ, Im λ); (2n, 2n).

    The output is $y=\Re\sum_iw_ih_i$ with $w_i=c_ib_i$, `weight`. With $A_{ij}=w_iw_jS(\lambda_i,\lambda_j,\rho)$ and
    $B_{ij}=w_i\bar w_jS(\lambda_i,\bar\lambda_j,\rho)$,

    $$H=\tfrac12\begin{pmatrix}\Re(B+A)&\Im(B-A)\\-\Im(B+A)&\Re(B-A)\end{pmatrix}.$$

    S is `hessian_overlap`, in the stationary state, or `finite_hessian_overlap` where a `length` is given.

    Raises `ValueError` unless `lam` and `weight` are both of shape (n,), and as these two.
    """
    if jnp.ndim(lam) != 1 or jnp.shape(lam) != jnp.shape(weight):
        raise ValueError(f"lam and weight must both have shape (n,), got {jnp.shape(lam)} and {jnp.shape(weight)}")
    lam, weight = jnp.asarray(lam), jnp.asarray(weight)

    def overlap(a: Array, b: Array) -> Array:
        pair = a[:, None], b[None, :]
        return hessian_overlap(*pair, rho) if length is None else finite_hessian_overlap(*pair, length, rho)

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # real and complex may mix
        a = weight[:, None] * weight * overlap(lam, lam)
        b = weight[:, None] * jnp.conj(weight) * overlap(lam, jnp.conj(lam))
    return 0.5 * jnp.block([[(b + a).real, (b - a).imag], [-(b + a).imag, (b - a).real]])


def _finite_overlap(a: Array, b: Array, rho: Array, length: int) -> Array:
    # One recurrence in each argument: u_m = Σ_{k<=m} kα^{k-1} ρ^{m-k} is what the terms k <= l = m have in common.
    # With w_m = 1 - m/T,  S_T = Σ_m w_m m [β^{m-1} u_m + α^{m-1} v_m - m (αβ)^{m-1}]  counts k = l once.
    def step(carry: Any, m: Array) -> tuple[Any, None]:
        total, u, v, power_a, power_b = carry
        u, v = rho * u + m * power_a, rho * v + m * power_b
        total += (1 - m / length) * m * (power_b * u + power_a * v - m * power_a * power_b)
        return (total, u, v, power_a * a, power_b * b), None

    zero = jnp.zeros_like(a * b)
    start = zero, jnp.zeros_like(a), jnp.zeros_like(b), jnp.ones_like(a), jnp.ones_like(b)
    lags = jnp.arange(1, length, dtype=rho.dtype)
    return jax.lax.scan(step, start, lags)[0][0]


def _toeplitz(kernel: Float[Array, "time ..."]) -> Float[Array, "time time ..."]:
    """κ_{t-s} at (t, s), zero above the diagonal."""
    # Written out again and again and cut into rows one longer than its period, the reversed kernel moves by one from
    # row to row: no index, hence no scattering in the derivative, which on a CPU would take longer than all the rest.
    length = len(kernel)
    period = jnp.concatenate([kernel[::-1], jnp.zeros_like(kernel)])  # κ_{T-1} ... κ_0 0 ... 0, 2T entries
    rows = jnp.tile(period, (length + 1,) + (1,) * (kernel.ndim - 1))[: length * (2 * length + 1)]
    return rows.reshape(length, 2 * length + 1, *kernel.shape[1:])[::-1, :length]


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
