"""Sparse networks that cost less: files of few bytes.

Params and the masks of their weights come in; what goes out is a file, and the same back from it.
"""

from jaxprune.sparse.storage import load_sparse as load_sparse
from jaxprune.sparse.storage import lossless_bound as lossless_bound
from jaxprune.sparse.storage import save_sparse as save_sparse
