import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from jaxprune import tasks
from jaxprune.tasks.classify import batch_sums, calibration_errors, fit_temperature
from jaxprune.tasks.sums import predict

LOWEST, HIGHEST = np.log(1e-3), np.log(1e3)
CLASSES, T = 5, 7
MAX = tasks.own_loss(lambda z, y: abs(z - y).max(axis=1), name="max")


@functools.cache
def jit(f):
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})  # compiles faster


def best_temperature(logits, labels):
    """Minimise the loss over log(1/T) with SciPy, in float64; also return that loss."""

    def loss(log_beta):
        return nats(np.exp(log_beta) * np.asarray(logits, np.float64), labels).mean()

    found: Any = minimize_scalar(
        loss, bounds=(LOWEST, HIGHEST), method="bounded", options={"xatol": 1e-10}
    )
    return np.exp(-found.x), loss


def nats(logits, labels):
    return -np.take_along_axis(log_softmax(logits, axis=-1), labels[..., None], axis=-1)[..., 0]


def classification_reference(val, test, dense):
    """Compute all metrics in float64, of (logits, labels) and the predictions to compare with."""
    (val_logits, val_labels), (logits, labels) = val, test
    temperature, _ = best_temperature(*val)
    confidence, predicted = softmax(logits, axis=1).max(axis=1), logits.argmax(axis=1)
    right, ece = predicted == labels, 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        ece += abs(confidence[inside].sum() - right[inside].sum()) / len(right)
    of_class = [right[labels == c] for c in range(logits.shape[1])]
    class_accuracy = np.array([r.mean() if len(r) else np.nan for r in of_class])
    return {
        "accuracy": right.mean(),
        "loss": nats(logits, labels).mean(),
        "ece": ece,
        "signed_ece": confidence.mean() - right.mean(),
        "temperature": temperature,
        "scaled_loss": nats(logits / temperature, labels).mean(),
        "churn": 0.0 if dense is None else (predicted != dense).mean(),
        "class_accuracy": class_accuracy,
        "worst_class_accuracy": np.nanmin(class_accuracy),
        "val_accuracy": (val_logits.argmax(axis=1) == val_labels).mean(),
        "val_loss": nats(val_logits, val_labels).mean(),
    }


def tokens_reference(val, test, dense):
    def measured(logits, targets):
        valid = targets >= 0
        return nats(logits[valid], targets[valid]).mean(), np.mean(
            logits[valid].argmax(axis=1) == targets[valid]
        )

    (val_loss, val_accuracy), (loss, accuracy) = measured(*val), measured(*test)
    changed = 0.0
    if dense is not None:
        changed = (test[0].argmax(axis=2) != dense)[test[1] >= 0].mean()
    return {
        "perplexity": np.exp(loss),
        "accuracy": accuracy,
        "loss": loss,
        "churn": changed,
        "val_accuracy": val_accuracy,
        "val_loss": val_loss,
    }


def regression_reference(val, test, _):
    outputs, targets = test
    return {
        "loss": ((outputs - targets) ** 2).mean(),
        "r2": 1 - ((outputs - targets) ** 2).sum() / ((targets - targets.mean(axis=0)) ** 2).sum(),
        "mae": abs(outputs - targets).mean(),
        "val_loss": ((val[0] - val[1]) ** 2).mean(),
    }


def max_reference(val, test, _):
    loss, val_loss = (abs(z - y).max(axis=1).mean() for z, y in (test, val))
    return {"loss": loss, "val_loss": val_loss}


