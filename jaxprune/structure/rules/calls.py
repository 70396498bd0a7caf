"""Primitives that run programs: calls, derivatives of one's own, loops.

The same three readings as in `base.Rule`, of a primitive that has programs within; each is given
the function that reads such a program.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxprune.structure import axes as ax
from jaxprune.structure.axes import Axes
from jaxprune.structure.facts import Facts, meet, zeros_at
from jaxprune.structure.rules.base import Resized

_WRITTEN_OUT = ("stack", "unstack", "tile")  # followed as the simpler ones they stand for


class Caller(NamedTuple):
    """What a primitive does that runs programs.

    Attributes:
        axes: of an equation, the axes of its operands, how a program is followed (of a closed jaxpr
            and axes: its node), and whether derivatives are: the axes of its results, and nodes.
        facts: of an equation, its nodes, the facts of its operands, and how a node is interpreted;
            what positions have in common is not told across programs.
        evaluate: of a `Resized`, the nodes, the operands at the kept sizes, how a node is run, and
            how a program is followed: its results.
    """

    axes: Callable[..., tuple[list[Axes], tuple[Any, ...]]]
    facts: Callable[..., list[Facts]]
    evaluate: Callable[..., list[Any]]


def closed_call(eqn: Any) -> ClosedJaxpr:
    """Return the program that a call runs."""
    if eqn.primitive.name in _WRITTEN_OUT:
        abstract = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in eqn.invars]
        return jax.make_jaxpr(partial(_written_out, eqn))(*abstract)
    jaxpr = eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"]
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def called(eqn: Any) -> ClosedJaxpr | None:
    """Return the program that an equation runs on all its operands as they are, or None."""
    if eqn.primitive.name in _WRITTEN_OUT:
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


def _call(
    eqn: Any, ins: Sequence[Axes], follow: Any, derivatives: bool
) -> tuple[list[Axes], tuple[Any, ...]]:
    node = follow(closed_call(eqn), ins, derivatives=derivatives)
    return list(node.outputs), (node,)


def _call_facts(eqn: Any, nodes: Any, ins: Sequence[Facts], run: Any) -> list[Facts]:
    return run(nodes[0], ins)


def _inline(
    call: Resized, nodes: Any, values: Sequence[Any], run: Any, follow: Any
) -> list[Any]:  # fmt: skip
    return run(nodes[0], values)


def _remat(
    call: Resized, nodes: Any, values: Sequence[Any], run: Any, follow: Any
) -> list[Any]:  # fmt: skip
    options = {name: call.eqn.params[name] for name in ("policy", "prevent_cse")}
    return jax.checkpoint(lambda *args: run(nodes[0], args), **options)(*values)


# A function with its own derivative ----------------------------------------------------------


def closes_over_values(eqn: Any) -> bool:
    """Tell whether a derivative uses values that are no arguments; JAX cannot take it either."""
    if eqn.primitive.name != "custom_jvp_call":
        return False
    return any(isinstance(const, Tracer) for const in _derivative_program(eqn)[1])


def _derivative_program(eqn: Any) -> tuple[Jaxpr, Sequence[Any], Sequence[bool]]:
    """Return the derivative of a `custom_jvp`, its constants, and which tangents are zero."""
    return eqn.params["jvp_jaxpr_fun"].call_wrapped(*(not _inexact(x) for x in _arguments(eqn)))


def _arguments(eqn: Any) -> list[Any]:
    """Return the variables that a `custom_jvp` is differentiated by: all but its constants."""
    return eqn.invars[eqn.params["num_consts"] :]


def _inexact(x: Any) -> bool:
    return jnp.issubdtype(x.aval.dtype, jnp.inexact)


def _derivative(eqn: Any, ins: Sequence[Axes], outs: Sequence[Axes], follow: Any) -> Any:
    """Return the node of the derivative of a `custom_jvp`: of inputs and their tangents."""
    jaxpr, consts, zero = _derivative_program(eqn)
    ins, variables = ins[eqn.params["num_consts"] :], _arguments(eqn)
    ins = [*ins, *(axes for axes, x in zip(ins, variables, strict=True) if _inexact(x))]
    # It contains the function again, whose own derivative is followed only when it is taken.
    node = follow(ClosedJaxpr(jaxpr, consts), ins, derivatives=False)
    tangents = [axes for axes, z in zip(outs, zero, strict=True) if not z]
    for found, expected in zip(node.outputs, [*outs, *tangents], strict=True):
        for a, b in zip(found, expected, strict=True):
            ax.unify(a, b)
    return node


def _jvp(
    eqn: Any, ins: Sequence[Axes], follow: Any, derivatives: bool
) -> tuple[list[Axes], tuple[Any, ...]]:
    outs, nodes = _call(eqn, ins, follow, derivatives)
    return outs, (*nodes, _derivative(eqn, ins, outs, follow)) if derivatives else nodes


def _jvp_facts(eqn: Any, nodes: Any, ins: Sequence[Facts], run: Any) -> list[Facts]:
    outs = run(nodes[0], ins)
    if len(nodes) == 1:
        return outs
    args = ins[eqn.params["num_consts"] :]  # what is constant has a tangent of zero
    tangents = [
        _tangent(facts, x.aval.dtype)
        for facts, x in zip(args, _arguments(eqn), strict=True)
        if _inexact(x)
    ]
    moving = iter(run(nodes[1], [*args, *tangents])[len(outs) :])
    zero = _derivative_program(eqn)[2]
    # A rule of its own may give what is constant a tangent all the same.
    return [out if z else _at_rest(out, next(moving), x.aval.shape)
            for out, z, x in zip(outs, zero, eqn.outvars, strict=True)]  # fmt: skip


def _at_rest(facts: Facts, tangent: Facts, shape: tuple[int, ...]) -> Facts:
    along = [(facts.along(i, n), tangent.equals(i, n)) for i, n in enumerate(shape)]
    found = tuple(None if k is None else (k[0] & still, k[1]) for k, still in along)
    still = tangent.whole is not None and tangent.whole == 0
    return Facts(found, facts.whole if still else None)


def _tangent(facts: Facts, dtype: Any) -> Facts:
    axes = zeros_at([None if k is None else k[0] for k in facts.axes], dtype).axes
    return Facts(axes, None if facts.whole is None else np.zeros((), dtype)[()])


def _run_jvp(
    call: Resized, nodes: Any, values: Sequence[Any], run: Any, follow: Any
) -> list[Any]:  # fmt: skip
    """Carry a function with its own derivative: relu'(0) is to stay 0."""
    eqn = call.eqn

    @jax.custom_jvp
    def primal(*args: Any) -> list[Any]:
        return run(nodes[0], args)

    @primal.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:
        known = nodes[1:] or (_derivative(eqn, call.operands, nodes[0].outputs, follow),)
        _, _, zero = _derivative_program(eqn)
        consts = eqn.params["num_consts"]
        variables = zip(tangents[consts:], _arguments(eqn), strict=True)
        used = [t for t, x in variables if _inexact(x)]
        outs = run(known[0], [*primals[consts:], *used])
        found, given = outs[: len(zero)], iter(outs[len(zero) :])
        return found, [
            _no_tangent(out) if z else next(given) for out, z in zip(found, zero, strict=True)
        ]

    return list(primal(*values))


