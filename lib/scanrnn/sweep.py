r"""A function of one point of a grid, at all points: vectorised within a chunk, chunk by chunk, resumable.

    run(point) -> results        →        sweep(run, points) -> one column for each name in point and results

`points` are cut into chunks of neighbours. Within a chunk `run` is compiled once under `jax.vmap`; the chunks are run
here, one after the other, or by any `concurrent.futures.Executor`: a process pool, or a Dask cluster's
`client.get_executor()`. A finished chunk is a file in the store, named by a digest of all that determines what is in
it. So a sweep that was killed goes on where it stopped, and a change of the code, of a library's version or of the
points starts anew without an old number in between.
"""

import concurrent.futures
import functools
import hashlib
import importlib.metadata
import inspect
import io
import itertools
import json
import os
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped
from tqdm import tqdm

from ._checks import require_integer

try:
    _enable_x64 = jax.enable_x64
except AttributeError:  # before 2025 it was an experiment
    from jax.experimental import enable_x64 as _enable_x64  # pyright: ignore[reportAttributeAccessIssue]

Columns = dict[str, Shaped[np.ndarray, "points ..."]]


def grid(**axes: Iterable[Any]) -> list[dict[str, Any]]:
    """All combinations of the values given for each name, the last name running fastest.

    `grid(nu0=[0.9, 0.99], seed=range(3))` has six points.
    """
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def sweep(
    run: Callable[[dict[str, Any]], Mapping[str, Any]],
    points: Sequence[Mapping[str, float | int]],
    *,
    chunk: int = 40,
    store: str | os.PathLike | None = None,
    executor: concurrent.futures.Executor | None = None,
    progress: bool = False,
) -> Columns:
    r"""`run` at all `points`; one column for each name, in the order of the points.

    **Arguments:**

    - `run(point)`: a function of JAX, of a dictionary of scalars, that returns a dictionary of arrays of fixed shapes;
      it is called under `jax.jit` and `jax.vmap`. What may not be traced (a width, a kind of network) is bound to it
      with `functools.partial`.
    - `points`: dictionaries with the same names, of integers and real numbers (see `grid`).
    - `chunk`: how many points are run together.
    - `store`: a folder for the finished chunks, made if need be; several sweeps may use it, also at once. Without it
      nothing is kept.
    - `executor`: who runs the chunks; by default this process. With another process, `run` must be picklable: a
      function of a module, or a `functools.partial` of one. Whether JAX is in float64 travels with the chunk. A process
      pool needs `mp_context=multiprocessing.get_context("spawn")`: JAX's threads do not survive a fork.
    - `progress`: whether to show a bar: runs done, time left.

    **Returns** the columns: those of the points, then those of the results, the latter with what further axes they
    have. A run that diverges is a row like any other, with whatever `run` returned for it.

    **The store.** A chunk is saved when it is finished, atomically, under a digest of: `run` and all that is bound to
    it, the sources of scanrnn and of a `run` defined elsewhere, the points, the precision, the backend, and the
    versions of jax, jaxlib, numpy, equinox and optax. (Not the processor: rounding may differ between machines. And not
    what `run` reads but does not receive: global variables, files.) A file there that is cut short, or is not what its
    name says, is named in a `RuntimeWarning`, and computed anew.

    **Raises** `ValueError` for no points, points of different names, a value that is not a number or an integer that
    JAX's integers do not hold, results that are not arrays, whose names are not those of the first chunk or are names
    of the points too, or, with a store, a `run` that holds variables of its surroundings; `TypeError` for what cannot
    be named in a digest; `OSError` where a chunk cannot be saved; `RuntimeError` where a worker process died or has
    other sources of scanrnn. Whatever happens, chunks that were saved stay.
    """
    require_integer("chunk", chunk, minimum=1)
    columns = _columns(points)
    count = len(points)
    bounds = [(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    parts = [{name: column[start:stop] for name, column in columns.items()} for start, stop in bounds]
    results: list[Columns | None] = [None] * len(parts)
    keys: list[str] = []
    if store is not None:
        store = Path(store)
        store.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(store)
        about = _describe_run(run)
        keys = [_digest({"run": about, "points": _exact(part)}) for part in parts]
        for i, key in enumerate(keys):
            results[i] = _load(store / f"{key}.chunk", key)

    first = next((result for result in results if result is not None), None)
    missing = [i for i, result in enumerate(results) if result is None]
    done = sum(bounds[i][1] - bounds[i][0] for i in range(len(parts)) if results[i] is not None)
    with tqdm(total=count, initial=done, unit="run", disable=not progress) as bar:
        for i, result in _finished(run, parts, missing, executor):
            first = first or result
            _check_names(columns, first, result)
            if store is not None:
                _save(store / f"{keys[i]}.chunk", keys[i], result)
            results[i] = result
            bar.update(bounds[i][1] - bounds[i][0])
    whole = [result for result in results if result is not None]
    return columns | {name: np.concatenate([result[name] for result in whole]) for name in whole[0]}


# Running -------------------------------------------------------------------------------------------------------------


def _finished(
    run: Callable, parts: list[Columns], missing: list[int], executor: concurrent.futures.Executor | None
) -> Iterable[tuple[int, Columns]]:
    """(i, results of part i), as they are finished."""
    x64 = bool(jax.config.read("jax_enable_x64"))
    if executor is None:
        for i in missing:
            yield i, _run_chunk(run, parts[i], x64, _LIBRARY)
        return
    futures = {}
    try:
        for i in missing:
            futures[executor.submit(_run_chunk, run, parts[i], x64, _LIBRARY)] = i
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()
    except concurrent.futures.BrokenExecutor as error:
        raise RuntimeError(
            "a worker process of the sweep died (killed, out of memory, or unable to import run); chunks that were "
            "saved in the store are kept: call sweep again, with a new executor, to go on"
        ) from error
    finally:
        for future in futures:
            future.cancel()


def _run_chunk(run: Callable, part: Columns, x64: bool, library: str) -> Columns:
    """In whatever process: the results of one chunk."""
    if library != _LIBRARY:
        raise RuntimeError(
            "a worker process has other sources of scanrnn than the sweep (edited while it ran, or another version): "
            "start anew"
        )
    with _enable_x64(x64):
        results = _compiled(run)(part)
    if not isinstance(results, Mapping):
        raise ValueError(f"run must return a dictionary of arrays, got {type(results).__name__}")
    for name, column in results.items():
        if not isinstance(column, jax.Array):
            raise ValueError(f"run must return a dictionary of arrays, got {name!r} of type {type(column).__name__}")
    return {str(name): np.asarray(column) for name, column in results.items()}


_cache: dict[Any, Callable] = {}


def _compiled(run: Callable) -> Callable:
    try:
        key = _identity(run)
        if key not in _cache:
            for old in list(_cache)[:-15]:  # a compiled program is large
                _cache.pop(old, None)
            _cache[key] = jax.jit(jax.vmap(run))
        return _cache[key]
    except TypeError:  # something unhashable is bound to it
        return jax.jit(jax.vmap(run))


def _identity(value: Any) -> Any:
    """Equal for what computes the same. A partial that was unpickled is equal to no other, but 1 is to 1.0 and True."""
    if isinstance(value, functools.partial):
        return functools.partial, *map(_identity, (value.func, value.args, value.keywords))
    leaves, structure = jax.tree.flatten(value)
    if not (len(leaves) == 1 and leaves[0] is value):
        return structure, *map(_identity, leaves)
    if isinstance(value, jax.Array | np.ndarray):
        return type(value), str(value.dtype), value.shape, np.asarray(value).tobytes()
    return type(value), value.hex() if isinstance(value, float) else value


# The table -----------------------------------------------------------------------------------------------------------


def _columns(points: Sequence[Mapping[str, Any]]) -> Columns:
    if len(points) == 0:
        raise ValueError("points must hold at least one point, got none")
    names = list(points[0])
    if not names:
        raise ValueError("points must have at least one name, got none")
    for i, point in enumerate(points):
        if set(point) != set(names):
            raise ValueError(f"points must all have the names {names}, got {list(point)} at index {i}")
        for name, value in point.items():
            if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
                raise ValueError(f"points must hold integers and real numbers, got {name} = {value!r} at index {i}")
    columns = {name: np.array([point[name] for point in points]) for name in names}
    for name, column in columns.items():
        # Of a larger integer JAX would drop the upper bits, and two seeds be the same.
        if column.dtype == object or (column.dtype.kind in "iu" and (_as_jax_has_it(column) != column).any()):
            bits = 64 if jax.config.read("jax_enable_x64") else 32
            largest = max(column, key=abs)
            raise ValueError(f"points must hold integers of at most {bits} bits, got {name} = {largest}")
    return columns


def _as_jax_has_it(column: np.ndarray) -> np.ndarray:
    return column.astype(jax.dtypes.canonicalize_dtype(column.dtype))


def _check_names(columns: Columns, first: Columns, result: Columns) -> None:
    names = list(first)
    twice = sorted(set(names) & set(columns))
    if twice:
        raise ValueError(f"run must not return names of the points, got {twice}")
    if set(result) != set(names):
        raise ValueError(f"run must return the same names for all points, got {list(result)} beside {names}")


# The store -----------------------------------------------------------------------------------------------------------

_MAGIC = "scanrnn chunk 1"
_PREFIX = "column "  # so that a column may be named as an argument of np.savez


def _save(path: Path, key: str, result: Columns) -> None:
    """Atomically: the file is there as a whole or not at all, also if the machine stops in between."""
    buffer = io.BytesIO()
    np.savez(buffer, **{_PREFIX + name: column for name, column in result.items()})  # type: ignore[arg-type]
    payload = buffer.getvalue()
    header = json.dumps({"format": _MAGIC, "key": key, "sha256": hashlib.sha256(payload).hexdigest()})
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".part-", delete=False) as file:
            try:
                file.write(header.encode() + b"\n" + payload)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        kept = len(list(path.parent.glob("*.chunk")))
        raise OSError(
            error.errno,
            f"cannot save a finished chunk ({len(payload)} bytes): {error.strerror}; the {kept} chunks saved before "
            "are intact, so make room and call sweep again",
            str(path.parent),
        ) from error


def _load(path: Path, key: str) -> Columns | None:
    """What is saved there, or None; a file that is not a whole chunk of this key is named, and counts as none."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    first, _, payload = raw.partition(b"\n")
    try:
        header = json.loads(first)
        if header["format"] != _MAGIC:
            raise ValueError(f"its format is {header['format']!r}")
        if header["key"] != key:
            raise ValueError("it is the chunk of another sweep")
        if header["sha256"] != hashlib.sha256(payload).hexdigest():
            raise ValueError("it is cut short or was changed")
        with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
            return {name.removeprefix(_PREFIX): arrays[name] for name in arrays.files}
    except (ValueError, KeyError, TypeError, OSError) as error:
        foreign = isinstance(error, json.JSONDecodeError | UnicodeDecodeError | KeyError | TypeError)
        reason = "it is no chunk of a sweep" if foreign else error
        warnings.warn(f"{path} cannot be used ({reason}); it is computed anew", RuntimeWarning, stacklevel=3)
        return None


def _remove_leftovers(store: Path) -> None:
    """Halves of files that a killed sweep left; younger ones may be being written by another sweep."""
    for path in store.glob(".part-*"):
        try:
            if time.time() - path.stat().st_mtime > 24 * 3600:
                path.unlink()
        except FileNotFoundError:  # the other sweep has finished it
            pass


# What determines a chunk ---------------------------------------------------------------------------------------------


_VERSIONED = ("jax", "jaxlib", "numpy", "equinox", "optax")


def _describe_run(run: Callable) -> dict[str, Any]:
    return {
        "run": _describe(run),
        "library": _LIBRARY,
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONED},
        "x64": bool(jax.config.read("jax_enable_x64")),
        "backend": jax.default_backend(),
    }


def _library_digest() -> str:
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


_LIBRARY = _library_digest()  # of the sources as they were when they were imported: later they may be edited


def _describe(value: Any) -> Any:
    """`value` as JSON that is the same in every process, and different for values that compute something else."""
    if isinstance(value, functools.partial):
        return {
            "function": _describe(value.func),
            "arguments": _describe(value.args),
            "keywords": _describe(value.keywords),
        }
    if isinstance(value, types.FunctionType | type) or (hasattr(value, "__qualname__") and _root(value) in _VERSIONED):
        return _describe_function(value)  # jnp.tanh is no function to Python
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and not isinstance(value, np.generic):  # NumPy's float64 has a precision to insist on
        return {"float": value.hex()}
    if isinstance(value, Mapping):
        return {"mapping": [[_describe(k), _describe(v)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return [_describe(item) for item in value]
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        array = np.asarray(value)
        return {"array": [str(array.dtype), list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]}
    raise TypeError(
        "with a store, run and what is bound to it must be functions, numbers, strings, arrays, or lists and "
        f"dictionaries of them, got {value!r} of type {type(value).__name__}"
    )


def _root(function: Any) -> str:
    return (function.__module__ or "").split(".")[0]


def _describe_function(function: Any) -> dict[str, Any]:
    name = f"{function.__module__}.{function.__qualname__}"
    if getattr(function, "__closure__", None):
        held = ", ".join(function.__code__.co_freevars)
        raise ValueError(
            f"with a store, run must not hold variables of its surroundings, got {name} with {held}: "
            "bind them with functools.partial"
        )
    about: dict[str, Any] = {"name": name}
    if isinstance(function, types.FunctionType):
        about["code"] = _describe_code(function.__code__)
    if _root(function) in (__name__.split(".")[0], *_VERSIONED):
        return about  # the library's digest or the version says the rest
    if isinstance(function, types.FunctionType):
        about["defaults"] = _describe([function.__defaults__, function.__kwdefaults__])
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        raise TypeError(f"with a store, the source of {name} must be at hand, and is not") from None
    return about | {"source": hashlib.sha256(source.encode()).hexdigest()}


def _describe_code(code: types.CodeType) -> list[Any]:
    """What is run; the source may be another by now, and is that of a whole line, which may hold several lambdas."""
    constants = [
        _describe_code(value)
        if isinstance(value, types.CodeType)
        else sorted(map(repr, value))  # in the order of their hashes, which differ between processes
        if isinstance(value, frozenset)
        else repr(value)
        for value in code.co_consts
    ]
    return [code.co_code.hex(), list(code.co_names), constants]


def _exact(part: Columns) -> dict[str, Any]:
    return {name: [str(column.dtype), column.tobytes().hex()] for name, column in part.items()}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