def labelled(n, seed=0, scale=2.0, classes=CLASSES, axes=()):
    """Return logits that are right more often than not, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, (n, *axes)).astype(np.int32)
    logits = rng.normal(size=(*labels.shape, classes)) + 0.8 * np.eye(classes)[labels]
    return (scale * logits).astype(np.float32), labels


def classes(n, seed=0):
    logits, labels = labelled(n, seed)
    return logits, np.minimum(labels, CLASSES - 2)  # the last class has no examples


def sequences(n, seed=0):
    logits, targets = labelled(n, seed, axes=(T,))
    padded = np.arange(T) >= np.random.default_rng(seed).integers(0, T + 1, (n, 1))
    return logits, np.where(padded, -1, targets).astype(np.int32)


def numbers(n, seed=0, mean=3.0):
    rng = np.random.default_rng(seed)
    targets = (mean + rng.normal(size=(n, 3)) * [1, 2, 4]).astype(np.float32)
    return (targets + rng.normal(size=targets.shape)).astype(np.float32), targets


TASKS: dict[str, tuple[Any, Callable, Callable]] = {
    "classification": (tasks.classification(), classes, classification_reference),
    "tokens": (tasks.tokens(), sequences, tokens_reference),
    "regression": (tasks.regression(), numbers, regression_reference),
    "own_loss": (MAX, numbers, max_reference),
}


@pytest.fixture(params=TASKS)
def case(request):
    return TASKS[request.param]


def measure(task, val, test, reference=None, cuts=(), filler=None):
    """Measure as `evaluate` does; padding is added, of outputs and float targets `filler`."""

    def padded(outputs, targets):
        weight = np.ones(len(targets), np.int32)
        if filler is None:
            return outputs, targets, weight
        more = [(0, 3)] + [(0, 0)] * (outputs.ndim - 1)
        outputs = np.pad(outputs, more, constant_values=filler)
        label = 1 if np.issubdtype(targets.dtype, np.integer) else filler
        targets = np.pad(targets, more[: targets.ndim], constant_values=label)
        return outputs, targets, np.pad(weight, (0, 3))

    fitted = task.fit and jit(task.fit)(*padded(*val))

    def added(split, reference):
        total: Any = None
        for i in np.split(np.arange(len(split[0])), cuts):
            dense = None if reference is None else padded(split[0][i], reference[i])[1]
            sums = jit(task.sums)(*padded(split[0][i], split[1][i]), fitted, dense)
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        return total

    return jit(task.finish)(added(val, None), added(test, reference), fitted)


def assert_metrics(found, expected, rtol=1e-5):
    assert set(found) == set(expected)
    for name, value in expected.items():
        tolerance: dict[str, Any] = {"rtol": 2e-4 if name == "temperature" else rtol, "atol": 1e-6}
        np.testing.assert_allclose(found[name], value, **tolerance, err_msg=name)


def abstract(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def in_float64(array):
    return array if np.issubdtype(array.dtype, np.integer) else np.asarray(array, np.float64)


@pytest.mark.parametrize(
    ("cuts", "filler"),
    [((1,), None), ((100,), np.nan), ((100,), np.inf)],
    ids=str,
)
def test_metrics_are_those_of_numpy_whatever_the_batches_and_the_padding(case, cuts, filler):
    task, make, reference = case
    val, test = make(200, seed=1), make(200, seed=2)
    dense = task.predict and np.asarray(task.predict(jnp.asarray(make(200, seed=3)[0])))
    found = measure(task, val, test, dense, cuts, filler)
    assert_metrics(
        found, reference(*(tuple(map(in_float64, split)) for split in (val, test)), dense)
    )
    assert {"loss", "val_loss"} <= set(found)
    if dense is not None:
        assert 0.2 < found["churn"] < 1
        assert measure(task, val, test)["churn"] == 0


def test_metrics_are_described(case):
    task, make, _ = case
    val, test = make(50, seed=1), make(50, seed=2)
    described = task.metrics(abstract(test[0]))
    found = measure(task, val, test)
    assert {metric.name for metric in described} == set(found)
    assert len({metric.label for metric in described}) == len(described)
    assert sum(metric.drawn for metric in described) == min(2, len(described) // 2 or 1)
    for metric in described:
        assert metric.better in ("higher", "lower", "") and not metric.label.endswith(")")
        assert metric.low is None or np.nanmin(found[metric.name]) >= metric.low
        assert metric.high is None or np.nanmax(found[metric.name]) <= metric.high


def test_chance_is_what_a_guess_gets():
    labels = np.arange(40, dtype=np.int32) % CLASSES
    targets = np.where(labels < 4, labels, -1).reshape(8, 5).astype(np.int32)
    values = numbers(60)[1]
    of_zeros = np.zeros((*targets.shape, 4), np.float32)
    for task, outputs, y in (
        (tasks.classification(), np.zeros((40, CLASSES), np.float32), labels),
        (tasks.tokens(), of_zeros, targets),
        (tasks.regression(), np.broadcast_to(values.mean(axis=0), values.shape), values),
    ):
        found = measure(task, (outputs, y), (outputs, y))
        chances = {m.name: m.chance for m in task.metrics(abstract(outputs)) if m.chance}
        for name, chance in chances.items():
            np.testing.assert_allclose(found[name], chance, rtol=1e-6, atol=1e-6, err_msg=name)


def test_levels_vmapped_are_levels_looped(case):
    task, make, _ = case
    (_, y), levels = make(60, seed=1), np.stack([make(60, seed=1)[0] * s for s in (0.0, 1.0, 3.0)])
    dense = None if task.predict is None else task.predict(jnp.asarray(levels[1]))

    y = jnp.asarray(y)

    def one(outputs):
        weight = jnp.ones(60, jnp.int32)
        fitted = None if task.fit is None else task.fit(outputs, y, weight)
        sums = task.sums(outputs, y, weight, fitted, dense)
        return task.finish(sums, sums, fitted)

    found, alone = jit(jax.vmap(one))(levels), jit(one)
    for i, outputs in enumerate(levels):
        assert_metrics({k: v[i] for k, v in found.items()}, alone(outputs))


@pytest.mark.parametrize(
    ("name", "dtype", "n"),
    [("classification", "float16", 70_000), ("classification", "bfloat16", 10_000)]
    + [
        pytest.param(name, "float16", 3000, marks=pytest.mark.slow)
        for name in ("tokens", "regression", "own_loss")
    ],
)
def test_narrow_outputs_are_scored_in_float32(name, dtype, n):
    # So many overflow float16, and are not told apart by bfloat16.
    task, make, reference = TASKS[name]
    narrow = [(jnp.asarray(z, dtype), y) for z, y in (make(200, seed=1), make(n, seed=2))]
    if task is MAX:  # what a user's loss computes is the user's, in strict promotion
        narrow = [(z, y.astype(z.dtype)) for z, y in narrow]
    dense = task.predict and np.asarray(task.predict(narrow[1][0]))[::-1]
    found = measure(task, *narrow, dense)
    expected = reference(*(tuple(map(in_float64, split)) for split in narrow), dense)
    assert_metrics(found, expected, rtol=5e-3 if task is MAX else 1e-5)
    losses, weights = jit(task.loss)(*narrow[0])
    assert losses.dtype == weights.dtype == jnp.float32
    assert all(value.dtype == jnp.float32 for value in found.values())


@pytest.mark.parametrize("batch", [128, 20, 7])
def test_training_minimises_the_mean_loss_of_examples(batch):
    def mean_of_optax(logits, labels):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    found, expected = (
        jax.jit(jax.value_and_grad(f))(*labelled(batch))
        for f in (partial(tasks.mean_loss, tasks.classification()), mean_of_optax)
    )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_training_minimises_the_nats_a_token():
    logits, targets = sequences(20)
    task, valid = tasks.tokens(), targets >= 0
    assert 0 in valid.sum(axis=1) and 1 < len(set(valid.sum(axis=1)))
    losses, weights = jit(task.loss)(logits, targets)
    each = np.where(valid, nats(logits.astype(np.float64), np.maximum(targets, 0)), 0)
    np.testing.assert_allclose(losses, each.sum(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(weights, valid.sum(axis=1))
    loss = jit(jax.value_and_grad(partial(tasks.mean_loss, task)))
    value, gradient = loss(logits, targets)
    np.testing.assert_allclose(value, each.sum() / valid.sum(), rtol=1e-5)
    expected = softmax(logits, axis=-1) - np.eye(CLASSES)[targets]
    expected = np.where(valid[..., None], expected / valid.sum(), 0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)
    # A batch of padding alone teaches nothing.
    value, gradient = loss(logits, np.full_like(targets, -1))
    assert value == 0 and not gradient.any()


def test_ten_million_tokens_lose_no_digits():
    # 80 batches of 128,000 tokens, the same ones every time but for a shift.
    task, length = tasks.tokens(), 128
    logits, targets = labelled(1000, scale=1.0, classes=2, axes=(length,))
    weight, shifts = jnp.ones(1000, jnp.int32), np.linspace(0, 2, 80, dtype=np.float32)

    @jax.jit
    def found(logits, targets, shifts):
        each = jax.lax.map(lambda s: task.sums(logits * s, targets, weight, None, None), shifts)
        total = jax.tree.map(lambda sums: jnp.sum(sums, axis=0), each)
        return total.count, task.finish(total, total, None)

    count, metrics = found(logits, targets, shifts)
    assert count == 80 * 1000 * length > 1e7
    expected = np.mean([nats(logits.astype(np.float64) * s, targets).mean() for s in shifts])
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)


def test_r2_keeps_its_digits_where_the_mean_is_large():
    # In float32, Σy² − (Σy)²/n is wrong in its first digit here.
    val, test = numbers(500, seed=1, mean=1e4), numbers(500, seed=2, mean=1e4)
    expected = regression_reference(val, [a.astype(np.float64) for a in test], None)
    assert_metrics(measure(tasks.regression(), val, test, cuts=(100, 300)), expected, rtol=1e-4)
    # The shift is any number near the mean.
    shifted = (val[0], val[1] + 3)
    found = measure(tasks.regression(), shifted, test)["r2"]
    np.testing.assert_allclose(found, expected["r2"], rtol=1e-4)
    constant = test[0], np.full_like(test[1], 1e4)
    assert np.isnan(measure(tasks.regression(), val, constant)["r2"])


def test_regression_of_any_shape():
    for axes in ((), (2, 3)):
        z, y = np.random.default_rng(0).normal(size=(2, 40, *axes)).astype(np.float32)
        losses, weights = jit(tasks.regression().loss)(z, y)
        np.testing.assert_allclose(losses, ((z - y) ** 2).reshape(40, -1).mean(axis=1), rtol=1e-6)
        assert weights.tolist() == [1.0] * 40
    expected = regression_reference((z, y), (z, y.astype(np.float64)), None)
    assert_metrics(measure(tasks.regression(), (z, y), (z, y), cuts=(17,)), expected)


def classified(logits, labels, temperature=1.0):
    labels = np.asarray(labels, np.int32)
    weight, temperature = np.ones(len(labels), np.int32), np.float32(temperature)
    return jit(batch_sums)(np.asarray(logits, np.float32), labels, weight, temperature, None)


def test_of_equal_logits_the_first_is_predicted():
    logits = np.array([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [0.0, 0.0, 0.0], [-0.0, 0.0, -1.0]])
    predictions = predict(jnp.asarray(logits))
    assert predictions.dtype == jnp.int32 and predictions.tolist() == [0, 1, 0, 0]
    for label, correct in ((0, 3), (1, 1), (2, 0)):
        sums = classified(logits, np.full(4, label))
        assert sums.correct == correct and sums.correct.dtype == jnp.int32


def test_a_confidence_on_an_edge_is_in_the_bin_below():
    # 1/15, 1/5, 1/3 and 1, with as many equal logits and the rest far below them.
    shares, inside = np.array([15, 5, 3, 1]), [0, 2, 4, 14]
    logits = jnp.asarray(np.where(np.arange(16) < shares[:, None], 0, -500), jnp.float32)
    confidence = np.asarray(jax.nn.softmax(logits).max(axis=1))
    assert (confidence == np.float32(1) / shares.astype(np.float32)).all()  # on the edge, exactly
    sums = classified(logits, np.zeros(4))
    expected = np.zeros(15, np.float32)
    expected[inside] = confidence
    np.testing.assert_array_equal(sums.bin_confidence, expected)
    np.testing.assert_array_equal(sums.bin_correct, expected > 0)


def errors_of(probabilities, labels):
    logits = np.log(np.maximum(probabilities, 1e-30)).astype(np.float32)
    return calibration_errors(classified(logits, labels))


def test_calibration_errors_by_hand():
    close: Any = {"rtol": 1e-5}
    # The over-confident have a positive signed error.
    np.testing.assert_allclose(errors_of([[0.9, 0.1]], [1]), (0.9, 0.9), **close)
    np.testing.assert_allclose(errors_of([[0.9, 0.1]], [0]), (0.1, -0.1), **close)
    # In one bin, right and wrong make up for each other; the gaps of two add up.
    found = errors_of([[0.32, 0.31, 0.31, 0.06], [0.3, 0.3, 0.2, 0.2]], [0, 3])
    np.testing.assert_allclose(found, (0.38 / 2, -0.38 / 2), **close)
    found = errors_of([[0.34, 0.33, 0.33, 0], [0.3, 0.3, 0.2, 0.2]], [0, 3])
    np.testing.assert_allclose(found, ((0.66 + 0.3) / 2, (-0.66 + 0.3) / 2), **close)


def temperature_of(logits, labels):
    return jit(fit_temperature)(logits, labels, np.ones(len(labels), np.int32))


@pytest.mark.parametrize("scale", [1e-2, 0.3, 50.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_temperature_is_that_of_scipy(scale, classes):
    logits, labels = labelled(200, scale=scale, classes=classes)
    expected, loss = best_temperature(logits, labels)
    assert 1e-3 < expected < 1e3
    found = temperature_of(logits, labels)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert loss(-np.log(np.float64(found))) <= loss(-np.log(expected)) + 1e-9


def test_temperature_is_at_a_bound_where_the_optimum_is_beyond_it():
    logits, labels = labelled(200)
    right = 3 * np.eye(5, dtype=np.float32)[labels] + logits / 20
    hot = labelled(200, scale=1e5)[0]
    for given, bound in ((right, 1e-3), (-right, 1e3), (hot, 1e3)):
        np.testing.assert_allclose(temperature_of(given, labels), bound, rtol=1e-4)


def test_temperature_of_zero_logits_is_one():
    labels, weight = np.array([0, 1, 2, 0], np.int32), np.array([1, 1, 1, 0], np.int32)
    logits = np.zeros((4, 3), np.float32)
    assert temperature_of(logits, labels) == 1
    logits[3] = np.nan  # of padding, which is no logit that is not zero
    assert fit_temperature(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(weight)) == 1


def ints(*shape, low=0, high=1):
    return np.linspace(low, high, int(np.prod(shape))).round().astype(np.int32).reshape(shape)


FLOATS = np.zeros((9, 4), np.float32)
LOGITS, NATS = (2, 4), (2, 3, 4)
BAD: list[tuple[Any, Any, np.ndarray, str]] = [
    ("classification", LOGITS, FLOATS[:, 0], r"\(2, 4\) and targets float32 \(9,\); classif"),
    ("classification", LOGITS, ints(9, 2), r"\(2, 4\) and targets int32 \(9, 2\); classification"),
    ("classification", (2, 1, 4), ints(9), r"\(2, 1, 4\) and targets int32 \(9,\); classification"),
    ("classification", LOGITS, ints(9, low=1, high=4), r"in \[1, 4\] and the network has 4 out.*3"),
    ("classification", LOGITS, ints(9, low=-1), r"labels are in \[-1, 1\]"),
    ("tokens", NATS, ints(9, 4), r"\(2, 3, 4\) and targets int32 \(9, 4\); tokens takes"),
    ("tokens", NATS, FLOATS[:, :3], r"targets float32 \(9, 3\); tokens takes"),
    ("tokens", LOGITS, ints(9), r"are \(2, 4\) and targets int32 \(9,\); tokens takes"),
    ("tokens", NATS, ints(9, 3, low=-2), r"targets are in \[-2, 1\] .* −1 for padding"),
    ("tokens", NATS, ints(9, 3, low=0, high=4), r"targets are in \[0, 4\] .* has 4 outputs"),
    ("tokens", NATS, ints(9, 3, low=-1, high=-1), "all targets are −1"),
    ("regression", (2, 1), FLOATS[:, 0], r"\(2, 1\) and targets float32 \(9,\); regression"),
    ("regression", LOGITS, ints(9, 4), r"\(2, 4\) and targets int32 \(9, 4\); regression"),
    ("regression", LOGITS, FLOATS * np.nan, "targets have values that are not finite"),
    (lambda z, y: (z - y).sum(), LOGITS, FLOATS, r"\(2,\), one an example, got float32 \(\)"),
    (lambda z, y: z - y, LOGITS, FLOATS, r"got float32 \(2, 4\); outputs of a batch are \(2, 4\)"),
    (lambda z, y: z - y, LOGITS, FLOATS[:, :3], r"the loss fails: .*4.*3.*; outputs .*\(9, 3\)"),
    (lambda z, y: (z, y), LOGITS, FLOATS, "got tuple"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "outputs", "targets", "message"), BAD, ids=range(len(BAD)))
def test_targets_that_do_not_fit(task, outputs, targets, message):
    with pytest.raises(ValueError, match=message) as error:
        tasks.resolve(task).check(jax.ShapeDtypeStruct(outputs, jnp.float32), targets)
    assert "\n" not in str(error.value)


def test_targets_that_fit(case):
    task, make, _ = case
    outputs, targets = make(30)
    task.check(abstract(outputs[:2]), targets)
    with pytest.raises(ValueError, match=r"outputs of a batch are \(\(2, "):
        task.check((abstract(outputs[:2]),) * 2, targets)


def test_tasks_are_found(tmp_path, monkeypatch):
    for name in ("classification", "tokens", "regression"):
        assert tasks.resolve(name) == getattr(tasks, name)() and tasks.resolve(name).name == name
    assert tasks.resolve(MAX) is MAX
    (tmp_path / "of_mine.py").write_text("def hinge(z, y):\n    return abs(z - y).sum(1)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    found = tasks.resolve("of_mine:hinge")
    assert found.name == "of_mine:hinge"
    assert found.loss(jnp.ones((2, 3)), jnp.zeros((2, 3)))[0].tolist() == [3.0, 3.0]
    assert tasks.resolve(max_reference).name == "max_reference"
    with pytest.raises(ValueError, match="no task 'clas': it is one of classification, tokens, r"):
        tasks.resolve("clas")
    with pytest.raises(ValueError, match="of_mine"):
        tasks.resolve("of_mine:missing")


def test_the_default_task_is_what_targets_look_like():
    for y, name in ((ints(5), "classification"), (ints(5, 3), "tokens"), (FLOATS, "regression")):
        assert tasks.default_task(y).name == name
    with pytest.raises(ValueError, match=r"targets are int32 \(2, 3, 4\): no task"):
        tasks.default_task(ints(2, 3, 4))
    with pytest.raises(ValueError, match=r"targets are bool \(5,\)"):
        tasks.default_task(np.ones(5, bool))
