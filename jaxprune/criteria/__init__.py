"""What a weight is worth: one criterion a function, from parameters to scores.

Higher is more important. A user's own function is lifted by `criterion`. `masks.masks_at` turns
scores and counts into masks; `corrections` also change the weights that stay.
"""

from collections.abc import Callable

from jaxprune import files
from jaxprune.criteria.contract import check_scores as check_scores
from jaxprune.criteria.contract import criterion as criterion
from jaxprune.criteria.contract import problem as problem
from jaxprune.criteria.corrections import alps as alps
from jaxprune.criteria.corrections import by_scores as by_scores
from jaxprune.criteria.corrections import obs as obs
from jaxprune.criteria.corrections import refit as refit
from jaxprune.criteria.gradients import fisher as fisher
from jaxprune.criteria.gradients import grasp as grasp
from jaxprune.criteria.gradients import saliency as saliency
from jaxprune.criteria.gradients import snip as snip
from jaxprune.criteria.inputs import ria as ria
from jaxprune.criteria.inputs import wanda as wanda
from jaxprune.criteria.parameters import magnitude as magnitude
from jaxprune.criteria.parameters import random as random
from jaxprune.criteria.parameters import synflow as synflow
from jaxprune.criteria.units import reconstruction as reconstruction
from jaxprune.structure.graph import Graph
from jaxprune.types import Correction, Criterion, Granularity

CRITERIA = {
    f.__name__: f for f in (magnitude, random, synflow, saliency, snip, grasp, fisher, wanda, ria)
}
CORRECTIONS = {"obs": obs, "alps": alps}


def resolve(spec: str | Callable | Criterion | Correction) -> Criterion | Correction:
    """Return the criterion that a name, `module:function` or a function stands for.

    A `Correction` is returned as it is.

    Raises:
        ValueError: there is no such criterion, or it is no function of (params) or of
            (params, problem, batch); one line.
        TypeError: likewise, of a function that is given as such.

    Example:
        >>> resolve("saliency").name
        'saliency'
    """
    if isinstance(spec, Correction):
        return spec
    if not isinstance(spec, str):
        return criterion(spec)
    if spec in CRITERIA:
        return criterion(CRITERIA[spec])
    if ":" not in spec:
        raise ValueError(
            f"criterion must be one of {', '.join(CRITERIA)}, or module:function, got {spec!r}"
        )
    try:
        return criterion(files.import_function(spec, Criterion))
    except TypeError as error:
        raise ValueError(f"criterion {spec!r}: {error}") from error


def method(
    spec: str,
    *,
    granularity: Granularity | None = None,
    graph: Graph | None = None,
) -> Correction:
    """Return the method of pruning that a name stands for.

    Args:
        spec: `obs` and `alps`, of weights; `reconstruction`, of units; or what `resolve` takes,
            which corrects nothing. With `+refit` at the end, layers are fitted to what it keeps.
        granularity: of criteria, what is pruned as one; by default `granularity.weight()`.
        graph: of `reconstruction`, what `dependency_graph` returns.

    Raises:
        ValueError: there is no such method, or it is not of this granularity; one line.

    Example:
        >>> method("magnitude+refit").name
        'magnitude+refit'
    """
    name, plus, _ = spec.rpartition("+refit")
    if plus and spec.endswith("+refit"):
        return refit(method(name, granularity=granularity, graph=graph))
    if spec in CORRECTIONS:
        if granularity is not None and granularity.name != "weight":
            raise ValueError(f"{spec} prunes weights, not by {granularity.name}")
        return CORRECTIONS[spec]()
    if spec == "reconstruction":
        if graph is None:
            raise ValueError("reconstruction prunes units of a dependency graph: give one")
        return reconstruction(graph, granularity=granularity)
    found = resolve(spec)
    return found if isinstance(found, Correction) else by_scores(found, granularity=granularity)
