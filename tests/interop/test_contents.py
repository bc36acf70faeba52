"""What is in an exported page and in a model card, to the last line."""

import dataclasses
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_jax.interop.export as module
from moe_jax.interop import html
from moe_jax.interop.source import open_source
from moe_jax.model.costs import count_parameters, totals, training_flops
from moe_jax.model.quantized import quantize
from moe_jax.runs.arrays import named_leaves
from moe_jax.runs.load import open_run
from tests.interop.saved import save


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("run"), layers=1)


def unpacked(page: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The header and the tensors of a page, read as its worker reads them: "=" and a byte are the byte less 64."""
    begin = page.rindex(b'id="weights">') + len(b'id="weights">')
    element = page[begin : page.index(b"</script>", begin)]
    assert not set(element) & set(b"\0\r<")
    packed = re.sub(rb"=(.)", lambda found: bytes([found[1][0] - 64]), element, flags=re.DOTALL)
    data = zlib.decompress(packed)
    length = int.from_bytes(data[:4], "little")
    header, weights = json.loads(data[4 : 4 + length]), data[4 + length :]
    assert length % 4 == 0
    tensors = {}
    for name, dtype, shape, at in header["tensors"]:
        assert at % 4 == 0
        tensors[name] = np.frombuffer(weights, dtype, int(np.prod(shape)), at).reshape(shape)
    return header, tensors


def test_a_page_holds_the_weights_of_quantize(run: Path) -> None:
    """Codes and routers stand with the inputs of an output side by side; all else is as it is, in float32."""
    opened = open_run(run)
    header, tensors = unpacked(html.html_page(opened, "tiny", {"openings": ["Once"]}))
    expected = {name: np.asarray(leaf) for name, leaf in named_leaves(quantize(opened.params, "int8")).items()}
    assert tensors.keys() == expected.keys()
    for name, leaf in expected.items():
        turned = leaf.swapaxes(-1, -2) if name.endswith((".codes", ".router")) else leaf
        np.testing.assert_array_equal(tensors[name], turned)
        assert tensors[name].dtype == (np.int8 if name.endswith(".codes") else np.float32)
    assert header["model"]["width"] == opened.config.model.width
    assert header["model"]["routing"]["top_k"] == opened.config.model.routing.top_k
    assert header["tokenizer"] == opened.tokenizer.to_dict()
    assert (header["entry"]["id"], header["entry"]["moe_jax"]["prompts"]) == ("tiny", ["Once"])


def test_a_page_may_start_its_worker_and_read_itself(run: Path) -> None:
    page = html.html_page(open_run(run), "tiny", {}).decode("windows-1252", "replace")
    assert "connect-src 'self'; worker-src blob:" in page
    assert 'charset="windows-1252"' in page.lower()


def test_the_whole_card(run: Path) -> None:
    """Every line, of a run that a summary says nothing of."""
    saved = open_source(run)
    config = dataclasses.replace(
        saved.config, train=dataclasses.replace(saved.config.train, batch_size=8, grad_accum=4)
    )
    checkpoint = dataclasses.replace(saved.checkpoint, manifest=saved.checkpoint.manifest | {"step": 20})
    source = dataclasses.replace(saved, config=config, checkpoint=checkpoint, summary={})
    model, counts, flops = config.model, totals(count_parameters(config.model)), training_flops(config, 20)
    rows = [
        f"| parameters | {counts.total:,}, of which {counts.active:,} are active for a token |",
        f"| shape | 1 layers of width 64, 4 heads, context {model.seq_len} |",
        f"| experts | 8 of {model.expert_hidden}, top-2 |",
        "| tokenizer | byte, 257 entries; a text begins and ends with `<|endoftext|>` |",
        f"| trained on | {source.config.data.source} |",
        f"| training | {20 * 32 * model.seq_len:,} tokens in 20 steps, {flops:.2e} floating-point operations |",
        "| checkpoint | step 20 |",
        "| exported by | `the command` |",
    ]
    card = module.model_card(source, "name", "the command", ["config.json"])
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: ")
    assert [line for line in card.splitlines() if line.startswith("| ") and "what" not in line] == rows
    assert "It goes on with a text; it does not follow instructions." in card
    assert "Files: `config.json`." in card
    plain = module.model_card(source, "name", "the command", ["model.safetensors"])
    assert "library_name" not in plain
    assert "pipeline" not in plain.partition("pipeline_tag")[2]
    dense = dataclasses.replace(source.config, model=dataclasses.replace(model, dense="active"))
    card = module.model_card(dataclasses.replace(source, config=dense), "name", "", [])
    assert f"| experts | none: a dense feed-forward network of {dense.model.dense_hidden} |" in card
    assert 'tags: ["moe-jax"]' in card
    tuned = dataclasses.replace(source.config, data=dataclasses.replace(source.config.data, format="chat"))
    card = module.model_card(dataclasses.replace(source, config=tuned), "name", "", ["config.json", "Modelfile"])
    assert "It is fine-tuned on conversations" in card
    assert "ollama create name -f Modelfile" in card
    assert "transformers import" not in card
