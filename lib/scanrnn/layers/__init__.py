r"""Sequence layers, (T, d_in) → (T, d_out), un-batched: how each of them keeps a memory.

Near a fixed value of its gates every one is h_t = λ h_{t-1} + γ · (input), and they differ in how γ falls as λ → 1 and
in what λ is a function of:

    LinearRNN      A real, dense or in blocks          h_t = A h_{t-1} + B x_t,       y_t = C h_t + D x_t
    DiagonalRNN    λ(ω) any,  γ(λ) any or 1            h_t = λ h_{t-1} + γ B x_t,      y_t = Re(C h_t) + D x_t
    LRU            λ = exp(-e^ω_ν + i e^ω_θ)           γ = e^ω_γ, from √(1 - |λ|²)
    S4D, S5        λ = e^{ΔA},  A = -e^a + iω          γ = (λ - 1)/A ≈ Δ
    SelectiveSSM   λ_t = exp(-Δ_t e^a)                 γ_t = Δ_t = softplus(w·x_t + b)
    RGLRU          a_t = exp(-c softplus(Λ) r_t)       γ_t = √(1 - a_t²)
    MinGRU, GRU    z_t = σ(... + b)                    γ_t = 1 - z_t
    LSTM           f_t = σ(... + b)                    γ_t = i_t, a gate of its own

Calling a layer gives its outputs, `states(inputs)` the recurrent state after each step, `coefficients(inputs)` what
each unit's state is multiplied by at each step (λ, a_t, z_t, f_t). The linear layers (LinearRNN, DiagonalRNN, LRU, S4D,
S5) also have `eigenvalues()` and `impulse_response(length)`. The initial state is zero, all parameters are real, and
inputs are cast to their precision.

Both calls raise `ValueError` unless `inputs` has the shape (T, d_in) with T >= 1, and `TypeError` unless it is real
floating point. Its values are not looked at: NaN in gives NaN out.
"""

from ._diagonal import LRU, DiagonalRNN
from ._gated import GRU, LSTM, RGLRU, MinGRU
from ._linear import LinearRNN
from ._state_space import S4D, S5, SelectiveSSM

# in the order of the table above, which the library's page follows
__all__ = ["LinearRNN", "DiagonalRNN", "LRU", "S4D", "S5", "SelectiveSSM", "RGLRU", "MinGRU", "GRU", "LSTM"]  # noqa: RUF022
