"""`train.py`, `moe-jax train` and `sft`: a run from its flags to its report."""

import dataclasses
import gc
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from moe_jax.cli.arguments import Values
from moe_jax.cli.command import check_memory, check_out_folder
from moe_jax.cli.settings import RunCommand, Settings, resolve_settings
from moe_jax.config import ConfigError, MeshShape, RunConfig, holds_run
from moe_jax.config.train import ProcessGroup
from moe_jax.data.corpora import skipped_files
from moe_jax.runs.catalog import run_folder
from moe_jax.system import environment, terminal
from moe_jax.system.signals import Signals, Stopped
from moe_jax.system.terminal import say, working
from moe_jax.training.start import Start

RUN, INIT_FROM, FORMAT, SOURCE = ("", "base"), ("", "init_from"), ("data", "format"), ("data", "source")


@dataclass(frozen=True)
class TrainingCommand(RunCommand):
    """A command that trains: `train` and `sft`."""

    dry_run: bool = False
    """Print the settings, the parameters, the memory and the expected time. Write nothing, download nothing."""
    num_processes: int | None = None
    """Processes that train this run together, each started by this command with its own --process-id. Needs --mesh."""
    process_id: int | None = None
    """The number of this process, from 0. Process 0 writes the files of the run."""
    coordinator_address: str = ""
    """HOST:PORT at which process 0 listens and the others call it, the same for all processes. `cluster` lets JAX find
    this and the two above: under SLURM, Kubernetes or Open MPI, or on a TPU pod."""

    @classmethod
    def parse(cls, argv: Sequence[str]) -> Self:
        command = super().parse(argv)
        check_run(command.settings.config, command.dry_run)
        command.check_group()
        return command

    @classmethod
    def adapt(cls, own: dict[str, Any], flags: Values) -> None:
        """Raise ConfigError for flags that name no possible group of processes, before anything is read."""
        ProcessGroup.of(own.get("num_processes"), own.get("process_id"), own.get("coordinator_address", ""))

    @property
    def group(self) -> ProcessGroup | None:
        """The processes that train together. None for this process alone."""
        return ProcessGroup.of(self.num_processes, self.process_id, self.coordinator_address)

    def check_group(self) -> None:
        """Raise ConfigError for a group of processes without --mesh."""
        mesh = self.settings.config.execution.mesh
        if self.group is not None and MeshShape.parse(mesh).devices == 1:
            detected = self.num_processes is None
            flag = "--coordinator-address cluster" if detected else f"--num-processes {self.num_processes}"
            raise ConfigError(f"{flag}: needs --mesh, whose product is the number of all devices of all processes")

    def execute(self) -> int:
        """A run from its settings to its report: session, loop, report."""
        if self.dry_run:
            return self._print_dry_run()
        config, start = self.settings
        say(*skipped_files(config.data))
        check_memory(config)
        with training_process(config, start, self.group, self.resume_command) as process:
            report(trained(config, start, process, self.seconds))
        return process.status

    @property
    def seconds(self) -> float:
        """The time in which a new run should end."""
        return math.inf

    @property
    def resume_command(self) -> str:
        """The command that goes on with the run after it was stopped."""
        typed = f"--out {shlex.quote(self.settings.config.run_dir)} --resume"
        if self.group is not None:
            return f"the same commands with {typed}"
        program = "train.py" if Path(sys.argv[0]).name == "train.py" else f"moe-jax {type(self).__name__.lower()}"
        return f"`uv run {program} {typed}`"

    def _print_dry_run(self) -> int:
        config, start = self.settings
        say(*skipped_files(config.data))
        environment.prepare_environment(config.execution.deterministic)
        if config.resume and start.saved is None:
            say(f"--resume: {config.run_dir} holds no checkpoint; a new run starts there")
        import jax

        from moe_jax.training.header import print_dry_run

        say(*environment.unused_card(jax.devices()[0].platform))
        print_dry_run(config)
        return 0


@dataclass(frozen=True)
class Train(TrainingCommand):
    """Train a sparse mixture-of-experts language model.

    Settings start from a preset, or from the run or model that --resume, --upcycle or --init-from names. Flags change
    them. --no-x turns a switch --x off. The defaults below are those of preset nano.
    """

    minutes: float = 0.0
    """Train for about this long: if the first steps take too long, the run starts again with fewer. 0: as long as it
    takes."""

    @property
    def seconds(self) -> float:
        return 60 * self.minutes or math.inf


