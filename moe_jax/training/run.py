"""A run from its settings to its report: set-up, loop, report. `train` is the whole story, from top to bottom.

A resumed run is bit-identical to an uninterrupted run, because a step is a function of saved values only. A checkpoint
holds the whole `TrainState` and the `RunCounters`. A batch is a function of (seed, step): `data/batches.py`. A random
key is made of (seed, purpose, step): `system/random_keys.py`. Records after the checkpoint are removed at a resume. (On
a GPU the programs must be deterministic too: `--deterministic`.)
"""

import gc
import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from moe_jax.config import ProcessGroup, RunConfig, UserError
from moe_jax.parallel.processes import is_process_zero, process_group, stop_reason
from moe_jax.runs.folder import locked_for_training
from moe_jax.runs.load import restore_weights
from moe_jax.system.errors import is_out_of_memory
from moe_jax.system.signals import Signals
from moe_jax.system.terminal import say
from moe_jax.training.header import print_result, print_run_header
from moe_jax.training.logging import StepLogger, shown_sample, summary
from moe_jax.training.session import Session
from moe_jax.training.start import Start

PACE_STEPS = 20
"""Steps after which `--minutes` sets the number of steps. The pace is that of the later half."""
STEPS_SHARE = 0.85
"""Share of the time that is left for steps. The rest is for evaluations and checkpoints."""


class FirstStepOutOfMemory(RuntimeError):
    """The first step of this process ran out of memory. It was not logged, and nothing of it was saved."""


def train(
    config: RunConfig,
    start: Start,
    report: Callable[[Path], list[str]],
    group: ProcessGroup | None = None,
    resume: str = "--resume",
) -> int:
    """Train a run to its end, or until a signal stops it, and report it. Returns the exit status.

    `report` draws the pictures of a finished run and returns lines to print, and `resume` is the command that goes on
    with a stopped run. Where the first step runs out of memory although the settings were made to fit the device, the
    next ones are taken that may fit.
    """
    failed = None
    with process_group(group or ProcessGroup()), locked_for_training(Path(config.run_dir)):
        while True:
            session = Session.open(config, start, failed)
            print_run_header(session)
            try:
                stopped = take_steps(session, resume)
                break
            except FirstStepOutOfMemory:
                failed = session.config
                if not failed.execution.fitted:
                    raise
            del session  # its arrays, before new ones are made
            gc.collect()
            say("the first step ran out of memory; trying the next setting")
        if stopped is not None:
            return 128 + stopped
        result, folder = finish(session), session.folder.path
        del session  # the report opens the model again
        gc.collect()
        if is_process_zero():
            print_result(folder, result)
            later = f"`moe-jax inspect --run {shlex.quote(str(folder))}` writes it"
            say(*without_memory(lambda: report(folder), [f"no report: the device is out of memory; {later}"]))
            print(f"next: uv run moe-jax chat --run {shlex.quote(str(folder))}")
    return 0


