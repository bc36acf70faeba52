"""The user's own files as a corpus: which files a source has, and which part of them validates.

- A single file is one source. Its last 5 % of documents, and at least one, are the validation split. A text file with a
  single document is cut between 90 and 95 % of its bytes; the part after the cut is the validation split.
- A folder with `train.txt` (or `train.jsonl`) has its training text there, and its validation text in `valid.txt` (or
  `valid.jsonl`). Without that file, the training file is split as a single file.
- Any other folder has all its `.txt` and `.jsonl` files, those of inner folders included, in the order of their paths.
  They are split as if they were one file.

Text files and JSON lines have their rules in `text_files.py` and `json_lines.py`. With the format `chat`, all files are
JSON lines that hold conversations (`chats.py`).
"""

from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.config import ConfigError, DataFormat, UserError
from moe_jax.data.chat_rows import conversations, first_chat_problem
from moe_jax.data.json_lines import ENDINGS, first_row_problem, holds_json_lines, json_documents, line_starts
from moe_jax.data.text_files import (
    Span,
    SplitName,
    document_starts,
    last_part_start,
    other_kind,
    read_chunks,
    refuse_empty,
    text_documents,
)

_SPLITS: tuple[SplitName, SplitName] = ("train", "valid")

type Spans = tuple[Span, ...]


def source_files(path: Path, form: DataFormat = "text") -> dict[SplitName, list[Path]]:
    """The files of a source. Its split "valid" is empty if it must be taken from the training files.

    Raises ConfigError if there is no file, or if one is not of the format `form`.
    """
    if path.is_file():
        found: dict[SplitName, list[Path]] = {"train": [path], "valid": []}
    elif path.is_dir():
        named: dict[SplitName, list[Path]] = {split: _named(path, split, form) for split in _SPLITS}
        if named["valid"] and not named["train"]:
            raise ConfigError(f"--data {path}: {named['valid'][0].name} is there, but no {_names('train', form)}")
        found = named if named["train"] else {"train": _all_files(path, form), "valid": []}
    else:
        raise ConfigError(f"--data {path}: does not exist; name a file or a folder")
    for file in (*found["train"], *found["valid"]):
        problem = _first_problem(file, form)
        if problem is not None:
            raise ConfigError(f"--data {file}: {problem}")
    return found


def _first_problem(file: Path, form: DataFormat) -> str | None:
    """What is wrong with the beginning of a file."""
    if form == "chat":
        if not holds_json_lines(file):
            return "must be JSON lines, in a file that ends in .jsonl, to hold conversations"
        return other_kind(file) or first_chat_problem(file)
    return other_kind(file) or (first_row_problem(file) if holds_json_lines(file) else None)


def _endings(form: DataFormat) -> tuple[str, ...]:
    return ENDINGS if form == "chat" else (".txt", *ENDINGS)


def _names(split: str, form: DataFormat) -> str:
    return " or ".join(f"{split}{ending}" for ending in _endings(form)[:-1])


def _named(folder: Path, split: SplitName, form: DataFormat) -> list[Path]:
    """The file of a folder that is named after a split, if there is one."""
    return [path for ending in _endings(form) if (path := folder / f"{split}{ending}").is_file()][:1]


