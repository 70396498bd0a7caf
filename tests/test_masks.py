import warnings
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxprune import distribution, masks, trees
from jaxprune.granularity import unit, weight

masks_at, counts = masks.masks_at, distribution.counts

Shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
LEVELS = [0.0, 0.25, 0.5, 0.9, 1.0]
GRANULARITIES = {"weight": weight(), "unit": unit()}
OPTIONS = [(name, scope) for name in GRANULARITIES for scope in ("layer", "global")]
CORNERS = [OPTIONS[0], OPTIONS[3]]  # where each option is seen once, to save compilations


@lru_cache
def compiled(name):
    return jax.jit(partial(masks_at, granularity=GRANULARITIES[name]))


def jitted(name, *args, **options):
    """Return masks as NumPy arrays, made by programs that all tests share."""
    return jax.device_get(compiled(name)(*args, **options))


def counts_of(params, levels, name, scope):
    return counts(params, levels, granularity=GRANULARITIES[name], scope=scope)


def level_of(stacked, i):
    return jax.tree.map(lambda mask: mask[i], stacked)


def drawn(tree):
    """Return a tree with random numbers in place of shapes."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (
            rng.normal(size=leaf.shape).astype(np.float32)
            if isinstance(leaf, jax.ShapeDtypeStruct)
            else leaf
        ),
        tree,
    )


TREES = {
    "nnx": {
        "conv": {"bias": Shape((5,)), "kernel": Shape((3, 3, 2, 5))},
        "dropout": {"count": np.uint32(0), "key": jax.random.key(0)},
        "layers": {0: {"kernel": Shape((5, 6))}, 1: {"kernel": Shape((6, 7))}},
    },
    "nested": [
        Shape((4, 3)), (Shape((3,)), {"deep": [Shape((3, 2, 2))]}), np.ones((2, 2), np.int32)
    ],
}  # fmt: skip


@pytest.fixture(params=TREES)
def params(request):
    return drawn(TREES[request.param])


def as_numpy(tree):
    return {path: np.asarray(leaf) for path, leaf in trees.paths_and_leaves(tree)}


def magnitude(params):
    return jax.tree.map(lambda w: np.abs(w) if jnp.issubdtype(w.dtype, jnp.floating) else w, params)


def reference(scores, level, name, scope):
    """Make the masks of one level again: a stable sort over what competes, in float64."""
    flags = trees.prunable_leaves(scores)
    leaves = {
        path: np.asarray(leaf, np.float64)
        for (path, leaf), flag in zip(trees.paths_and_leaves(scores), flags, strict=True)
        if flag
    }
    values = {
        path: np.sqrt((w.reshape(-1, w.shape[-1]) ** 2).sum(0)) if name == "unit" else w.ravel()
        for path, w in leaves.items()
    }
    competing = [list(values)] if scope == "global" else [[path] for path in values]
    kept = {}
    for paths in competing:
        together = np.concatenate([values[path] for path in paths] or [np.zeros(0)])
        keep = np.ones(together.size, bool)
        pruned = distribution.num_pruned(keep.size, level)
        keep[np.argsort(together, kind="stable")[:pruned]] = False
        ends = np.cumsum([values[path].size for path in paths])[:-1]
        kept |= dict(zip(paths, np.split(keep, ends), strict=True))
    result = {}
    for path, leaf in trees.paths_and_leaves(scores):
        result[path] = np.ones(leaf.shape, bool)
        if path in leaves:
            result[path][...] = kept[path] if name == "unit" else kept[path].reshape(leaf.shape)
    return result


def check(got, scores, level, name, scope):
    """Check masks of one level against the reference, and that they are total."""
    assert jax.tree.structure(got) == jax.tree.structure(scores)
    expected = reference(scores, level, name, scope)
    for path, mask in as_numpy(got).items():
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, expected[path], err_msg=path)


def check_levels(scores, name, scope):
    """Check the masks of all levels, made together."""
    together = jitted(name, scores, counts_of(scores, LEVELS, name, scope))
    for i, level in enumerate(LEVELS):
        check(level_of(together, i), scores, level, name, scope)


# Selection.


def test_weights_by_hand():
    params = {"a": jnp.array([[3.0, -1.0], [0.5, 2.0]]), "bias": jnp.zeros(2)}
    got = masks.weight_masks(params, [0.0, 0.25, 0.5, 1.0])
    assert got["a"].tolist() == [
        [[True, True], [True, True]],
        [[True, True], [False, True]],
        [[True, False], [False, True]],
        [[False, False], [False, False]],
    ]
    assert got["bias"].shape == (4, 2)
    assert got["bias"].all()


def test_units_by_hand():
    params = {"a": jnp.array([[3.0, -1.0, 0.0], [4.0, 1.0, -6.0]]), "out": jnp.zeros((3, 2))}
    # The norms are 5, 1.4 and 6.
    got = masks.unit_masks(params, 0.5, prunable={"a": True, "out": False})
    assert got["a"].tolist() == [[False, False, True]] * 2
    assert got["out"].all()


def test_global_by_hand():
    params = {"a": jnp.array([[3.0, -1.0]]), "b": jnp.array([[0.5, 2.0]])}
    got = masks.weight_masks(params, 0.75, scope="global")
    assert [got["a"].tolist(), got["b"].tolist()] == [[[True, False]], [[False, False]]]
    got = masks.unit_masks(params, 0.25, scope="global")
    assert [got["a"].tolist(), got["b"].tolist()] == [[[True, True]], [[False, True]]]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("name", "scope"), OPTIONS[1::2])
def test_narrow_and_mixed_types(dtype, name, scope):
    rng = np.random.default_rng(3)
    scores = {
        "narrow": rng.permutation(12).reshape(4, 3).astype(jnp.dtype(dtype)),
        "wide": rng.permutation(12).reshape(3, 4).astype(np.float32) + np.float32(0.5),
    }
    check_levels(scores, name, scope)


def test_large_layers():
    # Above the size from which on select takes its other way.
    rng = np.random.default_rng(6)
    scores = {
        "a": rng.integers(-9, 10, (200, 210)).astype(np.float32),
        "b": rng.normal(size=(210, 3)).astype(np.float32),
    }
    check_levels(jax.tree.map(np.abs, scores), "weight", "global")


def everything(path, leaf):
    return True


def test_a_bare_array():
    w = jnp.array([0.1, -3.0, 2.0, -1.0])
    assert masks.weight_masks(w, 0.5, prunable=everything).tolist() == [False, True, True, False]
    assert masks.unit_masks(w, 0.25, prunable=everything).tolist() == [False, True, True, True]
    kept = masks_at(jnp.abs(w), jnp.int32(3), granularity=weight(everything))
    assert kept.tolist() == [False, True, False, False]
    assert masks.sparsity_of(kept, prunable=everything) == 0.75
    one = jnp.array([0.0])
    for level, expected in [(0, True), (0.49, True), (0.5, False), (1, False)]:
        assert masks.weight_masks(one, level, prunable=everything).tolist() == [expected]


@pytest.mark.parametrize(("name", "scope"), OPTIONS)
def test_nothing_to_prune(name, scope):
    granularity = GRANULARITIES[name]
    for tree in ({}, [], (), {"a": []}):
        for levels in (0.5, LEVELS):
            pruned = counts_of(tree, levels, name, scope)
            assert masks_at(tree, pruned, granularity=granularity) == tree
        assert masks.apply_masks(tree, tree) == tree
        assert masks.sparsity_of(tree) == 0
    params = {"bias": jnp.ones(3), "steps": jnp.ones((3, 2), int)}
    for levels, axis in [(0.9, ()), (LEVELS, (5,)), ([], (0,))]:
        got = masks_at(params, counts_of(params, levels, name, scope), granularity=granularity)
        assert {k: m.shape for k, m in got.items()} == {"bias": (*axis, 3), "steps": (*axis, 3, 2)}
        assert all(m.all() for m in got.values())
    got = jitted(name, {"a": jnp.ones((2, 3))}, counts_of({"a": jnp.ones((2, 3))}, [], name, scope))
    assert got["a"].shape == (0, 2, 3)


@pytest.mark.parametrize(("name", "scope"), CORNERS)
def test_vmap_over_seeds_levels_and_criteria(name, scope):
    rng = np.random.default_rng(7)
    scores = {"a": rng.random((2, 3, 4, 5)), "b": rng.random((2, 3, 5, 2))}  # criteria, seeds
    scores = jax.tree.map(lambda s: s.astype(np.float32), scores)
    pruned = counts_of(level_of(scores, (0, 0)), LEVELS, name, scope)
    f = partial(masks_at, granularity=GRANULARITIES[name])

    def mapped(f):
        return jax.jit(jax.vmap(jax.vmap(f, in_axes=(0, None)), in_axes=(0, None)))(scores, pruned)

    got = jax.device_get(mapped(f))
    jax.tree.map(np.testing.assert_array_equal, got, mapped(jax.vmap(f, in_axes=(None, 0))))
    for i, j, k in np.ndindex(2, 3, len(LEVELS)):
        check(level_of(got, (i, j, k)), level_of(scores, (i, j)), LEVELS[k], name, scope)


# `within`.


def test_within_by_hand():
    scores = {"a": jnp.array([[9.0, 1.0, 2.0, 3.0]])}
    for kind in (np.bool_, np.int32, np.float32):
        earlier = {"a": np.array([[0, 1, 1, 1]], kind)}
        for count, pruned in enumerate([[0], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]):
            kept = jitted("weight", scores, {"a": count}, within=earlier)["a"]
            assert kept.dtype == bool
            assert np.flatnonzero(~kept[0]).tolist() == pruned


def test_units_within_by_hand():
    scores = {"a": jnp.array([[9.0, 1.0, 2.0], [9.0, 1.0, 2.0]])}
    kept = jitted("unit", scores, {"a": 2}, within={"a": jnp.array([[False, True, True]] * 2)})
    assert kept["a"].tolist() == [[False, False, True]] * 2
    # Of weights: a unit with a weight left still competes, and no weight comes back.
    earlier = {"a": jnp.array([[True, True, False], [False, True, False]])}
    kept = jitted("unit", scores, {"a": 1}, within=earlier)
    assert kept["a"].tolist() == [[True, True, False], [False, True, False]]


def test_within_in_global_scope():
    scores = {"a": jnp.array([[9.0, 1.0]]), "b": jnp.array([[2.0, 3.0]])}
    earlier = {"a": jnp.array([[False, True]]), "b": jnp.array([[True, True]])}
    kept = jitted("weight", scores, jnp.array([1, 2, 3]), within=earlier)
    assert kept["a"].tolist() == [[[False, True]], [[False, False]], [[False, False]]]
    assert kept["b"].tolist() == [[[True, True]], [[True, True]], [[False, True]]]


def test_within_of_leaves_without_scores():
    scores = {"a": jnp.ones((1, 2)), "steps": jnp.ones((2, 2), int), "key": jax.random.key(0)}
    earlier = {"a": jnp.ones((1, 2), bool), "steps": jnp.ones((2, 2), bool), "key": jnp.array(True)}
    for name in GRANULARITIES:
        kept = jitted(name, scores, {"a": 1, "steps": 0, "key": 0}, within=earlier)
        assert kept["a"].tolist() == [[False, True]]
        assert kept["steps"].all() and kept["key"]


# The algebra of masks.

SHAPES = {"a": (3, 4), "b": (4, 2)}
SIZES = {"weight": (12, 8), "unit": (4, 2)}


def leaves_of(elements):
    return st.fixed_dictionaries(
        {name: arrays(np.float32, shape, elements=elements) for name, shape in SHAPES.items()}
    )


tied_scores = leaves_of(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 2.0**-149, 1.0, 1.5, 2.0]))
any_scores = leaves_of(st.floats(-(2.0**60), 2.0**60, width=32)) | tied_scores
any_masks = st.fixed_dictionaries({n: arrays(np.bool_, shape) for n, shape in SHAPES.items()})


@st.composite
def problems(draw, options=OPTIONS, levels=4):
    """Draw a granularity and a scope, and counts for some levels."""
    name, scope = draw(st.sampled_from(options))

    def several(size):
        return np.array(draw(st.lists(st.integers(0, size), min_size=levels, max_size=levels)),
                        np.int32)  # fmt: skip

    if scope == "global":
        return name, several(sum(SIZES[name]))
    return name, dict(zip(SHAPES, map(several, SIZES[name]), strict=True))


def pruned_pieces(name, got, pruned):
    """Count what each level prunes, by leaf or, in global scope, in all."""
    lost = {leaf: ~np.asarray(mask) for leaf, mask in got.items()}
    if name == "unit":
        assert all((m == m[:, :1]).all() for m in lost.values())  # whole columns
        lost = {leaf: m[:, 0] for leaf, m in lost.items()}
    lost = {leaf: m.reshape(len(m), -1).sum(1) for leaf, m in lost.items()}
    return lost if isinstance(pruned, dict) else sum(lost.values())


@given(any_scores, problems())
def test_counts_are_exact_and_levels_nested_and_independent(scores, problem):
    name, pruned = problem
    got = jitted(name, scores, pruned)
    jax.tree.map(np.testing.assert_array_equal, pruned_pieces(name, got, pruned), pruned)
    for mask in jitted(name, scores, jax.tree.map(np.sort, pruned)).values():
        assert (mask[1:] <= mask[:-1]).all()
    for i in range(4):
        alone = jitted(name, scores, jax.tree.map(lambda c: np.full(4, c[i]), pruned))  # noqa: B023
        for leaf in SHAPES:
            np.testing.assert_array_equal(alone[leaf][0], got[leaf][i])


@given(any_scores, any_masks, problems())
def test_within_never_revives(scores, earlier, problem):
    name, pruned = problem
    got = jitted(name, scores, pruned, within=earlier)
    for leaf in SHAPES:
        assert (got[leaf] <= earlier[leaf]).all()
    if name == "weight":
        already = {leaf: np.sum(~mask) for leaf, mask in earlier.items()}
        already = already if isinstance(pruned, dict) else sum(already.values())
        expected = jax.tree.map(np.maximum, already, pruned)
        jax.tree.map(np.testing.assert_array_equal, pruned_pieces(name, got, pruned), expected)


@given(any_scores, any_scores, problems())
def test_rounds_of_pruning_only_lose(first, second, problem):
    name, pruned = problem
    pruned = jax.tree.map(np.sort, pruned)
    earlier = level_of(jitted(name, first, pruned), 1)
    later = jitted(name, second, pruned, within=earlier)
    for leaf in SHAPES:
        assert (later[leaf] <= earlier[leaf]).all()
        np.testing.assert_array_equal(later[leaf][1], earlier[leaf])  # the same count again
    lost = jax.tree.map(lambda c: np.maximum(c, c[1]), pruned)
    jax.tree.map(np.testing.assert_array_equal, pruned_pieces(name, later, pruned), lost)


# Masks applied and counted.


def test_apply_masks_by_hand():
    params = {"a": jnp.array([1.0, jnp.nan, -jnp.inf, -4.0]), "b": [jnp.array([7, 8])]}
    kept = {"a": jnp.array([True, False, False, True]), "b": [jnp.array([False, True])]}
    for f in (masks.apply_masks, jax.jit(masks.apply_masks)):
        got = f(params, kept)
        assert got["a"].tolist() == [1.0, 0.0, 0.0, -4.0]
        assert got["b"][0].tolist() == [0, 8]
        assert got["b"][0].dtype == jnp.int32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_apply_masks_keeps_types_and_writes_positive_zeros(dtype):
    w = jnp.array([-1.5, 2.5, -0.0, 3.5], dtype)
    got = masks.apply_masks(w, jnp.array([False, True, False, True]))
    assert got.dtype == w.dtype
    np.testing.assert_array_equal(np.asarray(got, np.float32), [0, 2.5, 0, 3.5])
    assert not np.signbit(np.asarray(got, np.float32)).any()


def test_apply_masks_to_whole_networks(params):
    kept = jax.jit(lambda params: masks.weight_masks(params, 0.5))(params)
    got = as_numpy_floats(masks.apply_masks(params, kept))
    mask, weights = as_numpy(kept), as_numpy_floats(params)
    assert got.keys() == weights.keys()
    for path, w in got.items():
        np.testing.assert_array_equal(w, np.where(mask[path], weights[path], 0))
    again = masks.apply_masks(masks.apply_masks(params, kept), kept)
    for path, w in as_numpy_floats(again).items():
        np.testing.assert_array_equal(w, got[path])


def as_numpy_floats(tree):
    return {
        path: np.asarray(leaf)
        for path, leaf in trees.paths_and_leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }


def test_apply_masks_refuses_numbers_as_masks():
    with pytest.raises(TypeError, match="mask 'a' must be bool, got float32"):
        masks.apply_masks({"a": jnp.ones(2)}, {"a": jnp.array([0.5, 0.0])})


def test_apply_masks_passes_keys():
    params = {"key": jax.random.key(0), "w": jnp.ones(2)}
    got = masks.apply_masks(params, {"key": jnp.array(True), "w": jnp.array([True, False])})
    assert got["key"] is params["key"]
    assert got["w"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"a": np.ones((2, 3), bool)}, "masks has no leaf 'b/c', which params has"),
        (
            {"a": np.ones((2, 3), bool), "b": {"c": np.ones(2, bool), "d": np.ones(2, bool)}},
            "params has no leaf 'b/d', which masks has",
        ),
        (
            {"a": np.ones((3, 2), bool), "b": {"c": np.ones(2, bool)}},
            r"leaf 'a' has shape \(3, 2\) in masks and \(2, 3\) in params",
        ),
        (
            {"a": np.ones((4, 2, 3), bool), "b": {"c": np.ones((4, 2), bool)}},
            r"leaf 'a' has shape \(4, 2, 3\) in masks and \(2, 3\) in params",
        ),
    ],
)
def test_masks_that_do_not_match(kept, message):
    params = {"a": jnp.ones((2, 3)), "b": {"c": jnp.ones(2)}}
    for f in (masks.apply_masks, jax.jit(masks.apply_masks)):
        with pytest.raises(ValueError, match=message):
            f(params, kept)
    message = message.replace("masks", "within").replace("params", "scores")
    with pytest.raises(ValueError, match=message):
        masks_at(params, {"a": 1, "b": {"c": 0}}, within=kept)


def test_sparsity_of_by_hand():
    kept = {"a": jnp.array([[True, False], [False, False]]), "bias": jnp.array([True, False])}
    assert masks.sparsity_of(kept) == 3 / 4
    assert masks.sparsity_of(kept, prunable=everything) == 4 / 6
    assert masks.sparsity_of(kept, prunable=lambda path, leaf: path == "bias") == 1 / 2
    assert masks.sparsity_of(kept, prunable={"a": False, "bias": False}) == 0
    with pytest.raises(TypeError, match="sparsity_of counts concrete masks.*outside of jit"):
        jax.jit(masks.sparsity_of)(kept)


@pytest.mark.parametrize(("name", "scope"), OPTIONS)
def test_leaves_that_a_level_prunes_whole(name, scope):
    params = {n: jnp.ones((3, 10)) for n in ("a", "b")} | {"bias": jnp.ones(10)}
    granularity = GRANULARITIES[name]
    pruned = counts_of(params, [0.5, 1.0], name, scope)
    with pytest.warns(UserWarning, match=f"prunes every {name} of a, b$") as record:
        masks.warn_of_emptied(params, pruned, granularity)
    assert len(record) == 1
    with warnings.catch_warnings(action="error"):
        masks.warn_of_emptied(params, counts_of(params, [0.0, 0.9], name, scope), granularity)
        masks.warn_of_emptied({}, {}, granularity)


def test_a_small_leaf_is_emptied_by_rounding():
    params = {"small": jnp.ones((2, 10)), "wide": jnp.ones((2, 100))}
    with pytest.warns(UserWarning, match="every unit of small$"):
        masks.warn_of_emptied(params, counts_of(params, 0.99, "unit", "layer"), unit())


# Bad input.

GOOD = {"a": np.ones((2, 3), np.float32), "bias": np.ones(2, np.float32)}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("name", "scope"), OPTIONS)
def test_scores_that_are_not_finite(value, name, scope):
    scores = GOOD | {"a": np.array([[1, 2, value], [4, 5, 6]], np.float32)}
    pruned = counts_of(scores, 0.5, name, scope)
    for convert in (np.asarray, jnp.asarray):
        with pytest.raises(ValueError, match="scores of leaf 'a' contain NaN or infinite values"):
            masks_at(jax.tree.map(convert, scores), pruned, granularity=GRANULARITIES[name])
    with pytest.raises(ValueError, match="scores of leaf 'a' contain NaN or infinite"):
        masks.weight_masks(scores, 0.5)
    # Under jit values cannot be seen; the counts stay exact all the same.
    lost = np.sum(~jitted(name, scores, pruned)["a"])
    assert lost == (3 if name == "weight" else 4)


def test_nan_is_lowest_under_jit():
    scores = {"a": np.array([[1.0, np.nan, -5.0, 3.0]], np.float32)}
    for name in GRANULARITIES:
        assert jitted(name, scores, {"a": 1})["a"].tolist() == [[True, False, True, True]]
        # What is pruned already goes before it, so that counts stay exact.
        earlier = {"a": np.array([[True, True, True, False]])}
        kept = jitted(name, scores, {"a": np.array([1, 2])}, within=earlier)["a"]
        assert kept[:, 0].tolist() == [[True, True, True, False], [True, False, True, False]]


def test_scores_may_be_anything_where_not_prunable():
    scores = {"bias": np.array([np.nan]), "steps": np.int32(3), "key": jax.random.key(0),
              "out": np.full((3, 2), np.inf, np.float32), "a": GOOD["a"]}  # fmt: skip
    chosen = weight(lambda path, leaf: path == "a")
    got = masks_at(scores, counts(scores, 0.5, granularity=chosen), granularity=chosen)
    assert got["a"].sum() == 3
    assert all(got[name].all() for name in ("bias", "steps", "key", "out"))
    assert got["key"].shape == ()


def test_norms_of_finite_scores_may_be_infinite():
    scores = {"a": np.array([[3e38, 1.0], [3e38, 2.0]], np.float32)}
    assert masks_at(scores, {"a": 1}, granularity=unit())["a"].tolist() == [[True, False]] * 2


def test_leaves_that_cannot_be_pruned():
    params = GOOD | {"odd": np.ones((2, 2), np.int32)}
    for make in (masks.weight_masks, masks.unit_masks):
        with pytest.raises(TypeError, match="leaf 'odd' is of int32 and cannot.*`prunable`"):
            make(params, 0.5, prunable=everything)
        assert make(params, 0.5)["odd"].all()
    with pytest.raises(TypeError, match="leaf 'odd' is of int32 and cannot be pruned"):
        masks_at(params, 0, granularity=weight(everything))


@pytest.mark.parametrize(
    ("pruned", "name", "error", "message"),
    [
        ({"a": 7, "bias": 0}, "weight", ValueError, r"leaf 'a' must be in \[0, 6\], got 7"),
        ({"a": -1, "bias": 0}, "weight", ValueError, r"leaf 'a' must be in \[0, 6\], got -1"),
        ({"a": 4, "bias": 0}, "unit", ValueError, r"counts of leaf 'a' must be in \[0, 3\], got 4"),
        ({"a": 0, "bias": 1}, "weight", ValueError, r"leaf 'bias' must be in \[0, 0\], got 1"),
        ({"a": 0.5, "bias": 0}, "weight", TypeError, "'a' must be integers, got 0.5: `counts`"),
        ({"a": 0}, "weight", ValueError, "counts must be one array, or a tree.*granularity?"),
        (7, "weight", ValueError, r"counts must be in \[0, 6\], got 7"),
        (np.array([1, 9]), "weight", ValueError, r"counts must be in \[0, 6\], got \[1, 9\]"),
        (0.5, "unit", TypeError, "counts must be integers, got 0.5"),
        (np.zeros((1, 1), int), "unit", ValueError, r"one levels axis, got shape \(1, 1\)"),
        (
            {"a": np.zeros((2, 2), int), "bias": 0}, "weight", ValueError,
            r"counts of leaf 'a' must be a number or have one levels axis, got shape \(2, 2\)",
        ),
        (
            {"a": np.zeros(2, int), "bias": np.zeros(3, int)}, "weight", ValueError,
            r"leaf 'bias' have shape \(3,\), those of 'a' \(2,\): all need the same levels",
        ),
        (
            {"a": np.zeros(2, int), "bias": 0}, "weight", ValueError,
            r"leaf 'bias' have shape \(\), those of 'a' \(2,\): all need the same levels",
        ),
    ],
)  # fmt: skip
def test_counts_out_of_range(pruned, name, error, message):
    with pytest.raises(error, match=message):
        masks_at(GOOD, pruned, granularity=GRANULARITIES[name])


def test_traced_sparsity():
    for make in (masks.weight_masks, masks.unit_masks):
        with pytest.raises(TypeError, match="sparsity is traced.*`masks_at`"):
            jax.jit(partial(make, GOOD))(0.5)
