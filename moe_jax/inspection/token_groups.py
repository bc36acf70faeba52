"""Groups of tokens in plain words (punctuation, names, colours), and the experts that a group prefers.

The group of a token follows from the token's own text. The word lists of the embedded stories are known
(`data/synthetic/vocabulary.py`), so names, colours, clothes and food have groups of their own there. In any other text
only the characters decide.
"""

import re
from typing import Any

import numpy as np

from moe_jax.data.synthetic.vocabulary import SLOTS
from moe_jax.data.tokenizers import Tokenizer, token_pieces
from moe_jax.inspection.corpus_routing import CorpusRouting, log_likelihood_ratio

SEPARATORS, BYTES, SPACES = "separators", "parts of characters", "white space"
PUNCTUATION, NUMBERS, PARTS = "punctuation", "numbers", "parts of words"
GRAMMAR, CAPITALS, WORDS = "small grammatical words", "words with a capital", "other words"
LEAST_TIMES = 1.5
"""A group is reported for an expert only if it chooses the expert at least this many times as often as by chance."""
LEAST_SHARE = 0.03
"""A group is reported for an expert only if at least this share of the expert's choices are of the group."""
MOST_GROUPS, EXAMPLES = 3, 3
GROUP_SIGNIFICANCE, SHUFFLES, SHUFFLE_SEED = 0.01, 500, 0
"""Highest probability of any wrong claim about a model (a p-value), and the number and the seed of the shuffles that
it is computed from."""

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
    """The group of each listed word of the embedded stories. A word on two lists ("bright") is in the first group."""
    found: dict[str, str] = {}
    for group, slots in _LISTS.items():
        for word in (word[""] for slot in slots for word in SLOTS[slot]):
            found.setdefault(word, group)
    return found


def group_of(piece: str, listed: dict[str, str]) -> str:
    """The group of a token that consists of whole characters.

    A token with a space or a capital in front begins a word. Any other token that begins with a letter is a part of a
    word, as in byte-level tokenizers.
    """
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
    """The group of each token id. `stories` says that the text is the embedded corpus."""
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
    """For each group, bool [L, E]: whether its tokens choose the expert more often than other groups' tokens do.

    The claim is about a kind of token, so each different token counts once. All occurrences of one token are routed
    almost alike, so a thousand occurrences are no more evidence than a few. A token's value is the share of its
    occurrences that choose the expert. A group's statistic is the standardised sum of its tokens' values. The
    groups are then shuffled over the tokens SHUFFLES times. Each shuffle gives the largest statistic over all groups,
    experts and layers. A claim holds if at most a share GROUP_SIGNIFICANCE of these maxima reaches the real statistic.
    This is the single-step max-T test of Westfall and Young (1993). If groups have nothing to do with the routing, the
    probability of any claim about the model is at most GROUP_SIGNIFICANCE.

    by_token int [L, E, N] and token_counts int [N] are for the N tokens that occur. `groups` names each token's group.
    """
    names, labels = np.unique(groups, return_inverse=True)
    members = _standardised_members(labels == np.arange(len(names))[:, None])
    shares = by_token / token_counts
    spread = shares.std(-1, keepdims=True)
    # If hardly any token chooses an expert, its spread is so small that one token would make its statistic the largest.
    spread = np.maximum(spread, spread.mean(1, keepdims=True))
    excess = shares - shares.mean(-1, keepdims=True)
    scores = np.divide(excess, spread, out=np.zeros_like(excess), where=spread > 0).reshape(-1, len(labels)).T
    rng = np.random.default_rng(SHUFFLE_SEED)
    largest = np.array([(members[:, rng.permutation(len(labels))] @ scores).max() for _ in range(SHUFFLES)])
    observed = (members @ scores).reshape(len(names), *by_token.shape[:2])
    beaten_by = (largest >= observed[..., None] - 1e-9).sum(-1)  # ties count, even after rounding
    found = (1 + beaten_by) / (1 + SHUFFLES) <= GROUP_SIGNIFICANCE
    return dict(zip(names.tolist(), found, strict=True))


def _standardised_members(members: np.ndarray) -> np.ndarray:
    """Weights [G, N] for the membership bool [G, N]: the weighted sum of values is a statistic of variance 1 per group.

    The values have mean 0 and variance 1 over the N tokens. The sum of n values, drawn without replacement, has the
    variance n (N - n) / (N - 1). The weights divide by its square root.
    """
    n, total = members.sum(1, keepdims=True), members.shape[1]
    variance = n * (total - n) / max(total - 1, 1)
    return np.divide(members, np.sqrt(variance), out=np.zeros(members.shape), where=variance > 0)


def group_preferences(corpus: CorpusRouting, tokenizer: Tokenizer, stories: bool) -> list[list[list[dict[str, Any]]]]:
    """For each layer and expert, the groups that prefer it (see `preferred_groups`), in descending order of G^2.

    An entry holds `name`; `here`, the group's share of the expert's choices; `all`, the group's share of the text;
    `reach`, the share of the group's occurrences that choose the expert; `times`, `here` / `all`; `g2`, which counts
    occurrences, so it only orders the groups and tests none; `examples`, the group's tokens that choose the expert most
    often, of those that choose it more often than an average token does; and `tokens`, the same with their counts:
    `text`; `here`, how often it chose this expert; `all`, how often it occurs.
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
                bears_out = [t for t in tokens if by_token[t] * corpus.tokens > size * corpus.token_counts[t]]
                best = np.array(sorted(bears_out, key=lambda t: -by_token[t])[:EXAMPLES], np.int32)
                examples = token_pieces(tokenizer, best)
                counts_of = zip(examples, by_token[best].tolist(), corpus.token_counts[best].tolist(), strict=True)
                listed = [{"text": text, "here": n, "all": total} for text, n, total in counts_of]
                shares = {"here": here / size, "all": column / corpus.tokens, "reach": here / column}
                rounded = {
                    k: round(float(v), 4) for k, v in (shares | {"times": shares["here"] / shares["all"]}).items()
                }
                found.append(
                    {"name": name, **rounded, "g2": round(float(g2), 1), "examples": examples, "tokens": listed}
                )
        return sorted(found, key=lambda group: -group["g2"])[:MOST_GROUPS]

    layers, experts = corpus.by_token.shape[:2]
    return [[preferences(layer, e) for e in range(experts)] for layer in range(layers)]
