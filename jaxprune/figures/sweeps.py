"""Draw the figures of a sweep: rows in, matplotlib figures out.

Rows come from `results`. A line is the mean over seeds, its band the 95% Student t interval;
one-shot is dashed, trained solid. Figures, panels and lines without rows are left out, and rows of
other methods and protocols are not drawn. This is the last stage of a sweep.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from jaxprune.figures.panels import STYLE, footnote, level_axis, panels, percent
from jaxprune.results import Row, mean_interval

_Look = dict[str, Any]
_METHODS: dict[str, _Look] = {
    "weight": {"color": "#0072B2", "marker": "o"},
    "unit": {"color": "#D55E00", "marker": "s"},
}
_PROTOCOLS: dict[str, _Look] = {
    "one_shot": {"linestyle": (0, (4, 2)), "markerfacecolor": "white"},
    "trained": {"linestyle": "-"},
}
_SCALED: _Look = {"color": "#009E73", "marker": "D"}
_GUESS: _Look = {"color": "0.4", "linestyle": ":", "linewidth": 1, "label": "uniform guess"}
_NAMES = {"one_shot": "one-shot", "trained": "trained", "weight": "weights", "unit": "units"}
_LABELS = {
    "accuracy": "test accuracy (%)",
    "loss": "test loss (nats)",
    "signed_ece": "signed ECE (%)\n> 0: over-confident",
    "churn": "churn (%)\nagainst the dense network",
    "worst_class_accuracy": "accuracy of the\nworst class (%)",
}
_ROOM = 14  # labels that fit beside a panel of the epochs


@style.context(STYLE, after_reset=True)
def k_sparsity(rows: Sequence[Row], method: str, *, note: str = "") -> Figure | None:
    """Draw accuracy and loss against k for one method, at the last epoch.

    Args:
        rows: rows of one sweep, in any order, of one criterion and scope.
        method: "weight" or "unit".
        note: what rows do not say (data set, network), for the footnote.

    Returns:
        The figure; None where there is nothing to draw.

    Raises:
        ValueError: the rows are of several criteria or scopes.
    """
    rows = [row for row in _last_epoch(rows) if row.method == method]
    if not rows:
        return None
    fig, axes = panels(1, 2, height=2.9)
    for ax, metric in zip(axes[0], ("accuracy", "loss"), strict=True):
        level_axis(ax, *_levels(rows))
        _curves(ax, rows, "target_sparsity", metric)
        _metric_axis(metric, ax)
    return _finish(fig, rows, note, _handles(rows, axes.T))


@style.context(STYLE, after_reset=True)
def weight_vs_unit(rows: Sequence[Row], *, note: str = "") -> Figure | None:
    """Draw both methods against k, and against the weights that remain, at the last epoch.

    Equal k is not equal size: a unit takes its outgoing weights along. Arguments as `k_sparsity`.

    Returns:
        The figure, without its second column where no row knows `remaining`; None unless both
        methods have rows.
    """
    rows = _last_epoch(rows)
    if len(_present(rows, "method")) < 2:
        return None
    sized = [row for row in rows if row.remaining]  # a log axis has no place for 0
    fig, axes = panels(2, 2 if sized else 1, height=5.0, sharey="row")
    for line, metric in zip(axes, ("accuracy", "loss"), strict=True):
        level_axis(line[0], *_levels(rows))
        _curves(line[0], rows, "target_sparsity", metric)
        if sized:
            line[1].set(xscale="log", xlabel="weights that remain (fewer to the right)")
            _curves(line[1], sized, "remaining", metric)
        _metric_axis(metric, *line)
    if sized:
        axes[0, 1].invert_xaxis()
    for ax, title in zip(axes[0], ("at equal k", "at equal size"), strict=False):
        ax.set_title(title)
    return _finish(fig, rows, note, _handles(rows, axes))


@style.context(STYLE, after_reset=True)
def epoch_training(rows: Sequence[Row], method: str, *, note: str = "") -> Figure | None:
    """Draw accuracy and loss over the epochs, a line a level and a column a protocol.

    The epochs in which the trained networks are being pruned are shaded; each protocol has its own
    y axes. Arguments and result as `k_sparsity`.
    """
    rows = [row for row in _one_study(rows) if row.method == method]
    if not rows:
        return None
    protocols = _present(rows, "protocol")
    levels = sorted({row.target_sparsity for row in rows})
    colors = colormaps["viridis"](np.linspace(0, 0.85, len(levels)))
    fig, axes = panels(2, len(protocols), height=5.4)
    shades = []
    for protocol, column in zip(protocols, axes.T, strict=True):
        drawn = [row for row in rows if row.protocol == protocol]
        span = _pruning_epochs(drawn) if protocol == "trained" else None
        branch = span[0] if span else 0  # the levels are one network until then, drawn once
        for ax, metric in zip(column, ("accuracy", "loss"), strict=True):
            for i, level in enumerate(levels):
                here = [row for row in drawn if row.target_sparsity == level]
                here = [row for row in here if i == 0 or row.epoch >= branch]
                _curve(ax, here, "epoch", metric, label=percent(level), color=colors[i],
                       marker="os^Dvp"[i % 6], markersize=2.6)  # fmt: skip
            ax.set_xlabel("epochs trained")
            whole = MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
            ax.xaxis.set_major_locator(whole)
            _metric_axis(metric, ax, zoom=True)
            _label_lines(ax)
            if span:
                shade = ax.axvspan(*span, color="0.95", linewidth=0, zorder=0, label="being pruned")
                shades = [shade]
        column[0].set_title(f"{_NAMES[method]}, {_NAMES[protocol]}")
    return _finish(fig, rows, note, shades)


@style.context(STYLE, after_reset=True)
def calibration_and_churn(rows: Sequence[Row], *, note: str = "") -> Figure | None:
    """Draw signed ECE, loss before and after temperature scaling, churn and the worst class.

    A column a method, against k, at the last epoch. Arguments and result as `k_sparsity`.
    """
    rows = _last_epoch(rows)
    if not rows:
        return None
    methods, protocols = _present(rows, "method"), _present(rows, "protocol")
    fig, axes = panels(4, len(methods), height=7.6, sharey="row")
    metrics = ("signed_ece", "loss", "churn", "worst_class_accuracy")
    for metric, line in zip(metrics, axes, strict=True):
        for method, ax in zip(methods, line, strict=True):
            drawn = [row for row in rows if row.method == method]
            level_axis(ax, *_levels(drawn))
            _curves(ax, drawn, "target_sparsity", metric)
            if metric == "loss":
                _curves(ax, drawn, "target_sparsity", "scaled_loss", **_SCALED)
        _metric_axis(metric, *line)
    for method, ax in zip(methods, axes[0], strict=True):
        ax.set_title(_NAMES[method])
        ax.axhline(0, color="0.5", linewidth=0.8)
    looks: list[_Look] = [_PROTOCOLS[p] | {"color": "0.2", "label": _NAMES[p]} for p in protocols]
    looks.append(_SCALED | {"label": "loss after temperature scaling"})
    return _finish(fig, rows, note, [Line2D([], [], **look) for look in looks])


def draw_figures(rows: Sequence[Row], *, note: str = "") -> dict[str, Figure]:
    """Draw every figure that the rows allow; return them by name."""
    figures = {
        "k-sparsity-weight": k_sparsity(rows, "weight", note=note),
        "k-sparsity-unit": k_sparsity(rows, "unit", note=note),
        "weight-vs-unit": weight_vs_unit(rows, note=note),
        "epoch_training_weights": epoch_training(rows, "weight", note=note),
        "epoch_training_units": epoch_training(rows, "unit", note=note),
        "calibration-and-churn": calibration_and_churn(rows, note=note),
    }
    return {name: fig for name, fig in figures.items() if fig is not None}


def describe(settings: Mapping[str, Any]) -> str:
    """Return a note on the data set and the network, as far as the settings of a run tell."""
    dataset = str(settings.get("dataset", "")).rstrip("/").split("/")[-1]
    sizes = "-".join(map(str, settings.get("hidden_sizes", ())))
    return "; ".join(filter(None, [dataset, sizes and f"hidden layers {sizes}"]))


def _one_study(rows: Sequence[Row]) -> list[Row]:
    rows = [row for row in rows if row.method in _METHODS and row.protocol in _PROTOCOLS]
    studies = sorted({(row.criterion, row.scope) for row in rows})
    if len(studies) > 1:
        raise ValueError(f"rows must be of one criterion and scope, got {studies}: select one")
    return sorted(rows, key=lambda row: (row.target_sparsity, row.epoch, row.seed))


def _last_epoch(rows: Sequence[Row]) -> list[Row]:
    rows = _one_study(rows)
    last = max((row.epoch for row in rows), default=0)
    return [row for row in rows if row.epoch == last]


def _present(rows: Sequence[Row], field: str) -> list[str]:
    values = {getattr(row, field) for row in rows}
    return [name for name in _NAMES if name in values]


def _curve(ax: Axes, rows: Sequence[Row], x: str, y: str, **look: Any) -> None:
    """Draw the mean of y against the mean of x, each over the seeds of a level and epoch."""
    groups = defaultdict(list)
    for row in rows:
        point = getattr(row, x), getattr(row, y)
        if all(value is not None and math.isfinite(value) for value in point):
            groups[row.target_sparsity, row.epoch].append(point)
    if not groups:
        return
    xs = [mean_interval([x for x, _ in group])[0] for group in groups.values()]
    ys = [mean_interval([y for _, y in group]) for group in groups.values()]
    ax.plot(xs, [mean for mean, _ in ys], **look)
    if any(half is not None for _, half in ys):
        low = [math.nan if half is None else mean - half for mean, half in ys]
        high = [math.nan if half is None else mean + half for mean, half in ys]
        ax.fill_between(xs, low, high, color=look["color"], alpha=0.15, linewidth=0)
        if len(xs) == 1:  # a band of no width
            bar = LineCollection([[(xs[0], low[0]), (xs[0], high[0])]], color=look["color"])
            ax.add_collection(bar, autolim=False)


def _curves(ax: Axes, rows: Sequence[Row], x: str, y: str, **look: Any) -> None:
    for (method, protocol), own in _looks(rows).items():
        drawn = [row for row in rows if (row.method, row.protocol) == (method, protocol)]
        _curve(ax, drawn, x, y, **(own | look))


def _looks(rows: Sequence[Row]) -> dict[tuple[str, str], _Look]:
    return {
        (m, p): {"label": f"{_NAMES[m]}, {_NAMES[p]}"} | _METHODS[m] | _PROTOCOLS[p]
        for m in _present(rows, "method")
        for p in _present([row for row in rows if row.method == m], "protocol")
    }


def _handles(rows: Sequence[Row], axes: Any) -> list[Line2D]:
    """Mark what a uniform guess gets in the panels of accuracy and loss; return the legend."""
    classes = len(rows[0].class_accuracy)
    looks = [*_looks(rows).values()]
    if classes > 0:
        looks.append(_GUESS)
        for line, value in zip(axes, (1 / classes, math.log(classes)), strict=True):
            for ax in line:
                ax.set(autoscale_on=False)
                ax.axhline(value, **_GUESS)
    return [Line2D([], [], **look) for look in looks]


def _levels(rows: Sequence[Row]) -> tuple[list[float], str]:
    """Return the levels, and what their axis is named."""
    units = " or ".join(_NAMES[method] for method in _present(rows, "method"))
    return [row.target_sparsity for row in rows], f"k (% of {units} pruned)"


def _metric_axis(metric: str, *line: Axes, zoom: bool = False) -> None:
    """Scale, limit and name the y axis of panels side by side; wide bands may be cut off."""
    line[0].set_ylabel(_LABELS[metric])
    for ax in line:
        if metric == "loss":
            # It grows tenfold over the levels, and doubles where accuracy hardly moves.
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
            ax.yaxis.set_minor_locator(NullLocator())
        else:
            ax.yaxis.set_major_formatter(FuncFormatter(lambda part, _: percent(part)))
    low, high = line[0].get_ylim()
    if metric == "loss":
        means = np.concatenate([curve.get_ydata() for ax in line for curve in ax.lines] or [[1]])
        line[0].set_ylim(max(low, means.min() / 2), min(high, means.max() * 2))
    elif metric != "signed_ece":
        least, most = -0.02, 1.02
        line[0].set_ylim((max(low, least), min(high, most)) if zoom else (least, most))


def _label_lines(ax: Axes) -> None:
    """Write each line's label beside its end, as near as the other labels allow."""
    lines = sorted(ax.lines, key=lambda line: np.asarray(line.get_ydata())[-1])
    if not lines:
        return
    lines = lines[:: -(-len(lines) // _ROOM)]
    ends = [tuple(np.asarray(line.get_xydata())[-1]) for line in lines]
    heights = ax.transAxes.inverted().transform(ax.transData.transform(ends))[:, 1]
    # The nearest places at least 1 / _ROOM apart: an isotonic regression.
    steps = np.arange(len(lines)) / _ROOM
    free, n = heights - steps, range(len(lines))
    free = [max(min(free[j : k + 1].mean() for k in n[i:]) for j in n[: i + 1]) for i in n]
    for line, end, y in zip(lines, ends, np.clip(free, 0, 1 - steps[-1]) + steps, strict=True):
        color = line.get_color()
        arrow = {"arrowstyle": "-", "linewidth": 0.5, "color": color, "shrinkA": 0, "shrinkB": 2,
                 "relpos": (-0.3, 0.55), "patchA": None}  # fmt: skip
        ax.annotate(str(line.get_label()), end, (1.07, y), textcoords="axes fraction", va="center",
                    fontsize=6.5, arrowprops=arrow)  # fmt: skip
    ax.annotate("k (%)", (1.07, 1.07), xycoords="axes fraction", va="center", fontsize=6.5)


def _pruning_epochs(rows: Sequence[Row]) -> tuple[int, int] | None:
    """Return the last dense and the first fully pruned epoch, read off the achieved sparsity."""
    level = max(row.target_sparsity for row in rows)
    seed = min(row.seed for row in rows if row.target_sparsity == level)
    reached = {r.epoch: r.sparsity for r in rows if (r.target_sparsity, r.seed) == (level, seed)}
    final = reached[max(reached)]
    if final == 0:
        return None
    dense = max((epoch for epoch, sparsity in reached.items() if sparsity == 0), default=0)
    return dense, min(epoch for epoch, sparsity in reached.items() if sparsity == final)


def _finish(fig: Figure, rows: Sequence[Row], note: str, handles: Sequence[Artist]) -> Figure:
    """Add the legend above and the footnote below; name the x axis on the last row only."""
    for ax in fig.axes:
        if (place := ax.get_subplotspec()) and not place.is_last_row():
            ax.set_xlabel("")
    fig.align_labels()
    if handles:
        fig.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 3))
    seeds, epochs = len({row.seed for row in rows}), max(row.epoch for row in rows)
    texts = [
        note,
        f"{rows[0].criterion} scores, by {rows[0].scope}",
        f"{epochs} epoch{'s' * (epochs > 1)}",
        "one seed" if seeds == 1 else f"mean of {seeds} seeds, band: 95% t interval",
    ]
    footnote(fig, "; ".join(filter(None, texts)))
    return fig
