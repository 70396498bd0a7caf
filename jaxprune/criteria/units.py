"""Which units of a group are needed, by what the layers that take them in can do without them."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees
from jaxprune.criteria.corrections import joined
from jaxprune.criteria.gradients import check_gradients, over_examples
from jaxprune.criteria.layerwise import output_worths, to_matrix
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
    weighted: bool = True,
) -> Correction:
    r"""Prune the units without which the layers that take them in can still give their outputs.

    Units go a few at a time, those first that cost least: for a layer of inputs $X$ that takes unit
    $u$ in, $B_u^T ((H^{-1})_{uu})^{-1} B_u$ with $H = X^T X + \lambda I$ and $B$ the least squares
    solution on the units left, summed over such layers, and over their outputs as the network is
    sensitive to them. Nothing is corrected here; `refit(reconstruction(graph))` fits the layers to
    what is left.

    Args:
        graph: what `dependency_graph` returns, whose groups the counts are of.
        granularity: what the counts are of; by default `structure.group(graph)`.
        damping: $\lambda$, as a share of the mean square of the inputs.
        steps: in how many steps all units go; more is more exact, and slower.
        weighted: as of `obs`.

    Returns:
        A method; of a group that no matrix product takes in alone, as of queries and keys, units
        are ranked by the root mean square of what the products give that make them, and where
        none does by the norm of their weights; a warning says so.

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

    def ranks(params: Params, problem: Problem, batches: Sequence[Batch]) -> dict[str, Array]:
        inputs = [batch.x for batch in batches]
        found = layer_inputs(problem.apply, params, inputs, _moments)
        worths = output_worths(problem.apply, params, inputs) if weighted else {}
        consumers = _consumers(graph, params, found, worths)
        return {
            name: _order(graph[name].size, [_Consumer(*of, damping) for of in each], steps)
            for name, each in consumers.items()
        }

    settings = {"damping": damping, "steps": steps, "weighted": weighted}
    return _by_group("reconstruction", settings, graph, granularity, ranks)


def activation(graph: Graph, *, granularity: Granularity | None = None) -> Correction:
    r"""Prune the units whose values are smallest, by their root mean square.

    Arguments and what becomes of groups that no product takes in are as of `reconstruction`.

    Reference:
        Molchanov, Tyree, Karras, Aila, Kautz. Pruning Convolutional Neural Networks for Resource
        Efficient Inference. ICLR 2017, by the mean of the values, which ReLU leaves positive.
    """

    def ranks(params: Params, problem: Problem, batches: Sequence[Batch]) -> dict[str, Array]:
        found = layer_inputs(problem.apply, params, [b.x for b in batches], _squares)
        return {
            name: jnp.asarray(np.sqrt(sum(squares[rows].sum(1) for squares, _, rows in each)))
            for name, each in _consumers(graph, params, found, {}).items()
        }

    return _by_group("activation", {}, graph, granularity, ranks)


def taylor2(
    graph: Graph, *, granularity: Granularity | None = None, at_once: int = 8
) -> Correction:
    r"""Prune the units without which the loss should rise least, to second order.

    $s_u = \frac12 \operatorname{mean}_n (\sum_{i \in u} w_i g_{ni})^2$, over the gradients of
    single examples and the weights that enter the unit: what the empirical Fisher information says
    of the unit as a whole.

    Args:
        graph: what `dependency_graph` returns, whose groups the counts are of.
        granularity: what the counts are of; by default `structure.group(graph)`.
        at_once: examples whose gradients are held side by side.

    Reference:
        Theis, Korshunova, Tejani, Huszar. Faster gaze prediction with dense networks and Fisher
        pruning. 2018; Molchanov, Mallya, Tyree, Frosio, Kautz. Importance Estimation for Neural
        Network Pruning. CVPR 2019.
    """

    def ranks(params: Params, problem: Problem, batches: Sequence[Batch]) -> dict[str, Array]:
        check_gradients("taylor2", params)

        def squares(gradients: Params) -> dict[str, Array]:
            shares = jax.tree.map(lambda w, g: jnp.asarray(w, g.dtype)[None] * g, params, gradients)
            leaves = dict(trees.paths_and_leaves(shares))
            return {each.name: _unit_sums(each, leaves) for each in graph.groups if each.prunable}

        return jax.jit(
            lambda batch: jax.tree.map(
                lambda sums: sums / 2, over_examples(params, problem, batch, squares, at_once)
            )
        )(joined(batches))

    return _by_group("taylor2", {}, graph, granularity, ranks)


