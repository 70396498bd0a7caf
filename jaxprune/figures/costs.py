"""Draw what pruned networks cost: their speed, and the bytes of their files."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxprune.figures.panels import (
    STYLE,
    Look,
    color_of,
    footnote,
    level_axis,
    log_axis,
    panels,
    percent_axis,
)

_FASTER = 1.03  # times as fast as dense from which a network counts as faster
_FORMATS: dict[str, Look] = {
    "bound": {"color": "0.1", "linestyle": (0, (4, 2)), "label": "bound: independent places"},
    "bitmap": {"color": "#8C564B", "linestyle": "-.", "marker": "x", "label": "bitmap + float32"},
    "csr": {"color": "0.55", "linestyle": ":", "marker": "1", "label": "CSR"},
    "npz": {"color": "0.3", "linestyle": "none", "marker": "+", "label": "npz"},
    "gzip": {"color": "0.6", "marker": "s", "fillstyle": "none", "markersize": 6, "label": "gzip"},
}


def crossover(rows: Sequence[Mapping[str, Any]]) -> int | float | None:
    """Return the lowest level (percent) whose median is 3% faster than dense, None without one.

    Args:
        rows: of one granularity and batch size, as `speedups` takes them.
    """
    faster = [row["level"] for row in rows if np.median(row["ratios"]) >= _FASTER]
    return min(faster, default=None)


@style.context(STYLE, after_reset=True)
def speedups(rows: Sequence[Mapping[str, Any]], *, note: str = "") -> Figure:
    """Draw how many times as fast as dense pruned networks are, a line a batch size.

    A ring marks the `crossover`, the lowest level at which a network is 3% faster. At the smallest
    batch the compiled network at 0%, all of whose weights are kept, is faster than others' dense:
    a thin line shows what pruning adds to that.

    Args:
        rows: mappings of `granularity`, `level` (percent), `batch`, `ratios` (the dense network's
            seconds over the pruned one's, a call each), `seconds` (of a call, with `ours`), `dense`
            and `executed` (multiply-adds of an example: of the dense network, and those run).
        note: for the footnote.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("speedups needs at least one row, got none")
    granularities = list(dict.fromkeys(row["granularity"] for row in rows))
    batches = sorted({row["batch"] for row in rows})
    fig, axes = panels(1, len(granularities), height=3.6, sharey="row")
    for granularity, ax in zip(granularities, axes[0], strict=True):
        here = [row for row in rows if row["granularity"] == granularity]
        here.sort(key=lambda row: row["level"])
        level_axis(ax, [row["level"] / 100 for row in here], f"{granularity}s")
        for i, batch in enumerate(batches):
            if own := [row for row in here if row["batch"] == batch]:
                _speed_line(ax, own, color_of(i))
        _beside_own_dense(ax, [row for row in here if row["batch"] == batches[0]])
        ideal = {r["level"] / 100: r["dense"] / r["executed"] for r in here if r["executed"]}
        dashed = {"color": "0.4", "linestyle": (0, (4, 2))}
        ax.plot([*ideal], [*ideal.values()], label="ideal, by multiply-adds run", **dashed)
        ax.axhline(1, color="0.5", linewidth=0.8)
        ax.set_title(f"{granularity}s")
        log_axis(ax)
    axes[0, 0].set_ylabel("times as fast as dense")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    texts = "dense: the faster of XLA and NumPy", "band: quartiles of the calls"
    footnote(fig, note, *texts, "ring: the first level that is 3% faster")
    return fig


@style.context(STYLE, after_reset=True)
def file_sizes(rows: Sequence[Mapping[str, Any]], *, note: str = "") -> Figure:
    """Draw the bytes of weight-pruned networks' files, against k and against accuracy.

    Args:
        rows: mappings of `level` (percent), `seed`, `values` (as `sparse.save_sparse` takes it),
            `bytes`, `accuracy`, and the bytes of other formats, `bound`, `bitmap`, `csr`, `npz`
            and `gzip`. `bound` is of independent places and uncompressed float32 values.
        note: for the footnote.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("file_sizes needs at least one row, got none")
    fig, ((left, right),) = panels(1, 2, height=4.1)
    levels = np.array(sorted({row["level"] for row in rows}))

    def by_level(values: str, field: str, reduce: Any = np.mean) -> np.ndarray:
        own = [row for row in rows if row["values"] == values]
        return np.array([reduce([r[field] for r in own if r["level"] == k]) for k in levels])

    level_axis(left, levels / 100, "weights")
    present = list(dict.fromkeys(row["values"] for row in rows))
    for i, values in enumerate(present):
        megabytes, look = by_level(values, "bytes") / 1e6, color_of(i)
        left.plot(levels / 100, megabytes, label=values, **look)
        low, mean, high = (by_level(values, "accuracy", f) for f in (np.min, np.mean, np.max))
        right.plot(megabytes, mean, linewidth=0.8, **look)
        right.vlines(megabytes, low, high, color=look["color"], alpha=0.35, linewidth=0.8)
    for name, look in _FORMATS.items():
        left.plot(levels / 100, by_level(present[0], name) / 1e6, linewidth=0.8, **look)
    log_axis(left)
    left.set_ylabel("megabytes")
    right.set(xscale="log", xlabel="megabytes", ylabel="test accuracy (%)")
    right.xaxis.set_major_formatter("{x:g}")
    percent_axis(right)
    fig.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    seeds = len({row["seed"] for row in rows})
    means = f"mean of {seeds} seeds, bars: lowest to highest" if seeds > 1 else "one seed"
    bound = "bound: of places that are independent, and float32 values"
    footnote(fig, note, means, f"{bound}; files are below it because values compress")
    return fig


def _speed_line(ax: Axes, rows: Sequence[Mapping[str, Any]], look: Look) -> None:
    levels = [row["level"] / 100 for row in rows]
    low, middle, high = zip(
        *(np.quantile(row["ratios"], (0.25, 0.5, 0.75)) for row in rows), strict=True
    )
    ax.plot(levels, middle, label=f"batch {rows[0]['batch']}", **look)
    ax.fill_between(levels, low, high, color=look["color"], alpha=0.15, linewidth=0, zorder=1.4)
    if (first := crossover(rows)) is not None:
        at = [first / 100], [middle[levels.index(first / 100)]]
        ax.plot(*at, "o", markersize=9, markerfacecolor="none", color=look["color"])


def _beside_own_dense(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the smallest batch beside the same kernel with all weights, if it was measured."""
    seconds = {row["level"] / 100: np.median(row["seconds"]["ours"]) for row in rows}
    if 0 in seconds:
        ratios = [seconds[0] / here for here in seconds.values()]
        thin = {"color": color_of(0)["color"], "linestyle": ":", "marker": "."}
        label = f"batch {rows[0]['batch']}, beside own dense, 0%"
        ax.plot([*seconds], ratios, label=label, **thin)
