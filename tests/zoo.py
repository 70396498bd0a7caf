"""Small networks of many kinds, each with its groups of units and its parameter count by hand.

A factory takes a network's sizes and gives a `Network`. What is expected of a dependency graph is
written down here without one: which axes of which leaves shrink together, which of these groups can
be pruned exactly, why the others cannot, and how many parameters given widths leave.

A unit is pruned by masking: whatever makes its value is multiplied by zero, which is its slice of
the incoming kernels, the biases, the parameters of its normalisations and their running statistics
(`Group.masked`). What takes the value in (`Group.outgoing`) keeps its parameters. The group is
prunable if the unit's value is then zero wherever a contraction or a reduction takes it in.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxprune.networks import mlp

INPUT = "input"  # the axis is one of the network's input, or comes from one
OUTPUT = "output"  # the axis reaches the network's output
GATHER = "gather"  # the axis is indexed by values of the input
SCAN = "scan"  # the axis is the one that a scan runs over
NONZERO = "zero"  # a sum takes in a value that masking does not make zero


class Slot(NamedTuple):
    """Where a group's units lie on one axis of a leaf.

    Unit u has the indices `offset + r * units + u` for r < repeats.
    """

    path: str
    axis: int
    offset: int = 0
    repeats: int = 1


class Group(NamedTuple):
    """Units that are pruned together, one by one.

    Attributes:
        units: how many there are.
        prunable: whether a unit can be removed without changing the masked network's output.
        reason: why it cannot, a keyword; empty if it can.
        masked: the slots that make the units' values.
        outgoing: the slots that take the values in.
    """

    units: int
    prunable: bool = True
    reason: str = ""
    masked: tuple[Slot, ...] = ()
    outgoing: tuple[Slot, ...] = ()


class Network(NamedTuple):
    """A network and what pruning it should find.

    Attributes:
        init: `init(key) -> params`, one tree with everything; biases, normalisation parameters and
            running statistics are random.
        apply: `apply(params, x) -> output`, in inference mode.
        x: an example input.
        second_x: an example of another batch size, and of another image size or sequence length
            where the network takes one.
        inputs: `inputs(batch, size) -> x` for the sizes of `sizes`.
        sizes: image sizes or sequence lengths that the network takes; features, if only these.
        groups: every group of units, by `path` of a leaf of it whose last axis they are, or by
            `path@axis`. Axes without any are windows of convolutions, or of size 1.
        remaining: `remaining(widths)`, the number of parameters left if the prunable groups have
            these widths, which count every leaf; optional groups are full if not named.
        optional_groups: groups that can be pruned exactly, though a library need not offer them.
    """

    init: Callable[[Any], Any]
    apply: Callable[[Any, Any], Any]
    x: Any
    second_x: Any
    inputs: Callable[[int, int], Any]
    sizes: tuple[int, ...]
    groups: dict[str, Group]
    remaining: Callable[[Mapping[str, int]], int]
    optional_groups: dict[str, Group]


def paths_and_leaves(params: Any) -> dict[str, Any]:
    flat, _ = jax.tree.flatten_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def full_widths(network: Network) -> dict[str, int]:
    """Return the units of the prunable groups."""
    return {key: group.units for key, group in network.groups.items() if group.prunable}


def mask_by_hand(network: Network, params: Any, kept: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the leaves by path, zero where they make units not `kept`, a bool array a group."""
    leaves = {path: np.array(leaf) for path, leaf in paths_and_leaves(params).items()}
    for slot, index in _slots(network, kept, ("masked",)):
        np.moveaxis(leaves[slot.path], slot.axis, 0)[index] = 0
    return leaves


