"""What a criterion is, what it may ask, and what it must return.

A user's function is lifted by `criterion`; `problem` is made inside the trace, around network, task
and state.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxprune import trees
from jaxprune.identity import digest, function_name
from jaxprune.types import Batch, Criterion, Network, Params, Problem, Scores, State, Task


def criterion(
    f: Callable | Criterion, *, name: str | None = None, settings: dict[str, Any] | None = None
) -> Criterion:
    """Make a criterion of a plain function, which is told apart by what it requires.

    Args:
        f: `f(params)` or `f(params, problem, batch)`, which returns the scores of all leaves. What
            a `functools.partial` has bound becomes settings, and part of the name, such as
            `my_scores(alpha=2)`. A `Criterion` is returned as it is, but for what is given here.
        name: as rows, tables and flags show it; by default the function's, or its class's. Two
            lambdas in one study need names.
        settings: plain values, to be recorded besides those of a partial.

    Returns:
        The criterion; it checks what `f` returns, see `check_scores`.

    Raises:
        TypeError: `f` is no function, or one of neither one nor three required arguments.

    Example:
        >>> def power(params, alpha):
        ...     return jax.tree.map(lambda w: jnp.abs(w) ** alpha, params)
        >>> criterion(functools.partial(power, alpha=2)).name
        'power(alpha=2)'
    """
    settings = {key: _plain(value) for key, value in (settings or {}).items()}
    if isinstance(f, Criterion):
        return Criterion(name or f.name, {**f.settings, **settings}, f.scores)
    alone = _arguments(f) == 1
    bound = {key: _plain(value) for key, value in _bound(f).items()}
    if name is None:
        shown = ", ".join(f"{key}={value}" for key, value in bound.items())
        name = f"{function_name(f)}({shown})" if bound else function_name(f)

    def scores(params: Params, problem: Problem, batch: Batch) -> Scores:
        found = f(params) if alone else f(params, problem, batch)
        check_scores(found, params, name)
        return found

    return Criterion(name, {**bound, **settings}, scores)


def problem(network: Network, task: Task, state: State) -> Problem:
    """Make what a criterion may ask, of a network as it scores, with this state.

    Args:
        network: its `apply` is taken.
        task: gives losses and weights.
        state: the network's; an argument of the program in which this is called.

    Returns:
        Its losses (batch,) have the mean that training minimises: sum(losses) / sum(weights).
    """

    def apply(params: Params, x: Any) -> Any:
        return network.apply(params, state, x)

    def losses(params: Params, batch: Batch) -> Array:
        if batch.y is None:
            raise ValueError("the criterion asks for losses, and the batch has no targets")
        each, weights = task.loss(apply(params, batch.x), batch.y)
        return each * (each.size / jnp.sum(weights)).astype(each.dtype)

    return Problem(apply, losses)


def check_scores(scores: Scores, params: Params, name: str = "scores") -> None:
    """Check that scores have the tree, shapes and real floating dtype of the parameters.

    The dtype may be wider or narrower; where the parameters are not real floating, it is anything.

    Args:
        scores: of one network, without a levels axis; may be traced.
        params: the network's.
        name: of the criterion, for the message.

    Raises:
        ValueError: names the criterion, the leaf and both shapes, or the dtype.
    """
    if scores is None:
        raise ValueError(f"criterion {name}: it returns None, not a tree of scores")
    for path, score in trees.paths_and_leaves(scores):
        if not isinstance(score, jax.Array | np.ndarray | np.generic | float):
            raise ValueError(
                f"criterion {name}: the score {path!r} is no array, but {type(score).__name__}"
            )
    try:
        trees.check_match("scores", scores, "parameters", params)
    except ValueError as error:
        raise ValueError(f"criterion {name}: {error}") from None
    pairs = zip(trees.paths_and_leaves(scores), jax.tree.leaves(params), strict=True)
    for (path, score), w in pairs:
        if is_kind(w, jnp.floating) and not is_kind(score, jnp.floating):
            raise ValueError(
                f"criterion {name}: the scores of leaf {path!r} must be real floating point "
                f"numbers, got {jnp.asarray(score).dtype}"
            )


def is_kind(w: Any, kind: Any) -> bool:
    """Tell whether a leaf's dtype is of a kind, such as `jnp.floating`."""
    return bool(jnp.issubdtype(getattr(w, "dtype", type(w)), kind))


def _arguments(f: Any) -> int:
    """Return how many arguments a function requires: 1 or 3."""
    name = function_name(f)
    if not callable(f):
        raise TypeError(f"a criterion must be a function, got {name}")
    try:
        parameters = inspect.signature(f).parameters.values()
    except ValueError:
        raise TypeError(f"criterion {name} has no signature: wrap it in a lambda") from None
    named = [p.name for p in parameters][1:3] == ["problem", "batch"]  # whatever their defaults
    required = [p for i, p in enumerate(parameters)
                if (p.default is p.empty or named and i < 3) and p.kind not in
                (p.VAR_POSITIONAL, p.VAR_KEYWORD)]  # fmt: skip
    if len(required) not in (1, 3) or any(p.kind == p.KEYWORD_ONLY for p in required):
        raise TypeError(
            f"a criterion takes (params) or (params, problem, batch), and {name} requires "
            f"({', '.join(map(str, required))})"
        )
    return len(required)


def _bound(f: Any) -> dict[str, Any]:
    """Return what a `functools.partial` has bound, by the names of the arguments."""
    if not isinstance(f, functools.partial):
        return {}
    return inspect.signature(f.func).bind_partial(*f.args, **f.keywords).arguments


def _plain(value: Any) -> Any:
    """Return a setting as JSON gives it back: arrays and objects by their hash, functions named."""
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        if np.ndim(value) == 0 and not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return _plain(value.item())
        return f"{value.dtype}{list(value.shape)} {digest(value)[:8]}"
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    return f"{function_name(value)} {digest(value)[:8]}"
