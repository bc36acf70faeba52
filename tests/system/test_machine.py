"""What a record says of the machine."""

import platform
from pathlib import Path

import pytest

from moe_jax.system.machine import processor

TWO_CORES = """processor\t: 0
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
stepping\t: 1

processor\t: 1
cpu family\t: 25
model\t\t: 18
model name\t: AMD EPYC
"""
ARM = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n"


@pytest.mark.parametrize(
    ("info", "name"),
    [
        (TWO_CORES, "AMD EPYC (family 25, model 17)"),  # of the first core
        ("model name\t: A: B\n", "A: B"),
        (ARM, platform.processor()),
        ("", platform.processor()),
    ],
)
def test_the_name_of_a_processor_has_its_family(info: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(info)
    assert processor(tmp_path / "cpuinfo") == name


def test_a_system_without_cpuinfo(tmp_path: Path) -> None:
    assert processor(tmp_path / "nothing") == platform.processor()
