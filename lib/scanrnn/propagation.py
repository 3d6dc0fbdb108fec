r"""Signals through deep recurrent networks: what goes forward and what comes back, against the memory of the layers.

    forward    E |s^l|²                                  the residual stream after block l
    backward   E |∂L/∂θ|²  over the entries of θ         for each group of parameters of block l
    loss       L = ½ E |ŷ_t - x_{t-1}|²                   as in the released experiment of Zucchet & Orvieto (2024)

`make(...)` builds one of the stacks below with all its layers at the memory t; `measure` passes a batch of sequences
through it and back. The stacks differ in the recurrent layer only:

    complex_rnn, lru        |λ| in the ring [1 - 1/t, 1 - 1/(2t)]
    gru, lstm               chrono initialisation with time scales U[t, 2t], the paper's kernels, the state as output
    s4d, s5, selective_ssm  e^{-Δ} with 1/Δ between t and 2t, Re A = -1
    rg_lru                  a = e^{-1/t} to e^{-1/(2t)} where the gate is half open
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ._checks import require_integer, require_rank, require_values
from .deep import Norm, ResidualStack
from .eigenvalues import Cartesian, ring
from .layers import GRU, LRU, LSTM, RGLRU, S4D, S5, DiagonalRNN, SelectiveSSM
from .layers._base import Layer, scaled_normal
from .sensitivity import GroupMean, mean_squares


class MakeLayer(Protocol):
    """A square layer with a memory of about t steps."""

    def __call__(self, width: int, memory: float, *, key: PRNGKeyArray) -> Layer: ...


# Layers with a memory --------------------------------------------------------------------------------------------


def complex_rnn(width: int, memory: float, *, max_phase: float = np.pi, key: PRNGKeyArray) -> DiagonalRNN:
    """The complex diagonal network, λ = a + ib and no normaliser."""
    eigenvalues_key, weights_key = jax.random.split(key)
    lam = ring(eigenvalues_key, width, **_ring(memory), max_phase=max_phase)
    return DiagonalRNN(width, width, width, eigenvalues=Cartesian.from_eigenvalues(lam), key=weights_key)


def lru(width: int, memory: float, *, max_phase: float = np.pi, key: PRNGKeyArray) -> LRU:
    """The linear recurrent unit."""
    return LRU(width, width, width, **_ring(memory), max_phase=max_phase, key=key)


def gru(width: int, memory: float, *, key: PRNGKeyArray) -> GRU:
    """The gated recurrent unit, its state as output."""
    return _gated(GRU, width, memory, key)


def lstm(width: int, memory: float, *, key: PRNGKeyArray) -> LSTM:
    """The long short-term memory, h = o tanh c as output."""
    return _gated(LSTM, width, memory, key)


def s4d(width: int, memory: float, *, states: int = 4, key: PRNGKeyArray) -> S4D:
    """S4D with `states` states for each feature."""
    return S4D(width, states, width, **_steps(memory), decay=1.0, key=key)


def s5(width: int, memory: float, *, key: PRNGKeyArray) -> S5:
    """S5; it holds one of each conjugate pair."""
    return S5(width, width, width, **_steps(memory), decay=1.0, key=key)


def selective_ssm(width: int, memory: float, *, states: int = 4, key: PRNGKeyArray) -> SelectiveSSM:
    """The selective state-space layer with `states` states for each feature, the slowest of which has the memory t."""
    return SelectiveSSM(width, states, width, **_steps(memory), decay=1.0, key=key)


def rg_lru(width: int, memory: float, *, key: PRNGKeyArray) -> RGLRU:
    """Griffin's recurrent unit."""
    ends: Any = jnp.exp(-2 / memory), jnp.exp(-1 / memory)  # with the gate open; half open, the roots
    return RGLRU(width, width, width, min_modulus=ends[0], max_modulus=ends[1], key=key)


def make(
    layer: MakeLayer,
    memory: float,
    *,
    d_in: int,
    width: int = 256,
    depth: int = 4,
    norm: Callable[[int], Norm] | None = None,
    key: PRNGKeyArray,
) -> ResidualStack:
    """A stack of `depth` layers, all with a memory of `memory` steps, from d_in features back to d_in.

    Raises `ValueError` unless memory >= 1 and the sizes are at least 1; else as `ResidualStack`.
    """
    require_values("memory", memory, "at least 1 and finite", lambda t: (t >= 1) & np.isfinite(t))
    require_integer("width", width, minimum=1)
    require_integer("depth", depth, minimum=1)
    stack_key, *keys = jax.random.split(key, depth + 1)
    layers = [layer(width, memory, key=k) for k in keys]
    return ResidualStack(d_in, width, d_in, layers=layers, norm=norm, key=stack_key)


# Measurements ----------------------------------------------------------------------------------------------------


class Propagation(NamedTuple):
    """What `measure` returns.

    - `loss`: L
    - `forward`: E|s^l|² for l = 0 ... depth; (depth + 1,)
    - `gradients`: for each block, the mean squared gradient of its groups of parameters
    - `ends`: the same of the encoder and the decoder
    - `memory`: the effective memory of each recurrent layer; (depth,)
    """

    loss: Float[Array, ""]
    forward: Float[Array, " streams"]
    gradients: tuple[dict[str, GroupMean], ...]
    ends: dict[str, GroupMean]
    memory: Float[Array, " depth"]

    def per_layer(self, *groups: str) -> Float[Array, " depth"]:
        """The mean square over all entries of these groups, in each block; (depth,). `ValueError` if it has none."""
        return jnp.stack([_pooled([block], groups) for block in self.gradients])

    def pooled(self, *groups: str) -> Float[Array, ""]:
        """The mean square over all entries of these groups in the whole network. `ValueError` if it has none."""
        return _pooled([*self.gradients, self.ends], groups)


