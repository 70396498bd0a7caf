"""A small study for the tests of `study`, and how its rows are compared."""

import dataclasses
import functools

import numpy as np
import optax

import jaxprune as jp
from jaxprune import networks
from jaxprune.config import Arm, Study
from jaxprune.data import Data, Split

FEATURES, HIDDEN, CLASSES = 8, (16, 12), 3
LEVELS = (0.0, 50.0, 90.0)
# Epochs 1 and 2 are dense, 3 and 4 prune, 5 is masked; of 9 steps.
STUDY = Study(levels=LEVELS, epochs=5, batch_size=32)
ADAM: optax.GradientTransformation = optax.adam(1e-2)


def arm(protocol, granularity, criterion="magnitude", scope="layer"):
    return Arm(criterion, granularity, scope, protocol)


def make_data(seed=0):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(CLASSES, FEATURES))

    def split(n):
        y = rng.integers(0, CLASSES, n)
        x = centers[y] + rng.normal(size=(n, FEATURES))
        return Split(x.astype(np.float32), y.astype(np.int32))

    return Data(split(300), split(60), split(90))


DATA = make_data()
init, apply = networks.mlp(FEATURES, HIDDEN, CLASSES)
NETWORK = networks.network(init, apply)


def silent(what):
    """Report nothing."""


def sweep(run_dir=None, network=NETWORK, data=DATA, optimizer=ADAM, report=silent, **changes):
    """Run the small study; what is no option of `run_sweep` changes the settings."""
    options = {name: changes.pop(name) for name in ("task", "settings") if name in changes}
    study = dataclasses.replace(STUDY, **changes)
    return jp.run_sweep(
        network, data, study, optimizer=optimizer, run_dir=run_dir, report=report, **options
    )


def timeless(row):
    return dataclasses.replace(row, train_seconds=0.0, mask_seconds=0.0, eval_seconds=0.0)


def key_of(row):
    return (*row.arm, row.seed, row.epoch, row.target_sparsity)


def assert_same_rows(rows, expected):
    """Compare rows, in any order, times aside."""
    rows, expected = ({key_of(row): timeless(row) for row in rs} for rs in (rows, expected))
    assert rows.keys() == expected.keys()
    for key, row in rows.items():
        assert row == expected[key]


def pick(rows, **wanted):
    return [row for row in rows if all(getattr(row, k) == v for k, v in wanted.items())]


class Traced:
    """A network that counts how often it is traced to score."""

    def __init__(self, network=NETWORK):
        self.times = 0

        @functools.wraps(apply)
        def counted(params, state, x):
            self.times += 1
            return network.apply(params, state, x)

        self.network = network._replace(apply=counted)
