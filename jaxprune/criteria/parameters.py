"""Criteria that look at the parameters alone, or at nothing."""

import jax
import jax.numpy as jnp

from jaxprune.criteria.contract import is_kind
from jaxprune.criteria.gradients import check_gradients, products
from jaxprune.types import Array, Batch, Params, Problem, Scores


def magnitude(params: Params) -> Scores:
    r"""Score every weight by its absolute value, $s = |w|$.

    Args:
        params: any tree of arrays.

    Returns:
        The same tree, shapes and dtypes; leaves that have no magnitude (random keys) as they are.

    Example:
        >>> magnitude({"kernel": jnp.array([[-2.0, 1.0]])})["kernel"].tolist()
        [[2.0, 1.0]]

    Reference:
        Han, Pool, Tran, Dally. Learning both Weights and Connections for Efficient Neural
        Networks. NeurIPS 2015. There with a threshold a layer, here with exact counts.
    """
    return jax.tree.map(lambda w: jnp.abs(w) if is_kind(w, jnp.number) else w, params)


def l1(params: Params) -> Scores:
    r"""Score units by the L1 norm of their weights, $s = \sqrt{|w|}$.

    The score of what is pruned as one is the L2 norm of these, $\sqrt{\sum |w|}$. Single weights
    have the order of `magnitude`.

    Example:
        >>> jp.unit().rank(l1({"kernel": jnp.array([[4.0], [-5.0]])}))["kernel"].tolist()
        [3.0]

    Reference:
        Li, Kadav, Durdanovic, Samet, Graf. Pruning Filters for Efficient ConvNets. ICLR 2017.
    """
    return jax.tree.map(lambda w: jnp.sqrt(jnp.abs(w)) if is_kind(w, jnp.floating) else w, params)


def random(params: Params, problem: Problem | None, batch: Batch) -> Scores:
    """Score every weight by a number drawn uniformly from [0, 1), the baseline of every criterion.

    Units, by the norm of the scores of their weights, are random within a layer; through the whole
    network those with more weights score higher.

    Args:
        params: any tree of arrays.
        problem: not looked at.
        batch: its key is drawn from, folded with the index of the leaf.

    Returns:
        The same tree and shapes, float32; leaves that are not floating as they are.

    Example:
        >>> batch = Batch(None, None, jax.random.key(0))
        >>> random({"kernel": jnp.zeros((2, 3))}, None, batch)["kernel"].shape
        (2, 3)
    """
    leaves, tree = jax.tree.flatten(params)
    keys = [jax.random.fold_in(batch.key, i) for i in range(len(leaves))]
    # Of float32 whatever the parameters are: bfloat16 would tell 128 scores apart.
    drawn = [
        jax.random.uniform(key, jnp.shape(w), jnp.float32) if is_kind(w, jnp.floating) else w
        for key, w in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)


def synflow(params: Params, problem: Problem, batch: Batch) -> Scores:
    r"""Score every weight by the synaptic flow through it, $s = |w \cdot \partial R / \partial w|$.

    $R$ is the sum of the outputs of the network of $|w|$ at inputs of ones. One pass; the published
    method prunes in a hundred, `by_scores(synflow, steps=100)`, without which it may empty a layer.

    Args:
        params: any tree of floating point arrays.
        problem: gives the outputs.
        batch: of its inputs one is taken for the shape, its values are not looked at.

    Returns:
        The same tree and shapes. They grow with the product of the layers' sizes, and may overflow
        in very deep networks.

    Example:
        >>> problem = Problem(lambda p, x: x @ p, lambda p, b: b.x @ p)
        >>> batch = Batch(jnp.zeros((1, 2)), None, jax.random.key(0))
        >>> synflow(jnp.array([[3.0], [-1.0]]), problem, batch).tolist()
        [[3.0], [1.0]]

    Reference:
        Tanaka, Kunin, Yamins, Ganguli. Pruning Neural Networks without Any Data by Iteratively
        Conserving Synaptic Flow. NeurIPS 2020.
    """
    check_gradients("synflow", params)
    ones = jax.tree.map(lambda x: jnp.ones_like(x[:1]), batch.x)

    def flow(params: Params) -> Array:
        outputs = jax.tree.leaves(problem.apply(params, ones))
        return sum((jnp.sum(out.astype(jnp.float32)) for out in outputs), jnp.zeros(()))

    return products(jax.tree.map(jnp.abs, params), jax.grad(flow)(jax.tree.map(jnp.abs, params)))
