import inspect
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxprune import masks, sparsity, trees
from jaxprune.scores import magnitude

masks_at, counts = masks.masks_at, sparsity.counts
compiled = jax.jit(masks_at, static_argnames=("granularity", "scope", "prunable", "unit_axis"))

Shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
LEVELS = [0.0, 0.25, 0.5, 0.9, 1.0]
OPTIONS = [
    {"granularity": granularity, "scope": scope}
    for granularity in ("weight", "unit")
    for scope in ("layer", "global")
]
CORNERS = [OPTIONS[0], OPTIONS[3]]  # where each option is seen once, to save compilations


def everything(path, leaf):
    return True


def jitted(*args, **options):
    """Return masks as NumPy arrays, made by programs that all tests share."""
    return jax.device_get(compiled(*args, **options))


def level_of(stacked, i):
    return jax.tree.map(lambda mask: mask[i], stacked)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Conv(5, (3, 3), name="conv")(x))
        x = linen.relu(linen.Dense(7, name="hidden")(x.mean((1, 2))))
        return linen.Dense(3, name="logits")(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 5, (3, 3), rngs=rngs)
        self.layers = nnx.List([nnx.Linear(5, 6, rngs=rngs), nnx.Linear(6, 7, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.logits = nnx.Linear(7, 3, rngs=rngs)


def linen_params():
    return LinenNet().init(jax.random.key(0), jnp.zeros((1, 8, 8, 2)))["params"]


def nnx_params():
    return nnx.to_pure_dict(nnx.state(NnxNet(nnx.Rngs(0))))  # with the keys of the dropout


def nested_params():
    rng = np.random.default_rng(0)
    shapes = [Shape((4, 3)), (Shape((3,)), {"deep": [Shape((3, 2, 2))]}), {"logits": Shape((2, 2))}]
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


TREES = {"linen": linen_params, "nnx": nnx_params, "nested": nested_params}


@pytest.fixture(scope="module", params=TREES)
def params(request):
    return TREES[request.param]()


def as_numpy(tree):
    return {path: np.asarray(leaf) for path, leaf in trees.paths_and_leaves(tree)}


def reference(scores, level, granularity, scope, unit_axis=-1):
    """Make the masks of one level again: a stable sort over what competes, in float64."""
    leaves = {
        path: np.asarray(leaf, np.float64)
        for path, leaf in trees.paths_and_leaves(scores)
        if trees.default_prunable(path, leaf)
    }
    values = {
        path: np.sqrt((np.moveaxis(w, unit_axis, 0).reshape(w.shape[unit_axis], -1) ** 2).sum(1))
        if granularity == "unit"
        else w.ravel()
        for path, w in leaves.items()
    }
    groups = [list(values)] if scope == "global" else [[path] for path in values]
    kept = {}
    for group in groups:
        together = np.concatenate([values[path] for path in group] or [np.zeros(0)])
        keep = np.ones(together.size, bool)
        keep[np.argsort(together, kind="stable")[: sparsity.num_pruned(keep.size, level)]] = False
        kept |= dict(
            zip(group, np.split(keep, np.cumsum([values[p].size for p in group])[:-1]), strict=True)
        )
    result = {}
    for path, leaf in trees.paths_and_leaves(scores):
        mask = np.ones(leaf.shape, bool)
        if path in leaves and granularity == "unit":
            np.moveaxis(mask, unit_axis, -1)[...] = kept[path]
        elif path in leaves:
            mask[...] = kept[path].reshape(leaf.shape)
        result[path] = mask
    return result


def check(got, scores, level, **options):
    """Check masks of one level against the reference, and that they are total."""
    assert jax.tree.structure(got) == jax.tree.structure(scores)
    expected = reference(scores, level, **options)
    for path, mask in as_numpy(got).items():
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, expected[path], err_msg=path)


# Selection.


def test_weights_by_hand():
    params = {"a": jnp.array([[3.0, -1.0], [0.5, 2.0]]), "logits": jnp.zeros((2, 2))}
    got = masks.weight_masks(params, [0.0, 0.25, 0.5, 1.0])
    assert got["a"].tolist() == [
        [[True, True], [True, True]],
        [[True, True], [False, True]],
        [[True, False], [False, True]],
        [[False, False], [False, False]],
    ]
    assert got["logits"].shape == (4, 2, 2)
    assert got["logits"].all()


def test_units_by_hand():
    params = {"a": jnp.array([[3.0, -1.0, 0.0], [4.0, 1.0, -6.0]]), "logits": jnp.zeros((3, 2))}
    # The norms are 5, 1.4 and 6.
    assert masks.unit_masks(params, 0.5)["a"].tolist() == [[False, False, True]] * 2
    got = masks.unit_masks(params, 0.5, unit_axis=0)["a"]
    assert got.tolist() == [[False] * 3, [True] * 3]


def test_global_by_hand():
    params = {"a": jnp.array([[3.0, -1.0]]), "b": jnp.array([[0.5, 2.0]]), "logits": jnp.ones(1)}
    got = masks.weight_masks(params, 0.75, scope="global")
    assert [got["a"].tolist(), got["b"].tolist()] == [[[True, False]], [[False, False]]]
    got = masks.unit_masks(params, 0.25, scope="global")
    assert [got["a"].tolist(), got["b"].tolist()] == [[[True, True]], [[False, True]]]


@pytest.mark.parametrize("options", CORNERS)
def test_trees_against_the_reference(params, options):
    scores = magnitude(params)
    together = jitted(scores, counts(params, LEVELS, **options), **options)
    for i, level in enumerate(LEVELS):
        one = level_of(together, i)
        check(one, scores, level, **options)
        counted = [m for path, m in as_numpy(one).items() if trees.default_prunable(path, m)]
        lost, total = sum(np.sum(~m) for m in counted), sum(m.size for m in counted)
        assert masks.sparsity_of(one) == lost / total
    make = masks.weight_masks if options["granularity"] == "weight" else masks.unit_masks
    check(make(params, 0.5, scope=options["scope"]), scores, 0.5, **options)


def test_trees_hold_what_they_are_meant_to(params):
    # The trees above are worth testing only while they have both kinds of leaves.
    flags = trees.prunable_leaves(params)
    assert sum(flags) >= 2
    assert sum(flags) < len(flags)


@pytest.mark.parametrize(
    ("unit_axis", "scope"), [(-1, "layer"), (-2, "global"), (0, "layer"), (1, "global")]
)
def test_unit_axes_of_kernels(unit_axis, scope):
    rng = np.random.default_rng(2)
    params = {
        "conv": rng.normal(size=(3, 3, 2, 4)).astype(np.float32),
        "dense": rng.normal(size=(4, 5)).astype(np.float32),
        "logits": rng.normal(size=(5, 2)).astype(np.float32),
    }
    options = {"granularity": "unit", "scope": scope, "unit_axis": unit_axis}
    scores = jax.tree.map(np.abs, params)
    for level in LEVELS:
        check(jitted(scores, counts(params, level, **options), **options), scores, level, **options)


def test_a_conv_unit_is_an_output_channel():
    params = {"conv": np.ones((3, 3, 2, 4), np.float32) * [4.0, 1.0, 3.0, 2.0], "logits": 1.0}
    params["conv"] = params["conv"].astype(np.float32)
    kept = np.asarray(masks.unit_masks(params, 0.5)["conv"])
    assert kept[:, :, :, [0, 2]].all()
    assert not kept[:, :, :, [1, 3]].any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS[1::2])
def test_narrow_and_mixed_types(dtype, options):
    rng = np.random.default_rng(3)
    scores = {
        "narrow": rng.permutation(12).reshape(4, 3).astype(jnp.dtype(dtype)),
        "wide": rng.permutation(12).reshape(3, 4).astype(np.float32) + np.float32(0.5),
        "logits": np.ones((3, 2), np.float32),
    }
    for level in LEVELS:
        check(jitted(scores, counts(scores, level, **options), **options), scores, level, **options)


@pytest.mark.parametrize("options", CORNERS)
def test_float64(options):
    rng = np.random.default_rng(4)
    scores = {"a": 1 + 1e-12 * rng.permutation(12).reshape(4, 3), "logits": np.ones((3, 2))}
    with jax.enable_x64(True):
        got = masks_at(scores, counts(scores, 0.5, **options), **options)
        check(got, scores, 0.5, **options)


@pytest.mark.parametrize("options", OPTIONS)
def test_ties_go_in_flatten_order(options):
    # A tie in every leaf and across leaves; "b" comes first in the dict, "a" in the tree.
    scores = {"b": np.ones((2, 3), np.float32), "a": np.ones((2, 3), np.float32), "logits": 1.0}
    units = 3 if options["granularity"] == "unit" else 6
    for count in range(2 * units + 1):
        if options["scope"] == "global":
            kept = jitted(scores, count, **options)
            lost = {"a": min(count, units), "b": max(count - units, 0)}
        else:
            lost = {"a": min(count, units), "b": min(count, units)}
            kept = jitted(scores, lost | {"logits": 0}, **options)
        for name in ("a", "b"):
            row = np.asarray(kept[name])[0] if units == 3 else np.asarray(kept[name]).ravel()
            assert row.tolist() == [i >= lost[name] for i in range(units)]


def test_zeros_of_both_signs_and_denormals():
    scores = {"a": jnp.array([[0.0, -0.0, 1e-45, -0.0, 0.0, 3e-45]]), "logits": jnp.ones(1)}
    pruned = [0, 1, 3, 4, 2, 5]
    for f in (masks_at, jax.jit(masks_at)):
        kept = np.asarray(f(scores, {"a": jnp.arange(7), "logits": jnp.zeros(7, int)})["a"])
        for count in range(7):
            assert np.flatnonzero(~kept[count, 0]).tolist() == sorted(pruned[:count])


def test_signed_scores():
    scores = {"a": jnp.array([[-1.0, 2.0, -3.0, 0.0]]), "logits": jnp.ones(1)}
    kept = masks_at(scores, {"a": 2, "logits": 0})["a"]
    assert kept.tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1.0, 1e19, 1e30])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_norms_of_units_neither_vanish_nor_overflow(scale, scope):
    # In float32 the squares do, and all units would be tied.
    rng = np.random.default_rng(5)
    scores = {
        "a": (scale * rng.random((8, 5))).astype(np.float32),
        "b": (scale * rng.random((5, 6)) + scale).astype(np.float32),
        "logits": np.ones((2, 2), np.float32),
    }
    options = {"granularity": "unit", "scope": scope}
    for level in LEVELS:
        check(jitted(scores, counts(scores, level, **options), **options), scores, level, **options)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_large_layers(scope):
    # Above the size from which on select takes its other way.
    options = {"granularity": "weight", "scope": scope}
    rng = np.random.default_rng(6)
    params = {
        "a": rng.integers(-9, 10, (200, 210)).astype(np.float32),
        "b": rng.normal(size=(210, 3)).astype(np.float32),
        "logits": rng.normal(size=(3, 2)).astype(np.float32),
    }
    scores = jax.tree.map(np.abs, params)
    together = jitted(scores, counts(params, LEVELS, **options), **options)
    for i, level in enumerate(LEVELS):
        check(level_of(together, i), scores, level, **options)


