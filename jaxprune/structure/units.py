"""The units of groups: what is scored together is pruned together.

A graph and parameters come in; masks of all leaves, as `masks` has them, go out to `compaction`.
"""

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune import trees
from jaxprune.arrays import replicated, sharded_like, unit_norms
from jaxprune.distribution import check_choice, counts
from jaxprune.masks import keep_pieces, masks_at
from jaxprune.structure.graph import Graph, Group, Member
from jaxprune.types import Array, Granularity, Masks, Params, Pieces, Prunable, Scores


def group_masks(
    graph: Graph,
    params: Params,
    sparsity: Any,
    *,
    scope: str = "group",
    round_to: int = 1,
    min_units: int = 1,
    scores: Scores | None = None,
    prunable: Callable[[Group], bool] | None = None,
) -> Masks:
    r"""Prune the units of the lowest scores, with all that belongs to them.

    A unit's score, and what goes with it, are those of `group`. Masks of rising sparsities are
    nested.

    Args:
        graph: what `dependency_graph` returns.
        params: the parameters.
        sparsity: in [0, 1] of the units of the groups taken, or a sequence of these.
        scope: `group`: units compete within their group; `global`: with all others, nothing
            normalised, ties in the order of the groups.
        round_to: the kept units of a group are a multiple of it, or all; rounded up.
        min_units: of every group so many are kept, with a warning where that is more than asked;
            0 lets a group go whole.
        scores: a tree like `params`, higher is more important; by default `magnitude`.
        prunable: which groups take part; by default all that are prunable and lie within no other.

    Returns:
        Masks of the parameters, with the levels axis first if `sparsity` is a sequence.

    Raises:
        ValueError: a tree that the graph was not made of, a sparsity outside [0, 1], an unknown
            scope, a `round_to` below 1, a negative `min_units`, or a selected group that cannot be
            pruned.

    Example:
        >>> def apply(params, x):
        ...     return jax.nn.relu(x @ params["hidden"]) @ params["logits"]
        >>> params = {"hidden": jnp.array([[3.0, 1.0]]), "logits": jnp.ones((2, 2))}
        >>> graph = jp.dependency_graph(apply, params, jnp.ones((5, 1)))
        >>> group_masks(graph, params, 0.5)["hidden"].tolist()
        [[True, False]]
    """
    check_choice("scope", scope, ("group", "global"))
    if round_to < 1:
        raise ValueError(f"round_to must be at least 1, got {round_to}")
    if min_units < 0:
        raise ValueError(f"min_units must be at least 0, got {min_units}")
    check_tree(graph, params)
    scores = params if scores is None else scores  # of which the norm is that of `magnitude`
    trees.check_match("scores", scores, "params", params)
    groups = _selected(graph, prunable)
    granularity = _granularity(graph, groups)
    together = scope == "global"
    pruned = counts(params, sparsity, granularity=granularity, scope=scope if together else "layer")
    if not groups:
        warnings.warn("no group of the graph can be pruned: print it for the reasons", stacklevel=2)
        shape = np.shape(sparsity)
        return jax.tree.map(lambda leaf: jnp.ones((*shape, *jnp.shape(leaf)), bool), params)
    if together:
        kept = keep_pieces(granularity.rank(scores), pruned, granularity)
        pruned = jax.tree.map(lambda units: jnp.sum(~units, -1, dtype=jnp.int32), kept)
    sizes = jax.tree.map(np.size, granularity.cost(params))
    most = {name: max(size - min_units, 0) for name, size in sizes.items()}
    held = [name for name, n in pruned.items()
            if not isinstance(n, Tracer) and np.max(n, initial=0) > most[name]]  # fmt: skip
    _warn(held, f"keep {min_units} of their units, more than is asked for")
    divides = [group.name for group in groups if group.divides]
    _warn(divides, "divide by zero where they are masked: use `compact`, which does not")
    pruned = type(pruned)(
        (name, _rounded(jnp.minimum(jnp.asarray(n), most[name]), sizes[name], round_to))
        for name, n in pruned.items()
    )
    return masks_at(scores, pruned, granularity=granularity)


def _warn(names: Sequence[str], what: str) -> None:
    if names:
        listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")
        warnings.warn(f"groups {what}: {listed}", stacklevel=3)


def group(graph: Graph, prunable: Prunable = None) -> Granularity:
    r"""Return the granularity of units of the dependency graph, named `unit` as well.

    The pieces are a dict of the groups by name, in the order of the graph, each with the scores of
    its units: $\sqrt{\sum_i s_i^2}$ over the weights that enter a unit, of all leaves that produce
    it. Of a chain of dense layers they are those of `granularity.unit`. With a unit go its biases
    and normalisation parameters, and the weights that leave it where its value is not zero without;
    none of these is scored.

    Args:
        graph: what `dependency_graph` returns.
        prunable: which leaves may be pruned; see `trees.prunable_leaves`. A group takes part if all
            leaves that produce its units may be, if its units can be removed, and if it lies within
            no other, so that attention loses whole heads. By default every leaf may be.

    Raises:
        ValueError: when used: a tree that the graph was not made of.

    Example:
        >>> def apply(params, x):
        ...     return jax.nn.relu(x @ params["hidden"]) @ params["logits"]
        >>> params = {"hidden": jnp.array([[3.0, 1.0], [4.0, 0.0]]), "logits": jnp.ones((2, 2))}
        >>> group(jp.dependency_graph(apply, params, jnp.ones((5, 2)))).rank(params)["hidden"]
        Array([5., 1.], dtype=float32)
    """
    return _granularity(graph, _selected(graph, None), prunable)


