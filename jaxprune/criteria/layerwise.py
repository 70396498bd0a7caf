"""Layer after layer: what each should give, from the inputs that it has once the others changed.

Any `apply(params, x)` comes in with batches of inputs; `solvers` say what becomes of a layer.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import arrays, trees
from jaxprune.criteria.sensitivity import sensitivities
from jaxprune.structure.flat import Flat
from jaxprune.structure.inputs import input_rows
from jaxprune.structure.layers import Layer, layer_of
from jaxprune.structure.sources import Product
from jaxprune.types import Apply, Array, Masks, Params

_MOST_INPUTS = 20_000  # of a layer
_LEAST_WORTH = 1e-6  # of an output, so that what moves nothing is told apart too


class LeastSquares(NamedTuple):
    r"""What a layer should do: give its dense outputs from the inputs that it has now.

    Of rows $X$ of inputs now, $X_d$ of the dense network, and weights $W$, it is to find $V$ with
    small $\|X V - X_d W\|^2$. Each of `batched` has inputs of its own.

    Attributes:
        weights: $W$, (batched, inputs, outputs).
        moments: $X^T X$ over the number of rows, (batched, inputs, inputs).
        cross: $X^T X_d$ over the number of rows, likewise.
        free: how many of the last inputs are no weights but the bias, whose input is one.
        worth: how much an error of each output counts, (batched, outputs), one in the mean.
    """

    weights: Array
    moments: Array
    cross: Array
    free: int
    worth: Array


class Site(NamedTuple):
    """A leaf that is corrected.

    Attributes:
        number: of the leaf.
        layer: how it is used.
        products: where it is, by the number of the equation.
        bias: the number of the leaf that is added, or None.
    """

    number: int
    layer: Layer
    products: dict[int, Product]
    bias: int | None


Solve = Callable[[Layer, int, LeastSquares], tuple[Array, Array] | None]
"""Of a layer, a level and its problem: weights, and which are kept, (batched, inputs, outputs).

The weights have a row more for each free input. None: the layer stays as it is.
"""


def layer_by_layer(
    apply: Apply,
    params: Params,
    batches: Sequence[Any],
    masks: Masks,
    solve: Solve,
    *,
    weighted: bool = False,
) -> tuple[Params, Masks]:
    """Change one layer after the other, in the order of the program, at all levels.

    Every level is run once, piece by piece: what is before a layer has changed when the layer's
    inputs are taken.

    Args:
        apply: any function of parameters and inputs that JAX can trace.
        params: its parameters, of the dense network.
        batches: inputs, all of one shape.
        masks: with a leading levels axis, of what cannot be solved for: leaves that are not the
            weights of products outside of loops, or are something else besides. They are masked
            from the start, with a warning.
        solve: called for each layer and level.
        weighted: whether errors of a layer's outputs count as the network is sensitive to them.

    Returns:
        Parameters and masks with a leading levels axis; the masks given, where nothing was solved.
    """
    if not batches:
        raise ValueError("layers are fitted to the inputs of batches, and there are none")
    flat = Flat.of(apply, params, batches[0])
    paths = trees.paths_and_leaves(params)
    dense = [jnp.asarray(leaf) for _, leaf in paths]
    given = [jax.tree.leaves(each) for each in trees.unstack(masks)]
    levels, sites = len(given), _sites(flat, paths)
    sites = [_with_bias(site, given) for site in sites]
    for site in sites:
        _check_size(site, dense[site.number])
    solved_for = {site.number for site in sites}
    leaves = [
        [w if i in solved_for or mask[i].all() else jnp.where(mask[i], w, jnp.zeros_like(w))
         for i, w in enumerate(dense)]
        for mask in given
    ]  # fmt: skip
    _warn_of_others([
        path for i, (path, _) in enumerate(paths)
        if i not in solved_for and np.ndim(dense[i]) > 1 and not all(own[i].all() for own in given)
    ])  # fmt: skip
    first = [flat.inputs(x) for x in batches]
    worths = _worths(flat, sites, dense, first) if weighted else {}
    states, at = [first] * (levels + 1), 0  # the dense network's is the last
    for site in sites:
        start = min(site.products)
        states = _advance(flat, at, start, states, [*leaves, dense])
        at = start
        of_inputs = _moments(flat, site, start)
        for level in range(levels):
            unchanged = states[level] is states[-1]
            found = of_inputs(leaves[level], states[level], dense, states[-1], unchanged)
            weights = to_matrix(dense[site.number], site.layer)
            if site.bias is not None:
                weights = jnp.concatenate([weights, dense[site.bias][None, None]], axis=1)
            free = int(site.bias is not None)
            worth = worths.get(site.number, jnp.ones((weights.shape[0], weights.shape[2])))
            with _named(site.layer.path):
                solved = solve(site.layer, level, LeastSquares(weights, *found, free, worth))
                if solved is not None and not jnp.isfinite(solved[0]).all():
                    raise np.linalg.LinAlgError
            if solved is None:
                continue
            values, kept = solved
            shape = dense[site.number].shape
            if site.bias is not None:
                leaves[level][site.bias] = values[0, -1].astype(dense[site.bias].dtype)
            values = values[:, : kept.shape[1]]
            leaf = _leaf(jnp.where(kept, values, 0), site.layer, shape)
            leaves[level][site.number] = leaf.astype(dense[site.number].dtype)
            given[level][site.number] = _leaf(kept, site.layer, shape)
    tree = jax.tree.structure(params)
    return (
        trees.stack([jax.tree.unflatten(tree, each) for each in leaves]),
        trees.stack([jax.tree.unflatten(tree, each) for each in given]),
    )


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Name the layer that cannot be solved."""
    try:
        yield
    except np.linalg.LinAlgError as error:
        raise ValueError(
            f"layer {path!r}: its inputs are not finite, or their second moments are not positive "
            "definite with this damping: give more"
        ) from error


