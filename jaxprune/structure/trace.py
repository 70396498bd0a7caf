"""Follow every axis of every intermediate of a traced program: one rule a primitive.

A jaxpr with the axes of its inputs comes in; `follow` gives a `Node` with the axes of all its
variables, in which axes that must shrink together are one. `exact` and `express` walk the nodes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from jaxprune.structure.axes import Axes, Axis, Product, Sum, freeze, fresh, reshape, split, unify

ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e "
    "bitcast_convert_type cbrt ceil clamp complex conj convert_element_type copy copy_p cos cosh "
    "digamma div eq erf erf_inv erfc "
    "exp exp2 expm1 floor ge gt igamma igammac imag integer_pow is_finite le lgamma log log1p "
    "logistic lt max min mul name ne neg nextafter not or polygamma population_count pow real "
    "reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic "
    "shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor".split()
)
REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin"
    .split()
)  # fmt: skip
CUMULATIVE = frozenset("cumsum cumprod cummax cummin cumlogsumexp".split())
WINDOWS = frozenset("reduce_window reduce_window_sum reduce_window_max reduce_window_min".split())
SOURCES = frozenset("iota random_bits".split())  # made whole, then cut to what is kept
REMAT = frozenset("checkpoint remat remat2".split())
CALLS = frozenset("jit pjit closed_call core_call".split())
WRITTEN_OUT = frozenset("stack unstack tile".split())  # followed as the simpler ones they stand for
SCATTERS = frozenset("scatter scatter-add scatter-sub scatter-mul scatter-min scatter-max".split())


@dataclasses.dataclass(eq=False)
class Node:
    """One call of a jaxpr: the same jaxpr, called elsewhere, has a node of its own.

    Attributes:
        jaxpr: the program.
        consts: its constants.
        axes: the axes of its variables, and of its literals that are arrays, by their id.
        inner: for the number of an equation that calls programs, their nodes; for a `custom_jvp`
            that of the function and that of its derivative.
    """

    jaxpr: Jaxpr
    consts: Sequence[Any]
    axes: dict[Any, Axes]
    inner: dict[int, list["Node"]]

    def of(self, x: Any) -> Axes:
        """Return the axes of a variable, or of a literal."""
        if isinstance(x, Literal):
            return self.axes.setdefault(id(x), fresh_axes(np.shape(x.val)))
        return self.axes[x]

    def outputs(self) -> list[Axes]:
        """Return the axes of the results."""
        return [self.of(x) for x in self.jaxpr.outvars]


@dataclasses.dataclass
class Uses:
    """What the leaves' axes do: (leaves, axis, `produces` or `consumes`)."""

    found: list[tuple[frozenset[int], Axis, str]] = dataclasses.field(default_factory=list)

    def note(self, leaves: frozenset[int], axes: Sequence[Axis], role: str) -> None:
        """Note that the axes of values computed from nothing but some leaves have a role."""
        self.found += [(leaves, axis, role) for axis in axes if leaves]


NO_LEAVES: frozenset[int] = frozenset()
KERNEL_WINDOW = "the window of a convolution"


def fresh_axes(shape: Sequence[int]) -> Axes:
    """Return new axes of a shape."""
    return tuple(fresh(n) for n in shape)


