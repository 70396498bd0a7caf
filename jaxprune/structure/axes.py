"""Axes as products and sums of atoms, and the union-find that makes them agree.

`program` gives every axis of every intermediate value such an expression, by `rules`, to which this
module is the algebra. What must shrink together ends up in one atom: units are its indices.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Union

import numpy as np

_AGES = itertools.count()


class Atom:
    """A run of indices that is not taken apart: one variable of the union-find.

    Attributes:
        size: the number of indices.
        bound: what the atom turned out to be, once it is known.
        reason: why none of its indices may be removed; None where they may.
        settled: whether its program is built: from then on nothing is bound or frozen.
        age: how many were made before. Of two the younger is bound, so that what is traced later,
            such as a derivative, does not change what is known of the program.
    """

    def __init__(self, size: int, reason: str | None = None):
        self.age = next(_AGES)
        self.size = size
        self.bound: Axis | None = None
        self.reason = reason
        self.settled = False


@dataclasses.dataclass(frozen=True)
class Product:
    """Axes merged into one, row-major: a flattened image, heads and their dimensions."""

    factors: "tuple[Axis, ...]"


@dataclasses.dataclass(frozen=True)
class Sum:
    """Axes laid end to end: a concatenation."""

    terms: "tuple[Axis, ...]"


Axis = Union[Atom, Product, Sum]  # noqa: UP007 (the classes have no `|`)
Axes = tuple[Axis, ...]


def fresh(size: int, reason: str | None = None) -> Axis:
    """Return a new axis; one of a single index has no atom, since nothing can be removed."""
    return Product(()) if size == 1 else Atom(size, reason)


def resolve(axis: Axis) -> Axis:
    """Return what is known of an axis: free atoms, products of no products, sums of no sums."""
    if isinstance(axis, Atom):
        if axis.bound is None:
            return axis
        axis.bound = resolve(axis.bound)
        return axis.bound
    if isinstance(axis, Product):
        factors: list[Axis] = []
        for factor in map(resolve, axis.factors):
            factors += factor.factors if isinstance(factor, Product) else (factor,)
        return factors[0] if len(factors) == 1 else Product(tuple(factors))
    terms: list[Axis] = []
    for term in map(resolve, axis.terms):
        if size(term):
            terms += term.terms if isinstance(term, Sum) else (term,)
    return terms[0] if len(terms) == 1 else Sum(tuple(terms))


def size(axis: Axis) -> int:
    """Return the number of indices."""
    if isinstance(axis, Atom):
        return axis.size
    if isinstance(axis, Product):
        return math.prod(map(size, axis.factors))
    return sum(map(size, axis.terms))


def atoms(axis: Axis) -> list[Atom]:
    """Return the free atoms, in order, repeated where they recur."""
    axis = resolve(axis)
    if isinstance(axis, Atom):
        return [axis]
    parts = axis.factors if isinstance(axis, Product) else axis.terms
    return [atom for part in parts for atom in atoms(part)]


def freeze(axis: Axis, reason: str) -> None:
    """Forbid that any index is removed; the first reason stays."""
    for atom in atoms(axis):
        if not atom.settled:
            atom.reason = atom.reason or reason


def same(*axes: Axis) -> Axis:
    """Make axes the same, and return it."""
    for other in axes[1:]:
        unify(axes[0], other)
    return axes[0]


def joined(axes: Sequence[Axis]) -> Axis:
    """Return axes laid end to end."""
    return Sum(tuple(axes))


def merged(*axes: Axis) -> Axis:
    """Return axes merged into one, row-major."""
    return Product(axes)


def settle(axes: Axes) -> Axes:
    """Return what axes turned out to be, and let nothing change it."""
    for atom in (atom for axis in axes for atom in atoms(axis)):
        atom.settled = True
    return tuple(map(resolve, axes))


def unify(a: Axis, b: Axis) -> None:
    """Make two axes of one size the same; where they cannot be, freeze both."""
    a, b = resolve(a), resolve(b)
    if a == b:
        return
    if isinstance(a, Atom) or isinstance(b, Atom):
        older = isinstance(a, Atom) and isinstance(b, Atom) and a.age < b.age
        atom, other = (a, b) if isinstance(a, Atom) and not older else (b, a)
        assert isinstance(atom, Atom)
        if atom.settled:
            raise ValueError("a derivative that is taken later asks for other groups")
        if atom in atoms(other):
            freeze(other, "its axis is made to agree with a part of itself")
            return
        if atom.reason:
            freeze(other, atom.reason)
        atom.bound = other
    elif isinstance(a, Product) and isinstance(b, Product):
        _align_products(list(a.factors), list(b.factors))
    else:
        _align_sums([a], [b])


def split(axis: Axis, sizes: tuple[int, ...]) -> Axes:
    """Return an axis cut into pieces of the given sizes."""
    pieces = tuple(fresh(n) for n in sizes)
    unify(axis, Sum(pieces))
    return pieces


def reshape(axes: Axes, old: Sequence[int], new: Sequence[int]) -> Axes:
    """Return the axes of a row-major reshape; what does not divide evenly is frozen."""
    found = tuple(map(fresh, new))
    if 0 in old:
        for axis in (*axes, *found):
            freeze(axis, "its array is empty")
        return found
    for before, after in runs(old, new):
        unify(Product(axes[before]), Product(found[after]))
    return found


def runs(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Yield the shortest runs of old and of new axes of a reshape that hold the same elements."""
    i = j = 0
    while i < len(old) or j < len(new):
        first = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (before := math.prod(old[first[0] : i])) != (now := math.prod(new[first[1] : j])):
            i, j = (i + 1, j) if before < now else (i, j + 1)
        yield slice(first[0], i), slice(first[1], j)


