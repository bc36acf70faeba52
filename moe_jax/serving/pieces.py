"""Tokens become text, piece by piece; a stop string ends it."""

from collections.abc import Sequence

from moe_jax.data.tokenizers import StreamDecoder, Tokenizer
from moe_jax.serving.texts import Piece


class TextPieces:
    """Gives each token its characters. A token is held back while its last character is incomplete, and while its
    characters may begin a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stop = stop
        self._held: list[Piece] = []
        self.stopped = False
        """Whether a stop string has ended the text. Its own characters are not given out."""

    def feed(self, piece: Piece) -> list[Piece]:
        """The pieces that can be given out after one more token, whose text is not known yet."""
        self._held.append(piece._replace(text=self._decoder.feed(piece.token)))
        text = "".join(held.text for held in self._held)
        found = [start for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._cut(min(found))
        if self._decoder.incomplete:
            return []
        return self._release(len(text) - max((_begun(text, stop) for stop in self._stop), default=0))

    def finish(self) -> list[Piece]:
        """The rest, at the end of a text. An incomplete character becomes U+FFFD."""
        rest, self._held = self._held, []
        if rest:
            rest[-1] = rest[-1]._replace(text=rest[-1].text + self._decoder.finish())
        return rest

    def _release(self, end: int) -> list[Piece]:
        """The held pieces that end at the character `end` or before."""
        size = count = 0
        for held in self._held:
            size += len(held.text)
            if size > end:
                break
            count += 1
        out, self._held = self._held[:count], self._held[count:]
        return out

    def _cut(self, end: int) -> list[Piece]:
        """The held pieces that begin before the character `end`, without the characters from there on."""
        out: list[Piece] = []
        for held in self._held:
            if end <= 0:
                break
            out.append(held._replace(text=held.text[:end]))
            end -= len(held.text)
        self._held = []
        return out


def _begun(text: str, stop: str) -> int:
    """The most characters at the end of the text that a stop string begins with. The whole stop string is not there."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
