"""Checkpoints: trees of arrays in, verified host arrays out.

What comes in are named trees (parameters, masks, optimiser state); what goes out, after a kill or
for analysis, are the same trees as NumPy arrays, bit for bit, or an error that says what is broken.
Training writes them; `results.load_run` and a run that goes on read them.

A checkpoint is a directory with one Orbax checkpoint an item and a `manifest.json`, which holds
every item's containers, shapes, dtypes and the SHA-256 of its files, because Orbax restores a
flipped bit in silence. It is built under another name and renamed once all is on disk: what has its
final name is complete. An item is stored as a flat dict from paths such as `hidden_0/kernel` to
arrays, so that containers, empty ones too, come back as they were.
"""

import contextlib
import errno
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from jaxprune import files, trees
from jaxprune.trees import paths_and_leaves

_MANIFEST = "manifest.json"
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # others may pass


class CorruptCheckpoint(ValueError):
    """A checkpoint that is not what was saved: its `path` and the `reason`."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"checkpoint {path} is corrupt: {reason}")
        self.path, self.reason = path, reason


class Newest(NamedTuple):
    """The newest good checkpoint, None where there is none, and the newer ones that are corrupt."""

    path: Path | None
    corrupt: tuple[CorruptCheckpoint, ...]


def save(path: Path, /, **items: PyTree) -> None:
    """Write a checkpoint; until all of it is on disk, `path` does not exist.

    Args:
        path: the directory to make. What a killed `save` left of it is replaced.
        **items: trees of arrays of any shape and dtype. A tree with containers other than dict,
            list, tuple and None, such as an optax state, needs a target when it is loaded.

    Raises:
        FileExistsError: `path` exists; `remove` it first.
        ValueError: an item's name is no identifier, or a key in it is empty or has a slash.
        TypeError: a leaf is not an array of numbers or bools.
        OSError: it cannot be written, such as for want of space.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists: remove it before saving another checkpoint there")
    if wrong := [name for name in items if not name.isidentifier()]:
        raise ValueError(f"an item's name must be an identifier, got {wrong[0]!r}")
    staged = _staged(path)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    items = {name: jax.tree.map(np.asarray, item) for name, item in items.items()}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
    if size > (free := shutil.disk_usage(staged).free):
        # Found out before Orbax starts, whose threads print tracebacks where they cannot write.
        shutil.rmtree(staged)
        raise OSError(errno.ENOSPC, f"a checkpoint of {size:,} bytes has {free:,} left", str(path))
    _write_manifest(staged, {name: _save_item(staged / name, item) for name, item in items.items()})
    staged.rename(path)
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
    saved = wanted = entry["leaves"]
    if target is not None:
        wanted = _describe(target)
    elif "tree" in entry:
        target = trees.decode_containers(entry["tree"])
    else:
        raise ValueError(f"{path}: {name} is not made of dict, list and tuple alone: pass a target")
    for key in saved | wanted:
        here, there = saved.get(key, "absent"), wanted.get(key, "absent")
        if here != there:
            raise ValueError(f"{path}: {name}/{key} is {here} here, but {there} in the target")
    arrays = {key: np.empty(shape, jnp.dtype(dtype)) for key, (dtype, shape) in saved.items()}
    if stored := {key: array for key, array in arrays.items() if array.size}:
        with _context():
            arrays |= ocp.load(str(path.absolute() / name), stored)
    return jax.tree.unflatten(jax.tree.structure(target), [arrays[key] for key in wanted])


def verify(path: Path, *names: str) -> dict[str, dict[str, Any]]:
    """Compare the files of the named items (default: all) with their digests.

    Returns:
        What the manifest holds, a dict an item.

    Raises:
        CorruptCheckpoint: the manifest or a file is missing, cut or changed.
        ValueError: there is no item of that name.
    """
    entries = _read_manifest(path)
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


