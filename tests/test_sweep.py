"""The command: what a user types, and what is printed and left behind."""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from experiments import sweep
from jaxprune import figures, report, results
from jaxprune.config import Arm, Config
from jaxprune.data import splits
from tests.test_data import idx

SWEEP = Path(sweep.__file__)
SMALL = ("--hidden-sizes", 12, 10, "--batch-size", 32)
QUICK = (*SMALL, "--levels", 0, 50, "--epochs", 1, "--granularities", "weight")


class Done(NamedTuple):
    """What a command leaves a shell: its exit status and what it printed."""

    status: object
    out: str
    err: str


def command(*flags, encoding="utf-8", draw=False):
    """Run the command in this process; figures and report, which take the longest, if `draw`."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sweep.py", *map(str, flags)])
        patch.setattr(sys, "path", [*sys.path])
        patch.setenv("COLUMNS", "300")
        if not draw:
            patch.setattr(figures, "draw_figures", lambda *_, **__: {})
            patch.setattr(report, "write_report", lambda *_: None)
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            try:
                sweep.main()
            except SystemExit as stopped:
                status = stopped.code
    for stream in streams:
        stream.flush()
    return Done(status, *(stream.buffer.getvalue().decode(encoding) for stream in streams))


def refused(done, *words, status=2):
    """Assert that a command printed one line of error with these words."""
    assert done.status == status, done
    assert len(done.err.splitlines()) == 1, done.err
    assert [word for word in words if str(word) not in done.err] == [], done.err


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(SWEEP.parents[1]), "COLUMNS": "100", **more}


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


# A run that ends -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """The flags of a finished run, its folder, and what the command printed."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    flags = ("--dataset", dataset, "--run-dir", run_dir, "--levels", 0, 90, *SMALL)
    return flags, run_dir, command(*flags, draw=True)


def test_a_run_prints_its_tables_and_leaves_rows_figures_report_and_networks(finished):
    _, run_dir, done = finished
    assert (done.status, done.err) == (0, "")
    one_shot, trained = done.out.split("\n\n")[1:3]
    assert one_shot.startswith("one_shot, magnitude, layer, epoch 2, one seed")
    assert trained.startswith("trained, magnitude, layer, epoch 2, one seed")
    for words in ("weight", "unit", "accuracy %"):
        assert words in one_shot and words in trained
    assert "440 examples to train on, 40 to validate, 120 to test" in done.out
    assert f"report.html, results, checkpoints and figures are in {run_dir}" in done.out
    assert {path.name for path in run_dir.iterdir()} == {
        "config.json", "rows", "results.csv", "figures", "checkpoints", "report.html", "lock",
    }  # fmt: skip
    assert "<svg" in (run_dir / "report.html").read_text()
    drawn = {path.stem for path in (run_dir / "figures").glob("*.png")}
    assert "weight-vs-unit" in drawn
    assert drawn == {path.stem for path in (run_dir / "figures").glob("*.svg")}
    run = results.load_run(run_dir)
    assert len(run.arms) == 4 and len(run.rows) == 4 * 2 * 2
    assert run.rows == results.read_csv(run_dir / "results.csv")
    assert run.config["seconds"]["compilation"] > 0 and run.config["device"]["platform"] == "cpu"
    network = run.network(Arm("magnitude", "unit", "layer", "trained"), 0, 90)
    assert network.masks["hidden_0"]["kernel"].shape == (16, 12)


def test_the_same_command_again_trains_nothing_and_prints_the_same_tables(finished):
    flags, run_dir, done = finished
    rows = {path: path.read_bytes() for path in (run_dir / "rows").iterdir()}
    again = command(*flags)
    assert (again.status, again.err) == (0, "")
    assert again.out.split("\n\n")[1:-1] == done.out.split("\n\n")[1:-1]
    assert "nothing to run: 16 rows found" in again.out and "examples/s" not in again.out
    assert {path: path.read_bytes() for path in (run_dir / "rows").iterdir()} == rows


def test_a_preset_gives_defaults_to_the_other_flags(monkeypatch):
    for flags, expected in (
        ((), (2, 1)),
        (("--preset", "challenge"), (20, 3)),
        (("--preset=challenge", "--seeds", "2"), (20, 2)),
        (("--epochs", "5", "--preset", "challenge"), (5, 3)),
    ):
        monkeypatch.setattr(sys, "argv", ["sweep.py", *flags])
        config = sweep.read_flags()
        assert (config.epochs, config.seeds) == expected


