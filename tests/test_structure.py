"""The dependency graph, unit masks over groups, and compaction, on networks of a few lines."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import check_compact, derivative, masked_by_hand, quietly
from flax.training.train_state import TrainState

from jaxprune import distribution
from jaxprune.granularity import unit
from jaxprune.masks import apply_masks, masks_at
from jaxprune.structure import (
    compact,
    compaction,
    dependency_graph,
    group,
    group_masks,
    layers,
    prunable,
    remaining,
)


class Case(NamedTuple):
    """A network, the shape of an input, and the parameters left at half the units."""

    apply: Callable[[Any, Any], Any]
    params: Any
    shape: tuple[int, ...]
    left: int


def draw(shapes: Any, seed: int = 0) -> Any:
    """Random parameters of the given shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape) / 2, jnp.float32),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )


def of_module(module: nn.Module, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """A module's apply on all its variables, which are drawn."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.ones(shape, np.float32))
    drawn = draw(jax.tree.map(lambda s: s.shape, shapes))
    if "batch_stats" in drawn:
        drawn["batch_stats"] = jax.tree.map(jnp.abs, drawn["batch_stats"])
    return module.apply, drawn


def mlp() -> Case:
    def apply(params: Any, x: Any) -> Any:
        return jax.nn.relu(x @ params["hidden"]) @ params["logits"]

    return Case(apply, draw({"hidden": (5, 8), "logits": (8, 3)}), (5,), 5 * 4 + 4 * 3)


def norm_mlp() -> Case:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.gelu(nn.LayerNorm()(nn.Dense(8)(x)))
            return nn.Dense(3)(x)

    # Dense 6 * 4, LayerNorm 2 * 4, Dense 4 * 3 + 3.
    return Case(*of_module(Net(), (2, 5)), (5,), 24 + 8 + 15)


def lenet() -> Case:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
            x = x.reshape(x.shape[0], -1)
            return nn.Dense(3)(nn.tanh(nn.Dense(6)(x)))

    # Conv 10 * 2, Dense (3 * 3 * 2 + 1) * 3, Dense 4 * 3.
    return Case(*of_module(Net(), (2, 6, 6, 1)), (6, 6, 1), 20 + 57 + 12)


def residual() -> Case:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            def norm() -> nn.BatchNorm:
                return nn.BatchNorm(use_running_average=True)

            x = nn.relu(norm()(nn.Conv(4, (3, 3), use_bias=False)(x)))
            y = nn.relu(norm()(nn.Conv(6, (3, 3), (2, 2), use_bias=False)(x)))
            y = norm()(nn.Conv(8, (3, 3), use_bias=False)(y))
            x = nn.relu(y + norm()(nn.Conv(8, (1, 1), (2, 2), use_bias=False)(x)))
            return nn.Dense(3)(x.mean((1, 2)))

    kernels = 9 * 2 * 2 + 9 * 2 * 3 + 9 * 3 * 4 + 2 * 4
    return Case(*of_module(Net(), (2, 6, 6, 2)), (6, 6, 2), kernels + 4 * (2 + 3 + 4 + 4) + 15)


def attention() -> Case:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Dense(8)(x)
            x += nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=8)(x)
            return nn.Dense(3)(x)

    # A stream of 8 -> 4, 4 heads of 2 -> 2 heads.
    return Case(*of_module(Net(), (2, 6, 5)), (6, 5), 24 + 3 * (4 + 1) * 4 + (4 + 1) * 4 + 15)


def fused_attention() -> Case:
    def apply(params: Any, x: Any) -> Any:
        batch, length, _ = x.shape
        q, k, v = jnp.split((x @ params["qkv"]).reshape(batch, length, -1), 3, axis=-1)
        q, k, v = (a.reshape(batch, length, 4, 2) for a in (q, k, v))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * 2**-0.5)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, 8) @ params["out"]

    return Case(apply, draw({"qkv": (5, 24), "out": (8, 3)}), (6, 5), 5 * 12 + 4 * 3)


def dense_block() -> Case:
    def apply(params: Any, x: Any) -> Any:
        x = jnp.tanh(x @ params["stem"])
        x = jnp.concatenate([x, jnp.tanh(x @ params["grow"])], axis=1)
        return x @ params["logits"]

    shapes = {"stem": (5, 4), "grow": (4, 6), "logits": (10, 3)}
    return Case(apply, draw(shapes), (5,), 5 * 2 + 2 * 3 + (2 + 3) * 3)


def depthwise() -> Case:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.relu(nn.Conv(6, (1, 1))(x))
            x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=6)(x))
            return nn.Dense(3)(x.mean((1, 2)))

    # Pointwise 3 * 3, depthwise 10 * 3, Dense 4 * 3.
    return Case(*of_module(Net(), (2, 6, 6, 2)), (6, 6, 2), 9 + 30 + 12)


def grouped() -> Case:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.relu(nn.Conv(4, (1, 1))(x))
            x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=2)(x))
            return nn.Dense(3)(x.mean((1, 2)))

    # Groups of two inputs and four outputs are the units: one of two is left.
    return Case(*of_module(Net(), (2, 6, 6, 2)), (6, 6, 2), 6 + (18 * 4 + 4) + 15)


def scanned() -> Case:
    def apply(params: Any, x: Any) -> Any:
        @jax.checkpoint
        def layer(x: Any, p: Any) -> Any:
            return x + jax.nn.silu(x @ p["in"]) @ p["out"], jnp.float32(0)

        return jax.lax.scan(layer, x @ params["stem"], params["layers"])[0] @ params["logits"]

    layers = {"in": (3, 4, 6), "out": (3, 6, 4)}
    params = draw({"stem": (5, 4), "layers": layers, "logits": (4, 3)})
    return Case(apply, params, (5,), 5 * 2 + 3 * 2 * (2 * 3) + 2 * 3)


def sigmoid() -> Case:
    def apply(params: Any, x: Any) -> Any:
        return jax.nn.sigmoid(x @ params["hidden"] + params["bias"][None]) @ params["logits"]

    params = draw({"hidden": (5, 8), "bias": (8,), "logits": (8, 3)})
    return Case(apply, params, (5,), 5 * 4 + 4 + 4 * 3)


def branches() -> Case:
    def apply(params: Any, x: Any) -> Any:
        stacked = jnp.stack([jnp.tanh(x @ params["a"]), jax.nn.relu(x @ params["b"])], 1)
        first, second = jnp.unstack(jax.lax.optimization_barrier(stacked), axis=1)
        return (stacked.mean(1) + first * second) @ params["logits"]

    return Case(apply, draw({"a": (5, 8), "b": (5, 8), "logits": (8, 3)}), (5,), 10 * 4 + 4 * 3)


def tokens() -> Case:
    """A class token for every image, grouped heads, and positions that are set and added to."""

    def apply(params: Any, x: Any) -> Any:
        x = x @ params["patch"]
        x = jnp.concatenate([jnp.tile(params["class"], (x.shape[0], 1, 1)), x], 1)
        x = x.at[:, 1:].add(params["position"][None]).at[:, 0].multiply(2).at[:, 3].set(0)
        q = (x @ params["q"]).reshape(*x.shape[:2], 4, 2)
        k = jnp.tile((x @ params["k"]).reshape(*x.shape[:2], 2, 2), (1, 1, 2, 1))
        x = x * jnp.sum(jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k)), (1, 2))[..., None]
        best, _ = jax.lax.top_k(jnp.swapaxes(jnp.flip(jnp.sort(x, 1), 1), 1, 2), 2)
        return best.sum(2) @ params["logits"]

    shapes = {"patch": (5, 8), "class": (1, 1, 8), "position": (6, 8), "q": (8, 8), "k": (8, 4),
              "logits": (8, 3)}  # fmt: skip
    # The stream loses half, and every head, of queries and of keys, one of its two dimensions.
    return Case(apply, draw(shapes), (6, 5), 20 + 4 + 24 + 4 * 4 + 4 * 2 + 12)


CASES = {
    f.__name__: f
    for f in [mlp, norm_mlp, lenet, residual, attention, fused_attention, dense_block, depthwise,
              grouped, scanned, sigmoid, branches, tokens]
}  # fmt: skip


def normal(*shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), np.float32)


def check_values(apply: Any, params: Any, masks: Any, plan: Any, x: Any) -> None:
    """The compact network gives what the masked one gives."""
    found = jax.jit(plan.apply)(plan.params, x)
    expected = jax.jit(apply)(masked_by_hand(params, masks), x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def inputs(case: Case, batch: int) -> Any:
    x = np.random.default_rng(batch).normal(size=(batch, *case.shape))
    x[0] = 0  # where derivatives at exact zeros are taken
    return jnp.asarray(x, jax.tree.leaves(case.params)[0].dtype)


@pytest.mark.parametrize("name", CASES)
def test_compact_equals_masked(name: str) -> None:
    case = CASES[name]()
    graph = dependency_graph(case.apply, case.params, inputs(case, 3))
    masks = group_masks(graph, case.params, 0.5)
    plan = compaction(case.apply, case.params, masks, inputs(case, 3))
    assert sum(leaf.size for leaf in jax.tree.leaves(plan.params)) == case.left
    shapes = jax.eval_shape(lambda params: params, case.params)
    assert remaining(case.apply, shapes, inputs(case, 3))(masks) == case.left
    masked = derivative(case.apply)
    check_compact(masked, case.params, masks, plan, [inputs(case, 3), inputs(case, 2)], 1e-5)
    restored = plan.expand(plan.params)
    jax.tree.map(np.testing.assert_array_equal, plan.shrink(restored), plan.params)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_compact_equals_masked_in_double_precision(name: str) -> None:
    # Flax promotes the statistics of LayerNorm with float32.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        case = CASES[name]()
        case = case._replace(params=jax.tree.map(lambda w: w.astype(np.float64), case.params))
        x = inputs(case, 3)
        graph = dependency_graph(case.apply, case.params, x)
        masks = group_masks(graph, case.params, 0.3)
        plan = compaction(case.apply, case.params, masks, x)
        check_compact(derivative(case.apply), case.params, masks, plan, [x], 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_nothing_pruned(name: str) -> None:
    case = CASES[name]()
    masks = jax.tree.map(lambda w: jnp.ones(w.shape, bool), case.params)
    plan = compaction(case.apply, case.params, masks, inputs(case, 2))
    jax.tree.map(np.testing.assert_array_equal, plan.params, case.params)
    assert all(before == after for before, after in plan.widths.values())


def test_groups_of_a_block() -> None:
    case = attention()
    graph = dependency_graph(case.apply, case.params, inputs(case, 2))
    found = {group.name.removeprefix("params/"): group for group in graph.groups}
    block = "MultiHeadDotProductAttention_0"
    stream = found["Dense_0/kernel"]
    assert (stream.size, stream.prunable, len(stream.members)) == (8, True, 8)
    heads = found[f"{block}/key/kernel[1]"]
    assert (heads.size, heads.prunable, len(heads.members)) == (4, True, 7)
    inner = found[f"{block}/key/kernel[2]"]
    assert (inner.size, inner.prunable, inner.within) == (2, True, heads.name)
    assert found["Dense_1/kernel"].reason == "it reaches the network's output"
    assert found["Dense_0/kernel[0]"].reason == "it is an axis of the input"


def test_graph_prints_groups_leaves_sizes_and_reasons() -> None:
    case = dense_block()
    assert str(dependency_graph(case.apply, case.params, inputs(case, 2))).splitlines() == [
        "grow      6 units             prunable",
        "  grow    axis 1              produces",
        "  logits  axis 0 from 4 to 9  consumes",
        "logits    3 units             not prunable: it reaches the network's output",
        "  logits  axis 1              produces",
        "stem[0]   5 units             not prunable: it is an axis of the input",
        "  stem    axis 0              consumes",
        "stem      4 units             prunable",
        "  grow    axis 0              consumes",
        "  logits  axis 0 from 0 to 3  consumes",
        "  stem    axis 1              produces",
    ]


def through(f: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """A network with `f` at its hidden layer."""
    return lambda params, x: f(x @ params["hidden"]) @ params["logits"]


HIDDEN = {"hidden": (5, 6), "logits": (6, 3)}


@jax.custom_vjp
def own_rule(x: Any) -> Any:
    return x


own_rule.defvjp(lambda x: (x, None), lambda _, g: (g,))


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda x: x * jnp.exp(x).cumsum(1), "cumsum runs over it"),
        (lambda x: x * (2 + x).prod(1, keepdims=True), "reduce_prod runs over it"),
        (lambda x: jnp.sort(x, axis=1), "sorted"),
        (lambda x: x[:, ::-1], "reversed"),
        (lambda x: x + jnp.argmax(x, 1, keepdims=True).astype(x.dtype), "indexed by argmax"),
        (lambda x: x.reshape(-1, 3, 2).transpose(0, 2, 1).reshape(-1, 3, 2).reshape(-1, 6), ""),
        (lambda x: jnp.linalg.cholesky(x[:, :, None] * x[:, None, :]).sum(2), "not understood"),
        (own_rule, "custom_vjp_call"),
        (lambda x: jax.lax.while_loop(lambda y: y.sum() < 0, lambda y: y + 1, x), "while"),
        (lambda x: jax.lax.cond(x.sum() > 0, lambda y: y, lambda y: -y, x), "cond"),
        (lambda x: jnp.fft.irfft(jnp.fft.rfft(x)), "transformed by fft"),
    ],
)
def test_what_cannot_be_pruned(f: Callable[[Any], Any], reason: str) -> None:
    apply, params, x = through(f), draw(HIDDEN), jnp.ones((2, 5))
    group = dependency_graph(apply, params, x)["hidden"] if reason else None
    if group is not None:
        assert not group.prunable
        assert reason in str(group.reason)
        with pytest.raises(ValueError, match="group 'hidden' cannot be pruned"):
            group_masks(
                dependency_graph(apply, params, x),
                params,
                0.5,
                prunable=lambda g: g.name == "hidden",
            )
    # Masks may come from anywhere: what cannot be removed stays, and the function is the same.
    masks = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    masks["hidden"] = masks["hidden"].at[:, 1].set(False)
    plan = compaction(apply, params, masks, x)
    x = normal(2, 5)
    check_values(apply, params, masks, plan, x)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: jnp.cumsum(x, axis=1),
        lambda x: x / jnp.sqrt(jnp.mean(x * x, axis=1, keepdims=True) + 1),
        lambda x: jnp.pad(x, ((0, 0), (1, 2)))[:, 1:-2],
        lambda x: jnp.split(jnp.concatenate([x, x], axis=1), 2, axis=1)[1],
        lambda x: jnp.where(jnp.arange(6)[None] < 3, x, 2 * x),
        lambda x: jax.random.bernoulli(jax.random.key(0), 0.5, x.shape).astype(x.dtype) * x,
        lambda x: x * jnp.arange(1.0, 7.0)[None],
        lambda x: jax.nn.relu(x) + jnp.arange(6.0)[None],  # zero at the first unit, if masked
        lambda x: jnp.where(x > 0, x, 0.1 * x) + jnp.zeros(6)[None],
        lambda x: jax.jit(jnp.tanh)(jax.checkpoint(jnp.sin)(x)),
        lambda x: jax.vmap(jnp.tanh)(x),
        jax.nn.relu6,
        jax.nn.silu,
        jnp.abs,
    ],
)
def test_what_can_be_pruned(f: Callable[[Any], Any]) -> None:
    apply, params, x = through(f), draw(HIDDEN), normal(3, 5)
    graph = dependency_graph(apply, params, x)
    masks = group_masks(graph, params, 0.5)
    plan = compaction(apply, params, masks, x)
    assert plan.widths["hidden"] == (6, 3)
    check_values(apply, params, masks, plan, x)


def test_merged_axes_are_not_axes_end_to_end() -> None:
    def apply(params: Any, x: Any) -> Any:
        x = x @ params["hidden"]
        left, right = x[:, :2], x[:, 2:]
        products = (left[:, :, None] * right[:, None, :]).reshape(-1, 4)
        return (x + products) @ params["logits"]  # of as many parts, and each part the same

    params, x = draw({"hidden": (5, 4), "logits": (4, 3)}), normal(3, 5)
    graph = dependency_graph(apply, params, x)
    assert not any(group.prunable for group in graph.groups)
    masks = jax.tree.map(lambda w: np.ones(w.shape, bool), params)
    masks["hidden"][:, [0, 2]] = False
    check_values(apply, params, masks, compaction(apply, params, masks, x), x)


# What removed units share --------------------------------------------------------------------


SPARSITIES = [
    pytest.param(0.3, marks=pytest.mark.slow),
    0.5,
    pytest.param(0.8, marks=pytest.mark.slow),
]


def centred(x: Any) -> Any:
    return x - x.mean(-1, keepdims=True)


def layer_norm(x: Any, params: Any) -> Any:
    normed = centred(x) / jnp.sqrt((centred(x) ** 2).mean(-1, keepdims=True) + 1e-5)
    return normed * params["scale"][None] + params["shift"][None]


SHARED: dict[str, Callable[[Any, Any], Any]] = {
    "two-pass LayerNorm": layer_norm,
    "of a residual stream": lambda x, p: x + jnp.tanh(layer_norm(x, p) @ p["square"]),
    "softmax": lambda x, p: jax.nn.softmax(x),
    "softmax, shifted by hand": lambda x, p: jnp.exp(x - x.max(1, keepdims=True)),
    "sigmoid": lambda x, p: x * jax.nn.sigmoid(x).sum(1, keepdims=True),
    "log-sum-exp": lambda x, p: x - jax.nn.logsumexp(x, axis=1, keepdims=True),
    "a sum beside": lambda x, p: x / (1 + jnp.exp(x).sum(1, keepdims=True)),
    "variance": lambda x, p: x - x.mean(1, keepdims=True) / x.var(1, keepdims=True),
    "fourth moment": lambda x, p: x * jnp.tanh((centred(x) ** 4).mean(1, keepdims=True)),
    "smallest": lambda x, p: x * (x - x.mean(1, keepdims=True)).min(1, keepdims=True),
    "twice": lambda x, p: layer_norm(layer_norm(x, p), p),
}
SHARED_FIRST = {"two-pass LayerNorm", "of a residual stream", "softmax", "log-sum-exp", "smallest"}


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in SHARED_FIRST else pytest.mark.slow) for n in SHARED],
)
def test_units_that_share_a_value_are_removed_exactly(name: str, sparsity: float) -> None:
    def apply(params: Any, x: Any) -> Any:
        return SHARED[name](x @ params["hidden"], params) @ params["logits"]

    shapes = {"hidden": (5, 10), "scale": (10,), "shift": (10,), "square": (10, 10)}
    params, x = draw({**shapes, "logits": (10, 3)}), normal(3, 5)
    masks = group_masks(dependency_graph(apply, params, x), params, sparsity)
    plan = compaction(apply, params, masks, x, fold=False)
    assert plan.params["hidden"].shape == (5, 10 - round(10 * sparsity))
    check_compact(derivative(apply), params, masks, plan, [x, normal(7, 5)], 1e-5)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda w: jnp.asarray(w, np.float64), params)
        plan = compaction(apply, params, masks, jnp.asarray(x, np.float64), fold=False)
        wide = [jnp.asarray(x, np.float64)]
        check_compact(derivative(apply), params, masks, plan, wide, 1e-12)


@pytest.mark.parametrize("more_goes", [False, True])
def test_units_stay_whose_shared_value_is_another_once_others_are_gone(more_goes: bool) -> None:
    """A sigmoid's unit is 1/2, as all that goes shares; a unit of zeros, gone later, is not."""

    def apply(params: Any, x: Any) -> Any:
        late = jax.nn.relu(jax.nn.relu(x @ params["before"]) @ params["late"])
        both = jnp.concatenate([jax.nn.sigmoid(x @ params["half"]), late], axis=-1)
        scaled = centred(both) / jnp.sqrt((centred(both) ** 2).mean(-1, keepdims=True) + 0.1)
        return scaled @ params["logits"]

    params = draw({"before": (4, 3), "half": (4, 3), "late": (3, 3), "logits": (6, 2)})
    masks = {name: np.ones(leaf.shape, bool) for name, leaf in params.items()}
    masks["half"][:, 0] = masks["logits"][0] = masks["logits"][3] = False
    masks["late"][1:, 0] = False  # zero once the first unit of `before` is
    masks["before"][:, 0] = not more_goes
    plan = compaction(apply, params, masks, normal(5, 4))
    sizes = {name: leaf.shape for name, leaf in plan.params.items()}
    assert sizes == (
        {"before": (4, 2), "half": (4, 3), "late": (2, 2), "logits": (5, 2)}
        if more_goes
        else {"before": (4, 3), "half": (4, 2), "late": (3, 3), "logits": (5, 2)}
    )
    check_compact(derivative(apply), params, masks, plan, [normal(5, 4), normal(2, 4)], 1e-5)


def test_layer_norm_of_equinox_and_of_linen_with_slow_variance() -> None:
    class Net(nn.Module):
        fast: bool

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(3)(nn.LayerNorm(use_fast_variance=self.fast)(nn.Dense(6)(x)))

    for fast in (True, False):
        apply, params = of_module(Net(fast), (2, 5))
        x = normal(2, 5)
        masks = group_masks(dependency_graph(apply, params, x), params, 0.5)
        plan = compaction(apply, params, masks, x)
        assert plan.params["params"]["Dense_1"]["kernel"].shape == (5, 3)
        check_compact(derivative(apply), params, masks, plan, [x], 1e-5)

    def make(key: Any) -> Any:
        first, second = jax.random.split(key)
        parts = [
            eqx.nn.Linear(5, 6, key=first),
            eqx.nn.LayerNorm(6),
            eqx.nn.Linear(6, 3, key=second),
        ]
        return eqx.nn.Sequential(parts)

    params, static = eqx.partition(make(jax.random.key(0)), eqx.is_array)

    def apply_equinox(params: Any, x: Any) -> Any:
        return jax.vmap(eqx.combine(params, static))(x)

    x = normal(4, 5)
    masks = group_masks(dependency_graph(apply_equinox, params, x), params, 0.5)
    plan = compaction(apply_equinox, params, masks, x)
    assert plan.params.layers[2].weight.shape == (3, 3)
    check_compact(derivative(apply_equinox), params, masks, plan, [x, normal(2, 5)], 1e-5)


# Axes that vmap made, and strides ------------------------------------------------------------


REACHED: dict[str, tuple[Callable[[Any, Any], Any], Any, Any, str]] = {
    "mean over a batch by name": (
        lambda p, x: jax.nn.relu(
            jax.vmap(lambda v: v @ p["a"] - jax.lax.pmean(v @ p["a"], "b"), axis_name="b")(x)
        ) @ p["c"],
        {"a": (5, 8), "c": (8, 3)}, (4, 5), "a",
    ),
    "interleaved gates": (
        lambda p, x: (jax.nn.silu((x @ p["a"])[..., ::2]) * (x @ p["a"])[..., 1::2]) @ p["c"],
        {"a": (5, 16), "c": (8, 3)}, (4, 5), "a",
    ),
    "gates of three": (
        lambda p, x: jnp.prod(
            jnp.stack([jnp.tanh((x @ p["a"])[..., i::3]) for i in range(3)]), axis=0) @ p["c"],
        {"a": (5, 24), "c": (8, 3)}, (4, 5), "a",
    ),
    "interleaved rotary embedding": (
        lambda p, x: rotated(x @ p["a"]) @ p["c"],
        {"a": (5, 16), "c": (16, 3)}, (4, 5), "a",
    ),
    "fft over positions": (
        lambda p, x: jnp.real(jnp.fft.fft(x @ p["a"], axis=1).swapaxes(1, 2)).sum(2) @ p["c"],
        {"a": (5, 8), "c": (8, 3)}, (4, 6, 5), "a",
    ),
}  # fmt: skip


def rotated(x: Any) -> Any:
    angle = jnp.arange(4, dtype=x.dtype)[:, None] + 0 * x[:, ::2]
    a, b = x[:, ::2], x[:, 1::2]
    pair = a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)
    return jnp.stack(pair, -1).reshape(x.shape)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("name", REACHED)
