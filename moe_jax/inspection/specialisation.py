"""What each expert is for: the tokens, and the kinds of tokens, that choose it more often than by chance.

The kind of a token follows from its own characters: punctuation, numbers, parts of words, words.
"""

from typing import Any

import numpy as np
from scipy.stats import chi2, norm

from moe_jax.data.tokenizers import Tokenizer, token_pieces
from moe_jax.inspection.corpus_routing import CorpusRouting

SIGNIFICANCE = 0.001
"""A preference is reported if its p-value is below this level after Bonferroni's correction for all tests."""
LEAST_COUNT = 5
"""A preference is reported only if the token chose the expert at least this often."""
SEPARATORS, BYTES, SPACES = "separators", "parts of characters", "white space"
PUNCTUATION, NUMBERS, PARTS = "punctuation", "numbers", "parts of words"
CAPITALS, WORDS = "words with a capital", "other words"
LEAST_TIMES = 1.5
"""A group is reported for an expert only if it chooses the expert at least this many times as often as by chance."""
LEAST_SHARE = 0.03
"""A group is reported for an expert only if at least this share of the expert's choices are of the group."""
MOST_GROUPS, EXAMPLES, GROUP_SIGNIFICANCE = 3, 3, 0.01


def log_likelihood_ratio(both: np.ndarray, row: np.ndarray, column: np.ndarray, total: int) -> np.ndarray:
    """G^2, the log-likelihood ratio of 2 x 2 tables (Dunning 1993): is a kind of token independent of an expert?

    Of `total` tokens, `row` chose the expert, `column` are of the kind, and `both` are of the kind and chose the
    expert. G^2 is 0 where the counts are exactly as expected from independence. If kind and expert are independent, G^2
    is distributed as chi-square with one degree of freedom.
    """
    row, column = np.broadcast_arrays(row, column)
    observed = np.stack([both, row - both, column - both, total - row - column + both]).astype(float)
    expected = np.stack(
        [row * column, row * (total - column), (total - row) * column, (total - row) * (total - column)]
    )
    expected = expected / total
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(observed > 0, observed * np.log(observed / expected), 0.0)
    return np.maximum(2 * terms.sum(0), 0.0)


def specialisation(corpus: CorpusRouting, most: int = 12) -> list[list[dict[str, Any]]]:
    """For each layer and expert, the tokens that choose the expert more often than by chance, strongest first.

    All of them are significant after correction. An entry holds
    `tokens`: at most `most` of these tokens. Of each: `id`; `here`, how often it chose this expert; `all`, how often it
    occurs; `times`, `here` divided by the count expected by chance; `g2`, its G^2.
    `kinds`: how many different tokens prefer the expert.
    `share`: these tokens' share of all choices of the expert.
    """
    totals = np.diagonal(corpus.together, axis1=1, axis2=2)
    tests = corpus.by_token.shape[0] * corpus.by_token.shape[1] * int((corpus.token_counts >= LEAST_COUNT).sum())
    column = corpus.token_counts
    layers = []
    for by_expert, sizes in zip(corpus.by_token, totals, strict=True):
        layer = []
        for both, size in zip(by_expert, sizes, strict=True):
            expected = size * column / corpus.tokens
            strength = log_likelihood_ratio(both, np.asarray(size), column, corpus.tokens)
            strength = np.where((both > expected) & (both >= LEAST_COUNT), strength, 0.0)
            preferred = np.flatnonzero(strength > chi2.isf(SIGNIFICANCE / max(tests, 1), 1))
            order = preferred[np.argsort(-strength[preferred], kind="stable")]
            tokens = [
                {
                    "id": int(t),
                    "here": int(both[t]),
                    "all": int(column[t]),
                    "times": round(float(both[t] / expected[t]), 2),
                    "g2": round(float(strength[t]), 1),
                }
                for t in order[:most]
            ]
            share = float(both[preferred].sum() / size) if size else 0.0
            layer.append({"tokens": tokens, "kinds": len(preferred), "share": round(share, 4)})
        layers.append(layer)
    return layers


def group_of(piece: str) -> str:
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
    return CAPITALS if text[0].isupper() else WORDS


