"""What is asked of the engine, what it answers, and how tokens become text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from moe_jax.data.tokenizers import StreamDecoder, Tokenizer
from moe_jax.inference.sampling import Sampling

type FinishReason = Literal["stop", "length", "stopped", "failed"]
"""stop: the model ended the text, or a stop string did. length: it has `limit` tokens. stopped: the server is stopping.
failed: an error of the program; the server has printed it."""


class Piece(NamedTuple):
    """One token of a text."""

    token: int
    text: str
    """The characters that it completes. Less of the last token where a stop string begins in it."""
    logprob: float | None
    """Under the model's own distribution. None if it was not asked for, and for the first token of a prompt."""
    likeliest: list[tuple[int, float]]
    """The likeliest tokens at its place and their log-probabilities, best first."""
    experts: list[list[int]] | None
    """[L][K]: the experts that have read this token, best first. None if it was not asked for."""
    gates: list[list[float]] | None


class Event(NamedTuple):
    """News of a text."""

    pieces: list[Piece]
    finish: FinishReason | None = None
    """Not None in the last event of a text, and only there."""
    prompt: list[Piece] = []  # noqa: RUF012, never changed
    """In the first event, with `echo`: the tokens of the prompt."""


type Listener = Callable[[Event], None]


@dataclass(eq=False)
class TextRequest:
    """One text to write, from one prompt."""

    prompt: list[int]
    """1 or more tokens. The model reads the last T of them."""
    settings: Sampling
    seed: int
    number: int
    """One of the texts of the seed, as in `inference.decode.TextGenerator`."""
    limit: int
    """Most tokens; 0 for a prompt that is only to be read."""
    stop: list[str] = field(default_factory=list)
    """The text ends before the first of these."""
    logprobs: bool = False
    routing: bool = False
    """Whether pieces have their experts."""
    echo: bool = False
    """Whether the first event has the prompt's pieces. The prompt has at most T tokens then."""
    listener: Listener = lambda event: None
    """Called with each event of the text."""
    cancelled: bool = False
    """Set by whoever no longer waits for the text; its slot is freed before the next token."""


class TextPieces:
    """Gives each token its characters. A token waits while its last character is incomplete, and while its characters
    may begin a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stop = stop
        self._waiting: list[Piece] = []
        self.stopped = False
        """Whether a stop string has ended the text. Its own characters are not given out."""

    def feed(self, piece: Piece) -> list[Piece]:
        """The pieces that can be given out after one more token, whose text is not known yet."""
        self._waiting.append(piece._replace(text=self._decoder.feed(piece.token)))
        text = "".join(waiting.text for waiting in self._waiting)
        starts = [start for stop in self._stop if (start := text.find(stop)) >= 0]
        if starts:
            self.stopped = True
            return self._release(min(starts))
        if self._decoder.incomplete:
            return []
        return self._release(len(text) - max((_begun(text, stop) for stop in self._stop), default=0))

    def finish(self) -> list[Piece]:
        """The rest, at the end of a text. An incomplete character becomes U+FFFD."""
        rest, self._waiting = self._waiting, []
        if rest:
            rest[-1] = rest[-1]._replace(text=rest[-1].text + self._decoder.finish())
        return rest

    def _release(self, end: int) -> list[Piece]:
        """The waiting pieces that end at the character `end` or before. At a stop string also what is before it of the
        piece in which it begins, and no piece waits any more."""
        out: list[Piece] = []
        while self._waiting and len(self._waiting[0].text) <= end:
            out.append(self._waiting.pop(0))
            end -= len(out[-1].text)
        if self.stopped:
            out += [piece._replace(text=piece.text[:end]) for piece in self._waiting[:1] if end]
            self._waiting = []
        return out


def _begun(text: str, stop: str) -> int:
    """The most characters at the end of the text that a stop string begins with. The whole stop string is not there."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