def test_a_bare_array():
    w = jnp.array([0.1, -3.0, 2.0, -1.0])
    assert masks.weight_masks(w, 0.5, prunable=everything).tolist() == [False, True, True, False]
    assert masks.unit_masks(w, 0.25, prunable=everything).tolist() == [False, True, True, True]
    kept = masks_at(jnp.abs(w), jnp.int32(3), prunable=everything, scope="global")
    assert kept.tolist() == [False, True, False, False]
    assert masks.sparsity_of(kept, prunable=everything) == 0.75
    one = jnp.array([0.0])
    for level, expected in [(0, True), (0.49, True), (0.5, False), (1, False)]:
        assert masks.weight_masks(one, level, prunable=everything).tolist() == [expected]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tree", [{}, [], (), {"a": []}])
def test_an_empty_tree(tree, options):
    assert masks_at(tree, counts(tree, 0.5, **options), **options) == tree
    assert masks_at(tree, counts(tree, LEVELS, **options), **options) == tree
    assert masks.apply_masks(tree, tree) == tree
    assert masks.sparsity_of(tree) == 0


@pytest.mark.parametrize("options", OPTIONS)
def test_nothing_prunable(options):
    params = {"bias": jnp.ones(3), "logits": jnp.ones((3, 2))}
    for levels, axis in [(0.9, ()), (LEVELS, (5,))]:
        got = masks_at(params, counts(params, levels, **options), **options)
        assert {k: m.shape for k, m in got.items()} == {"bias": (*axis, 3), "logits": (*axis, 3, 2)}
        assert all(m.all() for m in got.values())


