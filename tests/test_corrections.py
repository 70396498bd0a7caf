"""Methods that correct weights, against NumPy in float64 on layers of a few units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import criteria
from jaxprune.criteria import gradients, inputs, parameters, solvers
from jaxprune.criteria.layerwise import LeastSquares, output_worths
from jaxprune.distribution import counts
from jaxprune.types import Batch, Problem

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
slow = pytest.mark.slow


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def mlp(params, x):
    for name in ("a", "b"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x @ params["out"]


PARAMS = {
    "a": {"kernel": normal(6, 12), "bias": normal(12)},
    "b": {"kernel": normal(12, 8), "bias": normal(8)},
    "out": normal(8, 3),
}
X = normal(200, 6)
PROBLEM = Problem(mlp, lambda p, b: jnp.sum((mlp(p, b.x) - b.y) ** 2, 1))
BATCHES = [Batch(X[i : i + 50], normal(50, 3), KEY) for i in range(0, 200, 50)]
CHOSEN = jp.prunable(mlp, PARAMS, X)
COUNTS = counts(PARAMS, [0, 0.5, 0.75], granularity=jp.weight(CHOSEN))


def layer_of(rows=60, inputs=10, outputs=4):
    """A layer's problem, whose inputs now are not those of the dense network."""
    x, other = normal(rows, inputs) @ normal(inputs, inputs), 0.3 * normal(rows, inputs)
    w = normal(inputs, outputs)
    one = lambda a, b: jnp.asarray(a.T @ b / rows)[None]  # noqa: E731
    given = LeastSquares(
        jnp.asarray(w)[None], one(x, x), one(x, x + other), 0, jnp.ones((1, outputs))
    )
    return given, x, x + other, w


def loss(x, target, v):
    return float(np.sum((x.astype("d") @ np.asarray(v, "d") - target) ** 2))


@pytest.mark.parametrize("kept", [0.1, 0.3, 0.7, 1.0])
def test_a_fit_is_that_of_numpy(kept):
    given, x, dense, w = layer_of()
    mask = RNG.random((1, 10, 4)) < kept
    found = np.asarray(solvers.refit(solvers.normal(given, 1e-2), jnp.asarray(mask)))[0]
    penalty = 1e-2 * np.mean(np.sum(x.astype("d") ** 2, 0))
    for j in range(4):
        s = np.flatnonzero(mask[0, :, j])
        left = x[:, s].T.astype("d") @ x[:, s] + penalty * np.eye(len(s))
        right = x[:, s].T.astype("d") @ (dense.astype("d") @ w[:, j]) + penalty * w[s, j]
        np.testing.assert_allclose(found[s, j], np.linalg.solve(left, right), rtol=2e-3, atol=2e-4)
        assert not found[~mask[0, :, j], j].any()


def test_one_weight_goes_as_the_surgeon_says():
    given, x, dense, w = layer_of(outputs=1)
    equations = solvers.normal(given, 1e-6)
    start, inverse = solvers.unconstrained(equations)
    v, inverted = np.asarray(start[0, :, 0], "d"), np.asarray(inverse[0], "d")
    first = int(np.argmin(v**2 / np.diag(inverted)))
    expected = v - v[first] / inverted[first, first] * inverted[first]
    kept = np.arange(10)[None, :, None] != first
    found = solvers.refit(equations, jnp.asarray(kept))[0, :, 0]
    np.testing.assert_allclose(found, expected * kept[0, :, 0], rtol=2e-3, atol=1e-4)
    rise = loss(x, dense.astype("d") @ w, found[:, None]) - loss(
        x, dense.astype("d") @ w, v[:, None]
    )
    np.testing.assert_allclose(rise / len(x), v[first] ** 2 / inverted[first, first], rtol=2e-2)


