"""Files that repeat one another agree: dependencies, address, what the wheel carries."""

import re
import subprocess
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement

from scanrnn import __name__ as library
from tools.address import change, current
from tools.project import here

ROOT = here().root
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ADDRESS = current(ROOT)
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


def tracked_texts() -> dict[str, str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    texts = {}
    for name in listed.splitlines():
        try:
            texts[name] = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue
    return texts


def constraints(python: str) -> dict[str, str]:
    """The versions of constraints.txt that hold for one Python on Linux."""
    environment = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux"}
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.lstrip().startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate(environment):
                assert requirement.name not in pinned, f"{requirement.name} is pinned twice for Python {python}"
                pinned[requirement.name] = next(iter(requirement.specifier)).version
    return pinned


def requirements() -> list[Requirement]:
    extras = PYPROJECT["optional-dependencies"].values()
    return [Requirement(text) for text in [*PYPROJECT["dependencies"], *(text for extra in extras for text in extra)]]


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_satisfy_every_dependency(python):
    assert PYPROJECT["requires-python"] == f">={PYTHONS[0]}"
    pinned = constraints(python)
    for requirement in requirements():
        assert requirement.name in pinned, f"{requirement.name} is not in constraints.txt: run `make constraints`"
        version = pinned[requirement.name]
        assert requirement.specifier.contains(version), (
            f"constraints.txt has {requirement.name} {version}: {requirement}"
        )


def test_constraints_say_how_they_are_made_and_name_no_index():
    text = (ROOT / "constraints.txt").read_text()
    assert "make constraints" in text.splitlines()[1]
    assert "://" not in text
    assert "--index" not in text
    assert "--find-links" not in text


def test_every_dependency_has_a_lower_bound():
    unbounded = [str(r) for r in requirements() if not any(s.operator in (">=", "==") for s in r.specifier)]
    assert not unbounded


def test_the_library_pins_nothing():
    # On Colab an upper bound would move, or refuse, what is installed there.
    bounded = [text for text in PYPROJECT["dependencies"] if re.search(r"<|==|~=", text)]
    assert not bounded


def test_conda_installs_the_package_under_the_same_constraints():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(item for item in environment["dependencies"] if str(item).startswith("python="))
    assert python.removeprefix("python=") in PYTHONS
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert pip == ["-c constraints.txt", "-e .[book,test]"]
    # Whatever else conda would install could disagree with constraints.txt.
    names = {item.split("=")[0] for item in environment["dependencies"] if isinstance(item, str)}
    assert names == {"python", "pip"}


def test_the_address_is_the_same_everywhere():
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert config["repository"]["url"] == ADDRESS
    assert citation["repository-code"] == ADDRESS
    assert f'ADDRESS = "{ADDRESS}"' in (ROOT / "tools/bootstrap_cell.py").read_text()
    name = ADDRESS.rsplit("/", 1)[1]
    pattern = rf"(?:github\.com|/github|/gh)/([\w.-]+/{re.escape(name)})\b"
    for path, text in tracked_texts().items():
        for found in re.findall(pattern, text):
            assert f"https://github.com/{found}" == ADDRESS, f"{path} names another address: {found}"


def test_no_install_command_names_another_address_or_a_bare_package():
    for path, text in tracked_texts().items():
        if path.startswith("tests/"):
            continue
        for source in re.findall(r"git\+(?:https?|ssh)://[^\s\"'`\\)>]+", text):
            assert source.removeprefix("git+").removesuffix(".git") == ADDRESS, f"{path} installs from {source}"
        bare = re.findall(rf"(?:pip3?|uv|conda|mamba) (?:install|add)[^\n]*[\s\"']{library}(?![\w/.-])", text)
        assert not bare, f"{path} installs a bare package name, which somebody else could own: {bare}"


def test_while_the_address_is_unset_nobody_can_own_it():
    owner = ADDRESS.removeprefix("https://github.com/").split("/")[0]
    assert owner == "SET_ME" or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*", owner)


def make_checkout(folder, address):
    slug = address.removeprefix("https://github.com/")
    (folder / "pyproject.toml").write_text(f'[project.urls]\nRepository = "{address}"\n')
    (folder / "README.md").write_text(
        f"git+{address} https://colab.research.google.com/github/{slug}/blob/main/x.ipynb {address}.\n"
        f"https://mybinder.org/v2/gh/{slug}/main {address}-and-more docs/{slug}\n"
    )
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["git", "add", "."], cwd=folder, check=True)


def test_change_of_address_reaches_every_place_and_nothing_else(tmp_path):
    make_checkout(tmp_path, "https://github.com/first/memory")
    change(tmp_path, "https://github.com/someone/memory")
    change(tmp_path, "https://github.com/other/curse.2")
    assert current(tmp_path) == "https://github.com/other/curse.2"
    assert (tmp_path / "README.md").read_text() == (
        "git+https://github.com/other/curse.2 "
        "https://colab.research.google.com/github/other/curse.2/blob/main/x.ipynb https://github.com/other/curse.2.\n"
        "https://mybinder.org/v2/gh/other/curse.2/main "
        "https://github.com/first/memory-and-more docs/first/memory\n"
    )


@pytest.mark.parametrize(
    "address", ["http://github.com/a/b", "https://example.org/a/b", "a/b", "https://github.com/a_b/c"]
)
def test_an_address_that_cannot_be_is_refused(tmp_path, address):
    make_checkout(tmp_path, "https://github.com/first/memory")
    with pytest.raises(SystemExit, match="must look like"):
        change(tmp_path, address)
