"""What a run starts from: its settings, what flags may change of them, and what is refused. No weight is read."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moe_jax.config import ConfigError, DataConfig, ModelConfig, RoutingConfig, RunConfig, TrainConfig
from moe_jax.config.presets import preset
from moe_jax.training.start import new_start, resumed_run, start_of

MODEL = ModelConfig(
    vocab_size=300,
    seq_len=32,
    layers=2,
    width=32,
    heads=4,
    experts=4,
    expert_hidden=24,
    dropout=0.25,
    routing=RoutingConfig(capacity_factor=1.5),
)
TRAINED = RunConfig(
    preset="story",
    init_from="public",
    resume=True,
    model=MODEL,
    data=DataConfig(source="some.txt", tokenizer="bpe", vocab_size=300),
    train=TrainConfig(
        steps=9,
        batch_size=3,
        optimizer="muon",
        muon_router=True,
        lr=0.5,
        weight_decay=0.25,
        patience=4,
        eval_every=7,
        lr_schedule="cosine",
    ),
)
"""Settings of a trained run, none of which a fine-tuning takes by chance."""


def saved(folder: Path, config: RunConfig = TRAINED) -> str:
    """A folder that looks like a run's. Its path."""
    (folder / "checkpoints" / "step_00000001" / "arrays").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return str(folder)


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return saved(Path("there"))


def changed(config: RunConfig, **fields: Any) -> RunConfig:
    """The settings with fields such as `train_lr` replaced."""
    return config.override({tuple(name.split("_", 1)): value for name, value in fields.items()})  # pyright: ignore


@pytest.mark.parametrize(("rank", "rate"), [(0, 1e-3), (8, 3e-3)])
def test_a_tuning_has_600_steps_of_adamw(there: str, rank: int, rate: float) -> None:
    """The model, the text's tokenizer and the batch are the run's. Adapters learn three times as fast."""
    found = new_start(RunConfig(base=there, train=TrainConfig(lora_rank=rank)))
    config = found.defaults
    assert (config.base, config.init_from, config.upcycle, config.out, config.resume) == (there, "", "", "", False)
    assert (config.preset, config.model) == ("story", MODEL)
    assert config.data == dataclasses.replace(TRAINED.data, format="chat")
    assert found.saved is None
    tuned, plain = config.train, TrainConfig()
    assert (tuned.steps, tuned.optimizer, tuned.muon_router, tuned.lr) == (600, "adamw", False, rate)
    assert (tuned.lr_schedule, tuned.warmup_steps, tuned.weight_decay) == ("linear", 20, 0)
    assert (tuned.eval_every, tuned.save_every, tuned.patience) == (100, 100, 0)
    assert (tuned.lora_rank, tuned.lora_alpha, tuned.train_router) == (0, 0, False)
    assert (tuned.batch_size, tuned.grad_accum, tuned.beta1) == (3, plain.grad_accum, plain.beta1)


TUNED: Mapping[str, tuple[Any, bool]] = {
    "model_dropout": (0.5, True),
    "model_attention_dropout": (0.5, True),
    "model_zero_init_residual": (not MODEL.zero_init_residual, True),
    "routing_capacity_factor": (3.0, True),
    "routing_dispatch": ("blocks", True),
    "routing_device_capacity_factor": (3.0, True),
    "train_lr": (0.125, True),
    "data_source": ("chats.jsonl", True),
    "model_seq_len": (16, False),
    "model_width": (64, False),
    "routing_top_k": (3, False),
    "routing_renormalise_gates": (False, False),
    "data_tokenizer": ("byte", False),
    "data_vocab_size": (400, False),
    "_preset": ("nano", False),
}


@pytest.mark.parametrize("name", TUNED)
def test_what_flags_may_change_of_a_tuning(there: str, name: str) -> None:
    value, allowed = TUNED[name]
    found = new_start(RunConfig(base=there))
    found.check(found.defaults)
    config = changed(found.defaults, **{name: value})
    if allowed:
        found.check(config)
        return
    with pytest.raises(
        ConfigError, match=f": must stay .* with the run in {there}; leave the flag out: a tuned run keeps"
    ):
        found.check(config)


RESUMED: Mapping[str, tuple[Any, bool]] = {
    "train_steps": (99, True),
    "train_lr": (0.125, True),
    "train_batch_size": (6, True),
    "routing_device_capacity_factor": (3.0, True),
    "data_eval_tokens": (77, True),
    "data_source": ("moved.txt", True),
    "_out": ("elsewhere", True),
    "_preset": ("nano", False),
    "_init_from": ("other", False),
    "model_dropout": (0.5, False),
    "model_width": (64, False),
    "routing_capacity_factor": (3.0, False),
    "routing_dispatch": ("blocks", False),
    "data_vocab_size": (400, False),
    "train_optimizer": ("adamw", False),
    "train_param_dtype": ("bfloat16", False),
    "train_lora_alpha": (2.0, False),
    "train_train_router": (True, False),
    "train_lora_rank": (2, False),
}


