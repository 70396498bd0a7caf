import copy
import dataclasses
import functools
import hashlib
import json
import math
import operator
import random
import re
import subprocess
import sys
from collections import namedtuple
from typing import Any

import jax
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune import checkpoints, results
from jaxprune.config import Arm
from jaxprune.results import Row
from jaxprune.types import Metric

ROW = Row(
    criterion="magnitude",
    granularity="unit",
    scope="layer",
    protocol="trained",
    seed=0,
    epoch=2,
    target_sparsity=0.975,
    sparsity=0.1 + 0.2,
    total_sparsity=1 / 3,
    remaining=1234567,
    metrics={"accuracy": 0.8851, "loss": 1e-17, "class_accuracy": [0.5, None, 1.0], "churn": None},
    train_seconds=12.5,
    mask_seconds=0.0,
    eval_seconds=1e300,
)
ACCURACY = Metric("accuracy", "test accuracy", "%", "higher", True, 0.0, 1.0, 0.1)
LOSS = Metric("loss", "test loss", "nats", "lower", True, 0.0)
CHURN = Metric("churn", "changed predictions", "%", "lower", low=0.0, high=1.0)


def row(**changes):
    return dataclasses.replace(ROW, **changes)


NUMBERS = st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
CHANGES = st.fixed_dictionaries(
    {
        "criterion": st.text(st.characters(exclude_categories=["Cc", "Cs"])),
        "remaining": st.none() | st.integers(0),
        "metrics": st.dictionaries(
            st.sampled_from(["a", "b, c", 'd"\n', "é"]), NUMBERS | st.lists(NUMBERS, max_size=3)
        ),
    }
)


@given(st.lists(CHANGES, max_size=3))
@settings(max_examples=50)
def test_rows_come_back_exactly(tmp_path_factory, changes):
    rows = [row(**change) for change in changes]
    folder = tmp_path_factory.mktemp("rows")
    digest = results.append_rows(folder / "log", rows[:1], "start")
    digest = results.append_rows(folder / "log", rows[1:], digest)
    size = (folder / "log").stat().st_size
    assert results.read_log(folder / "log", "start") == (rows, digest, size, None, False)
    results.write_csv(folder / "csv", rows)
    names = {name: None for row in rows for name in row.metrics}  # a missing one comes back as None
    assert results.read_csv(folder / "csv") == [
        dataclasses.replace(row, metrics=names | row.metrics) for row in rows
    ]


def line(fields, before):
    """Return a line of a log, and its digest, by the definition."""
    body = json.dumps(fields)
    digest = hashlib.sha256((before + body).encode()).hexdigest()[:16]
    return f'{body[:-1]}, "digest": "{digest}"}}\n', digest


def test_the_files_are_as_documented(tmp_path):
    rows = [row(epoch=1), row(epoch=2)]
    last = results.append_rows(tmp_path / "log", rows, results.first_digest("ab12", 3))
    one, digest = line(dataclasses.asdict(rows[0]), "ab12-3")
    two, digest = line(dataclasses.asdict(rows[1]), digest)
    assert (tmp_path / "log").read_text() == one + two and last == digest
    results.write_csv(tmp_path / "csv", rows)
    header, first, _ = (tmp_path / "csv").read_text().splitlines()
    assert header == (
        "criterion,granularity,scope,protocol,seed,epoch,target_sparsity,sparsity,total_sparsity,"
        "remaining,accuracy,loss,class_accuracy,churn,train_seconds,mask_seconds,eval_seconds,digest"
    )
    assert first.startswith("magnitude,unit,layer,trained,0,1,0.975,0.30000000000000004,")
    assert ',0.8851,1e-17,"[0.5, null, 1.0]",,12.5,' in first


