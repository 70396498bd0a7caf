"""The ResNet experiment: its real code on a few images, small and not deep."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments import resnet
from jaxprune import data
from jaxprune.data import Data, Split


def parameters(width: int) -> int:
    """Count those of one block a stage: kernels, and scale and bias of every normalisation."""
    one, two, four = width, 2 * width, 4 * width
    stem = 9 * 1 * one + 2 * one
    blocks = 9 * one * one * 2 + 2 * 2 * one
    for before, after in ((one, two), (two, four)):
        blocks += (9 + 1) * before * after + 9 * after * after + 3 * 2 * after
    return stem + blocks + (four + 1) * 10


def test_masked_and_compact_learn_the_same_and_nothing_is_trained_twice(
    fashion_mnist: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    train, test = (Split(split.x[:n], split.y[:n]) for split, n in zip(
        (fashion_mnist.train, fashion_mnist.test), (64, 100), strict=True))  # fmt: skip
    monkeypatch.setattr(data, "load", lambda name: Data(train, test, test))
    plans, phases, make_plan, train_phase = [], {}, resnet.compaction, resnet.Experiment.train

    def watched_plan(*args: Any, **options: Any) -> Any:
        plans.append(make_plan(*args, **options))
        return plans[-1]

    def watched_phase(self: Any, seed: int, phase: str, epochs: Any, start: Any, *args: Any) -> Any:
        state = train_phase(self, seed, phase, epochs, start, *args)
        phases[phase] = self, epochs, start, state
        return state

    monkeypatch.setattr(resnet, "compaction", watched_plan)
    monkeypatch.setattr(resnet.Experiment, "train", watched_phase)
    flags = (
        *("--width", "2", "--blocks", "1", "--epochs", "2", "--seeds", "3"),
        *("--batch-size", "32", "--examples", "32", "--run-dir", str(tmp_path / "run")),
    )
    resnet.main([*flags, "--out", str(tmp_path / "new" / "rows.json")])
    printed = capsys.readouterr().out
    for phase, epoch in (("dense", 1), ("masked", 2), ("compact", 2)):
        assert f"seed 3 {phase} epoch {epoch}/2 · accuracy 0." in printed
    assert "seed 3: compact +0.00 points beside masked, 3.4" in printed

    found = json.loads((tmp_path / "new" / "rows.json").read_text())
    dense, masked, compact = found["rows"]
    assert dense["parameters"] == masked["parameters"] == parameters(2)
    assert compact["parameters"] == parameters(1)
    for name in ("accuracy", "loss", "train_loss"):
        assert compact[name] == pytest.approx(masked[name], abs=1e-4)
    # One step after pruning: parameters, moments and the count of steps.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        phases["compact"][-1],
        plans[0].shrink(phases["masked"][-1]),
    )
    stem = phases["masked"][-1].params["stem"]["kernel"]
    assert np.count_nonzero(np.abs(stem).sum((0, 1, 2))) == 1

    # Finished epochs are read, not trained: there is no step to train with.
    experiment, epochs, start, end = phases["compact"]
    again = train_phase(experiment, 3, "compact", epochs, start, *[None] * 4)
    jax.tree.map(np.testing.assert_array_equal, again, end)
    assert experiment.rows[-1] == compact
    with pytest.raises(SystemExit, match="2"):
        resnet.main([*flags, "--level", "30"])
    assert "level: 50 in the run, 30 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--width", "1"], "argument --width: must be in [2, inf), got 1"),
        (["--level", "100"], "argument --level: must be in [0, 100), got 100"),
        (["--learning-rate", "nan"], "argument --learning-rate: must be in"),
        (["--seeds", "0", "-1"], "argument --seeds"),
        (["--epochs", "one"], "argument --epochs"),
        (["--examples", "20"], "--examples must be in [128, 55000]"),
        (["--dataset", "cifar10"], "fashion_mnist, mnist or idx:FOLDER, got 'cifar10'"),
    ],
)
def test_a_bad_flag_gets_a_message_and_exit_2(
    flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        resnet.main(flags)
    assert words in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
