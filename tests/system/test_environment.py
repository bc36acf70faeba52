"""What must be settled before jax starts: limits, the platform, the share of a small card, the allocator."""

import os
import platform
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.cli.main import run_as, run_command
from moe_jax.config import ConfigError
from moe_jax.system import environment

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("4096, 3900\n", "0.85"),  # nothing else on the card: (3900 - 400) / 4096 = 0.854, more than jax's 0.75
        ("4096, 3000\n", "0.63"),  # a display took 1 GB: 0.75 of the card could not be had
        ("4096, 4096\n", "0.90"),  # never more than nine tenths
        ("4096, 500\n", "0.10"),  # next to nothing is free: jax will say so itself
        ("81559, 81000\n", None),
        ("12288, 11000\n", None),
        ("12288, 6000\n", "0.45"),  # another program took half of a larger card
        ("no devices were found\n", None),
        ("", None),
    ],
)
def test_a_card_is_shared_by_what_is_free(
    answer: str, share: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver's nvidia-smi answers. A choice of the user stays, by either name: jax refuses both together."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{answer}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", environment.SHARE):
        monkeypatch.setenv(name, "0.5")
        assert environment._set_memory_fraction() == []
        monkeypatch.delenv(name)
    notes = environment._set_memory_fraction()
    assert os.environ.pop(environment.SHARE, None) == share
    assert "XLA_PYTHON_CLIENT_ALLOCATOR" not in os.environ
    assert len(notes) == (share is not None)


def test_wsl_gets_its_memory_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "6.6.87.2-microsoft-standard-WSL2")
    monkeypatch.setattr(environment, "ask_nvidia_smi", lambda *_: None)
    for asked, allocator in (("", "cuda_async"), ("bfc", "bfc")):
        monkeypatch.setattr(os, "environ", {"XLA_PYTHON_CLIENT_ALLOCATOR": asked} if asked else {})
        environment._set_memory_fraction()
        assert os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] == allocator


@pytest.mark.parametrize(
    ("plugin", "platforms", "said"),
    [
        (False, "cpu", "JAX's CUDA plugin is not installed; start with `uv run --extra cuda12 ...`"),
        (True, "cpu", "JAX_PLATFORMS=cpu is set; unset it"),
        (True, "", "JAX's CUDA plugin found no card that it can use; see docs/gpu.md, section At home"),
    ],
)
def test_a_card_that_is_left_unused_is_named(
    plugin: bool, platforms: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "has_nvidia_card", lambda: True)
    monkeypatch.setattr(environment, "has_cuda_plugin", lambda: plugin)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    (note,) = environment.unused_card("cpu")
    assert note == f"this computes on the CPU, although this machine seems to have an NVIDIA card: {said}"
    assert environment.unused_card("gpu") == []
    monkeypatch.setattr(environment, "has_nvidia_card", lambda: False)
    assert environment.unused_card("cpu") == []
    assert "\n## At home\n" in (ROOT / "docs/gpu.md").read_text()


def test_a_command_says_why_a_card_is_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr: the output of a command may be read by a program."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for card, lines in ((False, 0), (True, 1)):
        monkeypatch.setattr(environment, "has_nvidia_card", lambda card=card: card)
        assert run_command(["doctor", "--run", "nano"]) == 0
        shown = capsys.readouterr()
        assert (shown.err.count("this computes on the CPU, although"), "computes" in shown.out) == (lines, False)


@pytest.mark.parametrize(("platforms", "card", "cpu"), [("", False, True), ("", True, False), ("cpu", True, True)])
def test_an_empty_choice_of_a_platform_is_none(
    platforms: str, card: bool, cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JAX reads it so too."""
    monkeypatch.setattr(environment, "has_nvidia_card", lambda: card)
    monkeypatch.setattr(environment, "has_cuda_plugin", lambda: card)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert environment.runs_on_cpu() is cpu


def test_a_step_beyond_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_jax.cli.options.machine_memory", lambda: 16 * 2**30)
    monkeypatch.setattr(environment, "prepare_environment", lambda *_: pytest.fail("not refused"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"--seq-len 1048576, .* at least [\d,.]+ GiB, and this machine has 16.0 GiB"):
        run_as("train", ["--seq-len", "1048576", "--batch-size", "16"], "train.py")
    assert list(tmp_path.iterdir()) == []


def test_too_little_address_space_is_one_line() -> None:
    """Less than 1.5 GiB: jax would abort with a stack of its own."""
    code = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))\n"
    code += "from moe_jax.system.environment import prepare_environment; prepare_environment()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert "UserError: ulimit -v 524288: JAX needs at least 1572864 KiB" in done.stderr.splitlines()[-1]


HEAP = """
import os, resource
from moe_jax.system import environment
environment.keep_freed_memory()
parts = open("/proc/self/smaps").read().split("[heap]")[1:]
huge = any(" hg" in part.partition("VmFlags:")[2].splitlines()[0] for part in parts)
import numpy as np  # asks for huge pages itself

def faults(size=1 << 23):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults(), os.environ.get("TOKENIZERS_PARALLELISM"))
print(huge)
os.environ["JAX_PLATFORMS"] = "cpu"
environment.return_large_blocks()
faults(1 << 24)
print(faults(1 << 24))  # larger than what the heap has
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only for glibc")
def test_freed_memory_is_used_again_without_a_page_fault() -> None:
    """An array of 64 MiB has 16,384 pages. The second array takes the pages of the first. A user's own setting of the
    allocator stays. For large models, large blocks go back to the system."""

    def run(**settings: str) -> tuple[int, str, bool, int]:
        plain = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "TOKENIZERS_PARALLELISM")}
        command = [sys.executable, "-c", HEAP]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=plain | settings)
        count, parallel, huge, returned = done.stdout.split()
        return int(count), parallel, huge == "True", int(returned)

    few, parallel, huge, returned = run()
    assert huge or not Path("/sys/kernel/mm/transparent_hugepage").exists()
    assert returned > 4 * few + 100
    assert few < 100
    assert parallel == "false"
    many, parallel, huge, _ = run(GLIBC_TUNABLES="glibc.malloc.hugetlb=0", TOKENIZERS_PARALLELISM="true")
    assert many > 4 * few + 100
    assert (parallel, huge) == ("true", False)
