"""Groups of tokens in plain words, and which expert is for which."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moe_jax.inspection import specialisation
from moe_jax.inspection.corpus_routing import CorpusRouting, count_routing
from moe_jax.inspection.specialisation import group_of, group_preferences
from tests.inspection.test_trace import opened
from tests.support import tiny


@pytest.mark.parametrize(
    ("piece", "group"),
    [
        (" \n", "white space"),
        (',"', "punctuation"),
        (" 42", "numbers"),
        ("ing", "parts of words"),
        (" Paris", "words with a capital"),
        (" dragon", "other words"),
        (" \u05e9\u05dc\u05d5\u05dd", "other words"),
    ],
)
def test_groups_by_letters(piece: str, group: str) -> None:
    assert group_of(piece) == group


KINDS, EXPERTS = 1000, 16
GROUPS = np.random.default_rng(0).choice(10, KINDS, p=np.array([1, 1, 1, 2, 2, 2, 3, 4, 8, 16]) / 40)
"""Ten groups of 25 to 400 kinds of token."""


def routed_by_kind(choices: np.ndarray, seed: int) -> CorpusRouting:
    """A text of kinds as frequent as in a language (Zipf's law, in random order), each of which always goes to the
    experts `choices` [KINDS, K]."""
    rng = np.random.default_rng(seed)
    frequency = 1 / rng.permutation(np.arange(1, KINDS + 1))
    stream = rng.choice(KINDS, (512, 32), p=frequency / frequency.sum())
    expert = choices[stream][None]
    probs = np.full((*expert.shape[:3], EXPERTS), 1 / EXPERTS, np.float32)
    config = tiny.config(vocab_size=KINDS, seq_len=32, layers=1, experts=EXPERTS, top_k=choices.shape[1])
    return count_routing(config, stream, probs, expert, np.ones(expert.shape, bool))


def hashed(seed: int) -> np.ndarray:
    """Two experts for each kind, as a hash would choose them."""
    return np.random.default_rng(seed).permuted(np.tile(np.arange(EXPERTS), (KINDS, 1)), axis=1)[:, :2]


@pytest.fixture
def preferences(monkeypatch: pytest.MonkeyPatch) -> Callable[[CorpusRouting], list[list[dict[str, Any]]]]:
    """`group_preferences` of the experts of a corpus's only layer, when its kinds are in GROUPS."""
    monkeypatch.setattr(specialisation, "token_groups", lambda _, ids: [f"group {GROUPS[i]}" for i in ids])
    monkeypatch.setattr(specialisation, "token_pieces", lambda _, ids: [str(i) for i in ids])
    return lambda corpus: group_preferences(corpus, opened().tokenizer)[0]


def test_experts_chosen_by_a_hash_are_for_no_group(preferences: Callable) -> None:
    """Each kind has its experts, but no group has: what a test of occurrences sees is its few frequent kinds."""
    found = [preferences(routed_by_kind(hashed(seed), seed)) for seed in range(8)]
    assert sum(bool(expert) for experts in found for expert in experts) <= 1


def test_a_group_whose_kinds_agree_is_found_with_its_counts(preferences: Callable) -> None:
    """Two in three kinds of a group choose expert 3 first. It is that expert's, and no other expert has one."""
    choices = hashed(1)
    (members,) = np.nonzero(GROUPS == 3)
    agreeing = np.delete(members, np.s_[::3])
    choices[agreeing, 0] = 3
    choices[agreeing, 1] = 4 + np.arange(len(agreeing)) % 12
    corpus = routed_by_kind(choices, 1)
    found = preferences(corpus)
    assert [len(expert) for expert in found] == [int(e == 3) for e in range(EXPERTS)]
    ((group,),) = [expert for expert in found if expert]
    by_token, counts = corpus.by_token[0, 3], corpus.token_counts
    here, there = by_token[members].sum(), counts[members].sum()
    assert group["name"] == "group 3"
    assert group["reach"] == pytest.approx(here / there, abs=1e-4)
    assert group["here"] == pytest.approx(here / by_token.sum(), abs=1e-4)
    assert group["all"] == pytest.approx(there / corpus.tokens, abs=1e-4)
    assert group["times"] == pytest.approx(here / by_token.sum() * corpus.tokens / there, abs=1e-4)
    often = sorted(members, key=lambda i: -by_token[i])[:3]
    listed = [(t["text"], t["here"], t["all"]) for t in group["tokens"]]
    assert listed == [(str(i), by_token[i], counts[i]) for i in often]
