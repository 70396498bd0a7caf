"""Train, prune and score a network at every sparsity level: the whole study, from data to figures.

Usage: python experiments/sweep.py --preset quick
"""

import argparse
import dataclasses
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import tyro

from jaxprune.config import PRESETS, Config, NotFinite

if TYPE_CHECKING:
    from jaxprune.study import Progress


def main() -> None:
    """Read the flags, run the study, and turn what goes wrong into a line and an exit status."""
    for stream in (sys.stdout, sys.stderr):  # where they take ASCII only
        stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    # asyncio, by which checkpoints are written, replaces the default one, and may lose a Ctrl-C.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *args: signal.default_int_handler(*args))
    config = None
    try:
        config = read_flags()
        run(config)
    except KeyboardInterrupt:
        print("sweep.py: stopped; the same command goes on from the last finished epoch",
              file=sys.stderr, flush=True)  # fmt: skip
        os._exit(130)  # threads of a checkpoint's half-done writing would complain at a usual exit
    except NotFinite as error:
        stop(1, "; ".join([str(error), *getattr(error, "__notes__", ())]))
    except (Exception, SystemExit) as error:
        if config and (line := error_in_own_code(error, config)):
            stop(2, line)
        if isinstance(error, ValueError | OSError | ModuleNotFoundError):
            stop(2, str(error))
        if isinstance(error, TypeError):  # of what was made of the flags, such as integer leaves
            stop(1, str(error))
        raise


@dataclasses.dataclass(frozen=True)
class Flags(Config):
    """What was typed, checked by `Config` later: an error in here would fill a box of tyro's."""

    def __post_init__(self) -> None:
        pass


def read_flags() -> Config:
    """Return the settings; a preset gives defaults to the other flags."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default="quick")
    default = dataclasses.replace(Flags(), **PRESETS.get(early.parse_known_args()[0].preset, {}))
    return Config(**vars(tyro.cli(Flags, default=default, description=__doc__)))


def run(config: Config) -> None:
    """Run the study, or go on with it; then print its tables, draw its figures, and report."""
    import jax  # after the flags are parsed, so that --help is quick
    import optax

    from jaxprune import data, figures, networks, report, results, tasks
    from jaxprune.study import run_sweep

    folder, started = config.folder, time.perf_counter()
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"JAX finds no device ({error or 'JAX_PLATFORMS names one that is missing'})"
        ) from error
    task = tasks.resolve(config.task) if config.task else None
    loaded = data.load(config.dataset, data_dir=config.data_dir, context=config.context)
    loaded = data.Data(*(data.Split(*(a[: config.examples] for a in split)) for split in loaded))
    example = networks.Example(loaded.train.x[:2], data.outputs_of(loaded))
    options = {"hidden_sizes": config.hidden_sizes} if config.network == "mlp" else {}
    network = networks.resolve(config.network)(example, **options)
    with progress_display() as tell, warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: tell(str(message))
        print(
            f"{config.dataset}: {len(loaded.train.x):,} examples to train on, "
            f"{len(loaded.val.x):,} to validate, {len(loaded.test.x):,} to test; "
            f"run directory {folder}"
        )
        rows = run_sweep(
            network, loaded, config, task=task, optimizer=optax.adam(config.learning_rate),
            run_dir=folder, settings=config.settings(), report=tell,
        )  # fmt: skip
    found = results.load_run(folder)
    tables = results.tables(rows, found.metrics)
    print("\n" + "\n\n".join(map(results.text, tables)) + "\n")
    drawn = figures.draw_figures(rows, found.metrics, note=figures.describe(config.settings()))
    figures.save_figures(drawn, folder / "figures")
    report.write_report(found, drawn, folder / "report.html")
    print(
        f"report.html, results, checkpoints and figures are in {folder}  "
        f"({time.perf_counter() - started:.0f} s)"
    )
    if lost := [row for row in rows if row.metrics["val_loss"] is None]:
        row = lost[0]
        raise NotFinite(
            f"the loss of {len(lost)} of {len(rows)} rows is not finite, first at epoch "
            f"{row.epoch}, level {100 * row.target_sparsity:g}%, seed {row.seed} ({row.arm})"
        )


@contextmanager
def progress_display() -> Iterator[Callable[["Progress | str"], None]]:
    """Give `tell(progress or line)`: a live bar on a terminal, elsewhere plain lines."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bars

    from jaxprune.study.progress import lines

    console = Console(highlight=False)
    if not console.is_terminal:
        yield lines(partial(print, flush=True))
        return
    columns = TextColumn("{task.description}"), BarColumn(bar_width=20), TaskProgressColumn()
    bars = Bars(*columns, console=console)
    task = bars.add_task("compiling", total=1.0)

    def tell(what: "Progress | str") -> None:
        if isinstance(what, str):
            console.print(f"note: {what}", soft_wrap=True, markup=False)
        else:
            bars.update(task, completed=what.done, description=str(what))

    with bars:
        yield tell


def error_in_own_code(error: BaseException, config: Config) -> str:
    """Return the error with file and line where a function of the user's raised it, "" if none did.

    It may be the cause of the one that is given, which then says more.
    """
    specs = (*config.criteria, config.network, config.task or "")
    modules = (sys.modules.get(spec.partition(":")[0]) for spec in specs if ":" in spec)
    files = [getattr(module, "__file__", None) for module in modules]
    words, cause = f"{type(error).__name__}: {error}", error
    while cause is not None:
        frames = [f for f in traceback.extract_tb(cause.__traceback__) if f.filename in files]
        if frames:
            return f"{frames[-1].filename}:{frames[-1].lineno}: {words}"
        words, cause = str(error), cause.__cause__
    return ""


def stop(status: int, line: str) -> NoReturn:
    """Print a line to standard error and exit."""
    print(f"sweep.py: {' '.join(line.split())}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
