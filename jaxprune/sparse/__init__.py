"""What masks of weights are worth: fast inference of sparse networks.

`compile_sparse` makes the function that a masked network is, and runs what it keeps alone.
"""

from jaxprune.sparse.inference import compile_sparse as compile_sparse