def test_what_is_reached_shrinks_and_is_exact(name: str, sparsity: float) -> None:
    apply, shapes, shape, path = REACHED[name]
    params, x = draw(shapes), normal(*shape)
    masks = group_masks(dependency_graph(apply, params, x), params, sparsity)
    plan = compaction(apply, params, masks, x)
    units = shapes["c"][0] if name != "interleaved rotary embedding" else 8
    kept = units - round(units * sparsity)
    assert plan.params[path].shape == (5, shapes[path][1] // units * kept)
    more = [] if name.startswith("interleaved rotary") else [normal(2, *shape[1:])]
    check_compact(derivative(apply), params, masks, plan, [x, *more], 1e-5)


def test_scores_of_units_by_hand() -> None:
    params = {"hidden": jnp.array([[3.0, 1.0, 2.0], [4.0, 1.0, 2.0]]), "logits": jnp.ones((3, 2))}
    graph = dependency_graph(through(jnp.tanh), params, jnp.ones((2, 2)))
    masks = group_masks(graph, params, [0, 1 / 3, 0.5, 1], min_units=0)
    traced = jax.jit(lambda p: group_masks(graph, p, [0, 1 / 3, 0.5, 1], min_units=0))(params)
    jax.tree.map(np.testing.assert_array_equal, traced, masks)
    assert masks["hidden"][:, 0].tolist() == [
        [True, True, True], [True, False, True], [True, False, False], [False, False, False]
    ]  # fmt: skip
    assert masks["logits"].shape == (4, 3, 2)
    assert masks["logits"].all()
    scores = {"hidden": -params["hidden"] + 5, "logits": params["logits"]}
    assert group_masks(graph, params, 1 / 3, scores=scores)["hidden"][0].tolist() == [
        False, True, True
    ]  # fmt: skip


def chain() -> tuple[Any, Any, Any]:
    """A network like the challenge's, scaled down: dense layers without biases."""
    names = ["hidden_0", "hidden_1", "hidden_2", "logits"]

    def apply(params: Any, x: Any) -> Any:
        for name in names[:-1]:
            x = jax.nn.relu(x @ params[name]["kernel"])
        return x @ params["logits"]["kernel"]

    sizes = [49, 40, 30, 20, 10]
    shapes = zip(sizes[:-1], sizes[1:], strict=True)
    params = draw({name: {"kernel": s} for name, s in zip(names, shapes, strict=True)})
    return apply, params, jnp.ones((2, 49))


@pytest.mark.parametrize("scope", ["layer", pytest.param("global", marks=pytest.mark.slow)])
def test_groups_of_a_chain_are_its_units(scope: str) -> None:
    apply, params, x = chain()
    chosen = prunable(apply, params, x)
    kinds = unit(chosen, layers(apply, params, x)), group(dependency_graph(apply, params, x))
    found = []
    for granularity in kinds:
        counts = distribution.counts(
            params, [0, 0.3, 0.5, 0.9, 1], granularity=granularity, scope=scope
        )

        def pruned(scores: Any, counts: Any, granularity: Any = granularity) -> Any:
            kept = masks_at(scores, counts, granularity=granularity)
            other = jax.tree.map(lambda w: w[::-1, ::-1], scores)
            second = jax.tree.map(lambda mask: mask[2], kept)
            return kept, masks_at(other, counts, granularity=granularity, within=second)

        f = jax.jit(pruned)
        tied = jax.tree.map(jnp.round, params)
        found.append([f(params, counts), f(tied, counts)])
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize(
    "name",
    [
        "norm_mlp",
        "attention",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("dense_block", "sigmoid")),
    ],
)
def test_the_granularity_of_groups_is_that_of_their_masks(name: str) -> None:
    case = CASES[name]()
    graph = dependency_graph(case.apply, case.params, inputs(case, 2))
    expected = group_masks(graph, case.params, [0.25, 0.5])
    granularity = group(graph)
    counts = distribution.counts(case.params, [0.25, 0.5], granularity=granularity)
    assert granularity.name == "unit"
    assert list(counts) == [g.name for g in graph.groups if g.prunable and g.within is None]
    found = jax.jit(partial(masks_at, granularity=granularity))(case.params, counts)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    cost = granularity.cost(jax.eval_shape(lambda params: params, case.params))
    whole = sum(int(np.sum(weights)) for weights in cost.values())
    all_units = jax.tree.map(lambda c: np.full(1, c.size), cost)
    lost = masks_at(case.params, all_units, granularity=granularity)
    masked = sum(int(np.sum(~m)) for m in jax.tree.leaves(lost))
    assert masked == whole if name == "sigmoid" else 0 < masked <= whole  # groups meet in leaves


