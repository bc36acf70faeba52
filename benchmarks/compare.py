"""Train a preset's mixture of experts and its dense baselines, over seeds, and compare them.

    uv run --extra plots python benchmarks/compare.py --preset nano --seeds 3
    uv run --extra plots python benchmarks/compare.py --preset nano --tune
    uv run --extra plots python benchmarks/compare.py --preset nano --scaling

One baseline has the same active parameters, the other the same total. Each trains twice: for the same tokens as the
mixture, and for the same wall-clock time. --tune first finds the learning rate, the depth and the heads of each, on a
part of the training text; --data is then a folder with train.txt and valid.txt. --scaling trains the mixture and the
baseline of the same active parameters for five budgets instead, and fits a power law to each.

Further flags are those of `train.py`: settings of all models, and the text (--data).

To go on with a stopped comparison, call it again with the same arguments: finished runs are not trained again. The last
line of the output is the result as JSON.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_jax.cli import train as train_flags
from moe_jax.cli.main import main
from moe_jax.config import ConfigError, Dense, RunConfig, UserError
from moe_jax.config.presets import PRESETS, preset
from moe_jax.system import environment
from moe_jax.system.files import json_text, parse_json, write_atomically

if TYPE_CHECKING:
    from comparison.report import Report

OF_EACH_RUN = {
    *(("model", "dense"), ("execution", "mesh")),
    *(("train", name) for name in ("steps", "seed", "eval_every", "save_every", "patience")),
}
"""Settings that are chosen for each run."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments. Raises ConfigError where they do not fit each other."""
    about, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--preset", default="nano", choices=list(PRESETS), help="settings of the mixture and of its baselines")
    add("--seeds", type=int, default=3, help="runs of each kind; a later call may ask for more")
    add("--flops", type=float, default=2e13, help="operations of a run of the mixture; of --scaling the largest budget")
    add("--no-total", dest="total", action="store_false", help="leave out the baseline of the same total parameters")
    study = parser.add_mutually_exclusive_group()
    study.add_argument("--tune", action="store_true", help="search the settings of each side first")
    study.add_argument("--scaling", action="store_true", help="five budgets, and a power law fitted to the losses")
    add("--lowest-flops", type=float, default=0.0, help="with --scaling, the smallest budget; default --flops / 10")
    add("--predict-flops", type=float, default=0.0, help="with --scaling, the budget of the prediction; 10 x --flops")
    add("--out", default="", help="folder of the comparison; runs/compare-PRESET-STUDY unless given")
    asked, asked.settings = parser.parse_known_args(argv)
    asked.study = "tuned" if asked.tune else "scaling" if asked.scaling else ""
    asked.lowest_flops = asked.lowest_flops or asked.flops / 10
    asked.predict_flops = asked.predict_flops or 10 * asked.flops
    asked.models = ("none", "active", "total") if asked.total else ("none", "active")
    asked.out = Path(asked.out or f"runs/compare-{asked.preset}{asked.study and '-' + asked.study}")
    if not 1 <= asked.seeds <= 1000:
        raise ConfigError(f"--seeds {asked.seeds}: must be between 1 and 1000")
    if asked.scaling and not 0 < asked.lowest_flops < asked.flops:
        raise ConfigError(f"--lowest-flops {asked.lowest_flops:g}: must be below --flops {asked.flops:g}")
    return asked


def settings_to_compare(name: str, flags: Sequence[str]) -> RunConfig:
    """The settings of a preset with the values of further flags, those of `train.py`.

    Raises ConfigError for a wrong value, and for a setting that is chosen for each run.
    """
    usual, config = preset(name), train_flags.parse(["--preset", name, *flags], "compare.py")[0].config
    for section, field in OF_EACH_RUN:
        if getattr(config.section(section), field) != getattr(usual.section(section), field):
            raise config.section(section).wrong(field, "is chosen for each run; leave it out")
    return config


