"""Every sparsity level of a network trained elsewhere; and how metrics become rows."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import config, sparsity
from jaxprune.data import Data
from jaxprune.evaluate import evaluate_levels
from jaxprune.masks import masks_at, sparsity_of, warn_of_emptied
from jaxprune.results import Row
from jaxprune.scores import magnitude
from jaxprune.types import Apply, Granularity, Masks, Metrics, Params, Prunable, Scope, Scores

Remaining = Callable[[Masks], int]


def prune_curve(
    apply: Apply,
    params: Params,
    data: Data,
    levels: Sequence[int | float] = config.LEVELS,
    *,
    methods: Sequence[Granularity] = config.METHODS,
    scores: Callable[[Params], Scores] = magnitude,
    scope: Scope = "layer",
    prunable: Prunable | None = None,
    remaining: Remaining | None = None,
    batch_size: int = 1000,
) -> list[Row]:
    """Prune a network trained elsewhere at every level and score it.

    Args:
        apply: `apply(params, x) -> logits`.
        params: its parameters.
        data: `val` fits the temperature, `test` is reported.
        levels: sparsities in percent.
        methods: `weight`, `unit` or both.
        scores: the criterion.
        scope: `layer` or `global`.
        prunable: which leaves take part; see `trees.prunable_leaves`.
        remaining: counts the weights left once pruned units are removed, such as
            `models.mlp_remaining`; without it rows say None.
        batch_size: examples in a batch of the evaluation.

    Returns:
        A `Row` a method and level, of protocol `one_shot`, seed 0 and epoch 0. Churn is against
        the network as given. Seconds include compilation.

    Raises:
        ValueError: levels out of range, or parameters that cannot be pruned.

    Example:
        >>> from jaxprune.data import Split
        >>> images = Split(np.eye(2, dtype=np.float32), np.arange(2, dtype=np.int32))
        >>> params = {"hidden": jnp.diag(jnp.array([2.0, 1.0])), "logits": jnp.eye(2)}
        >>> rows = prune_curve(
        ...     lambda p, x: x @ p["hidden"] @ p["logits"],
        ...     params,
        ...     Data(images, images, images),
        ...     levels=(0, 50),
        ...     methods=("unit",),
        ... )
        >>> [(row.target_sparsity, row.accuracy) for row in rows]
        [(0.0, 1.0), (0.5, 0.5)]
    """
    levels = tuple(map(float, levels))
    config.check_levels(levels)
    config.check_choices("methods", tuple(methods), config.METHODS)
    targets = [config.sparsity_of_level(level) for level in levels]
    _, dense = evaluate_levels(apply, params, keep_all(params), data, batch_size=batch_size)
    rows = []
    for method in methods:
        options: Any = {"granularity": method, "scope": scope, "prunable": prunable}
        pruned = sparsity.counts(params, targets, **options)
        warn_of_emptied(params, pruned, method, prunable)
        started = time.perf_counter()
        masks = jax.block_until_ready(masks_at(scores(params), pruned, **options))
        masked = time.perf_counter()
        scored, _ = jax.block_until_ready(
            evaluate_levels(apply, params, masks, data, reference=dense[0], batch_size=batch_size)
        )
        identity = {
            "protocol": "one_shot", "criterion": name_of(scores), "method": method,
            "scope": scope, "seed": 0, "epoch": 0,
        }  # fmt: skip
        seconds = {"mask_seconds": masked - started, "eval_seconds": time.perf_counter() - masked}
        rows += make_rows(identity, levels, scored, sizes_of(masks, prunable, remaining), seconds)
    return rows


def name_of(scores: Callable[[Params], Scores]) -> str:
    """Return the name of a criterion, a function or a callable object."""
    return getattr(scores, "__name__", type(scores).__name__)


def keep_all(params: Params, levels: int = 1) -> Masks:
    """Return masks, with a levels axis, that prune nothing."""
    return jax.tree.map(lambda w: jnp.ones((levels, *jnp.shape(w)), bool), params)


def sizes_of(
    masks: Masks, prunable: Prunable | None, remaining: Remaining | None
) -> list[dict[str, Any]]:
    """Return every level's achieved `sparsity`, `total_sparsity` and `remaining`.

    Args:
        masks: concrete masks with a leading levels axis.
        prunable: which leaves `sparsity` counts.
        remaining: as in `prune_curve`.
    """
    stacked = jax.tree.map(np.asarray, masks)
    leaves = jax.tree.leaves(stacked)
    weights = sum(leaf[0].size for leaf in leaves)
    each = [jax.tree.map(lambda m, i=i: m[i], stacked) for i in range(len(leaves[0]))]
    return [
        {
            "sparsity": sparsity_of(level, prunable=prunable),
            "total_sparsity": sum(int((~m).sum()) for m in jax.tree.leaves(level)) / weights,
            "remaining": None if remaining is None else remaining(level),
        }
        for level in each
    ]


def make_rows(
    identity: dict[str, Any],
    levels: Sequence[float],
    scored: Metrics,
    sizes: list[dict[str, Any]],
    seconds: dict[str, float],
) -> list[Row]:
    """Return a row a level.

    Args:
        identity: the fields that name the rows, but for the level.
        levels: in percent.
        scored: metrics with a leading levels axis.
        sizes: what `sizes_of` returns.
        seconds: wall time of all levels together, by the name of its field; 0 if not named.
    """
    share: dict[str, Any] = {
        name: seconds.get(name, 0.0) / max(len(levels), 1)
        for name in ("train_seconds", "mask_seconds", "eval_seconds")
    }
    values = {name: np.asarray(value) for name, value in scored._asdict().items()}
    return [
        Row(
            **identity,
            target_sparsity=float(config.sparsity_of_level(level)),
            **sizes[i],
            **{name: _plain(value[i]) for name, value in values.items()},
            **share,
        )
        for i, level in enumerate(levels)
    ]


def _plain(value: Any) -> Any:
    """Return Python floats of 7 significant digits, what float32 holds; None if not finite."""
    if value.ndim:
        return [_plain(v) for v in value]
    return float(f"{value:.7g}") if np.isfinite(value) else None
