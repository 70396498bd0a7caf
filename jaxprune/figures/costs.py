"""Draw what pruned networks cost: their speed, and the bytes of their files."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from jaxprune.figures.panels import (
    STYLE,
    footnote,
    level_axis,
    log_axis,
    panels,
    percent,
)

CROSSOVER = 1.03  # times as fast as dense from which a network counts as faster
_BATCHES: list[dict[str, Any]] = [
    {"color": "#CC79A7", "marker": "o"},
    {"color": "#E69F00", "marker": "s"},
    {"color": "#009E73", "marker": "D"},
    {"color": "#0072B2", "marker": "^"},
]
_CODES: dict[str, dict[str, Any]] = {
    "float32": {"color": "#0072B2", "marker": "o"},
    "float16": {"color": "#56B4E9", "marker": "s"},
    "int8": {"color": "#009E73", "marker": "D"},
    "codebook6": {"color": "#E69F00", "marker": "^"},
    "codebook5": {"color": "#D55E00", "marker": "v"},
    "codebook4": {"color": "#CC79A7", "marker": "P"},
}
_FORMATS: dict[str, dict[str, Any]] = {
    "bound": {"color": "0.1", "linestyle": (0, (4, 2)), "label": "bound: independent places"},
    "bitmap": {"color": "#8C564B", "linestyle": "-.", "marker": "x", "label": "bitmap + float32"},
    "csr": {"color": "0.55", "linestyle": ":", "marker": "1", "label": "CSR"},
    "npz": {"color": "0.3", "linestyle": "none", "marker": "+", "label": "npz"},
    "gzip": {
        "color": "0.6", "marker": "s", "markerfacecolor": "none", "markersize": 6, "label": "gzip"
    },
}  # fmt: skip


def crossover(rows: Sequence[Mapping[str, Any]]) -> int | float | None:
    """Return the lowest level (percent) whose median is 3% faster than dense, None without one.

    Args:
        rows: of one granularity and batch size, as `speedups` takes them.
    """
    faster = [row["level"] for row in rows if np.median(row["ratios"]) >= CROSSOVER]
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
        here = sorted(
            (r for r in rows if r["granularity"] == granularity), key=lambda r: r["level"]
        )
        level_axis(ax, [row["level"] / 100 for row in here], f"{granularity}s")
        for batch, look in zip(batches, _BATCHES * len(batches), strict=False):
            _speed_line(ax, [row for row in here if row["batch"] == batch], batch, look)
        _beside_own_dense(ax, [row for row in here if row["batch"] == batches[0]])
        ideal = {r["level"] / 100: r["dense"] / r["executed"] for r in here if r["executed"]}
        ax.plot([*ideal], [*ideal.values()], color="0.4", linestyle=(0, (4, 2)),
                label="ideal, by multiply-adds run")  # fmt: skip
        ax.axhline(1, color="0.5", linewidth=0.8)
        ax.set_title(f"{granularity}s")
        log_axis(ax)
    axes[0, 0].set_ylabel("times as fast as dense")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    footnote(fig, note, "dense: the faster of XLA and NumPy", "band: quartiles of the calls",
             "ring: the first level that is 3% faster")  # fmt: skip
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
    levels = sorted({row["level"] for row in rows})

    def by_level(values: str, field: str) -> list[list[Any]]:
        return [[r[field] for r in rows if (r["level"], r["values"]) == (level, values)]
                for level in levels]  # fmt: skip

    level_axis(left, [level / 100 for level in levels], "weights")
    present = [values for values in _CODES if any(row["values"] == values for row in rows)]
    for values in present:
        megabytes = np.array([np.mean(found) for found in by_level(values, "bytes")]) / 1e6
        left.plot([level / 100 for level in levels], megabytes, label=values, **_CODES[values])
        accuracy = by_level(values, "accuracy")
        means = np.array([np.mean(seeds) for seeds in accuracy])
        right.plot(megabytes, means, linewidth=0.8, **_CODES[values])
        spread = [means - [*map(min, accuracy)], [*map(max, accuracy)] - means]
        right.errorbar(megabytes, means, spread, fmt="none", color=_CODES[values]["color"],
                       alpha=0.35, linewidth=0.8)  # fmt: skip
    for name, look in _FORMATS.items():
        megabytes = np.array([np.mean(found) for found in by_level(present[0], name)]) / 1e6
        left.plot([level / 100 for level in levels], megabytes, linewidth=0.8, **look)
    log_axis(left)
    left.set_ylabel("megabytes")
    right.set(xscale="log", xlabel="megabytes", ylabel="test accuracy (%)")
    right.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    right.yaxis.set_major_formatter(FuncFormatter(lambda part, _: percent(round(part, 4))))
    fig.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    seeds = len({row["seed"] for row in rows})
    footnote(
        fig, note, f"mean of {seeds} seeds, bars: lowest to highest" if seeds > 1 else "one seed",
        "bound: of places that are independent, and float32 values; files are below it because "
        "values compress",
    )  # fmt: skip
    return fig


def _speed_line(ax: Any, rows: Sequence[Mapping[str, Any]], batch: int, look: Any) -> None:
    levels = [row["level"] / 100 for row in rows]
    middle, low, high = (np.array([np.quantile(row["ratios"], q) for row in rows])
                         for q in (0.5, 0.25, 0.75))  # fmt: skip
    ax.plot(levels, middle, label=f"batch {batch}", **look)
    ax.fill_between(levels, low, high, color=look["color"], alpha=0.15, linewidth=0, zorder=1.4)
    if (first := crossover(rows)) is not None:
        at = [first / 100], [middle[levels.index(first / 100)]]
        ax.plot(*at, "o", markersize=9, markerfacecolor="none", color=look["color"])


def _beside_own_dense(ax: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the smallest batch beside the same kernel with all weights, if it was measured."""
    seconds = {row["level"] / 100: np.median(row["seconds"]["ours"]) for row in rows}
    if 0 in seconds:
        ratios = [seconds[0] / here for here in seconds.values()]
        ax.plot([*seconds], ratios, color=_BATCHES[0]["color"], linestyle=":", marker=".",
                label=f"batch {rows[0]['batch']}, beside own dense, 0%")  # fmt: skip
