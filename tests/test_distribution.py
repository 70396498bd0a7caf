from decimal import Decimal
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprune import distribution, trees
from jaxprune.granularity import unit, weight

num_pruned, counts = distribution.num_pruned, distribution.counts

PARAMS = {
    "conv": {"kernel": np.ones((3, 3, 2, 4), np.float32), "bias": np.ones(4, np.float32)},
    "dense": {"kernel": np.ones((5, 2), np.float32)},
    "steps": np.ones((2, 2), np.int32),
}


def everything(path, leaf):
    return True


def listed(tree):
    """Return the tree with lists in place of arrays."""
    return jax.tree.map(lambda x: np.asarray(x).tolist(), tree)


@pytest.mark.parametrize(
    ("size", "given", "expected"),
    [
        (10, 0.9, 9),  # int(10 * (1 - 0.9)) would keep none
        (1000, 0.9, 900),  # int(1000 * (1 - 0.9)) would keep 99
        (10, 0.25, 3),  # halves are rounded up, not to even
        (10, 0.35, 4),
        (10, 0.05, 1),
        (10, 0.0499999, 0),
        (1, 0.5, 1),
        (1, 0.49, 0),
        (0, 0.5, 0),
        (7, 0, 0),
        (7, 1, 7),
        (7, 1.0, 7),
        (1000, 0.999, 999),
        (10_000, 0.999, 9990),
        (999, 0.999, 998),
        (499, 0.999, 499),
        (10, np.float32(0.9), 9),
        (2**26, np.float32(0.1), 6_710_886),
        (10, np.float16(0.9), 9),
        (10, np.float64(0.25), 3),
        (10, np.int64(1), 10),
        (10, jnp.float32(0.9), 9),
        (3, Fraction(1, 3), 1),
        (3, Fraction(1, 6), 1),
        (3, Fraction(10**20 - 1, 6 * 10**20), 0),
        (10**6, Decimal("0.9999995"), 10**6),
        (10**6, Decimal("0.99999949999999999999999999999999"), 999_999),
        (2**24 + 1, 1.0, 2**24 + 1),  # float32 has no such number
        (2**24 + 3, 0.5, 2**23 + 2),
        (100_000_007, 0.9, 90_000_006),
        (2**40 + 1, 0.999, 1_098_412_116_149),
    ],
)
def test_num_pruned_by_hand(size, given, expected):
    assert num_pruned(size, given) == expected
    assert type(num_pruned(size, given)) is int


def test_every_percentage_of_a_thousand_is_exact():
    assert [num_pruned(1000, i / 1000) for i in range(1001)] == list(range(1001))
    assert [num_pruned(1000, np.float32(i / 1000)) for i in range(1001)] == list(range(1001))
    assert [num_pruned(100, x) for x in np.arange(0, 101) / 100] == list(range(101))


@given(st.integers(0, 10**10), st.integers(0, 6).flatmap(lambda k: st.tuples(
    st.just(10**k), st.integers(0, 10**k))))  # fmt: skip
def test_num_pruned_is_an_integer_formula(size, sparsity):
    unit, part = sparsity
    expected = (2 * size * part + unit) // (2 * unit)
    assert num_pruned(size, part / unit) == expected
    assert num_pruned(size, Fraction(part, unit)) == expected
    assert num_pruned(size, Decimal(part) / unit) == expected
    half = 2 * size * part % (2 * unit) == unit
    assert expected + num_pruned(size, Fraction(unit - part, unit)) == size + half


@given(st.integers(0, 10**9), st.floats(0, 1), st.floats(0, 1))
def test_num_pruned_is_monotone_and_in_range(size, a, b):
    low, high = sorted((a, b))
    assert 0 <= num_pruned(size, low) <= num_pruned(size, high) <= size


BAD = [
    (1.3, ValueError, r"sparsity must be in \[0, 1\], got 1.3"),
    (-1e-9, ValueError, r"sparsity must be in \[0, 1\], got -1e-09"),
    (90, ValueError, r"sparsity must be in \[0, 1\], got 90"),
    (Fraction(4, 3), ValueError, r"sparsity must be in \[0, 1\], got 4/3"),
    (Decimal("1.0000000000000000000000000000001"), ValueError, r"must be in \[0, 1\], got 1.0000"),
    (float("nan"), ValueError, r"sparsity must be a number in \[0, 1\], got nan"),
    (np.float32("inf"), ValueError, r"sparsity must be a number in \[0, 1\], got np.float32\(inf"),
    (Decimal("nan"), ValueError, r"sparsity must be a number in \[0, 1\], got Decimal"),
    (True, ValueError, "must be a number"),
    (None, TypeError, r"sparsity must be a number in \[0, 1\], got None"),
    ("half", TypeError, "must be a number"),
    ("0.5", TypeError, "must be a number"),
    (0.5j, TypeError, "must be a number"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD)
def test_bad_sparsity(given, error, message):
    for f in (distribution.exact, lambda s: num_pruned(10, s), lambda s: counts(PARAMS, s)):
        with pytest.raises(error, match=message):
            f(given)
    with pytest.raises(error, match=message):
        counts(PARAMS, [0.5, given])


def test_negative_size():
    with pytest.raises(ValueError, match="size must be at least 0, got -1"):
        num_pruned(-1, 0.5)


@pytest.mark.parametrize(
    "f",
    [
        distribution.exact,
        lambda s: num_pruned(10, s),
        lambda s: counts(PARAMS, s),
        lambda s: counts(PARAMS, [0.0, s]),
        lambda s: counts(PARAMS, jnp.stack([s, s])),
    ],
)
def test_traced_sparsity(f):
    message = "sparsity is traced.*call `counts` outside of jit.*`masks_at`"
    with pytest.raises(TypeError, match=message):
        jax.jit(f)(0.5)
    with pytest.raises(TypeError, match=message):
        jax.vmap(f)(jnp.array([0.5, 0.9]))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0.9, Fraction(9, 10)),
        (1e-300, Fraction(1, 10**300)),
        (np.float32(0.1), Fraction(1, 10)),
        (Decimal("0.999"), Fraction(999, 1000)),
        (Fraction(1, 3), Fraction(1, 3)),
        (1, Fraction(1)),
        (-0.0, Fraction(0)),
    ],
)
def test_exact(given, expected):
    assert distribution.exact(given) == expected


