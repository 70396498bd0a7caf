"""Which leaves are the weights of products, and which may be pruned, on networks of a few lines."""

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxprune.structure import Layer, layers, prunable
from jaxprune.trees import paths_and_leaves


def zeros(**shapes: tuple[int, ...]) -> Any:
    """Return leaves of the given shapes."""
    return {name: jnp.zeros(shape) for name, shape in shapes.items()}


def of_module(module: nn.Module, x: Any) -> tuple[Any, Any, Any]:
    """Return a module's apply, and the shapes of its variables and of x."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return module.apply, shapes, jax.eval_shape(lambda x: x, x)


KINDS = ("dense", "convolution", "embedding")


def found(apply: Any, params: Any, x: Any) -> dict[str, tuple[Any, ...]]:
    """Return kind, contracted and output axes, and whether it is last, by path."""
    listed = [layer for layer in layers(apply, params, x) if layer.kind in KINDS]
    assert len({layer.path for layer in listed}) == len(listed)
    return {layer.path.removeprefix("params/"): tuple(layer[1:5]) for layer in listed}


def chosen(apply: Any, params: Any, x: Any) -> list[str]:
    """Return the paths of the leaves that may be pruned."""
    flags = prunable(apply, params, x)
    assert jax.tree.structure(flags) == jax.tree.structure(params)
    return [path.removeprefix("params/") for path, flag in paths_and_leaves(flags) if flag]


HIDDEN, LAST = ("dense", (0,), (1,), False), ("dense", (0,), (1,), True)
EXPERTS = ("dense", (1,), (0, 2), False)
LOOKUP = ("embedding", (0,), (1,), False)
X = jnp.zeros((3, 5))


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.LayerNorm()(nn.Dense(6, name="a")(x)))
        return nn.log_softmax(nn.Dense(4, name="b")(x)).reshape(-1, 2, 2)


def test_mlp_of_linen() -> None:
    network = of_module(Dense(), X)
    assert found(*network) == {"a/kernel": HIDDEN, "b/kernel": LAST}
    assert chosen(*network) == ["a/kernel"]
    first = next(layer for layer in layers(*network) if layer.product)
    assert first == Layer("params/a/kernel", "dense", (0,), (1,), False)
    uses = {layer.path: (layer.kind, layer.of) for layer in layers(*network) if not layer.product}
    assert uses == {
        "params/a/bias": ("bias", ("params/a/kernel",)),
        "params/LayerNorm_0/scale": ("scale", ()),
        "params/LayerNorm_0/bias": ("bias", ()),
        "params/b/bias": ("bias", ("params/b/kernel",)),
    }


def test_kernels_of_equinox_are_outputs_by_inputs() -> None:
    mlp = eqx.filter_eval_shape(eqx.nn.MLP, 5, 3, 8, 2, key=jax.random.key(0))
    params, rest = eqx.partition(mlp, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    network = lambda params, x: jax.vmap(eqx.combine(params, rest))(x), params, X
    hidden, last = ("dense", (1,), (0,), False), ("dense", (1,), (0,), True)
    assert found(*network) == {
        "layers/0/weight": hidden, "layers/1/weight": hidden, "layers/2/weight": last
    }  # fmt: skip
    assert chosen(*network) == ["layers/0/weight", "layers/1/weight"]


class ConvNet(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def norm(name: str) -> nn.BatchNorm:
            return nn.BatchNorm(not self.train, name=name)

        x = nn.relu(norm("norm_a")(nn.Conv(6, (3, 3), name="a")(x)))
        x = nn.relu(x + norm("norm_b")(nn.Conv(6, (3, 3), feature_group_count=6, name="b")(x)))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@pytest.mark.parametrize("train", [False, True])
def test_residual_network_with_batch_norm(train: bool) -> None:
    """Its running statistics are outputs too, and convolutions reach them."""
    x = jnp.zeros((2, 6, 6, 2))
    apply, params, x = of_module(ConvNet(False), x)
    if train:
        module = ConvNet(True)
        apply = lambda params, x: module.apply(params, x, mutable=["batch_stats"])  # noqa: E731
    kernel = ("convolution", (0, 1, 2), (3,), False)
    assert found(apply, params, x) == {"a/kernel": kernel, "b/kernel": kernel, "head/kernel": LAST}
    assert chosen(apply, params, x) == ["a/kernel", "b/kernel"]


class Transformer(nn.Module):
    tied: bool
    head: bool = True

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        table = nn.Embed(11, 8, name="table")
        x = table(tokens) + nn.Embed(6, 8, name="positions")(jnp.arange(6))[None]
        x += self.param("shift", nn.initializers.zeros, (6, 8))[None]
        x += nn.MultiHeadDotProductAttention(num_heads=2, name="heads")(nn.LayerNorm()(x))
        x += nn.Dense(8, name="out")(nn.gelu(nn.Dense(16, name="in")(nn.LayerNorm()(x))))
        if not self.head:
            return x
        return table.attend(x) if self.tied else nn.Dense(11, name="logits")(x)


BLOCK = {
    "heads/key/kernel": ("dense", (0,), (1, 2), False),
    "heads/out/kernel": ("dense", (0, 1), (2,), False),
    "heads/query/kernel": ("dense", (0,), (1, 2), False),
    "heads/value/kernel": ("dense", (0,), (1, 2), False),
    "in/kernel": HIDDEN,
}
TOKENS = jnp.zeros((2, 6), int)


def test_transformer() -> None:
    network = of_module(Transformer(False), TOKENS)
    lookups = {"positions/embedding": LOOKUP, "table/embedding": LOOKUP}
    expected = BLOCK | {"logits/kernel": LAST, "out/kernel": HIDDEN} | lookups
    assert found(*network) == expected
    assert chosen(*network) == [*BLOCK, "out/kernel"]


def test_transformer_with_tied_embeddings() -> None:
    network = of_module(Transformer(True), TOKENS)
    table = [layer for layer in layers(*network) if layer.path == "params/table/embedding"]
    assert [layer[1:5] for layer in table] == [("dense", (1,), (0,), True), LOOKUP]
    assert chosen(*network) == [*BLOCK, "out/kernel"]


def test_a_network_that_ends_with_its_residual_stream() -> None:
    """Every block reaches the output, but all others are computed from the last one's inputs."""
    network = of_module(Transformer(False, head=False), TOKENS)
    assert found(*network)["out/kernel"] == LAST
    assert chosen(*network) == list(BLOCK)