@pytest.mark.parametrize("options", OPTIONS)
def test_no_levels(options):
    params = {"a": jnp.ones((2, 3)), "logits": jnp.ones((3, 2))}
    got = masks_at(params, counts(params, [], **options), **options)
    assert {k: m.shape for k, m in got.items()} == {"a": (0, 2, 3), "logits": (0, 3, 2)}


@pytest.mark.parametrize("options", CORNERS)
def test_vmap_over_seeds_levels_and_criteria(options):
    rng = np.random.default_rng(7)
    scores = {"a": rng.random((2, 3, 4, 5)), "logits": rng.random((2, 3, 5, 2))}
    scores = jax.tree.map(lambda s: s.astype(np.float32), scores)  # criteria, seeds
    shapes = jax.tree.map(lambda s: s[0, 0], scores)
    pruned = counts(shapes, LEVELS, **options)
    f = partial(masks_at, **options)
    over_levels = jax.vmap(f, in_axes=(None, 0))
    got = jax.jit(jax.vmap(jax.vmap(f, in_axes=(0, None)), in_axes=(0, None)))(scores, pruned)
    nested = jax.jit(jax.vmap(jax.vmap(over_levels, (0, None)), (0, None)))(scores, pruned)
    got = jax.device_get(got)
    jax.tree.map(np.testing.assert_array_equal, got, nested)
    for i, j, k in np.ndindex(2, 3, len(LEVELS)):
        one = level_of(scores, (i, j))
        check(level_of(got, (i, j, k)), one, LEVELS[k], **options)


