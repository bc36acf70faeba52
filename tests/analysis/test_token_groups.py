"""Groups of tokens in plain words, and which expert is for which."""

import numpy as np
import pytest

from moe_jax.analysis import token_groups
from moe_jax.analysis.token_groups import group_of, group_preferences, story_words
from tests.analysis.test_report import planted
from tests.analysis.test_routing_trace import byte_tokenizer


@pytest.mark.parametrize(
    ("piece", "group"),
    [
        (" \n", "white space"),
        (',"', "punctuation"),
        (" 42", "numbers"),
        ("ing", "parts of words"),
        (" the", "small grammatical words"),
        ("The", "small grammatical words"),
        (" Paris", "words with a capital"),
        (" dragon", "other words"),
        (" \u05e9\u05dc\u05d5\u05dd", "other words"),
        (" coat", "other words"),
    ],
)
def test_groups_by_letters(piece: str, group: str) -> None:
    assert group_of(piece, {}) == group


def test_the_lists_of_the_embedded_stories() -> None:
    listed = story_words()
    found = {group_of(p, listed) for p in (" coat", " Lily", " figs", " blue", " sad")}
    assert found == {"clothes", "names", "food", "colours", "feelings"}
    assert group_of("coat", listed) == "parts of words"  # goes on with a word: "overcoat"


def test_separators_and_cut_characters_are_told_by_their_ids() -> None:
    tokenizer = byte_tokenizer()
    ids = np.array([tokenizer.separator_id, 0xC3, ord("a"), ord(".")])
    expected = ["separators", "parts of characters", "parts of words", "punctuation"]
    assert token_groups.token_groups(tokenizer, ids, stories=True) == expected


def test_a_planted_group_is_found_with_its_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind 5 always goes to expert 2 (see `planted`). Call kinds 5 and 6 a group: it is expert 2's and no other's."""
    corpus = planted()
    groups = {5: "planted", 6: "planted"}
    monkeypatch.setattr(token_groups, "token_groups", lambda _, ids, __: [groups.get(int(i), "rest") for i in ids])
    found = group_preferences(corpus, byte_tokenizer(), stories=False)
    assert [[g["name"] for g in expert] for expert in found[0]] == [[], [], [], []]  # 1.2 times chance is no purpose
    groups.pop(6)
    found = group_preferences(corpus, byte_tokenizer(), stories=False)
    # Still 1.5 times at most: two of three experts take every token, so the planted one can't be more over-represented.
    size, column = int(corpus.by_token[0, 2].sum()), int(corpus.token_counts[5])
    assert size / corpus.tokens > 2 / 3
    monkeypatch.setattr(token_groups, "LEAST_TIMES", 1.2)
    found = group_preferences(corpus, byte_tokenizer(), stories=False)
    ((group,),) = [expert for expert in found[0] if expert]
    assert group["name"] == "planted"
    assert group["reach"] == 1
    assert group["here"] == pytest.approx(column / size, abs=1e-4)
    assert group["all"] == pytest.approx(column / corpus.tokens, abs=1e-4)
    assert group["times"] == pytest.approx(corpus.tokens / size, abs=1e-4)
    assert group["examples"] == ["\x05"]
