"""A conversation with a trained model: a beginning of a text in, its continuation out, and settings in between.

With a tuned run (`RoleChat`), a question in and an answer out.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from moe_jax.config import UserError
from moe_jax.config.section import format_bound
from moe_jax.data.chats import answer_prompt, encode_chats
from moe_jax.data.documents import ANSWERING, Message
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.inference.generate import TextGenerator
from moe_jax.inference.sampling import Sampling
from moe_jax.system.files import write_output

HELP = """\
  /temp X       temperature: 0 takes the likeliest token, 1 is the distribution learned
  /seed N       start the random draws anew, from this seed
  /tokens N     longest continuation, in tokens
  /again        continue the last beginning once more, with other random draws
  /experts [N]  show each token in the colour of its expert, of layer N; off again without N
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

    def __init__(self, generator: TextGenerator, settings: Sampling, *, seed: int, limit: int, layers: int) -> None:
        """`layers` is the number of layers with routers; 0 for a dense model."""
        self._generator, self.settings, self.seed, self.limit = generator, settings, seed, limit
        self._layers = layers
        self.layer: int | None = None
        """The layer whose experts are shown. None: none are."""
        self.ended = False
        self._number = 0
        self._told: list[str] = []
        self.last = ""
        """The last beginning."""

    def reply(self, prompt: str) -> Iterator[str]:
        """The continuation of a beginning, one piece for each token. Each reply has random draws of its own."""
        self.last, text = prompt, prompt
        number, self._number = self._number, self._number + 1
        try:
            for piece in self._generator.pieces(prompt, self.settings, seed=self.seed, number=number, limit=self.limit):
                text += piece
                yield piece
        finally:  # also after Ctrl-C
            self._told.append(text)

    def again(self) -> str:
        """The last beginning, to be continued once more."""
        return self.last

    @property
    def last_tokens(self) -> list[int] | None:
        """What is shown of the last text in tokens, if that is not the tokens of `last_text`."""
        return None

    @property
    def last_text(self) -> str:
        """The last beginning with its continuation."""
        return self._told[-1] if self._told else ""

    def command(self, line: str) -> str:
        """Obey a line such as "/temp 0.5". Returns what to say. Raises UserError for a wrong line."""
        name, _, value = line.removeprefix("/").strip().partition(" ")
        commands = self._commands()
        if name not in commands:
            raise UserError(f"/{name}: no such command; /help lists them")
        return commands[name](value.strip())

    def _commands(self) -> dict[str, Callable[[str], str]]:
        return {
            "temp": self._temperature,
            "temperature": self._temperature,
            "seed": self._seed,
            "tokens": self._tokens,
            "experts": self._experts,
            "save": self._save,
            "help": lambda _: HELP,
            "quit": self._quit,
        }

    def _temperature(self, value: str) -> str:
        self.settings = self.settings._replace(temperature=_number("/temp", value, float, 0, 100))
        return f"temperature {self.settings.temperature:g}"

    def _seed(self, value: str) -> str:
        self.seed, self._number = _number("/seed", value, int, 0, 2**31 - 1), 0
        return f"seed {self.seed}"

    def _tokens(self, value: str) -> str:
        self.limit = _number("/tokens", value, int, 1, 1_000_000)
        return f"at most {self.limit} tokens"

    def _experts(self, value: str) -> str:
        if not self._layers:
            raise UserError("/experts: this model has no router that chooses experts for a token")
        if not value and self.layer is not None:
            self.layer = None
            return "experts are not shown"
        self.layer = _number("/experts", value or str(self._layers - 1), int, 0, self._layers - 1)
        return f"each token in the colour of its first expert, layer {self.layer} of 0 to {self._layers - 1}"

    def _save(self, value: str) -> str:
        if not value:
            raise UserError("/save: needs the name of a file")
        try:
            write_output(Path(value), "\n\n".join(self._told) + "\n")
        except OSError as error:
            raise UserError(f"/save {value}: cannot be written ({error.strerror}); name another file") from None
        return f"{len(self._told)} texts in {value}"

    def _quit(self, _: str) -> str:
        self.ended = True
        return ""


class RoleChat(Chat):
    """A conversation with a tuned model, in its role format (`data/chats.py`). The model sees the earlier turns that
    fit into its context. It ends its answer with the separator."""

    def __init__(
        self,
        generator: TextGenerator,
        settings: Sampling,
        *,
        seed: int,
        limit: int,
        layers: int,
        tokenizer: Tokenizer,
        context: int,
    ) -> None:
        """`context` is the model's T."""
        super().__init__(generator, settings, seed=seed, limit=limit, layers=layers)
        self._tokenizer, self._context = tokenizer, context
        self.turns: list[Message] = []
        """The conversation so far."""

    def reply(self, prompt: str) -> Iterator[str]:
        """The answer to a question, one piece for each token."""
        question = Message("user", prompt.strip())
        if not question.content:
            raise UserError("an empty line asks nothing; /help lists the commands")
        tokens = self._fitting([*self.turns, question])
        self.last, answer = prompt, ""
        number, self._number = self._number, self._number + 1
        try:
            for piece in self._generator.continuation(
                tokens, self.settings, seed=self.seed, number=number, limit=self.limit
            ):
                answer += piece
                yield piece
        finally:  # also after Ctrl-C
            self.turns += [question, Message(ANSWERING, answer.strip())]
            self._told.append(f"user: {question.content}\nassistant: {answer.strip()}")

    def _fitting(self, turns: list[Message]) -> list[int]:
        """The prompt of a conversation. The oldest turns are left out while there is no room for an answer; what the
        system has said stays."""
        room = min(self.limit, self._context // 4)
        turns = list(turns)
        while len(tokens := answer_prompt(self._tokenizer, turns)) + room > self._context:
            oldest = next((n for n, turn in enumerate(turns[:-1]) if turn.role != "system"), None)
            if oldest is None:
                raise UserError(
                    f"the question has {len(tokens)} tokens with its roles, and the context {self._context}, of which "
                    f"{room} are for the answer; shorten it"
                )
            del turns[oldest]
        return tokens

    def again(self) -> str:
        """The last question, to be answered once more: the model forgets its answer."""
        if self.turns and self.turns[-1].role == ANSWERING:
            del self.turns[-2:]
        return self.last

    @property
    def last_tokens(self) -> list[int]:
        """The whole conversation, in tokens."""
        return encode_chats(self._tokenizer, [tuple(self.turns)])[0].tokens.tolist() if self.turns else []

    def _commands(self) -> dict[str, Callable[[str], str]]:
        return super()._commands() | {"help": lambda _: ROLE_HELP, "new": self._new, "system": self._system}

    def _new(self, _: str) -> str:
        self.turns = []
        return "a new conversation"

    def _system(self, value: str) -> str:
        if not value:
            raise UserError("/system: needs a text, such as /system Answer in one word.")
        self.turns = [Message("system", value)]
        return "a new conversation, which begins with this"


def _number[T: (int, float)](name: str, value: str, kind: Callable[[str], T], low: float, high: float) -> T:
    try:
        number = kind(value)
    except ValueError:
        number = None
    if number is None or not low <= number <= high:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{name} {value}: must be {what} between {format_bound(low)} and {format_bound(high)}")
    return number
