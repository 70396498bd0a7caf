"""The tables of figures/RESULTS.md, from the rows and timings beside it; none is typed by hand.

`experiments/figures.py` writes the page. What others published is here, since no file holds it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median, quantiles
from typing import Any

from jaxprune.config import Arm
from jaxprune.figures import crossover
from jaxprune.report import Section
from jaxprune.results import Run, Table, tables

# Accuracy in percent on Fashion-MNIST, one-shot, one seed each, at 0 25 50 60 70 80 90 95 97 99%.
LEVELS = (0, 25, 50, 60, 70, 80, 90, 95, 97, 99)
PUBLISHED = {
    "weight": {
        "A": (88.51, 88.60, 88.57, 88.15, 86.91, 86.26, 80.45, 59.62, 41.13, 16.09),
        "B": (89.24, 89.12, 89.00, 89.05, 88.66, 88.19, 82.15, 62.63, 35.54, 11.61),
        "G": (88.86, 88.89, 88.93, 88.76, 88.73, 87.98, 81.90, 50.02, 36.93, 16.26),
    },
    "unit": {
        "A": (88.51, 88.51, 87.62, 85.84, 81.42, 55.99, 30.21, 20.72, 12.28, 2.31),
        "B": (89.24, 89.15, 88.69, 88.19, 86.57, 55.16, 32.78, 10.65, 16.34, 9.71),
        "G": (88.86, 88.97, 89.07, 88.92, 87.53, 64.68, 44.13, 18.19, 7.24, 10.85),
    },
}
SOURCES = (
    "Published ones are one-shot, of one seed. A: justincosentino/network-pruning, `results.csv`, "
    "the epoch of lowest loss on 10,000 validation images. B: an earlier README of the same "
    "repository. G: MotiBaadror/Pruning_in_neural_net, 10 epochs of 41,000 images, accuracy on "
    "held-out training images. 'Lowest validation loss' is of the epoch chosen that way, seed by "
    "seed; all else here is of the last epoch."
)
FORMATS = {"bound": "bound: independent places, float32", "bitmap": "bitmap + float32",
           "csr": "CSR", "npz": "npz", "gzip": "gzip"}  # fmt: skip


def sections(run: Run, found: Mapping[str, Any], drawn: Mapping[str, Any]) -> list[Section]:
    """Return all of the page.

    Args:
        run: whose rows the tables are of.
        found: by name (benchmark, inference) what those files hold, if they are there.
        drawn: the figures, by name.
    """

    def some(*starts: str) -> dict[str, Any]:
        return {name: fig for name, fig in drawn.items() if name.startswith(starts)}

    last = some("k-sparsity", "weight-vs", "differences")
    results = tables(run.rows, run.metrics)
    parts = [Section("After the last epoch", [setting_line(run)], results, last)]
    arms = {Arm("magnitude", g, "layer", p) for g in PUBLISHED for p in ("one_shot", "trained")}
    levels = {round(100 * row.target_sparsity, 6) for row in run.rows}
    if arms <= set(run.arms) and levels.issuperset(LEVELS):
        parts.append(Section("Beside published accuracy", [SOURCES], [accuracy_table(run)]))
        parts.append(Section("Calibration", [], [loss_table(run)], some("calibration")))
    parts.append(Section("Epoch by epoch", [], [], some("epoch")))
    if "benchmark" in found:
        parts.append(speed_section(found["benchmark"]))
    if "inference" in found:
        parts.append(inference_section(found["inference"], some("inference")))
        parts.append(files_section(found["inference"], some("file")))
    return parts


def setting_line(run: Run) -> str:
    """Say what the tables are of."""
    config, settings = run.config, run.config["settings"]
    made = f"; {config['made_by']}" if "made_by" in config else ""
    return (
        f"{settings['dataset']}, {settings['epochs']} epochs, seeds 0 to {config['seeds'] - 1}; "
        f"{config['device']['cores']} cores ({config['device']['kind']}), jax "
        f"{config['versions']['jax']}; `{' '.join(config['command'])}`{made}."
    )


def columns(*names: str) -> list[tuple[str, str]]:
    return [("", name) for name in names]


def by_level(name: str, lines: Mapping[str, Sequence[str]], levels: Sequence[float]) -> Table:
    """Return a table with a column a level."""
    names = columns(name, *(f"{level:g}%" for level in levels))
    return Table("", names, [[label, *cells] for label, cells in lines.items()])


def cells(run: Run, granularity: str, protocol: str, name: str) -> dict[int, list[str]]:
    """Return a metric as tables have it, and the weights left, by level in percent."""
    rows = [row for row in run.rows if (row.granularity, row.protocol) == (granularity, protocol)]
    (table,) = tables(rows, [metric for metric in run.metrics if metric.name == name])
    return {int(level): line for level, *line in table.lines if float(level) in LEVELS}


def accuracy_table(run: Run) -> Table:
    """Return accuracy in percent beside the published ones."""
    dense = [row for row in run.rows if row.protocol == "one_shot" and row.target_sparsity == 0]
    best = {row.seed: row for row in sorted(dense, key=lambda row: -row.metrics["val_loss"])}
    rows = [replace(row, epoch=0) for row in run.rows if row.epoch == best[row.seed].epoch]
    chosen, lines = replace(run, rows=rows), {}
    for granularity, answers in PUBLISHED.items():
        for name, of, protocol in (
            ("one-shot", run, "one_shot"),
            ("trained", run, "trained"),
            ("one-shot, lowest validation loss", chosen, "one_shot"),
        ):
            found = cells(of, granularity, protocol, "accuracy").values()
            lines[f"{granularity}, {name}"] = [line[0] for line in found]
        for name, given in answers.items():
            lines[f"{granularity}, published {name}"] = [f"{value:.2f}" for value in given]
    return by_level("test accuracy, %", lines, LEVELS)


def loss_table(run: Run) -> Table:
    """Return one-shot accuracy beside loss, calibration and churn: which of them moves first."""
    names = ("accuracy", "loss", "scaled_loss", "signed_ece", "churn", "worst_class_accuracy")
    lines = {
        f"{metric.label}, {metric.unit}": [
            line[0] for line in cells(run, "weight", "one_shot", metric.name).values()
        ]
        for metric in run.metrics if metric.name in names
    }  # fmt: skip
    return by_level("weight, one-shot", lines, LEVELS)


def speed_section(timed: dict) -> Section:
    """Return the benchmark's medians."""
    rates, lines = [rate for row in timed["rows"] for rate in row["rates"]], []
    for row in timed["rows"]:
        _, limit, unit = row["goal"].split()
        scale, digits = (100, 0) if unit == "%" else (1, 1 if float(limit) > 10 else 2)
        beside = ratio = "–"
        if row["ratios"]:
            low, middle, high = (
                f"{scale * f(row['ratios']):.{digits}f}" for f in (min, median, max)
            )
            beside, ratio = (
                f"{row['other']} {seconds(row['theirs'])}",
                f"{middle} ({low}–{high}) {unit}",
            )
        lines.append([row["name"], seconds(row["seconds"]), beside, ratio, row["goal"]])
    busy = " The machine was not idle: provisional." if min(rates) < 0.8 * max(rates) else ""
    note = f"{machine(timed, rates)}. `make benchmark` measures this.{busy}"
    names = columns("", "jaxprune", "beside", "ratio, median (range)", "goal")
    return Section("Speed", [note], [Table("", names, lines)])


