r"""Gated layers: the coefficient of the recurrence is a gate, and what comes in is weighted by a gate too.

RG-LRU   h_t = a_t h_{t-1} + √(1 - a_t²) i_t u_t
minGRU   h_t = z_t h_{t-1} + (1 - z_t) n_t
GRU      the same, with gates and candidate that read h_{t-1} as well
LSTM     c_t = f_t c_{t-1} + i_t g_t
"""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import require_values
from ..cells import GatedCell, chrono
from ..recurrence import linear_recurrence, scan_cell
from ._base import Layer, as_inputs, inverse_softplus, require_range, require_sizes, scaled_normal


class RGLRU(Layer):
    r"""The real-gated linear recurrent unit of Griffin (De et al. 2024), between two linear maps.

    $$u_t=W_ux_t,\qquad r_t=\sigma(W_ru_t+b_r),\qquad i_t=\sigma(W_iu_t+b_i),\qquad
      a_t=\exp(-c\,\mathrm{softplus}(\Lambda)\odot r_t),\quad c=8,$$

    $$h_t=a_t\odot h_{t-1}+\sqrt{1-a_t^2}\odot i_t\odot u_t,\qquad y_t=Ch_t .$$

    In Griffin u is the layer's input; $W_u$ is here so that d_in need not be d_hidden.

    - Normaliser: $\sqrt{1-a_t^2}$, the LRU's, tied to the coefficient and different at each step.
    - Reparametrisation: $\log a=-c\,r\,\mathrm{softplus}(\Lambda)$, exponential in Λ where the memory is long.

    **Arguments:** the sizes; the coefficient of an open gate (r = 1), $\exp(-c\,\mathrm{softplus}(\Lambda))$, starts
    uniform in [`min_modulus`, `max_modulus`], Griffin's [0.9, 0.999] by default. Weights have variance 1 over their
    number of columns, biases start at 0 (so r = ½ for x = 0, and a is the square root of what was drawn).

    Raises `ValueError` for a size below 1 or unless 0 < min_modulus <= max_modulus < 1; `TypeError` for sizes that are
    not integers.
    """

    decay: Float[Array, " hidden"]  # Λ
    projection: Float[Array, "hidden input"]  # W_u
    gate_weight: Float[Array, "hidden hidden"]  # W_r
    gate_bias: Float[Array, " hidden"]  # b_r
    input_gate_weight: Float[Array, "hidden hidden"]  # W_i
    input_gate_bias: Float[Array, " hidden"]  # b_i
    output_weight: Float[Array, "output hidden"]  # C
    sharpness: ClassVar[float] = 8.0  # c

    def __init__(
        self,
        d_in: int,
        d_hidden: int,
        d_out: int,
        *,
        min_modulus: float = 0.9,
        max_modulus: float = 0.999,
        key: PRNGKeyArray,
    ):
        require_sizes(d_in=d_in, d_hidden=d_hidden, d_out=d_out)
        require_values("min_modulus", min_modulus, "above 0", lambda r: r > 0)
        allowed = f"at least min_modulus = {min_modulus} and below 1"
        require_values("max_modulus", max_modulus, allowed, lambda r: (r >= min_modulus) & (r < 1))
        decay_key, projection_key, gate_key, input_gate_key, output_key = jax.random.split(key, 5)
        modulus = jax.random.uniform(decay_key, (d_hidden,), minval=min_modulus, maxval=max_modulus)
        self.decay = inverse_softplus(-jnp.log(modulus) / self.sharpness)
        self.projection = scaled_normal(projection_key, (d_hidden, d_in), 1 / d_in)
        self.gate_weight = scaled_normal(gate_key, (d_hidden, d_hidden), 1 / d_hidden)
        self.gate_bias = jnp.zeros(d_hidden)
        self.input_gate_weight = scaled_normal(input_gate_key, (d_hidden, d_hidden), 1 / d_hidden)
        self.input_gate_bias = jnp.zeros(d_hidden)
        self.output_weight = scaled_normal(output_key, (d_out, d_hidden), 1 / d_hidden)

    def states(self, inputs: Float[Array, "time input"]) -> Float[Array, "time hidden"]:
        """h after each step; (T, d_hidden)."""
        u = as_inputs(inputs, self.projection) @ self.projection.T
        input_gate = jax.nn.sigmoid(u @ self.input_gate_weight.T + self.input_gate_bias[None])
        log_a = self._log_coefficients(u)
        # 1 - a² without cancellation; never 0, where the root's slope is infinite and the gradient would be NaN
        rest = jnp.maximum(-jnp.expm1(2 * log_a), jnp.finfo(log_a.dtype).tiny)
        return linear_recurrence(jnp.exp(log_a), jnp.sqrt(rest) * input_gate * u)

    def coefficients(self, inputs: Float[Array, "time input"]) -> Float[Array, "time hidden"]:
        """a_t; (T, d_hidden)."""
        return jnp.exp(self._log_coefficients(as_inputs(inputs, self.projection) @ self.projection.T))

    def __call__(self, inputs: Float[Array, "time input"]) -> Float[Array, "time output"]:
        """y; (T, d_out)."""
        return self.states(inputs) @ self.output_weight.T

    def _log_coefficients(self, u: Array) -> Array:
        gate = jax.nn.sigmoid(u @ self.gate_weight.T + self.gate_bias[None])
        return -self.sharpness * jax.nn.softplus(self.decay)[None] * gate


