"""The study end to end on a small data set; run as a script, one sweep that may kill itself."""

import dataclasses
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

import jaxprune as jp
from jaxprune import checkpoints, models, results
from jaxprune.data import Data, Split
from jaxprune.scores import magnitude
from jaxprune.study import TrainingDiverged
from jaxprune.study.programs import Programs
from jaxprune.train import batch_indices, init_state
from jaxprune.types import Metrics

FEATURES, HIDDEN, CLASSES = 8, (16, 12), 3
LEVELS = (0.0, 50.0, 90.0)
# Epochs 1 and 2 are dense, 3 and 4 prune, 5 is masked; of 9 steps.
SETTINGS = {
    "levels": LEVELS, "epochs": 5, "batch_size": 32, "optimizer": optax.adam(1e-2),
    "remaining": models.mlp_remaining,
}  # fmt: skip
REPOSITORY = Path(__file__).parents[1]


def make_data(seed=0):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(CLASSES, FEATURES))

    def split(n):
        y = rng.integers(0, CLASSES, n)
        x = centers[y] + rng.normal(size=(n, FEATURES))
        return Split(x.astype(np.float32), y.astype(np.int32))

    return Data(split(300), split(60), split(90))


DATA = make_data()
init, apply = models.mlp(FEATURES, HIDDEN, CLASSES)


def sweep(run_dir=None, **changes):
    return jp.run_sweep(init, apply, DATA, run_dir=run_dir, **{**SETTINGS, **changes})


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Keep what is compiled: each sweep makes its programs anew, most of them the same."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(tmp_path_factory.mktemp("compiled"))
    options = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


