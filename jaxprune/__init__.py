"""Score weights with a pure function, and get every sparsity level of the network at once.

`magnitude` (or a function of one's own) scores the parameters, `counts` says how many to prune,
`masks_at` turns both into the masks of all levels, and `apply_masks` applies them. `run_sweep` is
the whole study, and `load_run` gives its results back. Nothing is imported before it is used, so
`import jaxprune` is instant.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxprune.config import Arm, Study
    from jaxprune.criteria import criterion, magnitude, random, saliency
    from jaxprune.distribution import counts, num_pruned
    from jaxprune.evaluate import evaluate_levels
    from jaxprune.granularity import unit, weight
    from jaxprune.masks import apply_masks, masks_at, sparsity_of, unit_masks, weight_masks
    from jaxprune.networks import linen, network, nnx
    from jaxprune.report import write_report
    from jaxprune.results import load_run
    from jaxprune.sparse import compile_sparse, load_sparse, save_sparse
    from jaxprune.structure import (
        compact,
        compaction,
        dependency_graph,
        group,
        group_masks,
        layers,
        prunable,
        remaining,
    )
    from jaxprune.study import prune_curve, run_sweep
    from jaxprune.tasks import classification, own_loss, regression, tokens
    from jaxprune.train import make_train
    from jaxprune.types import Batch, Criterion, Granularity, Metric, Network, Problem, Task

__version__ = "0.1.0"

_MODULES = {
    "config": "Arm Study",
    "criteria": "criterion magnitude random saliency",
    "distribution": "counts num_pruned",
    "evaluate": "evaluate_levels",
    "granularity": "unit weight",
    "masks": "apply_masks masks_at sparsity_of unit_masks weight_masks",
    "networks": "linen network nnx",
    "report": "write_report",
    "results": "load_run",
    "sparse": "compile_sparse load_sparse save_sparse",
    "structure": (
        "compact compaction dependency_graph group group_masks layers prunable remaining"
    ),
    "study": "prune_curve run_sweep",
    "tasks": "classification own_loss regression tokens",
    "train": "make_train",
    "types": "Batch Criterion Granularity Metric Network Problem Task",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}
# What is no dependency of the core, by the extra that brings it.
_EXTRAS = {
    "sparse": "constriction llvmlite numba safetensors zstandard",
    "study": "PIL array_record flax matplotlib orbax rich scipy tensorflow_datasets tyro",
}

__all__ = [*sorted(_HOME)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        try:
            return importlib.import_module(f"{__name__}.{name}")  # jp.schedules
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise _missing(error) from error
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    globals()[name] = value
    return value


def _missing(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Name the extra that brings a package which is not there."""
    package = (error.name or "").split(".")[0]
    for extra, packages in _EXTRAS.items():
        if package in packages.split():
            message = f"{package} is not installed: pip install 'jaxprune[{extra}]' brings it"
            return ModuleNotFoundError(message, name=error.name)
    return error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
