"""Data sets of one file or folder: npz, text, images; what every data set is checked for."""

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxprune import data
from jaxprune.data import Data, DataError, Split, splits

R = np.random.default_rng(0)


def arrays(train=60, test=20, **changes):
    """The arrays of a small classification of floats; a change replaces or makes one."""
    made = {
        "x_train": R.normal(size=(train, 3, 2)),
        "y_train": np.arange(train) % 4,
        "x_test": R.normal(size=(test, 3, 2)),
        "y_test": np.arange(test) % 4,
    }
    for name, change in changes.items():
        made[name] = change(made[name]) if callable(change) else change
    return made


def load_npz(folder, **content):
    np.savez_compressed(folder / "small.npz", **content)
    return data.load(f"npz:{folder / 'small.npz'}")


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def image_folder(folder, shape=(5, 4), suffix="png", sizes=(24, 6)):
    """Images of two classes; return the pixels of train and test in the order of their names."""
    pixels = [R.integers(0, 256, (size, *shape), dtype=np.uint8) for size in sizes]
    for part, images in zip(("train", "test"), pixels, strict=True):
        for i, image in enumerate(images):
            label = "ab"[i // (len(images) // 2)]
            save(folder / part / label / f"{i:03}.{suffix}", image)
    return pixels


def joined(loaded):
    """Training and validation together, in an order that is the examples' own."""
    x, y = (np.concatenate([a, b]) for a, b in zip(loaded.train, loaded.val, strict=True))
    order = np.lexsort(x.reshape(len(x), -1).T)
    return x[order], y[order]


# ---- npz ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", ">f8", "uint8"])
@pytest.mark.parametrize("labels", ["uint8", "int64", "column", "from one"])
def test_npz_gives_what_was_saved(tmp_path, dtype, labels):
    saved = arrays()
    for name in ("x_train", "x_test"):
        saved[name] = (saved[name] * 100).astype(dtype)
    expected = {name: saved[name].astype(np.float32) for name in saved}
    if dtype == "uint8":
        expected["x_train"], expected["x_test"] = (expected[f"x_{n}"] / 255 for n in data_parts)
    change = {"column": lambda y: y[:, None], "from one": lambda y: y + 1}
    for name in ("y_train", "y_test"):
        saved[name] = change.get(labels, lambda y: y.astype(labels))(saved[name])
    loaded = load_npz(tmp_path, **saved)
    assert {(s.x.dtype.name, s.y.dtype.name) for s in loaded} == {("float32", "int32")}
    np.testing.assert_array_equal(loaded.test.x, expected["x_test"])
    np.testing.assert_array_equal(loaded.test.y, expected["y_test"])
    reference = Split(expected["x_train"], expected["y_train"])
    empty = Split(reference.x[:0], reference.y[:0])
    for found, true in zip(joined(loaded), joined(Data(reference, empty, empty)), strict=True):
        np.testing.assert_array_equal(found, true)
    assert np.bincount(loaded.val.y).tolist() == [1, 1, 1, 1]
    assert data.outputs_of(loaded) == 4


data_parts = ("train", "test")


def test_validation_of_1797_digits(tmp_path):
    digits = arrays(1437, 360, y_train=lambda y: np.arange(1437) % 10)
    digits["y_test"] = np.arange(360) % 10
    loaded = load_npz(tmp_path, **digits)
    assert [len(split.y) for split in loaded] == [1437 - 110, 110, 360]
    assert np.bincount(loaded.val.y).tolist() == [11] * 10


def test_given_validation_is_kept(tmp_path):
    saved = arrays(x_val=np.ones((5, 3, 2)), y_val=np.arange(5) % 4)
    loaded = load_npz(tmp_path, **saved, names=np.array(["not", "read"]))
    np.testing.assert_array_equal(loaded.val.x, saved["x_val"])
    np.testing.assert_array_equal(loaded.train.y, saved["y_train"])
    del saved["y_val"]
    with pytest.raises(DataError, match="small.npz: no array y_val; it has x_train, "):
        load_npz(tmp_path, **saved)


@pytest.mark.parametrize(("shape", "outputs"), [((), 1), ((1,), 1), ((2, 5), 5)])
def test_regression(tmp_path, shape, outputs):
    loaded = load_npz(
        tmp_path, **arrays(y_train=R.normal(size=(60, *shape)), y_test=R.normal(size=(20, *shape)))
    )
    shape = shape or (1,)  # as networks return it
    assert [split.y.shape for split in loaded] == [(n, *shape) for n in (55, 5, 20)]
    assert loaded.val.y.dtype == np.float32
    assert data.outputs_of(loaded) == outputs


def test_tokens(tmp_path):
    x = R.integers(0, 9, (80, 7))
    y = np.where(R.random((80, 7)) < 0.1, -1, x)
    x[0, 0], y[79, 0] = 11, 10  # these occur once, among training inputs and test targets
    parts = {"x_train": x[:60], "y_train": y[:60], "x_test": x[60:], "y_test": y[60:]}
    loaded = load_npz(tmp_path, **{name: a.astype(np.int8) for name, a in parts.items()})
    np.testing.assert_array_equal(loaded.test.x, x[60:])
    np.testing.assert_array_equal(loaded.test.y, y[60:])
    assert {a.dtype.name for split in loaded for a in split} == {"int32"}
    assert data.outputs_of(loaded) == 12
    # Where inputs are floats, the same targets are labels a position.
    loaded = load_npz(tmp_path, **parts | {"x_train": x[:60] * 0.5, "x_test": x[60:] * 0.5})
    assert loaded.train.x.dtype == np.float32
    assert data.outputs_of(loaded) == 11
    for name, low, high in (("x_test", -1, 8), ("y_train", -2, 8), ("y_test", -1, 2**31)):
        wrong = {key: a.copy() for key, a in parts.items()}
        wrong[name].flat[:2] = low, high
        bound = int(name[0] == "y")
        message = rf"{name}: tokens must be in \[-?{bound}, 2.31 - 2\], got \[{low}, {high}\]"
        with pytest.raises(DataError, match=message):
            load_npz(tmp_path, **wrong)
    with pytest.raises(DataError, match="x_train: one token only"):
        load_npz(tmp_path, **{name: np.zeros_like(a) for name, a in parts.items()})


def at(value):
    """Return a change of the fourth example."""

    def change(array):
        array = array.copy()
        array[3:4] = value
        return array

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_train": lambda y: y[1:]}, "y_train: 59 targets, but 60 inputs in .*: x_train"),
        ({"x_test": lambda x: x[:0]}, "x_test: empty"),
        ({"y_test": np.int64(3)}, "y_test: one number, not an array"),
        ({"x_test": lambda x: x[:, :2]}, r"x_test: shape \(2, 2\), but \(3, 2\) in .*x_train"),
        ({"x_test": lambda x: x.astype(np.uint8)}, "x_test: uint8, but float64 in .*x_train"),
        ({"y_test": lambda y: y + 0.5}, "y_test: float64, but int64 in .*y_train"),
        ({"x_train": at(np.nan)}, "x_train: example 3 holds nan: not finite"),
        ({"x_test": at(-np.inf)}, "x_test: example 3 holds -inf: not finite"),
        ({"x_test": at(1e39)}, r"x_test: example 3 holds 1e\+39: not finite"),
        ({"y_train": lambda y: at(np.nan)(y + 0.5), "y_test": np.ones(20)}, "y_train: example 3 h"),
        ({"y_train": lambda y: y * 0}, "y_train: one class only, 0"),
        ({"y_train": at(5)}, "y_train: labels .* without a gap, got 5 different ones in .0, 5."),
        ({"y_train": lambda y: y + 2}, "y_train: labels .* without a gap, got 4 .* in .2, 5."),
        ({"y_train": lambda y: y - 1}, "y_train: labels .* without a gap, got 4 .* in .-1, 2."),
        ({"y_test": at(4)}, "y_test: labels must be in .0, 3. as in training, got .0, 4."),
        ({"y_train": lambda y: y + 1}, "y_test: labels must be in .1, 4. as in training"),
        ({"y_train": at(4)}, "y_train: class 4 has one training example"),
        (arrays(1, 1, y_train=np.ones(1), y_test=np.ones(1)), "y_train: one training example"),
        ({"x_train": np.ones((60, 3, 2), int), "x_test": np.ones((20, 3, 2), int)}, "int64: inp"),
        ({"y_train": np.array(["a", "b"] * 30), "y_test": np.array(["a"] * 20)}, "<U1 of shape"),
        ({"y_train": np.ones((60, 2, 2), int), "y_test": np.ones((20, 2, 2), int)}, "int64 of sh"),
        ({"y_train": np.array([None] * 60)}, "y_train holds Python objects"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=f"small.npz.*{message}"):
        load_npz(tmp_path, **arrays(**changes))


def test_damaged_npz_files_are_refused(tmp_path):
    path = tmp_path / "small.npz"
    load_npz(tmp_path, **arrays())
    whole = path.read_bytes()
    for end in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(DataError, match="small.npz"):
            data.load(f"npz:{path}")
    for train in (60, 6000):
        np.savez(path, **arrays(train))
        content = bytearray(path.read_bytes())
        content[train * 40] ^= 1  # among the numbers of x_train
        path.write_bytes(content)
        with pytest.raises(DataError, match="small.npz: cannot be read: Bad CRC-32 .* 'x_train"):
            data.load(f"npz:{path}")
    path.write_bytes(b"x_train")
    with pytest.raises(DataError, match="small.npz: not an npz archive, or cut short"):
        data.load(f"npz:{path}")
    with pytest.raises(DataError, match="none.npz: cannot be read: No such file"):
        data.load(f"npz:{tmp_path / 'none.npz'}")
    # A header that announces more than there is.
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<f8", "fortran_order": False, "shape": (10**9, 3, 2)}
    )
    np.savez(path, **{name: a for name, a in arrays().items() if name != "x_train"})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x_train.npy", file.getvalue())
    with pytest.raises(DataError, match="x_train is cut short or damaged: 0 bytes of .1000000000"):
        data.load(f"npz:{path}")


