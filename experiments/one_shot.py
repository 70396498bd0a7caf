"""Prune trained networks at every level by every method, without training them further.

Usage: python experiments/one_shot.py --preset quick
"""

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

import tyro

from experiments.sweep import progress_display, stop
from jaxprune.config import LEVELS, Study

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"seeds": 1, "epochs": 2, "images": 4000, "levels": (0.0, 80.0, 95.0)},
    "full": {"seeds": 3, "epochs": 6, "images": 30000, "levels": LEVELS},
}
METHODS = {
    "weight": (
        "magnitude", "random", "synflow", "saliency", "snip", "grasp", "fisher", "wanda", "ria",
        "obs", "alps", "magnitude+refit", "wanda+refit", "obs+refit",
    ),
    "unit": (
        "magnitude", "random", "saliency", "fisher", "reconstruction", "magnitude+refit",
        "reconstruction+refit",
    ),
}  # fmt: skip


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
    """Sparsities to prune to, in percent of the prunable weights, or of the units."""

    seeds: int = 1
    """Number of trained networks, seeds 0 to N-1."""

    epochs: int = 2
    """Epochs of training of the dense networks."""

    batch_size: int = 128
    """Examples in a training batch."""

    learning_rate: float = 1e-3
    """Adam's step size."""

    granularities: tuple[str, ...] = ("weight", "unit")
    """What is pruned as one."""

    methods: tuple[str, ...] = ()
    """Criteria, my_module:my_scores, obs, alps, reconstruction, each with +refit; default: all."""

    images: int = 8000
    """Training examples that layers are fitted to."""

    score_batch: int = 1000
    """Training examples that criteria look at."""

    checkpoint: Path | None = None
    """A run directory of experiments/sweep.py, whose dense networks are taken; else one is made."""

    run_dir: Path | None = None
    """Folder of the run; given again, it goes on there. Default: runs/one_shot-<data>-<preset>."""


def main() -> None:
    """Read the flags, run what is missing, and turn what goes wrong into a line."""
    chosen = next((name for name in PRESETS if name in sys.argv), "quick")
    default = dataclasses.replace(Flags(), preset=chosen, **PRESETS[chosen])  # pyright: ignore
    flags = tyro.cli(Flags, default=default, description=__doc__)
    try:
        run(flags)
    except (ValueError, OSError) as error:
        stop(2, str(error))


def run(flags: Flags) -> None:
    """Train or load the dense networks, prune them by every method, and report."""
    import optax

    import jaxprune as jp
    from jaxprune import data, networks, results

    folder = (
        flags.run_dir or Path("runs") / f"one_shot-{flags.dataset.replace(':', '-')}-{flags.preset}"
    )
    loaded = data.load(flags.dataset, context=flags.context)
    example = networks.Example(loaded.train.x[:2], data.outputs_of(loaded))
    options = {"hidden_sizes": flags.hidden_sizes} if flags.network == "mlp" else {}
    network = networks.resolve(flags.network)(example, **options)
    study = Study(levels=(0,), seeds=flags.seeds, epochs=flags.epochs, protocols=("one_shot",),
                  granularities=("weight",), batch_size=flags.batch_size)  # fmt: skip
    source = flags.checkpoint or folder / "dense"
    if flags.checkpoint is None:
        with progress_display() as tell:
            optimizer = optax.adam(flags.learning_rate)
            jp.run_sweep(network, loaded, study, optimizer=optimizer, run_dir=source, report=tell)
    dense = results.load_run(source)
    rows = []
    for granularity in flags.granularities:
        for seed in range(flags.seeds):
            found = dense.network(dense.arms[0], seed, 0)
            for name in flags.methods or METHODS[granularity]:
                rows += _pruned(flags, folder, network, loaded, found, granularity, name, seed)
    report_on(flags, folder, rows, dense)


