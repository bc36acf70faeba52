"""Parts of documents that come one after the other, from a network or a generator: what one shard is made of.

Such documents cannot be read from the middle. So the parts are tokenized in turn, by one process, and a part that is
already done is read and thrown away.

Importing this module imports only the standard library.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from moe_jax.data import text_plan


@dataclass(frozen=True)
class StreamPart:
    """The next documents of a stream, until they have `text_plan.PART_BYTES` bytes (`corpora.Part`)."""

    key: str
    _following: Iterator[str]

    def documents(self) -> Iterator[str]:
        """The documents. They can be read once."""
        size = 0
        for document in self._following:
            yield document
            size += len(document.encode())
            if size >= text_plan.PART_BYTES:
                return

    def skip(self) -> None:
        """Go on to the next part."""
        for _ in self.documents():
            pass


def stream_parts(documents: Iterator[str]) -> Iterator[StreamPart]:
    """The parts of a stream. Each must be read, or skipped, before the next one."""
    first, number = next(documents, None), 0
    while first is not None:
        yield StreamPart(f"part {number} by {text_plan.PART_BYTES}", chain([first], documents))
        first, number = next(documents, None), number + 1
