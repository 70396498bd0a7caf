"""Sparse training as optax transformations: rules by hand, and what holds of all of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import trees
from jaxprune.granularity import n_m
from jaxprune.transforms import Seen, SparsifyState

RNG = np.random.default_rng(0)


sparsify: Any = jp.sparsify


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


PARAMS = {"a": normal(8, 12), "bias": normal(12), "b": normal(12, 4)}
X, Y = (jnp.asarray(normal(64, n)) for n in (8, 4))
RULES = {
    "static": jp.static(0.5),
    "gradual": jp.gradual(jp.cubic(0.8, begin=0, end=20, every=4)),
    "saliency": jp.gradual(jp.linear(0.7, begin=1, end=9, every=2), criterion="saliency"),
    "global": jp.gradual(jp.one_shot_at(0.6, 2), scope="global"),
    "units": jp.gradual(jp.cosine(0.5, begin=0, end=6, every=3), granularity=jp.unit()),
    "2:4": jp.gradual(jp.one_shot_at(0.5, 1), granularity=n_m(2, 4)),
    "set": jp.set(jp.constant(0.7, end=20, every=5)),
    "rigl": jp.rigl(jp.constant(0.7, end=20, every=5), scope="layer"),
    "rigl, global": jp.rigl(jp.constant(0.7, end=20, every=5), scope="global"),
}
FINAL = {"static": 0.5, "gradual": 0.8, "saliency": 0.7, "global": 0.6, "units": 0.5, "2:4": 0.5,
         "set": 0.7, "rigl": 0.7, "rigl, global": 0.7}  # fmt: skip
slow = pytest.mark.slow
FIRST, COUNTED = (
    [pytest.param(n, marks=() if n in few else slow) for n in RULES]
    for few in (("set",), ("gradual", "2:4", "rigl"))
)
OPTIMIZERS = {
    "sgd": optax.sgd(0.05, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(0.01, weight_decay=0.1),
    "muon": optax.contrib.muon(0.01),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01)),
    "adafactor": optax.adafactor(0.01),
}


SHOWN = {("gradual", "adamw"), ("rigl", "muon")}


def loss(params, x, y):
    hidden = jax.nn.relu(x @ params["a"] + params["bias"][None])
    return jnp.mean((hidden @ params["b"] - y) ** 2)


def trained(tx, steps, params=PARAMS, state=None, start=0, given=True, cast=lambda tree: tree):
    """Return parameters and state after some steps, and the masks after each."""

    @jax.jit
    def step(params, state, number):
        rows = jax.lax.dynamic_slice_in_dim(jnp.arange(64), (8 * number) % 64, 8)
        gradients = jax.grad(loss)(params, *cast((X[rows], Y[rows])))
        more = {"step": number} if given else {}
        updates, state = tx.update(gradients, state, params, **more)
        return optax.apply_updates(params, updates), state

    state, seen = tx.init(params) if state is None else state, []
    for number in range(start, start + steps):
        params, state = step(params, state, jnp.int32(number))
        seen.append(jp.masks_of(state))
    return params, state, seen


def assert_zero(params, masks):
    for w, mask in zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True):
        assert not np.asarray(w, np.float32)[~np.asarray(mask)].any()


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def pruned(masks):
    flat = [np.asarray(masks[name]) for name in ("a", "b")]
    return sum(int((~mask).sum()) for mask in flat) / sum(mask.size for mask in flat)


pytestmark = pytest.mark.usefixtures("promoting")


@pytest.fixture
def promoting():
    """Optax multiplies integers with floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", COUNTED)
