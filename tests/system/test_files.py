"""Files that are whole or absent, locks between processes, JSON without NaN."""

import itertools
import json
import math
import os
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moe_jax.system import errors
from moe_jax.system.files import (
    cached_json,
    json_text,
    locked,
    new_folder,
    parse_json,
    step_name,
    step_number,
    steps_in,
    write_atomically,
)

ROOT = Path(__file__).parents[2]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("content", "expected"), [("größer\n", "größer\n".encode()), (b"\xff\x00", b"\xff\x00")])
def test_text_and_bytes_replace_what_was_there(content: str | bytes, expected: bytes, tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)  # the longest name
    before = os.umask(0o022)
    try:
        for _ in range(2):
            write_atomically(path, content)
            assert path.read_bytes() == expected
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert len(names(tmp_path)) == 1


def test_writes_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    """One of them wins."""
    path = tmp_path / "file"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: write_atomically(path, f"{i} " * 1000), range(200)))
    assert len(set(path.read_text().split())) == 1
    assert names(tmp_path) == ["file"]


def test_a_new_folder_is_whole_or_absent(tmp_path: Path) -> None:
    (tmp_path / ".out.partial" / "of a killed process").mkdir(parents=True)
    with pytest.raises(IsADirectoryError), new_folder(tmp_path / "out") as draft:
        draft.write_text("a file in the place of the folder")
    assert names(tmp_path) == []
    with new_folder(tmp_path / "out") as draft:
        (draft / "file").write_text("")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["out", "out/file"]


HOLDER = """
import sys
from pathlib import Path
from moe_jax.system.files import locked
print("starts", flush=True)
with locked(Path(sys.argv[1]), wait=sys.argv[2] == "wait"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def holder(lock: Path, wait: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HOLDER, str(lock), wait]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_another_process_is_refused_or_waits_and_a_killed_one_gives_its_lock_back(tmp_path: Path) -> None:
    """What is in the file is not removed by whoever opens it next."""
    lock = tmp_path / "lock"
    lock.write_text("process 7")
    with holder(lock, "now") as first:
        assert (said(first), said(first)) == ("starts", "held")
        with pytest.raises(BlockingIOError), locked(lock, wait=False):
            pass
        with holder(lock, "wait") as second:
            assert said(second) == "starts"
            time.sleep(0.3)
            assert second.poll() is None, "it did not wait"
            first.send_signal(signal.SIGKILL)
            assert said(second) == "held"
            second.communicate("\n")
    with locked(lock, wait=False):
        assert lock.read_text() == "process 7"


def test_what_was_made_once_is_looked_up_and_a_damaged_file_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path))
    made = itertools.count(1)

    def look(*parts: str) -> int:
        return cached_json("notes", parts, lambda: next(made))

    assert [look("a", "b"), look("a", "b"), look("ab"), look("a", "b")] == [1, 1, 2, 1]
    for note in (tmp_path / "notes").iterdir():
        note.write_text("{")
    assert [look("a", "b"), look("a", "b")] == [3, 3]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "file"))  # a cache that cannot be written is no failure
    assert [look("a", "b"), look("a", "b")] == [4, 5]


def test_numbers_that_are_not_finite_become_null() -> None:
    value = {"loss": math.nan, "deep": [1.5, (math.inf, -math.inf)], "step": 3, "ok": True, "text": "NaN"}
    text = json_text(value)
    assert text == '{"loss": null, "deep": [1.5, [null, null]], "step": 3, "ok": true, "text": "NaN"}'
    assert json.loads(json_text(value, indent=2)) == json.loads(text)
    assert parse_json(b"[NaN, -Infinity]") == [None, None]
    with pytest.raises(ValueError, match="nested"):
        parse_json(b"[" * 10**5)


def test_names_of_steps_and_causes_of_errors(tmp_path: Path) -> None:
    assert [step_name(n) for n in (100, 123456789)] == ["step_00000100", "step_123456789"]
    names = ("step_00000100", "step_123456789", "step_100", "step_0100000000", "tmp_00000100")
    assert [step_number(n) for n in names] == [100, 123456789, None, None, None]
    for name in ("step_00000100", "step_123456789", "step_00000007.orbax-checkpoint-tmp", "step_00000008.json"):
        (tmp_path / name).write_text("")
    assert list(steps_in(tmp_path)) == [100, 123456789]
    assert steps_in(tmp_path, ".json") == {8: tmp_path / "step_00000008.json"}
    assert steps_in(tmp_path / "nowhere") == {}
    assert errors.disk_cause(OSError(28, "No space left on device")) == "the disk is full"
    assert errors.disk_cause(ValueError("write: No space left on device [13]")) == "the disk is full"
    assert errors.disk_cause(OSError(13, "Permission denied")) == "Permission denied"
    assert errors.disk_cause(ValueError("else")) is None
    assert (errors.shortened("x" * 60), errors.shortened("abcdef", 5)) == ("x" * 60, "ab...")