def slice_by_hand(network: Network, params: Any, kept: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the leaves by path without the units that are not `kept`."""
    leaves = {path: np.asarray(leaf) for path, leaf in paths_and_leaves(params).items()}
    removed: dict[tuple[str, int], set[int]] = {}
    for slot, index in _slots(network, kept, ("masked", "outgoing")):
        removed.setdefault((slot.path, slot.axis), set()).update(index.tolist())
    for (path, axis), index in removed.items():
        leaves[path] = np.delete(leaves[path], sorted(index), axis)
    return leaves


def _slots(network: Network, kept: Mapping[str, Any], fields: Sequence[str]):
    """Yield the slots of the groups in `kept` with the indices of the units removed."""
    every = network.groups | network.optional_groups
    for key, keep in kept.items():
        units = np.flatnonzero(~np.asarray(keep))
        for field in fields:
            for slot in getattr(every[key], field):
                steps = slot.offset + every[key].units * np.arange(slot.repeats)
                yield slot, (steps[:, None] + units).ravel()


# --- Parts -------------------------------------------------------------------------------------


def _network(init, apply, inputs, sizes, groups, remaining, optional_groups=None) -> Network:
    x, second_x = inputs(3, sizes[0]), inputs(5, sizes[-1])
    optional = optional_groups or {}
    return Network(init, apply, x, second_x, inputs, sizes, groups, remaining, optional)


def _random_init(shapes: Callable[[], Any]) -> Callable[[Any], Any]:
    """Return an `init(key)` whose values are random by the leaves' names.

    NumPy draws them, so that nothing is compiled; the key must be concrete.
    """

    def value(rng, path, leaf):
        name, shape = path.split("/")[-1], leaf.shape
        if name in ("bias", "mean"):
            drawn = 0.3 * rng.normal(size=shape)
        elif name in ("scale", "var"):
            drawn = rng.uniform(0.5, 1.5, shape)
        elif name in ("embedding", "position", "cls"):
            drawn = rng.normal(size=shape)
        else:
            drawn = rng.normal(size=shape) * math.sqrt(1.5 / math.prod(shape[:-1]))
        return jnp.asarray(drawn, jnp.float32)

    def init(key):
        tree = jax.eval_shape(shapes)
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
        leaves = [value(rng, path, leaf) for path, leaf in paths_and_leaves(tree).items()]
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)

    return init


def _linen(model: nn.Module, dummy: Any, collections: bool = False):
    """Return `init` and `apply`, of the parameters alone or of all collections.

    Flax's average pooling fails under strict promotion; in double precision, so do normalisations.
    """

    def shapes():
        with jax.numpy_dtype_promotion("standard"):
            variables = model.init(jax.random.key(0), dummy)
        return dict(variables) if collections else variables["params"]

    def apply(params, x):
        with jax.numpy_dtype_promotion("standard"):
            return model.apply(params if collections else {"params": params}, x)

    return _random_init(shapes), apply


def _training(model: nn.Module, dummy: Any):
    """Return Flax's `init`, and an `apply` that returns the output and the new statistics."""

    def init(key):
        with jax.numpy_dtype_promotion("standard"):
            return dict(model.init(key, dummy))

    def apply(params, x):
        with jax.numpy_dtype_promotion("standard"):
            output, state = model.apply(params, x, mutable=["batch_stats"])
        return output, state["batch_stats"]

    return init, apply


def _avg_pool(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (2, 2), (2, 2))


def _max_pool(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (2, 2), (2, 2))


def _zeros(*shape: int) -> jax.Array:
    """Return an input to initialise with, of single precision also where double is enabled."""
    return jnp.zeros(shape, jnp.float32)


def _vectors(batch: int, size: int) -> jax.Array:
    rng = np.random.default_rng([batch, size])
    return jnp.asarray(rng.normal(size=(batch, size)), jnp.float32)


def _images(channels: int, batch: int, size: int) -> jax.Array:
    rng = np.random.default_rng([batch, size])
    return jnp.asarray(rng.normal(size=(batch, size, size, channels)), jnp.float32)


def _tokens(vocabulary: int, batch: int, size: int) -> jax.Array:
    rng = np.random.default_rng([batch, size])
    return jnp.asarray(rng.integers(0, vocabulary, (batch, size)), jnp.int32)


def _dense(name: str, *, bias: bool = True) -> tuple[Slot, ...]:
    kernel = (Slot(f"{name}/kernel", 1),)
    return (*kernel, Slot(f"{name}/bias", 0)) if bias else kernel


def _conv(name: str, *, bias: bool = True) -> tuple[Slot, ...]:
    kernel = (Slot(f"{name}/kernel", 3),)
    return (*kernel, Slot(f"{name}/bias", 0)) if bias else kernel


def _dense_in(name: str, repeats: int = 1) -> Slot:
    return Slot(f"{name}/kernel", 0, 0, repeats)


def _conv_in(name: str, offset: int = 0) -> Slot:
    return Slot(f"{name}/kernel", 2, offset)


def _layer_norm(name: str) -> tuple[Slot, ...]:
    return Slot(f"{name}/scale", 0), Slot(f"{name}/bias", 0)


def _batch_norm(name: str, offset: int = 0) -> tuple[Slot, ...]:
    affine = tuple(Slot(f"params/{name}/{leaf}", 0, offset) for leaf in ("scale", "bias"))
    return affine + tuple(Slot(f"batch_stats/{name}/{leaf}", 0, offset) for leaf in ("mean", "var"))


def _pixels_in(name: str, channels: int) -> dict[str, Group]:
    """Return the group of the input's channels, which a convolution takes in, if many."""
    slot = _conv_in(name)
    if channels == 1:
        return {}
    return {f"{slot.path}@2": Group(channels, False, INPUT, outgoing=(slot,))}


def _logits(masked: tuple[Slot, ...], classes: int) -> dict[str, Group]:
    return {masked[0].path: Group(classes, False, OUTPUT, masked)}


# --- Multilayer perceptrons --------------------------------------------------------------------


def challenge_mlp(*, real: bool = False) -> Network:
    """Return the challenge network, ReLU without biases, small or in its real sizes.

    Every hidden layer is a group: relu(0) = 0.
    """
    features, hidden, classes = (784, (1000, 1000, 500, 200), 10) if real else (9, (12, 10, 8), 4)
    names = [*(f"hidden_{i}" for i in range(len(hidden))), "logits"]
    init, apply = mlp(features, hidden, classes)
    if not real:  # without compiling, and where double precision is enabled
        pairs = list(itertools.pairwise((features, *hidden, classes)))
        init = _random_init(
            lambda: {
                name: {"kernel": jnp.zeros(pair)} for name, pair in zip(names, pairs, strict=True)
            }
        )
    groups = {"hidden_0/kernel@0": Group(features, False, INPUT, outgoing=(_dense_in("hidden_0"),))}
    for units, name, following in zip(hidden, names[:-1], names[1:], strict=True):
        masked = _dense(name, bias=False)
        groups[masked[0].path] = Group(units, masked=masked, outgoing=(_dense_in(following),))
    groups |= _logits(_dense("logits", bias=False), classes)

    def remaining(widths):
        sizes = [features, *(widths[f"{name}/kernel"] for name in names[:-1]), classes]
        return sum(inputs * outputs for inputs, outputs in itertools.pairwise(sizes))

    return _network(init, apply, _vectors, (features,), groups, remaining)


class NormMLP(nn.Module):
    hidden: Sequence[int]
    classes: int
    fast: bool

    @nn.compact
    def __call__(self, x):
        for i, units in enumerate(self.hidden):
            x = nn.Dense(units, name=f"hidden_{i}")(x)
            x = nn.LayerNorm(use_fast_variance=self.fast, name=f"norm_{i}")(x)
            x = nn.relu(x)
        return nn.Dense(self.classes, name="logits")(x)


def norm_mlp(*, fast: bool = True, hidden: tuple[int, int] = (16, 12)) -> Network:
    """Return a network with biases and LayerNorm.

    The fast variance, E[x²] − E[x]², sums x and x² only: a unit that is zero adds nothing, and the
    divisors stay. The slow one sums (x − E[x])², which is E[x]² for every unit that is zero: so
    many times it is added.
    """
    features, classes = 7, 5
    init, apply = _linen(NormMLP(hidden, classes, fast), _zeros(1, features))
    groups = {"hidden_0/kernel@0": Group(features, False, INPUT, outgoing=(_dense_in("hidden_0"),))}
    for i, (units, following) in enumerate(zip(hidden, ("hidden_1", "logits"), strict=True)):
        masked = _dense(f"hidden_{i}") + _layer_norm(f"norm_{i}")
        groups[masked[0].path] = Group(units, masked=masked, outgoing=(_dense_in(following),))
    groups |= _logits(_dense("logits"), classes)

    def remaining(widths):
        first, second = widths["hidden_0/kernel"], widths["hidden_1/kernel"]
        # A kernel and a bias each; a scale and a bias in the two normalisations.
        dense = (7 + 1) * first + (first + 1) * second + (second + 1) * 5
        return dense + 2 * first + 2 * second

    return _network(init, apply, _vectors, (features,), groups, remaining)


# --- Convolutional networks --------------------------------------------------------------------


class LeNet5(nn.Module):
    classic: bool

    @nn.compact
    def __call__(self, x):
        activate, pool = (nn.tanh, _avg_pool) if self.classic else (nn.relu, _max_pool)
        x = activate(nn.Conv(6, (5, 5), name="conv_0")(x))
        x = pool(x)
        x = activate(nn.Conv(16, (5, 5), padding="VALID", name="conv_1")(x))
        x = pool(x)
        x = x.reshape(x.shape[0], -1)
        x = activate(nn.Dense(120, name="dense_0")(x))
        x = activate(nn.Dense(84, name="dense_1")(x))
        return nn.Dense(10, name="logits")(x)


def lenet5(*, classic: bool = False) -> Network:
    """Return LeNet-5 in its real sizes, with ReLU and max pooling or tanh and average pooling.

    The four hidden layers are groups. Flattened, a channel of `conv_1` is at 5 · 5 = 25 inputs of
    `dense_0`, 16 apart.
    """
    init, apply = _linen(LeNet5(classic), _zeros(1, 28, 28, 1))
    groups = _pixels_in("conv_0", 1) | {
        "conv_0/kernel": Group(6, masked=_conv("conv_0"), outgoing=(_conv_in("conv_1"),)),
        "conv_1/kernel": Group(16, masked=_conv("conv_1"), outgoing=(_dense_in("dense_0", 25),)),
        "dense_0/kernel": Group(120, masked=_dense("dense_0"), outgoing=(_dense_in("dense_1"),)),
        "dense_1/kernel": Group(84, masked=_dense("dense_1"), outgoing=(_dense_in("logits"),)),
    }
    groups |= _logits(_dense("logits"), 10)

    def remaining(widths):
        c0, c1 = widths["conv_0/kernel"], widths["conv_1/kernel"]
        d0, d1 = widths["dense_0/kernel"], widths["dense_1/kernel"]
        convolutions = (25 * 1 + 1) * c0 + (25 * c0 + 1) * c1
        return convolutions + (25 * c1 + 1) * d0 + (d0 + 1) * d1 + (d1 + 1) * 10

    return _network(init, apply, partial(_images, 1), (28,), groups, remaining)


class ResidualBlock(nn.Module):
    width: int
    stride: int
    project: bool
    train: bool

    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, self.width, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=not self.train)
        y = conv(kernel_size=(3, 3), strides=self.stride, name="conv1")(x)
        y = nn.relu(norm(name="norm1")(y))
        y = norm(name="norm2")(conv(kernel_size=(3, 3), name="conv2")(y))
        if self.project:
            x = conv(kernel_size=(1, 1), strides=self.stride, name="shortcut")(x)
            x = norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet20(nn.Module):
    width: int
    classes: int
    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (3, 3), use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not self.train, name="stem_norm")(x))
        for stage, block in itertools.product(range(3), range(3)):
            first, name = stage > 0 and block == 0, f"stage{stage}_block{block}"
            x = ResidualBlock(self.width * 2**stage, 1 + first, first, self.train, name=name)(x)
        return nn.Dense(self.classes, name="logits")(jnp.mean(x, axis=(1, 2)))


