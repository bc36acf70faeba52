"""Where text comes from: an iterator of stories, whatever the source.

A corpus has two splits, `train` and `valid`, of stories (a document is a story too): stripped, never empty,
never all in memory. Sources are the embedded grammar, three public data sets, and files of one's own. The
rules for files:

- Stories are separated by `<|endoftext|>`. The bytes are read in chunks of 1 MiB and must be UTF-8.
- A story longer than 1 MiB, such as a whole book, is cut near that length at a blank line, else at a line
  end, else at a space, and each part is a story: so memory stays bounded, at the cost of one separator per
  MiB.
- A folder holds `train.txt` and `valid.txt`. Of a single file the last 5 % of its stories validate, at least
  one. A file without separators is one text, cut as above at 90 to 95 % of its bytes: what follows validates.

Importing this module takes the standard library only, so that `check_source` answers before jax is loaded.
"""

import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from moe_jax.config import NAMED_CORPORA, ConfigError, DataConfig, UserError

SEPARATOR = "<|endoftext|>"
SplitName = Literal["train", "valid"]

_SEPARATOR = SEPARATOR.encode()
_CHUNK = 1 << 20  # bytes read at a time
_LONGEST = 1 << 20  # bytes of a story, beyond which it is cut


@runtime_checkable
class Corpus(Protocol):
    """Two splits of stories."""

    @property
    def name(self) -> str:
        """The `--data` that it was opened by."""
        ...

    def stories(self, split: SplitName) -> Iterator[str]:
        """The stories of a split, each stripped, none empty. Raises UserError where there is none."""
        ...

    def fingerprint(self) -> str:
        """Hex digest of what determines the text: equal fingerprints mean equal stories."""
        ...

    def size(self, split: SplitName) -> int | None:
        """Bytes of the split's source, for a progress bar; None where unknown."""
        ...


def check_source(source: str) -> None:
    """Raise ConfigError, naming --data, unless `source` is a named corpus or a usable path. A name wins over
    a path."""
    if source in NAMED_CORPORA:
        return
    path = Path(source)
    if path.is_dir():
        missing = [name for name in ("train.txt", "valid.txt") if not (path / name).is_file()]
        if missing:
            raise ConfigError(f"--data {source}: the folder must hold train.txt and valid.txt; no {missing[0]} in it")
    elif not path.is_file():
        names = ", ".join(NAMED_CORPORA)
        raise ConfigError(f"--data {source}: must be an existing file or folder, or one of {names}")


def open_corpus(data: DataConfig) -> Corpus:
    """The corpus that `data.source` names. Reads nothing of a data set yet; a single file is scanned once.

    Raises ConfigError where the source does not exist, UserError where a file cannot be read as UTF-8.
    """
    check_source(data.source)
    if data.source == "stories":
        return _EmbeddedCorpus(data.stories_seed, data.stories)
    if data.source in _HUB:
        return _HUB[data.source]
    path = Path(data.source)
    if path.is_dir():
        spans = {"train": _whole(path / "train.txt"), "valid": _whole(path / "valid.txt")}
    else:
        cut = _validation_start(path)
        spans = {"train": _Span(path, 0, cut), "valid": _Span(path, cut, path.stat().st_size)}
    return _FileCorpus(data.source, spans)


def scored_stories(source: str) -> Iterator[str]:
    """The stories that an evaluation of `source` scores: all of a file, of anything else its validation split.

    Raises as `open_corpus` does.
    """
    check_source(source)
    path = Path(source)
    if source not in NAMED_CORPORA and path.is_file():
        return _refuse_empty((story for _, story in _read_stories(_whole(path))), source)
    return open_corpus(DataConfig(source=source)).stories("valid")


def _refuse_empty(stories: Iterable[str], what: str) -> Iterator[str]:
    empty = True
    for story in stories:
        empty = False
        yield story
    if empty:
        raise UserError(f"{what}: there is no story in it; give a longer text with --data")


# Files


