"""Remove units for good: smaller parameters, and the same function of them.

Masks come in, from `units`, `masks` or anywhere else. What they leave without effect is proven
and removed; what cannot be proven stays, masked. Training goes on with what comes out.
"""

import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from jaxprune import trees
from jaxprune.structure import axes as ax
from jaxprune.structure.facts import Shares
from jaxprune.structure.fold import fold_constants
from jaxprune.structure.graph import groups_of
from jaxprune.structure.matching import belonging
from jaxprune.structure.program import Program, State, constant_atoms, evaluate, trace_program
from jaxprune.structure.removal import concrete, facts_of, removable
from jaxprune.structure.rules.base import Keep, kept_shape
from jaxprune.types import Apply, Masks, Params


class Compaction:
    """A network without the units that its masks leave without effect.

    Attributes:
        params: the smaller parameters.
        masks: their masks, where units stay that have masked weights.
        signature: networks of one `apply` and one signature are the same function of their
            parameters, so that what was compiled for one serves the others.
        emptied: names of the groups without any effect, of which one unit is kept, as zeros.
    """

    def __init__(
        self, apply: Apply, params: Params, masks: Masks, x: Any, *, fold: bool, state: State = None
    ):
        self._full_apply, self._state = apply, state
        self._tree = jax.tree.structure(params)
        self._programs: dict[Any, tuple[Program, Keep, Shares]] = {}
        self._shapes = {path: jnp.shape(leaf) for path, leaf in trees.paths_and_leaves(params)}
        program = trace_program(apply, params, x, state)
        self._masks = concrete(masks, params)
        pairs = zip(jax.tree.leaves(params), self._masks, strict=True)
        leaves = [_masked(leaf, mask) for leaf, mask in pairs]
        while True:
            keep, shares, emptied = removable(program, self._masks)
            facts = facts_of(program, self._masks, keep)
            folded = fold_constants(program, leaves, self._masks, facts, keep) if fold else None
            if folded is None:
                break
            leaves, self._masks = folded
        self._program_kept = program, keep, shares
        self.emptied = [groups_of(program)[atom].name for atom in emptied]
        self._kept = {
            path: tuple(ax.kept(axis, keep) for axis in axes)
            for path, axes in zip(program.paths, program.axes, strict=True)
        }
        self.signature = (
            tuple(self._small(path) for path in self._shapes),
            # And of what each axis is made, such as heads and their dimensions.
            tuple(
                int(np.count_nonzero(keep[atom])) if atom in keep else atom.size
                for _, _, atom, _ in program.occurrences()
            ),
            tuple(keep[atom].tobytes() for atom in constant_atoms(program.node) if atom in keep),
        )
        self.params = self.shrink(jax.tree.unflatten(self._tree, leaves))
        self.masks = self.shrink(jax.tree.unflatten(self._tree, self._masks))

    def __repr__(self) -> str:
        before = sum(int(np.prod(shape)) for shape in self._shapes.values())
        after = sum(int(np.prod(self._small(path))) for path in self._shapes)
        return f"<Compaction: {after:,} of {before:,} parameters>"

    @cached_property
    def widths(self) -> dict[str, tuple[int, int]]:
        """For every group of the graph, by name, how many units it had and has."""
        program, keep, _ = self._program_kept
        return {
            group.name: (group.size, int(np.count_nonzero(keep.get(atom, np.ones(group.size)))))
            for atom, group in groups_of(program).items()
        }

    def apply(self, params: Params, x: Any) -> Any:
        """Return what the masked network returns, of parameters of the smaller shapes.

        It can be jitted, differentiated and vmapped. Every new shape of `x` is traced anew.
        """
        inputs, structure = jax.tree.flatten(x)
        leaves = jax.tree.leaves(params)
        if jax.tree.structure(params) != self._tree:
            raise ValueError(f"params must be a tree like {self._tree}")
        for path, leaf in zip(self._shapes, leaves, strict=True):
            if jnp.shape(leaf) != (shape := self._small(path)):
                raise ValueError(
                    f"leaf {path!r} has shape {jnp.shape(leaf)}, the compact network's has {shape}"
                )
        abstract, given = jax.eval_shape(lambda *args: args, leaves, inputs)
        dtypes = tuple(leaf.dtype for leaf in abstract)
        key = structure, dtypes, tuple((a.shape, a.dtype, a.weak_type) for a in given)
        if key not in self._programs:
            self._programs[key] = self._program(dtypes, x)
        program, keep, shares = self._programs[key]
        outs = evaluate(program.node, keep, [*leaves, *inputs], shares)
        return jax.tree.unflatten(program.out_tree, outs)

    def shrink(self, tree: Any) -> Any:
        """Remove the units from parameters, masks, optimizer state, or whatever contains them.

        Leaves match by path suffix and shape: `0/mu/dense/kernel` belongs to `params/dense/kernel`,
        the longest match wins, and factored moments lack some of the axes. All others stay as they
        are, with a warning where one has the shape of parameters that lose units.

        Raises:
            ValueError: a leaf may belong to two parameters, or to two axes of one, that lose
                different units; names both.
        """

        def cut(leaf: Any, full: tuple[int, ...], kept: Sequence[Any]) -> Any:
            found = np.asarray(leaf) if not _is_key(leaf) else leaf
            for i, positions in enumerate(kept):
                if positions is not None:
                    found = found.take(np.flatnonzero(positions), axis=i)
            return jnp.asarray(found)

        return self._map(cut, tree, self._shapes)

    def expand(self, tree: Any) -> Any:
        """Put the removed units back, as zeros, into what `shrink` gave; see there."""

        def put(leaf: Any, full: tuple[int, ...], kept: Sequence[Any]) -> Any:
            if all(positions is None for positions in kept):
                return leaf
            found = np.zeros(full, jnp.asarray(leaf).dtype)
            at = [np.arange(n) if k is None else np.flatnonzero(k)
                  for n, k in zip(full, kept, strict=True)]  # fmt: skip
            found[np.ix_(*at)] = np.asarray(leaf)
            return jnp.asarray(found)

        return self._map(put, tree, {path: self._small(path) for path in self._shapes})

    def _map(self, f: Any, tree: Any, shapes: dict[str, tuple[int, ...]]) -> Any:
        """Map a function of leaf, full shape and kept positions over what belongs to parameters."""
        losing = {p: n for p, n in shapes.items() if any(k is not None for k in self._kept[p])}
        stay = []

        def one(path: Any, leaf: Any) -> Any:
            name, shape = keystr(path, simple=True, separator="/"), jnp.shape(leaf)
            found: dict[Any, Any] = {}
            for param, axes in belonging(name, shape, shapes):
                full = tuple(self._shapes[param][i] for i in axes)
                kept = [self._kept[param][i] for i in axes]
                effect = tuple(None if k is None else k.tobytes() for k in kept)
                found.setdefault((full, effect), (param, axes, full, kept))
            if len(found) > 1:
                first, second, *_ = (f"axes {axes} of {p!r}" for p, axes, *_ in found.values())
                raise ValueError(f"leaf {name!r}, of shape {shape}, may be of {first} or {second}")
            if not found:
                named = np.size(leaf) > 1 and any(f"/{name}".endswith(f"/{p}") for p in losing)
                if named or shape in losing.values():
                    stay.append(f"{name!r} of shape {shape}")
                return leaf
            ((*_, full, kept),) = found.values()
            return f(leaf, full, kept)

        mapped = jax.tree.map_with_path(one, tree)
        if stay:
            listed = "; ".join(stay[:8]) + (f" and {len(stay) - 8} more" if stay[8:] else "")
            warnings.warn(
                "leaves with the shape or the path of parameters that lose units, but not with "
                f"both, stay as they are: {listed}", stacklevel=3,
            )  # fmt: skip
        return mapped

    def _small(self, path: str) -> tuple[int, ...]:
        return tuple(
            n if kept is None else int(np.count_nonzero(kept))
            for n, kept in zip(self._shapes[path], self._kept[path], strict=True)
        )

    def _program(self, dtypes: tuple[Any, ...], x: Any) -> tuple[Program, Keep, Shares]:
        """Trace at a new shape, and find that the same units can be removed there."""
        abstract = [
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in zip(self._shapes.values(), dtypes, strict=True)
        ]
        params = jax.tree.unflatten(self._tree, abstract)
        program = trace_program(self._full_apply, params, x, self._state)
        keep, shares, _ = removable(program, self._masks, list(self._kept.values()))
        for path, axes in zip(program.paths, program.axes, strict=True):
            if kept_shape(axes, keep) != self._small(path):
                raise ValueError(
                    f"at inputs of shapes {[jnp.shape(a) for a in jax.tree.leaves(x)]} the units "
                    f"of leaf {path!r} cannot be removed as at those that the network was "
                    "compacted with: compact it at these"
                )
        return program, keep, shares


