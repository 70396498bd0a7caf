"""Methods that also change the weights that stay, a layer at a time, by least squares.

Each is made by a function of its settings and is a `Correction`. `by_scores` lifts a criterion into
the same shape, without correcting; `refit` corrects what any other has chosen.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees
from jaxprune.criteria import solvers
from jaxprune.criteria.layerwise import LeastSquares, layer_by_layer, to_matrix
from jaxprune.granularity import weight
from jaxprune.masks import apply_masks, masks_at
from jaxprune.structure.layers import Layer
from jaxprune.types import (
    Array,
    Batch,
    Correction,
    Counts,
    Criterion,
    Granularity,
    Masks,
    Params,
    Problem,
)

NM = tuple[int, int] | None


def by_scores(
    criterion: Criterion, *, granularity: Granularity | None = None, steps: int = 1
) -> Correction:
    r"""Prune by scores and correct nothing.

    Args:
        criterion: gives the scores, of the batches joined.
        granularity: what is pruned as one; by default `granularity.weight()`.
        steps: so many times, the network as pruned so far is scored anew, and of its weights the
            share left goes down by the same factor.

    Example:
        >>> problem = Problem(lambda p, x: x @ p, lambda p, b: b.x @ p)
        >>> method = by_scores(jp.criterion(jp.magnitude))
        >>> batch = Batch(jnp.ones((1, 2)), None, jax.random.key(0))
        >>> params, masks = method.prune(
        ...     jnp.array([[3.0], [1.0]]), problem, np.array([0, 1]), [batch]
        ... )
        >>> params.tolist()
        [[[3.0], [1.0]], [[3.0], [0.0]]]

    Raises:
        ValueError: when made: fewer than one step.
    """
    granularity = granularity or weight()
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")

    def prune(
        params: Params, problem: Problem, counts: Counts, batches: Sequence[Batch]
    ) -> tuple[Params, Masks]:
        batch, sizes = joined(batches), sizes_of(params, granularity, counts)

        @jax.jit
        def first(params: Params, batch: Batch, counts: Counts) -> Masks:
            scores = criterion.scores(params, problem, batch)
            return masks_at(scores, counts, granularity=granularity)

        @jax.jit
        def again(params: Params, batch: Batch, masks: Masks, counts: Counts) -> Masks:
            scores = criterion.scores(apply_masks(params, masks), problem, batch)
            return masks_at(scores, counts, granularity=granularity, within=masks)

        levels = trees.unstack(first(params, batch, on_the_way(counts, sizes, 1, steps)))
        for step in range(2, steps + 1):
            each = trees.unstack(on_the_way(counts, sizes, step, steps))
            levels = [again(params, batch, *of) for of in zip(levels, each, strict=True)]
        masks = trees.stack(levels)
        return jax.vmap(apply_masks, (None, 0))(params, masks), masks

    settings = {"steps": steps} if steps > 1 else {}
    name = f"{criterion.name}(steps={steps})" if steps > 1 else criterion.name
    return Correction(name, {**criterion.settings, **settings}, prune, criterion.scores)


def refit(method: Correction, *, damping: float = 0.01) -> Correction:
    r"""Keep the weights that another method keeps, and give them the values that do best with it.

    Layer after layer, every output is fitted by least squares to what the dense network gives
    there, from the inputs that the network as pruned so far has; so each layer makes up for those
    before. Layers that are not pruned are fitted too, and biases with their matrix, if nothing of
    them is pruned. What cannot be fitted is named in a warning, and is pruned all the same.

    Args:
        method: chooses the weights; `by_scores(criterion)`, or one that corrects in its own way.
        damping: pulls towards the dense weights, as a share of the mean square of the inputs.

    Raises:
        ValueError: when made: damping that is not positive.

    Reference:
        The least squares of Frantar, Alistarh. SparseGPT. ICML 2023, solved to rounding and in
        order, with the inputs of the pruned network.
    """
    _check_positive("damping", damping)

    def prune(
        params: Params, problem: Problem, counts: Counts, batches: Sequence[Batch]
    ) -> tuple[Params, Masks]:
        _, masks = method.prune(params, problem, counts, batches)
        levels = [dict(trees.paths_and_leaves(each)) for each in trees.unstack(masks)]
        pruned = [not all(mask.all() for mask in each.values()) for each in levels]

        def one(layer: Layer, level: int, given: LeastSquares) -> Any:
            if not pruned[level]:
                return None
            kept = to_matrix(levels[level][layer.path], layer)
            return _fit(solvers.normal(given, damping), _extended(kept, given.free)), kept

        inputs = [batch.x for batch in batches]
        found, _ = layer_by_layer(problem.apply, params, inputs, masks, one)
        return jax.vmap(apply_masks)(found, masks), masks

    settings = {**method.settings, "refit_damping": damping}
    return Correction(f"{method.name}+refit", settings, prune, method.scores)


def obs(
    *, damping: float = 0.01, block: int = 128, n_m: NM = None, weighted: bool = True
) -> Correction:
    r"""Prune the weights whose loss changes a layer's outputs least, and correct the others.

    Optimal brain surgeon for each layer's least squares,
    $\sum_o c_o \|X v_o - X_d w_o\|^2$: of the solution $V_0$ without a mask, weights with the
    smallest $c_o v_0^2 / (H^{-1})_{ii}$ go; then input by input what goes is made up for by the
    weights of later inputs.

    Args:
        damping: as of `refit`.
        block: inputs between which later ones are corrected at once; speed, not results, depend on
            it.
        n_m: (n, m) keeps n of every m inputs of an output, of layers whose count is not 0.
        weighted: whether errors of outputs count as the network is sensitive to them, $c_o$ from
            `sensitivity`; else all count alike.

    Raises:
        ValueError: when made: damping or block that are not positive; when used: m that does not
            divide the inputs of a layer.

    Reference:
        Frantar, Alistarh. SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot.
        ICML 2023. There weights are chosen block by block, each of which loses as many; here in the
        whole layer, targets are the dense network's outputs, and outputs are weighted. Hassibi,
        Stork. Second order derivatives for network pruning: Optimal Brain Surgeon. NIPS 1992.
    """
    _check_positive("damping", damping)
    _check_positive("block", block)

    def solve(given: LeastSquares, equations: solvers.Normal, pruned: int) -> tuple[Array, Array]:
        start, inverse = solvers.unconstrained(equations)
        kept = solvers.by_loss(start, inverse, given.worth, pruned, n_m, given.free)
        return solvers.sweep(inverse, start, _extended(kept, given.free), block), kept

    settings = {"damping": damping, "block": block, "weighted": weighted}
    return _layerwise("obs", settings, n_m, solve)


def alps(
    *, damping: float = 0.01, iterations: int = 200, n_m: NM = None, weighted: bool = True
) -> Correction:
    r"""Find weights and mask of a layer together by ADMM, and fit the weights to the mask.

    Where the mask of `obs` does better under such a fit, it is taken.

    Args:
        damping: as of `refit`.
        iterations: of ADMM, each two products of the layer's size.
        n_m: as of `obs`.
        weighted: as of `obs`.

    Raises:
        ValueError: as of `obs`.

    Reference:
        Meng, Behdin, Wang, Mazumder. ALPS: Improved Optimization for Highly Sparse One-Shot Pruning
        for Large Language Models. NeurIPS 2024. Here the last step is `refit`'s, and targets are
        the dense network's outputs, which are weighted.
    """
    _check_positive("damping", damping)
    _check_positive("iterations", iterations)

    def solve(given: LeastSquares, equations: solvers.Normal, pruned: int) -> tuple[Array, Array]:
        start, inverse = whole = solvers.unconstrained(equations)
        masks = (
            solvers.admm(equations, start, given.worth, pruned, iterations, n_m, given.free),
            # May be better where few are kept.
            solvers.by_loss(start, inverse, given.worth, pruned, n_m, given.free),
        )
        fits = [solvers.refit(equations, _extended(kept, given.free), whole) for kept in masks]
        errors = [solvers.objective(equations, weights, given.worth) for weights in fits]
        best = int(np.argmin(errors))
        return fits[best], masks[best]

    settings = {"damping": damping, "iterations": iterations, "weighted": weighted}
    return _layerwise("alps", settings, n_m, solve)


def _layerwise(
    name: str,
    settings: dict[str, Any],
    n_m: NM,
    solve: Callable[[LeastSquares, solvers.Normal, int], tuple[Array, Array]],
) -> Correction:
    """Return a method that prunes each layer by its own least squares."""
    if n_m is not None:
        if not 0 < n_m[0] < n_m[1]:
            raise ValueError(f"n_m must be n of m, with 0 < n < m, got {n_m[0]}:{n_m[1]}")
        settings = {**settings, "n_m": list(n_m)}

    def prune(
        params: Params, problem: Problem, counts: Counts, batches: Sequence[Batch]
    ) -> tuple[Params, Masks]:
        pruned = _by_path(params, counts, name)
        [levels] = {len(each) for each in pruned.values()}
        some = [any(each[level] for each in pruned.values()) for level in range(levels)]

        def one(layer: Layer, level: int, given: LeastSquares) -> Any:
            if not some[level]:
                return None
            equations = solvers.normal(given, settings["damping"])
            goes = int(pruned[layer.path][level])
            if not goes:
                kept = jnp.ones(given.weights.shape, bool)
                return _fit(equations, kept), kept[:, : kept.shape[1] - given.free]
            _check_windows(layer, given, n_m)
            return solve(given, equations, goes)

        inputs = [batch.x for batch in batches]
        sizes = jax.tree.map(jnp.abs, params)
        others = masks_at(sizes, counts, granularity=_counted(pruned))  # where nothing is solved
        return layer_by_layer(
            problem.apply, params, inputs, others, one, weighted=settings["weighted"]
        )

    return Correction(name, settings, prune)


def _fit(equations: solvers.Normal, kept: Array) -> Array:
    if kept.all():
        return solvers.unconstrained(equations)[0]
    return solvers.refit(equations, kept)


def _extended(kept: Array, free: int) -> Array:
    """Return what is kept with the rows of the bias, which always is."""
    return jnp.concatenate([kept, jnp.ones_like(kept[:, :free])], axis=1)


def _check_positive(name: str, value: Any) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def _check_windows(layer: Layer, given: LeastSquares, n_m: NM) -> None:
    if n_m is None:
        return
    rows = given.weights.shape[1] - given.free
    if rows % n_m[1]:
        raise ValueError(
            f"leaf {layer.path!r} has {rows} inputs, which {n_m[1]} does not divide: leave it out, "
            f"or choose another pattern than {n_m[0]}:{n_m[1]}"
        )


def _by_path(params: Params, counts: Counts, name: str) -> dict[str, np.ndarray]:
    """Return the counts of leaves by path."""
    if jax.tree.structure(counts) != jax.tree.structure(params):
        raise ValueError(f"{name} prunes layer by layer and needs a count a leaf: use scope layer")
    return {path: np.atleast_1d(each) for path, each in trees.paths_and_leaves(counts)}


def _counted(pruned: dict[str, np.ndarray]) -> Granularity:
    """Return the granularity of the weights of which some are pruned."""
    return weight(lambda path, leaf: bool(np.any(pruned[path])))


def joined(batches: Sequence[Batch]) -> Batch:
    """Return all batches as one.

    Raises:
        ValueError: there are none.
    """
    if not batches:
        raise ValueError("a method that looks at examples needs at least one batch, got none")
    if len(batches) == 1:
        return batches[0]
    x, y = (
        jax.tree.map(lambda *parts: jnp.concatenate(parts), *(batch[i] for batch in batches))
        for i in (0, 1)
    )
    return Batch(x, y, batches[0].key)


def sizes_of(params: Params, granularity: Granularity, counts: Counts) -> Any:
    """Return of how many pieces counts are: a number a leaf, or one for all."""
    sizes = jax.tree.map(lambda leaf: leaf.size, granularity.cost(params))
    together = jax.tree.structure(counts) == jax.tree.structure(0)
    return sum(jax.tree.leaves(sizes)) if together else sizes


def on_the_way(counts: Counts, sizes: Any, step: int, steps: int) -> Counts:
    """Return the counts of a step: the share left goes down by the same factor each time."""

    def one(count: Any, size: int) -> np.ndarray:
        left = (size - np.asarray(count)) / max(size, 1)
        if step == steps:
            return np.asarray(count, np.int32)
        # Where nothing is left, the way there is that of one.
        share = np.maximum(left, 1 / max(size, 1)) ** (step / steps)
        return np.minimum(np.asarray(count), np.round(size * (1 - share))).astype(np.int32)

    return jax.tree.map(one, counts, sizes)
