"""Random requests to a server, of every kind that its API has, and a judge of their answers."""

import collections
import contextlib
import http.client
import json
import random
from dataclasses import dataclass
from typing import Any, NamedTuple

from moe_jax.data.tokenizers import Tokenizer
from tests.reliability.served import Generated, Oracle, Served

WORDS = ("the", "cat", "", "dog ran", "on a mat and then it was happy and the cat sat", "é🙂")
SETTINGS = {
    "temperature": (0, 0.7, 1.0, 1.5),
    "top_k": (0, 5),
    "top_p": (1.0, 0.8),
    "min_p": (0.0, 0.05),
    "repetition_penalty": (1.0, 1.2),
}
STOPS = (["a"], [" "], ["th", "e c"], ["zzzz"])
REFUSED: tuple[tuple[str, bytes, int], ...] = (
    ("/v1/completions", b"{", 400),
    ("/v1/completions", b"[1]", 400),
    ("/v1/completions", b'{"prompt": "a", "n": 0}', 400),
    ("/v1/completions", b'{"prompt": "a", "n": 129}', 400),
    ("/v1/completions", b'{"prompt": "a", "temperature": -1}', 400),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": 5000}', 400),
    ("/v1/completions", b'{"prompt": [1000000]}', 400),
    ("/v1/completions", b'{"prompt": "a", "model": "another"}', 404),
    ("/v1/completions", b'{"prompt": "a", "top_p": 2}', 400),
    ("/v1/completions", b" " * ((1 << 20) + 1), 413),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "hi"}]}', 400),
    ("/v1/nothing", b"{}", 404),
)
"""Path, body, and the status of the answer."""
LOGPROB_TOLERANCE = 1e-3


class Told(NamedTuple):
    """A text as the server told it."""

    text: str
    tokens: list[int]
    finish: str | None
    logprobs: list[float | None]
    experts: list[list[list[int]]]


@dataclass(frozen=True)
class Asked:
    """A request."""

    kind: str
    """"whole", "stream", "vanishes", "refused" or "looks"."""
    path: str
    fields: dict[str, Any]
    """Of a completion; its prompts are lists of tokens."""
    body: bytes = b""
    status: int = 200

    def send(self, server: Served) -> Any:
        """The texts of a completion, or the status of another request."""
        if self.kind == "vanishes":
            server.open(**self.fields).close()
            return None
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        try:
            method = "GET" if self.kind == "looks" else "POST"
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before the body was sent
                connection.request(method, self.path, self.body or json.dumps(self.fields).encode())
            answer = connection.getresponse()
            if answer.status != 200 or self.kind not in ("whole", "stream"):
                answer.read()
                return answer.status
            return self._texts(answer.read().decode())
        finally:
            connection.close()

    def _texts(self, said: str) -> list[Told]:
        """The texts of an answer: of a stream, its events put together."""
        if self.kind == "whole":
            choices = json.loads(said)["choices"]
        else:
            lines = [line.removeprefix("data: ") for line in said.splitlines() if line]
            assert lines[-1] == "[DONE]", lines[-3:]
            choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
        parts: dict[int, list[Any]] = collections.defaultdict(list)
        for choice in choices:
            parts[choice["index"]].append(choice)
        joined = lambda own, name: [value for part in own for value in part.get(name) or []]  # noqa: E731
        return [
            Told(
                "".join(part["text"] for part in own),
                joined(own, "token_ids"),
                own[-1]["finish_reason"],
                [value for part in own for value in (part["logprobs"] or {}).get("token_logprobs", [])],
                joined(own, "routed_experts"),
            )
            for _, own in sorted(parts.items())
        ]


def draw_requests(tokenizer: Tokenizer, count: int, seed: int) -> list[Asked]:
    """As many requests, the same ones for a seed."""
    rng = random.Random(seed)
    return [_draw(rng, tokenizer) for _ in range(count)]


