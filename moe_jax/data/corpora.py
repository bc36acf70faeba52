"""Corpora: every source of text as two splits of documents, `train` and `valid`.

The sources are the embedded stories (`synthetic/`), tiny Shakespeare, three public data sets of the Hugging Face hub,
which are streamed at pinned revisions, and the user's own files:

- Of a single file, the last 5 % of the documents, and at least one, are the validation split. A text file with a single
  document is divided between 90 and 95 % of its bytes; the part after that is the validation split.
- A folder with `train.txt` (or `train.jsonl`) has its training text there, and its validation text in `valid.txt` (or
  `valid.jsonl`). Without that file, the training file is split as a single file.
- Any other folder has all its `.txt`, `.md` and `.jsonl` files, those of inner folders included, in the order of their
  paths. They are split as if they were one file.
- Each of these may end in `.gz`.

To add a data set of the hub: an entry in `HUB`, and its name in `config.NAMED_CORPORA`. Any other source is a function
that makes a `Corpus`, a branch in `open_corpus`, and a name.

Importing this module imports neither jax nor numpy, so that `check_source` can answer before jax is loaded.
"""

import hashlib
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from moe_jax.config import NAMED_CORPORA, ConfigError, DataConfig, DataFormat, UserError
from moe_jax.data.documents import (
    JSON_LINES,
    TEXTS,
    Span,
    SplitName,
    divided,
    document_starts,
    documents_of,
    ending,
    last_part_start,
)
from moe_jax.system.files import cache_dir, write_output

type Spans = tuple[Span, ...]


@dataclass(frozen=True)
class Corpus:
    """Two splits of documents, which can be told apart from other documents."""

    documents: Callable[[SplitName], Iterator[Any]]
    """The documents of a split, stripped and not empty. Raises UserError if there is no document."""
    fingerprint: Callable[[], str]
    """Hex digest of everything that determines the text. Equal fingerprints mean equal documents."""


def open_corpus(data: DataConfig) -> Corpus:
    """The corpus that `data.source` names; conversations are always in files. Files without a validation file are read
    here, to split them.

    Raises ConfigError where the source does not exist, UserError where a file cannot be read or has too little text to
    be split.
    """
    if data.format == "text" and data.source == "stories":
        return _embedded(data)
    if data.format == "text" and data.source == "shakespeare":
        return _shakespeare()
    if data.format == "text" and data.source in HUB:
        return _of_the_hub(data.source)
    train, valid = (tuple(map(Span.of, paths)) for paths in source_files(Path(data.source), data.format).values())
    if not valid:
        train, valid = _split(train)
    return _of_files(data.source, {"train": train, "valid": valid}, data.format)


def check_source(data: DataConfig) -> None:
    """Raise ConfigError unless `data.source` is the name of a corpus, or a path with files of the right kind.

    A name wins over a path. What is wrong inside a text is noticed when the text is prepared.
    """
    if data.source not in NAMED_CORPORA or data.format == "chat":
        source_files(Path(data.source), data.format)


def scored_documents(source: str, form: DataFormat = "text") -> Iterator[Any]:
    """The documents that an evaluation of `source` scores: all documents of a single file, else the validation split.

    Raises the errors of `open_corpus`.
    """
    path = Path(source)
    if path.is_file() and (form == "chat" or source not in NAMED_CORPORA):
        return _documents((Span.of(path),), form, source)
    return open_corpus(DataConfig(source=source, format=form)).documents("valid")


def _embedded(data: DataConfig) -> Corpus:
    """The stories that the grammar in `synthetic/` generates."""
    from moe_jax.data.synthetic import stories

    seed, counts = data.stories_seed, {"train": data.stories, "valid": stories.VALIDATION_STORIES}
    return Corpus(
        lambda split: stories.generate(seed, split, counts[split]), partial(stories.fingerprint, seed, data.stories)
    )


# Public data sets


HUB: dict[str, tuple[str, str | None, str]] = {
    "tinystories": ("roneneldan/TinyStories", None, "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1", "b08601e04326c79dfdd32d625aee71d232d685c3"),
    # deepmind/pg19 is a loading script, which datasets no longer runs. This is the same text as Parquet.
    "pg19": ("emozilla/pg19", None, "c021754c8e01c5b1cc83a1f549c1f97fbbb756b8"),
}
"""Name for `--data` -> repository, configuration and revision of a data set of the Hugging Face hub. Only its token ids
are stored."""


def _of_the_hub(name: str) -> Corpus:
    def documents(split: SplitName) -> Iterator[str]:
        rows = _rows(name, "train" if split == "train" else "validation")
        texts = articles(rows) if name == "wikitext" else rows
        return (document for text in texts for document in divided(text))

    def fingerprint() -> str:
        import xxhash

        return xxhash.xxh3_128_hexdigest(" ".join(map(str, HUB[name])).encode())

    return Corpus(documents, fingerprint)


def _rows(name: str, split: str) -> Iterator[str]:
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # it warns at each retry; the UserError below is enough
    repository, configuration, revision = HUB[name]
    try:
        for row in datasets.load_dataset(repository, configuration, split=split, revision=revision, streaming=True):
            yield row["text"]
    except Exception as error:  # of the network, of its client, of the hub, or of `datasets`
        cause = str(error).partition("\n")[0]
        raise UserError(
            f"{name}: no network, or the hub cannot be reached ({cause}); "
            "use --data stories, or a folder with train.txt and valid.txt"
        ) from None


