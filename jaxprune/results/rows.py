"""Rows, and the files that hold them so that no change to them goes unseen. Imports no jax.

A row comes in for every network that was scored. `append_rows` adds it to the log of its arm and
seed, which survives a kill; `write_csv` exports all rows. Every line ends with a digest of the line
before it and of itself: a flipped bit, a lost line and another order are found on reading.
"""

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxprune import files
from jaxprune.config import Arm


@dataclasses.dataclass(frozen=True)
class Row:
    """One network, scored on test examples.

    The first four fields are its arm. `epoch` is 0 of a network trained elsewhere.
    `target_sparsity` is the level as a fraction, `sparsity` the fraction of the prunable weights
    that is zero, `total_sparsity` of all; `remaining` are the parameters left once what pruning
    leaves without effect is removed, None where that is not known. `metrics` are the task's, by
    name: finite numbers, None where not defined, or short lists of these; `val_loss` is None where
    training diverged. Seconds are of this epoch: the wall time of all levels that ran together,
    divided by their number, without compilation; 0 in rows of the dense network, whose time all
    arms share (`config.json` has it).

    Raises:
        ValueError: a field is of another kind or out of its range.
    """

    criterion: str
    granularity: str
    scope: str
    protocol: str
    seed: int
    epoch: int
    target_sparsity: float
    sparsity: float
    total_sparsity: float
    remaining: int | None
    metrics: dict[str, Any]
    train_seconds: float
    mask_seconds: float
    eval_seconds: float

    def __post_init__(self) -> None:
        """Check every field."""
        for name, (fits, words) in _CHECKS.items():
            if not fits(value := getattr(self, name)):
                raise ValueError(f"{name} must be {words}, got {value!r:.60}")

    @property
    def arm(self) -> Arm:
        """The arm it belongs to."""
        return Arm(self.criterion, self.granularity, self.scope, self.protocol)

    @property
    def diverged(self) -> bool:
        """Whether its validation loss was not finite; other metrics then mean nothing."""
        return self.metrics.get("val_loss", 0.0) is None


_FIELDS = tuple(field.name for field in dataclasses.fields(Row))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and abs(value) < math.inf


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and type(value) is not bool and value >= 0


def _are_metrics(metrics: Any) -> bool:
    if not isinstance(metrics, dict) or {*metrics} & {*_FIELDS, "digest"}:
        return False
    values = itertools.chain(*(v if isinstance(v, list) else [v] for v in metrics.values()))
    return all(isinstance(name, str) for name in metrics) and all(
        value is None or _is_number(value) for value in values
    )


_TEXT = lambda value: isinstance(value, str), "a text"
_COUNT = _is_count, "a whole number of at least 0"
_FRACTION = lambda value: _is_number(value) and 0 <= value <= 1, "a fraction in [0, 1]"
_SECONDS = lambda value: _is_number(value) and value >= 0, "a number of at least 0"
_CHECKS = {
    **dict.fromkeys(_FIELDS[:4], _TEXT),
    **dict.fromkeys(_FIELDS[4:6], _COUNT),
    **dict.fromkeys(_FIELDS[6:9], _FRACTION),
    "remaining": (lambda value: value is None or _is_count(value), f"None or {_COUNT[1]}"),
    "metrics": (_are_metrics, "finite numbers, None or lists of these, named unlike the fields"),
    **dict.fromkeys(_FIELDS[11:], _SECONDS),
}
_WRONG = (TypeError, KeyError, ValueError, RecursionError, csv.Error)  # of a line that is no row


class Log(NamedTuple):
    """What a log holds up to the first line that is not what was written.

    Attributes:
        rows: the good rows.
        digest: the last one's, on which `append_rows` goes on.
        valid_bytes: how long the file is up to there.
        problem: which line is wrong, and how; None where all are good.
        torn: whether that line is the last and was cut off, as by a kill.
    """

    rows: list[Row]
    digest: str
    valid_bytes: int
    problem: str | None
    torn: bool


def first_digest(identity: str, seed: int) -> str:
    """Return what stands before the first line of a log; `identity` is the arm's, as recorded."""
    return f"{identity}-{seed}"


