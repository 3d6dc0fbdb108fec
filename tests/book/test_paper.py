"""The paper-scale sweeps on a stand-in that takes seconds, and the tables that were committed."""

import concurrent.futures
import json
import pickle
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.random as jr
import numpy as np
import pytest

from scanrnn import approach, flossing, identification, learning, propagation, results
from scanrnn.sweep import _describe_run, _enable_x64
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


# Flossing ------------------------------------------------------------------------------------------------------------

RUN = ["student", "condition", "task", "delay", "seed", "accuracy_end", "diverged"]
STRETCH = ["accuracy", "first", "last", "gradient"]
PORTRAIT = [
    *("activity", "eigenvector_condition", "first", "incoherent", "incoherent_median", "mean_square"),
    *("norm", "radius", "total", "total_median", "variance"),
]


def training_columns(figure: str) -> list[str]:
    size = paper_flossing.TRAINING[figure].size
    return [*RUN, *(f"{name}_{i}" for name in STRETCH for i in range(0, size.epochs // 100, size.kept))]


def flossing_columns(figure: str) -> list[str]:
    if figure == "floss-approach":
        return ["way", "inputs", "target", "seed", *PORTRAIT]
    if figure == "floss-descent":
        ends = [f"end_{rate:g}" for rate in paper_flossing.RATES]
        return ["way", "inputs", "target", "seed", "first", "start", "sharpness", *ends]
    return training_columns(figure)


@pytest.fixture
def run_flossing(tmp_path, monkeypatch):
    """Run a figure of small networks, its runs in threads, which start at once."""
    students = (
        paper_flossing.Student("vanilla", "pre"),
        paper_flossing.Student("k = 1", "none", num_exponents=1, options={"max_norm": 1.0}),
    )
    size = paper_flossing.Size(d_hidden=3, num_exponents=2, length=12, epochs=1000, between=5, kept=2)
    training = {"eng23-small": paper_flossing.Figure(students, size, {"xor": (1, 3), "copy": (2,)}, seeds=2)}
    ways = {"linear": ({"way": approach.linear, "d_hidden": 2}, (-0.5, -0.2))}
    threads = SimpleNamespace(ProcessPoolExecutor=lambda n, mp_context: concurrent.futures.ThreadPoolExecutor(n))
    for name, value in {
        "TRAINING": training,
        "WAYS": ways,
        "SEEDS": dict.fromkeys(("floss-approach", "floss-descent"), 2),
        "RATES": (0.0316, 1.0, 1e30),
        "concurrent": SimpleNamespace(futures=threads),
    }.items():
        monkeypatch.setattr(paper_flossing, name, value)
    monkeypatch.setattr(paper_flossing.os, "cpu_count", lambda: 1)

    def run(figure: str, part: str) -> Path:
        with _enable_x64(False):
            paper_flossing.run_figure(figure, part, 100, tmp_path / "results", tmp_path / "store")
        return tmp_path / "results" / f"{figure}.csv"

    return run


def test_students_at_delays_become_one_table(run_flossing):
    path = run_flossing("eng23-small", "xor")
    table, whole = results.read(path), path.read_bytes()
    # the least that there may be is 300 epochs, of whose three stretches every other one is kept
    assert list(table) == [*RUN, *(f"{name}_{i}" for name in STRETCH for i in (0, 2))]
    np.testing.assert_array_equal(table["student"], np.repeat(["vanilla", "k = 1"], 4))
    np.testing.assert_array_equal(table["condition"], np.repeat(["pre", "none"], 4))
    assert set(table["task"]) == {"xor"}
    np.testing.assert_array_equal(table["seed"], np.tile([0, 0, 1, 1], 2))
    np.testing.assert_array_equal(table["delay"], np.tile([1, 3], 4))
    assert not table["diverged"].any()
    assert about(path).keys() == {"xor"}
    expected = {
        "command": "python -m tools.paper eng23-small xor --steps 100",
        "seeds": [0, 1],
        "steps": 100,
        "rows": 8,
    }
    assert expected.items() <= about(path)["xor"].items()
    assert {"commit", "date", "device", "python", "versions", "seconds"} <= about(path)["xor"].keys()

    for name in ("first_0", "last_0"):  # all delays share the student and its flossing
        values = table[name].reshape(4, 2)
        np.testing.assert_array_equal(values[:, 0], values[:, 1])
        assert len(np.unique(values)) == 4
    flossed, other = (results.select(table, student=name) for name in ("vanilla", "k = 1"))
    assert np.all(flossed["first_0"] > flossed["last_0"])
    np.testing.assert_array_equal(other["first_0"], other["last_0"])  # one exponent is both
    assert np.all(np.abs(flossed["first_0"] - other["first_0"]) > 0.01)  # the same network, before and after 500 steps
    for name in ("accuracy_end", "accuracy_0", "accuracy_2"):
        assert np.all((table[name] > 0.2) & (table[name] <= 1))
    for name in ("gradient_0", "gradient_2"):
        assert np.all(table[name] > 0)
    for name in ("accuracy_0", "first_0", "last_2"):
        np.testing.assert_array_equal(table[name], np.round(table[name], 4))
    assert run_flossing("eng23-small", "xor").read_bytes() == whole  # found in the store


def test_ways_to_an_exponent_become_one_table(run_flossing):
    run_flossing("floss-approach", "signed")
    path = run_flossing("floss-approach", "bits")
    table = results.read(path)
    assert list(table) == flossing_columns("floss-approach")
    assert set(table["way"]) == {"linear"}
    assert list(table["inputs"]) == ["bits"] * 4 + ["signed"] * 4  # not in the order in which it grew
    np.testing.assert_allclose(table["target"], np.tile([-0.5, -0.5, -0.2, -0.2], 2), rtol=1e-6)
    np.testing.assert_array_equal(table["seed"], np.tile([0, 1], 4))
    assert list(about(path)) == ["bits", "signed"]
    expected = {"command": "python -m tools.paper floss-approach bits --steps 100", "seeds": [0, 1], "rows": 4}
    assert expected.items() <= about(path)["bits"].items()
    np.testing.assert_allclose(table["radius"], np.exp(table["target"]), rtol=1e-4)  # five digits
    # of the same networks; other inputs do not change their eigenvalues
    for name in ("radius", "norm", "eigenvector_condition"):
        np.testing.assert_array_equal(table[name][:4], table[name][4:])
    assert np.all(table["total"][:4] != table["total"][4:])


def test_descents_have_a_column_for_each_rate(run_flossing, monkeypatch):
    monkeypatch.setattr(paper_flossing, "STEEP", {"linear": (-0.3,)})
    path = run_flossing("floss-descent", "bits")
    table = results.read(path)
    ends = ["end_0.0316", "end_1", "end_1e+30"]
    assert list(table) == ["way", "inputs", "target", "seed", "first", "start", "sharpness", *ends]
    np.testing.assert_allclose(table["target"], [-0.3, -0.3], rtol=1e-6)
    np.testing.assert_array_equal(table["seed"], [0, 1])
    np.testing.assert_allclose(table["first"], [-0.3, -0.3], rtol=0, atol=0.01)
    assert np.all(table["start"] > 0)
    assert np.isfinite([table[name] for name in ends[:2]]).all()
    np.testing.assert_array_equal(np.isnan(table["end_1e+30"]), [True, True])
    assert about(path)["bits"]["rows"] == 2


class Recorder:
    """In the place of `sweep`: keeps what it is asked to run, and returns numbers that say where they belong."""

    def __init__(self):
        self.runs, self.points = [], []

    def __call__(self, run, points, *, chunk, **how):
        assert how == {"store": None}
        assert 1 <= chunk <= 16
        self.runs.append(run)
        self.points.append(points)
        options, count = run.keywords, len(points)
        columns = {name: np.array([point[name] for point in points]) for name in points[0]}
        if run.func is approach.portrait:
            return columns | {name: np.zeros(count) for name in PORTRAIT}
        if run.func is approach.descend_from:
            measured = {name: np.zeros(count) for name in ("first", "start", "sharpness")}
            return columns | measured | {"end": np.tile(np.arange(len(options["rates"]), dtype=float), (count, 1))}
        shape = count, len(options["delays"]), options["epochs"] // 100
        seeds, delays, stretches = np.meshgrid(columns["seed"], options["delays"], np.arange(shape[2]), indexing="ij")
        places = seeds + delays / 100 + stretches / 10_000  # four digits
        ends = {"accuracy_end": places[:, :, 0], "diverged": np.zeros(shape[:2], bool)}
        return columns | dict.fromkeys(STRETCH, places) | ends


@pytest.fixture
def recorded(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(paper_flossing, "sweep", recorder)
    return recorder


TRAINING_PARTS = [(figure, task) for figure, about in paper_flossing.TRAINING.items() for task in about.delays]


@pytest.mark.parametrize(("figure", "task"), TRAINING_PARTS)
def test_the_students_of_a_figure_make_one_table_and_can_be_run_in_another_process(figure, task, recorded):
    about = paper_flossing.TRAINING[figure]
    made = paper_flossing._training(figure, task, about.seeds, 1.0, store=None)
    assert len(made) == len(about.students) == len(recorded.runs)
    names = {(student.name, student.condition) for student in about.students}
    assert len(names) == len(about.students)
    for student, table, run in zip(about.students, made, recorded.runs, strict=True):
        assert list(table) == training_columns(figure)
        assert {len(column) for column in table.values()} == {about.seeds * len(about.delays[task])}
        # the numbers of a row are those of its seed, its delay and its stretch
        for name in STRETCH:
            for i in range(0, about.size.epochs // 100, about.size.kept):
                want = table["seed"] + table["delay"] / 100 + i / 10_000
                np.testing.assert_allclose(table[f"{name}_{i}"], want, rtol=1e-3 if name == "gradient" else 1e-9)
        np.testing.assert_allclose(table["accuracy_end"], table["seed"] + table["delay"] / 100, rtol=1e-9)

        options = run.keywords
        assert options["epochs"] == about.size.epochs
        assert options["delays"] == about.delays[task]
        assert options["length"] == about.size.length > 2 * max(options["delays"])
        assert options["d_in"] == (2 if task == "spatial" else 1)
        assert options["task"] is paper_flossing.TASKS[task]
        how = options["flossing"]
        assert (how is None) == (student.condition == "none")
        if how is not None:
            whole = flossing.Flossing(**how)
            assert options["spectrum"] == whole.num_exponents
            assert whole.epochs == ((0, 100, 200) if student.condition == "both" else (0,))
            # `upfront` takes as many steps in all as `both`
            steps = {"pre": 500, "both": 500 + 2 * about.size.between, "upfront": 500 + 2 * about.size.between}
            assert whole.steps + whole.later * (len(whole.epochs) - 1) == steps[student.condition]
        assert _describe_run(run) == _describe_run(pickle.loads(pickle.dumps(run)))
    described = [json.dumps(_describe_run(run), sort_keys=True) for run in recorded.runs]
    assert len(set(described)) == len(described)  # no two are the same


@pytest.mark.parametrize("figure", paper_flossing.TRAINING)
def test_students_have_as_many_exponents_as_are_flossed(figure):
    about = paper_flossing.TRAINING[figure]
    for student in about.students:
        make = student.make or partial(flossing.vanilla, d_hidden=about.size.d_hidden)
        made = jax.eval_shape(lambda key, make=make: make(d_in=1, batch=16, key=key), jr.key(0))
        states = getattr(made, "initial_states", None)
        if states is None:
            assert student.condition == "none"
            continue
        size = sum(leaf.shape[1] for leaf in jax.tree.leaves(states))
        assert all(leaf.shape[0] == 16 for leaf in jax.tree.leaves(states))
        assert (student.num_exponents or about.size.num_exponents) <= size


@pytest.mark.parametrize("figure", ["floss-approach", "floss-descent"])
def test_the_ways_of_a_figure_make_one_table_and_can_be_run_in_another_process(figure, recorded):
    measure = {"floss-approach": paper_flossing._approach, "floss-descent": paper_flossing._descent}[figure]
    for part in paper_flossing.PARTS[figure]:
        made = measure(part, 2, 1.0, store=None)
        for (way, (_, targets)), table in zip(paper_flossing.WAYS.items(), made, strict=True):
            assert set(table) == set(flossing_columns(figure))
            assert (set(table["way"]), set(table["inputs"])) == ({way}, {part})
            if figure == "floss-descent":
                wanted = paper_flossing.STEEP.get(way, paper_flossing.STEEP_ELSE)
                assert set(wanted) <= set(targets)  # networks that the other table has too
                for i, rate in enumerate(paper_flossing.RATES):
                    assert set(table[f"end_{rate:g}"]) == {float(i)}
                targets = wanted
            np.testing.assert_allclose(table["target"], np.repeat(targets, 2))
            np.testing.assert_array_equal(table["seed"], np.tile([0, 1], len(targets)))
    for run in recorded.runs:
        assert _describe_run(run) == _describe_run(pickle.loads(pickle.dumps(run)))
    if figure == "floss-approach":
        assert {run.keywords["length"] for run in recorded.runs} == {4000}
        assert {run.keywords["transient"] for run in recorded.runs} == {1000}
        inputs = [run.keywords["inputs"] for run in recorded.runs]
        assert set(inputs) == {approach.plain_bits, approach.signed_bits}
    else:
        assert {run.keywords["steps"] for run in recorded.runs} == {500}


def test_parts_of_figures_of_flossing_are_tasks_and_inputs():
    for figure, parts in paper_flossing.PARTS.items():
        known = paper_flossing.TASKS if figure in paper_flossing.TRAINING else paper_flossing.INPUTS
        assert set(parts) <= set(known)
    assert len({f"{rate:g}" for rate in paper_flossing.RATES}) == len(paper_flossing.RATES)
    np.testing.assert_allclose(np.diff(np.log10(paper_flossing.RATES)), 0.25, atol=0.002)  # rounded to three digits


def test_every_column_of_flossing_is_described():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    described = set(re.findall(r"`([\w-]+)`", text))
    assert set(paper_flossing.PARTS) <= described
    for figure in paper_flossing.PARTS:
        for name in flossing_columns(figure):
            plain = re.sub(r"_\d+$|_median$", "", name)
            assert ("end_x" if name.startswith("end_") else plain) in described, name


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


@pytest.mark.parametrize("figure", [figure for figure in paper_flossing.PARTS if figure in TABLES])
def test_the_committed_tables_of_flossing_hold_the_runs_of_their_figures(figure):
    table, origin = results.read(figure), results.provenance(figure)
    assert list(table) == flossing_columns(figure)
    training = paper_flossing.TRAINING.get(figure)
    column, kind = ("task", ["student", "condition"]) if training else ("inputs", ["way"])
    assert list(dict.fromkeys(table[column])) == list(origin)
    assert list(origin) == [part for part in paper_flossing.PARTS[figure] if part in origin]
    for part, source in origin.items():
        rows = results.select(table, **{column: part})
        seeds = training.seeds if training else paper_flossing.SEEDS[figure]
        assert source["rows"] == len(rows["seed"])
        assert source["steps"] == 10_000
        assert source["seeds"] == list(range(seeds))
        if training:
            points = [
                (student.name, student.condition, delay, seed)
                for student in training.students
                for seed in range(seeds)
                for delay in training.delays[part]
            ]
            names = [*kind, "delay", "seed"]
        else:
            targets = {way: values for way, (_, values) in paper_flossing.WAYS.items()}
            if figure == "floss-descent":
                targets = {way: paper_flossing.STEEP.get(way, paper_flossing.STEEP_ELSE) for way in targets}
            points = [(way, t, seed) for way, values in targets.items() for t in values for seed in range(seeds)]
            names = [*kind, "target", "seed"]
        assert list(zip(*(rows[name].tolist() for name in names), strict=True)) == points
    if training:
        for name in table:
            if name.startswith("accuracy"):
                assert np.all((table[name] >= 0) & (table[name] <= 1)), name
            if name.startswith(("first", "last", "gradient")):
                lost = np.isnan(table[name]) & ~table["diverged"]
                assert set(table["student"][lost]) <= {"lru stack"}, name
    elif figure == "floss-approach":
        settled = table["mean_square"] < 0  # else they grow for ever, and single precision does not hold them
        for name in ("total", "incoherent", "total_median", "incoherent_median"):
            assert np.all((table[name][settled] > 0) & np.isfinite(table[name][settled])), name
        assert np.all(table["norm"] >= table["radius"] * (1 - 1e-4))
        linear = results.select(table, way="linear")
        np.testing.assert_allclose(linear["radius"], np.exp(linear["target"]), rtol=1e-4)
