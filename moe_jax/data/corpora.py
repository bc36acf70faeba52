"""Corpora: every source of text as an iterator of documents.

A corpus has two splits, `train` and `valid`. Documents are stripped and not empty, and are never all in memory. The
sources are the embedded stories (`synthetic/`), three public data sets (`hub.py`), and the user's own files
(`file_corpus.py`).

To add a corpus: a data set of the Hugging Face hub needs an entry in `hub.HUB`; any other source needs a class with the
methods of `Corpus` and a branch in `open_corpus`. Both need a name in `config.NAMED_CORPORA`.

Importing this module imports only the standard library, so that `check_source` can answer before jax is loaded.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from moe_jax.config import NAMED_CORPORA, ConfigError, DataConfig, DataFormat
from moe_jax.data.file_corpus import FileCorpus, source_files
from moe_jax.data.hub import HUB
from moe_jax.data.stream_parts import StreamPart, stream_parts
from moe_jax.data.text_files import SplitName
from moe_jax.system.files import cache_dir


@runtime_checkable
class Documents(Protocol):
    """Two splits of documents: what a tokenizer is learned from."""

    def documents(self, split: SplitName) -> Iterator[str]:
        """The documents of a split, stripped and not empty. Raises UserError if there is no document."""
        ...

    def size(self, split: SplitName) -> int | None:
        """Bytes of the split's source, for a progress bar. None if unknown."""
        ...


class Part(Protocol):
    """Consecutive documents of a split."""

    @property
    def key(self) -> str:
        """Tells the part from others with the same number in a corpus with the same fingerprint. It changes with the
        rule by which a text is divided."""
        ...

    def documents(self) -> Iterator[Any]:
        """The documents. A text may be edited while it is read: raises UserError after the last document if it was."""
        ...

    def skip(self) -> None:
        """Go on to the next part without the documents of this one."""
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

    def parts(self, split: SplitName) -> Iterable[Part]:
        """The documents of a split, divided: each part becomes one shard. Each part must be read, or skipped, before
        the next one."""
        ...


def check_source(source: str, form: DataFormat = "text") -> None:
    """Raise ConfigError unless `source` is the name of a corpus or the path of a file or folder. A name wins over a
    path. Conversations are always in files."""
    path = Path(source)
    if form == "chat":
        if not path.is_dir() and not path.is_file():
            raise ConfigError(f"--data {source}: must be an existing file or folder of conversations, in JSON lines")
        source_files(path, form)
        return
    if source in NAMED_CORPORA:
        return
    if not path.is_dir() and not path.is_file():
        names = ", ".join(NAMED_CORPORA)
        raise ConfigError(f"--data {source}: must be an existing file or folder, or one of {names}")
    source_files(path)


def open_corpus(data: DataConfig, cache: Path | None = None) -> Corpus:
    """The corpus that `data.source` names. Files without a validation file are read once here, to split them.

    The plan of a large text is kept in `cache` (`text_notes.py`), by default `system.files.cache_dir`. Raises
    ConfigError where the source does not exist, UserError where a file cannot be read.
    """
    check_source(data.source, data.format)
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
    check_source(source, form)
    path = Path(source)
    if path.is_file() and (form == "chat" or source not in NAMED_CORPORA):
        return FileCorpus.whole(path, form).documents("valid")
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

    def parts(self, split: SplitName) -> Iterator[StreamPart]:
        return stream_parts(self.documents(split))

    def size(self, split: SplitName) -> int | None:
        return None
