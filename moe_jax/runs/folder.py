"""The folder of a run: its lock, its paths, and the files that training writes.

config.json            the resolved configuration, package versions, and the changes at each resume
tokenizer.json
metrics.jsonl          one record a line                                (read by `metrics.py`)
summary.json           written by `training/loop.py`, at each evaluation and at the end
samples.txt            a generated text at each evaluation
traces/                the routing of the same tokens at each evaluation (read by `snapshots.py`)
checkpoints/           see `checkpoint.py`
faults/                a batch and the names of arrays that were not finite (written by `training/nonfinite.py`)
tensorboard/, wandb/   with --tensorboard, --wandb
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.config import SECTIONS, RunConfig, UserError
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.system.files import locked, write_atomically
from moe_jax.system.machine import versions


@contextmanager
def locked_for_training(run: Path) -> Iterator[None]:
    """Hold the lock of a run's folder. Raises UserError if another process is training in the folder."""
    run.mkdir(parents=True, exist_ok=True)
    try:
        with locked(run / ".lock", wait=False) as lock:
            if lock is not None:
                lock.truncate(0)
                lock.write(f"{os.getpid()}\n")
                lock.flush()
            yield
    except BlockingIOError:
        holder = (run / ".lock").read_text(encoding="utf-8").strip()
        raise UserError(
            f"--out {run}: process {holder} is training there; wait for it, or name another folder"
        ) from None


@dataclass(frozen=True)
class RunFolder:
    """Paths and files of one run (the list is above)."""

    path: Path

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.txt"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def traces(self) -> Path:
        """The folder of the routing snapshots, one for each evaluation."""
        return self.path / "traces"

    def start(self, config: RunConfig, tokenizer: Tokenizer, history: list[dict[str, Any]]) -> None:
        """Write the tokenizer and config.json of a new run. `history` says what an upcycled run started from.

        Files of an earlier start that never reached a checkpoint are removed.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for old in (self.metrics, self.samples, self.path / "summary.json", *self.traces.glob("step_*.json")):
            old.unlink(missing_ok=True)
        tokenizer.save(self.tokenizer)
        self._write_config(config, history)

    def record_resume(self, saved: RunConfig, config: RunConfig, step: int) -> list[str]:
        """Add to the history in config.json the settings that changed since the run was started or last resumed.

        Returns the changes as text, such as "train.steps 200 -> 400".
        """
        changes = {
            f"{section}.{f.name}": [getattr(c.section(section), f.name) for c in (saved, config)]
            for section in SECTIONS
            for f in dataclasses.fields(config.section(section))
            if f.name not in SECTIONS
            and getattr(saved.section(section), f.name) != getattr(config.section(section), f.name)
        }
        history = json.loads((self.path / "config.json").read_text()).get("history", [])
        entry = {"resumed_at_step": step, "changed": changes, "versions": versions()}
        self._write_config(config, [*history, entry])
        return [f"{name} {old} -> {new}" for name, (old, new) in changes.items()]

    def _write_config(self, config: RunConfig, history: list[dict[str, Any]]) -> None:
        # `resume` says how the program was called, not what the run is.
        values = dataclasses.replace(config, resume=False).to_dict()
        document = values | {"versions": versions(), "history": history}
        write_atomically(self.path / "config.json", json.dumps(document, indent=2) + "\n")

    def truncate_logs_after(self, step: int, evaluated: int) -> None:
        """Remove what was logged after a checkpoint: training records after `step`, evaluations after `evaluated`.

        The resumed run logs these again. `evaluated` is the last step that was evaluated before the checkpoint.
        """
        if self.metrics.exists():
            lines = self.metrics.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _is_before(line, {"train": step, "val": evaluated})]
            write_atomically(self.metrics, "".join(line + "\n" for line in kept))
        if self.samples.exists():
            write_atomically(self.samples, _samples_until(self.samples.read_bytes(), evaluated))
        for trace in self.traces.glob("step_*.json"):
            if int(trace.stem.removeprefix("step_")) > evaluated:
                trace.unlink()

    def add_sample(self, step: int, text: str) -> None:
        # Written as bytes, so that the text keeps its line ends. A line that looks like a header gets a space in front.
        sample = re.sub(r"^(?==== step \d)", " ", text.strip(), flags=re.MULTILINE)
        with self.samples.open("ab") as file:
            file.write(f"=== step {step}\n{sample}\n\n".encode())

    def add_trace(self, step: int, trace: dict[str, Any]) -> None:
        self.traces.mkdir(exist_ok=True)
        write_atomically(self.traces / f"step_{step:08}.json", json.dumps({"step": step} | trace) + "\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")


def _samples_until(samples: bytes, evaluated: int) -> bytes:
    """The samples up to the step `evaluated`.

    A sample that a crash cut short, perhaps within a character, belongs to a later step. If the crash cut its header,
    no header matches, so everything after the last empty line is removed.
    """
    headers = re.finditer(rb"^=== step (\d+)\n", samples, re.MULTILINE)
    end = next((header.start() for header in headers if int(header[1]) > evaluated), len(samples))
    whole, blank, _ = samples[:end].rpartition(b"\n\n")
    return whole + blank


def _is_before(line: str, last: dict[str, int]) -> bool:
    """Whether a line of metrics.jsonl belongs to a step up to `last` of its split. False for a line cut by a crash."""
    try:
        record = json.loads(line)
        return record["step"] <= last[record["split"]]
    except (ValueError, KeyError, TypeError):
        return False
