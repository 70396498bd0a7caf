"""Networks that really shrink: the dependency graph of a traced program, and exact compaction.

`layers` tells which leaves are the weights of products, `dependency_graph` which axes belong
together, `group` prunes their units as one, and `compact` removes what masks leave without effect.
Next come `train` and `sparse`.
"""

from jaxprune.structure.compaction import Compaction as Compaction
from jaxprune.structure.compaction import compact as compact
from jaxprune.structure.compaction import compaction as compaction
from jaxprune.structure.graph import Graph as Graph
from jaxprune.structure.graph import Group as Group
from jaxprune.structure.graph import Member as Member
from jaxprune.structure.graph import dependency_graph as dependency_graph
from jaxprune.structure.inputs import layer_inputs as layer_inputs
from jaxprune.structure.layers import Layer as Layer
from jaxprune.structure.layers import layers as layers
from jaxprune.structure.layers import prunable as prunable
from jaxprune.structure.removal import remaining as remaining
from jaxprune.structure.units import group as group
from jaxprune.structure.units import group_masks as group_masks
