"""Rules that prune: once, along a schedule, or anew at each step from dense weights."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.masks import keep_all
from jaxprune.transforms.rule import (
    Chosen,
    Rule,
    Seen,
    at,
    at_first,
    checked,
    choice,
    constant_of,
)
from jaxprune.types import Granularity, Key, Masks, Params


def static(
    sparsity: Any, *, criterion: Chosen = "random", granularity: Granularity | None = None,
    scope: Any = "layer",
) -> Rule:  # fmt: skip
    """Prune the initial parameters once, and train what is left.

    Args:
        sparsity: in [0, 1].
        criterion: of the parameters alone; by default weights are drawn at random.
        granularity: what is pruned as one; by default `granularity.weight()`.
        scope: of `counts`, such as `layer`, `erk` or `global`.

    Raises:
        ValueError: a sparsity outside [0, 1], or, from `init`, nothing is prunable.

    Example:
        >>> rule = static(0.9, scope="erk")

    Reference:
        The baseline of Mocanu et al. 2018 and Evci et al. 2020.
    """
    chosen, schedule = choice(criterion, granularity, scope), checked({0: sparsity})

    def init(params: Params, key: Key) -> tuple[Masks, Any]:
        seen = at_first(params, key)
        return chosen.select(seen, at(chosen.counts(params, schedule), 0), within=False), ()

    return Rule((), init, lambda state, seen: (seen.masks, state))


def gradual(
    schedule: Mapping[int, Any], *, criterion: Chosen = "magnitude",
    granularity: Granularity | None = None, scope: Any = "layer",
) -> Rule:  # fmt: skip
    """Prune more and more while training, along a schedule; what is pruned stays so.

    Args:
        schedule: the sparsity after some steps, such as `schedules.cubic` makes it.
        criterion: of the parameters, and of the batch's gradients if it asks for them.
        granularity: what is pruned as one; by default `granularity.weight()`.
        scope: of `counts`.

    Raises:
        ValueError: no step, or, from `init`, nothing is prunable.

    Example:
        >>> rule = gradual(jp.cubic(0.9, begin=1_000, end=8_000, every=100))

    Reference:
        Zhu, Gupta. To prune, or not to prune: exploring the efficacy of pruning for model
        compression. ICLR 2018 workshop.
    """
    chosen, schedule = choice(criterion, granularity, scope), checked(schedule)

    def init(params: Params, key: Key) -> tuple[Masks, Any]:
        return keep_all(params), chosen.counts(params, schedule)

    def update(counts: Any, seen: Seen) -> tuple[Masks, Any]:
        return chosen.select(seen, at(counts, seen.index), within=True), counts

    return Rule((*schedule,), init, update)


def ste(
    schedule: Mapping[int, Any], *, criterion: Chosen = "magnitude",
    granularity: Granularity | None = None, scope: Any = "layer", decay: float = 0.0,
) -> Rule:  # fmt: skip
    r"""Keep dense parameters, and run the network with the largest of them: `forward`.

    The gradient of the sparse network is applied to all parameters, as if pruning were the
    identity, and the masks follow. With a decay, $\lambda w$ is added to it where weights are
    pruned, so that they settle.

    Args:
        schedule: one sparsity, and after which steps masks are updated; see `schedules.constant`.
        criterion: of the parameters.
        granularity: what is pruned as one, such as `granularity.n_m(2, 4)`.
        scope: of `counts`.
        decay: $\lambda$.

    Raises:
        ValueError: several sparsities, or a negative decay.

    Example:
        >>> rule = ste(jp.constant(0.5, end=1_000), decay=2e-4)

    Reference:
        Bengio, Léonard, Courville. Estimating or propagating gradients through stochastic neurons.
        2013; Zhou et al. Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch.
        ICLR 2021, with the decay, as SR-STE.
    """
    if decay < 0:
        raise ValueError(f"decay must be at least 0, got {decay}")
    schedule = checked(schedule)
    chosen, first = choice(criterion, granularity, scope), {0: constant_of(schedule)}

    def init(params: Params, key: Key) -> tuple[Masks, Any]:
        counts = chosen.counts(params, first)
        seen = at_first(params, key)
        return chosen.select(seen, at(counts, 0), within=False), counts

    def update(counts: Any, seen: Seen) -> tuple[Masks, Any]:
        return chosen.select(seen, at(counts, 0), within=False), counts

    def gradients(masks: Masks, params: Params, found: Params) -> Params:
        return jax.tree.map(
            lambda g, w, m: g + jnp.where(m, jnp.zeros_like(g), decay * w.astype(g.dtype)),
            found, params, masks,
        )  # fmt: skip

    steps = (*schedule,)
    return Rule(steps, init, update, dense=True, gradients=gradients if decay else None)
