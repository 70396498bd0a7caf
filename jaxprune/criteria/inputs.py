"""Criteria that look at what goes into a layer, of any network that JAX can trace."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxprune import trees
from jaxprune.criteria.contract import is_kind
from jaxprune.structure import layer_inputs
from jaxprune.structure.layers import Layer
from jaxprune.types import Array, Batch, Params, Problem, Scores


def wanda(
    params: Params, problem: Problem, batch: Batch, per: Literal["output", "layer"] = "output"
) -> Scores:
    r"""Score every weight by its share in its output, $s_{ij} = |w_{ij}| \, \|x_i\|_2$.

    Args:
        params: any tree of arrays.
        problem: gives the outputs.
        batch: the inputs over whose rows the norms are taken, of each layer its own.
        per: `output`: weights compete with those of their output, as published, so that each keeps
            as many (scores are ranks within an output, and their order is the score's); `layer`:
            scores as they are.

    Returns:
        The same tree and shapes, float32. What is the weights of no product outside of loops with
        conditions is scored by its magnitude.

    Example:
        >>> problem = Problem(lambda p, x: x @ p["w"], lambda p, b: b.x @ p["w"])
        >>> batch = Batch(jnp.array([[2.0, 1.0]]), None, jax.random.key(0))
        >>> wanda({"w": jnp.array([[1.0], [-3.0]])}, problem, batch, per="layer")["w"].tolist()
        [[2.0], [3.0]]

    Reference:
        Sun, Liu, Bair, Kolter. A Simple and Effective Pruning Approach for Large Language Models.
        ICLR 2024.
    """
    layers, norms = _input_norms(params, problem, batch)

    def score(path: str, w: Any) -> Any:
        if path not in norms:
            return jnp.abs(_float(w))
        scores = jnp.abs(_float(w)) * norms[path]
        return scores if per == "layer" else _ranked(scores, layers[path])

    return _each(score, params)


def ria(params: Params, problem: Problem, batch: Batch, power: float = 0.5) -> Scores:
    r"""Score every weight by its relative importance and the norm of its input.

    $s_{ij} = (|w_{ij}| / \sum_k |w_{kj}| + |w_{ij}| / \sum_k |w_{ik}|) \, \|x_i\|_2^a$.

    Args:
        params: any tree of arrays.
        problem: gives the outputs.
        batch: the inputs over whose rows the norms are taken.
        power: $a$.

    Returns:
        The same tree and shapes, float32; as of `wanda`.

    Example:
        >>> problem = Problem(lambda p, x: x @ p["w"], lambda p, b: b.x @ p["w"])
        >>> batch = Batch(jnp.array([[4.0, 1.0]]), None, jax.random.key(0))
        >>> ria({"w": jnp.array([[1.0], [-3.0]])}, problem, batch)["w"].tolist()
        [[2.5], [1.75]]

    Reference:
        Zhang, Bai, Lin, Zhao, Hou, Cannistraci. Plug-and-Play: An Efficient Post-training Pruning
        Method for Large Language Models. ICLR 2024. There without the channel permutation of N:M.
    """
    layers, norms = _input_norms(params, problem, batch)

    def score(path: str, w: Any) -> Any:
        size = jnp.abs(_float(w))
        if path not in norms:
            return size
        inputs, batched = layers[path].contracted, layers[path].batched
        outputs = tuple(i for i in layers[path].outputs if i not in batched)
        sums = (jnp.sum(size, axis, keepdims=True) for axis in (inputs, outputs))
        relative = sum((size / jnp.where(total > 0, total, 1) for total in sums), jnp.zeros(()))
        return relative * norms[path] ** power

    return _each(score, params)


def _input_norms(
    params: Params, problem: Problem, batch: Batch
) -> tuple[dict[str, Layer], dict[str, Array]]:
    """Return by path the layer, and the L2 norms of its inputs in the shape of the leaf."""
    found = layer_inputs(
        problem.apply, params, [batch.x], lambda rows: jnp.sum(jnp.square(_float(rows)), axis=0)
    )
    leaves = dict(trees.paths_and_leaves(params))
    layers, squares = {}, {}
    for layer, sums in found.items():
        path = layer.path
        layers.setdefault(path, layer)
        squares[path] = squares.get(path, 0) + _on_leaf(layer, jnp.shape(leaves[path]), sums)
    return layers, {path: jnp.sqrt(value) for path, value in squares.items()}


def _on_leaf(layer: Layer, shape: tuple[int, ...], sums: Array) -> Array:
    """Return what is known of columns, (*batched, columns), as an array that fits the leaf."""
    sizes = [shape[i] for i in layer.contracted]
    if layer.groups > 1:  # outputs lie group by group
        [outputs] = layer.outputs
        sums = jnp.repeat(sums.reshape(layer.groups, *sizes), shape[outputs] // layer.groups, 0)
        leading: tuple[int, ...] = (outputs,)
    else:
        leading = layer.batched or tuple(range(sums.ndim - 1))  # the layers of a scan
        sums = sums.reshape(*sums.shape[:-1], *sizes)
    axes = (*leading, *layer.contracted)
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    there = [shape[i] if i in axes else 1 for i in range(len(shape))]
    return jnp.transpose(sums, order).reshape(there)


def _ranked(scores: Array, layer: Layer) -> Array:
    """Return ranks among the weights of an output, and in between what the scores say."""
    axes = layer.contracted
    moved = jnp.moveaxis(scores, axes, range(-len(axes), 0))
    flat = moved.reshape(*moved.shape[: moved.ndim - len(axes)], -1)
    ranks = jnp.argsort(jnp.argsort(flat, axis=-1), axis=-1)
    between = flat / (2 * (flat + jnp.mean(flat) + jnp.finfo(flat.dtype).tiny))
    ranked = (ranks.astype(flat.dtype) + between).reshape(moved.shape)
    return jnp.moveaxis(ranked, range(-len(axes), 0), axes)


def _float(x: Any) -> Array:
    x = jnp.asarray(x)
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _each(score: Any, params: Params) -> Scores:
    """Score the floating leaves; others stay."""
    found = [
        score(path, w) if is_kind(w, jnp.floating) else w
        for path, w in trees.paths_and_leaves(params)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), found)