def _no_tangent(out: Any) -> Any:
    if jnp.issubdtype(jnp.asarray(out).dtype, jnp.inexact):
        return jnp.zeros_like(out)
    return np.zeros(jnp.shape(out), jax.dtypes.float0)


# Loops over steps ----------------------------------------------------------------------------


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
    eqn: Any, ins: Sequence[Axes], follow: Any, derivatives: bool
) -> tuple[list[Axes], tuple[Any, ...]]:
    consts, carries = scan_sizes(eqn)
    for axes in ins[consts + carries :]:
        ax.freeze(axes[0], "a scan runs over it")
    body_ins = [*ins[: consts + carries], *(axes[1:] for axes in ins[consts + carries :])]
    node = follow(closed_call(eqn), body_ins, derivatives=derivatives)
    outs = node.outputs
    for before, after in zip(ins[consts : consts + carries], outs[:carries], strict=True):
        for a, b in zip(before, after, strict=True):
            ax.unify(a, b)
    lead = ax.fresh(eqn.params["length"], "a scan runs over it")
    return [*outs[:carries], *((lead, *axes) for axes in outs[carries:])], (node,)


def _scan_facts(eqn: Any, nodes: Any, ins: Sequence[Facts], run: Any) -> list[Facts]:
    consts, carries = scan_sizes(eqn)
    shapes = [x.aval.shape for x in nodes[0].jaxpr.invars]
    carry = ins[consts : consts + carries]
    steps = [Facts(facts.axes[1:], facts.whole) for facts in ins[consts + carries :]]
    while True:  # less is known of the carry from step to step, until it stays
        outs = run(nodes[0], [*ins[:consts], *carry, *steps])
        after = [meet(a, b, s) for a, b, s in zip(carry, outs, shapes[consts:], strict=False)]
        if all(_as_much(a, b) for a, b in zip(carry, after, strict=True)):
            break
        carry = after
    return [*after, *(Facts((None, *facts.axes), facts.whole) for facts in outs[carries:])]


def _as_much(before: Facts, after: Facts) -> bool:
    return (before.whole is None) == (after.whole is None) and all(
        (np.count_nonzero(b[0]) if b else 0) == (np.count_nonzero(a[0]) if a else 0)
        for b, a in zip(before.axes, after.axes, strict=True)
    )


def _run_scan(
    call: Resized, nodes: Any, values: Sequence[Any], run: Any, follow: Any
) -> list[Any]:  # fmt: skip
    consts, carries = scan_sizes(call.eqn)

    def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = run(nodes[0], [*values[:consts], *carry, *x])
        return outs[:carries], outs[carries:]

    first, steps = [*values[consts : consts + carries]], [*values[consts + carries :]]
    options = {name: call.eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, stacked = jax.lax.scan(body, first, steps, **options)
    return [*carry, *stacked]


CALLERS: dict[str, Caller] = {
    **dict.fromkeys(
        ["jit", "pjit", "closed_call", "core_call", *_WRITTEN_OUT],
        Caller(_call, _call_facts, _inline),
    ),
    **dict.fromkeys(["checkpoint", "remat", "remat2"], Caller(_call, _call_facts, _remat)),
    "custom_jvp_call": Caller(_jvp, _jvp_facts, _run_jvp),
    "scan": Caller(_scan, _scan_facts, _run_scan),
}