def test_groups_of_which_a_producing_leaf_may_not_be_pruned() -> None:
    case = branches()  # whose units are made by two leaves
    graph = dependency_graph(case.apply, case.params, inputs(case, 2))
    flags = jax.tree.map(lambda _: True, case.params)
    assert list(group(graph, flags).rank(case.params)) == ["a"]
    for chosen in (flags | {"b": False}, lambda path, leaf: path != "a"):
        granularity = group(graph, chosen)
        assert not granularity.rank(case.params) and not granularity.cost(case.params)
        assert all(m.all() for m in jax.tree.leaves(granularity.spread({}, case.params)))
    assert list(group(graph, flags | {"logits": False}).rank(case.params)) == ["a"]
    with pytest.raises(ValueError, match="leaf 'c' has shape .* made of another tree"):
        group(graph).rank(case.params | {"c": jnp.ones(2)})


def test_round_to_and_global_ranking() -> None:
    def apply(params: Any, x: Any) -> Any:
        return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["c"]

    params = draw({"a": (5, 8), "b": (8, 8), "c": (8, 3)})
    params["a"] *= 100
    graph = dependency_graph(apply, params, jnp.ones((2, 5)))
    masks = group_masks(graph, params, 0.25, scope="global")
    assert (masks["a"][0].sum(), masks["b"][0].sum()) == (8, 4)
    masks = group_masks(graph, params, 0.5, round_to=3)
    assert (masks["a"][0].sum(), masks["b"][0].sum()) == (6, 6)
    with pytest.raises(ValueError, match="round_to must be at least 1, got 0"):
        group_masks(graph, params, 0.5, round_to=0)
    with pytest.raises(ValueError, match="scope must be one of group, global, got 'layer'"):
        group_masks(graph, params, 0.5, scope="layer")
    with pytest.raises(ValueError, match="scores of leaf 'b' contain NaN or infinite"):
        group_masks(graph, params, 0.5, scores=params | {"b": params["b"] * jnp.nan})
    with pytest.raises(ValueError, match="leaf 'a' has shape .* made of another tree"):
        group_masks(graph, {"a": params["b"], "b": params["b"], "c": params["c"]}, 0.5)


