"""The dense network of a study, scored as it is and pruned by every one-shot arm."""

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune import trees
from jaxprune.config import sparsity_of_level
from jaxprune.results import Row
from jaxprune.study import parts as levels_of
from jaxprune.study.epoch import (
    Running,
    Where,
    check_finite,
    diverged,
    keys_of,
    repeat,
    score,
)
from jaxprune.study.parts import Part
from jaxprune.study.rows import keep_all, make_rows, sizes_of
from jaxprune.train import TrainState, batch_indices
from jaxprune.types import Batch, Masks, State


class Pruned(NamedTuple):
    """What comes of a dense network.

    Attributes:
        rows: of all arms.
        masks: of the one-shot arms, by slug, with an axis over the levels other than 0.
        states: likewise, where they were estimated anew.
        predictions: the dense network's on test, None where the task has none.
        seconds: of scoring the dense network.
    """

    rows: list[Row]
    masks: dict[str, Masks]
    states: dict[str, State]
    predictions: Any
    seconds: float


def prune_dense(running: Running, where: Where, carry: TrainState, batch: Batch) -> Pruned:
    """Score a dense network as it is, and pruned by every one-shot arm.

    Args:
        running: the study.
        where: seed and epoch.
        carry: the dense network, with a levels axis of one.
        batch: what criteria look at.
    """
    whole = keep_all(carry.params)
    scored, found, seconds = score(running, [Part(carry, whole)], None)
    if not np.all(np.isfinite(scored["val_loss"])):
        raise diverged(where, 0)
    reference = None if found is None else found[0]
    rows, masks, states = _rows_of_dense(running, where, whole, scored), {}, {}
    for arm in running.arms("one_shot") if running.pruned else ():
        here = where._replace(arm=arm)
        masks[arm.slug], state, more = _one_shot(running, here, carry, batch, reference)
        rows += more
        states |= {} if state is None else {arm.slug: state}
    return Pruned(rows, masks, states, reference, seconds)


def _rows_of_dense(
    running: Running, where: Where, whole: Masks, scored: dict[str, np.ndarray]
) -> list[Row]:
    """Return the rows that are the dense network's: level 0, and every level until the branch."""
    rows, sizes = [], sizes_of(whole, running.setup)
    every = [level for batch in running.levels for level in batch]
    for arm in running.setup.arms:
        dense = arm.protocol == "trained" and where.epoch <= running.branch
        levels = [level for level in every if dense or not level]
        same = {name: np.repeat(value, len(levels), axis=0) for name, value in scored.items()}
        rows += make_rows(arm, where.seed, where.epoch, levels, same, sizes * len(levels), {})
    return rows


def _one_shot(
    running: Running, where: Where, carry: TrainState, batch: Batch, reference: Any
) -> tuple[Masks, State | None, list[Row]]:
    """Prune a dense network at all levels and score it; return masks, new state and rows."""
    setup, programs, clock = running.setup, running.programs, running.programs.clock
    arm, pruned = where.arm, running.pruned
    assert arm is not None
    ((params, state, _),) = trees.unstack(carry)
    counts = setup.counts(arm, [sparsity_of_level(level) for level in pruned])
    (masks, wrong), mask_seconds = clock.time(programs.select, arm, params, state, batch, counts)
    check_finite(running, where, np.asarray(wrong))
    states, seconds = None, 0.0
    if setup.study.recalibrate and jax.tree.leaves(state):
        x, (choose, key) = setup.data.train.x, jax.random.split(keys_of(where.seed).recalibration)
        order = batch_indices(choose, len(x), setup.study.batch_size)[: setup.study.recalibrate]
        states, seconds = clock.time(programs.recalibrate, params, masks, state, x, order, key)
    scored_with = repeat(state, len(pruned)) if states is None else states
    parts = [Part(TrainState(repeat(params, len(pruned)), scored_with, ()), masks)]
    if arm.granularity == "unit":
        parts = levels_of.compact(parts[0].carry, masks, setup)
    scored, _, eval_seconds = score(running, parts, reference)
    spent = {"mask_seconds": mask_seconds, "eval_seconds": eval_seconds + seconds}
    sizes = sizes_of(masks, setup)
    return masks, states, make_rows(arm, where.seed, where.epoch, pruned, scored, sizes, spent)
