"""The tokens of a run: its batches, the part that is scored during training, and what a sample begins with."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moe_jax.config import RunConfig, UserError
from moe_jax.data.baselines import CorpusBaselines
from moe_jax.data.batches import MaskedBatch, train_positions, validation_subset
from moe_jax.data.chats import answer_prompt
from moe_jax.data.documents import Message
from moe_jax.data.token_store import TokenStore, openings
from moe_jax.data.tokenizers import Stream
from moe_jax.training.evaluate import Evaluation


@dataclass(frozen=True)
class SessionData:
    """The tokens of a run, and its batches."""

    config: RunConfig
    store: TokenStore
    baselines: CorpusBaselines | None
    """Scores of simple models on the validation text, to compare with. None for conversations: only answers are scored,
    and the simple models would have to be scored on them too."""

    def batch(self, step: int) -> np.ndarray | MaskedBatch:
        """int32 [M, B, T+1]: the batch of the step that follows `step` earlier steps. Of conversations, with weights.

        Where all conversations together are shorter than a window, each row holds them, and separators that do not
        count. These stand at the end, where they take no slot of an expert from an earlier token.
        """
        c, split, seq_len = self.config.train, self.store.train, self.config.model.seq_len
        rows, count = c.batch_size * c.grad_accum, len(split.tokens)
        if count > seq_len:
            where = train_positions(count, seed=c.seed, step=step, batch_size=rows, seq_len=seq_len)
        else:
            where = np.tile(np.arange(seq_len + 1), (rows, 1))
        where = where.reshape(c.grad_accum, c.batch_size, -1)
        if split.answers is None:
            return split.tokens[where].astype(np.int32)
        inside, where = where < count, np.minimum(where, count - 1)
        tokens = np.where(inside, split.tokens[where], self.store.tokenizer.separator_id).astype(np.int32)
        return MaskedBatch.of(tokens, inside[..., 1:] & split.answers[where[..., 1:]])

    @cached_property
    def openings(self) -> list[str]:
        """The first words of three documents of the validation text, or its first question."""
        return openings(self.store.tokenizer, self.store.valid.stream)

    def sample_prompt(self) -> list[int]:
        """The tokens that a sample goes on with: the first of the openings."""
        tokenizer, first, valid = self.store.tokenizer, self.openings[:1], self.store.valid
        if valid.answers is not None:
            if tokenizer.template is not None:  # the first conversation, up to its first answer
                return valid.tokens[1 : int(np.argmax(valid.answers))].tolist()
            return answer_prompt(tokenizer, [Message("user", question) for question in first])
        return [tokenizer.separator_id, *tokenizer.encode("".join(first))]

    def subset(self) -> Stream:
        """The fixed part of the validation stream that is scored during training. Raises UserError if it should have
        answers and has none."""
        whole, separator = self.store.valid.stream, self.store.tokenizer.separator_id
        tokens = validation_subset(whole.tokens, separator, self.config.data.eval_tokens)
        answers = None if whole.answers is None else whole.answers[: len(tokens)]
        if answers is not None and not answers[1:].any():  # the first token is never predicted
            raise UserError(
                f"--data.eval-tokens {self.config.data.eval_tokens}: no answer is in the first {len(tokens):,} "
                "validation tokens, so training could not be scored; give a larger number, or move a shorter "
                "conversation to the front"
            )
        return Stream(tokens, answers)

    def stream_of(self, scored: Evaluation) -> str:
        """The name of the stream of a score: "whole", or "subset" if it is a part of the validation stream. Losses of
        different streams cannot be compared."""
        return "whole" if scored.tokens == self.store.valid.targets else "subset"
