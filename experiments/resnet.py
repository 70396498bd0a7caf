"""Prune ResNet-20 in the middle of training, and go on masked and compact: the same accuracy?

    python experiments/resnet.py

The network is trained dense for half of the epochs; then a share of the units of every group is
pruned, by norm. From there training goes on twice, on the same batches: of the full network under
its masks, and of the smaller network with the optimizer's state cut to its size. Finished epochs
are kept in the run directory, and the same command goes on from there.
"""

import argparse
import importlib.metadata
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import checkpoints, data, results
from jaxprune.masks import apply_masks
from jaxprune.metrics import cross_entropy
from jaxprune.structure import compaction, dependency_graph, group_masks
from jaxprune.train import TrainState, batch_indices, init_state, make_step
from jaxprune.types import Apply, Masks, Params

STATISTICS_BATCHES = 8  # of training images, whose means and variances are averaged
TEST_BATCH = 500
LINE_SECONDS = 20.0  # between lines of progress
say = partial(print, flush=True)


class ResNet(nn.Module):
    """Three stages of residual blocks, for flat images of one channel; ResNet-20 has three each."""

    width: int
    blocks: int
    classes: int
    train: bool

    @nn.compact
    def __call__(self, x):
        def conv(x: Any, width: int, size: int, stride: int, name: str) -> Any:
            x = nn.Conv(width, (size, size), stride, use_bias=False, name=name)(x)
            # Without momentum, the statistics that training returns are those of the batch.
            return nn.BatchNorm(not self.train, momentum=0.0, name=f"{name}_norm")(x)

        x = x.reshape(-1, math.isqrt(x.shape[1]), math.isqrt(x.shape[1]), 1)
        x = nn.relu(conv(x, self.width, 3, 1, "stem"))
        for stage, block in itertools.product(range(3), range(self.blocks)):
            width, stride = self.width * 2**stage, 2 if stage > 0 and block == 0 else 1
            name = f"stage{stage}_block{block}"
            y = nn.relu(conv(x, width, 3, stride, f"{name}_conv1"))
            y = conv(y, width, 3, 1, f"{name}_conv2")
            x = nn.relu(y + (x if stride == 1 else conv(x, width, 1, stride, f"{name}_shortcut")))
        return nn.Dense(self.classes, name="logits")(jnp.mean(x, axis=(1, 2)))


def keep_all(tree: Any) -> Masks:
    return jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), tree)


