"""Sweeps against one run after the other, and against kills, dead workers, damaged files and full disks."""

import concurrent.futures
import functools
import importlib
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanrnn import sweep as module
from scanrnn.sweep import grid, sweep

# What other processes run: a module of its own, which they can import. A chunk of `slow` takes 0.1 s.
RUNS = """
import jax.numpy as jnp
from jax import lax

ROUNDS = 2_000_000
traces = []

def decay(point, *, power=1, scale=1.0):
    traces.append(power)
    rate, seed = point["rate"], jnp.asarray(point["seed"], float)
    curve = scale * rate ** (power * jnp.arange(1.0, 4.0)) + seed
    loss = jnp.where(rate > 1, jnp.nan, curve[-1])
    return {"final_loss": loss, "diverged": jnp.isnan(loss), "curve": curve}

def slow(point):
    rate, seed = point["rate"], jnp.asarray(point["seed"], float)
    loss = lax.fori_loop(0, ROUNDS, lambda k, x: jnp.sin(3 * x + rate) + 1e-3 * seed, rate)
    return {"final_loss": loss, "diverged": loss > 1}

def choose(point):
    return {"bit": point["rate"] if "many" in {"one", "two", "three", "many"} else 0}
"""
POINTS = grid(rate=[0.1, 0.7, 1.3], seed=range(4))
MANY = grid(rate=[0.1, 0.2, 0.3, 0.4], seed=range(10))  # twenty chunks of two


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "sweep_runs.py").write_text(RUNS)
    return folder


