"""Networks: functions lifted, Flax modules wrapped, small standard ones, those found by name."""

import inspect
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

from jaxprune.networks import (
    NETWORKS,
    Example,
    as_network,
    check_state,
    linen,
    mlp,
    network,
    nnx,
    resolve,
)
from jaxprune.networks.small import convnet, resnet20, transformer
from jaxprune.trees import paths_and_leaves
from jaxprune.types import Network

# Of a kind that compiles in no time.
KEY, OTHER = (jax.random.key(seed, impl="unsafe_rbg") for seed in (0, 1))
IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8)).astype(np.float32)
TOKENS = np.random.default_rng(0).integers(0, 7, (3, 6)).astype(np.int32)


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in paths_and_leaves(tree)}


def size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def assert_equal(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def differs(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return any(bool((a != b).any()) for a, b in pairs)


def drawn(net: Network) -> tuple[Any, Any]:
    """Return parameters and a state of all ones, without compiling `init`."""
    rng = np.random.default_rng(0)
    params, state = jax.eval_shape(net.init, KEY)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape, scale=0.3).astype(s.dtype), params)
    return params, jax.tree.map(lambda s: np.ones(s.shape, s.dtype), state)


# --- Functions ---------------------------------------------------------------------------------


def product(params: Any, x: Any) -> Any:
    return x @ params["w"]


def start(key: Any) -> Any:
    return {"w": jax.random.normal(key, (3, 2))}


def test_functions_are_lifted() -> None:
    net = network(start, product, prunable=lambda path, leaf: True)
    params, state = net.init(KEY)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert_equal(params, start(KEY))
    assert state == {} and net.prunable("w", None)
    assert_equal(net.apply(params, state, x), x @ params["w"])
    assert_equal(net.train(params, {"kept": x}, x, KEY), (x @ params["w"], {"kept": x}))


def test_a_lifted_network_compiles_once() -> None:
    traces = []

    def apply(params: Any, x: Any) -> Any:
        traces.append(x)
        return product(params, x)

    run = jax.jit(lambda net, params, x: net.apply(params, {}, x), static_argnums=0)
    for _ in range(2):  # of equal functions, equal networks
        run(network(start, apply), start(KEY), jnp.ones((2, 3)))
    assert len(traces) == 1
    assert as_network(apply) == as_network(apply) != as_network(product)
    assert hash(as_network(apply)) == hash(as_network(apply))
    assert as_network(apply).apply != as_network(apply).train


def test_what_is_a_network_already() -> None:
    net = network(start, product)
    assert as_network(net) is net
    lifted = as_network(product)
    assert_equal(lifted.apply(start(KEY), {}, jnp.ones((2, 3))), jnp.ones((2, 3)) @ start(KEY)["w"])
    with pytest.raises(ValueError, match=r"has no initial parameters: use network\(init, apply\)"):
        lifted.init(KEY)
    with pytest.raises(TypeError, match=r"a Network or a function apply\(params, x\), got 3"):
        inspect.unwrap(as_network)(3)  # pyright: ignore[reportArgumentType]


def test_variables_of_linen_are_no_parameters() -> None:
    module, x = Normed(), jnp.ones((2, 3))
    net = network(lambda key: module.init(key, x), lambda params, x: module.apply(params, x))
    message = r"init returns 'batch_stats' beside 'params'.*: use linen\(module, x\)"
    with pytest.raises(ValueError, match=message):
        net.init(KEY)
    assert "params" in network(lambda key: {"params": start(key)}, product).init(KEY)[0]


# --- Linen -------------------------------------------------------------------------------------


