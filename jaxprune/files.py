"""Files that are written whole or not at all; those of runs, checkpoints and sparse networks."""

import contextlib
import os
import secrets
from pathlib import Path


def write(path: Path, data: bytes | str) -> None:
    """Write a file under another name, to disk, and rename it; an error leaves nothing.

    Whoever else writes to `path` at the same time, it is always the whole of what one has written.
    Killed in the middle, a hidden file `.*.tmp` stays beside it.

    Raises:
        OSError: it cannot be written.
    """
    staged = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        with staged.open("xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            staged.unlink()
    with contextlib.suppress(PermissionError):  # where directories cannot be opened
        sync(path.parent)


def sync(path: Path) -> None:
    """Make the contents of a file, or the names in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
