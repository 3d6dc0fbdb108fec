"""Each layer against a plain loop over time in NumPy, the exact solution it samples, and the moments it promises."""

from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import mpmath
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from scanrnn import theory
from scanrnn.eigenvalues import Cartesian, Optimal, Polar, normalizer, ring
from scanrnn.layers import GRU, LRU, LSTM, RGLRU, S4D, S5, DiagonalRNN, MinGRU, SelectiveSSM
from scanrnn.sensitivity import estimate, unit_sensitivity
from scanrnn.tasks import autoregressive

D_IN, N, D_OUT, T = 3, 4, 2, 9
SIZES = (D_IN, N, D_OUT)
EIGENVALUES = ring(jr.key(9), N, min_modulus=0.5, max_modulus=0.9)
INPUTS = np.random.default_rng(0).normal(size=(T, D_IN))

MAKERS = {
    "diagonal": lambda key: DiagonalRNN(*SIZES, eigenvalues=Cartesian.from_eigenvalues(EIGENVALUES), key=key),
    "diagonal, tied": lambda key: DiagonalRNN(
        *SIZES, eigenvalues=Optimal.from_eigenvalues(EIGENVALUES), normalization=normalizer, key=key
    ),
    "lru": lambda key: LRU(*SIZES, min_modulus=0.5, max_modulus=0.9, key=key),
    "s4d": lambda key: S4D(*SIZES, key=key),
    "s5": lambda key: S5(*SIZES, key=key),
    "selective": lambda key: SelectiveSSM(*SIZES, key=key),
    "rglru": lambda key: RGLRU(*SIZES, key=key),
    "mingru": lambda key: MinGRU(*SIZES, key=key),
    "gru": lambda key: GRU(*SIZES, key=key),
    "lstm": lambda key: LSTM(*SIZES, key=key),
}
LINEAR = ["diagonal", "diagonal, tied", "lru", "s4d", "s5"]
EVERY = pytest.mark.parametrize("kind", MAKERS)
EVERY_CLASS = pytest.mark.parametrize("kind", [kind for kind in MAKERS if "," not in kind])

# Sums of at most 20 products in each of 9 steps that do not amplify, of sizes below 10: 9 · 20 · 10 · eps = 4e-13.
ROUNDING = 1e-12