@dataclass(frozen=True)
class Sft(TrainingCommand):
    """Fine-tune a trained run, or an imported model, on conversations.

    A conversation is a row of `{"messages": [{"role": "user", "content": "..."}, ...]}`. Only the assistant's answers
    are learned. With --lora RANK small adapters are trained, and the model's own weights stay as they are. The result
    is a run like any other; `chat --run` talks with it. Settings start from those of the run or model, with a short
    training at a low learning rate.
    """

    run: str = ""
    """Folder of the run to fine-tune: its best checkpoint is the start."""

    @classmethod
    def adapt(cls, own: dict[str, Any], flags: Values) -> None:
        """Turn --run into the settings that fine-tuning needs. A run that is resumed has them already."""
        super().adapt(own, flags)
        run = own.get("run")
        if run:
            flags[RUN] = str(run_folder(run))
        if run or flags.get(INIT_FROM):
            flags[FORMAT] = "chat"
        if not flags.get(("", "resume")):
            cls.check_start(own, flags)

    @classmethod
    def resolve(cls, own: dict[str, Any], flags: Values) -> Settings:
        """The settings; those of --resume say what is tuned only if there is a checkpoint."""
        settings = resolve_settings(flags)
        if settings.start.saved is None:
            cls.check_start(own, flags)
        return settings

    @classmethod
    def check_start(cls, own: dict[str, Any], flags: Values) -> None:
        """Raise ConfigError unless flags say what is tuned, and on what."""
        if not own.get("run") and not flags.get(INIT_FROM):
            raise ConfigError(
                "--run: must be given, the folder of the run to fine-tune, or --init-from with a Hugging Face folder"
            )
        if SOURCE not in flags:
            raise ConfigError("--data: must be given, a file of conversations (.jsonl); --help lists every flag")


@dataclass
class Process:
    """What a process knows while it trains."""

    signals: Signals
    notes: list[str]
    """Lines to print about the environment."""
    status: int = 0
    """The exit status."""


@contextmanager
def training_process(config: RunConfig, start: Start, group: ProcessGroup | None, resume: str) -> Iterator[Process]:
    """The environment of a training: settings of JAX, signals, other processes, and the lock of the run's folder.
    `resume` is the command that goes on with the run.

    If a signal stops the run, the block ends, and `Process.status` holds the exit status.
    """
    terminal.outlive_output()
    if group is not None:
        environment.silence_libraries()
    notes = environment.prepare_environment(config.execution.deterministic)
    with Signals(together=group is not None, saved=start.saved is not None, resume=resume) as signals:
        if config.resume and start.saved is None:
            say(f"--resume: {config.run_dir} holds no checkpoint; a new run starts there")
        # jax is imported only now, because the arguments are accepted and the environment is set.
        with working("starting JAX"):
            from moe_jax.parallel.layout import mesh_of
            from moe_jax.parallel.processes import check_same_program, first, joined
            from moe_jax.runs.folder import locked_together

        with joined(group):
            if group is not None:
                terminal.keep_apart(quiet=not first())
            check_same_program(config, start.saved is not None)
            mesh_of(config.execution.mesh)  # refuses a mesh of other devices before anything is written
            process = Process(signals, notes)
            try:
                with locked_together(Path(config.run_dir)):
                    yield process
            except Stopped as stop:
                process.status = stop.status


def trained(config: RunConfig, start: Start, process: Process, seconds: float = math.inf) -> Any:
    """The session, after its training. The settings are made to fit the device (`planning/fitting.py`). If the first
    step runs out of memory all the same, the next ones that may fit are taken. If the first steps show that a new run
    will not end in its `seconds`, it starts again with fewer, once."""
    from moe_jax.planning.fitting import fit
    from moe_jax.training.header import print_run_header
    from moe_jax.training.loop import FirstStepOutOfMemory, TooSlow, train
    from moe_jax.training.session import Session

    failed = None
    while True:
        session = Session.open(config, start, partial(fit, failed=failed))
        print_run_header(session, process.notes)
        try:
            train(session, process.signals, seconds)
            return session
        except TooSlow as slow:
            again = f"the run starts again, with {slow.steps:,} steps instead of {config.train.steps:,}"
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=slow.steps))
            seconds, message = math.inf, f"{slow}, too long for --minutes: {again}"
        except FirstStepOutOfMemory:
            failed = session.config
            if not failed.execution.fitted:
                raise
            message = "the first step ran out of memory; trying the next setting"
        del session  # its arrays, before new ones are made
        gc.collect()
        say(message)


def report(session: Any) -> None:
    """Score the best checkpoint on the whole validation text, and print and draw the result."""
    from moe_jax.inspection.report import report_run
    from moe_jax.parallel.processes import first
    from moe_jax.training.header import print_next_step, print_result
    from moe_jax.training.loop import finish

    result = finish(session)
    if first():
        print_result(session, result)
        say(*report_run(session.folder.files))
        print_next_step(session)


def check_run(config: RunConfig, dry_run: bool = False) -> None:
    """Raise ConfigError if the folder cannot be written, or holds a run and --resume is not given. A dry run writes
    nothing there."""
    run = Path(config.run_dir)
    check_out_folder("--out", run)
    if holds_run(run) and not config.resume and not dry_run:
        raise ConfigError(f"--out {run}: already holds a run; add --resume to go on with it, or name another folder")
