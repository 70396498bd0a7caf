"""What a weight is worth: one criterion a function, from parameters to scores.

Higher is more important. `masks.masks_at` turns scores and counts into masks.
"""

import jax
import jax.numpy as jnp

from jaxprune.types import Params, Scores


def magnitude(params: Params) -> Scores:
    r"""Score every weight by its absolute value, $s = |w|$.

    Args:
        params: any tree of arrays.

    Returns:
        The same tree, shapes and dtypes; leaves that have no magnitude (random keys) as they are.

    Example:
        >>> magnitude({"kernel": jnp.array([[-2.0, 1.0]])})["kernel"].tolist()
        [[2.0, 1.0]]

    Reference:
        Han, Pool, Tran, Dally. Learning both Weights and Connections for Efficient Neural
        Networks. NeurIPS 2015. There with a threshold a layer, here with exact counts.
    """
    return jax.tree.map(lambda w: jnp.abs(w) if jnp.issubdtype(jnp.asarray(w).dtype, jnp.number)
                        else w, params)  # fmt: skip
