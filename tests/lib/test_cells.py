"""Cells against their formulas, initialisers against their laws, chrono against the exponents it promises."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.nn import initializers

from scanrnn.cells import ElmanCell, VanillaCell, chrono, gaussian, orthogonal, tanh
from scanrnn.lyapunov import lyapunov_exponents
from scanrnn.recurrence import scan_cell

CELLS = [VanillaCell, ElmanCell]


def with_bias(cell, key=0, activation=jnp.tanh):
    """A cell of 6 units and 2 inputs in which every parameter matters."""
    return cell(2, 6, bias_init=initializers.normal(0.5), activation=activation, key=jr.key(key))


# --- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [jnp.tanh, jax.nn.relu, jnp.sin])
def test_one_step_is_the_documented_formula(activation):
    vanilla, elman = with_bias(VanillaCell, activation=activation), with_bias(ElmanCell, activation=activation)
    s, state = jr.normal(jr.key(1), (2,)), jr.normal(jr.key(2), (6,))
    J, W, b = (np.asarray(a) for a in (vanilla.recurrent_weight, vanilla.input_weight, vanilla.bias))
    phi = lambda x: np.asarray(activation(jnp.asarray(x)))  # noqa: E731
    np.testing.assert_allclose(vanilla(s, state), J @ phi(state) + W @ s + b, atol=1e-14)
    np.testing.assert_allclose(elman(s, state), phi(J @ np.asarray(state) + W @ s + b), atol=1e-14)


def test_one_step_jacobians_are_the_documented_formulas():
    vanilla, elman = with_bias(VanillaCell), with_bias(ElmanCell)
    s, state = jr.normal(jr.key(1), (2,)), jr.normal(jr.key(2), (6,))
    J = vanilla.recurrent_weight
    slope = lambda x: 1 / jnp.cosh(x) ** 2  # noqa: E731
    np.testing.assert_allclose(jax.jacrev(vanilla, 1)(s, state), J @ jnp.diag(slope(state)), atol=1e-14)
    argument = J @ state + elman.input_weight @ s + elman.bias
    np.testing.assert_allclose(jax.jacrev(elman, 1)(s, state), jnp.diag(slope(argument)) @ J, atol=1e-14)


def test_both_forms_describe_one_network():
    vanilla, elman = with_bias(VanillaCell), with_bias(ElmanCell)
    np.testing.assert_array_equal(vanilla.recurrent_weight, elman.recurrent_weight)  # same key, same draw
    start, inputs = jr.normal(jr.key(1), (6,)), jr.normal(jr.key(2), (30, 2))
    _, currents = scan_cell(vanilla, start, inputs)
    _, activities = scan_cell(elman, jnp.tanh(start), inputs)
    # Rounding differs in the order of the sums only, and 30 steps at gain 1 do not amplify it by more than 1e3.
    np.testing.assert_allclose(jnp.tanh(currents), activities, rtol=0, atol=1e-12)
    assert jnp.std(activities) > 0.3  # not both dead


# --- tanh -------------------------------------------------------------------------------------------------------------


def saturating(dtype) -> np.ndarray:
    """Arguments of both signs up to 40, where 1/cosh² is 7e-35."""
    return np.linspace(-40, 40, 1001).astype(dtype)


def exact_slope(x):
    """1/cosh² with eleven bits more than float64."""
    return 1 / np.cosh(x.astype(np.longdouble)) ** 2


PRECISIONS = pytest.mark.parametrize("dtype", ["float64", "float32"])


@PRECISIONS
def test_tanh_is_tanh(dtype):
    x = jnp.asarray(np.concatenate([saturating(dtype), np.array([np.inf, -np.inf, np.nan], dtype)]))
    np.testing.assert_array_equal(tanh(x), jnp.tanh(x))
    np.testing.assert_array_equal(jax.jit(tanh)(x), jax.jit(jnp.tanh)(x))
    assert tanh(x).dtype == dtype


@PRECISIONS
def test_the_derivative_of_tanh_keeps_its_digits_where_units_saturate(dtype):
    x = saturating(dtype)
    one_by_one = jax.vmap(jax.grad(tanh))(jnp.asarray(x))
    forward = jax.jit(lambda x: jax.jvp(tanh, (x,), (jnp.ones_like(x),))[1])(jnp.asarray(x))
    backward = jax.jit(lambda x: jax.vjp(tanh, x)[1](jnp.ones_like(x))[0])(jnp.asarray(x))
    for slope in (one_by_one, forward, backward):
        assert slope.dtype == dtype
        # two logistic functions of one or two roundings each, and their product
        np.testing.assert_allclose(np.asarray(slope, np.longdouble), exact_slope(x), rtol=6 * np.finfo(dtype).eps)
        assert (slope > 0).all()
    # where the usual form is nothing but rounding
    saturated = np.abs(x) > (20 if dtype == "float64" else 9)
    assert saturated.sum() > 400
    np.testing.assert_array_equal(jax.vmap(jax.grad(jnp.tanh))(jnp.asarray(x))[saturated], 0)
    np.testing.assert_array_equal(1 - jnp.tanh(x[saturated]) ** 2, 0)


def test_the_derivative_of_tanh_ends_where_it_underflows():
    slope = jax.grad(tanh)
    assert slope(jnp.float32(43)) > 0
    assert slope(jnp.float64(354)) > 0
    for x in (jnp.float32(44), jnp.float64(355), jnp.float64(jnp.inf), jnp.float32(-jnp.inf)):
        assert slope(x) == 0
        assert jax.grad(slope)(x) == 0


@pytest.mark.parametrize("compile", [jax.jit, lambda function: function], ids=["compiled", "eager"])
def test_the_second_derivative_of_tanh(compile):
    x = saturating("float64")
    second = compile(jax.vmap(jax.grad(jax.grad(tanh))))(jnp.asarray(x))
    want = -2 * np.tanh(x.astype(np.longdouble)) * exact_slope(x)
    # It is a difference of two terms, which cancel near zero; from |x| = 1 on one of them is small.
    far = np.abs(x) > 1
    np.testing.assert_allclose(np.asarray(second, np.longdouble)[far], want[far], rtol=10 * np.finfo(float).eps)
    np.testing.assert_allclose(second, want.astype(float), rtol=0, atol=4 * np.finfo(float).eps)
    other_way = compile(jax.vmap(jax.jacfwd(jax.jacrev(tanh))))(jnp.asarray(x))
    np.testing.assert_allclose(other_way, second, rtol=1e-14, atol=4 * np.finfo(float).eps)


@pytest.mark.parametrize("cell", CELLS)
def test_a_saturated_cell_has_a_jacobian_in_single_precision(cell):
    made = cell(1, 6, bias_init=initializers.constant(12.0), key=jr.key(0))
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), made)
    state = jnp.full(6, 12.0)
    jacobian = jax.jacrev(single, 1)(jnp.zeros(1, jnp.float32), state.astype(jnp.float32))
    want = jax.jacrev(made, 1)(jnp.zeros(1), state)
    # Elman's arguments are sums of eight terms, below 32 and rounded to 1e-6, and φ' ~ exp(-2 |x|) doubles that.
    assert (jacobian != 0).all()
    np.testing.assert_allclose(jacobian, want, rtol=2e-5)


# --- initialisers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [0.5, 1.0, 2.0])
def test_gaussian_has_the_variance_and_the_spectral_radius_of_its_gain(gain):
    n = 400
    matrix = gaussian(gain)(jr.key(0), (n, n))
    variance = gain**2 / n
    # n² independent normal entries: Var(mean) = variance / n², Var(sample variance) = 2 variance² / n².
    assert abs(jnp.mean(matrix)) < 4 * np.sqrt(variance) / n
    assert abs(jnp.var(matrix) - variance) < 4 * np.sqrt(2) * variance / n
    assert jnp.max(jnp.abs(matrix)) > 4 * np.sqrt(variance)  # not truncated: 10 of 160,000 lie beyond 4 sd
    # The radius exceeds the circular law's by about sqrt(log n / 4n), 6 % here, and fluctuates by 1 % (Rider 2003).
    radius = np.abs(np.linalg.eigvals(matrix)).max()
    assert abs(radius / gain - 1) < 0.1


@pytest.mark.parametrize("gain", [0.7, 1.0])
def test_orthogonal_has_all_singular_values_at_its_gain_and_both_signs_of_determinant(gain):
    matrices = jax.vmap(lambda key: orthogonal(gain)(key, (8, 8)))(jr.split(jr.key(0), 64))
    expected = np.broadcast_to(gain**2 * np.eye(8), matrices.shape)
    np.testing.assert_allclose(matrices @ jnp.swapaxes(matrices, 1, 2), expected, rtol=0, atol=1e-13)
    # Haar: entries have mean 0 and variance gain² / 8; of 64 determinants, 32 ± 4 are positive.
    assert abs(jnp.mean(matrices[:, 0, 0])) < 4 * gain / np.sqrt(8 * 64)
    assert abs(jnp.sum(jnp.linalg.det(matrices) > 0) - 32) < 4 * 4


@pytest.mark.parametrize("cell", CELLS)
def test_defaults(cell):
    made = cell(50, 200, key=jr.key(0))
    assert made.activation is tanh
    np.testing.assert_array_equal(made.bias, jnp.zeros(200))
    assert made.recurrent_weight.shape == (200, 200)
    assert made.input_weight.shape == (200, 50)
    assert abs(jnp.var(made.recurrent_weight) * 200 - 1) < 4 * np.sqrt(2 / 200**2)
    assert abs(jnp.var(made.input_weight) - 1) < 4 * np.sqrt(2 / (200 * 50))
    again, other = cell(50, 200, key=jr.key(0)), cell(50, 200, key=jr.key(1))
    assert eqx.tree_equal(made, again)
    assert not jnp.array_equal(made.recurrent_weight, other.recurrent_weight)


@pytest.mark.parametrize("cell", CELLS)
def test_initialisers_are_used_for_their_own_tensor(cell):
    constants = {"recurrent_init": 2.0, "input_init": 3.0, "bias_init": 4.0}
    made = cell(2, 3, key=jr.key(0), **{name: initializers.constant(value) for name, value in constants.items()})
    np.testing.assert_array_equal(made.recurrent_weight, jnp.full((3, 3), 2.0))
    np.testing.assert_array_equal(made.input_weight, jnp.full((3, 2), 3.0))
    np.testing.assert_array_equal(made.bias, jnp.full(3, 4.0))


@pytest.mark.parametrize("cell", CELLS)
def test_every_tensor_has_its_own_key(cell):
    normal = initializers.normal()
    made = cell(3, 3, recurrent_init=normal, input_init=normal, bias_init=normal, key=jr.key(0))
    draws = np.concatenate([made.recurrent_weight.ravel(), made.input_weight.ravel(), made.bias])
    assert len(np.unique(draws)) == 9 + 9 + 3


@pytest.mark.parametrize("cell", CELLS)
def test_bad_sizes_are_refused(cell):
    with pytest.raises(ValueError, match="d_hidden must be at least 1, got 0"):
        cell(1, 0, key=jr.key(0))
    with pytest.raises(ValueError, match="d_in must be at least 1, got -1"):
        cell(-1, 3, key=jr.key(0))
    with pytest.raises(TypeError, match=r"d_hidden must be an integer, got 3\.0 of type float"):
        cell(1, 3.0, key=jr.key(0))
    with pytest.raises(TypeError, match="d_in must be an integer, got True"):
        cell(True, 3, key=jr.key(0))


@pytest.mark.parametrize("init", [gaussian, orthogonal])
def test_bad_gains_are_refused(init):
    for gain in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"gain must be finite and not negative, got {gain}"):
            init(gain)
    np.testing.assert_array_equal(init(0.0)(jr.key(0), (3, 3)), jnp.zeros((3, 3)))


# --- chrono -----------------------------------------------------------------------------------------------------------


def gates(cell):
    """The biases, gate by gate: reset, update, new (GRU); input, forget, candidate, output (LSTM)."""
    return cell.bias.reshape(-1, cell.hidden_size)


def without_weights(cell):
    """The gated cell with zero weights: its gates are then constants, σ(bias)."""
    zeros = [jnp.zeros_like(cell.weight_ih), jnp.zeros_like(cell.weight_hh)]
    return eqx.tree_at(lambda c: [c.weight_ih, c.weight_hh], cell, zeros)


def test_chrono_changes_only_the_biases_of_a_gru():
    cell = eqx.nn.GRUCell(3, 40, key=jr.key(0))
    made = chrono(jr.key(1), cell, 2.0, 50.0)
    reset, update, new = gates(made)
    times = jnp.exp(update)
    assert times.min() >= 2.0 * (1 - 1e-12)
    assert times.max() <= 50.0 * (1 + 1e-12)
    assert abs(jnp.mean(times) - 26.0) < 4 * 48 / np.sqrt(12 * 40)  # uniform in time, not in its logarithm (mean 14.9)
    for zero in (reset, new, made.bias_n):
        np.testing.assert_array_equal(zero, jnp.zeros(40))
    assert eqx.tree_equal((made.weight_ih, made.weight_hh), (cell.weight_ih, cell.weight_hh))
    assert eqx.tree_equal(made, chrono(jr.key(1), cell, 2.0, 50.0))
    assert not eqx.tree_equal(made, chrono(jr.key(2), cell, 2.0, 50.0))


def test_chrono_changes_only_the_biases_of_an_lstm():
    cell = eqx.nn.LSTMCell(3, 40, key=jr.key(0))
    made = chrono(jr.key(1), cell, 2.0, 50.0)
    into, forget, candidate, output = gates(made)
    np.testing.assert_array_equal(into, -forget)
    for zero in (candidate, output):
        np.testing.assert_array_equal(zero, jnp.zeros(40))
    assert eqx.tree_equal((made.weight_ih, made.weight_hh), (cell.weight_ih, cell.weight_hh))
    # The same key gives both kinds of cell the same time scales.
    gru = chrono(jr.key(1), eqx.nn.GRUCell(3, 40, key=jr.key(0)), 2.0, 50.0)
    np.testing.assert_array_equal(forget, gates(gru)[1])


def test_equal_times_make_all_units_forget_alike():
    made = chrono(jr.key(1), eqx.nn.GRUCell(3, 4, key=jr.key(0)), 9, 9)
    np.testing.assert_allclose(jax.nn.sigmoid(gates(made)[1]), 0.9, rtol=1e-14)  # σ(log u) = u / (1 + u)


@pytest.mark.parametrize("kind", [eqx.nn.GRUCell, eqx.nn.LSTMCell])
def test_units_of_a_chrono_cell_forget_at_the_rate_of_their_bias(kind):
    n, lstm = 5, kind is eqx.nn.LSTMCell
    cell = without_weights(chrono(jr.key(1), kind(1, n, key=jr.key(0)), 2.0, 30.0))
    forgetting = jax.nn.sigmoid(gates(cell)[1])
    state, input = jr.normal(jr.key(2), (n,)), jnp.zeros(1)

    def step(memory):
        return cell(input, (state, memory))[1] if lstm else cell(input, memory)

    # The candidate is tanh(0) = 0, so what is kept is all there is: exact but for rounding.
    np.testing.assert_allclose(step(state), forgetting * state, rtol=1e-14)
    np.testing.assert_allclose(jax.jacfwd(step)(state), jnp.diag(forgetting), rtol=1e-14, atol=1e-16)

    # An LSTM's h is a function of its c, so that its other n exponents are -inf.
    start = (state, state) if lstm else state
    measured = lyapunov_exponents(cell, start, jnp.zeros((3100, 1)), n, transient=3000)
    expected = jnp.sort(jnp.log(forgetting))[::-1]
    assert jnp.min(-jnp.diff(expected)) > 0.01  # directions settle as exp(-gap × transient)
    np.testing.assert_allclose(measured, expected, rtol=0, atol=1e-11)


def test_chrono_refuses_what_it_cannot_initialise():
    gru = eqx.nn.GRUCell(1, 4, key=jr.key(0))
    for time in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"min_time must be positive and finite, got {time}"):
            chrono(jr.key(0), gru, time, 10.0)
    for time in (1.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"max_time must be finite and at least min_time = 2\.0, got {time}"):
            chrono(jr.key(0), gru, 2.0, time)
    with pytest.raises(TypeError, match=r"cell must be an equinox\.nn\.GRUCell or LSTMCell, got VanillaCell"):
        chrono(jr.key(0), VanillaCell(1, 4, key=jr.key(0)), 1.0, 10.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="cell must have biases, got one made with use_bias=False"):
        chrono(jr.key(0), eqx.nn.GRUCell(1, 4, use_bias=False, key=jr.key(0)), 1.0, 10.0)
    with pytest.raises(TypeError, match="cell must have biases, got one made with use_bias=False"):
        chrono(jr.key(0), eqx.nn.LSTMCell(1, 4, use_bias=False, key=jr.key(0)), 1.0, 10.0)
