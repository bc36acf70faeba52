"""No module of `foundation` but parity.py differentiates with jax, and neither package imports the other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOUNDATION = sorted((ROOT / "foundation").glob("*.py"))

DIFFERENTIATION = {
    "grad", "value_and_grad", "vjp", "jvp", "linearize", "linear_transpose", "jacfwd", "jacrev", "jacobian",
    "hessian", "checkpoint", "remat", "custom_vjp", "custom_jvp", "fwd_and_bwd", "saved_input_vjp", "vjp3",
    "autodiff_value_and_gradient",
}  # fmt: skip
ALLOWED = {"parity.py": DIFFERENTIATION, "train_by_hand.py": {"autodiff_value_and_gradient"}}


def names_of_jax(tree: ast.AST) -> set[str]:
    """Every attribute of a module and every name imported: what a file can call by name."""
    found: set[str] = set()
    modules = {"jax", "lax", "ad", "nnx", "parity", "api", "experimental", "interpreters"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            base = node.value
            while isinstance(base, ast.Attribute):
                base = base.value
            if isinstance(base, ast.Name) and base.id in modules:
                found.add(node.attr)
        if isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names}
    return found


def imported_packages(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", FOUNDATION, ids=lambda path: path.name)
def test_only_parity_differentiates(path: Path) -> None:
    used = names_of_jax(ast.parse(path.read_text())) & DIFFERENTIATION
    assert used <= ALLOWED.get(path.name, set())


def test_the_search_finds_what_it_looks_for() -> None:
    assert "grad" in names_of_jax(ast.parse((ROOT / "foundation/parity.py").read_text()))
    for text in (
        "jax.grad(f)",
        "from jax import vjp",
        "from jax import vjp as v",
        "jax.experimental.jet.jvp(f)",
    ):
        assert names_of_jax(ast.parse(text)) & DIFFERENTIATION, text
    # A gradient of scalar_autograd, or a key of a dict, is no use of jax.
    assert not names_of_jax(ast.parse("value.grad + grads['grad']")) & DIFFERENTIATION


def test_neither_package_imports_the_other() -> None:
    for package, other in (("foundation", "moe_jax"), ("moe_jax", "foundation")):
        files = sorted((ROOT / package).rglob("*.py"))
        assert files
        for path in files:
            assert other not in imported_packages(ast.parse(path.read_text())), path


def test_importing_leaves_the_precision_alone() -> None:
    names = [f"foundation.{path.stem}" for path in FOUNDATION if path.stem not in ("__init__", "__main__")]
    code = f"import jax, {', '.join(names)}; assert not jax.config.read('jax_enable_x64')"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
