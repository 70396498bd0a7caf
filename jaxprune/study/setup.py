"""What a study runs on, made and checked once, before anything is trained.

Network, data, settings and task come in; `programs` compiles what is set up here, `stages` runs it.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxprune import criteria, distribution, structure, tasks, trees
from jaxprune.config import Arm, Study, sparsity_of_level
from jaxprune.data import Data
from jaxprune.evaluate import check_data
from jaxprune.granularity import weight
from jaxprune.masks import warn_of_emptied
from jaxprune.networks import check_state
from jaxprune.study.joined import Joined, joined, scoring
from jaxprune.types import (
    Batch,
    Counts,
    Criterion,
    Granularity,
    Key,
    Masks,
    Metric,
    Network,
    Params,
    Prunable,
    Scores,
    State,
    Task,
)

_SLOWER_INSIDE = 1.5  # how much slower a compiled loop must run to be made on the host instead
_MEASURED = 16  # examples with which that is measured


class Setup(NamedTuple):
    """A study with all that it needs.

    Attributes:
        study: the settings.
        network: what is pruned.
        task: what it is for.
        optimizer: trains it.
        data: the splits, on the device.
        criteria: by name, in the order given.
        granularities: by name.
        prunable: a tree of bools like the parameters.
        joined: the network as one function, for `structure`.
        metrics: what the task measures.
        remaining: counts the parameters left once what masks leave without effect is removed.
        stepped: whether loops over steps, batches and levels run on the host.
        params: shapes and dtypes of the parameters.
    """

    study: Study
    network: Network
    task: Task
    optimizer: optax.GradientTransformation
    data: Data
    criteria: dict[str, Criterion]
    granularities: dict[str, Granularity]
    prunable: Any
    joined: Joined
    metrics: tuple[Metric, ...]
    remaining: Callable[[Masks], int]
    stepped: bool
    params: Params

    @property
    def flags(self) -> list[bool]:
        """Whether each leaf takes part, in flatten order."""
        return jax.tree.leaves(self.prunable)

    @property
    def arms(self) -> tuple[Arm, ...]:
        """All arms, in the order in which they run."""
        return self.study.arms(tuple(self.criteria))

    def scores(self, arm: Arm, params: Params, state: State, batch: Batch) -> Scores:
        """Return what an arm's criterion says of one network, checked; traceable."""
        criterion = self.criteria[arm.criterion]
        asked = criteria.problem(self.network, self.task, state)
        found = criterion.scores(params, asked, batch)
        criteria.check_scores(found, params, criterion.name)
        return found

    def counts(self, arm: Arm, sparsities: Sequence[Any]) -> Counts:
        """Return the counts of some sparsities, with a levels axis."""
        granularity = self.granularities[arm.granularity]
        return distribution.counts(
            self.params, sparsities, granularity=granularity, scope=arm.scope
        )

    def batch(self, key: Key) -> Batch:
        """Draw the training examples that criteria look at."""
        choose, own = jax.random.split(key)
        x, y = self.data.train
        chosen = jax.random.permutation(choose, len(y))[: self.study.score_batch]
        return Batch(x[chosen], y[chosen], own)


def make_setup(
    network: Network,
    data: Data,
    study: Study,
    task: Task | None,
    optimizer: optax.GradientTransformation | None,
    params: Params,
    state: State,
) -> Setup:
    """Check everything against everything, and trace the network.

    Args:
        network: what is pruned.
        data: the splits, as NumPy arrays.
        study: the settings.
        task: None for what the targets suggest; see `tasks.default_task`.
        optimizer: None for Adam with step size 1e-3.
        params: the parameters, or their shapes and dtypes.
        state: the network's state, likewise.

    Raises:
        ValueError: what does not fit; one line that names it.
        TypeError: likewise.
    """
    task = tasks.resolve(task) if task is not None else tasks.default_task(data.train.y)
    check_data(network, params, state, data, task)
    x = data.train.x[:2]
    check_state(network, params, state, x)
    resolved = [criteria.resolve(given) for given in study.criteria]
    names = [criterion.name for criterion in resolved]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"two criteria are named {twice[0]!r}: give names, jp.criterion(my_scores, name='mine')"
        )
    together = joined(network, params, state, x)
    prunable = _prunable(network, params, state, x)
    units: Any = "unit" in study.granularities and _units(together, prunable, params, state)
    granularities = {"weight": weight(prunable), "unit": units}
    setup = Setup(
        study=study,
        network=network,
        task=task,
        optimizer=optimizer or optax.adam(1e-3),
        data=jax.tree.map(jnp.asarray, data),
        criteria={criterion.name: criterion for criterion in resolved},
        granularities={name: granularities[name] for name in study.granularities},
        prunable=prunable,
        joined=together,
        metrics=task.metrics(jax.eval_shape(network.apply, params, state, x)),
        remaining=_remaining(together, state),
        stepped=_steps_on_host(network, params, state, x),
        params=jax.eval_shape(lambda tree: tree, params),
    )
    if "val_loss" not in [metric.name for metric in setup.metrics]:
        raise ValueError(f"task {task.name} must measure val_loss, the validation loss, too")
    _check_arms(setup)
    return setup


