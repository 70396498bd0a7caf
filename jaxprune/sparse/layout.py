"""How a packed chain of layers is laid out, and what the threads of a call share.

`packing` writes a chain, `products` reads it, and `kernel` gives both to the threads of XLA.
"""

TILES = (16, 64)
"""How many rows a tile may have; also the numbers that a vector of the kernel may have."""

BY_COLUMNS = 0
"""In the place of the rows of a tile: the other kernel."""

BLOCK = {BY_COLUMNS: 64, 16: 6, 64: 6}
"""How many columns a block of a dense layer has, by the rows of a tile."""

UNROLLED = 4
"""How many kept weights of an input the kernel by columns takes at a time; packing fills up."""

HEADER, FIELDS = 5, 9
"""Words of eight bytes that a chain begins with, and then of every layer.

The header: how many layers there are, the rows of a tile, the largest width, the size of the chain
in int32, how many threads are worth it. The fields of a layer are below; the last four say where
its data start, in int32.
"""

INPUTS, OUTPUTS, PARTS, RELU, DENSE, BIAS, STARTS, INDICES, VALUES = range(FIELDS)

# Words of eight bytes that the threads of a call share. How many threads hold them; the next task,
# and how many are done; what is to be computed; then a buffer for intermediate results, a struct
# that asks XLA something, and its answer.
REFERENCES, NEXT, DONE, TASKS, X, OUT, CHAIN, ROWS, TILE, LAYERS, WIDEST = range(11)
BUFFERS, REQUEST, ANSWER = 11, 12, 17

SHARED = 18
"""How many there are; the kernel by columns has three more a layer: next part, done, all parts."""
