"""Bytes and the positions of kept weights, coded in few bytes; `storage` puts them into a file.

A stream of bytes is stored as it is, by zstandard, or by an entropy coder (asymmetric numeral
systems, from `constriction`), whichever is smallest.

Positions are a bitmap, and trained networks prune their rows and columns unevenly: an input that
is the same in every image loses all its weights. So each row and each column is given a class by
the logarithm of its odds of being kept, the classes of its row and its column add up to that of a
position, and the bits of each class are coded with that class's own density. On the challenge
network, trained, this takes 12 to 16% less than the bound of log2 C(n, kept) bits from 90 to 99%,
which knows of no rows, and 20 to 45% less than what zstandard makes of the bitmap.
All that a reader computes from are integers and
products of two floats, which are the same on every machine.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import zstandard
from constriction import stream as ans  # pyright: ignore[reportAttributeAccessIssue]

_RAW, _ZSTD, _ENTROPY = range(3)
_STEP = np.log(2)  # of the odds, from class to class: finer ones cost more than they save
_CLASSES = 32  # of rows, and of columns
_LINE = 64  # shorter rows and columns save less than it costs to tell their classes
_SHORT = 12  # bytes that nothing makes smaller: zstandard has a header of so many
_SET_BITS = np.bitwise_count(np.arange(256, dtype=np.uint8))


def pack(data: np.ndarray) -> bytes:
    """Code bytes (1-D, uint8) as one stream, which starts with how it is coded.

    Example:
        >>> [len(pack(np.full(n, 7, np.uint8))) < 25 for n in (0, 3, 10_000)]
        [True, True, True]
    """
    raw = data.tobytes()
    streams = [bytes([_RAW]) + raw]
    if len(raw) < _SHORT:
        return streams[0]
    streams.append(bytes([_ZSTD]) + zstandard.ZstdCompressor(1).compress(raw))
    counts = np.bincount(data, minlength=256)
    symbols = np.flatnonzero(counts)
    share = counts[symbols] / max(data.size, 1)
    size = 2 + 3 * symbols.size - (share * np.log2(share)).sum() * data.size / 8
    if symbols.size > 1 and size < 0.99 * min(map(len, streams)):
        frequencies = np.maximum(np.rint(share * 0xFFFF), 1).astype("<u2")
        index = np.zeros(256, np.int32)
        index[symbols] = np.arange(symbols.size)
        table = bytes([symbols.size - 1]) + symbols.astype(np.uint8).tobytes()
        coded = _encode([(index[data], _model(frequencies))])
        streams.append(bytes([_ENTROPY]) + table + frequencies.tobytes() + coded)
    return min(streams, key=len)


def unpack(stream: bytes, size: int) -> np.ndarray:
    """Return the `size` bytes of a stream.

    Raises:
        ValueError: it holds another number of bytes, or is damaged.
    """
    kind, body = stream[:1], stream[1:]
    if kind == bytes([_RAW]):
        data = np.frombuffer(body, np.uint8)
    elif kind == bytes([_ZSTD]):
        # The size that it declares is what would be allocated.
        if zstandard.frame_content_size(body) != size:
            raise ValueError("a stream has the wrong size")
        data = np.frombuffer(zstandard.ZstdDecompressor().decompress(body), np.uint8)
    elif kind == bytes([_ENTROPY]) and body:
        n = body[0] + 1
        symbols = np.frombuffer(body, np.uint8, n, 1)
        frequencies = np.frombuffer(body, "<u2", n, 1 + n)
        (index,) = _decode(body[1 + 3 * n :], [(size, _model(frequencies))])
        data = symbols[index]
    else:
        raise ValueError("a stream is coded in an unknown way")
    if data.size != size:
        raise ValueError("a stream has the wrong size")
    return data


def pack_mask(mask: np.ndarray) -> tuple[bytes, bytes, list[int]]:
    """Code a mask (2-D, bool).

    Returns:
        The classes of its rows and columns and its bits, two streams, and how many bits of each
        class are True.
    """
    rows, columns = (_classes(mask, axis) for axis in (1, 0))
    ordered = mask[np.argsort(rows, kind="stable")][:, np.argsort(columns, kind="stable")]
    kept, parts = [], []
    for blocks in _blocks(rows, columns):
        bits = np.concatenate([ordered[block].ravel() for block in blocks])
        kept.append(int(np.count_nonzero(bits)))
        if 0 < kept[-1] < bits.size:
            parts.append((np.packbits(bits).astype(np.int32), _bits_model(kept[-1], bits.size)))
    return pack(np.concatenate([rows, columns])), _encode(parts), kept


def unpack_mask(classes: bytes, bits: bytes, kept: list[int], shape: tuple[int, int]) -> np.ndarray:
    """Return the mask of `pack_mask`.

    Raises:
        ValueError: the streams are damaged, or do not fit each other.
    """
    rows, columns = np.split(unpack(classes, sum(shape)), [shape[0]])
    if max(rows.max(), columns.max()) >= _CLASSES:
        raise ValueError("a row or column has an unknown class")
    groups = list(_blocks(rows, columns))
    ordered = np.empty(shape, bool)
    sizes = [sum(ordered[block].size for block in blocks) for blocks in groups]
    fits = [type(k) is int and 0 <= k <= n for k, n in zip(kept, sizes, strict=False)]
    if len(kept) != len(groups) or not all(fits):
        raise ValueError("the numbers of kept weights do not fit the classes")
    coded = [(-(-n // 8), _bits_model(k, n)) for k, n in zip(kept, sizes, strict=True) if 0 < k < n]
    decoded = iter(_decode(bits, coded))
    for blocks, k, n in zip(groups, kept, sizes, strict=True):
        if 0 < k < n:
            values = np.unpackbits(next(decoded).astype(np.uint8), count=n).view(bool)
        else:
            values = np.full(n, k > 0)
        if np.count_nonzero(values) != k:
            raise ValueError("a class keeps another number of weights than it says")
        ends = itertools.accumulate(ordered[block].size for block in blocks)
        for block, part in zip(blocks, np.split(values, list(ends)[:-1]), strict=True):
            ordered[block] = part.reshape(ordered[block].shape)
    mask = ordered[np.argsort(np.argsort(rows, kind="stable"))]
    return mask[:, np.argsort(np.argsort(columns, kind="stable"))]


def _classes(mask: np.ndarray, axis: int) -> np.ndarray:
    """Return the class, from 0, of each row (`axis` 1) or column (`axis` 0)."""
    n = mask.shape[axis]
    kept = np.count_nonzero(mask, axis=axis)
    if n < _LINE:
        return np.zeros(kept.size, np.uint8)
    odds = np.log((kept + 0.5) / (n - kept + 0.5))
    return np.minimum(np.rint((odds - odds.min()) / _STEP), _CLASSES - 1).astype(np.uint8)


def _blocks(rows: np.ndarray, columns: np.ndarray) -> Iterator[list[tuple[slice, slice]]]:
    """Yield for each class of positions where they are once rows and columns are in order."""
    row_ends, column_ends = (
        [slice(b - n, b) for n, b in zip(counts, np.cumsum(counts), strict=True)]
        for counts in (np.bincount(rows), np.bincount(columns))
    )
    for total in range(len(row_ends) + len(column_ends) - 1):
        lowest = max(0, total - len(column_ends) + 1)
        highest = min(total, len(row_ends) - 1)
        yield [(row_ends[i], column_ends[total - i]) for i in range(lowest, highest + 1)]


def _encode(parts: list) -> bytes:
    """Code symbols (int32), each part with its model; the decoder gets the first part first."""
    coder = ans.stack.AnsCoder()
    for symbols, model in reversed(parts):
        coder.encode_reverse(symbols, model)
    return coder.get_compressed().astype("<u4").tobytes()


def _decode(stream: bytes, parts: list) -> list[np.ndarray]:
    words = np.frombuffer(stream, "<u4").astype(np.uint32)
    coder = ans.stack.AnsCoder(words)
    return [coder.decode(model, size) for size, model in parts]


def _model(weights: np.ndarray) -> Any:
    return ans.model.Categorical(weights.astype(np.float64), perfect=False)


def _bits_model(kept: int, size: int) -> Any:
    """Return the distribution of eight independent bits, `kept` of `size` being set."""
    ones, zeros = (
        functools.reduce(lambda p, _: [*p, p[-1] * q], range(8), [1.0])
        for q in (kept / size, (size - kept) / size)
    )
    byte = np.array([p * q for p, q in zip(ones, reversed(zeros), strict=True)])
    return _model(byte[_SET_BITS])