def measure(stack: ResidualStack, sequences: Float[Array, "batch time input"]) -> Propagation:
    r"""One batch of sequences forward, and the gradient of the batch's mean loss back.

    The groups of a block are `modulus` and `phase` (of λ, where each has parameters of its own), `eigenvalues` (where
    λ = a + ib), `recurrent`, all other parameters of the recurrent layer, and `feedforward`, those of the gated linear
    unit and the norm. `group` says which array is where.

    Compiled once for each kind of stack and each shape: other memories, seeds and inputs come for free.

    Raises `ValueError` unless `sequences` has three axes and T >= 3, and, naming the array, where a gradient is not
    finite.
    """
    require_rank("sequences", sequences, 3)
    if sequences.shape[1] < 3:
        raise ValueError(f"sequences must have at least 3 steps, got shape {sequences.shape}")
    loss, forward, gradient, memory = _measure(stack, sequences)
    blocks = tuple(mean_squares(block, group) for block in gradient.blocks)
    ends = mean_squares(eqx.tree_at(lambda g: g.blocks, gradient, ()), lambda name: name.partition(".")[0])
    return Propagation(loss, forward, blocks, ends, memory)


def reconstruction_loss(stack: ResidualStack, sequences: Float[Array, "batch time input"]) -> Float[Array, ""]:
    r"""$\tfrac12\,\mathrm{mean}\,(\hat y_t-x_{t-1})^2$ over batch, time t >= 1 and features.

    As the released code, which compares $\hat y_{1:}$ with $x_{:-1}$. "Next token" would be $\hat y_{:-1}$ with
    $x_{1:}$, two places further: the target is a token that the network has already seen.
    """
    outputs = jax.vmap(stack, axis_name="batch")(sequences)
    return _error(outputs, sequences)


def effective_memory(layer: Layer, inputs: Float[Array, "time input"]) -> Float[Array, ""]:
    r"""The median over the units of $-1/\langle\log|a_t|\rangle$, with $a_t$ the layer's `coefficients`; in steps.

    The typical rate at which a unit forgets while its gates do what they do on these inputs. For a linear layer
    $-1/\log|\lambda|\approx1/(1-|\lambda|)$.
    """
    rates = -jnp.mean(jnp.log(jnp.abs(layer.coefficients(inputs))), axis=0)
    return jnp.median(1 / rates)


def group(name: str) -> str:
    """The group of the array `name` of a block ("layer.parametrization.omega_nu" → "modulus")."""
    inside, _, rest = name.partition(".")
    return "feedforward" if inside != "layer" else _GROUPS.get(rest, "recurrent")


_GROUPS = {
    "parametrization.real": "eigenvalues",
    "parametrization.imag": "eigenvalues",
    "parametrization.omega_nu": "modulus",
    "parametrization.omega_theta": "phase",
    "log_decay": "modulus",
    "log_step": "modulus",
    "step_bias": "modulus",
    "frequency": "phase",
    "decay": "modulus",
}


def _pooled(parts: list[dict[str, GroupMean]], groups: tuple[str, ...]) -> Array:
    chosen = [part[name] for part in parts for name in groups if name in part]
    if not chosen:
        raise ValueError(f"groups must be among {sorted({name for part in parts for name in part})}, got {groups}")
    total = jnp.sum(jnp.stack([part.mean_square * part.size for part in chosen]))
    return total / sum(part.size for part in chosen)


@eqx.filter_jit
def _measure(stack: ResidualStack, sequences: Array) -> tuple[Array, Array, Any, Array]:
    def loss(stack: ResidualStack) -> tuple[Array, Array]:
        outputs, streams = jax.vmap(stack.propagate, axis_name="batch")(sequences)
        return _error(outputs, sequences), jnp.mean(streams**2, axis=(0, 2, 3))

    (value, forward), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(stack)
    few = sequences[:4]  # enough for a median over units
    streams = jax.vmap(stack.propagate, axis_name="batch")(few).streams

    def memory(block: Any, stream: Array) -> Array:
        each = jax.vmap(lambda s: effective_memory(block.layer, block.layer_inputs(s)), axis_name="batch")
        return jnp.mean(each(stream))

    memories = [memory(block, streams[:, i]) for i, block in enumerate(stack.blocks)]
    return value, forward, gradient, jnp.stack(memories)


def _error(outputs: Array, sequences: Array) -> Array:
    return 0.5 * jnp.mean((outputs[:, 1:] - sequences[:, :-1]) ** 2)


def _ring(memory: float) -> dict[str, float]:
    return {"min_modulus": 1 - 1 / memory, "max_modulus": 1 - 1 / (2 * memory)}


def _steps(memory: float) -> dict[str, float]:
    return {"min_step": 1 / (2 * memory), "max_step": 1 / memory}


def _gated(kind: Any, width: int, memory: float, key: PRNGKeyArray) -> Any:
    """Input kernels N(0, 2/d), recurrent kernels orthogonal gate by gate, no readout; as the paper's."""
    layer_key, input_key, recurrent_key = jax.random.split(key, 3)
    made = kind(width, width, width, min_time=memory, max_time=2 * memory, key=layer_key)
    rows = made.cell.weight_hh.shape[0]
    orthogonal = jax.nn.initializers.orthogonal()
    recurrent = [orthogonal(k, (width, width)) for k in jax.random.split(recurrent_key, rows // width)]
    return eqx.tree_at(
        lambda m: (m.cell.weight_ih, m.cell.weight_hh, m.readout),
        made,
        (scaled_normal(input_key, (rows, width), 2 / width), jnp.concatenate(recurrent), eqx.nn.Identity()),
    )
