"""The experiment of one-shot pruning, on a data set of a few hundred examples."""

import json
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments import one_shot
from jaxprune import results

RNG = np.random.default_rng(0)
METHODS = ("magnitude", "wanda", "obs", "magnitude*3+refit")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Three kinds of noise around a mean of their own."""
    means, path = RNG.normal(size=(3, 16)), tmp_path_factory.mktemp("data") / "blobs.npz"
    y = RNG.integers(0, 3, 400).astype(np.int32)
    x = (means[y] + 0.5 * RNG.normal(size=(400, 16))).astype(np.float32)
    np.savez(path, x_train=x[:300], y_train=y[:300], x_test=x[300:], y_test=y[300:])
    return path


def flags_of(archive, folder, *more):
    return ["one_shot.py", "--dataset", f"npz:{archive}", "--run-dir", str(folder),
            "--hidden-sizes", "16", "8", "--epochs", "2", "--batch-size", "32",
            "--images", "200", "--score-batch", "100", "--levels", "0", "50", "75",
            *more]  # fmt: skip


def run(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", arguments)
    one_shot.main()


def test_every_kind_of_method_and_where_it_goes_on(archive, tmp_path, monkeypatch, capsys):
    arguments = flags_of(
        archive, tmp_path, "--granularities", "weight", "unit", "2:4", "--criteria", "magnitude"
    )
    run(monkeypatch, arguments)
    first = capsys.readouterr().out
    rows = results.read_csv(tmp_path / "results.csv")
    assert {(row.granularity, row.target_sparsity) for row in rows} == {
        *((kind, level) for kind in ("weight", "unit") for level in (0, 0.5, 0.75)),
        ("2:4", 0), ("2:4", 0.5),
    }  # fmt: skip
    assert "weight, layer: test accuracy, %" in first and "peak GB" in first
    assert (tmp_path / "report.html").stat().st_size > 10_000
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"one-shot-weight.png", "one-shot-unit-seconds.svg"} <= names
    (tmp_path / "rows" / "unit-layer-magnitude-seed0.jsonl").unlink()
    run(monkeypatch, arguments)
    again = capsys.readouterr().out
    assert "unit layer magnitude seed 0: accuracy" in again
    assert "weight layer magnitude seed 0: accuracy" not in again
    assert [row.metrics for row in results.read_csv(tmp_path / "results.csv")] == [
        row.metrics for row in rows
    ]


def test_methods_that_correct_and_what_is_told_of_layers(archive, tmp_path, monkeypatch, capsys):
    run(monkeypatch, flags_of(archive, tmp_path, "--granularities", "weight",
                              "--criteria", *METHODS))  # fmt: skip
    told = json.loads((tmp_path / "one_shot.json").read_text())
    facts = {fact["method"]: fact for fact in told["facts"]}
    assert [*facts] == [*METHODS]
    for name, fact in facts.items():
        assert fact["sparsity"] == {
            "hidden_0/kernel": [0.5, 0.75], "hidden_1/kernel": [0.5, 0.75],
        }  # fmt: skip
        before, after = (np.mean([*fact[key].values()]) for key in ("masked_error", "error"))
        assert after < 0.9 * before if name in METHODS[2:] else after == before, (
            name,
            after,
            before,
        )
    out = capsys.readouterr().out
    assert "squared error of a layer's outputs" in out and "magnitude(steps=3)+refit" in out


def test_parameters_from_a_file(archive, tmp_path, monkeypatch, capsys):
    sizes = [16, 16, 8, 3]
    names = ("hidden_0.kernel", "hidden_1/kernel", "logits/kernel")
    arrays = {
        name: RNG.normal(size=shape).astype(np.float32)
        for name, *shape in zip(names, sizes, sizes[1:], strict=False)
    }
    save_file(arrays, tmp_path / "net.safetensors")
    given = ("--params", str(tmp_path / "net.safetensors"), "--criteria", "random")
    run(monkeypatch, flags_of(archive, tmp_path / "run", "--granularities", "weight", *given))
    assert not (tmp_path / "run" / "dense").exists()
    assert "weight layer random seed 0" in capsys.readouterr().out
    save_file(arrays | {"logits/kernel": arrays["hidden_0.kernel"]}, tmp_path / "net.safetensors")
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, flags_of(archive, tmp_path / "run", "--granularities", "weight", *given))
    assert caught.value.code == 2
    assert "logits/kernel of shape (8, 3) is wanted, and it has shape (16, 16)" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--criteria", "magnitud"), "criterion must be one of magnitude"),
        (("--criteria", "taylor2", "--granularities", "weight"), "taylor2 prunes units"),
        (("--criteria", "obs", "--granularities", "unit"), "obs prunes weights, or n of m"),
        (("--criteria", "obs", "--scopes", "global", "--granularities", "weight"),
         "scope global compares layers by scores, and obs has none"),
        (("--granularities", "3:5"), "has 16 inputs, which 5 does not divide"),
        (("--granularities", "blocks"), "granularities must be among weight, unit, row"),
        (("--scopes", "laye"), "scopes must be distinct and among layer, global, erk"),
        (("--params", "missing.safetensors"), "missing.safetensors"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_before_anything_is_trained(
    more, message, archive, tmp_path, monkeypatch, capsys
):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, flags_of(archive, tmp_path, *more))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "dense").exists()