def append_rows(path: Path, rows: Sequence[Row], digest: str) -> str:
    """Add rows to a log, a line each, and return its new last digest.

    They are on disk when this returns. `digest` is the log's last, or `first_digest`.

    Raises:
        OSError: they cannot be written; a torn line may be left, which `read_log` finds.
    """
    with path.open("ab") as file:
        for row in rows:
            line, digest = _line(row, digest)
            file.write(line)
        file.flush()
        os.fsync(file.fileno())
    return digest


def read_log(path: Path, digest: str) -> Log:
    """Read the log of an arm and seed, up to the first line that is not what was written.

    Args:
        path: the log; one that does not exist is empty.
        digest: the `first_digest` of the arm and seed; with another, the first line is wrong.
    """
    rows, valid = [], 0
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        reason = "changed since it was written, or of another run"
        try:
            fields = json.loads(line)
            del fields["digest"]
            again, after = _line(row := Row(**fields), digest)
        except _WRONG as error:
            again, reason = b"", _no_row(error)
        if line != again:
            torn = number == len(lines) and not line.endswith(b"\n")
            problem = f"line {number}: {'cut off' if torn else reason}"
            return Log(rows, digest, valid, problem, torn)
        rows.append(row)
        digest, valid = after, valid + len(line)
    return Log(rows, digest, valid, None, False)


def cut_log(path: Path, log: Log) -> None:
    """Cut a log before the line that is wrong; the file is on disk when this returns."""
    with path.open("r+b") as file:
        file.truncate(log.valid_bytes)
        os.fsync(file.fileno())


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as CSV, all or nothing: a column a field and a metric, and the digest.

    None is an empty cell, and so is a metric that only other rows have; a list is JSON.
    """
    metrics = dict.fromkeys(name for row in rows for name in row.metrics)
    files.write(path, _to_csv(rows, list(metrics)))


def read_csv(path: Path) -> list[Row]:
    """Read what `write_csv` wrote, exactly.

    Raises:
        ValueError: a line is not what was written; the message names the first.
    """
    rows: list[Row] = []
    written = path.read_bytes()
    table = csv.DictReader(io.StringIO(written.decode(errors="replace"), newline=""))
    try:
        metrics = [name for name in table.fieldnames or () if name not in (*_FIELDS, "digest")]
        rows += (_from_cells(cells, metrics) for cells in table)
    except _WRONG as error:
        raise ValueError(f"{path}, line {table.line_num}: {_no_row(error)}") from error
    again = _to_csv(rows, metrics).encode().splitlines(keepends=True)
    pairs = itertools.zip_longest(written.splitlines(keepends=True), again)
    for number, (line, right) in enumerate(pairs, 1):
        if line != right:
            raise ValueError(f"{path}, line {number}: changed since it was written")
    return rows


def _line(row: Row, digest: str) -> tuple[bytes, str]:
    """Return the line of a row in a log, and the digest at its end."""
    body = json.dumps(vars(row), allow_nan=False)
    digest = hashlib.sha256((digest + body).encode()).hexdigest()[:16]
    return f'{body[:-1]}, "digest": "{digest}"}}\n'.encode(), digest


def _to_csv(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    at, text = _FIELDS.index("metrics"), io.StringIO()
    columns = [*_FIELDS[:at], *metrics, *_FIELDS[at + 1 :], "digest"]
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    digest = " ".join(columns)
    for row in rows:
        own = {name: row.metrics.get(name) for name in metrics}
        _, digest = _line(dataclasses.replace(row, metrics=own), digest)
        cells = vars(row) | own | {"digest": digest}
        table.writerow(
            json.dumps(cell) if isinstance(cell, list) else cell for cell in map(cells.get, columns)
        )
    return text.getvalue()


def _from_cells(cells: dict[str, Any], metrics: Sequence[str]) -> Row:
    fields = {
        name: text if _CHECKS.get(name) is _TEXT else json.loads(text or "null")
        for name, text in cells.items()
        if name != "digest"
    }
    return Row(metrics={name: fields.pop(name) for name in metrics}, **fields)


def _no_row(error: Exception) -> str:
    return f"not a row of results ({' '.join(str(error).split())[:100]})"
