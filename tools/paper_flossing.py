"""The paper-scale runs of chapter 7; `tools/paper.py` is the command that starts them.

A row of the tables of training is one student at one delay: its accuracy, exponents and gradient in stretches of
epochs (`accuracy_0`, `accuracy_1`, ...), and what it ended with. A row of `floss-approach` is one network brought to
one target in one way; a row of `floss-descent` one training of such a network by plain gradient descent.
"""

import concurrent.futures
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from scanrnn import approach, propagation, tasks
from scanrnn import flossing as fl
from scanrnn.cells import gaussian, orthogonal
from scanrnn.sweep import grid, sweep

from . import tables

TASKS: dict[str, Any] = {"copy": tasks.delayed_copy, "xor": tasks.delayed_xor, "spatial": tasks.spatial_xor}
INPUTS: dict[str, Any] = {"bits": approach.plain_bits, "signed": approach.signed_bits}

# Training ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """A size of the experiment: of the network, its sequences, its training."""

    d_hidden: int
    num_exponents: int
    length: int
    epochs: int
    between: int  # steps of each flossing during training
    kept: int  # every so many stretches the table keeps one


PAPER = Size(80, 75, 300, 3000, 500, 3)
SMALL = Size(48, 42, 120, 1000, 250, 1)  # of the chapter's live runs


@dataclass(frozen=True)
class Student:
    """The runs of one kind of student and schedule: all that is not a number is the same in them."""

    name: str  # as the table has it
    condition: str = "none"  # or "pre", "both", "upfront"
    make: Callable | None = None  # instead of the vanilla network
    num_exponents: int | None = None  # instead of the size's
    options: dict[str, Any] = field(default_factory=dict)  # of `learn_bits`


def schedule(condition: str, between: int) -> dict[str, Any] | None:
    """When a student is flossed: for 500 steps before training; at epochs 100 and 200 again; or as often, at once."""
    return {
        "none": None,
        "pre": {"epochs": (0,)},
        "both": {"epochs": (0, 100, 200), "later": between},
        "upfront": {"epochs": (0,), "steps": 500 + 2 * between},
    }[condition]


def learn(point: dict[str, Any], *, flossing: dict[str, Any] | None, **options: Any) -> dict[str, Any]:
    """`learn_bits` with its schedule as a dictionary: a store names what it keeps by numbers and functions alone."""
    return fl.learn_bits(point, flossing=None if flossing is None else fl.Flossing(**flossing), **options)


CONDITIONS = ("none", "pre", "both")
VANILLA = tuple(Student("vanilla", condition) for condition in CONDITIONS)


def _with(**options: Any) -> Callable:
    return partial(fl.vanilla, d_hidden=SMALL.d_hidden, **options)


def _gaussian(key: jax.Array, shape: tuple[int, ...], *, gain: float) -> jax.Array:
    return gaussian(gain)(key, shape)


def _orthogonal(key: jax.Array, shape: tuple[int, ...], *, gain: float = 1.0) -> jax.Array:
    return orthogonal(gain)(key, shape)


def _tuned(**options: Any) -> Callable:
    return partial(approach.tuned, d_hidden=SMALL.d_hidden, **options)