@dataclass(frozen=True)
class _Span:
    """The bytes [start, stop) of a file."""

    path: Path
    start: int
    stop: int


def _whole(path: Path) -> _Span:
    return _Span(path, 0, path.stat().st_size)


@dataclass(frozen=True)
class _FileCorpus:
    name: str
    spans: dict[str, _Span]

    def stories(self, split: SplitName) -> Iterator[str]:
        span = self.spans[split]
        return _refuse_empty((story for _, story in _read_stories(span)), f"{span.path} ({split})")

    def fingerprint(self) -> str:
        """xxh3-128 of the bytes of both splits and of where they lie. The path plays no part."""
        import xxhash

        digest = xxhash.xxh3_128()
        for span in self.spans.values():
            digest.update(f"{span.start}-{span.stop};".encode())
            for chunk in _read_chunks(span):
                digest.update(chunk)
        return digest.hexdigest()

    def size(self, split: SplitName) -> int | None:
        return self.spans[split].stop - self.spans[split].start


def _read_chunks(span: _Span) -> Iterator[bytes]:
    try:
        with span.path.open("rb") as file:
            file.seek(span.start)
            left = span.stop - span.start
            while left and (chunk := file.read(min(_CHUNK, left))):
                left -= len(chunk)
                yield chunk
    except OSError as error:
        raise UserError(f"{span.path}: cannot be read ({error.strerror}); check the file and its permissions") from None


def _read_pieces(span: _Span) -> Iterator[tuple[int, bytes]]:
    """(offset in the file, bytes) of all that lies between separators, cut where it is too long."""
    rest, offset = b"", span.start  # bytes not yet given out, and where they begin
    for chunk in _read_chunks(span):
        *stories, rest = (rest + chunk).split(_SEPARATOR)
        for story in stories:
            for part in _cut_long(story):
                yield offset, part
                offset += len(part)
            offset += len(_SEPARATOR)
        *parts, rest = _cut_long(rest)
        for part in parts:
            yield offset, part
            offset += len(part)
    yield offset, rest


