"""The paper-scale sweeps on a stand-in that takes seconds, and the tables that were committed."""

import concurrent.futures
import json
import pickle
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax.random as jr
import numpy as np
import pytest

from scanrnn import identification, learning, propagation, results
from scanrnn.sweep import _enable_x64
from tools import paper, paper_deep, paper_flossing

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
        (["zo24-fig3a", "conjugate"], "zo24-fig3a has the parts authors, fresh, got conjugate"),
        (["zo24-fig3a", "authors", "--steps", "150"], "--steps must be a multiple of 100, got 150"),
        (["zo24-fig3a", "authors", "--steps", "0"], "--steps must be a multiple of 100, got 0"),
        (["zo24-fig99"], "invalid choice: 'zo24-fig99'"),
        (["zo24-fig5", "bits"], "zo24-fig5 has the parts surrogate, text, got bits"),
        (["zo24-fig5", "webtext"], "invalid choice: 'webtext'"),
        (["eng23-small", "bits"], "eng23-small has the parts xor, copy, spatial, got bits"),
        (["eng23-main", "spatial"], "eng23-main has the parts xor, copy, got spatial"),
        (["floss-approach", "xor"], "floss-approach has the parts bits, signed, got xor"),
        (["floss-descent", "signed"], "floss-descent has the parts bits, got signed"),
        (["eng23-tiny"], "invalid choice: 'eng23-tiny'"),
    ],
)
def test_the_command_line_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        paper.main(arguments)
    assert message in capsys.readouterr().err


def test_the_command_line_runs_each_part_by_the_tool_of_its_figure(monkeypatch, tmp_path):
    calls = []
    for tool in (paper, paper_deep, paper_flossing):
        name = tool.__name__
        monkeypatch.setattr(tool, "run_figure", lambda *arguments, name=name: calls.append((name, *arguments)))
    monkeypatch.setattr(paper, "WORKERS", {})
    folders = ["--steps", "200", "--results", str(tmp_path), "--store", str(tmp_path / "store")]
    rest = (200, tmp_path, tmp_path / "store")
    paper.main(["zo24-fig5", *folders])
    paper.main(["zo24-fig3a", "fresh", *folders])
    paper.main(["eng23-small", "copy", *folders])
    paper.main(["floss-approach", *folders])
    assert calls == [
        ("tools.paper_deep", "zo24-fig5", "surrogate", *rest),
        ("tools.paper_deep", "zo24-fig5", "text", *rest),
        ("tools.paper", "zo24-fig3a", "fresh", *rest),
        ("tools.paper_flossing", "eng23-small", "copy", *rest),
        ("tools.paper_flossing", "floss-approach", "bits", *rest),
        ("tools.paper_flossing", "floss-approach", "signed", *rest),
    ]
    calls.clear()
    paper.main(folders)
    every = {figure: parts for figure, (_, parts) in (paper.FIGURES | paper_deep.FIGURES).items()}
    every |= paper_flossing.PARTS
    assert [call[1:3] for call in calls] == [(figure, part) for figure, parts in every.items() for part in parts]
    assert len(every) == len(paper.FIGURES) + len(paper_deep.FIGURES) + len(paper_flossing.PARTS)


@pytest.mark.parametrize("figure", paper.FIGURES)
def test_the_groups_of_a_figure_make_one_table(figure):
    groups, teachers = paper.FIGURES[figure]
    assert set(teachers) <= set(paper.TEACHERS)
    assert len({(tuple(group.columns), group.observed) for group in groups}) == 1
    keys = [(group.student, *group.columns.values()) for group in groups]
    assert len(set(keys)) == len(keys)


# Deep stacks ---------------------------------------------------------------------------------------------------------

STACK = ["stack", "norm", "inputs", "max_phase"]
BLOCK = ["memory_measured", "eigenvalues", "modulus", "phase", "recurrent", "rest"]
NETWORK = ["loss", "all_rest", "all_but_recurrent"]
DEEP_COLUMNS = {
    **{
        figure: [*STACK, "memory", "seed", "layer", "forward", *BLOCK, *NETWORK]
        for figure in ("zo24-fig5", "zo24-fig5-others", "zo24-fig5-phases")
    },
    "zo24-fig5-training": [*STACK, "memory", "seed", "step", "steps_taken", "layer", "forward", *BLOCK, *NETWORK],
    "delayed-copy": [
        *STACK,
        "width",
        "parameters",
        *("delay", "learning_rate", "seed", "final_loss", "accuracy", "diverged"),
    ],
}
# The groups of parameters that set the eigenvalues of each stack
EIGENVALUES = {
    "complex_rnn": ("eigenvalues",),
    **dict.fromkeys(("lru", "s4d", "s5"), ("modulus", "phase")),
    **dict.fromkeys(("selective_ssm", "rg_lru"), ("modulus",)),
    **dict.fromkeys(("gru", "lstm"), ()),
}
SMALL = {"width": 4, "depth": 1, "length": 8, "batch": 3}