def _by_group(
    name: str,
    settings: dict[str, Any],
    graph: Graph,
    granularity: Granularity | None,
    ranks: Callable[[Params, Problem, Sequence[Batch]], dict[str, Array]],
) -> Correction:
    """Return the method that prunes the units of the lowest ranks, and corrects nothing."""
    granularity = granularity or group(graph)

    def prune(
        params: Params, problem: Problem, counts: Counts, batches: Sequence[Batch]
    ) -> tuple[Params, Masks]:
        found, norms = ranks(params, problem, batches), granularity.rank(params)
        others = [each for each in norms if each not in found]
        values = _values(graph, params, problem, batches, others) if others else {}
        for by, which in (
            ("what products give there", [each for each in others if each in values]),
            ("the norm of their weights", [each for each in others if each not in values]),
        ):
            if which:
                warnings.warn(
                    f"{name}: ranked by {by}, as no product with weights takes them in alone: "
                    f"{', '.join(which)}",
                    stacklevel=2,
                )
        found = {**values, **found}
        pieces = OrderedDict((each, found.get(each, norm)) for each, norm in norms.items())
        masks = granularity.spread(keep_pieces(pieces, counts, granularity), params)
        return jax.vmap(apply_masks, (None, 0))(params, masks), masks

    return Correction(name, settings, prune)


def _values(
    graph: Graph, params: Params, problem: Problem, batches: Sequence[Batch], names: Sequence[str]
) -> dict[str, Array]:
    """Return the root mean square of what the products that make units give, before a bias."""
    inputs = layer_inputs(problem.apply, params, [batch.x for batch in batches], _moments)
    layers = {layer.path: (layer, *of) for layer, of in inputs.items()}
    leaves, found = dict(trees.paths_and_leaves(params)), {}
    for each in (graph[name] for name in names):
        total = np.zeros(each.size)
        for member in each.members:
            if "produces" not in member.role or member.path not in layers:
                continue
            layer, sums, count = layers[member.path]
            if member.axis not in layer.outputs or layer.batched or layer.groups > 1:
                continue
            weights = np.asarray(to_matrix(jnp.asarray(leaves[member.path]), layer)[0], np.float64)
            squares = np.sum(weights * (np.asarray(sums / count, np.float64) @ weights), axis=0)
            shape = [np.shape(leaves[member.path])[i] for i in layer.outputs]
            along = np.moveaxis(squares.reshape(shape), layer.outputs.index(member.axis), 0)
            there = member.index >= 0
            np.add.at(total, member.index[there], along.reshape(len(along), -1).sum(1)[there])
        if total.any():
            found[each.name] = jnp.asarray(np.sqrt(np.maximum(total, 0)), jnp.float32)
    return found


def _unit_sums(group: Group, shares: dict[str, Array]) -> Array:
    """Return the sum over examples of the square of each unit's share, of (examples, *shape)."""
    total = jnp.zeros(())
    for member in group.members:
        if "produces" in member.role:
            share = jnp.moveaxis(shares[member.path], member.axis + 1, 1)
            along = jnp.sum(share.reshape(*share.shape[:2], -1), axis=2)
            units = jnp.where(member.index < 0, group.size, member.index)
            sums = jnp.zeros((len(along), group.size + 1), along.dtype)
            total = total + sums.at[:, units].add(along)[:, : group.size]
    return jnp.sum(total**2, axis=0)


def _moments(rows: Array) -> tuple[Array, Array]:
    rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
    return rows.T @ rows, jnp.asarray(rows.shape[0], jnp.float32)


def _squares(rows: Array) -> tuple[Array, Array]:
    rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
    return jnp.sum(rows**2, axis=0), jnp.asarray(rows.shape[0], jnp.float32)


_Taken = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of a layer that takes units in: what is known of its inputs, its weights, and (units, rows)."""


def _consumers(
    graph: Graph, params: Params, found: dict[Layer, Any], worths: Mapping[str, Array]
) -> dict[str, list[_Taken]]:
    """Return by group the layers that take its units in, each with means over their rows."""
    layers = {layer.path: (layer, *of) for layer, of in found.items()}
    leaves = dict(trees.paths_and_leaves(params))
    consumers: dict[str, list[_Taken]] = {}
    for each in graph.groups:
        for member in each.members:
            if member.role != "consumes" or member.path not in layers:
                continue
            layer, sums, count = layers[member.path]
            if member.axis not in layer.contracted or layer.batched or layer.groups > 1:
                continue
            shape = [np.shape(leaves[member.path])[i] for i in layer.contracted]
            rows = np.moveaxis(
                np.arange(np.prod(shape)).reshape(shape), layer.contracted.index(member.axis), 0
            ).reshape(len(member.index), -1)
            own = [rows[member.index == unit].ravel() for unit in range(each.size)]
            if len({len(of) for of in own}) == 1 and len(own[0]):
                weights = to_matrix(jnp.asarray(leaves[member.path]), layer)[0]
                worth = worths.get(member.path, jnp.ones((1, weights.shape[1])))
                weights = weights * jnp.sqrt(worth).astype(weights.dtype)
                taken = np.asarray(sums / count), np.asarray(weights), np.stack(own)
                consumers.setdefault(each.name, []).append(taken)
    return consumers


def _order(size: int, consumers: Sequence["_Consumer"], steps: int) -> Array:
    """Return when each unit goes, the later the higher; those that stay longest are best."""
    order: list[Any] = []
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
