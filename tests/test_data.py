import functools
import gzip
import hashlib
import http.server
import io
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxprune import data
from jaxprune.data import DataError

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
ROOT = Path(__file__).parents[1]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")

# TFDS 4.9 and what it imports.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def idx(array):
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def write(folder, arrays, names=FILES, *, compress=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(names, arrays, strict=True):
        content = idx(array)
        if compress:
            name, content = f"{name}.gz", gzip.compress(content, mtime=0)
        (folder / name).write_bytes(content)
    return folder


def small_arrays(train=240, test=40, classes=10):
    rng = np.random.default_rng(0)
    return (
        rng.integers(0, 256, (train, 28, 28), dtype=np.uint8),
        (np.arange(train) % classes).astype(np.uint8),
        rng.integers(0, 256, (test, 28, 28), dtype=np.uint8),
        (np.arange(test) % classes).astype(np.uint8),
    )


def assert_same(a, b):
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left.x, right.x)
        np.testing.assert_array_equal(left.y, right.y)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Keep the tests away from what this machine's TFDS and cache hold."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def fashion():
    """Load the real Fashion-MNIST as it is on this machine; also give the folder of its cache."""
    loaded = data.load("fashion_mnist")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return loaded, data.digest(loaded), cache / "jaxprune" / "fashion_mnist"


@pytest.fixture
def small(monkeypatch):
    """A small set of 240 + 40 images that goes by the name of `mnist`."""
    arrays = small_arrays()
    sha256 = tuple(hashlib.sha256(idx(array)).hexdigest() for array in arrays)
    source = data._Source("http://127.0.0.1:1/", sha256, debian="jaxprune-test/mnist")  # pyright: ignore
    monkeypatch.setitem(data._SOURCES, "mnist", source)
    return arrays


