"""Draw the figures of a study: rows and metrics in, matplotlib figures out.

Both come from `results`; which two metrics are drawn, their labels, units and bounds are the
task's. What has no rows is left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from jaxprune.figures.arms import (
    arm_curves,
    colors_of,
    families_of,
    family_name,
    family_of,
    finish,
    legend_of,
    look_of,
    mark_guess,
    panel_rows,
    points_of,
    present,
    zoom_in,
)
from jaxprune.figures.panels import (
    STYLE,
    Look,
    color_of,
    curve,
    level_axis,
    metric_axis,
    panels,
    percent,
)
from jaxprune.results import Row, drawn_metrics, last_epoch, of_difference, paired
from jaxprune.types import Metric

_SCALED: Look = {"color": "#009E73", "marker": "D"}
_THIN: Look = {"color": "0.75", "linewidth": 0.6, "zorder": 1.5}
_SHADE = "0.94"
_STRONG = 4  # levels that are told apart in `epoch_training`
_CALIBRATION = ("signed_ece", "loss", "scaled_loss", "churn", "worst_class_accuracy")


@style.context(STYLE, after_reset=True)
def k_sparsity(
    rows: Sequence[Row], metrics: Sequence[Metric], granularity: str, *, note: str = ""
) -> Figure | None:
    """Draw the two metrics against k for one granularity, at the last epoch, a line an arm.

    Args:
        rows: of one study, in any order.
        metrics: of its task, as `load_run(...).metrics` has them.
        granularity: such as `weight`.
        note: what rows do not say (data set, network), for the footnote.

    Returns:
        The figure; None where there is nothing to draw.
    """
    rows = [row for row in last_epoch(rows) if row.granularity == granularity]
    drawn = drawn_metrics(metrics)
    if not rows or not drawn:
        return None
    fig, axes = panels(1, len(drawn), height=3.1)
    colors = colors_of(rows)
    for ax, metric in zip(axes[0], drawn, strict=True):
        level_axis(ax, (row.target_sparsity for row in rows), f"{granularity}s")
        arm_curves(ax, rows, "target_sparsity", metric, colors)
        metric_axis(metric, ax)
        mark_guess(metric, ax)
    return finish(fig, rows, note, legend_of(rows, colors, drawn))


@style.context(STYLE, after_reset=True)
def weight_vs_unit(
    rows: Sequence[Row], metrics: Sequence[Metric], *, note: str = ""
) -> Figure | None:
    """Draw all granularities against k, and against the weights that remain, at the last epoch.

    Equal k is not equal size: a unit takes its outgoing weights along. A row of panels a metric,
    the first once more for what is trained, over a smaller range; of several families a row each,
    of the first metric. Arguments as `k_sparsity`.

    Returns:
        The figure, without its second column where no row knows `remaining`; None unless there
        are two granularities.
    """
    rows, drawn = last_epoch(rows), drawn_metrics(metrics)
    if len(granularities := present(rows, "granularity")) < 2 or not drawn:
        return None
    sized = any(row.remaining for row in rows)  # a log axis has no place for 0
    parts, colors = panel_rows(rows, metrics), colors_of(rows, families=False)
    fig, axes = panels(len(parts), 2 if sized else 1, height=0.9 + 2.1 * len(parts), sharey="row")
    what = " or ".join(f"{name}s" for name in granularities)
    level_axis(axes[-1, 0], (row.target_sparsity for row in rows), what)
    if sized:
        axes[-1, 1].set(xscale="log", xlabel="weights that remain (fewer to the right)")
    for line, (metric, name, here, near) in zip(axes, parts, strict=True):
        here = [row for row in here if row.protocol == "trained" or not near]
        arm_curves(line[0], here, "target_sparsity", metric, colors)
        for ax in line[1:]:
            arm_curves(ax, [row for row in here if row.remaining], "remaining", metric, colors)
        metric_axis(metric, *line, name=name, zoom=near)
        if near:
            zoom_in(metric, here, line[0])
        else:
            mark_guess(metric, *line)
    axes[0, 0].set_title("at equal k")
    for ax in axes[0, 1:]:
        ax.set_title("at equal size")
        ax.invert_xaxis()
    return finish(fig, rows, note, legend_of(rows, colors, drawn))


@style.context(STYLE, after_reset=True)
def differences(rows: Sequence[Row], metrics: Sequence[Metric], *, note: str = "") -> Figure | None:
    """Draw each family's metrics less those of the first family, paired by seed, against k.

    A column a granularity, at the last epoch. Arguments as `k_sparsity`.

    Returns:
        The figure; None unless there are several criteria or scopes.
    """
    rows, drawn = last_epoch(rows), drawn_metrics(metrics)
    if len(families := families_of(rows)) < 2 or not drawn:
        return None
    first, colors = families[0], colors_of(rows)
    fig, axes, parts = _by_granularity(rows, len(drawn), 1.2 + 2.1 * len(drawn))
    for line, metric in zip(axes, drawn, strict=True):
        change = of_difference(metric)
        for ax, here in zip(line, parts, strict=True):
            for arm in dict.fromkeys(row.arm for row in here if family_of(row) != first):
                base = arm._replace(criterion=first[0], scope=first[1])
                pairs = paired(here, arm, base, metric.name)
                points = {k: [(k, value) for value in seeds] for k, seeds in pairs.items()}
                curve(ax, points, change, **look_of(arm, colors))
            ax.axhline(0, color="0.5", linewidth=0.8)
        metric_axis(change, *line, zoom=True)
        unit = "points" if metric.unit == "%" else metric.unit
        line[0].set_ylabel(f"{metric.label},\ndifference" + f" ({unit})" * bool(unit))
    told = f"differences from {family_name(first, rows)} are paired by seed"
    note = "; ".join(filter(None, [note, told]))
    del colors[first]
    return finish(fig, rows, note, legend_of(rows, colors))


@style.context(STYLE, after_reset=True)
def calibration_and_churn(
    rows: Sequence[Row], metrics: Sequence[Metric], *, note: str = ""
) -> Figure | None:
    """Draw signed ECE, loss before and after temperature scaling, churn and the worst class.

    A column a granularity, against k, at the last epoch. Arguments and result as `k_sparsity`; None
    for tasks that do not measure all of these.
    """
    rows = last_epoch(rows)
    known = {metric.name: metric for metric in metrics}
    if not rows or not all(name in known for name in _CALIBRATION):
        return None
    several, colors = len(families_of(rows)) > 1, colors_of(rows)
    names = [name for name in _CALIBRATION if several or name != "scaled_loss"]
    fig, axes, parts = _by_granularity(rows, len(names), 7.8 + 1.6 * several)
    for line, name in zip(axes, names, strict=True):
        for ax, here in zip(line, parts, strict=True):
            arm_curves(ax, here, "target_sparsity", known[name], colors)
            if name == "loss" and not several:
                arm_curves(ax, here, "target_sparsity", known["scaled_loss"], colors, **_SCALED)
            if name == "signed_ece":
                ax.axhline(0, color="0.5", linewidth=0.8)
        above = "above 0: over-confident" if name == "signed_ece" else ""
        metric_axis(known[name], *line, name=above)
    handles = legend_of(rows, colors)
    if not several:
        handles.append(Line2D([], [], label="loss at the best temperature", **_SCALED))
    return finish(fig, rows, note, handles)


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
    chosen = dict.fromkeys(np.linspace(0, len(levels) - 1, _STRONG).round().astype(int).tolist())
    strong = {levels[i]: dict(color_of(n), markersize=2.8) for n, i in enumerate(chosen)}
    looks = {level: strong.get(level, _THIN) for level in levels}
    height = 1.1 + 2.1 * len(parts)
    fig, axes = panels(len(parts), len(protocols), height=height, sharey="row")
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
        column[-1].set_xlabel("epochs trained")
        whole = MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
        column[-1].xaxis.set_major_locator(whole)
    handles: list[Any] = [Line2D([], [], label=f"k = {percent(k)}%", **strong[k]) for k in strong]
    if len(levels) > len(strong):
        handles.append(Line2D([], [], label="other levels", **_THIN))
    if "trained" in protocols:
        handles.append(Patch(color=_SHADE, label="being pruned"))
    return finish(fig, rows, note, handles)


def draw_figures(
    rows: Sequence[Row], metrics: Sequence[Metric], *, note: str = ""
) -> dict[str, Figure]:
    """Draw every figure that the rows allow; return them by name.

    Args:
        rows: of one study, in any order.
        metrics: of its task, as `load_run(...).metrics` has them.
        note: what rows do not say (data set, network), for the footnotes.

    Example:
        >>> draw_figures([], [])
        {}
    """
    granularities = present(rows, "granularity")
    figures = {
        **{f"k-sparsity-{g}": k_sparsity(rows, metrics, g, note=note) for g in granularities},
        "weight-vs-unit": weight_vs_unit(rows, metrics, note=note),
        "differences": differences(rows, metrics, note=note),
        **{f"epoch_training_{g}s": epoch_training(rows, metrics, g, note=note)
           for g in granularities},
        "calibration-and-churn": calibration_and_churn(rows, metrics, note=note),
    }  # fmt: skip
    return {name: fig for name, fig in figures.items() if fig is not None}


def describe(settings: Mapping[str, Any]) -> str:
    """Return a note on the data set and the network, as far as the settings of a run tell."""
    sizes = "-".join(map(str, settings.get("hidden_sizes", ())))
    texts = [settings.get("dataset"), settings.get("network"), sizes and f"hidden layers {sizes}"]
    return "; ".join(str(text) for text in texts if text)


def _by_granularity(
    rows: Sequence[Row], down: int, height: float
) -> tuple[Figure, Any, list[list[Row]]]:
    """Return panels against k, (down, granularities), and the rows of each column."""
    names = present(rows, "granularity")
    parts = [[row for row in rows if row.granularity == name] for name in names]
    fig, axes = panels(down, len(names), height=height, sharey="row")
    for column, here, name in zip(axes.T, parts, names, strict=True):
        column[0].set_title(f"{name}s")
        level_axis(column[-1], (row.target_sparsity for row in here), f"{name}s")
    return fig, axes, parts


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