def check_same_request(request: dict[str, Any], path: Path) -> None:
    """Raise an error if a different comparison was begun in the folder of `path`, its plan.json."""
    if not path.exists():
        return
    try:
        begun = parse_json(path.read_bytes())["asked"]
        begun["config"] = RunConfig.from_dict(begun["config"]).to_dict()
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"{path}: cannot be read; remove it, or name another --out") from None
    changed = [name for name, value in request.items() if begun.get(name) != value]
    if changed:
        raise ConfigError(f"--out {path.parent}: was begun with another {changed[0]}; name another --out")


def request_of(asked: argparse.Namespace, config: RunConfig) -> dict[str, Any]:
    """What must stay the same in later calls. The number of seeds may change."""
    names = ("study", "flops", "lowest_flops", "total")
    return {name: getattr(asked, name) for name in names} | {"config": config.to_dict()}


def train(asked: argparse.Namespace, config: RunConfig) -> "Report":
    """Train what is not trained yet. Raises UserError, and SystemExit at a signal."""
    from comparison.study_runs import train_all, with_prepared_text
    from suites.request import describe_machine

    path, request = asked.out / "plan.json", request_of(asked, config)
    if not path.exists():
        write_atomically(path, json_text({"asked": request, "machine": describe_machine()}, indent=1) + "\n")
    base = with_prepared_text(config)
    if asked.scaling:
        from comparison import scaling

        budgets = scaling.budgets(base, asked.lowest_flops, asked.flops)
        summaries = train_all(scaling.runs(base, budgets, asked.seeds, asked.out))
        return scaling.Scaling.of(base, budgets, summaries, asked.predict_flops).report()
    return compare_baselines(asked, request, base)


def compare_baselines(asked: argparse.Namespace, request: dict[str, Any], base: RunConfig) -> "Report":
    """The mixture beside its dense baselines, tuned with --tune. The plan is made once, and kept."""
    from comparison import baselines, tuning
    from comparison.study_runs import StudyRun, train_all, with_prepared_text

    path, models = asked.out / "plan.json", tuple[Dense, ...](asked.models)
    plan = baselines.Plan.load(path)
    if plan is None:
        found = None
        if asked.tune:
            choosing = with_prepared_text(tuning.text_to_choose_on(base))
            found = tuning.search(choosing, asked.flops, asked.out, models, train_all, baselines.step_ratio)
        print("measuring the step times of the models in turn ...", flush=True)
        plan = baselines.Plan.make(base, asked.flops, found, models)
        plan.save(path, request)
    todo = list(plan.runs(asked.seeds, asked.out))
    summaries: dict[Any, list[dict[str, Any]]] = {}
    trained = train_all([StudyRun(f"{arm.name}, seed {seed}", config) for arm, seed, config in todo])
    for (arm, _, _), summary in zip(todo, trained, strict=True):
        summaries.setdefault(arm, []).append(summary)
    return baselines.report(plan, baselines.collect(plan, summaries), asked.out)


def publish(report: "Report", out: Path) -> None:
    """Print the result, and write its record, its table and its pictures."""
    from moe_jax.plots import save_figures

    print(f"\n{report.to_markdown()}")
    write_atomically(out / f"{report.name}.json", json_text(report.record, indent=1) + "\n")
    write_atomically(out / f"{report.name}.md", report.to_markdown())
    try:
        print(*save_figures(report.figures(), out), sep="\n")
    except UserError as error:
        print(f"no pictures: {error}")
    print(json_text(report.record))


def run(argv: Sequence[str]) -> int:
    asked = parse(argv)
    config = settings_to_compare(asked.preset, asked.settings)
    check_same_request(request_of(asked, config), asked.out / "plan.json")
    environment.prepare_environment()
    from moe_jax.runs.folder import locked_for_training

    with locked_for_training(asked.out):
        report = train(asked, config)
    publish(report, asked.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
