"""`moe-jax plan`."""

import itertools
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from moe_jax.cli.arguments import Argument, Values
from moe_jax.cli.auto_preset import AutoPreset
from moe_jax.cli.command import check_range, print_json
from moe_jax.cli.settings import PRESET, SOURCE, RunCommand, Settings, SettingsFile, resolve_settings
from moe_jax.config import ConfigError, MeshShape, PresetName, RunConfig, UserError, holds_run
from moe_jax.config.presets import folder_for_text, preset, with_vocabulary
from moe_jax.config.section import flag_of, word
from moe_jax.planning.auto import ACCUMULATION, BATCH, REMAT, STEPS
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
BY_OWN_FLAGS = {("execution", "mesh"), ("train", "lora_rank")}
"""`plan` has flags of its own for these."""
ORIGINS = (("", "init_from"), ("", "upcycle"))
OPTIMIZER, PARAM_DTYPE = ("train", "optimizer"), ("train", "param_dtype")


@dataclass(frozen=True)
class Plan(RunCommand):
    """Find settings that fit: those of a preset for a GPU, or those for a text and the memory of this machine.

    The GPU need not be in this machine. With --mesh, the training step is compiled for several of them, and the memory
    of one is printed. With --data or --memory, the answer is the command line that trains on the text here: the preset,
    the number of steps, and what saves memory if that is needed.

    Settings of the model and of the training are those of `train.py`, by its flags or from a --config FILE.

    The exit status is 0 if a setting fits, and 1 if none fits. The last line of the output is JSON if it is asked for,
    or if the output is a file or a pipe.
    """

    interrupted: ClassVar[str] = "the search stopped early; nothing of it is kept"
    usual: ClassVar[tuple[str, ...]] = ("gpu", "mesh", "lora", "memory", "minutes", "json", "verify")
    preset: ClassVar[PresetName] = "seed-158m"

    gpu: str = ""
    """Name of a described GPU (a wrong name lists all names), or a file that describes one. Default: rtx3050-4gb."""
    mesh: str = ""
    """Plan for several such GPUs, such as data=2,expert=4. Each has the sequences of a step of the preset."""
    lora: int = 0
    """Plan a fine-tuning by adapters of this rank (`sft --lora`), instead of training. 0 trains all weights."""
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
    typed: AutoPreset = field(default_factory=lambda: AutoPreset(SettingsFile(), {}, "", 0.0))
    """What the user has typed."""

    @classmethod
    def settable(cls, start: RunConfig) -> list[Argument]:
        keys = {PRESET, *ORIGINS}
        return [a for a in super().settable(start) if (a.section or a.key in keys) and a.key not in BY_OWN_FLAGS]

    @classmethod
    def resolve(cls, own: dict[str, Any], file: SettingsFile, flags: Values) -> Settings:
        for_text = SOURCE in flags or bool(own.get("memory"))
        if not for_text:  # a file may name a text, which changes no memory
            file = file.only(file.values.keys() - {SOURCE})
        model, dense = ((file.values | flags).get(key) for key in ORIGINS)
        of_run = dense and holds_run(Path(dense))  # whose preset stays
        if PRESET not in file.values | flags and not of_run and (not for_text or model or dense):
            flags = flags | {PRESET: cls.preset}
        own["typed"] = typed = AutoPreset.of(file, flags, own.get("memory", ""), own.get("minutes", 0.0))
        return typed.stand_in() if for_text else resolve_settings(file, flags)

    def execute(self) -> int:
        self._check()
        if self._for_text:
            return self._plan_for_text()
        config = self.settings.config
        if self.mesh:
            config = config.on_mesh(self.mesh, config.train.batch_size * config.train.grad_accum)
        if not self.verify:
            # Compiling for a described card needs no card, and must not occupy a real one.
            os.environ["JAX_PLATFORMS"] = "cpu"
        environment.prepare_environment()
        import jax

        if self.verify and jax.devices()[0].platform != "gpu":
            raise UserError("--verify: no NVIDIA GPU is visible to JAX; leave it out to plan without one")
        target = target_of_device(jax.devices()[0]) if self.verify else load_target(self.gpu or DEFAULT_GPU)
        name = config.init_from or (f"{config.upcycle}, upcycled," if config.upcycle else config.preset)
        say(
            f"{name} on {target.device_kind} (compute capability {target.compute_capability}, "
            f"{target.memory / MIB:,.0f} MiB): a plan may use {target.budget:,.0f} MiB"
        )
        config = with_vocabulary(config)
        return self._plan_mesh(config, target) if self.mesh else self._plan_card(config, target)

    @property
    def _for_text(self) -> bool:
        return SOURCE in self.typed.flags or bool(self.memory)

    def _check(self) -> None:
        """Raise ConfigError for a value that is not allowed, and for a flag that the plan would not heed."""
        check_range("--lora", self.lora, 0, 4096)
        if self.minutes and SOURCE not in self.typed.flags:
            raise ConfigError(f"--minutes {self.minutes:g}: plans for a text; give --data too")
        of_one_card = {"--lora": self.lora, "--verify": self.verify}
        if self._for_text:
            flags = {"--gpu": self.gpu, "--mesh": self.mesh} | of_one_card
            _refuse(flags, "plans for a GPU; leave --data and --memory out")
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
        result = plan.summary(target)
        command = self._print_command(plan.config, plan.fits(target))
        if self.verify:
            peak = search.measured_peak(plan.config)
            result |= {"peak_mib": peak, "peak_over_plan": peak / plan.step.total}
            more = peak / plan.step.total - 1
            say(f"measured peak {peak:,.0f} MiB, {more:+.1%} against the {plan.step.total:,.0f} MiB planned")
        return self._result(result, command)

    def _plan_mesh(self, config: RunConfig, target: "Target") -> int:
        from moe_jax.planning import search

        with working("compiling the training step for these devices, a minute or more"):
            memory = search.mesh_memory(config, target)
        fits = memory.total <= target.budget and not memory.warned
        say(
            f"mesh {MeshShape.parse(self.mesh)}, {config.train.batch_size} sequences a step; one device: arguments "
            f"{memory.arguments:,.0f} MiB, temporary {memory.temporary:,.0f}, total {memory.total:,.0f}"
        )
        command = self._print_command(config, fits)
        result = {"preset": config.preset, "gpu": target.name, "mesh": self.mesh}
        result |= {"total_mib": round(memory.total, 1), "budget_mib": round(target.budget, 1), "fits": fits}
        return self._result(result | {"micro_batch": config.train.batch_size}, command)

    def _plan_for_text(self) -> int:
        """The command line for a text, the memory of this machine, and a time."""
        environment.prepare_environment()
        (config, _), choice, limits = self.typed.choose()
        say(*choice.reasons)
        command = None
        if choice.fits:
            start, typed = preset(config.preset), self.typed.flags
            values: Values = {(s, name): value for s, name, value in config.settings()}
            changed = [k for k in (STEPS, BATCH, ACCUMULATION) if values[k] != start.train.__dict__[k[1]] or k in typed]
            words = [
                f"--data {shlex.quote(config.data.source)}",
                f"--out {shlex.quote(free_folder(config.data.source))}",
            ]
            words += [f"{flag_of(*key)} {values[key]}" for key in changed]
            words += ["--execution.remat"] * (config.execution.remat and not start.execution.remat)
            command = " ".join(["uv run train.py", *self._begin(config), *words, *self._rest({STEPS, REMAT, SOURCE})])
            say("train with")
            print(command)  # unbroken, to be copied
        else:
            say(f"nothing fits {limits.mib:,.0f} MiB: try a smaller --seq-len")
        result = {"preset": config.preset, "steps": config.train.steps, "micro_batch": config.train.batch_size}
        result |= {"grad_accum": config.train.grad_accum, "remat": config.execution.remat, "fits": choice.fits}
        result |= {"total_mib": round(choice.step_mib, 1), "budget_mib": round(limits.mib, 1)}
        return self._result(result, command, reasons=choice.reasons)

    def _print_command(self, config: RunConfig, fits: bool) -> str | None:
        """Print the command line that trains with these settings on NVIDIA cards, and return it. None if none fits."""
        if not fits:
            say(
                "no setting fits: try a smaller --seq-len, fewer --experts, a smaller --model.expert-hidden, or "
                "another --gpu"
            )
            return None
        train = config.train
        last = [f"--batch-size {train.batch_size} --grad-accum {train.grad_accum} --optimizer {train.optimizer}"]
        last += ["--execution.remat"] * config.execution.remat
        mesh = [f"--mesh {self.mesh}"] * bool(self.mesh)
        words = ["train.py", *self._begin(config), *self._rest({OPTIMIZER, REMAT}), *mesh, *last]
        if self.lora:
            last += ["--train.param-dtype bfloat16"] * (train.param_dtype == "bfloat16")
            origin = _origin(config) or ["--run RUN"]
            words = ["python -m moe_jax sft", *origin, f"--data CHATS.jsonl --out NEW --lora {self.lora}"]
            words += [*self._rest({OPTIMIZER, REMAT, PARAM_DTYPE}), *last]
        say("this setting fits, by XLA's buffer plan; on the card, train with")
        command = " ".join([ON_A_CARD, *words])
        print(command)  # unbroken, to be copied
        return command

    def _begin(self, config: RunConfig) -> list[str]:
        return [*_origin(config), f"--preset {config.preset}"]

    def _rest(self, named: set[tuple[str, str]]) -> list[str]:
        """The user's settings that the command does not name in another way."""
        path, values = self.typed.file.path, self.typed.flags
        named = named | {PRESET, BATCH, ACCUMULATION, *ORIGINS}
        words = [shlex.quote(word(*key, value)) for key, value in values.items() if key not in named]
        return [f"--config {shlex.quote(path)}"] * bool(path) + words

    def _result(self, result: dict[str, Any], command: str | None, **more: Any) -> int:
        """Print the result as JSON. Returns the exit status."""
        print_json(result | {"command": command} | more, self.json)
        return 0 if result["fits"] else 1


def free_folder(source: str) -> str:
    """The folder of a new run on a text: named after the text, with a number if that folder holds a run."""
    name = folder_for_text(source)
    folders = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(folder for folder in folders if not holds_run(Path(folder)))


def _origin(config: RunConfig) -> list[str]:
    """The flags that say which model a run starts from."""
    return [f"{flag_of(*key)} {shlex.quote(getattr(config, key[1]))}" for key in ORIGINS if getattr(config, key[1])]


def _refuse(flags: Mapping[str, object], why: str) -> None:
    """Raise ConfigError for the first of the flags that is given."""
    for flag, value in flags.items():
        if value:
            raise ConfigError(f"{flag}{'' if value is True else f' {value}'}: {why}")


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
