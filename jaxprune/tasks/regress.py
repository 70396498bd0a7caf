"""Regression, and a loss of the user's own: numbers to come close to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.tasks import sums
from jaxprune.types import Array, Metric, Outputs, Targets, Task


class Sums(NamedTuple):
    """Sums over examples; those of two batches add up field by field.

    A variance from Σy² − (Σy)²/n has no digits left where the mean is large beside the spread. So
    targets are summed as y − c, with c the mean of the validation targets: near the mean of the
    test targets, which is all that it takes, and the result does not depend on it.
    """

    count: Array  # int32
    loss: Array  # of the squared error, averaged over an example's outputs
    absolute: Array  # of the absolute error, likewise
    shifted: Array  # (outputs,), of y − c
    shifted_squares: Array  # of (y − c)², averaged over an example's outputs


class _LossSums(NamedTuple):
    count: Array
    loss: Array


def regression() -> Task:
    r"""Return the task of predicting numbers.

    Outputs and targets have the same shape, (batch, ...). The loss of an example is its squared
    error, averaged over its outputs; `loss` is its mean over the test split, the mean squared
    error, and `val_loss` that of the validation split. `mae` is the mean absolute error, and
    `r2` $= 1 - \sum_{ij} (y_{ij} - f_{ij})^2 / \sum_{ij} (y_{ij} - \bar y_j)^2$, with the mean of
    each output j over the test split: 0 for who knows these means and nothing else, NaN where the
    targets do not vary.

    Example:
        >>> task = regression()
        >>> losses, _ = task.loss(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 4.0]]))
        >>> losses.tolist()
        [2.0]
    """
    return Task(
        name="regression",
        loss=_loss,
        fit=_mean_targets,
        predict=None,
        sums=_sums,
        finish=_finish,
        metrics=_metrics,
        check=_check,
    )


def own_loss(f: Callable[[Outputs, Targets], Array], name: str | None = None) -> Task:
    """Return the task of a user's own loss, which is all that is measured.

    Args:
        f: `f(outputs, targets) -> losses`, (batch,), one an example; lower is better. Traceable;
            an example's loss depends on that example alone.
        name: of the task; by default that of the function.

    Example:
        >>> task = own_loss(lambda outputs, targets: abs(outputs - targets).max(axis=1))
        >>> task.loss(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 4.0]]))[0].tolist()
        [2.0]
    """

    def loss(outputs: Outputs, targets: Targets) -> tuple[Array, Array]:
        losses = sums.widened(f(outputs, targets))
        return losses, jnp.ones_like(losses)

    def batch_sums(outputs: Any, targets: Any, weight: Array, *_: None) -> _LossSums:
        return _LossSums(jnp.sum(weight), sums.total(loss(outputs, targets)[0], weight))

    def check(outputs: Any, targets: Any) -> None:
        batch = jax.tree.leaves(outputs)[0].shape[0]
        some = jax.ShapeDtypeStruct((batch, *targets.shape[1:]), jnp.asarray(targets[:1]).dtype)
        try:
            losses = jax.eval_shape(f, outputs, some)
        except Exception as error:
            raise ValueError(
                f"the loss fails: {sums.reason(error)}; {sums.shapes(outputs, targets)}"
            ) from error
        shape, dtype = (getattr(losses, name, None) for name in ("shape", "dtype"))
        if shape != (batch,) or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            got = type(losses).__name__ if dtype is None else f"{dtype} {shape}"
            raise ValueError(
                f"the loss must be floats of shape ({batch},), one an example, got {got}; "
                + sums.shapes(outputs, targets)
            )

    return Task(
        name=name or getattr(f, "__name__", type(f).__name__),
        loss=loss,
        fit=None,
        predict=None,
        sums=batch_sums,
        finish=lambda val, test, _: {"loss": _mean(test), "val_loss": _mean(val)},
        metrics=lambda _: (
            Metric("loss", "test loss", "", "lower", drawn=True),
            Metric("val_loss", "validation loss", "", "lower"),
        ),
        check=check,
    )


def _flat(outputs: Array, targets: Array) -> tuple[Array, Array]:
    """Return both as (batch, outputs), of the same type."""
    outputs = sums.widened(outputs)
    shape = len(outputs), -1
    return outputs.reshape(shape), targets.astype(outputs.dtype).reshape(shape)


def _loss(outputs: Array, targets: Array) -> tuple[Array, Array]:
    f, y = _flat(outputs, targets)
    losses = jnp.mean((f - y) ** 2, axis=1)
    return losses, jnp.ones_like(losses)


def _mean_targets(outputs: Array, targets: Array, weight: Array) -> Array:
    _, y = _flat(outputs, targets)
    return jnp.sum(jnp.where(weight[:, None] > 0, y, 0.0), axis=0) / jnp.sum(weight).astype(y.dtype)


def _sums(outputs: Array, targets: Array, weight: Array, center: Array, reference: None) -> Sums:
    f, y = _flat(outputs, targets)
    shifted = jnp.where(weight[:, None] > 0, y - center[None], 0.0)
    return Sums(
        count=jnp.sum(weight),
        loss=sums.total(jnp.mean((f - y) ** 2, axis=1), weight),
        absolute=sums.total(jnp.mean(jnp.abs(f - y), axis=1), weight),
        shifted=jnp.sum(shifted, axis=0),
        shifted_squares=jnp.sum(jnp.mean(shifted**2, axis=1)),
    )


def _mean(found: Sums | _LossSums) -> Array:
    return found.loss / found.count.astype(found.loss.dtype)


def _finish(val: Sums, test: Sums, center: Array) -> dict[str, Array]:
    examples = test.count.astype(test.loss.dtype)
    squares = test.shifted_squares / examples
    variance = squares - jnp.mean((test.shifted / examples) ** 2)
    # What is no more than the rounding errors of the two is no variance, and may be negative.
    variance = jnp.where(variance > 16 * jnp.finfo(squares.dtype).eps * squares, variance, jnp.nan)
    return {
        "loss": _mean(test),
        "r2": 1 - _mean(test) / variance,
        "mae": test.absolute / examples,
        "val_loss": _mean(val),
    }


def _metrics(outputs: Any) -> tuple[Metric, ...]:
    error: Any = {"unit": "", "better": "lower", "low": 0.0}
    return (
        Metric("loss", "mean squared error", drawn=True, **error),
        Metric("r2", "R²", "", "higher", drawn=True, high=1.0, chance=0.0),
        Metric("mae", "mean absolute error", **error),
        Metric("val_loss", "validation mean squared error", **error),
    )


def _check(outputs: Any, targets: Any) -> None:
    fits = hasattr(outputs, "shape") and outputs.shape[1:] == targets.shape[1:]
    if not (fits and all(jnp.issubdtype(a.dtype, jnp.floating) for a in (outputs, targets))):
        raise ValueError(
            f"{sums.shapes(outputs, targets)}; regression takes floats, of an example's outputs "
            "and of its targets the same shape (labels of classes are integers)"
        )
    if not np.isfinite(targets).all():
        raise ValueError("targets have values that are not finite")
