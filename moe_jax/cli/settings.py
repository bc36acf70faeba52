"""The flags of a run's settings. They start from a preset, a run or a model (`training/start.py`), and flags change
them.

A field of the configuration is the flag `--section.field`, or the short flag that is marked on the field. The start
decides the defaults, so the flags that name it are looked up first; then tyro parses all of them.
"""

import dataclasses
import itertools
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from moe_jax.cli.options import check_memory, check_out_folder
from moe_jax.config import ConfigError, DataConfig, MeshShape, ProcessGroup, RunConfig
from moe_jax.config.presets import PRESETS
from moe_jax.config.section import Section, long_flag, short_flags
from moe_jax.data.corpora import check_source
from moe_jax.runs.catalog import holds_run
from moe_jax.system import environment
from moe_jax.system.terminal import say, working
from moe_jax.training.start import Start, Values, start_of

LORA = ("train", "lora_rank")
NAMING = {
    ("", "preset"): ["--preset"],
    ("", "out"): ["--out"],
    ("", "upcycle"): ["--upcycle"],
    ("", "init_from"): ["--init-from"],
    ("", "base"): ["--run"],
    ("data", "source"): ["--data", "--data.source"],
    ("model", "dense"): ["--model.dense"],
    LORA: ["--lora", "--train.lora-rank"],
}
"""The settings that say what a run starts from and name its folder, and their flags. Adapters start at a learning rate
of their own."""


@dataclass(frozen=True)
class TrainingArguments:
    """The arguments of a command that trains."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
    group: Annotated[ProcessGroup, tyro.conf.arg(name="")] = field(default_factory=ProcessGroup)
    dry_run: bool = False
    """Print the settings, the parameters, the memory and the expected time. Write nothing, download nothing."""


def parse_settings(
    argv: Sequence[str],
    prog: str,
    doc: str | None,
    given: Values,
    hidden: Collection[str] = (),
) -> tuple[TrainingArguments, Start]:
    """The arguments with the values from argv, and what the run starts from.

    `given` are settings that the command gives. Fields whose names are `hidden` are no flags. `--help` shows the
    settings with a short flag, `--help-verbose` all of them.

    Raises ConfigError if the settings do not fit each other, the data or the start.
    """
    naming = given | _naming(argv)
    start = start_of(naming)
    default = TrainingArguments(config=start.defaults.override(given))
    parsed = tyro.cli(
        TrainingArguments,
        prog=prog,
        description=doc,
        args=argv,
        default=default,
        registry=_registry(hidden, short_only=bool({"-h", "--help"} & {*argv})),
        compact_help=True,
    )
    config = parsed.config
    if start.defaults.model.vocab_size and not config.model.vocab_size:  # 0 stands for the tokenizer's size
        config = config.override({("model", "vocab_size"): start.defaults.model.vocab_size})
    check_tuning(config, start)
    check_source(config.data)
    start.check(config)
    return dataclasses.replace(parsed, config=config), start


def _naming(argv: Sequence[str]) -> Values:
    """The values of the flags that name the start. What is wrong with them, tyro says later."""
    found: Values = {("", "resume"): "--resume" in argv}
    for word, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        flag, equals, value = word.partition("=")
        for key, flags in NAMING.items():
            if flag.replace("_", "-") in flags:
                found[key] = value if equals else following
    if found.get(("", "preset"), "nano") not in PRESETS:
        del found["", "preset"]
    if rank := found.pop(LORA, ""):
        found[LORA] = int(rank) if rank.isdecimal() else 0
    return found


def _registry(hidden: Collection[str], short_only: bool) -> ConstructorRegistry:
    """What tyro shall know of a `Section`: the short flags of its fields, and that `routing` stands for itself. The
    `hidden` fields are no flags, and with `short_only` neither are those without a short one."""
    registry, entered = ConstructorRegistry(), set[type]()

    @registry.struct_rule
    def with_flags(info: StructTypeInfo) -> StructConstructorSpec | None:
        section = info.default
        if not isinstance(section, Section) or type(section) in entered:
            return None
        entered.add(type(section))  # so that the next line asks tyro's own rule
        spec = ConstructorRegistry.get_struct_spec(info)
        entered.remove(type(section))
        assert isinstance(spec, StructConstructorSpec)
        return dataclasses.replace(spec, fields=tuple(flagged(section, f) for f in spec.fields))

    def flagged(section: Section, spec: StructFieldSpec) -> StructFieldSpec:
        short, long = short_flags(type(section))[spec.name], long_flag(section, spec.name)
        if isinstance(spec.default, Section):
            kind = Annotated[spec.type, tyro.conf.arg(name=spec.name, prefix_name=False)]
        elif spec.name in hidden or (short_only and not short):
            kind = tyro.conf.Suppress[spec.type]
        else:
            aliases = [] if short_only or short in ("", long) else [long]
            name = (short or long).removeprefix("--")
            kind = Annotated[spec.type, tyro.conf.arg(name=name, prefix_name=False, aliases=aliases)]
        return dataclasses.replace(spec, type=kind)

    return registry


def check_tuning(config: RunConfig, start: Start) -> None:
    """Raise ConfigError if settings for fine-tuning do not fit each other, or do not say what is tuned and on what."""
    train = config.train
    if config.data.format == "chat" and start.saved is None:
        if not (config.base or config.init_from):
            wanted = "the folder of the run to fine-tune, or --init-from with a Hugging Face folder"
            raise ConfigError(f"--run: must be given, {wanted}")
        if config.data.source == DataConfig.source:
            raise ConfigError("--data: must be given, a file of conversations (.jsonl)")
    if config.base and config.init_from:
        raise ConfigError(f"--init-from {config.init_from}: not with sft --run; do one after the other")
    if train.train_router and config.model.routing.balancing == "bias":
        why = "not with --routing.balancing bias, whose biases belong to the routers as they are; leave it out"
        raise ConfigError(f"--train-router: {why}")
    if train.lora_rank and train.optimizer == "muon":
        raise ConfigError("--optimizer muon: is for whole matrices; with --lora leave it out, or take adamw")
    if train.train_router and config.model.dense != "none":
        raise ConfigError("--train-router: this model is dense and has no router; leave it out")


def train_as_asked(arguments: TrainingArguments, start: Start, program: str) -> int:
    """Train, or print what that would cost. Returns the exit status. `program` is the command without its arguments."""
    config, group = arguments.config, arguments.group
    run = Path(config.run_dir)
    check_out_folder("--out", run)
    if holds_run(run) and not config.resume and not arguments.dry_run:
        raise ConfigError(f"--out {run}: already holds a run; add --resume to go on with it, or name another folder")
    if group.several and MeshShape.parse(config.execution.mesh).devices == 1:
        raise ConfigError("--num-processes: needs --mesh, whose product is the number of all devices of all processes")
    check_memory(config)
    say(*environment.prepare_environment(config.execution.deterministic))
    if config.resume and start.saved is None:
        say(f"--resume: {run} holds no checkpoint; a new run starts there")
    # jax is imported only now, because the arguments are accepted and the environment is set.
    with working("starting JAX"):
        from moe_jax.inspection.report import report_run
        from moe_jax.training.header import print_dry_run
        from moe_jax.training.run import train

    if arguments.dry_run:
        print_dry_run(config)
        return 0
    resume = f"`uv run {program} --out {shlex.quote(str(run))} --resume`"
    return train(config, start, report_run, group, resume)
