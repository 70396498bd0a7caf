"""The study's two functions: a whole study, and every level of a network trained elsewhere.

Everything is checked first; `record` finds what is done, and `stages` does the rest.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune import results, trees
from jaxprune.config import Arm, NotFinite, Study, phases, sparsity_of_level
from jaxprune.data import Data, Split, digest
from jaxprune.evaluate import make_score
from jaxprune.identity import Identity, combine, fingerprint
from jaxprune.masks import apply_masks
from jaxprune.networks import as_network
from jaxprune.results import Row
from jaxprune.study.dense import prune_dense
from jaxprune.study.epoch import Running, keys_of, repeat
from jaxprune.study.programs import Programs
from jaxprune.study.progress import Meter, Report, lines
from jaxprune.study.record import Record
from jaxprune.study.setup import Setup, make_setup
from jaxprune.study.stages import UPDATES_PER_EPOCH, run
from jaxprune.train import TrainState, check_batch_size, init_state, make_step
from jaxprune.types import Apply, Correction, Masks, Network, Params, State, Task


def run_sweep(
    network: Network,
    data: Data,
    study: Study = Study(),
    *,
    task: Task | None = None,
    optimizer: optax.GradientTransformation | None = None,
    run_dir: Path | str | None = None,
    settings: dict[str, Any] | None = None,
    report: Report | None = None,
) -> list[Row]:
    """Train a network, prune it at every level by every arm, and score it all.

    All arms of a seed share its initial weights, batch order and dense run. In the protocol
    `trained` the levels branch off the dense run after the dense epochs of `config.phases`, with
    its state and its optimizer's; the sparsity then follows `schedules.cubic` over 10 updates a
    pruning epoch, each of which selects anew among what is still kept. A trained level whose loss
    is not finite is noted and marked, its metrics None, and the others go on.

    Args:
        network: what is trained and pruned; see `networks`.
        data: training, validation and test examples.
        study: seeds, arms, levels and epochs.
        task: by default what the targets suggest; see `tasks.default_task`.
        optimizer: any optax transformation; by default Adam with step size 1e-3.
        run_dir: where rows, settings and checkpoints are kept, and found again: the same call goes
            on with what is there, and one with more arms, levels or seeds adds to it. None keeps
            nothing.
        settings: further settings to record and to compare, such as the data set's name.
        report: told of the progress, and in lines of what is out of the ordinary; by default both
            are written to standard error.

    Returns:
        All rows, by seed, arm, epoch and level.

    Raises:
        ValueError: a setting that does not fit, or a run directory made otherwise.
        TypeError: likewise.
        config.NotFinite: a dense network's loss, or scores, are not finite; other rows are kept.
        OSError: the run directory cannot be written.

    Example:
        >>> from jaxprune import data, networks
        >>> net = jp.network(*networks.mlp(784, (100, 50), 10))
        >>> study = jp.Study(levels=(0, 90), epochs=1, granularities=("weight",))
        >>> rows = run_sweep(net, data.load("fashion_mnist"), study, report=lambda _: None)
        >>> [(row.protocol, row.target_sparsity) for row in rows]
        [('one_shot', 0.0), ('one_shot', 0.9), ('trained', 0.0), ('trained', 0.9)]
    """
    report = report or lines(partial(print, file=sys.stderr, flush=True))
    if not isinstance(network, Network):
        raise TypeError("network must be a Network: jp.network(init, apply) makes one")
    params, state = jax.eval_shape(network.init, jax.random.key(0))
    setup = make_setup(network, data, study, task, optimizer, params, state)
    if wrong := [name for name, each in setup.criteria.items() if isinstance(each, Correction)]:
        raise ValueError(f"{wrong[0]} also corrects weights, which `prune_curve` does and no sweep")
    check_batch_size(study.batch_size, len(setup.data.train.x))
    folder = None if run_dir is None else Path(run_dir)
    identities = _identities(setup, state)
    for note in dict.fromkeys(found.note for found in identities.values() if found.note):
        report(note)
    config = _config(setup, identities, digest(data), settings or {})
    record = Record(folder, config, report)
    with contextlib.closing(record):
        return _go_on(setup, record, Meter(report))


def _go_on(setup: Setup, record: Record, meter: Meter) -> list[Row]:
    """Run what is missing of a run, in the order and in the way in which it was begun."""
    setup = setup._replace(stepped=record.config.get("stepped", setup.stepped))
    programs = Programs(setup)
    order = tuple(arm for arm in record.arms if arm in setup.arms)
    try:
        run(Running(setup, programs, meter, record.waves, order), record)
    except NotFinite as error:
        if (rows := sum(map(len, record.rows.values()))) and record.folder is not None:
            error.add_note(f"{rows} rows are kept")
        raise
    record.add_seconds("compilation", programs.clock.compiling)
    record.config["compilations"] += programs.clock.count
    return record.finish()


def _config(
    setup: Setup, identities: dict[Any, Identity], data_sha256: str, more: dict[str, Any]
) -> dict[str, Any]:
    """Return what `config.json` shall say of a study."""
    study, shapes = setup.study, trees.paths_and_leaves(setup.params)
    settings = {
        "epochs": study.epochs, "phases": list(phases(study.epochs)),
        "updates_per_pruning_epoch": UPDATES_PER_EPOCH, "batch_size": study.batch_size,
        "score_batch": study.score_batch, "recalibrate": study.recalibrate,
        "task": setup.task.name,
        "parameters": {path: list(leaf.shape) for path, leaf in shapes},
        "prunable": [path for (path, _), flag in zip(shapes, setup.flags, strict=True) if flag],
        "examples": {name: len(split.x) for name, split in setup.data._asdict().items()},
        "data_sha256": data_sha256,
    }  # fmt: skip
    if taken := [name for name in more if name in settings]:
        raise ValueError(f"settings may not hold {taken[0]!r}, which the study records itself")
    arms = [
        {
            **arm._asdict(),
            "settings": results.plain(setup.criteria[arm.criterion].settings),
            "identity": combine(scores=identities["criterion", arm.criterion], arm=list(arm)),
        }
        for arm in setup.arms
    ]
    network = {name: identities[name] for name in ("init", "step", "score")}
    return {
        "settings": results.plain(settings | more),
        "identity": combine(**network),
        "arms": arms,
        "levels": [list(study.levels)],
        "seeds": study.seeds,
        "metrics": [metric._asdict() for metric in setup.metrics],
        "stepped": setup.stepped,
    }


def _identities(setup: Setup, state: Any) -> dict[Any, Identity]:
    """Hash initialisation, a training step, scoring, and the scores of every criterion."""
    network = setup.network
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = jax.eval_shape(setup.batch, key)
    carry = jax.eval_shape(lambda key: init_state(network, key, setup.optimizer), key)
    masks = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, bool), setup.params)
    step = make_step(network, setup.task, setup.optimizer)
    level = jax.eval_shape(lambda *trees: repeat(trees, 1), setup.params, state, masks)
    split = Split(batch.x, batch.y)
    found: dict[Any, Identity] = {
        "init": fingerprint(lambda key: init_state(network, key, setup.optimizer), key),
        "step": fingerprint(step, carry, masks, batch.x, batch.y, key),
        "score": fingerprint(make_score(network, setup.task), *level, split, split, None),
    }
    for name in setup.criteria:
        found["criterion", name] = fingerprint(
            lambda *args, name=name: setup.scores(name, *args), setup.params, state, batch
        )
    return found


def prune_curve(
    network: Network | Apply,
    params: Params,
    data: Data,
    study: Study = Study(),
    *,
    state: State | None = None,
    task: Task | None = None,
    seed: int = 0,
    keep: Callable[[Arm, Params, Masks], None] | None = None,
) -> list[Row]:
    """Prune a network trained elsewhere at every level, by every one-shot arm, and score it.

    Args:
        network: `apply(params, x) -> outputs`, or a `Network`.
        params: its parameters.
        data: `train` is what criteria look at, `val` fits (a temperature), `test` is reported.
        study: criteria, granularities, scopes and levels; epochs, seeds and protocols are not used.
            Criteria may be methods that correct weights too, such as `criteria.method("alps")`.
        state: the state of a `Network` that has one.
        task: by default what the targets suggest; see `tasks.default_task`.
        seed: draws the examples that criteria look at, and is the rows'.
        keep: called with each arm, and the parameters and masks of its levels but 0, which have a
            leading levels axis.

    Returns:
        A `Row` an arm and level, of protocol `one_shot` and epoch 0. Churn is against the network
        as given. Seconds do not include compilation, but for methods that correct weights.

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
    params, state = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (params, state))
    batch = setup.batch(keys_of(seed).scoring)
    rows: list[Row] = []
    found = prune_dense(running, seed, 0, TrainState(params, state, ()), batch, rows.extend)
    for arm, items in found.items.items() if keep is not None else ():
        assert keep is not None
        masks = items["masks"]
        own = items.get("params")
        if own is None:
            own = jax.tree.map(lambda w, m: jnp.repeat(w, len(m), axis=0), params, masks)
        keep(arm, jax.vmap(apply_masks)(own, masks), masks)
    place = {float(sparsity_of_level(level)): i for i, level in enumerate(study.levels)}
    return sorted(rows, key=lambda row: (setup.arms.index(row.arm), place[row.target_sparsity]))