def test_every_flipped_bit_is_found(tmp_path):
    rows = [row(epoch=epoch) for epoch in range(1, 9)]
    results.append_rows(tmp_path / "log", rows, "start")
    results.write_csv(tmp_path / "csv", rows)
    draw = random.Random(0)
    for name in ("log", "csv"):
        good = (tmp_path / name).read_bytes()
        for _ in range(400):
            bad, at = bytearray(good), draw.randrange(len(good))
            bad[at] ^= 1 << draw.randrange(8)
            (tmp_path / name).write_bytes(bad)
            number = good[:at].count(b"\n")
            if name == "csv":
                with pytest.raises(ValueError, match=r"csv, line \d: ") as caught:
                    results.read_csv(tmp_path / name)
                assert "\n" not in str(caught.value)
                continue
            log = results.read_log(tmp_path / name, "start")
            assert log.rows == rows[:number] and f"line {number + 1}: " in str(log.problem)
            assert log.valid_bytes == len(b"".join(good.splitlines(keepends=True)[:number]))


@pytest.mark.parametrize(
    ("order", "left"), [("0213", 1), ("013", 2), ("123", 0), ("0112", 2), ("01x3", 2), ("x123", 0)]
)
def test_lines_lost_moved_or_of_another_log_are_found(tmp_path, order, left):
    rows = [row(epoch=epoch) for epoch in range(4)]
    results.append_rows(tmp_path / "log", rows, results.first_digest("mine", 0))
    lines = (tmp_path / "log").read_bytes().splitlines(keepends=True)
    results.append_rows(tmp_path / "other", rows, results.first_digest("mine", 1))
    other = (tmp_path / "other").read_bytes().splitlines(keepends=True)
    at = [(other[i] if name == "x" else lines[int(name)]) for i, name in enumerate(order)]
    (tmp_path / "log").write_bytes(b"".join(at))
    log = results.read_log(tmp_path / "log", results.first_digest("mine", 0))
    assert log.rows == rows[:left] and not log.torn
    assert log.problem == f"line {left + 1}: changed since it was written, or of another run"


def test_a_torn_line_is_cut_off_and_written_again(tmp_path):
    path = tmp_path / "log"
    assert results.read_log(path, "start") == ([], "start", 0, None, False)
    results.append_rows(path, [row(epoch=1), row(epoch=2)], "start")
    whole = path.read_bytes()
    for size in range(whole.index(b"\n") + 2, len(whole), 5):
        path.write_bytes(whole[:size])
        log = results.read_log(path, "start")
        assert (log.rows, log.problem, log.torn) == ([row(epoch=1)], "line 2: cut off", True)
    results.cut_log(path, log)
    assert results.append_rows(path, [], log.digest) == log.digest
    results.append_rows(path, [row(epoch=2)], log.digest)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": {"accuracy": "high"}}, {"metrics": {"accuracy": math.nan}},
        {"metrics": {"accuracy": [[0.5]]}}, {"metrics": {"accuracy": True}}, {"metrics": None},
        {"metrics": {"seed": 1.0}}, {"epoch": None}, {"epoch": "4"}, {"epoch": -1}, {"seed": "1"},
        {"seed": 1.5}, {"seed": True}, {"target_sparsity": 50.0}, {"sparsity": None},
        {"remaining": 2.5}, {"criterion": 3}, {"eval_seconds": -1.0}, {"eval_seconds": math.inf},
    ],
    ids=str,
)  # fmt: skip
def test_fields_of_the_wrong_kind_are_refused(tmp_path, change):
    (name,) = change
    bad = copy.copy(ROW)
    vars(bad).update(change)
    with pytest.raises(ValueError, match=f"^{name} must be .*, got "):
        bad.__post_init__()
    fields = dataclasses.asdict(ROW)
    for wrong in (fields | change, fields | {"more": 1}):
        (tmp_path / "log").write_text(line(wrong, "start")[0])
        log = results.read_log(tmp_path / "log", "start")
        assert log.rows == [] and "line 1: not a row of results (" in str(log.problem)


@pytest.mark.parametrize("text", ["[1]", "3", '{"loss": 1}', "{}", "[" * 100_000, '"a"', "\x00"])
def test_lines_that_are_no_rows(tmp_path, text):
    (tmp_path / "log").write_text(f"{text}\n")
    problem = str(results.read_log(tmp_path / "log", "start").problem)
    assert problem.startswith("line 1: not a row of results (") and len(problem) < 150
    results.write_csv(tmp_path / "csv", [ROW])
    header, first = (tmp_path / "csv").read_text().splitlines()
    cut = header.replace(",seed", "")
    for wrong in (f"{header}\n{text}\n", f"{header}\n{first},7\n", f"{cut}\n{first}\n", text, ""):
        (tmp_path / "csv").write_text(wrong)
        with pytest.raises(ValueError, match="csv, line [12]: "):
            results.read_csv(tmp_path / "csv")


