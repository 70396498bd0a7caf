"""What a rule is, and what its functions are given.

A rule says all that the library knows of a primitive. To add one, write its functions beside those
of its kind, and a row in the table at the end of that file.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxprune.structure import axes as ax
from jaxprune.structure.axes import Atom, Axes
from jaxprune.structure.facts import Facts, Place, Share, Sites, nothing

Keep = dict[Atom, np.ndarray]
"""For the atoms that lose units: which units are kept, bool."""


class Call(NamedTuple):
    """An equation of which facts are asked."""

    eqn: Any
    axes: Sequence[Axes]  # of its operands
    place: Place
    sites: Sites

    def shape(self, operand: int) -> tuple[int, ...]:
        """Return the shape of an operand."""
        return self.eqn.invars[operand].aval.shape

    @property
    def out(self) -> tuple[int, ...]:
        """The shape of the first result."""
        return self.eqn.outvars[0].aval.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the first result."""
        return self.eqn.outvars[0].aval.dtype

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.eqn.primitive.name

    def check(self, operand: int, axis: int, neutral: np.ndarray, what: str) -> None:
        """Record which units of an operand's axis cannot be removed; see `Sites.check`."""
        self.sites.check(self.axes[operand][axis], neutral, f"{self.name} {what}")

    def needs(self, axis: int, shares: list[Share]) -> None:
        """Record how to come by the value that removed positions share, of every operand."""
        self.sites.shares.setdefault(self.place, {})[axis] = shares


class Resized(NamedTuple):
    """An equation at the sizes that are left."""

    eqn: Any
    operands: Sequence[Axes]
    results: Sequence[Axes]
    keep: Keep
    shares: Mapping[int, Sequence[Share]] = MappingProxyType({})

    @property
    def shrinks(self) -> bool:
        """Whether any operand or result loses units."""
        return any(
            atom in self.keep
            for axes in (*self.operands, *self.results)
            for axis in axes
            for atom in ax.atoms(axis)
        )

    def shape(self, out: int = 0) -> tuple[int, ...]:
        """Return the shape that is left of a result."""
        return kept_shape(self.results[out], self.keep)

    def before(self, operand: int, axis: int, stop: int) -> int:
        """Return how many positions before `stop` are kept of an operand's axis."""
        positions = ax.kept(self.operands[operand][axis], self.keep)
        return stop if positions is None else int(np.count_nonzero(positions[:stop]))

    def removed(self, operand: int, axis: int) -> np.ndarray:
        """Return which positions of an operand's axis are removed."""
        positions = ax.kept(self.operands[operand][axis], self.keep)
        n = ax.size(self.operands[operand][axis])
        return np.zeros(n, bool) if positions is None else ~positions


def kept_shape(axes: Axes, keep: Keep) -> tuple[int, ...]:
    """Return the shape that is left."""
    return tuple(_kept_size(axis, keep) for axis in axes)


def _kept_size(axis: ax.Axis, keep: Keep) -> int:
    positions = ax.kept(axis, keep)
    return ax.size(axis) if positions is None else int(np.count_nonzero(positions))


def unknown_axes(
    eqn: Any, ins: Sequence[Axes], algebra: Any, reason: str = "which is not understood"
) -> list[Axes]:
    """Freeze all axes that go in or come out."""
    reason = f"goes through {eqn.primitive.name}, {reason}"
    for axis in (axis for axes in ins for axis in axes):
        algebra.freeze(axis, reason)
    return [tuple(algebra.fresh(n, reason) for n in out.aval.shape) for out in eqn.outvars]


def unknown_facts(call: Call, ins: Sequence[Facts]) -> list[Facts]:
    """Return that nothing is known."""
    return [nothing(len(out.aval.shape)) for out in call.eqn.outvars]


class Rule(NamedTuple):
    """What a primitive does.

    Attributes:
        axes: of an equation, the axes of its operands, and an algebra: those of its results. The
            algebra, the module `axes` or that of `sources`, makes one what must shrink together.
        facts: of a `Call` and the facts of its operands: those of its results. It checks the call's
            sites where positions meet.
        sizes: of a `Resized` and its operands at the kept sizes: the parameters of the primitive
            that differ there; None where none carries sizes.
        whole: whether its result is made whole, and then cut to what is kept.
        complete: of a `Resized`, its results at the kept sizes, an axis, and what the primitive
            makes of the value that removed positions share there: the results with their share.
            None if it works position by position.
    """

    axes: Callable[[Any, Sequence[Axes], Any], list[Axes]] = unknown_axes
    facts: Callable[[Call, Sequence[Facts]], list[Facts]] = unknown_facts
    sizes: Callable[[Resized, Sequence[Any]], dict[str, Any]] | None = None
    whole: bool = False
    complete: Callable[..., list[Any]] | None = None


def size(eqn: Any, operand: int, axis: int) -> int:
    """Return how long an axis of an operand is."""
    return eqn.invars[operand].aval.shape[axis]
