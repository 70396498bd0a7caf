"""Training under masks, held against plain loops, NumPy and numbers computed by hand."""

import functools
import itertools
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax, softmax

from jaxprune import networks, tasks, trees
from jaxprune.train import TrainState, batch_indices, init_state, make_recalibrate, make_train
from jaxprune.types import Network

EXAMPLES, FEATURES, HIDDEN, CLASSES = 40, 6, (5, 4), 3
LEVELS, STEPS, BATCH = 3, 7, 8
KEY = jax.random.key(5)

MOMENTUM, ADAM = optax.sgd(0.1, momentum=0.9), optax.adam(0.02)
CLIPPED = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.02, weight_decay=0.1))
TRAINERS = {
    "momentum": (MOMENTUM, {}),
    "adam": (ADAM, {}),
    "clipped adamw": (CLIPPED, {}),
    "two levels at once": (CLIPPED, {"levels_at_once": 2}),
    "all levels at once": (CLIPPED, {"levels_at_once": LEVELS}),
    "stepped": (CLIPPED, {"stepped": True}),
}


def make_network():
    """Return an MLP whose parameters need no random numbers of JAX."""
    _, apply = networks.mlp(FEATURES, HIDDEN, CLASSES)
    rng = np.random.default_rng(0)
    sizes = [FEATURES, *HIDDEN, CLASSES]
    names = [f"hidden_{i}" for i in range(len(HIDDEN))] + ["logits"]
    params = {
        name: {"kernel": jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)}
        for name, shape in zip(names, itertools.pairwise(sizes), strict=True)
    }
    return networks.network(lambda key: params, apply)


def examples():
    rng = np.random.default_rng(1)
    y = rng.integers(0, CLASSES, EXAMPLES)
    x = rng.normal(size=(EXAMPLES, FEATURES)) + 2 * np.eye(CLASSES, FEATURES)[y]
    batches = np.stack([rng.permutation(EXAMPLES)[:BATCH] for _ in range(STEPS)])
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32), jnp.asarray(batches, jnp.int32)


NETWORK = make_network()
X, Y, BATCHES = examples()


def random_masks(params, levels=LEVELS):
    """Return masks that prune nothing at level 0, and more at each level after it."""
    rng = np.random.default_rng(2)

    def mask(w):
        ranks = rng.random(w.shape)
        return jnp.asarray(np.stack([ranks >= 0.4 * level for level in range(levels)]))

    whole = {"logits": {"kernel": jnp.ones((levels, HIDDEN[-1], CLASSES), bool)}}
    return {k: jax.tree.map(mask, v) for k, v in params.items() if k != "logits"} | whole


def numpy_levels(tree):
    return trees.unstack(jax.tree.map(np.asarray, tree))


def assert_close(tree, expected, **tolerance):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, **(tolerance or {"rtol": 0}))


class Trainer:
    """One compiled program, and what goes into it."""

    def __init__(self, optimizer, options):
        self.optimizer, self.traces = optimizer, 0
        start = init_state(NETWORK, KEY, optimizer)
        self.carry, self.params = trees.stack([start] * LEVELS), start.params
        self.masks = random_masks(self.params)

        def counted(*args):
            self.traces += 1
            return NETWORK.train(*args)

        train = make_train(NETWORK._replace(train=counted), optimizer, **options)
        self.train = train if options.get("stepped") else jax.jit(train)

    def __call__(self, carry=None, masks=None, first=0, last=STEPS, data=(X, Y, BATCHES)):
        bounds = np.int32(first), np.int32(last)
        return self.train(carry or self.carry, masks or self.masks, *data, KEY, *bounds)


@pytest.fixture(scope="module")
def trainer():
    """Return a function from a name to its `Trainer`, which compiles once."""
    return functools.cache(lambda name: Trainer(*TRAINERS[name]))


@jax.jit
@jax.value_and_grad
def gradient(params, mask, x, y):
    masked = jax.tree.map(lambda w, m: w * m.astype(w.dtype), params, mask)
    log_probabilities = jax.nn.log_softmax(NETWORK.apply(masked, {}, x))
    return -jnp.sum(log_probabilities * jax.nn.one_hot(y, CLASSES)) / len(y)


