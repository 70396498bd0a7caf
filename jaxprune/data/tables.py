"""One file that holds a whole data set: NumPy's archives, and text."""

import math
import zipfile
from pathlib import Path

import numpy as np

from jaxprune.data.splits import Data, DataError, Loaded, check_memory, make_data, reading

_WINDOWS = 20  # the fewest of which 5% are one


def load_npz(path: Path) -> Data:
    """Load the arrays x_train, y_train, x_test and y_test, perhaps x_val and y_val."""
    with reading(path), _archive(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        parts = ["train", "test"] + ["val"] * ("x_val" in names or "y_val" in names)
        wanted = [f"{axis}_{part}" for part in parts for axis in "xy"]
        missing = [name for name in wanted if name not in names]
        if missing:
            raise DataError(f"{path}: no array {missing[0]}; it has {', '.join(names) or 'none'}")
        check_memory(path, sum(_bytes(archive, name, path) for name in wanted))
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in wanted}
    read = [
        Loaded(arrays[x], arrays[y], f"{path}: {x}", f"{path}: {y}")
        for x, y in zip(wanted[::2], wanted[1::2], strict=True)
    ]
    return make_data(*read)


def load_text(path: Path, context: int) -> Data:
    """Load windows of characters, and for each character the next one."""
    if context < 1:
        raise DataError(f"context must be at least 1, got {context}")
    with reading(path):
        # Bytes, characters, code points, tokens; what is trained on lies among the tokens.
        check_memory(path, 13 * path.stat().st_size)
        content = path.read_bytes()
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: not UTF-8: byte 0x{content[error.start]:02x} at {error.start:,}"
            ) from None
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    windows = max(len(codes) - 1, 0) // context
    if windows < _WINDOWS:
        raise DataError(
            f"{path}: {len(codes):,} characters are {windows} windows of {context}: "
            f"give a longer text or a smaller context, at least {_WINDOWS} windows are needed"
        )
    occurs = np.zeros(0x110000, bool)
    occurs[codes] = True
    tokens = (np.cumsum(occurs, dtype=np.int32) - 1)[codes]
    size = windows * context
    x, y = (tokens[start : start + size].reshape(windows, context) for start in (0, 1))
    first, second = windows * 90 // 100, windows * 95 // 100
    train, val, test = (
        Loaded(x[part], y[part], str(path), str(path))
        for part in (slice(first), slice(first, second), slice(second, None))
    )
    return make_data(train, test, val)


def _archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise DataError(f"{path}: not an npz archive, or cut short") from None


def _bytes(archive: zipfile.ZipFile, name: str, path: Path) -> int:
    """Return what an array takes as it is stored, and then as float32 or int32."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as file:
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[np.lib.format.read_magic(file)]
        shape, _, dtype = read_header(file)
        found = info.file_size - file.tell()
    if dtype.hasobject:
        raise DataError(f"{path}: {name} holds Python objects, not numbers")
    if found != math.prod(shape) * dtype.itemsize:
        raise DataError(f"{path}: {name} is cut short or damaged: {found:,} bytes of {shape}")
    return math.prod(shape) * (dtype.itemsize + 4)
