"""What is pruned as one: a weight, a unit, a row or a block of a layer, or n of every m inputs.

A granularity is made here, or by `structure.group`; `distribution` counts its pieces, `masks` ranks
them and gives those that are kept the shapes of the parameters.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees
from jaxprune.arrays import (
    Axes,
    from_matrix,
    replicated,
    sharded_like,
    sizes_of,
    to_matrix,
    unit_norms,
    wide,
)
from jaxprune.config import parse_granularity
from jaxprune.types import Array, Granularity, Masks, Params, Pieces, Prunable, Scores


def weight(prunable: Prunable = None) -> Granularity:
    """Return the granularity of single weights; unstructured pruning.

    The pieces are the tree of the parameters, each leaf flat, empty where it is not prunable.

    Args:
        prunable: which leaves take part; see `trees.prunable_leaves`.

    Example:
        >>> pieces = weight().rank({"bias": jnp.ones(2), "kernel": jnp.array([[3.0, 1.0]])})
        >>> pieces["kernel"].tolist(), pieces["bias"].shape
        ([3.0, 1.0], (0,))
    """
    return _of_leaves(
        "weight",
        flags=lambda tree: trees.prunable_leaves(tree, prunable),
        cost=lambda path, shape: np.broadcast_to(1, (math.prod(shape),)),
        rank=lambda path, leaf: _number(leaf).ravel(),
        spread=lambda path, kept, shape: kept.reshape(*kept.shape[:-1], *shape),
    )


def unit(prunable: Prunable = None, layers: Sequence[Any] | None = None) -> Granularity:
    r"""Return the granularity of units: what a layer computes one output with is pruned as one.

    A unit is an index of the axes of a kernel that its product does not sum over, flattened: a
    neuron, a channel, a dimension of a head of attention; of stacked layers, and of experts, each
    has its own units. Its score is the L2 norm of the scores of its weights,
    $\sqrt{\sum_i s_i^2}$, and all its weights are pruned. What takes a pruned unit in is neither
    masked nor counted.

    Args:
        prunable: which leaves take part; see `trees.prunable_leaves`. With `layers`, by default the
            kernels of products but for embeddings and the last layer, as `structure.prunable` says.
        layers: what `structure.layers` returns, which tells the axes of every kernel. Without it a
            unit is an index of the last axis, as of a kernel of Flax; those of Equinox or PyTorch
            are (outputs, inputs). Of a kernel that several products sum over different axes of,
            the first product's count.

    Raises:
        ValueError: when used: a selected leaf is the weights of none of the `layers`.

    Example:
        >>> kernel = {"kernel": jnp.array([[3.0, 1.0], [4.0, 0.0]])}
        >>> unit().rank(kernel)["kernel"].tolist()
        [5.0, 1.0]
    """

    def outputs(axes: Axes, ndim: int) -> tuple[int, ...]:
        return tuple(i for i in range(ndim) if i not in axes[1])

    return _slices("unit", outputs, prunable, layers)


def row(prunable: Prunable = None, layers: Sequence[Any] | None = None) -> Granularity:
    """Return the granularity of rows: what a layer takes one input in with is pruned as one.

    A row is an index of the axes of a kernel that its product sums over: an input of a dense layer,
    a position of the window and an input channel of a convolution. Scores, arguments and errors are
    as of `unit`; without `layers` all axes but the last are inputs.

    Example:
        >>> row().rank({"kernel": jnp.array([[3.0, 4.0], [1.0, 0.0]])})["kernel"].tolist()
        [5.0, 1.0]
    """
    return _slices("row", lambda axes, ndim: tuple(sorted((*axes[0], *axes[1]))), prunable, layers)


def block(
    height: int, width: int, prunable: Prunable = None, layers: Sequence[Any] | None = None
) -> Granularity:
    """Return the granularity of blocks of weights, of some inputs and some outputs of a layer.

    A kernel is a matrix of inputs and outputs for it, as `row` and `unit` say; at its end blocks
    are smaller where their size does not divide the matrix. Their score is the L2 norm of the
    scores of their weights. Other arguments and errors are as of `unit`.

    Args:
        height: inputs in a block.
        width: outputs in a block.
        prunable: which leaves take part.
        layers: what `structure.layers` returns.

    Raises:
        ValueError: when made: a size below 1.

    Example:
        >>> block(1, 2).rank({"kernel": jnp.array([[3.0, 4.0], [1.0, 0.0]])})["kernel"].tolist()
        [5.0, 1.0]
    """
    if min(height, width) < 1:
        raise ValueError(f"a block has sizes of at least 1, got {height}x{width}")
    flags, axes = _matrices(prunable, layers)

    def many(sizes: tuple[int, int, int]) -> tuple[int, int, int]:
        return sizes[0], -(-sizes[1] // height), -(-sizes[2] // width)

    def cost(path: str, shape: tuple[int, ...]) -> np.ndarray:
        experts, inputs, outputs = sizes_of(shape, axes(path, shape))
        high, wide = (
            np.minimum(np.arange(0, n, size) + size, n) - np.arange(0, n, size)
            for n, size in ((inputs, height), (outputs, width))
        )
        return np.tile(np.outer(high, wide).ravel(), experts)

    def rank(path: str, leaf: Array) -> Array:
        x = to_matrix(_number(leaf), axes(path, leaf.shape))
        experts, down, across = many(sizes_of(leaf.shape, axes(path, leaf.shape)))
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % height), (0, -x.shape[2] % width)))
        return unit_norms(x.reshape(experts, down, height, across, width), (0, 1, 3)).ravel()

    def spread(path: str, kept: Array, shape: tuple[int, ...]) -> Array:
        own = axes(path, shape)
        _, inputs, outputs = sizes = sizes_of(shape, own)
        kept = kept.reshape(*kept.shape[:-1], *many(sizes))
        kept = jnp.repeat(jnp.repeat(kept, height, -2), width, -1)[..., :inputs, :outputs]
        return from_matrix(kept, shape, own)

    return _of_leaves(f"block{height}x{width}", flags, cost, rank, spread)


def n_m(
    n: int, m: int, prunable: Prunable = None, layers: Sequence[Any] | None = None
) -> Granularity:
    """Return the granularity of weights of which n of every m consecutive inputs stay, or all.

    Of the inputs of each output, as `row` has them, every m compete among themselves. The only
    sparsity of a leaf other than 0 is (m - n) / m. Other arguments and errors are as of `unit`.

    Args:
        n: how many stay.
        m: of how many.
        prunable: which leaves take part.
        layers: what `structure.layers` returns.

    Raises:
        ValueError: when made: not 0 < n < m; when used: m does not divide the inputs of a leaf.

    Example:
        >>> kernel = jnp.array([[3.0], [1.0], [0.0], [2.0]])
        >>> pieces = n_m(2, 4)
        >>> pruned = jp.counts(kernel, 0.5, granularity=pieces)
        >>> jp.masks_at(kernel, pruned, granularity=pieces)[:, 0].tolist()
        [True, False, False, True]

    Reference:
        Mishra et al. Accelerating Sparse Deep Neural Networks. 2021.
    """
    if not 0 < n < m:
        raise ValueError(f"n:m keeps n of m, with 0 < n < m, got {n}:{m}")
    flags, axes = _matrices(prunable, layers)

    def cost(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if (inputs := sizes_of(shape, axes(path, shape))[1]) % m:
            raise ValueError(
                f"leaf {path!r} has {inputs} inputs, which {m} does not divide: leave it out, or "
                f"choose another pattern than {n}:{m}"
            )
        return np.broadcast_to(1, (math.prod(shape),))

    def rank(path: str, leaf: Array) -> Array:
        cost(path, leaf.shape)
        return jnp.swapaxes(to_matrix(_number(leaf), axes(path, leaf.shape)), -1, -2).ravel()

    def spread(path: str, kept: Array, shape: tuple[int, ...]) -> Array:
        own = axes(path, shape)
        experts, inputs, outputs = sizes_of(shape, own)
        kept = kept.reshape(*kept.shape[:-1], experts, outputs, inputs)
        return from_matrix(jnp.swapaxes(kept, -1, -2), shape, own)

    return _of_leaves(f"{n}:{m}", flags, cost, rank, spread)._replace(within=(n, m))


def named(name: str, prunable: Prunable = None, layers: Sequence[Any] | None = None) -> Granularity:
    """Return the granularity of a name: `weight`, `unit`, `row`, such as `block4x4`, or `2:4`.

    Raises:
        ValueError: there is no such granularity.

    Example:
        >>> named("block4x1").name, named("2:4").within
        ('block4x1', (2, 4))
    """
    kind, numbers = parse_granularity(name)
    if kind == "weight":
        return weight(prunable)
    makers = {"unit": unit, "row": row, "block": block, "n:m": n_m}
    return makers[kind](*numbers, prunable, layers)


def _slices(
    name: str,
    choose: Callable[[Axes, int], tuple[int, ...]],
    prunable: Prunable,
    layers: Sequence[Any] | None,
) -> Granularity:
    """Return the granularity whose pieces are the indices of some axes of a leaf, all the rest."""
    flags, axes = _matrices(prunable, layers)

    def along(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return choose(axes(path, shape), len(shape))

    def cost(path: str, shape: tuple[int, ...]) -> np.ndarray:
        pieces = math.prod(shape[axis] for axis in along(path, shape))
        return np.broadcast_to(math.prod(shape) // max(pieces, 1), (pieces,))

    def rank(path: str, leaf: Array) -> Array:
        return unit_norms(leaf, along(path, leaf.shape)).ravel()

    def spread(path: str, kept: Array, shape: tuple[int, ...]) -> Array:
        levels, own = kept.shape[:-1], along(path, shape)
        kept = kept.reshape(*levels, *(n if i in own else 1 for i, n in enumerate(shape)))
        return jnp.broadcast_to(kept, (*levels, *shape))

    return _of_leaves(name, flags, cost, rank, spread)


def _matrices(
    prunable: Prunable, layers: Sequence[Any] | None
) -> tuple[Callable[[Any], list[bool]], Callable[[str, tuple[int, ...]], Axes]]:
    """Return which leaves of a tree take part, and the axes of each by path and shape."""
    found = {layer.path: layer for layer in reversed(layers or ()) if layer.product}
    never = {layer.path for layer in layers or () if layer.last or layer.kind == "embedding"}

    def flags(tree: Any) -> list[bool]:
        listed = trees.prunable_leaves(tree, prunable)
        if prunable is not None or layers is None:
            return listed
        paths = [path for path, _ in trees.paths_and_leaves(tree)]
        chosen = found.keys() - never
        return [flag and path in chosen for path, flag in zip(paths, listed, strict=True)]

    def axes(path: str, shape: tuple[int, ...]) -> Axes:
        if layers is None and shape:
            return (), tuple(range(len(shape) - 1))
        if path not in found or not found[path].outputs:
            raise ValueError(
                f"leaf {path!r}, of shape {shape}, is the weights of no layer with outputs, so its "
                "units are not known: leave it out by `prunable`, which selects it"
            )
        return found[path].batched, found[path].contracted

    return flags, axes


def _of_leaves(
    name: str,
    flags: Callable[[Any], list[bool]],
    cost: Callable[[str, tuple[int, ...]], np.ndarray],
    rank: Callable[[str, Array], Array],
    spread: Callable[[str, Array, tuple[int, ...]], Array],
) -> Granularity:
    """Return the granularity whose pieces each lie in one leaf.

    Args:
        name: of the granularity.
        flags: which leaves of a tree are prunable.
        cost: how many weights each piece of a leaf has, (pieces,), from path and shape.
        rank: their scores, from path and scores.
        spread: masks, (*levels, *shape), from path, what is kept (*levels, pieces), and shape.
    """

    def each(f: Callable[..., Any], tree: Any, *others: Any) -> Any:
        paths = [path for path, _ in trees.paths_and_leaves(tree)]
        leaves = zip(*map(jax.tree.leaves, (tree, *others)), strict=True)
        found = [f(*of) for of in zip(flags(tree), paths, leaves, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(tree), found)

    def rank_all(scores: Scores) -> Pieces:
        def one(flag: bool, path: str, leaves: Any) -> Array:
            return rank(path, replicated(leaves[0])) if flag else jnp.zeros(0)

        return each(one, scores)

    def cost_all(params: Params) -> Pieces:
        def one(flag: bool, path: str, leaves: Any) -> np.ndarray:
            return cost(path, np.shape(leaves[0])) if flag else np.zeros(0, int)

        return each(one, params)

    def spread_all(kept: Pieces, params: Params) -> Masks:
        def one(flag: bool, path: str, leaves: Any) -> Array:
            leaf, keep = leaves
            if not flag:
                return jnp.ones((*keep.shape[:-1], *np.shape(leaf)), bool)
            return sharded_like(leaf, spread(path, keep, np.shape(leaf)))

        return each(one, params, kept)

    return Granularity(name, rank_all, cost_all, spread_all)


def _number(leaf: Array) -> Array:
    """Return scores to compare; masks stay as they are."""
    return leaf if leaf.dtype == jnp.bool_ else wide(leaf)
