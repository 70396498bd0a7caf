"""Measure what pruned networks cost: milliseconds, bytes, memory and multiply-adds.

    python experiments/inference_speed.py runs/fashion_mnist-quick --torch .venv-torch/bin/python

On the networks that a run has trained with their masks; `make sweep` makes one. `compile_sparse`
compiles each for every batch size, timed in turns with the same network dense under XLA and NumPy,
and beside PyTorch, dense and CSR. The faster of XLA and NumPy is what dense means. Files are those
of `save_sparse`, read back and scored.
"""

import argparse
import contextlib
import gzip
import io
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark import CORES, Ask, clock, cpu_name, matmul, torch_worker
from experiments.results_page import files_section, inference_section
from jaxprune import compile_sparse, data, load_run, load_sparse, networks, save_sparse
from jaxprune.evaluate import evaluate_levels
from jaxprune.masks import apply_masks
from jaxprune.report import text
from jaxprune.results import Run
from jaxprune.sparse import Values, lossless_bound

BATCHES = (1, 32, 256, 2048)
QUICK_LEVELS = (0, 50, 80, 90, 95, 99)
CALLS = 35  # of a measurement, fewer where they take longer than
SECONDS = 2.0
BURST = 7


class Pruned(NamedTuple):
    """A network of a run: parameters that are zero where they are masked, and its masks."""

    granularity: str
    level: float
    seed: int
    params: Any
    masks: Any


def trained(run: Run, seeds: Sequence[int], levels: Sequence[float]) -> Iterator[Pruned]:
    """Yield the networks trained with their masks."""
    arms = [arm for arm in run.arms if (arm[0], *arm[2:]) == ("magnitude", "layer", "trained")]
    if not arms or run.config["settings"].get("network", "mlp") != "mlp":
        raise ValueError(f"{run.path} has no mlp trained with the masks of magnitude, by layer")
    for arm, level, seed in itertools.product(arms, levels, seeds):
        params, _, masks = run.network(arm, seed, level)
        yield Pruned(arm.granularity, level, seed, apply_masks(params, masks), masks)


def kernels_of(params: Any) -> list[np.ndarray]:
    """Return the kernels of the layers, first to last; they have no biases."""
    names = [f"hidden_{i}" for i in range(len(params) - 1)] + ["logits"]
    return [np.asarray(params[name]["kernel"]) for name in names]


def in_turns(functions: Sequence[Callable[[], Any]]) -> list[list[float]]:
    """Time functions, at least five calls each, after one that is not timed.

    A burst of calls of one, then of the next: each finds the caches as it left them. A pause comes
    before the first, since the threads of the last, which is NumPy, go on spinning for a while.
    """
    for f in functions:
        f()
    seconds: list[list[float]] = [[] for _ in functions]
    started = time.perf_counter()
    while len(seconds[0]) < CALLS and (
        len(seconds[0]) < 5 or time.perf_counter() - started < SECONDS * len(functions)
    ):
        time.sleep(0.1)
        for f, found in zip(functions, seconds, strict=True):
            for _ in range(BURST):
                begin = time.perf_counter()
                f()
                found.append(time.perf_counter() - begin)
    return seconds


