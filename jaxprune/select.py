"""The exact smallest elements of an array, for many counts at once, under `jit`.

Flat scores and counts come in, masks of what is kept go out; `masks` gives them their shapes.
A count is a value, not a constant of the program, so levels, seeds and criteria can be vmapped.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.types import Array

_SORT_BELOW = 30_000  # elements; measured on a CPU, below it one int32 sort beats five passes
_INDEX_BITS = 11
_FIRST_ALIVE = 1 << 22  # below the bits of -inf, by `_ordered_bits`
_STRIDE = 40503  # odd, so that the dead take turns in all digits


@jax.jit
def keep_largest(scores: Array, counts: Array, alive: Array | None = None) -> Array:
    """Keep all but the `counts` smallest scores; among equal ones the lower index goes first.

    Scores are ordered as numbers; -0 equals 0, and NaN is lowest.

    Args:
        scores: (n,) real numbers, n at least 1.
        counts: (levels,) int32 in [0, n].
        alive: (n,) bool; what is not goes before all else, in an order of its own.

    Returns:
        (levels, n) bool with exactly `counts` False in each row; rows are nested.

    Example:
        >>> keep_largest(jnp.array([3.0, 1.0, 2.0]), jnp.array([0, 2])).tolist()
        [[True, True, True], [True, False, False]]
    """
    bits = _ordered_bits(scores)
    if alive is not None:
        # -inf has higher bits than the dead, NaN gets them. Were all dead one value, the histograms
        # would add to one cell over and over, and each addition waits for the one before.
        index = jnp.arange(bits.size, dtype=bits.dtype)
        dead = (index * _STRIDE) & (_FIRST_ALIVE - 1)
        bits = jnp.where(alive, jnp.maximum(bits, _FIRST_ALIVE), dead)
    if bits.size < _SORT_BELOW or bits.dtype.itemsize > 4:
        return _by_sort(bits, counts)
    # On a GPU a sort is a fraction of a millisecond, and scattered additions contend.
    return jax.lax.platform_dependent(bits, counts, cpu=_by_histograms, default=_by_sort)


def keep_in_windows(scores: Array, n: int, m: int, axis: int = 0) -> Array:
    """Keep the n largest of every m consecutive scores of an axis; of equal ones the last.

    Args:
        scores: real numbers; m divides the axis.
        n: how many stay.
        m: of how many.
        axis: which.

    Returns:
        The same shape, bool.

    Example:
        >>> keep_in_windows(jnp.array([3.0, 1.0, 2.0, 2.0]), 1, 2).tolist()
        [True, False, False, True]
    """
    shape = scores.shape
    windows = scores.reshape(*shape[:axis], -1, m, *shape[axis + 1 :])
    order = jnp.argsort(windows, axis=axis + 1, stable=True)
    return (jnp.argsort(order, axis=axis + 1) >= m - n).reshape(shape)


def _ordered_bits(scores: Array) -> Array:
    """Map floats to unsigned integers of the same order."""
    if not jnp.issubdtype(scores.dtype, jnp.floating) or scores.dtype.itemsize < 4:
        scores = scores.astype(jnp.float32)
    dtype = jnp.uint32 if scores.dtype.itemsize == 4 else jnp.uint64
    bits = jax.lax.bitcast_convert_type(scores, dtype)
    sign = jnp.array(1 << (8 * bits.dtype.itemsize - 1), dtype)
    # On bits, since a CPU that flushes denormals takes them for zeros in a comparison of floats.
    bits = jnp.where(bits == sign, jnp.zeros_like(bits), bits)
    ordered = jnp.where(bits >= sign, ~bits, bits | sign)
    return jnp.where(jnp.isnan(scores), jnp.zeros_like(ordered), ordered)


def _by_sort(bits: Array, counts: Array) -> Array:
    """Take the threshold from a sort and tell equal elements apart by a running count."""
    in_order = jnp.sort(bits)
    index = jnp.arange(bits.size, dtype=jnp.int32)

    def keep(count: Array) -> Array:
        threshold = in_order[jnp.maximum(count - 1, 0)]
        less = bits < threshold
        equal = bits == threshold
        wanted = count - less.sum(dtype=jnp.int32)
        # A cut-off, not the running count itself: a unit's column is the result broadcast, and XLA
        # would repeat what it fuses, the count included, for every weight of the column.
        running = jnp.cumsum(equal, dtype=jnp.int32)
        stop = jnp.searchsorted(running, wanted, side="right").astype(jnp.int32)
        return ~(less | (equal & (index < stop)))

    return jax.vmap(keep)(counts)


def _by_histograms(bits: Array, counts: Array) -> Array:
    """Find every level's last pruned element digit by digit, of its bits and then of its index.

    The element of rank `count - 1` in the order (bits, index) is unique. Each pass makes one
    histogram of the next digit for all levels: an element belongs to the slot of the levels whose
    digits so far are its own, and to no other, so a pass costs the same for any number of levels.
    """
    (size,), (levels,) = bits.shape, counts.shape
    index = jnp.arange(size, dtype=jnp.uint32)
    high_index = -(-size // (1 << _INDEX_BITS))
    search = _Search(
        slot=jnp.zeros(size, jnp.int32),
        slot_of_level=jnp.zeros(levels, jnp.int32),
        rank=jnp.maximum(counts - 1, 0),
        equal=jnp.full(levels, size, jnp.int32),
    )
    high, search = _next_digit(search, bits >> 21, 1 << 11)
    middle, search = _next_digit(search, (bits >> 10) & 0x7FF, 1 << 11)
    low, search = _next_digit(search, bits & 0x3FF, 1 << 10)
    threshold = (high << 21) | (middle << 10) | low

    def last_index(search: _Search) -> Array:
        high, search = _next_digit(search, index >> _INDEX_BITS, high_index)
        low, _ = _next_digit(search, index & ((1 << _INDEX_BITS) - 1), 1 << _INDEX_BITS)
        return (high << _INDEX_BITS) | low

    # Where a level prunes all that equal its threshold, as it nearly always does, no index decides.
    last = jax.lax.cond(
        jnp.any(search.rank < search.equal - 1),
        last_index,
        lambda _: jnp.full(levels, size - 1, jnp.uint32),
        search,
    )

    def keep(count: Array, threshold: Array, last: Array) -> Array:
        pruned = (bits < threshold) | ((bits == threshold) & (index <= last))
        return ~pruned | (count == 0)

    return jax.vmap(keep)(counts, threshold, last)


class _Search(NamedTuple):
    """How far the last pruned elements of all levels are known."""

    slot: Array  # (n,) of each element; `levels` where it is in no level's
    slot_of_level: Array  # (levels,)
    rank: Array  # (levels,) of the level's last pruned element within its slot
    equal: Array  # (levels,) elements in the level's slot


def _next_digit(search: _Search, digit: Array, width: int) -> tuple[Array, _Search]:
    """Find the next digit, below `width`, of every level's last pruned element."""
    (levels,) = search.rank.shape
    digit = digit.astype(jnp.int32)
    cell = search.slot * width + digit
    histogram = jnp.zeros((levels + 1) * width, jnp.int32)
    histogram = histogram.at[cell].add(1, mode="promise_in_bounds")
    below = jnp.cumsum(histogram.reshape(levels + 1, width), axis=1)[search.slot_of_level]
    chosen = jax.vmap(lambda b, r: jnp.searchsorted(b, r, side="right"))(below, search.rank)
    chosen = chosen.astype(jnp.int32)
    before = jnp.take_along_axis(below, jnp.maximum(chosen - 1, 0)[:, None], axis=1)[:, 0]
    cell_of_level = search.slot_of_level * width + chosen
    # Levels that share a cell share the slot of the first of them.
    slots = jnp.full((levels + 1) * width, levels, jnp.int32)
    slots = slots.at[cell_of_level].min(jnp.arange(levels, dtype=jnp.int32))
    # A comparison costs less than a gather, and for one level it says the same.
    slot = slots[cell] if levels != 1 else (cell != cell_of_level[0]).astype(jnp.int32)
    return chosen.astype(jnp.uint32), _Search(
        slot=slot,
        slot_of_level=slots[cell_of_level],
        rank=search.rank - jnp.where(chosen > 0, before, 0),
        equal=histogram[cell_of_level],
    )
