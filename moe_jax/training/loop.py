"""The training loop: steps, and between them evaluations, samples and checkpoints.

`train` takes the remaining steps. `finish` scores the best checkpoint on the whole validation stream. Both write
summary.json. After a signal (Ctrl-C), `evaluate_and_save_if_due` saves a checkpoint and raises `Stopped`.
"""

import math
from contextlib import ExitStack, suppress
from typing import Any

import jax

from moe_jax.config import UserError
from moe_jax.parallel.processes import is_process_zero, stop_reason
from moe_jax.runs.load import restore_weights
from moe_jax.system.signals import Signals, Stopped
from moe_jax.training.evaluate import Evaluation
from moe_jax.training.logging import MetricsLog, StepLogger, Terminal, summary
from moe_jax.training.session import Session
from moe_jax.training.step import StepReport

SHOWN_CHARACTERS, SHOWN_LINES = 400, 12
"""What is shown of a sample at an evaluation, at most. All of it is in samples.txt."""


PACE_STEPS = 20
"""Steps after which the pace of a run is known. It is that of the later half."""
IN_TIME = 0.85
"""Share of the time that is left for steps. The rest is for evaluations and checkpoints."""


class FirstStepOutOfMemory(RuntimeError):
    """The first step of this process ran out of memory. It was not logged, and nothing of it was saved."""


class TooSlow(RuntimeError):
    """A new run would not end in its time. Nothing of it was saved."""

    def __init__(self, seconds: float, steps: int) -> None:
        super().__init__(f"a step takes {seconds:.2f} s")
        self.steps = steps
        """The steps with which it would, if it started again now."""


