"""Redraw the figures of a run from its rows alone, and write the page of all that was measured.

    python experiments/figures.py runs/fashion_mnist-challenge --out figures

RUN is the directory of a run, or a folder with its results.csv and config.json, such as figures/.
Those two files are written beside the figures, so that they can be redrawn again. RESULTS.md has
the tables, also of benchmark.json, inference.json and one_shot/ where they lie there.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxprune import results


def redraw(run_dir: Path, out: Path) -> list[Path]:
    """Draw the figures of the run in `run_dir` into `out`; return the files written.

    Raises:
        ValueError: there is no run in `run_dir`, it has no rows, or they cannot be read.
        OSError: a file cannot be read or written.
    """
    run = results.load_run(run_dir)
    if not run.rows:
        raise ValueError(f"{run_dir} has no rows yet, in rows/ or results.csv")
    from experiments import one_shot_page, results_page
    from jaxprune import figures, report

    found = {name: results.read_json(path) for name in ("benchmark", "inference")
             if (path := out / f"{name}.json").exists()}  # fmt: skip
    note = figures.describe(run.config["settings"])
    drawn = figures.draw_figures(run.rows, run.metrics, note=note) | draw_costs(found)
    compared = one_shot_page.sections(out / "one_shot")
    for section in compared:
        drawn |= section.figures
    paths = figures.save_figures(drawn, out)
    page = out / "RESULTS.md"
    sections = [*results_page.sections(run, found, drawn), *compared]
    report.write_markdown("Results", sections, page)
    if not out.samefile(run_dir):
        results.write_csv(out / "results.csv", run.rows)
        shutil.copyfile(run_dir / "config.json", out / "config.json")
        paths += [out / "results.csv", out / "config.json"]
    return [*paths, page]


def draw_costs(found: dict[str, Any]) -> dict[str, Any]:
    """Draw what was measured beside rows."""
    from jaxprune import figures

    drawn = {}
    if costs := found.get("inference"):
        network = f"{figures.describe(costs['settings'])}; trained with its mask"
        note = f"{network}, seed {costs['seed']}; {costs['device']}"
        drawn["inference-speed"] = figures.speedups(costs["speed"], note=note)
        drawn["file-sizes"] = figures.file_sizes(costs["files"], note=network)
    return drawn


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, redraw, and return the exit status."""
    parser = argparse.ArgumentParser(description="Redraw the figures of a run from its rows alone.")
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run, or figures/")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the figures, made if missing"
    )
    args = parser.parse_args(argv)
    try:
        paths = redraw(args.run, args.out)
    except (OSError, ValueError) as error:
        print(f"figures.py: {error}", file=sys.stderr)
        return 2
    print(*paths, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