def _identity(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The identity, for ReLU networks (Le, Jaitly & Hinton 2015)."""
    del key
    return jax.numpy.eye(shape[0])


CONTROLS = (
    *VANILLA,
    Student("vanilla", "upfront"),
    *(Student(f"k = {k}", condition, num_exponents=k) for k in (1, 8, 24) for condition in ("pre", "both")),
    *(Student(f"gain {g}", make=_with(recurrent_init=partial(_gaussian, gain=g))) for g in (1.5, 2.0)),
    *(Student(f"orthogonal, gain {g}", make=_with(recurrent_init=partial(_orthogonal, gain=g))) for g in (1.0, 1.5)),
    *(Student(f"gain for {x}", make=_tuned(exponent=x)) for x in (-0.1, -0.03)),
    Student("orthogonal, gain for -0.03", make=_tuned(exponent=-0.03, recurrent_init=_orthogonal)),
    *(
        Student(f"{name}", condition, options={"max_norm": norm})
        for name, norm in (("not clipped", np.inf), ("clipped at 1", 1.0))
        for condition in ("none", "pre")
    ),
)


def _gru(d_in: int, d_hidden: int, *, key: jax.Array) -> eqx.nn.GRUCell:
    return eqx.nn.GRUCell(d_in, d_hidden, key=key)


def _lstm(d_in: int, d_hidden: int, *, key: jax.Array) -> eqx.nn.LSTMCell:
    return eqx.nn.LSTMCell(d_in, d_hidden, key=key)


def _relu(x: jax.Array) -> jax.Array:
    return jax.nn.relu(x)


def _leaky(x: jax.Array) -> jax.Array:
    return jax.nn.leaky_relu(x, 0.1)


# The student, and how many of its exponents are flossed: chosen after small trials, none of which did better. The last
# exponents of an LSTM are far below zero, and some of a ReLU network's are -inf, where a unit is off all the time.
CELLS: dict[str, tuple[Callable, int]] = {
    "gru": (partial(fl.reader, _gru, d_hidden=48), 16),
    "lstm": (partial(fl.reader, _lstm, d_hidden=24, states=2), 12),
    "relu": (_with(activation=_relu, recurrent_init=partial(_gaussian, gain=1.4)), 8),
    "leaky_relu": (_with(activation=_leaky, recurrent_init=partial(_gaussian, gain=1.4)), 42),
}
ARCHITECTURES = (
    *(Student(name, condition, make, k) for name, (make, k) in CELLS.items() for condition in CONDITIONS),
    Student("relu, identity", make=_with(activation=_relu, recurrent_init=_identity)),
    Student("lru stack", make=partial(fl.stack, propagation.lru, memory=20.0, width=20)),
)


@dataclass(frozen=True)
class Figure:
    """A table: which students, at which delays, of which size, how many seeds; its parts are the tasks."""

    students: tuple[Student, ...]
    size: Size
    delays: dict[str, tuple[int, ...]]
    seeds: int


TRAINING = {
    "eng23-small": Figure(
        VANILLA, SMALL, {"xor": (4, 8, 12, 16, 20, 24), "copy": (10, 20, 30, 40), "spatial": (10, 20, 30, 40)}, 16
    ),
    "eng23-main": Figure(VANILLA, PAPER, dict.fromkeys(("xor", "copy"), (10, 15, 20, 30, 40)), 8),
    "eng23-controls": Figure(CONTROLS, SMALL, {"xor": (12, 20)}, 8),
    "eng23-architectures": Figure(ARCHITECTURES, SMALL, {"xor": (4, 12, 20)}, 8),
}

# The approach to zero ------------------------------------------------------------------------------------------------

TARGETS = (-0.5, -0.2, -0.1, -0.05, -0.03, -0.02, -0.01, 0.0)
WAYS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "flossed, k = 1": ({"way": approach.flossed}, TARGETS),
    # The mean over many exponents holds the first one back, so its targets go further.
    "flossed, k = 28": (
        {"way": partial(approach.flossed, num_exponents=28)},
        (-0.5, -0.2, -0.1, 0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5),
    ),
    "gain": ({"way": approach.scaled}, TARGETS),
    "orthogonal gain": ({"way": approach.scaled, "recurrent_init": _orthogonal}, TARGETS),
    "linear": ({"way": approach.linear}, TARGETS[:-1]),
}
RATES = tuple(float(f"{10 ** (k / 4):.3g}") for k in range(-10, 3))
STEEP = {"flossed, k = 28": (-0.2, 0.1, 0.2)}  # targets of the descents; of all others:
STEEP_ELSE = (-0.2, -0.05, -0.02)

PARTS = {name: tuple(figure.delays) for name, figure in TRAINING.items()} | {
    "floss-approach": tuple(INPUTS),
    "floss-descent": ("bits",),
}
SEEDS = {"floss-approach": 16, "floss-descent": 16}


def run_figure(figure: str, part: str, steps: int, folder: Path, store: Path) -> None:
    """All runs of one part of a table, into the table; `steps` of 10,000 scale all trainings."""
    start, commit = time.perf_counter(), tables.current_commit()
    cores = os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
    measure = {"floss-approach": _approach, "floss-descent": _descent}.get(figure, partial(_training, figure))
    seeds = TRAINING[figure].seeds if figure in TRAINING else SEEDS[figure]
    with concurrent.futures.ProcessPoolExecutor(cores, mp_context=context) as executor:
        made = measure(part, seeds, steps / 10_000, store=store, executor=executor, progress=True)
    rows = {name: np.concatenate([table[name] for table in made]) for name in made[0]}
    rows = {name: tables.in_double(column) for name, column in rows.items()}
    command = f"python -m tools.paper {figure} {part}" + (f" --steps {steps}" if steps != 10_000 else "")
    about = tables.about_run(command, commit, range(seeds), steps, time.perf_counter() - start)
    about |= {"rows": len(rows["seed"])}
    column = "task" if figure in TRAINING else "inputs"
    tables.merge(folder, figure, rows, about, column=column, part=part, order=PARTS[figure])
    print(f"{figure}, {part}: {about['rows']} rows in {about['seconds']} s", flush=True)


def _training(figure: str, task: str, seeds: int, share: float, **how: Any) -> list[dict[str, np.ndarray]]:
    about, made = TRAINING[figure], []
    for student in about.students:
        print(f"{figure}, {task}: {student.name}, {student.condition}", flush=True)
        made.append(_train(about, student, task, seeds, share, **how))
    return made


def _train(about: Figure, student: Student, task: str, seeds: int, share: float, **how: Any) -> dict[str, np.ndarray]:
    size, delays = about.size, about.delays[task]
    count = student.num_exponents or size.num_exponents
    flossing = schedule(student.condition, size.between)
    run = partial(
        learn,
        student=student.make or partial(fl.vanilla, d_hidden=size.d_hidden),
        task=TASKS[task],
        delays=delays,
        flossing=flossing and flossing | {"num_exponents": count},
        d_in=2 if task == "spatial" else 1,
        length=size.length,
        epochs=max(3, round(share * size.epochs / 100)) * 100,
        spectrum=count,
        **student.options,
    )
    columns = sweep(run, grid(seed=range(seeds)), chunk=1 if size is PAPER else 4, **how)
    rows = seeds * len(delays)
    table: dict[str, np.ndarray] = {
        "student": np.full(rows, student.name),
        "condition": np.full(rows, student.condition),
        "task": np.full(rows, task),
        "delay": np.tile(delays, seeds),
        "seed": np.repeat(columns["seed"], len(delays)),
        "accuracy_end": columns["accuracy_end"].ravel(),
        "diverged": columns["diverged"].ravel(),
    }
    for name, digits in {"accuracy": 4, "first": 4, "last": 4, "gradient": None}.items():
        for i in range(0, columns[name].shape[2], size.kept):
            values = columns[name][:, :, i].ravel()
            table[f"{name}_{i}"] = np.round(values.astype(float), digits) if digits else _significant(values)
    return table


def _approach(part: str, seeds: int, share: float, **how: Any) -> list[dict[str, np.ndarray]]:
    made = []
    for name, (options, targets) in WAYS.items():
        print(f"floss-approach, {part}: {name}", flush=True)
        length = max(1, round(40 * share)) * 100
        run = partial(approach.portrait, inputs=INPUTS[part], length=length, transient=length // 4, **options)
        columns = sweep(run, grid(target=targets, seed=range(seeds)), chunk=8, **how)
        count = len(columns["seed"])
        texts = {"way": np.full(count, name), "inputs": np.full(count, part)}
        made.append(texts | {name: _significant(column, 5) for name, column in columns.items()})
    return made


def _descent(part: str, seeds: int, share: float, **how: Any) -> list[dict[str, np.ndarray]]:
    made = []
    for name, (options, _) in WAYS.items():
        print(f"floss-descent, {part}: {name}", flush=True)
        steps = max(1, round(25 * share)) * 20
        run = partial(approach.descend_from, steps=steps, rates=RATES, **options)
        columns = sweep(run, grid(target=STEEP.get(name, STEEP_ELSE), seed=range(seeds)), chunk=4, **how)
        count = len(columns["seed"])
        scalars = {name: _significant(columns[name], 5) for name in ("target", "seed", "first", "start", "sharpness")}
        texts = {"way": np.full(count, name), "inputs": np.full(count, part)}
        ends = {f"end_{rate:g}": _significant(columns["end"][:, i], 5) for i, rate in enumerate(RATES)}
        made.append(texts | scalars | ends)
    return made


def _significant(column: np.ndarray, digits: int = 4) -> np.ndarray:
    """So many digits, that the table may stay small; integers as they are."""
    return np.array([float(f"{x:.{digits}g}") for x in column]) if column.dtype.kind == "f" else column
