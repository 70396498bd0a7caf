"""The levels on their way through a study: a list of parts, each with a leading levels axis.

Under masks all levels are one part. Once their masks have pruned units and stay, each level is a
part of its own, a smaller network that trains and scores as the masked one does.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxprune import trees
from jaxprune.data import Split
from jaxprune.structure import Compaction
from jaxprune.study.programs import Pair, Programs
from jaxprune.study.setup import Setup
from jaxprune.train import TrainState
from jaxprune.types import Masks

_SAME = 1e-5  # relative: what an elementwise optimizer may differ by when it sees fewer weights


class Part(NamedTuple):
    """Levels that run in one program.

    Attributes:
        carry: parameters, state and optimizer state; leaves with a levels axis.
        masks: likewise.
        plan: what is left of a network, of one level; None: the whole network, under masks.
    """

    carry: TrainState
    masks: Masks
    plan: Compaction | None = None


def programs_of(part: Part, setup: Setup, programs: Programs) -> Pair:
    """Return how a part is trained and scored."""
    plan = part.plan
    if plan is None:
        return programs.whole
    return programs.smaller(plan.signature, lambda: setup.joined.network(plan))


def train(
    parts: Sequence[Part], setup: Setup, programs: Programs, *args: Any
) -> tuple[list[Part], np.ndarray, float]:
    """Train all levels; `args` are what they share, from `x` on (see `train.make_train`).

    Returns:
        The parts, the losses, (levels, steps), and the seconds without compiling.
    """
    trained, losses, seconds = [], [], 0.0
    for part in parts:
        f = programs_of(part, setup, programs).train
        (carry, found), elapsed = programs.clock.time(f, part.carry, part.masks, *args)
        trained.append(part._replace(carry=carry))
        losses.append(np.asarray(found))
        seconds += elapsed
    return trained, np.concatenate(losses), seconds


def score(
    parts: Sequence[Part], setup: Setup, programs: Programs, reference: Any
) -> tuple[dict[str, np.ndarray], Any, float]:
    """Score all levels.

    Returns:
        The metrics with a levels axis; the predictions where `reference` is None; and the seconds
        without compiling.
    """
    val, test = (Split(*split) for split in (setup.data.val, setup.data.test))
    metrics, predictions, seconds = [], None, 0.0
    for part in parts:
        f, (params, state, _) = programs_of(part, setup, programs).score, part.carry
        (found, predictions), elapsed = programs.clock.time(
            f, params, state, part.masks, val, test, reference
        )
        metrics.append(jax.tree.map(np.asarray, found))
        seconds += elapsed
    return jax.tree.map(lambda *values: np.concatenate(values), *metrics), predictions, seconds


def compact(carry: TrainState, masks: Masks, setup: Setup) -> list[Part]:
    """Return every level as what its masks leave of the network.

    Args:
        carry: of all levels; the optimizer's state may be ().
        masks: likewise.
        setup: the study.
    """
    levels = zip(*(trees.unstack(jax.device_get(tree)) for tree in (carry, masks)), strict=True)
    return [_smaller(level, mask, setup) for level, mask in levels]


def _smaller(level: TrainState, masks: Masks, setup: Setup) -> Part:
    together = setup.joined
    whole = jax.tree.map(lambda leaf: np.ones(np.shape(leaf), bool), level.state)
    plan = Compaction(
        together.apply,
        {"params": level.params, "state": level.state},
        {"params": masks, "state": whole},
        together.inputs,
        fold=False,  # constants that have moved train otherwise
        state=together.new_state,
    )
    opt_state = _of_params(plan.shrink, level.opt_state, level.params, setup.optimizer)
    carry = TrainState(plan.params["params"], plan.params["state"], opt_state)
    carry, kept = trees.stack([(carry, plan.masks["params"])])
    return Part(carry, kept, plan)


def expand(parts: Sequence[Part], setup: Setup) -> TrainState:
    """Return all levels, whole, with a levels axis; what was removed is zero."""
    if parts[0].plan is None:
        return parts[0].carry
    levels = []
    for part in parts:
        plan = part.plan
        assert plan is not None
        (small,) = trees.unstack(part.carry)
        full = plan.expand({"params": small.params, "state": small.state})
        opt_state = _of_params(plan.expand, small.opt_state, small.params, setup.optimizer)
        levels.append(TrainState(full["params"], full["state"], opt_state))
    return trees.stack(levels)


def _of_params(
    f: Any, opt_state: Any, params: Any, optimizer: optax.GradientTransformation
) -> Any:  # fmt: skip
    """Map `shrink` or `expand` over what an optimizer's state holds a parameter."""
    if not jax.tree.leaves(opt_state):
        return opt_state
    paths = [f"params/{path}" for path, _ in trees.paths_and_leaves(params)]
    tree = jax.tree.unflatten(jax.tree.structure(params), paths)
    return optax.tree_utils.tree_map_params(
        optimizer, lambda leaf, path: f({path: leaf})[path], opt_state, tree
    )


def _sum(tree: Any) -> float:
    return sum(float(np.sum(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree))


def elementwise(carry: TrainState, masks: Masks, setup: Setup) -> bool:
    """Tell whether the optimizer updates a weight whatever the others are.

    One that does not, such as LAMB or Adafactor, trains a smaller network otherwise than the masked
    one. The first finite level is updated once whole and once without its pruned units.
    """
    levels = zip(*(trees.unstack(jax.device_get(tree)) for tree in (carry, masks)), strict=True)
    finite = (pair for pair in levels if np.isfinite(_sum(pair[0].params)))
    if (found := next(finite, None)) is None:
        return False
    level, mask = found
    optimizer = setup.optimizer

    def update(level: TrainState, gradients: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = optimizer.update(gradients, level.opt_state, level.params)
        return updates

    # Any gradients will do that are zero where the masks prune.
    gradients = jax.tree.map(
        lambda w, m: np.where(m, 0.01 * np.sin(100 * w), 0), level.params, mask
    )
    gradients = jax.tree.map(lambda g, w: g.astype(w.dtype), gradients, level.params)
    try:
        part = _smaller(level, mask, setup)
        (small,), plan = trees.unstack(part.carry), part.plan
        assert plan is not None
        tree = {"expected": update(level, gradients), "gradients": gradients}
        shrunk = {name: plan.shrink({"params": of})["params"] for name, of in tree.items()}
        found = update(small, shrunk["gradients"])
    # Whatever an optimizer raises of shapes that it did not begin with.
    except (ValueError, TypeError, IndexError, UserWarning):
        return False
    return all(
        np.shape(a) == np.shape(b)
        and np.max(np.abs(np.asarray(a) - np.asarray(b)), initial=0)
        <= _SAME * np.max(np.abs(np.asarray(b)), initial=0)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(shrunk["expected"]), strict=True)
    )
