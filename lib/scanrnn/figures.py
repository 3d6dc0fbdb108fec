r"""Figures: one style, alt text with every picture, and theory and measurement on the same axes.

The points are measured, the line is the theory. How far a point lies from the line is told in standard errors,

$$ z_i = \frac{m_i - \mathrm{theory}(x_i)}{\mathrm{s.e.}_i} . $$
"""

import base64
import io
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from jaxtyping import ArrayLike, Real
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import _checks

# Okabe and Ito's colour-blind-safe palette without its yellow, which vanishes on paper; the palest come last.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_LINES = ("-", "--", "-.", ":", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_WIDTH = 5.0  # inches: 480 CSS pixels, 350 on a phone, where 11 points still are 8
_CSS_PIXELS_PER_INCH = 96


def use_style() -> None:
    """Set Matplotlib's style for the book.

    Series differ by colour, line style and marker at once. A dense curve wants `markevery=0.1` (a marker at each
    tenth of the diagonal) or `marker=""` in the call of `plot`.
    """
    plt.rcParams.update(
        {
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.facecolor": "#fdfdfc",
            "axes.prop_cycle": cycler(color=_COLOURS) + cycler(linestyle=_LINES) + cycler(marker=_MARKERS),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "#fdfdfc",
            "figure.figsize": (_WIDTH, 3.4),
            "font.family": "sans-serif",
            "font.size": 11,
            "axes.labelsize": 11,
            "axes.titlesize": 11,
            "legend.fontsize": 10,
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
            "grid.color": "#d9d9d9",
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "lines.markersize": 5,
            "mathtext.fontset": "dejavusans",
            "savefig.dpi": 200,
        }
    )


