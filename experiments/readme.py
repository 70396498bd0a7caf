"""Fill the tables of README.md from the rows and timings in figures/; none is typed by hand.

    python experiments/readme.py

A table stands between `<!-- name -->` and `<!-- /name -->`; everything else is left as it is.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

from experiments.inference_speed import GOALS, LATEST, RATES, coding_rate, gflops
from jaxprune.figures.costs import crossover
from jaxprune.results import Row, mean_interval, read_csv, table

# Accuracy in percent on Fashion-MNIST, one-shot, one seed each, at 0 25 50 60 70 80 90 95 97 99%.
# A: justincosentino/network-pruning, results.csv. B: an earlier README of the same repository.
# G: MotiBaadror/Pruning_in_neural_net, on held-out training images.
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


def accuracy_table(rows: Sequence[Row]) -> str:
    """Return accuracy in percent at the last epoch, a column a level, beside the published ones."""
    lines = ["| | " + " | ".join(f"{level}%" for level in LEVELS) + " |"]
    lines.append("|---" * (len(LEVELS) + 1) + "|")
    for method, answers in PUBLISHED.items():
        for protocol in ("one_shot", "trained"):
            cells = [
                interval(rows, protocol, method, level, "accuracy", 100, 1) for level in LEVELS
            ]
            lines.append(f"| {method}, `{protocol}` | " + " | ".join(cells) + " |")
        best = at_lowest_validation_loss(rows)
        cells = [interval(best, "one_shot", method, level, "accuracy", 100, 1) for level in LEVELS]
        lines.append(f"| {method}, `one_shot`, lowest validation loss | {' | '.join(cells)} |")
        for name, values in answers.items():
            cells = [f"{value:.1f}" for value in values]
            lines.append(f"| {method}, published {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def at_lowest_validation_loss(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of each seed's epoch of lowest dense validation loss, all as of one epoch."""
    dense = [row for row in rows if row.protocol == "one_shot" and row.target_sparsity == 0]
    best = {row.seed: row for row in sorted(dense, key=lambda row: -(row.val_loss or 0))}
    return [dataclasses.replace(row, epoch=0) for row in rows if row.epoch == best[row.seed].epoch]


