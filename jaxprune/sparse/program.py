"""The matrix products of a traced network, and the network with some of them run otherwise.

A function of parameters and inputs comes in from `inference`. Its products with weights of the
parameters go out, and the chains that they form.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, Var

from jaxprune.structure.flat import Flat
from jaxprune.structure.program import bind
from jaxprune.structure.sources import Product as Read
from jaxprune.types import Apply, Params


class Layer(NamedTuple):
    """A matrix product with what follows it.

    Attributes:
        weights: (inputs, outputs), many of them zero.
        bias: (outputs,) or None.
        relu: whether max(., 0) is taken of it.
    """

    weights: np.ndarray
    bias: np.ndarray | None
    relu: bool


class Product(NamedTuple):
    """A matrix product of a program.

    Attributes:
        equations: those that it consists of, by number.
        x: the operand that is no parameter.
        axes: those of `x` that are summed over.
        layer: the other operand, and what follows.
        free: the sizes of the weights' axes in the result, its last or, if `swapped`, its first.
        swapped: whether the weights are the first operand.
        out: the result.
        leaves: those of the parameters that the weights are made from, by number.
        float32: whether both operands and the result are of this type.
        single: whether one equation alone takes in the result.
    """

    equations: tuple[int, ...]
    x: Any
    axes: tuple[int, ...]
    layer: Layer
    free: tuple[int, ...]
    swapped: bool
    out: Any
    leaves: frozenset[int]
    float32: bool
    single: bool

    def rows(self, x: Any) -> Any:
        """Return the operand as a matrix, (rows, inputs)."""
        moved = jnp.moveaxis(x, self.axes, range(-len(self.axes), 0))
        kept = moved.ndim - len(self.axes)
        return jnp.reshape(moved, (math.prod(moved.shape[:kept]), math.prod(moved.shape[kept:])))

    def result(self, rows: Any, kept: Sequence[int]) -> Any:
        """Return (rows, outputs) with the axes that it has in the program, of `x` those kept."""
        out = jnp.reshape(rows, (*kept, *self.free))
        return jnp.moveaxis(out, range(len(kept)), range(-len(kept), 0)) if self.swapped else out

    def follows(self, other: "Product") -> bool:
        """Tell whether this takes in what another gives, its rows as they are."""
        ndim = len(self.x.aval.shape)
        last = tuple(range(ndim - len(other.free), ndim))
        alone = other.single and not other.swapped
        return self.x is other.out and alone and self.axes == last


Chain = Sequence[Product]
"""Products of which each takes in what the one before gives, and nothing else does."""


class Inlined(NamedTuple):
    """A network as a list of simple equations, with its weights.

    Attributes:
        flat: the equations.
        known: the values of its variables that are no inputs.
    """

    flat: Flat
    known: dict[Any, Any]

    @classmethod
    def of(cls, apply: Apply, params: Params, x: Any) -> "Inlined":
        """Trace a network."""
        flat = Flat.of(apply, params, x)
        known = dict(zip(flat.closed.jaxpr.invars, jax.tree.leaves(params), strict=False))
        known |= zip(flat.closed.jaxpr.constvars, flat.closed.consts, strict=True)
        return cls(flat, known)

    @property
    def jaxpr(self) -> Any:
        """The equations."""
        return self.flat.closed.jaxpr

    def function(self, chains: Sequence[Chain]) -> tuple[Sequence[Any], Callable[..., Any]]:
        """Return what is needed of the known values, and the network as a function.

        Args:
            chains: of products that are run otherwise.

        Returns:
            The variables needed, and a function of their values, the inputs, and of another
            function, which gives a chain's results of its number and the rows that go in.
        """
        steps, needed = self._live(self.jaxpr.outvars, chains)
        # What lives on with the function is to hold no weights.
        bare = self._replace(known={})
        chains = [[product._replace(layer=None) for product in chain] for chain in chains]

        def run(values: Sequence[Any], x: Any, call: Callable[[int, Any], Any]) -> Any:
            given = dict(zip(needed, values, strict=True))
            outs = bare._run(steps, bare.jaxpr.outvars, given | bare.flat.inputs(x), chains, call)
            return jax.tree.unflatten(bare.flat.out_tree, outs)

        return needed, run

    def values(self, wanted: Sequence[Any], x: Any = None) -> list[Any]:
        """Return the values of some variables; of `x`, where they depend on the inputs."""
        steps, needed = self._live(wanted, ())

        def run(values: Sequence[Any], x: Any) -> list[Any]:
            given = dict(zip(needed, values, strict=True))
            inputs = {} if x is None else self.flat.inputs(x)
            return self._run(steps, wanted, given | inputs, (), None)

        return jax.jit(run)([self.known[var] for var in needed], x)

    def products(self) -> list[Product]:
        """Return the products with weights of parameters, and what follows each."""
        eqns, fixed = self.jaxpr.eqns, self.flat.fixed
        uses: dict[Any, list[int]] = {}
        for i, eqn in enumerate(eqns):
            for var in (v for v in eqn.invars if isinstance(v, Var)):
                uses.setdefault(var, []).append(i)
        for var in self.jaxpr.outvars:
            if isinstance(var, Var):
                uses.setdefault(var, []).append(-1)

        def follower(var: Any) -> tuple[int, str, Any]:
            """Return the one equation that takes in a variable, and what else it takes in."""
            if len(uses.get(var, ())) != 1 or (i := uses[var][0]) < 0 or len(eqns[i].invars) != 2:
                return -1, "", None
            a, b = eqns[i].invars
            return i, eqns[i].primitive.name, b if a is var else a

        def weights(i: int, product: Read) -> Any:
            return eqns[i].invars[1 - product.operand]

        found = {
            i: product
            for i, product in self.flat.products.items()
            if eqns[i].primitive.name == "dot_general" and product.leaves
            if eqns[i].params["dimension_numbers"][1] == ((), ())
            if (var := weights(i, product)) in fixed and var.aval.size
        }
        wanted = [weights(i, product) for i, product in found.items()]
        others = [follower(eqns[i].outvars[0])[2] for i in found]
        wanted += [var for var in others if isinstance(var, Var) and var in fixed]
        value = dict(zip(wanted, map(np.asarray, self.values(wanted)), strict=True))
        return [self._product(i, product, value, follower) for i, product in found.items()]

    def _product(
        self, i: int, found: Read, value: dict[Any, np.ndarray],
        follower: Callable[[Any], tuple[int, str, Any]],
    ) -> Product:  # fmt: skip
        """Return a product, of its equation's number, with the bias and ReLU that follow it."""
        eqns, swapped = self.jaxpr.eqns, found.operand == 1
        x, weights = eqns[i].invars[found.operand], eqns[i].invars[1 - found.operand]
        (axes, fixed), _ = eqns[i].params["dimension_numbers"]
        if swapped:
            axes, fixed = fixed, axes
        matrix = np.moveaxis(value[weights], fixed, range(len(fixed)))
        free = matrix.shape[len(fixed) :]
        matrix = matrix.reshape(-1, math.prod(free))
        members, bias, relu = [i], None, False
        at, name, other = follower(eqns[i].outvars[0])
        if name == "add" and isinstance(other, Var) and other in value and not swapped:
            bias = _bias(value[other], eqns[i].outvars[0].aval.shape, free)
            if bias is not None:
                members = [*members, at]
                at, name, other = follower(eqns[at].outvars[0])
        if name == "max" and isinstance(other, Literal) and not np.any(other.val):
            members, relu = [*members, at], True
        out = eqns[members[-1]].outvars[0]
        types = {v.aval.dtype for v in (x, weights, out)}
        return Product(
            equations=tuple(members),
            x=x,
            axes=axes,
            layer=Layer(matrix, bias, relu),
            free=free,
            swapped=swapped,
            out=out,
            leaves=found.leaves,
            float32=types == {jnp.dtype(jnp.float32)},
            single=follower(out)[0] >= 0,
        )

    def _live(
        self, wanted: Sequence[Any], chains: Sequence[Chain]
    ) -> tuple[list[tuple[int, int | None]], list[Any]]:
        """Return the steps to the wanted variables, and which known ones they need.

        A step is an equation, or a chain in the place of its first one.
        """
        hidden = {i for chain in chains for product in chain for i in product.equations}
        first = {chain[0].equations[0]: n for n, chain in enumerate(chains)}
        live = {var for var in wanted if isinstance(var, Var)}
        steps: list[tuple[int, int | None]] = []
        for i in reversed(range(len(self.jaxpr.eqns))):
            eqn = self.jaxpr.eqns[i]
            if i in first and chains[first[i]][-1].out in live:
                live.add(chains[first[i]][0].x)
                steps.append((i, first[i]))
            elif i not in hidden and (eqn.effects or any(var in live for var in eqn.outvars)):
                live |= {var for var in eqn.invars if isinstance(var, Var)}
                steps.append((i, None))
        return steps[::-1], [var for var in self.known if var in live]

    def _run(
        self,
        steps: Sequence[tuple[int, int | None]],
        wanted: Sequence[Any],
        env: dict[Any, Any],
        chains: Sequence[Chain],
        call: Any,
    ) -> list[Any]:
        def read(x: Any) -> Any:
            return x.val if isinstance(x, Literal) else env[x]

        for i, n in steps:
            eqn = self.jaxpr.eqns[i]
            if n is None:
                env.update(
                    zip(eqn.outvars, bind(eqn, [*map(read, eqn.invars)], eqn.params), strict=True)
                )
            else:
                first, last = chains[n][0], chains[n][-1]
                rows = call(n, first.rows(env[first.x]))
                sizes = enumerate(first.x.aval.shape)
                kept = [size for axis, size in sizes if axis not in first.axes]
                env[last.out] = last.result(rows, kept)
        return [read(x) for x in wanted]


def _bias(added: np.ndarray, shape: tuple[int, ...], free: tuple[int, ...]) -> np.ndarray | None:
    """Return what is added to each row of a result; None if it differs, or is of more rows."""
    if np.broadcast_shapes(added.shape, shape) != shape:
        return None
    added = added.reshape((1,) * (len(shape) - added.ndim) + added.shape)
    leading = added.shape[: len(shape) - len(free)]
    rows = np.broadcast_to(added, (*leading, *free)).reshape(math.prod(leading), math.prod(free))
    return rows[0] if len(rows) and (rows == rows[0]).all() else None


def chains(products: Sequence[Product]) -> list[Chain]:
    """Join the products that follow each other."""
    found: list[list[Product]] = []
    for product in products:
        before = next((chain for chain in found if product.follows(chain[-1])), None)
        if before is None:
            found.append([product])
        else:
            before.append(product)
    return [*found]