@pytest.mark.parametrize(
    ("values", "mean", "half"),
    [  # 4.30265 and 2.77645: the printed table's t for 2 and 4 degrees of freedom
        ([2.0, 4.0, 6.0], 4, 4.30265 * 2 / math.sqrt(3)),
        ([1, 2, 3, 4, 5], 3, 2.77645 * math.sqrt(2.5) / math.sqrt(5)),
        ([7, 7, 7], 7, 0),
    ],
)
def test_the_interval_is_students(values, mean, half):
    assert results.mean_interval(values) == pytest.approx((mean, half), rel=1e-5)
    ends = max(mean - half, 0), mean + half
    assert results.spread(values, LOSS) == pytest.approx((mean, *ends), rel=1e-5)


def test_intervals_of_few_values_and_of_bounded_metrics():
    for values, mean in (([0.25], 0.25), ([0.25, 0.75], 0.5)):
        assert results.mean_interval(values) == (mean, None)
        assert results.spread(values, ACCURACY) == (mean, None, None)
    assert results.of_difference(ACCURACY)[5:] == (-1, 1, None)
    assert results.of_difference(LOSS._replace(chance=2.3))[5:] == (None, None, None)
    with pytest.raises(ValueError, match="at least one value"):
        results.mean_interval([])
    seeds = [0.4, 0.4, 0.96]
    assert results.spread(seeds, ACCURACY)[1:] == (0, 1)
    rows = [row(seed=i, metrics={"accuracy": value}) for i, value in enumerate(seeds)]
    (table,) = results.tables(rows, [ACCURACY])
    assert table.lines == [["97.5", "58.67 [0.00, 100.00]", "1,234,567"]]


def study(accuracy=lambda arm, seed: 0.88 + 0.01 * seed, criteria=("magnitude",)):
    return [
        row(
            criterion=criterion, protocol=protocol, granularity=granularity, seed=seed, epoch=epoch,
            target_sparsity=level, remaining=2386000 if granularity == "weight" else None,
            metrics={
                "churn": 0.5, "accuracy": accuracy((criterion, granularity), seed),
                "loss": None if level == 0.999 else 0.5,
            },
        )
        for protocol in ("one_shot", "trained") for criterion in criteria
        for granularity in ("weight", "unit")
        for seed in (0, 1) for epoch in (1, 2) for level in (0.0, 0.999, 0.25)
    ]  # fmt: skip


BLOCK = """\
one_shot, magnitude, layer, epoch 2, both seeds
                weight                                   unit
pruned %    accuracy %     loss nats  remaining    accuracy %     loss nats  remaining
       0  88.00, 89.00  0.500, 0.500  2,386,000  88.00, 89.00  0.500, 0.500          -
      25  88.00, 89.00  0.500, 0.500  2,386,000  88.00, 89.00  0.500, 0.500          -
    99.9  88.00, 89.00             -  2,386,000  88.00, 89.00             -          -"""
PAIRS = """\
one_shot, magnitude, layer, epoch 2, accuracy %: paired differences, both seeds
                  unit
pruned %  minus weight
       0  +0.00, +0.00
      25  +0.00, +0.00
    99.9  +0.00, +0.00"""


def test_the_tables():
    text = [*map(results.text, results.tables(study(), [CHURN, ACCURACY, LOSS]))]
    assert text[0::2] == [BLOCK, PAIRS]
    assert text[1::2] == [part.replace("one_shot", "trained") for part in (BLOCK, PAIRS)]
    "".join(text).encode("ascii")
    one = results.tables([r for r in study() if r.seed == 0], [ACCURACY])
    assert len(one) == 2 and "one seed" in one[0].title and one[0].lines[0][1] == "88.00"
    assert results.tables([], [ACCURACY]) == []
    assert results.tables(study(), [CHURN])[0].columns[1] == ("weight", "churn %")


