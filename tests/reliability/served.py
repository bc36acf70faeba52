"""A server in a process of its own, and the texts that `generate` would write for its requests."""

import json
import re
import socket
import subprocess
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.inference.decode import Decoder
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.slots import PromptState, advance, draw
from moe_jax.runs.load import open_run
from moe_jax.system.random_keys import Purpose, purpose_key
from tests.reliability import runs


class Served(NamedTuple):
    """A server in a process."""

    process: subprocess.Popen[str]
    url: str
    run: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def ask(self, path: str, fields: Any = None) -> Any:
        data = None if fields is None else json.dumps(fields).encode()
        with urllib.request.urlopen(self.url + path, data, timeout=120) as answer:
            return json.loads(answer.read())

    def open(self, **fields: Any) -> socket.socket:
        """A socket that has asked for a completion."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        body = json.dumps(fields).encode()
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        return sock

    def free(self) -> bool:
        health = self.ask("/health")
        return (health["busy"], health["queued"]) == (0, 0)


def start(run: Path, cache: Path, *flags: str) -> Served:
    process = runs.start(["serve", "--run", str(run), "--port", "0", *flags], cache, runs.COMMANDS)
    assert process.stdout is not None
    first, ready = process.stdout.readline(), process.stdout.readline()
    assert first.startswith(f"loading {run}"), (first, process.stderr and process.stderr.read())
    found = re.match(r"ready: (http://\S+) ", ready)
    assert found, (ready, process.stderr and process.stderr.read())
    return Served(process, found[1], run)


class Oracle:
    """The texts of `generate`, drawn and appended token by token, and the probabilities of a text."""

    def __init__(self, run: Path) -> None:
        loaded = open_run(run)
        self.tokenizer, self._params, self.seq_len = loaded.tokenizer, loaded.params, loaded.config.model.seq_len
        self._decoder = Decoder(loaded.writer, self.seq_len, self.tokenizer.vocab_size)
        self._append = jax.jit(partial(advance, loaded.writer))
        self._draw = jax.jit(partial(draw, self.tokenizer.vocab_size))

    def generated(self, prompt: list[int], fields: dict[str, Any], number: int) -> list[int]:
        """The tokens of text `number` that a request asks for."""
        settings = Sampling(
            float(fields["temperature"]),
            int(fields["top_k"]),
            float(fields["top_p"]),
            float(fields.get("min_p", 0.0)),
            float(fields["repetition_penalty"]),
        )
        key, stop = purpose_key(fields["seed"], Purpose.SAMPLE, number), self.tokenizer.separator_id
        context, tokens = prompt[-self.seq_len :], []
        state: PromptState = self._decoder.read(self._params, context)
        seen = jnp.zeros(state.logits.shape, bool).at[0, np.array(prompt, np.int32)].set(True).at[0, stop].set(False)
        while len(tokens) < fields["max_tokens"]:
            token = int(self._draw(state.logits, settings, seen, jax.random.fold_in(key, len(tokens)))[0])
            if token == stop:
                break
            tokens.append(token)
            context, seen = [*context, token], seen.at[0, token].set(True)
            if len(context) > self.seq_len:
                context = context[-(self.seq_len // 2) :]
                state = self._decoder.read(self._params, context)
            else:
                state = self._append(self._params, state, np.array([token], np.int32))
        return tokens

    def logprob(self, logits: Any, token: int) -> float:
        """Of a token under the model's own distribution. `logits` [1, V]."""
        known = np.asarray(logits[0, : self.tokenizer.vocab_size], np.float64)
        shifted = known - known.max()
        return float(shifted[token] - np.log(np.exp(shifted).sum()))

    def logprobs(self, tokens: list[int]) -> list[float]:
        """Of each token after the first, given those before it. The beginnings are read one by one."""
        return [
            self.logprob(self._decoder.read(self._params, tokens[:n]).logits, tokens[n]) for n in range(1, len(tokens))
        ]
