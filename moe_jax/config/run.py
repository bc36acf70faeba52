"""One run: what `train.py` is told, what `config.json` holds, and how it is read back. Standard library only."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from moe_jax.config.execution import ExecutionConfig
from moe_jax.config.model import ModelConfig
from moe_jax.config.section import Origin, Section, setting
from moe_jax.config.train import NAMED_CORPORA, DataConfig, TrainConfig
from moe_jax.system.errors import ConfigError, UserError

PresetName = Literal["nano", "story", "story-cpu", "story-4gb", "seed-158m", "max-4gb"]
SECTIONS = ("model", "routing", "data", "train", "execution")
"""Names of the sections of a configuration, besides its own fields (section "")."""

SCHEMA_VERSION = 3
"""The format of a configuration in `config.json` and in the manifest of a checkpoint."""


@dataclass(frozen=True)
class RunConfig(Section):
    """One run: what `train.py` is told, and what `config.json` holds."""

    section_name: ClassVar[str] = ""

    preset: PresetName = setting("nano", "--preset", kept=("resume", "tune", "upcycle"))
    """Named settings that the run starts from. Other flags change single values."""
    out: str = setting("", "--out")
    """Folder of the run. Empty: runs/PRESET."""
    resume: bool = setting(False, "--resume")
    """Continue from the newest good checkpoint in the folder of the run."""
    upcycle: str = setting("", kept=("resume",))
    """Folder of a trained dense run, or of a dense Hugging Face model. Every expert starts as a copy of the dense
    feed-forward network, so the new model starts with the function that the dense one has learned."""
    init_from: str = setting("", kept=("resume",))
    """Folder of a Hugging Face model (config.json, model.safetensors, tokenizer.json). The run starts from its weights,
    with its shape and its tokenizer."""
    base: str = setting("", "--run", kept=("resume",))
    """Folder of the trained run that is fine-tuned, by the command `sft`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_from and self.upcycle:
            raise ConfigError(
                f"--init-from {self.init_from}: --upcycle {self.upcycle} says too what the run starts from; give one"
            )
        self.execution.check_mesh(self.model, self.train)
        comes_with_model = bool(self.init_from or self.upcycle)
        allowed = "gpt2, bpe or byte, unless --init-from or --upcycle is given"
        self.data.check(self.data.tokenizer != "hf" or comes_with_model, "tokenizer", allowed)

    @property
    def run_dir(self) -> str:
        """The folder of the run: --out, else runs/PRESET, or for a text of the user's own runs/TEXT; with a suffix for
        an imported model, a dense baseline, an upcycled or a tuned run."""
        own = self.data.source not in NAMED_CORPORA and not (self.init_from or self.upcycle or self.base)
        name = Path(self.data.source).resolve().stem.partition(".")[0] if own else self.preset
        if self.init_from:
            suffix = "-imported"
        elif self.model.dense != "none":
            suffix = f"-dense-{self.model.dense}"
        else:
            suffix = "-upcycled" if self.upcycle else ""
        suffix += "-tuned" if self.base else ""
        return self.out or f"runs/{name or self.preset}{suffix}"

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a training step reads."""
        return self.train.batch_size * self.train.grad_accum * self.model.seq_len

    def section(self, name: str) -> Section:
        """The section of a name: "" is the run itself, "routing" lies within the model."""
        if name == "routing":
            return self.model.routing
        return getattr(self, name) if name else self

    def settings(self) -> Iterator[tuple[str, str, Any]]:
        """(section, name, value) of every setting. The section of the run's own fields is ""."""
        for section in ("", *SECTIONS):
            yield from ((section, name, value) for name, value in self.section(section).values())

    def override(self, values: dict[tuple[str, str], Any]) -> "RunConfig":
        """The configuration with some values replaced, by (section, name). Raises ConfigError if they do not fit."""
        changes = {section: {n: v for (s, n), v in values.items() if s == section} for section in ("", *SECTIONS)}
        changes["model"]["routing"] = dataclasses.replace(self.model.routing, **changes.pop("routing"))
        own = changes.pop("")
        sections = {name: dataclasses.replace(getattr(self, name), **changed) for name, changed in changes.items()}
        return dataclasses.replace(self, **own, **sections)

    def kept_settings(self, *origins: Origin) -> dict[tuple[str, str], Any]:
        """(section, name) -> value of the settings that a run keeps which starts from weights of all these origins."""
        return {(s, name): v for s, name, v in self.settings() if {*origins} <= {*self.section(s).kept(name)}}

    def to_dict(self) -> dict[str, Any]:
        """A dict ready for JSON, with the version of its schema. `routing` is a section of its own in it."""
        values = dataclasses.asdict(self)
        values["routing"] = values["model"].pop("routing")
        return {"schema_version": SCHEMA_VERSION, **values}

    @classmethod
    def from_dict(cls, values: Any) -> "RunConfig":
        """The inverse of `to_dict`. Top-level keys that are not fields (`versions`, `history`) are ignored.

        Raises ConfigError for a value that is not allowed, and UserError for another schema version, an unknown field,
        or what is no configuration.
        """
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"config.json has schema version {version}, this program reads {SCHEMA_VERSION}: use the version of "
                "moe-jax that wrote it, or start a new run in another folder"
            )
        own = {("", name): values[name] for name, _ in cls().values() if name in values}
        try:
            given = {(section, name): value for section in SECTIONS for name, value in values.get(section, {}).items()}
            return cls().override(own | given)
        except (TypeError, AttributeError) as error:  # an unknown field, or a value of another type
            raise UserError(f"config.json: not settings of this version of moe-jax ({error})") from None
