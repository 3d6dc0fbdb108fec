"""Linear layers: running, convolving and multiplying matrices agree; how a `LinearRNN` starts; what it refuses."""

from functools import cache, partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from scanrnn.eigenvalues import Cartesian, DirectNormalizer, ExponentialModulus, Polar, normalizer, ring
from scanrnn.layers import LRU, DiagonalRNN, LinearRNN
from scanrnn.layers._base import LinearLayer

EPS = np.finfo(float).eps

# How d_hidden = size · blocks is divided: one block, 2 or 4 of them, blocks of two, of one.
DIVISIONS = {
    "dense": lambda n: 1,
    "2 blocks": lambda n: 2,
    "4 blocks": lambda n: 4,
    "blocks of 2": lambda n: n // 2,
    "blocks of 1": lambda n: n,
}
LENGTHS = st.one_of(st.integers(1, 15), st.integers(17, 31), st.sampled_from((16, 32, 33, 47, 64)))


def matrices(seed, blocks, n, d_in, d_out):
    """Random A (its blocks), B, C, D. The rows of |A| sum to at most 1, so that powers of |A| do not grow."""
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(blocks, n // blocks, n // blocks))
    A /= np.abs(A).sum(axis=2).max()
    return A, rng.normal(size=(n, d_in)), rng.normal(size=(d_out, n)), rng.normal(size=(d_out, d_in))


def from_matrices(weights):
    A, B, C, D = map(jnp.asarray, weights)
    return LinearRNN.from_weights(A, B, C, D)


def powers(weights, length):
    """C A^k B for each k, D more at k = 0: each power by one more product with the dense A."""
    A, B, C, D = weights
    dense, reached, kernel = scipy.linalg.block_diag(*A), B, []
    for k in range(length):
        kernel.append(C @ reached + (D if k == 0 else 0))
        reached = dense @ reached
    return np.array(kernel)


def convolved(kernel, inputs):
    return np.array([sum(kernel[k] @ inputs[t - k] for k in range(t + 1)) for t in range(len(inputs))])


@eqx.filter_jit
def run(layer, inputs):
    return layer(inputs), layer.states(inputs), layer.impulse_response(len(inputs))


@pytest.mark.parametrize("division", DIVISIONS)
@settings(deadline=None, max_examples=5)
@given(
    seed=st.integers(0, 2**32 - 1),
    quarter=st.integers(1, 6),
    d_in=st.integers(1, 3),
    d_out=st.integers(1, 3),
    length=LENGTHS,
)
def test_running_convolving_and_multiplying_matrices_agree(division, seed, quarter, d_in, d_out, length):
    n = 4 * quarter
    weights = matrices(seed, DIVISIONS[division](n), n, d_in, d_out)
    inputs = np.random.default_rng(seed + 1).normal(size=(length, d_in))
    outputs, states, kernel = run(from_matrices(weights), inputs)
    assert outputs.shape == (length, d_out)
    assert states.shape == (length, n)
    assert kernel.shape == (length, d_out, d_in)

    exact = powers(weights, length)
    # A product of k + 2 matrices, in whatever order, errs by at most (k + 2) n eps |C| |A|^k |B| in each entry; both
    # sides do. A sum over the inputs of the past adds T d_in eps of the same.
    majorant = powers([np.abs(weight) for weight in weights], length)
    depth = 2 * ((np.arange(length) + 2) * n + 2)[:, None, None]
    assert np.all(np.abs(kernel - exact) <= depth * EPS * majorant)
    bound = (depth.max() + length * d_in) * EPS * convolved(majorant, np.abs(inputs))
    assert np.all(np.abs(outputs - convolved(exact, inputs)) <= bound)
    assert np.all(np.abs(outputs - convolved(np.asarray(kernel), inputs)) <= bound)
    # the states are those of the recurrence: seen through C and D they are the outputs
    _, _, C, D = weights
    assert np.all(np.abs(np.asarray(states) @ C.T + inputs @ D.T - outputs) <= bound)


def agreeing_gradients(layer, one, other, tolerance):
    """The two losses of a layer have the same gradient, relative to the largest entry of each parameter's."""
    gradients = [eqx.filter_jit(eqx.filter_grad(loss))(layer) for loss in (one, other)]
    leaves = [jax.tree.leaves(gradient) for gradient in gradients]
    assert len(leaves[0]) == len(leaves[1]) == len(jax.tree.leaves(eqx.filter(layer, eqx.is_inexact_array)))
    for got, want in zip(*leaves, strict=True):
        assert jnp.abs(want).max() > 1e-3
        assert jnp.abs(got - want).max() <= tolerance * jnp.abs(want).max()


@pytest.mark.parametrize(("blocks", "length"), [(1, 21), (2, 16), (4, 7), (8, 40)])
def test_the_gradient_through_the_impulse_response_is_that_through_a_run(blocks, length):
    n, d_in, d_out = 8, 2, 3
    layer = from_matrices(matrices(blocks, blocks, n, d_in, d_out))
    inputs = jr.normal(jr.key(1), (length, d_in))
    lag = np.arange(length)[:, None] - np.arange(length)[None]

    def loss(outputs):
        return jnp.sum(jnp.sin(outputs + jnp.arange(1.0 * d_out)[None]))

    def through_the_kernel(layer):
        toeplitz = jnp.where((lag >= 0)[..., None, None], layer.impulse_response(length)[np.maximum(lag, 0)], 0)
        return loss(jnp.einsum("tsoi,si->to", toeplitz, inputs))

    # Sums of length² products of matrices, length of them in a row, which do not amplify: no cancellation to speak of
    # beside the largest entry, so roundings of some n · length eps in each of them.
    agreeing_gradients(layer, through_the_kernel, lambda layer: loss(layer(inputs)), 8 * n * length * EPS)


@pytest.mark.parametrize(("blocks", "n"), [(2, 6), (6, 6), (12, 24)])
def test_blocks_are_a_dense_matrix_with_zeros(blocks, n):
    layer = LinearRNN(2, n, 3, blocks=blocks, key=jr.key(blocks))
    dense = LinearRNN.from_weights(layer.matrix(), layer.input_weight, layer.output_weight, layer.feedthrough)
    np.testing.assert_array_equal(layer.matrix(), scipy.linalg.block_diag(*np.asarray(layer.recurrent)))
    assert dense.recurrent.shape == (1, n, n)
    inputs = jr.normal(jr.key(0), (37, 2))
    for got, want in zip(run(layer, inputs), run(dense, inputs), strict=True):
        # moduli below 1, and blocks so near to normal that powers stay below 100: 37 steps of n products
        np.testing.assert_allclose(got, want, rtol=0, atol=100 * 37 * n * EPS * np.abs(want).max())


@pytest.mark.parametrize("blocks", [1, 3, 6])
def test_eigenvalues_are_those_of_the_matrix_block_by_block(blocks):
    layer = LinearRNN(1, 12, 1, blocks=blocks, key=jr.key(2))
    lam, of_matrix = np.asarray(layer.eigenvalues()), np.linalg.eigvals(np.asarray(layer.matrix()))
    assert lam.shape == (12,)
    assert np.iscomplexobj(lam)
    # one and the same set: each has the other's as its only neighbour. Errors grow with the condition of eigenvectors.
    distance = np.abs(lam[:, None] - of_matrix[None])
    nearest = distance.argmin(axis=1)
    assert sorted(nearest) == list(range(12))
    assert distance.min(axis=1).max() < 1e-11
    of_blocks = [np.linalg.eigvals(np.asarray(block)) for block in layer.recurrent]
    for got, want in zip(lam.reshape(blocks, -1), of_blocks, strict=True):
        np.testing.assert_allclose(np.sort_complex(got), np.sort_complex(want), rtol=0, atol=1e-11)


# --- how it starts ----------------------------------------------------------------------------------------------------


def drawn_before_the_squash(layer, low, high):
    """The matrices whose eigenvalues were moved into the ring, all phases kept: the law undone in NumPy."""
    lam, vectors = np.linalg.eig(np.asarray(layer.recurrent))
    modulus = np.arctanh((np.abs(lam) - low) / (high - low))
    moved = modulus * np.exp(1j * np.angle(lam))
    return np.real(vectors @ (moved[..., None] * np.linalg.inv(vectors)))


@pytest.mark.parametrize(("n", "blocks"), [(60, 1), (2000, 1000), (2000, 2000)])
def test_eigenvalues_start_as_those_of_a_gaussian_matrix_moved_into_the_ring(n, blocks):
    low, high = 0.5, 0.9
    make = lambda key: LinearRNN(1, n, 1, blocks=blocks, min_modulus=low, max_modulus=high, key=key)  # noqa: E731
    layer = eqx.filter_jit(make)(jr.key(3))
    modulus = np.abs(np.asarray(layer.eigenvalues()))
    assert (modulus > low - 1e-9).all()
    assert (modulus < high).all()
    entries = drawn_before_the_squash(layer, low, high).ravel()
    # N(0, blocks/n): mean, variance and fourth moment, whose own variances are v/N, 2v²/N, 96v⁴/N
    variance, count = blocks / n, len(entries)
    assert abs(entries.mean()) < 4 * np.sqrt(variance / count)
    assert abs(entries.var() / variance - 1) < 4 * np.sqrt(2 / count)
    assert abs(np.mean(entries**4) / variance**2 - 3) < 4 * np.sqrt(96 / count)


def test_max_phase_scales_the_phases_and_nothing_else():
    make = partial(LinearRNN, 1, 400, 1, blocks=200, min_modulus=0.3, key=jr.key(4))
    lam, scaled = (np.linalg.eigvals(np.asarray(make(max_phase=phase).recurrent)) for phase in (np.pi, 0.5))
    pairs = np.abs(lam.imag[:, 0]) > 1e-6  # blocks with a conjugate pair
    assert 50 < pairs.sum() < 190
    upper, scaled_upper = (z[pairs][np.arange(pairs.sum()), z[pairs].imag.argmax(axis=1)] for z in (lam, scaled))
    np.testing.assert_allclose(np.abs(scaled_upper), np.abs(upper), rtol=1e-9)  # 2 × 2: sensitive near a double root
    np.testing.assert_allclose(np.angle(scaled_upper), np.angle(upper) * 0.5 / np.pi, rtol=1e-9)
    # one unit per block: positive numbers stay, a negative one turns by max_phase and keeps its real part
    make = partial(LinearRNN, 1, 400, 1, blocks=400, min_modulus=0.3, key=jr.key(4))
    kept, turned = (np.asarray(make(max_phase=phase).recurrent).ravel() for phase in (np.pi, 0.5))
    assert 150 < (kept < 0).sum() < 250
    np.testing.assert_allclose(turned, np.where(kept > 0, kept, -kept * np.cos(0.5)), rtol=1e-14)


def test_other_weights_start_with_the_variance_of_one_over_what_they_sum():
    layer = LinearRNN(40, 300, 30, blocks=150, key=jr.key(0))
    for name, variance in {"input_weight": 1 / 40, "output_weight": 1 / 300, "feedthrough": 1 / 40}.items():
        draws = np.asarray(getattr(layer, name))
        assert abs(draws.mean()) < 4 * np.sqrt(variance / draws.size), name
        # the variance of x² is less than the Gaussian's 2, since tails are cut
        assert abs(draws.var() / variance - 1) < 4 * np.sqrt(2 / draws.size), name
        # cut at two standard deviations of the Gaussian that is cut, whose spread is then 0.8796 of its own
        assert 2.2 * np.sqrt(variance) < np.abs(draws).max() < 2 / 0.8796 * np.sqrt(variance), name
    assert layer.input_weight.shape == (300, 40)
    assert layer.output_weight.shape == (30, 300)


def test_defaults_leave_the_disc_to_be_filled():
    make = partial(LinearRNN, 1, 64, 1, key=jr.key(5))
    assert eqx.tree_equal(make(), make(blocks=1, min_modulus=0.0, max_modulus=1.0, max_phase=np.pi))
    assert not eqx.tree_equal(make().recurrent, make(min_modulus=0.1).recurrent)


@pytest.mark.parametrize(("n", "blocks", "count"), [(64, 1, 4225), (64, 32, 257), (128, 64, 513)])
def test_the_paper_s_numbers_of_parameters(n, blocks, count):
    made = eqx.filter_eval_shape(lambda key: LinearRNN(1, n, 1, blocks=blocks, key=key), jr.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(made)) == count


def test_the_key_decides_and_every_tensor_has_its_own():
    layer, again, other = (LinearRNN(2, 6, 3, blocks=3, key=jr.key(seed)) for seed in (0, 0, 1))
    assert eqx.tree_equal(layer, again)
    first, second = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(f)]) for f in (layer, other))
    assert (first != second).all()
    assert len(np.unique(first)) == len(first)


