import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprune import models, sparsity, trees
from jaxprune.masks import apply_masks

CHALLENGE = (1000, 1000, 500, 200)


def layer_names(hidden):
    return [f"hidden_{i}" for i in range(hidden)] + ["logits"]


def tree_of(kernels):
    names = layer_names(len(kernels) - 1)
    return {name: {"kernel": kernel} for name, kernel in zip(names, kernels, strict=True)}


def forward(kernels, x):
    for kernel in kernels[:-1]:
        x = np.maximum(x @ kernel, 0)
    return x @ kernels[-1]


def test_the_challenge_network_has_its_shapes_and_nothing_else():
    init, apply = models.mlp(784, CHALLENGE, 10)
    params = jax.eval_shape(init, jax.random.key(0))
    assert {path: leaf.shape for path, leaf in trees.paths_and_leaves(params)} == {
        "hidden_0/kernel": (784, 1000),
        "hidden_1/kernel": (1000, 1000),
        "hidden_2/kernel": (1000, 500),
        "hidden_3/kernel": (500, 200),
        "logits/kernel": (200, 10),
    }
    leaves = jax.tree.leaves(params)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    assert sum(leaf.size for leaf in leaves) == 2_386_000
    everything = sparsity.counts(params, 1.0)
    assert sum(int(count) for count in jax.tree.leaves(everything)) == 2_384_000
    assert everything["logits"]["kernel"] == 0
    logits = jax.eval_shape(apply, params, jax.ShapeDtypeStruct((128, 784), jnp.float32))
    assert (logits.shape, logits.dtype) == ((128, 10), jnp.float32)


@pytest.fixture(scope="module")
def small():
    init, apply = models.mlp(5, (4, 3), 2)
    init = jax.jit(init)
    return init, apply, init(jax.random.key(0))


def test_apply_is_relu_of_products(small):
    _, apply, params = small
    x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 5)), jnp.float32)
    kernels = [np.asarray(params[name]["kernel"], np.float64) for name in layer_names(2)]
    hidden = np.asarray(x) @ kernels[0]
    assert (hidden < 0).any() and (hidden > 0).any()  # the ReLU is seen
    np.testing.assert_allclose(
        apply(params, x), forward(kernels, np.asarray(x)), rtol=1e-5, atol=1e-6
    )
    # Nothing is added anywhere.
    np.testing.assert_array_equal(apply(params, jnp.zeros((1, 5))), np.zeros((1, 2)))


def test_a_key_decides_the_initial_weights(small):
    init, _, params = small
    again, other = init(jax.random.key(0)), init(jax.random.key(1))
    for one, same, different in zip(*map(jax.tree.leaves, (params, again, other)), strict=True):
        np.testing.assert_array_equal(one, same)
        assert (one != different).all()


def test_initial_weights_are_lecun_normal():
    init, _ = models.mlp(400, (300,), 10)
    kernel = np.asarray(jax.jit(init)(jax.random.key(0))["hidden_0"]["kernel"])
    # A normal distribution cut at two standard deviations, of variance 1 / inputs after the cut.
    deviation = 1 / np.sqrt(400)
    np.testing.assert_allclose(kernel.std(), deviation, rtol=0.01)
    np.testing.assert_allclose(kernel.mean(), 0, atol=4 * deviation / np.sqrt(kernel.size))
    assert 2.2 < np.abs(kernel).max() / deviation <= 2 / 0.8796 + 1e-3


def remove_units(kernels, masks):
    """Take units without any kept incoming weight out, one by one; what is left of both."""
    kernels, masks = [k.copy() for k in kernels], [m.copy() for m in masks]
    while True:
        dead = [
            (layer, unit)
            for layer, mask in enumerate(masks[:-1])
            for unit in range(mask.shape[1])
            if not mask[:, unit].any()
        ]
        if not dead:
            return kernels, masks
        layer, unit = dead[0]
        for arrays in (kernels, masks):
            arrays[layer] = np.delete(arrays[layer], unit, axis=1)
            arrays[layer + 1] = np.delete(arrays[layer + 1], unit, axis=0)


