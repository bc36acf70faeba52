"""A server that speaks as `moe_jax serve` does, without a model: the page is tested against it.

Its tokens are words. Experts, gates and probabilities follow from a token's id by the formulas below, so a test can say
what the page must show. What it writes is scripted, and so are its failures.
"""

import json
import math
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from moe_jax.serving.page import document

E, K, LAYERS = 8, 2, 3
SEPARATOR = "<|endoftext|>"
WORDS = re.compile(r" ?[^\W\d_]+| ?\d|\s|.", re.DOTALL)
MODEL = {
    "layers": LAYERS,
    "expert_layers": list(range(LAYERS)),
    "experts": E,
    "experts_per_token": K,
    "context": 4096,
    "vocab_size": 1000,
    "chat": False,
    "prompts": ["Long ago", "One day, a boy named Tom", "The sun was"],
    "val_bits_per_byte": 0.912,
    "slots": 4,
    "max_tokens": 4096,
}


def experts_of(token: int) -> list[list[int]]:
    """[LAYERS][K], different within a layer."""
    return [[(3 * token + 5 * layer) % E, (3 * token + 5 * layer + 1 + token % (E - 1)) % E] for layer in range(LAYERS)]


def gates_of(token: int) -> list[list[float]]:
    first = [0.5 + (token * 7 + layer * 3) % 50 / 100 for layer in range(LAYERS)]
    return [[gate, 1 - gate] for gate in first]


def logprob_of(token: int) -> float:
    return -0.05 * (token % 97)