def test_outputs_count_as_the_network_is_sensitive_to_them():
    """Two layers by hand: squared derivatives of all outputs, where ReLUs let them through."""
    params = {"a": normal(6, 8), "bias": normal(8), "b": normal(8, 5), "c": normal(5, 4)}
    x = [normal(300, 6) for _ in range(3)]

    def apply(p, x):
        hidden = jax.nn.relu(x @ p["a"] + p["bias"][None])
        return jax.nn.relu(hidden @ p["b"].astype(jnp.float32)) @ p["c"].T.T

    found = output_worths(apply, params, x)
    inputs = np.concatenate(x).astype("d")
    before = inputs @ params["a"] + params["bias"]
    second = np.maximum(before, 0) @ params["b"]
    slopes = np.einsum("no,ok->nok", second > 0, params["c"].astype("d"))
    expected = {"c": np.ones(4), "b": (slopes**2).sum((0, 2))}
    first = np.einsum("nu,uo,nok->nuk", before > 0, params["b"].astype("d"), slopes)
    expected["a"] = (first**2).sum((0, 2))
    for path, worth in found.items():
        mean = expected[path] / expected[path].mean()
        np.testing.assert_allclose(worth[0], mean, rtol=1e-5 if path == "c" else 0.35)
    assert set(found) == {"a", "b", "c"}


def test_outputs_of_convolutions_heads_and_dead_units_count_by_their_own():
    params = {"kernel": normal(3, 3, 1, 4), "heads": normal(2, 4, 3), "last": normal(6, 2)}
    params["kernel"][..., 1] = 0
    params["heads"][0, :, 2] *= 0
    params["last"][[1, 4]] *= 10

    def apply(p, x):
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=dims)
        pooled = jax.nn.relu(y - 1e-3).mean((1, 2))
        each = jnp.einsum("bi,hio->bho", pooled, p["heads"])
        return each.reshape(len(x), 6) @ p["last"]

    found = output_worths(apply, params, [normal(40, 5, 5, 1)])
    assert found["kernel"].shape == (1, 4) and found["heads"].shape == (1, 6)
    assert found["kernel"][0, 1] == np.float32(1e-6)  # never above zero
    np.testing.assert_allclose(found["kernel"].mean(), 1, rtol=1e-5)
    wanted = (params["last"].astype("d") ** 2).sum(1)
    np.testing.assert_allclose(found["heads"][0], wanted / wanted.mean(), rtol=0.4)


def test_where_there_is_no_derivative_outputs_count_alike():
    def apply(p, x):
        y = jax.lax.while_loop(lambda y: jnp.all(y < 9), lambda y: 2 * jnp.abs(y) + 1, x @ p["a"])
        return y @ p["b"]

    params = {"a": normal(4, 6), "b": normal(6, 2)}
    with pytest.warns(UserWarning, match="weigh alike, as the network has no derivative"):
        assert output_worths(apply, params, [normal(5, 4)]) == {}


def test_weights_of_outputs_that_move_nothing_go_first():
    a = normal(6, 8)
    params = {"a": a + np.sign(a), "b": normal(8, 3)}
    params["b"][:4] *= 1e-3
    apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]  # noqa: E731
    problem, batch = (
        Problem(apply, lambda p, b: apply(p, b.x)[:, 0]),
        Batch(normal(50, 6), None, KEY),
    )
    goes = counts(params, [0.5], granularity=jp.weight({"a": True, "b": False}))
    for method in (criteria.obs, criteria.alps):
        (_, masks), (_, alike) = (
            method(weighted=weighted).prune(params, problem, goes, [batch])
            for weighted in (True, False)
        )
        assert not masks["a"][0, :, :4].any() and masks["a"][0, :, 4:].all()
        assert 0.2 < np.mean(alike["a"][0, :, :4]) < 0.8


@pytest.mark.parametrize("block", [1, 3, 4, 9, 100])
def test_blocks_change_nothing(block):
    given, *_ = layer_of()
    start, inverse = solvers.unconstrained(solvers.normal(given, 1e-2))
    kept = jnp.asarray(np.random.default_rng(1).random((1, 10, 4)) < 0.5)
    found, whole = (solvers.sweep(inverse, start, kept, size) for size in (block, 10))
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-5)
    assert not np.any(np.asarray(found)[~np.asarray(kept)])


