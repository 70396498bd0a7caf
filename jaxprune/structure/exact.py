"""Which units can go without changing the function: what is known of the values at their indices.

A node of `trace` and what the masks say of the leaves come in. An abstract interpretation finds,
for every position of every axis, whether all values there are one constant, and checks wherever
positions meet (a contraction, a reduction) that a removed one adds nothing to the others.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from jaxprune.structure import axes as ax
from jaxprune.structure import trace
from jaxprune.structure.axes import Atom, Axis
from jaxprune.structure.trace import Node

Known = tuple[np.ndarray, np.ndarray]
"""Of an axis: which of its positions hold one constant, bool, and that constant."""


class Facts(NamedTuple):
    """What is known of a value.

    Attributes:
        axes: for each axis what is known of its positions, or None.
        whole: the constant that all elements are, or None.
    """

    axes: tuple[Known | None, ...]
    whole: np.ndarray | None = None

    def along(self, axis: int, n: int) -> Known | None:
        """Return what is known of the `n` positions of an axis."""
        if self.whole is not None:
            return np.ones(n, bool), np.full(n, self.whole)
        return self.axes[axis] if self.axes else None

    def equals(self, axis: int, n: int, constant: Any = 0) -> np.ndarray:
        """Return at which positions of an axis all values are the constant."""
        known = self.along(axis, n)
        return np.zeros(n, bool) if known is None else known[0] & (known[1] == constant)


class Sites:
    """Which units are seen to matter wherever positions meet.

    Attributes:
        matter: for every atom that met others, bool a unit.
        reasons: for every atom of which some unit matters, where that is.
        foldable: for every `dot_general`, by its id, whose result takes a bias, the operand whose
            constants can be folded into that: there it does not matter.
        constants: what is known of these operands.
    """

    def __init__(self, foldable: dict[int, int] | None = None) -> None:
        self.foldable = foldable or {}
        self.constants: dict[int, Known] = {}
        self.matter: dict[Atom, np.ndarray] = {}
        self.reasons: dict[Atom, str] = {}

    def check(self, axis: Axis, neutral: np.ndarray, reason: str) -> None:
        """Take in at which positions of an axis nothing is added to the others."""
        for atom, index in ax.units(axis):
            matter = self.matter.setdefault(atom, np.zeros(atom.size, bool))
            found = index[(index >= 0) & ~neutral]
            matter[found] = True
            if found.size:
                self.reasons.setdefault(atom, reason)


def nothing(rank: int) -> Facts:
    """Return the facts of a value of which nothing is known."""
    return Facts((None,) * rank)


def zeros_at(zero: Sequence[np.ndarray | None], dtype: Any) -> Facts:
    """Return the facts of a leaf from which positions of its axes are masked whole."""
    return Facts(
        tuple(None if z is None or not z.any() else (z, np.zeros(z.size, dtype)) for z in zero)
    )


def interpret(node: Node, inputs: Sequence[Facts], sites: Sites) -> list[Facts]:
    """Return the facts of a program's results, and check its sites."""
    env: dict[Any, Facts] = {}
    for var, const in zip(node.jaxpr.constvars, node.consts, strict=True):
        env[var] = _constant(const)
    env.update(zip(node.jaxpr.invars, inputs, strict=True))

    def read(x: Any) -> Facts:
        return _constant(x.val) if isinstance(x, Literal) else env[x]

    for i, eqn in enumerate(node.jaxpr.eqns):
        ins = [read(x) for x in eqn.invars]
        if i in node.inner:
            outs = _program(eqn, node, i, ins, sites)
        else:
            name = eqn.primitive.name
            rule = _elementwise if name in trace.ELEMENTWISE else _RULES.get(name, _unknown)
            outs = rule(_Call(eqn, [node.of(x) for x in eqn.invars], sites), ins)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(x) for x in node.jaxpr.outvars]


def _constant(value: Any) -> Facts:
    shape = np.shape(value)
    if jnp.issubdtype(getattr(value, "dtype", np.int32), jax.dtypes.extended):
        return nothing(len(shape))
    value = np.asarray(value)
    uniform = value.size and bool((value == value.flat[0]).all())
    return Facts((None,) * len(shape), value.flat[0] if uniform else None)


