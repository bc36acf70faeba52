"""Corpora: every source of text as two splits of documents, `train` and `valid`.

The sources are the embedded stories (`synthetic/`), three public data sets (`hub.py`), and the user's own files:

- Of a single file, the last 5 % of the documents, and at least one, are the validation split. A text file with a single
  document is divided between 90 and 95 % of its bytes; the part after that is the validation split.
- A folder with `train.txt` (or `train.jsonl`) has its training text there, and its validation text in `valid.txt` (or
  `valid.jsonl`). Without that file, the training file is split as a single file.
- Any other folder has all its `.txt` and `.jsonl` files, those of inner folders included, in the order of their paths.
  They are split as if they were one file.

To add a corpus: a data set of the Hugging Face hub needs an entry in `hub.HUB`; any other source needs a class with the
methods of `Corpus` and a branch in `open_corpus`. Both need a name in `config.NAMED_CORPORA`.

Importing this module imports neither jax nor numpy, so that `check_source` can answer before jax is loaded.
"""

import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import xxhash

from moe_jax.config import NAMED_CORPORA, ConfigError, DataConfig, DataFormat, UserError
from moe_jax.data.documents import (
    JSON_LINES,
    Span,
    SplitName,
    document_starts,
    documents_of,
    last_part_start,
    other_kind,
)
from moe_jax.data.hub import HUB
from moe_jax.system.files import cache_dir, json_text, write_atomically

LOOKED_AT = 8 << 20
"""Bytes of a text in which mistakes are looked for before jax is loaded."""
LARGE = 1 << 27
"""From this size on, in bytes, the digest of a text is kept, and the text is not read again while its files stay the
same."""
_CLOCK_SECONDS = 2.0
"""Times of files are exact to this. FAT has the coarsest clock."""

type Spans = tuple[Span, ...]


class Documents(Protocol):
    """Two splits of documents: what a tokenizer is learned from."""

    def documents(self, split: SplitName) -> Iterator[Any]:
        """The documents of a split, stripped and not empty. Raises UserError if there is no document."""
        ...

    def size(self, split: SplitName) -> int | None:
        """Bytes of the split's source, for a progress bar. None if unknown."""
        ...


class Corpus(Documents, Protocol):
    """Documents that can be named, and told apart from other documents."""

    @property
    def name(self) -> str:
        """The value of `--data` that names this corpus."""
        ...

    def fingerprint(self) -> str:
        """Hex digest of everything that determines the text. Equal fingerprints mean equal documents."""
        ...


def check_source(data: DataConfig, seq_len: int = 0) -> None:
    """Raise ConfigError unless `data.source` is the name of a corpus, or the path of a text that looks right.

    A name wins over a path; conversations are always in files. The first 8 MiB of a text are read: it may not be empty,
    too short for one context of `seq_len` tokens, not UTF-8, or have a row that cannot be read. What is wrong further
    on is noticed when the text is prepared.
    """
    if data.source in NAMED_CORPORA and data.format == "text":
        return
    for split, paths in source_files(Path(data.source), data.format).items():
        size, seen = sum(path.stat().st_size for path in paths), 0
        try:
            if paths:
                name = data.source if len(paths) > 1 else str(paths[0])
                for document in _documents(tuple(map(Span.of, paths)), data.format, name):
                    seen += len(document) if isinstance(document, str) else sum(len(m.content) for m in document)
                    if seen >= LOOKED_AT:
                        break
        except UserError as error:
            raise ConfigError(f"--data {error}") from None
        # Every token takes at least one byte of the file. The first and the last separator need not be in the file.
        if split == "train" and size + 2 < seq_len + 1 and data.tokenizer != "hf":
            raise ConfigError(
                f"--data {data.source}: {size} bytes to train on, and a context of --seq-len {seq_len} needs "
                f"{seq_len + 1} tokens; give a longer text or a smaller --seq-len"
            )


def open_corpus(data: DataConfig, cache: Path | None = None) -> Corpus:
    """The corpus that `data.source` names. Files without a validation file are read here, to split them.

    `cache` is where the digests of large texts are kept, by default `system.files.cache_dir`. Raises ConfigError where
    the source does not exist, UserError where a file cannot be read.
    """
    if data.format == "text":
        if data.source == "stories":
            return EmbeddedCorpus(data.stories_seed, data.stories)
        if data.source in HUB:
            return HUB[data.source]
    return FileCorpus.open(data.source, data.format, (cache or cache_dir()) / "texts")


