"""The programs that a study compiles: training, scoring, recalibrating and selecting masks.

`setup` says what they are of; `stages` calls them. All levels run in one program, under masks, or
each as the smaller network that is left of it (`parts`).
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import criteria, trees
from jaxprune.config import Arm
from jaxprune.evaluate import make_score
from jaxprune.masks import apply_masks, masks_at
from jaxprune.study.setup import Setup
from jaxprune.train import make_recalibrate, make_train
from jaxprune.types import Array, Batch, Counts, Masks, Network, Params, State

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


class Pair(NamedTuple):
    """How a network, whole or smaller, is trained and scored."""

    train: Callable
    score: Callable


class Programs:
    """Each program is compiled once for one network and once for all levels that it runs.

    Attributes:
        clock: has counted what was compiled.
        whole: training and scoring of the network under masks.
        recalibrate: see `train.make_recalibrate`.
    """

    def __init__(self, setup: Setup):
        self.clock, self._setup = Clock(), setup
        self._smaller: dict[Any, Pair] = {}
        self._selections: dict[Any, Callable] = {}
        self.whole = self._pair(setup.network)
        recalibrate = make_recalibrate(setup.network, stepped=setup.stepped, jit=self.clock.jit)
        self.recalibrate = recalibrate if setup.stepped else self.clock.jit(recalibrate)

    def _pair(self, network: Network) -> Pair:
        setup, jit = self._setup, self.clock.jit
        options = {"levels_at_once": setup.study.levels_at_once, "stepped": setup.stepped}
        train = make_train(network, setup.optimizer, task=setup.task, **options, jit=jit)
        score = make_score(network, setup.task, batch_size=_EVALUATION_BATCH, **options, jit=jit)
        return Pair(train, score) if setup.stepped else Pair(jit(train), jit(score))

    def smaller(self, signature: Any, network: Callable[[], Network]) -> Pair:
        """Return training and scoring of a smaller network, compiled once a signature."""
        if signature not in self._smaller:
            self._smaller[signature] = self._pair(network())
        return self._smaller[signature]

    def select(
        self, arm: Arm, params: Params, state: State, batch: Batch, counts: Counts
    ) -> tuple[Masks, Any]:
        """Return the masks of all levels of one network, and which leaves' scores are not finite.

        Args:
            arm: says criterion and granularity.
            params: of one network.
            state: likewise.
            batch: what the criterion looks at.
            counts: with a levels axis.
        """
        kind = "select", arm.criterion, arm.granularity
        if kind not in self._selections:
            setup = self._setup

            def select(params: Params, state: State, batch: Batch, counts: Counts) -> Any:
                scores = setup.scores(arm, params, state, batch)
                masks = masks_at(scores, counts, granularity=setup.granularities[arm.granularity])
                return masks, criteria.non_finite(scores, setup.flags)

            self._selections[kind] = self.clock.jit(select)
        return self._selections[kind](params, state, batch, counts)

    def select_within(
        self, arm: Arm, params: Params, state: State, masks: Masks, batch: Batch, counts: Counts
    ) -> tuple[Masks, Any]:
        """Return each level's next masks, nested in its last; arguments have a levels axis."""
        kind = "within", arm.criterion, arm.granularity
        if kind not in self._selections:
            self._selections[kind] = self._within(arm)
        return self._selections[kind](params, state, masks, batch, counts)

    def _within(self, arm: Arm) -> Callable:
        setup = self._setup
        granularity = setup.granularities[arm.granularity]

        def one(level: Any, batch: Batch) -> tuple[Masks, Array]:
            params, state, masks, counts = level
            scores = setup.scores(arm, apply_masks(params, masks), state, batch)
            new = masks_at(scores, counts, granularity=granularity, within=masks)
            return new, criteria.non_finite(scores, setup.flags)

        if setup.stepped:
            program = self.clock.jit(one)

            def on_host(params: Any, state: Any, masks: Any, batch: Batch, counts: Any) -> Any:
                levels = trees.unstack((params, state, masks, counts))
                return trees.stack([program(level, batch) for level in levels])

            return on_host

        def select(params: Any, state: Any, masks: Any, batch: Batch, counts: Any) -> Any:
            levels = params, state, masks, counts
            return trees.map_levels(
                lambda level: one(level, batch), levels, setup.study.levels_at_once
            )

        return self.clock.jit(select)
