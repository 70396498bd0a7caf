import errno
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune import checkpoints
from jaxprune.checkpoints import CorruptCheckpoint

PARAMS = {"hidden_0": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
MASKS = {"hidden_0": {"kernel": np.array([[True, False, True], [False, True, True]])}}


@pytest.fixture
def path(tmp_path):
    """Save a checkpoint with two items."""
    checkpoints.save(tmp_path / "0001", params=PARAMS, masks=MASKS)
    return tmp_path / "0001"


def assert_same(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        other = np.asarray(other)
        assert isinstance(leaf, np.ndarray)
        assert (leaf.dtype, leaf.shape) == (other.dtype, other.shape)
        assert leaf.tobytes() == other.tobytes()


DTYPES = ("bool", "float32", "bfloat16", "float16", "int32", "int64", "uint8")
ARRAYS = st.builds(
    lambda dtype, shape, seed: (np.random.default_rng(seed).random(shape) * 9).astype(
        jnp.dtype(dtype)
    ),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 99),
)
KEYS = st.one_of(
    st.dictionaries(st.text("ab/.: é'[\\~", max_size=3), st.none(), max_size=3),
    st.dictionaries(st.integers(-1, 12), st.none(), max_size=3),
)
TREES = st.recursive(
    ARRAYS | st.none(),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        KEYS.flatmap(lambda keys: st.fixed_dictionaries({key: inner for key in keys})),
    ),
    max_leaves=6,
)


@given(TREES)
@settings(max_examples=25, deadline=None)
def test_round_trip_of_any_tree(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("tree") / "0001"
    checkpoints.save(path, item=tree)
    assert_same(checkpoints.load(path, "item"), tree)


@pytest.mark.parametrize(
    "tree",
    [
        {"nan": np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)},
        {"jax": jnp.arange(5, dtype=jnp.bfloat16), "scalar": 3, "zero_units": np.zeros((784, 0))},
        {"transposed": np.arange(6.0).reshape(2, 3).T, "strided": np.arange(10)[::2]},
        {"layers": {0: {"kernel": np.ones(2)}, 10: {}, 2: {"kernel": np.zeros(1)}}},
        ({"a.b": np.ones(1), "a": {"b": np.zeros(1)}}, [], (), None, [(np.ones(3),)]),
        {"several chunks": np.random.default_rng(0).random((3, 500, 300))},
        {
            "mlp/~/linear_0": {"w/": np.ones(1), "": np.zeros(2)},
            "mlp": {"~": {"linear_0": np.ones(3)}},
        },
        {str(i): np.full(1, i) for i in range(12)},
        np.ones(3),
    ],
    ids=lambda tree: type(tree).__name__ if not isinstance(tree, dict) else next(iter(tree)),
)
def test_round_trip(tmp_path, tree):
    checkpoints.save(tmp_path / "0001", item=tree)
    assert_same(checkpoints.load(tmp_path / "0001", "item"), tree)


@pytest.mark.parametrize("optimizer", [optax.adam(1e-3), optax.sgd(1e-3)])
def test_optimizer_state_needs_its_target(tmp_path, optimizer):
    state = optimizer.init({"w": jnp.full((2, 2), 3.0)})
    checkpoints.save(tmp_path / "0001", opt_state=state)
    target = jax.eval_shape(lambda: state)
    assert_same(checkpoints.load(tmp_path / "0001", "opt_state", target), state)
    with pytest.raises(ValueError, match="opt_state .* pass a target"):
        checkpoints.load(tmp_path / "0001", "opt_state")


def test_leaves_go_to_the_target_by_path(tmp_path):
    saved = OrderedDict(b=np.ones(1), a=np.zeros(1))
    checkpoints.save(tmp_path / "0001", item=saved)
    loaded = checkpoints.load(tmp_path / "0001", "item", OrderedDict(a=saved["a"], b=saved["b"]))
    assert loaded["a"] == 0 and loaded["b"] == 1


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (np.zeros((2, 4), np.float32), r"hidden_0/kernel is \['float32', \[2, 3\]\] here, but"),
        (np.zeros((2, 3), np.int32), r"but \['int32', \[2, 3\]\] in the target"),
        ({"w": np.zeros(2)}, "hidden_0/kernel is .* but absent in the target"),
    ],
)
def test_other_targets_are_refused(path, kernel, message):
    with pytest.raises(ValueError, match=message):
        checkpoints.load(path, "params", {"hidden_0": {"kernel": kernel}})