@cache
def layer_of(kind) -> Any:
    """The layer with arbitrary parameters, so that none is zero and each of them matters."""
    random = np.random.default_rng(1)
    shapes = eqx.filter_eval_shape(MAKERS[kind], jr.key(0))  # nothing is computed or compiled
    fill = lambda leaf: jnp.asarray(0.3 * random.normal(size=leaf.shape))  # noqa: E731
    return jax.tree.map(lambda leaf: fill(leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf, shapes)


@eqx.filter_jit
def run(layer, inputs):
    return layer.states(inputs), layer(inputs)


@eqx.filter_jit
def loss_and_gradient(layer, inputs):
    return eqx.filter_value_and_grad(lambda layer: jnp.sum(jnp.sin(layer(inputs))))(layer)


def close(got, want, atol: Any = ROUNDING):
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


# --- the equations, step by step --------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def array(layer, name):
    return np.asarray(getattr(layer, name))


def complex_array(layer, name):
    return array(layer, f"{name}_real") + 1j * array(layer, f"{name}_imag")


def diagonal_loop(layer, inputs, lam, gamma):
    B, C, D = complex_array(layer, "input"), complex_array(layer, "output"), array(layer, "feedthrough")
    h, states, outputs = np.zeros(N, complex), [], []
    for x in inputs:
        h = lam * h + gamma * (B @ x)
        states.append(h)
        outputs.append((C @ h).real + D @ x)
    return states, outputs


def cartesian_loop(layer, inputs):
    lam = array(layer.parametrization, "real") + 1j * array(layer.parametrization, "imag")
    return diagonal_loop(layer, inputs, lam, 1.0)


def optimal_loop(layer, inputs):
    nu = np.tanh(array(layer.parametrization, "omega_nu"))
    theta = array(layer.parametrization, "omega_theta") * (1 - nu**2) / (nu * np.sqrt(1 + nu**2))
    return diagonal_loop(layer, inputs, nu * np.exp(1j * theta), np.sqrt(1 - nu**2))


def lru_loop(layer, inputs):
    omega_nu, omega_theta = array(layer.parametrization, "omega_nu"), array(layer.parametrization, "omega_theta")
    lam = np.exp(-np.exp(omega_nu) + 1j * np.exp(omega_theta))
    return diagonal_loop(layer, inputs, lam, np.exp(array(layer.normalization, "omega_gamma")))


def poles(layer):
    return -np.exp(array(layer, "log_decay")) + 1j * array(layer, "frequency")


def held(A, B, step):
    """e^{ΔA} and ∫_0^Δ e^{sA} B ds for a diagonal A, from the exponential of one larger matrix: no division by A."""
    n, d = B.shape
    augmented = np.zeros((n + d, n + d), complex)
    augmented[:n, :n], augmented[:n, n:] = np.diag(A), B
    exponential = scipy.linalg.expm(step * augmented)
    return exponential[:n, :n], exponential[:n, n:]


def s4d_loop(layer, inputs):
    A, B, C = poles(layer), complex_array(layer, "input"), complex_array(layer, "output")
    step, D = np.exp(array(layer, "log_step")), array(layer, "feedthrough")
    sampled = [held(A[f], B[f, :, None], step[f]) for f in range(D_IN)]
    h, states, outputs = np.zeros((D_IN, N), complex), [], []
    for x in inputs:
        h = np.stack([sampled[f][0] @ h[f] + sampled[f][1][:, 0] * x[f] for f in range(D_IN)])
        features = np.array([2 * (C[f] @ h[f]).real + D[f] * x[f] for f in range(D_IN)])
        states.append(h.ravel())
        outputs.append(array(layer, "mixing") @ features)
    return states, outputs


def s5_loop(layer, inputs):
    A, B, C, D = (
        poles(layer),
        complex_array(layer, "input"),
        complex_array(layer, "output"),
        array(layer, "feedthrough"),
    )
    step = np.exp(array(layer, "log_step"))
    sampled = [held(A[[i]], B[[i]], step[i]) for i in range(N)]
    h, states, outputs = np.zeros(N, complex), [], []
    for x in inputs:
        h = np.array([(sampled[i][0] @ h[[i]] + sampled[i][1] @ x)[0] for i in range(N)])
        states.append(h)
        outputs.append(2 * (C @ h).real + D @ x)
    return states, outputs


def selective_loop(layer, inputs):
    p = {name: array(layer, name) for name in vars(layer)}
    h, states, outputs = np.zeros((D_IN, N)), [], []
    for x in inputs:
        step = softplus(p["step_weight"] @ x + p["step_bias"])
        B, C = p["input_weight"] @ x + p["input_bias"], p["output_weight"] @ x + p["output_bias"]
        for f in range(D_IN):
            for j in range(N):
                h[f, j] = np.exp(-step[f] * np.exp(p["log_decay"][f, j])) * h[f, j] + step[f] * B[j] * x[f]
        states.append(h.flatten())
        outputs.append(p["mixing"] @ (h @ C + p["feedthrough"] * x))
    return states, outputs


def rglru_loop(layer, inputs):
    p = {name: array(layer, name) for name in vars(layer)}
    h, states, outputs = np.zeros(N), [], []
    for x in inputs:
        u = p["projection"] @ x
        r = sigmoid(p["gate_weight"] @ u + p["gate_bias"])
        i = sigmoid(p["input_gate_weight"] @ u + p["input_gate_bias"])
        a = np.exp(-8 * softplus(p["decay"]) * r)
        h = a * h + np.sqrt(1 - a**2) * i * u
        states.append(h)
        outputs.append(p["output_weight"] @ h)
    return states, outputs


def affine(linear, x):
    return array(linear, "weight") @ x + array(linear, "bias")


def mingru_loop(layer, inputs):
    h, states, outputs = np.zeros(N), [], []
    for x in inputs:
        z = sigmoid(affine(layer.gate, x))
        h = z * h + (1 - z) * affine(layer.candidate, x)
        states.append(h)
        outputs.append(affine(layer.readout, h))
    return states, outputs


def gru_loop(layer, inputs):
    cell = layer.cell  # Equinox's order: reset, update, new
    Wr, Wz, Wn = np.split(array(cell, "weight_ih"), 3)
    Ur, Uz, Un = np.split(array(cell, "weight_hh"), 3)
    br, bz, bn = np.split(array(cell, "bias"), 3)
    h, states, outputs = np.zeros(N), [], []
    for x in inputs:
        r, z = sigmoid(Wr @ x + Ur @ h + br), sigmoid(Wz @ x + Uz @ h + bz)
        n = np.tanh(Wn @ x + bn + r * (Un @ h + array(cell, "bias_n")))
        h = z * h + (1 - z) * n
        states.append(h)
        outputs.append(affine(layer.readout, h))
    return states, outputs


def lstm_loop(layer, inputs):
    cell = layer.cell  # Equinox's order: input, forget, candidate, output
    W, U, b = array(cell, "weight_ih"), array(cell, "weight_hh"), array(cell, "bias")
    h, c, states, outputs = np.zeros(N), np.zeros(N), [], []
    for x in inputs:
        i, f, g, o = np.split(W @ x + U @ h + b, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        states.append(c)
        outputs.append(affine(layer.readout, h))
    return states, outputs


LOOPS = {
    "diagonal": cartesian_loop,
    "diagonal, tied": optimal_loop,
    "lru": lru_loop,
    "s4d": s4d_loop,
    "s5": s5_loop,
    "selective": selective_loop,
    "rglru": rglru_loop,
    "mingru": mingru_loop,
    "gru": gru_loop,
    "lstm": lstm_loop,
}


@EVERY
def test_is_the_documented_recurrence(kind):
    layer = layer_of(kind)
    for got, want in zip(run(layer, INPUTS), LOOPS[kind](layer, INPUTS), strict=True):
        close(got, want)
    assert run(layer, INPUTS)[1].dtype == float


def test_conjugate_pairs_are_a_real_network():
    # λ, λ̄ with b, b̄ and c, c̄: twice the real part of one of them, whose two coordinates turn and shrink.
    lam = np.array([0.9 * np.exp(0.3j), 0.5 * np.exp(2j)])
    both = jnp.concatenate([lam, lam.conj()])
    layer = DiagonalRNN(D_IN, 4, D_OUT, eigenvalues=Cartesian.from_eigenvalues(both), key=jr.key(0))
    B, C = complex_array(layer, "input")[:2], complex_array(layer, "output")[:, :2]
    layer = eqx.tree_at(
        lambda layer: (layer.input_real, layer.input_imag, layer.output_real, layer.output_imag),
        layer,
        (np.tile(B.real, (2, 1)), np.vstack([B.imag, -B.imag]), np.tile(C.real, 2), np.hstack([C.imag, -C.imag])),
    )
    turn: Any = scipy.linalg.block_diag(*[[[z.real, -z.imag], [z.imag, z.real]] for z in lam])
    into = np.stack([B.real, B.imag], 1).reshape(4, D_IN)
    out = 2 * np.stack([C.real, -C.imag], 2).reshape(D_OUT, 4)
    h, outputs = np.zeros(4), []
    for x in INPUTS:
        h = turn @ h + into @ x
        outputs.append(out @ h + array(layer, "feedthrough") @ x)
    states, measured = run(layer, INPUTS)
    close(measured, outputs)
    close(states[:, 2:], states[:, :2].conj())


@pytest.mark.parametrize("kind", LINEAR)
def test_a_linear_layer_is_the_convolution_with_its_impulse_response(kind):
    layer = layer_of(kind)
    kernel = np.asarray(eqx.filter_jit(lambda layer: layer.impulse_response(T))(layer))
    assert kernel.shape == (T, D_OUT, D_IN)
    convolved = [sum(kernel[k] @ INPUTS[t - k] for k in range(t + 1)) for t in range(T)]
    close(run(layer, INPUTS)[1], convolved)
    # The eigenvalues are those of the states: without input each state is multiplied by its own.
    impulse = np.zeros((T, D_IN))
    impulse[0] = INPUTS[0]
    states = np.asarray(run(layer, impulse)[0])
    close(states[1:], np.asarray(layer.eigenvalues()) * states[:-1])
    assert np.abs(states[2]).max() > 1e-2


@pytest.mark.parametrize("kind", LINEAR)
def test_coefficients_of_a_linear_layer_are_its_eigenvalues(kind):
    layer = layer_of(kind)
    coefficients = np.asarray(layer.coefficients(INPUTS))
    assert coefficients.shape == (T, layer.eigenvalues().size)
    np.testing.assert_array_equal(coefficients, np.tile(layer.eigenvalues(), (T, 1)))


def rest_of(layer, x):
    """What a step adds to the state multiplied by its coefficient, for a layer whose gates read the input x only."""
    p = {name: array(layer, name) for name in vars(layer)} if not isinstance(layer, MinGRU) else {}
    if isinstance(layer, SelectiveSSM):
        step = softplus(p["step_weight"] @ x + p["step_bias"])
        return np.outer(step * x, p["input_weight"] @ x + p["input_bias"]).ravel()
    if isinstance(layer, RGLRU):
        u = p["projection"] @ x
        log_a = -8 * softplus(p["decay"]) * sigmoid(p["gate_weight"] @ u + p["gate_bias"])
        return np.sqrt(-np.expm1(2 * log_a)) * sigmoid(p["input_gate_weight"] @ u + p["input_gate_bias"]) * u
    return sigmoid(-affine(layer.gate, x)) * affine(layer.candidate, x)


@pytest.mark.parametrize("kind", ["selective", "rglru", "mingru"])
def test_coefficients_multiply_the_state_before(kind):
    layer = layer_of(kind)
    states = np.asarray(run(layer, INPUTS)[0])
    coefficients = np.asarray(layer.coefficients(INPUTS))
    assert coefficients.shape == states.shape
    before = np.vstack([np.zeros_like(states[:1]), states[:-1]])
    close(states, coefficients * before + np.stack([rest_of(layer, x) for x in INPUTS]))
    assert np.abs(before[1:]).max(axis=0).min() > 1e-3  # so that each coefficient counts
    assert np.ptp(coefficients, axis=0).min() > 1e-3  # and moves


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_coefficients_of_gated_cells_are_the_gate_that_keeps(kind):
    layer, cell = layer_of(kind), layer_of(kind).cell
    gates = 3 if kind == "gru" else 4  # Equinox's orders: reset, update, new; input, forget, candidate, output
    W, U, b = (np.split(array(cell, name), gates)[1] for name in ("weight_ih", "weight_hh", "bias"))
    h, c, want = np.zeros(N), np.zeros(N), []
    for x in INPUTS:
        want.append(sigmoid(W @ x + U @ h + b))
        if kind == "gru":
            h = np.asarray(cell(x, jnp.asarray(h)))
        else:
            h, c = map(np.asarray, cell(x, (jnp.asarray(h), jnp.asarray(c))))
    close(layer.coefficients(INPUTS), want)
    assert np.ptp(want, axis=0).min() > 1e-3


@EVERY_CLASS
def test_coefficients_of_single_inputs_have_the_precision_of_the_parameters(kind):
    layer = layer_of(kind)
    coefficients = jax.eval_shape(layer.coefficients, INPUTS.astype(np.float32))
    assert coefficients.shape == jax.eval_shape(layer.states, INPUTS).shape
    assert coefficients.dtype in (jnp.float64, jnp.complex128)


@cache
def sampled_layer(kind):
    return kind(1, 2, 1, key=jr.key(0))


@settings(max_examples=50, deadline=None)
@given(st.floats(-12, 1), st.floats(-12, 1), st.floats(-4, 4), st.sampled_from([S4D, S5]))
def test_a_held_input_sampled_twice_as_often_passes_through_the_same_states(log_step, log_decay, frequency, kind):
    def states(log_step, inputs):
        fields = lambda layer: (layer.log_step, layer.log_decay, layer.frequency)  # noqa: E731
        old, new = fields(sampled_layer(kind)), (log_step, log_decay, frequency)
        values = [np.full(a.shape, b) for a, b in zip(old, new, strict=True)]
        return np.asarray(run(eqx.tree_at(fields, sampled_layer(kind), values), inputs)[0])

    coarse = states(log_step, INPUTS[:4, :1])
    fine = states(log_step - np.log(2), np.repeat(INPUTS[:4, :1], 2, axis=0))
    # 8 steps, each a few roundings of numbers as large as the states; of the phase, up to e · 4 radians, as many
    close(fine[1::2], coarse, 200 * np.finfo(float).eps * np.abs(coarse).max())


# --- as a function ----------------------------------------------------------------------------------------------------


@EVERY
def test_parameters_are_real_and_their_gradients_are_the_slopes_of_the_loss(kind):
    layer = layer_of(kind)
    parameters = eqx.filter(layer, eqx.is_inexact_array)
    gradient = loss_and_gradient(layer, INPUTS)[1]
    leaves, slopes = jax.tree.leaves(parameters), jax.tree.leaves(gradient)
    assert len(leaves) == len(slopes)
    for leaf in leaves + slopes:
        assert leaf.dtype == float
        assert np.isfinite(leaf).all()
    assert all((np.asarray(slope) != 0).all() for slope in slopes)  # all parameters matter

    random = np.random.default_rng(3)
    direction = jax.tree.map(lambda a: random.normal(size=a.shape), parameters)

    def loss(x):
        moved = eqx.apply_updates(layer, jax.tree.map(lambda d: x * d, direction))
        return float(loss_and_gradient(moved, INPUTS)[0])

    slope = sum(np.sum(d * np.asarray(g)) for d, g in zip(jax.tree.leaves(direction), slopes, strict=True))
    # A central difference of order 4 errs by h⁴/30 times the fifth derivative, here below 1e8, plus eps/h: 1e-10.
    h = 1e-4
    np.testing.assert_allclose((8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h), slope, rtol=1e-8)


@EVERY_CLASS
def test_vmap_over_inputs_and_over_layers(kind):
    batch = np.stack([INPUTS, -INPUTS, INPUTS[::-1]])
    outputs = eqx.filter_jit(lambda layer, batch: jax.vmap(layer)(batch))(layer_of(kind), batch)
    close(outputs, np.stack([run(layer_of(kind), x)[1] for x in batch]))
    # an ensemble made and run inside vmap: no value may be looked at
    ensemble = eqx.filter_vmap(lambda key, x: MAKERS[kind](key)(x))
    assert eqx.filter_eval_shape(ensemble, jr.split(jr.key(0), 3), batch).shape == (3, T, D_OUT)


@EVERY_CLASS
def test_the_future_does_not_reach_the_past(kind):
    layer = layer_of(kind)
    changed = INPUTS.copy()
    changed[5:] += 1
    before, after = run(layer, INPUTS), run(layer, changed)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one[:5], other[:5])
        assert (np.asarray(one[5:]) != np.asarray(other[5:])).all()
    changed[5:] = np.nan
    assert np.isnan(run(layer, changed)[1]).any(axis=1).tolist() == [False] * 5 + [True] * 4


@EVERY_CLASS
def test_inputs_take_the_precision_of_the_parameters(kind):
    layer = layer_of(kind)
    single = jax.tree.map(lambda a: a.astype(jnp.float32) if eqx.is_inexact_array(a) else a, layer)
    for made, other, expected in ((single, INPUTS, jnp.float32), (layer, INPUTS.astype(np.float32), jnp.float64)):
        assert all(a.dtype == expected for a in jax.eval_shape(lambda x, f=made: (f.states(x).real, f(x)), other))


# --- long memory ------------------------------------------------------------------------------------------------------


def constant_gates(layer):
    """The gated layer with weights that do not read the input, where a gate would."""
    names = {
        SelectiveSSM: ("step_weight", "input_weight", "output_weight"),
        RGLRU: ("gate_weight", "input_gate_weight"),
        MinGRU: (),
    }[type(layer)]
    if isinstance(layer, MinGRU):
        return eqx.tree_at(lambda f: f.gate.weight, layer, jnp.zeros_like(layer.gate.weight))
    layer = eqx.tree_at(lambda f: [getattr(f, n) for n in names], layer, replace_fn=jnp.zeros_like)
    if isinstance(layer, SelectiveSSM):
        layer = eqx.tree_at(lambda f: (f.input_bias, f.output_bias), layer, replace_fn=jnp.ones_like)
    return layer


def exact(function, *arguments):
    """In 50 digits."""
    with mpmath.workdps(50):
        return float(function(*map(mpmath.mpf, arguments)))


@pytest.mark.parametrize("bias", [-30.0, -5.0, 0.0, 30.0])
def test_what_the_first_step_lets_in_keeps_all_its_digits(bias):
    # 1 - λ down to 1e-13: subtracted from λ it would keep three digits.
    x = np.ones((1, 1))
    rtol = 20 * np.finfo(float).eps

    selective = constant_gates(SelectiveSSM(1, 1, 1, key=jr.key(0)))
    selective = eqx.tree_at(lambda f: f.step_bias, selective, jnp.array([bias]))
    step = exact(lambda b: mpmath.log1p(mpmath.exp(b)), bias)
    np.testing.assert_allclose(run(selective, x)[0][0, 0], step, rtol=rtol)

    rglru = constant_gates(RGLRU(1, 1, 1, key=jr.key(0)))
    rglru = eqx.tree_at(lambda f: f.decay, rglru, jnp.array([bias]))
    root = exact(lambda b: mpmath.sqrt(-mpmath.expm1(-8 * mpmath.log1p(mpmath.exp(b)))), bias)  # r = ½
    np.testing.assert_allclose(run(rglru, x)[0][0, 0], root * rglru.projection[0, 0] / 2, rtol=rtol)

    mingru = constant_gates(MinGRU(1, 1, 1, min_time=1.0, max_time=1.0, key=jr.key(0)))
    mingru = eqx.tree_at(lambda f: f.gate.bias, mingru, jnp.array([-bias]))
    closed = exact(lambda b: 1 / (1 + mpmath.exp(-b)), bias)
    np.testing.assert_allclose(run(mingru, x)[0][0, 0], closed * mingru.candidate.weight[0, 0], rtol=rtol)


@pytest.mark.parametrize("kind", [S4D, S5])
@pytest.mark.parametrize("rate", [1e-12, 1e-6, 1.0])
@pytest.mark.parametrize("slow", ["step", "decay"])
def test_a_held_constant_input_fills_the_state_at_its_rate(kind, rate, slow):
    options = {"min_step": rate, "max_step": rate, "decay": 1.0} if slow == "step" else {"decay": rate}
    options = {"min_step": 1.0, "max_step": 1.0, **options}
    layer = kind(1, 1, 1, **options, key=jr.key(0))
    states = np.asarray(run(layer, np.ones((5, 1)))[0][:, 0])
    B = complex_array(layer, "input")[0, 0]
    decay = options["decay"]
    expected = -np.expm1(-rate * np.arange(1, 6)) / decay * B  # ∫_0^{tΔ} e^{-s·decay} B ds
    np.testing.assert_allclose(states, expected, rtol=1e-14)
    # the factor by which the input comes in: ∝ 1 - λ with a small step, Δ itself with a small decay
    np.testing.assert_allclose(states[0] / B, rate if slow == "step" else 1.0, rtol=rate)


def with_field(layer, name, value):
    return eqx.tree_at(lambda f: getattr(f, name), layer, replace_fn=lambda old: jnp.full_like(old, value))


CLOSE = 1 - 1e-12
EXTREMES = {
    "lru": lambda key: LRU(*SIZES, min_modulus=CLOSE, max_modulus=CLOSE, key=key),
    "s4d": lambda key: S4D(*SIZES, min_step=1e-12, max_step=1e-12, key=key),
    "s4d, undamped": lambda key: with_field(S4D(*SIZES, key=key), "log_decay", -800.0),
    "s5": lambda key: S5(*SIZES, min_step=1e-12, max_step=1e-12, key=key),
    "s5, forgets all": lambda key: with_field(S5(*SIZES, key=key), "log_step", 100.0),
    "selective": lambda key: SelectiveSSM(*SIZES, min_step=1e-12, max_step=1e-12, key=key),
    "selective, forgets all": lambda key: with_field(SelectiveSSM(*SIZES, key=key), "step_bias", 800.0),
    "selective, never forgets": lambda key: with_field(SelectiveSSM(*SIZES, key=key), "step_bias", -800.0),
    "rglru": lambda key: RGLRU(*SIZES, min_modulus=CLOSE, max_modulus=CLOSE, key=key),
    "rglru, forgets all": lambda key: with_field(RGLRU(*SIZES, key=key), "decay", 800.0),
    "rglru, never forgets": lambda key: with_field(RGLRU(*SIZES, key=key), "decay", -800.0),
    "mingru": lambda key: MinGRU(*SIZES, min_time=1e12, max_time=1e12, key=key),
    "gru": lambda key: GRU(*SIZES, min_time=1e12, max_time=1e12, key=key),
    "lstm": lambda key: LSTM(*SIZES, min_time=1e12, max_time=1e12, key=key),
}


@pytest.mark.parametrize("kind", EXTREMES)
def test_outputs_and_gradients_stay_finite_at_the_ends_of_the_parameters(kind):
    results = loss_and_gradient(EXTREMES[kind](jr.key(0)), INPUTS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))


