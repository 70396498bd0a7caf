"""Arms in figures: which rows belong together, how they look, and what is said of them.

A family is a criterion with its scope. Where there is one, granularities differ by colour,
otherwise families do; one-shot is dashed, trained solid.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxprune.config import Arm
from jaxprune.figures.panels import Look, Points, color_of, curve, footnote, over_seeds
from jaxprune.results import Row, drawn_metrics
from jaxprune.types import Metric

Family = tuple[str, str]
_PROTOCOLS: dict[str, Look] = {
    "one_shot": {"linestyle": (0, (4, 2)), "markerfacecolor": "white"},
    "trained": {"linestyle": "-"},
}
_OTHER: Look = {"linestyle": "-."}
_GUESS: Look = {"color": "0.4", "linestyle": ":", "linewidth": 1, "label": "blind guess"}


def present(rows: Iterable[Row], field: str) -> list[str]:
    """Return the values of a field, known ones in their order, then the others."""
    known = ["weight", "unit", "one_shot", "trained"]
    found = dict.fromkeys(getattr(row, field) for row in rows)
    return sorted(found, key=lambda name: known.index(name) if name in known else len(known))


def family_of(row: Row | Arm) -> Family:
    """Return the criterion and the scope of a row or an arm."""
    return row.criterion, row.scope


def families_of(rows: Iterable[Row]) -> list[Family]:
    """Return the families in the order in which they come."""
    return list(dict.fromkeys(map(family_of, rows)))


def family_name(family: Family, rows: Sequence[Row]) -> str:
    """Return what tells a family from the others: its criterion, its scope, or both."""
    parts = zip(family, zip(*families_of(rows), strict=True), strict=True)
    return ", ".join(name for name, all_names in parts if len({*all_names}) > 1)


def colors_of(rows: Sequence[Row], *, families: bool = True) -> dict[Any, Look]:
    """Return colour, marker and label by family if several are there and meant, or granularity."""
    if families and len(every := families_of(rows)) > 1:
        names = {family: family_name(family, rows) for family in every}
    else:
        names = {name: f"{name}s" for name in ("weight", "unit", *present(rows, "granularity"))}
    return {key: color_of(i) | {"label": name} for i, (key, name) in enumerate(names.items())}


def legend_of(
    rows: Sequence[Row], colors: Mapping[Any, Look], metrics: Iterable[Metric] = ()
) -> list[Line2D]:
    """Return the legend: families or granularities by colour, then protocols by line.

    Args:
        rows: all that is drawn.
        colors: as `colors_of` returns them; what no row has is left out.
        metrics: in whose panels a blind guess is marked.
    """
    there = {*families_of(rows), *present(rows, "granularity")}
    looks = [look for key, look in colors.items() if key in there]
    for name in present(rows, "protocol"):
        label = {"color": "0.2", "marker": "o", "label": name.replace("_", "-")}
        looks.append(label | _PROTOCOLS.get(name, _OTHER))
    if any(metric.chance is not None for metric in metrics):
        looks.append(_GUESS)
    return [Line2D([], [], **look) for look in looks]


def look_of(arm: Arm, colors: Mapping[Any, Look]) -> Look:
    """Return the look of an arm's curve."""
    color = colors.get(family_of(arm)) or colors[arm.granularity]
    return color | _PROTOCOLS.get(arm.protocol, _OTHER) | {"label": str(arm)}


def panel_rows(
    rows: Sequence[Row], metrics: Sequence[Metric]
) -> list[tuple[Metric, str, list[Row], bool]]:
    """Return what goes into a row of panels each, its name, and whether it is a smaller range.

    Metrics, the first once more where some networks are trained: those differ by a point where
    others lose ninety. Of several families the first metric, a row each.
    """
    families, drawn = families_of(rows), drawn_metrics(metrics)
    if len(families) > 1:
        own = {family: [row for row in rows if family_of(row) == family] for family in families}
        return [(drawn[0], family_name(name, rows), own[name], False) for name in families]
    parts = [(metric, "", list(rows), False) for metric in drawn]
    if len(present(rows, "protocol")) > 1:
        parts.insert(1, (drawn[0], "near the trained", list(rows), True))
    return parts


def points_of(rows: Iterable[Row], x: str, metric: str) -> Points:
    """Return (x, y) of every seed by level and epoch, where it is known.

    Raises:
        ValueError: two rows are of one arm, seed, epoch and level.
    """
    points, seen = defaultdict(list), set()
    for row in sorted(rows, key=lambda row: (row.target_sparsity, row.epoch, row.seed)):
        if (key := (*row.arm, row.target_sparsity, row.epoch, row.seed)) in seen:
            raise ValueError(
                f"two rows of {row.arm}, seed {row.seed}, epoch {row.epoch}, "
                f"level {100 * row.target_sparsity:g}%: name the criteria differently"
            )
        seen.add(key)
        if (value := row.metrics.get(metric)) is not None:
            points[row.target_sparsity, row.epoch].append((getattr(row, x), value))
    return points


def arm_curves(
    ax: Axes, rows: Sequence[Row], x: str, metric: Metric, colors: Mapping[Any, Look], **look: Any
) -> None:
    """Draw a curve an arm; `look` is of all of them."""
    for arm in dict.fromkeys(row.arm for row in rows):
        points = points_of([row for row in rows if row.arm == arm], x, metric.name)
        curve(ax, points, metric, **look_of(arm, colors) | look)


def mark_guess(metric: Metric, *line: Axes) -> None:
    """Mark what a guess gets that knows nothing, if it is within the panels."""
    if metric.chance is not None:
        for ax in line:
            ax.autoscale_view()  # now, or it would never be done
            ax.set(autoscale_on=False)
            ax.axhline(metric.chance, **_GUESS)


def zoom_in(metric: Metric, rows: Iterable[Row], ax: Axes) -> None:
    """Limit a panel, and what shares its y axis, to the best four fifths of the trained rows."""
    known = (row.metrics.get(metric.name) for row in rows if row.protocol == "trained")
    if values := [value for value in known if value is not None]:
        low, high = np.quantile(values, (0, 0.8) if metric.better == "lower" else (0.2, 1))
        room = 0.1 * (high - low) or 0.01
        ax.set_ylim(low - room, high + room)


def finish(fig: Figure, rows: Sequence[Row], note: str, handles: Sequence[Any]) -> Figure:
    """Add the legend above and the footnote below."""
    fig.align_labels()
    widths = [0.5 + 0.062 * len(handle.get_label()) for handle in handles]  # inches
    columns = len(handles) if sum(widths) < 6.6 else max(int(6.6 / max(widths)), 1)
    fig.legend(handles=handles, loc="outside upper center", ncols=columns, handlelength=2.2,
               columnspacing=1.4)  # fmt: skip
    criteria, scopes = (", ".join(present(rows, field)) for field in ("criterion", "scope"))
    epochs = max(row.epoch for row in rows)
    after = f"{epochs} epoch{'s' * (epochs > 1)}" if epochs else ""
    seeds = over_seeds(len({row.seed for row in rows}))
    footnote(fig, note, f"{criteria} scores, by {scopes}", after, seeds)
    return fig