@pytest.fixture
def run_deep(tmp_path, monkeypatch):
    """Run a figure of two small stacks, its runs in threads, which start at once."""
    stacks = (paper_deep.Stacks("lru", "layer", max_phase=0.1), paper_deep.Stacks("gru"))
    inputs = {name: partial(learning.surrogate, features=n) for name, n in (("surrogate", 2), ("text", 3))}
    figures = {
        "zo24-fig5": (stacks, ("surrogate", "text")),
        "zo24-fig5-training": (stacks[:1], ("text",)),
        "delayed-copy": (stacks[:1], ("bits",)),
    }
    small = {
        "propagate": partial(learning.propagate, **SMALL),
        "propagate_while_training": partial(learning.propagate_while_training, **SMALL),
        "learn_delayed_copy": partial(learning.learn_delayed_copy, depth=1, length=101, batch=2),
    }
    threads = SimpleNamespace(ProcessPoolExecutor=lambda n, mp_context: concurrent.futures.ThreadPoolExecutor(n))
    for name, value in {
        "FIGURES": figures,
        "SEEDS": dict.fromkeys(figures, 2),
        "INPUTS": inputs | {"bits": None},
        "MEMORIES": (2.0, 10.0),
        "RATES": (0.01, 0.1),
        "PARAMETERS": 250,
        "learning": SimpleNamespace(**vars(learning) | small),
        "concurrent": SimpleNamespace(futures=threads),
    }.items():
        monkeypatch.setattr(paper_deep, name, value)
    monkeypatch.setattr(paper_deep.os, "cpu_count", lambda: 1)

    def run(figure: str, part: str, folder: str = "results") -> Path:
        with _enable_x64(False):
            paper_deep.run_figure(figure, part, 100, tmp_path / folder, tmp_path / "store")
        return tmp_path / folder / f"{figure}.csv"

    return run


def test_two_kinds_of_inputs_become_one_table(run_deep):
    path = run_deep("zo24-fig5", "text")
    table, text = results.read(path), path.read_text().splitlines()
    assert list(table) == DEEP_COLUMNS["zo24-fig5"]
    assert about(path).keys() == {"text"}
    expected = {"command": "python -m tools.paper zo24-fig5 text --steps 100", "seeds": [0, 1], "steps": 100}
    assert expected.items() <= about(path)["text"].items()
    # for each stack, memory and seed a row for the encoder's output and one for the layer: 2 · 2 · 2 · 2
    assert about(path)["text"]["rows"] == len(table["seed"]) == 16
    np.testing.assert_array_equal(table["stack"], np.repeat(["lru", "gru"], 8))
    np.testing.assert_array_equal(table["norm"], np.repeat(["layer", "none"], 8))
    np.testing.assert_array_equal(table["max_phase"], np.repeat([0.1, np.pi], 8))
    np.testing.assert_array_equal(np.sort(table["memory"]), np.repeat([2.0, 10.0], 8))
    np.testing.assert_array_equal(table["layer"], np.tile([0, 1], 8))
    check_rows(table, 1)

    # rows of one run, measured again
    rows = results.select(table, stack="lru", memory=10.0, seed=1)
    stack_key, input_key = jr.split(jr.key(1))
    layer = partial(propagation.lru, max_phase=0.1)
    sizes = {"width": 4, "depth": 1, "norm": paper_deep.LayerNorm}
    with _enable_x64(False):
        stack = propagation.make(layer, 10.0, d_in=3, **sizes, key=stack_key)
        measured = propagation.measure(stack, learning.surrogate(input_key, 3, 8, features=3))
    rtol = 1e-4  # single precision, 8 steps and a norm: some 100 roundings, squared: 2 · 100 · eps = 2e-5
    np.testing.assert_allclose(rows["forward"], measured.forward, rtol=rtol)
    np.testing.assert_allclose(rows["loss"], np.full(2, measured.loss), rtol=rtol)
    for name in ("modulus", "phase", "recurrent"):
        np.testing.assert_allclose(rows[name], [np.nan, *measured.per_layer(name)], rtol=rtol)
    np.testing.assert_allclose(rows["memory_measured"], [np.nan, *measured.memory], rtol=rtol)
    np.testing.assert_allclose(rows["all_but_recurrent"][0], measured.pooled("feedforward", "encoder", "decoder"), rtol)

    run_deep("zo24-fig5", "surrogate")
    both = path.read_bytes()
    assert path.read_text().splitlines()[17:] == text[1:]
    assert list(results.read(path)["inputs"]) == ["surrogate"] * 16 + ["text"] * 16
    assert list(about(path)) == ["surrogate", "text"]
    for part in ("surrogate", "text"):  # found in the store; the table does not tell in which order it grew
        other = run_deep("zo24-fig5", part, "other")
    assert other.read_bytes() == both