def resnet20(
    *, width: int = 4, channels: int = 3, classes: int = 10, train: bool = False
) -> Network:
    """Return ResNet-20 with projection shortcuts; `width` is 16 in the paper.

    Of each of the three stages, the residual stream is a group: the stem or the shortcut, and the
    second convolution of each block, with their normalisations. Inside each of the nine blocks is
    another. Their BatchNorm is affine with running averages, and zero once all of it is masked.

    With `train`, `init` is Flax's, and `apply` returns the logits and the new batch statistics; the
    groups are those of inference, though every normalised channel then reaches an output.

    Reference: He et al., Deep residual learning for image recognition, CVPR 2016; there the
    shortcuts of this network are not projections.
    """
    dummy = _zeros(1, 16, 16, channels)
    init, apply = _linen(ResNet20(width, classes), dummy, collections=True)
    if train:
        init, apply = _training(ResNet20(width, classes, train=True), dummy)
    streams = [
        "params/stem/kernel",
        "params/stage1_block0/shortcut/kernel",
        "params/stage2_block0/shortcut/kernel",
    ]
    groups = _pixels_in("params/stem", channels)
    for stage, stream in enumerate(streams):
        blocks = [f"stage{stage}_block{block}" for block in range(3)]
        source = f"{blocks[0]}/shortcut" if stage else "stem"
        masked = (*_conv(f"params/{source}", bias=False), *_batch_norm(f"{source}_norm"))
        for block in blocks:
            masked += _conv(f"params/{block}/conv2", bias=False) + _batch_norm(f"{block}/norm2")
        # The first block of a later stage takes in the stream of the one before.
        outgoing = [_conv_in(f"params/{block}/conv1") for block in blocks[stage > 0 :]]
        if stage < 2:
            following = f"params/stage{stage + 1}_block0"
            outgoing += [_conv_in(f"{following}/conv1"), _conv_in(f"{following}/shortcut")]
        else:
            outgoing += [_dense_in("params/logits")]
        groups[stream] = Group(width * 2**stage, masked=masked, outgoing=tuple(outgoing))
        for block in blocks:
            masked = _conv(f"params/{block}/conv1", bias=False) + _batch_norm(f"{block}/norm1")
            outgoing = (_conv_in(f"params/{block}/conv2"),)
            groups[masked[0].path] = Group(width * 2**stage, masked=masked, outgoing=outgoing)
    groups |= _logits(_dense("params/logits"), classes)

    def remaining(widths):
        before = widths[streams[0]]
        count = 9 * channels * before + 4 * before  # the stem
        for stage, block in itertools.product(range(3), range(3)):
            stream = widths[streams[stage]]
            inner = widths[f"params/stage{stage}_block{block}/conv1/kernel"]
            count += 9 * before * inner + 4 * inner + 9 * inner * stream + 4 * stream
            if stage > 0 and block == 0:
                count += before * stream + 4 * stream
            before = stream
        return count + (before + 1) * classes

    return _network(init, apply, partial(_images, channels), (16, 12), groups, remaining)


class DenseBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = partial(nn.BatchNorm, use_running_average=True)
        x = nn.Conv(8, (3, 3), use_bias=False, name="stem")(x)
        for i, growth in enumerate((6, 5, 7)):
            y = nn.relu(norm(name=f"norm_{i}")(x))
            y = nn.Conv(growth, (3, 3), use_bias=False, name=f"conv_{i}")(y)
            x = jnp.concatenate([x, y], axis=-1)
        x = nn.relu(norm(name="transition_norm")(x))
        x = nn.Conv(12, (1, 1), use_bias=False, name="transition")(x)
        x = _avg_pool(x)
        return nn.Dense(4, name="logits")(jnp.mean(x, axis=(1, 2)))


def densenet_block() -> Network:
    """Return a block of DenseNet with its transition: features are concatenated, never added.

    The stem, each of the three layers and the transition are groups. Each later normalisation holds
    a part for each group before it, and each later convolution takes in such parts.
    """
    init, apply = _linen(DenseBlock(), _zeros(1, 8, 8, 3), collections=True)
    makers, units = ["stem", "conv_0", "conv_1", "conv_2"], [8, 6, 5, 7]
    takers = ["conv_0", "conv_1", "conv_2", "transition"]
    norms = ["norm_0", "norm_1", "norm_2", "transition_norm"]
    groups = _pixels_in("params/stem", 3)
    for i, maker in enumerate(makers):
        offset = sum(units[:i])
        masked = _conv(f"params/{maker}", bias=False)
        for norm in norms[i:]:
            masked += _batch_norm(norm, offset)
        outgoing = tuple(_conv_in(f"params/{taker}", offset) for taker in takers[i:])
        groups[masked[0].path] = Group(units[i], masked=masked, outgoing=outgoing)
    groups["params/transition/kernel"] = Group(
        12, masked=_conv("params/transition", bias=False), outgoing=(_dense_in("params/logits"),)
    )
    groups |= _logits(_dense("params/logits"), 4)

    def remaining(widths):
        s, a, b, c = (widths[f"params/{maker}/kernel"] for maker in makers)
        t = widths["params/transition/kernel"]
        norms = 4 * (s + (s + a) + (s + a + b) + (s + a + b + c))
        layers = 9 * 3 * s + 9 * s * a + 9 * (s + a) * b + 9 * (s + a + b) * c
        return norms + layers + (s + a + b + c) * t + (t + 1) * 4

    return _network(init, apply, partial(_images, 3), (8, 10), groups, remaining)


class MobileNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        def conv(x, name, width, window, stride=1, groups=1):
            x = nn.Conv(
                width, window, stride, use_bias=False, feature_group_count=groups, name=name
            )(x)
            return nn.BatchNorm(use_running_average=True, name=f"{name}_norm")(x)

        x = nn.relu6(conv(x, "stem", 6, (3, 3)))
        for i, (expanded, projected, stride) in enumerate([(12, 6, 1), (14, 10, 2)]):
            y = nn.relu6(conv(x, f"expand_{i}", expanded, (1, 1)))
            y = nn.relu6(conv(y, f"depthwise_{i}", expanded, (3, 3), stride, expanded))
            y = conv(y, f"project_{i}", projected, (1, 1))
            x = x + y if stride == 1 else y
        return nn.Dense(4, name="logits")(jnp.mean(x, axis=(1, 2)))


def mobilenet() -> Network:
    """Return two inverted residual blocks, the first with its residual, the second with stride 2.

    The stem and the first projection share the residual stream. An expansion and its depthwise
    convolution are one group: channel c of the one makes channel c of the other.

    Reference: Sandler et al., MobileNetV2: inverted residuals and linear bottlenecks, CVPR 2018.
    """
    init, apply = _linen(MobileNet(), _zeros(1, 8, 8, 3), collections=True)

    def normed(*names):
        slots = ()
        for name in names:
            slots += _conv(f"params/{name}", bias=False) + _batch_norm(f"{name}_norm")
        return slots

    def convs(*names):
        return tuple(_conv_in(f"params/{name}") for name in names)

    groups = _pixels_in("params/stem", 3) | {
        "params/stem/kernel": Group(
            6, masked=normed("stem", "project_0"), outgoing=convs("expand_0", "expand_1")
        ),
        "params/expand_0/kernel": Group(
            12, masked=normed("expand_0", "depthwise_0"), outgoing=convs("project_0")
        ),
        "params/expand_1/kernel": Group(
            14, masked=normed("expand_1", "depthwise_1"), outgoing=convs("project_1")
        ),
        "params/project_1/kernel": Group(
            10, masked=normed("project_1"), outgoing=(_dense_in("params/logits"),)
        ),
    }
    groups |= _logits(_dense("params/logits"), 4)

    def remaining(widths):
        stream, last = widths["params/stem/kernel"], widths["params/project_1/kernel"]
        e0, e1 = widths["params/expand_0/kernel"], widths["params/expand_1/kernel"]
        stem = 9 * 3 * stream + 4 * stream
        first = stream * e0 + 4 * e0 + 9 * e0 + 4 * e0 + e0 * stream + 4 * stream
        second = stream * e1 + 4 * e1 + 9 * e1 + 4 * e1 + e1 * last + 4 * last
        return stem + first + second + (last + 1) * 4

    return _network(init, apply, partial(_images, 3), (8, 10), groups, remaining)


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        skip_0 = nn.relu(nn.Conv(6, (3, 3), name="encode_0")(x))
        x = _max_pool(skip_0)
        skip_1 = nn.relu(nn.Conv(8, (3, 3), name="encode_1")(x))
        x = nn.relu(nn.Conv(9, (3, 3), strides=2, name="down")(skip_1))
        x = nn.relu(nn.Conv(12, (3, 3), name="bottom")(x))
        x = nn.ConvTranspose(7, (2, 2), strides=(2, 2), name="up_1")(x)
        x = nn.relu(nn.Conv(10, (3, 3), name="decode_1")(jnp.concatenate([skip_1, x], axis=-1)))
        x = nn.ConvTranspose(5, (2, 2), strides=(2, 2), name="up_0")(x)
        x = nn.relu(nn.Conv(11, (3, 3), name="decode_0")(jnp.concatenate([x, skip_0], axis=-1)))
        return nn.Conv(2, (1, 1), name="logits")(x)


