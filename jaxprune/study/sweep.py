"""A whole sweep: train a network, prune it at every level, one-shot and trained, and score it all.

Settings come in and are checked; `record` finds what is done, and `groups` does the rest.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune import config, trees
from jaxprune.data import Data, digest
from jaxprune.results import Row
from jaxprune.scores import magnitude
from jaxprune.study.curve import Remaining, name_of
from jaxprune.study.groups import (
    UPDATES_PER_EPOCH,
    Progress,
    Sweep,
    dense_group,
    trained_group,
)
from jaxprune.study.record import Record
from jaxprune.types import Apply, Array, Granularity, Params, Prunable, Scope, Scores


def run_sweep(
    init: Callable[[Array], Params],
    apply: Apply,
    data: Data,
    *,
    seeds: int = 1,
    levels: Sequence[int | float] = config.LEVELS,
    epochs: int = 2,
    methods: Sequence[Granularity] = config.METHODS,
    protocols: Sequence[str] = config.PROTOCOLS,
    batch_size: int = 128,
    optimizer: optax.GradientTransformation | None = None,
    scores: Callable[[Params], Scores] = magnitude,
    scope: Scope = "layer",
    prunable: Prunable | None = None,
    remaining: Remaining | None = None,
    run_dir: Path | str | None = None,
    settings: dict[str, Any] | None = None,
    report: Callable[[Progress], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Row]:
    """Train a network, prune it at every level, one-shot and trained, and score it all.

    All levels and methods of a seed share its initial weights and batch order. In the protocol
    `trained` the levels branch off the dense run after the dense epochs of `config.phases`, with
    its optimizer state; the sparsity then follows `schedules.cubic` over 10 updates a pruning
    epoch, each of which selects anew among what is still kept.

    Args:
        init: `init(key) -> params`.
        apply: `apply(params, x) -> logits`.
        data: training, validation and test examples.
        seeds: how many; seed n trains from `jax.random.key(n)`.
        levels: sparsities in percent.
        epochs: of the dense run, and of the `trained` protocol in all.
        methods: `weight`, `unit` or both.
        protocols: `one_shot`, `trained` or both.
        batch_size: examples in a training batch.
        optimizer: any optax transformation; by default Adam with step size 1e-3.
        scores: the criterion.
        scope: `layer` or `global`.
        prunable: which leaves take part; see `trees.prunable_leaves`.
        remaining: counts the weights left once pruned units are removed, such as
            `models.mlp_remaining`; without it rows say None.
        run_dir: where rows, settings and checkpoints are kept, and found again: the same call
            goes on with what is there. None keeps nothing.
        settings: further settings to record and to compare, such as the optimizer's.
        report: told of the progress after every training call.
        note: told, in a line, of what is out of the ordinary, such as a corrupt checkpoint.

    Returns:
        All rows, in the order computed.

    Raises:
        ValueError: a setting out of range, or a run directory made with other settings.
        config.TrainingDiverged: a loss is not finite; the rows before it are kept.
        OSError: the run directory cannot be written.

    Example:
        >>> from jaxprune import data, models
        >>> init, apply = models.mlp(784, (100, 50), 10)
        >>> fashion = data.load("fashion_mnist")
        >>> rows = run_sweep(init, apply, fashion, levels=(0, 90), epochs=1, methods=("weight",))
        >>> [(row.protocol, row.target_sparsity) for row in rows]
        [('one_shot', 0.0), ('trained', 0.0), ('one_shot', 0.9), ('trained', 0.9)]
    """
    levels = tuple(map(float, levels))
    config.check_levels(levels)
    config.check_choices("methods", tuple(methods), config.METHODS)
    config.check_choices("protocols", tuple(protocols), config.PROTOCOLS)
    config.check_at_least_one(seeds=seeds, epochs=epochs)
    if not 1 <= batch_size <= len(data.train.y):
        raise ValueError(
            f"batch_size must be in [1, {len(data.train.y)}], the size of the training set, "
            f"got {batch_size}"
        )
    phases = config.phases(epochs)
    initial = jax.eval_shape(init, jax.random.key(0))
    flags = trees.prunable_leaves(initial, prunable)
    shapes = {path: list(leaf.shape) for path, leaf in trees.paths_and_leaves(initial)}

    def group_of(row: Row) -> str:
        shared = row.protocol == "one_shot" or not row.target_sparsity or row.epoch <= phases[0]
        return dense_group(row.seed) if shared else trained_group(row.method, row.seed)

    record = Record(
        None if run_dir is None else Path(run_dir),
        {
            "levels": list(levels), "epochs": epochs, "phases": list(phases),
            "updates_per_pruning_epoch": UPDATES_PER_EPOCH, "methods": list(methods),
            "protocols": list(protocols), "batch_size": batch_size,
            "criterion": name_of(scores), "scope": scope, "parameters": shapes,
            "prunable": [path for path, flag in zip(shapes, flags, strict=True) if flag],
            "examples": {name: len(split.y) for name, split in data._asdict().items()},
            "data_sha256": digest(data), **(settings or {}),
        },
        seeds,
        lambda seed: [dense_group(seed), *(trained_group(method, seed) for method in methods)],
        group_of, note or (lambda _: None),
    )  # fmt: skip
    with contextlib.closing(record):
        Sweep(
            init=init, apply=apply, optimizer=optimizer or optax.adam(1e-3), scores=scores,
            data=jax.tree.map(jnp.asarray, data), record=record, report=report or (lambda _: None),
            levels=levels, epochs=epochs, methods=tuple(methods), protocols=tuple(protocols),
            batch_size=batch_size, scope=scope, prunable=prunable, remaining=remaining,
        ).run(seeds)  # fmt: skip
        return record.finish()
