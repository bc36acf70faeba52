"""llama.cpp: logits of all positions, greedy text and ids of a text through the package `llama-cpp-py-sync`. Its server
comes from `xllamacpp`, and applies chat templates."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FLOAT32 = 0
"""`ggml_type` of the cache of keys and values. The default, float16, costs 1e-3 of the logits."""


class LlamaCpp:
    """A GGUF file, opened."""

    def __init__(self, path: Path, context: int) -> None:
        package = pytest.importorskip("llama_cpp_py_sync", reason="llama.cpp is not installed: --group interop")
        self._llama = package.Llama(
            str(path), n_ctx=context, n_batch=context, n_threads=2, type_k=FLOAT32, type_v=FLOAT32, verbose=False
        )
        self._context = context

    def ids(self, text: str) -> list[int]:
        """The ids of a text, the separator first."""
        return self._llama.tokenize(text, add_special=True, parse_special=False)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """float32 [N, V]: the logits after each token."""
        lib, ffi = self._llama._lib, self._llama._ffi
        lib.llama_memory_clear(lib.llama_get_memory(self._llama._ctx), True)
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        assert lib.llama_decode(self._llama._ctx, batch) == 0
        size = self._llama.n_vocab
        rows = [
            np.frombuffer(ffi.buffer(lib.llama_get_logits_ith(self._llama._ctx, i), 4 * size), np.float32).copy()
            for i in range(len(tokens))
        ]
        lib.llama_batch_free(batch)
        return np.stack(rows)

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """The `count` likeliest tokens after some tokens, one after the other."""
        tokens = list(tokens)
        start = len(tokens)
        for _ in range(count):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[start:]


class LlamaServer:
    """llama.cpp's server with a GGUF file. It listens on this machine, until the object is deleted."""

    def __init__(self, path: Path, context: int) -> None:
        package = pytest.importorskip("xllamacpp", reason="llama.cpp's server is not installed: --group interop")
        settings = package.CommonParams()
        settings.model.path, settings.n_ctx, settings.use_jinja = str(path), context, True
        settings.cpuparams.n_threads = 2
        self._server = package.Server(settings)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        address = self._server.listening_address + path
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids that an answer to a conversation begins from: by the template of the file, the separator first."""
        text = self._post("/apply-template", {"messages": messages})["prompt"]
        return self._post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
