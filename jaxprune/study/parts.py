"""The levels on their way through a study: a list of parts, each with a leading levels axis.

Under masks all levels are one part. Once their masks have pruned units and stay, each level is a
part of its own, a smaller network that trains and scores as the masked one does.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxprune import trees
from jaxprune.masks import keep_all
from jaxprune.structure import Compaction
from jaxprune.study.setup import Joined, Setup
from jaxprune.train import TrainState
from jaxprune.types import Masks, Network

_SAME = 1e-5  # relative: what an elementwise optimizer may differ by when it sees fewer weights


class Part(NamedTuple):
    """Levels that run in one program.

    Attributes:
        carry: parameters, state and optimizer state; leaves with a levels axis.
        masks: likewise.
        plan: what is left of a network, of one level; None: the whole network, under masks.
        network: which that is.
    """

    carry: TrainState
    masks: Masks
    plan: Compaction | None = None
    network: Network | None = None


def compact(carry: TrainState, masks: Masks, setup: Setup, together: Joined) -> list[Part]:
    """Return every level as what its masks leave of the network.

    Args:
        carry: of all levels; the optimizer's state may be ().
        masks: likewise.
        setup: the study.
        together: its `joined`; or its `scoring`, for what is scored alone, which is then compiled
            once for all of the same widths. The random bits of training differ by the units kept.
    """
    parts = []
    for level, mask in _levels(carry, masks):
        plan = _plan(level, mask, together)
        opt_state = _of_params(plan.shrink, level.opt_state, level.params, setup.optimizer)
        small = TrainState(plan.params["params"], plan.params["state"], opt_state)
        small, kept = trees.stack([(small, plan.masks["params"])])
        parts.append(Part(small, kept, plan, together.network(plan)))
    return parts


def expand(parts: Sequence[Part], setup: Setup) -> TrainState:
    """Return all levels, whole, with a levels axis; what was removed is zero."""
    levels = []
    for carry, _, plan, _ in parts:
        if plan is None:
            return carry
        (small,) = trees.unstack(carry)
        full = plan.expand({"params": small.params, "state": small.state})
        opt_state = _of_params(plan.expand, small.opt_state, small.params, setup.optimizer)
        levels.append(TrainState(full["params"], full["state"], opt_state))
    return trees.stack(levels)


def _levels(carry: TrainState, masks: Masks) -> list[tuple[TrainState, Masks]]:
    return trees.unstack(jax.device_get((carry, masks)))


def _plan(level: TrainState, masks: Masks, together: Joined) -> Compaction:
    return Compaction(
        together.apply,
        {"params": level.params, "state": level.state},
        {"params": masks, "state": keep_all(level.state)},
        together.inputs,
        fold=False,  # constants that have moved train otherwise
        state=together.new_state,
    )


def _of_params(
    f: Callable, opt_state: Any, params: Any, optimizer: optax.GradientTransformation
) -> Any:  # fmt: skip
    """Map `shrink` or `expand` over what an optimizer's state holds a parameter."""
    if not jax.tree.leaves(opt_state):
        return opt_state
    paths = [f"params/{path}" for path, _ in trees.paths_and_leaves(params)]
    tree = jax.tree.unflatten(jax.tree.structure(params), paths)
    return optax.tree_utils.tree_map_params(
        optimizer, lambda leaf, path: f({path: leaf})[path], opt_state, tree
    )


def elementwise(carry: TrainState, masks: Masks, setup: Setup) -> bool:
    """Tell whether the optimizer updates a weight whatever the others are.

    One that does not, such as LAMB or Adafactor, trains a smaller network otherwise than the masked
    one. The first finite level is updated once whole and once without its pruned units.
    """

    def finite(tree: Any) -> bool:
        return all(np.isfinite(leaf.astype(np.float32)).all() for leaf in jax.tree.leaves(tree))

    def update(opt_state: Any, params: Any, gradients: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return setup.optimizer.update(gradients, opt_state, params)[0]

    found = next((pair for pair in _levels(carry, masks) if finite(pair[0].params)), None)
    if found is None:
        return False
    level, mask = found
    plan = _plan(level, mask, setup.joined)

    def small(tree: Any) -> Any:
        return plan.shrink({"params": tree})["params"]

    # Any gradients will do that are zero where the masks prune.
    gradients = jax.tree.map(
        lambda w, m: np.where(m, 0.01 * np.sin(100 * w), 0).astype(w.dtype), level.params, mask
    )
    expected = small(update(level.opt_state, level.params, gradients))
    try:
        opt_state = _of_params(plan.shrink, level.opt_state, level.params, setup.optimizer)
        updates = update(opt_state, small(level.params), small(gradients))
    # Whatever an optimizer raises of shapes that it did not begin with.
    except (ValueError, TypeError, IndexError, UserWarning):
        return False
    return all(
        np.shape(a) == np.shape(b)
        and np.max(np.abs(np.asarray(a) - np.asarray(b)), initial=0)
        <= _SAME * np.max(np.abs(np.asarray(b)), initial=0)
        for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True)
    )
