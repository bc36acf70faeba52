"""What a run starts from: noise, its own last checkpoint, or the weights of another run or of a Hugging Face model.

`start_of` finds out once, from the flags that name it. The result gives the settings that file and flags then change
(`defaults`), checks the changed settings (`check`), and opens the weights (`weights`, from `initial_weights.py`).
Nothing here imports jax before `weights` is called, so a wrong flag is reported at once.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_jax.config import ConfigError, ModelConfig, RunConfig, UserError, holds_run, load_begun_config, load_config
from moe_jax.config.model import MESH_ROUTING
from moe_jax.config.presets import largest_vocabulary, preset
from moe_jax.config.run import missing_run
from moe_jax.config.section import typed

if TYPE_CHECKING:
    from moe_jax.interop.pretrained_shape import PretrainedShape
    from moe_jax.training.initial_weights import InitialWeights

Values = dict[tuple[str, str], Any]
"""(section, name) -> the value of a setting."""
NAMING = {("", name) for name in ("preset", "out", "resume", "upcycle", "init_from", "base")}
NAMING |= {("model", "dense"), ("data", "format"), ("train", "lora_rank")}
"""The settings that say what a run starts from, how it is tuned, and the name of its folder (`RunConfig.run_dir`)."""

IMPORTED_LR = 1e-4
"""Peak learning rate of a run that starts from a public model. The presets' rates are for a start from noise."""
TUNING_LR, TUNING_LR_ADAPTERS = 1e-3, 3e-3
"""Peak learning rates of a fine-tuning of a run, chosen on preset nano. Adapters start at zero, and take a larger one.
A public model is fine-tuned at IMPORTED_LR."""

_DATA_MAY_CHANGE = {"eval_tokens", "source"}
"""Fields of `data` that may change. The text itself is compared by its digest, once it is read."""
_EXPERTS = {"dense", "experts", "expert_hidden", "shared_experts"}
"""Fields of the model that concern experts only. An upcycled run may choose them freely."""
_TRAINING_ONLY = {"dropout", "attention_dropout", "tie_value_output_init", "zero_init_residual"}
"""Fields of the model that change nothing in a forward pass of given weights without dropout."""
_IMPORTED_ROUTING = ("top_k", "renormalise_gates", "balancing")
"""Fields of the routing that decide what an imported model computes, or which parameters it has."""
_ROUTING_MAY_CHANGE = {"capacity_factor", "dispatch", MESH_ROUTING}
"""Fields of the routing that change neither which experts a token chooses, nor its gates."""


@dataclass(frozen=True)
class Start:
    """A new run that starts from noise. Subclasses start from something else."""

    defaults: RunConfig
    """The settings that file and flags change."""

    @property
    def saved(self) -> RunConfig | None:
        """The configuration of the run that is resumed; None for a new run."""
        return None

    def check(self, config: RunConfig) -> None:
        """Raise ConfigError if the changed settings do not fit what the run starts from."""
        size, entries = config.model.vocab_size, largest_vocabulary(config.data)
        if 0 < size < entries:
            kind = config.data.tokenizer
            known = "may have" if kind == "bpe" else "has"
            problem = f"the {kind} tokenizer {known} {entries:,} entries; give at least that, or 0"
            raise config.model.wrong("vocab_size", problem)

    def weights(self, config: RunConfig) -> "InitialWeights | None":
        """The weights that the run starts from, opened and checked. None for random ones.

        Raises UserError if they cannot be used.
        """
        del config
        return None


@dataclass(frozen=True)
class ResumedRun(Start):
    """The run goes on from its newest good checkpoint, which the session restores."""

    @property
    def saved(self) -> RunConfig | None:
        return self.defaults

    def check(self, config: RunConfig) -> None:
        """Model, routing, tokenizer, data and optimizer stay. `execution` may change."""
        fixed = [("", name) for name in ("preset", "upcycle", "init_from", "base")]
        fixed += [("train", name) for name in ("optimizer", "param_dtype", "lora_alpha", "train_router", "lora_rank")]
        fixed += [*_fields(config, "model"), *_fields(config, "routing", {MESH_ROUTING})]
        fixed += _fields(config, "data", _DATA_MAY_CHANGE)
        hint = "leave the flag out to resume it, or start a new run with another --out"
        _check_same(self.defaults, config, fixed, f"the run in {config.run_dir}", hint)


