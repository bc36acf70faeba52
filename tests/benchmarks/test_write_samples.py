"""`benchmarks/write_samples.py`: counts by hand, and the script on a tiny run."""

from write_samples import distinct, matched_draws, repetition


def test_repetition_is_within_a_text_and_distinct_over_all_texts() -> None:
    """a b a b a: the pairs ab ba ab ba, two of which stood there before. The second text has the pair ab for itself.
    Of the distinct: two words of four; one pair of two, and none goes from one text to the next."""
    assert [repetition(texts, 2) for texts in (["ababa"], ["ababa", "ab"])] == [0.5, 1 - (2 + 1) / (4 + 1)]
    assert [repetition([text], 4) for text in ("aaaa", "aaaaa")] == [0, 0.5]
    assert [distinct(["ab", "ab"], n) for n in (1, 2)] == [0.5, 0.5]
    assert distinct(["ab", "ba"], 2) == 1


def test_draws_have_the_lengths_of_the_texts_and_share_no_story() -> None:
    """Lengths 3 and 1. First draw: the first story of at least 3 words is abcd, cut; then the first left, ef. Second:
    ghi, then j. Third: klmno, and nothing is left for the 1."""
    stories = ["ef", "abcd", "ghi", "j", "klmno"]
    assert matched_draws(["xxx", "x"], stories, 9) == [["abc", "e"], ["ghi", "j"]]
    assert matched_draws(["xxx", "x"], stories, 1) == [["abc", "e"]]
    assert matched_draws(["x" * 9], stories, 9) == []
