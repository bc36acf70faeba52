"""One run: what `train.py` is told, and what `config.json` holds."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe_jax.config.data import DataConfig
from moe_jax.config.errors import ConfigError, UserError
from moe_jax.config.execution import ExecutionConfig
from moe_jax.config.flags import check_choices
from moe_jax.config.migrations import SCHEMA_VERSION, migrate_config
from moe_jax.config.model import ModelConfig, RoutingConfig
from moe_jax.config.train import TrainConfig

PresetName = Literal["nano", "story", "story-cpu", "story-4gb", "seed-158m", "max-4gb"]


@dataclass(frozen=True)
class RunConfig:
    """One run: what `train.py` is told, and what `config.json` holds."""

    preset: PresetName = "nano"
    """Named settings that the run starts from. Other flags change single values."""
    out: str = ""
    """Folder of the run. Empty: runs/PRESET."""
    resume: bool = False
    """Continue from the newest good checkpoint in the folder of the run."""
    upcycle: str = ""
    """Folder of a trained dense run. Every expert starts as a copy of its feed-forward network, so the new model starts
    with the function that the dense run has learned."""
    tensorboard: bool = False
    """Write TensorBoard event files as well (extra `tensorboard`)."""
    wandb: bool = False
    """Log to Weights & Biases as well (extra `wandb`)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)

    def __post_init__(self) -> None:
        check_choices(self, "")

    @property
    def run_dir(self) -> str:
        """The folder of the run: --out, else runs/PRESET with a suffix for a dense baseline or an upcycled run."""
        if self.model.dense != "none":
            suffix = f"-dense-{self.model.dense}"
        else:
            suffix = "-upcycled" if self.upcycle else ""
        return self.out or f"runs/{self.preset}{suffix}"

    def section(self, name: str) -> Any:
        """The dataclass that holds a section's fields: "" is the run itself, "routing" lies within the model."""
        if name == "routing":
            return self.model.routing
        return getattr(self, name) if name else self

    def to_dict(self) -> dict[str, Any]:
        """A dict ready for JSON, with the version of its schema. `routing` is a section of its own in it."""
        values = dataclasses.asdict(self)
        values["routing"] = values["model"].pop("routing")
        return {"schema_version": SCHEMA_VERSION, **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        """The inverse of `to_dict`, for every schema version that `migrate_config` knows.

        Top-level keys that are not fields (`versions`, `history`) are ignored. Raises UserError for an unknown schema
        version or an unknown field of a section, ConfigError for a wrong value.
        """
        values = migrate_config(values)
        routing = _section(RoutingConfig, "routing", values)
        top = {f.name for f in dataclasses.fields(cls)} - set(SECTIONS)
        return cls(
            **{k: v for k, v in values.items() if k in top},
            model=_section(ModelConfig, "model", values, routing=routing),
            data=_section(DataConfig, "data", values),
            train=_section(TrainConfig, "train", values),
            execution=_section(ExecutionConfig, "execution", values),
        )


SECTIONS = ("model", "routing", "data", "train", "execution")
"""Names of the sections of a configuration, besides its own fields (section "")."""


def _section(kind: type, name: str, values: dict[str, Any], **given: Any) -> Any:
    found = values.get(name, {})
    known = {f.name for f in dataclasses.fields(kind)} - set(given)
    unknown = sorted(set(found) - known)
    if unknown:
        raise UserError(f"config.json: {name} has the unknown field {unknown[0]!r}; another version wrote it")
    return kind(**found, **given)


def load_config(run: Path) -> RunConfig | None:
    """The saved configuration of a folder that holds a run, else None. Raises UserError where it cannot be read."""
    if not holds_run(run):
        return None
    try:
        return RunConfig.from_dict(json.loads((run / "config.json").read_text(encoding="utf-8")))
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{run / 'config.json'} cannot be read ({error}); "
            f"`python -m moe_jax doctor --run {run} --repair` takes it from a checkpoint"
        ) from error


def holds_run(run: Path) -> bool:
    """Whether a folder holds a complete checkpoint. A checkpoint gets its name only when it is complete, so names
    suffice."""
    return any(p.is_dir() for p in run.glob("checkpoints/step_" + "[0-9]" * 8 + "*"))
