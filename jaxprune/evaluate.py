"""From parameters, state and masks to metrics: of one level, or of all levels.

Masks come from `masks`, what is measured from `tasks`; the metrics go into rows by `study`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import networks, tasks, trees
from jaxprune.data import Data, Split
from jaxprune.masks import apply_masks
from jaxprune.types import Apply, Array, Masks, Network, Params, State, Task

Metrics = dict[str, Array]
Score = Callable[..., tuple[Metrics, Any]]
"""`score(params, state, masks, val, test, reference) -> (metrics, predictions)`."""


class _Batches(NamedTuple):
    x: Any  # (batches, batch, ...)
    y: Any  # (batches, batch, ...)
    weight: Any  # (batches, batch) int32, 0 where the last batch is padded
    reference: Any  # (batches, batch, ...), or None


def make_score(
    network: Network,
    task: Task,
    *,
    batch_size: int = 1000,
    levels_at_once: int | None = None,
    stepped: bool = False,
    jit: Callable[[Callable], Callable] = jax.jit,
) -> Score:
    """Return the function that scores all levels of a network.

    Args:
        network: the network.
        task: what is measured.
        batch_size: examples in a batch, at most as many as a split has; changes the speed, not the
            counts.
        levels_at_once: how many levels are vmapped together, see `trees.map_levels`; not where
            `stepped`.
        stepped: False: one pure function over batches and levels, for the caller to compile. True:
            a function on the host that loops over both and calls small programs, for convolutions
            on a CPU, which XLA runs ten times slower inside a compiled loop.
        jit: compiles these programs; it is called here, once for each.

    Returns:
        `score(params, state, masks, val, test, reference) -> (metrics, predictions)`:

        - params, state, masks: with a leading levels axis in every leaf;
        - val, test: splits of jax arrays;
        - reference: predictions on test that churn compares with, (examples, ...), or None;
        - metrics: by name, each with a levels axis;
        - predictions: where `reference` is None, those of all levels, (levels, examples, ...), and
          churn is 0. Otherwise, and where the task has none, None.

    Example:
        >>> network = networks.as_network(lambda params, x: x @ params["logits"])
        >>> score = jax.jit(make_score(network, tasks.classification()))
    """
    if stepped:
        return _stepped(network, task, batch_size, jit)
    return _looped(network, task, batch_size, levels_at_once)


def evaluate_levels(
    network: Network | Apply,
    params: Params,
    masks: Masks,
    data: Data,
    *,
    state: State = None,
    task: Task | None = None,
    reference: Any = None,
    batch_size: int = 1000,
) -> tuple[Metrics, Any]:
    """Score the masked network at every level, in one compiled program.

    Args:
        network: a `Network`, or `apply(params, x) -> outputs`.
        params: parameters, shared by all levels, or with a leading levels axis in every leaf.
        masks: masks with a leading levels axis.
        data: the splits `val` and `test` are read.
        state: the network's; shared where the parameters are, otherwise with a levels axis.
        task: what is measured; by default what the targets look like, see `tasks.default_task`.
        reference: (test examples, ...), the predictions that churn compares with: those of the
            dense network. By default those of the first level.
        batch_size: examples in a batch; changes the speed, not the counts.

    Returns:
        The metrics by name, each with a leading levels axis; and the reference.

    Raises:
        ValueError: masks that do not match the params, levels axes of several lengths, a batch size
            that is no whole number from 1, or data that the network or the task cannot take.

    Example:
        >>> images = Split(np.eye(2, dtype=np.float32), np.arange(2, dtype=np.int32))
        >>> masks = {"logits": jnp.stack([jnp.ones((2, 2), bool), jnp.zeros((2, 2), bool)])}
        >>> found, _ = evaluate_levels(
        ...     lambda p, x: x @ p["logits"], {"logits": jnp.eye(2)}, masks, Data(*[images] * 3)
        ... )
        >>> found["accuracy"].tolist()
        [1.0, 0.5]
    """
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size}")
    data = Data(*(Split(*split) for split in data))
    params, state = _with_levels(params, {} if state is None else state, masks)
    task = tasks.default_task(data.test.y) if task is None else task
    one_params, one_state = jax.eval_shape(lambda levels: _at(levels, 0), (params, state))
    check_data(network, one_params, one_state, data, task, splits=("val", "test"))
    for leaf in jax.tree.leaves(reference):
        if len(leaf) != len(data.test.y):
            raise ValueError(
                f"reference has {len(leaf)} predictions, and test {len(data.test.y)} examples"
            )
    if isinstance(network, Network):
        network = network._replace(prunable=None)  # a tree, maybe, which cannot be hashed
    score = partial(_score, network=network, task=task, batch_size=int(batch_size))
    if reference is None and task.predict is not None:
        first = jax.tree.map(lambda leaf: leaf[:1], (params, state, masks))
        _, predictions = score(*first, data.val, data.test, None)
        reference = jax.tree.map(lambda p: p[0], predictions)
    return score(params, state, masks, data.val, data.test, reference)[0], reference


def check_arrays(data: Data) -> None:
    """Raise TypeError, naming split and axis, where a data set is not made of arrays."""
    for name, split in zip(Data._fields, data, strict=True):
        for axis, values in zip("xy", split, strict=True):
            if not (hasattr(values, "dtype") and np.ndim(values)):
                raise TypeError(
                    f"{name} {axis} must be an array of examples, got {type(values).__name__}"
                )


def check_data(
    network: Network | Apply,
    params: Params,
    state: State,
    data: Data,
    task: Task,
    *,
    splits: Sequence[str] = Data._fields,
) -> None:
    """Check that a network can take the data, and a task its outputs; nothing is computed.

    Args:
        network: a `Network`, or `apply(params, x) -> outputs`.
        params: parameters without a levels axis, or their shapes.
        state: likewise.
        data: arrays in memory.
        task: whose `check` is called.
        splits: the names of those that are checked.

    Raises:
        ValueError: one line that names the split, and the shapes where these do not fit.
        TypeError: a split is not made of arrays.
    """
    network = networks.as_network(network)
    check_arrays(data)
    for name in splits:
        x, y = getattr(data, name)
        if len(x) != len(y) or not len(y):
            raise ValueError(f"{name} has {len(x)} inputs x and {len(y)} targets y")
        if jnp.issubdtype(x.dtype, jnp.inexact) and not np.isfinite(x).all():
            raise ValueError(f"{name} x has values that are not finite")
        try:
            outputs = jax.eval_shape(network.apply, params, state, x[:2])
        except Exception as error:
            if not jax.tree.leaves(state) and networks.needs_state(network):
                raise ValueError("the network has a state: give it, state=...") from error
            raise ValueError(
                f"the network cannot take {name} x, {x.dtype} {x.shape}: {tasks.reason(error)}"
            ) from error
        lengths = [leaf.shape[:1] for leaf in jax.tree.leaves(outputs)]
        if lengths != [(len(x[:2]),)] * len(lengths):
            raise ValueError(
                f"outputs must have a leading axis of examples, of {len(x[:2])} for a batch of so "
                f"many; {tasks.shapes(outputs, y)}"
            )
        try:
            task.check(outputs, np.asarray(y))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


@partial(jax.jit, static_argnames=("network", "task", "batch_size"))
def _score(*args: Any, network: Network | Apply, task: Task, batch_size: int) -> Any:
    # Static, so that the next call of the same network and task is of the same program.
    return make_score(networks.as_network(network), task, batch_size=batch_size)(*args)


def _with_levels(params: Params, state: State, masks: Masks) -> tuple[Params, State]:
    """Return params and state with the levels axis of the masks."""
    if jax.tree.map(jnp.ndim, params) != jax.tree.map(jnp.ndim, masks):
        levels = jax.tree.leaves(masks)[0].shape[:1]
        params, state = jax.tree.map(
            lambda w: jnp.broadcast_to(w, levels + jnp.shape(w)), (params, state)
        )
    trees.check_match("masks", masks, "params with a levels axis", params)
    if len({jnp.shape(leaf)[:1] for leaf in jax.tree.leaves((masks, state))}) > 1:
        raise ValueError(
            "masks (and the state, where params have it) must have a leading levels axis, of one "
            "length in all leaves; give those of one network as jax.tree.map(lambda m: m[None], "
            "masks)"
        )
    return params, state


def _looped(network: Network, task: Task, batch_size: int, levels_at_once: int | None) -> Score:
    def score(
        params: Params, state: State, masks: Masks, val: Split, test: Split, reference: Any
    ) -> tuple[Metrics, Any]:
        val_batches, test_batches = _cut(val, None, batch_size), _cut(test, reference, batch_size)

        def one_level(level: tuple[Params, State, Masks]) -> tuple[Metrics, Any]:
            params, state = _masked(level)

            def outputs_of(batch: _Batches) -> Any:
                return network.apply(params, state, batch.x)

            def sums_of(batch: _Batches) -> tuple[Any, Any]:
                return _sums(task, outputs_of(batch), batch, fitted)

            fitted = None
            if task.fit is None:
                val_found = jax.lax.map(sums_of, val_batches)
            else:
                outputs = jax.lax.map(outputs_of, val_batches)
                fitted = _fit(task, outputs, val_batches)
                val_found = jax.vmap(lambda z, batch: _sums(task, z, batch, fitted))(
                    outputs, val_batches
                )
            test_found = jax.lax.map(sums_of, test_batches)
            return _finish(task, val_found, test_found, fitted)

        return _collected(trees.map_levels(one_level, (params, state, masks), levels_at_once), test)

    return score


def _stepped(network: Network, task: Task, batch_size: int, jit: Callable) -> Score:
    # A part of a stack or of a split is taken inside a program, which copies that part alone.
    cut = jit(partial(_cut, size=batch_size))
    masked = jit(lambda levels, i: _masked(_at(levels, i)))
    outputs_of = jit(lambda params, state, x, i: network.apply(params, state, _at(x, i)))
    fit = jit(lambda outputs, batches: _fit(task, trees.stack(outputs), batches))
    sums_of = jit(lambda outputs, batches, i, fitted: _sums(task, outputs, _at(batches, i), fitted))
    finish = jit(
        lambda val, test, fitted: _finish(task, trees.stack(val), trees.stack(test), fitted)
    )
    collect = jit(lambda levels, test: _collected(trees.stack(levels), test))

    def one_level(level: Any, val: _Batches, test: _Batches) -> tuple[Metrics, Any]:
        def outputs(batches: _Batches) -> Iterator[Any]:
            return (outputs_of(*level, batches.x, i) for i in _indices(batches.weight))

        def sums(outputs: Iterable[Any], batches: _Batches) -> list[tuple[Any, Any]]:
            return [
                sums_of(z, batches, i, fitted)
                for z, i in zip(outputs, _indices(batches.weight), strict=True)
            ]

        of_val, fitted = outputs(val), None
        if task.fit is not None:
            of_val = list(of_val)
            fitted = fit(of_val, val)
        return finish(sums(of_val, val), sums(outputs(test), test), fitted)

    def score(
        params: Params, state: State, masks: Masks, val: Split, test: Split, reference: Any
    ) -> tuple[Metrics, Any]:
        val_batches, test_batches = cut(val, None), cut(test, reference)
        levels = params, state, masks
        each = [one_level(masked(levels, i), val_batches, test_batches) for i in _indices(levels)]
        return collect(each, test)

    return score


def _masked(level: tuple[Params, State, Masks]) -> tuple[Params, State]:
    params, state, masks = level
    return apply_masks(params, masks), state


def _cut(split: Split, reference: Any, size: int) -> _Batches:
    """Cut a split, and its reference, into batches, of which the last is padded with zeros."""
    num = len(split.y)
    size = min(size, num)

    def cut(values: Array) -> Array:
        values = jnp.pad(values, [(0, -num % size)] + [(0, 0)] * (values.ndim - 1))
        return values.reshape(-1, size, *values.shape[1:])

    parts = split.x, split.y, jnp.ones(num, jnp.int32), reference
    return _Batches(*jax.tree.map(lambda values: cut(jnp.asarray(values)), parts))


def _sums(task: Task, outputs: Any, batch: _Batches, fitted: Any) -> tuple[Any, Any]:
    """Return a batch's sums; and the predictions, where there is no reference."""
    sums = task.sums(outputs, batch.y, batch.weight, fitted, batch.reference)
    if task.predict is None or batch.reference is not None:
        return sums, None
    return sums, task.predict(outputs)


def _fit(task: Task, outputs: Any, batches: _Batches) -> Any:
    parts = outputs, batches.y, batches.weight
    return None if task.fit is None else task.fit(*jax.tree.map(_joined, parts))


def _finish(task: Task, val: Any, test: Any, fitted: Any) -> tuple[Metrics, Any]:
    """Return the metrics and the predictions on test, of what `_sums` found of each batch."""
    val_sums, test_sums = jax.tree.map(lambda each: jnp.sum(each, axis=0), (val[0], test[0]))
    return task.finish(val_sums, test_sums, fitted), jax.tree.map(_joined, test[1])


def _collected(levels: tuple[Metrics, Any], test: Split) -> tuple[Metrics, Any]:
    """Cut the padding off the predictions, (levels, padded examples, ...)."""
    metrics, predictions = levels
    return metrics, jax.tree.map(lambda p: p[:, : len(test.y)], predictions)


def _joined(values: Array) -> Array:
    return values.reshape(-1, *values.shape[2:])


def _at(tree: Any, i: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), tree)


def _indices(tree: Any) -> Sequence[np.int32]:
    return [np.int32(i) for i in range(len(jax.tree.leaves(tree)[0]))]
