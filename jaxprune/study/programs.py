"""The programs that a sweep compiles: training, scoring and two selections of masks."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune import evaluate, trees
from jaxprune.masks import apply_masks, masks_at
from jaxprune.train import make_train
from jaxprune.types import Apply, Counts, Granularity, Masks, Params, Prunable, Scope, Scores

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

        score = partial(
            evaluate.score, apply=apply, batch_size=_EVALUATION_BATCH, levels_at_once=None
        )
        self.train = Program(make_train(apply, optimizer), compiled)
        self.score = Program(score, compiled)
        self.select = {m: Program(partial(select, m), compiled) for m in methods}
        self.select_within = {m: Program(partial(select_within, m), compiled) for m in methods}