def test_dead_units_cascade() -> None:
    def apply(params: Any, x: Any) -> Any:
        for name in "abc":
            x = jax.nn.relu(x @ params[name])
        return x @ params["d"]

    params = draw({"a": (3, 4), "b": (4, 4), "c": (4, 4), "d": (4, 2)})
    masks = jax.tree.map(lambda w: np.ones(w.shape, bool), params)
    masks["a"][:, 0] = False  # no inputs, and b's unit 0 has no other
    masks["b"][1:, 0] = False
    masks["d"][3] = False  # no outputs, and b's unit 3 goes nowhere else
    masks["b"][:, 3] = True
    masks["c"][3, :3] = False
    plan = compaction(apply, params, masks, jnp.ones((2, 3)))
    assert {name: plan.widths[name] for name in "abc"} == {"a": (4, 3), "b": (4, 2), "c": (4, 3)}
    assert remaining(apply, params, jnp.ones((2, 3)))(masks) == 3 * 3 + 3 * 2 + 2 * 3 + 3 * 2
    x = normal(5, 3)
    check_values(apply, params, masks, plan, x)


def test_a_live_chain_between_dead_ends_is_not_cut() -> None:
    def apply(params: Any, x: Any) -> Any:
        return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["c"]

    params = draw({"a": (2, 2), "b": (2, 2), "c": (2, 2)})
    masks = jax.tree.map(lambda w: np.ones(w.shape, bool), params)
    masks["b"][:] = [[True, False], [False, True]]
    plan = compaction(apply, params, masks, jnp.ones((2, 2)))
    assert plan.widths["a"] == plan.widths["b"] == (2, 2)


