"""Figures that compare methods: what they cost, and where they prune."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxprune.figures.arms import colors_of, finish, legend_of
from jaxprune.figures.panels import STYLE, color_of, footnote, level_axis, metric_axis, panels
from jaxprune.figures.panels import percent as in_percent
from jaxprune.results import Row
from jaxprune.types import Metric


@style.context(STYLE, after_reset=True)
def against_seconds(rows: Sequence[Row], metric: Metric, *, note: str = "") -> Figure | None:
    """Draw a metric against the seconds that finding masks took, a panel a level, a point an arm.

    Args:
        rows: of one granularity.
        metric: which.
        note: for the footnote.

    Returns:
        The figure, of at most three of the highest levels but one; None where there is no level.
    """
    levels = sorted({row.target_sparsity for row in rows if row.target_sparsity})[-4:]
    levels = levels[:-1] if len(levels) == 4 else levels
    if not levels:
        return None
    fig, axes = panels(1, len(levels), height=2.7, sharey=True)
    colors = colors_of(rows)
    for ax, level in zip(axes[0], levels, strict=True):
        for arm in dict.fromkeys(row.arm for row in rows):
            here = [row for row in rows if (row.arm, row.target_sparsity) == (arm, level)]
            known = [(row.mask_seconds, row.metrics[metric.name]) for row in here
                     if row.metrics[metric.name] is not None]  # fmt: skip
            if known:
                seconds, values = zip(*known, strict=True)
                look = colors.get((arm.criterion, arm.scope)) or colors[arm.granularity]
                ax.plot(max(fmean(seconds), 1e-3), fmean(values), linestyle="", **look)
        ax.set(xscale="log", xlabel="seconds a level", title=f"{in_percent(level)}% pruned")
    metric_axis(metric, axes[0, 0])
    return finish(fig, rows, note, legend_of(rows, colors, [metric]))


@style.context(STYLE, after_reset=True)
def layer_sparsities(facts: Sequence[dict[str, Any]], *, note: str = "") -> Figure | None:
    """Draw how much of each layer is pruned, where layers are not pruned alike.

    Args:
        facts: of every method and seed `levels` in percent, and `sparsity` by layer and level.
        note: for the footnote.

    Returns:
        The figure, a panel a method of the first seed; None where all layers are pruned alike.
    """
    uneven = [
        fact for fact in facts
        if fact["seed"] == 0 and fact["granularity"] != "unit" and any(
            max(level) - min(level) > 0.01
            for level in zip(*fact["sparsity"].values(), strict=True)
        )
    ][:6]  # fmt: skip
    if not uneven:
        return None
    down = -(-len(uneven) // 3)
    fig, axes = panels(down, min(3, len(uneven)), height=0.6 + 2.1 * down, sharey=True)
    paths = [*dict.fromkeys(path for fact in uneven for path in fact["sparsity"])]
    for ax, fact in zip(axes.flat, uneven, strict=False):
        level_axis(ax, [level / 100 for level in fact["levels"]], f"{fact['granularity']}s")
        for i, path in enumerate(paths):
            if path in fact["sparsity"]:
                levels = [level / 100 for level in fact["levels"]]
                ax.plot(levels, fact["sparsity"][path], **color_of(i))
        ax.set_title(f"{fact['method']}, {fact['scope']}")
    axes[0, 0].set_ylabel("pruned of the layer")
    handles = [Line2D([], [], label=path, **color_of(i)) for i, path in enumerate(paths[:12])]
    fig.legend(handles=handles, loc="outside upper center", ncols=4)
    footnote(fig, note)
    return fig
