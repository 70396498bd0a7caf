"""Draw what training does, epoch by epoch: a line a level, a column a protocol."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from jaxprune.figures.arms import finish, panel_rows, points_of, present, zoom_in
from jaxprune.figures.panels import STYLE, Look, color_of, curve, metric_axis, panels, percent
from jaxprune.results import Row
from jaxprune.types import Metric

_STRONG = 4  # levels that are told apart
_THIN: Look = {"color": "0.75", "linewidth": 0.6, "zorder": 1.5}
_SHADE = "0.94"


@style.context(STYLE, after_reset=True)
def epoch_training(
    rows: Sequence[Row], metrics: Sequence[Metric], granularity: str, *, note: str = ""
) -> Figure | None:
    """Draw the two metrics over the epochs, a line a level and a column a protocol.

    Four levels are told apart, the others are thin and grey. The epochs in which the trained
    networks are being pruned are shaded. Of several families, a row of panels each, of the first
    metric. Arguments as `k_sparsity`.

    Returns:
        The figure; None unless there are two epochs.
    """
    rows = [row for row in rows if row.granularity == granularity]
    if len({row.epoch for row in rows}) < 2 or not metrics:
        return None
    protocols, parts = present(rows, "protocol"), panel_rows(rows, metrics)
    levels = sorted({row.target_sparsity for row in rows})
    chosen = {round(i * (len(levels) - 1) / (_STRONG - 1)) for i in range(_STRONG)}
    strong = {levels[i]: color_of(n) | {"markersize": 2.8} for n, i in enumerate(sorted(chosen))}
    looks = {level: strong.get(level, _THIN) for level in levels}
    size = len(parts), len(protocols)
    fig, axes = panels(*size, height=1.1 + 2.1 * len(parts), sharey="row")
    for line, (metric, name, part, near) in zip(axes, parts, strict=True):
        for ax, protocol in zip(line, protocols, strict=True):
            here = [row for row in part if row.protocol == protocol]
            span = _pruning_epochs(here) if protocol == "trained" else None
            _level_curves(ax, here, metric, looks, span[0] if span else 0)
            if span:
                ax.axvspan(*span, color=_SHADE, linewidth=0, zorder=0)
        metric_axis(metric, *line, name=name, zoom=True)
        if near:
            zoom_in(metric, part, line[0])
    for column, protocol in zip(axes.T, protocols, strict=True):
        column[0].set_title(f"{granularity}s, {protocol.replace('_', '-')}")
        whole = MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
        column[-1].set_xlabel("epochs trained")
        column[-1].xaxis.set_major_locator(whole)
    handles: list[Any] = [Line2D([], [], label=f"k = {percent(k)}%", **strong[k]) for k in strong]
    if len(levels) > len(strong):
        handles.append(Line2D([], [], label="other levels", **_THIN))
    if "trained" in protocols:
        handles.append(Patch(color=_SHADE, label="being pruned"))
    return finish(fig, rows, note, handles)


def _level_curves(
    ax: Axes, rows: Sequence[Row], metric: Metric, looks: Mapping[float, Look], branch: int
) -> None:
    """Draw a line a level; they are one network up to the epoch `branch`, drawn once."""
    for level, look in looks.items():
        here = [row for row in rows if row.target_sparsity == level]
        here = [row for row in here if level == min(looks) or row.epoch >= branch]
        points = points_of(here, "epoch", metric.name)
        if look is _THIN:  # the mean alone
            points = {place: [tuple(np.mean(seeds, axis=0))] for place, seeds in points.items()}
        curve(ax, points, metric, label=percent(level), **look)


def _pruning_epochs(rows: Sequence[Row]) -> tuple[int, int] | None:
    """Return the last dense and the first fully pruned epoch, read off the achieved sparsity."""
    level = max((row.target_sparsity for row in rows), default=0)
    seed = min((row.seed for row in rows if row.target_sparsity == level), default=0)
    reached = {r.epoch: r.sparsity for r in rows if (r.target_sparsity, r.seed) == (level, seed)}
    if not reached or (final := reached[max(reached)]) == 0:
        return None
    dense = max((epoch for epoch, sparsity in reached.items() if sparsity == 0), default=0)
    return dense, min(epoch for epoch, sparsity in reached.items() if sparsity == final)