_HEADING = re.compile(r" = [^=].* = \n?")


def articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText's lines, joined into articles.

    An article begins at a heading ` = Title = ` after a blank line. The headings of its sections have two or more
    equals signs on each side (` = = Section = = `).
    """
    article: list[str] = []
    blank = True
    for line in lines:
        if blank and article and _HEADING.fullmatch(line):
            yield "".join(article)
            article = []
        article.append(line)
        blank = not line.strip()
    yield "".join(article)


# Tiny Shakespeare

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def _shakespeare() -> Corpus:
    """Tiny Shakespeare, with the usual split: the first 90 % trains, the rest validates. The file is in the cache."""
    path = cache_dir() / "shakespeare.txt"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHAKESPEARE_SHA256:
        _download_shakespeare(path)
    size = path.stat().st_size
    train, valid = Span(path, 0, size * 9 // 10), Span(path, size * 9 // 10, size)
    return _of_files("shakespeare", {"train": (train,), "valid": (valid,)}, "text")


def _download_shakespeare(path: Path) -> None:
    import urllib.request

    try:
        with urllib.request.urlopen(SHAKESPEARE, timeout=30) as answer:
            text = answer.read()
    except OSError as error:
        raise UserError(f"shakespeare: {SHAKESPEARE} cannot be reached ({error}); save the text as {path}") from None
    if hashlib.sha256(text).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(f"shakespeare: {SHAKESPEARE} has another text than it had; save the right one as {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_output(path, text)


# Files


def _of_files(name: str, spans: dict[SplitName, Spans], form: DataFormat) -> Corpus:
    """Files of text or of conversations."""

    def documents(split: SplitName) -> Iterator[Any]:
        what = str(spans[split][0].path) if len(spans[split]) == 1 else name
        return _documents(spans[split], form, f"{what} ({split})")

    @cache
    def fingerprint() -> str:
        """xxh3-128 of the bytes of both splits and of their offsets in the files. The paths are not included."""
        import xxhash

        digest = xxhash.xxh3_128()
        for part in spans.values():
            if len(part) != 1:  # a file that moves to the other split changes the digest
                digest.update(f"{len(part)} files;".encode())
            for span in part:
                kind = "chats;" if form == "chat" else "lines;" if span.is_json else ""
                digest.update(f"{span.start}-{span.stop};{kind}".encode())
                for chunk in span.chunks():
                    digest.update(chunk)
        return digest.hexdigest()

    return Corpus(documents, fingerprint)


def source_files(path: Path, form: DataFormat = "text") -> dict[SplitName, list[Path]]:
    """The files of a source. Its split "valid" is empty if it must be taken from the training files.

    Raises ConfigError if there is no file, or if one is not of the format `form`.
    """
    endings = JSON_LINES if form == "chat" else (*TEXTS, *JSON_LINES)
    if path.is_file():
        files: dict[SplitName, list[Path]] = {"train": [path], "valid": []}
    elif path.is_dir():
        files = _files_of_folder(path, endings)
    else:
        names = " of conversations, in JSON lines" if form == "chat" else f", or one of {', '.join(NAMED_CORPORA)}"
        raise ConfigError(f"--data {path}: must be an existing file or folder{names}")
    for file in (*files["train"], *files["valid"]):
        if ending(file) == ".json" or (form == "chat" and ending(file) not in JSON_LINES):
            raise ConfigError(
                f"--data {file}: must be JSON lines, one object a line, in a file that ends in .jsonl (an array of "
                f"objects: `jq -c '.[]' {file.name} > {file.stem}.jsonl`)"
            )
    return files


def _files_of_folder(folder: Path, endings: tuple[str, ...]) -> dict[SplitName, list[Path]]:
    named: dict[SplitName, list[Path]] = {
        split: [path for end in endings for z in ("", ".gz") if (path := folder / f"{split}{end}{z}").is_file()][:1]
        for split in ("train", "valid")
    }
    if named["train"]:
        return named
    inside = (p for p in folder.rglob("*") if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    files = [] if named["valid"] else sorted(p for p in inside if p.is_file() and ending(p) in endings)
    if not files:
        names = " or ".join(f"train{end}" for end in endings)
        raise ConfigError(f"--data {folder}: must hold {names}, or else {' or '.join(endings)} files and no valid file")
    return {"train": files, "valid": []}


def _documents(spans: Iterable[Span], form: DataFormat, what: str) -> Iterator[Any]:
    """The documents of some spans. Raises UserError after the last one if there was none."""
    empty = True
    for span in spans:
        for document in documents_of(span, form):
            empty = False
            yield document
    if empty:
        raise UserError(f"{what}: there is no text in it; give a longer one with --data")


def _split(spans: Spans) -> tuple[Spans, Spans]:
    """The training part and the validation part of some files: the last 5 % of the documents, and at least one."""
    count, last = 0, deque([(0, 0)])
    for count, place in enumerate(((n, start) for n, span in enumerate(spans) for start in document_starts(span)), 1):
        last.append(place)
        while len(last) > max(1, count // 20):
            last.popleft()
    number, offset = last[0]
    span = spans[number]
    if count < 2:
        if span.is_json:
            raise UserError(f"{span.path}: has fewer than two rows, and one must be left for validation; add rows")
        offset = last_part_start(span)
    before, after = Span(span.path, span.start, offset), Span(span.path, offset, span.stop)
    whole = () if before.start == before.stop and number else (before,)
    return (*spans[:number], *whole), (after, *spans[number + 1 :])
