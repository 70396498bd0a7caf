import functools
import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import criteria
from jaxprune.types import Batch, Criterion, Network, Problem, Task

NAMES = [*criteria.CRITERIA]  # to which "my_module:my_scores" may be added
SMALLEST = np.float32(1e-45)  # denormal
KEY = jax.random.key(0)


def squares(params, batch):
    """Losses (batch,) of any tree: example i weighs the sum of the squares by x[i]."""
    total = sum(
        (jnp.sum(w.astype(jnp.float32) ** 2) for w in jax.tree.leaves(params)), jnp.zeros(())
    )
    return batch.x * total


PROBLEM = Problem(lambda params, x: x, squares)
BATCH = Batch(jnp.array([1.0, 3.0]), jnp.zeros(2), KEY)


def scored(name):
    """A built-in criterion as a function of the parameters alone."""
    found = criteria.resolve(name)
    assert isinstance(found, Criterion)
    return lambda params: found.scores(params, PROBLEM, BATCH)


def test_magnitude_by_hand():
    params = {"a": jnp.array([[-2.0, 1.0], [0.0, -0.5]]), "b": [jnp.array([-3.0])]}
    got = criteria.magnitude(params)
    assert jax.tree.map(lambda s: s.tolist(), got) == {"a": [[2.0, 1.0], [0.0, 0.5]], "b": [[3.0]]}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_magnitude_is_the_absolute_value(dtype):
    w = np.random.default_rng(0).normal(size=(4, 5)).astype(jnp.dtype(dtype))
    w[0, :4] = 0.0, -0.0, np.inf, -np.inf
    for f in (criteria.magnitude, jax.jit(criteria.magnitude)):
        got = f([jnp.asarray(w)])[0]
        assert got.dtype == w.dtype
        np.testing.assert_array_equal(got, np.abs(w))
        assert not np.signbit(np.asarray(got, np.float32)).any()


def test_magnitude_keeps_denormals():
    w = jnp.array([-SMALLEST, SMALLEST, -3 * SMALLEST, 0.0])
    for f in (criteria.magnitude, jax.jit(criteria.magnitude)):
        got = np.asarray(f(w)).view(np.int32)  # the pattern: a comparison might take them for zero
        np.testing.assert_array_equal(got, [1, 1, 3, 0])


@pytest.mark.parametrize("name", ["magnitude", "random"])
def test_what_has_no_score_passes(name):
    key, flag = jax.random.key(7), np.array([True, False])
    got = scored(name)({"n": np.array([1, 2], np.int32), "key": key, "flag": flag})
    assert got["n"].tolist() == [1, 2]
    assert got["flag"].tolist() == [True, False]
    assert got["key"] is key


def test_random_is_uniform_and_new_for_every_leaf_and_key():
    params = {"a": jnp.zeros((200, 50), jnp.bfloat16), "b": np.ones((200, 50), np.float32)}
    first, second = (
        criteria.random(params, None, Batch(None, None, jax.random.key(i))) for i in (0, 1)
    )
    drawn = [np.asarray(s).ravel() for tree in (first, second) for s in jax.tree.leaves(tree)]
    for s in drawn:
        assert s.dtype == np.float32 and s.min() >= 0 and s.max() < 1
        assert len(np.unique(s)) > 9_900  # of 10,000
        np.testing.assert_allclose(np.histogram(s, 4, (0, 1))[0], 2_500, atol=250)
    assert np.abs(np.corrcoef(drawn) - np.eye(4)).max() < 0.05
    again = jax.jit(lambda key: criteria.random(params, None, Batch(None, None, key)))(KEY)
    jax.tree.map(np.testing.assert_array_equal, again, first)


