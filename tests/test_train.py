import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax

from jaxprune import models
from jaxprune.train import TrainState, batch_indices, init_state, make_train

EXAMPLES, FEATURES, HIDDEN, CLASSES = 40, 6, (5, 4), 3
LEVELS, STEPS, BATCH = 3, 7, 8

OPTIMIZERS = {
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(0.02),
    "clipped adamw": lambda: optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(0.02, weight_decay=0.1)
    ),
}


def network():
    """Return `apply` and parameters that need no random numbers of JAX."""
    _, apply = models.mlp(FEATURES, HIDDEN, CLASSES)
    rng = np.random.default_rng(0)
    sizes = [FEATURES, *HIDDEN, CLASSES]
    names = [f"hidden_{i}" for i in range(len(HIDDEN))] + ["logits"]
    return apply, {
        name: {"kernel": jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)}
        for name, shape in zip(names, itertools.pairwise(sizes), strict=True)
    }


def examples():
    rng = np.random.default_rng(1)
    y = rng.integers(0, CLASSES, EXAMPLES)
    x = rng.normal(size=(EXAMPLES, FEATURES)) + 2 * np.eye(CLASSES, FEATURES)[y]
    batches = np.stack([rng.permutation(EXAMPLES)[:BATCH] for _ in range(STEPS)])
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32), jnp.asarray(batches, jnp.int32)


def random_masks(params, levels=LEVELS):
    """Return masks that prune nothing at level 0, and more at each level after it."""
    rng = np.random.default_rng(2)

    def mask(w):
        ranks = rng.random(w.shape)
        return jnp.asarray(np.stack([ranks >= 0.4 * level for level in range(levels)]))

    return {k: jax.tree.map(mask, v) for k, v in params.items() if k != "logits"} | {
        "logits": {"kernel": jnp.ones((levels, *params["logits"]["kernel"].shape), bool)}
    }


def stack(tree, levels=LEVELS):
    return jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x)[None], levels, axis=0), tree)


def level_of(tree, i):
    return jax.tree.map(lambda x: np.asarray(x)[i], tree)


def assert_close(tree, expected, **tolerance):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, **(tolerance or {"rtol": 0}))


class Trainer:
    """One compiled program of one optimizer, and what goes into it."""

    def __init__(self, optimizer, **options):
        self.apply, self.params = network()
        self.optimizer, self.data, self.traces = optimizer, examples(), 0
        self.masks = random_masks(self.params)
        self.state = stack(init_state(self.params, optimizer))

        def counted(params, x):
            self.traces += 1
            return self.apply(params, x)

        self.jitted = jax.jit(make_train(counted, optimizer, **options))

    def __call__(self, state=None, masks=None, first=0, last=STEPS):
        return self.jitted(
            state or self.state, masks or self.masks, *self.data, np.int32(first), np.int32(last)
        )


@pytest.fixture(scope="module")
def trainer():
    """Return a function from an optimizer's name to its `Trainer`, which compiles once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = Trainer(OPTIMIZERS[name]())
        return made[name]

    return get


@pytest.fixture(scope="module")
def gradient():
    """Return the mean loss of a network times its masks, and its gradient."""
    apply, _ = network()

    def masked_loss(params, mask, x, y):
        masked = jax.tree.map(lambda w, m: w * m.astype(w.dtype), params, mask)
        log_probabilities = jax.nn.log_softmax(apply(masked, x))
        return -jnp.sum(log_probabilities * jax.nn.one_hot(y, CLASSES)) / len(y)

    return jax.jit(jax.value_and_grad(masked_loss))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_a_plain_loop(trainer, gradient, name):
    train = trainer(name)
    state, losses = train()
    assert losses.shape == (LEVELS, STEPS)
    x, y, batches = train.data

    with jax.numpy_dtype_promotion("standard"):
        update = jax.jit(train.optimizer.update)
        for level in range(LEVELS):
            mask = level_of(train.masks, level)
            params, opt_state = train.params, train.optimizer.init(train.params)
            for i, rows in enumerate(np.asarray(batches)):
                loss, grads = gradient(params, mask, x[rows], y[rows])
                np.testing.assert_allclose(losses[level, i], loss, rtol=1e-5)
                updates, opt_state = update(grads, opt_state, params)
                params = jax.tree.map(
                    lambda w, u, m: np.where(m, np.asarray(w) + np.asarray(u), np.float32(0)),
                    params, updates, mask,
                )  # fmt: skip
            expected = TrainState(params, opt_state)
            assert_close(level_of(state, level), expected, rtol=1e-4, atol=1e-6)
    assert len({float(loss) for loss in losses[:, -1]}) == LEVELS  # levels are not the same run


def numpy_loss(kernels, masks, x, y):
    """Compute the masked network's mean loss in float64."""
    *hidden, last = [np.where(m, w, 0) for w, m in zip(kernels, masks, strict=True)]
    x = np.asarray(x, np.float64)
    for kernel in hidden:
        x = np.maximum(x @ kernel, 0)
    return -log_softmax(x @ last, axis=1)[np.arange(len(y)), y].mean()


