"""Second order through the whole network: blocks of the empirical Fisher information."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import trees
from jaxprune.criteria.corrections import joined, on_the_way, sizes_of
from jaxprune.criteria.gradients import check_gradients, over_examples
from jaxprune.granularity import weight
from jaxprune.masks import masks_at
from jaxprune.types import (
    Array,
    Batch,
    Correction,
    Counts,
    Granularity,
    Masks,
    Params,
    Problem,
    Scores,
)


def fisher_obs(
    *,
    granularity: Granularity | None = None,
    block: int = 32,
    damping: float = 1.0,
    steps: int = 1,
    at_once: int = 8,
) -> Correction:
    r"""Prune the weights that cost the loss least, and correct those of the same block.

    Optimal brain surgeon with the empirical Fisher information in place of the Hessian, in blocks
    of consecutive weights of a leaf: $F = \frac1n \sum g g^T + \lambda I$ over the gradients of
    single examples. Weights with the smallest $w^2 / (2 (F^{-1})_{ii})$ go, all of a level at once,
    and the others of their block move by $-F^{-1} S^T (S F^{-1} S^T)^{-1} S w$, where $S$ selects
    what is pruned.

    Args:
        granularity: what the counts are of; by default `granularity.weight()`.
        block: weights in a block; memory grows with it, (weights × block).
        damping: $\lambda$, as a share of the mean of the diagonal of a leaf's $F$.
        steps: in how many steps, with a Fisher information of the network as it is then.
        at_once: examples whose gradients are held side by side.

    Raises:
        ValueError: when made: numbers that are not positive; when used: blocks that are not
            positive definite.
        TypeError: when used: a leaf is not floating.

    Reference:
        Singh, Alistarh. WoodFisher: Efficient Second-Order Approximation for Neural Network
        Compression. NeurIPS 2020, where blocks are of rank one updates, and what several weights
        ask of a block is added up; Yu et al. The Combinatorial Brain Surgeon. ICML 2022, where it
        is solved together, as here.
    """
    given = {"block": block, "damping": damping, "steps": steps, "at_once": at_once}
    for name, value in given.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    granularity = granularity or weight()

    def prune(
        params: Params, problem: Problem, counts: Counts, batches: Sequence[Batch]
    ) -> tuple[Params, Masks]:
        check_gradients("fisher_obs", params)
        batch, sizes = joined(batches), sizes_of(params, granularity, counts)
        inverses = jax.jit(partial(found_in, problem=problem))

        @jax.jit
        def select(params: Params, found: Any, counts: Counts, masks: Masks | None) -> Masks:
            return masks_at(_worth(params, found), counts, granularity=granularity, within=masks)

        def further(params: Params, masks: Masks | None, counts: Counts, found: Any) -> Any:
            masks = select(params, found, counts, masks)
            return jax.tree.map(_corrected, params, masks, found), masks

        first, solved = inverses(params, batch), []
        _check(first, params)
        each = [
            trees.unstack(on_the_way(counts, sizes, step, steps)) for step in range(1, steps + 1)
        ]
        for level in zip(*each, strict=True):
            own, masks, found = params, None, first
            for step, count in enumerate(level):
                if step:
                    _check(found := inverses(own, batch), params)
                own, masks = further(own, masks, count, found)
            solved.append((own, masks))
        return trees.stack([own for own, _ in solved]), trees.stack([masks for _, masks in solved])

    def found_in(params: Params, batch: Batch, problem: Problem) -> Any:
        with jax.ensure_compile_time_eval():  # reads shapes alone
            none = jax.tree.map(lambda c: jnp.zeros(c.shape, bool), granularity.cost(params))
            blank = jax.tree.map(lambda w: jnp.zeros(jnp.shape(w), bool), params)
            chosen = jax.tree.map(lambda kept: not kept.all(), granularity.spread(none, blank))
        return _inverses(params, problem, batch, chosen, block, damping, at_once)

    def scores(params: Params, problem: Problem, batch: Batch) -> Scores:
        return _worth(params, found_in(params, batch, problem))

    name = f"fisher_obs(steps={steps})" if steps > 1 else "fisher_obs"
    return Correction(name, given, prune, scores)


def _blocks(x: Array, block: int) -> Array:
    """Return the last axes of an array in blocks, padded with zeros: (first, blocks, block)."""
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    padded = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % block)))
    return padded.reshape(len(flat), padded.shape[1] // block, block)


def _inverses(
    params: Params, problem: Problem, batch: Batch, chosen: Any, block: int, damping: float,
    at_once: int,
) -> Any:  # fmt: skip
    """Return of every leaf the inverses of its blocks, (blocks, block, block); none of others."""

    def products(gradients: Params) -> Any:
        parts = jax.tree.map(lambda g, there: g if there else g[:, None][:, :0], gradients, chosen)
        each = jax.tree.map(lambda g: _blocks(g, block), parts)
        return jax.tree.map(lambda g: jnp.einsum("nbi,nbj->bij", g, g), each)

    def inverse(fisher: Array, w: Array) -> Array:
        mean = jnp.sum(jnp.trace(fisher, axis1=1, axis2=2)) / max(w.size, 1)
        scale = damping * jnp.where(mean > 0, mean, 1)
        return _inverse(fisher + scale * jnp.eye(block, dtype=fisher.dtype)[None])

    found = over_examples(params, problem, batch, products, at_once)
    return jax.tree.map(inverse, found, params)


def _inverse(blocks: Array) -> Array:
    """Return the inverses of small positive definite matrices, (blocks, block, block).

    By elimination, all side by side: XLA on CPUs (jax 0.10) may wait for itself for ever in many
    small factorisations.
    """
    index = jnp.arange(blocks.shape[-1])

    def step(k: Array, found: Array) -> Array:
        row, column = (jnp.take(found, k, axis=axis) for axis in (1, 2))
        here, pivot = (index == k)[None], jnp.take(row, k, axis=1)[:, None]
        left = found - column[:, :, None] * (row / pivot)[:, None]
        left = jnp.where(here[:, :, None], (row / pivot)[:, None], left)
        edge = jnp.where(here, 1, -column) / pivot
        return jnp.where(here[:, None], edge[:, :, None], left)

    return jax.lax.fori_loop(0, blocks.shape[-1], step, blocks)


def _worth(params: Params, inverses: Any) -> Scores:
    def leaf(w: Array, inverse: Array) -> Array:
        if not len(inverse):
            return jnp.zeros_like(w)
        diagonal = jnp.diagonal(inverse, axis1=1, axis2=2).ravel()[: w.size].reshape(w.shape)
        return jnp.square(w.astype(diagonal.dtype)) / (2 * diagonal)

    return jax.tree.map(leaf, params, inverses)


@jax.jit
def _corrected(w: Array, mask: Array, inverse: Array) -> Array:
    """Return a leaf without what is not kept, made up for within blocks."""
    if not len(inverse):
        return w
    block = inverse.shape[-1]
    values = _blocks(w[None].astype(inverse.dtype), block)[0]
    goes = ~_blocks(mask[None], block)[0] & (jnp.arange(values.size).reshape(values.shape) < w.size)
    both = goes[:, :, None] & goes[:, None]
    matrix = jnp.where(both, inverse, jnp.eye(block, dtype=inverse.dtype)[None])
    share = jnp.einsum("bij,bj->bi", _inverse(matrix), jnp.where(goes, values, 0))
    moved = values - jnp.einsum("bij,bj->bi", inverse, jnp.where(goes, share, 0))
    return jnp.where(mask, moved.ravel()[: w.size].reshape(w.shape), 0).astype(w.dtype)


def _check(inverses: Any, params: Params) -> None:
    paths = [path for path, _ in trees.paths_and_leaves(params)]
    for path, inverse in zip(paths, jax.tree.leaves(inverses), strict=True):
        diagonal = jnp.diagonal(inverse, axis1=1, axis2=2)
        if not (jnp.isfinite(inverse).all() and (diagonal > 0).all()):
            raise ValueError(
                f"fisher_obs: blocks of leaf {path!r} are not positive definite: give more damping"
            )