def test_counts_are_exact_and_pruned_weights_zero_at_every_step(name):
    tx = sparsify(OPTIMIZERS["adamw"], RULES[name])
    params, state, seen = trained(tx, 24)
    assert pruned(seen[-1]) == pytest.approx(FINAL[name], abs=0.01)
    assert seen[-1]["bias"].all()
    assert_zero(params, seen[-1])
    shares = [pruned(masks) for masks in seen]
    assert shares == sorted(shares)
    if name in ("set", "rigl", "rigl, global"):
        assert len(set(shares)) == 1
        moved = [bool(np.any(a["a"] != b["a"])) for a, b in zip(seen, seen[1:], strict=False)]
        assert [i + 1 for i, one in enumerate(moved) if one] == [5, 10, 15] + [20] * moved[19]
    else:
        for a, b in zip(seen, seen[1:], strict=False):
            assert all(np.all(b[leaf] <= a[leaf]) for leaf in a)
    assert int(state.step) == 24


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        pytest.param(name, other, marks=() if (name, other) in SHOWN else slow)
        for name in ("gradual", "rigl") for other in OPTIMIZERS
    ],
)  # fmt: skip
def test_any_optimizer_keeps_zeros_and_its_state_forgets_what_goes(name, optimizer):
    params, state, seen = trained(sparsify(OPTIMIZERS[optimizer], RULES[name]), 50)
    assert_zero(params, seen[-1])
    masks = dict(trees.paths_and_leaves(seen[-1]))
    for path, leaf in trees.paths_and_leaves(state.inner):
        for name, mask in masks.items():
            if path.endswith(f"/{name}") and leaf.shape == mask.shape and optimizer != "muon":
                assert np.all(np.abs(np.asarray(leaf)[~np.asarray(mask)]) < 1e-29), path


@pytest.mark.parametrize("name", FIRST)
def test_resumed_scanned_and_counted_by_itself_are_the_same(name):
    tx = sparsify(OPTIMIZERS["sgd"], RULES[name], seed=3)
    whole = trained(tx, 24)
    first = trained(tx, 7)
    again = trained(tx, 17, *first[:2], start=7)
    assert_same(again[:2], whole[:2])
    assert_same(trained(tx, 24, given=False)[:2], whole[:2])

    def step(carry, number):
        params, state = carry
        rows = jax.lax.dynamic_slice_in_dim(jnp.arange(64), (8 * number) % 64, 8)
        gradients = jax.grad(loss)(params, X[rows], Y[rows])
        updates, state = tx.update(gradients, state, params, step=number)
        return (optax.apply_updates(params, updates), state), None

    carry = jax.tree.map(jnp.asarray, PARAMS), tx.init(PARAMS)
    (params, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(24)))(carry)
    assert_same(jp.masks_of(state), whole[2][-1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, whole[0])


def test_other_seeds_draw_other_weights():
    masks = [jp.masks_of(sparsify(optax.sgd(0.1), jp.static(0.5), seed=i).init(PARAMS))
             for i in (0, 0, 1)]  # fmt: skip
    assert_same(masks[0], masks[1])
    assert np.any(masks[0]["a"] != masks[2]["a"])


def test_levels_are_values_and_the_masks_still_cost_nothing_between_updates():
    levels = (0.3, 0.6, 0.9)
    txs = [sparsify(OPTIMIZERS["adamw"], jp.gradual(jp.cubic(level, begin=0, end=8, every=4)))
           for level in levels]  # fmt: skip
    alone = [trained(tx, 10) for tx in txs]
    states = trees.stack([tx.init(PARAMS) for tx in txs])
    params = trees.stack([jax.tree.map(jnp.asarray, PARAMS)] * 3)

    def one(params, state, number):
        rows = jax.lax.dynamic_slice_in_dim(jnp.arange(64), (8 * number) % 64, 8)
        gradients = jax.grad(loss)(params, X[rows], Y[rows])
        updates, state = txs[0].update(gradients, state, params, step=number)
        return optax.apply_updates(params, updates), state

    every = jax.vmap(one, (0, 0, None))
    names = [eqn.primitive.name for eqn in jax.make_jaxpr(every)(params, states, 0).jaxpr.eqns]
    assert "cond" in names  # not a select that computes both
    step = jax.jit(every)
    for number in range(10):
        params, states = step(params, states, jnp.int32(number))
    for i, (own, state, _) in enumerate(alone):
        assert_same(trees.unstack(jp.masks_of(states))[i], jp.masks_of(state))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), trees.unstack(params)[i], own
        )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=slow)])
def test_zeros_are_exact_in_every_dtype_from_the_first_update_on(dtype):
    params = jax.tree.map(lambda w: jnp.asarray(w, dtype), PARAMS)
    tx = sparsify(optax.adam(0.01), jp.static(0.5))
    cast = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, dtype))
    params, state, _ = trained(tx, 1, params, cast=cast)
    assert all(w.dtype == dtype for w in jax.tree.leaves(params))
    assert_zero(params, jp.masks_of(state))


