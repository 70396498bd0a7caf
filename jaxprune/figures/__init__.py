"""Rows and measurements in, matplotlib figures out; only `save_figures` writes.

Rows and metrics come from `results`; what pruned networks cost comes from `experiments/`. `report`
is next: it puts figures and tables on one page.
"""

from jaxprune.figures.costs import CROSSOVER as CROSSOVER
from jaxprune.figures.costs import crossover as crossover
from jaxprune.figures.costs import file_sizes as file_sizes
from jaxprune.figures.costs import speedups as speedups
from jaxprune.figures.epochs import epoch_training as epoch_training
from jaxprune.figures.panels import save_figures as save_figures
from jaxprune.figures.sweeps import calibration_and_churn as calibration_and_churn
from jaxprune.figures.sweeps import describe as describe
from jaxprune.figures.sweeps import differences as differences
from jaxprune.figures.sweeps import draw_figures as draw_figures
from jaxprune.figures.sweeps import k_sparsity as k_sparsity
from jaxprune.figures.sweeps import weight_vs_unit as weight_vs_unit

__all__ = [
    "CROSSOVER",
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
