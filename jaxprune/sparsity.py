"""From a sparsity to exact counts: how many elements each leaf loses. Host arithmetic only.

Sparsities come in as numbers, counts go out as int32; `masks` takes them next.
"""

import math
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxprune import trees
from jaxprune.types import Counts, Granularity, Params, Prunable, Scope


def num_pruned(size: int, sparsity: Any) -> int:
    r"""Return how many of `size` elements a sparsity prunes: $\lfloor n s + 1/2 \rfloor$, exactly.

    Args:
        size: number of elements, at least 0.
        sparsity: in [0, 1]. A float is read by its shortest decimal, so that 0.9 is nine tenths;
            a `Fraction`, `Decimal` or integer is exact.

    Raises:
        ValueError: the size is negative, or the sparsity outside [0, 1] or not a number.
        TypeError: the sparsity is not a concrete real number.

    Example:
        >>> num_pruned(10, 0.9), num_pruned(10, 0.25)
        (9, 3)
    """
    if size < 0:
        raise ValueError(f"size must be at least 0, got {size}")
    return int(size * exact(sparsity) + Fraction(1, 2))


def counts(
    params: Params,
    sparsity: Any,
    *,
    granularity: Granularity = "weight",
    scope: Scope = "layer",
    prunable: Prunable | None = None,
    unit_axis: int = -1,
) -> Counts:
    """Return how many weights or units are pruned.

    Args:
        params: parameters, or any tree of the same shapes; only shapes are read.
        sparsity: in [0, 1], or a sequence of these, one a level.
        granularity: `weight`, or `unit`: an index of the axis `unit_axis` of a leaf.
        scope: `layer` prunes the fraction of every prunable leaf, `global` of them all together.
        prunable: which leaves take part; see `trees.prunable_leaves`.
        unit_axis: the axis whose indices are units.

    Returns:
        Scope `layer`: the tree of `params` with an int32 a leaf, 0 where it is not prunable.
        Scope `global`: one int32. Both with a leading levels axis where `sparsity` is a sequence.

    Raises:
        ValueError: a sparsity outside [0, 1], an unknown granularity or scope, an unusable leaf, or
            a unit axis that a leaf lacks.
        TypeError: a sparsity that is traced.

    Example:
        >>> counts({"dense": np.ones((5, 4)), "logits": np.ones((4, 2))}, [0.5, 0.9])["dense"]
        array([10, 18], dtype=int32)
    """
    check_choice("granularity", granularity, ("weight", "unit"))
    check_choice("scope", scope, ("layer", "global"))
    listed = isinstance(sparsity, Sequence) and not isinstance(sparsity, str)
    many = listed or getattr(sparsity, "ndim", 0) > 0
    targets = [exact(s) for s in (sparsity if many else [sparsity])]
    flags = trees.prunable_leaves(params, prunable)
    sizes = [
        num_elements(np.shape(leaf), granularity, unit_axis) if flag else 0
        for flag, leaf in zip(flags, jax.tree.leaves(params), strict=True)
    ]

    def count(size: int) -> np.ndarray | np.int32:
        pruned = np.array([num_pruned(size, s) for s in targets], np.int32)
        return pruned if many else pruned[0]

    if scope == "global":
        return count(sum(sizes))
    return jax.tree.unflatten(jax.tree.structure(params), [count(size) for size in sizes])


def num_elements(shape: tuple[int, ...], granularity: Granularity, unit_axis: int = -1) -> int:
    """Return the number of weights, or of units, of a leaf of this shape."""
    if granularity == "weight":
        return math.prod(shape)
    check_unit_axis(shape, unit_axis)
    return shape[unit_axis]


def exact(sparsity: Any) -> Fraction:
    """Return a sparsity as an exact fraction; a float by its shortest decimal.

    Raises:
        ValueError: it is outside [0, 1] or not a number.
        TypeError: it is traced, or not a real number.
    """
    if isinstance(sparsity, Tracer):
        raise TypeError(
            "sparsity is traced; counts are made of concrete numbers: call `counts` outside of "
            "jit and pass its counts to `masks_at`, which can be traced"
        )
    if isinstance(sparsity, str):
        raise TypeError(f"sparsity must be a number in [0, 1], got {sparsity!r}")
    if isinstance(sparsity, Fraction):
        value = sparsity
    else:
        try:
            value = Fraction(Decimal(str(sparsity)))
        except (ArithmeticError, ValueError, OverflowError):
            number = isinstance(sparsity, int | float | np.floating | Decimal)
            kind = ValueError if number else TypeError
            raise kind(f"sparsity must be a number in [0, 1], got {sparsity!r}") from None
    if not 0 <= value <= 1:
        raise ValueError(f"sparsity must be in [0, 1], got {sparsity}")
    return value


def check_choice(name: str, given: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError, naming the choices, where `given` is not one of them."""
    if given not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {given!r}")


def check_unit_axis(shape: tuple[int, ...], unit_axis: int) -> None:
    """Raise ValueError, naming the shape, where a leaf of this shape lacks the axis."""
    if not -len(shape) <= unit_axis < len(shape):
        raise ValueError(f"unit_axis {unit_axis} is not an axis of a leaf of shape {shape}")
