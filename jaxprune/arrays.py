"""What is done to single leaves: they are seen as matrices, reduced, and placed on devices."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxprune.types import Array

Axes = tuple[tuple[int, ...], tuple[int, ...]]
"""Of a leaf: the axes of which each index has inputs of its own, and those that are summed over."""


def sizes_of(shape: tuple[int, ...], axes: Axes) -> tuple[int, int, int]:
    """Return how many matrices a leaf is, and how many inputs and outputs each has."""
    batched, inputs = (math.prod(shape[i] for i in part) for part in axes)
    others = math.prod(n for i, n in enumerate(shape) if i not in (*axes[0], *axes[1]))
    return batched, inputs, others


def to_matrix(leaf: Array, axes: Axes) -> Array:
    """Return a leaf as (batched, inputs, outputs)."""
    return jnp.transpose(leaf, _order(leaf.ndim, axes)).reshape(sizes_of(leaf.shape, axes))


def from_matrix(matrix: Array, shape: tuple[int, ...], axes: Axes) -> Array:
    """Return the inverse of `to_matrix`; leading axes stay."""
    leading, order = matrix.shape[:-3], _order(len(shape), axes)
    moved = matrix.reshape(*leading, *(shape[i] for i in order))
    back = [len(leading) + int(i) for i in np.argsort(order)]
    return jnp.transpose(moved, (*range(len(leading)), *back))


def _order(ndim: int, axes: Axes) -> tuple[int, ...]:
    first = (*axes[0], *axes[1])
    return (*first, *(i for i in range(ndim) if i not in first))


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
