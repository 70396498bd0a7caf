"""What a study leaves behind, and finds again: the run directory while it is written.

Rows and states come in from `stages`; after a kill it asks here where each stage goes on.
"""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxprune import __version__, checkpoints, files, results
from jaxprune.config import Arm, sparsity_of_level
from jaxprune.results import Row
from jaxprune.study.epoch import Stage

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Record:
    """Rows and checkpoints of a run, in memory and, with a folder, on disk.

    Attributes:
        folder: the run directory, or None.
        config: what `config.json` holds.
        rows: by arm and seed.
    """

    def __init__(self, folder: Path | None, config: dict[str, Any], note: Callable[[str], None]):
        """Open the folder, or make it.

        Args:
            folder: the run directory; None keeps everything in memory.
            config: what `config.json` shall hold, but for what this adds: see `load_run`.
            note: told what is out of the ordinary.

        Raises:
            ValueError: it holds a run made otherwise, is none of ours, or is being written.
            OSError: it cannot be written.
        """
        self.folder, self._note, self._told = folder, note, set()
        self.rows: dict[tuple[Arm | None, int], list[Row]] = {}
        self._digests: dict[tuple[Arm, int], str] = {}
        self.now = _surroundings()
        self.config = {
            "format": results.FORMAT, **config, "command": sys.argv, **self.now, "seconds": {},
            "compilations": 0,
        }  # fmt: skip
        if folder is None:
            return
        inside = [*folder.iterdir()] if folder.exists() else []
        # A call that was killed at its start leaves the others.
        foreign = any(path.name != "lock" and not path.match(".*.tmp") for path in inside)
        if (folder / "config.json").exists():
            results.read_config(folder / "config.json")  # or refused, with nothing written
        elif foreign:
            raise ValueError(f"{folder} is not empty and holds no run: give another --run-dir")
        checkpoints.check_writable(folder)
        self._lock = files.lock(folder / "lock")
        try:
            self._read(folder)
        except BaseException:
            self.close()
            raise

    def note(self, line: str) -> None:
        """Note a line, once."""
        if line not in self._told:
            self._told.add(line)
            self._note(line)

    def _read(self, folder: Path) -> None:
        """Read what is there, and mend what a kill left half done."""
        if (folder / "config.json").exists():
            self._adopt(results.read_config(folder / "config.json"))
        self.save_config()
        for path in folder.glob(".*.tmp"):
            if path.is_file():
                path.unlink()
        for path in (folder / "checkpoints").glob("*/*.tmp"):
            shutil.rmtree(path, ignore_errors=True)
        (folder / "rows").mkdir(exist_ok=True)
        for arm in self.arms:
            for seed in range(self.config["seeds"]):
                self._read_rows(arm, seed)

    @property
    def arms(self) -> dict[Arm, dict[str, Any]]:
        """What is recorded of every arm."""
        return {results.arm_of(entry): entry for entry in self.config["arms"]}

    @property
    def waves(self) -> tuple[tuple[float, ...], ...]:
        """The levels in percent: those of the first call, then those that were added later."""
        return tuple(map(tuple, self.config["levels"]))

    def _adopt(self, old: dict[str, Any]) -> None:
        """Take over what an earlier call left, if it was made alike; add what is new.

        What left neither rows nor checkpoints, such as a criterion that failed, may be mended.
        """
        entries = [entry for entry in old["arms"] if self._left(results.arm_of(entry).slug)]
        if not entries and not self._left("dense"):
            return
        differences = results.compare_settings(old["settings"], self.config["settings"])
        known = {results.arm_of(entry): entry for entry in entries}
        same_jax = old["versions"].get("jax") == self.now["versions"].get("jax")
        new_arms, other_code = [], []
        for arm, entry in self.arms.items():
            if (before := known.get(arm)) is None:
                new_arms.append(entry)
                continue
            changed = results.compare_settings(before["settings"], entry["settings"])
            differences += [f"{arm.criterion}, {line}" for line in changed]
            if not changed and before["identity"] != entry["identity"]:
                other_code.append(f"the code of criterion {arm.criterion}")
        if old.get("identity") != self.config["identity"]:  # which criteria may call
            other_code = ["the code or the constants of network, loss or optimizer"]
        for what in [] if differences else other_code:  # the code of others follows from them
            self._other_code(what, same_jax, differences)
        if differences:
            raise ValueError(
                f"{self.folder} holds a run made otherwise; give the same again, or another "
                f"--run-dir. {'; '.join(dict.fromkeys(differences))}"
            )
        if changed := [
            f"{name} {old[kind].get(name)} then, {value} now"
            for kind in self.now
            for name, value in self.now[kind].items()
            if old[kind].get(name) != value
        ]:
            self.note(f"going on with other surroundings: {'; '.join(changed)}")
        had, now = (sum(config["levels"], []) for config in (old, self.config))
        added = [level for level in now if level not in had]
        command = self.config["command"]
        later = old.get("later_commands", [])
        if command not in (old["command"], *later):
            later = [*later, command]
        self.config = {
            **old,
            **({"later_commands": later} if later else {}),
            "seeds": max(old["seeds"], self.config["seeds"]),
            "arms": [*entries, *new_arms],
            "levels": [*old["levels"], *([added] if added else [])],
        }

    def _left(self, name: str) -> bool:
        """Tell whether there are rows or checkpoints of an arm, or dense ones, of any seed."""
        assert self.folder is not None
        logs = self.folder.glob(f"rows/{name}-seed*")
        saved = self.folder.glob(f"checkpoints/{name}-seed*/*")
        return any(path.stat().st_size for path in logs) or any(p.name.isdecimal() for p in saved)

    def _other_code(self, what: str, same_jax: bool, differences: list[str]) -> None:
        if same_jax:
            differences.append(f"{what}: other than recorded")
        else:  # another version may trace the same code to another program
            self.note(f"{what} cannot be compared: it was recorded with another jax")

    def _read_rows(self, arm: Arm, seed: int) -> None:
        """Read the rows of an arm and seed; what comes after a broken line is given up."""
        path = self._rows_path(arm, seed)
        if path is None or not path.exists():
            return
        log = results.read_log(path, results.first_digest(self.arms[arm]["identity"], seed))
        if log.problem:
            results.cut_log(path, log)
            self.note(f"{path}: {log.problem}; what follows is computed again")
        self._digests[arm, seed] = log.digest
        own = [row for row in log.rows if (row.arm, row.seed) == (arm, seed) and row.epoch > 0]
        self.rows[arm, seed] = own
        if len(own) < len(log.rows):
            self.note(f"{path}: {len(log.rows) - len(own)} rows are not of this run, and ignored")

    def _rows_path(self, arm: Arm, seed: int) -> Path | None:
        return self.folder and results.rows_path(self.folder, arm, seed)

    def save_config(self) -> None:
        """Write `config.json`."""
        if self.folder is not None:
            results.write_json(self.folder / "config.json", self.config)

    def add_seconds(self, name: str, seconds: float) -> None:
        """Add wall time to one of the sums in `config.json`, such as the compilation's."""
        sums = self.config["seconds"]
        sums[name] = sums.get(name, 0.0) + seconds

    def resume(
        self,
        stage: Stage,
        final: set[str],
        state: set[str],
        expected: Callable[[int], Iterable[Stage]],
        finished: Callable[[], bool] = lambda: True,
    ) -> int:
        """Return the epoch after which a stage goes on.

        Args:
            stage: which.
            final: items of a finished stage's last checkpoint.
            state: items from which it can go on.
            expected: whose rows there are after an epoch.
            finished: whether what else a finished stage leaves is there.
        """
        epochs = self.config["settings"]["epochs"]
        complete = 0
        while complete < epochs and not any(
            self.lacks(scored, complete + 1) for scored in expected(complete + 1)
        ):
            complete += 1
        lacking, start = "", 0
        for path in reversed(self._checkpoints(stage)):
            epoch = int(path.name)
            last = epoch == epochs
            if self.holds(stage, epoch, final if last else state):
                if epoch <= complete and (not last or finished()):
                    start = epoch
                    break
                lacking = f"rows from epoch {complete + 1} on" if epoch > complete else "masks"
        if lacking:
            self.note(f"{stage.name} runs again from epoch {start + 1} on: it lacks {lacking}")
        return start

    def lacks(self, stage: Stage, epoch: int) -> bool:
        """Tell whether a row of a stage's arm and levels is missing after an epoch."""
        known = self._known(stage.arm, stage.seed)
        return any((epoch, float(sparsity_of_level(k))) not in known for k in stage.levels)

    def _known(self, arm: Arm | None, seed: int) -> set[tuple[int, float]]:
        """Return epoch and target sparsity of the rows that are there."""
        return {(row.epoch, row.target_sparsity) for row in self.rows.get((arm, seed), ())}

    def append(self, rows: Sequence[Row]) -> None:
        """Keep the rows that are new; on disk when this returns."""
        by_file: dict[tuple[Arm, int], list[Row]] = {}
        for row in rows:
            by_file.setdefault((row.arm, row.seed), []).append(row)
        for (arm, seed), found in by_file.items():
            known = self._known(arm, seed)
            new = [row for row in found if (row.epoch, row.target_sparsity) not in known]
            if path := self._rows_path(arm, seed):
                first = results.first_digest(self.arms[arm]["identity"], seed)
                before = self._digests.get((arm, seed), first)
                self._digests[arm, seed] = results.append_rows(path, new, before)
            self.rows.setdefault((arm, seed), []).extend(new)

    def save(self, stage: Stage, epoch: int, **items: Any) -> None:
        """Save trees of arrays that a stage has after an epoch."""
        if self.folder is None:
            return
        checkpoints.save(self._path(stage, epoch), **items)
        first = {kind: self.config[kind] for kind in self.now}
        others = self.config.setdefault("later_surroundings", [])
        if self.now != first and self.now not in others:
            others.append(self.now)
        self.save_config()

    def thin(self, stage: Stage, *, branched: bool = False) -> None:
        """Remove what is no longer needed of the checkpoints up to a stage's.

        The newest two stay whole, and so does the one where trained stages branch off the dense
        one, until they have. Of the others, a stage's last keeps all but the optimizer's state, and
        the rest go. Later stages are left alone: they may have been under way when this one had to
        be done again.
        """
        trained = [arm for arm in self.arms if arm.protocol == "trained"]
        stages = [
            each
            for seed in range(self.config["seeds"])
            for each in (
                Stage(seed),
                *(Stage(seed, arm, levels, wave)
                  for arm in trained for wave, levels in enumerate(self.waves)),
            )
        ]  # fmt: skip
        names = [each.name for each in stages]
        whole = [
            path
            for earlier in stages[: names.index(stage.name) + 1]
            for path in self._checkpoints(earlier)
            if (path / "opt_state").exists()
        ]
        settings = self.config["settings"]
        branch = Stage(stage.seed).name, settings["phases"][0]
        for path in whole[:-2]:
            if (path.parent.name, int(path.name)) == branch and trained and not branched:
                continue
            if int(path.name) == settings["epochs"]:
                checkpoints.drop(path, "opt_state")
            else:
                checkpoints.remove(path)

    def finish(self) -> list[Row]:
        """Return all rows in the order of an undisturbed run, and write them as `results.csv`."""
        rows = results.in_order([row for rows in self.rows.values() for row in rows], self.config)
        if self.folder is not None:
            results.write_csv(self.folder / "results.csv", rows)
            self.save_config()
        return rows

    def close(self) -> None:
        """Let others write the folder."""
        if self.folder is not None:
            self._lock.close()

    def load(self, stage: Stage, epoch: int, item: str, target: Any = None) -> Any:
        """Return an item of a checkpoint; see `checkpoints.load`."""
        return checkpoints.load(self._path(stage, epoch), item, target)

    def num_masks(self, stage: Stage, epoch: int) -> int:
        """Return of how many levels a checkpoint has masks, unbroken."""
        if not self.holds(stage, epoch, {"masks"}):
            return 0
        return checkpoints.num_levels(self._path(stage, epoch), "masks")

    def holds(self, stage: Stage, epoch: int, items: set[str]) -> bool:
        """Tell whether a checkpoint has these items, unbroken; a broken one is removed."""
        if self.folder is None or not (path := self._path(stage, epoch)).exists():
            return False
        try:
            return items <= set(checkpoints.verify(path))
        except checkpoints.CorruptCheckpoint as error:
            self.note(f"{error}; it is removed")
            checkpoints.remove(path)
            return False

    def _path(self, stage: Stage, epoch: int) -> Path:
        if self.folder is None:
            raise ValueError("a record in memory has no checkpoints")
        return self.folder / "checkpoints" / stage.name / f"{epoch:04d}"

    def _checkpoints(self, stage: Stage) -> list[Path]:
        """Return a stage's checkpoints, oldest first."""
        if self.folder is None:
            return []
        found = (self.folder / "checkpoints" / stage.name).glob("*")
        return sorted((path for path in found if path.name.isdecimal()), key=lambda p: int(p.name))


def _surroundings() -> dict[str, Any]:
    """Return what a run is made with but is not compared: versions and the device."""
    device = jax.devices()[0]
    versions = {"python": platform.python_version(), "jaxprune": __version__}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "versions": versions,
        "device": {"platform": device.platform, "kind": device.device_kind,
                   "processor": platform.processor() or platform.machine(),
                   "cores": os.cpu_count()},
    }  # fmt: skip
