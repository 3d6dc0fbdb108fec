"""Tables of portraits: networks matched at one exponent, and powers fitted to them, on tables whose answer is known."""

import numpy as np
import pytest

from scanrnn.approach import matched, powers

FIRST = -np.array([0.5, 0.12, 0.06, 0.03, 0.01])


def table(power=-2.0, floor=700.0, seeds=3):
    """y = floor of the network + |Λ|^p, as `powers` supposes; nothing but the floor at the lowest target."""
    first = np.tile(FIRST, seeds)
    seed = np.repeat(np.arange(seeds), len(FIRST))
    excess = np.where(first == FIRST[0], 0.0, np.abs(first) ** power)
    return {"first": first, "target": first, "seed": seed, "y": floor * (1 + seed) + excess, "mean_square": first / 2}


def test_each_network_near_the_exponent_counts_once():
    rows = table()
    np.testing.assert_allclose(matched(rows, -0.03, "y"), [700 * (1 + s) + 0.03**-2.0 for s in range(3)])
    both = matched(rows, -0.042, "y", within=1.5)  # 0.06 and 0.03 are both within a factor 1.5 of it
    np.testing.assert_allclose(both, [700 * (1 + s) + (0.03**-2.0 + 0.06**-2.0) / 2 for s in range(3)])


def test_networks_without_a_row_there_or_without_a_finite_value_are_left_out():
    rows = table()
    assert matched(rows, -0.2, "y", within=1.1).size == 0
    rows["y"][3] = np.inf
    np.testing.assert_allclose(matched(rows, -0.03, "y"), [700 * (1 + s) + 0.03**-2.0 for s in (1, 2)])


@pytest.mark.parametrize("power", [-1.0, -2.0, -3.0])
def test_the_power_of_what_exceeds_the_fast_modes_is_found(power):
    np.testing.assert_allclose(
        powers(table(power), "y"), [power] * 3, rtol=1e-9
    )  # a straight line through exact points
    np.testing.assert_allclose(powers(table(power), "y", "mean_square", nearest=0.004), [power] * 3, rtol=1e-9)


def test_a_network_with_fewer_than_three_usable_rows_has_no_power():
    rows = table()
    rows["y"][1:3] = np.nan  # leaves two of network 0
    assert powers(rows, "y").size == 2
    assert powers(rows, "y", nearest=0.05).size == 0
    rows = table()
    rows["first"] = -rows["first"]  # positive rates cannot be fitted
    assert powers(rows, "y").size == 0


def test_exponents_and_factors_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"exponent must be negative, got 0\.1"):
        matched(table(), 0.1, "y")
    with pytest.raises(ValueError, match=r"within must be above 1, got 0\.5"):
        matched(table(), -0.1, "y", within=0.5)
