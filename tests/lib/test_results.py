"""Result tables: what is written is read, the best rates, and tables that are no tables."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scanrnn import results


def table_of(**columns) -> dict[str, np.ndarray]:
    return {name: np.array(column) for name, column in columns.items()}


# Reading and writing -------------------------------------------------------------------------------------------------


def test_every_kind_of_column_is_read_as_it_was_written(tmp_path):
    table = table_of(
        seed=[3, -1, 2**40],
        loss=[0.1, 1e-300, -0.0],
        broken=[np.nan, np.inf, -np.inf],
        diverged=[True, False, True],
        student=["rnn", "with, comma", 'and "quotes"'],
    )
    results.write(tmp_path / "a.csv", table)
    read = results.read(tmp_path / "a.csv")
    assert list(read) == list(table)
    for name, column in table.items():
        assert read[name].dtype.kind == column.dtype.kind
        np.testing.assert_array_equal(read[name], column)
    assert np.signbit(read["loss"][2])
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


@pytest.mark.parametrize(("width", "dtype", "bits"), [(32, np.float32, np.uint32), (64, np.float64, np.uint64)])
def test_floats_keep_every_bit_and_reading_and_writing_keep_every_byte(tmp_path_factory, width, dtype, bits):
    path = tmp_path_factory.mktemp("floats") / "a.csv"

    @settings(deadline=None)  # a busy machine is no failure
    @given(st.lists(st.floats(width=width, allow_nan=False), min_size=1))
    def check(values):
        column = np.array(values, dtype)
        results.write(path, {"x": column})
        read, first = results.read(path)["x"], path.read_bytes()
        np.testing.assert_array_equal(read.astype(dtype).view(bits), column.view(bits))
        results.write(path, {"x": read})
        assert path.read_bytes() == first

    check()


def test_whole_numbers_among_reals_stay_reals(tmp_path):
    results.write(tmp_path / "a.csv", table_of(rate=[1.0, 2.0], few=[1.0, 0.5]))
    assert results.read(tmp_path / "a.csv")["rate"].dtype == float


def test_the_table_is_found_by_its_name_beside_its_provenance(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    results.write(tmp_path / "results" / "fig.csv", table_of(seed=[1]))
    (tmp_path / "results" / "fig.json").write_text(json.dumps({"commit": "abc"}))
    monkeypatch.setattr(results._resources, "find", tmp_path.joinpath)
    assert results.read("fig")["seed"] == 1
    assert results.provenance("fig") == {"commit": "abc"}


def test_a_table_that_is_not_there_is_named():
    for ask in (results.read, results.provenance):
        with pytest.raises(FileNotFoundError, match=r"results/no-such-figure\..* is neither in the checkout"):
            ask("no-such-figure")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3\n", r"a.csv, line 3: must have 2 entries, got 1"),
        ("a,b\n1,2,3\n", r"a.csv, line 2: must have 2 entries, got 3"),
        ("a,b\n1,2\n\n", r"a.csv, line 3: must have 2 entries, got 0"),
        ("", r"a.csv: must have the names of the columns in line 1, got an empty line or none"),
        ("\n1\n", r"a.csv: must have the names of the columns in line 1, got an empty line or none"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        results.read(tmp_path / "a.csv")


@pytest.mark.parametrize("columns", [{}, {"a": [1, 2], "b": [1]}, {"a": [[1, 2]]}, {"a": 1.0}])
def test_columns_of_other_shapes_are_not_written(tmp_path, columns):
    with pytest.raises(ValueError, match=r"table must have columns of one axis and one length, got \{"):
        results.write(tmp_path / "a.csv", columns)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_table_and_nothing_else(tmp_path, monkeypatch):
    results.write(tmp_path / "a.csv", table_of(seed=[1]))

    def fails(*_):
        raise OSError("no room")

    monkeypatch.setattr(results.os, "replace", fails)
    with pytest.raises(OSError, match="no room"):
        results.write(tmp_path / "a.csv", table_of(seed=[2]))
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    assert results.read(tmp_path / "a.csv")["seed"] == 1


# Rows ----------------------------------------------------------------------------------------------------------------

RUNS = table_of(
    student=["rnn", "rnn", "rnn", "lru", "lru", "lru"],
    learning_rate=[0.1, 0.01, 0.001, 0.1, 0.01, 0.001],
    seed=[0, 1, 2, 0, 1, 2],
)


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"student": "lru"}, [3, 4, 5]),
        ({"student": "rnn", "seed": (0, 2)}, [0, 2]),
        ({"learning_rate": np.float32(0.01)}, [1, 4]),  # 0.009999999776 in double precision
        ({"learning_rate": [0.1 + 1e-9, 0.001]}, [0, 2, 3, 5]),
        ({"learning_rate": 0.0101}, []),
        ({"student": "gru"}, []),
    ],
)
def test_select_keeps_the_rows_with_the_values(where, rows):
    chosen = results.select(RUNS, **where)
    assert list(chosen) == list(RUNS)
    for name, column in RUNS.items():
        np.testing.assert_array_equal(chosen[name], column[rows])


def test_select_tells_tiny_numbers_apart():
    assert results.select(table_of(rate=[1e-8, 2e-8, 0.0]), rate=1e-8)["rate"] == [1e-8]


def test_select_names_the_columns_there_are():
    with pytest.raises(ValueError, match=r"the table has the columns \['student', 'learning_rate', 'seed'\], got 'nu'"):
        results.select(RUNS, nu=1)


def losses(*of_rates) -> dict[str, np.ndarray]:
    """Rates 1, 0.1, 0.01 ... with two seeds each, not in order."""
    rows = [(10.0**-i, seed, loss) for i, pair in enumerate(of_rates) for seed, loss in enumerate(pair)][::-1]
    return dict(zip(("learning_rate", "seed", "final_loss"), map(np.array, zip(*rows, strict=True)), strict=True))


@pytest.mark.parametrize(
    ("table", "best", "at_edge"),
    [
        (losses((3, 3), (1, 2), (0, 4)), 0.1, False),  # by the mean, not by the least
        (losses((1, 1), (1, 2), (2, 4)), 1.0, True),
        (losses((3, 3), (2, 2), (1, 1)), 0.01, True),
        (losses((0, np.nan), (3, 3), (4, 4)), 0.1, False),  # one seed diverged at the largest rate, which was tried
        (losses((0, np.inf), (3, 3), (4, 4)), 0.1, False),
        (losses((3, 4)), 1.0, False),  # one rate has no edge
    ],
)
def test_the_best_rate_has_the_least_mean_loss(table, best, at_edge):
    rate, rows, edge = results.best_rate(table)
    assert (rate, edge) == (pytest.approx(best), at_edge)
    assert sorted(rows["seed"]) == [0, 1]
    np.testing.assert_allclose(rows["learning_rate"], best)


def test_the_best_rate_by_another_column():
    table = losses((1, 1), (2, 2))
    table["exact_loss"] = -table["final_loss"]
    assert results.best_rate(table, loss="exact_loss")[0] == pytest.approx(0.1)


def test_there_is_no_best_rate_where_all_diverged_and_none_of_no_rows():
    rate, rows, at_edge = results.best_rate(losses((np.nan, 1), (2, np.inf)))
    assert np.isnan(rate)
    assert at_edge is False
    assert [len(column) for column in rows.values()] == [0, 0, 0]
    with pytest.raises(ValueError, match="table must have at least one row, got none"):
        results.best_rate(rows)


def test_the_best_of_each_is_the_least_finite_loss():
    table = table_of(
        teacher_seed=[10, 9, 10, 9, 11, 11],
        final_loss=[3.0, np.nan, 2.0, 5.0, np.nan, np.inf],
    )
    np.testing.assert_array_equal(results.best_of_each(table), [5, 2, np.inf])  # of 9, 10, 11
    table["exact_loss"] = np.arange(6.0)
    np.testing.assert_array_equal(results.best_of_each(table, loss="exact_loss"), [1, 0, 4])
    assert results.best_of_each(results.select(table, teacher_seed=0)).shape == (0,)


def test_the_best_of_each_combination_is_in_the_order_of_numbers_not_of_their_digits():
    table = table_of(student=["b", "b", "a", "b"], seed=[10, 9, 10, 10], final_loss=[3.0, 2.0, 4.0, 1.0])
    np.testing.assert_array_equal(results.best_of_each(table, by=("student", "seed")), [4, 2, 1])
    np.testing.assert_array_equal(results.best_of_each(table, by=("seed", "student")), [2, 4, 1])


def test_pivot_puts_every_row_in_its_place():
    table = {"seed": np.array([1, 0, 1, 0]), "t": np.array([10.0, 1.0, 1.0, 10.0]), "x": np.array([4, 1, 3, 2])}
    assert results.pivot(table, "x", "seed", "t").tolist() == [[1, 2], [3, 4]]
    assert results.pivot(table, "x", "t", "seed").tolist() == [[1, 3], [2, 4]]


@pytest.mark.parametrize("rows", [3, 0])
def test_pivot_refuses_a_table_with_gaps(rows):
    table = {"seed": np.array([1, 0, 1])[:rows], "t": np.array([10.0, 1.0, 1.0])[:rows], "x": np.arange(3)[:rows]}
    if rows:
        with pytest.raises(ValueError, match="one row for each combination"):
            results.pivot(table, "x", "seed", "t")
    else:
        assert results.pivot(table, "x", "seed", "t").shape == (0, 0)


def test_pivot_refuses_two_rows_for_one_place_and_unknown_columns():
    twice = {"seed": np.array([0, 0]), "x": np.arange(2)}
    with pytest.raises(ValueError, match="one row for each combination"):
        results.pivot(twice, "x", "seed")
    with pytest.raises(ValueError, match="got 'y'"):
        results.pivot(twice, "y", "seed")


def test_a_series_of_columns_is_sorted_by_number():
    table = {
        "y_10": np.array([3.0, 6.0]),
        "y_0": np.array([1.0, 4.0]),
        "y_5": np.array([2.0, 5.0]),
        "y_end": np.zeros(2),
    }
    numbers, values = results.series(table | {"yy_0": np.zeros(2)}, "y")
    np.testing.assert_array_equal(numbers, [0, 5, 10])
    np.testing.assert_array_equal(values, [[1, 2, 3], [4, 5, 6]])
    with pytest.raises(ValueError, match="got 'z', to be followed by numbers"):
        results.series(table, "z")


@pytest.mark.parametrize(("won", "count"), [(0, 16), (1, 8), (8, 11), (16, 16)])
def test_wilsons_interval_is_where_a_share_would_be_two_standard_errors_away(won, count):
    flags = np.arange(count) < won
    found = results.share(flags)
    assert found.value == won / count
    for end in (found.low, found.high):  # Wilson's definition: |p - end| = 1.96 √(end (1 - end) / n)
        np.testing.assert_allclose(abs(won / count - end), 1.959964 * np.sqrt(abs(end * (1 - end)) / count), atol=1e-9)
    assert -1e-12 < found.low <= found.value <= found.high < 1 + 1e-12
    assert found.low < found.high


def test_shares_of_what_is_not_a_trial_are_refused():
    with pytest.raises(ValueError, match="at least one trial"):
        results.share(np.zeros(0, bool))
    with pytest.raises(TypeError, match="flags must be boolean, got float64"):
        results.share(np.ones(3))


def test_the_bootstrapped_median_covers_as_it_says():
    # Of 200 samples of 15 Gaussian numbers the interval holds the true median in about 95 %; bootstrapped quantiles of
    # small samples are a little off, and four standard errors of the share are 6 %.
    rng = np.random.default_rng(1)
    found = [results.median(rng.normal(size=15), draws=500) for _ in range(200)]
    assert np.mean([one.low <= 0 <= one.high for one in found]) > 0.87
    assert np.mean([one.low <= 0 <= one.high for one in found]) < 1
    assert results.median([3.0]) == (3.0, 3.0, 3.0)
    assert results.median([1, 2, 3, 4]) == results.median(np.array([1.0, 2, 3, 4]))
    assert np.isnan(results.median([1.0, np.nan]).value)
    with pytest.raises(ValueError, match=r"values must have one axis and at least one entry, got shape \(0,\)"):
        results.median([])


def test_an_interval_reads_as_a_number_and_its_range():
    assert str(results.Interval(957.321, 881.4, 1304.6)) == "957 [881, 1300]"
    assert f"{results.Interval(0.5, -0.25, float('nan'))}" == "0.5 [-0.25, nan]"