def test_what_is_on_disk(path):
    assert sorted(child.name for child in path.iterdir()) == ["manifest.json", "masks", "params"]
    assert [child.name for child in path.parent.iterdir()] == ["0001"]
    assert not list(path.rglob("*.pkl"))


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        ({"a/b": PARAMS}, ValueError, "must be an identifier, got 'a/b'"),
        ({"p": {"f": print}}, TypeError, "p/f must be of numbers or bools, got object"),
        ({"p": {"s": np.array(["x"])}}, TypeError, "p/s must be of numbers or bools, got <U1"),
        ({"p": {"k": jax.random.key(0)}}, TypeError, "p/k is a typed key: .*key_data"),
    ],
)
def test_what_cannot_be_saved(tmp_path, items, error, message):
    with pytest.raises(error, match=message):
        checkpoints.save(tmp_path / "0001", **items)
    assert os.listdir(tmp_path) == []


def test_what_is_there_is_replaced_and_stays_where_saving_fails(path):
    with pytest.raises(TypeError, match="must be of numbers or bools"):
        checkpoints.save(path, params={"s": np.array(["x"])})
    assert_same(checkpoints.load(path, "params"), PARAMS)
    checkpoints.save(path, params=MASKS)
    assert_same(checkpoints.load(path, "params"), MASKS)
    assert [path.name] == os.listdir(path.parent)
    checkpoints.remove(path)
    assert not list(path.parent.iterdir())
    checkpoints.save(path, params=MASKS)
    assert_same(checkpoints.load(path, "params"), MASKS)


def test_relative_paths_and_a_running_event_loop(path, monkeypatch):
    import asyncio

    monkeypatch.chdir(path.parent)

    async def in_a_notebook():
        checkpoints.save(Path("0002"), params=PARAMS)
        return checkpoints.load(Path("0002"), "params")

    assert_same(asyncio.run(in_a_notebook()), PARAMS)


def test_an_item_that_is_not_there(path):
    with pytest.raises(ValueError, match="0001 holds params, masks, but no opt_state"):
        checkpoints.load(path, "opt_state")


def files_of(path):
    return sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)


def test_a_flipped_bit_is_found_in_every_file(path):
    checkpoints.verify(path)
    tries = 0
    for file in files_of(path):
        good = file.read_bytes()
        for at in {0, len(good) - 1, *random.Random(0).choices(range(len(good)), k=3)}:
            bad = bytearray(good)
            bad[at] ^= 1 << (tries % 8)
            file.write_bytes(bad)
            with pytest.raises(CorruptCheckpoint, match=f"{file.name} is not what was saved"):
                checkpoints.verify(path)
            tries += 1
        file.write_bytes(good)
    assert tries >= 12 * 3
    checkpoints.verify(path)


def test_a_file_cut_or_lost_is_found(path):
    for file in files_of(path):
        good = file.read_bytes()
        for size in (0, len(good) // 2, len(good) - 1):
            file.write_bytes(good[:size])
            with pytest.raises(CorruptCheckpoint, match="is corrupt: .*is not what was saved"):
                checkpoints.verify(path)
        file.unlink()
        with pytest.raises(CorruptCheckpoint, match=f"{file.name}: No such file"):
            checkpoints.verify(path)
        file.write_bytes(good)
    checkpoints.verify(path)


def test_only_the_named_items_are_verified(path):
    shutil.rmtree(path / "masks")
    assert_same(checkpoints.load(path, "params"), PARAMS)
    with pytest.raises(CorruptCheckpoint) as caught:
        checkpoints.load(path, "masks")
    assert caught.value.path == path
    assert "masks/" in caught.value.reason and "\n" not in str(caught.value)


def test_drop_leaves_the_rest_even_when_killed(path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.drop(path, "masks")
    assert (path / "masks").exists() and list(checkpoints.verify(path)) == ["params"]
    checkpoints.drop(path, "masks")
    assert not (path / "masks").exists()
    assert_same(checkpoints.load(path, "params"), PARAMS)


KILLED = """
import os, pathlib, signal, sys, threading
import numpy as np
from jaxprune import checkpoints

folder, moment = pathlib.Path(sys.argv[1]), sys.argv[2]
checkpoints.save(folder / "0001", params=np.arange(10))

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def die_once_data_are_written():
    while not any(folder.glob("0002.tmp/params*/**/d/*")):
        pass
    die()

if moment == "writing":
    save = checkpoints.ocp.save
    def save_and_die(*args):
        threading.Thread(target=die_once_data_are_written).start()
        save(*args)
        die()
    checkpoints.ocp.save = save_and_die
elif moment == "renaming":
    rename = pathlib.Path.rename
    pathlib.Path.rename = lambda a, b: die() if a.name == "0002.tmp" else rename(a, b)
checkpoints.save(folder / "0002", params=np.random.default_rng(0).random(3_000_000))
"""


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_killed_while_saving(tmp_path, moment):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), moment], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "0002.tmp").exists()
    assert not (tmp_path / "0002").exists()
    checkpoints.verify(tmp_path / "0001")
    checkpoints.save(tmp_path / "0002", params=PARAMS)
    assert_same(checkpoints.load(tmp_path / "0002", "params"), PARAMS)
    assert not (tmp_path / "0002.tmp").exists()