# --- moments ----------------------------------------------------------------------------------------------------------


def law_of(kind) -> Any:
    """A layer whose gates are constant, its λ (states,) and the rows w of h_t = λ h_{t-1} + w x_t (states, d_in)."""
    key = jr.key(5)
    if kind == "lru":
        layer = LRU(*SIZES, min_modulus=0.5, max_modulus=0.93, key=key)
        lam = np.asarray(layer.eigenvalues())
        return layer, lam, np.sqrt(1 - np.abs(lam) ** 2)[:, None] * complex_array(layer, "input")
    if kind == "s4d":
        layer = S4D(*SIZES, min_step=0.2, max_step=1.0, key=key)
        A, step = poles(layer), np.exp(array(layer, "log_step"))
        lam = np.exp(A * step[:, None])
        weight = (lam - 1) / A
        return layer, lam.ravel(), scipy.linalg.block_diag(*weight[:, :, None])
    if kind == "s5":
        layer = S5(*SIZES, min_step=0.2, max_step=1.0, key=key)
        A = poles(layer)
        lam = np.exp(A * np.exp(array(layer, "log_step")))
        return layer, lam, ((lam - 1) / A)[:, None] * complex_array(layer, "input")
    if kind == "selective":
        layer = constant_gates(SelectiveSSM(*SIZES, min_step=0.1, max_step=0.5, key=key))
        step = softplus(array(layer, "step_bias"))
        lam = np.exp(-step[:, None] * np.arange(1, 5))  # e^a = 1, 2, 3, 4
        return layer, lam.ravel(), scipy.linalg.block_diag(*np.broadcast_to(step[:, None, None], (D_IN, N, 1)))
    if kind == "rglru":
        layer = constant_gates(RGLRU(*SIZES, min_modulus=0.5, max_modulus=0.86, key=key))
        lam = np.exp(-8 * softplus(array(layer, "decay")) / 2)
        return layer, lam, np.sqrt(1 - lam**2)[:, None] / 2 * array(layer, "projection")
    layer = constant_gates(MinGRU(*SIZES, min_time=1.0, max_time=13.0, key=key))
    lam = sigmoid(array(layer.gate, "bias"))
    return layer, lam, (1 - lam)[:, None] * array(layer.candidate, "weight")


