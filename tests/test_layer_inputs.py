"""The inputs of layers, against those recorded by hand in Linen, NNX and Equinox networks."""

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxprune as jp

KEY = jax.random.key(0)


def moments(rows: Any) -> Any:
    return rows.T @ rows


def by_path(found: Any) -> dict[str, np.ndarray]:
    assert len({layer.path for layer in found}) == len(found)
    return {layer.path: np.asarray(value) for layer, value in found.items()}


def close(found: Any, expected: dict[str, Any]) -> None:
    found = by_path(found)
    assert set(found) == set(expected)
    for path, rows in expected.items():
        rows = np.asarray(rows, np.float64)
        np.testing.assert_allclose(found[path], np.swapaxes(rows, -1, -2) @ rows, 2e-4, 1e-4)


def windows(x: Any, size: int, stride: int, pad: int, groups: int = 1) -> np.ndarray:
    """Rows that a square kernel (size, size, features, _) meets, group by group."""
    x = np.pad(np.asarray(x), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows = [[x[n][i : i + size, j : j + size, g] for n in range(len(x))
             for i in range(0, x.shape[1] - size + 1, stride)
             for j in range(0, x.shape[2] - size + 1, stride)]
            for g in np.split(np.arange(x.shape[3]), groups)]  # fmt: skip
    found = np.array([[np.ravel(row) for row in group] for group in rows])
    return found if groups > 1 else found[0]


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Conv(4, (3, 3), 2, padding=1, name="first")(x))
        x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=2, padding=1, name="grouped")(x))
        x = nn.relu(nn.Dense(5, name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(3, name="output")(x)


def test_linen_convolutions_and_dense_layers_over_batches() -> None:
    batches = [jax.random.normal(jax.random.fold_in(KEY, i), (2, 6, 6, 2)) for i in range(2)]
    variables = Linen().init(KEY, batches[0])
    seen: dict[str, list[Any]] = {"first": [], "grouped": [], "hidden": [], "output": []}
    for x in batches:
        kept: Any = Linen().apply(variables, x, capture_intermediates=True)
        made = kept[1]["intermediates"]
        out = {name: value["__call__"][0] for name, value in made.items() if name != "__call__"}
        seen["first"].append(windows(x, 3, 2, 1))
        seen["grouped"].append(windows(jax.nn.relu(out["first"]), 3, 1, 1, 2))
        seen["hidden"].append(jax.nn.relu(out["grouped"]).reshape(2, -1))
        seen["output"].append(jax.nn.relu(out["hidden"]))
    found = jp.layer_inputs(Linen().apply, variables, batches, moments)
    expected = {f"params/{n}/kernel": np.concatenate(rows, axis=-2) for n, rows in seen.items()}
    close(found, expected)
    inside = jax.jit(lambda v, xs: list(jp.layer_inputs(Linen().apply, v, xs, moments).values()))
    for a, b in zip(inside(variables, batches), found.values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.output = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.output(jnp.tanh(self.norm(self.hidden(x))))


def test_nnx_with_a_norm() -> None:
    model, x = Nnx(nnx.Rngs(0)), jax.random.normal(KEY, (3, 5, 4))
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(state)

    def apply(params: Any, x: Any) -> Any:
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(x)

    rows = jnp.tanh(model.norm(model.hidden(x)))
    expected = {"hidden/kernel": x.reshape(15, 4), "output/kernel": rows.reshape(15, 6)}
    close(jp.layer_inputs(apply, params, [x], moments), expected)


def test_equinox_kernels_are_outputs_by_inputs() -> None:
    model, x = eqx.nn.MLP(3, 2, 5, 2, key=KEY), jax.random.normal(KEY, (7, 3))
    params, static = eqx.partition(model, eqx.is_array)

    def apply(params: Any, x: Any) -> Any:
        return jax.vmap(eqx.combine(params, static))(x)

    expected = {}
    for i, layer in enumerate(model.layers):
        expected[f"layers/{i}/weight"] = x
        x = jax.nn.relu(jax.vmap(layer)(x))
    close(jp.layer_inputs(apply, params, [jax.random.normal(KEY, (7, 3))], moments), expected)


def test_each_head_and_each_step_of_a_scan_has_inputs_of_its_own() -> None:
    def apply(params: Any, x: Any) -> Any:
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]
        heads = jnp.einsum("bhi,hio->bho", x.reshape(len(x), 2, 3), params["heads"])
        return jax.nn.relu(heads).sum(1) @ params["output"].T

    shapes = {"layers": (3, 6, 6), "heads": (2, 3, 4), "output": (2, 4)}
    params = {name: jax.random.normal(KEY, shape) for name, shape in shapes.items()}
    x = jax.random.normal(KEY, (5, 6))
    given, steps = x, []
    for w in params["layers"]:
        steps.append(given)
        given = jnp.tanh(given @ w)
    heads = given.reshape(5, 2, 3).transpose(1, 0, 2)
    last = jax.nn.relu(jnp.einsum("hbi,hio->bho", heads, params["heads"])).sum(1)
    found = jp.layer_inputs(apply, params, [x], moments)
    close(found, {"layers": np.stack(steps), "heads": heads, "output": last})
    (layer,) = [layer for layer in found if layer.path == "heads"]
    assert layer.batched == (0,) and layer.contracted == (1,)


def test_columns_are_those_of_the_leaf_and_uses_add_up() -> None:
    def apply(params: Any, x: Any) -> Any:  # (d, h) summed over, in the other order
        once = jnp.einsum("bhd,dho->bo", x, params["w"])
        return jnp.tanh(once + jnp.einsum("bhd,dho->bo", 2 * x, params["w"])) @ params["v"]

    params = {"w": jnp.ones((3, 2, 4)), "v": jnp.ones((4, 2))}
    x = jax.random.normal(KEY, (5, 2, 3))
    found = jp.layer_inputs(apply, params, [x], moments)
    ((layer, value),) = [pair for pair in found.items() if pair[0].path == "w"]
    rows = np.asarray(x).transpose(0, 2, 1).reshape(5, 6)
    assert layer.path == "w" and layer.contracted == (0, 1)
    np.testing.assert_allclose(value, 5 * rows.T @ rows, rtol=1e-5, atol=1e-5)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        jp.layer_inputs(lambda p, x: x @ p, jnp.ones((2, 2)), [], moments)
    with pytest.raises(TypeError, match=r"leaf 'activation' of params is no array.*eqx.partition"):
        jp.layers(lambda m, x: jax.vmap(m)(x), eqx.nn.MLP(2, 2, 2, 1, key=KEY), jnp.ones((2, 2)))
