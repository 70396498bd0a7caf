"""What the values of a program are made of: which leaves, and which of their axes.

A jaxpr comes in and is run on that, in place of numbers, by the same `rules` that tell axes. Out
come its products with weights that are made of leaves; `layers` gives them their names.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from jaxprune.structure import origins
from jaxprune.structure.facts import Place
from jaxprune.structure.origins import NOTHING, Axis, union
from jaxprune.structure.program import walk
from jaxprune.structure.rules import RULES
from jaxprune.structure.rules.calls import called, closed_call, scan_sizes
from jaxprune.structure.rules.products import numbers_of


class Use(NamedTuple):
    """How a leaf is used; see `layers.Layer`. Leaves are told by number."""

    leaf: int
    kind: str
    contracted: tuple[int, ...] = ()
    batched: tuple[int, ...] = ()
    window: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    groups: int = 1
    of: tuple[int, ...] | None = None  # None of weights


class Product(NamedTuple):
    """A product with weights, at a place of a program.

    Attributes:
        operand: the number of the operand that depends on the inputs.
        orders: of each use of a leaf there the axes of the other operand that are summed over, in
            the order that they have in the leaf.
    """

    operand: int
    orders: dict[Use, tuple[int, ...]]


class Reading(NamedTuple):
    """What was found in a program.

    Attributes:
        uses: of leaves, in order.
        last: the leaves of the products whose result reaches an output with no product of another
            leaf after it. Of those, one is left out that another is computed from, unless both are
            in one loop.
        products: with weights, by place.
    """

    uses: list[Use]
    last: set[int]
    products: dict[Place, Product]


def read(closed: ClosedJaxpr, ranks: Sequence[int]) -> Reading:
    """Return how leaves are used.

    Args:
        closed: the program; its first arguments are the leaves.
        ranks: how many axes each leaf has.
    """
    inputs = [_leaf(i, ndim) for i, ndim in enumerate(ranks)]
    inputs += [_Value(None) for _ in closed.jaxpr.invars[len(ranks) :]]
    reader = _Reader()
    near = union([value.near for value in reader.run(closed, inputs)])
    after = {
        leaf
        for leaf in near
        for other in near
        if leaf in reader.before[other] and other not in reader.before[leaf]
    }
    embeddings = [
        Use(key[0], "embedding", axes)
        for key, axes in reader.lookups.items()
        if key not in reader.experts
    ]
    uses = [*reader.uses, *dict.fromkeys(embeddings)]
    return Reading(uses, {*near} - after, reader.products)


class _Weights(NamedTuple):
    """What a value is made of that is computed from leaves and constants alone.

    Attributes:
        axes: of the value.
        leaves: that it is computed from.
        inner: axes of leaves that products of such values sum over.
        lookups: those that it comes from.
    """

    axes: tuple[Axis, ...]
    leaves: frozenset[int] = frozenset()
    inner: Axis = NOTHING
    lookups: frozenset[tuple[int, int]] = frozenset()


class _Value(NamedTuple):
    """What is known of a value of the program.

    Attributes:
        weights: None for what depends on the inputs, unless indices of theirs choose of leaves.
        data: whether it depends on the inputs.
        near: the leaves of the products that it is computed from with no other in between.
        before: the leaves of all products that it is computed from.
        product: those of the product that it is, up to its shape, biases and scales.
    """

    weights: _Weights | None
    data: bool = True
    near: frozenset[int] = frozenset()
    before: frozenset[int] = frozenset()
    product: frozenset[int] = frozenset()

    @property
    def made(self) -> bool:
        """Whether it is computed from leaves, and not from the inputs."""
        return self.weights is not None and bool(self.weights.leaves) and not self.data


def _leaf(number: int, ndim: int) -> _Value:
    axes = tuple(frozenset([(number, axis)]) for axis in range(ndim))
    return _Value(_Weights(axes, frozenset([number])), data=False)


def _constant(value: Any) -> _Value:
    return _Value(_Weights((NOTHING,) * np.ndim(value)), data=False)


def _made_of(parts: Sequence[_Weights], axes: Sequence[Axis]) -> _Weights:
    """Return what is made of several, with these axes."""
    leaves, inner, lookups = (union([part[i] for part in parts]) for i in (1, 2, 3))
    return _Weights(tuple(axes), leaves, inner, lookups)


def _after(values: Sequence[_Value], weights: _Weights | None = None) -> _Value:
    """Return what is computed from several values."""
    near, before = (union([value[i] for value in values]) for i in (2, 3))
    return _Value(weights, any(value.data for value in values), near, before)


def _either(values: Sequence[_Value]) -> _Value:
    """Return what is known of a value that is one of several of a shape."""
    found = _after(values)
    parts = [value.weights for value in values if value.weights is not None]
    if found.data:
        return found
    axes = [union(each) for each in zip(*(part.axes for part in parts), strict=True)]
    return found._replace(weights=_made_of(parts, axes))


@dataclasses.dataclass
class _Reader:
    """A run of a program, and what was found on the way.

    Attributes:
        uses: in products, in order.
        lookups: by leaf and equation, the axes that are indexed.
        experts: the lookups that choose the weights of a product.
        before: for every leaf of a product the leaves of the products before it.
        products: by place.
        at: the place that is read.
    """

    uses: dict[Use, None] = dataclasses.field(default_factory=dict)
    lookups: dict[tuple[int, int], tuple[int, ...]] = dataclasses.field(default_factory=dict)
    experts: frozenset[tuple[int, int]] = frozenset()
    before: dict[int, frozenset[int]] = dataclasses.field(default_factory=dict)
    products: dict[Place, Product] = dataclasses.field(default_factory=dict)
    at: Place = ()

    def run(self, closed: ClosedJaxpr, inputs: Sequence[_Value]) -> list[_Value]:
        """Return what is known of the results of a program."""
        at = self.at

        def step(i: int, eqn: Any, ins: list[_Value]) -> list[_Value]:
            self.at = (*at, i)
            return _RULES.get(eqn.primitive.name, _plain)(self, eqn, ins)

        constants = [_constant(x.aval) for x in closed.jaxpr.constvars]
        outs = walk(closed.jaxpr, constants, inputs, step, _constant)
        self.at = at
        return outs

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

    def multiply(self, eqn: Any, k: int, ins: Sequence[_Value]) -> _Value:
        """Note a product of which operand `k` is weights, and return its result."""
        weights = ins[k].weights
        assert weights is not None
        kind, sums, batch, window = numbers_of(eqn)
        options: dict[str, Any] = {}
        if kind == "convolution":
            options = {
                name: eqn.params[old]
                for name, old in (("strides", "window_strides"), ("groups", "feature_group_count"))
            }
        orders: dict[Use, tuple[int, ...]] = {}

        def among(leaf: int, dims: Sequence[int]) -> tuple[int, ...]:
            found = union([weights.axes[i] for i in dims])
            return tuple(sorted(axis for number, axis in found if number == leaf))

        for leaf in sorted(weights.leaves):
            axes = among(leaf, sums[k])
            inner = tuple(sorted(axis for number, axis in weights.inner if number == leaf))
            if not (axes or inner):
                self.uses[Use(leaf, "factor")] = None
                continue
            use = Use(leaf, kind, axes or inner, among(leaf, batch[k]), among(leaf, window),
                      **options)  # fmt: skip
            self.uses[use] = None
            if axes:
                orders[use] = tuple(sorted(sums[k], key=lambda i: (among(leaf, [i]), i)))  # noqa: B023
        self.products[self.at] = Product(1 - k, orders)
        self.experts |= weights.lookups
        noted = {use.leaf for use in self.uses if use.leaf in weights.leaves and use.contracted}
        near = frozenset(noted) or weights.leaves
        before = union([v.before for v in ins])
        for leaf in near:
            self.before[leaf] = self.before.get(leaf, frozenset()) | before
        return _Value(None, near=near, before=before | near, product=near)


def _plain(reader: _Reader, eqn: Any, ins: list[_Value]) -> list[_Value]:
    """Do an equation that is neither a product nor a lookup."""
    if (inner := called(eqn)) is not None:
        return reader.run(inner, ins)
    merged = _after(ins)
    operands = [v for v, x in zip(ins, eqn.invars, strict=True) if not isinstance(x, Literal)]
    if merged.data:
        merged = _note_bias(reader, eqn.primitive.name, merged, operands)
    parts = [value.weights for value in ins if value.weights is not None]
    if len(parts) < len(ins) or (merged.data and len(operands) > 1):
        return [merged] * len(eqn.outvars)
    axes = _axes_of(eqn, [part.axes for part in parts])
    return [merged._replace(weights=_made_of(parts, each)) for each in axes]


def _note_bias(
    reader: _Reader, name: str, merged: _Value, operands: Sequence[_Value]
) -> _Value:  # fmt: skip
    """Note leaves that are added to a value, or that scale it, and keep what it is of."""
    data = [value for value in operands if value.data]
    if len(data) != 1:
        return merged
    kind = {"add": "bias", "sub": "bias", "mul": "scale", "div": "scale"}.get(name)
    for value in (value for value in operands if kind and value.made):
        assert value.weights is not None
        of = tuple(sorted(data[0].product))
        reader.uses |= {Use(n, kind or "", of=of): None for n in sorted(value.weights.leaves)}
    stays = kind or name in _SHAPES
    return merged._replace(product=data[0].product) if stays else merged


_SHAPES = frozenset("reshape transpose squeeze broadcast_in_dim convert_element_type neg".split())


def _axes_of(eqn: Any, ins: Sequence[Any]) -> Sequence[Any]:
    """Return what the axes of results are made of; of an unknown primitive, by their places."""
    if rule := RULES.get(eqn.primitive.name):
        return rule.axes(eqn, ins, origins)
    found = []
    for out in eqn.outvars:
        shape = out.aval.shape
        alike = [axes for axes, x in zip(ins, eqn.invars, strict=True) if x.aval.shape == shape]
        found.append(tuple(union([axes[i] for axes in alike]) for i in range(len(shape))))
    return found


def _product(reader: _Reader, eqn: Any, ins: list[_Value]) -> list[_Value]:
    """Do a product: of weights and data, of weights that make others, or of data."""
    _, sums, *_ = numbers_of(eqn)
    made = [k for k in (0, 1) if ins[k].made and sums[k]]
    if len(made) == 1 and ins[1 - made[0]].data:
        return [reader.multiply(eqn, made[0], ins)]
    chosen = [k for k in (0, 1) if ins[k].data and _chosen_weights(ins[k].weights, sums[k])]
    if len(chosen) == 1 and ins[1 - chosen[0]].data:
        return [reader.multiply(eqn, chosen[0], ins)]
    found = _after(ins)
    if found.data:
        for value in (value for value in ins if value.made):  # an outer product
            assert value.weights is not None
            reader.uses |= {Use(leaf, "factor"): None for leaf in sorted(value.weights.leaves)}
        return [found]
    parts = [value.weights for value in ins if value.weights is not None]
    inner = union([part.axes[i] for part, at in zip(parts, sums, strict=False) for i in at])
    (axes,) = _axes_of(eqn, [part.axes for part in parts])
    made = _made_of(parts, axes)
    return [found._replace(weights=made._replace(inner=made.inner | inner))]


def _chosen_weights(weights: _Weights | None, sums: Sequence[int]) -> bool:
    """Tell whether what was looked up has inputs and outputs of its own, as an expert has."""
    if weights is None or not weights.leaves:
        return False
    summed = union([weights.axes[i] for i in sums])
    kept = union([axis for i, axis in enumerate(weights.axes) if i not in sums])
    return bool(summed) and bool(kept)


def _lookup(reader: _Reader, eqn: Any, ins: list[_Value]) -> list[_Value]:
    """Do a gather, or a slice at an index of the inputs: what is chosen of leaves, and by what."""
    operand, shape = ins[0], eqn.invars[0].aval.shape
    by_data = any(value.data for value in ins[1:])
    gather = eqn.primitive.name == "gather"
    if not operand.made or not (gather or by_data):
        return _plain(reader, eqn, ins)
    weights = operand.weights
    assert weights is not None
    others = [(NOTHING,) * x.aval.ndim for x in eqn.invars[1:]]
    (axes,) = _axes_of(eqn, [weights.axes, *others])
    sizes = zip(shape, eqn.params["slice_sizes"], strict=True)
    indexed = {i for i, (n, taken) in enumerate(sizes) if n != taken}
    if gather:
        numbers = eqn.params["dimension_numbers"]
        indexed |= {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    found = union([weights.axes[i] for i in indexed])
    new = {}
    for leaf in sorted({leaf for leaf, _ in found}):
        new[leaf, id(eqn)] = tuple(sorted(axis for number, axis in found if number == leaf))
    reader.lookups |= new
    lookups = weights.lookups | frozenset(new)
    return [_after(ins, weights._replace(axes=axes, lookups=lookups))]


def _scan(reader: _Reader, eqn: Any, ins: list[_Value]) -> list[_Value]:
    consts, carries = scan_sizes(eqn)
    fixed = ins[:consts]
    sliced = [_on_axes(value, lambda axes: axes[1:]) for value in ins[consts + carries :]]

    def step(carry: Sequence[_Value]) -> list[_Value]:
        return reader.run(closed_call(eqn), [*fixed, *carry, *sliced])

    carry, stacked = reader.until_settled(ins[consts : consts + carries], step)
    return [*carry, *(_on_axes(v, lambda axes: (NOTHING, *axes)) for v in stacked)]


def _on_axes(value: _Value, f: Callable[[tuple[Axis, ...]], tuple[Axis, ...]]) -> _Value:
    weights = value.weights
    return value._replace(weights=weights and weights._replace(axes=f(weights.axes)))


def _while(reader: _Reader, eqn: Any, ins: list[_Value]) -> list[_Value]:
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    of_condition, of_body, carry = ins[:first], ins[first : first + second], ins[first + second :]

    def step(carry: Sequence[_Value]) -> list[_Value]:
        return reader.run(eqn.params["body_jaxpr"], [*of_body, *carry])

    carry, _ = reader.until_settled(carry, step)
    (stops,) = reader.run(eqn.params["cond_jaxpr"], [*of_condition, *carry])
    return [_decided(value, stops) for value in carry]


def _cond(reader: _Reader, eqn: Any, ins: list[_Value]) -> list[_Value]:
    branches = [reader.run(branch, ins[1:]) for branch in eqn.params["branches"]]
    return [_decided(_either(values), ins[0]) for values in zip(*branches, strict=True)]


def _decided(value: _Value, by: _Value) -> _Value:
    """Return a value that depends on a decision."""
    return _after([value, by], None if by.data else value.weights)


_RULES: dict[str, Callable[[_Reader, Any, list[_Value]], list[_Value]]] = {
    **dict.fromkeys(("dot_general", "ragged_dot_general", "conv_general_dilated"), _product),
    **dict.fromkeys(("gather", "dynamic_slice"), _lookup),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
