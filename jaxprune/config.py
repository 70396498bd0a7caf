"""The settings of a run: one frozen dataclass, its presets and its checks. Imports no jax.

Every field is a flag of `experiments/sweep.py`. `study` reads the settings from here.
"""

import dataclasses
import math
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

PRESETS: dict[str, dict[str, int]] = {
    "quick": {"epochs": 2, "seeds": 1},
    "challenge": {"epochs": 20, "seeds": 3},
}
Granularity = Literal["weight", "unit"]
Protocol = Literal["one_shot", "trained"]
METHODS: tuple[Granularity, ...] = ("weight", "unit")
PROTOCOLS: tuple[Protocol, ...] = ("one_shot", "trained")
LEVELS = (0.0, 25.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0, 97.0, 99.0)


class TrainingDiverged(ArithmeticError):
    """A loss that is not finite; the message names the epoch, the level and the seed."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a network, prune it at every level, and score them all."""

    preset: Literal["quick", "challenge"] = "quick"
    """quick: 2 epochs, 1 seed, minutes. challenge: 20 epochs, 3 seeds, hours on a CPU."""

    dataset: str = "fashion_mnist"
    """fashion_mnist, mnist, or idx:FOLDER for any data set of four idx files."""

    data_dir: Path | None = None
    """Folder that holds the four idx files (.gz or not) of the named data set."""

    levels: tuple[float, ...] = LEVELS
    """Sparsities to prune to, in percent of the weights or units of each layer."""

    seeds: int | None = None
    """Number of seeds, 0 to N-1. Default: the preset's."""

    epochs: int | None = None
    """Epochs of training in all, for the dense and the pruned networks. Default: the preset's."""

    methods: tuple[Granularity, ...] = METHODS
    """What is pruned as one: single weights, or whole units."""

    protocols: tuple[Protocol, ...] = PROTOCOLS
    """one_shot: pruned after training. trained: pruned during training, then trained masked."""

    batch_size: int = 128
    """Examples in a training batch; an epoch's last partial batch is dropped."""

    learning_rate: float = 1e-3
    """Adam's step size."""

    hidden_sizes: tuple[int, ...] = (1000, 1000, 500, 200)
    """Units of the hidden layers."""

    run_dir: Path | None = None
    """Folder of the run; given again, it goes on there. Default: runs/<dataset>-<preset>."""

    def __post_init__(self) -> None:
        """Fill in what the preset decides, then check every value.

        Raises:
            ValueError: a value is out of range; the message names it and the range.
        """
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.run_dir is None:
            run_dir = Path("runs") / f"{self._dataset_name()}-{self.preset}"
            object.__setattr__(self, "run_dir", run_dir)
        if not (self.dataset in ("fashion_mnist", "mnist") or self.dataset.startswith("idx:")):
            raise ValueError(
                f"dataset must be fashion_mnist, mnist or idx:FOLDER, got {self.dataset!r}"
            )
        check_levels(self.levels)
        check_choices("methods", self.methods, METHODS)
        check_choices("protocols", self.protocols, PROTOCOLS)
        assert self.seeds is not None and self.epochs is not None  # filled in above
        check_at_least_one(seeds=self.seeds, epochs=self.epochs, batch_size=self.batch_size)
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ValueError(
                f"hidden_sizes must be one or more sizes of at least 1, "
                f"got {list(self.hidden_sizes)}"
            )
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")

    def settings(self) -> dict[str, Any]:
        """Return, as plain JSON values, what changes results and `run_sweep` does not see."""
        return {
            "dataset": self._dataset_name(),
            "learning_rate": self.learning_rate,
            "hidden_sizes": list(self.hidden_sizes),
        }

    def _dataset_name(self) -> str:
        """Return the data set without the place where it is kept; its digest is compared too."""
        return Path(self.dataset.removeprefix("idx:")).resolve().name


def check_levels(levels: tuple[float, ...]) -> None:
    """Refuse levels that are not distinct percentages.

    Raises:
        ValueError: none, one outside [0, 100], one given twice, or fractions in place of percent.
    """
    if not levels:
        raise ValueError("levels must name at least one percentage in [0, 100], got none")
    for level in levels:
        if not 0 <= level <= 100:
            raise ValueError(f"levels must be in [0, 100] percent, got {level:.12g}")
    twice = [level for level, times in Counter(levels).items() if times > 1]
    if twice:
        raise ValueError(f"levels must be distinct, got {twice[0]:.12g} more than once")
    if any(levels) and max(levels) <= 1:
        raise ValueError(
            f"levels are in percent: for {max(levels):g} as a fraction give {max(levels) * 100:g}"
        )


def sparsity_of_level(level: float) -> Fraction:
    """Return a level in percent as an exact fraction; 99.9 is 999/1000."""
    return Fraction(Decimal(str(level))) / 100


def phases(epochs: int) -> tuple[int, int, int]:
    """Split the epochs of the `trained` protocol.

    Args:
        epochs: all epochs, at least 1.

    Returns:
        Dense, pruning and masked epochs: 1 / 1 / 0 of 2, 10 / 5 / 5 of 20; never without pruning.
    """
    dense = epochs // 2
    pruning = -(-(epochs - dense) // 2)
    return dense, pruning, epochs - dense - pruning


def check_choices(name: str, given: tuple[str, ...], choices: tuple[str, ...]) -> None:
    """Raise ValueError, naming the choices, where `given` is not some of them, each once."""
    if not given or len(set(given)) < len(given) or not set(given) <= set(choices):
        raise ValueError(
            f"{name} must be distinct and among {', '.join(choices)}, "
            f"got {' '.join(given) or 'none'}"
        )


def check_at_least_one(**values: int) -> None:
    """Raise ValueError, naming it, for a value below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
