"""`benchmark.py` and `moe-jax benchmark`: which suites to run, and where to write their numbers."""

import datetime
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe_jax.cli.arguments import POSITIONAL
from moe_jax.cli.command import Command, check_range, print_json
from moe_jax.config import PresetName, UserError
from moe_jax.config.presets import preset, with_vocabulary
from moe_jax.system import environment, terminal
from moe_jax.system.files import json_text, write_output

Suite = Literal["moe", "train", "decode", "peers", "serve", "all"]
ALL = ("moe", "train", "decode", "peers")
PEERS = "uv run --extra peers benchmark.py peers"


@dataclass(frozen=True)
class Benchmark(Command):
    """Measure what the model costs on this machine, and compare it with other models.

    The candidates run in turn and their medians are compared, so a slow phase of the machine hits all of them. The last
    line of the output is one JSON object if it is asked for, or if the output is a file or a pipe. The results go into
    `runs/bench`, with machine, versions and commit.

        moe       one MoE layer beside dense layers, by time
        train     the training step, its dense baselines, and the matmul rate
        decode    prefill and cached decoding, and the memory bandwidth
        peers     Mixtral of transformers, in PyTorch (extra peers)
        serve     16 texts at once beside one, and the wait of a late request
        all       moe, train and decode; and peers if its extra is installed
    """

    suite: Suite = field(default="all", metadata=POSITIONAL)
    """The suite to run."""
    preset: PresetName = "seed-158m"
    """The model to measure."""
    batch_size: int = 8
    """Sequences of one training step."""
    rounds: int = 9
    """How often each candidate runs. Some suites run more or fewer rounds, in proportion."""
    json: bool = False
    """Print the results as JSON too."""

    def execute(self) -> int:
        check_range("--batch-size", self.batch_size, 1, 4096)
        check_range("--rounds", self.rounds, 1, 10_000)
        suites = self._suites()
        environment.prepare_environment()
        from moe_jax.benchmarks.request import BenchmarkRequest
        from moe_jax.benchmarks.suites import SUITES
        from moe_jax.model.precision import choose_policy
        from moe_jax.system import machine
        from moe_jax.training.header import model_line

        console = terminal.rich_console()
        config = with_vocabulary(preset(self.preset))
        if config.train.optimizer == "adamw-8bit":  # a step is measured with the AdamW that other libraries have
            config = config.override({("train", "optimizer"): "adamw"})
        about = machine.describe()
        where = f"{about['processor']}, {about['cores']} cores, {about['device'].removeprefix('cpu: ')}"
        console.print(f"[bold]{self.preset}[/bold] on {where}\n{model_line(config.model)}\n")
        request = BenchmarkRequest(config, self.batch_size, self.rounds)
        results = {name: SUITES[name](console, request) for name in suites}
        document: dict[str, Any] = {"preset": self.preset, "batch_size": self.batch_size}
        if "train" in suites:  # the other suites compute in float32; `peers` names the precision of each number
            document["training_precision"] = choose_policy(config.execution.compute_dtype).compute
        document |= results
        self._save(document, about)
        print_json(document if self.suite == "all" else results[self.suite], self.json)
        return 0

    def _suites(self) -> list[str]:
        """The suites to run. Raises UserError if `peers` is asked for by name, and its extra is missing."""
        has_peers = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
        if self.suite == "peers" and not has_peers:
            raise UserError(f"peers needs PyTorch and transformers: {PEERS}")
        if self.suite != "all":
            return [self.suite]
        if not has_peers:
            print(f"left out: peers; run it with `{PEERS}`")
        return [suite for suite in ALL if has_peers or suite != "peers"]

    def _save(self, document: dict[str, Any], about: dict[str, Any]) -> None:
        now = datetime.datetime.now(datetime.UTC)
        path = Path("runs") / "bench" / f"{now:%Y-%m-%d-%H%M}-{self.suite}-{self.preset}.json"
        command = PEERS if self.suite == "peers" else f"uv run benchmark.py {self.suite}"
        command += f" --preset {self.preset} --batch-size {self.batch_size} --rounds {self.rounds}"
        record = {"date": now.isoformat(timespec="seconds"), "command": command, "machine": about, **document}
        write_output(path, json_text(record, indent=1) + "\n")
        print(f"results: {path}")
