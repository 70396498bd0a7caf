"""What all figures share: their style, their panels, the axis of levels, and how they are saved."""

import math
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE = {
    "font.family": "DejaVu Sans", "font.size": 8, "axes.titlesize": 8.5, "legend.fontsize": 8,
    "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.frameon": False, "legend.handlelength": 3.2,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "0.88", "grid.linewidth": 0.5,
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.2,
    "lines.markersize": 3.8, "savefig.dpi": 200, "svg.fonttype": "path", "svg.hashsalt": "jaxprune",
}  # fmt: skip


@style.context(STYLE, after_reset=True)
def save_figures(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write figures as PNG and SVG into a folder, made if missing; return the files.

    The same rows give the same bytes.
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


def percent(fraction: float) -> str:
    """Return a fraction in percent, as short as it is exact."""
    return f"{100 * fraction:g}".replace("-", "\N{MINUS SIGN}")


def level_axis(ax: Axes, levels: Iterable[float], label: str) -> None:
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
    ax.set_xlabel(label)


def footnote(fig: Figure, text: str) -> None:
    """Say below a figure what it is of."""
    fig.supxlabel(textwrap.fill(text, 130), x=0.01, ha="left", fontsize=6.5, color="0.3")
