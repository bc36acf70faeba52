"""`serve` in a process of its own: 200 requests against `generate`, clients that go, signals, a port in use."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")
pytest.importorskip("uvicorn", reason="needs the extra `serve`")

from moe_jax.inference.decode import Decoder
from moe_jax.inference.sampling import Sampling
from moe_jax.runs.load import open_run
from moe_jax.system.random_keys import Purpose, purpose_key
from tests.reliability import runs
from tests.reliability.figures import Record, figure

pytestmark = pytest.mark.reliability
REQUESTS = 200
NEAR = 1e-3
"""A tie: two tokens whose scores (logit / temperature + random number) differ by less than this. Batched products may
decide it the other way."""
CONFIG = {"temperature": [0, 0.7, 1.0, 1.5], "top_k": [0, 5], "top_p": [1.0, 0.8], "repetition_penalty": [1.0, 1.2]}


class Served(NamedTuple):
    """A server in a process."""

    process: subprocess.Popen[str]
    url: str
    run: Path

    def ask(self, path: str, fields: Any = None) -> Any:
        data = None if fields is None else json.dumps(fields).encode()
        with urllib.request.urlopen(self.url + path, data, timeout=120) as answer:
            return json.loads(answer.read())

    def open(self, **fields: Any) -> socket.socket:
        """A socket that has asked for a completion."""
        sock = socket.create_connection(("127.0.0.1", int(self.url.rpartition(":")[2])), timeout=60)
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


@pytest.fixture(scope="module")
def served(whole: tuple[Path, dict[str, Any]], cache: Path) -> Iterator[Served]:
    server = start(whole[0], cache, "--slots", "3")
    yield server
    server.process.terminate()
    assert server.process.wait(30) == 0


def some_requests(tokenizer: Any, count: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    words = ["the", "cat", "", "dog ran", "on a mat and then it was happy and the cat sat", "é🙂"]
    found = []
    for _ in range(count):
        fields = {name: rng.choice(values) for name, values in CONFIG.items()}
        prompt = [tokenizer.separator_id, *tokenizer.encode(rng.choice(words))]
        found.append({"prompt": prompt, "seed": rng.randrange(2**31), "max_tokens": rng.randint(1, 60), **fields})
    return found


class Oracle:
    """The one-row decoder of `generate`, and how near a tie was."""

    def __init__(self, run: Path) -> None:
        loaded = open_run(run)
        self.tokenizer, self._params, self._seq_len = loaded.tokenizer, loaded.params, loaded.config.model.seq_len
        self._decoder = Decoder(loaded.graphdef, self._seq_len, self.tokenizer.vocab_size)

    def tokens(self, fields: dict[str, Any]) -> list[int]:
        key = purpose_key(fields["seed"], Purpose.SAMPLE, 0)
        settings = Sampling(
            *(float(fields.get(name, 0)) for name in ("temperature",)),
            int(fields["top_k"]),
            fields["top_p"],
            0.0,
            fields["repetition_penalty"],
        )
        self.scores: list[np.ndarray] = []
        draw = self._decoder.draw

        def noted(logits: Any, settings: Any, seen: Any, key: Any) -> Any:
            self.scores.append((logits, settings, seen, key))
            return draw(logits, settings, seen, key)

        self._decoder.draw = noted
        try:
            return list(
                self._decoder.stream(
                    self._params,
                    fields["prompt"],
                    settings=settings,
                    key=key,
                    stop=self.tokenizer.separator_id,
                    limit=fields["max_tokens"],
                )
            )
        finally:
            self._decoder.draw = draw

    def was_near(self, n: int, other: int) -> bool:
        """Whether the draw of token n was a tie with another token: a change of the logits by NEAR lets it win."""
        logits, settings, seen, key = self.scores[n]
        raised = logits.at[0, other].add(NEAR)
        return int(self._decoder.draw(raised, settings, seen, key)[0]) == other


def test_texts_at_once_and_in_turn_are_those_of_generate(served: Served, record_property: Record) -> None:
    """A wrong text is one that is not `generate`'s, and that no tie explains."""
    oracle = Oracle(served.run)
    asked = some_requests(oracle.tokenizer, REQUESTS)
    complete = lambda fields: served.ask("/v1/completions", {**fields, "return_token_ids": True})  # noqa: E731
    with ThreadPoolExecutor(20) as pool:
        at_once = list(pool.map(complete, asked))
    in_turn = [complete(fields) for fields in asked[::4]]
    texts = [answer["choices"][0] for answer in at_once]
    assert texts[::4] == [answer["choices"][0] for answer in in_turn], "the same text in any company"
    wrong = ties = 0
    for fields, text in zip(asked, texts, strict=True):
        expected, found = oracle.tokens(fields), text["token_ids"]
        if expected == found:
            assert text["text"] == oracle.tokenizer.decode(expected)
            continue
        stop = oracle.tokenizer.separator_id
        pairs = zip([*expected, stop], [*found, stop], strict=False)
        n, other = next((n, b) for n, (a, b) in enumerate(pairs) if a != b)
        near = oracle.was_near(n, other)
        ties, wrong = ties + near, wrong + (not near)
    assert served.free()
    figure(record_property, "texts served at once against generate", REQUESTS)
    figure(record_property, "of these, ties decided the other way", ties)
    assert wrong == 0
    assert ties <= REQUESTS // 50


