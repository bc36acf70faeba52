"""Every field of an old configuration, by hand: what it is called now, and where.

"Old" is schema version 1, as commit d25d821 wrote it. The whole old run is in `test_migrations.py`.
"""

import copy
import dataclasses
from typing import Any

import pytest

from moe_jax.config import ConfigError, RunConfig, UserError
from moe_jax.config.migrations import migrate_config
from tests.runs.test_migrations import old_config

TABLE: dict[tuple[str, str], tuple[Any, str, str, Any]] = {
    # (old section, old name): (a value that is not the fixture's, new section, new name, new value)
    ("", "preset"): ("story", "", "preset", "story"),
    ("", "out"): ("runs/other", "", "out", "runs/other"),
    ("", "resume"): (True, "", "resume", True),
    ("", "upcycle"): ("runs/dense", "", "upcycle", "runs/dense"),
    ("", "deterministic"): (True, "execution", "deterministic", True),
    ("", "tensorboard"): (True, "", "tensorboard", True),
    ("", "wandb"): (True, "", "wandb", True),
    ("model", "vocab_size"): (400, "model", "vocab_size", 400),
    ("model", "seq_len"): (64, "model", "seq_len", 64),
    ("model", "layers"): (3, "model", "layers", 3),
    ("model", "width"): (32, "model", "width", 32),
    ("model", "heads"): (4, "model", "heads", 4),
    ("model", "experts"): (8, "model", "experts", 8),
    ("model", "top_k"): (3, "routing", "top_k", 3),
    ("model", "expert_hidden"): (12, "model", "expert_hidden", 12),
    ("model", "capacity_factor"): (0.75, "routing", "capacity_factor", 0.75),
    ("model", "norm"): ("layernorm", "model", "norm", "layernorm"),
    ("model", "positions"): ("learned", "model", "positions", "learned"),
    ("model", "activation"): ("gelu", "model", "activation", "gelu"),
    ("model", "bias"): (True, "model", "bias", True),
    ("model", "tied_head"): (False, "model", "tied_head", False),
    ("model", "copying_heads"): (False, "model", "tie_value_output_init", False),
    ("model", "scaled_embedding"): (True, "model", "scaled_embedding", True),
    ("model", "quiet_branches"): (True, "model", "zero_init_residual", True),
    ("model", "qk_norm"): (True, "model", "qk_norm", "head"),
    ("model", "dropout"): (0.25, "model", "dropout", 0.25),
    ("model", "attention_dropout"): (0.25, "model", "attention_dropout", 0.25),
    ("model", "dispatch"): ("blocks", "routing", "dispatch", "blocks"),
    ("model", "dense"): ("active", "model", "dense", "active"),
    ("model", "priority"): ("leaky-choice-major", "routing", "priority", "leaky-choice-major"),
    ("model", "balancing"): ("bias", "routing", "balancing", "bias"),
    ("model", "shared_experts"): (1, "model", "shared_experts", 1),
    ("model", "router_noise"): (0.5, "routing", "logit_noise", 0.5),
    ("model", "router_jitter"): (0.125, "routing", "input_jitter", 0.125),
    ("model", "eval_capacity_factor"): (2.0, "routing", "eval_capacity_factor", 2.0),
    ("data", "source"): ("tinystories", "data", "source", "tinystories"),
    ("data", "tokenizer"): ("byte", "data", "tokenizer", "byte"),
    ("data", "vocab_size"): (500, "data", "vocab_size", 500),
    ("data", "stories"): (70, "data", "stories", 70),
    ("data", "stories_seed"): (5, "data", "stories_seed", 5),
    ("data", "eval_tokens"): (300, "data", "eval_tokens", 300),
    ("train", "steps"): (9, "train", "steps", 9),
    ("train", "batch_size"): (3, "train", "batch_size", 3),
    ("train", "grad_accum"): (2, "train", "grad_accum", 2),
    ("train", "optimizer"): ("adamw-8bit", "train", "optimizer", "adamw-8bit"),
    ("train", "lr"): (0.25, "train", "lr", 0.25),
    ("train", "muon_lr"): (0.5, "train", "muon_lr", 0.5),
    ("train", "muon_router"): (True, "train", "muon_router", True),
    ("train", "final_lr"): (0.125, "train", "final_lr_ratio", 0.125),
    ("train", "decay"): ("linear", "train", "lr_schedule", "linear"),
    ("train", "warmup_steps"): (7, "train", "warmup_steps", 7),
    ("train", "beta1"): (0.5, "train", "beta1", 0.5),
    ("train", "beta2"): (0.75, "train", "beta2", 0.75),
    ("train", "eps"): (0.25, "train", "eps", 0.25),
    ("train", "weight_decay"): (0.5, "train", "weight_decay", 0.5),
    ("train", "clip"): (2.5, "train", "max_grad_norm", 2.5),
    ("train", "balance_coef"): (0.5, "train", "aux_loss_coef", 0.5),
    ("train", "balance_rate"): (0.25, "train", "router_bias_lr", 0.25),
    ("train", "z_coef"): (0.125, "train", "z_loss_coef", 0.125),
    ("train", "precision"): ("bfloat16", "execution", "compute_dtype", "bfloat16"),
    ("train", "weights"): ("bfloat16", "train", "param_dtype", "bfloat16"),
    ("train", "remat"): (True, "execution", "remat", True),
    ("train", "seed"): (11, "train", "seed", 11),
    ("train", "log_every"): (13, "train", "log_every", 13),
    ("train", "eval_every"): (14, "train", "eval_every", 14),
    ("train", "save_every"): (15, "train", "save_every", 15),
    ("train", "skip_spikes"): (True, "train", "skip_spikes", True),
    ("train", "patience"): (16, "train", "patience", 16),
}
NEW = {("model", name) for name in ("kv_heads", "head_size", "norm_eps", "rope_theta")} | {
    *(
        ("routing", "renormalise_gates"),
        ("routing", "device_capacity_factor"),
        ("data", "format"),
        ("", "init_from"),
        ("", "base"),
        ("", "trackio"),
        ("execution", "mesh"),
    ),
    *(("train", name) for name in ("lora_rank", "lora_alpha", "train_router")),
}
"""Fields that version 1 did not have. Their defaults are what version 1 computed."""
GONE = {("", "verify_resume"), ("model", "ngrams"), ("model", "ngram_rows")}


