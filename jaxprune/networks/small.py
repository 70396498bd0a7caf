"""Small standard networks, each with the initialisation of its kind, and their names on commands.

A make function takes an `Example` of the data and returns a `Network` (`make(example)`), so that
sizes of inputs and outputs are never written down. Nothing depends on the names of layers.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jaxprune.files import import_function
from jaxprune.networks.lift import network
from jaxprune.networks.modules import linen
from jaxprune.types import Apply, Key, Network, Params

IMAGES = "images, floats (batch, rows, columns) or (batch, rows, columns, channels)"


class Example(NamedTuple):
    """What a network is made for.

    Attributes:
        x: a batch of two training inputs, (2, …).
        outputs: how many outputs: classes, tokens or targets.
    """

    x: Any
    outputs: int


class MLP(nn.Module):
    """A ReLU network without biases: `hidden_0`, `hidden_1`, …, `logits`."""

    hidden_sizes: Sequence[int]
    classes: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Return outputs, (batch, classes), of inputs, (batch, features)."""
        for i, size in enumerate(self.hidden_sizes):
            x = nn.relu(nn.Dense(size, use_bias=False, name=f"hidden_{i}")(x))
        return nn.Dense(self.classes, use_bias=False, name="logits")(x)


def mlp(
    features: int, hidden_sizes: Sequence[int], classes: int
) -> tuple[Callable[[Key], Params], Apply]:
    """Return the functions of a ReLU network without biases.

    Args:
        features: numbers in one input, whatever its shape.
        hidden_sizes: units of the hidden layers.
        classes: units of the last layer.

    Returns:
        `init(key) -> params`, kernels (inputs, outputs) float32, LeCun normal; and
        `apply(params, x) -> outputs`, (batch, classes), which flattens `x`, (batch, …).

    Example:
        >>> init, apply = mlp(4, (8,), 3)
        >>> apply(init(jax.random.key(0)), jnp.ones((5, 2, 2))).shape
        (5, 3)
    """
    module = MLP(tuple(hidden_sizes), classes)

    def init(key: Key) -> Params:
        return module.init(key, jnp.zeros((1, features)))["params"]

    def apply(params: Params, x: Any) -> Any:
        x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        return module.apply({"params": params}, x)

    return init, apply


