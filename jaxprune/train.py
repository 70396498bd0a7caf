"""Training under masks: one step, and many steps of all levels in one compiled call.

Static settings go into the factory, everything that may be swept is an argument. `study` calls
the result between updates of the masks; `evaluate` scores what comes out.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxprune import trees
from jaxprune.masks import apply_masks
from jaxprune.tasks import classification, mean_loss
from jaxprune.types import Array, Key, Masks, Network, Params, State, Task

_SLOWER_INSIDE = 1.5  # how much slower a compiled loop must run to be made on the host instead
_MEASURED = 16  # examples with which that is measured


class TrainState(NamedTuple):
    """What training carries from step to step, with a leading levels axis or without."""

    params: Params
    state: State
    opt_state: Any


Train = Callable[..., tuple[TrainState, Array]]
"""`train(carry, masks, x, y, batches, key, first, last) -> (carry, losses)`; see `make_train`."""


def init_state(network: Network, key: Key, optimizer: optax.GradientTransformation) -> TrainState:
    """Return what training starts from.

    Raises:
        TypeError: a parameter is not of floating point numbers; names the leaf.
    """
    params, state = network.init(key)
    for path, leaf in trees.paths_and_leaves(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"leaf {path!r} is of {jnp.result_type(leaf)} and cannot be trained: keep it out "
                "of the parameters, in the network's state or in `apply`"
            )
    return TrainState(params, state, optimizer.init(params))


def make_step(
    network: Network, task: Task, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, Array]]:
    """Return `step(carry, masks, x, y, key) -> (carry, loss)`, of one network and one batch.

    Arguments as in `make_train`, without a levels axis; the loss is the batch's, sum(losses) /
    sum(weights), before the update.
    """

    def step(
        carry: TrainState, masks: Masks, x: Any, y: Any, key: Key
    ) -> tuple[TrainState, Array]:  # fmt: skip
        def loss_of(params: Params) -> tuple[Array, State]:
            outputs, state = network.train(apply_masks(params, masks), carry.state, x, key)
            return mean_loss(task, outputs, y), state

        (value, state), gradients = jax.value_and_grad(loss_of, has_aux=True)(carry.params)
        with jax.numpy_dtype_promotion("standard"):  # Adam's 0.9**count is not strict
            updates, opt_state = optimizer.update(gradients, carry.opt_state, carry.params)
        params = apply_masks(optax.apply_updates(carry.params, updates), masks)
        return TrainState(params, state, opt_state), value

    return step


def make_train(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    task: Task | None = None,
    levels_at_once: int | None = None,
    stepped: bool = False,
    jit: Callable[[Callable], Callable] = jax.jit,
) -> Train:
    r"""Return a function that trains all levels for some steps under their masks.

    The loss is of the masked network, $L(m \odot w)$, and the masks are applied again after the
    optimizer's update, so that momentum and weight decay cannot revive a pruned weight: it is
    exactly zero after every step.

    Args:
        network: what is trained.
        optimizer: any optax transformation.
        task: its loss is minimised; by default `tasks.classification()`.
        levels_at_once: how many levels are vmapped together; see `trees.map_levels`.
        stepped: False: one pure function, to be jitted once. True: a function of the host that
            compiles one step, by `jit`, and calls it level by level; see `steps_on_host`.
        jit: how.

    Returns:
        `train(carry, masks, x, y, batches, key, first, last) -> (carry, losses)`:

        - carry: a `TrainState` with a leading levels axis in every leaf;
        - masks: likewise;
        - x, y: training examples and targets, (examples, ...);
        - batches: (steps, batch) int32, the examples of each step, the same for all levels;
        - key: of the epoch; step i gets `fold_in(key, i)`, the same for all levels;
        - first, last: (), int32; the steps first … last − 1 are made. Values, so that one program
          serves calls of any length; the result does not depend on how steps are split into calls;
        - losses: (levels, steps), each step's loss before its update, 0 for the other steps.

    """
    step = make_step(network, task or classification(), optimizer)

    def numbered(
        carry: TrainState, masks: Masks, x: Any, y: Any, batches: Array, key: Key, i: Any
    ) -> tuple[TrainState, Array]:
        return step(carry, masks, x[batches[i]], y[batches[i]], jax.random.fold_in(key, i))

    def train(
        carry: TrainState, masks: Masks, x: Any, y: Any, batches: Array, key: Key,
        first: Any, last: Any,
    ) -> tuple[TrainState, Array]:  # fmt: skip
        def one_level(level: tuple[TrainState, Masks]) -> tuple[TrainState, Array]:
            carry, masks = level

            def one_step(i: Array, so_far: tuple[TrainState, Array]) -> tuple[TrainState, Array]:
                carry, losses = so_far
                carry, value = numbered(carry, masks, x, y, batches, key, i)
                return carry, losses.at[i].set(value)

            losses = jnp.zeros(len(batches))
            return jax.lax.fori_loop(first, last, one_step, (carry, losses))

        return trees.map_levels(one_level, (carry, masks), levels_at_once)

    return _on_host(jit(numbered)) if stepped else train


def _on_host(step: Callable) -> Train:
    """Return `make_train`'s function with its loops on the host."""

    def train(carry: TrainState, masks: Masks, *args: Any) -> tuple[TrainState, Array]:
        *data, first, last = args
        trained, losses = [], []
        for level, mask in zip(trees.unstack(carry), trees.unstack(masks), strict=True):
            values = [jnp.zeros(())] * len(data[2])
            for i in range(int(first), int(last)):
                level, values[i] = step(level, mask, *data, jnp.int32(i))
            trained.append(level)
            losses.append(jnp.stack(values))
        return trees.stack(trained), jnp.stack(losses)

    return train


