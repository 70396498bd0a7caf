"""How masks and metrics become rows."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.config import Arm, sparsity_of_level
from jaxprune.masks import sparsity_of
from jaxprune.results import Row
from jaxprune.study.setup import Setup
from jaxprune.types import Masks, Params


def keep_all(params: Params, levels: int = 1) -> Masks:
    """Return masks, with a levels axis, that prune nothing of parameters that have one."""
    return jax.tree.map(lambda w: jnp.ones((levels, *jnp.shape(w)[1:]), bool), params)


def sizes_of(masks: Masks, setup: Setup) -> list[dict[str, Any]]:
    """Return every level's achieved `sparsity`, `total_sparsity` and `remaining`.

    Args:
        masks: concrete masks with a leading levels axis.
        setup: says which leaves `sparsity` counts, and what remains.
    """
    stacked = jax.device_get(masks)
    leaves = jax.tree.leaves(stacked)
    weights = sum(leaf[0].size for leaf in leaves)
    sizes = []
    for i in range(len(leaves[0])):
        level = jax.tree.map(lambda m, i=i: m[i], stacked)
        pruned = weights - sum(int(np.count_nonzero(m)) for m in jax.tree.leaves(level))
        sizes.append({
            "sparsity": sparsity_of(level, prunable=setup.prunable),
            "total_sparsity": pruned / weights,
            "remaining": setup.remaining(level),
        })  # fmt: skip
    return sizes


def make_rows(
    arm: Arm,
    seed: int,
    epoch: int,
    levels: Sequence[float],
    scored: dict[str, Any],
    sizes: list[dict[str, Any]],
    seconds: dict[str, float],
) -> list[Row]:
    """Return a row a level.

    Args:
        arm: of the rows.
        seed: likewise.
        epoch: likewise.
        levels: in percent.
        scored: metrics with a leading levels axis.
        sizes: what `sizes_of` returns.
        seconds: wall time of all levels together, by the name of its field; 0 if not named.
    """
    share: dict[str, Any] = {
        name: seconds.get(name, 0.0) / max(len(levels), 1)
        for name in ("train_seconds", "mask_seconds", "eval_seconds")
    }
    values = {name: np.asarray(value) for name, value in scored.items()}
    lost = ~np.isfinite(values["val_loss"])  # such a network has no predictions either
    return [
        Row(
            *arm,
            seed=seed,
            epoch=epoch,
            target_sparsity=float(sparsity_of_level(level)),
            **sizes[i],
            metrics={n: None if lost[i] else _plain(value[i]) for n, value in values.items()},
            **share,
        )
        for i, level in enumerate(levels)
    ]


def _plain(value: Any) -> Any:
    """Return Python floats of 7 significant digits, what float32 holds; None if not finite."""
    if value.ndim:
        return [_plain(v) for v in value]
    return float(f"{value:.7g}") if np.isfinite(value) else None
