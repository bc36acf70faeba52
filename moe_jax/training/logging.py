"""What training writes and shows: metrics.jsonl, the terminal, and summary.json."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from moe_jax.config import UserError
from moe_jax.model.costs import adapter_parameters, count_parameters, totals, training_flops
from moe_jax.parallel.processes import is_process_zero
from moe_jax.runs import records
from moe_jax.system.files import json_text
from moe_jax.system.terminal import duration, rich_console
from moe_jax.training.evaluate import Evaluation
from moe_jax.training.session import Session
from moe_jax.training.state import STARVED_STEPS
from moe_jax.training.step import StepReport

MAX_SKIPPED_IN_A_ROW = 20
"""Steps whose loss or gradient is not finite, after which the run ends."""
SHOWN_CHARACTERS, SHOWN_LINES = 400, 12
"""What is shown of a sample at an evaluation, at most. All of it is in samples.txt."""


class StepLogger:
    """Turns step reports into records of metrics.jsonl and lines of the terminal, one step late.

    To read a report, the host must wait for its step. One step later, the device is already computing the next step, so
    the device does not idle. A terminal shows a bar, which is gone when the logger is closed; elsewhere there are plain
    lines. Of several processes, the first one writes.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        path = session.folder.path / records.METRICS
        self._file = (path if is_process_zero() else Path(os.devnull)).open("ab")
        self._pending: tuple[int, StepReport] | None = None
        self._begin = self._mark = time.monotonic()
        self._begin_step = self._mark_step = int(session.state.step)
        self._is_first, self._bar, self._console = True, None, rich_console()
        steps = session.config.train.steps
        if self._console.is_terminal:
            # rich shortens the columns that do not fit. The step must not be shortened.
            whole = Column(no_wrap=True, min_width=2 * len(str(steps)) + 1)
            step, facts = TextColumn("{task.completed}/{task.total}", table_column=whole), "{task.description}"
            self._bar = Progress(step, BarColumn(bar_width=8), facts, console=self._console, transient=True)
            self._task = self._bar.add_task("compiling the training step", total=steps, completed=self._begin_step)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._file.close()

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        self._console.print(text, markup=False, soft_wrap=not self._console.is_terminal)

    def write(self, record: dict[str, Any]) -> None:
        """Write one line of metrics.jsonl, and flush it, so that a killed run keeps its records."""
        self._file.write(json_text(record).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until all records are on the disk. After a power loss, no checkpoint is then newer than its records."""
        if is_process_zero():
            os.fsync(self._file.fileno())

    def set_total(self, steps: int) -> None:
        """Show another number of steps on the bar."""
        if self._bar is not None:
            self._bar.update(self._task, total=steps)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Read the pending report. The time spent in this context does not count in `tokens_per_second`."""
        self.flush()
        begin = time.monotonic()
        try:
            yield
        finally:
            self._mark += time.monotonic() - begin

    def add(self, step: int, report: StepReport) -> None:
        """Take the report of a step, and read the one before it."""
        self.flush()
        self._pending = (step, report)

    def flush(self) -> None:
        """Read the pending report, if there is one. Raises UserError after MAX_SKIPPED_IN_A_ROW steps in a row that
        were not finite."""
        if self._pending is None:
            return
        (step, report), self._pending = self._pending, None
        if self._is_first:
            self._is_first = False
            jax.block_until_ready(report)
            self._begin, self._begin_step = time.monotonic(), step  # the time left is without the compilation
            seconds = self._begin - self._session.begin
            self.say(f"first step done {seconds:.1f} s after the start, data and compilation included")
        config, counters = self._session.config, self._session.counters
        finite = bool(report.finite)
        starved = counters.add_step(np.asarray(report.metrics.load), float(report.metrics.drop_fraction), finite)
        by_loss = config.model.routing.balancing == "loss"
        cure = "--train.aux-loss-coef" if by_loss else "--train.router-bias-lr"
        for layer, expert in starved:
            self.say(
                f"step {step} | expert {expert} of layer {layer} got almost no tokens for {STARVED_STEPS} steps; "
                f"a larger {cure} brings it back"
            )
        if step % config.train.log_every == 0 or step == config.train.steps or not finite or starved:
            self._log(step, report)
        if counters.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"step {step}: {MAX_SKIPPED_IN_A_ROW} steps in a row had a loss or gradient that is not finite; "
                "lower --lr, and go on with --resume"
            )

    def _log(self, step: int, report: StepReport) -> None:
        """Write and show the record of a step."""
        session, metrics = self._session, report.metrics
        now = time.monotonic()
        rate = (step - self._mark_step) * session.config.tokens_per_step / max(now - self._mark, 1e-9)
        self._mark, self._mark_step = now, step
        record = {
            "step": step,
            "split": "train",
            "loss": float(metrics.loss),
            "balance_loss": float(metrics.balance_loss),
            "z_loss": float(metrics.z_loss),
            "drop_fraction": float(metrics.drop_fraction),
            "grad_norm": float(report.grad_norm),
            "skipped": not bool(report.finite),
            "starved": session.counters.starved_now(),
            "lr": float(report.lr),
            "tokens_seen": step * session.config.tokens_per_step,
            "tokens_per_second": rate,
            "wall_seconds": session.elapsed,
            "load": [[round(float(x), 4) for x in layer] for layer in np.asarray(metrics.load)],
        }
        if metrics.answers is not None:
            record["answer_tokens"] = round(float(metrics.answers) * session.config.train.grad_accum)
        self.write(record)
        self._show(record)

    def evaluated(self, step: int, scored: Evaluation) -> None:
        """Write and show the record of an evaluation."""
        data = self._session.data
        record = {"step": step, "split": "val", "loss": scored.loss, "bits_per_byte": scored.bits_per_byte}
        record |= {"drop_fraction": scored.drop_fraction, "tokens": scored.tokens, "stream": data.stream_of(scored)}
        self.write(record | {"wall_seconds": self._session.elapsed})
        floor = data.baselines and data.baselines.entropy_floor
        best = "" if floor is None else f" (floor {floor:.3f})"
        self.say(
            f"step {step} | validation loss {scored.loss:.4f} | {scored.bits_per_byte:.4f} bits/byte{best}, on "
            f"{scored.tokens:,} of {data.store.valid.targets:,} validation tokens"
        )

    def _show(self, record: dict[str, Any]) -> None:
        """Show a record of the training split: on the bar, or as a line."""
        train, steps, step = self._session.data.store.train, self._session.config.train.steps, record["step"]
        bytes_per_token = train.target_bytes / max(train.targets, 1)
        left = (steps - step) * (time.monotonic() - self._begin) / max(step - self._begin_step, 1)
        facts = (
            f"{duration(left)} left | {record['loss'] / math.log(2) / bytes_per_token:.3f} bits/byte | "
            f"{record['tokens_per_second']:,.0f} tokens/s | {record['drop_fraction']:.1%} dropped"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=facts)
        else:
            self.say(f"step {step:>{len(str(steps))}}/{steps} | {facts}")


