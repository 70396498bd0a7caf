"""Which units masks leave without effect, and how many parameters that leaves.

A traced program and masks come in. `compaction` removes the units.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune import trees
from jaxprune.masks import check_masks
from jaxprune.structure import axes as ax
from jaxprune.structure.facts import Facts, Shares, nothing, zeros_at
from jaxprune.structure.program import Program, State, trace_program
from jaxprune.structure.rules.base import Keep
from jaxprune.types import Apply, Masks, Params


def remaining(
    apply: Apply,
    params: Params,
    x: Any,
    *,
    state: State = None,
    counted: Callable[[str], bool] = lambda path: True,
) -> Callable[[Masks], int]:
    """Return a function that counts the parameters left, of the masks of one network.

    What counts is a parameter that its mask keeps, and that does not go with a unit that the masks
    leave without effect, as `compaction(..., fold=False)` removes them. The network is traced once.

    Args:
        apply: the network.
        params: its parameters, or their shapes and dtypes.
        x: inputs to trace with, or their shapes and dtypes.
        state: see `compact`.
        counted: whether the leaf of a path counts; by default all do.

    Returns:
        `count(masks) -> int`, of concrete masks without a levels axis. It raises ValueError or
        TypeError as `compaction` does.

    Example:
        >>> def apply(params, x):
        ...     return jax.nn.relu(x @ params["hidden"]) @ params["logits"]
        >>> params = {"hidden": jnp.ones((4, 3)), "logits": jnp.ones((3, 2))}
        >>> masks = {"hidden": np.array([[True, True, False]] * 4), "logits": np.ones((3, 2), bool)}
        >>> remaining(apply, params, jnp.ones((2, 4)))(masks)
        12
    """
    program = trace_program(apply, params, x, state)
    abstract = jax.tree.unflatten(jax.tree.structure(params), program.leaves)

    def count(masks: Masks) -> int:
        leaves = concrete(masks, abstract)
        keep, *_ = removable(program, leaves)
        left = 0
        for path, mask, axes in zip(program.paths, leaves, program.axes, strict=True):
            for i, axis in enumerate(axes):
                positions = ax.kept(axis, keep)
                mask = mask if positions is None else np.compress(positions, mask, axis=i)
            left += int(np.count_nonzero(mask)) if counted(path) else 0
        return left

    return count


def concrete(masks: Masks, params: Params) -> list[np.ndarray]:
    """Return the leaves of masks, checked, as arrays of NumPy."""
    check_masks(masks, params)
    for path, mask in trees.paths_and_leaves(masks):
        if isinstance(mask, Tracer):
            raise TypeError(f"mask {path!r} has no values: compact outside of jit")
    return [np.asarray(mask, bool) for mask in jax.tree.leaves(masks)]


def removable(
    program: Program, masks: list[np.ndarray], within: list[Any] | None = None
) -> tuple[Keep, Shares, list[ax.Atom]]:
    """Return the kept units of the atoms that lose some, what the others share, and emptied atoms.

    Units go in rounds, since one that is gone may have been all that another entered or left. What
    they share may be another value once more are gone: then all begins anew, and units that matter
    after all stay.

    Args:
        program: the network.
        masks: of its leaves.
        within: of every leaf and axis the positions that an earlier call kept, bool, or None for
            all; other units stay. By default any may go.
    """
    keep: Keep = {}
    allowed: Keep = {}
    for leaf, axis, atom, index in program.occurrences():
        if within is not None and atom.reason is None:
            positions = within[leaf][axis]
            gone = np.zeros(atom.size, bool)
            if positions is not None:
                gone = np.ones(atom.size, bool)
                gone[index[(index >= 0) & positions]] = False
            allowed[atom] = allowed.get(atom, True) & gone
    needed: Keep = {}  # units that are not to be removed after all
    emptied: dict[ax.Atom, None] = {}
    of_leaves = {atom for _, _, atom, _ in program.occurrences()}
    while True:
        facts = facts_of(program, masks, keep)
        sites = program.interpret(facts)
        changed = False
        for atom, matter in sites.matter.items():
            if atom.reason is not None or atom not in of_leaves or not atom.size:
                continue
            new = (matter | needed.get(atom, False)) & keep.get(atom, True)
            if within is not None:
                new |= ~allowed[atom] & keep.get(atom, True)
            if not new.any():
                emptied[atom] = None
                new[np.argmax(keep.get(atom, new))] = True
            if new.all() or (atom in keep and (new == keep[atom]).all()):
                continue
            keep[atom], changed = new, True
        if changed:
            continue
        # What removed units share may be another value once others are gone.
        late = {atom: sites.matter[atom] & ~kept for atom, kept in keep.items()}
        if not any(units.any() for units in late.values()):
            return keep, sites.shares, list(emptied)
        needed = {atom: units | needed.get(atom, False) for atom, units in late.items()} | {
            atom: units for atom, units in needed.items() if atom not in late
        }
        keep, emptied = {}, {}


def facts_of(program: Program, masks: list[np.ndarray], keep: Keep) -> list[Facts]:
    """Return what masks tell of the leaves, of which some units are gone."""
    return [
        _of_masks(mask, axes, leaf.dtype, keep)
        for mask, axes, leaf in zip(masks, program.axes, program.leaves, strict=True)
    ]


def _of_masks(mask: np.ndarray, axes: ax.Axes, dtype: Any, keep: Keep) -> Facts:
    """Return at which positions of a leaf's axes all that is kept of it is masked."""
    if mask.all() or not jnp.issubdtype(dtype, jnp.inexact):
        return nothing(mask.ndim)
    kept = [ax.kept(axis, keep) for axis in axes]
    zero = []
    for i in range(mask.ndim):
        left = mask
        for j, positions in enumerate(kept):
            if j != i and positions is not None:
                left = np.compress(positions, left, axis=j)
        zero.append(~left.any(tuple(j for j in range(mask.ndim) if j != i)))
    return zeros_at(zero, dtype)
