"""Random programs of the supported primitives: compact equals masked, or a group says why not."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import check_compact, derivative, masked_by_hand, quietly
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from jaxprune.structure import compaction, dependency_graph, group_masks

pytestmark = pytest.mark.filterwarnings("ignore:no group of the graph can be pruned")

Step = tuple[str, int, int]
"""An operation and two numbers, of which it takes its sizes and variants."""


@jax.custom_jvp
def leaky(x: Any) -> Any:
    return jnp.where(x > 0, x, 0.1 * x)


leaky.defjvp(lambda x, t: (leaky(*x), jnp.where(x[0] >= 0, 1.0, 0.2) * t[0]))


ELEMENTWISE: tuple[Callable[[Any], Any], ...] = (
    jax.nn.relu, jnp.tanh, jax.nn.sigmoid, jax.nn.softplus, jnp.abs, jnp.square, jax.nn.gelu,
    jax.nn.silu, leaky, jnp.cos, lambda x: x / (1 + x * x), lambda x: 0.5 - x,
    lambda x: jnp.where(x > 0.1, x, -0.3), lambda x: jnp.maximum(x, 0.2),
    lambda x: x * jax.nn.sigmoid(x), lambda x: jnp.exp(-x * x), lambda x: jnp.clip(x, -1.0, 1.0),
    lambda x: x * (x > 0).astype(x.dtype), lambda x: jax.lax.stop_gradient(x) * x,
)  # fmt: skip
WRAPPERS: tuple[Callable[[Any], Any], ...] = (lambda f: f, jax.jit, jax.checkpoint, jax.vmap)
WIDTHS = (3, 4, 6)


def along(vector: Any, x: Any, axis: int = -1) -> Any:
    """Return a vector spread along an axis."""
    shape = [1] * x.ndim
    shape[axis] = vector.size
    return jnp.broadcast_to(vector.reshape(shape), x.shape)


def normed(x: Any, axis: int, fast: bool) -> Any:
    mean = x.mean(axis, keepdims=True)
    var = (x * x).mean(axis, keepdims=True) - mean * mean if fast else x.var(axis, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 0.1)


def run(steps: list[Step], param: Callable[..., Any], x: Any) -> Any:
    """Return the program's result; `param(name, *shape)` gives its parameters.

    What an operation does not apply to it leaves as it is. The batch stays the first axis.
    """
    saved: list[Any] = []
    kernels: list[str] = []
    for number, (name, a, b) in enumerate(steps):
        key, n = f"{number}_{name}", x.shape[-1]
        if name == "dense":
            kernel = param(f"{key}_kernel", n, WIDTHS[a % 3])
            kernels.append(f"{key}_kernel")
            x = x @ kernel
            if b % 2:
                x = x + along(param(f"{key}_bias", WIDTHS[a % 3]), x)
        elif name == "tied" and kernels:
            kernel = param(kernels[a % len(kernels)])
            if kernel.shape[1] == n:
                x = x @ kernel.T
        elif name == "low_rank":
            m, k = WIDTHS[a % 3], WIDTHS[b % 3]
            x = x @ (param(f"{key}_left", n, m) @ param(f"{key}_right", m, k))
        elif name == "elementwise":
            x = WRAPPERS[b % len(WRAPPERS)](ELEMENTWISE[a % len(ELEMENTWISE)])(x)
        elif name == "bias":
            x = x + along(param(f"{key}_bias", n), x)
        elif name == "scale":
            x = x * along(param(f"{key}_scale", n), x)
        elif name == "constant":
            vector = jnp.asarray(np.linspace(-1, 1, n))
            x = x * along(vector, x) if a % 2 else x + along(vector, x)
        elif name == "save":
            saved.append(x)
        elif name == "join" and saved:
            other = saved[a % len(saved)]
            if b % 3 == 0 and other.shape == x.shape:
                x = x + other
            elif b % 3 == 1 and other.shape == x.shape:
                x = x * other
            elif other.shape[:-1] == x.shape[:-1] and n + other.shape[-1] <= 12:
                x = jnp.concatenate([x, other] if b % 2 else [other, x], axis=-1)
        elif name == "flatten":
            x = x.reshape(x.shape[0], -1) if x.size // x.shape[0] <= 24 else x
        elif name == "unflatten" and x.ndim < 4:
            k = 2 + a % 2
            if n % k == 0 and n > k:
                x = x.reshape(*x.shape[:-1], *((k, n // k) if b % 2 else (n // k, k)))
        elif name == "transpose" and x.ndim > 2:
            i = 1 + a % (x.ndim - 1)
            x = jnp.swapaxes(x, i, 1 + b % (x.ndim - 1))
        elif name == "matmul" and x.ndim == 3 and max(x.shape[1:]) <= 8:
            others = [s for s in saved if s.shape == x.shape] or [x]
            other = others[a % len(others)]
            x = jnp.einsum(("btn,bsn->bts", "btn,btm->bnm")[b % 2], x, other)
        elif name == "attention" and x.ndim == 3:
            q, k, v = (param(f"{key}_{c}", n, 2, 2) for c in "qkv")
            q, k, v = (jnp.einsum("btn,nhd->bthd", x, w) for w in (q, k, v))
            weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
            y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
            x = jnp.einsum("bthd,hdn->btn", y, param(f"{key}_out", 2, 2, n)) + (x if b % 2 else 0)
        elif name == "reduce":
            axis = 1 + a % (x.ndim - 1)
            reduce = (jnp.sum, jnp.max, jnp.mean, jnp.min, jnp.prod)[b % 5]
            if x.ndim > 2 and b % 2:
                x = reduce(x, axis=axis)
            else:
                x = x - reduce(x, axis=axis, keepdims=True)
        elif name == "norm":
            x = normed(x, 1 + a % (x.ndim - 1), bool(b % 2))
            if b % 3:
                x = x * along(param(f"{key}_scale", n), x) + along(param(f"{key}_bias", n), x)
        elif name == "softmax":
            x = jax.nn.softmax(x, axis=1 + a % (x.ndim - 1))
        elif name == "slice":
            start, stop = a % n, n - b % 2
            x = x[..., start:stop] if stop - start > 1 else x
        elif name == "pad":
            x = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((a % 2, b % 2),)) if n < 8 else x
        elif name == "split":
            if n % 2 == 0:
                left, right = jnp.split(x, 2, axis=-1)
                x = left * jax.nn.sigmoid(right) if a % 2 else jnp.concatenate([right, left], -1)
        elif name == "cumulate":
            x = (jnp.cumsum, jnp.cumsum, jax.lax.cummax)[b % 3](x, axis=1 + a % (x.ndim - 1))
        elif name == "reverse":
            x = jnp.flip(x, axis=1 + a % (x.ndim - 1))
        elif name == "take":
            order = np.arange(n)[:: -1 if a % 2 else 1][: n - b % 2]
            x = jnp.take(x, jnp.asarray(order), axis=-1) if n > 2 else jnp.sort(x, axis=-1)
        elif name == "fill":  # the last index is out of range
            fill = (0.0, 0.7)[b % 2]
            order = jnp.arange(1 if a % 2 else 0, x.shape[1] + 1)
            x = jnp.take(x, order, axis=1, mode="fill", fill_value=fill) if x.ndim > 2 else x
        elif name == "stack" and x.ndim < 4:
            others = [s for s in saved if s.shape == x.shape] or [jnp.tanh(x)]
            stacked = jnp.stack([x, others[a % len(others)]], axis=1 + b % x.ndim)
            first, second = jnp.unstack(jax.lax.optimization_barrier(stacked), axis=1 + b % x.ndim)
            x = first * second if a % 2 else stacked
        elif name == "tile" and x.size // x.shape[0] <= 12:
            at = 1 + a % (x.ndim - 1)
            x = jnp.tile(x, [2 if i == at else 1 for i in range(x.ndim)])
        elif name == "scatter":  # of whole units, or at some of them
            at = jnp.index_exp[:, 1:3] if b % 2 else jnp.index_exp[..., : n - 1]
            values = along(param(f"{key}_values", n), x[at]) if b % 2 and x.ndim > 2 else 0.5
            x = getattr(x.at[at], ("set", "add", "multiply", "min", "max")[a % 5])(values)
        elif name == "reorder":
            x, at = jnp.sort(x, axis=1 + b % (x.ndim - 1)), 1 + a % (x.ndim - 1)
            x = jax.lax.top_k(x, min(2, x.shape[at]), axis=at)[0]
        elif name == "convolution" and x.ndim == 3:
            x = convolved(key, a, b, param, x)
        elif name == "scan":
            x = scanned(key, a, b, param, x)
    return x


def convolved(key: str, a: int, b: int, param: Callable[..., Any], x: Any) -> Any:
    """Return a convolution along the second axis: full, in two groups, or depthwise; or a pool."""
    n = x.shape[-1]
    if b % 4 == 3:
        first, reduce = (-jnp.inf, jax.lax.max) if a % 2 else (0.0, jax.lax.add)
        # With a padding of two there are windows in the padding alone.
        padding = ((0, 0), (a % 3, (a + b) % 3), (0, 0))
        x = jax.lax.reduce_window(x, first, reduce, (1, 2, 1), (1, 1, 1), padding)
        return jnp.maximum(x, -9.0)
    groups = (1, 2 if n % 2 == 0 else 1, n)[b % 4]
    kernel = param(f"{key}_kernel", 2, n // groups, groups * (1 + a % 3))
    numbers = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1 + a % 2,), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def scanned(key: str, a: int, b: int, param: Callable[..., Any], x: Any) -> Any:
    """Return layers in a scan: over stacked parameters, or over the second axis of the value."""
    n = x.shape[-1]
    if b % 3 == 2 and x.ndim == 3:
        kernel = param(f"{key}_kernel", n, n)

        def cell(h: Any, t: Any) -> Any:
            h = jnp.tanh(t + h @ kernel)
            return h, h

        h, every = jax.lax.scan(cell, jnp.zeros_like(x[:, 0]), jnp.swapaxes(x, 0, 1))
        return jnp.swapaxes(every, 0, 1) if a % 2 else h
    m = WIDTHS[a % 3]
    layers = param(f"{key}_in", 2, n, m), param(f"{key}_out", 2, m, n)

    def step(h: Any, layer: Any) -> Any:
        y = ELEMENTWISE[b % len(ELEMENTWISE)](h @ layer[0]) @ layer[1]
        return (h + y if a % 2 else y), None

    return jax.lax.scan(jax.checkpoint(step) if b % 2 else step, x, layers)[0]


NAMES = (
    "dense dense dense tied low_rank elementwise elementwise bias scale constant save join join "
    "flatten unflatten transpose matmul attention reduce norm softmax slice pad split cumulate "
    "reverse take fill stack tile scatter reorder convolution convolution scan"
).split()
STEPS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.integers(0, 20), st.integers(0, 11)),
    min_size=1,
    max_size=8,
)


def make(steps: list[Step], rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Return `apply` and random parameters; a dense layer comes before and after the steps."""
    steps = [("dense", int(rng.integers(3)), int(rng.integers(2))), *steps]
    steps += [("dense", 0, 1)] if rng.random() < 0.9 else []
    params: dict[str, Any] = {}

    def create(name: str, *shape: int) -> Any:
        if name not in params:
            scale = 1 if len(shape) == 1 else np.sqrt(1 / np.prod(shape[:-1]))
            params[name] = rng.normal(size=shape) * scale
        return jnp.asarray(params[name])

    jax.eval_shape(lambda x: run(steps, create, x), jax.ShapeDtypeStruct(shape, np.float64))
    return lambda p, x: run(steps, lambda name, *_: p[name], x), params


