"""From a sparsity to exact counts: how many pieces are pruned, and where. Host arithmetic only.

Sparsities come in as numbers, counts go out as int32; `masks` takes them next. A distribution is a
function `(params, granularity, sparsity, **others) -> counts`, here `uniform` and `globally`.
"""

from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxprune.granularity import weight
from jaxprune.types import Counts, Granularity, Params


def num_pruned(size: int, sparsity: Any) -> int:
    r"""Return how many of `size` pieces a sparsity prunes: $\lfloor n s + 1/2 \rfloor$, exactly.

    Args:
        size: number of pieces, at least 0.
        sparsity: in [0, 1]. A float is read by its shortest decimal, so that 0.9 is nine tenths;
            a `Fraction`, `Decimal` or integer is exact.

    Raises:
        ValueError: the size is negative, or the sparsity outside [0, 1] or not a number.
        TypeError: the sparsity is not a concrete real number.

    Example:
        >>> num_pruned(10, 0.9), num_pruned(10, 0.25)
        (9, 3)
    """
    if size < 0:
        raise ValueError(f"size must be at least 0, got {size}")
    return int(size * exact(sparsity) + Fraction(1, 2))


def counts(
    params: Params,
    sparsity: Any,
    *,
    granularity: Granularity | None = None,
    scope: str | Callable[..., Counts] = "layer",
) -> Counts:
    """Return how many pieces are pruned.

    Args:
        params: parameters, or their shapes and dtypes.
        sparsity: in [0, 1], or a sequence of these, one a level.
        granularity: what is pruned as one; by default `granularity.weight()`.
        scope: `layer` prunes the fraction of every leaf's pieces, `global` of all together; or a
            distribution, a function of `params`, `granularity` and `sparsity`.

    Returns:
        Scope `layer`: the tree of the pieces with an int32 a leaf, 0 where nothing is prunable.
        Scope `global`: one int32. Both with a leading levels axis where `sparsity` is a sequence.

    Raises:
        ValueError: a sparsity outside [0, 1], an unknown scope, or an unusable leaf.
        TypeError: a sparsity that is traced.

    Example:
        >>> counts({"bias": jnp.ones(4), "kernel": jnp.ones((5, 4))}, [0.5, 0.9])["kernel"]
        array([10, 18], dtype=int32)
    """
    if isinstance(scope, str):
        check_choice("scope", scope, ("layer", "global"))
        scope = uniform if scope == "layer" else globally
    return scope(params, granularity or weight(), sparsity)


def uniform(params: Params, granularity: Granularity, sparsity: Any, **others: Any) -> Counts:
    """Prune the same fraction of every leaf's pieces.

    Args:
        params: parameters, or their shapes and dtypes.
        granularity: what is pruned as one.
        sparsity: in [0, 1], or a sequence of these, one a level.
        others: scores, problem and batches, which other distributions ask.

    Returns:
        The tree of the pieces, int32, with a leading levels axis if `sparsity` is a sequence.

    Example:
        >>> uniform({"a": jnp.ones((2, 3)), "b": jnp.ones((2, 2))}, weight(), 0.5)
        {'a': np.int32(3), 'b': np.int32(2)}
    """
    pruned = _counter(sparsity)
    return jax.tree.map(lambda pieces: pruned(pieces.size), granularity.cost(params))


def globally(params: Params, granularity: Granularity, sparsity: Any, **others: Any) -> Counts:
    """Prune a fraction of all pieces together, wherever they lie; arguments as of `uniform`.

    Returns:
        One int32, with a leading levels axis if `sparsity` is a sequence.

    Example:
        >>> globally({"a": jnp.ones((2, 3)), "b": jnp.ones((2, 2))}, weight(), 0.5)
        np.int32(5)
    """
    pieces = jax.tree.leaves(granularity.cost(params))
    return _counter(sparsity)(sum(leaf.size for leaf in pieces))


def _counter(sparsity: Any) -> Callable[[int], Any]:
    """Return the function from a number of pieces to their counts, of one level or of several."""
    listed = isinstance(sparsity, Sequence) and not isinstance(sparsity, str)
    many = listed or getattr(sparsity, "ndim", 0) > 0
    targets = [exact(s) for s in (sparsity if many else [sparsity])]

    def count(size: int) -> np.ndarray | np.int32:
        pruned = np.array([num_pruned(size, s) for s in targets], np.int32)
        return pruned if many else pruned[0]

    return count


def exact(sparsity: Any) -> Fraction:
    """Return a sparsity as an exact fraction; a float by its shortest decimal.

    Raises:
        ValueError: it is outside [0, 1] or not a number.
        TypeError: it is traced, or not a real number.
    """
    if isinstance(sparsity, Tracer):
        raise TypeError(
            "sparsity is traced; counts are made of concrete numbers: call `counts` outside of "
            "jit and pass its counts to `masks_at`, which can be traced"
        )
    if isinstance(sparsity, str):
        raise TypeError(f"sparsity must be a number in [0, 1], got {sparsity!r}")
    if isinstance(sparsity, Fraction):
        value = sparsity
    else:
        try:
            value = Fraction(Decimal(str(sparsity)))
        except (ArithmeticError, ValueError, OverflowError):
            number = isinstance(sparsity, int | float | np.floating | Decimal)
            kind = ValueError if number else TypeError
            raise kind(f"sparsity must be a number in [0, 1], got {sparsity!r}") from None
    if not 0 <= value <= 1:
        raise ValueError(f"sparsity must be in [0, 1], got {sparsity}")
    return value


def check_choice(name: str, given: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError, naming the choices, where `given` is not one of them."""
    if given not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {given!r}")
