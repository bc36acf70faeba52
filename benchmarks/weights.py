"""Decoding with weights of 32, 16, 8 and 4 bits, and beside llama.cpp.

    uv run --group interop --extra gguf python benchmarks/weights.py --preset seed-158m

llama.cpp reads the same model as a GGUF file, by the package `llama-cpp-py-sync`. Without the two packages, it is left
out.
"""

import argparse
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from moe_jax.benchmarks import decoding
from moe_jax.benchmarks.peers import like_mixtral
from moe_jax.benchmarks.request import BenchmarkRequest, print_numbers, times_table
from moe_jax.cli.main import main
from moe_jax.config import DataConfig, ModelConfig, RunConfig, UserError
from moe_jax.config.presets import PRESETS, preset, with_vocabulary
from moe_jax.data.tokenizers import Tokenizer, train_tokenizer
from moe_jax.interop.architectures import ExportDtype, architecture_of
from moe_jax.interop.gguf_file import write_gguf
from moe_jax.interop.source import ExportSource
from moe_jax.model.precision import to_param_dtype
from moe_jax.model.quantized import WEIGHTS, in_tiles, quantize
from moe_jax.model.transformer import Params, create, split
from moe_jax.runs.arrays import named_leaves
from moe_jax.system.files import json_text
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
    calls = {form: token_call(model, weights) for form, weights in forms.items()}
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
    if form == "bfloat16":
        return to_param_dtype(params, form)
    return in_tiles(quantize(params, form))  # pyright: ignore[reportArgumentType]


def token_call(model: ModelConfig, weights: Params) -> Callable[[], Any]:
    """A token at batch 1. Activations are in float32, as `generate` computes on a CPU."""
    return decoding.token_call(model, weights)


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
    if architecture_problem(config):
        config = like_mixtral(config)
    if reason := why_not(config):
        console.print(f"llama.cpp: skipped, {reason}\n")
        return {"skipped": reason}
    _, params = split(create(config.model, jax.random.key(0)))
    with tempfile.TemporaryDirectory() as folder:
        calls = _calls(config, params, Path(folder))
        times = alternate(calls, request.rounds, rest=REST_SECONDS, turn=TURN_SECONDS)
    title = f"beside llama.cpp, {THREADS} threads each, a prompt of {PROMPT} tokens"
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
    model, tokenizer = config.model, train_tokenizer(DataConfig(tokenizer="byte"))
    length = min(PROMPT, model.seq_len)
    calls: dict[str, Callable[[], Any]] = {}
    for form in ("float32", "int8"):
        weights = in_form(params, form)
        calls[f"ours {form}, token"] = token_call(model, weights)
        calls[f"ours {form}, prompt"] = decoding.prefill_call(model, weights, length)
    for dtype in ("float32", "q8_0"):
        write_model(folder / f"{dtype}.gguf", config, params, tokenizer, dtype)
        one, other = (LlamaCpp(folder / f"{dtype}.gguf", model.seq_len) for _ in range(2))
        calls[f"llama.cpp {dtype}, token"] = one.token(model.seq_len // 2)
        calls[f"llama.cpp {dtype}, prompt"] = other.prompt([1] * length)
    return calls


PACKAGES = {"llama_cpp_py_sync": "llama-cpp-py-sync", "gguf": "gguf"}
"""Module -> the package that has it."""
THREADS = 2
_FLOAT32 = 0
"""`ggml_type` of the cache of keys and values, as ours."""


def why_not(config: RunConfig) -> str:
    """Why llama.cpp cannot be measured here; empty if it can."""
    missing = [package for module, package in PACKAGES.items() if not importlib.util.find_spec(module)]
    if missing:
        return f"{' and '.join(missing)} not installed (`uv run --group interop --extra gguf`)"
    return architecture_problem(config)


def architecture_problem(config: RunConfig) -> str:
    """Why llama.cpp does not have the model's architecture; empty if it does."""
    try:
        return architecture_of(config.model).gguf_problem
    except UserError as error:
        return str(error)


def write_model(path: Path, config: RunConfig, params: Params, tokenizer: Tokenizer, dtype: ExportDtype) -> None:
    """The model as a GGUF file, with matrices of this type."""
    weights = {name: np.asarray(leaf) for name, leaf in named_leaves(params).items()}
    nowhere: Any = None  # there is no checkpoint
    source = ExportSource(config, tokenizer, nowhere, weights, {})
    write_gguf(path, source, architecture_of(config.model), "benchmark", dtype)


@cache
def silence() -> Any:
    """llama.cpp prints hundreds of lines for each model that it opens. The result must outlive all models: cached."""
    bindings = importlib.import_module("llama_cpp_py_sync._cffi_bindings")
    ffi, lib = bindings.get_ffi(), bindings.get_lib()
    nothing = ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda *_: None)
    lib.llama_log_set(nothing, ffi.NULL)
    return nothing


class LlamaCpp:
    """A GGUF file in llama.cpp, with a context of `context` tokens."""

    def __init__(self, path: Path, context: int, use_mmap: bool = True) -> None:
        package = importlib.import_module("llama_cpp_py_sync")
        silence()
        cache = {"n_ctx": context, "n_batch": context, "type_k": _FLOAT32, "type_v": _FLOAT32}
        self._llama = package.Llama(str(path), n_threads=THREADS, verbose=False, use_mmap=use_mmap, **cache)
        self._lib = self._llama._lib  # the package's own functions sample and convert to text as well
        self._context = self._llama._ctx
        self._lib.llama_set_embeddings(self._context, False)  # else it computes the logits after every token
        self._memory = self._lib.llama_get_memory(self._context)

    def prompt(self, tokens: Sequence[int]) -> Callable[[], None]:
        """A call that reads a prompt into the empty cache, and computes the logits after it."""

        def read() -> None:
            self._lib.llama_memory_clear(self._memory, True)
            self._decode(tokens, 0)

        return read

    def token(self, position: int) -> Callable[[], None]:
        """A call that reads one token at this position, after a prompt, and computes the logits after it."""
        self.prompt([1] * position)()

        def read() -> None:
            self._lib.llama_memory_seq_rm(self._memory, 0, position, -1)
            self._decode([1], position)

        return read

    def _decode(self, tokens: Sequence[int], position: int) -> None:
        batch = self._lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, i == len(tokens) - 1
        status = self._lib.llama_decode(self._context, batch)
        self._lib.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")


def run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--preset", default="seed-158m", choices=list(PRESETS), help="the model")
    parser.add_argument("--rounds", type=int, default=9, help="how often each candidate runs")
    asked = parser.parse_args(argv)
    config = with_vocabulary(preset(asked.preset))
    _, params = split(create(config.model, jax.random.key(0)))
    print(json_text(compare_weights(Console(), BenchmarkRequest(config, 1, asked.rounds), params)))
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
