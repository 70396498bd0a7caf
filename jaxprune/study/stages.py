"""The stages of a study, run one after another: of every seed a dense one, then the trained ones.

A seed's dense stage trains the dense network and, after every epoch, scores it pruned by every
one-shot arm. A trained stage, one an arm and wave of levels, branches off it and trains all of the
levels, each under its masks. After every epoch a stage writes its rows and then its state, so a
kill costs an epoch of one stage at most. `epoch` does the training, `dense` the one-shot pruning.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import schedules, trees
from jaxprune.config import Arm, phases, sparsity_of_level
from jaxprune.masks import keep_all
from jaxprune.study.dense import prune_dense
from jaxprune.study.epoch import (
    Diverged,
    Running,
    Stage,
    diverged,
    keys_of,
    make_rows,
    repeat,
    score,
    sizes_of,
    train_epoch,
)
from jaxprune.study.parts import Part, compact, elementwise, expand
from jaxprune.study.record import Record
from jaxprune.train import TrainState, init_state
from jaxprune.types import Batch, Counts

UPDATES_PER_EPOCH = 10
_STATE = {"params", "state", "opt_state"}  # items from which training goes on


class Start(NamedTuple):
    """The epochs after which the stages of a seed go on."""

    dense: int
    trained: dict[Stage, int]

    @property
    def branching(self) -> bool:
        """Whether a trained stage begins."""
        return 0 in self.trained.values()


def run(running: Running, record: Record) -> None:
    """Run, or go on with, all seeds.

    Raises:
        config.NotFinite: scores are not finite; or, once all seeds have run, the loss of a dense
            network is not.
    """
    starts = [_find_start(running, record, seed) for seed in range(running.setup.study.seeds)]
    works = [_work(running, record, seed, start) for seed, start in enumerate(starts)]
    running.meter.work = sum(works)
    if not running.meter.work:
        record.note(f"nothing to run: {sum(map(len, record.rows.values()))} rows found")
    failed = []
    for seed, (start, work) in enumerate(zip(starts, works, strict=True)):
        if work:
            try:
                _run_seed(running, record, seed, start)
            except Diverged as error:
                failed.append(error)
                if seed < len(starts) - 1:
                    record.note(f"{error}; the other seeds go on")
    if failed:
        raise failed[0]
    running.meter.finish()


def _work(running: Running, record: Record, seed: int, start: Start) -> int:
    """Return the work left of a seed, in forward passes of an example."""
    setup, data = running.setup, running.setup.data
    epochs, batch_size = setup.study.epochs, setup.study.batch_size
    scored = len(data.val.x) + len(data.test.x)
    training = 3 * (len(data.train.x) // batch_size) * batch_size  # a backward pass costs two
    dense = sum(
        training + scored * (1 + len(running.pruned) * sum(a.protocol == "one_shot" for a in arms))
        for epoch in range(start.dense + 1, epochs + 1)
        for arms in [_missing(running, record, seed, epoch)]
    )
    return dense + sum(
        (epochs - max(epoch, running.branch)) * (training + scored) * len(stage.levels)
        for stage, epoch in start.trained.items()
    )


def _find_start(running: Running, record: Record, seed: int) -> Start:
    """Find where a seed's stages go on."""
    epochs, branch = running.setup.study.epochs, running.branch
    trained = {}
    for arm in running.arms("trained"):
        for wave, levels in enumerate(running.waves):
            if pruned := tuple(level for level in levels if level):
                stage = Stage(seed, arm, pruned, wave)
                trained[stage] = record.resume(
                    stage,
                    {"params", "state", "masks"},
                    {"masks", *_STATE},
                    lambda epoch, stage=stage: [stage] if epoch > branch else [],
                )

    dense = Stage(seed)
    final, state = {"params", "state", "predictions"}, {"predictions", *_STATE}
    begin = record.resume(
        dense, final, state, lambda epoch: _scored(running, seed, epoch),
        lambda: not _missing(running, record, seed, epochs),
    )  # fmt: skip
    start = Start(begin, trained)
    if start.branching and 0 < branch <= start.dense and not record.holds(dense, branch, state):
        record.note(
            f"{dense.name} starts again: its state after epoch {branch} is needed, and gone"
        )
        return start._replace(dense=0)
    return start


