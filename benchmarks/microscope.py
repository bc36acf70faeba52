"""What it costs to import a public mixture and to write with it, on this machine, and beside llama.cpp.

    uv run --group interop --extra gguf python benchmarks/microscope.py models/olmoe int4

Three rates in turn: reading the folder's tensors and nothing else, rounding parts that are in memory, and the import,
which does both and writes. Then the run: seconds to read a prompt of 64 and of 512 tokens, and to write a token. A
token is measured in turn with the memory's rate, at which its bytes would be read. Of each the median. Memory is the
peak of the whole process.

Then llama.cpp with the same weights, if its packages are installed: the bfloat16 import, exported, and rounded to q4_0
or q8_0 by llama.cpp's own tool. Both programs compute in turn. The files take three times the source's size on the
disk, for a while.
"""

import importlib
import importlib.util
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import xxhash
from suites import decoding
from suites.request import after_rest

from moe_jax.config import ModelConfig, RunConfig, UserError
from moe_jax.inference.decode import NOTHING_GIVEN, Decoder, cast_once
from moe_jax.inference.sampling import Sampling
from moe_jax.interop.architectures import architecture_of
from moe_jax.interop.export import export
from moe_jax.interop.imported_run import Form, import_run, rounded_part
from moe_jax.interop.pretrained import Pretrained
from moe_jax.interop.source import open_source
from moe_jax.model.transformer import Params
from moe_jax.runs.arrays import named_leaves
from moe_jax.runs.load import LoadedRun, find_checkpoint, open_run
from moe_jax.system.files import json_text
from moe_jax.system.machine import alternate, memory_read_benchmark, processor

PARTS = 400
REST_SECONDS, TURN_SECONDS = 0.02, 0.1
"""llama.cpp's threads spin for a while after each call: they get time to sleep before the next candidate."""
PACKAGES = {"llama_cpp_py_sync": "llama-cpp-py-sync", "gguf": "gguf"}
"""Module -> the package that has it."""
THREADS = 2
_FLOAT32 = 0
"""`ggml_type` of the cache of keys and values, as ours."""


def seconds(work: Callable[[], Any], times: int = 3) -> float:
    """The median of some calls, after one that compiles."""
    jax.block_until_ready(work())
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(work())
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def peak() -> float:
    """GB of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def importing(folder: Path, form: Form, out: Path) -> dict[str, float]:
    """Rates in MB of the folder's bytes a second."""
    model = Pretrained.open(folder, "SOURCE")
    table = model.table()
    began = time.perf_counter()
    size = sum(part.stored.nbytes for part in model.read(table, xxhash.xxh3_128()))
    reads = size / (time.perf_counter() - began)
    matrices = (part for part in model.read(table, xxhash.xxh3_128()) if part.stored.ndim > 1)
    parts = list(islice(matrices, PARTS))
    rounds = sum(part.stored.nbytes for part in parts) / seconds(
        lambda: [rounded_part(part.stored, "int4" if form == "int4" else "int8") for part in parts]
    )
    began = time.perf_counter()
    import_run(model, form, 1024, out)
    both = size / (time.perf_counter() - began)
    rates = {"read": reads, "round": rounds, "import": both, "import / slower": both / min(reads, rounds)}
    return {name: rate / 1e6 if rate > 1e3 else rate for name, rate in rates.items()} | {"import, peak GB": peak()}


def writing(run: LoadedRun) -> dict[str, float]:
    params = cast_once(run.writer, run.params)
    decoder = Decoder(run.writer, run.config.model.seq_len, run.tokenizer.vocab_size, short_prompts=True)
    tokens = np.random.default_rng(0).integers(0, run.tokenizer.vocab_size, 512).tolist()
    text = [decoder.start(params, tokens[:64], [], Sampling(), jax.random.key(0))]

    def write() -> Any:
        text[0], drawn, _ = decoder.write(params, text[0], NOTHING_GIVEN, np.int32(8), np.int32(-1))
        return drawn

    read, size = memory_read_benchmark()
    times = alternate({"write": write, "read": read}, 9)
    result = {"token, s": times["write"].median / 8, "memory, GB/s": size / times["read"].median / 1e9}
    result["bytes of a token, s"] = bytes_per_token(run.config.model, params) / result["memory, GB/s"] / 1e9
    result["token / its bytes"] = result["token, s"] / result["bytes of a token, s"]
    result["prompt of 64, s"] = seconds(lambda: decoder.read(params, tokens[:64]))
    result["writing, peak GB"] = peak()
    prompts = Decoder(run.writer, 512, run.tokenizer.vocab_size)
    return result | {"prompt of 512, s": seconds(lambda: prompts.read(params, tokens)), "prompts, peak GB": peak()}


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


