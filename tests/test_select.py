import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import select

keep_largest = select.keep_largest

SMALLEST = np.float32(1e-45)  # denormal
INPUTS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "absolute": lambda rng, n: np.abs(rng.normal(size=n)),
    "tied": lambda rng, n: rng.integers(-3, 4, n),
    "two values": lambda rng, n: rng.integers(0, 2, n),
    "constant": lambda rng, n: np.full(n, 0.1),
    "mostly zero": lambda rng, n: np.where(rng.random(n) < 0.95, 0, rng.normal(size=n)),
    "zero of both signs": lambda rng, n: np.where(rng.random(n) < 0.5, 0.0, -0.0),
    "denormal": lambda rng, n: rng.integers(-5, 6, n) * SMALLEST,
    "denormal and zero": lambda rng, n: np.where(rng.random(n) < 0.5, -0.0, SMALLEST),
    "all magnitudes": lambda rng, n: rng.normal(size=n) * 10.0 ** rng.integers(-44, 38, n),
    "infinite": lambda rng, n: rng.choice([-np.inf, -1, 0, np.inf], n),
    "rising": lambda rng, n: np.arange(n) - n // 2,
    "falling": lambda rng, n: n // 2 - np.arange(n),
    "not a number": lambda rng, n: np.where(rng.random(n) < 0.1, np.nan, rng.normal(size=n)),
    # Elements that differ in their last bits only, so that levels share all digits but the last.
    "close": lambda rng, n: 1 + rng.integers(0, 9, n) * np.float32(2**-23),
}
BELOW, ABOVE = 997, 40_013  # of the size from which on nothing is sorted


def scores_of(kind, n, dtype="float32"):
    values = INPUTS[kind](np.random.default_rng(n), n)
    with np.errstate(over="ignore"):
        return values.astype(np.float32).astype(jnp.dtype(dtype))