def newest(directory: Path, *names: str) -> Newest:
    """Find the newest of the checkpoints `0001`, `0002`, … whose named items are good.

    Args:
        directory: where the checkpoints are; it need not exist.
        *names: the items that must be there and good (default: all that the checkpoint lists). A
            checkpoint without them is passed over, not reported.

    Returns:
        Its path, and an error for every corrupt checkpoint above it, newest first. `remove` those
        before their epochs are saved again.
    """
    corrupt = []
    epochs = [path for path in directory.glob("*") if path.name.isdecimal()]
    for path in sorted(epochs, key=lambda path: int(path.name), reverse=True):
        try:
            if set(names) <= set(_read_manifest(path)):
                verify(path, *names)
                return Newest(path, tuple(corrupt))
        except CorruptCheckpoint as error:
            corrupt.append(error)
    return Newest(None, tuple(corrupt))


def drop(path: Path, name: str) -> None:
    """Delete one item of a checkpoint, if it is there; killed at any moment, the rest is good."""
    entries = _read_manifest(path)
    if entries.pop(name, None) is not None:
        _write_manifest(path, entries)
    shutil.rmtree(path / name, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a checkpoint, good or corrupt; killed at any moment, it is whole or gone."""
    staged = _staged(path)
    shutil.rmtree(staged, ignore_errors=True)
    path.rename(staged)
    shutil.rmtree(staged)


def _staged(path: Path) -> Path:
    """Return where `path` is built and taken apart, a name that is not all digits."""
    return path.with_name(f"{path.name}.tmp")


def _context() -> ocp.Context:
    context = ocp.Context()
    # Chunks are compressed in parallel: 280 MB of pruned networks take 0.4 s more on two cores, and
    # two thirds of them are never written.
    context.array.saving.storage_options.chunk_byte_size = 2**20
    context.memory.deepcopy_host_arrays = False  # nothing changes them: saving is synchronous
    return context


def _save_item(path: Path, item: PyTree) -> dict[str, Any]:
    """Save one tree with Orbax, and return what the manifest shall hold of it."""
    leaves = paths_and_leaves(item)
    for (at, array), (key, _) in zip(jax.tree.leaves_with_path(item), leaves, strict=True):
        if at and (key.count("/") >= len(at) or not all(key.split("/"))):
            raise ValueError(f"{path.name}: a key is empty or has a slash in {key!r}")
        if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
            raise TypeError(f"{path.name}/{key} must be of numbers or bools, got {array.dtype}")
    # Orbax takes neither an empty array nor a tree without leaves: the manifest alone holds those.
    if stored := {key: array for key, array in leaves if array.size}:
        with _context():
            try:
                ocp.save(str(path.absolute()), stored)
            except ValueError as error:  # TensorStore's, a page long
                raise OSError(errno.EIO, "a checkpoint cannot be written", str(path)) from error
        for made in (path, *path.rglob("*")):
            files.sync(made)
    saved = sorted(file for file in path.rglob("*") if file.is_file())
    entry = {
        "leaves": _describe(item),
        "files": {str(file.relative_to(path)): _digest(file) for file in saved},
    }
    with contextlib.suppress(TypeError):
        entry["tree"] = trees.encode_containers(item)
    return entry


def _describe(tree: PyTree) -> dict[str, list[Any]]:
    """Return path -> [dtype, shape], in the order of the leaves."""
    return {key: [leaf.dtype.name, list(leaf.shape)] for key, leaf in paths_and_leaves(tree)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(path: Path, entries: dict[str, Any]) -> None:
    body = json.dumps(entries)
    files.write(path / _MANIFEST, f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    try:
        digest, _, body = (path / _MANIFEST).read_bytes().partition(b"\n")
    except _MISSING as error:
        raise CorruptCheckpoint(path, f"{_MANIFEST}: {error.strerror}") from error
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise CorruptCheckpoint(path, f"{_MANIFEST} is not what was saved")
    return json.loads(body)
