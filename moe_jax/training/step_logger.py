"""Turns the report of a step into a record in metrics.jsonl, a line on the terminal, and warnings."""

import time

import jax
import numpy as np

from moe_jax.config import UserError
from moe_jax.model.costs import training_flops
from moe_jax.system.machine import matmul_rate
from moe_jax.training.counters import STARVED_STEPS
from moe_jax.training.logging import MetricsLog, Terminal
from moe_jax.training.session import Session
from moe_jax.training.step import StepReport

MAX_SKIPPED_IN_A_ROW = 20


class StepLogger:
    """Turns step reports into records, one step late.

    To read a report, the host must wait for its step. One step later, the device is already computing the next step, so
    the device does not idle.
    """

    def __init__(self, session: Session, log: MetricsLog, terminal: Terminal) -> None:
        self._session, self._log, self._terminal = session, log, terminal
        self._pending: tuple[int, StepReport] | None = None
        self._mark, self._mark_step = time.monotonic(), int(session.state.step)
        self._matmul_rate = matmul_rate(session.programs.policy.compute)
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
            seconds = time.monotonic() - self._session.progress.begin
            self._terminal.say(f"first step done {seconds:.1f} s after the start, data and compilation included")
        counters, config = self._session.progress.counters, self._session.config.train
        finite, spike = bool(report.finite), bool(report.spike)
        counters.skipped_in_a_row = 0 if finite else counters.skipped_in_a_row + 1
        starved = counters.add_load(np.asarray(report.metrics.load)) if finite else []
        if finite:
            counters.add_drops(float(report.metrics.drop_fraction))
        by_loss = self._session.config.model.routing.balancing == "loss"
        cure = "--train.aux-loss-coef" if by_loss else "--set train.router_bias_lr"
        for layer, expert in starved:
            self._terminal.say(
                f"step {step} | expert {expert} of layer {layer} got almost no tokens for {STARVED_STEPS} steps; "
                f"a larger {cure} brings it back"
            )
        if spike:
            self._terminal.say(f"step {step} | loss spike: {float(report.metrics.loss):.3f}")
        if step % config.log_every == 0 or step == config.steps or not finite or spike or starved:
            self._write(step, report)
        if counters.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            path, first = self._session.diagnose(step)
            raise UserError(
                f"step {step}: {MAX_SKIPPED_IN_A_ROW} steps in a row had a loss or gradient that is not finite, first "
                f"in {first} ({path}); lower --lr, and {self._session.progress.how_to_go_on}"
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
            "starved": session.progress.counters.starved_now(),
            "lr": float(report.lr),
            "tokens_seen": step * session.config.tokens_per_step,
            "tokens_per_second": rate,
            "wall_seconds": session.progress.elapsed,
            "load": [[round(float(x), 4) for x in layer] for layer in np.asarray(metrics.load)],
        }
        if metrics.answers is not None:
            record["answer_tokens"] = round(float(metrics.answers) * session.config.train.grad_accum)
        self._log.write(record)
        share = training_flops(session.config, 1) / session.config.tokens_per_step * rate / self._matmul_rate
        train = session.data.store.train
        self._terminal.step(record, train.target_bytes / max(train.targets, 1), share)

    def paused(self) -> "StepLogger":
        """A context manager. The time spent in it does not count in `tokens_per_second`."""
        return self

    def __enter__(self) -> None:
        self._pause = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        self._mark += time.monotonic() - self._pause
