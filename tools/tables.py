"""Result tables in `book/results`: the rows of one part put in their place, and what produced them beside them."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scanrnn import results


def about_run(command: str, commit: str, seeds: Sequence[Any], steps: int, seconds: float) -> dict[str, Any]:
    """Where the rows come from; `commit` as it was when the run began."""
    return {
        "command": command,
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{_processor()}, {os.cpu_count() or 1} cores",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "equinox", "optax")},
        "seeds": list(seeds),
        "steps": steps,
        "seconds": round(seconds),  # of this call; finished chunks that it found cost nothing
    }


def merge(
    folder: Path,
    figure: str,
    rows: dict[str, np.ndarray],
    about: dict[str, Any],
    *,
    column: str,
    part: str,
    order: Sequence[str],
) -> None:
    """Put `rows` in the place of the old ones with the same `part` in `column`; the parts stand in the given order."""
    table_path, about_path = folder / f"{figure}.csv", folder / f"{figure}.json"
    parts, abouts = {part: rows}, {part: about}
    if table_path.is_file() and about_path.is_file():
        table, known = results.read(table_path), json.loads(about_path.read_text(encoding="utf-8"))
        for kind in order:
            if kind != part and kind in known:
                parts[kind], abouts[kind] = results.select(table, **{column: kind}), known[kind]
    order = [kind for kind in order if kind in parts]
    folder.mkdir(parents=True, exist_ok=True)
    results.write(table_path, {name: np.concatenate([parts[kind][name] for kind in order]) for name in rows})
    text = json.dumps({kind: abouts[kind] for kind in order}, indent=1)
    temporary = about_path.with_suffix(".json.part")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, about_path)


def in_double(column: np.ndarray) -> np.ndarray:
    """Single-precision 0.1 as 0.1, not as 0.10000000149, whatever other rows stand beside it."""
    return np.array([float(str(x)) for x in column]) if column.dtype == np.float32 else column


def current_commit() -> str:
    """The commit of the sources, marked if they are not what it holds."""
    git = ["git", "-c", "safe.directory=*"]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        command = [*git, "status", "--porcelain", "--untracked-files=no", "--", "lib", "tools"]
        changed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + (" with uncommitted changes" if changed else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
