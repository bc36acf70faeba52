"""The experts of every token of a text, as the model chooses them when it reads or generates the text."""

from typing import NamedTuple

import numpy as np
from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.data.tokenizers import StreamDecoder, Tokenizer
from moe_jax.inference.routing_pass import check_routed, make_decision_step
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import Params


class RoutedPiece(NamedTuple):
    """The text that one token adds, and the experts of the token in each layer."""

    text: str
    experts: np.ndarray
    """int [L, K], the one with the largest gate first."""


class TokenExperts:
    """Routes texts. Nothing is dropped, as in generation. Compiles one program at the first text.

    Raises UserError for a model without routers.
    """

    def __init__(self, graphdef: nnx.GraphDef, params: Params, tokenizer: Tokenizer, config: ModelConfig) -> None:
        check_routed(config)
        self._params, self._tokenizer, self._seq_len = params, tokenizer, config.seq_len
        self._step = make_decision_step(graphdef, Mode.GENERATE)

    def of(self, text: str) -> list[RoutedPiece]:
        """The pieces of a text. Of a text longer than the context, only the last T - 1 tokens are routed."""
        return self.of_tokens(self._tokenizer.encode(text))

    def of_tokens(self, ids: list[int]) -> list[RoutedPiece]:
        """The same for a text in tokens, without the separator before it."""
        ids = ids[-(self._seq_len - 1) :]
        tokens = np.zeros((1, self._seq_len), np.int32)
        tokens[0, : len(ids) + 1] = [self._tokenizer.separator_id, *ids]
        chosen = np.asarray(self._step(self._params, tokens).expert_index)[:, 0]  # [L, T, K]
        decoder = StreamDecoder(self._tokenizer)
        return [RoutedPiece(decoder.feed(token), chosen[:, i + 1]) for i, token in enumerate(ids)]
