"""Primitives that take values at indices, put them there, or order them."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxprune.structure.axes import Axes, Axis
from jaxprune.structure.facts import Facts, Known, common, nothing, only
from jaxprune.structure.rules.base import Call, Resized, Rule, size

SCATTERS = "scatter scatter-add scatter-sub scatter-mul scatter-min scatter-max".split()


def _cut_whole(
    operand: Axes, shape: Sequence[int], sizes: Sequence[int], algebra: Any
) -> list[Axis]:
    """Pass on the axes that a slice takes whole, and freeze the others."""
    out = []
    for axis, n, taken in zip(operand, shape, sizes, strict=True):
        if n != taken:
            algebra.freeze(axis, "indexed")
        out.append(axis if n == taken else algebra.fresh(taken, "indexed"))
    return out


def _slice_sizes(call: Resized, values: Sequence[Any]) -> dict[str, Any]:
    # Axes that lose units are taken whole.
    full = call.eqn.invars[0].aval.shape
    sizes = zip(call.eqn.params["slice_sizes"], full, jnp.shape(values[0]), strict=True)
    return {"slice_sizes": tuple(new if taken == old else taken for taken, old, new in sizes)}


def _dynamic_slice(eqn: Any, ins: Sequence[Axes], algebra: Any) -> list[Axes]:
    sizes = eqn.params["slice_sizes"]
    return [tuple(_cut_whole(ins[0], eqn.invars[0].aval.shape, sizes, algebra))]


def _dynamic_slice_facts(call: Call, ins: Sequence[Facts]) -> list[Facts]:
    whole = [n == m for n, m in zip(call.shape(0), call.out, strict=True)]
    axes = tuple(k if w else None for k, w in zip(ins[0].axes, whole, strict=True))
    return [Facts(axes, ins[0].whole)]


def _update(eqn: Any, ins: Sequence[Axes], algebra: Any) -> list[Axes]:
    out = []
    for i, (axis, update) in enumerate(zip(ins[0], ins[1], strict=True)):
        if size(eqn, 0, i) != size(eqn, 1, i):
            algebra.freeze(axis, "indexed")
            algebra.freeze(update, "indexed")
            out.append(axis)
        else:
            out.append(algebra.same(axis, update))
    return [tuple(out)]


def _update_facts(call: Call, ins: Sequence[Facts]) -> list[Facts]:
    found: list[Known | None] = []
    for i, n in enumerate(call.out):
        same = call.shape(1)[i] == n
        found.append(common([ins[0].along(i, n), ins[1].along(i, n)]) if same else None)
    return [Facts(tuple(found))]


def _dropped(eqn: Any) -> set[int]:
    """Return the axes of a gather's operand that its result has not."""
    numbers = eqn.params["dimension_numbers"]
    return {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}


def _gather(eqn: Any, ins: Sequence[Axes], algebra: Any) -> list[Axes]:
    numbers, shape = eqn.params["dimension_numbers"], eqn.outvars[0].aval.shape
    operand, indices = ins
    for axis in indices:
        algebra.freeze(axis, "an axis of indices")
    sizes = eqn.params["slice_sizes"]
    slices = _cut_whole(operand, eqn.invars[0].aval.shape, sizes, algebra)
    dropped = _dropped(eqn)
    for axis in dropped:
        algebra.freeze(operand[axis], "indexed")
    windows = iter([axis for i, axis in enumerate(slices) if i not in dropped])
    batches = iter(indices[:-1])
    return [
        tuple(next(windows if i in numbers.offset_dims else batches) for i in range(len(shape)))
    ]


def _gather_facts(call: Call, ins: Sequence[Facts]) -> list[Facts]:
    numbers, sizes = call.eqn.params["dimension_numbers"], call.eqn.params["slice_sizes"]
    dropped = _dropped(call.eqn)
    taken = [i for i in range(len(sizes)) if i not in dropped]
    found = list(nothing(len(call.out)).axes)
    fill = call.eqn.params["fill_value"]
    for to, i in zip(numbers.offset_dims, taken, strict=True):
        known = ins[0].axes[i]
        # What an index out of range gives; NaN, the default, the kept units have there as well.
        if fill is not None and fill == fill:
            known = only(known, fill)
        if sizes[i] == call.shape(0)[i]:
            found[to] = known
    return [Facts(tuple(found))]


