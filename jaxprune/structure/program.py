"""A traced network: its equations, the axes of all values, and three ways to read it.

`trace_program` makes a `Program`, which nothing changes. `interpret` tells what is known of its
values, `evaluate` runs it at the sizes that are left; what a primitive does stands in `rules`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxprune import trees
from jaxprune.structure import axes as ax
from jaxprune.structure.axes import Atom, Axes
from jaxprune.structure.facts import Facts, Place, Share, Shares, Sites, constant, nothing
from jaxprune.structure.rules import caller_of, rule_of
from jaxprune.structure.rules.base import Call, Keep, Resized
from jaxprune.types import Apply, Params


def walk(
    jaxpr: Any,
    consts: Sequence[Any],
    args: Sequence[Any],
    step: Callable[[int, Any, list[Any]], Sequence[Any]],
    literal: Callable[[Any], Any] = lambda value: value,
) -> list[Any]:
    """Run a program on anything, such as axes, facts or arrays, and return its results.

    Args:
        jaxpr: the program.
        consts: what stands for its constants.
        args: what stands for its inputs.
        step: gives the results of an equation, of its number, itself, and its operands.
        literal: gives what stands for a literal, of its value.
    """
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(x: Any) -> Any:
        return literal(x.val) if isinstance(x, Literal) else env[x]

    for i, eqn in enumerate(jaxpr.eqns):
        env.update(zip(eqn.outvars, step(i, eqn, [*map(read, eqn.invars)]), strict=True))
    return [*map(read, jaxpr.outvars)]


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One call of a program, with the axes of its values; called elsewhere, it has another node.

    Attributes:
        jaxpr: the program.
        consts: its constants.
        const_axes: their axes.
        operands: of every equation, the axes of its operands.
        results: of every equation, the axes of its results.
        outputs: the axes of the program's results.
        inner: for the number of an equation that runs programs, their nodes; for a `custom_jvp`
            that of the function and that of its derivative.
    """

    jaxpr: Jaxpr
    consts: Sequence[Any]
    const_axes: list[Axes]
    operands: list[tuple[Axes, ...]]
    results: list[tuple[Axes, ...]]
    outputs: list[Axes]
    inner: dict[int, "tuple[Node, ...]"]

    def settled(self) -> "Node":
        """Return the node with all axes as what they turned out to be."""
        return dataclasses.replace(
            self,
            const_axes=[*map(ax.settle, self.const_axes)],
            operands=[tuple(map(ax.settle, each)) for each in self.operands],
            results=[tuple(map(ax.settle, each)) for each in self.results],
            outputs=[*map(ax.settle, self.outputs)],
            inner={i: tuple(n.settled() for n in nodes) for i, nodes in self.inner.items()},
        )


def follow(closed: ClosedJaxpr, inputs: Sequence[Axes], *, derivatives: bool = True) -> Node:
    """Return the node of a program: make axes one that must shrink together.

    Args:
        closed: the program.
        inputs: the axes of its inputs.
        derivatives: whether to follow the derivatives of `custom_jvp` functions too.
    """
    operands, results, inner = [], [], {}

    def step(i: int, eqn: Any, ins: list[Axes]) -> list[Axes]:
        if (caller := caller_of(eqn)) is not None:
            outs, inner[i] = caller.axes(eqn, ins, follow, derivatives)
        else:
            outs = rule_of(eqn).axes(eqn, ins, ax)
        operands.append(tuple(ins))
        results.append(tuple(outs))
        return outs

    consts = [_fresh(np.shape(const)) for const in closed.consts]
    outputs = walk(closed.jaxpr, consts, inputs, step, lambda value: _fresh(np.shape(value)))
    return Node(closed.jaxpr, closed.consts, consts, operands, results, outputs, inner)


def _fresh(shape: Sequence[int], reason: str | None = None) -> Axes:
    return tuple(ax.fresh(n, reason) for n in shape)


def interpret(node: Node, inputs: Sequence[Facts], sites: Sites, at: Place = ()) -> list[Facts]:
    """Return what is known of a program's results, and fill in its sites."""

    def step(i: int, eqn: Any, ins: list[Facts]) -> list[Facts]:
        place = (*at, i)
        sites.shares.pop(place, None)  # of an earlier step of a scan
        if i not in node.inner:
            return rule_of(eqn).facts(Call(eqn, node.operands[i], place, sites), ins)
        caller = caller_of(eqn)
        assert caller is not None

        def run(inner: Node, facts: Sequence[Facts]) -> list[Facts]:
            return interpret(inner, facts, sites, (*place, node.inner[i].index(inner)))

        outs = caller.facts(eqn, node.inner[i], [facts._replace(alike={}) for facts in ins], run)
        return [facts._replace(alike={}) for facts in outs]

    return walk(node.jaxpr, [*map(constant, node.consts)], inputs, step, constant)