@pytest.mark.parametrize("options", CORNERS)
def test_compiled_once_for_all_counts(options):
    traces = []

    @jax.jit
    def f(scores, counts):
        traces.append(None)
        return masks_at(scores, counts, **options)

    params = {"a": np.ones((4, 5), np.float32), "logits": np.ones((5, 2), np.float32)}
    for i, levels in enumerate([LEVELS, LEVELS[::-1], [0.1] * 5, [0.0, 0.99, 0.3, 0.2, 0.5]]):
        params["a"] = np.random.default_rng(i).random((4, 5)).astype(np.float32)
        got = jax.device_get(f(params, counts(params, levels, **options)))
        check(level_of(got, 1), params, levels[1], **options)
    assert len(traces) == 1


# `within`.


def test_within_by_hand():
    scores = {"a": jnp.array([[9.0, 1.0, 2.0, 3.0]]), "logits": jnp.ones(1)}
    earlier = {"a": jnp.array([[False, True, True, True]]), "logits": jnp.ones(1, bool)}
    for count, pruned in [(0, [0]), (1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 2, 3])]:
        kept = masks_at(scores, {"a": count, "logits": 0}, within=earlier)["a"]
        assert np.flatnonzero(~np.asarray(kept[0])).tolist() == pruned


def test_units_within_by_hand():
    scores = {"a": jnp.array([[9.0, 1.0, 2.0], [9.0, 1.0, 2.0]]), "logits": jnp.ones(1)}
    units = jnp.array([[False, True, True]] * 2)
    kept = masks_at(scores, {"a": 2, "logits": 0}, granularity="unit",
                    within={"a": units, "logits": jnp.ones(1, bool)})  # fmt: skip
    assert kept["a"].tolist() == [[False, False, True]] * 2
    # Of weights: a unit with a weight left still competes, and no weight comes back.
    weights = jnp.array([[True, True, False], [False, True, False]])
    kept = masks_at(scores, {"a": 1, "logits": 0}, granularity="unit",
                    within={"a": weights, "logits": jnp.ones(1, bool)})  # fmt: skip
    assert kept["a"].tolist() == [[True, True, False], [False, True, False]]


def test_within_in_global_scope():
    scores = {"a": jnp.array([[9.0, 1.0]]), "b": jnp.array([[2.0, 3.0]]), "logits": jnp.ones(1)}
    earlier = {"a": jnp.array([[False, True]]), "b": jnp.array([[True, True]]),
               "logits": jnp.ones(1, bool)}  # fmt: skip
    kept = masks_at(scores, jnp.array([1, 2, 3]), scope="global", within=earlier)
    assert kept["a"].tolist() == [[[False, True]], [[False, False]], [[False, False]]]
    assert kept["b"].tolist() == [[[True, True]], [[True, True]], [[False, True]]]


def test_within_other_kinds_of_masks():
    scores = {"a": jnp.array([[9.0, 1.0, 2.0]]), "logits": jnp.ones(1)}
    for kind in (np.bool_, np.int32, np.float32):
        earlier = {"a": np.array([[0, 1, 1]], kind), "logits": np.ones(1, kind)}
        kept = masks_at(scores, {"a": 2, "logits": 0}, within=earlier)["a"]
        assert kept.dtype == bool
        assert kept.tolist() == [[False, False, True]]


def test_within_does_not_touch_what_is_not_prunable():
    scores = {"a": jnp.ones((1, 2)), "logits": jnp.ones((2, 2))}
    earlier = {"a": jnp.ones((1, 2), bool), "logits": jnp.zeros((2, 2), bool)}
    assert masks_at(scores, {"a": 1, "logits": 0}, within=earlier)["logits"].all()


