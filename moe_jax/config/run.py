"""One run: what `train.py` is told, and what `config.json` holds. Standard library only."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_jax.config.data import DataConfig
from moe_jax.config.execution import ExecutionConfig, MeshShape
from moe_jax.config.model import ModelConfig, RoutingConfig
from moe_jax.config.section import Section, no_flag
from moe_jax.config.train import TrainConfig
from moe_jax.system.errors import ConfigError, UserError, shortened

PresetName = Literal["nano", "story", "story-cpu", "story-4gb", "seed-158m", "max-4gb"]
Tracker = Literal["none", "tensorboard", "wandb", "trackio"]
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
    track: Tracker = "none"
    """Log to TensorBoard, Weights & Biases or trackio as well (the extra of that name)."""
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
        """The folder of the run: --out, else runs/PRESET with a suffix for an imported model, a dense baseline, an
        upcycled or a tuned run."""
        if self.init_from:
            suffix = "-imported"
        elif self.model.dense != "none":
            suffix = f"-dense-{self.model.dense}"
        else:
            suffix = "-upcycled" if self.upcycle else ""
        suffix += "-tuned" if self.base else ""
        return self.out or f"runs/{self.preset}{suffix}"

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
        """The configuration with some values replaced, by (section, name). Raises FieldError if they do not fit."""
        changes = {section: {n: v for (s, n), v in values.items() if s == section} for section in ("", *SECTIONS)}
        routing = dataclasses.replace(self.model.routing, **changes["routing"])
        return dataclasses.replace(
            self,
            **changes[""],
            model=dataclasses.replace(self.model, routing=routing, **changes["model"]),
            data=dataclasses.replace(self.data, **changes["data"]),
            train=dataclasses.replace(self.train, **changes["train"]),
            execution=dataclasses.replace(self.execution, **changes["execution"]),
        )

    def to_dict(self) -> dict[str, Any]:
        """A dict ready for JSON, with the version of its schema. `routing` is a section of its own in it."""
        values = dataclasses.asdict(self)
        values["routing"] = values["model"].pop("routing")
        return {"schema_version": SCHEMA_VERSION, **values}

    @classmethod
    def from_dict(cls, values: Any) -> "RunConfig":
        """The inverse of `to_dict`.

        Top-level keys that are not fields (`run_id`, `versions`, `history`) are ignored. Raises ConfigError for a value
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
        top = {f.name: f.type for f in dataclasses.fields(cls) if f.name not in SECTIONS}
        own = {name: values[name] for name in top.keys() & values.keys()}
        for name, value in own.items():
            _check_type(name, value, top[name])
        for tracker in ("tensorboard", "wandb", "trackio"):  # a switch for each, where `track` is missing
            if values.get(tracker) is True:
                own.setdefault("track", tracker)
        routing = _section(RoutingConfig, values)
        return cls(
            **own,
            model=_section(ModelConfig, values, routing=routing),
            data=_section(DataConfig, values),
            train=_section(TrainConfig, values),
            execution=_section(ExecutionConfig, values),
        )


def _section[S: Section](kind: type[S], values: dict[str, Any], **inner: Section) -> S:
    """A section from the values of a whole configuration. Raises UserError."""
    section = kind.section_name
    read = values.get(section, {})
    if not isinstance(read, dict):
        raise UserError(f"config.json: {section} is {_short(read)}, must be an object; {_CHANGED}")
    types = {f.name: f.type for f in dataclasses.fields(kind) if f.name not in inner}  # pyright: ignore[reportArgumentType]
    kept = {}
    for name, value in read.items():
        if name in types:
            _check_type(f"{section}.{name}", value, types[name])
            kept[name] = value
        elif (section, name) not in RETIRED:
            raise UserError(f"config.json: {section} has the unknown field {name!r}; another version wrote it")
        elif value != RETIRED[section, name]:
            raise UserError(
                f"config.json: {section}.{name} is {_short(value)}, and this version knows only "
                f"{RETIRED[section, name]!r}: use version 0.2.0 of moe-jax for this run"
            )
    return kind(**kept, **inner)


_CHANGED = "the file was changed; `uv run python -m moe_jax doctor --run FOLDER --repair` takes it from a checkpoint"
_MAX_INTEGER = 2**63
"""No field may have a larger number. Python's own integers have no limit, and arithmetic with floats then fails."""
_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
}


def _check_type(name: str, value: Any, kind: Any) -> None:
    """Raise UserError unless a value of config.json has the type of its field: `batch_size: 4.0` is refused."""
    kinds, allowed = _KINDS.get(kind, ((str,), "a text"))
    ok = isinstance(value, kinds) and isinstance(value, bool) == (kind is bool)
    if not ok or (isinstance(value, int) and abs(value) >= _MAX_INTEGER):
        raise UserError(f"config.json: {name} is {_short(value)}, must be {allowed}; {_CHANGED}")


def _short(value: Any) -> str:
    return shortened(repr(value))
