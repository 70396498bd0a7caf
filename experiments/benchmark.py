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
    theirs: list[float]  # its seconds; empty where it was not measured
    ratios: list[float]
    goal: str


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
        self.multiply, size = jax.jit(jnp.matmul), settings.matmul_size
        self.factors = jax.random.normal(jax.random.key(0), (2, size, size))
        self.data = jax.tree.map(jnp.asarray, loaded)
        features, classes = loaded.train.x.shape[1], int(loaded.train.y.max()) + 1
        self.sizes = (features, *settings.hidden_sizes, classes)
        self.epoch_steps = len(loaded.train.y) // settings.batch_size
        init, self.apply = models.mlp(features, settings.hidden_sizes, classes)
        self.optimizer = optax.adam(1e-3)
        self.program = jax.jit(make_train(self.apply, self.optimizer))
        self.params = init(jax.random.key(0))
        state = self.train(self.new_state(1), keep_all(self.params, 1), settings.trained_steps)
        self.params = jax.tree.map(lambda leaf: leaf[0], state.params)
        self.targets = [config.sparsity_of_level(level) for level in settings.levels]
        self.counts = self.counts_of(self.targets)
        self.masks = select(self.params, self.counts)

    def counts_of(self, targets: Sequence[Any]) -> dict[Granularity, Counts]:
        return {g: sparsity.counts(self.params, targets, granularity=g) for g in config.METHODS}

    def new_state(self, levels: int) -> TrainState:
        state = init_state(self.params, self.optimizer)
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * levels), state)

    def train(self, state: TrainState, masks: Masks, steps: int) -> TrainState:
        """Shuffle, and make the first steps of an epoch."""
        x, y = self.data.train
        batches = batch_indices(jax.random.key(0), len(y), self.settings.batch_size)
        return self.program(state, masks, x, y, batches, np.int32(0), np.int32(steps))[0]

    def matmul_rate(self, name: str) -> float:
        seconds = median(clock(self.multiply, *self.factors)[1] for _ in range(3))
        rate = 2 * self.settings.matmul_size**3 / seconds
        self.rates.setdefault(name, []).append(rate)
        return rate

    def compare(
        self, name: str, ours: Callable[[], float],
        beside: str, theirs: Callable[[float], float] | None, goal: str,
    ) -> list[float]:  # fmt: skip
        """Add a row of the seconds that `ours` returns and `theirs`, given the matmul's rate."""
        seconds, others = [], []
        ours(), clock(self.multiply, *self.factors)  # compiles, warms up
        for _ in range(self.settings.rounds):
            before = self.matmul_rate(name)
            seconds.append(ours())
            rate = (before + self.matmul_rate(name)) / 2
            if theirs is not None:
                others.append(theirs(rate))
        ratios = [b / a for a, b in zip(seconds, others, strict=False)]
        self.rows.append(Row(name, seconds, beside, others, ratios, goal))
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
        names = sorted(self.params)  # hidden_0, hidden_1, ..., logits
        kernels = {f"kernel_{i}": self.params[name]["kernel"] for i, name in enumerate(names)}
        counts = {
            f"{g}_counts": np.stack([c[name]["kernel"] for name in names[:-1]], axis=1)
            for g, c in self.counts.items()
        }
        x, y = self.data.train
        sizes = {"layers": len(names), "batch_size": self.settings.batch_size}
        return {"x": x, "y": y, **sizes, **kernels, **counts}

    def measure_masks(self, ask: Ask | None) -> None:
        levels = len(self.targets)
        self.compare(
            f"masks of {levels} levels, weight and unit",
            lambda: median(clock(select, self.params, self.counts)[1] for _ in range(5)),
            "PyTorch", ask and (lambda _: ask("masks", levels=levels)["seconds"]), ">= 25 x",
        )  # fmt: skip

    def measure_epoch(self, ask: Ask | None) -> None:
        state, masks = self.new_state(1), keep_all(self.params, 1)
        steps = min(self.settings.timed_steps, self.epoch_steps)
        scale = self.epoch_steps / steps

        def ours() -> float:
            nonlocal state  # goes on from round to round, like PyTorch's
            state, seconds = clock(self.train, state, masks, steps)
            return scale * seconds

        self.compare(
            "training epoch, dense", ours, "PyTorch",
            ask and (lambda _: scale * ask("train", steps=steps)["seconds"]), ">= 1.05 x",
        )  # fmt: skip

    def measure_evaluation(self) -> None:
        val, test, levels = self.data.val, self.data.test, len(self.targets)
        params = self.new_state(levels).params
        # Padding is not counted, so what is wasted on it lowers the rate.
        macs = levels * (len(val.y) + len(test.y)) * forward_macs(self.sizes)
        score = functools.partial(
            evaluate.score, params, self.masks["weight"], val, test, None,
            apply=self.apply, batch_size=_EVALUATION_BATCH, levels_at_once=None,
        )  # fmt: skip
        self.compare(
            f"evaluation of {levels} weight levels", lambda: clock(score)[1],
            "matmul", lambda rate: 2 * macs / rate, ">= 80 %",
        )  # fmt: skip

    def measure_masked_training(self) -> None:
        """Train from the last but one update of a pruning epoch, and make the last one."""
        pruned = [target for target in self.targets if target]
        levels, steps = len(pruned), max(1, round(self.epoch_steps / UPDATES_PER_EPOCH))
        progress = 1 - Fraction(1, UPDATES_PER_EPOCH)
        within = select(self.params, self.counts_of([cubic(t, progress) for t in pruned]))
        counts, state = self.counts_of(pruned), self.new_state(levels)
        updates: dict[Granularity, list[float]] = {g: [] for g in config.METHODS}

        def ours() -> float:
            nonlocal state
            state, seconds = clock(self.train, state, within["weight"], steps)
            for g in updates:
                timed = clock(update, state.params, {g: within[g]}, {g: counts[g]})
                updates[g].append(timed[1])
            return seconds

        macs = levels * steps * self.settings.batch_size * training_macs(self.sizes)
        between = self.compare(
            f"masked training of {levels} levels, {steps} steps", ours,
            "matmul", lambda rate: 2 * macs / rate, ">= 80 %",
        )  # fmt: skip
        between = [s * self.epoch_steps / UPDATES_PER_EPOCH / steps for s in between]
        for g, seconds in updates.items():
            seconds = seconds[1:]  # the first one compiled
            ratios = [a / b for a, b in zip(seconds, between, strict=True)]
            name = f"update of {levels} levels, {g}"
            self.rows.append(Row(name, seconds, "training", between, ratios, "<= 5 %"))
