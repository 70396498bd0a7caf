"""Networks of many kinds: the groups found are those derived by hand, and compact equals masked."""

import time
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from compare import check_compact, derivative, masked_by_hand, quietly, with_zeros

from jaxprune.structure import Graph, compaction, dependency_graph, group_masks

pytestmark = pytest.mark.filterwarnings("ignore:no group of the graph can be pruned")
NORMALISED = "LayerNorm|Mixer|ViT|transformer|Flax scan"
TOLERANCES = {
    name: 5e-5 if any(part in name for part in NORMALISED.split("|")) else 1e-5
    for name in zoo.NETWORKS
}
REASONS = {
    # Tokens and patches: convolutions slide over the pixels that they come from.
    zoo.INPUT: ("it is an axis of the input", "a window slides over it"),
    zoo.OUTPUT: ("it reaches the network's output",),
    zoo.GATHER: ("indexed",),
    zoo.SCAN: ("a scan runs over it",),
    zoo.NONZERO: ("reduce_sum runs over it and a removed unit's value is not neutral",),
}


class Setup(NamedTuple):
    """A network with parameters, its graph, and the derivative that all tests compile once."""

    network: zoo.Network
    params: Any
    graph: Graph
    masked: Any


def make(name: str, dtype: Any = np.float32) -> Setup:
    network = zoo.NETWORKS[name]()
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), network.init(jax.random.key(0)))
    graph = dependency_graph(network.apply, params, cast(network.x, dtype))
    return Setup(network, params, graph, derivative(network.apply))


@cache
def setup(name: str) -> Setup:
    return make(name)


def cast(x: Any, dtype: Any) -> Any:
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def units_by_hand(group: zoo.Group) -> set[tuple[str, int, int, int]]:
    """Return all places of all units: a path, an axis, a position on it and the unit."""
    return {
        (slot.path, slot.axis, slot.offset + repeat * group.units + unit, unit)
        for slot in (*group.masked, *group.outgoing)
        for repeat in range(slot.repeats)
        for unit in range(group.units)
    }


def units_of_graph(group: Any) -> set[tuple[str, int, int, int]]:
    return {
        (member.path, member.axis, position, unit)
        for member in group.members
        for position, unit in enumerate(member.index.tolist())
        if unit >= 0
    }


def names_of_groups(network: zoo.Network, graph: Graph) -> dict[str, str]:
    """Return the library's names of the prunable groups, which hold the same units."""
    by_units = {frozenset(units_of_graph(g)): g.name for g in graph.groups if g.prunable}
    return {
        key: by_units[frozenset(units_by_hand(group))]
        for key, group in (network.groups | network.optional_groups).items()
        if group.prunable
    }


@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_groups_are_those_derived_by_hand(name: str) -> None:
    network, _, graph, _ = setup(name)
    names = names_of_groups(network, graph)  # which fails where units or members differ
    assert set(names.values()) == {group.name for group in graph.groups if group.prunable}
    for key, group in (network.groups | network.optional_groups).items():
        if not group.prunable:
            continue
        assert graph[names[key]].size == group.units
        # Masked with a unit are what makes it, and its consumers where that does not do.
        found = graph[names[key]]
        masked = {
            (m.path, m.axis) for m in found.members if m.role != "consumes" or found.masks_consumers
        }
        assert masked == {(slot.path, slot.axis) for slot in group.masked}
        assert (found.within is not None) == (
            key in network.optional_groups and "/attention/" in key
        )


@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_reasons_are_those_derived_by_hand(name: str) -> None:
    # An axis that cannot be pruned may be reported in parts, as the factors of a product are.
    network, _, graph, _ = setup(name)
    at: dict[tuple[str, int, int], set[str]] = {}
    for group in graph.groups:
        for member in group.members if group.reason else ():
            for position in np.flatnonzero(member.index >= 0):
                at.setdefault((member.path, member.axis, int(position)), set()).add(
                    str(group.reason)
                )
    expected = set()
    for key, group in network.groups.items():
        if group.prunable:
            continue
        for slot in (*group.masked, *group.outgoing):
            for position in range(slot.offset, slot.offset + group.units * slot.repeats):
                place = slot.path, slot.axis, position
                expected.add(place)
                if slot.path == "position" and place not in at:
                    continue  # of the class token alone, which has no other axis to agree with
                if slot.path == "position" and at[place] == {"no leaf produces it"}:
                    continue  # of the positions that the example is too short for
                if slot.path == "embed/embedding" and group.reason == zoo.OUTPUT:
                    assert at[place] == {"indexed"}, key  # as well, and before
                    continue
                assert at[place] <= set(REASONS[group.reason]), key
    # What else is reported is the positions of a flattened image.
    assert {path for path, axis, _ in set(at) - expected} <= {"dense_0/kernel"}


