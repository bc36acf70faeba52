"""The bounds of a request: what is just allowed, what is just refused, and the numbers that docs/serving.md gives."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from moe_jax.data.tokenizers import answer_prompt
from moe_jax.inference.sampling import Sampling
from moe_jax.serving import requests
from moe_jax.serving.answers import ChatCompletion, Completion
from moe_jax.serving.requests import ApiError, ModelCard
from moe_jax.serving.sockets import bind, is_loopback, url
from tests.serving import made

CARD = ModelCard(made.run(), "tiny", made.SLOTS, Path("absent"))
TUNED = ModelCard(made.run(tuned=True), "tiny", made.SLOTS, Path("absent"))
USER = {"role": "user", "content": "hi"}


def completion(**fields: Any) -> Completion:
    return Completion(json.dumps({"prompt": "One"} | fields).encode(), CARD)


def chat(**fields: Any) -> ChatCompletion:
    return ChatCompletion(json.dumps({"messages": [USER]} | fields).encode(), TUNED)


def refused(asked: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as raised:
        asked(**fields)
    return raised.value


@pytest.mark.parametrize(
    ("name", "lowest", "highest", "below", "above"),
    [
        ("n", 1, 128, 0, 129),
        ("max_tokens", 0, 4096, -1, 4097),
        ("logprobs", 0, 5, -1, 6),
        ("seed", 0, 2**31 - 1, -1, 2**31),
        ("top_k", -1, 2**24, -2, 2**24 + 1),
        ("temperature", 0, 100, -0.001, 100.001),
        ("top_p", 1e-6, 1, 0.9e-6, 1.001),
        ("min_p", 0, 1, -0.001, 1.001),
        ("repetition_penalty", 1e-3, 1e3, 0.9e-3, 1000.1),
    ],
)
def test_numbers_have_a_lowest_and_a_highest_value(
    name: str, lowest: float, highest: float, below: float, above: float
) -> None:
    for value in (lowest, highest):
        assert completion(**{name: value}).requests
    for value in (below, above, True, "1", float("nan"), float("inf")):
        error = refused(completion, **{name: value})
        assert (error.status, error.param) == (400, name), value
        assert " must be a " in str(error)


def test_what_is_sent_is_what_the_engine_is_asked() -> None:
    """A whole number may have a point, and null stands for the default."""
    fields = {"temperature": 0.5, "top_k": 3.0, "top_p": 0.25, "min_p": 0.125, "repetition_penalty": 2}
    asked = completion(**fields, seed=7.0, max_tokens=9, n=2, stop=None, logprobs=0, echo=True)
    assert [r.settings for r in asked.requests] == [Sampling(0.5, 3, 0.25, 0.125, 2.0)] * 2
    assert [(r.prompt, r.seed, r.number, r.limit, r.stop) for r in asked.requests] == [
        (made.PROMPT, 7, number, 9, []) for number in range(2)
    ]
    assert [(r.logprobs, r.routing, r.echo, r.cancelled) for r in asked.requests] == [(True, False, True, False)] * 2
    plain = completion()
    assert plain.requests[0].settings == Sampling(1.0, 0, 1.0, 0.0, 1.0)
    assert (plain.requests[0].limit, plain.stream, plain.alternatives) == (16, False, None)
    assert (plain.requests[0].logprobs, plain.requests[0].echo) == (False, False)
    assert completion(top_k=-1).requests[0].settings.top_k == 0
    (one,) = chat().requests
    assert one.limit == 400
    assert chat(max_tokens=3).requests[0].limit == 3
    assert chat(max_tokens=3, max_completion_tokens=4).requests[0].limit == 4
    assert refused(chat, max_completion_tokens=0).param == "max_completion_tokens"
    assert chat(max_completion_tokens=4096, top_logprobs=5, logprobs=True).alternatives == 5
    assert chat(max_tokens=1).alternatives is None


def test_a_seed_that_is_not_sent_is_drawn_and_said() -> None:
    seeds = {completion().requests[0].seed for _ in range(20)}
    assert len(seeds) > 15
    assert 2**30 < max(seeds) < 2**31
    assert min(seeds) >= 0
    asked = completion()
    last = asked.last_chunk()
    assert last is None
    whole = json.loads(asked.whole())
    assert whole["seed"] == asked.requests[0].seed
    assert re.fullmatch("cmpl-[0-9a-f]{24}", whole["id"])
    assert abs(whole["created"] - time.time()) < 60


def test_stop_strings_have_a_number_and_a_length() -> None:
    assert completion(stop=["a" * 200] * 4).requests[0].stop == ["a" * 200] * 4
    assert completion(stop="end").requests[0].stop == ["end"]
    assert completion(stop=[]).requests[0].stop == []
    assert "stop 5 texts: may be at most 4" in str(refused(completion, stop=["a"] * 5))
    assert "a text of 201 characters: may have at most 200" in str(refused(completion, stop=["b", "a" * 201]))
    for value in ("", ["a", ""], [3], 3, {"a": 1}):
        assert "must be a text that is not empty" in str(refused(completion, stop=value)), value


def test_prompts_and_messages_have_a_length_and_a_number() -> None:
    assert len(completion(prompt=["a"] * 128).requests) == 128
    assert len(completion(prompt=["a"] * 64, n=2).requests) == 128
    assert refused(completion, prompt=["a"] * 129).param == "prompt"
    assert refused(completion, prompt=["a"] * 43, n=3).param == "n"
    assert len(completion(prompt=[0] * 65_536).requests[0].prompt) == 65_536
    long = refused(completion, prompt=[0] * 65_537)
    assert (long.status, long.code) == (400, "context_length_exceeded")
    assert completion(prompt=[256]).requests[0].prompt == [256]
    assert "token 257 is outside the vocabulary of 257" in str(refused(completion, prompt=[0, 257]))
    assert "token -1 is outside" in str(refused(completion, prompt=[0, -1]))
    assert completion(prompt="a" * 31, echo=True).requests[0].echo  # 32 tokens with the separator: the whole context
    assert refused(completion, prompt="a" * 32, echo=True).code == "context_length_exceeded"
    for value in ([], [[]], [True], ["a", 3], [["a"]], {"a": 1}, None):
        assert "prompt: must be a text, a list" in str(refused(completion, prompt=value)), value


def test_a_conversation_is_cut_nowhere() -> None:
    """Roles, separators and the beginning of the answer are tokens of the context."""
    parts = {"role": "user", "content": [{"type": "text", "text": " a"}, {"type": "text", "text": "b "}]}
    assert chat(messages=[parts]).requests[0].prompt == [256, *b"user\nab", 256, *b"assistant\n"]
    longest = 14  # the context of 32, less the 17 tokens around it, and one for the answer
    fits = chat(messages=[USER | {"content": "a" * longest}])
    assert len(fits.requests[0].prompt) == made.T - 1
    long = refused(chat, messages=[USER | {"content": "a" * (longest + 1)}])
    assert (long.status, long.code, long.param) == (400, "context_length_exceeded", "messages")
    assert len(answer_prompt(made.run().tokenizer, [])) < made.T
    many = [USER | {"content": "a"}] * 1000
    assert "and the context 32" in str(refused(chat, messages=many)), "a thousand may be sent, if they fit"
    assert "at most 1000 are allowed" in str(refused(chat, messages=[*many, USER]))
    for value in ([], "hi", None):
        assert "messages: must be a list" in str(refused(chat, messages=value))
    assert "messages[1] 'hi': must be an object" in str(refused(chat, messages=[USER, "hi"]))
    for content in (None, 3, [], ["a"], [{"text": "a"}, {"text": None}], " \n"):
        error = refused(chat, messages=[USER | {"content": content}])
        assert "messages[0]: its content must be a text that is not empty" in str(error), content


def test_a_field_that_asks_for_nothing_may_be_there() -> None:
    for name, values in requests._NEUTRAL.items():
        for value in values:
            assert completion(**{name: value}).requests
        error = refused(completion, **{name: "something"})
        assert (error.status, error.param, error.code) == (400, name, "unsupported")
    assert refused(chat, top_logprobs=1).param == "top_logprobs"
    assert chat(top_logprobs=0).alternatives is None
    assert chat(logprobs=True).alternatives == 0
    for value in (3, [], {"include_usage": True, "more": 1}):
        assert refused(completion, stream_options=value).param == "stream_options"
    for value, counted in (({"include_usage": True}, True), ({"include_usage": False}, False), ({}, False)):
        last = completion(stream=True, stream_options=value).last_chunk()
        assert (last is not None) == counted


def test_switches_are_true_or_false() -> None:
    for name in ("stream", "echo", "return_token_ids", "routed_experts"):
        error = refused(completion, **{name: 1})
        assert (error.status, error.param) == (400, name)
        assert completion(**{name: None}).requests
        assert completion(**{name: True}).requests
    assert "messages: " in str(refused(chat, messages=[USER | {"content": "\ud800"}]))


def test_an_error_says_whose_it_is() -> None:
    """The types are those of OpenAI's API: clients try a `server_error` again."""
    for status, kind in ((400, "invalid_request_error"), (499, "invalid_request_error"), (500, "server_error")):
        assert ApiError(status, "no", "n", "code").body() == {
            "error": {"message": "no", "type": kind, "param": "n", "code": "code"}
        }
    long = refused(completion, **{"x" * 200: 1})
    assert long.param == "x" * 80


