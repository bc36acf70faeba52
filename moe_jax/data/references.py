"""What a loss on the embedded corpus is to be compared with: the floor below and a trigram model above."""

import json
from dataclasses import asdict, dataclass

from moe_jax.config import DataConfig
from moe_jax.data.token_store import TokenStore


@dataclass(frozen=True)
class References:
    """Bits per byte of the validation stories."""

    entropy_floor: float
    """Their exact code length under the grammar that wrote them: no model can be below it on average."""
    trigram: float
    """What a word-trigram model of the training text scores: context of two words."""


def references(data: DataConfig, store: TokenStore) -> References | None:
    """Both numbers for the embedded corpus, kept beside its tokens; None for any other text."""
    if data.source != "stories":
        return None
    from moe_jax.data.stories import VALIDATION_STORIES, entropy_floor_bits_per_byte, generate
    from moe_jax.data.trigram import trigram_bits_per_byte

    path = store.folder / "references.json"
    try:
        return References(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        valid = list(generate(data.stories_seed, "valid", VALIDATION_STORIES))
        train = generate(data.stories_seed, "train", data.stories)
        found = References(entropy_floor_bits_per_byte(valid), trigram_bits_per_byte(train, valid))
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(found)))
        draft.replace(path)
        return found
