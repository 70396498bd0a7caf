"""Run directories: their config, the comparison of settings, and `load_run`. Imports no jax.

A run directory of format 2 holds `config.json`; `rows/`, a log an arm and seed; `results.csv`, the
export of all rows; `checkpoints/`; `figures/` and `report.html`. `checkpoints/dense-seed0/0020` is
the dense network of seed 0 after 20 epochs: `params`, `state`, `opt_state` and `predictions`.
`checkpoints/<arm>-seed0/0020` has, with a leading axis over levels, of a one-shot arm the `masks`
of all levels but 0 (and `state`, where it was estimated anew); of a trained arm `params`, `state`,
`masks` and `opt_state` of the levels but 0 of the first call; those of levels that were added later
are in `<arm>-seed0-levels1`, ….
"""

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxprune import files
from jaxprune.config import Arm, sparsity_of_level
from jaxprune.results.rows import Row, first_digest, read_csv, read_log

if TYPE_CHECKING:
    from jaxprune.types import Masks, Metric, Params, State
else:
    Masks = Metric = Params = State = Any  # `types` imports jax

FORMAT = 2
_CONFIG = {
    "settings": {"epochs": int},
    "identity": str | None,  # a run of an older format has none
    "arms": [{**dict.fromkeys((*Arm._fields, "identity"), str), "settings": dict}],
    "levels": [[int | float]],
    "seeds": int,
    "metrics": [
        dict.fromkeys(("name", "label", "unit", "better"), str)
        | {"drawn": bool}
        | dict.fromkeys(("low", "high", "chance"), int | float | None)
    ],
    "stepped": bool | None,
    "command": [str],
    "versions": dict,
    "device": dict,
    "later_surroundings": list | None,
    "seconds": {str: int | float},  # whatever the keys are
    "compilations": int,
}