def test_a_run_has_a_row_for_each_stream():
    random = np.random.default_rng(0)
    columns = {name: random.normal(size=(2, 3)) for name in BLOCK}  # two runs of three blocks
    columns |= {"forward": random.normal(size=(2, 4)), "memory": np.array([2.0, 5.0])}
    columns |= {name: random.normal(size=2) for name in NETWORK}
    table = paper_deep._by_layer(paper_deep.Stacks("lru", "layer"), "text", columns, ("memory",))
    assert set(table) == {*STACK, "memory", "layer", "forward", *BLOCK, *NETWORK}
    for i, (run, layer) in enumerate((run, layer) for run in range(2) for layer in range(4)):
        assert table["layer"][i] == layer
        assert table["forward"][i] == columns["forward"][run, layer]
        assert all(table[name][i] == columns[name][run] for name in ("memory", *NETWORK))
        for name in BLOCK:
            np.testing.assert_equal(table[name][i], columns[name][run, layer - 1] if layer else np.nan)


def test_a_training_has_rows_for_each_checkpoint(run_deep):
    table = results.read(run_deep("zo24-fig5-training", "text"))
    assert list(table) == DEEP_COLUMNS["zo24-fig5-training"]
    assert set(table["memory"]) == {10, 100}
    np.testing.assert_array_equal(np.unique(table["step"]), [0, 1, 2, 3])
    np.testing.assert_array_equal(table["steps_taken"], np.full(2 * 2 * 4 * 2, 3))
    check_rows(table, 1)
    losses = [results.select(table, memory=10, seed=0, layer=0, step=step)["loss"] for step in range(4)]
    assert len(np.unique(losses)) == 4


def test_delayed_copies_have_rows_for_each_delay_and_rate(run_deep):
    table = results.read(run_deep("delayed-copy", "bits"))
    assert list(table) == DEEP_COLUMNS["delayed-copy"]
    assert len(table["seed"]) == 3 * 2 * 2
    assert {*zip(table["delay"], table["learning_rate"], table["seed"], strict=True)} == {
        (delay, rate, seed) for delay in (10, 30, 100) for rate in (0.01, 0.1) for seed in (0, 1)
    }
    width = learning.width_for(propagation.lru, 250, norm=paper_deep.LayerNorm)
    assert set(table["width"]) == {width}
    assert set(table["parameters"]) == {learning.count_parameters(propagation.lru, width, norm=paper_deep.LayerNorm)}
    assert np.all((table["accuracy"] >= 0) & (table["accuracy"] <= 1))
    np.testing.assert_array_equal(np.isfinite(table["final_loss"]), ~table["diverged"])


@pytest.mark.parametrize("figure", paper_deep.FIGURES)
def test_the_stacks_of_a_figure_can_be_made_in_another_process(figure):
    stacks, parts = paper_deep.FIGURES[figure]
    assert len(set(stacks)) == len(stacks)
    assert set(parts) <= set(paper_deep.INPUTS)
    assert paper_deep.SEEDS[figure] >= 2
    for kind in stacks:
        make, norm = (pickle.loads(pickle.dumps(x)) for x in (kind.make(), paper_deep.NORMS[kind.norm]))
        assert norm is paper_deep.NORMS[kind.norm]
        layer = make(3, 10.0, key=jr.key(0))
        if kind.max_phase is not None:
            assert np.abs(np.angle(layer.eigenvalues())).max() <= kind.max_phase * (1 + 1e-6)


