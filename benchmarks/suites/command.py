"""`benchmark.py`: which suites to run, and where to write their numbers."""

import argparse
import datetime
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moe_jax.cli.options import note_device
from moe_jax.config import ConfigError, UserError
from moe_jax.config.presets import PRESETS, preset, with_vocabulary
from moe_jax.system import environment, terminal
from moe_jax.system.files import json_text, write_output

SUITES = {
    "moe": ("layer", "moe"),
    "train": ("dense_baselines", "train"),
    "decode": ("decoding", "decode"),
    "peers": ("peers", "against_mixtral"),
    "serve": ("serving", "serve"),
}
"""Name -> (module, function). A suite measures, prints tables, and returns its numbers."""
ALL = ("moe", "train", "decode", "peers")
"""The suites that run where none is named."""
PEERS = "uv run --extra peers benchmark.py peers"


def parse(argv: Sequence[str], about: str) -> argparse.Namespace:
    """The arguments of `benchmark.py`. `about` is its help. Raises ConfigError for a number out of range."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("suite", nargs="?", default="all", choices=[*SUITES, "all"], help="the suite to run")
    parser.add_argument("--preset", default="seed-158m", choices=list(PRESETS), help="the model to measure")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of one training step")
    parser.add_argument("--rounds", type=int, default=9, help="how often each candidate runs; some suites run it more")
    asked = parser.parse_args(argv)
    for flag, value, most in (("--batch-size", asked.batch_size, 4096), ("--rounds", asked.rounds, 10_000)):
        if not 1 <= value <= most:
            raise ConfigError(f"{flag} {value}: must be between 1 and {most:,}")
    return asked


def suite(name: str) -> Callable[..., dict[str, Any]]:
    """The function of a suite, imported when it is needed: most of them import jax."""
    module, function = SUITES[name]
    return getattr(importlib.import_module(f"{__package__}.{module}"), function)


def run(argv: Sequence[str], about: str = "") -> int:
    """Run the suites of a command line, write their record, and print the numbers as one line of JSON."""
    asked = parse(argv, about)
    names = suites_of(asked.suite)
    note_device(environment.prepare_environment())
    from moe_jax.model.precision import choose_policy
    from moe_jax.training.header import model_line

    from .request import BenchmarkRequest, describe_machine

    console = terminal.rich_console()
    config = with_vocabulary(preset(asked.preset))
    if config.train.optimizer == "adamw-8bit":  # a step is measured with the AdamW that other libraries have
        config = config.override({("train", "optimizer"): "adamw"})
    about_machine = describe_machine()
    device = about_machine["device"].removeprefix("cpu: ")
    where = f"{about_machine['processor']}, {about_machine['cores']} cores, {device}"
    console.print(f"[bold]{asked.preset}[/bold] on {where}\n{model_line(config.model)}\n")
    request = BenchmarkRequest(config, asked.batch_size, asked.rounds)
    results = {name: suite(name)(console, request) for name in names}
    document: dict[str, Any] = {"preset": asked.preset, "batch_size": asked.batch_size}
    if "train" in names:  # the other suites compute in float32; `peers` names the precision of each number
        document["training_precision"] = choose_policy(config.execution.compute_dtype).compute
    document |= results
    save(asked, document, about_machine)
    print(json_text(document if asked.suite == "all" else results[asked.suite]))
    return 0


def suites_of(name: str) -> list[str]:
    """The suites to run. Raises UserError if `peers` is asked for by name, and its extra is missing."""
    has_peers = all(importlib.util.find_spec(module) for module in ("torch", "transformers"))
    if name == "peers" and not has_peers:
        raise UserError(f"peers needs PyTorch and transformers: {PEERS}")
    if name != "all":
        return [name]
    if not has_peers:
        print(f"left out: peers; run it with `{PEERS}`")
    return [each for each in ALL if has_peers or each != "peers"]


def save(asked: argparse.Namespace, document: dict[str, Any], about_machine: dict[str, Any]) -> None:
    """Write the numbers into `runs/bench`, with their command, the machine, versions and commit."""
    now = datetime.datetime.now(datetime.UTC)
    path = Path("runs") / "bench" / f"{now:%Y-%m-%d-%H%M}-{asked.suite}-{asked.preset}.json"
    command = PEERS if asked.suite == "peers" else f"uv run benchmark.py {asked.suite}"
    command += f" --preset {asked.preset} --batch-size {asked.batch_size} --rounds {asked.rounds}"
    record = {"date": now.isoformat(timespec="seconds"), "command": command, "machine": about_machine, **document}
    write_output(path, json_text(record, indent=1) + "\n")
    print(f"results: {path}")
