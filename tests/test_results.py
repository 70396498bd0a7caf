import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune import checkpoints, results
from jaxprune.results import Row

ROW = Row(
    protocol="trained",
    criterion="magnitude",
    method="unit",
    scope="layer",
    seed=0,
    epoch=2,
    target_sparsity=0.975,
    sparsity=0.1 + 0.2,
    total_sparsity=1 / 3,
    remaining=1234567,
    accuracy=0.8851,
    loss=1e-17,
    ece=0.0,
    signed_ece=-0.25,
    temperature=1000.0,
    scaled_loss=math.inf,
    churn=None,
    class_accuracy=[0.5, None, 1.0],
    worst_class_accuracy=0.5,
    val_accuracy=None,
    val_loss=2.0,
    train_seconds=12.5,
    mask_seconds=0.0,
    eval_seconds=1e300,
)


def row(**changes):
    return dataclasses.replace(ROW, **changes)


FLOATS = st.floats(allow_nan=False)
CHANGES = st.fixed_dictionaries(
    {
        "criterion": st.text(st.characters(exclude_categories=["Cc", "Cs"])),
        "remaining": st.none() | st.integers(0),
        "loss": st.none() | FLOATS,
        "class_accuracy": st.lists(st.none() | FLOATS, max_size=3),
    }
)


@given(st.lists(CHANGES, max_size=3))
@settings(max_examples=50)
def test_rows_come_back_exactly(tmp_path_factory, changes):
    rows = [row(**change) for change in changes]
    folder = tmp_path_factory.mktemp("rows")
    results.append_rows(folder / "results.jsonl", rows[:1])
    results.append_rows(folder / "results.jsonl", rows[1:])
    assert results.read_rows(folder / "results.jsonl") == rows
    results.write_csv(folder / "results.csv", rows)
    assert results.read_csv(folder / "results.csv") == rows


def test_the_columns_of_the_csv(tmp_path):
    results.write_csv(tmp_path / "results.csv", [ROW])
    header, line = (tmp_path / "results.csv").read_text().splitlines()
    assert header == (
        "protocol,criterion,method,scope,seed,epoch,target_sparsity,sparsity,total_sparsity,"
        "remaining,accuracy,loss,ece,signed_ece,temperature,scaled_loss,churn,class_accuracy,"
        "worst_class_accuracy,val_accuracy,val_loss,train_seconds,mask_seconds,eval_seconds"
    )
    assert line.startswith("trained,magnitude,unit,layer,0,2,0.975,0.30000000000000004,")
    assert ',,"[0.5, null, 1.0]",0.5,,2.0,' in line


@pytest.mark.parametrize(
    "text", ["protocol,loss\ntrained,1\n", "{header}\ntrained\n", "{header}\n{line},7\n"]
)
def test_what_is_no_csv_of_rows(tmp_path, text):
    path = tmp_path / "results.csv"
    results.write_csv(path, [ROW])
    header, line = path.read_text().splitlines()
    path.write_text(text.format(header=header, line=line))
    with pytest.raises(ValueError, match=r"results.csv, line 2: not a row of results"):
        results.read_csv(path)


def test_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "results.jsonl"
    results.append_rows(path, [row(epoch=1), row(epoch=2)])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(first, len(whole) - 1, 5):
        path.write_bytes(whole[:size])
        assert results.read_rows(path) == [row(epoch=1)]
    results.rewrite_rows(path, results.read_rows(path))
    results.append_rows(path, [row(epoch=2)])
    assert path.read_bytes() == whole


@pytest.mark.parametrize("bad", [b'{"protocol": "tra', b"", b"\xff", b"[1]", b'{"loss": 1}'])
def test_a_broken_line_elsewhere_is_named(tmp_path, bad):
    path = tmp_path / "results.jsonl"
    results.append_rows(path, [ROW, ROW, ROW])
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], bad, lines[2], b""]))
    with pytest.raises(ValueError, match="results.jsonl, line 2: not a row"):
        results.read_rows(path)


def test_rows_of_other_fields_are_no_torn_line(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match="line 1: not a row"):
        results.read_rows(tmp_path / "results.jsonl")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: results.rewrite_rows(path, [ROW]),
        lambda path: results.write_csv(path, [ROW]),
        lambda path: results.write_json_atomic(path, {"settings": {}}),
    ],
)
def test_files_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch, write):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(descriptor):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            write(path)
    assert path.read_text() == "old"
    write(path)
    assert path.read_text() != "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("values", "mean", "half"),
    [  # 12.7062, 4.30265, 2.77645: the printed table's t for 1, 2 and 4 degrees of freedom
        ([1.0, 3.0], 2, 12.7062 * math.sqrt(2) / math.sqrt(2)),
        ([2.0, 4.0, 6.0], 4, 4.30265 * 2 / math.sqrt(3)),
        ([1, 2, 3, 4, 5], 3, 2.77645 * math.sqrt(2.5) / math.sqrt(5)),
        ([7, 7, 7], 7, 0),
    ],
)
def test_the_interval_is_students(values, mean, half):
    assert results.mean_interval(values) == pytest.approx((mean, half), rel=1e-5)


def test_the_interval_of_one_value_and_of_none():
    assert results.mean_interval([0.25]) == (0.25, None)
    with pytest.raises(ValueError, match="at least one value"):
        results.mean_interval([])


