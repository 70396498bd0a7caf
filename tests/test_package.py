"""The package as a whole: lazy exports, the order of its modules, its examples, its pins."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxprune"
# A module imports only from those before it.
ORDER = (
    "config files types trees data models metrics sparsity scores select masks schedules "
    "transforms train evaluate structure sparse checkpoints results figures study"
).split()
FILES = {
    path.relative_to(PACKAGE).as_posix(): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def imported_modules(tree: ast.AST, package: str) -> set[str]:
    """All that a file imports of jaxprune, wherever the statement stands; dotted names.

    `package` is the file's own package, which relative imports start from.
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: 1 - node.level or None] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            if source == "jaxprune":  # what follows are modules, and only modules
                names |= {f"jaxprune.{alias.name}" for alias in node.names}
            else:
                names.add(source)
    return {name for name in names if name.split(".")[0] == "jaxprune"}


def order_errors(file: str, source: str) -> list[str]:
    """What is wrong with the imports of `file`, a path inside the package."""
    parts = file.removesuffix(".py").split("/")
    if parts[0] not in ORDER:
        return [f"{parts[0]} has no place in the order of modules"]
    before = ORDER[: ORDER.index(parts[0])]
    own = parts[:1] if len(parts) > 1 else []  # files of one package may import each other
    imported = imported_modules(ast.parse(source), ".".join(["jaxprune", *parts[:-1]]))
    return [
        f"{file} imports {name}"
        for name in sorted(imported)
        if name != "jaxprune.__version__"
        and (name == "jaxprune" or name.split(".")[1] not in [*before, *own])
    ]


def test_import_is_light() -> None:
    code = "import jaxprune, sys; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    heavy = {
        "jax",
        "numpy",
        "flax",
        "optax",
        "orbax",
        "tensorflow_datasets",
        "matplotlib",
        "rich",
        "numba",
    }
    assert "jaxprune" in loaded.split()
    assert heavy.isdisjoint(loaded.split())


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
    seen_by_checkers = {
        alias.name: f"{node.module}"
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    lazy = {name: f"jaxprune.{module}" for name, module in jaxprune._MODULES.items()}
    assert jaxprune.__all__ == sorted(jaxprune.__all__) == list(lazy)
    assert lazy == seen_by_checkers


def test_unknown_export() -> None:
    with pytest.raises(AttributeError, match="'jaxprune' has no attribute 'magnitud'"):
        _ = jaxprune.magnitud


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
        ("masks.py", "from jaxprune import scores, select", 0),
        ("masks.py", "from jaxprune.types import Masks\nimport jaxprune.scores", 0),
        ("masks.py", "from jaxprune import __version__", 0),
        ("masks.py", "from . import scores\nfrom .types import Masks", 0),
        ("scores/magnitude.py", "from .. import trees\nfrom . import second_order", 0),
        ("scores/magnitude.py", "from jaxprune.scores.second_order import fisher", 0),
        ("masks.py", "from jaxprune import train", 1),
        ("masks.py", "def f():\n    import jaxprune.study", 1),
        ("masks.py", "from .train import make_train", 1),
        ("masks.py", "from jaxprune.masks import apply_masks", 1),
        ("masks.py", "import jaxprune", 1),
        ("scores/magnitude.py", "from ..masks import apply_masks", 1),
        ("scores/magnitude.py", "from jaxprune import magnitude", 1),
        ("utils.py", "", 1),
    ],
)
def test_import_order_is_enforced(file: str, source: str, wrong: int) -> None:
    assert len(order_errors(file, source)) == wrong


def examples() -> Iterator[tuple[str, str, int, str]]:
    """Yield module, name, line and text of every docstring that has an example.

    Read off the source, because pytest's own collection overlooks functions that are wrapped: by
    `jit`, or by the checks of the tests.
    """
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for file, path in FILES.items():
        parts = ["jaxprune", *file.removesuffix(".py").removesuffix("/__init__").split("/")]
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text and ">>>" in text:
                name, line = getattr(node, "name", "module"), getattr(node, "lineno", 1)
                yield ".".join(parts), name, line, text


@pytest.mark.parametrize(
    ("module", "name", "line", "text"), [pytest.param(*e, id=f"{e[0]}.{e[1]}") for e in examples()]
)
def test_example(module: str, name: str, line: int, text: str) -> None:
    scope = {"jax": jax, "jnp": jnp, "np": np, "jp": jaxprune}
    scope |= vars(importlib.import_module(module))
    case = doctest.DocTestParser().get_doctest(text, scope, name, module, line)
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(case, out=report.append)
    assert result.attempted
    assert not result.failed, "".join(report)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_all_requirements_are_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    pin = re.compile(r'([\w.-]+)==[\w.]+(; python_version (<|>=) "3\.12")?')
    assert [line for line in pins if not pin.fullmatch(line)] == []

    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *extras["dev"], *extras["benchmark"]]
    names = {canonical(re.split(r"[^\w.-]", requirement)[0]) for requirement in required}
    assert names <= {canonical(line.partition("==")[0]) for line in pins}
    assert set(extras["benchmark"]) <= set(pins)
