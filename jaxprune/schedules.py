"""From the step to the sparsity: how far the network is pruned after which steps.

Host arithmetic in exact fractions. A schedule is a dict from a step to the sparsity that an update
of the masks after it brings; `transforms` takes it, and `distribution.counts` turns it into counts.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from jaxprune.distribution import exact

Schedule = dict[int, Fraction]


def cubic(target: Any, *, begin: int, end: int, every: int = 1) -> Schedule:
    r"""Return the sparsities $s(t) = k (1 - (1 - t)^3)$: much at first, little at last.

    Args:
        target: k, in [0, 1]; reached exactly at the last update.
        begin: the step of the first update, at least 0.
        end: no update comes after it; the last is at the last multiple of `every` after `begin`.
        every: steps between updates.

    Returns:
        Step -> sparsity. t goes from 0 at the first update to 1 at the last; where there is only
        one it brings the target.

    Raises:
        ValueError: a target outside [0, 1], an end before the beginning, or `every` below 1.

    Example:
        >>> {step: float(s) for step, s in cubic(0.8, begin=10, end=35, every=10).items()}
        {10: 0.0, 20: 0.7, 30: 0.8}

    Reference:
        Zhu, Gupta. To prune, or not to prune. ICLR 2018 workshop. Their schedule starts from an
        initial sparsity, here 0.
    """
    return _schedule(cubic_share, target, begin, end, every)


def linear(target: Any, *, begin: int, end: int, every: int = 1) -> Schedule:
    """Return sparsities that rise evenly, $s(t) = k t$; arguments as of `cubic`.

    Example:
        >>> [float(s) for s in linear(0.8, begin=0, end=2).values()]
        [0.0, 0.4, 0.8]
    """
    return _schedule(lambda t: t, target, begin, end, every)


def cosine(target: Any, *, begin: int, end: int, every: int = 1) -> Schedule:
    r"""Return $s(t) = k (1 - \cos(\pi t)) / 2$, slow at both ends; arguments as of `cubic`.

    Example:
        >>> [round(float(s), 3) for s in cosine(0.8, begin=0, end=4).values()]
        [0.0, 0.117, 0.4, 0.683, 0.8]
    """

    def share(t: Fraction) -> Fraction:
        return t if t in (0, 1) else Fraction((1 - math.cos(math.pi * t)) / 2)

    return _schedule(share, target, begin, end, every)


def geometric(target: Any, *, begin: int, end: int, every: int = 1) -> Schedule:
    """Return sparsities of which each update keeps the same share; arguments as of `cubic`.

    Raises:
        ValueError: as of `cubic`, or a target of 1, which no share leads to.

    Example:
        >>> [round(float(s), 3) for s in geometric(0.75, begin=0, end=2).values()]
        [0.0, 0.5, 0.75]
    """
    whole = exact(target)
    if whole == 1:
        raise ValueError("a geometric schedule keeps a share each time: the target must be < 1")

    def share(t: Fraction) -> Fraction:
        if t in (0, 1) or not whole:
            return t
        return Fraction(1 - float(1 - whole) ** float(t)) / whole

    return _schedule(share, target, begin, end, every)


def constant(target: Any, *, begin: int = 0, end: int, every: int = 1) -> Schedule:
    """Return one sparsity at every update, for rules that move it; arguments as of `cubic`.

    Example:
        >>> [*constant(0.9, end=250, every=100)]
        [0, 100, 200]
    """
    return _schedule(lambda t: Fraction(1), target, begin, end, every)


def one_shot_at(target: Any, step: int) -> Schedule:
    """Return the target after one step, and nothing before; arguments as of `cubic`.

    Example:
        >>> one_shot_at(0.5, 100)
        {100: Fraction(1, 2)}
    """
    return _schedule(lambda t: t, target, step, step, 1)


def cubic_share(progress: Fraction) -> Fraction:
    """Return the share of the target that `cubic` has at some progress.

    Raises:
        ValueError: progress outside [0, 1].
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be in [0, 1], got {progress}")
    return 1 - (1 - progress) ** 3


def update_steps(num_steps: int, num_updates: int) -> dict[int, Fraction]:
    """Spread updates evenly over steps; the last one comes before the last step.

    Args:
        num_steps: steps of the pruning phase, at least 1.
        num_updates: updates wanted, at least 1. Where there are fewer steps than updates, the
            last of those that fall on a step is made.

    Returns:
        The step before which an update is made -> the progress it brings, 1 at the last.

    Example:
        >>> update_steps(4, 2)
        {0: Fraction(1, 2), 2: Fraction(1, 1)}
    """
    if num_steps < 1 or num_updates < 1:
        raise ValueError(f"steps and updates must be at least 1, got {num_steps}, {num_updates}")
    return {u * num_steps // num_updates: Fraction(u + 1, num_updates) for u in range(num_updates)}


def _schedule(
    share: Callable[[Fraction], Fraction], target: Any, begin: int, end: int, every: int
) -> Schedule:
    whole = exact(target)
    if begin < 0 or end < begin:
        raise ValueError(f"a schedule begins at 0 or later and ends no earlier: got {begin}, {end}")
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    steps = range(begin, end + 1, every)
    last = len(steps) - 1
    return {
        step: whole * share(Fraction(i, last) if last else Fraction(1))
        for i, step in enumerate(steps)
    }
