"""Which weights of a layer stay, and what they become: least squares under a mask.

A `LeastSquares` comes in from `layerwise`; all arrays are (batched, inputs, outputs).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import select
from jaxprune.criteria.layerwise import LeastSquares
from jaxprune.types import Array

_TOLERANCE, _STEPS = 1e-5, 200  # of conjugate gradients: of the residual, and at most so many
_HELD = 1 << 23  # elements of the matrices that are solved side by side


class Normal(NamedTuple):
    r"""The normal equations $H V = G$ of a layer, damped.

    Attributes:
        left: $H = X^T X + \lambda I$, (batched, inputs, inputs); positive definite.
        right: $G = X^T X_d W + \lambda W$, (batched, inputs, outputs).
    """

    left: Array
    right: Array


def normal(given: LeastSquares, damping: float) -> Normal:
    r"""Return the normal equations of a layer.

    Damping pulls weights towards those of the dense network, and not towards zero; the bias is not
    damped.

    Args:
        given: the layer's problem.
        damping: $\lambda$, as a share of the mean of the diagonal of $X^T X$; positive.
    """
    moments, weights, free = given.moments, given.weights, given.free
    n = moments.shape[-1]
    diagonal = jnp.diagonal(moments, axis1=-2, axis2=-1)[:, : n - free]
    mean = jnp.mean(diagonal, axis=-1)[:, None]
    bias = (jnp.arange(n) >= n - free)[None]
    tiny = jnp.finfo(moments.dtype).eps
    scale = jnp.where(bias, tiny, damping * jnp.where(mean > 0, mean, 1))
    left = moments + scale[:, :, None] * jnp.eye(n, dtype=moments.dtype)[None]
    weights = weights.astype(left.dtype)
    return Normal(left, given.cross @ weights + scale[:, :, None] * weights)


def largest(scores: Array, pruned: Any, n_m: tuple[int, int] | None = None) -> Array:
    """Keep all but the `pruned` smallest scores, or n of every m inputs of an output."""
    if n_m is None:
        return select.keep_largest(scores.ravel(), jnp.asarray(pruned, jnp.int32)[None])[0].reshape(
            scores.shape
        )
    return select.keep_in_windows(scores, *n_m, axis=1)


def by_loss(
    start: Array, inverse: Array, worth: Array, pruned: Any, n_m: Any, free: int
) -> Array:  # fmt: skip
    r"""Keep the weights without which the error would rise most, $c_o v^2 / (H^{-1})_{ii}$.

    Args:
        start: the solution without a mask.
        inverse: of the left side.
        worth: $c$, how much an error of each output counts, (batched, outputs).
        pruned: as of `largest`, like `n_m`.
        n_m: likewise.
        free: how many of the last inputs are no weights.
    """
    rise = worth[:, None] * start**2 / jnp.diagonal(inverse, axis1=-2, axis2=-1)[..., None]
    return largest(rise[:, : start.shape[1] - free], pruned, n_m)


@jax.jit
def objective(equations: Normal, weights: Array, worth: Array) -> Array:
    r"""Return the damped error of weights, weighted, but for what is the same for all."""
    errors = weights * (equations.left @ weights - 2 * equations.right)
    return jnp.sum(worth[:, None] * errors)


def refit(equations: Normal, kept: Array, whole: tuple[Array, Array] | None = None) -> Array:
    """Solve the equations of every output for the inputs that it keeps; others are zero.

    Args:
        equations: of the layer.
        kept: (batched, inputs, outputs), bool.
        whole: what `unconstrained` returns, if it is known.
    """
    outputs = kept.shape[2]
    most = int(jnp.max(jnp.sum(kept, axis=1), initial=0))
    if 5 * most > kept.shape[1]:
        start, inverse = whole or unconstrained(equations)
        return _iterated(equations, kept, start, inverse)
    width = min(kept.shape[1], _bucket(most))
    at_once = max(1, min(outputs, _HELD // width**2))
    padding = ((0, 0), (0, 0), (0, -outputs % at_once))
    right, keep = jnp.pad(equations.right, padding), jnp.pad(kept, padding)
    solved = [
        jnp.stack([
            _columns(left, right[b, :, i : i + at_once], keep[b, :, i : i + at_once], width)
            for b, left in enumerate(equations.left)
        ])
        for i in range(0, right.shape[2], at_once)
    ]  # fmt: skip
    return jnp.concatenate(solved, axis=2)[..., :outputs]


def _linear(name: str, *arrays: Array) -> Any:
    """Return what a function of `numpy.linalg` does; on other devices, of `jax.numpy.linalg`.

    XLA on CPUs (jax 0.10) factorises on the threads that it waits with, and may wait for itself for
    ever; NumPy runs the same routines.

    Raises:
        numpy.linalg.LinAlgError: a matrix is singular, or not positive definite.
    """
    if jax.default_backend() != "cpu":
        return getattr(jnp.linalg, name)(*arrays)
    found = getattr(np.linalg, name)(*map(np.asarray, arrays))
    return jax.tree.map(jnp.asarray, tuple(found) if isinstance(found, tuple) else found)


def _bucket(n: int) -> int:
    """Return the next of sizes that grow by a fifth, so that few programs are compiled."""
    size = 8
    while size < n:
        size = max(size + 1, size * 6 // 5)
    return size


def _columns(left: Array, right: Array, kept: Array, width: int) -> Array:
    """Solve for some outputs, each of which keeps at most `width` inputs."""
    index, there, matrices, wanted = _chosen(left, right, kept, width)
    solved = _linear("solve", matrices, wanted[..., None])[..., 0]
    return _placed(solved, index, there, kept)


@partial(jax.jit, static_argnames="width")
def _chosen(left: Array, right: Array, kept: Array, width: int) -> tuple[Array, ...]:
    """Return of each output the inputs kept, which of them are no padding, and their equations."""

    def column(right: Array, keep: Array) -> tuple[Array, ...]:
        index = jnp.argsort(~keep, stable=True)[:width]
        there = keep[index]
        inside = there[:, None] & there[None]
        matrix = jnp.where(inside, left[index[:, None], index], jnp.eye(width, dtype=left.dtype))
        return index, there, matrix, jnp.where(there, right[index], 0)

    return jax.vmap(column, 1)(right, kept)


@jax.jit
def _placed(solved: Array, index: Array, there: Array, kept: Array) -> Array:
    """Return solutions where the inputs are that they are of, (inputs, outputs)."""

    def column(solved: Array, index: Array, there: Array, keep: Array) -> Array:
        return jnp.zeros(keep.shape, solved.dtype).at[index].set(jnp.where(there, solved, 0))

    return jax.vmap(column, (0, 0, 0, 1), 1)(solved, index, there, kept)


@jax.jit
def _iterated(equations: Normal, kept: Array, start: Array, inverse: Array) -> Array:
    """Solve by conjugate gradients, with the inverse of the whole left side to guide them.

    Where much is kept, a few dozen products of the layer's size take the place of a factor an
    output.
    """
    left, right = equations

    def masked(x: Array) -> Array:
        return jnp.where(kept, x, 0)

    def dot(x: Array, y: Array) -> Array:
        return jnp.sum(x * y, axis=1, keepdims=True)

    def ratio(x: Array, y: Array) -> Array:
        return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), 0)

    wanted = _TOLERANCE**2 * dot(masked(right), masked(right))

    def unfinished(found: Any) -> Array:
        _, residual, *_, steps = found
        return jnp.any(dot(residual, residual) > wanted) & (steps < _STEPS)

    def step(found: Any) -> Any:
        solved, residual, direction, size, steps = found
        moved = masked(left @ direction)
        # Outputs that are done stand still: rounding would blow up what is left of them.
        going = dot(residual, residual) > wanted
        along = jnp.where(going, ratio(size, dot(direction, moved)), 0)
        solved, residual = solved + along * direction, residual - along * moved
        guided = masked(inverse @ residual)
        new = dot(residual, guided)
        return solved, residual, guided + ratio(new, size) * direction, new, steps + 1

    solved = masked(start)
    residual = masked(right - left @ solved)
    guided = masked(inverse @ residual)
    first = solved, residual, guided, dot(residual, guided), 0
    return jax.lax.while_loop(unfinished, step, first)[0]


def unconstrained(equations: Normal) -> tuple[Array, Array]:
    """Return the solution without a mask, and the inverse of the left side."""
    inverse = _linear("inv", equations.left)
    return inverse @ equations.right, inverse


def sweep(inverse: Array, weights: Array, kept: Array, block: int) -> Array:
    """Remove what is not kept input by input, each time correcting the inputs after it.

    Args:
        inverse: of the left side, (batched, inputs, inputs).
        weights: to start from.
        kept: bool, like the weights.
        block: inputs between which later ones are corrected at once; results do not depend on it.
    """
    return _swept(jnp.swapaxes(_linear("cholesky", inverse), -1, -2), weights, kept, block)


@partial(jax.jit, static_argnames="block")
def _swept(upper: Array, weights: Array, kept: Array, block: int) -> Array:
    n = kept.shape[1]

    def layer(args: Any) -> Array:
        upper, weights, kept = args
        for start in range(0, n, block):
            end = min(start + block, n)
            part, own = weights[start:end], upper[start:end, start:end]

            def step(i: Array, found: Any, own: Array = own, start: int = start) -> Any:
                part, errors = found
                error = jnp.where(kept[start + i], 0, part[i]) / own[i, i]
                row = jnp.where(jnp.arange(own.shape[0]) >= i, own[i], jnp.zeros_like(own[i]))
                return part - row[:, None] * error[None], errors.at[i].set(error)

            part, errors = jax.lax.fori_loop(0, end - start, step, (part, jnp.zeros_like(part)))
            weights = weights.at[start:end].set(part)
            if end < n:
                weights = weights.at[end:].add(-upper[start:end, end:].T @ errors)
        return jnp.where(kept, weights, 0)

    return jax.lax.map(layer, (upper, weights, kept))


def admm(
    equations: Normal, start: Array, worth: Array, pruned: Any, iterations: int, n_m: Any, free: int
) -> Array:
    """Return which weights are kept, by alternating between the layer's error and the count.

    Args:
        equations: of the layer.
        start: weights, whose largest share in the outputs are kept at first.
        worth: how much an error of each output counts, (batched, outputs).
        pruned: how many go.
        iterations: each of one product with the eigenvectors of the left side and back.
        n_m: see `largest`.
        free: how many of the last inputs are always kept.
    """
    left, right = equations
    scale = jnp.sqrt(jnp.diagonal(left, axis1=-2, axis2=-1))[..., None]
    parts, own = _linear("eigh", left / (scale * jnp.swapaxes(scale, -1, -2))), jnp.sqrt(worth)
    right, start = (own[:, None] * each for each in (right / scale, scale * start))
    return _alternated(*parts, right, start, pruned, iterations, n_m, free)


@partial(jax.jit, static_argnames=("iterations", "n_m", "free"))
def _alternated(
    values: Array, vectors: Array, right: Array, start: Array, pruned: Any, iterations: int,
    n_m: Any, free: int,
) -> Array:  # fmt: skip
    """Run `admm` on equations of a unit diagonal, whose left side is given by its eigenvectors."""
    n = right.shape[1]
    back = jnp.swapaxes(vectors, -1, -2)
    whole = jnp.broadcast_to((jnp.arange(n) >= n - free)[None, :, None], right.shape)

    def project(x: Array) -> tuple[Array, Array]:
        kept = largest(jnp.abs(x[:, : n - free]), pruned, n_m)
        kept = whole.at[:, : n - free].set(kept)
        return jnp.where(kept, x, 0), kept

    def step(_: Any, found: Any) -> Any:
        sparse, dual, rho = found
        solved = back @ (right - dual + rho * sparse)
        solved = vectors @ (solved / (values + rho)[..., None])
        sparse, _ = project(solved + dual / rho)
        return sparse, dual + rho * (solved - sparse), rho * _GROWTH

    first = project(start)[0]
    found = jax.lax.fori_loop(
        0, iterations, step, (first, jnp.zeros_like(first), jnp.asarray(_FIRST, first.dtype))
    )
    return project(found[0])[1][:, : n - free]


_FIRST, _GROWTH = 0.03, 1.02