def counts_of(n):
    """Return counts out of order, some twice, some next to each other."""
    counts = [n // 3, 0, n, 1, n - 1, n // 3, n // 3 + 1, n // 2, 9 * n // 10, 99 * n // 100, 0, n]
    return np.array(counts, np.int32)


def reference(scores, counts):
    """Prune the first `counts` of a stable sort, NaN before all others."""
    scores = np.asarray(scores, np.float64)
    order = np.lexsort((np.arange(scores.size), scores, ~np.isnan(scores)))
    keep = np.ones((len(counts), len(scores)), bool)
    for row, count in zip(keep, counts, strict=True):
        row[order[:count]] = False
    return keep


def check(keep, scores, counts):
    np.testing.assert_array_equal(keep, reference(scores, counts))
    np.testing.assert_array_equal(len(scores) - np.asarray(keep).sum(1), counts)
    rising = np.asarray(keep)[np.argsort(counts, kind="stable")]
    assert (rising[1:] <= rising[:-1]).all()  # nested


@pytest.mark.parametrize(
    ("scores", "pruned"),
    [
        ([3.0, 1.0, 2.0], [1, 2, 0]),
        ([1.0, 1.0, 1.0], [0, 1, 2]),
        ([2.0, 1.0, 2.0, 1.0], [1, 3, 0, 2]),
        ([0.0, -0.0, 0.0], [0, 1, 2]),
        ([-0.0, 0.0, -1e-45, 1e-45], [2, 0, 1, 3]),
        ([-1.0, 1.0, -2.0, 0.0], [2, 0, 3, 1]),
        ([np.inf, -np.inf, 3e38, -3e38], [1, 3, 2, 0]),
        ([5.0], [0]),
        ([1.0, np.nan, -np.inf, -np.nan], [1, 3, 2, 0]),
    ],
)
def test_by_hand(scores, pruned):
    n = len(scores)
    keep = keep_largest(jnp.array(scores), jnp.arange(n + 1))
    assert keep.dtype == bool
    assert [np.flatnonzero(~row).tolist() for row in np.asarray(keep)] == [
        sorted(pruned[:count]) for count in range(n + 1)
    ]


@pytest.mark.parametrize("size", [BELOW, ABOVE])
@pytest.mark.parametrize("kind", INPUTS)
def test_agrees_with_a_stable_sort(kind, size):
    scores, counts = scores_of(kind, size), counts_of(size)
    check(keep_largest(jnp.asarray(scores), jnp.asarray(counts)), scores, counts)


@pytest.mark.parametrize("size", [BELOW, ABOVE])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_types(dtype, size):
    counts = counts_of(size)
    for kind in ("normal", "denormal", "zero of both signs", "all magnitudes", "not a number"):
        scores = scores_of(kind, size, dtype)
        check(keep_largest(jnp.asarray(scores), jnp.asarray(counts)), scores, counts)


@pytest.mark.parametrize("size", [BELOW, ABOVE])
def test_float64(size):
    rng = np.random.default_rng(size)
    scores = 1 + 1e-12 * rng.integers(-50, 50, size)  # all the same in float32
    scores[::7] = -0.0
    scores[1::7] = 0.0
    scores[2::7] *= -1
    counts = counts_of(size)
    with jax.enable_x64(True):
        keep = keep_largest(jnp.asarray(scores), jnp.asarray(counts))
    check(keep, scores, counts)


@pytest.mark.parametrize("size", [1, 2, 29_999, 30_000])
def test_sizes(size):
    counts = counts_of(size).clip(0, size)
    for kind in ("tied", "normal"):
        scores = scores_of(kind, size)
        check(keep_largest(jnp.asarray(scores), jnp.asarray(counts)), scores, counts)


@pytest.mark.parametrize("size", [1, 2049])
def test_histograms_are_a_sort(size):
    # On an accelerator even large arrays are sorted: both ways have to agree at any size.
    counts = jnp.asarray(counts_of(size).clip(0, size))
    by_sort, by_histograms = jax.jit(select._by_sort), jax.jit(select._by_histograms)
    for kind in ("normal", "tied", "zero of both signs", "close"):
        bits = select._ordered_bits(jnp.asarray(scores_of(kind, size)))
        np.testing.assert_array_equal(by_histograms(bits, counts), by_sort(bits, counts))


def test_large_arrays_are_not_sorted_on_a_cpu():
    counts = jnp.zeros(2, jnp.int32)
    sorts = [
        "stablehlo.sort" in keep_largest.lower(jnp.zeros(size), counts).as_text()
        for size in (29_999, 30_000)
    ]
    assert sorts == [True, False]


@pytest.mark.parametrize("size", [BELOW, ABOVE])
@pytest.mark.parametrize("kind", ["constant", "normal"])
def test_every_rank_of_levels_that_share_digits(kind, size):
    # Neighbouring counts share the threshold, or all of its digits but the last.
    scores = scores_of(kind, size)
    middle = size // 2
    counts = np.arange(middle - 6, middle + 6, dtype=np.int32)
    check(keep_largest(jnp.asarray(scores), jnp.asarray(counts)), scores, counts)


@pytest.mark.parametrize("size", [BELOW, ABOVE])
def test_under_vmap(size):
    kinds = ["normal", "tied", "mostly zero"]
    scores = jnp.stack([jnp.asarray(scores_of(kind, size)) for kind in kinds])
    counts = jnp.asarray(counts_of(size))
    both = jnp.stack([counts, counts[::-1], counts // 2])
    for keep, s, c in zip(jax.vmap(keep_largest)(scores, both), scores, both, strict=True):
        check(keep, s, c)


def test_levels_by_vmap():
    scores, counts = jnp.asarray(scores_of("tied", BELOW)), jnp.asarray(counts_of(BELOW))
    one_by_one = jax.jit(jax.vmap(lambda c: keep_largest(scores, c[None])[0]))(counts)
    np.testing.assert_array_equal(one_by_one, keep_largest(scores, counts))


@pytest.mark.parametrize("size", [BELOW, ABOVE])
def test_no_levels(size):
    assert keep_largest(jnp.zeros(size), jnp.zeros(0, jnp.int32)).shape == (0, size)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_other_numbers(dtype):
    scores = jnp.array([3, 0, 1, 0]).astype(dtype)
    keep = keep_largest(scores, jnp.arange(5))
    np.testing.assert_array_equal(keep, reference(scores, range(5)))


def test_compiled_once_for_all_counts():
    traces = []

    @jax.jit
    def f(scores, counts):
        traces.append(None)
        return keep_largest(scores, counts)

    for seed in range(4):
        rng = np.random.default_rng(seed)
        scores = rng.normal(size=BELOW).astype(np.float32)
        counts = rng.integers(0, BELOW + 1, 5).astype(np.int32)
        check(f(scores, counts), scores, counts)
    assert len(traces) == 1


@pytest.mark.slow
def test_more_elements_than_float32_can_count():
    size = 2**24 + 3
    counts = np.array([2**24 + 1, size - 1], np.int32)
    keep = np.asarray(keep_largest(jnp.ones(size), jnp.asarray(counts)))
    for row, count in zip(keep, counts, strict=True):
        assert not row[:count].any()
        assert row[count:].all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("size", [BELOW, ABOVE])
@pytest.mark.parametrize("kind", ["normal", "infinite", "not a number", "constant"])
def test_what_is_not_alive_goes_first_whatever_its_score(kind, size, dtype):
    with jax.enable_x64(dtype == "float64"):
        scores = scores_of(kind, size, dtype)
        alive = np.random.default_rng(1).random(size) < 0.3
        gone = size - int(alive.sum())
        counts = np.array([0, 1, gone - 1, gone, gone + 1, (gone + size) // 2, size], np.int32)
        keep = np.asarray(keep_largest(jnp.asarray(scores), jnp.asarray(counts), alive))
        np.testing.assert_array_equal(size - keep.sum(1), counts)
        assert (keep[1:] <= keep[:-1]).all()
        assert keep[:4, alive].all()
        within = reference(scores[alive], counts[4:] - gone)
        np.testing.assert_array_equal(keep[4:, alive], within)
