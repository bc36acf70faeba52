"""Runs for tests: a tiny one on the disk, made without training (random parameters, metrics by hand); quick ones."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from moe_jax.analysis.saved_traces import make_tracer
from moe_jax.config import DataConfig, RunConfig, TrainConfig
from moe_jax.data.token_store import prepare
from moe_jax.training.checkpoint import CheckpointStore
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.run import RunFolder
from moe_jax.training.state import initial_state
from tests import tiny

STEP = 40
STORY = "Once upon a time a dragon met a cat. The cat said hello to the dragon, and they ate a cake.\n"


@contextmanager
def quick_training(cache: Path) -> Iterator[pytest.MonkeyPatch]:
    """Whole runs within take little time for what is not training, and keep their data in a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_JAX_CACHE", str(cache))
        patch.setattr("moe_jax.training.loop.SAMPLE_TOKENS", 24)
        patch.setattr("moe_jax.training.recorder.matmul_rate", lambda dtype: 1e9)  # only for the share of peak
        yield patch


def save_run(folder: Path, **model_changes: object) -> Path:
    """A run of the byte tokenizer whose text is beside it; T = 16, two layers, four experts. Returns its folder."""
    text = folder / "text.txt"
    text.write_text("<|endoftext|>".join(f"{STORY}{i}" for i in range(60)))
    model = tiny.config(**({"vocab_size": 257, "seq_len": 16, "capacity_factor": 1.0} | model_changes))
    train = TrainConfig(steps=STEP, precision="float32")
    data = DataConfig(source=str(text), tokenizer="byte")
    config = RunConfig(out=str(folder / "run"), model=model, data=data, train=train)
    store = prepare(data, progress=False, cache=folder / "cache")
    run = RunFolder(folder / "run")
    run.start(config, store.tokenizer, [])
    graphdef, params = tiny.build(model)
    state = initial_state(params, make_optimizer(train), loss_scaling=False)
    state = dataclasses.replace(state, step=np.int32(STEP))
    context = {"data": store.digest, "tokenizer": store.tokenizer.digest}
    CheckpointStore(run.path).save(state, STEP, val_loss=1.0, elapsed=1.0, context=context)
    run.metrics.write_text("".join(json.dumps(r) + "\n" for r in metrics(model.layers, model.experts)))
    tracer = make_tracer(model, graphdef, store.valid.tokens)
    if tracer is not None:
        for step, seed in ((STEP // 2, 1), (STEP, 0)):
            run.add_trace(step, tracer(tiny.build(model, seed)[1]))
    run.write_summary({"val_bits_per_byte": 1.5, "entropy_floor_bits_per_byte": 0.5})
    return run.path


def metrics(layers: int, experts: int) -> list[dict]:
    """A router that is even in layer 0, and in the other layers sends all to expert 0 from step 30 on."""
    even = [1 / experts] * experts
    collapsed = [1.0] + [0.0] * (experts - 1)
    records = []
    for step in range(10, STEP + 1, 10):
        load = [even] + [collapsed if step >= 30 else even] * (layers - 1)
        values = {"loss": 5 - step / 10, "balance_loss": 1.0, "drop_fraction": 0.1, "lr": 1e-3, "load": load}
        records.append({"step": step, "split": "train", "tokens_per_second": 100.0, **values})
    records.append({"step": STEP, "split": "val", "loss": 1.2, "bits_per_byte": 1.5})
    return records
