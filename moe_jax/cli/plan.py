"""`moe-jax plan`."""

import dataclasses
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from moe_jax.cli.arguments import Argument, Values, arguments_of, read
from moe_jax.cli.auto_preset import check_limits
from moe_jax.cli.command import Command, Group, check_range, print_json
from moe_jax.cli.settings import (
    PRESET,
    SettingsFile,
    read_set,
    read_settings,
    resolve_settings,
    run_arguments,
    typed_preset,
)
from moe_jax.config import ConfigError, DataConfig, MeshShape, PresetName, RunConfig, UserError
from moe_jax.config.presets import with_vocabulary
from moe_jax.config.section import flag_of
from moe_jax.planning.auto import Limits, choose, origin_flags
from moe_jax.planning.target import CARDS_PER_HOST, DEFAULT_GPU, check_gpu, load_target, target_of_device
from moe_jax.system import environment
from moe_jax.system.environment import MIB
from moe_jax.system.terminal import say, working

if TYPE_CHECKING:
    from moe_jax.planning.search import Plan as Setting
    from moe_jax.planning.target import Target

ON_A_CARD = "uv run --extra cuda12"
"""How a program is started on an NVIDIA card. CUDA 12 knows all cards that JAX knows, CUDA 13 those from compute
capability 7.5."""
TOKENIZER = {("data", "tokenizer"), ("data", "vocab_size")}
"""The settings of data that decide the size of the model."""
BY_OWN_FLAGS = {("execution", "mesh"), ("train", "lora_rank")}
"""`plan` has flags of its own for these."""
ORIGINS = ("preset", "init_from", "upcycle")
"""Fields of a settings file's first lines that `plan` reads. The others, such as `out`, do not change a plan."""
CHOSEN = {("train", "batch_size"), ("train", "grad_accum"), ("train", "optimizer"), ("execution", "remat")}
"""Settings that a plan chooses. Its command names them in any case."""


