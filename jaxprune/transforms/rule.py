"""What a rule of sparse training is, and what all rules share: criteria, counts, selection.

A schedule comes in; `sparsify` asks a rule which weights are kept after which step.
"""

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import criteria, distribution
from jaxprune.granularity import weight
from jaxprune.masks import keep_all, masks_at
from jaxprune.types import Array, Batch, Counts, Granularity, Key, Masks, Params, Problem, Scores


class Seen(NamedTuple):
    """What a rule sees when masks are due.

    Attributes:
        masks: so far.
        params: after the optimizer's update.
        gradients: of the batch, at the parameters before it; of pruned weights too.
        index: which update of the schedule it is, from 0.
        key: a random key of this update.
    """

    masks: Masks
    params: Params
    gradients: Params
    index: Array
    key: Key


class Rule(NamedTuple):
    """Which weights are kept when.

    Attributes:
        steps: after which steps masks are updated, rising; known when the program is traced.
        init: `init(params, key) -> (masks, state)`, on the host; the state holds values only, such
            as the counts of all updates, so that other levels are other values.
        update: `update(state, seen) -> (masks, state)`, traceable.
        dense: whether the parameters stay dense, and `forward` alone is sparse.
        gradients: `gradients(masks, params, gradients) -> gradients`, of what the optimizer sees;
            None: those of kept weights, or all where the parameters stay dense.
    """

    steps: tuple[int, ...]
    init: Callable[[Params, Key], tuple[Masks, Any]]
    update: Callable[[Any, Seen], tuple[Masks, Any]]
    dense: bool = False
    gradients: Callable[[Masks, Params, Params], Params] | None = None


Chosen = str | Callable | criteria.Criterion
"""A criterion: its name, a function of one's own, or what `criterion` made of it."""


class Choice(NamedTuple):
    """What is pruned as one, how a sparsity is shared out, and what is worth least.

    Attributes:
        criterion: gives scores.
        granularity: what is pruned as one.
        scope: of `counts`.
    """

    criterion: criteria.Criterion
    granularity: Granularity
    scope: Any

    def counts(self, params: Params, schedule: Mapping[int, Any]) -> Counts:
        """Return the counts of all updates, NumPy, (updates,)."""
        options: dict[str, Any] = {"granularity": self.granularity, "scope": self.scope}
        found = distribution.counts(params, [*schedule.values()], **options)
        sizes = [leaf.size for leaf in jax.tree.leaves(self.granularity.cost(params))]
        if not sum(sizes):
            raise ValueError(
                f"no leaf of the parameters can be pruned by {self.granularity.name}: give a "
                "granularity that has some, such as jp.weight(prunable)"
            )
        return found

    def scores(self, seen: Seen) -> Scores:
        """Return the scores of parameters, which may ask for the batch's gradients."""
        return self.criterion.scores(
            seen.params, _linear(seen.gradients), Batch(None, None, seen.key)
        )

    def select(self, seen: Seen, counts: Counts, *, within: bool) -> Masks:
        """Return masks of some counts."""
        last = seen.masks if within else None
        return masks_at(self.scores(seen), counts, granularity=self.granularity, within=last)


def choice(chosen: Chosen, granularity: Granularity | None, scope: Any) -> Choice:
    """Return what a rule's arguments choose.

    Raises:
        ValueError: an unknown criterion.
        TypeError: no criterion.
    """
    found = criteria.resolve(chosen)
    if not isinstance(found, criteria.Criterion):
        raise TypeError(f"{found.name} corrects weights, and a rule of training takes scores alone")
    return Choice(found, granularity or weight(), scope)


def at(counts: Counts, index: Any) -> Counts:
    """Return the counts of an update."""
    return jax.tree.map(lambda count: jnp.asarray(count)[index], counts)


def checked(schedule: Mapping[int, Any]) -> dict[int, Any]:
    """Return a schedule with its steps in order.

    Raises:
        ValueError: it is empty, or a step is negative.
    """
    if not schedule or min(schedule) < 0:
        raise ValueError(f"a schedule has steps of at least 0, one at least, got {[*schedule]}")
    return dict(sorted(schedule.items()))


def at_first(params: Params, key: Key) -> Seen:
    """Return what a rule sees of parameters before they are trained: no gradients."""
    nothing = jax.tree.map(jnp.zeros_like, params)
    return Seen(keep_all(params), params, nothing, jnp.zeros((), jnp.int32), key)


def constant_of(schedule: Mapping[int, Any]) -> Fraction:
    """Return the one sparsity of a schedule.

    Raises:
        ValueError: it has several.
    """
    found = {distribution.exact(value) for value in schedule.values()}
    if len(found) > 1:
        shown = ", ".join(f"{float(value):g}" for value in sorted(found))
        raise ValueError(f"the rule keeps one sparsity, and the schedule has {shown}: use constant")
    return found.pop()


def _linear(gradients: Params) -> Problem:
    """Return the problem whose loss has the gradients given, and nothing else."""

    def apply(params: Params, x: Any) -> Any:
        raise ValueError("a criterion of a rule sees parameters, gradients and a key, no inputs")

    def losses(params: Params, batch: Batch) -> Array:
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(gradients), strict=True)
        total = sum(
            (jnp.sum(w.astype(jnp.float32) * g.astype(jnp.float32)) for w, g in pairs),
            jnp.zeros(()),
        )
        return total[None]

    return Problem(apply, losses)