# The algebra of masks.

SHAPES = {"a": (3, 4), "b": (4, 2)}
SIZES = {"weight": (12, 8), "unit": (4, 2)}


def masks_of(scores, pruned, within=None, **options):
    return jitted(scores, pruned, within=within, prunable=everything, **options)


def leaves_of(elements):
    return st.fixed_dictionaries(
        {name: arrays(np.float32, shape, elements=elements) for name, shape in SHAPES.items()}
    )


tied_scores = leaves_of(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 2.0**-149, 1.0, 1.5, 2.0]))
any_scores = leaves_of(st.floats(-(2.0**60), 2.0**60, width=32)) | tied_scores
any_masks = st.fixed_dictionaries({n: arrays(np.bool_, shape) for n, shape in SHAPES.items()})


@st.composite
def problems(draw, levels=4):
    """Draw a granularity, a scope, and counts for some levels."""
    options = draw(st.sampled_from(OPTIONS))
    sizes = SIZES[options["granularity"]]

    def several(size):
        return np.array(draw(st.lists(st.integers(0, size), min_size=levels, max_size=levels)),
                        np.int32)  # fmt: skip

    if options["scope"] == "global":
        return options, several(sum(sizes))
    return options, dict(zip(SHAPES, map(several, sizes), strict=True))


def pruned_units(got, options):
    """Count what each level prunes, by leaf or, in global scope, in all."""
    lost = {name: ~np.asarray(mask) for name, mask in got.items()}
    if options["granularity"] == "unit":
        assert all((m == m[:, :1]).all() for m in lost.values())  # whole columns
        lost = {name: m[:, 0] for name, m in lost.items()}
    lost = {name: m.reshape(len(m), -1).sum(1) for name, m in lost.items()}
    return sum(lost.values()) if options["scope"] == "global" else lost


@given(any_scores, problems())
def test_counts_are_exact(scores, problem):
    options, pruned = problem
    got = masks_of(scores, pruned, **options)
    jax.tree.map(np.testing.assert_array_equal, pruned_units(got, options), pruned)


@given(any_scores, problems())
def test_levels_are_nested(scores, problem):
    options, pruned = problem
    pruned = jax.tree.map(np.sort, pruned)
    for mask in as_numpy(masks_of(scores, pruned, **options)).values():
        assert (mask[1:] <= mask[:-1]).all()
        np.testing.assert_array_equal(mask.any(0), mask[0])  # the union is the lowest level,
        np.testing.assert_array_equal(mask.all(0), mask[-1])  # the intersection the highest


@given(any_scores, problems())
def test_levels_are_independent(scores, problem):
    options, pruned = problem
    together = masks_of(scores, pruned, **options)
    for i in range(4):
        alone = masks_of(scores, jax.tree.map(lambda c: np.full(4, c[i]), pruned), **options)  # noqa: B023
        for name in SHAPES:
            np.testing.assert_array_equal(alone[name][0], together[name][i])


@given(any_scores, problems())
def test_kept_scores_are_no_lower_than_pruned_ones(scores, problem):
    options, pruned = problem
    got = as_numpy(masks_of(scores, pruned, **options))
    values = {name: s.astype(np.float64) for name, s in scores.items()}
    if options["granularity"] == "unit":
        values = {name: np.sqrt((v**2).sum(0)) for name, v in values.items()}
        got = {name: mask[:, 0] for name, mask in got.items()}
    groups = [list(SHAPES)] if options["scope"] == "global" else [[name] for name in SHAPES]
    # Norms are rounded, and denormal ones zero.
    factor, slack = (1 - 1e-6, 1e-37) if options["granularity"] == "unit" else (1, 0)
    for group in groups:
        value = np.concatenate([values[name].ravel() for name in group])
        for i in range(4):
            kept = np.concatenate([got[name][i].ravel() for name in group])
            if kept.any() and not kept.all():
                assert value[kept].min() >= factor * value[~kept].max() - slack


@given(st.permutations(range(20)), st.permutations(range(12)), problems())
def test_weights_follow_a_permutation(ranks, order, problem):
    options, pruned = problem
    options = options | {"granularity": "weight"}
    values = np.array(ranks, np.float32) - 7
    scores = {"a": values[:12].reshape(3, 4), "b": values[12:].reshape(4, 2)}
    moved = scores | {"a": scores["a"].ravel()[list(order)].reshape(3, 4)}
    got, expected = masks_of(moved, pruned, **options), masks_of(scores, pruned, **options)
    np.testing.assert_array_equal(got["b"], expected["b"])
    expected = np.asarray(expected["a"]).reshape(4, 12)[:, list(order)].reshape(4, 3, 4)
    np.testing.assert_array_equal(got["a"], expected)


