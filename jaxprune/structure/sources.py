"""What the values of a program are made of: which leaves, and which of their axes.

A jaxpr comes in and is run on that, in place of numbers, by the same `rules` that tell axes. Out
come its products with weights that are made of leaves; `layers` gives them their names.
"""

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Literal

from jaxprune.structure import origins
from jaxprune.structure.facts import Place
from jaxprune.structure.origins import NOTHING, Axis, Value, Weights, after, either, made_of, union
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
        orders: of each use of a leaf there the axes of the weights that are summed over, in the
            order that they have in the leaf; none where that is not known.
        leaves: that the weights are made from; none of those that the inputs choose.
        leaf: the leaf that the weights are, of other shape or with its axes moved at most.
        matrix: that leaf, if it has two axes and is used for nothing else.
        bias: the leaf that is all that is done with the result, added along its outputs, if it is
            used for nothing else either.
    """

    operand: int
    orders: dict[Use, tuple[int, ...]]
    leaves: frozenset[int] = frozenset()
    leaf: int | None = None
    matrix: int | None = None
    bias: int | None = None


class Reading(NamedTuple):
    """What was found in a program.

    Attributes:
        uses: of leaves, in order.
        last: the leaves of the products whose result reaches an output with no product of another
            leaf after it. Of those, one is left out that another is computed from, unless both are
            in one loop.
        products: with weights, by place; of the branches of a condition, those of the last.
        taken: how often a leaf is taken in, by number; once more by a loop that takes it in.
    """

    uses: list[Use]
    last: set[int]
    products: dict[Place, Product]
    taken: Counter[Any]


def read(closed: ClosedJaxpr, ranks: Sequence[int]) -> Reading:
    """Return how leaves are used.

    Args:
        closed: the program; its first arguments are the leaves.
        ranks: how many axes each leaf has.
    """
    inputs = [origins.leaf(i, ndim) for i, ndim in enumerate(ranks)]
    inputs += [Value(None) for _ in closed.jaxpr.invars[len(ranks) :]]
    reader = _Reader()
    outputs = reader.run(closed, inputs)
    reader.take_in(outputs)
    near = union([value.near for value in outputs])
    earlier = {
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
    alone = {key for key, times in reader.taken.items() if times == 1}
    for at, product in reader.products.items():
        matrix, bias = (
            n if n is not None and n in alone and ranks[n] == rank else None
            for n, rank in ((product.matrix, 2), (product.bias, 1))
        )
        bias = bias if at in alone else None
        reader.products[at] = product._replace(matrix=matrix, bias=bias)
    return Reading(uses, {*near} - earlier, reader.products, reader.taken)


@dataclasses.dataclass
class _Reader:
    """A run of a program, and what was found on the way.

    Attributes:
        uses: in products, in order.
        lookups: by leaf and equation, the axes that are indexed.
        experts: the lookups that choose the weights of a product.
        before: for every leaf of a product the leaves of the products before it.
        products: by place.
        taken: how often a leaf is taken in, and the result of a product, by number and place.
        at: the place that is read.
    """

    uses: dict[Use, None] = dataclasses.field(default_factory=dict)
    lookups: dict[tuple[int, int], tuple[int, ...]] = dataclasses.field(default_factory=dict)
    experts: frozenset[tuple[int, int]] = frozenset()
    before: dict[int, frozenset[int]] = dataclasses.field(default_factory=dict)
    products: dict[Place, Product] = dataclasses.field(default_factory=dict)
    taken: Counter[int | Place | None] = dataclasses.field(default_factory=Counter)
    at: Place = ()

    def run(self, closed: ClosedJaxpr, inputs: Sequence[Value]) -> list[Value]:
        """Return what is known of the results of a program."""
        at = self.at

        def step(i: int, eqn: Any, ins: list[Value]) -> list[Value]:
            self.at, rule = (*at, i), _RULES.get(eqn.primitive.name)
            if rule is None and (inner := called(eqn)) is not None:
                return self.run(inner, ins)
            self.take_in(ins, again=eqn.primitive.name in _SPREAD)
            return (rule or _plain)(self, eqn, ins)

        constants = [origins.constant(x.aval) for x in closed.jaxpr.constvars]
        outs = walk(closed.jaxpr, constants, inputs, step, origins.constant)
        self.at = at
        return outs

    def take_in(self, values: Sequence[Value], again: bool = False) -> None:
        """Count what is taken in; of a leaf that is only spread, who takes in that will count."""
        self.taken.update(value.result for value in values)
        self.taken.update(v.weights.itself for v in values if v.weights is not None and not again)

    def until_settled(
        self, carry: Sequence[Value], step: Callable[[Sequence[Value]], list[Value]]
    ) -> tuple[list[Value], list[Value]]:
        """Return carries of a loop, and what a step gives besides, from their first values."""
        saved = copy.deepcopy(vars(self))
        first, now = list(carry), list(carry)
        while True:
            vars(self).update(copy.deepcopy(saved))
            outs = step(now)
            after = [either(pair) for pair in zip(first, outs, strict=False)]
            if after == now:
                return now, outs[len(now) :]
            if [v.data for v in after] != [v.data for v in now]:
                # What was taken for weights is not: nothing that was found so holds.
                first = after = [
                    Value(None, True, *value[2:]) if new.data else value
                    for value, new in zip(first, after, strict=True)
                ]
            now = after

    def multiply(self, eqn: Any, k: int, ins: Sequence[Value]) -> Value:
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
        whole = {frozenset([(weights.itself, axis)]) for axis in (0, 1)}
        plain = eqn.primitive.name == "dot_general" and (len(sums[k]), len(batch[k])) == (1, 0)
        plain = plain and len(weights.axes) == 2 and {*weights.axes} == whole
        matrix = weights.itself if plain else None
        leaves = frozenset() if ins[k].data else weights.leaves
        itself = weights.itself if _whole(eqn.invars[k].aval.shape, weights, sums[k]) else None
        if weights.mixed or eqn.params.get("batch_group_count", 1) > 1:
            itself, orders = None, {}  # what its columns are is not known
        self.products[self.at] = Product(1 - k, orders, leaves, itself, matrix)
        self.experts |= weights.lookups
        noted = {use.leaf for use in self.uses if use.leaf in weights.leaves and use.contracted}
        near = frozenset(noted) or weights.leaves
        before = union([v.before for v in ins])
        for leaf in near:
            self.before[leaf] = self.before.get(leaf, frozenset()) | before
        return Value(None, True, near, before | near, near, self.at)

    def add(self, at: Place, added: Weights) -> None:
        """Note what is added to the result of a matrix, if it is a leaf along its outputs."""
        product, outputs = self.products[at], frozenset([(added.itself, 0)])
        only = [i for i, axis in enumerate(added.axes) if axis]
        last = len(added.axes) - 1 if product.operand == 0 else 0
        if product.matrix is not None and only == [last] and added.axes[last] == outputs:
            self.products[at] = product._replace(bias=added.itself)


def _whole(shape: Sequence[int], weights: Weights, sums: Sequence[int]) -> bool:
    """Tell whether weights are a leaf that is spread over nothing, and summed over whole axes."""
    summed = union([weights.axes[i] for i in sums])
    kept = union([axis for i, axis in enumerate(weights.axes) if i not in sums])
    spread = any(n > 1 and not axis for n, axis in zip(shape, weights.axes, strict=True))
    return not (spread or summed & kept)


def _plain(reader: _Reader, eqn: Any, ins: list[Value]) -> list[Value]:
    """Do an equation that is neither a product nor a lookup."""
    merged = after(ins)
    operands = [v for v, x in zip(ins, eqn.invars, strict=True) if not isinstance(x, Literal)]
    if merged.data:
        merged = _note_bias(reader, eqn.primitive.name, merged, operands)
    parts = [value.weights for value in ins if value.weights is not None]
    if len(parts) < len(ins) or (merged.data and len(operands) > 1):
        return [merged] * len(eqn.outvars)
    found = [made_of(parts, each) for each in _axes_of(eqn, [part.axes for part in parts])]
    if eqn.primitive.name == "transpose" and origins.mixes(
        parts[0].axes, eqn.params["permutation"]
    ):
        found = [each._replace(mixed=True) for each in found]
    if eqn.primitive.name in _SPREAD and len(parts) == 1:
        found = [each._replace(itself=parts[0].itself) for each in found]
    return [merged._replace(weights=each) for each in found]


def _note_bias(
    reader: _Reader, name: str, merged: Value, operands: Sequence[Value]
) -> Value:  # fmt: skip
    """Note leaves that are added to a value, or that scale it, and keep what it is of."""
    data = [value for value in operands if value.data]
    if len(data) != 1:
        return merged
    kind = {"add": "bias", "sub": "bias", "mul": "scale", "div": "scale"}.get(name)
    for value in (value for value in operands if kind and value.made):
        assert value.weights is not None
        of = tuple(sorted(data[0].product))
        reader.uses |= {Use(n, kind or "", of=of): None for n in sorted(value.weights.leaves)}
        if name == "add" and data[0].result is not None:
            reader.add(data[0].result, value.weights)
    stays = kind or name in _SHAPES
    return merged._replace(product=data[0].product) if stays else merged


_SPREAD = frozenset(("reshape", "transpose", "squeeze", "broadcast_in_dim"))
_SHAPES = _SPREAD | {"convert_element_type", "neg"}


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


def _product(reader: _Reader, eqn: Any, ins: list[Value]) -> list[Value]:
    """Do a product: of weights and data, of weights that make others, or of data."""
    _, sums, *_ = numbers_of(eqn)
    made = [k for k in (0, 1) if ins[k].made and sums[k]]
    if len(made) == 1 and ins[1 - made[0]].data:
        return [reader.multiply(eqn, made[0], ins)]
    chosen = [k for k in (0, 1) if ins[k].data and _chosen_weights(ins[k].weights, sums[k])]
    if len(chosen) == 1 and ins[1 - chosen[0]].data:
        return [reader.multiply(eqn, chosen[0], ins)]
    found = after(ins)
    if found.data:
        for value in (value for value in ins if value.made):  # an outer product
            assert value.weights is not None
            reader.uses |= {Use(leaf, "factor"): None for leaf in sorted(value.weights.leaves)}
        return [found]
    parts = [value.weights for value in ins if value.weights is not None]
    inner = union([part.axes[i] for part, at in zip(parts, sums, strict=False) for i in at])
    (axes,) = _axes_of(eqn, [part.axes for part in parts])
    made = made_of(parts, axes)
    return [found._replace(weights=made._replace(inner=made.inner | inner))]


def _chosen_weights(weights: Weights | None, sums: Sequence[int]) -> bool:
    """Tell whether what was looked up has inputs and outputs of its own, as an expert has."""
    if weights is None or not weights.leaves:
        return False
    summed = union([weights.axes[i] for i in sums])
    kept = union([axis for i, axis in enumerate(weights.axes) if i not in sums])
    return bool(summed) and bool(kept)


def _lookup(reader: _Reader, eqn: Any, ins: list[Value]) -> list[Value]:
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
    return [after(ins, weights._replace(axes=axes, lookups=lookups, itself=None))]


def _scan(reader: _Reader, eqn: Any, ins: list[Value]) -> list[Value]:
    consts, carries = scan_sizes(eqn)
    fixed = ins[:consts]
    sliced = [_on_axes(value, lambda axes: axes[1:]) for value in ins[consts + carries :]]

    def step(carry: Sequence[Value]) -> list[Value]:
        return reader.run(closed_call(eqn), [*fixed, *carry, *sliced])

    carry, stacked = reader.until_settled(ins[consts : consts + carries], step)
    return [*carry, *(_on_axes(v, lambda axes: (NOTHING, *axes)) for v in stacked)]


def _on_axes(value: Value, f: Callable[[tuple[Axis, ...]], tuple[Axis, ...]]) -> Value:
    weights = value.weights
    changed = weights and weights._replace(axes=f(weights.axes), itself=None)
    return value._replace(weights=changed)


def _while(reader: _Reader, eqn: Any, ins: list[Value]) -> list[Value]:
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    of_condition, of_body, carry = ins[:first], ins[first : first + second], ins[first + second :]

    def step(carry: Sequence[Value]) -> list[Value]:
        return reader.run(eqn.params["body_jaxpr"], [*of_body, *carry])

    carry, _ = reader.until_settled(carry, step)
    (stops,) = reader.run(eqn.params["cond_jaxpr"], [*of_condition, *carry])
    return [_decided(value, stops) for value in carry]


def _cond(reader: _Reader, eqn: Any, ins: list[Value]) -> list[Value]:
    branches = [reader.run(branch, ins[1:]) for branch in eqn.params["branches"]]
    return [_decided(either(values), ins[0]) for values in zip(*branches, strict=True)]


def _decided(value: Value, by: Value) -> Value:
    """Return a value that depends on a decision."""
    return after([value, by], None if by.data else value.weights)


_RULES: dict[str, Callable[[_Reader, Any, list[Value]], list[Value]]] = {
    **dict.fromkeys(("dot_general", "ragged_dot_general", "conv_general_dilated"), _product),
    **dict.fromkeys(("gather", "dynamic_slice"), _lookup),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
