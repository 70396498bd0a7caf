"""What all tests share: two CPU devices, strict JAX, checked shapes and types, real data."""

import atexit
import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Before the first import of jax.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)
# Each sweep makes its programs anew, most of them the same, as do processes beside and below this.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory()
    atexit.register(compiled.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
from jaxtyping import install_import_hook

import jaxprune

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

gc.set_threshold(200_000, 20, 100)  # traced programs are many objects: a twentieth of the time

# Before the first import of a module of the package. An int is a float, as for every type checker.
# The interpreters of traced programs call millions of small functions: pyright checks these alone.
rooms = {path.stem for path in Path(jaxprune.__path__[0]).iterdir()} - {"structure", "sparse"}
tower = "beartype.BeartypeConf(is_pep484_tower=True)"
install_import_hook([f"jaxprune.{room}" for room in rooms], f"beartype.beartype(conf={tower})")

from jaxprune import data  # noqa: E402

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="session")
def fashion_mnist() -> data.Data:
    """The real data set, as every run sees it; `make data` helps where it is missing."""
    return data.load("fashion_mnist")


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache in place of the user's, for the test and the commands it starts."""
    path = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tensorflow_datasets"))
    return path


@pytest.fixture(scope="session")
def finished_study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, int]:
    """A finished run of two seeds of the small study: its folder, its rows, how often it traced."""
    from tests.studies import Traced, sweep

    folder, traced = tmp_path_factory.mktemp("runs") / "full", Traced()
    return folder, sweep(folder, traced.network, seeds=2), traced.times


@pytest.fixture(scope="module", autouse=True)
def forgotten() -> Iterator[None]:
    """Forget what was compiled, of which two processes would hold nine gigabytes in the end."""
    yield
    jax.clear_caches()
