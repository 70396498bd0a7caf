"""What goes into the products of a network, read off the traced program: no hooks in modules.

Any `apply(params, x)` comes in, whose products `sources` finds. Criteria and corrections take what
comes out: sums of squares, second moments, or the rows themselves.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from jaxprune import trees
from jaxprune.structure.facts import Place
from jaxprune.structure.layers import Layer, layer_of
from jaxprune.structure.program import bind, trace, walk
from jaxprune.structure.rules.calls import called, closed_call, scan_sizes
from jaxprune.structure.sources import read
from jaxprune.types import Apply, Array, Params

_Found = dict[Layer, Any]


def layer_inputs(
    apply: Apply, params: Params, batches: Iterable[Any], reduce: Callable[[Array], Any]
) -> dict[Layer, Any]:
    r"""Hand the input rows of every product with weights to a function, and add up what it returns.

    A row is what one output of the layer is computed from: the features of an example or a token,
    the patch of an image under a window of a convolution. Its columns are the leaf's contracted
    axes, flattened in the order that they have in the leaf.

    Args:
        apply: any function of parameters and inputs that JAX can trace.
        params: its parameters.
        batches: inputs, of one shape each; they are run one by one, so that memory does not grow
            with their number. Under `jit`, a list.
        reduce: of rows, (rows, columns), any tree of arrays that adds up over batches, such as
            `lambda x: jnp.sum(x ** 2, axis=0)`, or `lambda x: x.T @ x`.

    Returns:
        By layer, as `layers` tells it, the sum of what `reduce` returned for it over batches, and
        over the places where it is used. Experts, heads and groups of features, each with inputs of
        its own, give a leading axis, and so do layers that a scan runs over. Products within
        `while` and `cond`, those of rows sorted by experts, and those of weights whose axes were
        cut and then transposed are left out.

    Raises:
        ValueError: there are no batches; or a leaf is used in places that give other shapes.

    Example:
        >>> def apply(params, x):
        ...     return jax.nn.relu(x @ params["hidden"]) @ params["logits"]
        >>> params = {"hidden": jnp.eye(2), "logits": jnp.ones((2, 1))}
        >>> x = jnp.array([[1.0, -2.0], [3.0, 0.0]])
        >>> found = layer_inputs(apply, params, [x], lambda rows: jnp.sum(rows**2, axis=0))
        >>> [(layer.path, value.tolist()) for layer, value in found.items()]
        [('hidden', [10.0, 4.0]), ('logits', [10.0, 0.0])]

    Reference:
        Sums of squares are what Sun, Liu, Bair, Kolter. A Simple and Effective Pruning Approach for
        Large Language Models. ICLR 2024 ask for; second moments Frantar, Alistarh. SparseGPT. ICML
        2023.
    """
    programs: dict[Any, Any] = {}
    total: _Found | None = None
    for x in batches:
        shapes = jax.tree.map(lambda a: (jnp.shape(a), jnp.result_type(a)), x)
        key = str(shapes), jax.tree.structure(x)
        if key not in programs:
            programs[key] = jax.jit(_collector(apply, params, x, reduce))
        found = programs[key](params, x)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None:
        raise ValueError("layer_inputs needs at least one batch, got none")
    return total


def _collector(apply: Apply, params: Params, x: Any, reduce: Any) -> Callable[..., _Found]:
    """Return a function of parameters and inputs that runs the network and collects."""
    closed, (abstract, _), _ = trace(apply, params, x)
    leaves = trees.paths_and_leaves(abstract)
    reading = read(closed, [leaf.ndim for _, leaf in leaves])
    wanted = {
        place: (
            product.operand,
            {layer_of(use, leaves, reading.last): order for use, order in product.orders.items()},
        )
        for place, product in reading.products.items()
    }

    def run(params: Params, x: Any) -> _Found:
        found: _Found = {}
        _run(closed, jax.tree.leaves((params, x)), (), wanted, reduce, found)
        return found

    return run


def _run(
    closed: ClosedJaxpr,
    args: Any,
    at: Place,
    wanted: dict[Place, tuple[int, dict[Layer, tuple[int, ...]]]],
    reduce: Callable[[Array], Any],
    found: _Found,
) -> list[Any]:
    """Return the results of a program, and add to `found` what is wanted of it."""

    def step(i: int, eqn: Any, ins: list[Any]) -> list[Any]:
        place, name = (*at, i), eqn.primitive.name
        if place in wanted and name != "ragged_dot_general":
            operand, orders = wanted[place]
            for layer, order in orders.items():
                _add(found, layer, _reduced(eqn, operand, ins[operand], order, reduce))
        inside = any(other[: len(place)] == place != other for other in wanted)
        if inside and name == "scan":
            return _scan(eqn, ins, place, wanted, reduce, found)
        if inside and (inner := called(eqn)) is not None:
            return _run(inner, ins, place, wanted, reduce, found)
        return bind(eqn, ins, eqn.params)

    return walk(closed.jaxpr, closed.consts, args, step)


def _scan(
    eqn: Any, ins: list[Any], at: Place, wanted: Any, reduce: Any, found: _Found
) -> list[Any]:  # fmt: skip
    consts, carries = scan_sizes(eqn)

    def body(carry: list[Any], x: list[Any]) -> Any:
        here: _Found = {}
        outs = _run(closed_call(eqn), [*ins[:consts], *carry, *x], at, wanted, reduce, here)
        return outs[:carries], (outs[carries:], here)

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    first, steps = ins[consts : consts + carries], ins[consts + carries :]
    carry, (stacked, each) = jax.lax.scan(body, first, steps, **options)
    for layer, value in each.items():
        _add(found, layer, value)
    return [*carry, *stacked]


def _add(found: _Found, layer: Layer, value: Any) -> None:
    if layer in found:
        shapes = [jax.tree.map(jnp.shape, each) for each in (found[layer], value)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"leaf {layer.path!r} is used in places whose inputs reduce to different shapes, "
                f"{shapes[0]} and {shapes[1]}"
            )
        value = jax.tree.map(jnp.add, found[layer], value)
    found[layer] = value


def _reduced(eqn: Any, operand: int, x: Any, order: tuple[int, ...], reduce: Any) -> Any:
    """Reduce the rows of a product, each batch or group of features by itself."""
    rows = input_rows(eqn, operand, x, order)
    if eqn.primitive.name == "conv_general_dilated" and len(rows) == 1:
        rows = rows[0]
    for _ in rows.shape[:-2]:
        reduce = jax.vmap(reduce)
    return reduce(rows)


def input_rows(eqn: Any, operand: int, x: Any, order: tuple[int, ...]) -> Any:
    """Return what the outputs of a product are computed from.

    Args:
        eqn: the product.
        operand: the number of the operand that depends on the inputs.
        x: its value.
        order: the axes of the weights that are summed over, in the order of columns.

    Returns:
        (*batched, rows, columns); of a convolution (groups, rows, columns).
    """
    if eqn.primitive.name == "conv_general_dilated":
        return _patches(eqn, x, order)
    sums, batch = eqn.params["dimension_numbers"]
    pairs = dict(zip(sums[1 - operand], sums[operand], strict=True))
    columns = [pairs[i] for i in order]
    batched = list(batch[operand])
    rest = [i for i in range(x.ndim) if i not in (*columns, *batched)]
    sizes = [x.shape[i] for i in batched]
    width = math.prod(x.shape[i] for i in columns)
    return jnp.transpose(x, (*batched, *rest, *columns)).reshape(*sizes, -1, width)


def _patches(eqn: Any, x: Any, order: tuple[int, ...]) -> Any:
    """Return what a kernel meets at each place of its window: (groups, rows, columns)."""
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    _, inputs, *window = numbers.rhs_spec
    kernel, groups = eqn.invars[1].aval.shape, params["feature_group_count"]
    sizes = [kernel[i] for i in window]
    found = jax.lax.conv_general_dilated_patches(
        x, sizes, params["window_strides"], params["padding"], params["lhs_dilation"],
        params["rhs_dilation"], dimension_numbers=numbers, precision=params["precision"],
    )  # fmt: skip
    found = jnp.moveaxis(found, numbers.out_spec[1], -1)  # features, and in each the window
    found = found.reshape(-1, groups, kernel[inputs], *sizes)
    places = {axis: 2 + k for k, axis in enumerate((inputs, *window))}
    found = jnp.transpose(found, (1, 0, *(places[axis] for axis in order)))
    return found.reshape(groups, found.shape[1], -1)
