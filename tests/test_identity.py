import functools
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune.identity import Identity, combine, digest, fingerprint

X = jax.ShapeDtypeStruct((3,), jnp.float32)
TABLE = np.arange(3, dtype=np.float32)
DEPTH = {"a": 1}
OPTAX = jax.numpy_dtype_promotion("standard")  # what its own code needs


def of(f, *args):
    """The hash of a function that can be traced."""
    found = fingerprint(f, *(args or (X,)))
    assert found.note is None
    return found.hash


def straight(gradient):
    """The identity, with a derivative of its own."""
    f = jax.custom_vjp(lambda x, n: x)
    f.defvjp(lambda x, n: (x, n), lambda n, g: (gradient * g, None))
    return f


def forward(gradient):
    f = jax.custom_jvp(lambda x: x)
    f.defjvp(lambda primals, tangents: (f(*primals), gradient * f(*tangents)))
    return f


class Mlp(nn.Module):
    act: str = "relu"
    rate: float = 0.5

    @nn.compact
    def __call__(self, x, training=False):
        x = nn.BatchNorm(use_running_average=not training)(nn.Dense(4)(x))
        x = nn.Dropout(self.rate, deterministic=not training)(getattr(nn, self.act)(x))
        return nn.log_softmax(nn.Dense(2)(x))


def programs():
    """Return (name, function, arguments) of what is hashed in two processes."""
    table, key = jnp.array([0.5, -1.0, 2.0]), jax.random.key(3)
    module, x, rngs = Mlp(), jnp.ones((2, 3)), {"dropout": jax.random.key(1)}
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 10))
    state = jax.eval_shape(optimizer.init, variables)

    def train(v):
        return module.apply(v, x, True, rngs=rngs, mutable=["batch_stats"])[0].sum()

    @jax.jit
    def nested(x):
        return jax.lax.cond(x.sum() > 0, jnp.sin, lambda x: x * table, x) + jax.random.uniform(key)

    def host(params, deep=(1, 2.5)):
        return {n: np.abs(np.asarray(w)) * len(DEPTH) * helper(deep[0]) for n, w in params.items()}

    def called(x):
        return jax.pure_callback(lambda x: np.asarray(x) * TABLE, X, x)

    return [
        ("relu", jax.nn.relu, (X,)),
        ("custom_vjp", lambda x: straight(2)(x, 1), (X,)),
        ("custom_jvp", forward(2), (X,)),
        ("closed over", lambda x: x * table + TABLE, (X,)),
        ("partial", functools.partial(jnp.clip, min=0.5), (X,)),
        ("nested", nested, (X,)),
        ("scan", lambda x: jax.lax.scan(lambda c, a: (c + a * x, a), x, table), (X,)),
        ("while", lambda x: jax.lax.while_loop(lambda c: (c < 3).all(), lambda c: c + 1, x), (X,)),
        ("checkpoint", jax.checkpoint(jnp.sin, policy=jax.checkpoint_policies.dots_saveable), (X,)),
        ("lambda", lambda x: 2 * x, (X,)),
        ("adam", optimizer.update, (variables, state, variables)),
        ("apply", module.apply, (variables, x)),
        ("gradient", jax.grad(train), (variables,)),
        ("init", module.init, (jax.random.key(0), x)),
        ("set", lambda x: x + len({"a", "b"}), ({"b": X, "a": X}["a"],)),
        ("host", host, ({"w": X},)),
        ("callback", called, (X,)),
        ("module", lambda x: np.asarray(x) * module.apply(variables, x), (x,)),
        ("rule", lambda x: np.asarray(x) + straight(2)(x, {"a", "b", "c"}), (x,)),
    ]


def helper(x):
    return x + 1


def hashes(order):
    """Hash them all, in one order or the other, so that neither caches nor addresses agree."""
    with OPTAX:
        return {name: fingerprint(f, *args).hash for name, f, args in programs()[::order]}


