"""A study that is stopped, killed, damaged, extended or given otherwise; also run as a script."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import checkpoints, networks, results
from jaxprune.config import NotFinite
from jaxprune.study import dense
from jaxprune.study.epoch import keys_of
from tests.studies import (
    apply,
    arm,
    assert_same_rows,
    init,
    make_data,
    pick,
    sweep,
)

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def full(finished_study):
    """A finished run of two seeds: its folder and its rows."""
    return finished_study[:2]


class Interrupted:
    """A report that raises KeyboardInterrupt at the n-th call in a stage and epoch."""

    def __init__(self, granularity, epoch, n=1):
        self.place, self.left = (granularity, epoch), n

    def __call__(self, what):
        if isinstance(what, str):
            return
        self.left -= (what.arm and what.arm.granularity, what.epoch) == self.place
        if self.left == 0:
            raise KeyboardInterrupt


def checkpoints_of(folder):
    return {f"{p.parent.name}/{p.name}" for p in (folder / "checkpoints").glob("*/*")}


def epochs_in(folder):
    return {row.epoch for row in jp.load_run(folder).rows}


@pytest.fixture
def unsaved(monkeypatch):
    """Return a function that makes the next save of a checkpoint an interruption."""

    def prepare(name):
        save = checkpoints.save

        def interrupted(path, /, **items):
            if f"{path.parent.name}/{path.name}" == name:
                monkeypatch.setattr(checkpoints, "save", save)
                raise KeyboardInterrupt
            return save(path, **items)

        monkeypatch.setattr(checkpoints, "save", interrupted)

    return prepare


def test_resumed_is_uninterrupted_and_seeds_may_grow(full, tmp_path, unsaved):
    _, expected = full
    folder, weight = tmp_path / "run", arm("trained", "weight").slug

    def stop(*place):
        with pytest.raises(KeyboardInterrupt):
            sweep(folder, report=Interrupted(*place))

    stop(None, 2)
    assert epochs_in(folder) == {1}
    unsaved("dense-seed0/0003")  # its rows are written, its state is not
    with pytest.raises(KeyboardInterrupt):
        sweep(folder)
    assert epochs_in(folder) == {1, 2, 3}
    with (folder / "rows" / f"{arm('one_shot', 'unit').slug}-seed0.jsonl").open("a") as file:
        file.write('{"protocol": "one_sh')
    stop("weight", 3, 4)  # between two updates of the masks
    assert len(jp.load_run(folder).rows) == 5 * (2 * 3 + 2) + 2 * 2 * 2
    stop("weight", 5)
    masks = [checkpoints.load(folder / f"checkpoints/{weight}-seed0/000{e}", "masks")
             for e in (3, 4)]  # fmt: skip
    unsaved(f"{arm('trained', 'unit').slug}-seed0/0004")
    with pytest.raises(KeyboardInterrupt):
        sweep(folder)
    seen = []
    rows = sweep(folder, report=seen.append)
    assert {(p.arm.granularity, p.epoch) for p in seen} == {("unit", 4), ("unit", 5)}
    assert_same_rows(rows, pick(expected, seed=0))
    masks.append(checkpoints.load(folder / f"checkpoints/{weight}-seed0/0005", "masks"))
    for earlier, later in itertools.pairwise(masks):
        for before, after in zip(*map(jax.tree.leaves, (earlier, later)), strict=True):
            assert (before | ~after).all()
    assert jax.tree.map(np.sum, masks[0]) != jax.tree.map(np.sum, masks[1])

    grown = sweep(folder, seeds=2)
    assert_same_rows(grown, expected)
    assert grown[: len(rows)] == rows  # what was there was not computed again
    assert results.read_config(folder / "config.json")["seeds"] == 2


def test_a_finished_run_trains_nothing_and_says_so(full):
    folder, expected = full
    files = sorted((folder / "rows").iterdir())
    before = [file.read_bytes() for file in files], checkpoints_of(folder)
    told = []
    assert sweep(folder, seeds=2, report=told.append) == expected
    # Fewer seeds, arms or levels than are there take nothing away.
    assert sweep(folder, levels=(0.0, 50.0), granularities=("unit",)) == expected
    assert told == [f"nothing to run: {len(expected)} rows found"]
    assert ([file.read_bytes() for file in files], checkpoints_of(folder)) == before
    assert results.read_config(folder / "config.json")["seeds"] == 2


@pytest.mark.parametrize("last", ["one_shot", pytest.param("trained", marks=pytest.mark.slow)])
def test_arms_and_levels_are_added_to_a_finished_run(full, tmp_path, last):
    both = tuple(dict.fromkeys(("one_shot", last)))
    expected = [row for row in full[1] if row.seed == 0 and row.protocol in both]
    folder, added = tmp_path / "run", (0.0, 25.0, 75.0)
    first = sweep(folder, granularities=("weight",), protocols=(last,))
    assert_same_rows(first, pick(expected, granularity="weight", protocol=last))
    more = sweep(folder, protocols=both, levels=added)
    others = [row for row in sweep(protocols=both, levels=added) if row.target_sparsity]
    assert_same_rows(more, [*expected, *others])
    assert set(map(repr, first)) <= set(map(repr, more))  # times and all: not computed again
    run = jp.load_run(folder)
    assert run.config["levels"] == [[0.0, 50.0, 90.0], [25.0, 75.0]]
    for of, level in itertools.product(run.arms, (0.0, 50.0, 90.0, 25.0, 75.0)):
        masks = run.network(of, 0, level).masks
        [row] = [r for r in more if (r.arm, r.epoch, r.target_sparsity) == (of, 5, level / 100)]
        assert jp.sparsity_of(masks, prunable=lambda path, _: "hidden" in path) == row.sparsity
    assert sweep(folder, protocols=both, levels=(0.0, 90.0, 25.0)) == more


def test_an_added_arm_is_told_of_every_seed_and_computed_alone(tmp_path, monkeypatch):
    folder, notes, computed = tmp_path / "run", [], []
    small = {"protocols": ("one_shot",), "epochs": 2, "seeds": 2}
    first = sweep(folder, granularities=("weight",), **small)
    one_shot = dense._one_shot

    def counted(running, stage, *rest):
        computed.append((stage.arm.granularity, stage.seed))
        return one_shot(running, stage, *rest)

    monkeypatch.setattr(dense, "_one_shot", counted)
    more = sweep(folder, granularities=("weight", "unit"), report=notes.append, **small)
    assert computed == [("unit", seed) for seed in (0, 0, 1, 1)]
    assert [note for note in notes if isinstance(note, str)] == [
        f"dense-seed{seed} runs again from epoch 1 on: it lacks rows from epoch 1 on"
        for seed in (0, 1)
    ]
    assert [note.done for note in notes if not isinstance(note, str)][-1] == 1
    assert set(map(repr, first)) <= set(map(repr, more))
    assert_same_rows(more, sweep(**small))


def test_checkpoints_are_thinned_out(full):
    folder, _ = full
    found = checkpoints_of(folder)
    unit = arm("trained", "unit").slug
    arms = [arm(p, g).slug for p in ("one_shot", "trained") for g in ("weight", "unit")]
    last = {f"{stage}-seed{seed}/0005" for seed in (0, 1) for stage in ("dense", *arms)}
    assert last < found and len(found) == len(last) + 1
    whole = {
        name for name in found if "opt_state" in checkpoints.verify(folder / "checkpoints" / name)
    }
    assert whole == {f"{unit}-seed1/0004", f"{unit}-seed1/0005"}


def flip(path, name):
    """Flip a bit in the largest file of an item."""
    file = max((path / name).rglob("*"), key=lambda file: file.is_file() and file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("stage", "item"),
    [
        ("magnitude-unit-layer-trained-seed1", "params"),
        pytest.param("magnitude-unit-layer-one_shot-seed1", "masks", marks=pytest.mark.slow),
        pytest.param("dense-seed1", "params", marks=pytest.mark.slow),
    ],
)
def test_a_corrupt_checkpoint_is_noted_and_computed_again(full, tmp_path, stage, item):
    folder, expected = full
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    flip(copy / "checkpoints" / stage / "0005", item)
    notes = []
    rows = sweep(copy, seeds=2, report=notes.append)
    assert "is corrupt" in notes[0] and f"{stage}/0005" in notes[0]
    assert rows == expected  # in order too
    checkpoints.verify(copy / "checkpoints" / stage / "0005")


@pytest.mark.parametrize(
    "damage",
    [
        "bit flipped",
        "end cut off",
        pytest.param("line lost", marks=pytest.mark.slow),
        pytest.param("row of another", marks=pytest.mark.slow),
    ],
)
def test_damaged_rows_are_noted_and_computed_again(full, tmp_path, damage):
    folder, expected = full
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    log = copy / "rows" / f"{arm('trained', 'unit').slug}-seed1.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    if damage == "line lost":
        del lines[10]
    elif damage == "bit flipped":
        lines[10] = lines[10].replace(b"0.9", b"0.8", 1)
    elif damage == "end cut off":
        lines[-1] = lines[-1][:-20]
    else:
        other = copy / "rows" / f"{arm('trained', 'unit').slug}-seed0.jsonl"
        lines[10] = other.read_bytes().splitlines(keepends=True)[10]
    log.write_bytes(b"".join(lines))
    if damage != "end cut off":
        with pytest.raises(ValueError, match="line 11"):
            jp.load_run(copy)
    notes = []
    assert_same_rows(sweep(copy, seeds=2, report=notes.append), expected)
    assert log.name in notes[0] and "computed again" in notes[0]
    assert_same_rows(jp.load_run(copy).rows, expected)


def by_square(params):
    return jax.tree.map(jnp.square, params)


def named(f, name):
    f.__name__ = name
    return f


ONE_SHOT = {"epochs": 1, "protocols": ("one_shot",)}
MINUS = named(lambda params: jax.tree.map(lambda w: -jnp.abs(w), params), "by_square")


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory):
    """The folder of a finished run of one epoch, and its settings."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    settings = {"criteria": (by_square,), **ONE_SHOT}
    sweep(folder, **settings)
    return folder, settings


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": 4}, ["epochs", "1", "4"]),
        ({"batch_size": 64}, ["batch_size", "32", "64"]),
        ({"score_batch": 64}, ["score_batch", "512", "64"]),
        ({"settings": {"learning_rate": 0.1}}, ["learning_rate", "0.1"]),
        ({"data": make_data(seed=1)}, ["data_sha256"]),
        ({"optimizer": optax.adam(0.1)}, ["network, loss or optimizer"]),
        ({"network": networks.network(init, lambda p, x: 2 * apply(p, x))}, ["network, loss"]),
        (
            {"network": networks.network(lambda k: jax.tree.map(lambda w: 2 * w, init(k)), apply)},
            ["network, loss"],
        ),
        ({"task": jp.own_loss(lambda outputs, y: jnp.sum(outputs**2, axis=1))}, ["task"]),
        (
            {"criteria": (jp.criterion(by_square, settings={"power": 2}),)},
            ["by_square, power: None in the run, 2 now"],
        ),
        ({"criteria": (MINUS,)}, ["the code of criterion by_square"]),
        ({"criteria": (MINUS,), "seeds": 2}, ["the code of criterion by_square"]),
    ],
    ids=", ".join,
)
def test_a_run_made_otherwise_is_refused_by_name(one_epoch, change, words):
    folder, settings = one_epoch
    before = {path: path.read_bytes() for path in folder.rglob("*.json*")}
    with pytest.raises(ValueError, match="holds a run made otherwise") as error:
        sweep(folder, **{**settings, **change})
    message = str(error.value)
    assert all(word in message for word in [str(folder), *words]), message
    assert {path: path.read_bytes() for path in folder.rglob("*.json*")} == before


