"""The programs that a study compiles: training, scoring, recalibrating and selecting masks.

`setup` says what they are of; `stages` calls them. All levels run in one program, under masks, or
each as the smaller network that is left of it (`parts`).
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees
from jaxprune.config import Arm
from jaxprune.evaluate import make_score
from jaxprune.masks import apply_masks, masks_at
from jaxprune.study.parts import Part
from jaxprune.study.setup import Setup
from jaxprune.train import make_recalibrate, make_train
from jaxprune.types import (
    Array,
    Batch,
    Counts,
    Granularity,
    Masks,
    Network,
    Params,
    Scores,
    State,
)

_EVALUATION_BATCH = 1000


class Clock:
    """Compiles functions ahead of time, so that compiling is told apart from running.

    Attributes:
        compiling: seconds spent so far.
        count: programs compiled.
    """

    def __init__(self) -> None:
        self.compiling, self.count = 0.0, 0

    def jit(self, f: Callable) -> Callable:
        """Return `f`, compiled once for each structure, shape and dtype of its arguments."""
        jitted, programs = jax.jit(f), {}

        def call(*args: Any) -> Any:
            leaves, structure = jax.tree.flatten(args)
            key = (structure, *((jnp.shape(leaf), leaf.dtype) for leaf in leaves))
            if key not in programs:
                started = time.perf_counter()
                programs[key] = jitted.lower(*args).compile()
                self.compiling += time.perf_counter() - started
                self.count += 1
            return programs[key](*args)

        return call

    def time(self, f: Callable, *args: Any) -> tuple[Any, float]:
        """Return the result, computed, and the seconds that it took without compiling."""
        started, before = time.perf_counter(), self.compiling
        result = jax.block_until_ready(f(*args))
        return result, time.perf_counter() - started - (self.compiling - before)


class Programs:
    """Each program is compiled once for one network and once for all levels that it runs.

    Attributes:
        clock: has counted what was compiled.
    """

    def __init__(self, setup: Setup):
        self.clock, self._setup = Clock(), setup
        self._made: dict[Any, Any] = {}

    def train(
        self, parts: Sequence[Part], x: Any, y: Any, *args: Any
    ) -> tuple[list[Part], np.ndarray, float]:
        """Train all levels; arguments that they share are as in `train.make_train`.

        Returns:
            The parts, the losses, (levels, steps), and the seconds without compiling.
        """
        trained, losses, seconds = [], [], 0.0
        for part in parts:
            program, _ = self._of(part)
            (carry, found), elapsed = self.clock.time(program, *part[:2], x, y, *args)
            trained.append(part._replace(carry=carry))
            losses.append(np.asarray(found))
            seconds += elapsed
        return trained, np.concatenate(losses), seconds

    def score(
        self, parts: Sequence[Part], reference: Any
    ) -> tuple[dict[str, np.ndarray], Any, float]:
        """Score all levels.

        Returns:
            The metrics with a levels axis; the predictions where `reference` is None; and the
            seconds without compiling.
        """
        _, val, test = self._setup.data
        metrics, predictions, seconds = [], None, 0.0
        for part in parts:
            (_, program), (params, state, _) = self._of(part), part.carry
            (found, predictions), elapsed = self.clock.time(
                program, params, state, part.masks, val, test, reference
            )
            metrics.append(jax.tree.map(np.asarray, found))
            seconds += elapsed
        return jax.tree.map(lambda *values: np.concatenate(values), *metrics), predictions, seconds

    def _of(self, part: Part) -> tuple[Callable, Callable]:
        """Return how a part is trained and scored."""
        network = part.network or self._setup.network
        key = "whole" if part.plan is None else part.plan.signature
        return self._once(key, lambda: self._pair(network))

    def _pair(self, network: Network) -> tuple[Callable, Callable]:
        setup, jit = self._setup, self.clock.jit
        options = {"levels_at_once": setup.study.levels_at_once, "stepped": setup.stepped}
        train = make_train(network, setup.optimizer, task=setup.task, **options, jit=jit)
        score = make_score(network, setup.task, batch_size=_EVALUATION_BATCH, **options, jit=jit)
        return (train, score) if setup.stepped else (jit(train), jit(score))

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def recalibrate(self, *args: Any) -> State:
        """Estimate the state anew; see `train.make_recalibrate`."""

        def make() -> Callable[..., State]:
            stepped, jit = self._setup.stepped, self.clock.jit
            made = make_recalibrate(self._setup.network, stepped=stepped, jit=jit)
            return made if stepped else jit(made)

        return self._once("recalibrate", make)(*args)

    def select(
        self, arm: Arm, params: Params, state: State, batch: Batch, counts: Counts
    ) -> tuple[Masks, Any]:
        """Return the masks of all levels of one network, and which pieces' scores are not finite.

        Args:
            arm: says criterion and granularity.
            params: of one network.
            state: likewise.
            batch: what the criterion looks at.
            counts: with a levels axis.
        """
        setup = self._setup

        def select(params: Params, state: State, batch: Batch, counts: Counts) -> Any:
            scores = setup.scores(arm.criterion, params, state, batch)
            granularity = setup.granularities[arm.granularity]
            return masks_at(scores, counts, granularity=granularity), _wrong(scores, granularity)

        program = self._once(("select", *arm[:2]), lambda: self.clock.jit(select))
        return program(params, state, batch, counts)

    def select_within(
        self, arm: Arm, params: Params, state: State, masks: Masks, batch: Batch, counts: Counts
    ) -> tuple[Masks, Any]:
        """Return each level's next masks, nested in its last; arguments have a levels axis."""
        setup, levels = self._setup, (params, state, masks, counts)

        def one(level: Any, batch: Batch) -> tuple[Masks, Array]:
            params, state, masks, counts = level
            scores = setup.scores(arm.criterion, apply_masks(params, masks), state, batch)
            granularity = setup.granularities[arm.granularity]
            new = masks_at(scores, counts, granularity=granularity, within=masks)
            return new, _wrong(scores, granularity)

        def every(levels: Any, batch: Batch) -> tuple[Masks, Array]:
            at_once = setup.study.levels_at_once
            return trees.map_levels(lambda level: one(level, batch), levels, at_once)

        program = self._once(
            ("within", *arm[:2]), lambda: self.clock.jit(one if setup.stepped else every)
        )
        if not setup.stepped:
            return program(levels, batch)
        return trees.stack([program(level, batch) for level in trees.unstack(levels)])


def _wrong(scores: Scores, granularity: Granularity) -> Array:
    """Return of each leaf of the pieces whether some scores in it are NaN or infinite."""
    pieces = jax.tree.leaves(granularity.rank(scores))
    return jnp.array([~jnp.isfinite(leaf).all() for leaf in pieces], bool)
