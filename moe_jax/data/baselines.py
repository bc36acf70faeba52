"""Reference values for a loss on the embedded corpus: the entropy floor, and the scores of two n-gram models."""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass

from moe_jax.config import DataConfig
from moe_jax.data.token_store import TokenStore
from moe_jax.system.files import write_atomically
from moe_jax.system.json_text import json_text


@dataclass(frozen=True)
class CorpusBaselines:
    """Scores on the validation stories, in bits per UTF-8 byte."""

    entropy_floor: float
    """Exact code length of the stories under the grammar that wrote them. On average no model can score lower."""
    trigram: float
    """Score of a word-trigram model of the training text, which sees the two previous words."""
    kneser_ney_5gram: float
    """Score of a modified Kneser-Ney model of the training text, which sees the four previous words."""


def corpus_baselines(data: DataConfig, store: TokenStore) -> CorpusBaselines | None:
    """The scores for the embedded corpus, cached in `references.json` beside its tokens. None for any other text."""
    if data.source != "stories":
        return None
    from moe_jax.data.synthetic.kneser_ney import kneser_ney_bits_per_byte
    from moe_jax.data.synthetic.stories import VALIDATION_STORIES, entropy_floor_bits_per_byte, generate
    from moe_jax.data.synthetic.trigram import trigram_bits_per_byte

    path = store.folder / "references.json"
    try:
        return CorpusBaselines(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        valid = list(generate(data.stories_seed, "valid", VALIDATION_STORIES))
        train = list(generate(data.stories_seed, "train", data.stories))
        found = CorpusBaselines(
            entropy_floor_bits_per_byte(valid),
            trigram_bits_per_byte(train, valid),
            kneser_ney_bits_per_byte(train, valid),
        )
        with suppress(OSError):  # a cache that cannot be written: they are computed again the next time
            write_atomically(path, json_text(asdict(found)))
        return found
