"""Sparse networks that cost less: files of few bytes, and inference over the kept weights.

Params and the masks of their weights come in; what goes out is a file and the same back from it, or
a function that is the masked network and runs what it keeps alone.
"""

from jaxprune.sparse.inference import compile_sparse as compile_sparse
from jaxprune.sparse.storage import Values as Values
from jaxprune.sparse.storage import load_sparse as load_sparse
from jaxprune.sparse.storage import lossless_bound as lossless_bound
from jaxprune.sparse.storage import save_sparse as save_sparse
