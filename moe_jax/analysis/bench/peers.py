"""Ours beside Mixtral of Hugging Face transformers: the same shape, the same run, in turn.

The shape is that of the preset with what Mixtral has: RMSNorm, rotary positions, SwiGLU, no biases, no dropout, an
untied head. Both train with AdamW, clipping and the balance loss. Ours has a capacity, and drops what exceeds it, in
training only, unless the preset's dispatch is dropless; theirs has none.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.analysis.accounting import count_parameters, totals
from moe_jax.analysis.bench import decoding
from moe_jax.analysis.bench.mixtral import Shape
from moe_jax.analysis.bench.timing import Measured, Times, alternate
from moe_jax.analysis.bench.training import Trainer
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.model.moe import Mode
from moe_jax.model.transformer import Params, merge
from moe_jax.training.run import abstract_model

PROMPT = 128
REST = 0.2
"""Seconds before each turn, in which the threads of the other process stop waiting for more work and sleep."""
TURN = 0.5
"""Least seconds of a turn. Processors that have slept so long were slow for a tenth of a second: a token of ours took
17 ms at first, and 9 then."""


KEPT = (
    *("vocab_size", "seq_len", "layers", "width", "heads", "experts", "top_k", "expert_hidden"),
    *("capacity_factor", "dispatch", "priority"),
)
"""What stays of a preset's model: its shape, and how training brings tokens to experts."""


def like_mixtral(config: RunConfig) -> RunConfig:
    """The configuration with what Mixtral has in place of what it has not. Every other field of the model takes its
    default, which is to be off, so that no extra can be forgotten here."""
    model = ModelConfig(
        **{name: getattr(config.model, name) for name in KEPT},
        norm="rmsnorm",
        positions="rope",
        activation="swiglu",
        bias=False,
        tied_head=False,
    )
    train = dataclasses.replace(config.train, optimizer="adamw", weights="float32", remat=False)
    return dataclasses.replace(config, model=model, train=train)


def shape_of(config: RunConfig, batch_size: int) -> Shape:
    """What the peer has to build to be the same."""
    model, train = config.model, config.train
    values = {name: getattr(model, name) for name in Shape._fields if hasattr(model, name)}
    values |= {name: getattr(train, name) for name in Shape._fields if hasattr(train, name)}
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    prompt = min(PROMPT, model.seq_len)
    return Shape(**(values | {"batch_size": batch_size, "prompt": prompt, "threads": threads}))


class Peer:
    """The other process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.about: dict[str, Any] = self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended with status {self._process.wait()}")
        return json.loads(line)

    def run(self, name: str) -> Measured:
        """Run a candidate once; the seconds that it took there."""
        assert self._process.stdin is not None
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        return Measured(self._answer())


@contextmanager
def peer(shape: Shape) -> Iterator[Peer]:
    """A process of the peer, which ends with the block."""
    command = [
        sys.executable,
        "-W",
        "ignore::FutureWarning",
        "-m",
        "moe_jax.analysis.bench.mixtral",
        json.dumps(shape._asdict()),
    ]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Peer(process)
    finally:
        process.kill()
        process.wait()


def forward_call(config: RunConfig, params: Params, batch: Any) -> Callable[[], Any]:
    """A pass over a batch without drops, with the logits of every position."""
    graphdef, _ = abstract_model(config, "float32")

    @jax.jit
    def run(params: Params, tokens: jax.Array) -> jax.Array:
        model = merge(graphdef, params)
        return model.logits(model(tokens, Mode.EVALUATE)[0])

    return lambda: run(params, batch)


def compare(config: RunConfig, batch_size: int, rounds: int) -> tuple[dict[str, Any], dict[str, Times]]:
    """Ratios of their time over ours, by the faster of their implementations; and all times."""
    config = like_mixtral(config)
    shape = shape_of(config, batch_size)
    trainer = Trainer.of(config, batch_size)
    # The step takes its state's memory over, so what the other candidates read is a copy.
    params = jax.tree.map(jnp.copy, trainer.state.params)
    decode = decoding.DecodeLoop(config, params, 1)
    ours: dict[str, Callable[[], Any]] = {
        "train": trainer,
        "forward": forward_call(config, params, trainer.batch[0, :, :-1]),
        "prefill": decoding.prefill_call(config, params, shape.prompt),
        "decode": decode,
    }
    with peer(shape) as other:
        expected = totals(count_parameters(config.model)).total
        if other.about["parameters"] != expected:
            raise AssertionError(f"the peer has {other.about['parameters']} parameters, ours {expected}")
        theirs = {name: (lambda name=name: other.run(name)) for name in other.about["candidates"]}
        times = alternate({**ours, **theirs}, rounds, rest=REST, turn=TURN)
        versions = other.about["versions"]
    numbers: dict[str, Any] = {}
    for name in ours:
        best = min(t.median for other, t in times.items() if other.startswith(f"{name} "))
        numbers[f"{name}_ratio"] = best / times[name].median
    return numbers | {"peer": versions}, times
