"""One run: what `train.py` is told, what `config.json` holds, and how it is read back. Standard library only."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe_jax.config.model import ModelConfig, RoutingConfig
from moe_jax.config.section import Section, no_flag
from moe_jax.config.train import NAMED_CORPORA, DataConfig, ExecutionConfig, MeshShape, TrainConfig
from moe_jax.system.errors import ConfigError, UserError, shortened
from moe_jax.system.files import read_json, steps_in

PresetName = Literal["nano", "story", "story-cpu", "story-4gb", "seed-158m", "max-4gb"]
SECTIONS = ("model", "routing", "data", "train", "execution")
"""Names of the sections of a configuration, besides its own fields (section "")."""

SCHEMA_VERSION = 3
"""The format of a configuration in `config.json` and in the manifest of a checkpoint."""
RETIRED = {
    ("routing", "priority"): "token",
    ("routing", "logit_noise"): 0.0,
    ("routing", "input_jitter"): 0.0,
    ("routing", "eval_capacity_factor"): 0.0,
    ("data", "stories_seed"): 0,
    ("train", "skip_spikes"): False,
}
"""Settings that are constants now -> the constant. A configuration that holds another value is refused."""


@dataclass(frozen=True)
class RunConfig(Section, section=""):
    """One run: what `train.py` is told, and what `config.json` holds."""

    preset: PresetName = "nano"
    """Named settings that the run starts from. Other flags change single values."""
    out: str = ""
    """Folder of the run. Empty: runs/PRESET."""
    resume: bool = False
    """Continue from the newest good checkpoint in the folder of the run."""
    upcycle: str = ""
    """Folder of a trained dense run, or of a dense Hugging Face model. Every expert starts as a copy of the dense
    feed-forward network, so the new model starts with the function that the dense one has learned."""
    init_from: str = ""
    """Folder of a Hugging Face model (config.json, model.safetensors, tokenizer.json). The run starts from its weights,
    with its shape and its tokenizer."""
    base: str = no_flag("")
    """Folder of the trained run that is fine-tuned. `sft --run` sets it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)

    def __post_init__(self) -> None:
        self.check_choices()
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

    def on_mesh(self, mesh: str, sequences: int, micro_batches: int = 1) -> "RunConfig":
        """The same run on a mesh, with `sequences` sequences of each micro-batch on each device.

        Raises ConfigError if the model cannot be divided over the mesh.
        """
        batch = sequences * MeshShape.parse(mesh).devices
        train = dataclasses.replace(self.train, batch_size=batch, grad_accum=micro_batches)
        return dataclasses.replace(self, train=train, execution=dataclasses.replace(self.execution, mesh=mesh))

    def section(self, name: str) -> Section:
        """The section of a name: "" is the run itself, "routing" lies within the model."""
        if name == "routing":
            return self.model.routing
        return getattr(self, name) if name else self

    def settings(self) -> Iterator[tuple[str, str, Any]]:
        """(section, name, value) of every setting. The section of the run's own fields is ""."""
        for section in ("", *SECTIONS):
            yield from self.section(section).plain_fields()

    def override(self, values: dict[tuple[str, str], Any]) -> "RunConfig":
        """The configuration with some values replaced, by (section, name). Raises ConfigError if they do not fit."""
        changes = {section: {n: v for (s, n), v in values.items() if s == section} for section in ("", *SECTIONS)}
        changes["model"]["routing"] = dataclasses.replace(self.model.routing, **changes.pop("routing"))
        own = changes.pop("")
        sections = {name: dataclasses.replace(getattr(self, name), **changed) for name, changed in changes.items()}
        return dataclasses.replace(self, **own, **sections)

    def to_dict(self) -> dict[str, Any]:
        """A dict ready for JSON, with the version of its schema. `routing` is a section of its own in it."""
        values = dataclasses.asdict(self)
        values["routing"] = values["model"].pop("routing")
        return {"schema_version": SCHEMA_VERSION, **values}

    @classmethod
    def from_dict(cls, values: Any) -> "RunConfig":
        """The inverse of `to_dict`.

        Top-level keys that are not fields (`versions`, `history`) are ignored. Raises ConfigError for a value
        that is not allowed. Raises UserError for everything else: values of another type, another schema version, an
        unknown field of a section.
        """
        if not isinstance(values, dict):
            raise UserError(f"config.json: is {_short(values)}, must be an object; {_CHANGED}")
        if values.get("schema_version") != SCHEMA_VERSION:
            raise UserError(
                f"config.json has schema version {_short(values.get('schema_version'))}, this program reads "
                f"{SCHEMA_VERSION}: use the version of moe-jax that wrote it, or start a new run in another folder"
            )
        top = {f.name for f in dataclasses.fields(cls)} - {*SECTIONS}
        own = _checked(cls, "", {name: values[name] for name in top & values.keys()})
        routing = RoutingConfig(**_section(RoutingConfig, values))
        model = ModelConfig(**_section(ModelConfig, values), routing=routing)
        data, train = DataConfig(**_section(DataConfig, values)), TrainConfig(**_section(TrainConfig, values))
        execution = ExecutionConfig(**_section(ExecutionConfig, values))
        return cls(**own, model=model, data=data, train=train, execution=execution)