class Normed(nn.Module):
    """BatchNorm and dropout; what it sows is no state."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(8)(x))
        self.sow("intermediates", "normed", x)
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(x))


@pytest.fixture(scope="module")
def normed() -> tuple[Network, Any, Any, Any]:
    x = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)
    net = linen(Normed(), x)
    return net, *net.init(KEY), x


def test_linen_is_the_module_by_hand(normed: Any) -> None:
    net, params, state, x = normed
    variables = Normed().init(KEY, x)
    assert_equal(params, variables["params"])
    assert list(state) == ["batch_stats"]
    assert_equal(state["batch_stats"], variables["batch_stats"])

    rngs = {"dropout": jax.random.fold_in(OTHER, 0)}
    expected, updated = Normed().apply(variables, x, train=True, rngs=rngs, mutable=["batch_stats"])
    outputs, trained = net.train(params, state, x, OTHER)
    assert_equal((outputs, trained["batch_stats"]), (expected, updated["batch_stats"]))
    hidden = x @ np.asarray(params["Dense_0"]["kernel"])  # the bias starts from zero
    mean = trained["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, 0.5 * hidden.mean(0), rtol=1e-4, atol=1e-6)

    variables = {"params": params, **trained}
    assert_equal(net.apply(params, trained, x), Normed().apply(variables, x))
    assert differs(net.apply(params, trained, x), net.apply(params, state, x))
    check_state(net, params, state, x)


def test_the_key_alone_decides_what_training_draws(normed: Any) -> None:
    net, params, state, x = normed
    train = jax.jit(net.train)
    assert_equal(train(params, state, x, KEY), train(params, state, x, KEY))
    assert differs(train(params, state, x, KEY)[0], train(params, state, x, OTHER)[0])


def train_levels(net: Network, params: Any, state: Any, x: Any) -> tuple[Any, Any]:
    """Train two levels side by side in a compiled loop, with gradients; and one after another."""

    def step(params: Any, state: Any, key: Any) -> tuple[Any, Any]:
        def loss(params: Any) -> Any:
            outputs, new = net.train(params, state, x, key)
            return jnp.mean(outputs**2), new

        gradients, state = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda w, g: w - 0.1 * g, params, gradients), state

    def run(params: Any, state: Any) -> Any:
        def body(i: Any, carry: Any) -> Any:
            return step(carry[0], carry[1], jax.random.fold_in(KEY, i))

        return jax.lax.fori_loop(0, 2, body, (params, state))

    levels = [jax.tree.map(lambda leaf, f=f: f * leaf, (params, state)) for f in (1.0, 0.5)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *levels)
    together = jax.jit(jax.vmap(run))(*stacked)
    one, alone = jax.jit(step), []
    for carry in levels:
        for i in range(2):
            carry = one(*carry, jax.random.fold_in(KEY, i))
        alone.append(carry)
    return together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)


def test_linen_trains_levels_in_a_loop(normed: Any) -> None:
    net, params, state, x = normed
    together, alone = train_levels(net, params, state, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), together, alone
    )
    assert differs(together[1], jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state))


class Told(nn.Module):
    """Returns what it was told."""

    @nn.compact
    def __call__(
        self, x: Any, *, is_training: bool, deterministic: bool = False, twice: int = 1
    ) -> Any:
        return {"training": is_training, "deterministic": deterministic, "twice": twice, "x": x}


def test_how_a_linen_module_is_told_that_it_trains() -> None:
    x = jnp.ones((2, 3))

    def told(net: Network) -> tuple[Any, Any]:
        params, state = net.init(KEY)
        assert (params, state) == ({}, {})
        outputs = net.apply(params, state, x), net.train(params, state, x, KEY)[0]
        return tuple((o["training"], o["deterministic"], o["twice"]) for o in outputs)

    assert told(linen(Told(), x)) == ((False, True, 1), (True, False, 1))
    train = {"is_training": True, "twice": 2}
    assert told(linen(Told(), x, train=train)) == ((False, True, 1), (True, False, 2))
    score = {"is_training": True}
    assert told(linen(Told(), x, score=score)) == ((True, False, 1), (True, False, 1))
    dense = linen(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]), x)
    params, state = dense.init(KEY)
    assert_equal(dense.train(params, state, x, KEY), (dense.apply(params, state, x), {}))


class Sowing(nn.Module):
    """Keeps a loss, or a counter that only training makes."""

    sows: bool

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        if self.sows:
            self.sow("losses", "aux", jnp.sum(x))
        elif train:
            self.variable("counters", "steps", lambda: jnp.zeros(())).value += 1
        return nn.Dense(2)(x)


@pytest.mark.parametrize(
    ("sows", "message"),
    [
        (True, r"leaf 'losses/aux/1' is missing before a step and float32 \(\) after it"),
        (False, r"leaf 'counters/steps' is missing before a step and float32 \(\) after it"),
    ],
)
def test_state_whose_tree_changes(sows: bool, message: str) -> None:
    net = linen(Sowing(sows), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=f"^state changes its tree in training: {message}$"):
        check_state(net, *net.init(KEY), jnp.ones((2, 3)))


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ({"n": np.zeros(2, np.float32)}, r"leaf 'n' is int32 \(2,\) .* and float32 \(2,\) after"),
        ({"n": np.zeros(3, np.int32)}, r"leaf 'n' is int32 \(2,\) before a step and int32 \(3,\)"),
        ({}, r"leaf 'n' is int32 \(2,\) before a step and missing after it"),
        ({"n": [np.zeros(2, np.int32)]}, "leaf 'n' is int32 .* and missing after it"),
        ({"n": np.zeros(2, np.int32), "m": []}, r"PyTreeDef\(.*\) before a step, PyTreeDef"),
    ],
)
def test_state_that_changes_its_shape(after: Any, message: str) -> None:
    def train(params: Any, state: Any, x: Any, key: Any) -> Any:
        return x, after

    net = Network(lambda key: ({}, {}), lambda params, state, x: x, train)
    with pytest.raises(ValueError, match=message):
        check_state(net, {}, {"n": np.zeros(2, np.int32)}, np.zeros(1))


# --- NNX ---------------------------------------------------------------------------------------


class ConvNNX(flax_nnx.Module):
    """BatchNorm, two dropouts, a shared kernel and a list of layers."""

    def __init__(self, rngs: flax_nnx.Rngs):
        self.conv = flax_nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = flax_nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.blocks = flax_nnx.List([flax_nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.dropouts = flax_nnx.List([flax_nnx.Dropout(0.5, rngs=rngs) for _ in range(2)])
        self.output = flax_nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = jnp.mean(flax_nnx.relu(self.norm(self.conv(x[..., None]))), axis=(1, 2))
        for block, dropout in zip(self.blocks, self.dropouts, strict=True):
            x = dropout(block(x))
        return self.output(x)


def test_nnx_is_the_module_by_hand() -> None:
    net = nnx(ConvNNX)
    params, state = net.init(KEY)
    module = ConvNNX(flax_nnx.Rngs(KEY))
    assert_equal(params, flax_nnx.to_pure_dict(flax_nnx.state(module, flax_nnx.Param)))
    assert shapes(params)["blocks/1/kernel"] == (4, 4)
    assert shapes(state) == {"norm/mean": (4,), "norm/var": (4,)}

    module.train()
    flax_nnx.reseed(module, default=OTHER)
    expected = module(IMAGES)
    outputs, trained = net.train(params, state, IMAGES, OTHER)
    assert_equal((outputs, trained["norm"]["mean"]), (expected, module.norm.mean[...]))
    assert differs(trained, state)
    module.eval()
    assert_equal(net.apply(params, trained, IMAGES), module(IMAGES))
    assert differs(outputs, net.train(params, state, IMAGES, KEY)[0])
    check_state(net, params, state, IMAGES)


def test_nnx_trains_levels_in_a_loop() -> None:
    net = nnx(ConvNNX)
    params, state = net.init(KEY)
    together, alone = train_levels(net, params, state, jnp.asarray(IMAGES))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), together, alone
    )
    assert differs(together[1], jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state))


def test_dropouts_of_one_nnx_module_differ() -> None:
    class Twice(flax_nnx.Module):
        def __init__(self, rngs: flax_nnx.Rngs):
            self.one = flax_nnx.Dropout(0.5, rngs=rngs)
            self.other = flax_nnx.Dropout(0.5, rngs=rngs)
            make = flax_nnx.vmap(lambda rngs: flax_nnx.Dropout(0.5, rngs=rngs))
            self.copies = make(rngs.split(2))

        def __call__(self, x: Any) -> Any:
            copies = flax_nnx.vmap(lambda dropout, x: dropout(x), in_axes=(0, None))
            return jnp.concatenate([self.one(x)[None], self.other(x)[None], copies(self.copies, x)])

    outputs, state = nnx(Twice).train({}, {}, jnp.ones(64), KEY)
    assert state == {} and len({row.tobytes() for row in np.asarray(outputs)}) == 4


def test_an_nnx_instance_gives_its_parameters_to_all_seeds() -> None:
    module = flax_nnx.Linear(3, 2, rngs=flax_nnx.Rngs(5))
    kernel, net = np.asarray(module.kernel[...]), nnx(module)
    module.kernel[...] = jnp.zeros((3, 2))  # the network keeps what it was given
    first, second = net.init(KEY), net.init(OTHER)
    assert_equal((first[0]["kernel"], second[0]["kernel"]), (kernel, kernel))
    jax.tree.map(lambda leaf: leaf.delete(), first)  # as a run does that donates its parameters
    assert_equal(net.init(KEY)[0]["kernel"], kernel)


def test_arguments_of_an_nnx_module() -> None:
    class Called(flax_nnx.Module):
        def __call__(self, x: Any, *, rngs: flax_nnx.Rngs, training: bool) -> Any:
            return x + jax.random.normal(rngs.dropout(), x.shape) if training else -x

    net, x = nnx(lambda rngs: Called()), jnp.ones(3)
    assert_equal(net.apply({}, {}, x), -x)
    expected = x + jax.random.normal(flax_nnx.Rngs(KEY).dropout(), x.shape)
    assert_equal(net.train({}, {}, x, KEY), (expected, {}))
    with pytest.raises(TypeError, match="an nnx.Module or a function rngs -> nnx.Module, got 3"):
        nnx(3)
    with pytest.raises(TypeError, match=r"model\(rngs\) must return an nnx.Module, got dict"):
        nnx(lambda rngs: {})


# --- Equinox -----------------------------------------------------------------------------------


def test_an_equinox_model_needs_no_wrapper() -> None:
    def make(key: Any) -> Any:
        return eqx.nn.MLP(4, 2, 8, 1, key=key)

    def init(key: Any) -> Any:
        return eqx.partition(make(key), eqx.is_array)[0]

    def apply(params: Any, x: Any) -> Any:
        return jax.vmap(eqx.combine(params, static))(x)

    static = eqx.partition(make(jax.random.key(0)), eqx.is_array)[1]
    net = network(init, apply)
    params, state = jax.jit(net.init)(OTHER)
    assert shapes(params)["layers/0/weight"] == (8, 4)  # (outputs, inputs)
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    weights = [(np.asarray(layer.weight), np.asarray(layer.bias)) for layer in params.layers]
    hidden = np.maximum(x @ weights[0][0].T + weights[0][1], 0)
    expected = hidden @ weights[1][0].T + weights[1][1]
    outputs = jax.jit(net.apply)(params, state, x)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(net.train(p, state, x, KEY)[0] ** 2)))(params)
    assert shapes(gradient) == shapes(params) and differs(gradient, params)


# --- Small networks ----------------------------------------------------------------------------


FIRST_WEIGHTS = [-0.5065341, 0.41127595, -0.58864343, -0.4399155]


def test_mlp_is_relu_of_products() -> None:
    init, apply = mlp(6, (4, 3), 2)
    params = jax.jit(init)(jax.random.key(0))
    assert shapes(params) == {
        "hidden_0/kernel": (6, 4), "hidden_1/kernel": (4, 3), "logits/kernel": (3, 2),
    }  # fmt: skip
    # Stored runs start from these weights: they change with jax's generator and nothing else.
    first = np.asarray(params["hidden_0"]["kernel"])[0]
    np.testing.assert_array_equal(first, np.array(FIRST_WEIGHTS, np.float32))
    x = np.random.default_rng(0).normal(size=(7, 2, 3)).astype(np.float32)  # of any shape
    expected = x.reshape(7, 6)
    for i, leaf in enumerate(jax.tree.leaves(params)):
        expected = expected @ np.asarray(leaf, np.float64)
        expected = np.maximum(expected, 0) if i < 2 else expected
    np.testing.assert_allclose(apply(params, x), expected, rtol=1e-5, atol=1e-6)
    assert_equal(apply(params, x), apply(params, x.reshape(7, 6)))
    assert_equal(apply(params, jnp.zeros((1, 6))), np.zeros((1, 2)))  # nothing is added anywhere


def test_initial_weights_of_mlp() -> None:
    init, _ = mlp(400, (300,), 10)
    kernel = np.asarray(jax.jit(init)(KEY)["hidden_0"]["kernel"])
    # A normal distribution cut at two standard deviations, of variance 1 / inputs after the cut.
    deviation = 1 / np.sqrt(400)
    np.testing.assert_allclose(kernel.std(), deviation, rtol=0.01)
    np.testing.assert_allclose(kernel.mean(), 0, atol=4 * deviation / np.sqrt(kernel.size))
    assert 2.2 < np.abs(kernel).max() / deviation <= 2 / 0.8796 + 1e-3


SMALL = {
    "mlp": (IMAGES, {"hidden_sizes": (6,)}, (4, 7)),
    "convnet": (IMAGES, {"widths": (3, 4), "hidden": 8}, (4, 7)),
    "resnet20": (IMAGES, {"width": 4, "blocks": 1}, (4, 7)),
    "transformer": (TOKENS, {"blocks": 1, "width": 8, "heads": 2}, (3, 6, 7)),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_networks(name: str) -> None:
    x, options, expected = SMALL[name]
    net = resolve(name)(Example(x[:2], 7), **options)
    params, state = drawn(net)
    check_state(net, params, state, x)
    apply = jax.jit(net.apply)
    scored = np.asarray(apply(params, state, x))
    assert scored.shape == expected
    np.testing.assert_allclose(apply(params, state, x[::-1]), scored[::-1], rtol=1e-5, atol=1e-6)

    def loss(params: Any, key: Any) -> Any:
        outputs, new = net.train(params, state, x, key)
        return jnp.mean(outputs**2), (outputs, new)

    step = jax.jit(jax.grad(loss, has_aux=True))
    gradient, (outputs, new) = step(params, KEY)
    assert all(np.isfinite(leaf).all() and (leaf != 0).any() for leaf in jax.tree.leaves(
        {path: leaf for path, leaf in paths_and_leaves(gradient) if "/key/bias" not in path}
    ))  # fmt: skip
    assert outputs.shape == expected
    assert (state != {}) == (name == "resnet20") == differs(state, new)
    assert differs(outputs, step(params, OTHER)[1][0]) == (name in ("convnet", "transformer"))


def test_small_networks_take_colours() -> None:
    x = jnp.ones((2, 8, 8, 3))
    for name, first in ("convnet", "conv_0/kernel"), ("resnet20", "stem/kernel"):
        net = NETWORKS[name](Example(x, 5))
        params, state = jax.eval_shape(net.init, KEY)
        assert shapes(params)[first][2] == 3
        assert jax.eval_shape(net.apply, params, state, x).shape == (2, 5)


def test_sizes_of_the_small_networks() -> None:
    def parameters(name: str, x: Any, outputs: int) -> int:
        return size(jax.eval_shape(NETWORKS[name](Example(x, outputs)).init, KEY)[0])

    assert parameters("mlp", np.zeros((2, 28, 28), np.float32), 10) == 2_386_000
    # 269,722 of the paper's network without parameters in shortcuts, and two of them.
    shortcuts = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    assert parameters("resnet20", np.zeros((2, 32, 32, 3), np.float32), 10) == 269_722 + shortcuts
    d, tokens, context = 144, 65, 128
    block = 4 * (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + 2 * 2 * d
    expected = 2 * tokens * d + context * d + 4 * block + 2 * d
    assert parameters("transformer", np.zeros((2, context), np.int32), tokens) == expected
    assert 0.9e6 < expected < 1.1e6


def test_initial_weights_are_of_their_kind() -> None:
    def deviations(name: str, x: Any, *paths: str) -> list[float]:
        init = NETWORKS[name](Example(x, 65)).init

        @jax.jit  # which computes no other leaf
        def some(key: Any) -> list[Any]:
            leaves = dict(paths_and_leaves(init(key)[0]))
            return [leaves[path] for path in paths]

        return [float(np.std(leaf)) for leaf in some(KEY)]

    x = np.zeros((2, 8, 8), np.float32)
    by_outputs, by_inputs = np.sqrt(2 / (9 * 64)), np.sqrt(2 / (9 * 32))  # of He et al.
    found = deviations("resnet20", x, "stage2_block1_conv2/kernel")
    assert found == pytest.approx([by_outputs], rel=0.02)
    found = deviations("convnet", x, "conv_1/kernel")
    assert found == pytest.approx([by_inputs], rel=0.03)
    same = "block0_attention/query/kernel", "block3_hidden/kernel", "tokens/embedding", "positions"
    residual = "block3_attention/out/kernel", "block3_out/kernel"
    found = deviations("transformer", np.zeros((2, 64), np.int32), *same, *residual)
    assert found == pytest.approx([0.02] * 4 + [0.02 / np.sqrt(8)] * 2, rel=0.04)


def test_the_transformer_is_causal() -> None:
    net = transformer(Example(TOKENS, 7), blocks=2, width=8, heads=2)
    params, state = drawn(net)
    apply = jax.jit(net.apply)
    before = apply(params, state, TOKENS)
    after = apply(params, state, np.concatenate([TOKENS[:, :4], 6 - TOKENS[:, 4:]], axis=1))
    assert_equal(after[:, :4], before[:, :4])
    assert (np.abs(after[:, 4:] - before[:, 4:]).max(axis=(0, 2)) > 0).all()
    # Positions count, and shorter inputs are prefixes.
    same = apply(params, state, np.full((1, 6), 3, np.int32))
    assert differs(same[:, 0], same[:, 1])
    np.testing.assert_allclose(
        apply(params, state, TOKENS[:, :4]), before[:, :4], rtol=1e-5, atol=1e-6
    )


# --- By name -----------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory with a user's modules, that is the current one."""
    (tmp_path / "own_networks.py").write_text(
        "from own_neighbour import start, product\n"
        "from jaxprune.networks import network\n"
        "make = lambda example, scale=1: network(start, product)\n"
        "nothing = lambda example: (start, product)\n"
        "number = 3\n"
    )
    (tmp_path / "own_neighbour.py").write_text("start = product = print\n")
    (tmp_path / "own_broken.py").write_text("import jax\n\nraise OSError('no\\n  disk')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_function_in_the_current_directory(own: None) -> None:
    make = resolve("own_networks:make")
    assert isinstance(make(Example(IMAGES, 2), scale=2), Network)
    with pytest.raises(ValueError, match=r"own_networks:nothing must return a Network.*got tuple$"):
        resolve("own_networks:nothing")(Example(IMAGES, 2))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lenet", "unknown network 'lenet': choose mlp, convnet, resnet20, transformer, or my_mod"),
        ("own_networks:", "expected module:function, got 'own_networks:'"),
        (":make", "expected module:function, got ':make'"),
        ("own_networks:a:b", "expected module:function, got 'own_networks:a:b'"),
        ("own_missing:make", "own_missing:make: importing own_missing failed: ModuleNotFoundError"),
        ("own_broken:make", "own_broken:make: importing own_broken failed: OSError: no disk$"),
        ("own_networks:other", "own_networks:other: own_networks has no 'other'$"),
        ("own_networks:number", "own_networks:number is no function but of type int$"),
    ],
)
def test_names_of_nothing(own: None, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as raised:
        resolve(spec)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("make", "x", "message"),
    [
        (convnet, np.zeros((2, 64), np.float32), r"convnet takes images.*, got float32 \(2, 64\)"),
        (resnet20, TOKENS, r"resnet20 takes images, floats.*, got int32 \(3, 6\)"),
        (transformer, IMAGES, r"takes tokens, integers \(batch, T\), got float32 \(4, 8, 8\)"),
        (NETWORKS["mlp"], TOKENS, r"mlp takes floats, \(batch, …\), got int32 \(3, 6\)"),
        (lambda e: transformer(e, heads=5), TOKENS, "heads must divide width, got 5 and 144"),
    ],
)
def test_data_that_a_network_is_not_for(make: Any, x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(Example(x, 7))
