"""Measure what jaxprune promises of its speed on a CPU, beside what it is compared with.

    python experiments/benchmark.py --torch .venv-torch/bin/python

On real Fashion-MNIST and the network of the challenge, trained a little, one thing at a time.
A round measures both sides of a ratio one after the other, and the rate of matrix multiplication
before and after ours; the first round, which compiles, is left out. PyTorch runs in an environment
of its own (`make benchmark` makes it), in a process that waits meanwhile.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.results_page import speed_section
from jaxprune import config, data, networks, structure, trees
from jaxprune.criteria import magnitude
from jaxprune.masks import apply_masks, masks_at
from jaxprune.report import text
from jaxprune.study.parts import Part, compact
from jaxprune.study.programs import Programs
from jaxprune.study.setup import keep_all, make_setup
from jaxprune.study.stages import UPDATES_PER_EPOCH
from jaxprune.train import TrainState, batch_indices
from jaxprune.types import Counts, Masks, Params

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
BATCH_SIZE = 128
TRAINED_STEPS = 300  # of the network that is pruned and evaluated
TIMED_STEPS = 100  # of the training that is compared with PyTorch's
INFERENCE_BATCH = 256
COMPACT_GOALS = {50.0: 2.5, 80.0: 8, 90.0: 15}  # how many times faster, by the level
Ask = Callable[..., Any]  # `ask(op, **arguments)` has PyTorch's process do something


class Row(NamedTuple):
    """A line of the table; lists have a number a round."""

    name: str
    seconds: list[float]
    other: str  # what it is compared with
    theirs: list[float]  # its seconds; empty where it was not measured
    ratios: list[float]
    goal: str  # such as `>= 25 x` or `<= 5 %`
    rates: list[float]  # the matmul's, in FLOP/s, two a round


def cpu_name() -> str:
    """Return what Linux calls the processor."""
    info = Path("/proc/cpuinfo")
    found = re.findall("model name.*: (.*)", info.read_text()) if info.exists() else []
    return (found or ["?"])[0]


def macs(sizes: Sequence[int], *, training: bool) -> int:
    """Return an example's multiply-adds; training needs no gradient of the network's inputs."""
    forward = sum(a * b for a, b in itertools.pairwise(sizes))
    return 3 * forward - sizes[0] * sizes[1] if training else forward


def clock(f: Callable, *args: Any) -> tuple[Any, float]:
    """Return a computed result and the seconds it took."""
    started = time.perf_counter()
    result = jax.block_until_ready(f(*args))
    return result, time.perf_counter() - started


def matmul(size: int = 2000) -> Callable[[], float]:
    """Return a measurement of the FLOP/s of a float32 product: the median of three."""
    multiply, factors = jax.jit(jnp.matmul), jax.random.normal(jax.random.key(0), (2, size, size))
    return lambda: 2 * size**3 / median(clock(multiply, *factors)[1] for _ in range(3))


def masks_by_argsort(kernel: np.ndarray, counts: np.ndarray, granularity: str) -> np.ndarray:
    """Return the masks of all levels, (levels, inputs, outputs), by NumPy's stable argsort."""
    unit = granularity == "unit"
    scores = np.sum(np.square(kernel, dtype=np.float64), axis=0) if unit else np.abs(kernel)
    order = np.argsort(scores, axis=None, kind="stable")
    masks = np.ones((len(counts), *scores.shape), bool)
    for mask, count in zip(masks, counts, strict=True):
        mask.flat[order[:count]] = False
    return np.broadcast_to(masks[:, None] if unit else masks, (len(counts), *kernel.shape))


@contextlib.contextmanager
def torch_worker(python: str, inputs: dict[str, Any]) -> Iterator[Ask]:
    """Run `torch_baseline.py` in another interpreter, with these arrays."""
    script, pipe = Path(__file__).with_name("torch_baseline.py"), subprocess.PIPE
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/inputs.npz", **inputs)
        command = [python, str(script), f"{folder}/inputs.npz", str(CORES)]
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:

            def ask(op: str, **arguments: Any) -> Any:
                time.sleep(0.05)  # threads spin for some milliseconds before they sleep
                print(json.dumps({"op": op, **arguments}), file=process.stdin, flush=True)
                answer = process.stdout and process.stdout.readline()
                if not answer:
                    raise RuntimeError(f"{python} ended at {op!r}, for the reason above")
                time.sleep(0.05)
                return json.loads(answer)

            yield ask