# --- as a function ----------------------------------------------------------------------------------------------------


def test_vmap_over_keys_and_inputs_is_one_by_one():
    inputs, keys = jr.normal(jr.key(0), (3, 20, 2)), jr.split(jr.key(1), 3)
    make = lambda key: LinearRNN(2, 6, 3, blocks=3, min_modulus=0.4, max_phase=1.0, key=key)  # noqa: E731
    together = eqx.filter_jit(eqx.filter_vmap(lambda key, x: run(make(key), x)))(keys, inputs)
    alone = [run(make(key), x) for key, x in zip(keys, inputs, strict=True)]
    for got, *want in zip(together, *alone, strict=True):
        # eigenvectors of 2 × 2 blocks, compiled another way; then 20 steps
        np.testing.assert_allclose(got, np.stack(want), rtol=0, atol=1e-12)


@pytest.mark.parametrize("blocks", [1, 3])
def test_inputs_take_the_precision_of_the_parameters(blocks):
    layer = LinearRNN(2, 6, 3, blocks=blocks, key=jr.key(0))
    single = jax.tree.map(lambda a: a.astype(jnp.float32), layer)
    inputs = np.random.default_rng(0).normal(size=(20, 2))
    for made, x, dtype in ((layer, inputs.astype(np.float32), jnp.float64), (single, inputs, jnp.float32)):
        results = run(made, x)
        assert all(result.dtype == dtype for result in results)
        # float32: 20 steps of 6 products each, twice over
        for got, want in zip(results, run(layer, inputs), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=240 * np.finfo(np.float32).eps * np.abs(want).max())


