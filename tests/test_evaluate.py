from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from jaxprune import models
from jaxprune.data import Data, Split
from jaxprune.evaluate import evaluate_levels
from jaxprune.types import Metrics

FEATURES, HIDDEN, CLASSES, LEVELS = 6, (5, 4), 3, 3
VAL, TEST = 37, 56
NAMES = ("hidden_0", "hidden_1", "logits")
TRACES = []


def split(rng, n, classes=CLASSES):
    y = rng.integers(0, classes, n)
    x = rng.normal(size=(n, FEATURES)) + 1.5 * np.eye(CLASSES, FEATURES)[y]
    return Split(x.astype(np.float32), y.astype(np.int32))


def make_data(seed=0, classes=CLASSES):
    rng = np.random.default_rng(seed)
    return Data(split(rng, 1), split(rng, VAL), split(rng, TEST, classes))


def make_network(seed=0):
    """Return stacked parameters, other ones a level, and masks that prune ever more."""
    rng = np.random.default_rng(seed)
    params, masks = {}, {}
    for name, inputs, outputs in zip(NAMES, (FEATURES, *HIDDEN), (*HIDDEN, CLASSES), strict=True):
        noise = rng.normal(size=(LEVELS, inputs, outputs)) / np.sqrt(inputs)
        kernels = np.eye(inputs, outputs) + 0.7 * noise  # better than chance
        ranks = rng.random((inputs, outputs))
        kept = np.stack([ranks >= (0 if name == "logits" else 0.3 * i) for i in range(LEVELS)])
        params[name] = {"kernel": jnp.asarray(kernels, jnp.float32)}
        masks[name] = {"kernel": jnp.asarray(kept)}
    return params, masks


_, plain_apply = models.mlp(FEATURES, HIDDEN, CLASSES)


def apply(params, x):
    TRACES.append(x.shape)
    return plain_apply(params, x)


def level_of(tree, i):
    return jax.tree.map(lambda x: np.asarray(x)[i], tree)


def forward(params, masks, x):
    x = np.asarray(x, np.float64)
    for name in NAMES:
        x = x @ np.where(masks[name]["kernel"], params[name]["kernel"], 0).astype(np.float64)
        x = x if name == "logits" else np.maximum(x, 0)
    return x


def reference(params, masks, data, dense):
    """Compute all metrics of one level in float64; `dense` are predictions on test."""

    def loss(logits, y, beta=1.0):
        return -log_softmax(beta * logits, axis=1)[np.arange(len(y)), y].mean()

    val, test = (forward(params, masks, s.x) for s in (data.val, data.test))
    best: Any = minimize_scalar(
        lambda b: loss(val, data.val.y, np.exp(b)),
        bounds=(np.log(1e-3), np.log(1e3)), method="bounded", options={"xatol": 1e-10},
    )  # fmt: skip
    confidence, predicted = softmax(test, axis=1).max(axis=1), test.argmax(axis=1)
    right = predicted == data.test.y
    ece = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        ece += abs(confidence[inside].sum() - right[inside].sum()) / len(right)
    of_class = [right[data.test.y == c] for c in range(CLASSES)]
    class_accuracy = np.array([r.mean() if len(r) else np.nan for r in of_class])
    values: dict[str, Any] = dict(
        accuracy=right.mean(),
        loss=loss(test, data.test.y),
        ece=ece,
        signed_ece=confidence.mean() - right.mean(),
        temperature=np.exp(-best.x),
        scaled_loss=loss(test, data.test.y, np.exp(best.x)),
        churn=(predicted != dense).mean(),
        class_accuracy=class_accuracy,
        worst_class_accuracy=np.nanmin(class_accuracy),
        val_accuracy=(val.argmax(axis=1) == data.val.y).mean(),
        val_loss=loss(val, data.val.y),
    )
    return Metrics(**values), predicted


def assert_metrics(found, expected, rtol=1e-5):
    for name, value in expected._asdict().items():
        tolerance: dict[str, Any] = {"rtol": 2e-4 if name == "temperature" else rtol, "atol": 1e-6}
        np.testing.assert_allclose(getattr(found, name), value, **tolerance, err_msg=name)


