"""`moe-jax plan`."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from moe_jax.cli.arguments import Argument, Values
from moe_jax.cli.command import print_json
from moe_jax.cli.settings import COMMON, PRESET, SOURCE, RunCommand, Settings, resolve_settings
from moe_jax.config import PresetName, UserError
from moe_jax.config.presets import with_vocabulary
from moe_jax.config.section import word
from moe_jax.planning import plans
from moe_jax.planning.plans import DEFAULT_GPU, RECORD, known_card
from moe_jax.system.environment import MIB
from moe_jax.system.terminal import say

ON_A_CARD = "uv run --extra cuda12"
"""How a program is started on an NVIDIA card. CUDA 12 knows all cards that JAX knows, CUDA 13 those from compute
capability 7.5."""


@dataclass(frozen=True)
class Plan(RunCommand):
    """Look up the settings with which a preset fits a GPU, without the GPU. `train.py` chooses the same ones on it.

    The plans of the presets on well-known cards are recorded. For other settings, other cards, several cards and
    adapters, the command that compiles a plan is named. Defaults are those of preset seed-158m.

    The exit status is 0 if a setting fits, and 1 if none fits. The last line of the output is JSON if it is asked for,
    or if the output is a file or a pipe.
    """

    usual: ClassVar[Sequence[str]] = (*COMMON, "--gpu", "--json")
    preset: ClassVar[PresetName] = "seed-158m"

    gpu: str = DEFAULT_GPU
    """Name of a GPU. A wrong name lists all names."""
    json: bool = False
    """Print the result as JSON too."""
    flags: Values = field(default_factory=dict)
    """What the user has typed."""

    @classmethod
    def settable(cls) -> list[Argument]:
        return [a for a in super().settable() if (a.section or a.key == PRESET) and a.key != SOURCE]

    @classmethod
    def resolve(cls, own: dict[str, Any], flags: Values) -> Settings:
        own["flags"] = flags = {PRESET: cls.preset} | flags
        return resolve_settings(flags)

    def execute(self) -> int:
        card, config = known_card(self.gpu), with_vocabulary(self.settings.config)
        found, compiler = plans.recorded(config, card)
        if not found:
            changes = [f"--set={s}.{n}={value}" for (s, n), value in self.flags.items() if s]
            command = " ".join([RECORD, f"--preset {config.preset} --gpu {card.name}", *map(shlex.quote, changes)])
            raise UserError(f"this setting is not recorded; in a clone of the project, compile its plan: {command}")
        say(
            f"{config.preset} on {card.device_kind} (compute capability {card.compute_capability}, "
            f"{card.memory / MIB:,.0f} MiB): a run may use {card.budget:,.0f} MiB",
            f"recorded with jaxlib {compiler}",
        )
        print("(micro: sequences of a micro-batch)")
        print(_COLUMNS.format(*_HEADINGS))
        for plan in found:
            _print_row(plan, card.budget)
        plan = plans.chosen(found, card.budget)
        programs = ", ".join(f"{name} {mib:,.0f} MiB" for name, mib in plan.programs.items())
        compiled = f"{programs}, with all that is in memory beside it", f"attention in training: {plan.attention}"
        say("", *(compiled if programs else ()))
        fits = plan.fits(card.budget)
        print_json(plan.summary(card.name, card.budget) | {"command": self._print_command(fits)}, self.json)
        return 0 if fits else 1

    def _print_command(self, fits: bool) -> str | None:
        """Print the command line that trains so on an NVIDIA card, and return it. None if nothing fits."""
        if not fits:
            say(f"no setting fits: take a smaller preset or another --gpu, or plan other settings with {RECORD}")
            return None
        words = [shlex.quote(word(*key, value)) for key, value in self.flags.items()]
        say("this fits, by XLA's buffer plan; on the card, train with")
        command = " ".join([ON_A_CARD, "train.py", *words])
        print(command)  # unbroken, to be copied
        return command


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
