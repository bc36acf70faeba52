"""No module of `foundation` but parity.py differentiates with jax (the notebooks do), and importing it changes no
setting."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOUNDATION = sorted(path for path in (ROOT / "foundation").rglob("*.py") if path.parent.name != "notebooks")

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


@pytest.mark.parametrize("path", FOUNDATION, ids=lambda path: path.name)
def test_only_parity_differentiates(path: Path) -> None:
    used = names_of_jax(ast.parse(path.read_text())) & DIFFERENTIATION
    assert used <= ALLOWED.get(path.name, set())


def test_the_search_finds_what_it_looks_for() -> None:
    assert "vjp" in names_of_jax(ast.parse((ROOT / "foundation/parity.py").read_text()))
    for text in (
        "jax.grad(f)",
        "from jax import vjp",
        "from jax import vjp as v",
        "jax.experimental.jet.jvp(f)",
    ):
        assert names_of_jax(ast.parse(text)) & DIFFERENTIATION, text
    # A number's gradient, as in chapter 1, or a key of a dict, is no use of jax.
    assert not names_of_jax(ast.parse("value.grad + grads['grad']")) & DIFFERENTIATION


def test_importing_leaves_the_precision_alone() -> None:
    stems = {path.stem for path in FOUNDATION if path.parent.name == "foundation"} - {"__init__", "__main__"}
    names = ["foundation.checks", *(f"foundation.{stem}" for stem in sorted(stems))]
    code = f"import jax, {', '.join(names)}; assert not jax.config.read('jax_enable_x64')"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
