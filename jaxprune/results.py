"""Results: the row, the log of rows, the table, and the directory of a run.

Metrics come in as rows of plain numbers; what goes out is `results.jsonl`, which grows row by row
and survives a kill, its export `results.csv`, the table at the end of a sweep, and `load_run` for
analysis. Figures come next. Rows are read without jax.

A run directory holds `config.json`, `results.jsonl`, `results.csv`, `figures/` and
`checkpoints/`, in which `dense-seed0/0020` (items `params`, `opt_state`, and at the last epoch
`one_shot`: masks, a method a key) and `trained-weight-seed0/0020` (items `params`, `masks`,
`opt_state`) are checkpoints of seed 0 after 20 epochs. But for the dense items, leaves have a
leading axis over the levels other than 0, in the order of the config.
"""

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxprune import files

if TYPE_CHECKING:  # they import jax
    from jaxprune.types import Masks, Params


@dataclasses.dataclass(frozen=True)
class Row:
    """One network, scored on test examples; temperature and `val_…` are of validation examples.

    `protocol` is `one_shot` or `trained`; `method`, weight or unit, is what is pruned as one;
    `criterion` names the scores that decide, `scope` what competes: a layer or all (`global`).
    `sparsity` is the fraction of the prunable weights that is zero, `total_sparsity` of all;
    `remaining` are the weights left once pruned units are removed with their outgoing weights.
    Fractions are in [0, 1] and losses in nats. `signed_ece` is positive for the over-confident,
    `scaled_loss` the loss of logits / temperature, `churn` the share of predictions unlike those
    of the dense network of the same seed and epoch. Seconds are of this epoch: the wall time of all
    levels that ran together, divided by their number, in a sweep without compilation; 0 in rows of
    the dense network, whose time all methods share (`config.json` has it). None stands for what is
    not known or not defined.
    """

    protocol: str
    criterion: str
    method: str
    scope: str
    seed: int
    epoch: int
    target_sparsity: float
    sparsity: float
    total_sparsity: float
    remaining: int | None
    accuracy: float | None
    loss: float | None
    ece: float | None
    signed_ece: float | None
    temperature: float | None
    scaled_loss: float | None
    churn: float | None
    class_accuracy: list[float | None]
    worst_class_accuracy: float | None
    val_accuracy: float | None
    val_loss: float | None
    train_seconds: float
    mask_seconds: float
    eval_seconds: float


_FIELDS = tuple(field.name for field in dataclasses.fields(Row))
_TEXTS = ("protocol", "criterion", "method", "scope")


class Network(NamedTuple):
    """The parameters as trained, and the masks to apply; NumPy arrays.

    A pruned network is `apply_masks(params, masks)`. Trained ones have zeros there already; those
    of `one_shot` are the dense network's.
    """

    params: "Params"
    masks: "Masks"


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a log, a JSON object a line; they are on disk when this returns."""
    with path.open("a") as file:
        file.write(_to_lines(rows))
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """Read the log; a last line that was torn by a kill is left out (`rewrite_rows` ends it).

    Raises:
        ValueError: another line is not a row; the message names it.
    """
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(Row(**json.loads(line)))
        except (TypeError, ValueError) as error:
            if number < len(lines) or isinstance(error, TypeError):
                raise ValueError(f"{path}, line {number}: not a row of results") from error
    return rows


def rewrite_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace the log by these rows, all or nothing."""
    files.write(path, _to_lines(rows))


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as CSV: a column a field, None as an empty cell, `class_accuracy` as JSON."""
    text = io.StringIO()
    cells = csv.DictWriter(text, _FIELDS, lineterminator="\n")
    cells.writeheader()
    for row in rows:
        for name, value in (fields := dataclasses.asdict(row)).items():
            if name not in _TEXTS:
                fields[name] = "" if value is None else json.dumps(value)
        cells.writerow(fields)
    files.write(path, text.getvalue())


def read_csv(path: Path) -> list[Row]:
    """Read what `write_csv` wrote, exactly.

    Raises:
        ValueError: a column is missing or unknown, or a cell is not a number.
    """
    rows = []
    with path.open(newline="") as file:
        cells = csv.DictReader(file)
        for line in cells:
            try:
                fields: dict[str, Any] = {
                    name: text if name in _TEXTS else json.loads(text or "null")
                    for name, text in line.items()
                }
                rows.append(Row(**fields))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {cells.line_num}: not a row of results") from error
    return rows


def write_json_atomic(path: Path, data: Any) -> None:
    """Write indented JSON, all or nothing."""
    files.write(path, json.dumps(data, indent=2) + "\n")


def read_config(path: Path) -> dict[str, Any]:
    """Read a `config.json`.

    Raises:
        ValueError: it is not JSON, or holds no `settings`.
    """
    with contextlib.suppress(ValueError):
        config = json.loads(path.read_bytes())
        if isinstance(config, dict) and isinstance(config.get("settings"), dict):
            return config
    raise ValueError(f"{path} is not the config of a run")


def compare_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return a line for every setting that differs: 'levels: 0 25 50 in the run, 0 90 now'."""
    return [
        f"{name}: {_words(old.get(name))} in the run, {_words(new.get(name))} now"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]


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


