"""What a record says of the machine, and the race of two precisions: what it measures, and what it keeps."""

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_jax.system import machine
from moe_jax.system.machine import Times, processor

TWO_CORES = """processor\t: 0
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC

processor\t: 1
cpu family\t: 25
model\t\t: 18
model name\t: AMD EPYC
"""


@pytest.mark.parametrize(
    ("info", "name"),
    [
        (TWO_CORES, "AMD EPYC (family 25, model 17)"),  # of the first core
        ("model name\t: A: B\n", "A: B"),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", platform.processor()),
        (None, platform.processor()),
    ],
)
def test_the_name_of_a_processor_has_its_family(
    info: str | None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if info is not None:
        (tmp_path / "cpuinfo").write_text(info)
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "cpuinfo")
    assert processor() == name


def test_wide_vectors_are_asked_for_where_the_processor_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA's documentation does not name the option, so a later XLA may not know it. This one must."""
    wide_vectors = machine.wide_vectors.__wrapped__
    monkeypatch.setattr(machine, "processor_flags", lambda: ["sse2", "avx512f"])
    assert wide_vectors() == machine.WIDE_VECTORS
    monkeypatch.setattr(machine, "WIDE_VECTORS", {"xla_cpu_no_such_option": 1})
    assert wide_vectors() is None
    monkeypatch.undo()
    monkeypatch.setattr(machine, "processor_flags", lambda: ["sse2", "avx2"])
    assert wide_vectors() is None


@pytest.fixture
def races(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of the products of each race that is run. float32 takes 8, 2 and 6 s, the other 3, 9 and 1."""
    run: list[list[str]] = []

    def alternate(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Times]:
        run.append(list(candidates))
        return {name: Times((8, 2, 6) if name == "float32" else (3, 9, 1)) for name in candidates}

    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(machine, "alternate", alternate)
    return run


def again(units: str = "AMX") -> float:
    """The gain as another process finds it."""
    machine.bfloat16_gain.cache_clear()
    return machine.bfloat16_gain(units)


def test_medians_count_and_are_kept_for_one_machine(races: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert [again(), again(), machine.bfloat16_gain("AMX")] == [2.0] * 3
    assert races == [["float32", "bfloat16"]]
    again(units="AVX-512 BF16")
    again()  # the first one is still kept
    monkeypatch.setattr(machine, "processor", lambda: "another")
    again()
    monkeypatch.setattr(machine, "usable_cores", lambda: 3)
    again()
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda _: "9")
    assert [again(), again()] == [2.0] * 2
    assert len(races) == 5
