"""What a run starts from: noise, its own last checkpoint, or the weights of another run or of a Hugging Face model.

`start_of` finds out once, from the flags that name it. A `Start` has the settings that other flags then change, the
checks of the changed settings, and the weights (`initial_weights.py`). Nothing here imports jax before the weights are
opened, so a wrong flag is reported at once.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_jax.config import ConfigError, ModelConfig, RunConfig, UserError
from moe_jax.config.presets import largest_vocabulary, preset
from moe_jax.config.section import Origin
from moe_jax.runs.catalog import holds_run, load_config, missing_run, run_folder

if TYPE_CHECKING:
    from moe_jax.training.initial_weights import InitialWeights

Values = dict[tuple[str, str], Any]
"""(section, name) -> the value of a setting."""

IMPORTED_LR = 1e-4
"""Peak learning rate of a run that starts from a public model. The presets' rates are for a start from noise."""
TUNING_LR, TUNING_LR_ADAPTERS = 1e-3, 3e-3
"""Peak learning rates of a fine-tuning of a run, chosen on preset nano. Adapters start at zero, and take a larger one.
A public model is fine-tuned at IMPORTED_LR."""


@dataclass(frozen=True)
class Start:
    """What a run starts from."""

    defaults: RunConfig
    """The settings that flags change."""
    weights: Callable[[], "InitialWeights | None"] = lambda: None
    """Opens and checks the weights of a new run. None for random ones. Raises UserError if they cannot be used."""
    saved: RunConfig | None = None
    """The configuration of the run that is resumed, which the session restores; None for a new run."""
    kept: Values = field(default_factory=dict)
    """The settings that no flag may change, because the weights have them."""
    where: str = ""
    """What the run starts from, for messages."""
    hint: str = ""
    """What to do about a flag that changes what is kept."""
    positions: int = 0
    """Most positions that an imported model reads. 0 for any number."""

    def check(self, config: RunConfig) -> None:
        """Raise ConfigError if the changed settings do not fit what the run starts from."""
        model, routing = config.model, config.model.routing
        for (section, name), old in self.kept.items():
            if getattr(config.section(section), name) != old:
                raise config.section(section).wrong(
                    name, f"must stay {old} with {self.where}; leave the flag out{self.hint}"
                )
        if 0 < self.positions < model.seq_len:
            raise model.wrong("seq_len", f"{self.where} reads {self.positions} positions at most; give that or less")
        if config.upcycle and self.saved is None and not 1 < routing.top_k < model.experts:
            raise ConfigError(
                f"--top-k {routing.top_k}: with --upcycle it must be at least 2, so that the gates sum to 1, and below "
                f"--experts {model.experts}, so that the copies see different tokens"
            )
        if not self.where and 0 < model.vocab_size < (entries := largest_vocabulary(config.data)):
            known = "may have" if config.data.tokenizer == "bpe" else "has"
            problem = f"the {config.data.tokenizer} tokenizer {known} {entries:,} entries; give at least that, or 0"
            raise model.wrong("vocab_size", problem)


def start_of(naming: Values) -> Start:
    """What a run starts from. `naming` has the typed values of the settings that name it: preset, out, resume, upcycle,
    init_from, base, the text, and what else decides the name of its folder (`RunConfig.run_dir`).

    Raises ConfigError where it is not there, and UserError where it cannot be read.
    """
    config = preset(naming.get(("", "preset"), RunConfig.preset)).override(naming)
    # The folder of an upcycled or a tuned run may be named after the settings of the other run, so those come first.
    if config.out or not (config.upcycle or config.base):
        return _in_folder(config) or new_start(config)
    new = new_start(config)
    return _in_folder(new.defaults.override(naming)) or new


def new_start(config: RunConfig) -> Start:
    """What a new run of a configuration starts from. Raises as `start_of` does."""
    if config.base:
        return _tuned_run(config)
    if config.init_from:
        return _imported_model(config)
    if config.upcycle:
        return _upcycled(config)
    usual = preset(config.preset)
    return Start(_for_conversations(usual, _tuning_lr(config)) if config.data.format == "chat" else usual)


def resumed_run(saved: RunConfig) -> Start:
    """The run goes on from its newest good checkpoint."""
    hint = " to resume it, or start a new run with another --out"
    return Start(saved, saved=saved, kept=saved.kept_settings("resume"), where=f"the run in {saved.run_dir}", hint=hint)


def _in_folder(config: RunConfig) -> Start | None:
    """The run that --resume goes on with. None without --resume, or if the folder holds no checkpoint."""
    saved = load_config(Path(config.run_dir)) if config.resume else None
    if saved is None:
        return None
    if not any(Path(config.run_dir).glob("checkpoints/step_*/arrays")):
        remedy = f"--init-from {saved.init_from}" if saved.init_from else "the run that it was made of"
        raise ConfigError(f"--out {config.run_dir}: has weights to read, and no state of training; train from {remedy}")
    # A folder may have been copied or renamed, so its path comes from the command and not from its config.json.
    return resumed_run(dataclasses.replace(saved, out=config.run_dir))


