"""What travels with the package, and a chapter alone: no checkout around it, the oldest supported jax below it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tools.project import here

PROJECT = here()
OLDEST_JAX = "0.5.3"
MAX_DATA = 8 * 2**20

RUN_NOTEBOOK = """
import pathlib, sys
import nbformat
from nbclient import NotebookClient
path = pathlib.Path(sys.argv[1])
notebook = nbformat.read(path, as_version=4)
NotebookClient(notebook, kernel_name="python3", timeout=600).execute(cwd=str(path.parent))
nbformat.write(notebook, path)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(PROJECT.root)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_carries_the_claims_the_result_tables_and_the_data_and_little_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        claims = archive.read("scanrnn/_data/claims.toml")
    assert claims == (PROJECT.book / "claims.toml").read_bytes()
    folders = {
        f"scanrnn/_data/{folder}/{path.name}"
        for folder in ("results", "data")
        for path in (PROJECT.book / folder).iterdir()
    }
    assert {f"scanrnn/_data/data/text-embeddings.{suffix}" for suffix in ("npz", "json")} <= folders
    data = {name for name in sizes if "/_data/" in name}
    assert data == folders | {"scanrnn/_data/claims.toml"}
    assert sum(sizes[name] for name in data) <= MAX_DATA
    assert all(name.startswith(("scanrnn/", "scanrnn-")) for name in sizes)


def test_the_oldest_jax_is_the_one_that_the_package_allows():
    dependencies = tomllib.loads((PROJECT.root / "pyproject.toml").read_text())["project"]["dependencies"]
    assert any(text.startswith(f"jax>={OLDEST_JAX}") for text in dependencies)


def versions(python: Path) -> dict[str, str]:
    command = [str(python), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {package["name"].lower(): package["version"] for package in listed}


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without what this test run or a checkout has set."""
    ours = ("SCANRNN", "PYTEST", "PYTHONPATH", "VIRTUAL_ENV", "JUPYTER")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | more


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """A Python as Colab could have it: Jupyter and the oldest jax, nothing of ours."""
    if sys.version_info >= (3, 14):
        pytest.skip(f"jaxlib {OLDEST_JAX} has no wheel for this Python")
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    packages = [f"jax=={OLDEST_JAX}", f"jaxlib=={OLDEST_JAX}", "ipykernel", "nbclient"]
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True, env=clean_environment())
    return python


@pytest.mark.slow
@pytest.mark.parametrize("notebook", PROJECT.notebooks(), ids=lambda path: path.stem)
def test_a_chapter_runs_alone(notebook, wheel, bare_python, tmp_path):
    subprocess.run([str(bare_python), "-m", "pip", "uninstall", "--quiet", "--yes", "scanrnn"], check=True)
    before = versions(bare_python)
    shutil.copy(notebook, tmp_path)
    (tmp_path / "records").mkdir()
    environment = clean_environment(SCANRNN_INSTALL=str(wheel), SCANRNN_RECORDS=str(tmp_path / "records"))
    command = [str(bare_python), "-c", RUN_NOTEBOOK, str(tmp_path / notebook.name)]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)

    after = versions(bare_python)
    assert after["jax"] == after["jaxlib"] == OLDEST_JAX
    assert after["numpy"] == before["numpy"]
    assert "scanrnn" in after
    claims = tomllib.loads((PROJECT.book / "claims.toml").read_text())
    lines = (tmp_path / "records" / f"{notebook.stem}.claims.jsonl").read_text().splitlines()
    checked = {json.loads(line)["id"] for line in lines}
    assert checked == {id for id, claim in claims.items() if claim["chapter"] == notebook.stem}
    first = next(
        cell for cell in json.loads((tmp_path / notebook.name).read_text())["cells"] if cell["cell_type"] == "code"
    )
    text = "".join("".join(output.get("text", "")) for output in first["outputs"])
    assert re.search(rf"Python [\d.]+, jax {re.escape(OLDEST_JAX)} on cpu, scanrnn [\d.]+", text), text


@pytest.mark.slow
def test_the_bootstrap_cell_says_so_when_it_cannot_install(bare_python, tmp_path):
    subprocess.run([str(bare_python), "-m", "pip", "uninstall", "--quiet", "--yes", "scanrnn"], check=True)
    cell = PROJECT.root / "tools" / "bootstrap_cell.py"
    environment = clean_environment(SCANRNN_INSTALL=str(tmp_path / "missing-0.1-py3-none-any.whl"))
    done = subprocess.run([str(bare_python), str(cell)], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "pip could not install scanrnn" in done.stderr
    if "SET_ME" in cell.read_text().split("ADDRESS = ")[1].splitlines()[0]:
        done = subprocess.run(
            [str(bare_python), str(cell)], env=clean_environment(), cwd=tmp_path, capture_output=True, text=True
        )
        assert "does not know its repository's address yet" in done.stderr