def _cut_long(text: bytes) -> Iterator[bytes]:
    """The text in parts of about 1 MiB. Its last bytes stay together: a separator may begin there."""
    while len(text) >= _LONGEST + len(_SEPARATOR):
        cut = _last_boundary(text, _LONGEST - _LONGEST // 16, _LONGEST)
        yield text[:cut]
        text = text[cut:]
    yield text


def _last_boundary(text: bytes, low: int, high: int) -> int:
    """Where to cut a text: after the last blank line in [low, high], else line, else space; else at `high`,
    or up to 3 bytes before it where that is inside a character."""
    for mark in (b"\n\n", b"\n", b" "):
        found = text.rfind(mark, low, high)
        if found >= 0:
            return found + len(mark)
    for cut in range(high, max(high - 4, 0), -1):
        if cut == len(text) or text[cut] & 0xC0 != 0x80:  # no second, third or fourth byte of a character
            return cut
    return high


def _read_stories(span: _Span) -> Iterator[tuple[int, str]]:
    """(offset of the piece that holds it, story), for every piece that is not blank."""
    for offset, piece in _read_pieces(span):
        try:
            story = piece.decode().strip()
        except UnicodeDecodeError as error:
            where = f"{span.path}: not UTF-8 at byte {offset + error.start} ({error.reason})"
            raise UserError(f"{where}; convert the file to UTF-8") from None
        if story:
            yield offset, story


def _validation_start(path: Path) -> int:
    """The offset at which the validation part of a single file begins."""
    span = _whole(path)
    starts, end = array("q"), -1  # offsets of the stories; the parts of a long one count once
    for offset, piece in _read_pieces(span):
        if offset != end and piece.strip():
            starts.append(offset)
        end = offset + len(piece)
    if len(starts) >= 2:
        return starts[-max(1, len(starts) // 20)]
    twentieth = span.stop // 20
    window = min(max(twentieth, 64), span.stop - twentieth, _CHUNK)
    start = span.stop - twentieth - window
    text = b"".join(_read_chunks(_Span(path, start, start + window + 1)))
    return start + _last_boundary(text, 0, window)


# The embedded grammar


@dataclass(frozen=True)
class _EmbeddedCorpus:
    seed: int
    count: int
    name: str = "stories"

    def stories(self, split: SplitName) -> Iterator[str]:
        from moe_jax.data import stories

        return stories.generate(self.seed, split, self.count if split == "train" else stories.VALIDATION_STORIES)

    def fingerprint(self) -> str:
        """xxh3-128 of seed, counts and the generator's source: an edited grammar is another corpus."""
        import inspect

        import xxhash

        from moe_jax.data import grammar, stories, vocabulary

        digest = xxhash.xxh3_128(f"{self.seed} {self.count} {stories.VALIDATION_STORIES}".encode())
        for module in (grammar, stories, vocabulary):
            digest.update(inspect.getsource(module).encode())
        return digest.hexdigest()

    def size(self, split: SplitName) -> int | None:
        return None


# Public data sets


@dataclass(frozen=True)
class _HubCorpus:
    """A data set of the Hugging Face hub at a pinned revision, streamed: only our token store is kept."""

    name: str
    repository: str
    configuration: str | None
    revision: str

    def stories(self, split: SplitName) -> Iterator[str]:
        rows = self._rows("train" if split == "train" else "validation")
        texts = articles(rows) if self.name == "wikitext" else rows
        parts = (part.decode().strip() for text in texts for part in _cut_long(text.encode()))
        return _refuse_empty((part for part in parts if part), f"{self.name} ({split})")

    def _rows(self, split: str) -> Iterator[str]:
        import datasets
        import huggingface_hub
        from datasets.exceptions import DatasetsError

        huggingface_hub.logging.set_verbosity_error()  # its retries, one warning each, end in our one line
        failures = (OSError, DatasetsError, huggingface_hub.errors.HfHubHTTPError, *_transport_errors())
        try:
            rows = datasets.load_dataset(
                self.repository, self.configuration, split=split, revision=self.revision, streaming=True
            )
            for row in rows:
                yield row["text"]
        except failures as error:
            cause = str(error).partition("\n")[0]
            raise UserError(
                f"{self.name}: no network, or the hub cannot be reached ({cause}); "
                "use --data stories, or a folder with train.txt and valid.txt"
            ) from None

    def fingerprint(self) -> str:
        import xxhash

        return xxhash.xxh3_128_hexdigest(f"{self.repository} {self.configuration} {self.revision}".encode())

    def size(self, split: SplitName) -> int | None:
        return None


def _transport_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises when a connection breaks; of older ones, by way of requests, that is an OSError."""
    from huggingface_hub import utils

    client = getattr(utils, "httpx", None)
    return () if client is None else (client.HTTPError,)


_HUB = {
    corpus.name: corpus
    for corpus in (
        _HubCorpus("tinystories", "roneneldan/TinyStories", None, "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"),
        _HubCorpus(
            "wikitext",
            "Salesforce/wikitext",
            "wikitext-103-raw-v1",
            "b08601e04326c79dfdd32d625aee71d232d685c3",
        ),
        # deepmind/pg19 is a loading script, which datasets no longer runs: this is the same text as Parquet.
        _HubCorpus("pg19", "emozilla/pg19", None, "c021754c8e01c5b1cc83a1f549c1f97fbbb756b8"),
    )
}


_HEADING = re.compile(r" = [^=].* = \n?")


def articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText's lines, joined into articles. An article begins at a heading ` = Title = ` after a blank
    line; sections within it have two equals signs or more (` = = Section = = `)."""
    article: list[str] = []
    blank = True
    for line in lines:
        if blank and article and _HEADING.fullmatch(line):
            yield "".join(article)
            article = []
        article.append(line)
        blank = not line.strip()
    yield "".join(article)
