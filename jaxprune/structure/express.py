"""Run a traced program at the sizes that are left once units are removed.

A node of `trace`, the units kept of every atom, and arrays of the new shapes come in. Primitives
are bound anew; only the parameters of theirs that carry shapes are computed again.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from jaxprune.structure import axes as ax
from jaxprune.structure import trace
from jaxprune.structure.axes import Atom, Axes
from jaxprune.structure.trace import Node

Keep = dict[Atom, np.ndarray]
"""For the atoms that lose units: which units are kept, bool."""


def evaluate(node: Node, keep: Keep, args: Sequence[Any]) -> list[Any]:
    """Return the results of a program at the kept sizes.

    Args:
        node: the program, traced at the full sizes.
        keep: the units kept.
        args: its inputs at the kept sizes.
    """
    env: dict[Any, Any] = {}
    for var, const in zip(node.jaxpr.constvars, node.consts, strict=True):
        env[var] = take(const, node.axes[var], keep)
    env.update(zip(node.jaxpr.invars, args, strict=True))

    def read(x: Any) -> Any:
        return take(x.val, node.of(x), keep) if isinstance(x, Literal) else env[x]

    for i, eqn in enumerate(node.jaxpr.eqns):
        values = [read(x) for x in eqn.invars]
        call = _Call(eqn, i, node, keep)
        if not call.shrinks:
            outs = bind(eqn, values, eqn.params)
        elif i in node.inner:
            outs = _PROGRAMS.get(eqn.primitive.name, _inline)(call, values)
        else:
            outs = bind(eqn, values, call.params(values))
            if eqn.primitive.name in trace.SOURCES:
                outs = [take(out, node.of(x), keep)
                        for out, x in zip(outs, eqn.outvars, strict=True)]  # fmt: skip
        for var, out in zip(eqn.outvars, outs, strict=True):
            if jnp.shape(out) != (shape := kept_shape(node.of(var), keep)):
                raise RuntimeError(
                    f"{eqn.primitive.name} gives shape {jnp.shape(out)} at the kept sizes, "
                    f"expected {shape}; please report this"
                )
            env[var] = out
    return [read(x) for x in node.jaxpr.outvars]


def take(value: Any, axes: Axes, keep: Keep) -> Any:
    """Return what is left of an array; by NumPy where it is one."""
    for i, axis in enumerate(axes):
        positions = ax.kept(axis, keep)
        if positions is not None:
            xp = np if isinstance(value, np.ndarray) else jnp
            value = xp.take(value, np.flatnonzero(positions), axis=i)
    return value


def kept_shape(axes: Axes, keep: Keep) -> tuple[int, ...]:
    """Return the shape that is left."""
    return tuple(_kept_size(axis, keep) for axis in axes)


def _kept_size(axis: ax.Axis, keep: Keep) -> int:
    positions = ax.kept(axis, keep)
    return ax.size(axis) if positions is None else int(np.count_nonzero(positions))


def constant_atoms(node: Node) -> list[Atom]:
    """Return the atoms of what a program has besides its inputs, in order."""
    axes = [node.axes[var] for var in node.jaxpr.constvars]
    for eqn in node.jaxpr.eqns:
        axes += [node.of(x) for x in eqn.invars if isinstance(x, Literal)]
        if eqn.primitive.name in trace.SOURCES:
            axes += [node.of(x) for x in eqn.outvars]
    found = [atom for one in axes for axis in one for atom in ax.atoms(axis)]
    for inner in node.inner.values():
        found += [atom for one in inner for atom in constant_atoms(one)]
    return found


def bind(eqn: Any, values: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Return the results of an equation's primitive, with these parameters in place of its own."""
    outs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(params))
    return list(outs) if eqn.primitive.multiple_results else [outs]


class _Call(NamedTuple):
    """An equation of a node at the kept sizes."""

    eqn: Any
    number: int
    node: Node
    keep: Keep

    @property
    def shrinks(self) -> bool:
        """Whether any operand or result loses units."""
        return any(
            atom in self.keep
            for x in (*self.eqn.invars, *self.eqn.outvars)
            for axis in self.node.of(x)
            for atom in ax.atoms(axis)
        )

    @property
    def inner(self) -> Node:
        return self.node.inner[self.number][0]

    def shape(self, out: int = 0) -> tuple[int, ...]:
        return kept_shape(self.node.of(self.eqn.outvars[out]), self.keep)

    def before(self, operand: int, axis: int, stop: int) -> int:
        """Return how many positions before `stop` are kept of an operand's axis."""
        positions = ax.kept(self.node.of(self.eqn.invars[operand])[axis], self.keep)
        return stop if positions is None else int(np.count_nonzero(positions[:stop]))

    def params(self, values: list[Any]) -> dict[str, Any]:
        rule = _PARAMS.get(self.eqn.primitive.name)
        return self.eqn.params | rule(self, values) if rule else self.eqn.params