def gflops(row: Mapping[str, Any]) -> float:
    """Return the GFLOP/s of the kept multiply-adds, by the median."""
    return 2 * row["kept"] * row["batch"] / median(row["seconds"]["ours"]) / 1e9


def coding_rate(rows: Sequence[Mapping[str, Any]], field: str) -> float:
    """Return the MB of dense weights a second of `saving` or `loading`, the median of files."""
    return median(row["dense"] / row[field] for row in rows) / 1e6


def by_weight(found: dict, batch: int) -> dict[float, dict[str, Any]]:
    """Return the rows of weight-pruned networks at a batch size, by level."""
    rows = [r for r in found["speed"] if (r["granularity"], r["batch"]) == ("weight", batch)]
    return {row["level"]: row for row in rows}


def inference_section(found: dict, drawn: Mapping[str, Any]) -> Section:
    """Return how fast pruned networks are beside dense ones, and beside other ways to run them."""
    batches, lines = sorted({row["batch"] for row in found["speed"]}), []
    names = columns("pruned", "multiply-adds kept, run", "bytes needed")
    names += [(f"batch {n}:", name) for n in batches for name in ("ms", "times as fast")]
    for kind in dict.fromkeys((row["granularity"], row["level"]) for row in found["speed"]):
        here = {r["batch"]: r for r in found["speed"] if (r["granularity"], r["level"]) == kind}
        row = here[batches[-1]]
        size = f"{row['bytes'] / 1e6:.2f} of {row['dense_bytes'] / 1e6:.1f} MB"
        products = f"{row['kept']:,}, {row['executed']:,}"
        lines.append([f"{kind[0]} {kind[1]:g}%", products, size])
        for batch in batches:
            low, middle, high = quantiles(here[batch]["ratios"], n=4)
            lines[-1] += [f"{1000 * median(here[batch]['seconds']['ours']):.3g}",
                          f"{middle:.2f} ({low:.2f}–{high:.2f})"]  # fmt: skip
    at = crossover([*by_weight(found, 256).values()])
    note = (
        f"{machine(found, found['rates'])}. Networks of seed {found['seed']}, trained with their "
        "masks. Medians of calls in turns with dense, the faster of XLA and NumPy; in brackets the "
        "quartiles. Bytes are of weights, inputs, results and buffers, and of what is compiled the "
        "kept weights once more, at the largest batch. The crossover at batch 256, the lowest "
        f"level (%) by weight that is at least 3% faster than dense: {at}."
    )
    rates = {
        f"batch {n}": [f"{gflops(r):.0f}" for r in by_weight(found, n).values()] for n in batches
    }
    ways = {"ours": "`compile_sparse`", "xla": "XLA dense", "numpy": "NumPy dense",
            "torch": "PyTorch dense", "torch_csr": "PyTorch CSR"}  # fmt: skip
    rows = by_weight(found, 256)
    others = {
        label: [f"{1000 * median(row['seconds'][name]):.3g}" for row in rows.values()]
        for name, label in ways.items() if all(name in row["seconds"] for row in rows.values())
    }  # fmt: skip
    kept = by_level("GFLOP/s of kept multiply-adds, by weight", rates, [*rows])
    made = [Table("", names, lines), kept, by_level("batch 256, by weight, ms", others, [*rows])]
    return Section("Inference", [note], made, drawn)