class Recurrent(nn.Module):
    cell: Any
    head: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.RNN(self.cell(7, name="cell"))(x)
        return nn.Dense(3, name="head")(x[:, -1]) if self.head else x


@pytest.mark.parametrize("cell", [nn.OptimizedLSTMCell, nn.GRUCell])
def test_recurrent_networks(cell: Any) -> None:
    x = jnp.zeros((2, 5, 4))
    layout = found(*of_module(Recurrent(cell, True), x))
    assert layout.pop("head/kernel") == LAST
    assert set(layout.values()) == {HIDDEN}
    assert {path[5] for path in layout} == {"i", "h"}  # of inputs, and of the state
    assert chosen(*of_module(Recurrent(cell, True), x)) == sorted(layout)
    # What takes in the state that it makes comes after all that takes in the inputs.
    assert {path[5] for path in chosen(*of_module(Recurrent(cell, False), x))} == {"i"}


def routed(params: Any, x: Any) -> Any:
    """Send every example to one of four experts, by a lookup of its weights."""
    best = jnp.argmax(x @ params["router"], -1)
    x = jax.vmap(lambda x, i: jax.nn.relu(x @ params["a"][i]) @ params["b"][i])(x, best)
    return x @ params["out"]


def mixed(params: Any, x: Any) -> Any:
    """Weigh the results of four experts."""
    gates = jax.nn.softmax(x @ params["router"])
    h = jax.nn.relu(jnp.einsum("bi,eih->beh", x, params["a"]))
    return jnp.einsum("beh,eho,be->bo", h, params["b"], gates) @ params["out"]


def ragged(params: Any, x: Any) -> Any:
    """Send examples, sorted by expert, to four experts."""
    sizes = jnp.array([1, 1, 1, 0])
    h = jax.nn.relu(jax.lax.ragged_dot(x, params["a"], sizes))
    x = jax.lax.ragged_dot(h, params["b"], sizes) * jax.nn.softmax(x @ params["router"])[:, :1]
    return x @ params["out"]


@pytest.mark.parametrize("apply", [routed, mixed, ragged])
def test_mixture_of_experts(apply: Any) -> None:
    params = zeros(a=(4, 5, 6), b=(4, 6, 5), router=(5, 4), out=(5, 2))
    expected = {"a": EXPERTS, "b": EXPERTS, "out": LAST, "router": HIDDEN}
    if apply is mixed:  # sums over the experts
        expected["b"] = ("dense", (0, 1), (2,), False)
    assert found(apply, params, X) == expected
    assert chosen(apply, params, X) == ["a", "b", "router"]


