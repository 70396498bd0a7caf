"""Train, prune and score a network at every sparsity level: the whole study, from data to figures.

Usage: python experiments/sweep.py --preset quick
"""

import sys
import time
import warnings
from pathlib import Path

import tyro

from jaxprune.config import Config


def main(config: Config) -> None:
    """Run the study, or go on with it, then print its table and draw its figures."""
    import optax  # after the flags are parsed, so that --help is quick

    from jaxprune import data, figures, models, results
    from jaxprune.study import run_sweep

    started = time.perf_counter()
    loaded, _ = data.load(config.dataset, data_dir=config.data_dir)
    classes = int(loaded.train.y.max()) + 1
    init, apply = models.mlp(loaded.train.x.shape[1], config.hidden_sizes, classes)
    assert config.seeds is not None and config.epochs is not None and config.run_dir is not None
    rows = run_sweep(
        init, apply, loaded,
        seeds=config.seeds, levels=config.levels, epochs=config.epochs, methods=config.methods,
        protocols=config.protocols, batch_size=config.batch_size,
        optimizer=optax.adam(config.learning_rate), remaining=models.mlp_remaining,
        run_dir=config.run_dir, settings=config.settings(), report=print, note=print,
    )  # fmt: skip
    print(results.table(rows))
    figures.save_figures(rows, config.run_dir / "figures")
    print(f"{time.perf_counter() - started:.0f} s; {config.run_dir}")


if __name__ == "__main__":
    main(tyro.cli(Config))