def train(session: Session, signals: Signals | None = None, seconds: float = math.inf) -> None:
    """Take the remaining steps. Evaluate, sample and save when due. A new run should end in so many `seconds`.

    Raises Stopped after everything is saved, if a signal asked to stop, FirstStepOutOfMemory, and TooSlow.
    """
    config, signals = session.config.train, signals or Signals()
    step = begin = session.saved_step
    half = 0.0
    with ExitStack() as opened:
        log = MetricsLog(session.folder.path)
        opened.callback(log.close)
        terminal = Terminal(config.steps, step)
        opened.callback(terminal.close)
        opened.callback(setattr, signals, "unsaved", False)
        logger = StepLogger(session, log, terminal)
        if step >= config.steps:
            terminal.say(f"{session.folder.path}: already trained to step {step}; --steps extends it")
        while not evaluate_and_save_if_due(session, step, logger, signals):
            report = _take_step(session, step, first=step == begin)
            step += 1
            signals.unsaved = True
            logger.add(step, report)
            if seconds < math.inf and session.saved_step == 0 and step in (PACE_STEPS // 2, PACE_STEPS):
                jax.block_until_ready(report)
                if step == PACE_STEPS:
                    check_pace(config.steps, half, session.elapsed, seconds)
                half = session.elapsed


def check_pace(steps: int, half: float, now: float, seconds: float) -> None:
    """Raise TooSlow if the run will not end within `seconds`, and if another start with fewer steps would end earlier.

    `half` and `now` are the seconds of the run after PACE_STEPS // 2 and PACE_STEPS of its `steps`. Another start is
    assumed to take `half` until its steps have their pace.
    """
    pace = (now - half) / (PACE_STEPS - PACE_STEPS // 2)
    fewer = max(PACE_STEPS, int(IN_TIME * (seconds - now - half) / pace))
    left = (steps - PACE_STEPS) * pace
    if now + left / IN_TIME > seconds and half + fewer * pace < left:
        raise TooSlow(pace, fewer)


def _take_step(session: Session, step: int, first: bool) -> StepReport:
    """Take the step that follows `step` earlier ones. The first one of a process is waited for: where it lacks memory,
    that is known before anything else starts."""
    try:
        session.state, report = session.programs.step(session.state, session.batch(step))
        if first:
            jax.block_until_ready(report)
    except jax.errors.JaxRuntimeError as error:
        if first and "RESOURCE_EXHAUSTED" in str(error):
            raise FirstStepOutOfMemory(str(error)) from None
        raise
    return report


def evaluate_and_save_if_due(session: Session, step: int, logger: StepLogger, signals: Signals) -> bool:
    """After `step` steps: evaluate if an evaluation is due, and save if a checkpoint is due or a signal asked to stop.

    Returns whether training is at its end. A resumed run calls this before its first step. So if a signal has prevented
    an evaluation, the resumed run makes it up.
    """
    config, counters = session.config.train, session.counters
    last = step >= config.steps
    due = step > 0 and (step % config.eval_every == 0 or last) and counters.evaluated < step
    val_loss, improved = None, False
    if due:
        logger.flush()
        with logger.paused(), suppress(Stopped):  # at a signal: save now, and evaluate after the resume
            val_loss = _evaluate_and_sample(session, step, logger, signals)
            improved = counters.add_evaluation(step, val_loss)
    enough = bool(config.patience) and counters.without_improvement >= config.patience
    reason = stop_reason(signals.stop_signal)
    save_due = step % config.save_every == 0 or last or enough or reason
    made_up = val_loss is not None and step == session.saved_step  # its checkpoint has no loss yet
    if improved or made_up or (step > session.saved_step and save_due):
        logger.flush()
        with logger.paused():
            logger.log.sync()
            session.save(step, val_loss)
            signals.unsaved, signals.saved = False, True
        reason = stop_reason(signals.stop_signal)  # a signal during the save counts too, even at the last step
    if reason is not None:
        where = f"before the first step; {signals.how_to_go_on}"
        if step:
            where = f"at step {step}, which is saved; go on with {signals.resume}"
        logger.terminal.close()  # or the bar, with an older step, stands below
        logger.terminal.say(f"stopped {where}")
        raise Stopped(reason)
    if enough and not last:
        logger.terminal.say(f"stopped early at step {step}: {config.patience} evaluations without improvement")
    return last or enough


def _evaluate_and_sample(session: Session, step: int, logger: StepLogger, signals: Signals) -> float:
    """Evaluate, write a sample, a routing snapshot, a record and summary.json, and return the validation loss.

    Raises Stopped at a signal, before anything is written.
    """
    with signals.interruptible():
        scored = session.score(session.data.subset())
        params = session.params  # with several processes, by all together
        sample, trace = session.sample(step, params), session.tracer(params) if session.tracer else None
    if is_process_zero():
        _write_evaluation(session, step, scored, sample, trace, logger)
    return scored.loss


def _write_evaluation(
    session: Session, step: int, scored: Evaluation, sample: str, trace: dict[str, Any] | None, logger: StepLogger
) -> None:
    session.folder.add_sample(step, sample)
    if trace is not None:
        session.folder.add_trace(step, trace)
    record = {"step": step, "split": "val", "loss": scored.loss, "bits_per_byte": scored.bits_per_byte}
    record |= {"drop_fraction": scored.drop_fraction, "tokens": scored.tokens}
    record |= {"stream": session.data.stream_of(scored)}
    logger.log.write(record | {"wall_seconds": session.elapsed})
    floor = session.data.baselines and session.data.baselines.entropy_floor
    best = "" if floor is None else f" (floor {floor:.3f})"
    logger.terminal.say(
        f"step {step} | validation loss {scored.loss:.4f} | {scored.bits_per_byte:.4f} bits/byte{best}, on "
        f"{scored.tokens:,} of {session.data.store.valid.targets:,} validation tokens"
    )
    logger.terminal.say(_shown(sample))
    session.folder.write_summary(summary(session, scored, step, scored.loss, whole_stream=False))


def _shown(sample: str) -> str:
    """The beginning of a sample, indented. Its line ends stay, as verse needs them; empty lines go."""
    lines = (" ".join(line.split()) for line in sample.strip()[:SHOWN_CHARACTERS].splitlines())
    return "\n".join([f"  {line}" for line in lines if line][:SHOWN_LINES])


def finish(session: Session) -> dict[str, Any]:
    """Score the best checkpoint on the whole validation stream, and write the summary of the run."""
    best = session.checkpoints.best()
    if best is None:
        raise UserError(f"{session.folder.path}: every checkpoint was damaged after it was saved; check the disk")
    params = None
    if best.step != int(session.state.step):
        programs = session.programs
        params = restore_weights(best, session.config, programs.param_shapes, programs.layout)
    scored = session.score(session.data.store.valid.stream, params)
    result = summary(session, scored, best.step, best.val_loss, whole_stream=True)
    session.folder.write_summary(result)
    return result
