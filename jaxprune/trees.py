"""Leaf paths, which leaves may be pruned, and the checks that two trees match.

Any tree of arrays comes in; `sparsity`, `scores` and `masks` ask here which leaves take part.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.types import Params, Prunable


def paths_and_leaves(tree: Params) -> list[tuple[str, Any]]:
    """Return (path, leaf) in flatten order; a path reads `hidden_0/kernel`."""
    flat, _ = jax.tree.flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in flat]


def default_prunable(path: str, leaf: Any) -> bool:
    """Tell whether a leaf has two axes or more and lies outside a layer named `logits`."""
    return np.ndim(leaf) >= 2 and "logits" not in path.split("/")


def prunable_leaves(tree: Params, prunable: Prunable | None = None) -> list[bool]:
    """Tell for every leaf, in flatten order, whether it may be pruned.

    Args:
        tree: parameters, scores or masks (without a levels axis).
        prunable: `(path, leaf) -> bool`; by default `default_prunable`, which needs the output
            layer to be named `logits`.

    Raises:
        ValueError: no path contains `logits` and no `prunable` is given, or an empty leaf is
            selected.
        TypeError: a leaf is selected that is not an array of real floating point numbers
            (or, in a tree of masks, of booleans).
    """
    flat = paths_and_leaves(tree)
    if prunable is None:
        if flat and not any("logits" in path.split("/") for path, _ in flat):
            raise ValueError(
                "no layer is named `logits`, so the output layer is not known: pass "
                "prunable=lambda path, leaf: ..., which tells the leaves to prune; the paths are "
                + ", ".join(path for path, _ in flat[:8])
            )
        prunable = default_prunable
    selected = [bool(prunable(path, leaf)) for path, leaf in flat]
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
            f"got {type(tree).__name__} (flax.core.unfreeze or nnx.to_pure_dict make dicts)"
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


def _check_leaf(path: str, leaf: Any) -> None:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jnp.floating) or dtype == jnp.bool_):
        kind = dtype if dtype is not None else type(leaf).__name__
        raise TypeError(
            f"leaf {path!r} is of {kind} and cannot be pruned: leave it out by "
            "`prunable`, which selects it"
        )
    if np.size(leaf) == 0:
        raise ValueError(
            f"leaf {path!r} is empty, shape {jnp.shape(leaf)}, and cannot be pruned: "
            "leave it out by `prunable`, which selects it"
        )