def show(fig: Figure, *, name: str, caption: str, alt: str) -> None:
    """Display `fig` with its caption below, and close it.

    `name` is what the text refers to ("fig-spectral-radius"). `alt` states the finding with its numbers, for those
    who cannot see the picture; it travels in the output's metadata, from which the site takes it. Outside IPython
    there is nothing to display to: the figure is only closed.

    **Raises** `ValueError` if the name is not kebab-case starting with "fig-", the caption is empty, the alt text has
    fewer than 40 characters or no digit, or an axes that holds data lacks a label.
    """
    _require_text(name, caption, alt)
    _require_labels(fig)
    if _in_ipython():
        from IPython.display import display

        buffer = io.BytesIO()
        fig.savefig(buffer, format="png")
        picture = {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": alt}
        width = round(fig.get_figwidth() * _CSS_PIXELS_PER_INCH)
        about = {"scanrnn": {"alt": alt, "caption": caption, "name": name}, "image/png": {"width": width}}
        display(picture, raw=True, metadata=about)
        text = {"text/markdown": caption, "text/plain": caption}
        display(text, raw=True, metadata={"scanrnn": {"role": "caption"}})
    plt.close(fig)


@dataclass(frozen=True)
class Agreement:
    """How far measured points lie from the theory, in standard errors.

    - `points`: how many there are
    - `max_residual`: the largest |z|
    - `fraction_within_two`: the fraction with |z| <= 2 (of Gaussian errors: 0.954)
    """

    points: int
    max_residual: float
    fraction_within_two: float

    @property
    def sentence(self) -> str:
        """The finding in words, for alt texts and captions."""
        if self.fraction_within_two == 1:
            return (
                f"measured points follow the theory line within {self.max_residual:.1f} standard errors "
                f"at all {self.points} points"
            )
        within = round(self.fraction_within_two * self.points)
        return (
            f"measured points lie within 2 standard errors of the theory line at {within} of {self.points} points, "
            f"and at most {self.max_residual:.1f} from it"
        )


def theory_vs_measured(
    axes: Axes,
    x: Real[ArrayLike, " points"],
    measured: Real[ArrayLike, " points"],
    standard_errors: Real[ArrayLike, " points"],
    theory: Callable[[np.ndarray], ArrayLike] | Real[ArrayLike, " points"] | None = None,
    *,
    theory_x: Real[ArrayLike, " grid"] | None = None,
    label: str | None = None,
    residual_axes: Axes | None = None,
) -> Agreement | None:
    """Draw measured points with bars of ±2 standard errors, and the theory as a line of the same colour.

    A callable `theory(x)` is drawn on `theory_x` (default: 200 points that span `x`, evenly spaced on the axes' scale,
    so set a log scale first); an array holds the theory at `x`. With `residual_axes`, the residuals in standard errors
    are drawn there over a band of ±2. `label` names the points; without it they are "measured", and the line "theory".

    Returns how well the two agree, or None without a theory.

    **Raises** `ValueError` for shapes that differ, entries that are not finite, standard errors that are not positive,
    `theory_x` without a callable theory, or `residual_axes` without a theory.
    """
    x = _points("x", x)
    measured = _points("measured", measured, x.shape)
    standard_errors = _points("standard_errors", standard_errors, x.shape)
    _checks.require_values("standard_errors", standard_errors, "positive", lambda array: array > 0)
    if theory_x is not None and not callable(theory):
        raise ValueError(f"theory_x needs a callable theory, got {type(theory).__name__}")
    if residual_axes is not None and theory is None:
        raise ValueError("residual_axes needs a theory, got None")

    points = axes.errorbar(x, measured, 2 * standard_errors, label=label or "measured", zorder=3)[0]
    style = {"color": points.get_color(), "marker": points.get_marker(), "linestyle": "none"}
    line_style = points.get_linestyle()
    points.set_linestyle("none")
    if theory is None:
        return None

    if callable(theory):
        grid = _grid(axes, x) if theory_x is None else _points("theory_x", theory_x)
        line, at_points = _points("theory(theory_x)", theory(grid), grid.shape), theory(x)
    else:
        grid, line, at_points = x, theory, theory
    at_points = _points("theory", at_points, x.shape)
    axes.plot(grid, line, **(style | {"marker": "", "linestyle": line_style}), label=None if label else "theory")

    residuals = (measured - at_points) / standard_errors
    if residual_axes is not None:
        _draw_residuals(residual_axes, x, residuals, style)
    return Agreement(len(x), float(np.abs(residuals).max()), float(np.mean(np.abs(residuals) <= 2)))


def runs(
    axes: Axes,
    positions: Real[ArrayLike, " groups"],
    samples: Sequence[Real[ArrayLike, " runs"]],
    *,
    label: str | None = None,
    shift: float = 0.0,
    horizontal: bool = False,
) -> None:
    """Draw groups of runs, each run a dot, with a bar from the first to the third quartile and the median marked.

    The losses, one array for each position, stand on a logarithmic axis: the vertical one, or with `horizontal` the
    other. `shift` moves the groups along the axis of positions, by the factor exp(shift) if that is logarithmic. Runs
    that diverged (values that are not finite) are drawn as crosses at the edge of the plot, with their number; none is
    left out. They count as infinite losses: a bar whose end diverged ends at the last run that did not, and a median
    that diverged has no mark.

    **Raises** `ValueError` unless there are as many arrays as positions, each with at least one run, and all finite
    values positive.
    """
    centres = _points("positions", positions)
    samples = [np.asarray(sample, float) for sample in samples]
    if len(samples) != len(centres) or any(sample.ndim != 1 or sample.size == 0 for sample in samples):
        shapes = [sample.shape for sample in samples]
        raise ValueError(f"samples must be {len(centres)} arrays of runs, one for each position, got shapes {shapes}")
    for sample in samples:
        _checks.require_values("samples", sample, "positive", lambda array: (array > 0) | ~np.isfinite(array))
    (axes.set_xscale if horizontal else axes.set_yscale)("log")
    logarithmic = (axes.get_yscale() if horizontal else axes.get_xscale()) == "log"
    centres = centres * np.exp(shift) if logarithmic else centres + shift
    order = (lambda x, y: (y, x)) if horizontal else (lambda x, y: (x, y))

    def summary(sample: np.ndarray) -> np.ndarray:
        ordered = np.sort(np.where(np.isfinite(sample), sample, np.inf))
        places = np.array([0.25, 0.5, 0.75]) * (len(ordered) - 1)
        below, above = ordered[np.floor(places).astype(int)], ordered[np.ceil(places).astype(int)]
        with np.errstate(invalid="ignore"):  # NumPy's own quantiles are NaN beside infinity
            between = np.where(places % 1 == 0, below, below + places % 1 * (above - below))
        return np.where(np.isinf(above), np.inf, between)

    low, middle, high = np.array([summary(sample) for sample in samples]).T
    last = np.array([max(sample[np.isfinite(sample)], default=np.inf) for sample in samples])
    high = np.where(np.isinf(high), last, high)
    line = axes.plot(*order(centres, middle), label=label, linestyle="none", markersize=7, zorder=4)[0]
    colour = line.get_color()
    bars = (axes.hlines if horizontal else axes.vlines)(centres, low, high, color=colour, linewidth=3, alpha=0.45)
    bars.set_zorder(2)
    for position, sample in zip(centres, samples, strict=True):
        good = sample[np.isfinite(sample)]
        dots = order(np.full(good.shape, position), good)
        axes.plot(*dots, linestyle="none", marker=".", color=colour, markersize=5, alpha=0.55, zorder=3)
        if lost := len(sample) - len(good):
            place = axes.get_yaxis_transform() if horizontal else axes.get_xaxis_transform()
            axes.plot(*order(position, 0.985), "x", color=colour, markersize=7, transform=place, clip_on=False)
            axes.annotate(f"{lost}", order(position, 0.985), xycoords=place, color=colour, fontsize=8)


def residual_figure(*, xlabel: str, ylabel: str) -> tuple[Figure, tuple[Axes, Axes]]:
    """A figure with a main panel and, below it and sharing its x axis, a small panel for residuals."""
    fig, (axes, residual_axes) = plt.subplots(2, 1, sharex=True, height_ratios=(3, 1), figsize=(_WIDTH, 4.2))
    axes.set_ylabel(ylabel)
    residual_axes.set_xlabel(xlabel)
    return fig, (axes, residual_axes)


def _draw_residuals(axes: Axes, x: np.ndarray, residuals: np.ndarray, style: dict) -> None:
    if not axes.has_data():  # a second series shares the first one's band
        axes.axhspan(-2, 2, color="#b0b0b0", alpha=0.3, linewidth=0)
        axes.axhline(0, color="#707070", linestyle="-", marker="", linewidth=1)
    if not axes.get_ylabel():
        axes.set_ylabel("residual\n(s.e.)")
    axes.plot(x, residuals, **style)
    limit = max(3.0, 1.2 * np.abs(residuals).max(), *np.abs(axes.get_ylim()))
    axes.set_ylim(-limit, limit)


def _grid(axes: Axes, x: np.ndarray) -> np.ndarray:
    scale = axes.xaxis.get_transform()
    first, last = scale.transform(np.array([x.min(), x.max()]))
    return scale.inverted().transform(np.linspace(first, last, 200))


def _points(name: str, value, shape: tuple[int, ...] | None = None) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be real numbers, got {array.dtype}")
    _checks.require_rank(name, array, 1)
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} must have at least one point, got shape {array.shape}")
    _checks.require_values(name, array, "finite", np.isfinite)
    return array.astype(float)


