"""The layers of a network: which leaves its products take as weights, and over which axes.

Any `apply(params, x)` comes in, which `sources` reads. `granularity.unit` takes the axes, and
whoever prunes the leaves that may be pruned.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import trees
from jaxprune.structure.program import trace
from jaxprune.structure.sources import Use, read
from jaxprune.types import Apply, Params


class Layer(NamedTuple):
    """How a leaf is used.

    Attributes:
        path: of the leaf.
        kind: `dense` or `convolution`, the weights of a product; `embedding`, looked up by indices;
            `factor`, one of several that weights are made of, without inputs of its own; `bias`,
            added to a value; `scale`, multiplied with it.
        contracted: the axes of the leaf that are summed over, or indexed: inputs, and the window
            of a convolution.
        outputs: all others. Those of stacked layers and of experts are among them, as each has
            units of its own.
        last: whether the result reaches the network's output with no product of another leaf after.
        batched: the axes of which each index has inputs of its own, as experts and heads have.
        window: the axes of a convolution's window.
        strides: of a convolution.
        groups: of its features.
        of: of a bias or scale, the paths of the weights of the product that it comes after.
    """

    path: str
    kind: str
    contracted: tuple[int, ...]
    outputs: tuple[int, ...]
    last: bool
    batched: tuple[int, ...] = ()
    window: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    groups: int = 1
    of: tuple[str, ...] = ()

    @property
    def product(self) -> bool:
        """Whether it is the weights of a product."""
        return self.kind in ("dense", "convolution")


def layers(apply: Apply, params: Params, x: Any) -> tuple[Layer, ...]:
    """Return how every leaf is used, read off the traced program.

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
    closed, abstract, _ = trace(apply, params, x)
    flat = trees.paths_and_leaves(abstract[0])
    found = read(closed, [leaf.ndim for _, leaf in flat])
    named = [layer_of(use, flat, found.last) for use in found.uses]
    order = {path: i for i, (path, _) in enumerate(flat)}
    return tuple(sorted(named, key=lambda layer: order[layer.path]))


def layer_of(use: Use, leaves: Sequence[tuple[str, Any]], last: Collection[int]) -> Layer:
    """Return a use by name; `leaves` are all paths and leaves, `last` the leaves of last ones."""
    path, leaf = leaves[use.leaf]
    others = tuple(axis for axis in range(leaf.ndim) if axis not in use.contracted)
    of = tuple(leaves[n][0] for n in use.of or ())
    found = Layer(path, use.kind, use.contracted, others, False, *use[3:-1], of)
    return found._replace(last=found.product and use.leaf in last)


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
    chosen = {layer.path for layer in found if layer.product} - never
    abstract = jax.eval_shape(lambda tree: tree, params)
    flags = [
        path in chosen and leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)
        for path, leaf in trees.paths_and_leaves(abstract)
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), flags)
