"""Rows in; means with intervals, paired differences and tables out. Imports no jax.

The `text` of the tables is what a sweep prints, and `report` renders the same tables.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxprune.config import Arm
from jaxprune.results.rows import Row

if TYPE_CHECKING:
    from jaxprune.types import Metric
else:
    Metric = Any  # `types` imports jax

_ByCell = dict[tuple[Arm, float], list[Row]]


class Table(NamedTuple):
    """A title of one line; (group, name) of every column; and lines of as many cells."""

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


def spread(
    values: Sequence[int | float], metric: Metric
) -> tuple[float, float | None, float | None]:
    """Return the mean and the ends of its 95% interval, in the unit shown: % a hundredfold.

    A t interval knows no bounds: it is cut where the metric has one. For one value ends are None.
    """
    scale = 100 if metric.unit == "%" else 1
    mean, half = mean_interval([scale * value for value in values])
    if half is None:
        return mean, None, None
    low = -math.inf if metric.low is None else float(scale * metric.low)
    high = math.inf if metric.high is None else float(scale * metric.high)
    return mean, max(mean - half, low), min(mean + half, high)


def difference(
    rows: Sequence[Row], arm: Arm, other: Arm, level: int | float, metric: Metric | str
) -> tuple[float, float | None]:
    """Return by how much an arm's metric is above another's after the last epoch.

    Args:
        rows: of one study.
        arm: which.
        other: what it is compared with.
        level: as a fraction, as rows have it.
        metric: one of its metrics, or the name of one.

    Returns:
        The mean of the seeds' differences and half its 95% interval; None for one seed.

    Raises:
        ValueError: no seed has the metric for both arms.
    """
    name = metric if isinstance(metric, str) else metric.name
    by_cell = _last_epoch(rows)
    pairs = _paired(by_cell.get((arm, level), []), by_cell.get((other, level), []), name)
    if not pairs:
        raise ValueError(f"no seed has {name} of both {arm} and {other} at {100 * level:.10g}%")
    return mean_interval(pairs)


def tables(rows: Sequence[Row], metrics: Sequence[Metric]) -> list[Table]:
    """Lay out the last epoch: a table a protocol, then one of paired differences a protocol.

    A line is a level. Of each arm it has the two metrics that are drawn and the weights that
    remain: the mean over the seeds ± half its 95% interval, or [low, high] where that is cut at the
    metric's bounds. A dash stands for the interval of one seed, and for what is not known.

    An arm is compared with the first of its granularity, and that with the first of all. Where
    there is one arm or one seed, nothing is.
    """
    by_cell = _last_epoch(rows)
    shown = [metric for metric in metrics if metric.drawn][:2] or metrics[:2]
    places = {metric.name: _places(by_cell, metric) for metric in shown}
    found, compared = [], []
    for protocol in dict.fromkeys(arm.protocol for arm, _ in by_cell):
        arms = list(dict.fromkeys(arm for arm, _ in by_cell if arm.protocol == protocol))
        shared, labels = _labels(arms)
        columns: dict[tuple[str, str], Callable[[float], str]] = {}
        for arm, label in zip(arms, labels, strict=True):
            for m in shown:
                columns[label, _head(m)] = partial(_cell, by_cell, arm, m, places[m.name])
            columns[label, "weights"] = partial(_weights, by_cell, arm)
        found.append(_table(by_cell, arms, shared, "mean ± 95% interval", columns))
        if len(arms) == 1 or not shown or len({row.seed for row in rows}) == 1:
            continue
        columns, m = {}, shown[0]
        for i, arm in enumerate(arms[1:], 1):
            first = next(j for j in range(i + 1) if arms[j].granularity == arm.granularity)
            base = first if first < i else 0
            columns[labels[i], f"minus {labels[base]}"] = partial(
                _compared, by_cell, arm, arms[base], m, places[m.name]
            )
        what = f"{_head(m)}: paired differences ± 95% interval"
        compared.append(_table(by_cell, arms, shared, what, columns))
    return found + compared


def text(table: Table) -> str:
    """Lay out a table for a terminal: the title, the headings and the lines, aligned."""
    groups = [group for group, _ in table.columns]
    heads = [group if at == groups.index(group) else "" for at, group in enumerate(groups)]
    cells = [heads, [name for _, name in table.columns], *table.lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.rjust, line, widths)).rstrip() for line in cells]
    return "\n".join([table.title, *lines])


def _table(
    by_cell: _ByCell, arms: Sequence[Arm], shared: Sequence[str], what: str,
    columns: dict[tuple[str, str], Callable[[float], str]],
) -> Table:  # fmt: skip
    """Lay out one protocol: a line a level, a column of what each function says of it."""
    rows = [row for arm, level in by_cell if arm in arms for row in by_cell[arm, level]]
    seeds = len({row.seed for row in rows})
    title = arms[0].protocol + (f" ({', '.join(shared)})" if shared else "")
    over = "one seed" if seeds == 1 else f"{what} over {seeds} seeds"
    lines = [
        [f"{100 * level:.10g}", *(cell(level) for cell in columns.values())]
        for level in sorted({row.target_sparsity for row in rows})
    ]
    return Table(f"{title}, epoch {rows[0].epoch}, {over}", [("", "pruned %"), *columns], lines)


def _last_epoch(rows: Sequence[Row]) -> _ByCell:
    """Return the rows of the last epoch by arm and level."""
    last = max((row.epoch for row in rows), default=0)
    by_cell: _ByCell = {}
    for row in rows:
        if row.epoch == last:
            by_cell.setdefault((row.arm, row.target_sparsity), []).append(row)
    return by_cell


def _labels(arms: Sequence[Arm]) -> tuple[list[str], list[str]]:
    """Return what arms share of criterion and scope, and what each is called beside the others."""
    varied = [name for name in ("criterion", "scope") if len({getattr(a, name) for a in arms}) > 1]
    shared = [getattr(arms[0], name) for name in ("criterion", "scope") if name not in varied]
    own = [name for name in Arm._fields if name in ("granularity", *varied)]
    return shared, [" ".join(getattr(arm, name) for name in own) for arm in arms]


def _head(metric: Metric) -> str:
    return f"{metric.name} {metric.unit}".rstrip()


def _cell(by_cell: _ByCell, arm: Arm, metric: Metric, places: int, level: float) -> str:
    rows = by_cell.get((arm, level), [])
    known = [value for row in rows if (value := row.metrics.get(metric.name)) is not None]
    return _diverged(rows) or _interval(known, metric, places)


def _compared(
    by_cell: _ByCell, arm: Arm, other: Arm, metric: Metric, places: int, level: float
) -> str:
    ours, theirs = by_cell.get((arm, level), []), by_cell.get((other, level), [])
    low, high = metric.low, metric.high
    width = math.inf if low is None or high is None else high - low
    of_pairs = metric._replace(low=-width, high=width)
    pairs = _paired(ours, theirs, metric.name)
    return _diverged([*ours, *theirs]) or _interval(pairs, of_pairs, places, "+")


def _weights(by_cell: _ByCell, arm: Arm, level: float) -> str:
    left = [row.remaining for row in by_cell.get((arm, level), []) if row.remaining is not None]
    return f"{mean_interval(left)[0]:,.0f}" if left else "-"


def _diverged(rows: Sequence[Row]) -> str:
    """Say how many diverged: a mean over the others would look too good."""
    gone = sum(row.diverged for row in rows)
    return "" if not gone else "diverged" if gone == len(rows) else f"{gone}/{len(rows)} diverged"


def _interval(known: Sequence[int | float], metric: Metric, places: int, sign: str = "") -> str:
    if not known:
        return "-"
    mean, low, high = spread(known, metric)
    start = f"{mean:{sign}.{places}f}"
    if low is None or high is None:
        return start  # one seed, as the title says
    if math.isclose(mean - low, high - mean, rel_tol=1e-6, abs_tol=1e-12):
        return f"{start} ± {high - mean:.{places}f}"
    return f"{start} [{low:.{places}f}, {high:.{places}f}]"


def _paired(rows: Sequence[Row], others: Sequence[Row], name: str) -> list[int | float]:
    """Return the differences of a metric, a number a seed that both have."""
    theirs = {row.seed: row.metrics.get(name) for row in others}
    pairs = [(row.metrics.get(name), theirs.get(row.seed)) for row in rows]
    return [ours - other for ours, other in pairs if ours is not None and other is not None]


def _places(by_cell: _ByCell, metric: Metric) -> int:
    """Return the decimals of a metric: 2 of percent, else for three digits of a usual value."""
    if metric.unit == "%":
        return 2
    sizes = [abs(row.metrics.get(metric.name) or 0) for rows in by_cell.values() for row in rows]
    exponent = math.floor(math.log10(statistics.median(filter(None, sizes)))) if any(sizes) else 0
    return min(max(3 - exponent - (exponent < 0), 0), 8)