class Pruned(NamedTuple):
    """A network, `apply(apply_masks(params, masks), state, x)`, as NumPy arrays.

    Trained ones have zeros in their parameters already; parameters and state of `one_shot` are the
    dense network's.
    """

    params: Params
    state: State
    masks: Masks


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: it is none; one line that names it.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON, all or nothing."""
    files.write(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def read_config(path: Path) -> dict[str, Any]:
    """Read the `config.json` of a run.

    Raises:
        ValueError: it is of another format, or lacks what a run has; one line that names it.
    """
    config = read_json(path)
    if not isinstance(config, dict) or "settings" not in config:
        raise ValueError(f"{path} is not the config of a run")
    if (found := config.get("format", 1)) != FORMAT:
        raise ValueError(
            f"{path} is of format {found!r:.20}, by another version of jaxprune; "
            f"this one reads format {FORMAT}"
        )
    if not (wrong := _misfit(config, _CONFIG, "config").removeprefix("config.")):
        levels, arms = sum(config["levels"], []), [*map(arm_of, config["arms"])]
        right = {
            "settings.epochs": config["settings"]["epochs"] > 0,
            "arms": 0 < len(set(arms)) == len(arms),
            "levels": 0 < len(set(levels)) == len(levels) and all(0 <= n <= 100 for n in levels),
            "seeds": config["seeds"] > 0,
        }
        wrong = next((name for name, fits in right.items() if not fits), "")
    if wrong:
        raise ValueError(f"{path}: {wrong} is missing, or not what a run has there")
    return config


def plain(value: Any, name: str = "settings") -> Any:
    """Return settings as JSON gives them back, so that they can be compared.

    Tuples and arrays become lists, NumPy's numbers Python's, and paths, keys and numbers that are
    not finite texts.

    Raises:
        TypeError: JSON cannot hold a value, or two keys become one; the message names it.

    Example:
        >>> plain({"sizes": (3, np.int64(4)), "limit": math.inf, 1: Path("a")})
        {'sizes': [3, 4], 'limit': 'inf', '1': 'a'}
    """
    if isinstance(value, dict):
        if len({str(key) for key in value}) < len(value):
            raise TypeError(f"{name} has two keys of one text among {', '.join(map(repr, value))}")
        return {str(key): plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, name) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist(), name)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name} must be what JSON can hold, got {type(value).__name__}")


def compare_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return a line for every setting that differs: 'levels: 0 25 50 in the run, 0 90 now'.

    `old` is as read, `new` as `plain` returns it.
    """
    return [
        f"{name}: {_words(old.get(name))} in the run, {_words(new.get(name))} now"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory, read: its config, its rows, and on demand its networks."""

    path: Path
    config: dict[str, Any]
    rows: list[Row]

    def __repr__(self) -> str:
        arms, levels = len(self.arms), len(sum(self.config["levels"], []))
        sizes = f"{arms} arms, {levels} levels, {self.config['seeds']} seeds, {len(self.rows)} rows"
        return f"<Run {self.path}: {sizes}>"

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms, in the order in which they were added."""
        return tuple(map(arm_of, self.config["arms"]))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What the task measures."""
        from jaxprune.types import Metric

        found = self.config["metrics"]
        return tuple(Metric(*(metric[name] for name in Metric._fields)) for metric in found)

    def network(self, arm: Any, seed: int, level: int | float, target: Any = None) -> Pruned:
        """Read one network after the last epoch.

        Args:
            arm: one of `arms`, or what has its four fields, such as a row.
            seed: which run of training.
            level: in percent, one of the run's; 0 is the dense network, for any arm.
            target: (params, state) or their shapes, as `jax.eval_shape(network.init, key)` returns
                them. Needed where they are not made of dict, list and tuple alone.

        Raises:
            ValueError: the run has no such network, its checkpoint is corrupt, or a target is
                needed or does not fit.
        """
        import jax

        from jaxprune import checkpoints

        wanted = tuple(str(getattr(arm, name, arm)) for name in Arm._fields)
        waves = [[other for other in wave if other] for wave in self.config["levels"]]
        levels = sum(waves, [])
        for name, value, known in (
            ("arm", wanted, self.arms),
            ("seed", seed, range(self.config["seeds"])),
            ("level", level, [0, *levels]),
        ):
            if value not in known:
                has = ", ".join(map(_words, known))
                raise ValueError(f"{self.path} has no {name} {_words(value)}: it has {has}")
        arm, dense = Arm(*wanted), stage_name(seed)
        params_like, state_like = target or (None, None)
        if level and arm.protocol == "trained":
            number, wave = next((i, wave) for i, wave in enumerate(waves) if level in wave)
            stage, at, n = stage_name(seed, arm, number), wave.index(level), len(wave)
            likes = {"params": _stacked(params_like, n), "state": _stacked(state_like, n),
                     "masks": _stacked(params_like, n, bool)}  # fmt: skip
            return Pruned(*(_cut(self._load(stage, *item), at) for item in likes.items()))
        params = self._load(dense, "params", params_like)
        state = self._load(dense, "state", state_like)
        if not level:
            return Pruned(params, state, jax.tree.map(lambda w: np.ones(w.shape, bool), params))
        stage, at = stage_name(seed, arm), levels.index(level)
        if at >= (n := checkpoints.num_levels(self._checkpoint(stage), "masks")):
            raise ValueError(f"{self.path} is not finished: it lacks masks of {arm}")
        masks = _cut(self._load(stage, "masks", _stacked(params_like, n, bool)), at)
        if self.config["settings"].get("recalibrate") and jax.tree.leaves(state):
            state = _cut(self._load(stage, "state", _stacked(state_like, n)), at)
        return Pruned(params, state, masks)

    def _load(self, stage: str, item: str, like: Any) -> Any:
        from jaxprune import checkpoints

        return checkpoints.load(self._checkpoint(stage), item, like)

    def _checkpoint(self, stage: str) -> Path:
        path = self.path / "checkpoints" / stage / f"{self.config['settings']['epochs']:04d}"
        if not (self.path / "checkpoints").is_dir():
            raise ValueError(f"{self.path} holds rows alone: checkpoints stay in the run directory")
        if not path.is_dir():
            raise ValueError(f"{path} does not exist: the run is not finished")
        return path


def load_run(path: Path | str) -> Run:
    """Open a run directory, finished or not; a folder of `results.csv` and `config.json` will do.

    A last line of rows that a kill has torn is left out, with a warning.

    Raises:
        ValueError: it does not exist, is not a run's, or is not what was written.

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
    config, table = read_config(path / "config.json"), path / "results.csv"
    if not (path / "rows").is_dir():
        return Run(path, config, read_csv(table) if table.exists() else [])
    rows = []
    for seed in range(config["seeds"]):
        for entry in config["arms"]:
            file = rows_path(path, arm_of(entry), seed)
            log = read_log(file, first_digest(entry["identity"], seed))
            if log.torn:
                warnings.warn(f"{file}, {log.problem}: left out", stacklevel=2)
            elif log.problem:
                raise ValueError(f"{file}, {log.problem}; the run's own command mends it")
            rows += log.rows
    return Run(path, config, in_order(rows, config))


def in_order(rows: Sequence[Row], config: dict[str, Any]) -> list[Row]:
    """Sort the rows of a run by seed, arm, epoch and level; `config` is of its `config.json`."""
    arms = {arm_of(entry): i for i, entry in enumerate(config["arms"])}
    every = map(sparsity_of_level, sum(config["levels"], []))
    levels = {float(level): i for i, level in enumerate(every)}

    def place(row: Row) -> tuple[float, ...]:  # what is not of the run comes last
        level = levels.get(row.target_sparsity, math.inf)
        return row.seed, arms.get(row.arm, math.inf), row.epoch, level

    return sorted(rows, key=place)


def arm_of(entry: dict[str, Any]) -> Arm:
    """Return the arm of one of the `arms` in a config."""
    return Arm(*(entry[name] for name in Arm._fields))


def stage_name(seed: int, arm: Arm | None = None, wave: int = 0) -> str:
    """Return the folder of the checkpoints of a seed's dense network, or of levels of an arm."""
    if arm is None:
        return f"dense-seed{seed}"
    return f"{arm.slug}-seed{seed}" + (f"-levels{wave}" if wave else "")


def rows_path(folder: Path, arm: Arm, seed: int) -> Path:
    """Return the log of the rows of an arm and seed."""
    return folder / "rows" / f"{stage_name(seed, arm)}.jsonl"


def _stacked(tree: Any, length: int, dtype: Any = None) -> Any:
    """Return the shapes of a tree with a levels axis in front; None of None."""
    import jax

    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((length, *leaf.shape), dtype or leaf.dtype), tree
    )


def _cut(tree: Any, index: int) -> Any:
    """Return one level of a tree with a levels axis."""
    import jax

    return jax.tree.map(lambda leaf: leaf[index].copy(), tree)


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_words, value))
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _misfit(value: Any, shape: Any, name: str) -> str:
    """Return the name of what in a value has not the shape of `_CONFIG`, or nothing."""
    if isinstance(shape, dict) and isinstance(value, dict):
        shape = dict.fromkeys(value, shape[str]) if str in shape else shape
        parts = [(value.get(key), each, f"{name}.{key}") for key, each in shape.items()]
    elif isinstance(shape, list) and isinstance(value, list):
        parts = [(each, shape[0], f"{name}[{i}]") for i, each in enumerate(value)]
    elif isinstance(shape, dict | list) or not isinstance(value, shape):
        return name
    else:  # True is an int of Python's, and no number
        return name if isinstance(value, bool) and shape not in (bool, bool | None) else ""
    return next(filter(None, (_misfit(*part) for part in parts)), "")
