"""Tokens: the next one, or any other target at every position of a sequence."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxprune.tasks import sums
from jaxprune.types import Array, Metric, Task


class Sums(NamedTuple):
    """Sums over valid tokens; those of two batches add up field by field. Counts are int32.

    A batch's nats are summed in float32, pairwise by XLA, and the batches' sums likewise: of ten
    million tokens some seven digits stay, as of one batch.
    """

    count: Array
    correct: Array
    changed: Array
    loss: Array


def tokens() -> Task:
    """Return the task of naming a token at every position.

    Outputs are logits, (batch, T, vocabulary), targets (batch, T) int32, of which −1 is padding and
    is ignored. Training minimises the nats a token of the whole batch, so a sequence counts as much
    as it has tokens. On test, the `perplexity` is exp(loss), and `churn` is the share of tokens
    whose prediction is not the dense network's. Drawn are perplexity and accuracy: the loss is the
    perplexity's logarithm, and a second view of the same number.

    Example:
        >>> task = tokens()
        >>> losses, weights = task.loss(jnp.zeros((1, 3, 4)), jnp.array([[2, 0, -1]]))
        >>> f"{losses[0]:.4f}", weights.tolist()
        ('2.7726', [2.0])
    """
    return Task(
        name="tokens",
        loss=_loss,
        fit=None,
        predict=sums.predict,
        sums=_sums,
        finish=_finish,
        metrics=_metrics,
        check=_check,
    )


def _loss(logits: Array, targets: Array) -> tuple[Array, Array]:
    losses = _nats(logits, targets)
    return jnp.sum(losses, axis=-1), jnp.sum(targets >= 0, axis=-1).astype(losses.dtype)


def _nats(logits: Array, targets: Array) -> Array:
    """Return the cross-entropy of every token, (batch, T), 0 of padding."""
    losses = sums.cross_entropy(logits, jnp.maximum(targets, 0))
    return jnp.where(targets >= 0, losses, 0.0)


def _sums(
    logits: Array, targets: Array, weight: Array, fitted: None, reference: Array | None
) -> Sums:
    targets = targets.astype(jnp.int32)
    valid = jnp.where(targets >= 0, weight[:, None], 0)
    predictions = sums.predict(logits)
    return Sums(
        count=jnp.sum(valid),
        correct=jnp.sum(jnp.where(predictions == targets, valid, 0)),
        changed=sums.changed(predictions, reference, valid),
        loss=sums.total(_nats(logits, targets), valid),
    )


def _finish(val: Sums, test: Sums, fitted: None) -> dict[str, Array]:
    loss, val_loss = (s.loss / s.count.astype(s.loss.dtype) for s in (test, val))
    return {
        "perplexity": jnp.exp(loss),
        "accuracy": test.correct / test.count,
        "loss": loss,
        "churn": test.changed / test.count,
        "val_accuracy": val.correct / val.count,
        "val_loss": val_loss,
    }


def _metrics(logits: Any) -> tuple[Metric, ...]:
    size = logits.shape[-1]
    share: Any = {"unit": "%", "low": 0.0, "high": 1.0}
    nats: Any = {"unit": "nats a token", "better": "lower", "low": 0.0}
    return (
        Metric(
            "perplexity", "test perplexity", "", "lower", drawn=True, low=1.0, chance=float(size)
        ),
        Metric("accuracy", "test accuracy", better="higher", drawn=True, chance=1 / size, **share),
        Metric("loss", "test loss", chance=math.log(size), **nats),
        Metric("churn", "churn", better="lower", **share),
        Metric("val_accuracy", "validation accuracy", better="higher", **share),
        Metric("val_loss", "validation loss", **nats),
    )


def _check(logits: Any, targets: Any) -> None:
    wanted = "logits (batch, T, vocabulary), and integers (examples, T) from 0, or −1 for padding"
    sums.check_logits("tokens", wanted, logits, targets, 3)
    low, high, size = targets.min(), targets.max(), logits.shape[-1]
    if low < -1 or high >= size:
        raise ValueError(
            f"targets are in [{low}, {high}] and the network has {size} outputs, which are for "
            f"tokens in [0, {size - 1}], and −1 for padding; {sums.shapes(logits, targets)}"
        )
    if high < 0:
        raise ValueError("all targets are −1, which is padding")
