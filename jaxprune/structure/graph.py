"""The dependency graph of a network: which axes of which leaves must shrink together.

Any `apply(params, x)` comes in; groups of (leaf, axis) pairs go out. `units` makes masks of their
units and `compaction` removes them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from jaxprune.structure import axes as ax
from jaxprune.structure.axes import Atom
from jaxprune.structure.facts import zeros_at
from jaxprune.structure.program import Program, State, trace_program
from jaxprune.structure.rules.products import KERNEL_WINDOW
from jaxprune.structure.sources import read
from jaxprune.types import Apply, Params


@dataclasses.dataclass(frozen=True)
class Member:
    """An axis of a leaf, and where on it the units of a group are.

    Attributes:
        path: of the leaf.
        axis: of the leaf.
        index: for every position of the axis the unit that it belongs to, or -1.
        role: `produces` the units, `consumes` them, does both, or is `with` them as a bias is.
    """

    path: str
    axis: int
    index: np.ndarray
    role: str

    @property
    def place(self) -> str:
        """The axis, and where on it the units are."""
        at = np.flatnonzero(self.index >= 0)
        each = at.size // (self.index.max() + 1)
        some = "" if at.size == self.index.size else f" from {at[0]} to {at[-1]}"
        many = "" if each == 1 else f", {each} a unit"
        return f"axis {self.axis}{some}{many}"


@dataclasses.dataclass(frozen=True)
class Group:
    """Axes of leaves that have the same units.

    Attributes:
        name: the path of the first leaf that produces the units; followed by the axis, and the
            place on it, where that leaf has several groups.
        size: the number of units.
        members: the axes of leaves on which the units lie.
        reason: why no unit can be removed, or None where they can.
        masks_consumers: whether a unit is without effect only if the weights that leave it are
            masked too, because its value is not zero when those that enter it are.
        within: the group whose units contain these, as heads contain their dimensions, or None.
        divides: whether the masked network divides zero by zero where units are masked, as weight
            normalisation does; the compact one does not.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    reason: str | None
    masks_consumers: bool
    within: str | None
    divides: bool = False

    @property
    def prunable(self) -> bool:
        """Whether units can be removed."""
        return self.reason is None

    def __str__(self) -> str:
        return _table([self])


@dataclasses.dataclass(frozen=True)
class Graph:
    """What must shrink together; `print` shows a table.

    Attributes:
        groups: of all axes but the windows of convolutions, in the order of the leaves.
        shapes: the shapes of the leaves, by path.
    """

    groups: tuple[Group, ...]
    shapes: dict[str, tuple[int, ...]]

    def __getitem__(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no group {name!r}; there are {', '.join(g.name for g in self.groups)}")

    def __str__(self) -> str:
        return _table(self.groups)


def _table(groups: Sequence[Group]) -> str:
    """Lay out a line a group, and below it a line a member."""
    lines = []
    for group in groups:
        state = "prunable" if group.prunable else f"not prunable: {group.reason}"
        inside = f", within {group.within}" if group.within else ""
        lines.append((group.name, f"{group.size} units", state + inside))
        lines += [(f"  {m.path}", m.place, m.role) for m in group.members]
    widths = [max((len(line[i]) for line in lines), default=0) for i in (0, 1)]
    return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in lines)


def dependency_graph(apply: Apply, params: Params, x: Any, *, state: State = None) -> Graph:
    """Return which axes of which leaves of a network must shrink together.

    Args:
        apply: any function of parameters and inputs that JAX can trace.
        params: its parameters, or their shapes and dtypes.
        x: inputs of the shape to trace with, or their shapes and dtypes; a batch of two or more,
            since an axis of one index cannot be told from a broadcast one.
        state: see `compact`.

    Example:
        >>> def apply(params, x):
        ...     return jax.nn.relu(x @ params["hidden"]) @ params["logits"]
        >>> params = {"hidden": jnp.ones((4, 3)), "logits": jnp.ones((3, 2))}
        >>> print(dependency_graph(apply, params, jnp.ones((5, 4)))["hidden"])
        hidden    3 units  prunable
          hidden  axis 1   produces
          logits  axis 0   consumes
    """
    program = trace_program(apply, params, x, state)
    shapes = {p: leaf.shape for p, leaf in zip(program.paths, program.leaves, strict=True)}
    return Graph(tuple(groups_of(program).values()), shapes)


def groups_of(program: Program) -> dict[Atom, Group]:
    """Return the groups of a traced network, in the order of the leaves."""
    roles = _roles(program)
    members: dict[Atom, list[tuple[int, Member]]] = {}
    for leaf, axis, atom, index in program.occurrences():
        role = " and ".join(sorted(roles.get((leaf, atom), ()), reverse=True)) or "with"
        member = Member(program.paths[leaf], axis, index, role)
        members.setdefault(atom, []).append((leaf, member))
    members = {a: found for a, found in members.items() if a.reason != KERNEL_WINDOW and a.size}
    reasons, masks_consumers, divided = _prove(program, members)
    names = _names(members)
    ordered = sorted(members, key=lambda atom: _place(members[atom]))
    return {
        atom: Group(
            names[atom],
            atom.size,
            tuple(member for _, member in members[atom]),
            reasons.get(atom),
            atom in masks_consumers,
            next((names[a] for a in _outer(atom, members) if a not in reasons), None),
            atom in divided,
        )
        for atom in ordered
    }