@dataclass(frozen=True)
class RestartedRun(Start):
    """The run ended before its first checkpoint, and begins again with the settings in its config.json."""

    inner: Start
    """What it began with."""

    def check(self, config: RunConfig) -> None:
        """The preset and the weights that the run starts from stay. Every other setting may change."""
        hint = "leave the flag out to start it again, or leave --resume out to start a new run there"
        fixed = [("", name) for name in ("preset", "upcycle", "init_from", "base")]
        _check_same(self.defaults, config, fixed, f"the run that began in {config.run_dir}", hint)
        if type(self.inner) is not Start:  # its own vocabulary size would stand beside that of a new tokenizer
            self.inner.check(config)

    def weights(self, config: RunConfig) -> "InitialWeights | None":
        return self.inner.weights(config)


@dataclass(frozen=True)
class TunedRun(Start):
    """The best checkpoint of a trained run, fine-tuned on conversations (`sft --run`)."""

    run: RunConfig

    @classmethod
    def of(cls, folder: str, lora: bool) -> "TunedRun":
        """The settings of the run, with a short training. `lora`: of adapters. Raises ConfigError."""
        run = _load_run("--run", folder)
        fresh = dataclasses.replace(run, base=folder, init_from="", upcycle="", out="", resume=False, track="none")
        return cls(_for_conversations(fresh, TUNING_LR_ADAPTERS if lora else TUNING_LR), run)

    def check(self, config: RunConfig) -> None:
        """The tuned model has the parameters and the forward pass of the run."""
        fixed = [("", "preset"), *_fields(config, "model", _TRAINING_ONLY)]
        fixed += [*_fields(config, "routing", _ROUTING_MAY_CHANGE), ("data", "tokenizer"), ("data", "vocab_size")]
        hint = "leave the flag out: a tuned run keeps the model and the tokenizer"
        _check_same(self.run, config, fixed, f"the run in {config.base}", hint)

    def weights(self, config: RunConfig) -> "InitialWeights | None":
        from moe_jax.training import initial_weights

        return initial_weights.of_tuned_run(config.base)


@dataclass(frozen=True)
class ImportedModel(Start):
    """A Hugging Face model as it is (--init-from)."""

    shape: "PretrainedShape"

    @classmethod
    def of(cls, config: RunConfig) -> "ImportedModel":
        """The model of the folder, the rest of `config` with a low learning rate.

        The context is that of `config`, and at most what the model reads. Raises ConfigError or UserError.
        """
        from moe_jax.interop.pretrained_shape import read_shape

        shape = read_shape(Path(config.init_from), "--init-from")
        model = dataclasses.replace(shape.model, seq_len=min(config.model.seq_len, shape.model.seq_len))
        defaults = _with_pretrained(config, model)
        chat = config.data.format == "chat"
        return cls(_for_conversations(defaults, IMPORTED_LR) if chat else defaults, shape)

    def check(self, config: RunConfig) -> None:
        """The folder gives the model and the tokenizer. How the model is trained is free."""
        model, where = self.shape.model, f"the model in {config.init_from}"
        _check_length(model, config, where)
        fixed = [("data", "tokenizer"), *_fields(config, "model", {"seq_len", "dropout", "attention_dropout"})]
        hint = "leave the flag out: the folder gives the shape of the model, and its tokenizer"
        if model.dense == "none":
            fixed += [("routing", name) for name in _IMPORTED_ROUTING]
        else:
            hint += "; to give a dense model experts, use --upcycle"
        there = dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, tokenizer="hf"))
        _check_same(there, config, fixed, where, hint)

    def weights(self, config: RunConfig) -> "InitialWeights | None":
        from moe_jax.training import initial_weights

        return initial_weights.of_pretrained(config.init_from, "--init-from")


