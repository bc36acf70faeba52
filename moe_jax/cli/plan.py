"""`moe-jax plan`."""

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from moe_jax.cli.arguments import Argument, Values
from moe_jax.cli.command import check_range, print_json
from moe_jax.cli.settings import COMMON, PRESET, SOURCE, RunCommand, Settings, resolve_settings
from moe_jax.config import ConfigError, MeshShape, PresetName, RunConfig, holds_run
from moe_jax.config.presets import with_vocabulary
from moe_jax.config.section import word
from moe_jax.planning import plans
from moe_jax.planning.target import CARDS_PER_HOST, DEFAULT_GPU, load_target
from moe_jax.system import environment
from moe_jax.system.environment import MIB
from moe_jax.system.terminal import say, working

if TYPE_CHECKING:
    from moe_jax.planning.target import Target

ON_A_CARD = "uv run --extra cuda12"
"""How a program is started on an NVIDIA card. CUDA 12 knows all cards that JAX knows, CUDA 13 those from compute
capability 7.5."""
COMPILING = (
    "compiling the training step of each setting, a minute or more each; of one that fits, evaluation and decoding "
    "too. What an earlier plan has compiled is looked up."
)
MESH, RANK = ("execution", "mesh"), ("train", "lora_rank")
NOT_PLANNED = {MESH, RANK, SOURCE}
"""Settings without a flag here. `plan` has its own flags for the first two, and a text changes no memory."""
ORIGINS = (("", "init_from"), ("", "upcycle"))
BATCH, ACCUMULATION = ("train", "batch_size"), ("train", "grad_accum")