def test_arms_are_compared_with_the_first_of_their_granularity():
    shift = {("random", "unit"): -0.3, ("random", "weight"): -0.1, ("magnitude", "unit"): -0.02}
    rows = study(lambda arm, seed: 0.8 + shift.get(arm, 0) + 0.05 * seed, ("magnitude", "random"))
    found = results.tables(rows, [ACCURACY, LOSS])
    assert [table.title.split(", epoch 2, ") for table in found] == [
        [f"{protocol}, layer", what]
        for what in ("both seeds", "accuracy %: paired differences, both seeds")
        for protocol in ("one_shot", "trained")
    ]
    assert all(max(map(len, results.text(table).splitlines())) <= 100 for table in found)
    cells = [dict(zip(table.columns, table.lines[1], strict=True)) for table in found[::2]]
    heads = ("weight magnitude", "weight random", "unit magnitude", "unit random")
    assert [*cells[0]] == [
        ("", "pruned %"),
        *((head, name) for head in heads for name in ("accuracy %", "loss nats", "remaining")),
    ]
    assert cells[0]["unit random", "accuracy %"] == "50.00, 55.00"
    assert cells[1] == {
        ("", "pruned %"): "25",
        ("weight random", "minus magnitude"): "-10.00, -10.00",
        ("unit magnitude", "minus weight"): "-2.00, -2.00",
        ("unit random", "minus magnitude"): "-28.00, -28.00",
    }


def test_cells_are_in_the_order_of_seeds_and_weights_that_differ_are_both_shown():
    rows = [
        dataclasses.replace(r, remaining=1200 + 100 * r.seed if r.granularity == "unit" else 2000)
        for r in study()[::-1]
    ]
    units = ["88.00, 89.00", "1,200, 1,300", "88.00, 89.00", "2,000"]
    assert results.tables(rows, [ACCURACY])[0].lines[0] == ["0", *units]


def test_wide_tables_go_on_below():
    wide = {"accuracy": [0.1, 0.9, 0.9], "loss": [0.1, 9.0, 9.0]}  # intervals cut at a bound
    rows = [
        row(granularity=granularity, seed=i, metrics={name: wide[name][i] for name in wide})
        for granularity in ("weight", "unit") for i in range(3)
    ]  # fmt: skip
    assert (
        results.text(results.tables(rows, [ACCURACY, LOSS])[0])
        == """\
trained, magnitude, layer, epoch 2, mean ± 95% interval over 3 seeds
                        weight
pruned %            accuracy %              loss nats  remaining
    97.5  63.33 [0.00, 100.00]  6.033 [0.000, 18.798]  1,234,567

                          unit
pruned %            accuracy %              loss nats  remaining
    97.5  63.33 [0.00, 100.00]  6.033 [0.000, 18.798]  1,234,567"""
    )
    table = results.Table("t", [("", "a"), ("one", "x" * 120), ("", "b")], [["1", "2", "3"]])
    assert [line.strip() for line in results.text(table).splitlines()] == [
        "t", "one", f"a  {'x' * 120}", f"1  {'2':>120}", "", "", "a  b", "1  3"
    ]  # fmt: skip


