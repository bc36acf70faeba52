"""A plan: one setting of a run, and the memory of its programs. Nothing is imported that imports jax."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from moe_jax.config import RunConfig

MARGIN = 0.85
"""Share of JAX's memory that a plan may use. The rest is for memory that XLA's buffer plan leaves out: loaded kernels,
handles and workspaces of libraries, scratch memory of autotuning, and fragmentation."""
SETTING = (
    *(("train", name) for name in ("batch_size", "grad_accum", "optimizer", "param_dtype")),
    ("execution", "remat"),
)
"""The settings in which the plans of a run differ."""


class Plan(NamedTuple):
    """One setting, and the memory of its programs."""

    config: RunConfig
    precision: str
    least: float
    """MiB that a training step needs whatever the compiler does."""
    programs: dict[str, float]
    """MiB of the compiled programs, with what is in memory beside them. The step comes first. The others are there only
    if it fits; nothing is there if `least` does not fit."""
    attention: str = ""
    """The form of attention in training, and the reason for it."""

    @property
    def total(self) -> float:
        """MiB of the largest program. At least that if the step was not compiled."""
        return max(self.programs.values(), default=self.least)

    def fits(self, budget: float) -> bool:
        return len(self.programs) > 1 and self.total <= budget

    def summary(self, gpu: str, budget: float) -> dict[str, Any]:
        """For JSON output."""
        return {
            "preset": self.config.preset,
            "gpu": gpu,
            "precision": self.precision,
            "total_mib": round(self.total, 1),
            "budget_mib": round(budget, 1),
            "fits": self.fits(budget),
            "micro_batch": self.config.train.batch_size,
            **{name: getattr(self.config.section(section), name) for section, name in SETTING[1:]},
        }

    def to_json(self) -> dict[str, Any]:
        """The plan without the settings that all plans of a run share."""
        programs = {name: round(mib, 1) for name, mib in self.programs.items()}
        own = {"precision": self.precision, "least": round(self.least, 1), "attention": self.attention}
        return {"setting": values_of(self.config, SETTING), **own, "programs": programs}

    @classmethod
    def from_json(cls, values: dict[str, Any], config: RunConfig) -> "Plan":
        """A plan of the run `config`."""
        own = (values[name] for name in ("precision", "least", "programs", "attention"))
        return cls(with_values(config, values["setting"]), *own)


def values_of(config: RunConfig, keys: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Some settings of a run for JSON, by SECTION.NAME."""
    return {f"{section}.{name}": getattr(config.section(section), name) for section, name in keys}


def with_values(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The run with other values, as `values_of` gives them."""
    return config.override({(key.partition(".")[0], key.partition(".")[2]): value for key, value in values.items()})


def named(config: RunConfig) -> str:
    """A setting in a few words."""
    train = config.train
    batch = f"{train.batch_size} x {train.grad_accum}" if train.grad_accum > 1 else f"{train.batch_size}"
    kind = train.optimizer if train.param_dtype == "float32" else f"{train.optimizer}, {train.param_dtype} weights"
    return f"{batch} sequences{' with remat' if config.execution.remat else ''}, {kind}"


def chosen(plans: Sequence[Plan], budget: float) -> Plan:
    """The plan to use, of those that `fit.plans_until_one_fits` gives: the one that fits, or else the smallest."""
    return next((plan for plan in plans if plan.fits(budget)), min(plans, key=lambda plan: plan.total))