def _all_files(folder: Path, form: DataFormat) -> list[Path]:
    inside = (p for p in folder.rglob("*") if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    files = sorted(p for p in inside if p.suffix.lower() in _endings(form) and p.is_file())
    if not files:
        raise ConfigError(f"--data {folder}: must hold {' or '.join(_endings(form)[:-1])} files; there is none in it")
    return files


@dataclass(frozen=True)
class FileCorpus:
    """Files as a `corpora.Corpus`."""

    name: str
    spans: dict[SplitName, Spans]
    form: DataFormat = "text"
    """Documents are texts, or conversations."""

    @classmethod
    def open(cls, name: str, form: DataFormat = "text") -> "FileCorpus":
        """The corpus of a file or folder. Training files without a validation file are read once, to split them.

        Raises ConfigError, and UserError if a file cannot be read or has too little text to be split.
        """
        files = source_files(Path(name), form)
        train, valid = (tuple(Span.of(p) for p in files[split]) for split in _SPLITS)
        if not valid:
            train, valid = _split(train)
        return cls(name, {"train": train, "valid": valid}, form)

    @classmethod
    def whole(cls, path: Path, form: DataFormat = "text") -> "FileCorpus":
        """A file that is scored whole: all of it is the validation split."""
        return cls(str(path), {"train": (), "valid": (Span.of(path),)}, form)

    def documents(self, split: SplitName) -> Iterator[Any]:
        return self.reading().documents(split)

    def fingerprint(self) -> str:
        """xxh3-128 of the bytes of both splits and of their offsets in the files. The paths are not included."""
        return self.reading().fingerprint()

    def reading(self) -> "FileReading":
        return FileReading(self)

    def size(self, split: SplitName) -> int | None:
        return sum(span.stop - span.start for span in self.spans[split])


class FileReading:
    """One pass over a `FileCorpus`, which digests the bytes as it reads them. Each split can be read once, in order."""

    def __init__(self, corpus: FileCorpus) -> None:
        import xxhash

        self.name, self._corpus, self._digest = corpus.name, corpus, xxhash.xxh3_128()
        self._unread = {split: self._read(spans) for split, spans in corpus.spans.items()}

    def _read(self, spans: Spans) -> Iterator[tuple[Span, Iterator[bytes]]]:
        if len(spans) != 1:  # a file that moves to the other split changes the digest
            self._digest.update(f"{len(spans)} files;".encode())
        for span in spans:
            kind = "lines;" if holds_json_lines(span.path) else ""
            kind = "chats;" if self._corpus.form == "chat" else kind
            self._digest.update(f"{span.start}-{span.stop};{kind}".encode())
            chunks = self._digested(span)
            yield span, chunks
            deque(chunks, maxlen=0)

    def _digested(self, span: Span) -> Iterator[bytes]:
        for chunk in read_chunks(span):
            self._digest.update(chunk)
            yield chunk

    def documents(self, split: SplitName) -> Iterator[Any]:
        for earlier, files in self._unread.items():
            if earlier == split:
                found = (document for span, chunks in files for document in self._documents(span, chunks))
                where = self._corpus.spans[split]
                yield from refuse_empty(found, f"{where[0].path if len(where) == 1 else self.name} ({split})")
                return
            deque(files, maxlen=0)

    def fingerprint(self) -> str:
        """`FileCorpus.fingerprint` of what was read. Reads what is left."""
        for files in self._unread.values():
            deque(files, maxlen=0)
        return self._digest.hexdigest()

    def reading(self) -> "FileReading":
        return self

    def size(self, split: SplitName) -> int | None:
        return self._corpus.size(split)

    def _documents(self, span: Span, chunks: Iterable[bytes]) -> Iterator[Any]:
        if self._corpus.form == "chat":
            return conversations(span, chunks)
        return (json_documents if holds_json_lines(span.path) else text_documents)(span, chunks)


def _split(spans: Spans) -> tuple[Spans, Spans]:
    """The training and the validation part of some files."""
    files, offsets = array("q"), array("q")  # of each document
    for number, span in enumerate(spans):
        for offset in (line_starts if holds_json_lines(span.path) else document_starts)(span):
            files.append(number)
            offsets.append(offset)
    if len(files) >= 2:
        first = len(files) - max(1, len(files) // 20)
        number, cut = files[first], offsets[first]
    else:
        number = files[0] if files else 0
        if holds_json_lines(spans[number].path):
            raise UserError(f"{spans[number].path}: has less than two rows; one must be left for validation")
        cut = last_part_start(spans[number])
    span = spans[number]
    before, after = Span(span.path, span.start, cut), Span(span.path, cut, span.stop)
    whole = () if before.start == before.stop and number else (before,)
    return (*spans[:number], *whole), (after, *spans[number + 1 :])
