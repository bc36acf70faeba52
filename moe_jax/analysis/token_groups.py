"""What a token is, in plain words: punctuation, a name, a colour. The report says with it what an expert is for.

Read from the token's own text. Of the embedded stories the word lists are known (`data/vocabulary.py`), so that their
names, colours, clothes and food are told apart; of any other text only what its letters show.
"""

import re
from typing import Any

import numpy as np

from moe_jax.analysis.report_corpus import SIGNIFICANCE, CorpusRouting, chance, log_likelihood_ratio
from moe_jax.analysis.routing_trace import token_pieces
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.data.vocabulary import SLOTS

SEPARATORS, BYTES, SPACES = "separators", "parts of characters", "white space"
PUNCTUATION, NUMBERS, PARTS = "punctuation", "numbers", "parts of words"
GRAMMAR, CAPITALS, WORDS = "small grammatical words", "words with a capital", "other words"
LEAST_TIMES = 1.5
"""How many times more often than by chance a group must come to an expert that is said to be for it."""
LEAST_SHARE = 0.03
"""Least share of the expert's choices that are of such a group."""
MOST_GROUPS, EXAMPLES = 3, 3

_GRAMMATICAL = set(
    re.findall(
        r"\w+",
        """a an the this that these those my your his her its our their i you he she it we they me him us them who which
        what of to in on at by for from with into out up down off over under near after before about as than then and
        or but so if because while when where there here is am are was were be been being do does did have has had will
        would can could shall should may might must not no""",
    )
)
_LISTS = {
    "names": ("hero", "friend"),
    "family": ("elder",),
    "colours": ("colour",),
    "clothes": ("clothes",),
    "food": ("snack", "treat"),
    "things": ("toy",),
    "animals": ("animal",),
    "places": ("place", "spot", "scary"),
    "weather and time of day": ("weather", "time"),
    "feelings": ("sad", "happy", "fright"),
    "games and skills": ("game", "skill"),
    "describing words": ("trait", "pattern", "look", "texture", "build"),
}


def story_words() -> dict[str, str]:
    """The group of each listed word of the embedded stories; of a word on two lists ("bright"), the first's."""
    found: dict[str, str] = {}
    for group, slots in _LISTS.items():
        for word in (word[""] for slot in slots for word in SLOTS[slot]):
            found.setdefault(word, group)
    return found


def group_of(piece: str, listed: dict[str, str]) -> str:
    """The group of a token that is whole characters. A word begins with a space or a capital; what else begins with a
    letter goes on with one (so the byte-level tokenizers have it)."""
    text = piece.strip()
    if not text:
        return SPACES
    if not any(c.isalnum() for c in text):
        return PUNCTUATION
    if text[0].isdigit():
        return NUMBERS
    if not text[0].isupper() and piece[0].isalpha():
        return PARTS
    if text in listed:
        return listed[text]
    if text.lower() in _GRAMMATICAL:
        return GRAMMAR
    return CAPITALS if text[0].isupper() else WORDS


def token_groups(tokenizer: Tokenizer, ids: np.ndarray, stories: bool) -> list[str]:
    """The group of each token id; `stories` where the text is the embedded one."""
    listed = story_words() if stories else {}
    sizes = tokenizer.token_bytes()[ids]
    groups = []
    for token, piece, size in zip(ids, token_pieces(tokenizer, ids), sizes, strict=True):
        if token == tokenizer.separator_id:
            groups.append(SEPARATORS)
        else:
            groups.append(group_of(piece, listed) if len(piece.encode()) == size else BYTES)
    return groups


def group_preferences(corpus: CorpusRouting, tokenizer: Tokenizer, stories: bool) -> list[list[list[dict[str, Any]]]]:
    """For each layer and expert the groups that it is for, the most telling (G^2) first.

    An entry holds `name`; `here` and `all`, the group's share of the expert's choices and of the text; `reach`, the
    share of the group's tokens that choose the expert; `times`, here / all; `g2`, significant after correction; and
    `examples`, the tokens of the group that come to the expert most often.
    """
    ids = np.flatnonzero(corpus.token_counts)
    members: dict[str, list[int]] = {}
    for token, group in zip(ids.tolist(), token_groups(tokenizer, ids, stories), strict=True):
        members.setdefault(group, []).append(token)
    looked_at = corpus.by_token.shape[0] * corpus.by_token.shape[1] * len(members)

    columns = np.array([corpus.token_counts[tokens].sum() for tokens in members.values()])

    def preferences(by_token: np.ndarray) -> list[dict[str, Any]]:
        found, size = [], by_token.sum()
        counts = np.array([by_token[tokens].sum() for tokens in members.values()])
        strengths = log_likelihood_ratio(counts, np.asarray(size), columns, corpus.tokens)
        for (name, tokens), here, column, g2 in zip(members.items(), counts, columns, strengths, strict=True):
            if here < max(LEAST_SHARE * size, LEAST_TIMES * size * column / corpus.tokens, 1):
                continue
            if chance(g2) * looked_at < SIGNIFICANCE:
                best = sorted(tokens, key=lambda t: -by_token[t])[:EXAMPLES]
                examples = token_pieces(tokenizer, np.array([t for t in best if by_token[t]], np.int32))
                shares = {"here": here / size, "all": column / corpus.tokens, "reach": here / column}
                rounded = {
                    k: round(float(v), 4) for k, v in (shares | {"times": shares["here"] / shares["all"]}).items()
                }
                found.append({"name": name, **rounded, "g2": round(float(g2), 1), "examples": examples})
        return sorted(found, key=lambda group: -group["g2"])[:MOST_GROUPS]

    return [[preferences(by_token) for by_token in layer] for layer in corpus.by_token]
