"""Measure what jaxprune promises of its speed on a CPU, beside what it is compared with.

    python experiments/benchmark.py --torch .venv-torch/bin/python

On real Fashion-MNIST and the challenge's network after some hundred steps of training, in one run,
one thing at a time: a round measures both sides of a ratio one after the other, and the rate of
matrix multiplication before and after ours. Compilation is left out. PyTorch runs in an environment
of its own (`make benchmark` makes it), in a process that waits meanwhile.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import config, data, evaluate, metrics, models, sparsity, trees
from jaxprune.masks import apply_masks, masks_at
from jaxprune.schedules import cubic
from jaxprune.scores import magnitude
from jaxprune.study.curve import keep_all
from jaxprune.study.sweep import _EVALUATION_BATCH, UPDATES_PER_EPOCH
from jaxprune.train import TrainState, batch_indices, init_state, make_train
from jaxprune.types import Counts, Granularity, Masks, Params

Ask = Callable[..., Any]  # `ask(op, **arguments)` has PyTorch's process do something


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
    other: str  # what it is compared with
    theirs: list[float]  # its seconds; empty where it was not measured
    ratios: list[float]
    goal: str  # such as `>= 25 x` or `<= 5 %`


def forward_macs(sizes: Sequence[int]) -> int:
    """Return the multiply-adds of an example in a network of these layer sizes."""
    return sum(a * b for a, b in itertools.pairwise(sizes))


def training_macs(sizes: Sequence[int]) -> int:
    """Return those of training: forward, weights' gradients and, but in layer 1, the inputs'."""
    return 3 * forward_macs(sizes) - sizes[0] * sizes[1]


def clock(f: Callable, *args: Any, **options: Any) -> tuple[Any, float]:
    """Return a computed result and the seconds it took."""
    started = time.perf_counter()
    result = jax.block_until_ready(f(*args, **options))
    return result, time.perf_counter() - started


def masks_by_argsort(kernel: np.ndarray, counts: np.ndarray, granularity: str) -> np.ndarray:
    """Return the masks of all levels, (levels, inputs, outputs), by NumPy's stable argsort."""
    unit = granularity == "unit"
    scores = np.sum(np.square(kernel, dtype=np.float64), axis=0) if unit else np.abs(kernel)
    order = np.argsort(scores, axis=None, kind="stable")
    masks = np.ones((len(counts), *scores.shape), bool)
    for mask, count in zip(masks, counts, strict=True):
        mask.flat[order[:count]] = False
    return np.broadcast_to(masks[:, None] if unit else masks, (len(counts), *kernel.shape))


@jax.jit
def select(params: Params, counts: dict[Granularity, Counts]) -> dict[Granularity, Masks]:
    """Return all masks, by granularity. As constants, params and counts would be folded."""
    return {g: masks_at(magnitude(params), c, granularity=g) for g, c in counts.items()}


@partial(jax.jit, static_argnums=0)
def update(granularity: Granularity, params: Params, masks: Masks, counts: Counts) -> Masks:
    """Select anew in every level among what is kept, as `study.sweep` does."""

    def one_level(level: tuple[Params, Masks, Counts]) -> Masks:
        params, masks, counts = level
        scores = magnitude(apply_masks(params, masks))
        return masks_at(scores, counts, granularity=granularity, within=masks)

    return trees.map_levels(one_level, (params, masks, counts))


