"""Which text a run reads, and how the text becomes tokens.

A new corpus needs a name in `NAMED_CORPORA`. `data/corpora.py` says what else it needs.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from moe_jax.config.section import Section, no_flag

TokenizerKind = Literal["gpt2", "bpe", "byte", "hf"]
DataFormat = Literal["text", "chat"]
Role = Literal["system", "user", "assistant"]
"""Who speaks in a conversation."""

NAMED_CORPORA = ("stories", "tinystories", "wikitext", "pg19")


@dataclass(frozen=True)
class DataConfig(Section, section="data"):
    """Which text, and how it becomes tokens."""

    source: str = "stories"
    """`stories` (embedded), `tinystories`, `wikitext`, `pg19`, or a file or folder of your own."""
    tokenizer: TokenizerKind = "bpe"
    """`gpt2`, `bpe` (byte-level, trained on the training text), `byte`, or `hf`: the tokenizer of the Hugging Face
    folder in --init-from or --upcycle."""
    vocab_size: int = 1024
    """Entries of a `bpe` tokenizer, the 256 bytes and the separator included."""
    stories: int = no_flag(60_000)
    """Training stories that the embedded corpus generates."""
    stories_seed: ClassVar[int] = 0
    """Seed of the embedded corpus."""
    eval_tokens: int = no_flag(65_536)
    """Most tokens of the validation stream that are scored during training, always the same ones. At the end of a run
    the whole stream is scored."""
    format: DataFormat = no_flag("text")
    """What the files hold: `text`, or with the command `sft` conversations (`chat`), of which only the assistant's
    answers are learned and scored."""

    def __post_init__(self) -> None:
        self.check_choices()
        self.check(bool(self.source.strip()), "source", "a corpus name or a path")
        self.check_range(("vocab_size",), 257, 2**20)
        self.check_range(("stories",), 1, 10**8)
        self.check_range(("eval_tokens",), 2, 65_536)
