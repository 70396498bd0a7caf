"""Networks as values of one shape: functions lifted, Flax modules wrapped, small standard ones.

A `Network` (`types`) goes on to training, criteria, evaluation and the study.
"""

from jaxprune.networks.lift import as_network, check_state, network
from jaxprune.networks.modules import linen, nnx
from jaxprune.networks.small import NETWORKS, Example, mlp, resolve

__all__ = [
    "NETWORKS",
    "Example",
    "as_network",
    "check_state",
    "linen",
    "mlp",
    "network",
    "nnx",
    "resolve",
]
