"""The shared names and contracts; every other module imports from here.

A contract is a NamedTuple of functions, made by a function, as an optax transformation is. Nothing
is inherited and nothing is registered.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, PyTree

Params = PyTree[Any]
"""Network parameters: any nested dict, list or tuple of arrays."""

State = PyTree[Any]
"""What a network keeps besides its parameters, such as running statistics; {} where nothing."""

Key = Array
"""A `jax.random.key`, passed in and used once."""

Outputs = Any
"""What a network returns for a batch; leaves have a leading batch axis."""

Targets = Any
"""What the outputs of a batch are compared with; leaves have a leading batch axis."""

Scores = PyTree[Any]
"""The tree of the parameters, a score an element; higher is more important."""

Pieces = PyTree[Any]
"""What is pruned as one: a tree of arrays (pieces,), of weights a tree like the parameters'."""

Counts = Any
"""How many pieces are pruned, int32: a leaf each (layer), or one array for all (global)."""

Masks = PyTree[Any]
"""The tree of the parameters, bool; True is kept. Total: what is not prunable is all True."""

Apply = Callable[[Params, Any], Outputs]
"""`apply(params, x) -> outputs`, of a network without state."""

Prunable = Any
"""Which leaves take part: a tree of bools like the parameters', or `(path, leaf) -> bool`.

A path reads `hidden_0/kernel`. None stands for all leaves of two axes or more.
"""


class Network(NamedTuple):
    """A network as three pure functions.

    Attributes:
        init: `init(key) -> (params, state)`; the state is {} where there is none.
        apply: `apply(params, state, x) -> outputs`, to score: deterministic, changes nothing.
        train: `train(params, state, x, key) -> (outputs, state)`, to train: dropout and the like
            draw from the key, running statistics are updated.
        prunable: which leaves may be pruned; None: what `structure.prunable` finds, the kernels of
            products but for embeddings and the last layer.
    """

    init: Callable[[Key], tuple[Params, State]]
    apply: Callable[[Params, State, Any], Outputs]
    train: Callable[[Params, State, Any, Key], tuple[Outputs, State]]
    prunable: Prunable = None


class Metric(NamedTuple):
    """What tables and figures are told of a number that a task measures.

    Attributes:
        name: its key in a row's `metrics`.
        label: in words, without the unit, such as `test accuracy`.
        unit: `%` of a fraction, which is shown a hundredfold; `nats` or any other word; or "".
        better: `higher`, `lower`, or "" where neither is.
        drawn: whether it is one of the two that tables and figures show first.
        low: no value is below, None where there is no such bound.
        high: no value is above, likewise.
        chance: the value of a guess that knows nothing, drawn as a line; None where not known.
    """

    name: str
    label: str
    unit: str
    better: str
    drawn: bool = False
    low: float | None = None
    high: float | None = None
    chance: float | None = None


class Task(NamedTuple):
    """What a network is trained for, and how good it is at it.

    Attributes:
        name: such as `classification`.
        loss: `loss(outputs, targets) -> (losses, weights)`, each (batch,); training minimises
            sum(losses) / sum(weights) of the whole batch.
        fit: `fit(outputs, targets, weight) -> fitted`, of all of the validation split, such as a
            temperature; None where nothing is fitted. `weight` is (batch,) int32, 0 for padding.
        predict: `predict(outputs)`, kept of the dense network as the reference of churn; None
            where there is no such thing.
        sums: `sums(outputs, targets, weight, fitted, reference)`, a tree of arrays that adds up
            over batches and devices. `reference` are the dense network's predictions of the batch,
            or None.
        finish: `finish(val_sums, test_sums, fitted) -> {metric: number or short array}`.
        metrics: `metrics(outputs)`, what is measured, in the order of tables; `outputs` are
            abstract, of one batch.
        check: `check(outputs, targets)` raises ValueError, with both shapes, where targets do not
            fit. `outputs` are abstract and of one batch, `targets` NumPy arrays of a whole split.
    """

    name: str
    loss: Callable[[Outputs, Targets], tuple[Array, Array]]
    fit: Callable[[Outputs, Targets, Array], Any] | None
    predict: Callable[[Outputs], Any] | None
    sums: Callable[..., Any]
    finish: Callable[[Any, Any, Any], dict[str, Array]]
    metrics: Callable[[Outputs], tuple[Metric, ...]]
    check: Callable[[Outputs, Targets], None]


class Batch(NamedTuple):
    """What a criterion looks at; a value, never a constant of the program."""

    x: Any
    y: Any
    key: Key


class Problem(NamedTuple):
    """What a criterion may ask; made inside the trace around network, task and state.

    Attributes:
        apply: `apply(params, x) -> outputs`.
        losses: `losses(params, batch)`, (batch,); their mean is what training minimises.
    """

    apply: Callable[[Params, Any], Outputs]
    losses: Callable[[Params, Batch], Array]


class Criterion(NamedTuple):
    """What a weight is worth.

    Attributes:
        name: as rows, tables and flags have it, such as `magnitude`.
        settings: plain values, recorded and compared when a run goes on.
        scores: `scores(params, problem, batch) -> scores`, the tree and shapes of the parameters.
    """

    name: str
    settings: dict[str, Any]
    scores: Callable[[Params, Problem, Batch], Scores]


class Correction(NamedTuple):
    """Which weights are kept, and what those become that stay.

    Attributes:
        name: as rows, tables and flags have it, such as `obs`.
        settings: plain values, recorded.
        prune: `prune(params, problem, counts, batches) -> (params, masks)`, of all levels at once:
            `counts` as `distribution.counts` gives them, with a levels axis; `batches` is a
            sequence of `Batch`, each as large as the others; what it returns has a levels axis.
            Called outside of `jit`.
        scores: as of a criterion, what decides within a layer; None where nothing does beforehand.
    """

    name: str
    settings: dict[str, Any]
    prune: Callable[..., tuple[Params, Masks]]
    scores: Callable[[Params, Problem, Batch], Scores] | None = None


class Granularity(NamedTuple):
    """What is pruned as one.

    Attributes:
        name: such as `weight` or `unit`.
        rank: `rank(scores) -> pieces`, the scores of the pieces, a flat array a leaf of `Pieces`;
            traceable. What is not prunable has no pieces: an empty array, or no leaf.
        cost: `cost(params) -> pieces`, the weights of each piece, NumPy integers; reads shapes.
        spread: `spread(kept, params) -> masks`: kept pieces, bool (*levels, pieces), as masks.
        within: (n, m): of every m consecutive pieces n stay, or all; None: all of a leaf compete.
    """

    name: str
    rank: Callable[[Scores], Pieces]
    cost: Callable[[Params], Pieces]
    spread: Callable[[Pieces, Params], Masks]
    within: tuple[int, int] | None = None
