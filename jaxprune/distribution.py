"""From a sparsity to exact counts: how many pieces are pruned, and where. Host arithmetic only.

Sparsities come in as numbers, counts go out as int32; `masks` takes them next. A distribution is a
function `(params, granularity, sparsity, **others) -> counts`, here `uniform`, `globally`, `erk`
and what `own` makes; those that look at data are in `criteria.allocation`.
"""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxprune import trees
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
    **others: Any,
) -> Counts:
    """Return how many pieces are pruned.

    Args:
        params: parameters, or their shapes and dtypes.
        sparsity: in [0, 1], or a sequence of these, one a level.
        granularity: what is pruned as one; by default `granularity.weight()`.
        scope: `layer` prunes the fraction of every leaf's pieces, `global` of all together, `erk`
            as `erk` shares them out; or a distribution, a function of `params`, `granularity`,
            `sparsity` and `others`.
        others: `problem`, `batch` and `scores`, where a distribution looks at them.

    Returns:
        The tree of the pieces with an int32 a leaf, 0 where nothing is prunable; of scope `global`
        one int32. With a leading levels axis where `sparsity` is a sequence.

    Raises:
        ValueError: a sparsity outside [0, 1] or that the granularity does not have, an unknown
            scope, or an unusable leaf.
        TypeError: a sparsity that is traced.

    Example:
        >>> counts({"bias": jnp.ones(4), "kernel": jnp.ones((5, 4))}, [0.5, 0.9])["kernel"]
        array([10, 18], dtype=int32)
    """
    if isinstance(scope, str):
        check_choice("scope", scope, tuple(_SCOPES))
        scope = _SCOPES[scope]
    granularity = granularity or weight()
    found = scope(params, granularity, sparsity, **others)
    if granularity.within is not None:
        _check_windows(found, granularity, params)
    return found


