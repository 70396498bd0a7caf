"""Checked examples in three splits: what every way of loading ends in.

In come the arrays that a loader read, and what to call them in messages; out comes `Data`.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_VALIDATION = 5000
_VALIDATION_KEY = 20170825  # any constant would do: the day Fashion-MNIST was published
_LARGEST = np.finfo(np.float32).max


class Split(NamedTuple):
    """Examples: inputs `x` and targets `y`, arrays of any shape with a leading examples axis."""

    x: Any
    y: Any


class Data(NamedTuple):
    """A data set: `train` to learn from, `val` to choose by, `test` for reporting alone."""

    train: Split
    val: Split
    test: Split


class DataError(ValueError):
    """A data set is missing or damaged; the message names the file and is one printable line."""

    def __init__(self, message: str):
        # Names of files may hold line breaks, and bytes that are not UTF-8.
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class Loaded(NamedTuple):
    """A split as it was read: arrays, and what messages call them, such as a file's path."""

    x: NDArray[Any]
    y: NDArray[Any]
    x_place: str
    y_place: str


@contextlib.contextmanager
def reading(place: object) -> Iterator[None]:
    """Turn what decoders raise for a file that is damaged, or cannot be read, into DataError."""
    try:
        yield
    except DataError:
        raise
    # Each decoder has errors of its own, and raises any of a dozen others.
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        reason = reason or type(error).__name__
        raise DataError(f"{place}: cannot be read: {reason}") from None


