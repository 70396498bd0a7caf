"""What LLVM is told: operations on addresses and vectors that Numba has no words for.

`products` is written in terms of these. Addresses are int64.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from jaxprune.sparse.layout import BLOCK, TILES, UNROLLED

SIDE = 16  # of a block that is transposed
try:
    WIDE = llvmlite.binding.get_host_cpu_features().get("avx512f", False)
except RuntimeError:  # not known of this machine
    WIDE = False
FLOAT, BYTE, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)


def pointer_to(builder: Any, address: Any, kind: Any) -> Any:
    """Return an address as a pointer to a kind of value."""
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic
def pointer(context, address):
    """Return an address as a pointer that Numba takes."""

    def generate(context, builder, signature, args):
        return pointer_to(builder, args[0], BYTE)

    return types.voidptr(types.int64), generate


@intrinsic
def fetch_add(context, address, value):
    """Add to a word that threads share, and return what it was."""

    def generate(context, builder, signature, args):
        return builder.atomic_rmw("add", pointer_to(builder, args[0], I64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def read(context, address):
    """Return a word that threads share."""

    def generate(context, builder, signature, args):
        return builder.load_atomic(pointer_to(builder, args[0], I64), "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic
def call_c(context, function, argument):
    """Call a C function of one pointer."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(I64, [I64])
        return builder.call(pointer_to(builder, args[0], kind), [args[1]])

    return types.int64(types.int64, types.int64), generate


@intrinsic
def sleep(context):
    """Leave the core to others for a moment, where the system says how."""

    def generate(context, builder, signature, args):
        if llvmlite.binding.address_of_symbol("usleep"):
            kind = ir.FunctionType(I32, [I32])
            function = cgutils.get_or_insert_function(builder.module, kind, "usleep")
            builder.call(function, [I32(20)])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def allocate(context, size):
    """Allocate bytes, and return their address."""

    def generate(context, builder, signature, args):
        return builder.ptrtoint(context.nrt.allocate(builder, args[0]), I64)

    return types.int64(types.int64), generate


@intrinsic
def free(context, address):
    """Free what `allocate` returned."""

    def generate(context, builder, signature, args):
        context.nrt.free(builder, pointer_to(builder, args[0], BYTE))
        return context.get_dummy_value()

    return types.void(types.int64), generate


def loop(builder: Any, start: Any, end: Any, step: int, body: Any, carried: Sequence[Any]) -> Any:
    """Emit `for at in range(start, end, step): carried = body(at, carried)`; return `carried`."""
    before, inside, after = builder.block, *(builder.append_basic_block() for _ in range(2))
    builder.cbranch(builder.icmp_signed("<", start, end), inside, after)
    builder.position_at_end(inside)
    at, entering = builder.phi(I64), [builder.phi(value.type) for value in carried]
    leaving = body(at, entering)
    following = builder.add(at, I64(step))
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


def vector_of(size: int) -> ir.VectorType:
    """Return the type of a vector of float32."""
    return ir.VectorType(FLOAT, size)