class Traced:
    """An `apply` that counts how often it is traced."""

    def __init__(self):
        self.times = 0

    def __call__(self, params, x):
        self.times += 1
        return apply(params, x)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A finished run of two seeds: its folder, its rows, and how often `apply` was traced."""
    folder, traced = tmp_path_factory.mktemp("runs") / "full", Traced()
    rows = jp.run_sweep(init, traced, DATA, seeds=2, run_dir=folder, **SETTINGS)
    return folder, rows, traced.times


def timeless(row):
    return dataclasses.replace(row, train_seconds=0.0, mask_seconds=0.0, eval_seconds=0.0)


def key_of(row):
    return (row.protocol, row.method, row.seed, row.epoch, row.target_sparsity)


def by_key(rows):
    found = {key_of(row): timeless(row) for row in rows}
    assert len(found) == len(rows), "a row is there twice"
    return found


def assert_same_rows(rows, expected):
    """Compare rows, in any order, times aside."""
    rows, expected = by_key(rows), by_key(expected)
    assert rows.keys() == expected.keys()
    for key, row in rows.items():
        assert row == expected[key]


def metrics_of(row):
    return {name: getattr(row, name) for name in Metrics._fields}


def pick(rows, **wanted):
    return [row for row in rows if all(getattr(row, k) == v for k, v in wanted.items())]


# Rows


def test_a_row_for_every_protocol_method_seed_epoch_and_level(full):
    folder, rows, _ = full
    fractions = [level / 100 for level in LEVELS]
    expected = itertools.product(
        ("one_shot", "trained"), ("weight", "unit"), (0, 1), range(1, 6), fractions
    )
    assert Counter(map(key_of, rows)) == Counter(expected)
    assert {(row.criterion, row.scope) for row in rows} == {("magnitude", "layer")}
    run = jp.load_run(folder)
    assert run.rows == rows == results.read_csv(folder / "results.csv")
    assert run.config["seeds"] == 2 and run.config["seconds"]["compilation"] > 0
    # A network that has learnt something, or the rest would show little.
    dense = pick(rows, epoch=5, target_sparsity=0.0)
    assert min(row.accuracy for row in dense) > 0.7
    assert len({row.loss for row in pick(rows, epoch=5, seed=0)}) == 1 + 2 * 2 * 2


def test_level_0_is_the_dense_run_everywhere(full):
    _, rows, _ = full
    for seed, epoch in itertools.product((0, 1), range(1, 6)):
        dense = pick(rows, seed=seed, epoch=epoch, target_sparsity=0.0)
        assert len(dense) == 4
        assert all(metrics_of(row) == metrics_of(dense[0]) for row in dense)
        assert {(r.sparsity, r.total_sparsity, r.remaining, r.churn) for r in dense} == {
            (0.0, 0.0, 8 * 16 + 16 * 12 + 12 * 3, 0.0)
        }


def test_before_pruning_all_trained_levels_are_dense(full):
    _, rows, _ = full
    for seed, epoch, method in itertools.product((0, 1), (1, 2), ("weight", "unit")):
        same = pick(rows, protocol="trained", seed=seed, epoch=epoch, method=method)
        assert [row.sparsity for row in same] == [0.0] * 3
        assert all(metrics_of(row) == metrics_of(same[0]) for row in same)


def test_the_achieved_sparsity_is_the_exact_count(full):
    _, rows, _ = full
    shapes = jax.eval_shape(init, jax.random.key(0))
    weights = {"hidden_0": 8 * 16, "hidden_1": 16 * 12}
    for row in rows:
        if row.protocol == "trained" and row.epoch < 4:
            continue
        size, inputs = {"weight": (None, {}), "unit": (1, {"hidden_0": 8, "hidden_1": 16})}[
            row.method
        ]
        if row.method == "weight":
            pruned = sum(jp.num_pruned(n, row.target_sparsity) for n in weights.values())
        else:
            units = {name: shapes[name]["kernel"].shape[1] for name in weights}
            pruned = sum(
                inputs[name] * jp.num_pruned(n, row.target_sparsity) for name, n in units.items()
            )
        assert row.sparsity == pruned / (8 * 16 + 16 * 12)
        assert row.total_sparsity == pruned / (8 * 16 + 16 * 12 + 12 * 3)


def test_half_of_the_way_is_half_pruned_by_the_cubic_schedule(full):
    _, rows, _ = full
    for row in pick(rows, protocol="trained", method="weight", epoch=3):
        # 18 steps and 20 updates: the tenth and last before the second epoch brings t = 1/2.
        reached = row.target_sparsity * (1 - (1 - 0.5) ** 3)
        pruned = sum(round(n * reached) for n in (8 * 16, 16 * 12))
        assert row.sparsity == pytest.approx(pruned / (8 * 16 + 16 * 12), abs=1e-12)


def test_seeds_differ_and_levels_are_pruned_and_scored(full):
    _, rows, _ = full
    for row in pick(rows, seed=1, epoch=5):
        [other] = pick(rows, **dict(zip(
            ("protocol", "method", "seed", "epoch", "target_sparsity"),
            (row.protocol, row.method, 0, 5, row.target_sparsity), strict=True,
        )))  # fmt: skip
        assert row.loss != other.loss
        assert row.worst_class_accuracy == min(row.class_accuracy)
        assert row.sparsity == other.sparsity
    churn = [row.churn for row in pick(rows, epoch=5) if row.target_sparsity == 0.9]
    assert all(0 < value <= 1 for value in churn)


def test_seconds_are_charged_to_who_spent_them(full):
    _, rows, _ = full
    for row in rows:
        assert min(row.train_seconds, row.mask_seconds, row.eval_seconds) >= 0
        shared = row.target_sparsity == 0 or (row.protocol == "trained" and row.epoch <= 2)
        assert (row.eval_seconds > 0) == (not shared)
        assert (row.train_seconds > 0) == (row.protocol == "trained" and not shared)
        assert (row.mask_seconds > 0) == (not shared and not (
            row.protocol == "trained" and row.epoch == 5))  # fmt: skip


def test_a_level_that_prunes_nothing_is_the_dense_run():
    # The same initial weights, batches and optimizer state; 0.1% of 192 weights are none.
    rows = sweep(levels=(0.0, 0.1, 50.0), epochs=2)
    for row in pick(rows, target_sparsity=0.001):
        [dense] = pick(rows, protocol=row.protocol, method=row.method, seed=0, epoch=row.epoch,
                       target_sparsity=0.0)  # fmt: skip
        assert row.sparsity == row.churn == 0
        for name, value in metrics_of(dense).items():
            np.testing.assert_allclose(metrics_of(row)[name], value, rtol=1e-5, err_msg=name)


# Networks


def assert_same_leaves(tree, expected):
    for leaf, other in zip(*map(jax.tree.leaves, (tree, expected)), strict=True):
        np.testing.assert_array_equal(leaf, other)


def test_networks_are_those_of_the_rows(full):
    folder, rows, _ = full
    run = jp.load_run(folder)
    for protocol, method, seed in itertools.product(
        ("one_shot", "trained"), ("weight", "unit"), (0, 1)
    ):
        networks = [run.network(protocol, method, seed, level) for level in LEVELS]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *networks)
        scored, _ = jp.evaluate_levels(apply, stacked.params, stacked.masks, DATA)
        scored = jax.tree.map(np.asarray, scored)
        for i, level in enumerate(LEVELS):
            [row] = pick(rows, protocol=protocol, method=method, seed=seed, epoch=5,
                         target_sparsity=level / 100)  # fmt: skip
            assert round(row.accuracy * 90, 3) == round(float(scored.accuracy[i]) * 90, 3)
            for name, value in metrics_of(row).items():
                np.testing.assert_allclose(getattr(scored, name)[i], value, rtol=1e-6, err_msg=name)
            assert jp.sparsity_of(networks[i].masks) == row.sparsity
            assert models.mlp_remaining(networks[i].masks) == row.remaining


def test_one_shot_networks_are_the_dense_network_under_magnitude_masks(full):
    folder, _, _ = full
    run = jp.load_run(folder)
    dense = run.network("trained", "unit", 1, 0.0)
    for method, prune in (("weight", jp.weight_masks), ("unit", jp.unit_masks)):
        expected = prune(dense.params, [level / 100 for level in LEVELS[1:]])
        for i, level in enumerate(LEVELS[1:]):
            network = run.network("one_shot", method, 1, level)
            assert_same_leaves(
                network.masks, jax.tree.map(lambda m, i=i: np.asarray(m)[i], expected)
            )
            assert_same_leaves(network.params, dense.params)


def test_trained_networks_are_zero_where_pruned_and_masks_are_nested_over_levels(full):
    folder, _, _ = full
    run = jp.load_run(folder)
    for method in ("weight", "unit"):
        for level in LEVELS[1:]:
            network = run.network("trained", method, 1, level)
            for w, mask in zip(*map(jax.tree.leaves, network), strict=True):
                assert (w[~mask] == 0).all()
                # What leaves a pruned unit was removed with it, and is back as zeros.
                assert (w[mask] != 0).all() or method == "unit"
        if method == "unit":
            kept = network.masks["hidden_0"]["kernel"].mean(axis=0)
            assert set(kept.tolist()) == {0.0, 1.0}


def test_prune_curve_gives_the_one_shot_rows(full):
    folder, rows, _ = full
    params = jp.load_run(folder).network("one_shot", "weight", 1, 0.0).params
    # Churn is against the network as given, whatever the order of the levels.
    curve = jp.prune_curve(apply, params, DATA, (90.0, 0.0), remaining=models.mlp_remaining)
    assert [(row.method, row.target_sparsity) for row in curve] == [
        ("weight", 0.9), ("weight", 0.0), ("unit", 0.9), ("unit", 0.0)
    ]  # fmt: skip
    for row in curve:
        [other] = pick(rows, protocol="one_shot", method=row.method, seed=1, epoch=5,
                       target_sparsity=row.target_sparsity)  # fmt: skip
        assert timeless(row) == timeless(dataclasses.replace(other, seed=0, epoch=0))
        assert row.mask_seconds > 0 and row.eval_seconds > 0


# Interruptions


class Interrupted:
    """A `report` that raises KeyboardInterrupt at the n-th call in a place."""

    def __init__(self, protocol, method, epoch, n=1):
        self.place, self.left = (protocol, method, epoch), n

    def __call__(self, progress):
        self.left -= (progress.protocol, progress.method, progress.epoch) == self.place
        if self.left == 0:
            raise KeyboardInterrupt


def checkpoints_of(folder):
    return {f"{p.parent.name}/{p.name}" for p in (folder / "checkpoints").glob("*/*")}


@pytest.fixture
def unsaved(monkeypatch):
    """Return a function that makes the next save of a checkpoint an interruption."""

    def arm(name):
        save = checkpoints.save

        def interrupted(path, /, **items):
            if f"{path.parent.name}/{path.name}" == name:
                monkeypatch.setattr(checkpoints, "save", save)
                raise KeyboardInterrupt
            return save(path, **items)

        monkeypatch.setattr(checkpoints, "save", interrupted)

    return arm


def test_resumed_is_uninterrupted_and_seeds_may_grow(full, tmp_path, unsaved):
    _, expected, _ = full
    folder = tmp_path / "run"
    log = folder / "results.jsonl"
    masks = {}

    def stop(*place):
        with pytest.raises(KeyboardInterrupt):
            sweep(folder, report=Interrupted(*place))

    stop("dense", "", 2)
    assert {row.epoch for row in results.read_rows(log)} == {1}
    unsaved("dense-seed0/0003")  # its rows are written, its state is not
    with pytest.raises(KeyboardInterrupt):
        sweep(folder)
    assert {row.epoch for row in results.read_rows(log)} == {1, 2, 3}
    with log.open("a") as file:
        file.write('{"protocol": "one_sh')
    stop("trained", "weight", 3, 4)  # between two updates of the masks
    assert len(results.read_rows(log)) == 5 * (2 * 3 + 2) + 2 * 2 * 2
    stop("trained", "weight", 5)
    for epoch in (3, 4):
        masks[epoch] = checkpoints.load(folder / "checkpoints/trained-weight-seed0" / f"000{epoch}",
                                        "masks")  # fmt: skip
    unsaved("trained-unit-seed0/0004")
    with pytest.raises(KeyboardInterrupt):
        sweep(folder)
    seen = []
    rows = sweep(folder, report=seen.append)
    assert {(p.protocol, p.method, p.epoch) for p in seen} == {
        ("trained", "unit", 4), ("trained", "unit", 5)
    }  # fmt: skip
    assert_same_rows(rows, pick(expected, seed=0))
    assert_same_rows(results.read_rows(log), rows)
    final = checkpoints.load(folder / "checkpoints/trained-weight-seed0/0005", "masks")
    for earlier, later in ((masks[3], masks[4]), (masks[4], final)):
        for before, after in zip(*map(jax.tree.leaves, (earlier, later)), strict=True):
            assert (before | ~after).all()
    assert jax.tree.map(np.sum, masks[3]) != jax.tree.map(np.sum, masks[4])

    grown = sweep(folder, seeds=2)
    assert_same_rows(grown, expected)
    assert grown[: len(rows)] == rows  # what was there was not computed again
    assert results.read_config(folder / "config.json")["seeds"] == 2


def test_a_finished_run_computes_nothing(full, monkeypatch):
    folder, expected, _ = full
    before = (folder / "results.jsonl").read_bytes(), checkpoints_of(folder)
    reports, notes, traced = [], [], Traced()
    rows = jp.run_sweep(init, traced, DATA, seeds=2, run_dir=folder, report=reports.append,
                        note=notes.append, **SETTINGS)  # fmt: skip
    assert rows == expected
    # Fewer seeds than are there take nothing away.
    assert sweep(folder, seeds=1) == expected
    assert (reports, notes, traced.times) == ([], [], 0)
    assert ((folder / "results.jsonl").read_bytes(), checkpoints_of(folder)) == before
    assert results.read_config(folder / "config.json")["seeds"] == 2


def test_checkpoints_are_thinned_out(full):
    folder, *_ = full
    found = checkpoints_of(folder)
    last = {f"{group}-seed{seed}/0005" for seed in (0, 1)
            for group in ("dense", "trained-weight", "trained-unit")}  # fmt: skip
    assert last < found and len(found) == len(last) + 1
    whole = {
        name for name in found if "opt_state" in checkpoints.verify(folder / "checkpoints" / name)
    }
    assert whole == {"trained-unit-seed1/0004", "trained-unit-seed1/0005"}


def flip(path, name):
    """Flip a bit in the largest file of an item."""
    file = max((path / name).rglob("*"), key=lambda file: file.is_file() and file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "item", "instead"),
    [
        ("trained-unit-seed1/0005", "params", "using epoch 4 instead"),
        ("trained-weight-seed0/0005", "masks", "using none instead"),
        ("dense-seed1/0005", "params", "using none instead"),
    ],
)
def test_a_corrupt_checkpoint_is_noted_and_computed_again(full, tmp_path, name, item, instead):
    folder, expected, _ = full
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    flip(copy / "checkpoints" / name, item)
    notes = []
    rows = sweep(copy, seeds=2, note=notes.append)
    assert "is corrupt" in notes[0] and name in notes[0] and instead in notes[0]
    assert_same_rows(rows, expected)
    keys = ("seed", "protocol", "method", "epoch", "target_sparsity")
    order = [[getattr(row, key) for key in keys] for row in rows]
    assert order == [[getattr(row, key) for key in keys] for row in expected]
    assert_same_rows(results.read_rows(copy / "results.jsonl"), expected)
    checkpoints.verify(copy / "checkpoints" / name)


def test_lost_rows_are_computed_again(full, tmp_path):
    folder, expected, _ = full
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    log = copy / "results.jsonl"
    lost = pick(expected, protocol="trained", method="unit", seed=1, epoch=4, target_sparsity=0.9)
    results.rewrite_rows(log, [row for row in expected if row not in lost])
    notes = []
    assert_same_rows(sweep(copy, seeds=2, note=notes.append), expected)
    assert "results.jsonl lacks rows of trained-unit-seed1" in notes[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": 4}, ["epochs", "5", "4"]),
        ({"levels": (0.0, 50.0, 95.0)}, ["levels", "0 50 90", "0 50 95"]),
        ({"methods": ("weight",)}, ["methods", "weight unit"]),
        ({"protocols": ("one_shot",)}, ["protocols", "one_shot trained"]),
        ({"batch_size": 64}, ["batch_size", "32", "64"]),
        ({"scope": "global"}, ["scope", "layer", "global"]),
        ({"scores": lambda params: params}, ["criterion", "magnitude", "<lambda>"]),
        ({"settings": {"learning_rate": 0.1}}, ["learning_rate", "0.1"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_are_refused_by_name(full, change, words):
    folder, expected, _ = full
    before = (folder / "results.jsonl").read_bytes(), (folder / "config.json").read_bytes()
    with pytest.raises(ValueError, match="holds a run with other settings") as error:
        sweep(folder, seeds=2, **change)
    message = str(error.value)
    assert all(word in message for word in [str(folder), *words]), message
    assert (
        (folder / "results.jsonl").read_bytes(),
        (folder / "config.json").read_bytes(),
    ) == before


def test_other_data_are_refused(full):
    folder, *_ = full
    with pytest.raises(ValueError, match="data_sha256"):
        jp.run_sweep(init, apply, make_data(seed=1), run_dir=folder, **SETTINGS)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no run"):
        sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# Losses that are not finite


def test_a_diverged_seed_keeps_the_rows_of_those_before(full, tmp_path):
    folder, expected, _ = full
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    message = "not finite at epoch 1, level 0%, seed 2"
    with pytest.raises(TrainingDiverged, match=message):
        sweep(copy, seeds=3, optimizer=optax.sgd(1e30))
    assert results.read_rows(copy / "results.jsonl") == expected


def test_a_diverged_level_is_named_and_the_epochs_before_are_kept(tmp_path):
    def update(updates, state, params=None):
        """Follow the gradient, and fail once nine tenths of a layer are pruned."""
        assert isinstance(params, dict)
        broken = jnp.mean(params["hidden_0"]["kernel"] == 0) > 0.85
        return jax.tree.map(lambda g: jnp.where(broken, jnp.nan, -0.1 * g), updates), state

    optimizer = optax.GradientTransformation(optax.sgd(0.1).init, update)
    message = r"not finite at epoch 4, level 90%, seed 0 \(trained unit\)"
    with pytest.raises(TrainingDiverged, match=message):
        sweep(tmp_path / "run", optimizer=optimizer, methods=("unit",))
    rows = results.read_rows(tmp_path / "run" / "results.jsonl")
    assert Counter((row.protocol, row.epoch) for row in rows) == Counter(
        {("one_shot", e): 3 for e in range(1, 6)}
        | {("trained", e): 3 for e in (1, 2, 3)} | {("trained", e): 1 for e in (4, 5)}
    )  # fmt: skip


# Unit-pruned levels as smaller networks


def test_smaller_networks_train_and_score_as_masked_ones():
    optimizer = optax.adam(1e-2)
    programs = Programs(apply, optimizer, magnitude, ("unit",), "layer", None, lambda seconds: None)
    params = init(jax.random.key(0))
    masks = jp.masks_at(magnitude(params), jp.counts(params, [0.25, 0.75], granularity="unit"),
                        granularity="unit")  # fmt: skip
    state = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), init_state(params, optimizer))
    x, y = (jnp.asarray(values) for values in DATA.train)
    batches = batch_indices(jax.random.key(1), len(y), 32)
    args = x, y, batches, np.int32(0), np.int32(len(batches))

    networks = programs.smaller(state.params, masks, x[:2], fold=False)
    shapes = [[leaf.shape for leaf in jax.tree.leaves(level)] for level in networks.params]
    assert shapes == [[(1, 8, n), (1, n, m), (1, m, 3)] for n, m in ((12, 9), (4, 3))]
    (levels, losses), _ = networks.train(networks.shrink(state), networks.masks, *args)
    (masked, masked_losses), _ = programs.train(state, masks, *args)
    np.testing.assert_allclose(losses, masked_losses, rtol=1e-4)
    small = networks.expand(levels)
    assert jax.tree.structure(small) == jax.tree.structure(masked)
    # What leaves a pruned unit does nothing, and is zero in the smaller networks.
    alive = jax.tree.map(lambda leaf: jnp.any(leaf, axis=1), masks)
    for name, before in (("hidden_1", "hidden_0"), ("logits", "hidden_1")):
        kept = alive[before]["kernel"][:, :, None]
        leaf = jnp.where(kept, masked.params[name]["kernel"], 0)
        np.testing.assert_allclose(small.params[name]["kernel"], leaf, rtol=1e-3, atol=1e-5)

    val, test = (jax.tree.map(jnp.asarray, split) for split in DATA[1:])
    (scores, labels), _ = programs.smaller(small.params, masks, x[:2], fold=True).score(
        val, test, None
    )
    (masked_scores, masked_labels), _ = programs.score(small.params, masks, val, test, None)
    assert (labels == masked_labels).all()
    np.testing.assert_allclose(scores.loss, masked_scores.loss, rtol=1e-5)
    np.testing.assert_array_equal(scores.accuracy, masked_scores.accuracy)
    np.testing.assert_array_equal(scores.churn, masked_scores.churn)
    assert scores.churn[0] == 0 < scores.churn[1]


# Settings at their ends


@pytest.mark.parametrize(
    ("change", "widths"),
    [
        ({"epochs": 6}, 2),
        ({"levels": (0.0, 25.0, 50.0, 75.0)}, 3),
        ({"levels": (0.0, 50.0, 50.01)}, 1),
    ],
)
def test_programs_are_compiled_once_for_all_levels_and_once_a_distinct_width(
    full, tmp_path, change, widths
):
    folder, *_ = full
    assert jp.load_run(folder).config["compilations"] == 8 + 2 * 2
    jp.run_sweep(init, apply, DATA, run_dir=tmp_path / "run", **SETTINGS | change)
    # Training and scoring of one network and of all levels, and two selections by two methods;
    # then training and scoring of every width.
    assert jp.load_run(tmp_path / "run").config["compilations"] == 8 + 2 * widths


def test_traces_do_not_depend_on_seeds_and_one_epoch_is_enough(full, tmp_path):
    *_, times = full
    traced, notes = Traced(), []
    jp.run_sweep(init, traced, DATA, **SETTINGS)
    assert traced.times == times > 0
    options = {**SETTINGS, "levels": (0.0, 25.0, 50.0, 75.0), "epochs": 1, "methods": ("unit",)}
    with pytest.raises(KeyboardInterrupt):
        jp.run_sweep(init, apply, DATA, run_dir=tmp_path / "run", **options,
                     report=Interrupted("trained", "unit", 1, n=3))  # fmt: skip
    resumed = jp.run_sweep(
        init, apply, DATA, run_dir=tmp_path / "run", **options, note=notes.append
    )
    assert notes == []
    rows = jp.run_sweep(init, apply, DATA, **options)
    assert_same_rows(resumed, rows)
    # All is pruning: from the initial weights on, and to the end.
    assert [row.epoch for row in rows] == [1] * 8
    assert all(row.sparsity > 0 for row in rows if row.target_sparsity > 0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"levels": (50.0, 90.0), "protocols": ("trained",), "methods": ("unit",)},
            {("trained", "unit", 0.5), ("trained", "unit", 0.9)},
        ),
        (
            {"levels": (0.0, 75.0, 80.0), "protocols": ("one_shot",), "methods": ("weight",),
             "batch_size": 300},
            {("one_shot", "weight", share) for share in (0.0, 0.75, 0.8)},
        ),
        (
            {"levels": (0.0,)},
            set(itertools.product(("one_shot", "trained"), ("weight", "unit"), (0.0,))),
        ),
    ],
    ids=["trained unit without 0", "one_shot weight, one batch", "level 0 only"],
)  # fmt: skip
def test_a_part_of_a_sweep(changes, expected, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        sweep(folder, epochs=2, **changes, report=Interrupted("dense", "", 2))
    rows = sweep(folder, epochs=2, **changes)
    assert Counter((row.protocol, row.method, row.target_sparsity, row.epoch) for row in rows) == (
        Counter((*key, epoch) for key in expected for epoch in (1, 2))
    )
    assert sweep(folder, epochs=2, **changes) == rows
    assert len(jp.load_run(folder).rows) == len(rows)


def test_a_layer_pruned_whole_is_legal_and_warned_of_once():
    # 99% of 12 and of 16 units are 11.88 and 15.84: all of them, by rounding.
    changes = {"epochs": 2, "levels": (0.0, 50.0, 99.0), "methods": ("unit",)}
    with pytest.warns(UserWarning, match="every unit of hidden_0/kernel, hidden_1/") as caught:
        rows = sweep(**changes)
    assert len(caught) == 1
    constant = pick(rows, target_sparsity=0.99, epoch=2)
    assert len(constant) == 2
    for row in constant:
        assert row.sparsity == 1.0
        assert row.loss == pytest.approx(np.log(CLASSES), rel=1e-6)
        assert (row.temperature, row.remaining) == (1.0, 0)
        assert Counter(row.class_accuracy) == {0.0: 2, 1.0: 1}
    with pytest.warns(UserWarning, match="every weight of hidden_0/kernel, hidden_1/") as caught:
        curve = jp.prune_curve(
            apply, init(jax.random.key(0)), DATA, (50.0, 100.0), methods=("weight",)
        )
    assert len(caught) == 1
    assert [row.sparsity for row in curve] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": ()}, "levels must name at least one"),
        ({"levels": (0.0, 101.0)}, r"levels must be in \[0, 100\] percent, got 101"),
        ({"levels": (0.0, float("nan"))}, "levels must be in .* got nan"),
        ({"levels": (0.5, 0.9)}, "levels are in percent"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, r"batch_size must be in \[1, 300\], .* got 0"),
        ({"batch_size": 301}, r"batch_size must be in \[1, 300\], .* got 301"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_settings_leave_nothing_behind(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        sweep(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


# Other networks


def test_global_scope_prunes_through_all_layers(tmp_path):
    folder, levels = tmp_path / "run", (90.0, 0.0, 50.0)  # in any order
    rows = sweep(folder, scope="global", levels=levels, epochs=2, methods=("weight",))
    for row in pick(rows, epoch=2):
        assert row.scope == "global"
        assert row.sparsity == jp.num_pruned(8 * 16 + 16 * 12, row.target_sparsity) / (
            8 * 16 + 16 * 12
        )
    run = jp.load_run(folder)
    for row in pick(rows, epoch=2):
        network = run.network(row.protocol, "weight", 0, 100 * row.target_sparsity)
        assert jp.sparsity_of(network.masks) == row.sparsity
    network = run.network("one_shot", "weight", 0, 50.0)
    expected = jp.weight_masks(jax.tree.map(jnp.asarray, network.params), 0.5, scope="global")
    for leaf, other in zip(*map(jax.tree.leaves, (network.masks, expected)), strict=True):
        np.testing.assert_array_equal(leaf, other)
    shares = [1 - np.mean(network.masks[name]["kernel"]) for name in ("hidden_0", "hidden_1")]
    assert abs(shares[0] - shares[1]) > 0.02  # else it might be by layer


class Nnx(nnx.Module):
    """A network with biases, which are not pruned."""

    def __init__(self, rngs):
        self.first = nnx.Linear(FEATURES, 8, rngs=rngs)
        self.logits = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.logits(nnx.tanh(self.first(x)))


def test_an_nnx_network(tmp_path):
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Nnx(nnx.Rngs(0))))

    def nnx_init(key):
        return nnx.to_pure_dict(nnx.state(Nnx(nnx.Rngs(key))))

    def nnx_apply(params, x):
        state = jax.tree.map(lambda leaf: leaf, abstract)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(x)

    options = {**SETTINGS, "epochs": 2, "levels": (0.0, 80.0), "methods": ("weight",)}
    options["remaining"] = None
    rows = jp.run_sweep(nnx_init, nnx_apply, DATA, run_dir=tmp_path / "run", **options)
    assert len(rows) == 2 * 2 * 2
    last = pick(rows, epoch=2, target_sparsity=0.8)
    for row in last:
        assert row.sparsity == 51 / 64
        assert row.total_sparsity == 51 / (64 + 8 + 24 + 3) and row.remaining is None
    network = jp.load_run(tmp_path / "run").network("trained", "weight", 0, 80.0)
    assert network.masks["first"]["bias"].all() and network.masks["logits"]["kernel"].all()
    assert network.params["first"]["bias"].any()  # trained, and kept
    [row] = pick(last, protocol="trained")
    logits = np.asarray(nnx_apply(jax.tree.map(jnp.asarray, network.params), DATA.test.x))
    assert np.mean(logits.argmax(axis=1) == DATA.test.y) == pytest.approx(row.accuracy, rel=1e-6)


def test_a_plain_function_of_a_list_of_arrays(tmp_path):
    def list_init(key):
        keys = jax.random.split(key)
        return [jax.random.normal(keys[0], (FEATURES, 10)) / 3, jnp.zeros(10),
                (jax.random.normal(keys[1], (10, CLASSES)) / 3,)]  # fmt: skip

    def list_apply(params, x):
        return jax.nn.relu(x @ params[0] + params[1][None]) @ params[2][0]

    options = {**SETTINGS, "epochs": 2, "levels": (50.0,), "methods": ("unit",), "scores": l1}
    options["remaining"] = None
    with pytest.raises(ValueError, match="no layer is named `logits`.* the paths are 0, 1, 2/0"):
        jp.run_sweep(list_init, list_apply, DATA, **options)
    rows = jp.run_sweep(
        list_init, list_apply, DATA, run_dir=tmp_path / "run",
        prunable=lambda path, leaf: path == "0", **options,
    )  # fmt: skip
    assert {row.criterion for row in rows} == {"l1"}
    assert [row.sparsity for row in pick(rows, epoch=2)] == [0.5] * 2
    network = jp.load_run(tmp_path / "run").network("trained", "unit", 0, 50.0)
    assert isinstance(network.params, list) and isinstance(network.params[2], tuple)
    assert network.masks[0].any(axis=0).sum() == 5
    assert network.masks[1].all() and network.masks[2][0].all()


def l1(params):
    return jax.tree.map(jnp.abs, params)


# kill -9


def run_child(folder, cache, *seconds):
    return subprocess.Popen(
        [sys.executable, __file__, str(folder), *map(str, seconds)], stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_COMPILATION_CACHE_DIR": cache,
             "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
             "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"},
    )  # fmt: skip


def test_killed_at_random_moments(full, tmp_path, compiled_once):
    _, expected, _ = full
    folder, kills = tmp_path / "run", 0
    for seconds in (random.uniform(0, 1), random.uniform(0.5, 2)):
        child = run_child(folder, compiled_once, seconds)
        _, errors = child.communicate(timeout=120)
        assert child.returncode in (0, -signal.SIGKILL), errors.decode()
        kills += child.returncode != 0
    assert kills
    assert_same_rows(sweep(folder), pick(expected, seed=0))


@pytest.mark.slow
def test_the_command_killed_at_ten_random_moments(fashion_mnist, tmp_path):
    errors = tmp_path / "errors.txt"

    def command(folder):
        flags = "--hidden-sizes 64 32 --levels 0 50 90 --epochs 4 --run-dir".split()
        with errors.open("w") as file:
            return subprocess.Popen(
                [sys.executable, REPOSITORY / "experiments" / "sweep.py", *flags, folder],
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
                stdout=subprocess.DEVNULL, stderr=file,
            )  # fmt: skip

    started = time.monotonic()
    assert command(tmp_path / "whole").wait(timeout=600) == 0, errors.read_text()
    duration = time.monotonic() - started
    expected = jp.load_run(tmp_path / "whole").rows
    assert len(expected) == 2 * 2 * 4 * 3
    kills = 0
    for run in itertools.count():  # as many runs as it takes
        before = kills
        while True:
            started, process = time.monotonic(), command(tmp_path / f"{run}")
            try:
                status = process.wait(random.uniform(0, duration) if kills < 10 else 600)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
        assert status == 0, errors.read_text()
        assert_same_rows(jp.load_run(tmp_path / f"{run}").rows, expected)
        if kills >= 10:
            return
        if kills == before:  # it ended too soon to be killed
            duration = min(duration, time.monotonic() - started)


def main(folder, seconds):
    """Sweep, and kill this process some seconds after the first call of training."""

    def start(_):
        nonlocal started
        if not started:
            timer.start()
        started = True

    started = False
    timer = threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    sweep(folder, report=start)
    timer.cancel()


if __name__ == "__main__":
    main(*sys.argv[1:])
