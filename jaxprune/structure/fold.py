"""Fold units that have become constants into the biases of the layers that take them in.

A unit whose incoming weights are all masked, but not its bias, is f(b) for every input. Where it
goes only into `x @ kernel + bias`, its share of the sum goes into that bias, and its weights are
masked; `compaction` then removes it as it does any other.
"""

from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Literal

from jaxprune.structure import axes as ax
from jaxprune.structure.facts import Facts, Place
from jaxprune.structure.program import Program
from jaxprune.structure.rules.base import Keep


class _Sum(NamedTuple):
    """A `dot_general` of the program whose result takes a bias, and leaves by number."""

    operand: int  # that is no leaf
    axis: ax.Axis  # of the operand, summed over
    kernel: int
    rows: int  # the kernel's axis that is summed over
    bias: int


def fold_constants(
    program: Program,
    leaves: list[Any],
    masks: list[np.ndarray],
    facts: list[Facts],
    keep: Keep,
) -> tuple[list[Any], list[np.ndarray]] | None:
    """Return leaves and masks with what can be folded; None if nothing can.

    Args:
        program: the network.
        leaves: its parameters, NumPy arrays, masked.
        masks: their masks.
        facts: what is known of them from the masks.
        keep: the units kept so far.
    """
    sums = _sums(program)
    if not sums:
        return None
    gone: Keep = {}
    for leaf, axis, atom, index in program.occurrences():
        if np.ndim(leaves[leaf]) > 1 and atom.reason is None:
            zero = facts[leaf].equals(axis, index.size)  # units that lost what enters them
            units = np.zeros(atom.size, bool)
            units[index[zero & (index >= 0)]] = True
            units &= keep.get(atom, np.ones(atom.size, bool))
            gone[atom] = gone.get(atom, units) | units
    if not any(units.any() for units in gone.values()):
        return None
    known = [
        Facts(((np.ones(leaf.size, bool), leaf),)) if np.ndim(leaf) == 1 and leaf.size else fact
        for leaf, fact in zip(leaves, facts, strict=True)
    ]
    sites = program.interpret(known, {eqn: s.operand for eqn, s in sums.items()})
    for atom in gone:
        gone[atom] &= ~sites.matter.get(atom, np.ones(atom.size, bool))
        if not (keep.get(atom, np.ones(atom.size, bool)) & ~gone[atom]).any():
            gone[atom][:] = False  # one would stay, and it must go on to learn as it did
    folded = False
    leaves, masks = [*leaves], [np.array(mask) for mask in masks]
    for leaf in {leaf for s in sums.values() for leaf in (s.kernel, s.bias)}:
        leaves[leaf] = np.array(leaves[leaf])
    for eqn, s in sums.items():
        if eqn not in sites.constants:
            continue
        constant, value = sites.constants[eqn]
        rows = _positions(s.axis, gone) & constant & np.moveaxis(masks[s.kernel], s.rows, 0).any(1)
        if rows.any():
            kernel = np.moveaxis(leaves[s.kernel], s.rows, 0)
            share = value[rows].astype(np.float64) @ kernel[rows].astype(np.float64)
            masks[s.bias] |= share != 0
            leaves[s.bias] += share.astype(leaves[s.bias].dtype)
            kernel[rows], np.moveaxis(masks[s.kernel], s.rows, 0)[rows] = 0, False
            folded = True
    for leaf, axes in enumerate(program.axes):
        if len(axes) == 1:  # what is zero already may as well be masked, which is a proof
            zero = _positions(axes[0], gone) & (leaves[leaf] == 0) & masks[leaf]
            masks[leaf][zero] = False
            folded |= bool(zero.any())
    return (leaves, masks) if folded else None


def _positions(axis: ax.Axis, gone: Keep) -> np.ndarray:
    found = np.zeros(ax.size(axis), bool)
    for atom, index in ax.units(axis):
        if atom in gone:
            found |= (index >= 0) & gone[atom][index]
    return found


def _sums(program: Program) -> dict[Place, _Sum]:
    """Return the sums that take a bias, by the place of their equation.

    Kernel and bias must be leaves of no other use, since both are changed.
    """
    node = program.node
    eqns: list[Any] = list(node.jaxpr.eqns)
    uses: dict[Any, list[int]] = {}
    for i, eqn in enumerate(eqns):
        for x in eqn.invars:
            if not isinstance(x, Literal):
                uses.setdefault(x, []).append(i)
    results = [x for x in node.jaxpr.outvars if not isinstance(x, Literal)]
    number = {x: i for i, x in enumerate(node.jaxpr.invars[: len(program.leaves)])}
    made = {x: eqn for eqn in eqns for x in eqn.outvars}

    def once(x: Any) -> bool:
        return len(uses.get(x, ())) == 1 and x not in results

    def bias_of(x: Any, axis: int) -> int | None:
        """Return the leaf that is spread along an axis, one leaf axis and nothing else."""
        while once(x) and x not in number:
            eqn = made.get(x)
            shape = () if eqn is None else eqn.invars[0].aval.shape if eqn.invars else ()
            if eqn is None or eqn.primitive.name not in ("broadcast_in_dim", "reshape"):
                return None
            n = x.aval.shape[axis]
            if eqn.primitive.name == "broadcast_in_dim":
                dims = eqn.params["broadcast_dimensions"]
                if axis not in dims:
                    return None
                axis = dims.index(axis)
            elif int(np.prod(x.aval.shape)) == n and n in shape and n == int(np.prod(shape)):
                axis = shape.index(n)
            else:
                return None
            x = eqn.invars[0]
            if x.aval.shape[axis] != n or int(np.prod(x.aval.shape)) != n:
                return None
        return number[x] if once(x) and x in number and x.aval.ndim == 1 else None

    found: dict[Place, _Sum] = {}
    for number_of, eqn in enumerate(eqns):
        if eqn.primitive.name != "dot_general" or not once(eqn.outvars[0]):
            continue
        sums, batch = eqn.params["dimension_numbers"]
        then = eqns[uses[eqn.outvars[0]][0]]
        for k in (0, 1):
            kernel = eqn.invars[1 - k]
            if kernel not in number or not once(kernel) or kernel.aval.ndim != 2:
                continue
            if batch[0] or len(sums[0]) != 1 or then.primitive.name != "add":
                continue
            if isinstance(then.invars[0], Literal) or isinstance(then.invars[1], Literal):
                continue
            other = then.invars[1 if then.invars[0] is eqn.outvars[0] else 0]
            rank = eqn.outvars[0].aval.ndim
            bias = bias_of(other, rank - 1 if k == 0 else 0) if rank else None
            if bias is not None:
                axis = node.operands[number_of][k][sums[k][0]]
                found[number_of,] = _Sum(k, axis, number[kernel], sums[1 - k][0], bias)
    return found
