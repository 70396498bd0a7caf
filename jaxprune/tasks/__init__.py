"""Tasks: what a network is trained for, and how good it is at it.

A task is chosen by name, by a loss of one's own, or by what targets look like. `train` minimises
`mean_loss`; `evaluate` adds a task's sums up and finishes them into named metrics, of which `loss`
is what training minimises, on test, and `val_loss` the same on validation, whatever the task.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxprune import files
from jaxprune.tasks.classify import classification as classification
from jaxprune.tasks.regress import own_loss as own_loss
from jaxprune.tasks.regress import regression as regression
from jaxprune.tasks.sums import reason as reason
from jaxprune.tasks.sums import shapes as shapes
from jaxprune.tasks.text import tokens as tokens
from jaxprune.types import Array, Outputs, Targets, Task

TASKS: dict[str, Callable[[], Task]] = {
    "classification": classification,
    "tokens": tokens,
    "regression": regression,
}


def mean_loss(task: Task, outputs: Outputs, targets: Targets) -> Array:
    """Return what training minimises of a batch, (): sum(losses) / sum(weights); 0 of no weight."""
    losses, weights = task.loss(outputs, targets)
    weight = jnp.sum(weights)
    return jnp.sum(losses) / jnp.where(weight > 0, weight, 1)


def resolve(spec: str | Task | Callable) -> Task:
    """Return the task of a name, of a loss of one's own, or the task that is given.

    Args:
        spec: `classification`, `tokens`, `regression`; `my_module:my_loss`, or that function
            itself, which becomes `own_loss(my_loss)`; or a `Task`.

    Raises:
        ValueError: there is no such task, or the function cannot be imported.

    Example:
        >>> resolve("tokens").name
        'tokens'
    """
    if isinstance(spec, Task):
        return spec
    if callable(spec):
        return own_loss(spec)
    if ":" in spec:
        return own_loss(files.import_function(spec), spec)
    if spec not in TASKS:
        raise ValueError(
            f"there is no task {spec!r}: it is one of {', '.join(TASKS)}, or my_module:my_loss"
        )
    return TASKS[spec]()


def default_task(y: Any) -> Task:
    """Return the task that targets look like.

    Args:
        y: targets of a split: floats (n, ...) for regression, integers (n,) for classification,
            integers (n, T) for tokens.

    Raises:
        ValueError: they look like none of these.
    """
    if jnp.issubdtype(y.dtype, jnp.floating):
        return regression()
    if jnp.issubdtype(y.dtype, jnp.integer) and y.ndim in (1, 2):
        return classification() if y.ndim == 1 else tokens()
    raise ValueError(
        f"targets are {y.dtype} {tuple(y.shape)}: no task takes them by default, so name one, or "
        "give floats (n, ...), integers (n,) or integers (n, T)"
    )
