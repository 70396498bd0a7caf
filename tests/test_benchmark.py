"""The benchmark: what it counts, prints and checks; that it runs, but nothing about time."""

import json
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark
from experiments.results_page import speed_section
from jaxprune import report
from jaxprune.data import Data, Split

FAKE_WORKER = """
import json, sys
import numpy as np

inputs = dict(np.load(sys.argv[2]))
for line in sys.stdin:
    request = json.loads(line)
    answer = {"seconds": 2.0}
    if request["op"] == "loss":
        x, y = inputs["x"][: request["examples"]], inputs["y"][: request["examples"]]
        for i in range(2):
            x = np.maximum(x, 0) @ inputs[f"kernel_{i}"].astype(float)
        answer = {"loss": np.mean(np.log(np.exp(x).sum(1)) - x[np.arange(len(y)), y])}
    if request["op"] == "stop":
        break
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="module", autouse=True)
def levels() -> Iterator[None]:
    """Few, since every level without its units is programs of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark.config, "LEVELS", (0.0, 50.0, 90.0))
        patch.setattr(benchmark, "COMPACT_GOALS", {50.0: 2.5, 90.0: 15})
        yield


@pytest.fixture(scope="module")
def small(fashion_mnist: Data) -> Data:
    """A few real images, enough for ten steps."""
    pairs = zip(fashion_mnist, (1280, 100, 150), strict=True)
    return Data(*(Split(split.x[:n], split.y[:n]) for split, n in pairs))


@pytest.fixture(scope="module")
def bench(small: Data, levels: None) -> benchmark.Benchmark:
    return benchmark.Benchmark(small, 2, (20,), 50)


def fake_worker(folder: Path) -> str:
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n{FAKE_WORKER}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_macs_of_the_challenge():
    sizes = (784, 1000, 1000, 500, 200, 10)
    forward = 784_000 + 1_000_000 + 500_000 + 100_000 + 2_000
    assert benchmark.macs(sizes, training=False) == forward == 2_386_000
    # Weights' gradients cost as much again, inputs' too but for the images'.
    assert benchmark.macs(sizes, training=True) == forward + forward + (forward - 784_000)
    assert benchmark.macs((3, 2), training=True) == 12


def test_masks_by_argsort():
    kernel = np.array([[1.0, -1.0, 3.0], [-2.0, 1.0, 0.0]])
    weight = benchmark.masks_by_argsort(kernel, np.array([0, 2, 6]), "weight")
    assert weight.sum(axis=(1, 2)).tolist() == [6, 4, 0]
    # The zero, then the first of the three ones.
    assert weight[1].tolist() == [[False, True, True], [True, True, False]]
    unit = benchmark.masks_by_argsort(kernel, np.array([1, 2]), "unit")
    assert unit.tolist() == [[[True, False, True]] * 2, [[False, False, True]] * 2]


@pytest.mark.slow
def test_run_without_pytorch(small):
    numbers = benchmark.run(small, None, rounds=2, hidden_sizes=(20,), matmul_size=50)
    printed = report.text(speed_section(numbers)).splitlines()
    [training] = [line for line in printed if "masked training of 2 levels" in line]
    assert "matmul" in training and training.endswith(">= 80 %")
    assert json.loads(json.dumps(numbers)) == numbers
    names = "masks training evaluation masked update update".split()
    names += ["inference"] * 2 + ["evaluation", "training"]
    assert [row["name"].split()[0] for row in numbers["rows"]] == names
    for row in numbers["rows"]:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        compared = 0 if row["other"] == "PyTorch" else 2
        assert len(row["theirs"]) == len(row["ratios"]) == compared
        assert len(row["rates"]) == (0 if row["other"] == "training" else 4)
    evaluation, training, *updates = numbers["rows"][2:6]
    for row, flop in (
        (evaluation, 2 * 3 * (100 + 150) * (784 * 20 + 20 * 10)),
        (training, 2 * 2 * 128 * (2 * 784 * 20 + 3 * 20 * 10)),
    ):
        rates = np.reshape(row["rates"], (2, 2)).mean(axis=1)
        np.testing.assert_allclose(row["ratios"], flop / np.array(row["seconds"]) / rates)
    for row in updates:  # ten steps an epoch: one between two updates
        assert row["theirs"] == training["seconds"]
        np.testing.assert_allclose(row["ratios"], np.divide(row["seconds"], training["seconds"]))


def test_comparison_with_pytorch(bench, tmp_path):
    with benchmark.torch_worker(fake_worker(tmp_path), bench.torch_inputs()) as ask:
        bench.measure_masks(ask)
        bench.measure_epoch(ask)  # the stub computes the loss from what it was given
    for row in bench.rows[-2:]:
        assert row.theirs == [2.0, 2.0]  # an epoch is ten steps, all of them timed
        np.testing.assert_allclose(row.ratios, np.divide(2.0, row.seconds))


def test_inputs_of_pytorch(bench):
    inputs = bench.torch_inputs()
    assert [inputs[f"kernel_{i}"].shape for i in range(2)] == [(784, 20), (20, 10)]
    assert inputs["weight_counts"].tolist() == [[0], [7840], [14112]]
    assert inputs["unit_counts"].tolist() == [[0], [10], [18]]
    images = np.asarray(bench.data.train.x)
    np.testing.assert_array_equal(inputs["x"], images.reshape(len(images), 784))


def test_wrong_results_stop_the_run(bench, monkeypatch):
    with pytest.raises(ArithmeticError, match="loss of the same network"):
        bench.measure_epoch(lambda op, **arguments: {"loss": 9.0})
    masks = jax.tree.map(jnp.array, bench.masks)
    masks["unit"]["hidden_0"]["kernel"] = ~masks["unit"]["hidden_0"]["kernel"]
    monkeypatch.setattr(bench, "masks", masks)
    with pytest.raises(ArithmeticError, match="unit masks of hidden_0"):
        bench.measure_masks(None)


def test_worker_that_ends(bench, tmp_path):
    with (
        pytest.raises(RuntimeError, match="ended at 'stop'"),
        benchmark.torch_worker(fake_worker(tmp_path), bench.torch_inputs()) as ask,
    ):
        ask("stop")


def test_bad_flags(capsys, tmp_path):
    for flags in (["--rounds", "0"], ["--out", str(tmp_path / "missing" / "out.json")]):
        with pytest.raises(SystemExit) as stopped:
            benchmark.main(flags)
        assert stopped.value.code == 2
        assert "--rounds must be at least 1" in capsys.readouterr().err