@pytest.mark.parametrize(
    "sparsity", [pytest.param(0.25, marks=slow), 0.6, pytest.param(0.9, marks=slow)]
)
@pytest.mark.parametrize("seed", range(3))
def test_alps_does_no_worse_in_a_layer_than_obs_and_magnitude(sparsity, seed):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(80, 10)) @ rng.normal(size=(10, 10))).astype("f")
    params, apply = {"w": rng.normal(size=(10, 6)).astype("f")}, lambda p, x: x @ p["w"]
    problem, batch = Problem(apply, lambda p, b: jnp.sum(apply(p, b.x), 1)), Batch(x, None, KEY)
    goes, target = counts(params, [sparsity]), x.astype("d") @ params["w"]
    errors = []
    for method in (criteria.method("magnitude"), criteria.obs(damping=1e-4),
                   criteria.alps(damping=1e-4)):  # fmt: skip
        found, masks = method.prune(params, problem, goes, [batch])
        assert int((~masks["w"]).sum()) == goes["w"][0]
        errors.append(loss(x, target, found["w"][0]))
    assert errors[2] <= errors[1] * 1.001 and errors[2] < errors[0]


@pytest.mark.parametrize(
    "name",
    [
        "obs", "alps", "magnitude+refit",
        *(pytest.param(name, marks=slow) for name in ("obs+refit", "wanda", "fisher")),
    ],
)  # fmt: skip
def test_counts_are_exact_and_corrections_come_nearer(name):
    method = criteria.method(name, granularity=jp.weight(CHOSEN))
    params, masks = method.prune(PARAMS, PROBLEM, COUNTS, BATCHES)
    assert method.name == name
    for leaf in ("a", "b"):
        mask, weights = np.asarray(masks[leaf]["kernel"]), np.asarray(params[leaf]["kernel"])
        pruned = (~mask).sum((1, 2))
        np.testing.assert_array_equal(pruned, COUNTS[leaf]["kernel"])
        assert not weights[~mask].any()
        assert masks[leaf]["bias"].all() and masks["out"].all()
    levels = [jax.tree.map(lambda leaf: leaf[i], params) for i in range(3)]  # noqa: B023
    jax.tree.map(np.testing.assert_array_equal, levels[0], PARAMS)
    plain = jp.apply_masks(PARAMS, jp.weight_masks(PARAMS, 0.5, prunable=CHOSEN))
    errors = [float(jnp.mean((mlp(p, X) - mlp(PARAMS, X)) ** 2)) for p in (levels[1], plain)]
    if name not in ("wanda", "fisher"):
        assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("make", [criteria.obs, criteria.alps])
def test_n_of_every_m_inputs_stay(make):
    method = make(n_m=(2, 4))
    chosen = {
        "a": {"kernel": False, "bias": False},
        "b": {"kernel": True, "bias": False},
        "out": False,
    }
    half = counts(PARAMS, [0.5], granularity=jp.weight(chosen))
    _, masks = method.prune(PARAMS, PROBLEM, half, BATCHES)
    windows = np.asarray(masks["b"]["kernel"][0]).reshape(3, 4, 8)
    assert (windows.sum(1) == 2).all()
    with pytest.raises(ValueError, match="'a/kernel' has 6 inputs, which 4 does not divide"):
        method.prune(PARAMS, PROBLEM, counts(PARAMS, [0.5], granularity=jp.weight(CHOSEN)), BATCHES)