def _section(kind: type[Section], values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a section of a whole configuration. Raises UserError."""
    section = values.get(kind.section_name, {})
    if not isinstance(section, dict):
        raise UserError(f"config.json: {kind.section_name} is {_short(section)}, must be an object; {_CHANGED}")
    retired = {name: constant for (place, name), constant in RETIRED.items() if place == kind.section_name}
    for name in retired.keys() & section.keys():
        if section[name] != retired[name]:
            raise UserError(
                f"config.json: {kind.section_name}.{name} is {_short(section[name])}, and in this version it is "
                f"always {retired[name]!r}; open the run with the version of moe-jax that made it"
            )
    return _checked(kind, f"{kind.section_name}.", {n: v for n, v in section.items() if n not in retired})


def _checked(kind: type[Section], prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values, each of the type of its field: `batch_size: 4.0` is refused. Raises UserError."""
    types = {f.name: f.type for f in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    for name, value in values.items():
        if name not in types or types[name] is RoutingConfig:
            raise UserError(f"config.json: {prefix[:-1]} has the unknown field {name!r}; another version wrote it")
        kinds, allowed = _KINDS.get(types[name], ((str,), "a text"))
        ok = isinstance(value, kinds) and isinstance(value, bool) == (types[name] is bool)
        if not ok or (isinstance(value, int) and abs(value) >= _MAX_INTEGER):
            raise UserError(f"config.json: {prefix}{name} is {_short(value)}, must be {allowed}; {_CHANGED}")
    return values


_CHANGED = "the file was changed; the `context` in a checkpoint's manifest.json holds a copy"
_MAX_INTEGER = 2**63
"""No field may have a larger number. Python's own integers have no limit, and arithmetic with floats then fails."""
_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
}


def _short(value: Any) -> str:
    return shortened(repr(value))


# The configuration in the folder of a run


def holds_run(run: Path) -> bool:
    """Whether a folder holds a complete checkpoint. A checkpoint gets its name only when it is complete, so names
    suffice. Raises UserError if the folder cannot be read: it may hold a run then."""
    try:
        return any(path.is_dir() for path in steps_in(run / "checkpoints").values())
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); fix this and try again") from None


def load_config(run: Path) -> RunConfig | None:
    """The saved configuration of a folder that holds a run, else None. Raises UserError where it cannot be read."""
    if not holds_run(run):
        return None
    try:
        return RunConfig.from_dict(read_json(run / "config.json"))
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{run / 'config.json'} cannot be read ({what}); fix this and try again") from error


def missing_run(flag: str, run: Path | str, remedy: str = "make one with `uv run train.py`") -> str:
    """The message for a flag whose folder holds no run."""
    return f"{flag} {run}: no run with a complete checkpoint there; {remedy}"