def test_constants_of_units_that_stay_are_not_folded() -> None:
    """The mean takes the unit's bias in, which learns: it cannot go, and its weights go on too."""

    def apply(params: Any, x: Any) -> Any:
        y = x @ params["kernel"] + params["bias"][None]
        mean = y.mean(-1, keepdims=True)
        scaled = (y - mean) * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) - mean**2 + 0.1)
        shifted = scaled * params["scale"][None] + params["shift"][None]
        return shifted @ params["last"] + params["out"][None]

    shapes = {"kernel": (4, 6), "bias": (6,), "scale": (6,), "shift": (6,), "last": (6, 3)}
    params, x = draw({**shapes, "out": (3,)}), normal(5, 4)
    masks = {name: np.ones(leaf.shape, bool) for name, leaf in params.items()}
    masks["kernel"][:, 2:] = False
    masks["scale"][:5] = False
    masks["shift"][[0, 1, 3, 5]] = False
    masks["last"][5] = False
    plan = compaction(apply, params, masks, x)
    jax.tree.map(np.testing.assert_array_equal, plan.params, masked_by_hand(params, masks))
    check_compact(derivative(apply), params, masks, plan, [x, normal(2, 4)], 1e-5)


def test_constants_are_folded_into_the_next_bias() -> None:
    def apply(params: Any, x: Any) -> Any:
        x = jax.nn.sigmoid(x @ params["a"]["kernel"] + params["a"]["bias"][None])
        return x @ params["b"]["kernel"] + params["b"]["bias"]

    layers = {"a": {"kernel": (3, 2), "bias": (2,)}, "b": {"kernel": (2, 1), "bias": (1,)}}
    with jax.numpy_rank_promotion("allow"):
        params = draw(layers)
        params["a"]["bias"] = jnp.array([0.0, 1.0])
        masks = jax.tree.map(lambda w: np.ones(w.shape, bool), params)
        masks["a"]["kernel"][:, 0] = False
        plan = compaction(apply, params, masks, jnp.ones((2, 3)))
        assert plan.widths["a/kernel"] == (2, 1)
        added = plan.params["b"]["bias"] - params["b"]["bias"]
        np.testing.assert_allclose(added, 0.5 * params["b"]["kernel"][0], rtol=1e-6)
        x = normal(5, 3)
        check_values(apply, params, masks, plan, x)


@pytest.mark.parametrize(
    ("width", "output"),
    [
        (1, lambda x, k, b: x @ k + b),
        (2, lambda x, k, b: (k.T @ x.T).T + b),
        (1, lambda x, k, b: b.reshape(1, -1) + x @ k),
        (1, lambda x, k, b: (b[:, None] + k.T @ x.T).T),
        (2, lambda x, k, b: x @ k * 2 + b),
        (2, lambda x, k, b: x @ k + 2 * b),
        (2, lambda x, k, b: x @ (k * 2) + b),
        (2, lambda x, k, b: (x @ k + b, b)),
        (2, lambda x, k, b: (x @ k + b, k)),
        (2, lambda x, k, b: (x @ k + b) * b.sum()),
        (2, lambda x, k, b: [y + b.at[0].add(y.mean()) for y in [x @ k]][0]),
        (2, lambda x, k, b: jax.lax.cond(True, lambda k: x @ k, lambda k: -x @ k, k) + b),
    ],
)
def test_constants_go_to_a_bias_and_through_a_kernel_of_no_other_use(
    width: int, output: Any
) -> None:
    def apply(params: Any, x: Any) -> Any:
        x = jax.nn.sigmoid(x @ params["a"]["kernel"] + params["a"]["bias"])
        return output(x, params["b"]["kernel"], params["b"]["bias"])

    layers = {"a": {"kernel": (3, 2), "bias": (2,)}, "b": {"kernel": (2, 2), "bias": (2,)}}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        params = draw(layers)
        masks = jax.tree.map(lambda w: np.ones(w.shape, bool), params)
        masks["a"]["kernel"][:, 0] = False
        plan = compaction(apply, params, masks, jnp.ones((2, 3)))
        assert plan.widths["a/kernel"] == (2, width)
        if jax.tree.structure(apply(params, normal(2, 3))).num_leaves == 1:
            check_values(apply, params, masks, plan, normal(5, 3))


@pytest.mark.parametrize(
    "output",
    [
        lambda h, k, b: jax.lax.dot_general(h, k, (((2,), (1,)), ((1,), (0,)))) + b[:, None],
        lambda h, k, b: jnp.tensordot(h, k, 2) + b[:4],
        lambda h, k, b: jax.lax.conv_general_dilated(
            h[:, 0], k.T, (), (), dimension_numbers=("NC", "IO", "NC")
        ) + b,
    ],
)  # fmt: skip
def test_what_is_added_to_other_products_than_of_matrices_is_no_bias(output: Any) -> None:
    def apply(params: Any, x: Any) -> Any:
        return output(jnp.tanh(x @ params["a"] + params["c"]), params["k"], params["b"])

    with jax.numpy_rank_promotion("allow"):
        params = draw({"a": (5, 3), "c": (3,), "k": (4, 3), "b": (4,)})
        masks = jax.tree.map(lambda w: np.ones(w.shape, bool), params)
        masks["a"][:, 1] = False
        plan = compaction(apply, params, masks, jnp.ones((4, 4, 5)))
        check_values(apply, params, masks, plan, normal(4, 4, 5))


