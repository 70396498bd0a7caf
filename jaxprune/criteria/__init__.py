"""What a weight is worth: one criterion a function, from parameters to scores.

Higher is more important. A user's own function is lifted by `criterion`. `masks.masks_at` turns
scores and counts into masks; `corrections` also change the weights that stay.
"""

from collections.abc import Callable

from jaxprune import files
from jaxprune.criteria.contract import check_scores as check_scores
from jaxprune.criteria.contract import criterion as criterion
from jaxprune.criteria.contract import problem as problem
from jaxprune.criteria.gradients import fisher as fisher
from jaxprune.criteria.gradients import grasp as grasp
from jaxprune.criteria.gradients import saliency as saliency
from jaxprune.criteria.gradients import snip as snip
from jaxprune.criteria.inputs import ria as ria
from jaxprune.criteria.inputs import wanda as wanda
from jaxprune.criteria.parameters import magnitude as magnitude
from jaxprune.criteria.parameters import random as random
from jaxprune.criteria.parameters import synflow as synflow
from jaxprune.types import Criterion

CRITERIA = {
    f.__name__: f for f in (magnitude, random, synflow, saliency, snip, grasp, fisher, wanda, ria)
}


def resolve(spec: str | Callable | Criterion) -> Criterion:
    """Return the criterion that a name, `module:function` or a function stands for.

    Raises:
        ValueError: there is no such criterion, or it is no function of (params) or of
            (params, problem, batch); one line.
        TypeError: likewise, of a function that is given as such.

    Example:
        >>> resolve("saliency").name
        'saliency'
    """
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
