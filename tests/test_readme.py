"""What README.md says: its example runs, and its tables are those of the committed rows."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import readme
from jaxprune import results

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def rows():
    return results.read_csv(ROOT / "figures" / "results.csv")


def test_the_examples_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second, third = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    names: dict = {}
    exec(compile(first, "README.md", "exec"), names)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    pruned = names["apply"](names["pruned"], jnp.asarray(names["fashion"].test.x[:256]))
    exec(compile(third, "README.md", "exec"), names)
    np.testing.assert_allclose(names["logits"], pruned, atol=1e-5 * np.max(np.abs(pruned)))
    assert (tmp_path / "net.safetensors").stat().st_size < 4 * 266_200 / 25
    exec(compile(second, "README.md", "exec"), names)
    assert names["plan"].widths["params/layers_0/kernel"] == (8, 4)
    assert names["small"]["params"]["layers_3"]["kernel"].shape == (4 * 784, 10)
    assert names["opt_state"][0].mu["params"]["layers_3"]["kernel"].shape == (4 * 784, 10)
    assert [(method, float(level)) for method, level, *_ in printed] == [
        (method, level) for method in ("weight", "unit") for level in (0, 0.5, 0.9, 0.99)
    ]


def test_the_tables_are_those_of_the_committed_rows_and_timings():
    text = (ROOT / "README.md").read_text()
    assert readme.fill(text, readme.blocks(ROOT / "figures")) == text


def test_energy_is_stated_where_it_was_measured(rows):
    timed, costs = (
        json.loads((ROOT / "figures" / name).read_text())
        for name in ("benchmark.json", "inference.json")
    )
    joules = {"level": 99.0, "ours": 0.0125, "dense": 0.25}
    assert "12.5 mJ of the processor at 99% by weight,\n  and 250 mJ dense" in readme.claims(
        rows, timed, {**costs, "joules": joules}
    )
    assert "not reported on this machine" in readme.claims(rows, timed, {**costs, "joules": None})


def test_every_goal_that_is_missed_is_named():
    def measured(ratio, rate, size, seconds):
        """Two networks and three files that are worse at every goal, or better."""
        speed = [
            {"method": "weight", "level": level, "batch": 256, "ratios": [ratio] * 3,
             "kept": 1_000_000, "seconds": {"ours": [2 * 256e6 / (1e9 * rate)]}}
            for level in (75, 80)
        ]  # fmt: skip
        files = [
            {"level": level, "values": values, "dense": 1000e6, "bytes": size * part,
             "accuracy": 0.9, "bound": 60e6, "bitmap": 70e6, "csr": 80e6, "npz": 80e6,
             "gzip": 80e6, "saving": seconds, "loading": seconds}
            for level, values, part in ((95, "float32", 1), (95, "codebook5", 0.4))
        ]  # fmt: skip
        return {"speed": speed, "files": files}

    good = measured(2.0, 41, 55e6, 9)
    assert "every goal" not in readme.goals(good)  # the crossover comes after 70%
    good["speed"][0]["level"] = 70
    assert readme.goals(good) == "These figures reach every goal of the two tables."
    good["files"][1]["accuracy"] = 0.897
    assert readme.goals(good).splitlines()[2:] == [
        "- 40 times smaller by codebook, within 0.2 points of float32: 95% (0.0)"
    ]
    assert readme.goals(measured(0.5, 39.5, 75e6, 11)).splitlines()[2:] == [
        "- never slower than dense, by the upper quartile: weight 75% at batch 256 (0.50), "
        "weight 80% at batch 256 (0.50)",
        "- 1.7 times as fast as dense: weight 80% at batch 256 (0.50)",
        "- 40 GFLOP/s of kept multiply-adds: weight 80% at batch 256 (39.5)",
        "- crossover by 70%: at batch 256 (none)",
        "- at most 0.97 of the lossless bound: 95% (1.250)",
        "- smaller than bitmap, CSR, npz and gzip: 95% (1.071 times)",
        "- 40 times smaller by codebook, within 0.2 points of float32: 95% (33.3)",
        "- saving at 100 MB/s of dense weights: `float32` 95% (90.9), `codebook5` 95% (90.9)",
        "- loading at 100 MB/s of dense weights: `float32` 95% (90.9), `codebook5` 95% (90.9)",
    ]


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).exists(), link


def test_the_committed_run_is_the_challenge_of_three_seeds_and_complete(rows):
    settings = results.load_run(ROOT / "figures").config["settings"]
    assert settings["dataset"] == "fashion_mnist" and settings["epochs"] == 20
    found = [(r.protocol, r.method, r.seed, r.epoch, 100 * r.target_sparsity) for r in rows]
    assert len(set(found)) == len(found) == 2 * 2 * 3 * 20 * 10
    for row in rows:
        if row.epoch == 20 or row.protocol == "one_shot":
            assert row.sparsity == pytest.approx(row.target_sparsity, abs=1e-6)


def test_weight_pruning_is_above_unit_pruning_from_70_to_95_percent(rows):
    for level in (70, 80, 90, 95):
        weight, unit = (
            results.mean_interval(readme.values(rows, "one_shot", method, level, "accuracy"))[0]
            for method in ("weight", "unit")
        )
        assert weight > unit


def test_a_missing_mark_is_an_error():
    with pytest.raises(ValueError, match="no block 'b'"):
        readme.fill("<!-- a -->\n<!-- /a -->", {"a": "x", "b": "y"})
    assert readme.fill("<!-- a -->\nold\n<!-- /a -->", {"a": "x"}) == "<!-- a -->\nx\n<!-- /a -->"