def check_against_removal(sizes, masks, seed=0):
    """Compare with networks from which the units are gone, which must compute the same."""
    rng = np.random.default_rng(seed)
    kernels = [rng.normal(size=mask.shape) for mask in masks]
    masked = [kernel * mask for kernel, mask in zip(kernels, masks, strict=True)]
    small, small_masks = remove_units(masked, masks)
    x = rng.normal(size=(3, sizes[0]))
    np.testing.assert_allclose(forward(small, x), forward(masked, x), rtol=1e-9, atol=1e-12)
    expected = sum(int(mask.sum()) for mask in small_masks)
    assert models.mlp_remaining(tree_of(masks)) == expected
    return expected


def all_true(sizes):
    return [np.ones(shape, bool) for shape in zip(sizes[:-1], sizes[1:], strict=True)]


def test_remaining_by_hand():
    masks = all_true([3, 2, 2])
    assert models.mlp_remaining(tree_of(masks)) == 3 * 2 + 2 * 2
    masks[0][:, 1] = False  # a unit: its incoming weights are pruned, its outgoing ones useless
    assert models.mlp_remaining(tree_of(masks)) == 3 + 2
    masks[0][:2, 0] = False  # a weight more
    assert models.mlp_remaining(tree_of(masks)) == 1 + 2
    masks[0][2, 0] = False
    assert models.mlp_remaining(tree_of(masks)) == 0


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.9])
def test_remaining_of_pruned_units(share):
    sizes = [9, 10, 8, 6, 4]
    masks = all_true(sizes)
    rng = np.random.default_rng(1)
    for mask in masks[:-1]:
        mask[:, rng.random(mask.shape[1]) < share] = False
    remaining = check_against_removal(sizes, masks)
    alive = [9]
    for mask in masks:
        alive.append(int(mask.any(axis=0).sum()) if alive[-1] else 0)
    assert remaining == sum(a * b for a, b in zip(alive[:-1], alive[1:], strict=True))


@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=6),
    st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]),
    st.integers(0, 10_000),
)
def test_remaining_of_pruned_weights(sizes, share, seed):
    # With so few weights many columns are dead, and kill others after them.
    rng = np.random.default_rng(seed)
    masks = [rng.random(mask.shape) >= share for mask in all_true(sizes)]
    check_against_removal(sizes, masks, seed)


def test_remaining_where_a_pruned_unit_was_the_last_input_of_another():
    masks = all_true([2, 2, 2, 2])
    masks[0][:, 0] = False
    masks[1][1, 0] = False  # what is kept of this column comes from the unit that is gone
    assert check_against_removal([2, 2, 2, 2], masks) == 2 + 1 + 2


def test_remaining_of_more_than_ten_layers():
    # By name hidden_10 comes before hidden_2: the sizes tell whether the order is that of layers.
    sizes = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 2]
    rng = np.random.default_rng(2)
    masks = [rng.random(mask.shape) >= 0.7 for mask in all_true(sizes)]
    assert check_against_removal(sizes, masks) > 0
    init, _ = models.mlp(3, sizes[1:-1], 2)
    shapes = jax.eval_shape(init, jax.random.key(0))
    whole = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), shapes)
    assert models.mlp_remaining(whole) == sum(mask.size for mask in masks)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_remaining_where_a_layer_is_pruned_whole(layer):
    sizes = [3, 4, 5, 2, 3]
    masks = all_true(sizes)
    masks[layer][:] = False
    # What comes before it stays, what comes after it has no input.
    assert check_against_removal(sizes, masks) == [0, 3 * 4, 3 * 4 + 4 * 5][layer]


def test_remaining_of_jax_masks_of_a_network(small):
    _, apply, params = small
    masks = jax.tree.map(lambda w: w > 0, params)
    kernels = [np.asarray(masks[name]["kernel"]) for name in layer_names(2)]
    assert models.mlp_remaining(masks) == check_against_removal([5, 4, 3, 2], kernels)
    assert np.isfinite(apply(apply_masks(params, masks), jnp.ones((1, 5)))).all()
