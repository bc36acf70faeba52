"""The folder of a run: its lock, its paths, and the files that training writes.

config.json            the resolved configuration, package versions, the changes at each resume, and how
                       the settings were fitted to the device
tokenizer.json
metrics.jsonl          one record a line                                (read by `records.py`)
summary.json           written by `training/logging.py`, at each evaluation and at the end
samples.txt            a generated text at each evaluation
traces/                the routing of the same tokens at each evaluation
checkpoints/           see `checkpoint.py`
.lock                  locked by the process that trains; holds its process id

Of several processes, process 0 alone writes these files.
"""

import dataclasses
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.config import RunConfig, UserError
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.parallel.processes import is_process_zero
from moe_jax.runs import records
from moe_jax.system.files import json_text, locked, read_json, step_name, steps_in, write_atomically
from moe_jax.system.machine import versions

LOCK = ".lock"
_NO_SETTINGS = (("", "out"), ("", "resume"))
"""Fields that say where a run lies and how it was called."""


@contextmanager
def locked_for_training(run: Path) -> Iterator[None]:
    """Hold the lock of a run's folder. Raises UserError if another process is training in the folder. Of several
    processes that train one run, the first one holds the lock.

    If the folder holds nothing but the lock at the end, as after a start that failed, the folder is removed.
    """
    if not is_process_zero():
        yield
        return
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    try:
        with locked(run / LOCK, wait=False):
            (run / LOCK).write_text(f"{os.getpid()}\n", encoding="ascii")
            try:
                yield
            finally:
                with suppress(OSError):
                    if os.listdir(run) == [LOCK]:
                        os.unlink(run / LOCK)
                        for folder in made:  # from the inner one to the outer one
                            folder.rmdir()
    except BlockingIOError:
        holder = (run / LOCK).read_text(encoding="ascii", errors="replace").strip()
        raise UserError(
            f"--out {run}: process {holder} is training there; wait for it, or name another folder"
        ) from None


def read_entry(run: Path, name: str) -> Any:
    """A value in config.json beside the settings: `history`, or `fitted` (`Session.fitted`). None if there is none."""
    try:
        return read_json(run / "config.json").get(name)
    except (FileNotFoundError, ValueError):
        return None


@dataclass(frozen=True)
class RunFolder:
    """Paths and files of one run (the list is above)."""

    path: Path

    @property
    def samples(self) -> Path:
        return self.path / "samples.txt"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def metrics(self) -> Path:
        return self.path / records.METRICS

    def start(self, config: RunConfig, tokenizer: Tokenizer, history: list[dict[str, Any]], fitted: Any = None) -> None:
        """Write the tokenizer and config.json of a new run. `history` says what an upcycled run started from.

        Files of an earlier start that never reached a checkpoint are removed.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if is_process_zero():
            for path in (self.metrics, self.samples, self.path / records.SUMMARY, *self._traces().values()):
                path.unlink(missing_ok=True)
        self.save_tokenizer(tokenizer)
        self.write_config(config, history, fitted)

    def save_tokenizer(self, tokenizer: Tokenizer) -> None:
        self._write(self.tokenizer, json_text(tokenizer.to_dict()))

    def record_resume(self, saved: RunConfig, config: RunConfig, step: int, fitted: Any = None) -> list[str]:
        """Add to the history in config.json the settings that changed since the checkpoint that is resumed.

        `saved` is the configuration that the checkpoint holds, and not config.json: so a change by hand in config.json
        is recorded too. Returns the changes as text, such as "train.steps 200 -> 400".
        """
        changes = {
            f"{section}.{name}".lstrip("."): [old, new]
            for (section, name, old), (_, _, new) in zip(saved.settings(), config.settings(), strict=True)
            if (section, name) not in _NO_SETTINGS and old != new
        }
        entry = {"resumed_at_step": step, "changed": changes, "versions": versions()}
        self.write_config(config, [*(read_entry(self.path, "history") or []), entry], fitted)
        return [f"{name} {old} -> {new}" for name, (old, new) in changes.items()]

    def write_config(self, config: RunConfig, history: list[dict[str, Any]], fitted: Any = None) -> None:
        """Write config.json. `fitted` says how the settings were fitted to a device."""
        # `resume` says how the program was called, not what the run is.
        values = dataclasses.replace(config, resume=False).to_dict()
        document = values | {"versions": versions(), "history": history}
        document |= {} if fitted is None else {"fitted": fitted}
        self._write(self.path / "config.json", json_text(document, indent=2) + "\n")

    def truncate_logs_after(self, step: int, evaluated: int) -> None:
        """Remove what was logged after a checkpoint: training records after `step`, evaluations after `evaluated`.

        The resumed run logs these again. `evaluated` is the last step that was evaluated before the checkpoint. Lines
        that are no records are removed too.
        """
        last = {"train": step, "val": evaluated}
        if self.metrics.exists():
            kept = [line for line, r in records.record_lines(self.path) if r["step"] <= last[r["split"]]]
            self._write(self.metrics, b"".join(line.rstrip(b"\r\n") + b"\n" for line in kept))
        if self.samples.exists():
            self._write(self.samples, _samples_until(self.samples.read_bytes(), evaluated))
        for number, path in self._traces().items():
            if number > evaluated and is_process_zero():
                path.unlink(missing_ok=True)

    def add_sample(self, step: int, text: str) -> None:
        # Written as bytes, so that the text keeps its line ends. A line that looks like a header gets a space in front.
        sample = re.sub(r"^(?==== step \d)", " ", text.strip(), flags=re.MULTILINE)
        with self.samples.open("ab") as file:
            file.write(f"=== step {step}\n{sample}\n\n".encode())

    def add_trace(self, step: int, trace: dict[str, Any]) -> None:
        (self.path / records.TRACES).mkdir(exist_ok=True)
        self._write(self.path / records.TRACES / f"{step_name(step)}.json", json_text({"step": step} | trace) + "\n")

    def write_summary(self, values: dict[str, Any]) -> None:
        self._write(self.path / records.SUMMARY, json_text(values, indent=2) + "\n")

    def _write(self, path: Path, content: str | bytes) -> None:
        if is_process_zero():
            write_atomically(path, content)

    def _traces(self) -> dict[int, Path]:
        return steps_in(self.path / records.TRACES, ".json")


def _samples_until(samples: bytes, evaluated: int) -> bytes:
    """The samples up to the step `evaluated`.

    A sample that a crash left incomplete belongs to a later step. If its header is incomplete, no header matches, so
    everything after the last empty line is removed.
    """
    headers = re.finditer(rb"^=== step (\d{1,18})\n", samples, re.MULTILINE)
    end = next((header.start() for header in headers if int(header[1]) > evaluated), len(samples))
    complete, blank, _ = samples[:end].rpartition(b"\n\n")
    return complete + blank
