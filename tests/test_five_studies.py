"""Studies of all kinds of networks and tasks, from data to loaded networks, small enough to test.

Criteria beside each other, BatchNorm, dropout, tokens and numbers; in Linen, NNX and Equinox.
"""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune as jp
from jaxprune import data, networks, results
from jaxprune.config import Arm, Study
from jaxprune.data import Data, Split
from jaxprune.evaluate import evaluate_levels
from jaxprune.networks import NETWORKS, Example
from jaxprune.study import setup
from jaxprune.trees import paths_and_leaves, stack
from tests.studies import assert_same_rows, silent

slow = pytest.mark.slow
UNIT = Arm("magnitude", "unit", "layer", "trained")


# Networks and data ---------------------------------------------------------------------------


class Normed(nn.Module):
    """A convolution, BatchNorm and a dense layer, in Linen."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(6, (3, 3), 2, use_bias=False, name="conv")(x[..., None])
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9, name="norm")(x))
        return nn.Dense(10, name="output")(x.reshape(len(x), -1))


class Dropped(nnx.Module):
    """A convolution, a dense layer and dropout, in NNX."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 6, (3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(6 * 4 * 4, 12, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.output = nnx.Linear(12, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv(x[..., None]))
        return self.output(self.dropout(nnx.relu(self.hidden(x.reshape(len(x), -1)))))


def images(whole, *sizes, every):
    """The first images of each split, of every so many rows and columns."""
    return Data(*(
        Split(split.x[:size, ::every, ::every], split.y[:size])
        for split, size in zip(whole, sizes, strict=True)
    ))  # fmt: skip


class Given(NamedTuple):
    """What a study is of."""

    network: Any
    data: Data
    study: Study
    rate: float = 1e-2


def normed(fashion_mnist, folder):
    few = images(fashion_mnist, 192, 50, 100, every=4)
    network = networks.linen(Normed(), few.train.x[:2])
    study = Study(levels=(0.0, 50.0), epochs=3, batch_size=32, granularities=("unit",))
    return Given(network, few, study)


def resnet(fashion_mnist, folder):
    few = images(fashion_mnist, 512, 100, 200, every=1)
    network = NETWORKS["resnet20"](Example(few.train.x[:2], 10), width=4, blocks=1)
    return Given(network, few, Study(levels=(0.0, 50.0, 75.0), epochs=3, batch_size=64))


def dropped(fashion_mnist, folder):
    few = images(fashion_mnist, 192, 50, 100, every=4)
    study = Study(levels=(0.0, 50.0), epochs=3, batch_size=32, granularities=("unit",))
    return Given(networks.nnx(Dropped), few, study)


def transformer(fashion_mnist, folder):
    text = folder / "sentences.txt"
    text.write_text("a quick fox jumps over a lazy dog. pack five dozen jugs. " * 60)
    few = data.load(f"text:{text}", context=16)
    example = Example(few.train.x[:2], data.outputs_of(few))
    network = NETWORKS["transformer"](example, blocks=1, width=16, heads=2)
    return Given(network, few, Study(levels=(0.0, 50.0), epochs=3, batch_size=8))


def equinox(fashion_mnist, folder):
    def make(key):
        return eqx.nn.MLP(4, 2, 16, 2, key=key)

    static = eqx.partition(make(jax.random.key(0)), eqx.is_array)[1]
    network = networks.network(
        lambda key: eqx.partition(make(key), eqx.is_array)[0],
        lambda params, x: jax.vmap(eqx.combine(params, static))(x),
    )
    rng, splits = np.random.default_rng(0), []
    for size in (800, 100, 200):
        x = rng.normal(size=(size, 4)).astype(np.float32)
        splits.append(Split(x, np.stack([x[:, 0] + x[:, 1], np.sin(x[:, 2])], 1)))
    study = Study(levels=(0.0, 50.0), epochs=3, batch_size=32, granularities=("unit",))
    return Given(network, Data(*splits), study)