def _check_arms(setup: Setup) -> None:
    """Try every criterion in the abstract, and warn of leaves that a level prunes whole."""
    abstract = jax.eval_shape(setup.batch, jax.random.key(0))
    state = setup.joined.abstract["state"]
    for criterion in setup.criteria:
        arm = Arm(criterion, *setup.arms[0][1:])
        try:
            jax.eval_shape(
                lambda *args, arm=arm: setup.scores(arm, *args), setup.params, state, abstract
            )
        except jax.errors.JAXTypeError as error:
            reason = str(error).split("\n")[0]
            raise ValueError(f"criterion {criterion} cannot be traced: {reason}") from error
    targets = [sparsity_of_level(level) for level in setup.study.levels if level]
    seen = {arm[1:3]: arm for arm in setup.arms}
    for arm in seen.values() if targets else ():
        counts = setup.counts(arm, targets)
        warn_of_emptied(setup.params, counts, setup.granularities[arm.granularity])


def _prunable(network: Network, params: Params, state: State, x: Any) -> Any:
    """Return which leaves take part, as a tree of bools."""
    chosen = network.prunable
    if chosen is None:
        variables = {"params": params, "state": state}
        chosen = structure.prunable(scoring(network), variables, x)["params"]
    flags = trees.prunable_leaves(params, chosen)
    if not any(flags):
        paths = [path for path, _ in trees.paths_and_leaves(params)]
        listed = ", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if paths[8:] else "")
        raise ValueError(
            "no leaf of the parameters can be pruned: none is the kernel of a product before the "
            f"last layer; choose by network(..., prunable=...) among {listed or 'none'}"
        )
    return jax.tree.unflatten(jax.tree.structure(params), flags)


def _units(together: Joined, prunable: Prunable, params: Params, state: State) -> Granularity:
    """Return the units of the dependency graph, as a granularity of the parameters alone."""
    graph = structure.dependency_graph(
        together.apply, together.abstract, together.inputs, state=together.new_state
    )
    kept_out = jax.tree.map(lambda _: False, state)
    found = structure.group(graph, {"params": prunable, "state": kept_out})
    if not jax.tree.leaves(found.cost(together.abstract)):
        raise ValueError(
            "no units of the network can be pruned: print(jp.dependency_graph(apply, params, x)) "
            "shows the reasons; --granularities weight leaves them out"
        )
    # Of the state only shapes are read.
    blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), together.abstract["state"])

    def both(tree: Any) -> Any:
        return {"params": tree, "state": blank}

    def short(pieces: Any) -> Any:  # named by the paths that users know
        return OrderedDict((name.removeprefix("params/"), x) for name, x in pieces.items())

    def spread(kept: Any, params: Params) -> Masks:
        whole = OrderedDict((f"params/{name}", x) for name, x in kept.items())
        return found.spread(whole, both(params))["params"]

    return found._replace(
        rank=lambda scores: short(found.rank(both(scores))),
        cost=lambda params: short(found.cost(both(params))),
        spread=spread,
    )


def _remaining(together: Joined, state: State) -> Callable[[Masks], int]:
    """Return what counts the parameters left; of the state nothing is counted."""
    count = structure.remaining(
        together.apply,
        together.abstract,
        together.inputs,
        state=together.new_state,
        counted=lambda path: path.startswith("params"),
    )
    whole = jax.tree.map(lambda leaf: np.ones(np.shape(leaf), bool), state)
    return lambda masks: count({"params": masks, "state": whole})


def _steps_on_host(network: Network, params: Params, state: State, x: Any) -> bool:
    """Measure whether training would be slower inside of a compiled loop.

    On a CPU, XLA computes gradients of convolutions some ten times slower inside of a loop than
    outside (jax 0.10). Those of the largest convolution of the network are computed both ways.
    """
    if jax.default_backend() != "cpu":
        return False
    some = jax.ShapeDtypeStruct((_MEASURED, *x.shape[1:]), x.dtype)
    found = list(_convolutions(jax.make_jaxpr(network.apply)(params, state, some).jaxpr))
    if not found:
        return False
    largest = max(found, key=lambda eqn: eqn.outvars[0].aval.size * eqn.invars[1].aval.size)
    ones = [jnp.ones(operand.aval.shape, operand.aval.dtype) for operand in largest.invars]

    def gradients(operands: Any) -> Any:
        out, pull = jax.vjp(lambda *xs: largest.primitive.bind(*xs, **largest.params), *operands)
        return list(pull(out))

    def inside(operands: Any, times: Any) -> Any:
        return jax.lax.fori_loop(0, times, lambda _, operands: gradients(operands), operands)

    def seconds(f: Callable, *args: Any) -> float:
        jax.block_until_ready(f(*args))
        times = []
        for _ in range(3):
            started = time.perf_counter()
            jax.block_until_ready(f(*args))
            times.append(time.perf_counter() - started)
        return min(times)

    alone = seconds(jax.jit(gradients), ones)
    return seconds(jax.jit(inside), ones, jnp.int32(1)) > _SLOWER_INSIDE * alone


def _convolutions(jaxpr: Any) -> Iterator[Any]:
    """Yield the convolutions of a program and of those that it calls."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated" and all(
            jnp.issubdtype(operand.aval.dtype, jnp.floating) for operand in eqn.invars
        ):
            yield eqn
        for value in jax.tree.leaves(
            eqn.params, is_leaf=lambda leaf: isinstance(leaf, ClosedJaxpr | Jaxpr)
        ):
            inner = value.jaxpr if isinstance(value, ClosedJaxpr) else value
            if isinstance(inner, Jaxpr):
                yield from _convolutions(inner)
