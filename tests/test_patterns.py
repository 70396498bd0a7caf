"""Rows, blocks, and n of every m weights, of dense and convolutional kernels and of experts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.granularity import block, n_m, named, row, unit, weight
from jaxprune.structure import Layer

RNG = np.random.default_rng(0)
PARAMS = {
    "bias": np.ones(6, np.float32),
    "conv": RNG.normal(size=(3, 1, 4, 6)).astype(np.float32),
    "dense": RNG.normal(size=(12, 6)).astype(np.float32),
    "experts": RNG.normal(size=(2, 8, 6)).astype(np.float32),
    "torch": RNG.normal(size=(6, 12)).astype(np.float32),
}
LAYERS = [
    Layer("conv", "convolution", (0, 1, 2), (3,), False),
    Layer("dense", "dense", (0,), (1,), False),
    Layer("experts", "dense", (1,), (0, 2), False, batched=(0,)),
    Layer("torch", "dense", (1,), (0,), False),
]
MATRICES = {  # (experts, inputs, outputs)
    "conv": PARAMS["conv"].reshape(1, 12, 6),
    "dense": PARAMS["dense"][None],
    "experts": PARAMS["experts"],
    "torch": PARAMS["torch"].T[None],
}
ALL = ["weight", "unit", "row", "block4x2", "block5x4", "block1x1", "2:4", "1:2"]


def as_matrices(tree):
    return {
        "conv": np.asarray(tree["conv"]).reshape(-1, 12, 6),
        "dense": np.asarray(tree["dense"])[None],
        "experts": np.asarray(tree["experts"]),
        "torch": np.asarray(tree["torch"]).T[None],
    }


def blocks_by_hand(matrix, high, wide):
    """Yield the place of each block."""
    experts, inputs, outputs = matrix.shape
    for e, i, o in itertools.product(
        range(experts), range(0, inputs, high), range(0, outputs, wide)
    ):
        yield e, slice(i, i + high), slice(o, o + wide)


@pytest.mark.parametrize("name", ALL)
def test_masks_are_exact_nested_and_compiled_the_same(name):
    granularity = named(name, layers=LAYERS)
    levels = [0, 0.5] if ":" in name else [0, 0.3, 0.5, 0.9, 1]
    counts = jp.counts(PARAMS, levels, granularity=granularity)
    scores = jax.tree.map(np.abs, PARAMS)
    found = jp.masks_at(scores, counts, granularity=granularity)
    traced = jax.jit(lambda s, c: jp.masks_at(s, c, granularity=granularity))(scores, counts)
    jax.tree.map(np.testing.assert_array_equal, found, traced)
    assert found["bias"].all()
    kept = granularity.rank(jax.tree.map(lambda mask: mask[1:].all(0), found))
    assert all(leaf.dtype == bool for path, leaf in kept.items() if path != "bias")
    for path, mask in found.items():
        mask = np.asarray(mask)
        assert (mask[1:] <= mask[:-1]).all()
        pieces = granularity.cost(PARAMS)[path]
        assert pieces.sum() == (0 if path == "bias" else PARAMS[path].size)
        for level, own in zip(levels, mask, strict=True):
            if pieces.size and len(set(pieces)) == 1:
                gone = jp.num_pruned(pieces.size, level)
                assert (~own).sum() == gone * pieces[0]
    within = jax.tree.map(lambda mask: mask[1], found)
    again = jp.masks_at(scores, counts, granularity=granularity, within=within)
    for mask, first in zip(jax.tree.leaves(again), jax.tree.leaves(within), strict=True):
        assert not (np.asarray(mask) & ~np.asarray(first)).any()


@pytest.mark.parametrize(("high", "wide"), [(4, 2), (5, 4), (1, 6), (12, 1)])
def test_blocks_are_those_by_hand(high, wide):
    granularity = block(high, wide, layers=LAYERS)
    ranked, cost = granularity.rank(PARAMS), granularity.cost(PARAMS)
    kept = jax.tree.map(lambda x: x > jnp.median(x) if x.size else x > 0, ranked)
    masks = as_matrices(granularity.spread(kept, PARAMS))
    for path, matrix in MATRICES.items():
        places = list(blocks_by_hand(matrix, high, wide))
        norms = [np.sqrt((matrix[at].astype("d") ** 2).sum()) for at in places]
        np.testing.assert_allclose(ranked[path], norms, rtol=1e-6)
        assert cost[path].tolist() == [matrix[at].size for at in places]
        for at, keep in zip(places, np.asarray(kept[path]), strict=True):
            assert (masks[path][at] == keep).all()


def test_blocks_of_one_row_or_column_are_rows_and_units():
    for one, other in [(block(1, 6, layers=LAYERS), row(layers=LAYERS)),
                       (block(12, 1, layers=LAYERS[:2]), unit(layers=LAYERS[:2]))]:  # fmt: skip
        tree = {name: PARAMS[name] for name in ("conv", "dense")}
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
            one.rank(tree),
            other.rank(tree),
        )


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (1, 4), (3, 4)])
def test_exactly_n_of_every_m_inputs_stay(n, m):
    granularity = n_m(n, m, layers=LAYERS)
    counts = jp.counts(PARAMS, (m - n) / m, granularity=granularity)
    found = as_matrices(jp.masks_at(jax.tree.map(np.abs, PARAMS), counts, granularity=granularity))
    for path, matrix in MATRICES.items():
        experts, inputs, outputs = matrix.shape
        windows = found[path].reshape(experts, inputs // m, m, outputs)
        assert (windows.sum(2) == n).all()
        sizes = np.abs(matrix).reshape(windows.shape)
        assert (np.where(windows, sizes, np.inf).min(2) >= np.where(windows, 0, sizes).max(2)).all()


def test_what_cannot_be():
    with pytest.raises(ValueError, match="2:4 prunes nothing of leaf 'conv' or 50%"):
        jp.counts(PARAMS, 0.6, granularity=n_m(2, 4, layers=LAYERS))
    with pytest.raises(ValueError, match="2:4 needs counts of every leaf: scope layer"):
        jp.counts(PARAMS, 0.5, granularity=n_m(2, 4, layers=LAYERS), scope="global")
    with pytest.raises(ValueError, match="'conv' has 12 inputs, which 5 does not divide"):
        jp.counts(PARAMS, 0.2, granularity=n_m(4, 5, layers=LAYERS))
    half = jp.counts(PARAMS, 0.5, granularity=n_m(2, 4, layers=LAYERS))
    with pytest.raises(ValueError, match="counts of leaf 'conv' must be 0 or 36"):
        jp.masks_at(PARAMS, half | {"conv": 35}, granularity=n_m(2, 4, layers=LAYERS))
    for n, m in [(4, 4), (0, 2), (3, 2)]:
        with pytest.raises(ValueError, match="0 < n < m"):
            n_m(n, m)
    with pytest.raises(ValueError, match="sizes of at least 1, got 0x4"):
        block(0, 4)
    for name in ("blocks", "block4", "2:4:1", ""):
        with pytest.raises(ValueError, match="granularities must be among weight, unit, row"):
            named(name)
    assert named("weight").name == weight().name


def test_the_study_prunes_by_rows_blocks_and_windows():
    images = jp.data.Split(RNG.random((64, 8)).astype("f"), RNG.integers(0, 4, 64).astype(np.int32))
    apply = lambda p, x: jax.nn.relu(x @ p["hidden"]) @ p["out"]  # noqa: E731
    params = {"hidden": RNG.normal(size=(8, 16)).astype("f"), "out": np.ones((16, 4), "f")}
    loaded, kept = jp.data.Data(images, images, images), {}
    study = jp.Study(levels=(0, 50), granularities=("row", "block4x4", "2:4"),
                     protocols=("one_shot",), criteria=("magnitude", "wanda"))  # fmt: skip
    rows = jp.prune_curve(
        apply, params, loaded, study,
        keep=lambda arm, params, masks: kept.update({arm: (params, masks)}),
    )  # fmt: skip
    assert {row.sparsity for row in rows} == {0, 0.5}
    assert len(kept) == 6
    for arm, (own, masks) in kept.items():
        mask = np.asarray(masks["hidden"][0])
        np.testing.assert_array_equal(own["hidden"][0], np.where(mask, params["hidden"], 0))
        if arm.granularity == "2:4":
            assert (mask.reshape(2, 4, 16).sum(1) == 2).all()
        if arm.granularity == "row":
            assert set(mask.sum(1)) == {0, 16}
