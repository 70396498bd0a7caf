"""The dense network of a study, scored as it is and pruned by every one-shot arm."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees
from jaxprune.config import Arm, sparsity_of_level
from jaxprune.masks import keep_all
from jaxprune.results import Row
from jaxprune.study.epoch import (
    Running,
    Stage,
    check_finite,
    diverged,
    keys_of,
    make_rows,
    repeat,
    score,
    sizes_of,
)
from jaxprune.study.parts import Part, compact
from jaxprune.train import TrainState, batch_indices
from jaxprune.types import Batch, Correction


class Pruned(NamedTuple):
    """What comes of a dense network.

    Attributes:
        items: of every one-shot arm what is saved: masks, with an axis over the levels other than
            0; and state, likewise, where it was estimated anew.
        predictions: the dense network's on test, None where the task has none.
        seconds: of scoring the dense network.
    """

    items: dict[Arm, dict[str, Any]]
    predictions: Any
    seconds: float


def prune_dense(
    running: Running,
    seed: int,
    epoch: int,
    carry: TrainState,
    batch: Batch,
    keep: Callable[[list[Row]], None],
) -> Pruned:
    """Score a dense network as it is, and pruned by every one-shot arm.

    Args:
        running: the study.
        seed: of the rows.
        epoch: likewise.
        carry: the dense network, with a levels axis of one.
        batch: what criteria look at.
        keep: given the rows of an arm as soon as it is through: one that fails loses no other's.
    """
    whole = keep_all(carry.params)
    scored, found, seconds = score(running, [Part(carry, whole)], None)
    if not np.all(np.isfinite(scored["val_loss"])):
        raise diverged(Stage(seed), epoch)
    reference = None if found is None else found[0]
    items, sizes = {}, sizes_of(whole, running.setup)
    for arm in running.order:
        rows, trained = [], arm.protocol == "trained"
        if running.pruned and not trained:
            stage = Stage(seed, arm, running.pruned)
            items[arm], rows = _one_shot(running, stage, epoch, carry, batch, reference)
        # Level 0, and until the branch every level.
        dense = trained and epoch <= running.branch
        levels = tuple(level for level in running.levels if dense or not level)
        same = {name: np.repeat(value, len(levels), axis=0) for name, value in scored.items()}
        keep(make_rows(Stage(seed, arm, levels), epoch, same, sizes * len(levels), {}) + rows)
    return Pruned(items, reference, seconds)


def _one_shot(
    running: Running, stage: Stage, epoch: int, carry: TrainState, batch: Batch, reference: Any
) -> tuple[dict[str, Any], list[Row]]:
    """Prune a dense network at all levels and score it; return what is saved, and rows."""
    setup, programs, clock = running.setup, running.programs, running.programs.clock
    arm, study, number = stage.arm, setup.study, len(stage.levels)
    assert arm is not None
    ((params, state, _),) = trees.unstack(carry)
    targets = [sparsity_of_level(level) for level in stage.levels]
    counts = setup.counts(arm, targets, params, state, batch)
    method, pruned = setup.criteria[arm.criterion], repeat(params, number)
    if isinstance(method, Correction):  # whose programs are compiled in the seconds, too
        of = method, params, state, batch, counts
        (pruned, masks), mask_seconds = clock.time(setup.corrected, *of)
    else:
        of = arm, params, state, batch, counts
        (masks, wrong), mask_seconds = clock.time(programs.select, *of)
        check_finite(running, stage, epoch, np.asarray(wrong))
    items, states, seconds = {"masks": masks}, repeat(state, number), 0.0
    items |= {"params": pruned} if isinstance(method, Correction) else {}
    if study.recalibrate and jax.tree.leaves(state):
        x, (choose, key) = setup.data.train.x, jax.random.split(keys_of(stage.seed).recalibration)
        order = batch_indices(choose, len(x), study.batch_size)[: study.recalibrate]

        def recalibrate() -> Any:
            if not isinstance(method, Correction):
                return programs.recalibrate(params, masks, state, x, order, key)
            each = [
                programs.recalibrate(own, trees.stack([mask]), state, x, order, key)
                for own, mask in zip(*map(trees.unstack, (pruned, masks)), strict=True)
            ]
            return jax.tree.map(lambda *levels: jnp.concatenate(levels), *each)

        states, seconds = clock.time(recalibrate)
        items["state"] = states
    parts = [Part(TrainState(pruned, states, ()), masks)]
    if arm.granularity == "unit":
        parts = compact(parts[0].carry, masks, setup, setup.scoring)
    scored, _, eval_seconds = score(running, parts, reference)
    lost = np.flatnonzero(~np.isfinite(scored["val_loss"]))
    if lost.size and epoch == study.epochs:  # once, for all epochs
        running.meter.report(str(diverged(stage, epoch, lost[0])))
    spent = {"mask_seconds": mask_seconds, "eval_seconds": eval_seconds + seconds}
    return items, make_rows(stage, epoch, scored, sizes_of(masks, setup), spent)
