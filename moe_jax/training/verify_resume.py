"""`train.py --verify-resume`: a short run killed and resumed, beside one that was never stopped, bit for bit.

Real processes, killed by a signal that cannot be caught, with the model and the settings that were asked for: only
the number of steps, the evaluations and the corpus are cut down to what a minute allows.
"""

import dataclasses
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from moe_jax.config import RunConfig, UserError
from moe_jax.training.checkpoint import CheckpointStore

STEPS = 12
SAVE_EVERY = 4
STORIES = 2000
TIMES = frozenset({"tokens_per_second", "wall_seconds"})
"""Fields of metrics.jsonl that no two runs share."""


def verify_resume(config: RunConfig, program: Path) -> int:
    """Run the comparison and print it; 0 where every bit is equal. Raises UserError where a run fails by itself."""
    flags = short_flags(config)
    with _terminable(), tempfile.TemporaryDirectory(prefix="moe-jax-verify-") as scratch:
        whole, killed = Path(scratch) / "whole", Path(scratch) / "killed"
        print(f"{STEPS} steps without a stop ...", flush=True)
        _finish(program, [*flags, "--out", str(whole)], whole)
        # The record of a step that is saved is written before the save: one step later there is a checkpoint.
        after = random.randrange(SAVE_EVERY + 1, STEPS)
        print(f"the same steps, killed after step {after} or soon after ...", flush=True)
        _kill_after(program, [*flags, "--out", str(killed)], killed / "metrics.jsonl", after)
        print("resumed ...", flush=True)
        _finish(program, [*flags, "--out", str(killed), "--resume"], killed)
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
    """The flags of a short run of a configuration: every field, cut down to what a minute allows.

    A vocabulary of 0 is the tokenizer's, and left out: the run that is resumed has the tokenizer's number in its place.
    """
    c = dataclasses.replace
    short = c(
        config,
        verify_resume=False,
        resume=False,
        upcycle="",  # where the parameters come from has no say in what a resume loses, and the text is cut down
        tensorboard=False,
        wandb=False,
        data=c(config.data, eval_tokens=min(config.data.eval_tokens, 2048), stories=min(config.data.stories, STORIES)),
        train=c(config.train, steps=STEPS, log_every=1, eval_every=STEPS // 2, save_every=SAVE_EVERY, patience=0),
    )
    flags = []
    for section in ("", "model", "data", "train"):
        values = getattr(short, section) if section else short
        for f in dataclasses.fields(values):
            value, name = getattr(values, f.name), f.name.replace("_", "-")
            dot = f"{section}." if section else ""
            if isinstance(value, bool):
                flags.append(f"--{dot}{'' if value else 'no-'}{name}")
            elif not dataclasses.is_dataclass(value) and f.name != "out" and (f.name != "vocab_size" or value):
                flags.append(f"--{dot}{name}={value}")
    return flags


def fingerprint(run: Path) -> dict[str, str]:
    """Digests of what a run ended with: the state of its newest checkpoint, its metrics, its samples."""
    newest = CheckpointStore(run).newest()
    if newest is None:
        raise UserError(f"{run}: no good checkpoint; nothing to compare")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    timeless: list[dict[str, Any]] = [{k: v for k, v in r.items() if k not in TIMES} for r in records]
    return {
        f"step {newest.step}": newest.manifest["state"],
        "metrics": xxhash.xxh3_128(json.dumps(timeless).encode()).hexdigest(),
        "samples": xxhash.xxh3_128((run / "samples.txt").read_bytes()).hexdigest(),
    }


@contextmanager
def _terminable() -> Iterator[None]:
    """Within, SIGTERM unwinds as Ctrl-C does, so that the scratch folder is removed and no child goes on alone. And
    Ctrl-C does, which a shell that starts a program in the background lets it ignore."""
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
def _started(program: Path, flags: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive the context."""
    command = [sys.executable, str(program), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _finish(program: Path, flags: list[str], run: Path) -> None:
    with _started(program, flags) as process:
        output, _ = process.communicate()
    if process.returncode != 0:
        raise UserError(f"{run.name}: the run ended with status {process.returncode}: {output.strip()[-300:]}")


def _kill_after(program: Path, flags: list[str], metrics: Path, step: int) -> None:
    """Start the program, and end it without warning once it has logged a step."""
    with _started(program, flags) as process:
        while process.poll() is None:
            if metrics.exists() and f'"step": {step},' in metrics.read_text(encoding="utf-8"):
                break
            time.sleep(0.005)
