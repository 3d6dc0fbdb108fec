"""The paper-scale sweeps: `python -m tools.paper FIGURE TEACHER` makes the rows of one kind of teacher.

`make paper` runs them all, `make paper FIGURE=zo24-fig3a TEACHER=authors` one. Each runs in a pool of single-threaded
processes, one for each core, keeps finished chunks under `_build/sweeps`, and goes on there when called again. When
it is done it writes its rows into `book/results/<figure>.csv`, those of other teachers untouched, and what produced
them into `<figure>.json`.
"""

import argparse
import concurrent.futures
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from scanrnn import curvature, identification
from scanrnn.sweep import grid, sweep

from . import paper_deep, paper_flossing, tables

RESULTS = Path("book/results")
STORE = Path("_build/sweeps")
CHUNK = 40  # runs, at most
# One process a core, with one thread each: the products are too small to be shared between threads.
WORKERS = {
    "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}

MODULI = (0.36, 0.68, 0.84, 0.92, 0.96, 0.98, 0.99)
PHASES = (3.14, 0.993, 0.314, 0.0993, 0.0314)
RNN_RATES = (3.2e-3, 1e-3, 3.2e-4, 1e-4, 3.2e-5)
LRU_RATES = (0.32, 0.1, 0.032, 0.01, 0.0032)
BLOCK_RATES = (0.01, 0.0032, 0.001, 3.2e-4)
DIAGONAL_RATES = (0.1, 0.032, 0.01, 0.0032, 0.001, 3.2e-4, 1e-4)
DENSE_BLOCK_RATES = (*BLOCK_RATES[:-1], *RNN_RATES[2:])
PHASE_RATES = (1.0, 0.32, *DIAGONAL_RATES[:-1])
HEAD_RATES = (0.032, 0.01, 0.0032, 0.001, 1e-4)
SGD_RATES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)


@dataclass(frozen=True)
class Teacher:
    """A kind of teacher: how it is made, and the pairs (teacher_seed, seed of the student) to run."""

    make: Callable
    seeds: tuple[tuple[int, int], ...]


TEACHERS = {
    "authors": Teacher(identification.authors, tuple((42, seed) for seed in range(2023, 2033))),  # the paper's seeds
    "fresh": Teacher(identification.fresh, tuple((seed, seed) for seed in range(20))),
    # The first ten without a real negative eigenvalue, which a sweep over phases would shorten (one in eight has none).
    "conjugate": Teacher(identification.fresh, tuple((s, s) for s in (1, 6, 7, 16, 35, 57, 60, 62, 63, 72))),
}


@dataclass(frozen=True)
class Group:
    """The runs of one kind of student: all that is not a number is the same in them."""

    student: str  # as the table has it
    make: identification.Student
    rates: tuple[float, ...]
    moduli: tuple[float, ...] = (0.99,)
    phases: tuple[float, ...] = (3.14,)
    columns: dict[str, Any] = field(default_factory=dict)  # the same in all rows
    options: dict[str, Any] = field(default_factory=dict)  # of `identify`
    observed: tuple[int, ...] = ()  # epochs whose observations the table keeps
    seeds: int | None = None  # the first so many of the kind of teacher; None is all
    run: Callable | None = None  # instead of `identify`, with its own steps
    x64: bool = False  # in double precision
    by_array: bool = False  # one row for each array of parameters, of `identification.rates_by_group`


def _heads(count: int) -> Group:
    return Group(
        "rnn" if count == 1 else "block_diagonal",
        partial(identification.rnn, blocks=count),
        HEAD_RATES,
        columns={"heads": count},
        options={"observe": identification.rates_of_recurrent_weights},
        observed=(0, 10, 25, 50, 98),
        seeds=10,
    )


def _sampled(student: str, make: identification.Student, rates: tuple[float, ...]) -> Group:
    columns = {"optimizer": "adam", "batch": 128}
    return Group(student, make, rates, (0.92, 0.99), columns=columns, options={"batch": 128}, seeds=3)


def _exact_adam(student: str, make: identification.Student, rates: tuple[float, ...], seeds: int) -> Group:
    return Group(student, make, rates, columns={"optimizer": "adam", "batch": 0}, seeds=seeds)


def _sgd(student: str, make: identification.Student) -> Group:
    columns = {"optimizer": "sgd", "batch": 0}
    return Group(student, make, SGD_RATES, columns=columns, options={"optimizer": optax.sgd}, seeds=10)