class _Call(NamedTuple):
    """An equation, the axes of its operands and the sites to check."""

    eqn: Any
    axes: list[ax.Axes]
    sites: Sites

    def shape(self, operand: int) -> tuple[int, ...]:
        return self.eqn.invars[operand].aval.shape

    @property
    def out(self) -> tuple[int, ...]:
        return self.eqn.outvars[0].aval.shape

    @property
    def name(self) -> str:
        return self.eqn.primitive.name

    def check(self, operand: int, axis: int, neutral: np.ndarray, what: str) -> None:
        self.sites.check(self.axes[operand][axis], neutral, f"{self.name} {what}")


_Rule = Callable[[_Call, list[Facts]], list[Facts]]


def _unknown(call: _Call, ins: list[Facts]) -> list[Facts]:
    return [nothing(len(out.aval.shape)) for out in call.eqn.outvars]


def _elementwise(call: _Call, ins: list[Facts]) -> list[Facts]:
    shapes = [x.aval.shape for x in call.eqn.invars]
    if any(len(shape) not in (0, len(call.out)) for shape in shapes):
        return _unknown(call, ins)
    if call.name in ("is_finite", "eq", "ne") and len({*map(id, call.eqn.invars)}) == 1:
        return _unknown(call, ins)  # asks for NaN, which an index out of range may have given
    found = []
    for i, n in enumerate(call.out):
        # An operand of another size is broadcast along the axis: known whole, or not at all.
        columns = [
            facts.along(i, n) if not shape or shape[i] == n or facts.whole is not None else None
            for facts, shape in zip(ins, shapes, strict=True)
        ]
        found.append(_evaluate(call.eqn, columns, n))
    whole = None
    if all(facts.whole is not None for facts in ins):
        known = _evaluate(call.eqn, [facts.along(0, 1) for facts in ins], 1)
        whole = None if known is None else known[1][0]
    return [Facts(tuple(found), whole)]


def _evaluate(eqn: Any, columns: list[Known | None], n: int) -> Known | None:
    """Evaluate an elementwise primitive at the positions where its operands are known."""
    if all(column is None for column in columns):
        return None
    dtype = eqn.outvars[0].aval.dtype
    known, value = np.zeros(n, bool), np.zeros(n, dtype)
    name = eqn.primitive.name
    if name in ("mul", "and", "div"):  # zero whatever the other is, if that is finite
        for column in columns[:1] if name == "div" else columns:
            if column is not None:
                known |= column[0] & (column[1] == 0)
    if name == "select_n" and (same := _common(columns[1:])) is not None:
        known, value = same[0].copy(), np.where(same[0], same[1], value)
    operands = [column for column in columns if column is not None]
    if len(operands) == len(columns):
        both = np.logical_and.reduce([column[0] for column in operands])
        values = [column[1][both] for column in operands]
        first, inverse = _distinct(values)
        if first.size:
            constants = tuple((v.dtype, v[first].tobytes()) for v in values)
            try:
                result = _compute(eqn.primitive, tuple(eqn.params.items()), constants)
            except TypeError:  # a parameter without a hash
                result = _compute.__wrapped__(eqn.primitive, eqn.params, constants)
            value[both] = result[inverse.ravel()]
            known |= both
    return (known, value) if known.any() else None


@lru_cache(maxsize=4096)
def _compute(primitive: Any, params: Any, constants: tuple[tuple[np.dtype, bytes], ...]) -> Any:
    """Run an elementwise primitive on constants; the same few recur at every equation."""
    values = [np.frombuffer(content, dtype) for dtype, content in constants]
    n = values[0].size
    values = [np.resize(v, 1 << (n - 1).bit_length()) for v in values]  # few sizes to compile
    with jax.ensure_compile_time_eval():
        return np.asarray(primitive.bind(*values, **dict(params)))[:n]


