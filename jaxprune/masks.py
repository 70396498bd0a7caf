"""From scores and counts to masks, for a granularity and a scope; what masks do and say.

Scores come from `scores`, counts from `sparsity`; `train` and `evaluate` take the masks.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune import select, trees
from jaxprune.scores import magnitude
from jaxprune.sparsity import check_choice, check_unit_axis, counts, num_elements
from jaxprune.types import Array, Counts, Granularity, Masks, Params, Prunable, Scope, Scores


def masks_at(
    scores: Scores,
    counts: Counts,
    *,
    granularity: Granularity = "weight",
    scope: Scope = "layer",
    prunable: Prunable | None = None,
    unit_axis: int = -1,
    within: Masks | None = None,
) -> Masks:
    r"""Prune the `counts` lowest scores; among equal ones the lower flat index goes first.

    A unit's score is the L2 norm of the scores of its weights, $\sqrt{\sum_i s_i^2}$. Masks of
    rising counts are nested. Pure and traceable: counts are values, so one compiled program gives
    every level.

    Args:
        scores: a tree of real numbers, higher is more important; what is not prunable is ignored.
        counts: what `sparsity.counts` returns for the same granularity, scope and predicate, with
            or without a leading levels axis.
        granularity: `weight`, or `unit`: an index of the axis `unit_axis` of a leaf.
        scope: `layer`: leaves compete with themselves; `global`: all prunable leaves with each
            other, nothing normalised, ties in flatten order.
        prunable: which leaves take part; see `trees.prunable_leaves`.
        unit_axis: the axis whose indices are units.
        within: masks (without a levels axis) that the result is nested in: what they prune goes
            first, whatever its score, and stays pruned where it is more than the counts.

    Returns:
        The tree of the scores, bool, True is kept, all True where not prunable; with the levels
        axis first if the counts have one.

    Raises:
        ValueError: trees or shapes that differ, counts out of range, scores that are NaN or
            infinite (where concrete), an unknown granularity or scope, a unit axis that a leaf
            lacks.
        TypeError: a selected leaf that is not of real floating point numbers, or counts that are
            not integers.

    Example:
        >>> scores = {"dense": jnp.array([[3.0, 1.0, 2.0]]), "logits": jnp.ones((3, 2))}
        >>> masks_at(scores, {"dense": 1, "logits": 0})["dense"].tolist()
        [[True, False, True]]
    """
    check_choice("granularity", granularity, ("weight", "unit"))
    check_choice("scope", scope, ("layer", "global"))
    flags = trees.prunable_leaves(scores, prunable)
    paths, leaves = zip(*trees.paths_and_leaves(scores), strict=True) if flags else ((), ())
    for path, leaf, flag in zip(paths, leaves, flags, strict=True):
        if flag and _concrete(leaf) and not np.isfinite(np.asarray(leaf, np.float64)).all():
            raise ValueError(f"scores of leaf {path!r} contain NaN or infinite values")
    if within is not None:
        trees.check_match("within", within, "scores", scores)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    earlier = [jnp.asarray(m, bool) for m in jax.tree.leaves(within)] or [None] * len(leaves)
    flat = [
        _rankable(leaf, mask, granularity, unit_axis) if flag else None
        for leaf, mask, flag in zip(leaves, earlier, flags, strict=True)
    ]
    if scope == "global":
        kept = _keep_globally(flat, counts)
    else:
        kept = _keep_by_layer(flat, counts, scores, paths)
    levels = jnp.shape(jax.tree.leaves(counts)[0])[:1] if flags else ()
    masks = [
        jnp.ones((*levels, *leaf.shape), bool)
        if keep is None
        else _spread(keep if levels else keep[0], mask, leaf.shape, granularity, unit_axis)
        for keep, mask, leaf in zip(kept, earlier, leaves, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(scores), masks)


def weight_masks(
    params: Params,
    sparsity: Any,
    *,
    scope: Scope = "layer",
    prunable: Prunable | None = None,
) -> Masks:
    """Prune the weights of smallest magnitude; see `masks_at` and `sparsity.counts`.

    Args:
        params: any nested dict, list or tuple of arrays.
        sparsity: in [0, 1], or a sequence of these, which gives the masks a levels axis.
        scope: `layer` or `global`.
        prunable: which leaves take part.

    Example:
        >>> params = {"dense": jnp.array([[3.0, -1.0]]), "logits": jnp.ones((2, 2))}
        >>> weight_masks(params, 0.5)["dense"].tolist()
        [[True, False]]

    Reference:
        Han, Pool, Tran, Dally. Learning both Weights and Connections for Efficient Neural
        Networks. NeurIPS 2015.
    """
    options: dict[str, Any] = {"granularity": "weight", "scope": scope, "prunable": prunable}
    return masks_at(magnitude(params), counts(params, sparsity, **options), **options)


def unit_masks(
    params: Params,
    sparsity: Any,
    *,
    scope: Scope = "layer",
    prunable: Prunable | None = None,
    unit_axis: int = -1,
) -> Masks:
    """Prune the units of smallest L2 norm, whole; see `masks_at` and `sparsity.counts`.

    Args:
        params: any nested dict, list or tuple of arrays.
        sparsity: in [0, 1] of the units, or a sequence of these.
        scope: `layer` or `global`.
        prunable: which leaves take part.
        unit_axis: the axis whose indices are units; the last of a Flax kernel.

    Example:
        >>> params = {"dense": jnp.array([[3.0, -1.0], [1.0, 1.0]]), "logits": jnp.ones((2, 2))}
        >>> unit_masks(params, 0.5)["dense"].tolist()
        [[True, False], [True, False]]
    """
    options: dict[str, Any] = {
        "granularity": "unit", "scope": scope, "prunable": prunable, "unit_axis": unit_axis,
    }  # fmt: skip
    return masks_at(magnitude(params), counts(params, sparsity, **options), **options)


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


def sparsity_of(masks: Masks, *, prunable: Prunable | None = None) -> float:
    """Return the achieved sparsity: the share of the prunable weights that is pruned.

    Args:
        masks: concrete masks of one network (no levels axis).
        prunable: which leaves are counted; `lambda path, leaf: True` counts all weights.

    Returns:
        A fraction in [0, 1], from exact counts; 0 where nothing is prunable.

    Raises:
        ValueError: no path contains `logits` and no `prunable` is given.
        TypeError: the masks are traced.
    """
    flags = trees.prunable_leaves(masks, prunable)
    chosen = [m for m, flag in zip(jax.tree.leaves(masks), flags, strict=True) if flag]
    if any(isinstance(m, Tracer) for m in chosen):
        raise TypeError("sparsity_of counts concrete masks: call it outside of jit")
    size = sum(np.size(m) for m in chosen)
    return sum(np.size(m) - int(np.count_nonzero(m)) for m in chosen) / max(size, 1)


def warn_of_emptied(
    params: Params, counts: Counts, granularity: Granularity, prunable: Prunable | None = None
) -> None:
    """Warn, once, of the leaves that some level prunes whole; such a network is constant.

    Global counts tell only whether all leaves are.
    """
    flags = trees.prunable_leaves(params, prunable)
    sizes = {
        path: num_elements(np.shape(leaf), granularity)
        for (path, leaf), flag in zip(trees.paths_and_leaves(params), flags, strict=True)
        if flag
    }
    if jax.tree.structure(counts) == jax.tree.structure(params):
        of_leaf = dict(trees.paths_and_leaves(counts))
        emptied = [path for path, size in sizes.items() if np.max(of_leaf[path]) == size]
    else:
        emptied = list(sizes) if np.max(counts) == sum(sizes.values()) else []
    if emptied:
        warnings.warn(
            f"the highest level prunes every {granularity} of {', '.join(emptied)}", stacklevel=2
        )


def unit_norms(x: Array, unit_axis: int) -> Array:
    """Return the L2 norm of what belongs to each index of an axis, in float32 or float64."""
    x = _wide(x)
    axes = tuple(a for a in range(x.ndim) if a != unit_axis % x.ndim)
    # A power of two, which is exact, keeps squares in range.
    exponents = jnp.frexp(jnp.max(jnp.abs(x), axis=axes, keepdims=True))[1]
    exponents = jnp.clip(exponents, -126, 126)
    squares = jnp.square(x * jnp.ldexp(jnp.ones((), x.dtype), -exponents))
    return jnp.ldexp(jnp.sqrt(jnp.sum(squares, axis=axes)), jnp.squeeze(exponents, axes))


def _wide(x: Array) -> Array:
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)  # exact for narrower types


def _concrete(x: Any) -> bool:
    return not isinstance(x, Tracer)


def _has_zero(leaf: Any) -> bool:
    return not jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.extended)


def _rankable(
    leaf: Array, mask: Array | None, granularity: Granularity, unit_axis: int
) -> Array:  # fmt: skip
    """Return the scores that compete, flat; those already pruned come first."""
    leaf = _wide(leaf)
    if granularity == "unit":
        check_unit_axis(leaf.shape, unit_axis)
        axes = tuple(a for a in range(leaf.ndim) if a != unit_axis % leaf.ndim)
        leaf = unit_norms(leaf, unit_axis)
        mask = None if mask is None else jnp.any(mask, axis=axes)
    return (leaf if mask is None else jnp.where(mask, leaf, -jnp.inf)).ravel()


def _keep_by_layer(
    flat: list[Array | None], counts: Counts, scores: Scores, paths: tuple[str, ...]
) -> list[Array | None]:
    counts_tree = jax.tree.structure(counts)
    if counts_tree != jax.tree.structure(scores):
        raise ValueError(
            f"counts must be a tree like the scores, {jax.tree.structure(scores)}, "
            f"got {counts_tree}; are they of another scope?"
        )
    leaf_counts = jax.tree.leaves(counts)
    for path, count, x in zip(paths, leaf_counts, flat, strict=True):
        _check_count(f"counts of leaf {path!r}", count, 0 if x is None else x.size)
        if np.shape(count) != np.shape(leaf_counts[0]):
            raise ValueError(
                f"counts of leaf {path!r} have shape {np.shape(count)}, those of {paths[0]!r} "
                f"{np.shape(leaf_counts[0])}: all need the same levels"
            )
    return [
        None if x is None else select.keep_largest(x, _row(count))
        for x, count in zip(flat, leaf_counts, strict=True)
    ]


def _keep_globally(flat: list[Array | None], counts: Counts) -> list[Array | None]:
    sizes = [0 if x is None else x.size for x in flat]
    if jax.tree.structure(counts) != jax.tree.structure(0):
        raise ValueError(
            "counts of scope 'global' must be one array, got a tree; are they of scope 'layer'?"
        )
    _check_count("counts", counts, sum(sizes))
    if not sum(sizes):
        return flat
    chosen = [x for x in flat if x is not None]
    dtype = jnp.float64 if any(x.dtype == jnp.float64 for x in chosen) else jnp.float32
    kept = select.keep_largest(jnp.concatenate([x.astype(dtype) for x in chosen]), _row(counts))
    parts = iter(jnp.split(kept, np.cumsum([x.size for x in chosen])[:-1], axis=1))
    return [None if x is None else next(parts) for x in flat]


def _check_count(name: str, count: Any, size: int) -> None:
    if not jnp.issubdtype(jnp.asarray(count).dtype, jnp.integer):
        raise TypeError(
            f"{name} must be integers, got {count}: `counts` makes them from a sparsity"
        )
    if np.ndim(count) > 1:
        raise ValueError(
            f"{name} must be a number or have one levels axis, got shape {jnp.shape(count)}"
        )
    if _concrete(count) and np.size(count) and not (0 <= np.min(count) and np.max(count) <= size):
        raise ValueError(f"{name} must be in [0, {size}], got {np.asarray(count).tolist()}")


def _row(count: Any) -> Array:
    return jnp.atleast_1d(jnp.asarray(count, jnp.int32))


def _spread(
    keep: Array,
    within: Array | None,
    shape: tuple[int, ...],
    granularity: Granularity,
    unit_axis: int,
) -> Array:
    """Give kept elements, (..., n), the shape of their leaf, reviving nothing."""
    levels = keep.shape[:-1]
    if granularity == "unit":
        axis = unit_axis % len(shape)
        ones = [shape[a] if a == axis else 1 for a in range(len(shape))]
        keep = jnp.broadcast_to(keep.reshape(*levels, *ones), (*levels, *shape))
    keep = keep.reshape(*levels, *shape)
    return keep if within is None else keep & jnp.expand_dims(within, range(len(levels)))
