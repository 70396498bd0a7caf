"""The four idx files of MNIST and its kin: a folder → arrays of bytes.

The header of each file is read first, and then no more than it announces, so that a small archive
of a large file fills no memory.
"""

import gzip
import io
import math
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxprune.data.splits import Data, DataError, Loaded, check_memory, make_data, reading

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_AXES = (3, 1, 3, 1)


class Raw(NamedTuple):
    """The content of `FILES`, as uint8: images (n, rows, columns) and labels (n,)."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.uint8]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]


def find(folder: Path) -> list[Path]:
    """Return the paths of the four files, in the order of `FILES`."""
    with reading(folder):
        folder = folder.expanduser()
        names = sorted(path.name for path in folder.iterdir())
    paths = []
    for file in FILES:
        pattern = file.replace("t10k", "(t10k|test)").replace("s-idx", "s[-.]idx")
        found: dict[str, Path] = {}
        for name in names:
            if re.fullmatch(rf"(.+-)?{pattern}(\.gz)?", name):
                # One file may be there both ways; the uncompressed one comes first.
                found.setdefault(name.removesuffix(".gz"), folder / name)
        if not found:
            raise DataError(f"{folder / file}: no such file, gzipped or not")
        if len(found) > 1:
            raise DataError(
                f"{folder}: more than one data set ({', '.join(found)}): "
                "put the four files of one into a folder of their own"
            )
        paths += found.values()
    return paths


def read(paths: Sequence[Path]) -> Raw:
    """Read the four files, if they fit into memory."""
    shapes = []
    for path, axes in zip(paths, _AXES, strict=True):
        with reading(path), _open(path) as file:
            shapes.append(_shape(file, axes, path))
    # The bytes of a file, and then four as float32 or int32.
    check_memory(paths[0].parent, 5 * sum(map(math.prod, shapes)))
    arrays = []
    for path, shape in zip(paths, shapes, strict=True):
        size = math.prod(shape)
        with reading(path), _open(path) as file:
            file.read(len(header(shape)))
            content = file.read(size + 1)
        if len(content) != size:
            found = f"{len(content):,}" if len(content) < size else "more"
            raise DataError(
                f"{path}: cut short or damaged: {size:,} bytes announced ({shape}), {found} there"
            )
        arrays.append(np.frombuffer(content, np.uint8).reshape(shape))
    return Raw(*arrays)


def header(shape: Sequence[int]) -> bytes:
    """Return what an idx file of bytes begins with."""
    return struct.pack(f">{1 + len(shape)}I", 0x800 + len(shape), *shape)


def to_data(raw: Raw, places: Sequence[object]) -> Data:
    """Return the splits; `places` are what messages call the four files."""
    train_x, train_y, test_x, test_y = map(str, places)
    return make_data(
        Loaded(raw.train_images, raw.train_labels, train_x, train_y),
        Loaded(raw.test_images, raw.test_labels, test_x, test_y),
    )


def _open(path: Path) -> io.BufferedIOBase:
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if zipped else path.open("rb")


def _shape(file: io.BufferedIOBase, axes: int, path: Path) -> tuple[int, ...]:
    """Read what a file says of itself."""
    content = file.read(4 + 4 * axes)
    magic = bytes((0, 0, 8, axes))
    if content[:4] != magic:
        raise DataError(f"{path}: its magic number is {content[:4].hex()!r}, not {magic.hex()!r}")
    shape = struct.unpack(f">{axes}I", content[4:].ljust(4 * axes, b"\0"))
    if not math.prod(shape):
        raise DataError(f"{path}: cut short or damaged: empty ({shape})")
    return shape
