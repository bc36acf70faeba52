"""Programs that are compiled for a GPU, and what a lowered program does, read from its StableHLO text."""

import importlib.util
import re
from collections.abc import Callable

import pytest

from moe_jax.system import environment

QUICK_COMPILER = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
"""XLA_FLAGS that make compiling about twice as fast, and the programs slower. Compared programs must share them: they
may change the last bits of a float."""

_HAS_COMPILER = environment.has_cuda_plugin() and importlib.util.find_spec("nvidia") is not None
_NEEDED = "needs JAX's CUDA plugin and ptxas: uv run --isolated --extra gpu-plan pytest -m plan"


def compiled_for_gpu(test: Callable) -> Callable:
    """Mark a test that compiles for a GPU target."""
    for mark in (pytest.mark.plan, pytest.mark.skipif(not _HAS_COMPILER, reason=_NEEDED), pytest.mark.timeout(1800)):
        test = mark(test)
    return test


_SCATTER = re.compile(
    r'"stablehlo\.scatter"\([^)]*\) <\{(?P<attributes>.*?)\}>.*?\}\) : '
    r"\(tensor<(?P<operand>\S+)>, tensor<(?P<indices>\S+)>, tensor<(?P<updates>\S+)>\)",
    re.DOTALL,
)


def scatter_adds_of_floats(text: str) -> list[str]:
    """The scatter operations on floats whose targets may collide: several updates, without a promise that their
    indices are unique. On a GPU such updates are added in no fixed order."""
    found = []
    for scatter in _SCATTER.finditer(text):
        *counts, _ = scatter["indices"].split("x")  # the last part is the dtype
        several = any(int(n) > 1 for n in counts[:-1])  # and the last axis has the coordinates of one index
        floats = re.search(r"x(f\d+|bf16)$", scatter["operand"])
        if floats and several and "unique_indices = true" not in scatter["attributes"]:
            found.append(scatter["operand"])
    return found


def products(text: str) -> list[tuple[str, str]]:
    """The dtype of the left operand, such as "f32", and the precision of each matrix product."""
    found = re.findall(r"stablehlo\.dot_general .*?precision = \[(\w+), (\w+)\][^:]*: \(tensor<(?:\d+x)*(\w+)>", text)
    assert len(found) == text.count("stablehlo.dot_general"), "a product is written in another form"
    return [(dtype, left if left == right else f"{left}, {right}") for left, right, dtype in found]
