"""The study as functions: every level of a network trained elsewhere, or a whole sweep.

`init`, `apply` and data come in, rows come out; with a run directory also checkpoints, and a run
that goes on where it was stopped. `experiments/sweep.py` is a thin command on `run_sweep`.
"""

from jaxprune.config import TrainingDiverged
from jaxprune.study.curve import prune_curve
from jaxprune.study.groups import Progress
from jaxprune.study.sweep import run_sweep

__all__ = ["Progress", "TrainingDiverged", "prune_curve", "run_sweep"]
