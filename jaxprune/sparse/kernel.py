"""The CPU kernel of sparse products: Numba code that XLA calls by its foreign function interface.

Rows and a chain of layers that `packing` made one array come in; the results of the last layer go
out. A layer is y = act(x W + b). There are two kernels:

- By tiles: some rows at once, transposed, so that a feature of all of them is one vector, and a
  kept weight one multiply-add of vectors. A tile goes through all layers while it is in the cache.
- By columns, for very few rows: inputs that are zero are skipped, as half of them are after a
  ReLU, and threads share the columns of a layer.

Both take layers that are hardly masked densely, in blocks of columns.
"""

import ctypes
from collections.abc import Sequence
from functools import partial
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import (
    carray,  # pyright: ignore[reportPrivateImportUsage]
    cfunc,
    njit,
    types,
)
from numba.core import cgutils
from numba.extending import intrinsic

TARGET = "jaxprune_sparse_chain"

TILES = (16, 64)
"""How many rows a tile may have; also the numbers that a vector of the kernel may have."""

BY_COLUMNS = 0
"""In the place of the rows of a tile: the other kernel."""

BLOCK = {BY_COLUMNS: 64, 16: 6, 64: 6}
"""How many columns a block of a dense layer has, by the rows of a tile."""

UNROLLED = 4
"""In multiples of how many kept weights the kernel by columns goes through an input's."""

# What a packed chain begins with, in words of eight bytes: how many layers it has, the rows of a
# tile, the largest width, its size in int32, how many threads are worth it; then of every layer:
# its sizes, its parts, whether it has a ReLU, whether it is dense, and where its data start.
HEADER, FIELDS = 5, 9
INPUTS, OUTPUTS, PARTS, RELU, DENSE, BIAS, STARTS, INDICES, VALUES = range(FIELDS)

# The interface of XLA (xla/ffi/api/c_api.h) in words of eight bytes: the fields of a call frame,
# of a buffer, and of the table of functions. They are the same in all versions 0.x; XLA refuses
# the registration when ours is too old for it.
_VERSION = 0, 1
_EXTENSION, _API, _CONTEXT, _STAGE, _ARGS, _RESULTS = 1, 2, 3, 4, 9, 14
_DATA, _DIMS = 3, 5
_DESTROY_ERROR, _SCHEDULE, _NUM_THREADS = 8, 17, 18
_EXECUTE = 3

# What the threads of one call share, in words: how many of them there are, the next task and those
# done, and what the call is of. What is asked of XLA, and its answer, come last; then, of the
# kernel by columns, the next part, those done and their number of every layer.
_REFERENCES, _NEXT, _DONE, _TASKS, _X, _OUT, _CHAIN, _ROWS, _TILE, _LAYERS, _WIDEST = range(11)
_BUFFERS, _REQUEST, _ANSWER = 11, 12, 17
_SHARED = 18

_SIDE = 16  # of a block that is transposed
try:
    _WIDE = llvmlite.binding.get_host_cpu_features().get("avx512f", False)
except RuntimeError:  # not known of this machine
    _WIDE = False
_FLOAT, _BYTE, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def run(x: Any, packed: Any, outputs: int) -> Any:
    """Return the results of a packed chain for rows of inputs, (rows, inputs)."""
    call = jax.ffi.ffi_call(
        TARGET,
        jax.ShapeDtypeStruct((x.shape[0], outputs), jnp.float32),
        vmap_method="sequential",
    )
    return call(x, packed)


@run.defjvp
def _no_derivative(outputs: int, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "sparse products have no derivative: differentiate the masked network, compile it after"
    )


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
def _sleep(context):
    """Leave the core to others for a moment, where the system says how."""

    def generate(context, builder, signature, args):
        if llvmlite.binding.address_of_symbol("usleep"):
            kind = ir.FunctionType(_I32, [_I32])
            function = cgutils.get_or_insert_function(builder.module, kind, "usleep")
            builder.call(function, [_I32(20)])
        return context.get_dummy_value()

    return types.void(), generate


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


