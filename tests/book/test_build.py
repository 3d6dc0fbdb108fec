"""The build's first two steps, on tiny books whose kernels import nothing heavy."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tools import execute, generate, site
from tools.project import Project, one_build_at_a_time

# jupyter_client and zmq leave sockets and event loops to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

CLAIM = """
[c1-two]
chapter = "01_sums"
source = "arithmetic"
statement = "One and one is two"
kind = "exact"
expected = 2
tolerance = 0.1
why = "rounding"
paper_value = "2"
verdict = "reproduced"
scale = "live"
rival = 3
rival_is = "miscounting"
"""


def write_notebook(project: Project, name: str, *sources: str, prose: str = "# Sums") -> Path:
    cells = [new_markdown_cell(prose), *(new_code_cell(source) for source in sources)]
    path = project.book / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


def write_toc(project: Project, *names: str) -> None:
    chapters = "".join(f"  - file: book/{name}\n" for name in names)
    (project.root / "_toc.yml").write_text(f"format: jb-book\nroot: book/intro\nchapters:\n{chapters}")


def record_check(measured: float, agrees: bool = True) -> str:
    """A cell that does what `claims.check` does, without reading the real book's claims."""
    line = json.dumps({"id": "c1-two", "measured": measured, "standard_error": None, "agrees": agrees})
    return (
        "import os, pathlib\n"
        "path = pathlib.Path(os.environ['SCANRNN_RECORDS']) / '01_sums.claims.jsonl'\n"
        f"with path.open('a') as file:\n    file.write({line + chr(10)!r})"
    )


@pytest.fixture
def project(tmp_path) -> Project:
    project = Project(tmp_path)
    project.book.mkdir()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "code.py").write_text("x = 1\n")
    (tmp_path / "constraints.txt").write_text("jax==1\n")
    (project.book / "claims.toml").write_text(CLAIM)
    write_toc(project, "01_sums")
    return project


def test_execution_leaves_a_copy_and_a_record_and_is_not_repeated(project, capsys):
    notebook = write_notebook(project, "01_sums", record_check(2.0), "import os\nprint(os.getcwd())")
    assert execute.run(project) == 1
    assert "executing 2 code cells" in capsys.readouterr().out
    record = execute.read_record(project, notebook)
    assert record is not None
    assert [claim["measured"] for claim in record["claims"]] == [2.0]
    assert record["scale"] == "teaching"
    assert record["seconds"] > 0
    assert record["peak_memory_mb"] > 10
    assert {"python", "jax", "numpy", "scanrnn"} <= record["versions"].keys()
    copy = nbformat.read(project.executed(notebook), as_version=4)
    assert copy.cells[2].outputs[0].text.strip() == str(project.book)
    assert len(copy.cells) == 3  # the measuring cell is gone
    assert execute.run(project) == 0
    assert "up to date" in capsys.readouterr().out


DEPENDENCIES = (
    "lib/code.py",
    "lib/deep/new.py",
    "book/claims.toml",
    "book/data/a.npz",
    "book/results/a.csv",
    "constraints.txt",
)


@pytest.mark.parametrize("changed", DEPENDENCIES)
def test_the_key_depends_on_every_file_behind_the_numbers(project, changed):
    notebook = write_notebook(project, "01_sums", "1")
    before = project.key(notebook)
    path = project.root / changed
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("something else")
    assert project.key(notebook) != before


def test_the_key_depends_on_code_tags_and_scale_but_not_on_prose(project, monkeypatch):
    before = project.key(write_notebook(project, "01_sums", "1"))
    assert project.key(write_notebook(project, "01_sums", "1", prose="# Other words")) == before
    (project.root / "lib" / "__pycache__").mkdir()
    (project.root / "lib" / "__pycache__" / "code.pyc").write_bytes(b"compiled")
    assert project.key(project.book / "01_sums.ipynb") == before
    assert project.key(write_notebook(project, "01_sums", "2")) != before
    monkeypatch.setenv("SCANRNN_SCALE", "paper")
    assert project.key(write_notebook(project, "01_sums", "1")) != before


@pytest.mark.parametrize(
    ("source", "reason"),
    [("1 / 0", "ZeroDivisionError: division by zero"), ("import os\nos._exit(3)", "Kernel died")],
)
def test_a_failing_cell_is_shown_and_leaves_nothing(project, source, reason):
    notebook = write_notebook(project, "01_sums", "a = 1")
    execute.run(project)
    write_notebook(project, "01_sums", "a = 1", source)
    with pytest.raises(execute.ExecutionFailed) as failure:
        execute.run(project)
    message = str(failure.value)
    assert "book/01_sums.ipynb: cell 3 of 3 failed" in message
    assert source.splitlines()[-1] in message
    assert reason in message
    assert not project.record(notebook).exists()
    assert not project.executed(notebook).exists()


