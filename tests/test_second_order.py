"""Methods that look at gradients of single examples or at units, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import criteria, trees
from jaxprune.criteria.corrections import joined
from jaxprune.criteria.fisher import _inverse
from jaxprune.types import Batch, Problem

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def mlp(params, x):
    return jax.nn.relu(x @ params["a"] + params["bias"][None]) @ params["out"]


PARAMS = {"a": normal(5, 8), "bias": normal(8), "out": normal(8, 3)}
X, Y = normal(40, 5), normal(40, 3)
BATCHES = [Batch(X[i : i + 20], Y[i : i + 20], jax.random.key(0)) for i in (0, 20)]
PROBLEM = Problem(mlp, lambda p, b: jnp.sum((mlp(p, b.x) - b.y) ** 2, 1))
CHOSEN = jp.weight({"a": True, "bias": False, "out": False})
COUNTS = jp.counts(PARAMS, [0, 0.5, 0.8], granularity=CHOSEN)


def gradients():
    """Return the gradients of all examples by hand, in float64."""
    a, bias, out, x, y = (np.asarray(v, "d") for v in (*PARAMS.values(), X, Y))
    before = x @ a + bias
    error = 2 * (np.maximum(before, 0) @ out - y)
    back = (error @ out.T) * (before > 0)
    return {"a": np.einsum("ni,nj->nij", x, back), "out": np.einsum(
        "ni,nj->nij", np.maximum(before, 0), error)}  # fmt: skip


def test_inverses_of_many_small_matrices():
    factors = RNG.normal(size=(50, 7, 9)).astype("f")
    blocks = np.einsum("bij,bkj->bik", factors, factors) + 0.1 * np.eye(7, dtype="f")
    found = jax.jit(_inverse)(jnp.asarray(blocks))
    np.testing.assert_allclose(found, np.linalg.inv(blocks.astype("d")), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("block", [1, 6, 16, 40, 64])
def test_fisher_obs_is_that_of_numpy(block):
    method = criteria.fisher_obs(granularity=CHOSEN, block=block, damping=0.1)
    found, masks = method.prune(PARAMS, PROBLEM, COUNTS, BATCHES)
    g = gradients()["a"].reshape(40, 40)
    padded = np.pad(g, ((0, 0), (0, -40 % block))).reshape(40, -1, block)
    fisher = np.einsum("nbi,nbj->bij", padded, padded) / 40
    damping = 0.1 * np.trace(fisher, axis1=1, axis2=2).sum() / 40
    inverse = np.linalg.inv(fisher + damping * np.eye(block))
    w = np.pad(PARAMS["a"].astype("d").ravel(), (0, -40 % block)).reshape(-1, block)
    worth = (w**2 / (2 * np.diagonal(inverse, axis1=1, axis2=2))).ravel()[:40]
    for level, gone in enumerate([0, 20, 32]):
        order = np.argsort(worth, kind="stable")[:gone]
        mask = np.asarray(masks["a"][level]).ravel()
        assert sorted(np.flatnonzero(~mask)) == sorted(order)
        expected = w.copy()
        for b in range(len(w)):
            q = [i for i in range(block) if b * block + i in order]
            if q:
                expected[b] -= inverse[b][:, q] @ np.linalg.solve(inverse[b][np.ix_(q, q)], w[b, q])
        np.testing.assert_allclose(
            np.asarray(found["a"][level]).ravel(), np.where(mask, expected.ravel()[:40], 0),
            rtol=2e-3, atol=2e-4,
        )  # fmt: skip
        np.testing.assert_array_equal(found["out"][level], PARAMS["out"])
    assert method.scores is not None
    scores = jax.jit(method.scores, static_argnums=1)(PARAMS, PROBLEM, joined(BATCHES))
    np.testing.assert_allclose(scores["a"].ravel(), worth, rtol=2e-3)
    assert not scores["out"].any()  # of no piece: no blocks of it are made


def test_fisher_obs_in_steps_and_of_all_layers_together():
    both = jp.weight({"a": True, "bias": False, "out": True})
    counts = jp.counts(PARAMS, [0.5, 0.75], granularity=both, scope="global")
    method = criteria.fisher_obs(granularity=both, block=8, steps=3)
    found, masks = method.prune(PARAMS, PROBLEM, counts, BATCHES)
    pruned = [sum(int((~mask[i]).sum()) for mask in masks.values()) for i in range(2)]
    assert pruned == [32, 48]
    assert all(np.mean(np.asarray(mask[1] <= mask[0])) > 0.8 for mask in masks.values())
    for w, mask in zip(found.values(), masks.values(), strict=True):
        assert not np.asarray(w)[~np.asarray(mask)].any()
    assert method.name == "fisher_obs(steps=3)"


@pytest.mark.parametrize("option", ["block", "damping", "steps", "at_once"])
def test_fisher_obs_takes_positive_numbers(option):
    with pytest.raises(ValueError, match=f"{option} must be positive, got 0"):
        criteria.fisher_obs(**{option: 0})  # pyright: ignore[reportArgumentType]


def graph():
    return jp.dependency_graph(mlp, PARAMS, X)


def units_pruned(method, level=0.5):
    counts = jp.counts(PARAMS, [level], granularity=jp.group(graph()))
    _, masks = method.prune(PARAMS, PROBLEM, counts, BATCHES)
    return sorted(np.flatnonzero(~np.asarray(masks["a"][0]).any(0)))


def test_taylor2_and_activations_are_those_of_numpy():
    shares = (gradients()["a"] * PARAMS["a"]).sum(1)  # of examples and units
    expected = np.argsort((shares**2).mean(0))[:4]
    assert units_pruned(criteria.taylor2(graph(), at_once=3)) == sorted(expected)
    values = np.maximum(X @ PARAMS["a"] + PARAMS["bias"], 0)
    expected = np.argsort((values.astype("d") ** 2).mean(0))[:4]
    assert units_pruned(criteria.activation(graph())) == sorted(expected)
    assert units_pruned(criteria.method("l1", granularity=jp.group(graph()))) == sorted(
        np.argsort(np.abs(PARAMS["a"]).sum(0))[:4]
    )


def test_groups_that_no_weights_take_in_are_told():
    apply = lambda p, x: jnp.tanh(x @ p["q"]) * (x @ p["k"])  # noqa: E731
    params = {"q": normal(4, 6), "k": normal(4, 6)}
    attention = lambda p, x: (apply(p, x)).sum(1, keepdims=True)  # noqa: E731
    found = jp.dependency_graph(attention, params, normal(3, 4))
    granularity = jp.group(found)
    counts = jp.counts(params, [0.5], granularity=granularity)
    problem = Problem(attention, lambda p, b: attention(p, b.x)[:, 0])
    batches = [Batch(normal(10, 4), None, jax.random.key(0)) for _ in range(2)]
    with pytest.warns(UserWarning, match="activation: ranked by what products give there.*: k"):
        _, masks = criteria.activation(found).prune(params, problem, counts, batches)
    x = np.concatenate([batch.x for batch in batches]).astype("d")
    squares = ((x @ params["q"]) ** 2).mean(0) + ((x @ params["k"]) ** 2).mean(0)
    for mask in masks.values():
        assert sorted(np.flatnonzero(~np.asarray(mask[0]).any(0))) == sorted(
            np.argsort(squares)[:3]
        )


def test_groups_that_no_product_makes_are_ranked_by_their_weights():
    table = lambda p, x: (p["table"][x] * p["scale"][None]).sum(1)  # noqa: E731
    params = {"table": normal(7, 6), "scale": np.ones(6, "f")}
    x = np.array([0, 3, 5])
    found = jp.dependency_graph(table, params, x)
    granularity = jp.group(found)
    counts = jp.counts(params, [0.5], granularity=granularity)
    problem = Problem(table, lambda p, b: table(p, b.x))
    batches = [Batch(x, None, jax.random.key(0))]
    with pytest.warns(UserWarning, match="activation: ranked by the norm of their weights"):
        _, masks = criteria.activation(found).prune(params, problem, counts, batches)
    norms = np.linalg.norm(params["table"], axis=0)
    assert sorted(np.flatnonzero(~np.asarray(masks["table"][0]).any(0))) == sorted(
        np.argsort(norms)[:3]
    )


def test_layer_errors_are_those_by_hand():
    pruned = trees.stack(
        [PARAMS, PARAMS | {"a": np.where(np.abs(PARAMS["a"]) > 1, PARAMS["a"], 0)}]
    )
    found = criteria.layer_errors(mlp, PARAMS, pruned, [X[:20], X[20:]])
    first = X.astype("d") @ PARAMS["a"], X.astype("d") @ np.asarray(pruned["a"][1], "d")
    hidden = [np.maximum(each + PARAMS["bias"], 0) for each in first]
    last = [each @ PARAMS["out"].astype("d") for each in hidden]
    for path, (dense, other) in (("a", first), ("out", last)):
        expected = ((other - dense) ** 2).sum() / (dense**2).sum()
        np.testing.assert_allclose(found[path], [0, expected], rtol=1e-4)


def test_what_methods_are_refused():
    with pytest.raises(ValueError, match="at least one batch, got none"):
        criteria.fisher_obs(granularity=CHOSEN).prune(PARAMS, PROBLEM, COUNTS, [])
    with pytest.raises(ValueError, match="layers are fitted to the inputs of batches"):
        criteria.obs().prune(PARAMS, PROBLEM, COUNTS, [])
    network = jp.network(lambda key: PARAMS, mlp)
    problem = criteria.problem(network, jp.regression(), {})
    with pytest.raises(ValueError, match="asks for losses, and the batch has no targets"):
        criteria.saliency(PARAMS, problem, Batch(X, None, jax.random.key(0)))
    infinite = [Batch(np.full_like(X, np.inf), Y, jax.random.key(0))]
    with pytest.raises(ValueError, match="layer 'a': its inputs are not finite"):
        criteria.obs().prune(PARAMS, PROBLEM, COUNTS, infinite)
    wide = {"w": jnp.ones((30_000, 2)), "out": jnp.ones((2, 1))}
    apply = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["out"]  # noqa: E731
    counts = {"w": np.array([100], np.int32), "out": np.array([0], np.int32)}
    with pytest.raises(ValueError, match="'w' has 30,000 inputs.* 4 GB: leave it out .* blocks"):
        criteria.obs().prune(
            wide, Problem(apply, lambda p, b: apply(p, b.x)[:, 0]), counts,
            [Batch(jnp.ones((2, 30_000)), None, jax.random.key(0))],
        )  # fmt: skip
    for name, message in [
        ("taylor2", "taylor2 prunes units of a dependency graph"),
        ("obs", "obs prunes weights, or n of m, not by row"),
    ]:
        with pytest.raises(ValueError, match=message):
            criteria.method(name, granularity=jp.granularity.row())


@pytest.mark.slow
def test_second_moments_of_4096_inputs():
    params = {"w": 0.02 * normal(4096, 16), "out": normal(16, 2)}
    apply = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["out"]  # noqa: E731
    problem = Problem(apply, lambda p, b: apply(p, b.x)[:, 0])
    batches = [Batch(normal(500, 4096), None, jax.random.key(0)) for _ in range(4)]
    counts = {"w": np.array([4096 * 8], np.int32), "out": np.array([0], np.int32)}
    found, masks = criteria.obs().prune(params, problem, counts, batches)
    assert np.asarray(masks["w"]).sum() == 4096 * 8
    x = batches[0].x
    plain = jnp.where(masks["w"][0], params["w"], 0)
    errors = [float(jnp.sum((x @ (w - params["w"])) ** 2)) for w in (found["w"][0], plain)]
    assert errors[0] < 0.5 * errors[1]
