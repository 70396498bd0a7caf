"""From scores and counts to masks, for any granularity; what masks do and say.

Scores come from `criteria`, counts from `distribution`; `train` and `evaluate` take the masks.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune import select, trees
from jaxprune.distribution import counts
from jaxprune.granularity import unit, weight
from jaxprune.types import Array, Counts, Granularity, Masks, Params, Pieces, Prunable, Scores


def masks_at(
    scores: Scores,
    counts: Counts,
    *,
    granularity: Granularity | None = None,
    within: Masks | None = None,
) -> Masks:
    r"""Prune the `counts` lowest pieces; among equal ones the lower flat index goes first.

    Masks of rising counts are nested. Pure and traceable: counts are values, so one compiled
    program gives every level.

    Args:
        scores: a tree of real numbers, higher is more important; what is not prunable is ignored.
            Under `jit`, NaN counts as lowest.
        counts: what `distribution.counts` returns for the same granularity: a tree like its pieces,
            each leaf of which competes with itself, or one array for all of them together, nothing
            normalised, ties in flatten order. With or without a leading levels axis.
        granularity: what is pruned as one; by default `granularity.weight()`.
        within: masks (without a levels axis) that the result is nested in: pieces of which they
            keep nothing go first, whatever their score, and stay pruned where they are more than
            the counts. Of the masks too the granularity's `rank` is asked: a piece of which
            something is kept ranks above zero.

    Returns:
        The tree of the scores, bool, True is kept, all True where not prunable; with the levels
        axis first if the counts have one.

    Raises:
        ValueError: trees or shapes that differ, counts out of range or (where concrete) not those
            of a granularity of windows, or scores that are NaN or infinite (where concrete).
        TypeError: a selected leaf that is not of real floating point numbers, or counts that are
            not integers.

    Example:
        >>> masks_at({"kernel": jnp.array([[3.0, 1.0, 2.0]])}, {"kernel": 1})["kernel"].tolist()
        [[True, False, True]]
    """
    granularity = granularity or weight()
    pieces = granularity.rank(scores)
    _check_finite(scores, pieces)
    if within is None:
        return granularity.spread(keep_pieces(pieces, counts, granularity), scores)
    trees.check_match("within", within, "scores", scores)
    within = jax.tree.map(lambda mask: jnp.asarray(mask, bool), within)
    alive = alive_pieces(within, scores, granularity)
    masks = granularity.spread(keep_pieces(pieces, counts, granularity, alive), scores)
    return jax.tree.map(lambda m, w: m & jnp.expand_dims(w, range(m.ndim - w.ndim)), masks, within)


def alive_pieces(masks: Masks, scores: Scores, granularity: Granularity) -> Pieces:
    """Return pieces that are not zero where masks keep something; `scores` tell what has any."""
    return granularity.rank(jax.tree.map(_where_scored, masks, scores))


def keep_all(tree: Any) -> Masks:
    """Return masks that prune nothing."""
    return jax.tree.map(lambda leaf: jnp.ones(np.shape(leaf), bool), tree)


def keep_pieces(
    pieces: Pieces, counts: Counts, granularity: Granularity, alive: Pieces | None = None
) -> Pieces:
    """Return which pieces are kept, bool (*levels, pieces); see `masks_at`.

    Args:
        pieces: their scores.
        counts: how many go.
        granularity: whose pieces they are.
        alive: a tree like the pieces, not zero where something is left; all others go first.
    """
    structure = jax.tree.structure(pieces)
    left = [None] * structure.num_leaves if alive is None else jax.tree.leaves(alive)
    left = [None if leaf is None else leaf.astype(bool) for leaf in left]
    if jax.tree.structure(counts) == structure:
        listed = trees.paths_and_leaves(pieces)
        kept = _keep_by_leaf(listed, jax.tree.leaves(counts), left, granularity.within)
    elif jax.tree.structure(counts) == jax.tree.structure(0) and granularity.within is None:
        kept = _keep_globally(jax.tree.leaves(pieces), counts, left)
    else:
        raise ValueError(
            f"counts must be one array, or a tree like the pieces, {structure}, got "
            f"{jax.tree.structure(counts)}; are they of another granularity?"
        )
    return jax.tree.unflatten(structure, kept)


def weight_masks(
    params: Params, sparsity: Any, *, scope: str = "layer", prunable: Prunable = None
) -> Masks:
    """Prune the weights of smallest magnitude; see `masks_at` and `distribution.counts`.

    Args:
        params: any nested dict, list or tuple of arrays.
        sparsity: in [0, 1], or a sequence of these, which gives the masks a levels axis.
        scope: `layer` or `global`.
        prunable: which leaves take part; by default all of two axes or more, also embeddings and
            the last layer, which `structure.prunable` leaves out.

    Example:
        >>> weight_masks({"kernel": jnp.array([[3.0, -1.0]])}, 0.5)["kernel"].tolist()
        [[True, False]]

    Reference:
        Han, Pool, Tran, Dally. Learning both Weights and Connections for Efficient Neural
        Networks. NeurIPS 2015.
    """
    return _by_magnitude(params, sparsity, weight(prunable), scope)


def unit_masks(
    params: Params,
    sparsity: Any,
    *,
    scope: str = "layer",
    prunable: Prunable = None,
    layers: Sequence[Any] | None = None,
) -> Masks:
    """Prune the units of smallest L2 norm, whole; see `masks_at` and `granularity.unit`.

    Args:
        params: any nested dict, list or tuple of arrays.
        sparsity: in [0, 1] of the units, or a sequence of these.
        scope: `layer` or `global`.
        prunable: which leaves take part; see `granularity.unit`.
        layers: what `structure.layers` returns; without it units are indices of the last axis.

    Example:
        >>> unit_masks({"kernel": jnp.array([[3.0, -1.0], [1.0, 1.0]])}, 0.5)["kernel"].tolist()
        [[True, False], [True, False]]
    """
    return _by_magnitude(params, sparsity, unit(prunable, layers), scope)


def _by_magnitude(params: Params, sparsity: Any, granularity: Granularity, scope: str) -> Masks:
    def magnitude(leaf: Any) -> Any:
        return jnp.abs(leaf) if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating) else leaf

    pruned = counts(params, sparsity, granularity=granularity, scope=scope)
    return masks_at(jax.tree.map(magnitude, params), pruned, granularity=granularity)


def apply_masks(params: Params, masks: Masks) -> Params:
    """Set pruned weights to zero: `where(mask, w, 0)`, which stops NaN and inf too.

    Args:
        params: parameters.
        masks: the same tree and shapes, bool.

    Raises:
        ValueError: the trees or a leaf's shapes differ; names the leaf.
        TypeError: a mask is not bool; names the leaf.

    Example:
        >>> apply_masks([jnp.array([1.0, jnp.nan])], [jnp.array([True, False])])[0].tolist()
        [1.0, 0.0]
    """
    check_masks(masks, params)
    return jax.tree.map(
        # A leaf that cannot be pruned may have no zero (a random key), nor need one.
        lambda w, m: jnp.where(m, w, jnp.zeros_like(w)) if _has_zero(w) else w,
        params,
        masks,
    )


def check_masks(masks: Masks, params: Params) -> None:
    """Raise ValueError or TypeError, naming the leaf, where masks are not those of the params."""
    trees.check_match("masks", masks, "params", params)
    for path, mask in trees.paths_and_leaves(masks):
        if not jnp.issubdtype(jnp.result_type(mask), jnp.bool_):
            raise TypeError(f"mask {path!r} must be bool, got {jnp.result_type(mask)}")


def sparsity_of(masks: Masks, *, prunable: Prunable = None) -> float:
    """Return the achieved sparsity: the share of the prunable weights that is pruned.

    Args:
        masks: concrete masks of one network (no levels axis).
        prunable: which leaves are counted, as they were selected; by default all of two axes or
            more. `lambda path, leaf: True` counts all weights.

    Returns:
        A fraction in [0, 1], from exact counts; 0 where nothing is prunable.

    Raises:
        TypeError: the masks are traced.

    Example:
        >>> sparsity_of({"bias": jnp.array([True]), "kernel": jnp.array([[True, False]])})
        0.5
    """
    flags = trees.prunable_leaves(masks, prunable)
    chosen = [m for m, flag in zip(jax.tree.leaves(masks), flags, strict=True) if flag]
    if any(isinstance(m, Tracer) for m in chosen):
        raise TypeError("sparsity_of counts concrete masks: call it outside of jit")
    size = sum(np.size(m) for m in chosen)
    return sum(np.size(m) - int(np.count_nonzero(m)) for m in chosen) / max(size, 1)


def warn_of_emptied(params: Params, counts: Counts, granularity: Granularity) -> None:
    """Warn, once, of the leaves that some level prunes whole; such a network is constant.

    Global counts tell only whether all leaves are.
    """
    pieces = granularity.cost(params)
    sizes = {path: leaf.size for path, leaf in trees.paths_and_leaves(pieces) if leaf.size}
    if jax.tree.structure(counts) == jax.tree.structure(pieces):
        of_leaf = dict(trees.paths_and_leaves(counts))
        emptied = [path for path, size in sizes.items() if np.max(of_leaf[path]) == size]
    else:
        emptied = list(sizes) if np.max(counts) == sum(sizes.values()) else []
    if emptied:
        warnings.warn(
            f"the highest level prunes every {granularity.name} of {', '.join(emptied)}",
            stacklevel=2,
        )


def _has_zero(leaf: Any) -> bool:
    return not jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.extended)


def _check_finite(scores: Scores, pieces: Pieces) -> None:
    """Raise ValueError, naming the leaf, where scores that take part are not finite."""

    def infinite(leaf: Any) -> bool:
        if isinstance(leaf, Tracer) or not jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating):
            return False
        return not np.isfinite(np.asarray(leaf, np.float64)).all()

    ranked = {path: infinite(leaf) for path, leaf in trees.paths_and_leaves(pieces)}
    if any(ranked.values()):
        for path, leaf in trees.paths_and_leaves(scores):  # a norm of finite ones may be too large
            if ranked.get(path, True) and infinite(leaf):
                raise ValueError(f"scores of leaf {path!r} contain NaN or infinite values")


def _where_scored(mask: Array, score: Any) -> Array:
    """Return a mask as it is where there are scores, so that the same leaves are prunable."""
    return mask if jnp.issubdtype(jnp.asarray(score).dtype, jnp.floating) else mask.astype(jnp.int8)


def _keep_by_leaf(
    pieces: list[tuple[str, Array]],
    counts: list[Any],
    alive: list[Any],
    within: tuple[int, int] | None,
) -> list[Array]:
    for (path, x), count in zip(pieces, counts, strict=True):
        _check_count(f"counts of leaf {path!r}", count, x.size)
        if np.shape(count) != np.shape(counts[0]):
            raise ValueError(
                f"counts of leaf {path!r} have shape {np.shape(count)}, those of {pieces[0][0]!r} "
                f"{np.shape(counts[0])}: all need the same levels"
            )
    if within is None:
        return [_keep(x, *of) for (_, x), *of in zip(pieces, counts, alive, strict=True)]
    for (path, x), count in zip(pieces, counts, strict=True):
        pruned = x.size // within[1] * (within[1] - within[0])
        if not isinstance(count, Tracer) and not np.isin(count, (0, pruned)).all():
            raise ValueError(
                f"counts of leaf {path!r} must be 0 or {pruned}, for {within[0]} of every "
                f"{within[1]}, got {np.asarray(count).tolist()}"
            )
    left = [x if a is None else jnp.where(a, x, -jnp.inf)
            for (_, x), a in zip(pieces, alive, strict=True)]  # fmt: skip
    kept = [select.keep_in_windows(x, *within) for x in left]
    return [
        jnp.expand_dims(keep, range(np.ndim(count))) | jnp.expand_dims(jnp.asarray(count) == 0, -1)
        for keep, count in zip(kept, counts, strict=True)
    ]


def _keep_globally(pieces: list[Array], counts: Any, alive: list[Any]) -> list[Array]:
    sizes = [x.size for x in pieces]
    _check_count("counts", counts, sum(sizes))
    chosen = [x for x in pieces if x.size] or [jnp.zeros(0)]
    dtype = jnp.result_type(*(x.dtype for x in chosen))
    left = [leaf for leaf in alive if leaf is not None and leaf.size]
    together = jnp.concatenate([x.astype(dtype) for x in chosen])
    kept = _keep(together, counts, jnp.concatenate(left) if left else None)
    return jnp.split(kept, np.cumsum(sizes)[:-1], axis=-1) if sizes else []


def _keep(pieces: Array, counts: Any, alive: Array | None) -> Array:
    """Return what is kept of some pieces, (*levels, pieces)."""
    if not pieces.size:
        return jnp.ones((*jnp.shape(counts), 0), bool)
    kept = select.keep_largest(pieces, jnp.atleast_1d(jnp.asarray(counts, jnp.int32)), alive)
    return kept if jnp.ndim(counts) else kept[0]


def _check_count(name: str, count: Any, size: int) -> None:
    if not jnp.issubdtype(jnp.asarray(count).dtype, jnp.integer):
        raise TypeError(
            f"{name} must be integers, got {count}: `counts` makes them from a sparsity"
        )
    if np.ndim(count) > 1:
        raise ValueError(
            f"{name} must be a number or have one levels axis, got shape {jnp.shape(count)}"
        )
    concrete = not isinstance(count, Tracer)
    if concrete and np.size(count) and not (0 <= np.min(count) and np.max(count) <= size):
        raise ValueError(f"{name} must be in [0, {size}], got {np.asarray(count).tolist()}")