GIVEN = {f.__name__: f for f in (normed, resnet, dropped, transformer, equinox)}


# A run of each -------------------------------------------------------------------------------


class Done(NamedTuple):
    """A finished run, and what it is of."""

    given: Given
    run: results.Run


def sweep(given, folder=None, report=silent):
    return jp.run_sweep(
        given.network, given.data, given.study, optimizer=optax.adam(given.rate), run_dir=folder,
        report=report,
    )  # fmt: skip


def of(*names):
    """Give a test the runs of these names."""
    slow = {"resnet", "transformer", "dropped", "equinox"}
    marks = {name: pytest.mark.slow if name in slow else () for name in names}
    params = [pytest.param(name, marks=marks[name]) for name in names]
    return pytest.mark.parametrize("done", params, indirect=True)


@pytest.fixture(scope="module")
def done(request, fashion_mnist, tmp_path_factory):
    """A finished run."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    given = GIVEN[name](fashion_mnist, folder)
    with pytest.MonkeyPatch.context() as patch:
        if name in ("normed", "dropped"):  # too small for the measurement to be always the same
            patch.setattr(setup, "steps_on_host", lambda *_: name == "normed")
        sweep(given, folder / "run")
        yield Done(given, jp.load_run(folder / "run"))


@slow
@of("normed", "resnet")
def test_stopped_with_smaller_networks_in_training_it_goes_on_with_the_same_rows(done, tmp_path):
    def stop(what):
        if not isinstance(what, str) and (what.arm, what.epoch) == (UNIT, 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(done.given, tmp_path / "run", stop)
    assert_same_rows(done.run.rows, sweep(done.given, tmp_path / "run"))


@of(*GIVEN)
def test_loaded_networks_score_under_masks_as_their_rows_say(done):
    given, run = done
    target = jax.eval_shape(given.network.init, jax.random.key(0))
    levels = run.config["levels"][0]
    for arm in run.arms:
        params, state, masks = stack([run.network(arm, 0, level, target) for level in levels])
        for leaf, mask in zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True):
            assert arm.protocol == "one_shot" or not np.any(np.asarray(leaf)[~np.asarray(mask)])
        found, _ = evaluate_levels(given.network, params, masks, given.data, state=state)
        rows = [row for row in run.rows if row.arm == arm and row.epoch == given.study.epochs]
        assert [100 * row.target_sparsity for row in rows] == levels
        for name in rows[0].metrics:
            expected = [row.metrics[name] for row in rows]
            np.testing.assert_allclose(found[name], expected, rtol=2e-3, atol=2e-5)
        remaining = [row.remaining for row in rows]
        assert remaining == sorted(remaining, reverse=True) and len(set(remaining)) == len(levels)


# What each is there for ----------------------------------------------------------------------


@slow
def test_magnitude_and_saliency_are_above_random_on_fashion_mnist(fashion_mnist):
    few = images(fashion_mnist, 4000, 200, 1000, every=1)
    network = NETWORKS["mlp"](Example(few.train.x[:2], 10), hidden_sizes=(64, 32))
    criteria = ("magnitude", "saliency", "random")
    study = Study(levels=(0.0, 80.0), seeds=2, criteria=criteria, protocols=("one_shot",),
                  granularities=("weight",), batch_size=64)  # fmt: skip
    rows = sweep(Given(network, few, study, 3e-3))
    arms = {row.criterion: row.arm for row in rows}
    for name in ("magnitude", "saliency"):
        mean, _ = results.difference(rows, arms[name], arms["random"], 0.8, "accuracy")
        assert mean > 0.15


def different(one, other):
    """Tell whether all leaves of two trees differ."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.shape(a) == np.shape(b) and not np.array_equal(a, b) for a, b in pairs)