@eqx.filter_jit
def last_squares(layer, keys, rho):
    """Mean and standard error of |h_T|², T = 200."""
    sample = lambda key: jnp.abs(layer.states(autoregressive(key, 200, rho, (D_IN,)))[-1]) ** 2  # noqa: E731
    return estimate(jax.vmap(sample)(keys))


@pytest.mark.parametrize("kind", ["lru", "s4d", "s5", "selective", "rglru", "mingru"])
@pytest.mark.parametrize("rho", [np.array(0.0), np.array(0.9)])
def test_the_stationary_variance_is_the_theory_s(kind, rho):
    layer, lam, rows = law_of(kind)
    assert np.abs(lam).max() < 0.94  # 0.94^(2 · 200) = 2e-11: stationary
    mean, standard_error = last_squares(layer, jr.split(jr.key(6), 1000), rho)
    expected = np.sum(np.abs(rows) ** 2, axis=1) * theory.state_variance(lam, rho)
    assert jnp.all(jnp.abs(mean - expected) < 4 * standard_error)
    assert jnp.all(standard_error < 0.1 * expected)


def test_sensitivity_to_a_gate_that_is_tied_to_its_normaliser():
    # h_t = z h_{t-1} + (1 - z) x_t, z = σ(b) = 0.9, ρ = 0.9: the tied law, 0.113; with 1 - z held it would be 0.304.
    z, rho, samples = 0.9, 0.9, 3000
    bias = jnp.log(jnp.array([z / (1 - z)]))
    layer = constant_gates(MinGRU(1, 1, 1, min_time=1.0, max_time=1.0, key=jr.key(0)))
    layer = eqx.tree_at(lambda f: f.candidate.weight, layer, jnp.ones((1, 1)))

    def squared(key):
        inputs = autoregressive(key, 100, rho, (1,))  # 0.9^100 = 3e-5 to the start
        states = lambda b: eqx.tree_at(lambda f: f.gate.bias, layer, b).states(inputs)  # noqa: E731
        return unit_sensitivity(states, bias)[1][-1, 0] ** 2

    mean, standard_error = estimate(jax.jit(jax.vmap(squared))(jr.split(jr.key(0), samples)))
    law = lambda b: (jax.nn.sigmoid(b), jax.nn.sigmoid(-b))  # noqa: E731
    expected = theory.reparametrized_sensitivity(law, bias[0], rho)
    np.testing.assert_allclose(expected, 0.1131, atol=5e-5)
    assert abs(mean - expected) < 4 * standard_error
    assert standard_error < 0.05 * expected


