"""A conversation with a trained model: a beginning of a text in, its continuation out, and settings in between.

With a tuned run (`RoleChat`), a question in and an answer out.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from moe_jax.config import UserError
from moe_jax.config.section import format_bound
from moe_jax.data.chats import answer_prompt
from moe_jax.data.documents import ANSWERING, Message
from moe_jax.inference.decode import TextGenerator
from moe_jax.inference.sampling import Sampling
from moe_jax.system.files import write_output

HELP = """\
  /temp X       temperature: 0 takes the likeliest token, 1 is the distribution learned
  /seed N       start the random draws anew, from this seed
  /tokens N     longest continuation, in tokens
  /again        continue the last beginning once more, with other random draws
  /save FILE    write the conversation to a file
  /help         this list
  /quit         leave; Ctrl-D does too
  //...         a text that begins with a slash"""
ROLE_HELP = (
    HELP.replace("longest continuation", "longest answer").replace(
        "continue the last beginning once more", "answer the last question once more"
    )
    + """
  /new          start a new conversation: the model forgets this one
  /system TEXT  start a new conversation with a message of the system"""
)


class Chat:
    """Settings and history. `reply` continues a text; `command` obeys a line that begins with a slash."""

    help = HELP
    echoes = True
    """Whether the line is the beginning of the text, and is shown with it."""

    def __init__(self, generator: TextGenerator, settings: Sampling, *, seed: int, limit: int) -> None:
        self.generator, self.settings, self.seed, self.limit = generator, settings, seed, limit
        self._number = 0
        self.ended = False
        self.texts: list[str] = []
        """The conversation, for a file."""
        self.last = ""
        """The last beginning."""

    def reply(self, line: str) -> Iterator[str]:
        """The continuation of a beginning, one piece for each token. Each reply has random draws of its own."""
        prompt, pieces = self._prompt(line), []
        self.last, number, self._number = line, self._number, self._number + 1
        text = self.generator.pieces(prompt, self.settings, seed=self.seed, number=number, limit=self.limit)
        try:
            for piece in text:
                pieces.append(piece)
                yield piece
        finally:  # also after Ctrl-C
            self._keep(line, "".join(pieces))

    def _prompt(self, line: str) -> list[int]:
        tokenizer = self.generator.tokenizer
        return [tokenizer.separator_id, *tokenizer.encode(line)]

    def _keep(self, line: str, text: str) -> None:
        self.texts.append(line + text)

    def again(self) -> str:
        """The last beginning, to be continued once more."""
        return self.last

    def command(self, line: str) -> str:
        """Obey a line such as "/temp 0.5". Returns what to say. Raises UserError for a wrong line."""
        name, _, value = (part.strip() for part in line.removeprefix("/").strip().partition(" "))
        match name:
            case "temp" | "temperature":
                self.settings = self.settings._replace(temperature=_number("/temp", value, float, 0, 100))
                return f"temperature {self.settings.temperature:g}"
            case "seed":
                self.seed, self._number = _number("/seed", value, int, 0, 2**31 - 1), 0
                return f"seed {self.seed}"
            case "tokens":
                self.limit = _number("/tokens", value, int, 1, 1_000_000)
                return f"at most {self.limit} tokens"
            case "save":
                return self._save(value)
            case "help":
                return self.help
            case "quit" | "bye" | "exit":
                self.ended = True
                return ""
        raise UserError(f"/{name}: no such command; /help lists them")

    def _save(self, value: str) -> str:
        if not value:
            raise UserError("/save: needs the name of a file")
        try:
            write_output(Path(value), "\n\n".join(self.texts) + "\n")
        except OSError as error:
            raise UserError(f"/save {value}: cannot be written ({error.strerror}); name another file") from None
        return f"{len(self.texts)} texts in {value}"


class RoleChat(Chat):
    """A conversation with a tuned model, in its role format (`data/chats.py`). The model sees the earlier turns
    that fit into its context of T tokens. It ends its answer with the separator."""

    help, echoes = ROLE_HELP, False

    def __init__(self, generator: TextGenerator, settings: Sampling, *, seed: int, limit: int, context: int) -> None:
        """`context` is the model's T."""
        super().__init__(generator, settings, seed=seed, limit=limit)
        self._context = context
        self.turns: list[Message] = []
        """The conversation so far."""

    def _prompt(self, line: str) -> list[int]:
        """The prompt of a conversation. The oldest turns are left out while there is no room for an answer; what the
        system has said stays."""
        question = Message("user", line.strip())
        if not question.content:
            raise UserError("an empty line asks nothing; /help lists the commands")
        turns, answer = [*self.turns, question], min(self.limit, self._context // 4)
        while len(tokens := answer_prompt(self.generator.tokenizer, turns)) + answer > self._context:
            oldest = next((n for n, turn in enumerate(turns[:-1]) if turn.role != "system"), None)
            if oldest is None:
                raise UserError(
                    f"the question has {len(tokens)} tokens with its roles, and the context {self._context}, of which "
                    f"{answer} are for the answer; shorten it"
                )
            # With its answer: a chat template may refuse a conversation that begins with one.
            del turns[oldest : oldest + 1 + (turns[oldest + 1].role == ANSWERING)]
        return tokens

    def _keep(self, line: str, text: str) -> None:
        self.turns += [Message("user", line.strip()), Message(ANSWERING, text.strip())]
        self.texts.append(f"user: {line.strip()}\nassistant: {text.strip()}")

    def again(self) -> str:
        """The last question, to be answered once more: the model forgets its answer."""
        if self.turns and self.turns[-1].role == ANSWERING:
            del self.turns[-2:]
        return self.last

    def command(self, line: str) -> str:
        match line.removeprefix("/").split(maxsplit=1):
            case ["new"]:
                self.turns = []
                return "a new conversation"
            case ["system"]:
                raise UserError("/system: needs a text, such as /system Answer in one word.")
            case ["system", text]:
                self.turns = [Message("system", text.strip())]
                return "a new conversation, which begins with this"
        return super().command(line)


def _number[T: (int, float)](name: str, value: str, kind: Callable[[str], T], low: float, high: float) -> T:
    try:
        number = kind(value)
    except ValueError:
        number = None
    if number is None or not low <= number <= high:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{name} {value}: must be {what} between {format_bound(low)} and {format_bound(high)}")
    return number