def test_clients_that_vanish_leave_no_slot_behind(served: Served, record_property: Record) -> None:
    rng = random.Random(1)
    before = len(os.listdir(f"/proc/{served.process.pid}/fd")) if Path("/proc").exists() else 0
    for _ in range(60):
        sock = served.open(prompt="the", max_tokens=4000, stream=rng.random() < 0.5, temperature=1.5)
        time.sleep(rng.random() * 0.02)
        if rng.random() < 0.5:
            sock.shutdown(socket.SHUT_WR)
            time.sleep(0.01)
        sock.close()
    end = time.monotonic() + 30
    while not served.free():
        assert time.monotonic() < end
        time.sleep(0.05)
    if before:
        assert len(os.listdir(f"/proc/{served.process.pid}/fd")) <= before + 3
    figure(record_property, "vanished clients, no slot lost", 60)


def test_a_port_in_use_is_one_line(served: Served, cache: Path) -> None:
    port = served.url.rpartition(":")[2]
    finished = runs.complete(["serve", "--run", str(served.run), "--port", port], cache, runs.COMMANDS)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr == f"error: --port {port}: is in use on 127.0.0.1; give another, or 0 for a free one\n"


def test_another_host_needs_a_key(served: Served, cache: Path) -> None:
    finished = runs.complete(["serve", "--run", str(served.run), "--host", "0.0.0.0"], cache, runs.COMMANDS)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "give an --api-key" in finished.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_streams_with_a_last_event(
    number: signal.Signals, whole: tuple[Path, dict[str, Any]], cache: Path
) -> None:
    server = start(whole[0], cache, "--slots", "2")
    streams = [server.open(prompt="the", max_tokens=4096, stream=True, temperature=1.5, n=4) for _ in range(2)]
    for sock in streams:
        assert sock.recv(12) == b"HTTP/1.1 200"
    server.process.send_signal(number)
    told = [b"".join(iter(lambda s=sock: s.recv(1 << 16), b"")).decode() for sock in streams]
    for text in told:
        events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["error"]["code"] == "stopping"
    assert server.process.wait(30) == 0
    assert server.process.stdout is not None
    assert server.process.stderr is not None
    assert (server.process.stdout.read(), server.process.stderr.read()) == ("stopped\n", "")


CLIENT = """
import sys
import openai

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
name = client.models.list().data[0].id
whole = client.completions.create(model=name, prompt="the", seed=3, max_tokens=20, n=2, logprobs=2, temperature=0.8)
parts = client.completions.create(model=name, prompt="the", seed=3, max_tokens=20, temperature=0.8, stream=True)
assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
assert whole.choices[0].finish_reason in ("stop", "length")
found = whole.choices[0].logprobs
assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
more = client.completions.create(model=name, prompt="the", max_tokens=2, extra_body={"routed_experts": True})
assert more.choices[0].routed_experts
for wrong, error in (({"model": "other"}, openai.NotFoundError), ({"n": 1000}, openai.BadRequestError)):
    try:
        client.completions.create(**{"model": name, "prompt": "the", **wrong})
    except error as found:
        assert found.body["message"]
    else:
        raise AssertionError(wrong)
try:
    client.chat.completions.create(model=name, messages=[{"role": "user", "content": "hi"}])
except openai.BadRequestError as found:
    assert found.code == "not_tuned"
print("fine")
"""


def test_the_official_client(served: Served) -> None:
    """In a process of its own: importing it would change what these tests check of types."""
    pytest.importorskip("openai", reason="needs the group `serving`: uv run --group serving pytest -m reliability")
    finished = subprocess.run([sys.executable, "-c", CLIENT, served.url], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout) == (0, "fine\n"), finished.stderr
