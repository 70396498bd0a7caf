"""Fast inference of networks whose weights are masked.

A network and its masks come in. Units without effect are removed by `structure`; the matrix
products left are run by XLA, or by the kernel of `kernel` at the weights that are kept, whichever
is faster here. A function of inputs goes out.
"""

import hashlib
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune import trees
from jaxprune.masks import check_masks
from jaxprune.sparse.measure import fastest, remembered
from jaxprune.sparse.program import Inlined, Product, chains
from jaxprune.structure import Compaction
from jaxprune.types import Apply, Masks, Params


def compile_sparse(apply: Apply, params: Params, masks: Masks, x: Any) -> "SparseNetwork":
    """Return a function of inputs that is the masked network, and runs as fast as it can.

    Units that the masks leave without effect are removed. Of what is left, each matrix product
    with weights of the parameters is run densely or over the kept weights alone, whichever is
    faster in a short measurement at `x`; sparse products that follow each other, with nothing but
    a bias and a ReLU between them, are one call. All else stays as it is. Where the masked network
    itself is fastest, it is what is returned.

    Only products of float32 on a CPU can be sparse, and none inside of a `scan` or another loop,
    nor of stacks of matrices; on other devices units are removed and nothing more. It is for
    inference: sparse products have no derivative. Zeros are skipped, so that an input of infinity
    or NaN need not spread as it does when it is multiplied by a masked weight. To measure, the
    network is called some dozens of times, with whatever effects it has; what was fastest is kept
    in the user's cache, so that the same network with as many weights is not measured again.

    Args:
        apply: the network.
        params: its parameters; values, not traced.
        masks: the same tree and shapes, bool, True is kept.
        x: an example batch, of the size to be fast at and of typical values.

    Returns:
        A function of inputs like `x`, to be called as it is or under `jit`. It holds copies of the
        kept weights. At inputs of another shape or dtype it is compiled anew, for which it needs
        memory for the dense weights too; it is measured anew where there are more than four times
        as many rows, or as few. It equals `apply(apply_masks(params, masks), x)` up to
        rounding. Its `report(x)` tells what is run.

    Raises:
        ValueError: the trees or a leaf's shapes differ, or leaves are masked but none of them is
            the weights of a matrix product.
        TypeError: a mask is not bool, or an argument has no values.

    Example:
        >>> def apply(params, x):
        ...     return jax.nn.relu(x @ params["hidden"]) @ params["logits"]
        >>> params = {"hidden": jnp.ones((4, 3)), "logits": jnp.ones((3, 2))}
        >>> masks = {"hidden": jnp.eye(4, 3) > 0, "logits": jnp.ones((3, 2)) > 0}
        >>> fast = compile_sparse(apply, params, masks, jnp.ones((2, 4)))
        >>> fast(jnp.ones((1, 4)))
        Array([[3., 3.]], dtype=float32)
    """
    check_masks(masks, params)
    for name, tree in (("params", params), ("masks", masks), ("x", x)):
        for path, leaf in trees.paths_and_leaves(tree):
            if isinstance(leaf, Tracer | jax.ShapeDtypeStruct):
                raise TypeError(f"{name} must have values, leaf {path!r} has none: compile outside")
    network = SparseNetwork(apply, params, masks, x)
    network.program(x)
    return network


class Report(NamedTuple):
    """What a network costs at inputs of one shape.

    Attributes:
        products: how many matrix products with weights of the parameters are run.
        sparse: how many of them over the kept weights alone.
        multiply_adds: of all these products, as they are run.
        bytes: of weights, inputs, results and buffers, at their peak, and of the kept weights
            once more, which are held for inputs of other shapes.
    """

    products: int
    sparse: int
    multiply_adds: int
    bytes: int


class _Kept(NamedTuple):
    """A copy of a leaf without what is masked, of a size that is in proportion to what is kept."""

    leaf: Any
    indices: np.ndarray | None
    shape: tuple[int, ...]
    masked: bool

    @classmethod
    def of(cls, leaf: Any, mask: Any) -> "_Kept":
        mask = np.asarray(mask)
        if mask.all() or not _numeric(leaf):
            return cls(_copy(leaf), None, mask.shape, False)
        leaf, flat = np.asarray(leaf), np.flatnonzero(mask)
        if 2 * flat.size > leaf.size:
            return cls(np.where(mask, leaf, np.zeros((), leaf.dtype)), None, leaf.shape, True)
        return cls(leaf.ravel()[flat], flat.astype(np.min_scalar_type(leaf.size)), leaf.shape, True)

    def restore(self) -> Any:
        if self.indices is None:
            return self.leaf
        full = np.zeros(self.shape, self.leaf.dtype)
        full.reshape(-1)[self.indices] = self.leaf
        return full

    @property
    def bytes(self) -> int:
        return sum(getattr(array, "nbytes", 0) for array in (self.leaf, self.indices))


class _Choice(NamedTuple):
    """A way to run the network.

    Attributes:
        function: jitted, of constants and inputs.
        constants: weights and whatever else does not depend on the inputs.
        work: its report, of which `bytes` is what the kernel needs besides XLA's buffers.
    """

    function: Any
    constants: Any
    work: Report

    def __call__(self, x: Any) -> Any:
        return self.function(self.constants, x)


