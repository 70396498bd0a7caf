"""Every sparsity level of a network trained elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxprune.config import Study, sparsity_of_level
from jaxprune.data import Data
from jaxprune.networks import as_network
from jaxprune.results import Row
from jaxprune.study.dense import prune_dense
from jaxprune.study.epoch import Running, Where, keys_of
from jaxprune.study.programs import Programs
from jaxprune.study.progress import Meter
from jaxprune.study.setup import make_setup
from jaxprune.train import TrainState
from jaxprune.types import Apply, Network, Params, State, Task


def prune_curve(
    network: Network | Apply,
    params: Params,
    data: Data,
    study: Study = Study(),
    *,
    state: State | None = None,
    task: Task | None = None,
) -> list[Row]:
    """Prune a network trained elsewhere at every level, by every one-shot arm, and score it.

    Args:
        network: `apply(params, x) -> outputs`, or a `Network`.
        params: its parameters.
        data: `train` is what criteria look at, `val` fits (a temperature), `test` is reported.
        study: criteria, granularities, scopes and levels; epochs, seeds and protocols are not used.
        state: the state of a `Network` that has one.
        task: by default what the targets suggest; see `tasks.default_task`.

    Returns:
        A `Row` an arm and level, of protocol `one_shot`, seed 0 and epoch 0. Churn is against the
        network as given. Seconds do not include compilation.

    Raises:
        ValueError: what does not fit: levels, data, or parameters that cannot be pruned.
        TypeError: likewise.
        config.NotFinite: scores that are not finite.

    Example:
        >>> from jaxprune.data import Split
        >>> images = Split(np.eye(2, dtype=np.float32), np.arange(2, dtype=np.int32))
        >>> params = {"hidden": jnp.diag(jnp.array([2.0, 1.0])), "output": jnp.eye(2)}
        >>> study = jp.Study(levels=(0, 50), granularities=("unit",))
        >>> apply = lambda p, x: jax.nn.relu(x @ p["hidden"]) @ p["output"]
        >>> rows = prune_curve(apply, params, Data(images, images, images), study)
        >>> [(row.target_sparsity, row.metrics["accuracy"]) for row in rows]
        [(0.0, 1.0), (0.5, 0.5)]
    """
    network, state = as_network(network), {} if state is None else state
    study = dataclasses.replace(study, protocols=("one_shot",))
    setup = make_setup(network, data, study, task, None, params, state)
    running = Running(setup, Programs(setup), Meter(lambda _: None), (study.levels,), setup.arms)
    stacked = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (params, state))
    carry = TrainState(stacked[0], stacked[1], ())
    batch = setup.batch(keys_of(0).scoring)
    rows = prune_dense(running, Where(0, None, 0, (0.0,)), carry, batch).rows
    place = {float(sparsity_of_level(level)): i for i, level in enumerate(study.levels)}
    arms = {arm: i for i, arm in enumerate(setup.arms)}
    return sorted(rows, key=lambda row: (arms[row.arm], place[row.target_sparsity]))
