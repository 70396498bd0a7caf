"""Sparse networks in files: what comes back, how small it is, and what damaged files do."""

import base64
import errno
import gzip
import hashlib
import io
import json
import math
import os
import stat
import sys
import tracemalloc
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import scipy.sparse
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune import apply_masks, load_sparse, save_sparse, weight_masks
from jaxprune.sparse import codec, lossless_bound, storage

LOSSY = ["float16", "int8", "codebook4", "codebook5", "codebook6"]
DTYPES = "float16 bfloat16 float32 float64 float8_e4m3fn int8 int32 uint16 int4 bool complex64"


def kernel(shape=(70, 90), seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def largest(w, sparsity):
    """The mask of the weights of largest magnitude, as `weight_masks` gives it."""
    return np.asarray(weight_masks({"w": w, "logits": w}, sparsity)["w"])


def round_trip(tmp_path, params, masks, **options):
    save_sparse(tmp_path / "net", params, masks, **options)
    assert [file.name for file in tmp_path.iterdir()] == ["net"]
    return load_sparse(tmp_path / "net")


def check_same(got, expected):
    """Compare containers, dtypes, shapes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        theirs = np.asarray(theirs)
        assert type(ours) is np.ndarray
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.tobytes() == theirs.tobytes()


def check_lossless(tmp_path, params, masks, **options):
    got, got_masks = round_trip(tmp_path, params, masks, **options)
    check_same(got_masks, masks)
    zeroed = jax.tree.map(lambda w, m: np.where(m, w, np.zeros_like(w)), params, masks)
    check_same(got, zeroed)


def test_by_hand(tmp_path):
    params = {"dense": jnp.array([[1.5, -0.0, np.nan], [7.0, -2.0, np.inf]])}
    masks = {"dense": np.array([[True, True, False], [False, True, False]])}
    got, got_masks = round_trip(tmp_path, params, masks)
    check_same(got, {"dense": np.array([[1.5, -0.0, 0.0], [0.0, -2.0, 0.0]], np.float32)})
    check_same(got_masks, masks)


@pytest.mark.parametrize(
    "tree",
    [
        {},
        [],
        (),
        None,
        1.5,
        np.ones(()),
        {"a": {}, "b": [None, ()], "c": (1, [2.0, {"d": True}])},
        {1: np.ones(2), 0: {"logits": np.zeros(3)}},
        [{"1": np.ones(1)}, {1: np.zeros(1)}],
        {"a/b": np.ones(1), "a": {"b": np.zeros(1)}},
        {"Größe \ud800": np.ones(2), "": np.zeros((0, 3)), "0" * 64: np.zeros((2, 0, 1))},
    ],
)
@pytest.mark.parametrize("keep", [True, False])
def test_trees(tmp_path, tree, keep):
    masks = jax.tree.map(lambda w: np.full(np.shape(w), keep), tree)
    check_lossless(tmp_path, tree, masks)
    check_lossless(tmp_path, tree, masks, values="codebook4")


@pytest.mark.parametrize("shape", [(1,), (7,), (300,), (9, 1), (1, 9), (100, 80), (3, 3, 8, 16)])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 1.0])
def test_shapes_and_sparsities(tmp_path, shape, sparsity):
    w = kernel(shape)
    check_lossless(tmp_path, {"w": w}, {"w": largest(w, sparsity)})


@pytest.mark.parametrize("dtype", DTYPES.split())
def test_every_bit_of_every_dtype(tmp_path, dtype):
    dtype = jnp.dtype(dtype)
    rng = np.random.default_rng(0)
    if dtype in (bool, jnp.int4):
        w = rng.integers(0, 2, size=(40, 30)).astype(dtype)
    else:  # all patterns, so NaNs with payloads, infinities, subnormals and -0 too
        w = rng.integers(0, 256, size=(40, 30 * dtype.itemsize)).astype(np.uint8).view(dtype)
    params, masks = {"pruned": w, "whole": w}, {"pruned": w.view(np.uint8)[:, :30] < 90}
    masks["whole"] = np.ones(w.shape, bool)
    check_lossless(tmp_path, params, masks)
    if not jnp.issubdtype(dtype, jnp.floating):  # is not quantised
        check_lossless(tmp_path, params, masks, values="int8")


def test_layouts_of_memory(tmp_path):
    w = kernel((30, 40))
    masks = {"w": np.abs(w) > 1}
    check_lossless(tmp_path, {"w": np.asfortranarray(w)}, masks)
    check_lossless(tmp_path, {"w": w[::-1, ::-1]}, masks)
    got, _ = round_trip(tmp_path, {"w": w.astype(">f4")}, masks)
    check_same(got, {"w": np.where(masks["w"], w, np.float32(0))})


@st.composite
def networks(draw):
    sizes = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), max_size=3)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    params, masks = {}, {}
    for i, shape in enumerate(draw(sizes)):
        # From all alike to all different, and rows of uneven density.
        w = rng.integers(0, draw(st.sampled_from([1, 2, 20, 2**32])), size=shape, dtype=np.uint32)
        params[f"{i}"] = w.view(np.float32)
        density = draw(st.floats(0, 1)) * rng.random((shape[0], 1)) ** draw(st.integers(0, 9))
        masks[f"{i}"] = rng.random(shape) < density
    return params, masks


@given(networks())
def test_lossless_round_trip(tmp_path_factory, network):
    check_lossless(tmp_path_factory.mktemp("round_trip"), *network)


@given(st.binary(max_size=300), st.integers(1, 30))
def test_streams_round_trip(data, times):
    data = np.frombuffer(data * times, np.uint8)
    stream = codec.pack(data)
    assert len(stream) <= data.size + 1
    np.testing.assert_array_equal(codec.unpack(stream, data.size), data)
    for wrong in (data.size - 1, data.size + 1):
        if wrong >= 0 and stream[0] != 2:  # an entropy coder's end is not marked
            with pytest.raises(ValueError, match="wrong size"):
                codec.unpack(stream, wrong)


def test_streams_are_near_their_entropy():
    data = np.random.default_rng(0).binomial(40, 0.3, size=100_000).astype(np.uint8)
    share = np.bincount(data)[np.unique(data)] / data.size
    entropy = -(share * np.log2(share)).sum() * data.size / 8
    assert len(codec.pack(data)) < 1.01 * entropy + 100
    assert len(codec.pack(np.tile(np.arange(256, dtype=np.uint8), 100))) < 600  # by zstandard


@pytest.mark.parametrize("density", [0.002, 0.05, 0.5, 0.97])
def test_positions_are_near_their_entropy(density):
    mask = np.random.default_rng(0).random((1000, 1000)) < density
    classes, bits, _ = codec.pack_mask(mask)
    entropy = -(density * np.log2(density) + (1 - density) * np.log2(1 - density)) * 1e6 / 8
    assert len(classes) + len(bits) < 1.01 * entropy + 500


def test_positions_of_uneven_rows_beat_the_bound():
    rng = np.random.default_rng(0)
    density = 0.3 * rng.random((1000, 1)) ** 4 * rng.random((1, 1000)) ** 2
    mask = rng.random((1000, 1000)) < density
    classes, bits, _ = codec.pack_mask(mask)
    entropy = -(density * np.log2(density) + (1 - density) * np.log2(1 - density)).sum() / 8
    bound = lossless_bound([mask]) - 4 * mask.sum()
    assert len(classes) + len(bits) < min(1.1 * entropy, 0.85 * bound)


def test_lossless_bound():
    masks = {"a": np.array([True, False, True, False]), "b": jnp.ones((2, 3), bool)}
    assert lossless_bound(masks) == pytest.approx(math.log2(math.comb(4, 2)) / 8 + 4 * 8)
    mask = np.arange(2000) < 300
    exact = math.log2(math.comb(2000, 300)) / 8 + 1200
    assert lossless_bound([mask]) == pytest.approx(exact, rel=1e-9)
    assert lossless_bound({}) == 0


# Quantised values.


@pytest.mark.parametrize("values", LOSSY)
def test_what_is_quantised(tmp_path, values):
    w = kernel()
    params = {"kernel": w, "bias": w[0], "logits": w, "steps": np.arange(9), "dead": w}
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params)
    masks["kernel"], masks["dead"] = np.abs(w) > 1, np.zeros(w.shape, bool)
    masks["steps"][3] = False
    got, got_masks = round_trip(tmp_path, params, masks, values=values)
    check_same(got_masks, masks)
    expected = jax.tree.map(lambda w, m: np.where(m, w, w.dtype.type(0)), params, masks)
    assert got["kernel"].dtype == np.float32
    assert not got["kernel"][~masks["kernel"]].any()
    assert 0 < np.abs(got["kernel"] - expected["kernel"]).max() < 0.5
    del got["kernel"], expected["kernel"]
    check_same(got, expected)


def test_float16(tmp_path):
    w = np.array([[1.0001, 2.0, 3.0], [1e-9, -65504.0, 7.0]], np.float32)
    masks = {"w": w != 7}
    got, _ = round_trip(tmp_path, {"w": w}, masks, values="float16")
    check_same(got, {"w": np.array([[1, 2, 3], [0, -65504, 0]], np.float32)})
    for dtype in (np.float16, jnp.bfloat16):  # as narrow
        check_lossless(tmp_path, {"w": w.astype(dtype)}, masks, values="float16")


def test_int8_by_hand(tmp_path):
    w = np.array([[127.0, 0.0, 9.0], [-1.4, 2.54, 9.0], [0.6, -0.01, 9.0]], np.float32)
    got, _ = round_trip(tmp_path, {"w": w}, {"w": w != 9}, values="int8")
    expected = [[127.0, 0.0, 0.0], [-1.0, 2.54, 0.0], [1.0, 0.0, 0.0]]
    np.testing.assert_allclose(got["w"], expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("scale", [1, 1e-40, 1e4])
def test_int8_is_within_half_a_step_of_its_channel(tmp_path, dtype, scale):
    w = (kernel((3, 3, 5, 8)) * np.float64(scale)).astype(dtype)
    mask = np.abs(kernel((3, 3, 5, 8), seed=1)) > 0.5
    got, _ = round_trip(tmp_path, {"w": w}, {"w": mask}, values="int8")
    exact, found = (np.where(mask, x.astype(np.float64), 0) for x in (w, got["w"]))
    step = np.abs(exact).max(axis=(0, 1, 2)) / 127
    rounding = np.abs(exact) * float(jnp.finfo(dtype).eps) + float(jnp.finfo(dtype).tiny)
    assert (np.abs(found - exact) <= 0.501 * step + rounding).all()


@pytest.mark.parametrize("bits", [4, 5, 6])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_codebooks_are_k_means(tmp_path, bits, dtype):
    w = kernel(dtype=dtype)
    mask = largest(w, 0.8)
    got, _ = round_trip(tmp_path, {"w": w}, {"w": mask}, values=f"codebook{bits}")
    weights, found = w[mask].astype(np.float64), got["w"][mask].astype(np.float64)
    centroids = np.unique(found)
    assert 2 ** (bits - 1) < centroids.size <= 2**bits
    distance = np.abs(weights[:, None] - centroids)
    np.testing.assert_allclose(np.abs(weights - found), distance.min(axis=1))  # the nearest
    error = np.square(weights - found).sum()
    even = np.linspace(weights.min(), weights.max(), 2**bits)
    factor = 1.0 if dtype == "bfloat16" else 0.9  # whose values are coarse themselves
    assert error < factor * np.square(weights[:, None] - even).min(axis=1).sum()
    if bits == 4 and dtype in ("float32", "float64"):  # each is the mean of its weights
        means = [weights[found == value].mean() for value in centroids]
        np.testing.assert_allclose(means, centroids, rtol=1e-5)


def test_codebooks_of_few_values_are_lossless(tmp_path):
    w = np.random.default_rng(0).choice(kernel((16,)), size=(50, 60))
    check_lossless(tmp_path, {"w": w}, {"w": largest(w, 0.5)}, values="codebook4")
    save_sparse(
        tmp_path / "net", {"w": kernel()}, {"w": largest(kernel(), 0.9)}, values="codebook5"
    )
    params, masks = load_sparse(tmp_path / "net")
    check_lossless(tmp_path, params, masks, values="codebook5")


def test_codebook_can_be_fine_tuned(tmp_path):
    w = kernel()
    masks = {"w": largest(w, 0.9)}
    params, _ = round_trip(tmp_path, {"w": w}, masks, values="codebook4")
    values, index = jnp.unique(jnp.asarray(params["w"]), return_inverse=True)

    def loss(values):
        return jnp.sum(jnp.square(values[index] - w), where=masks["w"])

    gradient = np.asarray(jax.grad(loss)(values))
    error = 2 * np.where(masks["w"], params["w"] - w, 0)
    sums = [error[params["w"] == value].sum() for value in np.asarray(values)]
    np.testing.assert_allclose(gradient, sums, rtol=1e-4, atol=1e-5)
    tuned = {"w": np.where(masks["w"], np.asarray(values - 0.1)[index], np.float32(0))}
    check_lossless(tmp_path, tuned, masks, values="codebook4")


@pytest.mark.parametrize("values", LOSSY)
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_values_that_cannot_be_quantised(tmp_path, values, bad):
    w = np.array([1.0, bad, 2.0], np.float32)
    with pytest.raises(ValueError, match="leaf 'layer/w' has kept weights that are not finite"):
        save_sparse(tmp_path / "n", {"layer": {"w": w}}, {"layer": {"w": w != 1}}, values=values)
    assert not list(tmp_path.iterdir())
    round_trip(tmp_path, {"w": w}, {"w": np.isfinite(w)}, values=values)  # pruned, it may be


# The size of files.


def others(params, masks):
    """Bytes of the same network, pruned, in other forms."""
    dense = jax.tree.map(lambda w, m: np.where(m, w, np.float32(0)), params, masks)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **dense)
    raw = b"".join(leaf.tobytes() for leaf in dense.values())
    csr = [scipy.sparse.csr_matrix(leaf) for leaf in dense.values()]
    kept = sum(int(m.sum()) for m in masks.values())
    return {
        "npz": buffer.tell(),
        "gzip": len(gzip.compress(raw, compresslevel=6)),
        "csr": sum(m.data.nbytes + m.indices.nbytes + m.indptr.nbytes for m in csr),
        "bitmap": sum(-(-m.size // 8) for m in masks.values()) + 4 * kept,
    }


@pytest.fixture(scope="module")
def untrained():
    """A network as it is initialised, whose rows and columns are all alike."""
    shapes = {"hidden_0": (392, 300), "hidden_1": (300, 200), "logits": (200, 10)}
    return {k: kernel(shape) / np.float32(math.sqrt(shape[0])) for k, shape in shapes.items()}


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9, 0.95, 0.99])
def test_smaller_than_the_bound_and_than_others(tmp_path, untrained, level):
    masks = jax.tree.map(np.asarray, weight_masks(untrained, level))
    check_lossless(tmp_path, untrained, masks)
    size = (tmp_path / "net").stat().st_size
    assert size <= (1.0 if level == 0.99 else 0.97) * lossless_bound(masks)
    assert size < min(others(untrained, masks).values())


def test_codebooks_are_forty_times_smaller(tmp_path, untrained):
    masks = jax.tree.map(np.asarray, weight_masks(untrained, 0.95))
    dense = sum(w.nbytes for w in untrained.values())
    sizes = {}
    for values in get_args(storage.Values):
        save_sparse(tmp_path / "net", untrained, masks, values=values)
        sizes[values] = (tmp_path / "net").stat().st_size
    assert 40 * sizes["codebook4"] < dense
    order = ["float32", "float16", "int8", "codebook6", "codebook5", "codebook4"]
    assert sorted(sizes, key=lambda values: -sizes[values]) == order


def test_whole_units_cost_nothing(tmp_path):
    w = kernel((500, 400))
    mask = np.broadcast_to(np.arange(400) % 10 == 0, w.shape)
    check_lossless(tmp_path, {"w": w}, {"w": mask})
    assert (tmp_path / "net").stat().st_size < 0.9 * 4 * mask.sum() + 1000


# The file.


@pytest.fixture
def small(tmp_path):
    """The path of a small file, its bytes and its header."""
    w = kernel((40, 30))
    params = {"a": w, "b": [np.arange(5), w[0]]}
    masks = {"a": largest(w, 0.9), "b": [np.ones(5, bool), np.zeros(30, bool)]}
    path = tmp_path / "small"
    save_sparse(path, params, masks, values="codebook4")
    return path, path.read_bytes()


def forge(raw, change):
    """Change the header and the tensors of a file, and give it the right digest."""
    tensors = safetensors.numpy.load(raw)
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header = json.loads(header["__metadata__"]["jaxprune"])
    header["sha256"] = "0" * 64
    change(header, tensors)
    raw = safetensors.numpy.save(tensors, {"jaxprune": json.dumps(header)})
    return raw.replace(b"0" * 64, hashlib.sha256(raw).hexdigest().encode(), 1)


def test_other_readers_open_it(small):
    path, raw = small
    with safetensors.safe_open(path, "numpy") as file:
        assert list(file.keys()) == ["0 a", "1 b/0", "2 b/1"]
        assert all(file.get_tensor(name).dtype == np.uint8 for name in file.keys())  # noqa: SIM118
        header = json.loads(file.metadata()["jaxprune"])
    assert [entry["shape"] for entry in header["leaves"]] == [[40, 30], [5], [30]]
    assert (
        hashlib.sha256(raw.replace(header["sha256"].encode(), b"0" * 64)).hexdigest()
        == (header["sha256"])
    )


def test_the_same_network_gives_the_same_bytes(tmp_path, small):
    params, masks = load_sparse(small[0])
    files = []
    for _ in range(3):
        save_sparse(tmp_path / "net", params, masks, values="codebook4")
        files.append((tmp_path / "net").read_bytes())
    assert files == [small[1]] * 3


def check_refused(path, raw, match="is not a whole file of a sparse network: "):
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=match) as caught:
        load_sparse(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_file_cut_at_every_byte(small):
    path, raw = small
    for length in range(len(raw)):
        check_refused(path, raw[:length])
    check_refused(path, raw + b"\0")


def test_every_flipped_byte(small):
    path, raw = small
    for i in range(len(raw)):
        flipped = bytearray(raw)
        flipped[i] ^= 1 << i % 8
        check_refused(path, bytes(flipped))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "it has no header"),
        (b"\x89HDF\r\n\x1a\n" * 4, "it has no header"),
        (b"\x01" + bytes(30), "Expecting value"),
        (safetensors.numpy.save({"a": np.ones(3)}), "it has no metadata `jaxprune`"),
        (safetensors.numpy.save({}, {"jaxprune": ""}), "it has no metadata `jaxprune`"),
        (safetensors.numpy.save({}, {"jaxprune": "[" * 100_000}), "damaged|nested"),
        (safetensors.numpy.save({}, {"jaxprune": '{"version": 2}'}), "format is 2, and 1 can"),
    ],
)
def test_other_files(tmp_path, raw, reason):
    check_refused(tmp_path / "other", raw, f"is not a whole file of a sparse network: .*{reason}")


def nested(depth):
    tree = "leaf"
    for _ in range(depth):
        tree = {"list": [tree]}
    return tree


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        *[(("leaves", 0, "dtype"), v) for v in ("object", "float", "U5", "f4,f4", ">f4", None, 7)],
        *[(("leaves", 1, "dtype"), v) for v in ("int32", "bfloat16", ["int64"], "complex128")],
        *[(("leaves", 0, "shape"), v) for v in ([20, 60], [1200], [10**9, 10**9], [0, 30], [])],
        *[(("leaves", 0, "shape"), v) for v in ([-40, -30], [40.0, 30], [True, 1200], "40", None)],
        *[(("leaves", 0, "shape"), v) for v in ([40, 30] + [1] * 70, [10**400], [2**63, 0])],
        *[(("leaves", 1, "shape"), v) for v in ([4], [6], [5, 2], [])],
        *[(("leaves", 0, "kept"), v) for v in (0, 120, 1200, [], [121], [-1], [1e9], "120", None)],
        *[(("leaves", 0, "kept", 0), v) for v in (-1, 10**30, 0, 121, 0.5, "a", None, [1])],
        *[(("leaves", 1, "kept"), v) for v in (1, 4, 6, 10**12, [5], [True] * 5)],
        *[(("leaves", 0, "values"), v) for v in ("float32", "float16", "int8", "int4", None, {})],
        *[(("leaves", 1, "values"), v) for v in ("int8", "codebook4")],
        (("leaves",), []),
        (("leaves",), [{}] * 3),
        (("leaves",), {"0": 1}),
        (("leaves",), [{"dtype": "int8", "shape": [], "kept": 1, "values": "float32"}] * 9),
        (("version",), None),
        (("tree",), "leaf"),
        (("tree",), nested(400)),
        (("tree",), {"set": ["leaf"]}),
        (("tree",), {"dict": [["a", "leaf"]], "list": []}),
        (("tree",), {"dict": [[["a"], "leaf"], ["b", {"list": ["leaf", "leaf"]}]]}),
        (("tree",), {"dict": [["a", "leaf"], [1, {"list": ["leaf", "leaf"]}]]}),
    ],
)
def test_a_header_that_lies(small, keys, value):
    def change(header, tensors):
        node = header
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value

    path, raw = small
    load_sparse(path)
    check_refused(path, forge(raw, change))


def test_nothing_large_is_allocated(tmp_path):
    """Zeros compress well: neither a shape nor a stream may claim more than the file can be."""
    bomb = zstandard.ZstdCompressor().compress(bytes(2**28))
    entropy = b"\x02" + bytes([1, 0, 1]) + np.array([65535, 1], "<u2").tobytes()

    def claim(shape, kept, *streams, values="float32"):
        def change(header, tensors):
            header["tree"] = "leaf"
            entry = {"dtype": "float32", "shape": shape, "kept": kept, "values": values}
            header["leaves"] = [entry]
            data = b"".join(len(stream).to_bytes(8, "little") + stream for stream in streams)
            tensors.clear()
            tensors["0 "] = np.frombuffer(data, np.uint8)

        return change

    path = tmp_path / "net"
    save_sparse(path, {}, {})
    raw = path.read_bytes()
    tracemalloc.start()
    try:
        for n in (10**6, 2**28, 2**62):
            for stream in (b"", b"\x01" + bomb, entropy):
                for kept in (0, n, n // 2):
                    if (n, kept) != (10**6, 0):  # which a file of this size may be
                        check_refused(path, forge(raw, claim([n], kept, stream)))
        check_refused(path, forge(raw, claim([1000], 1000, b"\x01" + bomb)), "wrong size")
        many = [entropy] * 9
        check_refused(path, forge(raw, claim([0, 10**12], [0], *many)))
        check_refused(path, forge(raw, claim([0, 10**12], 0, *many, values="int8")))
        classes, bits, kept = codec.pack_mask(np.arange(10)[None] > 4)
        lie = claim([10], kept, classes, bits, b"\xff" * 5, *many, values="codebook4")
        check_refused(path, forge(raw, lie))
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_a_network_without_weights_is_filled_up(tmp_path):
    w, mask = np.ones((1000, 2000), np.float32), np.zeros((1000, 2000), bool)
    check_lossless(tmp_path, {"w": w}, {"w": mask})
    assert 2_000_000 * 5 / 1024 < (tmp_path / "net").stat().st_size < 11_000


def fuzz(path, raw, rng):
    """Load a file that is damaged, but whose digest is right; it loads, or gives one error."""

    def change(header, tensors):
        for name, tensor in tensors.items():
            tensor = tensor.copy()
            for _ in range(rng.integers(0, 4)):
                at = rng.integers(tensor.size)
                match rng.integers(3):
                    case 0:
                        tensor[at] ^= 1 << rng.integers(8)
                    case 1:
                        tensor[at] = rng.choice([0, 1, 2, 0xFF])
                    case 2:
                        tensor = np.delete(tensor, slice(at, at + rng.integers(1, 9)))
                if not tensor.size:
                    break
            tensors[name] = tensor

    path.write_bytes(forge(raw, change))
    try:
        load_sparse(path)
    except ValueError as error:
        assert "is not a whole file of a sparse network" in str(error)
        return 1
    return 0


def test_damage_under_a_right_digest(small):
    (path, raw), rng = small, np.random.default_rng(0)
    assert 50 < sum(fuzz(path, raw, rng) for _ in range(200)) < 200


@pytest.mark.slow
@pytest.mark.parametrize("values", ["float32", *LOSSY])
def test_much_damage_under_a_right_digest(tmp_path, values):
    path, rng = tmp_path / "net", np.random.default_rng(1)
    params = {"a": kernel((200, 90)), "b": [kernel((9,)), np.arange(4)]}
    masks = {"a": largest(params["a"], 0.8), "b": [np.arange(9) > 3, np.ones(4, bool)]}
    save_sparse(path, params, masks, values=values)
    raw = path.read_bytes()
    assert sum(fuzz(path, raw, rng) for _ in range(3000)) > 1000


@pytest.mark.slow
@settings(max_examples=2000)
@given(networks(), st.data())
def test_random_flips(tmp_path_factory, network, data):
    path = tmp_path_factory.mktemp("flips") / "net"
    save_sparse(path, *network)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    if bytes(raw) != path.read_bytes():
        check_refused(path, bytes(raw))


@pytest.mark.slow
def test_a_thousand_headers(small):
    """JSON of the right kind at the wrong place."""
    path, raw = small
    rng = np.random.default_rng(2)
    values = [None, True, -1, 0, 1, 3, 2**40, 1.5, "", "a", "int8", [], [[]], {}, {"list": []}]

    def change(header, tensors):
        node, key = header, "leaves"
        while rng.random() < 0.8 and isinstance(node[key], list | dict) and node[key]:
            node = node[key]
            keys = list(node) if isinstance(node, dict) else range(len(node))
            key = keys[rng.integers(len(keys))]
        node[key] = values[rng.integers(len(values))]

    for _ in range(1000):
        path.write_bytes(forge(raw, change))
        try:
            load_sparse(path)
        except ValueError as error:
            assert "is not a whole file of a sparse network" in str(error)  # noqa: PT017


def test_a_file_is_not_read_before_its_size_is_checked(small):
    path, raw = small
    path.write_bytes(raw)
    with path.open("r+b") as file:
        file.truncate(2**40)  # a sparse file: it has no such space on disk
    with pytest.raises(ValueError, match="another size than its header says"):
        load_sparse(path)


# Bad input.


@pytest.mark.parametrize(
    ("values", "largest"), [("int8", np.finfo(np.float32).max), ("codebook4", 1.7e308)]
)
def test_weights_too_large_to_be_quantised(tmp_path, values, largest):
    w = largest * np.linspace(0.5, 1, 40, dtype=np.asarray(largest).dtype)
    with pytest.raises(ValueError, match=f"leaf 'w' has weights that are too large for {values}"):
        save_sparse(tmp_path / "net", {"w": w}, {"w": np.arange(40) > 0}, values=values)


def test_masks_of_another_network(tmp_path):
    w = {"w": np.ones((2, 3), np.float32)}
    path = tmp_path / "net"
    with pytest.raises(ValueError, match=r"leaf 'w' has shape \(3, 2\) in masks and \(2, 3\)"):
        save_sparse(path, w, {"w": np.ones((3, 2), bool)})
    with pytest.raises(ValueError, match="masks has no leaf 'w'"):
        save_sparse(path, w, {"v": np.ones((2, 3), bool)})
    with pytest.raises(ValueError, match=r"leaf 'w' has shape \(4, 2, 3\) in masks"):
        save_sparse(path, w, {"w": np.ones((4, 2, 3), bool)})
    with pytest.raises(TypeError, match="mask 'w' must be bool, got float32"):
        save_sparse(path, w, w)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("values", ["float", "codebook7", "", "FLOAT16"])
def test_unknown_values(tmp_path, values):
    # Past the check of types that the tests turn on.
    with pytest.raises(ValueError, match=f"values must be .*, got '{values}'"):
        storage.save_sparse(tmp_path / "net", {}, {}, values=values)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (jax.random.key(0), "leaf 'x' is of key<fry>: save jax.random.key_data of it"),
        ("text", "leaf 'x' must be of numbers or bools, got <U4"),
        (np.array([None]), "leaf 'x' must be of numbers or bools, got object"),
        (np.array(["2026-01-01"], "M8[D]"), "got datetime64"),
    ],
)
def test_leaves_that_are_no_numbers(tmp_path, leaf, message):
    with pytest.raises(TypeError, match=message):
        save_sparse(tmp_path / "net", {"x": leaf}, {"x": np.ones(np.shape(leaf), bool)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tree", [{(1, 2): np.ones(1)}, {0.5: np.ones(1)}, storage])
def test_other_containers(tmp_path, tree):
    if tree is storage:
        tree = jax.tree_util.Partial(lambda x: x, np.ones(2))
    masks = jax.tree.map(lambda w: w > 0, tree)
    with pytest.raises(TypeError, match="containers must be dict .*, list, tuple or None, got"):
        save_sparse(tmp_path / "net", tree, masks)
    assert not list(tmp_path.iterdir())


def test_paths_that_are_not_writable(tmp_path):
    network = {"w": np.ones(3)}, {"w": np.ones(3, bool)}
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    for path in ("folder", "none/net", "file/net", "x" * 300):
        with pytest.raises(OSError, match=path) as caught:
            save_sparse(tmp_path / path, *network)
        assert caught.value.filename == str(tmp_path / path)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(sys.platform == "win32" or os.getuid() == 0, reason="root may write anywhere")
def test_folder_that_is_not_writable(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(PermissionError):
            save_sparse(tmp_path / "net", {}, {})
    finally:
        tmp_path.chmod(stat.S_IRWXU)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk(tmp_path, monkeypatch, step):
    path = tmp_path / "net"
    path.write_text("what was there")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), full)
    with pytest.raises(OSError, match="No space left on device.*net'$"):
        save_sparse(path, {"w": np.ones(9)}, {"w": np.ones(9, bool)})
    assert [file.name for file in tmp_path.iterdir()] == ["net"]
    assert path.read_text() == "what was there"


def test_a_file_is_replaced(tmp_path):
    (tmp_path / "net").write_text("old")
    check_lossless(tmp_path, {"w": np.ones(3)}, {"w": np.arange(3) > 1})


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        load_sparse(tmp_path / "none")
    with pytest.raises(ValueError, match="is not a file"):
        load_sparse(tmp_path)
    with pytest.raises(ValueError, match="is not a file"):
        load_sparse("/dev/zero")


def test_what_comes_back_is_the_pruned_network(tmp_path, untrained):
    masks = weight_masks(untrained, 0.9)
    params = jax.tree.map(jnp.asarray, untrained)
    got, _ = round_trip(tmp_path, params, masks)
    check_same(got, jax.tree.map(np.asarray, apply_masks(params, masks)))


def golden():
    """A network that has all that a file can hold, for `test_files_of_version_1_can_be_read`."""
    rng = np.random.default_rng(0)
    pattern = np.arange(80 * 70).reshape(80, 70)
    w = (rng.integers(-3, 4, size=(80, 70)) / 8).astype(np.float32)
    params = {"dense": w, "rest": [np.arange(3), (jnp.bfloat16(-1.5), None)]}
    masks = {"dense": (pattern * 7) % (13 + pattern % 70) < 3, "rest": [np.ones(3, bool)]}
    masks["rest"].append((np.ones((), bool), None))
    return params, masks


GOLDEN = """
umS)800000dm>+7ZDn*}WMOn+Utc0Rdm?IKcyMxcZe=1mB70mSc4cyNX>V>^B04cFTq1L5VKOx~Tp~JLA~P{KWn*D7VPiL9I5s
mjVKp)~Gh#L~VK8B0Gcq?eVP#}uH!(M1VKX!`F*0UjH8MCeWo0yGFg9alHf3ZrG+ZJqTq1OGWo29<I(u9qWNBk`Tp~JKTU;V!W
o~n2Tp}!7B5Y-0W?Uj&EL&V6a%FRLTp}!cTq0~~b97uHI$K;KY-M3)Tp}!cTq1OJaBO8<B05`KB5Y-0W?UjHZgp&IU431BU0r=
FTq0~`VRmJ6Tp~JKdt4%9ba`-PTp~JLB4%uFVRSPxTp}!7B6DbAaAjN~I$Jm}EH^M+EL<XMWpH#{B05_zEHErEEHErEEH^APG%
PnYEHN=KEHpDLGBYeNT`XK8c42IFWpi92I$R=SZ)9a+Z*OZfTq1oedt4%9ba`-PTp~JLB57`PHZ)u!EL<XUXkl<=Tp~JKGhHlP
B5P%EbX+1jGb~&pc42IFWpi92I$R=VY;R$7GcsHveJp!iB4l)VaAjN~I$R=RW^8X^bTKwuA}m}Yb7*03Wn3aUTU{(%B5P%EbX+
1jF)Umnc42IFWpi92I$R=VY;R$7GcsHveO-MbeJmm{AY^53b7dkrdm?0Xd2nSSIwDm#A}k_vXkl<=B05_%HaJ}@B4lB7VP9`%W
^-k9b0RuhFf24SI9+`#A~7IxWpi{dFd{m8B4l)VaAhJoB2_pdEFyDgVQ^(4I$Jq5T`VGGVRT_%Z)Rq5Wpr~QI$Jb0I4m_bG+li
xA~GOyWpi{dF)uJ8I(s5yba`-PB03^fI3g?}b7*03Wg<FTGB8~%B4lB7VP9`%W^-k9b0RuhH8wOXH8?a~eSIJxKmY&$000000t
Em90|W&I_9%WaV@WnphzM!}M66Rl7P!?C8NKH*u=OOpL~LA(wti;36u2~(YNyY2`v%PT;_H87tPddpumAu6000003&ls)f2w*l
`V%nZ3>Z7~de(h19&QS|-8OG0iJ6fB8o~>jr?ZyCV#eBszdbj}F&a{ljgZ4bzi7ej#d$>6t0-tI?m^opr9bj{nQ)W^94xOzmPT
iyTKQuth|b~Nu~mS;(Kvtq_7Nrjrz`&-k@ZH0I6(Txi4vPj`|J{WbRP$wWCf{rlWcb4nO{SG`r!z&D0%}XhTVwySxL24<8M)X&
ISZCM}$Rj0ssI20RR91000002M7QF00000000320RR9100;m800000000000000000;m800000004jh00000fCvBp00000004b
`d;olXeS-i10000000IU80RjUA1qQ1fgdXiIB_<^%T^~CuA2l8eqn(FM(U#6VyG38dI<Xl*4?dHN^88QTh}|UugA%Dlxs2M(m|
h=-F3<*P6#C`8_!uoG<73Uy0Kj<VwOF$=Z!blKCeI8Csuy4L_q#8VnaKAO>$FBy+r6vWYVIlppkm6b($A<21ONa40000000033
1ONa400000000001ONa400000000001ONa400000000001ONa400000000001ONa400000000001ONa400000000001ONa4000
00000000ssI2000000D%Gk000000001g
"""


def test_files_of_version_1_can_be_read(tmp_path):
    """A file must stay readable, whatever becomes of the writer and of its libraries."""
    params, masks = golden()
    (tmp_path / "net").write_bytes(base64.b85decode("".join(GOLDEN.split())))
    got, got_masks = load_sparse(tmp_path / "net")
    check_same(got_masks, masks)
    zeros = jax.tree.map(np.zeros_like, params)
    check_same(got, jax.tree.map(np.where, masks, params, zeros))
