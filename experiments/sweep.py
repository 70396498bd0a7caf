"""Train, prune and score a network at every sparsity level: the whole study, from data to figures.

Usage: python experiments/sweep.py --preset quick
"""

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import tyro

from jaxprune.config import Config, TrainingDiverged

if TYPE_CHECKING:
    from jaxprune.study import Progress

_LINE_SECONDS = 10.0  # between lines of progress where there is no terminal


def main() -> None:
    """Read the flags, run the study, and turn what goes wrong into a line and an exit status."""
    try:
        config = tyro.cli(Config, description=__doc__)
        run(config)
    except KeyboardInterrupt:
        print("sweep.py: stopped; the same command goes on from the last finished epoch",
              file=sys.stderr, flush=True)  # fmt: skip
        os._exit(130)  # threads of a checkpoint's half-done writing would complain at a usual exit
    except TrainingDiverged as error:
        stop(1, f"{error}; the rows before it are kept")
    except (ValueError, OSError) as error:
        stop(2, str(error))


def run(config: Config) -> None:
    """Run the study, or go on with it; then print its table and draw its figures."""
    import jax  # after the flags are parsed, so that --help is quick
    import optax

    from jaxprune import data, figures, models, results
    from jaxprune.study import run_sweep

    assert config.seeds is not None and config.epochs is not None and config.run_dir is not None
    started = time.perf_counter()
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"JAX finds no device ({error or 'JAX_PLATFORMS names one that is missing'})"
        ) from error
    loaded = data.load(config.dataset, data_dir=config.data_dir)
    classes = int(loaded.train.y.max()) + 1
    init, apply = models.mlp(loaded.train.x.shape[1], config.hidden_sizes, classes)
    with progress_display() as (report, say), warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say(f"note: {message}")
        say(
            f"{config.dataset}: {len(loaded.train.y):,} images to train on, "
            f"{len(loaded.val.y):,} to validate, {len(loaded.test.y):,} to test; "
            f"run directory {config.run_dir}"
        )
        rows = run_sweep(
            init, apply, loaded,
            seeds=config.seeds, levels=config.levels, epochs=config.epochs, methods=config.methods,
            protocols=config.protocols, batch_size=config.batch_size,
            optimizer=optax.adam(config.learning_rate), remaining=models.mlp_remaining,
            run_dir=config.run_dir, settings=config.settings(), report=report, note=say,
        )  # fmt: skip
    print(f"\n{results.table(rows)}\n")
    note = figures.describe(config.settings())
    figures.save_figures(figures.draw_figures(rows, note=note), config.run_dir / "figures")
    print(
        f"results, checkpoints and figures are in {config.run_dir}  "
        f"({time.perf_counter() - started:.0f} s)"
    )


@contextmanager
def progress_display() -> Iterator[tuple[Callable[["Progress"], None], Callable[[str], None]]]:
    """Give `report(progress)` and `say(line)`: a live bar on a terminal, elsewhere plain lines."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bars

    console = Console(highlight=False)
    bars = Bars(
        TextColumn("{task.description}"), BarColumn(bar_width=20), TaskProgressColumn(),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    task = bars.add_task("compiling", total=1.0)
    last = ("", -_LINE_SECONDS)

    def report(progress: "Progress") -> None:
        nonlocal last
        text = describe(progress)
        if console.is_terminal:
            bars.update(task, completed=progress.done, description=text)
            return
        now, stage = time.perf_counter(), text.split(" · ")[0]
        if stage != last[0] or now - last[1] >= _LINE_SECONDS:
            last = (stage, now)
            say(f"{progress.done:4.0%}  {text}")

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False)

    with bars:
        yield report, say


def describe(progress: "Progress") -> str:
    """Say where the sweep is, in a line."""
    who = " ".join(filter(None, (progress.protocol, progress.method)))
    low, high = progress.levels[0], progress.levels[-1]
    losses = f"loss {progress.losses[0]:.3f}"
    if len(progress.levels) > 1:
        losses = f"{losses} at {low:g}%, {progress.losses[-1]:.3f} at {high:g}%"
    minutes, seconds = divmod(round(progress.seconds_left), 60)
    return (
        f"seed {progress.seed} {who} epoch {progress.epoch}/{progress.epochs} · {losses} · "
        f"{progress.rate / 1000:.1f}k images/s · {minutes}:{seconds:02d} left"
    )


def stop(status: int, line: str) -> NoReturn:
    """Print a line to standard error and exit."""
    print(f"sweep.py: {' '.join(line.split())}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
