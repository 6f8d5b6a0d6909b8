"""Plots of a report, as self-contained SVG images (`data:` URIs). Matplotlib is loaded by the first plot, never by an import."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, BLUE, ORANGE, GREY = "#1c2430", "#1f5fa8", "#c2571a", "#9aa3af"
SIZE_INCHES = (3.5, 3.3)
LOG_RANGE = 20.0
"""Rates that span more than this ratio are drawn on logarithmic axes."""
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.8,
    "ytick.major.width": 0.8,
    "axes.grid": True,
    "grid.color": "#e6e9ee",
    "grid.linewidth": 0.7,
    "svg.hashsalt": "escm2rec",  # the same report gives the same bytes
}


def calibration_plot(curve: dict[str, Any], observed: str = "mean_observed") -> str:
    """Observed (or true) rate over predicted rate by bin, the diagonal being right; 95% intervals where the curve has them.

    On logarithmic axes a bin without a positive is a hollow mark on the lower edge.
    """
    predicted, rate = curve["mean_predicted"], curve[observed]
    low, high = curve.get("observed_low"), curve.get("observed_high")
    scale = _scale([*predicted, *rate])
    bottom, top = _limits([*predicted, *rate], scale)
    found = [(p, r) for p, r in zip(predicted, rate, strict=True) if r > 0 or scale == "linear"]
    none = [p for p, r in zip(predicted, rate, strict=True) if r == 0 and scale == "log"]

    def draw(axes: Axes) -> None:
        axes.plot([bottom, top], [bottom, top], color=GREY, linewidth=1, zorder=1)
        if low is not None and high is not None:
            axes.vlines(predicted, [max(end, bottom) for end in low], high, color=BLUE, alpha=0.45, linewidth=1.2, zorder=2)
        axes.plot(*zip(*found, strict=True), color=BLUE, marker="o", markersize=4, linewidth=1.2, zorder=3)
        axes.plot(none, [bottom] * len(none), "v", color=BLUE, markerfacecolor="white", markersize=5, clip_on=False, zorder=4)
        axes.set(xscale=scale, yscale=scale, xlim=(bottom, top), ylim=(bottom, top), aspect="equal")
        axes.set(xlabel="mean predicted", ylabel="true rate" if low is None else "observed rate")
        if scale == "log":
            _label_logarithmic(axes, top / bottom)

    return image(draw)


def roc_plot(roc: dict[str, Any]) -> str:
    """True positive rate over false positive rate, the diagonal being chance."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1)
        axes.plot(roc["false_positive_rate"], roc["true_positive_rate"], color=BLUE, linewidth=1.6)
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel="false positive rate", ylabel="true positive rate", aspect="equal")

    return image(draw)


def _scale(values: Sequence[float]) -> str:
    positive = [value for value in values if value > 0]
    return "log" if positive and max(positive) > LOG_RANGE * min(positive) else "linear"


def _limits(values: Sequence[float], scale: str) -> tuple[float, float]:
    """Axis limits with a margin; on logarithmic axes from the least positive value."""
    top = max(values)
    if scale == "linear":
        bottom = min(values)
        margin = 0.05 * (top - bottom or top or 1.0)
        return max(bottom - margin, 0.0), top + margin
    return min(value for value in values if value > 0) / 1.5, top * 1.5


def _label_logarithmic(axes: Axes, ratio: float) -> None:
    """Plain numbers at 1 and 3 times the powers of ten, over long ranges at the powers only, so that labels never meet."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 3.0) if ratio < 1000 else (1.0,), numticks=7))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def image(draw: Any, size: tuple[float, float] = SIZE_INCHES) -> str:
    """An SVG `data:` URI of what `draw` draws on new axes; `size` in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