def unet() -> Network:
    """Return a U-Net with two skips, which goes down by pooling and by stride.

    Every layer but the last is a group. The skip comes first in one concatenation and last in the
    other. A transposed convolution has no activation, and a bias, which is masked with the unit.
    """
    init, apply = _linen(UNet(), _zeros(1, 8, 8, 3))
    outgoing = {
        "encode_0": (6, (_conv_in("encode_1"), _conv_in("decode_0", 5))),
        "encode_1": (8, (_conv_in("down"), _conv_in("decode_1"))),
        "down": (9, (_conv_in("bottom"),)),
        "bottom": (12, (_conv_in("up_1"),)),
        "up_1": (7, (_conv_in("decode_1", 8),)),
        "decode_1": (10, (_conv_in("up_0"),)),
        "up_0": (5, (_conv_in("decode_0"),)),
        "decode_0": (11, (_conv_in("logits"),)),
    }
    groups = _pixels_in("encode_0", 3)
    for name, (units, slots) in outgoing.items():
        groups[f"{name}/kernel"] = Group(units, masked=_conv(name), outgoing=slots)
    groups |= _logits(_conv("logits"), 2)

    def remaining(widths):
        e0, e1, down, bottom, u1, d1, u0, d0 = (widths[f"{name}/kernel"] for name in outgoing)
        encoder = (27 + 1) * e0 + (9 * e0 + 1) * e1 + (9 * e1 + 1) * down + (9 * down + 1) * bottom
        ups = (4 * bottom + 1) * u1 + (4 * d1 + 1) * u0
        return encoder + ups + (9 * (e1 + u1) + 1) * d1 + (9 * (u0 + e0) + 1) * d0 + (d0 + 1) * 2

    return _network(init, apply, partial(_images, 3), (8, 12), groups, remaining)


# --- Mixers and transformers -------------------------------------------------------------------


