"""Tell whether a function is still the one that a run was made with.

Functions come in, such as scores, a training step or an initialisation; hashes of what they compute
go out. `study` records one an arm, and refuses to continue a run whose functions have changed.
"""

import ast
import contextlib
import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

# Parameters of a primitive that do not change its numbers, or that hold a program a second time.
_IGNORED = {
    "name", "ctx_mesh", "mesh", "sharding", "in_shardings", "out_sharding", "out_shardings",
    "in_layouts", "out_layouts", "donated_invars", "inline", "keep_unused", "debug_info",
    "name_and_src_info", "jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees", "computation",
}  # fmt: skip
_CUSTOM = {"custom_jvp_call": "custom_jvp", "custom_vjp_call": "custom_vjp"}
_PLACED = (jax.sharding.Sharding, jax.sharding.Mesh, jax.sharding.AbstractMesh)


class Identity(NamedTuple):
    """What a function computes, as a value to compare.

    Attributes:
        hash: SHA-256, 64 hexadecimal digits. Another version of JAX may trace the same function to
            another program.
        note: what could not be traced and is compared by its source, or None.
    """

    hash: str
    note: str | None


class _Walk(NamedTuple):
    """What a walk has met: texts by the id of an object that is kept alive, and its notes.

    Derivative rules are followed, but for those within a rule, which may call itself.
    """

    texts: dict[Any, tuple[Any, str]]
    notes: list[str]
    rules: bool = True


def fingerprint(f: Callable, *args: Any) -> Identity:
    """Hash what a function computes, whatever it and its variables are called.

    `f` is traced, and its program hashed: primitives, shapes, dtypes, literals, the bytes of the
    arrays that it closes over, and the derivative rules of its `custom_jvp` and `custom_vjp`.
    Shardings, names and source lines are left out. A function that cannot be traced is hashed by
    its source (without comments), defaults, closure, and the functions and constants of its module
    that it refers to; the same holds for a callback inside a program. Hashes are the same in every
    process.

    Args:
        f: any function of trees of arrays.
        *args: its arguments, arrays or `jax.ShapeDtypeStruct`s; only paths, shapes and dtypes
            matter.

    Returns:
        The hash, and a note where something was not traced.

    Example:
        >>> x = jax.ShapeDtypeStruct((3,), jnp.float32)
        >>> double = fingerprint(lambda x: 2 * x, x).hash
        >>> double == fingerprint(lambda y: 2 * y, x).hash, double == fingerprint(jnp.exp, x).hash
        (True, False)
    """
    walk = _Walk({}, [])
    try:
        closed, out = jax.make_jaxpr(f, return_shape=True)(*args)
        text = f"{_closed(closed, walk)}{_tree(args)}{_tree(out)}"
    except Exception as error:  # whatever a function that wants concrete values stumbles over
        reason = str(error).strip().split("\n")[0]
        walk.notes.append(
            f"{function_name(f)} cannot be traced ({type(error).__name__}: {reason}), "
            "and is compared by its source"
        )
        text = f"{_text(f, walk)}{_tree(args)}"
    return Identity(_sha256(text), "; ".join(dict.fromkeys(walk.notes)) or None)


def digest(value: Any) -> str:
    """Hash a value, without tracing: SHA-256, the same in every process.

    Args:
        value: numbers, strings, arrays, containers, functions (by their source).
    """
    return _sha256(_text(value, _Walk({}, [])))


def combine(**parts: Any) -> str:
    """Hash several identities and settings into one: SHA-256 of their canonical JSON.

    Args:
        **parts: an `Identity`, of which the hash alone counts, or a value that JSON holds; anything
            else counts by its `digest`.

    Example:
        >>> combine(a=1, b=(2, 3)) == combine(b=[2, 3], a=1)
        True
    """
    plain = {k: part.hash if isinstance(part, Identity) else part for k, part in parts.items()}
    return _sha256(json.dumps(plain, sort_keys=True, separators=(",", ":"), default=digest))