RUN = "import sys, pathlib; from tools import execute, project; execute.run(project.Project(pathlib.Path(sys.argv[1])))"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_nothing_that_fools_the_next_run(project, number):
    # The first run waits in its cell until it is interrupted; the second finds the mark and goes through.
    mark, kernel = project.root / "mark", project.root / "kernel"
    source = f"""import os, pathlib, time
mark, kernel = pathlib.Path({str(mark)!r}), pathlib.Path({str(kernel)!r})
kernel.write_text(str(os.getpid()))
if not mark.exists():
    mark.touch()
    time.sleep(60)
"""
    notebook = write_notebook(project, "01_sums", source)
    root = Path(execute.__file__).parents[1]
    command = [sys.executable, "-c", RUN, str(project.root)]
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
    wait_until(mark.exists)
    process.send_signal(number)
    complaint = process.communicate(timeout=30)[1]
    assert process.returncode != 0
    if number == signal.SIGINT:  # not the cell's fault
        assert complaint.splitlines()[-1].startswith("KeyboardInterrupt")
    assert execute.read_record(project, notebook) is None
    wait_until(lambda: not is_running(int(kernel.read_text())))
    assert execute.run(project) == 1
    assert execute.read_record(project, notebook) is not None


def wait_until(is_true) -> None:
    deadline = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_broken_record_is_no_record(project):
    notebook = write_notebook(project, "01_sums", "1")
    execute.run(project)
    project.record(notebook).write_text('{"key": ')
    assert execute.run(project) == 1


def test_what_a_deleted_notebook_left_is_removed(project):
    notebook = write_notebook(project, "01_sums", "1")
    execute.run(project)
    copy, record = project.executed(notebook), project.record(notebook)
    assert copy.exists()
    assert record.exists()
    notebook.rename(project.book / "02_renamed.ipynb")
    write_toc(project, "02_renamed")
    execute.run(project)
    assert not copy.exists()
    assert not record.exists()


def test_the_page_shows_what_was_measured(project):
    write_notebook(project, "01_sums", record_check(1.9), record_check(2.0123))
    execute.run(project)
    generate.run(project)
    page = (project.book / "reproduced.md").read_text()
    assert "**1 claim**: 1 reproduced" in page
    assert ":ours: 2.0\n" in page  # the last of two checks
    assert ":expected: 2.0 ± 0.1 (rounding)" in page
    assert ":verdict: **reproduced**" in page
    assert "One and one is two" in page


def test_stale_and_missing_records_are_refused(project):
    notebook = write_notebook(project, "01_sums", record_check(2.0))
    with pytest.raises(generate.RecordsIncomplete, match="01_sums: its record is missing or stale"):
        generate.run(project)
    execute.run(project)
    generate.run(project)
    (project.root / "lib" / "code.py").write_text("x = 2\n")
    with pytest.raises(generate.RecordsIncomplete, match="01_sums: its record is missing or stale"):
        generate.run(project)
    execute.run(project)
    project.record(notebook).unlink()
    with pytest.raises(generate.RecordsIncomplete, match="01_sums: its record is missing or stale") as refused:
        generate.run(project)
    assert "c1-two" not in str(refused.value)  # the record is to blame, not the claim


@pytest.mark.parametrize(
    ("cells", "problem"),
    [
        (["1"], "c1-two: 01_sums does not check it"),
        ([record_check(2.0).replace("c1-two", "c1-three")], "c1-three: checked, but not in claims.toml"),
        ([record_check(3.0, agrees=False)], "c1-two: not met"),
    ],
)
def test_a_claim_unchecked_unknown_or_unmet_is_refused(project, cells, problem):
    write_notebook(project, "01_sums", *cells)
    execute.run(project)
    with pytest.raises(generate.RecordsIncomplete, match=problem):
        generate.run(project)


def picture(name: str, alt: str = "A line falls from 1 to 0.005 in 50 steps.") -> list:
    about = {"scanrnn": {"alt": alt, "caption": "A *line*.", "name": name}, "image/png": {"width": 480}}
    caption, role = {"text/markdown": "A *line*."}, {"scanrnn": {"role": "caption"}}
    return [
        nbformat.v4.new_output("display_data", {"image/png": "", "text/plain": alt}, metadata=about),
        nbformat.v4.new_output("display_data", caption, metadata=role),
    ]


