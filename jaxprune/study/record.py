"""What a sweep leaves behind, and finds again: the run directory while it is written.

Rows and states come in from `sweep`; after a kill it asks here where each group goes on.
"""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import jax

from jaxprune import __version__, checkpoints, results
from jaxprune.results import Row

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Record:
    """Rows and checkpoints of a run, in memory and, with a folder, on disk."""

    def __init__(
        self,
        folder: Path | None,
        settings: dict[str, Any],
        seeds: int,
        groups_of: Callable[[int], Sequence[str]],
        group_of: Callable[[Row], str],
        note: Callable[[str], None],
    ):
        """Open the folder, or make it.

        Args:
            folder: the run directory; None keeps everything in memory.
            settings: what must be the same when a run goes on.
            seeds: how many; a run may be given more.
            groups_of: names the groups of a seed, in the order they run in.
            group_of: names the group that writes a row.
            note: told what is out of the ordinary.

        Raises:
            ValueError: it holds a run with other settings, is none of ours, or is being written.
            OSError: it cannot be written.
        """
        self.folder, self.groups_of, self.group_of, self.note = folder, groups_of, group_of, note
        self.rows: list[Row] = []
        self.now = _surroundings()
        self.config: dict[str, Any] = {
            "settings": settings, "seeds": seeds, "command": sys.argv, **self.now, "seconds": {},
        }  # fmt: skip
        if folder is None:
            return
        inside = [*folder.iterdir()] if folder.exists() else []
        # A call that was killed at its start leaves the others.
        foreign = any(path.name != "lock" and not path.match(".*.tmp") for path in inside)
        if foreign and not (folder / "config.json").exists():
            raise ValueError(f"{folder} is not empty and holds no run: give another --run-dir")
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder / "lock")
        try:
            self._read(folder)
        except BaseException:
            self.close()
            raise

    @property
    def groups(self) -> list[str]:
        """The names of all groups, in the order they run in."""
        return [name for seed in range(self.config["seeds"]) for name in self.groups_of(seed)]

    def _read(self, folder: Path) -> None:
        """Read what is there, and mend what a kill left half done."""
        if (folder / "config.json").exists():
            self._adopt(results.read_config(folder / "config.json"))
        self.save_config()
        for path in folder.glob(".*.tmp"):
            path.unlink()
        for path in (folder / "checkpoints").glob("*/*.tmp"):
            shutil.rmtree(path, ignore_errors=True)
        log = folder / "results.jsonl"
        if log.exists():
            self.rows = results.read_rows(log)
            results.rewrite_rows(log, self.rows)  # without a torn last line

    def _adopt(self, old: dict[str, Any]) -> None:
        """Take over what an earlier call left, if its settings are the same."""
        differences = results.compare_settings(old["settings"], self.config["settings"])
        if differences:
            raise ValueError(
                f"{self.folder} holds a run with other settings; give them again, or another "
                f"--run-dir. {'; '.join(differences)}"
            )
        self.config = {**old, "seeds": max(old["seeds"], self.config["seeds"])}
        if changed := [
            f"{name} {old[kind].get(name)} then, {value} now"
            for kind in self.now
            for name, value in self.now[kind].items()
            if old[kind].get(name) != value
        ]:
            self.note(f"going on with other surroundings: {'; '.join(changed)}")

    def save_config(self) -> None:
        """Write `config.json`."""
        if self.folder is not None:
            results.write_json_atomic(self.folder / "config.json", self.config)

    def add_seconds(self, name: str, seconds: float) -> None:
        """Add wall time to one of the sums in `config.json`, such as the compilation's."""
        sums = self.config["seconds"]
        sums[name] = sums.get(name, 0.0) + seconds

    def add_compilation(self, seconds: float) -> None:
        """Count a compiled program in `config.json`, and its wall time."""
        self.add_seconds("compilation", seconds)
        self.config["compilations"] = self.config.get("compilations", 0) + 1

    def resume(
        self, group: str, final: set[str], state: set[str], expected: Callable[[int], int]
    ) -> int:
        """Return the epoch after which a group goes on, and forget all that is newer.

        Args:
            group: its name.
            final: items of a finished group's last checkpoint.
            state: items from which it can go on.
            expected: how many rows it writes after an epoch.
        """
        epochs = self.config["settings"]["epochs"]
        epoch, corrupt = self._newest(group, final)
        if epoch < epochs:
            epoch, more = self._newest(group, state)
            corrupt += more
        for error in corrupt:
            self.note(f"{error}; using {f'epoch {epoch}' if epoch else 'none'} instead")
        written = Counter(row.epoch for row in self.rows if self.group_of(row) == group)
        if any(written[e] != expected(e) for e in range(1, epoch + 1)):
            self.note(f"results.jsonl lacks rows of {group}: starting it again")
            epoch = 0
        self.forget(group, epoch)
        return epoch

    def forget(self, group: str, epoch: int) -> None:
        """Drop a group's rows and checkpoints that are newer than an epoch."""
        kept = [row for row in self.rows if self.group_of(row) != group or row.epoch <= epoch]
        if len(kept) < len(self.rows) and self.folder is not None:
            results.rewrite_rows(self.folder / "results.jsonl", kept)
        self.rows = kept
        for path in self._checkpoints(group):
            if int(path.name) > epoch:
                checkpoints.remove(path)

    def append(self, rows: Sequence[Row]) -> None:
        """Keep rows; on disk when this returns."""
        self.rows += rows
        if self.folder is not None:
            results.append_rows(self.folder / "results.jsonl", rows)

    def save(self, group: str, epoch: int, branch: str | None, **items: Any) -> None:
        """Save a group's state, and thin out the checkpoints before it.

        Args:
            group: its name.
            epoch: the epoch it has finished.
            branch: a checkpoint that is still needed whole, as `group/0001`.
            items: trees of arrays.
        """
        if self.folder is None:
            return
        checkpoints.save(self._path(group, epoch), **items)
        first = {kind: self.config[kind] for kind in self.now}
        others = self.config.setdefault("later_surroundings", [])
        if self.now != first and self.now not in others:
            others.append(self.now)
        self.save_config()
        self.thin(group, branch)

    def thin(self, group: str, branch: str | None = None) -> None:
        """Remove what is no longer needed of the checkpoints up to a group's.

        The newest two stay whole, and so does the branch. Of the others, a group's last keeps all
        but the optimizer's state, and the rest go. Later groups are left alone: they may have been
        under way when this one had to be done again.
        """
        whole = [
            path
            for name in self.groups[: self.groups.index(group) + 1]
            for path in sorted(self._checkpoints(name))
            if (path / "opt_state").exists()
        ]
        for path in whole[:-2]:
            if f"{path.parent.name}/{path.name}" == branch:
                continue
            if int(path.name) == self.config["settings"]["epochs"]:
                checkpoints.drop(path, "opt_state")
            else:
                checkpoints.remove(path)

    def finish(self) -> list[Row]:
        """Return all rows in the order of an undisturbed run, and write them as `results.csv`."""
        place = {name: i for i, name in enumerate(self.groups)}
        rows = sorted(self.rows, key=lambda row: (place[self.group_of(row)], row.epoch))
        if self.folder is not None:
            results.write_csv(self.folder / "results.csv", rows)
            self.save_config()
        return rows

    def close(self) -> None:
        """Let others write the folder."""
        if self.folder is not None:
            self._lock.close()

    def load(self, group: str, epoch: int, item: str, target: Any = None) -> Any:
        """Return an item of a checkpoint; see `checkpoints.load`."""
        return checkpoints.load(self._path(group, epoch), item, target)

    def holds(self, group: str, epoch: int, items: set[str]) -> bool:
        """Tell whether a checkpoint has these items, unbroken."""
        if self.folder is None or not self._path(group, epoch).exists():
            return False
        try:
            return items <= set(checkpoints.verify(self._path(group, epoch)))
        except checkpoints.CorruptCheckpoint as error:
            self.note(str(error))
            return False

    def _newest(
        self, group: str, items: set[str]
    ) -> tuple[int, list[checkpoints.CorruptCheckpoint]]:
        """Return the epoch of the newest good checkpoint, and the newer ones, which are removed."""
        if self.folder is None:
            return 0, []
        path, corrupt = checkpoints.newest(self._path(group, 0).parent, *items)
        for error in corrupt:
            checkpoints.remove(error.path)
        return int(path.name) if path else 0, list(corrupt)

    def _path(self, group: str, epoch: int) -> Path:
        if self.folder is None:
            raise ValueError("a record in memory has no checkpoints")
        return self.folder / "checkpoints" / group / f"{epoch:04d}"

    def _checkpoints(self, group: str) -> list[Path]:
        if self.folder is None:
            return []
        found = (self.folder / "checkpoints" / group).glob("*")
        return [path for path in found if path.name.isdecimal()]


def _lock(path: Path) -> IO[str]:
    """Hold a file against other processes; where the system cannot, nothing is held."""
    file = path.open("w")
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(f"{path.parent} is being written by another process") from None
    return file


def _surroundings() -> dict[str, Any]:
    """Return what a run is made with but is not compared: versions and the device."""
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "versions": {"python": platform.python_version(), "jaxprune": __version__,
                     **versions},
        "device": {"platform": device.platform, "kind": device.device_kind,
                   "processor": platform.processor() or platform.machine(),
                   "cores": os.cpu_count()},
    }  # fmt: skip
