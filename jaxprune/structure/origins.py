"""What the values of a program are made of: which leaves, and which of their axes.

A jaxpr comes in and is run on that, in place of numbers. Out come its products with weights that
are made of leaves, and those that are last; `layers` gives them their names.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxprune.structure.trace import WRITTEN_OUT, closed_call, scan_sizes

Use = tuple[int, str, tuple[int, ...]]
"""A leaf by number, `dense`, `convolution` or `embedding`, and its axes summed over or indexed."""


def products(closed: ClosedJaxpr, ranks: Sequence[int]) -> tuple[list[Use], set[int]]:
    """Return how leaves are used as weights, and the leaves of the last products.

    A product is last if its result reaches an output with no product of another leaf after it. Of
    those, one is dropped that another is computed from, unless both are in one loop.

    Args:
        closed: the program; its first arguments are the leaves.
        ranks: how many axes each leaf has.
    """
    inputs = [_leaf(i, ndim) for i, ndim in enumerate(ranks)]
    inputs += [_Value(None) for _ in closed.jaxpr.invars[len(ranks) :]]
    walk = _Walk()
    near = _union([value.near for value in walk.run(closed, inputs)])
    after = {
        leaf
        for leaf in near
        for other in near
        if leaf in walk.before[other] and other not in walk.before[leaf]
    }
    embeddings: dict[Use, None] = {
        (key[0], "embedding", axes): None
        for key, axes in walk.lookups.items()
        if key not in walk.experts
    }
    return [*walk.uses, *embeddings], {*near} - after


_Axis = frozenset[tuple[int, int]]
"""What an axis of a value is made of: leaves by number, and their axes."""

_NOTHING: _Axis = frozenset()


class _Weights(NamedTuple):
    """What a value is made of that is computed from leaves and constants alone.

    Attributes:
        axes: of the value.
        leaves: that it is computed from.
        inner: axes of leaves that products of such values sum over.
        lookups: those that it comes from.
    """

    axes: tuple[_Axis, ...]
    leaves: frozenset[int] = frozenset()
    inner: _Axis = _NOTHING
    lookups: frozenset[tuple[int, int]] = frozenset()


class _Value(NamedTuple):
    """What is known of a value of the program.

    Attributes:
        weights: None for what depends on the inputs, unless indices of theirs choose of leaves.
        data: whether it depends on the inputs.
        near: the leaves of the products that it is computed from with no other in between.
        before: the leaves of all products that it is computed from.
    """

    weights: _Weights | None
    data: bool = True
    near: frozenset[int] = frozenset()
    before: frozenset[int] = frozenset()

    @property
    def made(self) -> bool:
        """Whether it is computed from leaves, and not from the inputs."""
        return self.weights is not None and bool(self.weights.leaves) and not self.data


def _leaf(number: int, ndim: int) -> _Value:
    axes = tuple(frozenset([(number, axis)]) for axis in range(ndim))
    return _Value(_Weights(axes, frozenset([number])), data=False)


def _constant(ndim: int) -> _Value:
    return _Value(_Weights((_NOTHING,) * ndim), data=False)


def _union(sets: Sequence[Any]) -> frozenset:
    return frozenset().union(*sets)


def _made_of(parts: Sequence[_Weights], axes: Sequence[_Axis]) -> _Weights:
    """Return what is made of several, with these axes."""
    leaves, inner, lookups = (_union([part[i] for part in parts]) for i in (1, 2, 3))
    return _Weights(tuple(axes), leaves, inner, lookups)


def _after(values: Sequence[_Value], weights: _Weights | None = None) -> _Value:
    """Return what is computed from several values."""
    near, before = (_union([value[i] for value in values]) for i in (2, 3))
    return _Value(weights, any(value.data for value in values), near, before)


def _either(values: Sequence[_Value]) -> _Value:
    """Return what is known of a value that is one of several of a shape."""
    found = _after(values)
    parts = [value.weights for value in values if value.weights is not None]
    if found.data:
        return found
    axes = [_union(each) for each in zip(*(part.axes for part in parts), strict=True)]
    return found._replace(weights=_made_of(parts, axes))


@dataclasses.dataclass
class _Walk:
    """A run of a program, and what was found on the way.

    Attributes:
        uses: of the products, in order.
        lookups: by leaf and equation, the axes that are indexed.
        experts: the lookups that choose the weights of a product.
        before: for every leaf of a product the leaves of the products before it.
    """

    uses: dict[Use, None] = dataclasses.field(default_factory=dict)
    lookups: dict[tuple[int, int], tuple[int, ...]] = dataclasses.field(default_factory=dict)
    experts: frozenset[tuple[int, int]] = frozenset()
    before: dict[int, frozenset[int]] = dataclasses.field(default_factory=dict)

    def run(self, closed: ClosedJaxpr, inputs: Sequence[_Value]) -> list[_Value]:
        """Return what is known of the results of a program."""
        jaxpr: Any = closed.jaxpr
        env: dict[Any, _Value] = {x: _constant(x.aval.ndim) for x in jaxpr.constvars}
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(x: Any) -> _Value:
            return _constant(np.ndim(x.val)) if isinstance(x, Literal) else env[x]

        for eqn in jaxpr.eqns:
            ins = [read(x) for x in eqn.invars]
            rule = _RULES.get(eqn.primitive.name, _plain)
            env.update(zip(eqn.outvars, rule(self, eqn, ins), strict=True))
        return [read(x) for x in jaxpr.outvars]

    def until_settled(
        self, carry: Sequence[_Value], step: Callable[[Sequence[_Value]], list[_Value]]
    ) -> tuple[list[_Value], list[_Value]]:
        """Return carries of a loop, and what a step gives besides, from their first values."""
        saved = copy.deepcopy(vars(self))
        first, now = list(carry), list(carry)
        while True:
            vars(self).update(copy.deepcopy(saved))
            outs = step(now)
            after = [_either(pair) for pair in zip(first, outs, strict=False)]
            if after == now:
                return now, outs[len(now) :]
            if [v.data for v in after] != [v.data for v in now]:
                # What was taken for weights is not: nothing that was found so holds.
                first = after = [
                    _Value(None, True, *value[2:]) if new.data else value
                    for value, new in zip(first, after, strict=True)
                ]
            now = after

    def multiply(
        self, value: _Value, kind: str, sums: Sequence[int], ins: Sequence[_Value]
    ) -> _Value:
        """Note a product with weights, and return its result."""
        weights = value.weights
        assert weights is not None
        contracted = _union([weights.axes[i] for i in sums])
        noted = set()
        for leaf in sorted(weights.leaves):
            axes = {axis for number, axis in contracted if number == leaf}
            axes = axes or {axis for number, axis in weights.inner if number == leaf}
            if axes:
                self.uses[leaf, kind, tuple(sorted(axes))] = None
                noted.add(leaf)
        self.experts |= weights.lookups
        near = frozenset(noted) or weights.leaves
        before = _union([v.before for v in ins])
        for leaf in near:
            self.before[leaf] = self.before.get(leaf, frozenset()) | before
        return _Value(None, near=near, before=before | near)


def _plain(walk: _Walk, eqn: Any, ins: list[_Value]) -> list[_Value]:
    """Do an equation that is neither a product nor a lookup."""
    if (inner := _called(eqn)) is not None:
        return walk.run(inner, ins)
    merged = _after(ins)
    operands = [v for v, x in zip(ins, eqn.invars, strict=True) if not isinstance(x, Literal)]
    parts = [value.weights for value in ins if value.weights is not None]
    if len(parts) < len(ins) or (merged.data and len(operands) > 1):
        return [merged] * len(eqn.outvars)
    results = []
    for out in eqn.outvars:
        found = [_NOTHING] * out.aval.ndim
        for part, x in zip(parts, eqn.invars, strict=True):
            moved = _moved(eqn, part.axes, x.aval.shape, out.aval.shape)
            found = [a | b for a, b in zip(found, moved, strict=True)]
        results.append(merged._replace(weights=_made_of(parts, found)))
    return results


def _called(eqn: Any) -> ClosedJaxpr | None:
    """Return the program that an equation runs on all its operands as they are."""
    if eqn.primitive.name in WRITTEN_OUT:
        return closed_call(eqn)
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(name)
        if isinstance(inner, Jaxpr):
            inner = ClosedJaxpr(inner, ())
        if isinstance(inner, ClosedJaxpr) and not inner.jaxpr.constvars[len(inner.consts) :]:
            ends = inner.jaxpr.invars, inner.jaxpr.outvars
            if tuple(map(len, ends)) == (len(eqn.invars), len(eqn.outvars)):
                return inner
    return None


def _moved(
    eqn: Any, axes: Sequence[_Axis], old: Sequence[int], new: Sequence[int]
) -> Sequence[_Axis]:
    """Return what the axes of a result have of those of one operand."""
    name, params = eqn.primitive.name, eqn.params
    if name == "reshape":
        return _reshaped(axes, old, new)
    if name == "transpose":
        return [axes[i] for i in params["permutation"]]
    if name == "broadcast_in_dim" and params["broadcast_dimensions"]:
        at = dict(zip(params["broadcast_dimensions"], range(len(old)), strict=True))
        return [axes[at[i]] if i in at and old[at[i]] == n else _NOTHING for i, n in enumerate(new)]
    removed = params.get("dimensions" if name == "squeeze" else "axes", ())
    if name == "squeeze" or (name.startswith(("reduce_", "arg")) and len(new) < len(old)):
        return [axis for i, axis in enumerate(axes) if i not in removed]
    if len(old) != len(new):
        return [_NOTHING] * len(new)
    return [
        axis if n == to or name in _CUTS else _NOTHING
        for axis, n, to in zip(axes, old, new, strict=True)
    ]


_CUTS = frozenset("slice dynamic_slice dynamic_update_slice split concatenate pad".split())


def _reshaped(axes: Sequence[_Axis], old: Sequence[int], new: Sequence[int]) -> list[_Axis]:
    """Return the axes of a reshape: of each shortest run of elements, all have what one had."""
    found = [_NOTHING] * len(new)
    if 0 in old:
        return found
    i = j = 0
    while i < len(old) or j < len(new):
        start, first = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (before := math.prod(old[start:i])) != (now := math.prod(new[first:j])):
            i, j = (i + 1, j) if before < now else (i, j + 1)
        merged = _union([axes[k] for k in range(start, i) if old[k] > 1 or before == 1])
        for k in range(first, j):
            found[k] = merged if new[k] > 1 or now == 1 else _NOTHING
    return found


def _product(walk: _Walk, eqn: Any, ins: list[_Value]) -> list[_Value]:
    """Do a product: of weights and data, of weights that make others, or of data."""
    kind, sums = _sums(eqn)
    made = [k for k in (0, 1) if ins[k].made and sums[k]]
    if len(made) == 1 and ins[1 - made[0]].data:
        return [walk.multiply(ins[made[0]], kind, sums[made[0]], ins)]
    chosen = [k for k in (0, 1) if ins[k].data and _chosen_weights(ins[k].weights, sums[k])]
    if len(chosen) == 1 and ins[1 - chosen[0]].data:
        return [walk.multiply(ins[chosen[0]], kind, sums[chosen[0]], ins)]
    found = _after(ins)
    if found.data:
        return [found]
    parts = [value.weights for value in ins if value.weights is not None]
    inner = _union([part.axes[i] for part, at in zip(parts, sums, strict=False) for i in at])
    axes = [_NOTHING] * eqn.outvars[0].aval.ndim
    if eqn.primitive.name == "dot_general":
        a, b = parts[0].axes, parts[1].axes
        (left, right), (batch, other) = eqn.params["dimension_numbers"]
        axes = [a[i] | b[j] for i, j in zip(batch, other, strict=True)]
        axes += [axis for i, axis in enumerate(a) if i not in (*left, *batch)]
        axes += [axis for i, axis in enumerate(b) if i not in (*right, *other)]
    made = _made_of(parts, axes)
    return [found._replace(weights=made._replace(inner=made.inner | inner))]


def _sums(eqn: Any) -> tuple[str, tuple[Sequence[int], Sequence[int]]]:
    """Return the kind of a product, and the axes of both operands that are summed over."""
    if eqn.primitive.name == "conv_general_dilated":
        outputs, *others = eqn.params["dimension_numbers"].rhs_spec
        return "convolution", ((), others)
    numbers = eqn.params.get("dimension_numbers")
    if numbers is None:  # of rows that are sorted by experts
        numbers = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    return "dense", numbers[0]


def _chosen_weights(weights: _Weights | None, sums: Sequence[int]) -> bool:
    """Tell whether what was looked up has inputs and outputs of its own, as an expert has."""
    if weights is None or not weights.leaves:
        return False
    summed = _union([weights.axes[i] for i in sums])
    kept = _union([axis for i, axis in enumerate(weights.axes) if i not in sums])
    return bool(summed) and bool(kept)


def _lookup(walk: _Walk, eqn: Any, ins: list[_Value]) -> list[_Value]:
    """Do a gather, or a slice at an index of the inputs: what is chosen of leaves, and by what."""
    operand, shape = ins[0], eqn.invars[0].aval.shape
    by_data = any(value.data for value in ins[1:])
    gather = eqn.primitive.name == "gather"
    if not operand.made or not (gather or by_data):
        return _plain(walk, eqn, ins)
    weights = operand.weights
    assert weights is not None
    if gather:
        numbers = eqn.params["dimension_numbers"]
        dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        windows = iter([axis for i, axis in enumerate(weights.axes) if i not in dropped])
        axes = tuple(
            next(windows) if i in numbers.offset_dims else _NOTHING
            for i in range(eqn.outvars[0].aval.ndim)
        )
    else:
        dropped, axes = set(), weights.axes
    sizes = zip(shape, eqn.params["slice_sizes"], strict=True)
    dropped |= {i for i, (n, taken) in enumerate(sizes) if n != taken}
    indexed = _union([weights.axes[i] for i in dropped])
    new = {}
    for leaf in sorted({leaf for leaf, _ in indexed}):
        new[leaf, id(eqn)] = tuple(sorted(axis for number, axis in indexed if number == leaf))
    walk.lookups |= new
    made_of = weights._replace(axes=axes, lookups=weights.lookups | frozenset(new))
    return [_after(ins, made_of)]


def _scan(walk: _Walk, eqn: Any, ins: list[_Value]) -> list[_Value]:
    consts, carries = scan_sizes(eqn)
    fixed = ins[:consts]
    sliced = [_on_axes(value, lambda axes: axes[1:]) for value in ins[consts + carries :]]

    def step(carry: Sequence[_Value]) -> list[_Value]:
        return walk.run(closed_call(eqn), [*fixed, *carry, *sliced])

    carry, stacked = walk.until_settled(ins[consts : consts + carries], step)
    return [*carry, *(_on_axes(v, lambda axes: (_NOTHING, *axes)) for v in stacked)]


def _on_axes(value: _Value, f: Callable[[tuple[_Axis, ...]], tuple[_Axis, ...]]) -> _Value:
    weights = value.weights
    return value._replace(weights=weights and weights._replace(axes=f(weights.axes)))


def _while(walk: _Walk, eqn: Any, ins: list[_Value]) -> list[_Value]:
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    of_condition, of_body, carry = ins[:first], ins[first : first + second], ins[first + second :]

    def step(carry: Sequence[_Value]) -> list[_Value]:
        return walk.run(eqn.params["body_jaxpr"], [*of_body, *carry])

    carry, _ = walk.until_settled(carry, step)
    (stops,) = walk.run(eqn.params["cond_jaxpr"], [*of_condition, *carry])
    return [_decided(value, stops) for value in carry]


def _cond(walk: _Walk, eqn: Any, ins: list[_Value]) -> list[_Value]:
    branches = [walk.run(branch, ins[1:]) for branch in eqn.params["branches"]]
    return [_decided(_either(values), ins[0]) for values in zip(*branches, strict=True)]


def _decided(value: _Value, by: _Value) -> _Value:
    """Return a value that depends on a decision."""
    return _after([value, by], None if by.data else value.weights)


_RULES: dict[str, Callable[[_Walk, Any, list[_Value]], list[_Value]]] = {
    **dict.fromkeys(("dot_general", "ragged_dot_general", "conv_general_dilated"), _product),
    **dict.fromkeys(("gather", "dynamic_slice"), _lookup),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
