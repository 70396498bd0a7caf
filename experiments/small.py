"""Small networks of one's own for the command line, and data for a regression.

python experiments/sweep.py --network experiments.small:convnet --examples 2000
python experiments/small.py waves.npz
"""

import sys
from functools import partial

import equinox as eqx
import jax
import numpy as np
from flax import nnx

import jaxprune as jp
from jaxprune.networks import NETWORKS, Example
from jaxprune.types import Network


def resnet(example: Example) -> Network:
    """Return a narrow Linen ResNet with BatchNorm: three blocks, of 4, 8 and 16 channels."""
    return NETWORKS["resnet20"](example, width=4, blocks=1)


class Conv(nnx.Module):
    """An NNX network for grey images: one convolution, dropout, two dense layers."""

    def __init__(self, shape: tuple[int, ...], outputs: int, rngs: nnx.Rngs):
        pixels = (shape[0] // 2) * (shape[1] // 2)
        self.conv = nnx.Conv(1, 8, (3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(8 * pixels, 32, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.output = nnx.Linear(32, outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv(x[..., None]))
        return self.output(self.dropout(nnx.relu(self.hidden(x.reshape(len(x), -1)))))


def convnet(example: Example) -> Network:
    """Return `Conv` for these images."""
    return jp.nnx(partial(Conv, example.x.shape[1:], example.outputs))


def equinox(example: Example) -> Network:
    """Return an Equinox MLP; its kernels are (outputs, inputs)."""

    def make(key: jax.Array) -> eqx.nn.MLP:
        return eqx.nn.MLP(example.x[0].size, example.outputs, 64, 2, key=key)

    static = eqx.partition(make(jax.random.key(0)), eqx.is_array)[1]
    return jp.network(
        lambda key: eqx.partition(make(key), eqx.is_array)[0],
        lambda params, x: jax.vmap(eqx.combine(params, static))(x.reshape(len(x), -1)),
    )


def save_waves(path: str) -> None:
    """Write a regression: two sums of sines of four inputs."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-2, 2, (5000, 4)).astype(np.float32)
    y = np.stack([np.sin(x[:, :2]).sum(1), np.sin(2 * x[:, 2:]).sum(1)], 1).astype(np.float32)
    np.savez(path, x_train=x[:4000], y_train=y[:4000], x_test=x[4000:], y_test=y[4000:])


if __name__ == "__main__":
    save_waves(sys.argv[1])