def _rectified(builder: Any, value: Any, relu: Any) -> Any:
    zero = ir.Constant(value.type, None)
    negative = builder.fcmp_ordered("<", value, zero)  # not so of NaN, which stays
    return builder.select(relu, builder.select(negative, zero, value), value)


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
                    features = builder.load(_at(builder, address, vector), align=4)
                    value = _spread(builder, value, tile)
                    total = found[i % len(found)]
                    found[i % len(found)] = _multiply_add(builder, value, features, total)
                return found

            start = _spread(builder, start, tile)
            total = builder.select(first, start, builder.load(result, align=4))
            totals, main = [total] + [zero] * (sums - 1), builder.and_(count, _I64(-unroll))
            totals = _loop(builder, _I64(0), main, unroll, partial(add, step=unroll), totals)
            while len(totals) > 1:
                pairs = zip(totals[::2], totals[1::2], strict=True)
                totals = [builder.fadd(a, b) for a, b in pairs]
            (total,) = _loop(builder, main, count, 1, partial(add, step=1), totals)
            builder.store(_rectified(builder, total, relu), result, align=4)
            return context.get_dummy_value()

        word, flag = types.int64, types.boolean
        return types.void(word, word, word, word, word, types.float32, flag, flag), generate

    return column


def _dense_block(tile: int) -> Any:
    """Make a block of columns: y[j] = bias[j] + sum of weights[k, j] x[k], of a tile's rows."""
    columns = BLOCK[tile]
    width = tile if _WIDE else TILES[0]  # as many sums as there are registers for
    vector = _vector(width)

    @intrinsic
    def block(context, x, weights, count, y, bias, relu):
        def generate(context, builder, signature, args):
            x, weights, count, y, bias, relu = args

            def add(at: Any, totals: Sequence[Any], offset: int) -> list[Any]:
                address = builder.add(x, builder.mul(at, _I64(4 * tile)))
                place = _at(builder, builder.add(address, _I64(offset)), vector)
                features, found = builder.load(place, align=4), []
                first = builder.mul(at, _I64(columns))
                for j, total in enumerate(totals):
                    place = builder.gep(
                        _at(builder, weights, _FLOAT), [builder.add(first, _I64(j))]
                    )
                    value = _spread(builder, builder.load(place), width)
                    found.append(_multiply_add(builder, value, features, total))
                return found

            for offset in range(0, 4 * tile, 4 * width):
                biases = [
                    builder.gep(_at(builder, bias, _FLOAT), [_I64(j)]) for j in range(columns)
                ]
                totals = [_spread(builder, builder.load(place), width) for place in biases]
                body = partial(add, offset=offset)
                for j, total in enumerate(_loop(builder, _I64(0), count, 1, body, totals)):
                    place = builder.add(y, _I64(4 * tile * j + offset))
                    builder.store(
                        _rectified(builder, total, relu), _at(builder, place, vector), align=4
                    )
            return context.get_dummy_value()

        word = types.int64
        return types.void(word, word, word, word, word, types.boolean), generate

    return block


