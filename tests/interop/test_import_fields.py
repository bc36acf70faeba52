"""The bounds of the fields of a public model's config.json, and where its parameters are made."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_jax.config import ModelConfig, UserError
from moe_jax.interop.pretrained import _buffer
from moe_jax.interop.pretrained_shape import read_shape
from tests.interop.made import llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return llama(tmp_path / "hf")


def test_a_buffer_lies_where_jax_copies_it_and_numpy_reads_it_fast() -> None:
    """jax takes memory as it is where it begins at a multiple of 64 bytes."""
    for size in (0, 1, 100, 4096):
        buffers = [_buffer(size) for _ in range(20)]
        assert {buffer.ctypes.data % 64 for buffer in buffers}.isdisjoint({0})
        assert {buffer.ctypes.data % 16 for buffer in buffers} == {0}
        assert all(len(buffer) >= size for buffer in buffers)


def test_the_number_of_experts_has_two_names(folder: Path) -> None:
    """Both may be there if they agree. A single expert per token needs its probability as the gate."""
    config = json.loads((folder / "config.json").read_text()) | {"architectures": None, "model_type": "qwen3_moe"}
    config |= {"moe_intermediate_size": 16, "num_experts_per_tok": 2}

    def model(**changes: Any) -> ModelConfig:
        (folder / "config.json").write_text(json.dumps(config | changes))
        return read_shape(folder, "--init-from").model

    for names in ({"num_experts": 6}, {"num_local_experts": 6}, {"num_experts": 6, "num_local_experts": 6}):
        assert (model(**names).experts, model(**names).expert_hidden) == (6, 16)
    with pytest.raises(UserError, match="num_experts is 6, and must be num_local_experts too to be imported"):
        model(num_experts=6, num_local_experts=5)
    one = model(num_experts=6, num_experts_per_tok=1, norm_topk_prob=False)
    assert (one.routing.top_k, one.routing.renormalise_gates, one.shared_experts) == (1, False, 0)
    with pytest.raises(UserError, match="norm_topk_prob is true, and must be such that the gate of a single expert"):
        model(num_experts=6, num_experts_per_tok=1, norm_topk_prob=True)
