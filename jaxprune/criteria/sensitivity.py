"""How far a network's outputs move with each output of its layers.

A network as a list of equations comes in; `layerwise` weighs the errors of layers by what goes out.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.structure.flat import Flat
from jaxprune.structure.program import bind, walk
from jaxprune.types import Array

_BATCHES = 8  # at most so many are looked at


def sensitivities(
    flat: Flat,
    leaves: Sequence[Array],
    batches: Sequence[Mapping[Any, Any]],
    wanted: Mapping[int, Sequence[int]],
) -> dict[int, Array] | None:
    r"""Return of weights how sensitive the network is to the outputs that they give.

    Of an output $z$ of a layer, $\sum_k (\partial f_k / \partial z)^2$ over the network's outputs,
    summed over the places where $z$ stands: the diagonal of the Gauss-Newton matrix of their
    squared error. It is estimated by $(\partial (r^T f) / \partial z)^2$ of random signs $r$.

    Args:
        flat: the network.
        leaves: its parameters.
        batches: what `flat.inputs` returns, all of one shape.
        wanted: numbers of leaves, and of the products that they are the weights of.

    Returns:
        By number, an array of the leaf's shape; of convolutions, places of the window that meet
        padding have less. None, with a warning, where the network has no derivative.

    Reference:
        Hutchinson. A stochastic estimator of the trace of the influence matrix. 1990. Weighted so,
        the reconstruction of layers is that of Hassibi, Stork. Optimal Brain Surgeon. NIPS 1992,
        with the cross terms between outputs of a layer left out.
    """
    jaxpr, eqns = flat.closed.jaxpr, flat.closed.jaxpr.eqns
    products = [i for those in wanted.values() for i in those]

    def moved(probes: dict[int, Array], leaves: Any, inputs: Any, key: Any) -> Array:
        def step(i: int, eqn: Any, values: list[Any]) -> Sequence[Any]:
            outs = bind(eqn, values, eqn.params)
            return [outs[0] + probes[i], *outs[1:]] if i in probes else outs

        found = walk(jaxpr, flat.closed.consts, [*leaves, *inputs], step)
        floats = [out for out in found if jnp.issubdtype(out.dtype, jnp.floating)]
        keys = jax.random.split(key, max(len(floats), 1))
        sums = [
            jnp.sum(out * jax.random.rademacher(own, out.shape, out.dtype)).astype(jnp.float32)
            for own, out in zip(keys, floats, strict=False)
        ]
        return jnp.sum(jnp.stack(sums)) if sums else jnp.zeros(())

    @jax.jit
    def squares(leaves: Any, inputs: Any, key: Any) -> dict[int, Array]:
        avals = {i: eqns[i].outvars[0].aval for i in products}
        probes = {i: jnp.zeros(aval.shape, aval.dtype) for i, aval in avals.items()}
        slopes = jax.grad(moved)(probes, leaves, inputs, key)
        return {
            number: sum(
                (_by_weight(flat, leaves, number, i, slopes[i] ** 2) for i in those),
                jnp.zeros_like(leaves[number]),
            )
            for number, those in wanted.items()
        }

    values = [[each[v] for v in jaxpr.invars[flat.leaves :]] for each in batches[:_BATCHES]]
    try:
        jax.eval_shape(squares, leaves, values[0], jax.random.key(0))
    except (ValueError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        warnings.warn(
            f"all outputs of a layer weigh alike, as the network has no derivative: {reason}",
            stacklevel=2,
        )
        return None
    total: Any = None
    for number, inputs in enumerate(values):
        found = squares(leaves, inputs, jax.random.key(number))
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    return total


def _by_weight(flat: Flat, leaves: Any, number: int, at: int, squares: Array) -> Array:
    """Return for each weight of a leaf the sum of what is given of the outputs that it enters.

    It is what the product's derivative by its weights would be at inputs of one.
    """
    eqn, operand = flat.closed.jaxpr.eqns[at], flat.products[at].operand
    _, run = flat.piece(len(flat.closed.jaxpr.eqns), [eqn.invars[1 - operand]])
    aval = eqn.invars[operand].aval

    def product(leaf: Array) -> Array:
        [weights] = run([*leaves[:number], leaf, *leaves[number + 1 :]], [])
        ones = jnp.ones(aval.shape, aval.dtype)
        return bind(eqn, [weights, ones] if operand else [ones, weights], eqn.params)[0]

    return jax.vjp(product, leaves[number])[1](squares)[0]
