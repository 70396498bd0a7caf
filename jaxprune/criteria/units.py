"""Which units of a group are needed, by what the layers that take them in can do without them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees
from jaxprune.criteria.layerwise import to_matrix
from jaxprune.masks import apply_masks, keep_pieces
from jaxprune.structure import layer_inputs
from jaxprune.structure.graph import Graph, Group
from jaxprune.structure.layers import Layer
from jaxprune.structure.units import group
from jaxprune.types import (
    Array,
    Batch,
    Correction,
    Counts,
    Granularity,
    Masks,
    Params,
    Problem,
)


def reconstruction(
    graph: Graph,
    *,
    granularity: Granularity | None = None,
    damping: float = 0.001,
    steps: int = 150,
) -> Correction:
    r"""Prune the units without which the layers that take them in can still give their outputs.

    Units go a few at a time, those first that cost least: for a layer of inputs $X$ that takes unit
    $u$ in, $B_u^T ((H^{-1})_{uu})^{-1} B_u$ with $H = X^T X + \lambda I$ and $B$ the least squares
    solution on the units left, summed over such layers. Nothing is corrected
    here; `refit(reconstruction(graph))` fits the layers to what is left.

    Args:
        graph: what `dependency_graph` returns, whose groups the counts are of.
        granularity: what the counts are of; by default `structure.group(graph)`.
        damping: $\lambda$, as a share of the mean square of the inputs.
        steps: in how many steps all units go; more is more exact, and slower.

    Returns:
        A method; of a group that no matrix product takes in, units are ranked by the norm of their
        weights.

    Raises:
        ValueError: when made: damping or steps that are not positive.

    Reference:
        Luo, Wu, Lin. ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression.
        ICCV 2017, greedily and by the same error; Kurtic, Frantar, Alistarh. ZipLM:
        Inference-Aware Structured Pruning of Language Models. NeurIPS 2023, by this formula.
    """
    for name, value in (("damping", damping), ("steps", steps)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    granularity = granularity or group(graph)

    def prune(
        params: Params, problem: Problem, counts: Counts, batches: Sequence[Batch]
    ) -> tuple[Params, Masks]:
        found = layer_inputs(problem.apply, params, [b.x for b in batches], _moments)
        layers = {layer.path: (layer, moments) for layer, moments in found.items()}
        leaves = dict(trees.paths_and_leaves(params))
        groups = {each.name: each for each in graph.groups}
        ranks = type(counts)(
            (name, _ranks(groups[name], norms, leaves, layers, damping, steps))
            for name, norms in granularity.rank(params).items()
        )
        masks = granularity.spread(keep_pieces(ranks, counts, granularity), params)
        return jax.vmap(apply_masks, (None, 0))(params, masks), masks

    return Correction("reconstruction", {"damping": damping, "steps": steps}, prune)


def _moments(rows: Array) -> tuple[Array, Array]:
    rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
    return rows.T @ rows, jnp.asarray(rows.shape[0], jnp.float32)


def _ranks(
    group: Group,
    norms: Array,
    leaves: dict[str, Any],
    layers: dict[str, tuple[Layer, Any]],
    damping: float,
    steps: int,
) -> Array:
    """Return when each unit goes, the later the higher; those that stay longest are best."""
    consumers = []
    for member in group.members:
        if member.role != "consumes" or member.path not in layers:
            continue
        layer, (moments, count) = layers[member.path]
        if member.axis not in layer.contracted or layer.batched or layer.groups > 1:
            continue
        shape = [np.shape(leaves[member.path])[i] for i in layer.contracted]
        rows = np.moveaxis(
            np.arange(np.prod(shape)).reshape(shape), layer.contracted.index(member.axis), 0
        ).reshape(len(member.index), -1)
        own = [rows[member.index == unit].ravel() for unit in range(group.size)]
        if len({len(each) for each in own}) == 1 and len(own[0]):
            weights = to_matrix(jnp.asarray(leaves[member.path]), layer)[0]
            each = np.asarray(moments / count), np.asarray(weights), np.stack(own)
            consumers.append(_Consumer(*each, damping))
    if not consumers:
        return norms
    size, order = group.size, []
    left = np.arange(size)
    for step in range(1, steps + 1):
        goes = len(left) - round(size * (1 - step / steps))
        if goes > 0:
            costs = np.sum([consumer.costs(left) for consumer in consumers], axis=0)
            chosen = np.sort(np.argsort(costs, kind="stable")[:goes])
            ordered = chosen[np.argsort(costs[chosen], kind="stable")]
            order += [*left[ordered]]
            for consumer in consumers:
                consumer.remove(left[chosen])
            left = np.delete(left, chosen)
    ranks = np.empty(size, np.float32)
    ranks[np.array(order, int)] = np.arange(size)
    return jnp.asarray(ranks)


class _Consumer:
    """A layer that takes units in: what each of them costs it, once others have gone."""

    def __init__(self, moments: np.ndarray, weights: np.ndarray, rows: np.ndarray, damping: float):
        moments = moments.astype(np.float64)
        scale = np.mean(np.diagonal(moments)) or 1.0
        self._inverse = np.linalg.inv(moments + damping * scale * np.eye(len(moments)))
        self._weights, self._rows = weights.astype(np.float64), rows

    def costs(self, units: np.ndarray) -> np.ndarray:
        """Return by how much the layer's error rises without each of the units."""
        rows = self._rows[units]
        blocks = self._inverse[rows[:, :, None], rows[:, None]]
        weights = self._weights[rows]
        return np.einsum("uro,uro->u", weights, np.linalg.solve(blocks, weights))

    def remove(self, units: np.ndarray) -> None:
        """Go on without some units."""
        rows = self._rows[units].ravel()
        across = self._inverse[:, rows]
        solved = np.linalg.solve(self._inverse[np.ix_(rows, rows)], across.T)
        self._weights = self._weights - solved.T @ self._weights[rows]
        self._inverse = self._inverse - across @ solved
