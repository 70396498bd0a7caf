"""The stages of a study, run one after another: of every seed a dense one, then the trained ones.

A seed's dense stage trains the dense network and, after every epoch, scores it pruned by every
one-shot arm. A trained stage, one an arm and batch of levels, branches off it and trains all of the
levels, each under its masks. After every epoch a stage writes its rows and then its state, so a
kill costs an epoch of one stage at most. `epoch` does the training, `dense` the one-shot pruning.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import schedules, trees
from jaxprune.config import Arm, phases, sparsity_of_level
from jaxprune.study import parts as levels_of
from jaxprune.study.dense import prune_dense
from jaxprune.study.epoch import Running, Where, diverged, keys_of, repeat, score, train_epoch
from jaxprune.study.parts import Part
from jaxprune.study.record import Record
from jaxprune.study.rows import keep_all, make_rows, sizes_of
from jaxprune.train import TrainState, init_state
from jaxprune.types import Batch, Counts

UPDATES_PER_EPOCH = 10


class Start(NamedTuple):
    """The epochs after which the stages of a seed go on."""

    dense: int
    trained: dict[tuple[Arm, int], int]  # by arm and batch of levels
    branching: bool  # whether a trained stage begins


def dense_stage(seed: int) -> str:
    """Name a seed's dense stage."""
    return f"dense-seed{seed}"


def trained_stage(arm: Arm, seed: int, batch: int) -> str:
    """Name the stage of an arm, a seed and a batch of levels."""
    return f"{arm.slug}-seed{seed}" + (f"-levels{batch}" if batch else "")


def run(running: Running, record: Record) -> None:
    """Run, or go on with, all seeds."""
    starts = [_find_start(running, record, seed) for seed in range(running.setup.study.seeds)]
    running.meter.work = sum(_work(running, start) for start in starts)
    if not running.meter.work:
        record.note(f"nothing to run: {sum(map(len, record.rows.values()))} rows found")
    for seed, start in enumerate(starts):
        if _work(running, start):
            _run_seed(running, record, seed, start)


