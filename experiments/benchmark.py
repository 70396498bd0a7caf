"""Measure what jaxprune promises of its speed on a CPU, beside what it is compared with.

    python experiments/benchmark.py --torch .venv-torch/bin/python

On real Fashion-MNIST and the challenge's network after some hundred steps of training, in one run,
one thing at a time: every round measures both sides of a ratio one after the other, and the rate of
matrix multiplication before and after. Compilation is left out. PyTorch runs in an environment of
its own (`make benchmark` makes it), in a process that waits meanwhile.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import config, data, evaluate, metrics, models, schedules, sparsity, trees
from jaxprune.masks import apply_masks, masks_at
from jaxprune.scores import magnitude
from jaxprune.study.curve import keep_all
from jaxprune.study.sweep import _EVALUATION_BATCH, UPDATES_PER_EPOCH
from jaxprune.train import TrainState, batch_indices, init_state, make_train
from jaxprune.types import Counts, Granularity, Masks, Params

Ask = Callable[..., dict[str, Any]]
"""`ask(op, **arguments)`: have PyTorch's process do something."""


class Settings(NamedTuple):
    """What is measured; the tests take less."""

    rounds: int = 5
    hidden_sizes: tuple[int, ...] = (1000, 1000, 500, 200)
    levels: tuple[float, ...] = config.LEVELS
    batch_size: int = 128
    trained_steps: int = 300  # of the network that is pruned and evaluated
    timed_steps: int = 100  # of the training that is compared with PyTorch's
    matmul_size: int = 2000


class Row(NamedTuple):
    """A line of the table; lists have a number a round."""

    name: str
    seconds: list[float]
    beside: str  # what it is compared with
    theirs: list[float]  # its seconds, or the matmul's FLOP/s; empty where not measured
    ratios: list[float]
    goal: float
    at_most: bool = False


def forward_macs(sizes: Sequence[int]) -> int:
    """Return the multiply-adds of an example in a network of these layer sizes."""
    return sum(a * b for a, b in zip(sizes, sizes[1:], strict=False))


def training_macs(sizes: Sequence[int]) -> int:
    """Return those of a training step: forward, weights' and, but in layer 1, inputs' gradients."""
    return 3 * forward_macs(sizes) - sizes[0] * sizes[1]


def clock(f: Callable, *args: Any) -> tuple[Any, float]:
    """Return a computed result and the seconds it took."""
    started = time.perf_counter()
    result = jax.block_until_ready(f(*args))
    return result, time.perf_counter() - started


def masks_by_argsort(kernel: np.ndarray, counts: np.ndarray, granularity: str) -> np.ndarray:
    """Return the masks of all levels, (levels, inputs, outputs), by NumPy's stable argsort."""
    scores = np.abs(kernel)
    if granularity == "unit":
        scores = np.sqrt(np.sum(np.square(kernel, dtype=np.float64), axis=0))
    order = np.argsort(scores, axis=None, kind="stable")
    masks = np.ones((len(counts), scores.size), bool)
    for mask, count in zip(masks, counts, strict=True):
        mask[order[:count]] = False
    return np.broadcast_to(masks.reshape(-1, *scores.shape), (len(counts), *kernel.shape))


@jax.jit
def select(params: Params, counts: dict[Granularity, Counts]) -> dict[Granularity, Masks]:
    """Return all masks, by granularity. As constants, params and counts would be folded."""
    return {g: masks_at(magnitude(params), c, granularity=g) for g, c in counts.items()}


@jax.jit
def update(
    params: Params, masks: dict[Granularity, Masks], counts: dict[Granularity, Counts]
) -> dict[Granularity, Masks]:
    """Select anew in every level among what is kept, as `study.sweep` does."""

    def one_level(level: tuple[Params, dict, dict]) -> dict[Granularity, Masks]:
        params, masks, counts = level
        return {
            g: masks_at(magnitude(apply_masks(params, m)), counts[g], granularity=g, within=m)
            for g, m in masks.items()
        }

    return trees.map_levels(one_level, (params, masks, counts))


