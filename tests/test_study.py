"""The study end to end on a small data set: its rows, its networks, and the numbers in them."""

import dataclasses
import itertools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import results, trees
from jaxprune.config import NotFinite, Study
from jaxprune.study import parts, stages
from jaxprune.study.programs import Programs
from jaxprune.study.progress import Meter
from jaxprune.study.setup import make_setup
from jaxprune.train import batch_indices, init_state
from tests.studies import (
    ADAM,
    CLASSES,
    DATA,
    LEVELS,
    NETWORK,
    Traced,
    apply,
    arm,
    init,
    key_of,
    pick,
    silent,
    sweep,
    timeless,
)

WEIGHTS = 8 * 16 + 16 * 12


@pytest.fixture(scope="module")
def full(finished_study):
    """A finished run of two seeds: its folder, its rows, and how often it was traced."""
    return finished_study


# Rows


def test_a_row_for_every_arm_seed_epoch_and_level(full):
    folder, rows, _ = full
    expected = itertools.product(
        ("magnitude",), ("weight", "unit"), ("layer",), ("one_shot", "trained"), (0, 1),
        range(1, 6), [level / 100 for level in LEVELS],
    )  # fmt: skip
    assert Counter(map(key_of, rows)) == Counter(expected)
    run = jp.load_run(folder)
    assert run.rows == rows == results.read_csv(folder / "results.csv")
    assert run.config["seeds"] == 2 and run.config["seconds"]["compilation"] > 0
    assert [metric.name for metric in run.metrics if metric.drawn] == ["accuracy", "loss"]
    # A network that has learnt something, or the rest would show little.
    dense = pick(rows, epoch=5, target_sparsity=0.0)
    assert min(row.metrics["accuracy"] for row in dense) > 0.7
    assert len({row.metrics["loss"] for row in pick(rows, epoch=5, seed=0)}) == 1 + 2 * 2 * 2


def test_level_0_is_the_dense_run_everywhere(full):
    _, rows, _ = full
    for seed, epoch in itertools.product((0, 1), range(1, 6)):
        dense = pick(rows, seed=seed, epoch=epoch, target_sparsity=0.0)
        assert len(dense) == 4
        assert all(row.metrics == dense[0].metrics for row in dense)
        assert {(r.sparsity, r.total_sparsity, r.remaining) for r in dense} == {
            (0.0, 0.0, WEIGHTS + 12 * 3)
        }
        assert dense[0].metrics["churn"] == 0


def test_before_pruning_all_trained_levels_are_dense(full):
    _, rows, _ = full
    for seed, epoch, granularity in itertools.product((0, 1), (1, 2), ("weight", "unit")):
        same = pick(rows, protocol="trained", seed=seed, epoch=epoch, granularity=granularity)
        assert [row.sparsity for row in same] == [0.0] * 3
        assert all(row.metrics == same[0].metrics for row in same)


def test_the_achieved_sparsity_is_the_exact_count(full):
    _, rows, _ = full
    for row in rows:
        if row.protocol == "trained" and row.epoch < 4:
            continue
        pieces = {"weight": {8 * 16: 1, 16 * 12: 1}, "unit": {16: 8, 12: 16}}[row.granularity]
        pruned = sum(w * jp.num_pruned(n, row.target_sparsity) for n, w in pieces.items())
        assert row.sparsity == pruned / WEIGHTS
        assert row.total_sparsity == pruned / (WEIGHTS + 12 * 3)


def test_half_of_the_way_is_half_pruned_by_the_cubic_schedule(full):
    _, rows, _ = full
    for row in pick(rows, protocol="trained", granularity="weight", epoch=3):
        # 18 steps and 20 updates: the tenth and last before the second epoch brings t = 1/2.
        reached = row.target_sparsity * (1 - (1 - 0.5) ** 3)
        pruned = sum(round(n * reached) for n in (8 * 16, 16 * 12))
        assert row.sparsity == pytest.approx(pruned / WEIGHTS, abs=1e-12)


