"""What a weight is worth: one criterion a function, from parameters to scores.

Higher is more important. A user's own function is lifted by `criterion`. `masks.masks_at` turns
scores and counts into masks; `corrections` also change the weights that stay.
"""

import re
from collections.abc import Callable

from jaxprune import files
from jaxprune.criteria.contract import check_scores as check_scores
from jaxprune.criteria.contract import criterion as criterion
from jaxprune.criteria.contract import problem as problem
from jaxprune.criteria.corrections import alps as alps
from jaxprune.criteria.corrections import by_scores as by_scores
from jaxprune.criteria.corrections import obs as obs
from jaxprune.criteria.corrections import refit as refit
from jaxprune.criteria.fisher import fisher_obs as fisher_obs
from jaxprune.criteria.gradients import fisher as fisher
from jaxprune.criteria.gradients import grasp as grasp
from jaxprune.criteria.gradients import saliency as saliency
from jaxprune.criteria.gradients import snip as snip
from jaxprune.criteria.inputs import ria as ria
from jaxprune.criteria.inputs import wanda as wanda
from jaxprune.criteria.layerwise import layer_errors as layer_errors
from jaxprune.criteria.parameters import l1 as l1
from jaxprune.criteria.parameters import magnitude as magnitude
from jaxprune.criteria.parameters import random as random
from jaxprune.criteria.parameters import synflow as synflow
from jaxprune.criteria.units import activation as activation
from jaxprune.criteria.units import reconstruction as reconstruction
from jaxprune.criteria.units import taylor2 as taylor2
from jaxprune.structure.graph import Graph
from jaxprune.types import Correction, Criterion, Granularity

CRITERIA = {
    f.__name__: f
    for f in (magnitude, l1, random, synflow, saliency, snip, grasp, fisher, wanda, ria)
}
CORRECTIONS = {"obs": obs, "alps": alps, "fisher_obs": fisher_obs}
OF_UNITS = {"reconstruction": reconstruction, "activation": activation, "taylor2": taylor2}


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
        spec: one of `CORRECTIONS`, of weights; of `OF_UNITS`, of units; or what `resolve` takes,
            which corrects nothing. With `+refit` at the end, layers are fitted to what it keeps;
            with such as `*10` before that, criteria and `fisher_obs` prune in ten steps.
        granularity: of what the counts are; by default `granularity.weight()`.
        graph: of units, what `dependency_graph` returns.

    Raises:
        ValueError: there is no such method, or it is not of this granularity; one line.

    Example:
        >>> method("magnitude*10+refit").name
        'magnitude(steps=10)+refit'
    """
    name, plus, _ = spec.rpartition("+refit")
    if plus and spec.endswith("+refit"):
        return refit(method(name, granularity=granularity, graph=graph))
    name, steps = (found[1], int(found[2])) if (found := re.fullmatch(r"(.+)\*(\d+)", spec)) else (
        spec, 1
    )  # fmt: skip
    kind, windows = ("weight", None) if granularity is None else (
        granularity.name, granularity.within
    )  # fmt: skip
    if spec in ("obs", "alps"):
        if kind != "weight" and windows is None:
            raise ValueError(f"{spec} prunes weights, or n of m, not by {kind}")
        return CORRECTIONS[spec](n_m=windows)
    if name == "fisher_obs":
        return fisher_obs(granularity=granularity, steps=steps)
    if spec in OF_UNITS:
        if graph is None:
            raise ValueError(f"{spec} prunes units of a dependency graph: give one")
        return OF_UNITS[spec](graph, granularity=granularity)
    found = resolve(name)
    if isinstance(found, Correction):
        return found
    return by_scores(found, granularity=granularity, steps=steps)