@intrinsic
def _row(context, value, indices, values, count, y):
    """Add one row: y[indices[k]] += value * values[k], of a count in whole `UNROLLED`.

    Indices differ, but for zeros that fill up, so that several can be loaded before one is stored.
    """

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

        _loop(builder, _I64(0), count, UNROLLED, partial(add, step=UNROLLED), [])
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
            return _at(builder, address, _vector(_SIDE))

        block = range(_SIDE)
        rows = [builder.load(place(source, from_stride, i), align=4) for i in block]
        # A perfect shuffle of the rows, and of the numbers in each pair of them: once for every
        # bit of the indices.
        for _ in range(_SIDE.bit_length() - 1):
            pairs = list(zip(rows[: _SIDE // 2], rows[_SIDE // 2 :], strict=True))
            rows = []
            for a, b in pairs:
                for half in (0, _SIDE // 2):
                    lanes = [half + i // 2 + i % 2 * _SIDE for i in block]
                    chosen = ir.Constant(ir.VectorType(_I32, _SIDE), lanes)
                    rows.append(builder.shuffle_vector(a, b, chosen))
        for i in block:
            builder.store(rows[i], place(target, to_stride, i), align=4)
        return context.get_dummy_value()

    word = types.int64
    return types.void(word, word, word, word), generate


# The kernel. Addresses and words are int64: unsigned ones would make indices floating point. Numba
# compiles these functions as they are written, without the tests' checks of types around them.


@no_type_check
@njit
def _words(address, count):
    return carray(_pointer(address), (count,), np.int64)


@no_type_check
@njit
def _floats(address, count):
    return carray(_pointer(address), (count,), np.float32)


@no_type_check
@njit
def _ints(address, count):
    return carray(_pointer(address), (count,), np.int32)


@no_type_check
@njit
def _wait(counter, count):
    """Wait until a word that threads share has been counted up.

    At first awake, which is fastest. After that a thread that is waited for may need this core.
    """
    turns = 0
    while _read(counter) < count:
        turns += 1
        if turns > 20_000:
            _sleep()


@no_type_check
def _by_tile(tile: int) -> Any:
    """Make the kernel that carries a tile of rows through all layers."""
    column, block, columns_of_block = _column(tile), _dense_block(tile), BLOCK[tile]

    @njit(error_model="numpy")
    def carry(x, out, chain, begin, scratch):
        head = _words(chain, HEADER)
        layers, widest, size = head[0], head[2], head[3]
        fields = _words(chain, HEADER + FIELDS * layers)
        ints, floats = _ints(chain, size), _floats(chain, size)
        count = min(tile, x.shape[0] - begin)
        here, there = scratch, scratch + widest * tile * 4
        features = _floats(here, x.shape[1] * tile)
        rows, columns = count // _SIDE * _SIDE, x.shape[1] // _SIDE * _SIDE
        width = 4 * x.shape[1]
        source = x.ctypes.data + begin * width
        for r in range(0, rows, _SIDE):
            for k in range(0, columns, _SIDE):
                _transpose(source + r * width + 4 * k, width, here + 4 * (k * tile + r), 4 * tile)
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
        results = _floats(here, out.shape[1] * tile)
        for r in range(count):
            for j in range(out.shape[1]):
                out[begin + r, j] = results[j * tile + r]

    return carry


_tile_16, _tile_64 = (_by_tile(tile) for tile in TILES)
_column_64 = _column(64)


@no_type_check
@njit(error_model="numpy")
def _work_by_tiles(shared):
    """Take tiles, and carry them through all layers, until none is left."""
    state = _words(shared, _SHARED)
    tasks, chain, rows = state[_TASKS], state[_CHAIN], state[_ROWS]
    task = _fetch_add(shared + 8 * _NEXT, 1)
    if task >= tasks:
        return
    layers, tile, widest = state[_LAYERS], state[_TILE], state[_WIDEST]
    fields = _words(chain, HEADER + FIELDS * layers)
    x_shape = rows, fields[HEADER + INPUTS]
    out_shape = rows, fields[HEADER + (layers - 1) * FIELDS + OUTPUTS]
    x = carray(_pointer(state[_X]), x_shape, np.float32)
    out = carray(_pointer(state[_OUT]), out_shape, np.float32)
    allocated = _allocate(8 * widest * tile + 64)
    scratch = (allocated + 63) // 64 * 64
    while task < tasks:
        if tile == 16:
            _tile_16(x, out, chain, task * tile, scratch)
        else:
            _tile_64(x, out, chain, task * tile, scratch)
        _fetch_add(shared + 8 * _DONE, 1)
        task = _fetch_add(shared + 8 * _NEXT, 1)
    _free(allocated)


@no_type_check
@njit(error_model="numpy")
def _columns(chain, field, part, x, y, lists):
    """Compute one part of a layer's columns, of one row; return where it begins and ends."""
    inputs, outputs, parts, relu = field[INPUTS], field[OUTPUTS], field[PARTS], field[RELU] != 0
    unit = 64 if field[DENSE] else 1
    units = (outputs + unit - 1) // unit
    begin = units * part // parts * unit
    end = min(outputs, units * (part + 1) // parts * unit)
    bias = _floats(chain + 4 * field[BIAS], outputs)
    for j in range(begin, end):
        y[j] = bias[j]
    target = y.ctypes.data
    if field[DENSE]:
        # The inputs that are not zero, as a column of offsets of what is multiplied with them.
        offsets, values = _ints(lists, inputs), _floats(lists + 4 * inputs, inputs)
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
        starts = _ints(chain + 4 * (field[STARTS] + part * (inputs + 1)), inputs + 1)
        for k in range(inputs):
            if x[k] != 0:
                first = np.int64(starts[k])
                indices = chain + 4 * (field[INDICES] + first)
                kept = chain + 4 * (field[VALUES] + first)
                _row(x[k], indices, kept, np.int64(starts[k + 1]) - first, target)
        if relu:
            for j in range(begin, end):
                y[j] = np.float32(0) if y[j] < 0 else y[j]
    return begin, end


@no_type_check
@njit(error_model="numpy")
def _work_by_columns(shared):
    """Take parts of a layer's columns until none is left, wait for the others, and go on."""
    state = _words(shared, _SHARED)
    chain, rows, layers, widest = state[_CHAIN], state[_ROWS], state[_LAYERS], state[_WIDEST]
    fields = _words(chain, HEADER + FIELDS * layers)
    parts = _words(shared, _SHARED + 3 * layers)[_SHARED + 2 :: 3]
    lists = _allocate(8 * widest)
    for n in range(layers):
        target = state[_BUFFERS] + 4 * widest * rows * (n % 2)
        counter = shared + 8 * (_SHARED + 3 * n)
        part = _fetch_add(counter, 1)
        while part < parts[n]:
            field = fields[HEADER + n * FIELDS :]
            inputs, outputs = field[INPUTS], field[OUTPUTS]
            source = state[_BUFFERS] + 4 * widest * rows * ((n + 1) % 2) if n else state[_X]
            stride = 4 * widest if n else 4 * inputs
            for r in range(rows):
                x = _floats(source + stride * r, inputs)
                y = _floats(target + 4 * widest * r, widest)
                begin, end = _columns(chain, field, part, x, y, lists)
                if n == layers - 1:
                    out = _floats(state[_OUT] + 4 * outputs * r, outputs)
                    for j in range(begin, end):
                        out[j] = y[j]
            _fetch_add(counter + 8, 1)
            part = _fetch_add(counter, 1)
        _wait(counter + 8, parts[n])
    _free(lists)


@no_type_check
@njit
def _work(shared):
    """Do tasks of a call. What it is of may be touched with one in hand alone, by the late too."""
    if _words(shared, _SHARED)[_TILE]:
        _work_by_tiles(shared)
    else:
        _work_by_columns(shared)


@no_type_check
@njit
def _release(shared):
    if _fetch_add(shared + 8 * _REFERENCES, -1) == 1:
        _free(shared)


@no_type_check
@njit
def _help(shared):
    """Do what a thread of XLA's pool does for a call; it may well come late, and find nothing."""
    _work(shared)
    _release(shared)


@no_type_check
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


@no_type_check
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
    rows, head = _words(x[_DIMS], 2)[0], _words(chain, HEADER)
    layers, tile, widest, threads = head[0], head[1], head[2], head[4]
    if rows == 0:
        return 0
    tasks = (rows + tile - 1) // tile if tile else threads
    words = _SHARED if tile else _SHARED + 3 * layers
    shared = _allocate(8 * words + (0 if tile else 8 * widest * rows + 64))
    state = _words(shared, words)
    state[:] = 0
    state[_REFERENCES], state[_TASKS] = 1, tasks
    state[_X], state[_CHAIN], state[_ROWS] = x[_DATA], chain, rows
    state[_TILE], state[_LAYERS], state[_WIDEST] = tile, layers, widest
    state[_OUT] = _words(_words(frame[_RESULTS], 1)[0], 6)[_DATA]
    state[_BUFFERS] = (shared + 8 * words + 63) // 64 * 64
    fields = _words(chain, HEADER + FIELDS * layers)
    for n in range(0 if tile else layers):
        state[_SHARED + 3 * n + 2] = fields[HEADER + FIELDS * n + PARTS]
    # The calling thread works too, and waits for nobody who has not begun: there is no deadlock,
    # however many calls there are at once.
    state[_ANSWER] = 1
    _ask(frame, _NUM_THREADS, 32, shared + 8 * _ANSWER, 0, shared)
    for _ in range(min(state[_ANSWER], tasks, threads) - 1):
        _fetch_add(shared + 8 * _REFERENCES, 1)
        if not _ask(frame, _SCHEDULE, 40, _helper(), shared, shared):
            _release(shared)
            break
    _work(shared)
    if tile:
        _wait(shared + 8 * _DONE, tasks)
    _release(shared)
    return 0


def _compiled() -> Any:
    """Compile for this machine, which takes seconds, or load what was compiled before."""
    try:
        return cfunc("int64(int64)", cache=True)(_handle)
    except (RuntimeError, OSError):  # nowhere to write to
        return cfunc("int64(int64)")(_handle)


_handler = _compiled()
_address = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(_handler.address)
jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(_address), platform="cpu")
