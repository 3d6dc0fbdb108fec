r"""Result tables of long runs: columns in `book/results/<name>.csv`, where they come from in `<name>.json` beside it.

A table is a dictionary of columns of one length, one row for each run. The best learning rate of a group of runs is the
one with the least mean loss over the seeds; a rate at which a run diverged has no mean, and is never the best.
"""

import csv
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped
from numpy.typing import ArrayLike

from . import _resources

Table = dict[str, Shaped[np.ndarray, " rows"]]


def read(name: str | Path) -> Table:
    """The table `name` ("zo24-fig3a"), from the checkout or the installed package; or the file at a `Path`.

    Columns of whole numbers are integers, those of numbers floats, those of True and False booleans, all others
    strings. Raises `FileNotFoundError` where there is no such table, `ValueError` where it has no names of columns, or
    a row of another length.
    """
    path = name if isinstance(name, Path) else _resources.find(f"results/{name}.csv")
    with path.open(newline="", encoding="utf-8") as file:
        names, *rows = list(csv.reader(file)) or [[]]
    if not names:
        raise ValueError(f"{path}: must have the names of the columns in line 1, got an empty line or none")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(names):
            raise ValueError(f"{path}, line {number}: must have {len(names)} entries, got {len(row)}")
    return {name: _column([row[i] for row in rows]) for i, name in enumerate(names)}


def provenance(name: str) -> dict[str, Any]:
    """Where the table `name` comes from: commands, commits, versions, seeds, device, seconds. Errors: as `read`."""
    return json.loads(_resources.find(f"results/{name}.json").read_text(encoding="utf-8"))


