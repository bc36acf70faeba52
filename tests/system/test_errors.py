"""How an error shows a long text."""

from moe_jax.system.errors import shortened


def test_a_long_text_is_cut_to_the_most_that_is_shown() -> None:
    assert shortened("x" * 60) == "x" * 60
    assert shortened("x" * 61) == "x" * 57 + "..."
    assert shortened("abcdef", 5) == "ab..."
