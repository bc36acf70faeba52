"""The page that `export --to html` writes, in a real browser: it computes what the int8 model in JAX computes."""

import base64
import functools
import json
import random
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.config import DataConfig, RunConfig
from moe_jax.data.documents import Message
from moe_jax.data.tokenizers import Tokenizer, _byte, answer_prompt, token_pieces, train_tokenizer
from moe_jax.inference.decode import Decoder
from moe_jax.inference.sampling import Sampling
from moe_jax.interop.html import html_page
from moe_jax.model.moe.layer import Mode, SwitchableMoE, with_switches
from moe_jax.model.precision import choose_policy
from moe_jax.model.quantized import quantize
from moe_jax.model.transformer import merge
from moe_jax.runs.load import LoadedRun
from tests.support import tiny

T, SEPARATOR = 32, 256
KINDS: dict[str, dict[str, Any]] = {
    "nano": {"qk_norm": "head"},
    "story-cpu": {"qk_norm": "head", "kv_heads": 1, "tied_head": False, "scaled_embedding": True},
    "norm of all heads, plain gates": {"qk_norm": "full", "renormalise_gates": False, "top_k": 3},
    "shared experts, balance by bias": {"shared_experts": 2, "balancing": "bias", "top_k": 3},
    "one expert a token": {"top_k": 1, "expert_hidden": 5},
    "LayerNorm, GELU, biases, learned positions": {
        "norm": "layernorm", "activation": "gelu", "bias": True, "positions": "learned"
    },
    "dense": {"dense": "total", "head_size": 6},
}  # fmt: skip
CALL = """([file, code]) => {
    const bytes = Uint8Array.from(atob(file), (c) => c.charCodeAt(0));
    const html = new TextDecoder("windows-1252").decode(bytes);
    const script = html.split('id="worker">')[1].split("</script>")[0];
    const said = [], run = new Function("postMessage", "file", "said", "let onmessage;" + script + ";return (async () => {" + code + "})()");
    return run((message) => { said.push(message); }, bytes.buffer, said);
}"""  # noqa: E501


@functools.lru_cache
def made(kind: str, tuned: bool = False, tokenizer: Tokenizer | None = None) -> LoadedRun:
    """A run of random parameters, without a folder."""
    tokenizer = tokenizer or _byte()
    model = tiny.config(**({"vocab_size": tokenizer.vocab_size, "seq_len": T} | KINDS[kind]))
    config = RunConfig(model=model, data=DataConfig(tokenizer="byte", format="chat" if tuned else "text"))
    graphdef, params = tiny.build(model)
    nowhere: Any = None
    return LoadedRun(config, tokenizer, nowhere, choose_policy("float32"), graphdef, graphdef, params)


@functools.lru_cache
def page_of(kind: str) -> bytes:
    return html_page(made(kind), kind, {"opening": "Once"})


@pytest.fixture(scope="module")
def blank(browser: Any) -> Iterator[Any]:
    page = browser.new_page()
    yield page
    page.close()


def call(blank: Any, page: bytes, code: str) -> Any:
    """What code returns inside the scope of the page's worker."""
    return blank.evaluate(CALL, [base64.b64encode(page).decode(), code])


