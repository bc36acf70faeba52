"""The API over HTTP: completions as `generate` writes them, their fields, and answers to what cannot be."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")
pytest.importorskip("uvicorn", reason="needs the extra `serve`")
pytest.importorskip("pydantic", reason="needs the extra `serve`")

from moe_jax.inference.sampling import Sampling
from moe_jax.serving import requests
from moe_jax.serving.completions import Completion
from moe_jax.serving.requests import ModelCard
from moe_jax.serving.streams import GenerationResponse
from moe_jax.serving.texts import Event, Piece, TextRequest
from tests.serving import made
from tests.serving.site import KEY, Site, site


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("run")
    (folder / "summary.json").write_text('{"openings": ["Once upon", "One day", "In a"], "val_bits_per_byte": 1.5}')
    with site(folder) as running:
        yield running


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("run"), tuned=True) as running:
        yield running


def told(seed: int, number: int = 0, limit: int = 12, prompt: list[int] | None = None, **settings: Any) -> str:
    sampling = Sampling(**({"temperature": 1.0} | settings))
    return made.generated(TextRequest(prompt or made.PROMPT, sampling, seed, number, limit))


def test_a_completion_is_the_text_of_generate(api: Site) -> None:
    answer = api.complete(model="tiny", prompt="One", seed=5, max_tokens=12, n=3, top_k=30).json
    assert [choice["text"] for choice in answer["choices"]] == [told(5, n, top_k=30) for n in range(3)]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert (answer["object"], answer["model"], answer["seed"]) == ("text_completion", "tiny", 5)
    drawn = answer["usage"]["completion_tokens"]
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": drawn, "total_tokens": 4 + drawn}


def test_a_stream_is_the_same_text_in_pieces(api: Site) -> None:
    answer = api.complete(prompt="One", seed=5, max_tokens=12, n=2, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, last = answer.events
    for n in range(2):
        choices = [event["choices"][0] for event in events if event["choices"][0]["index"] == n]
        assert "".join(choice["text"] for choice in choices) == told(5, n)
        assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
        assert choices[-1]["finish_reason"] in ("stop", "length")
    assert (last["choices"], last["usage"]["prompt_tokens"]) == ([], 4)
    assert len({event["id"] for event in answer.events}) == 1


def test_several_prompts_and_prompts_of_tokens(api: Site) -> None:
    ids = [made.SEPARATOR, *b"Two"]
    fields = {"prompt": ["One", "Two"], "seed": 5, "n": 2, "max_tokens": 8, "return_token_ids": True, "echo": True}
    answer = api.complete(**fields).json
    texts = [told(5, n, 8, p) for p in (made.PROMPT, ids) for n in range(2)]
    assert [choice["text"] for choice in answer["choices"]] == ["One" + t for t in texts[:2]] + [
        "Two" + t for t in texts[2:]
    ]
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [made.PROMPT] * 2 + [ids] * 2
    assert answer["usage"]["prompt_tokens"] == 8
    assert answer["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) - 4 for choice in answer["choices"])
    assert api.complete(prompt=ids, seed=5, max_tokens=8).json["choices"][0]["text"] == texts[2]
    assert api.complete(prompt=[ids], seed=5, max_tokens=8).json["choices"][0]["text"] == texts[2]


def test_probabilities_tokens_and_experts_line_up(api: Site) -> None:
    fields = {"prompt": "One", "seed": 5, "max_tokens": 12, "logprobs": 3, "echo": True, "routed_experts": True}
    answer = api.complete(**fields, return_token_ids=True)
    (choice,) = answer.json["choices"]
    found = choice["logprobs"]
    assert choice["text"] == "One" + told(5)
    assert choice["prompt_token_ids"] == made.PROMPT == choice["token_ids"][:4]
    count = len(choice["token_ids"])
    assert {len(found[name]) for name in found} == {count}
    assert len(choice["routed_experts"]) == len(choice["gates"]) == count
    assert all(len(layers) == 2 and all(len(pair) == 2 for pair in layers) for layers in choice["routed_experts"])
    assert found["token_logprobs"][0] is None
    for n in range(1, count):
        assert list(found["top_logprobs"][n].values()) == sorted(found["top_logprobs"][n].values(), reverse=True)
        assert len(found["top_token_ids"][n]) == 3
        if choice["token_ids"][n] in found["top_token_ids"][n]:
            place = found["top_token_ids"][n].index(choice["token_ids"][n])
            value = list(found["top_logprobs"][n].values())[place]
            assert found["token_logprobs"][n] == pytest.approx(value, abs=1e-4)
    streamed = [event["choices"][0] for event in api.complete(**fields, return_token_ids=True, stream=True).events]
    for name in ("token_ids", "routed_experts", "gates"):
        assert [x for part in streamed for x in part[name]] == choice[name]
    for name in found:
        assert [x for part in streamed for x in part["logprobs"][name]] == found[name]
    assert [part.get("prompt_token_ids") for part in streamed] == [made.PROMPT, *[None] * (len(streamed) - 1)]


def test_a_prompt_can_be_scored_without_writing(api: Site) -> None:
    (choice,) = api.complete(prompt=made.PROMPT, max_tokens=0, echo=True, logprobs=1).json["choices"]
    assert (choice["finish_reason"], len(choice["logprobs"]["tokens"])) == ("length", 4)


def test_stop_strings(api: Site) -> None:
    text = told(5, limit=30)
    answer = api.complete(prompt="One", seed=5, max_tokens=30, stop=["nowhere", text[4:6]]).json["choices"][0]
    assert (answer["text"], answer["finish_reason"]) == (text[: text.index(text[4:6])], "stop")


def test_models_health_and_the_page(api: Site) -> None:
    api.complete(prompt="One", max_tokens=2)
    (card,) = api.ask("/v1/models").json["data"]
    about = card.pop("moe_jax")
    assert (card["id"], card["object"]) == ("tiny", "model")
    assert about["prompts"] == ["Once upon", "One day", "In a"]
    assert (about["expert_layers"], about["experts"], about["experts_per_token"]) == ([0, 1], 4, 2)
    assert (about["context"], about["vocab_size"], about["chat"], about["slots"]) == (32, 257, False, 3)
    assert about["val_bits_per_byte"] == 1.5
    assert api.ask("/health").json == {"status": "ok", "slots": 3, "busy": 0, "queued": 0, "cancelled": 0}
    page = api.ask("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_headers_of_every_answer(api: Site) -> None:
    """A browser may not guess a type, keep a stream, or show the page in a frame of another site."""
    page, stream = api.ask("/"), api.complete(prompt="One", max_tokens=2, stream=True)
    full, absent = api.complete(prompt="a", n=9), api.ask("/nowhere")
    for answer in (page, stream, full, absent, api.ask("/health"), api.complete(prompt="One", max_tokens=2)):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "server" not in answer.headers
    assert page.headers["referrer-policy"] == "no-referrer"
    assert (page.headers["x-frame-options"], page.headers["cache-control"]) == ("DENY", "no-cache")
    assert stream.headers["cache-control"] == "no-store"
    assert (full.status, full.json["error"]["code"], full.headers["retry-after"]) == (429, "queue_full", "1")
    assert "retry-after" not in absent.headers | page.headers
    assert full.headers["content-type"] == absent.headers["content-type"] == "application/json"


WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({}, 400, "prompt: Field required"),
    ({"prompt": [300]}, 400, "token 300 is outside the vocabulary of 257"),
    ({"prompt": "\ud800"}, 400, "body: Invalid JSON"),
    ({"prompt": "a", "temperature": "very hot " * 9999}, 400, "temperature: Input should be a valid number"),
    ({"prompt": "a", "model": "gpt-4"}, 404, "this server has 'tiny'"),
    ({"prompt": "a", "n": 9}, 429, f"9 more texts cannot wait; at most {made.QUEUE} may"),
]


@pytest.mark.parametrize(("fields", "status", "problem"), WRONG, ids=[problem for *_, problem in WRONG])
def test_what_cannot_be_is_answered_with_what_can(api: Site, fields: dict[str, Any], status: int, problem: str) -> None:
    answer = api.complete(**fields)
    assert (answer.status, problem in answer.problem) == (status, True), answer.text
    assert api.ask("/health").json["busy"] == 0


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_object(api: Site, body: bytes) -> None:
    assert api.ask("/v1/completions", body).status == 400


def test_a_body_that_is_too_large(api: Site) -> None:
    answer = api.ask("/v1/completions", b" " * (requests.MAX_BODY_BYTES + 1))
    assert (answer.status, answer.problem) == (413, "the body has more than 1,048,576 bytes, the most that is allowed")
    fits = b'{"prompt": "a", "max_tokens": 1}'
    assert api.ask("/v1/completions", fits + b" " * (requests.MAX_BODY_BYTES - len(fits))).status == 200


def test_paths_and_methods_that_are_not_there(api: Site) -> None:
    assert api.ask("/v1/embeddings", {}).status == 404
    assert api.ask("/v1/completions").status == 405
    assert "docs/serving.md" in api.ask("/nowhere").problem


def test_chat_needs_a_tuned_run(api: Site) -> None:
    answer = api.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
    assert (answer.status, answer.json["error"]["code"]) == (400, "not_tuned")


def test_a_tuned_run_answers_in_its_role_format(tuned: Site) -> None:
    prompt = [made.SEPARATOR, *b"user\nhi", made.SEPARATOR, *b"assistant\n"]
    fields = {"messages": [{"role": "user", "content": " hi "}], "seed": 5, "max_tokens": 9}
    fields |= {"logprobs": True, "top_logprobs": 2, "return_token_ids": True, "routed_experts": True}
    whole = tuned.ask("/v1/chat/completions", fields).json
    (choice,) = whole["choices"]
    assert choice["message"] == {"role": "assistant", "content": told(5, 0, 9, prompt)}
    assert (whole["object"], choice["prompt_token_ids"]) == ("chat.completion", prompt)
    entries = choice["logprobs"]["content"]
    assert [entry["token_id"] for entry in entries] == choice["token_ids"]
    assert [bytes(entry["bytes"]) for entry in entries] == [bytes([token]) for token in choice["token_ids"]]
    assert {len(entry["top_logprobs"]) for entry in entries} == {2}
    alone = tuned.ask("/v1/chat/completions", fields | {"top_logprobs": 0}).json["choices"][0]["logprobs"]["content"]
    assert alone == [entry | {"top_logprobs": []} for entry in entries]
    parts = tuned.ask("/v1/chat/completions", fields | {"stream": True}).events
    choices = [part["choices"][0] for part in parts]
    assert "".join(part["delta"].get("content", "") for part in choices) == choice["message"]["content"]
    assert [part["delta"].get("role") for part in choices] == ["assistant", *[None] * (len(choices) - 1)]
    assert [x for part in choices for x in part["routed_experts"]] == choice["routed_experts"]
    assert (parts[0]["object"], choices[-1]["finish_reason"]) == ("chat.completion.chunk", choice["finish_reason"])


# Failures


def test_health_says_that_the_engine_has_ended(tmp_path: Path) -> None:
    with site(tmp_path) as running:
        running.engine.stop()
        answer = running.ask("/health")
        assert (answer.status, answer.json["status"]) == (503, "failed")


def test_what_was_written_before_a_failure_is_sent() -> None:
    """Two texts of one answer: a piece of the first waits with the failure of the second."""
    answer = Completion(b'{"prompt": "One", "n": 2, "stream": true}', ModelCard(made.run(), "tiny", 1, Path("no")))
    engine: Any = SimpleNamespace(submit=submit_and_fail, cancel=lambda requests: None, queue=1)
    sent: list[bytes] = []

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    async def whole() -> None:
        await GenerationResponse(answer, engine)({}, receive, send)

    asyncio.run(whole())
    first, last, end = b"".join(sent).decode().split("\n\n")[:3]
    assert json.loads(first.removeprefix("data: "))["choices"][0]["text"] == "news"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "failed"
    assert end == "data: [DONE]"


def submit_and_fail(requests: list[TextRequest]) -> None:
    requests[0].listener(Event([Piece(65, "news", None, [], None, None)]))
    requests[1].listener(Event([], "failed"))


# Who may ask


def test_other_hosts_and_other_sites_are_refused(api: Site) -> None:
    own = f"http://127.0.0.1:{api.port}"
    for headers in ({}, {"Host": "localhost:1"}, {"Host": "[::1]:80"}, {"Origin": own}, {"Origin": "https" + own[4:]}):
        assert api.ask("/v1/models", headers=headers).status == 200, headers
    for name in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", ""):
        assert api.ask("/v1/models", headers={"Host": name}).json["error"]["code"] == "host", name
    for origin in ("null", "http://evil.example", f"http://localhost:{api.port + 1}", own + ".evil.example"):
        answer = api.ask("/v1/completions", {"prompt": "a"}, {"Origin": origin})
        assert (answer.status, answer.json["error"]["code"]) == (403, "origin"), origin


def test_a_key_and_an_allowed_site(tmp_path: Path) -> None:
    other = "https://friend.example"
    with site(tmp_path, key=KEY, origins=[other]) as locked:
        assert locked.ask("/health").status == locked.ask("/").status == 200
        for value in ("", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer é"):
            assert locked.ask("/v1/models", headers={"Authorization": value}).status == 401, value
        right = {"Authorization": f"Bearer {KEY}"}
        assert locked.ask("/v1/models", headers=right).status == 200
        answer = locked.ask("/v1/models", headers=right | {"Origin": other})
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, other)
        # A page of that site can read why it was refused: by the key, and by the program.
        for path, headers, status in (("/v1/models", {}, 401), ("/nowhere", right, 404)):
            refused = locked.ask(path, headers=headers | {"Origin": other})
            assert (refused.status, refused.headers["access-control-allow-origin"]) == (status, other)
        asked = {"Origin": other, "Access-Control-Request-Method": "POST"}
        asked |= {"Access-Control-Request-Headers": "authorization"}
        assert locked.ask("/v1/completions", headers=asked, method="OPTIONS").status == 200
        assert locked.ask("/v1/models", headers=right | {"Origin": "https://foe.example"}).status == 403


def test_every_event_is_json_whatever_the_text(api: Site) -> None:
    """Line ends and control characters of a text stay inside their event."""
    fields = {"prompt": [made.SEPARATOR, 13, 10], "temperature": 50, "max_tokens": 60, "stream": True, "n": 2}
    answer = api.complete(**fields)
    text = "".join(event["choices"][0]["text"] for event in answer.events)
    assert any(ord(c) < 32 or ord(c) > 126 for c in text)