def spread(builder: Any, value: Any, size: int) -> Any:
    """Return a vector that holds a number everywhere."""
    undefined, lanes = ir.Constant(vector_of(size), ir.Undefined), ir.VectorType(I32, size)
    first = builder.insert_element(undefined, value, I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(lanes, [0] * size))


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a b + c, fused where the machine can."""
    name = f"v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "f32"
    kind = ir.FunctionType(a.type, [a.type] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.{name}")
    return builder.call(function, [a, b, c])


def rectified(builder: Any, value: Any, relu: Any) -> Any:
    """Return max(value, 0) where `relu` is true, else the value."""
    zero = ir.Constant(value.type, None)
    negative = builder.fcmp_ordered("<", value, zero)  # not so of NaN, which stays
    return builder.select(relu, builder.select(negative, zero, value), value)


def column_sum(tile: int) -> Any:
    """Make the sum over one column: y = start + sum of values[k] x[indices[k]], of a tile's rows.

    Where this is not the `first` part of the column, `start` is what the earlier ones gave. Sums
    are kept in registers, in as many as are needed to hide the latency of an addition.
    """
    vector = vector_of(tile)
    zero = ir.Constant(vector, None)
    sums = 64 // tile
    unroll = max(2, sums)

    @intrinsic
    def column(context, x, indices, values, count, y, start, first, relu):
        def generate(context, builder, signature, args):
            x, indices, values, count, y, start, first, relu = args
            result = pointer_to(builder, y, vector)

            def add(at: Any, totals: list[Any], step: int) -> list[Any]:
                found = list(totals)
                for i in range(step):
                    k = builder.add(at, I64(i))
                    offset = builder.load(builder.gep(pointer_to(builder, indices, I32), [k]))
                    value = builder.load(builder.gep(pointer_to(builder, values, FLOAT), [k]))
                    address = builder.add(x, builder.sext(offset, I64))
                    features = builder.load(pointer_to(builder, address, vector), align=4)
                    value = spread(builder, value, tile)
                    total = found[i % len(found)]
                    found[i % len(found)] = multiply_add(builder, value, features, total)
                return found

            start = spread(builder, start, tile)
            total = builder.select(first, start, builder.load(result, align=4))
            totals, main = [total] + [zero] * (sums - 1), builder.and_(count, I64(-unroll))
            totals = loop(builder, I64(0), main, unroll, partial(add, step=unroll), totals)
            while len(totals) > 1:
                pairs = zip(totals[::2], totals[1::2], strict=True)
                totals = [builder.fadd(a, b) for a, b in pairs]
            (total,) = loop(builder, main, count, 1, partial(add, step=1), totals)
            builder.store(rectified(builder, total, relu), result, align=4)
            return context.get_dummy_value()

        word, flag = types.int64, types.boolean
        return types.void(word, word, word, word, word, types.float32, flag, flag), generate

    return column


def dense_block(tile: int) -> Any:
    """Make a block of columns: y[j] = bias[j] + sum of weights[k, j] x[k], of a tile's rows."""
    columns = BLOCK[tile]
    width = tile if WIDE else TILES[0]  # as many sums as there are registers for
    vector = vector_of(width)

    @intrinsic
    def block(context, x, weights, count, y, bias, relu):
        def generate(context, builder, signature, args):
            x, weights, count, y, bias, relu = args

            def add(at: Any, totals: Sequence[Any], offset: int) -> list[Any]:
                address = builder.add(x, builder.mul(at, I64(4 * tile)))
                place = pointer_to(builder, builder.add(address, I64(offset)), vector)
                features, found = builder.load(place, align=4), []
                first = builder.mul(at, I64(columns))
                for j, total in enumerate(totals):
                    place = builder.gep(
                        pointer_to(builder, weights, FLOAT), [builder.add(first, I64(j))]
                    )
                    value = spread(builder, builder.load(place), width)
                    found.append(multiply_add(builder, value, features, total))
                return found

            for offset in range(0, 4 * tile, 4 * width):
                biases = [
                    builder.gep(pointer_to(builder, bias, FLOAT), [I64(j)]) for j in range(columns)
                ]
                totals = [spread(builder, builder.load(place), width) for place in biases]
                body = partial(add, offset=offset)
                for j, total in enumerate(loop(builder, I64(0), count, 1, body, totals)):
                    place = builder.add(y, I64(4 * tile * j + offset))
                    builder.store(
                        rectified(builder, total, relu), pointer_to(builder, place, vector), align=4
                    )
            return context.get_dummy_value()

        word = types.int64
        return types.void(word, word, word, word, word, types.boolean), generate

    return block


@intrinsic
def add_row(context, value, indices, values, count, y):
    """Add one row: y[indices[k]] += value * values[k], of a count in whole `UNROLLED`.

    Indices differ, but for zeros that fill up, so that several can be loaded before one is stored.
    """

    def generate(context, builder, signature, args):
        factor, indices, values, count, y = args

        def add(at: Any, carried: list[Any], step: int) -> list[Any]:
            places, results = [], []
            for i in range(step):
                k = builder.add(at, I64(i))
                index = builder.load(builder.gep(pointer_to(builder, indices, I32), [k]))
                value = builder.load(builder.gep(pointer_to(builder, values, FLOAT), [k]))
                place = builder.gep(pointer_to(builder, y, FLOAT), [builder.sext(index, I64)])
                places.append(place)
                results.append(multiply_add(builder, factor, value, builder.load(place)))
            for place, result in zip(places, results, strict=True):
                builder.store(result, place)
            return carried

        loop(builder, I64(0), count, UNROLLED, partial(add, step=UNROLLED), [])
        return context.get_dummy_value()

    word = types.int64
    return types.void(types.float32, word, word, word, word), generate


@intrinsic
def transpose_block(context, source, from_stride, target, to_stride):
    """Transpose a block of 16 by 16 numbers; the strides of its rows are in bytes."""

    def generate(context, builder, signature, args):
        source, from_stride, target, to_stride = args

        def place(base: Any, stride: Any, i: int) -> Any:
            address = builder.add(base, builder.mul(stride, I64(i)))
            return pointer_to(builder, address, vector_of(SIDE))

        block = range(SIDE)
        rows = [builder.load(place(source, from_stride, i), align=4) for i in block]
        # A perfect shuffle of the rows, and of the numbers in each pair of them: once for every
        # bit of the indices.
        for _ in range(SIDE.bit_length() - 1):
            pairs = list(zip(rows[: SIDE // 2], rows[SIDE // 2 :], strict=True))
            rows = []
            for a, b in pairs:
                for half in (0, SIDE // 2):
                    lanes = [half + i // 2 + i % 2 * SIDE for i in block]
                    chosen = ir.Constant(ir.VectorType(I32, SIDE), lanes)
                    rows.append(builder.shuffle_vector(a, b, chosen))
        for i in block:
            builder.store(rows[i], place(target, to_stride, i), align=4)
        return context.get_dummy_value()

    word = types.int64
    return types.void(word, word, word, word), generate