def check(
    name: str,
    made: Setup,
    sparsity: float,
    scope: str,
    inputs: list[Any],
    tolerance: float,
) -> None:
    network, params, graph, masked = made
    masks = group_masks(graph, params, sparsity, scope=scope, min_units=0)
    plan = quietly(compaction, network.apply, params, masks, inputs[0])
    names = names_of_groups(network, graph)
    widths = {key: plan.widths[found][1] for key, found in names.items()}
    left = sum(leaf.size for leaf in jax.tree.leaves(plan.params))
    assert left == network.remaining(widths)
    if scope == "group":
        pruned = {key: round(sparsity * network.groups[key].units + 1e-9) for key in names
                  if key in network.groups}  # fmt: skip
        for key, number in pruned.items():
            assert abs(network.groups[key].units - widths[key] - number) <= 1
    check_compact(masked, params, masks, plan, inputs, tolerance)


# Those of kinds that test_structure has no small network of; the others are slow.
ENOUGH = {"challenge MLP", "MLP, LayerNorm", "ViT", "Flax scan"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in ENOUGH else pytest.mark.slow) for n in zoo.NETWORKS],
)
def test_compact_equals_masked(name: str) -> None:
    made = setup(name)
    inputs = [made.network.x, with_zeros(made.network.x)]
    check(name, made, 0.5, "group", inputs, TOLERANCES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.NETWORKS)
@pytest.mark.parametrize("scope", ["group", "global"])
def test_compact_equals_masked_at_all_sparsities_and_sizes(name: str, scope: str) -> None:
    made = setup(name)
    x, second = made.network.x, made.network.second_x
    for sparsity in (0, 0.3, 0.5, 0.8):
        check(name, made, sparsity, scope, [x, with_zeros(x), second], TOLERANCES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_compact_equals_masked_in_double_precision(name: str) -> None:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        made = make(name, np.float64)
        x = cast(made.network.x, np.float64)
        check(name, made, 0.5, "group", [x, with_zeros(x)], 1e-12)


def flops(apply: Any, params: Any, x: Any) -> float:
    analysis: Any = jax.jit(apply).lower(params, x).compile().cost_analysis()
    return analysis["flops"]


COUNTED = ("challenge MLP", "LeNet-5", "ResNet-20")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in {*COUNTED} - {"LeNet-5"} else pytest.mark.slow)
        for n in zoo.NETWORKS
    ],
)
def test_multiply_adds_fall(name: str) -> None:
    network, params, graph, _ = setup(name)
    if name == "challenge MLP":
        network = zoo.challenge_mlp(real=True)
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(network.init, jax.random.key(0))
        params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), shapes)
        graph = dependency_graph(network.apply, params, network.x)
    masks = group_masks(graph, params, 0.5)
    plan = compaction(network.apply, params, masks, network.x)
    before = flops(network.apply, masked_by_hand(params, masks), network.x)
    after = flops(plan.apply, plan.params, network.x)
    if name == "challenge MLP":
        # Every weight is used once an example, and all are kernels.
        for found, weights in (before, params), (after, plan.params):
            count = 2 * len(network.x) * sum(leaf.size for leaf in jax.tree.leaves(weights))
            assert found == pytest.approx(count, rel=0.05)
    assert after < (before / 2 if name in COUNTED else before)


# Of their time most goes into a first convolution of one channel, or of few: on a CPU XLA takes as
# long for one output channel as for six.
FIRST_CONVOLUTION = ("LeNet-5, classic", "NNX")
LARGER = {  # as they are, too small for their units to count
    "challenge MLP": partial(zoo.challenge_mlp, real=True),
    "MLP, LayerNorm": partial(zoo.norm_mlp, hidden=(512, 384)),
    "MLP, LayerNorm, slow variance": partial(zoo.norm_mlp, hidden=(512, 384), fast=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in zoo.NETWORKS if n not in FIRST_CONVOLUTION])
def test_measured_time_falls(name: str) -> None:
    network = LARGER.get(name, zoo.NETWORKS[name])()
    params = network.init(jax.random.key(0))
    masks = group_masks(
        dependency_graph(network.apply, params, network.x), params, 0.8, min_units=0
    )
    plan = quietly(compaction, network.apply, params, masks, network.x)
    vectors = network.x.ndim == 2 and jnp.issubdtype(network.x.dtype, jnp.inexact)
    x = network.inputs(2**12 if vectors else 2**10, network.sizes[-1])
    masked, small = jax.jit(network.apply), jax.jit(plan.apply)

    def seconds(f: Any, params: Any) -> float:
        started = time.perf_counter()
        jax.block_until_ready(f(params, x))
        return time.perf_counter() - started

    whole = jax.tree.map(jnp.asarray, masked_by_hand(params, masks))
    pairs = [(seconds(masked, whole), seconds(small, plan.params)) for _ in range(21)]
    assert np.median([after / before for before, after in pairs]) < 0.9