def _check_size(site: Site, leaf: Array) -> None:
    inputs = to_matrix(leaf, site.layer).shape[1]
    if inputs > _MOST_INPUTS:
        raise ValueError(
            f"layer {site.layer.path!r} has {inputs:,} inputs, of which each second moment is a "
            f"matrix of {4e-9 * inputs**2:.0f} GB: leave it out by `prunable`, or use fisher_obs, "
            "which needs blocks only"
        )


def _with_bias(site: Site, masks: list[list[Array]]) -> Site:
    """Return a site whose bias is fitted only if all of it is kept."""
    kept = site.bias is None or all(own[site.bias].all() for own in masks)
    return site if kept else site._replace(bias=None)


def _warn_of_others(paths: Sequence[str]) -> None:
    if paths:
        warnings.warn(
            "pruned but not corrected, as they are not the weights of products outside of loops "
            f"as they are, or something else besides: {', '.join(paths)}",
            stacklevel=3,
        )


def _sites(flat: Flat, paths: Sequence[tuple[str, Any]]) -> list[Site]:
    """Return the leaves that can be corrected, in the order of the program."""
    by_leaf: dict[int, dict[int, Product]] = {}
    never = set()
    for i, product in flat.products.items():
        fits = product.leaf is not None and len(product.orders) == 1
        name = flat.closed.jaxpr.eqns[i].primitive.name
        if fits and name != "ragged_dot_general" and len(next(iter(product.orders)).batched) < 2:
            assert product.leaf is not None
            by_leaf.setdefault(product.leaf, {})[i] = product
        else:
            never |= product.leaves
    found = []
    for number, products in by_leaf.items():
        if number in never or flat.taken[number] != len(products):
            continue
        uses = {use._replace(of=None) for product in products.values() for use in product.orders}
        [layer] = [layer_of(use, paths, ()) for use in uses] if len(uses) == 1 else [None]
        if layer is not None and jnp.issubdtype(jnp.result_type(paths[number][1]), jnp.floating):
            [product, *more] = products.values()
            alone = not more and layer.groups == 1 and not layer.batched
            found.append(Site(number, layer, products, product.bias if alone else None))
    return sorted(found, key=lambda site: min(site.products))


def _worths(
    flat: Flat, sites: Sequence[Site], leaves: list[Array], batches: Sequence[Any]
) -> dict[int, Array]:
    """Return how much errors of layers' outputs count, (batched, outputs), by number of leaf."""
    found = sensitivities(flat, leaves, batches, {site.number: [*site.products] for site in sites})
    worths = {}
    if found is None:
        return worths
    for site in sites:
        worth = jnp.max(to_matrix(found[site.number], site.layer), axis=1).astype(jnp.float32)
        mean = jnp.mean(worth)
        scaled = worth / jnp.where(mean > 0, mean, 1)
        worths[site.number] = jnp.where(mean > 0, jnp.maximum(scaled, _LEAST_WORTH), 1)
    return worths


def output_worths(apply: Apply, params: Params, batches: Sequence[Any]) -> dict[str, Array]:
    """Return by path how much errors of layers' outputs count; see `LeastSquares`."""
    flat, leaves = Flat.of(apply, params, batches[0]), trees.paths_and_leaves(params)
    sites = _sites(flat, leaves)
    inputs = [flat.inputs(x) for x in batches]
    found = _worths(flat, sites, [jnp.asarray(leaf) for _, leaf in leaves], inputs)
    return {leaves[number][0]: worth for number, worth in found.items()}


def _advance(
    flat: Flat, at: int, to: int, states: list[Any], leaves: list[list[Array]]
) -> list[Any]:
    """Run all networks to an equation; those that have not changed are one."""
    live = flat.live(to)
    given, run = flat.piece(at, live)
    program = jax.jit(run)

    def further(leaves: list[Array], state: list[dict[Any, Any]]) -> list[dict[Any, Any]]:
        return [
            dict(zip(live, program(leaves, [values[v] for v in given]), strict=True))
            for values in state
        ]

    dense = further(leaves[-1], states[-1])
    same = [all(a is b for a, b in zip(own, leaves[-1], strict=True)) for own in leaves]
    return [
        dense if one else further(own, state)
        for one, own, state in zip(same, leaves, states, strict=True)
    ]


