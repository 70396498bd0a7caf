"""Data sets by name, as plain arrays in memory.

In comes a name (and perhaps a folder), out come the images and labels to train on, to validate on
and to test on: the same, bit for bit, wherever the files were found. Next are `train` and
`evaluate`. Imports no jax; TFDS is imported only where it is asked.
"""

import gzip
import hashlib
import http.client
import io
import logging
import math
import os
import re
import struct
import tempfile
import threading
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_log = logging.getLogger(__name__)

_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_VALIDATION = 5000
_VALIDATION_KEY = 20170825  # any constant would do: the day Fashion-MNIST was published
_PROBE_SECONDS = 4.0


class Split(NamedTuple):
    """Examples: `x` float32 (n, features) in [0, 1], `y` int32 (n,) from 0."""

    x: NDArray[np.float32]
    y: NDArray[np.int32]


class Data(NamedTuple):
    """A data set: `train` to learn from, `val` to choose by, `test` for reporting alone."""

    train: Split
    val: Split
    test: Split


class DataError(ValueError):
    """A data set is missing or damaged; the message says which file, and what to do."""


class _Raw(NamedTuple):
    """The content of `_FILES`, as uint8: images (n, rows, columns) and labels (n,)."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.uint8]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]


class _Source(NamedTuple):
    url: str
    sha256: tuple[str, str, str, str]  # of what the .gz files that TFDS registers decompress to
    debian: str | None = None


_SOURCES = {
    "fashion_mnist": _Source(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
        debian="usr/share/datasets/fashion-mnist",
    ),
    "mnist": _Source(
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
}


def load(name: str, *, data_dir: Path | None = None, cache_dir: Path | None = None) -> Data:
    """Load a data set.

    A named set is looked for in our cache, among what TFDS has prepared and in Debian's folder, and
    is otherwise downloaded by TFDS. Where `data_dir` is given, its files are the ones read, and
    nothing else will do. All are checked against the SHA-256 of the published files, then cached.
    A set given by its folder is checked for consistency and read anew each time; labels that start
    at 1 (EMNIST's letters) are made to start at 0.

    Pixels are divided by 255. A twelfth of the training images, 5,000 at most, are set aside to
    validate on: equally many of each class, and the same ones every time.

    Args:
        name: `fashion_mnist`, `mnist`, or `idx:FOLDER` for any data set of four idx files, gzipped
            or not, of the usual names (`train-images-idx3-ubyte`, …) with or without a prefix
            (`emnist-letters-…`).
        data_dir: folder that holds the four files of a named set.
        cache_dir: by default `$XDG_CACHE_HOME/jaxprune`, or else `~/.cache/jaxprune`.

    Returns:
        The splits, flat images as float32 in [0, 1]; the same arrays whatever the way.

    Raises:
        DataError: an unknown name, a missing folder or file, wrong content, or no way to get it.
    """
    if name.startswith("idx:"):
        if data_dir is not None:
            raise DataError(f"{name} already names its folder: leave out --data-dir")
        paths = _find_files(Path(name.removeprefix("idx:")))
        raw = _consistent(_read_files(paths), paths)
        return _to_data(raw)
    if name not in _SOURCES:
        raise DataError(f"dataset must be {', '.join(_SOURCES)} or idx:FOLDER, got {name!r}")
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "jaxprune")
    cache_dir = Path(cache_dir).expanduser()
    raw = cached = _read_if_whole(cache_dir / name, name)
    if data_dir is not None:
        raw = _read_named(_find_files(Path(data_dir)), name)
    raw = raw or _from_tfds(name) or _from_debian(name, cache_dir) or _download(name)
    if cached is None:
        _write_cache(raw, cache_dir / name)
    return _to_data(raw)


def digest(data: Data) -> str:
    """Return the SHA-256, in hex, of all examples and labels, split by split."""
    content = hashlib.sha256()
    for split in data:
        for array in split:
            content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()


def _find_files(folder: Path) -> list[Path]:
    """Return the paths of the four files, in the order of `_FILES`."""
    folder = folder.expanduser()
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise DataError(
            f"{folder}: {error.strerror}: name a folder with {', '.join(_FILES)}, gzipped or not"
        ) from None
    paths = []
    for file in _FILES:
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


def _read_files(paths: Sequence[Path]) -> _Raw:
    return _Raw(*map(_read_idx, paths, (3, 1, 3, 1)))


def _read_idx(path: Path, axes: int) -> NDArray[np.uint8]:
    """Read one file of bytes."""
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    magic, start = bytes((0, 0, 8, axes)), 4 + 4 * axes
    if content[:4] != magic:
        raise DataError(f"{path}: its magic number is {content[:4].hex()!r}, not {magic.hex()!r}")
    shape = struct.unpack(f">{axes}I", content[4:start].ljust(4 * axes, b"\0"))
    found, size = max(len(content) - start, 0), math.prod(shape)
    if found != size or not size:
        raise DataError(
            f"{path}: cut short or damaged: {size:,} bytes announced ({shape}), {found:,} there"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _consistent(raw: _Raw, paths: Sequence[Path]) -> _Raw:
    """Return the arrays, labels from 0, if together they make a data set."""
    for images, labels in ((0, 1), (2, 3)):
        if len(raw[images]) != len(raw[labels]):
            raise DataError(
                f"{paths[labels]}: {len(raw[labels]):,} labels, "
                f"but {len(raw[images]):,} images in {paths[images].name}"
            )
    sizes = raw.train_images.shape[1:], raw.test_images.shape[1:]
    if sizes[0] != sizes[1]:
        raise DataError(f"{paths[2]}: images of {sizes[1]}, but {paths[0].name} has {sizes[0]}")
    classes = np.unique(raw.train_labels)
    first, last = int(classes[0]), int(classes[-1])
    if first > 1 or last - first + 1 != len(classes):
        raise DataError(
            f"{paths[1]}: labels must be 0, 1, 2 … (or 1, 2 …) without a gap, "
            f"got {len(classes)} different ones in [{first}, {last}]"
        )
    low, high = raw.test_labels.min(), raw.test_labels.max()
    if low < first or high > last:
        raise DataError(
            f"{paths[3]}: labels must be in [{first}, {last}] as in training, got [{low}, {high}]"
        )
    return raw._replace(train_labels=raw.train_labels - first, test_labels=raw.test_labels - first)


def _header(array: NDArray[np.uint8]) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)


def _sha256(array: NDArray[np.uint8]) -> str:
    """Return the SHA-256 of the idx file that holds this array."""
    content = hashlib.sha256(_header(array))
    content.update(array.data)
    return content.hexdigest()


def _checked(raw: _Raw, name: str, places: Sequence[Path]) -> _Raw:
    """Return the arrays if they are those of the published data set."""
    source = _SOURCES[name]
    for array, sha256, place in zip(raw, source.sha256, places, strict=True):
        if _sha256(array) != sha256:
            raise DataError(f"{place}: wrong checksum for {name}: get it again from {source.url}")
    return raw


def _read_named(paths: Sequence[Path], name: str) -> _Raw:
    return _checked(_read_files(paths), name, paths)


def _read_if_whole(folder: Path, name: str) -> _Raw | None:
    """Read a folder that may be missing; a damaged one is mentioned and passed over."""
    if not folder.is_dir():
        return None
    try:
        return _read_named(_find_files(folder), name)
    except DataError as error:
        _log.warning("not used: %s", error)
        return None


def _write_cache(raw: _Raw, folder: Path) -> None:
    """Keep the arrays as uncompressed idx files; each gets its name when it is whole."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            for file, array in zip(_FILES, raw, strict=True):
                path = Path(partial, file)
                path.write_bytes(_header(array) + array.tobytes())
                path.replace(folder / file)
    except OSError as error:
        _log.warning("not cached: %s", error)


def _from_debian(name: str, cache_dir: Path) -> _Raw | None:
    """Read what the package installed, or what experiments/get_debian_data.sh unpacked."""
    folder = _SOURCES[name].debian
    if folder is None:
        return None
    unpacked = cache_dir / "debian" / folder
    return _read_if_whole(Path("/", folder), name) or _read_if_whole(unpacked, name)


def _tfds_dir() -> Path:
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def _from_tfds(name: str) -> _Raw | None:
    """Read what TFDS has prepared, if it is in a format that needs no TensorFlow."""
    folder = _tfds_dir() / name
    if not folder.is_dir():
        return None
    try:
        import tensorflow_datasets as tfds

        train, test = tfds.data_source(
            name,
            split=["train", "test"],
            data_dir=_tfds_dir(),
            download=False,
            decoders={"image": tfds.decode.SkipDecoding()},
        )
        raw = _Raw(*_in_file_order(train, "train"), *_in_file_order(test, "test"))
        return _checked(raw, name, [folder] * 4)
    # Some other program left this here, perhaps long ago: go on without it, whatever is wrong.
    except Exception as error:
        _log.warning("not used: %s: %s", folder, str(error).partition("\n")[0])
        return None


def _in_file_order(source: Any, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return images and labels of a split in the order of the published files."""
    from PIL import Image

    def key(i: int) -> bytes:
        return hashlib.md5(f"{split}{i}".encode(), usedforsecurity=False).digest()

    # TFDS stores examples by the MD5 of the split's name and the index in the file.
    order = sorted(range(len(source)), key=key)
    stored = []
    # Reading by batches is four times as fast as one by one.
    for start in range(0, len(source), 1000):
        stored += source.__getitems__(range(start, min(start + 1000, len(source))))
    images = [np.asarray(Image.open(io.BytesIO(example["image"]))) for example in stored]
    labels = np.array([example["label"] for example in stored], np.uint8)
    back = np.argsort(order)
    return np.stack(images)[back], labels[back]


def _download(name: str) -> _Raw:
    """Let TFDS download the four files, checked by the SHA-256 that it registers."""
    url = _SOURCES[name].url
    files = [f"{file}.gz" for file in _FILES]
    advice = f"get {', '.join(files)} from {url} elsewhere and name their folder with --data-dir"
    # TFDS goes on trying for minutes where there is no network.
    if not _reachable(url + files[-1]):
        raise DataError(f"{name} is not on this machine, its publisher is out of reach: {advice}")
    import tensorflow_datasets as tfds

    try:
        infos = dict(tfds.builder_cls(name).url_infos or {})
        urls = {info.filename: url for url, info in infos.items()}
        manager = tfds.download.DownloadManager(
            download_dir=_tfds_dir() / "downloads",
            url_infos=infos,
            dataset_name=name,
            force_checksums_validation=True,
        )
        downloaded = manager.download({file: urls[file] for file in files})
    # Whatever TFDS and requests may raise, the way out is the same.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{name} could not be downloaded ({reason}): {advice}") from error
    return _read_named([Path(downloaded[file]) for file in files], name)


def _reachable(url: str) -> bool:
    """Tell within `_PROBE_SECONDS` whether a URL answers."""
    answers = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=_PROBE_SECONDS) as answer:
                answers.append(answer.status)
        except (OSError, http.client.HTTPException):
            pass

    # A thread, because looking up a name obeys no timeout; a daemon, because exit must not wait.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return bool(answers)


def _to_data(raw: _Raw) -> Data:
    def split(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Split:
        x = np.divide(images.reshape(len(images), -1), np.float32(255), dtype=np.float32)
        return Split(x, labels.astype(np.int32))

    val = _validation(raw.train_labels)
    return Data(
        train=split(raw.train_images[~val], raw.train_labels[~val]),
        val=split(raw.train_images[val], raw.train_labels[val]),
        test=split(raw.test_images, raw.test_labels),
    )


def _validation(labels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Mark the images to validate on: equally many of each class, of none more than half."""
    sizes = np.bincount(labels)
    wanted = min(_VALIDATION, len(labels) // 12) // len(sizes)
    each = min(max(wanted, 1), int(sizes.min()) // 2)
    if not each:
        raise DataError(f"class {sizes.argmin()} has one training image: validation needs one more")
    # Raw draws stay the same from one version of NumPy to the next; a Generator's may not.
    draws = np.random.Philox(key=_VALIDATION_KEY).random_raw(len(labels))
    chosen = np.zeros(len(labels), bool)
    for label in range(len(sizes)):
        members = np.flatnonzero(labels == label)
        chosen[members[np.argsort(draws[members])[:each]]] = True
    return chosen