def scanned(params: Any, x: Any) -> Any:
    @jax.checkpoint
    def layer(x: Any, kernels: Any) -> Any:
        return x + jax.nn.silu(x @ kernels[0]) @ kernels[1], None

    x, _ = jax.lax.scan(layer, x @ params["stem"], (params["a"], params["b"]))
    return x @ params["out"]


def looped(params: Any, x: Any) -> Any:
    def layer(i: Any, x: Any) -> Any:
        return x + jax.nn.silu(x @ params["a"][i]) @ params["b"][i]

    return jax.lax.fori_loop(jnp.array(0), 3, layer, x @ params["stem"]) @ params["out"]


@pytest.mark.parametrize("apply", [scanned, looped])
def test_stacked_layers(apply: Any) -> None:
    params = zeros(stem=(5, 4), a=(3, 4, 6), b=(3, 6, 4), out=(4, 2))
    expected = {"a": EXPERTS, "b": EXPERTS, "out": LAST, "stem": HIDDEN}
    assert found(apply, params, X) == expected
    assert chosen(apply, params, X) == ["a", "b", "stem"]


def test_stacked_layers_without_a_head() -> None:
    params = zeros(stem=(5, 4), a=(3, 4, 6), b=(3, 6, 4))
    apply = lambda params, x: scanned(params | {"out": jnp.eye(4)}, x)  # noqa: E731
    assert chosen(apply, params, X) == ["a", "stem"]


def two_heads(params: Any, x: Any) -> Any:
    x = jnp.tanh(x @ params["a"])
    return {"value": x @ params["b"], "policy": jax.nn.softmax(x @ params["c"])}


def wide_and_deep(params: Any, x: Any) -> Any:
    return x @ params["c"] + jnp.tanh(x @ params["a"]) @ params["b"]


@pytest.mark.parametrize(
    ("apply", "params"),
    [
        (two_heads, zeros(a=(5, 6), b=(6, 1), c=(6, 3))),
        (wide_and_deep, zeros(a=(5, 6), b=(6, 2), c=(5, 2))),
    ],
)
def test_several_last_layers(apply: Any, params: Any) -> None:
    assert found(apply, params, X) == {"a": HIDDEN, "b": LAST, "c": LAST}
    assert chosen(apply, params, X) == ["a"]


def test_features_that_are_returned_too_are_not_last() -> None:
    def apply(params: Any, x: Any) -> Any:
        x = x @ params["a"]
        return x, x @ params["b"]

    assert chosen(apply, zeros(a=(5, 6), b=(6, 3)), X) == ["a"]


KERNELS: dict[str, tuple[Any, dict[str, tuple[int, ...]], dict[str, tuple[Any, ...]]]] = {
    "transposed": (lambda p: p["w"].T, {"w": (6, 5)}, {"w": ("dense", (1,), (0,), False)}),
    "cast": (lambda p: p["w"].astype(jnp.bfloat16).astype(jnp.float32), {"w": (5, 6)},
             {"w": HIDDEN}),
    "reshaped": (lambda p: p["w"].reshape(5, 6), {"w": (5, 2, 3)},
                 {"w": ("dense", (0,), (1, 2), False)}),
    "masked by a constant": (lambda p: jnp.where(jnp.eye(5, 6) > 0, p["w"], 0), {"w": (5, 6)},
                             {"w": HIDDEN}),
    "scaled by its norm": (lambda p: p["w"] * p["g"][None] / jnp.linalg.norm(p["w"], axis=0)[None],
                           {"w": (5, 6), "g": (6,)}, {"w": HIDDEN}),
    "of low rank": (lambda p: p["w"] + p["u"] @ p["v"], {"w": (5, 6), "u": (5, 2), "v": (2, 6)},
                    {"u": HIDDEN, "v": HIDDEN, "w": HIDDEN}),
    "of low rank, outputs first": (lambda p: (p["u"] @ p["v"]).T, {"u": (6, 2), "v": (2, 5)},
                                   {"u": ("dense", (1,), (0,), False),
                                    "v": ("dense", (1,), (0,), False)}),
    "of pieces": (lambda p: jnp.concatenate([p["u"], p["v"]], 1), {"u": (5, 2), "v": (5, 4)},
                  {"u": HIDDEN, "v": HIDDEN}),
    "chosen by a fixed index": (lambda p: p["w"][jnp.array([1])][0], {"w": (2, 5, 6)},
                                {"w": EXPERTS}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KERNELS)
def test_kernels_that_are_made_of_leaves(kind: str) -> None:
    kernel, shapes, expected = KERNELS[kind]

    def apply(params: Any, x: Any) -> Any:
        return jax.jit(jax.nn.relu)(x @ kernel(params)) @ params["z"]

    params = zeros(**shapes, z=(6, 2))
    assert found(apply, params, X) == expected | {"z": LAST}
    assert chosen(apply, params, X) == sorted(expected)


def test_a_kernel_of_one_feature_in_and_one_out() -> None:
    def apply(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["a"] + params["b"][None]) @ params["c"]

    network = apply, zeros(a=(1, 6), b=(6,), c=(6, 1)), jnp.zeros((3, 1))
    assert found(*network) == {"a": HIDDEN, "c": LAST}
    assert chosen(*network) == ["a"]


def test_a_leaf_of_two_uses() -> None:
    def apply(params: Any, x: Any) -> Any:
        return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["a"].T) @ params["b"]

    params = zeros(a=(5, 6), b=(5, 2))
    expected = [("a", *HIDDEN), ("a", "dense", (1,), (0,), False), ("b", *LAST)]
    assert [tuple(layer[:5]) for layer in layers(apply, params, X)] == expected
    assert chosen(apply, params, X) == ["a"]