@contextlib.contextmanager
def torch_worker(python: str, inputs: dict[str, Any]) -> Iterator[Ask]:
    """Run `torch_baseline.py` in another interpreter, with these arrays."""
    script, pipe = Path(__file__).with_name("torch_baseline.py"), subprocess.PIPE
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/inputs.npz", **inputs)
        command = [python, str(script), f"{folder}/inputs.npz", str(cores())]
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
            assert process.stdin and process.stdout

            def ask(op: str, **arguments: Any) -> Any:
                time.sleep(0.05)  # threads spin for some milliseconds before they sleep
                with contextlib.suppress(BrokenPipeError):
                    print(json.dumps({"op": op, **arguments}), file=process.stdin, flush=True)
                answer = process.stdout.readline()
                if not answer:
                    raise RuntimeError(f"{python} ended at {op!r}, for the reason above")
                time.sleep(0.05)
                return json.loads(answer)

            yield ask


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
        self.rates.setdefault(name, []).append(2 * self.settings.matmul_size**3 / seconds)
        return self.rates[name][-1]

    def compare(
        self, name: str, goal: str, ours: Callable[[], float], other: str,
        theirs: Callable[[float], float] | None,
    ) -> list[float]:  # fmt: skip
        """Add a row of the seconds that `ours` returns and `theirs`, given the matmul's rate."""
        seconds, others = [], []
        print(f"{name} ...", file=sys.stderr, flush=True)
        clock(self.multiply, *self.factors), ours()  # compiles
        for _ in range(self.settings.rounds):
            before = self.matmul_rate(name)
            seconds.append(ours())
            rate = (before + self.matmul_rate(name)) / 2
            others += [theirs(rate)] if theirs else []
        ratios = [b / a for a, b in zip(seconds, others, strict=False)]
        self.rows.append(Row(name, seconds, other, others, ratios, goal))
        return seconds

    def torch_inputs(self) -> dict[str, Any]:
        names = sorted(self.params)  # hidden_0, hidden_1, ..., logits
        inputs = {f"kernel_{i}": self.params[name]["kernel"] for i, name in enumerate(names)}
        for g, counts in self.counts.items():
            inputs[f"{g}_counts"] = np.stack([counts[name]["kernel"] for name in names[:-1]], 1)
        sizes = {"layers": len(names), "batch_size": self.settings.batch_size}
        return inputs | sizes | self.data.train._asdict()

    def check(self, ask: Ask | None) -> None:
        """Raise ArithmeticError unless all masks are exact and PyTorch has the same network."""
        for g, name in itertools.product(self.masks, self.params):
            kernel, counts = self.params[name]["kernel"], self.counts[g][name]["kernel"]
            right = masks_by_argsort(np.asarray(kernel), counts, g)
            if not np.array_equal(np.asarray(self.masks[g][name]["kernel"]), right):
                raise ArithmeticError(f"the {g} masks of {name} are not those of an argsort")
        x, y = (values[:500] for values in self.data.train)
        loss = float(metrics.cross_entropy(self.apply(self.params, x), y).mean())
        if ask and abs(loss - ask("loss", examples=len(y))["loss"]) > 1e-4:
            raise ArithmeticError(f"PyTorch's loss is not {loss:.6f}: it has another network")

    def measure_masks(self, ask: Ask | None) -> None:
        levels = len(self.targets)
        self.compare(
            f"masks of {levels} levels, weight and unit", ">= 25 x",
            lambda: median(clock(select, self.params, self.counts)[1] for _ in range(5)),
            "PyTorch", ask and (lambda _: ask("masks", levels=levels)["seconds"]),
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
            f"training epoch, by {steps} of its steps", ">= 1.05 x", ours,
            "PyTorch", ask and (lambda _: scale * ask("train", steps=steps)["seconds"]),
        )  # fmt: skip

    def measure_evaluation(self) -> None:
        (_, val, test), levels = self.data, len(self.targets)
        args = self.new_state(levels).params, self.masks["weight"], val, test, None
        options = {"apply": self.apply, "batch_size": _EVALUATION_BATCH, "levels_at_once": None}
        # Padding is not counted, so what is wasted on it lowers the rate.
        flop = 2 * levels * (len(val.y) + len(test.y)) * forward_macs(self.sizes)
        self.compare(
            f"evaluation of {levels} weight levels", ">= 80 %",
            lambda: clock(evaluate.score, *args, **options)[1], "matmul", lambda rate: flop / rate,
        )  # fmt: skip

    def measure_masked_training(self) -> None:
        """Train after the last but one update of a pruning epoch, and make the last one."""
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
                updates[g].append(clock(update, g, state.params, within[g], counts[g])[1])
            return seconds

        flop = 2 * levels * steps * self.settings.batch_size * training_macs(self.sizes)
        name = f"masked training of {levels} levels, {steps} steps"
        training = self.compare(name, ">= 80 %", ours, "matmul", lambda rate: flop / rate)
        training = [s * self.epoch_steps / UPDATES_PER_EPOCH / steps for s in training]
        for g, (_, *seconds) in updates.items():  # the first one compiled
            ratios = [a / b for a, b in zip(seconds, training, strict=True)]
            name = f"update of {levels} levels, {g}"
            self.rows.append(Row(name, seconds, "training", training, ratios, "<= 5 %"))