def _damped_gauss_newton(student: str, make: identification.Student) -> Group:
    columns = {"optimizer": "levenberg_marquardt", "batch": 0}
    run = partial(identification.identify_by_gauss_newton, steps=200)
    return Group(student, make, (1.0,), columns=columns, run=run, x64=True, seeds=3)


def _rates(student: str, make: identification.Student) -> Group:
    observe = {"observe": identification.rates_by_group, "optimizer": identification.constant_adam, "batch": 128}
    return Group(student, make, (1e-3,), options=observe, seeds=3, by_array=True)


BASES = (  # the same kind of network, dense in three bases, and without the entries between its blocks
    ("rnn", identification.rnn),
    ("rnn_rotated_blocks", identification.rotated_blocks),
    ("rnn_from_blocks", identification.dense_from_blocks),
    ("block_diagonal", identification.block_diagonal),
    ("lru", identification.lru),
)

FIGURES: dict[str, tuple[tuple[Group, ...], tuple[str, ...]]] = {
    "zo24-fig3a": (
        (
            Group("rnn", identification.rnn, RNN_RATES, MODULI),
            Group("lru", identification.lru, LRU_RATES, MODULI),
        ),
        ("authors", "fresh"),
    ),
    # beyond the paper's rates, the best of which lies at their edge for some memories
    "zo24-fig3a-wider": (
        (
            Group("rnn", identification.rnn, (0.01, 1e-5), MODULI),
            Group("lru", identification.lru, (1.0, 0.001), MODULI),
        ),
        ("authors",),
    ),
    "zo24-fig3b": (
        (
            Group("rnn", identification.rnn, RNN_RATES),
            Group("rnn_from_blocks", identification.dense_from_blocks, DENSE_BLOCK_RATES),
            Group("block_diagonal", identification.block_diagonal, BLOCK_RATES),
            Group("block_diagonal_wide", identification.block_diagonal_wide, BLOCK_RATES),
            Group("complex", identification.complex_diagonal, DIAGONAL_RATES),
            Group("complex_gamma", identification.complex_gamma, DIAGONAL_RATES),
            Group("complex_gamma_released", identification.complex_gamma_released, DIAGONAL_RATES),
            Group("lru", identification.lru, DIAGONAL_RATES),
        ),
        ("authors", "fresh"),
    ),
    "zo24-fig10b": (
        (
            Group("rnn", identification.rnn, RNN_RATES[1:], phases=PHASES, seeds=10),
            Group("complex", identification.complex_diagonal, BLOCK_RATES, phases=PHASES, seeds=10),
            Group("lru", identification.lru, PHASE_RATES, phases=PHASES, seeds=10),
            Group("lru_signed", identification.lru_signed_phase, PHASE_RATES, phases=PHASES, seeds=10),
        ),
        ("authors", "fresh", "conjugate"),
    ),
    "zo24-fig11": (tuple(_heads(count) for count in (1, 2, 4, 8, 16, 32)), ("authors", "fresh")),
    "zo24-fig4c": (
        (
            _rates("rnn", identification.rnn),
            _rates("complex", identification.complex_diagonal),
            _rates("lru", identification.lru),
            _rates("zero_order_hold", identification.zero_order_hold),
        ),
        ("authors",),
    ),
    "zo24-controls": (
        (
            _exact_adam("rnn_rotated_blocks", identification.rotated_blocks, DENSE_BLOCK_RATES, seeds=10),
            *(_sgd(*basis) for basis in BASES),
            *(_damped_gauss_newton(*basis) for basis in BASES),
            _sampled("rnn", identification.rnn, RNN_RATES),
            _sampled("lru", identification.lru, LRU_RATES),
        ),
        ("authors",),
    ),
    "zo24-controls-fresh": (
        (
            _exact_adam("rnn_rotated_blocks", identification.rotated_blocks, DENSE_BLOCK_RATES, seeds=20),
            *(_damped_gauss_newton(*basis) for basis in BASES),
        ),
        ("fresh",),
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="The paper-scale sweeps, resumable; see tools/paper.py.")
    figures = {name: teachers for name, (_, teachers) in FIGURES.items()}
    figures |= paper_deep.PARTS | paper_flossing.PARTS
    parts = list(dict.fromkeys(part for names in figures.values() for part in names))
    parser.add_argument("figure", nargs="?", choices=figures, help="one figure; without it, all")
    parser.add_argument(
        "part", nargs="?", choices=parts, help="one kind of teacher, of inputs or of task; without it, all"
    )
    parser.add_argument("--steps", type=int, default=10_000, help="of training (fewer only to try it out)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--store", type=Path, default=STORE, help="folder of the finished chunks")
    options = parser.parse_args(arguments)
    if options.steps < 100 or options.steps % 100:
        parser.error(f"--steps must be a multiple of 100, got {options.steps}")
    if options.figure and options.part not in (None, *figures[options.figure]):
        parser.error(f"{options.figure} has the parts {', '.join(figures[options.figure])}, got {options.part}")
    os.environ.update(WORKERS)  # read by the workers when they start JAX
    for figure in [options.figure] if options.figure else figures:
        for part in figures[figure]:
            if options.part in (None, part):
                _runner(figure)(figure, part, options.steps, options.results, options.store)


def _runner(figure: str) -> Callable:
    """Who makes a table."""
    if figure in FIGURES:
        return run_figure
    return (paper_deep if figure in paper_deep.PARTS else paper_flossing).run_figure


def run_figure(figure: str, teacher: str, steps: int, folder: Path, store: Path) -> None:
    """All runs of `figure` with one kind of teacher, into its table."""
    start, commit, parts = time.perf_counter(), tables.current_commit(), []  # the commit may be another when it is done
    cores = os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(cores, mp_context=context) as executor:
        for group in FIGURES[figure][0]:
            print(f"{figure}, {teacher}: {group.student} {group.columns or ''}", flush=True)
            parts.append(_run_group(group, teacher, steps, store, executor, cores))
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    command = f"python -m tools.paper {figure} {teacher}" + (f" --steps {steps}" if steps != 10_000 else "")
    seeds = [list(pair) for pair in TEACHERS[teacher].seeds]
    about = tables.about_run(command, commit, seeds, steps, time.perf_counter() - start)
    about |= {"runs": len(rows["seed"]), "diverged": int(np.sum(rows["diverged"]))}
    tables.merge(folder, figure, rows, about, column="teacher", part=teacher, order=FIGURES[figure][1])
    print(
        f"{figure}, {teacher}: {about['runs']} runs in {about['seconds']} s, {about['diverged']} diverged", flush=True
    )


def _run_group(
    group: Group, teacher: str, steps: int, store: Path, executor: concurrent.futures.Executor, cores: int
) -> dict[str, np.ndarray]:
    kind = TEACHERS[teacher]
    seeds = [{"teacher_seed": t, "seed": s} for t, s in kind.seeds[: group.seeds]]
    cells = grid(nu0=group.moduli, max_phase=group.phases, learning_rate=group.rates)
    points = [cell | pair for cell in cells for pair in seeds]
    options = {"student": group.make, "teacher": kind.make, **group.options}
    run = partial(group.run or partial(identification.identify, steps=steps, every=steps // 100), **options)
    most = 4 if "batch" in group.options else CHUNK  # a batch of sequences needs the cache for itself
    chunk = math.ceil(len(points) / (cores * math.ceil(len(points) / (cores * most))))  # the same for every core
    with jax.enable_x64(group.x64):
        columns = sweep(run, points, chunk=chunk, store=store, executor=executor, progress=True)
    count = len(points)
    texts = {"student": np.full(count, group.student), "teacher": np.full(count, teacher)}
    fixed = {name: np.full(count, value) for name, value in group.columns.items()}
    wanted = ("teacher_seed", "nu0", "max_phase", "learning_rate", "seed")
    measured = ("final_loss", "diverged", "zero_loss", "exact_loss", "negative_eigenvalues")
    table = texts | {name: columns[name] for name in wanted} | fixed | {name: columns[name] for name in measured}
    for epoch in group.observed:  # an observation is made before a stretch of steps, so that of epoch e is the next
        for name in identification.OBSERVED:
            table[f"{name}_{epoch}"] = columns[name][:, epoch + 1]
    table = _by_array(group, table, columns) if group.by_array else table
    return {name: tables.in_double(column) for name, column in table.items()}


def _by_array(group: Group, table: dict[str, np.ndarray], columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A row for each array of parameters: the effective learning rates of its entries at the end, per base rate."""
    student = group.make(min_modulus=0.9, max_phase=3.14, key=jax.random.key(0))
    names = list(curvature.groups(student))
    rows = {name: np.repeat(column, len(names)) for name, column in table.items()}
    rows["array"] = np.tile(names, len(table["seed"]))
    for kind in ("released", "clean"):
        for i, what in enumerate(identification.SUMMARY):
            rows[f"{kind}_{what}"] = columns[kind][:, -1, :, i].ravel()
    return rows


if __name__ == "__main__":
    main()
