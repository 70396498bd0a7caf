"""Training under masks: one step, and many steps of all levels in one compiled call.

Static settings go into the factory, everything that may be swept is an argument. `study` calls
the result between updates of the masks; `evaluate` scores what comes out.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import metrics, trees
from jaxprune.masks import apply_masks
from jaxprune.types import Apply, Array, Masks, Params


class TrainState(NamedTuple):
    """What training carries from step to step, with a leading levels axis or without."""

    params: Params
    opt_state: Any


Train = Callable[..., tuple[TrainState, Array]]
"""`train(state, masks, x, y, batches, first, last) -> (state, losses)`; see `make_train`."""


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step."""
    return TrainState(params, optimizer.init(params))


def make_step(
    apply: Apply,
    optimizer: optax.GradientTransformation,
    *,
    loss: Callable[[Array, Array], Array] = metrics.cross_entropy,
) -> Callable[[TrainState, Masks, Any, Any], tuple[TrainState, Array]]:
    """Return `step(state, masks, x, y) -> (state, loss)`, of one network and one batch.

    Arguments as in `make_train`, without a levels axis; the loss is the batch's mean, before the
    update.
    """

    def step(state: TrainState, masks: Masks, x: Any, y: Any) -> tuple[TrainState, Array]:
        def mean_loss(params: Params) -> Array:
            return jnp.mean(loss(apply(apply_masks(params, masks), x), y))

        value, gradients = jax.value_and_grad(mean_loss)(state.params)
        with jax.numpy_dtype_promotion("standard"):  # Adam's 0.9**count is not strict
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = apply_masks(optax.apply_updates(state.params, updates), masks)
        return TrainState(params, opt_state), value

    return step


def make_train(
    apply: Apply,
    optimizer: optax.GradientTransformation,
    *,
    loss: Callable[[Array, Array], Array] = metrics.cross_entropy,
    levels_at_once: int | None = None,
) -> Train:
    r"""Return a pure function that trains all levels for some steps under their masks.

    The loss is of the masked network, $L(m \odot w)$, and the masks are applied again after the
    optimizer's update, so that momentum and weight decay cannot revive a pruned weight: it is
    exactly zero after every step.

    Args:
        apply: `apply(params, x) -> logits`.
        optimizer: any optax transformation.
        loss: per-example loss of (logits, labels).
        levels_at_once: how many levels are vmapped together; see `trees.map_levels`.

    Returns:
        `train(state, masks, x, y, batches, first, last) -> (state, losses)`, to be jitted once:

        - state: a `TrainState` with a leading levels axis in every leaf;
        - masks: likewise;
        - x, y: training examples, (examples, ...), and labels, (examples,);
        - batches: (steps, batch) int32, the examples of each step, the same for all levels;
        - first, last: (), int32; the steps first … last − 1 are made. Values, so that one program
          serves calls of any length; the result does not depend on how steps are split into calls;
        - losses: (levels, steps), each step's mean loss before its update, 0 for the other steps.

        It raises TypeError for a parameter that is not of floating point numbers.

    Example:
        >>> optimizer = optax.sgd(0.1)
        >>> train = jax.jit(make_train(lambda params, x: x @ params["logits"], optimizer))
    """
    step = make_step(apply, optimizer, loss=loss)

    def train(
        state: TrainState,
        masks: Masks,
        x: Array,
        y: Array,
        batches: Array,
        first: Array,
        last: Array,
    ) -> tuple[TrainState, Array]:
        for path, leaf in trees.paths_and_leaves(state.params):
            if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                raise TypeError(
                    f"leaf {path!r} is of {leaf.dtype} and cannot be trained: keep it out of the "
                    "parameters, in `apply`"
                )

        def one_level(level: tuple[TrainState, Masks]) -> tuple[TrainState, Array]:
            state, masks = level

            def one_step(i: Array, carry: tuple[TrainState, Array]) -> tuple[TrainState, Array]:
                state, losses = carry
                state, value = step(state, masks, x[batches[i]], y[batches[i]])
                return state, losses.at[i].set(value)

            losses = jnp.zeros(len(batches))
            return jax.lax.fori_loop(first, last, one_step, (state, losses))

        return trees.map_levels(one_level, (state, masks), levels_at_once)

    return train


def batch_indices(key: Array, examples: int, batch_size: int) -> Array:
    """Shuffle an epoch into batches.

    Args:
        key: a `jax.random.key`.
        examples: size of the training set.
        batch_size: at most that size; the last partial batch is dropped.

    Returns:
        (examples // batch_size, batch_size) int32, each example at most once.

    Raises:
        ValueError: the batch is empty or larger than the training set.
    """
    if not 1 <= batch_size <= examples:
        raise ValueError(
            f"batch_size must be in [1, {examples}], the size of the training set, got {batch_size}"
        )
    steps = examples // batch_size
    order = jax.random.permutation(key, examples)[: steps * batch_size]
    return order.reshape(steps, batch_size).astype(jnp.int32)