def scored_documents(source: str, form: DataFormat = "text") -> Iterator[Any]:
    """The documents that an evaluation of `source` scores: all documents of a single file, else the validation split.

    Raises the errors of `open_corpus`.
    """
    path = Path(source)
    if path.is_file() and (form == "chat" or source not in NAMED_CORPORA):
        return _documents((Span.of(path),), form, source)
    return open_corpus(DataConfig(source=source, format=form)).documents("valid")


@dataclass(frozen=True)
class EmbeddedCorpus:
    """The stories that the grammar in `synthetic/` generates."""

    seed: int
    count: int
    """Training stories."""
    name: str = "stories"

    def documents(self, split: SplitName) -> Iterator[str]:
        from moe_jax.data.synthetic import stories

        return stories.generate(self.seed, split, self.count if split == "train" else stories.VALIDATION_STORIES)

    def fingerprint(self) -> str:
        from moe_jax.data.synthetic import stories

        return stories.fingerprint(self.seed, self.count)

    def size(self, split: SplitName) -> int | None:
        return None


def source_files(path: Path, form: DataFormat = "text") -> dict[SplitName, list[Path]]:
    """The files of a source. Its split "valid" is empty if it must be taken from the training files.

    Raises ConfigError if there is no file, or if one is not of the format `form`.
    """
    endings = JSON_LINES if form == "chat" else (".txt", *JSON_LINES)
    if path.is_file():
        found: dict[SplitName, list[Path]] = {"train": [path], "valid": []}
    elif path.is_dir():
        found = _files_of_folder(path, endings)
    elif form == "chat":
        raise ConfigError(f"--data {path}: must be an existing file or folder of conversations, in JSON lines")
    else:
        names = ", ".join(NAMED_CORPORA)
        raise ConfigError(f"--data {path}: must be an existing file or folder, or one of {names}")
    for file in (*found["train"], *found["valid"]):
        problem = None
        if form == "chat" and file.suffix.lower() not in JSON_LINES:
            problem = "must be JSON lines, in a file that ends in .jsonl, to hold conversations"
        try:
            problem = problem or other_kind(file)
        except UserError as error:
            raise ConfigError(f"--data {error}") from None
        if problem is not None:
            raise ConfigError(f"--data {file}: {problem}")
    return found


