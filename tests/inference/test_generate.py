"""The generator: the pieces of a text, and the experts that read each."""

import jax.numpy as jnp
import numpy as np

from moe_jax.config import DataConfig
from moe_jax.data.tokenizers import train_tokenizer
from moe_jax.inference.generate import TextGenerator
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import merge
from tests.support import tiny


def test_a_text_in_pieces_with_the_experts_that_read_it() -> None:
    """Padding changes nothing, the separator before the text belongs to it, and of a long text the end is routed."""
    tokenizer = train_tokenizer(DataConfig(tokenizer="byte"))
    graphdef, params = tiny.build(tiny.config(vocab_size=257, seq_len=16))
    generator = TextGenerator(graphdef, params, tokenizer, 16)
    pieces = generator.routed(tokenizer.encode("café"))
    assert "".join(piece.text for piece in pieces) == "café"
    ids = jnp.array([[tokenizer.separator_id, *tokenizer.encode("café")]])
    _, stats, _ = merge(graphdef, params)(ids, Mode.GENERATE, trace=True)
    assert stats is not None
    assert stats.trace is not None
    expected = np.asarray(stats.trace.expert_index)[:, 0, 1:]
    np.testing.assert_array_equal(np.stack([piece.experts for piece in pieces], 1), expected)
    end = generator.routed(list(b"xxxxxxxxxabcdefghijklmno"))
    assert "".join(piece.text for piece in end) == "abcdefghijklmno"
