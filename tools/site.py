"""Step 3 of the build: lay out the executed book with Sphinx, warnings as errors, into `_build/html`.

Sphinx reads a staged copy, `_build/source`: today's prose with the outputs of the executed copies, each picture's alt
text and caption where myst-nb looks for them, and MathJax from the installed Python package.
"""

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

from tools.project import Project, tree_hash, write

MATHJAX = ("tex-mml-chtml.js", "output/chtml/fonts", "input/tex/extensions")


class SiteFailed(Exception):
    """A notebook cannot be laid out, or Sphinx stopped or warned."""


def run(project: Project) -> bool:
    """Build the site unless it is up to date; whether it had to be built."""
    stage(project)
    stamp, key = project.build / "site.key", _key(project)
    if stamp.exists() and stamp.read_text() == key and (project.html / "index.html").exists():
        print("site: up to date", flush=True)
        return False
    # From scratch, since what an interrupted Sphinx leaves behind cannot be trusted.
    stamp.unlink(missing_ok=True)
    for name in ("html", ".doctrees", "jupyter_execute"):
        shutil.rmtree(project.build / name, ignore_errors=True)
    command = [Path(sys.executable).with_name("jupyter-book"), "build", project.staging, "--path-output", project.root]
    environment = {**os.environ, "PYTHONPATH": str(project.root)}  # for the extensions in tools
    print(f"site: laying out {len(project.pages())} pages ...", flush=True)
    options = ["-W", "-n", "--keep-going", "-q"]
    done = subprocess.run([*command, *options], env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SiteFailed(f"Sphinx stopped or warned; its warnings stand above.\n{done.stdout}")
    write(stamp, key)
    return True


def stage(project: Project) -> None:
    """Fill `_build/source` with what Sphinx is to read."""
    shutil.rmtree(project.staging, ignore_errors=True)
    shutil.copytree(project.book, project.staging / "book", ignore=shutil.ignore_patterns("*.ipynb", ".*", "results"))
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(project.root / name, project.staging / name)
    for notebook in project.notebooks():
        try:
            page = with_outputs(_read(notebook), _read(project.executed(notebook)))
        except ValueError as error:
            raise SiteFailed(f"{notebook.relative_to(project.root)}: {error}") from error
        nbformat.write(page, project.staging / "book" / notebook.name)
    _copy_mathjax(project.staging / "assets" / "mathjax")


def with_outputs(source: nbformat.NotebookNode, executed: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The source, whose prose may be newer, with the outputs of the executed copy, whose code is the same."""
    source.metadata.language_info = executed.metadata.language_info
    pairs = zip(_code_cells(source), _code_cells(executed), strict=True)
    for cell, done in pairs:
        cell.outputs, cell.execution_count = done.outputs, done.execution_count
        _lift_figure(cell)
    bootstrap = _code_cells(source)[0]
    bootstrap.metadata["mystnb"] = {"code_prompt_show": "Setup and versions", "code_prompt_hide": "Setup and versions"}
    return source


def _lift_figure(cell: nbformat.NotebookNode) -> None:
    """Move what `figures.show` says about its picture to the cell's metadata, and drop the caption shown elsewhere."""
    figures = [output for output in cell.outputs if "alt" in _about(output)]
    if len(figures) > 1:
        raise ValueError(f"a cell may show one figure, but one shows {[_about(figure)['name'] for figure in figures]}")
    for figure in figures:
        about = _about(figure)
        cell.metadata["mystnb"] = {
            "image": {"alt": about["alt"]},
            "figure": {"caption": about["caption"], "name": about["name"]},
        }
        cell.outputs = [output for output in cell.outputs if _about(output).get("role") != "caption"]


def _about(output: nbformat.NotebookNode) -> dict:
    return output.get("metadata", {}).get("scanrnn", {})


def _code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def _copy_mathjax(target: Path) -> None:
    package = importlib.metadata.distribution("sphinx-mathjax-offline")
    source = Path(str(package.locate_file("sphinx-mathjax-offline"))) / "static" / "mathjax"
    for name in MATHJAX:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        else:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)


def _key(project: Project) -> str:
    """What the pages depend on: their sources, the docstrings, these tools, and the installed packages."""
    packages = sorted(f"{dist.name}=={dist.version}" for dist in importlib.metadata.distributions())
    files = tree_hash(project.staging, project.root / "lib", project.root / "tools")
    return hashlib.sha256("\n".join([files, *packages]).encode()).hexdigest()
