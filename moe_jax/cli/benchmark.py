"""`benchmark.py` and `moe-jax benchmark`: which suites to run, and where to write their numbers."""

import datetime
import importlib.util
import io
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from moe_jax.cli.arguments import POSITIONAL
from moe_jax.cli.command import Command, check_range
from moe_jax.cli.gpu_name import DEFAULT_GPU, check_gpu
from moe_jax.cli.result import print_json
from moe_jax.config import ConfigError, Dense, PresetName, UserError
from moe_jax.config.presets import preset, with_vocabulary
from moe_jax.system import environment, terminal
from moe_jax.system.files import json_text, write_output

if TYPE_CHECKING:
    from rich.console import Console

    from moe_jax.benchmarks.request import BenchmarkRequest

Suite = Literal["moe", "train", "decode", "pipeline", "memory", "gpu", "peers", "scaling", "serve", "all"]
EXTRAS = {
    "memory": ("gpu-plan", "JAX's CUDA plugin"),
    "gpu": ("gpu-plan", "JAX's CUDA plugin"),
    "peers": ("peers", "PyTorch and transformers"),
}
"""Suite -> the extra that it needs, and what the extra installs."""
UNIFORM = ("moe", "train", "decode", "scaling", "all")
"""Suites that can spread tokens evenly over the experts. With `all`, the others of its suites do not."""
TRAINING = {"moe", "train", "scaling"}
"""Suites that time a training step in the precision that is chosen for this machine. `peers` names the precision of
each number. The other suites compute in float32, or plan for cards with a precision of their own."""