def _roles(program: Program) -> dict[tuple[int, Atom], set[str]]:
    """Return what a leaf does to the units of an atom: it `produces` or `consumes` them."""
    closed = ClosedJaxpr(program.node.jaxpr, program.node.consts)
    roles: dict[tuple[int, Atom], set[str]] = {}
    for use in read(closed, [len(axes) for axes in program.axes]).uses:
        for i, axis in enumerate(program.axes[use.leaf]):
            if use.of is not None or (i in use.contracted and use.kind == "embedding"):
                continue
            for atom in ax.atoms(axis):
                role = "consumes" if i in use.contracted else "produces"
                roles.setdefault((use.leaf, atom), set()).add(role)
    return roles


def _prove(
    program: Program, members: dict[Atom, list[tuple[int, Member]]]
) -> tuple[dict[Atom, str], set[Atom], set[Atom]]:
    """Return why units cannot be removed, of which consumers must be masked, and which divide.

    Every other unit of every atom is taken to be masked, and then the others: in all members but
    the consumers, and then, where that does not do, in those too.
    """
    reasons = {atom: atom.reason for atom in members if atom.reason}
    for atom, found in members.items():
        if not any("produces" in m.role for _, m in found):
            reasons.setdefault(atom, "no leaf produces it")
    free = [atom for atom in members if atom not in reasons]

    divided: set[Atom] = set()

    def failing(masks_consumers: set[Atom]) -> dict[Atom, str]:
        found: dict[Atom, str] = {}
        divided.clear()
        for first in (0, 1):
            zero = [[np.zeros(n, bool) for n in leaf.shape] for leaf in program.leaves]
            for atom in free:
                for leaf, m in members[atom]:
                    masked = m.role != "consumes" or atom in masks_consumers
                    if masked and jnp.issubdtype(program.leaves[leaf].dtype, jnp.inexact):
                        zero[leaf][m.axis] |= (m.index >= 0) & (m.index % 2 == first)
            facts = [zeros_at(z, leaf.dtype) for z, leaf in zip(zero, program.leaves, strict=True)]
            sites = program.interpret(facts)
            divided.update(sites.divided)
            for atom in free:
                if sites.matter.get(atom, np.ones(atom.size, bool))[first::2].any():
                    found.setdefault(atom, sites.reasons.get(atom, "nothing takes it in"))
        return found

    masks_consumers = set(failing(set()))
    return reasons | failing(masks_consumers), masks_consumers, divided


def _first(found: list[tuple[int, Member]]) -> tuple[int, Member]:
    """Return the leaf that a group is named after, and its member."""
    return next(((leaf, m) for leaf, m in found if "produces" in m.role), found[0])


def _place(found: list[tuple[int, Member]]) -> tuple[int, int, int]:
    leaf, member = _first(found)
    return leaf, member.axis, int(np.argmax(member.index >= 0))


def _names(members: dict[Atom, list[tuple[int, Member]]]) -> dict[Atom, str]:
    by_path: dict[str, list[Atom]] = {}
    for atom, found in members.items():
        by_path.setdefault(_first(found)[1].path, []).append(atom)
    names = {}
    for path, atoms in by_path.items():
        for atom in atoms:
            _, member = _first(members[atom])
            same = [a for a in atoms if _first(members[a])[1].axis == member.axis]
            place = f", {np.flatnonzero(member.index >= 0)[0]}:" if len(same) > 1 else ""
            if len({np.flatnonzero(_first(members[a])[1].index >= 0)[0] for a in same}) < len(same):
                place = f", {same.index(atom)}"  # factors of one product
            made = [a for a in atoms if "produces" in _first(members[a])[1].role]
            plain = "produces" in member.role and len(made) == 1
            names[atom] = path if plain else f"{path}[{member.axis}{place}]"
    return names


def _outer(atom: Atom, members: dict[Atom, list[tuple[int, Member]]]) -> list[Atom]:
    """Return the atoms that come before this one in the columns that a leaf produces."""
    leaf, member = _first(members[atom])
    if "produces" not in member.role:
        return []
    found = []
    for other, those in members.items():
        for i, m in those:
            if other is atom or i != leaf or "produces" not in m.role or m.axis > member.axis:
                continue
            both = (m.index >= 0) & (member.index >= 0) if m.axis == member.axis else np.True_
            runs = [np.count_nonzero(np.diff(x.index)) for x in (m, member)]
            if np.any(both) and (m.axis < member.axis or runs[0] < runs[1]):
                found.append(other)
    return found