def _tuned_run(config: RunConfig) -> Start:
    """The best checkpoint of a trained run, fine-tuned on conversations (`sft --run`)."""
    folder = str(run_folder(config.base))
    from_run = _load_run("--run", folder)
    fresh = dataclasses.replace(from_run, base=config.base, init_from="", upcycle="", out="", resume=False)
    defaults = _for_conversations(fresh, _tuning_lr(config))
    return Start(
        defaults,
        weights=lambda: _weights_of("run", "--run", folder),
        kept=from_run.kept_settings("tune"),
        where=f"the run in {folder}",
        hint=": a tuned run keeps the model and the tokenizer",
    )


def _imported_model(config: RunConfig) -> Start:
    """A Hugging Face model as it is (--init-from), with the rest of `config` and a low learning rate. Its context is
    that of `config`, and at most what the model reads. How the model is trained is free."""
    from moe_jax.interop.pretrained_shape import read_shape

    shape = read_shape(Path(config.init_from), "--init-from")
    model = dataclasses.replace(shape.model, seq_len=min(config.model.seq_len, shape.model.seq_len))
    defaults = _with_pretrained(config, model)
    if config.data.format == "chat":
        defaults = _for_conversations(defaults, IMPORTED_LR)
    hint = ": the folder gives the shape of the model, and its tokenizer"
    if model.dense != "none":
        hint += "; to give a dense model experts, use --upcycle"
    return Start(
        defaults,
        weights=lambda: _weights_of("pretrained", "--init-from", config.init_from),
        kept=defaults.kept_settings("import"),
        where=f"the model in {config.init_from}",
        hint=hint,
        positions=shape.model.seq_len,
    )


def _upcycled(config: RunConfig) -> Start:
    """A trained dense run, or a dense Hugging Face model (--upcycle): every expert starts as a copy of its feed-forward
    network. The content of the folder says which it is.

    The gates of the K chosen experts sum to 1, so K equal copies give the output of the dense network. K = 1 is
    refused: its gate is the probability, which is less than 1. Without `renormalise_gates` every gate is a probability,
    so that is refused too. K = E is refused: every expert would see every token, so the copies would stay equal. A
    shared expert would add to the output.
    """
    from moe_jax.interop.pretrained_shape import holds_pretrained, read_shape

    folder = config.upcycle
    pretrained = holds_pretrained(Path(folder)) and not holds_run(Path(folder))
    changes: dict[str, Any] = {"dense": "none", "shared_experts": 0, "shared_gate": False}
    origins: list[Origin] = ["upcycle"]
    if pretrained:
        origins.append("import")
        model = read_shape(Path(folder), "--upcycle").model
        # The dense model has no experts that a mesh could divide.
        plain = dataclasses.replace(config, execution=dataclasses.replace(config.execution, mesh=""))
        dense, remedy = _with_pretrained(plain, model), "start from it with --init-from"
        changes |= {"seq_len": min(config.model.seq_len, model.seq_len)}
        changes |= {"experts": config.model.experts, "routing": config.model.routing}
    else:
        dense = _load_run("--upcycle", folder, "make one with --model.dense active")
        remedy = "name a run made with --model.dense active"
    if dense.model.dense == "none":
        raise ConfigError(f"--upcycle {folder}: has experts already; {remedy}")
    model = dataclasses.replace(dense.model, **changes, expert_hidden=dense.model.dense_hidden)
    defaults = dataclasses.replace(dense, model=model, upcycle=folder, out="")
    if pretrained:
        defaults = _with_pretrained(config, model)
    copied: Values = {("model", name): getattr(model, name) for name in ("dense", "expert_hidden", "shared_experts")}
    return Start(
        defaults,
        weights=lambda: _weights_of("pretrained" if pretrained else "run", "--upcycle", folder),
        kept=copied | {("routing", "renormalise_gates"): True} | dense.kept_settings(*origins),
        where=f"the dense {'model' if pretrained else 'run'} in {folder}",
        hint=": every expert starts as a copy of the dense network, and the gates must sum to 1",
        positions=dense.model.seq_len if pretrained else 0,
    )


def _weights_of(kind: str, flag: str, folder: str) -> "InitialWeights":
    from moe_jax.training import initial_weights

    return initial_weights.of_run(flag, folder) if kind == "run" else initial_weights.of_pretrained(flag, folder)


def _load_run(flag: str, folder: str, remedy: str = "") -> RunConfig:
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


def _tuning_lr(config: RunConfig) -> float:
    return TUNING_LR_ADAPTERS if config.train.lora_rank else TUNING_LR


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
