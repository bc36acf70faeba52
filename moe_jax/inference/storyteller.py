"""Stories out of a trained model: a prompt and a seed in, text out."""

from collections.abc import Iterator

import jax
from flax import nnx

from moe_jax.data.tokenizers import StreamDecoder, Tokenizer
from moe_jax.inference.decode import SAMPLE, Decoder
from moe_jax.inference.sampling import Sampling
from moe_jax.model.transformer import Params


class Storyteller:
    """A model with its tokenizer. The same prompt, settings, seed and number tell the same story."""

    def __init__(self, graphdef: nnx.GraphDef, params: Params, tokenizer: Tokenizer, seq_len: int) -> None:
        self._params, self._tokenizer = params, tokenizer
        self._decoder = Decoder(graphdef, seq_len, tokenizer.vocab_size)

    def pieces(self, prompt: str, settings: Sampling, *, seed: int, number: int = 0, limit: int) -> Iterator[str]:
        """What follows the prompt, as it is drawn, to the end of the story or to `limit` tokens. `number` tells apart
        the stories of one seed."""
        separator = self._tokenizer.separator_id
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), SAMPLE), number)
        text = StreamDecoder(self._tokenizer)
        for token in self._decoder.stream(
            self._params,
            [separator, *self._tokenizer.encode(prompt)],
            settings=settings,
            key=key,
            stop=separator,
            limit=limit,
        ):
            yield text.feed(token)
        yield text.finish()