def test_the_future_does_not_reach_the_past():
    layer, inputs = LinearRNN(2, 6, 3, blocks=2, key=jr.key(0)), np.ones((9, 2))
    inputs[5:] = np.nan
    assert np.isnan(layer(jnp.asarray(inputs))).any(axis=1).tolist() == [False] * 5 + [True] * 4


# --- diagonal layers --------------------------------------------------------------------------------------------------

LAM = ring(jr.key(9), 5, min_modulus=0.5, max_modulus=0.99)
DIAGONAL = {
    "cartesian": lambda sizes: DiagonalRNN(*sizes, eigenvalues=Cartesian.from_eigenvalues(LAM), key=jr.key(0)),
    "tied": lambda sizes: DiagonalRNN(
        *sizes, eigenvalues=Polar.from_eigenvalues(LAM), normalization=normalizer, key=jr.key(0)
    ),
    "direct": lambda sizes: DiagonalRNN(
        *sizes,
        eigenvalues=ExponentialModulus.from_eigenvalues(LAM),
        normalization=DirectNormalizer(-normalizer(LAM)),
        key=jr.key(0),
    ),
    "lru": lambda sizes: LRU(*sizes, min_modulus=0.5, max_modulus=0.99, key=jr.key(0)),
}


@cache
def diagonal_layer(kind, d_in, d_out) -> Any:
    return DIAGONAL[kind]((d_in, 5, d_out))


