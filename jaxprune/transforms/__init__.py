"""Sparse training as optax transformations: one wrapper, and rules that say what is kept when.

Schedules and any optax optimizer come in, parameters with exact zeros go out; `train` and loops of
one's own use them alike.
"""

from jaxprune.transforms.pruning import gradual as gradual
from jaxprune.transforms.pruning import static as static
from jaxprune.transforms.pruning import ste as ste
from jaxprune.transforms.regrowing import rigl as rigl
from jaxprune.transforms.regrowing import set as set
from jaxprune.transforms.rule import Rule as Rule
from jaxprune.transforms.rule import Seen as Seen
from jaxprune.transforms.sparsify import SparsifyState as SparsifyState
from jaxprune.transforms.sparsify import forward as forward
from jaxprune.transforms.sparsify import masks_of as masks_of
from jaxprune.transforms.sparsify import sparsify as sparsify
from jaxprune.transforms.sparsify import update_masks as update_masks