class ConvNet(nn.Module):
    """Convolutions, each halved by pooling, a dense layer, dropout and the output."""

    widths: Sequence[int]
    hidden: int
    dropout: float
    outputs: int

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        """Return outputs, (batch, outputs), of images."""
        he = nn.initializers.he_normal()
        x = _channels_last(x)
        for i, width in enumerate(self.widths):
            x = nn.relu(nn.Conv(width, (3, 3), kernel_init=he, name=f"conv_{i}")(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")
        x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        x = nn.relu(nn.Dense(self.hidden, kernel_init=he, name="hidden")(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.outputs, name="output")(x)


class ResNet(nn.Module):
    """Three stages of residual blocks, of width w, 2w and 4w, with BatchNorm."""

    width: int
    blocks: int
    outputs: int

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        """Return outputs, (batch, outputs), of images."""
        he = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

        def conv(x: Any, width: int, size: int, stride: int, name: str) -> Any:
            kernel = (size, size)
            x = nn.Conv(width, kernel, stride, use_bias=False, kernel_init=he, name=name)(x)
            return nn.BatchNorm(not train, momentum=0.9, name=f"{name}_norm")(x)

        x = nn.relu(conv(_channels_last(x), self.width, 3, 1, "stem"))
        for stage, block in itertools.product(range(3), range(self.blocks)):
            width, stride = self.width * 2**stage, 2 if stage > 0 and block == 0 else 1
            name = f"stage{stage}_block{block}"
            y = nn.relu(conv(x, width, 3, stride, f"{name}_conv1"))
            y = conv(y, width, 3, 1, f"{name}_conv2")
            x = nn.relu(y + (x if stride == 1 else conv(x, width, 1, stride, f"{name}_shortcut")))
        return nn.Dense(self.outputs, name="output")(jnp.mean(x, axis=(1, 2)))


class Transformer(nn.Module):
    """A causal transformer over tokens, normalised before each sublayer, as GPT-2 is."""

    context: int
    blocks: int
    width: int
    heads: int
    dropout: float
    outputs: int

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        """Return outputs, (batch, T, outputs), of tokens, (batch, T), T at most `context`."""
        normal = nn.initializers.normal(0.02)
        # Sublayers add up to a stream whose variance would grow with their number.
        residual = nn.initializers.normal(0.02 / math.sqrt(2 * self.blocks))
        dense = partial(nn.Dense, kernel_init=normal)
        drop = partial(nn.Dropout, self.dropout, deterministic=not train)
        mask = nn.make_causal_mask(x, dtype=bool)
        positions = self.param("positions", normal, (self.context, self.width))
        tokens = nn.Embed(self.outputs, self.width, embedding_init=normal, name="tokens")(x)
        x = drop()(tokens + positions[None, : x.shape[1]])
        for i in range(self.blocks):
            attention = nn.MultiHeadDotProductAttention(
                self.heads, kernel_init=normal, out_kernel_init=residual, broadcast_dropout=False,
                dropout_rate=self.dropout, deterministic=not train, name=f"block{i}_attention",
            )  # fmt: skip
            x = x + drop()(attention(nn.LayerNorm(name=f"block{i}_norm1")(x), mask=mask))
            y = nn.LayerNorm(name=f"block{i}_norm2")(x)
            y = nn.gelu(dense(4 * self.width, name=f"block{i}_hidden")(y))
            out = dense(self.width, kernel_init=residual, name=f"block{i}_out")
            x = x + drop()(out(y))
        x = nn.LayerNorm(name="norm")(x)
        return dense(self.outputs, use_bias=False, name="output")(x)


def make_mlp(example: Example, *, hidden_sizes: Sequence[int] = (1000, 1000, 500, 200)) -> Network:
    """Make a ReLU network without biases for inputs of any shape, (batch, …) of floats.

    Args:
        example: what it is made for.
        hidden_sizes: units of the hidden layers.

    Returns:
        A network without state.

    Raises:
        ValueError: the inputs are not floats.

    Example:
        >>> net = make_mlp(Example(jnp.ones((2, 28, 28)), 10), hidden_sizes=(8,))
        >>> params, state = net.init(jax.random.key(0))
    """
    _check("mlp", example, "floats, (batch, …)", jnp.floating)
    return network(*mlp(math.prod(example.x.shape[1:]), hidden_sizes, example.outputs))


def convnet(
    example: Example, *, widths: Sequence[int] = (32, 64), hidden: int = 128, dropout: float = 0.5
) -> Network:
    """Make a convolutional network with dropout for images, initialised as He et al. do.

    Args:
        example: what it is made for; inputs (batch, rows, columns) or with channels behind.
        widths: channels of the 3 × 3 convolutions; max pooling halves the image after each.
        hidden: units of the dense layer between convolutions and output.
        dropout: the share of these units that a training step drops.

    Returns:
        A network without state, whose training draws from its key.

    Raises:
        ValueError: the inputs are no images.

    Example:
        >>> net = convnet(Example(jnp.ones((2, 28, 28)), 10))
        >>> params, state = net.init(jax.random.key(0))
    """
    _check("convnet", example, IMAGES, jnp.floating, (3, 4))
    return linen(ConvNet(tuple(widths), hidden, dropout, example.outputs), example.x)


def resnet20(example: Example, *, width: int = 16, blocks: int = 3) -> Network:
    """Make the ResNet-20 of CIFAR for images, whose BatchNorm statistics are its state.

    Args:
        example: what it is made for; inputs (batch, rows, columns) or with channels behind.
        width: channels of the first stage, doubled in the second and again in the third.
        blocks: residual blocks a stage.

    Returns:
        A network with state; 272,474 parameters for (32, 32, 3) and ten classes.

    Raises:
        ValueError: the inputs are no images.

    Example:
        >>> net = resnet20(Example(jnp.ones((2, 8, 8)), 10), width=4, blocks=1)
        >>> params, state = net.init(jax.random.key(0))

    Reference:
        He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016. Where the
        width changes, the shortcut is a 1 × 1 convolution (their option B; on CIFAR they pad).
    """
    _check("resnet20", example, IMAGES, jnp.floating, (3, 4))
    return linen(ResNet(width, blocks, example.outputs), example.x)


def transformer(
    example: Example, *, blocks: int = 4, width: int = 144, heads: int = 4, dropout: float = 0.1
) -> Network:
    """Make a character transformer, whose context is the length of the example's inputs.

    Kernels and embeddings start from N(0, 0.02²), those that end a sublayer from a deviation of
    0.02 / √(2 · blocks). All LayerNorms use the fast variance, E[x²] − E[x]², in which a unit of
    zeros counts as zero.

    Args:
        example: what it is made for; inputs are tokens, (batch, T) of integers below `outputs`.
        blocks: layers of attention and MLP.
        width: of the residual stream; the MLPs are four times as wide.
        heads: heads of attention; they divide `width`.
        dropout: the share dropped of embeddings, attention and sublayers' outputs in training.

    Returns:
        A network without state, whose training draws from its key; about a million parameters.

    Raises:
        ValueError: the inputs are no tokens, or `heads` does not divide `width`.

    Example:
        >>> net = transformer(Example(jnp.zeros((2, 16), jnp.int32), 65), blocks=1, width=8)
        >>> params, state = net.init(jax.random.key(0))

    Reference:
        Radford et al.: Language Models are Unsupervised Multitask Learners, 2019. The output layer
        has a kernel of its own; theirs is that of the tokens.
    """
    _check("transformer", example, "tokens, integers (batch, T)", jnp.integer, (2,))
    if width % heads:
        raise ValueError(f"heads must divide width, got {heads} and {width}")
    context = example.x.shape[1]
    return linen(Transformer(context, blocks, width, heads, dropout, example.outputs), example.x)


NETWORKS: dict[str, Callable[..., Network]] = {
    "mlp": make_mlp, "convnet": convnet, "resnet20": resnet20, "transformer": transformer,
}  # fmt: skip


def resolve(spec: str) -> Callable[..., Network]:
    """Return the make function that a command names.

    Args:
        spec: a key of `NETWORKS`, or `module:function` of a function `make(example)`; modules are
            found in the current directory too.

    Returns:
        `make(example, **options) -> Network`.

    Raises:
        ValueError: in one line, there is no such network or function; what is returned raises it
            where a user's function returns no `Network`.

    Example:
        >>> resolve("mlp") is make_mlp
        True
    """
    if spec in NETWORKS:
        return NETWORKS[spec]
    if ":" not in spec:
        raise ValueError(
            f"unknown network {spec!r}: choose {', '.join(NETWORKS)}, or my_module:make, a "
            "function make(example) -> Network"
        )
    function = import_function(spec)
    try:
        inspect.signature(function).bind("example")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{spec} must be a function make(example) -> Network: {error}") from error

    def make(example: Example, **options: Any) -> Network:
        made = function(example, **options)
        if not isinstance(made, Network):
            raise ValueError(
                f"{spec} must return a Network, as network(init, apply), linen(module, x) and "
                f"nnx(model) make it, got {type(made).__name__}"
            )
        return made

    return make


def _check(
    name: str, example: Example, expected: str, kind: Any, axes: Sequence[int] | None = None
) -> None:
    x = example.x
    if not jnp.issubdtype(x.dtype, kind) or (axes and x.ndim not in axes):
        raise ValueError(f"{name} takes {expected}, got {x.dtype} {x.shape}")


def _channels_last(x: Any) -> Any:
    return x[..., None] if x.ndim == 3 else x