@dataclass(frozen=True)
class Plan(Command):
    """Find settings that fit: those of a preset for a GPU, or those for a text and the memory of this machine.

    The GPU need not be in this machine. With --mesh, the training step is compiled for several of them, and the memory
    of one is printed. With --data or --memory, the answer is the command line that trains on the text here: the preset,
    the number of steps, and what saves memory if that is needed.

    A plan for GPUs takes the settings of the model and of the training, too, by the flags of `train.py` or from its
    --config FILE.

    The exit status is 0 if a setting fits, and 1 if none fits. The last line of the output is JSON if it is asked for,
    or if the output is a file or a pipe.
    """

    interrupted: ClassVar[str] = "the search stopped early; nothing of it is kept"

    preset: PresetName = "seed-158m"
    """The settings to plan for."""
    gpu: str = ""
    """Name of a described GPU (a wrong name lists all names), or a file that describes one. Default: rtx3050-4gb."""
    mesh: str = ""
    """Plan for several such GPUs, such as data=2,expert=4. Each has the sequences of a step of the preset."""
    lora: int = 0
    """Plan a fine-tuning by adapters of this rank (`sft --lora`), instead of training. 0 trains all weights."""
    init_from: str = ""
    """Folder of a Hugging Face model, as for `train.py`. Its shape takes the place of the preset's."""
    upcycle: str = ""
    """Folder of a dense run or of a dense Hugging Face model, as for `train.py`."""
    data: str = ""
    """Your text, as for `train.py`. Finds the preset and the steps for it, on this machine."""
    memory: str = ""
    """Memory that training on this machine may take, such as 8GB or 900MB. Three quarters of the machine's memory if
    only --data is given."""
    minutes: float = 0.0
    """Chooses the number of steps for about that time of training on your text. The speed is measured, so the number
    may differ from call to call. 0: as long as it takes."""
    json: bool = False
    """Print the result as JSON too."""
    verify: bool = False
    """Plan for the GPU in this machine, train two steps on it, and compare its peak memory with the plan."""
    config: str = ""
    """A TOML file of settings, as for `train.py`. Flags override it. What does not change memory is ignored."""
    set: list[str] = dataclasses.field(default_factory=list)
    """SECTION.NAME=VALUE: any field of the configuration, as for `train.py`."""
    file: SettingsFile = dataclasses.field(default_factory=SettingsFile)
    """The settings of `config` that are planned."""
    flags: Values = dataclasses.field(default_factory=dict)
    """The settings that the user has typed."""

    @classmethod
    def arguments(cls) -> list[Argument]:
        return [*arguments_of(cls), *setting_arguments(RunConfig())]

    @classmethod
    def groups(cls, argv: Sequence[str] = ()) -> list[Group]:
        start = typed_preset(argv, cls.preset)
        about = f"Defaults are those of preset {start.preset}."
        settings = Group("settings of train.py", about, [a for a in setting_arguments(start) if a.is_flag])
        return [Group("arguments", "", list(arguments_of(cls))), settings]

    @classmethod
    def parse(cls, argv: Sequence[str]) -> Self:
        flags = read(cls.arguments(), argv)
        own = {a.name: flags.pop(a.key) for a in arguments_of(cls) if a.key in flags}
        flags |= read_set(own.get("set", []), setting_arguments(RunConfig()))
        path = own.get("config", "")
        values = read_settings(path, run_arguments(RunConfig())).values if path else {}
        origin = {key[1]: value for key, value in values.items() if key[0] == "" and key[1] in ORIGINS}
        keys = {a.key for a in setting_arguments(RunConfig())}
        file = SettingsFile(path, {key: value for key, value in values.items() if key in keys})
        return cls(**origin | own, file=file, flags=flags)

    def execute(self) -> int:
        self._check()
        config = self._settings()
        if self.data or self.memory:
            return self._plan_for_text(config if self.init_from or self.upcycle else None)
        if not self.verify:
            # Compiling for a described card needs no card, and must not occupy a real one.
            os.environ["JAX_PLATFORMS"] = "cpu"
        environment.prepare_environment()
        import jax

        if self.verify and jax.devices()[0].platform != "gpu":
            raise UserError("--verify: no NVIDIA GPU is visible to JAX; leave it out to plan without one")
        target = target_of_device(jax.devices()[0]) if self.verify else load_target(self.gpu or DEFAULT_GPU)
        name = self.init_from or (f"{self.upcycle}, upcycled," if self.upcycle else self.preset)
        say(
            f"{name} on {target.device_kind} (compute capability {target.compute_capability}, "
            f"{target.memory / MIB:,.0f} MiB): a plan may use {target.budget:,.0f} MiB"
        )
        config = with_vocabulary(config)
        return self._plan_mesh(config, target) if self.mesh else self._plan_card(config, target)

    def _check(self) -> None:
        """Raise ConfigError for a value that is not allowed, and for a flag that the plan would not heed."""
        check_range("--lora", self.lora, 0, 4096)
        check_limits(self.memory, self.minutes)
        if self.minutes and not self.data:
            raise ConfigError(f"--minutes {self.minutes:g}: plans for a text; give --data too")
        of_one_card = {"--lora": self.lora, "--verify": self.verify}
        of_cards = {"--gpu": self.gpu, "--mesh": self.mesh} | of_one_card
        if self.data or self.memory:
            _refuse(of_cards, "plans for a GPU; leave --data and --memory out")
            typed = [f"--config {self.config}"] * bool(self.config) + _words(self.flags)
            if typed:
                raise ConfigError(
                    f"{typed[0]}: is for a plan of a GPU; with a text give it to `train.py --preset auto`"
                )
        if self.mesh:
            _refuse(of_one_card, "is for a plan of one GPU; leave it out with --mesh")
            count = MeshShape.parse(self.mesh).devices
            if count > CARDS_PER_HOST and count % CARDS_PER_HOST:
                raise ConfigError(
                    f"--mesh {self.mesh}: has {count} places; give at most {CARDS_PER_HOST}, or a multiple"
                )
        if self.verify:
            _refuse({"--gpu": self.gpu}, "--verify plans for the card in this machine; leave one of them out")
        check_gpu(self.gpu or DEFAULT_GPU)

    def _settings(self) -> RunConfig:
        """The settings of the preset or of the model, as the user changes them."""
        origin: Values = {PRESET: self.preset, ("", "init_from"): self.init_from, ("", "upcycle"): self.upcycle}
        config = resolve_settings(self.file, self.flags | origin).config
        sequences = config.train.batch_size * config.train.grad_accum
        return config.on_mesh(self.mesh, sequences) if self.mesh else config

    def _plan_card(self, config: RunConfig, target: "Target") -> int:
        from moe_jax.planning import search

        say(
            "compiling the training step of each setting, a minute or more each; of one that fits, evaluation, "
            "prefill and decoding too. What an earlier plan has compiled is looked up."
        )
        print("(B/p: bytes for each parameter; micro: sequences of a micro-batch)")
        print(_COLUMNS.format(*_HEADINGS))
        plans = []
        for plan in search.search(search.with_adapters(config, self.lora) if self.lora else config, target):
            plans.append(plan)
            _print_row(plan, target)
        plan = search.verdict(plans, target)
        between = ", ".join(f"{name} {mib:,.0f} MiB" for name, mib in (plan.between or {}).items())
        say(f"\nbetween steps, the optimizer state included: {between}")
        say(f"attention in training: {plan.attention}")
        fits = plan.fits(target)
        command = self._command(plan.config) if fits else None
        _print_command(command)
        result = plan.summary(target) | {"command": command}
        if self.verify:
            peak = search.measured_peak(plan.config)
            result |= {"peak_mib": peak, "peak_over_plan": peak / plan.step.total}
            more = peak / plan.step.total - 1
            say(f"measured peak {peak:,.0f} MiB, {more:+.1%} against the {plan.step.total:,.0f} MiB planned")
        print_json(result, self.json)
        return 0 if fits else 1

    def _plan_mesh(self, config: RunConfig, target: "Target") -> int:
        from moe_jax.planning import search

        with working("compiling the training step for these devices, a minute or more"):
            memory = search.mesh_memory(config, target)
        fits = memory.total <= target.budget and not memory.warned
        say(
            f"mesh {MeshShape.parse(self.mesh)}, {config.train.batch_size} sequences a step; one device: arguments "
            f"{memory.arguments:,.0f} MiB, temporary {memory.temporary:,.0f}, total {memory.total:,.0f}"
        )
        command = self._command(config) if fits else None
        _print_command(command)
        result = {"preset": self.preset, "gpu": target.name, "mesh": self.mesh}
        result |= {"total_mib": round(memory.total, 1), "budget_mib": round(target.budget, 1), "fits": fits}
        result |= {"micro_batch": config.train.batch_size, "command": command}
        print_json(result, self.json)
        return 0 if fits else 1

    def _command(self, config: RunConfig) -> str:
        """The command line that trains with these settings on NVIDIA cards."""
        train = config.train
        last = [
            f"--batch-size {train.batch_size}",
            f"--grad-accum {train.grad_accum}",
            f"--optimizer {train.optimizer}",
        ]
        last += ["--execution.remat"] * config.execution.remat
        dtype = {("train", "param_dtype")} if self.lora else set()
        own = [f"--config {shlex.quote(self.config)}"] * bool(self.config)
        own += _words({key: value for key, value in self.flags.items() if key not in CHOSEN | dtype})
        origin = origin_flags(config)
        if not self.lora:
            mesh = [f"--mesh {self.mesh}"] * bool(self.mesh)
            return " ".join([ON_A_CARD, "train.py", *origin, f"--preset {config.preset}", *own, *mesh, *last])
        last += ["--train.param-dtype bfloat16"] * (train.param_dtype == "bfloat16")
        words = [*(origin or ["--run RUN"]), "--data CHATS.jsonl --out NEW", f"--lora {self.lora}", *own, *last]
        return f"{ON_A_CARD} python -m moe_jax sft {' '.join(words)}"

    def _plan_for_text(self, imported: RunConfig | None) -> int:
        """The command line for a text, the memory of this machine, and a time."""
        from moe_jax.data.corpora import check_source

        source = self.data or "stories"
        check_source(DataConfig(source=source))
        environment.prepare_environment()
        with working("counting the tokens of the text, and compiling training steps to see their memory"):
            limits = Limits.of(self.memory, self.minutes, imported or RunConfig())
            choice = choose(source, limits, imported)
        say(*choice.reasons)
        command = choice.command() if choice.fits else None
        if command:
            say("train with")
            print(command)  # unbroken, to be copied
        else:
            say(f"nothing fits {limits.mib:,.0f} MiB: `train.py --preset auto` takes a smaller --seq-len")
        train = choice.config.train
        result = {"preset": choice.config.preset, "steps": train.steps, "micro_batch": train.batch_size}
        result |= {"grad_accum": train.grad_accum, "remat": choice.config.execution.remat, "fits": choice.fits}
        result |= {"total_mib": round(choice.step_mib, 1), "budget_mib": round(limits.mib, 1)}
        print_json(result | {"command": command, "reasons": choice.reasons}, self.json)
        return 0 if choice.fits else 1