def test_seeds_differ_and_levels_are_pruned_and_scored(full):
    _, rows, _ = full
    for row in pick(rows, seed=1, epoch=5):
        [other] = [r for r in rows if key_of(r) == (*row.arm, 0, 5, row.target_sparsity)]
        assert row.metrics["loss"] != other.metrics["loss"]
        assert row.metrics["worst_class_accuracy"] == min(row.metrics["class_accuracy"])
        assert row.sparsity == other.sparsity
    churn = [row.metrics["churn"] for row in pick(rows, epoch=5, target_sparsity=0.9)]
    assert all(0 < value <= 1 for value in churn)


def test_seconds_are_charged_to_who_spent_them(full):
    _, rows, _ = full
    for row in rows:
        assert min(row.train_seconds, row.mask_seconds, row.eval_seconds) >= 0
        shared = row.target_sparsity == 0 or (row.protocol == "trained" and row.epoch <= 2)
        masked = row.protocol == "trained" and row.epoch == 5
        assert (row.eval_seconds > 0) == (not shared)
        assert (row.train_seconds > 0) == (row.protocol == "trained" and not shared)
        assert (row.mask_seconds > 0) == (not shared and not masked)


def test_a_level_that_prunes_nothing_is_the_dense_run():
    # The same initial weights, batches and optimizer state; 0.1% of 192 weights are none.
    rows = sweep(levels=(0.0, 0.1, 50.0), epochs=2)
    for row in pick(rows, target_sparsity=0.001):
        [dense] = [r for r in rows if key_of(r) == (*key_of(row)[:-1], 0.0)]
        assert row.sparsity == row.metrics["churn"] == 0
        for name, value in dense.metrics.items():
            np.testing.assert_allclose(row.metrics[name], value, rtol=1e-5, err_msg=name)


# Networks


def assert_same_leaves(tree, expected):
    for leaf, other in zip(*map(jax.tree.leaves, (tree, expected)), strict=True):
        np.testing.assert_array_equal(leaf, other)


def test_networks_are_those_of_the_rows(full):
    folder, rows, _ = full
    run = jp.load_run(folder)
    flags = jp.prunable(apply, init(jax.random.key(0)), DATA.test.x[:2])
    for of, seed in itertools.product(run.arms, (0, 1)):
        found = [run.network(of, seed, level) for level in LEVELS]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *found)
        scored, _ = jp.evaluate_levels(apply, stacked.params, stacked.masks, DATA)
        for i, level in enumerate(LEVELS):
            [row] = [r for r in rows if key_of(r) == (*of, seed, 5, level / 100)]
            for name, value in row.metrics.items():
                np.testing.assert_allclose(scored[name][i], value, rtol=1e-6, err_msg=name)
            assert jp.sparsity_of(found[i].masks, prunable=flags) == row.sparsity
            count = jp.remaining(apply, found[i].params, DATA.test.x[:2])
            assert count(found[i].masks) == row.remaining


def test_one_shot_networks_are_the_dense_network_under_magnitude_masks(full):
    folder, _, _ = full
    run = jp.load_run(folder)
    dense = run.network(arm("trained", "unit"), 1, 0.0)
    for granularity, prune in (("weight", jp.weight_masks), ("unit", jp.unit_masks)):
        prunable = jp.prunable(apply, dense.params, DATA.test.x[:2])
        expected = prune(dense.params, [level / 100 for level in LEVELS[1:]], prunable=prunable)
        for i, level in enumerate(LEVELS[1:]):
            network = run.network(arm("one_shot", granularity), 1, level)
            assert_same_leaves(
                network.masks, jax.tree.map(lambda m, i=i: np.asarray(m)[i], expected)
            )
            assert_same_leaves(network.params, dense.params)


def test_trained_networks_are_zero_where_pruned(full):
    run = jp.load_run(full[0])
    for granularity, level in itertools.product(("weight", "unit"), LEVELS[1:]):
        params, _, masks = run.network(arm("trained", granularity), 1, level)
        for w, mask in zip(*map(jax.tree.leaves, (params, masks)), strict=True):
            assert (w[~mask] == 0).all()
            # What leaves a pruned unit was removed with it, and is back as zeros.
            assert (w[mask] != 0).all() or granularity == "unit"
        if granularity == "unit":
            assert set(masks["hidden_0"]["kernel"].mean(axis=0).tolist()) == {0.0, 1.0}


