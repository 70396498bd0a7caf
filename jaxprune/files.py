"""Files written whole or not at all, files held, and functions found in a user's files."""

import contextlib
import importlib
import io
import os
import secrets
import sys
from pathlib import Path
from typing import Any


def user_cache() -> Path:
    """Return where to keep what can be had again, `$XDG_CACHE_HOME/jaxprune` or `~/.cache/...`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "jaxprune").expanduser()


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


def lock(path: Path) -> io.TextIOWrapper:
    """Hold a file against other processes until it is closed; nothing where the system cannot.

    Raises:
        ValueError: another process holds it.
        OSError: it cannot be written.
    """
    file = path.open("w")
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(f"{path.parent} is being written by another process") from None
    return file


def import_function(spec: str, *others: type) -> Any:
    """Return what `module:function` names: a function, or a value of the `others`.

    Modules are found in the current directory too. As with `python -m`, it comes first in
    `sys.path` from then on, so that the module may import its neighbours, now or later.

    Args:
        spec: such as `my_module:my_scores`.
        others: types of what serves in place of a function.

    Raises:
        ValueError: in one line, it is not of that form, the module does not import (and why), or
            it has no such function.

    Example:
        >>> import_function("math:sqrt")(9)
        3.0
    """
    module, _, name = spec.partition(":")
    if not module or not name.isidentifier():
        raise ValueError(f"expected module:function, got {spec!r}")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()  # for a file written since
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{spec}: importing {module} failed: {reason}") from error
    if not hasattr(found, name):
        raise ValueError(f"{spec}: {module} has no {name!r}")
    if not callable(value := getattr(found, name)) and not isinstance(value, others):
        raise ValueError(f"{spec} is no function but of type {type(value).__name__}")
    return value
