"""What the axes of values are made of: the second algebra of `rules`, beside that of `axes`.

The axes of a result have what those of the operands had; nothing is unified, and nothing frozen.
"""

from collections.abc import Sequence
from typing import Any

from jaxprune.structure.axes import runs

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
