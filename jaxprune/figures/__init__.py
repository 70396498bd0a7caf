"""Rows and measurements in, matplotlib figures out; only `save_figures` writes.

Rows and metrics come from `results`; what pruned networks cost comes from `experiments/`. `report`
is next: it puts figures and tables on one page.
"""

from jaxprune.figures.costs import crossover, file_sizes, speedups
from jaxprune.figures.panels import save_figures
from jaxprune.figures.sweeps import (
    calibration_and_churn,
    describe,
    differences,
    draw_figures,
    epoch_training,
    k_sparsity,
    weight_vs_unit,
)

__all__ = [  # what `help` lists
    "calibration_and_churn",
    "crossover",
    "describe",
    "differences",
    "draw_figures",
    "epoch_training",
    "file_sizes",
    "k_sparsity",
    "save_figures",
    "speedups",
    "weight_vs_unit",
]