@pytest.fixture
def server(tmp_path, monkeypatch, small):
    """A publisher of the small set on this machine, registered with TFDS."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import checksums

    folder = write(tmp_path / "published", small, compress=True)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        url = f"http://127.0.0.1:{httpd.server_address[1]}/"
        infos = {url + path.name: checksums.compute_url_info(path) for path in folder.iterdir()}
        monkeypatch.setitem(data._SOURCES, "mnist", data._SOURCES["mnist"]._replace(url=url))
        monkeypatch.setattr(tfds, "builder_cls", lambda _: types.SimpleNamespace(url_infos=infos))
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder
        httpd.shutdown()


def prepare(dataset, arrays, manual_dir=None):
    """Prepare a data set as TFDS does, without TensorFlow; with `manual_dir`, from its archives."""
    import tensorflow_datasets as tfds

    parent: Any = tfds.builder_cls(dataset)

    class Prepared(parent, skip_registration=True):  # pyright: ignore
        name = dataset
        url_infos = parent.url_infos
        pkg_dir_path = parent.pkg_dir_path

        def _split_generators(self, dl_manager):
            read = arrays
            if manual_dir is not None:
                urls = {info.filename: url for url, info in parent.url_infos.items()}
                paths = dl_manager.download([urls[f"{file}.gz"] for file in FILES])
                content = [gzip.decompress(Path(path).read_bytes()) for path in paths]
                read = [np.frombuffer(c, np.uint8)[4 + 4 * c[3] :] for c in content]
            return {
                "train": self._generate_examples(read[0].reshape(-1, 28, 28), read[1]),
                "test": self._generate_examples(read[2].reshape(-1, 28, 28), read[3]),
            }

        def _generate_examples(self, images, labels):
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                png = io.BytesIO()
                Image.fromarray(image).save(png, "png")
                png.seek(0)
                yield i, {"image": png, "label": int(label)}

    builder = Prepared(data_dir=os.environ["TFDS_DATA_DIR"], file_format="array_record")
    config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
    builder.download_and_prepare(download_config=config)


def failing_name_lookup(*args, **kwargs):
    raise socket.gaierror("no network")


def hanging_name_lookup(*args, **kwargs):
    time.sleep(12)
    raise socket.gaierror("no network after all")


# ---- the real data ----------------------------------------------------------------------------


def test_fashion_mnist_is_whole_in_order_and_balanced(fashion):
    (train, val, test), digest, folder = fashion
    assert digest == "578c051e5107357128d134a8004358ace04ffbc5eb9454b59dbab273c9c0d99d"
    for split, size in ((train, 55000), (val, 5000), (test, 10000)):
        assert split.x.shape == (size, 784) and split.x.dtype == np.float32
        assert split.y.shape == (size,) and split.y.dtype == np.int32
        assert split.x.min() == 0 and split.x.max() == 1
        assert (np.bincount(split.y) == size // 10).all()
    images = np.fromfile(folder / FILES[0], np.uint8, offset=16).reshape(60000, 784)
    labels = np.fromfile(folder / FILES[1], np.uint8, offset=8)
    chosen = data._validation(labels)
    np.testing.assert_array_equal(val.x, images[chosen] / np.float32(255))
    np.testing.assert_array_equal(train.y, labels[~chosen])
    np.testing.assert_array_equal(train.x[::100], images[~chosen][::100] / np.float32(255))
    # These stay, or runs can no longer be compared with those made before.
    assert np.flatnonzero(chosen)[:5].tolist() == [23, 34, 46, 48, 59]


def test_a_second_load_takes_less_than_a_second(fashion):
    loaded, _, folder = fashion
    seconds = []
    for _ in range(3):
        # The processor's time, because other tests may run beside this one.
        start = time.process_time()
        again = data.load("fashion_mnist", cache_dir=folder.parent)
        seconds.append(time.process_time() - start)
    assert_same(again, loaded)
    assert min(seconds) < 1


def test_loading_from_the_cache_imports_neither_jax_nor_tfds(fashion):
    code = (
        "import sys; from pathlib import Path; from jaxprune import data; "
        "data.load('fashion_mnist', cache_dir=Path(sys.argv[1])); "
        "print({'jax', 'tensorflow_datasets'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(fashion[2].parent)]
    assert subprocess.check_output(command, cwd=ROOT, text=True).strip() == "set()"


@pytest.mark.slow
def test_the_archives_that_tfds_registers_hold_the_same_fashion_mnist(fashion, tmp_path):
    if not DEBIAN.is_dir():
        pytest.skip("needs Debian's dataset-fashion-mnist")
    (tmp_path / "archives").mkdir()
    for file in FILES:
        content = (DEBIAN / f"{file}.gz").read_bytes()
        # Debian dropped name and time from upstream's gzip header. Flag 8 says that a name follows.
        mtime = struct.pack("<I", 1504176606 if "train" in file else 1504176627)
        header = content[:3] + b"\x08" + mtime + content[8:10] + file.encode() + b"\0"
        (tmp_path / "archives" / f"{file}.gz").write_bytes(header + content[10:])
    prepare("fashion_mnist", None, manual_dir=tmp_path / "archives")
    raw = data._from_tfds("fashion_mnist")
    assert raw is not None
    assert_same(data._to_data(raw), fashion[0])


# ---- the ways to a named set ------------------------------------------------------------------


def test_arrays_are_identical_whatever_the_way(small, server, tmp_path, caplog):
    reference = data.load(f"idx:{write(tmp_path / 'plain', small)}")
    cache = tmp_path / "cache" / "jaxprune"

    def load(**kwargs):
        shutil.rmtree(cache, ignore_errors=True)
        loaded = data.load("mnist", **kwargs)
        assert_same(loaded, reference)
        for file, array in zip(FILES, small, strict=True):
            assert (cache / "mnist" / file).read_bytes() == idx(array)

    load(data_dir=tmp_path / "plain")
    load(data_dir=write(tmp_path / "zipped", small, compress=True))
    load()  # from the server, through TFDS
    assert {path.suffix for path in (tmp_path / "tfds").rglob("*ubyte*")} == {".gz", ".INFO"}
    shutil.rmtree(server)
    shutil.rmtree(tmp_path / "tfds")
    unpacked = write(tmp_path / "other" / "debian" / "jaxprune-test" / "mnist", small)
    assert_same(data.load("mnist", cache_dir=tmp_path / "other"), reference)
    shutil.rmtree(unpacked)
    assert_same(data.load("mnist", cache_dir=tmp_path / "other"), reference)
    assert not caplog.records


def test_what_tfds_has_prepared_is_read_in_the_order_of_the_files(small, tmp_path, caplog):
    prepare("mnist", small)
    reference = data.load(f"idx:{write(tmp_path / 'plain', small)}")
    loaded = data.load("mnist")
    assert_same(loaded, reference)
    assert not caplog.records
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("damage", ["content", "cut", "no info"])
def test_a_damaged_copy_of_tfds_is_passed_over(small, tmp_path, caplog, damage):
    if damage == "content":
        small[0][0, 0, 0] ^= 1
    prepare("mnist", small)
    folder = tmp_path / "tfds" / "mnist" / "3.0.1"
    if damage == "cut":
        records = next(folder.glob("*train*"))
        records.write_bytes(records.read_bytes()[:1000])
    if damage == "no info":
        (folder / "dataset_info.json").unlink()
    with pytest.raises(DataError, match="--data-dir"):
        data.load("mnist")
    assert "not used" in caplog.text and str(folder.parent) in caplog.text


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_cache_is_made_again(small, tmp_path, caplog, damage):
    folder = write(tmp_path / "plain", small)
    reference = data.load("mnist", data_dir=folder)
    debian = tmp_path / "cache" / "jaxprune" / "debian" / "jaxprune-test" / "mnist"
    shutil.copytree(folder, debian)
    cached = tmp_path / "cache" / "jaxprune" / "mnist" / FILES[2]
    content = bytearray(cached.read_bytes())
    if damage == "flipped":
        content[1000] ^= 1
    cached.write_bytes(content[:-1] if damage == "cut" else content)
    if damage == "missing":
        cached.unlink()
    assert_same(data.load("mnist"), reference)
    assert f"not used: {cached}" in caplog.text
    shutil.rmtree(debian)
    assert_same(data.load("mnist"), reference)


def test_a_cache_that_cannot_be_written_is_no_error(small, tmp_path, caplog):
    (tmp_path / "cache").write_text("not a folder")
    data.load("mnist", data_dir=write(tmp_path / "plain", small))
    assert "not cached" in caplog.text


def test_a_named_folder_must_be_right_even_if_the_cache_is(small, tmp_path):
    folder = write(tmp_path / "plain", small)
    data.load("mnist", data_dir=folder)
    with pytest.raises(DataError, match="nowhere: No such file or directory: name a folder"):
        data.load("mnist", data_dir=tmp_path / "nowhere")
    small[3][0] ^= 1
    write(folder, small)
    with pytest.raises(DataError, match=f"{FILES[3]}: wrong checksum for mnist"):
        data.load("mnist", data_dir=folder)


def test_a_wrong_folder_is_not_cached(small, tmp_path):
    small[0][0, 0, 0] ^= 1
    with pytest.raises(DataError, match=f"{FILES[0]}: wrong checksum for mnist"):
        data.load("mnist", data_dir=write(tmp_path / "plain", small))
    assert not (tmp_path / "cache").exists()


def test_a_download_with_the_wrong_checksum_is_refused(server, tmp_path):
    (server / f"{FILES[0]}.gz").write_bytes(gzip.compress(b"something else"))
    message = "could not be downloaded .*wrong checksum.*--data-dir"
    with pytest.raises(DataError, match=message) as error:
        data.load("mnist")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("lookup", [failing_name_lookup, hanging_name_lookup])
def test_without_network_or_data_the_error_comes_soon(monkeypatch, tmp_path, lookup):
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    start = time.perf_counter()
    with pytest.raises(DataError) as error:
        data.load("mnist")
    assert time.perf_counter() - start < 9
    for part in ("--data-dir", "https://storage.googleapis.com/cvdf-datasets/mnist/", *FILES):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_the_debian_script_is_silent_where_it_has_nothing_to_do(tmp_path):
    script = ROOT / "experiments" / "get_debian_data.sh"
    run = functools.partial(subprocess.run, ["/bin/sh", script], capture_output=True, check=True)
    done = run(env={"PATH": str(tmp_path), "HOME": str(tmp_path)})  # no apt-get there
    assert not done.stdout and not done.stderr
    write(tmp_path / "jaxprune" / "fashion_mnist", small_arrays())
    done = run(env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)})
    assert not done.stdout and not done.stderr


# ---- any data set of idx files ----------------------------------------------------------------


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        [f"emnist-letters-{name.replace('t10k', 'test')}" for name in FILES],
        [name.replace("-idx", ".idx") for name in FILES],
    ],
)
def test_idx_takes_other_names_and_labels_from_one(tmp_path, names, compress):
    arrays = small_arrays()
    reference = data.load(f"idx:{write(tmp_path / 'plain', arrays)}")
    moved = [array + (array.ndim == 1) for array in arrays]
    loaded = data.load(f"idx:{write(tmp_path / 'other', moved, names, compress=compress)}")
    assert_same(loaded, reference)
    assert not (tmp_path / "cache").exists()


def test_the_digest_tells_data_sets_apart(tmp_path):
    arrays = small_arrays()
    loaded = data.load(f"idx:{write(tmp_path, arrays)}")
    expected = b"".join(np.asarray(a).tobytes() for split in loaded for a in split)
    assert data.digest(loaded) == hashlib.sha256(expected).hexdigest()
    arrays[3][:] = arrays[3][::-1]
    assert data.digest(data.load(f"idx:{write(tmp_path, arrays)}")) != data.digest(loaded)


def damaged(content, kind):
    match kind:
        case "empty":
            return b""
        case "axes":
            return content[:3] + bytes([content[3] + 1]) + content[4:]
        case "type":
            return content[:2] + b"\x0d" + content[3:]
        case "long":
            return content + b"\0"
        case "header":
            return content[:6]
        case "no images":
            return content[:4] + bytes(4) + content[8:16]
        case "cut":
            return content[:-1]
        case "gzip header":
            return gzip.compress(content)[:5]
        case "gzip cut":
            return gzip.compress(content)[:-9]
        case "gzip trailer":
            return gzip.compress(content)[:-1]
        case "gzip checksum":
            return gzip.compress(content)[:-5] + b"????!"
        case "gzip content":
            return gzip.compress(content)[:40] + b"????" * 50


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "its magic number is ''"),
        ("axes", "its magic number is"),
        ("type", "its magic number is"),
        ("long", "cut short or damaged"),
        ("header", "cut short or damaged"),
        ("no images", "cut short or damaged"),
        ("cut", "cut short or damaged"),
        ("gzip header", "cannot be read"),
        ("gzip cut", "cannot be read"),
        ("gzip trailer", "cannot be read"),
        ("gzip checksum", "cannot be read"),
        ("gzip content", "cannot be read"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, file, kind, message):
    folder = write(tmp_path, small_arrays(train=60, test=20))
    (folder / file).write_bytes(damaged((folder / file).read_bytes(), kind))
    with pytest.raises(DataError, match=message) as error:
        data.load(f"idx:{folder}")
    assert str(folder / file) in str(error.value) and "\n" not in str(error.value)


def test_every_cut_of_an_idx_file_is_found(tmp_path):
    folder = write(tmp_path, small_arrays(train=60, test=20))
    path = folder / FILES[3]
    plain = path.read_bytes()
    for content in (plain, gzip.compress(plain)):
        for end in range(len(content)):
            path.write_bytes(content[:end])
            with pytest.raises(DataError, match=FILES[3]):
                data.load(f"idx:{folder}")


def at(file, value):
    """Return a change of one label."""

    def change(arrays):
        arrays[file][-1] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at(1, 11), "train-labels.*without a gap, got 11 different ones in .0, 11."),
        (at(1, 255), "train-labels.*without a gap"),
        (lambda a: a[1].__iadd__(2), "train-labels.*without a gap, got 10 .* in .2, 11."),
        (at(3, 10), "t10k-labels.*must be in .0, 9. as in training, got .0, 10."),
        (lambda a: a[1].__iadd__(1), "t10k-labels.*must be in .1, 10. as in training"),
    ],
)
def test_labels_out_of_range_are_refused(tmp_path, change, message):
    arrays = small_arrays()
    change(arrays)
    with pytest.raises(DataError, match=message):
        data.load(f"idx:{write(tmp_path, arrays)}")


@pytest.mark.parametrize(
    ("part", "size", "message"),
    [
        (1, (239,), "train-labels.*: 239 labels, but 240 images in train-images"),
        (2, (39, 28, 28), "t10k-labels.*: 40 labels, but 39 images in t10k-images"),
        (2, (40, 28, 27), r"t10k-images.*: images of \(28, 27\), but train.* has \(28, 28\)"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(tmp_path, part, size, message):
    arrays = list(small_arrays())
    arrays[part] = arrays[part][tuple(slice(n) for n in size)]
    with pytest.raises(DataError, match=message):
        data.load(f"idx:{write(tmp_path, arrays)}")


def test_folders_that_hold_too_little_or_too_much_are_refused(tmp_path):
    with pytest.raises(DataError, match="none: No such file or directory: name a folder"):
        data.load(f"idx:{tmp_path / 'none'}")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: Not a directory"):
        data.load(f"idx:{tmp_path / 'file'}")
    write(tmp_path, small_arrays())
    (tmp_path / FILES[2]).unlink()
    with pytest.raises(DataError, match=f"{FILES[2]}: no such file, gzipped or not"):
        data.load(f"idx:{tmp_path}")
    (tmp_path / f"{FILES[2]}.gz").mkdir()
    with pytest.raises(DataError, match=f"{FILES[2]}.gz: cannot be read: .*Is a directory"):
        data.load(f"idx:{tmp_path}")
    write(tmp_path, small_arrays(), [f"other-{name}" for name in FILES])
    with pytest.raises(DataError, match="more than one data set .other-train-images"):
        data.load(f"idx:{tmp_path}")


def test_bad_names_are_refused(tmp_path):
    with pytest.raises(DataError, match="fashion_mnist, mnist or idx:FOLDER, got 'cifar10'"):
        data.load("cifar10")
    with pytest.raises(DataError, match="leave out --data-dir"):
        data.load(f"idx:{tmp_path}", data_dir=tmp_path)


# ---- the validation split ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "each"),
    [
        ([6000] * 10, 500),
        ([24] * 10, 2),
        ([30000] * 26, 192),
        ([1000] * 9 + [10], 5),
        ([3, 2], 1),
        ([40], 3),
    ],
)
def test_validation_takes_the_same_number_of_each_class(sizes, each):
    labels = np.repeat(np.arange(len(sizes), dtype=np.uint8), sizes)
    np.random.default_rng(0).shuffle(labels)
    chosen = data._validation(labels)
    assert np.bincount(labels[chosen], minlength=len(sizes)).tolist() == [each] * len(sizes)
    np.random.seed(1)
    np.testing.assert_array_equal(data._validation(labels), chosen)
    # Not just the first ones.
    assert each < 100 or abs(np.flatnonzero(chosen).mean() / len(labels) - 0.5) < 0.02


def test_a_class_of_one_image_cannot_be_split():
    with pytest.raises(DataError, match="class 1 has one training image"):
        data._validation(np.array([0, 0, 1, 2, 2], np.uint8))