def test_the_table():
    rows = [
        row(
            protocol=protocol, method=method, seed=seed, epoch=epoch, target_sparsity=level,
            accuracy=0.88 + 0.01 * seed, loss=None if level == 0.999 else 0.5,
            remaining=2386000 if method == "weight" else None,
        )
        for protocol in ("one_shot", "trained") for method in ("weight", "unit")
        for seed in (0, 1) for epoch in (1, 2) for level in (0.0, 0.999, 0.25)
    ]  # fmt: skip
    block = """\
one_shot (magnitude, layer), epoch 2, mean ± 95% interval over 2 seeds
                weight                                    unit
pruned %    accuracy %           loss    weights    accuracy %           loss  weights
       0  88.50 ± 6.35  0.500 ± 0.000  2,386,000  88.50 ± 6.35  0.500 ± 0.000        -
      25  88.50 ± 6.35  0.500 ± 0.000  2,386,000  88.50 ± 6.35  0.500 ± 0.000        -
    99.9  88.50 ± 6.35              -  2,386,000  88.50 ± 6.35              -        -"""
    text = results.table(rows)
    assert text == f"{block}\n\n{block.replace('one_shot', 'trained')}"
    assert max(map(len, text.splitlines())) <= 100
    one = results.table([r for r in rows if r.seed == 0])
    assert "one seed" in one and "88.00 ± -  0.500 ± -" in one
    assert results.table([]) == ""


def test_settings_that_differ_are_told():
    old = {"levels": [0.0, 25.0, 50.0], "learning_rate": 1e-3, "epochs": 2, "scope": "layer"}
    new = {"levels": [0, 97.5], "learning_rate": 0.001, "epochs": 2, "dataset": "mnist"}
    assert results.compare_settings(old, new) == [
        "levels: 0 25 50 in the run, 0 97.5 now",
        "scope: layer in the run, None now",
        "dataset: None in the run, mnist now",
    ]
    assert results.compare_settings({"levels": [0.0]}, {"levels": [0]}) == []


LEVELS = [50.0, 0.0, 97.5]
DENSE = {"hidden_0": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}


def stack(*values):
    return {"hidden_0": {"kernel": np.stack([np.full((2, 3), value) for value in values])}}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "mnist-quick"
    one_shot = {"weight": stack(True, False), "unit": stack(False, False)}
    folder = path / "checkpoints"
    checkpoints.save(folder / "dense-seed0" / "0002", params=DENSE, one_shot=one_shot)
    checkpoints.save(
        folder / "trained-weight-seed0" / "0002",
        params=stack(np.float32(5), np.float32(7)),
        masks=stack(False, True),
    )
    settings = {
        "levels": LEVELS, "epochs": 2, "methods": ["weight", "unit"],
        "protocols": ["one_shot", "trained"],
    }  # fmt: skip
    results.write_json_atomic(path / "config.json", {"settings": settings, "seeds": 2})
    results.append_rows(path / "results.jsonl", [row(seed=0), row(seed=1)])
    return path


def test_a_run_is_read_back(run_dir):
    run = results.load_run(str(run_dir))
    assert run.path == run_dir
    assert run.config["settings"]["levels"] == LEVELS
    assert run.rows == [row(seed=0), row(seed=1)]

    def kernels(*which):
        params, masks = run.network(*which)
        return params["hidden_0"]["kernel"], masks["hidden_0"]["kernel"]

    for protocol in ("one_shot", "trained"):
        for method in ("weight", "unit"):
            weights, mask = kernels(protocol, method, 0, 0)
            np.testing.assert_array_equal(weights, DENSE["hidden_0"]["kernel"])
            assert mask.dtype == bool and mask.shape == (2, 3) and mask.all()
    for method, level, kept in [
        ("weight", 50, True), ("weight", 97.5, False), ("unit", 50, False)
    ]:  # fmt: skip
        weights, mask = kernels("one_shot", method, 0, level)
        np.testing.assert_array_equal(weights, DENSE["hidden_0"]["kernel"])
        assert mask.shape == (2, 3) and (mask == kept).all()
    for level, value, kept in [(50, 5, False), (97.5, 7, True)]:
        weights, mask = kernels("trained", "weight", 0, level)
        assert weights.shape == mask.shape == (2, 3)
        assert (weights == value).all() and (mask == kept).all()


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (("pruned", "weight", 0, 50), "has no protocol pruned: it has one_shot trained"),
        (("trained", "row", 0, 50), "has no method row: it has weight unit"),
        (("trained", "weight", 7, 50), "has no seed 7: it has 0 1"),
        (("trained", "weight", 0, 0.5), "has no level 0.5: it has 50 0 97.5"),
        (("trained", "unit", 0, 50), "trained-unit-seed0/0002 does not exist: .* not finished"),
        (("one_shot", "unit", 1, 0), "dense-seed1/0002 does not exist: .* not finished"),
    ],
)
def test_networks_that_are_not_in_the_run(run_dir, which, message):
    with pytest.raises(ValueError, match=message) as caught:
        results.load_run(run_dir).network(*which)
    assert "\n" not in str(caught.value)


def test_what_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a directory"):
        results.load_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a run: it holds no config.json"):
        results.load_run(tmp_path)
    for text in ("{", "[]", "{}"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json is not the config of a run"):
            results.load_run(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"settings": {}}))
    assert results.load_run(tmp_path).rows == []
    results.write_csv(tmp_path / "results.csv", [ROW])
    assert results.load_run(tmp_path).rows == [ROW]


def test_rows_are_read_without_jax():
    code = "import sys, jaxprune.results; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
