"""An epoch of a study: training with the updates of the masks that are due, and scoring.

What runs comes from `setup`, how from `programs` and `parts`; `stages` puts epochs together.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees
from jaxprune.config import Arm, NotFinite, phases
from jaxprune.study import parts as levels_of
from jaxprune.study.parts import Part
from jaxprune.study.programs import Programs
from jaxprune.study.progress import Meter
from jaxprune.study.setup import Setup
from jaxprune.train import batch_indices
from jaxprune.types import Batch, Counts, Key

_CALL_SECONDS = 4.0  # the length of a training call that is aimed at; Ctrl-C is heard between calls


class Keys(NamedTuple):
    """The keys of a seed."""

    init: Key
    batches: Key  # with the epoch folded in, the order of its batches
    steps: Key  # with epoch and step folded in, a training step's
    scoring: Key  # the examples that criteria look at
    recalibration: Key  # the batches that estimate the state anew


class Running(NamedTuple):
    """What every stage is given."""

    setup: Setup
    programs: Programs
    meter: Meter
    levels: tuple[tuple[float, ...], ...]  # percent, in batches, in the order in which they came
    order: tuple[Arm, ...]  # in which arms run: as recorded

    @property
    def pruned(self) -> tuple[float, ...]:
        """All levels but 0."""
        return tuple(level for batch in self.levels for level in batch if level)

    @property
    def steps(self) -> int:
        """The steps of an epoch."""
        return len(self.setup.data.train.x) // self.setup.study.batch_size

    @property
    def branch(self) -> int:
        """The epochs that the trained arms share with the dense run."""
        return phases(self.setup.study.epochs)[0]

    def arms(self, protocol: str) -> list[Arm]:
        """Return the arms of a protocol."""
        return [arm for arm in self.order if arm.protocol == protocol]


class Where(NamedTuple):
    """A stage and an epoch."""

    seed: int
    arm: Arm | None  # None in the dense stage
    epoch: int
    levels: tuple[float, ...]


def keys_of(seed: int) -> Keys:
    """Return the keys of a seed."""
    key = jax.random.key(seed)
    init, batches = jax.random.split(key)
    return Keys(init, batches, *(jax.random.fold_in(key, i) for i in (2, 3, 4)))


def train_epoch(
    running: Running, where: Where, parts: list[Part], due: dict[int, Counts],
    failed: np.ndarray, batch: Batch | None = None,
) -> tuple[list[Part], np.ndarray, dict[str, float]]:  # fmt: skip
    """Train all levels for an epoch, with the updates of the masks that are due in it.

    Args:
        running: the study.
        where: the stage and epoch.
        parts: the levels.
        due: counts of the updates, by step of the epoch.
        failed: (levels,), those whose loss was not finite before.
        batch: what the criterion looks at in updates.

    Returns:
        The parts, each level's loss over the last call, and the seconds spent.
    """
    setup, keys = running.setup, keys_of(where.seed)
    x, y = setup.data.train
    batches = batch_indices(
        jax.random.fold_in(keys.batches, where.epoch), len(x), setup.study.batch_size
    )
    key = jax.random.fold_in(keys.steps, where.epoch)
    spent, step, losses = {"train_seconds": 0.0, "mask_seconds": 0.0}, 0, np.zeros(len(failed))
    pace: float | None = None  # seconds a step
    while step < running.steps:
        if step in due:
            assert batch is not None
            parts, seconds = _update(running, where, parts, due[step], failed, batch)
            spent["mask_seconds"] += seconds
        wanted = 1 if pace is None else max(1, int(_CALL_SECONDS / pace))
        stop = min([running.steps, step + wanted, *(u for u in due if u > step)])
        parts, losses, seconds = levels_of.train(
            parts, setup, running.programs, x, y, batches, key, np.int32(step), np.int32(stop)
        )
        losses = losses[:, step:stop].mean(axis=1)
        if where.arm is None and not np.isfinite(losses).all():
            raise diverged(where, 0)
        spent["train_seconds"] += seconds
        pace = seconds / (stop - step)
        examples = (stop - step) * setup.study.batch_size * len(losses)
        running.meter.add(3 * examples, seconds)
        running.meter.tell(
            where.seed, where.arm, where.epoch, setup.study.epochs, levels=where.levels,
            losses=tuple(losses.tolist()), rate=examples / seconds,
        )  # fmt: skip
        step = stop
    return parts, losses, spent


def _update(
    running: Running, where: Where, parts: list[Part], counts: Counts, failed: np.ndarray,
    batch: Batch,
) -> tuple[list[Part], float]:  # fmt: skip
    """Select the masks of all levels anew, among what is still kept."""
    ((carry, masks, _),) = parts
    assert where.arm is not None
    (masks, wrong), seconds = running.programs.clock.time(
        running.programs.select_within, where.arm, carry.params, carry.state, masks, batch, counts
    )
    if (wrong := np.asarray(wrong)).any():
        # A level that has diverged since its last loss is no fault of the criterion.
        leaves = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(carry.params)]
        finite = [np.isfinite(leaf).reshape(len(wrong), -1).all(axis=1) for leaf in leaves]
        check_finite(running, where, wrong[~failed & np.all(finite, axis=0)])
    return [Part(carry, masks)], seconds


def score(
    running: Running, parts: list[Part], reference: Any
) -> tuple[dict[str, np.ndarray], Any, float]:
    """Score all levels, and count the work."""
    data = running.setup.data
    scored, predictions, seconds = levels_of.score(
        parts, running.setup, running.programs, reference
    )
    levels = len(scored["val_loss"])
    running.meter.add(levels * (len(data.val.x) + len(data.test.x)), seconds)
    return scored, predictions, seconds


def check_finite(running: Running, where: Where, wrong: np.ndarray) -> None:
    """Raise `config.NotFinite` where scores are not.

    Args:
        running: the study.
        where: the stage and epoch.
        wrong: (leaves,), or (levels, leaves), whether a leaf's scores are not finite.
    """
    leaves = np.flatnonzero(wrong.reshape(-1, wrong.shape[-1]).any(axis=0))
    if leaves.size:
        assert where.arm is not None
        path, _ = trees.paths_and_leaves(running.setup.params)[leaves[0]]
        raise NotFinite(
            f"criterion {where.arm.criterion} gives scores that are not finite in leaf {path!r} at "
            f"epoch {where.epoch}, seed {where.seed} ({where.arm})"
        )


def diverged(where: Where, level: int) -> NotFinite:
    """Return the error, or the note, of a loss that is not finite."""
    return NotFinite(
        f"the loss is not finite at epoch {where.epoch}, level {where.levels[level]:g}%, seed "
        f"{where.seed} ({where.arm or 'dense'}); try a smaller learning rate"
    )


def repeat(tree: Any, levels: int) -> Any:
    """Give a tree a levels axis."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (levels, *jnp.shape(x))), tree)