def test_settings_are_compared_as_json_gives_them_back(tmp_path):
    settings = {"sizes": (np.int64(3), 4), "limit": float("nan"), "place": Path("a"), 3: "three"}
    first = sweep(tmp_path / "run", settings=settings, **ONE_SHOT)
    assert sweep(tmp_path / "run", settings=settings, **ONE_SHOT) == first
    with pytest.raises(ValueError, match="settings may not hold 'epochs'"):
        sweep(tmp_path / "run", settings={"epochs": 3}, **ONE_SHOT)
    with pytest.raises(TypeError, match="settings.what must be what JSON can hold, got set"):
        sweep(tmp_path / "run", settings={"what": {1, 2}}, **ONE_SHOT)


def test_with_another_jax_other_code_is_a_note(tmp_path):
    folder, notes = tmp_path / "run", []
    sweep(folder, **ONE_SHOT)
    config = json.loads((folder / "config.json").read_text())
    config["versions"]["jax"], config["identity"] = "0.9.9", "of another program"
    (folder / "config.json").write_text(json.dumps(config))
    sweep(folder, report=notes.append, **ONE_SHOT)
    assert any("recorded with another jax" in str(note) for note in notes)
    assert any("jax 0.9.9 then" in str(note) for note in notes)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no run"):
        sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_a_kill_left_half_done_is_swept_up_and_folders_of_others_stay(full, tmp_path):
    folder, expected = full
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    (copy / ".0123.tmp").write_text("half")
    (copy / ".abc.tmp").mkdir()
    assert sweep(copy, seeds=2) == expected
    assert not (copy / ".0123.tmp").exists() and (copy / ".abc.tmp").is_dir()


