"""The package as a whole: lazy exports, the order of its modules, its examples, its pins."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxprune"
# A module imports only from those before it, and so does a file of the study.
ORDER = (
    "config types trees files data networks tasks arrays granularity distribution select "
    "masks structure identity criteria schedules transforms train evaluate sparse checkpoints "
    "results figures report study.setup study.parts study.programs study.progress "
    "study.epoch study.dense study.record study.stages study.sweep study"
).split()
OPTIONAL = {package for packages in jaxprune._EXTRAS.values() for package in packages.split()}
FILES = {
    path.relative_to(PACKAGE).as_posix(): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
NAMES = {file: re.sub(r"(/__init__)?\.py", "", file).replace("/", ".") for file in FILES}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def imported_modules(file: str, source: str) -> set[str]:
    """All that a file imports of jaxprune, wherever the statement stands; dotted names."""
    package, names = ["jaxprune", *file.split("/")[:-1]], set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: 1 - node.level or None] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{origin}.{alias.name}"
                # What is imported from jaxprune itself are modules, and only modules.
                is_module = origin == "jaxprune" or name[9:] in NAMES.values()
                names.add(name if is_module else origin)
    return {name[9:] for name in names if name.split(".")[0] == "jaxprune"}


def place(name: str) -> int | None:
    """The place of a module in the order; a file without one has that of its package."""
    found = [ORDER.index(part) for part in (name, name.split(".")[0]) if part in ORDER]
    return found[0] if found else None


def order_errors(file: str, source: str) -> list[str]:
    """What is wrong with the imports of `file`, a path inside the package."""
    own = place(re.sub(r"(/__init__)?\.py", "", file).replace("/", "."))
    if own is None:
        return [f"{file} has no place in the order of modules"]
    before = own + ("/" in file)  # files of one package may import each other
    return [
        f"{file} imports {name or 'jaxprune'}"
        for name in sorted(imported_modules(file, source) - {"__version__"})
        if (other := place(name)) is None or other >= before
    ]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_name(requirement: str) -> str:
    return canonical(re.split(r"[^\w.-]", requirement)[0])


def run_python(code: str, *missing: str) -> str:
    """Run code in a process without these packages; return what it prints."""
    block = f"import sys; sys.modules.update(dict.fromkeys({missing!r}))"
    command = [sys.executable, "-W", "error", "-c", f"{block}\n{textwrap.dedent(code)}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    code = "import jaxprune; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(run_python(code).split())
    assert "jaxprune" in loaded
    assert loaded.isdisjoint({"jax", "jaxtyping", "numpy", "optax", *OPTIONAL})


def test_settings_data_and_results_need_no_jax() -> None:
    code = """
        import jaxprune.config, jaxprune.data, jaxprune.files, jaxprune.results
        print(len(jaxprune.load_run("figures").rows))
    """
    assert int(run_python(code, "jax", "jaxlib", "jaxtyping")) > 0


def test_the_core_needs_no_extra() -> None:
    code = """
        import jax, jax.numpy as jnp, numpy as np, optax
        import jaxprune as jp
        from jaxprune.data import Data, Split
        from jaxprune.train import init_state

        def apply(params, x):
            return jax.nn.relu(x @ params["hidden"]) @ params["logits"]

        params = {"hidden": jnp.arange(24.0).reshape(4, 6), "logits": jnp.ones((6, 3))}
        x, y = jnp.ones((8, 4)), jnp.zeros(8, jnp.int32)
        jp.weight_masks(params, 0.5), jp.unit_masks(params, 0.5)
        units = jp.group_masks(jp.dependency_graph(apply, params, x), params, 0.5)
        small, smaller = jp.compact(apply, params, units, x)
        print(small["hidden"].shape, smaller(small, x).shape)
        masks = jp.masks_at(jp.magnitude(params), jp.counts(params, [0, 0.5]))
        network, sgd, key = jp.network(lambda key: params, apply), optax.sgd(0.1), jax.random.key(0)
        carry = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), init_state(network, key, sgd))
        train = jax.jit(jp.make_train(network, sgd))
        print(train(carry, masks, x, y, jnp.array([[0, 1]]), key, 0, 1)[1].shape)
        print(*jp.evaluate_levels(apply, params, masks, Data(*[Split(x, y)] * 3))[0]["accuracy"])
        for name in ("linen", "report", "save_sparse"):
            try:
                print(getattr(jp, name))
            except ModuleNotFoundError as error:
                print(error)
    """
    *found, linen, report, sparse = run_python(code, *OPTIONAL, "equinox").splitlines()
    assert found == ["(4, 3) (8, 3)", "(2, 1)", "1.0 1.0"]
    assert linen == "flax is not installed: pip install 'jaxprune[study]' brings it"
    assert report.startswith("<module 'jaxprune.report'")
    assert sparse.endswith("is not installed: pip install 'jaxprune[sparse]' brings it")


@pytest.mark.parametrize("extra", jaxprune._EXTRAS)
def test_a_missing_package_is_named_with_its_extra(extra: str) -> None:
    required = map(requirement_name, PYPROJECT["project"]["optional-dependencies"][extra])
    known = set(jaxprune._EXTRAS[extra].split())
    homes = packages_distributions()
    for package in known:
        found = jaxprune._missing(ModuleNotFoundError("no", name=f"{package}.part"))
        assert f"{package} is not installed: pip install 'jaxprune[{extra}]'" in str(found)
        assert found.name == f"{package}.part"
    brought = {canonical(name) for package in known for name in homes.get(package, ())}
    assert set(required) <= brought


@pytest.mark.parametrize("name", ["jaxprune.nothing", "my_module", None])
def test_other_missing_modules_are_left_alone(name: str | None) -> None:
    error = ModuleNotFoundError("no", name=name)
    assert jaxprune._missing(error) is error


@pytest.mark.parametrize("name", jaxprune.__all__)
def test_exports_resolve(name: str) -> None:
    value = getattr(jaxprune, name)
    assert value.__name__ == name
    assert value.__module__.startswith("jaxprune.")
    assert name in dir(jaxprune)


def test_exports_are_complete() -> None:
    (checked,) = (
        node
        for node in ast.parse((PACKAGE / "__init__.py").read_text()).body
        if isinstance(node, ast.If)
    )
    seen_by_checkers = [
        (str(node.module).removeprefix("jaxprune."), alias.name)
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    lazy = [(module, name) for module, names in jaxprune._MODULES.items() for name in names.split()]
    assert sorted(lazy) == sorted(seen_by_checkers)
    assert jaxprune.__all__ == sorted(name for _, name in lazy)


def test_unknown_export() -> None:
    with pytest.raises(AttributeError, match="'jaxprune' has no attribute 'magnitud'"):
        _ = jaxprune.magnitud
    assert not hasattr(jaxprune, "__wrapped__")


def test_modules_resolve() -> None:
    assert jaxprune.schedules.cubic is importlib.import_module("jaxprune.schedules").cubic


def test_version_is_the_same_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert PYPROJECT["project"]["version"] == jaxprune.__version__
    assert re.findall(r"^version: (\S+)$", citation, re.MULTILINE) == [jaxprune.__version__]


@pytest.mark.parametrize("file", FILES)
def test_import_order(file: str) -> None:
    assert order_errors(file, FILES[file].read_text()) == []


@pytest.mark.parametrize(
    ("file", "source", "wrong"),
    [
        ("masks.py", "from jaxprune import select, trees", 0),
        ("masks.py", "from jaxprune.types import Masks\nimport jaxprune.select", 0),
        ("masks.py", "from jaxprune import __version__", 0),
        ("masks.py", "from . import select\nfrom .types import Masks", 0),
        ("structure/units.py", "from .. import trees\nfrom . import graph", 0),
        ("structure/units.py", "from jaxprune.structure.graph import Graph", 0),
        ("study/stages.py", "from jaxprune.study import parts, record", 0),
        ("study/__init__.py", "from .curve import prune_curve", 0),
        ("masks.py", "from jaxprune import train", 1),
        ("masks.py", "def f():\n    import jaxprune.study", 1),
        ("masks.py", "from .train import make_train", 1),
        ("masks.py", "from jaxprune.masks import apply_masks", 1),
        ("masks.py", "import jaxprune", 1),
        ("structure/units.py", "from ..train import make_train", 1),
        ("structure/units.py", "from jaxprune import magnitude", 1),
        ("study/parts.py", "from jaxprune.study import parts, stages", 1),
        ("study/parts.py", "from jaxprune.study import run_sweep", 1),
        ("study/parts.py", "def f():\n    from .stages import run", 1),
        ("study/parts.py", "from jaxprune.study import helpers", 1),
        ("utils.py", "", 1),
    ],
)
def test_import_order_is_enforced(file: str, source: str, wrong: int) -> None:
    assert len(order_errors(file, source)) == wrong


def test_no_file_imports_itself_by_way_of_others() -> None:
    TopologicalSorter(
        {NAMES[file]: imported_modules(file, path.read_text()) for file, path in FILES.items()}
    ).prepare()


def examples() -> Iterator[tuple[str, str, int, str]]:
    """Yield module, name, line and text of every docstring that has an example.

    Read off the source, because pytest's own collection overlooks functions that are wrapped: by
    `jit`, or by the checks of the tests.
    """
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for file, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text and ">>>" in text:
                name, line = getattr(node, "name", "module"), getattr(node, "lineno", 1)
                yield f"jaxprune.{NAMES[file]}", name, line, text


SLOW = {"run_sweep", "resnet20", "transformer", "convnet"}


@pytest.mark.parametrize(
    ("module", "name", "line", "text"),
    [
        pytest.param(*e, id=f"{e[0]}.{e[1]}", marks=pytest.mark.slow if e[1] in SLOW else ())
        for e in examples()
    ],
)
def test_example(module: str, name: str, line: int, text: str) -> None:
    scope = {"jax": jax, "jnp": jnp, "np": np, "jp": jaxprune}
    scope |= vars(importlib.import_module(module))
    case = doctest.DocTestParser().get_doctest(text, scope, name, module, line)
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(case, out=report.append)
    assert result.attempted
    assert not result.failed, "".join(report)


def test_all_requirements_are_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    pin = re.compile(r'([\w.-]+)==[\w.]+(; python_version (<|>=) "3\.12")?')
    assert [line for line in pins if not pin.fullmatch(line)] == []

    extras = PYPROJECT["project"]["optional-dependencies"]
    required = [*PYPROJECT["project"]["dependencies"], *extras["benchmark"]]
    for name in ("dev", *jaxprune._EXTRAS):  # `dev` names jaxprune with the extras
        required += extras[name]
    names = set(map(requirement_name, required)) - {"jaxprune"}
    assert names <= {canonical(line.partition("==")[0]) for line in pins}
    assert set(extras["benchmark"]) <= set(pins)