def token_groups(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    """The group of each token id."""
    sizes = tokenizer.token_bytes()[ids]
    groups = []
    for token, piece, size in zip(ids, token_pieces(tokenizer, ids), sizes, strict=True):
        if token == tokenizer.separator_id:
            groups.append(SEPARATORS)
        else:
            groups.append(group_of(piece) if len(piece.encode()) == size else BYTES)
    return groups


def preferred_groups(by_token: np.ndarray, token_counts: np.ndarray, groups: list[str]) -> dict[str, np.ndarray]:
    """For each group, bool [L, E]: whether its tokens choose the expert more often than other groups' tokens do.

    Each different token counts once: all occurrences of one token are routed almost alike, so a thousand are no more
    evidence than a few. A token's value is the share of its occurrences that choose the expert. The sum over a group's
    n of N tokens, as if drawn without replacement, has the variance n (N - n) / (N - 1) of one value. Divided by its
    deviation, it is compared with the normal distribution at GROUP_SIGNIFICANCE, after Bonferroni's correction for all
    groups, experts and layers.

    by_token int [L, E, N] and token_counts int [N] are for the N tokens that occur. `groups` names each token's group.
    """
    names, labels = np.unique(groups, return_inverse=True)
    members = labels == np.arange(len(names))[:, None]
    n, total = members.sum(1), len(labels)
    shares = by_token / token_counts
    spread = shares.std(-1, keepdims=True)
    # If hardly any token chooses an expert, its spread is so small that one token would make its sum large.
    spread = np.maximum(spread, spread.mean(1, keepdims=True))
    excess = shares - shares.mean(-1, keepdims=True)
    values = np.divide(excess, spread, out=np.zeros_like(excess), where=spread > 0)
    deviation = np.sqrt(np.maximum(n * (total - n) / max(total - 1, 1), 1e-9))
    score = np.einsum("gn,len->gle", members, values) / deviation[:, None, None]
    return dict(zip(names.tolist(), score > norm.isf(GROUP_SIGNIFICANCE / score.size), strict=True))


def group_preferences(corpus: CorpusRouting, tokenizer: Tokenizer) -> list[list[list[dict[str, Any]]]]:
    """For each layer and expert, the groups that prefer it (see `preferred_groups`), in descending order of G^2.

    An entry holds `name`; `here`, the group's share of the expert's choices; `all`, the group's share of the text;
    `reach`, the share of the group's occurrences that choose the expert; `times`, `here` / `all`; `g2`, which counts
    occurrences, so it only orders the groups and tests none; `tokens`, the group's tokens that choose the expert most
    often, of those that choose it more often than an average token does: `text`; `here`, how often it chose this
    expert; `all`, how often it occurs.
    """
    ids = np.flatnonzero(corpus.token_counts)
    groups = token_groups(tokenizer, ids)
    members = {name: ids[np.array([g == name for g in groups])] for name in dict.fromkeys(groups)}
    preferred = preferred_groups(corpus.by_token[..., ids], corpus.token_counts[ids], groups)

    def entry(name: str, by_token: np.ndarray, size: int) -> dict[str, Any]:
        tokens, counts = members[name], corpus.token_counts
        here, column = int(by_token[tokens].sum()), int(counts[tokens].sum())
        g2 = float(log_likelihood_ratio(np.array([here]), np.array([size]), np.array([column]), corpus.tokens)[0])
        shares = {"here": here / size, "all": column / corpus.tokens, "reach": here / column}
        shares["times"] = shares["here"] / shares["all"]
        often = [t for t in tokens.tolist() if by_token[t] * corpus.tokens > size * counts[t]]
        best = np.array(sorted(often, key=lambda t: -by_token[t])[:EXAMPLES], np.int32)
        listed = zip(token_pieces(tokenizer, best), by_token[best].tolist(), counts[best].tolist(), strict=True)
        return {
            "name": name,
            **{key: round(value, 4) for key, value in shares.items()},
            "g2": round(g2, 1),
            "tokens": [{"text": text, "here": n, "all": total} for text, n, total in listed],
        }

    def entries(layer: int, expert: int) -> list[dict[str, Any]]:
        by_token = corpus.by_token[layer, expert]
        size, counts = int(by_token.sum()), corpus.token_counts
        clear = []
        for name, tokens in members.items():
            here, expected = by_token[tokens].sum(), size * counts[tokens].sum() / corpus.tokens
            if preferred[name][layer, expert] and here >= max(LEAST_SHARE * size, LEAST_TIMES * expected, 1):
                clear.append(entry(name, by_token, size))
        return sorted(clear, key=lambda group: -group["g2"])[:MOST_GROUPS]

    layers, experts = corpus.by_token.shape[:2]
    return [[entries(layer, e) for e in range(experts)] for layer in range(layers)]
