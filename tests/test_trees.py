import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxprune import trees

PARAMS = {
    "hidden_0": {"kernel": np.ones((2, 3), np.float32), "bias": np.ones(3, np.float32)},
    "logits": {"kernel": np.ones((3, 2), np.float32)},
}


def everything(path, leaf):
    return True


@pytest.mark.parametrize(
    ("tree", "paths"),
    [
        (PARAMS, ["hidden_0/bias", "hidden_0/kernel", "logits/kernel"]),
        ({"b": [1.0, (2.0, {"a": 3.0})], "a": 4.0}, ["a", "b/0", "b/1/0", "b/1/1/a"]),
        ({"layers": {0: 1.0, 1: 2.0}}, ["layers/0", "layers/1"]),
        ({"a": None, "b": 1.0}, ["b"]),
        (np.ones(2), [""]),
        ({}, []),
    ],
)
def test_paths_and_leaves(tree, paths):
    found = trees.paths_and_leaves(tree)
    assert [path for path, _ in found] == paths
    for (_, leaf), expected in zip(found, jax.tree.leaves(tree), strict=True):
        assert leaf is expected


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        (np.ones((2, 3), np.float32), True),
        (np.ones((3, 3, 1, 8), jnp.bfloat16), True),
        (np.ones((2, 3)), True),
        (np.ones(3, np.float32), False),
        (np.float32(1), False),
        (1.5, False),
        (np.ones((0, 2), np.float32), False),
        (np.ones((2, 2), np.int32), False),
        (np.ones((2, 2), bool), False),
        (np.ones((2, 2), np.complex64), False),
        (jax.random.split(jax.random.key(0), (2, 2)), False),
    ],
)
def test_prunable_leaves_by_default(leaf, expected):
    tree = {"leaf": leaf, "other": np.ones(2, np.float32)}
    assert trees.prunable_leaves(tree) == [expected, False]
    if isinstance(leaf, np.ndarray):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        assert trees.prunable_leaves(shapes) == [expected, False]


def test_prunable_leaves_of_masks_and_of_nothing():
    assert trees.prunable_leaves(jax.tree.map(lambda w: w > 0, PARAMS)) == [False, True, True]
    assert trees.prunable_leaves({}) == []


def test_prunable_leaves_by_a_predicate():
    seen = []

    def wide(path, leaf):
        seen.append((path, leaf.shape))
        return leaf.shape[-1] == np.int32(3)

    assert trees.prunable_leaves(PARAMS, wide) == [True, True, False]
    assert seen == [("hidden_0/bias", (3,)), ("hidden_0/kernel", (2, 3)), ("logits/kernel", (3, 2))]
    assert trees.prunable_leaves(np.ones(3, np.float32), everything) == [True]
    assert trees.prunable_leaves([], everything) == []


class Callable(nnx.Pytree):
    """A container that can be called, as an Equinox module can."""

    def __init__(self, kernel, bias):
        self.kernel, self.bias = nnx.data(kernel), nnx.data(bias)

    def __call__(self, x):
        raise AssertionError


def test_prunable_leaves_by_a_tree():
    flags = {"hidden_0": {"kernel": False, "bias": np.True_}, "logits": {"kernel": jnp.array(True)}}
    assert trees.prunable_leaves(PARAMS, flags) == [True, False, True]
    module = Callable(np.ones((2, 3), np.float32), np.ones(3, np.float32))
    assert trees.prunable_leaves(module, Callable(True, False)) == [False, True]


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"logits": {"kernel": True}}, ValueError, "prunable has no leaf 'hidden_0/bias', which"),
        (
            {"hidden_0": {"kernel": True, "bias": False}, "logits": {"kernel": True}, "x": True},
            ValueError, "the tree has no leaf 'x', which prunable has",
        ),
        (
            {"hidden_0": {"kernel": True, "bias": [False]}, "logits": {"kernel": True}},
            ValueError, "prunable has no leaf 'hidden_0/bias'",
        ),
        (
            {"hidden_0": {"kernel": np.ones((2, 3), bool), "bias": False},
             "logits": {"kernel": True}},
            ValueError, r"leaf 'hidden_0/kernel' has shape \(2, 3\) in prunable and \(\)",
        ),
        (
            {"hidden_0": {"kernel": 1, "bias": False}, "logits": {"kernel": True}},
            TypeError, "prunable must have a bool at 'hidden_0/kernel', got 1",
        ),
    ],
)  # fmt: skip
def test_a_tree_of_another_shape_names_the_leaf(flags, error, message):
    with pytest.raises(error, match=message):
        trees.prunable_leaves(PARAMS, flags)