def test_a_diverged_seed_keeps_the_rows_of_those_before(full, tmp_path):
    folder, expected = full
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    config = json.loads((copy / "config.json").read_text())
    config["versions"]["jax"] = "0.9.9"  # so that another optimizer is a note
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotFinite, match="not finite at epoch 1, level 0%, seed 2"):
        sweep(copy, seeds=3, optimizer=optax.sgd(1e30))
    assert jp.load_run(copy).rows == expected


def test_when_one_dense_network_diverges_the_other_seeds_go_on(tmp_path):
    def of_nans(key):
        data = jax.random.key_data
        bad = jnp.all(data(key) == data(keys_of(1).init))
        return jax.tree.map(lambda w: jnp.where(bad, jnp.nan, w), init(key))

    folder, notes, study = tmp_path / "run", [], {"epochs": 1, "protocols": ("one_shot",)}
    with pytest.raises(NotFinite, match="not finite at epoch 1, level 0%, seed 1 .dense."):
        sweep(folder, networks.network(of_nans, apply), seeds=3, report=notes.append, **study)
    assert any("seed 1 (dense)" in str(n) and "the other seeds go on" in str(n) for n in notes)
    rows = jp.load_run(folder).rows
    assert {row.seed for row in rows} == {0, 2} and not any(row.diverged for row in rows)


