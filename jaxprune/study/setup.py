"""What a study runs on, made and checked once, before anything is trained.

Network, data, settings and task come in; `programs` compiles what is set up here, `stages` runs it.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import criteria, distribution, files, structure, tasks, trees
from jaxprune.config import SCOPES_OF_SIZES, Arm, Study, sparsity_of_level
from jaxprune.criteria import allocation
from jaxprune.data import Data, Split
from jaxprune.evaluate import check_arrays, check_data
from jaxprune.granularity import named, weight
from jaxprune.masks import keep_all, warn_of_emptied
from jaxprune.networks import check_state
from jaxprune.structure import Compaction
from jaxprune.train import steps_on_host
from jaxprune.types import (
    Batch,
    Correction,
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

_CORRECTED_BATCH = 1000  # examples that corrections run side by side


class Joined(NamedTuple):
    """What a network does, as one function of which `structure` removes units.

    Scoring; or scoring and training, from which a unit is removed where it is without effect in
    both, and the state shrinks with it.

    Attributes:
        apply: of `{"params": …, "state": …}` and `inputs`; it returns the outputs of scoring, and
            where it trains also those of training, and the new state.
        abstract: shapes and dtypes of parameters and state.
        inputs: what it was traced with: x, or x and a key.
        new_state: of what `apply` returns the new values of the state; None where it has none.
    """

    apply: Callable[[Any, Any], Any]
    abstract: Any
    inputs: Any
    new_state: Callable[[Any], Any] | None

    def network(self, plan: Compaction) -> Network:
        """Return what a plan of `apply` leaves, as a network; it cannot be initialised."""
        key = jax.random.key(0)  # scoring draws none

        def init(key: Any) -> Any:
            raise ValueError("a smaller network comes from a larger one and has no `init`")

        def apply(params: Params, state: State, x: Any) -> Any:
            variables = {"params": params, "state": state}
            if self.new_state is None:
                return plan.apply(variables, x)
            return plan.apply(variables, (x, key))[0]

        def train(params: Params, state: State, x: Any, key: Any) -> tuple[Any, State]:
            if self.new_state is None:
                return apply(params, state, x), state
            return plan.apply({"params": params, "state": state}, (x, key))[1:]

        return Network(init, apply, train)


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
        scopes: by name, what `distribution.counts` takes.
        prunable: a tree of bools like the parameters.
        scoring: the network as it scores, for `structure`.
        joined: scoring and training; the same where they are one function.
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
    criteria: dict[str, Criterion | Correction]
    granularities: dict[str, Granularity]
    scopes: dict[str, Any]
    prunable: Any
    scoring: Joined
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

    def scores(self, criterion: str, params: Params, state: State, batch: Batch) -> Scores:
        """Return what a criterion says of one network, checked; traceable."""
        asked, method = criteria.problem(self.network, self.task, state), self.criteria[criterion]
        assert isinstance(method, Criterion)
        found = method.scores(params, asked, batch)
        criteria.check_scores(found, params, criterion)
        return found

    def counts(self, arm: Arm, sparsities: Sequence[Any], *of: Any) -> Counts:
        """Return the counts of some sparsities, with a levels axis.

        Args:
            arm: says granularity and scope, and the scores that a scope may ask for.
            sparsities: fractions.
            of: parameters, state and batch, at which scopes may look.
        """
        options: dict[str, Any] = {"granularity": self.granularities[arm.granularity],
                                   "scope": self.scopes[arm.scope]}  # fmt: skip
        if not of or arm.scope in SCOPES_OF_SIZES:
            return distribution.counts(self.params, sparsities, **options)
        params, state, batch = of
        asked = criteria.problem(self.network, self.task, state)
        decides, scores = self.criteria[arm.criterion].scores, None
        if decides is not None:
            scores = jax.jit(lambda params, batch: decides(params, asked, batch))(params, batch)
        return distribution.counts(
            params, sparsities, **options, problem=asked, batch=batch, scores=scores
        )

    def corrected(
        self, method: Correction, params: Params, state: State, batch: Batch, counts: Counts
    ) -> tuple[Params, Masks]:
        """Return what a correction makes of one network, with a levels axis."""
        asked, n = criteria.problem(self.network, self.task, state), len(batch.y)
        size = min(n, _CORRECTED_BATCH)
        batches = [
            Batch(batch.x[i : i + size], batch.y[i : i + size], batch.key)
            for i in range(0, n - size + 1, size)
        ]
        return method.prune(params, asked, counts, batches)

    def batch(self, key: Key) -> Batch:
        """Draw the training examples that criteria look at, at most all of them."""
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
        data: the splits, as NumPy arrays; plain tuples will do.
        study: the settings.
        task: None for what the targets suggest; see `tasks.default_task`.
        optimizer: None for Adam with step size 1e-3.
        params: the parameters, or their shapes and dtypes.
        state: the network's state, likewise.

    Raises:
        ValueError: what does not fit; one line that names it.
        TypeError: likewise.
    """
    data = Data(*(Split(*split) for split in data))
    check_arrays(data)
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
    scoring, together = _joined(network, params, state, x)
    prunable = _prunable(network, params, state, x)

    def granularity(name: str) -> Granularity:
        if name == "unit":
            return _units(together, prunable, state)
        if name == "weight":
            return weight(prunable)
        return named(name, prunable, _layers(scoring))

    setup = Setup(
        study=study,
        network=network,
        task=task,
        optimizer=optimizer or optax.adam(1e-3),
        data=jax.tree.map(jnp.asarray, data),
        criteria=dict(zip(names, resolved, strict=True)),
        granularities={name: granularity(name) for name in study.granularities},
        scopes={name: _scope(name) for name in study.scopes},
        prunable=prunable,
        scoring=scoring,
        joined=together,
        metrics=task.metrics(jax.eval_shape(network.apply, params, state, x)),
        remaining=_remaining(together, state),
        stepped=steps_on_host(network, params, state, x),
        params=together.abstract["params"],
    )
    if "val_loss" not in [metric.name for metric in setup.metrics]:
        raise ValueError(f"task {task.name} must measure val_loss, the validation loss, too")
    _check_arms(setup)
    return setup


