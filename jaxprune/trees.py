"""Leaf paths, which leaves may be pruned, and the checks that two trees match.

Any tree of arrays comes in; `granularity` asks here which leaves take part.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.types import Params, Prunable


def paths_and_leaves(tree: Params) -> list[tuple[str, Any]]:
    """Return (path, leaf) in flatten order; a path reads `hidden_0/kernel`."""
    flat, _ = jax.tree.flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in flat]


def prunable_leaves(tree: Params, prunable: Prunable = None) -> list[bool]:
    """Tell for every leaf, in flatten order, whether it may be pruned.

    Args:
        tree: parameters, scores or masks (without a levels axis).
        prunable: a tree of bools like `tree`, such as `structure.prunable` makes, or a predicate
            `(path, leaf) -> bool`. By default all floating leaves of two axes or more (all of
            booleans in a tree that has none floating, of masks): a function that sees only
            parameters knows neither embeddings nor the last layer.

    Raises:
        ValueError: a tree of bools of another shape, or an empty leaf is selected.
        TypeError: a flag is no bool, or a leaf is selected that is not an array of real floating
            point numbers, or of booleans.

    Example:
        >>> params = {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))}
        >>> prunable_leaves(params), prunable_leaves(params, lambda path, leaf: path == "bias")
        ([False, True], [True, False])
    """
    flat = paths_and_leaves(tree)
    if prunable is None:
        kind = jnp.floating if any(_is_a(leaf, jnp.floating) for _, leaf in flat) else jnp.bool_
        return [_is_a(leaf, kind) and np.ndim(leaf) >= 2 and np.size(leaf) > 0 for _, leaf in flat]
    # An Equinox module of bools can be called too, but is no leaf.
    if callable(prunable) and jax.tree_util.all_leaves([prunable]):
        selected = [bool(prunable(path, leaf)) for path, leaf in flat]
    else:
        check_match("prunable", prunable, "the tree", jax.tree.map(lambda _: True, tree))
        for path, flag in paths_and_leaves(prunable):
            if jnp.result_type(flag) != jnp.bool_:
                raise TypeError(f"prunable must have a bool at {path!r}, got {flag!r}")
        selected = [bool(flag) for flag in jax.tree.leaves(prunable)]
    for (path, leaf), chosen in zip(flat, selected, strict=True):
        if chosen:
            _check_leaf(path, leaf)
    return selected


def check_match(name: str, tree: Any, reference_name: str, reference: Any) -> None:
    """Check that two trees have the same leaves, by path and shape.

    Raises:
        ValueError: names the first leaf that differs, and both shapes.
    """
    ours, theirs = dict(paths_and_leaves(tree)), dict(paths_and_leaves(reference))
    for path in [*theirs, *ours]:
        if path not in ours or path not in theirs:
            missing, other = (name, reference_name) if path not in ours else (reference_name, name)
            raise ValueError(f"{missing} has no leaf {path!r}, which {other} has")
    for path, leaf in ours.items():
        if jnp.shape(leaf) != jnp.shape(theirs[path]):
            raise ValueError(
                f"leaf {path!r} has shape {jnp.shape(leaf)} in {name} and "
                f"{jnp.shape(theirs[path])} in {reference_name}"
            )
    if jax.tree.structure(tree) != jax.tree.structure(reference):
        raise ValueError(
            f"{name} and {reference_name} have the same leaves in other containers: "
            f"{jax.tree.structure(tree)} and {jax.tree.structure(reference)}"
        )


def encode_containers(tree: Any) -> Any:
    """Return the containers as JSON, with "leaf" for every leaf.

    Raises:
        TypeError: one is no dict with keys of str or int, list, tuple or None.
    """
    if type(tree) is dict and all(type(key) in (str, int) for key in tree):
        return {"dict": [[key, encode_containers(value)] for key, value in tree.items()]}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [encode_containers(value) for value in tree]}
    if tree is not None and not jax.tree_util.all_leaves([tree]):
        raise TypeError(
            "containers must be dict (with keys of str or int), list, tuple or None, "
            f"got {type(tree).__name__}: flax.core.unfreeze and nnx.to_pure_dict make dicts, and "
            "jax.tree.leaves a list of whatever it is, such as an Equinox module"
        )
    return None if tree is None else "leaf"


def decode_containers(encoded: Any) -> Any:
    """Return what `encode_containers` was given, with a string for every leaf."""
    if encoded is None or encoded == "leaf":
        return encoded
    [(kind, values)] = encoded.items()
    if kind == "dict":
        if not all(type(key) in (str, int) for key, _ in values):
            raise ValueError("a key is neither str nor int")
        return {key: decode_containers(value) for key, value in values}
    return {"list": list, "tuple": tuple}[kind](map(decode_containers, values))


def map_levels(f: Callable, stacked: Any, levels_at_once: int | None = None) -> Any:
    """Map `f` over the leading levels axis of a tree, under `jit`: the same code, wide or narrow.

    Args:
        f: a function of the tree without that axis.
        stacked: a tree whose leaves all have the axis.
        levels_at_once: how many levels are vmapped together. By default all on an accelerator, and
            one on a CPU, where more are no faster and take more memory.
    """
    if levels_at_once is None and jax.default_backend() != "cpu":
        levels_at_once = jax.tree.leaves(stacked)[0].shape[0]
    return jax.lax.map(f, stacked, batch_size=levels_at_once)


def unstack(tree: Any) -> list[Any]:
    """Return a tree with a leading levels axis as a list of trees without."""
    (levels,) = {len(leaf) for leaf in jax.tree.leaves(tree)}
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(levels)]


def stack(levels: Sequence[Any]) -> Any:
    """Return trees as one with a leading levels axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *levels)


def _is_a(leaf: Any, kind: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, kind)


def _check_leaf(path: str, leaf: Any) -> None:
    if not (_is_a(leaf, jnp.floating) or _is_a(leaf, jnp.bool_)):
        kind = getattr(leaf, "dtype", type(leaf).__name__)
        raise TypeError(
            f"leaf {path!r} is of {kind} and cannot be pruned: leave it out by "
            "`prunable`, which selects it"
        )
    if np.size(leaf) == 0:
        raise ValueError(
            f"leaf {path!r} is empty, shape {jnp.shape(leaf)}, and cannot be pruned: "
            "leave it out by `prunable`, which selects it"
        )
