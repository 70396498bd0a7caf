"""Functions of parameters and inputs as a `Network`, and the check of any network's state.

`modules` does the same for Flax. An Equinox model needs no wrapper: its arrays are the parameters.

>>> import equinox as eqx
>>> def make(key):
...     return eqx.nn.MLP(4, 2, 8, 1, key=key)
>>> def init(key):
...     return eqx.partition(make(key), eqx.is_array)[0]
>>> def apply(params, x):
...     return jax.vmap(eqx.combine(params, static))(x)
>>> static = eqx.partition(make(jax.random.key(0)), eqx.is_array)[1]
>>> params, state = network(init, apply).init(jax.random.key(1))

Its kernels are (outputs, inputs): which axis is which, `structure.layers` reads off the program.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxprune.trees import paths_and_leaves
from jaxprune.types import Apply, Key, Network, Outputs, Params, Prunable, State

# Linen's names for what `init` returns beside parameters.
COLLECTIONS = ("batch_stats", "cache", "intermediates")


# Classes in place of closures, because they are equal if what they lift is: a program that was
# compiled for one is found again for the other.
@dataclass(frozen=True)
class _Init:
    init: Callable[[Key], Params]

    def __call__(self, key: Key) -> tuple[Params, State]:
        params = self.init(key)
        if isinstance(params, Mapping) and "params" in params:
            if found := [name for name in COLLECTIONS if name in params]:
                raise ValueError(
                    f"init returns {found[0]!r} beside 'params', which would be trained like "
                    "weights: use linen(module, x) in place of network(init, apply)"
                )
        return params, {}


@dataclass(frozen=True)
class _Score:
    apply: Apply

    def __call__(self, params: Params, state: State, x: Any) -> Outputs:
        return self.apply(params, x)


@dataclass(frozen=True)
class _Train:
    apply: Apply

    def __call__(self, params: Params, state: State, x: Any, key: Key) -> tuple[Outputs, State]:
        return self.apply(params, x), state


def network(init: Callable[[Key], Params], apply: Apply, *, prunable: Prunable = None) -> Network:
    """Return the network of two functions, which has no state and trains as it scores.

    Args:
        init: `init(key) -> params`, any tree of arrays.
        apply: `apply(params, x) -> outputs`.
        prunable: which leaves may be pruned, as `Network` has it.

    Returns:
        A network with the state {}. Its `init` raises ValueError where `init` returns all
        variables of a Linen module, statistics among them.

    Example:
        >>> net = network(lambda key: jax.random.normal(key, (3, 2)), lambda w, x: x @ w)
        >>> params, state = net.init(jax.random.key(0))
        >>> net.apply(params, state, jnp.ones((5, 3))).shape
        (5, 2)
    """
    return Network(_Init(init), _Score(apply), _Train(apply), prunable)


def as_network(f: Network | Apply) -> Network:
    """Return a network as it is, and a plain `apply(params, x)` as a network without `init`.

    Args:
        f: either.

    Returns:
        A network; of equal functions an equal one. The `init` of a lifted function raises
        ValueError.

    Raises:
        TypeError: it is neither.

    Example:
        >>> as_network(lambda w, x: x @ w).apply(jnp.ones((3, 2)), {}, jnp.ones((5, 3))).shape
        (5, 2)
    """
    if isinstance(f, Network):
        return f
    if not callable(f):
        raise TypeError(f"expected a Network or a function apply(params, x), got {f!r:.60}")
    return Network(_no_init, _Score(f), _Train(f))


def needs_state(network: Network) -> bool:
    """Tell whether a network starts with a state that holds something; nothing is computed."""
    try:
        return bool(jax.tree.leaves(jax.eval_shape(network.init, jax.random.key(0))[1]))
    except Exception:  # of a network that cannot be initialised, or not in the abstract
        return False


def check_state(network: Network, params: Params, state: State, x: Any) -> None:
    """Check that a training step keeps the state's tree, shapes and types; nothing is computed.

    Args:
        network: any network.
        params: its parameters, arrays or abstract.
        state: its state, likewise.
        x: a batch of training inputs, likewise.

    Raises:
        ValueError: names the first leaf that a step changes.

    Example:
        >>> net = Network(
        ...     lambda key: ({}, {}), lambda p, s, x: x, lambda p, s, x, key: (x, {"n": 1})
        ... )
        >>> check_state(net, {}, {}, jnp.ones(3))
        Traceback (most recent call last):
        ValueError: state changes its tree in training: leaf 'n' is missing before a step and ...
    """
    trained = jax.eval_shape(network.train, params, state, x, jax.random.key(0))[1]
    given = jax.eval_shape(lambda state: state, state)
    before, after = dict(paths_and_leaves(given)), dict(paths_and_leaves(trained))
    for path in [*before, *after]:
        old, new = (_describe(leaves.get(path)) for leaves in (before, after))
        if old != new:
            raise ValueError(
                f"state changes its tree in training: leaf {path!r} is {old} before a step and "
                f"{new} after it"
            )
    if (old := jax.tree.structure(given)) != (new := jax.tree.structure(trained)):
        raise ValueError(f"state changes its tree in training: {old} before a step, {new} after it")


def _no_init(key: Key) -> tuple[Params, State]:
    raise ValueError(
        "this network was made from apply(params, x) alone and has no initial parameters: "
        "use network(init, apply)"
    )


def _describe(leaf: Any) -> str:
    return "missing" if leaf is None else f"{leaf.dtype} {leaf.shape}"
