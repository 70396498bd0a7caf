"""Products: of matrices, and convolutions."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune.structure import axes as ax
from jaxprune.structure.axes import Axes
from jaxprune.structure.facts import Facts, zeros_at
from jaxprune.structure.rules.base import (
    Call,
    Resized,
    Rule,
    size,
    unknown_axes,
    unknown_facts,
)

KERNEL_WINDOW = "the window of a convolution"
_SUMS = "sums over it what is not zero"


_Both = tuple[Sequence[int], Sequence[int]]


def numbers_of(eqn: Any) -> tuple[str, _Both, _Both, Sequence[int]]:
    """Return the kind of a product, the axes summed over and batched, and a kernel's window."""
    if eqn.primitive.name == "conv_general_dilated":
        _, inputs, *window = eqn.params["dimension_numbers"].rhs_spec
        return "convolution", ((), (inputs, *window)), ((), ()), window
    numbers = eqn.params.get("dimension_numbers")
    if numbers is None:  # of rows that are sorted by experts
        numbers = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    return "dense", *numbers, ()


def _dot(eqn: Any, ins: Sequence[Axes], algebra: Any) -> list[Axes]:
    (left_sum, right_sum), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    left, right = ins
    for i, j in zip(left_sum, right_sum, strict=True):
        algebra.same(left[i], right[j])
    batch = [
        algebra.same(left[i], right[j]) for i, j in zip(left_batch, right_batch, strict=True)
    ]  # fmt: skip
    used_left, used_right = {*left_sum, *left_batch}, {*right_sum, *right_batch}
    return [
        (
            *batch,
            *(axis for i, axis in enumerate(left) if i not in used_left),
            *(axis for j, axis in enumerate(right) if j not in used_right),
        )
    ]


def _dot_facts(call: Call, ins: Sequence[Facts]) -> list[Facts]:
    sums, batches = call.eqn.params["dimension_numbers"]
    shapes = call.shape(0), call.shape(1)
    for i, j in zip(*sums, strict=True):
        zero = ins[0].equals(i, shapes[0][i]) | ins[1].equals(j, shapes[1][j])
        k = call.sites.foldable.get(call.place)
        if k is not None and (known := ins[k].along((i, j)[k], zero.size)) is not None:
            call.sites.constants[call.place] = known
            zero |= known[0]
        for operand, axis in ((0, i), (1, j)):
            call.check(operand, axis, zero, _SUMS)
    zeros = [
        ins[0].equals(i, shapes[0][i]) | ins[1].equals(j, shapes[1][j])
        for i, j in zip(*batches, strict=True)
    ]
    for k in (0, 1):
        bound = {*sums[k], *batches[k]}
        zeros += [ins[k].equals(i, n) for i, n in enumerate(shapes[k]) if i not in bound]
    return [zeros_at(zeros, call.dtype)]


def _conv(eqn: Any, ins: Sequence[Axes], algebra: Any) -> list[Axes]:
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    if eqn.params["batch_group_count"] != 1:
        return unknown_axes(eqn, ins, algebra)
    x, kernel = ins
    (batch, features, *space) = numbers.lhs_spec
    (outputs, inputs, *window) = numbers.rhs_spec
    for axis in space:
        algebra.freeze(x[axis], "a window slides over it")
    for axis in window:
        algebra.freeze(kernel[axis], KERNEL_WINDOW)
    if groups == 1:
        algebra.same(x[features], kernel[inputs])
    else:
        group, own = algebra.fresh(groups), algebra.fresh(size(eqn, 1, outputs) // groups)
        algebra.same(x[features], algebra.merged(group, kernel[inputs]))
        algebra.same(kernel[outputs], algebra.merged(group, own))
    out = [algebra.fresh(n, "a window slides over it") for n in eqn.outvars[0].aval.shape]
    out[numbers.out_spec[0]], out[numbers.out_spec[1]] = x[batch], kernel[outputs]
    return [tuple(out)]


def _conv_facts(call: Call, ins: Sequence[Facts]) -> list[Facts]:
    numbers, groups = call.eqn.params["dimension_numbers"], call.eqn.params["feature_group_count"]
    if call.eqn.params["batch_group_count"] != 1:
        return unknown_facts(call, ins)
    (batch, features, *_), (outputs, inputs, *_) = numbers.lhs_spec, numbers.rhs_spec
    x, kernel = ins
    of_kernel = kernel.equals(inputs, call.shape(1)[inputs])
    of_x = x.equals(features, call.shape(0)[features]).reshape(groups, -1)
    call.check(1, inputs, of_kernel | of_x.all(0), _SUMS)
    if groups == 1:
        call.check(0, features, of_kernel | of_x[0], _SUMS)
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
    return [zeros_at(zeros, call.dtype)]


def _conv_sizes(call: Resized, values: Sequence[Any]) -> dict[str, Any]:
    numbers = call.eqn.params["dimension_numbers"]
    features = jnp.shape(values[0])[numbers.lhs_spec[1]]
    return {"feature_group_count": features // jnp.shape(values[1])[numbers.rhs_spec[1]]}


RULES = {
    "dot_general": Rule(_dot, _dot_facts),
    "conv_general_dilated": Rule(_conv, _conv_facts, _conv_sizes),
}
