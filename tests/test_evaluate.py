import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import networks, tasks
from jaxprune.data import Data, Split
from jaxprune.evaluate import check_data, evaluate_levels, make_score
from jaxprune.types import Network
from tests.test_tasks import assert_metrics, classification_reference, jit, sequences

FEATURES, HIDDEN, CLASSES, LEVELS = 6, (5, 4), 3, 3
VAL, TEST = 37, 56
NAMES = ("hidden_0", "hidden_1", "logits")
TRACES = []


def split(rng, n, classes=CLASSES):
    y = rng.integers(0, classes, n)
    x = rng.normal(size=(n, FEATURES)) + 1.5 * np.eye(CLASSES, FEATURES)[y]
    return Split(x.astype(np.float32), y.astype(np.int32))


def make_data(seed=0):
    rng = np.random.default_rng(seed)
    return Data(split(rng, 1), split(rng, VAL), split(rng, TEST))


def make_levels(seed=0):
    """Return stacked parameters, other ones a level, a state, and masks that prune ever more."""
    rng = np.random.default_rng(seed)
    params, masks = {}, {}
    for name, inputs, outputs in zip(NAMES, (FEATURES, *HIDDEN), (*HIDDEN, CLASSES), strict=True):
        noise = rng.normal(size=(LEVELS, inputs, outputs)) / np.sqrt(inputs)
        kernels = np.eye(inputs, outputs) + 0.7 * noise  # better than chance
        ranks = rng.random((inputs, outputs))
        kept = np.stack([ranks >= (0 if name == "logits" else 0.3 * i) for i in range(LEVELS)])
        params[name] = {"kernel": jnp.asarray(kernels, jnp.float32)}
        masks[name] = {"kernel": jnp.asarray(kept)}
    return params, {"scale": jnp.array([1.0, 2.0, 0.5])}, masks


def apply(params, x):
    TRACES.append(x)
    for name in NAMES:
        x = x @ params[name]["kernel"]
        x = x if name == "logits" else jax.nn.relu(x)
    return x


NETWORK = Network(
    init=lambda key: ({}, {}),
    apply=lambda params, state, x: state["scale"] * apply(params, x),
    train=lambda params, state, x, key: (x, state),
    prunable={"a tree": [True]},
)
PLAIN = networks.as_network(apply)


def level_of(tree, i):
    return jax.tree.map(lambda x: np.asarray(x)[i], tree)


def forward(params, masks, x, scale=1.0):
    x = np.asarray(x, np.float64)
    for name in NAMES:
        x = x @ np.where(masks[name]["kernel"], params[name]["kernel"], 0).astype(np.float64)
        x = x if name == "logits" else np.maximum(x, 0)
    return scale * x


def reference(level, data, dense):
    params, state, masks = level
    val, test = ((forward(params, masks, s.x, state["scale"]), s.y) for s in (data.val, data.test))
    return classification_reference(val, test, dense), test[0].argmax(axis=1)