def test_hashes_are_the_same_in_every_process():
    started = []
    for seed, order in (("1", 1), ("2", -1)):
        code = f"import json, test_identity as t; print(json.dumps(t.hashes({order})))"
        paths = os.pathsep.join(str(Path(__file__).parents[i]) for i in (0, 1))
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}
        command = [sys.executable, "-c", code]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE))
    expected = hashes(1)
    for process in started:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert json.loads(out) == expected
    assert len({*expected.values()}) == len(expected)


def test_names_and_comments_do_not_matter():
    def scores(params):
        total = jnp.abs(params)  # one
        return total * TABLE

    def mine(w):
        """Say something."""

        @jax.jit
        def abs_of(v):
            return jnp.abs(v)

        return jax.jit(abs_of)(w) * jnp.array(TABLE)

    def other(w):
        @jax.jit
        def other_name(v):
            return jnp.abs(v)

        return jax.jit(other_name)(w) * jnp.array(TABLE)

    first = of(scores)
    assert len(first) == 64 and int(first, 16)
    assert of(mine) == of(other) != first  # compiled inside: another program
    exec("def again(a):\n  b = jnp.abs(a)\n  return b * TABLE", globals() | (scope := {}), scope)
    assert of(scope["again"]) == first
    assert of(functools.partial(lambda k, x: k * x, 2)) == of(lambda x: 2 * x)
    assert of(scores, np.ones(3, np.float32)) == of(scores, jnp.zeros(3)) == first


A, B = np.array([1.0, 2.0, 3.0], np.float32), np.array([1.0, 2.0, 3.0], np.float32)
B.view(np.int32)[2] ^= 1  # one bit
DENSE = nn.Dense(4)
SGD, ADAM = optax.sgd, optax.adam
SCHEDULE = optax.linear_schedule


@pytest.mark.parametrize(
    "functions",
    [
        [jnp.abs, lambda w: -jnp.abs(w), lambda w: jnp.abs(-w)],
        [lambda x: x * A, lambda x: x * B],
        [lambda x: x * jnp.array(A), lambda x: x * jnp.array(B)],
        [jax.jit(lambda x: x * A), jax.jit(lambda x: x * B)],
        [lambda x, i=i: x + jax.random.uniform(jax.random.key(i)) for i in (0, 1)],
        [lambda x, k=k: x + jax.random.uniform(k) for k in jax.random.split(jax.random.key(0))],
        [functools.partial(lambda a, x: a * x, a) for a in (1, 2, 1.5)],
        [lambda x, c=c: x * c for c in (0.1, np.nextafter(np.float32(0.1), np.float32(1)).item())],
        [jax.nn.relu, jnp.tanh, jax.nn.gelu, lambda x: jnp.maximum(x, 0)],
        [lambda x, d=d: x.astype(d).astype(jnp.float32) for d in ("float16", "bfloat16")],
        [lambda x, g=g: straight(g)(x, 1) for g in (1, 2)],
        [forward(1), forward(2)],
        [lambda x: jax.lax.scan(lambda c, a: (c + a, c), 0.0, x), lambda x:
         jax.lax.scan(lambda c, a: (c - a, c), 0.0, x)],
        [lambda x: jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x), lambda x:
         jax.lax.cond(x[0] > 0, jnp.cos, jnp.sin, x)],
        [lambda x: {"a": x, "b": 2 * x}, lambda x: {"b": x, "a": 2 * x},
         lambda x: {"c": x, "d": 2 * x}],
        [lambda x: x - 2 * x, lambda x: 2 * x - x],
    ],
)  # fmt: skip
def test_other_functions_have_other_hashes(functions):
    found = [of(f) for f in functions]
    assert len({*found}) == len(found)


def test_other_arguments_have_other_hashes():
    args = [
        (X,), (jax.ShapeDtypeStruct((4,), jnp.float32),), (jax.ShapeDtypeStruct((3,), jnp.int32),),
        ({"a": X},), ({"b": X},), ([X],), (X, X),
    ]  # fmt: skip
    assert len({of(lambda *args: args, *a) for a in args}) == len(args)