def _scored(running: Running, seed: int, epoch: int) -> list[Stage]:
    """Return whose rows a seed's dense stage leaves after an epoch."""
    whole = tuple(level for level in running.levels if not level)
    return [
        Stage(seed, arm, running.levels)
        if arm.protocol == "one_shot" or epoch <= running.branch
        else Stage(seed, arm, whole)
        for arm in running.order
    ]


def _missing(running: Running, record: Record, seed: int, epoch: int) -> tuple[Arm, ...]:
    """Return the arms of which rows are missing after an epoch, or masks after the last."""

    def lacks_masks(arm: Arm | None) -> bool:  # of some levels, if killed while they were added
        wanted = len(running.pruned) if arm is not None and arm.protocol == "one_shot" else 0
        return wanted > 0 and record.num_masks(Stage(seed, arm), epoch) != wanted

    last = epoch == running.setup.study.epochs
    return tuple(
        stage.arm
        for stage in _scored(running, seed, epoch)
        if stage.arm is not None
        and (record.lacks(stage, epoch) or (last and lacks_masks(stage.arm)))
    )


def _run_seed(running: Running, record: Record, seed: int, start: Start) -> None:
    batch = running.setup.batch(keys_of(seed).scoring)
    branch, predictions = _run_dense(running, record, seed, start, batch)
    last = Stage(seed)
    for last, epoch in start.trained.items():
        if epoch < running.setup.study.epochs:
            _run_trained(running, record, last, epoch, branch, predictions, batch)
    record.thin(last, branched=True)


def _run_dense(
    running: Running, record: Record, seed: int, start: Start, batch: Batch
) -> tuple[TrainState | None, Any]:
    """Train a seed's dense network and score it, dense and one-shot, after every epoch.

    Returns:
        The state after the dense epochs, with a levels axis of one, if a trained stage begins; and
        the predictions on test, an array an epoch, None where the task has none.
    """
    setup, epochs, at = running.setup, running.setup.study.epochs, running.branch
    stage, predictions = Stage(seed), []
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
        parts = [Part(carry, keep_all(carry.params))]
        parts, _, spent = train_epoch(running, stage, epoch, parts, {}, np.zeros(1, bool), batch)
        carry = parts[0].carry
        missing = running._replace(order=_missing(running, record, seed, epoch))
        pruned = prune_dense(missing, seed, epoch, carry, batch, record.append)
        record.add_seconds("dense_training", spent["train_seconds"])
        record.add_seconds("dense_evaluation", pruned.seconds)
        if pruned.predictions is not None:
            predictions.append(np.asarray(pruned.predictions))
        for arm, items in pruned.items.items() if epoch == epochs else ():
            record.save(Stage(seed, arm), epoch, **items)
        kept = np.stack(predictions) if predictions else None
        record.save(stage, epoch, **trees.unstack(carry)[0]._asdict(), predictions=kept)
        record.thin(stage)
        branch = carry if start.branching and epoch == at else branch
    return branch, predictions or None