def assert_same(found, expected):
    """Compare counts exactly; but a division may be off by a last bit."""
    assert_metrics(found, expected)
    for name, size in (("accuracy", TEST), ("churn", TEST), ("val_accuracy", VAL)):
        counts, others = (np.asarray(m[name], np.float64) * size for m in (found, expected))
        np.testing.assert_allclose(counts, np.round(counts), atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(np.round(counts), np.round(others), name)


@pytest.fixture(scope="module")
def scored():
    """All levels of the network with a state, and what they were made of."""
    data, levels = make_data(), make_levels()
    params, state, masks = levels
    return data, levels, *evaluate_levels(NETWORK, params, masks, data, state=state)


def test_all_metrics_are_those_of_numpy(scored):
    data, levels, metrics, dense = scored
    assert (dense.shape, dense.dtype) == ((TEST,), jnp.int32)
    for name, value in metrics.items():
        shape = (LEVELS, CLASSES) if name == "class_accuracy" else (LEVELS,)
        assert (value.shape, value.dtype) == (shape, jnp.float32), name
    for i in range(LEVELS):
        expected, predicted = reference(level_of(levels, i), data, np.asarray(dense))
        assert_metrics(level_of(metrics, i), expected)
        assert (predicted == dense).all() == (i == 0)
    # Else the tests of this file would show little.
    assert 0.4 < metrics["accuracy"][0] < 1
    assert metrics["churn"][0] == 0 and (metrics["churn"][1:] > 0).all()
    assert len(set(metrics["temperature"].tolist())) == LEVELS


@pytest.mark.parametrize("batch_size", [7, 10**9])
def test_counts_are_exact_for_any_batch_size(scored, batch_size):
    data, (params, state, masks), metrics, dense = scored
    found, _ = evaluate_levels(
        NETWORK, params, masks, data, state=state, reference=dense, batch_size=batch_size
    )
    assert_same(found, metrics)


@pytest.mark.parametrize("options", [{"levels_at_once": LEVELS}, {"stepped": True}], ids=str)
def test_levels_together_or_stepped_are_levels_one_by_one(scored, options):
    data, levels, metrics, dense = scored
    programs, calls = [], []

    def compiled(f):
        programs.append(f)
        jitted = jit(f)
        return lambda *args: calls.append(f) or jitted(*args)

    score = make_score(NETWORK, tasks.classification(), batch_size=20, jit=compiled, **options)
    made = len(programs)
    assert bool(made) == ("stepped" in options)
    score = score if "stepped" in options else jit(score)
    splits = jax.tree.map(jnp.asarray, (data.val, data.test))
    found, predictions = score(*levels, *splits, dense)
    assert predictions is None
    assert_same(found, metrics)
    found, predictions = score(*levels, *splits, None)
    assert len(programs) == made
    assert_same(found, {**metrics, "churn": np.zeros(LEVELS)})
    for i in range(LEVELS):
        _, expected = reference(level_of(levels, i), data, None)
        np.testing.assert_array_equal(predictions[i], expected)
    assert len(set(calls)) == made  # all of them are needed


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("name", ["tokens", "regression", "own"])
def test_every_task_is_scored(name, stepped):
    n, scales = 11, np.array([1.0, 0.5], np.float32)
    x, y = sequences(n)
    task, y = {
        "tokens": (tasks.tokens(), y),
        "regression": (tasks.regression(), x[::-1]),
        "own": (tasks.own_loss(lambda z, y: abs(z - y).sum((1, 2))), x[::-1]),
    }[name]
    network = networks.as_network(lambda params, x: params * x)
    score = make_score(network, task, batch_size=4, stepped=stepped)
    levels = jnp.asarray(scales), {}, jnp.ones(2, bool)
    part = Split(jnp.asarray(x), jnp.asarray(y))
    found, predictions = (score if stepped else jit(score))(*levels, part, part, None)

    def alone(outputs, targets):
        weight = jnp.ones(n, jnp.int32)
        fitted = None if task.fit is None else task.fit(outputs, targets, weight)
        sums = task.sums(outputs, targets, weight, fitted, None)
        return task.finish(sums, sums, fitted)

    for i, scale in enumerate(scales):
        assert_metrics(level_of(found, i), jit(alone)(scale * x, y))
    assert (predictions is None) == (task.predict is None)
    if predictions is not None:
        np.testing.assert_array_equal(predictions, [x.argmax(axis=-1)] * 2)


def test_levels_do_not_depend_on_each_other(scored):
    data, levels, metrics, dense = scored
    params, state, masks = jax.tree.map(lambda x: jnp.flip(x, axis=0), levels)
    found, _ = evaluate_levels(NETWORK, params, masks, data, state=state, reference=dense)
    for name, value in found.items():
        np.testing.assert_array_equal(value[::-1], metrics[name], name)


def test_parameters_and_state_may_be_shared_by_all_levels(scored):
    data, levels, *_ = scored
    (params, state, _), masks = level_of(levels, 1), levels[2]
    found, dense = evaluate_levels(NETWORK, params, masks, data, state=state)
    for i in range(LEVELS):
        expected, _ = reference((params, state, level_of(masks, i)), data, np.asarray(dense))
        assert_metrics(level_of(found, i), expected)


def test_churn_is_against_the_given_predictions(scored):
    data, (params, state, masks), _, dense = scored
    given = jnp.where(jnp.arange(TEST) < 14, -1, dense)
    found, same = evaluate_levels(NETWORK, params, masks, data, state=state, reference=given)
    assert same is given
    np.testing.assert_allclose(found["churn"][0], 0.25, rtol=1e-6)
    with pytest.raises(ValueError, match="reference has 55 predictions, and test 56 examples"):
        evaluate_levels(NETWORK, params, masks, data, state=state, reference=given[1:])


def test_a_layer_pruned_whole_predicts_the_first_class(scored):
    data, (params, state, masks), *_ = scored
    masks = {**masks, "hidden_1": jax.tree.map(jnp.zeros_like, masks["hidden_1"])}
    found, predictions = evaluate_levels(NETWORK, params, masks, data, state=state)
    assert not predictions.any()
    np.testing.assert_allclose(found["loss"], np.log(CLASSES), rtol=1e-6)
    np.testing.assert_allclose(found["accuracy"], np.mean(data.test.y == 0), rtol=1e-6)
    assert found["temperature"].tolist() == [1.0] * LEVELS


def test_nan_in_a_pruned_weight_does_not_matter(scored):
    data, (params, state, masks), metrics, _ = scored
    broken = jax.tree.map(lambda w, m: jnp.where(m, w, jnp.nan), params, masks)
    found, _ = evaluate_levels(NETWORK, broken, masks, data, state=state)
    for name, value in found.items():
        np.testing.assert_array_equal(value, metrics[name], name)


def test_validation_decides_nothing_but_the_temperature(scored):
    data, (params, state, masks), metrics, _ = scored
    other = data._replace(val=make_data(seed=5).val)
    found, _ = evaluate_levels(NETWORK, params, masks, other, state=state)
    changed = {name for name in found if (found[name] != metrics[name]).any()}
    assert changed == {"temperature", "scaled_loss", "val_accuracy", "val_loss"}


def test_one_program_serves_all_values(scored):
    data, (params, _, masks), *_ = scored
    task = tasks.own_loss(lambda z, y: abs(z).sum(axis=1))
    evaluate_levels(apply, params, masks, data, task=task)
    traces = len(TRACES)
    other_params, _, other_masks = make_levels(seed=1)
    other, _ = evaluate_levels(apply, other_params, other_masks, make_data(seed=1), task=task)
    found, none = evaluate_levels(apply, level_of(params, 0), masks, data, task=task)
    assert none is None and not np.array_equal(other["loss"], found["loss"])
    assert {len(x) for x in TRACES[traces:]} <= {2}  # the check's, of two examples


def test_a_batch_size_that_is_no_whole_number(scored):
    data, (params, _, masks), *_ = scored
    for wrong in (0, -3, 1.5):
        with pytest.raises(ValueError, match=f"whole number of at least 1, got {wrong}"):
            inspect.unwrap(evaluate_levels)(apply, params, masks, data, batch_size=wrong)


def test_masks_that_do_not_match(scored):
    data, (params, state, masks), *_ = scored
    for given in (params, level_of(params, 0)):
        with pytest.raises(ValueError, match="masks has no leaf 'logits/kernel', which params"):
            evaluate_levels(apply, given, {k: masks[k] for k in NAMES[:2]}, data)
        wrong = {**masks, "hidden_1": {"kernel": jnp.ones((LEVELS, 4, 5), bool)}}
        message = r"'hidden_1/kernel' has shape \(3, 4, 5\) in masks and \(3, 5, 4\) in params"
        with pytest.raises(ValueError, match=message):
            evaluate_levels(apply, given, wrong, data)
    for given in (level_of(masks, 0), {**masks, "hidden_1": {"kernel": masks["logits"]["kernel"]}}):
        with pytest.raises(ValueError, match="leading levels axis|has shape"):
            evaluate_levels(apply, level_of(params, 0), given, data)
    with pytest.raises(ValueError, match="the state.* must have a leading levels axis"):
        evaluate_levels(NETWORK, params, masks, data, state=level_of(state, slice(2)))


SHAPES = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), make_levels()[0])
SHORT, NOT_FINITE = {"y": np.zeros(5, np.int32)}, {"x": np.full((9, FEATURES), np.nan, "f")}
WRONG = [
    ("val", SHORT, r"val has 9 inputs x and 5 targets y"),
    ("test", {"x": np.zeros((0, 2)), "y": np.zeros(0, int)}, "test has 0 inputs x and 0 targets y"),
    ("train", NOT_FINITE, "train x has values that are not finite"),
    ("val", {"x": np.zeros((9, 5), "f")}, r"cannot take val x, float32 \(9, 5\): .*5.*6"),
    ("test", {"y": np.ones(9, np.int32) + 2}, r"test: labels are in \[3, 3\] and .* 3 outputs"),
    ("train", {"y": np.ones(9, "f")}, r"train: .* \(2, 3\) and targets float32 \(9,\); classific"),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG, ids=range(len(WRONG)))
