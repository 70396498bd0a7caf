"""An epoch of a study: training with the updates of the masks that are due, scoring, and its rows.

What runs comes from `setup`, how from `programs` and `parts`; `stages` puts epochs together.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import results, trees
from jaxprune.config import Arm, NotFinite, phases, sparsity_of_level
from jaxprune.masks import sparsity_of
from jaxprune.results import Row
from jaxprune.study.parts import Part
from jaxprune.study.programs import Programs
from jaxprune.study.progress import Meter
from jaxprune.study.setup import Setup
from jaxprune.train import batch_indices
from jaxprune.types import Batch, Counts, Key, Masks

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
    waves: tuple[tuple[float, ...], ...]  # the levels in percent: the first, then those added later
    order: tuple[Arm, ...]  # in which arms run: as recorded

    @property
    def levels(self) -> tuple[float, ...]:
        """All levels."""
        return sum(self.waves, ())

    @property
    def pruned(self) -> tuple[float, ...]:
        """All levels but 0."""
        return tuple(level for level in self.levels if level)

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


class Stage(NamedTuple):
    """What is trained or scored together: a seed's dense network, or levels of an arm."""

    seed: int
    arm: Arm | None = None  # None: the dense network
    levels: tuple[float, ...] = (0.0,)  # in percent
    wave: int = 0

    @property
    def name(self) -> str:
        """The name of the folder of its checkpoints."""
        return results.stage_name(self.seed, self.arm, self.wave)


def keys_of(seed: int) -> Keys:
    """Return the keys of a seed."""
    key = jax.random.key(seed)
    init, batches = jax.random.split(key)
    return Keys(init, batches, *(jax.random.fold_in(key, i) for i in (2, 3, 4)))


def train_epoch(
    running: Running,
    stage: Stage,
    epoch: int,
    parts: list[Part],
    due: dict[int, Counts],
    failed: np.ndarray,
    batch: Batch,
) -> tuple[list[Part], np.ndarray, dict[str, float]]:
    """Train all levels for an epoch, with the updates of the masks that are due in it.

    Args:
        running: the study.
        stage: what is trained.
        epoch: its number, from 1.
        parts: the levels.
        due: counts of the updates, by step of the epoch.
        failed: (levels,), those whose loss was not finite before.
        batch: what the criterion looks at in updates.

    Returns:
        The parts, each level's loss over the last call, and the seconds spent.
    """
    setup, keys = running.setup, keys_of(stage.seed)
    x, y = setup.data.train
    batches = batch_indices(jax.random.fold_in(keys.batches, epoch), len(x), setup.study.batch_size)
    key = jax.random.fold_in(keys.steps, epoch)
    spent, step, losses = {"train_seconds": 0.0, "mask_seconds": 0.0}, 0, np.zeros(len(failed))
    pace: float | None = None  # seconds a step
    while step < running.steps:
        if step in due:
            parts, seconds = _update(running, stage, epoch, parts, due[step], failed, batch)
            spent["mask_seconds"] += seconds
        wanted = 1 if pace is None else max(1, int(_CALL_SECONDS / pace))
        stop = min([running.steps, step + wanted, *(u for u in due if u > step)])
        parts, losses, seconds = running.programs.train(
            parts, x, y, batches, key, np.int32(step), np.int32(stop)
        )
        losses = losses[:, step:stop].mean(axis=1)
        if stage.arm is None and not np.isfinite(losses).all():
            raise diverged(stage, epoch)
        spent["train_seconds"] += seconds
        pace = seconds / (stop - step)
        examples = (stop - step) * setup.study.batch_size * len(losses)
        running.meter.add(3 * examples, seconds)
        running.meter.tell(
            stage.seed, stage.arm, epoch, setup.study.epochs, levels=stage.levels,
            losses=tuple(losses.tolist()), rate=examples / seconds,
            compiling=running.programs.clock.compiling,
        )  # fmt: skip
        step = stop
    return parts, losses, spent


def _update(
    running: Running,
    stage: Stage,
    epoch: int,
    parts: list[Part],
    counts: Counts,
    failed: np.ndarray,
    batch: Batch,
) -> tuple[list[Part], float]:
    """Select the masks of all levels anew, among what is still kept."""
    ((carry, masks, *_),) = parts
    (masks, wrong), seconds = running.programs.clock.time(
        running.programs.select_within, stage.arm, carry.params, carry.state, masks, batch, counts
    )
    if (wrong := np.asarray(wrong)).any():
        # A level that has diverged since its last loss is no fault of the criterion.
        leaves = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(carry.params)]
        finite = [np.isfinite(leaf).reshape(len(wrong), -1).all(axis=1) for leaf in leaves]
        check_finite(running, stage, epoch, wrong[~failed & np.all(finite, axis=0)])
    return [Part(carry, masks)], seconds