def why_not(config: RunConfig) -> str:
    """Why llama.cpp cannot be measured here with a model of this configuration; empty if it can."""
    missing = [package for module, package in PACKAGES.items() if not importlib.util.find_spec(module)]
    if missing:
        return f"{' and '.join(missing)} not installed (`uv run --group interop --extra gguf`)"
    try:
        return architecture_of(config.model).gguf_problem
    except UserError as error:
        return str(error)


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


def gguf(source: Path, form: Form) -> Path:
    """The source as llama.cpp rounds it, in a folder beside it. The export has the model in memory as bfloat16."""
    bindings: Any = importlib.import_module("llama_cpp_py_sync._cffi_bindings")
    ffi, library = bindings.get_ffi(), bindings.get_lib()
    whole, out = (source.with_name(f"{source.name}-{name}") for name in ("bfloat16-measured", "gguf-measured"))
    for folder in (whole, out):
        shutil.rmtree(folder, ignore_errors=True)
    import_run(Pretrained.open(source, "SOURCE"), "bfloat16", 1024, whole)
    export(open_source(whole), "gguf", "bfloat16", out, "")
    shutil.rmtree(whole)
    silence()
    settings = ffi.new("struct llama_model_quantize_params *", library.llama_model_quantize_default_params())
    settings.nthread, settings.ftype = THREADS, 2 if form == "int4" else 7
    made = out / "rounded.gguf"
    assert library.llama_model_quantize(bytes(out / "model.gguf"), bytes(made), settings) == 0
    (out / "model.gguf").unlink()
    return made


def beside_llama_cpp(run: LoadedRun, made: Path) -> dict[str, float]:
    """Times of this program and of llama.cpp with the file `made`. One copy of llama.cpp's model is in memory at a
    time."""
    model, params = run.config.model, cast_once(run.writer, run.params)

    def llama() -> LlamaCpp:
        return LlamaCpp(made, model.seq_len, use_mmap=False)

    token = in_turn("token", decoding.token_call(model, params), llama().token(model.seq_len // 2))
    return token | in_turn("prompt of 512", decoding.prefill_call(model, params, 512), llama().prompt([1] * 512))


def in_turn(what: str, ours: Callable[[], Any], theirs: Callable[[], Any]) -> dict[str, float]:
    """Median seconds of both, the rate of ours over theirs, and the larger spread."""
    both = {"ours": ours, "theirs": theirs}
    times = alternate({name: after_rest(run, REST_SECONDS, TURN_SECONDS) for name, run in both.items()}, 7)
    return {
        f"{what}, s": times["ours"].median,
        f"llama.cpp, {what}, s": times["theirs"].median,
        f"{what}: rate over llama.cpp's": times["theirs"].median / times["ours"].median,
        f"{what}: largest spread": max(time.spread for time in times.values()),
    }


if __name__ == "__main__":
    source, form = Path(sys.argv[1]), cast(Form, sys.argv[2])
    out = source.with_name(f"{source.name}-{form}-measured")
    shutil.rmtree(out, ignore_errors=True)
    found = importing(source, form, out)
    reason, made = why_not(find_checkpoint(out, None)[0]), None
    if not reason:  # in a process that ends before the run is in memory
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            made = process.submit(gguf, source, form).result()
    run = open_run(out)
    found |= writing(run)
    print(json_text({"processor": processor(), "form": form} | {name: round(v, 3) for name, v in found.items()}))
    if made:
        print(json_text({name: round(v, 3) for name, v in beside_llama_cpp(run, made).items()}))
        shutil.rmtree(made.parent)
    else:
        print(f"llama.cpp: skipped, {reason}")
    shutil.rmtree(out)