def slope(apply: Any) -> Any:
    """Return the gradient with respect to the inputs, whose derivative is a second one."""
    return lambda params, x: jax.grad(lambda x: jnp.sum(jnp.sin(apply(params, x))))(x)


def check_program(steps: list[Step], seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (2, 3, 4) if rng.random() < 0.7 else (3, 4)
    with jax.enable_x64(True):
        apply, params = make(steps, rng, shape)
        x = rng.normal(size=shape) * (rng.random(shape) > 0.2)
        masked = derivative(apply)
        graph = dependency_graph(apply, params, x)
        for group in graph.groups:
            assert group.prunable or group.reason
        # Units, of groups that are prunable by their own account.
        sparsity = float(rng.choice([0.3, 0.5, 0.8]))
        scope = str(rng.choice(["group", "global"]))
        masks = jax.tree.map(
            np.asarray, group_masks(graph, params, sparsity, scope=scope, min_units=0)
        )
        plan = quietly(compaction, apply, params, masks, x)
        for group in graph.groups:
            if group.prunable and group.within is None:
                own = [m for m in group.members if m.role != "consumes"]
                rows = [(np.moveaxis(masks[m.path], m.axis, 0), m.index) for m in own]
                kept = sum(any(r[i == u].any() for r, i in rows) for u in range(group.size))
                # Of a group that goes whole, more may stay: the network is a constant without it.
                assert not kept or plan.widths[group.name][1] <= kept, group.name
        inputs = [x, rng.normal(size=(5, *shape[1:]))] if rng.random() < 0.2 else [x]
        # XLA may compute a maximum twice and find it nowhere, so that its gradient is infinite.
        found = [masked(masked_by_hand(params, masks), x) for x in inputs]
        assume(all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found)))
        check_compact(masked, params, masks, plan, inputs, 1e-9)
        if rng.random() < 0.1:
            slopes = SimpleNamespace(
                apply=slope(plan.apply), params=plan.params, shrink=plan.shrink, expand=plan.expand
            )
            # A slope is a sum that may cancel, as that of a softmax does.
            check_compact(derivative(slope(apply)), params, masks, slopes, [x], 1e-9, scale=1.0)
        # Weights, and whole rows and columns, which leave units without inputs or outputs.
        masks = {path: weight_mask(leaf.shape, rng) for path, leaf in params.items()}
        plan = quietly(compaction, apply, params, masks, x, fold=False)
        check_compact(masked, params, masks, plan, [x], 1e-9)
        plan = quietly(compaction, apply, params, masks, x)
        if any(np.any(np.asarray(plan.expand(plan.params)[k]) != np.where(m, params[k], 0))
               for k, m in masks.items()):  # fmt: skip
            check_compact(masked, params, masks, plan, [x], 1e-9, folded=True)


def weight_mask(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    mask = rng.random(shape) < rng.choice([0.3, 0.7, 1.0])
    for axis, n in enumerate(shape):
        gone = rng.random(n) < rng.choice([0.0, 0.5])
        mask &= ~gone.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return mask


LIMITS: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=4, derandomize=True, database=None, **LIMITS)
@given(STEPS, st.integers(0, 2**31))
def test_random_programs(steps: list[Step], seed: int) -> None:
    check_program(steps, seed)


@pytest.mark.slow
@settings(max_examples=200, **LIMITS)
@given(STEPS, st.integers(0, 2**31))
def test_many_random_programs(steps: list[Step], seed: int) -> None:
    check_program(steps, seed)
