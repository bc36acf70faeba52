"""What a token is, in plain words: punctuation, a name, a colour. The report says with it what an expert is for.

Read from the token's own text. Of the embedded stories the word lists are known (`data/vocabulary.py`), so that their
names, colours, clothes and food are told apart; of any other text only what its letters show.
"""

import re
from typing import Any

import numpy as np

from moe_jax.analysis.report_corpus import CorpusRouting, log_likelihood_ratio
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
GROUP_SIGNIFICANCE, SHUFFLES, SHUFFLE_SEED = 0.01, 500, 0
"""Chance that any expert of a model is said to be for a group where none is, and the shuffles that it is read from."""

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


def preferred_groups(by_token: np.ndarray, token_counts: np.ndarray, groups: list[str]) -> dict[str, np.ndarray]:
    """For each group, bool [L, E]: whether its tokens choose the expert more than those of other groups do.

    The claim is about a kind of token, so the sample is the different tokens, each counted once: all occurrences of
    one are routed almost alike, and a thousand of them are no more evidence than a few. A token's value is the share
    of its occurrences that choose the expert, a group's statistic the mean of them, standardised. The groups are then
    shuffled over the tokens, and what counts is to be among the largest statistics that any group, expert and layer
    then has: the single-step max-T of Westfall and Young (1993). Where groups have nothing to do with the routing, the
    chance of any claim about the model is at most GROUP_SIGNIFICANCE.

    by_token int [L, E, N] and token_counts int [N] are of the N tokens that occur, groups names the group of each.
    """
    names, labels = np.unique(groups, return_inverse=True)
    members = _standardised_members(labels == np.arange(len(names))[:, None])
    shares = by_token / token_counts
    spread = shares.std(-1, keepdims=True)
    # An expert that hardly any token chooses spreads so little that a single one would make its statistic the largest.
    spread = np.maximum(spread, spread.mean(1, keepdims=True))
    excess = shares - shares.mean(-1, keepdims=True)
    scores = np.divide(excess, spread, out=np.zeros_like(excess), where=spread > 0).reshape(-1, len(labels)).T
    rng = np.random.default_rng(SHUFFLE_SEED)
    largest = np.array([(members[:, rng.permutation(len(labels))] @ scores).max() for _ in range(SHUFFLES)])
    observed = (members @ scores).reshape(len(names), *by_token.shape[:2])
    beaten_by = (largest >= observed[..., None] - 1e-9).sum(-1)  # ties count, in spite of rounding
    found = (1 + beaten_by) / (1 + SHUFFLES) <= GROUP_SIGNIFICANCE
    return dict(zip(names.tolist(), found, strict=True))


def _standardised_members(members: np.ndarray) -> np.ndarray:
    """Weights [G, N] that sum values of mean 0 and variance 1 over the tokens of each group, bool [G, N], to a
    statistic of variance 1: n drawn of N without replacement sum to a variance of n (N - n) / (N - 1)."""
    n, total = members.sum(1, keepdims=True), members.shape[1]
    variance = n * (total - n) / max(total - 1, 1)
    return np.divide(members, np.sqrt(variance), out=np.zeros(members.shape), where=variance > 0)


def group_preferences(corpus: CorpusRouting, tokenizer: Tokenizer, stories: bool) -> list[list[list[dict[str, Any]]]]:
    """For each layer and expert the groups that it is for (see `preferred_groups`), the most telling (G^2) first.

    An entry holds `name`; `here` and `all`, the group's share of the expert's choices and of the text; `reach`, the
    share of the group's occurrences that choose the expert; `times`, here / all; `g2`, which counts occurrences and
    so orders the groups but tests none; and `examples`, the tokens of the group that come to the expert most often.
    """
    ids = np.flatnonzero(corpus.token_counts)
    groups = token_groups(tokenizer, ids, stories)
    members: dict[str, list[int]] = {}
    for token, group in zip(ids.tolist(), groups, strict=True):
        members.setdefault(group, []).append(token)
    preferred = preferred_groups(corpus.by_token[..., ids], corpus.token_counts[ids], groups)
    columns = np.array([corpus.token_counts[tokens].sum() for tokens in members.values()])

    def preferences(layer: int, expert: int) -> list[dict[str, Any]]:
        by_token = corpus.by_token[layer, expert]
        found, size = [], by_token.sum()
        counts = np.array([by_token[tokens].sum() for tokens in members.values()])
        strengths = log_likelihood_ratio(counts, np.asarray(size), columns, corpus.tokens)
        for (name, tokens), here, column, g2 in zip(members.items(), counts, columns, strengths, strict=True):
            if here < max(LEAST_SHARE * size, LEAST_TIMES * size * column / corpus.tokens, 1):
                continue
            if preferred[name][layer, expert]:
                best = sorted(tokens, key=lambda t: -by_token[t])[:EXAMPLES]
                examples = token_pieces(tokenizer, np.array([t for t in best if by_token[t]], np.int32))
                shares = {"here": here / size, "all": column / corpus.tokens, "reach": here / column}
                rounded = {
                    k: round(float(v), 4) for k, v in (shares | {"times": shares["here"] / shares["all"]}).items()
                }
                found.append({"name": name, **rounded, "g2": round(float(g2), 1), "examples": examples})
        return sorted(found, key=lambda group: -group["g2"])[:MOST_GROUPS]

    layers, experts = corpus.by_token.shape[:2]
    return [[preferences(layer, e) for e in range(experts)] for layer in range(layers)]