def function_name(f: Any) -> str:
    """Return the name of a function, of what a `partial` calls, or of a callable's class."""
    while isinstance(f, functools.partial):
        f = f.func
    return getattr(f, "__name__", type(f).__name__)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _tree(tree: Any) -> str:
    """Return the paths of the leaves, and their shapes and dtypes."""
    flat, _ = jax.tree.flatten_with_path(tree)
    return str([(jax.tree_util.keystr(path), _aval(leaf)) for path, leaf in flat])


def _aval(x: Any) -> str:
    """Return shape, dtype and weakness of anything that has them, or its type."""
    if not hasattr(x, "dtype"):
        return type(x).__name__
    return f"{x.dtype}{list(x.shape)}{'~' if getattr(x, 'weak_type', False) else ''}"


def _closed(closed: core.ClosedJaxpr, walk: _Walk) -> str:
    """Hash a program and its constants."""
    consts = [_text(x, walk) for x in closed.consts]
    return _sha256(f"{_program(closed.jaxpr, walk)}{consts}")


def _program(jaxpr: core.Jaxpr, walk: _Walk) -> str:
    """Hash a program, once however often it is called; variables go by their order."""
    if (id(jaxpr), walk.rules) in walk.texts:
        return walk.texts[id(jaxpr), walk.rules][1]
    numbers: dict[Any, int] = {}

    def name(x: Any) -> str:
        if not isinstance(x, core.Literal):
            return f"{numbers.setdefault(x, len(numbers))}:{_aval(x.aval)}"
        dtype = getattr(x.aval, "dtype", None)
        # A Python number counts as what the program makes of it.
        value = np.asarray(x.val, dtype) if isinstance(dtype, np.dtype) else x.val
        return f"{_text(value, walk)}:{_aval(x.aval)}"

    lines = [str([name(x) for x in [*jaxpr.constvars, *jaxpr.invars]])]
    for eqn in jaxpr.eqns:
        kind = eqn.primitive.name
        if kind.startswith("debug_"):  # prints
            continue
        ins = [name(x) for x in eqn.invars]
        params = {k: _text(v, walk) for k, v in sorted(eqn.params.items()) if k not in _IGNORED}
        if kind.endswith("callback"):
            walk.notes.append(f"a {kind} is compared by its source")
        if walk.rules and kind in _CUSTOM:
            params["rule"] = _rule(jaxpr, eqn, walk)
        lines.append(f"{[name(x) for x in eqn.outvars]}{kind}{params}{ins}")
    lines.append(str([name(x) for x in jaxpr.outvars]))
    text = _sha256("\n".join(lines))
    walk.texts[id(jaxpr), walk.rules] = jaxpr, text
    return text


def _rule(jaxpr: core.Jaxpr, eqn: Any, walk: _Walk) -> str:
    """Hash the derivative of an equation with a rule of its own: it is differentiated, alone."""
    invars = [x for x in eqn.invars if not isinstance(x, core.Literal)]
    outvars = [x for x in eqn.outvars if not isinstance(x, core.DropVar) and _inexact(x)]
    alone = jaxpr.replace(constvars=[], invars=invars, outvars=outvars, eqns=[eqn])
    call = core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))
    inexact = [x for x in invars if _inexact(x)]

    def derivative(values: list, tangents: list) -> Any:
        def f(*active: Any) -> Any:
            own = iter(active)
            given = zip(invars, values, strict=True)
            return call(*(next(own) if _inexact(x) else value for x, value in given))

        active = [value for x, value in zip(invars, values, strict=True) if _inexact(x)]
        if eqn.primitive.name == "custom_jvp_call":
            return jax.jvp(f, active, tangents)
        return jax.vjp(f, *active)[1](tangents)

    along = inexact if eqn.primitive.name == "custom_jvp_call" else outvars
    shapes = [
        [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in v] for v in (invars, along)
    ]
    try:
        return _closed(jax.make_jaxpr(derivative)(*shapes), walk._replace(rules=False))
    except Exception as error:
        walk.notes.append(
            f"the rule of a {_CUSTOM[eqn.primitive.name]} cannot be traced "
            f"({type(error).__name__}), and is not compared"
        )
        return "?"