def files_of(found: dict) -> dict[tuple[float, str], dict[str, float]]:
    """Return what files are, by level and values: means over the seeds, and rates in MB/s."""
    rows = defaultdict(list)
    for row in sorted(found["files"], key=lambda row: row["level"]):
        rows[row["level"], row["values"]].append(row)
    fields = ("dense", "bytes", "accuracy", *FORMATS)
    return {
        key: {field: fmean(row[field] for row in here) for field in fields}
        | {field: coding_rate(here, field) for field in ("saving", "loading")}
        for key, here in rows.items()
    }


def files_section(found: dict, drawn: Mapping[str, Any]) -> Section:
    """Return the bytes of weight-pruned files, the accuracy of what is read back, and rates."""
    files, rates = files_of(found), {}
    levels, every = (list(dict.fromkeys(names)) for names in zip(*files, strict=True))
    lines = {label: [f"{files[level, 'float32'][field] / 1e3:,.0f}" for level in levels]
             for field, label in FORMATS.items()}  # fmt: skip
    for values in every:
        here = [files[level, values] for level in levels]
        lines[f"`{values}`, test accuracy"] = [
            f"{f['bytes'] / 1e3:,.0f} ({f['dense'] / f['bytes']:.1f}×), {100 * f['accuracy']:.2f}%"
            for f in here
        ]
        rates[f"`{values}`"] = [f"{f['saving']:.0f}, {f['loading']:.0f}" for f in here]
    seeds = len({row["seed"] for row in found["files"]})
    note = (
        f"Of weight-pruned networks, means of {seeds} seeds, in brackets how many times smaller "
        "than dense float32. The bound is of places that are independent, and of float32 values; "
        "files are below it because values compress."
    )
    made = [by_level("kB", lines, levels)]
    made.append(by_level("MB of dense weights saved, loaded a second", rates, levels))
    return Section("Files", [note], made, drawn)


def machine(found: dict, rates: Sequence[float]) -> str:
    """Say what measured, and at how many GFLOP/s it multiplies."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    middle, low, high = (f"{f(rates) / 1e9:.0f}" for f in (median, min, max))
    return f"{found['device']}; {versions}; matmul of 2000³ {middle} GFLOP/s ({low}–{high})"


def seconds(times: Sequence[float]) -> str:
    middle = median(times)
    return f"{middle:.2f} s" if middle >= 0.1 else f"{1000 * middle:.3g} ms"
