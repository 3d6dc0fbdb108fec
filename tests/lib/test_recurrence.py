"""The linear recurrence: sequential ≡ associative ≡ dense matrix, in values and derivatives; and cells over time."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.core import Tracer

from scanrnn.recurrence import check_cell, linear_recurrence, scan_cell

METHODS = ("sequential", "associative")
HIDDEN = 3


def dense(xp, coefficients, inputs, initial_state, *, reverse=False):
    """The states as one matrix product: h_t is the sum over s <= t of (a_t ... a_{s+1}) b_s, where b_{-1} is h_{-1}."""
    if reverse:
        coefficients = coefficients if coefficients.ndim == 1 else xp.flip(coefficients, 0)
        return xp.flip(dense(xp, coefficients, xp.flip(inputs, 0), initial_state), 0)
    length = len(inputs)
    t, s, k = np.ogrid[:length, -1:length, :length]
    factor = ((s < k) & (k <= t))[..., None]
    steps = xp.broadcast_to(coefficients, inputs.shape)[None, None]
    matrix = xp.where(s <= t, xp.prod(xp.where(factor, steps, 1), axis=2), 0)
    return xp.einsum("tsn,sn->tn", matrix, xp.concatenate([initial_state[None], inputs]))


def derivatives(function, arguments, tangents, weights):
    """States, their tangents, the gradient of sum w |h|^2, and its Hessian-vector product (forward over reverse)."""

    def loss(*arguments):
        states = function(*arguments)
        return jnp.sum(weights * (states.real**2 + states.imag**2))

    states, states_tangent = jax.jvp(function, arguments, tangents)
    gradient, hessian_product = jax.jvp(jax.grad(loss, argnums=tuple(range(len(arguments)))), arguments, tangents)
    return {
        "states": states,
        "states tangent": states_tangent,
        "gradient": gradient,
        "Hessian product": hessian_product,
    }


@partial(jax.jit, static_argnames=("method", "reverse"))
def ours(arguments, tangents, weights, *, method, reverse):
    return derivatives(partial(linear_recurrence, method=method, reverse=reverse), arguments, tangents, weights)


@partial(jax.jit, static_argnames=("reverse",))
def expected(arguments, tangents, weights, *, reverse):
    def function(coefficients, inputs, initial_state=None):
        dtype = np.result_type(*arguments)
        start = jnp.zeros(HIDDEN, dtype) if initial_state is None else initial_state.astype(dtype)
        return dense(jnp, coefficients.astype(dtype), inputs.astype(dtype), start, reverse=reverse)

    return derivatives(function, arguments, tangents, weights)


def draw(rng, shape, dtype):
    """Entries of modulus up to 1, so that no product of coefficients grows; now and then exactly 0 or 1."""
    modulus = rng.choice([0.0, 1.0, *rng.uniform(size=6)], size=shape)
    phase = rng.uniform(-np.pi, np.pi, size=shape)
    value = modulus * np.exp(1j * phase) if np.issubdtype(dtype, np.complexfloating) else modulus * np.sign(phase)
    return value.astype(dtype)


COUNTERPART = {"float32": "complex64", "float64": "complex128", "complex64": "float32", "complex128": "float64"}


@st.composite
def problems(draw_from, dtype):
    """Inputs of the given dtype, the other arguments real or complex; few sizes, since each is compiled anew."""
    length = draw_from(st.sampled_from([1, 2, 7]))
    shapes = [draw_from(st.sampled_from([(HIDDEN,), (length, HIDDEN)])), (length, HIDDEN)]
    if draw_from(st.booleans()):
        shapes.append((HIDDEN,))
    dtypes = [np.dtype(draw_from(st.sampled_from([dtype, COUNTERPART[dtype]]))) for _ in shapes]
    dtypes[1] = np.dtype(dtype)
    rng = np.random.default_rng(draw_from(st.integers(0, 2**32 - 1)))
    arguments, tangents = (tuple(map(partial(draw, rng), shapes, dtypes)) for _ in range(2))
    weights = rng.uniform(size=(length, HIDDEN)).astype(np.finfo(dtype).dtype)
    return arguments, tangents, weights


def double(tree):
    return jax.tree.map(lambda x: x.astype(np.result_type(x, np.float64)), tree)


@pytest.mark.parametrize("dtype", COUNTERPART)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(data=st.data(), reverse=st.booleans())
def test_agrees_with_the_dense_matrix_in_values_and_derivatives(dtype, data, reverse):
    problem = data.draw(problems(dtype))
    arguments, tangents, weights = double(problem)
    want = expected(arguments, tangents, weights, reverse=reverse)

    # Every quantity is a polynomial with non-negative coefficients in the entries and their conjugates, so the same
    # polynomial of their absolute values bounds the sum of its terms. Each term passes through at most 4 loops (two
    # for a gradient, twice that for the Hessian product) of T steps and through a few operations outside. A complex
    # multiply-add errs by at most (sqrt(5) + 1) eps / 2 < 2 eps of that bound. The dense side in float64 errs likewise.
    sizes = jax.tree.map(np.abs, (arguments, tangents))
    bound = expected(*sizes, weights, reverse=reverse)
    relative = 2 * 2 * 4 * (len(weights) + 4) * np.finfo(dtype).eps
    for method in METHODS:
        got = ours(*problem, method=method, reverse=reverse)
        for name in want:
            trees = jax.device_get((got[name], want[name], bound[name]))
            for a, b, size in zip(*map(jax.tree.leaves, trees), strict=True):
                assert np.all(np.abs(a - b) <= relative * size), f"{method}, {name}: {a} instead of {b}"


@pytest.mark.parametrize("dtype", COUNTERPART)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data(), reverse=st.booleans())
def test_values_agree_with_a_matrix_built_in_numpy(dtype, data, reverse):
    arguments, _, _ = data.draw(problems(dtype))
    coefficients, inputs, *start = double(arguments)
    start = start[0] if start else np.zeros(HIDDEN)
    want = dense(np, coefficients, inputs, start, reverse=reverse)
    bound = dense(np, np.abs(coefficients), np.abs(inputs), np.abs(start), reverse=reverse)
    relative = 2 * 2 * (len(inputs) + 4) * np.finfo(dtype).eps  # one loop; otherwise as above
    for method in METHODS:
        got = linear_recurrence(*arguments, method=method, reverse=reverse)
        assert np.all(np.abs(np.asarray(got) - want) <= relative * bound)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("coefficients", "inputs", "initial_state", "states"),
    [
        ("float32", "float32", "float32", "float32"),
        ("float32", "complex64", "float32", "complex64"),
        ("complex64", "float32", "float32", "complex64"),
        ("float32", "float32", "complex64", "complex64"),
        ("float32", "float64", "float32", "float64"),
        ("float64", "complex64", "float32", "complex128"),
    ],
)
def test_dtypes_promote_and_gradients_keep_the_dtype_of_their_argument(
    method, coefficients, inputs, initial_state, states
):
    arguments = (jnp.ones(2, coefficients), jnp.ones((4, 2), inputs), jnp.ones(2, initial_state))
    assert linear_recurrence(*arguments, method=method).dtype == states
    gradient = jax.grad(lambda *a: jnp.sum(jnp.abs(linear_recurrence(*a, method=method))), argnums=(0, 1, 2))
    assert [g.dtype for g in gradient(*arguments)] == [coefficients, inputs, initial_state]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("shape", "axis"), [((3,), None), ((5, 3), None), ((4, 3), 0), ((4, 5, 3), 0)])
def test_vmap_is_a_loop_over_the_batch(method, reverse, shape, axis):
    rng = np.random.default_rng(0)
    coefficients, inputs = draw(rng, shape, np.complex128), draw(rng, (4, 5, 3), np.complex128)

    def value_and_gradient(coefficients, inputs):
        def loss(*arguments):
            return jnp.sum(jnp.abs(linear_recurrence(*arguments, reverse=reverse, method=method)) ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1))(coefficients, inputs)

    got = jax.jit(jax.vmap(value_and_gradient, in_axes=(axis, 0)))(coefficients, inputs)
    each = [value_and_gradient(coefficients if axis is None else coefficients[i], x) for i, x in enumerate(inputs)]
    want = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    # as above: 2 loops of 5 steps, sizes below 2 * 5 ** 2 * 5 (the gradient of 5 squares of at most 5, 5 times)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=4 * 2 * 9 * 250 * np.finfo(float).eps), got, want)


@pytest.mark.parametrize("method", METHODS)
def test_second_derivatives_agree_in_every_order_of_forward_and_reverse(method):
    rng = np.random.default_rng(1)
    inputs = draw(rng, (6, 2), np.float64)

    def loss(coefficients):
        return jnp.sum(linear_recurrence(coefficients, inputs, method=method) ** 2)

    coefficients = draw(rng, (6, 2), np.float64)
    modes = [jax.jacfwd, jax.jacrev]
    hessians = [outer(inner(loss))(coefficients) for inner in modes for outer in modes]
    for other in hessians[1:]:  # sizes up to 6 ** 4, 4 loops of 6 steps, as above
        np.testing.assert_allclose(other, hessians[0], rtol=0, atol=4 * 4 * 10 * 6**4 * np.finfo(float).eps)


@pytest.mark.parametrize("method", METHODS)
def test_impulse_response_is_a_power(method):
    lam = np.array([0.5 + 0.5j, -0.9 + 0j])
    impulse = np.zeros((20, 2), complex)
    impulse[0] = 1
    want = lam ** np.arange(20)[:, None]
    np.testing.assert_allclose(linear_recurrence(lam, impulse, method=method), want, rtol=2 * 20 * np.finfo(float).eps)


def test_auto_is_sequential_on_the_cpu_and_the_default():
    arguments = (np.full(2, 0.9), np.ones((7, 2)))
    sequential = linear_recurrence(*arguments, method="sequential")
    if jax.default_backend() == "cpu":
        np.testing.assert_array_equal(linear_recurrence(*arguments, method="auto"), sequential)
    np.testing.assert_array_equal(linear_recurrence(*arguments), linear_recurrence(*arguments, method="auto"))


@pytest.mark.parametrize("method", METHODS)
def test_nan_reaches_later_states_only(method):
    inputs = np.ones((6, 1))
    inputs[3] = np.nan
    states = linear_recurrence(np.array([0.5]), inputs, method=method)
    assert np.isnan(states[:, 0]).tolist() == [False] * 3 + [True] * 3


def test_a_second_eager_call_compiles_nothing(caplog):
    arguments = (np.full(2, 0.9), np.ones((13, 2)))
    with jax.log_compiles():
        linear_recurrence(*arguments)
        assert caplog.records
        caplog.clear()
        linear_recurrence(*arguments)
        assert not caplog.records


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((np.ones(3, int), np.ones((4, 3))), {}, TypeError, "coefficients must be floating point.*got int64"),
        ((np.ones(3), np.ones((4, 3), bool)), {}, TypeError, "inputs must be floating point.*got bool"),
        ((np.ones(3), np.ones((4, 3)), np.ones(3, int)), {}, TypeError, "initial_state must be floating point.*int64"),
        ((np.ones(3), np.ones(3)), {}, ValueError, r"inputs must have 2 axes, got shape \(3,\)"),
        ((np.ones(3), np.ones((2, 4, 3))), {}, ValueError, r"inputs must have 2 axes, got shape \(2, 4, 3\)"),
        ((np.ones(3), np.ones((0, 3))), {}, ValueError, r"inputs must have at least one time step.*\(0, 3\)"),
        ((1.0, np.ones((4, 3))), {}, ValueError, r"coefficients must have shape \(3,\) or \(4, 3\).*got \(\)"),
        ((np.ones(2), np.ones((4, 3))), {}, ValueError, r"coefficients must have shape \(3,\) or \(4, 3\).*got \(2,\)"),
        ((np.ones((5, 3)), np.ones((4, 3))), {}, ValueError, r"coefficients must have shape.*got \(5, 3\)"),
        ((np.ones((4, 1)), np.ones((4, 3))), {}, ValueError, r"coefficients must have shape.*got \(4, 1\)"),
        (
            (np.ones(3), np.ones((4, 3)), np.ones(1)),
            {},
            ValueError,
            r"initial_state must have shape \(3,\).*got \(1,\)",
        ),
        ((np.ones(3), np.ones((4, 3))), {"method": "fast"}, ValueError, "method must be one of 'auto', .*, got 'fast'"),
        ((np.ones(3), np.ones((4, 3))), {"method": None}, ValueError, "method must be one of 'auto', .*, got None"),
    ],
)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_refuses_what_does_not_fit(transform, arguments, options, error, message):
    with pytest.raises(error, match=message):
        transform(partial(linear_recurrence, **options))(*arguments)


LENGTH = 7
INPUTS = np.random.default_rng(2).normal(size=(LENGTH, 2))


@pytest.mark.parametrize(
    ("make", "state"),
    [(eqx.nn.GRUCell, np.zeros(4)), (eqx.nn.LSTMCell, (np.zeros(4), np.full(4, 0.5)))],
)
def test_scan_cell_is_a_loop_over_time(make, state):
    cell = make(2, 4, key=jax.random.key(0))
    final, states = jax.jit(partial(scan_cell, cell))(state, INPUTS)
    loop = []
    for x in INPUTS:
        state = cell(x, state)
        loop.append(state)
    # sums of 6 products in each of 7 steps, with sizes below 3 and gates that do not amplify
    close = partial(np.testing.assert_allclose, rtol=0, atol=6 * LENGTH * 3 * np.finfo(float).eps)
    jax.tree.map(close, states, jax.tree.map(lambda *leaves: np.stack(leaves), *loop))
    jax.tree.map(np.testing.assert_array_equal, final, jax.tree.map(lambda leaf: leaf[-1], states))


def test_scan_cell_takes_pytrees_of_inputs():
    final, states = scan_cell(
        lambda x, h: h * x["gain"] + x["input"], np.zeros(2), {"gain": np.ones(3), "input": np.ones((3, 2))}
    )
    np.testing.assert_array_equal(final, [3.0, 3.0])
    np.testing.assert_array_equal(states, [[1, 1], [2, 2], [3, 3]])


@pytest.mark.parametrize("run", [scan_cell, check_cell])
@pytest.mark.parametrize(
    ("cell", "state", "inputs", "message"),
    [
        (lambda x, h: h[:2], np.zeros(4), INPUTS, r"cell must return a state like .*f64\[4\], got f64\[2\]"),
        (lambda x, h: (h, h), np.zeros(4), INPUTS, r"f64\[4\], got \(f64\[4\], *f64\[4\]\)"),
        (lambda x, h: h.astype(jnp.float32), np.zeros(4), INPUTS, r"f64\[4\], got f32\[4\]"),
        (lambda x, h: None, np.zeros(4), INPUTS, r"f64\[4\], got None"),
        (lambda x, h: h, np.zeros(4), INPUTS[:0], "inputs must have at least one time step"),
        (lambda x, h: h, np.zeros(4), 1.0, "inputs must have time as leading axis"),
        (lambda x, h: h, np.zeros(4), (INPUTS, INPUTS[:3]), r"one common time length, got \[3, 7\]"),
    ],
)
def test_refuses_a_cell_that_cannot_run(run, cell, state, inputs, message):
    with pytest.raises(ValueError, match=message):
        run(cell, state, inputs)


def test_check_cell_accepts_and_runs_nothing():
    cell = eqx.nn.LSTMCell(2, 4, key=jax.random.key(0))
    calls = []

    def counted(x, state):
        calls.append(x)
        return cell(x, state)

    assert check_cell(counted, (np.zeros(4), np.zeros(4)), INPUTS) is None
    assert all(isinstance(x, Tracer) for x in calls)