@pytest.mark.parametrize(
    "name", [pytest.param("momentum", marks=pytest.mark.slow), "adam", "clipped adamw"]
)
def test_training_is_a_plain_loop(trainer, name):
    train = trainer(name)
    carry, losses = train()
    assert losses.shape == (LEVELS, STEPS)
    with jax.numpy_dtype_promotion("standard"):
        update = jax.jit(train.optimizer.update)
        levels = zip(numpy_levels(train.masks), numpy_levels((carry, losses)), strict=True)
        for mask, (found, found_losses) in levels:
            params, opt_state = train.params, train.optimizer.init(train.params)
            for loss_found, rows in zip(found_losses, np.asarray(BATCHES), strict=True):
                loss, grads = gradient(params, mask, X[rows], Y[rows])
                np.testing.assert_allclose(loss_found, loss, rtol=1e-5)
                updates, opt_state = update(grads, opt_state, params)
                params = jax.tree.map(
                    lambda w, u, m: np.where(m, np.asarray(w) + np.asarray(u), np.float32(0)),
                    params, updates, mask,
                )  # fmt: skip
            assert_close(found, TrainState(params, {}, opt_state), rtol=1e-4, atol=1e-6)
    assert len({float(loss) for loss in losses[:, -1]}) == LEVELS  # levels are not the same run
    assert losses[0, -1] < losses[0, 0]


def numpy_loss(kernels, masks, x, y):
    """Compute the masked network's mean loss in float64."""
    *hidden, last = [np.where(m, w, 0) for w, m in zip(kernels, masks, strict=True)]
    x = np.asarray(x, np.float64)
    for kernel in hidden:
        x = np.maximum(x @ kernel, 0)
    return -log_softmax(x @ last, axis=1)[np.arange(len(y)), y].mean()


def test_a_step_follows_the_gradient_of_the_masked_loss(trainer):
    train = trainer("momentum")
    rows = np.asarray(BATCHES[0])
    x, y = np.asarray(X)[rows], np.asarray(Y)[rows]
    levels = zip(numpy_levels(train.masks), numpy_levels(train(last=1)), strict=True)
    for mask, (carry, losses) in levels:
        kernels = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(train.params)]
        masks = jax.tree.leaves(mask)
        np.testing.assert_allclose(losses[0], numpy_loss(kernels, masks, x, y), rtol=1e-5)
        for kernel, kept, now in zip(kernels, masks, jax.tree.leaves(carry.params), strict=True):
            expected = np.zeros_like(kernel)
            for index in np.ndindex(kernel.shape):
                value, differences = kernel[index], []
                for shift in (1e-6, -1e-6):
                    kernel[index] = value + shift
                    differences.append(numpy_loss(kernels, masks, x, y))
                kernel[index] = value
                expected[index] = (differences[0] - differences[1]) / 2e-6
            assert (expected[~kept] == 0).all()
            moved = (kernel - now) / 0.1
            np.testing.assert_allclose(moved[kept], expected[kept], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    "name",
    ["two levels at once", pytest.param("all levels at once", marks=pytest.mark.slow), "stepped"],
)
def test_levels_together_or_step_by_step_are_looped_levels(trainer, name):
    assert_close(trainer(name)(), trainer("clipped adamw")(), rtol=1e-6, atol=1e-6)


def test_levels_do_not_depend_on_each_other(trainer):
    train = trainer("clipped adamw")
    backward = train(masks=jax.tree.map(lambda m: jnp.flip(m, axis=0), train.masks))
    assert_close(numpy_levels(backward)[::-1], numpy_levels(train()))


@pytest.mark.parametrize("cuts", [(3,), (1, 2, 6), tuple(range(1, STEPS))], ids=str)
@pytest.mark.parametrize("name", ["momentum", "clipped adamw", "stepped"])
def test_steps_may_be_split_into_calls(trainer, name, cuts):
    train = trainer(name)
    expected, expected_losses = train()
    carry, losses = train.carry, np.zeros((LEVELS, STEPS), np.float32)
    for first, last in itertools.pairwise((0, *cuts, STEPS)):
        carry, some = train(carry, first=first, last=last)
        losses += np.asarray(some)
    assert_close(carry, expected)
    assert_close(losses, expected_losses)


@pytest.mark.parametrize("name", ["momentum", "stepped"])
def test_losses_are_zero_outside_the_steps_made(trainer, name):
    train = trainer(name)
    carry, losses = train(first=2, last=5)
    assert (np.asarray(losses) > 0).tolist() == [[2 <= i < 5 for i in range(STEPS)]] * LEVELS
    before, after = (c.params["logits"]["kernel"] for c in (train.carry, carry))
    assert not np.array_equal(before, after)
    carry, losses = train(first=3, last=3)
    assert not losses.any()
    assert_close(carry, train.carry)


