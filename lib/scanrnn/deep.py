r"""The residual stack: recurrent layers between a linear encoder and a linear decoder (Zucchet & Orvieto 2024, Fig. 5).

    s⁰ = E x + e
    u  = gelu(layer(norm(s)))          the recurrent layer, T × d → T × d
    v  = norm(u)                       the same norm, with the same parameters
    s' = s + (P v + p) ⊙ σ(G v + g)    a gated linear unit, and the skip connection
    ŷ  = D s^L + d

A norm is a module that maps a whole sequence (T, d) to one of the same shape: `LayerNorm` looks at one step at a time,
`BatchNorm` at all steps of all sequences of the batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ._checks import require_integer
from .layers._base import as_inputs, scaled_normal

Norm = Callable[[Float[Array, "time width"]], Float[Array, "time width"]]


class LayerNorm(eqx.Module):
    r"""At each step $(x-\bar x)/\sqrt{\mathrm{var}\,x+\epsilon}\odot\gamma+\beta$, mean and variance over the features.

    Equinox's layer norm over a sequence. ε = 1e-6; γ starts at 1 and β at 0.
    """

    norm: eqx.nn.LayerNorm

    def __init__(self, width: int):
        self.norm = eqx.nn.LayerNorm(width, eps=1e-6)

    def __call__(self, sequence: Float[Array, "time width"]) -> Float[Array, "time width"]:
        return jax.vmap(self.norm)(sequence)


class BatchNorm(eqx.Module):
    r"""For each feature $(x-\bar x)/\sqrt{\mathrm{var}\,x+\epsilon}\,\gamma+\beta$, moments over time and the batch.

    The moments are those of the sequences at hand, as in training; there is no running average. Under
    `jax.vmap(..., axis_name="batch")` they are shared by the batch; called alone, by the steps of one sequence.
    ε = 1e-5; γ starts at 1 and β at 0.
    """

    weight: Float[Array, " width"]  # γ
    bias: Float[Array, " width"]  # β

    def __init__(self, width: int):
        self.weight, self.bias = jnp.ones(width), jnp.zeros(width)

    def __call__(self, sequence: Float[Array, "time width"]) -> Float[Array, "time width"]:
        mean = _batch_mean(jnp.mean(sequence, axis=0))
        centred = sequence - mean[None]
        variance = _batch_mean(jnp.mean(centred**2, axis=0))
        return centred * (self.weight / jnp.sqrt(variance + 1e-5))[None] + self.bias[None]


class Block(eqx.Module):
    """Norm, recurrence, GELU, the same norm, gated linear unit; and the skip connection around them."""

    norm: Norm | None
    layer: Callable[[Array], Array]
    value: eqx.nn.Linear  # P, p
    gate: eqx.nn.Linear  # G, g

    def __init__(self, width: int, *, layer: Callable[[Array], Array], norm: Norm | None, key: PRNGKeyArray):
        value_key, gate_key = jax.random.split(key)
        self.norm, self.layer = norm, layer
        self.value, self.gate = dense(width, width, key=value_key), dense(width, width, key=gate_key)

    def __call__(self, stream: Float[Array, "time width"]) -> Float[Array, "time width"]:
        hidden = jax.nn.gelu(self.layer(self.layer_inputs(stream)))
        hidden = hidden if self.norm is None else self.norm(hidden)
        return stream + jax.vmap(self.value)(hidden) * jax.nn.sigmoid(jax.vmap(self.gate)(hidden))

    def layer_inputs(self, stream: Float[Array, "time width"]) -> Float[Array, "time width"]:
        """What the recurrent layer receives: the normalised stream."""
        return stream if self.norm is None else self.norm(stream)


class Propagated(NamedTuple):
    """What `ResidualStack.propagate` returns.

    - `outputs`: ŷ; (T, d_out)
    - `streams`: s⁰ ... s^L, the residual stream before the first block and after each; (L + 1, T, d_model)
    """

    outputs: Float[Array, "time output"]
    streams: Float[Array, "depth time width"]


class ResidualStack(eqx.Module):
    r"""L blocks between a linear encoder and a linear decoder; the equations open the module.

    **Arguments:** `d_in`, `d_model`, `d_out`; `layers`, the L recurrent layers, each mapping (T, d_model) to
    (T, d_model); `norm`, a class or function that makes a norm from the width (`LayerNorm`, `BatchNorm`; each block
    gets its own), or None for no norm; `key`.

    Linear maps have weights N(0, 1/fan-in) and biases 0, as the paper's.

    Raises `ValueError` for a size below 1, no layers, or a layer or norm that changes the shape; `TypeError` for sizes
    that are not integers, a layer that cannot be called, or a `norm` that is neither a function nor None (the name of
    one, say).
    """

    encoder: eqx.nn.Linear  # E, e
    blocks: tuple[Block, ...]
    decoder: eqx.nn.Linear  # D, d

    def __init__(
        self,
        d_in: int,
        d_model: int,
        d_out: int,
        *,
        layers: Sequence[Callable[[Array], Array]],
        norm: Callable[[int], Norm] | None = None,
        key: PRNGKeyArray,
    ):
        for name, size in {"d_in": d_in, "d_model": d_model, "d_out": d_out}.items():
            require_integer(name, size, minimum=1)
        if norm is not None and not callable(norm):
            raise TypeError(f"norm must be None or make a norm from the width, as LayerNorm does, got {norm!r}")
        if len(layers) == 0:
            raise ValueError("layers must hold at least one layer, got none")
        for i, layer in enumerate(layers):
            _require_width(f"layers[{i}]", layer, d_model)
        encoder_key, decoder_key, *keys = jax.random.split(key, len(layers) + 2)
        self.encoder, self.decoder = dense(d_in, d_model, key=encoder_key), dense(d_model, d_out, key=decoder_key)
        blocks = []
        for layer, block_key in zip(layers, keys, strict=True):
            made = None if norm is None else norm(d_model)
            if made is not None:
                _require_width(f"the norm that {getattr(norm, '__name__', norm)} makes", made, d_model)
            blocks.append(Block(d_model, layer=layer, norm=made, key=block_key))
        self.blocks = tuple(blocks)

    def __call__(self, inputs: Float[Array, "time input"]) -> Float[Array, "time output"]:
        """ŷ; (T, d_out)."""
        return self.propagate(inputs).outputs

    def propagate(self, inputs: Float[Array, "time input"]) -> Propagated:
        """The outputs, and the residual stream before the first block and after each.

        Raises `ValueError` unless `inputs` has the shape (T, d_in), T >= 1; `TypeError` unless it is real floating
        point.
        """
        stream = jax.vmap(self.encoder)(as_inputs(inputs, self.encoder.weight))
        streams = [stream]
        for block in self.blocks:
            streams.append(block(streams[-1]))
        return Propagated(jax.vmap(self.decoder)(streams[-1]), jnp.stack(streams))


def dense(d_in: int, d_out: int, *, key: PRNGKeyArray) -> eqx.nn.Linear:
    """Equinox's linear map with weights N(0, 1/d_in) and bias 0."""
    linear = eqx.nn.Linear(d_in, d_out, key=key)
    weights = scaled_normal(key, (d_out, d_in), 1 / d_in), jnp.zeros(d_out)
    return eqx.tree_at(lambda made: (made.weight, made.bias), linear, weights)


def _batch_mean(moment: Array) -> Array:
    try:
        return jax.lax.pmean(moment, "batch")
    except NameError:  # not under a vmap that names the batch
        return moment


def _require_width(name: str, layer: Any, width: int) -> None:
    if not callable(layer):
        raise TypeError(f"{name} must be a map of sequences, got {layer!r}")
    sequence = jax.ShapeDtypeStruct((3, width), jnp.zeros(()).dtype)
    try:
        returned = np.shape(eqx.filter_eval_shape(layer, sequence))
    except ValueError as error:
        raise ValueError(f"{name} must map (T, d_model) to (T, d_model) with d_model = {width}: {error}") from error
    if returned != (3, width):
        raise ValueError(
            f"{name} must keep the width d_model = {width}, got outputs of shape {returned} for inputs {sequence.shape}"
        )