def _check_windows(found: Counts, granularity: Granularity, params: Params) -> None:
    """Raise ValueError, naming the leaf, where counts are not those of windows."""
    n, m = granularity.within or (0, 1)
    pieces = granularity.cost(params)
    if jax.tree.structure(found) != jax.tree.structure(pieces):
        raise ValueError(f"granularity {granularity.name} needs counts of every leaf: scope layer")
    for (path, leaf), count in zip(
        trees.paths_and_leaves(pieces), jax.tree.leaves(found), strict=True
    ):
        if not np.isin(count, (0, leaf.size // m * (m - n))).all():
            raise ValueError(
                f"granularity {granularity.name} prunes nothing of leaf {path!r} or "
                f"{100 * (m - n) / m:g}%, and that is not what is asked for"
            )


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


def erk(params: Params, granularity: Granularity, sparsity: Any, **others: Any) -> Counts:
    r"""Prune small layers less: Erdős-Rényi, with kernels.

    Of a leaf of shape $(n_1, n_2, \dots)$ the share that stays is $\min(1, \epsilon \sum_i n_i /
    \prod_i n_i)$, with $\epsilon$ such that all leaves together have the sparsity. Arguments are
    those of `uniform`.

    Returns:
        The tree of the pieces, int32, which sum up to what `globally` prunes; of levels asked for
        together, none prunes less of a leaf than a lower one.

    Raises:
        ValueError: pieces that are of no single leaf, as groups are.

    Example:
        >>> erk({"a": jnp.ones((2, 2)), "b": jnp.ones((8, 8))}, weight(), 0.5)
        {'a': np.int32(0), 'b': np.int32(34)}

    Reference:
        Mocanu et al. Scalable training of artificial neural networks with adaptive sparse
        connectivity inspired by network science. Nature Communications 2018; Evci, Gale, Menick,
        Castro, Elsen. Rigging the Lottery: Making All Tickets Winners. ICML 2020, with kernels.
    """
    pieces = granularity.cost(params)
    if jax.tree.structure(pieces) != jax.tree.structure(params):
        raise ValueError(
            f"scope erk shares weights out among leaves, and pieces of granularity "
            f"{granularity.name} are of several"
        )
    sizes = np.array([leaf.size for leaf in jax.tree.leaves(pieces)])
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(params)]
    share = np.array([sum(shape) / max(np.prod(shape), 1) for shape in shapes]) * sizes

    def wanted(target: float) -> np.ndarray:
        whole = sizes == 0
        while not whole.all():
            left = sizes.sum() * (1 - target) - sizes[whole].sum()
            scale = max(left, 0) / share[~whole].sum()
            more = ~whole & (scale * share > sizes)
            if not more.any():
                return np.where(whole, 0, sizes - scale * share)
            whole |= more
        return np.zeros(sizes.shape)

    return shared(pieces, sparsity, wanted)


def own(
    sparsities: Mapping[str, Any] | Callable[[str, Fraction], Any],
) -> Callable[..., Counts]:
    """Return the distribution that prunes of every leaf what one says.

    Args:
        sparsities: by path, or by a pattern such as `block_*/mlp/*`, of which the first that fits
            counts, a number in [0, 1], used at every level; what no pattern fits is pruned
            uniformly. Or a function of the path and the level as a fraction that returns it.

    Returns:
        A distribution; it raises ValueError for a pattern that fits nothing.

    Example:
        >>> scope = own({"a": 0.25})
        >>> counts({"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}, 0.5, scope=scope)
        {'a': np.int32(1), 'b': np.int32(2)}
    """

    def distribution(
        params: Params, granularity: Granularity, sparsity: Any, **others: Any
    ) -> Counts:
        pieces = granularity.cost(params)
        paths = [path for path, leaf in trees.paths_and_leaves(pieces) if leaf.size]
        patterns = [] if callable(sparsities) else [*sparsities]
        for pattern in patterns:
            if not fnmatch.filter(paths, pattern):
                raise ValueError(f"{pattern!r} fits none of what is pruned: {', '.join(paths)}")

        def asked(path: str, level: Fraction) -> Any:
            if callable(sparsities):
                return sparsities(path, level)
            fits = (value for key, value in sparsities.items() if fnmatch.fnmatch(path, key))
            return next(fits, level)

        targets, many = _targets(sparsity)
        found = [
            np.array([num_pruned(leaf.size, asked(path, level)) for level in targets], np.int32)
            for path, leaf in trees.paths_and_leaves(pieces)
        ]
        tree = jax.tree.structure(pieces)
        return jax.tree.unflatten(tree, found if many else [each[0] for each in found])

    return distribution


def shared(pieces: Any, sparsity: Any, wanted: Callable[[float], np.ndarray]) -> Counts:
    """Return whole counts near what is wanted, which sum up to those of all pieces together.

    Args:
        pieces: their costs, a tree.
        sparsity: as of `counts`.
        wanted: how many of each leaf are to go, real numbers, of a level.

    Returns:
        The tree of the pieces; a leaf's counts never fall as levels rise.
    """
    leaves, tree = jax.tree.flatten(pieces)
    sizes = np.array([leaf.size for leaf in leaves], int)
    targets, many = _targets(sparsity)
    found, before = np.zeros((len(targets), len(leaves)), np.int32), np.zeros(len(leaves), int)
    for i in sorted(range(len(targets)), key=targets.__getitem__):
        room = np.clip(wanted(float(targets[i])) - before, 0, sizes - before)
        more = np.floor(room).astype(int)
        missing = num_pruned(int(sizes.sum()), targets[i]) - before.sum() - more.sum()
        while missing:  # those nearest to one more go first, or to one less
            able = np.flatnonzero(more < sizes - before if missing > 0 else more > 0)
            order = able[np.argsort(-np.sign(missing) * (room - more)[able], kind="stable")]
            chosen = order[: abs(missing)]
            more[chosen] += np.sign(missing)
            missing -= np.sign(missing) * len(chosen)
        before = before + more
        found[i] = before
    return jax.tree.unflatten(tree, [*found.T] if many else [*found[0]])


def _counter(sparsity: Any) -> Callable[[int], Any]:
    """Return the function from a number of pieces to their counts, of one level or of several."""
    targets, many = _targets(sparsity)

    def count(size: int) -> np.ndarray | np.int32:
        pruned = np.array([num_pruned(size, s) for s in targets], np.int32)
        return pruned if many else pruned[0]

    return count


def _targets(sparsity: Any) -> tuple[list[Fraction], bool]:
    """Return sparsities as exact fractions, and whether they are several."""
    listed = isinstance(sparsity, Sequence) and not isinstance(sparsity, str)
    many = listed or getattr(sparsity, "ndim", 0) > 0
    return [exact(s) for s in (sparsity if many else [sparsity])], many


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


_SCOPES = {"layer": uniform, "global": globally, "erk": erk}