@functools.lru_cache
def forward(kind: str) -> Any:
    """The jitted (off bool [L, 1, E], tokens) -> logits, experts and gates of the int8 model."""
    run, params = made(kind), quantize(made(kind).params, "int8")
    graphdef = tiny.build(run.config.model, moe=SwitchableMoE)[0]

    def whole(off: jax.Array, tokens: jax.Array) -> Any:
        model = merge(graphdef, with_switches(params, off) if run.config.model.dense == "none" else params)
        hidden, stats, _ = model(tokens, Mode.GENERATE, trace=True)
        trace = stats and (stats.trace.expert_index[:, 0], stats.trace.gate[:, 0])
        return model.logits(hidden[0]), trace

    return jax.jit(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_experts_and_gates_are_those_of_the_int8_model(blank: Any, kind: str) -> None:
    """With experts off too, as the report's ablation switches them off."""
    config = made(kind).config.model
    ids = np.random.default_rng(1).integers(0, 257, (1, 12)).astype(np.int32)
    for off in [[], [2], [0, 2]] if config.dense == "none" else [[]]:
        code = f"""await open(file);
            const all = {ids[0].tolist()}.map((token, t) => model.read(token, t, [[], {off}]));
            return all.map((r) => [[...model.logits(r.hidden)], r.experts, r.gates]);"""
        logits, experts, gates = zip(*call(blank, page_of(kind), code), strict=True)
        switches = np.zeros((config.layers, 1, config.experts), bool)
        switches[1, 0, off] = True
        expected, trace = jax.device_get(forward(kind)(switches, ids))
        assert np.abs(np.array(logits) - expected).max() < 2e-4 * np.abs(expected).max()
        if trace is not None:
            np.testing.assert_array_equal(np.array(experts).swapaxes(0, 1), trace[0])
            np.testing.assert_allclose(np.array(gates).swapaxes(0, 1), trace[1], atol=1e-5)
            assert trace[1][1][np.isin(trace[0][1], off)].sum() == 0


def test_greedy_text_is_what_generate_writes_far_beyond_the_context(blank: Any) -> None:
    run = made("story-cpu")
    code = """await open(file);
        const body = { prompt: "Once", echo: true, max_tokens: 300, temperature: 0, seed: 1, off: [] };
        await write(1, body);
        return said.flatMap(({ event }) => event.choices[0].token_ids ?? []);"""
    ids = call(blank, page_of("story-cpu"), code)
    prompt = [SEPARATOR, *b"Once"]
    decoder = Decoder(run.graphdef, T, 257)
    settings = {"settings": Sampling(0.0), "key": jax.random.key(0), "stop": SEPARATOR, "limit": 300}
    assert ids == [*prompt, *decoder.stream(quantize(run.params, "int8"), prompt, **settings)]


ODD = [
    *(
        "",
        " ",
        "  a  b ",
        "\x00\x00 \x00",
        "Don't\n\n stop 1234 'll'VE 'd",
        "日本 😀 naïve\x7f",
        "ſs İ ٢٣ ²",
        "<|endoftext|>",
    ),
    *(
        "\u0085\u00a0\ufeff x\u2028y\u200b",
        "\r\n\t end   ",
        "\u202e\u05e9\u05dc\u05d5\u05dd",
        "a" * 700,
        " " * 700 + "x",
    ),
]
WORDS = " the dragon 'll    \n\n 1234 <|end oftext|> ſs 😀 Once upon a time, there was a cat and they ate a cake."


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_ids_and_pieces_are_those_of_the_tokenizer(blank: Any, kind: str) -> None:
    ours = _byte() if kind == "byte" else train_tokenizer(DataConfig(tokenizer="bpe", vocab_size=420), [WORDS * 3] * 9)
    page = html_page(made("nano", tokenizer=ours), kind, {})
    alphabet, draw = [*"aeht .,'\n\r\x00\u00a0é日😀İſ0١²", " the", "  "], random.Random(0)
    texts = ODD + ["".join(draw.choices(alphabet, k=40)) for _ in range(200)]
    chat = [Message("user", " hello "), Message("assistant", "a cat"), Message("user", "assistant\nx")]
    messages = [{"role": role, "content": content} for role, content in chat]
    code = f"""await open(file);
        const texts = {json.dumps(texts)};
        const ids = texts.map((text) => tokenizer.encode(text));
        return [ids, tokenizer.pieces, tokenizer.conversation({messages})];"""
    ids, pieces, conversation = call(blank, page, code)
    assert ids == [ours.encode(text) for text in texts]
    assert pieces == token_pieces(ours, np.arange(ours.vocab_size))
    stripped = [message._replace(content=message.content.strip()) for message in chat]
    assert conversation == answer_prompt(ours, stripped)
