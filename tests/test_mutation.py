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


def test_annotations_and_errors_get_no_mutant(mutation: Any) -> None:
    source = "def f(x: 1, y=2) -> 3:\n    if x:\n        raise ValueError(4)\n    return 5\n"
    spans = importlib.import_module("mutants").untouched(source)
    lines = source.splitlines()
    left = [
        d
        for n, line in enumerate(lines, 1)
        for i, d in enumerate(line)
        if d.isdigit() and not any(first <= (n, i) < last for first, last in spans)
    ]
    assert left == ["2", "5"]


def test_the_interval_of_a_share(mutation: Any) -> None:
    """8 of 10 by Wilson's formula: (0.8 + 0.192 -+ 1.96 sqrt(0.016 + 0.0096)) / 1.384."""
    assert mutation.wilson(8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert mutation.wilson(10, 10)[1] == pytest.approx(1)