def follow(
    closed: ClosedJaxpr,
    inputs: Sequence[Axes],
    leaves: Sequence[frozenset[int]],
    uses: Uses,
    *,
    derivatives: bool = True,
) -> Node:
    """Return the node of a program.

    Args:
        closed: the program.
        inputs: the axes of its inputs.
        leaves: for every input the leaves that it is computed from, if it is from nothing else.
        uses: where the roles of leaves are noted.
        derivatives: whether to follow the derivatives of `custom_jvp` functions too. They contain
            the function again, so theirs are followed only when they are taken.
    """
    jaxpr = closed.jaxpr
    node = Node(jaxpr, closed.consts, {}, {})
    origins: dict[Var, frozenset[int]] = {}
    consts = [fresh_axes(np.shape(const)) for const in closed.consts]
    node.axes.update(zip(jaxpr.constvars, consts, strict=True))
    for var, axes, origin in zip(jaxpr.invars, inputs, leaves, strict=True):
        node.axes[var], origins[var] = axes, origin
    for i, eqn in enumerate(jaxpr.eqns):
        name = eqn.primitive.name
        ins = [node.of(x) for x in eqn.invars]
        variables = [x for x in eqn.invars if isinstance(x, Var)]
        of_inputs = [
            NO_LEAVES if isinstance(x, Literal) else origins.get(x, NO_LEAVES) for x in eqn.invars
        ]
        if name in _PROGRAMS and not _closes_over_values(eqn):
            inner = _PROGRAMS[name](eqn, ins, of_inputs, uses, derivatives)
            outs, node.inner[i] = inner
        else:
            outs = _rule(name)(eqn, ins)
        _note_uses(eqn, ins, of_inputs, uses)
        only_leaves = variables and all(origins.get(x) for x in variables)
        origin = frozenset[int]().union(*of_inputs) if only_leaves else NO_LEAVES
        for var, axes in zip(eqn.outvars, outs, strict=True):
            node.axes[var], origins[var] = axes, origin
    return node


def derivative(eqn: Any, inputs: Sequence[Axes], outputs: Sequence[Axes]) -> Node:
    """Return the node of the derivative of a `custom_jvp`: of inputs and their tangents."""
    jaxpr, consts, zero = derivative_program(eqn)
    inputs, variables = inputs[eqn.params["num_consts"] :], arguments(eqn)
    inputs = [*inputs, *(a for a, x in zip(inputs, variables, strict=True) if inexact(x))]
    nowhere = [NO_LEAVES] * len(inputs)
    node = follow(ClosedJaxpr(jaxpr, consts), inputs, nowhere, Uses(), derivatives=False)
    tangents = [axes for axes, z in zip(outputs, zero, strict=True) if not z]
    for found, expected in zip(node.outputs(), [*outputs, *tangents], strict=True):
        for a, b in zip(found, expected, strict=True):
            unify(a, b)
    return node


def derivative_program(eqn: Any) -> tuple[Jaxpr, Sequence[Any], Sequence[bool]]:
    """Return the derivative of a `custom_jvp`, its constants, and which tangents are zero."""
    return eqn.params["jvp_jaxpr_fun"].call_wrapped(*(not inexact(x) for x in arguments(eqn)))


def arguments(eqn: Any) -> list[Any]:
    """Return the variables that a `custom_jvp` is differentiated by: all but its constants."""
    return eqn.invars[eqn.params["num_consts"] :]


def inexact(x: Any) -> bool:
    """Tell whether a value has a derivative."""
    return jnp.issubdtype(x.aval.dtype, jnp.inexact)


def _closes_over_values(eqn: Any) -> bool:
    """Tell whether a derivative uses values that are no arguments; JAX cannot take it either."""
    if eqn.primitive.name != "custom_jvp_call":
        return False
    return any(isinstance(const, Tracer) for const in derivative_program(eqn)[1])


def _rule(name: str) -> Callable[[Any, list[Axes]], list[Axes]]:
    if name in ELEMENTWISE:
        return _elementwise
    return _RULES.get(name, _unknown)


def _unknown(eqn: Any, ins: list[Axes]) -> list[Axes]:
    reason = _REASONS.get(eqn.primitive.name, "which is not understood")
    reason = f"goes through {eqn.primitive.name}, {reason}"
    for axis in (axis for axes in ins for axis in axes):
        freeze(axis, reason)
    return [tuple(fresh(n, reason) for n in out.aval.shape) for out in eqn.outvars]


_REASONS = {
    "custom_vjp_call": "whose derivative rule is for its shapes",
    "custom_jvp_call": "whose derivative rule closes over values",
    "while": "a loop that is not followed",
    "cond": "a branch that is not followed",
}