def write(path: str | os.PathLike, table: Mapping[str, Any]) -> None:
    """The table as CSV, the same bytes for the same columns; each number so that it reads back as itself.

    Raises `ValueError` unless all columns have one axis and one length.
    """
    columns = {name: np.asarray(column) for name, column in table.items()}
    shapes = {name: column.shape for name, column in columns.items()}
    if len(set(shapes.values())) != 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"table must have columns of one axis and one length, got {shapes}")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*([_text(x) for x in column] for column in columns.values()), strict=True))
    temporary = Path(path).with_suffix(".part")
    try:
        temporary.write_text(buffer.getvalue(), encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def select(table: Mapping[str, np.ndarray], **where: Any) -> Table:
    """The rows in which each named column has the given value (real numbers: up to rounding), or one of several."""
    keep = np.ones(len(next(iter(table.values()))), bool)
    for name, wanted in where.items():
        if name not in table:
            raise ValueError(f"the table has the columns {list(table)}, got {name!r}")
        column, values = table[name], np.atleast_1d(wanted)
        if column.dtype.kind == "f":
            keep &= np.isclose(column[:, None], values[None].astype(float), rtol=1e-6, atol=0).any(axis=1)
        else:
            keep &= np.isin(column, values)
    return {name: column[keep] for name, column in table.items()}


def pivot(table: Mapping[str, np.ndarray], column: str, *axes: str) -> Shaped[np.ndarray, "..."]:
    """`column` as an array with one axis for each of the columns `axes`, along which their values ascend.

    Raises `ValueError` unless the table has these columns, and exactly one row for each combination of their values.
    """
    for name in (column, *axes):
        if name not in table:
            raise ValueError(f"the table has the columns {list(table)}, got {name!r}")
    ranks = [np.unique(table[name], return_inverse=True)[1].ravel() for name in axes]
    shape = tuple(int(rank.max(initial=-1)) + 1 for rank in ranks)
    places = np.ravel_multi_index(ranks, shape) if table[column].size else np.zeros(0, int)
    if not np.array_equal(np.sort(places), np.arange(np.prod(shape, dtype=int))):
        raise ValueError(f"table must have one row for each combination of {axes}, {shape}, got {places.size} rows")
    values = np.empty_like(table[column])
    values[places] = table[column]
    return values.reshape(shape)


def best_rate(table: Mapping[str, np.ndarray], *, loss: str = "final_loss") -> tuple[float, Table, bool]:
    """The learning rate with the least mean loss, its rows, and whether it lies at the edge of the grid of rates.

    `table` holds the runs of one group (see `select`). Rates at which a run diverged are left out; if none is left, the
    rate is NaN and there are no rows.
    """
    rates = np.unique(table["learning_rate"])
    if len(rates) == 0:
        raise ValueError("table must have at least one row, got none")
    means = np.array([np.mean(select(table, learning_rate=rate)[loss]) for rate in rates])
    if not np.isfinite(means).any():
        return float("nan"), {name: column[:0] for name, column in table.items()}, False
    best = int(np.nanargmin(np.where(np.isfinite(means), means, np.nan)))
    at_edge = len(rates) > 1 and best in (0, len(rates) - 1)
    return float(rates[best]), select(table, learning_rate=rates[best]), at_edge


def best_of_each(
    table: Mapping[str, np.ndarray], by: str | Sequence[str] = "teacher_seed", *, loss: str = "final_loss"
) -> np.ndarray:
    """The least loss over the learning rates, for each value (or combination) of `by`, in ascending order of it.

    Diverged runs are no candidates; where all diverged, the least loss is infinite.
    """
    names = [by] if isinstance(by, str) else list(by)
    keys = np.stack([np.unique(table[name], return_inverse=True)[1].ravel() for name in names], axis=1)  # ranks
    losses = np.where(np.isfinite(table[loss]), table[loss], np.inf)
    _, group = np.unique(keys, axis=0, return_inverse=True)
    least = np.full(group.max(initial=-1) + 1, np.inf)
    np.minimum.at(least, group.ravel(), losses)
    return least


def series(table: Mapping[str, np.ndarray], column: str) -> tuple[np.ndarray, np.ndarray]:
    """The columns `column_0`, `column_5`, ... as their numbers and one row of values for each row of the table.

    Raises `ValueError` where there is no such column.
    """
    pattern = re.compile(re.escape(column) + r"_(\d+)")
    numbers = {name: int(found[1]) for name in table if (found := pattern.fullmatch(name))}
    if not numbers:
        raise ValueError(f"the table has the columns {list(table)}, got {column!r}, to be followed by numbers")
    names = sorted(numbers, key=lambda name: numbers[name])
    return np.array([numbers[name] for name in names]), np.stack([table[name] for name in names], axis=1)


class Interval(NamedTuple):
    """A number with its 95 % confidence interval; as a string "12.3 [11.8, 13.1]", to three digits."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        value, low, high = (np.format_float_positional(x, 3, fractional=False, trim="-") for x in self)
        return f"{value} [{low}, {high}]"


def share(flags: ArrayLike) -> Interval:
    r"""The share p of true ones among n independent trials, with Wilson's score interval (Wilson 1927),

    $$\frac{p+\frac{z^2}{2n}\pm z\sqrt{\frac{p(1-p)}n+\frac{z^2}{4n^2}}}{1+\frac{z^2}n},\qquad z=1.96 .$$

    Unlike the usual ± 2 standard errors it stays within 0 ... 1, and is not empty where all or none succeed. Raises
    `ValueError` for no trials, `TypeError` for what is not boolean.
    """
    flags = np.asarray(flags)
    if flags.dtype != bool:
        raise TypeError(f"flags must be boolean, got {flags.dtype}")
    if flags.size == 0:
        raise ValueError("flags must hold at least one trial, got none")
    p, n, z = float(flags.mean()), flags.size, 1.959964
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return Interval(p, (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n))


def median(values: ArrayLike, *, draws: int = 4000) -> Interval:
    """The sample median, with the interval between the 2.5 and 97.5 % quantiles of bootstrapped medians.

    Always the same draws for the same number of values. Raises `ValueError` for no values or more than one axis; a
    value that is not a number gives NaN.
    """
    values = np.asarray(values, float)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"values must have one axis and at least one entry, got shape {values.shape}")
    drawn = np.random.default_rng(0).choice(values, (draws, values.size))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return Interval(float(np.median(values)), float(low), float(high))


def _text(value: Any) -> str:
    # NumPy writes a single-precision 1000000.0 as 1e+06, which would be read and written again as 1000000.0.
    return repr(float(str(value))) if isinstance(value, np.floating) else str(value)


def _column(texts: list[str]) -> np.ndarray:
    if texts and all(text in ("True", "False") for text in texts):
        return np.array([text == "True" for text in texts])
    for kind in (int, float):
        try:
            return np.array([kind(text) for text in texts])
        except ValueError:
            continue
    return np.array(texts)
