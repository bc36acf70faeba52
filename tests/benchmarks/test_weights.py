"""Decoding with small weights: the bytes a token reads, by hand; and when llama.cpp is left out."""

import importlib.util
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from moe_jax.benchmarks import llama_cpp, weights
from moe_jax.benchmarks.request import BenchmarkRequest
from moe_jax.data.tokenizers import _byte
from moe_jax.system.machine import Times
from tests.benchmarks.test_benchmarks import config
from tests.support import tiny


def console() -> Console:
    return Console(file=io.StringIO(), width=120)


def test_bytes_of_a_token_by_hand() -> None:
    """Width 16, two layers, 4 experts of 24 hidden units (swiglu), 2 chosen, a tied vocabulary of 60.

    float32, entries: embedding 960; a layer has attention 16 x 48 + 16 x 16 = 1,024, two of four experts
    2 x 3 x 384 = 2,304, and the router 64; five norms of 16. int8: a byte an entry, and four a scale: 60 for the
    embedding, 48 + 16 for attention, 2 x (24 + 24 + 16) for the experts. int4: half a byte an entry, and two bytes for
    a scale of 16 inputs, or of 8 in w_out: 24 = 3 x 8.
    """
    model = config().model
    _, params = tiny.build(model)
    rest = 4 * (2 * 64 + 5 * 16)
    entries = 960 + 2 * (1024 + 2304)
    scales = 60 + 2 * (64 + 2 * (24 + 24 + 16))
    groups = 60 + 2 * (64 + 2 * (24 + 24 + 3 * 16))
    found = {form: weights.bytes_per_token(model, weights.in_form(params, form)) for form in weights.FORMS}
    assert found == {
        "float32": 4 * entries + rest,
        "bfloat16": 2 * entries + rest - 2 * 2 * 64,  # the routers are matrices, too
        "int8": entries + 4 * scales + rest,
        "int4": entries // 2 + 2 * groups + rest,
    }


def test_the_numbers_of_each_form(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"float32": 8.0, "bfloat16": 6.0, "int8": 4.0, "int4": 2.0}
    monkeypatch.setattr(weights, "token_call", lambda *_: None)
    monkeypatch.setattr(weights, "alternate", lambda calls, rounds: {name: Times((seconds[name],)) for name in calls})
    monkeypatch.setattr(weights, "beside_llama_cpp", lambda *_: {"skipped": "no"})
    _, params = tiny.build(config().model)
    found = weights.compare_weights(console(), BenchmarkRequest(config(), 2, 1), params)
    assert found["llama_cpp"] == {"skipped": "no"}
    for form, value in seconds.items():
        assert found["weights"][f"{form}_ms_per_token"] == 1000 * value
        assert found["weights"][f"{form}_of_float32"] == value / 8
        assert found["weights"][f"{form}_bytes_per_token"] > 0


def test_the_ratios_are_theirs_over_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of times: so a ratio above 1 says that ours is faster. `seed-158m` is measured in Mixtral's form."""
    seconds = {f"{who}, {what}": 1.0 for who in ("ours float32", "ours int8") for what in ("token", "prompt")}
    seconds |= {"llama.cpp float32, token": 0.5, "llama.cpp float32, prompt": 2.0}
    seconds |= {"llama.cpp q8_0, token": 0.25, "llama.cpp q8_0, prompt": 4.0}
    monkeypatch.setattr(llama_cpp, "PACKAGES", {})
    monkeypatch.setattr(weights, "_calls", lambda *_: dict.fromkeys(seconds))
    monkeypatch.setattr(weights, "create", lambda *_: None)
    monkeypatch.setattr(weights, "split", lambda _: (None, None))
    monkeypatch.setattr(weights, "alternate", lambda calls, *_, **__: {name: Times((seconds[name],)) for name in calls})
    found = weights.beside_llama_cpp(console(), BenchmarkRequest(config(activation="gelu"), 2, 1))
    assert found == {
        "in_form_of_mixtral": True,
        "token_rate_float32_over_float32": 0.5,
        "prompt_rate_float32_over_float32": 2.0,
        "token_rate_int8_over_q8_0": 0.25,
        "prompt_rate_int8_over_q8_0": 4.0,
        "largest_spread": 0.0,
    }
    assert not weights.beside_llama_cpp(console(), BenchmarkRequest(config(), 2, 1))["in_form_of_mixtral"]


def test_without_llama_cpp_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reason = llama_cpp.why_not(config())
    assert reason.startswith("llama-cpp-py-sync and gguf not installed (`uv run --group interop")
    shown = console()
    assert weights.beside_llama_cpp(shown, BenchmarkRequest(config(), 2, 1)) == {"skipped": reason}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert "--model.activation gelu" in llama_cpp.why_not(config(activation="gelu"))
    assert llama_cpp.why_not(config()) == ""


def test_the_file_that_llama_cpp_reads(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="--extra gguf")
    wanted = config(vocab_size=300, width=32)
    _, params = tiny.build(wanted.model)
    llama_cpp.write_model(tmp_path / "model.gguf", wanted, params, _byte(), "q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.ffn_up_exps.weight"] == "Q8_0"
    assert len(kinds) == 2 + 2 * 10


def test_a_token_of_llama_cpp_is_read_again_and_again_at_one_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, which records what it is asked for."""
    monkeypatch.setattr(llama_cpp, "_silence", lambda: None)
    asked: list[Any] = []

    class Library:
        def llama_batch_init(self, count: int, *_: int) -> Any:
            rows = [[0] for _ in range(count)]
            return SimpleNamespace(token=[0] * count, pos=[0] * count, n_seq_id=[0] * count, seq_id=rows, logits=rows)

        def llama_decode(self, _: Any, batch: Any) -> int:
            asked.append((list(batch.token), list(batch.pos), [int(x) for x in batch.logits]))
            return 0

        def __getattr__(self, name: str) -> Any:
            return lambda *given: asked.append((name, *given[1:])) if "memory_" in name else "memory"

    package = SimpleNamespace(Llama=lambda *_, **__: SimpleNamespace(_lib=Library(), _ctx="context"))
    monkeypatch.setitem(sys.modules, "llama_cpp_py_sync", package)
    read = llama_cpp.LlamaCpp(Path("model.gguf"), 8).token(2)
    assert asked == [("llama_memory_clear", True), ([1, 1], [0, 1], [0, 1])]
    asked.clear()
    read()
    read()
    assert asked == [("llama_memory_seq_rm", 0, 2, -1), ([1], [2], [1])] * 2


def test_both_programs_decode_in_the_middle_of_the_context(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Asked:
        def __init__(self, path: Path, context: int) -> None:
            self.model = (path.stem, context)

        def token(self, position: int) -> Any:
            return (*self.model, "token", position)

        def prompt(self, tokens: list[int]) -> Any:
            return (*self.model, "prompt", len(tokens))

    monkeypatch.setattr(llama_cpp, "write_model", lambda *_: None)
    monkeypatch.setattr(llama_cpp, "LlamaCpp", Asked)
    wanted = config(seq_len=200)
    found = weights._calls(wanted, tiny.build(wanted.model)[1], tmp_path)
    for dtype in ("float32", "q8_0"):
        assert found[f"llama.cpp {dtype}, token"] == (dtype, 200, "token", 100)
        assert found[f"llama.cpp {dtype}, prompt"] == (dtype, 200, "prompt", weights.PROMPT)
    assert {name for name in found if name.startswith("ours")} == {
        f"ours {form}, {what}" for form in ("float32", "int8") for what in ("token", "prompt")
    }