def test_prune_curve_gives_the_one_shot_rows(full):
    folder, rows, _ = full
    params = jp.load_run(folder).network(arm("one_shot", "weight"), 1, 0.0).params
    # Churn is against the network as given, whatever the order of the levels.
    curve = jp.prune_curve(apply, params, DATA, Study(levels=(90.0, 0.0, 50.0)))
    assert [(row.granularity, row.target_sparsity) for row in curve] == [
        (granularity, share) for granularity in ("weight", "unit") for share in (0.9, 0.0, 0.5)
    ]
    for row in curve:
        [other] = [r for r in rows if key_of(r) == (*row.arm, 1, 5, row.target_sparsity)]
        assert timeless(row) == timeless(dataclasses.replace(other, seed=0, epoch=0))
        assert (row.mask_seconds > 0) == (row.target_sparsity > 0)


# Unit-pruned levels as smaller networks


def test_smaller_networks_train_and_score_as_masked_ones():
    params = init(jax.random.key(0))
    setup = make_setup(NETWORK, DATA, Study(levels=LEVELS), None, ADAM, params, {})
    programs = Programs(setup)
    masks = jp.unit_masks(params, [0.25, 0.75], prunable=setup.prunable)
    carry = init_state(NETWORK, jax.random.key(0), ADAM)
    carry = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), carry)
    x, y = setup.data.train
    batches, key = batch_indices(jax.random.key(1), len(y), 32), jax.random.key(2)
    args = x, y, batches, key, np.int32(0), np.int32(len(batches))

    assert parts.elementwise(carry, masks, setup)
    smaller = parts.compact(carry, masks, setup, setup.joined)
    shapes = [[leaf.shape for leaf in jax.tree.leaves(part.carry.params)] for part in smaller]
    assert shapes == [[(1, 8, n), (1, n, m), (1, m, 3)] for n, m in ((12, 9), (4, 3))]
    trained, losses, _ = programs.train(smaller, *args)
    whole, masked_losses, _ = programs.train([parts.Part(carry, masks)], *args)
    np.testing.assert_allclose(losses, masked_losses, rtol=1e-4)
    small = parts.expand(trained, setup)
    masked = whole[0].carry
    assert jax.tree.structure(small) == jax.tree.structure(masked)
    # What leaves a pruned unit does nothing, and is zero in the smaller networks.
    alive = jax.tree.map(lambda leaf: jnp.any(leaf, axis=1), masks)
    for name, before in (("hidden_1", "hidden_0"), ("logits", "hidden_1")):
        living = alive[before]["kernel"][:, :, None]
        for of in (lambda c: c.params, lambda c: c.opt_state[0].mu):
            leaf = jnp.where(living, of(masked)[name]["kernel"], 0)
            np.testing.assert_allclose(of(small)[name]["kernel"], leaf, rtol=2e-3, atol=1e-5)

    scored, labels, _ = programs.score(trained, np.zeros(90, np.int32))
    of_masked, _, _ = programs.score(whole, np.zeros(90, np.int32))
    np.testing.assert_allclose(scored["loss"], of_masked["loss"], rtol=1e-4)
    np.testing.assert_array_equal(scored["churn"], of_masked["churn"])
    assert labels is None


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(optax.lamb(1e-2), id="lamb", marks=pytest.mark.slow),
        pytest.param(optax.adafactor(1e-2, min_dim_size_to_factor=4), id="adafactor"),
    ],
)
def test_an_optimizer_that_is_not_elementwise_trains_masked(optimizer, monkeypatch):
    asked, ask = [], stages.elementwise
    monkeypatch.setattr(stages, "elementwise", lambda *args: asked.append(0) or ask(*args))
    notes, study = [], {"levels": (0.0, 50.0), "epochs": 3, "protocols": ("trained",)}
    rows = sweep(optimizer=optimizer, granularities=("unit",), report=notes.append, **study)
    assert any("units stay, masked" in str(note) for note in notes)
    assert len(asked) == 1  # of two epochs after which the masks stay
    # The same by weights: it does not fail, and nothing is noted.
    assert len(rows) == 6 and all(row.metrics["loss"] for row in rows)


