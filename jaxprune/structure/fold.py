"""Fold units that have become constants into the biases of the layers that take them in.

A unit whose incoming weights are all masked, but not its bias, is f(b) for every input. Where it
goes only into `x @ kernel + bias`, its share of the sum goes into that bias, and its weights are
masked; `compaction` then removes it as it does any other.
"""

from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import ClosedJaxpr

from jaxprune.structure import axes as ax
from jaxprune.structure.facts import Facts, Place
from jaxprune.structure.program import Program
from jaxprune.structure.removal import removable
from jaxprune.structure.rules.base import Keep
from jaxprune.structure.sources import read


class _Sum(NamedTuple):
    """A product of the program whose result takes a bias, and leaves by number."""

    operand: int  # that depends on the inputs
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

    Units that could not be removed afterwards stay as they are.

    Args:
        program: the network.
        leaves: its parameters, NumPy arrays, masked.
        masks: their masks.
        facts: what is known of them from the masks.
        keep: the units kept so far.
    """
    sums, stay = _sums(program), {}
    while sums and (found := _fold(program, sums, leaves, masks, facts, keep, stay)) is not None:
        *folded, gone = found
        left, *_ = removable(program, folded[1])
        late = {atom: units & left.get(atom, True) for atom, units in gone.items()}
        if not any(units.any() for units in late.values()):
            return folded[0], folded[1]
        stay = {atom: units | stay.get(atom, False) for atom, units in late.items()}
    return None


def _fold(
    program: Program,
    sums: dict[Place, _Sum],
    leaves: list[Any],
    masks: list[np.ndarray],
    facts: list[Facts],
    keep: Keep,
    stay: Keep,
) -> tuple[list[Any], list[np.ndarray], Keep] | None:
    """Fold all units but those that `stay`; return which, too."""
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
        gone[atom] &= ~stay.get(atom, np.zeros(atom.size, bool))
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
    return (leaves, masks, gone) if folded else None


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
    node, found = program.node, {}
    closed = ClosedJaxpr(node.jaxpr, node.consts)
    for place, product in read(closed, [leaf.ndim for leaf in program.leaves]).products.items():
        if len(place) == 1 and product.matrix is not None and product.bias is not None:
            k, [use] = product.operand, product.orders
            [summed] = node.jaxpr.eqns[place[0]].params["dimension_numbers"][0][k]
            axis = node.operands[place[0]][k][summed]
            found[place] = _Sum(k, axis, product.matrix, use.contracted[0], product.bias)
    return found
