"""One run: what `train.py` is told, and what `config.json` holds."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe_jax.config.data import DataConfig
from moe_jax.config.execution import ExecutionConfig
from moe_jax.config.flags import check, check_choices
from moe_jax.config.mesh import MeshShape, check_mesh
from moe_jax.config.migrations import SCHEMA_VERSION, migrate_config
from moe_jax.config.model import ModelConfig, RoutingConfig
from moe_jax.config.train import TrainConfig
from moe_jax.system.errors import ConfigError, UserError, shortened
from moe_jax.system.files import Folder, step_number

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
    """Folder of a trained dense run, or of a dense Hugging Face model. Every expert starts as a copy of the dense
    feed-forward network, so the new model starts with the function that the dense one has learned."""
    init_from: str = ""
    """Folder of a Hugging Face model (config.json, model.safetensors, tokenizer.json). The run starts from its weights,
    with its shape and its tokenizer."""
    base: str = ""
    """Folder of the trained run that is fine-tuned: `sft --run`. The new run starts with its weights and
    its tokenizer."""
    tensorboard: bool = False
    """Write TensorBoard event files as well (extra `tensorboard`)."""
    wandb: bool = False
    """Log to Weights & Biases as well (extra `wandb`)."""
    trackio: bool = False
    """Log to trackio as well, on this machine and without an account (extra `trackio`)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)

    def __post_init__(self) -> None:
        check_choices(self, "")
        if self.init_from and self.upcycle:
            raise ConfigError(
                f"--init-from {self.init_from}: --upcycle {self.upcycle} says too what the run starts from; give one"
            )
        comes_with_it = self.data.tokenizer != "hf" or bool(self.init_from or self.upcycle)
        check_mesh(self.execution.mesh, self.model, self.train)
        check(comes_with_it, "data", "tokenizer", "hf", "gpt2, bpe or byte, unless --init-from or --upcycle is given")

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

    def section(self, name: str) -> Any:
        """The dataclass that holds a section's fields: "" is the run itself, "routing" lies within the model."""
        if name == "routing":
            return self.model.routing
        return getattr(self, name) if name else self

    def settings(self) -> Iterator[tuple[str, str, Any]]:
        """(section, name, value) of every setting. The section of the run's own fields is ""."""
        for section in ("", *SECTIONS):
            owner = self.section(section)
            for f in dataclasses.fields(owner):
                value = getattr(owner, f.name)
                if not dataclasses.is_dataclass(value):
                    yield section, f.name, value

    def to_dict(self) -> dict[str, Any]:
        """A dict ready for JSON, with the version of its schema. `routing` is a section of its own in it."""
        values = dataclasses.asdict(self)
        values["routing"] = values["model"].pop("routing")
        return {"schema_version": SCHEMA_VERSION, **values}

    @classmethod
    def from_dict(cls, values: Any) -> "RunConfig":
        """The inverse of `to_dict`, for every schema version that `migrate_config` knows.

        Top-level keys that are not fields (`run_id`, `versions`, `history`) are ignored. Raises ConfigError for a value
        that is not allowed. Raises UserError for everything else: values of another type, an unknown schema version,
        an unknown field of a section.
        """
        if not isinstance(values, dict):
            raise UserError(f"config.json: is {_short(values)}, must be an object; {_CHANGED}")
        try:
            values = migrate_config(values)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"config.json: no configuration of an earlier version ({error!r:.100})") from None
        routing = _section(RoutingConfig, "routing", values)
        top = {f.name: f.type for f in dataclasses.fields(cls) if f.name not in SECTIONS}
        for name in top.keys() & values.keys():
            _check_type(name, values[name], top[name])
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
    if not isinstance(found, dict):
        raise UserError(f"config.json: {name} is {_short(found)}, must be an object; {_CHANGED}")
    types = {f.name: f.type for f in dataclasses.fields(kind) if f.name not in given}
    unknown = sorted(set(found) - set(types))
    if unknown:
        raise UserError(f"config.json: {name} has the unknown field {unknown[0]!r}; another version wrote it")
    for field_name, value in found.items():
        _check_type(f"{name}.{field_name}", value, types[field_name])
    return kind(**found, **given)


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


def load_config(run: Path) -> RunConfig | None:
    """The saved configuration of a folder that holds a run, else None. Raises UserError where it cannot be read."""
    if not holds_run(run):
        return None
    try:
        return RunConfig.from_dict(Folder(run).read_json("config.json"))
    except ConfigError:
        raise
    except OSError as error:
        raise UserError(f"{run / 'config.json'} cannot be read ({error.strerror}){_repair(run, error)}") from error
    except ValueError as error:
        raise UserError(f"{run / 'config.json'} cannot be read ({error}){_repair(run)}") from error


def load_begun_config(run: Path) -> RunConfig | None:
    """The saved configuration of a run that ended before its first checkpoint. None where no run has begun, or where
    the folder holds a checkpoint. Raises UserError where the configuration cannot be read."""
    folder = Folder(run)
    try:
        if holds_run(run) or not folder.exists("config.json"):
            return None
        return RunConfig.from_dict(folder.read_json("config.json"))
    except (OSError, ValueError, UserError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{run / 'config.json'} cannot be read ({what}), and there is no checkpoint; "
            "leave --resume out to start a new run there"
        ) from error


def _repair(run: Path, error: OSError | None = None) -> str:
    """What to do about a config.json that cannot be read. A file that the system refuses to read may well be whole."""
    if error is not None and not isinstance(error, FileNotFoundError):
        return "; mend that and try again"
    return f"; `uv run python -m moe_jax doctor --run {run} --repair` takes it from a checkpoint"


def holds_run(run: Path) -> bool:
    """Whether a folder holds a complete checkpoint. A checkpoint gets its name only when it is complete, so names
    suffice. Raises UserError if the folder cannot be read: it may hold a run then."""
    folder = Folder(run)
    try:
        steps = [name for name in folder.names("checkpoints") if step_number(name) is not None]
        return any(not (run / "checkpoints" / name).is_file() for name in steps)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); fix that and try again") from None