@given(st.permutations(range(4)), st.sampled_from(["layer", "global"]), st.integers(0, 100))
def test_units_follow_a_permutation(order, scope, seed):
    rng = np.random.default_rng(seed)
    scores = {n: rng.normal(size=shape).astype(np.float32) for n, shape in SHAPES.items()}
    moved = scores | {"a": scores["a"][:, list(order)]}
    rising = np.arange(4, dtype=np.int32)
    pruned = 2 * rising if scope == "global" else {"a": rising, "b": rising % 3}
    options = {"granularity": "unit", "scope": scope}
    got, expected = masks_of(moved, pruned, **options), masks_of(scores, pruned, **options)
    np.testing.assert_array_equal(got["b"], expected["b"])
    np.testing.assert_array_equal(got["a"], np.asarray(expected["a"])[:, :, list(order)])


@given(tied_scores, problems())
def test_weights_depend_on_the_order_of_scores_alone(scores, problem):
    options, pruned = problem
    options = options | {"granularity": "weight"}
    stretched = {
        name: np.where(np.abs(s) < 0.5, 10 * s, 3 * s + np.sign(s)) for name, s in scores.items()
    }
    jax.tree.map(
        np.testing.assert_array_equal,
        masks_of(scores, pruned, **options),
        masks_of(stretched, pruned, **options),
    )


@given(st.permutations(range(20)), problems())
def test_the_smallest_are_the_rest_of_the_largest(ranks, problem):
    options, pruned = problem
    options = options | {"granularity": "weight"}
    values = np.array(ranks, np.float32) - 9.5
    scores = {"a": values[:12].reshape(3, 4), "b": values[12:].reshape(4, 2)}
    sizes = 20 if options["scope"] == "global" else dict(zip(SHAPES, SIZES["weight"], strict=True))
    others = jax.tree.map(lambda size, c: size - c, sizes, pruned)
    low = masks_of(scores, pruned, **options)
    high = masks_of({name: -s for name, s in scores.items()}, others, **options)
    for name in SHAPES:
        np.testing.assert_array_equal(low[name], ~np.asarray(high[name]))


@given(any_scores, any_masks, problems())
def test_within_never_revives(scores, earlier, problem):
    options, pruned = problem
    got = masks_of(scores, pruned, earlier, **options)
    for name in SHAPES:
        assert (np.asarray(got[name]) <= earlier[name]).all()
    if options["granularity"] == "weight":
        already = {name: np.sum(~mask) for name, mask in earlier.items()}
        already = sum(already.values()) if options["scope"] == "global" else already
        expected = jax.tree.map(lambda a, c: np.maximum(a, c), already, pruned)
        jax.tree.map(np.testing.assert_array_equal, pruned_units(got, options), expected)


@given(any_scores, any_scores, problems())
def test_rounds_of_pruning_only_lose(first, second, problem):
    options, pruned = problem
    pruned = jax.tree.map(np.sort, pruned)
    earlier = level_of(masks_of(first, pruned, **options), 1)
    later = masks_of(second, pruned, earlier, **options)
    for name in SHAPES:
        assert (np.asarray(later[name]) <= np.asarray(earlier[name])).all()
        np.testing.assert_array_equal(later[name][1], earlier[name])  # the same count again
    lost = jax.tree.map(lambda c: np.maximum(c, c[1]), pruned)
    jax.tree.map(np.testing.assert_array_equal, pruned_units(later, options), lost)


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
    kept = masks.weight_masks(params, 0.5)
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


def test_gradients_through_masks():
    w = jnp.array([2.0, jnp.inf, 3.0])
    kept = jnp.array([True, False, True])
    got = jax.grad(lambda w: jnp.sum(masks.apply_masks(w, kept) ** 2))(w)
    assert got.tolist() == [4.0, 0.0, 6.0]


def test_apply_masks_of_all_levels_by_vmap():
    params = {"a": jnp.arange(1.0, 7.0).reshape(2, 3), "logits": jnp.ones((3, 2))}
    stacked = masks.weight_masks(params, LEVELS)
    got = jax.vmap(masks.apply_masks, in_axes=(None, 0))(params, stacked)
    np.testing.assert_array_equal(got["a"], np.where(stacked["a"], params["a"][None], 0))


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
    scores = params | {"logits": jnp.ones(1)}
    pruned = {"a": 1, "b": {"c": 0}, "logits": 0}
    with pytest.raises(ValueError, match=message.replace("masks", "within").replace(
            "params", "scores")):  # fmt: skip
        masks_at(scores, pruned, within=kept | {"logits": np.ones(1, bool)})