@pytest.mark.parametrize("name", ["alps", pytest.param("magnitude+refit", marks=slow)])
def test_convolutions_shared_leaves_and_batched_products(name):
    def apply(params, x):
        x = jax.lax.conv_general_dilated(
            x, params["conv"], (2, 2), "SAME", feature_group_count=2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        x = jax.nn.relu(x).reshape(len(x), -1)
        x = jnp.tanh(jnp.tanh(x @ params["twice"]) @ params["twice"])
        x = jnp.einsum("bhi,hio->bho", x.reshape(-1, 4, 4), params["heads"])
        return x.reshape(len(x), -1) @ params["out"]

    params = {"conv": normal(3, 3, 2, 4), "twice": normal(16, 16) / 4, "heads": normal(4, 4, 5),
              "out": normal(20, 2)}  # fmt: skip
    x = normal(60, 4, 4, 4)
    problem = Problem(apply, lambda p, b: jnp.sum(apply(p, b.x) ** 2, 1))
    chosen = jp.prunable(apply, params, x)
    half = counts(params, [0.5], granularity=jp.weight(chosen))
    plain = jp.apply_masks(params, jp.weight_masks(params, 0.5, prunable=chosen))
    method = criteria.method(name, granularity=jp.weight(chosen))
    found, masks = method.prune(params, problem, half, [Batch(x, None, KEY)])
    found = jax.tree.map(lambda leaf: leaf[0], found)
    assert all(int((~masks[p]).sum()) == half[p][0] for p in params)
    errors = [float(jnp.mean((apply(p, x) - apply(params, x)) ** 2)) for p in (found, plain)]
    assert errors[0] < 0.6 * errors[1]


def test_units_that_others_can_stand_in_for_go_first():
    kernel = normal(6, 4)
    params = {"hidden": np.concatenate([kernel, 2 * kernel[:, :1], kernel[:, 1:2]], 1),
              "out": normal(6, 3)}  # fmt: skip

    def apply(params, x):
        return jax.nn.relu(x @ params["hidden"]) @ params["out"]

    graph = jp.dependency_graph(apply, params, X)
    problem = Problem(apply, lambda p, b: jnp.sum(apply(p, b.x) ** 2, 1))
    third = counts(params, [1 / 3], granularity=jp.group(graph))
    method = criteria.refit(criteria.reconstruction(graph, damping=1e-5), damping=1e-5)
    found, masks = method.prune(params, problem, third, [Batch(X, None, KEY)])
    gone = {*np.flatnonzero(~np.asarray(masks["hidden"])[0, 0])}
    assert len(gone & {0, 4}) == 1 and len(gone & {1, 5}) == 1
    small = jax.tree.map(lambda leaf: leaf[0], found)
    np.testing.assert_allclose(apply(small, X), apply(params, X), rtol=1e-2, atol=2e-2)


def test_derivatives_and_inputs_are_those_of_numpy():
    x, y, w = normal(7, 5), normal(7, 2), normal(5, 2)
    problem = Problem(lambda p, x: x @ p, lambda p, b: jnp.sum((b.x @ p - b.y) ** 2, 1))
    batch = Batch(x, y, KEY)
    each = 2 * np.einsum("ni,no->nio", x, x @ w - y)  # the gradient of each example
    np.testing.assert_allclose(
        gradients.fisher(w, problem, batch), w**2 * (each**2).mean(0) / 2, rtol=1e-5
    )
    share = np.abs(w * each.mean(0))
    np.testing.assert_allclose(gradients.snip(w, problem, batch), share / share.sum(), rtol=1e-5)
    flow = 2 * x.T @ x / 7 @ each.mean(0)  # the Hessian of each output's weights
    np.testing.assert_allclose(gradients.grasp(w, problem, batch), w * flow, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(parameters.synflow(w, problem, batch), np.abs(w), rtol=1e-6)
    norms = np.sqrt((x**2).sum(0))[:, None]
    np.testing.assert_allclose(
        inputs.wanda(w, problem, batch, "layer"), np.abs(w) * norms, rtol=1e-5
    )
    ranks = np.argsort(np.argsort(np.abs(w) * norms, 0), 0)
    np.testing.assert_array_equal(np.floor(inputs.wanda(w, problem, batch)), ranks)
    relative = np.abs(w) / np.abs(w).sum(0) + np.abs(w) / np.abs(w).sum(1, keepdims=True)
    np.testing.assert_allclose(inputs.ria(w, problem, batch), relative * norms**0.5, rtol=1e-5)


def test_steps_score_what_is_left_and_reach_the_counts():
    method = criteria.by_scores(jp.criterion(jp.magnitude), granularity=jp.weight(CHOSEN), steps=3)
    once = criteria.by_scores(jp.criterion(jp.magnitude), granularity=jp.weight(CHOSEN))
    found, expected = (m.prune(PARAMS, PROBLEM, COUNTS, BATCHES)[1] for m in (method, once))
    jax.tree.map(np.testing.assert_array_equal, found, expected)  # magnitudes do not change


def test_a_curve_takes_methods_and_a_sweep_refuses_them():
    y = RNG.integers(0, 3, 200).astype(np.int32)
    splits = [jp.data.Split(X, y)] * 3
    study = jp.Study(levels=(0, 50), criteria=(criteria.obs(),), granularities=("weight",))
    rows = jp.prune_curve(mlp, PARAMS, jp.data.Data(*splits), study, seed=3)
    assert [(row.criterion, row.seed, row.target_sparsity) for row in rows] == [
        ("obs", 3, 0.0), ("obs", 3, 0.5)
    ]  # fmt: skip
    assert rows[1].sparsity == pytest.approx(0.5) and rows[1].mask_seconds > 0
    network = jp.network(lambda key: PARAMS, mlp)
    with pytest.raises(ValueError, match="obs also corrects weights"):
        jp.run_sweep(network, jp.data.Data(*splits), study, report=lambda _: None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: criteria.obs(damping=0), "damping must be positive, got 0"),
        (lambda: criteria.alps(iterations=0), "iterations must be positive"),
        (
            lambda: criteria.by_scores(jp.criterion(jp.magnitude), steps=0),
            "steps must be at least 1",
        ),
        (lambda: criteria.method("obz"), "criterion must be one of .*'obz'"),
        (lambda: criteria.method("reconstruction"), "units of a dependency graph"),
        (
            lambda: criteria.alps().prune(PARAMS, PROBLEM, np.array([3]), BATCHES),
            "needs a count a leaf: use scope layer",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def tied(params, x):
    return jnp.tanh(params["e"][x] @ params["w"]) @ params["e"].T


def scanned(params, x):
    h = jax.lax.scan(lambda c, _: (jnp.tanh(c @ params["w"]), None), x, None, length=2)[0]
    return h @ params["w"]


def cut(params, x):
    weights = params["w"].reshape(2, 3, 4).transpose(1, 0, 2)
    return jnp.einsum("nkh,khd->nd", x, weights)


@pytest.mark.parametrize(
    ("apply", "params", "x", "other"),
    [
        (tied, {"e": normal(12, 6), "w": normal(6, 6)}, RNG.integers(0, 12, 40), "e"),
        (scanned, {"w": normal(5, 5)}, normal(40, 5), "w"),
        (cut, {"w": normal(6, 4)}, normal(40, 3, 2), "w"),
    ],
)
@pytest.mark.parametrize("name", ["obs", "magnitude+refit"])
def test_what_is_something_else_besides_is_pruned_by_magnitude_and_named(
    apply, params, x, other, name
):
    problem = Problem(apply, lambda p, b: jnp.sum(apply(p, b.x), 1))
    half = counts(params, [0.5])
    with pytest.warns(UserWarning, match=f"pruned but not corrected, .*: {other}$"):
        found, masks = criteria.method(name).prune(params, problem, half, [Batch(x, None, KEY)])
    expected = jp.weight_masks(params, [0.5])[other]
    np.testing.assert_array_equal(masks[other], expected)
    np.testing.assert_array_equal(found[other], np.where(expected, params[other][None], 0))


def test_a_bias_that_is_pruned_is_not_fitted():
    params = {"w": normal(5, 3), "b": np.array([0.5, -3.0, 0.2], np.float32)}
    apply = lambda p, x: x @ p["w"] + p["b"][None]  # noqa: E731
    every = jp.weight(lambda path, leaf: True)
    goes = {"w": np.array([6]), "b": np.array([2])}
    x = normal(50, 5)
    problem = Problem(apply, lambda p, b: jnp.sum(apply(p, b.x), 1))
    method = criteria.method("magnitude+refit", granularity=every)
    found, masks = method.prune(params, problem, goes, [Batch(x, None, KEY)])
    np.testing.assert_array_equal(found["b"], [[0, -3, 0]])
    plain = np.where(masks["w"][0], params["w"], 0)
    for j in range(3):  # what the weights do, without the bias
        target = x.astype("d") @ params["w"][:, j]
        assert loss(x, target, found["w"][0, :, j]) <= loss(x, target, plain[:, j]) * 1.001


@pytest.mark.parametrize("n_m", [(5, 4), (4, 4), (0, 4)])
def test_patterns_that_cannot_be(n_m):
    with pytest.raises(ValueError, match="n of m, with 0 < n < m"):
        criteria.obs(n_m=n_m)
