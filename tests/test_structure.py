"""The dependency graph, unit masks over groups, and compaction, on networks of a few lines."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune.masks import apply_masks
from jaxprune.structure import compact, compaction, dependency_graph, group_masks


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
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.ones(shape))
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
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.float32(2**0.5))
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


CASES = {
    f.__name__: f
    for f in [mlp, norm_mlp, lenet, residual, attention, fused_attention, dense_block, depthwise,
              grouped, scanned, sigmoid]
}  # fmt: skip


def inputs(case: Case, batch: int) -> Any:
    x = jax.random.normal(jax.random.key(batch), (batch, *case.shape))
    return x.at[0].set(0)  # where derivatives at exact zeros are taken


def check_equal(case: Case, masks: Any, x: Any, tolerance: float, plan: Any) -> None:
    """The compact network gives what the masked one gives, and so do their derivatives."""
    masked = apply_masks(case.params, masks)

    def loss(params: Any, apply: Any) -> Any:
        return jnp.sum(jnp.sin(apply(params, x)))

    np.testing.assert_allclose(
        plan.apply(plan.params, x), case.apply(masked, x), rtol=tolerance, atol=tolerance
    )
    expected = jax.grad(loss)(masked, case.apply)
    found = jax.jit(jax.grad(loss), static_argnums=1)(plan.params, plan.apply)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        plan.shrink(apply_masks(expected, masks)),
        apply_masks(found, plan.shrink(masks)),
    )


@pytest.mark.parametrize("name", CASES)
def test_compact_equals_masked(name: str) -> None:
    case = CASES[name]()
    x = inputs(case, 3)
    graph = dependency_graph(case.apply, case.params, x)
    masks = group_masks(graph, case.params, 0.5)
    plan = compaction(case.apply, case.params, masks, x)
    assert sum(leaf.size for leaf in jax.tree.leaves(plan.params)) == case.left
    for batch in (3, 2):
        check_equal(case, masks, inputs(case, batch), 2e-5, plan)
    restored = plan.expand(plan.params)
    jax.tree.map(np.testing.assert_array_equal, plan.shrink(restored), plan.params)


@pytest.mark.parametrize("name", CASES)
def test_compact_equals_masked_in_double_precision(name: str) -> None:
    with jax.enable_x64(True):
        case = CASES[name]()
        case = case._replace(params=jax.tree.map(lambda w: w.astype(np.float64), case.params))
        x = inputs(case, 3).astype(np.float64)
        graph = dependency_graph(case.apply, case.params, x)
        masks = group_masks(graph, case.params, 0.3, scope="global")
        plan = compaction(case.apply, case.params, masks, x)
        check_equal(case, masks, x, 1e-12, plan)


@pytest.mark.parametrize("name", CASES)
def test_nothing_pruned(name: str) -> None:
    case = CASES[name]()
    masks = jax.tree.map(lambda w: jnp.ones(w.shape, bool), case.params)
    plan = compaction(case.apply, case.params, masks, inputs(case, 2))
    jax.tree.map(np.testing.assert_array_equal, plan.params, case.params)
    assert all(before == after for before, after in plan.widths.values())
