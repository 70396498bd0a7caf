import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import scores

CRITERIA = [scores.magnitude]  # every criterion that needs parameters only
SMALLEST = np.float32(1e-45)  # denormal


def test_magnitude_by_hand():
    params = {"a": jnp.array([[-2.0, 1.0], [0.0, -0.5]]), "b": [jnp.array([-3.0])]}
    got = scores.magnitude(params)
    assert jax.tree.map(lambda s: s.tolist(), got) == {"a": [[2.0, 1.0], [0.0, 0.5]], "b": [[3.0]]}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_magnitude_is_the_absolute_value(dtype):
    w = np.random.default_rng(0).normal(size=(4, 5)).astype(jnp.dtype(dtype))
    w[0, :4] = 0.0, -0.0, np.inf, -np.inf
    for f in (scores.magnitude, jax.jit(scores.magnitude)):
        got = f([jnp.asarray(w)])[0]
        assert got.dtype == w.dtype
        np.testing.assert_array_equal(got, np.abs(w))
        assert not np.signbit(np.asarray(got, np.float32)).any()


def test_magnitude_keeps_denormals():
    w = jnp.array([-SMALLEST, SMALLEST, -3 * SMALLEST, 0.0])
    for f in (scores.magnitude, jax.jit(scores.magnitude)):
        got = np.asarray(f(w)).view(np.int32)  # the pattern: a comparison might take them for zero
        np.testing.assert_array_equal(got, [1, 1, 3, 0])


def test_magnitude_takes_numpy_and_passes_what_has_none():
    key, flag = jax.random.key(7), np.array([True, False])
    got = scores.magnitude({"n": np.array([-1, 2], np.int32), "key": key, "flag": flag})
    assert got["n"].tolist() == [1, 2]
    assert got["flag"].tolist() == [True, False]
    assert got["key"] is key


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(
    "make",
    [
        lambda w: w,
        lambda w: [w, (w[0], {"a": w})],
        lambda w: {"hidden": {"kernel": w, "bias": w[0]}, "logits": {"kernel": w}},
        lambda w: {"none": None, "w": w},
        lambda w: {},
    ],
)
def test_criteria_return_the_tree(criterion, make):
    params = make(jnp.array([[-1.0, 2.0], [3.0, -4.0]]))
    got = criterion(params)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_criteria_under_jit_and_vmap(criterion):
    rng = np.random.default_rng(1)
    params = {"a": rng.normal(size=(3, 4, 2)), "b": [rng.normal(size=(3, 5))]}
    params = jax.tree.map(lambda w: w.astype(np.float32), params)
    looped = [criterion(jax.tree.map(lambda w: w[i], params)) for i in range(3)]  # noqa: B023
    expected = jax.tree.map(lambda *s: np.stack(s), *looped)
    for f in (jax.vmap(criterion), jax.jit(jax.vmap(criterion))):
        jax.tree.map(np.testing.assert_array_equal, f(params), expected)
