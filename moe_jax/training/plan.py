"""A plan: one setting of a run, and the memory of its programs. Nothing is imported that imports jax."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config import RunConfig
from moe_jax.system.files import json_text, write_atomically

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

    setting: dict[str, Any]
    """SETTING, as `values_of` gives it."""
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

    @property
    def name(self) -> str:
        """The setting in a few words."""
        batch, accum, optimizer, dtype, remat = self.setting.values()
        sequences = f"{batch} x {accum}" if accum > 1 else f"{batch}"
        weights = "" if dtype == "float32" else f", {dtype} weights"
        return f"{sequences} sequences{' with remat' if remat else ''}, {optimizer}{weights}"


def values_of(config: RunConfig, keys: Iterable[tuple[str, str]] = SETTING) -> dict[str, Any]:
    """Some settings of a run for JSON, by SECTION.NAME."""
    return {f"{section}.{name}": getattr(config.section(section), name) for section, name in keys}


def with_values(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The run with other values, as `values_of` gives them."""
    return config.override({(key.partition(".")[0], key.partition(".")[2]): value for key, value in values.items()})


def chosen(plans: Sequence[Plan], budget: float) -> Plan:
    """The plan to use, of those that `fit.plans_until_one_fits` gives: the one that fits, or else the smallest."""
    return next((plan for plan in plans if plan.fits(budget)), min(plans, key=lambda plan: plan.total))


def compiling_file(config: RunConfig) -> Path:
    """The file that names the setting whose step is being compiled."""
    return Path(config.run_dir) / "compiling.json"


@contextmanager
def named_in_the_folder(config: RunConfig) -> Iterator[None]:
    """`compiling_file`, for this long. It stays if the compiler ends the process, as some do on new cards."""
    path = compiling_file(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json_text(values_of(config)))
    try:
        yield
    finally:
        path.unlink()