@contextlib.contextmanager
def torch_worker(python: str, inputs: dict[str, Any]) -> Iterator[Ask]:
    """Run `torch_baseline.py` in another interpreter, with these arrays."""
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/inputs.npz", **inputs)
        script = str(Path(__file__).with_name("torch_baseline.py"))
        process = subprocess.Popen(
            [python, script, f"{folder}/inputs.npz", str(cores())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdin and process.stdout

        def ask(op: str, **arguments: Any) -> dict[str, Any]:
            time.sleep(0.05)  # threads of either side spin for some milliseconds before they sleep
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps({"op": op, **arguments}), file=process.stdin, flush=True)
            answer = process.stdout.readline()
            if not answer:
                raise RuntimeError(f"{python} ended at {op!r}, for the reason above")
            time.sleep(0.05)
            return json.loads(answer)

        try:
            yield ask
        finally:
            process.terminate()
            process.communicate()


class Benchmark:
    """The network, the data, and what has been measured."""

    def __init__(self, loaded: data.Data, settings: Settings):
        self.settings = settings
        self.rows: list[Row] = []
        self.rates: dict[str, list[float]] = {}  # the matmul's FLOP/s, by what was measured then
        self.sizes = (
            loaded.train.x.shape[1], *settings.hidden_sizes, int(loaded.train.y.max()) + 1
        )  # fmt: skip
        self.data = jax.tree.map(jnp.asarray, loaded)
        self.epoch_steps = len(loaded.train.y) // settings.batch_size
        init, self.apply = models.mlp(self.sizes[0], settings.hidden_sizes, self.sizes[-1])
        self.optimizer = optax.adam(1e-3)
        self.program = jax.jit(make_train(self.apply, self.optimizer))
        self.targets = [config.sparsity_of_level(level) for level in settings.levels]
        self.params = init(jax.random.key(0))
        state = self.train(self.new_state(1), keep_all(self.params, 1), settings.trained_steps)
        self.params = jax.tree.map(lambda leaf: leaf[0], state.params)
        self.counts = self.counts_of(self.targets)
        self.masks = select(self.params, self.counts)

    def counts_of(self, targets: Sequence[Any]) -> dict[Granularity, Counts]:
        return {g: sparsity.counts(self.params, targets, granularity=g) for g in config.METHODS}

    def new_state(self, levels: int) -> TrainState:
        state = init_state(self.params, self.optimizer)
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * levels), state)

    def train(self, state: TrainState, masks: Masks, steps: int, seed: int = 0) -> TrainState:
        """Shuffle, and make the first steps of an epoch."""
        x, y = self.data.train
        batches = batch_indices(jax.random.key(seed), len(y), self.settings.batch_size)
        return self.program(state, masks, x, y, batches, np.int32(0), np.int32(steps))[0]

    def rounds(self, name: str, f: Callable[[], Any]) -> list[tuple[Any, float]]:
        """Return each round's result, and the matmul's rate, the mean of before and after."""
        size = self.settings.matmul_size
        factors = [jax.random.normal(k, (size, size)) for k in jax.random.split(jax.random.key(0))]
        multiply = jax.jit(jnp.matmul)
        rates = self.rates.setdefault(name, [])

        def rate() -> float:
            rates.append(2 * size**3 / median(clock(multiply, *factors)[1] for _ in range(3)))
            return rates[-1]

        f(), clock(multiply, *factors)  # compiles
        return [(f(), (before + rate()) / 2) for _ in range(self.settings.rounds)
                for before in [rate()]]  # fmt: skip

    def beside_torch(
        self, name: str, goal: float, ours: Callable[[], float], ask: Ask | None, scale: float,
        op: str, **arguments: int,
    ) -> None:  # fmt: skip
        def pair() -> tuple[float, ...]:
            seconds = scale * ours()
            return (seconds, scale * ask(op, **arguments)["seconds"]) if ask else (seconds,)

        pairs = [pair for pair, _ in self.rounds(name, pair)]
        theirs = [pair[1] for pair in pairs if ask]
        ratios = [pair[1] / pair[0] for pair in pairs if ask]
        self.rows.append(Row(name, [pair[0] for pair in pairs], "PyTorch", theirs, ratios, goal))

    def beside_matmul(self, name: str, macs: int, f: Callable[[], float]) -> list[float]:
        seconds, rates = map(list, zip(*self.rounds(name, f), strict=True))
        ratios = [2 * macs / s / rate for s, rate in zip(seconds, rates, strict=True)]
        self.rows.append(Row(name, seconds, "matmul", rates, ratios, 0.8))
        return seconds

    def check(self, ask: Ask | None) -> None:
        """Raise ArithmeticError unless all masks are exact and PyTorch has the same network."""
        for g, masks in self.masks.items():
            for name in self.params:
                kernel, counts = self.params[name]["kernel"], self.counts[g][name]["kernel"]
                right = masks_by_argsort(np.asarray(kernel), counts, g)
                if not np.array_equal(np.asarray(masks[name]["kernel"]), right):
                    raise ArithmeticError(f"the {g} masks of {name} are not those of an argsort")
        if ask is not None:
            x, y = (values[:500] for values in self.data.train)
            ours = float(metrics.cross_entropy(self.apply(self.params, x), y).mean())
            theirs = ask("loss", examples=500)["loss"]
            if abs(ours - theirs) > 1e-4:
                raise ArithmeticError(f"the loss is {ours:.6f}, but {theirs:.6f} in PyTorch")

    def torch_inputs(self) -> dict[str, Any]:
        names = [*(f"hidden_{i}" for i in range(len(self.sizes) - 2)), "logits"]
        counts = {
            f"{g}_counts": np.stack([c[name]["kernel"] for name in names[:-1]], axis=1)
            for g, c in self.counts.items()
        }
        kernels = {f"kernel_{i}": self.params[name]["kernel"] for i, name in enumerate(names)}
        x, y = self.data.train
        sizes = {"layers": len(names), "batch_size": self.settings.batch_size}
        return {"x": x, "y": y, **sizes, **counts, **kernels}

    def measure_masks(self, ask: Ask | None) -> None:
        def ours() -> float:
            return median(clock(select, self.params, self.counts)[1] for _ in range(5))

        levels = len(self.targets)
        name = f"masks of {levels} levels, weight and unit"
        self.beside_torch(name, 25, ours, ask, 1.0, "masks", levels=levels)

    def measure_epoch(self, ask: Ask | None) -> None:
        state, masks = self.new_state(1), keep_all(self.params, 1)
        steps = min(self.settings.timed_steps, self.epoch_steps)

        def ours() -> float:
            nonlocal state
            state, seconds = clock(self.train, state, masks, steps)
            return seconds

        scale = self.epoch_steps / steps
        self.beside_torch("training epoch, dense", 1.05, ours, ask, scale, "train", steps=steps)

    def measure_evaluation(self) -> None:
        val, test, levels = self.data.val, self.data.test, len(self.targets)
        params = self.new_state(levels).params

        def f() -> float:
            return clock(
                lambda: evaluate.score(
                    params, self.masks["weight"], val, test, None,
                    apply=self.apply, batch_size=_EVALUATION_BATCH, levels_at_once=None,
                )
            )[1]  # fmt: skip

        macs = levels * (len(val.y) + len(test.y)) * forward_macs(self.sizes)
        self.beside_matmul(f"evaluation of {levels} weight levels", macs, f)
