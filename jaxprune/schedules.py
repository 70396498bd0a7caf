"""From the step to the sparsity: how far the network is pruned at each update.

Host arithmetic in exact fractions; `sparsity.counts` turns its values into counts.
"""

from fractions import Fraction


def cubic(target: Fraction, progress: Fraction) -> Fraction:
    r"""Return the sparsity $s(t) = k (1 - (1 - t)^3)$ on the way from 0 to the target.

    Args:
        target: the final sparsity k, in [0, 1].
        progress: t, in [0, 1].

    Raises:
        ValueError: progress outside [0, 1].

    Example:
        >>> cubic(Fraction(8, 10), Fraction(1, 2))
        Fraction(7, 10)

    Reference:
        Zhu, Gupta. To prune, or not to prune. ICLR 2018 workshop. Their schedule starts from an
        initial sparsity, here 0.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be in [0, 1], got {progress}")
    return target * (1 - (1 - progress) ** 3)


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
