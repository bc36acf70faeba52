"""The folder of a run: its lock, its paths, and the files that training writes.

config.json            the resolved configuration, the run's id, package versions, and the changes at each resume
tokenizer.json
metrics.jsonl          one record a line                                (read by `metrics.py`)
summary.json           written by `training/loop.py`, at each evaluation and at the end
samples.txt            a generated text at each evaluation
traces/                the routing of the same tokens at each evaluation (read by `snapshots.py`)
checkpoints/           see `checkpoint.py`
faults/                a batch and the names of arrays that were not finite (written by `training/nonfinite.py`)
tensorboard/, wandb/   with --tensorboard, --wandb
.lock                  held by the process that trains: its process id, and the run's id

No link in the folder is followed (`system/folders.py`). Before each change, the lock that this process holds must still
be the lock of the folder: see `RunLock`.
"""

import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moe_jax.config import RunConfig, UserError
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.parallel.processes import exchange, first
from moe_jax.runs import metrics, snapshots, summary
from moe_jax.runs.identity import new_run_id
from moe_jax.system.files import locked
from moe_jax.system.folders import Folder, Unwritten, unguarded
from moe_jax.system.json_text import json_text
from moe_jax.system.machine import versions
from moe_jax.system.step_names import step_name

LOCK = ".lock"
_MAX_LOCK_BYTES = 4096
_SHARED_SECONDS = 30.0
"""How long a network file system may take to show a new file to another machine."""
_MAX_SAMPLES_BYTES = 2**31


class RunLock:
    """The lock that this process holds on a run's folder.

    The folder may be removed and made anew while this process still trains, and then another process may train there.
    The file that this process has locked is then not the file `.lock` of the folder any more.
    """

    def __init__(self, run: Path, file: BinaryIO | None) -> None:
        self._folder, self._file = Folder(run), file
        self._identity = _identity(os.fstat(file.fileno()) if file else self._folder.status(LOCK))

    def check(self) -> None:
        """Raise UserError if the folder's lock is not the one that this process holds."""
        if _identity(self._folder.status(LOCK)) != self._identity:
            raise UserError(
                f"--out {self._folder.path}: the folder was removed or made anew while this process used it, so "
                "nothing more is written there; start again with another --out"
            )

    def note(self, run_id: str) -> None:
        """Write who holds the lock: the id of this process, and the id of the run."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.write(f"{os.getpid()}\n{run_id}\n".encode())
            self._file.flush()


def _identity(status: os.stat_result | None) -> tuple[int, int] | None:
    """What tells a file from any other, even from one of the same name."""
    return None if status is None else (status.st_dev, status.st_ino)


@contextmanager
def locked_for_training(run: Path) -> Iterator[RunLock]:
    """Hold the lock of a run's folder. Raises UserError if another process is training in the folder.

    If the folder holds nothing but the lock at the end, as after a start that failed, the lock is removed, and so are
    the folders that were made here.
    """
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    try:
        with locked(run / LOCK, wait=False) as file:
            lock = RunLock(run, file)
            lock.check()
            lock.note("")
            try:
                yield lock
            finally:
                _remove_empty(run, lock, made)
    except BlockingIOError:
        holder = Folder(run).read(LOCK, _MAX_LOCK_BYTES).partition(b"\n")[0].decode("ascii", "replace")[:20]
        raise UserError(
            f"--out {run}: process {holder} is training there; wait for it, or name another folder"
        ) from None


@contextmanager
def locked_together(run: Path) -> Iterator[RunLock | None]:
    """The lock of a run that this process trains, alone or together with others.

    Of several processes the first one holds the lock. The others get None, or UserError if they do not see its file.
    """
    if not first():
        _check_shared(run, exchange("")[0])
        yield None
        return
    with locked_for_training(run) as lock:
        exchange(_lock_text(run))
        yield lock


def _lock_text(run: Path) -> str:
    return Folder(run).read(LOCK, _MAX_LOCK_BYTES).decode("ascii", "replace")


def _check_shared(run: Path, expected: str) -> None:
    """Raise UserError unless the folder's lock has this text, soon."""
    deadline = time.monotonic() + _SHARED_SECONDS
    while True:
        with suppress(FileNotFoundError, NotADirectoryError):
            if _lock_text(run) == expected:
                return
        if time.monotonic() > deadline:
            raise UserError(
                f"--out {run}: does not hold the files that process 0 writes there; all processes need one folder, on "
                "a file system that they share"
            )
        time.sleep(0.1)


def _remove_empty(run: Path, lock: RunLock, made: list[Path]) -> None:
    """Remove the lock that is held, if it is alone in its folder, and the folders that were made for it."""
    with suppress(OSError, UserError):
        lock.check()
        if os.listdir(run) == [LOCK]:
            os.unlink(run / LOCK)
            for folder in made:  # from the inner one to the outer one
                folder.rmdir()


