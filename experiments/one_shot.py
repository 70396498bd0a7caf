"""Prune trained networks at every level by every method, without training them further.

Usage: python experiments/one_shot.py --preset quick
"""

import dataclasses
import functools
import itertools
import json
import re
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from experiments.sweep import progress_display, stop
from jaxprune.config import LEVELS, Study, levels_of

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"seeds": 1, "epochs": 2, "images": 4000, "levels": (0.0, 80.0, 95.0)},
    "full": {"seeds": 3, "epochs": 6, "images": 55000, "levels": LEVELS},
}
OF_WEIGHTS = (
    "magnitude", "random", "synflow*100", "saliency", "grasp", "fisher", "wanda", "ria", "obs",
    "alps", "fisher_obs", "magnitude+refit", "wanda+refit",
)  # fmt: skip
OF_UNITS = (
    "magnitude", "l1", "random", "saliency", "taylor2", "activation", "reconstruction",
    "magnitude+refit", "reconstruction+refit",
)  # fmt: skip
OF_WINDOWS = ("magnitude", "random", "wanda", "ria", "obs", "alps", "magnitude+refit")


@dataclasses.dataclass(frozen=True)
class Flags:
    """What to compare, on what."""

    preset: Literal["quick", "full"] = "quick"
    """quick: one seed, three levels, minutes. full: three seeds, all levels."""

    dataset: str = "fashion_mnist"
    """As of experiments/sweep.py."""

    network: str = "mlp"
    """As of experiments/sweep.py."""

    hidden_sizes: tuple[int, ...] = (1000, 1000, 500, 200)
    """Units of the hidden layers of the mlp."""

    context: int = 128
    """Tokens in a window of a text."""

    levels: tuple[float, ...] = LEVELS
    """Sparsities to prune to, in percent; a granularity such as 2:4 has its own."""

    seeds: int = 1
    """Number of trained networks, seeds 0 to N-1."""

    epochs: int = 2
    """Epochs of training of the dense networks."""

    batch_size: int = 128
    """Examples in a training batch."""

    learning_rate: float = 1e-3
    """Adam's step size."""

    granularities: tuple[str, ...] = ("weight", "unit")
    """What is pruned as one: weight, unit, row, block4x4, 2:4."""

    scopes: tuple[str, ...] = ("layer",)
    """How a sparsity is shared out among layers: layer, global, erk, owl, by_loss, my_module:f."""

    criteria: tuple[str, ...] = ()
    """Criteria, my_module:f, obs, alps, fisher_obs, reconstruction, each with *10, +refit; all."""

    images: int = 8000
    """Training examples that layers are fitted to, or windows of a text."""

    score_batch: int = 1000
    """Training examples that criteria look at."""

    recalibrate: int = 0
    """Training batches that re-estimate BatchNorm's statistics; the methods re-estimate none."""

    checkpoint: Path | None = None
    """A run directory of experiments/sweep.py, whose dense networks are taken; else one is made."""

    params: Path | None = None
    """A .safetensors file of one network's parameters, by path; nothing is trained."""

    run_dir: Path | None = None
    """Folder of the run; given again, it goes on there. Default: runs/one_shot-<data>-<preset>."""

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        name = f"one_shot-{self.dataset}-{self.network}-{self.preset}"
        return self.run_dir or Path("runs") / re.sub(r"[^\w.-]", "-", name)


def main() -> None:
    """Read the flags, run what is missing, and turn what goes wrong into a line."""
    chosen = next((name for name in PRESETS if name in sys.argv), "quick")
    default = dataclasses.replace(Flags(), preset=chosen, **PRESETS[chosen])  # pyright: ignore
    flags = tyro.cli(Flags, default=default, description=__doc__)
    try:
        run(flags)
    except (ValueError, TypeError, OSError) as error:
        stop(2, str(error))
    except ArithmeticError as error:
        stop(1, str(error))


def methods_of(flags: Flags, granularity: str) -> tuple[str, ...]:
    """Return the methods of a granularity."""
    if flags.criteria:
        return flags.criteria
    if granularity == "unit":
        return OF_UNITS
    if ":" in granularity:
        return OF_WINDOWS
    return OF_WEIGHTS if granularity == "weight" else OF_WEIGHTS[:8]


