"""Rows in; means with intervals, paired differences and tables out. Imports no jax.

The `text` of the tables is what a sweep prints, and `report` renders the same tables.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxprune.config import Arm
from jaxprune.results.rows import Row

if TYPE_CHECKING:
    from jaxprune.types import Metric
else:
    Metric = Any  # `types` imports jax

_Cells = dict[Arm, dict[float, list[Row]]]
_WIDTH = 100  # of a terminal, in characters


class Table(NamedTuple):
    """A title of one line; (heading, name) of every column; and lines of as many cells."""

    title: str
    columns: list[tuple[str, str]]
    lines: list[list[str]]


def mean_interval(values: Sequence[int | float]) -> tuple[float, float | None]:
    """Return the mean and half the width of its 95% Student t interval.

    It is None for fewer than three values: that of two is 12.7 times as wide as they are apart.
    """
    from scipy.special import stdtrit

    if (n := len(values)) == 0:
        raise ValueError("mean_interval needs at least one value, got none")
    if n < 3:
        return statistics.fmean(values), None
    half = float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n)
    return statistics.fmean(values), half


def spread(
    values: Sequence[int | float], metric: Metric
) -> tuple[float, float | None, float | None]:
    """Return the mean and the ends of its 95% interval, None for fewer than three values.

    A t interval knows no bounds: it is cut where the metric has one.
    """
    mean, half = mean_interval(values)
    if half is None:
        return mean, None, None
    low = -math.inf if metric.low is None else metric.low
    high = math.inf if metric.high is None else metric.high
    return mean, max(mean - half, low), min(mean + half, high)


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


def of_difference(metric: Metric) -> Metric:
    """Return what holds of a metric's differences: their bounds, and that no guess is known."""
    if metric.low is None or metric.high is None:
        return metric._replace(low=None, high=None, chance=None)
    width = metric.high - metric.low
    return metric._replace(low=-width, high=width, chance=None)


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
        The mean of the seeds' differences and half its 95% interval; None for fewer than three.

    Raises:
        ValueError: no seed has the metric for both arms.
    """
    pairs = paired(last_epoch(rows), arm, other, metric).get(level)
    if not pairs:
        raise ValueError(f"no seed has {metric} of both {arm} and {other} at {100 * level:.10g}%")
    return mean_interval(pairs)


def tables(rows: Sequence[Row], metrics: Sequence[Metric]) -> list[Table]:
    """Lay out the last epoch: a table a protocol of all arms, then one of their paired differences.

    A line is of a level. Of each arm there are the two metrics that are drawn and the weights
    remaining after compaction. Of two seeds both values are given, of more their mean ± half its
    95% t interval (of weights the mean), or [low, high] where that is cut at the metric's bounds. A
    dash stands for what is not known.

    An arm is compared with the first of its granularity, and that with the first of all. Where
    there is one arm of a protocol or one seed, nothing is.
    """
    rows, shown = sorted(last_epoch(rows), key=lambda row: row.seed), drawn_metrics(metrics)
    places = {metric.name: decimals(rows, metric) for metric in shown}
    cells: _Cells = {}
    for row in rows:
        cells.setdefault(row.arm, {}).setdefault(row.target_sparsity, []).append(row)
    found, compared = [], []
    for protocol in dict.fromkeys(arm.protocol for arm in cells):
        arms = [arm for arm in cells if arm.protocol == protocol]
        own = {
            arm: cells[arm]
            for name in dict.fromkeys(arm.granularity for arm in arms)
            for arm in arms
            if arm.granularity == name
        }
        common, heads = _heads([*own])
        title = f"{', '.join((protocol, *common))}, epoch {rows[0].epoch}"
        by_level, differences = {}, {}
        for arm, levels in own.items():
            for metric in shown:
                by_level[heads[arm], _head(metric)] = {
                    level: cell(here, metric, places[metric.name]) for level, here in levels.items()
                }
            by_level[heads[arm], "remaining"] = {k: _weights(levels[k]) for k in levels}
            first = next(other for other in own if other.granularity == arm.granularity)
            base = next(iter(own)) if first == arm else first
            if base != arm and shown:
                metric, pairs = of_difference(shown[0]), paired(rows, arm, base, shown[0].name)
                head = f"minus {' '.join(a for a, b in zip(base, arm, strict=True) if a != b)}"
                differences[heads[arm], head] = {
                    level: _diverged([*here, *cells[base].get(level, [])])
                    or _cell(pairs.get(level, []), metric, places[metric.name], "+")
                    for level, here in levels.items()
                }
        found.append(_table(title, own, by_level))
        if differences and len({row.seed for row in rows}) > 1:
            title += f", {_head(shown[0])}: paired differences"
            compared.append(_table(title, own, differences))
    return found + compared


def _heads(arms: Sequence[Arm]) -> tuple[list[str], dict[Arm, str]]:
    """Return criterion and scope, where all arms have the same; and what names each among them."""
    varies = {name for name in ("criterion", "scope") if len({getattr(a, name) for a in arms}) > 1}
    common = [getattr(arms[0], name) for name in ("criterion", "scope") if name not in varies]
    names = ("granularity", *(name for name in ("criterion", "scope") if name in varies))
    return common, {arm: " ".join(getattr(arm, name) for name in names) for arm in arms}


def text(table: Table) -> str:
    """Lay out a table for a terminal: the title, the headings and the lines, aligned.

    What is too wide goes on below, with the first column again; columns of one heading stay
    together.
    """
    first, *others = zip(*zip(*table.columns, strict=True), *table.lines, strict=True)
    blocks = [[first]]
    for _, same in groupby(others, key=lambda column: column[0]):
        begin, *more = same
        part = [begin, *(("", *column[1:]) for column in more)]
        wide = sum(2 + max(map(len, column)) for column in blocks[-1] + part) - 2 > _WIDTH
        if wide and len(blocks[-1]) > 1:
            blocks.append([first])
        blocks[-1] += part
    laid = []
    for block in blocks:
        widths = [max(map(len, column)) for column in block]
        lines = zip(*block, strict=True)
        laid.append("\n".join("  ".join(map(str.rjust, line, widths)).rstrip() for line in lines))
    return f"{table.title}\n" + "\n\n".join(laid)


def _table(
    title: str, cells: _Cells, columns: Mapping[tuple[str, str], Mapping[float, str]]
) -> Table:
    """Lay out a line a level; `cells` are the rows that all columns are of."""
    seeds = len({row.seed for levels in cells.values() for rows in levels.values() for row in rows})
    over = {1: "one seed", 2: "both seeds"}
    over = over.get(seeds, f"mean ± 95% interval over {seeds} seeds")
    lines = [
        [f"{100 * level:.10g}", *(column.get(level, "-") for column in columns.values())]
        for level in sorted({level for levels in cells.values() for level in levels})
    ]
    return Table(f"{title}, {over}", [("", "pruned %"), *columns], lines)


def _head(metric: Metric) -> str:
    return f"{metric.name} {metric.unit}".rstrip()


def _known(rows: Sequence[Row], metric: Metric) -> list[float]:
    return [value for row in rows if (value := row.metrics.get(metric.name)) is not None]


def cell(rows: Sequence[Row], metric: Metric, places: int) -> str:
    """Return a cell of rows that differ by their seed alone, as of `tables`.

    Args:
        rows: by seed.
        metric: which.
        places: decimals, as `decimals` returns them.
    """
    return _diverged(rows) or _cell(_known(rows, metric), metric, places)


def _cell(known: Sequence[float], metric: Metric, places: int, sign: str = "") -> str:
    """Return the mean and its interval, or the values of fewer than three, in the unit shown."""
    scale, digits = 100 if metric.unit == "%" else 1, f".{places}f"
    if len(known) < 3:
        return ", ".join(f"{scale * value:{sign}{digits}}" for value in known) or "-"
    mean, low, high = (scale * value for value in spread(known, metric) if value is not None)
    if math.isclose(mean - low, high - mean, rel_tol=1e-6, abs_tol=1e-12):
        return f"{mean:{sign}{digits}} ± {high - mean:{digits}}"
    return f"{mean:{sign}{digits}} [{low:{digits}}, {high:{digits}}]"


def _weights(rows: Sequence[Row]) -> str:
    left = [row.remaining for row in rows if row.remaining is not None]
    shown = [statistics.fmean(left)] if len(left) > 2 else dict.fromkeys(left)
    return ", ".join(f"{size:,.0f}" for size in shown) or "-"


def _diverged(rows: Sequence[Row]) -> str:
    """Say how many diverged: a mean over the others would look too good."""
    gone = sum(row.diverged for row in rows)
    return "" if not gone else "diverged" if gone == len(rows) else f"{gone}/{len(rows)} diverged"


def decimals(rows: Sequence[Row], metric: Metric) -> int:
    """Return the decimals of a metric: 2 of percent, else for three digits of a usual value."""
    if metric.unit == "%":
        return 2
    sizes = [size for value in _known(rows, metric) if (size := abs(value))]
    exponent = math.floor(math.log10(statistics.median(sizes))) if sizes else 0
    return min(max(3 - exponent - (exponent < 0), 0), 8)
