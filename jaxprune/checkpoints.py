"""Checkpoints: trees of arrays in, verified host arrays out.

What comes in are named trees (parameters, masks, optimiser state); what goes out, after a kill or
for analysis, are the same trees as NumPy arrays, bit for bit, or an error that says what is broken.
Training writes them; `results.load_run` and a run that goes on read them.

A checkpoint is a directory with one Orbax checkpoint an item and a `manifest.json`, which holds
every item's containers, shapes, dtypes and the SHA-256 of its files, because Orbax restores a
flipped bit in silence. It is built under another name and renamed once all is on disk: what has its
final name is complete. The leaves of an item are stored by number, and the manifest has their
paths: any key will do, and containers, empty ones too, come back as they were.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from jaxprune import files, trees

_MANIFEST = "manifest.json"
_ITEM_BYTES, _LEAF_BYTES = 2**17, 2**12  # what Orbax and the manifest need besides the arrays
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # others may pass


class CorruptCheckpoint(ValueError):
    """A checkpoint that is not what was saved: its `path` and the `reason`."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"checkpoint {path} is corrupt: {reason}")
        self.path, self.reason = path, reason


def check_writable(folder: Path) -> None:
    """Make a folder for checkpoints, and write to it; to be called before anything is trained.

    Raises:
        ValueError: Orbax cannot write under its name.
        OSError: it cannot be made or written.
    """
    for part in folder.absolute().parts[1:]:
        if part.encode(errors="replace").decode() != part or "\\" in part or part.endswith(":"):
            raise ValueError(
                f"{ascii(str(folder))} cannot hold checkpoints: {ascii(part)} is not UTF-8, has a "
                "backslash or ends with a colon"
            )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # which names a temporary file, or none
        raise OSError(error.errno, error.strerror or str(error), str(folder)) from error


def save(path: Path, /, **items: PyTree) -> None:
    """Write a checkpoint; until all of it is on disk, `path` does not exist.

    A checkpoint that is there is replaced once the new one is on disk.

    Args:
        path: the directory to make. What a killed `save` left of it is replaced.
        **items: trees of arrays of any shape and dtype. A tree with containers other than dict,
            list, tuple and None, such as an optax state, needs a target when it is loaded.

    Raises:
        ValueError: an item's name is no identifier.
        TypeError: a leaf is not an array of numbers or bools; the message names it.
        OSError: it cannot be written, such as for want of space; nothing is left of it.
    """
    if wrong := [name for name in items if not name.isidentifier()]:
        raise ValueError(f"an item's name must be an identifier, got {wrong[0]!r}")
    items = {name: _to_host(name, item) for name, item in items.items()}
    staged = _staged(path)
    _clear(staged)
    staged.mkdir(parents=True)
    try:
        _check_space(staged, items)
        entries = {name: _save_item(staged / name, item) for name, item in items.items()}
        _write_manifest(staged, entries)
        old = path.with_name(f"{path.name}.old.tmp")
        if path.exists():
            path.rename(old)
        staged.rename(path)
        _clear(old)
    except Exception:
        _clear(staged)
        raise
    files.sync(path.parent)


def load(path: Path, name: str, target: PyTree | None = None) -> PyTree:
    """Verify one item of a checkpoint and read it.

    Args:
        path: the checkpoint.
        name: the item.
        target: a tree of arrays or `jax.ShapeDtypeStruct`s with the item's structure, shapes and
            dtypes, such as `jax.eval_shape(optimizer.init, params)`. Not needed for an item made
            of dict, list, tuple and None.

    Returns:
        The item; its leaves are NumPy arrays with the dtypes and the bits that were saved.

    Raises:
        CorruptCheckpoint: a file is missing, cut or changed.
        ValueError: there is no such item, the target does not match, or one is needed.
    """
    entry = verify(path, name)[name]
    saved = wanted = {tuple(at): leaf for at, *leaf in entry["leaves"]}
    if target is not None:
        wanted = _describe(target)
    elif "tree" in entry:
        target = trees.decode_containers(entry["tree"])
    else:
        raise ValueError(
            f"{path}: {name} is not made of dict, list and tuple alone: pass a target, such as "
            "jax.eval_shape(network.init, key)"
        )
    for at in saved | wanted:
        here, there = saved.get(at, "absent"), wanted.get(at, "absent")
        if here != there:
            where = "/".join((name, *at))
            raise ValueError(f"{path}: {where} is {here} here, but {there} in the target")
    arrays = [np.empty(shape, jnp.dtype(dtype)) for dtype, shape in saved.values()]
    if stored := _stored(arrays):
        with _orbax(path / name):
            loaded = ocp.load(str(path.absolute() / name), stored)
        arrays = [loaded.get(str(i), array) for i, array in enumerate(arrays)]
    by_path = dict(zip(saved, arrays, strict=True))
    return jax.tree.unflatten(jax.tree.structure(target), [by_path[at] for at in wanted])


