"""Redraw the figures of a run from its rows alone, and of what else was measured beside them.

    python experiments/figures.py runs/fashion_mnist-challenge --out figures

RUN is the directory of a run, or a folder with its results.csv and config.json, such as figures/.
Those two files are written beside the figures, so that they can be redrawn again.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxprune import results


def redraw(run_dir: Path, out: Path) -> list[Path]:
    """Draw the figures of the run in `run_dir` into `out`; return the files written.

    Raises:
        ValueError: there is no run in `run_dir`, it has no rows, or they cannot be read.
        OSError: a file cannot be read or written.
    """
    run = results.load_run(run_dir)
    if not run.rows:
        raise ValueError(f"{run_dir} has no rows yet, in results.jsonl or results.csv")
    from jaxprune import figures

    note = figures.describe(run.config["settings"])
    drawn = figures.draw_figures(run.rows, note=note)
    if (resnet := out / "resnet.json").exists():
        found = json.loads(resnet.read_text())
        note = f"ResNet-20 without {found['settings']['level']:g}% of the units of every group"
        drawn["resnet-widths"] = figures.widths(found["widths"], note=note)
    if (costs := out / "inference.json").exists():
        found = json.loads(costs.read_text())
        network = f"{figures.describe(found['settings'])}; trained with its mask"
        note = f"{network}, seed {found['seed']}; {found['device']}"
        drawn["inference-speed"] = figures.speedups(found["speed"], note=note)
        drawn["file-sizes"] = figures.file_sizes(found["files"], note=network)
    paths = figures.save_figures(drawn, out)
    if not out.samefile(run_dir):
        results.write_csv(out / "results.csv", run.rows)
        shutil.copyfile(run_dir / "config.json", out / "config.json")
        paths += [out / "results.csv", out / "config.json"]
    return paths


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