def run(flags: Flags) -> None:
    """Train or load the dense networks, prune them by every method, and report."""
    from experiments import one_shot_page
    from jaxprune import data, networks

    loaded = data.load(flags.dataset, context=flags.context)
    example = networks.Example(loaded.train.x[:2], data.outputs_of(loaded))
    options = {"hidden_sizes": flags.hidden_sizes} if flags.network == "mlp" else {}
    network = networks.resolve(flags.network)(example, **options)
    _check(flags, network, loaded)
    dense = _dense(flags, network, loaded)
    rows, facts = [], []
    seeds = range(1 if flags.params else flags.seeds)
    for granularity, seed in itertools.product(flags.granularities, seeds):
        params, state = dense(seed)
        start = Start(seed, granularity, network, params, state, loaded)
        for name, scope in itertools.product(methods_of(flags, granularity), flags.scopes):
            more, fact = _pruned(flags, start, name, scope)
            rows += more
            facts.append(fact)
    one_shot_page.write(flags, flags.folder, rows, facts, _metrics(network, loaded))


def _metrics(network: Any, loaded: Any) -> Any:
    import jax

    from jaxprune import tasks

    params, state = jax.eval_shape(network.init, jax.random.key(0))
    outputs = jax.eval_shape(network.apply, params, state, loaded.train.x[:2])
    return tasks.default_task(loaded.train.y).metrics(outputs)


def _dense(flags: Flags, network: Any, loaded: Any) -> Any:
    """Return a function from a seed to parameters and state of the network to prune."""
    import optax

    import jaxprune as jp
    from jaxprune import results

    if flags.params is not None:
        given = _from_file(flags.params, network)
        return lambda seed: given
    study = Study(levels=(0,), seeds=flags.seeds, epochs=flags.epochs, protocols=("one_shot",),
                  granularities=("weight",), batch_size=flags.batch_size)  # fmt: skip
    source = flags.checkpoint or flags.folder / "dense"
    if flags.checkpoint is None:
        with progress_display() as tell:
            optimizer = optax.adam(flags.learning_rate)
            jp.run_sweep(network, loaded, study, optimizer=optimizer, run_dir=source, report=tell)
    found = results.load_run(source)

    def one(seed: int) -> Any:
        loaded = found.network(found.arms[0], seed, 0)
        return loaded.params, loaded.state

    return one


def _from_file(path: Path, network: Any) -> Any:
    """Return parameters and state of a network, from a file of arrays by path."""
    import jax
    from safetensors.numpy import load_file

    from jaxprune import trees

    arrays = {name.replace(".", "/"): array for name, array in load_file(path).items()}
    params, state = network.init(jax.random.key(0))
    wanted = {name: leaf.shape for name, leaf in trees.paths_and_leaves(params)}
    for name, shape in wanted.items():
        if name not in arrays or arrays[name].shape != shape:
            there = f"shape {arrays[name].shape}" if name in arrays else "nothing of that name"
            raise ValueError(f"{path}: {name} of shape {shape} is wanted, and it has {there}")
    if others := arrays.keys() - wanted.keys():
        raise ValueError(f"{path} has {min(others)}, which the network has not")
    return jax.tree.unflatten(jax.tree.structure(params), [arrays[name] for name in wanted]), state


class Start:
    """A dense network, and what is read off it once for all methods."""

    def __init__(
        self, seed: int, granularity: str, network: Any, params: Any, state: Any, loaded: Any
    ) -> None:
        """Keep all of it."""
        self.seed, self.granularity, self.loaded = seed, granularity, loaded
        self.network, self.params, self.state = network, params, state
        self.apply = lambda params, x: network.apply(params, state, x)

    @functools.cached_property
    def pieces(self) -> tuple[Any, Any]:
        """What is pruned as one, and of units the dependency graph."""
        import jaxprune as jp
        from jaxprune import granularity, structure

        of = self.apply, self.params, self.loaded.train.x[:2]
        chosen = jp.prunable(*of) if self.network.prunable is None else self.network.prunable
        if self.granularity == "unit":
            graph = jp.dependency_graph(*of)
            return jp.group(graph, chosen), graph
        return granularity.named(self.granularity, chosen, structure.layers(*of)), None

    def method(self, name: str) -> Any:
        """Return what a study takes as a criterion for a method."""
        from jaxprune import criteria

        special = name in criteria.CORRECTIONS or name in criteria.OF_UNITS
        if re.fullmatch(r"[^+*]+", name) and not special:
            return name
        pieces, graph = self.pieces
        return criteria.method(name, granularity=pieces, graph=graph)


