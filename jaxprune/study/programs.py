"""The programs that a sweep compiles: training, scoring and two selections of masks.

All levels run in one program, under masks; or each as the smaller network that is left of it.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import evaluate, structure, trees
from jaxprune.data import Split
from jaxprune.masks import apply_masks, masks_at
from jaxprune.train import TrainState, make_train
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

_EVALUATION_BATCH = 1000


class Program:
    """A function compiled ahead of time, so that compiling is told apart from running."""

    def __init__(self, f: Callable, compiled: Callable[[float], None]):
        """Wrap `f`; `compiled` is told the seconds of each compilation."""
        self._jitted, self._tell = jax.jit(f), compiled
        self._compiled: dict[Any, Any] = {}

    def __call__(self, *args: Any) -> tuple[Any, float]:
        """Return the result, computed, and the seconds it took."""
        leaves, treedef = jax.tree.flatten(args)
        key = (treedef, *((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves))
        if key not in self._compiled:
            started = time.perf_counter()
            self._compiled[key] = self._jitted.lower(*args).compile()
            self._tell(time.perf_counter() - started)
        started = time.perf_counter()
        result = jax.block_until_ready(self._compiled[key](*args))
        return result, time.perf_counter() - started


class Programs:
    """Each is compiled once for one network (level 0) and once for all pruned levels.

    Attributes:
        train: `train.make_train`'s.
        score: `evaluate.score(params, masks, val, test, reference)`.
        select: by method, masks of all levels of one network, `(params, counts)`.
        select_within: by method, each level's next masks, `(params, masks, counts)`.
    """

    def __init__(
        self,
        apply: Apply,
        optimizer: optax.GradientTransformation,
        scores: Callable[[Params], Scores],
        methods: Sequence[Granularity],
        scope: Scope,
        prunable: Prunable | None,
        compiled: Callable[[float], None],
    ):
        self._apply, self._optimizer, self._compiled = apply, optimizer, compiled
        self._smaller: dict[Any, tuple[Program, Program]] = {}

        def select(method: Granularity, params: Params, counts: Counts) -> Masks:
            return masks_at(
                scores(params), counts, granularity=method, scope=scope, prunable=prunable
            )

        def select_within(method: Granularity, params: Params, masks: Masks, counts: Counts):
            def one_level(level: tuple[Params, Masks, Counts]) -> Masks:
                params, masks, counts = level
                return masks_at(
                    scores(apply_masks(params, masks)), counts,
                    granularity=method, scope=scope, prunable=prunable, within=masks,
                )  # fmt: skip

            return trees.map_levels(one_level, (params, masks, counts))

        self.train, self.score = self._pair(apply)
        self.select = {m: Program(partial(select, m), compiled) for m in methods}
        self.select_within = {m: Program(partial(select_within, m), compiled) for m in methods}

    def _pair(self, apply: Apply) -> tuple[Program, Program]:
        score = partial(
            evaluate.score, apply=apply, batch_size=_EVALUATION_BATCH, levels_at_once=None
        )
        train = make_train(apply, self._optimizer)
        return Program(train, self._compiled), Program(score, self._compiled)

    def smaller(self, params: Params, masks: Masks, x: Any, *, fold: bool) -> "Smaller":
        """Return the levels as the smaller networks that their masks leave.

        Args:
            params: with a levels axis.
            masks: likewise.
            x: two inputs or more.
            fold: whether constant units may move into biases: the same function, which trains
                otherwise.
        """
        host = jax.tree.map(np.asarray, (params, masks))
        each = [
            jax.tree.map(lambda a, i=i: a[i], host) for i in range(len(jax.tree.leaves(masks)[0]))
        ]
        # Without a warning of units without effect: a sweep warns of it itself, once.
        networks = [structure.Compaction(self._apply, p, m, x, fold=fold) for p, m in each]
        return Smaller(networks, self)

    def of_widths(self, network: structure.Compaction) -> tuple[Program, Program]:
        """Return training and scoring of a smaller network, compiled once a distinct width."""
        if network.signature not in self._smaller:
            self._smaller[network.signature] = self._pair(network.apply)
        return self._smaller[network.signature]


class Smaller:
    """All levels, each a smaller network, with programs that are called as those of all levels.

    Their trees are lists of levels, each with a levels axis of one.
    """

    def __init__(self, networks: Sequence[structure.Compaction], programs: Programs):
        self._networks = networks
        self._pairs = [programs.of_widths(network) for network in networks]
        self.params = [_stacked(network.params) for network in networks]
        self.masks = [_stacked(network.masks) for network in networks]

    def shrink(self, state: TrainState) -> list[TrainState]:
        """Take the levels apart, and the removed units out."""
        host = jax.tree.map(np.asarray, state)
        return [
            _stacked(network.shrink(jax.tree.map(lambda a, i=i: a[i], host)))
            for i, network in enumerate(self._networks)
        ]

    def expand(self, states: Sequence[TrainState]) -> TrainState:
        """Put the removed units back, as zeros, and the levels together."""
        full = [
            network.expand(jax.tree.map(lambda a: a[0], state))
            for network, state in zip(self._networks, states, strict=True)
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *full)

    def train(
        self, states: Sequence[TrainState], masks: Sequence[Masks], *args: Any
    ) -> tuple[tuple[list[TrainState], np.ndarray], float]:
        """Train as `Programs.train`; `args` are what its levels share."""
        found, seconds = [], 0.0
        for (train, _), *level in zip(self._pairs, states, masks, strict=True):
            result, elapsed = train(*level, *args)
            found.append(result)
            seconds += elapsed
        return ([state for state, _ in found], np.concatenate([loss for _, loss in found])), seconds

    def score(self, val: Split, test: Split, reference: Any) -> tuple[tuple[Metrics, Array], float]:
        """Score as `Programs.score`."""
        found, seconds = [], 0.0
        for (_, score), *level in zip(self._pairs, self.params, self.masks, strict=True):
            result, elapsed = score(*level, val, test, reference)
            reference = result[1][0] if reference is None else reference
            found.append(result)
            seconds += elapsed
        return jax.tree.map(lambda *values: jnp.concatenate(values), *found), seconds


def _stacked(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], tree)