def test_saliency_by_hand():
    # losses (2 w0 + w1 − y)² of one example: the gradient is 2 · error · x.
    problem = Problem(lambda p, x: x @ p["w"], lambda p, b: (b.x @ p["w"] - b.y) ** 2)
    batch = Batch(jnp.array([[2.0, 1.0]]), jnp.array([1.0]), KEY)
    got = criteria.saliency({"w": jnp.array([3.0, -1.0])}, problem, batch)
    assert got["w"].tolist() == [2 * 4 * 2 * 3, 2 * 4 * 1]
    assert criteria.saliency({"w": jnp.zeros(2)}, problem, batch)["w"].tolist() == [0, 0]


def test_saliency_is_what_a_linear_loss_loses_without_the_weight():
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=6).astype("f"), rng.normal(size=(5, 6)).astype("f")
    problem = Problem(lambda w, x: x @ w, lambda w, b: b.x @ w)
    batch = Batch(jnp.asarray(x), None, KEY)
    loss = lambda w: (x.astype("d") @ w.astype("d")).mean()  # noqa: E731
    expected = [abs(loss(w) - loss(np.where(np.arange(6) == i, 0, w))) for i in range(6)]
    for f in (criteria.saliency, jax.jit(criteria.saliency, static_argnums=1)):
        np.testing.assert_allclose(f(jnp.asarray(w), problem, batch), expected, rtol=1e-5)


def test_saliency_of_half_precision_does_not_underflow():
    problem = Problem(lambda w, x: w, lambda w, b: b.x * jnp.sum(w))
    batch = Batch(jnp.array([1e-4], jnp.float16), None, KEY)
    got = criteria.saliency(jnp.array([1e-4, -2e-4], jnp.float16), problem, batch)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [1e-8, 2e-8], rtol=1e-2)


@pytest.mark.parametrize(
    "leaf", [jnp.array([1, 2]), np.array([True]), jax.random.key(0), jnp.ones(2, jnp.complex64)]
)
def test_saliency_refuses_what_has_no_gradient(leaf):
    message = f"a gradient criterion for a network with integer leaves: 'table/ids' is {leaf.dtype}"
    with pytest.raises(TypeError, match=message.replace("<", ".").replace(">", ".")):
        scored("saliency")({"w": jnp.ones(2), "table": {"ids": leaf}})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "make",
    [
        lambda w: w,
        lambda w: [w, (w[0], {"a": w})],
        lambda w: {"hidden": {"kernel": w, "bias": w[0]}, "logits": {"kernel": w}},
        lambda w: {"none": None, "w": w},
        lambda w: {"half": w.astype(jnp.bfloat16), "empty": w[:0], "scalar": w[0, 0]},
        lambda w: {},
    ],
)
def test_criteria_return_the_tree(name, make):
    params = make(jnp.array([[-1.0, 2.0], [3.0, -4.0]]))
    got = scored(name)(params)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, params)
    assert all(np.isfinite(leaf.astype(jnp.float32)).all() for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize("name", NAMES)
def test_criteria_under_jit_and_vmap(name):
    rng = np.random.default_rng(1)
    params = {"a": rng.normal(size=(3, 4, 2)), "b": [rng.normal(size=(3, 5))]}
    params = jax.tree.map(lambda w: w.astype(np.float32), params)
    looped = [scored(name)(jax.tree.map(lambda w: w[i], params)) for i in range(3)]  # noqa: B023
    expected = jax.tree.map(lambda *s: np.stack(s), *looped)
    got = jax.jit(jax.vmap(scored(name)))(params)
    # Sums over examples round otherwise where networks are side by side.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=5e-7), got, expected)


def linear() -> tuple[Network, Task]:
    """A linear network scaled by its state, and squared errors in which y < 0 is padding."""

    def apply(params, state, x):
        return x @ params * state["scale"]

    def loss(outputs, y):
        weights = (y >= 0).astype(jnp.float32)
        return weights * (outputs - y) ** 2, weights

    nothing: Any = lambda *args: None  # noqa: E731
    return (
        Network(lambda key: (jnp.zeros(2), {"scale": 1.0}), apply, nothing),
        Task("mine", loss, None, None, nothing, nothing, lambda outputs: (), nothing),
    )


def test_problem_has_the_training_loss_and_the_state():
    network, task = linear()
    x, y = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), jnp.array([1.0, -1.0, 2.0])
    w = jnp.array([0.5, -1.0])
    got = criteria.problem(network, task, {"scale": 2.0})
    assert got.apply(w, x).tolist() == [-3, -5, -7]
    losses = got.losses(w, Batch(x, y, KEY))
    assert losses.tolist() == [16 * 3 / 2, 0, 81 * 3 / 2]  # the second one is padding
    assert float(losses.mean()) == (16 + 81) / 2
    padded = criteria.saliency(w, got, Batch(x, y, KEY))
    cut = criteria.saliency(w, got, Batch(x[::2], y[::2], KEY))
    np.testing.assert_allclose(padded, cut, rtol=1e-6)


