"""The settings of a study and of the command: frozen dataclasses with their checks. Imports no jax.

`Study` is what `run_sweep` and `prune_curve` take; `Config` adds what the command needs to make
network, data and optimizer. Every field is a flag of `experiments/sweep.py`.
"""

import dataclasses
import hashlib
import math
import operator
import re
import urllib.parse
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

PRESETS: dict[str, dict[str, int]] = {
    "quick": {"epochs": 2, "seeds": 1},
    "challenge": {"epochs": 20, "seeds": 3},
}
LEVELS = (0.0, 25.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0, 97.0, 99.0)
GRANULARITIES = ("weight", "unit")
SCOPES = ("layer", "global", "erk", "owl", "by_loss")
PROTOCOLS = ("one_shot", "trained")
_LEAST = {**dict.fromkeys(("seeds", "epochs", "batch_size", "score_batch", "levels_at_once"), 1),
          "recalibrate": 0}  # fmt: skip
SCOPES_OF_SIZES = ("layer", "global", "erk")  # which no data are needed for
_SLUG = 150  # characters; most file systems take names of up to 255 bytes


class NotFinite(ArithmeticError):
    """A loss or scores that are not finite; the message names where and when."""


class Arm(NamedTuple):
    """What is compared within a study: a criterion, and how its scores are used."""

    criterion: str
    granularity: str
    scope: str
    protocol: str

    def __str__(self) -> str:
        return " ".join(self)

    @property
    def slug(self) -> str:
        """The name of the arm's files; of a long one the end is a digest."""
        name = "-".join(urllib.parse.quote(part, safe="(),=") for part in self)
        if len(name) <= _SLUG:
            return name
        return f"{name[: _SLUG - 17]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


