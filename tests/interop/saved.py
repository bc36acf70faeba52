"""A saved run whose every weight matters: all parameters are random, none is a one or a zero."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.config import DataConfig, ExecutionConfig, ModelConfig, RunConfig
from moe_jax.data.token_store import prepare_token_store
from moe_jax.model.transformer import create, split
from tests.support import saved_run

SHAPE = {"layers": 2, "width": 64, "heads": 4, "seq_len": 64, "experts": 8, "expert_hidden": 32}


def scale(shape: tuple[int, ...]) -> float:
    """Standard deviation of what is added to a parameter: a part of its own, so that logits stay of size 1."""
    return 0.1 if len(shape) == 1 else 0.3 / math.sqrt(min(shape[-2:]))


def save(folder: Path, tokenizer: str = "byte", model: ModelConfig | None = None, **changes: Any) -> Path:
    """Save a run. `changes` of SHAPE, or a whole `model` without a vocabulary. Returns its folder."""
    data = DataConfig(source=saved_run.stories(folder), tokenizer=tokenizer, vocab_size=300)  # pyright: ignore[reportArgumentType]
    store = prepare_token_store(data, progress=False, cache=folder / "cache")
    routing = {name: changes.pop(name) for name in ("top_k", "balancing", "renormalise_gates") if name in changes}
    model = model or ModelConfig(**(SHAPE | changes)).with_routing(**routing)  # pyright: ignore[reportArgumentType]
    model = dataclasses.replace(model, vocab_size=model.vocab_size or store.tokenizer.vocab_size)
    execution = ExecutionConfig(compute_dtype="float32")
    config = RunConfig(out=str(folder / "run"), model=model, data=data, execution=execution)
    _, params = split(create(model, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + scale(p.shape) * rng.normal(size=p.shape).astype(np.float32), params)
    return saved_run.save_checkpoint(config, store, params).path
