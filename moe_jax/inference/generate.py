"""Text generation: a prompt and a seed in, text out. And the experts of the tokens of a text."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from flax import nnx

from moe_jax.data.tokenizers import StreamDecoder, Tokenizer
from moe_jax.inference.decode import Decoder, cast_once
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.traced_pass import make_traced_pass
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import Params
from moe_jax.system.random_keys import Purpose, purpose_key


class RoutedPiece(NamedTuple):
    """The text that one token adds, and the experts of the token in each layer."""

    text: str
    experts: np.ndarray
    """int [L, K], the one with the largest gate first."""


class TextGenerator:
    """Generates text with a model and its tokenizer. The same prompt, settings, seed and number give the same text."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Params,
        tokenizer: Tokenizer,
        seq_len: int,
        decoder: Decoder | None = None,
    ) -> None:
        """`decoder` may be given to share the compiled programs of another generator of the same definition."""
        self._params, self.tokenizer, self._seq_len = cast_once(graphdef, params), tokenizer, seq_len
        self._decoder = decoder or Decoder(graphdef, seq_len, tokenizer.vocab_size)
        self._traced = make_traced_pass(graphdef, Mode.GENERATE)

    def compile(self) -> None:
        """Compile prefill and decoding now, so that the first text does not wait for them. A text that is longer than
        the context compiles one more program."""
        for _ in self.pieces("", Sampling(), seed=0, limit=2):
            pass

    def pieces(self, prompt: str, settings: Sampling, *, seed: int, number: int = 0, limit: int) -> Iterator[str]:
        """The text after the prompt, one piece for each token, to the end of the text or to `limit` tokens.

        `number` selects one of the texts of a seed.
        """
        prompt_ids = [self.tokenizer.separator_id, *self.tokenizer.encode(prompt)]
        return self.continuation(prompt_ids, settings, seed=seed, number=number, limit=limit)

    def continuation(
        self, prompt: Sequence[int], settings: Sampling, *, seed: int, number: int = 0, limit: int
    ) -> Iterator[str]:
        """The same for a prompt of tokens, whose first one is the separator."""
        text, stop = StreamDecoder(self.tokenizer), self.tokenizer.separator_id
        key = purpose_key(seed, Purpose.SAMPLE, number)
        for token in self._decoder.stream(self._params, prompt, settings=settings, key=key, stop=stop, limit=limit):
            yield text.feed(token)
        yield text.finish()

    def routed(self, tokens: Sequence[int]) -> list[RoutedPiece]:
        """The pieces of a text with their experts, as generation routes them, without the separator before it. Of a
        text longer than the context, only the last T - 1 tokens are routed."""
        tokens = tokens[-(self._seq_len - 1) :]
        padded = np.zeros((1, self._seq_len), np.int32)
        padded[0, : len(tokens) + 1] = [self.tokenizer.separator_id, *tokens]
        decisions = self._traced(self._params, padded).decisions
        assert decisions is not None, "the caller asks for a model with routers only"
        experts, decoder = np.asarray(decisions.expert_index)[:, 0], StreamDecoder(self.tokenizer)
        return [RoutedPiece(decoder.feed(token), experts[:, n]) for n, token in enumerate(tokens, start=1)]
