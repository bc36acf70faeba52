"""What an export holds in memory beside the weights."""

import tracemalloc
from pathlib import Path

import pytest

from moe_jax.interop.architectures import ExportTarget
from moe_jax.interop.export import export
from moe_jax.interop.source import open_source
from tests.interop.saved import save


@pytest.mark.parametrize("to", ["hf", "safetensors", "gguf"])
def test_an_export_holds_one_layer_at_a_time(to: ExportTarget, tmp_path: Path) -> None:
    """Beside the weights: less than half of what is written, of a model with eight layers."""
    if to == "gguf":
        pytest.importorskip("gguf", reason="the extra gguf is not installed")
    source = open_source(save(tmp_path, layers=8, width=64, expert_hidden=256))
    tracemalloc.start()
    files = export(source, to, "bfloat16", tmp_path / "out", "")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    written = max(file.stat().st_size for file in files)
    assert written > 6e6
    assert peak < written / 2