@dataclass
class StandIn:
    """What the server says and how it fails; a test changes it between requests."""

    model: dict[str, Any] = field(default_factory=lambda: dict(MODEL))
    writes: list[str] = field(
        default_factory=lambda: [" there", " was", " a", " dragon", ".", " It", " had", " 7", " hats"]
    )
    """The pieces that it writes, again and again."""
    finish: str = "length"
    pause: float = 0.0
    """Seconds before each token."""
    burst: int = 1
    """Tokens of an event."""
    refuse: tuple[int, str] | None = None
    """Status and message of the answer to the next requests for a text."""
    cut_after: int | None = None
    """Tokens after which the connection ends."""
    fail_after: int | None = None
    """Tokens after which the stream says that it failed."""
    key: str | None = None
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Path and body of each request for a text."""
    first_sent: float = 0.0
    """When the first token of the newest text was sent, in seconds since 1970."""
    aborted: threading.Event = field(default_factory=threading.Event)
    """Set when a client goes away in the middle of a text."""
    vocabulary: list[str] = field(
        default_factory=lambda: [SEPARATOR, " cat", " 7", " 3", " kite", "</script><b>", " ship"]
    )
    url: str = ""

    def id_of(self, piece: str) -> int:
        if piece not in self.vocabulary:
            self.vocabulary.append(piece)
        return self.vocabulary.index(piece)

    def encode(self, text: str) -> list[int]:
        return [0, *(self.id_of(piece) for piece in WORDS.findall(text))]

    def others_of(self, token: int) -> list[tuple[int, float]]:
        """The five likeliest tokens in the place of `token`, itself among them unless its id is a multiple of 5."""
        found = [(other, -0.5 - 0.31 * n) for n, other in enumerate(range(1, 6)) if other != token]
        return found[:5] if token % 5 == 0 else sorted([*found[:4], (token, logprob_of(token))], key=lambda o: -o[1])

    def entries(self, tokens: list[int], routed: bool, ends: bool = False) -> dict[str, Any]:
        """What an event says about some tokens. The first token of a prompt (the separator) has no probability."""
        likeliest = [self.others_of(token) for token in tokens]
        routing: dict[str, list[Any]] = {
            "routed_experts": [experts_of(token) for token in tokens],
            "gates": [gates_of(token) for token in tokens],
        }
        if ends:  # no step has read the last token of a text
            routing["routed_experts"][-1] = routing["gates"][-1] = None
        return (routing if routed else {}) | {
            "token_ids": tokens,
            "logprobs": {
                "tokens": [self.vocabulary[token] for token in tokens],
                "token_logprobs": [logprob_of(token) if token else None for token in tokens],
                "top_logprobs": [{self.vocabulary[other]: p for other, p in found} for found in likeliest],
                "top_token_ids": [[other for other, _ in found] for found in likeliest],
                "text_offset": [0] * len(tokens),
            },
        }

    def choices(self, body: dict[str, Any], chat: bool) -> Iterator[dict[str, Any]]:
        """The choices of a stream, one event each."""
        prompt = body.get("prompt")
        if chat:
            read = [0] + [self.id_of(f"[{m['role']}]{m['content']}") for m in body["messages"]]
        else:
            read = prompt if isinstance(prompt, list) else self.encode(prompt)
        first: dict[str, Any] = {"prompt_token_ids": read}
        if body.get("echo"):
            yield (
                first
                | self.entries(read, body["routed_experts"])
                | {"text": "".join(self.vocabulary[t] for t in read[1:])}
            )
            first = {}
        count, done = body["max_tokens"], 0
        while done < count:
            pieces = [self.writes[(done + n) % len(self.writes)] for n in range(min(self.burst, count - done))]
            done += len(pieces)
            said = first | self.entries([self.id_of(p) for p in pieces], body["routed_experts"], ends=done == count)
            first = {}
            said["finish_reason"] = self.finish if done == count else None
            yield said | ({"delta": {"content": "".join(pieces)}} if chat else {"text": "".join(pieces)})


class Handler(BaseHTTPRequestHandler):
    server: "Server"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, kind: str, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def problem(self, status: int, message: str) -> None:
        error = {"message": message, "type": "server_error", "param": None, "code": None}
        self.answer(status, "application/json", json.dumps({"error": error}).encode())

    def locked(self) -> bool:
        key = self.server.says.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return False
        self.problem(401, "a key is needed")
        return True

    def do_GET(self) -> None:
        if self.path == "/":
            html, policy = document()
            self.answer(200, "text/html; charset=utf-8", html, Content_Security_Policy=policy)
        elif self.path == "/v1/models":
            if not self.locked():
                entry = {"id": "dragons", "object": "model", "created": 1, "owned_by": "moe-jax"}
                data = [entry | {"moe_jax": self.server.says.model}]
                self.answer(200, "application/json", json.dumps({"object": "list", "data": data}).encode())
        else:
            self.problem(404, "no such address")

    def do_POST(self) -> None:
        says = self.server.says
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.locked():
            return
        says.asked.append((self.path, body))
        if says.refuse is not None:
            self.problem(*says.refuse)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self.stream(says, body)
        except (BrokenPipeError, ConnectionResetError):
            says.aborted.set()

    def stream(self, says: StandIn, body: dict[str, Any]) -> None:
        written = 0
        for choice in says.choices(body, chat=self.path.endswith("/chat/completions")):
            if "finish_reason" in choice:
                if written == says.cut_after:
                    return
                if written == says.fail_after:
                    self.event({"error": {"message": "the cache is gone", "type": "server_error"}})
                    return
                time.sleep(says.pause)
                says.first_sent = says.first_sent if written else time.time()
                written += 1
            self.event({"object": "text_completion", "choices": [{"index": 0, "finish_reason": None} | choice]})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, value: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.wfile.flush()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    says: StandIn


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """A running server. What it says can be changed while it runs."""
    server = Server(("127.0.0.1", 0), Handler)
    server.says = StandIn()
    server.says.url = f"http://127.0.0.1:{server.server_address[1]}/"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.says
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def probability(logprob: float) -> str:
    """As the page writes it."""
    return f"{100 * math.exp(logprob):.{2 if logprob < math.log(0.1) else 1}f}\u00a0%"