def spread(values: Sequence[float], unit: str) -> str:
    """Return the median, the range and the unit; a dash for no values."""
    scale, digits = {"s": (1, 3), "x": (1, 2), "%": (100, 1), "GFLOP/s": (1e-9, 1)}[unit]
    numbers = [f"{f(values) * scale:.{digits}f}" for f in (median, min, max) if values]
    return "{} ({}-{}) {}".format(*numbers, unit) if values else "-"


def table(rows: Sequence[Row], rates: dict[str, list[float]]) -> str:
    """Return a line a row: the seconds of both, their ratio, its goal, and whether it is met."""
    cells = [("", "jaxprune", "beside", "", "ratio", "goal", "met", "matmul meanwhile")]
    for name, seconds, other, theirs, ratios, goal in rows:
        sign, number, unit = goal.split()
        limit = float(number) / (100 if unit == "%" else 1)
        met = ratios and (median(ratios) >= limit if sign == ">=" else median(ratios) <= limit)
        cells.append((
            name, spread(seconds, "s"), other, spread(theirs, "s"), spread(ratios, unit), goal,
            "-" if not ratios else "yes" if met else "no", spread(rates.get(name, []), "GFLOP/s"),
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def cores() -> int:
    """Return how many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device() -> str:
    """Describe the processor."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return f"{cores()} cores of {(names or [platform.processor() or platform.machine()])[0]}"


def run(loaded: data.Data, settings: Settings, python: str | None) -> dict[str, Any]:
    """Measure everything, print it, and return all numbers."""
    versions = {name: version(name) for name in ("jax", "jaxlib", "numpy", "optax", "flax")}
    load = os.getloadavg()[0]
    bench = Benchmark(loaded, settings)
    worker = torch_worker(python, bench.torch_inputs()) if python else contextlib.nullcontext()
    with worker as ask:
        versions |= {"python": platform.python_version(), **(ask("version") if ask else {})}
        bench.check(ask)
        bench.measure_masks(ask)
        bench.measure_epoch(ask)
    bench.measure_evaluation()
    bench.measure_masked_training()
    where = f"{device()}, {platform.system()}, load {load:.1f} at the start"
    network = "-".join(map(str, bench.sizes))
    print(where, ", ".join(f"{name} {number}" for name, number in versions.items()), sep="\n")
    print(f"{network}, trained for {settings.trained_steps} steps on {len(loaded.train.y):,} images")
    print(f"medians (and ranges) of {settings.rounds} rounds; ratios are of one round each\n")
    print(table(bench.rows, bench.rates))
    every = [rate for rates in bench.rates.values() for rate in rates]
    size = settings.matmul_size
    print(f"\nmatmul, float32 {size}^3: {spread(every, 'GFLOP/s')} over the whole run")
    if python is None:
        print("-: PyTorch was not measured; `make benchmark` does, or --torch PYTHON that has it")
    return {
        "device": where, "versions": versions, "settings": settings._asdict(),
        "rows": [row._asdict() for row in bench.rows], "matmul_flop_per_second": bench.rates,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags, measure, and keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter with torch and numpy")
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where to keep all numbers")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.out and not args.out.parent.is_dir():
        parser.error(f"--out: no such folder: {args.out.parent}")
    jax.config.update("jax_platforms", "cpu")
    try:
        numbers = run(data.load("fashion_mnist"), Settings(args.rounds), args.torch)
    except (OSError, ValueError, ArithmeticError, RuntimeError) as error:
        parser.exit(1, f"benchmark.py: {error}\n")
    if args.out:
        args.out.write_text(json.dumps({"command": sys.argv, **numbers}, indent=1) + "\n")


if __name__ == "__main__":
    main()
