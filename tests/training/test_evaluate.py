"""The batches of an evaluation: their size, and that each token is scored once whatever their size."""

from typing import Any

import numpy as np
import pytest

from moe_jax.training.evaluate import evaluate


@pytest.mark.parametrize(("seq_len", "rows"), [(256, 16), (512, 16), (1024, 8), (20_000, 1)])
def test_a_batch_is_bounded(seq_len: int, rows: int) -> None:
    """Sixteen rows of a short context; of a long one at most 8,192 tokens, but at least one row."""
    shapes = set()

    def count(params: object, inputs: Any, targets: Any, start: Any, weights: Any) -> Any:
        shapes.add(inputs.shape)
        return weights.sum(), np.float32(0)

    tokens = np.ones(40 * seq_len + 2, np.uint16)
    scored = evaluate(count, {}, tokens, seq_len=seq_len, token_bytes=np.ones(2, np.int64))
    assert shapes == {(rows, seq_len)}
    assert (scored.loss, scored.tokens) == (1, len(tokens) - 1)