def _run_trained(
    running: Running,
    record: Record,
    stage: Stage,
    start: int,
    branch: TrainState | None,
    predictions: Any,
    batch: Batch,
) -> None:
    """Train levels from the branch on, under masks that follow the schedule.

    Args:
        running: the study.
        record: of its run.
        stage: which levels.
        start: the epoch after which they go on, 0 at the branch.
        branch: the dense network there, with a levels axis of one.
        predictions: the dense network's on test, an array an epoch, or None.
        batch: what the criterion looks at.
    """
    setup, levels, steps = running.setup, len(stage.levels), running.steps
    assert stage.arm is not None
    if start:
        carry = _load_carry(running, record, stage, start)
        target = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, bool), carry.params)
        masks = jax.tree.map(jnp.asarray, record.load(stage, start, "masks", target))
    else:
        carry = jax.tree.map(lambda x: jnp.repeat(x, levels, axis=0), branch)
        masks = keep_all(carry.params)
    parts, updates, failed = [Part(carry, masks)], _updates(running, stage), np.zeros(levels, bool)
    shrinks, first_epoch, sizes = stage.arm.granularity == "unit", running.branch + 1, None
    masked = False  # whether the levels train on under masks that stay
    if shrinks and max(updates) < (start + 1 - first_epoch) * steps:
        parts, _ = _smaller(running, record, parts, masked)
        masked = parts[0].plan is None
    for epoch in range(max(start + 1, first_epoch), setup.study.epochs + 1):
        first = (epoch - first_epoch) * steps
        due = {step - first: n for step, n in updates.items() if 0 <= step - first < steps}
        parts, losses, spent = train_epoch(running, stage, epoch, parts, due, failed, batch)
        masks = parts[0].masks if parts[0].plan is None else masks
        # After the last update the masks stay, and so do the smaller networks; the widths before
        # are not worth compiling for.
        scored_parts = parts
        if shrinks and max(updates) < first + steps:
            parts, scored_parts = _smaller(running, record, parts, masked)
            masked = parts[0].plan is None
        reference = None if predictions is None else jnp.asarray(predictions[epoch - 1])
        scored, _, spent["eval_seconds"] = score(running, scored_parts, reference)
        new = ~np.isfinite(losses + scored["val_loss"]) & ~failed
        if new.any():
            record.note(str(diverged(stage, epoch, int(np.argmax(new)))))
        failed |= new
        if due or sizes is None:
            sizes = sizes_of(masks, setup)
        record.append(make_rows(stage, epoch, scored, sizes, spent))
        record.save(stage, epoch, masks=masks, **expand(parts, setup)._asdict())
        record.thin(stage)


def _updates(running: Running, stage: Stage) -> dict[int, Counts]:
    """Return the counts of every update of the masks, by the step after the branch."""
    assert stage.arm is not None
    pruning = phases(running.setup.study.epochs)[1]
    targets = [sparsity_of_level(level) for level in stage.levels]
    steps = schedules.update_steps(pruning * running.steps, pruning * UPDATES_PER_EPOCH)
    return {
        step: running.setup.counts(
            stage.arm, [t * schedules.cubic_share(progress) for t in targets]
        )
        for step, progress in steps.items()
    }


def _smaller(
    running: Running, record: Record, parts: list[Part], masked: bool
) -> tuple[list[Part], list[Part]]:
    """Take pruned units out where masks stay; return the parts to train on, and to score.

    They are the same if the optimizer trains what is left as it does the whole; that it does not
    is known where levels are `masked` since an earlier epoch.
    """
    setup, (carry, masks, plan, _) = running.setup, parts[0]
    if plan is not None:
        return parts, parts
    if not masked and elementwise(carry, masks, setup):
        return (small := compact(carry, masks, setup, setup.joined)), small
    record.note(
        "the optimizer does not update each weight by itself: units stay, masked, in training"
    )
    return parts, compact(carry._replace(opt_state=()), masks, setup, setup.scoring)


def _load_carry(running: Running, record: Record, stage: Stage, epoch: int) -> TrainState:
    """Return a saved state with a levels axis; the dense stage's, saved without, gets one."""
    setup = running.setup

    def make() -> TrainState:
        carry = init_state(setup.network, jax.random.key(0), setup.optimizer)
        return carry if stage.arm is None else repeat(carry, len(stage.levels))

    target = jax.eval_shape(make)._asdict()
    loaded = {name: record.load(stage, epoch, name, tree) for name, tree in target.items()}
    found = TrainState(**jax.tree.map(jnp.asarray, loaded))
    return trees.stack([found]) if stage.arm is None else found