def _pruned(
    flags: Flags, folder: Path, network: Any, loaded: Any, dense: Any, granularity: str,
    name: str, seed: int,
) -> list[Any]:  # fmt: skip
    """Return the rows of a method and a seed, found in the folder or made."""
    import jax

    import jaxprune as jp
    from jaxprune import criteria, results

    corrects = name.endswith("+refit") or name in ("reconstruction", *criteria.CORRECTIONS)
    told = (flags.dataset, flags.network, flags.hidden_sizes, flags.levels, flags.epochs,
            flags.learning_rate, flags.images if corrects else flags.score_batch,
            str(flags.checkpoint))  # fmt: skip
    path = folder / "rows" / f"{granularity}-{name.replace(':', '-')}-seed{seed}.jsonl"
    start = results.first_digest(f"{granularity} {name} {told}", seed)
    log = results.read_log(path, start) if path.exists() else None
    if log is not None and len(log.rows) == len(flags.levels):
        return list(log.rows)
    apply = lambda params, x: network.apply(params, dense.state, x)  # noqa: E731
    given: Any = name
    if corrects:
        x = loaded.train.x[:2]
        chosen = (
            jp.prunable(apply, dense.params, x) if network.prunable is None else network.prunable
        )
        graph = jp.dependency_graph(apply, dense.params, x) if granularity == "unit" else None
        pieces = jp.weight(chosen) if graph is None else jp.group(graph, chosen)
        given = criteria.method(name, granularity=pieces, graph=graph)
    study = Study(levels=flags.levels, criteria=(given,), granularities=(granularity,),
                  score_batch=flags.images if corrects else flags.score_batch)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = jp.prune_curve(network, dense.params, loaded, study, state=dense.state, seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    results.append_rows(path, rows, start)
    metric = next(iter(rows[0].metrics))
    shown = ", ".join(f"{100 * r.target_sparsity:g}%: {r.metrics[metric]:.4g}" for r in rows)
    print(f"{granularity} {name} seed {seed}: {metric} {shown}", flush=True)
    jax.clear_caches()
    return rows


def report_on(flags: Flags, folder: Path, rows: list[Any], dense: Any) -> None:
    """Print a table, and write figures, a CSV file and report.html."""
    from jaxprune import figures, report, results

    drawn = {}
    tables = [table_of(rows, dense.metrics, granularity) for granularity in flags.granularities]
    print("\n" + "\n\n".join(map(results.text, tables)))
    note = figures.describe({"dataset": flags.dataset, "network": flags.network})
    for granularity in flags.granularities:
        name, fig = (
            f"one-shot-{granularity}",
            figures.k_sparsity(rows, dense.metrics, granularity, note=note),
        )
        drawn |= {name: fig} if fig is not None else {}
    figures.save_figures(drawn, folder / "figures")
    results.write_csv(folder / "results.csv", rows)
    words = ", ".join(
        f"{field.name} {getattr(flags, field.name)}" for field in dataclasses.fields(flags)
    )
    report.write_html(
        "One-shot pruning", [report.Section("Results", (words,), tables, drawn)],
        folder / "report.html",
    )  # fmt: skip
    print(f"report.html, results.csv and figures are in {folder}")


def table_of(rows: list[Any], metrics: Any, granularity: str) -> Any:
    """Return a line a method and a column a level: the first metric, and seconds."""
    from jaxprune import results

    metric = results.drawn_metrics(metrics)[0]
    own = [row for row in rows if row.granularity == granularity]
    levels = sorted({row.target_sparsity for row in own})
    scale, lines = (100 if metric.unit == "%" else 1), []
    for name in dict.fromkeys(row.criterion for row in own):
        here = [row for row in own if row.criterion == name]
        cells = []
        for level in levels:
            values = [
                scale * row.metrics[metric.name] for row in here if row.target_sparsity == level
            ]
            mean, half = results.mean_interval(values)
            cells.append(f"{mean:.1f}" if half is None else f"{mean:.1f} ± {half:.1f}")
        seeds = len({row.seed for row in here})
        seconds = sum(row.mask_seconds for row in here) / seeds
        lines.append([name, *cells, f"{seconds:.1f}"])
    columns = [("", "method"), *(("", f"{100 * level:g}%") for level in levels), ("", "seconds")]
    title = f"{granularity}: {metric.label}, {metric.unit}; mean ± 95% interval over seeds"
    return results.Table(title, columns, lines)


if __name__ == "__main__":
    main()
