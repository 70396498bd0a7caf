"""Flax modules, Linen and NNX, as a `Network`. Nothing else in the package knows Flax modules."""

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx as flax_nnx
from flax.core import DenyList

from jaxprune.types import Key, Network, Outputs, Params, Prunable, State

# Arguments of `__call__` that tell a module whether it trains, and those that say the opposite.
TRAINS = ("train", "training", "is_training")
SCORES = ("deterministic", "use_running_average", "eval", "inference")


def linen(
    module: nn.Module, x: Any, *, train: Mapping[str, Any] | None = None,
    score: Mapping[str, Any] | None = None, rngs: Sequence[str] = ("dropout",),
    prunable: Prunable = None,
) -> Network:  # fmt: skip
    """Return the network of a Linen module; its collections beside `params` are the state.

    A module is told that it trains by arguments of its `__call__`: `train`, `training` and
    `is_training` are True then and False otherwise, `deterministic`, `use_running_average`, `eval`
    and `inference` the other way round. A module without any is called with `x` alone. What it
    sows into `intermediates` is dropped.

    Args:
        module: any module whose `__call__` takes the inputs first.
        x: a batch of inputs, (batch, …), from which `init` infers shapes; two will do.
        train: keyword arguments of a training step, in place of those found.
        score: keyword arguments of `init` and of scoring, in place of those found.
        rngs: streams that the module draws from in training; stream i gets `fold_in(key, i)`.
        prunable: which leaves may be pruned, as `Network` has it.

    Returns:
        A network. Its `init` gives the parameters of `module.init(key, x)`.

    Example:
        >>> net = linen(nn.Dense(2), jnp.ones((1, 3)))
        >>> params, state = net.init(jax.random.key(0))
        >>> net.apply(params, state, jnp.ones((5, 3))).shape, state
        ((5, 2), {})
    """
    call = type(module).__call__
    training = dict(_flags(call, True) if train is None else train)
    scoring = dict(_flags(call, False) if score is None else score)
    # By exclusion, so that a collection that only training makes is found by `check_state`.
    mutable = DenyList(("params", "intermediates"))

    def init(key: Key) -> tuple[Params, State]:
        variables = dict(module.init(key, x, **scoring))
        variables.pop("intermediates", None)
        return variables.pop("params", {}), variables

    def apply(params: Params, state: State, x: Any) -> Outputs:
        return module.apply({"params": params, **state}, x, **scoring)

    def step(params: Params, state: State, x: Any, key: Key) -> tuple[Outputs, State]:
        keys = {name: jax.random.fold_in(key, i) for i, name in enumerate(rngs)}
        variables = {"params": params, **state}
        outputs, updated = module.apply(variables, x, rngs=keys, mutable=mutable, **training)
        return outputs, {**state, **updated}

    return Network(init, apply, step, prunable)


def nnx(model: Any, *, prunable: Prunable = None) -> Network:
    """Return the network of an NNX module; its variables other than `nnx.Param` are the state.

    Training and scoring run the module after `model.train()` and `model.eval()`. Its random streams
    are not state: before every training step, stream i in the order of paths starts anew from
    `fold_in(key, i)`, as `nnx.reseed(model, default=key)` does. If its `__call__` takes `rngs`, it
    gets `nnx.Rngs(key)`; arguments that say whether it trains are passed as `linen` does.

    Args:
        model: a function `model(rngs) -> nnx.Module`, called with `nnx.Rngs(key)` of each seed; or
            a module, whose parameters and state are then those of all seeds.
        prunable: which leaves may be pruned, as `Network` has it.

    Returns:
        A network whose parameters and state are dicts, as `nnx.to_pure_dict` makes them.

    Raises:
        TypeError: `model` is neither.

    Example:
        >>> net = nnx(lambda rngs: flax_nnx.Linear(3, 2, rngs=rngs))
        >>> params, state = net.init(jax.random.key(0))
        >>> sorted(params), state, net.apply(params, state, jnp.ones((5, 3))).shape
        (['bias', 'kernel'], {}, (5, 2))
    """
    given = isinstance(model, flax_nnx.Module)
    if not given and not callable(model):
        raise TypeError(
            f"expected an nnx.Module or a function rngs -> nnx.Module, got {model!r:.60}"
        )
    example: Any = model if given else flax_nnx.eval_shape(lambda: model(flax_nnx.Rngs(0)))
    if not isinstance(example, flax_nnx.Module):
        raise TypeError(f"model(rngs) must return an nnx.Module, got {type(example).__name__}")
    call = type(example).__call__
    takes_rngs = "rngs" in inspect.signature(call).parameters
    training, scoring = (_graph(example, mode) for mode in ("train", "eval"))
    *initial, streams = _split(example)
    # Made here and not in `apply`, so that the traced program has no keys that nothing reads.
    still = jax.random.key(0)
    unused = _restarted(streams, still)

    def init(key: Key) -> tuple[Params, State]:
        # Copies, because a training run may give the buffers of its first parameters away.
        made = jax.tree.map(jnp.copy, initial) if given else _split(model(flax_nnx.Rngs(key)))
        return made[0], made[1]

    def apply(params: Params, state: State, x: Any) -> Outputs:
        rngs = {"rngs": flax_nnx.Rngs(still)} if takes_rngs else {}
        return flax_nnx.merge(scoring, params, state, unused)(x, **_flags(call, False), **rngs)

    def train(params: Params, state: State, x: Any, key: Key) -> tuple[Outputs, State]:
        module = flax_nnx.merge(training, params, state, _restarted(streams, key))
        rngs = {"rngs": flax_nnx.Rngs(key)} if takes_rngs else {}
        outputs = module(x, **_flags(call, True), **rngs)
        return outputs, _split(module)[1]

    return Network(init, apply, train, prunable)


def _flags(call: Callable, training: bool) -> dict[str, bool]:
    """Return the arguments that tell a module's `__call__` whether it trains."""
    names = inspect.signature(call).parameters
    flags = {name: training for name in TRAINS} | {name: not training for name in SCORES}
    return {name: value for name, value in flags.items() if name in names}


def _graph(module: flax_nnx.Module, mode: str) -> Any:
    """Return what is static of a module in a mode, `train` or `eval`."""
    copy = flax_nnx.clone(module)
    flax_nnx.pop(copy, flax_nnx.Intermediate)
    getattr(copy, mode)()
    return flax_nnx.split(copy)[0]


def _split(module: Any) -> tuple[Params, State, Any]:
    """Return a module's parameters, its state and its random streams."""
    _, params, streams, _, state = flax_nnx.split(
        module, flax_nnx.Param, flax_nnx.RngState, flax_nnx.Intermediate, ...
    )
    params, state, streams = map(flax_nnx.to_pure_dict, (params, state, streams))
    return params, state, streams


def _restarted(streams: Any, key: Key) -> Any:
    """Return random streams as they are before the first draw, each from a key of its own."""
    numbers = itertools.count()

    def restart(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.zeros(leaf.shape, leaf.dtype)  # how often the stream was drawn from
        seed = jax.random.fold_in(key, next(numbers))
        return jax.random.split(seed, leaf.shape) if leaf.shape else seed  # a key a copy

    return jax.tree.map(restart, streams)