def test_counts_by_hand():
    got = counts(PARAMS, 0.25)
    assert listed(got) == {
        "conv": {"kernel": 18, "bias": 0}, "dense": {"kernel": 3}, "steps": 0,
    }  # fmt: skip
    got = counts(PARAMS, [0.0, 0.25, 1.0], granularity=unit())
    assert listed(got) == {
        "conv": {"kernel": [0, 1, 4], "bias": [0, 0, 0]},
        "dense": {"kernel": [0, 1, 2]},
        "steps": [0, 0, 0],
    }
    assert all(leaf.dtype == np.int32 for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        (None, [41, 82]),  # of 72 + 10
        (unit(), [3, 6]),  # of 4 + 2
        (weight(lambda path, leaf: path != "steps"), [43, 86]),
        (unit(lambda path, leaf: path == "conv/bias"), [2, 4]),
        (weight(lambda path, leaf: False), [0, 0]),
    ],
)
def test_global_counts_by_hand(granularity, expected):
    got = counts(PARAMS, [0.5, 1.0], scope="global", granularity=granularity)
    assert got.dtype == np.int32
    assert got.tolist() == expected
    one = [counts(PARAMS, s, scope="global", granularity=granularity) for s in (0.5, 1)]
    assert [int(count) for count in one] == expected


@pytest.mark.parametrize("granularity", [weight(), unit()])
def test_counts_are_those_of_the_sizes(granularity):
    levels = [0.0, 0.123, 0.5, 0.999, 1.0]
    sizes = {path: 0 for path, _ in trees.paths_and_leaves(PARAMS)}
    if granularity.name == "weight":
        sizes |= {"conv/kernel": 72, "dense/kernel": 10}
    else:
        sizes |= {"conv/kernel": 4, "dense/kernel": 2}
    found = counts(PARAMS, levels, granularity=granularity, scope="global")
    assert found.tolist() == [num_pruned(sum(sizes.values()), s) for s in levels]
    for path, count in trees.paths_and_leaves(counts(PARAMS, levels, granularity=granularity)):
        assert count.tolist() == [num_pruned(sizes[path], s) for s in levels]


def test_a_distribution_of_ones_own():
    def ends(params, granularity, sparsity, **others):
        return granularity.name, sparsity, sorted(params)

    found = counts(PARAMS, 0.5, granularity=unit(), scope=ends)
    assert found == ("unit", 0.5, ["conv", "dense", "steps"])
    for scope, f in [("layer", distribution.uniform), ("global", distribution.globally)]:
        expected = counts(PARAMS, [0.5, 0.9], scope=scope)
        found = counts(PARAMS, [0.5, 0.9], scope=f)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        found = f(PARAMS, weight(), [0.5, 0.9], scores=None, problem=None, batches=None)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    "levels",
    [
        (0.5, 0.9),
        np.array([0.5, 0.9]),
        np.array([0.5, 0.9], np.float32),
        jnp.array([0.5, 0.9]),
        [Fraction(1, 2), Decimal("0.9")],
    ],
)
def test_kinds_of_levels(levels):
    assert counts(PARAMS, levels)["dense"]["kernel"].tolist() == [5, 9]


def test_levels_axis():
    for one in (0.5, np.float64(0.5), np.array(0.5), jnp.array(0.5), Fraction(1, 2)):
        assert counts(PARAMS, one)["dense"]["kernel"].shape == ()
    assert counts(PARAMS, [0.5])["dense"]["kernel"].shape == (1,)
    assert counts(PARAMS, [])["dense"]["kernel"].shape == (0,)


def test_counts_of_other_trees():
    all_weights = weight(everything)
    assert listed(counts([np.ones(4, np.float32), ()], 0.5, granularity=all_weights)) == [2, ()]
    assert counts(np.ones((2, 2), np.float32), 0.5) == 2
    assert counts({}, 0.5) == {}
    assert counts({}, [0.5, 1], scope="global").tolist() == [0, 0]


def test_counts_read_shapes_only():
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, PARAMS))
    found = []
    jax.jit(lambda params: found.append(counts(params, 0.9)))(PARAMS)
    for granularity in (weight(), unit()):
        expected = listed(counts(PARAMS, 0.9, granularity=granularity))
        assert listed(counts(shapes, 0.9, granularity=granularity)) == expected
    assert listed(found[0]) == listed(counts(PARAMS, 0.9))
    huge = {"a": jax.ShapeDtypeStruct((2**15, 2**15), jnp.float32)}
    assert counts(huge, 0.5) == {"a": 2**29}


def test_bad_scope_and_leaves():
    with pytest.raises(ValueError, match="scope must be one of layer, global, erk, got 'local'"):
        counts(PARAMS, 0.5, scope="local")
    with pytest.raises(TypeError, match="leaf 'steps' is of int32"):
        counts(PARAMS, 0.5, granularity=weight(everything))


def test_check_choice():
    distribution.check_choice("scope", "layer", ("layer", "global"))
    with pytest.raises(ValueError, match="scope must be one of layer, global, got ''"):
        distribution.check_choice("scope", "", ("layer", "global"))