def compaction(
    apply: Apply, params: Params, masks: Masks, x: Any, *, fold: bool = True, state: State = None
) -> Compaction:
    """Remove all units that masks leave without effect; see `compact`.

    Args:
        apply: the network.
        params: its parameters.
        masks: the same tree and shapes, bool.
        x: inputs to trace with.
        fold: whether units that have become constants may move into the next bias: the function
            stays, but trains otherwise than the masked network does.
        state: see `compact`.

    Returns:
        The smaller `params`, their `apply`, the `widths`, and `shrink` and `expand` for optimizer
        state and whatever else has the shapes of the parameters.
    """
    return _planned(apply, params, masks, x, fold, state)


def compact(
    apply: Apply, params: Params, masks: Masks, x: Any, *, state: State = None
) -> tuple[Params, Apply]:
    """Return the parameters without the units that masks leave without effect, and their network.

    A unit goes if the masks show that the function stays the same, for all values of the
    parameters that are kept: because its value is zero wherever it is summed, or nothing is made
    of it. Units that lost all their inputs or outputs to masks of single weights go too. All
    other units stay, masked. Values are taken to be finite: zero times infinity counts as zero.

    Args:
        apply: the network, any function of parameters and inputs that JAX can trace.
        params: its parameters.
        masks: the same tree and shapes, bool, True is kept; from `group_masks` or any other.
        x: inputs of the shape to trace with, or their shapes and dtypes; a batch of two or more.
        state: for a network that returns new values of some of its parameters, as of the running
            statistics of BatchNorm: a function of what it returns that gives these, in a tree with
            the paths that they have in `params`. They shrink as those do; all else that a network
            returns keeps its shape. With Linen's `mutable=["batch_stats"]`, and all variables for
            `params`, it is `lambda out: out[1]`.

    Returns:
        Smaller parameters of the same tree, and a pure function like `apply`, to be used with
        inputs of any shape that `apply` takes.

    Raises:
        ValueError: the trees or a leaf's shapes differ, or `state` has leaves that are none of the
            parameters.
        TypeError: a mask is not bool, or has no values.

    Example:
        >>> def apply(params, x):
        ...     return jax.nn.relu(x @ params["hidden"]) @ params["logits"]
        >>> params = {"hidden": jnp.ones((4, 3)), "logits": jnp.ones((3, 2))}
        >>> masks = {"hidden": jnp.array([[True, True, False]] * 4), "logits": jnp.ones((3, 2)) > 0}
        >>> small, small_apply = compact(apply, params, masks, jnp.ones((2, 4)))
        >>> small["hidden"].shape, small["logits"].shape, small_apply(small, jnp.ones((1, 4)))
        ((4, 2), (2, 2), Array([[8., 8.]], dtype=float32))
    """
    plan = _planned(apply, params, masks, x, True, state)
    return plan.params, plan.apply


def _planned(
    apply: Apply, params: Params, masks: Masks, x: Any, fold: bool, state: State
) -> Compaction:
    plan = Compaction(apply, params, masks, x, fold=fold, state=state)
    for name in plan.emptied:
        message = f"every unit of {name!r} is without effect; one is kept, as zeros"
        warnings.warn(message, stacklevel=3)
    return plan


def _masked(leaf: Any, mask: np.ndarray) -> Any:
    """Return a copy of a leaf, zero where it is masked."""
    if _is_key(leaf):
        return leaf
    dtype = jnp.asarray(leaf).dtype
    return np.where(mask, np.asarray(leaf), np.zeros((), dtype)).astype(dtype)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
