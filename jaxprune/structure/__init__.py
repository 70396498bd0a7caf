"""Networks that really shrink: the dependency graph of a traced program, and exact compaction.

`dependency_graph` tells which axes of which parameters belong together, `group_masks` prunes their
units, and `compact` removes what masks leave without effect. Next come `train` and `sparse`.
"""

from jaxprune.structure.compaction import Compaction as Compaction
from jaxprune.structure.compaction import compact as compact
from jaxprune.structure.compaction import compaction as compaction
from jaxprune.structure.graph import Graph as Graph
from jaxprune.structure.graph import Group as Group
from jaxprune.structure.graph import Member as Member
from jaxprune.structure.graph import dependency_graph as dependency_graph
from jaxprune.structure.units import group_masks as group_masks