def take_steps(session: Session, resume: str = "--resume") -> int | None:
    """Take the remaining steps. Evaluate, sample and save when due. Returns the signal that stopped the run, if any.

    Raises FirstStepOutOfMemory.
    """
    step = begin = session.saved_step
    with Signals() as signals, StepLogger(session) as logger:
        if step >= session.config.train.steps:
            logger.say(f"{session.folder.path}: already trained to step {step}; --steps extends it")
        try:
            while not evaluate_and_save_if_due(session, step, logger, signals):
                session.state, report = session.programs.step(session.state, session.batch(step))
                if step == begin:  # where it lacks memory, that is known before anything else starts
                    jax.block_until_ready(report)
                step += 1
                logger.add(step, report)
                if session.config.train.minutes and step in (PACE_STEPS // 2, PACE_STEPS):
                    jax.block_until_ready(report)
                    set_steps_from_pace(session, step, logger)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if step == begin:
                raise FirstStepOutOfMemory(str(error)) from None
            raise save_without_memory(session, step, logger, resume) from None
        if (signal := stop_reason(signals.stop_signal)) is not None:
            where = f"at step {step}, which is saved; go on with {resume}" if step else "before the first step"
            logger.say(f"stopped {where}")
            return signal
    return None


def save_without_memory(session: Session, step: int, logger: StepLogger, resume: str) -> UserError:
    """Save the state after `step` steps, if the work that lacked memory has left it whole, and record the setting: the
    resume takes the next one that needs less. Returns the error that ends the run."""
    with suppress(jax.errors.JaxRuntimeError), logger.paused():  # a step that began has taken its arguments
        logger.sync()
        session.save(step, None)
    session.record_out_of_memory()
    less = ", which takes the next setting" if session.config.execution.fitted else " and a smaller --batch-size"
    return UserError(
        f"the device ran out of memory after step {step}; step {session.saved_step} is saved: close what else uses the "
        f"device, and go on with {resume}{less}"
    )


def without_memory[T](work: Callable[[], T], instead: T) -> T:
    """The result of some work that the run can do without, or `instead` if the device lacks the memory for it."""
    try:
        return work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return instead


def set_steps_from_pace(session: Session, step: int, logger: StepLogger) -> None:
    """After PACE_STEPS steps of a run with `--minutes`: set its number of steps, once, and record it.

    The later half of these steps says how long one takes. The schedule of the learning rate follows the new number. Its
    warm-up does not depend on it, so the steps that were taken are those of the new schedule.
    """
    if step < PACE_STEPS:
        session.half_time = session.elapsed
        return
    pace = (session.elapsed - session.half_time) / (PACE_STEPS - PACE_STEPS // 2)
    left = 60 * session.config.train.minutes - session.elapsed
    steps = PACE_STEPS + max(int(STEPS_SHARE * left / pace), 1)
    session.set_steps(steps)
    logger.set_total(steps)
    logger.say(f"a step takes {pace:.2f} s: {steps:,} steps fit in {session.config.train.minutes:g} minutes")


def evaluate_and_save_if_due(session: Session, step: int, logger: StepLogger, signals: Signals) -> bool:
    """After `step` steps: evaluate if an evaluation is due, and save if a checkpoint is due or a signal asked to stop.

    Returns whether training stops here. A resumed run calls this before its first step, so it makes up an evaluation
    that a signal has prevented.
    """
    config, counters = session.config.train, session.counters
    last = step >= config.steps
    stop = stop_reason(signals.stop_signal) is not None
    due = step > 0 and (step % config.eval_every == 0 or last) and counters.evaluated < step
    val_loss, improved = None, False
    if due and not stop:
        with logger.paused():
            val_loss = _evaluate_and_sample(session, step, logger)
        improved = counters.add_evaluation(step, val_loss)
        stop = stop_reason(signals.stop_signal) is not None
    enough = bool(config.patience) and counters.without_improvement >= config.patience
    save_due = step % config.save_every == 0 or last or enough or stop
    made_up = val_loss is not None and step == session.saved_step  # its checkpoint has no loss yet
    if improved or made_up or (step > session.saved_step and save_due):
        with logger.paused():
            logger.sync()
            session.save(step, val_loss)
    if enough and not last:
        logger.say(f"stopped early at step {step}: {config.patience} evaluations without improvement")
    return last or enough or stop


def _evaluate_and_sample(session: Session, step: int, logger: StepLogger) -> float:
    """Evaluate, write a sample, a routing snapshot, a record and summary.json, and return the validation loss."""
    scored, params = session.score(session.data.subset()), session.params  # with several processes, by all together
    sample = without_memory(lambda: session.sample(step, params), "(no sample: the device is out of memory)")
    tracer = session.tracer
    trace = without_memory(lambda: tracer(params), None) if tracer else None
    if not is_process_zero():
        return scored.loss
    session.folder.add_sample(step, sample)
    if trace is not None:
        session.folder.add_trace(step, trace)
    logger.evaluated(step, scored)
    logger.say(shown_sample(sample))
    session.folder.write_summary(summary(session, scored, step, whole_stream=False))
    return scored.loss


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
    result = summary(session, scored, best.step, whole_stream=True)
    session.folder.write_summary(result)
    return result