def test_learning_rates_have_other_hashes():
    grads = {"w": X}
    optimizers = [f(rate) for f in (SGD, ADAM) for rate in (1e-4, 0.1)]
    optimizers += [ADAM(SCHEDULE(start, 0.0, 10)) for start in (1e-4, 0.1)]
    optimizers += [SGD(0.1, momentum=0.9), SGD(0.1, momentum=0.8), optax.adamw(0.1), ADAM(0.1)]
    with OPTAX:
        found = [of(o.update, grads, jax.eval_shape(o.init, grads), grads) for o in optimizers]
    assert found[3] == found[-1]  # the same, made again
    assert len({*found}) == len(found) - 1


def test_networks_have_other_hashes():
    x, key = jnp.ones((2, 3)), jax.random.key(0)
    variables = jax.eval_shape(Mlp().init, key, x)
    apply = [of(Mlp(act).apply, variables, x) for act in ("relu", "tanh")]
    scale = [nn.initializers.normal(s) for s in (1e-2, 1e-3)]
    init = [of(nn.Dense(4, kernel_init=s).init, key, x) for s in scale]

    def training(rate):
        rngs = {"dropout": key}
        return lambda v: Mlp(rate=rate).apply(v, x, True, rngs=rngs, mutable=["batch_stats"])

    found = [*apply, *init, *(of(training(rate), variables) for rate in (0.1, 0.5))]
    assert len({*found}) == len(found)
    assert of(Mlp("tanh").apply, variables, x) == apply[1]


def test_shardings_and_prints_do_not_matter():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("d")
    wide = jax.ShapeDtypeStruct((4,), jnp.float32)

    def constrained(x, spec):
        return jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, spec)) * 2

    def printed(x):
        jax.debug.print("{x}", x=x)
        return x * 2

    found = [of(functools.partial(constrained, spec=s), wide)
             for s in (spec, jax.sharding.PartitionSpec())]  # fmt: skip
    assert found[0] == found[1]
    assert of(printed) == of(lambda x: x * 2)


def test_a_rule_that_calls_its_function():
    @jax.custom_jvp
    def exp(x):
        return jnp.exp(x)

    exp.defjvp(lambda primals, tangents: (exp(*primals), exp(*primals) * tangents[0]))
    assert of(exp) != of(jnp.exp)


def test_a_rule_that_fails_is_noted():
    f = jax.custom_vjp(lambda x: 2 * x)
    f.defvjp(lambda x: (x, None), lambda residuals, g: (np.asarray(g),))
    found = fingerprint(lambda x: f(f(x)), X)
    message = "the rule of a custom_vjp cannot be traced (TracerArrayConversionError)"
    assert found.note == f"{message}, and is not compared"


def make_host(scale, table=None, default=1):
    def host(params, default=default):
        # a comment
        return np.asarray(params) * scale + (0 if table is None else table["a"]) + default

    return host


def test_what_cannot_be_traced_goes_by_source():
    found = fingerprint(make_host(2), X)
    assert found.note and "host cannot be traced (TracerArrayConversionError" in found.note
    assert "compared by its source" in found.note and "\n" not in found.note
    assert found == fingerprint(make_host(2), X)
    others = [
        make_host(3), make_host(2, {"a": A}), make_host(2, {"a": B}), make_host(2, default=2),
        lambda p: np.asarray(p) * 2, lambda p: np.asarray(p) * 3, lambda p: np.abs(np.asarray(p)),
        np.abs, np.exp, functools.partial(np.clip, min=1), functools.partial(np.clip, min=2),
        jax.jit(make_host(2)), jax.jit(make_host(3)), Host(2).scores, Host(3).scores, Host(3),
    ]  # fmt: skip
    got = [found.hash, *(fingerprint(f, X).hash for f in others)]
    assert len({*got}) == len(got)


class Host:
    def __init__(self, scale):
        self.scale, self.itself = scale, self

    def scores(self, params):
        return np.asarray(params) * self.scale

    def __call__(self, params):
        return np.asarray(params) + self.scale


