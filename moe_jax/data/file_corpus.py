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

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_jax.config import ConfigError, DataFormat, UserError
from moe_jax.data.chat_rows import first_chat_problem
from moe_jax.data.json_lines import ENDINGS, first_row_problem, holds_json_lines, line_starts
from moe_jax.data.text_files import (
    Span,
    SplitName,
    document_starts,
    last_part_start,
    other_kind,
    read_chunks,
    refuse_empty,
)
from moe_jax.data.text_notes import Files, read_note, write_note
from moe_jax.data.text_plan import Spans, TextPart, TextPlan, documents_of

_SPLITS: tuple[SplitName, SplitName] = ("train", "valid")
_MOST_PLACES = 1 << 16
"""Documents whose places are kept at a time."""


def source_files(path: Path, form: DataFormat = "text") -> dict[SplitName, list[Path]]:
    """The files of a source. Its split "valid" is empty if it must be taken from the training files.

    Raises ConfigError if there is no file, or if one is not of the format `form`.
    """
    if path.is_file():
        found: dict[SplitName, list[Path]] = {"train": [path], "valid": []}
    elif path.is_dir():
        named: dict[SplitName, list[Path]] = {split: _named(path, split, form) for split in _SPLITS}
        if named["valid"] and not named["train"]:
            raise ConfigError(
                f"--data {path}: {named['valid'][0].name} is there, but no {_names('train', form)}; add that file"
            )
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
    files: Files | None = None
    notes: Path | None = None
    """Where plans are kept (`text_notes.py`). None to keep none."""
    kept: TextPlan | None = None
    """The plan that was found there."""

    @classmethod
    def open(cls, name: str, form: DataFormat = "text", notes: Path | None = None) -> "FileCorpus":
        """The corpus of a file or folder. Training files without a validation file are read once, to split them.

        Nothing is read if `notes` has a plan of these files. Raises ConfigError, and UserError if a file cannot be read
        or has too little text to be split.
        """
        paths = source_files(Path(name), form)
        files = Files.of(name, paths, form)
        if notes is not None and (found := read_note(notes, files)) is not None:
            return cls(name, found[0], form, files, notes, found[1])
        train, valid = (tuple(Span.of(p) for p in paths[split]) for split in _SPLITS)
        if not valid:
            train, valid = _split(train)
        return cls(name, {"train": train, "valid": valid}, form, files, notes)

    @classmethod
    def whole(cls, path: Path, form: DataFormat = "text") -> "FileCorpus":
        """A file that is scored whole: all of it is the validation split."""
        return cls(str(path), {"train": (), "valid": (Span.of(path),)}, form)

    def documents(self, split: SplitName) -> Iterator[Any]:
        spans = self.spans[split]
        found = (document for span in spans for document in documents_of(span, read_chunks(span), self.form))
        return refuse_empty(found, self.where(split))

    def where(self, split: SplitName) -> str:
        """What to call the source of a split in a message."""
        spans = self.spans[split]
        return f"{spans[0].path if len(spans) == 1 else self.name} ({split})"

    def fingerprint(self) -> str:
        """xxh3-128 of the bytes of both splits and of their offsets in the files. The paths are not included."""
        return self.plan.fingerprint

    def parts(self, split: SplitName) -> tuple[TextPart, ...]:
        return self.plan.parts[split]

    @cached_property
    def plan(self) -> TextPlan:
        """Reads the text once, unless a plan was kept. Raises UserError if a file was changed meanwhile."""
        if self.kept is not None:
            return self.kept
        plan = TextPlan.of(self.name, self.form, self.spans)
        if self.files is not None:
            self.files.check_unchanged()
            if self.notes is not None:
                write_note(self.notes, self.files, self.spans, plan)
        return plan

    def size(self, split: SplitName) -> int | None:
        return sum(span.stop - span.start for span in self.spans[split])


def _split(spans: Spans) -> tuple[Spans, Spans]:
    """The training and the validation part of some files."""
    count, number, cut = _late_document(spans)
    if count < 2:
        if holds_json_lines(spans[number].path):
            raise UserError(
                f"{spans[number].path}: has fewer than two rows, and one must be left for validation; add rows"
            )
        cut = last_part_start(spans[number])
    span = spans[number]
    before, after = Span(span.path, span.start, cut), Span(span.path, cut, span.stop)
    whole = () if before.start == before.stop and number else (before,)
    return (*spans[:number], *whole), (after, *spans[number + 1 :])


def _late_document(spans: Spans) -> tuple[int, int, int]:
    """(number of documents, number of a file, offset in it): where the last 5 % of the documents begin.

    How many documents there are is known at the end only. So the place of every n-th document is kept, with a growing
    n, and the last stretch is read once more. The memory is bounded, whatever the number of documents.
    """
    places: list[tuple[int, int]] = []
    every, count = 1, 0
    for place in _document_places(spans):
        if count % every == 0:
            places.append(place)
            if len(places) > _MOST_PLACES:
                places, every = places[::2], 2 * every
        count += 1
    if not count:
        return 0, 0, 0
    target = count - max(1, count // 20)
    number, offset = places[target // every]
    rest = (Span(spans[number].path, offset, spans[number].stop), *spans[number + 1 :])
    further, cut = next(itertools.islice(_document_places(rest), target % every, None))
    return count, number + further, cut


def _document_places(spans: Spans) -> Iterator[tuple[int, int]]:
    """(number of the file, offset in it) of each document."""
    for number, span in enumerate(spans):
        for offset in (line_starts if holds_json_lines(span.path) else document_starts)(span):
            yield number, offset