def test_rigl_by_hand():
    """Six weights of which three stay: the smallest goes, the steepest of the others comes."""
    rule = jp.rigl(jp.constant(0.5, end=4, every=2), drop=0.6, scope="layer")
    masks = {"w": jnp.array([[True, True, True, False, False, False]])}
    _, state = rule.init({"w": jnp.ones((1, 6))}, jax.random.key(0))
    params = {"w": jnp.array([[3.0, -1.0, 2.0, 0.0, 0.0, 0.0]])}
    gradients = {"w": jnp.array([[9.0, 0.1, 9.0, -0.3, 0.2, 0.05]])}
    # The share is 0.6, 0.3 and 0 of three weights: two, one and none. Of the two that go at first
    # one comes back at once, since its gradient is large.
    for index, expected in enumerate(([1, 0, 1, 1, 0, 0], [1, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0])):
        seen = Seen(masks, params, gradients, jnp.int32(index), jax.random.key(0))
        found, _ = rule.update(state, seen)
        assert found["w"].astype(int).tolist() == [expected]
    flat = {"w": jnp.array([[0.2, 0.1, 0.0, -0.3, 0.4, 0.05]])}
    seen = Seen(masks, params, flat, jnp.int32(0), jax.random.key(0))
    assert rule.update(state, seen)[0]["w"].astype(int).tolist() == [[1, 0, 0, 1, 1, 0]]


def test_set_by_hand():
    rule = jp.set(jp.constant(0.5, end=0), drop=0.3, scope="layer")
    params = {"w": jnp.array([[4.0, -1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0]])}
    masks = {"w": params["w"] != 0}
    _, state = rule.init(params, jax.random.key(0))
    counted = np.zeros(8, int)
    for i in range(200):
        seen = Seen(masks, params, params, jnp.int32(0), jax.random.key(i))
        found = np.asarray(rule.update(state, seen)[0]["w"][0])
        assert found.sum() == 4 and found[[0, 2, 3]].all()
        counted += found
    drawn = counted[[1, 4, 5, 6, 7]]
    assert drawn.sum() == 200 and drawn.min() > 20


def test_regrown_weights_start_from_zero_with_no_moments():
    tx = sparsify(optax.adam(0.01), jp.rigl(jp.constant(0.5, end=30, every=3), drop=1.0))
    params, state, seen = trained(tx, 3)
    params, state, after = trained(tx, 1, params, state, start=3)
    new = np.asarray(after[-1]["a"]) & ~np.asarray(seen[-1]["a"])
    assert new.any() and not np.asarray(params["a"])[new].any()
    assert not np.asarray(state.inner[0].mu["a"])[new].any()


def test_straight_through_keeps_dense_weights_and_runs_with_the_largest():
    tx = sparsify(optax.sgd(0.1), jp.ste(jp.constant(0.5, end=9), granularity=n_m(2, 4)))
    params: Any = {"w": jnp.array([[4.0], [-1.0], [2.0], [1.5]])}
    state = tx.init(params)
    sparse = jp.forward(params, state)
    assert sparse["w"].ravel().tolist() == [4, 0, 2, 0]
    gradients = {"w": jnp.array([[0.0], [0.0], [8.0], [-9.0]])}
    updates, state = tx.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"].ravel(), [4, -1, 1.2, 2.4], rtol=1e-6)
    assert jp.masks_of(state)["w"].ravel().tolist() == [True, False, False, True]
    decayed = sparsify(
        optax.sgd(0.1), jp.ste(jp.constant(0.5, end=9), granularity=n_m(2, 4), decay=0.5)
    )
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = decayed.update(zero, decayed.init(params), params)
    np.testing.assert_allclose(updates["w"].ravel(), [0, 0.05, -0.06, 0], rtol=1e-5)


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=slow) for name in ("saliency", "set")), "rigl"]
)
def test_masks_updated_from_the_host_are_those_of_the_step(name):
    rule, inner = RULES[name], optax.sgd(0.05)
    inside = sparsify(inner, rule)
    outside = sparsify(inner, rule._replace(steps=()))
    params, state = PARAMS, outside.init(PARAMS)
    expected, _, seen = trained(inside, 12)
    for number in range(12):
        rows = (8 * number) % 64 + np.arange(8)
        gradients = jax.grad(loss)(params, X[rows], Y[rows])
        updates, state = outside.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        if number in rule.steps:
            params, state = jp.update_masks(rule, state, params, gradients, number)
        assert_same(jp.masks_of(state), seen[number])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, expected)
    with pytest.raises(ValueError, match="no masks after step 11"):
        jp.update_masks(rule, state, params, gradients, 11)