def evaluate(
    node: Node, keep: Keep, args: Sequence[Any], shares: Shares | None = None, at: Place = ()
) -> list[Any]:
    """Return the results of a program at the kept sizes.

    Args:
        node: the program, traced at the full sizes.
        keep: the units kept.
        args: its inputs at the kept sizes.
        shares: where the value that removed positions share is needed, as `Sites` tells.
        at: the place of the equation that runs it.
    """
    shares, beside = shares or {}, {}  # by variable and axis, what removed positions share

    def cut(xs: Sequence[Any], values: Sequence[Any], axes: Sequence[Axes]) -> list[Any]:
        return [take(value, each, keep) if isinstance(x, Literal) else value
                for x, value, each in zip(xs, values, axes, strict=True)]  # fmt: skip

    def step(i: int, eqn: Any, values: list[Any]) -> list[Any]:
        values, place = cut(eqn.invars, values, node.operands[i]), (*at, i)
        call = Resized(eqn, node.operands[i], node.results[i], keep, shares.get(place, {}))
        if not call.shrinks:
            outs = bind(eqn, values, eqn.params)
        elif i in node.inner:
            caller = caller_of(eqn)
            assert caller is not None

            def run(inner: Node, args: Sequence[Any]) -> list[Any]:
                known = inner in node.inner[i]
                within = (*place, node.inner[i].index(inner)) if known else ()
                return evaluate(inner, keep, args, shares if known else {}, within)

            outs = caller.evaluate(call, node.inner[i], values, run, follow)
        else:
            rule = rule_of(eqn)
            outs = bind(eqn, values, eqn.params | (rule.sizes(call, values) if rule.sizes else {}))
            if rule.whole:
                outs = [take(*each, keep) for each in zip(outs, call.results, strict=True)]
            own = call.operands[0] if rule.complete else call.results[0]
            for axis, each in call.shares.items():
                if ax.kept(own[axis], keep) is None:
                    continue
                found = [_shared(axis, *of, beside)
                         for of in zip(eqn.invars, values, each, strict=True)]  # fmt: skip
                one = bind(eqn, found, eqn.params)
                if rule.complete is not None:
                    outs = rule.complete(call, outs, axis, one)
                else:
                    beside[eqn.outvars[0], axis] = one[0]
        for k, out in enumerate(outs):
            if jnp.shape(out) != (shape := call.shape(k)):
                raise RuntimeError(
                    f"{eqn.primitive.name} gives shape {jnp.shape(out)} at the kept sizes, "
                    f"expected {shape}; please report this"
                )
        return outs

    consts = [take(*each, keep) for each in zip(node.consts, node.const_axes, strict=True)]
    return cut(node.jaxpr.outvars, walk(node.jaxpr, consts, args, step), node.outputs)


def _shared(axis: int, x: Any, value: Any, share: Share, beside: dict[Any, Any]) -> Any:
    """Return the value that positions along an axis share, as an array of one position there."""
    if share.carried:
        return beside[x, axis]
    if share.constant is None or jnp.ndim(value) == 0:
        return value
    return jnp.full_like(jax.lax.slice_in_dim(value, 0, 1, axis=axis), share.constant)


def take(value: Any, axes: Axes, keep: Keep) -> Any:
    """Return what is left of an array; by NumPy where it is one."""
    for i, axis in enumerate(axes):
        positions = ax.kept(axis, keep)
        if positions is not None:
            xp = np if isinstance(value, np.ndarray) else jnp
            value = xp.take(value, np.flatnonzero(positions), axis=i)
    return value


def bind(eqn: Any, values: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Return the results of an equation's primitive, with these parameters in place of its own."""
    outs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(params))
    return list(outs) if eqn.primitive.multiple_results else [outs]