class Mixer(nn.Module):
    token_bias: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (4, 4), (4, 4), padding="VALID", name="patches")(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for i in range(2):
            y = jnp.swapaxes(nn.LayerNorm(name=f"token_norm_{i}")(x), 1, 2)
            y = nn.gelu(nn.Dense(7, use_bias=self.token_bias, name=f"token_in_{i}")(y))
            y = nn.Dense(x.shape[1], use_bias=self.token_bias, name=f"token_out_{i}")(y)
            x = x + jnp.swapaxes(y, 1, 2)
            y = nn.gelu(nn.Dense(14, name=f"channel_in_{i}")(nn.LayerNorm(name=f"norm_{i}")(x)))
            x = x + nn.Dense(8, name=f"channel_out_{i}")(y)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(4, name="logits")(jnp.mean(x, axis=1))


def mixer(*, token_bias: bool = False) -> Network:
    """Return an MLP-Mixer of 8 channels and 9 tokens.

    The hidden units of both kinds of mixing are groups; tokens come from the input's pixels. The
    channels, the residual stream, are prunable only if the mixing of tokens has no biases: it sees
    a channel that is zero and would make gelu(b_in) W_out + b_out of it, which the next LayerNorm
    takes in. With `token_bias`, the paper's network, they are not prunable.

    Reference: Tolstikhin et al., MLP-Mixer: an all-MLP architecture for vision, NeurIPS 2021.
    """
    channels, tokens, blocks = 8, 9, range(2)
    init, apply = _linen(Mixer(token_bias), _zeros(1, 12, 12, 3))
    masked, outgoing = _conv("patches") + _layer_norm("norm"), (_dense_in("logits"),)
    token_masked, token_outgoing = (), ()
    groups = _pixels_in("patches", 3)
    for i in blocks:
        masked += _layer_norm(f"token_norm_{i}") + _layer_norm(f"norm_{i}")
        masked += _dense(f"channel_out_{i}")
        outgoing += (_dense_in(f"channel_in_{i}"),)
        token_masked += _dense(f"token_out_{i}", bias=token_bias)
        token_outgoing += (_dense_in(f"token_in_{i}"),)
        for kind, units, bias in ("token", 7, token_bias), ("channel", 14, True):
            groups[f"{kind}_in_{i}/kernel"] = Group(
                units,
                masked=_dense(f"{kind}_in_{i}", bias=bias),
                outgoing=(_dense_in(f"{kind}_out_{i}"),),
            )
    groups["patches/kernel"] = Group(
        channels, not token_bias, NONZERO if token_bias else "", masked, outgoing
    )
    groups["token_out_0/kernel"] = Group(tokens, False, INPUT, token_masked, token_outgoing)
    groups |= _logits(_dense("logits"), 4)

    def remaining(widths):
        c = channels if token_bias else widths["patches/kernel"]
        count = (4 * 4 * 3 + 1) * c + 2 * c + (c + 1) * 4  # patches, the last norm, logits
        for i in blocks:
            h_token, h_channel = widths[f"token_in_{i}/kernel"], widths[f"channel_in_{i}/kernel"]
            count += 2 * c + tokens * h_token + h_token * tokens
            count += h_token + tokens if token_bias else 0
            count += 2 * c + (c + 1) * h_channel + (h_channel + 1) * c
        return count

    return _network(init, apply, partial(_images, 3), (12,), groups, remaining)


HEADS, HEAD_DIM, MODEL, MLP_HIDDEN = 4, 3, 10, 16


class TransformerBlock(nn.Module):
    fast: bool = True

    @nn.compact
    def __call__(self, x, mask=None):
        norm = partial(nn.LayerNorm, use_fast_variance=self.fast)
        x = x + nn.MultiHeadDotProductAttention(
            HEADS, qkv_features=HEADS * HEAD_DIM, deterministic=True, name="attention"
        )(norm(name="norm_0")(x), mask=mask)
        y = nn.gelu(nn.Dense(MLP_HIDDEN, name="mlp_in")(norm(name="norm_1")(x)))
        return x + nn.Dense(MODEL, name="mlp_out")(y)


def _block_stream(block: str) -> tuple[tuple[Slot, ...], tuple[Slot, ...]]:
    """Return the slots of a block that make and take in the residual stream."""
    masked = (
        *_layer_norm(f"{block}/norm_0"),
        *_layer_norm(f"{block}/norm_1"),
        Slot(f"{block}/attention/out/kernel", 2),
        Slot(f"{block}/attention/out/bias", 0),
        *_dense(f"{block}/mlp_out"),
    )
    outgoing = tuple(_dense_in(f"{block}/attention/{name}") for name in ("query", "key", "value"))
    return masked, (*outgoing, _dense_in(f"{block}/mlp_in"))


def _block_groups(block: str) -> tuple[dict[str, Group], dict[str, Group]]:
    """Return the groups inside a block, and the optional ones.

    A head's value is zero once its queries, keys and values are, whatever the softmax of its equal
    logits gives, and `out` takes it in. Optional are the units that make the inner product of
    queries and keys, and those of the values, alike in all heads; √(head size) stays as it was.
    """
    heads, queries_keys, values = [], [], []
    for name, inner in ("query", queries_keys), ("key", queries_keys), ("value", values):
        for leaf, axis in ("kernel", 1), ("bias", 0):
            heads.append(Slot(f"{block}/attention/{name}/{leaf}", axis))
            inner.append(Slot(f"{block}/attention/{name}/{leaf}", axis + 1))
    out = f"{block}/attention/out/kernel"
    groups = {
        f"{block}/attention/query/kernel@1": Group(
            HEADS, masked=tuple(heads), outgoing=(Slot(out, 0),)
        ),
        f"{block}/mlp_in/kernel": Group(
            MLP_HIDDEN, masked=_dense(f"{block}/mlp_in"), outgoing=(_dense_in(f"{block}/mlp_out"),)
        ),
    }
    optional = {
        f"{block}/attention/query/kernel": Group(HEAD_DIM, masked=tuple(queries_keys)),
        f"{block}/attention/value/kernel": Group(
            HEAD_DIM, masked=tuple(values), outgoing=(Slot(out, 1),)
        ),
    }
    return groups, optional


def _block_remaining(block: str, stream: int, widths: Mapping[str, int]) -> int:
    heads, hidden = widths[f"{block}/attention/query/kernel@1"], widths[f"{block}/mlp_in/kernel"]
    queries_keys = widths.get(f"{block}/attention/query/kernel", HEAD_DIM)
    values = widths.get(f"{block}/attention/value/kernel", HEAD_DIM)
    attention = (stream + 1) * heads * (2 * queries_keys + values) + (heads * values + 1) * stream
    norms = 2 * 2 * stream
    return norms + attention + (stream + 1) * hidden + (hidden + 1) * stream


class ViT(nn.Module):
    cls: bool
    fast: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(MODEL, (4, 4), (4, 4), padding="VALID", name="patches")(x)
        x = x.reshape(x.shape[0], -1, MODEL)
        normal = nn.initializers.normal()
        if self.cls:
            cls = self.param("cls", normal, (1, 1, MODEL))
            x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, MODEL)), x], axis=1)
        x = x + self.param("position", normal, x.shape[1:])[None]
        for i in range(2):
            x = TransformerBlock(self.fast, name=f"block_{i}")(x)
        x = nn.LayerNorm(use_fast_variance=self.fast, name="norm")(x)
        return nn.Dense(4, name="logits")(x[:, 0] if self.cls else jnp.mean(x, axis=1))


def vit(*, cls: bool = False, fast: bool = True) -> Network:
    """Return a vision transformer that averages its 9 tokens or reads off a class token.

    The residual stream is one group, prunable as its LayerNorms have the `fast` variance: each of
    what is added to it is zero once masked, positions and class token included. In each block, the
    heads and the hidden units are groups. Positions are as many as the input's patches.
    """
    init, apply = _linen(ViT(cls, fast), _zeros(1, 12, 12, 3))
    tokens = 9 + cls
    masked = (*_conv("patches"), Slot("position", 1), *_layer_norm("norm"))
    masked += (Slot("cls", 2),) if cls else ()
    outgoing, optional, groups = (_dense_in("logits"),), {}, _pixels_in("patches", 3)
    for i in range(2):
        made, taken = _block_stream(f"block_{i}")
        masked, outgoing = masked + made, outgoing + taken
        inner, inner_optional = _block_groups(f"block_{i}")
        groups, optional = groups | inner, optional | inner_optional
    groups["patches/kernel"] = Group(MODEL, masked=masked, outgoing=outgoing)
    groups["position@0"] = Group(tokens, False, INPUT, (Slot("position", 0),))
    groups |= _logits(_dense("logits"), 4)

    def remaining(widths):
        d = widths["patches/kernel"]
        blocks = sum(_block_remaining(f"block_{i}", d, widths) for i in range(2))
        return (4 * 4 * 3 + 1) * d + tokens * d + cls * d + blocks + 2 * d + (d + 1) * 4

    return _network(init, apply, partial(_images, 3), (12,), groups, remaining, optional)