def test_a_network_and_numbers_of_ones_own_where_stdout_takes_ascii_alone(own, tmp_path):
    x = np.random.default_rng(0).normal(size=(120, 3))
    np.savez(tmp_path / "line.npz", x_train=x, y_train=x[:, :1], x_test=x, y_test=x[:, :1])
    flags = ("--dataset", f"npz:{tmp_path / 'line.npz'}", "--network", "own:make", *QUICK,
             "--criteria", "own:square", "--run-dir", tmp_path / "run")  # fmt: skip
    done = command(*flags, "--batch-size", 10, "--protocols", "one_shot", encoding="ascii")
    assert (done.status, done.err) == (0, "")
    assert "one_shot, square, layer, epoch 1, one seed" in done.out
    assert "pruned % loss r2 remaining" in " ".join(done.out.split())
    assert "dense epoch 1/1 \\xb7 loss" in done.out
    run = results.load_run(tmp_path / "run")
    assert run.config["settings"]["task"] == "regression"
    assert run.config["settings"]["network"] == "own:make"


# Bad flags -----------------------------------------------------------------------------------


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
        (["--score-batch", "0"], ["score_batch", "at least 1", "0"]),
        (["--recalibrate", "-1"], ["recalibrate", "at least 0", "-1"]),
        (["--learning-rate", "nan"], ["learning_rate", "nan"]),
        (["--context", "1"], ["context", "at least 2", "1"]),
        (["--dataset", "cifar10"], ["fashion_mnist", "mnist", "idx:FOLDER", "cifar10"]),
        (["--granularities", "neuron"], ["weight", "unit", "neuron"]),
        (["--granularities", "unit", "unit"], ["distinct", "unit unit"]),
        (["--scopes", "network"], ["layer", "global", "network"]),
        (["--protocols", "never"], ["one_shot", "trained", "never"]),
        (["--criteria"], ["criteria", "none"]),
        (["--task", "translation"], ["classification, tokens, regression", "translation"]),
    ],
    ids=" ".join,
)
def test_a_bad_flag_gets_one_line_and_exit_2(flags, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused(command(*flags), *words)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--preset", "slow"], ["quick", "challenge", "slow"]),
        (["--seeds", "two"], ["--seeds", "two"]),
        (["--speed", "3"], ["--speed"]),
        (["--methods", "unit"], ["--methods"]),
    ],
    ids=" ".join,
)
def test_a_flag_that_is_none_gets_one_message_and_exit_2(flags, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = command(*flags)
    assert done.status == 2 and "Traceback" not in done.err
    assert [word for word in words if word not in done.out + done.err] == []
    assert not any(tmp_path.iterdir())


# Names and functions of one's own ------------------------------------------------------------

OWN = """
import jax
import jax.numpy as jnp
import jaxprune as jp
from jaxprune.networks import NETWORKS

not_callable = 3

def make(example):
    return NETWORKS["mlp"](example, hidden_sizes=(4,))

def make_nothing(example):
    return {}

def make_that_fails(example):
    return {}["kernel"]

def make_untraceable(example):
    net = NETWORKS["mlp"](example, hidden_sizes=(4,))
    return net._replace(apply=lambda params, state, x: float(x[0]))

def make_integer(example):
    net = NETWORKS["mlp"](example, hidden_sizes=(4,))
    def init(key):
        return {"net": net.init(key)[0], "steps": jnp.zeros((), jnp.int32)}
    apply = lambda params, x: net.apply(params["net"], {}, x)
    return jp.network(init, apply)

def make_growing(example):
    net = NETWORKS["mlp"](example, hidden_sizes=(4,))
    def train(params, state, x, key):
        return net.apply(params, state, x), {"mean": jnp.mean(x)}
    return net._replace(train=train)

def square(params):
    return jax.tree.map(jnp.square, params)

def other_tree(params):
    return list(jax.tree.leaves(params))

def two_arguments(params, batch):
    return params

def nan(params):
    return jax.tree.map(lambda w: w * jnp.nan, params)

def nan_once_pruned(params):
    pruned = jnp.any(jnp.array([jnp.any(w == 0) for w in jax.tree.leaves(params)]))
    return jax.tree.map(lambda w: jnp.where(pruned, jnp.nan, jnp.abs(w)), params)

def of_values(params):
    return jax.tree.map(lambda w: w if float(w.sum()) > 0 else -w, params)

def nothing(params):
    jax.tree.map(jnp.square, params)

def leaves(params):
    raise SystemExit("too small")

def square_of_two(a, b):
    return a, b

def integer_loss(outputs, targets):
    return targets

def loss_that_fails(outputs, targets):
    return {}["logits"]

def wide_loss(outputs, targets):
    return outputs

def nan_loss(outputs, targets):
    return jnp.sum(outputs, axis=1) * jnp.nan
"""


def place(code):
    """Return where some code of one's own stands, as a message has it."""
    return f"own.py:{OWN[: OWN.index(code)].count(chr(10)) + 1}:"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Be in a folder with modules of one's own."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "own.py").write_text(OWN)
    (folder / "broken.py").write_text("import no_such_module\n")
    (folder / "torn.py").write_text("def scores(:\n")
    monkeypatch.chdir(folder)
    yield folder
    for name in ("own", "broken", "torn"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--criteria size", ["magnitude, l1, random, synflow", "or module:function", "size"]),
        ("--criteria nowhere:f", ["nowhere:f", "No module named 'nowhere'"]),
        ("--criteria broken:f", ["broken:f", "No module named 'no_such_module'"]),
        ("--criteria torn:scores", ["torn:scores", "SyntaxError"]),
        ("--criteria own:none", ["own:none", "own has no 'none'"]),
        ("--criteria own:not_callable", ["own:not_callable", "int"]),
        ("--criteria own:two_arguments", ["(params, problem, batch)", "two_arguments"]),
        ("--criteria own:other_tree", ["criterion other_tree", "scores", "hidden_0/kernel"]),
        ("--criteria own:of_values", [f"{place('float(w.s')} criterion of_values cannot be"]),
        ("--criteria own:nothing", ["criterion nothing: it returns None"]),
        ("--criteria own:leaves", [f"{place('raise SystemExit')} SystemExit: too small"]),
        ("--criteria own:square own:square", ["two criteria are named 'square'"]),
        ("--network vgg", ["mlp, convnet, resnet20, transformer", "vgg"]),
        ("--network own:none", ["own:none", "own has no 'none'"]),
        ("--network own:make_nothing", ["own:make_nothing must return a Network", "dict"]),
        ("--network own:make_that_fails", ["own.py:16: KeyError: 'kernel'"]),
        ("--network own:make_untraceable",
         [f"{place('float(x[0])')} the network cannot take train x", "(440, 4, 4): TypeError"]),
        ("--network own:square_of_two", ["own:square_of_two", "make(example)", "'b'"]),
        ("--network own:make_growing", ["state changes its tree in training", "'mean'"]),
        ("--network transformer", ["transformer takes tokens", "float32 (2, 4, 4)"]),
        ("--task nowhere:f", ["nowhere:f", "No module named 'nowhere'"]),
        ("--task own:wide_loss", ["the loss must be floats of shape (2,)", "(2, 4)", "(440,)"]),
        ("--task own:integer_loss", ["floats of shape (2,)", "got int32 (2,)"]),
        ("--task own:loss_that_fails", [f"{place('logits')} train: the loss fails: KeyError: "]),
        ("--task regression", ["outputs of a batch are (2, 4)", "targets int32 (440,)"]),
        ("--task tokens", ["outputs of a batch are (2, 4)", "targets int32 (440,)"]),
        ("--batch-size 441", ["[1, 440]", "441"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_gets_one_line_and_exit_2(own, dataset, tmp_path, flags, words):
    done = command("--dataset", dataset, *QUICK, "--run-dir", tmp_path / "run", *flags.split())
    refused(done, *words)
    assert not (tmp_path / "run").exists()


def test_a_gradient_criterion_for_integer_leaves_exits_1(own, dataset, tmp_path):
    flags = ("--dataset", dataset, *QUICK, "--run-dir", tmp_path / "run")
    done = command(*flags, "--network", "own:make_integer", "--criteria", "saliency")
    refused(done, "gradient criterion", "integer leaves", "'steps' is int32", status=1)
    done = command(*flags, "--network", "own:make_integer")
    refused(done, "'steps'", "int32", "cannot be trained", status=1)
    assert not (tmp_path / "run").exists()


# What is not finite --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("criterion", "epoch", "rows"),
    [("nan", 1, 0), ("nan_once_pruned", 2, 2 * 2 + 3)],
)
def test_scores_that_are_not_finite_exit_1_and_rows_before_stay(
    own, dataset, tmp_path, criterion, epoch, rows
):
    flags = ("--dataset", dataset, *QUICK, "--run-dir", tmp_path / "run", "--epochs", 2)
    done = command(*flags, "--criteria", f"own:{criterion}")
    words = (f"criterion {criterion}", "'hidden_0/kernel'", f"epoch {epoch}", "seed 0")
    refused(done, *words, f"{rows} rows are kept" if rows else "", status=1)
    assert ("kept" in done.err) == bool(rows)
    assert len(results.load_run(tmp_path / "run").rows) == rows


def test_a_criterion_that_fails_loses_no_row_of_another_and_may_be_mended(own, dataset, tmp_path):
    flags = ("--dataset", dataset, *QUICK, "--run-dir", tmp_path / "run")
    refused(command(*flags, "--criteria", "magnitude", "own:nan"), "2 rows are kept", status=1)
    before = results.load_run(tmp_path / "run")
    assert {row.criterion for row in before.rows} == {"magnitude"}
    # What is not asked for any more is forgotten.
    copy = shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert command(*flags[:-1], copy, "--criteria", "magnitude").status == 0
    assert {arm.criterion for arm in results.load_run(copy).arms} == {"magnitude"}
    (own / "own.py").write_text(OWN.replace("w * jnp.nan", "jnp.square(w)"))
    del sys.modules["own"]
    done = command(*flags, "--criteria", "magnitude", "own:nan")
    assert (done.status, done.err) == (0, "")
    run = results.load_run(tmp_path / "run")
    assert len(run.rows) == 8 and [row for row in run.rows if row in before.rows] == before.rows


@pytest.mark.filterwarnings("always:.*prunes every weight")
def test_a_loss_that_is_not_finite_exits_1_and_a_layer_pruned_whole_is_noted(dataset, tmp_path):
    flags = ("--dataset", dataset, "--run-dir", tmp_path / "run", *QUICK)
    done = command(*flags, "--levels", 100, "--learning-rate", 1e30)
    refused(done, "epoch 1", "seed 0", "level 0%", "smaller learning rate", status=1)
    assert "kept" not in done.err
    assert done.out.count("prunes every weight of hidden_0/kernel") == 1
    # As long as nothing has been written, the same folder takes other settings.
    assert command(*flags, "--learning-rate", 1e-3).status == 0


def test_a_level_whose_loss_is_not_finite_is_in_the_table_and_exits_1(own, dataset, tmp_path):
    flags = ("--dataset", dataset, "--run-dir", tmp_path / "run", *QUICK)
    refused(command(*flags, "--task", "own:nan_loss"), "not finite", "epoch 1", status=1)


# Data ----------------------------------------------------------------------------------------


def cut_npz(folder):
    np.savez(folder / "d.npz", x_train=np.ones((60, 3)), y_train=np.arange(60) % 2,
             x_test=np.ones((20, 3)), y_test=np.arange(20) % 2)  # fmt: skip
    (folder / "d.npz").write_bytes((folder / "d.npz").read_bytes()[:-100])
    return f"npz:{folder / 'd.npz'}"


def npz_of_one_class(folder):
    x = np.ones((60, 3))
    np.savez(folder / "d.npz", x_train=x, y_train=np.zeros(60, int), x_test=x,
             y_test=np.zeros(60, int))  # fmt: skip
    return f"npz:{folder / 'd.npz'}"


def images_of_two_sizes(folder):
    for part in ("train", "test"):
        for label in "ab":
            for i in range(4):
                path = folder / "images" / part / label / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                size = (5, 4) if (part, label, i) == ("test", "b", 3) else (4, 4)
                Image.fromarray(np.zeros(size, np.uint8)).save(path)
    return f"folder:{folder / 'images'}"


def empty(kind, name):
    def make(folder):
        (folder / name).write_bytes(b"")
        return f"{kind}:{folder / name}"

    return make


def text(content):
    def make(folder):
        (folder / "d.txt").write_text(content)
        return f"text:{folder / 'd.txt'}"

    return make


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (cut_npz, ["d.npz: not an npz archive, or cut short"]),
        (empty("npz", "d.npz"), ["d.npz: not an npz archive, or cut short"]),
        (npz_of_one_class, ["d.npz: y_train", "one class only, 0"]),
        (images_of_two_sizes, ["test/b/3.png", "4 x 5 pixels", "4 x 4 pixels", "train/a/0.png"]),
        (lambda folder: f"folder:{folder}", ["train", "No such file"]),
        (empty("text", "d.txt"), ["d.txt", "0 characters"]),
        (text("a" * 5000), ["d.txt", "one token only"]),
        (lambda folder: f"text:{folder / 'none.txt'}", ["none.txt", "No such file"]),
        (lambda folder: f"idx:{folder / 'none'}", ["none", "No such file"]),
        (lambda folder: "tfds:none", ["none: no such folder", "TFDS_DATA_DIR"]),
    ],
)
def test_bad_data_gets_one_line_with_file_and_reason_and_exit_2(make, words, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    done = command("--dataset", make(tmp_path), "--run-dir", tmp_path / "run", *QUICK)
    refused(done, *words)
    assert not (tmp_path / "run").exists()


def test_data_larger_than_memory_exit_2_before_they_are_read(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "free_memory", lambda: 1000)
    for given in (dataset, text("ab" * 5000)(tmp_path)):
        done = command("--dataset", given, "--run-dir", tmp_path / "run", *QUICK)
        refused(done, given.partition(":")[2], "needs 0.0 GB of memory")


# The run directory ---------------------------------------------------------------------------


def written(*folders):
    """Return when each file was written last."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in files if path.name != "lock"}


def test_a_run_made_otherwise_is_refused_and_nothing_is_overwritten(
    finished, own, dataset, tmp_path
):
    flags, run_dir, _ = finished
    run_own = ("--dataset", dataset, *QUICK, "--run-dir", tmp_path / "run", "--criteria",
               "own:square", "--protocols", "one_shot")  # fmt: skip
    assert command(*run_own).status == 0
    (own / "own.py").write_text(OWN.replace("jnp.square", "jnp.abs"))
    importlib.invalidate_caches()
    sys.modules.pop("own")
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps({"settings": {"epochs": 2}}))
    before = written(run_dir, tmp_path)
    small = ("--dataset", dataset, *QUICK, "--run-dir")
    for given, words in (
        (run_own, ["the code of criterion square", "run made otherwise"]),
        ((*flags, "--learning-rate", 0.1), ["learning_rate: 0.001 in the run, 0.1 now"]),
        ((*flags, "--score-batch", 9), ["score_batch: 512 in the run, 9 now"]),
        ((*flags, "--task", "own:nan_loss"), ["task: classification in the run, own:nan_loss now"]),
        ((*small, tmp_path / "file" / "run"), [tmp_path / "file"]),
        ((*small, tmp_path / "other"), [tmp_path / "other", "holds no run"]),
        ((*small, tmp_path / "old"), ["config.json is of format 1", "reads format 2"]),
    ):
        refused(command(*given), *words)
    assert written(run_dir, tmp_path) == before


def test_ctrl_c_exits_130_and_the_same_command_goes_on(dataset, tmp_path):
    flags = ("--dataset", dataset, "--run-dir", tmp_path / "run", *QUICK, "--epochs", 16,
             "--protocols", "one_shot")  # fmt: skip
    # What a shell starts in the background ignores Ctrl-C, and so would what the tests start.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, SWEEP, *map(str, flags)], env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    signal.signal(signal.SIGINT, handler)
    log = tmp_path / "run" / "rows" / "magnitude-weight-layer-one_shot-seed0.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert len(error.splitlines()) == 1 and "goes on" in error
    before = log.read_bytes()
    assert 2 <= len(before.splitlines()) < 32
    assert command(*flags).status == 0
    assert log.read_bytes().startswith(before) and len(log.read_bytes().splitlines()) == 32


def test_help_explains_every_flag_before_jax_is_imported():
    code = f"""
import runpy, sys
sys.argv = ["sweep.py", "--help"]
try:
    runpy.run_path({str(SWEEP)!r}, run_name="__main__")
finally:
    print([name for name in ("jax", "flax", "optax", "matplotlib") if name in sys.modules])
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True,
        env=environment(PYTHONIOENCODING="ascii"),
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = done.stdout.decode("ascii")
    assert done.returncode == 0 and shown.splitlines()[-1] == "[]"
    seconds = sum(after[:2]) - sum(before[:2])  # of the processor, whatever else runs
    assert seconds < 0.6
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in shown
