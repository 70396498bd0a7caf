"""What is pruned as one, on arrays of a few numbers, and of Equinox kernels, (outputs, inputs)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune import distribution, masks
from jaxprune.granularity import unit, unit_norms, weight
from jaxprune.structure import Layer, layers, prunable

PARAMS = {
    "bias": jnp.ones(2),
    "kernel": jnp.array([[3.0, 1.0], [4.0, 0.0], [0.0, 2.0]]),
    "steps": jnp.ones((2, 2), jnp.int32),
}
KERNEL = [Layer("kernel", "dense", (1,), (0,), False)]  # as of Equinox


def listed(tree):
    return jax.tree.map(lambda x: np.asarray(x).tolist(), tree)


def test_weights_by_hand():
    pieces = weight().rank(PARAMS)
    assert listed(pieces) == {"bias": [], "kernel": [3.0, 1.0, 4.0, 0.0, 0.0, 2.0], "steps": []}
    assert listed(weight().cost(PARAMS)) == {"bias": [], "kernel": [1] * 6, "steps": []}
    kept = {"bias": jnp.ones(0, bool), "kernel": pieces["kernel"] > 1, "steps": jnp.ones(0, bool)}
    assert listed(weight().spread(kept, PARAMS)) == {
        "bias": [True, True],
        "kernel": [[True, False], [True, False], [False, True]],
        "steps": [[True, True], [True, True]],
    }


@pytest.mark.parametrize(
    ("granularity", "ranked", "cost", "mask"),
    [
        (unit(), [5.0, 5**0.5], 3, [[True, False]] * 3),
        (unit(layers=KERNEL), [10**0.5, 4.0, 2.0], 2, [[False] * 2, [True] * 2, [False] * 2]),
    ],
)
def test_units_by_hand(granularity, ranked, cost, mask):
    for tree in (PARAMS, jax.tree.map(np.asarray, PARAMS)):
        pieces = granularity.rank(tree)
        np.testing.assert_allclose(pieces["kernel"], ranked, rtol=1e-6)
        assert {name: leaf.size for name, leaf in pieces.items() if leaf.size} == {
            "kernel": len(ranked)
        }
        shapes = jax.eval_shape(lambda tree: tree, tree)
        assert granularity.cost(shapes)["kernel"].tolist() == [cost] * len(ranked)
        kept = jax.tree.map(lambda x: jnp.stack([x > 3.5, x > 100]), pieces)
        found = granularity.spread(kept, tree)
        assert found["kernel"][0].tolist() == mask
        assert not found["kernel"][1].any()
        assert found["bias"].shape == (2, 2)
        assert found["bias"].all() and found["steps"].all()


def test_units_of_several_output_axes_are_flattened():
    """Of attention: queries of two heads of two, over three features; and of stacked layers."""
    kernel = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    for contracted, outputs in [((0,), (1, 2)), ((1,), (0, 2)), ((0, 1), (2,))]:
        chosen = unit(layers=[Layer("kernel", "dense", contracted, outputs, False)])
        ranked = jax.jit(chosen.rank)({"kernel": kernel})["kernel"]
        expected = np.sqrt((kernel**2).sum(contracted)).ravel()
        np.testing.assert_allclose(ranked, expected, rtol=1e-6)
        mask = chosen.spread({"kernel": jnp.arange(expected.size) != 1}, {"kernel": kernel})
        lost = np.moveaxis(~np.asarray(mask["kernel"]), contracted, range(len(contracted)))
        lost = lost.reshape(-1, expected.size)
        assert lost[:, 1].all()
        assert lost.sum() == lost[:, 1].size


def test_of_layers_the_first_product_counts_and_never_a_lookup():
    kernel = {"kernel": jnp.array([[3.0, 1.0], [4.0, 0.0]])}
    lookup, first, second = (Layer("kernel", "embedding", (0,), (1,), False),
                             Layer("kernel", "dense", (1,), (0,), False),
                             Layer("kernel", "dense", (0,), (1,), True))  # fmt: skip
    chosen = unit({"kernel": True}, [lookup, first, second])
    np.testing.assert_allclose(chosen.rank(kernel)["kernel"], [10**0.5, 4.0], rtol=1e-6)
    assert unit(layers=[first, second]).rank(kernel)["kernel"].size == 0  # it is last as well
    assert unit(layers=[lookup, first]).rank(kernel)["kernel"].size == 0


def test_units_that_are_not_known():
    for known in ([], [Layer("kernel", "embedding", (0,), (1,), False)]):
        chosen = unit({"bias": False, "kernel": True, "steps": False}, known)
        for f in (chosen.rank, chosen.cost):
            message = r"leaf 'kernel', of shape \(3, 2\), is the weights of no layer.*`prunable`"
            with pytest.raises(ValueError, match=message):
                f(PARAMS)
    with pytest.raises(ValueError, match=r"leaf 'a', of shape \(\), is the weights of no layer"):
        unit(lambda path, leaf: True).rank({"a": jnp.float32(1)})


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1.0, 1e19, 1e30])
def test_norms_neither_vanish_nor_overflow(scale):
    """In float32 the squares do."""
    x = np.random.default_rng(5).random((8, 3, 5)) * scale
    expected = np.sqrt((np.asarray(x, np.float64) ** 2).sum((0, 2)))
    for f in (unit_norms, jax.jit(unit_norms, static_argnums=1)):
        np.testing.assert_allclose(f(jnp.asarray(x, jnp.float32), (1,)), expected, rtol=1e-6)
    assert unit_norms(jnp.asarray(x) > 0.5 * scale, (1,)).dtype == bool


def test_units_of_equinox_are_its_outputs():
    """Kernels are (outputs, inputs), the last layer's outputs stay, and so do the inputs."""
    mlp = eqx.filter_eval_shape(eqx.nn.MLP, 4, 3, 8, 2, key=jax.random.key(0))
    shapes, rest = eqx.partition(mlp, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)

    def apply(params, x):
        return jax.vmap(eqx.combine(params, rest))(x)

    found = layers(apply, params, jnp.ones((5, 4)))
    got = jax.jit(lambda params: masks.unit_masks(params, 0.5, layers=found))(params)
    for layer in got.layers[:2]:
        mask = np.asarray(layer.weight)
        assert (mask == mask[:, :1]).all()  # whole rows
        assert mask[:, 0].sum() == 4
        assert layer.bias.all()
    assert got.layers[2].weight.all()
    norms = np.linalg.norm(params.layers[0].weight, axis=1)
    lost = np.flatnonzero(~np.asarray(got.layers[0].weight)[:, 0])
    np.testing.assert_array_equal(lost, np.sort(np.argsort(norms)[:4]))
    chosen = prunable(apply, params, jnp.ones((5, 4)))
    again = jax.jit(lambda p: masks.unit_masks(p, 0.5, prunable=chosen, layers=found))(params)
    jax.tree.map(np.testing.assert_array_equal, again, got)
    assert masks.sparsity_of(got, prunable=chosen) == 0.5


@pytest.mark.parametrize(
    ("granularity", "scope", "jit"),
    [
        (weight(), "layer", jax.jit),
        pytest.param(weight(), "global", lambda f: f, marks=pytest.mark.slow),
        (unit(), "global", jax.jit),
    ],
)
def test_leaves_on_an_explicit_mesh(granularity, scope, jit):
    """There no array can be reshaped or sorted along a sharded axis, nor masked by another's."""
    mesh = jax.make_mesh((2,), ("devices",), devices=jax.devices()[:2])
    whole = {"a": np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)}
    counts = distribution.counts(whole, [0.25, 0.5], granularity=granularity, scope=scope)

    def pruned(params, counts):
        kept = masks.masks_at(params, counts, granularity=granularity)
        first = jax.tree.map(lambda mask: mask[0], kept)
        nested = masks.masks_at(params, counts, granularity=granularity, within=first)
        return kept, nested, masks.apply_masks(params, first)

    expected = jit(pruned)(whole, counts)
    for spec in [("devices", None), (None, "devices")]:
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        found = jit(pruned)({"a": jax.device_put(whole["a"], sharding)}, counts)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert tuple(found[0]["a"].sharding.spec) == (None, *spec)
        assert found[2]["a"].sharding == sharding
