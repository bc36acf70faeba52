"""Two reference values for a loss on the embedded corpus: the entropy floor, and the score of a trigram model."""

import json
from dataclasses import asdict, dataclass

from moe_jax.config import DataConfig
from moe_jax.data.token_store import TokenStore
from moe_jax.system.files import write_atomically


@dataclass(frozen=True)
class CorpusBaselines:
    """Two scores on the validation stories, in bits per UTF-8 byte."""

    entropy_floor: float
    """Exact code length of the stories under the grammar that wrote them. On average no model can score lower."""
    trigram: float
    """Score of a word-trigram model of the training text, which sees the two previous words."""


def corpus_baselines(data: DataConfig, store: TokenStore) -> CorpusBaselines | None:
    """Both scores for the embedded corpus, cached in `references.json` beside its tokens. None for any other text."""
    if data.source != "stories":
        return None
    from moe_jax.data.synthetic.stories import VALIDATION_STORIES, entropy_floor_bits_per_byte, generate
    from moe_jax.data.synthetic.trigram import trigram_bits_per_byte

    path = store.folder / "references.json"
    try:
        return CorpusBaselines(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        valid = list(generate(data.stories_seed, "valid", VALIDATION_STORIES))
        train = generate(data.stories_seed, "train", data.stories)
        found = CorpusBaselines(entropy_floor_bits_per_byte(valid), trigram_bits_per_byte(train, valid))
        write_atomically(path, json.dumps(asdict(found)))
        return found
