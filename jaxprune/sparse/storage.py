"""Sparse networks in files: the kept weights, without loss or quantised, and where they are.

Params and their masks come in and come back, and `lossless_bound` tells what to compare the size
of the file with.

The file is a safetensors container with a tensor of bytes for each leaf: streams of `codec`, each
after its length. Its only metadata, `jaxprune`, is JSON: the containers of the tree, what each
leaf is, and the SHA-256 of the file with zeros in the digest's place. A file has at least one byte
for 1024 of the arrays in it (zeros fill it up): what a damaged or hostile one can make its reader
allocate is bounded by some 3 kB for each of its bytes, and checked before anything is allocated.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import zstandard

from jaxprune import files, trees
from jaxprune.distribution import check_choice
from jaxprune.masks import check_masks
from jaxprune.sparse import codec
from jaxprune.types import Masks, Params

Values = Literal["float32", "float16", "int8", "codebook4", "codebook5", "codebook6"]
"""How kept weights are stored: see `save_sparse`."""

_VERSION = 1
_NO_DIGEST = "0" * 64
_EXPANSION = 1024
_BLOCK = 1 << 14
_ROUNDS = 100  # of k-means; the more, the more even the clusters, which takes more bits to code


def save_sparse(
    path: Path | str, params: Params, masks: Masks, *, values: Values = "float32"
) -> None:
    r"""Write a network to one file, of which only the kept weights and their places take space.

    Until all of the file is on disk, `path` is what it was before.

    Args:
        path: the file to write, or to replace.
        params: arrays in dicts (with keys of str or int), lists and tuples.
        masks: the same tree and shapes, bool, True is kept.
        values: how the kept weights are stored. `float32` loses nothing, whatever the dtype: each
            leaf keeps its own, and every bit. The others are for leaves of floating point numbers
            that the masks prune; all other leaves, such as biases and an output layer that is not
            pruned, stay without loss.

            - `float16`, for leaves that are wider.
            - `int8`: $\mathrm{round}(w / s)$ with $s = \max|w| / 127$ over the kept weights of an
              index of the last axis.
            - `codebook4`, `codebook5`, `codebook6`: the nearest of 16, 32 or 64 values a leaf, by
              k-means. A leaf of no more distinct values is stored without loss. So to fine-tune
              the values of a network that was loaded, train `values` of `values, index =
              jnp.unique(leaf, return_inverse=True)`, with `values[index]` for the leaf (whose
              gradients JAX sums for each value), and save it again.

    Raises:
        ValueError: the trees or a leaf's shapes differ, an unknown way to store values, or a leaf
            that is to be quantised has kept weights that are not finite, or too large for it.
        TypeError: a leaf is not an array of numbers or bools, a mask is not bool, or there are
            other containers.
        OSError: the file cannot be written.

    Example:
        >>> params, masks = {"dense": jnp.arange(4.0)}, {"dense": jnp.array([True, False] * 2)}
        >>> save_sparse("/no/such/folder/net.safetensors", params, masks)
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] No such file or directory: '/no/such/folder/net.safetensors'

    Reference:
        Han, Mao, Dally. Deep Compression. ICLR 2016. Here positions are a bitmap whose rows and
        columns have densities of their own, in place of gaps; and the coder is arithmetic.
    """
    path = Path(path)
    check_choice("values", values, get_args(Values))
    check_masks(masks, params)
    tree = trees.encode_containers(params)
    kept = jax.tree.map(np.asarray, jax.tree.leaves(masks))
    names, arrays = zip(*trees.paths_and_leaves(params), strict=True) if kept else ((), ())
    with ThreadPoolExecutor() as threads:  # most of the work is outside of Python's lock
        encoded = list(threads.map(_encode_leaf, names, arrays, kept, itertools.repeat(values)))
    leaves, tensors, allocated = [], {}, 0
    for i, (name, (entry, data)) in enumerate(zip(names, encoded, strict=True)):
        leaves.append(entry)
        # Other readers see the paths; the number tells {1: ...} from {"1": ...}.
        readable = name.encode("ascii", "backslashreplace").decode()
        tensors[f"{i} {readable}"] = np.frombuffer(data, np.uint8)
        allocated += _allocated(entry["shape"], jnp.dtype(entry["dtype"]))
    fill = allocated // _EXPANSION - sum(tensor.size for tensor in tensors.values())
    if fill > 0:
        tensors["fill"] = np.zeros(fill, np.uint8)
    header = {"version": _VERSION, "sha256": _NO_DIGEST, "tree": tree, "leaves": leaves}
    raw = safetensors.numpy.save(tensors, {"jaxprune": json.dumps(header, separators=(",", ":"))})
    files.write(path, raw.replace(_NO_DIGEST.encode(), hashlib.sha256(raw).hexdigest().encode(), 1))


def load_sparse(path: Path | str) -> tuple[Params, Masks]:
    """Read what `save_sparse` wrote.

    Args:
        path: the file.

    Returns:
        The params, in NumPy arrays of the dtypes that were saved, zero where they are pruned; and
        the masks. `jax.device_put` makes arrays of JAX of them, which lookups under `jit` need.

    Raises:
        ValueError: it is no such file, or not what was saved.
        OSError: the file cannot be read.

    Example:
        >>> load_sparse("/dev/null")
        Traceback (most recent call last):
        ValueError: /dev/null is not a file
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        return _decode(_read(path))
    except _DAMAGE as error:
        told = str(error) if isinstance(error, _TOLD) else "it is damaged"
        raise ValueError(f"{path} is not a whole file of a sparse network: {told}") from error


