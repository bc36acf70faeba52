"""Files that are whole or absent, and locks between processes."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moe_jax.system import files
from moe_jax.system.files import locked, write_atomically
from moe_jax.system.folders import draft_of


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("content", "expected"), [("größer\n", "größer\n".encode()), (b"\xff\x00", b"\xff\x00")])
def test_text_and_bytes_replace_what_was_there(content: str | bytes, expected: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for _ in range(2):
        write_atomically(path, content)
        assert path.read_bytes() == expected
    write_atomically(path, "")
    assert path.read_bytes() == b""
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("else")])
@pytest.mark.parametrize("where", ["os.fsync", "os.replace"])
def test_whatever_interrupts_a_write(where: str, error: BaseException, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail(*_: object, **where: object) -> None:
        assert len(names(tmp_path)) == 2, "written beside the file, and not into it"
        assert path.read_text() == "old"
        raise error

    monkeypatch.setattr(where, fail)
    with pytest.raises(type(error)):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_content_that_is_no_text_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\udce9")
    assert (path.read_text(), names(tmp_path)) == ("old", ["file"])


def test_a_new_file_in_a_folder_that_is_missing_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "file", "new")
    assert names(tmp_path) == []


@pytest.mark.parametrize("durable", [True, False])
def test_only_a_durable_write_waits_for_the_disk(durable: bool, tmp_path: Path, monkeypatch) -> None:
    """The content is on the disk before it has its name: after a loss of power no name has half a file."""
    calls = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), sync(file)))
    monkeypatch.setattr(os, "replace", lambda *names, **where: (calls.append("rename"), replace(*names, **where))[1])
    write_atomically(tmp_path / "file", "content", durable=durable)
    assert calls == (["fsync", "rename"] if durable else ["rename"])


def test_drafts_have_names_of_their_own(tmp_path: Path, monkeypatch) -> None:
    """Two threads have one process id. So have the processes of two containers that share a cache."""
    path = tmp_path / "file"
    monkeypatch.setattr(os, "getpid", lambda: 1)
    drafts = {draft_of(path) for _ in range(100)}
    assert len(drafts) == 100
    assert {draft.parent for draft in drafts} == {tmp_path}, "a rename works within one file system only"


def test_writes_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    """One of them wins. With one name for all drafts, a rename finds the draft of another write gone."""
    path = tmp_path / "file"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: write_atomically(path, f"{i} " * 1000), range(400)))
    assert len(set(path.read_text().split())) == 1
    assert names(tmp_path) == ["file"]


SIGNALLED_WHILE_IT_WRITES = """
import os, signal, sys, time
from pathlib import Path
from moe_jax.system import files, signals
replace = os.replace
def slow(*names, **where):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    replace(*names, **where)
os.replace = slow
with signals.Signals():
    files.write_atomically(Path(sys.argv[1]), "content")
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="ends itself by SIGTERM")
def test_a_signal_that_ends_the_process_lets_a_write_end(tmp_path: Path) -> None:
    """The process is gone within the time that a write may take, and the draft has been renamed."""
    command = [sys.executable, "-c", SIGNALLED_WHILE_IT_WRITES, str(tmp_path / "file")]
    finished = subprocess.run(command, check=False, timeout=50, capture_output=True)
    assert finished.returncode == 128 + signal.SIGTERM, finished.stderr
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127])
def test_the_longest_name_can_be_written(name: str, tmp_path: Path) -> None:
    write_atomically(tmp_path / name, "content")
    assert names(tmp_path) == [name]


HOLDER = """
import sys, time
from pathlib import Path
from moe_jax.system.files import locked
with locked(Path(sys.argv[1]), wait=False) as file:
    print("held" if file is not None else "no locks here", flush=True)
    sys.stdin.readline()
"""
WAITER = """
import sys
from pathlib import Path
from moe_jax.system.files import locked
print("asking", flush=True)
with locked(Path(sys.argv[1]), wait=True):
    print("held", flush=True)
"""
needs_locks = pytest.mark.skipif(files.fcntl is None, reason="the system has no flock")


def start(program: str, lock: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-c", program, str(lock)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@needs_locks
def test_another_process_is_refused_or_waits(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with start(HOLDER, lock) as holder:
        assert said(holder) == "held"
        with pytest.raises(BlockingIOError), locked(lock, wait=False):
            pass
        with start(WAITER, lock) as waiter:
            assert said(waiter) == "asking"
            time.sleep(0.3)
            assert waiter.poll() is None, "it did not wait"
            holder.communicate("\n")
            assert said(waiter) == "held"
        assert waiter.returncode == 0
    with locked(lock, wait=False) as file:
        assert file is not None


@needs_locks
def test_a_process_that_is_killed_gives_its_lock_back(tmp_path: Path) -> None:
    with start(HOLDER, tmp_path / "lock") as holder:
        assert said(holder) == "held"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(tmp_path / "lock", wait=False) as file:
        assert file is not None


@needs_locks
def test_the_holder_may_leave_a_note(tmp_path: Path) -> None:
    """What is in the file is not cut off by whoever opens it next."""
    with locked(tmp_path / "lock", wait=False) as file:
        assert file is not None
        file.write(b"process 7")
    with locked(tmp_path / "lock", wait=False):
        assert (tmp_path / "lock").read_text() == "process 7"


@pytest.mark.parametrize("wait", [True, False])
def test_without_locks_nobody_waits(wait: bool, tmp_path: Path, monkeypatch) -> None:
    """On a system without flock, and on a file system that refuses it."""
    with monkeypatch.context() as patch:
        patch.setattr(files, "fcntl", None)
        with locked(tmp_path / "lock", wait=wait) as one, locked(tmp_path / "lock", wait=wait) as other:
            assert (one, other) == (None, None)
    if files.fcntl is None:
        return

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with locked(tmp_path / "lock", wait=wait) as file:
        assert file is None


def test_files_are_the_standard_library_alone() -> None:
    """A wrong flag is answered before anything is loaded, and locks are taken before that."""
    code = "import sys; import moe_jax.system.files; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"jax", "numpy", "flax", "rich", "platformdirs"} & set(loaded)
