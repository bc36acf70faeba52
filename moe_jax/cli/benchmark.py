"""`benchmark.py` and `moe-jax benchmark`: which suites to run, and where to write their numbers."""

import datetime
import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from moe_jax.cli.arguments import POSITIONAL
from moe_jax.cli.command import Command, check_range, print_json
from moe_jax.config import ConfigError, PresetName, UserError
from moe_jax.config.presets import preset, with_vocabulary
from moe_jax.system import environment, terminal
from moe_jax.system.files import json_text, write_output

Suite = Literal["moe", "train", "decode", "memory", "peers", "serve", "all"]
EXTRAS = {"memory": ("gpu-plan", "JAX's CUDA plugin"), "peers": ("peers", "PyTorch and transformers")}
"""Suite -> the extra that it needs, and what the extra installs."""
UNIFORM = ("moe", "train", "decode", "all")
"""Suites that can spread tokens evenly over the experts. With `all`, the others of its suites do not."""
TRAINING = {"moe", "train"}
"""Suites that time a training step in the precision that is chosen for this machine. `peers` names the precision of
each number. The other suites compute in float32, or plan for cards with a precision of their own."""


@dataclass(frozen=True)
class Benchmark(Command):
    """Measure what the model costs on this machine, and compare it with other models.

    The candidates run in turn and their medians are compared, so a slow phase of the machine hits all of them. The last
    line of the output is one JSON object if it is asked for, or if the output is a file or a pipe. The results go into
    `runs/bench`, with machine, versions and commit.

        moe       one MoE layer and dense layers: time and compiled arithmetic
        train     the training step, its dense baselines, and the matmul rate
        decode    prefill and cached decoding, and the memory bandwidth
        memory    the settings that fit a 4 GB card (extra gpu-plan)
        peers     Mixtral of transformers, in PyTorch (extra peers)
        serve     16 texts at once beside one, and the wait of a late one
        all       the suites above whose extras are installed, except serve
    """

    interrupted: ClassVar[str] = "no results were written"

    suite: Suite = field(default="all", metadata=POSITIONAL)
    """The suite to run."""
    preset: PresetName = "seed-158m"
    """The model to measure."""
    batch_size: int = 8
    """Sequences of one training step. `memory` uses the preset's own batch."""
    rounds: int = 9
    """How often each candidate runs. Some suites run more or fewer rounds, in proportion."""
    uniform_routing: bool = False
    """Spread tokens evenly over the experts, and ignore the choices of the routers."""
    json: bool = False
    """Print the results as JSON too."""

    def execute(self) -> int:
        check_range("--batch-size", self.batch_size, 1, 4096)
        check_range("--rounds", self.rounds, 1, 10_000)
        if self.uniform_routing and self.suite not in UNIFORM:
            raise ConfigError(f"--uniform-routing: is for {', '.join(UNIFORM)}, and not for {self.suite}; leave it out")
        suites = self._suites()
        if suites == ["memory"]:
            # Compiling for a described card needs no card, and must not occupy a real one.
            os.environ["JAX_PLATFORMS"] = "cpu"
        environment.prepare_environment()
        terminal.outlive_output()  # the results go into a file as well
        from moe_jax.benchmarks.request import BenchmarkRequest
        from moe_jax.benchmarks.suites import SUITES
        from moe_jax.model.precision import choose_policy
        from moe_jax.system import machine
        from moe_jax.system.terminal import rich_console

        console = rich_console()
        config = with_vocabulary(preset(self.preset))
        about = machine.describe()
        console.print(
            f"[bold]{self.preset}[/bold] on {about['processor']}, {about['cores']} cores, {about['device']}\n"
        )
        request = BenchmarkRequest(config, self.batch_size, self.rounds, self.uniform_routing)
        results = {name: SUITES[name](console, request) for name in suites}
        settings: dict[str, Any] = {"preset": self.preset, "batch_size": self.batch_size}
        if self.uniform_routing:
            settings["uniform_routing"] = True
        if not TRAINING.isdisjoint(suites):
            settings["training_precision"] = choose_policy(config.execution.compute_dtype).compute
        document = {**settings, **results}
        self._save(document, about)
        print_json(document if self.suite == "all" else results[self.suite], self.json)
        return 0

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
        return [suite for suite in get_args(Suite) if suite not in {"all", "serve", *missing}]

    def _save(self, document: dict[str, Any], about: dict[str, Any]) -> None:
        now = datetime.datetime.now(datetime.UTC)
        path = Path("runs") / "bench" / f"{now:%Y-%m-%d-%H%M}-{self.suite}-{self.preset}.json"
        extra = f"--extra {EXTRAS[self.suite][0]} " if self.suite in EXTRAS else ""
        command = f"uv run {extra}benchmark.py {self.suite} --preset {self.preset}"
        command += (
            f" --batch-size {self.batch_size} --rounds {self.rounds}" + " --uniform-routing" * self.uniform_routing
        )
        record = {"date": now.isoformat(timespec="seconds"), "command": command, "machine": about, **document}
        write_output(path, json_text(record, indent=1) + "\n")
        print(f"results: {path}")


def _can_run(suite: str) -> bool:
    """Whether the extra of a suite is installed."""
    if suite == "memory":
        return environment.has_cuda_plugin()
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