def shown_sample(sample: str) -> str:
    """The beginning of a sample, indented. Its line ends stay, as verse needs them; empty lines go. Where it is cut, or
    ends within a sentence, "..." follows."""
    lines = [" ".join(line.split()) for line in sample.strip()[:SHOWN_CHARACTERS].splitlines()]
    shown = "\n".join([f"  {line}" for line in lines if line][:SHOWN_LINES])
    return shown if shown.endswith((".", "!", "?", '"')) else f"{shown}..."


def summary(session: Session, scored: Evaluation, best_step: int, whole_stream: bool) -> dict[str, Any]:
    """The content of summary.json, whose keys other programs read. It is written at each evaluation and at the end.

    At the end of the run (`val_whole_stream` is true) `best_step` and the `val_*` keys describe the best checkpoint, on
    the whole validation stream. During training they describe the newest evaluation, on the fixed subset. `val_stream`
    names the stream. `train_drop_fraction` is the mean over all finite training steps. `opening` is the first words of
    the validation text, and `openings` those of three of its documents.
    """
    config, data = session.config, session.data
    last = records.last_train_record(session.folder.path)
    steps = int(session.state.step)
    device = jax.devices()[0]
    compared, counters = data.baselines, session.counters
    counts = totals(count_parameters(config.model))
    return {
        "preset": config.preset,
        "steps": steps,
        "tokens_seen": steps * config.tokens_per_step,
        "train_loss": last.get("loss"),
        "val_loss": scored.loss,
        "val_bits_per_byte": scored.bits_per_byte,
        "val_bytes_per_token": scored.bytes / scored.tokens,
        "val_tokens": scored.tokens,
        "val_drop_fraction": scored.drop_fraction,
        "val_stream": data.stream_of(scored),
        "entropy_floor_bits_per_byte": compared and compared.entropy_floor,
        "trigram_bits_per_byte": compared and compared.trigram,
        "val_whole_stream": whole_stream,
        "best_step": best_step,
        "opening": "".join(data.openings[:1]),
        "openings": data.openings,
        "params_total": counts.total,
        "params_active": counts.active,
        "params_trained": adapter_parameters(config).total or counts.total,
        "training_flops": training_flops(config, steps),
        "inherited_flops": session.origin["training_flops"] if session.origin else 0,
        "train_drop_fraction": counters.mean_drop,
        "balance_loss": last.get("balance_loss"),
        "tokens_per_second": last.get("tokens_per_second"),
        "wall_seconds": session.elapsed,
        "device": f"{device.platform}: {device.device_kind}",
        "precision": session.programs.policy.compute,
        "resumed_from": session.resumed_from,
    }
