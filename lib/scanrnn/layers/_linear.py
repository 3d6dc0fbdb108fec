r"""Linear recurrences through a real matrix: dense, or block-diagonal.

h_t = A h_{t-1} + B x_t,        y_t = C h_t + D x_t,        A = diag(A_1, ..., A_K)
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float, PRNGKeyArray

from .._checks import require_inexact, require_integer, require_rank
from ..eigenvalues import squash_spectrum
from ._base import LinearLayer, as_inputs, kernel_from_factors, require_sizes, scaled_normal


class LinearRNN(LinearLayer):
    r"""The linear network $h_t=Ah_{t-1}+Bx_t$, $y_t=Ch_t+Dx_t$ with A real: dense, or of K equal blocks.

    **Arguments:** the sizes; `blocks`, the number K of blocks on the diagonal of A, which are all that is stored and
    trained (1, the default, is a dense matrix); `min_modulus`, `max_modulus`, `max_phase`; `key`.

    Each block starts as a Gaussian matrix of variance K/d_hidden whose eigenvalues are moved by
    `scanrnn.eigenvalues.squash_spectrum`. B ~ N(0, 1/d_in), C ~ N(0, 1/d_hidden) and D ~ N(0, 1/d_in), truncated at
    two standard deviations: the "RNN" and the "block diagonal" student of Zucchet & Orvieto (2024), who leave
    `min_modulus` at 0 for students.

    Raises `ValueError` for a size below 1, `blocks` that do not divide d_hidden, or a range that `squash_spectrum`
    refuses; `TypeError` for sizes that are not integers.
    """

    recurrent: Float[Array, "blocks block block"]  # A, its diagonal blocks
    input_weight: Float[Array, "hidden input"]  # B
    output_weight: Float[Array, "output hidden"]  # C
    feedthrough: Float[Array, "output input"]  # D

    def __init__(
        self,
        d_in: int,
        d_hidden: int,
        d_out: int,
        *,
        blocks: int = 1,
        min_modulus: float = 0.0,
        max_modulus: float = 1.0,
        max_phase: float = np.pi,
        key: PRNGKeyArray,
    ):
        require_sizes(d_in=d_in, d_hidden=d_hidden, d_out=d_out)
        require_integer("blocks", blocks, minimum=1)
        if d_hidden % blocks:
            raise ValueError(f"blocks must divide d_hidden = {d_hidden}, got {blocks}")
        recurrent_key, input_key, output_key, feedthrough_key = jax.random.split(key, 4)
        size = d_hidden // blocks
        self.recurrent = squash_spectrum(
            scaled_normal(recurrent_key, (blocks, size, size), 1 / size),
            min_modulus=min_modulus,
            max_modulus=max_modulus,
            max_phase=max_phase,
        )
        draw = jax.nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
        self.input_weight = draw(input_key, (d_hidden, d_in), self.recurrent.dtype)
        self.output_weight = draw(output_key, (d_out, d_hidden), self.recurrent.dtype)
        self.feedthrough = draw(feedthrough_key, (d_out, d_in), self.recurrent.dtype)

    @classmethod
    def from_weights(
        cls,
        recurrent: Float[Array, "... block block"],
        input_weight: Float[Array, "hidden input"],
        output_weight: Float[Array, "output hidden"],
        feedthrough: Float[Array, "output input"],
    ) -> "LinearRNN":
        """The layer with the matrices A (square, or its blocks stacked), B, C and D.

        Raises `ValueError` where their shapes do not fit, `TypeError` where one is not real floating point.
        """
        arrays = {"input_weight": input_weight, "output_weight": output_weight, "feedthrough": feedthrough}
        for name, array in {"recurrent": recurrent, **arrays}.items():
            require_inexact(name, array)
            if jnp.iscomplexobj(array):
                raise TypeError(f"{name} must be real, got {array.dtype}")
        require_rank("recurrent", recurrent, 2, 3)
        require_rank("feedthrough", feedthrough, 2)
        recurrent = recurrent if recurrent.ndim == 3 else recurrent[None]
        blocks, size, width = recurrent.shape
        if size != width:
            raise ValueError(f"recurrent must be square, got shape {recurrent.shape}")
        d_out, d_in = feedthrough.shape
        fitting = {"input_weight": (blocks * size, d_in), "output_weight": (d_out, blocks * size)}
        for name, shape in fitting.items():
            if arrays[name].shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {arrays[name].shape}")
        layer = cls(d_in, blocks * size, d_out, blocks=blocks, key=jax.random.key(0))
        where = lambda s: (s.recurrent, s.input_weight, s.output_weight, s.feedthrough)  # noqa: E731
        return eqx.tree_at(where, layer, (recurrent, *arrays.values()))

    @property
    def _d_in(self) -> int:
        return self.feedthrough.shape[-1]

    def matrix(self) -> Float[Array, "hidden hidden"]:
        """A, with the zeros between its blocks."""
        return jax.scipy.linalg.block_diag(*self.recurrent)

    def eigenvalues(self) -> Complex[Array, " hidden"]:
        """λ, block by block; (d_hidden,). JAX has them on the CPU, and since 2025 on Nvidia's GPUs."""
        return jnp.linalg.eigvals(self.recurrent).ravel()

    def states(self, inputs: Float[Array, "time input"]) -> Float[Array, "time hidden"]:
        """h after each step; (T, d_hidden)."""
        inputs = as_inputs(inputs, self.feedthrough)
        drive = (inputs @ self.input_weight.T).reshape(len(inputs), *self.recurrent.shape[:2])

        def step(h: Array, x: Array) -> tuple[Array, Array]:
            h = jnp.einsum("kij,kj->ki", self.recurrent, h) + x
            return h, h

        return lax.scan(step, jnp.zeros_like(drive[0]), drive)[1].reshape(len(inputs), -1)

    def __call__(self, inputs: Float[Array, "time input"]) -> Float[Array, "time output"]:
        """y; (T, d_out)."""
        inputs = as_inputs(inputs, self.feedthrough)
        return self.states(inputs) @ self.output_weight.T + inputs @ self.feedthrough.T

    def impulse_response(self, length: int) -> Float[Array, "{length} output input"]:
        r"""$\kappa_k=CA^kB$, and D more at k = 0; (length, d_out, d_in). Errors: as every linear layer's.

        The first 16 powers act on B by doubling, $[B,\dots,A^{2m-1}B]=[K_m,A^mK_m]$ with $K_m=[B,\dots,A^{m-1}B]$, and
        C meets powers of $A^{16}$ one after the other: of all ways to share the work this is the fastest on a CPU.
        """
        require_integer("length", length, minimum=1)
        power = _tiled(self.recurrent)
        blocks, size, _ = power.shape
        strides = -(-length // _STRIDE)
        reached = self.input_weight.reshape(blocks, size, -1)
        for _ in range(_STRIDE.bit_length() - 1):
            reached = jnp.concatenate([reached, power @ reached], axis=2)
            power = power @ power

        def step(read: Array, _: None) -> tuple[Array, Array]:
            return read @ power, read

        read = jnp.moveaxis(self.output_weight.reshape(-1, blocks, size), 1, 0)
        _, reads = lax.scan(step, read, length=strides)  # (strides, blocks, d_out, size)
        first = reached.reshape(blocks * size, _STRIDE, -1)
        second = jnp.moveaxis(reads, 1, 2).reshape(strides, -1, blocks * size)
        return kernel_from_factors(second, first, self.feedthrough, length)


_STRIDE = 16  # of the powers of A; fewer squarings against fewer steps
_TILE = 8  # rows; smaller matrices are not multiplied any faster


def _tiled(blocks: Float[Array, "blocks block block"]) -> Float[Array, "tiles tile tile"]:
    """The same block-diagonal matrix with neighbouring small blocks joined, zeros between them."""
    count, size, _ = blocks.shape
    join = next(k for k in range(max(1, min(_TILE // size, count)), 0, -1) if count % k == 0)
    spread = jnp.eye(join, dtype=blocks.dtype)[None, :, None, :, None]
    tiles = blocks.reshape(count // join, join, size, 1, size) * spread
    return tiles.reshape(count // join, join * size, join * size)
