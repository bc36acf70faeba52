"""What is asked of the engine, and what it answers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

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
    """One of the texts of the seed, as in `inference.generate.TextGenerator`."""
    limit: int
    """Most tokens; 0 for a prompt that is only to be read."""
    stop: list[str] = field(default_factory=list)
    """The text ends before the first of these."""
    logprobs: bool = False
    routing: bool = False
    """Whether pieces have their experts."""
    echo: bool = False
    """Whether the first event has the prompt's pieces. The prompt has at most T tokens then."""
    cancelled: bool = False
    """Set by whoever no longer waits for the text; its slot is freed before the next token."""
