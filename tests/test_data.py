"""Named data sets and those of idx files; what TFDS has prepared."""

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

import numpy as np
import pytest
from PIL import Image

from jaxprune import data
from jaxprune.data import DataError, published, splits
from jaxprune.data.idx import FILES

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


def small_arrays(train=240, test=40):
    rng = np.random.default_rng(0)
    return (
        rng.integers(0, 256, (train, 28, 28), dtype=np.uint8),
        (np.arange(train) % 10).astype(np.uint8),
        rng.integers(0, 256, (test, 28, 28), dtype=np.uint8),
        (np.arange(test) % 10).astype(np.uint8),
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
    monkeypatch.setattr(published, "_PROBE_SECONDS", 0.5)


@pytest.fixture
def cached(fashion_mnist, monkeypatch):
    """The folder in which the real Fashion-MNIST lies once it was loaded."""
    monkeypatch.undo()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "jaxprune" / "fashion_mnist"


@pytest.fixture
def small(monkeypatch):
    """A small set of 240 + 40 images that goes by the name of `mnist`."""
    arrays = small_arrays()
    a, b, c, d = (hashlib.sha256(idx(array)).hexdigest() for array in arrays)
    source = published.Source("http://127.0.0.1:1/", (a, b, c, d), debian="jaxprune-test/mnist")
    monkeypatch.setitem(published.SOURCES, "mnist", source)
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
        source = published.SOURCES["mnist"]._replace(url=url)
        monkeypatch.setitem(published.SOURCES, "mnist", source)
        monkeypatch.setattr(tfds, "builder_cls", lambda _: types.SimpleNamespace(url_infos=infos))
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder
        httpd.shutdown()


def prepare(dataset, arrays, image="image"):
    """Prepare a data set as TFDS does, without TensorFlow."""
    import tensorflow_datasets as tfds

    class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # pyright: ignore
        name = dataset
        VERSION = tfds.core.Version("3.0.1")  # that of TFDS's own MNIST
        pkg_dir_path = tfds.core.Path(ROOT)

        def _info(self):
            features = {
                image: tfds.features.Image(shape=(28, 28, 1)),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(*arrays[:2]),
                "test": self._generate_examples(*arrays[2:]),
            }

        def _generate_examples(self, images, labels):
            for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
                png = io.BytesIO()
                Image.fromarray(pixels).save(png, "png")
                png.seek(0)
                yield i, {image: png, "label": int(label)}

    builder = Prepared(data_dir=os.environ["TFDS_DATA_DIR"], file_format="array_record")
    builder.download_and_prepare()


# ---- the real data ----------------------------------------------------------------------------


def test_fashion_mnist_is_whole_in_order_and_balanced(fashion_mnist, cached):
    digest = "bc2e221f94ae54a403ebbd2e5cbaada8a05f11acdff0ab2c09051c62e94a0a54"
    assert data.digest(fashion_mnist) == digest
    assert data.outputs_of(fashion_mnist) == 10
    train, val, test = fashion_mnist
    for split, size in ((train, 55000), (val, 5000), (test, 10000)):
        assert split.x.shape == (size, 28, 28) and split.x.dtype == np.float32
        assert split.y.shape == (size,) and split.y.dtype == np.int32
        assert split.x.min() == 0 and split.x.max() == 1
        assert (np.bincount(split.y) == size // 10).all()
    images = np.fromfile(cached / FILES[0], np.uint8, offset=16).reshape(60000, 28, 28)
    labels = np.fromfile(cached / FILES[1], np.uint8, offset=8).astype(np.int32)
    chosen = splits._validation(labels, "")
    np.testing.assert_array_equal(val.x, images[chosen] / np.float32(255))
    np.testing.assert_array_equal(train.y, labels[~chosen])
    np.testing.assert_array_equal(train.x[::100], images[~chosen][::100] / np.float32(255))
    # These stay, or runs can no longer be compared with those made before.
    assert np.flatnonzero(chosen)[:5].tolist() == [23, 34, 46, 48, 59]


def test_a_second_load_takes_less_than_a_second_and_imports_nothing_large(cached):
    code = (
        "import sys, time; from pathlib import Path; from jaxprune import data; "
        "load = lambda: data.load('fashion_mnist', cache_dir=Path(sys.argv[1])); "
        # The processor's time, because other tests may run beside this one.
        "now = time.process_time; starts = [(now(), load(), now()) for _ in range(2)]; "
        "print({'jax', 'PIL', 'tensorflow_datasets'} & set(sys.modules)); "
        "print(min(end - start for start, _, end in starts))"
    )
    command = [sys.executable, "-c", code, str(cached.parent)]
    written = [(cached / file).stat().st_mtime_ns for file in FILES]
    imported, seconds = subprocess.check_output(command, cwd=ROOT, text=True).split()
    assert [(cached / file).stat().st_mtime_ns for file in FILES] == written
    assert imported == "set()"
    assert float(seconds) < 1


def test_debians_archives_are_those_that_tfds_registers():
    if not DEBIAN.is_dir():
        pytest.skip("needs Debian's dataset-fashion-mnist")
    import tensorflow_datasets as tfds

    infos = tfds.builder_cls("fashion_mnist").url_infos or {}
    registered = {info.filename: info.checksum for info in infos.values()}
    for file, sha256 in zip(FILES, published.SOURCES["fashion_mnist"].sha256, strict=True):
        content = (DEBIAN / f"{file}.gz").read_bytes()
        assert hashlib.sha256(gzip.decompress(content)).hexdigest() == sha256
        # Debian dropped name and time from upstream's gzip header. Flag 8 says that a name follows.
        mtime = struct.pack("<I", 1504176606 if "train" in file else 1504176627)
        header = content[:3] + b"\x08" + mtime + content[8:10] + file.encode() + b"\0"
        assert hashlib.sha256(header + content[10:]).hexdigest() == registered[f"{file}.gz"]


# ---- the ways to a named set ------------------------------------------------------------------


def test_arrays_are_identical_whatever_the_way(small, server, tmp_path, caplog):
    reference = data.load(f"idx:{write(tmp_path / 'plain', small)}")
    cache = tmp_path / "cache" / "jaxprune"

    def load(**kwargs):
        shutil.rmtree(cache, ignore_errors=True)
        assert_same(data.load("mnist", **kwargs), reference)
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


def test_what_tfds_has_prepared_is_read(small, tmp_path, caplog):
    prepare("mnist", small)
    reference = data.load(f"idx:{write(tmp_path / 'plain', small)}")
    # By name in the order of the published files, otherwise in that of TFDS.
    assert_same(data.load("mnist"), reference)
    loaded = data.load("tfds:mnist")
    assert not caplog.records and "tensorflow" not in sys.modules
    for part in (slice(0, 2), slice(2, 3)):  # training and validation together, then test
        examples = [
            {(x.tobytes(), int(y)) for split in sets[part] for x, y in zip(*split, strict=True)}
            for sets in (loaded, reference)
        ]
        assert examples[0] == examples[1] and len(examples[0]) == (240, 40)[part.start // 2]
    assert_same(data.load("tfds:mnist:3.0.1"), loaded)


@pytest.mark.parametrize("damage", ["content", "cut", "no info"])
def test_a_damaged_copy_of_tfds_is_passed_over_or_named(small, tmp_path, caplog, damage):
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
    if damage != "content":
        with pytest.raises(DataError, match="mnist: cannot be read"):
            data.load("tfds:mnist")


def test_tfds_says_how_to_prepare_what_it_lacks(small, tmp_path):
    for name in ("cifar10", "huggingface:mnist", "cifar10/none:1.0.0"):
        with pytest.raises(DataError, match="tfds/(cifar10|huggingface): no such .*prepare it"):
            data.load(f"tfds:{name}")
    (tmp_path / "tfds" / "nothing").mkdir(parents=True)
    with pytest.raises(DataError, match="tfds/nothing: cannot be read: .*prepare it with"):
        data.load("tfds:nothing")
    prepare("pictures", small, image="picture")
    with pytest.raises(DataError, match="tfds/pictures: .*image"):
        data.load("tfds:pictures")


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


def test_a_named_folder_must_be_right_whatever_the_cache_holds(small, tmp_path):
    wrong = [array ^ 1 for array in small]
    folder = write(tmp_path / "plain", wrong)
    with pytest.raises(DataError, match=f"{FILES[0]}: wrong checksum for mnist"):
        data.load("mnist", data_dir=folder)
    assert not (tmp_path / "cache").exists()
    data.load("mnist", data_dir=write(folder, small))
    with pytest.raises(DataError, match="nowhere: cannot be read: No such file"):
        data.load("mnist", data_dir=tmp_path / "nowhere")
    write(folder, [*small[:3], wrong[3]])
    with pytest.raises(DataError, match=f"{FILES[3]}: wrong checksum for mnist"):
        data.load("mnist", data_dir=folder)


def test_a_download_with_the_wrong_checksum_is_refused(server, tmp_path):
    (server / f"{FILES[0]}.gz").write_bytes(gzip.compress(b"something else"))
    with pytest.raises(DataError, match="could not be downloaded .*wrong checksum.*--data-dir"):
        data.load("mnist")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("seconds", [0, 2])
def test_without_network_or_data_the_error_comes_soon(monkeypatch, tmp_path, seconds):
    def lookup(*args, **kwargs):
        time.sleep(seconds)
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    start = time.perf_counter()
    with pytest.raises(DataError) as error:
        data.load("mnist")
    assert time.perf_counter() - start < 1.9
    for part in ("--data-dir", "https://storage.googleapis.com/cvdf-datasets/mnist/", *FILES):
        assert part in str(error.value)
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


DAMAGES = {
    "empty": (lambda c: b"", "its magic number is ''"),
    "axes": (lambda c: c[:3] + bytes([c[3] + 1]) + c[4:], "its magic number is"),
    "type": (lambda c: c[:2] + b"\x0d" + c[3:], "its magic number is"),
    "long": (lambda c: c + b"\0", "damaged: .* bytes announced .*, more there"),
    "header": (lambda c: c[:6], "cut short or damaged"),
    "no images": (lambda c: c[:4] + bytes(4) + c[8:16], "cut short or damaged"),
    "gzip header": (lambda c: gzip.compress(c)[:5], "cannot be read"),
    "gzip checksum": (lambda c: gzip.compress(c)[:-5] + b"????!", "cannot be read: CRC"),
    "gzip content": (lambda c: gzip.compress(c)[:40] + b"????" * 50, "cannot be read"),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_idx_file_is_named(tmp_path, file, kind):
    folder = write(tmp_path, small_arrays(train=60, test=20))
    change, message = DAMAGES[kind]
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    with pytest.raises(DataError, match=message) as error:
        data.load(f"idx:{folder}")
    assert str(folder / file) in str(error.value)


def test_every_cut_of_an_idx_file_is_found(tmp_path):
    folder = write(tmp_path, small_arrays(train=60, test=20))
    path = folder / FILES[3]
    plain = path.read_bytes()
    for content in (plain, gzip.compress(plain)):
        for end in range(len(content)):
            path.write_bytes(content[:end])
            with pytest.raises(DataError, match=FILES[3]):
                data.load(f"idx:{folder}")


def test_no_more_is_read_than_a_header_announces_and_memory_holds(tmp_path, monkeypatch):
    folder = write(tmp_path, small_arrays())
    announced = struct.pack(">4I", 0x803, 240, 28, 28)
    content = gzip.compress(announced + bytes(10**7))
    # Reading on would end in "cannot be read".
    (folder / FILES[0]).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=f"{FILES[0]}: cut short or damaged: 188,160 .*more there"):
        data.load(f"idx:{folder}")
    announced = struct.pack(">4I", 0x803, 2**32 - 1, 28, 28)
    (folder / FILES[0]).write_bytes(gzip.compress(announced))
    with pytest.raises(DataError, match="needs 16836.[0-9] GB of memory"):
        data.load(f"idx:{folder}")
    monkeypatch.setattr(splits, "free_memory", lambda: None)  # as where the system does not say
    with pytest.raises(DataError, match=f"{FILES[0]}: "):
        data.load(f"idx:{folder}")


def test_files_that_do_not_fit_together_are_refused(tmp_path):
    a, b, c, d = small_arrays()
    with pytest.raises(DataError, match="10k-labels.*: 40 targets, but 39 inputs in .*10k-images"):
        data.load(f"idx:{write(tmp_path, (a, b, c[1:], d))}")
    with pytest.raises(
        DataError, match=r"10k-im.*: shape \(28, 27\), but \(28, 28\) in .*train-im"
    ):
        data.load(f"idx:{write(tmp_path, (a, b, c[..., 1:], d))}")


def test_folders_that_hold_too_little_or_too_much_are_refused(tmp_path):
    with pytest.raises(DataError, match="none: cannot be read: No such file"):
        data.load(f"idx:{tmp_path / 'none'}")
    write(tmp_path, small_arrays())
    (tmp_path / FILES[2]).unlink()
    with pytest.raises(DataError, match=f"{FILES[2]}: no such file, gzipped or not"):
        data.load(f"idx:{tmp_path}")
    (tmp_path / f"{FILES[2]}.gz").mkdir()
    with pytest.raises(DataError, match=f"{FILES[2]}.gz: cannot be read: Is a directory"):
        data.load(f"idx:{tmp_path}")
    write(tmp_path, small_arrays(), [f"other-{name}" for name in FILES])
    with pytest.raises(DataError, match="more than one data set .other-train-images"):
        data.load(f"idx:{tmp_path}")


def test_bad_names_are_refused(tmp_path):
    for name in ("cifar10", "npz", "npz:", "zip:file"):
        with pytest.raises(DataError, match=f"fashion_mnist, mnist, idx:.*tfds:NAME, got '{name}'"):
            data.load(name)
    for kind in ("idx", "npz", "folder", "text", "tfds"):
        with pytest.raises(DataError, match="leave out --data-dir"):
            data.load(f"{kind}:{tmp_path}", data_dir=tmp_path)