class MinGRU(Layer):
    r"""The minimal GRU (Feng et al. 2024), whose gate and candidate read the input only.

    $$z_t=\sigma(W_zx_t+b_z),\qquad n_t=W_nx_t+b_n,\qquad h_t=z_t\odot h_{t-1}+(1-z_t)\odot n_t,\qquad y_t=Ch_t+d$$

    The gate z *keeps* the state, as in Equinox's GRU; in the paper its complement is called z.

    - Normaliser: $1-z$, what constant input asks for; white input is weighted too little as z → 1.
    - Reparametrisation: $z=\sigma(b)$, $\mathrm dz/\mathrm db=z(1-z)$.

    **Arguments:** the sizes; `min_time` and `max_time`, both or none: the chrono initialisation with these time scales,
    $b_z=\log u$ with u ~ U[min_time, max_time], and $b_n=0$, as `scanrnn.cells.chrono`. All else is initialised as
    `eqx.nn.Linear` does.

    Raises `ValueError` for a size below 1, if only one of the times is given, or unless 0 < min_time <= max_time < ∞;
    `TypeError` for sizes that are not integers.
    """

    gate: eqx.nn.Linear  # W_z, b_z
    candidate: eqx.nn.Linear  # W_n, b_n
    readout: eqx.nn.Linear  # C, d

    def __init__(
        self,
        d_in: int,
        d_hidden: int,
        d_out: int,
        *,
        min_time: float | None = None,
        max_time: float | None = None,
        key: PRNGKeyArray,
    ):
        require_sizes(d_in=d_in, d_hidden=d_hidden, d_out=d_out)
        times = _times(min_time, max_time)
        gate_key, candidate_key, readout_key, time_key = jax.random.split(key, 4)
        self.gate = eqx.nn.Linear(d_in, d_hidden, key=gate_key)
        self.candidate = eqx.nn.Linear(d_in, d_hidden, key=candidate_key)
        self.readout = eqx.nn.Linear(d_hidden, d_out, key=readout_key)
        if times is not None:
            bias = jnp.log(jax.random.uniform(time_key, (d_hidden,), minval=times[0], maxval=times[1]))
            self.gate = eqx.tree_at(lambda linear: linear.bias, self.gate, bias)
            self.candidate = eqx.tree_at(lambda linear: linear.bias, self.candidate, jnp.zeros_like(bias))

    def states(self, inputs: Float[Array, "time input"]) -> Float[Array, "time hidden"]:
        """h after each step; (T, d_hidden)."""
        inputs = as_inputs(inputs, self.gate.weight)
        gate = jax.vmap(self.gate)(inputs)
        # 1 - σ(x) = σ(-x), without cancellation
        return linear_recurrence(jax.nn.sigmoid(gate), jax.nn.sigmoid(-gate) * jax.vmap(self.candidate)(inputs))

    def coefficients(self, inputs: Float[Array, "time input"]) -> Float[Array, "time hidden"]:
        """z_t; (T, d_hidden)."""
        return jax.nn.sigmoid(jax.vmap(self.gate)(as_inputs(inputs, self.gate.weight)))

    def __call__(self, inputs: Float[Array, "time input"]) -> Float[Array, "time output"]:
        """y; (T, d_out)."""
        return jax.vmap(self.readout)(self.states(inputs))