@pytest.mark.parametrize("kind", DIAGONAL)
@settings(deadline=None, max_examples=4)
@given(d_in=st.integers(1, 3), d_out=st.integers(1, 3), length=LENGTHS)
def test_the_impulse_response_of_a_diagonal_layer_is_its_answer_to_an_impulse(kind, d_in, d_out, length):
    layer = diagonal_layer(kind, d_in, d_out)
    short, run_out = eqx.filter_jit(lambda f: (f.impulse_response(length), LinearLayer.impulse_response(f, length)))(
        layer
    )
    assert short.shape == (length, d_out, d_in)
    # a power of λ, |λ| < 1, errs by k roundings of a complex product; then sums of 10 products of some 10 at most
    np.testing.assert_allclose(short, run_out, rtol=0, atol=8 * (length + 20) * EPS * np.abs(run_out).max())


@pytest.mark.parametrize("kind", DIAGONAL)
@pytest.mark.parametrize(("d_in", "d_out", "length"), [(2, 3, 37), (1, 1, 16), (3, 1, 5)])
def test_its_gradient_is_that_of_a_run(kind, d_in, d_out, length):
    weights = jr.normal(jr.key(1), (length, d_out, d_in))

    def through(impulse_response, layer):
        return jnp.sum(weights * jnp.sin(impulse_response(layer, length)))

    new, old = (partial(through, kind) for kind in (lambda f, t: f.impulse_response(t), LinearLayer.impulse_response))
    # as above, and a derivative in λ sums k λ^(k - 1): 37 more
    agreeing_gradients(diagonal_layer(kind, d_in, d_out), new, old, 1e-12)


