"""Sparse inference: the kernel against NumPy, compiled networks against masked dense ones."""

import gc
import json
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.sparse import inference, kernel, layout, measure, packing
from jaxprune.sparse.program import Layer
from tests import zoo
from tests.compare import masked_by_hand

pytestmark = pytest.mark.usefixtures("cache_dir")  # what is fastest is measured in every test


@pytest.fixture
def sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever can be sparse is, as if it had been found to be fastest."""

    def last(choices: Any, x: Any) -> int:
        expected = choices[0](x)
        assert all(measure.same(choice(x), expected) for choice in choices)
        return len(choices) - 1

    monkeypatch.setattr(inference, "fastest", last)
    monkeypatch.setattr(inference, "_faster_alone", lambda _, products, x: (*range(len(products)),))


def random_masks(params: Any, density: float) -> Any:
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda w: rng.random(w.shape) < (density if np.ndim(w) >= 2 else 2), params)


def mlp_params(*sizes: int, bias: bool = True) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    pairs = list(zip(sizes, sizes[1:], strict=False))
    normal = {f"w{i}": rng.standard_normal(pair) / 4 for i, pair in enumerate(pairs)}
    if bias:
        normal |= {f"b{i}": rng.standard_normal(n) / 4 for i, n in enumerate(sizes[1:])}
    return {name: jnp.asarray(value, jnp.float32) for name, value in normal.items()}


def mlp(params: Any, x: Any) -> Any:
    layers = sum(name.startswith("w") for name in params)
    for i in range(layers):
        x = x @ params[f"w{i}"]
        if f"b{i}" in params:
            x = x + params[f"b{i}"].reshape((1,) * (x.ndim - 1) + (-1,))
        x = jax.nn.relu(x) if i < layers - 1 else x
    return x


def inputs(*shape: int) -> Any:
    rng = np.random.default_rng(2)
    return jnp.asarray(rng.standard_normal(shape) * (rng.random(shape) < 0.6), jnp.float32)


def check(fast: Any, apply: Any, params: Any, masks: Any, x: Any) -> None:
    expected = apply(masked_by_hand(params, masks), x)
    found = fast(x)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.max(np.abs(b), initial=0))


def calls(fast: Any, x: Any) -> int:
    """Count the calls of the kernel in a compiled network."""
    return str(jax.make_jaxpr(fast)(x)).count("ffi_call[")


@pytest.mark.parametrize("tile", [0, *layout.TILES])
@pytest.mark.parametrize("rows", [0, 1, 5, 16, 33, 64, 150])
def test_kernel(tile: int, rows: int) -> None:
    rng = np.random.default_rng(rows)
    sizes, densities = [300, 37, 1, 260, 16, 3], [0.5, 1, 0.02, 0.2, 0]
    layers = []
    x = expected = rng.standard_normal((rows, 300)).astype(np.float32)
    for i, density in enumerate(densities):
        shape = sizes[i], sizes[i + 1]
        weights = (rng.standard_normal(shape) * (rng.random(shape) < density)).astype(np.float32)
        bias = None if i % 2 else rng.standard_normal(shape[1]).astype(np.float32)
        layers.append(Layer(weights, bias, relu=i != 2))
        expected = expected.astype(np.float64) @ weights + (0 if bias is None else bias)
        expected = np.maximum(expected, 0) if i != 2 else expected
        found = kernel.run(jnp.asarray(x), jnp.asarray(packing.pack(layers, rows, tile)), shape[1])
        scale = np.max(np.abs(expected), initial=0)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("tile", [0, *layout.TILES])
def test_relu_keeps_nan(tile: int) -> None:
    layer = Layer(np.eye(20, dtype=np.float32), None, relu=True)
    x = jnp.zeros((1, 20)).at[0, :8].set(jnp.array([np.nan, -1.0, np.inf, -np.inf, 0, 1, 2, 3]))
    found = kernel.run(x, jnp.asarray(packing.pack([layer], 1, tile)), 20)
    np.testing.assert_array_equal(found[:, :8], [[np.nan, 0, np.inf, 0, 0, 1, 2, 3]])


@pytest.mark.parametrize("tile", [0, *layout.TILES])
def test_packed_size(tile: int) -> None:
    layer = Layer(
        (np.random.default_rng(0).random((1000, 1000)) < 0.01).astype(np.float32), None, True
    )
    assert packing.pack([layer], 1, tile).nbytes < 11 * np.count_nonzero(layer.weights)


def test_by_hand(sparse: None) -> None:
    params = {"w0": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "w1": jnp.array([[1.0], [1.0]])}
    masks = {"w0": jnp.array([[True, True], [False, True]]), "w1": jnp.ones((2, 1), bool)}
    fast = jp.compile_sparse(mlp, params, masks, jnp.ones((2, 2)))
    # relu([1, 1] @ [[1, -2], [0, 4]]) = [1, 2]; relu([-1, 1] @ ...) = [0, 6]
    np.testing.assert_array_equal(fast(jnp.array([[1.0, 1.0], [-1.0, 1.0]])), [[3], [6]])


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("norm_mlp", 3),
        ("lenet5", 1),
        pytest.param("vit", 13, marks=pytest.mark.slow),
        pytest.param("causal_transformer", 13, marks=pytest.mark.slow),
        pytest.param("flax_scan", 2, marks=pytest.mark.slow),
        ("nnx_network", 1),
        ("plain_network", 4),
    ],
)
def test_networks(name: str, count: int, sparse: None) -> None:
    network = getattr(zoo, name)()
    params = network.init(jax.random.key(0))
    masks = random_masks(params, 0.5)
    apply = jax.jit(network.apply)
    fast = jp.compile_sparse(network.apply, params, masks, network.x)
    check(fast, apply, params, masks, network.x)
    check(fast, apply, params, masks, network.second_x)
    assert calls(fast, network.x) == count


def test_equinox_kernels_are_outputs_by_inputs(sparse: None) -> None:
    model = eqx.nn.MLP(12, 5, 30, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)

    def apply(params: Any, x: Any) -> Any:
        return jax.vmap(eqx.combine(params, static))(x)

    masks = random_masks(params, 0.4)
    fast = jp.compile_sparse(apply, params, masks, inputs(7, 12))
    for rows in (7, 33):
        check(fast, apply, params, masks, inputs(rows, 12))
    assert calls(fast, inputs(7, 12)) == 3


@pytest.mark.parametrize("shape", [(1,), (40,), (3, 2), (0,), ()], ids=str)
def test_other_shapes(shape: tuple[int, ...], sparse: None) -> None:
    params = mlp_params(20, 30, 40, 5)
    masks = random_masks(params, 0.2)
    fast = jp.compile_sparse(mlp, params, masks, inputs(7, 20))
    x = inputs(*shape, 20)
    check(fast, mlp, params, masks, x)
    check(jax.jit(fast), mlp, params, masks, x)
    assert calls(fast, x) == 1


def test_measures_once_a_kind_of_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    fastest = inference.fastest

    def count(choices: Any, x: Any) -> int:
        seen.append(jnp.shape(x))
        return fastest(choices, x)

    monkeypatch.setattr(inference, "fastest", count)
    params = mlp_params(20, 30)
    fast = jp.compile_sparse(mlp, params, random_masks(params, 0.2), inputs(7, 20))
    fast(inputs(7, 20))
    first = list(seen)
    assert (7, 20) in first
    fast(inputs(6, 20))  # alike
    assert seen == first
    fast(inputs(90, 20))
    more = seen[len(first) :]
    assert more and {*more} <= {(90, 20), (90, 30)}
    jax.jit(fast)(inputs(90, 20))
    assert seen == [*first, *more]


def test_what_was_measured_is_remembered_where_the_weights_are_as_many(
    monkeypatch: pytest.MonkeyPatch, cache_dir: Path
) -> None:
    seen = []
    monkeypatch.setattr(inference, "_faster_alone", lambda *_: ())
    monkeypatch.setattr(inference, "fastest", lambda choices, x: seen.append(1) or 2)
    params, x = mlp_params(20, 30, 10), inputs(7, 20)
    masks = random_masks(params, 0.2)
    for scale in (1, 2):
        new = jax.tree.map(lambda w, s=scale: w * s, params)
        check(jp.compile_sparse(mlp, new, masks, x), mlp, new, masks, x)
        assert len(seen) == 1 and calls(jp.compile_sparse(mlp, new, masks, x), x) == 1
    jp.compile_sparse(mlp, params, random_masks(params, 0.3), x)
    assert len(seen) == 2
    [file] = (cache_dir / "jaxprune").iterdir()
    assert len(json.loads(file.read_text())) == 2
    for text in ("", "[1]", "{"):  # cut, or another's
        file.write_text(text)
        check(jp.compile_sparse(mlp, params, masks, x), mlp, params, masks, x)
    file.unlink()
    file.mkdir()  # cannot be read or written
    check(jp.compile_sparse(mlp, params, masks, x), mlp, params, masks, x)


def test_under_jit_first(sparse: None) -> None:
    params = mlp_params(20, 30, 5)
    masks = random_masks(params, 0.2)
    fast = jp.compile_sparse(mlp, params, masks, inputs(7, 20))
    found = jax.jit(lambda x: 2 * fast(x + 1))(inputs(9, 20))
    expected = 2 * mlp(masked_by_hand(params, masks), inputs(9, 20) + 1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_vmap(sparse: None) -> None:
    params = mlp_params(20, 30, 5)
    masks = random_masks(params, 0.2)
    fast = jp.compile_sparse(mlp, params, masks, inputs(7, 20))
    x = inputs(3, 7, 20)
    found, expected = jax.vmap(fast)(x), mlp(masked_by_hand(params, masks), x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("apply", "count"),
    [
        (lambda p, x: p["a"].T @ x.T, 1),
        (lambda p, x: jnp.einsum("bi,ioh->boh", x, p["a"].reshape(12, 4, 4)), 1),
        (lambda p, x: jnp.einsum("bkj,jko->bo", x.reshape(-1, 4, 3), p["a"].reshape(3, 4, 16)), 1),
        (lambda p, x: jnp.maximum(x @ p["a"] + 1, 0) @ p["b"], 2),
        (lambda p, x: jnp.maximum(x @ p["a"], 1) @ p["b"], 2),
        (lambda p, x: jax.nn.relu(x @ p["a"] + jnp.arange(16.0)[None]) @ p["b"], 1),
        (lambda p, x: jax.nn.relu(x @ p["a"] + x[:, :1]) @ p["b"], 2),
        (lambda p, x: (h := jax.nn.relu(x @ p["a"])) @ p["b"] + jnp.sum(h), 2),
        (lambda p, x: (h := x @ p["a"] @ p["b"]) + h, 1),
        (lambda p, x: jax.checkpoint(lambda x: jax.nn.relu(x @ p["a"]))(x) @ p["b"], 1),
        (lambda p, x: (x @ p["a"] @ p["a"].T, x @ p["a"]), 2),
        (lambda p, x: jax.nn.relu(x @ p["a"] + p["b"][0, 0]) @ p["b"], 1),
        (lambda p, x: jax.nn.relu(x @ p["a"] + p["b"][:6, :1]) @ p["b"], 2),
        (lambda p, x: jnp.sum(x[:1] @ p["a"] + jnp.zeros((5, 16)) * p["b"][0, 0], 0), 1),
        (lambda p, x: x @ p["a"][:, :1] + 0 * p["b"][:, :1].T, 1),
        (lambda p, x: (x @ p["a"], p["b"][0, 0], p["b"][0, :1], p["b"][:1, 0]), 1),
        (lambda p, x: x @ p["a"] + jnp.sum(p["b"][:0]), 1),
        (lambda p, x: (x @ p["a"][:, :0]) @ p["b"][:0] + x @ p["a"] @ p["b"], 1),
        (lambda p, x: jax.lax.fori_loop(0, 2, lambda i, x: x @ p["a"] @ p["a"].T, x) @ p["a"], 1),
    ],
)  # fmt: skip
def test_forms(apply: Any, count: int, sparse: None) -> None:
    """Where weights stand, what follows a product, and what joins it to the next."""
    rng = np.random.default_rng(0)
    params = {"a": rng.standard_normal((12, 16)), "b": rng.standard_normal((16, 3))}
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params)
    masks = {"a": rng.random((12, 16)) < 0.5, "b": np.ones((16, 3), bool)}
    x = inputs(6, 12)
    fast = jp.compile_sparse(apply, params, masks, x)
    check(fast, apply, params, masks, x)
    assert calls(fast, x) == count


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_other_dtypes_are_dense(dtype: Any, sparse: None) -> None:
    params = jax.tree.map(lambda w: w.astype(dtype), mlp_params(20, 30, 5, bias=False))
    masks = random_masks(params, 0.2)
    x = inputs(6, 20).astype(dtype)
    fast = jp.compile_sparse(mlp, params, masks, x)
    assert calls(fast, x) == 0
    expected = mlp(masked_by_hand(params, masks), x)
    np.testing.assert_allclose(*map(np.float32, (fast(x), expected)), rtol=0.02, atol=0.02)


def test_elsewhere_units_are_removed_alone(monkeypatch: pytest.MonkeyPatch, sparse: None) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    params = mlp_params(20, 30, 5)
    masks = random_masks(params, 0.2)
    masks["w0"][:, :10], masks["b0"][:10] = False, False
    fast = jp.compile_sparse(mlp, params, masks, inputs(6, 20))
    check(fast, mlp, params, masks, inputs(6, 20))
    text = str(jax.make_jaxpr(fast)(inputs(6, 20)))
    assert "ffi_call" not in text
    assert "f32[20,30]" not in text


def test_fastest() -> None:
    def after(seconds: float, result: float) -> Any:
        def run(x: Any) -> Any:
            time.sleep(seconds)
            return x + result

        return run

    x = jnp.ones(3)
    assert inference.fastest([after(0.02, 0), after(0.002, 0), after(0.01, 0)], x) == 1
    assert inference.fastest([after(0.005, 0), after(0, 1)], x) == 0


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.98])
def test_measured(sparsity: float) -> None:
    params = {"hidden": mlp_params(200, 100, bias=False)["w0"], "logits": jnp.ones((100, 3))}

    def apply(params: Any, x: Any) -> Any:
        return jax.nn.relu(x @ params["hidden"]) @ params["logits"]

    masks = jp.weight_masks(params, sparsity)
    fast = jp.compile_sparse(apply, params, masks, inputs(64, 200))
    check(fast, apply, params, masks, inputs(64, 200))


def test_threads(sparse: None) -> None:
    params = mlp_params(200, 300, 100, 10)
    masks = random_masks(params, 0.1)
    fast = jp.compile_sparse(mlp, params, masks, inputs(300, 200))
    batches = [inputs(n, 200) for n in (300, 1, 40, 7)]
    wrong = []

    def call(x: Any) -> None:
        for _ in range(50):
            try:
                check(fast, mlp, params, masks, x)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=call, args=(x,)) for x in batches * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_memory(sparse: None) -> None:
    params = mlp_params(1000, 1000, 1000, bias=False)
    masks = random_masks(params, 0.01)
    kept = sum(np.count_nonzero(mask) for mask in masks.values())

    def held() -> int:
        gc.collect()
        arrays = [a for a in gc.get_objects() if isinstance(a, np.ndarray)]
        return sum(a.nbytes for a in [*jax.live_arrays(), *arrays])

    before = held()
    fast = jp.compile_sparse(mlp, params, masks, inputs(2, 1000))
    fast(inputs(80, 1000))
    assert held() - before < 40 * kept < 0.2 * 4 * 2_000_000


def test_everything_masked() -> None:
    params = mlp_params(20, 30, 5, bias=False)
    masks = jax.tree.map(lambda w: np.zeros(w.shape, bool), params)
    fast = jp.compile_sparse(mlp, params, masks, inputs(6, 20))
    np.testing.assert_array_equal(fast(inputs(6, 20)), np.zeros((6, 5)))


def test_everything_masked_but_biases(sparse: None) -> None:
    params = mlp_params(20, 30, 5)
    masks = {name: np.full(w.shape, name.startswith("b")) for name, w in params.items()}
    fast = jp.compile_sparse(mlp, params, masks, inputs(6, 20))
    np.testing.assert_array_equal(fast(inputs(6, 20)), jnp.broadcast_to(params["b1"], (6, 5)))


def test_bad_masks() -> None:
    params = mlp_params(4, 3, bias=False)
    for masks, error, match in [
        ({"w1": np.ones((4, 3), bool)}, ValueError, "w0"),
        ({"w0": np.ones((3, 4), bool)}, ValueError, r"'w0'.*\(3, 4\)"),
        ({"w0": np.ones((4, 3))}, TypeError, "mask 'w0' must be bool"),
    ]:
        with pytest.raises(error, match=match):
            jp.compile_sparse(mlp, params, masks, inputs(2, 4))


def test_no_masked_products() -> None:
    params = {"kernel": jnp.ones((3, 3, 1, 2)), "logits": jnp.ones((2, 3))}

    def apply(params: Any, x: Any) -> Any:
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "SAME", dimension_numbers=dims
        )
        return jnp.mean(x, (1, 2)) @ params["logits"]

    masks = random_masks(params, 0.5) | {"logits": np.ones((2, 3), bool)}
    with pytest.raises(ValueError, match="no masked leaf is the weights of a matrix product"):
        jp.compile_sparse(apply, params, masks, inputs(2, 4, 4, 1))


def test_stacks_of_products() -> None:
    params = {"experts": jnp.ones((2, 4, 3))}
    with pytest.raises(ValueError, match="and of one, not of a stack"):
        jp.compile_sparse(
            lambda p, x: jnp.einsum("bed,edf->bef", x, p["experts"]),
            params, random_masks(params, 0.5), inputs(5, 2, 4),
        )  # fmt: skip


def test_no_derivative(sparse: None) -> None:
    params = mlp_params(20, 30, 5)
    fast = jp.compile_sparse(mlp, params, random_masks(params, 0.2), inputs(7, 20))
    with pytest.raises(NotImplementedError, match="differentiate the masked network"):
        jax.grad(lambda x: fast(x).sum())(inputs(7, 20))


def test_another_tree_of_inputs(sparse: None) -> None:
    params = mlp_params(20, 30)
    masks = random_masks(params, 0.2)
    fast = jp.compile_sparse(lambda p, x: mlp(p, x["a"]), params, masks, {"a": inputs(7, 20)})
    with pytest.raises(ValueError, match="inputs must be a tree like the example's, of 1 leaves"):
        jax.jit(fast)({"a": inputs(7, 20), "b": inputs(7, 20)})


def test_keys(sparse: None) -> None:
    """Random numbers come of the inputs, or of the parameters."""
    params = mlp_params(20, 30, 5)
    masks = random_masks(params, 0.2)

    def apply(params: Any, x: Any) -> Any:
        x, key = x
        return mlp(params, jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0))

    fast = jp.compile_sparse(apply, params, masks, (inputs(7, 20), jax.random.key(0)))
    for call in (fast, jax.jit(fast)):
        check(call, apply, params, masks, (inputs(9, 20), jax.random.key(1)))
    params, masks = params | {"key": jax.random.key(2)}, masks | {"key": np.False_}
    fast = jp.compile_sparse(lambda p, x: mlp({n: p[n] for n in p if n != "key"}, x), params,
                             masks, inputs(7, 20))  # fmt: skip
    assert fast(inputs(7, 20)).shape == (7, 5)


def test_what_is_held_is_a_copy(sparse: None) -> None:
    params = mlp_params(20, 30, 5)
    masks = random_masks(params, 0.2)
    expected = mlp(masked_by_hand(params, masks), inputs(9, 20))
    given: Any = {n: np.array(w) if n == "b0" else jnp.array(w) for n, w in params.items()}
    fast = jp.compile_sparse(mlp, given, masks, inputs(7, 20))
    given["b0"][:] = 0
    given["b1"].delete()
    np.testing.assert_allclose(fast(inputs(9, 20)), expected, rtol=0, atol=1e-4)


def test_warnings_stay_as_they_are() -> None:
    params = mlp_params(20, 30, 5, bias=False)
    masks = jax.tree.map(lambda w: np.zeros(w.shape, bool), params)
    before = list(warnings.filters)
    threads = [
        threading.Thread(target=jp.compile_sparse, args=(mlp, params, masks, inputs(n, 20)))
        for n in range(1, 5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


def test_a_network_that_is_never_the_same() -> None:
    params = mlp_params(20, 30)
    count = iter(range(10**6))

    def apply(params: Any, x: Any) -> Any:
        kind = jax.ShapeDtypeStruct((), jnp.float32)
        return mlp(params, x) + jax.pure_callback(lambda: np.float32(next(count)), kind)

    fast = jp.compile_sparse(apply, params, random_masks(params, 0.2), inputs(7, 20))
    assert calls(fast, inputs(7, 20)) == 0


def test_double_precision(sparse: None) -> None:
    params = mlp_params(20, 30)

    def apply(params: Any, x: Any) -> Any:
        return mlp(jax.tree.map(lambda w: w.astype(x.dtype), params), x)

    fast = jp.compile_sparse(apply, params, random_masks(params, 0.2), inputs(7, 20))
    with jax.enable_x64(True):
        x = jnp.asarray(np.ones((7, 20)))
        assert fast(x).dtype == jax.jit(fast)(x).dtype == jnp.float64
        assert jax.jit(fast)(x[:3]).dtype == jnp.float64


def test_no_values() -> None:
    params = mlp_params(4, 3, bias=False)
    masks = random_masks(params, 0.5)
    with pytest.raises(TypeError, match="x must have values"):
        jp.compile_sparse(mlp, params, masks, jax.ShapeDtypeStruct((2, 4), jnp.float32))
    with pytest.raises(TypeError, match="params must have values, leaf 'w0' has none"):
        jax.jit(lambda p: jp.compile_sparse(mlp, p, masks, inputs(2, 4))(inputs(2, 4)))(params)
