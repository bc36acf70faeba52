"""Imports point in one direction. They are read from the syntax trees, so the tests import no module.

Every import counts: at the top of a file, inside a function, and under TYPE_CHECKING.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_jax.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent

# The folders, from the lowest layer up. A module may import its own folder and those of lower layers (earlier lines).
LAYERS = (
    ("system",),
    ("config",),
    ("data", "model"),
    ("parallel",),
    ("inference", "pages", "runs"),
    ("interop",),
    ("training",),
    ("plots", "serving"),
    ("certify", "inspection", "planning"),
    ("api",),
    ("cli",),
    ("__main__",),
)
LAYER = {folder: number for number, folders in enumerate(LAYERS) for folder in folders}

type Graph = dict[str, set[str]]
"""Module -> modules that it imports."""


def sources(package: str) -> dict[str, str]:
    """Module name -> source text, of every file of a package."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def imported_names(source: str) -> Iterator[str]:
    """Absolute names of everything that a source imports, anywhere in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(modules: dict[str, str]) -> Graph:
    """The modules that each module imports. `from package import name` is the module of that name, or the package."""
    graph: Graph = {}
    for module, source in modules.items():
        found = set()
        for name in imported_names(source):
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules and target != module:
                found.add(target)
        graph[module] = found
    return graph


def folder(module: str) -> str:
    return module.split(".")[1]


def upward(graph: Graph) -> list[str]:
    """Imports that do not point down: to a higher layer, or to another folder of the same layer."""
    return [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in sorted(targets)
        if folder(target) != folder(module) and LAYER[folder(target)] >= LAYER[folder(module)]
    ]


def circles(graph: Graph) -> list[str]:
    """Every import that closes a circle, written as the path around the circle."""
    found: list[str] = []
    finished: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        if module in above:
            found.append(" -> ".join([*above[above.index(module) :], module]))
        elif module not in finished:
            for target in sorted(graph[module]):
                visit(target, (*above, module))
            finished.add(module)

    for module in graph:
        visit(module, ())
    return found


@pytest.fixture(scope="module")
def modules() -> dict[str, str]:
    """Every module of moe_jax except `moe_jax/__init__.py`, which imports from several folders."""
    found = sources("moe_jax")
    del found["moe_jax"]
    return found


def test_every_module_is_in_a_known_folder(modules: dict[str, str]) -> None:
    assert {folder(module) for module in modules} == set(LAYER)


def test_no_import_points_upward(modules: dict[str, str]) -> None:
    assert upward(imports(modules)) == []


def test_no_circles(modules: dict[str, str]) -> None:
    assert circles(imports(modules)) == []


@pytest.mark.parametrize(
    "planted",
    [
        "from moe_jax.training.run import take_steps",
        "import moe_jax.training.run",
        "def late():\n    from moe_jax.training.run import take_steps",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from moe_jax.training import run",
        "class C:\n    def m(self):\n        import moe_jax.cli.main as m",
    ],
)
def test_a_planted_import_is_found(modules: dict[str, str], planted: str) -> None:
    """An import upward from the folder `model` is found anywhere in the file."""
    broken = modules | {"moe_jax.model.layers": planted}
    assert len(upward(imports(broken))) == 1


def test_foundation_and_moe_jax_never_import_each_other(modules: dict[str, str]) -> None:
    for module, source in sources("foundation").items():
        assert "moe_jax" not in {name.partition(".")[0] for name in imported_names(source)}, module
    for module, source in modules.items():
        assert "foundation" not in {name.partition(".")[0] for name in imported_names(source)}, module


def test_foundation_is_made_of_jax_numpy_alone() -> None:
    """Pictures aside. Further packages are what results are compared with, and what reads a run's files."""
    further = {
        "foundation.notebooks.06_normalisation_and_positions": {"flax"},
        "foundation.checks.byte_pairs": {"tokenizers"},
        "foundation.trained.tokens": {"tiktoken", "tokenizers"},
        "foundation.trained.validation": {"xxhash", "platformdirs"},
        "foundation.trained.weights": {"safetensors"},
        "foundation.notebooks.build": {"jupytext", "nbformat", "nbclient"},
    }
    own = {"foundation", "jax", "numpy", "jaxtyping", "ml_dtypes", "matplotlib"}
    for module, source in sources("foundation").items():
        used = {name.partition(".")[0] for name in imported_names(source)} - sys.stdlib_module_names
        assert used <= own | further.get(module, set()), module


HEAVY = {"jax", "flax", "optax", "orbax", "numpy", "scipy", "datasets", "tiktoken", "tokenizers", "rich"}
HEAVY |= {"platformdirs", "filelock"}
"""Packages whose import takes longer than an error about a wrong flag should take."""


def test_what_runs_before_the_arguments_are_accepted_imports_nothing_heavy(modules: dict[str, str]) -> None:
    """The imports at the top of files are followed, starting from the programs."""
    programs = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "train.py", ROOT / "benchmark.py")}
    everything = sources("moe_jax") | programs
    waiting, seen = ["moe_jax", "moe_jax.__main__", *programs], set()
    waiting += [f"moe_jax.cli.{name}" for name in {*COMMANDS, "import_model"} - {"import"}]
    waiting += [module for module in modules if folder(module) == "config"]
    while waiting:
        module = waiting.pop()
        if module in seen or module not in everything:
            continue
        seen.add(module)
        for node in ast.parse(everything[module]).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                assert name.partition(".")[0] not in HEAVY, f"{module} imports {name}"
                waiting.append(name)
    assert {"moe_jax.config.run", "moe_jax.cli.options", "moe_jax.cli.generate"} <= seen


@pytest.mark.parametrize("package", ["moe_jax", "foundation", "tests"])
def test_no_file_and_no_function_is_too_long(package: str) -> None:
    """400 lines a file, 60 a function."""
    for module, source in sources(package).items():
        assert source.count("\n") <= 400, module
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                assert (node.end_lineno or 0) - first < 60, f"{module}: {node.name}"