@pytest.fixture
def runs(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("sweep_runs")


@pytest.fixture
def count(monkeypatch) -> list[int]:
    """Grows by one number for each chunk that is computed here: how many points are in it."""
    computed, run_chunk = [], module._run_chunk

    def counted(run, part, *rest):
        computed.append(len(next(iter(part.values()))))
        return run_chunk(run, part, *rest)

    monkeypatch.setattr(module, "_run_chunk", counted)
    return computed


def square(point):
    return {"square": point["a"] ** 2}


def same(one, other) -> None:
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(one[name], other[name])


# The values ----------------------------------------------------------------------------------------------------------


def test_the_last_name_of_a_grid_runs_fastest():
    assert grid(a=[1, 2], b=(0.5, 0.25)) == [{"a": a, "b": b} for a in (1, 2) for b in (0.5, 0.25)]
    assert grid() == [{}]


def test_agrees_with_one_run_after_the_other_in_the_order_of_the_points(runs):
    points = [POINTS[i] for i in np.random.default_rng(0).permutation(len(POINTS))]
    table = sweep(runs.decay, points, chunk=5)
    assert list(table) == ["rate", "seed", "curve", "diverged", "final_loss"]  # JAX sorts what a function returns
    assert (table["rate"].dtype, table["seed"].dtype, table["diverged"].dtype) == (float, int, bool)
    assert table["curve"].shape == (12, 3)
    for i, point in enumerate(points):
        assert (table["rate"][i], table["seed"][i]) == (point["rate"], point["seed"])
        alone = runs.decay({name: jnp.asarray(value) for name, value in point.items()})
        for name, value in alone.items():  # powers of one number, compiled in two ways: a few roundings
            np.testing.assert_allclose(table[name][i], value, rtol=1e-14)


def test_diverged_runs_are_rows_like_any_other(runs):
    table = sweep(runs.decay, POINTS, chunk=5)
    np.testing.assert_array_equal(table["diverged"], table["rate"] > 1)
    np.testing.assert_array_equal(np.isnan(table["final_loss"]), table["rate"] > 1)


@pytest.mark.parametrize("chunk", [1, 4, 7, 12, 100])
def test_the_size_of_the_chunks_changes_nothing_beyond_rounding(runs, chunk):
    table, whole = sweep(runs.decay, POINTS, chunk=chunk), sweep(runs.decay, POINTS)
    for name in whole:
        np.testing.assert_allclose(table[name], whole[name], rtol=1e-14)


def test_bound_arguments_are_not_traced(runs):
    table = sweep(functools.partial(runs.decay, power=2, scale=10.0), POINTS, chunk=5)
    expected = 10 * table["rate"][:, None] ** [2, 4, 6] + table["seed"][:, None]
    np.testing.assert_allclose(table["curve"], expected, rtol=1e-14)
    assert runs.traces[-1] == 2


def test_bound_values_that_are_equal_but_of_other_types_are_told_apart():
    def kind(point, *, value):
        return {"is_float": jnp.asarray(isinstance(value, float)), "is_bool": jnp.asarray(isinstance(value, bool))}

    tables = [sweep(functools.partial(kind, value=value), grid(a=[1])) for value in (1, 1.0, True)]
    assert [table["is_float"].item() for table in tables] == [False, True, False]
    assert [table["is_bool"].item() for table in tables] == [False, False, True]

    def sign(point, *, value):
        return {"sign": jnp.copysign(1.0, value)}

    assert [sweep(functools.partial(sign, value=value), grid(a=[1]))["sign"].item() for value in (0.0, -0.0)] == [1, -1]


@pytest.mark.parametrize(
    "bound", [{"power": 3}, {"power": functools.partial(int, 3)}, {"power": np.ones(3)}, {"power": {"of": [3]}}]
)
def test_compiles_once_for_each_shape_of_a_chunk(bound):
    traces = []

    def run(point, *, power):
        traces.append(power)
        return {"b": point["a"] + 1}

    for _ in range(2):  # a process pool hands over a new partial with each chunk
        for _ in range(2):
            sweep(functools.partial(run, **{k: _copy(v) for k, v in bound.items()}), grid(a=range(10)), chunk=4)
        assert len(traces) == 2  # four points, and the two that are left


def _copy(value):
    return functools.partial(value.func, *value.args) if isinstance(value, functools.partial) else value


def test_does_not_keep_all_that_was_ever_compiled():
    for k in range(40):
        sweep(functools.partial(lambda point, *, k: {"b": point["a"] + k}, k=k), grid(a=[1.0]))
    assert len(module._cache) <= 16


def test_the_precision_is_that_of_the_moment(runs):
    double = sweep(runs.decay, POINTS)
    with module._enable_x64(False):
        single = sweep(runs.decay, POINTS)
    assert (double["final_loss"].dtype, single["final_loss"].dtype) == (np.float64, np.float32)
    same(double, sweep(runs.decay, POINTS))


# The store -----------------------------------------------------------------------------------------------------------


def test_a_second_call_computes_nothing(tmp_path, runs, count):
    first = sweep(runs.decay, POINTS, chunk=5, store=tmp_path / "deep" / "store")
    assert count == [5, 5, 2]
    same(first, sweep(runs.decay, POINTS, chunk=5, store=str(tmp_path / "deep" / "store")))
    assert count == [5, 5, 2]
    assert len(list((tmp_path / "deep" / "store").iterdir())) == 3


def test_only_chunks_with_new_points_are_computed(tmp_path, runs, count):
    sweep(runs.decay, POINTS, chunk=4, store=tmp_path)
    points = [*POINTS[:-1], {"rate": 1.3, "seed": 30}]
    same(sweep(runs.decay, points, chunk=4, store=tmp_path), sweep(runs.decay, points, chunk=4))
    assert count == [4, 4, 4, 4, 4, 4, 4]  # three, the changed one, and three without a store


@pytest.mark.parametrize(
    "changed", [{"power": 2}, {"power": 1.0}, {"scale": 1}, {"scale": np.float64(1)}, {"scale": jnp.ones(())}]
)
def test_a_bound_value_of_another_kind_is_another_run(tmp_path, runs, count, changed):
    usual = {"power": 1, "scale": 1.0}
    for bound in (usual, usual | changed, usual):
        sweep(functools.partial(runs.decay, **bound), POINTS, store=tmp_path)
    assert count == [12, 12]


def test_another_precision_is_another_run(tmp_path, runs, count):
    sweep(runs.decay, POINTS, store=tmp_path)
    with module._enable_x64(False):
        table = sweep(runs.decay, POINTS, store=tmp_path)
        same(table, sweep(runs.decay, POINTS, store=tmp_path))
    assert count == [12, 12]
    assert table["final_loss"].dtype == np.float32


def variant(folder: Path, source: str):
    """`run` of a module of that source, imported anew."""
    (folder / "changing.py").write_text(source)
    sys.modules.pop("changing", None)
    importlib.invalidate_caches()
    return importlib.import_module("changing").run


def test_another_source_is_another_run(tmp_path, monkeypatch, count):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two sources of one size in one second
    for factor in (2, 3):
        run = variant(tmp_path, f"def run(point):\n    return {{'b': {factor} * point['a']}}\n")
        assert sweep(run, grid(a=[1.0]), store=tmp_path / "store")["b"] == factor
    assert count == [1, 1]


def test_a_run_whose_file_was_edited_after_its_import_does_not_pass_for_the_new_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    source = "def run(point):\n    return {{'b': {} * point['a']}}\n"
    old = variant(tmp_path, source.format(20))
    (tmp_path / "changing.py").write_text(source.format(300))
    assert sweep(old, grid(a=[1.0]), store=tmp_path / "store")["b"] == 20
    new = variant(tmp_path, source.format(300))
    assert sweep(new, grid(a=[1.0]), store=tmp_path / "store")["b"] == 300


def test_functions_with_the_same_source_are_told_apart(tmp_path):
    one, two = lambda point: {"b": point["a"] + 1}, lambda point: {"b": point["a"] + 2}
    assert [sweep(run, grid(a=[1]), store=tmp_path)["b"].item() for run in (one, two)] == [2, 3]
    bound = [lambda point, k=k: {"b": point["a"] + k} for k in (5, 6)]
    assert [sweep(run, grid(a=[1]), store=tmp_path)["b"].item() for run in bound] == [6, 7]


def test_the_sources_of_the_library_and_the_versions_belong_to_the_key(tmp_path, runs, count, monkeypatch):
    sweep(runs.decay, POINTS, store=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_LIBRARY", "another")
        sweep(runs.decay, POINTS, store=tmp_path)
    version = module.importlib.metadata.version
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: version(name) + ".1" * (name == "optax"))
    sweep(runs.decay, POINTS, store=tmp_path)
    assert count == [12, 12, 12]


def test_the_key_is_the_same_in_every_process(tmp_path, folder):
    script = "import sys, sweep_runs; from scanrnn.sweep import grid, sweep\n"
    script += "sweep(sweep_runs.choose, grid(seed=[1, 2], rate=[0.5]), store=sys.argv[1])"
    kept = []
    for seed in ("1", "2"):
        run_script(script, folder, str(tmp_path / "store"), PYTHONHASHSEED=seed)
        kept.append(sorted((tmp_path / "store").iterdir()))
    assert len(kept[0]) == 1
    assert kept[0] == kept[1]


@pytest.mark.parametrize("name", ["file", "allow_pickle", "a/b"])
def test_a_column_may_have_any_name(tmp_path, name):
    run = functools.partial(_named, name=name)
    same(sweep(run, grid(a=[1.0, 2.0]), store=tmp_path), sweep(run, grid(a=[1.0, 2.0]), store=tmp_path))


def _named(point, *, name):
    return {name: point["a"]}


# Errors --------------------------------------------------------------------------------------------------------------

offset = 3.0
held = (lambda shift: lambda point: {"b": point["a"] + shift})(offset)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"points": []}, ValueError, "points must hold at least one point, got none"),
        ({"points": [{}]}, ValueError, "points must have at least one name, got none"),
        (
            {"points": [{"a": 1}, {"b": 1}]},
            ValueError,
            r"points must all have the names \['a'\], got \['b'\] at index 1",
        ),
        ({"points": [{"a": "x"}]}, ValueError, "points must hold integers and real numbers, got a = 'x' at index 0"),
        ({"points": [{"a": True}]}, ValueError, "points must hold integers and real numbers, got a = True at index 0"),
        ({"points": [{"a": 1j}]}, ValueError, "points must hold integers and real numbers, got a = 1j at index 0"),
        ({"points": [{"a": 2**64}]}, ValueError, "points must hold integers of at most 64 bits, got a = 18446"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
        ({"chunk": 2.0}, TypeError, "chunk must be an integer, got 2.0"),
        ({"run": lambda point: point["a"]}, ValueError, "run must return a dictionary of arrays, got .*Array"),
        ({"run": lambda point: [point["a"]]}, ValueError, "run must return a dictionary of arrays, got list"),
        ({"run": lambda point: {"b": (point["a"],) * 2}}, ValueError, "dictionary of arrays, got 'b' of type tuple"),
        ({"run": lambda point: {"a": point["a"]}}, ValueError, r"must not return names of the points, got \['a'\]"),
        ({"run": held, "store": True}, ValueError, "must not hold variables .* got .* with shift: bind them with"),
        (
            {"run": functools.partial(_named, name=object()), "store": True},
            TypeError,
            "what is bound to it must be .* got",
        ),
        ({"run": jax.jit(square), "store": True}, TypeError, "run and .* must be functions.* got .*square"),
        ({"run": eval("lambda point: point"), "store": True}, TypeError, "the source of .*lambda.* must be at hand"),
    ],
)
def test_refuses(arguments, error, message, tmp_path):
    arguments = {"run": square, "points": grid(a=[1.0, 2.0])} | arguments
    if "store" in arguments:
        arguments["store"] = tmp_path
    with pytest.raises(error, match=message):
        sweep(**arguments)
    assert not list(tmp_path.iterdir())


