"""What is known of the values of a program: which positions of their axes hold one constant.

Masks tell it of the leaves, `rules` what a primitive makes of it. Wherever positions meet, `Sites`
takes down which units add something to the others, and so cannot be removed.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.structure import axes as ax
from jaxprune.structure.axes import Atom, Axis

Known = tuple[np.ndarray, np.ndarray]
"""Of an axis: which of its positions hold one constant, bool, and that constant."""

Place = tuple[int, ...]
"""Where an equation stands: its number, after those of the equations that call its program."""

Shares = dict[Place, dict[int, "list[Share]"]]


class Facts(NamedTuple):
    """What is known of a value.

    Attributes:
        axes: for each axis what is known of its positions, or None.
        whole: the constant that all elements are, or None.
        alike: by axis, the positions that all hold one value, which is not known and may differ
            along other axes: what is left of removed units once their mean is subtracted.
    """

    axes: tuple[Known | None, ...]
    whole: np.ndarray | None = None
    alike: Mapping[int, np.ndarray] = MappingProxyType({})

    def along(self, axis: int, n: int) -> Known | None:
        """Return what is known of the `n` positions of an axis."""
        if self.whole is not None:
            return np.ones(n, bool), np.full(n, self.whole)
        return self.axes[axis] if self.axes else None

    def equals(self, axis: int, n: int, constant: Any = 0) -> np.ndarray:
        """Return at which positions of an axis all values are the constant."""
        known = self.along(axis, n)
        return np.zeros(n, bool) if known is None else known[0] & (known[1] == constant)


class Share(NamedTuple):
    """How to come by the one value that positions of an axis of an operand hold.

    Attributes:
        at: which positions.
        constant: the value, where it is known.
        carried: whether it was computed beside the operand. Where neither holds, the operand does
            not vary along the axis.
    """

    at: np.ndarray
    constant: Any = None
    carried: bool = False


def share(facts: Facts, axis: int, shape: Sequence[int], n: int) -> Share | None:
    """Return what positions of an axis have in common, of an operand that is broadcast to `n`."""
    if not shape or shape[axis] != n:
        return Share(np.ones(n, bool), facts.whole)
    if axis in facts.alike:
        return Share(facts.alike[axis], carried=True)
    known = facts.along(axis, n)
    if known is None or not known[0].any():
        return None
    zero = known[0] & (known[1] == 0)
    first = known[1][np.argmax(zero if zero.any() else known[0])]
    return Share(known[0] & (known[1] == first), first)


class Sites:
    """Which units matter: filled while a program is interpreted.

    Attributes:
        matter: for every atom whose positions meet somewhere, bool a unit.
        reasons: for every atom of which some unit matters, why.
        divided: atoms by the values of whose masked units something is divided.
        shares: where the value that removed positions share is needed: by place and axis, how to
            come by it, of every operand.
        foldable: for products whose result takes a bias, the operand whose constants can be folded
            into that: there it does not matter.
        constants: what is known of these operands.
    """

    def __init__(self, foldable: dict[Place, int] | None = None) -> None:
        self.foldable = foldable or {}
        self.constants: dict[Place, Known] = {}
        self.matter: dict[Atom, np.ndarray] = {}
        self.reasons: dict[Atom, str] = {}
        self.divided: set[Atom] = set()
        self.shares: Shares = {}

    def check(self, axis: Axis, neutral: np.ndarray, reason: str) -> None:
        """Record which units cannot be removed.

        Args:
            axis: over which positions meet, as in a sum.
            neutral: bool a position, whether it adds nothing to the others. A unit with a position
                that does matters.
            reason: why it does.
        """
        for atom, index in ax.units(axis):
            matter = self.matter.setdefault(atom, np.zeros(atom.size, bool))
            found = index[(index >= 0) & ~neutral]
            matter[found] = True
            if found.size:
                self.reasons.setdefault(atom, reason)


def nothing(rank: int) -> Facts:
    """Return the facts of a value of which nothing is known."""
    return Facts((None,) * rank)


def zeros_at(zero: Sequence[np.ndarray | None], dtype: Any) -> Facts:
    """Return the facts of a leaf from which positions of its axes are masked whole."""
    return Facts(
        tuple(None if z is None or not z.any() else (z, np.zeros(z.size, dtype)) for z in zero)
    )


def constant(value: Any) -> Facts:
    """Return the facts of a constant of a program."""
    shape = np.shape(value)
    if jnp.issubdtype(getattr(value, "dtype", np.int32), jax.dtypes.extended):
        return nothing(len(shape))
    value = np.asarray(value)
    uniform = value.size and bool((value == value.flat[0]).all()) and _one_sign(value)
    return Facts((None,) * len(shape), value.flat[0] if uniform else None)


def _one_sign(value: np.ndarray) -> bool:
    """Tell whether zeros have one sign, which a few primitives look at."""
    real = jnp.issubdtype(value.dtype, np.floating)
    return not real or value.flat[0] != 0 or len({*np.signbit(value).flat}) == 1


def common(facts: Sequence[Known | None]) -> Known | None:
    """Return what is known of positions that take in those of all the given."""
    known = [k for k in facts if k is not None]
    if len(known) < len(facts):
        return None
    both = known[0][0].copy()
    for other in known[1:]:
        both &= other[0] & (other[1] == known[0][1])
    return (both, known[0][1]) if both.any() else None


def only(known: Known | None, value: Any) -> Known | None:
    """Return what is known of the positions that hold a certain constant."""
    return None if known is None else (known[0] & (known[1] == value), known[1])


def meet(a: Facts, b: Facts, shape: tuple[int, ...]) -> Facts:
    """Return what is known of a value that is the one or the other."""
    whole = a.whole if a.whole is not None and b.whole == a.whole else None
    along = [common([a.along(i, n), b.along(i, n)]) for i, n in enumerate(shape)]
    return Facts(tuple(along), whole)
