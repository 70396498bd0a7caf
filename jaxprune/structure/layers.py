"""The layers of a network: which leaves its products take as weights, and over which axes.

Any `apply(params, x)` comes in, which `sources` reads. `granularity.unit` takes the axes, and
whoever prunes the leaves that may be pruned.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import trees
from jaxprune.structure.sources import uses_of
from jaxprune.types import Apply, Params


class Layer(NamedTuple):
    """A leaf that a product takes as its weights.

    Attributes:
        path: of the leaf.
        kind: `dense`, `convolution`, or `embedding` where the leaf is looked up by indices.
        contracted: the axes of the leaf that are summed over, or indexed: inputs, and the window
            of a convolution.
        outputs: all others. Those of stacked layers and of experts are among them, as each has
            units of its own.
        last: whether the result reaches the network's output with no product of another leaf after.
    """

    path: str
    kind: str
    contracted: tuple[int, ...]
    outputs: tuple[int, ...]
    last: bool


def layers(apply: Apply, params: Params, x: Any) -> tuple[Layer, ...]:
    """Return which leaves are weights of products, read off the traced program.

    A leaf may be transposed, cast, reshaped, masked or scaled before, or be one of several that
    the weights are made of, as of low rank. A leaf that is used in several ways has several layers.

    Args:
        apply: any function of parameters and inputs that JAX can trace.
        params: its parameters, or their shapes and dtypes.
        x: inputs to trace with, or their shapes and dtypes.

    Returns:
        The layers, in the order of the leaves and then of the program.

    Example:
        >>> def apply(params, x):
        ...     return jax.nn.relu(x @ params["hidden"]) @ params["logits"]
        >>> params = {"hidden": jnp.ones((4, 3)), "logits": jnp.ones((3, 2))}
        >>> [
        ...     (layer.path, layer.outputs, layer.last)
        ...     for layer in layers(apply, params, jnp.ones(4))
        ... ]
        [('hidden', (1,), False), ('logits', (1,), True)]
    """
    abstract = jax.eval_shape(lambda *args: args, params, x)
    closed = jax.make_jaxpr(apply)(*abstract)
    flat = trees.paths_and_leaves(abstract[0])
    ranks = [leaf.ndim for _, leaf in flat]
    uses, last = uses_of(closed, ranks)
    found = [
        Layer(
            flat[leaf][0],
            kind,
            contracted,
            tuple(axis for axis in range(ranks[leaf]) if axis not in contracted),
            kind != "embedding" and leaf in last,
        )
        for leaf, kind, contracted in uses
        if kind != "scale"
    ]
    order = {path: i for i, (path, _) in enumerate(flat)}
    return tuple(sorted(found, key=lambda layer: order[layer.path]))


def prunable(apply: Apply, params: Params, x: Any) -> Any:
    """Return which leaves may be pruned: matrices and kernels, not embeddings or the last layer.

    A leaf is taken if it is floating, of two axes or more, and the weights of a product; and if it
    is never looked up by indices and never the last layer, as two heads both are.

    Args:
        apply: any function of parameters and inputs that JAX can trace.
        params: its parameters, or their shapes and dtypes.
        x: inputs to trace with, or their shapes and dtypes.

    Returns:
        A tree of bools like `params`, which every function takes as `prunable=`.

    Example:
        >>> def apply(params, x):
        ...     return jax.nn.relu(x @ params["hidden"] + params["bias"]) @ params["logits"]
        >>> params = {"bias": jnp.ones(3), "hidden": jnp.ones((4, 3)), "logits": jnp.ones((3, 2))}
        >>> prunable(apply, params, jnp.ones(4))
        {'bias': False, 'hidden': True, 'logits': False}
    """
    found = layers(apply, params, x)
    never = {layer.path for layer in found if layer.last or layer.kind == "embedding"}
    chosen = {layer.path for layer in found} - never
    abstract = jax.eval_shape(lambda tree: tree, params)
    flags = [
        path in chosen and leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)
        for path, leaf in trees.paths_and_leaves(abstract)
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), flags)