class Benchmark:
    """The trained network, its masks, and what has been measured."""

    def __init__(self, loaded: data.Data, rounds: int, hidden_sizes: Sequence[int], size: int):
        self.num_rounds, self.matmul_rate = rounds, matmul(size)
        self.rows: list[Row] = []
        self.epoch_steps = len(loaded.train.y) // BATCH_SIZE
        features = loaded.train.x[0].size
        self.sizes = (features, *hidden_sizes, int(loaded.train.y.max()) + 1)
        init, self.apply = networks.mlp(features, hidden_sizes, self.sizes[-1])
        network, self.params = networks.network(init, self.apply), jax.jit(init)(jax.random.key(0))
        study = config.Study(levels=config.LEVELS, batch_size=BATCH_SIZE)
        self.setup = make_setup(network, loaded, study, None, None, self.params, {})
        self.data, self.programs = self.setup.data, Programs(self.setup)
        self.batch = self.setup.batch(jax.random.key(0))
        self.by = {arm.granularity: arm for arm in self.setup.arms}
        params = self.train(keep_all(self.start(1)), min(TRAINED_STEPS, self.epoch_steps))
        (self.params,) = trees.unstack(params)
        self.targets = [config.sparsity_of_level(level) for level in config.LEVELS]
        self.counts = self.counts_of(self.targets)
        granularities = self.setup.granularities

        @jax.jit  # as constants, params and counts would be folded
        def select(params: Params, counts: dict[str, Counts]) -> dict[str, Masks]:
            return {g: masks_at(magnitude(params), c, granularity=granularities[g])
                    for g, c in counts.items()}  # fmt: skip

        self.select = select
        self.masks = select(self.params, self.counts)

    def counts_of(self, targets: Sequence[Any]) -> dict[str, Counts]:
        return {g: self.setup.counts(arm, targets) for g, arm in self.by.items()}

    def start(self, levels: int) -> Params:
        """Have all levels start from the network, and return them."""
        carry = TrainState(self.params, {}, self.setup.optimizer.init(self.params))
        self.carry = trees.stack([carry] * levels)
        return self.carry.params

    def train(self, masks: Masks, steps: int) -> Params:
        """Shuffle, make the first steps of an epoch from where the last call ended, and return."""
        (part,), _, _ = self.programs.train([Part(self.carry, masks)], *self.batches(steps))
        self.carry = part.carry
        return self.carry.params

    def batches(self, steps: int) -> tuple[Any, ...]:
        """Return what training takes, but for networks and masks."""
        x, y = self.data.train
        batches = batch_indices(jax.random.key(0), len(y), BATCH_SIZE)
        return x, y, batches, jax.random.key(0), np.int32(0), np.int32(steps)

    def score(self, levels: Sequence[Part]) -> float:
        """Return the seconds of scoring all levels."""
        return self.programs.score(levels, None)[2]

    def compare(
        self, name: str, goal: str, ours: Callable[[], float], other: str,
        theirs: Callable[[float], float] | None,
    ) -> list[float]:  # fmt: skip
        """Add a row of the seconds that `ours` returns and `theirs`, given the matmul's rate."""
        print(f"{name} ...", file=sys.stderr, flush=True)
        seconds, others, rates = [], [], []
        for _ in range(1 + self.num_rounds):
            rates.append(self.matmul_rate())
            seconds.append(ours())
            rates.append(self.matmul_rate())
            others += [theirs(sum(rates[-2:]) / 2)] if theirs else []
        seconds, others = seconds[1:], others[1:]
        ratios = [b / a for a, b in zip(seconds, others, strict=False)]
        self.rows.append(Row(name, seconds, other, others, ratios, goal, rates[2:]))
        return seconds

    def torch_inputs(self) -> dict[str, Any]:
        names = sorted(self.params)  # hidden_0, hidden_1, ..., logits
        inputs = {f"kernel_{i}": self.params[name]["kernel"] for i, name in enumerate(names)}
        for g in self.counts:
            inputs[f"{g}_counts"] = np.stack([self.pruned_of(g, n) for n in names[:-1]], axis=1)
        x, y = self.data.train
        return inputs | {"x": x.reshape(len(x), -1), "y": y, "batch_size": BATCH_SIZE}

    def pruned_of(self, granularity: str, name: str) -> np.ndarray:
        """Return how many weights or units of a layer every level prunes, (levels,)."""
        counts = dict(trees.paths_and_leaves(self.counts[granularity]))
        # Of the last layer no units are pruned.
        return np.asarray(counts.get(f"{name}/kernel", np.zeros(len(self.targets), np.int32)))

    def measure_masks(self, ask: Ask | None) -> None:
        """Check all masks, and compare the time that they take."""
        for g, name in itertools.product(self.masks, self.params):
            found, counts = self.masks[g][name]["kernel"], self.pruned_of(g, name)
            right = masks_by_argsort(np.asarray(self.params[name]["kernel"]), counts, g)
            if not np.array_equal(np.asarray(found), right):
                raise ArithmeticError(f"the {g} masks of {name} are not those of an argsort")
        self.compare(
            f"masks of {len(self.targets)} levels, weight and unit", ">= 25 x",
            lambda: median(clock(self.select, self.params, self.counts)[1] for _ in range(5)),
            "PyTorch", ask and (lambda _: ask("masks")["seconds"]),
        )  # fmt: skip

    def measure_epoch(self, ask: Ask | None) -> None:
        """Check that PyTorch has the same network, and compare how fast it goes on learning."""
        x, y = (jnp.asarray(values[:500]) for values in self.data.train)
        losses = optax.softmax_cross_entropy_with_integer_labels
        loss = float(jax.jit(lambda *args: losses(self.apply(*args), y).mean())(self.params, x))
        if ask and abs(loss - ask("loss", examples=len(y))["loss"]) > 1e-4:
            raise ArithmeticError(f"the loss of the same network is {loss:.6f}, not so in PyTorch")
        steps = min(TIMED_STEPS, self.epoch_steps)
        scale, masks = self.epoch_steps / steps, keep_all(self.start(1))
        self.compare(
            f"training epoch, from {steps} of its steps", ">= 1.05 x",
            lambda: scale * clock(self.train, masks, steps)[1],
            "PyTorch", ask and (lambda _: scale * ask("train", steps=steps)["seconds"]),
        )  # fmt: skip

    def measure_evaluation(self) -> None:
        (_, val, test), levels = self.data, len(self.targets)
        self.start(levels)
        whole = [Part(self.carry, self.masks["weight"])]
        # The padding of batches is not counted, so what is wasted on it lowers the rate.
        flop = 2 * levels * (len(val.y) + len(test.y)) * macs(self.sizes, training=False)
        self.compare(
            f"evaluation of {levels} weight levels", ">= 80 %",
            lambda: self.score(whole), "matmul", lambda rate: flop / rate,
        )  # fmt: skip

    def measure_smaller(self) -> None:
        """Compare what unit pruning leaves, compacted, with the same under masks."""
        x = self.data.test.x[:INFERENCE_BATCH]
        dense = jax.jit(self.apply)
        for level, goal in COMPACT_GOALS.items():
            i = config.LEVELS.index(level)
            masks = jax.tree.map(lambda leaf, i=i: leaf[i], self.masks["unit"])
            network = structure.compaction(self.apply, self.params, masks, x)
            small = jax.jit(network.apply)
            masked = apply_masks(self.params, masks)  # beforehand: no part of what is measured
            whole = dense(masked, x)
            if np.max(np.abs(small(network.params, x) - whole)) > 1e-5 * np.max(np.abs(whole)):
                raise ArithmeticError(f"the network without {level:g}% of its units is another")
            size, full = (sum(w.nbytes for w in jax.tree.leaves(tree))
                          for tree in (network.params, self.params))  # fmt: skip
            self.compare(
                f"inference without {level:g}% of the units, batch {INFERENCE_BATCH}, "
                f"bytes / {full / size:.1f}", f">= {goal} x",
                lambda: median(clock(small, network.params, x)[1] for _ in range(30)),  # noqa: B023
                "masked",
                lambda _: median(clock(dense, masked, x)[1] for _ in range(30)),  # noqa: B023
            )  # fmt: skip

        levels, units, setup = len(self.targets), self.masks["unit"], self.setup
        carry = TrainState(self.start(levels), {}, ())
        whole = [Part(carry, self.masks["weight"])]
        self.compare(  # reading the program and taking the units out included
            f"evaluation of {levels} unit levels", ">= 3 x",
            lambda: clock(lambda: self.score(compact(carry, units, setup, setup.scoring)))[1],
            f"{levels} weight levels", lambda _: clock(self.score, whole)[1],
        )  # fmt: skip
        pruned = jax.tree.map(lambda leaf: leaf[1:], units)
        steps = max(1, round(self.epoch_steps / UPDATES_PER_EPOCH))
        self.start(levels - 1)
        smaller = compact(self.carry, pruned, setup, setup.joined)
        args = self.batches(steps)
        whole = [Part(self.carry, pruned)]
        self.compare(
            f"training of {levels - 1} unit levels, pruned, {steps} steps", ">= 3.3 x",
            lambda: self.programs.train(smaller, *args)[2], "masked",
            lambda _: self.programs.train(whole, *args)[2],
        )  # fmt: skip

    def measure_masked_training(self) -> None:
        """Train after the last but one update of the masks, then make the last one."""
        pruned = [target for target in self.targets if target]
        levels, steps = len(pruned), max(1, round(self.epoch_steps / UPDATES_PER_EPOCH))
        earlier, last = self.counts_of([t * 999 / 1000 for t in pruned]), self.counts_of(pruned)
        params = self.start(levels)
        whole = keep_all(params)

        def update(g: str, params: Params, masks: Masks, counts: Counts) -> tuple[Masks, float]:
            args = self.by[g], params, {}, masks, self.batch, counts
            (masks, _), seconds = self.programs.clock.time(self.programs.select_within, *args)
            return masks, seconds

        within = {g: update(g, params, whole, counts)[0] for g, counts in earlier.items()}
        updates: dict[str, list[float]] = {g: [] for g in self.by}

        def ours() -> float:
            params, seconds = clock(self.train, within["weight"], steps)
            for g in updates:
                updates[g].append(update(g, params, within[g], last[g])[1])
            return seconds

        flop = 2 * levels * steps * BATCH_SIZE * macs(self.sizes, training=True)
        name = f"masked training of {levels} levels, {steps} steps"
        training = self.compare(name, ">= 80 %", ours, "matmul", lambda rate: flop / rate)
        training = [s * self.epoch_steps / UPDATES_PER_EPOCH / steps for s in training]
        for g, (_, *seconds) in updates.items():
            ratios = [a / b for a, b in zip(seconds, training, strict=True)]
            name = f"update of {levels} levels, {g}"
            self.rows.append(Row(name, seconds, "training", training, ratios, "<= 5 %", []))