def _slice(call: _Call, values: list[Any]) -> dict[str, Any]:
    return {
        name: tuple(call.before(0, i, at) for i, at in enumerate(call.eqn.params[name]))
        for name in ("start_indices", "limit_indices")
    }


def _slice_sizes(call: _Call, values: list[Any]) -> dict[str, Any]:
    # Axes that lose units are taken whole.
    full = call.eqn.invars[0].aval.shape
    sizes = zip(call.eqn.params["slice_sizes"], full, jnp.shape(values[0]), strict=True)
    return {"slice_sizes": tuple(new if taken == old else taken for taken, old, new in sizes)}


def _groups(call: _Call, values: list[Any]) -> dict[str, Any]:
    numbers = call.eqn.params["dimension_numbers"]
    features = jnp.shape(values[0])[numbers.lhs_spec[1]]
    return {"feature_group_count": features // jnp.shape(values[1])[numbers.rhs_spec[1]]}


_PARAMS: dict[str, Callable[[_Call, list[Any]], dict[str, Any]]] = {
    "broadcast_in_dim": lambda call, values: {"shape": call.shape()},
    "reshape": lambda call, values: {"new_sizes": call.shape()},
    "split": lambda call, values: {
        "sizes": tuple(call.shape(k)[call.eqn.params["axis"]] for k in range(len(call.eqn.outvars)))
    },
    "slice": _slice,
    "dynamic_slice": _slice_sizes,
    "gather": _slice_sizes,
    "conv_general_dilated": _groups,
}


def _inline(call: _Call, values: list[Any]) -> list[Any]:
    return evaluate(call.inner, call.keep, values)


def _remat(call: _Call, values: list[Any]) -> list[Any]:
    params = call.eqn.params

    def run(*args: Any) -> list[Any]:
        return evaluate(call.inner, call.keep, args)

    return jax.checkpoint(run, policy=params["policy"], prevent_cse=params["prevent_cse"])(*values)


def _scan(call: _Call, values: list[Any]) -> list[Any]:
    params = call.eqn.params
    consts, carries = trace.scan_sizes(call.eqn)

    def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = evaluate(call.inner, call.keep, [*values[:consts], *carry, *x])
        return outs[:carries], outs[carries:]

    carry, stacked = jax.lax.scan(
        body,
        values[consts : consts + carries],
        values[consts + carries :],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *stacked]


def _custom_jvp(call: _Call, values: list[Any]) -> list[Any]:
    """Carry a function with its own derivative: relu'(0) is to stay 0."""
    eqn, node, keep = call.eqn, call.node, call.keep

    @jax.custom_jvp
    def run(*args: Any) -> list[Any]:
        return evaluate(call.inner, keep, args)

    @run.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:
        rules = node.inner[call.number]
        if len(rules) == 1:
            ins = [node.of(x) for x in eqn.invars]
            rules.append(trace.derivative(eqn, ins, rules[0].outputs()))
        _, _, zero = trace.derivative_program(eqn)
        consts = eqn.params["num_consts"]
        variables = zip(tangents[consts:], trace.arguments(eqn), strict=True)
        used = [t for t, x in variables if trace.inexact(x)]
        outs = evaluate(rules[1], keep, [*primals[consts:], *used])
        found, given = outs[: len(zero)], iter(outs[len(zero) :])
        return found, [
            _no_tangent(out) if z else next(given) for out, z in zip(found, zero, strict=True)
        ]

    return list(run(*values))


def _no_tangent(out: Any) -> Any:
    if jnp.issubdtype(jnp.asarray(out).dtype, jnp.inexact):
        return jnp.zeros_like(out)
    return np.zeros(jnp.shape(out), jax.dtypes.float0)


_PROGRAMS: dict[str, Callable[[_Call, list[Any]], list[Any]]] = {
    "scan": _scan,
    "custom_jvp_call": _custom_jvp,
    **dict.fromkeys(trace.REMAT, _remat),
}
