"""`moe-jax compare`."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from moe_jax.cli.command import Command, check_range
from moe_jax.cli.memory import check_memory
from moe_jax.cli.outputs import check_out_folder
from moe_jax.cli.result import print_json
from moe_jax.config import ConfigError, PresetName, RunConfig, UserError
from moe_jax.config.presets import preset
from moe_jax.system import environment, streams
from moe_jax.system.json_text import json_text
from moe_jax.system.signals import Signals, Stopped
from moe_jax.system.terminal_text import say

if TYPE_CHECKING:
    from moe_jax.experiments.comparison import Plan
    from moe_jax.experiments.comparison_result import ArmResult


@dataclass(frozen=True)
class Compare(Command):
    """Train a preset's mixture of experts and its dense baselines, over seeds.

    One baseline has the same active parameters, the other the same total. Each trains twice: for the same tokens as the
    mixture, and for the same wall-clock time. To go on with a stopped comparison, call it again with the same
    arguments: finished runs are not trained again. The last line of the output is JSON if it is asked for, or if the
    output is a file or a pipe.
    """

    interrupted: ClassVar[str] = "the same command goes on with the comparison"

    preset: PresetName = "nano"
    """The settings of the mixture and of its baselines."""
    data: str = ""
    """The text, as for `train.py`. Empty: the preset's own."""
    seeds: int = 3
    """Runs of each kind. A later call may ask for more."""
    flops: float = 2e13
    """Training operations of one run of the mixture, which give its number of steps."""
    out: str = ""
    """Folder of the comparison. Empty: runs/compare-PRESET."""
    json: bool = False
    """Print the result as JSON too."""

    def execute(self) -> int:
        out = Path(self.out or f"runs/compare-{self.preset}")
        asked = self._check(out)
        check_memory(asked)
        streams.outlive_output()
        with Signals() as signals:
            environment.prepare_environment()
            from moe_jax.runs.folder import locked_for_training

            try:
                with locked_for_training(out):
                    plan, results = self._train(asked, out, signals)
            except Stopped as stop:
                return stop.status
        return self._report(plan, results, out)

    def _check(self, out: Path) -> RunConfig:
        """The preset with the data of `--data`. Raises ConfigError."""
        from moe_jax.data.beginning import check_beginning
        from moe_jax.data.corpora import check_source

        check_range("--seeds", self.seeds, 1, 1000)
        check_range("--flops", self.flops, 1, 1e30)
        config = preset(self.preset)
        if self.data:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=self.data))
        check_source(config.data.source)
        check_beginning(config.data, config.model.seq_len)
        check_out_folder("--out", out)
        self._check_same(config, out)
        return config

    def _asked(self, config: RunConfig) -> dict[str, Any]:
        return {"data": config.data.source, "flops": self.flops, "config": config.to_dict()}

    def _check_same(self, config: RunConfig, out: Path) -> None:
        """Raise an error if a different comparison was begun in the folder."""
        path = out / "plan.json"
        if not path.exists():
            return
        try:
            there = json.loads(path.read_text(encoding="utf-8"))["asked"]
            begun = self._asked(RunConfig.from_dict(there["config"])) | {"flops": there["flops"]}
            changed = [name for name, here in self._asked(config).items() if begun[name] != here]
        except (OSError, ValueError, LookupError, TypeError):
            raise UserError(f"{path}: cannot be read; remove it, or name another --out") from None
        if changed:
            flag = {"data": f"--data {config.data.source}", "flops": f"--flops {self.flops:g}"}
            asked = flag.get(changed[0], f"--preset {self.preset}")
            raise ConfigError(f"{asked}: the comparison in {out} was begun with other settings; name another --out")

    def _train(self, asked: RunConfig, out: Path, signals: Signals) -> "tuple[Plan, list[ArmResult]]":
        from moe_jax.experiments import comparison
        from moe_jax.experiments.comparison_result import collect

        path = out / "plan.json"
        if not path.exists():
            print("measuring the step times of the three models in turn ...", flush=True)
            comparison.Plan.make(asked, self.flops).save(path, self._asked(asked))
        plan = comparison.Plan.load(path)
        todo = list(comparison.runs(plan, self.seeds, out))
        summaries: dict[Any, list[dict[str, Any]]] = {}
        for number, (arm, seed, config) in enumerate(todo, 1):
            print(f"\nrun {number} of {len(todo)}: {arm.name}, seed {seed}, {arm.steps:,} steps", flush=True)
            summaries.setdefault(arm, []).append(comparison.train_run(config, signals))
        return plan, collect(plan, summaries)

    def _report(self, plan: "Plan", results: "list[ArmResult]", out: Path) -> int:
        from moe_jax.experiments import comparison_result
        from moe_jax.experiments.comparison_plots import comparison_figures
        from moe_jax.plots.figures import save_figures
        from moe_jax.system.files import write_atomically
        from moe_jax.system.folders import Folder
        from moe_jax.system.rich_console import Console

        console = Console()
        console.print(f"\n[bold]{self.preset}, {self.seeds} seeds[/bold]")
        # At 80 columns nine numbers do not stand side by side: each model has its numbers below its name.
        for name, *cells in comparison_result.rows(results):
            console.print(f"\n[bold]{name}[/bold]")
            facts = zip(comparison_result.HEADINGS[1:], cells, strict=True)
            console.print("  " + "; ".join(f"{heading} {cell}" for heading, cell in facts if cell), markup=False)
        console.print()
        differences = comparison_result.differences(results)
        say(*(difference.verdict for difference in differences))
        result = {
            "preset": self.preset,
            "data": plan.base.data.source,
            "flops": plan.flops,
            "seeds": self.seeds,
            "arms": [r.to_json() for r in results],
            "differences": [d.to_json() for d in differences],
        }
        write_atomically(out / "comparison.json", json_text(result, indent=1) + "\n")
        verdicts = "".join(f"- {d.verdict}\n" for d in differences)
        write_atomically(out / "comparison.md", f"{comparison_result.to_markdown(results)}\n{verdicts}")
        try:
            paths = save_figures(comparison_figures(plan, results, out), Folder(out))
        except UserError as error:
            say(f"no pictures: {error}")
        else:
            say(*paths)
        print_json(result, self.json)
        return 0
