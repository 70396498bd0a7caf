"""The products: code that Numba compiles, which the threads of a call run.

A chain of layers and rows come in through what the threads share, see `layout`; each takes tasks
until none is left. `kernel` starts them.
"""

from typing import Any, no_type_check

import numpy as np
from numba import (
    carray,  # pyright: ignore[reportPrivateImportUsage]
    njit,
)

from jaxprune.sparse.layout import (
    BIAS,
    BLOCK,
    BUFFERS,
    CHAIN,
    DENSE,
    DONE,
    FIELDS,
    HEADER,
    INDICES,
    INPUTS,
    LAYERS,
    NEXT,
    OUT,
    OUTPUTS,
    PARTS,
    RELU,
    ROWS,
    SHARED,
    STARTS,
    TASKS,
    TILE,
    TILES,
    VALUES,
    WIDEST,
    X,
)
from jaxprune.sparse.llvm import (
    SIDE,
    add_row,
    allocate,
    column_sum,
    dense_block,
    fetch_add,
    free,
    pointer,
    read,
    sleep,
    transpose_block,
)

# Addresses and words are int64: unsigned ones would make indices floating point. Numba compiles
# these functions as they are written, without the tests' checks of types around them.


@no_type_check
@njit
def as_words(address, count):
    """Return so many words at an address, as an array of int64."""
    return carray(pointer(address), (count,), np.int64)


@no_type_check
@njit
def as_floats(address, count):
    """Return so many float32 at an address, as an array."""
    return carray(pointer(address), (count,), np.float32)


@no_type_check
@njit
def as_ints(address, count):
    """Return so many int32 at an address, as an array."""
    return carray(pointer(address), (count,), np.int32)


@no_type_check
@njit
def wait(counter, count):
    """Wait until a word that threads share has been counted up.

    At first awake, which is fastest. After that a thread that is waited for may need this core.
    """
    turns = 0
    while read(counter) < count:
        turns += 1
        if turns > 20_000:
            sleep()


@no_type_check
def _by_tile(tile: int) -> Any:
    """Make the kernel that carries a tile of rows through all layers."""
    column, block, columns_of_block = column_sum(tile), dense_block(tile), BLOCK[tile]

    @njit(error_model="numpy")
    def carry(x, out, chain, begin, scratch):
        head = as_words(chain, HEADER)
        layers, widest, size = head[0], head[2], head[3]
        fields = as_words(chain, HEADER + FIELDS * layers)
        ints, floats = as_ints(chain, size), as_floats(chain, size)
        count = min(tile, x.shape[0] - begin)
        here, there = scratch, scratch + widest * tile * 4
        features = as_floats(here, x.shape[1] * tile)
        rows, columns = count // SIDE * SIDE, x.shape[1] // SIDE * SIDE
        width = 4 * x.shape[1]
        source = x.ctypes.data + begin * width
        for r in range(0, rows, SIDE):
            for k in range(0, columns, SIDE):
                transpose_block(
                    source + r * width + 4 * k, width, here + 4 * (k * tile + r), 4 * tile
                )
        if count < tile:
            features.reshape(-1, tile)[:, rows:] = 0
        for r in range(count):
            for k in range(columns if r < rows else 0, x.shape[1]):
                features[k * tile + r] = x[begin + r, k]
        for n in range(layers):
            field = fields[HEADER + n * FIELDS :]
            inputs, outputs, parts = field[INPUTS], field[OUTPUTS], field[PARTS]
            bias, relu = field[BIAS], field[RELU] != 0
            if field[DENSE]:
                for j in range(0, outputs, columns_of_block):
                    values = chain + 4 * (field[VALUES] + inputs * j)
                    where = there + 4 * j * tile
                    block(here, values, inputs, where, chain + 4 * (bias + j), relu)
            else:
                for part in range(parts):
                    for j in range(outputs):
                        at = field[STARTS] + part * outputs + j
                        first = np.int64(ints[at])
                        column(
                            here,
                            chain + 4 * (field[INDICES] + first),
                            chain + 4 * (field[VALUES] + first),
                            np.int64(ints[at + 1]) - first,
                            there + 4 * j * tile,
                            floats[bias + j],
                            part == 0,
                            relu and part == parts - 1,
                        )
            here, there = there, here
        results = as_floats(here, out.shape[1] * tile)
        for r in range(count):
            for j in range(out.shape[1]):
                out[begin + r, j] = results[j * tile + r]

    return carry


_tile_16, _tile_64 = (_by_tile(tile) for tile in TILES)
_column_64 = column_sum(64)


