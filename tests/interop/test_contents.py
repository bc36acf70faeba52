"""What is in an exported page and in a model card, to the last line."""

import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_jax.interop import html
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
