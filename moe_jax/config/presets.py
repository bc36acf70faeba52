"""The presets: named settings that a run starts from. `benchmarks/` has the measurements behind each preset."""

import dataclasses

from moe_jax.config.model import ModelConfig, RoutingConfig
from moe_jax.config.run import RunConfig
from moe_jax.config.train import DataConfig, TrainConfig
from moe_jax.system.errors import ConfigError

NANO = RunConfig(
    preset="nano",
    model=ModelConfig(layers=3, tie_value_output_init=True, qk_norm="head"),
    data=DataConfig(stories=20_000, eval_tokens=16_384),
    train=TrainConfig(steps=900, optimizer="muon", muon_lr=0.02, lr=5e-3, batch_size=8),
)

STORY = RunConfig(
    preset="story",
    model=ModelConfig(layers=6, width=192, heads=6, experts=8, expert_hidden=256, tie_value_output_init=True),
    data=DataConfig(source="tinystories", vocab_size=4096),
    train=TrainConfig(steps=4000, batch_size=16, lr=2e-3, warmup_steps=100),
)

STORY_CPU = RunConfig(
    preset="story-cpu",
    model=ModelConfig(
        layers=4,
        width=192,
        heads=4,
        kv_heads=2,
        seq_len=512,
        experts=16,
        expert_hidden=64,
        tied_head=False,
        scaled_embedding=True,
        zero_init_residual=True,
        qk_norm="head",
        dropout=0.05,
        routing=RoutingConfig(top_k=4, dispatch="blocks"),
    ),
    data=DataConfig(source="tinystories", vocab_size=2048),
    train=TrainConfig(
        steps=4863,
        batch_size=8,
        optimizer="muon",
        muon_lr=0.03,
        muon_router=True,
        lr=8e-3,
        lr_schedule="linear",
        warmup_steps=20,
        aux_loss_coef=0.02,
        eval_every=400,
        save_every=400,
    ),
)
"""A preset for two CPU cores and 2.5 million training tokens. `benchmarks/trials.md` lists the trials.

It has few active parameters, because the budget has few tokens. It has narrow experts, because a Muon step of a
narrow matrix is cheap. The number of steps follows from a budget of 2e14 floating-point operations.
"""

STORY_4GB = dataclasses.replace(
    STORY_CPU,
    preset="story-4gb",
    model=dataclasses.replace(
        STORY_CPU.model, layers=8, width=512, heads=8, kv_heads=0, experts=16, expert_hidden=256, dropout=0.0
    ),
    data=DataConfig(source="tinystories", vocab_size=8192),
    train=dataclasses.replace(STORY_CPU.train, steps=5000, batch_size=16, eval_every=500, save_every=500),
)
"""The recipe of `story-cpu`, larger, for a 4 GB card and TinyStories: 41 million tokens, as `seed-158m` has.

Compiled for an RTX 3050 it takes 1,534 MiB with remat, which `train.py` turns on there. This has not been measured
on a card yet.
"""

SEED_158M = RunConfig(
    preset="seed-158m",
    model=ModelConfig(
        layers=6,
        width=512,
        heads=8,
        experts=16,
        expert_hidden=1024,
        norm="layernorm",
        positions="learned",
        activation="gelu",
        bias=True,
        tied_head=False,
        dropout=0.1,
        attention_dropout=0.1,
    ),
    data=DataConfig(source="tinystories", tokenizer="gpt2", eval_tokens=16_384),
    train=TrainConfig(
        steps=5000,
        batch_size=4,
        grad_accum=8,
        optimizer="adamw-8bit",
        lr=3e-4,
        beta2=0.999,
        weight_decay=0.01,
        warmup_steps=100,
        eval_every=500,
        save_every=500,
    ),
)
"""The PyTorch model of 158,623,744 parameters and its recipe, with AdamW's moments in 8 bits instead of 32.

So it fits a 4 GB card of either kind. Without tensor cores a card computes in float32, and there the weights, the
gradients and the moments of 32 bits alone take 2,420 MiB, more than the 2,402 that a run may use. The losses of
both optimizers are in `benchmarks/performance.md`: they differ less than those of two seeds.
"""

MAX_4GB = RunConfig(
    preset="max-4gb",
    model=ModelConfig(layers=8, width=768, heads=12, experts=20, expert_hidden=1024),
    data=DataConfig(source="tinystories", tokenizer="gpt2", eval_tokens=16_384),
    train=TrainConfig(
        steps=5000,
        batch_size=32,
        optimizer="adafactor",
        lr=1e-3,
        weight_decay=0.01,
        warmup_steps=100,
        param_dtype="bfloat16",
        eval_every=500,
        save_every=500,
    ),
)
"""The largest preset that trains on a 4 GB card with tensor cores. Without them a card computes in float32, and
this does not fit. Bytes a parameter: weight 2, gradient 2, optimizer state 0.01."""

PRESETS = {config.preset: config for config in (NANO, STORY, STORY_CPU, STORY_4GB, SEED_158M, MAX_4GB)}


def preset(name: str) -> RunConfig:
    """The settings of a preset. Raises ConfigError for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(f"--preset {name}: must be one of " + ", ".join(PRESETS))
    return PRESETS[name]


def largest_vocabulary(data: DataConfig) -> int:
    """Most entries of the tokenizer, the separator included. A `bpe` tokenizer of a small text has fewer.

    The model of a run with a `hf` tokenizer knows its own size, so nothing is known of the tokenizer here.
    """
    return {"gpt2": 50_257, "byte": 257, "bpe": data.vocab_size, "hf": 1}[data.tokenizer]


def with_vocabulary(config: RunConfig) -> RunConfig:
    """The settings with the vocabulary size that the tokenizer will have at most, without building the tokenizer."""
    return config.override({("model", "vocab_size"): config.model.vocab_size or largest_vocabulary(config.data)})