def verify(path: Path, *names: str) -> dict[str, dict[str, Any]]:
    """Compare the files of the named items (default: all) with their digests.

    Returns:
        What the manifest holds, a dict an item.

    Raises:
        CorruptCheckpoint: the manifest or a file is missing, cut or changed.
        ValueError: there is no item of that name.
    """
    entries = contents(path)
    if absent := [name for name in names if name not in entries]:
        raise ValueError(f"{path} holds {', '.join(entries) or 'nothing'}, but no {absent[0]}")
    for name in names or entries:
        for file, digest in entries[name]["files"].items():
            try:
                found = _digest(path / name / file)
            except _MISSING as error:
                raise CorruptCheckpoint(path, f"{name}/{file}: {error.strerror}") from error
            if found != digest:
                raise CorruptCheckpoint(path, f"{name}/{file} is not what was saved")
    return entries


def contents(path: Path) -> dict[str, dict[str, Any]]:
    """Return what the manifest holds, a dict an item, without a look at the items.

    Raises:
        CorruptCheckpoint: the manifest is missing, cut or changed.
    """
    try:
        digest, _, body = (path / _MANIFEST).read_bytes().partition(b"\n")
    except _MISSING as error:
        raise CorruptCheckpoint(path, f"{_MANIFEST}: {error.strerror}") from error
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise CorruptCheckpoint(path, f"{_MANIFEST} is not what was saved")
    return json.loads(body)


def num_levels(path: Path, name: str) -> int:
    """Return the length of the levels axis, the first of every leaf, of an item.

    Raises:
        CorruptCheckpoint: the manifest is missing, cut or changed.
    """
    (_, _, shape), *_ = contents(path)[name]["leaves"]
    return shape[0]


def drop(path: Path, name: str) -> None:
    """Delete one item of a checkpoint, if it is there; killed at any moment, the rest is good."""
    entries = contents(path)
    if entries.pop(name, None) is not None:
        _write_manifest(path, entries)
    shutil.rmtree(path / name, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a checkpoint, good or corrupt; killed at any moment, it is whole or gone."""
    staged = _staged(path)
    _clear(staged)
    path.rename(staged)
    _clear(staged)


def _staged(path: Path) -> Path:
    """Return where `path` is built and taken apart, a name that is not all digits."""
    return path.with_name(f"{path.name}.tmp")


def _clear(path: Path) -> None:
    """Delete what is there, a folder or a file."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def _check_space(staged: Path, items: dict[str, Any]) -> None:
    """Raise OSError for want of space before Orbax starts, whose threads would print tracebacks."""
    arrays = jax.tree.leaves(items)
    size = sum(array.nbytes + _LEAF_BYTES for array in arrays) + _ITEM_BYTES * (len(items) + 1)
    if size > (free := shutil.disk_usage(staged).free):
        reason = f"No space left: a checkpoint may need {size:,} bytes of {free:,}"
        raise OSError(errno.ENOSPC, reason, str(staged))


@contextlib.contextmanager
def _orbax(path: Path) -> Iterator[None]:
    """Give Orbax its options, and make one line of its errors, which have many types and pages."""
    context = ocp.Context()
    # Chunks are compressed in parallel: 280 MB of pruned networks take 0.4 s more on two cores, and
    # two thirds of them are never written.
    context.array.saving.storage_options.chunk_byte_size = 2**20
    context.memory.deepcopy_host_arrays = False  # nothing changes them: saving is synchronous
    with context:
        try:
            yield
        except Exception as error:
            line = " ".join(str(error).split())[:200]
            full = "No space left" in str(error) or getattr(error, "errno", 0) == errno.ENOSPC
            code = errno.ENOSPC if full else errno.EIO
            raise OSError(code, "No space left" if full else f"Orbax: {line}", str(path)) from error


def _to_host(name: str, item: PyTree) -> PyTree:
    """Return the tree as NumPy arrays."""

    def convert(at: Any, leaf: Any) -> np.ndarray:
        where = "/".join((name, *_names(at)))
        if jnp.issubdtype(getattr(leaf, "dtype", bool), jax.dtypes.prng_key):
            raise TypeError(f"{where} is a typed key: save its jax.random.key_data")
        array = np.asarray(leaf)
        if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
            raise TypeError(f"{where} must be of numbers or bools, got {array.dtype}")
        return array

    return jax.tree.map_with_path(convert, item)


def _names(at: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in at)


def _stored(arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Return what Orbax is given: it takes no empty array, which the manifest alone holds."""
    return {str(i): array for i, array in enumerate(arrays) if array.size}


def _save_item(path: Path, item: PyTree) -> dict[str, Any]:
    """Save one tree with Orbax, and return what the manifest shall hold of it."""
    if stored := _stored(jax.tree.leaves(item)):
        with _orbax(path):
            ocp.save(str(path.absolute()), stored)
        for made in (path, *path.rglob("*")):
            files.sync(made)
    saved = sorted(file for file in path.rglob("*") if file.is_file())
    entry = {
        "leaves": [[at, *leaf] for at, leaf in _describe(item).items()],
        "files": {str(file.relative_to(path)): _digest(file) for file in saved},
    }
    with contextlib.suppress(TypeError):
        entry["tree"] = trees.encode_containers(item)
    return entry


def _describe(tree: PyTree) -> dict[tuple[str, ...], list[Any]]:
    """Return path -> [dtype, shape], in the order of the leaves."""
    flat, _ = jax.tree.flatten_with_path(tree)
    return {_names(at): [leaf.dtype.name, list(leaf.shape)] for at, leaf in flat}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(path: Path, entries: dict[str, Any]) -> None:
    body = json.dumps(entries)
    files.write(path / _MANIFEST, f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")