class _Size(NamedTuple):
    """What inputs have in common at which the same is fastest.

    Attributes:
        tiles: of every product that can be sparse, which kernel it is for.
        rows: of every product.
    """

    tiles: tuple[int, ...]
    rows: tuple[int, ...]

    @classmethod
    def of(cls, products: Sequence[Product], possible: Sequence[Product]) -> "_Size":
        if possible:
            from jaxprune.sparse import packing  # which imports Numba
        tiles = tuple(packing.tile_for([product.layer], _rows(product)) for product in possible)
        return cls(tiles, tuple(map(_rows, products)))

    def like(self, other: "_Size") -> bool:
        near = (max(a, b) <= 4 * min(a, b) for a, b in zip(self.rows, other.rows, strict=True))
        return self.tiles == other.tiles and all(near)


class SparseNetwork:
    """A function of inputs, made by `compile_sparse`: a program for every shape of inputs seen."""

    def __repr__(self) -> str:
        return f"<SparseNetwork of {getattr(self._apply, '__name__', type(self._apply).__name__)}>"

    def __init__(self, apply: Apply, params: Params, masks: Masks, x: Any):
        self._apply = apply
        self._tree = jax.tree.structure(params)
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True)
        self._kept = [_Kept.of(leaf, mask) for leaf, mask in pairs]
        self._example = [_copy(leaf) for leaf in jax.tree.leaves(x)]
        self._programs: dict[Any, _Choice] = {}
        self._constants: dict[bytes, Any] = {}
        # What is run sparsely, by the size that it was measured at; None: all as given.
        self._found: list[tuple[_Size, tuple[int, ...] | None]] = []
        self._lock = threading.RLock()

    def __call__(self, x: Any) -> Any:
        """Return what the network returns."""
        function, constants, _ = self._programs.get(_key(x)) or self.program(x)
        return function(constants, x)

    def report(self, x: Any) -> Report:
        """Tell what is run at inputs of the shape of `x`, and what it needs."""
        function, constants, work = self.program(x)
        found = function.lower(constants, x).compile().memory_analysis()
        of_xla = found.argument_size_in_bytes + found.temp_size_in_bytes
        held = sum(kept.bytes for kept in self._kept)
        return work._replace(bytes=int(of_xla + found.output_size_in_bytes) + work.bytes + held)

    def program(self, x: Any) -> _Choice:
        """Return the fastest function for inputs of these shapes; made when first needed."""
        with self._lock:
            key = _key(x)
            if key not in self._programs:
                inputs, structure = jax.tree.flatten(x)
                if len(inputs) != len(self._example):
                    raise ValueError(
                        f"inputs must be a tree like the example's, of {len(self._example)} "
                        f"leaves, got {structure}"
                    )
                self._programs[key] = _outside(partial(self._make, inputs, structure))
            return self._programs[key]

    def _make(self, inputs: Sequence[Any], structure: Any) -> _Choice:
        typical = [_typical(*pair) for pair in zip(inputs, self._example, strict=True)]
        x = jax.tree.unflatten(structure, typical)
        leaves = [kept.restore() for kept in self._kept]
        params = jax.tree.unflatten(self._tree, leaves)
        masks = jax.tree.unflatten(self._tree, [_nonzero(leaf) for leaf in leaves])
        plan = Compaction(self._apply, params, masks, x, fold=True)
        program = Inlined.of(plan.apply, plan.params, x)
        products = program.products()
        masked = {i for i, kept in enumerate(self._kept) if kept.masked}
        if masked and not any(masked & product.leaves for product in products):
            raise ValueError(
                "no masked leaf is the weights of a matrix product outside of loops (and of one, "
                "not of a stack): there is nothing to run sparsely; `compact` removes units alone"
            )
        on_cpu = jax.default_backend() == "cpu"
        possible = [product for product in products if product.float32 and on_cpu]

        @cache
        def choice(sparse: tuple[int, ...] | None) -> _Choice:
            if sparse is not None:
                return _with_sparse(program, [possible[i] for i in sparse], products)
            work = _dense_work(Inlined.of(self._apply, params, x).products())
            return _Choice(jax.jit(self._apply), jax.tree.map(jnp.asarray, params), work)

        size = _Size.of(products, possible)
        for known, sparse in self._found:
            if size.like(known):
                found = choice(sparse)
                break
        else:

            def measured() -> tuple[int, ...] | None:
                every, alone = (*range(len(possible)),), _faster_alone(program, possible, x)
                ways = [*dict.fromkeys((None, (), every, alone))]
                return ways[fastest([*map(choice, ways)], x)]

            kept = [np.count_nonzero(product.layer.weights) for product in products]
            best = remembered(f"{program.jaxpr} {kept}", measured)
            self._found.append((size, best if best is None else tuple(best)))
            found = choice(self._found[-1][1])
        return found._replace(constants=jax.tree.map(self._shared, found.constants))

    def _shared(self, constant: Any) -> Any:
        """Return an array that programs of other shapes may hold already."""
        if not _numeric(constant):
            return constant
        data = np.asarray(constant)
        kind = repr((data.shape, data.dtype)).encode()
        return self._constants.setdefault(hashlib.sha256(data.tobytes()).digest() + kind, constant)


