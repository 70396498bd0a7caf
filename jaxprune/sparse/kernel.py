"""The CPU kernel of sparse products, which XLA calls by its foreign function interface.

Rows and a chain of layers that `packing` made one array come in; the results of the last layer go
out. A layer is y = act(x W + b). There are two kernels:

- By tiles: some rows at once, transposed, so that a feature of all of them is one vector, and a
  kept weight one multiply-add of vectors. A tile goes through all layers while it is in the cache.
- By columns, for very few rows: inputs that are zero are skipped, as half of them are after a
  ReLU, and threads share the columns of a layer.

Both take layers that are hardly masked densely, in blocks of columns.
"""

import ctypes
import hashlib
from functools import partial
from pathlib import Path
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from jaxprune.sparse.layout import (
    ANSWER,
    BUFFERS,
    CHAIN,
    DONE,
    FIELDS,
    HEADER,
    LAYERS,
    OUT,
    PARTS,
    REFERENCES,
    REQUEST,
    ROWS,
    SHARED,
    TASKS,
    TILE,
    WIDEST,
    X,
)
from jaxprune.sparse.llvm import I64, allocate, call_c, fetch_add, free
from jaxprune.sparse.products import as_words, wait, work_by_columns, work_by_tiles

TARGET = "jaxprune_sparse_chain"

# The interface of XLA (xla/ffi/api/c_api.h) in words of eight bytes: the fields of a call frame,
# of a buffer, and of the table of functions. They are the same in all versions 0.x; XLA refuses
# the registration when ours is too old for it.
_VERSION = 0, 1
_EXTENSION, _API, _CONTEXT, _STAGE, _ARGS, _RESULTS = 1, 2, 3, 4, 9, 14
_DATA, _DIMS = 3, 5
_DESTROY_ERROR, _SCHEDULE, _NUM_THREADS = 8, 17, 18
_EXECUTE = 3


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


@intrinsic
def _helper(context):
    """Return the address of a C function that does what `_help` does."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [I64])
        function = cgutils.get_or_insert_function(builder.module, kind, "jaxprune_sparse_help")
        if not function.blocks:
            function.linkage = "internal"
            inner = ir.IRBuilder(function.append_basic_block())
            void = types.void(types.int64)
            compiled = context.compile_subroutine(inner, _help.py_func, void)
            context.call_internal_no_propagate(inner, compiled.fndesc, void, function.args)
            inner.ret_void()
        return builder.ptrtoint(function, I64)

    return types.int64(), generate


@no_type_check
@njit
def _work(shared):
    """Run tasks until none is left.

    A helper may start after the call has returned and its buffers are freed, so a task is claimed
    before any of them is touched.
    """
    if as_words(shared, SHARED)[TILE]:
        work_by_tiles(shared)
    else:
        work_by_columns(shared)


@no_type_check
@njit
def _release(shared):
    if fetch_add(shared + 8 * REFERENCES, -1) == 1:
        free(shared)


@no_type_check
@njit
def _help(shared):
    """Run tasks in a thread of XLA's pool, and give up its hold of what is shared."""
    _work(shared)
    _release(shared)


@no_type_check
@njit
def _ask(frame, function, size, first, second, shared):
    """Call a function of XLA with a struct of the context and two fields; return its success."""
    api, request = as_words(frame[_API], 20), as_words(shared, SHARED)[REQUEST:]
    request[0], request[1], request[2] = size, 0, frame[_CONTEXT]
    request[3], request[4] = first, second
    error = call_c(api[function], shared + 8 * REQUEST)
    if error != 0:
        request[0], request[2] = 24, error
        call_c(api[_DESTROY_ERROR], shared + 8 * REQUEST)
    return error == 0


@no_type_check
def _handle(address):
    """Answer a call of XLA: what interface this is written for, or the results of a chain."""
    frame = as_words(address, 16)
    if frame[_EXTENSION] != 0:
        metadata = as_words(as_words(frame[_EXTENSION], 4)[3], 6)
        metadata[3], metadata[4], metadata[5] = _VERSION[0] + (_VERSION[1] << 32), 0, 0
        return 0
    if frame[_STAGE] & 0xFFFFFFFF != _EXECUTE:
        return 0
    buffers = as_words(frame[_ARGS], 2)
    x, chain = as_words(buffers[0], 6), as_words(buffers[1], 6)[_DATA]
    rows, head = as_words(x[_DIMS], 2)[0], as_words(chain, HEADER)
    layers, tile, widest, threads = head[0], head[1], head[2], head[4]
    if rows == 0:
        return 0
    tasks = (rows + tile - 1) // tile if tile else threads
    words = SHARED if tile else SHARED + 3 * layers
    shared = allocate(8 * words + (0 if tile else 8 * widest * rows + 64))
    state = as_words(shared, words)
    state[:] = 0
    state[REFERENCES], state[TASKS] = 1, tasks
    state[X], state[CHAIN], state[ROWS] = x[_DATA], chain, rows
    state[TILE], state[LAYERS], state[WIDEST] = tile, layers, widest
    state[OUT] = as_words(as_words(frame[_RESULTS], 1)[0], 6)[_DATA]
    state[BUFFERS] = (shared + 8 * words + 63) // 64 * 64
    fields = as_words(chain, HEADER + FIELDS * layers)
    for n in range(0 if tile else layers):
        state[SHARED + 3 * n + 2] = fields[HEADER + FIELDS * n + PARTS]
    # The calling thread works too, and waits for nobody who has not begun: there is no deadlock,
    # however many calls there are at once.
    state[ANSWER] = 1
    _ask(frame, _NUM_THREADS, 32, shared + 8 * ANSWER, 0, shared)
    for _ in range(min(state[ANSWER], tasks, threads) - 1):
        fetch_add(shared + 8 * REFERENCES, 1)
        if not _ask(frame, _SCHEDULE, 40, _helper(), shared, shared):
            _release(shared)
            break
    _work(shared)
    if tile:
        wait(shared + 8 * DONE, tasks)
    _release(shared)
    return 0


_answer = njit(_handle)


def _compiled() -> Any:
    """Compile for this machine, which takes seconds, or load what was compiled before."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).digest()
    version = int.from_bytes(digest[:7], "big")

    @no_type_check
    def handle(address):
        # Numba finds compiled code by this file's time and by what this function closes over: so
        # other sources in the files that it imports are compiled anew.
        return _answer(address) if version else 1

    try:
        return cfunc("int64(int64)", cache=True)(handle)
    except (RuntimeError, OSError):  # nowhere to write to
        return cfunc("int64(int64)")(handle)


_handler = _compiled()
_address = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(_handler.address)
jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(_address), platform="cpu")