@dataclass(frozen=True)
class Upcycled(Start):
    """A trained dense run, or a dense Hugging Face model (--upcycle). Every expert starts as a copy of its feed-forward
    network."""

    dense: RunConfig
    """The settings of the dense run, or those of the new run with the dense model of a Hugging Face folder."""
    pretrained: bool

    @classmethod
    def of(cls, config: RunConfig) -> "Upcycled":
        """The dense run or model with experts as wide as its network. The content of the folder says which it is.

        Raises ConfigError or UserError.
        """
        from moe_jax.interop.pretrained_shape import holds_pretrained, read_shape

        folder = config.upcycle
        if holds_run(Path(folder)) or not holds_pretrained(Path(folder)):
            dense = _load_run("--upcycle", folder, "make one with --model.dense active")
            _check_dense(dense.model, folder, "name a run made with --model.dense active")
            width = dense.model.dense_hidden
            model = dataclasses.replace(dense.model, dense="none", expert_hidden=width, shared_experts=0)
            return cls(dataclasses.replace(dense, upcycle=folder, out="", model=model), dense, pretrained=False)
        model = read_shape(Path(folder), "--upcycle").model
        _check_dense(model, folder, "start from it with --init-from")
        # The dense model has no experts that a mesh could divide.
        plain = dataclasses.replace(config, execution=dataclasses.replace(config.execution, mesh=""))
        dense = _with_pretrained(plain, model)
        model = dataclasses.replace(
            model,
            dense="none",
            seq_len=min(config.model.seq_len, model.seq_len),
            experts=config.model.experts,
            routing=config.model.routing,
            expert_hidden=model.dense_hidden,
        )
        return cls(_with_pretrained(config, model), dense, pretrained=True)

    def check(self, config: RunConfig) -> None:
        """The experts can be copies, and everything else is as in the dense run or model."""
        where = f"the dense {'model' if self.pretrained else 'run'} in {config.upcycle}"
        _check_copies(self.dense.model.dense_hidden, config, where)
        free = _EXPERTS | _TRAINING_ONLY
        if self.pretrained:
            _check_length(self.dense.model, config, where)
            fixed = [("data", "tokenizer"), *_fields(config, "model", free | {"seq_len"})]
        else:
            fixed = [("", "preset"), *_fields(config, "model", free), *_fields(config, "data", _DATA_MAY_CHANGE)]
        hint = "leave the flag out: an upcycled run starts with the function that the dense run has learned"
        _check_same(self.dense, config, fixed, where, hint)

    def weights(self, config: RunConfig) -> "InitialWeights | None":
        from moe_jax.training import initial_weights

        if self.pretrained:
            return initial_weights.of_pretrained(config.upcycle, "--upcycle")
        return initial_weights.of_dense_run(config.upcycle, self.dense)


def start_of(values: Values) -> Start:
    """What the settings of a file and of flags start from.

    Raises ConfigError where it is not there, and UserError where it cannot be read.
    """
    naming = {key: value for key, value in values.items() if key in NAMING}
    config = preset(values.get(("", "preset"), RunConfig.preset)).override(naming)
    # The folder of an upcycled or a tuned run may be named after the settings of the other run, so those come first.
    named = bool(config.out) or not (config.upcycle or config.base)
    start = _in_folder(config) if named else None
    if start is None:
        new = new_start(config)
        start = (None if named else _in_folder(new.defaults.override(naming))) or new
    return start


def new_start(config: RunConfig) -> Start:
    """What a new run of a configuration starts from. Raises as `start_of` does."""
    if config.base:
        return TunedRun.of(config.base, lora=config.train.lora_rank > 0)
    if config.init_from:
        return ImportedModel.of(config)
    return Upcycled.of(config) if config.upcycle else Start(preset(config.preset))


def _in_folder(config: RunConfig) -> Start | None:
    """The run that --resume goes on with. None without --resume, or if no run has begun in the folder."""
    if not config.resume:
        return None
    run = Path(config.run_dir)
    # A folder may have been copied or renamed, so its path comes from the command and not from its config.json.
    if (saved := load_config(run)) is not None:
        return ResumedRun(dataclasses.replace(saved, out=config.run_dir))
    if (begun := load_begun_config(run)) is None:
        return None
    begun = dataclasses.replace(begun, out=config.run_dir)
    inner = new_start(begun)
    if type(inner) is Start and begun.model.vocab_size <= largest_vocabulary(begun.data):
        # The size was that of the tokenizer, which is made again.
        begun = dataclasses.replace(begun, model=dataclasses.replace(begun.model, vocab_size=0))
    return RestartedRun(begun, inner)