# --- how they start ---------------------------------------------------------------------------------------------------

LARGE = (40, 300, 30)


def assert_normal(layer, **variances):
    """Each field has mean 0 and its variance, within 4 standard errors for independent normal entries."""
    for name, variance in variances.items():
        draws = array(layer, name)
        assert abs(draws.mean()) < 4 * np.sqrt(variance / draws.size), name
        assert abs(draws.var() / variance - 1) < 4 * np.sqrt(2 / draws.size), name


def assert_uniform(draws, low, high):
    """Within [low, high], and of the mean of a uniform variable within 4 standard errors."""
    assert low - 1e-12 <= draws.min() < draws.max() <= high + 1e-12
    assert abs(draws.mean() - (low + high) / 2) < 4 * (high - low) / np.sqrt(12 * draws.size)


def test_the_paper_s_networks_have_the_paper_s_numbers_of_parameters():
    def count(make):
        return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter_eval_shape(make, jr.key(0))))

    polar = Polar(jnp.full(64, 0.9), jnp.ones(64))
    assert count(lambda key: DiagonalRNN(1, 64, 1, eigenvalues=polar, key=key)) == 385
    assert count(lambda key: LRU(1, 64, 1, min_modulus=0.9, max_modulus=1, key=key)) == 449


def large(constructor, **options) -> Any:
    return constructor(*LARGE, **options, key=jr.key(0))


