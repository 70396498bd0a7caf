"""Data sets by name or by file, as plain arrays in memory.

In comes a name, out come the inputs and targets to train on, to validate on and to test on: the
same, bit for bit, wherever the files were found. Next are `train` and `evaluate`. Imports no jax;
Pillow and TFDS are imported only where they are needed. `load` takes:

- `fashion_mnist`, `mnist`: the published files, checked against their SHA-256. Looked for in
  our cache, among what TFDS has prepared and in Debian's folder; otherwise downloaded by TFDS.
  Where `data_dir` is given, its files are the ones read, and nothing else will do.
- `idx:FOLDER`: four idx files, gzipped or not, of the usual names (`train-images-idx3-ubyte`,
  ...) with or without a prefix (`emnist-letters-...`).
- `npz:FILE`: arrays x_train, y_train, x_test and y_test, perhaps x_val and y_val.
- `folder:DIR`: images of one size, PNG or JPEG, grey or RGB, in `train/CLASS` and `test/CLASS`;
  the names of the classes are sorted.
- `text:FILE`: the characters of a UTF-8 text, each a token: its place among the sorted
  characters that occur. Windows of `context` tokens that do not overlap, in order: 90% to train
  on, 5% to validate on, 5% to test on. Targets are the next tokens.
- `tfds:NAME`: what TFDS has prepared for `data_source`, with the splits train and test and the
  features image and label.

Integer targets (n,) or (n, 1) are classes 0, 1, 2, ... (or 1, 2, ..., which are made to start
at 0). Integer targets (n, tokens) are tokens, -1 where there is none, and so are integer inputs
of their shape. Float targets of any shape are regression. Where nothing is set aside to
validate on, a twelfth of the training examples is, 5,000 at most: of each class equally many,
and the same ones every time.
"""

import hashlib
from pathlib import Path

import numpy as np

from jaxprune.data import idx
from jaxprune.data.images import load_folder, load_tfds
from jaxprune.data.published import SOURCES, load_published
from jaxprune.data.splits import Data as Data
from jaxprune.data.splits import DataError as DataError
from jaxprune.data.splits import Split as Split
from jaxprune.data.splits import outputs_of as outputs_of
from jaxprune.data.splits import reading
from jaxprune.data.tables import load_npz, load_text


def load(
    name: str,
    *,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    context: int = 128,
) -> Data:
    """Load a data set by name; `jaxprune.data` says which there are.

    Args:
        name: such as `fashion_mnist` or `npz:FILE`.
        data_dir: folder that holds the four files of `fashion_mnist` or `mnist`.
        cache_dir: by default `$XDG_CACHE_HOME/jaxprune`, or else `~/.cache/jaxprune`.
        context: tokens of a window of `text:FILE`, at least 1.

    Returns:
        The splits. Inputs are float32, bytes divided by 255; images are (n, rows, columns), of
        colour (n, rows, columns, 3). Tokens are int32. Targets are int32 or float32.

    Raises:
        DataError: an unknown name, a file that is missing, damaged or larger than the memory that
            is free, or examples from which nothing can be learnt; no way to get a named set.

    Example:
        >>> load("fashion_mnist").val.x.shape
        (5000, 28, 28)
    """
    if name in SOURCES:
        return load_published(name, data_dir, cache_dir)
    kind, _, place = name.partition(":")
    if kind not in ("idx", "npz", "folder", "text", "tfds") or not place:
        raise DataError(
            f"dataset must be {', '.join(SOURCES)}, idx:FOLDER, npz:FILE, folder:DIR, text:FILE "
            f"or tfds:NAME, got {name!r}"
        )
    if data_dir is not None:
        raise DataError(f"{name} already says what to read: leave out --data-dir")
    with reading(name):
        path = Path(place).expanduser()
    match kind:
        case "idx":
            paths = idx.find(path)
            return idx.to_data(idx.read(paths), paths)
        case "npz":
            return load_npz(path)
        case "folder":
            return load_folder(path)
        case "text":
            return load_text(path, context)
        case _:
            return load_tfds(place)


def digest(data: Data) -> str:
    """Return the SHA-256, in hex, of all inputs and targets, their types and shapes."""
    content = hashlib.sha256()
    for split in data:
        for array in split:
            content.update(f"{array.dtype.str}{array.shape}".encode())
            content.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return content.hexdigest()
