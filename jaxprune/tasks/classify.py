"""Classification: accuracy, cross-entropy, and how far a network's confidence can be trusted."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.tasks import sums
from jaxprune.types import Array, Metric, Task

NUM_BINS = 15
_BISECTIONS = 40


class Sums(NamedTuple):
    """Sums over examples; those of two batches add up field by field. Counts are int32."""

    count: Array
    correct: Array
    changed: Array
    loss: Array
    scaled_loss: Array
    bin_correct: Array  # (bins,)
    bin_confidence: Array  # (bins,)
    class_count: Array  # (classes,)
    class_correct: Array  # (classes,)


def classification() -> Task:
    """Return the task of naming each example's class.

    Outputs are logits, (batch, classes), targets labels, (batch,) integers from 0. The loss is the
    cross-entropy in nats. Logits narrower than float32 are scored in float32.

    Besides accuracy and loss it measures, on test: `ece` and `signed_ece` (`calibration_errors`),
    the `temperature` that validation fits (`fit_temperature`) and the loss of the logits divided by
    it, `churn`, the share of predictions that are not the dense network's, and the accuracy of each
    class (NaN of one without examples) and of the worst.

    Example:
        >>> task = classification()
        >>> losses, weights = task.loss(jnp.zeros((2, 4)), jnp.array([0, 3]))
        >>> f"{losses[0]:.4f}", weights.tolist()
        ('1.3863', [1.0, 1.0])
    """
    return Task(
        name="classification",
        loss=_loss,
        fit=fit_temperature,
        predict=sums.predict,
        sums=batch_sums,
        finish=_finish,
        metrics=_metrics,
        check=_check,
    )


def batch_sums(
    logits: Array, labels: Array, weight: Array, temperature: Array, reference: Array | None
) -> Sums:
    """Sum a batch up.

    Args:
        logits: (batch, classes).
        labels: (batch,) integers.
        weight: (batch,) int32, 1, or 0 for padding.
        temperature: (), divides the logits in `scaled_loss`.
        reference: (batch,) int32, the dense network's predictions, or None.
    """
    logits, labels = sums.widened(logits), labels.astype(jnp.int32)
    predictions = sums.predict(logits)
    correct = jnp.where(predictions == labels, weight, 0)
    confidence = jnp.max(jax.nn.softmax(logits), axis=-1)
    # Bins are (lo, hi]: a confidence on an edge belongs to the bin below it.
    edges = jnp.arange(1, NUM_BINS) / NUM_BINS
    which_bin = jnp.sum(confidence[:, None] > edges[None], axis=1)
    in_bin = jax.nn.one_hot(which_bin, NUM_BINS, dtype=jnp.int32)
    in_class = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.int32)
    return Sums(
        count=jnp.sum(weight),
        correct=jnp.sum(correct),
        changed=sums.changed(predictions, reference, weight),
        loss=sums.total(sums.cross_entropy(logits, labels), weight),
        scaled_loss=sums.total(sums.cross_entropy(logits / temperature, labels), weight),
        bin_correct=correct @ in_bin,
        bin_confidence=jnp.matmul(
            jnp.where(weight > 0, confidence, 0.0),
            in_bin.astype(confidence.dtype),
            precision="highest",  # a GPU would round what it multiplies
        ),
        class_count=weight @ in_class,
        class_correct=correct @ in_class,
    )


def calibration_errors(found: Sums) -> tuple[Array, Array]:
    r"""Return `ece` and `signed_ece`, fractions.

    With $c_b$ and $a_b$ the mean confidence (largest softmax probability) and the accuracy of the
    $n_b$ examples whose confidence is in bin b of 15 equal ones, `ece` is
    $\sum_b n_b / n\, |c_b - a_b|$; `signed_ece` is mean confidence − accuracy, positive where the
    network is over-confident.

    Reference:
        Guo, Pleiss, Sun, Weinberger. On Calibration of Modern Neural Networks. ICML 2017.
    """
    dtype = found.bin_confidence.dtype
    gaps = (found.bin_confidence - found.bin_correct.astype(dtype)) / found.count.astype(dtype)
    return jnp.sum(jnp.abs(gaps)), jnp.sum(gaps)


def fit_temperature(logits: Array, labels: Array, weight: Array) -> Array:
    r"""Return the temperature T that minimises the loss of `logits / T`.

    The loss is convex in $\beta = 1/T$; its slope, the mean of
    $\mathrm{softmax}(\beta z) \cdot z - z_y$, is bisected over $\log \beta$ for $\beta$ in
    $[10^{-3}, 10^3]$.

    Args:
        logits: (n, classes).
        labels: (n,) integers.
        weight: (n,) int32, 1, or 0 for padding.

    Returns:
        T, (), in [10⁻³, 10³]; 1 where all logits of every example are zero.

    Reference:
        Guo, Pleiss, Sun, Weinberger. On Calibration of Modern Neural Networks. ICML 2017. There
        by gradient steps.
    """
    logits = jnp.where(weight[:, None] > 0, sums.widened(logits), 0.0)
    labelled = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]

    def halve(_: Array, interval: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = interval
        middle = (low + high) / 2
        probabilities = jax.nn.softmax(jnp.exp(middle) * logits)
        slope = jnp.sum(jnp.sum(probabilities * logits, axis=-1) - labelled)
        return jnp.where(slope > 0, low, middle), jnp.where(slope > 0, middle, high)

    bound = jnp.log(jnp.asarray(1e3, logits.dtype))
    low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, (-bound, bound))
    return jnp.where(jnp.any(logits != 0), jnp.exp(-(low + high) / 2), 1.0)


def _loss(logits: Array, labels: Array) -> tuple[Array, Array]:
    losses = sums.cross_entropy(logits, labels)
    return losses, jnp.ones_like(losses)


def _finish(val: Sums, test: Sums, temperature: Array) -> dict[str, Array]:
    ece, signed_ece = calibration_errors(test)
    examples, val_examples = (s.count.astype(s.loss.dtype) for s in (test, val))
    class_accuracy = test.class_correct / test.class_count  # NaN for a class without examples
    return {
        "accuracy": test.correct / test.count,
        "loss": test.loss / examples,
        "ece": ece,
        "signed_ece": signed_ece,
        "temperature": temperature,
        "scaled_loss": test.scaled_loss / examples,
        # Times the inverse: what XLA makes of a division by a constant, to the last bit.
        "churn": test.changed.astype(examples.dtype) * (1 / examples),
        "class_accuracy": class_accuracy,
        "worst_class_accuracy": jnp.nanmin(class_accuracy),
        "val_accuracy": val.correct / val.count,
        "val_loss": val.loss / val_examples,
    }


def _metrics(logits: Any) -> tuple[Metric, ...]:
    classes = logits.shape[-1]
    share: Any = {"unit": "%", "low": 0.0, "high": 1.0}
    nats: Any = {"unit": "nats", "better": "lower", "low": 0.0}
    guess = math.log(classes)
    return (
        Metric(
            "accuracy", "test accuracy", better="higher", drawn=True, chance=1 / classes, **share
        ),
        Metric("loss", "test loss", drawn=True, chance=guess, **nats),
        Metric("ece", "expected calibration error", better="lower", **share),
        Metric("signed_ece", "signed calibration error", "%", "", low=-1.0, high=1.0),
        Metric("temperature", "temperature", "", "", low=1e-3, high=1e3),
        Metric("scaled_loss", "loss after temperature scaling", chance=guess, **nats),
        Metric("churn", "churn", better="lower", **share),
        Metric("class_accuracy", "accuracy of each class", better="higher", **share),
        Metric("worst_class_accuracy", "accuracy of the worst class", better="higher", **share),
        Metric("val_accuracy", "validation accuracy", better="higher", **share),
        Metric("val_loss", "validation loss", **nats),
    )


def _check(logits: Any, labels: Any) -> None:
    wanted = "logits (batch, classes), and integers (examples,) from 0"
    sums.check_logits("classification", wanted, logits, labels, 2)
    low, high, classes = labels.min(), labels.max(), logits.shape[-1]
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels are in [{low}, {high}] and the network has {classes} outputs, which are for "
            f"labels in [0, {classes - 1}]; {sums.shapes(logits, labels)}"
        )