def _study(flags: Flags, start: Start, names: Sequence[str], scopes: Sequence[str]) -> Study:
    fitted = {"obs", "alps", "reconstruction", "activation"}  # to as many images as layers are
    images = any("+" in name or name in fitted for name in names)
    return Study(
        levels=levels_of(start.granularity) or flags.levels,
        criteria=tuple(map(start.method, names)),
        granularities=(start.granularity,),
        scopes=tuple(scopes),
        protocols=("one_shot",),
        recalibrate=flags.recalibrate,
        score_batch=flags.images if images else flags.score_batch,
    )


def _check(flags: Flags, network: Any, loaded: Any) -> None:
    """Raise what is wrong with methods, scopes and granularities before anything is trained."""
    import jax

    from jaxprune.study import setup

    params, state = network.init(jax.random.key(0))
    for granularity in flags.granularities:
        start = Start(0, granularity, network, params, state, loaded)
        study = _study(flags, start, methods_of(flags, granularity), flags.scopes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            setup.make_setup(network, loaded, study, None, None, params, state)


def _pruned(flags: Flags, start: Start, name: str, scope: str) -> tuple[list[Any], dict[str, Any]]:
    """Return the rows and facts of a method and a seed, found in the folder or made."""
    import jax

    import jaxprune as jp
    from jaxprune import results, trees
    from jaxprune.criteria import layer_errors
    from jaxprune.identity import digest
    from jaxprune.masks import apply_masks

    params, state, seed, loaded = start.params, start.state, start.seed, start.loaded
    study = _study(flags, start, (name,), (scope,))
    arm = f"{start.granularity} {scope} {name}"
    path = flags.folder / "rows" / f"{re.sub(r'[^a-zA-Z0-9_.+-]', '-', arm)}-seed{seed}.jsonl"
    of = digest((params, state)), study.levels, study.score_batch, study.recalibrate
    first = results.first_digest(f"{arm} {flags.dataset} {flags.network} {of}", seed)
    log = results.read_log(path, first) if path.exists() else None
    beside = path.with_suffix(".json")
    if log is not None and len(log.rows) == len(study.levels) and beside.exists():
        return list(log.rows), json.loads(beside.read_text())
    kept: dict[str, Any] = {}
    peak = Peak()
    with peak, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = jp.prune_curve(
            start.network, params, loaded, study, state=state, seed=seed,
            keep=lambda _, params, masks: kept.update(params=params, masks=masks),
        )  # fmt: skip
    paths = trees.paths_and_leaves(kept["masks"])
    masked = jax.vmap(apply_masks, (None, 0))(params, kept["masks"])
    batches = [loaded.train.x[:1000]]
    facts = {
        "granularity": start.granularity, "scope": scope, "method": name, "seed": seed,
        "levels": [level for level in study.levels if level],
        "sparsity": {
            path: [float(1 - one.mean()) for one in mask] for path, mask in paths if not mask.all()
        },
        "error": layer_errors(start.apply, params, kept["params"], batches),
        "masked_error": layer_errors(start.apply, params, masked, batches),
        "peak_bytes": peak.bytes, "name": rows[0].criterion,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    results.append_rows(path, rows, first)
    beside.write_text(json.dumps(facts) + "\n")
    metric = next(iter(rows[0].metrics))
    shown = ", ".join(f"{100 * r.target_sparsity:g}%: {r.metrics[metric]:.4g}" for r in rows)
    print(f"{arm} seed {seed}: {metric} {shown}", flush=True)
    jax.clear_caches()
    return rows, facts


class Peak:
    """Measures how much memory the process takes at most, beyond what it had; Linux only."""

    def __enter__(self) -> "Peak":
        """Begin, in a thread that looks every 20 ms."""
        self._first, self._most, self._stop = self._now(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """End."""
        self._stop.set()
        self._thread.join()

    @property
    def bytes(self) -> int | None:
        """What was measured; None where it cannot be."""
        return None if self._first is None else max(self._most - self._first, 0)

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._most = max(self._most, self._now() or 0)
            time.sleep(0.02)

    def _now(self) -> int | None:
        try:
            line = Path("/proc/self/statm").read_text()
        except OSError:
            return None
        return int(line.split()[1]) * 4096


if __name__ == "__main__":
    main()