def check_tree(graph: Graph, params: Params) -> None:
    """Raise ValueError, naming the leaf, where a graph was made of another tree."""
    shapes = {path: jnp.shape(leaf) for path, leaf in trees.paths_and_leaves(params)}
    for path in [*graph.shapes, *shapes]:
        if graph.shapes.get(path) != shapes.get(path):
            raise ValueError(
                f"leaf {path!r} has shape {shapes.get(path)} in params and "
                f"{graph.shapes.get(path)} in the graph, which was made of another tree"
            )


def _selected(graph: Graph, prunable: Callable[[Group], bool] | None) -> list[Group]:
    if prunable is None:
        return [group for group in graph.groups if group.prunable and group.within is None]
    groups = [group for group in graph.groups if prunable(group)]
    for group in groups:
        if not group.prunable:
            raise ValueError(f"group {group.name!r} cannot be pruned: {group.reason}")
    return groups


def _granularity(graph: Graph, groups: Sequence[Group], prunable: Prunable = None) -> Granularity:
    """Return the granularity of some groups' units; of `prunable` see `group`."""

    def chosen(tree: Any) -> list[Group]:
        check_tree(graph, tree)
        if prunable is None:
            return list(groups)
        paths = [path for path, _ in trees.paths_and_leaves(tree)]
        flags = dict(zip(paths, trees.prunable_leaves(tree, prunable), strict=True))
        return [group for group in groups if all(flags[m.path] for m in _producers(group))]

    def rank(scores: Scores) -> Pieces:
        of_path = dict(trees.paths_and_leaves(scores))
        return OrderedDict((group.name, _worth(group, of_path)) for group in chosen(scores))

    def cost(params: Params) -> Pieces:
        return OrderedDict((group.name, _cost(group, graph)) for group in chosen(params))

    def spread(kept: Pieces, params: Params) -> Masks:
        levels = np.shape(next(iter(kept.values())))[:-1] if kept else ()
        leaves = dict(trees.paths_and_leaves(params))
        masks: dict[str, Any] = dict.fromkeys(leaves, np.True_)
        for group in chosen(params):
            for member in _masked(group):
                leaf = leaves[member.path]
                if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact):
                    along = _along(kept[group.name], member, np.ndim(leaf))
                    masks[member.path] = masks[member.path] & along
        spread = [
            sharded_like(leaf, jnp.broadcast_to(masks[path], (*levels, *np.shape(leaf))))
            for path, leaf in leaves.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(params), spread)

    return Granularity("unit", rank, cost, spread)


def _producers(group: Group) -> list[Member]:
    return [member for member in group.members if "produces" in member.role]


def _masked(group: Group) -> list[Member]:
    """Return the members that are masked where a unit is pruned."""
    return [m for m in group.members if m.role != "consumes" or group.masks_consumers]


def _worth(group: Group, scores: dict[str, Any]) -> Array:
    """Return the L2 norm of the scores of the weights that enter each unit."""
    parts = []
    for m in _producers(group):
        at = np.argsort(m.index, kind="stable")[np.count_nonzero(m.index < 0) :]
        norms = _norms(replicated(scores[m.path]), (m.axis,))
        norms = norms if np.array_equal(at, np.arange(norms.size)) else norms[at]
        parts.append(norms.reshape(group.size, -1))
    together = jnp.concatenate([part.astype(jnp.result_type(*parts)) for part in parts], axis=1)
    return together[:, 0] if together.shape[1] == 1 else _norms(together, (0,))


# Compiled: one by one, on a first call, their operations would take seconds.
_norms = jax.jit(unit_norms, static_argnums=1)


def _cost(group: Group, graph: Graph) -> np.ndarray:
    """Return how many weights are masked with each unit; where two axes of a leaf meet, twice."""
    weights = np.zeros(group.size, np.int64)
    for m in _masked(group):
        shape = graph.shapes[m.path]
        positions = np.bincount(m.index[m.index >= 0], minlength=group.size)
        weights += positions * (math.prod(shape) // shape[m.axis])
    return weights


def _rounded(pruned: Any, size: int, round_to: int) -> Array:
    """Return how many units are pruned if those kept are a multiple of `round_to`, or all."""
    kept = -((pruned - size) // round_to) * round_to
    return size - jnp.minimum(jnp.asarray(kept, jnp.int32), size)


def _along(keep: Array, member: Member, ndim: int) -> Any:
    """Return what is kept along an axis of a leaf, in masks of levels and that leaf's axes."""
    values: Any = keep if isinstance(keep, Tracer) else np.asarray(keep)
    along = values
    if not np.array_equal(member.index, np.arange(values.shape[-1])):
        along = values[..., np.maximum(member.index, 0)]
        along = along | np.broadcast_to(member.index < 0, along.shape)
    ones = [along.shape[-1] if i == member.axis else 1 for i in range(ndim)]
    return along.reshape(*along.shape[:-1], *ones)