def test_levels_that_diverged_are_marked():
    rows = [
        dataclasses.replace(r, metrics=r.metrics | {"val_loss": None})
        if r.target_sparsity == 0.25 or (r.target_sparsity, r.seed) == (0.999, 1)
        else r
        for r in study(lambda *_: 0.5)
    ]
    assert rows[2].diverged and not rows[0].diverged
    levels, _, pairs, _ = results.tables(rows, [ACCURACY, LOSS])
    assert [line[1] for line in levels.lines] == ["50.00, 50.00", "diverged", "1/2 diverged"]
    assert [line[1] for line in pairs.lines] == ["+0.00, +0.00", "diverged", "2/4 diverged"]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.4132] * 3, "0.413 ± 0.000"), ([12.345] * 3, "12.35 ± 0.00"),
        ([70123.4] * 3, "70123 ± 0"), ([0.0012341] * 3, "0.00123 ± 0.00000"),
        ([-3.5] * 3, "-3.500 ± 0.000"), ([0.0] * 3, "0.000 ± 0.000"),
        ([0, 0, 6], "2.000 [0.000, 10.605]"), ([1, 3], "1.000, 3.000"), ([None, 2.0], "2.000"),
        ([None] * 2, "-"),
    ],
)  # fmt: skip
def test_a_cell(values, shown):
    low = 0.0 if 6 in values else None
    rows = [row(seed=i, metrics={"mse": v, "other": 1.0}) for i, v in enumerate(values)]
    (table,) = results.tables(rows, [Metric("mse", "error", "", "lower", True, low)])
    assert table.lines[0][1] == shown and table.columns[1] == ("unit", "mse")


def test_differences_are_paired_by_seed():
    ours, theirs = np.random.default_rng(0).random((2, 4)).tolist()
    arm, other = (Arm(name, "unit", "layer", "trained") for name in "ab")
    rows = [row(criterion="a", seed=i, metrics={"accuracy": v}) for i, v in enumerate(ours)]
    rows += [row(criterion="b", seed=i, metrics={"accuracy": theirs[i]}) for i in (3, 1, 0, 2)]
    rows += [row(criterion="a", seed=9), row(criterion="a", epoch=1)]
    low, high = scipy.stats.ttest_rel(ours, theirs).confidence_interval()
    found = results.difference(rows, arm, other, 0.975, "accuracy")
    assert found == pytest.approx(((low + high) / 2, (high - low) / 2))
    assert results.difference(rows[:5], arm, other, 0.975, "accuracy") == (
        ours[3] - theirs[3],
        None,
    )
    with pytest.raises(ValueError, match="no seed has loss of both a unit .* and b .* at 50%"):
        results.difference(rows, arm, other, 0.5, "loss")


def test_settings_are_compared_as_json_gives_them_back(tmp_path):
    given = {
        "tuple": (1, (2, "a")), "nan": math.nan, 3: {4.5: None}, "path": tmp_path,
        "numpy": [np.float32(0.5), np.int64(7), np.bool_(True), np.arange(2)], "none": None,
    }  # fmt: skip
    found = results.plain(given)
    results.write_json(tmp_path / "settings", found)
    again = results.read_json(tmp_path / "settings")
    assert again == found == results.plain(again)
    assert results.compare_settings(again, results.plain(given)) == []
    assert results.compare_settings(
        {"levels": [0, 25.0], "scope": "layer"},
        {"levels": [0.0, 90.0], "scope": "layer", "dataset": "mnist"},
    ) == ["levels: 0 25 in the run, 0 90 now", "dataset: None in the run, mnist now"]
    assert found["numpy"] == [0.5, 7, True, [0, 1]] and found["3"] == {"4.5": None}
    for value, message in (
        ({1, 2}, "settings.a.b must be what JSON can hold, got set"),
        (print, "settings.a.b must be .* got builtin_function_or_method"),
        ({1: 0, "1": 0}, "settings.a.b has two keys of one text among 1, '1'"),
    ):
        with pytest.raises(TypeError, match=message):
            results.plain({"a": {"b": value}})


ARMS = [
    Arm("magnitude", granularity, "layer", protocol)
    for protocol in ("one_shot", "trained") for granularity in ("weight", "unit")
]  # fmt: skip
WEIGHT, UNIT, TRAINED, UNFINISHED = ARMS
CONFIG = {
    "format": 2,
    "settings": {"epochs": 2, "dataset": "mnist"},
    "arms": [arm._asdict() | {"settings": {}, "identity": f"id{i}"} for i, arm in enumerate(ARMS)],
    "levels": [[50.0, 0.0, 97.5], [25.0]],
    "seeds": 2,
    "metrics": [ACCURACY._asdict(), LOSS._asdict()],
    "command": ["sweep.py"], "versions": {"jax": "0.10.2"}, "device": {},
    "seconds": {"compilation": 2}, "compilations": 3,
}  # fmt: skip
Dense = namedtuple("Dense", ["kernel"])
KERNEL = np.arange(6, dtype=np.float32).reshape(2, 3)


