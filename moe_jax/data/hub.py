"""Public data sets of the Hugging Face hub, at pinned revisions. They are streamed. Only their token ids are stored."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moe_jax.config import UserError
from moe_jax.data.documents import SplitName, divided


@dataclass(frozen=True)
class HubCorpus:
    """A data set of the hub as a `corpora.Corpus`."""

    name: str
    repository: str
    configuration: str | None
    revision: str

    def documents(self, split: SplitName) -> Iterator[str]:
        rows = self._rows("train" if split == "train" else "validation")
        texts = articles(rows) if self.name == "wikitext" else rows
        return (document for text in texts for document in divided(text))

    def _rows(self, split: str) -> Iterator[str]:
        import datasets
        import huggingface_hub

        huggingface_hub.logging.set_verbosity_error()  # it warns at each retry; the UserError below is enough
        try:
            rows = datasets.load_dataset(
                self.repository, self.configuration, split=split, revision=self.revision, streaming=True
            )
            for row in rows:
                yield row["text"]
        except Exception as error:  # of the network, of its client, of the hub, or of `datasets`
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


HUB = {
    corpus.name: corpus
    for corpus in (
        HubCorpus("tinystories", "roneneldan/TinyStories", None, "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"),
        HubCorpus(
            "wikitext",
            "Salesforce/wikitext",
            "wikitext-103-raw-v1",
            "b08601e04326c79dfdd32d625aee71d232d685c3",
        ),
        # deepmind/pg19 is a loading script, which datasets no longer runs. This is the same text as Parquet.
        HubCorpus("pg19", "emozilla/pg19", None, "c021754c8e01c5b1cc83a1f549c1f97fbbb756b8"),
    )
}
"""Name for `--data` -> corpus."""


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