def free_memory() -> int | None:
    """Return the bytes that new arrays can fill, or None where the system does not say."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def check_memory(place: object, needed: int) -> None:
    """Refuse, before it is read, a data set that takes more bytes than are free."""
    free = free_memory()
    if free is not None and needed > free:
        raise DataError(
            f"{place}: needs {needed / 1e9:.1f} GB of memory, of which {free / 1e9:.1f} GB are free"
        )


def make_data(train: Loaded, test: Loaded, val: Loaded | None = None) -> Data:
    """Check the parts and return them as float32 or int32.

    What targets and inputs may be, `load` says. Without `val`, a part of `train` is set aside.

    Raises:
        DataError: parts that are empty, do not fit together, or hold what cannot be learnt from.
    """
    parts = [train, test] if val is None else [train, test, val]
    for part in parts:
        _check_fit(part, train)
    shape, place = train.y.shape, train.y_place
    tokens = len(shape) == 2 and _kind(train.x) == _kind(train.y) == "i" and train.x.shape == shape
    if _kind(train.y) == "f":
        found = [_finite(part.y, part.y_place) for part in parts]
        targets = [y[:, None] if y.ndim == 1 else y for y in found]  # as networks return them
    elif _kind(train.y) == "i" and shape in ((len(train.y),), (len(train.y), 1)) and not tokens:
        targets = _classes([part._replace(y=part.y.reshape(-1)) for part in parts])
    elif _kind(train.y) == "i" and len(shape) == 2:
        targets = [_int32(part.y, part.y_place, lowest=-1) for part in parts]
    else:
        raise DataError(
            f"{place}: {train.y.dtype} of shape {shape}: targets are integers (n,) (classes) or "
            "(n, tokens), or floats"
        )
    inputs = [_inputs(part, tokens) for part in parts]
    splits = [Split(x, y) for x, y in zip(inputs, targets, strict=True)]
    if val is None:
        chosen = _validation(targets[0], place)
        x, y = splits[0]
        splits = [Split(x[~chosen], y[~chosen]), splits[1], Split(x[chosen], y[chosen])]
    learn, report, choose = (Split(_scaled(x), y) for x, y in splits)
    data = Data(learn, choose, report)
    if tokens and outputs_of(data) < 2:
        raise DataError(f"{train.x_place}: one token only")
    return data


def outputs_of(data: Data) -> int:
    """Return how many outputs a network needs for each thing that it predicts.

    Args:
        data: with targets y: integers (n,) or (n, tokens), or floats (n,) or (n, …, targets).

    Returns:
        The number of classes: the largest label of all splits, and 1. Of tokens the size of the
        vocabulary: the largest in x and y, and 1. Of floats the size of the last axis; 1 for (n,).

    Example:
        >>> split = Split(np.zeros((2, 28, 28), np.float32), np.array([0, 9], np.int32))
        >>> outputs_of(Data(split, split, split))
        10
    """
    y = data.train.y
    if not np.issubdtype(y.dtype, np.integer):
        return y.shape[-1] if y.ndim > 1 else 1
    arrays = [split.y for split in data]
    if y.ndim > 1 and np.issubdtype(data.train.x.dtype, np.integer):
        arrays += [split.x for split in data]
    return 1 + max(int(np.max(array, initial=0)) for array in arrays)


def _kind(array: NDArray[Any]) -> str:
    """Return "i" for integers of all kinds, "f" for floats, another letter for what is neither."""
    return "i" if array.dtype.kind in "biu" else array.dtype.kind


def _check_fit(part: Loaded, train: Loaded) -> None:
    """Refuse lengths, shapes and types that do not go together."""
    for values, place in ((part.x, part.x_place), (part.y, part.y_place)):
        if not values.size:
            raise DataError(f"{place}: empty")
        if not values.ndim:
            raise DataError(f"{place}: one number, not an array of examples")
    if len(part.x) != len(part.y):
        raise DataError(
            f"{part.y_place}: {len(part.y):,} targets, but {len(part.x):,} inputs in {part.x_place}"
        )
    for values, place, others, other_place in (
        (part.x, part.x_place, train.x, train.x_place),
        (part.y, part.y_place, train.y, train.y_place),
    ):
        if values.shape[1:] != others.shape[1:]:
            shapes = values.shape[1:], others.shape[1:]
            raise DataError(f"{place}: shape {shapes[0]}, but {shapes[1]} in {other_place}")
        if _kind(values) != _kind(others):
            raise DataError(f"{place}: {values.dtype}, but {others.dtype} in {other_place}")


def _inputs(part: Loaded, tokens: bool) -> NDArray[Any]:
    """Return the inputs, checked; bytes are not scaled yet."""
    x, place = part.x, part.x_place
    if tokens:
        return _int32(x, place, lowest=0)
    if x.dtype == np.uint8:
        return x
    if x.dtype.kind == "f":
        return _finite(x, place)
    raise DataError(f"{place}: {x.dtype}: inputs are floats, or uint8 to be divided by 255")


def _scaled(x: NDArray[Any]) -> NDArray[Any]:
    return np.divide(x, np.float32(255), dtype=np.float32) if x.dtype == np.uint8 else x


def _finite(values: NDArray[Any], place: str) -> NDArray[np.float32]:
    """Return float32, if no value is NaN or too large for it."""
    bad = ~((values >= -_LARGEST) & (values <= _LARGEST))
    if bad.any():
        example = int(bad.reshape(len(values), -1).any(1).argmax())
        raise DataError(f"{place}: example {example:,} holds {values[bad][0]}: not finite")
    return values.astype(np.float32, copy=False)


def _int32(values: NDArray[Any], place: str, *, lowest: int) -> NDArray[np.int32]:
    low, high = int(values.min()), int(values.max())
    if low < lowest or high >= 2**31 - 1:
        raise DataError(f"{place}: tokens must be in [{lowest}, 2^31 - 2], got [{low}, {high}]")
    return values.astype(np.int32, copy=False)


def _classes(parts: list[Loaded]) -> list[NDArray[np.int32]]:
    """Return labels from 0, if they are those of a classification."""
    classes = np.unique(parts[0].y)
    first, last = int(classes[0]), int(classes[-1])
    if len(classes) == 1:
        raise DataError(f"{parts[0].y_place}: one class only, {first}")
    if not 0 <= first <= 1 or last - first + 1 != len(classes):
        raise DataError(
            f"{parts[0].y_place}: labels must be 0, 1, 2, ... (or 1, 2, ...) without a gap, "
            f"got {len(classes)} different ones in [{first}, {last}]"
        )
    for part in parts[1:]:
        low, high = int(part.y.min()), int(part.y.max())
        if low < first or high > last:
            raise DataError(
                f"{part.y_place}: labels must be in [{first}, {last}] as in training, "
                f"got [{low}, {high}]"
            )
    return [part.y.astype(np.int32) - np.int32(first) for part in parts]


def _validation(y: NDArray[Any], place: str) -> NDArray[np.bool_]:
    """Mark the examples to validate on: a twelfth, 5,000 at most, the same ones every time.

    Equally many are taken of each class, and of none more than half.
    """
    by_class = y.ndim == 1 and y.dtype.kind == "i"
    sizes = np.bincount(y) if by_class else np.array([len(y)])
    wanted = min(_VALIDATION, len(y) // 12) // len(sizes)
    each = min(max(wanted, 1), int(sizes.min()) // 2)
    if not each:
        what = f"class {sizes.argmin()} has " if by_class else ""
        raise DataError(f"{place}: {what}one training example: validation needs one more")
    # Raw draws stay the same from one version of NumPy to the next; a Generator's may not.
    draws = np.random.Philox(key=_VALIDATION_KEY).random_raw(len(y))
    chosen = np.zeros(len(y), bool)
    for label in range(len(sizes)):
        members = np.flatnonzero(y == label) if by_class else np.arange(len(y))
        chosen[members[np.argsort(draws[members])[:each]]] = True
    return chosen
