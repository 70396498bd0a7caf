"""Fill the tables of README.md from the rows and timings in figures/; none is typed by hand.

    python experiments/readme.py

A table stands between `<!-- name -->` and `<!-- /name -->`; everything else is left as it is.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from jaxprune.results import Row, mean_interval, read_csv

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
        for name, values in answers.items():
            cells = [f"{value:.1f}" for value in values]
            lines.append(f"| {method}, published {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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


def claims(rows: Sequence[Row], timed: dict) -> str:
    """Return the original's claims, each with what was measured."""

    def value(protocol: str, method: str, level: float, field: str, scale: float, digits: int):
        return interval(rows, protocol, method, level, field, scale, digits)

    def gap(protocol: str, level: float) -> str:
        """Return weight less unit accuracy, in points, paired by seed."""
        last = max(row.epoch for row in rows)
        found = {
            (row.method, row.seed): 100 * row.accuracy
            for row in rows
            if (row.protocol, row.epoch) == (protocol, last)
            and round(100 * row.target_sparsity, 6) == level
            and row.accuracy is not None
        }
        seeds = sorted({seed for _, seed in found})
        mean, half = mean_interval([found["weight", n] - found["unit", n] for n in seeds])
        return f"{mean:+.1f}" if half is None else f"{mean:+.1f} ± {half:.1f}"

    def left(method: str, level: float) -> int:
        return next(
            row.remaining or 0
            for row in rows
            if row.method == method and round(100 * row.target_sparsity, 6) == level
            and row.protocol == "one_shot"
        )  # fmt: skip

    wide = (70, 80, 90, 95)
    seconds = {row["name"]: median(row["seconds"]) for row in timed["rows"]}
    share = {row["name"]: 100 * median(row["ratios"]) for row in timed["rows"] if row["ratios"]}
    weight, unit = (f"update of 9 levels, {method}" for method in ("weight", "unit"))
    last = max(row.epoch for row in rows)
    scored = {
        method: mean_interval([
            row.eval_seconds for row in rows
            if (row.protocol, row.method) == ("one_shot", method) and row.target_sparsity
        ])[0]
        for method in ("weight", "unit")
    }  # fmt: skip
    return "\n".join(
        [
            "- *Weight pruning beats unit pruning.* Weight less unit accuracy, in points, at "
            f"{', '.join(f'{level}%' for level in wide)}: one-shot "
            f"{', '.join(gap('one_shot', level) for level in wide)}; trained "
            f"{', '.join(gap('trained', level) for level in wide)}. At nearly equal size, by "
            f"weight at 90% ({left('weight', 90):,} weights left) and by unit at 80% "
            f"({left('unit', 80):,}): one-shot "
            f"{value('one_shot', 'weight', 90, 'accuracy', 100, 1)} "
            f"and {value('one_shot', 'unit', 80, 'accuracy', 100, 1)}%, trained "
            f"{value('trained', 'weight', 90, 'accuracy', 100, 1)} and "
            f"{value('trained', 'unit', 80, 'accuracy', 100, 1)}%.",
            "- *Weight pruning costs more to train.* Selecting anew for nine levels takes "
            f"{1000 * seconds[weight]:.0f} ms by weight and {1000 * seconds[unit]:.0f} ms by unit, "
            f"{share[weight]:.1f}% and {share[unit]:.1f}% of the training between two selections; "
            "the masked training itself is the same program. True, and here of no account.",
            "- *Inference time is the same for both.* Masked dense evaluation of a level took "
            f"{scored['weight']:.2f} s by weight and {scored['unit']:.2f} s by unit (mean over the "
            f"{last} epochs and all seeds). Removing the pruned units or using sparse products: "
            "not yet measured.",
            "- *Sparse models compress better.* Not yet measured.",
            "- *Loss tells more than accuracy.* One-shot by weight, from 0 to 70%, accuracy goes "
            f"from {value('one_shot', 'weight', 0, 'accuracy', 100, 1)} to "
            f"{value('one_shot', 'weight', 70, 'accuracy', 100, 1)}% and loss from "
            f"{value('one_shot', 'weight', 0, 'loss', 1, 2)} to "
            f"{value('one_shot', 'weight', 70, 'loss', 1, 2)}. Part of the loss is confidence "
            "alone, which one number, the temperature, mends:",
        ]
    )


def speed_table(timed: dict) -> str:
    """Return the benchmark's medians."""
    rates = [rate for found in timed["matmul_rates"].values() for rate in found]
    lines = ["| | jaxprune | beside | ratio, median (range) | goal |", "|---|---|---|---|---|"]
    for row in timed["rows"]:
        _, limit, unit = row["goal"].split()
        scale, digits = (100, 0) if unit == "%" else (1, 1 if float(limit) > 10 else 2)
        ratios = [scale * ratio for ratio in row["ratios"]]
        cells = ["–", "–"]
        if ratios:
            low, middle, high = (f"{f(ratios):.{digits}f}" for f in (min, median, max))
            cells = [
                f"{row['other']} {median(row['theirs']):.3f} s",
                f"{middle} ({low}–{high}) {unit}",
            ]
        lines.append(
            f"| {row['name']} | {median(row['seconds']):.3f} s | {cells[0]} | {cells[1]} | "
            f"{row['goal']} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in timed["versions"].items())
    return "\n".join(
        [
            f"{timed['device']}; {versions}. A float32 matmul of 2000³ ran at "
            f"{median(rates) / 1e9:.0f} GFLOP/s ({min(rates) / 1e9:.0f}–{max(rates) / 1e9:.0f}) in "
            "the same run.",
            "",
            *lines,
        ]
    )


def interval(
    rows: Sequence[Row], protocol: str, method: str, level: float, field: str, scale: float,
    digits: int,
) -> str:  # fmt: skip
    """Return the mean over seeds at the last epoch, and half its 95% interval."""
    last = max(row.epoch for row in rows)
    mean, half = mean_interval(
        [
            scale * getattr(row, field)
            for row in rows
            if (row.protocol, row.method, row.epoch) == (protocol, method, last)
            and round(100 * row.target_sparsity, 6) == level
        ]
    )
    return f"{mean:.{digits}f}" if half is None else f"{mean:.{digits}f} ± {half:.{digits}f}"


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
        pattern = re.compile(f"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md has no block {name!r}")
        text = pattern.sub(lambda found, block=block: found[1] + block + found[2], text)
    return text


def blocks(figures: Path) -> dict[str, str]:
    """Return every table, from what lies in `figures`."""
    rows = read_csv(figures / "results.csv")
    config = json.loads((figures / "config.json").read_text())
    timed = json.loads((figures / "benchmark.json").read_text())
    return {
        "setting": setting_line(config, rows),
        "accuracy": accuracy_table(rows),
        "claims": claims(rows, timed),
        "loss": loss_table(rows),
        "speed": speed_table(timed),
    }


def main() -> int:
    """Fill README.md in; return the exit status."""
    root = Path(__file__).parent.parent
    readme = root / "README.md"
    try:
        readme.write_text(fill(readme.read_text(), blocks(root / "figures")))
    except (OSError, ValueError) as error:
        print(f"readme.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
