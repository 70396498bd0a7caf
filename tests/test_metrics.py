from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from jaxprune import metrics

batch_sums = jax.jit(metrics.batch_sums)
fit_temperature = jax.jit(metrics.fit_temperature)

ONE = np.float32(1)
LOWEST, HIGHEST = np.log(1e-3), np.log(1e3)


def examples(n=200, classes=5, scale=2.0, seed=0):
    """Return logits that are right more often than not, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n).astype(np.int32)
    logits = rng.normal(size=(n, classes)) + 0.8 * np.eye(classes)[labels]
    return (scale * logits).astype(np.float32), labels


def ones(labels):
    return np.ones(len(labels), np.int32)


def reference(logits, labels, temperature=1.0):
    """Compute every sum again, one example at a time, in float64."""
    logits = np.asarray(logits, np.float64)
    classes = logits.shape[1]
    sums = {
        "count": 0, "correct": 0, "loss": 0.0, "scaled_loss": 0.0,
        "bin_correct": np.zeros(15), "bin_confidence": np.zeros(15),
        "class_count": np.zeros(classes), "class_correct": np.zeros(classes),
    }  # fmt: skip
    for row, label in zip(logits, labels, strict=True):
        probabilities = softmax(row)
        correct = int(np.argmax(row) == label)
        confidence = probabilities.max()
        [inside] = [b for b in range(15) if b / 15 < confidence <= (b + 1) / 15]
        sums["count"] += 1
        sums["correct"] += correct
        sums["loss"] -= log_softmax(row)[label]
        sums["scaled_loss"] -= log_softmax(row / temperature)[label]
        sums["bin_correct"][inside] += correct
        sums["bin_confidence"][inside] += confidence
        sums["class_count"][label] += 1
        sums["class_correct"][label] += correct
    return sums


def assert_sums(sums, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(sums, name), value, rtol=2e-6, err_msg=name)


def test_cross_entropy_by_hand():
    logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    losses = metrics.cross_entropy(jnp.asarray(logits), jnp.array([1, 2]))
    np.testing.assert_allclose(losses, [np.log(4), -np.log(0.7)], rtol=1e-6)


def test_cross_entropy_of_large_logits_is_finite():
    losses = metrics.cross_entropy(jnp.array([[1e4, -1e4], [0.0, 0.0]]), jnp.array([1, 0]))
    np.testing.assert_allclose(losses, [2e4, np.log(2)], rtol=1e-6)


def test_of_equal_logits_the_first_is_predicted():
    logits = jnp.array([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [0.0, 0.0, 0.0], [-0.0, 0.0, -1.0]])
    predictions = metrics.predict(logits)
    assert predictions.dtype == jnp.int32
    assert predictions.tolist() == [0, 1, 0, 0]
    for label, correct in ((0, 3), (1, 1), (2, 0)):
        labels = np.full(4, label, np.int32)
        assert batch_sums(logits, labels, ones(labels), ONE).correct == correct


@pytest.mark.parametrize("classes", [2, 5, 40])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_sums_are_those_of_numpy(classes, temperature):
    logits, labels = examples(classes=classes)
    sums = batch_sums(logits, labels, ones(labels), np.float32(temperature))
    assert_sums(sums, reference(logits, labels, np.float64(np.float32(temperature))))
    for name in ("count", "correct", "bin_correct", "class_count", "class_correct"):
        assert getattr(sums, name).dtype == jnp.int32


def test_vmapped_over_levels_is_looped():
    levels = np.stack([examples(scale=scale)[0] for scale in (0.0, 1.0, 5.0)])
    labels = examples()[1]
    temperatures = np.array([1.0, 0.5, 2.0], np.float32)
    stacked = jax.jit(jax.vmap(metrics.batch_sums, (0, None, None, 0)))(
        levels, labels, ones(labels), temperatures
    )
    fitted = jax.jit(jax.vmap(metrics.fit_temperature, (0, None, None)))(
        levels, labels, ones(labels)
    )
    for i, logits in enumerate(levels):
        level = type(stacked)(*(np.asarray(x)[i] for x in stacked))
        assert_sums(level, batch_sums(logits, labels, ones(labels), temperatures[i])._asdict())
        alone = fit_temperature(logits, labels, ones(labels))
        np.testing.assert_allclose(fitted[i], alone, rtol=1e-4)


@pytest.mark.parametrize("cuts", [[50, 100, 150], [199], [1]], ids=str)
def test_sums_of_batches_add_up(cuts):
    logits, labels = examples()
    temperature = np.float32(1.7)
    batches = zip(np.split(logits, cuts), np.split(labels, cuts), strict=True)
    sums = [batch_sums(x, y, ones(y), temperature) for x, y in batches]
    total = jax.tree.map(lambda *parts: sum(map(np.asarray, parts)), *sums)
    assert_sums(total, reference(logits, labels, np.float64(temperature)))


@pytest.mark.parametrize("filler", [0.0, np.nan, np.inf, -np.inf])
def test_padding_of_weight_zero_is_ignored(filler):
    logits, labels = examples()
    logits[150:], labels[150:] = filler, 0
    weight = (np.arange(200) < 150).astype(np.int32)
    temperature = np.float32(0.8)
    sums = batch_sums(logits, labels, weight, temperature)
    assert_sums(sums, reference(logits[:150], labels[:150], np.float64(temperature)))
    expected, _ = best_temperature(logits[:150], labels[:150])
    np.testing.assert_allclose(fit_temperature(logits, labels, weight), expected, rtol=1e-4)


def test_weights_choose_examples_anywhere():
    logits, labels = examples()
    chosen = np.arange(200) % 3 != 0
    sums = batch_sums(logits, labels, chosen.astype(np.int32), ONE)
    assert_sums(sums, reference(logits[chosen], labels[chosen]))


def of_probabilities(rows):
    """Return logits of these probabilities; equal ones are exact, and 0 is 0."""
    rows = np.asarray(rows)
    shares = np.log(np.where(rows > 0, rows, 1.0))
    return np.where(rows > 0, shares - shares.min(axis=1, keepdims=True), -500.0).astype("float32")


def test_a_confidence_on_an_edge_is_in_the_bin_below():
    # 1/15, 1/5, 1/3 and 1, with as many equal logits and the rest far below them.
    shares, inside = np.array([15, 5, 3, 1]), [0, 2, 4, 14]
    logits = jnp.asarray(np.where(np.arange(16) < shares[:, None], 0, -500), jnp.float32)
    confidence = np.asarray(jax.nn.softmax(logits).max(axis=1))
    assert (confidence == np.float32(1) / shares.astype(np.float32)).all()  # on the edge, exactly
    labels = np.zeros(4, np.int32)
    sums = batch_sums(logits, labels, ones(labels), ONE)
    expected = np.zeros(15, np.float32)
    expected[inside] = confidence
    np.testing.assert_array_equal(sums.bin_confidence, expected)
    np.testing.assert_array_equal(sums.bin_correct, expected > 0)


def errors_of(probabilities, labels):
    labels = np.asarray(labels, np.int32)
    sums = batch_sums(of_probabilities(probabilities), labels, ones(labels), ONE)
    return metrics.calibration_errors(sums)


def test_ece_tells_the_two_sides_of_an_edge_apart():
    # 1/3 is on the upper edge of the bin of 0.3: right and wrong make up for each other there.
    ece, signed_ece = errors_of([[1 / 3, 1 / 3, 1 / 3, 0], [0.3, 0.3, 0.2, 0.2]], [0, 3])
    np.testing.assert_allclose(ece, abs(1 / 3 + 0.3 - 1) / 2, rtol=1e-5)
    np.testing.assert_allclose(signed_ece, (1 / 3 + 0.3 - 1) / 2, rtol=1e-5)
    # A little above the edge is another bin, and the gaps add up.
    ece, signed_ece = errors_of([[0.34, 0.33, 0.33, 0], [0.3, 0.3, 0.2, 0.2]], [0, 3])
    np.testing.assert_allclose(ece, (0.66 + 0.3) / 2, rtol=1e-5)
    np.testing.assert_allclose(signed_ece, (-0.66 + 0.3) / 2, rtol=1e-5)


def test_the_over_confident_have_a_positive_signed_ece():
    np.testing.assert_allclose(errors_of([[0.9, 0.1]], [1]), (0.9, 0.9), rtol=1e-5)
    np.testing.assert_allclose(errors_of([[0.9, 0.1]], [0]), (0.1, -0.1), rtol=1e-5)


@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
def test_calibration_errors_are_those_of_numpy(scale):
    logits, labels = examples(scale=scale)
    probabilities = softmax(logits.astype(np.float64), axis=1)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    ece = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    sums = batch_sums(logits, labels, ones(labels), ONE)
    found = metrics.calibration_errors(sums)
    np.testing.assert_allclose(found, (ece, confidence.mean() - right.mean()), rtol=1e-4)


def best_temperature(logits, labels):
    """Minimise the loss over log(1/T) with SciPy, in float64; also return that loss."""
    logits = np.asarray(logits, np.float64)

    def loss(log_beta):
        scaled = log_softmax(np.exp(log_beta) * logits, axis=1)
        return -scaled[np.arange(len(labels)), labels].mean()

    found: Any = minimize_scalar(
        loss, bounds=(LOWEST, HIGHEST), method="bounded", options={"xatol": 1e-9}
    )
    return np.exp(-found.x), loss


@pytest.mark.parametrize("scale", [1e-2, 0.3, 2.0, 50.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_temperature_is_that_of_scipy(scale, classes):
    logits, labels = examples(classes=classes, scale=scale)
    expected, loss = best_temperature(logits, labels)
    assert 1e-3 < expected < 1e3
    fitted = fit_temperature(logits, labels, ones(labels))
    np.testing.assert_allclose(fitted, expected, rtol=1e-4)
    assert loss(-np.log(np.float64(fitted))) <= loss(-np.log(expected)) + 1e-9


def test_temperature_is_at_a_bound_where_the_optimum_is_beyond_it():
    logits, labels = examples()
    right = 3 * np.eye(5, dtype=np.float32)[labels] + logits / 20
    expected, loss = best_temperature(right, labels)
    assert loss(HIGHEST) <= loss(-np.log(expected))
    fitted = fit_temperature(right, labels, ones(labels))
    np.testing.assert_allclose(fitted, 1e-3, rtol=1e-4)
    # Always wrong: the less it says, the better.
    expected, _ = best_temperature(-right, labels)
    np.testing.assert_allclose(expected, 1e3, rtol=1e-4)
    fitted = fit_temperature(-right, labels, ones(labels))
    np.testing.assert_allclose(fitted, 1e3, rtol=1e-4)
    # An optimum that exists, but at a temperature above 1000.
    logits, labels = examples(scale=1e5)
    fitted = fit_temperature(logits, labels, ones(labels))
    np.testing.assert_allclose(fitted, 1e3, rtol=1e-4)


def test_temperature_of_zero_logits_is_one():
    labels = np.array([0, 1, 2, 0], np.int32)
    logits = np.zeros((4, 3), np.float32)
    assert fit_temperature(logits, labels, ones(labels)) == 1
    # What is padded does not count as a logit that is not zero.
    logits[3] = np.nan
    weight = np.array([1, 1, 1, 0], np.int32)
    assert fit_temperature(logits, labels, weight) == 1
    logits[0, 0] = 1
    assert fit_temperature(logits, labels, weight) != 1


def test_temperature_undoes_a_scale():
    logits, labels = examples()
    once = fit_temperature(logits, labels, ones(labels))
    np.testing.assert_allclose(
        fit_temperature(8 * logits, labels, ones(labels)), 8 * once, rtol=1e-4
    )