def _require_text(name: str, caption: str, alt: str) -> None:
    for argument, value in {"name": name, "caption": caption, "alt": alt}.items():
        if not isinstance(value, str):
            raise TypeError(f"{argument} must be a string, got {value!r}")
    if not re.fullmatch(r"fig(-[a-z0-9]+)+", name):
        raise ValueError(f"name must be kebab-case starting with 'fig-', got {name!r}")
    if not caption.strip():
        raise ValueError(f"caption must be a non-empty string, got {caption!r}")
    if len(alt.strip()) < 40 or not re.search(r"\d", alt):
        raise ValueError(f"alt must state the finding with its numbers, in at least 40 characters, got {alt!r}")


def _require_labels(fig: Figure) -> None:
    for index, axes in enumerate(fig.axes, start=1):
        if not (axes.has_data() and axes.axison):
            continue
        # a label may stand on an axes that shares the axis, or on the whole figure
        x = fig.get_supxlabel() or any(a.get_xlabel() for a in axes.get_shared_x_axes().get_siblings(axes))
        y = fig.get_supylabel() or any(a.get_ylabel() for a in axes.get_shared_y_axes().get_siblings(axes))
        is_colour_bar = axes.get_label() == "<colorbar>"  # Matplotlib's own mark; it has one axis only
        if not ((x or y) if is_colour_bar else (x and y)):
            lacking = " and ".join(name for name, label in {"x": x, "y": y}.items() if not label)
            title = f" ({axes.get_title()!r})" if axes.get_title() else ""
            raise ValueError(f"axes {index} of {len(fig.axes)}{title} must have x and y labels, got no {lacking} label")


def _in_ipython() -> bool:
    ipython = sys.modules.get("IPython")  # whoever runs in IPython has imported it
    return ipython is not None and ipython.get_ipython() is not None
