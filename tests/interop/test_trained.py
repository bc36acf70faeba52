"""A model that was trained: the same greedy text everywhere, and what 8 bits a weight cost."""

import json
from pathlib import Path

import numpy as np
import pytest

import moe_jax
from moe_jax.interop.export import export
from moe_jax.interop.source import open_source
from tests.interop.llama_cpp import LlamaCpp
from tests.reliability import runs

pytestmark = pytest.mark.interop

SETTINGS = ("--model.width", "64", "--model.layers", "2", "--model.seq-len", "128", "--model.expert-hidden", "64")
SETTINGS += ("--set", "data.stories=400", "--data.vocab-size", "512", "--batch-size", "4", "--train.eval-every", "100")
SETTINGS += ("--execution.compute-dtype", "float32", "--steps", "120")
PROMPT, GREEDY = "Once upon a time", 100


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    done = runs.complete([*SETTINGS, "--out", str(folder / "run")], tmp_path_factory.mktemp("cache"))
    assert done.returncode == 0, done.stderr
    source = open_source(folder / "run")
    export(source, "hf", "float32", folder / "hf", "")
    return folder


def greedy(folder: Path) -> list[int]:
    """Our 100 likeliest tokens after the prompt, the separator and the prompt first."""
    run = moe_jax.load_run(folder / "run")
    tokens = [run.tokenizer.separator_id, *run.tokenizer.encode(PROMPT)]
    text = run.generate(PROMPT, temperature=0, max_tokens=GREEDY)
    return [*tokens, *run.tokenizer.encode(text)[len(tokens) - 1 :]]


def test_transformers_writes_the_same_text(trained: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: --extra peers")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(trained / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "hf")
    ids = tokenizer(PROMPT, return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=GREEDY, do_sample=False)[0]
    text = tokenizer.decode(written, skip_special_tokens=True)
    assert text == moe_jax.load_run(trained / "run").generate(PROMPT, temperature=0, max_tokens=GREEDY)
    assert len(written) > 40
    assert torch.isfinite(model(**ids).logits).all()


def test_llama_cpp_writes_the_same_tokens(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: --extra gguf")
    source = open_source(trained / "run")
    export(source, "gguf", "float32", tmp_path / "x", "")
    opened = LlamaCpp(tmp_path / "x" / "model.gguf", 128)
    start = opened.ids(PROMPT)
    expected = moe_jax.load_run(trained / "run").generate(PROMPT, temperature=0, max_tokens=GREEDY)
    found = opened.greedy(start, GREEDY)
    if source.tokenizer.separator_id in found:
        found = found[: found.index(source.tokenizer.separator_id)]
    assert PROMPT + source.tokenizer.decode(found) == expected
    assert len(found) > 40


def test_eight_bits_a_weight_cost_less_than_a_five_hundredth(trained: Path, tmp_path: Path) -> None:
    """The loss on the same 20 windows of validation text."""
    pytest.importorskip("gguf", reason="gguf is not installed: --extra gguf")
    source = open_source(trained / "run")
    run = moe_jax.load_run(trained / "run")
    tokens = run.validation_text(progress=False).store.valid.tokens
    windows = [list(map(int, tokens[i : i + 128])) for i in range(0, 20 * 128, 128)]
    losses = {}
    for dtype in ("float32", "q8_0"):
        export(source, "gguf", dtype, tmp_path / dtype, "")
        opened = LlamaCpp(tmp_path / dtype / "model.gguf", 128)
        losses[dtype] = np.mean([loss(opened.logits(window), window) for window in windows])
    assert abs(losses["q8_0"] / losses["float32"] - 1) <= 0.002
    small, large = ((tmp_path / d / "model.gguf").stat().st_size for d in ("q8_0", "float32"))
    assert small < 0.4 * large


def loss(logits: np.ndarray, tokens: list[int]) -> float:
    """Mean nats of each token after the first."""
    wide = logits[:-1].astype(np.float64)
    top = wide.max(-1, keepdims=True)
    log_total = top[:, 0] + np.log(np.exp(wide - top).sum(-1))
    return float(np.mean(log_total - wide[np.arange(len(wide)), tokens[1:]]))


def test_the_card_tells_of_the_run(trained: Path) -> None:
    card = (trained / "hf" / "README.md").read_text()
    summary = json.loads((trained / "run" / "summary.json").read_text())
    assert f"{summary['val_bits_per_byte']:.4f} bits per byte" in card
    assert f"{summary['params_total']:,}, of which {summary['params_active']:,} are active" in card