@pytest.mark.parametrize("name", ["momentum", "adam", "clipped adamw", "stepped"])
def test_pruned_weights_are_exactly_zero_after_every_step(trainer, name):
    train = trainer(name)
    nothing = jax.tree.map(jnp.ones_like, train.masks)
    carry, _ = train(masks=nothing, last=3)  # so that the momentum pulls at what is pruned now
    masks = [np.asarray(mask) for mask in jax.tree.leaves(train.masks)]
    for leaf, mask in zip(jax.tree.leaves(carry.params), masks, strict=True):
        assert (np.asarray(leaf)[~mask] != 0).all()
    for i in range(3, STEPS):
        carry, _ = train(carry, first=i, last=i + 1)
        for leaf, mask in zip(jax.tree.leaves(carry.params), masks, strict=True):
            assert ((np.asarray(leaf) != 0) == mask).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["momentum", "clipped adamw"])
def test_what_a_pruned_weight_holds_does_not_spread(trainer, name, value):
    train = trainer(name)
    params = jax.tree.map(
        lambda w, m: jnp.where(m, w, jnp.asarray(value, w.dtype)), train.carry.params, train.masks
    )
    assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert_close(train(train.carry._replace(params=params)), train())


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

    network, optimizer = networks.network(lambda key: params, apply), optax.adam(0.1)
    carry = trees.stack([init_state(network, KEY, optimizer)])
    train = jax.jit(make_train(network, optimizer))
    carry, losses = train(carry, masks, x, y, batches, KEY, np.int32(0), np.int32(3))
    np.testing.assert_allclose(losses, [[0.9867152, 0.4158615, 0.9347716]], rtol=1e-5)
    expected = {
        "hidden_0": np.array([[[0.7671524, 0], [0.7624330, 0.5508510]]]),
        "logits": np.array([[[0.7894401, -0.7894401], [0.2631387, 0.4868614]]]),
    }
    assert_close(carry.params, expected, rtol=1e-5)


def test_the_loss_is_that_of_the_task_over_the_weights_of_the_batch():
    """Tokens: of a batch every valid one counts the same, however many each example has."""
    table, rate = np.random.default_rng(3).normal(size=(4, 4)).astype(np.float32), 0.5
    x = np.array([[0, 1, 2], [3, 0, 1], [2, 2, 2]], np.int32)
    y = np.array([[1, 2, 3], [0, -1, -1], [-1, -1, -1]], np.int32)
    network = networks.network(
        lambda key: {"table": jnp.asarray(table)}, lambda p, x: p["table"][x]
    )
    optimizer, batches = optax.sgd(rate), jnp.array([[0, 1], [2, 2]])
    train = jax.jit(make_train(network, optimizer, task=tasks.tokens()))
    carry = trees.stack([init_state(network, KEY, optimizer)])
    masks = {"table": jnp.ones((1, 4, 4), bool)}
    data = jnp.asarray(x), jnp.asarray(y), batches, KEY
    carry, losses = train(carry, masks, *data, np.int32(0), np.int32(1))
    tokens, targets = x[y >= 0], y[y >= 0]
    logits = table[tokens].astype(np.float64)
    expected = -log_softmax(logits, axis=1)[np.arange(4), targets].mean()
    np.testing.assert_allclose(losses, [[expected, 0]], rtol=1e-5)
    gradient = np.zeros((4, 4))
    np.add.at(gradient, tokens, (softmax(logits, axis=1) - np.eye(4)[targets]) / 4)
    np.testing.assert_allclose(carry.params["table"][0], table - rate * gradient, rtol=1e-5)
    # A batch of nothing but padding moves nothing.
    after, losses = train(carry, masks, *data, np.int32(1), np.int32(2))
    assert_close((after, losses), (carry, np.zeros((1, 2), np.float32)))