def levels_of(wrap, *values):
    return wrap(np.stack([np.full((2, 3), value) for value in values]))


def make_run(path, wrap):
    """Write a run of which `UNFINISHED` and the networks of seed 1 are still to be made."""
    folder = path / "checkpoints"
    mean = {"mean": np.ones(3)}
    checkpoints.save(folder / "dense-seed0/0002", params=wrap(KERNEL), state=mean)
    for arm, masks in ((WEIGHT, (True, False, True)), (UNIT, (False,))):
        checkpoints.save(folder / f"{arm.slug}-seed0/0002", masks=levels_of(wrap, *masks))
    for batch, values in (("", (5, 7)), ("-levels1", (9,))):
        checkpoints.save(
            folder / f"{TRAINED.slug}-seed0{batch}/0002",
            params=levels_of(wrap, *map(np.float32, values)),
            state={"mean": np.stack([np.full(3, float(value)) for value in values])},
            masks=levels_of(wrap, *(value > 5 for value in values)),
        )
    (path / "rows").mkdir()
    results.write_json(path / "config.json", CONFIG)
    for seed in (0, 1):
        for arm, entry in zip(ARMS[:3], CONFIG["arms"], strict=False):
            file = path / "rows" / f"{arm.slug}-seed{seed}.jsonl"
            first = results.first_digest(entry["identity"], seed)
            results.append_rows(file, [row(seed=seed, **arm._asdict())], first)
    return path


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "mnist", lambda kernel: {"mlp/~/0": kernel})


def test_a_run_is_read_back(run_dir):
    run = results.load_run(str(run_dir))
    assert run.path == run_dir and run.config == CONFIG
    assert run.rows == [row(seed=seed, **arm._asdict()) for seed in (0, 1) for arm in ARMS[:3]]
    assert run.arms == tuple(ARMS) and run.metrics == (ACCURACY, LOSS)
    assert repr(run) == f"<Run {run_dir}: 4 arms, 4 levels, 2 seeds, 6 rows>"


@pytest.mark.parametrize("kind", [dict, Dense])
def test_networks_are_read_back(tmp_path, kind):
    def wrap(kernel):
        return Dense(kernel) if kind is Dense else {"kernel": kernel}

    run = results.load_run(make_run(tmp_path / "run", wrap))
    target = (wrap(KERNEL), {"mean": np.ones(3)}) if kind is Dense else None

    def read(arm, seed, level):
        found = run.network(arm, seed, level, target)
        assert all(type(tree) is kind for tree in (found.params, found.masks))
        params, mask = jax.tree.leaves((found.params, found.masks))
        assert params.shape == mask.shape == (2, 3) and mask.dtype == bool
        return params, found.state["mean"], mask

    for arm in ARMS:
        weights, mean, mask = read(arm, 0, 0)
        assert (weights == KERNEL).all() and (mean == 1).all() and mask.all()
    for arm, level, kept in ((WEIGHT, 50, 1), (WEIGHT, 97.5, 0), (WEIGHT, 25, 1), (UNIT, 50, 0)):
        weights, mean, mask = read(row(**arm._asdict()), 0, level)
        assert (weights == KERNEL).all() and (mean == 1).all() and (mask == kept).all()
    for level, value in ((50, 5), (97.5, 7), (25.0, 9)):
        weights, mean, mask = read(TRAINED, 0, level)
        assert (weights == value).all() and (mean == value).all() and (mask == (value > 5)).all()
    if kind is Dense:
        with pytest.raises(ValueError, match="pass a target"):
            run.network(TRAINED, 0, 50)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ((WEIGHT._replace(protocol="x"), 0, 50), "has no arm magnitude weight layer x: it has mag"),
        (("magnitude", 0, 50), "has no arm magnitude .*: it has magnitude weight layer one_shot, "),
        ((WEIGHT, 7, 50), "has no seed 7: it has 0, 1"),
        ((WEIGHT, 0, 0.5), "has no level 0.5: it has 0, 50, 97.5, 25"),
        ((UNFINISHED, 0, 50), "trained-seed0/0002 does not exist: the run is not finished"),
        ((UNFINISHED, 0, 25), "trained-seed0-levels1/0002 does not exist: the run is not finished"),
        ((UNIT, 0, 25), "is not finished: it lacks masks of magnitude unit layer one_shot"),
        ((UNIT, 1, 0), "dense-seed1/0002 does not exist: the run is not finished"),
    ],
)
def test_networks_that_are_not_in_the_run(run_dir, which, message):
    with pytest.raises(ValueError, match=message) as caught:
        results.load_run(run_dir).network(*which)
    assert "\n" not in str(caught.value)


