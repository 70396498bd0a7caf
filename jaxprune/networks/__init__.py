"""Networks as values of one shape: functions lifted, Flax modules wrapped, small standard ones.

A `Network` (`types`) goes on to training, criteria, evaluation and the study. What needs Flax is
imported when it is asked for, so that functions are pruned without it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxprune.networks.lift import as_network, check_state, needs_state, network

if TYPE_CHECKING:
    from jaxprune.networks.modules import linen, nnx
    from jaxprune.networks.small import NETWORKS, Example, mlp, resolve

_HOME = {
    "linen": "modules", "nnx": "modules",
    "NETWORKS": "small", "Example": "small", "mlp": "small", "resolve": "small",
}  # fmt: skip

__all__ = [
    "NETWORKS",
    "Example",
    "as_network",
    "check_state",
    "linen",
    "mlp",
    "needs_state",
    "network",
    "nnx",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
