"""The paper-scale sweeps on a stand-in that takes seconds, and the tables that were committed."""

import json
from pathlib import Path

import numpy as np
import pytest

from scanrnn import identification, results
from scanrnn.sweep import _enable_x64
from tools import paper

COLUMNS = ["student", "teacher", "teacher_seed", "nu0", "max_phase", "learning_rate", "seed"]
MEASURED = ["final_loss", "diverged"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the stand-in figure with one kind of teacher: two rates, one of which diverges, and two seeds."""
    group = paper.Group("rnn", identification.rnn, (1e-3, 1e30), moduli=(0.36,), columns={"heads": 1})
    teachers = {
        "authors": paper.Teacher(identification.authors, ((42, 2023), (42, 2024))),
        "fresh": paper.Teacher(identification.fresh, ((0, 0), (1, 1))),
    }
    monkeypatch.setattr(paper, "FIGURES", {"tiny": ((group,), ("authors", "fresh"))})
    monkeypatch.setattr(paper, "TEACHERS", teachers)
    monkeypatch.setattr(paper, "CHUNK", 2)
    monkeypatch.setattr(paper.os, "cpu_count", lambda: 1)  # one worker compiles once

    def run(teacher: str, folder: str = "results") -> Path:
        with _enable_x64(False):  # as on the command line
            paper.run_figure("tiny", teacher, 100, tmp_path / folder, tmp_path / "store")
        return tmp_path / folder / "tiny.csv"

    return run


def about(table: Path) -> dict:
    return json.loads(table.with_suffix(".json").read_text())


def test_a_figure_becomes_a_table_into_which_other_teachers_are_merged(run, tmp_path):
    path = run("authors")
    table, first = results.read(path), path.read_text().splitlines()
    assert list(table)[:9] == [*COLUMNS, "heads", "final_loss"]
    assert set(MEASURED) <= set(table)
    assert set(table["student"]) == {"rnn"}
    np.testing.assert_array_equal(table["learning_rate"], [1e-3, 1e-3, 1e30, 1e30])
    np.testing.assert_array_equal(table["seed"], [2023, 2024] * 2)
    np.testing.assert_array_equal(table["diverged"], [False, False, True, True])
    np.testing.assert_array_equal(np.isfinite(table["final_loss"]), ~table["diverged"])
    assert about(path).keys() == {"authors"}
    assert about(path)["authors"]["seeds"] == [[42, 2023], [42, 2024]]
    assert about(path)["authors"]["command"] == "python -m tools.paper tiny authors --steps 100"
    assert (about(path)["authors"]["runs"], about(path)["authors"]["diverged"]) == (4, 2)

    run("fresh")
    both = path.read_bytes()
    assert path.read_text().splitlines()[:5] == first
    assert list(results.read(path)["teacher"]) == ["authors"] * 4 + ["fresh"] * 4
    assert list(about(path)) == ["authors", "fresh"]

    run("authors")  # found in the store, and in the place of the old rows
    assert path.read_bytes() == both
    assert list(about(path)) == ["authors", "fresh"]
    for teacher in ("fresh", "authors"):  # the table does not tell in which order it grew
        other = run(teacher, "other")
    assert other.read_bytes() == both
    assert sorted(file.name for file in (tmp_path / "results").iterdir()) == ["tiny.csv", "tiny.json"]


def test_the_commit_is_that_of_the_start(run, monkeypatch, tmp_path):
    moments = []
    monkeypatch.setattr(paper.tables, "current_commit", lambda: moments.append("commit") or "abc")
    group = dict.fromkeys((*COLUMNS, *MEASURED), np.array([False]))
    monkeypatch.setattr(paper, "_run_group", lambda *_: moments.append("group") or group)
    assert about(run("authors"))["authors"]["commit"] == "abc"
    assert moments == ["commit", "group"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zo24-fig3a", "conjugate"], "zo24-fig3a has the teachers authors, fresh, got conjugate"),
        (["zo24-fig3a", "authors", "--steps", "150"], "--steps must be a multiple of 100, got 150"),
        (["zo24-fig3a", "authors", "--steps", "0"], "--steps must be a multiple of 100, got 0"),
        (["zo24-fig99"], "invalid choice: 'zo24-fig99'"),
    ],
)
def test_the_command_line_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        paper.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("figure", paper.FIGURES)
def test_the_groups_of_a_figure_make_one_table(figure):
    groups, teachers = paper.FIGURES[figure]
    assert set(teachers) <= set(paper.TEACHERS)
    assert len({(tuple(group.columns), group.observed) for group in groups}) == 1
    keys = [(group.student, *group.columns.values()) for group in groups]
    assert len(set(keys)) == len(keys)


# The committed tables ------------------------------------------------------------------------------------------------

FOLDER = Path(paper.__file__).parents[1] / paper.RESULTS
TABLES = sorted(path.stem for path in FOLDER.glob("*.csv"))


def test_no_table_is_without_its_provenance_nor_the_reverse():
    for name in TABLES:
        assert len(next(iter(results.read(name).values()))) > 0
        assert results.provenance(name), name
    for figure in paper.FIGURES:
        assert (FOLDER / f"{figure}.csv").exists() == (FOLDER / f"{figure}.json").exists()
    assert not list(FOLDER.glob("*.part"))


def test_the_committed_tables_hold_the_runs_of_their_figures():
    for figure in paper.FIGURES:
        if figure in TABLES:
            check_table(figure)


def check_table(figure: str) -> None:
    table, origin = results.read(figure), results.provenance(figure)
    groups, teachers = paper.FIGURES[figure]
    assert set(table) >= {*COLUMNS, *MEASURED}
    assert list(dict.fromkeys(table["teacher"])) == list(origin)
    assert set(origin) <= set(teachers)
    np.testing.assert_array_equal(np.isfinite(table["final_loss"]), ~table["diverged"])
    for teacher, source in origin.items():
        rows = results.select(table, teacher=teacher)
        pairs = [list(pair) for pair in paper.TEACHERS[teacher].seeds]
        rest = len(rows["seed"])
        assert rest == source["runs"]
        assert source["steps"] == 10_000
        assert source["seeds"] == pairs
        assert source["diverged"] == np.sum(rows["diverged"])
        for group in groups:
            chosen = results.select(rows, student=group.student, **group.columns)
            arrays = len(np.unique(chosen["array"])) if group.by_array else 1
            kept = pairs[: group.seeds]
            runs = len(group.rates) * len(group.moduli) * len(group.phases) * len(kept)
            assert len(chosen["seed"]) == runs * arrays, (figure, teacher, group.student, group.columns)
            assert {*zip(chosen["teacher_seed"], chosen["seed"], strict=True)} == {*map(tuple, kept)}
            for name, values in (("learning_rate", group.rates), ("nu0", group.moduli), ("max_phase", group.phases)):
                np.testing.assert_allclose(np.unique(chosen[name]), np.unique(values))
            rest -= len(chosen["seed"])
        assert rest == 0
