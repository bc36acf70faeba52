"""What training writes and shows: metrics.jsonl, the terminal, and summary.json."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from moe_jax.config import UserError
from moe_jax.model.costs import adapter_parameters, count_parameters, duration, totals, training_flops
from moe_jax.parallel.processes import is_process_zero
from moe_jax.runs import records
from moe_jax.system.files import json_text
from moe_jax.system.terminal import rich_console
from moe_jax.training.evaluate import Evaluation
from moe_jax.training.session import Session
from moe_jax.training.state import STARVED_STEPS
from moe_jax.training.step import StepReport

MAX_SKIPPED_IN_A_ROW = 20
"""Steps whose loss or gradient is not finite, after which the run ends."""


class MetricsLog:
    """Appends records to metrics.jsonl. Only the first of several processes does so."""

    def __init__(self, run: Path) -> None:
        self._file = (run / records.METRICS if is_process_zero() else Path(os.devnull)).open("ab")

    def write(self, record: dict[str, Any]) -> None:
        """Write one line, and flush it, so that a killed run keeps its records."""
        self._file.write(json_text(record).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until all records are on the disk. After a power loss, no checkpoint is then newer than its records."""
        if is_process_zero():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Terminal:
    """The progress of a run: a bar on a terminal, plain lines elsewhere. The bar is gone when it is closed."""

    def __init__(self, steps: int, first: int) -> None:
        self.console = rich_console()
        self._steps, self._begin, self._first = steps, time.monotonic(), first
        self._bar = None
        if self.console.is_terminal:
            # rich shortens the columns that do not fit. The step must not be shortened.
            whole = Column(no_wrap=True, min_width=2 * len(str(steps)) + 1)
            step, facts = TextColumn("{task.completed}/{task.total}", table_column=whole), "{task.description}"
            self._bar = Progress(step, BarColumn(bar_width=14), facts, console=self.console, transient=True)
            self._task = self._bar.add_task("compiling the training step", total=steps, completed=first)
            self._bar.start()

    def step(self, record: dict[str, Any], bytes_per_token: float) -> None:
        """Show a record of the training split: on the bar, or as a line."""
        done = record["step"]
        left = (self._steps - done) * (time.monotonic() - self._begin) / max(done - self._first, 1)
        facts = (
            f"{duration(left)} left | {record['loss'] / math.log(2) / bytes_per_token:.3f} bits/byte | "
            f"{record['tokens_per_second']:,.0f} tokens/s | loss {record['loss']:.3f} | "
            f"{record['drop_fraction']:.1%} dropped"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=facts)
        else:
            self.say(f"step {done:>{len(str(self._steps))}}/{self._steps} | {facts}")

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        self.console.print(text, markup=False, soft_wrap=not self.console.is_terminal)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class StepLogger:
    """Turns step reports into records, one step late.

    To read a report, the host must wait for its step. One step later, the device is already computing the next step, so
    the device does not idle.
    """

    def __init__(self, session: Session, log: MetricsLog, terminal: Terminal) -> None:
        self._session, self.log, self.terminal = session, log, terminal
        self._pending: tuple[int, StepReport] | None = None
        self._mark, self._mark_step = time.monotonic(), int(session.state.step)
        self._is_first = True

    def add(self, step: int, report: StepReport) -> None:
        self.flush()
        self._pending = (step, report)

    def flush(self) -> None:
        """Read the pending report, if there is one. Raises UserError after MAX_SKIPPED_IN_A_ROW steps in a row that
        were not finite."""
        if self._pending is None:
            return
        step, report = self._pending
        self._pending = None
        if self._is_first:
            self._is_first = False
            jax.block_until_ready(report)
            seconds = time.monotonic() - self._session.begin
            self.terminal.say(f"first step done {seconds:.1f} s after the start, data and compilation included")
        counters, config = self._session.counters, self._session.config.train
        finite, spike = bool(report.finite), bool(report.spike)
        counters.skipped_in_a_row = 0 if finite else counters.skipped_in_a_row + 1
        starved = counters.add_load(np.asarray(report.metrics.load)) if finite else []
        if finite:
            counters.add_drops(float(report.metrics.drop_fraction))
        by_loss = self._session.config.model.routing.balancing == "loss"
        cure = "--train.aux-loss-coef" if by_loss else "--set train.router_bias_lr"
        for layer, expert in starved:
            self.terminal.say(
                f"step {step} | expert {expert} of layer {layer} got almost no tokens for {STARVED_STEPS} steps; "
                f"a larger {cure} brings it back"
            )
        if spike:
            self.terminal.say(f"step {step} | loss spike: {float(report.metrics.loss):.3f}")
        if step % config.log_every == 0 or step == config.steps or not finite or spike or starved:
            self._write(step, report)
        if counters.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"step {step}: {MAX_SKIPPED_IN_A_ROW} steps in a row had a loss or gradient that is not finite; "
                "lower --lr, and go on with --resume"
            )

    def _write(self, step: int, report: StepReport) -> None:
        session, metrics = self._session, report.metrics
        now = time.monotonic()
        rate = (step - self._mark_step) * session.config.tokens_per_step / max(now - self._mark, 1e-9)
        self._mark, self._mark_step = now, step
        finite, spike = bool(report.finite), bool(report.spike)
        record = {
            "step": step,
            "split": "train",
            "loss": float(metrics.loss),
            "balance_loss": float(metrics.balance_loss),
            "z_loss": float(metrics.z_loss),
            "drop_fraction": float(metrics.drop_fraction),
            "grad_norm": float(report.grad_norm),
            "skipped": not finite,
            "spike": spike,
            "starved": session.counters.starved_now(),
            "lr": float(report.lr),
            "tokens_seen": step * session.config.tokens_per_step,
            "tokens_per_second": rate,
            "wall_seconds": session.elapsed,
            "load": [[round(float(x), 4) for x in layer] for layer in np.asarray(metrics.load)],
        }
        if metrics.answers is not None:
            record["answer_tokens"] = round(float(metrics.answers) * session.config.train.grad_accum)
        self.log.write(record)
        train = session.data.store.train
        self.terminal.step(record, train.target_bytes / max(train.targets, 1))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time spent in this context does not count in `tokens_per_second`."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._mark += time.monotonic() - begin


def summary(
    session: Session, scored: Evaluation, best_step: int, training_val_loss: float | None, whole_stream: bool
) -> dict[str, Any]:
    """The content of summary.json, whose keys other programs read. It is written at each evaluation and at the end.

    At the end of the run (`val_whole_stream` is true) `best_step` and the `val_*` keys describe the best checkpoint, on
    the whole validation stream. During training they describe the newest evaluation, on the fixed subset. `val_stream`
    names the stream of the `val_*` keys. `val_loss_in_training` is the same checkpoint's loss as it was scored during
    training, on the fixed subset; null if it was not.

    `train_drop_fraction` is the mean over all finite training steps. `opening` is the first words of the validation
    text, and `openings` those of three of its documents.
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
        "val_scored": "all tokens" if data.store.valid.answers is None else "answers",
        "entropy_floor_bits_per_byte": compared and compared.entropy_floor,
        "trigram_bits_per_byte": compared and compared.trigram,
        "val_whole_stream": whole_stream,
        "val_loss_in_training": training_val_loss,
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