def test_sparsity_of_by_hand():
    kept = {
        "a": jnp.array([[True, False], [False, False]]),
        "bias": jnp.array([True, False]),
        "logits": jnp.array([[True, False, True, True]]),
    }
    assert masks.sparsity_of(kept) == 3 / 4
    assert masks.sparsity_of(kept, prunable=everything) == 5 / 10
    assert masks.sparsity_of(kept, prunable=lambda path, leaf: path == "bias") == 1 / 2
    assert masks.sparsity_of(kept, prunable=lambda path, leaf: False) == 0


def test_sparsity_of_refuses():
    with pytest.raises(TypeError, match="sparsity_of counts concrete masks.*outside of jit"):
        jax.jit(masks.sparsity_of)({"a": jnp.ones((2, 2), bool), "logits": jnp.ones(1, bool)})
    with pytest.raises(ValueError, match="pass prunable="):
        masks.sparsity_of([jnp.ones((2, 2), bool)])


# Layers pruned whole.


@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_emptied_layers_are_warned_of_once(granularity):
    params = {n: jnp.ones((3, 10)) for n in ("a", "b", "logits")}
    pruned = counts(params, [0.5, 0.99, 1.0], granularity=granularity)
    with pytest.warns(UserWarning, match=f"prunes every {granularity} of a, b$") as record:
        masks.warn_of_emptied(params, pruned, granularity)
    assert len(record) == 1
    total = counts(params, [0.5, 1.0], granularity=granularity, scope="global")
    with pytest.warns(UserWarning, match=f"prunes every {granularity} of a, b$"):
        masks.warn_of_emptied(params, total, granularity)


def test_emptied_by_rounding():
    params = {"small": np.ones((2, 10)), "wide": np.ones((2, 100)), "logits": np.ones(1)}
    params = jax.tree.map(np.float32, params)
    pruned = counts(params, 0.99, granularity="unit")
    with pytest.warns(UserWarning, match="every unit of small$"):
        masks.warn_of_emptied(params, pruned, "unit")
    kept = jitted(params, pruned, granularity="unit")
    assert not kept["small"].any()
    assert kept["wide"].sum() == 2


def test_no_warning_without_need():
    params = {"a": jnp.ones((3, 10)), "bias": jnp.ones(10), "logits": jnp.ones((10, 2))}
    with warnings.catch_warnings(action="error"):
        for scope in ("layer", "global"):
            pruned = counts(params, [0.0, 0.9], granularity="unit", scope=scope)
            masks.warn_of_emptied(params, pruned, "unit")
        masks.warn_of_emptied({}, {}, "weight")


# Bad input.

GOOD = {"a": np.ones((2, 3), np.float32), "logits": np.ones((3, 2), np.float32)}
ZERO = {"a": 0, "logits": 0}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", OPTIONS)
def test_scores_that_are_not_finite(value, options):
    scores = GOOD | {"a": np.array([[1, 2, value], [4, 5, 6]], np.float32)}
    pruned = counts(scores, 0.5, **options)
    for convert in (np.asarray, jnp.asarray):
        with pytest.raises(ValueError, match="scores of leaf 'a' contain NaN or infinite values"):
            masks_at(jax.tree.map(convert, scores), pruned, **options)
    with pytest.raises(ValueError, match="scores of leaf 'a' contain NaN or infinite"):
        masks.weight_masks(scores, 0.5)
    # Under jit values cannot be seen; the counts stay exact all the same.
    lost = np.sum(~jitted(scores, pruned, **options)["a"])
    assert lost == (3 if options["granularity"] == "weight" else 4)


def test_scores_may_be_anything_where_not_prunable():
    scores = {"bias": np.array([np.nan]), "steps": np.int32(3), "key": jax.random.key(0)} | GOOD
    scores["logits"] = np.full((3, 2), np.inf, np.float32)
    got = masks_at(scores, counts(scores, 0.5))
    assert got["a"].sum() == 3
    assert all(got[name].all() for name in ("bias", "steps", "key", "logits"))
    assert got["key"].shape == ()