def _check_arms(setup: Setup) -> None:
    """Try every criterion in the abstract, and warn of leaves that a level prunes whole."""
    batch = jax.eval_shape(setup.batch, jax.random.key(0))
    scored = [name for name, each in setup.criteria.items() if isinstance(each, Criterion)]
    for criterion in scored:
        try:
            jax.eval_shape(
                lambda *args, name=criterion: setup.scores(name, *args),
                setup.params, setup.joined.abstract["state"], batch,
            )  # fmt: skip
        except jax.errors.JAXTypeError as error:
            reason = str(error).split("\n")[0]
            raise ValueError(f"criterion {criterion} cannot be traced: {reason}") from error
    targets = [sparsity_of_level(level) for level in setup.study.levels if level]
    for arm in setup.arms:
        if arm.scope in ("global", "by_loss") and setup.criteria[arm.criterion].scores is None:
            raise ValueError(
                f"scope {arm.scope} compares layers by scores, and {arm.criterion} has none "
                "beforehand: use layer, erk or owl"
            )
        if arm.scope == "owl" and arm.granularity == "unit":
            raise ValueError("scope owl shares weights out among leaves, and units are of several")
    known = [arm for arm in setup.arms if arm.scope in SCOPES_OF_SIZES]
    by_counts = {(arm.granularity, arm.scope): arm for arm in known} if targets else {}
    for arm in by_counts.values():
        counts = setup.counts(arm, targets)
        warn_of_emptied(setup.params, counts, setup.granularities[arm.granularity])


def _scope(name: str) -> Any:
    """Return what `distribution.counts` takes for the name of a scope."""
    asking = {"owl": allocation.owl, "by_loss": allocation.by_loss}
    if name in asking:
        return asking[name]
    return files.import_function(name) if ":" in name else name


def _layers(scoring: Joined) -> tuple[structure.Layer, ...]:
    """Return the layers of a network, by the paths that users know."""
    found = structure.layers(scoring.apply, scoring.abstract, scoring.inputs)
    return tuple(layer._replace(path=layer.path.removeprefix("params/")) for layer in found)


def _scoring(network: Network) -> Callable[[Any, Any], Any]:
    return lambda variables, x: network.apply(variables["params"], variables["state"], x)


def _joined(network: Network, params: Params, state: State, x: Any) -> tuple[Joined, Joined]:
    """Return scoring, and scoring with training where tracing tells that this is another."""
    abstract = jax.eval_shape(lambda tree: tree, {"params": params, "state": state})
    key, scoring = jax.random.key(0), _scoring(network)

    def both(variables: Any, inputs: Any) -> Any:
        outputs, state = network.train(variables["params"], variables["state"], *inputs)
        return scoring(variables, inputs[0]), outputs, state

    def training(variables: Any, x: Any) -> Any:
        return network.train(variables["params"], variables["state"], x, key)[0]

    alone = Joined(scoring, abstract, x, None)
    if not jax.tree.leaves(state):
        one, other = (str(jax.make_jaxpr(f)(abstract, x)) for f in (scoring, training))
        if one == other:
            return alone, alone
    return alone, Joined(both, abstract, (x, key), lambda out: {"state": out[2]})


def _prunable(network: Network, params: Params, state: State, x: Any) -> Any:
    """Return which leaves take part, as a tree of bools."""
    chosen = network.prunable
    if chosen is None:
        variables = {"params": params, "state": state}
        chosen = structure.prunable(_scoring(network), variables, x)["params"]
    flags = trees.prunable_leaves(params, chosen)
    if not any(flags):
        paths = [path for path, _ in trees.paths_and_leaves(params)]
        listed = ", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if paths[8:] else "")
        raise ValueError(
            "no leaf of the parameters can be pruned: none is the kernel of a product before the "
            f"last layer; choose by network(..., prunable=...) among {listed or 'none'}"
        )
    return jax.tree.unflatten(jax.tree.structure(params), flags)


def _units(together: Joined, prunable: Prunable, state: State) -> Granularity:
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
    whole = keep_all(state)
    return lambda masks: count({"params": masks, "state": whole})
