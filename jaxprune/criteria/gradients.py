"""Criteria that look at derivatives of the loss on a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import trees
from jaxprune.criteria.contract import is_kind
from jaxprune.types import Array, Batch, Params, Problem, Scores


def saliency(params: Params, problem: Problem, batch: Batch) -> Scores:
    r"""Score every weight by how much the loss would change without it, to first order.

    $s = |w \cdot \partial L / \partial w|$, where $L$ is the mean of `problem.losses`.

    Args:
        params: any tree of floating point arrays.
        problem: gives the losses.
        batch: the examples that they are taken of.

    Returns:
        The same tree and shapes, in float32 where the parameters are narrower.

    Raises:
        TypeError: a leaf is not floating; names it.

    Example:
        >>> problem = Problem(lambda p, x: x @ p, lambda p, b: (b.x @ p - b.y) ** 2)
        >>> batch = Batch(jnp.ones((1, 2)), jnp.zeros(1), jax.random.key(0))
        >>> saliency(jnp.array([3.0, -1.0]), problem, batch).tolist()
        [12.0, 4.0]

    Reference:
        Mozer, Smolensky. Skeletonization. NIPS 1988: a gate of each unit, for which the weight
        stands here. Molchanov, Tyree, Karras, Aila, Kautz. Pruning Convolutional Neural Networks
        for Resource Efficient Inference. ICLR 2017: activations of feature maps in place of
        weights, averaged over examples after the absolute value and normalised within a layer; here
        the gradient is the mean loss's, and nothing is normalised. Lee, Ajanthan, Torr. SNIP:
        Single-shot Network Pruning Based on Connection Sensitivity. ICLR 2019: the same score, at
        initialisation and divided by its sum, which changes no order.
    """
    check_gradients("saliency", params)
    return products(params, _gradient(params, problem, batch))


def snip(params: Params, problem: Problem, batch: Batch) -> Scores:
    r"""Score every weight by its share of the saliency, $s = |w g| / \sum |w g|$.

    Arguments, errors and order are those of `saliency`; published for networks at their
    initialisation, with `global` scope.

    Example:
        >>> problem = Problem(lambda p, x: x @ p, lambda p, b: (b.x @ p - b.y) ** 2)
        >>> batch = Batch(jnp.ones((1, 2)), jnp.zeros(1), jax.random.key(0))
        >>> snip(jnp.array([3.0, -1.0]), problem, batch).tolist()
        [0.75, 0.25]

    Reference:
        Lee, Ajanthan, Torr. SNIP: Single-shot Network Pruning Based on Connection Sensitivity. ICLR
        2019. There of all weights of all layers, biases left out.
    """
    check_gradients("snip", params)
    scores = products(params, _gradient(params, problem, batch))
    total = sum((jnp.sum(s) for s in jax.tree.leaves(scores)), jnp.zeros(()))
    return jax.tree.map(lambda s: s / jnp.where(total > 0, total, 1).astype(s.dtype), scores)


def grasp(params: Params, problem: Problem, batch: Batch) -> Scores:
    r"""Score every weight by how much of the gradient's norm would go with it, $s = w (H g)$.

    $H$ is the Hessian of the mean loss, $g$ its gradient. Scores are signed: a weight without which
    the gradient would be larger goes first. Arguments and errors are those of `saliency`; it costs
    a forward and backward pass more.

    Example:
        >>> problem = Problem(lambda p, x: x @ p, lambda p, b: (b.x @ p - b.y) ** 2)
        >>> batch = Batch(jnp.ones((1, 2)), jnp.zeros(1), jax.random.key(0))
        >>> grasp(jnp.array([3.0, -1.0]), problem, batch).tolist()
        [48.0, -16.0]

    Reference:
        Wang, Zhang, Grosse. Picking Winning Tickets Before Training by Preserving Gradient Flow.
        ICLR 2020. There at initialisation, through all layers, and of logits divided by 200.
    """
    check_gradients("grasp", params)
    gradient = _gradient(params, problem, batch)
    _, flow = jax.jvp(lambda p: _gradient(p, problem, batch), (params,), (gradient,))
    return jax.tree.map(lambda w, h: _product(w, h), params, flow)


def fisher(params: Params, problem: Problem, batch: Batch, at_once: int = 8) -> Scores:
    r"""Score every weight by what the loss would rise without it, to second order and diagonal.

    $s = w^2 F / 2$, where $F$ is the mean of the squared gradients of single examples, the diagonal
    of the empirical Fisher information, in place of the Hessian's.

    Args:
        params: any tree of floating point arrays.
        problem: gives the losses.
        batch: the examples.
        at_once: examples whose gradients are held side by side; memory, not results, depends on it.

    Returns:
        The same tree and shapes, in float32 where the parameters are narrower.

    Raises:
        TypeError: a leaf is not floating; names it.

    Example:
        >>> problem = Problem(lambda p, x: x @ p, lambda p, b: (b.x @ p - b.y) ** 2)
        >>> batch = Batch(jnp.eye(2), jnp.zeros(2), jax.random.key(0))
        >>> fisher(jnp.array([3.0, -1.0]), problem, batch).tolist()
        [81.0, 1.0]

    Reference:
        LeCun, Denker, Solla. Optimal Brain Damage. NIPS 1989, with the Hessian's diagonal. Theis,
        Korshunova, Tejani, Huszar. Faster gaze prediction with dense networks and Fisher pruning.
        2018, with this one.
    """
    check_gradients("fisher", params)

    def squares(gradients: Params) -> Params:
        return jax.tree.map(lambda g: jnp.sum(jnp.square(g), axis=0), gradients)

    total = over_examples(params, problem, batch, squares, at_once)
    return jax.tree.map(lambda w, f: jnp.square(jnp.asarray(w, f.dtype)) * f / 2, params, total)


def over_examples(
    params: Params,
    problem: Problem,
    batch: Batch,
    reduce: Callable[[Params], Any],
    at_once: int,
) -> Any:
    """Return the mean over examples of what is made of their gradients.

    Args:
        params: any tree of floating point arrays.
        problem: gives the losses.
        batch: the examples.
        reduce: of gradients, each (at_once, *shape), any tree of sums over the first axis; those of
            padding are zero.
        at_once: examples whose gradients are held side by side.
    """
    examples = jax.tree.map(jnp.asarray, (batch.x, batch.y))
    n = jax.tree.leaves(batch.x)[0].shape[0]
    chunks = -(-n // at_once)
    index = jnp.arange(chunks * at_once).reshape(chunks, at_once)

    def gradient(i: Array) -> Params:
        x, y = jax.tree.map(lambda a: a[i][None], examples)
        found = _gradient(params, problem, Batch(x, y, jax.random.fold_in(batch.key, i)))
        return jax.tree.map(lambda g: jnp.where(i < n, _wide(g), 0), found)

    def some(chosen: Array) -> Any:
        return reduce(jax.vmap(gradient)(chosen))

    def add(total: Any, chosen: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, some(chosen)), None

    shapes = jax.eval_shape(some, index[0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, index)
    return jax.tree.map(lambda sums: sums / n, total)


def check_gradients(name: str, params: Params) -> None:
    """Raise TypeError, naming the leaf, where a gradient is asked of what has none."""
    for path, w in trees.paths_and_leaves(params):
        if not is_kind(w, jnp.floating):
            raise TypeError(
                f"{name}: a gradient criterion for a network with integer leaves: "
                f"{path!r} is {jnp.asarray(w).dtype}, which has no gradient"
            )


def products(params: Params, gradients: Params) -> Scores:
    """Return $|w g|$ of all leaves."""
    return jax.tree.map(lambda w, g: jnp.abs(_product(w, g)), params, gradients)


def _product(w: Any, gradient: Array) -> Array:
    gradient = _wide(gradient)  # in float16 the product would underflow
    return jnp.asarray(w, gradient.dtype) * gradient


def _wide(x: Any) -> Array:
    x = jnp.asarray(x)
    return x if x.dtype.itemsize >= 4 else x.astype(jnp.float32)


def _gradient(params: Params, problem: Problem, batch: Batch) -> Params:
    return jax.grad(lambda p: jnp.mean(problem.losses(p, batch)))(params)