@dataclass(frozen=True)
class Plan(RunCommand):
    """Find the settings with which a run fits a GPU, without the GPU. `train.py` chooses the same ones on the GPU.

    With --mesh, the training step is compiled for several GPUs, and the memory of one is printed.

    Settings of the model and of the training are the flags of `train.py`. Defaults are those of preset seed-158m.

    The exit status is 0 if a setting fits, and 1 if none fits. The last line of the output is JSON if it is asked for,
    or if the output is a file or a pipe.
    """

    usual: ClassVar[Sequence[str]] = (*COMMON, "--gpu", "--mesh", "--lora", "--json")
    preset: ClassVar[PresetName] = "seed-158m"

    gpu: str = DEFAULT_GPU
    """Name of a described GPU (a wrong name lists all names), or a file that describes one."""
    mesh: str = ""
    """Plan for several such GPUs, such as data=2,expert=4. Each has the sequences of a step of the preset."""
    lora: int = 0
    """Plan a fine-tuning by adapters of this rank (`sft --lora`), instead of training. 0 trains all weights."""
    json: bool = False
    """Print the result as JSON too."""
    flags: Values = field(default_factory=dict)
    """What the user has typed."""

    @classmethod
    def settable(cls) -> list[Argument]:
        keys = {PRESET, *ORIGINS}
        return [a for a in super().settable() if (a.section or a.key in keys) and a.key not in NOT_PLANNED]

    @classmethod
    def resolve(cls, own: dict[str, Any], flags: Values) -> Settings:
        dense = flags.get(("", "upcycle"))
        if PRESET not in flags and not (dense and holds_run(Path(dense))):  # a run's preset stays
            flags = {PRESET: cls.preset} | flags
        own["flags"] = flags
        return resolve_settings(flags)

    def execute(self) -> int:
        check_range("--lora", self.lora, 0, 4096)
        target = load_target(self.gpu)
        config = self.settings.config
        if self.mesh:
            self._check_mesh()
            config = config.on_mesh(self.mesh, config.train.batch_size * config.train.grad_accum)
        # Compiling for a described card needs no card, and must not occupy a real one.
        os.environ["JAX_PLATFORMS"] = "cpu"
        environment.prepare_environment()
        name = config.init_from or (f"{config.upcycle}, upcycled," if config.upcycle else config.preset)
        budget = config.execution.memory_bytes / MIB or target.budget
        say(
            f"{name} on {target.device_kind} (compute capability {target.compute_capability}, "
            f"{target.memory / MIB:,.0f} MiB): a run may use {budget:,.0f} MiB"
        )
        config = with_vocabulary(config)
        return self._plan_mesh(config, target) if self.mesh else self._plan_card(config, target, budget)

    def _check_mesh(self) -> None:
        """Raise ConfigError for a mesh of an impossible number of cards, or with adapters."""
        if self.lora:
            raise ConfigError(f"--lora {self.lora}: is for a plan of one GPU; leave it out with --mesh")
        count = MeshShape.parse(self.mesh).devices
        if count > CARDS_PER_HOST and count % CARDS_PER_HOST:
            raise ConfigError(f"--mesh {self.mesh}: has {count} places; give at most {CARDS_PER_HOST}, or a multiple")

    def _plan_card(self, config: RunConfig, target: "Target", budget: float) -> int:
        found, compiler = ([], "") if self.lora else plans.recorded(config, target)
        say(f"recorded with jaxlib {compiler}" if found else COMPILING)
        print("(micro: sequences of a micro-batch)")
        print(_COLUMNS.format(*_HEADINGS))
        tried = []
        for plan in found or self._walk(config, target, budget):
            tried.append(plan)
            _print_row(plan, budget)
        plan = plans.chosen(tried, budget)
        programs = ", ".join(f"{name} {mib:,.0f} MiB" for name, mib in plan.programs.items())
        compiled = f"{programs}, with all that is in memory beside it", f"attention in training: {plan.attention}"
        say("", *(compiled if programs else ()))
        return self._result(plan.summary(target.name, budget), self._print_command(plan.fits(budget)))

    def _walk(self, config: RunConfig, target: "Target", budget: float) -> Iterator[plans.Plan]:
        from moe_jax.planning import ladder

        asked = ladder.with_adapters(config, self.lora) if self.lora else config
        return ladder.walk(asked, ladder.Room.on(target, budget))

    def _plan_mesh(self, config: RunConfig, target: "Target") -> int:
        from moe_jax.planning import ladder

        with working("compiling the training step for these devices, a minute or more"):
            memory = ladder.mesh_memory(config, target)
        fits = memory.total <= target.budget
        say(
            f"mesh {MeshShape.parse(self.mesh)}, {config.train.batch_size} sequences a step; one device: arguments "
            f"{memory.arguments:,.0f} MiB, temporary {memory.temporary:,.0f}, total {memory.total:,.0f}"
        )
        train = config.train
        batch: Values = {MESH: self.mesh, BATCH: train.batch_size, ACCUMULATION: train.grad_accum}
        command = self._print_command(fits, batch)
        result = {"preset": config.preset, "gpu": target.name, "mesh": self.mesh}
        result |= {"total_mib": round(memory.total, 1), "budget_mib": round(target.budget, 1), "fits": fits}
        return self._result(result | {"micro_batch": config.train.batch_size}, command)

    def _print_command(self, fits: bool, chosen: Values | None = None) -> str | None:
        """Print the command line that trains so on NVIDIA cards, and return it. None if nothing fits.

        `chosen` are settings that the run does not choose by itself.
        """
        if not fits:
            say(
                "no setting fits: try --fit any, a smaller --seq-len, fewer --experts, a smaller "
                "--model.expert-hidden, or another --gpu"
            )
            return None
        typed, words = {**self.flags}, ["train.py"]
        if self.lora:
            typed.pop(PRESET, None)
            words = ["python -m moe_jax sft", *["--run RUN"] * typed.keys().isdisjoint(ORIGINS)]
            words += ["--data CHATS.jsonl --out NEW"]
            typed |= {RANK: self.lora}
        words += [shlex.quote(word(*key, value)) for key, value in (typed | (chosen or {})).items()]
        say("this fits, by XLA's buffer plan; on the card, train with")
        command = " ".join([ON_A_CARD, *words])
        print(command)  # unbroken, to be copied
        return command

    def _result(self, result: dict[str, Any], command: str | None) -> int:
        """Print the result as JSON. Returns the exit status."""
        print_json(result | {"command": command}, self.json)
        return 0 if result["fits"] else 1


_COLUMNS = "{:<10} {:>8} {:>6} {:>6} {:>6} {:>9} {:>14}  {}"
"""80 columns at most."""
_HEADINGS = ("optimizer", "weights", "micro", "accum", "remat", "precision", "step MiB", "fits")


def _print_row(plan: plans.Plan, budget: float) -> None:
    """One line for a setting."""
    train, step = plan.config.train, plan.programs.get("step")
    memory = f"{step:,.0f}" if step is not None else f">= {plan.least:,.0f}"
    remat, fits = "yes" if plan.config.execution.remat else "no", "yes" if plan.fits(budget) else "no"
    numbers = train.param_dtype, train.batch_size, train.grad_accum
    print(_COLUMNS.format(train.optimizer, *numbers, remat, plan.precision, memory, fits), flush=True)
    if step is not None and step <= budget < plan.total:
        name = max(plan.programs, key=plan.programs.__getitem__)
        say(f"its step fits, but between steps {name} takes {plan.programs[name]:,.0f} MiB")
