"""From parameters and masks to metrics: one level, or all levels in one compiled call.

Masks come from `masks`, the metrics go into rows by `study`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import metrics, trees
from jaxprune.data import Data, Split
from jaxprune.masks import apply_masks
from jaxprune.types import Apply, Array, Masks, Metrics, Params


def evaluate_levels(
    apply: Apply,
    params: Params,
    masks: Masks,
    data: Data,
    *,
    reference: Array | None = None,
    batch_size: int = 1000,
    levels_at_once: int | None = None,
) -> tuple[Metrics, Array]:
    """Score the masked network at every level, in one compiled call.

    Args:
        apply: `apply(params, x) -> logits`.
        params: parameters, shared by all levels, or with a leading levels axis in every leaf.
        masks: masks with a leading levels axis.
        data: the splits `val` and `test` are read.
        reference: (test examples,) int32, the predictions that `churn` compares with: those of
            the dense network. By default those of the first level.
        batch_size: examples in a batch; changes the speed, not the counts.
        levels_at_once: how many levels are vmapped together. By default all on an accelerator, and
            one on a CPU, where more are no faster and take more memory.

    Returns:
        `Metrics` with a leading levels axis, and the predictions on test, (levels, examples) int32.

    Raises:
        ValueError: masks that do not match the params, or a batch size below 1.

    Example:
        >>> images = Split(np.eye(2, dtype=np.float32), np.arange(2, dtype=np.int32))
        >>> masks = {"logits": jnp.stack([jnp.ones((2, 2), bool), jnp.zeros((2, 2), bool)])}
        >>> found, _ = evaluate_levels(
        ...     lambda p, x: x @ p["logits"], {"logits": jnp.eye(2)}, masks, Data(*[images] * 3)
        ... )
        >>> found.accuracy.tolist()
        [1.0, 0.5]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if jax.tree.map(jnp.ndim, params) != jax.tree.map(jnp.ndim, masks):
        levels = jax.tree.leaves(masks)[0].shape[:1]
        params = jax.tree.map(lambda w: jnp.broadcast_to(w, levels + jnp.shape(w)), params)
    trees.check_match("masks", masks, "params with a levels axis", params)
    if len({leaf.shape[:1] for leaf in jax.tree.leaves(masks)}) > 1:
        raise ValueError(
            "masks must have a leading levels axis, of one length in all leaves; give "
            "those of one network as jax.tree.map(lambda m: m[None], masks)"
        )
    return score(
        params, masks, data.val, data.test, reference,
        apply=apply, batch_size=batch_size, levels_at_once=levels_at_once,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("apply", "batch_size", "levels_at_once"))
def score(
    params: Params,
    masks: Masks,
    val: Split,
    test: Split,
    reference: Array | None,
    *,
    apply: Apply,
    batch_size: int,
    levels_at_once: int | None,
) -> tuple[Metrics, Array]:
    """Compute `evaluate_levels` of stacked params; the one program that a sweep compiles."""
    val_batches, test_batches = _batches(val, batch_size), _batches(test, batch_size)

    def one_level(network: tuple[Params, Masks]) -> tuple[Metrics, Array]:
        pruned = apply_masks(*network)
        logits = jax.lax.map(lambda batch: apply(pruned, batch.x), val_batches)
        temperature = metrics.fit_temperature(
            logits.reshape(-1, logits.shape[-1]),
            val_batches.y.ravel(),
            val_batches.weight.ravel(),
        )

        def on_test(batch: _Batches) -> tuple[metrics.Sums, Array]:
            logits = apply(pruned, batch.x)
            return _sums(logits, batch, temperature), metrics.predict(logits)

        val_sums = jax.vmap(lambda z, batch: _sums(z, batch, temperature))(logits, val_batches)
        test_sums, predictions = jax.lax.map(on_test, test_batches)
        return (
            _finish(_add_up(val_sums), _add_up(test_sums), temperature),
            predictions.ravel()[: len(test.y)],
        )

    scores, predictions = trees.map_levels(one_level, (params, masks), levels_at_once)
    changed = predictions != (predictions[:1] if reference is None else reference[None])
    return scores._replace(churn=jnp.sum(changed, axis=1) / len(test.y)), predictions


class _Batches(NamedTuple):
    x: Array  # (batches, batch, ...)
    y: Array  # (batches, batch)
    weight: Array  # (batches, batch) int32, 0 where the last batch is padded


def _batches(split: Split, size: int) -> _Batches:
    num = len(split.y)
    padding = -num % size

    def cut(values: Array) -> Array:
        values = jnp.pad(values, [(0, padding)] + [(0, 0)] * (values.ndim - 1))
        return values.reshape(-1, size, *values.shape[1:])

    return _Batches(
        cut(jnp.asarray(split.x)), cut(jnp.asarray(split.y)), cut(jnp.ones(num, jnp.int32))
    )


def _sums(logits: Array, batch: _Batches, temperature: Array) -> metrics.Sums:
    return metrics.batch_sums(logits, batch.y, batch.weight, temperature)


def _add_up(sums: metrics.Sums) -> metrics.Sums:
    return jax.tree.map(lambda values: jnp.sum(values, axis=0), sums)


def _finish(val: metrics.Sums, test: metrics.Sums, temperature: Array) -> Metrics:
    ece, signed_ece = metrics.calibration_errors(test)
    examples, val_examples = (s.count.astype(s.loss.dtype) for s in (test, val))
    class_accuracy = test.class_correct / test.class_count  # NaN for a class without examples
    return Metrics(
        accuracy=test.correct / test.count,
        loss=test.loss / examples,
        ece=ece,
        signed_ece=signed_ece,
        temperature=temperature,
        scaled_loss=test.scaled_loss / examples,
        churn=jnp.zeros(()),
        class_accuracy=class_accuracy,
        worst_class_accuracy=jnp.nanmin(class_accuracy),
        val_accuracy=val.correct / val.count,
        val_loss=val.loss / val_examples,
    )
