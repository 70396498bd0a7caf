"""What the tasks share: wide enough numbers, and sums that leave padding out.

Outputs and targets of a batch come in; what goes out adds up over batches, levels and devices.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune.types import Array


def widened(values: Array) -> Array:
    """Return float16 and bfloat16 as float32: their sums overflow, and lose digits before that."""
    return values.astype(jnp.float32) if jnp.finfo(values.dtype).bits < 32 else values


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Return the categorical cross-entropy in nats, (...), of logits (..., classes) and labels."""
    return optax.softmax_cross_entropy_with_integer_labels(widened(logits), labels)


def predict(logits: Array) -> Array:
    """Return the most probable class, int32 (...), of (..., classes); of equal ones the first."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def total(values: Array, weight: Array) -> Array:
    """Sum what has a weight above 0; both have the same shape."""
    # `where`, since padding may have outputs that are not finite.
    return jnp.sum(jnp.where(weight > 0, values, 0.0))


def changed(predictions: Array, reference: Array | None, weight: Array) -> Array:
    """Count the predictions that are not those of the reference; 0 where there is none."""
    if reference is None:
        return jnp.zeros((), jnp.int32)
    return jnp.sum(jnp.where(predictions != reference, weight, 0))


def shapes(outputs: Any, targets: Any) -> str:
    """Say which outputs a batch has, and which targets a split."""
    got = jax.tree.map(lambda leaf: tuple(leaf.shape), outputs)
    return f"outputs of a batch are {got} and targets {targets.dtype} {tuple(targets.shape)}"


def reason(error: Exception) -> str:
    """Return the type of an error and its first line."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].removesuffix(": ")


def check_logits(kind: str, wanted: str, outputs: Any, targets: Any, axes: int) -> None:
    """Check that outputs are floats of so many axes, and targets integers of one axis less.

    Raises:
        ValueError: they are not; both shapes are named, and what is `wanted`.
    """
    fits = getattr(outputs, "ndim", None) == axes and targets.ndim == axes - 1
    fits = fits and outputs.shape[1:-1] == targets.shape[1:]
    if not (fits and _is(outputs, jnp.floating) and _is(targets, jnp.integer)):
        raise ValueError(f"{shapes(outputs, targets)}; {kind} takes {wanted}")


def _is(array: Any, kind: Any) -> bool:
    return jnp.issubdtype(array.dtype, kind)