def test_the_lru_starts_on_the_ring():
    layer = large(LRU, min_modulus=0.8, max_modulus=0.9, max_phase=0.3)
    lam = np.asarray(layer.eigenvalues())
    assert_uniform(np.abs(lam) ** 2, 0.8**2, 0.9**2)  # in area
    assert_uniform(np.angle(lam), -0.3, 0.3)
    close(layer.normalization.omega_gamma, np.log(1 - np.abs(lam) ** 2) / 2)
    parts = {"input_real": 1 / 300, "input_imag": 1 / 300, "output_real": 1 / 30, "output_imag": 1 / 30}
    assert_normal(layer, **parts, feedthrough=1 / 30)


def test_state_space_layers_start_as_they_say():
    options = {"min_step": 1e-3, "max_step": 1e-1, "decay": 0.25}
    s4d, s5, selective = (large(kind, **options) for kind in (S4D, S5, SelectiveSSM))
    for layer in (s4d, s5):
        shape = layer.frequency.shape
        close(poles(layer), np.broadcast_to(-0.25 + 1j * np.pi * np.arange(300), shape))
        step = np.exp(array(layer, "log_step"))
        step = step[:, None] if layer is s4d else step
        # rounding of phases up to 300 π · 0.1
        close(layer.eigenvalues(), np.exp(step * poles(layer)).ravel())
    np.testing.assert_array_equal(complex_array(s4d, "input"), np.ones((40, 300)))
    assert_normal(s4d, output_real=1 / 2, output_imag=1 / 2, feedthrough=1, mixing=1 / 40)
    assert_normal(s5, input_real=1 / 80, input_imag=1 / 80, output_real=1 / 600, output_imag=1 / 600)
    assert_normal(s5, feedthrough=1 / 40)
    assert_normal(selective, step_weight=1 / 40, input_weight=1 / 40, output_weight=1 / 40)
    assert_normal(selective, feedthrough=1, mixing=1 / 40)
    close(np.exp(selective.log_decay), np.broadcast_to(0.25 * np.arange(1, 301), (40, 300)), 1e-12)
    for log_step in (array(s4d, "log_step"), array(s5, "log_step"), np.log(softplus(array(selective, "step_bias")))):
        assert_uniform(log_step, np.log(1e-3), np.log(1e-1))


