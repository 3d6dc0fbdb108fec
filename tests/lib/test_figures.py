import base64
import struct

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer

from scanrnn import figures

matplotlib.use("agg")

ALT = "Measured points follow the theory line within 1.8 standard errors at all 12 points"
WORDS = {"name": "fig-spectral-radius", "caption": "The radius $|\\lambda|$.", "alt": ALT}


@pytest.fixture(autouse=True)
def style():
    """The book's style, for one test; no figure outlives it."""
    with matplotlib.rc_context():
        figures.use_style()
        yield
    plt.close("all")


@pytest.fixture
def ipython(tmp_path, monkeypatch):
    """A shell whose displays `capture_output` catches; it writes no history."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    config = Config()
    config.HistoryManager.enabled = False
    yield InteractiveShell.instance(config=config)
    InteractiveShell.clear_instance()


@pytest.fixture
def labelled():
    fig, axes = plt.subplots()
    axes.plot([1, 2])
    axes.set(xlabel="x", ylabel="y")
    return fig


# Style ---------------------------------------------------------------------------------------------------------------


def test_series_differ_by_colour_line_style_and_marker_at_once():
    cycle = plt.rcParams["axes.prop_cycle"].by_key()
    assert cycle.keys() == {"color", "linestyle", "marker"}
    for values in cycle.values():
        assert len(set(values)) == len(values) >= 6


def relative_luminance(colour):
    channels = np.asarray(colour)
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def contrast(first, second):
    dark, light = sorted([relative_luminance(first), relative_luminance(second)])
    return (light + 0.05) / (dark + 0.05)


def in_the_dark(colour):
    """CSS `invert(0.93) hue-rotate(180deg)`: the luminance of the inverted colour, minus its departure from that."""
    inverted = 0.93 - 0.86 * np.asarray(colour)
    grey = inverted @ [0.213, 0.715, 0.072]  # the weights that the CSS filter uses
    return np.clip(2 * grey - inverted, 0, 1)


def test_colours_stand_out_from_the_card_in_both_themes():
    # WCAG asks 3 of graphics. The palette's orange and sky blue have 2.2 on white; they come last, so that only a sixth
    # series meets them, and line style and marker tell them apart as well.
    card = to_rgb(plt.rcParams["figure.facecolor"])
    colours = [to_rgb(colour) for colour in plt.rcParams["axes.prop_cycle"].by_key()["color"]]
    for index, colour in enumerate(colours):
        assert contrast(colour, card) > (3 if index < 5 else 2)
        assert contrast(in_the_dark(colour), in_the_dark(card)) > 3


def test_text_is_legible_on_a_phone():
    shrink = 350 / (plt.rcParams["figure.figsize"][0] * 96)
    sizes = [plt.rcParams["font.size"], plt.rcParams["axes.labelsize"], plt.rcParams["legend.fontsize"]]
    for size in [*sizes, plt.rcParams["xtick.labelsize"], plt.rcParams["ytick.labelsize"]]:
        assert size * shrink * 96 / 72 >= 9  # CSS pixels; below that, phone readers zoom


# Showing -------------------------------------------------------------------------------------------------------------


def test_show_publishes_picture_alt_text_and_caption(ipython, labelled):
    from IPython.utils.capture import capture_output

    with capture_output() as captured:
        figures.show(labelled, **WORDS)
    picture, caption = captured.outputs
    assert picture.metadata == {"scanrnn": WORDS, "image/png": {"width": 480}}
    assert picture.data["text/plain"] == ALT
    png = base64.b64decode(picture.data["image/png"])
    assert png.startswith(b"\x89PNG")
    assert struct.unpack(">II", png[16:24]) == (1000, 680)  # 5.0 x 3.4 inches at 200 dpi: the declared width, sharp
    assert caption.data["text/markdown"] == WORDS["caption"]
    assert caption.metadata == {"scanrnn": {"role": "caption"}}
    assert captured.stdout == ""
    assert plt.get_fignums() == []


def test_show_outside_ipython_only_closes(labelled, capsys):
    figures.show(labelled, **WORDS)
    assert plt.get_fignums() == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("name", "spectral-radius", ValueError),
        ("name", "fig-", ValueError),
        ("name", "fig-Radius", ValueError),
        ("name", "fig-spectral_radius", ValueError),
        ("name", None, TypeError),
        ("caption", " ", ValueError),
        ("caption", 3, TypeError),
        ("alt", "", ValueError),
        ("alt", "The radius is 1.0", ValueError),
        ("alt", "The measured points follow the theory line closely", ValueError),
        ("alt", None, TypeError),
    ],
)
def test_show_names_bad_words(labelled, argument, value, error):
    with pytest.raises(error, match=f"^{argument} must"):
        figures.show(labelled, **{**WORDS, argument: value})


def test_show_names_the_axes_that_lacks_a_label():
    fig, (first, second) = plt.subplots(1, 2)
    for axes in (first, second):
        axes.plot([1, 2])
    first.set(xlabel="x", ylabel="y")
    second.set(xlabel="x", title="gradients")
    with pytest.raises(ValueError, match=r"axes 2 of 2 \('gradients'\) must have x and y labels, got no y label"):
        figures.show(fig, **WORDS)
    second.set(xlabel="", ylabel="")
    with pytest.raises(ValueError, match=r"got no x and y label"):
        figures.show(fig, **WORDS)


def test_shared_labels_colour_bars_and_empty_axes_are_enough():
    fig, grid = plt.subplots(2, 2, sharex=True)
    for axes in grid.flat[:3]:
        axes.plot([1, 2])
        axes.set_ylabel("y")
    grid[1, 0].set_xlabel("x")  # shared by the column, and here by all
    fig.colorbar(grid[0, 0].scatter([0, 1], [0, 1], c=[0, 1]), label="loss")
    figures.show(fig, **WORDS)

    fig, axes = plt.subplots()
    axes.plot([1, 2])
    fig.supxlabel("x")
    fig.supylabel("y")
    figures.show(fig, **WORDS)


def test_a_colour_bar_without_label_is_refused():
    fig, axes = plt.subplots()
    points = axes.scatter([0, 1], [0, 1], c=[0, 1])
    axes.set(xlabel="x", ylabel="y")
    fig.colorbar(points)
    with pytest.raises(ValueError, match="axes 2 of 2"):
        figures.show(fig, **WORDS)


# Theory and measurement ----------------------------------------------------------------------------------------------

X = np.array([1.0, 2.0, 4.0])
ERRORS = np.array([0.5, 0.25, 0.5])
RESIDUALS = np.array([1.0, -1.5, 3.0])


def measured(theory):
    return theory(X) + RESIDUALS * ERRORS  # exact in binary


def test_residuals_are_in_standard_errors():
    _, (axes, residual_axes) = figures.residual_figure(xlabel="rank", ylabel="exponent")
    summary = figures.theory_vs_measured(
        axes, X, measured(np.square), ERRORS, np.square, residual_axes=residual_axes, label="$N = 4$"
    )
    assert summary == figures.Agreement(points=3, max_residual=3.0, fraction_within_two=2 / 3)
    drawn = residual_axes.lines[-1]
    np.testing.assert_array_equal(drawn.get_xydata(), np.stack([X, RESIDUALS], axis=1))
    bottom, top = residual_axes.get_ylim()
    assert bottom == -top
    assert top > 3
    assert axes.get_shared_x_axes().joined(axes, residual_axes)


def test_bars_are_two_standard_errors():
    _, axes = plt.subplots()
    figures.theory_vs_measured(axes, X, measured(np.square), ERRORS)
    (bars,) = axes.containers
    assert isinstance(bars, ErrorbarContainer)
    heights = [segment[1, 1] - segment[0, 1] for segment in bars.lines[2][0].get_segments()]
    np.testing.assert_allclose(heights, 4 * ERRORS, rtol=1e-14)


def test_a_callable_theory_is_drawn_evenly_on_the_axes_scale():
    _, axes = plt.subplots()
    axes.set_xscale("log")
    figures.theory_vs_measured(axes, X, measured(np.square), ERRORS, np.square)
    grid, line = np.transpose(axes.lines[-1].get_xydata())
    np.testing.assert_allclose(grid, np.geomspace(1, 4, 200), rtol=1e-13)
    np.testing.assert_array_equal(line, np.square(grid))


def test_theory_x_sets_the_line_and_leaves_the_residuals_alone():
    _, axes = plt.subplots()
    grid = np.linspace(0, 5, 7)
    summary = figures.theory_vs_measured(axes, X, measured(np.square), ERRORS, np.square, theory_x=grid)
    np.testing.assert_array_equal(axes.lines[-1].get_xdata(), grid)
    assert summary is not None
    assert summary.max_residual == 3.0


def test_an_array_theory_agrees_with_the_callable():
    _, axes = plt.subplots()
    ours = figures.theory_vs_measured(axes, X, measured(np.square), ERRORS, np.square(X))
    assert ours == figures.theory_vs_measured(axes, X, measured(np.square), ERRORS, np.square)


def test_without_theory_there_is_nothing_to_compare():
    _, axes = plt.subplots()
    assert figures.theory_vs_measured(axes, X, X, ERRORS) is None
    assert len(axes.lines) == 1


def test_points_and_line_of_a_series_share_a_colour_and_series_differ():
    _, (axes, residual_axes) = figures.residual_figure(xlabel="rank", ylabel="exponent")
    for label in ("first", "second"):
        figures.theory_vs_measured(axes, X, X, ERRORS, np.copy, label=label, residual_axes=residual_axes)
    points, lines = axes.lines[0::2], axes.lines[1::2]
    for drawn, line in zip(points, lines, strict=True):
        assert drawn.get_color() == line.get_color()
        assert (drawn.get_linestyle(), line.get_marker()) == ("None", "")
    assert points[0].get_color() != points[1].get_color()
    assert points[0].get_marker() != points[1].get_marker()
    assert lines[0].get_linestyle() != lines[1].get_linestyle()
    assert axes.get_legend_handles_labels()[1] == ["first", "second"]
    assert len(residual_axes.patches) == 1  # one band for both
    assert [line.get_color() for line in residual_axes.lines[1:]] == [line.get_color() for line in lines]


def test_a_lone_series_names_points_and_line():
    _, axes = plt.subplots()
    figures.theory_vs_measured(axes, X, X, ERRORS, np.copy)
    assert sorted(axes.get_legend_handles_labels()[1]) == ["measured", "theory"]


def test_sentences_state_the_numbers_and_serve_as_alt_text(labelled):
    close, far = figures.Agreement(12, 1.84, 1.0), figures.Agreement(12, 2.71, 11 / 12)
    assert close.sentence == "measured points follow the theory line within 1.8 standard errors at all 12 points"
    assert far.sentence == (
        "measured points lie within 2 standard errors of the theory line at 11 of 12 points, and at most 2.7 from it"
    )
    figures.show(labelled, **{**WORDS, "alt": far.sentence})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[:2]}, ValueError, r"measured must have the shape \(2,\), got \(3,\)"),
        ({"standard_errors": 0.1}, ValueError, r"standard_errors must have 1 axes, got shape \(\)"),
        (
            {"standard_errors": ERRORS * [1, 0, 1]},
            ValueError,
            r"standard_errors must be positive, got 0.0 at index \(1,\)",
        ),
        ({"measured": [1, np.nan, 3]}, ValueError, r"measured must be finite, got nan at index \(1,\)"),
        ({"x": X * 1j}, TypeError, "x must be real numbers, got complex128"),
        ({"x": ["a", "b", "c"]}, TypeError, "x must be real numbers"),
        ({"x": [], "measured": [], "standard_errors": []}, ValueError, "x must have at least one point"),
        ({"theory": X[:2]}, ValueError, r"theory must have the shape \(3,\), got \(2,\)"),
        ({"theory": lambda x: 1.0}, ValueError, r"theory\(theory_x\) must have 1 axes, got shape \(\)"),
        ({"theory": X, "theory_x": X}, ValueError, "theory_x needs a callable theory, got ndarray"),
        ({"theory": None, "residual_axes": "given"}, ValueError, "residual_axes needs a theory, got None"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    _, (axes, residual_axes) = figures.residual_figure(xlabel="rank", ylabel="exponent")
    arguments = {"x": X, "measured": X, "standard_errors": ERRORS, "theory": np.copy} | change
    if "residual_axes" in change:
        arguments["residual_axes"] = residual_axes
    with pytest.raises(error, match=message):
        figures.theory_vs_measured(axes, **arguments)


# Runs ----------------------------------------------------------------------------------------------------------------

# Seeds of three groups; of the second one and a half of three in four diverged, of the last all.
SAMPLES = [
    np.array([4.0, 1.0, 3.0, 2.0]),
    np.array([1.0, np.inf, 5.0, 2.0, np.nan]),
    np.array([np.nan, 1.0, -np.inf]),
    np.array([np.inf, np.nan]),
]
PLACES = np.array([1.0, 2.0, 4.0, 8.0])


def drawn(axes, horizontal):
    """What `runs` drew: the medians, and by group its bar, dots, cross and number; positions come first."""
    fig = axes.figure
    fig.canvas.draw()  # nothing that was drawn makes Matplotlib warn
    turn = (lambda xy: np.asarray(xy)[..., ::-1]) if horizontal else np.asarray
    medians, *others = axes.lines
    dots = [turn(line.get_xydata()) for line in others if line.get_marker() == "."]
    crosses = [line for line in others if line.get_marker() == "x"]
    bars = [turn(segment) for segment in axes.collections[0].get_segments() if len(segment)]
    return turn(medians.get_xydata()), bars, dots, crosses


@pytest.mark.parametrize("horizontal", [False, True])
def test_runs_are_dots_with_their_median_and_quartiles(horizontal):
    _, axes = plt.subplots()
    figures.runs(axes, PLACES, SAMPLES, label="ten seeds", horizontal=horizontal)
    medians, bars, dots, crosses = drawn(axes, horizontal)
    # diverged runs count as infinite: the median of 1, 2, 5, ∞, ∞ is 5, that of 1, ∞, ∞ is none
    np.testing.assert_array_equal(medians, np.stack([PLACES, np.array([2.5, 5.0, np.inf, np.inf])], axis=1))
    # ends: of 1, 2, 3, 4 the quartiles; of 1, 2, 5, ∞, ∞ the first is 2, the third ∞: to the last run
    np.testing.assert_array_equal(bars, [[[1, 1.75], [1, 3.25]], [[2, 2], [2, 5]]])
    for position, sample, group in zip(PLACES, SAMPLES, dots, strict=True):
        finite = sample[np.isfinite(sample)]
        np.testing.assert_array_equal(group, np.transpose([np.full(finite.size, position), finite]))
    scales = axes.get_xscale(), axes.get_yscale()
    assert scales == (("log", "linear") if horizontal else ("linear", "log"))
    assert axes.get_legend_handles_labels()[1] == ["ten seeds"]
    # one cross for each group with diverged runs, at the edge of the plot and at its position
    places = [PLACES[1], PLACES[2], PLACES[3]]
    assert len(crosses) == len(axes.texts) == 3
    assert [text.get_text() for text in axes.texts] == ["2", "2", "2"]
    for place, cross in zip(places, crosses, strict=True):
        pixel = cross.get_transform().transform(cross.get_xydata())[0]
        along, across = (axes.transData.inverted().transform(pixel), axes.transAxes.inverted().transform(pixel))
        assert along[1 if horizontal else 0] == pytest.approx(place)
        assert 0.95 < across[0 if horizontal else 1] <= 1


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9, 10])
def test_medians_and_quartiles_are_numpy_s(size):
    sample = np.random.default_rng(size).lognormal(size=size)
    _, axes = plt.subplots()
    figures.runs(axes, np.array([3]), [sample])
    medians, bars, *_ = drawn(axes, False)
    np.testing.assert_allclose(medians, [[3, np.median(sample)]], rtol=1e-14)
    np.testing.assert_allclose(bars[0][:, 1], np.quantile(sample, [0.25, 0.75]), rtol=1e-14)


@pytest.mark.parametrize("horizontal", [False, True])
def test_a_shift_is_a_factor_on_a_logarithmic_axis(horizontal):
    for scale, expected in (("linear", PLACES + 0.2), ("log", PLACES * np.exp(0.2))):
        _, axes = plt.subplots()
        (axes.set_yscale if horizontal else axes.set_xscale)(scale)
        figures.runs(axes, PLACES, SAMPLES, shift=0.2, horizontal=horizontal)
        medians, bars, dots, crosses = drawn(axes, horizontal)
        np.testing.assert_allclose(medians[:, 0], expected, rtol=1e-14)
        np.testing.assert_allclose([bar[0, 0] for bar in bars], expected[:2], rtol=1e-14)
        np.testing.assert_allclose(dots[0][:, 0], expected[0], rtol=1e-14)
        where = [np.asarray(cross.get_xydata())[0, 1 if horizontal else 0] for cross in crosses]
        np.testing.assert_allclose(where, expected[1:], rtol=1e-14)


def test_groups_of_runs_share_a_colour_and_series_differ():
    _, axes = plt.subplots()
    figures.runs(axes, PLACES, SAMPLES, label="first")
    count = len(axes.lines)
    figures.runs(axes, PLACES, SAMPLES, label="second")
    first, second = axes.lines[:count], axes.lines[count:]
    for lines, bars in ((first, axes.collections[0]), (second, axes.collections[1])):
        assert len({line.get_color() for line in lines}) == 1
        np.testing.assert_allclose(bars.get_colors()[0][:3], to_rgb(lines[0].get_color()))  # type: ignore[attr-defined]
        assert lines[0].get_linestyle() == "None"
    assert first[0].get_color() != second[0].get_color()
    assert first[0].get_marker() != second[0].get_marker()
    cycle = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    assert [first[0].get_color(), second[0].get_color()] == cycle[:2]  # none is skipped


@pytest.mark.parametrize(
    ("positions", "samples", "error", "message"),
    [
        (
            [1, 2],
            [[1.0]],
            ValueError,
            r"samples must be 2 arrays of runs, .* got shapes \[\(1,\)\]",
        ),
        ([1], [[]], ValueError, r"one for each position, got shapes \[\(0,\)\]"),
        ([1], [[[1.0]]], ValueError, r"got shapes \[\(1, 1\)\]"),
        ([1], [1.0], ValueError, r"got shapes \[\(\)\]"),
        ([1], [[np.nan, 1.0, 0.0]], ValueError, r"samples must be positive, got 0\.0 at index \(2,\)"),
        ([1], [[-1.0]], ValueError, r"samples must be positive, got -1\.0 at index \(0,\)"),
        ([np.nan], [[1.0]], ValueError, "positions must be finite, got nan"),
        ([], [], ValueError, "positions must have at least one point"),
        ([[1.0]], [[1.0]], ValueError, "positions must have 1 axes"),
        (["a"], [[1.0]], TypeError, "positions must be real numbers"),
    ],
)
def test_runs_that_do_not_fit_are_refused(positions, samples, error, message):
    _, axes = plt.subplots()
    with pytest.raises(error, match=message):
        figures.runs(axes, positions, samples)