def test_a_full_disk_is_found_before_anything_is_written(path, monkeypatch, capfd):
    usage = shutil.disk_usage(path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        OSError, match="No space left: .* may need 267,040 bytes of 100,000: .*0002"
    ):
        checkpoints.save(path.with_name("0002"), item=[np.ones(100)])
    assert os.listdir(path.parent) == ["0001"] and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("OUT_OF_RANGE:\na page" * 99), r"Errno 5\] Orbax: OUT_OF_RANGE: a page.*0002"),
        (RuntimeError("write: No space left on device"), r"Errno 28\] No space left: .*0002"),
        (OSError(errno.ENOSPC, "full"), r"Errno 28\] No space left: .*0002"),
    ],
)
def test_a_failed_write_is_told_in_a_line(path, monkeypatch, error, line):
    def fail(*_):
        raise error

    monkeypatch.setattr(checkpoints.ocp, "save", fail)
    with pytest.raises(OSError, match=line) as caught:
        checkpoints.save(path.with_name("0002"), item=np.ones(2))
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    assert os.listdir(path.parent) == ["0001"]


def test_folders_are_tried_before_anything_is_trained(tmp_path):
    for good in ("run", "a b/ü漢", "a%2Fb", "c:d?#'{}"):
        folder = tmp_path / good
        checkpoints.check_writable(folder)
        checkpoints.check_writable(folder)
        assert os.listdir(folder) == []
        checkpoints.save(folder / "0001", item=np.ones(2))
        assert_same(checkpoints.load(folder / "0001", "item"), np.ones(2))
    for bad in (os.fsdecode(b"x\xffy"), "a\\b", "gs:", os.fsdecode(b"\xff/run")):
        with pytest.raises(
            ValueError, match="cannot hold checkpoints: .* is not UTF-8, "
        ) as caught:
            checkpoints.check_writable(tmp_path / bad)
        str(caught.value).encode("ascii")
    assert sorted(os.listdir(tmp_path)) == ["a b", "a%2Fb", "c:d?#'{}", "run"]
    (tmp_path / "file").write_text("")
    for taken in ("file", "file/run"):
        with pytest.raises(OSError, match="Errno"):
            checkpoints.check_writable(tmp_path / taken)


def test_what_is_no_checkpoint_is_told_and_can_be_removed(path):
    for name in ("0002", "0003.tmp", ".abc.tmp"):
        path.with_name(name).write_text("")
    with pytest.raises(checkpoints.CorruptCheckpoint):
        checkpoints.verify(path.with_name("0002"))
    checkpoints.remove(path.with_name("0002"))
    checkpoints.save(path.with_name("0003"), params=PARAMS)
    assert sorted(os.listdir(path.parent)) == [".abc.tmp", "0001", "0003"]


def test_orbax_is_silent(path, caplog):
    checkpoints.save(path.with_name("0002"), item=[np.ones(2), jnp.ones(2)])
    checkpoints.load(path.with_name("0002"), "item")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_manifest_is_plain_json(path):
    digest, body = (path / "manifest.json").read_text().split("\n")
    assert len(digest) == 64
    assert json.loads(body)["params"]["leaves"] == [[["hidden_0", "kernel"], "float32", [2, 3]]]
    assert checkpoints.contents(path) == json.loads(body)


def test_the_levels_of_an_item(tmp_path):
    masks = {"a": np.ones((3, 2), bool), "b": np.ones((3,), bool)}
    checkpoints.save(tmp_path / "0001", masks=masks, one=np.zeros((1, 5)))
    assert checkpoints.num_levels(tmp_path / "0001", "masks") == 3
    assert checkpoints.num_levels(tmp_path / "0001", "one") == 1
