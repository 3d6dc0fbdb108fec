"""Where everything lies, and on what a notebook's numbers depend."""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
import yaml

DEPENDENCIES = ("lib", "book/claims.toml", "book/data", "book/results", "constraints.txt")


@dataclass(frozen=True)
class Project:
    """The checkout at `root`, and the folders that a build fills."""

    root: Path

    @property
    def book(self) -> Path:
        return self.root / "book"

    @property
    def build(self) -> Path:
        return self.root / "_build"

    @property
    def staging(self) -> Path:
        return self.build / "source"

    @property
    def html(self) -> Path:
        return self.build / "html"

    def executed(self, notebook: Path) -> Path:
        return self.build / "executed" / notebook.name

    def record(self, notebook: Path) -> Path:
        return self.build / "records" / f"{notebook.stem}.json"

    def notebooks(self) -> list[Path]:
        """The notebooks of `_toc.yml`, in reading order."""
        paths = [self.root / f"{page}.ipynb" for page in self.pages()]
        return [path for path in paths if path.exists()]

    def pages(self) -> list[str]:
        """The pages of `_toc.yml` without suffix, in reading order."""
        return list(_pages(yaml.safe_load((self.root / "_toc.yml").read_text())))

    def key(self, notebook: Path) -> str:
        """A hash of everything that the numbers in the executed notebook depend on; prose is not part of it."""
        cells = [
            [cell.source, sorted(cell.metadata.get("tags", []))]
            for cell in nbformat.read(notebook, as_version=4).cells
            if cell.cell_type == "code"
        ]
        scale = os.environ.get("SCANRNN_SCALE", "teaching")
        digest = hashlib.sha256(json.dumps([cells, scale, platform.python_version()]).encode())
        digest.update(tree_hash(*(self.root / name for name in DEPENDENCIES)).encode())
        return digest.hexdigest()


def here() -> Project:
    return Project(Path(__file__).resolve().parents[1])


def tree_hash(*paths: Path) -> str:
    """A hash of the names and contents of files and of all files in folders; a missing path is an empty folder."""
    digest = hashlib.sha256()
    for top in paths:
        for path in sorted([top, *top.rglob("*")]):
            inside = path.relative_to(top.parent)
            if path.is_file() and "__pycache__" not in inside.parts and not path.name.startswith("."):
                digest.update(f"{inside}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all, whenever the process is interrupted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


@contextlib.contextmanager
def one_build_at_a_time(project: Project) -> Iterator[None]:
    """Wait until no other build of this checkout runs. The system lets go of the lock even if we are killed."""
    project.build.mkdir(exist_ok=True)
    with (project.build / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another build of this checkout to end ...", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _pages(entry: dict) -> Iterator[str]:
    for name in ("root", "file"):
        if name in entry:
            yield entry[name]
    for name in ("parts", "chapters", "sections"):
        for child in entry.get(name, []):
            yield from _pages(child)