def test_the_paper_s_numbers_of_parameters_of_diagonal_layers():
    def count(make):
        return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter_eval_shape(make, jr.key(0))))

    lam = ring(jr.key(0), 64, min_modulus=0.9, max_modulus=1.0)
    start: Any = {"eigenvalues": Cartesian.from_eigenvalues(lam)}
    assert count(lambda key: DiagonalRNN(1, 64, 1, **start, key=key)) == 385
    gamma = DirectNormalizer(normalizer(lam))
    assert count(lambda key: DiagonalRNN(1, 64, 1, **start, normalization=gamma, key=key)) == 449
    assert count(lambda key: LRU(1, 64, 1, min_modulus=0.9, max_modulus=1.0, key=key)) == 449


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "options", "error", "message"),
    [
        ((1, 6, 1), {"blocks": 4}, ValueError, "blocks must divide d_hidden = 6, got 4"),
        ((1, 6, 1), {"blocks": 12}, ValueError, "blocks must divide d_hidden = 6, got 12"),
        ((1, 6, 1), {"blocks": 0}, ValueError, "blocks must be at least 1, got 0"),
        ((1, 6, 1), {"blocks": 2.0}, TypeError, r"blocks must be an integer, got 2\.0"),
        ((0, 6, 1), {}, ValueError, "d_in must be at least 1, got 0"),
        ((1, 0, 1), {}, ValueError, "d_hidden must be at least 1, got 0"),
        ((1, 6, 1.0), {}, TypeError, r"d_out must be an integer, got 1\.0"),
        ((1, 6, 1), {"min_modulus": -0.1}, ValueError, "min_modulus must be between 0 and max_modulus = 1.0, got -0.1"),
        ((1, 6, 1), {"max_modulus": 1.1}, ValueError, "max_modulus must be between 0 and 1, got 1.1"),
        ((1, 6, 1), {"max_phase": 3.2}, ValueError, "max_phase must be between 0 and π, got 3.2"),
    ],
)
def test_options_out_of_range_are_refused(sizes, options, error, message):
    with pytest.raises(error, match=message):
        LinearRNN(*sizes, **options, key=jr.key(0))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"recurrent": np.ones(4)}, ValueError, r"recurrent must have 2 or 3 axes, got shape \(4,\)"),
        ({"recurrent": np.ones((4, 3))}, ValueError, r"recurrent must be square, got shape \(1, 4, 3\)"),
        ({"recurrent": np.ones((2, 2, 1))}, ValueError, r"recurrent must be square, got shape \(2, 2, 1\)"),
        ({"recurrent": np.eye(3)}, ValueError, r"input_weight must have shape \(3, 2\), got \(4, 2\)"),
        ({"recurrent": np.ones((4, 4), int)}, TypeError, r"recurrent must be floating point .* got int64"),
        ({"recurrent": np.ones((4, 4), complex)}, TypeError, "recurrent must be real, got complex128"),
        ({"input_weight": np.ones((2, 4))}, ValueError, r"input_weight must have shape \(4, 2\), got \(2, 4\)"),
        ({"input_weight": np.ones(4)}, ValueError, r"input_weight must have shape \(4, 2\), got \(4,\)"),
        ({"output_weight": np.ones((4, 3))}, ValueError, r"output_weight must have shape \(3, 4\), got \(4, 3\)"),
        ({"output_weight": np.ones((3, 4), complex)}, TypeError, "output_weight must be real, got complex128"),
        ({"feedthrough": np.ones(3)}, ValueError, r"feedthrough must have 2 axes, got shape \(3,\)"),
        ({"feedthrough": np.ones((2, 3))}, ValueError, r"input_weight must have shape \(4, 3\), got \(4, 2\)"),
        ({"feedthrough": np.ones((3, 2), int)}, TypeError, r"feedthrough must be floating point .* got int64"),
    ],
)
def test_weights_that_do_not_fit_are_refused(changed, error, message):
    A, B, C, D = matrices(0, 2, 4, 2, 3)
    fitting = {"recurrent": A, "input_weight": B, "output_weight": C, "feedthrough": D}
    with pytest.raises(error, match=message):
        LinearRNN.from_weights(**{name: jnp.asarray(value) for name, value in (fitting | changed).items()})


def test_inputs_that_do_not_fit_are_refused():
    layer = LinearRNN(3, 4, 2, key=jr.key(0))
    cases = [
        (np.ones(3), ValueError, r"inputs must have 2 axes, got shape \(3,\)"),
        (np.ones((9, 4)), ValueError, r"inputs must have shape \(T, d_in\) with d_in = 3, got \(9, 4\)"),
        (np.ones((0, 3)), ValueError, "inputs must have at least one time step"),
        (np.ones((9, 3), int), TypeError, "inputs must be floating point .* got int64"),
        (np.ones((9, 3), complex), TypeError, "inputs must be real, got complex128"),
    ]
    for call in (layer, layer.states, eqx.filter_jit(layer)):
        for inputs, error, message in cases:
            with pytest.raises(error, match=message):
                call(inputs)


@pytest.mark.parametrize("layer", [LinearRNN(1, 4, 1, key=jr.key(0)), diagonal_layer("lru", 1, 1)])
def test_lengths_that_are_not_positive_integers_are_refused(layer):
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        layer.impulse_response(0)
    with pytest.raises(TypeError, match=r"length must be an integer, got 3\.0"):
        layer.impulse_response(3.0)