class Experiment:
    """Training from several seeds, and the rows that come of it."""

    def __init__(self, args: argparse.Namespace, loaded: data.Data):
        self.args, self.data = args, loaded
        self.steps = args.examples // args.batch_size
        # To zero in the end, so that accuracy does not depend on which batches were the last.
        schedule = optax.cosine_decay_schedule(args.learning_rate, args.epochs * self.steps)
        self.optimizer = optax.adam(schedule)
        model = partial(ResNet, args.width, args.blocks, int(loaded.train.y.max()) + 1)
        self.model, inference = model(train=True), model(train=False)
        self.infer: Apply = lambda variables, x: jnp.asarray(inference.apply(variables, x))
        # Steps are made one by one, since convolutions in compiled loops, as that of `make_train`,
        # are ten times slower on CPUs (jax 0.10).
        step = jax.jit(make_step(self.logits, self.optimizer))
        self.full = step, jax.jit(self.infer), self.variables
        self.statistics = jax.jit(lambda params, x: self.apply(params, x)[1]["batch_stats"])
        self.rows: list[dict[str, Any]] = []
        self.widths: dict[str, tuple[int, int]] = {}  # of the groups, before and after

    def apply(self, params: Params, x: Any) -> Any:
        """Return the logits of training, and what the batch was normalised by."""
        return self.model.apply({"params": params}, x, mutable=["batch_stats"])

    def logits(self, params: Params, x: Any) -> Any:
        return self.apply(params, x)[0]

    def variables(self, params: Params) -> dict[str, Any]:
        """Return what inference takes: parameters, and statistics averaged over some batches."""
        x, size = self.data.train.x, self.args.batch_size
        starts = range(0, len(x) - size + 1, size)[:STATISTICS_BATCHES]
        found = [self.statistics(params, x[start : start + size]) for start in starts]
        return {"params": params, "batch_stats": jax.tree.map(lambda *s: sum(s) / len(s), *found)}

    def run(self, seed: int) -> None:
        """Train dense, prune, and train on masked and compact."""
        x, middle = self.data.train.x[: self.args.batch_size], self.args.epochs // 2
        dense, pruned = range(1, middle + 1), range(middle + 1, self.args.epochs + 1)
        params = jax.jit(self.model.init)(jax.random.key(seed), x)["params"]
        state = init_state(params, self.optimizer)
        params, opt_state = self.train(seed, "dense", dense, state, keep_all(params), *self.full)

        graph = dependency_graph(self.logits, params, x)
        masks = jax.jit(lambda params: group_masks(graph, params, self.args.level / 100))(params)
        state = TrainState(apply_masks(params, masks), opt_state)
        self.train(seed, "masked", pruned, state, masks, *self.full)

        small = compaction(self.logits, state.params, masks, x, fold=False)
        self.widths = small.widths
        variables = self.variables(state.params)
        kept = keep_all(variables) | {"params": masks}
        scored = compaction(self.infer, variables, kept, x, fold=False)
        step, infer = jax.jit(make_step(small.apply, self.optimizer)), jax.jit(scored.apply)
        self.train(seed, "compact", pruned, small.shrink(state), small.masks, step, infer,
                   lambda params: scored.shrink(self.variables(small.expand(params))))  # fmt: skip

    def train(
        self, seed: int, phase: str, epochs: Iterable[int], state: TrainState, masks: Masks,
        step: Any, infer: Any, variables: Any,
    ) -> TrainState:  # fmt: skip
        """Train some epochs and score each, but for those that the run directory holds."""
        for epoch in epochs:
            path = self.args.run_dir / f"seed_{seed}" / phase / f"{epoch:04}"
            name = f"seed {seed} {phase} epoch {epoch}/{self.args.epochs}"
            if not path.exists():
                key = jax.random.fold_in(jax.random.key(seed), epoch)  # the same in all phases
                state, row = self.train_epoch(name, key, state, partial(step, masks=masks))
                row |= self.score(infer, variables(state.params))
                row["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(state.params))
                checkpoints.save(path, state=state, row=jax.tree.map(np.asarray, row))
            state, row = checkpoints.load(path, "state", state), checkpoints.load(path, "row")
            row = {key: round(value.item(), 6) for key, value in row.items()}
            self.rows.append({"seed": seed, "phase": phase, "epoch": epoch, **row})
            say(name, *(f"{key} {value:.6g}" for key, value in row.items()), sep=" · ")
        return state

    def train_epoch(
        self, name: str, key: Any, state: TrainState, step: Any
    ) -> tuple[TrainState, dict[str, Any]]:
        """Make an epoch's steps; compiling is not timed."""
        x, y = self.data.train
        batches = np.asarray(batch_indices(key, len(y), self.args.batch_size))[: self.steps]
        jax.block_until_ready(step(state, x=x[batches[0]], y=y[batches[0]]))
        started = line = time.perf_counter()
        cpu, losses = time.process_time(), []
        for batch in batches:
            state, loss = step(state, x=x[batch], y=y[batch])
            losses.append(float(loss))
            if not math.isfinite(losses[-1]):
                raise ArithmeticError(f"{name}: the loss is {losses[-1]}; lower --learning-rate")
            if (now := time.perf_counter()) - line > LINE_SECONDS:
                line, done = now, len(losses) / self.steps
                say(f"{name} · {done:4.0%} · loss {losses[-1]:.3f} · {now - started:.0f} s")
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        return state, dict(seconds=seconds, cpu_seconds=cpu, train_loss=sum(losses) / len(losses))

    def score(self, infer: Apply, variables: Any) -> dict[str, Any]:
        """Return accuracy and mean loss on the test images."""
        x, y = self.data.test
        parts = np.split(x, range(TEST_BATCH, len(y), TEST_BATCH))
        logits = jnp.concatenate([infer(variables, part) for part in parts])
        accuracy, loss = np.mean(logits.argmax(1) == y), cross_entropy(logits, jnp.asarray(y))
        return {"accuracy": accuracy, "loss": np.mean(loss)}


def comparison(rows: Sequence[dict[str, Any]], seed: int) -> str:
    """Say how the last epochs of masked and compact training compare."""
    last = {row["phase"]: row for row in rows if row["seed"] == seed}
    masked, compact = last["masked"], last["compact"]
    points = 100 * (compact["accuracy"] - masked["accuracy"])
    smaller, faster = (masked[name] / compact[name] for name in ("parameters", "cpu_seconds"))
    return (f"seed {seed}: compact {points:+.2f} points beside masked, {smaller:.2f} x smaller, "
            f"an epoch {faster:.2f} x faster in CPU seconds")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Run all seeds, or go on with them; print and keep the rows."""
    loaded = data.load(args.dataset)
    args.examples = args.examples or len(loaded.train.y)
    if not args.batch_size <= args.examples <= len(loaded.train.y):
        raise ValueError(f"--examples must be in [{args.batch_size}, {len(loaded.train.y)}], a "
                         f"batch to the training set, got {args.examples}")  # fmt: skip
    settings = {k: v for k, v in vars(args).items() if k not in ("run_dir", "out")}
    config = args.run_dir / "config.json"
    before = results.read_config(config)["settings"] if config.exists() else settings
    if changed := results.compare_settings(before, settings):
        raise ValueError(f"{args.run_dir} was begun otherwise: {'; '.join(changed)}")
    for folder in (args.run_dir, args.out.parent):
        folder.mkdir(parents=True, exist_ok=True)
    results.write_json_atomic(config, {"settings": settings})
    experiment = Experiment(args, loaded)
    for seed in args.seeds:
        experiment.run(seed)
        say(comparison(experiment.rows, seed))
    packages = ("jax", "flax", "optax", "numpy")
    results.write_json_atomic(args.out, {
        "command": sys.argv, "settings": settings, "rows": experiment.rows,
        "widths": experiment.widths,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
    })  # fmt: skip


def within(low: float, high: float = math.inf, kind: Callable[[str], Any] = int) -> Any:
    """Return a parser of numbers from `low` to below `high`."""

    def number(text: str) -> Any:
        if not low <= (value := kind(text)) < high:
            raise argparse.ArgumentTypeError(f"must be in [{low:g}, {high:g}), got {text}")
        return value

    return number


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags, run, and turn what goes wrong into a line and an exit status."""
    parser = argparse.ArgumentParser(prog="resnet.py", description=(__doc__ or "").split("\n")[0])
    add = partial(parser.add_argument, metavar="N", help="(%(default)s)")
    add("--width", type=within(2), default=16, help="of the first stage (%(default)s)")
    add("--blocks", type=within(1), default=3, help="in each stage (%(default)s)")
    add(
        "--level", type=within(0, 100, float), default=50.0, help="percent of the units pruned (50)"
    )
    add("--epochs", type=within(2), default=5, help="half of them dense, rounded down (5)")
    add("--examples", type=within(2), help="training images in an epoch, drawn anew (all)")
    add("--batch-size", type=within(2), default=128)
    add("--learning-rate", type=within(1e-9, kind=float), default=1e-3, help="Adam's, at first")
    add("--seeds", type=within(0, 2**32), default=[0, 1], nargs="+")
    add("--dataset", default="fashion_mnist", metavar="NAME")
    add("--run-dir", default=Path("runs/resnet"), metavar="DIR", type=Path)
    add("--out", default=Path("figures/resnet.json"), metavar="FILE", type=Path)
    try:
        run(parser.parse_args(argv))
    except KeyboardInterrupt:
        parser.exit(130, "resnet.py: stopped; the same command goes on\n")
    except (ArithmeticError, ValueError, OSError, RuntimeError) as error:
        parser.exit(1 if isinstance(error, ArithmeticError) else 2, f"resnet.py: {error}\n")


if __name__ == "__main__":
    main()
