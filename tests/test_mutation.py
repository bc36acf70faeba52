"""`benchmarks/mutation.py`: what it leaves alone, and which tests it runs for a module."""

import importlib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def mutation(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("mutation")


def test_every_named_file_is_there_and_every_module_has_tests(mutation: Any) -> None:
    for files in (*mutation.NEAREST.values(), *mutation.CHECKS.values(), mutation.BROAD):
        assert all((ROOT / file).exists() for file in files)
    for package in mutation.PACKAGES:
        for module in (ROOT / "moe_jax" / package).rglob("*.py"):
            assert mutation.tests_of(module.relative_to(ROOT).as_posix(), False), module
