"""`moe-jax plan`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from moe_jax.cli.arguments import Argument, arguments_of, read
from moe_jax.cli.command import Command, Group, check_range
from moe_jax.cli.gpu_name import DEFAULT_GPU, check_gpu
from moe_jax.cli.plan_devices import DeviceRequest
from moe_jax.cli.plan_settings import NOTHING_ASKED, ON_A_CARD, Asked, chosen_words, setting_arguments
from moe_jax.cli.result import print_json
from moe_jax.cli.settings import typed_preset
from moe_jax.cli.text_plan import Given, plan_for_text
from moe_jax.config import ConfigError, DataConfig, RunConfig, UserError
from moe_jax.config.presets import PLAN_ONLY, PlanPreset, with_vocabulary
from moe_jax.system import environment
from moe_jax.system.environment import MIB
from moe_jax.system.terminal import say

if TYPE_CHECKING:
    from moe_jax.planning.own_text import TextPlan
    from moe_jax.planning.search import Row
    from moe_jax.planning.target import Target


@dataclass(frozen=True)
class Plan(Command):
    """Find settings that fit: those of a preset for a GPU, or those for a text and the memory of this machine.

    The GPU need not be in this machine. With --data or --memory, the answer is the command line that trains on the text
    here: the preset, the number of steps, and what saves memory if that is needed.

    With --mesh or --scaling, the training step is compiled for many GPUs or TPUs: the memory of a device, what devices
    send each other, and the predicted time. No device need be there either.

    A plan for devices takes the settings of the model and of the training, too, by the flags of `train.py` or from its
    --config FILE.

    The exit status is 0 if a setting fits, and 1 if none fits. The last line of the output is JSON if it is asked for,
    or if the output is a file or a pipe.
    """

    interrupted: ClassVar[str] = "the search stopped early; nothing of it is kept"

    preset: PlanPreset = "seed-158m"
    """The settings to plan for. `pod-1b`, with 1.31 billion parameters, is for --mesh and --scaling only."""
    gpu: str = ""
    """Name of a described GPU (a wrong name lists all names), or a file that describes one. Default: rtx3050-4gb."""
    tpu: str = ""
    """Plan for a slice of TPU chips instead: v5e-1, -4, -8, -16, -32, -64, -128 or -256. With --mesh or --scaling."""
    mesh: str = ""
    """Plan for several devices, such as data=2,expert=4: memory, what they send, and the time of a step."""
    scaling: bool = False
    """Plan for 1, 2, 4, ... devices, up to 16 cards or the slice of --tpu, and print a table."""
    sequences: int = 0
    """Sequences on each device, with --mesh or --scaling. 0 takes those of a step of the preset."""
    out: str = ""
    """Folder for the picture of --scaling, in light and dark (extra `plots`). Empty: no picture."""
    lora: int = 0
    """Plan a fine-tuning by adapters of this rank (`sft --lora`), instead of training. 0 trains all weights."""
    init_from: str = ""
    """Folder of a Hugging Face model, as for `train.py`. Its shape takes the place of the preset's."""
    upcycle: str = ""
    """Folder of a dense run or of a dense Hugging Face model, as for `train.py`."""
    every_optimizer: bool = False
    """Compile each optimizer, instead of stopping at the first setting that fits."""
    data: str = ""
    """Your text, as for `train.py`. Finds the preset and the steps for it, on this machine."""
    memory: str = ""
    """Memory that training on this machine may take, such as 8GB or 900MB. Three quarters of the machine's memory if
    only --data is given."""
    minutes: float = 0.0
    """Chooses the number of steps for about that time of training on your text. The speed is measured, so the number
    may differ from call to call. 0: as long as it takes."""
    gflops: float = 0.0
    """With --minutes, the speed of one matrix product on this machine, in 10^9 operations a second. 0 measures it."""
    json: bool = False
    """Print the result as JSON too."""
    verify: bool = False
    """Plan for the GPU in this machine, train two steps on it, and compare its peak memory with the plan."""
    config: str = ""
    """A TOML file of settings, as for `train.py`. Flags override it. What does not change memory or time is ignored."""
    asked: Asked = NOTHING_ASKED

    @classmethod
    def arguments(cls) -> list[Argument]:
        return [*arguments_of(cls), *setting_arguments(RunConfig())]

    @classmethod
    def groups(cls, argv: Sequence[str] = ()) -> list[Group]:
        start = typed_preset(argv, cls.preset)
        settings = Group(
            "settings of train.py", f"Defaults are those of preset {start.preset}.", setting_arguments(start)
        )
        return [Group("arguments", "", list(arguments_of(cls))), settings]

    @classmethod
    def parse(cls, argv: Sequence[str]) -> Self:
        found = read(cls.arguments(), argv)
        own = {a.name: found.pop(a.key) for a in arguments_of(cls) if a.key in found}
        asked, origin = Asked.of(own.get("config", ""), found)
        return cls(**{name: value for (_, name), value in origin.items()} | own, asked=asked)

    def execute(self) -> int:
        check_range("--lora", self.lora, 0, 4096)
        if self.mesh or self.scaling:
            return self._many_devices().execute()
        for flag, value in (("--tpu", self.tpu), ("--sequences", self.sequences), ("--out", self.out)):
            if value:
                raise ConfigError(f"{flag} {value}: is for plans of several devices; add --mesh or --scaling")
        config = self._settings()
        self._given().check()
        if self.minutes and not self.data:
            raise ConfigError(f"--minutes {self.minutes:g}: plans for a text; give --data too")
        if self.data or self.memory:
            self._refuse_flags_of_cards()
            return self._plan_for_text(config if self.init_from or self.upcycle else None)
        if self.verify and self.gpu:
            raise ConfigError(f"--gpu {self.gpu}: --verify plans for the card in this machine; leave one of them out")
        if not self.verify:
            check_gpu(self.gpu or DEFAULT_GPU)
            # Compiling for a described card needs no card, and must not occupy a real one.
            os.environ["JAX_PLATFORMS"] = "cpu"
        environment.prepare_environment()
        import jax

        from moe_jax.planning import search
        from moe_jax.planning import target as targets

        if self.verify and jax.devices()[0].platform != "gpu":
            raise UserError("--verify: no NVIDIA GPU is visible to JAX; leave it out to plan without one")
        here = targets.target_of_device(jax.devices()[0]) if self.verify else None
        target = here or targets.load_target(self.gpu or DEFAULT_GPU)
        name = self.init_from or (f"{self.upcycle}, upcycled," if self.upcycle else self.preset)
        say(
            f"{name} on {target.device_kind} (compute capability {target.compute_capability}, "
            f"{target.memory / MIB:,.0f} MiB): a plan may use {target.budget:,.0f} MiB"
        )
        rows = []
        config = with_vocabulary(config)
        config = search.with_adapters(config, self.lora) if self.lora else config
        say(
            "compiling the training step of each setting, a minute or more each; of one that fits, evaluation, "
            "prefill and decoding too. What an earlier plan has compiled is looked up."
        )
        for row in search.search(config, target, self.every_optimizer):
            if not rows:
                _print_header()
            rows.append(row)
            _print_row(row, target.budget)
        return self._report(rows, target)

    def _many_devices(self) -> DeviceRequest:
        """Raises ConfigError for a flag that plans of several devices do not take."""
        given = {"--lora": self.lora, "--init-from": self.init_from, "--upcycle": self.upcycle, "--data": self.data}
        given |= {"--memory": self.memory, "--verify": self.verify, "--every-optimizer": self.every_optimizer}
        given |= {"--minutes": self.minutes, "--gflops": self.gflops}
        if self.tpu and self.gpu:
            raise ConfigError(f"--gpu {self.gpu}: --tpu {self.tpu} names the devices too; give one")
        for flag, value in given.items():
            if value:
                shown = "" if value is True else f" {value}"
                raise ConfigError(f"{flag}{shown}: is for plans of one device; leave it out with --mesh and --scaling")
        return DeviceRequest(
            self.preset, self.gpu, self.tpu, self.mesh, self.scaling, self.sequences, self.out, self.json, self.asked
        )

    def _settings(self) -> RunConfig:
        """The settings of the preset, or those that a run of the folder would start from."""
        if self.preset in PLAN_ONLY:
            raise ConfigError(f"--preset {self.preset}: is for plans of several devices; add --mesh or --scaling")
        return self.asked.settings(self.preset, self.init_from, self.upcycle)

    def _refuse_flags_of_cards(self) -> None:
        """Raise ConfigError for a flag that a plan for this machine would not heed."""
        given = {"--gpu": self.gpu, "--verify": self.verify, "--every-optimizer": self.every_optimizer}
        for flag, value in (given | {"--lora": self.lora}).items():
            if value:
                shown = "" if value is True else f" {value}"
                raise ConfigError(f"{flag}{shown}: plans for a GPU; leave --data and --memory out")
        if typed := self.asked.first_flag():
            raise ConfigError(f"{typed}: is for a plan of a GPU; with a text give it to `train.py --preset auto`")

    def _report(self, rows: "list[Row]", target: "Target") -> int:
        from moe_jax.planning import roofline, search

        verdict = search.verdict(rows, target)
        between = ", ".join(f"{name} {mib:,.0f} MiB" for name, mib in verdict.between.items())
        say(f"\nbetween steps, the optimizer state included: {between}")
        say(f"attention in training: {verdict.row.attention}")
        if prediction := verdict.row.step.prediction:
            say(roofline.in_words(prediction, verdict.row.tokens, verdict.row.config.train.steps))
        if verdict.fits:
            say("this setting fits, by XLA's buffer plan; on the card, train with")
            print(self._command(verdict.row.config))  # unbroken, to be copied
        else:
            say(
                "no setting fits: try a smaller --seq-len, fewer --experts, a smaller --model.expert-hidden, or "
                "another --gpu"
            )
        result = verdict.summary(target) | {"command": self._command(verdict.row.config) if verdict.fits else None}
        if self.verify:
            result["peak_mib"] = peak = search.measured_peak(verdict.row.config)
            planned = verdict.row.step.total
            result["peak_over_plan"] = peak / planned
            say(
                f"measured peak {peak:,.0f} MiB, "
                f"{peak / planned - 1:+.1%} against the {planned:,.0f} MiB planned for the step"
            )
        print_json(result, self.json)
        return 0 if verdict.fits else 1

    def _command(self, config: RunConfig) -> str:
        """The command line that trains with these settings on an NVIDIA card."""
        from moe_jax.planning.own_text import origin_flags

        origin = origin_flags(config)
        if not self.lora:
            words = [*origin, f"--preset {config.preset}", *self.asked.words(), *chosen_words(config)]
            return f"{ON_A_CARD} train.py {' '.join(words)}"
        words = [*(origin or ["--run RUN"]), "--data CHATS.jsonl --out NEW", f"--lora {self.lora}"]
        words += self.asked.words({("train", "param_dtype")}) + chosen_words(config)
        words += ["--train.param-dtype bfloat16"] * (config.train.param_dtype == "bfloat16")
        return f"{ON_A_CARD} python -m moe_jax sft {' '.join(words)}"

    def _plan_for_text(self, imported: RunConfig | None) -> int:
        """The command line for a text, the memory of this machine, and a time."""
        from moe_jax.data.corpora import check_source

        source = self.data or "stories"
        check_source(DataConfig(source=source))
        environment.prepare_environment()
        plans = plan_for_text(source, self._given(), imported or RunConfig(), imported)
        for tried in plans.tried:
            _print_tried(tried)
        found, most = plans.last, plans.limits.mib
        if found.fits:
            say("", *plans.reasons, "train with")
            print(found.command())  # unbroken, to be copied
        else:
            say(f"nothing fits {most:,.0f} MiB: `train.py --preset auto` takes a smaller --seq-len and --model.width")
        train = found.config.train
        result = {"preset": found.config.preset, "steps": train.steps, "micro_batch": train.batch_size}
        result |= {"grad_accum": train.grad_accum, "remat": found.config.execution.remat, "fits": found.fits}
        needed = None if found.step_mib is None else round(found.step_mib, 1)
        result |= {"total_mib": needed, "budget_mib": round(most, 1)}
        result["command"] = found.command() if found.fits else None
        result |= {"reasons": plans.reasons}
        print_json(result, self.json)
        return 0 if found.fits else 1

    def _given(self) -> Given:
        return Given(self.memory, self.minutes, self.gflops)


