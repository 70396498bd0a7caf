"""Score weights with a pure function, and get every sparsity level of the network at once.

`magnitude` (or a function of one's own) scores the parameters, `counts` says how many to prune,
`masks_at` turns both into the masks of all levels, and `apply_masks` applies them. `run_sweep` is
the whole study, and `load_run` gives its results back. Nothing is imported before it is used, so
`import jaxprune` is instant.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxprune.config import Arm as Arm
    from jaxprune.config import Study as Study
    from jaxprune.criteria import criterion as criterion
    from jaxprune.criteria import magnitude as magnitude
    from jaxprune.criteria import random as random
    from jaxprune.criteria import saliency as saliency
    from jaxprune.distribution import counts as counts
    from jaxprune.distribution import num_pruned as num_pruned
    from jaxprune.evaluate import evaluate_levels as evaluate_levels
    from jaxprune.granularity import unit as unit
    from jaxprune.granularity import weight as weight
    from jaxprune.masks import apply_masks as apply_masks
    from jaxprune.masks import masks_at as masks_at
    from jaxprune.masks import sparsity_of as sparsity_of
    from jaxprune.masks import unit_masks as unit_masks
    from jaxprune.masks import weight_masks as weight_masks
    from jaxprune.networks import linen as linen
    from jaxprune.networks import network as network
    from jaxprune.networks import nnx as nnx
    from jaxprune.report import write_report as write_report
    from jaxprune.results import load_run as load_run
    from jaxprune.schedules import constant as constant
    from jaxprune.schedules import cosine as cosine
    from jaxprune.schedules import cubic as cubic
    from jaxprune.schedules import geometric as geometric
    from jaxprune.schedules import linear as linear
    from jaxprune.schedules import one_shot_at as one_shot_at
    from jaxprune.sparse import compile_sparse as compile_sparse
    from jaxprune.sparse import load_sparse as load_sparse
    from jaxprune.sparse import save_sparse as save_sparse
    from jaxprune.structure import compact as compact
    from jaxprune.structure import compaction as compaction
    from jaxprune.structure import dependency_graph as dependency_graph
    from jaxprune.structure import group as group
    from jaxprune.structure import group_masks as group_masks
    from jaxprune.structure import layer_inputs as layer_inputs
    from jaxprune.structure import layers as layers
    from jaxprune.structure import prunable as prunable
    from jaxprune.structure import remaining as remaining
    from jaxprune.study import prune_curve as prune_curve
    from jaxprune.study import run_sweep as run_sweep
    from jaxprune.tasks import classification as classification
    from jaxprune.tasks import own_loss as own_loss
    from jaxprune.tasks import regression as regression
    from jaxprune.tasks import tokens as tokens
    from jaxprune.train import make_train as make_train
    from jaxprune.transforms import forward as forward
    from jaxprune.transforms import gradual as gradual
    from jaxprune.transforms import masks_of as masks_of
    from jaxprune.transforms import rigl as rigl
    from jaxprune.transforms import set as set
    from jaxprune.transforms import sparsify as sparsify
    from jaxprune.transforms import static as static
    from jaxprune.transforms import ste as ste
    from jaxprune.transforms import update_masks as update_masks
    from jaxprune.types import Batch as Batch
    from jaxprune.types import Criterion as Criterion
    from jaxprune.types import Granularity as Granularity
    from jaxprune.types import Metric as Metric
    from jaxprune.types import Network as Network
    from jaxprune.types import Problem as Problem
    from jaxprune.types import Task as Task

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
        "compact compaction dependency_graph group group_masks layer_inputs layers prunable "
        "remaining"
    ),
    "schedules": "constant cosine cubic geometric linear one_shot_at",
    "study": "prune_curve run_sweep",
    "tasks": "classification own_loss regression tokens",
    "train": "make_train",
    "transforms": "forward gradual masks_of rigl set sparsify static ste update_masks",
    "types": "Batch Criterion Granularity Metric Network Problem Task",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}
# What is no dependency of the core, by the extra that brings it.
_EXTRAS = {
    "sparse": "constriction llvmlite numba safetensors zstandard",
    "study": (
        "PIL array_record flax importlib_resources matplotlib orbax rich scipy tensorflow_datasets "
        "tyro"
    ),
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