class GRU(Layer):
    r"""Equinox's `GRUCell` (Cho et al. 2014) over time, with a linear readout $y_t=Ch_t+d$.

    $$h_t=z_t\odot h_{t-1}+(1-z_t)\odot n_t,\qquad z_t=\sigma(W_zx_t+U_zh_{t-1}+b_z),\qquad
      n_t=\tanh(W_nx_t+r_t\odot(U_nh_{t-1}+b'_n)+b_n)$$

    and the reset gate $r_t$ like $z_t$. Normaliser and reparametrisation: as `MinGRU`, with z at a fixed value.

    **Arguments:** the sizes; `min_time` and `max_time`, both or none: the time scales of `scanrnn.cells.chrono`.
    Without them the cell is as Equinox makes it. Errors: as `MinGRU`.
    """

    cell: eqx.nn.GRUCell
    readout: eqx.nn.Linear  # C, d

    def __init__(
        self,
        d_in: int,
        d_hidden: int,
        d_out: int,
        *,
        min_time: float | None = None,
        max_time: float | None = None,
        key: PRNGKeyArray,
    ):
        require_sizes(d_in=d_in, d_hidden=d_hidden, d_out=d_out)
        cell_key, readout_key, time_key = jax.random.split(key, 3)
        cell = eqx.nn.GRUCell(d_in, d_hidden, key=cell_key)
        self.cell = _with_times(time_key, cell, min_time, max_time)
        self.readout = eqx.nn.Linear(d_hidden, d_out, key=readout_key)

    def states(self, inputs: Float[Array, "time input"]) -> Float[Array, "time hidden"]:
        """h after each step; (T, d_hidden)."""
        inputs = as_inputs(inputs, self.cell.weight_ih)
        return scan_cell(self.cell, jnp.zeros(self.cell.hidden_size, inputs.dtype), inputs)[1]

    def coefficients(self, inputs: Float[Array, "time input"]) -> Float[Array, "time hidden"]:
        """z_t; (T, d_hidden)."""
        return _second_gate(self.cell, as_inputs(inputs, self.cell.weight_ih), self.states(inputs))

    def __call__(self, inputs: Float[Array, "time input"]) -> Float[Array, "time output"]:
        """y; (T, d_out)."""
        return jax.vmap(self.readout)(self.states(inputs))


class LSTM(Layer):
    r"""Equinox's `LSTMCell` (Hochreiter & Schmidhuber 1997) over time, with a linear readout $y_t=Ch_t+d$.

    $$c_t=f_t\odot c_{t-1}+i_t\odot g_t,\qquad h_t=o_t\odot\tanh c_t,\qquad g_t=\tanh(W_gx_t+U_gh_{t-1}+b_g)$$

    and the gates $f_t,i_t,o_t$ are $\sigma(Wx_t+Uh_{t-1}+b)$, each with its own weights.

    - Normaliser: i, a gate of its own. Nothing ties it to 1 - f but the chrono initialisation, $b_i=-b_f$.
    - Reparametrisation: $f=\sigma(b)$, $\mathrm df/\mathrm db=f(1-f)$.

    **Arguments** and errors: as `GRU`.
    """

    cell: eqx.nn.LSTMCell
    readout: eqx.nn.Linear  # C, d

    def __init__(
        self,
        d_in: int,
        d_hidden: int,
        d_out: int,
        *,
        min_time: float | None = None,
        max_time: float | None = None,
        key: PRNGKeyArray,
    ):
        require_sizes(d_in=d_in, d_hidden=d_hidden, d_out=d_out)
        cell_key, readout_key, time_key = jax.random.split(key, 3)
        cell = eqx.nn.LSTMCell(d_in, d_hidden, key=cell_key)
        self.cell = _with_times(time_key, cell, min_time, max_time)
        self.readout = eqx.nn.Linear(d_hidden, d_out, key=readout_key)

    def states(self, inputs: Float[Array, "time input"]) -> Float[Array, "time hidden"]:
        """The cell state c after each step; (T, d_hidden)."""
        return self._scan(inputs)[1]

    def coefficients(self, inputs: Float[Array, "time input"]) -> Float[Array, "time hidden"]:
        """f_t; (T, d_hidden)."""
        return _second_gate(self.cell, as_inputs(inputs, self.cell.weight_ih), self._scan(inputs)[0])

    def __call__(self, inputs: Float[Array, "time input"]) -> Float[Array, "time output"]:
        """y, which reads h; (T, d_out)."""
        return jax.vmap(self.readout)(self._scan(inputs)[0])

    def _scan(self, inputs: Array) -> tuple[Array, Array]:
        inputs = as_inputs(inputs, self.cell.weight_ih)
        zero = jnp.zeros(self.cell.hidden_size, inputs.dtype)
        return scan_cell(self.cell, (zero, zero), inputs)[1]


def _second_gate(cell: eqx.nn.GRUCell | eqx.nn.LSTMCell, inputs: Array, read: Array) -> Array:
    """σ(Wx_t + Uh_{t-1} + b) of Equinox's second gate, which keeps the state: a GRU's update, an LSTM's forget gate."""
    rows = slice(cell.hidden_size, 2 * cell.hidden_size)
    before = jnp.concatenate([jnp.zeros_like(read[:1]), read[:-1]])
    argument = inputs @ cell.weight_ih[rows].T + before @ cell.weight_hh[rows].T
    return jax.nn.sigmoid(argument if cell.bias is None else argument + cell.bias[None, rows])


def _times(min_time: float | None, max_time: float | None) -> tuple[float, float] | None:
    if min_time is None and max_time is None:
        return None
    if min_time is None or max_time is None:
        raise ValueError(f"min_time and max_time must be given both or none, got {min_time} and {max_time}")
    require_range("min_time", min_time, "max_time", max_time)
    return min_time, max_time


def _with_times(key: PRNGKeyArray, cell: GatedCell, min_time: float | None, max_time: float | None) -> GatedCell:
    times = _times(min_time, max_time)
    return cell if times is None else chrono(key, cell, *times)
