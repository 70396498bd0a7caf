import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    ("path", "shape", "expected"),
    [
        ("hidden_0/kernel", (2, 3), True),
        ("conv/kernel", (3, 3, 1, 8), True),
        ("hidden_0/bias", (3,), False),
        ("scale", (), False),
        ("logits/kernel", (2, 3), False),
        ("params/logits/kernel", (2, 3), False),
        ("logits", (2, 3), False),
        ("my_logits/kernel", (2, 3), True),
        ("logits_2/kernel", (2, 3), True),
        ("", (2, 3), True),
    ],
)
def test_default_prunable(path, shape, expected):
    assert trees.default_prunable(path, np.ones(shape)) is expected
    assert trees.default_prunable(path, jax.ShapeDtypeStruct(shape, jnp.float32)) is expected
    traced = []
    jax.jit(lambda leaf: traced.append(trees.default_prunable(path, leaf)))(jnp.ones(shape))
    assert traced == [expected]


def test_prunable_leaves_by_default():
    assert trees.prunable_leaves(PARAMS) == [False, True, False]
    masks = jax.tree.map(lambda w: w > 0, PARAMS)
    assert trees.prunable_leaves(masks) == [False, True, False]
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


@pytest.mark.parametrize("tree", [{"dense": {"kernel": np.ones((2, 3))}}, [np.ones(3)], np.ones(2)])
def test_output_layer_must_be_known(tree):
    with pytest.raises(ValueError, match="no layer is named `logits`.*pass prunable="):
        trees.prunable_leaves(tree)
    trees.prunable_leaves(tree, everything)


@pytest.mark.parametrize(
    ("leaf", "error", "message"),
    [
        (np.ones((2, 2), np.int32), TypeError, "leaf 'odd/leaf' is of int32 and cannot be pruned"),
        (np.ones((2, 2), np.uint8), TypeError, "leaf 'odd/leaf' is of uint8"),
        (np.ones((2, 2), np.complex64), TypeError, "leaf 'odd/leaf' is of complex64"),
        (jax.random.split(jax.random.key(0), (2, 2)), TypeError, "leaf 'odd/leaf' is of key<fry>"),
        (1.5, TypeError, "leaf 'odd/leaf' is of float and cannot"),
        (np.ones((0, 2), np.float32), ValueError, r"leaf 'odd/leaf' is empty, shape \(0, 2\)"),
    ],
)
def test_unusable_leaf_is_refused_where_selected(leaf, error, message):
    tree = {"odd": {"leaf": leaf}, "logits": np.ones((2, 2), np.float32)}
    with pytest.raises(error, match=message + ".*leave it out by `prunable`"):
        trees.prunable_leaves(tree, everything)
    assert trees.prunable_leaves(tree, lambda path, leaf: path == "logits") == [True, False]
    if np.ndim(leaf) == 2:  # the default predicate selects it too
        with pytest.raises(error, match=message):
            trees.prunable_leaves(tree)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "bool"])
def test_usable_dtypes(dtype):
    leaf = np.ones((2, 2), jnp.dtype(dtype))
    assert trees.prunable_leaves({"a": leaf, "logits": leaf}) == [True, False]


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