def _whole_windows(eqn: Any) -> list[tuple[int, int]]:
    """Return the axes of a scatter's operand that its updates take in whole, and theirs."""
    numbers = eqn.params["dimension_numbers"]
    dropped = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    kept = [i for i in range(len(eqn.invars[0].aval.shape)) if i not in dropped]
    pairs = zip(kept, numbers.update_window_dims, strict=True)
    return [(i, j) for i, j in pairs if size(eqn, 0, i) == size(eqn, 2, j)]


def _scatter(eqn: Any, ins: Sequence[Axes], algebra: Any) -> list[Axes]:
    operand, indices, updates = ins
    for axis in indices:
        algebra.freeze(axis, "an axis of indices")
    pairs, out = _whole_windows(eqn), list(operand)
    for i, j in pairs:
        out[i] = algebra.same(operand[i], updates[j])
    for axes, taken in ((operand, 0), (updates, 1)):
        for i in {*range(len(axes))} - {pair[taken] for pair in pairs}:
            algebra.freeze(axes[i], "indexed")
    return [tuple(out)]


def _scatter_facts(call: Call, ins: Sequence[Facts]) -> list[Facts]:
    found = list(nothing(len(call.out)).axes)
    if call.name == "scatter" and call.eqn.params["update_jaxpr"] is not None:  # any function
        return [Facts(tuple(found))]
    for i, j in _whole_windows(call.eqn):
        known = common([ins[0].along(i, call.out[i]), ins[2].along(j, call.out[i])])
        adds = call.name in ("scatter-add", "scatter-sub", "scatter-mul")
        found[i] = only(known, 0) if adds else known
    return [Facts(tuple(found))]


def _top_k(eqn: Any, ins: Sequence[Axes], algebra: Any) -> list[Axes]:
    at, out = eqn.params["axis"], list(ins[0])
    algebra.freeze(out[at], "sorted")
    out[at] = algebra.fresh(eqn.params["k"], "sorted")
    return [tuple(out), tuple(out)]


def _top_k_facts(call: Call, ins: Sequence[Facts]) -> list[Facts]:
    at = call.eqn.params["axis"]
    axes = tuple(None if i == at else k for i, k in enumerate(ins[0].axes))
    return [Facts(axes, ins[0].whole), nothing(len(call.out))]


def _rev(eqn: Any, ins: Sequence[Axes], algebra: Any) -> list[Axes]:
    for i in eqn.params["dimensions"]:
        algebra.freeze(ins[0][i], "reversed")
    return [ins[0]]


def _sort(eqn: Any, ins: Sequence[Axes], algebra: Any) -> list[Axes]:
    algebra.freeze(ins[0][eqn.params["dimension"]], "sorted")
    axes = tuple(algebra.same(*column) for column in zip(*ins, strict=True))
    return [axes for _ in ins]


def _reordered(call: Call, ins: Sequence[Facts]) -> list[Facts]:
    """Keep what is known of the axes whose order stays: values change places along the others."""
    params = call.eqn.params
    moved = params["dimensions"] if call.name == "rev" else (params["dimension"],)
    return [
        Facts(tuple(None if i in moved else k for i, k in enumerate(facts.axes)), facts.whole)
        for facts in ins
    ]


RULES = {
    "dynamic_slice": Rule(_dynamic_slice, _dynamic_slice_facts, _slice_sizes),
    "dynamic_update_slice": Rule(_update, _update_facts),
    "gather": Rule(_gather, _gather_facts, _slice_sizes),
    "rev": Rule(_rev, _reordered),
    "sort": Rule(_sort, _reordered),
    "top_k": Rule(_top_k, _top_k_facts),
    **dict.fromkeys(SCATTERS, Rule(_scatter, _scatter_facts)),
}