@pytest.mark.parametrize(
    ("change", "widths"),
    [
        ({}, 2),
        pytest.param({"levels": (0.0, 25.0, 50.0, 75.0)}, 3, marks=pytest.mark.slow),
        pytest.param({"levels": (0.0, 50.0, 50.01)}, 1, marks=pytest.mark.slow),
    ],
)
def test_programs_are_compiled_once_for_all_levels_and_once_a_distinct_width(
    full, tmp_path, change, widths
):
    folder = full[0]  # of two seeds: none compiles anew
    if change:
        sweep(folder := tmp_path / "run", **change)
    # Training and scoring of one network and of all levels (weight and unit share them), scoring
    # dense with predictions and without, and two selections by two granularities; then training
    # and scoring of every width.
    assert jp.load_run(folder).config["compilations"] == 8 + 2 * widths


def test_dropout_does_not_compile_what_is_scored_anew_for_every_set_of_units(tmp_path):
    """The masks of five epochs keep other units; of training, dropout's bits differ by them."""

    def train(params, state, x, key):
        hidden = jax.nn.relu(x @ params["hidden_0"]["kernel"])
        hidden = jnp.where(jax.random.bernoulli(key, 0.5, hidden.shape), hidden, 0)
        hidden = jax.nn.relu(hidden @ params["hidden_1"]["kernel"])
        return hidden @ params["logits"]["kernel"], state

    study = {"levels": (0.0, 50.0), "granularities": ("unit",), "protocols": ("one_shot",)}
    notes = []
    sweep(tmp_path / "run", NETWORK._replace(train=train), report=notes.append, **study)
    # Training, scoring dense and pruned, and a selection.
    assert jp.load_run(tmp_path / "run").config["compilations"] == 4
    assert notes[0].done < notes[-1].done == 1.0 and notes[-1].seconds_left == 0


@pytest.mark.parametrize(
    ("work", "seconds", "left"), [(9, 0.5, None), (10, 0.5, 4.5), (1, 1.0, 99.0), (0, 0.0, None)]
)
def test_time_left_is_told_after_a_second_of_running_or_a_tenth_of_the_work(work, seconds, left):
    notes = []
    meter = Meter(notes.append)
    meter.work = 100
    meter.add(work, seconds)
    meter.tell(0, None, 1, 2, levels=(0.0,), losses=(1.0,), rate=10.0, compiling=8.0)
    assert notes[0].seconds_left == left
    assert str(notes[0]).endswith(" left" if left else "8 s of compiling so far")


@pytest.mark.slow
def test_traces_do_not_depend_on_seeds(full):
    traced = Traced()
    sweep(network=traced.network)
    assert traced.times == full[2] > 0


