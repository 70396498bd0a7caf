"""Fashion-MNIST and MNIST: the same bytes wherever the files are found, or from their publisher."""

import hashlib
import http.client
import logging
import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxprune import files
from jaxprune.data import idx, images
from jaxprune.data.idx import FILES, Raw
from jaxprune.data.splits import Data, DataError

_log = logging.getLogger(__name__)

_PROBE_SECONDS = 4.0


class Source(NamedTuple):
    """Where a data set is published, what it holds, and where Debian puts it."""

    url: str
    sha256: tuple[str, str, str, str]  # of what the .gz files that TFDS registers decompress to
    debian: str | None = None


SOURCES = {
    "fashion_mnist": Source(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
        debian="usr/share/datasets/fashion-mnist",
    ),
    "mnist": Source(
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
}


def load_published(name: str, data_dir: Path | None, cache_dir: Path | None) -> Data:
    """Load a named set from `data_dir` alone, or from wherever it is; keep it in the cache."""
    cache_dir = files.user_cache() if cache_dir is None else Path(cache_dir).expanduser()
    raw = cached = _read_if_whole(cache_dir / name, name)
    if data_dir is not None:
        raw = _read(idx.find(Path(data_dir)), name)
    raw = raw or _from_tfds(name) or _from_debian(name, cache_dir) or _download(name)
    if cached is None:
        _write_cache(raw, cache_dir / name)
    return idx.to_data(raw, [f"{name}: {file}" for file in FILES])


def _read(paths: Sequence[Path], name: str) -> Raw:
    return _checked(idx.read(paths), name, paths)


def _checked(raw: Raw, name: str, places: Sequence[Path]) -> Raw:
    """Return the arrays if they are those of the published data set."""
    source = SOURCES[name]
    for array, sha256, place in zip(raw, source.sha256, places, strict=True):
        content = hashlib.sha256(idx.header(array.shape))
        content.update(array.data)
        if content.hexdigest() != sha256:
            raise DataError(f"{place}: wrong checksum for {name}: get it again from {source.url}")
    return raw


def _read_if_whole(folder: Path, name: str) -> Raw | None:
    """Read a folder that may be missing; a damaged one is mentioned and passed over."""
    if not folder.is_dir():
        return None
    try:
        return _read(idx.find(folder), name)
    except DataError as error:
        _log.warning("not used: %s", error)
        return None


def _write_cache(raw: Raw, folder: Path) -> None:
    """Keep the arrays as uncompressed idx files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, array in zip(FILES, raw, strict=True):
            files.write(folder / file, idx.header(array.shape) + array.tobytes())
    except OSError as error:
        _log.warning("not cached: %s", error)


def _from_debian(name: str, cache_dir: Path) -> Raw | None:
    """Read what the package installed, or what experiments/get_debian_data.sh unpacked."""
    folder = SOURCES[name].debian
    if folder is None:
        return None
    unpacked = cache_dir / "debian" / folder
    return _read_if_whole(Path("/", folder), name) or _read_if_whole(unpacked, name)


def _from_tfds(name: str) -> Raw | None:
    """Read what TFDS has prepared, if it is in a format that needs no TensorFlow."""
    folder = images.tfds_dir() / name
    if not folder.is_dir():
        return None
    try:
        train, test = images.tfds_splits(name)
        raw = Raw(*_in_file_order(train, "train"), *_in_file_order(test, "test"))
        return _checked(raw, name, [folder] * 4)
    # Some other program left this here, perhaps long ago: go on without it, whatever is wrong.
    except Exception as error:
        _log.warning("not used: %s: %s", folder, str(error).partition("\n")[0])
        return None


def _in_file_order(source: Any, part: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return images and labels of a split in the order of the published files."""

    def key(i: int) -> bytes:
        return hashlib.md5(f"{part}{i}".encode(), usedforsecurity=False).digest()

    # TFDS stores examples by the MD5 of the split's name and the index in the file.
    back = np.argsort(sorted(range(len(source)), key=key))
    pixels, labels = images.decode(images.encoded(source, part), len(source), part)
    return pixels[back], labels[back].astype(np.uint8)


def _download(name: str) -> Raw:
    """Let TFDS download the four files, checked by the SHA-256 that it registers."""
    url = SOURCES[name].url
    names = [f"{file}.gz" for file in FILES]
    advice = f"get {', '.join(names)} from {url} elsewhere and name their folder with --data-dir"
    # TFDS goes on trying for minutes where there is no network.
    if not _reachable(url + names[-1]):
        raise DataError(f"{name} is not on this machine, its publisher is out of reach: {advice}")
    import tensorflow_datasets as tfds

    try:
        infos = dict(tfds.builder_cls(name).url_infos or {})
        urls = {info.filename: url for url, info in infos.items()}
        manager = tfds.download.DownloadManager(
            download_dir=images.tfds_dir() / "downloads",
            url_infos=infos,
            dataset_name=name,
            force_checksums_validation=True,
        )
        downloaded = manager.download({name: urls[name] for name in names})
    # Whatever TFDS and requests may raise, the way out is the same.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{name} could not be downloaded ({reason}): {advice}") from error
    return _read([Path(downloaded[file]) for file in names], name)


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
