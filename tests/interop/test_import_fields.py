"""The bounds of the fields of a public model's config.json, and where its parameters are made."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_jax.config import ModelConfig, UserError
from moe_jax.interop.pretrained import _buffer
from moe_jax.interop.pretrained_shape import _Reader, read_shape
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


def read_field(kind: str, value: Any, *given: Any) -> Any:
    """A field as `_Reader` reads it; "refused" if it does."""
    try:
        return getattr(_Reader({"field": value}), kind)("field", *given)
    except UserError:
        return "refused"


def test_the_bounds_of_fields() -> None:
    no = "refused"
    sizes = [read_field("_size", v) for v in (1, 2**24 - 1, 0, 2**24, -1, True, 1.0, "1", None)]
    assert sizes == [1, 2**24 - 1, *[no] * 7]
    assert [read_field("_size", v, 7) for v in (None, 3, 0)] == [7, 3, no]
    shared = [read_field("_multiple", v, 96, 48) for v in (None, 0, 48, 144, 49, 47, -48, True, 2**24 // 48 * 48 + 48)]
    assert shared == [2, 0, 1, 3, *[no] * 5]
    numbers = [read_field("_number", v, 5, 1, 9) for v in (None, 1, 9.0, 0.99, 9.01, True, "5", float("nan"))]
    assert numbers == [5.0, 1.0, 9.0, *[no] * 5]
    assert {type(read_field("_number", v, 5, 1, 9)) for v in (None, 1)} == {float}
    assert [read_field("_switch", v, True) for v in (None, True, False, 0, "no")] == [True, True, False, no, no]


@pytest.mark.parametrize(
    ("tokens", "separator"),
    [(None, None), (0, 0), (7, 7), ([7, 8], 7), (2**24 - 1, 2**24 - 1)]
    + [(wrong, "refused") for wrong in (-1, 2**24, True, "7", [], ["7"], 1.0)],
)
def test_the_first_token_that_ends_a_text(tokens: Any, separator: Any) -> None:
    reader = _Reader({"eos_token_id": tokens})
    if separator == "refused":
        with pytest.raises(UserError, match=r"eos_token_id is .*, and must be a token id, or a list of token ids"):
            reader._separator()
    else:
        assert reader._separator() == separator


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
