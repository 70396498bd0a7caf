"""What is pruned as one: a weight, or a unit of a layer.

A granularity is made here, or by `structure.group`; `distribution` counts its pieces, `masks` ranks
them and gives those that are kept the shapes of the parameters.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxprune import trees
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
        size=lambda path, shape: math.prod(shape),
        rank=lambda path, leaf: (leaf if leaf.dtype == jnp.bool_ else wide(leaf)).ravel(),
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
    found = {layer.path: layer for layer in reversed(layers or ()) if layer.product}
    never = {layer.path for layer in layers or () if layer.last or layer.kind == "embedding"}

    def flags(tree: Any) -> list[bool]:
        listed = trees.prunable_leaves(tree, prunable)
        if prunable is not None or layers is None:
            return listed
        paths = [path for path, _ in trees.paths_and_leaves(tree)]
        chosen = found.keys() - never
        return [flag and path in chosen for path, flag in zip(paths, listed, strict=True)]

    def outputs(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if layers is None and shape:
            return (len(shape) - 1,)
        if path not in found or not found[path].outputs:
            raise ValueError(
                f"leaf {path!r}, of shape {shape}, is the weights of no layer with outputs, so its "
                "units are not known: leave it out by `prunable`, which selects it"
            )
        return found[path].outputs

    def size(path: str, shape: tuple[int, ...]) -> int:
        return math.prod(shape[axis] for axis in outputs(path, shape))

    def rank(path: str, leaf: Array) -> Array:
        return unit_norms(leaf, outputs(path, leaf.shape)).ravel()

    def spread(path: str, kept: Array, shape: tuple[int, ...]) -> Array:
        levels, axes = kept.shape[:-1], outputs(path, shape)
        kept = kept.reshape(*levels, *(n if i in axes else 1 for i, n in enumerate(shape)))
        return jnp.broadcast_to(kept, (*levels, *shape))

    return _of_leaves("unit", flags, size, rank, spread)


def _of_leaves(
    name: str,
    flags: Callable[[Any], list[bool]],
    size: Callable[[str, tuple[int, ...]], int],
    rank: Callable[[str, Array], Array],
    spread: Callable[[str, Array, tuple[int, ...]], Array],
) -> Granularity:
    """Return the granularity whose pieces each lie in one leaf.

    Args:
        name: of the granularity.
        flags: which leaves of a tree are prunable.
        size: how many pieces a leaf has, from path and shape.
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

    def cost(params: Params) -> Pieces:
        def one(flag: bool, path: str, leaves: Any) -> np.ndarray:
            shape = np.shape(leaves[0])
            pieces = size(path, shape) if flag else 0
            return np.broadcast_to(math.prod(shape) // max(pieces, 1), (pieces,))

        return each(one, params)

    def spread_all(kept: Pieces, params: Params) -> Masks:
        def one(flag: bool, path: str, leaves: Any) -> Array:
            leaf, keep = leaves
            if not flag:
                return jnp.ones((*keep.shape[:-1], *np.shape(leaf)), bool)
            return sharded_like(leaf, spread(path, keep, np.shape(leaf)))

        return each(one, params, kept)

    return Granularity(name, rank_all, cost, spread_all)


def unit_norms(x: Array, axes: tuple[int, ...]) -> Array:
    """Return the L2 norm of what belongs to each index of some axes, in float32 or float64.

    Of booleans, whether any is True.
    """
    others = tuple(a for a in range(x.ndim) if a not in axes)
    if x.dtype == jnp.bool_:
        return jnp.any(x, axis=others)
    x = wide(x)
    # A power of two, which is exact, keeps squares in range.
    exponents = jnp.frexp(jnp.max(jnp.abs(x), axis=others, keepdims=True))[1]
    exponents = jnp.clip(exponents, -126, 126)
    squares = jnp.square(x * jnp.ldexp(jnp.ones((), x.dtype), -exponents))
    return jnp.ldexp(jnp.sqrt(jnp.sum(squares, axis=others)), jnp.squeeze(exponents, others))


def wide(x: Array) -> Array:
    """Return numbers as float32, or float64 as they are; exact for narrower types."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def replicated(leaf: Any) -> Array:
    """Return a leaf as an array; one that an explicit mesh shards, whole on all its devices.

    There an array cannot be reshaped or sorted along an axis that is sharded.
    """
    leaf = jnp.asarray(leaf)
    found = _explicit(leaf)
    if found is None:
        return leaf
    return jax.sharding.reshard(leaf, NamedSharding(found.mesh, PartitionSpec()))


def sharded_like(leaf: Any, mask: Array) -> Array:
    """Return masks of a leaf, (*levels, *shape), sharded as the leaf if by an explicit mesh."""
    found = _explicit(leaf)
    if found is None:
        return mask
    levels = [None] * (mask.ndim - np.ndim(leaf))
    sharding = NamedSharding(found.mesh, PartitionSpec(*levels, *found.spec))
    return (jax.sharding.reshard if isinstance(leaf, Tracer) else jax.device_put)(mask, sharding)


def _explicit(leaf: Any) -> Any:
    """Return how an explicit mesh shards a leaf, or None."""
    if not isinstance(leaf, jax.Array):
        return None
    found: Any = jax.typeof(leaf).sharding if isinstance(leaf, Tracer) else leaf.sharding
    named = isinstance(found, NamedSharding) and AxisType.Explicit in found.mesh.axis_types
    return found if named else None
