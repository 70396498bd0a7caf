"""The command: what a user types, and what is printed and left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxprune import results
from tests.test_data import idx

SWEEP = Path(__file__).parents[1] / "experiments" / "sweep.py"
SMALL = ("--hidden-sizes", "12", "10", "--batch-size", "32")


def sweep(*flags, **options):
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, SWEEP, *map(str, flags)], capture_output=True, text=True, timeout=300,
        env=environment(), **options,
    )  # fmt: skip


def environment():
    root = str(SWEEP.parents[1])
    return {**os.environ, "PYTHONPATH": root, "XLA_FLAGS": "", "COLUMNS": "100"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A data set that can be learnt: the class is where the bright pixels are."""
    folder, rng = tmp_path_factory.mktemp("idx"), np.random.default_rng(0)
    for name, size in (("train", 480), ("t10k", 120)):
        labels = np.arange(size, dtype=np.uint8) % 4
        images = rng.integers(0, 80, (size, 4, 4), np.uint8)
        images[np.arange(size), labels] += 100
        (folder / f"{name}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(idx(labels))
    return f"idx:{folder}"


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """A finished run, and what the command printed."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    return run_dir, sweep("--dataset", dataset, "--run-dir", run_dir, "--levels", 0, 50, 90, *SMALL)


def test_a_run_prints_its_table_and_leaves_rows_figures_and_networks(finished):
    run_dir, done = finished
    assert done.returncode == 0, done.stderr
    assert "one_shot (magnitude, layer), epoch 2, one seed" in done.stdout
    assert "trained (magnitude, layer), epoch 2, one seed" in done.stdout
    assert str(run_dir) in done.stdout and "Traceback" not in done.stderr
    names = {path.name for path in run_dir.iterdir()}
    assert names == {
        "config.json", "results.jsonl", "results.csv", "figures", "checkpoints", "lock",
    }  # fmt: skip
    figures = {path.stem for path in (run_dir / "figures").glob("*.png")}
    assert figures == {path.stem for path in (run_dir / "figures").glob("*.svg")}
    assert figures == {
        "k-sparsity-weight", "k-sparsity-unit", "weight-vs-unit", "epoch_training_weights",
        "epoch_training_units", "calibration-and-churn",
    }  # fmt: skip
    run = results.load_run(run_dir)
    assert len(run.rows) == 2 * 2 * 2 * 3 and run.rows == results.read_csv(run_dir / "results.csv")
    assert run.config["seconds"]["compilation"] > 0 and run.config["device"]["platform"] == "cpu"
    assert run.network("trained", "unit", 0, 90).masks["hidden_0"]["kernel"].shape == (16, 12)


def test_the_same_command_again_trains_nothing_and_prints_the_same_table(finished, dataset):
    run_dir, done = finished
    log = (run_dir / "results.jsonl").read_bytes()
    shutil.rmtree(run_dir / "figures")
    again = sweep("--dataset", dataset, "--run-dir", run_dir, "--levels", 0, 50, 90, *SMALL)
    assert again.returncode == 0, again.stderr
    assert (run_dir / "results.jsonl").read_bytes() == log
    assert again.stdout.split("\n\n")[1:-1] == done.stdout.split("\n\n")[1:-1]
    assert "images/s" not in again.stdout
    assert (run_dir / "figures" / "weight-vs-unit.png").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--levels", "0", "101"], ["levels", "[0, 100]", "101"]),
        (["--levels", "-1"], ["levels", "[0, 100]", "-1"]),
        (["--levels", "nan"], ["levels", "[0, 100]", "nan"]),
        (["--levels", "50", "50.0"], ["levels", "distinct", "50"]),
        (["--levels"], ["levels", "none"]),
        (["--levels", "0", "0.5", "0.9"], ["levels are in percent"]),
        (["--seeds", "0"], ["seeds", "at least 1", "0"]),
        (["--epochs", "0"], ["epochs", "at least 1", "0"]),
        (["--batch-size", "0"], ["batch_size", "at least 1", "0"]),
        (["--learning-rate", "nan"], ["learning_rate", "nan"]),
        (["--dataset", "cifar10"], ["fashion_mnist", "mnist", "idx:FOLDER", "cifar10"]),
        (["--preset", "slow"], ["quick", "challenge", "slow"]),
        (["--methods", "neuron"], ["weight", "unit", "neuron"]),
        (["--protocols", "never"], ["one_shot", "trained", "never"]),
        (["--speed", "3"], ["--speed"]),
    ],
)  # fmt: skip
def test_a_bad_flag_gets_one_message_and_exit_2(flags, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sweep.py", *flags])
    monkeypatch.setenv("COLUMNS", "300")
    from experiments import sweep as command

    with pytest.raises(SystemExit) as stopped:
        command.main()
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    for word in words:
        assert word in printed.out + printed.err
    assert not any(tmp_path.iterdir())


def test_a_bad_folder_data_set_or_run_directory_gets_one_line_and_exit_2(
    finished, dataset, tmp_path
):
    run_dir, _ = finished
    log = (run_dir / "results.jsonl").read_bytes()
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    small = ("--dataset", dataset, *SMALL)
    for flags, words in (
        (("--data-dir", tmp_path / "none"), ["none"]),
        (("--dataset", f"idx:{tmp_path / 'none'}"), ["none"]),
        ((*small, "--run-dir", run_dir, "--levels", 0, 70), ["levels", "50", "70"]),
        ((*small, "--run-dir", tmp_path / "file" / "run"), [str(tmp_path / "file")]),
        ((*small, "--run-dir", tmp_path / "other"), [str(tmp_path / "other")]),
        ((*small, "--run-dir", tmp_path / "run", "--batch-size", 441), ["[1, 440]", "441"]),
    ):
        done = sweep(*flags)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1
        for word in words:
            assert word in done.stderr
    assert (run_dir / "results.jsonl").read_bytes() == log
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_a_loss_that_is_not_finite_exits_1_and_a_layer_pruned_whole_is_noted(dataset, tmp_path):
    flags = ("--dataset", dataset, "--run-dir", tmp_path / "run", *SMALL)
    done = sweep(*flags, "--levels", 100, "--learning-rate", 1e30)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    for words in ("epoch 1", "seed 0", "level 0%"):
        assert words in done.stderr
    assert done.stdout.count("prunes every weight of hidden_0/kernel") == 1


def test_ctrl_c_exits_130_and_the_same_command_goes_on(dataset, tmp_path):
    flags = ["--dataset", dataset, "--run-dir", tmp_path / "run", *SMALL, "--epochs", 400]
    # What a shell starts in the background ignores Ctrl-C, and so would what the tests start.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, SWEEP, *map(str, flags)], env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    signal.signal(signal.SIGINT, handler)
    log = tmp_path / "run" / "results.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(error.splitlines()) == 1 and "goes on" in error
    rows = results.read_rows(log)
    assert rows and json.loads((tmp_path / "run" / "config.json").read_text())["seeds"] == 1
    assert {row.epoch for row in rows} == set(range(1, max(row.epoch for row in rows) + 1))


def test_help_explains_every_flag_before_jax_is_imported():
    code = f"""
import runpy, sys
sys.argv = ["sweep.py", "--help"]
try:
    runpy.run_path({str(SWEEP)!r}, run_name="__main__")
finally:
    print([name for name in ("jax", "flax", "optax", "matplotlib") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]"
    for flag in (
        "preset", "dataset", "data-dir", "levels", "seeds", "epochs", "methods", "protocols",
        "batch-size", "learning-rate", "hidden-sizes", "run-dir",
    ):  # fmt: skip
        assert f"--{flag}" in done.stdout