def setting_arguments(start: RunConfig) -> list[Argument]:
    """The settings of a run that `plan` takes, with the defaults of `start`."""
    sections = ("model", "routing", "train", "execution")
    taken = (a for a in run_arguments(start) if a.section in sections or a.key in TOKENIZER)
    return [a for a in taken if a.key not in BY_OWN_FLAGS]


def _refuse(flags: Mapping[str, object], why: str) -> None:
    """Raise ConfigError for the first of the flags that is given."""
    for flag, value in flags.items():
        if value:
            raise ConfigError(f"{flag}{'' if value is True else f' {value}'}: {why}")


def _words(values: Values) -> list[str]:
    """The flags that give these values."""
    words = []
    for key, value in values.items():
        flag = flag_of(*key)
        if flag.startswith("--set "):
            words.append(f"{flag}={shlex.quote(str(value).lower() if isinstance(value, bool) else str(value))}")
        elif isinstance(value, bool):
            words.append(flag if value else f"--no-{flag.removeprefix('--')}")
        else:
            words.append(f"{flag} {shlex.quote(str(value))}")
    return words


def _print_command(command: str | None) -> None:
    if command is None:
        say(
            "no setting fits: try a smaller --seq-len, fewer --experts, a smaller --model.expert-hidden, or another "
            "--gpu"
        )
        return
    say("this setting fits, by XLA's buffer plan; on the card, train with")
    print(command)  # unbroken, to be copied


_COLUMNS = "{:<10} {:>6} {:>6} {:>11} {:>9} {:>6} {:>9} {:>8}  {}"
"""80 columns at most."""
_HEADINGS = ("optimizer", "micro", "accum", "weights B/p", "state B/p", "remat", "precision", "step MiB", "fits")


def _print_row(plan: "Setting", target: "Target") -> None:
    """One line for a setting."""
    train, fits = plan.config.train, plan.fits(target)
    numbers = (train.batch_size, train.grad_accum, f"{plan.weight_bytes:.2f}", f"{plan.state_bytes:.2f}")
    remat = "yes" if plan.config.execution.remat else "no"
    cells = (remat, plan.precision, f"{plan.step.total:,.0f}", "yes" if fits else "no")
    print(_COLUMNS.format(train.optimizer, *numbers, *cells), flush=True)
    if plan.step_fits and not fits and plan.between:
        name = max(plan.between, key=plan.between.__getitem__)
        say(f"its step fits, but between steps {name} takes {plan.between[name]:,.0f} MiB")