class CausalTransformer(nn.Module):
    tied: bool
    vocabulary: int = 17
    positions: int = 9

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(self.vocabulary, MODEL, name="embed")
        position = self.param("position", nn.initializers.normal(), (self.positions, MODEL))
        x = embed(tokens) + position[: tokens.shape[1]][None]
        mask = nn.make_causal_mask(tokens, dtype=bool)
        for i in range(2):
            x = TransformerBlock(name=f"block_{i}")(x, mask)
        x = nn.LayerNorm(name="norm")(x)
        return embed.attend(x) if self.tied else nn.Dense(self.vocabulary, name="logits")(x)


def causal_transformer(*, tied: bool = False) -> Network:
    """Return a causal transformer with learned positions; `tied`, logits come from the embedding.

    The residual stream is one prunable group, as in `vit`; tied, the embedding both makes it and
    takes it in. The vocabulary is not prunable: tokens index it, and tied it is the output's axis.
    Positions are those of the input's tokens.
    """
    model = CausalTransformer(tied)
    init, apply = _linen(model, jnp.zeros((1, 7), jnp.int32))
    masked = (Slot("embed/embedding", 1), Slot("position", 1), *_layer_norm("norm"))
    outgoing = (Slot("embed/embedding", 1),) if tied else (_dense_in("logits"),)
    groups, optional = {}, {}
    for i in range(2):
        made, taken = _block_stream(f"block_{i}")
        masked, outgoing = masked + made, outgoing + taken
        inner, inner_optional = _block_groups(f"block_{i}")
        groups, optional = groups | inner, optional | inner_optional
    groups["embed/embedding"] = Group(MODEL, masked=masked, outgoing=outgoing)
    groups["embed/embedding@0"] = Group(
        model.vocabulary, False, OUTPUT if tied else GATHER, (Slot("embed/embedding", 0),)
    )
    groups["position@0"] = Group(model.positions, False, INPUT, (Slot("position", 0),))
    if not tied:
        groups |= _logits(_dense("logits"), model.vocabulary)

    def remaining(widths):
        d = widths["embed/embedding"]
        blocks = sum(_block_remaining(f"block_{i}", d, widths) for i in range(2))
        logits = 0 if tied else (d + 1) * 17
        return 17 * d + 9 * d + blocks + 2 * d + logits

    inputs = partial(_tokens, model.vocabulary)
    return _network(init, apply, inputs, (7, 5), groups, remaining, optional)


# --- Scans, NNX, plain functions ---------------------------------------------------------------


def scanned_mlp(*, remat: bool = False) -> Network:
    """Return residual layers in `jax.lax.scan` over stacked parameters, h ← h + W₂ relu(W₁ h).

    The stream is one group, through the carry. The hidden units are another, alike in all layers:
    unit u is pruned from every layer at once. The stacking axis is the scan's.
    """
    features, d, hidden, layers, classes = 7, 9, 14, 3, 4
    shapes = {
        "stem": {"kernel": (features, d), "bias": (d,)},
        "layers": {
            "in": {"kernel": (layers, d, hidden), "bias": (layers, hidden)},
            "out": {"kernel": (layers, hidden, d), "bias": (layers, d)},
        },
        "logits": {"kernel": (d, classes), "bias": (classes,)},
    }

    def zeros():
        return jax.tree.map(jnp.zeros, shapes, is_leaf=lambda node: isinstance(node, tuple))

    def affine(layer, x):
        return x @ layer["kernel"] + layer["bias"][None]

    def step(h, layer):
        return h + affine(layer["out"], jax.nn.relu(affine(layer["in"], h))), None

    def apply(params, x):
        h, _ = jax.lax.scan(
            jax.checkpoint(step) if remat else step, affine(params["stem"], x), params["layers"]
        )
        return affine(params["logits"], h)

    stacked = {name: f"layers/{name}" for name in ("in", "out")}
    every = tuple(Slot(f"{stacked[n]}/{leaf}", 0) for n in stacked for leaf in ("kernel", "bias"))
    groups = {
        "stem/kernel@0": Group(features, False, INPUT, outgoing=(_dense_in("stem"),)),
        "stem/kernel": Group(
            d,
            masked=(*_dense("stem"), Slot("layers/out/kernel", 2), Slot("layers/out/bias", 1)),
            outgoing=(Slot("layers/in/kernel", 1), _dense_in("logits")),
        ),
        "layers/in/kernel": Group(
            hidden,
            masked=(Slot("layers/in/kernel", 2), Slot("layers/in/bias", 1)),
            outgoing=(Slot("layers/out/kernel", 1),),
        ),
        "layers/in/kernel@0": Group(layers, False, SCAN, every),
    } | _logits(_dense("logits"), classes)

    def remaining(widths):
        stream, h = widths["stem/kernel"], widths["layers/in/kernel"]
        each = (stream + 1) * h + (h + 1) * stream
        return (7 + 1) * stream + 3 * each + (stream + 1) * 4

    return _network(_random_init(zeros), apply, _vectors, (features,), groups, remaining)


class ScanBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.gelu(nn.Dense(14, name="in")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(9, name="out")(y), None


class ScannedBlocks(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(9, name="stem")(x)
        blocks = nn.scan(
            ScanBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = blocks(name="layers")(x, None)
        return nn.Dense(4, name="logits")(x)


def flax_scan() -> Network:
    """Return residual blocks with LayerNorm in Flax's `nn.scan`; groups as in `scanned_mlp`."""
    features, d, hidden, layers, classes = 7, 9, 14, 3, 4
    init, apply = _linen(ScannedBlocks(), _zeros(1, features))
    stream = (
        *_dense("stem"),
        Slot("layers/norm/scale", 1),
        Slot("layers/norm/bias", 1),
        Slot("layers/out/kernel", 2),
        Slot("layers/out/bias", 1),
    )
    leaves = ("norm/scale", "norm/bias", "in/kernel", "in/bias", "out/kernel", "out/bias")
    groups = {
        "stem/kernel@0": Group(features, False, INPUT, outgoing=(_dense_in("stem"),)),
        "stem/kernel": Group(
            d, masked=stream, outgoing=(Slot("layers/in/kernel", 1), _dense_in("logits"))
        ),
        "layers/in/kernel": Group(
            hidden,
            masked=(Slot("layers/in/kernel", 2), Slot("layers/in/bias", 1)),
            outgoing=(Slot("layers/out/kernel", 1),),
        ),
        "layers/in/kernel@0": Group(
            layers, False, SCAN, tuple(Slot(f"layers/{leaf}", 0) for leaf in leaves)
        ),
    } | _logits(_dense("logits"), classes)

    def remaining(widths):
        d, h = widths["stem/kernel"], widths["layers/in/kernel"]
        each = 2 * d + (d + 1) * h + (h + 1) * d
        return (7 + 1) * d + 3 * each + (d + 1) * 4

    return _network(init, apply, _vectors, (features,), groups, remaining)


class NNXNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.hidden = nnx.Linear(8, 12, rngs=rngs)
        self.logits = nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.logits(nnx.relu(self.hidden(jnp.mean(x, axis=(1, 2)))))


def nnx_network() -> Network:
    """Return a network of Flax NNX: convolution, BatchNorm, mean, two dense layers.

    The parameters are the pure dict of the module's state, running statistics included; `apply`
    puts them back and merges.
    """
    graphdef, empty = nnx.split(nnx.eval_shape(lambda: NNXNet(nnx.Rngs(0))))

    def apply(params, x):
        state = jax.tree.map(lambda leaf: leaf, empty)
        nnx.replace_by_pure_dict(state, params)
        with jax.numpy_dtype_promotion("standard"):
            return nnx.merge(graphdef, state)(x)

    norm = tuple(Slot(f"norm/{leaf}", 0) for leaf in ("scale", "bias", "mean", "var"))
    groups = _pixels_in("conv", 3) | {
        "conv/kernel": Group(8, masked=_conv("conv") + norm, outgoing=(_dense_in("hidden"),)),
        "hidden/kernel": Group(12, masked=_dense("hidden"), outgoing=(_dense_in("logits"),)),
    }
    groups |= _logits(_dense("logits"), 4)

    def remaining(widths):
        c, h = widths["conv/kernel"], widths["hidden/kernel"]
        return (9 * 3 + 1) * c + 4 * c + (c + 1) * h + (h + 1) * 4

    init = _random_init(lambda: nnx.to_pure_dict(empty))
    return _network(init, apply, partial(_images, 3), (8, 6), groups, remaining)


def plain_network() -> Network:
    """Return a plain function of a dict of lists of tuples: tanh, sigmoid and tanh hidden layers.

    tanh(0) = 0. The sigmoid of a masked unit is ½, which the next layer takes in: prunable only as
    the weights that leave the unit are masked with it, which is optional.
    """
    sizes, activations = (6, 10, 9, 8, 3), (jnp.tanh, jax.nn.sigmoid, jnp.tanh)

    def zeros():
        pairs = itertools.pairwise(sizes)
        return {"layers": [(jnp.zeros(pair), jnp.zeros(pair[1:])) for pair in pairs]}

    drawn = _random_init(zeros)

    def init(key):
        tree = drawn(key)  # the leaves have no names that tell a bias
        return {"layers": [(w, b * 0.5) for w, b in tree["layers"]]}

    def apply(params, x):
        *hidden, (kernel, bias) = params["layers"]
        for (w, b), activate in zip(hidden, activations, strict=True):
            x = activate(x @ w + b[None])
        return x @ kernel + bias[None]

    def slots(layer):
        return Slot(f"layers/{layer}/0", 1), Slot(f"layers/{layer}/1", 0)

    groups = {
        "layers/0/0@0": Group(6, False, INPUT, outgoing=(Slot("layers/0/0", 0),)),
        "layers/0/0": Group(10, masked=slots(0), outgoing=(Slot("layers/1/0", 0),)),
        "layers/2/0": Group(8, masked=slots(2), outgoing=(Slot("layers/3/0", 0),)),
    } | _logits(slots(3), 3)
    optional = {"layers/1/0": Group(9, masked=(*slots(1), Slot("layers/2/0", 0)))}

    def remaining(widths):
        first, third = widths["layers/0/0"], widths["layers/2/0"]
        second = widths.get("layers/1/0", 9)
        return (6 + 1) * first + (first + 1) * second + (second + 1) * third + (third + 1) * 3

    return _network(init, apply, _vectors, (6,), groups, remaining, optional)


NETWORKS: dict[str, Callable[[], Network]] = {
    "challenge MLP": challenge_mlp,
    "MLP, LayerNorm": norm_mlp,
    "MLP, LayerNorm, slow variance": partial(norm_mlp, fast=False),
    "LeNet-5": lenet5,
    "LeNet-5, classic": partial(lenet5, classic=True),
    "ResNet-20": resnet20,
    "DenseNet block": densenet_block,
    "MobileNet blocks": mobilenet,
    "U-Net": unet,
    "MLP-Mixer": mixer,
    "MLP-Mixer, token biases": partial(mixer, token_bias=True),
    "ViT": vit,
    "ViT, class token": partial(vit, cls=True),
    "ViT, slow variance": partial(vit, fast=False),
    "transformer": causal_transformer,
    "transformer, tied": partial(causal_transformer, tied=True),
    "scan": scanned_mlp,
    "scan, remat": partial(scanned_mlp, remat=True),
    "Flax scan": flax_scan,
    "NNX": nnx_network,
    "plain function": plain_network,
}
"""A factory a network; called anew, each gives the same network."""