def test_the_entry_of_a_model_says_when_the_server_began() -> None:
    before = int(time.time())
    card = ModelCard(made.run(), "tiny", made.SLOTS, Path("absent"))
    assert before <= card.created <= time.time()
    assert card.to_dict()["created"] == card.created
    assert (CARD.tuned, TUNED.tuned, CARD.context) == (False, True, made.T)


@pytest.mark.parametrize(
    ("host", "only_here"),
    [
        *[("localhost", True), ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True)],
        *[("0.0.0.0", False), ("192.0.2.1", False), ("::", False), ("example.org", False), ("", False)],
    ],
)
def test_addresses_that_only_this_machine_reaches(host: str, only_here: bool) -> None:
    assert is_loopback(host) == only_here


def test_the_address_of_a_socket() -> None:
    """A port that has been in use a moment ago can be listened on again."""
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        assert url(sock) == f"http://127.0.0.1:{port}"
    with bind("127.0.0.1", port) as again:
        assert again.getsockname()[1] == port
    try:
        sock = bind("::1", 0)
    except Exception:
        pytest.skip("no IPv6 here")
    with sock:
        assert url(sock) == f"http://[::1]:{sock.getsockname()[1]}"


def test_the_page_gives_the_numbers_of_the_code() -> None:
    server, streams = (pytest.importorskip(f"moe_jax.serving.{name}") for name in ("server", "streams"))
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", page.partition("## Limits")[2], re.MULTILINE))
    assert rows["headers of a request"].startswith(f"{server.REQUEST_SECONDS:g} s after connecting")
    assert rows["body"] == f"{requests.MAX_BODY_BYTES / 2**20:g} MiB, within {streams.BODY_SECONDS:g} s"
    assert rows["prompt"].startswith(f"{requests.MAX_PROMPT_TOKENS:,} tokens")
    assert rows["texts of a request (prompts times `n`)"] == str(requests.MAX_TEXTS)
    assert rows["`stop`"] == f"{requests.MAX_STOPS} strings of {requests.MAX_STOP_CHARACTERS} characters"
    assert rows["waiting texts"] == str(requests.MAX_QUEUE)
    assert rows["connections"] == f"{server.MAX_CONNECTIONS:,}"
    assert f"it has {server.STALLED_SECONDS:g} s to take most of them" in page