def make_recalibrate(
    network: Network, *, stepped: bool = False, jit: Callable[[Callable], Callable] = jax.jit
) -> Callable[..., State]:
    """Return a function that estimates the state of pruned networks anew, such as BatchNorm's.

    It runs batches through the masked networks as training does, and changes nothing else.

    Args:
        network: the network.
        stepped: whether it loops on the host, as in `make_train`.
        jit: how a batch is compiled then.

    Returns:
        `recalibrate(params, masks, state, x, batches, key) -> state`: params and state of one
        network, masks with a levels axis, x the training inputs, batches (batches, batch) int32;
        the result has the levels axis.
    """

    def on_batch(
        params: Params, masks: Masks, state: State, x: Any, batches: Array, key: Key, i: Any
    ) -> State:
        pruned = apply_masks(params, masks)
        return network.train(pruned, state, x[batches[i]], jax.random.fold_in(key, i))[1]

    def recalibrate(
        params: Params, masks: Masks, state: State, x: Any, batches: Array, key: Key
    ) -> State:
        def one_level(masks: Masks) -> State:
            def one(i: Array, state: State) -> State:
                return on_batch(params, masks, state, x, batches, key, i)

            return jax.lax.fori_loop(0, len(batches), one, state)

        return trees.map_levels(one_level, masks)

    if not stepped:
        return recalibrate
    compiled = jit(on_batch)

    def on_host(
        params: Params, masks: Masks, state: State, x: Any, batches: Array, key: Key
    ) -> State:
        found = []
        for mask in trees.unstack(masks):
            level = state
            for i in range(len(batches)):
                level = compiled(params, mask, level, x, batches, key, jnp.int32(i))
            found.append(level)
        return trees.stack(found)

    return on_host


def check_batch_size(batch_size: int, examples: int) -> None:
    """Raise ValueError where a training set of so many examples has no such batch."""
    if not 1 <= batch_size <= examples:
        raise ValueError(
            f"batch_size must be in [1, {examples}], the size of the training set, got {batch_size}"
        )


def batch_indices(key: Key, examples: int, batch_size: int) -> Array:
    """Shuffle an epoch into batches.

    Args:
        key: a `jax.random.key`.
        examples: size of the training set.
        batch_size: at most that size; the last partial batch is dropped.

    Returns:
        (examples // batch_size, batch_size) int32, each example at most once.

    Raises:
        ValueError: the batch is empty or larger than the training set.
    """
    check_batch_size(batch_size, examples)
    steps = examples // batch_size
    order = jax.random.permutation(key, examples)[: steps * batch_size]
    return order.reshape(steps, batch_size).astype(jnp.int32)


def steps_on_host(network: Network, params: Params, state: State, x: Any) -> bool:
    """Measure whether training would be slower inside of a compiled loop: see `make_train`.

    On a CPU, XLA computes gradients of convolutions some ten times slower inside of a loop than
    outside (jax 0.10). Those of the largest convolution of the network are computed both ways.

    Args:
        network: the network.
        params: its parameters, or their shapes and dtypes.
        state: its state, likewise.
        x: inputs, of which only shape and dtype are read.
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