def lossless_bound(masks: Masks) -> float:
    r"""Return how many bytes a network takes where nothing is known of masks and weights.

    That is $\sum (\log_2 \binom{n}{k} / 8 + 4 k)$ over leaves of n weights of which k are kept, in
    float32. A file is smaller where its weights have something in common.

    Example:
        >>> lossless_bound([np.array([True] * 2 + [False] * 2), np.array([True])])
        12.323...
    """
    sizes = [(np.size(mask), int(np.count_nonzero(mask))) for mask in jax.tree.leaves(masks)]
    return math.fsum(_log_choose(n, k) / math.log(2) / 8 + 4 * k for n, k in sizes)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _encode_leaf(
    name: str, leaf: Any, mask: np.ndarray, values: Values
) -> tuple[dict[str, Any], bytes]:
    """Return what the header holds of a leaf, and its streams."""
    array = _to_array(name, leaf)
    kept: Any = int(np.count_nonzero(mask))
    streams: list[bytes] = []
    weights = array[mask]
    if not 0 < kept < mask.size or not jnp.issubdtype(array.dtype, jnp.floating):
        values = "float32"
    if 0 < kept < mask.size:
        classes, bits, kept = codec.pack_mask(mask.reshape(-1, mask.shape[-1]))
        streams += [classes, bits]
    if values != "float32" and not np.isfinite(weights).all():
        raise ValueError(f"leaf {name!r} has kept weights that are not finite: use float32")
    with np.errstate(over="ignore", invalid="ignore"):
        largest = weights
        if values == "float16" and array.dtype.itemsize > 2:
            largest = weights = weights.astype(np.float16)
        elif values == "int8":
            wide = np.where(mask, array, array.dtype.type(0)).astype(_wide(array.dtype))
            scales = np.abs(wide).reshape(-1, mask.shape[-1]).max(axis=0) / 127
            divisors = np.broadcast_to(np.where(scales > 0, scales, 1), mask.shape)[mask]
            weights = np.clip(np.rint(wide[mask] / divisors), -127, 127).astype(np.int8)
            largest = 127 * scales
            streams += _to_planes(scales)
        elif values.startswith("codebook"):
            largest, weights = _cluster(weights, 2 ** int(values[-1]))
            streams += [largest.size.to_bytes(1), *_to_planes(largest)]
    if values != "float32" and not np.isfinite(largest).all():
        raise ValueError(f"leaf {name!r} has weights that are too large for {values}")
    entry = {"dtype": array.dtype.name, "shape": array.shape, "kept": kept, "values": values}
    streams += _to_planes(weights)
    return entry, b"".join(len(stream).to_bytes(8, "little") + stream for stream in streams)