def test_source_reaches_what_it_refers_to():
    lines = ["import numpy as np", "FACTOR = {}", "def helper(x): return x {} 2",
             "def mine(w): return [helper(np.asarray(x)) * FACTOR for x in w]"]  # fmt: skip

    def edited(*values):
        scope: dict = {"__name__": "edited"}
        exec("\n".join(lines).format(*values), scope)
        return fingerprint(scope["mine"], X).hash

    assert edited(1, "+") == edited(1, "+")
    assert len({edited(1, "+"), edited(2, "+"), edited(1, "*")}) == 3


def test_comments_in_source_do_not_matter(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    text = "import numpy as np\ndef mine(w):\n    {}return np.asarray(w) * {}\n"
    found = []
    for i, (comment, factor) in enumerate([("", 2), ("# why\n    ", 2), ("", 3)]):
        (tmp_path / f"commented_{i}.py").write_text(text.format(comment, factor))
        found.append(fingerprint(importlib.import_module(f"commented_{i}").mine, X).hash)
    assert found[0] == found[1] != found[2]


def test_callbacks_go_by_source():
    def program(factor):
        return lambda x: jax.pure_callback(lambda a: np.asarray(a) * factor, X, x)

    found = [fingerprint(program(factor), X) for factor in (2, 3, 2)]
    assert found[0] == found[2] and found[0].hash != found[1].hash
    assert found[0].note == "a pure_callback is compared by its source"


def test_digest_and_combine():
    values = [
        None, True, 1, 1.0, "1", b"1", 1j, -0.0, 0.0, (1,), [1], {1}, {"a": 1}, {"a": 2}, A, B,
        A.astype(np.float64), jnp.dtype("float16"), jax.random.key(0), jax.random.key(1), np, jnp,
        np.float32, np.array([None, "a"]), jnp.bfloat16(1), Path("a"), Path("b"), nn.Dense(3),
        nn.Dense(4), jax.lax.Precision.HIGH, slice(1, 2), object(),
    ]  # fmt: skip
    assert len({digest(value) for value in values}) == len(values)
    assert digest(object()) == digest(object())
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})

    one = Identity("ab" * 32, None)
    base = combine(apply=one, settings={"levels": (0, 50), "rate": 0.1, "f": np.float32(1)})
    assert len(base) == 64
    noted = one._replace(note="a note")
    same = {"settings": {"f": np.float32(1), "rate": 0.1, "levels": [0, 50]}, "apply": noted}
    assert combine(**same) == base
    others = [
        {"apply": one._replace(hash="ac" * 32), **{k: v for k, v in same.items() if k != "apply"}},
        {**same, "settings": {"levels": [0, 60], "rate": 0.1, "f": np.float32(1)}},
        {**same, "settings": {"levels": [0, 50], "rate": 0.2, "f": np.float32(1)}},
        {**same, "more": None}, {"init": one, "settings": same["settings"]},
    ]  # fmt: skip
    assert len({base, *(combine(**other) for other in others)}) == 1 + len(others)


class Residual(nn.Module):
    """Twenty convolutions with BatchNorm, some with a shortcut."""

    @nn.compact
    def __call__(self, x, training=False):
        for i in range(20):
            y = nn.Conv(16, (3, 3), use_bias=False)(x)
            y = nn.BatchNorm(use_running_average=not training)(y)
            x = nn.relu(y + x if i % 2 and i > 1 else y)
        return nn.Dense(10)(x.mean((1, 2)))


def test_a_training_step_is_hashed_in_a_second():
    x, y = jnp.ones((2, 8, 8, 3)), jnp.zeros(2, int)
    variables = jax.eval_shape(Residual().init, jax.random.key(0), x)
    optimizer = optax.adam(0.1)

    def step(variables, state, x, y):
        def loss(params):
            v = {**variables, "params": params}
            outputs, new = Residual().apply(v, x, True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean(), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        return optimizer.update(grads, state, variables["params"]), new

    args = variables, jax.eval_shape(optimizer.init, variables["params"]), x, y
    with OPTAX:
        start = time.process_time()
        jax.make_jaxpr(step)(*args)
        traced = time.process_time()
        of(step, *args)
    assert time.process_time() - traced < traced - start + 1