def _elementwise(eqn: Any, ins: list[Axes]) -> list[Axes]:
    shape = eqn.outvars[0].aval.shape
    if any(len(axes) not in (0, len(shape)) for axes in ins):  # a cast to another width
        return _unknown(eqn, ins)
    operands = [
        (axes, x.aval.shape) for axes, x in zip(ins, eqn.invars, strict=True) if len(axes)
    ]  # fmt: skip
    out = []
    for i, n in enumerate(shape):
        axes = [axes[i] for axes, s in operands if s[i] == n]  # others are 1 and broadcast
        for other in axes[1:]:
            unify(axes[0], other)
        out.append(axes[0])
    return [tuple(out)]


def _broadcast_in_dim(eqn: Any, ins: list[Axes]) -> list[Axes]:
    out = list(fresh_axes(eqn.outvars[0].aval.shape))
    shape = eqn.invars[0].aval.shape
    for i, to in enumerate(eqn.params["broadcast_dimensions"]):
        if shape[i] == eqn.outvars[0].aval.shape[to]:
            out[to] = ins[0][i]
    return [tuple(out)]


def _transpose(eqn: Any, ins: list[Axes]) -> list[Axes]:
    return [tuple(ins[0][i] for i in eqn.params["permutation"])]


def _squeeze(eqn: Any, ins: list[Axes]) -> list[Axes]:
    return [tuple(axis for i, axis in enumerate(ins[0]) if i not in eqn.params["dimensions"])]


def _reshape(eqn: Any, ins: list[Axes]) -> list[Axes]:
    return [reshape(ins[0], eqn.outvars[0].aval.shape)]


def _dot_general(eqn: Any, ins: list[Axes]) -> list[Axes]:
    (left_sum, right_sum), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    left, right = ins
    for i, j in zip((*left_sum, *left_batch), (*right_sum, *right_batch), strict=True):
        unify(left[i], right[j])
    used_left, used_right = {*left_sum, *left_batch}, {*right_sum, *right_batch}
    return [
        (
            *(left[i] for i in left_batch),
            *(axis for i, axis in enumerate(left) if i not in used_left),
            *(axis for j, axis in enumerate(right) if j not in used_right),
        )
    ]


