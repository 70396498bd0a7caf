"""Primitives that give values other shapes, or lay them side by side."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxprune.structure.axes import Axes
from jaxprune.structure.facts import Facts, Known, common, nothing
from jaxprune.structure.rules.base import Call, Resized, Rule


def _moved(places: Any) -> Rule:
    """Return the rule of a primitive whose result has axes of its operand, and others.

    Args:
        places: of an equation: for each axis of the result the operand's that it is, or None.
    """

    def axes(eqn: Any, ins: Sequence[Axes], algebra: Any) -> list[Axes]:
        shape = eqn.outvars[0].aval.shape
        return [tuple(algebra.fresh(n) if i is None else ins[0][i]
                      for i, n in zip(places(eqn), shape, strict=True))]  # fmt: skip

    def facts(call: Call, ins: Sequence[Facts]) -> list[Facts]:
        found = tuple(None if i is None else ins[0].axes[i] for i in places(call.eqn))
        return [Facts(found, ins[0].whole)]

    return Rule(axes, facts)


def _broadcast(eqn: Any) -> list[int | None]:
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    found: list[int | None] = [None] * len(new)
    for i, to in enumerate(eqn.params["broadcast_dimensions"]):
        if old[i] == new[to]:
            found[to] = i
    return found


def _squeeze(eqn: Any) -> list[int]:
    return [i for i in range(len(eqn.invars[0].aval.shape)) if i not in eqn.params["dimensions"]]


def _reshape(eqn: Any, ins: Sequence[Axes], algebra: Any) -> list[Axes]:
    return [algebra.reshape(ins[0], eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape)]


def _reshape_facts(call: Call, ins: Sequence[Facts]) -> list[Facts]:
    """Spread what is known over all elements of the axes' runs, and gather it again."""
    old, new, found = call.shape(0), call.out, list(nothing(len(call.out)).axes)
    for i, n in enumerate(old):
        known = ins[0].axes[i]
        if known is None or not np.prod(old):
            continue
        before, after = int(np.prod(old[:i])), int(np.prod(old[i + 1 :]))
        outer = 1
        for j, m in enumerate(new):
            inner = int(np.prod(new[j + 1 :]))
            # Of (before, n, after) and (outer, m, inner), what is common in front and behind.
            front, back = np.gcd(before, outer), np.gcd(after, inner)
            # Otherwise the axes have nothing to do with each other.
            if inner % (n * after) and after % (m * inner):
                spread = [
                    np.tile(np.repeat(k, after // back), before // front).reshape(
                        outer // front, m, inner // back
                    )
                    for k in known
                ]
                held = spread[0].all((0, 2))
                value = spread[1][0, :, 0]
                held &= (spread[1] == value[None, :, None]).all((0, 2))
                if held.any():
                    found[j] = _either(found[j], (held, value))
            outer *= m
    return [Facts(tuple(found), ins[0].whole)]


def _either(a: Known | None, b: Known) -> Known:
    return b if a is None else (a[0] | b[0], np.where(a[0], a[1], b[1]))


def _concatenate(eqn: Any, ins: Sequence[Axes], algebra: Any) -> list[Axes]:
    dimension, columns = eqn.params["dimension"], list(zip(*ins, strict=True))
    return [tuple(algebra.joined(column) if i == dimension else algebra.same(*column)
                  for i, column in enumerate(columns))]  # fmt: skip


def _concatenate_facts(call: Call, ins: Sequence[Facts]) -> list[Facts]:
    dimension, found = call.eqn.params["dimension"], []
    shapes = [x.aval.shape for x in call.eqn.invars]
    for i in range(len(call.out)):
        columns = [f.along(i, s[i]) for f, s in zip(ins, shapes, strict=True)]
        if i != dimension:
            found.append(common(columns))
        else:
            columns = [
                (np.zeros(s[i], bool), np.zeros(s[i], call.dtype)) if c is None else c
                for c, s in zip(columns, shapes, strict=True)
            ]
            found.append(tuple(np.concatenate(parts) for parts in zip(*columns, strict=True)))
    return [Facts(tuple(found))]


def _split(eqn: Any, ins: Sequence[Axes], algebra: Any) -> list[Axes]:
    at = eqn.params["axis"]
    pieces = algebra.split(ins[0][at], tuple(map(int, eqn.params["sizes"])))
    return [(*ins[0][:at], piece, *ins[0][at + 1 :]) for piece in pieces]


def _split_facts(call: Call, ins: Sequence[Facts]) -> list[Facts]:
    at, start, outs = call.eqn.params["axis"], 0, []
    for n in map(int, call.eqn.params["sizes"]):
        axes = list(ins[0].axes)
        axes[at] = _cut(axes[at], slice(start, start + n))
        outs.append(Facts(tuple(axes), ins[0].whole))
        start += n
    return outs


def _split_sizes(call: Resized, values: Sequence[Any]) -> dict[str, Any]:
    at = call.eqn.params["axis"]
    return {"sizes": tuple(call.shape(k)[at] for k in range(len(call.results)))}


def _cut(known: Known | None, at: slice) -> Known | None:
    return None if known is None else (known[0][at], known[1][at])


def _cuts(eqn: Any) -> list[slice]:
    """Return what a slice takes of each axis."""
    params, ndim = eqn.params, len(eqn.invars[0].aval.shape)
    strides = params["strides"] or (1,) * ndim
    limits = params["start_indices"], params["limit_indices"], strides
    return [slice(*each) for each in zip(*limits, strict=True)]


def _every(cut: slice, n: int) -> bool:
    """Tell whether a slice takes one of every so many positions of an axis, to its end."""
    step = cut.step
    return step > 1 and n % step == 0 and cut.start < step and cut.stop > n - step + cut.start


def _slice(eqn: Any, ins: Sequence[Axes], algebra: Any) -> list[Axes]:
    shape, out = eqn.invars[0].aval.shape, []
    for axis, cut, n, m in zip(ins[0], _cuts(eqn), shape, eqn.outvars[0].aval.shape, strict=True):
        if _every(cut, n):  # as of interleaved gates: what lies side by side is one unit
            each, within = algebra.fresh(m), algebra.fresh(cut.step, "sliced with a stride")
            algebra.same(axis, algebra.merged(each, within))
            out.append(each)
        elif cut.step != 1:
            algebra.freeze(axis, "sliced with a stride")
            out.append(algebra.fresh(m, "sliced with a stride"))
        elif m == n:
            out.append(axis)
        else:
            out.append(algebra.split(axis, (cut.start, m, n - cut.stop))[1])
    return [tuple(out)]


def _slice_facts(call: Call, ins: Sequence[Facts]) -> list[Facts]:
    cuts = _cuts(call.eqn)
    return [Facts(tuple(map(_cut, ins[0].axes, cuts)), ins[0].whole)]


def _slice_sizes(call: Resized, values: Sequence[Any]) -> dict[str, Any]:
    starts, limits = [], []
    for i, (cut, n) in enumerate(zip(_cuts(call.eqn), call.eqn.invars[0].aval.shape, strict=True)):
        if _every(cut, n):
            starts.append(cut.start)
            limits.append(max(cut.start, values[0].shape[i] - cut.step + cut.start + 1))
        else:
            starts.append(call.before(0, i, cut.start))
            limits.append(call.before(0, i, cut.stop))
    return {"start_indices": tuple(starts), "limit_indices": tuple(limits)}


def _pad(eqn: Any, ins: Sequence[Axes], algebra: Any) -> list[Axes]:
    out = []
    for axis, (low, high, interior), n in zip(
        ins[0], eqn.params["padding_config"], eqn.outvars[0].aval.shape, strict=True
    ):
        if interior or low < 0 or high < 0:
            algebra.freeze(axis, "padded between its indices, or cropped")
            out.append(algebra.fresh(n, "padded between its indices, or cropped"))
        else:
            ends = [algebra.fresh(int(k), "padding") for k in (low, high)]
            out.append(algebra.joined((ends[0], axis, ends[1])))
    return [tuple(out)]


def _pad_facts(call: Call, ins: Sequence[Facts]) -> list[Facts]:
    config, value = call.eqn.params["padding_config"], ins[1].whole
    found: list[Known | None] = []
    for i, (known, (low, high, interior)) in enumerate(zip(ins[0].axes, config, strict=True)):
        elsewhere = any(c != (0, 0, 0) for j, c in enumerate(config) if j != i)
        if known is None or value is None or interior or low < 0 or high < 0:
            found.append(None)
            continue
        held = known[0] & (known[1] == value) if elsewhere else known[0]
        found.append((
            np.pad(held, (low, high), constant_values=True),
            np.pad(known[1], (low, high), constant_values=value),
        ))  # fmt: skip
    return [Facts(tuple(found), value if value is not None and ins[0].whole == value else None)]


RULES = {
    "broadcast_in_dim": _moved(_broadcast)._replace(sizes=lambda call, _: {"shape": call.shape()}),
    "transpose": _moved(lambda eqn: eqn.params["permutation"]),
    "squeeze": _moved(_squeeze),
    "reshape": Rule(_reshape, _reshape_facts, lambda call, _: {"new_sizes": call.shape()}),
    "concatenate": Rule(_concatenate, _concatenate_facts),
    "split": Rule(_split, _split_facts, _split_sizes),
    "slice": Rule(_slice, _slice_facts, _slice_sizes),
    "pad": Rule(_pad, _pad_facts),
    "optimization_barrier": Rule(lambda eqn, ins, algebra: [*ins], lambda call, ins: [*ins]),
}