def section_of(config: dict[str, Any], name: str) -> dict[str, Any]:
    return config[name] if name else config


def test_the_table_holds_every_old_field_and_reaches_every_new_one() -> None:
    """A new setting goes into NEW, above, if its default computes what version 1 computed. Otherwise it needs a step in
    `moe_jax/config/migrations.py` and a row of TABLE."""
    old = old_config()
    sections = ("model", "data", "train")
    names = {("", name) for name in old} - {("", s) for s in (*sections, "schema_version", "versions", "history")}
    names |= {(section, name) for section in sections for name in old[section]}
    assert set(TABLE) | GONE == names
    new = RunConfig().to_dict()
    fields = {("", name) for name in new if not isinstance(new[name], dict)} - {("", "schema_version")}
    fields |= {(section, name) for section in new if isinstance(new[section], dict) for name in new[section]}
    assert {(section, name) for _, section, name, _ in TABLE.values()} | NEW == fields


@pytest.mark.parametrize("field", TABLE, ids=lambda field: ".".join(field).lstrip("."))
def test_an_old_field_becomes_its_new_one_and_changes_no_other(field: tuple[str, str]) -> None:
    value, section, name, expected = TABLE[field]
    old, before = old_config(), migrate_config(old_config())
    there = section_of(old, field[0])
    assert there[field[1]] != value, "the table must change the fixture"
    there[field[1]] = value
    given = copy.deepcopy(old)
    found = migrate_config(old)
    assert old == given, "what was given was changed"
    wanted = copy.deepcopy(before)
    section_of(wanted, section)[name] = expected
    assert found == wanted
    assert found != before
    assert getattr(RunConfig.from_dict(given).section(section), name) == expected


@pytest.mark.parametrize(
    ("old", "new"), [("gather", "capacity"), ("einsum", "capacity"), ("blocks", "blocks"), ("dense", "blocks")]
)
def test_the_four_old_dispatches(old: str, new: str) -> None:
    """einsum filled the slots of gather, and dense dropped nothing, as blocks does."""
    document = old_config()
    document["model"]["dispatch"] = old
    assert RunConfig.from_dict(document).model.routing.dispatch == new


def test_a_new_configuration_is_not_migrated_twice() -> None:
    present = RunConfig().to_dict()
    assert migrate_config(present) == present
    assert migrate_config(migrate_config(old_config())) == migrate_config(old_config())


@pytest.mark.parametrize(("old", "new"), [(True, "head"), (False, "none")])
def test_normalised_queries_of_version_2(old: bool, new: str) -> None:
    """Version 2 has every present name, but for what is new. True normalised each head."""
    document = RunConfig().to_dict() | {"schema_version": 2}
    document["model"] = {name: value for name, value in document["model"].items() if ("model", name) not in NEW}
    document["routing"] = {n: value for n, value in document["routing"].items() if ("routing", n) not in NEW}
    document["model"]["qk_norm"] = old
    given = copy.deepcopy(document)
    found = RunConfig.from_dict(document)
    assert document == given, "what was given was changed"
    expected = RunConfig()
    assert found == dataclasses.replace(expected, model=dataclasses.replace(expected.model, qk_norm=new))


@pytest.mark.parametrize("odd", [1, 0, None, [], "both"], ids=str)
def test_odd_values_of_version_2_are_refused_by_name(odd: Any) -> None:
    """1 is no true: version 2 never wrote it."""
    document = {"schema_version": 2, "model": {"qk_norm": odd}}
    with pytest.raises((UserError, ConfigError), match=r"qk.norm") as error:
        RunConfig.from_dict(document)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model", [None, "text", 3, [1]], ids=str)
def test_a_model_that_is_no_object_is_named(model: Any) -> None:
    with pytest.raises(UserError, match=r"model is .* must be an object"):
        RunConfig.from_dict({"schema_version": 2, "model": model})
