"""Which leaves of any tree belong to the parameters: optimizer state, averages, masks, gradients.

`compaction` shrinks and expands what is found here.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

Shape = tuple[int, ...]


def belonging(
    path: str, shape: Shape, shapes: Mapping[str, Shape]
) -> list[tuple[str, tuple[int, ...]]]:
    """Return the parameters that a leaf may belong to, and which of their axes it has.

    Leaves match by path suffix: `0/mu/dense/kernel` belongs to `params/dense/kernel`; the longest
    match wins. A leaf has the parameter's shape, or lacks some of its axes, as factored moments do.

    Args:
        path: of the leaf.
        shape: likewise; one of a single element lacks no axes.
        shapes: of the parameters, by path.
    """
    if shapes.get(path) == shape:
        return [(path, tuple(range(len(shape))))]
    parts, longest = path.split("/"), 1
    found: list[tuple[str, tuple[int, ...]]] = []
    for name, whole in shapes.items():
        if (length := _suffix(parts, name.split("/"))) < longest:
            continue
        some = math.prod(shape) != 1 or len(shape) == len(whole)
        fits = [axes for axes in itertools.combinations(range(len(whole)), len(shape))
                if some and tuple(whole[i] for i in axes) == shape]  # fmt: skip
        if fits:
            found = [] if length > longest else found
            longest = length
            found += [(name, axes) for axes in fits]
    return found


def _suffix(a: Sequence[str], b: Sequence[str]) -> int:
    """Return how many parts two paths have in common at their ends."""
    pairs = zip(reversed(a), reversed(b), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