def power(params, alpha, shift=0.0):
    return jax.tree.map(lambda w: jnp.abs(w) ** alpha + shift, params)


def of_three(params, problem, batch, scale=1.0):
    return jax.tree.map(lambda w: w * jnp.mean(problem.losses(params, batch)) * scale, params)


class Scaled:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, params):
        return jax.tree.map(lambda w: jnp.abs(w) * self.factor, params)


@pytest.mark.parametrize(
    ("f", "name", "settings", "expected"),
    [
        (criteria.magnitude, "magnitude", {}, [1, 2]),
        (jax.jit(criteria.magnitude), "magnitude", {}, [1, 2]),
        (jnp.abs, "abs", {}, [1, 2]),
        (of_three, "of_three", {}, [-10, 20]),
        (functools.partial(power, alpha=2), "power(alpha=2)", {"alpha": 2}, [1, 4]),
        (
            functools.partial(functools.partial(power, alpha=np.float32(2)), shift=0.5),
            "power(alpha=2.0, shift=0.5)",
            {"alpha": 2.0, "shift": 0.5},
            [1.5, 4.5],
        ),
        (functools.partial(of_three, scale=2.0), "of_three(scale=2.0)", {"scale": 2.0}, [-20, 40]),
        (functools.partial(Scaled, 3)(), "Scaled", {}, [3, 6]),
        (lambda params: params, "<lambda>", {}, [-1, 2]),
        (Criterion("mine", {"a": 1}, of_three), "mine", {"a": 1}, [-10, 20]),
    ],
)
def test_criterion_lifts(f, name, settings, expected):
    got = criteria.criterion(f)
    assert (got.name, got.settings) == (name, settings)
    assert criteria.resolve(f)[:2] == got[:2]
    assert got.scores(jnp.array([-1.0, 2.0]), PROBLEM, BATCH).tolist() == expected
    renamed = criteria.criterion(f, name="other", settings={"b": (1, np.int32(2))})
    assert (renamed.name, renamed.settings) == ("other", {**settings, "b": [1, 2]})