def _inexact(x: Any) -> bool:
    return jnp.issubdtype(x.aval.dtype, jnp.inexact)


def _text(value: Any, walk: _Walk) -> str:
    """Return a text of a value that is the same in every process."""
    if isinstance(value, core.ClosedJaxpr):
        return _closed(value, walk)
    if isinstance(value, core.Jaxpr):
        return _program(value, walk)
    if isinstance(value, enum.Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return _array(value, walk)
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.dtype):
        return repr(value)
    if isinstance(value, _PLACED):
        return "placed"
    if isinstance(value, Mapping):
        items = [(_text(k, walk), _text(v, walk)) for k, v in value.items()]
        return f"{type(value).__name__}{sorted(items)}"
    if isinstance(value, set | frozenset):
        return f"set{sorted(_text(item, walk) for item in value)}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}{[_text(item, walk) for item in value]}"
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, type) or inspect.isbuiltin(value):
        return f"{value.__module__}.{value.__qualname__}"
    if id(value) not in walk.texts:
        walk.texts[id(value)] = value, "itself"  # where it refers to itself
        text = _object(value, walk)
        walk.texts[id(value)] = value, _sha256(text)
    return walk.texts[id(value)][1]


def _array(x: Any, walk: _Walk) -> str:
    """Return dtype, shape and the hash of the bytes."""
    aval = _aval(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    x = np.asarray(x)
    if x.dtype.hasobject:
        return f"{aval}{_text(x.tolist(), walk)}"
    return f"{aval}{hashlib.sha256(x.tobytes()).hexdigest()}"


def _object(value: Any, walk: _Walk) -> str:
    """Return a text of a function, or of an object with or without attributes."""
    if isinstance(value, functools.partial):
        return f"partial{[_text(x, walk) for x in (value.func, value.args, value.keywords)]}"
    if isinstance(value, types.MethodType):
        return f"method{[_text(x, walk) for x in (value.__func__, value.__self__)]}"
    if isinstance(value, types.FunctionType):
        return _function(value, walk)
    kind = type(value)
    attributes = dict(getattr(value, "__dict__", {}))
    if dataclasses.is_dataclass(value):
        attributes = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
    shown = "" if attributes else repr(value)
    if "__wrapped__" in attributes:  # what `jit` returns: of its copied names only this counts
        attributes = {k: v for k, v in attributes.items() if k[:2] != "__" or k == "__wrapped__"}
    elif callable(value):
        attributes["()"] = kind.__call__
    shown = "" if " at 0x" in shown else shown  # an address
    return f"{kind.__module__}.{kind.__qualname__}{_text(attributes, walk)}{shown}"


def _function(f: types.FunctionType, walk: _Walk) -> str:
    """Return source, defaults, closure, and what it refers to in its module."""
    closure = {}
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not set yet
            closure[name] = cell.cell_contents
    plain = bool | int | float | complex | str | tuple | list | dict | set | np.ndarray | jax.Array
    found = {name: f.__globals__[name] for name in _names(f.__code__) if name in f.__globals__}
    found = {
        name: value
        for name, value in found.items()
        if isinstance(value, plain)
        or (callable(value) and getattr(value, "__module__", None) == f.__module__)
    }
    parts = _source(f.__code__), f.__defaults__, f.__kwdefaults__, closure, found
    return f"function{[_text(part, walk) for part in parts]}"


def _source(code: types.CodeType) -> Any:
    """Return the source without comments; of a lambda, or where there is none, the bytecode.

    The source of a lambda is its whole line, on which there may be others.
    """
    if code.co_name != "<lambda>":
        with contextlib.suppress(OSError, SyntaxError):
            return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(code))))
    constants = [_source(c) if isinstance(c, types.CodeType) else c for c in code.co_consts]
    return [code.co_code, code.co_names, constants]


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the names that a function and those inside it refer to."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