def _conv(eqn: Any, ins: list[Axes]) -> list[Axes]:
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    if eqn.params["batch_group_count"] != 1:
        return _unknown(eqn, ins)
    x, kernel = ins
    (batch, features, *space) = numbers.lhs_spec
    (outputs, inputs, *window) = numbers.rhs_spec
    for axis in space:
        freeze(x[axis], "a window slides over it")
    for axis in window:
        freeze(kernel[axis], KERNEL_WINDOW)
    if groups == 1:
        unify(x[features], kernel[inputs])
    else:
        group = fresh(groups)
        unify(x[features], Product((group, kernel[inputs])))
        unify(kernel[outputs], Product((group, fresh(_size(eqn, 1, outputs) // groups))))
    out = [fresh(n, "a window slides over it") for n in eqn.outvars[0].aval.shape]
    out[numbers.out_spec[0]], out[numbers.out_spec[1]] = x[batch], kernel[outputs]
    return [tuple(out)]


def _size(eqn: Any, operand: int, axis: int) -> int:
    return eqn.invars[operand].aval.shape[axis]


def _concatenate(eqn: Any, ins: list[Axes]) -> list[Axes]:
    dimension = eqn.params["dimension"]
    for axes in ins[1:]:
        for i, axis in enumerate(axes):
            if i != dimension:
                unify(ins[0][i], axis)
    joined = Sum(tuple(axes[dimension] for axes in ins))
    return [tuple(joined if i == dimension else axis for i, axis in enumerate(ins[0]))]


def _split(eqn: Any, ins: list[Axes]) -> list[Axes]:
    at = eqn.params["axis"]
    pieces = split(ins[0][at], tuple(map(int, eqn.params["sizes"])))
    return [(*ins[0][:at], piece, *ins[0][at + 1 :]) for piece in pieces]


def _slice(eqn: Any, ins: list[Axes]) -> list[Axes]:
    shape, strides = eqn.invars[0].aval.shape, eqn.params["strides"]
    out = []
    limits = zip(eqn.params["start_indices"], eqn.params["limit_indices"], strict=True)
    for i, (start, limit) in enumerate(limits):
        if strides is not None and strides[i] != 1:
            freeze(ins[0][i], "sliced with a stride")
            out.append(fresh(eqn.outvars[0].aval.shape[i], "sliced with a stride"))
        elif (start, limit) == (0, shape[i]):
            out.append(ins[0][i])
        else:
            out.append(split(ins[0][i], (start, limit - start, shape[i] - limit))[1])
    return [tuple(out)]


def _pad(eqn: Any, ins: list[Axes]) -> list[Axes]:
    out = []
    for axis, (low, high, interior), n in zip(
        ins[0], eqn.params["padding_config"], eqn.outvars[0].aval.shape, strict=True
    ):
        if interior or low < 0 or high < 0:
            freeze(axis, "padded between its indices, or cropped")
            out.append(fresh(n, "padded between its indices, or cropped"))
        else:
            ends = [Sum(()) if not k else fresh(int(k), "padding") for k in (low, high)]
            out.append(Sum((ends[0], axis, ends[1])))
    return [tuple(out)]


def _cut_whole(operand: Axes, shape: Sequence[int], sizes: Sequence[int]) -> list[Axis]:
    """Pass on the axes that a slice takes whole, and freeze the others."""
    out = []
    for axis, n, taken in zip(operand, shape, sizes, strict=True):
        if n != taken:
            freeze(axis, "indexed")
        out.append(axis if n == taken else fresh(taken, "indexed"))
    return out


def _dynamic_slice(eqn: Any, ins: list[Axes]) -> list[Axes]:
    return [tuple(_cut_whole(ins[0], eqn.invars[0].aval.shape, eqn.params["slice_sizes"]))]


def _dynamic_update_slice(eqn: Any, ins: list[Axes]) -> list[Axes]:
    for i, (axis, update) in enumerate(zip(ins[0], ins[1], strict=True)):
        if _size(eqn, 0, i) == _size(eqn, 1, i):
            unify(axis, update)
        else:
            freeze(axis, "indexed")
            freeze(update, "indexed")
    return [ins[0]]


def _gather(eqn: Any, ins: list[Axes]) -> list[Axes]:
    numbers, shape = eqn.params["dimension_numbers"], eqn.outvars[0].aval.shape
    operand, indices = ins
    for axis in indices:
        freeze(axis, "an axis of indices")
    slices = _cut_whole(operand, eqn.invars[0].aval.shape, eqn.params["slice_sizes"])
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    for axis in dropped:
        freeze(operand[axis], "indexed")
    windows = iter([axis for i, axis in enumerate(slices) if i not in dropped])
    batches = iter(indices[:-1])
    return [
        tuple(next(windows if i in numbers.offset_dims else batches) for i in range(len(shape)))
    ]


def _reduce(eqn: Any, ins: list[Axes]) -> list[Axes]:
    axes = eqn.params["axes"]
    if eqn.primitive.name.startswith("arg"):
        for i in axes:
            freeze(ins[0][i], f"indexed by {eqn.primitive.name}")
    return [tuple(axis for i, axis in enumerate(ins[0]) if i not in axes)]


def _same(eqn: Any, ins: list[Axes]) -> list[Axes]:
    return [ins[0]]


def _scatter(eqn: Any, ins: list[Axes]) -> list[Axes]:
    operand, indices, updates = ins
    for axis in indices:
        freeze(axis, "an axis of indices")
    pairs = whole_windows(eqn)
    for i, j in pairs:
        unify(operand[i], updates[j])
    for axes, taken in ((operand, 0), (updates, 1)):
        for i in {*range(len(axes))} - {pair[taken] for pair in pairs}:
            freeze(axes[i], "indexed")
    return [operand]


def whole_windows(eqn: Any) -> list[tuple[int, int]]:
    """Return the axes of a scatter's operand that its updates take in whole, and theirs."""
    numbers = eqn.params["dimension_numbers"]
    dropped = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    kept = [i for i in range(len(eqn.invars[0].aval.shape)) if i not in dropped]
    pairs = zip(kept, numbers.update_window_dims, strict=True)
    return [(i, j) for i, j in pairs if _size(eqn, 0, i) == _size(eqn, 2, j)]


def _top_k(eqn: Any, ins: list[Axes]) -> list[Axes]:
    at, out = eqn.params["axis"], list(ins[0])
    freeze(out[at], "sorted")
    out[at] = fresh(eqn.params["k"], "sorted")
    return [tuple(out), tuple(out)]


def _rev(eqn: Any, ins: list[Axes]) -> list[Axes]:
    for i in eqn.params["dimensions"]:
        freeze(ins[0][i], "reversed")
    return [ins[0]]


def _sort(eqn: Any, ins: list[Axes]) -> list[Axes]:
    freeze(ins[0][eqn.params["dimension"]], "sorted")
    for other in ins[1:]:
        for a, b in zip(ins[0], other, strict=True):
            unify(a, b)
    return [ins[0] for _ in ins]


def _window(eqn: Any, ins: list[Axes]) -> list[Axes]:
    if len(eqn.outvars) != 1:
        return _unknown(eqn, ins)
    params, out = eqn.params, []
    for i, axis in enumerate(ins[0]):
        untouched = params["window_dimensions"][i] == 1 == params["window_strides"][i]
        untouched &= tuple(params["padding"][i]) == (0, 0) and params["base_dilation"][i] == 1
        if not untouched:
            freeze(axis, "a window slides over it")
            axis = fresh(eqn.outvars[0].aval.shape[i], "a window slides over it")
        out.append(axis)
    return [tuple(out)]


def _source(eqn: Any, ins: list[Axes]) -> list[Axes]:
    for axis in (axis for axes in ins for axis in axes):
        freeze(axis, f"a setting of {eqn.primitive.name}")
    return [fresh_axes(out.aval.shape) for out in eqn.outvars]


_RULES: dict[str, Callable[[Any, list[Axes]], list[Axes]]] = {
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
    "rev": _rev,
    "sort": _sort,
    "top_k": _top_k,
    "optimization_barrier": lambda eqn, ins: ins,
    **dict.fromkeys(SCATTERS, _scatter),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(CUMULATIVE, _same),
    **dict.fromkeys(WINDOWS, _window),
    **dict.fromkeys(SOURCES, _source),
}


def _written_out(eqn: Any, *args: Any) -> list[Any]:
    """Do what a primitive does by simpler ones."""
    params = eqn.params
    match eqn.primitive.name:
        case "stack":
            args = tuple(jnp.expand_dims(x, params["axis"]) for x in args)
            return [jax.lax.concatenate(args, params["axis"])]
        case "unstack":
            (x,), at = args, params["axis"]
            return [jnp.squeeze(x, at) for x in jax.lax.split(x, [1] * x.shape[at], at)]
    (x,), shape = args, args[0].shape  # tile
    pairs = [n for pair in zip(params["reps"], shape, strict=True) for n in pair]
    x = jax.lax.broadcast_in_dim(x, pairs, range(1, len(pairs), 2))
    return [jax.lax.reshape(x, [r * n for r, n in zip(params["reps"], shape, strict=True)])]


def closed_call(eqn: Any) -> ClosedJaxpr:
    """Return the program that a call runs."""
    if eqn.primitive.name in WRITTEN_OUT:
        abstract = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in eqn.invars]
        return jax.make_jaxpr(partial(_written_out, eqn))(*abstract)
    jaxpr = eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"]
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def _call(
    eqn: Any, ins: list[Axes], leaves: list[frozenset[int]], uses: Uses, derivatives: bool
) -> tuple[list[Axes], list[Node]]:
    node = follow(closed_call(eqn), ins, leaves, uses, derivatives=derivatives)
    return node.outputs(), [node]


def _custom_jvp(
    eqn: Any, ins: list[Axes], leaves: list[frozenset[int]], uses: Uses, derivatives: bool
) -> tuple[list[Axes], list[Node]]:
    outs, nodes = _call(eqn, ins, leaves, uses, derivatives)
    return outs, [*nodes, derivative(eqn, ins, outs)] if derivatives else nodes


def scan_sizes(eqn: Any) -> tuple[int, int]:
    """Return how many constants and how many carries a scan has.

    Told by the ranks within and outside, since the parameters that say so differ between versions.
    """
    body = eqn.params["jaxpr"]
    body = body.jaxpr if isinstance(body, ClosedJaxpr) else body

    def same(outside: list[Any], within: list[Any]) -> int:
        pairs = zip(outside, within, strict=True)
        return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in pairs)

    carries = same(eqn.outvars, body.outvars)
    return same(eqn.invars, body.invars) - carries, carries


def _scan(
    eqn: Any, ins: list[Axes], leaves: list[frozenset[int]], uses: Uses, derivatives: bool
) -> tuple[list[Axes], list[Node]]:
    consts, carries = scan_sizes(eqn)
    for axes in ins[consts + carries :]:
        freeze(axes[0], "a scan runs over it")
    body_ins = [*ins[: consts + carries], *(axes[1:] for axes in ins[consts + carries :])]
    # What a carry is computed from is known only after the first step.
    leaves = [NO_LEAVES if consts <= i < consts + carries else o for i, o in enumerate(leaves)]
    node = follow(closed_call(eqn), body_ins, leaves, uses, derivatives=derivatives)
    outs = node.outputs()
    for before, after in zip(ins[consts : consts + carries], outs[:carries], strict=True):
        for a, b in zip(before, after, strict=True):
            unify(a, b)
    lead = fresh(eqn.params["length"], "a scan runs over it")
    return [*outs[:carries], *((lead, *axes) for axes in outs[carries:])], [node]


_PROGRAMS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys([*CALLS, *REMAT, *WRITTEN_OUT], _call),
    "custom_jvp_call": _custom_jvp,
    "scan": _scan,
}


def _note_uses(
    eqn: Any, ins: list[Axes], leaves: list[frozenset[int]], uses: Uses
) -> None:  # fmt: skip
    """Note which leaves' axes a contraction takes in, and which it puts out."""
    name = eqn.primitive.name
    if name == "dot_general":
        (left, right), (batch_left, batch_right) = eqn.params["dimension_numbers"]
        both = all(leaves[:2])  # a product of parameters, as of low rank: what is between is made
        for k, (sums, batch) in enumerate(((left, batch_left), (right, batch_right))):
            free = [a for i, a in enumerate(ins[k]) if i not in (*sums, *batch)]
            uses.note(leaves[k], [ins[k][i] for i in sums], "produces" if both and not k
                      else "consumes")  # fmt: skip
            if not both:
                uses.note(leaves[k], [*free, *(ins[k][i] for i in batch)], "produces")
    elif name == "conv_general_dilated":
        outputs, inputs, *_ = eqn.params["dimension_numbers"].rhs_spec
        uses.note(leaves[1], [ins[1][outputs]], "produces")
        uses.note(leaves[1], [ins[1][inputs]], "consumes")
    elif name == "gather":
        dropped = eqn.params["dimension_numbers"].collapsed_slice_dims
        kept = [axis for i, axis in enumerate(ins[0]) if i not in dropped]
        uses.note(leaves[0], kept, "produces")
