"""Primitives that bring positions of an axis together."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune.structure import axes as ax
from jaxprune.structure.axes import Axes
from jaxprune.structure.facts import Facts, Known, only, share, zeros_at
from jaxprune.structure.rules.base import Call, Resized, Rule, unknown_axes, unknown_facts

_MATTERS = "runs over it and a removed unit's value is not neutral"
_SLIDES = "a window slides over it"

_NEUTRAL: dict[str, Callable[[Any], Any]] = {
    "sum": lambda dtype: 0,
    "prod": lambda dtype: 1,
    "max": lambda dtype: _lowest(dtype),
    "min": lambda dtype: np.inf if jnp.issubdtype(dtype, np.floating) else None,
    "or": lambda dtype: 0,
    "xor": lambda dtype: 0,
    "and": lambda dtype: True if dtype == np.bool_ else -1,
    "logsumexp": lambda dtype: -np.inf,
}


def _lowest(dtype: Any) -> Any:
    return -np.inf if jnp.issubdtype(dtype, np.floating) else None


def _kind(name: str) -> str:
    """Return what a primitive does to the positions, such as `sum`."""
    for prefix in ("reduce_", "cum", "p"):  # psum, over an axis that vmap made
        if name.startswith(prefix) and name.removeprefix(prefix) in _NEUTRAL:
            return name.removeprefix(prefix)
    return name


def _across_devices(eqn: Any) -> bool:
    """Tell whether a reduction runs over an axis that has a name, or over groups."""
    named = not all(hasattr(i, "__index__") for i in eqn.params["axes"])
    return named or eqn.params.get("axis_index_groups") is not None


def _reduce(eqn: Any, ins: Sequence[Axes], algebra: Any) -> list[Axes]:
    axes = eqn.params["axes"]
    if _across_devices(eqn):
        return unknown_axes(eqn, ins, algebra)
    if eqn.primitive.name.startswith("arg"):
        for i in axes:
            algebra.freeze(ins[0][i], f"indexed by {eqn.primitive.name}")
    return [tuple(axis for i, axis in enumerate(each) if i not in axes) for each in ins]


def _reduce_facts(call: Call, ins: Sequence[Facts]) -> list[Facts]:
    kind = _kind(call.name)
    if kind not in _NEUTRAL or _across_devices(call.eqn):
        return unknown_facts(call, ins)
    return [_reduced(call, i, facts, kind) for i, facts in enumerate(ins)]


def _reduced(call: Call, operand: int, facts: Facts, kind: str) -> Facts:
    axes, shape = call.eqn.params["axes"], call.shape(operand)
    neutral = _NEUTRAL[kind](call.eqn.invars[operand].aval.dtype)
    free = [i for i in axes if any(atom.reason is None for atom in ax.atoms(call.axes[operand][i]))]
    for i in axes:
        adds_nothing = facts.equals(i, shape[i], neutral)
        shared = share(facts, i, shape, shape[i])
        if free == [i] and len(call.axes) == 1 and kind in _COMPLETED and shared is not None:
            call.needs(i, [shared._replace(at=shared.at & ~adds_nothing)])
            adds_nothing = adds_nothing | shared.at
        call.check(operand, i, adds_nothing, _MATTERS)
    # A sum of n zeros is zero whatever n, which pruning may change.
    keeps = kind in ("max", "min", "and", "or")
    found = [known if keeps else only(known, neutral)
             for i, known in enumerate(facts.axes) if i not in axes]  # fmt: skip
    whole = facts.whole if facts.whole is not None and facts.whole == neutral else None
    return Facts(tuple(found), whole)


_COMPLETED: dict[str, Callable[[Any, Any, int], Any]] = {
    "sum": lambda out, share, n: out + share * np.asarray(n, out.dtype),
    "max": lambda out, share, n: jnp.maximum(out, share),
    "min": lambda out, share, n: jnp.minimum(out, share),
}


def _complete(
    call: Resized, outs: list[Any], axis: int, one: list[Any]
) -> list[Any]:  # fmt: skip
    """Add what removed positions share."""
    n = int(np.count_nonzero(call.removed(0, axis) & call.shares[axis][0].at))
    if n == 0:
        return outs
    return [_COMPLETED[_kind(call.eqn.primitive.name)](outs[0], one[0], n)]


def _cumulative(call: Call, ins: Sequence[Facts]) -> list[Facts]:
    axis = call.eqn.params["axis"]
    neutral = _NEUTRAL[_kind(call.name)](call.eqn.invars[0].aval.dtype)
    call.check(0, axis, ins[0].equals(axis, call.shape(0)[axis], neutral), _MATTERS)
    axes = enumerate(ins[0].axes)
    return [Facts(tuple(None if i == axis else only(k, neutral) for i, k in axes))]


def _window(eqn: Any, ins: Sequence[Axes], algebra: Any) -> list[Axes]:
    if len(eqn.outvars) != 1:
        return unknown_axes(eqn, ins, algebra)
    params, out = eqn.params, []
    for i, axis in enumerate(ins[0]):
        untouched = params["window_dimensions"][i] == 1 == params["window_strides"][i]
        untouched &= tuple(params["padding"][i]) == (0, 0) and params["base_dilation"][i] == 1
        if not untouched:
            algebra.freeze(axis, _SLIDES)
            axis = algebra.fresh(eqn.outvars[0].aval.shape[i], _SLIDES)
        out.append(axis)
    return [tuple(out)]


def _window_facts(call: Call, ins: Sequence[Facts]) -> list[Facts]:
    if len(call.eqn.outvars) != 1 or call.name == "reduce_window":
        return unknown_facts(call, ins)
    params, adds = call.eqn.params, call.name == "reduce_window_sum"
    sizes = params["window_dimensions"]
    dilations = (*params["window_dilation"], *params["base_dilation"])
    if not adds and (
        max(dilations, default=1) > 1
        or any(max(pad) >= n for pad, n in zip(params["padding"], sizes, strict=True))
    ):
        return unknown_facts(call, ins)  # a window may lie in the padding alone
    found: list[Known | None] = []
    for known, n, m in zip(ins[0].axes, sizes, call.out, strict=True):
        stays = known is not None and n == 1 and known[0].size == m
        found.append((only(known, 0) if adds else known) if stays else None)
    return [Facts(tuple(found))]


def _same(eqn: Any, ins: Sequence[Axes], algebra: Any) -> list[Axes]:
    return [ins[0]]


def _fft(eqn: Any, ins: Sequence[Axes], algebra: Any) -> list[Axes]:
    shape = eqn.outvars[0].aval.shape
    first = len(shape) - len(eqn.params["fft_lengths"])
    for axis in ins[0][first:]:
        algebra.freeze(axis, "transformed by fft")
    ends = [algebra.fresh(n, "transformed by fft") for n in shape[first:]]
    return [(*ins[0][:first], *ends)]


def _fft_facts(call: Call, ins: Sequence[Facts]) -> list[Facts]:
    first = len(call.out) - len(call.eqn.params["fft_lengths"])
    zero = [None if k is None else k[0] & (k[1] == 0) for k in ins[0].axes[:first]]
    return [zeros_at([*zero, *[None] * (len(call.out) - first)], call.dtype)]


RULES = {
    **dict.fromkeys(
        "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor "
        "argmax argmin psum pmax pmin".split(),
        Rule(_reduce, _reduce_facts, complete=_complete),
    ),
    **dict.fromkeys("cumsum cumprod cummax cummin cumlogsumexp".split(), Rule(_same, _cumulative)),
    **dict.fromkeys(
        "reduce_window reduce_window_sum reduce_window_max reduce_window_min".split(),
        Rule(_window, _window_facts),
    ),
    "fft": Rule(_fft, _fft_facts),
}