def _files_of_folder(folder: Path, endings: tuple[str, ...]) -> dict[SplitName, list[Path]]:
    named: dict[SplitName, list[Path]] = {
        split: [path for ending in endings if (path := folder / f"{split}{ending}").is_file()][:1]
        for split in ("train", "valid")
    }
    if named["train"]:
        return named
    allowed = " or ".join(endings[:-1])
    if named["valid"]:
        names = " or ".join(f"train{ending}" for ending in endings[:-1])
        raise ConfigError(f"--data {folder}: {named['valid'][0].name} is there, but no {names}; add that file")
    inside = (p for p in folder.rglob("*") if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    files = sorted(p for p in inside if p.suffix.lower() in endings and p.is_file())
    if not files:
        raise ConfigError(f"--data {folder}: must hold {allowed} files; there is none in it")
    return {"train": files, "valid": []}


@dataclass(frozen=True)
class FileCorpus:
    """Files as a `Corpus`.

    The digest of a large text is kept in `NOTES/KEY.json`, with its two splits. KEY is a digest of the path, size,
    inode and times of each file. While these are the same, the text is taken to be the same.
    """

    name: str
    spans: dict[SplitName, Spans]
    form: DataFormat
    files: tuple[Any, ...]
    """Split, path, size, device, inode and times of each file, when the corpus was opened."""
    note: Path | None = None
    """Where to keep the digest. None for a text that is not large, or that was written a moment ago: a file can be
    written twice within one tick of the clock, and its times then do not change."""
    kept: str | None = None
    """The digest that was kept."""

    @classmethod
    def open(cls, name: str, form: DataFormat, notes: Path) -> "FileCorpus":
        """The corpus of a file or folder. Raises ConfigError, and UserError if a file cannot be read or has too little
        text to be split."""
        now = time.time()
        paths = source_files(Path(name), form)
        files = _signature(paths)
        size, newest = sum(file[2] for file in files), max(max(file[-2:]) for file in files) / 1e9
        note = None
        if size >= LARGE and newest < now - _CLOCK_SECONDS:
            note = notes / f"{xxhash.xxh3_128_hexdigest(json_text([2, form, files]).encode())}.json"
            with suppress(OSError, ValueError, LookupError, TypeError):
                kept = json.loads(note.read_text())
                spans: dict[SplitName, Spans] = {
                    split: tuple(Span(Path(path), start, stop) for path, start, stop in kept["spans"][split])
                    for split in paths
                }
                return cls(name, spans, form, files, note, kept["fingerprint"])
        train, valid = (tuple(Span.of(p) for p in paths[split]) for split in ("train", "valid"))
        if not valid:
            train, valid = _split(train)
        return cls(name, {"train": train, "valid": valid}, form, files, note)

    def documents(self, split: SplitName) -> Iterator[Any]:
        """Raises UserError after the last document if a file was changed since the corpus was opened."""
        spans = self.spans[split]
        yield from _documents(spans, self.form, f"{spans[0].path if len(spans) == 1 else self.name} ({split})")
        self.check_unchanged()

    def fingerprint(self) -> str:
        """xxh3-128 of the bytes of both splits and of their offsets in the files. The paths are not included."""
        return self._fingerprint

    def size(self, split: SplitName) -> int | None:
        return sum(span.stop - span.start for span in self.spans[split])

    def check_unchanged(self) -> None:
        """Raise UserError if a file was changed since the corpus was opened."""
        paths: dict[SplitName, list[Path]] = {"train": [], "valid": []}
        for split, path, *_ in self.files:
            paths[split].append(Path(path))
        if _signature(paths) != self.files:
            raise UserError(f"--data {self.name}: the text was changed while it was read; start again")

    @cached_property
    def _fingerprint(self) -> str:
        if self.kept is not None:
            return self.kept
        digest = xxhash.xxh3_128()
        for spans in self.spans.values():
            if len(spans) != 1:  # a file that moves to the other split changes the digest
                digest.update(f"{len(spans)} files;".encode())
            for span in spans:
                kind = "chats;" if self.form == "chat" else "lines;" if span.is_json else ""
                digest.update(f"{span.start}-{span.stop};{kind}".encode())
                for chunk in span.chunks():
                    digest.update(chunk)
        self.check_unchanged()
        if self.note is not None:
            spans = {split: [(str(s.path), s.start, s.stop) for s in spans] for split, spans in self.spans.items()}
            with suppress(OSError):  # a cache that cannot be written: the text is read again
                self.note.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self.note, json_text({"fingerprint": digest.hexdigest(), "spans": spans}))
        return digest.hexdigest()


def _signature(splits: dict[SplitName, list[Path]]) -> tuple[Any, ...]:
    """What the file system says of the files. Raises UserError if one cannot be looked at."""
    found = []
    for split, paths in splits.items():
        for path in paths:
            try:
                s = path.stat()
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
            found.append((split, os.path.abspath(path), s.st_size, s.st_dev, s.st_ino, s.st_mtime_ns, s.st_ctime_ns))
    return tuple(found)


def _documents(spans: Spans, form: DataFormat, what: str) -> Iterator[Any]:
    """The documents of some spans. Raises UserError after the last one if there was none."""
    empty = True
    for span in spans:
        for document in documents_of(span, form):
            empty = False
            yield document
    if empty:
        raise UserError(f"{what}: there is no text in it; give a longer one with --data")


def _split(spans: Spans) -> tuple[Spans, Spans]:
    """The training and the validation part of some files. They are read twice: how many documents there are is known at
    the end only."""
    count = sum(1 for _ in _document_places(spans))
    target = max(0, count - max(1, count // 20))
    number, offset = next(itertools.islice(_document_places(spans), target, None), (0, 0))
    span = spans[number]
    if count < 2:
        if span.is_json:
            raise UserError(f"{span.path}: has fewer than two rows, and one must be left for validation; add rows")
        offset = last_part_start(span)
    before, after = Span(span.path, span.start, offset), Span(span.path, offset, span.stop)
    whole = () if before.start == before.stop and number else (before,)
    return (*spans[:number], *whole), (after, *spans[number + 1 :])


def _document_places(spans: Iterable[Span]) -> Iterator[tuple[int, int]]:
    """(number of the file, offset in it) of each document."""
    return ((number, offset) for number, span in enumerate(spans) for offset in document_starts(span))
