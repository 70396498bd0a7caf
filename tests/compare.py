"""Whether a compact network is the masked one: its results, and what every parameter learns."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

OPTIONS = {"xla_backend_optimization_level": 0}  # compilation is most of a test's time


def derivative(apply: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return a jitted function of parameters and inputs: the output, and a loss's gradients."""

    def loss(params: Any, x: Any) -> Any:
        out = apply(params, x)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out)), out

    both = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=OPTIONS)

    def run(params: Any, x: Any) -> Any:
        (_, out), gradients = both(params, x)
        return out, gradients

    return run


def check_compact(
    masked: Callable[[Any, Any], Any],
    params: Any,
    masks: Any,
    plan: Any,
    inputs: Sequence[Any],
    tolerance: float,
    *,
    folded: bool = False,
    scale: float = 0.0,
) -> None:
    """Check that a compact network is the masked one at all `inputs`.

    Of the gradients, those of all parameters that are not masked: of the removed ones they must be
    zero, or something would have been learned that the compact network cannot.

    Args:
        masked: the `derivative` of the network.
        params: its parameters.
        masks: the masks.
        plan: what `compaction` returns.
        inputs: what to evaluate at.
        tolerance: relative to the largest number of an output, or of a leaf's gradient. Gradients
            that cancel, as of the biases of keys, are compared to rounding errors of the others and
            of the outputs.
        folded: whether constants were folded into biases: what is removed had gradients then.
        scale: of the numbers that outputs are differences of, where these may cancel.
    """
    full, compact = masked_by_hand(params, masks), derivative(plan.apply)

    def same(a: Any, b: Any, largest: Any) -> None:
        rounding = 8 * np.finfo(b.dtype).eps * largest
        _close(a, b, max(np.max(np.abs(b), initial=0), rounding / tolerance), tolerance)

    for x in inputs:
        (expected, wanted), (found, given) = masked(full, x), compact(plan.params, x)
        jax.tree.map(lambda a, b: same(a, b, scale), found, expected)
        wanted = masked_by_hand(wanted, masks)
        if folded:
            given, wanted = masked_by_hand(given, plan.shrink(masks)), plan.shrink(wanted)
        else:
            given = masked_by_hand(plan.expand(given), masks)
        sizes = jax.tree.leaves((wanted, expected))
        largest = max(scale, *(np.max(np.abs(leaf), initial=0) for leaf in sizes))
        jax.tree.map(lambda a, b, largest=largest: same(a, b, largest), given, wanted)


def masked_by_hand(params: Any, masks: Any) -> Any:
    """Return what `apply_masks` does, by NumPy, which compiles nothing."""
    return jax.tree.map(lambda w, m: np.where(m, w, np.zeros_like(w)), params, masks)


def _close(found: Any, expected: Any, scale: float, tolerance: float) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


def with_zeros(x: Any) -> Any:
    """Return inputs of which a third are exactly zero, one example of the batch entirely."""
    rng = np.random.default_rng(0)
    keep = rng.random(x.shape) > 1 / 3
    keep[0] = False
    return jnp.asarray(np.asarray(x) * keep.astype(x.dtype))


def quietly(make: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Call `compaction` where a group may lose all its units, of which it warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="every unit of")
        return make(*args, **settings)