@pytest.mark.parametrize(
    ("leaf", "error", "message"),
    [
        (np.ones((2, 2), np.int32), TypeError, "leaf 'odd/leaf' is of int32 and cannot be pruned"),
        (np.ones((2, 2), np.complex64), TypeError, "leaf 'odd/leaf' is of complex64"),
        (jax.random.split(jax.random.key(0), (2, 2)), TypeError, "leaf 'odd/leaf' is of key<fry>"),
        (1.5, TypeError, "leaf 'odd/leaf' is of float and cannot"),
        (np.ones((0, 2), np.float32), ValueError, r"leaf 'odd/leaf' is empty, shape \(0, 2\)"),
    ],
)
def test_unusable_leaf_is_refused_where_selected(leaf, error, message):
    tree = {"odd": {"leaf": leaf}, "dense": np.ones((2, 2), np.float32)}
    for chosen in (everything, {"odd": {"leaf": True}, "dense": True}):
        with pytest.raises(error, match=message + ".*leave it out by `prunable`"):
            trees.prunable_leaves(tree, chosen)
    assert trees.prunable_leaves(tree, lambda path, leaf: path == "dense") == [True, False]


def test_check_match_accepts_the_same_leaves():
    trees.check_match("masks", jax.tree.map(lambda w: w > 0, PARAMS), "params", PARAMS)
    trees.check_match("masks", [], "params", [])
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), PARAMS)
    trees.check_match("masks", shapes, "params", PARAMS)


@pytest.mark.parametrize(
    ("tree", "reference", "message"),
    [
        ({"a": 1}, {"a": 1, "b": 2}, "^masks has no leaf 'b', which params has$"),
        ({"a": 1, "b": {"c": 2}}, {"a": 1}, "^params has no leaf 'b/c', which masks has$"),
        ({"a": 1}, {}, "^params has no leaf 'a'"),
        (
            {"a": np.ones((2, 3))},
            {"a": np.ones((3, 2))},
            r"^leaf 'a' has shape \(2, 3\) in masks and \(3, 2\) in params$",
        ),
        ([np.ones(1)], [np.ones(())], r"leaf '0' has shape \(1,\) in masks and \(\) in params"),
        ([1, 2], (1, 2), "same leaves in other containers"),
        ({"a": 1}, {"a": {}}, "params has no leaf 'a'"),
        ({"a": 1, "b": None}, {"a": 1}, "same leaves in other containers"),
    ],
)
def test_check_match_names_the_difference(tree, reference, message):
    with pytest.raises(ValueError, match=message):
        trees.check_match("masks", tree, "params", reference)


@pytest.mark.parametrize("levels_at_once", [None, 1, 2, 5, 8])
def test_map_levels_is_a_loop(levels_at_once):
    stacked = {"a": jnp.arange(10.0).reshape(5, 2), "b": jnp.arange(5)}
    traces = []

    def f(tree):
        traces.append(None)
        return tree["a"].sum() * tree["b"].astype(float), [tree["a"] + 1]

    looped = [f(jax.tree.map(lambda x: x[i], stacked)) for i in range(5)]  # noqa: B023
    expected = jax.tree.map(lambda *x: np.stack(x), *looped)
    traces.clear()
    got = jax.jit(lambda tree: trees.map_levels(f, tree, levels_at_once))(stacked)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert len(traces) <= 2  # once, and once more where a last batch of levels is smaller


def test_map_levels_is_narrow_on_a_cpu():
    shapes = []

    def f(x):
        # vmap is seen by its effect on the program: a dot of one level has no batch.
        return x @ x

    for levels_at_once in (None, 3):
        program = jax.jit(lambda x: trees.map_levels(f, x, levels_at_once))  # noqa: B023
        text = program.lower(jnp.ones((3, 2, 2))).as_text()
        shapes.append("batching_dims" in text)
    assert shapes == [False, True]


def test_unstack_and_stack():
    tree = {"a": np.arange(6).reshape(3, 2), "b": [np.arange(3)]}
    levels = trees.unstack(tree)
    assert [level["a"].tolist() for level in levels] == [[0, 1], [2, 3], [4, 5]]
    assert [int(level["b"][0]) for level in levels] == [0, 1, 2]
    jax.tree.map(np.testing.assert_array_equal, trees.stack(levels), tree)
    with pytest.raises(ValueError, match="unpack"):
        trees.unstack({"a": np.zeros(2), "b": np.zeros(3)})
