"""Rows in; means with intervals, paired differences and tables out. Imports no jax.

The `text` of the tables is what a sweep prints, and `report` renders the same tables.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxprune.config import Arm
from jaxprune.results.rows import Row

if TYPE_CHECKING:
    from jaxprune.types import Metric
else:
    Metric = Any  # `types` imports jax


class Table(NamedTuple):
    """A title of one line; (heading, name) of every column; and lines of as many cells."""

    title: str
    columns: list[tuple[str, str]]
    lines: list[list[str]]


def mean_interval(values: Sequence[int | float]) -> tuple[float, float | None]:
    """Return the mean and half the width of its 95% Student t interval; None for one value."""
    from scipy.special import stdtrit

    if (n := len(values)) == 0:
        raise ValueError("mean_interval needs at least one value, got none")
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, float(stdtrit(n - 1, 0.975)) * math.sqrt(variance / n)


def last_epoch(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the last epoch."""
    last = max((row.epoch for row in rows), default=0)
    return [row for row in rows if row.epoch == last]


def drawn_metrics(metrics: Sequence[Metric]) -> list[Metric]:
    """Return the two that tables and figures show first."""
    return [metric for metric in metrics if metric.drawn][:2] or list(metrics[:2])


def paired(rows: Sequence[Row], arm: Arm, other: Arm, metric: str) -> dict[float, list[float]]:
    """Return by level by how much an arm's metric is above another's, of each seed that has both.

    Args:
        rows: of one epoch.
        arm: which.
        other: what it is compared with.
        metric: the name of one of their metrics.
    """
    found = {(row.arm, row.target_sparsity, row.seed): row.metrics.get(metric) for row in rows}
    differences = defaultdict(list)
    for level, seed in sorted(key[1:] for key in found if key[0] == arm):
        ours, theirs = found[arm, level, seed], found.get((other, level, seed))
        if ours is not None and theirs is not None:
            differences[level].append(ours - theirs)
    return dict(differences)


def difference(
    rows: Sequence[Row], arm: Arm, other: Arm, level: int | float, metric: str
) -> tuple[float, float | None]:
    """Return by how much an arm's metric is above another's after the last epoch.

    Args:
        rows: of one study.
        arm: which.
        other: what it is compared with.
        level: as a fraction, as rows have it.
        metric: the name of one of their metrics.

    Returns:
        The mean of the seeds' differences and half its 95% interval; None for one seed.

    Raises:
        ValueError: no seed has the metric for both arms.
    """
    pairs = paired(last_epoch(rows), arm, other, metric).get(level)
    if not pairs:
        raise ValueError(f"no seed has {metric} of both {arm} and {other} at {100 * level:.10g}%")
    return mean_interval(pairs)


def tables(rows: Sequence[Row], metrics: Sequence[Metric]) -> list[Table]:
    """Lay out the last epoch: tables of all arms, then tables of their paired differences.

    A table is of a protocol, a criterion and a scope, and a line of a level. Of each granularity it
    has the two metrics that are drawn and the weights that remain. Of two seeds both values are
    given, of more their mean ± half its 95% t interval, or [low, high] where that is cut at the
    metric's bounds. A dash stands for what is not known.

    An arm is compared with the first of its granularity, and that with the first of all. Where
    there is one arm of a protocol or one seed, nothing is.
    """
    rows, shown = last_epoch(rows), drawn_metrics(metrics)
    places = {metric.name: _places(rows, metric) for metric in shown}
    found, compared = [], []
    for protocol in dict.fromkeys(row.protocol for row in rows):
        arms = list(dict.fromkeys(row.arm for row in rows if row.protocol == protocol))
        for family in dict.fromkeys((arm.criterion, arm.scope) for arm in arms):
            own = [arm for arm in arms if (arm.criterion, arm.scope) == family]
            levels, differences = {}, {}
            for arm in own:
                here = [row for row in rows if row.arm == arm]
                for metric in shown:
                    head = arm.granularity, f"{metric.name} {metric.unit}".rstrip()
                    levels[head] = _cells(here, metric, places[metric.name])
                levels[arm.granularity, "weights"] = _weights(here)
                first = next(other for other in arms if other.granularity == arm.granularity)
                base = arms[0] if first == arm else first
                if base != arm and shown:
                    head = f"minus {' '.join(a for a, b in zip(base, arm, strict=True) if a != b)}"
                    pair = [row for row in rows if row.arm in (arm, base)]
                    differences[arm.granularity, head] = _compared(
                        pair, arm, base, shown[0], places[shown[0].name]
                    )
            title, seeds = ", ".join((protocol, *family)), {row.seed for row in rows}
            found.append(_table(title, rows, own, levels))
            if differences and len(seeds) > 1:
                what = f"{shown[0].name} {shown[0].unit}".rstrip() + ": paired differences, "
                compared.append(_table(title, rows, own, differences, what))
    return found + compared