def _draw(rng: random.Random, tokenizer: Tokenizer) -> Asked:
    kind = rng.choices(("whole", "stream", "vanishes", "refused", "looks"), (50, 30, 8, 8, 4))[0]
    if kind == "refused":
        path, body, status = rng.choice(REFUSED)
        return Asked(kind, path, {}, body, status)
    if kind == "looks":
        return Asked(kind, rng.choice(("/health", "/v1/models", "/")), {})
    prompts = [
        [tokenizer.separator_id, *tokenizer.encode(rng.choice(WORDS))] for _ in range(rng.choice((1, 1, 1, 2, 3)))
    ]
    fields: dict[str, Any] = {name: rng.choice(values) for name, values in SETTINGS.items()}
    fields |= {"prompt": prompts, "seed": rng.randrange(2**31), "max_tokens": rng.randint(1, 40)}
    fields |= {"n": rng.choice((1, 1, 1, 2, 4)), "stream": kind == "stream", "return_token_ids": True}
    if rng.random() < 0.25:
        fields["stop"] = rng.choice(STOPS)
    if rng.random() < 0.25:
        fields["logprobs"] = rng.randint(0, 5)
    if rng.random() < 0.25:
        fields["routed_experts"] = True
    if rng.random() < 0.15:
        fields |= {"echo": True, "prompt": [prompt[:16] for prompt in prompts]}
    if kind == "vanishes":
        fields |= {"max_tokens": 4000, "stream": rng.random() < 0.5}
    return Asked(kind, "/v1/completions", fields)


class Judge:
    """Compares answers with the texts of `generate`."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        self.counts: collections.Counter[str] = collections.Counter({"ties decided the other way": 0})
        self.wrong: list[str] = []

    def _expect(self, request: Asked, right: bool, problem: str) -> None:
        if not right:
            self.wrong.append(f"{problem}: {request}")

    def judge(self, request: Asked, answer: Any) -> None:
        """Count the request, and note what is wrong with its answer."""
        self.counts[f"requests of the kind: {request.kind}"] += 1
        if request.kind == "vanishes":
            return
        if not isinstance(answer, list):
            self._expect(request, answer == request.status and request.kind in ("refused", "looks"), f"status {answer}")
            return
        count = request.fields["n"]
        wanted = [(prompt, number) for prompt in request.fields["prompt"] for number in range(count)]
        self._expect(request, len(answer) == len(wanted), f"{len(answer)} texts")
        for (prompt, number), told in zip(wanted, answer, strict=False):
            self._text(request, prompt, told, self.oracle.generated(prompt, request.fields, number))

    def same(self, request: Asked, first: Any, second: Any) -> None:
        """A request that was sent again has the same answer, bit by bit."""
        self.counts["requests sent again, alone"] += 1
        self._expect(request, first == second, f"another answer than before: {first} {second}")

    def _text(self, request: Asked, prompt: list[int], told: Told, expected: Generated) -> None:
        self.counts["texts compared with generate"] += 1
        fields, echoed = request.fields, len(prompt) if request.fields.get("echo") else 0
        tokens = told.tokens[echoed:]
        differs = next((n for n, (a, b) in enumerate(zip(expected.tokens, tokens, strict=False)) if a != b), None)
        if differs is not None:
            near = self.oracle.was_near(expected.draws[differs], tokens[differs])
            self.counts["ties decided the other way"] += near
            self._expect(request, near, f"token {differs} is {tokens[differs]}, not {expected.tokens[differs]}")
            return
        decode = self.oracle.tokenizer.decode
        before = decode(prompt[1:]) if echoed else ""
        whole = decode(expected.tokens)
        cuts = [whole.find(stop) for stop in fields.get("stop", ()) if stop in whole]
        text = whole[: min(cuts)] if cuts else whole
        finish = "stop" if cuts or expected.ended else "length"
        right = (told.text, told.finish) == (before + text, finish)
        self._expect(request, right, f"{told}, expected {before + text!r}, {finish}")
        if "logprobs" in fields:
            self._logprobs(request, told.logprobs[echoed:], tokens, expected)
        if fields.get("routed_experts"):
            self._experts(request, told, len(told.tokens))

    def _logprobs(self, request: Asked, found: list[float | None], tokens: list[int], expected: Generated) -> None:
        own = [self.oracle.logprob(draw[0], token) for draw, token in zip(expected.draws, tokens, strict=False)]
        right = len(found) == len(tokens) and all(
            a is not None and abs(a - b) <= LOGPROB_TOLERANCE for a, b in zip(found, own, strict=True)
        )
        self._expect(request, right, f"log-probabilities {found}, expected {own}")

    def _experts(self, request: Asked, told: Told, count: int) -> None:
        layers = {len(chosen) for chosen in told.experts}
        choices = {len(chosen) for token in told.experts for chosen in token}
        right = len(told.experts) == count and layers <= {self.oracle.layers} and choices <= {self.oracle.top_k}
        self._expect(request, right, f"experts of {len(told.experts)} tokens: {layers} layers, {choices} choices")