def measure_speed(
    pruned: Pruned, apply: Any, images: np.ndarray, ask: Ask | None, batches: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Yield a row a batch size."""
    kernels = kernels_of(pruned.params)
    dense = jax.jit(apply)
    params = jax.tree.map(jnp.asarray, pruned.params)
    weights = sum(kernel.size for kernel in kernels)
    kept = sum(int(np.count_nonzero(kernel)) for kernel in kernels)
    for batch in batches:
        x = jnp.asarray(np.resize(images, (batch, images.shape[1])))
        on_host = np.array(x)
        started = time.perf_counter()
        fast = compile_sparse(apply, pruned.params, pruned.masks, x)
        compiling = time.perf_counter() - started
        found, expected = np.asarray(fast(x)), np.asarray(dense(params, x))
        if np.max(np.abs(found - expected)) > 1e-5 * np.max(np.abs(expected)):
            raise ArithmeticError(
                f"{pruned.granularity} {pruned.level:g}%, batch {batch}: it differs"
            )

        def by_numpy(rows: np.ndarray = on_host) -> np.ndarray:
            for kernel in kernels[:-1]:
                rows = np.maximum(rows @ kernel, 0)
            return rows @ kernels[-1]

        functions = {
            "xla": lambda x=x: dense(params, x).block_until_ready(),
            "ours": lambda x=x, fast=fast: fast(x).block_until_ready(),
            "numpy": by_numpy,
        }
        seconds = dict(zip(functions, in_turns([*functions.values()]), strict=True))
        if ask:
            for name in ("torch", "torch_csr"):
                with tempfile.TemporaryDirectory() as folder:
                    arrays: dict[str, Any] = {f"kernel_{i}": k for i, k in enumerate(kernels)}
                    np.savez(f"{folder}/network.npz", x=on_host, **arrays)
                    answer = ask("infer", path=f"{folder}/network.npz", csr=name == "torch_csr",
                                 calls=CALLS, limit=SECONDS)  # fmt: skip
                if np.max(np.abs(answer["first"] - expected[0])) > 1e-4 * np.max(np.abs(expected)):
                    raise ArithmeticError("PyTorch has another network")
                seconds[name] = answer["seconds"]
        faster = min(("xla", "numpy"), key=lambda name: median(seconds[name]))
        report = fast.report(x)
        yield {
            "granularity": pruned.granularity, "level": pruned.level, "seed": pruned.seed,
            "batch": batch, "seconds": seconds, "than": faster,
            "ratios": [a / b for a, b in zip(seconds[faster], seconds["ours"], strict=True)],
            "dense": weights, "kept": kept, "executed": report.multiply_adds // batch,
            "sparse": report.sparse, "products": report.products,
            "bytes": report.bytes, "dense_bytes": dense_bytes(dense, params, x),
            "compiling": compiling,
        }  # fmt: skip


def dense_bytes(dense: Any, params: Any, x: Any) -> int:
    """Return the bytes that the dense network needs at its peak: weights, inputs and buffers."""
    found = dense.lower(params, x).compile().memory_analysis()
    return int(found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes)


def measure_files(
    pruned: Pruned, every: Sequence[Values], folder: Path
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield a row and the network read back, for every way to store values."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(pruned.params)]
    kept = [np.asarray(mask) for mask in jax.tree.leaves(pruned.masks)]
    arrays = io.BytesIO()
    np.savez_compressed(arrays, *leaves)
    count = sum(int(mask.sum()) for mask in kept)
    size = sum(leaf.nbytes for leaf in leaves)
    others = {
        "dense": size,
        "bound": lossless_bound(pruned.masks),
        "bitmap": sum(-(-mask.size // 8) for mask in kept) + 4 * count,
        "csr": 8 * count + sum(4 * (len(leaf) + 1) for leaf in leaves),
        "npz": len(arrays.getvalue()),
        "gzip": len(gzip.compress(b"".join(leaf.tobytes() for leaf in leaves), 6)),
    }
    for values in every:
        path = folder / f"{values}.safetensors"
        save = partial(save_sparse, path, pruned.params, pruned.masks, values=values)
        # Twice, since the first call loads what it needs.
        saving = min(clock(save)[1] for _ in range(2))
        ((params, masks), first), (_, second) = (clock(load_sparse, path) for _ in range(2))
        if not all(map(np.array_equal, jax.tree.leaves(masks), kept)):
            raise ArithmeticError("the masks read back are others")
        if values == "float32" and not all(map(np.array_equal, jax.tree.leaves(params), leaves)):
            raise ArithmeticError("the weights read back are others")
        yield {
            "granularity": pruned.granularity, "level": pruned.level, "seed": pruned.seed,
            "values": values, "bytes": path.stat().st_size, "saving": saving,
            "loading": min(first, second), **others,
        }, params  # fmt: skip


def files(
    run: Run, apply: Any, loaded: data.Data, seeds: Sequence[int], levels: Sequence[float],
    every: Sequence[Values],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return the rows of all files, with the accuracy of what is read back."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for pruned in trained(run, seeds, levels):
            if pruned.granularity == "weight":
                here, read = zip(*measure_files(pruned, every, Path(folder)), strict=True)
                stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *read)
                whole = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), stacked)
                scores, _ = evaluate_levels(apply, stacked, whole, loaded)
                accuracies = zip(here, scores["accuracy"], strict=True)
                rows += [row | {"accuracy": float(accuracy)} for row, accuracy in accuracies]
    return rows


def measure(
    run: Run, others: Sequence[Run], loaded: data.Data, python: str | None, *, quick: bool,
    levels: Sequence[float] | None,
) -> dict[str, Any]:  # fmt: skip
    """Measure everything, and return all numbers; of the other runs the files alone."""
    settings, recorded = run.config["settings"], sum(run.config["levels"], [])
    seeds = sorted({row.seed for row in run.rows})
    wanted = levels or (QUICK_LEVELS if quick else recorded)
    found = [level for level in recorded if level in wanted]
    if not found or not set(levels or ()) <= set(found):
        given = "--levels" if levels else "--preset quick"
        raise ValueError(
            f"{given}: {run.path} has the levels {' '.join(f'{n:g}' for n in recorded)}, "
            f"not {' '.join(f'{level:g}' for level in wanted if level not in found)}"
        )
    every: tuple[Values, ...] = ("float32", "codebook5") if quick else get_args(Values)
    images = loaded.test.x.reshape(len(loaded.test.x), -1)
    hidden = settings.get("hidden_sizes", ())  # none where `trained` raises
    _, apply = networks.mlp(images.shape[1], hidden, data.outputs_of(loaded))
    load, rate, speed = os.getloadavg()[0], matmul(), []
    rates = [rate()]
    with torch_worker(python, {}) if python else contextlib.nullcontext() as ask:
        versions = {"torch": ask("version")["torch"]} if ask else {}
        for pruned in trained(run, seeds[:1], found):
            if sys.stderr.isatty():
                print(f"{pruned.granularity} {pruned.level:g}% ...", end="\r", file=sys.stderr)
            batches = BATCHES[::2] if quick else BATCHES
            speed += measure_speed(pruned, apply, images, ask, batches)
            time.sleep(0.1)  # the threads of NumPy and PyTorch spin for a while
            rates.append(rate())
    sizes = files(run, apply, loaded, seeds[:1] if quick else seeds, found, every)
    for other in others:
        new = [level for level in sum(other.config["levels"], []) if level not in found]
        sizes += files(other, apply, loaded, seeds[:1] if quick else seeds, new, every)
    versions |= {"jax": jax.__version__, "numpy": np.__version__, "python": sys.version.split()[0]}
    sizes.sort(key=lambda row: row["level"])
    return {
        "device": f"{CORES} cores of {cpu_name()}, load {load:.1f} at the start",
        "versions": versions, "rates": rates, "settings": settings, "seed": seeds[0],
        "speed": speed, "files": sizes,
    }  # fmt: skip


def to_json(numbers: dict[str, Any]) -> str:
    """Return JSON with a line a row, and seconds to a tenth of a microsecond."""
    rounded = json.loads(json.dumps(numbers), parse_float=lambda text: round(float(text), 7))
    lines = []
    for key, value in rounded.items():
        text = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
        lines.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags, measure, and keep the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    runs = "directory of a finished run, and of others of whose levels the files are measured too"
    parser.add_argument("run", type=Path, nargs="+", metavar="RUN", help=runs)
    quick = "quick: fewer levels, two batch sizes, one seed (%(default)s)"
    parser.add_argument("--preset", choices=("quick", "full"), default="full", help=quick)
    parser.add_argument("--levels", type=float, nargs="+", help="of the run's, in percent")
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter with torch and numpy")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where to keep all numbers")
    args = parser.parse_args(argv)
    if args.out and not args.out.parent.is_dir():
        parser.error("the folder of --out must exist")
    try:
        run, *others = map(load_run, args.run)
        loaded = data.load(run.config["settings"]["dataset"])
        quick = args.preset == "quick"
        numbers = measure(run, others, loaded, args.torch, quick=quick, levels=args.levels)
        for section in (inference_section(numbers, {}), files_section(numbers, {})):
            print(f"{text(section)}\n")
        if args.torch is None:
            print("PyTorch was not measured; `make inference` does, or --torch PYTHON that has it")
        if args.out:
            args.out.write_text(to_json({"command": sys.argv, **numbers}))
    except (OSError, ValueError, ArithmeticError, RuntimeError) as error:
        parser.exit(2, f"inference_speed.py: {error}\n")


if __name__ == "__main__":
    main()
