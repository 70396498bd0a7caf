"""Draw what pruned networks cost: their widths, their speed and the bytes of their files."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, style
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from jaxprune.figures.panels import STYLE, footnote, level_axis, panels, percent
from jaxprune.results import mean_interval

CROSSOVER = 1.03  # times as fast as dense from which a network counts as faster
_CODES: dict[str, dict[str, Any]] = {
    "float32": {"color": "#0072B2", "marker": "o"},
    "float16": {"color": "#56B4E9", "marker": "s"},
    "int8": {"color": "#009E73", "marker": "D"},
    "codebook6": {"color": "#E69F00", "marker": "^"},
    "codebook5": {"color": "#D55E00", "marker": "v"},
    "codebook4": {"color": "#CC79A7", "marker": "P"},
}
_FORMATS: dict[str, dict[str, Any]] = {
    "bound": {"color": "0.2", "linestyle": (0, (4, 2)), "label": "lossless bound"},
    "bitmap": {"color": "0.55", "marker": "x", "label": "bitmap + float32"},
    "csr": {"color": "0.55", "marker": "1", "label": "CSR"},
    "npz": {"color": "0.55", "marker": "+", "label": "npz"},
    "gzip": {"color": "0.55", "marker": "|", "label": "gzip"},
}


@style.context(STYLE, after_reset=True)
def widths(before_after: Mapping[str, tuple[int, int]], *, note: str = "") -> Figure:
    """Draw the units of every group of a network before and after compaction, a bar each.

    Args:
        before_after: what `structure.Compaction.widths` holds.
        note: for the footnote.

    Raises:
        ValueError: there are no groups.
    """
    if not before_after:
        raise ValueError("widths needs at least one group, got none")
    names, pairs = [*before_after], [*before_after.values()]
    fig = Figure(figsize=(6.8, 0.9 + 0.19 * len(names)), layout="constrained")
    ax = fig.subplots()
    places = np.arange(len(names))
    ax.barh(places, [old for old, _ in pairs], color="0.85", label="before")
    ax.barh(places, [new for _, new in pairs], 0.5, color="#0072B2", label="after")
    for place, (old, new) in enumerate(pairs):
        ax.text(old, place, f" {new} of {old}", va="center", fontsize=6.5)
    ax.set(yticks=places, yticklabels=names, xlabel="units", ylim=(len(names) - 0.4, -0.6))
    ax.set_xlim(0, 1.15 * max(old for old, _ in pairs))
    ax.grid(axis="y", visible=False)
    fig.legend(loc="outside upper center", ncols=2)
    if note:
        footnote(fig, note)
    return fig


def crossover(rows: Sequence[Mapping[str, Any]]) -> int | float | None:
    """Return the lowest level (percent) whose median is 3% faster than dense, None without one.

    Args:
        rows: of one method and batch size, as `speedups` takes them.
    """
    faster = [row["level"] for row in rows if np.median(row["ratios"]) >= CROSSOVER]
    return min(faster, default=None)


@style.context(STYLE, after_reset=True)
def speedups(rows: Sequence[Mapping[str, Any]], *, note: str = "") -> Figure:
    """Draw how many times as fast as dense pruned networks are, a line a batch size.

    A ring marks the `crossover`, the lowest level at which a network is 3% faster.

    Args:
        rows: mappings of `method`, `level` (percent), `batch`, `ratios` (the dense network's
            seconds over the pruned one's, a call each), `kept` and `dense` (multiply-adds).
        note: for the footnote.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("speedups needs at least one row, got none")
    methods = [m for m in ("weight", "unit") if any(row["method"] == m for row in rows)]
    batches = sorted({row["batch"] for row in rows})
    colors = colormaps["viridis"](np.linspace(0, 0.85, len(batches)))
    fig, axes = panels(1, len(methods), height=3.3, sharey="row")
    for method, ax in zip(methods, axes[0], strict=True):
        here = sorted((r for r in rows if r["method"] == method), key=lambda row: row["level"])
        level_axis(ax, [row["level"] / 100 for row in here], f"k (% of {method}s pruned)")
        for i, batch in enumerate(batches):
            line = [row for row in here if row["batch"] == batch]
            levels = [row["level"] / 100 for row in line]
            middle, low, high = (np.array([np.quantile(row["ratios"], q) for row in line])
                                 for q in (0.5, 0.25, 0.75))  # fmt: skip
            look = {"color": colors[i], "marker": "os^Dvp"[i % 6]}
            ax.plot(levels, middle, label=f"batch {batch}", **look)
            ax.fill_between(levels, low, high, color=colors[i], alpha=0.2, linewidth=0)
            if (first := crossover(line)) is not None:
                at = [first / 100], [middle[levels.index(first / 100)]]
                ax.plot(*at, "o", markersize=9, markerfacecolor="none", color=colors[i])
        ideal = {row["level"] / 100: row["dense"] / row["kept"] for row in here if row["kept"]}
        ax.plot([*ideal], [*ideal.values()], color="0.4", linestyle=(0, (4, 2)), label="ideal")
        ax.axhline(1, color="0.5", linewidth=0.8)
        ax.set_title(f"{method}s")
        _log_axis(ax)
    axes[0, 0].set_ylabel("times as fast as dense")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    marks = "band: quartiles; ring: the first level that is 3% faster; ideal: by multiply-adds"
    footnote(fig, "; ".join(filter(None, [note, marks])))
    return fig


@style.context(STYLE, after_reset=True)
def file_sizes(rows: Sequence[Mapping[str, Any]], *, note: str = "") -> Figure:
    """Draw the bytes of weight-pruned networks' files, against k and against accuracy.

    Args:
        rows: mappings of `level` (percent), `seed`, `values` (as `sparse.save_sparse` takes it),
            `bytes`, `accuracy`, and the bytes of other formats, `bound`, `bitmap`, `csr`, `npz`
            and `gzip`.
        note: for the footnote.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("file_sizes needs at least one row, got none")
    fig, ((left, right),) = panels(1, 2, height=3.8)
    levels = sorted({row["level"] for row in rows})

    def means(values: str, field: str) -> list[float]:
        found = [[r[field] for r in rows if (r["level"], r["values"]) == (level, values)]
                 for level in levels]  # fmt: skip
        return [mean_interval(numbers)[0] for numbers in found]

    level_axis(left, [level / 100 for level in levels], "k (% of weights pruned)")
    present = [values for values in _CODES if any(row["values"] == values for row in rows)]
    for values in present:
        megabytes = np.array(means(values, "bytes")) / 1e6
        left.plot([level / 100 for level in levels], megabytes, label=values, **_CODES[values])
        accuracy = np.array(means(values, "accuracy"))
        right.plot(megabytes, accuracy, linewidth=0.8, **_CODES[values])
    for name, look in _FORMATS.items():
        megabytes = np.array(means(present[0], name)) / 1e6
        left.plot([level / 100 for level in levels], megabytes, linewidth=0.8, **look)
    _log_axis(left)
    left.set_ylabel("megabytes")
    right.set(xscale="log", xlabel="megabytes", ylabel="test accuracy (%)")
    right.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    right.yaxis.set_major_formatter(FuncFormatter(lambda part, _: percent(round(part, 4))))
    fig.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=6)
    seeds = len({row["seed"] for row in rows})
    footnote(fig, "; ".join(filter(None, [note, f"mean of {seeds} seeds" if seeds > 1 else ""])))
    return fig


def _log_axis(ax: Any) -> None:
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
