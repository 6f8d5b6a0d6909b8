"""Plots of `inspect`, as self-contained SVG images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from escm2rec.evaluation.plots import BLUE, image
from escm2rec.preprocess.ragged import Float64s, Int64s

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

SIZE = (3.5, 2.4)
POINTS = 200
BINS = 60
MOST_TAIL = 0.001
"""Share of the impressions whose lengths, the longest, are not drawn, and of the numbers at either end that count in the outer bins."""
FEW_ROWS = 20
"""Up to so many rows of a table the axis counts them: shares of so few would have one label or none."""


def skew_plot(reached: Int64s, rows: int) -> str:
    """Share of the values that fall on the most frequent rows of a table of `rows`; `reached` is the running count of those that are met,
    two or more."""
    places = np.unique(np.geomspace(1, len(reached), POINTS).round().astype(np.int64))
    shares = reached[places - 1] / reached[-1]
    if len(reached) < rows:  # the others add nothing
        places, shares = np.append(places, rows), np.append(shares, 1.0)

    def draw(axes: Axes) -> None:
        axes.set(ylim=(0, 1.02), ylabel="share of the values")
        if rows <= FEW_ROWS:
            axes.plot(places, shares, color=BLUE, linewidth=1.6, marker="o", markersize=4, clip_on=False)
            axes.set(xlim=(1, rows), xlabel=f"most frequent rows (of {rows})")
            _count_on(axes.xaxis)
        else:
            axes.plot(places / rows, shares, color=BLUE, linewidth=1.6)
            axes.set(xscale="log", xlim=(1 / rows, 1), xlabel="share of the table's rows")
            _label_shares(axes.xaxis)

    return image(draw, SIZE)


def _count_on(axis: Axis) -> None:
    """Labels at whole numbers only, be it a single one."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _label_shares(axis: Axis) -> None:
    """Labels in percent, at powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    axis.set_minor_formatter(NullFormatter())


def lengths_plot(histogram: Int64s) -> str:
    """Share of the impressions that have so many values; a thin tail is not drawn but told: as a bar none would see it."""
    shares = histogram / histogram.sum()
    last, longest = int(np.searchsorted(np.cumsum(shares), 1 - MOST_TAIL)), len(histogram) - 1
    tail = f"\n(at most {MOST_TAIL:.1%} have more than {last:,}, up to {longest:,})" if last < longest else ""

    def draw(axes: Axes) -> None:
        axes.set_axisbelow(True)
        axes.bar(np.arange(last + 1), shares[: last + 1], width=0.85, color=BLUE)
        axes.set(xlabel=f"values{tail}", ylabel="share of impressions")
        _count_on(axes.xaxis)

    return image(draw, SIZE)


def histogram_plot(numbers: Float64s) -> str:
    """How numbers are distributed between their 0.1% and 99.9% quantiles; what lies beyond counts in the outer bins, and is told."""
    low, high = np.quantile(numbers, [MOST_TAIL, 1 - MOST_TAIL])
    tails = [f"(≤ {MOST_TAIL:.1%} below {low:.3g}, down to {numbers.min():.3g})"] if numbers.min() < low else []
    tails += [f"(≤ {MOST_TAIL:.1%} above {high:.3g}, up to {numbers.max():.3g})"] if numbers.max() > high else []
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(np.clip(numbers, low, high), bins=BINS, range=(low, high))

    def draw(axes: Axes) -> None:
        axes.set_axisbelow(True)
        axes.stairs(counts / len(numbers), edges, fill=True, color=BLUE)
        axes.set(xlabel="\n".join(tails), ylabel="share of the numbers", xlim=(low, high))

    return image(draw, SIZE)