def _moments(flat: Flat, site: Site, start: int) -> Callable[..., tuple[Array, Array]]:
    """Return the function from two networks to the moments of the inputs of a layer."""
    eqns = flat.closed.jaxpr.eqns
    wanted = [eqns[i].invars[product.operand] for i, product in site.products.items()]
    given, run = flat.piece(start, wanted)

    def rows(leaves: Any, values: Any) -> Any:
        found = []
        for (i, product), x in zip(site.products.items(), run(leaves, values), strict=True):
            [order] = product.orders.values()
            each = input_rows(eqns[i], product.operand, x, order)
            each = each.reshape(-1, *each.shape[-2:])
            if site.bias is not None:
                each = jnp.concatenate([each, jnp.ones_like(each[..., :1])], axis=-1)
            found.append(each.astype(jnp.promote_types(each.dtype, jnp.float32)))
        return jnp.concatenate(found, axis=1)

    def one(leaves: Any, values: Any) -> Any:
        x = rows(leaves, values)
        return _gram(x, x), x.shape[1]

    def both(leaves: Any, values: Any, dense: Any, others: Any) -> Any:
        x, target = rows(leaves, values), rows(dense, others)
        return _gram(x, x), _gram(x, target), x.shape[1]

    one, both = jax.jit(one), jax.jit(both)

    def moments(leaves: Any, state: Any, dense: Any, others: Any, same: bool) -> Any:
        total: Any = None
        for values, other in zip(state, others, strict=True):
            args = [values[v] for v in given]
            found = one(leaves, args) if same else both(
                leaves, args, dense, [other[v] for v in given]
            )  # fmt: skip
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        *sums, count = total
        moments = [each / jnp.asarray(count, each.dtype) for each in sums]
        return moments[0], moments[-1]

    return moments


def _gram(x: Array, y: Array) -> Array:
    return jnp.einsum("bri,brj->bij", x, y, precision=jax.lax.Precision.HIGHEST)


def layer_errors(
    apply: Apply, params: Params, pruned: Params, batches: Sequence[Any]
) -> dict[str, list[float]]:
    r"""Return how far networks' layers are from the dense network's, by the path of the weights.

    Args:
        apply: any function of parameters and inputs that JAX can trace.
        params: of the dense network.
        pruned: of the others, with a leading levels axis.
        batches: inputs, all of one shape.

    Returns:
        Of each level $\|Y - Y_d\|^2 / \|Y_d\|^2$ of the outputs of every product with weights
        that `obs` would correct, each network running on its own.

    Example:
        >>> x, double = jnp.ones((3, 2)), jnp.array([[2.0], [2.0]])
        >>> layer_errors(lambda p, x: x @ p["w"], {"w": double}, {"w": double[None] / 2}, [x])
        {'w': [0.25]}
    """
    flat = Flat.of(apply, params, batches[0])
    sites = _sites(flat, trees.paths_and_leaves(params))
    eqns = flat.closed.jaxpr.eqns
    wanted = [eqns[i].outvars[0] for site in sites for i in site.products]
    paths = [site.layer.path for site in sites for _ in site.products]
    given, run = flat.piece(0, wanted)

    @jax.jit
    def squares(dense: Any, other: Any, values: Any) -> Array:
        pairs = zip(run(dense, values), run(other, values), strict=True)
        return jnp.array([(jnp.sum((a - b) ** 2), jnp.sum(a**2)) for a, b in pairs])

    found: dict[str, list[float]] = {path: [] for path in paths}
    dense = jax.tree.leaves(params)
    for other in map(jax.tree.leaves, trees.unstack(pruned)):
        total = np.zeros((len(paths), 2))
        for x in batches:
            inputs = flat.inputs(x)
            total += np.asarray(squares(dense, other, [inputs[v] for v in given]))
        for path in found:
            errors, sizes = total[[i for i, each in enumerate(paths) if each == path]].sum(0)
            found[path].append(float(errors / sizes) if sizes else 0.0)
    return found


def to_matrix(leaf: Array, layer: Layer) -> Array:
    """Return a leaf as (batched, inputs, outputs); groups of a convolution are batched."""
    matrix = arrays.to_matrix(leaf, (layer.batched, layer.contracted))
    if layer.groups > 1:
        return jnp.moveaxis(matrix[0].reshape(matrix.shape[1], layer.groups, -1), 1, 0)
    return matrix


def _leaf(matrix: Array, layer: Layer, shape: tuple[int, ...]) -> Array:
    """Return the inverse of `to_matrix`."""
    if layer.groups > 1:
        matrix = jnp.moveaxis(matrix, 0, 1).reshape(1, matrix.shape[1], -1)
    return arrays.from_matrix(matrix, shape, (layer.batched, layer.contracted))
