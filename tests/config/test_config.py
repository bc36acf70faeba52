"""Configuration: the capacity formula as a table, and errors that name the flag, the value and what is allowed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from moe_jax.config import (
    SECTIONS,
    ConfigError,
    DataConfig,
    ExecutionConfig,
    ModelConfig,
    RoutingConfig,
    RunConfig,
    TrainConfig,
    UserError,
    capacity,
)
from moe_jax.config.presets import preset
from moe_jax.config.section import flag_of, long_flag
from moe_jax.parallel.experts import device_rows
from moe_jax.runs.catalog import load_config


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "factor", "slots", "why"),
    [
        (256, 8, 2, 1.0, 64, "256 * 2 / 8"),
        (1000, 10, 1, 1.1, 110, "exactly 110; in binary 1.1 is above 11/10, which gave 111"),
        (7680, 8, 1, 4.05, 3888, "exactly 3888; in float32 it is 3889"),
        (256, 8, 2, 0.5, 32, "a factor below 1 drops even at balance"),
        (256, 8, 2, 1e-9, 1, "never 0"),
        (1, 8, 2, 1.0, 1, "a single token: 0.25, rounded up"),
        (2, 64, 1, 1.0, 1, "fewer tokens than experts"),
        (3, 2, 1, 8.0, 3, "12, but an expert can be chosen by 3 tokens only"),
        (8, 4, 4, 1.0, 8, "K = E: every expert serves every token"),
        (8, 1, 1, 2.0, 8, "E = 1, capped at T"),
    ],
)
def test_capacity(tokens: int, experts: int, top_k: int, factor: float, slots: int, why: str) -> None:
    assert capacity(tokens, experts, top_k, factor) == slots, why
    routing = RoutingConfig(top_k=top_k, capacity_factor=factor)
    model = ModelConfig(seq_len=max(tokens, 2), experts=experts, routing=routing)
    assert model.capacity == capacity(max(tokens, 2), experts, top_k, factor)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "devices", "factor", "rows", "why"),
    [
        (256, 8, 2, 4, 2.0, 256, "the fair share is 512 / 4 = 128"),
        (256, 8, 2, 4, 1.1, 141, "140.8, rounded up"),
        (10, 4, 1, 2, 1.1, 6, "5.5, rounded up"),
        (256, 8, 2, 2, 2.0, 512, "all choices: nothing is dropped on two devices"),
        (256, 8, 2, 4, 9.0, 512, "never more than all choices"),
        (256, 8, 4, 4, 9.0, 512, "a token has at most 2 choices on a device with 2 experts"),
        (256, 8, 2, 8, 9.0, 256, "one expert a device: a token chooses it once"),
        (4, 8, 1, 8, 0.01, 1, "never 0"),
    ],
)
def test_device_rows(tokens: int, experts: int, top_k: int, devices: int, factor: float, rows: int, why: str) -> None:
    assert device_rows(tokens, experts, top_k, devices, factor) == rows, why


TIED = {"tie_value_output_init": True}


@pytest.mark.parametrize(
    ("kind", "values", "flag", "allowed"),
    [
        (ModelConfig, {"routing": RoutingConfig(top_k=9)}, "--top-k 9", "between 1 and --experts 8"),
        (ModelConfig, {"routing": RoutingConfig(top_k=0)}, "--top-k 0", "between 1 and --experts 8"),
        (ModelConfig, {"heads": 3}, "--model.heads 3", "a divisor of --model.width 128"),
        (ModelConfig, {"head_size": 7}, "--model.head-size 7", "even, which RoPE needs"),
        (ModelConfig, {"kv_heads": 3}, "--model.kv-heads 3", "0, or a divisor of --model.heads 4"),
        (ModelConfig, {"kv_heads": 2, **TIED}, "--model.kv-heads 2", "0 or --model.heads 4, since --model.tie-value-"),
        (ModelConfig, {"head_size": 16, **TIED}, "--model.head-size 16", "--model.width / --model.heads = 128 / 4"),
        (
            ModelConfig,
            {"rope_scaling": "{"},
            "--model.rope-scaling {",
            "an object with the rope_type linear, llama3",
        ),
        (
            ModelConfig,
            {"rope_scaling": '{"rope_type": "linear"}'},
            '--model.rope-scaling {"rope_type": "linear"}',
            "an object with factor",
        ),
        (ModelConfig, {"rope_theta": 1e6, "positions": "learned"}, "--model.rope-theta 1000000.0", "left out"),
        (ModelConfig, {"norm_eps": 1e-13}, "--model.norm-eps 1e-13", "0, or between 1e-12 and 1"),
        (RoutingConfig, {"capacity_factor": float("nan")}, "--capacity-factor nan", "a finite number above 0"),
        (ModelConfig, {"dropout": 1.0}, "--model.dropout 1.0", "at least 0 and below 1"),
        (ModelConfig, {"experts": 0, "routing": RoutingConfig(top_k=0)}, "--experts 0", "between 1 and 4,096"),
        (RoutingConfig, {"dispatch": "magic"}, "--dispatch magic", "one of capacity, blocks"),
        (ModelConfig, {"rope_theta": 0.5}, "--model.rope-theta 0.5", "between 1 and 1e+09"),
        (TrainConfig, {"lr": 0.0}, "--lr 0.0", "between 1e-12 and 1000"),
        (TrainConfig, {"beta2": 1.0}, "--train.beta2 1.0", "between 0 and"),
        (DataConfig, {"vocab_size": 10}, "--data.vocab-size 10", "between 257 and"),
        (DataConfig, {"source": " "}, "--data  ", "a corpus name or a path"),
    ],
)
def test_errors_name_flag_value_and_what_is_allowed(
    kind: type, values: dict[str, Any], flag: str, allowed: str
) -> None:
    with pytest.raises(ConfigError) as error:
        kind(**values)
    text = str(error.value)
    assert text.startswith(f"{flag}: must be ")
    assert allowed in text
    assert "\n" not in text


def test_heads_need_not_divide_the_width() -> None:
    """Nine heads of width 64 on three key heads, of a stream that 9 does not divide."""
    model = ModelConfig(width=580, heads=9, kv_heads=3, head_size=64)
    assert (model.head_width, model.key_value_heads) == (64, 3)
    assert (ModelConfig().head_width, ModelConfig().key_value_heads) == (32, 4)
    tied = ModelConfig(kv_heads=4, head_size=32, **TIED)  # the defaults, spelled out
    assert (tied.head_width, tied.key_value_heads) == (32, 4)


def test_every_field_survives_json() -> None:
    """Every field of every section has another value than by default."""
    routing = RoutingConfig(
        top_k=3,
        capacity_factor=0.75,
        dispatch="blocks",
        balancing="bias",
        renormalise_gates=False,
        device_capacity_factor=3.0,
    )
    config = RunConfig(
        preset="story",
        out="somewhere",
        resume=True,
        upcycle="elsewhere",
        base="there",
        model=ModelConfig(
            *(7, 6, 5, 12, 3, 3, 4, 9, 24, 2, True, "active", "gelu", "layernorm", 0.5, "learned", 10_000.0, ""),
            *(True, True, "full", False, True, 2.0, 0.1, 0.2, 3.0, True, True, 0.25, 0.5),
            routing=routing,
        ),
        data=DataConfig("pg19", "byte", 300, 5, 7, "chat"),
        train=TrainConfig(
            *(8, 5.0, 2, 3, "muon", 0.5, 0.25, True, "linear", 0.1, 9, 0.8, 0.9, 1e-6, 0.2, 2.0, 0.02, 0.002, 0.003),
            *("bfloat16", 11, 12, 13, 14, 4, 15, 16.0, True),
        ),
        execution=ExecutionConfig("bfloat16", True, True, "data=1", "any", "3.5GiB"),
    )
    for section in ("", *SECTIONS):
        there, default = config.section(section), RunConfig().section(section)
        same = [f.name for f in dataclasses.fields(there) if getattr(there, f.name) == getattr(default, f.name)]
        # Learned positions have no base of a rotation. A run starts from one thing only.
        needless = {"": ["init_from"], "model": ["rope_theta", "rope_scaling"]}.get(section, [])
        assert same == needless, "give each new field a value above that is not its default"
    imported = dataclasses.replace(config, upcycle="", init_from="elsewhere")
    for written in (config, imported):
        assert RunConfig.from_dict(json.loads(json.dumps(written.to_dict()))) == written


def test_a_run_starts_from_one_thing_and_an_imported_tokenizer_from_a_folder() -> None:
    with pytest.raises(ConfigError, match=r"^--init-from a: --upcycle b says too what the run starts from; give one$"):
        RunConfig(init_from="a", upcycle="b")
    with pytest.raises(ConfigError, match=r"^--tokenizer hf: must be gpt2, bpe or byte, unless --init-from"):
        RunConfig(data=DataConfig(tokenizer="hf"))


def test_unknown_presets_schemas_and_fields_are_refused() -> None:
    with pytest.raises(ConfigError, match="--preset huge"):
        preset("huge")
    values = preset("nano").to_dict()
    with pytest.raises(UserError, match="schema version 99"):
        RunConfig.from_dict(values | {"schema_version": 99})
    with pytest.raises(UserError, match="'colour'"):
        RunConfig.from_dict(values | {"model": values["model"] | {"colour": 1}})
    with pytest.raises(ConfigError, match="--top-k 99"):
        RunConfig.from_dict(values | {"routing": values["routing"] | {"top_k": 99}})


def test_flags() -> None:
    config = RunConfig()
    assert flag_of(config.train, "beta2") == "--train.beta2"
    assert flag_of(config.train, "batch_size") == "--batch-size"
    assert flag_of(config.model, "expert_hidden") == "--model.expert-hidden"
    assert flag_of(config, "out") == "--out"
    assert flag_of(config.model.routing, "top_k") == "--top-k"
    assert long_flag(config.model.routing, "top_k") == "--routing.top-k"


def test_a_folder_holds_a_run_once_it_has_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(preset("nano").to_dict()))
    (tmp_path / "checkpoints" / "tmp_00000005_99").mkdir(parents=True)
    assert load_config(tmp_path) is None
    (tmp_path / "checkpoints" / "step_00000005").mkdir()
    assert load_config(tmp_path) == preset("nano")
    for text in ("{", "[]", '{"schema_version": 1, "model": 3}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json"):
            load_config(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        load_config(tmp_path)
