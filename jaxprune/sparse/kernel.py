"""The CPU kernel of sparse products: Numba code that XLA calls by its foreign function interface.

Weights come in from `inference` and are packed into one array of integers; a call takes rows and
that array, and carries the rows through a chain of products while they are in the cache.

A layer is y = act(x W + b), W by columns of what is kept. Two kernels:

- By tiles: some rows at once, transposed, so that a feature of all of them is one vector, and a
  kept weight one multiply-add of vectors. The features are taken in parts that fit into the
  innermost cache, where columns are not so empty that this costs more than it saves.
- By rows, for very few of them: W by rows, those of inputs that are zero skipped, as half of them
  are after a ReLU.
"""

import ctypes
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from jaxprune.sparse.program import Layer

TARGET = "jaxprune_sparse_chain"

TILES = (16, 64)
_BLOCK = 16
"""How many rows a tile may have."""

# What the array of a packed chain begins with: the number of layers, rows of a tile (0: the kernel
# by rows), the largest width, the number of words; then of every layer the fields below.
_HEADER, _FIELDS = 4, 8
_INPUTS, _OUTPUTS, _PARTS, _RELU, _BIAS, _STARTS, _INDICES, _VALUES = range(_FIELDS)

# The interface of XLA (xla/ffi/api/c_api.h) in words of eight bytes: the fields of a call frame,
# of a buffer, and of the table of functions. They are the same in all versions 0.x; XLA refuses
# the registration when ours is too old for it.
_VERSION = 0, 1
_EXTENSION, _API, _CONTEXT, _STAGE, _ARGS, _RESULTS = 1, 2, 3, 4, 9, 14
_DATA, _DIMS = 3, 5
_DESTROY_ERROR, _SCHEDULE, _NUM_THREADS = 8, 17, 18
_EXECUTE = 3

# What the threads of one call share, in words.
_NEXT, _DONE, _REFERENCES, _X, _OUT, _CHAIN, _ROWS, _TASKS, _REQUEST = range(9)
_SHARED = 16  # what is asked of XLA, and its answer, come last

_FLOAT, _BYTE, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)