def test_zeros_of_two_signs_are_no_one_constant() -> None:
    def apply(params: Any, x: Any) -> Any:
        turned = jnp.arctan2(np.array([0.0, -0.0, 0.0], np.float32), jnp.float32(-1))
        return jnp.sum(x @ params["a"] + turned[None], 1) @ params["out"]

    params = draw({"a": (5, 3), "out": (4, 2)})
    masks = jax.tree.map(lambda w: np.ones(w.shape, bool), params)
    masks["a"][:, 1] = False
    plan = compaction(apply, params, masks, jnp.ones((4, 5)))
    check_values(apply, params, masks, plan, normal(4, 5))


def test_complex_minima_and_choices_of_keys_stay_as_they_are() -> None:
    def apply(params: Any, x: Any) -> Any:
        keys = jax.random.split(jax.random.key(0), 3)
        chosen = jnp.where(np.array([True, True, True]), keys, keys[::-1])
        h = jnp.tanh(x @ params["a"])
        low = jnp.min(h + 1j * h, axis=0).real
        return h @ params["out"] + jax.random.normal(chosen[0], (2,))[None] + jnp.sum(low)

    with jax.numpy_dtype_promotion("standard"):
        params = draw({"a": (5, 3), "out": (3, 2)})
        masks = jax.tree.map(lambda w: np.ones(w.shape, bool), params)
        masks["a"][:, 1] = False
        plan = compaction(apply, params, masks, jnp.ones((4, 5)))
        check_values(apply, params, masks, plan, normal(4, 5))


def test_a_constant_without_a_bias_to_go_to_stays() -> None:
    apply, params = through(lambda x: jax.nn.sigmoid(x)), draw(HIDDEN)
    masks = jax.tree.map(lambda w: np.ones(w.shape, bool), params)
    masks["hidden"][:, 0] = False
    assert compaction(apply, params, masks, jnp.ones((2, 5))).widths["hidden"] == (6, 6)


def test_all_units_of_a_group_pruned() -> None:
    apply, params = through(jnp.tanh), draw(HIDDEN)
    graph = dependency_graph(apply, params, jnp.ones((2, 5)))
    with pytest.warns(UserWarning, match="every unit of 'hidden' is without effect; one is kept"):
        masks = group_masks(graph, params, 1, min_units=0)
        small, small_apply = compact(apply, params, masks, jnp.ones((2, 5)))
    assert small["hidden"].shape == (5, 1)
    np.testing.assert_array_equal(small_apply(small, jnp.ones((2, 5))), jnp.zeros((2, 3)))


@pytest.mark.parametrize("name", ["residual", "tokens", "scanned", "sigmoid"])
def test_what_remains_is_what_compaction_keeps(name: str) -> None:
    case = CASES[name]()
    count = remaining(case.apply, case.params, inputs(case, 2))
    rng = np.random.default_rng(0)
    for density in (0.9, 0.5, 0.1, 0.0):
        masks = jax.tree.map(lambda w, d=density: rng.random(w.shape) < d, case.params)
        plan = quietly(compaction, case.apply, case.params, masks, inputs(case, 2), fold=False)
        assert count(masks) == sum(int(m.sum()) for m in jax.tree.leaves(plan.masks))


def test_what_remains_of_some_leaves_and_of_bad_masks() -> None:
    case = mlp()
    masks = {"hidden": np.ones((5, 8), bool), "logits": np.ones((8, 3), bool)}
    masks["hidden"][:, 0] = masks["logits"][1] = False
    x = jax.ShapeDtypeStruct((2, 5), jnp.float32)
    assert remaining(case.apply, case.params, x)(masks) == 5 * 6 + 6 * 3
    count = remaining(case.apply, case.params, x, counted=lambda path: path == "hidden")
    assert count(jax.tree.map(jnp.asarray, masks)) == 5 * 6
    with pytest.raises(ValueError, match="masks has no leaf 'logits', which params has"):
        count({"hidden": masks["hidden"]})
    with pytest.raises(TypeError, match="mask 'hidden' has no values: compact outside of jit"):
        jax.jit(count)(masks)


def test_compact_network_is_traced_anew_for_new_shapes() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.relu(nn.Conv(6, (3, 3))(x))
            return nn.Dense(3)(x.reshape(x.shape[0], -1, 6).mean(1))

    apply, params = of_module(Net(), (2, 6, 6, 1))
    masks = group_masks(dependency_graph(apply, params, jnp.ones((2, 6, 6, 1))), params, 0.5)
    small, small_apply = compact(apply, params, masks, jnp.ones((2, 6, 6, 1)))
    for shape in [(1, 6, 6, 1), (3, 8, 5, 1)]:
        x = normal(*shape)
        expected = jax.jit(apply)(masked_by_hand(params, masks), x)
        for f in (small_apply, jax.jit(small_apply)):
            np.testing.assert_allclose(f(small, x), expected, rtol=1e-5, atol=1e-6)
        one_by_one = jax.jit(jax.vmap(lambda a: small_apply(small, a[None])[0]))(x)
        np.testing.assert_allclose(one_by_one, expected, rtol=1e-5, atol=1e-6)


def test_training_goes_on_with_compact_optimizer_state() -> None:
    case = norm_mlp()
    x = inputs(case, 4)
    masks = group_masks(dependency_graph(case.apply, case.params, x), case.params, 0.5)
    plan = compaction(case.apply, case.params, masks, x)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))

    @partial(jax.jit, static_argnums=2)
    def step(params: Any, state: Any, apply: Any, masks: Any) -> Any:
        grads = jax.grad(lambda p: jnp.sum(apply(p, x) ** 2))(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(apply_masks(grads, masks), state, params)
        return apply_masks(optax.apply_updates(params, updates), masks), state

    full = masked_by_hand(case.params, masks)
    full, state = step(full, optimizer.init(full), case.apply, masks)
    small, small_state = plan.shrink(full), plan.shrink(state)
    for _ in range(3):
        full, state = step(full, state, case.apply, masks)
        small, small_state = step(small, small_state, plan.apply, plan.masks)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        small,
        plan.shrink(full),
    )


def test_errors() -> None:
    case = mlp()
    masks = jax.tree.map(lambda w: jnp.ones(w.shape, bool), case.params)
    with pytest.raises(ValueError, match="masks has no leaf 'logits', which params has"):
        compact(case.apply, case.params, {"hidden": masks["hidden"]}, inputs(case, 2))
    masks["hidden"] = masks["hidden"].at[:, 0].set(False)
    small, apply = compact(case.apply, case.params, masks, inputs(case, 2))
    assert small["hidden"].shape == (5, 7)
    with pytest.raises(ValueError, match=r"leaf 'hidden' has shape \(5, 8\), the compact .*5, 7"):
        apply(case.params, inputs(case, 2))
    with pytest.raises(KeyError, match="no group 'x'; there are hidden"):
        dependency_graph(case.apply, case.params, inputs(case, 2))["x"]


def test_derivative_of_its_own_is_carried() -> None:
    scale = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])

    @jax.custom_jvp
    def f(x: Any) -> Any:
        return jnp.maximum(x, 0) * scale[None]

    f.defjvp(lambda primals, tangents: (f(*primals), 7 * (primals[0] >= 0) * tangents[0]))
    with jax.numpy_dtype_promotion("standard"):
        apply, params, x = through(f), draw(HIDDEN), jnp.zeros((2, 5)).at[1].set(1)
        masks = group_masks(dependency_graph(apply, params, x), params, 0.5)
        plan = compaction(apply, params, masks, x)
        assert plan.widths["hidden"] == (6, 3)
        check_compact(derivative(apply), params, masks, plan, [x], 1e-5)