def test_refuses_integers_that_jax_would_cut():
    with module._enable_x64(False):
        with pytest.raises(ValueError, match="points must hold integers of at most 32 bits, got a = 4294967301"):
            sweep(square, grid(a=[1, 2**32 + 5]))
        assert sweep(square, grid(a=[2**15]))["square"] == 2**30


def test_a_name_of_the_points_is_refused_after_the_first_chunk(tmp_path, count):
    with pytest.raises(ValueError, match="names of the points"):
        sweep(lambda point: {"a": point["a"]}, grid(a=range(10)), chunk=2, store=tmp_path)
    assert count == [2]
    assert not list(tmp_path.iterdir())


def test_a_failing_run_stops_the_sweep_and_what_was_submitted(runs):
    class Executor(concurrent.futures.Executor):
        def __init__(self):
            self.futures = []

        def submit(self, fn, /, *args, **kwargs):
            future = concurrent.futures.Future()
            if not self.futures:
                future.set_exception(ZeroDivisionError("of the first chunk"))
            self.futures.append(future)
            return future

    executor = Executor()
    with pytest.raises(ZeroDivisionError):
        sweep(runs.decay, POINTS, chunk=4, executor=executor)
    assert [future.cancelled() for future in executor.futures] == [False, True, True]


# Damaged files -------------------------------------------------------------------------------------------------------


