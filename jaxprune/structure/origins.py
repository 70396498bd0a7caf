"""What values are made of; for their axes, the second algebra of `rules`, beside that of `axes`.

The axes of a result have what those of the operands had; nothing is unified, and nothing frozen.
`sources` runs a program on these values.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune.structure.axes import runs
from jaxprune.structure.facts import Place

Axis = frozenset[tuple[int, int]]
"""What an axis of a value is made of: leaves by number, and their axes."""

NOTHING: Axis = frozenset()


def union(sets: Sequence[Any]) -> frozenset:
    """Return what is in any."""
    return frozenset().union(*sets)


def fresh(n: int, reason: str | None = None) -> Axis:
    """Return a new axis, made of nothing."""
    return NOTHING


def freeze(axis: Axis, reason: str) -> None:
    """Do nothing."""


def same(*axes: Axis) -> Axis:
    """Return what any of the axes is made of."""
    return union(axes)


def merged(*axes: Axis) -> Axis:
    """Return what any of the axes is made of."""
    return union(axes)


def joined(axes: Sequence[Axis]) -> Axis:
    """Return what any of the axes is made of."""
    return union(axes)


def split(axis: Axis, sizes: Sequence[int]) -> tuple[Axis, ...]:
    """Return the axis for every piece."""
    return (axis,) * len(sizes)


def reshape(axes: Sequence[Axis], old: Sequence[int], new: Sequence[int]) -> tuple[Axis, ...]:
    """Return the axes of a reshape: of each shortest run, all have what one had."""
    found = [NOTHING] * len(new)
    for before, after in runs(old, new) if 0 not in old else ():
        one = all(n == 1 for n in old[before])
        merged = union([a for a, n in zip(axes[before], old[before], strict=True)
                         if n > 1 or one])  # fmt: skip
        for k in range(len(new))[after]:
            found[k] = merged if new[k] > 1 or one else NOTHING
    return tuple(found)


class Weights(NamedTuple):
    """What a value is made of that is computed from leaves and constants alone.

    Attributes:
        axes: of the value.
        leaves: that it is computed from.
        inner: axes of leaves that products of such values sum over.
        lookups: those that it comes from.
        itself: the leaf that it is, its axes spread, moved or of another shape at most.
        mixed: whether axes that one axis of a leaf was cut into may be in another order than there.
    """

    axes: tuple[Axis, ...]
    leaves: frozenset[int] = frozenset()
    inner: Axis = NOTHING
    lookups: frozenset[tuple[int, int]] = frozenset()
    itself: int | None = None
    mixed: bool = False


class Value(NamedTuple):
    """What is known of a value of the program.

    Attributes:
        weights: None for what depends on the inputs, unless indices of theirs choose of leaves.
        data: whether it depends on the inputs.
        near: the leaves of the products that it is computed from with no other in between.
        before: the leaves of all products that it is computed from.
        product: those of the product that it is, up to its shape, biases and scales.
        result: the place of the product that it is as it came out.
    """

    weights: Weights | None
    data: bool = True
    near: frozenset[int] = frozenset()
    before: frozenset[int] = frozenset()
    product: frozenset[int] = frozenset()
    result: Place | None = None

    @property
    def made(self) -> bool:
        """Whether it is computed from leaves, and not from the inputs."""
        return self.weights is not None and bool(self.weights.leaves) and not self.data


def leaf(number: int, ndim: int) -> Value:
    """Return a leaf."""
    axes = tuple(frozenset([(number, axis)]) for axis in range(ndim))
    return Value(Weights(axes, frozenset([number]), itself=number), data=False)


def constant(value: Any) -> Value:
    """Return what is made of no leaf."""
    return Value(Weights((NOTHING,) * np.ndim(value)), data=False)


def made_of(parts: Sequence[Weights], axes: Sequence[Axis]) -> Weights:
    """Return what is made of several, with these axes."""
    leaves, inner, lookups = (union([part[i] for part in parts]) for i in (1, 2, 3))
    return Weights(tuple(axes), leaves, inner, lookups, mixed=any(part.mixed for part in parts))


def after(values: Sequence[Value], weights: Weights | None = None) -> Value:
    """Return what is computed from several values."""
    near, before = (union([value[i] for value in values]) for i in (2, 3))
    return Value(weights, any(value.data for value in values), near, before)


def either(values: Sequence[Value]) -> Value:
    """Return what is known of a value that is one of several of a shape."""
    found = after(values)
    parts = [value.weights for value in values if value.weights is not None]
    if found.data:
        return found
    axes = [union(each) for each in zip(*(part.axes for part in parts), strict=True)]
    return found._replace(weights=made_of(parts, axes))


def mixes(axes: Sequence[Axis], order: Sequence[int]) -> bool:
    """Tell whether a transposition changes the order of two axes that one axis of a leaf gave."""
    moved = [axes[i] for i in order]
    return any(
        order[i] > order[j] and moved[i] & moved[j]
        for i in range(len(order))
        for j in range(i + 1, len(order))
    )