def test_a_tangent_without_a_value_keeps_its_units() -> None:
    @jax.custom_jvp
    def nothing_forward(x: Any) -> Any:
        return x * 0

    nothing_forward.defjvp(lambda primals, tangents: (primals[0] * 0, tangents[0]))
    apply, params = through(nothing_forward), draw(HIDDEN)
    masks = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    plan = compaction(apply, params, masks, jnp.ones((2, 5)))
    assert plan.widths["hidden"] == (6, 6)


def test_networks_of_one_signature_have_the_same_widths() -> None:
    def halves(params: Any, x: Any) -> Any:
        left, right = jnp.split(x @ params["a"], 2, -1)
        return jnp.concatenate([jnp.tanh(left), jnp.square(right)], -1) @ params["b"]

    params, x = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 3))}, jnp.ones((2, 4))

    def without(*units: int) -> Any:
        kept = jnp.ones(8, bool).at[jnp.array(units)].set(False)
        masks = {"a": jnp.tile(kept, (4, 1)), "b": jnp.tile(kept[:, None], (1, 3))}
        return compaction(halves, params, masks, x)

    left, right = without(0, 1, 2), without(4, 5, 6)
    assert jax.tree.map(jnp.shape, left.params) == jax.tree.map(jnp.shape, right.params)
    assert left.signature != right.signature
    assert left.signature == without(1, 2, 3).signature


@pytest.mark.parametrize(
    "f",
    [
        jax.nn.relu,
        pytest.param(jax.nn.softplus, marks=pytest.mark.slow),
        jax.nn.relu6,
        pytest.param(jax.nn.gelu, marks=pytest.mark.slow),
    ],
)
def test_second_derivatives(f: Any) -> None:
    def apply(params: Any, x: Any) -> Any:
        return f(x @ params["a"]) @ params["b"]

    keys = jax.random.split(jax.random.key(0), 3)
    params = {"a": jax.random.normal(keys[0], (4, 6)), "b": jax.random.normal(keys[1], (6, 3))}
    x = jax.random.normal(keys[2], (5, 4))
    masks = group_masks(dependency_graph(apply, params, x), params, 0.5)
    plan = compaction(apply, params, masks, x)
    masked = apply_masks(params, masks)
    before = plan.apply(plan.params, x)
    second = jax.hessian(lambda x: jnp.square(plan.apply(plan.params, x)).sum())(x)
    expected = jax.hessian(lambda x: jnp.square(apply(masked, x)).sum())(x)
    np.testing.assert_allclose(second, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(plan.apply(plan.params, x), before)


def test_an_index_out_of_range_may_give_a_removed_unit_a_value() -> None:
    def apply(params: Any, index: Any) -> Any:
        return jnp.take(params["t"], index, axis=0, mode="fill", fill_value=1.0) @ params["b"]

    params = {"t": jnp.ones((5, 6)), "b": jnp.arange(18.0).reshape(6, 3)}
    index = jnp.array([0, 3, 9])
    masks = {"t": jnp.ones((5, 6), bool).at[:, :2].set(False), "b": jnp.ones((6, 3), bool)}
    plan = compaction(apply, params, masks, index)
    found = plan.apply(plan.params, index)
    np.testing.assert_allclose(found, apply(apply_masks(params, masks), index))
    assert plan.params["t"].shape == (5, 6)


def test_a_window_in_the_padding_alone_has_no_known_value() -> None:
    def apply(params: Any, x: Any) -> Any:
        hidden = jax.nn.relu(x @ params["a"])
        pooled = jax.lax.reduce_window(
            hidden, -jnp.inf, jax.lax.max, (1, 2, 1), (1, 2, 1), ((0, 0), (2, 2), (0, 0))
        )
        return jnp.where(jnp.isinf(pooled), 1.0, pooled).sum(axis=1) @ params["b"]

    params, x = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((2, 4, 3))
    masks = {"a": jnp.ones((3, 4), bool).at[:, 0].set(False), "b": jnp.ones((4, 2), bool)}
    plan = compaction(apply, params, masks, x)
    expected = apply(apply_masks(params, masks), x)
    np.testing.assert_allclose(plan.apply(plan.params, x), expected)


def test_a_derivative_that_closes_over_values_is_not_followed() -> None:
    def apply(params: Any, x: Any) -> Any:
        @jax.custom_jvp
        def scaled(y: Any) -> Any:
            return y * params["scale"][None]

        scaled.defjvp(lambda x, t: (scaled(*x), t[0] * params["scale"][None]))
        return scaled(x @ params["hidden"]) @ params["logits"]

    params, x = draw({**HIDDEN, "scale": (6,)}), jnp.ones((2, 5))
    reason = str(dependency_graph(apply, params, x)["hidden"].reason)
    assert "custom_jvp_call, whose derivative rule closes over values" in reason
    masks = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    masks["hidden"] = masks["hidden"].at[:, 1].set(False)
    plan = compaction(apply, params, masks, x)
    np.testing.assert_allclose(
        plan.apply(plan.params, x), apply(apply_masks(params, masks), x), rtol=1e-6
    )


def test_numbers_among_the_inputs_keep_their_weak_types() -> None:
    def apply(params: Any, x: Any) -> Any:
        return jax.nn.relu(x[0] * x[1] @ params["hidden"]) @ params["logits"]

    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), draw(HIDDEN))
    x = jnp.ones((2, 5), jnp.bfloat16), 2.0
    masks = group_masks(dependency_graph(apply, params, x), params, 0.5)
    plan = compaction(apply, params, masks, x)
    assert plan.apply(plan.params, x).dtype == apply(params, x).dtype == jnp.bfloat16


class Running(nn.Module):
    """A network whose normalisation keeps running statistics."""

    train: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        return nn.Dense(4)(nn.relu(nn.BatchNorm(not self.train)(x)).mean((1, 2)))


def test_running_statistics_shrink_with_their_units() -> None:
    x = normal(4, 6, 6, 3)
    variables = Running(False).init(jax.random.key(0), x)

    def apply(variables: Any, x: Any) -> Any:
        return Running(True).apply(variables, x, mutable=["batch_stats"])

    def state(out: Any) -> Any:
        return out[1]

    kernel = "params/Conv_0/kernel"
    assert "output '1/batch_stats/" in str(dependency_graph(apply, variables, x)[kernel].reason)
    graph = dependency_graph(apply, variables, x, state=state)
    masks = group_masks(graph, variables, 0.5)
    plan = compaction(apply, variables, masks, x, fold=False, state=state)
    masked, params = masked_by_hand(variables, masks), plan.params
    for _ in range(3):  # steps of training, without the optimizer
        expected, updated = apply(masked, x)
        found, smaller = plan.apply(params, x)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        masked = masked_by_hand({**masked, **updated}, masks)
        params = {**params, **smaller}
    assert params["batch_stats"]["BatchNorm_0"]["mean"].shape == (4,)
    restored = plan.expand(params)["batch_stats"]
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, restored, masked["batch_stats"])
    with pytest.raises(ValueError, match=r"state has a leaf 'a' of shape \(4, 4\), and params"):
        dependency_graph(apply, variables, x, state=lambda out: {"a": out[0]})


def test_constants_within_the_program() -> None:
    """JAX may hold arrays as literals."""
    shift = np.linspace(-1, 1, 8, dtype=np.float32)

    def apply(params: Any, x: Any) -> Any:
        return (jnp.tanh(x @ params["hidden"]) * shift[None]) @ params["logits"]

    params, x = draw({"hidden": (5, 8), "logits": (8, 3)}), normal(2, 5)
    jax.config.update("jax_use_simplified_jaxpr_constants", True)
    try:
        masks = group_masks(dependency_graph(apply, params, x), params, 0.5)
        check_values(apply, params, masks, compaction(apply, params, masks, x), x)
    finally:
        jax.config.update("jax_use_simplified_jaxpr_constants", False)