def truncated(good: bytes, other: bytes) -> bytes:
    return good[:-7]


def header_only(good: bytes, other: bytes) -> bytes:
    return good[:20]


def empty(good: bytes, other: bytes) -> bytes:
    return b""


def noise(good: bytes, other: bytes) -> bytes:
    return np.random.default_rng(1).bytes(500)


def another_format(good: bytes, other: bytes) -> bytes:
    return json.dumps({"format": "a notebook", "cells": []}).encode()


def a_list(good: bytes, other: bytes) -> bytes:
    return b"[1, 2]\n"


def of_another_key(good: bytes, other: bytes) -> bytes:
    return other


def flipped(good: bytes, other: bytes) -> bytes:
    middle = good.index(b"\n") + 400
    return good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]


REASONS = {
    truncated: "it is cut short or was changed",
    header_only: "it is no chunk of a sweep",
    empty: "it is no chunk of a sweep",
    noise: "it is no chunk of a sweep",
    another_format: "its format is 'a notebook'",
    a_list: "it is no chunk of a sweep",
    of_another_key: "it is the chunk of another sweep",
    flipped: "it is cut short or was changed",
}


@pytest.mark.parametrize("damage", REASONS, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_named_and_computed_anew(tmp_path, runs, count, damage):
    whole = sweep(runs.decay, POINTS, chunk=5, store=tmp_path)
    path, other, _ = sorted(tmp_path.iterdir())
    good = path.read_bytes()
    path.write_bytes(damage(good, other.read_bytes()))
    del count[:]
    with pytest.warns(RuntimeWarning, match=rf"{path.name} cannot be used \({REASONS[damage]}") as caught:
        same(sweep(runs.decay, POINTS, chunk=5, store=tmp_path), whole)
    assert [warning.filename for warning in caught] == [__file__]
    assert len(count) == 1
    assert path.read_bytes() == good
    same(sweep(runs.decay, POINTS, chunk=5, store=tmp_path), whole)  # a warning would be an error here
    assert len(count) == 1


def test_old_halves_of_files_are_removed_and_young_ones_stay(tmp_path, runs):
    old, young = tmp_path / ".part-old", tmp_path / ".part-young"
    for path, hours in ((old, 25), (young, 23)):
        path.write_bytes(b"half")
        moment = time.time() - hours * 3600
        os.utime(path, (moment, moment))
    sweep(runs.decay, POINTS, store=tmp_path)
    assert not old.exists()
    assert young.exists()


# No room -------------------------------------------------------------------------------------------------------------


def wide(point):
    return {"curve": point["a"] * jnp.arange(4000.0)}  # 31 kB a row


@pytest.fixture
def small_disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        pytest.skip(f"no mount: {error}")
    if done.returncode:
        pytest.skip(f"a file system of 256 kB cannot be mounted: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_is_reported_and_loses_nothing(small_disk, count):
    points = grid(a=np.arange(6.0))
    (small_disk / "filler").write_bytes(bytes(170 * 1024))  # beside it there is room for two chunks
    with pytest.raises(OSError, match=r"No space left .* the 2 chunks saved before are intact, so make room") as full:
        sweep(wide, points, chunk=1, store=small_disk)
    assert full.value.filename == str(small_disk)
    assert str(small_disk) in str(full.value)
    assert sorted(path.suffix for path in small_disk.iterdir()) == ["", ".chunk", ".chunk"]
    (small_disk / "filler").unlink()
    del count[:]
    same(sweep(wide, points, chunk=1, store=small_disk), sweep(wide, points, chunk=1))
    assert len(count) == 4 + 6


def test_a_limit_on_the_size_of_files_is_reported_too(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large; the 0 chunks saved before are intact"):
            sweep(wide, grid(a=[1.0, 2.0]), chunk=1, store=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


# Other processes -----------------------------------------------------------------------------------------------------

PREAMBLE = """
import contextlib, concurrent.futures, multiprocessing, os, signal, sys, threading, time
from pathlib import Path
import sweep_runs
from scanrnn import results
from scanrnn.sweep import grid, sweep

def work(store, table, executor=None):
    columns = sweep(sweep_runs.slow, grid(rate=[0.1, 0.2, 0.3, 0.4], seed=range(10)), chunk=2, store=store,
                    executor=executor)
    results.write(table, columns)
"""
ALONE = "if __name__ == '__main__':\n    work(*sys.argv[1:])\n"
POOL = """
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as executor:
        work(*sys.argv[1:], executor)
"""
DASK = """
from distributed import Client, LocalCluster

def kill_one(store, pids):
    while len(list(Path(store).glob("*.chunk"))) < 2:
        time.sleep(0.01)
    os.kill(min(pids), signal.SIGKILL)
    print("killed", min(pids), "at", len(list(Path(store).glob("*.chunk"))), flush=True)

if __name__ == "__main__":
    with (LocalCluster(processes=True, n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
          Client(cluster) as client):
        pids = client.run(os.getpid).values()
        killer = threading.Thread(target=kill_one, args=(sys.argv[1], pids), daemon=True)
        killer.start()
        work(*sys.argv[1:], client.get_executor())
        killer.join()
"""


def start(script: str, folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    path = folder / f"script_{len(list(folder.glob('script_*')))}.py"  # spawned processes read it again
    path.write_text(script)
    command = [sys.executable, str(path), *arguments]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), "JAX_ENABLE_X64": "1"}
    return subprocess.Popen(
        command,
        env=variables | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    try:
        output = process.communicate(timeout=150)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"not done after 150 s: {process.communicate()[0]}")
    assert process.returncode == 0, output
    return output


def run_script(script: str, folder: Path, *arguments: str, **environment: str) -> str:
    return finish(start(script, folder, *arguments, **environment))


def chunks(store: Path) -> int:
    return len(list(store.glob("*.chunk")))


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory) -> bytes:
    """The table that a sweep of `MANY` writes when nothing happens to it."""
    path = tmp_path_factory.mktemp("undisturbed")
    run_script(PREAMBLE + ALONE, folder, str(path / "store"), str(path / "table.csv"))
    assert chunks(path / "store") == 20
    return (path / "table.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("script", [ALONE, POOL], ids=["alone", "pool"])
def test_killed_three_times_at_random_and_resumed_it_writes_the_same_bytes(folder, tmp_path, undisturbed, script):
    store, table = tmp_path / "store", tmp_path / "table.csv"
    chance, found = random.Random(), []
    for _ in range(3):
        process = start(PREAMBLE + script, folder, str(store), str(table))
        found.append(chunks(store))
        while process.poll() is None and chunks(store) < min(found[-1] + chance.choice([1, 2, 3]), 19):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.1))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with all its workers
        process.communicate(timeout=30)
    assert 0 < chunks(store) < 20, "no kill came in the middle"
    assert not table.exists()
    kept = {path: path.stat().st_mtime_ns for path in store.glob("*.chunk")}
    run_script(PREAMBLE + script, folder, str(store), str(table))
    assert table.read_bytes() == undisturbed
    assert chunks(store) == 20
    assert all(path.stat().st_mtime_ns == moment for path, moment in kept.items())  # found, not computed


def test_two_sweeps_on_one_store_at_once_write_the_same_bytes(folder, tmp_path, undisturbed):
    store, tables = tmp_path / "store", [tmp_path / "a.csv", tmp_path / "b.csv"]
    for process in [start(PREAMBLE + ALONE, folder, str(store), str(table)) for table in tables]:
        finish(process)
    assert [table.read_bytes() for table in tables] == [undisturbed] * 2
    paths = sorted(store.iterdir())
    assert [path.suffix for path in paths] == [".chunk"] * 20
    assert all(module._load(path, path.stem) is not None for path in paths)


@pytest.fixture
def pool():
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def test_a_pool_of_processes_gives_the_same_in_the_precision_of_the_caller(runs, pool):
    for x64 in (True, False):  # the workers start without
        with module._enable_x64(x64):
            run = functools.partial(runs.decay, scale=3.0)
            table = sweep(run, POINTS, chunk=4, executor=pool)
            assert table["final_loss"].dtype == (np.float64 if x64 else np.float32)
            same(table, sweep(run, POINTS, chunk=4))


def test_a_worker_of_other_sources_is_refused(runs, monkeypatch, pool):
    monkeypatch.setattr(module, "_LIBRARY", "edited")
    with pytest.raises(RuntimeError, match="a worker process has other sources of scanrnn than the sweep"):
        sweep(runs.decay, POINTS, chunk=4, executor=pool)


def test_a_killed_worker_of_a_pool_is_reported_and_a_new_call_goes_on(runs, tmp_path, pool):
    def kill_one(store: Path) -> None:
        while chunks(store) < 2:
            time.sleep(0.01)
        os.kill(next(iter(pool._processes)), signal.SIGKILL)

    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        killing = threads.submit(kill_one, tmp_path)
        with pytest.raises(RuntimeError, match=r"a worker process of the sweep died .* call sweep again"):
            sweep(runs.slow, MANY, chunk=2, store=tmp_path, executor=pool)
        killing.result()
    assert 2 <= chunks(tmp_path) < 20
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    same(sweep(runs.slow, MANY, chunk=2, store=tmp_path), sweep(runs.slow, MANY, chunk=2))
    assert all(path.stat().st_mtime_ns == moment for path, moment in kept.items())


@pytest.mark.slow
def test_a_dask_cluster_loses_nothing_with_a_killed_worker(folder, tmp_path, undisturbed):
    store, table = tmp_path / "store", tmp_path / "table.csv"
    output = run_script(PREAMBLE + DASK, folder, str(store), str(table), DASK_TEMPORARY_DIRECTORY=str(tmp_path))
    killed = next(line for line in output.splitlines() if line.startswith("killed"))
    assert int(killed.split()[-1]) < 20
    assert table.read_bytes() == undisturbed
    assert chunks(store) == 20