def _distinct(values: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return where each combination of values comes first, and which one is at each position."""
    if all(v.size and (v == v[0]).all() for v in values):  # nearly always, and quick to see
        return np.zeros(1, int), np.zeros(values[0].size, int)
    codes = np.stack([np.unique(v, return_inverse=True)[1].ravel() for v in values])
    _, first, inverse = np.unique(codes, axis=1, return_index=True, return_inverse=True)
    return first, inverse


def _common(facts: list[Known | None]) -> Known | None:
    """Return what is known of positions that take in those of all the given."""
    known = [k for k in facts if k is not None]
    if len(known) < len(facts):
        return None
    both = known[0][0].copy()
    for other in known[1:]:
        both &= other[0] & (other[1] == known[0][1])
    return (both, known[0][1]) if both.any() else None


def _meet(a: Facts, b: Facts, shape: tuple[int, ...]) -> Facts:
    """Return what is known of a value that is the one or the other."""
    whole = a.whole if a.whole is not None and b.whole == a.whole else None
    along = [_common([a.along(i, n), b.along(i, n)]) for i, n in enumerate(shape)]
    return Facts(tuple(along), whole)


def _broadcast_in_dim(call: _Call, ins: list[Facts]) -> list[Facts]:
    (facts, *_), found = ins, list(nothing(len(call.out)).axes)
    for i, to in enumerate(call.eqn.params["broadcast_dimensions"]):
        if call.shape(0)[i] == call.out[to]:
            found[to] = facts.axes[i]
    return [Facts(tuple(found), facts.whole)]


def _transpose(call: _Call, ins: list[Facts]) -> list[Facts]:
    axes = tuple(ins[0].axes[i] for i in call.eqn.params["permutation"])
    return [Facts(axes, ins[0].whole)]


def _squeeze(call: _Call, ins: list[Facts]) -> list[Facts]:
    dropped = call.eqn.params["dimensions"]
    axes = tuple(k for i, k in enumerate(ins[0].axes) if i not in dropped)
    return [Facts(axes, ins[0].whole)]


def _reshape(call: _Call, ins: list[Facts]) -> list[Facts]:
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


def _dot_general(call: _Call, ins: list[Facts]) -> list[Facts]:
    sums, batches = call.eqn.params["dimension_numbers"]
    shapes = call.shape(0), call.shape(1)
    for i, j in zip(*sums, strict=True):
        zero = ins[0].equals(i, shapes[0][i]) | ins[1].equals(j, shapes[1][j])
        k = call.sites.foldable.get(id(call.eqn))
        if k is not None and (known := ins[k].along((i, j)[k], zero.size)) is not None:
            call.sites.constants[id(call.eqn)] = known
            zero |= known[0]
        for operand, axis in ((0, i), (1, j)):
            call.check(operand, axis, zero, "sums over it what is not zero")
    zeros = [
        ins[0].equals(i, shapes[0][i]) | ins[1].equals(j, shapes[1][j])
        for i, j in zip(*batches, strict=True)
    ]
    for k in (0, 1):
        bound = {*sums[k], *batches[k]}
        zeros += [ins[k].equals(i, n) for i, n in enumerate(shapes[k]) if i not in bound]
    return [zeros_at(zeros, call.eqn.outvars[0].aval.dtype)]


def _conv(call: _Call, ins: list[Facts]) -> list[Facts]:
    numbers, groups = call.eqn.params["dimension_numbers"], call.eqn.params["feature_group_count"]
    if call.eqn.params["batch_group_count"] != 1:
        return _unknown(call, ins)
    (batch, features, *_), (outputs, inputs, *_) = numbers.lhs_spec, numbers.rhs_spec
    x, kernel = ins
    of_kernel = kernel.equals(inputs, call.shape(1)[inputs])
    of_x = x.equals(features, call.shape(0)[features]).reshape(groups, -1)
    call.check(1, inputs, of_kernel | of_x.all(0), "sums over it what is not zero")
    if groups == 1:
        call.check(0, features, of_kernel | of_x[0], "sums over it what is not zero")
    elif of_kernel.size > 1:  # what is within a group
        neutral = np.tile(of_kernel | of_x.all(0), groups)
        within = {atom for atom, _ in ax.units(call.axes[1][inputs])}
        for atom, index in ax.units(call.axes[0][features]):
            if atom in within:
                matter = call.sites.matter.setdefault(atom, np.zeros(atom.size, bool))
                matter[index[(index >= 0) & ~neutral]] = True
                if matter.any():
                    call.sites.reasons.setdefault(atom, f"{call.name} sums over it")
    n = call.shape(1)[outputs]
    zeros: list[np.ndarray | None] = [None] * len(call.out)
    zeros[numbers.out_spec[0]] = x.equals(batch, call.shape(0)[batch])
    zeros[numbers.out_spec[1]] = kernel.equals(outputs, n) | np.repeat(of_x.all(1), n // groups)
    return [zeros_at(zeros, call.eqn.outvars[0].aval.dtype)]


def _concatenate(call: _Call, ins: list[Facts]) -> list[Facts]:
    dimension, found = call.eqn.params["dimension"], []
    shapes = [x.aval.shape for x in call.eqn.invars]
    for i in range(len(call.out)):
        columns = [f.along(i, s[i]) for f, s in zip(ins, shapes, strict=True)]
        if i != dimension:
            found.append(_common(columns))
        else:
            dtype = call.eqn.outvars[0].aval.dtype
            columns = [
                (np.zeros(s[i], bool), np.zeros(s[i], dtype)) if c is None else c
                for c, s in zip(columns, shapes, strict=True)
            ]
            found.append(tuple(np.concatenate(parts) for parts in zip(*columns, strict=True)))
    return [Facts(tuple(found))]


def _pieces(known: Known | None, start: int, limit: int) -> Known | None:
    return None if known is None else (known[0][start:limit], known[1][start:limit])


def _split(call: _Call, ins: list[Facts]) -> list[Facts]:
    at, start, outs = call.eqn.params["axis"], 0, []
    for n in map(int, call.eqn.params["sizes"]):
        axes = list(ins[0].axes)
        axes[at] = _pieces(axes[at], start, start + n)
        outs.append(Facts(tuple(axes), ins[0].whole))
        start += n
    return outs


def _slice(call: _Call, ins: list[Facts]) -> list[Facts]:
    params = call.eqn.params
    strides = params["strides"] or (1,) * len(call.out)
    cuts = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    axes = tuple(
        None if k is None else (k[0][start:limit:stride], k[1][start:limit:stride])
        for k, (start, limit, stride) in zip(ins[0].axes, cuts, strict=True)
    )
    return [Facts(axes, ins[0].whole)]


def _pad(call: _Call, ins: list[Facts]) -> list[Facts]:
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


def _gather(call: _Call, ins: list[Facts]) -> list[Facts]:
    numbers, sizes = call.eqn.params["dimension_numbers"], call.eqn.params["slice_sizes"]
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    taken = [i for i in range(len(sizes)) if i not in dropped]
    found = list(nothing(len(call.out)).axes)
    fill = call.eqn.params["fill_value"]
    for to, i in zip(numbers.offset_dims, taken, strict=True):
        known = ins[0].axes[i]
        # What an index out of range gives; NaN, the default, the kept units have there as well.
        if known is not None and fill is not None and fill == fill:
            known = known[0] & (known[1] == fill), known[1]
        if sizes[i] == call.shape(0)[i]:
            found[to] = known
    return [Facts(tuple(found))]


def _scatter(call: _Call, ins: list[Facts]) -> list[Facts]:
    found = list(nothing(len(call.out)).axes)
    if call.name == "scatter" and call.eqn.params["update_jaxpr"] is not None:  # any function
        return [Facts(tuple(found))]
    for i, j in trace.whole_windows(call.eqn):
        known = _common([ins[0].along(i, call.out[i]), ins[2].along(j, call.out[i])])
        if known is not None and call.name in ("scatter-add", "scatter-sub", "scatter-mul"):
            known = known[0] & (known[1] == 0), known[1]
        found[i] = known
    return [Facts(tuple(found))]


def _reordered(call: _Call, ins: list[Facts]) -> list[Facts]:
    """Keep what is known of the axes whose order stays: values change places along the others."""
    params = call.eqn.params
    moved = params["dimensions"] if call.name == "rev" else (params["dimension"],)
    return [
        Facts(tuple(None if i in moved else k for i, k in enumerate(facts.axes)), facts.whole)
        for facts in ins
    ]


def _top_k(call: _Call, ins: list[Facts]) -> list[Facts]:
    at = call.eqn.params["axis"]
    axes = tuple(None if i == at else k for i, k in enumerate(ins[0].axes))
    return [Facts(axes, ins[0].whole), nothing(len(call.out))]


def _dynamic_slice(call: _Call, ins: list[Facts]) -> list[Facts]:
    whole = [n == m for n, m in zip(call.shape(0), call.out, strict=True)]
    axes = tuple(k if w else None for k, w in zip(ins[0].axes, whole, strict=True))
    return [Facts(axes, ins[0].whole)]


def _dynamic_update_slice(call: _Call, ins: list[Facts]) -> list[Facts]:
    found: list[Known | None] = []
    for i, n in enumerate(call.out):
        same = call.shape(1)[i] == n
        found.append(_common([ins[0].along(i, n), ins[1].along(i, n)]) if same else None)
    return [Facts(tuple(found))]


_NEUTRAL: dict[str, Callable[[Any], Any]] = {
    "sum": lambda dtype: 0,
    "prod": lambda dtype: 1,
    "max": lambda dtype: _lowest(dtype),
    "min": lambda dtype: -_lowest(dtype) if np.issubdtype(dtype, np.inexact) else None,
    "or": lambda dtype: 0,
    "xor": lambda dtype: 0,
    "and": lambda dtype: True if dtype == np.bool_ else -1,
    "logsumexp": lambda dtype: -np.inf,
}


def _lowest(dtype: Any) -> Any:
    floating = jnp.issubdtype(dtype, np.floating)
    return -np.inf if floating else None


def _reduce(call: _Call, ins: list[Facts]) -> list[Facts]:
    (facts, *_), axes, shape = ins, call.eqn.params["axes"], call.shape(0)
    kind = call.name.removeprefix("reduce_")
    if kind not in _NEUTRAL:
        return _unknown(call, ins)
    neutral = _NEUTRAL[kind](call.eqn.invars[0].aval.dtype)
    for i in axes:
        call.check(0, i, facts.equals(i, shape[i], neutral), "runs over it and a removed unit's "
                   "value is not neutral")  # fmt: skip
    found: list[Known | None] = []
    for i, known in enumerate(facts.axes):
        if i in axes:
            continue
        if known is not None and kind not in ("max", "min", "and", "or"):
            # A sum of n zeros is zero whatever n, which pruning may change.
            known = known[0] & (known[1] == neutral), known[1]
        found.append(known)
    whole = facts.whole if facts.whole is not None and facts.whole == neutral else None
    return [Facts(tuple(found), whole)]


def _cumulative(call: _Call, ins: list[Facts]) -> list[Facts]:
    axis, shape = call.eqn.params["axis"], call.shape(0)
    kind = call.name.removeprefix("cum")
    neutral = _NEUTRAL[kind](call.eqn.invars[0].aval.dtype)
    call.check(0, axis, ins[0].equals(axis, shape[axis], neutral), "runs over it and a removed "
               "unit's value is not neutral")  # fmt: skip
    axes = tuple(
        None if k is None or i == axis else (k[0] & (k[1] == neutral), k[1])
        for i, k in enumerate(ins[0].axes)
    )
    return [Facts(axes)]


def _window(call: _Call, ins: list[Facts]) -> list[Facts]:
    if len(call.eqn.outvars) != 1 or call.name == "reduce_window":
        return _unknown(call, ins)
    found: list[Known | None] = []
    params = call.eqn.params
    sizes, dilations = params["window_dimensions"], (*params["window_dilation"],
                                                     *params["base_dilation"])  # fmt: skip
    if call.name != "reduce_window_sum" and (
        max(dilations, default=1) > 1
        or any(max(pad) >= n for pad, n in zip(params["padding"], sizes, strict=True))
    ):
        return _unknown(call, ins)  # a window may lie in the padding alone
    for known, n in zip(ins[0].axes, sizes, strict=True):
        if known is not None and n == 1 and call.name == "reduce_window_sum":
            known = known[0] & (known[1] == 0), known[1]
        found.append(known if n == 1 else None)
    return [Facts(tuple(k if k is not None and k[0].size == n else None
                        for k, n in zip(found, call.out, strict=True)))]  # fmt: skip


def _iota(call: _Call, ins: list[Facts]) -> list[Facts]:
    found, i = list(nothing(len(call.out)).axes), call.eqn.params["dimension"]
    dtype = call.eqn.outvars[0].aval.dtype
    found[i] = np.ones(call.out[i], bool), np.arange(call.out[i]).astype(dtype)
    return [Facts(tuple(found))]


_RULES: dict[str, _Rule] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "reshape": _reshape,
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "concatenate": _concatenate,
    "split": _split,
    "slice": _slice,
    "pad": _pad,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "iota": _iota,
    "rev": _reordered,
    "sort": _reordered,
    "top_k": _top_k,
    "optimization_barrier": lambda call, ins: ins,
    **dict.fromkeys(trace.SCATTERS, _scatter),
    **dict.fromkeys(trace.REDUCTIONS, _reduce),
    **dict.fromkeys(trace.CUMULATIVE, _cumulative),
    **dict.fromkeys(trace.WINDOWS, _window),
}


def _program(eqn: Any, node: Node, i: int, ins: list[Facts], sites: Sites) -> list[Facts]:
    inner, name = node.inner[i], eqn.primitive.name
    if name == "scan":
        return _scan(eqn, inner[0], ins, sites)
    outs = interpret(inner[0], ins, sites)
    if len(inner) > 1:  # a derivative: what is constant has a tangent of zero
        args = ins[eqn.params["num_consts"] :]
        tangents = [
            _tangent(facts, x.aval.dtype)
            for facts, x in zip(args, trace.arguments(eqn), strict=True)
            if trace.inexact(x)
        ]
        moving = iter(interpret(inner[1], [*args, *tangents], sites)[len(outs) :])
        zero = trace.derivative_program(eqn)[2]
        # A rule of its own may give what is constant a tangent all the same.
        outs = [out if z else _at_rest(out, next(moving), x.aval.shape)
                for out, z, x in zip(outs, zero, eqn.outvars, strict=True)]  # fmt: skip
    return outs


def _at_rest(facts: Facts, tangent: Facts, shape: tuple[int, ...]) -> Facts:
    found: list[Known | None] = []
    for i, n in enumerate(shape):
        known = facts.along(i, n)
        found.append(None if known is None else (known[0] & tangent.equals(i, n), known[1]))
    still = tangent.whole is not None and tangent.whole == 0
    return Facts(tuple(found), facts.whole if still else None)


def _tangent(facts: Facts, dtype: Any) -> Facts:
    axes = zeros_at([None if k is None else k[0] for k in facts.axes], dtype).axes
    return Facts(axes, None if facts.whole is None else np.zeros((), dtype)[()])


def _scan(eqn: Any, body: Node, ins: list[Facts], sites: Sites) -> list[Facts]:
    consts, carries = trace.scan_sizes(eqn)
    invars: list[Any] = body.jaxpr.invars
    shapes = [x.aval.shape for x in invars]
    carry = ins[consts : consts + carries]
    steps = [Facts(facts.axes[1:], facts.whole) for facts in ins[consts + carries :]]
    while True:  # less is known of the carry from step to step, until it stays
        outs = interpret(body, [*ins[:consts], *carry, *steps], sites)
        after = [_meet(a, b, s) for a, b, s in zip(carry, outs, shapes[consts:], strict=False)]
        if all(_as_much(a, b) for a, b in zip(carry, after, strict=True)):
            break
        carry = after
    stacked = [Facts((None, *facts.axes), facts.whole) for facts in outs[carries:]]
    return [*after, *stacked]


def _as_much(before: Facts, after: Facts) -> bool:
    return (before.whole is None) == (after.whole is None) and all(
        (np.count_nonzero(b[0]) if b else 0) == (np.count_nonzero(a[0]) if a else 0)
        for b, a in zip(before.axes, after.axes, strict=True)
    )
