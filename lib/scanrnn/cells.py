r"""Nonlinear one-step maps, `cell(input, state) -> state`, the convention of Equinox's own recurrent cells.

    VanillaCell:  x' = J φ(x) + W s + b      (the state is the current, before the nonlinearity)
    ElmanCell:    h' = φ(J h + W s + b)      (the state is the activity, after it)

With h = φ(x) both describe the same network seen at two places, so they share their Lyapunov spectrum. Gated
cells are Equinox's `GRUCell` and `LSTMCell`; `chrono` sets the biases that give their memory a time scale.
"""

import abc
from collections.abc import Callable
from typing import Protocol, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ._checks import require_integer, require_values


class Initializer(Protocol):
    """What `jax.nn.initializers` makes: `init(key, shape) -> array`."""

    def __call__(self, key: PRNGKeyArray, shape: tuple[int, ...], /) -> Array: ...


def gaussian(gain: float = 1.0) -> Initializer:
    """Independent entries J_ij ~ N(0, gain²/N): spectral radius → gain as N → ∞ (the circular law)."""
    _require_gain(gain)
    return jax.nn.initializers.variance_scaling(gain**2, "fan_in", "normal")


def orthogonal(gain: float = 1.0) -> Initializer:
    """`gain` times an orthogonal matrix drawn uniformly (Haar): every singular value is `gain`."""
    _require_gain(gain)
    return jax.nn.initializers.orthogonal(gain)


def _require_gain(gain: float) -> None:
    require_values("gain", gain, "finite and not negative", lambda g: (g >= 0) & np.isfinite(g))


def tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""tanh, with its derivative as $4\,\sigma(2x)\,\sigma(-2x)$ instead of $1-\tanh^2x$.

    The latter cancels: in float32 it is exactly 0 beyond |x| = 8, and a Jacobian with such a row is singular. This
    form keeps its digits until it underflows (|x| = 43 in float32, 354 in float64).
    """
    return _tanh(x)


@jax.custom_jvp
def _tanh(x: Array) -> Array:
    return jnp.tanh(x)


@_tanh.defjvp
def _tanh_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (direction,) = primals, tangents
    return jnp.tanh(x), 4 * jax.nn.sigmoid(2 * x) * jax.nn.sigmoid(-2 * x) * direction


class _Recurrent(eqx.Module):
    """What both cells are made of; only the order of the operations differs."""

    recurrent_weight: Float[Array, "hidden hidden"]  # J
    input_weight: Float[Array, "hidden input"]  # W
    bias: Float[Array, " hidden"]  # b
    activation: Callable[[Array], Array] = eqx.field(static=True)  # φ

    def __init__(
        self,
        d_in: int,
        d_hidden: int,
        *,
        recurrent_init: Initializer | None = None,
        input_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        activation: Callable[[Array], Array] = tanh,
        key: PRNGKeyArray,
    ):
        require_integer("d_in", d_in, minimum=1)
        require_integer("d_hidden", d_hidden, minimum=1)
        recurrent_init = gaussian() if recurrent_init is None else recurrent_init
        input_init = jax.nn.initializers.normal(1.0) if input_init is None else input_init
        bias_init = jax.nn.initializers.zeros if bias_init is None else bias_init
        recurrent_key, input_key, bias_key = jax.random.split(key, 3)
        self.recurrent_weight = recurrent_init(recurrent_key, (d_hidden, d_hidden))
        self.input_weight = input_init(input_key, (d_hidden, d_in))
        self.bias = bias_init(bias_key, (d_hidden,))
        self.activation = activation

    @abc.abstractmethod
    def __call__(self, input: Float[Array, " input"], state: Float[Array, " hidden"]) -> Float[Array, " hidden"]:
        """One step."""


class VanillaCell(_Recurrent):
    r"""The vanilla recurrent network in its current form, $x_{t+1} = J\,\varphi(x_t) + W s_t + b$.

    This is the network of Engelken (2023). Its one-step Jacobian is $J\,\mathrm{diag}(\varphi'(x_t))$.

    By default J_ij ~ N(0, 1/N), W_ij ~ N(0, 1), b = 0 and φ = `tanh`; pass another initialiser
    (`gaussian(g)`, `orthogonal(g)`, or one of `jax.nn.initializers`) to change one of them.
    """

    __init__ = _Recurrent.__init__  # else type checkers make one up from the fields

    def __call__(self, input: Float[Array, " input"], state: Float[Array, " hidden"]) -> Float[Array, " hidden"]:
        return self.recurrent_weight @ self.activation(state) + self.input_weight @ input + self.bias


class ElmanCell(_Recurrent):
    r"""The vanilla recurrent network in its activity form, $h_{t+1} = \varphi(J h_t + W s_t + b)$ (Elman 1990).

    Its one-step Jacobian is $\mathrm{diag}(\varphi'(a_t))\,J$ with $a_t$ the argument of φ. Defaults: `VanillaCell`'s.
    """

    __init__ = _Recurrent.__init__  # else type checkers make one up from the fields

    def __call__(self, input: Float[Array, " input"], state: Float[Array, " hidden"]) -> Float[Array, " hidden"]:
        return self.activation(self.recurrent_weight @ state + self.input_weight @ input + self.bias)


GatedCell = TypeVar("GatedCell", eqx.nn.GRUCell, eqx.nn.LSTMCell)


def chrono(key: PRNGKeyArray, cell: GatedCell, min_time: float, max_time: float) -> GatedCell:
    r"""The same gated cell with the chrono initialisation of its biases (Tallec & Ollivier 2018).

    With $u \sim U[T_{\min}, T_{\max}]$ for each unit, the bias of the gate that keeps the state is $\log u$, so that,
    as long as the gates' other inputs are small, the unit forgets as $\sigma(\log u)^t = (1 + 1/u)^{-t}$, over about
    $1 + u$ steps. A GRU keeps with its update gate (whose complement lets the input in); an LSTM keeps with the forget
    gate, and its separate input gate gets $-\log u$. The other biases are set to zero.

    Raises `ValueError` unless 0 < min_time <= max_time < ∞, `TypeError` for another kind of cell or one without biases.
    """
    require_values("min_time", min_time, "positive and finite", lambda t: (t > 0) & np.isfinite(t))
    require_values(
        "max_time", max_time, f"finite and at least min_time = {min_time}", lambda t: (t >= min_time) & np.isfinite(t)
    )
    if not isinstance(cell, eqx.nn.GRUCell | eqx.nn.LSTMCell):
        raise TypeError(f"cell must be an equinox.nn.GRUCell or LSTMCell, got {type(cell).__name__}")
    if cell.bias is None:
        raise TypeError("cell must have biases, got one made with use_bias=False")
    size = cell.hidden_size
    log_times = jnp.log(jax.random.uniform(key, (size,), cell.bias.dtype, min_time, max_time))
    # Equinox's order: a GRU's reset, update, new; an LSTM's input, forget, cell, output.
    bias = jnp.zeros_like(cell.bias).at[size : 2 * size].set(log_times)
    if isinstance(cell, eqx.nn.GRUCell):
        return eqx.tree_at(lambda c: (c.bias, c.bias_n), cell, (bias, jnp.zeros_like(log_times)))
    return eqx.tree_at(lambda c: c.bias, cell, bias.at[:size].set(-log_times))
