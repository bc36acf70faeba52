"""llama.cpp, as `microscope.py` measures it: calls to time, by the package `llama-cpp-py-sync`."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from moe_jax.config import RunConfig, UserError
from moe_jax.interop.architectures import architecture_of

REST_SECONDS, TURN_SECONDS = 0.02, 0.1
"""llama.cpp's threads spin for a while after each call: they get time to sleep before the next candidate."""
PACKAGES = {"llama_cpp_py_sync": "llama-cpp-py-sync", "gguf": "gguf"}
"""Module -> the package that has it."""
THREADS = 2
_FLOAT32 = 0
"""`ggml_type` of the cache of keys and values, as ours."""


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
