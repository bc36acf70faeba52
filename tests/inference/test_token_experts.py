"""The experts of a text's tokens are those of the pass that generates it, and the pieces are the text."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import DataConfig, UserError
from moe_jax.data.tokenizers import train_tokenizer
from moe_jax.inference.token_experts import TokenExperts
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import merge
from tests.support import tiny

TOKENIZER = train_tokenizer(DataConfig(tokenizer="byte"), None)  # pyright: ignore[reportArgumentType]


def test_pieces_and_experts_of_a_text() -> None:
    """Padding changes nothing, the separator before the text belongs to it, and of a long text the end is routed."""
    config = tiny.config(vocab_size=257, seq_len=16)
    graphdef, params = tiny.build(config)
    experts = TokenExperts(graphdef, params, TOKENIZER, config)
    text = "café"
    pieces = experts.of(text)
    assert "".join(piece.text for piece in pieces) == text
    ids = [TOKENIZER.separator_id, *TOKENIZER.encode(text)]
    _, stats, _ = merge(graphdef, params)(jnp.array([ids]), Mode.GENERATE, trace=True)
    assert stats is not None
    assert stats.trace is not None
    expected = np.asarray(stats.trace.expert_index)[:, 0, 1:]
    np.testing.assert_array_equal(np.stack([piece.experts for piece in pieces], 1), expected)
    assert "".join(piece.text for piece in experts.of("x" * 9 + "abcdefghijklmno")) == "abcdefghijklmno"


def test_a_dense_model_is_refused() -> None:
    config = tiny.config(dense="active", vocab_size=257)
    graphdef, params = tiny.build(config)
    with pytest.raises(UserError, match="no router"):
        TokenExperts(graphdef, params, TOKENIZER, config)
