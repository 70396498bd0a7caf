"""Rules that keep one sparsity and move it: some weights go, and as many come back elsewhere."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import distribution
from jaxprune.masks import alive_pieces, keep_pieces
from jaxprune.transforms.rule import (
    Choice,
    Rule,
    Seen,
    at,
    at_first,
    checked,
    choice,
    constant_of,
)
from jaxprune.types import Array, Counts, Granularity, Key, Masks, Params, Pieces


def set(
    schedule: Mapping[int, Any], *, drop: float = 0.3, granularity: Granularity | None = None,
    scope: Any = "erk",
) -> Rule:  # fmt: skip
    """Let the smallest weights go, and as many others, drawn at random, come back as zeros.

    Args:
        schedule: one sparsity, and after which steps masks are updated; see `schedules.constant`.
        drop: the share of the kept weights that goes, in (0, 1].
        granularity: what is pruned as one; by default `granularity.weight()`.
        scope: of `counts`; which weights are kept at first is drawn at random.

    Raises:
        ValueError: several sparsities, or a share outside (0, 1].

    Example:
        >>> rule = set(jp.constant(0.9, end=7_500, every=100))

    Reference:
        Mocanu et al. Scalable training of artificial neural networks with adaptive sparse
        connectivity inspired by network science. Nature Communications 2018. There of positive and
        negative weights each as many go, and what comes back is drawn, too.
    """
    return _moving(schedule, lambda progress: drop, _drawn, drop, granularity, scope)


def rigl(
    schedule: Mapping[int, Any], *, drop: float = 0.3, granularity: Granularity | None = None,
    scope: Any = "erk",
) -> Rule:  # fmt: skip
    r"""Let the smallest weights go, and those of largest gradient come back as zeros.

    Of the kept weights the share $\frac{\alpha}{2} (1 + \cos(\pi t / t_{end}))$ goes, $t$ the step
    and $t_{end}$ the schedule's last. The gradient is the batch's, of the sparse network by all
    weights; with `optax.MultiSteps` outside it is the accumulated one. What has gone may come back
    at once.

    Args:
        schedule: one sparsity, and after which steps masks are updated; see `schedules.constant`.
        drop: $\alpha$, in (0, 1].
        granularity: what is pruned as one; by default `granularity.weight()`.
        scope: of `counts`; which weights are kept at first is drawn at random.

    Raises:
        ValueError: several sparsities, or a share outside (0, 1].

    Example:
        >>> rule = rigl(jp.constant(0.9, end=7_500, every=100))

    Reference:
        Evci, Gale, Menick, Castro, Elsen. Rigging the Lottery: Making All Tickets Winners. ICML
        2020. There a step that updates masks trains no weights; here it does both.
    """

    def share(progress: float) -> float:
        return drop / 2 * (1 + math.cos(math.pi * progress))

    return _moving(schedule, share, _steepest, drop, granularity, scope)


def _drawn(chosen: Choice, seen: Seen) -> Pieces:
    pieces = chosen.granularity.rank(jax.tree.map(jnp.abs, seen.params))
    leaves, tree = jax.tree.flatten(pieces)
    keys = jax.random.split(seen.key, max(len(leaves), 1))
    drawn = [jax.random.uniform(key, x.shape) for key, x in zip(keys, leaves, strict=False)]
    return jax.tree.unflatten(tree, drawn)


def _steepest(chosen: Choice, seen: Seen) -> Pieces:
    return chosen.granularity.rank(jax.tree.map(jnp.abs, seen.gradients))


def _moving(
    schedule: Mapping[int, Any], share: Any, grown: Any, drop: float,
    granularity: Granularity | None, scope: Any,
) -> Rule:  # fmt: skip
    """Return the rule that lets a share of the weights go at each update, and `grown` come back."""
    if not 0 < drop <= 1:
        raise ValueError(f"drop must be in (0, 1], got {drop}")
    schedule = checked(schedule)
    chosen, sparsity = choice("random", granularity, scope), constant_of(schedule)
    last = max(schedule)
    shares = [share(step / last if last else 1.0) for step in schedule]

    def init(params: Params, key: Key) -> tuple[Masks, Any]:
        counts = jax.tree.map(lambda n: n[0], chosen.counts(params, {0: sparsity}))
        sizes = jax.tree.map(lambda cost: cost.size, chosen.granularity.cost(params))
        if jax.tree.structure(counts) != jax.tree.structure(sizes):
            sizes = sum(jax.tree.leaves(sizes))
        goes = jax.tree.map(
            lambda n, count: np.array(
                [distribution.num_pruned(n - int(count), s) for s in shares], np.int32
            ),
            sizes, counts,
        )  # fmt: skip
        return chosen.select(at_first(params, key), counts, within=False), (counts, goes)

    def update(state: Any, seen: Seen) -> tuple[Masks, Any]:
        (counts, goes), granularity = state, chosen.granularity
        more: Counts = jax.tree.map(lambda a, b: a + b, counts, at(goes, seen.index))
        sizes = granularity.rank(jax.tree.map(jnp.abs, seen.params))
        alive = alive_pieces(seen.masks, seen.params, granularity)
        left = keep_pieces(sizes, more, granularity, alive)
        pieces = jax.tree.map(_above, left, grown(chosen, seen))
        return granularity.spread(keep_pieces(pieces, counts, granularity), seen.params), state

    return Rule((*schedule,), init, update)


def _above(kept: Array, scores: Array) -> Array:
    """Return scores with what is kept above all others."""
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    return jnp.where(kept, np.inf, jnp.minimum(scores, jnp.finfo(scores.dtype).max))
