"""A network as one list of simple equations, run piece by piece.

Any `apply(params, x)` comes in. Whoever changes one layer after the other takes what a piece gives,
so that nothing is computed twice.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Literal, Var

from jaxprune.structure.program import bind, trace, walk
from jaxprune.structure.rules.calls import called
from jaxprune.structure.sources import Product, read
from jaxprune.types import Apply, Params

_INLINED = frozenset(
    "jit pjit closed_call core_call custom_jvp_call custom_vjp_call checkpoint remat remat2".split()
)


class Flat(NamedTuple):
    """A network as a list of simple equations.

    Attributes:
        closed: with calls written out, and without derivative rules.
        leaves: how many of its inputs are parameters.
        products: with weights, by the number of their equation; none within loops.
        taken: how often a leaf is taken in by anything, by number.
        fixed: the variables that do not depend on the inputs.
        out_tree: the structure of what it returns.
    """

    closed: ClosedJaxpr
    leaves: int
    products: dict[int, Product]
    taken: Mapping[Any, int]
    fixed: frozenset[Any]
    out_tree: Any

    @classmethod
    def of(cls, apply: Apply, params: Params, x: Any) -> "Flat":
        """Trace a network."""
        closed, abstract, shape = trace(apply, params, x)
        leaves = jax.tree.leaves(abstract[0])
        inputs = [*leaves, *jax.tree.leaves(abstract[1])]
        made = jax.make_jaxpr(lambda *args: inline(closed, args))(*inputs)
        flat = ClosedJaxpr(made.jaxpr, made.consts)
        fixed = {*flat.jaxpr.constvars, *flat.jaxpr.invars[: len(leaves)]}
        for eqn in flat.jaxpr.eqns:
            if not eqn.effects and fixed.issuperset(v for v in eqn.invars if isinstance(v, Var)):
                fixed.update(eqn.outvars)
        found = read(flat, [leaf.ndim for leaf in leaves])
        products = {at[0]: product for at, product in found.products.items() if len(at) == 1}
        out_tree = jax.tree.structure(shape)
        return cls(flat, len(leaves), products, found.taken, frozenset(fixed), out_tree)

    def inputs(self, x: Any) -> dict[Any, Any]:
        """Return the values from which the network is run, of `x`."""
        return dict(zip(self.closed.jaxpr.invars[self.leaves :], jax.tree.leaves(x), strict=True))

    def piece(
        self, start: int, wanted: Sequence[Any]
    ) -> tuple[list[Any], Callable[[Sequence[Any], Sequence[Any]], list[Any]]]:
        """Return how to come by the values of some variables.

        Args:
            start: the number of the first equation that may be run, of those that depend on the
                inputs; all others are run whenever they are needed.
            wanted: the variables.

        Returns:
            The variables before `start` that are needed, and a function of the leaves of the
            parameters and of the values of these.
        """
        jaxpr, needed, steps = self.closed.jaxpr, {*wanted}, []
        for i in reversed(range(len(jaxpr.eqns))):
            eqn = jaxpr.eqns[i]
            made = needed.intersection(eqn.outvars)
            if made and (i >= start or self.fixed.issuperset(made)):
                steps.append(eqn)
                needed |= {v for v in eqn.invars if isinstance(v, Var)}
        done = {v for eqn in steps for v in eqn.outvars}
        given = sorted(needed - done - self.fixed, key=self._order().__getitem__)

        def run(leaves: Sequence[Any], values: Sequence[Any]) -> list[Any]:
            env = dict(zip(jaxpr.constvars, self.closed.consts, strict=True))
            env |= zip(jaxpr.invars[: self.leaves], leaves, strict=True)
            env |= zip(given, values, strict=True)
            for eqn in reversed(steps):
                ins = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
                env.update(zip(eqn.outvars, bind(eqn, ins, eqn.params), strict=True))
            return [env[v] for v in wanted]

        return given, run

    def live(self, at: int) -> list[Any]:
        """Return what depends on the inputs, is there before an equation, and is needed then."""
        jaxpr, order = self.closed.jaxpr, self._order()
        later = {v for eqn in jaxpr.eqns[at:] for v in eqn.invars if isinstance(v, Var)}
        later |= {v for v in jaxpr.outvars if isinstance(v, Var)}
        before = {*jaxpr.invars[self.leaves :]}
        before |= {v for eqn in jaxpr.eqns[:at] for v in eqn.outvars}
        return sorted((later & before) - self.fixed, key=order.__getitem__)

    def _order(self) -> dict[Any, int]:
        jaxpr = self.closed.jaxpr
        made = [*jaxpr.constvars, *jaxpr.invars, *(v for eqn in jaxpr.eqns for v in eqn.outvars)]
        return {v: i for i, v in enumerate(made)}


def inline(closed: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Run a program with the calls in it as if they were written out."""

    def step(_: int, eqn: Any, values: list[Any]) -> list[Any]:
        inner = called(eqn) if eqn.primitive.name in _INLINED else None
        return bind(eqn, values, eqn.params) if inner is None else inline(inner, values)

    return walk(closed.jaxpr, closed.consts, args, step)