def assert_same_counts(found, expected):
    """Compare what is a count divided by a count; a division may be off by a last bit."""
    for name, size in (("accuracy", TEST), ("churn", TEST), ("val_accuracy", VAL)):
        counts = np.asarray(getattr(found, name), np.float64) * size
        np.testing.assert_allclose(counts, np.round(counts), atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(
            np.round(counts), np.round(np.asarray(getattr(expected, name)) * size), name
        )
    np.testing.assert_allclose(found.class_accuracy, expected.class_accuracy, rtol=2e-7)


@pytest.fixture(scope="module")
def scored():
    """All levels of the network at the default batch size, and what they were made of."""
    data, (params, masks) = make_data(), make_network()
    return data, params, masks, *evaluate_levels(apply, params, masks, data)


def test_all_metrics_are_those_of_numpy(scored):
    data, params, masks, metrics, predictions = scored
    for name, value in metrics._asdict().items():
        shape = (LEVELS, CLASSES) if name == "class_accuracy" else (LEVELS,)
        assert (value.shape, value.dtype) == (shape, jnp.float32), name
    assert (predictions.shape, predictions.dtype) == ((LEVELS, TEST), jnp.int32)
    dense = None
    for i in range(LEVELS):
        expected, predicted = reference(level_of(params, i), level_of(masks, i), data, dense)
        dense = predicted if dense is None else dense
        expected = expected._replace(churn=(predicted != dense).mean())
        assert_metrics(level_of(metrics, i), expected)
        np.testing.assert_array_equal(predictions[i], predicted)
    # Else the tests of this file would show little.
    assert 0.4 < metrics.accuracy[0] < 1 and metrics.churn[0] == 0 and (metrics.churn[1:] > 0).all()
    assert len(set(metrics.temperature.tolist())) == LEVELS


@pytest.mark.parametrize("batch_size", [1, 7, TEST])
def test_counts_are_exact_for_any_batch_size(scored, batch_size):
    data, params, masks, metrics, predictions = scored  # in one batch, larger than the data
    found, labels = evaluate_levels(apply, params, masks, data, batch_size=batch_size)
    np.testing.assert_array_equal(labels, predictions)
    assert_same_counts(found, metrics)
    assert_metrics(found, metrics)


def test_levels_do_not_depend_on_each_other(scored):
    data, params, masks, metrics, predictions = scored
    last, first = (jax.tree.map(lambda x: jnp.flip(x, axis=0), tree) for tree in (params, masks))
    found, labels = evaluate_levels(apply, last, first, data, reference=predictions[0])
    np.testing.assert_array_equal(labels[::-1], predictions)
    for value, expected in zip(found, metrics, strict=True):
        np.testing.assert_array_equal(value[::-1], expected)


def test_parameters_may_be_shared_by_all_levels(scored):
    data, params, masks, *_ = scored
    shared = level_of(params, 1)
    stacked = jax.tree.map(lambda w: jnp.stack([jnp.asarray(w)] * LEVELS), shared)
    found = evaluate_levels(apply, shared, masks, data)
    expected = evaluate_levels(apply, stacked, masks, data)
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, other)
    for i in range(LEVELS):
        np.testing.assert_array_equal(
            found[1][i], forward(shared, level_of(masks, i), data.test.x).argmax(axis=1)
        )


@pytest.mark.parametrize("levels_at_once", [2, LEVELS])
def test_levels_together_are_levels_one_by_one(scored, levels_at_once):
    data, params, masks, metrics, predictions = scored
    found, labels = evaluate_levels(apply, params, masks, data, levels_at_once=levels_at_once)
    assert_same_counts(found, metrics)
    assert_metrics(found, metrics)
    np.testing.assert_array_equal(labels, predictions)


def test_churn_is_against_the_given_predictions(scored):
    data, params, masks, metrics, predictions = scored
    given = predictions[2]
    found, _ = evaluate_levels(apply, params, masks, data, reference=given)
    np.testing.assert_allclose(found.churn, np.mean(predictions != given[None], axis=1), 1e-6)
    assert found.churn[2] == 0 and found.churn[0] > 0
    none_of_these = jnp.full(TEST, -1, jnp.int32)
    found, _ = evaluate_levels(apply, params, masks, data, reference=none_of_these)
    assert found.churn.tolist() == [1.0] * LEVELS


def test_a_class_without_examples_has_no_accuracy(scored):
    _, params, masks, *_ = scored
    data = make_data(classes=2)
    found, predictions = evaluate_levels(apply, params, masks, data)
    assert np.isnan(found.class_accuracy).tolist() == [[False, False, True]] * LEVELS
    np.testing.assert_array_equal(
        found.worst_class_accuracy, found.class_accuracy[:, :2].min(axis=1)
    )
    dense = np.asarray(predictions[0])
    expected, _ = reference(level_of(params, 1), level_of(masks, 1), data, dense)
    assert_metrics(level_of(found, 1), expected)


