"""What every notebook of the book must be like, read from its source; none is executed here."""

import ast
import re
import statistics
from pathlib import Path

import nbformat
import pytest

from scanrnn import claims
from tools.address import bootstrap_source
from tools.project import here

PROJECT = here()
NOTEBOOKS = sorted(PROJECT.book.glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path):
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def teaching_cells(path: Path) -> list:
    """Code cells but the bootstrap cell and solutions."""
    return [cell for cell in code_cells(path)[1:] if "solution" not in tags(cell)]


def lines(cell) -> int:
    return sum(bool(line.strip()) for line in cell.source.splitlines())


def strings(path: Path) -> set[str]:
    """All string constants in the code cells."""
    trees = [ast.parse(cell.source) for cell in code_cells(path)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_the_table_of_contents_lists_every_notebook():
    assert PROJECT.notebooks() == NOTEBOOKS


def test_every_page_of_the_table_of_contents_exists():
    written = {f"book/{path.stem}" for path in PROJECT.book.iterdir() if path.suffix in (".md", ".ipynb")}
    assert set(PROJECT.pages()) <= written | {"book/reproduced"}  # the build generates that one


@each_notebook
def test_carries_no_outputs(path):
    nbformat.validate(read(path))
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(path)), (
        f"{path.name} carries outputs: run .venv/bin/nbstripout book/*.ipynb"
    )


@each_notebook
def test_first_code_cell_is_the_bootstrap_cell(path):
    first = code_cells(path)[0]
    assert first.source == bootstrap_source(PROJECT.root), "run `make address` to write it anew from its template"
    assert "hide-cell" in tags(first)


def test_bootstrap_cell_is_short():
    assert len(bootstrap_source(PROJECT.root).splitlines()) <= 40


@each_notebook
def test_code_cells_are_short(path):
    too_long = [cell.source for cell in code_cells(path) if len(cell.source.splitlines()) > 40]
    assert not too_long, f"cells of more than 40 lines: {too_long}"
    assert statistics.median(lines(cell) for cell in teaching_cells(path)) <= 6


@each_notebook
def test_functions_are_short(path):
    nodes = [node for cell in code_cells(path)[1:] for node in ast.walk(ast.parse(cell.source))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    too_long = [f.name for f in functions if (f.end_lineno or f.lineno) - f.lineno >= 15]
    assert not too_long, f"longer than 15 lines, so they belong into the library: {too_long}"


@each_notebook
def test_at_most_one_figure_per_cell(path):
    for cell in code_cells(path):
        assert len(re.findall(r"\bfigures\.show\(", cell.source)) <= 1, cell.source


@each_notebook
def test_directives_have_colons(path):
    prose = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    assert not [text for text in prose if re.search(r"^\s*`{3,}\{", text, re.MULTILINE)], (
        "on Colab a directive in backticks shows as raw code: write :::{name}"
    )


@each_notebook
def test_checks_the_claims_of_its_chapter_and_no_others(path):
    named = {text for text in strings(path) if re.fullmatch(r"c\d+(-[a-z0-9]+)+", text)}
    assert named == {claim.id for claim in claims.load().values() if claim.chapter == path.stem}


def test_every_claim_belongs_to_a_notebook():
    assert {claim.chapter for claim in claims.load().values()} <= {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("claim", claims.load().values(), ids=lambda claim: claim.id)
def test_the_rival_put_in_for_the_measured_value_fails(claim, monkeypatch):
    monkeypatch.delenv("SCANRNN_RECORDS", raising=False)
    error = None if claim.kind == "exact" else claim.tolerance / 4
    claims.check(claim.id, claim.expected, error)
    with pytest.raises(claims.ClaimFailed):
        claims.check(claim.id, claim.rival, error)
