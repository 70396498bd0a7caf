"""Distributions that look at data: how many weights of each layer go, at one sparsity of all.

Each is a `scope` of `distribution.counts`, which hands it `problem` and `batch`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.criteria.inputs import wanda
from jaxprune.distribution import num_pruned, shared
from jaxprune.masks import apply_masks, masks_at
from jaxprune.types import Array, Batch, Counts, Granularity, Params, Problem, Scores

_GRID = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99, 1.0)


def owl(
    params: Params,
    granularity: Granularity,
    sparsity: Any,
    *,
    problem: Problem,
    batch: Batch,
    times: float = 5.0,
    most: float = 0.08,
    **others: Any,
) -> Counts:
    r"""Prune layers with many outliers less.

    Outliers of a leaf are weights whose score by `wanda`, $|w_{ij}| \, \|x_i\|$, is more than
    `times` the mean of the leaf. Sparsities differ from their mean by what the shares of outliers
    do, stretched to a range of $2$ `most`, or of two thirds of what is left, where that is less: so
    no layer is emptied.

    Args:
        params: the parameters.
        granularity: of pieces of single leaves.
        sparsity: in [0, 1], or a sequence of these.
        problem: gives the outputs.
        batch: what inputs are taken of.
        times: so many times the mean is an outlier.
        most: half the range of sparsities, at most.
        others: not looked at.

    Returns:
        The tree of the pieces, int32, which sum up to what `globally` prunes.

    Raises:
        ValueError: pieces that are of no single leaf, as groups are.

    Reference:
        Yin et al. Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs
        to High Sparsity. ICML 2024. There of blocks of a transformer, here of leaves, weighted by
        their size.
    """
    pieces = granularity.cost(params)
    if jax.tree.structure(pieces) != jax.tree.structure(params):
        raise ValueError(f"scope owl is of leaves, and pieces of {granularity.name} are of several")
    scores = jax.jit(lambda params, batch: wanda(params, problem, batch, per="layer"))
    sizes = np.array([leaf.size for leaf in jax.tree.leaves(pieces)])
    ratios = np.array([
        float(jnp.mean(leaf > times * jnp.mean(leaf))) if size else 0.0
        for leaf, size in zip(jax.tree.leaves(scores(params, batch)), sizes, strict=True)
    ])  # fmt: skip
    there = sizes > 0
    span = np.ptp(ratios[there]) if there.any() else 0.0
    offset = 2 * ratios / (span if span > 0 else 1)
    offset -= np.average(offset, weights=sizes) if there.any() else 0

    def wanted(target: float) -> np.ndarray:
        return np.clip(sizes * (target - min(most, (1 - target) / 3) * offset), 0, sizes)

    return shared(pieces, sparsity, wanted)


def by_loss(
    params: Params,
    granularity: Granularity,
    sparsity: Any,
    *,
    problem: Problem,
    batch: Batch,
    scores: Scores | None = None,
    **others: Any,
) -> Counts:
    """Share a sparsity out so that the loss should rise least, as each layer's own error tells.

    Each leaf, or group, is pruned alone to eleven levels, and the loss of the batch measured. Of
    the convex hulls of these curves the flattest pieces are taken first, which is what a Lagrangian
    multiplier does: errors of layers are taken to add up.

    Args:
        params: the parameters.
        granularity: what is pruned as one.
        sparsity: in [0, 1], or a sequence of these.
        problem: gives the losses.
        batch: the examples.
        scores: what decides within a leaf.
        others: not looked at.

    Returns:
        The tree of the pieces, int32, which sum up to what `globally` prunes; rising with levels.

    Raises:
        ValueError: no scores, as of methods that choose weights layer by layer.

    Reference:
        Frantar, Alistarh. SPDY: Accurate Pruning with Speedup Guarantees. ICML 2022, whose errors
        are of layers' outputs, and found together by dynamic programming.
    """
    if scores is None:
        raise ValueError("scope by_loss needs scores to try layers by, and this method has none")
    pieces = granularity.cost(params)
    leaves, tree = jax.tree.flatten(pieces)
    sizes = [leaf.size for leaf in leaves]

    @jax.jit
    def loss(params: Params, scores: Scores, batch: Batch, counts: Counts) -> Array:
        masks = masks_at(scores, counts, granularity=granularity)
        return jnp.mean(problem.losses(apply_masks(params, masks), batch))

    def measured(index: int, count: int) -> float:
        counts = [np.int32(count if i == index else 0) for i in range(len(sizes))]
        return float(loss(params, scores, batch, jax.tree.unflatten(tree, counts)))

    steps: list[tuple[float, int, int]] = []  # slope, leaf, pieces
    for index, size in enumerate(sizes):
        grid = sorted({num_pruned(size, share) for share in _GRID})
        errors = np.maximum.accumulate([measured(index, count) for count in grid if size])
        hull = _lower_hull(grid, errors)
        steps += [
            ((errors[b] - errors[a]) / (grid[b] - grid[a]), index, grid[b] - grid[a])
            for a, b in zip(hull, hull[1:], strict=False)
        ]
    steps.sort(key=lambda step: step[0])  # stable: of a leaf, slopes rise

    def wanted(target: float) -> np.ndarray:
        found, left = np.zeros(len(sizes)), num_pruned(sum(sizes), target)
        for _, index, count in steps:
            found[index] += min(count, left)
            left -= min(count, left)
        return found

    return shared(pieces, sparsity, wanted)


def _lower_hull(x: Sequence[int], y: Any) -> list[int]:
    """Return the indices of the points of the lower convex hull."""
    hull: list[int] = []
    for i in range(len(y)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return hull
