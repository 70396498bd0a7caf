"""README: every block of Python runs, and every number is that of the committed data."""

import json
import re
from pathlib import Path
from statistics import fmean, median

import jax
import pytest

import jaxprune as jp
from jaxprune import results
from jaxprune.data import Data, Split

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_block_runs_one_after_the_other(
    fashion_mnist, tmp_path, monkeypatch, capsys
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    # Fewer examples, so that it takes seconds.
    small = Data(
        *(Split(x[:n], y[:n]) for (x, y), n in zip(fashion_mnist, (2000, 500, 500), strict=True))
    )
    monkeypatch.setattr("jaxprune.data.load", lambda name: small)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) >= 6
    names: dict = {}
    for block in blocks:
        # As users have it; the tests are stricter.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            exec(compile(block, "README.md", "exec"), names)
    assert names["fast"](names["x"]).shape == (256, 10)
    assert {row.criterion for row in names["rows"]} == {"magnitude", "snip"}
    assert len(capsys.readouterr().out.splitlines()) == 4  # of the ten lines


def test_the_length_and_the_links():
    assert len(README.splitlines()) <= 200
    for link in re.findall(r"\]\(([^)#]+)", README):
        assert (ROOT / link).exists(), link


def test_the_table_is_that_of_the_committed_data():
    rows, found = (
        jp.load_run(ROOT / "figures").rows,
        json.loads((ROOT / "figures" / "inference.json").read_text()),
    )

    def accuracy(granularity, protocol, level):
        values = [100 * row.metrics["accuracy"] for row in rows
                  if (row.granularity, row.protocol, row.epoch) == (granularity, protocol, 20)
                  and row.target_sparsity == level / 100]  # fmt: skip
        assert len(values) == 3
        return f"{fmean(values):.1f}"

    def faster(granularity, level):
        [row] = [row for row in found["speed"] if (row["granularity"], row["level"]) == (
            granularity, level) and row["batch"] == 256]  # fmt: skip
        return f"{median(row['ratios']):.1f}"

    def smaller(level):
        here = [
            row for row in found["files"] if (row["level"], row["values"]) == (level, "float32")
        ]
        return f"{here[0]['dense'] / fmean(row['bytes'] for row in here):.1f}"

    lines = re.findall(r"^\| (\d+)% \| (.*) \|$", README, flags=re.M)
    assert [int(level) for level, _ in lines] == [0, 50, 80, 90, 95, 99]
    for text, cells in lines:
        level = int(text)
        accuracies = [
            [accuracy(granularity, protocol, level) for protocol in ("one_shot", "trained")]
            for granularity in ("weight", "unit")
        ]
        expected = [
            *(pair[0] if level == 0 else " / ".join(pair) for pair in accuracies),
            smaller(level),
            f"{faster('weight', level)} / {faster('unit', level)}",
        ]
        assert cells.split(" | ") == expected


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("2.1% of training by weight", "update of 9 levels, weight"),
        ("0.3% by unit", "update of 9 levels, unit"),
        ("5.1 times as fast", "training of 9 unit levels"),
    ],
)
def test_the_claims_are_those_of_the_benchmark(text, name):
    [row] = [row for row in json.loads((ROOT / "figures" / "benchmark.json").read_text())["rows"]
             if row["name"].startswith(name)]  # fmt: skip
    scale = 100 if "%" in text else 1
    assert text in " ".join(README.split())
    assert re.match(r"[\d.]+", text)[0] == f"{scale * median(row['ratios']):.1f}"  # pyright: ignore


def test_the_minutes_of_training_are_those_of_the_rows():
    run = jp.load_run(ROOT / "figures")
    trained = [row.train_seconds + row.mask_seconds for row in run.rows
               if (row.granularity, row.protocol) == ("weight", "trained")]  # fmt: skip
    seconds = sum(trained) + run.config["seconds"]["dense_training"]
    assert f"took {seconds / 3 / 60:.0f} minutes a seed" in " ".join(README.split())


def test_the_methods_are_those_of_the_committed_run():
    rows = results.read_csv(ROOT / "figures" / "one_shot" / "challenge" / "results.csv")

    def accuracy(granularity, name, level):
        found = [100 * row.metrics["accuracy"] for row in rows
                 if (row.granularity, row.criterion) == (granularity, name)
                 and row.target_sparsity == level / 100]  # fmt: skip
        assert len(found) == 3
        return f"{fmean(found):.1f}"

    text = " ".join(README.split())
    listed = re.findall(r"`([^`]+)` (\d+\.\d) / (\d+\.\d) / (\d+\.\d)", text)
    assert len(listed) == 6
    for name, *found in listed:
        assert found == [accuracy("weight", name, level) for level in (90, 95, 99)]
    assert f"dense {accuracy('weight', 'magnitude', 0)}" in text
    kept, norm = (accuracy("unit", name, 90) for name in ("reconstruction+refit", "magnitude"))
    assert f"`reconstruction+refit` keeps {kept} at 90%" in text
    assert f"those of largest norm keep {norm}." in text