# Settings at their ends


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"levels": (50.0, 90.0), "protocols": ("trained",), "granularities": ("unit",)},
            {("trained", "unit", 0.5), ("trained", "unit", 0.9)},
        ),
        (
            {"levels": (0.0, 75.0, 80.0), "protocols": ("one_shot",), "granularities": ("weight",),
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
    rows = sweep(tmp_path / "run", epochs=2, **changes)
    found = Counter((r.protocol, r.granularity, r.target_sparsity, r.epoch) for r in rows)
    assert found == Counter((*key, epoch) for key in expected for epoch in (1, 2))
    assert sweep(tmp_path / "run", epochs=2, **changes) == rows
    assert len(jp.load_run(tmp_path / "run").rows) == len(rows)


def test_one_epoch_is_all_pruning():
    rows = sweep(epochs=1, granularities=("unit",))
    assert {row.epoch for row in rows} == {1}
    assert all(row.sparsity > 0 for row in rows if row.target_sparsity > 0)


def test_a_layer_pruned_whole_is_legal_and_warned_of_once():
    # 99% of 12 and of 16 units are 11.88 and 15.84: all of them, by rounding.
    changes = {"epochs": 2, "levels": (0.0, 50.0, 99.0), "granularities": ("unit",)}
    with pytest.warns(UserWarning, match="every unit of hidden_0/kernel, hidden_1/") as caught:
        rows = sweep(**changes)
    assert len(caught) == 1
    constant = pick(rows, target_sparsity=0.99, epoch=2)
    assert len(constant) == 2
    for row in constant:
        assert row.sparsity == 1.0
        assert row.metrics["loss"] == pytest.approx(np.log(CLASSES), rel=1e-6)
        assert row.metrics["temperature"] == 1.0
        assert Counter(row.metrics["class_accuracy"]) == {0.0: 2, 1.0: 1}
    study = Study(levels=(50.0, 100.0), granularities=("weight",))
    with pytest.warns(UserWarning, match="every weight of hidden_0/kernel, hidden_1/") as caught:
        curve = jp.prune_curve(apply, init(jax.random.key(0)), DATA, study)
    assert len(caught) == 1
    assert [row.sparsity for row in curve] == [0.5, 1.0]


@pytest.mark.parametrize("size", [1, 301])
def test_a_bad_batch_size_leaves_nothing_behind(tmp_path, size):
    if size > 300:
        with pytest.raises(ValueError, match=r"batch_size must be in \[1, 300\], .* got 301"):
            sweep(tmp_path / "run", batch_size=size)
        assert not (tmp_path / "run").exists()


# Losses and scores that are not finite


def test_a_diverged_level_is_marked_and_the_others_go_on(tmp_path):
    def update(updates, state, params=None):
        """Follow the gradient, and fail once nine tenths of a layer are pruned."""
        assert isinstance(params, dict)
        broken = jnp.mean(params["hidden_0"]["kernel"] == 0) > 0.85
        return jax.tree.map(lambda g: jnp.where(broken, jnp.nan, -0.1 * g), updates), state

    optimizer: Any = optax.GradientTransformation(optax.sgd(0.1).init, update)
    notes = []
    rows = sweep(
        tmp_path / "run", optimizer=optimizer, granularities=("unit",), seeds=2,
        report=notes.append,
    )  # fmt: skip
    assert any(
        "not finite at epoch 4, level 90%, seed 1 (magnitude unit layer trained)" in str(note)
        for note in notes
    )
    lost = [row for row in rows if row.metrics["val_loss"] is None]
    assert Counter((row.seed, row.epoch, row.target_sparsity) for row in lost) == Counter(
        itertools.product((0, 1), (4, 5), (0.9,))
    )
    assert len(rows) == 2 * 2 * 5 * 3


def test_a_dense_network_that_diverges_stops_the_run(tmp_path):
    with pytest.raises(NotFinite, match=r"not finite at epoch 1, level 0%, seed 0 \(dense\)"):
        sweep(tmp_path / "run", optimizer=optax.sgd(1e30))


@pytest.mark.parametrize(
    ("broken_at", "message"),
    [
        (None, "leaf 'hidden_1/kernel' at epoch 1, seed 0"),
        pytest.param(0.3, "at epoch 4, seed 0", marks=pytest.mark.slow),
    ],
)
def test_scores_that_are_not_finite_stop_the_run_and_keep_the_rows(tmp_path, broken_at, message):
    def late(params):
        """Magnitude, but of the second layer NaN once some of it is pruned."""
        pruned = jnp.mean(params["hidden_1"]["kernel"] == 0)
        bad = True if broken_at is None else pruned > broken_at
        scores = jax.tree.map(jnp.abs, params)
        scores["hidden_1"]["kernel"] *= jnp.where(bad, jnp.nan, 1.0)
        return scores

    with pytest.raises(NotFinite, match=f"criterion late gives scores .* {message}"):
        sweep(tmp_path / "run", criteria=(late,), granularities=("weight",), levels=(0.0, 35.0))
    rows = jp.load_run(tmp_path / "run").rows
    assert len(rows) == (0 if broken_at is None else 2 * 2 * 5 - 2)
    if broken_at is None:
        study = Study(criteria=(late,), levels=LEVELS)
        with pytest.raises(NotFinite, match=r"leaf 'hidden_1/kernel' \(late weight layer one_sh"):
            jp.prune_curve(apply, init(jax.random.key(0)), DATA, study)


def test_a_network_given_with_nan_is_told_from_one_that_diverged():
    params = jax.tree.map(lambda w: w * jnp.nan, init(jax.random.key(0)))
    with pytest.raises(NotFinite, match=r"^the loss of the network as it is given is not finite$"):
        jp.prune_curve(apply, params, DATA, Study(levels=LEVELS))


def test_splits_of_lists_are_named():
    params, (x, y) = init(jax.random.key(0)), DATA.val
    for val, named in (((x, y.tolist()), "val y"), ((x.tolist(), y), "val x"), ((x, 3), "val y")):
        with pytest.raises(TypeError, match=f"{named} must be an array of examples, got"):
            jp.prune_curve(apply, params, DATA._replace(val=val))


# Arms


def test_criteria_and_scopes_stand_side_by_side_and_share_the_dense_run(tmp_path):
    criteria, notes = ("magnitude", "random", "saliency"), []
    rows = sweep(tmp_path / "run", criteria=criteria, scopes=("layer", "global"), epochs=2,
                 granularities=("weight",), report=notes.append)  # fmt: skip
    assert len(rows) == 3 * 2 * 2 * 2 * 3
    dense = pick(rows, target_sparsity=0.0, epoch=2)
    assert len(dense) == 12 and len({row.metrics["loss"] for row in dense}) == 1
    pruned = pick(rows, target_sparsity=0.9, epoch=2, protocol="one_shot")
    assert len({row.metrics["loss"] for row in pruned}) == 6
    run = jp.load_run(tmp_path / "run")
    for row in pick(rows, epoch=2, scope="global"):
        masks = run.network(row.arm, 0, 100 * row.target_sparsity).masks
        kept = [np.mean(masks[name]["kernel"]) for name in ("hidden_0", "hidden_1")]
        assert row.sparsity == jp.num_pruned(WEIGHTS, row.target_sparsity) / WEIGHTS
        if row.target_sparsity and row.criterion == "magnitude":
            assert abs(kept[0] - kept[1]) > 0.02  # else it might be by layer
    assert {str(note.arm) for note in notes if not isinstance(note, str) and note.arm} == {
        str(of) for of in run.arms if of.protocol == "trained"
    }
    tables = results.tables(rows, run.metrics)
    text = "\n".join(map(results.text, tables))
    assert all(name in text for name in (*criteria, "global"))


def test_saliency_sees_training_examples_alone_and_follows_its_formula(tmp_path):
    params = init(jax.random.key(0))
    study = Study(criteria=("saliency",), granularities=("weight",), levels=(0.0, 50.0),
                  score_batch=300)  # fmt: skip
    setup = make_setup(NETWORK, DATA, study, None, ADAM, params, {})
    batch = setup.batch(jax.random.key(5))
    assert len(batch.x) == 300  # all of them, in some order
    np.testing.assert_array_equal(np.sort(batch.x, axis=0), np.sort(DATA.train.x, axis=0))

    def loss(params):
        logits = apply(params, DATA.train.x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, DATA.train.y).mean()

    gradient = jax.grad(loss)(params)
    expected = jax.tree.map(lambda w, g: jnp.abs(w * g), params, gradient)
    found = setup.scores("saliency", params, {}, batch)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_two_criteria_of_one_name_are_refused():
    study = Study(criteria=(lambda p: p, lambda p: jax.tree.map(jnp.abs, p)))
    with pytest.raises(ValueError, match="two criteria are named '<lambda>': give names"):
        jp.run_sweep(NETWORK, DATA, study, report=silent)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (lambda params: {"w": 1.0}, "criterion <lambda>: .*no leaf"),
        (lambda params: jax.tree.map(lambda w: w[:1], params), "<lambda>: leaf .* has shape"),
        (lambda params: jax.tree.map(lambda w: float(w.sum()), params), "cannot be traced"),
    ],
)
def test_a_criterion_that_does_not_fit_is_refused_before_training(tmp_path, criterion, message):
    with pytest.raises(ValueError, match=message):
        sweep(tmp_path / "run", criteria=(criterion,))
    assert not (tmp_path / "run").exists()


def test_stacking_is_the_inverse_of_unstacking():
    tree = {"a": np.arange(6).reshape(2, 3), "b": [np.ones((2, 1))]}
    for again in (trees.stack(trees.unstack(tree)), trees.unstack(trees.stack([tree, tree]))[1]):
        assert_same_leaves(again, tree)
