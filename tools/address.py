"""`make address ADDRESS=https://github.com/owner/name`: tell the whole project where it lives.

The one setting is `Repository` in `pyproject.toml`; every other place repeats it. The bootstrap cell of each notebook
is written anew from its template, so without ADDRESS this only brings the notebooks up to date with the template.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat

from tools.project import here

ALLOWED = r"https://github\.com/[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9._-]+"
# Where an owner and a name stand after one another: GitHub itself, Colab's and Binder's addresses.
HOSTS = r"(github\.com/|/github/|/gh/)"


def current(root: Path) -> str:
    """The address that `pyproject.toml` names."""
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def change(root: Path, address: str) -> None:
    """Write `address` wherever the project says where it lives."""
    if not re.fullmatch(ALLOWED, address):
        raise SystemExit(f"ADDRESS must look like https://github.com/owner/name, got {address!r}")
    old, new = _slug(current(root)), _slug(address)
    for path in _tracked(root):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a picture
            continue
        changed = re.sub(rf"{HOSTS}{re.escape(old)}(?![\w-])", rf"\g<1>{new}", text)
        if changed != text:
            path.write_text(changed, encoding="utf-8")


def sync_bootstrap_cells(root: Path) -> None:
    """Write the template into the bootstrap cell, the first code cell, of each notebook."""
    source = bootstrap_source(root)
    for path in sorted((root / "book").rglob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
        if cell.source != source:
            cell.source = source
            nbformat.write(notebook, path)


def bootstrap_source(root: Path) -> str:
    return (root / "tools" / "bootstrap_cell.py").read_text(encoding="utf-8").rstrip("\n")


def _slug(address: str) -> str:
    return address.removeprefix("https://github.com/")


def _tracked(root: Path) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True).stdout
    return [root / name for name in listed.split("\0") if name and (root / name).is_file()]


if __name__ == "__main__":
    root = here().root
    if len(sys.argv) > 1:
        change(root, sys.argv[1])
    sync_bootstrap_cells(root)
    print(f"The project's address is {current(root)}")