@pytest.mark.parametrize("unknown", [jnp.isnan, lambda e: ~jnp.isfinite(e), lambda e: e == e])
def test_nan_as_a_marker(unknown: Any) -> None:
    """An index out of range gives NaN, which is no less so for a pruned unit."""

    def apply(params: Any, i: Any) -> Any:
        e = jnp.take(params["table"], i, axis=0)
        return jnp.where(unknown(e), 1.0, jnp.nan_to_num(e)) @ params["logits"]

    params, i = draw({"table": (5, 8), "logits": (8, 3)}), jnp.array([0, 3, 9])
    masks = jax.tree.map(lambda w: np.ones(w.shape, bool), params)
    masks["table"][:, ::2] = False
    check_values(apply, params, masks, compaction(apply, params, masks, i), i)


def test_leaves_without_elements() -> None:
    def apply(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["a"]) @ params["b"] + (x @ params["c"]) @ params["d"]

    params = draw({"a": (5, 8), "b": (8, 3), "c": (5, 0), "d": (0, 3), "e": (0, 8)})
    x = normal(7, 5)
    graph = dependency_graph(apply, params, x)
    assert [group.name for group in graph.groups if group.prunable] == ["a"]
    masks = group_masks(graph, params, 0.5)
    check_values(apply, params, masks, compaction(apply, params, masks, x), x)


def test_two_leaves_of_one_path() -> None:
    params = {"a": {"b": jnp.ones((2, 3))}, "a/b": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match="two leaves of params have the path 'a/b'"):
        dependency_graph(lambda p, x: x @ p["a/b"], params, jnp.ones((4, 2)))


def test_masks_without_values() -> None:
    case = mlp()
    masks = jax.tree.map(lambda w: jnp.ones(w.shape, bool), case.params)
    with pytest.raises(TypeError, match="mask 'hidden' has no values: compact outside of jit"):
        jax.jit(lambda m: compaction(case.apply, case.params, m, inputs(case, 2)).params)(masks)


def test_optimizer_state_of_other_shapes() -> None:
    case = mlp()
    graph = dependency_graph(case.apply, case.params, inputs(case, 2))
    masks = group_masks(graph, case.params, 0.5)
    plan = compaction(case.apply, case.params, masks, inputs(case, 2))
    tree = {"a": {"hidden": np.ones(7)}, "b": {"hidden": np.ones(1)}, "c": np.ones((5, 8))}
    expected = r"stay as they are: 'a/hidden' of shape \(7,\); 'c' of shape \(5, 8\)$"
    with pytest.warns(UserWarning, match=expected) as all:
        left = plan.shrink(tree | {"d": np.ones(9)})
    assert len(all) == 1
    jax.tree.map(np.testing.assert_array_equal, left, tree | {"d": np.ones(9)})


def test_nothing_to_prune() -> None:
    params, x = draw({"w": (5, 3)}), normal(2, 5)
    graph = dependency_graph(lambda p, x: x @ p["w"], params, x)
    with pytest.warns(UserWarning, match="no group of the graph can be pruned: print it"):
        assert group_masks(graph, params, [0.5, 0.9])["w"].shape == (2, 5, 3)


# Trees that belong to the parameters ---------------------------------------------------------


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3))(x)))
        return nn.Dense(4)(x.mean((1, 2)))


def normed_plan() -> tuple[Any, Any]:
    x = normal(2, 6, 6, 2)
    variables = Normed().init(jax.random.key(0), x)
    masks = group_masks(dependency_graph(Normed().apply, variables, x), variables, 0.5)
    return variables, compaction(Normed().apply, variables, masks, x, fold=False)


def shapes_of(tree: Any) -> list[tuple[int, ...]]:
    return [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    "optimizer",
    [pytest.param(optax.adam(1e-3), id="adam", marks=pytest.mark.slow),
     pytest.param(optax.contrib.muon(1e-3), id="muon"),
     pytest.param(optax.MultiSteps(optax.sgd(0.1, 0.9), 2), id="MultiSteps"),
     pytest.param(optax.adafactor(1e-2, min_dim_size_to_factor=2), id="adafactor")],
)  # fmt: skip
def test_optimizer_state_without_the_prefix_of_the_parameters_shrinks(optimizer: Any) -> None:
    variables, plan = normed_plan()
    small, state = plan.params["params"], plan.shrink(optimizer.init(variables["params"]))
    assert shapes_of(state) == shapes_of(optimizer.init(small))
    with jax.numpy_dtype_promotion("standard"):
        optimizer.update(small, state, small)


def test_running_statistics_averages_and_train_states_shrink_by_themselves() -> None:
    variables, plan = normed_plan()
    small = plan.params
    assert shapes_of(plan.shrink(variables["batch_stats"])) == shapes_of(small["batch_stats"])
    for name in ("ema", "gradients"):
        tree = plan.shrink({name: variables["params"]})
        assert shapes_of(tree) == shapes_of(small["params"])
        restored = plan.expand(tree)
        assert shapes_of(restored) == shapes_of(variables["params"])
    state = TrainState.create(
        apply_fn=Normed().apply, params=variables["params"], tx=optax.adam(1e-3)
    )
    small_state = TrainState.create(apply_fn=None, params=small["params"], tx=optax.adam(1e-3))
    assert shapes_of(plan.shrink(state)) == shapes_of(small_state)


def test_a_factored_moment_of_a_square_kernel_is_refused_with_both_axes() -> None:
    def apply(params: Any, x: Any) -> Any:
        return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["c"]

    params = draw({"a": (5, 6), "b": (6, 6), "c": (6, 3)})
    masks = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    masks["b"] = masks["b"].at[:, :2].set(False)
    plan = compaction(apply, params, masks, normal(2, 5))
    with pytest.raises(
        ValueError, match=r"leaf 'v_row/b'.*axes \(0,\) of 'b' or axes \(1,\) of 'b'"
    ):
        plan.shrink({"v_row": {"b": jnp.ones(6)}})


# What group_masks says -----------------------------------------------------------------------


def test_groups_of_two_keep_one_unit_and_it_is_said() -> None:
    params = draw({"hidden": (5, 2), "logits": (2, 3)})
    graph = dependency_graph(through(jax.nn.relu), params, normal(2, 5))
    with pytest.warns(UserWarning, match="groups keep 1 of their units, .*: hidden"):
        masks = group_masks(graph, params, [0.5, 0.8])
    assert masks["hidden"].any(1).sum(1).tolist() == [1, 1]
    masks = group_masks(graph, params, 0.8, min_units=0)
    assert not masks["hidden"].any()
    with pytest.raises(ValueError, match="min_units must be at least 0, got -1"):
        group_masks(graph, params, 0.8, min_units=-1)


def test_weight_normalisation_is_said_to_divide_by_zero_under_masks() -> None:
    def apply(params: Any, x: Any) -> Any:
        kernel = params["v"] / jnp.linalg.norm(params["v"], axis=0)[None] * params["g"][None]
        return jax.nn.relu(x @ kernel) @ params["out"]

    params, x = draw({"v": (5, 6), "g": (6,), "out": (6, 3)}), normal(2, 5)
    graph = dependency_graph(apply, params, x)
    with pytest.warns(UserWarning, match="groups divide by zero where they are masked.*: "):
        masks = group_masks(graph, params, 0.5)
    assert not np.isfinite(apply(apply_masks(params, masks), x)).all()
    small, small_apply = compact(apply, params, masks, x)
    found = small_apply(small, x)
    kernel = params["v"] / jnp.linalg.norm(params["v"], axis=0)[None] * params["g"][None]
    kept = np.asarray(masks["v"]).any(0)
    expected = jax.nn.relu(x @ kernel[:, kept]) @ params["out"][kept]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