def _decode_leaf(entry: Any, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    dtype, shape = jnp.dtype(entry["dtype"]), tuple(entry["shape"])
    kept, values, size = entry["kept"], entry["values"], math.prod(entry["shape"])
    streams = _split(data)
    if isinstance(kept, list) and size:
        flat = (size // shape[-1], shape[-1])
        mask = codec.unpack_mask(next(streams), next(streams), kept, flat).reshape(shape)
        kept = sum(kept)
    elif kept in (0, size) and values == "float32":
        mask = np.full(shape, kept == size)
    else:
        raise ValueError("a leaf keeps another number of weights than it says")
    if values == "float32" or (values == "float16" and dtype.itemsize <= 2):
        weights = _from_planes(streams, dtype, kept)
    elif values == "float16":
        weights = _from_planes(streams, np.dtype(np.float16), kept)
    elif values == "int8":
        scales = np.broadcast_to(_from_planes(streams, _wide(dtype), shape[-1]), shape)[mask]
        weights = _from_planes(streams, np.dtype(np.int8), kept).astype(scales.dtype) * scales
    elif values in get_args(Values):
        (count,) = next(streams)  # one byte: at most 255
        centroids = _from_planes(streams, dtype, count)
        weights = centroids[_from_planes(streams, np.dtype(np.uint8), kept)]
    else:
        raise ValueError(f"values are stored in an unknown way, {values!r}")
    if next(streams, None) is not None:
        raise ValueError("a leaf has more bytes than it needs")
    array = np.zeros(shape, dtype)
    array[mask] = weights.astype(dtype)
    return array, mask


def _read(path: Path) -> bytes:
    """Read a file of as many bytes as its header says, or a few of another."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(first := file.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError("it has no header")
        tensors = json.loads(header := file.read(length))
        ends = [e["data_offsets"][1] for name, e in tensors.items() if name != "__metadata__"]
        if size != 8 + length + max(ends, default=0):
            raise ValueError("it has another size than its header says")
        return first + header + file.read(size - 8 - length)


def _decode(raw: bytes) -> tuple[Params, Masks]:
    """Read a whole file; of what it says nothing is trusted."""
    tensors = {name.partition(" ")[0]: tensor for name, tensor in safetensors.deserialize(raw)}
    container = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    if not (text := container.get("__metadata__", {}).get("jaxprune")):
        raise ValueError("it has no metadata `jaxprune`")
    header = json.loads(text)
    if header["version"] != _VERSION:
        raise ValueError(f"its format is {header['version']!r:.20}, and {_VERSION} can be read")
    digest = header["sha256"].encode()
    if hashlib.sha256(raw.replace(digest, _NO_DIGEST.encode(), 1)).hexdigest().encode() != digest:
        raise ValueError("its SHA-256 is not that of what was saved")
    allocated = 0
    for entry in header["leaves"]:
        shape, dtype = entry["shape"], jnp.dtype(entry["dtype"])
        if dtype.name != entry["dtype"] or not _storable(dtype):
            raise ValueError(f"there is no dtype {entry['dtype']!r}")
        if len(shape) > 32 or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"{shape} is no shape")
        allocated += _allocated(shape, dtype)
    if allocated > _EXPANSION * len(raw):
        raise ValueError("its arrays are too large for the size of the file")
    leaves = [
        _decode_leaf(entry, bytes(tensors[str(i)]["data"]))
        for i, entry in enumerate(header["leaves"])
    ]
    structure = jax.tree.structure(trees.decode_containers(header["tree"]))
    params, masks = zip(*leaves, strict=True) if leaves else ((), ())
    return jax.tree.unflatten(structure, params), jax.tree.unflatten(structure, masks)


# What reading a file can raise that `save_sparse` did not write.
_DAMAGE = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
    MemoryError, StopIteration, Warning, safetensors.SafetensorError, zstandard.ZstdError,
)  # fmt: skip
_TOLD = ValueError, safetensors.SafetensorError, zstandard.ZstdError  # others say nothing of files


def _to_array(name: str, leaf: Any) -> np.ndarray:
    if jnp.issubdtype(getattr(leaf, "dtype", float), jax.dtypes.extended):
        raise TypeError(f"leaf {name!r} is of {leaf.dtype}: save jax.random.key_data of it")
    array = np.asarray(leaf)
    if not _storable(array.dtype):
        raise TypeError(f"leaf {name!r} must be of numbers or bools, got {array.dtype}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _storable(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.number) or dtype.kind == "b"


def _allocated(shape: Sequence[int], dtype: np.dtype) -> int:
    """Return the bytes of a leaf and its mask."""
    return math.prod(shape) * (dtype.itemsize + 1)


def _wide(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float64 if dtype.itemsize >= 8 else np.float32)


def _cluster(weights: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `most` centroids, rising, and the index of the nearest for each weight."""
    dtype, weights = weights.dtype, weights.astype(_wide(weights.dtype), copy=False)
    ordered = np.sort(weights)
    if np.count_nonzero(ordered[1:] != ordered[:-1]) < most:
        centroids = np.unique(ordered)
    else:
        sums = np.concatenate([[0], np.cumsum(ordered, dtype=np.float64)])
        # Evenly spaced: starts of less error end in clusters that take more bits to code.
        centroids = np.linspace(ordered[0], ordered[-1], most)
        for _ in range(_ROUNDS):
            ends = np.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2)
            ends = np.unique(np.array([0, *ends, ordered.size]))  # without those of no weight
            old, centroids = centroids, np.diff(sums[ends]) / np.diff(ends)
            if np.array_equal(centroids, old):
                break
    centroids = np.unique(centroids.astype(dtype))
    wide = centroids.astype(np.float64)
    # No weight lies between a middle and the number of the weights' dtype at or below it.
    middles = (wide[1:] + wide[:-1]) / 2
    below = middles.astype(weights.dtype)
    below = np.where(below > middles, np.nextafter(below, -np.inf, dtype=below.dtype), below)
    index = np.zeros(weights.size, np.uint8)
    for start in range(0, weights.size, _BLOCK):  # which stays in the cache
        block = slice(start, start + _BLOCK)
        for limit in below:
            index[block] += weights[block] > limit
    return centroids, index


def _rotates(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize in (2, 4, 8)


def _to_planes(array: np.ndarray) -> list[bytes]:
    """Code the first bytes of all numbers, their second bytes, and so on.

    The bits of a float are rotated left by one, so that the exponent of a float32 or bfloat16,
    which alone has few values, is a byte; the sign joins the rest, which no coder makes smaller.
    """
    bits = array
    if _rotates(array.dtype):
        bits = array.view(f"u{array.dtype.itemsize}")
        bits = (bits << 1) | (bits >> (8 * array.dtype.itemsize - 1))
    planes = bits.view(np.uint8).reshape(array.size, array.dtype.itemsize)
    return [codec.pack(np.ascontiguousarray(plane)) for plane in planes.T]


def _from_planes(streams: Iterator[bytes], dtype: np.dtype, size: int) -> np.ndarray:
    planes = np.empty((size, dtype.itemsize), np.uint8)
    for i in range(dtype.itemsize):
        planes[:, i] = codec.unpack(next(streams), size)
    if dtype.kind == "b":
        return planes[:, 0] != 0
    if not _rotates(dtype):
        return planes.reshape(-1).view(dtype)
    bits = planes.reshape(-1).view(f"u{dtype.itemsize}")
    return ((bits >> 1) | (bits << (8 * dtype.itemsize - 1))).view(dtype)


def _split(data: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(data):
        end = start + 8 + int.from_bytes(data[start : start + 8], "little")
        yield data[start + 8 : end]
        start = end