def test_a_step_follows_the_gradient_of_the_masked_loss(trainer):
    train = trainer("momentum")
    x, y, batches = train.data
    rows = np.asarray(batches[0])
    x, y = np.asarray(x)[rows], np.asarray(y)[rows]
    state, losses = train(last=1)
    names = list(train.params)
    for level in range(LEVELS):
        kernels = [np.asarray(train.params[name]["kernel"], np.float64) for name in names]
        masks = [np.asarray(train.masks[name]["kernel"][level]) for name in names]
        loss = numpy_loss(kernels, masks, x, y)
        np.testing.assert_allclose(losses[level, 0], loss, rtol=1e-5)
        for name, kernel, mask in zip(names, kernels, masks, strict=True):
            expected = np.zeros_like(kernel)
            for index in np.ndindex(kernel.shape):
                value, differences = kernel[index], []
                for shift in (1e-6, -1e-6):
                    kernel[index] = value + shift
                    differences.append(numpy_loss(kernels, masks, x, y))
                kernel[index] = value
                expected[index] = (differences[0] - differences[1]) / 2e-6
            assert (expected[~mask] == 0).all()
            moved = (kernel - np.asarray(state.params[name]["kernel"][level])) / 0.1
            np.testing.assert_allclose(moved[mask], expected[mask], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("levels_at_once", [2, LEVELS])
def test_vmapped_levels_are_looped_levels(trainer, levels_at_once):
    one_by_one = trainer("clipped adamw")()
    together = Trainer(OPTIMIZERS["clipped adamw"](), levels_at_once=levels_at_once)()
    assert_close(together, one_by_one, rtol=1e-5, atol=1e-6)


def test_levels_do_not_depend_on_each_other(trainer):
    train = trainer("clipped adamw")
    forward = train()
    backward = train(masks=jax.tree.map(lambda m: jnp.flip(m, axis=0), train.masks))
    for i in range(LEVELS):
        assert_close(level_of(backward, LEVELS - 1 - i), level_of(forward, i))


@pytest.mark.parametrize("cuts", [(3,), (1, 2, 6), tuple(range(1, STEPS))], ids=str)
@pytest.mark.parametrize("name", ["momentum", "clipped adamw"])
def test_steps_may_be_split_into_calls(trainer, name, cuts):
    train = trainer(name)
    expected, expected_losses = train()
    state, losses = train.state, np.zeros((LEVELS, STEPS), np.float32)
    for first, last in itertools.pairwise((0, *cuts, STEPS)):
        state, some = train(state, first=first, last=last)
        losses += np.asarray(some)
    assert_close(state, expected)
    assert_close(losses, expected_losses)


def test_losses_are_zero_outside_the_steps_made(trainer):
    train = trainer("momentum")
    state, losses = train(first=2, last=5)
    assert (np.asarray(losses) > 0).tolist() == [[2 <= i < 5 for i in range(STEPS)]] * LEVELS
    assert not np.array_equal(
        state.params["logits"]["kernel"], train.state.params["logits"]["kernel"]
    )
    state, losses = train(first=3, last=3)
    assert not losses.any()
    assert_close(state, train.state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_are_exactly_zero_after_every_step(trainer, name):
    train = trainer(name)
    nothing = jax.tree.map(jnp.ones_like, train.masks)
    state, _ = train(masks=nothing, last=3)  # so that the momentum pulls at what is pruned now
    for leaf, mask in zip(jax.tree.leaves(state.params), jax.tree.leaves(train.masks), strict=True):
        assert (np.asarray(leaf)[~np.asarray(mask)] != 0).all()
    for i in range(3, STEPS):
        state, _ = train(state, first=i, last=i + 1)
        for kernel, mask in zip(
            jax.tree.leaves(state.params), jax.tree.leaves(train.masks), strict=True
        ):
            kernel, mask = np.asarray(kernel), np.asarray(mask)
            assert (kernel[~mask] == 0).all()
            assert (kernel[mask] != 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["momentum", "clipped adamw"])
def test_what_a_pruned_weight_holds_does_not_spread(trainer, name, value):
    train = trainer(name)
    params = jax.tree.map(
        lambda w, m: jnp.where(m, w, jnp.asarray(value, w.dtype)), train.state.params, train.masks
    )
    assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    found = train(train.state._replace(params=params))
    assert_close(found, train())


def test_masks_that_keep_all_train_a_dense_network(trainer):
    train = trainer("adam")
    state, losses = train(masks=jax.tree.map(jnp.ones_like, train.masks))
    for level in range(1, LEVELS):
        assert_close(level_of(state, level), level_of(state, 0))
    assert losses[0, -1] < losses[0, 0]


def test_numbers_of_three_steps():
    """Hold three steps of Adam against numbers that NumPy computed in float64, by the chain rule.

    They change only with a deliberate change of the loss, of when masks are applied, or of what
    `optax.adam` does; not with versions, random numbers or the device.
    """
    params = {
        "hidden_0": jnp.array([[0.5, -0.25], [1.0, 0.75]]),
        "logits": jnp.array([[1.0, -1.0], [0.5, 0.25]]),
    }
    masks = {
        "hidden_0": jnp.array([[[True, False], [True, True]]]),
        "logits": jnp.ones((1, 2, 2), bool),
    }
    x, y = jnp.array([[1.0, 0.5], [-0.5, 1.0], [0.25, -1.0]]), jnp.array([0, 1, 1])
    batches = jnp.array([[0, 1], [2, 0], [1, 2]])

    def apply(params, x):
        return jax.nn.relu(x @ params["hidden_0"]) @ params["logits"]

    optimizer = optax.adam(0.1)
    state = stack(init_state(params, optimizer), 1)
    train = jax.jit(make_train(apply, optimizer))
    state, losses = train(state, masks, x, y, batches, np.int32(0), np.int32(3))
    np.testing.assert_allclose(losses, [[0.9867152, 0.4158615, 0.9347716]], rtol=1e-5)
    expected = {
        "hidden_0": np.array([[[0.7671524, 0], [0.7624330, 0.5508510]]]),
        "logits": np.array([[[0.7894401, -0.7894401], [0.2631387, 0.4868614]]]),
    }
    assert_close(state.params, expected, rtol=1e-5)


def test_the_loss_is_an_argument(trainer):
    train = Trainer(optax.sgd(0.1), loss=lambda logits, labels: jnp.sum(jnp.square(logits), axis=1))
    _, losses = train(last=1)
    x, _, batches = train.data
    logits = np.asarray(train.apply(train.params, x))[np.asarray(batches[0])]
    np.testing.assert_allclose(losses[0, 0], (logits**2).sum(axis=1).mean(), rtol=1e-5)


def test_one_trace_serves_all_values(trainer):
    train = trainer("adam")
    train()
    traces = train.traces
    assert traces > 0
    state, _ = train(first=2, last=3)
    masks = jax.tree.map(lambda m: m[::-1], train.masks)
    train(state, masks, first=3, last=4)
    x, y, batches = train.data
    other = x + 1, (y + 1) % CLASSES, batches[::-1]
    train.jitted(stack(level_of(state, 1)), masks, *other, np.int32(5), np.int32(7))
    assert train.traces == traces


@pytest.mark.parametrize(("examples", "size"), [(40, 8), (40, 7), (40, 40), (40, 21), (1, 1)])
def test_batches_are_a_shuffle(examples, size):
    batches = np.asarray(batch_indices(jax.random.key(0), examples, size))
    assert batches.dtype == np.int32
    assert batches.shape == (examples // size, size)  # the last partial batch is dropped
    assert len(np.unique(batches)) == batches.size
    assert batches.min() >= 0 and batches.max() < examples
    np.testing.assert_array_equal(batch_indices(jax.random.key(0), examples, size), batches)


def test_every_key_is_another_shuffle():
    orders = [np.asarray(batch_indices(jax.random.key(i), 40, 7)) for i in range(60)]
    assert len({order.tobytes() for order in orders}) == 60
    # No example is always left out, or always in the same batch.
    times = np.bincount(np.ravel(orders), minlength=40)
    assert 40 < times.min() and times.max() <= 60
    assert all(len({order[i, 0] for order in orders}) > 20 for i in range(5))


@pytest.mark.parametrize("size", [0, -1, 41])
def test_a_bad_batch_size(size):
    message = rf"batch_size must be in \[1, 40\], the size of the training set, got {size}"
    with pytest.raises(ValueError, match=message):
        batch_indices(jax.random.key(0), 40, size)


def test_masks_of_another_tree(trainer):
    train = trainer("momentum")
    wrong = {**train.masks, "logits": {"kernel": jnp.ones((LEVELS, 2, CLASSES), bool)}}
    with pytest.raises(
        ValueError, match=r"'logits/kernel' has shape \(2, 3\) in masks and \(4, 3\)"
    ):
        train(masks=wrong)
    del wrong["logits"]
    with pytest.raises(ValueError, match="masks has no leaf 'logits/kernel', which params has"):
        train(masks=wrong)