def executed_copy(*outputs) -> nbformat.NotebookNode:
    metadata = {"language_info": {"name": "python"}}
    cells = [new_markdown_cell("old"), new_code_cell("0"), new_code_cell("1", outputs=list(outputs))]
    return new_notebook(cells=cells, metadata=metadata)


def test_pages_join_todays_prose_with_outputs_and_alt_texts():
    source = new_notebook(cells=[new_markdown_cell("new"), new_code_cell("0"), new_code_cell("1")])
    line = nbformat.v4.new_output("stream", text="✓ c1-two")
    page = site.with_outputs(source, executed_copy(*picture("fig-line"), line))
    assert page.cells[0].source == "new"
    assert page.cells[2].metadata["mystnb"] == {
        "image": {"alt": "A line falls from 1 to 0.005 in 50 steps."},
        "figure": {"caption": "A *line*.", "name": "fig-line"},
    }
    assert [output.output_type for output in page.cells[2].outputs] == ["display_data", "stream"]


def test_two_figures_in_one_cell_are_refused():
    source = new_notebook(cells=[new_code_cell("0"), new_code_cell("1")])
    with pytest.raises(ValueError, match=r"one figure.*fig-a.*fig-b"):
        site.with_outputs(source, executed_copy(*picture("fig-a"), *picture("fig-b")))


def test_the_site_is_laid_out_when_something_changed_or_the_last_try_did_not_end(project, monkeypatch):
    write_notebook(project, "01_sums", "1")
    (project.book / "intro.md").write_text("# Intro\n")
    (project.root / "_config.yml").write_text("title: Sums\n")
    execute.run(project)
    returncode = 0

    def sphinx(*_, **__):
        project.html.mkdir(parents=True)  # so it must have been removed
        (project.html / "index.html").touch()
        if returncode is None:
            raise KeyboardInterrupt
        return subprocess.CompletedProcess([], returncode, stdout="")

    monkeypatch.setattr(site.subprocess, "run", sphinx)
    assert site.run(project)
    assert not site.run(project)
    (project.book / "intro.md").write_text("# Introduction\n")
    returncode = 1
    with pytest.raises(site.SiteFailed):
        site.run(project)
    returncode = None
    with pytest.raises(KeyboardInterrupt):
        site.run(project)
    returncode = 0
    assert site.run(project)
    assert not site.run(project)


def test_a_second_build_waits_for_the_first(project):
    root = Path(execute.__file__).parents[1]
    script = "import sys, pathlib; from tools import project\n"
    script += "with project.one_build_at_a_time(project.Project(pathlib.Path(sys.argv[1]))): print('mine')"
    with one_build_at_a_time(project):
        command = [sys.executable, "-c", script, str(project.root)]
        other = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        assert "waiting" in other.stdout.readline()
    assert "mine" in other.communicate(timeout=30)[0]


# The virtual environment ---------------------------------------------------------------------------------------------


def make_venv(folder: Path, python3: str) -> subprocess.CompletedProcess:
    """Run the script with a `python3` on the PATH that is the given shell script, and no other."""
    tools = folder / "bin"
    tools.mkdir()
    (tools / "python3").write_text(f"#!/bin/sh\n{python3}\n")
    (tools / "python3").chmod(0o755)
    (tools / "rm").symlink_to("/bin/rm")
    script = Path(execute.__file__).with_name("make_venv.sh")
    command = ["/bin/sh", str(script), str(folder / "venv")]
    return subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True, cwd=folder, check=False)


def test_without_a_new_enough_python_it_says_what_to_do(tmp_path):
    done = make_venv(tmp_path, "exit 1")
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed" in done.stderr


def test_without_ensurepip_it_says_what_to_do_and_leaves_no_half_environment(tmp_path):
    done = make_venv(tmp_path, f'case "$2" in venv) /bin/mkdir -p {tmp_path}/venv/bin; exit 1;; esac; exit 0')
    assert done.returncode == 1
    assert "apt-get install python3-venv" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_half_made_environment_is_made_anew(tmp_path):
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "rubbish").touch()
    done = make_venv(tmp_path, "exit 1")
    assert "is not complete" in done.stdout
    assert not (tmp_path / "venv").exists()
