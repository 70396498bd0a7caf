"""What a sweep leaves behind, and finds again: the run directory while it is written.

Rows and states come in from `sweep`; after a kill it asks here where each group goes on.
"""

import importlib.metadata
import os
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

import jaxprune
from jaxprune import checkpoints, results
from jaxprune.results import Row

_FIRST = ("config.json.tmp",)  # all that a call killed at its start leaves
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Record:
    """Rows and checkpoints of a run, in memory and, with a folder, on disk."""

    def __init__(
        self,
        folder: Path | None,
        settings: dict[str, Any],
        seeds: int,
        group_of: Callable[[Row], str],
        note: Callable[[str], None],
    ):
        """Open the folder, or make it.

        Args:
            folder: the run directory; None keeps everything in memory.
            settings: what must be the same when a run goes on.
            seeds: how many; a run may be given more.
            group_of: names the group that writes a row.
            note: told what is out of the ordinary.

        Raises:
            ValueError: it holds a run with other settings, or is none of ours.
            OSError: it cannot be written.
        """
        self.folder, self.group_of, self.note = folder, group_of, note
        self.rows: list[Row] = []
        self.config: dict[str, Any] = {"settings": settings, "seeds": seeds, **_surroundings()}
        if folder is None:
            return
        if (folder / "config.json").exists():
            self._adopt(results.read_config(folder / "config.json"))
        elif folder.exists() and any(path.name not in _FIRST for path in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no run: give another --run-dir")
        folder.mkdir(parents=True, exist_ok=True)
        self.save_config()
        log = folder / "results.jsonl"
        if log.exists():
            self.rows = results.read_rows(log)
            results.rewrite_rows(log, self.rows)  # without a torn last line

    def _adopt(self, old: dict[str, Any]) -> None:
        """Take over what an earlier call left, if its settings are the same."""
        differences = results.compare_settings(old["settings"], self.config["settings"])
        if differences:
            raise ValueError(
                f"{self.folder} holds a run with other settings; give them again, or "
                f"another --run-dir. {'; '.join(differences)}"
            )
        for name in _surroundings():
            if old[name] != self.config[name]:
                self.note(
                    f"going on with another {name}: {old[name]} then, {self.config[name]} now"
                )
        self.config["seeds"] = max(old["seeds"], self.config["seeds"])
        self.config["seconds"] = old.get("seconds", {})

    def save_config(self) -> None:
        """Write `config.json`."""
        if self.folder is not None:
            results.write_json_atomic(self.folder / "config.json", self.config)

    def add_seconds(self, name: str, seconds: float) -> None:
        """Add wall time to one of the sums in `config.json`, such as the compilation's."""
        sums = self.config.setdefault("seconds", {})
        sums[name] = sums.get(name, 0.0) + seconds

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
        epoch = self._newest(group, final)
        if epoch < epochs:
            epoch = self._newest(group, state)
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

    def finish(self) -> None:
        """Write what only makes sense of a finished run: `results.csv`, and the seconds spent."""
        if self.folder is not None:
            results.write_csv(self.folder / "results.csv", self.rows)
            self.save_config()

    def save(self, group: str, epoch: int, keep: set[str], **items: Any) -> None:
        """Save a group's state, and thin out older checkpoints.

        The newest two of the run stay whole. Of the others, a group's last keeps all but the
        optimizer's state, and the rest go, but for those named in `keep`.

        Args:
            group: its name.
            epoch: the epoch it has finished.
            keep: checkpoints that are still needed whole, as `group/epoch`.
            items: trees of arrays.
        """
        if self.folder is None:
            return
        checkpoints.save(self._path(group, epoch), **items)
        self.save_config()
        self.thin(keep)

    def thin(self, keep: set[str]) -> None:
        """Remove what is no longer needed of old checkpoints; see `save`."""
        if self.folder is None:
            return
        found = sorted(self._checkpoints("*"), key=lambda path: path.stat().st_mtime_ns)
        for path in found[:-2]:
            if f"{path.parent.name}/{int(path.name)}" in keep:
                continue
            if int(path.name) == self.config["settings"]["epochs"]:
                checkpoints.drop(path, "opt_state")
            else:
                checkpoints.remove(path)

    def load(self, group: str, epoch: int, item: str, target: Any = None) -> Any:
        """Return an item of a checkpoint; see `checkpoints.load`."""
        return checkpoints.load(self._path(group, epoch), item, target)

    def holds(self, group: str, epoch: int, items: set[str]) -> bool:
        """Tell whether a checkpoint has these items, unbroken."""
        path = self._path(group, epoch)
        try:
            return self.folder is not None and path.exists() and items <= set(
                checkpoints.verify(path))  # fmt: skip
        except checkpoints.CorruptCheckpoint as error:
            self.note(str(error))
            return False

    def _newest(self, group: str, items: set[str]) -> int:
        if self.folder is None:
            return 0
        path, corrupt = checkpoints.newest(self._path(group, 0).parent, *items)
        for error in corrupt:
            self.note(f"{error}; using {f'epoch {int(path.name)}' if path else 'none'} instead")
            checkpoints.remove(error.path)
        return int(path.name) if path else 0

    def _path(self, group: str, epoch: int) -> Path:
        assert self.folder is not None
        return self.folder / "checkpoints" / group / f"{epoch:04d}"

    def _checkpoints(self, group: str) -> list[Path]:
        if self.folder is None:
            return []
        found = (self.folder / "checkpoints").glob(f"{group}/*")
        return [path for path in found if path.name.isdecimal()]


def _surroundings() -> dict[str, Any]:
    """Return what a run is made with but is not compared: versions and the device."""
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    versions = {"jaxprune": jaxprune.__version__, **versions}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "device": {"platform": device.platform, "kind": device.device_kind,
                   "processor": platform.processor() or platform.machine(),
                   "cores": os.cpu_count()},
    }  # fmt: skip
