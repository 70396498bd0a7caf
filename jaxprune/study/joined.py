"""A network with its state as one function, so that `structure` sees scoring and training at once.

Units are removed where they are without effect in both, and the state shrinks with them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxprune.structure import Compaction
from jaxprune.types import Network, Params, State


class Joined(NamedTuple):
    """A network as a function of `{"params": …, "state": …}`.

    Attributes:
        apply: of these and `inputs`; it returns the outputs of scoring, and where training is
            another function also those of training, and the new state.
        abstract: their shapes and dtypes.
        inputs: what it was traced with: x, or x and a key.
        new_state: of what `apply` returns the new values of the state; None where it has none.
    """

    apply: Callable[[Any, Any], Any]
    abstract: Any
    inputs: Any
    new_state: Callable[[Any], Any] | None

    def network(self, plan: Compaction) -> Network:
        """Return what a plan of `apply` leaves, as a network; it cannot be initialised."""

        def variables(params: Params, state: State) -> Any:
            return {"params": params, "state": state}

        def init(key: Any) -> Any:
            raise ValueError("a smaller network comes from a larger one and has no `init`")

        if self.new_state is None:
            return Network(
                init,
                lambda params, state, x: plan.apply(variables(params, state), x),
                lambda params, state, x, key: (plan.apply(variables(params, state), x), state),
            )
        key = jax.random.key(0)  # scoring draws none

        def train(params: Params, state: State, x: Any, key: Any) -> tuple[Any, State]:
            _, outputs, state = plan.apply(variables(params, state), (x, key))
            return outputs, state

        return Network(
            init, lambda params, state, x: plan.apply(variables(params, state), (x, key))[0], train
        )


def scoring(network: Network) -> Callable[[Any, Any], Any]:
    """Return the network's `apply` as a function of `{"params": …, "state": …}` and x."""
    return lambda variables, x: network.apply(variables["params"], variables["state"], x)


def joined(network: Network, params: Params, state: State, x: Any) -> Joined:
    """Trace whether training is another function than scoring, and join what is needed.

    Args:
        network: the network.
        params: its parameters, or their shapes and dtypes.
        state: its state, likewise.
        x: two inputs.
    """
    abstract = jax.eval_shape(lambda tree: tree, {"params": params, "state": state})
    key = jax.random.key(0)

    def training(variables: Any, x: Any) -> Any:
        return network.train(variables["params"], variables["state"], x, key)[0]

    alone = scoring(network)
    if not jax.tree.leaves(state):
        one, other = (str(jax.make_jaxpr(f)(abstract, x)) for f in (alone, training))
        if one == other:
            return Joined(alone, abstract, x, None)

    def both(variables: Any, inputs: Any) -> Any:
        x, key = inputs
        trained, state = network.train(variables["params"], variables["state"], x, key)
        return alone(variables, x), trained, state

    return Joined(both, abstract, (x, key), lambda out: {"state": out[2]})