@pytest.mark.parametrize(
    ("leaf", "error", "message"),
    [
        (np.ones((2, 2), np.int32), TypeError, "leaf 'odd' is of int32 and cannot be pruned"),
        (jax.random.split(jax.random.key(0), (2, 2)), TypeError, "leaf 'odd' is of key<fry>"),
        (np.ones((2, 0), np.float32), ValueError, r"leaf 'odd' is empty, shape \(2, 0\)"),
    ],
)
def test_leaves_that_cannot_be_pruned(leaf, error, message):
    params = GOOD | {"odd": leaf}
    for f in (
        lambda: masks.weight_masks(params, 0.5),
        lambda: masks.unit_masks(params, 0.5),
        lambda: masks_at(params, ZERO | {"odd": 0}),
        lambda: masks_at(params, 0, scope="global"),
    ):
        with pytest.raises(error, match=message + ".*`prunable`"):
            f()
    left_out = masks.weight_masks(params, 0.5, prunable=lambda path, leaf: path == "a")
    assert left_out["odd"].all()


@pytest.mark.parametrize(
    "f",
    [
        lambda tree: masks.weight_masks(tree, 0.5),
        lambda tree: masks.unit_masks(tree, 0.5),
        lambda tree: masks_at(tree, [0]),
        masks.sparsity_of,
    ],
)
def test_the_output_layer_must_be_known(f):
    with pytest.raises(ValueError, match="no layer is named `logits`.*pass prunable="):
        f([np.ones((2, 2), np.float32)])


@pytest.mark.parametrize(
    ("pruned", "options", "error", "message"),
    [
        ({"a": 7, "logits": 0}, {}, ValueError, r"counts of leaf 'a' must be in \[0, 6\], got 7"),
        ({"a": -1, "logits": 0}, {}, ValueError, r"leaf 'a' must be in \[0, 6\], got -1"),
        ({"a": 4, "logits": 0}, {"granularity": "unit"}, ValueError, r"in \[0, 3\], got 4"),
        ({"a": 0, "logits": 1}, {}, ValueError, r"leaf 'logits' must be in \[0, 0\], got 1"),
        ({"a": 0.5, "logits": 0}, {}, TypeError, "leaf 'a' must be integers, got 0.5: `counts`"),
        ({"a": 0}, {}, ValueError, "counts must be a tree like the scores.*another scope"),
        (3, {}, ValueError, "counts must be a tree like the scores.*are they of another scope"),
        (ZERO, {"scope": "global"}, ValueError, "must be one array, got a tree.*scope 'layer'"),
        (7, {"scope": "global"}, ValueError, r"counts must be in \[0, 6\], got 7"),
        (np.array([1, 9]), {"scope": "global"}, ValueError, r"\[0, 6\], got \[1, 9\]"),
        (0.5, {"scope": "global"}, TypeError, "counts must be integers, got 0.5"),
        (np.zeros((1, 1), int), {"scope": "global"}, ValueError, r"got shape \(1, 1\)"),
        (
            {"a": np.zeros((2, 2), int), "logits": 0}, {}, ValueError,
            r"counts of leaf 'a' must be a number or have one levels axis, got shape \(2, 2\)",
        ),
        (
            {"a": np.zeros(2, int), "logits": np.zeros(3, int)}, {}, ValueError,
            r"leaf 'logits' have shape \(3,\), those of 'a' \(2,\): all need the same levels",
        ),
        (
            {"a": np.zeros(2, int), "logits": 0}, {}, ValueError,
            r"leaf 'logits' have shape \(\), those of 'a' \(2,\): all need the same levels",
        ),
        (ZERO, {"granularity": "row"}, ValueError, "granularity must be one of weight, unit"),
        (ZERO, {"scope": "local"}, ValueError, "scope must be one of layer, global, got 'local'"),
        (
            ZERO, {"granularity": "unit", "unit_axis": 2}, ValueError,
            r"unit_axis 2 is not an axis of a leaf of shape \(2, 3\)",
        ),
    ],
)  # fmt: skip
def test_counts_and_options_out_of_range(pruned, options, error, message):
    # As users call it: the types are checked by the tests alone.
    with pytest.raises(error, match=message):
        inspect.unwrap(masks_at)(GOOD, pruned, **options)


def test_traced_sparsity():
    for make in (masks.weight_masks, masks.unit_masks):
        with pytest.raises(TypeError, match="sparsity is traced.*`masks_at`"):
            jax.jit(partial(make, GOOD))(0.5)
        traced = jax.jit(lambda params: make(params, 0.5))(GOOD)  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, traced, make(GOOD, 0.5))