@pytest.mark.parametrize("name", RESUMED)
def test_what_flags_may_change_of_a_resumed_run(name: str) -> None:
    value, allowed = RESUMED[name]
    found = resumed_run(TRAINED)
    assert found.defaults == found.saved == TRAINED
    found.check(TRAINED)
    fields = {name: value} | ({"train_lora_rank": 2} if name in ("train_lora_alpha", "train_train_router") else {})
    base = changed(TRAINED, train_lora_rank=2, train_optimizer="adamw") if len(fields) > 1 else TRAINED
    found = resumed_run(base)
    config = changed(base, **fields)
    if allowed:
        found.check(config)
        return
    with pytest.raises(ConfigError, match=r"must stay .*; leave the flag out to resume it"):
        found.check(config)


def test_a_folder_is_resumed_only_if_it_is_asked_for_and_holds_a_run(there: str) -> None:
    values = {("", "out"): there, ("", "preset"): "story"}
    assert start_of(values).saved is None
    found = start_of(values | {("", "resume"): True})
    assert found.saved == found.defaults == dataclasses.replace(TRAINED, out=there)
    new = start_of({("", "out"): "absent", ("", "resume"): True})
    assert (new.saved, new.defaults) == (None, preset(RunConfig.preset))
    assert start_of({("", "preset"): "story", ("train", "steps"): 3}).defaults == preset("story")


def test_a_tuned_run_is_found_by_the_name_of_the_other_run(there: str) -> None:
    """Without --out its folder is named after the other run's preset: runs/story-tuned, not runs/nano-tuned."""
    values = {("", "base"): there, ("data", "format"): "chat", ("", "resume"): True}
    assert start_of(values).saved is None
    saved(Path("runs/nano-tuned"))
    assert start_of(values).saved is None
    tuned = dataclasses.replace(TRAINED, base=there, init_from="")
    saved(Path("runs/story-tuned"), tuned)
    assert start_of(values).saved == dataclasses.replace(tuned, out="runs/story-tuned")


def test_a_run_that_is_not_there(there: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^--run absent: no run with a complete checkpoint there; name a folder, or one of .*nano"
    ):
        new_start(RunConfig(base="absent"))
    with pytest.raises(ConfigError, match=r"^--upcycle absent: no run .*; make one with --model\.dense active"):
        new_start(RunConfig(upcycle="absent"))
    with pytest.raises(ConfigError, match=rf"^--upcycle {there}: has experts already; name a run made with"):
        new_start(RunConfig(upcycle=there))
    Path("there/config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^--run there: .*config\.json: cannot be read"):
        new_start(RunConfig(base=there))


@pytest.mark.parametrize(
    ("tokenizer", "entries", "said"),
    [("byte", 257, "the byte tokenizer has 257"), ("bpe", 300, "the bpe tokenizer may have 300"), ("hf", 1, "")],
)
def test_a_vocabulary_has_room_for_the_tokenizer(tokenizer: Any, entries: int, said: str) -> None:
    check = new_start(RunConfig()).check
    data = DataConfig(tokenizer=tokenizer, vocab_size=300)
    for size in (0, entries, entries + 1):
        check(RunConfig(model=ModelConfig(vocab_size=size), data=data, init_from="hf"))
    if entries > 1:
        with pytest.raises(
            ConfigError, match=rf"--model.vocab-size {entries - 1}: {said} entries; give at least that, or 0"
        ):
            check(RunConfig(model=ModelConfig(vocab_size=entries - 1), data=data))


DENSE = dataclasses.replace(MODEL, dense="active", shared_experts=0)


def test_a_dense_run_is_upcycled_to_copies_of_its_network(there: str) -> None:
    """The width of an expert is that of the dense network, which has the active parameters of 2 of 4 experts."""
    dense = saved(Path("dense"), dataclasses.replace(TRAINED, model=DENSE, init_from="", out="old"))
    found = new_start(RunConfig(upcycle=dense))
    config = found.defaults
    assert (config.upcycle, config.out, config.model.dense, config.model.shared_experts) == (dense, "", "none", 0)
    assert config.model == dataclasses.replace(MODEL, expert_hidden=DENSE.dense_hidden)
    assert config.train == TRAINED.train
    for fields in ({}, {"model_experts": 3}, {"routing_top_k": 3}, {"train_lr": 0.1}, {"routing_capacity_factor": 9.0}):
        found.check(changed(config, **fields))
    for fields, said in (
        ({"routing_top_k": 1}, "--top-k 1: with --upcycle it must be at least 2"),
        ({"routing_top_k": 4}, "--top-k 4: with --upcycle it must be .*below --experts 4"),
        ({"model_experts": 2}, "--top-k 2: with --upcycle"),
        ({"model_shared_experts": 1}, "--model.shared-experts 1: must stay "),
        ({"model_expert_hidden": 9}, "--model.expert-hidden 9: must stay "),
        ({"routing_renormalise_gates": False}, "renormalise-gates False: must stay "),
        ({"model_width": 64}, "--model.width 64: must stay 32 with the dense run in dense"),
        ({"data_tokenizer": "byte"}, "--tokenizer byte: must stay bpe with the dense run in dense"),
        ({"_preset": "nano"}, "--preset nano: must stay story with the dense run in dense"),
    ):
        with pytest.raises(ConfigError, match=said):
            found.check(changed(config, **fields))