def test_rows_that_changed_are_refused_and_torn_ones_left_out(tmp_path):
    path = make_run(tmp_path / "run", lambda kernel: {"kernel": kernel})
    file = path / "rows" / f"{WEIGHT.slug}-seed0.jsonl"
    good = file.read_bytes()
    file.write_bytes(good[:-9])
    with pytest.warns(UserWarning, match="layer-one_shot-seed0.jsonl, line 1: cut off: left out"):
        assert len(results.load_run(path).rows) == 5
    file.write_bytes(good.replace(b"0.8851", b"0.9851"))
    with pytest.raises(ValueError, match="jsonl, line 1: changed since .*; the run's own command"):
        results.load_run(path)


def test_what_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a directory"):
        results.load_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a run: it holds no config.json"):
        results.load_run(tmp_path)
    config = tmp_path / "config.json"
    old = json.dumps({"settings": {"levels": [0]}, "seeds": 1})
    for text, message in (
        ("{", "is not JSON: "), ("[" * 100_000, "is not JSON: "), ("\xff", "is not JSON: "),
        ("[]", "is not the config of a run"), ("{}", "is not the config of a run"),
        (old, "is of format 1, by another version of jaxprune; this one reads format 2"),
    ):  # fmt: skip
        config.write_text(text)
        with pytest.raises(ValueError, match=f"config.json {message}") as caught:
            results.load_run(tmp_path)
        assert "\n" not in str(caught.value)
    results.write_json(config, CONFIG)
    run = results.load_run(tmp_path)
    assert run.rows == []
    results.write_csv(tmp_path / "results.csv", [ROW])
    assert results.load_run(tmp_path).rows == [ROW]
    with pytest.raises(ValueError, match="holds rows alone"):
        run.network(WEIGHT, 0, 50)


WRONG = [
    *((name, None) for name in CONFIG if name not in ("format", "settings")),
    ("settings", 3), ("settings.epochs", "2"), ("settings.epochs", 0), ("seeds", "1"), ("seeds", 0),
    ("seeds", True), ("levels", 3), ("levels[0]", 50), ("levels[0][1]", "50"), ("levels", []),
    ("levels[1][0]", 50.0), ("levels[1][0]", 101), ("versions", []), ("arms", []), ("arms[2]", "a"),
    ("arms[1].criterion", None), ("arms[1].granularity", "weight"), ("arms[0].settings", 1),
    ("identity", 3), ("stepped", "no"), ("stepped", 1), ("command", "sweep.py"), ("command[0]", 2),
    ("seconds.compilation", "1"), ("seconds.compilation", None), ("seconds.compilation", True),
    ("later_surroundings", {}),
    ("metrics[1].drawn", "yes"), ("metrics[0].low", "0"), ("metrics[0].name", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_configs_that_are_wrong_are_named(tmp_path, name, value):
    config: Any = copy.deepcopy(CONFIG)
    *keys, last = (int(k) if k.isdigit() else k for k in re.findall(r"\w+", name))
    functools.reduce(operator.getitem, keys, config)[last] = value
    results.write_json(tmp_path / "config.json", config)
    named = name.split("[")[0] if "." in str(value) or value in (101, "weight") else name
    message = f"config.json: {re.escape(named)} is missing, or not what a run has there$"
    with pytest.raises(ValueError, match=message):
        results.read_config(tmp_path / "config.json")


def test_rows_are_read_without_jax():
    code = "import sys, jaxprune.results; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
