from fractions import Fraction

import pytest

from jaxprune import config, distribution, schedules

SCHEDULES = [schedules.cubic]
TARGETS = [config.sparsity_of_level(level) for level in (0.0, 0.1, 25.0, 99.9, 100.0)]


def test_cubic_by_hand():
    k = Fraction(8, 10)
    points = [Fraction(0), Fraction(1, 4), Fraction(1, 2), Fraction(3, 4), Fraction(1)]
    expected = [Fraction(0), k * 37 / 64, Fraction(7, 10), k * 63 / 64, k]
    assert [schedules.cubic(k, t) for t in points] == expected


def test_cubic_agrees_with_floats():
    for i in range(101):
        t = i / 100
        exact = schedules.cubic(Fraction(9, 10), Fraction(i, 100))
        assert float(exact) == pytest.approx(0.9 * (1 - (1 - t) ** 3), abs=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", TARGETS)
def test_schedules_rise_to_the_target(schedule, target):
    values = [schedule(target, Fraction(i, 30)) for i in range(31)]
    assert values[0] == 0
    assert values[-1] == target
    assert values == sorted(values)
    assert all(type(value) is Fraction for value in values)
    if target:
        assert len(set(values)) == 31


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("progress", [Fraction(-1, 10**9), 1 + Fraction(1, 10**9), Fraction(2)])
def test_schedules_refuse_progress_out_of_range(schedule, progress):
    with pytest.raises(ValueError, match=rf"progress must be in \[0, 1\], got {progress}"):
        schedule(Fraction(1, 2), progress)


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
                distribution.num_pruned(size, schedule(target, progress))
                for progress in schedules.update_steps(steps, 10).values()
            ]
            assert counts == sorted(counts)
            assert counts[-1] == distribution.num_pruned(size, target)
