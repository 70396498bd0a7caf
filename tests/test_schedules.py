import math
from fractions import Fraction

import pytest

from jaxprune import config, distribution, schedules

SCHEDULES = [schedules.cubic, schedules.linear, schedules.cosine, schedules.geometric]
TARGETS = [config.sparsity_of_level(level) for level in (0.0, 0.1, 25.0, 99.9)]


def test_cubic_by_hand():
    k = Fraction(8, 10)
    expected = [Fraction(0), k * 37 / 64, Fraction(7, 10), k * 63 / 64, k]
    assert [*schedules.cubic(0.8, begin=0, end=4).values()] == expected
    assert schedules.cubic_share(Fraction(1, 4)) == Fraction(37, 64)
    assert schedules.cubic(1, begin=3, end=9, every=7) == {3: 1}


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        (schedules.cubic, lambda t: 0.9 * (1 - (1 - t) ** 3)),
        (schedules.linear, lambda t: 0.9 * t),
        (schedules.cosine, lambda t: 0.45 * (1 - math.cos(math.pi * t))),
        (schedules.geometric, lambda t: 1 - 0.1**t),
        (schedules.constant, lambda t: 0.9),
    ],
)
def test_schedules_agree_with_floats(schedule, formula):
    found = schedule(0.9, begin=0, end=100)
    assert [*found] == [*range(101)]
    for i, value in found.items():
        assert float(value) == pytest.approx(formula(i / 100), abs=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("begin", "end", "every"), [(0, 30, 1), (5, 300, 7), (2, 2, 9), (1, 8, 5)])
def test_schedules_rise_to_the_target_exactly(schedule, target, begin, end, every):
    found = schedule(target, begin=begin, end=end, every=every)
    values = [*found.values()]
    assert [*found] == [*range(begin, end + 1, every)]
    assert values[-1] == target
    assert values == sorted(values)
    assert all(type(value) is Fraction for value in values)
    assert values[0] == (target if len(values) == 1 else 0)
    if target:
        assert len({*values}) == len(values)


@pytest.mark.parametrize("schedule", [*SCHEDULES, schedules.constant])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"end": 4}, r"ends no earlier: got 5, 4"), ({"begin": -1}, "begins at 0 or later"),
        ({"every": 0}, "every must be at least 1, got 0"), ({"target": 1.3}, r"in \[0, 1\]"),
    ],
)  # fmt: skip
def test_schedules_that_cannot_be(schedule, change, words):
    given = {"target": 0.5, "begin": 5, "end": 9, "every": 1} | change
    with pytest.raises(ValueError, match=words):
        schedule(given.pop("target"), **given)


@pytest.mark.parametrize("progress", [Fraction(-1, 10**9), 1 + Fraction(1, 10**9), Fraction(2)])
def test_schedules_refuse_progress_out_of_range(progress):
    with pytest.raises(ValueError, match=rf"progress must be in \[0, 1\], got {progress}"):
        schedules.cubic_share(progress)
    with pytest.raises(ValueError, match="must be < 1"):
        schedules.geometric(1, begin=0, end=3)


@pytest.mark.parametrize(
    ("steps", "updates", "expected"),
    [
        (4, 2, {0: Fraction(1, 2), 2: Fraction(1)}),
        (4, 4, {0: Fraction(1, 4), 1: Fraction(1, 2), 2: Fraction(3, 4), 3: Fraction(1)}),
        (7, 3, {0: Fraction(1, 3), 2: Fraction(2, 3), 4: Fraction(1)}),
        (3, 10, {0: Fraction(4, 10), 1: Fraction(7, 10), 2: Fraction(1)}),
        (2, 3, {0: Fraction(2, 3), 1: Fraction(1)}),
        (5, 1, {0: Fraction(1)}),
        (1, 1, {0: Fraction(1)}),
        (1, 10, {0: Fraction(1)}),
    ],
)
def test_update_steps_by_hand(steps, updates, expected):
    assert schedules.update_steps(steps, updates) == expected


@pytest.mark.parametrize("updates", [1, 2, 3, 10, 50])
def test_update_steps_are_even_and_reach_the_end(updates):
    for steps in [*range(1, 70), 429, 2145]:
        found = schedules.update_steps(steps, updates)
        at, progress = list(found), list(found.values())
        assert len(found) == min(steps, updates)
        assert at[0] == 0
        assert at[-1] <= steps - 1  # before the last step at the latest
        assert progress[-1] == 1
        assert progress == sorted(set(progress))
        gaps = {b - a for a, b in zip(at, [*at[1:], steps], strict=True)}
        assert max(gaps) - min(gaps) <= 1
        if steps >= updates:
            assert progress == [Fraction(u, updates) for u in range(1, updates + 1)]


@pytest.mark.parametrize(("steps", "updates"), [(0, 1), (1, 0), (-1, 10), (5, -2)])
def test_update_steps_refuses(steps, updates):
    with pytest.raises(ValueError, match=f"must be at least 1, got {steps}, {updates}"):
        schedules.update_steps(steps, updates)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 3, 429])
def test_counts_of_a_run_rise_to_those_of_the_target(schedule, steps):
    for size in (1, 7, 1000, 784_000, 2**24 + 1):
        for target in TARGETS:
            counts = [
                distribution.num_pruned(size, share)
                for share in schedule(target, begin=0, end=10 * steps, every=steps).values()
            ]
            assert counts == sorted(counts)
            assert counts[-1] == distribution.num_pruned(size, target)