def _load_run(flag: str, folder: str, remedy: str = "make one with `uv run train.py`") -> RunConfig:
    """The settings of the run that a flag names. Raises ConfigError where there is none."""
    try:
        config = load_config(Path(folder))
    except UserError as error:
        raise ConfigError(f"{flag} {folder}: {error}") from None
    if config is None:
        raise ConfigError(missing_run(flag, folder, remedy))
    return config


def _with_pretrained(config: RunConfig, model: ModelConfig) -> RunConfig:
    """`config` with the model and the tokenizer of a Hugging Face folder, and AdamW at a low rate: the rates of
    the presets would destroy what the model has learned.
    """
    train = dataclasses.replace(config.train, optimizer="adamw", lr=IMPORTED_LR)
    data = dataclasses.replace(config.data, tokenizer="hf")
    return dataclasses.replace(config, model=model, data=data, train=train)


def _for_conversations(config: RunConfig, lr: float) -> RunConfig:
    """The settings with the data and the training of a fine-tuning, at a peak learning rate."""
    train = dataclasses.replace(
        config.train,
        steps=600,
        optimizer="adamw",
        muon_router=False,
        lr=lr,
        lr_schedule="linear",
        warmup_steps=20,
        weight_decay=0.0,
        eval_every=100,
        save_every=100,
        patience=0,
        lora_rank=0,
        lora_alpha=0.0,
        train_router=False,
    )
    return dataclasses.replace(config, train=train, data=dataclasses.replace(config.data, format="chat"))


def _check_dense(model: ModelConfig, folder: str, remedy: str) -> None:
    if model.dense == "none":
        raise ConfigError(f"--upcycle {folder}: has experts already; {remedy}")


def _check_copies(hidden: int, config: RunConfig, where: str) -> None:
    """Raise ConfigError unless the experts can be copies of a dense network with `hidden` units.

    The gates of the K chosen experts sum to 1, so K equal copies give the output of the dense network. K = 1 is
    refused: its gate is the probability, which is less than 1. Without `renormalise_gates` every gate is a probability,
    so that is refused too. K = E is refused: every expert would see every token, so the copies would stay equal.
    """
    model = config.model
    if model.dense != "none":
        raise ConfigError(f"--model.dense {model.dense}: --upcycle gives a dense run experts; leave one of them out")
    if model.expert_hidden != hidden:
        raise ConfigError(
            f"--model.expert-hidden {model.expert_hidden}: every expert becomes a copy of the network of {where}, "
            f"which has {hidden} hidden units; give that, or leave the flag out"
        )
    if not 1 < model.routing.top_k < model.experts:
        raise ConfigError(
            f"--top-k {model.routing.top_k}: with --upcycle it must be at least 2, so that the gates sum to 1, and "
            f"below --experts {model.experts}, so that the copies see different tokens"
        )
    if not model.routing.renormalise_gates:
        raise ConfigError("--set routing.renormalise_gates=False: with --upcycle the gates must sum to 1; leave it out")
    if model.shared_experts:
        raise ConfigError(
            f"--model.shared-experts {model.shared_experts}: a shared expert would add to the output of {where}; "
            "with --upcycle it must be 0"
        )


def _check_length(model: ModelConfig, config: RunConfig, where: str) -> None:
    if config.model.seq_len > model.seq_len:
        raise ConfigError(
            f"--seq-len {config.model.seq_len}: {where} reads {model.seq_len} positions at most; give that or less"
        )


def _fields(config: RunConfig, section: str, free: Iterable[str] = ()) -> list[tuple[str, str]]:
    """(section, name) of the fields of a section that may not change: all but the `free` ones."""
    return [(section, name) for _, name, _ in config.section(section).plain_fields() if name not in set(free)]


def _check_same(there: RunConfig, here: RunConfig, fields: Iterable[tuple[str, str]], where: str, hint: str) -> None:
    for section, name in fields:
        old, new = (getattr(c.section(section), name) for c in (there, here))
        if old != new:
            raise ConfigError(f"{typed(section, name, new)}: {where} has {old}; {hint}")