def equal(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


@of("normed", "resnet")
def test_each_level_has_a_state_of_its_own_and_steps_run_on_the_host(done):
    run, one_shot = done.run, UNIT._replace(protocol="one_shot")
    assert run.config["stepped"]
    first = done.given.network.init(jax.random.key(0))[1]
    dense, pruned = (run.network(UNIT, 0, level).state for level in (0, 50))
    assert different(dense, first) and different(pruned, first) and different(pruned, dense)
    assert equal(run.network(one_shot, 0, 50).state, dense)
    for level in run.config["levels"][0]:
        params, state, masks = run.network(UNIT, 0, level)
        for path, mask in paths_and_leaves(masks):
            if path.endswith("norm/scale"):  # a unit takes its running statistics along
                layer = path.removesuffix("/scale")
                statistics = dict(paths_and_leaves(state))
                for name in ("mean", "var"):
                    assert not np.any(statistics[f"batch_stats/{layer}/{name}"][~mask])


@of("normed")
def test_recalibration_changes_one_shot_networks_and_the_state_that_is_returned(done, tmp_path):
    given, arm = done.given, UNIT._replace(protocol="one_shot")
    study = dataclasses.replace(given.study, recalibrate=4, protocols=("one_shot",))
    rows = sweep(given._replace(study=study), tmp_path)
    run = jp.load_run(tmp_path)
    assert run.config["settings"]["recalibrate"] == 4
    before = [row for row in done.run.rows if row.arm == arm]
    for row, old in zip(rows, before, strict=True):
        same = row.target_sparsity == 0
        assert (row.metrics == old.metrics) == same and row.remaining == old.remaining
    dense, pruned = run.network(arm, 0, 0), run.network(arm, 0, 50)
    assert equal(dense.params, pruned.params) and different(dense.state, pruned.state)
    params, state, masks = stack([dense, pruned])
    found, _ = evaluate_levels(given.network, params, masks, given.data, state=state)
    expected = [row.metrics["loss"] for row in rows if row.epoch == 3]
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-4)


@of("dropped")
def test_dropout_draws_in_training_alone(done):
    network, x = done.given.network, done.given.data.test.x
    params, state, _ = done.run.network(UNIT, 0, 0)
    trained = [network.train(params, state, x, jax.random.key(i))[0] for i in (0, 0, 1)]
    assert equal(trained[0], trained[1]) and different(trained[0], trained[2])
    assert equal(network.apply(params, state, x), network.apply(params, state, x))


@of("transformer")
def test_tokens_are_the_default_task_and_perplexity_falls_below_the_vocabulary(done):
    run, vocabulary = done.run, data.outputs_of(done.given.data)
    assert run.config["settings"]["task"] == "tokens"
    assert run.metrics[0].name == "perplexity" and run.metrics[0].chance == vocabulary
    last = [row.metrics["perplexity"] for row in run.rows if row.epoch == 3]
    assert len(last) == 8 and max(last) < vocabulary / 2


@of("equinox")
def test_numbers_are_learnt_and_units_are_outputs_of_kernels_outputs_by_inputs(done):
    run = done.run
    assert run.config["settings"]["task"] == "regression"
    rows = {row.target_sparsity: row for row in run.rows if row.arm == UNIT and row.epoch == 3}
    assert rows[0.0].metrics["r2"] > 0.9 and rows[0.5].metrics["r2"] > 0.3
    target = jax.eval_shape(done.given.network.init, jax.random.key(0))
    _, _, masks = run.network(UNIT, 0, 50, target)
    for layer in masks.layers[:2]:
        kept = layer.bias
        assert layer.weight.shape[0] == 16 and kept.sum() == 8
        np.testing.assert_array_equal(
            layer.weight, np.repeat(kept[:, None], layer.weight.shape[1], 1)
        )
    assert masks.layers[2].weight.all() and masks.layers[2].bias.all()
    assert rows[0.5].remaining == 8 * 5 + 8 * 9 + 2 * 9
