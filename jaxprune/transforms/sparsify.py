"""An optimizer whose parameters stay sparse, around any other.

A rule says which weights are kept; here they become zero and stay so, whatever the optimizer does.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import trees
from jaxprune.masks import apply_masks
from jaxprune.structure.matching import belonging
from jaxprune.transforms.rule import Rule, Seen
from jaxprune.types import Array, Masks, Params


class SparsifyState(NamedTuple):
    """The state of `sparsify`.

    Attributes:
        step: how many updates were made, int32.
        key: data of a random key, uint32.
        masks: what is kept, of the tree of the parameters.
        rule: the rule's values.
        inner: the state of the optimizer.
    """

    step: Array
    key: Array
    masks: Masks
    rule: Any
    inner: Any


def sparsify(
    inner: optax.GradientTransformation, rule: Rule, *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Make an optimizer keep the parameters sparse, by a rule.

    After `optax.apply_updates` pruned weights are exactly zero, from the first update on: theirs is
    −p. So the plain network is the masked one, and its gradient is the dense one, which regrowing
    rules look at; the optimizer inside sees the gradients of kept weights alone. Its moments of
    weights that go, or come back, are cleared. A pruned weight that is infinite or NaN stays so:
    `apply_masks(params, masks_of(opt_state))` makes it zero.

    Zeros hold where this is the outermost transformation, or inside of `optax.MultiSteps` and
    `optax.apply_if_finite` from the first update that is applied. What scales updates afterwards
    breaks them. Averages of parameters are masked by `apply_masks(average, masks_of(opt_state))`.

    Args:
        inner: any optax transformation.
        rule: such as `gradual` or `rigl`.
        seed: of the random numbers of rules.

    Returns:
        A transformation whose `update` needs the parameters. It takes `step=`, the number of the
        update from 0, in place of its own count: under `vmap` over levels or seeds give it
        unbatched, so that masks are computed at updates of the rule only. Other extra arguments go
        to `inner`.

    Raises:
        ValueError: from `update`, without parameters.

    Example:
        >>> import optax
        >>> tx = sparsify(optax.sgd(0.5), jp.gradual(jp.one_shot_at(0.5, 0)))
        >>> params = {"w": jnp.array([[1.0, -3.0]])}
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"w": jnp.ones((1, 2))}, state, params)
        >>> optax.apply_updates(params, updates)["w"].tolist()
        [[0.0, -3.5]]

    Reference:
        The idea of a wrapper: Lee et al. JaxPruner: A concise library for sparsity research.
        2023.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> SparsifyState:
        key = jax.random.key(seed)
        masks, state = rule.init(params, jax.random.fold_in(key, 0))
        return SparsifyState(
            jnp.zeros((), jnp.int32), jax.random.key_data(key), masks,
            jax.tree.map(jnp.asarray, state), inner.init(params),
        )  # fmt: skip

    def update(
        updates: Params, state: Any, params: Params | None = None, *, step: Any = None, **more: Any
    ) -> tuple[Params, SparsifyState]:
        if params is None:
            raise ValueError("sparsify needs the parameters: update(gradients, state, params)")
        gradients, given = (jax.tree.map(jnp.asarray, tree) for tree in (updates, params))
        number = state.step if step is None else jnp.asarray(step, jnp.int32)
        if rule.gradients is not None:
            seen = rule.gradients(state.masks, given, gradients)
        else:
            seen = gradients if rule.dense else apply_masks(gradients, state.masks)
        updates, own = inner.update(seen, state.inner, given, **more)
        new = state._replace(step=state.step + 1, inner=own)
        if rule.steps:
            moved = optax.apply_updates(given, updates)
            new = jax.lax.cond(
                jnp.any(jnp.asarray(rule.steps, jnp.int32) == number),
                lambda new: _changed(rule, new, moved, gradients, number), lambda new: new, new,
            )  # fmt: skip
        if not rule.dense:
            stays = jax.tree.map(jnp.logical_and, state.masks, new.masks)  # what comes back is zero
            updates = jax.tree.map(_to_zero, updates, given, stays)
        return updates, new

    return optax.GradientTransformationExtraArgs(init, update)


def masks_of(opt_state: Any) -> Masks:
    """Return the masks in an optimizer state, wherever they are nested in it.

    Args:
        opt_state: with the state of one `sparsify` in it.

    Raises:
        ValueError: there is none, or more than one.

    Example:
        >>> import optax
        >>> tx = optax.chain(
        ...     optax.clip(1.0), sparsify(optax.sgd(0.1), jp.static(0.5, criterion="magnitude"))
        ... )
        >>> masks_of(tx.init({"w": jnp.array([[1.0, 2.0]])}))["w"].tolist()
        [[False, True]]
    """
    return _state_of(opt_state).masks


def forward(params: Params, opt_state: Any) -> Params:
    """Return the sparse parameters, of rules that keep dense ones too, such as `ste`.

    Example:
        >>> import optax
        >>> tx = sparsify(optax.sgd(0.1), jp.ste(jp.constant(0.5, end=9)))
        >>> params = {"w": jnp.array([[1.0, 2.0]])}
        >>> forward(params, tx.init(params))["w"].tolist()
        [[0.0, 2.0]]
    """
    return apply_masks(params, masks_of(opt_state))


def update_masks(
    rule: Rule, opt_state: Any, params: Params, gradients: Params, step: int
) -> tuple[Params, SparsifyState]:
    """Update the masks from the host, as `sparsify` would after a step of the rule.

    Args:
        rule: whose `steps` has the step.
        opt_state: of `sparsify`.
        params: after the optimizer's update.
        gradients: dense, as the rule looks at them.
        step: the number of the update, from 0.

    Returns:
        The parameters under the new masks, and the state.

    Raises:
        ValueError: the rule has no such step.
    """
    if step not in rule.steps:
        raise ValueError(f"the rule updates no masks after step {step}: see its steps")
    new = _changed(rule, opt_state, params, gradients, jnp.asarray(step, jnp.int32))
    return (params if rule.dense else apply_masks(params, new.masks)), new


def _changed(
    rule: Rule, state: SparsifyState, params: Params, gradients: Params, number: Array
) -> SparsifyState:
    """Return the state with the masks after a step of the rule."""
    index = jnp.searchsorted(jnp.asarray(rule.steps, jnp.int32), number).astype(jnp.int32)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), number + 1)
    shown = params if rule.dense else apply_masks(params, state.masks)
    masks, values = rule.update(state.rule, Seen(state.masks, shown, gradients, index, key))
    inner = state.inner if rule.dense else _cleared(state.inner, params, state.masks, masks)
    return state._replace(masks=masks, rule=values, inner=inner)


def _state_of(opt_state: Any) -> SparsifyState:
    def one(leaf: Any) -> bool:
        return isinstance(leaf, SparsifyState)

    found = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=one) if one(leaf)]
    if len(found) != 1:
        raise ValueError(
            f"the optimizer state holds masks of {len(found) or 'no'} sparsify: it must be the "
            "state of one"
        )
    return found[0]


def _to_zero(update: Array, param: Array, mask: Array) -> Array:
    """Return an update that makes a pruned weight exactly zero."""
    dtype = jnp.promote_types(update.dtype, param.dtype)
    return jnp.where(mask, update.astype(dtype), -param.astype(dtype))


def _cleared(state: Any, params: Params, old: Masks, new: Masks) -> Any:
    """Return the optimizer's state with nothing of weights that go or come back.

    What belongs to a parameter is told by path and shape; factored moments are of many weights.
    """
    both = {
        path: (a, b)
        for (path, a), (_, b) in zip(*map(trees.paths_and_leaves, (old, new)), strict=True)
    }
    shapes = {path: jnp.shape(w) for path, w in trees.paths_and_leaves(params)}

    def leaf(path: str, value: Any) -> Any:
        found = belonging(path, jnp.shape(value), shapes)
        if len(found) != 1 or jnp.shape(value) != shapes[name := found[0][0]]:
            return value
        stays = both[name][0] & both[name][1]
        return jnp.where(stays, value, jnp.zeros_like(value))

    cleared = [leaf(path, value) for path, value in trees.paths_and_leaves(state)]
    return jax.tree.unflatten(jax.tree.structure(state), cleared)
