"""`moe-jax compare`."""

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from moe_jax.cli.command import Command, check_range
from moe_jax.cli.compare_settings import settings_to_compare
from moe_jax.cli.memory import check_memory
from moe_jax.cli.outputs import check_out_folder
from moe_jax.cli.result import print_json
from moe_jax.config import ConfigError, Dense, PresetName, RunConfig, UserError
from moe_jax.config.presets import with_vocabulary
from moe_jax.system import environment, streams
from moe_jax.system.json_text import json_text
from moe_jax.system.signals import Signals, Stopped
from moe_jax.system.terminal_text import say

if TYPE_CHECKING:
    from moe_jax.experiments.report import Report

LEAST_STEPS = 5
"""Fewest steps of the mixture at the smallest budget of --scaling."""


@dataclass(frozen=True)
class Compare(Command):
    """Train a preset's mixture of experts and its dense baselines, over seeds.

    One baseline has the same active parameters, the other the same total. Each trains twice: for the same tokens as the
    mixture, and for the same wall-clock time. --tune first finds the learning rate and the depth of each model.

    --scaling trains the mixture and the baseline of the same active parameters for five budgets instead, and fits a
    power law to each. --experts trains mixtures of several numbers of experts beside that baseline.

    To go on with a stopped comparison, call it again with the same arguments: finished runs are not trained again. The
    last line of the output is JSON if it is asked for, or if the output is a file or a pipe.
    """

    interrupted: ClassVar[str] = "the same command goes on with the comparison"

    preset: PresetName = "nano"
    """The settings of the mixture and of its baselines."""
    config: str = ""
    """A TOML file of settings, as for `train.py`, which take the place of the preset's."""
    data: str = ""
    """The text, as for `train.py`. Empty: the preset's own."""
    seeds: int = 3
    """Runs of each kind. A later call may ask for more."""
    flops: float = 2e13
    """Training operations of one run of the mixture, which give its number of steps. With --scaling, the largest
    budget."""
    total: bool = True
    """Compare with the dense baseline of the same total parameters too. It takes almost half of the time."""
    tune: bool = False
    """Search the best learning rate and depth of each model first, with five or more short runs for each."""
    scaling: bool = False
    """Measure loss against training operations: five budgets, each the same factor above the one before."""
    lowest_flops: float = 0.0
    """With --scaling, the smallest budget. 0 is a tenth of --flops."""
    predict_flops: float = 0.0
    """With --scaling, the budget for which the losses are predicted. 0 is ten times --flops."""
    experts: str = ""
    """Numbers of experts to compare, such as 4,8,16,32,64."""
    out: str = ""
    """Folder of the comparison. Empty: runs/compare-PRESET, and -tuned, -scaling or -experts behind it."""
    json: bool = False
    """Print the result as JSON too."""

    def execute(self) -> int:
        out = Path(self.out or f"runs/compare-{self.preset}{self._study and '-' + self._study}")
        asked = self._check(out)
        streams.outlive_output()
        with Signals() as signals:
            environment.prepare_environment()
            from moe_jax.runs.folder import locked_for_training

            try:
                with locked_for_training(out):
                    report = self._train(asked, out, signals)
            except Stopped as stop:
                return stop.status
        return self._publish(report, out)

    @property
    def _study(self) -> str:
        """What is compared. Empty: the mixture and its dense baselines, as the preset has them."""
        return "tuned" if self.tune else "scaling" if self.scaling else "experts" if self.experts else ""

    @property
    def _models(self) -> tuple[Dense, ...]:
        """The mixture, and the dense baselines that it is compared with."""
        return ("none", "active", "total") if self.total else ("none", "active")

    def _check(self, out: Path) -> RunConfig:
        """The preset with the settings of `--config` and the text of `--data`. Raises ConfigError, and UserError if
        memory is missing."""
        check_range("--seeds", self.seeds, 1, 1000)
        check_range("--flops", self.flops, 1, 1e30)
        self._check_one_study()
        config = settings_to_compare(self.preset, self.config, self.data)
        largest = max(self._check_counts(config), default=config.model.experts)
        self._check_budgets(config)
        check_out_folder("--out", out)
        self._check_same(config, out)
        check_memory(dataclasses.replace(config, model=dataclasses.replace(config.model, experts=largest)))
        return config

    def _check_one_study(self) -> None:
        """Raise ConfigError if flags of two experiments are given."""
        given = [flag for flag, on in (("--tune", self.tune), ("--scaling", self.scaling)) if on]
        given += [f"--experts {self.experts}"] * bool(self.experts)
        if len(given) > 1:
            raise ConfigError(f"{given[1]}: cannot be given with {given[0]}; run one after the other")
        if not self.total and (self.scaling or self.experts):
            raise ConfigError("--no-total: --scaling and --experts have no such baseline; leave it out")
        for name in ("lowest_flops", "predict_flops"):
            flag, value = f"--{name.replace('_', '-')}", getattr(self, name)
            if value and not self.scaling:
                raise ConfigError(f"{flag} {value:g}: is for --scaling only; add that, or leave it out")
            check_range(flag, value, 0, 1e30)

    def _check_counts(self, config: RunConfig) -> tuple[int, ...]:
        """The numbers of experts to compare. Empty if none are given. Raises ConfigError."""
        least, most = config.model.routing.top_k, 4096
        try:
            counts = tuple(int(part) for part in self.experts.split(",")) if self.experts else ()
        except ValueError:
            raise ConfigError(f"--experts {self.experts}: must be whole numbers, such as 4,8,16") from None
        if len(set(counts)) < len(counts):
            raise ConfigError(f"--experts {self.experts}: names a number twice; name each once")
        if any(not least <= count <= most for count in counts):
            raise ConfigError(
                f"--experts {self.experts}: each number must be between {least} (a token's experts) and {most}"
            )
        return counts

    def _check_budgets(self, config: RunConfig) -> None:
        """Raise ConfigError if the budgets of --scaling are no ladder, or if the lowest has too few steps."""
        if not self.scaling:
            return
        from moe_jax.model.costs import training_flops

        lowest, _ = self._bounds
        if lowest >= self.flops:
            raise ConfigError(f"--lowest-flops {lowest:g}: must be below --flops {self.flops:g}")
        least = LEAST_STEPS * training_flops(with_vocabulary(config), 1)
        if lowest < least:
            given = f"--lowest-flops {lowest:g}" if self.lowest_flops else f"--flops {self.flops:g}"
            why = f"the smallest budget has fewer than {LEAST_STEPS} steps"
            enough = _rounded_up(least * (1 if self.lowest_flops else 10))
            raise ConfigError(f"{given}: {why}; give {enough:.2g} or more")

    @property
    def _bounds(self) -> tuple[float, float]:
        """The smallest budget of --scaling, and the budget for which it predicts."""
        return self.lowest_flops or self.flops / 10, self.predict_flops or 10 * self.flops

    def _asked(self, config: RunConfig) -> dict[str, Any]:
        return {
            "study": self._study,
            "data": config.data.source,
            "flops": self.flops,
            "lowest_flops": self.lowest_flops,
            "total": self.total,
            "config": config.to_dict(),
        }

    def _check_same(self, config: RunConfig, out: Path) -> None:
        """Raise an error if a different comparison was begun in the folder."""
        path = out / "plan.json"
        if not path.exists():
            return
        try:
            there = {"study": "", "lowest_flops": 0.0, "total": True}
            there |= json.loads(path.read_text(encoding="utf-8"))["asked"]
            begun = self._asked(RunConfig.from_dict(there["config"]))
            begun |= {name: there[name] for name in ("study", "flops", "lowest_flops", "total")}
            changed = [name for name, here in self._asked(config).items() if begun[name] != here]
        except (OSError, ValueError, LookupError, TypeError):
            raise UserError(f"{path}: cannot be read; remove it, or name another --out") from None
        if changed:
            flags = {
                "study": f"--out {out}",
                "data": f"--data {config.data.source}",
                "flops": f"--flops {self.flops:g}",
                "lowest_flops": f"--lowest-flops {self.lowest_flops:g}",
                "total": "--total" if self.total else "--no-total",
                "config": f"--config {self.config}" if self.config else f"--preset {self.preset}",
            }
            asked = flags[changed[0]]
            raise ConfigError(f"{asked}: the comparison in {out} was begun with other settings; name another --out")

    def _train(self, asked: RunConfig, out: Path, signals: Signals) -> "Report":
        """Train what is not trained yet. Raises Stopped, UserError."""
        from moe_jax.experiments.study_runs import with_prepared_text
        from moe_jax.system import machine
        from moe_jax.system.files import write_atomically

        path = out / "plan.json"
        if not path.exists():
            request = {"asked": self._asked(asked), "machine": machine.describe()}
            write_atomically(path, json_text(request, indent=1) + "\n")
        base = with_prepared_text(asked)
        if self.scaling:
            return self._scaling(base, out, signals)
        if self.experts:
            return self._expert_counts(base, out, signals)
        return self._baselines(asked, base, out, signals)

    def _baselines(self, asked: RunConfig, base: RunConfig, out: Path, signals: Signals) -> "Report":
        """The mixture beside its dense baselines, tuned with --tune."""
        from moe_jax.experiments import comparison, comparison_result, study_runs, tuning
        from moe_jax.experiments.comparison_plots import comparison_figures

        path = out / "plan.json"
        plan = comparison.Plan.load(path)
        if plan is None:
            found = None
            if self.tune:
                train = partial(study_runs.train_all, signals=signals)
                found = tuning.search(base, self.flops, out, self._models, train)
                print()
                say(*found.sentences())
            print("measuring the step times of the models in turn ...", flush=True)
            plan = comparison.Plan.make(base, self.flops, found, self._models)
            plan.save(path, self._asked(asked))
        todo = list(comparison.runs(plan, self.seeds, out))
        runs = [study_runs.StudyRun(f"{arm.name}, seed {seed}", config) for arm, seed, config in todo]
        summaries: dict[Any, list[dict[str, Any]]] = {}
        for (arm, _, _), summary in zip(todo, study_runs.train_all(runs, signals), strict=True):
            summaries.setdefault(arm, []).append(summary)
        results = comparison_result.collect(plan, summaries)
        return comparison_result.report(plan, results, lambda: comparison_figures(plan, results, out))

    def _scaling(self, base: RunConfig, out: Path, signals: Signals) -> "Report":
        from moe_jax.experiments import ladder, scaling, study_runs
        from moe_jax.experiments.sweep_plots import scaling_figure

        lowest, predicted = self._bounds
        budgets = ladder.budgets(base, lowest, self.flops)
        summaries = study_runs.train_all(ladder.runs(base, budgets, self.seeds, out), signals)
        found = scaling.Scaling.of(base, budgets, summaries, predicted)
        return found.report(lambda: {"scaling": scaling_figure(found)})

    def _expert_counts(self, base: RunConfig, out: Path, signals: Signals) -> "Report":
        from moe_jax.experiments import expert_counts, study_runs
        from moe_jax.experiments.sweep_plots import experts_figure

        models = expert_counts.Models.of(base, self._check_counts(base), self.flops)
        summaries = study_runs.train_all(models.runs(self.seeds, out), signals)
        found = expert_counts.ExpertCounts.of(models, summaries)
        return found.report(lambda: {"experts": experts_figure(found)})

    def _publish(self, report: "Report", out: Path) -> int:
        """Print the result, and write its record, its table and its pictures."""
        from moe_jax.plots.figures import save_figures
        from moe_jax.system.files import write_atomically
        from moe_jax.system.folders import Folder
        from moe_jax.system.rich_console import Console

        console = Console()
        recipe = f"{self.preset} with {self.config}" if self.config else self.preset
        console.print(f"\n{recipe}, {self.seeds} seed{'s' * (self.seeds > 1)}", style="bold", markup=False)
        # At 80 columns nine numbers do not stand side by side: each model has its numbers below its name.
        for name, *cells in report.rows:
            console.print(f"\n[bold]{name}[/bold]")
            facts = zip(report.columns[1:], cells, strict=True)
            console.print("  " + "; ".join(f"{heading} {cell}" for heading, cell in facts if cell), markup=False)
        console.print()
        say(*report.sentences)
        write_atomically(out / f"{report.name}.json", json_text(report.record, indent=1) + "\n")
        write_atomically(out / f"{report.name}.md", report.to_markdown())
        try:
            paths = save_figures(report.figures(), Folder(out))
        except UserError as error:
            say(f"no pictures: {error}")
        else:
            say(*paths)
        print_json(report.record, self.json)
        return 0


def _rounded_up(number: float) -> float:
    """The next number with two digits."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return math.ceil(number / unit) * unit
