"""Which text a run reads, and how the text becomes tokens.

A new corpus needs a name in `NAMED_CORPORA`. `data/corpora.py` says what else it needs.
"""

from dataclasses import dataclass
from typing import Literal

from moe_jax.config.flags import check, check_choices, check_range

TokenizerKind = Literal["gpt2", "bpe", "byte", "hf"]
DataFormat = Literal["text", "chat"]
Role = Literal["system", "user", "assistant"]
"""Who speaks in a conversation."""

NAMED_CORPORA = ("stories", "tinystories", "wikitext", "pg19")


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes tokens."""

    source: str = "stories"
    """`stories` (embedded), `tinystories`, `wikitext`, `pg19`, or a file or folder of your own."""
    tokenizer: TokenizerKind = "bpe"
    """`gpt2`, `bpe` (byte-level, trained on the training text), `byte`, or `hf`: that of the Hugging Face folder in
    --init-from or --upcycle."""
    vocab_size: int = 1024
    """Entries of a `bpe` tokenizer, the 256 bytes and the separator included."""
    stories: int = 60_000
    """Training stories that the embedded corpus generates."""
    stories_seed: int = 0
    """Seed of the embedded corpus."""
    eval_tokens: int = 65_536
    """Most tokens of the validation stream that are scored during training, always the same ones. At the end of a run
    the whole stream is scored."""
    format: DataFormat = "text"
    """What the files hold: `text`, or with the command `sft` conversations (`chat`), of which only the
    assistant's answers are learned and scored."""

    def __post_init__(self) -> None:
        s = "data"
        check_choices(self, s)
        check(bool(self.source.strip()), s, "source", repr(self.source), "a corpus name or a path")
        check_range(self, s, ("vocab_size",), 257, 2**20)
        check_range(self, s, ("stories",), 1, 10**8)
        check_range(self, s, ("stories_seed",), 0, 2**63 - 1)
        check_range(self, s, ("eval_tokens",), 2, 65_536)
