"""Rows and measurements in, matplotlib figures out; only `save_figures` writes.

A sweep's come from `results`; what pruned networks cost comes from `structure` and from
`experiments/inference_speed.py`. This is the last stage.
"""

from jaxprune.figures.costs import CROSSOVER as CROSSOVER
from jaxprune.figures.costs import file_sizes as file_sizes
from jaxprune.figures.costs import speedups as speedups
from jaxprune.figures.costs import widths as widths
from jaxprune.figures.panels import save_figures as save_figures
from jaxprune.figures.sweeps import calibration_and_churn as calibration_and_churn
from jaxprune.figures.sweeps import describe as describe
from jaxprune.figures.sweeps import draw_figures as draw_figures
from jaxprune.figures.sweeps import epoch_training as epoch_training
from jaxprune.figures.sweeps import k_sparsity as k_sparsity
from jaxprune.figures.sweeps import weight_vs_unit as weight_vs_unit
