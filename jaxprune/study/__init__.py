"""The study as functions: every level of a network trained elsewhere, or a whole sweep.

Network, data and settings come in, rows come out; with a run directory also checkpoints, and a run
that goes on where it was stopped. `experiments/sweep.py` is a thin command on `run_sweep`.
"""

from jaxprune.study.progress import Progress as Progress
from jaxprune.study.sweep import prune_curve as prune_curve
from jaxprune.study.sweep import run_sweep as run_sweep

__all__ = ["Progress", "prune_curve", "run_sweep"]