# ---- text ---------------------------------------------------------------------------------------


def test_text_by_hand(tmp_path):
    path = tmp_path / "text"
    text = "bé\r\n𝄞a" * 35  # 210 characters, six different ones, 104 windows of two
    path.write_bytes(text.encode())
    loaded = data.load(f"text:{path}", context=2)
    codes = {character: i for i, character in enumerate("\n\rabé𝄞")}
    tokens = np.array([codes[character] for character in text])
    np.testing.assert_array_equal(np.concatenate([s.x for s in loaded]).ravel(), tokens[:208])
    np.testing.assert_array_equal(np.concatenate([s.y for s in loaded]).ravel(), tokens[1:209])
    assert [len(split.x) for split in loaded] == [93, 5, 6]
    assert {a.dtype.name for split in loaded for a in split} == {"int32"}
    assert data.outputs_of(loaded) == 6


def test_texts_that_cannot_be_used_are_refused(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"ab" * 1280)
    with pytest.raises(DataError, match="text: 2,560 characters are 19 windows of 128: .* 20 win"):
        data.load(f"text:{path}")
    path.write_bytes(b"ab" * 1280 + b"a")
    assert [len(split.x) for split in data.load(f"text:{path}")] == [18, 1, 1]
    with pytest.raises(DataError, match="context must be at least 1, got 0"):
        data.load(f"text:{path}", context=0)
    for content, message in (
        (b"", "0 characters are 0 windows"),
        (b"a" * 10000, "one token only"),
        (b"ab" * 5000 + b"\xff", "not UTF-8: byte 0xff at 10,000"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"text: {message}"):
            data.load(f"text:{path}")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        data.load(f"text:{tmp_path}")


# ---- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3)])
def test_folder_gives_the_pixels_in_the_order_of_names(tmp_path, shape, caplog):
    train, test = image_folder(tmp_path, shape)
    (tmp_path / "train" / "a" / ".hidden").touch()
    (tmp_path / "train" / "notes.txt").touch()
    loaded = data.load(f"folder:{tmp_path}")
    np.testing.assert_array_equal(loaded.test.x, test / np.float32(255))
    assert loaded.test.y.tolist() == [0, 0, 0, 1, 1, 1]
    assert [len(split.x) for split in loaded] == [22, 2, 6]
    chosen = splits._validation(np.repeat([0, 1], 12), "")
    np.testing.assert_array_equal(loaded.train.x, train[~chosen] / np.float32(255))
    assert not caplog.records
    (tmp_path / "test" / "a" / "other.gif").touch()
    data.load(f"folder:{tmp_path}")
    assert "not read" in caplog.text and "other.gif" in caplog.text


def test_jpeg_is_read(tmp_path):
    image_folder(tmp_path, (16, 16), "JPG")
    loaded = data.load(f"folder:{tmp_path}")
    with Image.open(tmp_path / "test" / "a" / "000.JPG") as image:
        np.testing.assert_array_equal(loaded.test.x[0], np.asarray(image) / np.float32(255))


def test_damaged_or_mixed_images_are_named(tmp_path):
    image_folder(tmp_path)
    path = tmp_path / "train" / "b" / "017.png"
    whole = path.read_bytes()
    for end in range(len(whole) - 21):  # what follows the last pixel is not needed
        path.write_bytes(whole[:end])
        with pytest.raises(DataError, match="train/b/017.png: cannot be read: "):
            data.load(f"folder:{tmp_path}")
    pixels = np.zeros((5, 4, 3), np.uint8)
    for image, message in (
        (Image.fromarray(pixels), "4 x 5 pixels, RGB, but 4 x 5 pixels, L in .*train/a/000.png"),
        (Image.fromarray(pixels[1:, :, 0]), "4 x 4 pixels, L, but 4 x 5 pixels, L in "),
        (Image.fromarray(pixels).convert("P"), "images are grey .L. or RGB, got P"),
        (Image.fromarray(pixels).convert("RGBA"), "images are grey .L. or RGB, got RGBA"),
    ):
        image.save(path)
        with pytest.raises(DataError, match=f"train/b/017.png: {message}"):
            data.load(f"folder:{tmp_path}")
    Image.fromarray(pixels[..., 0]).save(path, format="gif")  # whatever its name says
    with pytest.raises(DataError, match="017.png: cannot be read: cannot identify"):
        data.load(f"folder:{tmp_path}")


def test_folders_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(DataError, match="train: cannot be read: No such file"):
        data.load(f"folder:{tmp_path}")
    image_folder(tmp_path)
    (tmp_path / "train" / "c").mkdir()
    with pytest.raises(DataError, match="class c is not in both train and test"):
        data.load(f"folder:{tmp_path}")
    (tmp_path / "test" / "c").mkdir()
    with pytest.raises(DataError, match="train/c: no .png or .jpg"):
        data.load(f"folder:{tmp_path}")
    save(tmp_path / "one" / "train" / "a" / "1.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(DataError, match="test: cannot be read: No such file"):
        data.load(f"folder:{tmp_path / 'one'}")
    save(tmp_path / "one" / "test" / "a" / "1.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(DataError, match="one: one class only, a"):
        data.load(f"folder:{tmp_path / 'one'}")
    (tmp_path / "none" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="none/train: no folders of classes"):
        data.load(f"folder:{tmp_path / 'none'}")


# ---- memory, names, digest ----------------------------------------------------------------------


def test_data_larger_than_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    image_folder(tmp_path)
    np.savez(tmp_path / "a.npz", **arrays())
    (tmp_path / "text").write_bytes(b"ab" * 5000)
    free = splits.free_memory()
    assert free is None or 2**20 < free < 2**50
    # 80 examples of six float64 that become float32, and as many int64 that become int32.
    for name, needed in (
        ("npz:a.npz", 80 * 12 * 7),
        ("text:text", 13 * 10000),
        ("folder:.", 30 * 5 * 20),
    ):
        kind, _, place = name.partition(":")
        where = f"{kind}:{tmp_path / place}"
        monkeypatch.setattr(splits, "free_memory", lambda size=needed: size)
        data.load(where)
        monkeypatch.setattr(splits, "free_memory", lambda size=needed: size - 1)
        with pytest.raises(DataError, match="needs 0.0 GB of memory, of which 0.0 GB are free"):
            data.load(where)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_place_whose_name_is_not_utf8_works_and_is_named(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n"))
    folder.mkdir()
    image_folder(folder)
    reference = data.load(f"folder:{folder}")
    (folder / "train" / "a").rename(Path(os.fsdecode(os.fsencode(folder) + b"/train/\xfe")))
    code = (
        "import sys; from jaxprune import data\n"
        "try: data.load(sys.argv[1])\n"
        "except data.DataError as error: print(error)"
    )
    command = [sys.executable, "-c", code, f"folder:{folder}"]
    done = subprocess.run(command, capture_output=True, check=True, cwd=Path(__file__).parents[1])
    assert done.stdout.decode("ascii").endswith(
        "/\\udcff\\n: class a is not in both train and test\n"
    )
    (folder / "test" / "a").rename(Path(os.fsdecode(os.fsencode(folder) + b"/test/\xfe")))
    loaded = data.load(f"folder:{folder}")
    np.testing.assert_array_equal(loaded.test.x, np.roll(reference.test.x, 3, axis=0))
    load_npz(folder, **arrays())


def test_the_digest_tells_data_sets_apart(tmp_path):
    loaded = load_npz(tmp_path, **arrays())
    again = data.load(f"npz:{tmp_path / 'small.npz'}")
    assert data.digest(again) == data.digest(loaded)
    x, y = loaded.test
    others = (
        Split(x, y[::-1]),
        Split(x.reshape(20, 2, 3), y),
        Split(x.reshape(20, 6), y),
        Split(x.view(np.int32), y),
        Split(np.asfortranarray(x), y),
    )
    digests = [data.digest(loaded._replace(test=other)) for other in others]
    assert len({data.digest(loaded), *digests}) == 5  # the last one is the same
    assert digests[4] == data.digest(loaded)


@pytest.mark.parametrize(
    ("sizes", "each"),
    [
        ([6000] * 10, 500),
        ([24] * 10, 2),
        ([30000] * 26, 192),
        ([1000] * 9 + [10], 5),
        ([3, 2], 1),
    ],
)
def test_validation_takes_the_same_number_of_each_class(sizes, each):
    labels = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    np.random.default_rng(0).shuffle(labels)
    chosen = splits._validation(labels, "")
    assert np.bincount(labels[chosen], minlength=len(sizes)).tolist() == [each] * len(sizes)
    np.random.seed(1)
    np.testing.assert_array_equal(splits._validation(labels, ""), chosen)
    # Not just the first ones.
    assert each < 100 or abs(np.flatnonzero(chosen).mean() / len(labels) - 0.5) < 0.02