@dataclass(frozen=True)
class RunFolder:
    """Paths and files of one run (the list is above)."""

    path: Path
    guard: Callable[[], None] = unguarded
    """Called before each change: `RunLock.check` of the lock that is held."""

    @property
    def files(self) -> Folder:
        """The folder's files. None of them is reached through a link. Only the first of several processes writes."""
        return Folder(self.path, self.guard) if first() else Unwritten(self.path)

    @property
    def metrics(self) -> Path:
        return self.path / metrics.NAME

    @property
    def samples(self) -> Path:
        return self.path / "samples.txt"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def traces(self) -> Path:
        """The folder of the routing snapshots, one for each evaluation."""
        return self.path / snapshots.FOLDER

    def start(self, config: RunConfig, tokenizer: Tokenizer, history: list[dict[str, Any]]) -> str:
        """Write the tokenizer and config.json of a new run. `history` says what an upcycled run started from.

        Files of an earlier start that never reached a checkpoint are removed. Returns the id of the new run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        earlier = snapshots.snapshot_steps(self.files).values()
        for name in (metrics.NAME, self.samples.name, summary.NAME, *earlier):
            self.files.remove(name)
        self.save_tokenizer(tokenizer)
        run_id = new_run_id()
        self.write_config(config, history, run_id)
        return run_id

    def save_tokenizer(self, tokenizer: Tokenizer) -> None:
        self.files.write(self.tokenizer.name, json_text(tokenizer.to_dict()))

    def record_resume(self, saved: RunConfig, config: RunConfig, step: int, run_id: str) -> list[str]:
        """Add to the history in config.json the settings that changed since the checkpoint that is resumed.

        `saved` is the configuration that the checkpoint holds, and not config.json: so a change by hand in config.json
        is recorded too. Returns the changes as text, such as "train.steps 200 -> 400".
        """
        entry, said = recorded_changes(saved, config, step)
        self.write_config(config, [*self.history(), entry], run_id)
        return said

    def history(self) -> list[Any]:
        """What config.json says of the origin of the run, and of the changes since. Empty if it says nothing."""
        history = self.files.read_json("config.json").get("history")
        return history if isinstance(history, list) else []

    def write_config(self, config: RunConfig, history: list[dict[str, Any]], run_id: str) -> None:
        """Write config.json."""
        # `resume` says how the program was called, not what the run is.
        values = dataclasses.replace(config, resume=False).to_dict()
        document = values | {"run_id": run_id, "versions": versions(), "history": history}
        self.files.write("config.json", json_text(document, indent=2) + "\n")

    def truncate_logs_after(self, step: int, evaluated: int) -> None:
        """Remove what was logged after a checkpoint: training records after `step`, evaluations after `evaluated`.

        The resumed run logs these again. `evaluated` is the last step that was evaluated before the checkpoint. Lines
        that are no records are removed too.
        """
        last = {"train": step, "val": evaluated}
        if self.files.status(metrics.NAME):
            lines = metrics.record_lines(self.files)
            kept = [line.rstrip(b"\r\n") for line, r in lines if r is not None and r["step"] <= last[r["split"]]]
            self.files.write(metrics.NAME, b"".join(line + b"\n" for line in kept))
        if self.files.status(self.samples.name):
            samples = self.files.read(self.samples.name, _MAX_SAMPLES_BYTES)
            self.files.write(self.samples.name, _samples_until(samples, evaluated))
        for number, name in snapshots.snapshot_steps(self.files).items():
            if number > evaluated:
                self.files.remove(name)

    def add_sample(self, step: int, text: str) -> None:
        # Written as bytes, so that the text keeps its line ends. A line that looks like a header gets a space in front.
        sample = re.sub(r"^(?==== step \d)", " ", text.strip(), flags=re.MULTILINE)
        with self.files.append(self.samples.name) as file:
            file.write(f"=== step {step}\n{sample}\n\n".encode())

    def add_trace(self, step: int, trace: dict[str, Any]) -> None:
        self.files.make(snapshots.FOLDER)
        self.files.write(f"{snapshots.FOLDER}/{step_name(step)}.json", json_text({"step": step} | trace) + "\n")

    def write_summary(self, values: dict[str, Any]) -> None:
        self.files.write(summary.NAME, json_text(values, indent=2) + "\n")


def recorded_changes(saved: RunConfig, config: RunConfig, step: int) -> tuple[dict[str, Any], list[str]]:
    """The entry in the history of config.json for a run that goes on at a step with changed settings, and the changes
    as text, such as "train.steps 200 -> 400"."""
    changes = {
        f"{section}.{name}".lstrip("."): [old, new]
        for (section, name, old), (_, _, new) in zip(saved.settings(), config.settings(), strict=True)
        if (section, name) not in _NO_SETTINGS and old != new
    }
    entry = {"resumed_at_step": step, "changed": changes, "versions": versions()}
    return entry, [f"{name} {old} -> {new}" for name, (old, new) in changes.items()]


_NO_SETTINGS = (("", "out"), ("", "resume"))
"""Fields that say where a run lies and how it was called."""


def _samples_until(samples: bytes, evaluated: int) -> bytes:
    """The samples up to the step `evaluated`.

    A sample that a crash cut short, perhaps within a character, belongs to a later step. If the crash cut its header,
    no header matches, so everything after the last empty line is removed.
    """
    headers = re.finditer(rb"^=== step (\d{1,18})\n", samples, re.MULTILINE)
    end = next((header.start() for header in headers if int(header[1]) > evaluated), len(samples))
    whole, blank, _ = samples[:end].rpartition(b"\n\n")
    return whole + blank