def test_the_rglru_starts_as_it_says():
    layer = large(RGLRU, min_modulus=0.4, max_modulus=0.9)
    assert_uniform(np.exp(-8 * softplus(array(layer, "decay"))), 0.4, 0.9)
    assert_normal(layer, projection=1 / 40, gate_weight=1 / 300, input_gate_weight=1 / 300, output_weight=1 / 300)
    np.testing.assert_array_equal(array(layer, "gate_bias"), np.zeros(300))
    np.testing.assert_array_equal(array(layer, "input_gate_bias"), np.zeros(300))


@pytest.mark.parametrize("step", [1e-12, 1e-3, 1.0, 1e3])
def test_a_step_or_a_modulus_asked_for_is_what_the_softplus_gives(step):
    relative = 20 * np.finfo(float).eps * max(1, abs(np.log(step)))  # the step is the exponential of its logarithm
    selective = SelectiveSSM(*SIZES, min_step=step, max_step=step, key=jr.key(0))
    np.testing.assert_allclose(jax.nn.softplus(selective.step_bias), step, rtol=relative)
    modulus = 1 / (1 + step)
    rglru = RGLRU(*SIZES, min_modulus=modulus, max_modulus=modulus, key=jr.key(0))
    # the modulus is rounded, so that 1 minus it is known to eps
    got = -np.expm1(-8 * np.asarray(jax.nn.softplus(rglru.decay)))
    np.testing.assert_allclose(got, step / (1 + step), rtol=1e-14, atol=4 * np.finfo(float).eps)


@pytest.mark.parametrize("kind", [MinGRU, GRU, LSTM])
def test_times_set_the_bias_of_the_gate_that_keeps(kind):
    plain, chrono = kind(*SIZES, key=jr.key(0)), kind(*SIZES, min_time=5.0, max_time=50.0, key=jr.key(0))
    assert eqx.tree_equal(chrono.readout, plain.readout)
    cell = lambda layer: layer.gate if kind is MinGRU else layer.cell  # noqa: E731
    biases = array(cell(chrono), "bias")
    times = np.exp(biases if kind is MinGRU else biases[N : 2 * N])
    assert np.all((times >= 5 * (1 - 1e-12)) & (times <= 50 * (1 + 1e-12)))
    assert np.ptp(times) > 10
    for changed, unchanged in (
        [("bias", "weight")] if kind is MinGRU else [("bias", "weight_ih"), ("bias", "weight_hh")]
    ):
        assert not eqx.tree_equal(getattr(cell(chrono), changed), getattr(cell(plain), changed))
        assert eqx.tree_equal(getattr(cell(chrono), unchanged), getattr(cell(plain), unchanged))


def test_the_mingru_s_times_are_uniform():
    layer = MinGRU(3, 300, 2, min_time=5, max_time=50, key=jr.key(0))
    assert_uniform(np.exp(array(layer.gate, "bias")), 5, 50)
    np.testing.assert_array_equal(array(layer.candidate, "bias"), np.zeros(300))


@EVERY_CLASS
def test_the_key_decides_and_every_tensor_has_its_own(kind):
    layer, again, other = (MAKERS[kind](jr.key(seed)) for seed in (0, 0, 1))
    assert eqx.tree_equal(layer, again)
    first, second = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(eqx.filter(f, eqx.is_inexact_array))])
        for f in (layer, other)
    )
    drawn = first[first != second]
    assert len(np.unique(drawn)) == len(drawn) > 20


# --- bad input --------------------------------------------------------------------------------------------------------


@EVERY_CLASS
def test_inputs_that_do_not_fit_are_refused(kind):
    layer = layer_of(kind)
    cases = [
        (np.ones(3), ValueError, r"inputs must have 2 axes, got shape \(3,\)"),
        (np.ones((2, T, 3)), ValueError, r"inputs must have 2 axes, got shape \(2, 9, 3\)"),
        (np.ones((T, 4)), ValueError, r"inputs must have shape \(T, d_in\) with d_in = 3, got \(9, 4\)"),
        (np.ones((0, 3)), ValueError, "inputs must have at least one time step"),
        (np.ones((T, 3), int), TypeError, "inputs must be floating point .* got int64"),
        (np.ones((T, 3), complex), TypeError, "inputs must be real, got complex128"),
    ]
    for call in (layer, layer.states, layer.coefficients, eqx.filter_jit(layer)):
        for inputs, error, message in cases:
            with pytest.raises(error, match=message):
                call(inputs)


