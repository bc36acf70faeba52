"""Imports point one way, and the pure parts stay pure: read from the syntax trees, nothing is imported."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Who may import whom within moe_jax: a room, and the rooms below it that it may use.
BELOW = {
    "flags": set(),
    "config": {"flags"},
    "compatibility": {"config", "flags"},
    "environment": {"compilation_cache"},
    "compilation_cache": set(),
    "presets": {"config"},
    "data": {"config"},
    "model": {"config"},
    "analysis": {"config", "environment", "data", "model", "training", "inference"},
    "inference": {"config", "model", "data"},
    "training": {"config", "flags", "compatibility", "model", "data", "inference", "analysis"},
    "interop": {"config", "model", "data", "training"},
    "parallel": {"config", "model"},
    "commands": {
        *("config", "presets", "environment", "data", "model", "training", "inference", "analysis", "interop"),
        "parallel",
    },
    "cli": {"config", "flags", "compatibility", "presets", "environment", "data", "commands"},
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def test_foundation_and_moe_jax_never_import_each_other() -> None:
    # The lessons compare themselves with Flax; what they teach is made of jax.numpy alone.
    lessons = {"attention_mechanism.py", "06_normalisation_and_positions.py"}
    for path in modules("foundation"):
        assert "moe_jax" not in packages(path), path
        assert "flax" not in packages(path) or path.name in lessons, path
    for path in [*modules("moe_jax"), ROOT / "train.py"]:
        assert "foundation" not in packages(path), path


@pytest.mark.parametrize("room", BELOW)
def test_rooms_import_from_rooms_below(room: str) -> None:
    folder = ROOT / "moe_jax" / room
    paths = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    for path in paths:
        if not path.exists():
            continue
        used = {name.split(".")[1] for name in imported(path) if name.startswith("moe_jax.")}
        assert used <= BELOW[room] | {room}, f"{path.relative_to(ROOT)} imports {sorted(used - BELOW[room] - {room})}"


def test_every_module_is_in_a_known_room() -> None:
    rooms = {path.relative_to(ROOT / "moe_jax").parts[0].removesuffix(".py") for path in modules("moe_jax")}
    assert rooms <= set(BELOW) | {"__init__", "__main__"}


def test_no_cycles_between_modules() -> None:
    """By modules, since rooms use each other's parts in both directions nowhere but between analysis and training."""
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules("moe_jax")}
    known = set(names.values())
    graph = {}
    for path, name in names.items():
        at_top = ast.Module(
            [n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.Import | ast.ImportFrom)],
            [],
        )
        used = set()
        for node in at_top.body:
            if isinstance(node, ast.ImportFrom):
                used |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
        graph[name] = used & known
    finished: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in finished:
            for below in graph[name]:
                visit(below, (*above, name))
            finished.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", ["routing", "dispatch", "balance"])
def test_the_pure_cores_import_no_flax(name: str) -> None:
    assert packages(ROOT / "moe_jax" / "model" / f"{name}.py").isdisjoint({"flax", "optax", "orbax"})


EARLY = [
    *(
        ROOT / "moe_jax" / f"{name}.py"
        for name in ("config", "compatibility", "presets", "environment", "cli", "__main__", "__init__")
    ),
    *(ROOT / "moe_jax" / "commands").glob("*.py"),
]


@pytest.mark.parametrize("path", EARLY, ids=lambda path: path.stem)
def test_what_runs_before_the_arguments_are_accepted_imports_no_jax(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    heavy = {"jax", "flax", "optax", "orbax", "numpy", "datasets", "tiktoken", "tokenizers", "rich"}
    for node in tree.body:
        if isinstance(node, ast.Import):
            assert heavy.isdisjoint(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in heavy
