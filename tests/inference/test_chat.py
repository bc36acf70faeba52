"""A conversation: the settings that a person changes, and what a reply depends on."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_jax.config import UserError
from moe_jax.inference.chat import HELP, Chat
from moe_jax.inference.generate import TextGenerator
from moe_jax.inference.sampling import Sampling


class Echo(TextGenerator):
    """A generator without a model, whose text says what it was asked for."""

    def __init__(self) -> None:
        pass

    def pieces(self, prompt: str, settings: Sampling, *, seed: int, number: int = 0, limit: int) -> Iterator[str]:
        yield f" [{settings.temperature:g}"
        yield f" {seed}.{number} {limit}]"


@pytest.fixture
def chat() -> Chat:
    return Chat(Echo(), Sampling(), seed=7, limit=40, layers=3)


def say(chat: Chat, prompt: str) -> str:
    return prompt + "".join(chat.reply(prompt))


def test_each_reply_has_draws_of_its_own_and_a_seed_starts_them_anew(chat: Chat) -> None:
    assert [say(chat, "a"), say(chat, "b")] == ["a [0.8 7.0 40]", "b [0.8 7.1 40]"]
    assert chat.command("/seed 3") == "seed 3"
    assert say(chat, "a") == "a [0.8 3.0 40]"


def test_temperature_and_length(chat: Chat) -> None:
    chat.command("/temp 0")
    chat.command("/tokens 9")
    assert say(chat, "a") == "a [0 7.0 9]"


def test_a_reply_that_is_cut_is_kept_as_far_as_it_came(chat: Chat, tmp_path: Path) -> None:
    reply = chat.reply("a")
    next(reply)
    reply.close()  # as Ctrl-C does
    say(chat, "b")
    assert chat.command(f"/save {tmp_path / 'talk.txt'}").startswith("2 texts in")
    assert (tmp_path / "talk.txt").read_text() == "a [0.8\n\nb [0.8 7.1 40]\n"
    assert (chat.last, chat.last_text) == ("b", "b [0.8 7.1 40]")


def test_experts_are_shown_of_a_layer_and_off_again(chat: Chat) -> None:
    assert "layer 2 of 0 to 2" in chat.command("/experts")
    assert chat.layer == 2
    chat.command("/experts 0")
    assert chat.layer == 0
    chat.command("/experts")
    assert chat.layer is None


def test_a_dense_model_has_no_experts() -> None:
    with pytest.raises(UserError, match="has no router"):
        Chat(Echo(), Sampling(), seed=0, limit=1, layers=0).command("/experts")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/temp", "/temp : must be a number between 0 and 100"),
        ("/temp nan", "/temp nan: must be"),
        ("/temp -1", "/temp -1: must be"),
        ("/seed 1.5", "/seed 1.5: must be"),
        ("/tokens 0", "/tokens 0: must be a number between 1"),
        ("/experts 3", "/experts 3: must be a number between 0 and 2"),
        ("/save", "/save: needs the name of a file"),
        ("/save /proc/nowhere/x", "/save /proc/nowhere/x: cannot be written"),
        ("/", "/: no such command"),
        ("/warmth 1", "/warmth: no such command; /help lists them"),
    ],
)
def test_a_wrong_line_is_answered_and_changes_nothing(chat: Chat, line: str, said: str) -> None:
    before = (chat.settings, chat.seed, chat.limit, chat.layer)
    with pytest.raises(UserError) as failure:
        chat.command(line)
    assert str(failure.value).startswith(said)
    assert before == (chat.settings, chat.seed, chat.limit, chat.layer)


def test_help_names_every_command_and_quit_ends(chat: Chat) -> None:
    assert chat.command("/help") == HELP
    assert all(f"/{name}" in HELP for name in ("temp", "seed", "tokens", "again", "experts", "save", "help", "quit"))
    assert not chat.ended
    chat.command("/quit")
    assert chat.ended
