"""The experiment on inference: that it runs and checks what it measures; nothing about time."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import benchmark, figures, inference_speed, results_page
from jaxprune import Study, load_run, networks
from jaxprune.data import Data, Split
from jaxprune.figures.costs import crossover
from jaxprune.study import run_sweep

LEVELS = (0.0, 80.0, 98.0)


@pytest.fixture(scope="module")
def small(fashion_mnist: Data) -> Data:
    """A few real images, enough for ten steps."""
    pairs = zip(fashion_mnist, (1280, 100, 150), strict=True)
    return Data(*(Split(split.x[:n], split.y[:n]) for split, n in pairs))


@pytest.fixture(scope="module")
def run_dir(small: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a small network."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    settings = {"dataset": "fashion_mnist", "hidden_sizes": [64, 100]}
    network = networks.network(*networks.mlp(784, (64, 100), 10))
    study = Study(levels=LEVELS, epochs=1, protocols=("trained",))
    run_sweep(network, small, study, run_dir=folder, settings=settings)
    return folder


@pytest.mark.slow
def test_all_is_measured_and_drawn(
    small: Data, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(inference_speed.data, "load", lambda name: small)
    monkeypatch.setattr(inference_speed, "CALLS", 5)
    monkeypatch.setattr(inference_speed, "matmul", lambda: benchmark.matmul(50))
    monkeypatch.setattr(inference_speed, "QUICK_LEVELS", (0, 98))
    out = tmp_path / "inference.json"
    inference_speed.main([str(run_dir), "--preset", "quick", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "weight 98%" in printed and "codebook5" in printed
    assert "GFLOP/s of kept" in printed and "times as fast" in printed
    found = json.loads(out.read_text())
    assert [(row["granularity"], row["level"], row["batch"]) for row in found["speed"]] == [
        (granularity, level, batch) for granularity in ("weight", "unit")
        for level in (0, 98) for batch in (1, 256)
    ]  # fmt: skip
    sizes = 784 * 64 + 64 * 100 + 100 * 10
    for row in found["speed"]:
        assert row["dense"] == sizes and row["executed"] <= row["dense"]
        assert len(row["seconds"]["ours"]) == 7 and min(row["ratios"]) > 0
        if row["granularity"] == "weight":  # all but the logits
            assert row["kept"] <= sizes - row["level"] / 100 * (sizes - 1000) + 2
    for row in found["files"]:
        assert row["bytes"] < row["dense"] == 4 * sizes
        assert 0 < row["accuracy"] < 1
        if row["values"] == "float32" and row["level"] >= 50:
            assert row["bytes"] < min(row["csr"], row["npz"], row["gzip"])
    for section in (results_page.inference_section, results_page.files_section):
        for table in section(found, {}).tables:
            assert {len(line) for line in table.lines} == {len(table.columns)}
    assert set(figures.draw_costs({"inference": found})) == {"inference-speed", "file-sizes"}


@pytest.mark.slow
def test_a_network_that_differs_stops_the_run(
    small: Data, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = next(inference_speed.trained(load_run(run_dir), [0], [80.0]))
    _, apply = networks.mlp(784, (64, 100), 10)
    images = small.test.x.reshape(-1, 784)
    monkeypatch.setattr(inference_speed, "compile_sparse", lambda *_: lambda x: np.ones((1, 10)))
    with pytest.raises(ArithmeticError, match="weight 80%, batch 1: it differs"):
        next(inference_speed.measure_speed(pruned, apply, images, None, [1]))


@pytest.mark.slow
def test_a_run_of_other_networks_or_arms(run_dir: Path) -> None:
    run = load_run(run_dir)
    assert [p.granularity for p in inference_speed.trained(run, [0], [98])] == ["weight", "unit"]
    for change in (
        {"settings": {**run.config["settings"], "network": "resnet20"}},
        {"arms": [arm for arm in run.config["arms"] if arm["protocol"] == "one_shot"]},
    ):
        other = dataclasses.replace(run, config={**run.config, **change})
        with pytest.raises(ValueError, match="small has no mlp trained with the masks of magnit"):
            next(inference_speed.trained(other, [0], [98]))


@pytest.mark.slow
def test_levels_that_the_run_does_not_have_are_named(
    small: Data, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inference_speed.data, "load", lambda name: small)
    monkeypatch.setattr(inference_speed, "QUICK_LEVELS", (50,))
    for flags, message in (
        (["--levels", "33"], "--levels: {} has the levels 0 80 98, not 33"),
        (["--levels", "98", "33", "80", "7"], "--levels: {} has the levels 0 80 98, not 33 7"),
        (["--preset", "quick"], "--preset quick: {} has the levels 0 80 98, not 50"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            inference_speed.main([str(run_dir), *flags])
        assert stopped.value.code == 2
        assert capsys.readouterr().err == f"inference_speed.py: {message.format(run_dir)}\n"


def test_rates_and_the_crossover_by_hand() -> None:
    row = {"kept": 1000, "batch": 256, "seconds": {"ours": [1e-6, 8e-6, 2e-6]}}
    assert results_page.gflops(row) == pytest.approx(256)
    files = [{"dense": 10e6, "saving": s} for s in (0.1, 0.05, 0.2)]
    assert results_page.coding_rate(files, "saving") == pytest.approx(100)
    rows = [{"level": level, "ratios": ratios} for level, ratios in
            {90: [2, 3, 4], 80: [1.0, 1.02, 9], 85: [0.5, 1.04, 1.1]}.items()]  # fmt: skip
    assert crossover(rows) == 85 and crossover(rows[1:2]) is None


def test_bad_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        ([str(tmp_path / "none")], "none is not a directory"),
        ([str(tmp_path), "--out", str(tmp_path / "missing" / "a.json")], "the folder of --out"),
    ):
        with pytest.raises(SystemExit) as stopped:
            inference_speed.main(flags)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