def test_a_layer_pruned_whole_predicts_the_first_class(scored):
    data, params, masks, *_ = scored
    masks = {**masks, "hidden_1": jax.tree.map(jnp.zeros_like, masks["hidden_1"])}
    found, predictions = evaluate_levels(apply, params, masks, data)
    assert not predictions.any()
    np.testing.assert_allclose(found.loss, np.log(CLASSES), rtol=1e-6)
    np.testing.assert_allclose(found.accuracy, np.mean(data.test.y == 0), rtol=1e-6)
    assert found.temperature.tolist() == [1.0] * LEVELS
    assert found.class_accuracy.tolist() == [[1.0, 0.0, 0.0]] * LEVELS


def test_nan_in_a_pruned_weight_does_not_matter(scored):
    data, params, masks, metrics, _ = scored
    broken = jax.tree.map(lambda w, m: jnp.where(m, w, jnp.nan), params, masks)
    found, _ = evaluate_levels(apply, broken, masks, data)
    for value, expected in zip(found, metrics, strict=True):
        np.testing.assert_array_equal(value, expected)


def test_validation_decides_nothing_but_the_temperature(scored):
    data, params, masks, metrics, _ = scored
    found, _ = evaluate_levels(apply, params, masks, data._replace(val=make_data(seed=5).val))
    changed = {n for n in Metrics._fields if (getattr(found, n) != getattr(metrics, n)).any()}
    assert changed == {"temperature", "scaled_loss", "val_accuracy", "val_loss"}


def test_one_trace_serves_all_values(scored):
    data, params, masks, *_ = scored
    traces = len(TRACES)
    assert traces
    other_params, other_masks = make_network(seed=1)
    other, _ = evaluate_levels(apply, other_params, other_masks, make_data(seed=1))
    evaluate_levels(apply, other_params, masks, data)
    # Shared parameters are stacked before, and are no other program.
    evaluate_levels(apply, level_of(params, 0), masks, data)
    assert len(TRACES) == traces
    assert not np.array_equal(other.loss, scored[3].loss)


def test_any_tree_of_parameters():
    data = make_data()
    params = [np.eye(FEATURES, dtype=np.float32), (np.eye(FEATURES, CLASSES, dtype=np.float32),)]
    masks = jax.tree.map(lambda w: jnp.ones((1, *w.shape), bool), params)
    found, predictions = evaluate_levels(lambda p, x: x @ p[0] @ p[1][0], params, masks, data)
    np.testing.assert_array_equal(predictions[0], data.test.x[:, :CLASSES].argmax(axis=1))
    np.testing.assert_allclose(found.accuracy, np.mean(predictions[0] == data.test.y), rtol=1e-6)


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_size_below_one(scored, batch_size):
    data, params, masks, *_ = scored
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
        evaluate_levels(apply, params, masks, data, batch_size=batch_size)


def test_masks_that_do_not_match(scored):
    data, params, masks, *_ = scored
    shared = level_of(params, 0)
    for given in (params, shared):
        with pytest.raises(ValueError, match="masks has no leaf 'logits/kernel', which params"):
            evaluate_levels(apply, given, {k: masks[k] for k in NAMES[:2]}, data)
        more = {**masks, "hidden_9": masks["hidden_1"]}
        with pytest.raises(ValueError, match="no leaf 'hidden_9/kernel', which masks has"):
            evaluate_levels(apply, given, more, data)
        wrong = {**masks, "hidden_1": {"kernel": jnp.ones((LEVELS, 4, 5), bool)}}
        message = r"'hidden_1/kernel' has shape \(3, 4, 5\) in masks and \(3, 5, 4\) in params"
        with pytest.raises(ValueError, match=message):
            evaluate_levels(apply, given, wrong, data)
        fewer = {**masks, "hidden_1": {"kernel": jnp.ones((2, 5, 4), bool)}}
        with pytest.raises(ValueError, match="'hidden_1/kernel' has shape"):
            evaluate_levels(apply, given, fewer, data)


def test_masks_without_a_levels_axis(scored):
    data, params, masks, *_ = scored
    with pytest.raises(ValueError, match="must have a leading levels axis"):
        evaluate_levels(apply, level_of(params, 0), level_of(masks, 0), data)
