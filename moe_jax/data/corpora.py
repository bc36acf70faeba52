"""Corpora: every source of text as an iterator of documents.

A corpus has two splits, `train` and `valid`. Documents are stripped and not empty, and are never all in memory. The
sources are the embedded stories (`synthetic/`), three public data sets (`hub.py`), and the user's own files
(`file_corpus.py`).

To add a corpus: a data set of the Hugging Face hub needs an entry in `hub.HUB`; any other source needs a class with the
methods of `Corpus` and a branch in `open_corpus`. Both need a name in `config.NAMED_CORPORA`.

Importing this module imports only the standard library, so that `check_source` can answer before jax is loaded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from moe_jax.config import NAMED_CORPORA, ConfigError, DataConfig, DataFormat
from moe_jax.data.file_corpus import FileCorpus, source_files
from moe_jax.data.hub import HUB
from moe_jax.data.text_files import SplitName


@runtime_checkable
class Documents(Protocol):
    """Two splits of documents: what a tokenizer is learned from."""

    def documents(self, split: SplitName) -> Iterator[str]:
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

    def reading(self) -> "Corpus":
        """The same corpus for one pass. Its fingerprint is that of the text that this pass has read.

        A file may be edited while it is read. Then this fingerprint differs from the one that was taken before.
        """
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


def open_corpus(data: DataConfig) -> Corpus:
    """The corpus that `data.source` names. Files without a validation file are read once here, to split them.

    Raises ConfigError where the source does not exist, UserError where a file cannot be read.
    """
    check_source(data.source, data.format)
    if data.format == "chat":
        return FileCorpus.open(data.source, data.format)
    if data.source == "stories":
        return EmbeddedCorpus(data.stories_seed, data.stories)
    return HUB[data.source] if data.source in HUB else FileCorpus.open(data.source)


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

    def reading(self) -> "EmbeddedCorpus":
        return self

    def size(self, split: SplitName) -> int | None:
        return None
