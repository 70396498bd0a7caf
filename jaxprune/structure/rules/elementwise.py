"""Primitives that work position by position, and sources of values."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.structure import axes as ax
from jaxprune.structure.axes import Axes
from jaxprune.structure.facts import Facts, Known, common, nothing, share
from jaxprune.structure.rules.base import Call, Rule, unknown_axes, unknown_facts

ELEMENTWISE = (
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e "
    "bitcast_convert_type cbrt ceil clamp complex conj convert_element_type copy copy_p cos cosh "
    "digamma div eq erf erf_inv erfc "
    "exp exp2 expm1 floor ge gt igamma igammac imag integer_pow is_finite le lgamma log log1p "
    "logistic lt max min mul name ne neg nextafter not or polygamma population_count pow pvary "
    "real reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic "
    "shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor"
).split()


def _axes(eqn: Any, ins: Sequence[Axes], algebra: Any) -> list[Axes]:
    shape = eqn.outvars[0].aval.shape
    if any(len(axes) not in (0, len(shape)) for axes in ins):  # a cast to another width
        return unknown_axes(eqn, ins, algebra)
    operands = [(axes, x.aval.shape) for axes, x in zip(ins, eqn.invars, strict=True) if len(axes)]
    # Axes of other sizes are 1 and broadcast.
    return [tuple(algebra.same(*(a[i] for a, s in operands if s[i] == n))
                  for i, n in enumerate(shape))]  # fmt: skip


def _facts(call: Call, ins: Sequence[Facts]) -> list[Facts]:
    shapes = [x.aval.shape for x in call.eqn.invars]
    keys = jnp.issubdtype(call.eqn.outvars[0].aval.dtype, jax.dtypes.extended)
    if keys or any(len(shape) not in (0, len(call.out)) for shape in shapes):
        return unknown_facts(call, ins)
    if call.name in ("is_finite", "eq", "ne") and len({*map(id, call.eqn.invars)}) == 1:
        return unknown_facts(call, ins)  # asks for NaN, which an index out of range may have given
    found = []
    for i, n in enumerate(call.out):
        # An operand of another size is broadcast along the axis: known whole, or not at all.
        columns = [
            facts.along(i, n) if not shape or shape[i] == n or facts.whole is not None else None
            for facts, shape in zip(ins, shapes, strict=True)
        ]
        _note_zero_divisors(call, i, columns)
        found.append(_evaluate(call.eqn, columns, n))
    whole = None
    if all(facts.whole is not None for facts in ins):
        known = _evaluate(call.eqn, [facts.along(0, 1) for facts in ins], 1)
        whole = None if known is None else known[1][0]
    alike = {} if whole is not None else _alike(call, ins, shapes, found)
    return [Facts(tuple(found), whole, alike)]


def _alike(
    call: Call, ins: Sequence[Facts], shapes: Sequence[Any], found: Sequence[Known | None]
) -> dict[int, np.ndarray]:
    """Return at which positions all operands hold one value each, if the result is not known."""
    alike = {}
    for i, n in enumerate(call.out):
        if not any(i in facts.alike or (facts.axes and facts.axes[i]) for facts in ins):
            continue
        own = [a[i] for a, shape in zip(call.axes, shapes, strict=True) if shape and shape[i] == n]
        if not own or all(atom.reason for atom in ax.atoms(own[0])):
            continue
        shares = [share(facts, i, shape, n) for facts, shape in zip(ins, shapes, strict=True)]
        given = [each for each in shares if each is not None]
        if len(given) < len(shares):
            continue
        at = np.logical_and.reduce([each.at for each in given])
        known = found[i]
        if at.any() and not at.all() and not (known is not None and known[0][at].all()):
            alike[i] = at
            call.needs(i, given)
    return alike


def _note_zero_divisors(call: Call, i: int, columns: list[Known | None]) -> None:
    """Note the units whose values along an axis are divided by zero if they are masked."""
    k = {"div": 1, "rsqrt": 0}.get(call.name)
    if k is None or (known := columns[k]) is None or len(call.axes[k]) <= i:
        return
    zero = known[0] & (known[1] == 0)
    for atom, index in ax.units(call.axes[k][i]) if zero.any() and zero.size == call.out[i] else ():
        if (index[zero] >= 0).any():
            call.sites.divided.add(atom)


def _evaluate(eqn: Any, columns: list[Known | None], n: int) -> Known | None:
    """Evaluate a primitive at the positions where its operands are known."""
    if all(column is None for column in columns):
        return None
    known, value = np.zeros(n, bool), np.zeros(n, eqn.outvars[0].aval.dtype)
    name = eqn.primitive.name
    if name in ("mul", "and", "div"):  # zero whatever the other is, if that is finite
        for column in columns[:1] if name == "div" else columns:
            if column is not None:
                known |= column[0] & (column[1] == 0)
    if name == "select_n" and (same := common(columns[1:])) is not None:
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
    """Run a primitive on constants; the same few recur at every equation."""
    values = [np.frombuffer(content, dtype) for dtype, content in constants]
    n = values[0].size
    values = [np.resize(v, 1 << (n - 1).bit_length()) for v in values]  # few sizes to compile
    with jax.ensure_compile_time_eval():
        return np.asarray(primitive.bind(*values, **dict(params)))[:n]


def _distinct(values: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return where each combination of values comes first, and which one is at each position."""
    content = [np.ascontiguousarray(v).view(np.uint8).reshape(v.size, v.itemsize) for v in values]
    if all(len(v) and (v == v[0]).all() for v in content):  # nearly always, and quick to see
        return np.zeros(1, int), np.zeros(values[0].size, int)
    # By their bytes: 0 and -0 are not one constant.
    codes = np.stack([np.unique(v, axis=0, return_inverse=True)[1].ravel() for v in content])
    _, first, inverse = np.unique(codes, axis=1, return_index=True, return_inverse=True)
    return first, inverse


def _source(eqn: Any, ins: Sequence[Axes], algebra: Any) -> list[Axes]:
    for axis in (axis for axes in ins for axis in axes):
        algebra.freeze(axis, f"a setting of {eqn.primitive.name}")
    return [tuple(map(algebra.fresh, out.aval.shape)) for out in eqn.outvars]


def _iota(call: Call, ins: Sequence[Facts]) -> list[Facts]:
    found, i = list(nothing(len(call.out)).axes), call.eqn.params["dimension"]
    found[i] = np.ones(call.out[i], bool), np.arange(call.out[i]).astype(call.dtype)
    return [Facts(tuple(found))]


RULES = {
    **dict.fromkeys(ELEMENTWISE, Rule(_axes, _facts)),
    "iota": Rule(_source, _iota, whole=True),
    "random_bits": Rule(_source, whole=True),
}
