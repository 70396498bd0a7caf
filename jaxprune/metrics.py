"""How good predictions are: per-example losses, sums that add up over batches, calibration.

Logits and labels come in. `evaluate` adds the sums up over batches and finishes them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune.types import Array

NUM_BINS = 15
_BISECTIONS = 40


class Sums(NamedTuple):
    """Sums over examples; those of two batches add up field by field. Counts are int32."""

    count: Array
    correct: Array
    loss: Array
    scaled_loss: Array
    bin_correct: Array  # (bins,)
    bin_confidence: Array  # (bins,)
    class_count: Array  # (classes,)
    class_correct: Array  # (classes,)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Return each example's categorical cross-entropy in nats, (batch,), of (batch, classes)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def predict(logits: Array) -> Array:
    """Return the most probable class of each example, int32; of equal ones the first."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def batch_sums(logits: Array, labels: Array, weight: Array, temperature: Array) -> Sums:
    """Sum a batch up.

    Args:
        logits: (batch, classes).
        labels: (batch,) int32.
        weight: (batch,) int32, 1, or 0 for padding.
        temperature: (), divides the logits in `scaled_loss`.
    """
    classes = logits.shape[-1]
    correct = jnp.where(predict(logits) == labels, weight, 0)
    confidence = jnp.max(jax.nn.softmax(logits), axis=-1)
    # Bins are (lo, hi]: a confidence on an edge belongs to the bin below it.
    edges = jnp.arange(1, NUM_BINS) / NUM_BINS
    which_bin = jnp.sum(confidence[:, None] > edges[None], axis=1)
    in_bin = jax.nn.one_hot(which_bin, NUM_BINS, dtype=jnp.int32)
    in_class = jax.nn.one_hot(labels, classes, dtype=jnp.int32)

    def total(values: Array) -> Array:
        # `where`, since padding may have logits that are not finite.
        return jnp.sum(jnp.where(weight > 0, values, 0.0))

    return Sums(
        count=jnp.sum(weight),
        correct=jnp.sum(correct),
        loss=total(cross_entropy(logits, labels)),
        scaled_loss=total(cross_entropy(logits / temperature, labels)),
        bin_correct=correct @ in_bin,
        bin_confidence=jnp.matmul(
            jnp.where(weight > 0, confidence, 0.0),
            in_bin.astype(confidence.dtype),
            precision="highest",  # a GPU would round what it multiplies
        ),
        class_count=weight @ in_class,
        class_correct=correct @ in_class,
    )


def calibration_errors(sums: Sums) -> tuple[Array, Array]:
    r"""Return `ece` and `signed_ece`, fractions.

    With $c_b$ and $a_b$ the mean confidence (largest softmax probability) and the accuracy of the
    $n_b$ examples whose confidence is in bin b of 15 equal ones, `ece` is
    $\sum_b n_b / n\, |c_b - a_b|$; `signed_ece` is mean confidence − accuracy, positive where the
    network is over-confident.

    Reference:
        Guo, Pleiss, Sun, Weinberger. On Calibration of Modern Neural Networks. ICML 2017.
    """
    dtype = sums.bin_confidence.dtype
    gaps = (sums.bin_confidence - sums.bin_correct.astype(dtype)) / sums.count.astype(dtype)
    return jnp.sum(jnp.abs(gaps)), jnp.sum(gaps)


def fit_temperature(logits: Array, labels: Array, weight: Array) -> Array:
    r"""Return the temperature T that minimises the loss of `logits / T`.

    The loss is convex in $\beta = 1/T$; its slope, the mean of
    $\mathrm{softmax}(\beta z) \cdot z - z_y$, is bisected over $\log \beta$ for $\beta$ in
    $[10^{-3}, 10^3]$.

    Args:
        logits: (n, classes).
        labels: (n,) int32.
        weight: (n,) int32, 1, or 0 for padding.

    Returns:
        T, (), in [10⁻³, 10³]; 1 where all logits of every example are zero.

    Reference:
        Guo, Pleiss, Sun, Weinberger. On Calibration of Modern Neural Networks. ICML 2017. There
        by gradient steps.
    """
    logits = jnp.where(weight[:, None] > 0, logits, 0.0)
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
