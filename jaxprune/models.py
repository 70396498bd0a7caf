"""The Flax modules. Nothing below this module sees more than `init(key)` and `apply(params, x)`."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxprune.types import Apply, Array, Masks, Params


class MLP(nn.Module):
    """A ReLU network without biases: `hidden_0`, `hidden_1`, …, `logits`.

    Attributes:
        hidden_sizes: units of the hidden layers.
        classes: units of the output layer.
    """

    hidden_sizes: Sequence[int]
    classes: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return logits, (batch, classes), of inputs, (batch, features)."""
        for i, size in enumerate(self.hidden_sizes):
            x = nn.relu(nn.Dense(size, use_bias=False, name=f"hidden_{i}")(x))
        return nn.Dense(self.classes, use_bias=False, name="logits")(x)


def mlp(
    features: int, hidden_sizes: Sequence[int], classes: int
) -> tuple[Callable[[Array], Params], Apply]:
    """Return `init(key) -> params` and `apply(params, x) -> logits` of an `MLP`.

    The kernels, (inputs, outputs) float32, start from Flax's default, LeCun normal.
    """
    model = MLP(tuple(hidden_sizes), classes)

    def init(key: Array) -> Params:
        return model.init(key, jnp.zeros((1, features)))["params"]

    def apply(params: Params, x: Array) -> Array:
        return model.apply({"params": params}, x)  # pyright: ignore[reportReturnType]

    return init, apply


def mlp_remaining(masks: Masks) -> int:
    """Count an `MLP`'s weights left once pruned units are removed with their outgoing weights.

    A unit is pruned if none of its incoming weights is kept. What counts is a kept weight that
    comes from a unit which is not.

    Args:
        masks: masks of an `MLP`'s parameters, concrete.
    """
    order = [f"hidden_{i}" for i in range(len(masks) - 1)] + ["logits"]
    remaining, alive = 0, None
    for name in order:
        mask = np.asarray(masks[name]["kernel"])
        mask = mask if alive is None else mask[alive]
        remaining += int(np.count_nonzero(mask))
        alive = mask.any(axis=0)
    return remaining