# kill -9


def run_child(folder, *seconds):
    return subprocess.Popen(
        [sys.executable, __file__, str(folder), *map(str, seconds)], stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip


@pytest.mark.slow
def test_killed_at_random_moments(full, tmp_path):
    _, expected = full
    folder, kills = tmp_path / "run", 0
    for seconds in (random.uniform(0, 1), random.uniform(0.5, 2)):
        child = run_child(folder, seconds)
        _, errors = child.communicate(timeout=120)
        assert child.returncode in (0, -signal.SIGKILL), errors.decode()
        kills += child.returncode != 0
    assert kills
    assert_same_rows(sweep(folder), pick(expected, seed=0))


@pytest.mark.slow
def test_the_command_killed_at_ten_random_moments(fashion_mnist, tmp_path):
    errors = tmp_path / "errors.txt"

    def command(folder):
        flags = "--hidden-sizes 64 32 --levels 0 50 90 --epochs 4 --run-dir".split()
        with errors.open("w") as file:
            return subprocess.Popen(
                [sys.executable, REPOSITORY / "experiments" / "sweep.py", *flags, folder],
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
                stdout=subprocess.DEVNULL, stderr=file,
            )  # fmt: skip

    started = time.monotonic()
    assert command(tmp_path / "whole").wait(timeout=600) == 0, errors.read_text()
    duration = time.monotonic() - started
    expected = jp.load_run(tmp_path / "whole").rows
    assert len(expected) == 2 * 2 * 4 * 3
    kills = 0
    for run in itertools.count():  # as many runs as it takes
        before = kills
        while True:
            started, process = time.monotonic(), command(tmp_path / f"{run}")
            try:
                status = process.wait(random.uniform(0, duration) if kills < 10 else 600)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
        assert status == 0, errors.read_text()
        assert_same_rows(jp.load_run(tmp_path / f"{run}").rows, expected)
        if kills >= 10:
            return
        if kills == before:  # it ended too soon to be killed
            duration = min(duration, time.monotonic() - started)


def main(folder, seconds):
    """Sweep, and kill this process some seconds after the first call of training."""

    def start(_):
        nonlocal started
        if not started:
            timer.start()
        started = True

    started = False
    timer = threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    sweep(folder, report=start)
    timer.cancel()


if __name__ == "__main__":
    main(*sys.argv[1:])


def test_another_network_does_not_accuse_the_criterion(tmp_path):
    folder = tmp_path / "run"
    sweep(folder, settings={"sizes": 1}, **ONE_SHOT)
    config = json.loads((folder / "config.json").read_text())
    for entry in config["arms"]:
        entry["identity"] = "of other shapes"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="sizes") as error:
        sweep(folder, settings={"sizes": 2}, **ONE_SHOT)
    assert "the code of criterion" not in str(error.value)


def test_all_commands_that_made_a_run_are_kept(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    for more in ([], ["--seeds", "2"], []):
        monkeypatch.setattr(sys, "argv", ["sweep.py", *more])
        sweep(folder, seeds=1 + bool(more), **ONE_SHOT)
    run = results.load_run(folder)
    assert (run.config["command"], run.config["later_commands"]) == (
        ["sweep.py"], [["sweep.py", "--seeds", "2"]],
    )  # fmt: skip
    jp.write_report(run, None, tmp_path / "report.html")
    assert "sweep.py, then sweep.py --seeds 2" in (tmp_path / "report.html").read_text()
