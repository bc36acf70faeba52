"""A conversation: the settings that a person changes, and what a reply depends on."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from moe_jax.config import DataConfig, UserError
from moe_jax.data.chats import answer_prompt
from moe_jax.data.documents import Message
from moe_jax.data.tokenizers import train_tokenizer
from moe_jax.inference.chat import HELP, Chat, RoleChat
from moe_jax.inference.decode import TextGenerator
from moe_jax.inference.sampling import Sampling

BYTE = train_tokenizer(DataConfig(tokenizer="byte"))


class Echo(TextGenerator):
    """A generator without a model, whose text says what it was asked for."""

    def __init__(self) -> None:
        self.tokenizer = BYTE

    def pieces(
        self, prompt: str | Sequence[int], settings: Sampling, *, seed: int, number: int = 0, limit: int
    ) -> Iterator[str]:
        yield f" [{settings.temperature:g}"
        yield f" {seed}.{number} {limit}]"


@pytest.fixture
def chat() -> Chat:
    return Chat(Echo(), Sampling(), seed=7, limit=40)


def say(chat: Chat, prompt: str) -> str:
    return prompt + "".join(chat.reply(prompt))


def test_each_reply_has_draws_of_its_own_and_a_seed_starts_them_anew(chat: Chat) -> None:
    assert [say(chat, "a"), say(chat, "b")] == ["a [0.8 7.0 40]", "b [0.8 7.1 40]"]
    assert chat.command("/seed 3") == "seed 3"
    assert say(chat, "a") == "a [0.8 3.0 40]"
    chat.command("/temp 0")
    chat.command("/tokens 9")
    assert say(chat, "a") == "a [0 3.1 9]"


def test_a_reply_that_is_cut_is_kept_as_far_as_it_came(chat: Chat, tmp_path: Path) -> None:
    reply = chat.reply("a")
    next(reply)
    reply.close()  # as Ctrl-C does
    say(chat, "b")
    assert chat.command(f"/save {tmp_path / 'talk.txt'}").startswith("2 texts in")
    assert (tmp_path / "talk.txt").read_text() == "a [0.8\n\nb [0.8 7.1 40]\n"
    assert chat.last == "b"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/temp nan", "/temp nan: must be"),
        ("/tokens 0", "/tokens 0: must be a whole number between 1 and 1,000,000"),
        ("/save", "/save: needs the name of a file"),
        ("/save /proc/nowhere/x", "/save /proc/nowhere/x: cannot be written"),
        ("/", "/: no such command"),
        ("/warmth 1", "/warmth: no such command; /help lists them"),
    ],
)
def test_a_wrong_line_is_answered_and_changes_nothing(chat: Chat, line: str, said: str) -> None:
    before = (chat.settings, chat.seed, chat.limit)
    with pytest.raises(UserError) as failure:
        chat.command(line)
    assert str(failure.value).startswith(said)
    assert before == (chat.settings, chat.seed, chat.limit)


def test_help_names_every_command_and_quit_ends(chat: Chat) -> None:
    assert chat.command("/help") == HELP
    assert all(f"/{name}" in HELP for name in ("temp", "seed", "tokens", "again", "save", "help", "quit"))
    assert not chat.ended
    chat.command("/quit")
    assert chat.ended


# With a tuned model


class Answers(Echo):
    """Answers "one", "two", ..., and notes the prompts."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts: list[list[int]] = []

    def pieces(
        self, prompt: str | Sequence[int], settings: Sampling, *, seed: int, number: int = 0, limit: int
    ) -> Iterator[str]:
        self.prompts.append([token for token in prompt if isinstance(token, int)])
        yield ["one", "two", "three", "four"][len(self.prompts) - 1]
        yield " "


def conversation(context: int = 400) -> tuple[RoleChat, Answers]:
    answers = Answers()
    return RoleChat(answers, Sampling(), seed=7, limit=40, context=context), answers


def ask(chat: RoleChat, question: str) -> str:
    return "".join(chat.reply(question))


def turns(*contents: str) -> list[Message]:
    return [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]  # pyright: ignore[reportArgumentType]


def test_it_remembers_what_was_said() -> None:
    chat, answers = conversation()
    assert [ask(chat, " a\n"), ask(chat, "b")] == ["one ", "two "]
    assert chat.turns == turns("a", "one", "b", "two")
    assert answers.prompts == [answer_prompt(BYTE, turns("a")), answer_prompt(BYTE, turns("a", "one", "b"))]
    assert chat.texts[-1] == "user: b\nassistant: two"


def test_again_forgets_the_answer_and_new_forgets_everything() -> None:
    chat, answers = conversation()
    ask(chat, "a")
    assert ask(chat, chat.again()) == "two "
    assert chat.turns == turns("a", "two")
    chat.command("/system Be kind.")
    assert chat.turns == [Message("system", "Be kind.")]
    chat.command("/new")
    assert (chat.turns, len(answers.prompts)) == ([], 2)
    assert "/new" in chat.command("/help")
    with pytest.raises(UserError, match="asks nothing"):
        ask(chat, "  ")
    with pytest.raises(UserError, match="/system: needs a text, such as /system"):
        chat.command("/system")
    assert chat.turns == []


def test_the_oldest_turns_make_room_and_the_system_stays() -> None:
    """Every turn of a letter takes 7 or 12 tokens; a quarter of the context is kept for the answer."""
    chat, answers = conversation(context=80)
    chat.command("/system S")
    for question in "abcd":
        ask(chat, question)
    assert len(chat.turns) == 9
    system = Message("system", "S")
    assert answers.prompts[3] == answer_prompt(BYTE, [system, *turns("c", "three", "d")][-4:])
    assert all(len(prompt) + 20 <= 80 for prompt in answers.prompts)
    with pytest.raises(UserError, match=r"the question has \d+ tokens with its roles, and the context 80, of which 20"):
        ask(chat, "x" * 60)
