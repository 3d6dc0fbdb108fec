"""Step 1 of the build: execute the notebooks whose key changed, each in a kernel of its own.

A notebook leaves `_build/executed/<name>.ipynb` and, written last, `_build/records/<name>.json`: the key, what its
claims measured, seconds, peak memory and versions. A copy without a record of the current key counts for nothing, so
an interruption at any moment costs one execution and no more.
"""

import json
import os
import re
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, DeadKernelError

from tools.progress import Progress
from tools.project import Project, write

CELL_TIMEOUT = 600  # seconds
SHOWN_VERSIONS = ("jax", "jaxlib", "numpy", "equinox", "optax", "matplotlib", "scanrnn")

# Runs in the kernel after the last cell. Linux counts kibibytes, macOS bytes.
MEASURE = f"""
import importlib.metadata, json, platform, resource, sys
versions = {{"python": platform.python_version()}}
for name in {SHOWN_VERSIONS}:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
print(json.dumps({{"peak_memory_mb": round(peak), "versions": versions}}))
"""


class ExecutionFailed(Exception):
    """A cell of a notebook raised, took too long or killed its kernel."""


def run(project: Project) -> int:
    """Bring all executed copies and records up to date; the number of notebooks that had to be executed."""
    notebooks = project.notebooks()
    _remove_what_no_notebook_owns(project, notebooks)
    executed = 0
    for number, notebook in enumerate(notebooks, start=1):
        title = f"[{number}/{len(notebooks)}] {notebook.stem}"
        if read_record(project, notebook) is not None:
            print(f"{title}: up to date", flush=True)
        else:
            _execute(project, notebook, title)
            executed += 1
    return executed


def read_record(project: Project, notebook: Path) -> dict | None:
    """The record of a notebook if it is that of the current key and the executed copy is there, else None."""
    if not project.executed(notebook).exists():
        return None
    try:
        record = json.loads(project.record(notebook).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return record if record.get("key") == project.key(notebook) else None


def _execute(project: Project, notebook: Path, title: str) -> None:
    project.record(notebook).unlink(missing_ok=True)
    project.executed(notebook).unlink(missing_ok=True)
    key, started = project.key(notebook), time.perf_counter()
    with tempfile.TemporaryDirectory() as records:
        copy, measured = _run_cells(project, notebook, title, records)
        claims = _read_claims(Path(records) / f"{notebook.stem}.claims.jsonl")
    seconds = round(time.perf_counter() - started, 1)
    scale = os.environ.get("SCANRNN_SCALE", "teaching")
    record = {"key": key, "scale": scale, "seconds": seconds, **measured, "claims": claims}
    write(project.executed(notebook), nbformat.writes(copy))
    write(project.record(notebook), json.dumps(record, indent=1) + "\n")
    print(f"{title}: {len(claims)} claims checked, {seconds:.0f} s, {measured['peak_memory_mb']} MB", flush=True)


def _run_cells(project: Project, notebook: Path, title: str, records: str) -> tuple[nbformat.NotebookNode, dict]:
    copy = nbformat.read(notebook, as_version=4)
    copy.cells.append(nbformat.v4.new_code_cell(MEASURE))
    code = [index for index, cell in enumerate(copy.cells) if cell.cell_type == "code"]
    at = 0

    def started(cell, cell_index):
        nonlocal at
        at = cell_index
        progress.show(code.index(cell_index) + 1)

    client = NotebookClient(
        copy,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        on_cell_execute=started,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # else each kernel warns that loopback is not encrypted
    )
    environment = {**os.environ, "SCANRNN_RECORDS": records}
    environment.setdefault("OPENBLAS_NUM_THREADS", "1")
    with Progress(title, len(code) - 1) as progress:
        try:
            client.execute(cwd=str(project.book), env=environment)
        except Exception as error:
            if hasattr(client, "_async_cleanup_kernel_future"):  # nbclient's reaction to SIGINT and SIGTERM
                raise KeyboardInterrupt from error
            if not isinstance(error, CellControlSignal | DeadKernelError):
                raise
            source = "\n".join(f"    {line}" for line in copy.cells[at].source.splitlines())
            where = f"{notebook.relative_to(project.root)}: cell {at + 1} of {len(copy.cells) - 1} failed"
            raise ExecutionFailed(f"{where}\n\n{source}\n\n{_reason(copy.cells[at], error)}") from error
    measured = copy.cells.pop()
    return copy, json.loads(measured.outputs[0].text)


def _reason(cell: nbformat.NotebookNode, error: Exception) -> str:
    """The traceback as the notebook shows it, or what nbclient says when there is none."""
    for output in cell.outputs:
        if output.output_type == "error":
            return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(output.traceback))
    return f"{type(error).__name__}: {error}"


def _read_claims(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _remove_what_no_notebook_owns(project: Project, notebooks: list[Path]) -> None:
    owned = {path for notebook in notebooks for path in (project.executed(notebook), project.record(notebook))}
    for folder in ("executed", "records"):
        for path in (project.build / folder).glob("*"):
            if path not in owned:
                path.unlink()