def test_settings_are_what_json_gives_back():
    def scores(params, **settings):
        return params

    def make(*array):
        bound = {"array": np.array(array), "key": KEY, "f": np.abs, "limit": np.inf}
        return criteria.criterion(functools.partial(scores, **bound, deep={1: (2, None)}))

    one, other, again = make(1.0, 2.0), make(1.0, 3.0), make(1.0, 2.0)
    assert json.loads(json.dumps(one.settings, allow_nan=False)) == one.settings
    assert one.settings == again.settings != other.settings
    assert one.settings["settings"]["array"].startswith("float64[2] ")
    assert one.settings["settings"]["deep"] == {"1": [2, None]}
    assert " at 0x" not in one.name


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda: 0, r"takes \(params\) or \(params, problem, batch\), and <lambda> requires \(\)"),
        (lambda params, batch: 0, r"requires \(params, batch\)"),
        (power, r"power requires \(params, alpha\)"),
        (lambda params, *, alpha: 0, r"requires \(params, alpha\)"),
        (lambda a, b, *, c: 0, r"requires \(a, b, c\)"),
        (lambda a, b, c, d: 0, r"requires \(a, b, c, d\)"),
        (lambda *args: 0, r"requires \(\)"),
        (3, "must be a function, got int"),
        (None, "must be a function, got NoneType"),
    ],
)
def test_criterion_refuses(f, message):
    with pytest.raises(TypeError, match=message):
        criteria.criterion.__wrapped__(f) if f in (3, None) else criteria.criterion(f)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"a": jnp.ones((2, 3))}, "scores has no leaf 'b/c', which parameters has"),
        (
            {"a": jnp.ones((2, 3)), "b": {"c": jnp.ones(3)}},
            r"'b/c' has shape \(3,\) in scores and \(2,\) in parameters",
        ),
        ({"a": jnp.ones((2, 3), int), "b": {"c": jnp.ones(2)}}, "'a' must be real floating"),
        ({"a": jnp.ones((2, 3), bool), "b": {"c": jnp.ones(2)}}, "'a' must be .*, got bool"),
        ({"a": jnp.ones((2, 3), complex), "b": {"c": jnp.ones(2)}}, "'a' must be real floating"),
        ({"a": "high", "b": {"c": jnp.ones(2)}}, "the score 'a' is no array, but str"),
        (lambda p: 0, "the score '' is no array, but function"),
        (3.0, "scores has no leaf 'a'"),
        (None, "returns None, not a tree of scores"),
    ],
)
def test_scores_are_checked(scores, message):
    params = {"a": jnp.ones((2, 3)), "b": {"c": jnp.ones(2)}}
    mine = criteria.criterion(lambda params: scores, name="mine")
    score = lambda params: mine.scores(params, PROBLEM, BATCH)  # noqa: E731
    for f in (score, functools.partial(jax.eval_shape, score)):
        with pytest.raises(ValueError, match=f"^criterion mine: .*{message}") as caught:
            f(params)
        assert "\n" not in str(caught.value)


def test_scores_may_have_another_dtype():
    params = {"w": jnp.ones(2, jnp.bfloat16), "n": jnp.ones(2, int), "key": KEY}
    criteria.check_scores({**params, "w": np.ones(2, np.float64)}, params)
    criteria.check_scores({**params, "n": jnp.ones(2)}, params)


def test_resolve(tmp_path, monkeypatch):
    lines = [
        "import functools",
        "def mine(params): return params",
        "def two(a, b): return a",
        "def power(params, alpha): return params",
        "cubic = functools.partial(power, alpha=3)",
        "import jaxprune as jp",
        "made = jp.criterion(mine, name='made')",
    ]
    (tmp_path / "h5_scores.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert [criteria.resolve(name).name for name in criteria.CRITERIA] == [*criteria.CRITERIA]
    assert criteria.resolve("h5_scores:mine").name == "mine"
    assert criteria.resolve("h5_scores:cubic").settings == {"alpha": 3}
    assert criteria.resolve("h5_scores:made").name == "made"
    for spec, message in [
        ("magnitud", "one of magnitude, l1, random, .* or module:function, got 'magnitud'"),
        ("h5_scores:two", r"criterion 'h5_scores:two': .* two requires \(a, b\)"),
        ("h5_scores:three", "three"),
        ("no_such_module:three", "no_such_module"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            criteria.resolve(spec)
        assert "\n" not in str(caught.value)


def test_a_criterion_whose_other_arguments_have_defaults_is_told_them():
    def mine(params, problem=None, batch=None):
        assert problem is not None and batch is not None
        return jax.tree.map(jnp.abs, params)

    params = {"w": jnp.ones((2, 3))}
    problem = Problem(lambda p, x: x @ p["w"], lambda p, b: (b.x @ p["w"])[:, 0])
    found = criteria.criterion(mine).scores(params, problem, Batch(jnp.ones((1, 2)), None, KEY))
    assert found["w"].shape == (2, 3)
