"""Text generation: a prompt and a seed in, text out."""

from collections.abc import Iterator, Sequence

import jax
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from moe_jax.data.tokenizers import StreamDecoder, Tokenizer, json_digest
from moe_jax.inference.decode import SHORT_PROMPT, Decoder, cast_once
from moe_jax.inference.sampling import Sampling
from moe_jax.model.transformer import Params
from moe_jax.system.files import cache_dir
from moe_jax.system.machine import processor, processor_flags
from moe_jax.system.random_keys import Purpose, purpose_key


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
        self._params, self.tokenizer = cast_once(graphdef, params), tokenizer
        # One more program for a short context would take longer to compile than it saves.
        short = seq_len > 4 * SHORT_PROMPT
        self._decoder = decoder or Decoder(graphdef, seq_len, tokenizer.vocab_size, short_prompts=short)

    def compile(self, prompt: int = 1) -> None:
        """Compile what a text needs after a prompt of `prompt` tokens now, so that it does not wait for it. A text that
        is longer than the context compiles one more program. jax keeps the programs on the disk for later processes."""
        if jax.config.jax_compilation_cache_dir is None:
            # By processor: a program that was compiled for another one may end this process.
            folder = cache_dir() / "programs" / json_digest([processor(), processor_flags()])
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            compilation_cache.reset_cache()  # jax reads its settings at the first compilation only
        self._decoder.compile(self._params, prompt)

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
