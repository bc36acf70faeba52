"""Decoding with weights of 32, 16, 8 and 4 bits, and beside llama.cpp."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from moe_jax.benchmarks import decoding, llama_cpp
from moe_jax.benchmarks.peers import like_mixtral
from moe_jax.benchmarks.request import BenchmarkRequest, print_numbers, times_table
from moe_jax.config import DataConfig, ModelConfig, RunConfig
from moe_jax.data.tokenizers import train_tokenizer
from moe_jax.model.moe.layer import MoE
from moe_jax.model.precision import to_param_dtype
from moe_jax.model.quantize import WEIGHTS, quantize
from moe_jax.model.transformer import Params, create, split
from moe_jax.runs.arrays import named_leaves
from moe_jax.system.machine import alternate

FORMS = ("float32", "bfloat16", *WEIGHTS)
REST_SECONDS, TURN_SECONDS = 0.02, 0.1
"""llama.cpp's threads spin for a while after each call: they get time to sleep before the next candidate."""
PROMPT = 128
MOST_SPREAD = 0.5
"""Interquartile range / median, from which on the ratios beside llama.cpp say little."""


def compare_weights(console: Console, request: BenchmarkRequest, params: Params) -> dict[str, Any]:
    """The time of a token at batch 1 for each form of the weights, and beside llama.cpp."""
    model = request.config.model
    forms = {form: in_form(params, form) for form in FORMS}
    calls = {form: token_call(model, weights, request.moe) for form, weights in forms.items()}
    times = alternate(calls, 3 * request.rounds)
    base = times["float32"].median
    console.print(times_table("a token at batch 1", times, lambda _, t: f"{t.median / base:.2f} of float32"))
    numbers: dict[str, Any] = {}
    for form, weights in forms.items():
        numbers[f"{form}_ms_per_token"] = times[form].median * 1e3
        numbers[f"{form}_of_float32"] = times[form].median / base
        numbers[f"{form}_bytes_per_token"] = bytes_per_token(model, weights)
    print_numbers(console, numbers)
    return {"weights": numbers, "llama_cpp": beside_llama_cpp(console, request)}


def in_form(params: Params, form: str) -> Params:
    """Parameters in float32 in another form. bfloat16 leaves vectors as they are."""
    if form == "float32":
        return params
    return to_param_dtype(params, "bfloat16") if form == "bfloat16" else quantize(params, form)  # pyright: ignore[reportArgumentType]


def token_call(model: ModelConfig, weights: Params, moe: type[MoE] = MoE) -> Callable[[], Any]:
    """A token at batch 1. Activations are in float32, as `generate` computes on a CPU."""
    return decoding.token_call(decoding.Model.of(model, moe), weights)


def bytes_per_token(model: ModelConfig, params: Params) -> int:
    """Bytes of the parameters that one token reads: one row of an embedding that is not the head, one position, K of E
    experts, and everything else."""
    total = 0
    for name, leaf in named_leaves(params).items():
        size = leaf.nbytes
        if name.startswith("embedding") and not model.tied_head:
            size //= model.vocab_size
        elif name == "position":
            size //= model.seq_len
        elif ".ffn.experts." in name and model.dense == "none":
            size = size * model.routing.top_k // model.experts
        total += size
    return total


def beside_llama_cpp(console: Console, request: BenchmarkRequest) -> dict[str, Any]:
    """Rates of llama.cpp and of ours in the same shape, as ratios above 1 where ours is faster; or why there are none.

    A shape that llama.cpp does not have is measured in Mixtral's form on both sides.
    """
    config = request.config
    if llama_cpp.architecture_problem(config):
        config = like_mixtral(config)
    if reason := llama_cpp.why_not(config):
        console.print(f"llama.cpp: skipped, {reason}\n")
        return {"skipped": reason}
    _, params = split(create(config.model, jax.random.key(0)))
    with tempfile.TemporaryDirectory() as folder:
        calls = _calls(config, params, Path(folder))
        times = alternate(calls, request.rounds, rest=REST_SECONDS, turn=TURN_SECONDS)
    title = f"beside llama.cpp, {llama_cpp.THREADS} threads each, a prompt of {PROMPT} tokens"
    console.print(times_table(title, times))
    numbers: dict[str, Any] = {"in_form_of_mixtral": config != request.config}
    for ours, theirs in (("float32", "float32"), ("int8", "q8_0")):
        for what in ("token", "prompt"):
            ratio = times[f"llama.cpp {theirs}, {what}"].median / times[f"ours {ours}, {what}"].median
            numbers[f"{what}_rate_{ours}_over_{theirs}"] = ratio
    numbers["largest_spread"] = max(t.spread for t in times.values())
    if numbers["largest_spread"] > MOST_SPREAD:
        console.print("the machine was busy, and llama.cpp's threads wait for each other: the ratios say little")
    print_numbers(console, numbers)
    return numbers


def _calls(config: RunConfig, params: Params, folder: Path) -> dict[str, Callable[[], Any]]:
    """Candidates by name: a token in the middle of the context, and a prompt."""
    model, tokenizer = config.model, train_tokenizer(DataConfig(tokenizer="byte"), None)  # pyright: ignore[reportArgumentType]
    length = min(PROMPT, model.seq_len)
    calls: dict[str, Callable[[], Any]] = {}
    for form in ("float32", "int8"):
        weights = in_form(params, form)
        calls[f"ours {form}, token"] = token_call(model, weights)
        calls[f"ours {form}, prompt"] = decoding.prefill_call(decoding.Model.of(model), weights, length)
    for dtype in ("float32", "q8_0"):
        llama_cpp.write_model(folder / f"{dtype}.gguf", config, params, tokenizer, dtype)
        one, other = (llama_cpp.LlamaCpp(folder / f"{dtype}.gguf", model.seq_len) for _ in range(2))
        calls[f"llama.cpp {dtype}, token"] = one.token(model.seq_len // 2)
        calls[f"llama.cpp {dtype}, prompt"] = other.prompt([1] * length)
    return calls