def loss_table(rows: Sequence[Row]) -> str:
    """Return one-shot accuracy beside loss, calibration and churn: which of them moves first."""
    fields = {
        "accuracy, %": ("accuracy", 100, 1),
        "loss, nats": ("loss", 1, 3),
        "loss at the best temperature": ("scaled_loss", 1, 3),
        "confidence − accuracy, points": ("signed_ece", 100, 1),
        "changed predictions, %": ("churn", 100, 1),
        "worst class, %": ("worst_class_accuracy", 100, 1),
    }
    lines = ["| weight, `one_shot` | " + " | ".join(f"{level}%" for level in LEVELS) + " |"]
    lines.append("|---" * (len(LEVELS) + 1) + "|")
    for name, (field, scale, digits) in fields.items():
        cells = [
            interval(rows, "one_shot", "weight", level, field, scale, digits) for level in LEVELS
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def claims(rows: Sequence[Row], timed: dict, pruned: dict) -> str:
    """Return the original's claims, each with what was measured."""

    def at(protocol: str, method: str, level: float, field: str = "accuracy") -> str:
        scale, digits = (100, 1) if field == "accuracy" else (1, 2)
        return interval(rows, protocol, method, level, field, scale, digits)

    def gaps(protocol: str) -> str:
        """Return weight less unit accuracy at some levels, in points, paired by seed."""
        return ", ".join(
            shown(
                [
                    100 * (a - b)
                    for a, b in zip(
                        values(rows, protocol, "weight", level, "accuracy"),
                        values(rows, protocol, "unit", level, "accuracy"),
                        strict=True,
                    )
                ],
                1,
            )
            for level in (70, 80, 90, 95)
        )

    def size(method: str, level: float) -> str:
        return f"{mean_interval(values(rows, 'one_shot', method, level, 'remaining'))[0]:,.0f}"

    updates = [row for row in timed["rows"] if row["name"].startswith("update")]
    costs = " and ".join(
        f"{1000 * median(row['seconds']):.0f} ms ({100 * median(row['ratios']):.1f}%) by "
        f"{row['name'].split(', ')[1]}"
        for row in updates
    )
    found = [
        re.fullmatch(r"inference without (.+)% of the units.*bytes / (.+)", row["name"])
        for row in timed["rows"]
    ]
    levels, fewer = zip(*(match.groups() for match in found if match), strict=True)

    def faster(name: str) -> str:
        """Return the median ratios of the rows whose names start so."""
        rows = [row for row in timed["rows"] if row["name"].startswith(name)]
        return ", ".join(f"{median(row['ratios']):.1f}" for row in rows)

    def listed(ratio: Callable[[float], float]) -> str:
        return ", ".join(f"{ratio(level):.1f}" for level in (80, 90, 95, 99))

    def sparse(batch: int) -> str:
        here = by_weight(pruned, batch)
        return listed(lambda level: median(here[level]["ratios"]))

    def smaller(values: str) -> str:
        return listed(lambda level: files[level, values]["dense"] / files[level, values]["bytes"])

    files, single, joules = files_of(pruned), by_weight(pruned, 1), pruned["joules"]
    memory = listed(lambda level: single[level]["dense_bytes"] / single[level]["bytes"])
    power = "Energy is not reported on this machine (no RAPL to be read), so it was not measured."
    if joules:
        power = (
            f"A call at batch 256 takes {1e3 * joules['ours']:.3g} mJ of the processor at "
            f"{joules['level']:g}% by weight,\n  and {1e3 * joules['dense']:.3g} mJ dense (RAPL)."
        )
    return f"""\
- *Weight pruning beats unit pruning.* Weight less unit accuracy at 70, 80, 90, 95%, in points:
  one-shot {gaps("one_shot")}; trained {gaps("trained")}. At nearly equal size, 90% of the weights
  ({size("weight", 90)} left) against 80% of the units ({size("unit", 80)} left): one-shot
  {at("one_shot", "weight", 90)} against {at("one_shot", "unit", 80)}%, trained
  {at("trained", "weight", 90)} against {at("trained", "unit", 80)}%.
- *Weight pruning costs more to train than unit pruning.* Under masks, training is the same program
  for both. Selecting anew for nine levels takes {costs}; in brackets, the share of the training
  between two selections. Once the schedule has ended, unit-pruned levels are trained without the
  units: all nine {faster("training of 9 unit")} times as fast.
- *Inference takes the same time for both.* Under masks, yes: the same dense products. Without its
  pruned units the network is {faster("inference")} times as fast at
  {", ".join(levels)}% (batch 256), and ten levels are evaluated
  {faster("evaluation of 10 unit")} times as fast as by weight. Without its pruned weights,
  compiled by `compile_sparse`, it is {sparse(256)} times as fast as dense
  at 80, 90, 95, 99% (batch 256), and {sparse(1)} times at batch 1.
- *Sparse models compress better.* Without its pruned units the network has
  {", ".join(fewer)} times fewer bytes of parameters at {", ".join(levels)}%, not compressed. Files
  of its weights are {smaller("float32")} times smaller than dense
  at 80, 90, 95, 99% without any loss, and {smaller("codebook5")} times with 32 values a layer.
- *Sparse models need less memory and power.* At batch 1 the compiled network needs
  {memory} times fewer bytes at 80, 90, 95, 99% by weight. Counted are weights,
  inputs, results and buffers, and of the compiled network the kept weights once more, which it
  holds for other shapes of inputs. To compile for a new shape, it needs memory for the dense
  weights for a moment. {power}
- *Loss tells more than accuracy.* Only once its two parts are told apart, confidence, which a
  temperature mends, and the rest. One-shot by weight, from 0 to 70%: accuracy
  {at("one_shot", "weight", 0)} to {at("one_shot", "weight", 70)}%, loss
  {at("one_shot", "weight", 0, "loss")} to {at("one_shot", "weight", 70, "loss")}, loss at the best
  temperature {at("one_shot", "weight", 0, "scaled_loss")} to
  {at("one_shot", "weight", 70, "scaled_loss")}. The dense network is over-confident; pruning takes
  confidence away, and the loss may fall before it rises:"""


def speed_table(timed: dict) -> str:
    """Return the benchmark's medians."""
    rates = [rate for row in timed["rows"] for rate in row["rates"]]
    lines = ["| | jaxprune | beside | ratio, median (range) | goal |", "|---|---|---|---|---|"]
    for row in timed["rows"]:
        _, limit, unit = row["goal"].split()
        scale, digits = (100, 0) if unit == "%" else (1, 1 if float(limit) > 10 else 2)
        ratios = [scale * ratio for ratio in row["ratios"]]
        cells = ["–", "–"]
        if ratios:
            low, middle, high = (f"{f(ratios):.{digits}f}" for f in (min, median, max))
            cells = [
                f"{row['other']} {_seconds(row['theirs'])}",
                f"{middle} ({low}–{high}) {unit}",
            ]
        lines.append(
            f"| {row['name']} | {_seconds(row['seconds'])} | {cells[0]} | {cells[1]} | "
            f"{row['goal']} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in timed["versions"].items())
    return "\n".join(
        [
            f"{timed['device']}; {versions}. A float32 matmul of 2000³ ran at "
            f"{median(rates) / 1e9:.0f} GFLOP/s ({min(rates) / 1e9:.0f}–{max(rates) / 1e9:.0f}) in "
            "the same run."
            + (
                " **The machine was not idle: these figures are provisional.**"
                if min(rates) < 0.8 * max(rates)
                else ""
            ),
            "",
            *lines,
        ]
    )


def resnet_table(found: dict) -> str:
    """Return masked beside compact training of ResNet-20, a line a seed."""
    lines = [
        "| seed | dense, % | masked, % | compact, % | parameters | CPU seconds an epoch |",
        "|---|---|---|---|---|---|",
    ]
    settings = found["settings"]
    for seed in settings["seeds"]:
        last = {row["phase"]: row for row in found["rows"] if row["seed"] == seed}
        accuracies = " | ".join(f"{100 * row['accuracy']:.2f}" for row in last.values())
        masked, compact = last["masked"], last["compact"]
        lines.append(
            f"| {seed} | {accuracies} | {masked['parameters']:,} → {compact['parameters']:,} | "
            f"{masked['cpu_seconds']:.0f} → {compact['cpu_seconds']:.0f} |"
        )
    half, epochs = settings["epochs"] // 2, settings["epochs"]
    return "\n".join(
        [
            f"{found['device']}, jax {found['versions']['jax']}; {settings['examples']:,} training "
            f"images an epoch, width {settings['width']}; dense after {half} epochs, the others "
            f"after {epochs}, without {settings['level']:g}% of the units of every group.",
            "",
            *lines,
        ]
    )


def by_weight(found: dict, batch: int) -> dict[float, dict[str, Any]]:
    """Return the rows of weight-pruned networks at a batch size, by level."""
    rows = [r for r in found["speed"] if (r["method"], r["batch"]) == ("weight", batch)]
    return {row["level"]: row for row in rows}


def inference_table(found: dict) -> str:
    """Return how many times as fast as dense pruned networks are, a line a level."""
    batches = sorted({row["batch"] for row in found["speed"]})
    lines = [
        "| pruned, seed " + str(found["seed"]) + " | multiply-adds kept, run | bytes needed |"
        + "".join(f" batch {batch}: ms | times as fast |" for batch in batches),
        "|---|---|---|" + "---|---|" * len(batches),
    ]  # fmt: skip
    for method in ("weight", "unit"):
        for level in sorted({row["level"] for row in found["speed"]}):
            here = {r["batch"]: r for r in found["speed"]
                    if (r["method"], r["level"]) == (method, level)}  # fmt: skip
            if not here:
                continue
            row = here[max(batches)]
            cells = [f"{method} {level:g}%", f"{row['kept']:,}, {row['executed']:,}",
                     f"{row['bytes'] / 1e6:.2f} of {row['dense_bytes'] / 1e6:.1f} MB"]  # fmt: skip
            for batch in batches:
                low, middle, high = quantiles(here[batch]["ratios"], n=4)
                cells += [f"{1000 * median(here[batch]['seconds']['ours']):.3g}",
                          f"{middle:.2f} ({low:.2f}–{high:.2f})"]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    rates = found["rates"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    calls = sorted({len(row["seconds"]["ours"]) for row in found["speed"]})
    kept = [
        f"{', '.join(f'{gflops(row):.0f}' for row in here.values())} GFLOP/s at "
        f"{', '.join(f'{level:g}' for level in here)}% by weight, batch {batch}"
        for batch in (256, 2048)
        if (
            here := {
                k: r for k, r in by_weight(found, batch).items() if ("weight", batch, k) in RATES
            }
        )
    ]
    at = crossover([*by_weight(found, 256).values()])
    return "\n".join(
        [
            f"{found['device']}; {versions}; matmul of 2000³ {median(rates) / 1e9:.0f} GFLOP/s "
            f"({min(rates) / 1e9:.0f}–{max(rates) / 1e9:.0f}). Medians of "
            f"{' to '.join(map(str, dict.fromkeys((calls[0], calls[-1]))))} calls in turns with "
            "dense; in brackets the quartiles. Bytes needed are of weights, inputs, results and "
            "buffers, and of what is compiled the kept weights once more, at batch "
            f"{max(batches)}.",
            "",
            *lines,
            "",
            f"Kept multiply-adds run at {'; at '.join(kept)} (goal: at least "
            f"{max(RATES.values())}). The crossover at batch 256, the lowest level by weight that "
            f"is at least 3% faster than dense, is {'none' if at is None else f'{at:g}%'} (goal: "
            f"{LATEST}% at the latest).",
        ]
    )


def others_table(found: dict) -> str:
    """Return milliseconds beside other ways to run the same networks."""
    names = {"ours": "`compile_sparse`", "xla": "XLA dense", "numpy": "NumPy dense",
             "torch": "PyTorch dense", "torch_csr": "PyTorch CSR"}  # fmt: skip
    rows = [*by_weight(found, 256).values()]
    lines = ["| batch 256, ms | " + " | ".join(f"{row['level']:g}%" for row in rows) + " |"]
    lines.append("|---" * (len(rows) + 1) + "|")
    for name, text in names.items():
        cells = [f"{1000 * median(row['seconds'][name]):.3g}" for row in rows
                 if name in row["seconds"]]  # fmt: skip
        if cells:
            lines.append(f"| {text} | {' | '.join(cells)} |")
    return "\n".join(lines)


def files_of(found: dict) -> dict[tuple[float, str], dict[str, float]]:
    """Return what files are, by level and values: means over the seeds, and rates in MB/s."""
    rows: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in sorted(found["files"], key=lambda row: row["level"]):
        rows.setdefault((row["level"], row["values"]), []).append(row)
    fields = ("dense", "bytes", "accuracy", "bound", "bitmap", "csr", "npz", "gzip")
    return {
        key: {field: fmean(row[field] for row in here) for field in fields}
        | {field: coding_rate(here, field) for field in ("saving", "loading")}
        for key, here in rows.items()
    }


def files_table(found: dict) -> str:
    """Return the bytes of weight-pruned files, the accuracy of what is read back, and rates."""
    files = files_of(found)
    levels, every = (list(dict.fromkeys(names)) for names in zip(*files, strict=True))
    seeds = len({row["seed"] for row in found["files"]})
    lines = [f"| mean of {seeds} seeds | " + " | ".join(f"{level:g}%" for level in levels) + " |"]
    lines.append("|---" * (len(levels) + 1) + "|")
    for name, field in {"lossless bound": "bound", "bitmap + float32": "bitmap", "CSR": "csr",
                        "npz": "npz", "gzip": "gzip"}.items():  # fmt: skip
        cells = [f"{files[level, 'float32'][field] / 1e3:,.0f}" for level in levels]
        lines.append(f"| {name}, kB | {' | '.join(cells)} |")
    for values in every:
        cells = [
            f"{f['bytes'] / 1e3:,.0f} ({f['dense'] / f['bytes']:.1f}×), {100 * f['accuracy']:.2f}%"
            for f in (files[level, values] for level in levels)
        ]
        lines.append(f"| `{values}`, kB, accuracy | {' | '.join(cells)} |")
    for values in every:
        cells = [
            f"{f['saving']:.0f}, {f['loading']:.0f}"
            for f in (files[level, values] for level in levels)
        ]
        lines.append(f"| `{values}`, MB/s saved, loaded | {' | '.join(cells)} |")
    return "\n".join(lines)


def goals(found: dict) -> str:
    """Return the goals that the measured figures miss, a line a goal, or that they reach all."""
    missed: dict[str, list[str]] = {}

    def check(reached: bool, goal: str, where: str, figure: str) -> None:
        if not reached:
            missed.setdefault(goal, []).append(f"{where} ({figure})")

    for row in found["speed"]:
        key = row["method"], row["batch"], row["level"]
        where = f"{row['method']} {row['level']:g}% at batch {row['batch']}"
        _, ratio, high = quantiles(row["ratios"], n=4)
        if goal := GOALS.get(key):
            check(ratio >= goal, f"{goal:g} times as fast as dense", where, f"{ratio:.2f}")
        if goal := RATES.get(key):
            rate = gflops(row)
            check(rate >= goal, f"{goal} GFLOP/s of kept multiply-adds", where, f"{rate:.1f}")
        check(high >= 1, "never slower than dense, by the upper quartile", where, f"{high:.2f}")
    at = crossover([*by_weight(found, 256).values()])
    figure = "none" if at is None else f"{at:g}%"
    check(at is not None and at <= LATEST, f"crossover by {LATEST}%", "at batch 256", figure)
    files = files_of(found)
    for level in dict.fromkeys(level for level, _ in files):
        whole, where = files[level, "float32"], f"{level:g}%"
        part, limit = whole["bytes"] / whole["bound"], 0.97 if level <= 95 else 1.0
        if level >= 50:
            check(part <= limit, f"at most {limit} of the lossless bound", where, f"{part:.3f}")
        other = whole["bytes"] / min(whole[name] for name in ("bitmap", "csr", "npz", "gzip"))
        check(other < 1, "smaller than bitmap, CSR, npz and gzip", where, f"{other:.3f} times")
        if 92 <= level <= 95:
            times = max(
                (file["dense"] / file["bytes"] for (k, values), file in files.items()
                 if k == level and values.startswith("codebook")
                 and file["accuracy"] >= whole["accuracy"] - 0.002), default=0,
            )  # fmt: skip
            goal = "40 times smaller by codebook, within 0.2 points of float32"
            check(times >= 40, goal, where, f"{times:.1f}")
    for (level, values), file in files.items():
        for field in ("saving", "loading"):
            goal = f"{field} at 100 MB/s of dense weights"
            check(file[field] >= 100, goal, f"`{values}` {level:g}%", f"{file[field]:.1f}")
    if not missed:
        return "These figures reach every goal of the two tables."
    lines = [f"- {goal}: {', '.join(where)}" for goal, where in missed.items()]
    return "\n".join(["Goals that these figures miss:", "", *lines])


def _seconds(times: Sequence[float]) -> str:
    middle = median(times)
    return f"{middle:.2f} s" if middle >= 0.1 else f"{1000 * middle:.3g} ms"


def values(
    rows: Sequence[Row], protocol: str, method: str, level: float, field: str
) -> list[float]:
    """Return a field at the last epoch, by seed."""
    last = max(row.epoch for row in rows)
    found = {
        row.seed: getattr(row, field)
        for row in rows
        if (row.protocol, row.method, row.epoch) == (protocol, method, last)
        and round(100 * row.target_sparsity, 6) == level
    }
    return [found[seed] for seed in sorted(found)]


def shown(numbers: Sequence[float], digits: int) -> str:
    """Return the mean, and half its 95% interval."""
    mean, half = mean_interval(numbers)
    return f"{mean:.{digits}f}" if half is None else f"{mean:.{digits}f} ± {half:.{digits}f}"


def interval(
    rows: Sequence[Row], protocol: str, method: str, level: float, field: str, scale: float,
    digits: int,
) -> str:  # fmt: skip
    """Return the mean of a field over seeds at the last epoch, and half its 95% interval."""
    found = values(rows, protocol, method, level, field)
    return shown([scale * value for value in found], digits)


def setting_line(config: dict, rows: Sequence[Row]) -> str:
    """Say what the tables are of."""
    settings, device = config["settings"], config["device"]
    seeds = sorted({row.seed for row in rows})
    return (
        f"{settings['dataset']}, {settings['epochs']} epochs, seeds {seeds[0]} to {seeds[-1]}, "
        f"mean ± 95% interval (Student t); {device['cores']} cores ({device['kind']}), "
        f'jax {config["versions"]["jax"]}; `make sweep ARGS="--preset challenge"`.'
    )


def fill(text: str, blocks: dict[str, str]) -> str:
    """Replace the marked blocks of a text.

    Raises:
        ValueError: a mark is missing.
    """
    for name, block in blocks.items():
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md has no block {name!r}")
        text = pattern.sub(lambda found, block=block: f"{found[1]}{block}\n{found[2]}", text)
    return text


def blocks(figures: Path) -> dict[str, str]:
    """Return every table, from what lies in `figures`."""
    rows = read_csv(figures / "results.csv")
    config = json.loads((figures / "config.json").read_text())
    timed = json.loads((figures / "benchmark.json").read_text())
    costs = json.loads((figures / "inference.json").read_text())
    return {
        "setting": setting_line(config, rows),
        "printed": f"```\n{table(rows)}\n```",
        "accuracy": accuracy_table(rows),
        "claims": claims(rows, timed, costs),
        "loss": loss_table(rows),
        "speed": speed_table(timed),
        "inference": inference_table(costs),
        "others": others_table(costs),
        "files": files_table(costs),
        "goals": goals(costs),
        "resnet": resnet_table(json.loads((figures / "resnet.json").read_text())),
    }


def main() -> int:
    """Fill README.md in; return the exit status."""
    root = Path(__file__).parent.parent
    readme = root / "README.md"
    try:
        readme.write_text(fill(readme.read_text(), blocks(root / "figures")))
    except (OSError, ValueError, KeyError) as error:
        print(f"readme.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