def _work(running: Running, start: Start) -> int:
    """Return the work left of a seed, in forward passes of an example."""
    setup, data = running.setup, running.setup.data
    epochs, batch_size = setup.study.epochs, setup.study.batch_size
    scored = len(data.val.x) + len(data.test.x)
    training = 3 * (len(data.train.x) // batch_size) * batch_size  # a backward pass costs two
    one_shot = len(running.pruned) * len(running.arms("one_shot"))
    return (epochs - start.dense) * (training + scored * (1 + one_shot)) + sum(
        (epochs - max(epoch, running.branch)) * (training + scored)
        * sum(level != 0 for level in running.levels[batch])
        for (_, batch), epoch in start.trained.items()
    )  # fmt: skip


def _find_start(running: Running, record: Record, seed: int) -> Start:
    """Find where a seed's stages go on."""
    branch, state = running.branch, {"params", "state", "opt_state"}
    trained = {}
    for arm in running.arms("trained"):
        for number, batch in enumerate(running.levels):
            if pruned := [level for level in batch if level]:
                trained[arm, number] = record.resume(
                    trained_stage(arm, seed, number),
                    {"params", "state", "masks"},
                    {"masks", *state},
                    lambda epoch, arm=arm, pruned=pruned: (
                        [(arm, seed, pruned)] if epoch > branch else []
                    ),
                )
    every = [level for batch in running.levels for level in batch]
    zero = [level for level in every if not level]

    def expected(epoch: int) -> list[tuple[Arm, int, list[float]]]:
        return [
            (arm, seed, every if arm.protocol == "one_shot" or epoch <= branch else zero)
            for arm in running.setup.arms
        ]

    stage = dense_stage(seed)
    final = {"params", "state", "one_shot", "predictions"}
    dense = record.resume(stage, final, {"predictions", *state}, expected)
    if dense == running.setup.study.epochs and running.pruned:
        there = record.masks_of(stage, dense)
        wanted = {arm.slug for arm in running.arms("one_shot")}
        # Killed after the last rows of added arms or levels, and before their masks were saved.
        if any(there.get(slug) != len(running.pruned) for slug in wanted):
            dense = 0
    branching = 0 in trained.values()
    if branching and 0 < branch <= dense and not record.holds(stage, branch, state):
        record.note(f"{stage} starts again: its state after epoch {branch} is needed, and gone")
        dense = 0
    return Start(dense, trained, branching)


def _run_seed(running: Running, record: Record, seed: int, start: Start) -> None:
    batch = running.setup.batch(keys_of(seed).scoring)
    branch, predictions = _run_dense(running, record, seed, start, batch)
    last = dense_stage(seed)
    for (arm, number), epoch in start.trained.items():
        last = trained_stage(arm, seed, number)
        if epoch < running.setup.study.epochs:
            trained = Trained(arm, number, seed, epoch, predictions, batch)
            _run_trained(running, record, trained, branch)
    record.thin(last)


def _run_dense(
    running: Running, record: Record, seed: int, start: Start, batch: Batch
) -> tuple[TrainState | None, Any]:
    """Train a seed's dense network and score it, dense and one-shot, after every epoch.

    Returns:
        The state after the dense epochs, with a levels axis of one, if a trained stage begins; and
        the predictions on test, an array an epoch, None where the task has none.
    """
    setup, epochs, at = running.setup, running.setup.study.epochs, running.branch
    stage, predictions = dense_stage(seed), []
    carry = trees.stack([init_state(setup.network, keys_of(seed).init, setup.optimizer)])
    branch = carry if start.branching and not at else None
    if start.dense:
        kept = record.load(stage, start.dense, "predictions")
        predictions = [] if kept is None else [*kept]
        if start.branching and 0 < at <= start.dense:
            branch = _load_carry(running, record, stage, at)
        if start.dense < epochs:
            carry = _load_carry(running, record, stage, start.dense)
    for epoch in range(start.dense + 1, epochs + 1):
        where = Where(seed, None, epoch, (0.0,))
        parts = [Part(carry, keep_all(carry.params))]
        parts, _, spent = train_epoch(running, where, parts, {}, np.zeros(1, bool))
        carry = parts[0].carry
        pruned = prune_dense(running, where, carry, batch)
        record.add_seconds("dense_training", spent["train_seconds"])
        record.add_seconds("dense_evaluation", pruned.seconds)
        record.append(pruned.rows)
        if pruned.predictions is not None:
            predictions.append(np.asarray(pruned.predictions))
        items = trees.unstack(carry)[0]._asdict()
        items["predictions"] = np.stack(predictions) if predictions else None
        if epoch == epochs:
            before = record.of_other_arms(stage, epoch, "one_shot", setup.params, bool)
            items["one_shot"] = before | pruned.masks
            if setup.study.recalibrate:
                like = setup.joined.abstract["state"]
                before = record.of_other_arms(stage, epoch, "one_shot_state", like)
                items["one_shot_state"] = before | pruned.states
        needed = f"{stage}/{at:04d}" if running.arms("trained") else None
        record.save(stage, epoch, needed, **items)
        branch = carry if start.branching and epoch == at else branch
    return branch, predictions or None


class Trained(NamedTuple):
    """A trained stage.

    Attributes:
        arm: of the protocol `trained`.
        number: of its batch of levels.
        seed: of the dense run that it branches off.
        start: the epoch after which it goes on, 0 at the branch.
        predictions: the dense network's on test, an array an epoch, or None.
        batch: what the criterion looks at.
    """

    arm: Arm
    number: int
    seed: int
    start: int
    predictions: Any
    batch: Batch


def _run_trained(
    running: Running, record: Record, stage: Trained, branch: TrainState | None
) -> None:
    """Train a batch of levels from the branch on, under masks that follow the schedule."""
    arm, seed, epochs = stage.arm, stage.seed, running.setup.study.epochs
    name = trained_stage(arm, seed, stage.number)
    pruned = tuple(level for level in running.levels[stage.number] if level)
    if stage.start:
        carry = _load_carry(running, record, name, stage.start, len(pruned))
        n, shapes = len(pruned), running.setup.params
        target = jax.tree.map(lambda w: jax.ShapeDtypeStruct((n, *w.shape), bool), shapes)
        masks = jax.tree.map(jnp.asarray, record.load(name, stage.start, "masks", target))
    else:
        assert branch is not None
        carry = jax.tree.map(lambda x: jnp.repeat(x, len(pruned), axis=0), branch)
        masks = keep_all(carry.params, len(pruned))
    parts, updates = [Part(carry, masks)], _updates(running, arm, pruned)
    steps, failed, whole = running.steps, np.zeros(len(pruned), bool), False
    for epoch in range(max(stage.start, running.branch) + 1, epochs + 1):
        where = Where(seed, arm, epoch, pruned)
        first = (epoch - running.branch - 1) * steps
        due = {step - first: n for step, n in updates.items() if 0 <= step - first < steps}
        if arm.granularity == "unit" and not due and not whole and parts[0].plan is None:
            parts = _compacted(running, record, parts)  # resumed after the last update
            whole = parts[0].plan is None
        parts, losses, spent = train_epoch(running, where, parts, due, failed, stage.batch)
        # After the last update the masks stay, and so do the smaller networks; the widths before
        # are not worth compiling for.
        scored_parts, settled = parts, max(updates) < first + steps
        if arm.granularity == "unit" and settled and parts[0].plan is None:
            if not whole:
                masks, parts = parts[0].masks, _compacted(running, record, parts)
                whole = parts[0].plan is None
            scored_parts = parts
            if whole:
                carry = parts[0].carry._replace(opt_state=())
                scored_parts = levels_of.compact(carry, masks, running.setup)
        reference = None
        if stage.predictions is not None:
            reference = jnp.asarray(stage.predictions[epoch - 1])
        scored, _, spent["eval_seconds"] = score(running, scored_parts, reference)
        new = ~np.isfinite(losses + scored["val_loss"]) & ~failed
        if new.any():
            record.note(str(diverged(where, int(np.argmax(new)))))
        failed |= new
        carry = levels_of.expand(parts, running.setup)
        masks = masks if parts[0].plan else parts[0].masks
        sizes = sizes_of(masks, running.setup)
        record.append(make_rows(arm, seed, epoch, pruned, scored, sizes, spent))
        needed = f"{dense_stage(seed)}/{running.branch:04d}"
        record.save(name, epoch, needed, masks=masks, **carry._asdict())


def _updates(running: Running, arm: Arm, pruned: Sequence[float]) -> dict[int, Counts]:
    """Return the counts of every update of the masks, by the step after the branch."""
    pruning = phases(running.setup.study.epochs)[1]
    targets = [sparsity_of_level(level) for level in pruned]
    steps = schedules.update_steps(pruning * running.steps, pruning * UPDATES_PER_EPOCH)
    return {
        step: running.setup.counts(arm, [schedules.cubic(t, progress) for t in targets])
        for step, progress in steps.items()
    }


def _compacted(running: Running, record: Record, parts: list[Part]) -> list[Part]:
    """Take the pruned units out, if the optimizer trains what is left as it does the whole."""
    setup, (carry, masks, _) = running.setup, parts[0]
    if not levels_of.elementwise(carry, masks, setup):
        record.note_once(
            "the optimizer does not update each weight by itself: units stay, masked, in training"
        )
        return parts
    return levels_of.compact(carry, masks, setup)


def _load_carry(
    running: Running, record: Record, stage: str, epoch: int, levels: int | None = None
) -> TrainState:
    """Return a saved state with a levels axis; the dense stage's, saved without, gets one."""
    setup = running.setup

    def make() -> TrainState:
        carry = init_state(setup.network, jax.random.key(0), setup.optimizer)
        return carry if levels is None else repeat(carry, levels)

    target = jax.eval_shape(make)._asdict()
    found = TrainState(
        **{name: record.load(stage, epoch, name, tree) for name, tree in target.items()}
    )
    return jax.tree.map(jnp.asarray, trees.stack([found]) if levels is None else found)
