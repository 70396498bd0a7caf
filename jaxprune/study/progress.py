"""What a study says while it runs: where it is, how fast, and how long it will take."""

import time
from collections.abc import Callable
from typing import NamedTuple

from jaxprune.config import Arm

_LINE_SECONDS = 10.0
_WARM_SECONDS, _WARM_SHARE = 1.0, 0.1  # of running before a pace is believed: either will do


class Progress(NamedTuple):
    """Where a study is, told after every training call."""

    seed: int
    arm: Arm | None  # None in the dense stage
    epoch: int
    epochs: int
    levels: tuple[float, ...]  # in percent
    losses: tuple[float, ...]  # each level's mean training loss over the call
    rate: float  # training examples a second, all levels counted
    done: float  # the part of the study that is done, in [0, 1]
    compiling: float  # seconds spent on it so far
    seconds_left: float | None  # without compiling what comes; None while it is not known

    def __str__(self) -> str:
        low, high = self.levels[0], self.levels[-1]
        losses = f"loss {self.losses[0]:.3f}"
        if len(self.levels) > 1:
            losses = f"{losses} at {low:g}%, {self.losses[-1]:.3f} at {high:g}%"
        left = f"{self.compiling:.0f} s of compiling so far"
        if self.seconds_left is not None:
            minutes, seconds = divmod(round(self.seconds_left), 60)
            left = f"{minutes}:{seconds:02d} left"
        return (
            f"seed {self.seed} {self.arm or 'dense'} epoch {self.epoch}/{self.epochs} · {losses} · "
            f"{self.rate / 1000:.1f}k examples/s · {left}"
        )


Report = Callable[[Progress | str], None]
"""Told of progress, and in a line of what is out of the ordinary, such as a corrupt checkpoint."""


class Meter:
    """Adds up the work that is done, and reports.

    Work is in forward passes of an example. The pace is the work done over the seconds that it took
    without compiling.
    """

    def __init__(self, report: Report):
        self.report = report
        self.work = self.done = 0
        self._seconds = self._paced = 0.0
        self._last: Progress | None = None

    def add(self, work: int | float, seconds: float) -> None:
        """Count work, and the seconds that it took without compiling."""
        self.done += work
        self._paced += work
        self._seconds += seconds

    def tell(self, seed: int, arm: Arm | None, epoch: int, epochs: int, **what: object) -> None:
        """Report where the study is; `what` are further fields of `Progress`."""
        left = None
        if self._seconds >= _WARM_SECONDS or self._paced >= _WARM_SHARE * self.work > 0:
            left = (self.work - self.done) * self._seconds / self._paced
        done = min(self.done / max(self.work, 1), 1.0)
        self._last = Progress(seed, arm, epoch, epochs, done=done, seconds_left=left, **what)  # pyright: ignore[reportArgumentType]
        self.report(self._last)

    def finish(self) -> None:
        """Report that all is done."""
        if self._last is not None:
            self.report(self._last._replace(done=1.0, seconds_left=0.0))


def lines(say: Callable[[str], None]) -> Report:
    """Return a report that says notes, and a line an epoch of a stage or every ten seconds."""
    last = ("", -_LINE_SECONDS)

    def report(what: Progress | str) -> None:
        nonlocal last
        text, now = str(what), time.perf_counter()
        if isinstance(what, str):
            say(f"note: {what}")
        elif (
            (epoch := text.split(" · ")[0]) != last[0]
            or now - last[1] >= _LINE_SECONDS
            or what.done == 1
        ):
            last = epoch, now
            say(f"{what.done:4.0%}  {text}")

    return report