def test_every_column_is_described():
    described = set(re.findall(r"`([\w-]+)`", (FOLDER / "README.md").read_text(encoding="utf-8")))
    assert set(DEEP_COLUMNS) == set(paper_deep.FIGURES) <= described
    for columns in DEEP_COLUMNS.values():
        assert set(columns) <= described


def check_rows(table: dict[str, np.ndarray], depth: int) -> None:
    """What holds for every table of propagation."""
    run = [name for name in (*STACK, "memory", "seed", "step") if name in table]
    keys = list(zip(*(table[name] for name in (*run, "layer")), strict=True))
    assert len(set(keys)) == len(keys)
    assert set(table["layer"]) == set(range(depth + 1))
    first = table["layer"] == 0
    assert sum(first) * (depth + 1) == len(first)
    for name in ("forward", *NETWORK):
        assert np.all(table[name] > 0), name
    for name in NETWORK:  # the same in all rows of a run
        values = table[name].reshape(-1, depth + 1)
        np.testing.assert_array_equal(values, np.repeat(values[:, :1], depth + 1, axis=1))
    for name in BLOCK:
        assert np.isnan(table[name][first]).all()
    for name in ("memory_measured", "recurrent", "rest"):
        assert np.all(table[name][~first] > 0), name
    for name in ("eigenvalues", "modulus", "phase"):
        present = np.array([name in EIGENVALUES[stack] for stack in table["stack"]])
        np.testing.assert_array_equal(table[name] > 0, present & ~first)
        np.testing.assert_array_equal(np.isnan(table[name]), ~present | first)


# The committed tables ------------------------------------------------------------------------------------------------

FOLDER = Path(paper.__file__).parents[1] / paper.RESULTS
TABLES = sorted(path.stem for path in FOLDER.glob("*.csv"))


def test_no_table_is_without_its_provenance_nor_the_reverse():
    for name in TABLES:
        assert len(next(iter(results.read(name).values()))) > 0
        assert results.provenance(name), name
    for figure in (*paper.FIGURES, *paper_deep.FIGURES, *paper_flossing.PARTS):
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


def test_the_tables_of_all_deep_figures_are_there():
    assert set(paper_deep.FIGURES) <= set(TABLES)


@pytest.mark.parametrize("figure", [figure for figure in paper_deep.FIGURES if figure in TABLES])
def test_the_committed_tables_of_deep_stacks_hold_the_runs_of_their_figures(figure):
    table, origin = results.read(figure), results.provenance(figure)
    stacks, parts = paper_deep.FIGURES[figure]
    assert list(table) == DEEP_COLUMNS[figure]
    assert list(dict.fromkeys(table["inputs"])) == list(origin) == list(parts)
    points = {
        "zo24-fig5-training": {"memory": (10, 100), "step": (0, 50, 100, 150), "layer": range(5)},
        "delayed-copy": {"delay": (10, 30, 100), "learning_rate": paper_deep.RATES},
    }.get(figure, {"memory": paper_deep.MEMORIES, "layer": range(5)})
    points |= {"seed": range(paper_deep.SEEDS[figure])}
    for part, source in origin.items():
        rows = results.select(table, inputs=part)
        assert source["rows"] == len(rows["seed"])
        assert source["steps"] == 10_000
        assert source["seeds"] == list(points["seed"])
        rest = len(rows["seed"])
        for kind in stacks:
            phase = np.pi if kind.max_phase is None else kind.max_phase
            chosen = results.select(rows, stack=kind.layer, norm=kind.norm, max_phase=phase)
            assert len(chosen["seed"]) == np.prod([len(values) for values in points.values()]), kind
            for name, values in points.items():
                # memories are kept in single precision
                np.testing.assert_allclose(np.unique(chosen[name]), np.unique(values), rtol=1e-6)
            rest -= len(chosen["seed"])
        assert rest == 0
    if figure == "delayed-copy":
        np.testing.assert_array_equal(np.isfinite(table["final_loss"]), ~table["diverged"])
        assert np.all((table["accuracy"] >= 0) & (table["accuracy"] <= 1))
        sizes = table["parameters"] / paper_deep.PARAMETERS
        assert np.all(np.abs(sizes - 1) < 0.05)  # one more of width 30 to 60 is 3 to 6 % more parameters
    else:
        check_rows(table, 4)
