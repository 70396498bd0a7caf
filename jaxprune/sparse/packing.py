"""A chain of layers as one array, which `kernel` takes.

Layers come in from `inference`. What is kept of their weights is laid out for the rows that there
will be; a layer of which most is kept is laid out whole, for there the indices cost more.
"""

import os
from collections.abc import Sequence

import numpy as np

from jaxprune.sparse import layout
from jaxprune.sparse.layout import BLOCK, BY_COLUMNS, FIELDS, HEADER, TILES, UNROLLED
from jaxprune.sparse.program import Layer

# Measured. By the rows of a tile: the density from which a layer is faster laid out whole, and the
# multiply-adds that are worth another thread, which wakes up late. The kernel by columns is faster
# up to 64 rows times the density of the network, and up to 2 rows in any case.
_DENSE_FROM = {BY_COLUMNS: 0.12, 16: 0.45, 64: 0.6}
_SHARE = {BY_COLUMNS: 1 << 19, 16: 1 << 21, 64: 1 << 21}
_FEW_ROWS = 64, 2


def tile_for(layers: Sequence[Layer], rows: int) -> int:
    """Return how many rows a tile should have, or `BY_COLUMNS`."""
    kept = sum(np.count_nonzero(layer.weights) for layer in layers)
    density = kept / sum(layer.weights.size for layer in layers)
    most, least = _FEW_ROWS
    if rows <= max(most * density, least):
        return BY_COLUMNS
    return TILES[-1] if rows >= TILES[-1] * (os.cpu_count() or 1) else TILES[0]


def pack(layers: Sequence[Layer], rows: int, tile: int) -> np.ndarray:
    """Return a chain of layers as one array of int32, of about eight bytes a kept weight.

    Args:
        layers: the outputs of one are the inputs of the next.
        rows: of inputs.
        tile: how many of them at once, or `BY_COLUMNS`.
    """
    header = np.zeros(HEADER + FIELDS * len(layers), np.int64)
    sections: list[np.ndarray] = []
    work = 0
    size = -(-header.size * 2 // 16) * 16

    def add(section: np.ndarray) -> int:
        nonlocal size
        start, padding = size, -section.size % 16  # to whole lines of the cache
        sections.append(np.pad(section.view(np.int32), (0, padding)))
        size += section.size + padding
        return start

    for n, (weights, bias, relu) in enumerate(layers):
        inputs, outputs = weights.shape
        density = np.count_nonzero(weights) / weights.size
        dense = density >= _DENSE_FROM[tile]
        block = BLOCK[tile]
        padding = -outputs % block
        work += rows * (weights.size if dense else int(np.count_nonzero(weights)))
        parts = _parts(weights, density, rows, tile)
        field = header[HEADER + n * FIELDS :][:FIELDS]
        field[[layout.INPUTS, layout.OUTPUTS, layout.PARTS]] = inputs, outputs, parts
        field[[layout.RELU, layout.DENSE]] = relu, dense
        bias = np.zeros(outputs) if bias is None else bias
        field[layout.BIAS] = add(np.pad(bias, (0, padding)).astype(np.float32))
        if dense:
            blocks = np.pad(weights, ((0, 0), (0, padding))).reshape(inputs, -1, block)
            field[layout.VALUES] = add(np.ascontiguousarray(blocks.swapaxes(0, 1)).ravel())
        else:
            starts, indices, values = _lists(weights, parts, tile)
            field[layout.STARTS] = add(starts)
            field[layout.INDICES] = add(indices)
            field[layout.VALUES] = add(values)
    fields = header[HEADER:].reshape(-1, FIELDS)
    widest = fields[:, [layout.INPUTS, layout.OUTPUTS]].max()
    header[:HEADER] = (
        len(layers),
        tile,
        widest + -widest % 16 + 64,
        size,
        _threads(work, tile) if tile else fields[:, layout.PARTS].max(),
    )
    head = header.view(np.int32)
    return np.concatenate([np.pad(head, (0, -head.size % 16)), *sections])


def work(packed: np.ndarray, rows: int) -> tuple[int, int]:
    """Return the multiply-adds of a packed chain, and the bytes of the kernel's buffers."""
    layers, tile, widest, _, threads = packed[: 2 * HEADER].view(np.int64)
    fields = packed[: 2 * (HEADER + layers * FIELDS)].view(np.int64)[HEADER:].reshape(-1, FIELDS)
    count = 0
    for field in fields:
        inputs, outputs, parts = field[[layout.INPUTS, layout.OUTPUTS, layout.PARTS]]
        if field[layout.DENSE]:
            count += inputs * outputs
        elif tile == BY_COLUMNS:
            ends = packed[field[layout.STARTS] :][: parts * (inputs + 1)].reshape(parts, -1)
            count += (ends[:, -1] - ends[:, 0]).sum()
        else:
            count += packed[field[layout.STARTS] + parts * outputs]
    buffers = tile * min(threads, -(-rows // tile)) if tile else rows
    return rows * int(count), int(8 * widest * buffers)


def _threads(work: int, tile: int) -> int:
    """Return how many threads should share so many multiply-adds."""
    return max(1, min(os.cpu_count() or 1, work // _SHARE[tile]))


def _parts(weights: np.ndarray, density: float, rows: int, tile: int) -> int:
    """Return in how many parts a layer is done: its outputs by threads, or else its inputs."""
    if tile == BY_COLUMNS:
        work = int(weights.size * min(density, 0.25)) * rows  # dense ones take less time each
        return min(_threads(work, tile), -(-weights.shape[1] // 64))
    for size in (128, 256):  # inputs of a part, to stay in the innermost cache
        # Each with lists long enough, and the longer, the more sums are added up after a list.
        if density * size >= 12 * (64 // tile):
            return -(-weights.shape[0] // size)
    return 1


def _lists(weights: np.ndarray, parts: int, tile: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where lists of kept weights start, and their indices and values.

    Of every part a list an output, of the inputs' offsets in a tile; or, by columns, a list an
    input, of the outputs, in whole `UNROLLED`: zeros for an output after the last fill it up.
    """
    starts, indices, values = [], [], []
    count = 0
    for part in range(parts):
        if tile == BY_COLUMNS:
            begin, end = (weights.shape[1] * n // parts for n in (part, part + 1))
            lists, scale = weights[:, begin:end], 1
        else:
            length = -(-weights.shape[0] // parts)
            begin, end = part * length, (part + 1) * length
            lists, scale = weights[begin:end].T, 4 * tile
        which, at = np.nonzero(lists)
        kept = np.bincount(which, minlength=len(lists))
        sizes = kept if tile else -(-kept // UNROLLED) * UNROLLED
        ends = count + np.cumsum(sizes)
        starts.append(np.concatenate([[count], ends]))
        if tile != BY_COLUMNS and part < parts - 1:
            starts[-1] = starts[-1][:-1]  # where the next part's begin
        places = np.arange(which.size) + np.repeat(np.cumsum(sizes - kept) - sizes + kept, kept)
        indices.append(np.full(sizes.sum(), weights.shape[1]))
        indices[-1][places] = (begin + at) * scale
        values.append(np.zeros(sizes.sum()))
        values[-1][places] = lists[which, at]
        count += int(sizes.sum())
    return (
        np.concatenate(starts).astype(np.int32),
        np.concatenate(indices).astype(np.int32),
        np.concatenate(values).astype(np.float32),
    )