def _print_tried(tried: "TextPlan") -> None:
    train = tried.config.train
    if tried.step_mib is None:
        print(f"{tried.config.preset:<10} passed over: too little time")
        return
    print(
        f"{tried.config.preset:<10} {train.batch_size:>3} sequences x {train.grad_accum:<3} "
        f"{'remat' if tried.config.execution.remat else '     '} {tried.step_mib:>8,.0f} MiB  "
        f"{'fits' if tried.fits else 'too much'}"
    )


_COLUMNS = "{:<10} {:>6} {:>6} {:>11} {:>9} {:>6} {:>9} {:>8}  {}"
"""80 columns at most."""


def _print_header() -> None:
    names = ("optimizer", "micro", "accum", "weights B/p", "state B/p", "remat", "precision", "step MiB", "fits")
    print("(B/p: bytes for each parameter; micro: sequences of a micro-batch)")
    print(_COLUMNS.format(*names))


def _print_row(row: "Row", budget: float) -> None:
    """One line for a setting. `budget` is the memory that a program may use, in MiB."""
    train = row.config.train
    too_large = {name: mib for name, mib in (row.between or {}).items() if mib > budget}
    print(
        _COLUMNS.format(
            train.optimizer,
            train.batch_size,
            train.grad_accum,
            f"{row.weight_bytes:.2f}",
            f"{row.state_bytes:.2f}",
            "yes" if row.config.execution.remat else "no",
            row.precision,
            f"{row.step.total:,.0f}",
            "yes" if row.fits and not too_large else "no",
        ),
        flush=True,
    )
    if row.fits and too_large:
        name = max(too_large, key=too_large.__getitem__)
        say(f"its step fits, but between steps {name} takes {too_large[name]:,.0f} MiB")
