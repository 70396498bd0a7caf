"""What all figures share: their style, panels, axes and curves, and how they are saved."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from jaxprune.results import spread
from jaxprune.types import Metric

STYLE = {
    "font.family": "DejaVu Sans", "font.size": 8, "axes.titlesize": 8.5, "legend.fontsize": 8,
    "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.frameon": False, "legend.handlelength": 3.2,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "0.88", "grid.linewidth": 0.5,
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.2,
    "lines.markersize": 3.8, "savefig.dpi": 200, "svg.fonttype": "path", "svg.hashsalt": "jaxprune",
}  # fmt: skip
ENOUGH = 5  # seeds from which a t interval says more than the points themselves
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "0.35")
_MARKERS = "osD^vPX<"  # one more than colours, so that pairs repeat late
Look = dict[str, Any]
Points = Mapping[Any, Sequence[tuple[Any, Any]]]  # by place, (x, y) of every seed


@style.context(STYLE, after_reset=True)
def save_figures(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write figures, by the name of their files, as PNG and SVG into a folder, made if missing.

    Returns the files. The same rows give the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Neither the time nor the version of matplotlib belongs in a file that is kept in git.
    formats = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}
    paths = []
    for name, fig in figures.items():
        for suffix, metadata in formats.items():
            paths.append(folder / f"{name}{suffix}")
            fig.savefig(paths[-1], metadata=metadata)
            fig.set_layout_engine("none")  # it has done its work, which is most of the time
    return paths


def panels(down: int, across: int, *, height: float, sharey: Any = False) -> tuple[Figure, Any]:
    """Return a figure of the width of a page, and its panels, (down, across)."""
    fig = Figure(figsize=(6.8, height), layout="constrained")
    return fig, fig.subplots(down, across, squeeze=False, sharex="col", sharey=sharey)


def color_of(index: int) -> Look:
    """Return a colour and marker, each differing from its neighbours'."""
    return {"color": _COLORS[index % len(_COLORS)], "marker": _MARKERS[index % len(_MARKERS)]}


def percent(fraction: float) -> str:
    """Return a fraction in percent, as short as it is exact."""
    return f"{round(100 * fraction, 10):g}".replace("-", "\N{MINUS SIGN}")


def level_axis(ax: Axes, levels: Iterable[float], what: str) -> None:
    """Space the levels by the logarithm of what they keep: the interesting ones are on the right.

    What is kept is shifted by twice the least of any level, so that 100% has a place.
    """
    levels = np.array(sorted(set(levels)))
    shift = 2 * (1 - levels[levels < 1]).min(initial=1)

    def place(level: Any) -> Any:
        return -np.log10(1 + shift - np.asarray(level))

    def level_at(place: Any) -> Any:
        return 1 + shift - 10 ** -np.asarray(place)

    ax.set_xscale("function", functions=(place, level_at))
    first, last = place(levels[[0, -1]])
    width = last - first or 1
    ax.set_xlim(*level_at([first - 0.04 * width, last + 0.04 * width]))
    labelled, free = [], math.inf
    for level in reversed(levels):
        room = (0.006 + 0.0107 * len(percent(level))) * width
        if place(level) + room <= free:
            labelled.append(level)
            free = place(level) - room
    ax.set_xticks(labelled, [percent(level) for level in labelled])
    ax.set_xticks(levels, minor=True)
    ax.set_xlabel(f"k (% of {what} pruned),\nspaced by the logarithm of what is kept")


def log_axis(ax: Axes) -> None:
    """Make the y axis logarithmic, with ticks at 1, 2 and 5."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())


def percent_axis(ax: Axes) -> None:
    """Label the y axis, of fractions, in percent."""
    ax.yaxis.set_major_formatter(lambda part, _: percent(part))


def metric_axis(metric: Metric, *line: Axes, name: str = "", zoom: bool = False) -> None:
    """Scale, limit and name the y axis of panels side by side; wide bands may be cut off.

    What has no upper bound but a lower one of 0, such as a loss, grows tenfold over the levels and
    doubles where others hardly move: its axis is logarithmic. A bounded metric, of which one side
    is better, is shown over all of its range unless `zoom`. A name comes before the label.
    """
    label = f"{metric.label} ({metric.unit})" if metric.unit else metric.label
    label = textwrap.fill(label, 28, break_on_hyphens=False)
    line[0].set_ylabel(f"{name}\n{label}" if name else label)
    means = [np.asarray(found.get_ydata()) for ax in line for found in ax.lines]
    values = np.concatenate([*means, [math.nan]])
    logarithmic = metric.low == 0 and metric.high is None and not np.any(values <= 0)
    for ax in line:
        if logarithmic:
            log_axis(ax)
        elif metric.unit == "%":
            percent_axis(ax)
    if logarithmic and np.isfinite(values).any():
        low, high = line[0].get_ylim()
        low, high = max(low, np.nanmin(values) / 2), min(high, np.nanmax(values) * 2)
        line[0].set_ylim(low, high)
        if high < 5 * low:  # or there might be one tick
            line[0].yaxis.set_major_locator(MaxNLocator(5))
    elif metric.low is not None and metric.high is not None and metric.better and not zoom:
        room = 0.02 * (metric.high - metric.low)
        line[0].set_ylim(metric.low - room, metric.high + room)
    elif metric.high is not None and metric.chance is not None:  # what is far below it says no more
        line[0].set_ylim(max(line[0].get_ylim()[0], 2 * metric.chance - metric.high))


def curve(ax: Axes, points: Points, metric: Metric, **look: Any) -> None:
    """Draw the mean over seeds as a line, and each seed as a point.

    From `ENOUGH` seeds on there is a band, the 95% t interval, cut at the bounds of the metric.
    `points` are, by level or whatever tells the places of a line apart, (x, y) of every seed.
    """
    if not points:
        return
    xs = [fmean(x for x, _ in seeds) for seeds in points.values()]
    ys = (spread([y for _, y in seeds], metric) for seeds in points.values())
    means, low, high = zip(*ys, strict=True)
    ax.plot(xs, means, **look)
    if max(map(len, points.values())) > 1:
        # The same points under the lines, so that they never hide one.
        every = np.array([point for seeds in points.values() for point in seeds])
        ax.plot(*every.T, "o", color=look["color"], markersize=2, alpha=0.55, zorder=1.6,
                markeredgewidth=0, label="_seeds")  # fmt: skip
    if min(map(len, points.values())) >= ENOUGH:
        ax.fill_between(xs, low, high, color=look["color"], alpha=0.12, linewidth=0, zorder=1.4)


def over_seeds(seeds: int) -> str:
    """Say what lines, points and bands are, for the footnote."""
    if seeds == 1:
        return "one seed"
    if seeds < ENOUGH:
        bars = "; 95% intervals: in the tables" if seeds > 2 else ""
        return f"lines: mean of {seeds} seeds; small points: the seeds{bars}"
    band = "95% t interval, cut at the bounds of the metric"
    return f"lines: mean of {seeds} seeds; small points: the seeds; bands: {band}"


def footnote(fig: Figure, *texts: str) -> None:
    """Say below a figure what it is of."""
    text = textwrap.fill("; ".join(filter(None, texts)), 142)
    fig.supxlabel(text, x=0.01, ha="left", fontsize=6.5, color="0.3")