def score(
    running: Running, parts: list[Part], reference: Any
) -> tuple[dict[str, np.ndarray], Any, float]:
    """Score all levels, as `Programs.score` does, and count the work."""
    data = running.setup.data
    scored, predictions, seconds = running.programs.score(parts, reference)
    levels = len(scored["val_loss"])
    running.meter.add(levels * (len(data.val.x) + len(data.test.x)), seconds)
    return scored, predictions, seconds


def check_finite(running: Running, stage: Stage, epoch: int, wrong: np.ndarray) -> None:
    """Raise `config.NotFinite` where scores are not.

    Args:
        running: the study.
        stage: whose scores they are.
        epoch: likewise.
        wrong: (leaves,), or (levels, leaves) of pieces, whether scores in one are not finite.
    """
    leaves = np.flatnonzero(wrong.reshape(-1, wrong.shape[-1]).any(axis=0))
    if leaves.size:
        assert stage.arm is not None
        pieces = running.setup.granularities[stage.arm.granularity].cost(running.setup.params)
        path, _ = trees.paths_and_leaves(pieces)[leaves[0]]
        when = f" at epoch {epoch}, seed {stage.seed}" if epoch else ""
        raise NotFinite(
            f"criterion {stage.arm.criterion} gives scores that are not finite in leaf "
            f"{path!r}{when} ({stage.arm})"
        )


class Diverged(NotFinite):
    """A loss that is not finite."""


def diverged(stage: Stage, epoch: int, level: int = 0) -> Diverged:
    """Return the error, or the note, of a loss that is not finite; epoch 0 is of what is given."""
    if not epoch:
        return Diverged("the loss of the network as it is given is not finite")
    trained = stage.arm is None or stage.arm.protocol == "trained"
    return Diverged(
        f"the loss is not finite at epoch {epoch}, level {stage.levels[level]:g}%, seed "
        f"{stage.seed} ({stage.arm or 'dense'})"
        f"{'; try a smaller learning rate' if trained else ''}"
    )


def repeat(tree: Any, levels: int) -> Any:
    """Give a tree a levels axis."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (levels, *jnp.shape(x))), tree)


def sizes_of(masks: Masks, setup: Setup) -> list[dict[str, Any]]:
    """Return every level's achieved `sparsity`, `total_sparsity` and `remaining`.

    Args:
        masks: with a leading levels axis.
        setup: says which leaves `sparsity` counts, and what remains.
    """
    return [
        {
            "sparsity": sparsity_of(level, prunable=setup.prunable),
            "total_sparsity": sparsity_of(level, prunable=lambda _, leaf: leaf.size > 0),
            "remaining": setup.remaining(level),
        }
        for level in trees.unstack(jax.device_get(masks))
    ]


def make_rows(
    stage: Stage,
    epoch: int,
    scored: dict[str, Any],
    sizes: list[dict[str, Any]],
    seconds: dict[str, float],
) -> list[Row]:
    """Return a row a level.

    Args:
        stage: an arm's.
        epoch: of the rows.
        scored: metrics with a leading levels axis.
        sizes: what `sizes_of` returns.
        seconds: wall time of all levels together, by the name of its field; 0 if not named.
    """
    assert stage.arm is not None
    share: dict[str, Any] = {
        name: seconds.get(name, 0.0) / max(len(stage.levels), 1)
        for name in ("train_seconds", "mask_seconds", "eval_seconds")
    }
    values = {name: np.asarray(value) for name, value in scored.items()}
    lost = ~np.isfinite(values["val_loss"])  # such a network has no predictions either
    return [
        Row(
            *stage.arm,
            seed=stage.seed,
            epoch=epoch,
            target_sparsity=float(sparsity_of_level(level)),
            **sizes[i],
            metrics={n: None if lost[i] else _plain(value[i]) for n, value in values.items()},
            **share,
        )
        for i, level in enumerate(stage.levels)
    ]


def _plain(value: Any) -> Any:
    """Return Python floats of 7 significant digits, what float32 holds; None if not finite."""
    if value.ndim:
        return [_plain(v) for v in value]
    return float(f"{value:.7g}") if np.isfinite(value) else None