def constant_atoms(node: Node) -> list[Atom]:
    """Return the atoms of what a program has besides its inputs, in order."""
    axes = [*node.const_axes]
    for eqn, operands, results in zip(node.jaxpr.eqns, node.operands, node.results, strict=True):
        axes += [a for x, a in zip(eqn.invars, operands, strict=True) if isinstance(x, Literal)]
        axes += results if rule_of(eqn).whole else ()
    found = [atom for one in axes for axis in one for atom in ax.atoms(axis)]
    for inner in node.inner.values():
        found += [atom for one in inner for atom in constant_atoms(one)]
    return found


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced network.

    Attributes:
        node: the program with its axes.
        paths: of the leaves of the parameters.
        leaves: their shapes and dtypes.
        axes: their axes.
        out_tree: the structure of what it returns.
    """

    node: Node
    paths: list[str]
    leaves: list[jax.ShapeDtypeStruct]
    axes: list[Axes]
    out_tree: Any

    def interpret(self, leaves: list[Facts], foldable: dict[Place, int] | None = None) -> Sites:
        """Return what is seen at the sites, from what is known of the leaves."""
        rest: list[Any] = self.node.jaxpr.invars[len(leaves) :]
        sites = Sites(foldable)
        interpret(self.node, [*leaves, *(nothing(len(x.aval.shape)) for x in rest)], sites)
        return sites

    def occurrences(self) -> Iterator[tuple[int, int, Atom, np.ndarray]]:
        """Yield leaf, axis, atom and the atom's index at each position of the axis."""
        for leaf, axes in enumerate(self.axes):
            for i, axis in enumerate(axes):
                for atom, index in ax.units(axis):
                    yield leaf, i, atom, index


State = Callable[[Any], Any] | None
"""Of what a network returns, the new values of leaves of the parameters, with their paths."""


def trace(apply: Apply, params: Params, x: Any) -> tuple[ClosedJaxpr, Any, Any]:
    """Return a network as equations, the shapes of its arguments, and those of its results.

    Raises:
        TypeError: a leaf of `params` is no array, as the functions in an Equinox module are.
    """
    for path, leaf in trees.paths_and_leaves(params):
        if callable(leaf) or isinstance(leaf, str):
            raise TypeError(
                f"leaf {path!r} of params is no array, but {leaf!r:.60}; of an Equinox module take "
                "eqx.partition(model, eqx.is_array), and eqx.combine within apply"
            )
    abstract = jax.eval_shape(lambda *args: args, params, x)
    closed, shape = jax.make_jaxpr(apply, return_shape=True)(*abstract)
    return ClosedJaxpr(closed.jaxpr, closed.consts), abstract, shape


def trace_program(apply: Apply, params: Params, x: Any, state: State = None) -> Program:
    """Trace a network and follow its axes."""
    closed, abstract, shape = trace(apply, params, x)
    paths = [path for path, _ in trees.paths_and_leaves(params)]
    leaves = jax.tree.leaves(abstract[0])
    if twice := [path for i, path in enumerate(paths) if path in paths[:i]]:
        raise ValueError(f"two leaves of params have the path {twice[0]!r}: rename a key with a /")
    inputs = [_fresh(leaf.shape) for leaf in leaves]
    others = [_fresh(leaf.shape, "it is an axis of the input")
              for leaf in jax.tree.leaves(abstract[1])]  # fmt: skip
    node = follow(closed, [*inputs, *others])
    out_tree = jax.tree.structure(shape)
    outputs = jax.tree.unflatten(out_tree, range(len(node.outputs)))
    carried = {i: path for path, i in trees.paths_and_leaves(state(outputs))} if state else {}
    names = [f" {path!r}" if path else "" for path, _ in trees.paths_and_leaves(shape)]
    for i, (name, axes) in enumerate(zip(names, node.outputs, strict=True)):
        if i in carried:
            for a, b in zip(axes, _leaf_of(carried[i], axes, paths, inputs), strict=True):
                ax.unify(a, b)
        for axis in () if i in carried else axes:
            ax.freeze(axis, f"it reaches the network's output{name}")
    return Program(node.settled(), paths, leaves, [*map(ax.settle, inputs)], out_tree)


def _leaf_of(path: str, axes: Axes, paths: list[str], inputs: Sequence[Axes]) -> Axes:
    """Return the axes of the leaf that a result is the new value of."""
    sizes = tuple(map(ax.size, axes))
    if path not in paths or tuple(map(ax.size, inputs[paths.index(path)])) != sizes:
        raise ValueError(f"state has a leaf {path!r} of shape {sizes}, and params has none")
    return inputs[paths.index(path)]