@EVERY_CLASS
def test_sizes_that_are_not_positive_integers_are_refused(kind):
    constructor = type(layer_of(kind))
    options = {DiagonalRNN: {"eigenvalues": Cartesian.from_eigenvalues(EIGENVALUES)}}
    options = {**options, LRU: {"min_modulus": 0.5, "max_modulus": 0.9}}.get(constructor, {})
    for i, name in enumerate(("d_in", "d_hidden", "d_out")):
        for size, error, message in ((0, ValueError, "at least 1, got 0"), (2.0, TypeError, r"an integer, got 2\.0")):
            sizes: list[Any] = list(SIZES)
            sizes[i] = size
            with pytest.raises(error, match=f"{name} must be {message}"):
                constructor(*sizes, **options, key=jr.key(0))


def diagonal(**options) -> Any:
    options = {"eigenvalues": Cartesian.from_eigenvalues(EIGENVALUES), **options}
    return DiagonalRNN(*SIZES, **options, key=jr.key(0))


def test_eigenvalues_and_normalisers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"eigenvalues must return the shape \(d_hidden,\) = \(4,\), got \(3,\)"):
        diagonal(eigenvalues=Cartesian.from_eigenvalues(EIGENVALUES[:3]))
    with pytest.raises(TypeError, match=r"eigenvalues must be a module of scanrnn\.eigenvalues, got ndarray"):
        diagonal(eigenvalues=np.asarray(EIGENVALUES))
    with pytest.raises(TypeError, match=r"what eigenvalues returns must be floating point .* got int64"):
        diagonal(eigenvalues=lambda: jnp.zeros(4, int))
    for shape in ((), (1,), (4, 3)):
        with pytest.raises(ValueError, match=r"normalization must return one γ for each λ, shape \(4,\), got \("):
            diagonal(normalization=lambda lam, shape=shape: jnp.ones(shape))
    with pytest.raises(TypeError, match=r"what normalization returns must be floating point .* got int64"):
        diagonal(normalization=lambda lam: jnp.ones(4, int))
    with pytest.raises(TypeError, match="normalization must be a function of λ or None, got float"):
        diagonal(normalization=1.0)
    # one that is put there later is refused when used
    layer = eqx.tree_at(lambda f: f.normalization, diagonal(normalization=normalizer), lambda lam: jnp.ones(2))
    with pytest.raises(ValueError, match="normalization must return one γ for each λ"):
        layer(INPUTS)


def test_real_eigenvalues_are_welcome():
    layer = diagonal(eigenvalues=lambda: jnp.array([0.5, -0.5, 0.0, 0.9]))
    np.testing.assert_array_equal(layer.eigenvalues(), np.array([0.5, -0.5, 0.0, 0.9], complex))
    close(run(layer, INPUTS)[1], diagonal_loop(layer, INPUTS, np.array([0.5, -0.5, 0.0, 0.9]), 1.0)[1])


@pytest.mark.parametrize(
    ("constructor", "options", "message"),
    [
        (LRU, {"min_modulus": 0.9, "max_modulus": 0.8}, "min_modulus must be between 0 and max_modulus = 0.8, got 0.9"),
        (LRU, {"min_modulus": -0.1, "max_modulus": 0.8}, "min_modulus must be between 0"),
        (LRU, {"min_modulus": 0.5, "max_modulus": 1.1}, "max_modulus must be positive and at most 1, got 1.1"),
        (LRU, {"min_modulus": 0.0, "max_modulus": 0.0}, "max_modulus must be positive and at most 1, got 0.0"),
        (LRU, {"min_modulus": 0.5, "max_modulus": 0.9, "max_phase": 0.0}, "max_phase must be positive and at most π"),
        (LRU, {"min_modulus": 0.5, "max_modulus": 0.9, "max_phase": 4.0}, "max_phase must be positive and at most π"),
        *[
            (kind, options, message)
            for kind in (S4D, S5, SelectiveSSM)
            for options, message in [
                ({"min_step": 0.2, "max_step": 0.1}, "max_step must be finite and at least min_step = 0.2, got 0.1"),
                ({"min_step": 0.0}, "min_step must be positive and finite, got 0.0"),
                ({"max_step": np.inf}, "max_step must be finite and at least min_step = 0.001, got inf"),
                ({"max_step": np.nan}, "max_step must be finite and at least min_step = 0.001, got nan"),
                ({"decay": 0.0}, "decay must be positive and finite, got 0.0"),
                ({"decay": -1.0}, "decay must be positive and finite, got -1.0"),
            ]
        ],
        (RGLRU, {"min_modulus": 0.0}, "min_modulus must be above 0, got 0.0"),
        (RGLRU, {"max_modulus": 1.0}, "max_modulus must be at least min_modulus = 0.9 and below 1, got 1.0"),
        (RGLRU, {"max_modulus": 0.8}, "max_modulus must be at least min_modulus = 0.9 and below 1, got 0.8"),
        *[
            (kind, options, message)
            for kind in (MinGRU, GRU, LSTM)
            for options, message in [
                ({"min_time": 2.0}, "min_time and max_time must be given both or none, got 2.0 and None"),
                ({"max_time": 2.0}, "min_time and max_time must be given both or none, got None and 2.0"),
                ({"min_time": 2.0, "max_time": 1.0}, "max_time must be finite and at least min_time = 2.0, got 1.0"),
                ({"min_time": 0.0, "max_time": 1.0}, "min_time must be positive and finite, got 0.0"),
            ]
        ],
    ],
)
def test_options_out_of_range_are_refused(constructor, options, message):
    with pytest.raises(ValueError, match=message):
        constructor(*SIZES, **options, key=jr.key(0))


def test_lengths_that_are_not_positive_integers_are_refused():
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        layer_of("s5").impulse_response(0)
    with pytest.raises(TypeError, match=r"length must be an integer, got 3\.0"):
        layer_of("s5").impulse_response(3.0)
