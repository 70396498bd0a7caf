"""How a sparsity is shared out among layers, against formulas and by trying all ways."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.criteria.allocation import by_loss, owl
from jaxprune.distribution import own
from jaxprune.types import Batch, Problem

RNG = np.random.default_rng(0)
SHAPES = {"a": (40, 30), "b": (30, 4), "conv": (3, 3, 2, 8), "tiny": (2, 2), "bias": (30,)}
PARAMS = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
PRUNABLE = [name for name, shape in SHAPES.items() if len(shape) > 1]
TOTAL = sum(PARAMS[name].size for name in PRUNABLE)
LEVELS = [0, 0.1, 0.5, 0.9, 0.99, 1]


@pytest.mark.parametrize("level", [0.1, 0.5, 0.9, 0.99])
def test_erk_is_its_formula(level):
    found = jp.counts(PARAMS, level, scope="erk")
    kept = {name: PARAMS[name].size - int(found[name]) for name in PRUNABLE}
    raw = {name: sum(SHAPES[name]) / np.prod(SHAPES[name]) for name in PRUNABLE}
    whole = {name for name in PRUNABLE if kept[name] == PARAMS[name].size}
    assert whole if level < 0.9 else "a" not in whole  # some saturate
    scales = [kept[name] / PARAMS[name].size / raw[name] for name in PRUNABLE if name not in whole]
    slack = max(1 / (PARAMS[name].size * raw[name]) for name in PRUNABLE)
    assert np.ptp(scales) <= 2 * slack
    assert all(raw[name] * min(scales) >= 1 - 2 * slack for name in whole)
    assert sum(kept.values()) == TOTAL - jp.num_pruned(TOTAL, level)
    assert found["bias"] == 0


def sums(found):
    return np.sum([np.asarray(leaf) for leaf in jax.tree.leaves(found)], axis=0)


def test_erk_is_exact_and_rises_with_the_level():
    levels = [*np.linspace(0, 1, 41)]
    found = jp.counts(PARAMS, levels, scope="erk")
    assert sums(found).tolist() == [jp.num_pruned(TOTAL, level) for level in levels]
    assert all((np.diff(leaf) >= 0).all() for leaf in found.values())
    assert (found["a"][[0, -1]] == [0, PARAMS["a"].size]).all()
    with pytest.raises(ValueError, match="scope erk shares weights out among leaves"):
        graph = jp.dependency_graph(
            lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
            {"a": PARAMS["a"], "b": PARAMS["b"]}, np.ones((2, 40), "f"),
        )  # fmt: skip
        tree = {"a": PARAMS["a"], "b": PARAMS["b"]}
        jp.counts(tree, 0.5, granularity=jp.group(graph), scope="erk")


def test_ones_own_map():
    scope = own({"a": 0.25, "b*": 0, "*": 0.5})
    found = jp.counts(PARAMS, [0.9, 0.95], scope=scope)
    assert found["a"].tolist() == [300, 300]
    assert found["b"].tolist() == [0, 0]
    assert found["conv"].tolist() == [72, 72]
    assert found["bias"].tolist() == [0, 0]
    found = jp.counts(PARAMS, 0.5, scope=own({"a": 1}))
    assert (found["a"], found["b"]) == (1200, 60)
    found = jp.counts(PARAMS, 0.8, scope=own(lambda path, level: level if path == "a" else 0))
    assert (found["a"], found["b"]) == (960, 0)
    with pytest.raises(ValueError, match="'hidden' fits none of what is pruned: a, b, conv, tiny"):
        jp.counts(PARAMS, 0.5, scope=own({"hidden": 0.5}))
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\]"):
        jp.counts(PARAMS, 0.5, scope=own({"a": 2}))


def mlp(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


NETWORK = {"a": PARAMS["a"], "b": PARAMS["b"]}
X = RNG.normal(size=(60, 40)).astype(np.float32) * np.where(np.arange(40) < 3, 20, 1)
BATCH = Batch(X.astype("f"), np.asarray(mlp(NETWORK, X.astype("f"))), jax.random.key(0))
PROBLEM = Problem(mlp, lambda p, b: jnp.sum((mlp(p, b.x) - b.y) ** 2, 1))


@pytest.mark.parametrize("level", [0.3, 0.5, 0.7, 0.97])
def test_owl_is_its_formula(level):
    found = jp.counts(NETWORK, level, scope=owl, problem=PROBLEM, batch=BATCH)
    ratios, sizes = [], np.array([NETWORK[name].size for name in "ab"])
    for name, x in (("a", BATCH.x), ("b", np.maximum(BATCH.x @ NETWORK["a"], 0))):
        scores = np.abs(NETWORK[name]) * np.sqrt((x.astype("d") ** 2).sum(0))[:, None]
        ratios.append((scores > 5 * scores.mean()).mean())
    assert ratios[0] != ratios[1]
    offset = (0.02 if level == 0.97 else 0.16) * np.array(ratios) / np.ptp(ratios)
    offset -= np.average(offset, weights=sizes)
    expected = sizes * (level - offset)
    np.testing.assert_allclose([found["a"], found["b"]], expected, atol=1)
    assert (expected < sizes).all()
    assert sums(found) == jp.num_pruned(int(sizes.sum()), level)


def test_by_loss_does_as_well_as_any_way_on_its_grid():
    scores = jax.tree.map(np.abs, NETWORK)
    levels = [0, 0.25, 0.5, 0.8, 0.9, 1]
    of = {"problem": PROBLEM, "batch": BATCH, "scores": scores}
    found = jp.counts(NETWORK, levels, scope=by_loss, **of)
    sizes = [NETWORK[name].size for name in "ab"]
    assert sums(found).tolist() == [jp.num_pruned(sum(sizes), level) for level in levels]
    assert all((np.diff(leaf) >= 0).all() for leaf in found.values())

    def loss(a, b):
        masks = jp.masks_at(scores, {"a": np.int32(a), "b": np.int32(b)})
        return float(jnp.mean(PROBLEM.losses(jp.apply_masks(NETWORK, masks), BATCH)))

    grid = [0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99, 1]
    for i in (2, 3):
        a, b = int(found["a"][i]), int(found["b"][i])
        total = loss(a, 0) + loss(0, b)
        for x, y in itertools.product(grid, grid):
            other = jp.num_pruned(sizes[0], x), jp.num_pruned(sizes[1], y)
            if sum(other) >= a + b:  # the sum of what each layer costs alone
                assert total <= 1.1 * (loss(other[0], 0) + loss(0, other[1])) + 1e-6
    with pytest.raises(ValueError, match="scope by_loss needs scores"):
        jp.counts(NETWORK, 0.5, scope=by_loss, problem=PROBLEM, batch=BATCH)


@pytest.mark.parametrize("scope", ["erk", "owl", "by_loss", "global"])
def test_scopes_of_a_study(scope):
    y = RNG.integers(0, 4, 60).astype(np.int32)
    images = jp.data.Split(BATCH.x, y)
    loaded = jp.data.Data(images, images, images)
    params = NETWORK | {"last": RNG.normal(size=(4, 4)).astype("f")}
    apply = lambda p, x: jax.nn.relu(mlp(p, x)) @ p["last"]  # noqa: E731
    kept, size = {}, sum(leaf.size for leaf in NETWORK.values())
    pieces = jp.weight(lambda path, leaf: path != "last")
    criteria = ("magnitude", jp.criteria.method("magnitude+refit", granularity=pieces))
    study = jp.Study(levels=(0, 72), granularities=("weight",), scopes=(scope,),
                     protocols=("one_shot",), criteria=criteria)  # fmt: skip
    rows = jp.prune_curve(
        apply, params, loaded, study, keep=lambda arm, _, masks: kept.update({arm: masks})
    )
    assert {row.sparsity for row in rows} == {0, jp.num_pruned(size, 0.72) / size}
    for masks in kept.values():
        assert np.asarray(masks["a"]).mean() != np.asarray(masks["b"]).mean()
    with pytest.raises(ValueError, match="obs has none|unit.* are of several"):
        jp.prune_curve(apply, params, loaded, jp.Study(
            levels=(50,), granularities=("unit",) if scope in ("erk", "owl") else ("weight",),
            scopes=(scope,), protocols=("one_shot",),
            criteria=("magnitude",) if scope in ("erk", "owl") else (jp.criteria.obs(),),
        ))  # fmt: skip
