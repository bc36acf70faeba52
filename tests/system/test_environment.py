"""What is settled before jax starts: the share of a small card, and a cache of programs that survives being killed."""

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_jax.system import environment
from moe_jax.system.compile_cache import VerifiedCache
from moe_jax.system.folders import draft_of


@pytest.mark.parametrize(
    ("total", "free", "share", "why"),
    [
        (4096, 3900, 0.85, "nothing else on the card: (3900 - 400) / 4096 = 0.854, more than jax's 0.75"),
        (4096, 3000, 0.63, "a display took 1 GB: 0.75 of the card could not be had"),
        (4096, 4096, 0.90, "never more than nine tenths"),
        (4096, 500, 0.10, "next to nothing is free: jax will say so itself"),
    ],
)
def test_share_of_a_small_card(total: float, free: float, share: float, why: str) -> None:
    assert environment.memory_share(total, free) == share, why


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A driver's nvidia-smi that answers with the content of a file."""
    answer = tmp_path / "answer"
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat {answer}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    return answer


def test_a_small_card_is_shared_by_what_is_free(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card.write_text("4096, 3900\n")
    notes = environment._set_memory_fraction()
    assert os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION") == "0.85"
    assert "3,900 of 4,096 MiB are free" in notes[0]
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert environment._set_memory_fraction() == []
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5", "the user's own choice stays"


@pytest.mark.parametrize("answer", ["81559, 81000\n", "no devices were found\n", ""])
def test_other_cards_and_no_answer_leave_jax_alone(card: Path, answer: str) -> None:
    card.write_text(answer)
    assert environment._set_memory_fraction() == []
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ


@pytest.mark.parametrize(
    ("plugin", "platforms", "said"),
    [
        (False, "cpu", "JAX's CUDA plugin is not installed; start with `uv run --extra cuda12 ...`"),
        (False, "", "JAX's CUDA plugin is not installed; start with `uv run --extra cuda12 ...`"),
        (True, "cpu", "JAX_PLATFORMS=cpu is set; unset it"),
        (True, "", "JAX's CUDA plugin found no card that it can use; see docs/gpu.md, section At home"),
    ],
)
def test_a_card_that_is_left_unused_is_named(
    plugin: bool, platforms: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the restart, in which this program itself has set JAX_PLATFORMS."""
    monkeypatch.setattr(environment, "has_nvidia_card", lambda: True)
    monkeypatch.setattr(environment, "has_cuda_plugin", lambda: plugin)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    (note,) = environment.unused_card("cpu")
    assert note == f"this computes on the CPU, although this machine seems to have an NVIDIA card: {said}"
    assert environment.unused_card("gpu") == []
    monkeypatch.setattr(environment, "has_nvidia_card", lambda: False)
    assert environment.unused_card("cpu") == []


@pytest.mark.parametrize(
    ("platforms", "card", "cpu"),
    [(None, False, True), ("", False, True), (None, True, False), ("", True, False), ("cpu", True, True)],
)
def test_an_empty_choice_of_a_platform_is_none(
    platforms: str | None, card: bool, cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JAX reads it so too."""
    monkeypatch.setattr(environment, "has_nvidia_card", lambda: card)
    monkeypatch.setattr(environment, "has_cuda_plugin", lambda: card)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if platforms is not None:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert environment.runs_on_cpu() is cpu


def test_the_section_that_a_note_names_is_there() -> None:
    page = Path(__file__).parents[2] / "docs/gpu.md"
    assert "\n## At home\n" in page.read_text()


def test_a_damaged_entry_is_removed_and_can_be_written_again(tmp_path: Path) -> None:
    cache = VerifiedCache(str(tmp_path))
    value = bytes(range(100))
    cache.put("key", value)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    flipped = bytes([*whole[:-1], whole[-1] ^ 1])
    for damaged in (b"", whole[:10], whole[:32], whole[:-1], flipped):
        file.write_bytes(damaged)
        assert cache.get("key") is None
        assert not file.exists()
        cache.put("key", value)
        assert cache.get("key") == value
    assert cache.get("another") is None


def test_a_program_with_the_name_of_another_is_not_taken(tmp_path: Path) -> None:
    """Nor an entry of an earlier version, whose digest does not hold the name: the program is compiled once more."""
    cache = VerifiedCache(str(tmp_path))
    cache.put("one", b"the program of one")
    shutil.copy(tmp_path / "one.program", tmp_path / "other.program")
    assert cache.get("other") is None
    assert cache.get("one") == b"the program of one"
    earlier = b"an entry of an earlier version"
    (tmp_path / "earlier.program").write_bytes(hashlib.sha256(earlier).digest() + earlier)
    assert cache.get("earlier") is None
    assert [p.name for p in tmp_path.iterdir()] == ["one.program"]


def test_an_entry_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = VerifiedCache(str(tmp_path))

    def die(*_: object, **where: object) -> None:
        assert cache.get("key") is None, "written, but not yet under its name"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(OSError, match="No space"):
        cache.put("key", b"value")
    assert list(tmp_path.iterdir()) == []


def test_drafts_of_processes_that_died_are_removed(tmp_path: Path) -> None:
    """By name as drafts are written now, and as earlier versions wrote them."""
    old, new, earlier = draft_of(tmp_path / "a.program"), draft_of(tmp_path / "b.program"), tmp_path / "c.1.draft"
    for draft in (old, new, earlier):
        draft.write_bytes(b"half")
    for draft in (old, earlier):
        os.utime(draft, (time.time() - 7200,) * 2)
    VerifiedCache(str(tmp_path))
    assert list(tmp_path.iterdir()) == [new]


PROGRAM = """
from moe_jax.system import environment
environment.prepare_environment()
import jax, jax.monitoring
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
jax.jit(lambda x: (x @ x.T).sum())(jax.numpy.ones((7, 5)))
print(hits.count("/jax/compilation_cache/cache_hits"))
"""


def test_a_truncated_program_is_compiled_once_more_and_then_found(tmp_path: Path) -> None:
    """In whole processes: compile; find it; find it truncated, compile and replace it; find it."""
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.mmap_max=0"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }

    def hits() -> int:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=os.environ | settings, capture_output=True, text=True, check=True
        )
        return int(done.stdout.split()[-1])

    assert hits() == 0
    programs = sorted(tmp_path.glob("*.program"))
    assert hits() == len(programs) > 0
    for file in programs:
        file.write_bytes(file.read_bytes()[:-100])
    assert hits() == 0
    assert hits() == len(programs)
