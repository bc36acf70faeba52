"""The same ids in our tokenizers, in `tokenizers` (transformers) and in llama.cpp, for any text."""

import json
import os
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moe_jax.config import DataConfig
from moe_jax.data.documents import SEPARATOR
from moe_jax.data.tokenizers import Tokenizer, train_tokenizer
from moe_jax.interop import gguf_file
from moe_jax.interop.architectures import architecture_of
from moe_jax.interop.source import open_source
from moe_jax.interop.tokenizers import merges, spelled, tokenizer_json
from tests.interop.llama_cpp import LlamaCpp
from tests.interop.saved import save

PIECES = [" the", "dragon", "'ll", "   ", "\n\n", "1234", "<|end", "oftext|>", "ſs", "😀"]
TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(st.sampled_from("aeht .,'\"\n\t\r\x00\x7f\u00a0é日😀İſ0١²"), max_size=60),
    st.lists(st.sampled_from(PIECES), max_size=20).map("".join),
).filter(lambda text: SEPARATOR not in text)
"""Unicode, control characters, and pieces of words and of the separator. The separator itself is the one difference."""
CASES = 1000


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save(tmp_path_factory.mktemp(kind), tokenizer=kind, layers=1) for kind in ("byte", "bpe")}


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@settings(max_examples=CASES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
@example(text="")
@example(text="\x00\x00 \x00")
def test_transformers_reads_the_same_ids(kind: str, text: str, runs: dict[str, Path]) -> None:
    ours = open_tokenizer(runs[kind])
    theirs = converted(runs[kind])
    encoded = theirs.encode(text)
    assert encoded.ids == [ours.separator_id, *ours.encode(text)]
    assert theirs.decode(encoded.ids) == text


@pytest.mark.interop
@pytest.mark.parametrize("kind", ["byte", "bpe"])
@settings(max_examples=CASES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
@example(text="")
@example(text="\x00\x00 \x00")
def test_llama_cpp_reads_the_same_ids(kind: str, text: str, runs: dict[str, Path]) -> None:
    ours = open_tokenizer(runs[kind])
    assert llama(runs[kind]).ids(text) == [ours.separator_id, *ours.encode(text)]


def test_gpt2_is_spelled_with_its_own_merges() -> None:
    """Its merges are not stored; they follow from the ranks of its entries."""
    if "MOE_JAX_SHARED" not in os.environ:
        pytest.skip("GPT-2's vocabulary is not at hand: set MOE_JAX_SHARED")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(Path(os.environ["MOE_JAX_SHARED"]) / "data" / "tiktoken_cache"))
        ours = train_tokenizer(DataConfig(tokenizer="gpt2"), None)  # pyright: ignore[reportArgumentType]
    pairs = merges(ours)
    assert (len(pairs), pairs[:3]) == (50_000, [("Ġ", "t"), ("Ġ", "a"), ("h", "e")])
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(ours)))
    for text in ("Once upon a time, there was a dragon.", "  Don't\n\n stop 1234 'll'VE", "日本 😀 naïve\x00\x7f"):
        assert theirs.encode(text).ids == [ours.separator_id, *ours.encode(text)]


def test_the_alphabet_spells_bytes_as_gpt2_does() -> None:
    words = spelled(train_tokenizer(DataConfig(tokenizer="byte"), None))  # pyright: ignore[reportArgumentType]
    assert [words[ord(c)] for c in "A! \n\t"] == ["A", "!", "Ġ", "Ċ", "ĉ"]
    assert len(set(words)) == 257
    assert words[256] == SEPARATOR


_OPENED: dict[tuple[str, Path], object] = {}


def open_tokenizer(run: Path) -> Tokenizer:
    return _once("ours", run, lambda: open_source(run).tokenizer)


def converted(run: Path) -> tokenizers.Tokenizer:
    return _once("hf", run, lambda: tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(open_tokenizer(run)))))


def llama(run: Path) -> LlamaCpp:
    def build() -> LlamaCpp:
        pytest.importorskip("gguf", reason="gguf is not installed: --extra gguf")
        source, path = open_source(run), run / "model.gguf"
        gguf_file.write_gguf(path, source, architecture_of(source.config.model), "test", "float32")
        return LlamaCpp(path, 64)

    return _once("llama", run, build)


def _once(kind: str, run: Path, build):
    if (kind, run) not in _OPENED:
        _OPENED[kind, run] = build()
    return _OPENED[kind, run]
