"""Score weights with a pure function, and get every sparsity level of the network at once.

`magnitude` (or a function of one's own) scores the parameters, `counts` says how many to prune,
`masks_at` turns both into the masks of all levels, and `apply_masks` applies them. `run_sweep` is
the whole study, and `load_run` gives its results back. Nothing is imported before it is used, so
`import jaxprune` is instant.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxprune.evaluate import evaluate_levels
    from jaxprune.masks import apply_masks, masks_at, sparsity_of, unit_masks, weight_masks
    from jaxprune.results import load_run
    from jaxprune.scores import magnitude
    from jaxprune.sparse import compile_sparse, load_sparse, save_sparse
    from jaxprune.sparsity import counts, num_pruned
    from jaxprune.structure import compact, compaction, dependency_graph, group_masks
    from jaxprune.study import prune_curve, run_sweep
    from jaxprune.train import make_train

__version__ = "0.1.0"

__all__ = [
    "apply_masks",
    "compact",
    "compaction",
    "compile_sparse",
    "counts",
    "dependency_graph",
    "evaluate_levels",
    "group_masks",
    "load_run",
    "load_sparse",
    "magnitude",
    "make_train",
    "masks_at",
    "num_pruned",
    "prune_curve",
    "run_sweep",
    "save_sparse",
    "sparsity_of",
    "unit_masks",
    "weight_masks",
]

_MODULES = {
    "apply_masks": "masks",
    "compact": "structure",
    "compaction": "structure",
    "compile_sparse": "sparse",
    "counts": "sparsity",
    "dependency_graph": "structure",
    "evaluate_levels": "evaluate",
    "group_masks": "structure",
    "load_run": "results",
    "load_sparse": "sparse",
    "magnitude": "scores",
    "make_train": "train",
    "masks_at": "masks",
    "num_pruned": "sparsity",
    "prune_curve": "study",
    "run_sweep": "study",
    "save_sparse": "sparse",
    "sparsity_of": "masks",
    "unit_masks": "masks",
    "weight_masks": "masks",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
