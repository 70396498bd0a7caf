"""The groups of a sweep, run one after another: the dense ones, and the trained ones.

A seed's dense group trains the dense network and, after every epoch, scores it pruned at all levels
(`one_shot`). A trained group, one a method and seed, branches off it and trains all levels at once,
each under its masks. After every epoch a group writes its rows and then its state, so a kill costs
an epoch of one group at most. Settings come in from `sweep`, programs from `programs`.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import config, schedules, sparsity
from jaxprune.data import Data
from jaxprune.masks import warn_of_emptied
from jaxprune.results import Row
from jaxprune.study.curve import Remaining, keep_all, make_rows, name_of, sizes_of
from jaxprune.study.programs import Programs
from jaxprune.study.record import Record
from jaxprune.train import TrainState, batch_indices, init_state
from jaxprune.types import (
    Apply,
    Array,
    Counts,
    Granularity,
    Masks,
    Metrics,
    Params,
    Prunable,
    Scope,
    Scores,
)

UPDATES_PER_EPOCH = 10
_CALL_SECONDS = 4.0  # the length of a training call that is aimed at; Ctrl-C is heard between calls


class Progress(NamedTuple):
    """Where a sweep is, told after every training call."""

    seed: int
    protocol: str  # `dense` in the dense group
    method: str
    epoch: int
    epochs: int
    levels: tuple[float, ...]  # in percent
    losses: tuple[float, ...]  # each level's mean training loss over the call, in nats
    rate: float  # training examples a second, all levels counted
    done: float  # the part of the sweep that is done, in [0, 1]
    seconds_left: float


class Sweep:
    """The compiled programs of a sweep, and the loops over seeds, epochs and calls."""

    def __init__(
        self, *, init: Callable[[Array], Params], apply: Apply,
        optimizer: optax.GradientTransformation, scores: Callable[[Params], Scores], data: Data,
        record: Record, report: Callable[[Progress], None], levels: tuple[float, ...], epochs: int,
        methods: tuple[Granularity, ...], protocols: tuple[str, ...], batch_size: int, scope: Scope,
        prunable: Prunable | None, remaining: Remaining | None,
    ):  # fmt: skip
        self.init, self.optimizer, self.data = init, optimizer, data
        self.record, self.report = record, report
        self.levels, self.epochs, self.methods, self.protocols = levels, epochs, methods, protocols
        self.batch_size, self.prunable, self.remaining = batch_size, prunable, remaining
        self.scope, self.criterion = scope, name_of(scores)
        self.pruned = tuple(level for level in levels if level != 0)
        self.targets = [config.sparsity_of_level(level) for level in self.pruned]
        self.dense_epochs, self.pruning_epochs, _ = config.phases(epochs)
        self.steps = len(data.train.y) // batch_size
        self.step_seconds: dict[tuple[int, bool], float] = {}  # by number of levels, and masked

        self.programs = Programs(
            apply, optimizer, scores, methods, scope, prunable,
            record.add_compilation,
        )  # fmt: skip

    def options(self, method: Granularity) -> dict[str, Any]:
        """Return what `counts` and `masks_at` are to agree on."""
        return {"granularity": method, "scope": self.scope, "prunable": self.prunable}

    def run(self, seeds: int) -> None:
        """Run, or go on with, all seeds."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        for method in self.methods if self.pruned else ():
            counts = sparsity.counts(shapes, self.targets, **self.options(method))
            warn_of_emptied(shapes, counts, method, self.prunable)
        starts = [self.resume(seed) for seed in range(seeds)]
        self.work = sum(self.work_of(*start) for start in starts)
        self.worked = 0
        self.since: tuple[int, float] | None = None  # work and time before the first call
        for seed, start in enumerate(starts):
            self.run_seed(seed, *start)
            self.record.thin([dense_group(seed), *(trained_group(m, seed) for m in start[1])][-1])

    def work_of(self, dense: int, trained: dict[Granularity, int]) -> int:
        """Return the work left of a seed, in forward passes of an example."""
        pruned, methods = len(self.pruned), len(self.methods)
        scored = len(self.data.val.y) + len(self.data.test.y)
        training = 3 * self.steps * self.batch_size  # a backward pass costs two forward passes
        one_shot = pruned * methods if "one_shot" in self.protocols else 0
        return (self.epochs - dense) * (training + scored * (1 + one_shot)) + sum(
            (self.epochs - max(start, self.dense_epochs)) * pruned * (training + scored)
            for start in trained.values()
        )

    def resume(self, seed: int) -> tuple[int, dict[Granularity, int]]:
        """Return the epochs after which a seed's dense and trained groups go on."""
        trained: dict[Granularity, int] = {
            method: self.record.resume(
                trained_group(method, seed), {"params", "masks"}, {"params", "masks", "opt_state"},
                lambda epoch: len(self.pruned) * (epoch > self.dense_epochs),
            )
            for method in self.methods if "trained" in self.protocols and self.pruned
        }  # fmt: skip

        def expected(epoch: int) -> int:
            rows = len(self.protocols) * (0 in self.levels)
            rows += len(self.pruned) * ("one_shot" in self.protocols)
            rows += len(self.pruned) * ("trained" in self.protocols and epoch <= self.dense_epochs)
            return rows * len(self.methods)

        group, state = dense_group(seed), {"params", "opt_state", "predictions"}
        dense = self.record.resume(group, {"params", "one_shot", "predictions"}, state, expected)
        branch = self.dense_epochs
        if 0 < branch <= dense and 0 in trained.values() and not self.record.holds(
            group, branch, state
        ):  # fmt: skip
            self.record.note(f"{group} starts again: its state after epoch {branch} is lost")
            self.record.forget(group, 0)
            dense = 0
        return dense, trained

    def run_seed(self, seed: int, dense: int, trained: dict[Granularity, int]) -> None:
        """Run, or go on with, the groups of a seed."""
        branching = any(start == 0 for start in trained.values())
        branch, predictions = self.run_dense(seed, dense, branching)
        for method, start in trained.items():
            if start < self.epochs:
                self.run_trained(method, seed, start, branch, predictions)

    def run_dense(
        self, seed: int, start: int, branching: bool
    ) -> tuple[TrainState | None, np.ndarray]:
        """Train a seed's dense network and score it, dense and one-shot, after every epoch.

        Returns:
            The state after the dense epochs, with a levels axis of one, if `branching` wants it;
            and the predictions on test, (epochs, examples).
        """
        group = dense_group(seed)
        initial = _stack(init_state(self.init(_keys(seed)[0]), self.optimizer), 1)
        state, predictions = initial, np.zeros((self.epochs, len(self.data.test.y)), np.int32)
        if start:
            state = _stack(self.load_state(group, start), 1) if start < self.epochs else initial
            predictions = self.record.load(group, start, "predictions").copy()
        branch = None
        if branching and self.dense_epochs <= start:
            at = self.dense_epochs
            branch = _stack(self.load_state(group, at), 1) if at else initial
        dense = keep_all(_first(initial.params))
        for epoch in range(start + 1, self.epochs + 1):
            state, _, seconds = self.train_epoch(state, dense, seed, "dense", "", epoch, {})
            (scored, labels), eval_seconds = self.evaluate(state.params, dense, None)
            self.check_finite(scored.val_loss, seed, "dense", "", epoch)
            self.record.add_seconds("dense_training", seconds["train_seconds"])
            self.record.add_seconds("dense_evaluation", eval_seconds)
            predictions[epoch - 1] = labels[0]
            params, masks = _first(state.params), {}
            rows = self.shared_rows(seed, epoch, dense, scored)
            if "one_shot" in self.protocols and self.pruned:
                for method in self.methods:
                    masks[method], found = self.one_shot(method, seed, epoch, params, labels[0])
                    rows += found
            self.record.append(rows)
            items = {"params": params, "opt_state": _first(state.opt_state)}
            if epoch == self.epochs:
                items["one_shot"] = masks
            self.record.save(group, epoch, self.branch_of(seed), predictions=predictions, **items)
            branch = state if epoch == self.dense_epochs else branch
        return branch, predictions

    def branch_of(self, seed: int) -> str | None:
        """Name the checkpoint that trained groups branch off."""
        return (
            f"{dense_group(seed)}/{self.dense_epochs:04d}" if "trained" in self.protocols else None
        )

    def shared_rows(self, seed: int, epoch: int, dense: Masks, scored: Metrics) -> list[Row]:
        """Return the dense network's rows: level 0, and every level while it is still dense."""
        sizes = sizes_of(dense, self.prunable, self.remaining)
        rows = []
        for protocol in self.protocols:
            still_dense = protocol == "trained" and epoch <= self.dense_epochs
            levels = [level for level in self.levels if still_dense or level == 0]
            n = len(levels)
            same = jax.tree.map(lambda x, n=n: np.repeat(x, n, axis=0), scored)
            for method in self.methods:
                identity = self.identity(protocol, method, seed, epoch)
                rows += make_rows(identity, levels, same, sizes * n, {})
        return rows

    def one_shot(
        self, method: Granularity, seed: int, epoch: int, params: Params, reference: Array
    ) -> tuple[Masks, list[Row]]:
        """Prune a dense network at all levels and score it; return the masks and the rows."""
        counts = sparsity.counts(params, self.targets, **self.options(method))
        masks, mask_seconds = self.programs.select[method](params, counts)
        stacked = _stack(params, len(self.pruned))
        (scored, _), eval_seconds = self.evaluate(
            stacked, masks, reference, smaller=method == "unit"
        )
        sizes = sizes_of(masks, self.prunable, self.remaining)
        seconds = {"mask_seconds": mask_seconds, "eval_seconds": eval_seconds}
        identity = self.identity("one_shot", method, seed, epoch)
        return masks, make_rows(identity, self.pruned, scored, sizes, seconds)

    def run_trained(
        self,
        method: Granularity,
        seed: int,
        start: int,
        branch: TrainState | None,
        predictions: np.ndarray,
    ) -> None:
        """Train all levels from the branch on, under masks that follow the schedule."""
        group, count = trained_group(method, seed), len(self.pruned)
        if start:
            state = self.load_state(group, start, count)
            masks = jax.tree.map(jnp.asarray, self.record.load(group, start, "masks"))
        else:
            assert branch is not None
            state = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), branch)
            masks = keep_all(_first(state.params), count)
        updates = {
            step: sparsity.counts(
                _first(state.params),
                [schedules.cubic(target, progress) for target in self.targets],
                **self.options(method),
            )
            for step, progress in schedules.update_steps(
                self.pruning_epochs * self.steps, self.pruning_epochs * UPDATES_PER_EPOCH
            ).items()
        }
        for epoch in range(max(start, self.dense_epochs) + 1, self.epochs + 1):
            first = (epoch - self.dense_epochs - 1) * self.steps
            due = {step - first: n for step, n in updates.items() if 0 <= step - first < self.steps}
            where = seed, "trained", method, epoch
            if due or method != "unit":
                state, masks, seconds = self.train_epoch(state, masks, *where, due)
            else:  # the masks stay, and so do the smaller networks
                smaller = self.programs.smaller(
                    state.params, masks, self.data.val.x[:2], fold=False
                )
                levels, _, seconds = self.train_epoch(
                    smaller.shrink(state), smaller.masks, *where, {}, smaller.train
                )
                state = smaller.expand(levels)
            # The widths between two updates are not worth compiling for.
            final = method == "unit" and not any(step >= first + self.steps for step in updates)
            (scored, _), seconds["eval_seconds"] = self.evaluate(
                state.params, masks, predictions[epoch - 1], smaller=final
            )
            self.check_finite(scored.val_loss, seed, "trained", method, epoch)
            sizes = sizes_of(masks, self.prunable, self.remaining)
            identity = self.identity("trained", method, seed, epoch)
            self.record.append(make_rows(identity, self.pruned, scored, sizes, seconds))
            self.record.save(
                group, epoch, self.branch_of(seed),
                params=state.params, masks=masks, opt_state=state.opt_state,
            )  # fmt: skip

    def train_epoch(
        self, state: Any, masks: Any, seed: int, protocol: str, method: str, epoch: int,
        updates: dict[int, Counts], train_some: Callable | None = None,
    ) -> tuple[Any, Any, dict[str, float]]:  # fmt: skip
        """Train all levels for an epoch, with the updates of the masks that are due in it.

        `state` and `masks` are what `train_some` takes, by default the program of all levels.
        """
        levels = self.pruned if protocol == "trained" else (0.0,)
        train, seconds = self.data.train, {"train_seconds": 0.0, "mask_seconds": 0.0}
        key = jax.random.fold_in(_keys(seed)[1], epoch)
        batches = batch_indices(key, len(train.y), self.batch_size)
        step = 0
        while step < self.steps:
            if step in updates:
                masks, elapsed = self.programs.select_within[method](
                    state.params, masks, updates[step]
                )
                seconds["mask_seconds"] += elapsed
            kind = len(levels), train_some is None
            wanted = max(1, int(_CALL_SECONDS / self.step_seconds.get(kind, _CALL_SECONDS)))
            stop = min([self.steps, step + wanted, *(u for u in updates if u > step)])
            (state, losses), elapsed = (train_some or self.programs.train)(
                state, masks, train.x, train.y, batches, np.int32(step), np.int32(stop)
            )
            seconds["train_seconds"] += elapsed
            self.step_seconds[kind] = elapsed / (stop - step)
            losses = np.asarray(losses)[:, step:stop].mean(axis=1)
            self.check_finite(losses, seed, protocol, method, epoch)
            examples = (stop - step) * self.batch_size * len(levels)
            self.worked += 3 * examples
            if self.since is None:
                self.since = self.worked - 3 * examples, time.perf_counter() - elapsed
            pace = (time.perf_counter() - self.since[1]) / (self.worked - self.since[0])
            self.report(
                Progress(
                    seed, protocol, method, epoch, self.epochs, levels, tuple(losses.tolist()),
                    examples / elapsed, self.worked / self.work,
                    pace * (self.work - self.worked),
                )
            )  # fmt: skip
            step = stop
        return state, masks, seconds

    def evaluate(
        self, params: Params, masks: Masks, reference: Any, *, smaller: bool = False
    ) -> tuple[Any, float]:
        """Score stacked networks: (metrics, predictions), and the seconds it took.

        `smaller`: each as what is left of it, where units are pruned.
        """
        val, test = self.data.val, self.data.test
        self.worked += len(jax.tree.leaves(masks)[0]) * (len(val.y) + len(test.y))
        if not smaller:
            return self.programs.score(params, masks, val, test, reference)
        started = time.perf_counter()
        networks = self.programs.smaller(params, masks, val.x[:2], fold=True)
        seconds = time.perf_counter() - started
        scored, elapsed = networks.score(val, test, reference)
        return scored, seconds + elapsed

    def check_finite(self, losses: Any, seed: int, protocol: str, method: str, epoch: int) -> None:
        """Raise `config.TrainingDiverged` if a level's loss is not finite."""
        wrong = np.flatnonzero(~np.isfinite(losses))
        if wrong.size:
            level = self.pruned[wrong[0]] if protocol == "trained" else 0
            raise config.TrainingDiverged(
                f"the loss is not finite at epoch {epoch}, level {level:g}%, seed {seed} "
                f"({' '.join(filter(None, (protocol, method)))}); try a smaller learning rate"
            )

    def identity(self, protocol: str, method: str, seed: int, epoch: int) -> dict[str, Any]:
        """Return the fields that name a row, but for its level."""
        return {
            "protocol": protocol, "criterion": self.criterion, "method": method,
            "scope": self.scope, "seed": seed, "epoch": epoch,
        }  # fmt: skip

    def load_state(self, group: str, epoch: int, levels: int | None = None) -> TrainState:
        """Return a saved state; `levels` is the length of its levels axis, if it has one."""

        def make() -> TrainState:
            state = init_state(self.init(jax.random.key(0)), self.optimizer)
            return state if levels is None else _stack(state, levels)

        target = jax.eval_shape(make)
        return jax.tree.map(
            jnp.asarray,
            TrainState(*(
                self.record.load(group, epoch, name, getattr(target, name))
                for name in TrainState._fields
            )),
        )  # fmt: skip


def dense_group(seed: int) -> str:
    """Name a seed's dense group."""
    return f"dense-seed{seed}"


def trained_group(method: str, seed: int) -> str:
    """Name the group of a method and seed."""
    return f"trained-{method}-seed{seed}"


def _keys(seed: int) -> Array:
    """Return the keys of the initial weights and of the batches."""
    return jax.random.split(jax.random.key(seed))


def _stack(tree: Any, levels: int) -> Any:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (levels, *jnp.shape(x))), tree)


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)
