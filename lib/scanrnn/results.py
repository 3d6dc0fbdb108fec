r"""Result tables of long runs: columns in `book/results/<name>.csv`, where they come from in `<name>.json` beside it.

A table is a dictionary of columns of one length, one row for each run. The best learning rate of a group of runs is the
one with the least mean loss over the seeds; a rate at which a run diverged has no mean, and is never the best.
"""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

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