def table(rows: Sequence[Row]) -> str:
    """Lay out the last epoch as text: a block a protocol, a line a level, columns for each method.

    Accuracy is in percent, loss in nats, `weights` what remains, with the mean over the seeds and
    its 95% interval. A dash stands for the interval of one seed, and for what is not known.
    """
    last = max((row.epoch for row in rows), default=0)
    rows = [row for row in rows if row.epoch == last]
    blocks: dict[Any, list[Row]] = {}
    for row in rows:
        blocks.setdefault((row.protocol, row.criterion, row.scope), []).append(row)
    return "\n\n".join(map(_block, blocks.values()))


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory, read: its config, its rows, and on demand its networks."""

    path: Path
    config: dict[str, Any]
    rows: list[Row]

    def network(self, protocol: str, method: str, seed: int, level: int | float) -> Network:
        """Read one network after the last epoch.

        Args:
            protocol: `one_shot` or `trained`.
            method: `weight` or `unit`.
            seed: which run of training.
            level: in percent, one of the run's; 0 is the dense network, for any protocol and
                method.

        Raises:
            ValueError: the run has no such network, or its checkpoint is corrupt.
        """
        import jax

        settings = self.config["settings"]
        for name, value, choices in (
            ("protocol", protocol, settings["protocols"]),
            ("method", method, settings["methods"]),
            ("seed", seed, _distinct(row.seed for row in self.rows)),
            ("level", level, settings["levels"]),
        ):
            if value not in choices:
                raise ValueError(f"{self.path} has no {name} {value}: it has {_words(choices)}")
        dense, trained = f"dense-seed{seed}", f"trained-{method}-seed{seed}"
        if level == 0:
            params = self._load(dense, "params")
            return Network(params, jax.tree.map(lambda w: np.ones(w.shape, bool), params))
        index = [other for other in settings["levels"] if other != 0].index(level)

        def cut(stacked: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf[index].copy(), stacked)

        if protocol == "one_shot":
            masks = self._load(dense, "one_shot")[method]
            return Network(self._load(dense, "params"), cut(masks))
        return Network(cut(self._load(trained, "params")), cut(self._load(trained, "masks")))

    def _load(self, group: str, item: str) -> Any:
        from jaxprune import checkpoints

        path = self.path / "checkpoints" / group / f"{self.config['settings']['epochs']:04d}"
        if not (self.path / "checkpoints").is_dir():
            raise ValueError(f"{self.path} holds rows alone: checkpoints stay in the run directory")
        if not path.is_dir():
            raise ValueError(f"{path} does not exist: the run is not finished")
        return checkpoints.load(path, item)


def load_run(path: Path | str) -> Run:
    """Open a run directory; a `figures` directory, with rows but no networks, will do too.

    Raises:
        ValueError: it does not exist, or is not a run's.

    Example:
        >>> load_run("runs/none")
        Traceback (most recent call last):
        ValueError: runs/none is not a directory
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory")
    if not (path / "config.json").exists():
        raise ValueError(f"{path} is not a run: it holds no config.json")
    rows = []
    if (path / "results.jsonl").exists():
        rows = read_rows(path / "results.jsonl")
    elif (path / "results.csv").exists():
        rows = read_csv(path / "results.csv")
    return Run(path, read_config(path / "config.json"), rows)


def _block(rows: Sequence[Row]) -> str:
    """Lay out the rows of one protocol: a line a level, three columns a method."""
    methods = _distinct(row.method for row in rows)
    seeds = len({row.seed for row in rows})
    over = "one seed" if seeds == 1 else f"mean ± 95% interval over {seeds} seeds"
    cells = [[""], ["pruned %"]]
    for method in methods:
        cells[0] += [method, "", ""]
        cells[1] += ["accuracy %", "loss", "weights"]
    for level in sorted({row.target_sparsity for row in rows}):
        line = [f"{100 * level:.10g}"]
        for method in methods:
            here = [r for r in rows if (r.method, r.target_sparsity) == (method, level)]
            line.append(_cell([r.accuracy for r in here], 100, 2))
            line.append(_cell([r.loss for r in here], 1, 3))
            left = [r.remaining for r in here if r.remaining is not None]
            line.append(f"{mean_interval(left)[0]:,.0f}" if left else "-")
        cells.append(line)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.rjust, line, widths)).rstrip() for line in cells]
    row = rows[0]
    title = f"{row.protocol} ({row.criterion}, {row.scope}), epoch {row.epoch}, {over}"
    return "\n".join([title, *lines])


def _cell(values: Sequence[float | None], scale: int, digits: int) -> str:
    known = [scale * value for value in values if value is not None]
    if not known:
        return "-"
    mean, half = mean_interval(known)
    return f"{mean:.{digits}f} ± " + ("-" if half is None else f"{half:.{digits}f}")


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_words, value))
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _to_lines(rows: Iterable[Row]) -> str:
    return "".join(f"{json.dumps(dataclasses.asdict(row))}\n" for row in rows)
