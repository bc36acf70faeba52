"""The folder of a run: what training writes, and how everything else opens it."""

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from moe_jax.config import RunConfig, UserError, load_config
from moe_jax.data.tokenizers import Tokenizer, load_tokenizer
from moe_jax.model.precision import choose_policy, stored
from moe_jax.model.transformer import Params, create, split
from moe_jax.training.checkpoint import Checkpoint, CheckpointStore, restore, versions

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """The only process that trains in a folder. The system gives the lock back however the process ends.

    Raises UserError where another process has it. Where the system or the file system has no `flock`, nobody waits.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("a+", encoding="utf-8") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UserError(
                    f"--out {run}: process {file.read().strip()} is training there; wait for it, or name another folder"
                ) from None
            except OSError:
                pass  # a network file system without locks
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def write_atomically(path: Path, text: str | bytes) -> None:
    """Replace a file by a rename, so that a reader sees the old text or the new one, after a loss of power too."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("wb") as file:
        file.write(text.encode() if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


@dataclass(frozen=True)
class RunFolder:
    """Paths and files of one run (see the README for the list)."""

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
        """Where the routing at each evaluation lies (see `analysis.saved_traces`)."""
        return self.path / "traces"

    def start(self, config: RunConfig, tokenizer: Tokenizer, history: list[dict[str, Any]]) -> None:
        """Write what a new run begins with, and where it comes from; leftovers of a start that never reached a
        checkpoint are replaced."""
        self.path.mkdir(parents=True, exist_ok=True)
        for old in (self.metrics, self.samples, self.path / "summary.json", *self.traces.glob("step_*.json")):
            old.unlink(missing_ok=True)
        tokenizer.save(self.tokenizer)
        self._write_config(config, history)

    def record_resume(self, saved: RunConfig, config: RunConfig, step: int) -> list[str]:
        """Add to the history of config.json what changed since the run was started or last resumed. Returns the
        changes as text, "train.steps 200 -> 400"."""
        changes = {
            f"{section}.{f.name}": [getattr(getattr(c, section), f.name) for c in (saved, config)]
            for section in ("model", "data", "train")
            for f in dataclasses.fields(getattr(config, section))
            if getattr(getattr(saved, section), f.name) != getattr(getattr(config, section), f.name)
        }
        history = json.loads((self.path / "config.json").read_text()).get("history", [])
        entry = {"resumed_at_step": step, "changed": changes, "versions": versions()}
        self._write_config(config, [*history, entry])
        return [f"{name} {old} -> {new}" for name, (old, new) in changes.items()]

    def _write_config(self, config: RunConfig, history: list[dict[str, Any]]) -> None:
        # These two are how the program was called, not what the run is.
        values = dataclasses.replace(config, resume=False, verify_resume=False).to_dict()
        document = values | {"versions": versions(), "history": history}
        write_atomically(self.path / "config.json", json.dumps(document, indent=2) + "\n")

    def cut_back(self, step: int, evaluated: int) -> None:
        """Forget what was logged after a checkpoint, of a `step` that was last evaluated at the step `evaluated`: it
        will be logged again."""
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
        # In bytes, for a story keeps its line ends. A line of it that looks like a header is moved by a space.
        story = re.sub(r"^(?==== step \d)", " ", text.strip(), flags=re.MULTILINE)
        with self.samples.open("ab") as file:
            file.write(f"=== step {step}\n{story}\n\n".encode())

    def add_trace(self, step: int, trace: dict[str, Any]) -> None:
        self.traces.mkdir(exist_ok=True)
        write_atomically(self.traces / f"step_{step:08}.json", json.dumps({"step": step} | trace) + "\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")


def _samples_until(samples: bytes, evaluated: int) -> bytes:
    """The stories of samples.txt up to a step; one cut short by a crash, within a character even, is of a later step.
    A header that was cut short comes after the empty line that ends the last whole story."""
    headers = re.finditer(rb"^=== step (\d+)\n", samples, re.MULTILINE)
    end = next((header.start() for header in headers if int(header[1]) > evaluated), len(samples))
    whole, blank, _ = samples[:end].rpartition(b"\n\n")
    return whole + blank


def _is_before(line: str, last: dict[str, int]) -> bool:
    """Whether a line of metrics.jsonl is of a step up to the last one of its split; one cut short by a crash is not."""
    try:
        record = json.loads(line)
        return record["step"] <= last[record["split"]]
    except (ValueError, KeyError, TypeError):
        return False


@dataclass(frozen=True)
class Run:
    """A trained model, opened."""

    config: RunConfig
    tokenizer: Tokenizer
    checkpoint: Checkpoint
    graphdef: nnx.GraphDef
    params: Params


def load_run(path: str | Path, step: int | None = None) -> Run:
    """Open the run in a folder: its best checkpoint, or the one of a step.

    Raises UserError where the folder holds no run, or the checkpoint is damaged.
    """
    path = Path(path)
    config = load_config(path)
    if config is None:
        raise UserError(f"--run {path}: no run with a complete checkpoint there; make one with `uv run train.py`")
    store = CheckpointStore(path)
    checkpoint = store.best() if step is None else store.at(step)
    if checkpoint is None:
        raise UserError(f"--run {path}: every checkpoint is damaged; `python -m moe_jax doctor --run {path}` says how")
    policy = choose_policy(config.train.precision)
    graphdef, shapes = abstract_model(config, policy.compute)
    params = restore(checkpoint, {"params": shapes})["params"]
    return Run(config, load_tokenizer(path / "tokenizer.json"), checkpoint, graphdef, params)


def abstract_model(config: RunConfig, compute: str) -> tuple[nnx.GraphDef, Params]:
    """The static definition of the model, and the shapes of its parameters; nothing is allocated."""
    model = nnx.eval_shape(
        lambda: create(config.model, jax.random.key(0), jax.numpy.dtype(compute), config.train.remat)
    )
    graphdef, shapes = split(model)
    return graphdef, jax.eval_shape(lambda params: stored(params, config.train.weights), shapes)