def noisy_network():
    """Return a network with dropout, and with a running mean of its outputs as its state."""
    rng = np.random.default_rng(4)
    params = {"logits": jnp.asarray(rng.normal(size=(FEATURES, CLASSES)), jnp.float32)}

    def train(params, state, x, key):
        kept = jax.random.bernoulli(key, 0.5, x.shape)
        outputs = jnp.where(kept, 2 * x, 0.0) @ params["logits"]
        mean = jnp.mean(outputs, axis=0)
        return outputs - mean[None], {"mean": 0.9 * state["mean"] + 0.1 * mean}

    def apply(params, state, x):
        return x @ params["logits"] - state["mean"][None]

    return Network(lambda key: (params, {"mean": jnp.ones(CLASSES)}), apply, train)


def by_hand(kernel, batches):
    """Return losses and the running mean of batches, without an update of the kernel."""
    losses, running = [], np.ones(CLASSES)
    for i, rows in enumerate(np.asarray(batches)):
        x = np.asarray(X)[rows].astype(np.float64)
        kept = np.asarray(jax.random.bernoulli(jax.random.fold_in(KEY, i), 0.5, x.shape))
        outputs = np.where(kept, 2 * x, 0) @ kernel
        y, mean = np.asarray(Y)[rows], outputs.mean(axis=0)
        losses.append(-log_softmax(outputs - mean, axis=1)[np.arange(len(y)), y].mean())
        running = 0.9 * running + 0.1 * mean
    return losses, running


NOISY = noisy_network()
NOISY_MASKS = {
    "logits": jnp.asarray(np.random.default_rng(6).random((LEVELS, FEATURES, CLASSES)) < 0.7)
}


@pytest.mark.parametrize("options", [{}, {"levels_at_once": LEVELS}, {"stepped": True}], ids=str)
def test_keys_and_state_are_those_of_a_plain_loop(options):
    still = optax.sgd(0.0)
    start = init_state(NOISY, KEY, still)
    train = make_train(NOISY, still, **options)
    train = train if options.get("stepped") else jax.jit(train)
    args = NOISY_MASKS, X, Y, BATCHES, KEY
    carry, losses = train(trees.stack([start] * LEVELS), *args, np.int32(0), np.int32(STEPS))
    for level, mask in enumerate(np.asarray(NOISY_MASKS["logits"])):
        expected = by_hand(np.where(mask, start.params["logits"], 0), BATCHES)
        found = losses[level], carry.state["mean"][level]
        for got, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)
    # No step, no change; a later call goes on with the keys of its steps.
    assert_close(train(carry, *args, np.int32(4), np.int32(4))[0], carry)
    first, _ = train(trees.stack([start] * LEVELS), *args, np.int32(0), np.int32(4))
    assert_close(train(first, *args, np.int32(4), np.int32(STEPS))[0], carry)


def test_recalibration_is_a_plain_loop():
    params, state = NOISY.init(KEY)
    args = params, NOISY_MASKS, state, X, BATCHES[:4], KEY
    looped = jax.jit(make_recalibrate(NOISY))(*args)
    assert looped["mean"].shape == (LEVELS, CLASSES)
    assert_close(make_recalibrate(NOISY, stepped=True)(*args), looped, rtol=1e-6)
    for mean, mask in zip(looped["mean"], np.asarray(NOISY_MASKS["logits"]), strict=True):
        _, expected = by_hand(np.where(mask, params["logits"], 0), BATCHES[:4])
        np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["adam", "stepped"])
def test_one_trace_serves_all_values(trainer, name):
    train = trainer(name)
    train()
    traces = train.traces
    assert traces > 0
    carry, _ = train(first=2, last=3)
    masks = jax.tree.map(lambda m: m[::-1], train.masks)
    train(carry, masks, first=3, last=4)
    train(carry, masks, first=5, last=7, data=(X + 1, (Y + 1) % CLASSES, BATCHES[::-1]))
    assert train.traces == traces


def test_a_step_is_compiled_by_the_given_jit_once():
    jit = Mock(wraps=jax.jit)
    make_train(NOISY, MOMENTUM, jit=jit)  # is for the caller to compile
    assert jit.call_count == 0
    make_train(NOISY, MOMENTUM, stepped=True, jit=jit)
    make_recalibrate(NOISY, stepped=True, jit=jit)
    assert jit.call_count == 2


def test_integers_cannot_be_trained():
    params = {"kernel": jnp.ones((2, 2)), "table": {"ids": jnp.arange(3)}}
    network = networks.network(lambda key: params, lambda params, x: x @ params["kernel"])
    with pytest.raises(TypeError, match="leaf 'table/ids' is of int32 and cannot be trained"):
        init_state(network, KEY, ADAM)


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