@dataclasses.dataclass(frozen=True)
class Study:
    """Seeds × arms × levels. All arms of a seed share its dense run.

    An arm is a criterion, a granularity, a scope and a protocol; all combinations are run.
    """

    levels: tuple[float, ...] = LEVELS
    """Sparsities to prune to, in percent of the prunable weights, or of the units."""

    seeds: int = 1
    """Number of seeds, 0 to N-1."""

    epochs: int = 2
    """Epochs of training in all, for the dense and the pruned networks."""

    criteria: tuple[Any, ...] = ("magnitude",)
    """What a weight is worth: a name of `criteria.CRITERIA`, or module:function of your own."""

    granularities: tuple[str, ...] = GRANULARITIES
    """What is pruned as one: weight, unit with all that belongs to it, row, block4x4, 2:4."""

    scopes: tuple[str, ...] = ("layer",)
    """How a sparsity is shared out: each layer alike, global, erk, owl, by_loss, my_module:mine."""

    protocols: tuple[str, ...] = PROTOCOLS
    """one_shot: pruned after training. trained: pruned during training, then trained masked."""

    batch_size: int = 128
    """Examples in a training batch; an epoch's last partial batch is dropped."""

    score_batch: int = 512
    """Training examples that a criterion looks at, drawn once a seed; at most all."""

    recalibrate: int = 0
    """Training batches, at most an epoch, that re-estimate BatchNorm's statistics of one_shot."""

    levels_at_once: int | None = None
    """Levels computed side by side. Default: all on an accelerator, one by one on a CPU."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: a value is out of range; the message names it and the range.
            TypeError: a number that must be whole is not.
        """
        try:
            object.__setattr__(self, "levels", tuple(map(float, self.levels)))
        except (TypeError, ValueError):
            raise ValueError(f"levels must be a tuple of numbers, got {self.levels!r}") from None
        for name in ("criteria", "granularities", "scopes", "protocols"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, list | tuple):
                raise TypeError(f"{name} must be a tuple, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        check_levels(self.levels)
        if not self.criteria:
            raise ValueError("criteria must name at least one, got none")
        check_choices("protocols", self.protocols, PROTOCOLS)
        check_granularities(self)
        named = tuple(scope for scope in self.scopes if ":" not in scope)
        if named or not self.scopes:
            check_choices("scopes", named, (*SCOPES, "module:function"))
        asking = [scope for scope in self.scopes if scope in ("owl", "by_loss")]
        if asking and "trained" in self.protocols:
            raise ValueError(f"scope {asking[0]} looks at a trained network: protocols one_shot")
        for name, least in _LEAST.items():
            if name != "levels_at_once" or self.levels_at_once is not None:
                check_at_least(least, **{name: (value := getattr(self, name))})
                object.__setattr__(self, name, operator.index(value))  # JSON knows none of NumPy's

    def arms(self, criteria: tuple[str, ...]) -> tuple[Arm, ...]:
        """Return all arms of criteria of these names, in the order in which they run."""
        return tuple(
            Arm(criterion, granularity, scope, protocol)
            for protocol in self.protocols
            for criterion in criteria
            for granularity in self.granularities
            for scope in self.scopes
        )


@dataclasses.dataclass(frozen=True)
class Config(Study):
    """Train a network, prune it at every level, and score them all."""

    criteria: tuple[str, ...] = ("magnitude",)
    """magnitude, l1, random, synflow, saliency, snip, grasp, fisher, wanda, ria, my_module:mine."""

    preset: Literal["quick", "challenge"] = "quick"
    """quick: 2 epochs, 1 seed, minutes. challenge: 20 epochs, 3 seeds, hours on a CPU."""

    dataset: str = "fashion_mnist"
    """fashion_mnist, mnist, idx:FOLDER, npz:FILE, folder:DIR, text:FILE or tfds:NAME."""

    data_dir: Path | None = None
    """Folder that holds the four idx files (.gz or not) of fashion_mnist or mnist."""

    examples: int | None = None
    """Take only the first so many training examples, and at most as many to validate and test."""

    context: int = 128
    """Tokens in a window of a text."""

    network: str = "mlp"
    """mlp, convnet, resnet20, transformer, or my_module:make (make(example) -> Network)."""

    task: str | None = None
    """classification, tokens, regression, or my_module:my_loss. Default: what the targets are."""

    hidden_sizes: tuple[int, ...] = (1000, 1000, 500, 200)
    """Units of the hidden layers of the mlp."""

    learning_rate: float = 1e-3
    """Adam's step size."""

    run_dir: Path | None = None
    """Folder of the run; given again, it goes on there. Default: runs/<dataset>-<preset>."""

    def __post_init__(self) -> None:
        """Check every value; see `Study`."""
        super().__post_init__()
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        check_at_least(2, context=self.context)
        if self.examples is not None:
            check_at_least(2, examples=self.examples)
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            sizes = list(self.hidden_sizes)
            raise ValueError(f"hidden_sizes must be sizes of at least 1, got {sizes}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        other = "" if self.network == "mlp" else f"-{self.network.replace(':', '-')}"
        return self.run_dir or Path("runs") / f"{self.dataset_name()}{other}-{self.preset}"

    def settings(self) -> dict[str, Any]:
        """Return, as plain JSON values, what changes results and `run_sweep` does not see."""
        sizes = {"hidden_sizes": list(self.hidden_sizes)} if self.network == "mlp" else {}
        return {
            "dataset": self.dataset_name(),
            "network": self.network,
            "learning_rate": self.learning_rate,
            **sizes,
        }

    def dataset_name(self) -> str:
        """Return the data set without the place where it is kept; its digest is compared too."""
        kind, colon, place = self.dataset.partition(":")
        if not colon:
            return kind
        if kind == "tfds":
            return place.replace("/", "-").replace(":", "-")
        path = Path(place).expanduser().resolve()
        name = path.stem if kind in ("npz", "text") else path.name
        return "".join(c if c.isprintable() else "_" for c in name) or kind


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


def parse_granularity(name: str) -> tuple[str, tuple[int, ...]]:
    """Return the kind of a granularity, and its numbers.

    Raises:
        ValueError: there is no such granularity.

    Example:
        >>> parse_granularity("block4x1"), parse_granularity("2:4"), parse_granularity("unit")
        (('block', (4, 1)), ('n:m', (2, 4)), ('unit', ()))
    """
    if name in ("weight", "unit", "row"):
        return name, ()
    for kind, pattern in (("block", r"block(\d+)x(\d+)"), ("n:m", r"(\d+):(\d+)")):
        if found := re.fullmatch(pattern, name):
            return kind, (int(found[1]), int(found[2]))
    raise ValueError(
        "granularities must be among weight, unit, row, such as block4x4, and such as 2:4, got "
        f"{name}"
    )


def levels_of(granularity: str) -> tuple[float, ...] | None:
    """Return the only levels that a granularity has, in percent; None where it has all."""
    kind, numbers = parse_granularity(granularity)
    if kind != "n:m":
        return None
    n, m = numbers
    if not 0 < n < m:
        raise ValueError(f"n:m keeps n of m, with 0 < n < m, got {granularity}")
    return 0.0, 100 * (m - n) / m


def check_granularities(study: Study) -> None:
    """Raise ValueError where granularities are unknown, or do not fit the rest of a study."""
    given = study.granularities
    if not given or len(set(given)) < len(given):
        raise ValueError(
            f"granularities must be distinct and at least one, got {' '.join(given) or 'none'}"
        )
    for name in given:
        levels = levels_of(name)
        if levels and (not set(study.levels) <= {*levels} or "trained" in study.protocols):
            raise ValueError(
                f"granularity {name} has the levels 0 and {levels[1]:g}, and the protocol one_shot"
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
            f"got {' '.join(map(str, given)) or 'none'}"
        )


def check_at_least(least: int, **values: Any) -> None:
    """Raise TypeError or ValueError, naming it, for what is no whole number or is too small."""
    for name, value in values.items():
        if not hasattr(value, "__index__") or isinstance(value, bool):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