def text(table: Table) -> str:
    """Lay out a table for a terminal: the title, the headings and the lines, aligned."""
    headings = [heading for heading, _ in table.columns]
    heads = [name if at == headings.index(name) else "" for at, name in enumerate(headings)]
    cells = [heads, [name for _, name in table.columns], *table.lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.rjust, line, widths)).rstrip() for line in cells]
    return "\n".join([table.title, *lines])


def _table(
    title: str,
    rows: Sequence[Row],
    arms: Sequence[Arm],
    columns: Mapping[tuple[str, str], Mapping[float, str]],
    what: str = "",
) -> Table:
    """Lay out a line a level, of columns of cells by level."""
    own = [row for row in rows if row.arm in arms]
    seeds = len({row.seed for row in own})
    over = {1: "one seed", 2: "both seeds"}
    over = over.get(seeds, f"mean ± 95% interval over {seeds} seeds")
    lines = [
        [f"{100 * level:.10g}", *(cells.get(level, "-") for cells in columns.values())]
        for level in sorted({row.target_sparsity for row in own})
    ]
    title = f"{title}, epoch {rows[0].epoch}, {what}{over}"
    return Table(title, [("", "pruned %"), *columns], lines)


def _by_level(rows: Sequence[Row], cell: Callable[[list[Row]], str]) -> dict[float, str]:
    """Return a cell a level; of networks that diverged how many, or a mean would look too good."""
    by_level: dict[float, list[Row]] = defaultdict(list)
    for row in rows:
        by_level[row.target_sparsity].append(row)
    cells = {}
    for level, here in by_level.items():
        gone = sum(row.diverged for row in here)
        many = "diverged" if gone == len(here) else f"{gone}/{len(here)} diverged"
        cells[level] = many if gone else cell(here)
    return cells


def _cells(rows: Sequence[Row], metric: Metric, places: int) -> dict[float, str]:
    def cell(here: list[Row]) -> str:
        values = [row.metrics.get(metric.name) for row in here]
        return _interval([value for value in values if value is not None], metric, places)

    return _by_level(rows, cell)


def _weights(rows: Sequence[Row]) -> dict[float, str]:
    by_level = defaultdict(list)
    for row in rows:
        if row.remaining is not None:
            by_level[row.target_sparsity].append(row.remaining)
    return {level: f"{statistics.fmean(left):,.0f}" for level, left in by_level.items()}


def _compared(
    rows: Sequence[Row], arm: Arm, other: Arm, metric: Metric, places: int
) -> dict[float, str]:
    low, high = metric.low, metric.high
    width = math.inf if low is None or high is None else high - low
    of_pairs, pairs = metric._replace(low=-width, high=width), paired(rows, arm, other, metric.name)

    def cell(here: list[Row]) -> str:
        return _interval(pairs.get(here[0].target_sparsity, []), of_pairs, places, "+")

    return _by_level(rows, cell)


def _interval(known: Sequence[int | float], metric: Metric, places: int, sign: str = "") -> str:
    """Return the mean, in the unit shown, and how it varies: see `tables`."""
    if not known:
        return "-"
    scale = 100 if metric.unit == "%" else 1
    values = [scale * value for value in known]
    mean, half = mean_interval(values)
    start = f"{mean:{sign}.{places}f}"
    if half is None:
        return start
    if len(values) == 2:
        return ", ".join(f"{value:{sign}.{places}f}" for value in values)
    low = -math.inf if metric.low is None else scale * metric.low
    high = math.inf if metric.high is None else scale * metric.high
    if low <= mean - half and mean + half <= high:
        return f"{start} ± {half:.{places}f}"
    return f"{start} [{max(mean - half, low):.{places}f}, {min(mean + half, high):.{places}f}]"


def _places(rows: Sequence[Row], metric: Metric) -> int:
    """Return the decimals of a metric: 2 of percent, else for three digits of a usual value."""
    if metric.unit == "%":
        return 2
    sizes = [abs(row.metrics.get(metric.name) or 0) for row in rows]
    exponent = math.floor(math.log10(statistics.median(filter(None, sizes)))) if any(sizes) else 0
    return min(max(3 - exponent - (exponent < 0), 0), 8)
