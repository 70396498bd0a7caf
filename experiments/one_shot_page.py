"""Tables, figures and the page of one-shot pruning, from its rows and facts."""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jaxprune import files, report, results
from jaxprune.figures import describe, k_sparsity, save_figures
from jaxprune.figures.methods import against_seconds, layer_sparsities
from jaxprune.types import Metric

DRAWN = 7  # methods in a figure, as many as colours: magnitude and the best, at the middle level


def write(flags: Any, folder: Path, rows: list[Any], facts: list[dict], metrics: Any) -> None:
    """Print a table, and write figures, a CSV file, the facts, and report.html."""
    import jax

    settings = {field.name: getattr(flags, field.name) for field in dataclasses.fields(flags)}
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items() if v is not None}
    device = f"{os.cpu_count()} cores ({jax.devices()[0].device_kind}), jax {jax.__version__}"
    made = {"command": sys.argv, "device": device, "settings": plain}
    part = section("Results", made, rows, facts, metrics)
    print("\n" + "\n\n".join(map(results.text, part.tables)))
    save_figures(part.figures, folder / "figures")
    results.write_csv(folder / "results.csv", rows)
    named = [metric._asdict() for metric in metrics]
    files.write(
        folder / "one_shot.json",
        json.dumps({**made, "metrics": named, "facts": facts}) + "\n",
    )
    report.write_html("One-shot pruning", [part], folder / "report.html")
    print(f"report.html, results.csv and figures are in {folder}")


def sections(folder: Path) -> list[report.Section]:
    """Return the parts of a page on the runs that lie in folders of a folder."""
    found = []
    for path in sorted(folder.glob("*/one_shot.json")):
        told = json.loads(path.read_text())
        metrics = [Metric(**metric) for metric in told["metrics"]]
        rows, name = results.read_csv(path.with_name("results.csv")), path.parent.name
        part = section(f"One-shot: {name}", told, rows, told["facts"], metrics, f"one-shot-{name}")
        found.append(part)
    return found


def section(
    heading: str, made: dict[str, Any], rows: Sequence[Any], facts: list[dict], metrics: Any,
    prefix: str = "one-shot",
) -> report.Section:  # fmt: skip
    """Return the part of a page that tells of a run."""
    drawn: dict[str, Any] = {}
    kinds = dict.fromkeys((row.granularity, row.scope) for row in rows)
    settings = made["settings"]
    note, metric = describe(settings), results.drawn_metrics(metrics)[0]
    for granularity in dict.fromkeys(kind for kind, _ in kinds):
        here = best(rows, granularity, metric)
        if len({row.target_sparsity for row in here}) > 2:
            name = granularity.replace(":", "-")
            drawn[f"{prefix}-{name}"] = k_sparsity(here, metrics, granularity, note=note)
            drawn[f"{prefix}-{name}-seconds"] = against_seconds(here, metric, note=note)
    if (fig := layer_sparsities(facts, note=note)) is not None:
        drawn[f"{prefix}-layers"] = fig
    tables = [table_of(rows, facts, metric, *kind) for kind in kinds]
    tables += [table for kind in kinds if (table := errors_of(facts, *kind)) is not None]
    words = (
        f"{settings['network']}, {settings['dataset']}, {settings['epochs']} epochs, seeds 0 to "
        f"{settings['seeds'] - 1}; layers fitted to {settings['images']:,} training examples, "
        f"criteria on {settings['score_batch']:,}; {made['device']}; "
        f"`{' '.join(made['command'])}`."
    )
    found = {name: fig for name, fig in drawn.items() if fig is not None}
    return report.Section(heading, (words,), tables, found)