def run(
    loaded: data.Data, python: str | None, *, rounds: int = 5,
    hidden_sizes: Sequence[int] = (1000, 1000, 500, 200), matmul_size: int = 2000,
) -> dict[str, Any]:  # fmt: skip
    """Measure everything, and return all numbers."""
    load = os.getloadavg()[0]
    versions = {module.__name__: module.__version__ for module in (jax, optax, np)}
    versions["python"] = sys.version.split()[0]
    bench = Benchmark(loaded, rounds, hidden_sizes, matmul_size)
    with torch_worker(python, bench.torch_inputs()) if python else contextlib.nullcontext() as ask:
        versions |= ask("version") if ask else {}
        bench.measure_masks(ask)
        bench.measure_epoch(ask)
    bench.measure_evaluation()
    bench.measure_masked_training()
    bench.measure_smaller()
    rows = [row._asdict() for row in bench.rows]
    device = f"{CORES} cores of {cpu_name()}, load {load:.1f} at the start"
    return {"device": device, "versions": versions, "rows": rows}


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags, measure, and keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter with torch and numpy")
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where to keep all numbers")
    args = parser.parse_args(argv)
    if args.rounds < 1 or (args.out and not args.out.parent.is_dir()):
        parser.error("--rounds must be at least 1, and the folder of --out must exist")
    jax.config.update("jax_platforms", "cpu")
    try:
        numbers = run(data.load("fashion_mnist"), args.torch, rounds=args.rounds)
        print(text(speed_section(numbers)))
        if args.torch is None:
            print("PyTorch was not measured; `make benchmark` does, or --torch PYTHON that has it")
        if args.out:
            args.out.write_text(json.dumps({"command": sys.argv, **numbers}, indent=1) + "\n")
    except (OSError, ValueError, ArithmeticError, RuntimeError) as error:
        parser.exit(1, f"benchmark.py: {error}\n")


if __name__ == "__main__":
    main()
