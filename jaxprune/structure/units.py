"""Masks of the units of groups: what is scored together is pruned together.

A graph and parameters come in; masks of all leaves, as `masks` has them, go out to `compaction`.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune import trees
from jaxprune.masks import unit_norms
from jaxprune.select import keep_largest
from jaxprune.sparsity import check_choice, exact, num_pruned
from jaxprune.structure.graph import Graph, Group, Member
from jaxprune.types import Array, Masks, Params, Scores


def group_masks(
    graph: Graph,
    params: Params,
    sparsity: Any,
    *,
    scope: str = "group",
    round_to: int = 1,
    scores: Scores | None = None,
    prunable: Callable[[Group], bool] | None = None,
) -> Masks:
    r"""Prune the units of the lowest scores, with all that belongs to them.

    A unit's score is the L2 norm of the scores of all weights that enter it, of all leaves that
    produce it. Its biases and normalisation parameters go with it and are not scored; nor are the
    weights that leave it, which are masked where its value would not be zero without. Masks of
    rising sparsities are nested.

    Args:
        graph: what `dependency_graph` returns.
        params: the parameters.
        sparsity: in [0, 1] of the units of the groups taken, or a sequence of these.
        scope: `group`: units compete within their group; `global`: with all others, nothing
            normalised, ties in the order of the groups.
        round_to: the kept units of a group are a multiple of it, or all; rounded up.
        scores: a tree like `params`, higher is more important; by default `magnitude`.
        prunable: which groups take part; by default all that are prunable and lie within no other,
            so that attention loses whole heads.

    Returns:
        The tree of the parameters, bool, True is kept; the levels axis first if `sparsity` is a
        sequence.

    Raises:
        ValueError: a tree that the graph was not made of, a sparsity outside [0, 1], an unknown
            scope, a `round_to` below 1, or a selected group that cannot be pruned.

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
    check_tree(graph, params)
    scores = params if scores is None else scores  # of which the norm is that of `magnitude`
    trees.check_match("scores", scores, "params", params)
    many = isinstance(sparsity, Sequence) or np.ndim(sparsity) > 0
    targets = [exact(s) for s in (sparsity if many else [sparsity])]
    groups = _selected(graph, prunable)
    if not groups:
        message = "no group of the graph can be pruned: print it for the reasons"
        warnings.warn(message, stacklevel=2)
    of_path = dict(trees.paths_and_leaves(scores))
    worth = [_worth(group, of_path) for group in groups]
    if scope == "global" and groups:
        dtype = jnp.result_type(*worth)
        together = jnp.concatenate([w.astype(dtype) for w in worth])
        counts = jnp.array([num_pruned(together.size, s) for s in targets], jnp.int32)
        ends = np.cumsum([group.size for group in groups])[:-1]
        kept = [k.sum(1) for k in jnp.split(_keep_largest(together, counts), ends, axis=1)]
    else:
        kept = [
            jnp.array([group.size - num_pruned(group.size, s) for s in targets]) for group in groups
        ]
    masks: dict[str, Any] = {
        path: np.ones((len(targets), *jnp.shape(leaf)), bool)
        for path, leaf in trees.paths_and_leaves(params)
    }
    maskable = {p for p, s in of_path.items() if jnp.issubdtype(jnp.asarray(s).dtype, jnp.inexact)}
    for group, units, number in zip(groups, worth, kept, strict=True):
        width = jnp.minimum(-(-number // round_to) * round_to, group.size)
        keep = _keep_largest(units, (group.size - width).astype(jnp.int32))
        for member in group.members:
            if member.path in maskable and (member.role != "consumes" or group.masks_consumers):
                mask = masks[member.path]
                masks[member.path] = mask & _along(keep, member, mask.ndim)
    leaves = [jnp.asarray(m if many else m[0]) for m in masks.values()]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


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


def _worth(group: Group, scores: dict[str, Any]) -> Array:
    """Return the L2 norm of the scores of the weights that enter each unit."""
    parts = []
    for m in group.members:
        if "produces" in m.role:
            at = np.argsort(m.index, kind="stable")[np.count_nonzero(m.index < 0) :]
            norms = _norms(jnp.asarray(scores[m.path]), m.axis)
            parts.append(norms[at.reshape(group.size, -1)])
    together = jnp.concatenate([part.astype(jnp.result_type(*parts)) for part in parts], axis=1)
    return together[:, 0] if together.shape[1] == 1 else _norms(together, 0)


# Compiled: one by one, on a first call, their operations would take seconds.
_norms = jax.jit(lambda leaf, axis: unit_norms(jnp.abs(leaf), axis), static_argnums=1)
_keep_largest = jax.jit(keep_largest)


def _along(keep: Array, member: Member, ndim: int) -> Any:
    """Return what is kept along an axis of a leaf, in masks of levels and that leaf's axes."""
    values: Any = keep if isinstance(keep, Tracer) else np.asarray(keep)
    along = values[:, np.maximum(member.index, 0)] | (member.index < 0)[None]
    return along.reshape(-1, *(along.shape[1] if i == member.axis else 1 for i in range(ndim - 1)))