def pack(layers: Sequence[Layer], tile: int) -> np.ndarray:
    """Return a chain of layers as one array of int32, of eight bytes a kept weight.

    Args:
        layers: the outputs of one are the inputs of the next.
        tile: how many rows at once, or 0 for the kernel by rows.
    """
    header = np.zeros(_HEADER + _FIELDS * len(layers), np.int64)
    sections: list[np.ndarray] = []
    size = -(-header.size * 2 // 16) * 16

    def add(section: np.ndarray) -> int:
        nonlocal size
        start, padding = size, -section.size % 16
        sections.append(np.pad(section.view(np.int32), (0, padding)))
        size += section.size + padding
        return start

    widest = 0
    for n, layer in enumerate(layers):
        inputs, outputs = layer.weights.shape
        widest = max(widest, inputs, outputs)
        parts = _parts(layer.weights, tile)
        # Lists of kept weights: of a part's outputs, or of inputs.
        lists = layer.weights if tile == 0 else layer.weights.T
        length = -(-lists.shape[1] // parts) if tile else lists.shape[1]
        starts, indices, values = [np.zeros(1, np.int64)], [], []
        for part in range(parts):
            block = lists[:, part * length : (part + 1) * length]
            row, column = np.nonzero(block)
            indices.append((column + part * length) * max(1, tile * 4))
            values.append(block[row, column])
            ends = np.cumsum(np.bincount(row, minlength=len(block)))
            starts.append(starts[-1][-1] + ends)
        field = header[_HEADER + n * _FIELDS :][:_FIELDS]
        field[_INPUTS], field[_OUTPUTS] = inputs, outputs
        field[_PARTS], field[_RELU] = parts, layer.relu
        field[_BIAS] = 0 if layer.bias is None else add(np.asarray(layer.bias, np.float32))
        field[_STARTS] = add(np.concatenate(starts).astype(np.int32))
        field[_INDICES] = add(np.concatenate(indices).astype(np.int32))
        field[_VALUES] = add(np.concatenate(values).astype(np.float32))
    header[:_HEADER] = len(layers), tile, widest, size
    head = header.view(np.int32)
    return np.concatenate([np.pad(head, (0, -head.size % 16)), *sections])


def _parts(weights: np.ndarray, tile: int) -> int:
    """Return into how many parts the inputs are divided."""
    if tile:
        for size in (128, 256):
            # Of a whole vector loop each, and more of narrow tiles, which add up several sums.
            if np.count_nonzero(weights) * size >= 12 * (64 // tile) * weights.size:
                return -(-weights.shape[0] // size)
    return 1


def tile_for(rows: int) -> int:
    """Return how many rows a tile should have, or 0 for the kernel by rows."""
    threads = os.cpu_count() or 1
    if rows <= 2 * threads:
        return 0
    return TILES[-1] if rows >= TILES[-1] * threads else TILES[0]


def run(x: Any, packed: Any, outputs: int) -> Any:
    """Return the results of a packed chain for rows of inputs, (rows, inputs)."""
    call = jax.ffi.ffi_call(
        TARGET,
        jax.ShapeDtypeStruct((x.shape[0], outputs), jnp.float32),
        vmap_method="sequential",
    )
    return call(x, packed)


# What LLVM can do and Numba cannot say.


def _at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic
def _pointer(context, address):
    def generate(context, builder, signature, args):
        return _at(builder, args[0], _BYTE)

    return types.voidptr(types.int64), generate


@intrinsic
def _fetch_add(context, address, value):
    """Add to a word that threads share, and return what it was."""

    def generate(context, builder, signature, args):
        return builder.atomic_rmw("add", _at(builder, args[0], _I64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _read(context, address):
    """Return a word that threads share."""

    def generate(context, builder, signature, args):
        return builder.load_atomic(_at(builder, args[0], _I64), "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic
def _call(context, function, argument):
    """Call a C function of one pointer."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(_I64, [_I64])
        return builder.call(_at(builder, args[0], kind), [args[1]])

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _allocate(context, size):
    def generate(context, builder, signature, args):
        return builder.ptrtoint(context.nrt.allocate(builder, args[0]), _I64)

    return types.int64(types.int64), generate


@intrinsic
def _free(context, address):
    def generate(context, builder, signature, args):
        context.nrt.free(builder, _at(builder, args[0], _BYTE))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _helper(context):
    """Return the address of a C function that does what `_help` does."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [_I64])
        function = cgutils.get_or_insert_function(builder.module, kind, "jaxprune_sparse_help")
        if not function.blocks:
            function.linkage = "internal"
            inner = ir.IRBuilder(function.append_basic_block())
            void = types.void(types.int64)
            compiled = context.compile_subroutine(inner, _help.py_func, void)
            context.call_internal_no_propagate(inner, compiled.fndesc, void, function.args)
            inner.ret_void()
        return builder.ptrtoint(function, _I64)

    return types.int64(), generate


def _loop(builder: Any, start: Any, end: Any, step: int, body: Any, carried: Sequence[Any]) -> Any:
    """Emit `for at in range(start, end, step): carried = body(at, carried)`; return `carried`."""
    before, inside, after = builder.block, *(builder.append_basic_block() for _ in range(2))
    builder.cbranch(builder.icmp_signed("<", start, end), inside, after)
    builder.position_at_end(inside)
    at, entering = builder.phi(_I64), [builder.phi(value.type) for value in carried]
    leaving = body(at, entering)
    following = builder.add(at, _I64(step))
    builder.cbranch(builder.icmp_signed("<", following, end), inside, after)
    at.add_incoming(start, before)
    at.add_incoming(following, inside)
    builder.position_at_end(after)
    results = [builder.phi(value.type) for value in carried]
    for given, new, *phis in zip(carried, leaving, entering, results, strict=True):
        for phi in phis:
            phi.add_incoming(given, before)
            phi.add_incoming(new, inside)
    return results


def _vector(size: int) -> ir.VectorType:
    return ir.VectorType(_FLOAT, size)


def _spread(builder: Any, value: Any, size: int) -> Any:
    undefined, lanes = ir.Constant(_vector(size), ir.Undefined), ir.VectorType(_I32, size)
    first = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(lanes, [0] * size))


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    name = f"v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "f32"
    kind = ir.FunctionType(a.type, [a.type] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.{name}")
    return builder.call(function, [a, b, c])


def _column(tile: int) -> Any:
    """Make the sum over one column: y = start + sum of values[k] x[indices[k]], of a tile's rows.

    Where this is not the `first` part of the column, `start` is what the earlier ones gave. Sums
    are kept in registers, in as many as are needed to hide the latency of an addition.
    """
    vector = _vector(tile)
    zero = ir.Constant(vector, None)
    sums = 64 // tile
    unroll = max(2, sums)

    @intrinsic
    def column(context, x, indices, values, count, y, start, first, relu):
        def generate(context, builder, signature, args):
            x, indices, values, count, y, start, first, relu = args
            result = _at(builder, y, vector)

            def add(at: Any, totals: list[Any], step: int) -> list[Any]:
                found = list(totals)
                for i in range(step):
                    k = builder.add(at, _I64(i))
                    offset = builder.load(builder.gep(_at(builder, indices, _I32), [k]))
                    value = builder.load(builder.gep(_at(builder, values, _FLOAT), [k]))
                    address = builder.add(x, builder.sext(offset, _I64))
                    features = builder.load(_at(builder, address, vector), align=64)
                    value = _spread(builder, value, tile)
                    total = found[i % len(found)]
                    found[i % len(found)] = _multiply_add(builder, value, features, total)
                return found

            start = _spread(builder, start, tile)
            total = builder.select(first, start, builder.load(result, align=64))
            totals, main = [total] + [zero] * (sums - 1), builder.and_(count, _I64(-unroll))
            totals = _loop(builder, _I64(0), main, unroll, partial(add, step=unroll), totals)
            while len(totals) > 1:
                pairs = zip(totals[::2], totals[1::2], strict=True)
                totals = [builder.fadd(a, b) for a, b in pairs]
            (total,) = _loop(builder, main, count, 1, partial(add, step=1), totals)
            negative = builder.fcmp_ordered("<", total, zero)  # not so of NaN, which stays
            positive = builder.select(negative, zero, total)
            builder.store(builder.select(relu, positive, total), result, align=64)
            return context.get_dummy_value()

        word, flag = types.int64, types.boolean
        return types.void(word, word, word, word, word, types.float32, flag, flag), generate

    return column


@intrinsic
def _row(context, value, indices, values, count, y):
    """Add one row: y[indices[k]] += value * values[k]. Indices differ, so that four can be one."""

    def generate(context, builder, signature, args):
        factor, indices, values, count, y = args

        def add(at: Any, carried: list[Any], step: int) -> list[Any]:
            places, results = [], []
            for i in range(step):
                k = builder.add(at, _I64(i))
                index = builder.load(builder.gep(_at(builder, indices, _I32), [k]))
                value = builder.load(builder.gep(_at(builder, values, _FLOAT), [k]))
                place = builder.gep(_at(builder, y, _FLOAT), [builder.sext(index, _I64)])
                places.append(place)
                results.append(_multiply_add(builder, factor, value, builder.load(place)))
            for place, result in zip(places, results, strict=True):
                builder.store(result, place)
            return carried

        main = builder.and_(count, _I64(-4))
        _loop(builder, _I64(0), main, 4, partial(add, step=4), [])
        _loop(builder, main, count, 1, partial(add, step=1), [])
        return context.get_dummy_value()

    word = types.int64
    return types.void(types.float32, word, word, word, word), generate


@intrinsic
def _transpose(context, source, from_stride, target, to_stride):
    """Transpose a block of 16 by 16 numbers; the strides of its rows are in bytes."""

    def generate(context, builder, signature, args):
        source, from_stride, target, to_stride = args

        def place(base: Any, stride: Any, i: int) -> Any:
            address = builder.add(base, builder.mul(stride, _I64(i)))
            return _at(builder, address, _vector(_BLOCK))

        block = range(_BLOCK)
        rows = [builder.load(place(source, from_stride, i), align=4) for i in block]
        # A perfect shuffle of the rows, and of the numbers in each pair of them: once for every
        # bit of the indices.
        for _ in range(_BLOCK.bit_length() - 1):
            pairs = list(zip(rows[: _BLOCK // 2], rows[_BLOCK // 2 :], strict=True))
            rows = []
            for a, b in pairs:
                for half in (0, _BLOCK // 2):
                    lanes = [half + i // 2 + i % 2 * _BLOCK for i in block]
                    chosen = ir.Constant(ir.VectorType(_I32, _BLOCK), lanes)
                    rows.append(builder.shuffle_vector(a, b, chosen))
        for i in block:
            builder.store(rows[i], place(target, to_stride, i), align=4)
        return context.get_dummy_value()

    word = types.int64
    return types.void(word, word, word, word), generate


# The kernel. Addresses and words are int64: unsigned ones would make indices floating point.


@njit
def _words(address, count):
    return carray(_pointer(address), (count,), np.int64)


@njit
def _floats(address, count):
    return carray(_pointer(address), (count,), np.float32)


@njit
def _ints(address, count):
    return carray(_pointer(address), (count,), np.int32)


def _by_tile(tile: int) -> Any:
    """Make the kernel that carries a tile of rows through all layers."""
    column = _column(tile)

    @njit(error_model="numpy")
    def carry(x, out, chain, begin, scratch):
        head = _words(chain, _HEADER)
        layers, widest, size = head[0], head[2], head[3]
        fields = _words(chain, _HEADER + _FIELDS * layers)
        ints, floats = _ints(chain, size), _floats(chain, size)
        count = min(tile, x.shape[0] - begin)
        here, there = scratch, scratch + widest * tile * 4
        features = _floats(here, x.shape[1] * tile)
        rows, columns = count // _BLOCK * _BLOCK, x.shape[1] // _BLOCK * _BLOCK
        width = 4 * x.shape[1]
        source = x.ctypes.data + begin * width
        for r in range(0, rows, _BLOCK):
            for k in range(0, columns, _BLOCK):
                _transpose(source + r * width + 4 * k, width, here + 4 * (k * tile + r), 4 * tile)
        if count < tile:
            features.reshape(-1, tile)[:, rows:] = 0
        for r in range(count):
            for k in range(columns if r < rows else 0, x.shape[1]):
                features[k * tile + r] = x[begin + r, k]
        for n in range(layers):
            field = fields[_HEADER + n * _FIELDS :]
            outputs, parts, bias = field[_OUTPUTS], field[_PARTS], field[_BIAS]
            starts, relu = field[_STARTS], field[_RELU] != 0
            for part in range(parts):
                for j in range(outputs):
                    at = starts + part * outputs + j
                    first = np.int64(ints[at])
                    count_kept = np.int64(ints[at + 1]) - first
                    column(
                        here,
                        chain + 4 * (field[_INDICES] + first),
                        chain + 4 * (field[_VALUES] + first),
                        count_kept,
                        there + j * tile * 4,
                        floats[bias + j] if bias else np.float32(0),
                        part == 0,
                        relu and part == parts - 1,
                    )
            here, there = there, here
        results = _floats(here, out.shape[1] * tile)
        for r in range(count):
            for j in range(out.shape[1]):
                out[begin + r, j] = results[j * tile + r]

    return carry


_carry_16, _carry_64 = (_by_tile(tile) for tile in TILES)


@njit(error_model="numpy")
def _carry_row(x, out, chain, row, scratch):
    """Carry one row through all layers, skipping what zeros would be multiplied with."""
    head = _words(chain, _HEADER)
    layers, widest, size = head[0], head[2], head[3]
    fields = _words(chain, _HEADER + _FIELDS * layers)
    ints, floats = _ints(chain, size), _floats(chain, size)
    here, there = _floats(scratch, widest), _floats(scratch + widest * 4, widest)
    for k in range(x.shape[1]):
        here[k] = x[row, k]
    for n in range(layers):
        field = fields[_HEADER + n * _FIELDS :]
        outputs, bias = field[_OUTPUTS], field[_BIAS]
        starts, indices, values = field[_STARTS], field[_INDICES], field[_VALUES]
        for j in range(outputs):
            there[j] = floats[bias + j] if bias else np.float32(0)
        for k in range(field[_INPUTS]):
            value = here[k]
            if value != 0:
                first = np.int64(ints[starts + k])
                count = np.int64(ints[starts + k + 1]) - first
                _row(
                    value,
                    chain + 4 * (indices + first),
                    chain + 4 * (values + first),
                    count,
                    there.ctypes.data,
                )
        if field[_RELU]:
            for j in range(outputs):
                there[j] = np.float32(0) if there[j] < 0 else there[j]
        here, there = there, here
    for j in range(out.shape[1]):
        out[row, j] = here[j]


@njit(error_model="numpy")
def _work(shared):
    """Take tasks, tiles or rows, until none is left."""
    state = _words(shared, _SHARED)
    tasks = state[_TASKS]
    task = _fetch_add(shared + 8 * _NEXT, 1)
    if task >= tasks:
        return
    chain, rows = state[_CHAIN], state[_ROWS]
    head = _words(chain, _HEADER + _FIELDS)
    layers, tile, widest = head[0], head[1], head[2]
    fields = _words(chain, _HEADER + _FIELDS * layers)
    inputs = fields[_HEADER + _INPUTS]
    outputs = fields[_HEADER + (layers - 1) * _FIELDS + _OUTPUTS]
    x = carray(_pointer(state[_X]), (rows, inputs), np.float32)
    out = carray(_pointer(state[_OUT]), (rows, outputs), np.float32)
    allocated = _allocate(2 * widest * max(1, tile) * 4 + 64)
    scratch = (allocated + 63) // 64 * 64
    while task < tasks:
        if tile == 0:
            _carry_row(x, out, chain, task, scratch)
        elif tile == 16:
            _carry_16(x, out, chain, task * tile, scratch)
        else:
            _carry_64(x, out, chain, task * tile, scratch)
        _fetch_add(shared + 8 * _DONE, 1)
        task = _fetch_add(shared + 8 * _NEXT, 1)
    _free(allocated)


@njit
def _release(shared):
    if _fetch_add(shared + 8 * _REFERENCES, -1) == 1:
        _free(shared)


@njit
def _help(shared):
    """Do what a thread of XLA's pool does for a call; it may well come late, and find nothing."""
    _work(shared)
    _release(shared)


@njit
def _ask(frame, function, size, first, second, shared):
    """Call a function of XLA with a struct of the context and two fields; return its success."""
    api, request = _words(frame[_API], 20), _words(shared, _SHARED)[_REQUEST:]
    request[0], request[1], request[2] = size, 0, frame[_CONTEXT]
    request[3], request[4] = first, second
    error = _call(api[function], shared + 8 * _REQUEST)
    if error != 0:
        request[0], request[2] = 24, error
        _call(api[_DESTROY_ERROR], shared + 8 * _REQUEST)
    return error == 0


def _handle(address):
    """Answer a call of XLA: what interface this is written for, or the results of a chain."""
    frame = _words(address, 16)
    if frame[_EXTENSION] != 0:
        metadata = _words(_words(frame[_EXTENSION], 4)[3], 6)
        metadata[3], metadata[4], metadata[5] = _VERSION[0] + (_VERSION[1] << 32), 0, 0
        return 0
    if frame[_STAGE] & 0xFFFFFFFF != _EXECUTE:
        return 0
    buffers = _words(frame[_ARGS], 2)
    x, chain = _words(buffers[0], 6), _words(buffers[1], 6)[_DATA]
    rows, tile = _words(x[_DIMS], 2)[0], _words(chain, _HEADER)[1]
    tasks = (rows + tile - 1) // tile if tile else rows
    shared = _allocate(8 * _SHARED)
    state = _words(shared, _SHARED)
    state[_NEXT], state[_DONE], state[_REFERENCES], state[_TASKS] = 0, 0, 1, tasks
    state[_X], state[_CHAIN], state[_ROWS] = x[_DATA], chain, rows
    state[_OUT] = _words(_words(frame[_RESULTS], 1)[0], 6)[_DATA]
    # The calling thread works too, and waits for nobody who has not begun: there is no deadlock,
    # however many calls there are at once.
    answer = _REQUEST + 5
    state[answer] = 1
    _ask(frame, _NUM_THREADS, 32, shared + 8 * answer, 0, shared)
    for _ in range(min(state[answer], tasks) - 1):
        _fetch_add(shared + 8 * _REFERENCES, 1)
        if not _ask(frame, _SCHEDULE, 40, _helper(), shared, shared):
            _release(shared)
            break
    _work(shared)
    while _read(shared + 8 * _DONE) < tasks:
        pass
    _release(shared)
    return 0


def _compiled() -> Any:
    """Compile for this machine, which takes seconds, or load what was compiled before."""
    try:
        return cfunc("int64(int64)", cache=True)(_handle)
    except RuntimeError:  # nowhere to write to
        return cfunc("int64(int64)")(_handle)


_handler = _compiled()
_address = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(_handler.address)
jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(_address), platform="cpu")
