"""Images that are files of their own: folders of classes, and what TFDS has prepared."""

import io
import itertools
import logging
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxprune.data.splits import Data, DataError, Loaded, check_memory, make_data, reading

_log = logging.getLogger(__name__)

_SUFFIXES = (".png", ".jpg", ".jpeg")


class Encoded(NamedTuple):
    """An encoded image: what messages call it, its path or an open file, and its class."""

    name: object
    file: Any
    label: int


def decode(
    examples: Iterable[Encoded], count: int, place: object
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Decode images of one size.

    Args:
        examples: PNG or JPEG, grey or RGB.
        count: how many there are.
        place: what messages call them together.

    Returns:
        (count, rows, columns) of grey images, (count, rows, columns, 3) of colour; labels (count,).

    Raises:
        DataError: an image that is damaged or unlike the first, or too many for the memory.
    """
    from PIL import Image

    images, labels = np.empty(0, np.uint8), np.empty(count, np.int64)
    kind, first = None, None
    for i, (name, file, label) in enumerate(examples):
        with reading(name), Image.open(file, formats=("PNG", "JPEG")) as image:
            if image.mode not in ("L", "RGB"):
                raise DataError(f"{name}: images are grey (L) or RGB, got {image.mode}")
            found = f"{image.width} x {image.height} pixels, {image.mode}"
            if kind is None:
                kind, first = found, name
                shape = (count, image.height, image.width) + (3,) * (image.mode == "RGB")
                # A byte a value here, and then four as float32.
                check_memory(place, 5 * math.prod(shape))
                images = np.empty(shape, np.uint8)
            if found != kind:
                raise DataError(f"{name}: {found}, but {kind} in {first}")
            images[i], labels[i] = np.asarray(image), label
    return images, labels


def load_folder(folder: Path) -> Data:
    """Load `train/CLASS/IMAGE` and `test/CLASS/IMAGE`, in the order of their names."""
    classes = {part: _folders(folder / part) for part in ("train", "test")}
    odd = set(classes["train"]) ^ set(classes["test"])
    if odd:
        raise DataError(f"{folder}: class {min(odd)} is not in both train and test")
    if len(classes["train"]) == 1:
        raise DataError(f"{folder}: one class only, {classes['train'][0]}")
    train, test = (
        [
            Encoded(path, path, label)
            for label, name in enumerate(names)
            for path in _images(folder / part / name)
        ]
        for part, names in classes.items()
    )
    return _halves(*decode(train + test, len(train + test), folder), len(train), folder)


def tfds_dir() -> Path:
    """Return the folder in which TFDS keeps what it has prepared."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def tfds_splits(name: str) -> tuple[Any, Any]:
    """Return `train` and `test` of a prepared data set, images still encoded."""
    import tensorflow_datasets as tfds

    decoders = {"image": tfds.decode.SkipDecoding()}
    train, test = tfds.data_source(
        name, split=["train", "test"], data_dir=tfds_dir(), download=False, decoders=decoders
    )
    return train, test


def load_tfds(name: str) -> Data:
    """Load images and labels that TFDS has prepared in a format that needs no TensorFlow."""
    folder = tfds_dir() / name.partition("/")[0].partition(":")[0]
    how = (
        'prepare it with python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', file_format='array_record').download_and_prepare()\""
    )
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (TFDS_DATA_DIR names another place): {how}")
    try:
        with reading(folder):
            train, test = tfds_splits(name)
    except DataError as error:
        raise DataError(f"{error}: {how}") from None
    with reading(folder):
        missing = {"image", "label"} - set(train.dataset_info.features)
        if missing:
            raise DataError(f"{folder}: has no feature called {min(missing)}")
        examples = itertools.chain(encoded(train, "train"), encoded(test, "test"))
        read = decode(examples, len(train) + len(test), folder)
    return _halves(*read, len(train), folder)


def encoded(source: Any, part: str) -> Iterator[Encoded]:
    """Yield the examples of a split of TFDS."""
    # Reading by batches is four times as fast as one by one.
    for start in range(0, len(source), 1000):
        batch = source.__getitems__(range(start, min(start + 1000, len(source))))
        for i, example in enumerate(batch, start):
            name = f"{source.dataset_info.data_dir}: {part} image {i}"
            yield Encoded(name, io.BytesIO(example["image"]), example["label"])


def _halves(x: NDArray[np.uint8], y: NDArray[Any], size: int, folder: Path) -> Data:
    """Return the first `size` examples as `train`, the others as `test`."""
    train, test = (str(folder / part) for part in ("train", "test"))
    return make_data(
        Loaded(x[:size], y[:size], train, train), Loaded(x[size:], y[size:], test, test)
    )


def _folders(folder: Path) -> list[str]:
    with reading(folder):
        names = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    if not names:
        raise DataError(f"{folder}: no folders of classes")
    return names


def _images(folder: Path) -> list[Path]:
    with reading(folder):
        paths = sorted(path for path in folder.iterdir() if path.name[0] != ".")
    found = [path for path in paths if path.suffix.lower() in _SUFFIXES]
    if not found:
        raise DataError(f"{folder}: no .png or .jpg")
    if len(found) < len(paths):
        others = sorted(set(paths) - set(found))
        _log.warning("not read: %s and %d others", ascii(str(others[0])), len(others) - 1)
    return found