@dataclass(frozen=True)
class Benchmark(Command):
    """Measure what the model costs on this machine, and compare it with other models.

    The candidates run in turn and their medians are compared, so a slow phase of the machine hits all of them. The last
    line of the output is one JSON object if it is asked for, or if the output is a file or a pipe. The results go into
    `runs/bench`, or with --record into `benchmarks/`, with machine, versions and commit.

        moe       one MoE layer and dense layers: time and compiled arithmetic
        train     the training step, its dense baselines, and the matmul rate
        decode    prefill and cached decoding, and the memory bandwidth
        pipeline  tokenizing, batches, saving and restoring (in TMPDIR)
        memory    the settings that fit a 4 GB card (extra gpu-plan)
        gpu       each part on a card: predicted time, and measured time
        peers     Mixtral of transformers, in PyTorch (extra peers)
        scaling   the training step with one size doubled at a time
        serve     16 texts at once beside one, and the wait of a late one
        all       the suites above whose extras are installed, except gpu,
                  scaling and serve
    """

    interrupted: ClassVar[str] = "no results were written"

    suite: Suite = field(default="all", metadata=POSITIONAL)
    """The suite to run."""
    preset: PresetName = "seed-158m"
    """The model to measure."""
    batch_size: int = 8
    """Sequences of one training step. `memory` and `gpu` use the preset's own batch."""
    rounds: int = 9
    """How often each candidate runs. Some suites run more or fewer rounds, in proportion."""
    gpu: str = ""
    """The card that `gpu` predicts for if none is in this machine, by the names of `plan`. Default: rtx3050-4gb."""
    uniform_routing: bool = False
    """Spread tokens evenly over the experts, and ignore the choices of the routers."""
    with_quality: str = ""
    """Folder of `python -m moe_jax compare`. `train` shows its bits per byte beside the costs."""
    record: bool = False
    """Write the results into `benchmarks/`, where the project keeps its records, and not into `runs/bench`. `train`
    and `scaling` also write a picture."""
    json: bool = False
    """Print the results as JSON too."""

    def execute(self) -> int:
        check_range("--batch-size", self.batch_size, 1, 4096)
        check_range("--rounds", self.rounds, 1, 10_000)
        self._check_heeded()
        suites = self._suites()
        if suites == ["memory"]:
            # Compiling for a described card needs no card, and must not occupy a real one.
            os.environ["JAX_PLATFORMS"] = "cpu"
        environment.prepare_environment()
        terminal.outlive_output()  # the results go into a file as well
        from moe_jax.benchmarks.request import BenchmarkRequest
        from moe_jax.model.precision import choose_policy
        from moe_jax.system import machine
        from moe_jax.system.terminal import rich_console

        console = rich_console()
        config = with_vocabulary(preset(self.preset))
        about = machine.describe()
        console.print(
            f"[bold]{self.preset}[/bold] on {about['processor']}, {about['cores']} cores, {about['device']}\n"
        )
        request = BenchmarkRequest(config, self.batch_size, self.rounds, self._quality(), self.uniform_routing)
        runners = suite_runners(self.gpu)
        results = {name: runners[name](console, request) for name in suites}
        settings: dict[str, Any] = {"preset": self.preset, "batch_size": self.batch_size}
        if self.uniform_routing:
            settings["uniform_routing"] = True
        if not TRAINING.isdisjoint(suites):
            settings["training_precision"] = choose_policy(config.execution.compute_dtype).compute
        document = {**settings, **results}
        self._save(document, about)
        print_json(document if self.suite == "all" else results[self.suite], self.json)
        return 0

    def _check_heeded(self) -> None:
        """Raise ConfigError for a card that is not known, and for a flag that the suite does not heed."""
        for flag, given, suites in (
            (f"--gpu {self.gpu}", self.gpu, ("gpu",)),
            ("--uniform-routing", self.uniform_routing, UNIFORM),
            (f"--with-quality {self.with_quality}", self.with_quality, ("train", "all")),
        ):
            if given and self.suite not in suites:
                raise ConfigError(f"{flag}: is for {', '.join(suites)}, and not for {self.suite}; leave it out")
        if self.gpu:
            check_gpu(self.gpu)

    def _quality(self) -> dict[Dense, float] | None:
        """The numbers of `--with-quality`. Raises UserError if the folder has no comparison of the preset."""
        from moe_jax.benchmarks.dense_baselines import read_quality

        return read_quality(Path(self.with_quality), self.preset) if self.with_quality else None

    def _suites(self) -> list[str]:
        """The suites to run. `all` leaves out suites whose extra is missing.

        Raises UserError if such a suite is asked for by name.
        """
        missing = {suite for suite in EXTRAS if not _can_run(suite)}
        if self.suite != "all":
            if self.suite in missing:
                extra, what = EXTRAS[self.suite]
                raise UserError(f"{self.suite} needs {what}: uv run --extra {extra} benchmark.py {self.suite}")
            return [self.suite]
        for suite in sorted(missing):
            print(f"left out: {suite}; run it with `uv run --extra {EXTRAS[suite][0]} benchmark.py {suite}`")
        return [suite for suite in get_args(Suite) if suite not in {"all", "gpu", "scaling", "serve", *missing}]

    def _save(self, document: dict[str, Any], about: dict[str, Any]) -> None:
        now = datetime.datetime.now(datetime.UTC)
        folder = Path("benchmarks") if self.record else Path("runs") / "bench"
        path = folder / f"{now:%Y-%m-%d-%H%M}-{self.suite}-{self.preset}.json"
        extra = f"--extra {EXTRAS[self.suite][0]} " if self.suite in EXTRAS else ""
        command = f"uv run {extra}benchmark.py {self.suite} --preset {self.preset}"
        command += f" --batch-size {self.batch_size} --rounds {self.rounds}"
        command += f" --gpu {self.gpu}" if self.gpu else ""
        command += " --uniform-routing" if self.uniform_routing else ""
        command += f" --with-quality {shlex.quote(self.with_quality)}" if self.with_quality else ""
        command += " --record" if self.record else ""
        record = {"date": now.isoformat(timespec="seconds"), "command": command, "machine": about, **document}
        write_output(path, json_text(record, indent=1) + "\n")
        print(f"results: {path}")
        if "train" in document:
            from moe_jax.benchmarks.dense_baselines import baselines_figure

            self._draw(lambda: baselines_figure(self.preset, document["train"]["models"]), path.with_suffix(".png"))
        if "scaling" in document:
            from moe_jax.benchmarks.scaling import scaling_figure

            self._draw(lambda: scaling_figure(self.preset, document["scaling"]), path.with_suffix(".png"))

    def _draw(self, figure: Callable[[], Any], path: Path) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            print(
                f"no picture: matplotlib is not installed; `uv run --extra plots benchmark.py {self.suite}` draws one"
            )
            return
        picture = io.BytesIO()
        figure().savefig(picture, format="png", dpi=150)
        write_output(path, picture.getvalue())
        print(f"picture: {path}")


def suite_runners(gpu: str) -> "dict[str, Callable[[Console, BenchmarkRequest], dict[str, Any]]]":
    """Suite -> the function that runs it. `memory` comes from `planning`, the others from `benchmarks`."""
    from moe_jax.benchmarks import card
    from moe_jax.benchmarks.suites import SUITES
    from moe_jax.planning.suite import memory

    return {
        **SUITES,
        "memory": lambda console, request: memory(console, request.config),
        "gpu": lambda console, request: card.gpu(console, request.config, gpu, DEFAULT_GPU, request.rounds),
    }


def _can_run(suite: str) -> bool:
    """Whether the extra of a suite is installed."""
    if suite in ("memory", "gpu"):
        return environment.has_cuda_plugin()
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
