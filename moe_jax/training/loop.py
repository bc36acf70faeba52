"""The training loop: steps, and between them evaluations, samples and checkpoints.

`train` takes the remaining steps. `finish` scores the best checkpoint on the whole validation stream. Both write
summary.json. After a signal (Ctrl-C), `evaluate_and_save_if_due` saves a checkpoint and raises `Stopped`.
"""

from contextlib import suppress
from typing import Any

from moe_jax.config import UserError
from moe_jax.runs.identity import best_of_run
from moe_jax.runs.load import restore_weights
from moe_jax.system.signals import Signals, Stopped
from moe_jax.training.logging import MetricsLog
from moe_jax.training.session import Session
from moe_jax.training.step_logger import StepLogger
from moe_jax.training.summary import summary
from moe_jax.training.terminal import Terminal


def train(session: Session, signals: Signals | None = None) -> None:
    """Take the remaining steps. Evaluate, sample and save when due.

    Raises Stopped after everything is saved, if a signal asked to stop.
    """
    config, signals = session.config.train, signals or Signals()
    step = session.progress.saved_step
    terminal = Terminal(config.steps, step)
    log = MetricsLog(session.folder.files, session.config)
    step_logger = StepLogger(session, log, terminal)
    if step >= config.steps:
        terminal.say(f"{session.folder.path}: already trained to step {step}; --steps extends it")
    try:
        while not evaluate_and_save_if_due(session, step, step_logger, signals, log, terminal):
            session.state, report = session.programs.step(session.state, session.data.batch(step))
            step += 1
            signals.unsaved = True
            step_logger.add(step, report)
    finally:
        signals.unsaved = False
        terminal.close()
        log.close()


def evaluate_and_save_if_due(
    session: Session, step: int, step_logger: StepLogger, signals: Signals, log: MetricsLog, terminal: Terminal
) -> bool:
    """After `step` steps: evaluate if an evaluation is due, and save if a checkpoint is due or a signal asked to stop.

    Returns whether training is at its end. A resumed run calls this before its first step. So if a signal has prevented
    an evaluation, the resumed run makes it up.
    """
    config, counters = session.config.train, session.progress.counters
    last = step >= config.steps
    due = step > 0 and (step % config.eval_every == 0 or last) and counters.evaluated < step
    val_loss, improved = None, False
    if due:
        step_logger.flush()
        with step_logger.paused(), suppress(Stopped):  # at a signal: save now, and evaluate after the resume
            val_loss = _evaluate_and_sample(session, step, log, terminal, signals)
            improved = counters.add_evaluation(step, val_loss)
    enough = bool(config.patience) and counters.without_improvement >= config.patience
    asked = signals.stop_signal
    save_due = step % config.save_every == 0 or last or enough or asked
    if improved or (step > session.progress.saved_step and save_due):
        step_logger.flush()
        with step_logger.paused():
            log.sync()
            session.save(step, val_loss)
            signals.unsaved = False
        asked = signals.stop_signal  # a signal during the save counts too, even at the last step
    if asked is not None:
        terminal.say(f"stopped at step {step}, which is saved; go on with --resume")
        raise Stopped(asked)
    if enough and not last:
        terminal.say(f"stopped early at step {step}: {config.patience} evaluations without improvement")
    return last or enough


def _evaluate_and_sample(session: Session, step: int, log: MetricsLog, terminal: Terminal, signals: Signals) -> float:
    """Evaluate, write a sample, a routing snapshot, a record and summary.json, and return the validation loss.

    Raises Stopped at a signal, before anything is written.
    """
    with signals.interruptible():
        scored = session.score(session.data.subset())
        sample = session.sample(step)
        trace = session.tracer(session.params) if session.tracer else None
    session.folder.add_sample(step, sample)
    if trace is not None:
        session.folder.add_trace(step, trace)
    record = {"step": step, "split": "val", "loss": scored.loss, "bits_per_byte": scored.bits_per_byte}
    record |= {"drop_fraction": scored.drop_fraction, "tokens": scored.tokens}
    record |= {"stream": session.data.stream_of(scored)}
    log.write(record | {"wall_seconds": session.progress.elapsed})
    floor = session.data.baselines and session.data.baselines.entropy_floor
    best = "" if floor is None else f" (floor {floor:.3f})"
    terminal.say(
        f"step {step} | validation loss {scored.loss:.4f} | {scored.bits_per_byte:.4f} bits/byte{best}, on "
        + session.data.describe_stream(scored)
    )
    terminal.say("  " + " ".join(sample.split())[:400])
    session.folder.write_summary(summary(session, scored, step, scored.loss, whole_stream=False))
    return scored.loss


def finish(session: Session) -> dict[str, Any]:
    """Score the best checkpoint on the whole validation stream, and write the summary of the run."""
    session.folder.guard()
    best = best_of_run(session.folder.path)
    if best is None:
        raise UserError(f"{session.folder.path}: every checkpoint was damaged after it was saved; look after the disk")
    params = session.params
    if best.step != int(session.state.step):
        params = restore_weights(best, session.config, session.programs.param_shapes)
    scored = session.score(session.data.whole(), params)
    result = summary(session, scored, best.step, best.val_loss, whole_stream=True)
    session.folder.write_summary(result)
    return result