@jax.custom_vjp
def own_rule(x: Any) -> Any:
    return x * 2


own_rule.defvjp(lambda x: (x * 2, None), lambda _, g: (g,))


@pytest.mark.parametrize(
    "f",
    [
        own_rule,
        lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x),
        lambda x: jax.lax.while_loop(lambda y: y.sum() > 0, lambda y: y - 1, x),
        lambda x: jnp.sort(jnp.cumsum(x, 1), 1),
        lambda x: jnp.stack(jnp.unstack(jnp.tile(x, (1, 2)), axis=1), 1)[:, :6],
    ],
)
def test_whatever_lies_between(f: Any) -> None:
    def apply(params: Any, x: Any) -> Any:
        return f(f(x @ params["a"]) @ params["b"])

    params = zeros(a=(5, 6), b=(6, 6))
    assert found(apply, params, X) == {"a": HIDDEN, "b": LAST}
    assert found(lambda params, x: apply(jax.tree.map(f, params), x), params, X).keys() == {
        "a",
        "b",
    }


def test_branches_have_layers_of_their_own() -> None:
    def apply(params: Any, x: Any) -> Any:
        return jax.lax.cond(x.sum() > 0, lambda: x @ params["a"], lambda: x @ params["b"])

    params = zeros(a=(5, 2), b=(5, 2))
    assert found(apply, params, X) == {"a": LAST, "b": LAST}


def test_products_that_are_not_of_weights() -> None:
    """Of data, of constants, of what was looked up, and of what the first step of a loop is."""

    def apply(params: Any, x: Any) -> Any:
        def step(h: Any, _: Any) -> Any:
            return jnp.tanh(h @ x.T @ x), None

        h, _ = jax.lax.scan(step, jnp.tile(params["start"], (3, 1)), length=2)
        user = jnp.take(params["users"], jnp.argmax(x, 1), axis=0)
        h = h @ jnp.eye(5) * (user * x).sum(1, keepdims=True)
        return h @ params["out"] * (user[:, None] @ h[:, :, None])[:, 0]

    network = apply, zeros(start=(1, 5), users=(5, 5), out=(5, 2)), X
    assert found(*network) == {"out": LAST, "users": LOOKUP}
    assert chosen(*network) == []


def test_nothing_prunable() -> None:
    assert chosen(lambda params, x: x @ params["a"], zeros(a=(5, 2), b=(5, 2)), X) == []
    [layer] = layers(lambda params, x: x + params["a"][None], zeros(a=(5,)), X)
    assert (layer.kind, layer.of, layer.product) == ("bias", (), False)
    assert prunable(lambda params, x: x, {}, X) == {}


def test_integers_and_vectors_are_not_prunable() -> None:
    def apply(params: Any, x: Any) -> Any:
        kernel = params["levels"].astype(jnp.float32) * params["step"]
        return (x @ kernel + (x @ params["vector"])[:, None]) @ params["out"]

    params = zeros(step=(), vector=(5,), out=(6, 2)) | {"levels": jnp.zeros((5, 6), jnp.int8)}
    assert found(apply, params, X) == {
        "levels": HIDDEN, "out": LAST, "vector": ("dense", (0,), (), False)
    }  # fmt: skip
    assert chosen(apply, params, X) == []
