"""Compare a short run that is killed and resumed with one that never stops, bit for bit.

    uv run python benchmarks/verify_resume.py --preset story-cpu

The runs are real processes, and one is killed by a signal that cannot be caught (SIGKILL). They have the model and the
settings of the command line, which takes the flags of `train.py`, with fewer steps, fewer evaluations and less text, so
the comparison takes about a minute. Both runs are in a temporary folder. The exit status is 1 if a bit differs.
`moe_jax/training/run.py` explains why a resumed run is bit-identical.
"""

import dataclasses
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import xxhash
from flags import flags

from moe_jax.cli import train
from moe_jax.cli.main import main
from moe_jax.cli.options import check_memory
from moe_jax.config import RunConfig, UserError
from moe_jax.system import environment

STEPS = 12
SAVE_EVERY = 4
STORIES = 2000
TIMES = frozenset({"tokens_per_second", "wall_seconds"})
"""Fields of metrics.jsonl that are times. They differ between any two runs, so they are not compared."""


def run(argv: Sequence[str]) -> int:
    config = train.parse(argv, "verify_resume.py")[0].config
    if not environment.runs_on_cpu():  # cuDNN's gradients may differ in their last bits
        config = config.override({("execution", "deterministic"): True})
    check_memory(config)
    environment.prepare_environment(config.execution.deterministic)
    return verify_resume(config)


def verify_resume(config: RunConfig) -> int:
    """Run the comparison and print it. Returns 0 if every bit is equal, else 1. Raises UserError if a run fails."""
    given = short_flags(config)
    with _terminable(), tempfile.TemporaryDirectory(prefix="moe-jax-verify-") as scratch:
        whole, killed = Path(scratch) / "whole", Path(scratch) / "killed"
        print(f"{STEPS} steps without a stop ...", flush=True)
        _finish([*given, "--out", str(whole)], whole)
        # The record of a saved step is written before its checkpoint. One step later the checkpoint is there.
        after = random.randrange(SAVE_EVERY + 1, STEPS)
        print(f"the same steps, killed after step {after} or soon after ...", flush=True)
        _kill_after([*given, "--out", str(killed)], killed / "metrics.jsonl", after)
        print("resumed ...", flush=True)
        _finish([*given, "--out", str(killed), "--resume"], killed)
        resumed_from = json.loads((killed / "summary.json").read_text())["resumed_from"]
        there, here = fingerprint(whole), fingerprint(killed)
    print(f"{'':10} {'never stopped':32}   killed, resumed from step {resumed_from}")
    for name in there | here:
        one, other = there.get(name, "not there"), here.get(name, "not there")
        print(f"{name:10} {one:32} {'=' if one == other else '≠'} {other}")
    passed = there == here
    print("PASS: every bit is equal" if passed else "FAIL: they differ; on a GPU, try --deterministic")
    return 0 if passed else 1


def short_flags(config: RunConfig) -> list[str]:
    """The flags of a short run with this configuration: all fields, with fewer steps and a smaller corpus.

    A vocabulary size of 0 means the tokenizer's size. It is left out, because a saved run holds the tokenizer's size
    instead, and a resume with 0 would be refused.
    """
    c = dataclasses.replace
    short = c(
        config,
        resume=False,
        # An upcycled run needs the dense run's whole text, and the test does not depend on initial values. An imported
        # tokenizer comes with its folder.
        upcycle=config.upcycle if config.data.tokenizer == "hf" else "",
        data=c(config.data, eval_tokens=min(config.data.eval_tokens, 2048), stories=min(config.data.stories, STORIES)),
        train=c(config.train, steps=STEPS, log_every=1, eval_every=STEPS // 2, save_every=SAVE_EVERY, patience=0),
    )
    left_out = {("", "out")} | ({("model", "vocab_size")} if not short.model.vocab_size else set())
    hidden = {(section, name) for section, name, _ in short.settings() if name in train.ONLY_TUNING}
    return [word for _, words in flags(short, left_out | hidden) for word in words]


def fingerprint(run: Path) -> dict[str, str]:
    """Digests of the state of a run's newest checkpoint, of its metrics and of its samples."""
    from moe_jax.runs.checkpoint import CheckpointStore, restore, stored_shapes
    from moe_jax.runs.records import record_lines

    newest = next(reversed(CheckpointStore(run).list()), None)
    if newest is None:
        raise UserError(f"{run}: no checkpoint; nothing to compare")
    state = xxhash.xxh3_128()
    for name, array in sorted(restore(newest, stored_shapes(newest)).items()):
        state.update(name.encode() + np.asarray(array).tobytes())
    timeless = [{k: v for k, v in record.items() if k not in TIMES} for _, record in record_lines(run)]
    return {
        f"step {newest.step}": state.hexdigest(),
        "metrics": xxhash.xxh3_128(json.dumps(timeless).encode()).hexdigest(),
        "samples": xxhash.xxh3_128((run / "samples.txt").read_bytes()).hexdigest(),
    }


@contextmanager
def _terminable() -> Iterator[None]:
    """Within this context, SIGTERM and Ctrl-C raise an exception, so that the scratch folder is removed and no child
    process is left running. Ctrl-C needs a handler too, because a shell makes a background program ignore it."""
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number)),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _started(given: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A training process, killed at the end of the context."""
    command = [sys.executable, "-m", "moe_jax", "train", *given]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _finish(given: list[str], run: Path) -> None:
    with _started(given) as process:
        output, _ = process.communicate()
    if process.returncode != 0:
        raise UserError(f"{run.name}: the run ended with status {process.returncode}: {output.strip()[-300:]}")


def _kill_after(given: list[str], metrics: Path, step: int) -> None:
    """Start a run, and kill it (SIGKILL) once it has logged a step. Raises UserError if it has ended before: then
    nothing was tested."""
    with _started(given) as process:
        while process.poll() is None:
            if metrics.exists() and f'"step": {step},' in metrics.read_text(encoding="utf-8"):
                break
            time.sleep(0.005)
        ended = process.poll()
    if ended is not None:
        raise UserError(f"{metrics.parent.name}: the run ended with status {ended} before it was killed; run it again")


if __name__ == "__main__":
    sys.exit(main(run))
