"""The paper-scale runs of chapter 6, on the two kinds of inputs; `tools/paper.py` is the command that starts them.

A row of the tables of propagation is one layer of one stack: `layer` 0 is the encoder's output, which has a `forward`
and nothing else. Numbers of the whole network (`loss`, `all_rest`, `all_but_recurrent`) stand in all of its rows.
"""

import concurrent.futures
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from scanrnn import learning, propagation
from scanrnn.deep import BatchNorm, LayerNorm
from scanrnn.sweep import grid, sweep

from . import tables

INPUTS: dict[str, Any] = {"surrogate": learning.surrogate, "text": learning.text, "bits": None}
NORMS: dict[str, Any] = {"none": None, "layer": LayerNorm, "batch": BatchNorm}
MEMORIES = tuple(10 ** (k / 2) for k in range(5))
RATES = (0.001, 0.0032, 0.01)
PARAMETERS = 15_000  # of each stack that learns a delayed copy


@dataclass(frozen=True)
class Stacks:
    """The runs of one kind of stack: all that is not a number is the same in them."""

    layer: str  # its name in `scanrnn.propagation`
    norm: str = "none"
    max_phase: float | None = None

    def make(self) -> Callable:
        """The function that makes the layer."""
        made = getattr(propagation, self.layer)
        return made if self.max_phase is None else partial(made, max_phase=self.max_phase)


PAPER = ("complex_rnn", "lru", "gru", "lstm")
OTHERS = ("s4d", "s5", "selective_ssm", "rg_lru")
PHASES = (np.pi / 10, np.pi / 50)

FIGURES: dict[str, tuple[tuple[Stacks, ...], tuple[str, ...]]] = {
    "zo24-fig5": (
        (*map(Stacks, PAPER), *(Stacks("complex_rnn", norm) for norm in ("layer", "batch")), Stacks("lru", "layer")),
        ("surrogate", "text"),
    ),
    "zo24-fig5-others": (
        tuple(Stacks(layer, norm) for layer in OTHERS for norm in ("none", "layer")),
        ("text",),
    ),
    "zo24-fig5-phases": (
        tuple(Stacks(layer, max_phase=phase) for layer in ("complex_rnn", "lru") for phase in PHASES),
        ("text",),
    ),
    "zo24-fig5-training": (
        (Stacks("complex_rnn", "layer"), *(Stacks(layer) for layer in PAPER[1:])),
        ("text",),
    ),
    "delayed-copy": (
        tuple(Stacks(layer, "layer") for layer in (*PAPER, *OTHERS)),
        ("bits",),
    ),
}
PARTS = {figure: parts for figure, (_, parts) in FIGURES.items()}
SEEDS = {
    "zo24-fig5": 8,  # of 16 sequences each: the paper's 128
    "zo24-fig5-others": 3,
    "zo24-fig5-phases": 5,
    "zo24-fig5-training": 3,
    "delayed-copy": 3,
}


def run_figure(figure: str, part: str, steps: int, folder: Path, store: Path) -> None:
    """All runs of `figure` on one kind of inputs, into its table; `steps` of 10,000 scale the trainings."""
    start, commit = time.perf_counter(), tables.current_commit()
    cores = os.cpu_count() or 1
    stacks, parts = FIGURES[figure]
    made = []
    context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(cores, mp_context=context) as executor:
        for kind in stacks:
            print(f"{figure}, {part}: {kind.layer}, norm {kind.norm}, {kind.max_phase or ''}", flush=True)
            measure = {"delayed-copy": _delayed_copy, "zo24-fig5-training": _training}.get(figure, _propagation)
            made.append(measure(kind, part, SEEDS[figure], steps, store=store, executor=executor))
    rows = {name: np.concatenate([table[name] for table in made]) for name in made[0]}
    command = f"python -m tools.paper {figure} {part}" + (f" --steps {steps}" if steps != 10_000 else "")
    about = tables.about_run(command, commit, range(SEEDS[figure]), steps, time.perf_counter() - start)
    about |= {"rows": len(rows["seed"])}
    tables.merge(folder, figure, rows, about, column="inputs", part=part, order=parts)
    print(f"{figure}, {part}: {about['rows']} rows in {about['seconds']} s", flush=True)