def test_it_composes():
    rule = RULES["gradual"]
    every = optax.MultiSteps(sparsify(optax.adam(0.01), rule), 2)
    state = every.init(jax.tree.map(jnp.asarray, PARAMS))
    params = jax.tree.map(jnp.asarray, PARAMS)
    for i in range(8):
        gradients = jax.grad(loss)(params, X[8 * i : 8 * i + 8], Y[8 * i : 8 * i + 8])
        updates, state = every.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    assert_zero(params, jp.masks_of(state))
    found = jp.masks_of(optax.apply_if_finite(sparsify(optax.sgd(0.1), rule), 3).init(PARAMS))
    assert found["a"].all()
    frozen = optax.masked(
        sparsify(optax.sgd(0.1), jp.static(0.5)), {"a": True, "bias": True, "b": False}
    )
    assert int(jp.masks_of(frozen.init(PARAMS))["a"].sum()) == 48


def test_an_optimizer_state_keeps_its_masks_in_a_checkpoint(tmp_path):
    import orbax.checkpoint as ocp

    tx = sparsify(optax.adam(0.01), RULES["rigl"])
    params, state, _ = trained(tx, 6)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        restored = saver.restore(tmp_path / "state", jax.eval_shape(tx.init, PARAMS))
    assert isinstance(restored, SparsifyState)
    assert_same(trained(tx, 9, params, restored, start=6)[0], trained(tx, 15)[0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: jp.gradual({}), "one at least"),
        (lambda: jp.gradual({-1: 0.5}), "steps of at least 0"),
        (lambda: jp.rigl(jp.constant(0.5, end=9), drop=0), r"drop must be in \(0, 1\], got 0"),
        (lambda: jp.set(jp.constant(0.5, end=9), drop=1.5), r"drop must be in \(0, 1\], got 1.5"),
        (lambda: jp.rigl(jp.cubic(0.5, begin=0, end=9)), "keeps one sparsity.*use constant"),
        (lambda: jp.static(1.5).init(PARAMS, jax.random.key(0)), r"in \[0, 1\], got 1.5"),
        (lambda: jp.gradual({0: 0.5}, criterion="unknown"), "criterion must be one of"),
        (lambda: jp.ste(jp.constant(0.5, end=9), decay=-1), "decay must be at least 0, got -1"),
        (lambda: sparsify(optax.sgd(1.0), jp.static(0.5)).init({"bias": jnp.ones(3)}),
         "no leaf of the parameters can be pruned by weight"),
        (lambda: sparsify(optax.sgd(1.0), jp.gradual({0: 0.5})).update(
            PARAMS, sparsify(optax.sgd(1.0), jp.gradual({0: 0.5})).init(PARAMS)),
         "sparsify needs the parameters"),
        (lambda: jp.masks_of(optax.adam(0.1).init(PARAMS)), "holds masks of no sparsify"),
        (lambda: jp.gradual({0: 0.3}, granularity=n_m(2, 4)).init(PARAMS, jax.random.key(0)),
         "2:4"),
        (lambda: trained(sparsify(optax.sgd(0.1), jp.gradual({0: 0.5}, criterion="wanda")), 1),
         "sees parameters, gradients and a key, no inputs|no inputs"),
    ],
)  # fmt: skip
def test_what_rules_refuse(make, words):
    with pytest.raises((ValueError, TypeError, AttributeError), match=words):
        make()


def test_two_of_them_are_told():
    state = optax.chain(
        sparsify(optax.sgd(1.0), jp.static(0.5)), sparsify(optax.sgd(1.0), jp.static(0.5))
    ).init(PARAMS)
    with pytest.raises(ValueError, match="holds masks of 2 sparsify"):
        jp.masks_of(state)