def test_data_that_does_not_fit(name, change, message):
    params, _, masks = make_levels()
    data = Data(*[split(np.random.default_rng(0), 9)] * 3)
    data = data._replace(**{name: getattr(data, name)._replace(**change)})
    task = tasks.classification()
    with pytest.raises(ValueError, match=message) as error:
        check_data(PLAIN, SHAPES, {}, data, task)
    assert "\n" not in str(error.value)
    if name != "train":  # which is not read here
        with pytest.raises(ValueError, match=message):
            evaluate_levels(apply, params, masks, data, task=task)


def test_a_state_that_was_not_given_is_asked_for_and_plain_tuples_are_splits():
    params, state, masks = make_levels()
    data = make_data()
    with_init = NETWORK._replace(init=lambda key: (level_of(params, 0), level_of(state, 0)))
    with pytest.raises(ValueError, match="the network has a state: give it, state="):
        evaluate_levels(with_init, params, masks, data)
    expected, _ = evaluate_levels(NETWORK, params, masks, data, state=state)
    plain = Data(*map(tuple, data))  # pyright: ignore[reportArgumentType]
    found, _ = evaluate_levels(NETWORK, params, masks, plain, state=state)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_outputs_without_an_axis_of_examples():
    data, network = make_data(), networks.as_network(lambda params, x: (x.sum(axis=0), x))
    with pytest.raises(ValueError, match=r"of 2 for .* \(\(6,\), \(2, 6\)\) and targets int32"):
        check_data(network, {}, {}, data, tasks.own_loss(lambda z, y: z), splits=["val"])
