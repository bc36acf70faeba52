"""The checks of `moe-jax doctor --gpu --test` that train as users do. `card_checks` says how a check runs.

A process that trains takes the card's memory for itself, so `resume` starts others, and uses the card only after them.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.config.presets import preset, with_vocabulary
from moe_jax.system.environment import MIB

LOOP_STEPS, STORIES, TOKENS = 50, 2000, 50
"""Of `loop`: steps, stories to train on, tokens to write."""
LONG_STEPS, SAVED_AT, KILLED_AT = 200, 100, 110
"""Of `resume`: steps, after how many of them a checkpoint is saved, and the process killed."""

type Results = dict[str, Any]


def memory(name: str, dtypes: list[str]) -> Results:
    """MiB of the step, as planned, and the most that the device has counted. Then the settings that a run tries whose
    first step finds no memory, which is planted."""
    import jax

    from moe_jax.training.fit import fit, program_mib
    from moe_jax.training.plan import values_of
    from moe_jax.training.programs import Programs
    from moe_jax.training.session import Session

    with tempfile.TemporaryDirectory() as folder:
        fitted = fit(with_vocabulary(preset(name)).override({("", "out"): folder})).config
    programs, rows, count = Programs.of(fitted), fitted.train.batch_size, fitted.train.grad_accum
    planned = program_mib(programs.compiled_step(rows, count))
    batch = np.zeros((count, rows, fitted.model.seq_len + 1), np.int32)
    jax.block_until_ready(programs.step(programs.state(programs.initial_params()), batch))
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / MIB
    opened, tried = Session.open, []

    def no_memory(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: planted by doctor --test")

    def open_session(*arguments: Any) -> Session:
        session = opened(*arguments)
        tried.append(str(values_of(session.config)))
        if len(tried) == 1:
            vars(session.programs)["step"] = no_memory
        return session

    setattr(Session, "open", staticmethod(open_session))  # noqa: B010, a planted fault
    with tempfile.TemporaryDirectory() as folder:
        real_run(name, Path(folder), 2)
    return {"planned": planned, "peak": peak, "tried": np.array(tried)}


def real_run(name: str, folder: Path, count: int) -> None:
    """Train a preset for so many steps, with one evaluation at the end."""
    from moe_jax.training.run import train
    from moe_jax.training.start import Start

    settings = {"steps": count, "eval_every": count, "save_every": count, "log_every": 1}
    changed = {("train", key): value for key, value in settings.items()}
    config = preset(name).override(changed | {("", "out"): str(folder / "run"), ("data", "stories"): STORIES})
    train(config, Start(config), lambda _: [])


def loop(name: str, dtypes: list[str]) -> Results:
    """The real loop: steps, an evaluation, and texts in 1 and in 16 slots. Rates and seconds, which are not judged."""
    import jax

    from moe_jax.inference.decode import Decoder
    from moe_jax.inference.sampling import Sampling
    from moe_jax.runs.load import open_run
    from moe_jax.runs.records import read_metrics
    from moe_jax.training.programs import Programs

    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", f"{folder}/programs")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        seconds = []
        for _ in range(2):
            programs, began = Programs.of(with_vocabulary(preset(name))), time.monotonic()
            programs.compiled_step(programs.config.train.batch_size, programs.config.train.grad_accum)
            seconds.append(time.monotonic() - began)
            jax.clear_caches()
        real_run(name, Path(folder), LOOP_STEPS)
        metrics, run = read_metrics(Path(folder) / "run"), open_run(Path(folder) / "run")
    found = {"compile cold": seconds[0], "compile cached": seconds[1], "loss": metrics["val"][-1]["loss"]}
    found["train"] = float(np.median([record["tokens_per_second"] for record in metrics["train"][2:]]))
    for slots in (1, 16):
        decoder = Decoder(run.writer, run.config.model.seq_len, run.tokenizer.vocab_size, slots)
        texts = decoder.empty(run.params)
        for i in range(slots):
            texts = decoder.place(texts, i, decoder.read(run.params, [0]), (), Sampling(), jax.random.key(i))
        active, times = np.ones(slots, bool), []
        for _ in range(TOKENS):
            began = time.monotonic()
            texts, *_ = jax.block_until_ready(decoder.step(run.params, texts, active))
            times.append(time.monotonic() - began)
        found[f"write {slots}"] = slots / float(np.median(times))
    return found


def resume(name: str, dtypes: list[str]) -> Results:
    """How many arrays differ between a run that never stopped and one that was killed (SIGKILL) and resumed."""
    from moe_jax.runs.checkpoint import CheckpointStore, restore, stored_shapes

    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        train_in_a_process(name, whole)
        train_in_a_process(name, killed, kill_at=KILLED_AT)
        train_in_a_process(name, killed, "--resume")
        ends = [CheckpointStore(run).list()[-1] for run in (whole, killed)]
        one, other = (restore(end, stored_shapes(end)) for end in ends)
        summary = json.loads((killed / "summary.json").read_text())
    differ = sum(np.asarray(array).tobytes() != np.asarray(other[key]).tobytes() for key, array in one.items())
    return {"arrays": len(one), "differ": differ, "resumed from": summary["resumed_from"]}


def train_in_a_process(name: str, run: Path, *more: str, kill_at: int = 0) -> None:
    """Train a preset with the flags of a user, and kill the process once it has logged a step, if one is given."""
    numbers = {"steps": LONG_STEPS, "eval-every": LONG_STEPS, "save-every": SAVED_AT, "train.log-every": 10}
    flags = [f"--{key}={number}" for key, number in numbers.items()] + [f"--data.stories={STORIES}", "--deterministic"]
    command = [sys.executable, "-m", "moe_jax", "train", "--preset", name, "--out", str(run), *flags, *more]
    with (run.parent / "output").open("w+") as output, subprocess.Popen(command, stdout=output, stderr=output) as child:
        while child.poll() is None and not (kill_at and logged(run) >= kill_at):
            time.sleep(0.05)
        child.kill()
        output.seek(0)
        said = output.read().strip().splitlines()
    if child.returncode and not kill_at:
        raise RuntimeError(f"the run ended with status {child.returncode}: {said[-1] if said else 'no text'}")
    if kill_at and child.returncode != -9:
        raise RuntimeError(f"the run ended with status {child.returncode} before it was killed")


def logged(run: Path) -> int:
    """The last step in the metrics of a run."""
    from moe_jax.runs.records import METRICS, record_lines

    return max((record["step"] for _, record in record_lines(run)), default=0) if (run / METRICS).exists() else 0