def best(rows: Sequence[Any], granularity: str, metric: Any) -> list[Any]:
    """Return the rows of the methods to draw."""
    own = [row for row in rows if row.granularity == granularity]
    levels = sorted({row.target_sparsity for row in own if row.target_sparsity})
    if not levels:
        return own
    middle = levels[len(levels) // 2]

    def worth(arm: Any) -> float:
        values = [row.metrics[metric.name] for row in own
                  if row.arm == arm and row.target_sparsity == middle]  # fmt: skip
        found = fmean(value for value in values if value is not None)
        return found if metric.better == "lower" else -found

    arms = sorted(dict.fromkeys(row.arm for row in own), key=worth)
    first = [arm for arm in arms if arm.criterion == "magnitude"]
    chosen = [*first, *(arm for arm in arms if arm not in first)][:DRAWN]
    return [row for row in own if row.arm in chosen]


def table_of(
    rows: Sequence[Any], facts: list[dict], metric: Any, granularity: str, scope: str
) -> results.Table:
    """Return a line a method and a column a level: the metric, seconds and memory."""
    own = [row for row in rows if (row.granularity, row.scope) == (granularity, scope)]
    levels = sorted({row.target_sparsity for row in own})
    names = list(dict.fromkeys(row.criterion for row in own))
    seeds = {row.seed for row in own}
    lines = []
    for name in names:
        here = [row for row in own if row.criterion == name]
        seconds = sum(row.mask_seconds for row in here) / len({row.seed for row in here})
        peaks = [fact["peak_bytes"] for fact in facts
                 if (fact["granularity"], fact["scope"], fact["name"]) == (granularity, scope, name)
                 and fact["peak_bytes"] is not None]  # fmt: skip
        memory = f"{max(peaks) / 1e9:.1f}" if peaks else "-"
        lines.append([name, *_cells(here, levels, metric), f"{seconds:.1f}", memory])
    if len(names) > 1:  # which method, validation tells, of each seed and level by itself
        chosen = [
            min((row for row in own if (row.seed, row.target_sparsity) == (seed, level)),
                key=lambda row: _or_worst(row.metrics["val_loss"]))
            for seed in seeds for level in levels
        ]  # fmt: skip
        lines.append(["lowest validation loss", *_cells(chosen, levels, metric), "", ""])
    columns = [("", "method"), *(("", f"{100 * level:g}%") for level in levels),
               ("", "s, all levels"), ("", "peak GB")]  # fmt: skip
    unit = f", {metric.unit}" if metric.unit else ""
    interval = "; mean ± 95% interval over seeds" if len(seeds) > 1 else ""
    return results.Table(f"{granularity}, {scope}: {metric.label}{unit}{interval}", columns, lines)


def _cells(rows: Sequence[Any], levels: Sequence[float], metric: Any) -> list[str]:
    """Return a cell a level."""
    places = results.decimals(rows, metric)
    return [
        results.cell([row for row in rows if row.target_sparsity == level], metric, places)
        for level in levels
    ]


def _or_worst(value: float | None) -> float:
    return float("inf") if value is None else value


def errors_of(facts: list[dict], granularity: str, scope: str) -> results.Table | None:
    """Return the relative errors of layers before and after correction, at the middle level."""
    own = [fact for fact in facts if (fact["granularity"], fact["scope"]) == (granularity, scope)
           and fact["error"] != fact["masked_error"]]  # fmt: skip
    if not own:
        return None
    middle = len(own[0]["levels"]) // 2
    paths, lines = [*own[0]["error"]], []
    for name in dict.fromkeys(fact["name"] for fact in own):
        here = [fact for fact in own if fact["name"] == name]
        cells = [
            " / ".join(
                f"{fmean(fact[key][path][middle] for fact in here):.2g}"
                for key in ("masked_error", "error")
            )
            for path in paths
        ]
        lines.append([name, *cells])
    level = own[0]["levels"][middle]
    title = f"{granularity}, {scope}: squared error of a layer's outputs over their squares at "
    title += f"{level:g}%, masked / corrected"
    return results.Table(title, [("", "method"), *(("", path) for path in paths)], lines)
