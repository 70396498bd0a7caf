"""The shared names of trees and results; every other module imports from here."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from jaxtyping import Array, Float, PyTree

from jaxprune.config import Granularity as Granularity

Params = PyTree[Any]
"""Network parameters: any nested dict, list or tuple of arrays."""

Scores = PyTree[Any]
"""The tree of the parameters, a score an element; higher is more important."""

Counts = Any
"""How many are pruned, int32: a leaf each (scope layer) or one array (scope global)."""

Masks = PyTree[Any]
"""The tree of the parameters, bool; True is kept. Total: what is not prunable is all True."""

Apply = Callable[[Params, Any], Array]
"""`apply(params, x) -> logits`, with logits of shape (batch, classes)."""

Prunable = Callable[[str, Any], bool]
"""`prunable(path, leaf)`: whether a leaf takes part; a path reads `hidden_0/kernel`."""

Scope = Literal["layer", "global"]


class Metrics(NamedTuple):
    """What is measured of a network; every field may carry leading axes such as levels.

    All on test examples, but for the temperature and the last two, which are on validation.
    Losses are in nats, the rest but the temperature are fractions.
    """

    accuracy: Float[Array, "*axes"]
    loss: Float[Array, "*axes"]
    ece: Float[Array, "*axes"]
    signed_ece: Float[Array, "*axes"]
    temperature: Float[Array, "*axes"]
    scaled_loss: Float[Array, "*axes"]
    churn: Float[Array, "*axes"]
    class_accuracy: Float[Array, "*axes classes"]
    worst_class_accuracy: Float[Array, "*axes"]
    val_accuracy: Float[Array, "*axes"]
    val_loss: Float[Array, "*axes"]
