"""Plots of a study, as self-contained SVG images: lines over a dial and dots with intervals, labelled where they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from escm2rec.evaluation.plots import BLUE, GREY, INK, ORANGE, image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

GREEN, SOFT = "#0b8a6b", "#5b6573"
COLOURS = {"ESMM": ORANGE, "naive": INK, "control": SOFT, "IPS": BLUE, "DR": GREEN}
"""Told apart by people who do not see all colours too: they differ in lightness, and each line bears its name."""
MARKS = {"ESMM": "s", "naive": "o", "control": "D", "IPS": "o", "DR": "^"}
LABEL_GAP = 0.062
"""Between labels of lines, as a share of the height."""

Record = Mapping[str, Any]


class Dot(NamedTuple):
    """One interval of a dot plot: in row `row`, of the series `name`."""

    row: str
    name: str
    record: Record


def line_plot(
    series: Mapping[str, Sequence[tuple[float, Record]]],
    xlabel: str,
    ylabel: str,
    at: float | None = None,
    log: str = "",
    ticks: Mapping[float, str] | None = None,
) -> str:
    """Means with 95% intervals over the values of a dial, by short name. `at`: a line to be at; `log`: which axes (x, y) are logarithmic.

    On a logarithmic axis an interval that reaches 0 ends at the lower edge, and a mean at or below 0 is a hollow mark on it.
    """

    def draw(axes: Axes) -> None:
        _scales(axes, log)
        if at is not None:
            axes.axhline(at, color=GREY, linewidth=1, zorder=1)
        if "y" in log:
            axes.set_ylim(*_range(series))
        ends: dict[str, float] = {}
        floor = axes.get_ylim()[0] if "y" in log else None
        for name, points in series.items():
            for x, record in points:
                if record["low"] is not None and (floor is None or record["high"] > floor):
                    low = record["low"] if floor is None else max(record["low"], floor)
                    axes.vlines(x, low, record["high"], color=COLOURS[name], linewidth=2.2, alpha=0.45, zorder=2)
            means = [record["mean"] if floor is None or record["mean"] > 0 else math.nan for _, record in points]
            axes.plot([x for x, _ in points], means, color=COLOURS[name], marker=MARKS[name], markersize=4, linewidth=1.3, zorder=3)
            if floor is not None:
                gone = [x for (x, _), mean in zip(points, means, strict=True) if math.isnan(mean)]
                axes.plot(
                    gone, [floor] * len(gone), "v", color=COLOURS[name], markerfacecolor="white", markersize=5, clip_on=False, zorder=4
                )
                means = [floor if math.isnan(mean) else mean for mean in means]
            ends[name] = means[-1]
        if "y" in log:
            _label_logarithmic(axes.yaxis, *axes.get_ylim())
        if ticks is not None:
            axes.set_xticks(list(ticks), list(ticks.values()))
            axes.xaxis.set_ticks([], minor=True)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        _name_lines(axes, ends, max(x for points in series.values() for x, _ in points))

    return image(draw, (3.8, 3.3))


def dot_plot(
    rows: Sequence[str],
    dots: Sequence[Dot],
    xlabel: str,
    at: float,
    log: bool = False,
    scale: float = 1.0,
    named: bool = True,
    breaks: Sequence[int] = (),
) -> str:
    """A row for each of `rows`, from above, with intervals (`mean` or `ratio`, `low`, `high`) times `scale`; `at` is what to compare with.

    Series lie beside each other in a row, their names above; not `named`, a row holds one and names it. A line parts
    the rows before each of `breaks`.
    """
    names = list(dict.fromkeys(dot.name for dot in dots))
    shift = {name: (index - (len(names) - 1) / 2) * 0.26 if named else 0.0 for index, name in enumerate(names)}

    def draw(axes: Axes) -> None:
        _scales(axes, "x" if log else "")
        axes.axvline(at, color=INK, linewidth=0.9, zorder=1)
        for row in breaks:
            axes.axhline(row - 0.5, color=GREY, linewidth=0.7, zorder=1)
        for dot in dots:
            y, colour = rows.index(dot.row) + shift[dot.name], COLOURS[dot.name]
            middle = scale * dot.record["mean" if "mean" in dot.record else "ratio"]
            if dot.record["low"] is not None:
                axes.hlines(y, scale * dot.record["low"], scale * dot.record["high"], color=colour, linewidth=2.2, alpha=0.5, zorder=2)
            axes.plot([middle], [y], color=colour, marker=MARKS[dot.name], markersize=4.5, linestyle="none", zorder=3)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(xlabel)
        if log:
            _label_logarithmic(axes.xaxis, *axes.get_xlim())
        if named:
            for index, name in enumerate(names):
                axes.text(0.01 + 0.12 * index, 1.01, name, color=COLOURS[name], transform=axes.transAxes, fontweight="bold", va="bottom")

    return image(draw, (5.4, 0.9 + 0.21 * len(rows)))


def _scales(axes: Axes, log: str) -> None:
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")


def _label_logarithmic(axis: Axis, low: float, high: float) -> None:
    """Plain numbers, closer where the range is short."""
    steps = (1, 1.5, 2, 3, 5, 7) if high < 12 * low else (1, 2, 5) if high < 200 * low else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    places = [place for power in powers for step in steps if low <= (place := step * 10.0**power) <= high]
    axis.set_ticks(places, [f"{place:g}" for place in places])
    axis.set_ticks([], minor=True)


def _range(series: Mapping[str, Sequence[tuple[float, Record]]]) -> tuple[float, float]:
    """From below the least mean above 0 to above the greatest bound."""
    records = [record for points in series.values() for _, record in points]
    means = [record["mean"] for record in records if record["mean"] > 0] or [1.0]
    return min(means) / 2, 1.3 * max(max(record["mean"] if record["high"] is None else record["high"] for record in records), *means)


def _name_lines(axes: Axes, ends: Mapping[str, float], last: float) -> None:
    """The name of each line right of its end, moved apart where they would meet."""
    to_share = axes.transData + axes.transAxes.inverted()
    places = sorted((float(to_share.transform((last, end))[1]), name) for name, end in ends.items())
    heights: list[float] = []
    for height, _ in places:
        heights.append(max(height, heights[-1] + LABEL_GAP) if heights else height)
    over = max(0.0, heights[-1] - 1.0) if heights else 0.0
    for (_, name), height in zip(places, heights, strict=True):
        axes.annotate(
            name,
            xy=(last, height - over),
            xycoords=("data", "axes fraction"),
            xytext=(7, 0),
            textcoords="offset points",
            color=COLOURS[name],
            fontweight="bold",
            va="center",
            annotation_clip=False,
        )
