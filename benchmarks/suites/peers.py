"""Our model and Mixtral of Hugging Face transformers, with the same shape, timed in turn.

The sizes are the preset's. The kinds of layers are Mixtral's: RMSNorm, rotary positions, SwiGLU, no biases, no dropout,
an untied head. Both train with AdamW, gradient clipping and the balance loss. A training step and a prefill are
compared in the same precision: float32, and bfloat16 too if our model takes it on this machine. Mixtral trains in it by
PyTorch's autocast; a prefill has its weights in bfloat16 on both sides. Then each side is compared in its faster
precision. Forward pass and decoding are float32 on both sides.

In training our model has a capacity and drops what exceeds it, unless the preset's dispatch is dropless. Mixtral has no
capacity.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import jax
import jax.numpy as jnp
from rich.console import Console

from moe_jax.config import ComputeDtype, ModelConfig, RoutingConfig, RunConfig, UserError
from moe_jax.model.costs import count_parameters, totals
from moe_jax.model.precision import choose_policy
from moe_jax.system.environment import usable_cores
from moe_jax.system.files import json_text
from moe_jax.system.machine import Measured, Times, alternate

from . import decoding, mixtral
from .mixtral import Shape
from .random_tokens import RandomTokenTrainer
from .request import WORDS, BenchmarkRequest, after_rest, print_numbers, times_table

PROMPT = 128
PAUSE_SECONDS = 0.2
"""Seconds of pause before each turn. In this time the waiting threads of the other process go to sleep."""
MIN_TURN_SECONDS = 0.5
"""Shortest turn in seconds. After the pause the processor was slow for a tenth of a second: one decoded token of our
model took 17 ms at first, and 9 ms later."""
SHARED_MODEL = (
    *("vocab_size", "seq_len", "layers", "width", "heads", "kv_heads", "head_size"),
    *("experts", "expert_hidden"),
)
SHARED_ROUTING = ("top_k", "capacity_factor", "dispatch")
"""Fields of the preset's model and of its routing that are kept."""


def like_mixtral(config: RunConfig) -> RunConfig:
    """The configuration with the kept fields and Mixtral's kinds of layers.

    Every other field of the model has its default value, which is off. So no extra can be forgotten here.
    """
    model = ModelConfig(
        **{name: getattr(config.model, name) for name in SHARED_MODEL},
        routing=RoutingConfig(**{name: getattr(config.model.routing, name) for name in SHARED_ROUTING}),
        norm="rmsnorm",
        positions="rope",
        activation="swiglu",
        bias=False,
        tied_head=False,
    )
    train = dataclasses.replace(config.train, optimizer="adamw", param_dtype="float32")
    execution = dataclasses.replace(config.execution, remat=False)
    return dataclasses.replace(config, model=model, train=train, execution=execution)


def precisions_of(config: RunConfig) -> list[str]:
    """The precisions of training steps and prefills on both sides: float32, and bfloat16 if a run of this configuration
    takes it here.

    Raises UserError on a device that trains in float16.
    """
    policy = choose_policy(config.execution.compute_dtype)
    if policy.loss_scaling:
        raise UserError("this device trains in float16, the peer in float32 or bfloat16: set JAX_PLATFORMS=cpu")
    return list(dict.fromkeys(["float32", policy.compute]))


def shape_of(config: RunConfig, batch_size: int) -> Shape:
    """The shape that the peer must build to be the same model. Raises UserError as `precisions_of` does."""
    model, train = config.model, config.train
    values = {name: getattr(model, name) for name in Shape._fields if hasattr(model, name)}
    values |= {name: getattr(train, name) for name in Shape._fields if hasattr(train, name)}
    values["top_k"] = model.routing.top_k
    prompt = min(PROMPT, model.seq_len)
    others = {"batch_size": batch_size, "prompt": prompt, "threads": usable_cores()}
    return Shape(**(values | others), precisions=precisions_of(config))


class Peer:
    """The process that runs Mixtral."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.about: dict[str, Any] = self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise UserError(
                f"the peer, Mixtral in PyTorch, ended with status {status}; its error is above, or (status -9) memory "
                "was full: take a smaller --batch-size or --preset"
            )
        return json.loads(line)

    def run(self, name: str) -> Measured:
        """Run a candidate once. Returns the seconds that the peer measured."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: `_answer` says so
            self._process.stdin.write(name + "\n")
            self._process.stdin.flush()
        return Measured(self._answer())


@contextmanager
def peer(shape: Shape) -> Iterator[Peer]:
    """Start the peer. Its process ends with the `with` block."""
    command = [sys.executable, "-P", "-W", "ignore::FutureWarning", mixtral.__file__]
    process = subprocess.Popen(
        [*command, json_text(shape._asdict())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield Peer(process)
    finally:
        process.kill()
        process.wait()


def compare(config: RunConfig, batch_size: int, rounds: int) -> tuple[dict[str, Any], dict[str, Times]]:
    """Mixtral's time divided by ours, with the faster of its two implementations of the experts; and all times.

    The ratios in bfloat16 are None where our model does not take it. Those named `best` compare each side in its faster
    precision.
    """
    config = like_mixtral(config)
    shape = shape_of(config, batch_size)
    trainers = {
        f"train-{precision}": RandomTokenTrainer.of(_in(config, precision), batch_size)
        for precision in shape.precisions
    }
    # A training step donates its state, so the other candidates read a copy of the parameters.
    params = jax.tree.map(jnp.copy, trainers["train-float32"].state.params)
    model = config.model
    prefills = {
        f"prefill-{precision}": decoding.prefill_call(model, params, shape.prompt, precision)
        for precision in shape.precisions
    }
    ours: dict[str, Callable[[], Any]] = {
        **trainers,
        "forward": decoding.forward_call(model, params, trainers["train-float32"].batch[0, :, :-1]),
        **prefills,
        "decode": decoding.token_call(model, params),
    }
    with peer(shape) as other:
        expected = totals(count_parameters(config.model)).total
        if other.about["parameters"] != expected:
            raise AssertionError(f"the peer has {other.about['parameters']} parameters, ours {expected}")
        theirs = {name: (lambda name=name: other.run(name)) for name in other.about["candidates"]}
        both = {name: after_rest(run, PAUSE_SECONDS, MIN_TURN_SECONDS) for name, run in {**ours, **theirs}.items()}
        times = alternate(both, rounds)
        versions = other.about["versions"]
    best = {name: min(t.median for other, t in times.items() if other.startswith(f"{name} ")) for name in ours}
    numbers: dict[str, Any] = {"train_ratio_bfloat16": None, "prefill_ratio_bfloat16": None}
    for name in ours:
        kind, _, precision = name.partition("-")
        numbers[f"{kind}_ratio" + (f"_{precision}" if precision else "")] = best[name] / times[name].median
    for kind, forms in {"train": trainers, "prefill": prefills}.items():
        numbers[f"{kind}_ratio_best"] = min(best[n] for n in forms) / min(times[n].median for n in forms)
    return numbers | {"peer": versions}, times


def _in(config: RunConfig, precision: str) -> RunConfig:
    execution = dataclasses.replace(config.execution, compute_dtype=cast(ComputeDtype, precision))
    return dataclasses.replace(config, execution=execution)


def against_mixtral(console: Console, request: BenchmarkRequest) -> dict[str, Any]:
    """The suite: our model compared with Mixtral of transformers."""
    numbers, times = compare(request.config, request.batch_size, request.rounds)
    console.print(times_table("our model, and Mixtral in PyTorch with its two implementations of experts", times))
    print_numbers(console, {name: value for name, value in numbers.items() if name in WORDS and value is not None})
    return numbers