def units(axis: Axis) -> list[tuple[Atom, np.ndarray]]:
    """Return, for every atom of an axis, which of its indices each position of the axis has.

    Returns:
        Pairs of an atom and an int array as long as the axis, -1 where the atom has no part.
    """
    axis = resolve(axis)
    if isinstance(axis, Atom):
        return [(axis, np.arange(axis.size))]
    found, before, length = [], 0, size(axis)
    if isinstance(axis, Sum):
        for term in axis.terms:
            after = length - before - size(term)
            for atom, index in units(term):
                found.append((atom, np.pad(index, (before, after), constant_values=-1)))
            before += size(term)
        return found
    outer = 1
    for factor in axis.factors:
        inner = length // (outer * size(factor)) if length else 0
        for atom, index in units(factor):
            found.append((atom, np.tile(np.repeat(index, inner), outer)))
        outer *= size(factor)
    return found


def kept(axis: Axis, keep: dict[Atom, np.ndarray]) -> np.ndarray | None:
    """Return which positions of an axis are kept, bool, or None for all of them."""
    if not any(atom in keep for atom in atoms(axis)):
        return None
    positions = np.ones(size(axis), bool)
    for atom, index in units(axis):
        if atom in keep:
            positions &= np.where(index < 0, True, keep[atom][index])
    return positions


def _align_products(left: list[Axis], right: list[Axis]) -> None:
    """Unify two products factor by factor, taking atoms apart where the sizes ask for it."""
    while left and right:
        a, b = resolve(left.pop(0)), resolve(right.pop(0))
        if isinstance(a, Product) or isinstance(b, Product):  # an atom taken apart meanwhile
            left[:0] = a.factors if isinstance(a, Product) else (a,)
            right[:0] = b.factors if isinstance(b, Product) else (b,)
            continue
        if size(a) == size(b):
            unify(a, b)
            continue
        big, small, rest = (a, b, left) if size(a) > size(b) else (b, a, right)
        if isinstance(big, Atom) and size(big) % size(small) == 0:
            inner = Atom(size(big) // size(small))
            unify(big, Product((small, inner)))
            rest.insert(0, inner)
            continue
        for axis in (a, b, *left, *right):
            freeze(axis, "a reshape cuts across its units")
        return


def _align_sums(left: list[Axis], right: list[Axis]) -> None:
    """Unify two concatenations piece by piece, cutting where the sizes ask for it."""
    while left and right:
        a, b = resolve(left.pop(0)), resolve(right.pop(0))
        if isinstance(a, Sum) or isinstance(b, Sum):
            left[:0] = a.terms if isinstance(a, Sum) else (a,)
            right[:0] = b.terms if isinstance(b, Sum) else (b,)
            continue
        if size(a) == size(b):
            unify(a, b)
            continue
        big, small, rest = (a, b, left) if size(a) > size(b) else (b, a, right)
        pieces = _cut(big, size(small))
        if pieces is None:
            for axis in (a, b, *left, *right):
                freeze(axis, "a slice or concatenation cuts across its units")
            return
        unify(pieces[0], small)
        rest.insert(0, pieces[1])


def _cut(axis: Axis, at: int) -> tuple[Axis, Axis] | None:
    """Cut an axis in two; a product only between whole indices of its first factor."""
    axis = resolve(axis)
    if isinstance(axis, Atom):
        pieces = fresh(at), fresh(axis.size - at)
        unify(axis, Sum(pieces))
        return pieces
    if isinstance(axis, Sum):
        if at < (first := size(axis.terms[0])):
            pieces = _cut(axis.terms[0], at)
            return pieces and (pieces[0], Sum((pieces[1], *axis.terms[1:])))
        if at == first:
            return axis.terms[0], Sum(axis.terms[1:])
        pieces = _cut(Sum(axis.terms[1:]), at - first)
        return pieces and (Sum((axis.terms[0], pieces[0])), pieces[1])
    inner = math.prod(map(size, axis.factors[1:]))
    if not axis.factors or at % inner:
        return None
    pieces = _cut(axis.factors[0], at // inner)
    return pieces and (
        Product((pieces[0], *axis.factors[1:])),
        Product((pieces[1], *axis.factors[1:])),
    )
