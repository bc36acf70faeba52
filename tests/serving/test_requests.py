"""The bounds of a request: what is just allowed, what is just refused, and the numbers that docs/serving.md gives."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")
pytest.importorskip("uvicorn", reason="needs the extra `serve`")
pytest.importorskip("pydantic", reason="needs the extra `serve`")

from moe_jax.inference.sampling import Sampling
from moe_jax.serving import requests, server, sockets, streams
from moe_jax.serving.completions import ChatCompletion, Completion
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
    assert raised.value.status == 400
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
        assert completion(**{name: value}).texts
    for value in (below, above, "much", float("nan"), float("inf")):
        assert refused(completion, **{name: value}).param == name, value


def test_what_is_sent_is_what_the_engine_is_asked() -> None:
    """A whole number may have a point, and null stands for the default."""
    fields = {"temperature": 0.5, "top_k": 3.0, "top_p": 0.25, "min_p": 0.125, "repetition_penalty": 2}
    asked = completion(**fields, seed=7.0, max_tokens=9, n=2, stop=None, logprobs=0, echo=True)
    assert [r.settings for r in asked.texts] == [Sampling(0.5, 3, 0.25, 0.125, 2.0)] * 2
    assert [(r.prompt, r.seed, r.number, r.limit, r.stop) for r in asked.texts] == [
        (made.PROMPT, 7, number, 9, []) for number in range(2)
    ]
    assert [(r.logprobs, r.routing, r.echo, r.cancelled) for r in asked.texts] == [(True, False, True, False)] * 2
    plain = completion()
    assert plain.texts[0].settings == Sampling(1.0, 0, 1.0, 0.0, 1.0)
    assert (plain.texts[0].limit, plain.stream, plain.alternatives) == (16, False, None)
    assert (plain.texts[0].logprobs, plain.texts[0].echo) == (False, False)
    assert completion(top_k=-1).texts[0].settings.top_k == 0
    assert chat().texts[0].limit == 400
    assert chat(max_tokens=3, max_completion_tokens=4).texts[0].limit == 4
    assert refused(chat, max_completion_tokens=0).param == "max_completion_tokens"
    assert chat(top_logprobs=5, logprobs=True).alternatives == 5
    assert chat(logprobs=True).alternatives == 0
    assert "top_logprobs needs logprobs" in str(refused(chat, top_logprobs=1))
    assert len({completion().texts[0].seed for _ in range(20)}) > 15, "a seed that is not sent is drawn"


def test_stop_strings_have_a_number_and_a_length() -> None:
    assert completion(stop=["a" * 200] * 4).texts[0].stop == ["a" * 200] * 4
    assert completion(stop="end").texts[0].stop == ["end"]
    for value in (["a"] * 5, ["b", "a" * 201], "", ["a", ""], [3], 3, {"a": 1}):
        assert refused(completion, stop=value).param == "stop", value


def test_prompts_have_a_length_and_a_number() -> None:
    assert len(completion(prompt=["a"] * 64, n=2).texts) == 128
    assert refused(completion, prompt=["a"] * 129).param == "prompt"
    assert "n 3: with 43 prompts it makes 129 texts; at most 128" in str(refused(completion, prompt=["a"] * 43, n=3))
    assert len(completion(prompt=[0] * 65_536).texts[0].prompt) == 65_536
    assert refused(completion, prompt=[0] * 65_537).param == "prompt"
    assert refused(completion, prompt="a" * 65_536).code == "context_length_exceeded"
    assert "token 257 is outside the vocabulary of 257" in str(refused(completion, prompt=[0, 257]))
    assert "token -1 is outside" in str(refused(completion, prompt=[0, -1]))
    assert completion(prompt="a" * 31, echo=True).echo  # 32 tokens with the separator: the whole context
    assert refused(completion, prompt="a" * 32, echo=True).code == "context_length_exceeded"
    for value in ([], [[]], [True], {"a": 1}, None):
        assert refused(completion, prompt=value).param == "prompt", value


def test_a_conversation_is_cut_nowhere() -> None:
    """Roles, separators and the beginning of the answer are tokens of the context."""
    parts = {"role": "user", "content": [{"type": "text", "text": " a"}, {"type": "text", "text": "b "}]}
    assert chat(messages=[parts]).texts[0].prompt == [256, *b"user\nab", 256, *b"assistant\n"]
    longest = 14  # the context of 32, less the 17 tokens around it, and one for the answer
    fits = chat(messages=[USER | {"content": "a" * longest}])
    assert len(fits.texts[0].prompt) == made.T - 1
    long = refused(chat, messages=[USER | {"content": "a" * (longest + 1)}])
    assert (long.code, long.param) == ("context_length_exceeded", "messages")
    assert "32 tokens with their roles, and the context 32" in str(long)
    many = [USER | {"content": "a"}] * 1000
    assert "and the context 32" in str(refused(chat, messages=many)), "a thousand may be sent, if they fit"
    wrong: list[Any] = [[], "hi", None, [USER, "hi"], [*many, USER], [{"content": "a"}], [USER | {"role": "tool"}]]
    wrong += [[USER | {"content": content}] for content in (None, 3, [], ["a"], [{"text": None}], " \n")]
    for value in wrong:
        assert refused(chat, messages=value).param == "messages", value


def test_other_fields_are_ignored() -> None:
    assert completion(user="me", best_of=3, tools=[]).texts
    for value, counted in (({"include_usage": True}, True), ({"include_usage": False}, False), ({}, False)):
        assert (completion(stream=True, stream_options=value).last_chunk() is not None) == counted


def test_an_error_says_whose_it_is() -> None:
    """The types are those of OpenAI's API: clients try a `server_error` again."""
    for status, kind in ((400, "invalid_request_error"), (499, "invalid_request_error"), (500, "server_error")):
        assert ApiError(status, "no", "n", "code").body() == {
            "error": {"message": "no", "type": kind, "param": "n", "code": "code"}
        }


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


def test_the_page_gives_the_numbers_of_the_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", page.partition("## Limits")[2], re.MULTILINE))
    assert rows["body"] == f"{requests.MAX_BODY_BYTES / 2**20:g} MiB, within {streams.BODY_SECONDS:g} s"
    assert rows["prompt"].startswith(f"{requests.MAX_PROMPT_TOKENS:,} tokens")
    assert rows["texts of a request (prompts times `n`)"] == str(requests.MAX_TEXTS)
    assert rows["`stop`"] == f"{requests.MAX_STOPS} strings of {requests.MAX_STOP_CHARACTERS} characters"
    assert rows["waiting texts"] == str(requests.MAX_QUEUE)
    assert rows["connections"] == f"{server.MAX_CONNECTIONS:,}"
    assert rows["idle connection"] == f"{server.IDLE_SECONDS} s"
    assert rows["answer that nobody reads"] == f"{sockets.UNREAD_SECONDS} s, on Linux"