def _propagation(kind: Stacks, part: str, seeds: int, steps: int, **how: Any) -> dict[str, np.ndarray]:
    run = partial(learning.propagate, layer=kind.make(), norm=NORMS[kind.norm], inputs=INPUTS[part])
    columns = sweep(run, grid(seed=range(seeds), memory=MEMORIES), chunk=1, progress=True, **how)
    return _by_layer(kind, part, columns, ("memory", "seed"))


def _training(kind: Stacks, part: str, seeds: int, steps: int, **how: Any) -> dict[str, np.ndarray]:
    steps = max(1, steps // 200) * 3  # three checkpoints
    options = {"layer": kind.make(), "norm": NORMS[kind.norm], "inputs": INPUTS[part], "steps": steps, "batch": 8}
    run = partial(learning.propagate_while_training, **options)
    points = grid(seed=range(seeds), memory=(10.0, 100.0), learning_rate=[1e-3])
    columns = sweep(run, points, chunk=1, progress=True, **how)
    checkpoints = columns["loss"].shape[1]
    made = []
    for i in range(checkpoints):
        now = {
            name: values[:, i] if values.shape[1:2] == (checkpoints,) else values for name, values in columns.items()
        }
        step = np.full(len(columns["seed"]), i * steps // (checkpoints - 1))
        made.append(_by_layer(kind, part, now | {"step": step}, ("memory", "seed", "step", "steps_taken")))
    return {name: np.concatenate([table[name] for table in made]) for name in made[0]}


def _delayed_copy(kind: Stacks, part: str, seeds: int, steps: int, **how: Any) -> dict[str, np.ndarray]:
    norm, layer = NORMS[kind.norm], kind.make()
    width = learning.width_for(layer, PARAMETERS, norm=norm)
    steps = max(20, steps // 200 * 20)
    sizes = {"width": width, "length": 200, "batch": 8}
    run = partial(learning.learn_delayed_copy, layer=layer, norm=norm, steps=steps, **sizes)
    points = grid(delay=(10, 30, 100), learning_rate=RATES, seed=range(seeds))
    columns = sweep(run, points, chunk=3, progress=True, **how)
    size = learning.count_parameters(layer, width, norm=norm)
    table: dict[str, Any] = _texts(kind, part, len(points))
    table |= {"width": np.full(len(points), width), "parameters": np.full(len(points), size)}
    names = ("delay", "learning_rate", "seed", "final_loss", "accuracy", "diverged")
    table |= {name: columns[name] for name in names}
    return {name: tables.in_double(column) for name, column in table.items()}


BLOCK = ("memory_measured", *learning.EIGENVALUE_GROUPS, "recurrent", "rest")
NETWORK = ("loss", "all_rest", "all_but_recurrent")


def _by_layer(kind: Stacks, part: str, columns: dict[str, np.ndarray], point: Sequence[str]) -> dict[str, np.ndarray]:
    """One row for each stream of each run."""
    runs, streams = columns["forward"].shape
    table: dict[str, Any] = _texts(kind, part, runs * streams)
    for name in point:
        table[name] = np.repeat(columns[name], streams)
    table["layer"] = np.tile(np.arange(streams), runs)
    table["forward"] = columns["forward"].ravel()
    for name in BLOCK:
        values = columns[name]
        table[name] = np.concatenate([np.full((runs, 1), np.nan), values], axis=1).ravel()
    for name in NETWORK:
        table[name] = np.repeat(columns[name], streams)
    return {name: tables.in_double(np.asarray(column)) for name, column in table.items()}


def _texts(kind: Stacks, part: str, count: int) -> dict[str, np.ndarray]:
    phase = np.pi if kind.max_phase is None else kind.max_phase
    texts = {"stack": kind.layer, "norm": kind.norm, "inputs": part}
    return {name: np.full(count, text) for name, text in texts.items()} | {"max_phase": np.full(count, phase)}