def _outside(make: Callable[[], Any]) -> Any:
    """Call a function that computes, even while JAX traces: in a thread of its own then."""
    if not isinstance(jnp.zeros(()), Tracer):
        return make()
    wide = _wide()  # in this thread; the other one is to have it too

    def inside() -> Any:
        with jax.enable_x64(wide):
            return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(inside).result()


def _wide() -> bool:
    return jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]


def _key(x: Any) -> Any:
    try:  # most networks take one array: in a tenth of the time of a tree
        return x.aval, _wide()
    except AttributeError:
        leaves, structure = jax.tree.flatten(x)
        avals = [jax.typeof(leaf) for leaf in leaves]
        alone = jax.tree_util.treedef_is_leaf(structure)
        return avals[0] if alone else (structure, *avals), _wide()


def _copy(leaf: Any) -> Any:
    """Return what nobody else changes or deletes."""
    if isinstance(leaf, jax.Array):
        return jnp.array(leaf, copy=True)
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def _typical(leaf: Any, example: Any) -> Any:
    """Return a leaf of the inputs, or while JAX traces the example's values in its shape."""
    if not isinstance(leaf, Tracer):
        return leaf
    if not _numeric(example):
        return jnp.broadcast_to(example.ravel()[0], leaf.shape)
    return np.resize(example, leaf.shape).astype(leaf.dtype)


def _numeric(leaf: Any) -> bool:
    return not jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.extended)


def _nonzero(leaf: Any) -> np.ndarray:
    return np.asarray(leaf) != 0 if _numeric(leaf) else np.ones(jnp.shape(leaf), bool)


def _dense_work(products: Sequence[Product]) -> Report:
    macs = sum(_rows(product) * product.layer.weights.size for product in products)
    return Report(len(products), 0, macs, 0)


def _with_sparse(
    program: Inlined, sparse: Sequence[Product], products: Sequence[Product]
) -> _Choice:
    """Return a network, some of its products as calls of the kernel."""
    found = chains(sparse)
    needed, run = program.function(found)
    values = [jnp.asarray(program.known[var]) for var in needed]
    packed = [_packed(chain, _rows(chain[0])) for chain in found]
    widths = [chain[-1].layer.weights.shape[1] for chain in found]

    def function(constants: tuple[list[Any], list[Any]], x: Any) -> Any:
        def call(n: int, rows: Any) -> Any:
            from jaxprune.sparse import kernel

            return kernel.run(rows, constants[1][n], widths[n])

        return run(constants[0], x, call)

    instead = set(map(id, sparse))
    work = _dense_work([product for product in products if id(product) not in instead])
    for chain, array in zip(found, packed, strict=True):
        from jaxprune.sparse import packing  # which imports Numba

        count, needed_bytes = packing.work(np.asarray(array), _rows(chain[0]))
        work = Report(
            work.products + len(chain), work.sparse + len(chain), work.multiply_adds + count,
            work.bytes + needed_bytes,
        )  # fmt: skip
    return _Choice(jax.jit(function), (values, packed), work)


def _packed(chain: Sequence[Product], rows: int) -> Any:
    from jaxprune.sparse import packing  # which imports Numba

    layers = [product.layer for product in chain]
    return jnp.asarray(packing.pack(layers, rows, packing.tile_for(layers, rows)))


def _rows(product: Product) -> int:
    sizes = enumerate(product.x.aval.shape)
    return math.prod(size for axis, size in sizes if axis not in product.axes)


def _faster_alone(program: Inlined, products: Sequence[Product], x: Any) -> tuple[int, ...]:
    """Return which products are faster over the kept weights, each measured by itself."""
    if not products:
        return ()
    from jaxprune.sparse import kernel

    faster: dict[Any, bool] = {}
    chosen = []
    inputs = program.values([product.x for product in products], x)
    for i, (product, operand) in enumerate(zip(products, inputs, strict=True)):
        weights, bias, relu = product.layer
        key = _rows(product), weights.shape, np.count_nonzero(weights), bias is None, relu
        if key not in faster:

            def dense(constants: Any, rows: Any, relu: bool = relu) -> Any:
                weights, bias = constants
                rows = rows @ weights if bias is None else rows @ weights + bias[None]
                return jnp.maximum(rows, 0) if relu else rows

            def sparse(packed: Any, rows: Any, width: int = weights.shape[1]) -> Any:
                return kernel.run(rows, packed, width)

            rows = product.rows(operand)
            constants = jax.tree.map(jnp.asarray, (weights, bias))
            choices = [
                partial(jax.jit(dense), constants),
                partial(jax.jit(sparse), _packed([product], rows.shape[0])),
            ]
            faster[key] = fastest(choices, rows) == 1
        if faster[key]:
            chosen.append(i)
    return tuple(chosen)