@no_type_check
@njit(error_model="numpy")
def work_by_tiles(shared):
    """Take tiles, and carry them through all layers, until none is left."""
    state = as_words(shared, SHARED)
    tasks, chain, rows = state[TASKS], state[CHAIN], state[ROWS]
    task = fetch_add(shared + 8 * NEXT, 1)
    if task >= tasks:
        return
    layers, tile, widest = state[LAYERS], state[TILE], state[WIDEST]
    fields = as_words(chain, HEADER + FIELDS * layers)
    x_shape = rows, fields[HEADER + INPUTS]
    out_shape = rows, fields[HEADER + (layers - 1) * FIELDS + OUTPUTS]
    x = carray(pointer(state[X]), x_shape, np.float32)
    out = carray(pointer(state[OUT]), out_shape, np.float32)
    allocated = allocate(8 * widest * tile + 64)
    scratch = (allocated + 63) // 64 * 64
    while task < tasks:
        if tile == 16:
            _tile_16(x, out, chain, task * tile, scratch)
        else:
            _tile_64(x, out, chain, task * tile, scratch)
        fetch_add(shared + 8 * DONE, 1)
        task = fetch_add(shared + 8 * NEXT, 1)
    free(allocated)


@no_type_check
@njit(error_model="numpy")
def _columns(chain, field, part, x, y, lists):
    """Compute one part of a layer's columns, of one row; return where it begins and ends."""
    inputs, outputs, parts, relu = field[INPUTS], field[OUTPUTS], field[PARTS], field[RELU] != 0
    unit = 64 if field[DENSE] else 1
    units = (outputs + unit - 1) // unit
    begin = units * part // parts * unit
    end = min(outputs, units * (part + 1) // parts * unit)
    bias = as_floats(chain + 4 * field[BIAS], outputs)
    for j in range(begin, end):
        y[j] = bias[j]
    target = y.ctypes.data
    if field[DENSE]:
        # The inputs that are not zero, as a column of offsets of what is multiplied with them.
        offsets, values = as_ints(lists, inputs), as_floats(lists + 4 * inputs, inputs)
        count = 0
        for k in range(inputs):
            offsets[count], values[count] = 256 * k, x[k]
            count += x[k] != 0
        for j in range(begin, end, 64):
            weights = chain + 4 * (field[VALUES] + inputs * j)
            start = np.float32(0)
            place = target + 4 * j
            _column_64(weights, lists, lists + 4 * inputs, count, place, start, False, relu)
    else:
        starts = as_ints(chain + 4 * (field[STARTS] + part * (inputs + 1)), inputs + 1)
        for k in range(inputs):
            if x[k] != 0:
                first = np.int64(starts[k])
                indices = chain + 4 * (field[INDICES] + first)
                kept = chain + 4 * (field[VALUES] + first)
                add_row(x[k], indices, kept, np.int64(starts[k + 1]) - first, target)
        if relu:
            for j in range(begin, end):
                y[j] = np.float32(0) if y[j] < 0 else y[j]
    return begin, end


@no_type_check
@njit(error_model="numpy")
def work_by_columns(shared):
    """Take parts of a layer's columns until none is left, wait for the others, and go on."""
    state = as_words(shared, SHARED)
    chain, rows, layers, widest = state[CHAIN], state[ROWS], state[LAYERS], state[WIDEST]
    fields = as_words(chain, HEADER + FIELDS * layers)
    parts = as_words(shared, SHARED + 3 * layers)[SHARED + 2 :: 3]
    lists = allocate(8 * widest)
    for n in range(layers):
        target = state[BUFFERS] + 4 * widest * rows * (n % 2)
        counter = shared + 8 * (SHARED + 3 * n)
        part = fetch_add(counter, 1)
        while part < parts[n]:
            field = fields[HEADER + n * FIELDS :]
            inputs, outputs = field[INPUTS], field[OUTPUTS]
            source = state[BUFFERS] + 4 * widest * rows * ((n + 1) % 2) if n else state[X]
            stride = 4 * widest if n else 4 * inputs
            for r in range(rows):
                x = as_floats(source + stride * r, inputs)
                y = as_floats(target + 4 * widest * r, widest)
                begin, end = _columns(chain, field, part, x, y, lists)
                if n == layers - 1:
                    out = as_floats(state[OUT] + 4 * outputs * r, outputs)
                    for j in range(begin, end):
                        out[j] = y[j]
            fetch_add(counter + 8, 1)
            part = fetch_add(counter, 1)
        wait(counter + 8, parts[n])
    free(lists)
