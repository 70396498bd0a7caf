"""Which of several functions is fastest here, of those that return the same; and was before."""

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import files

# A measurement: of so many rounds at least, and at most, and of so many seconds in between.
_ROUNDS = 9, 30
_SECONDS = 0.5
_REMEMBERED = 1000  # choices, of which the oldest go


def remembered(kind: str, choose: Callable[[], Any]) -> Any:
    """Return what was chosen for a kind on this machine, or choose.

    Choices are in `choices.json` in the user's cache; what is not there, cannot be read or cannot
    be written is chosen anew.

    Args:
        kind: whatever the choice depends on besides the machine and the version of JAX.
        choose: returns what JSON holds.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = f"{_processor()} {cores} {jax.__version__}"
    key = hashlib.sha256(f"{machine}\n{kind}".encode()).hexdigest()[:32]
    path, known = files.user_cache() / "choices.json", {}
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        known = found if isinstance(found, dict) else {}
    if key not in known:
        known[key] = choose()
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, json.dumps(dict([*known.items()][-_REMEMBERED:])))
    return known[key]


def _processor() -> str:
    """Return what the processor is called, as precisely as the system tells."""
    with contextlib.suppress(OSError, IndexError):
        with open("/proc/cpuinfo") as file:
            return [line for line in file if line.startswith("model name")][0]
    return platform.processor() or platform.machine()


def fastest(choices: Sequence[Callable[[Any], Any]], x: Any) -> int:
    """Return which function is fastest at `x`, of those that return what the first does."""
    expected = jax.block_until_ready(choices[0](x))
    others = enumerate(choices[1:], 1)
    valid = [0, *(i for i, choice in others if same(choice(x), expected))]
    seconds: dict[int, list[float]] = {i: [] for i in valid}
    start = time.perf_counter()
    # In turns, so that whatever else the machine does falls on all alike.
    while len(seconds[0]) < _ROUNDS[0] or (
        len(seconds[0]) < _ROUNDS[1] and time.perf_counter() - start < _SECONDS
    ):
        for i in valid:
            begin = time.perf_counter()
            jax.block_until_ready(choices[i](x))
            seconds[i].append(time.perf_counter() - begin)
    # Whatever else the machine does makes some calls slower, and none faster.
    return min(valid, key=lambda i: float(np.quantile(seconds[i], 0.25)))


def same(found: Any, expected: Any) -> bool:
    """Tell whether two networks return the same up to rounding, whatever is not a real number."""

    def close(a: Any, b: Any) -> bool:
        if (a.shape, a.dtype) != (b.shape, b.dtype) or not jnp.issubdtype(a.dtype, jnp.inexact):
            return (a.shape, a.dtype) == (b.shape, b.dtype)
        rounding = max(1e-5, 4 * float(jnp.finfo(a.dtype).eps))
        a, b = (np.asarray(v).astype(np.result_type(v.dtype, np.float64)) for v in (a, b))
        scale = np.max(np.abs(b), initial=0, where=np.isfinite(b))
        return np.allclose(a, b, rtol=0, atol=rounding * scale, equal_nan=True)

    return all(jax.tree.leaves(jax.tree.map(close, found, expected)))
