"""A token store that is being made: shards that are finished, and those that are still missing.

    DRAFT/train.00003.bin, .mask    the tokens of a shard, and the mask of conversations
    DRAFT/train.00003.json          its entry in the index, written last: the shard is finished

Every file is written under another name and renamed once it is on the disk. A build that is killed leaves its finished
shards, and the next build goes on from them. A shard is a function of its part of the text and of the tokenizer. So it
does no harm if a process of the killed build is still finishing a shard: it writes the same bytes.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from moe_jax.config import UserError
from moe_jax.data.corpora import Part
from moe_jax.data.shards import digest_of, shard_name
from moe_jax.data.streams import encoded
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.system.files import write_atomically
from moe_jax.system.folders import draft_of
from moe_jax.system.json_text import json_text

type Added = Callable[[int, int], None]
"""Called with the documents and the bytes that were added."""
type Entry = dict[str, Any]
"""What an index says of a shard or a split: `tokens`, `stories`, `bytes`, `digest`, and `answers` of conversations."""


@dataclass(frozen=True)
class Draft:
    """The folder of a store that is being made."""

    folder: Path

    def finished(self, split: str, number: int, key: str) -> Entry | None:
        """The entry of a shard, if it was made of the part with this key. Its bytes are not looked at."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            entry = json.loads((self.folder / shard_name(split, number, "json")).read_bytes())
            return entry if entry["part"] == key else None
        return None

    def finish(self, split: str, number: int, entry: Entry) -> None:
        """Record that a shard is finished."""
        write_atomically(self.folder / shard_name(split, number, "json"), json_text(entry))

    def write(self, split: str, number: int, part: Part, tokenizer: Tokenizer, added: Added) -> Entry:
        """Make a shard. Returns its entry. Raises the errors of `Part.documents`, and OSError."""
        entry: Entry = {"tokens": 0, "stories": 0, "bytes": 0}
        answers = {"tokens": 0, "bytes": 0}
        lengths, mask = tokenizer.token_bytes(), None
        with ExitStack() as files:
            stream = files.enter_context(self._file(split, number, "bin"))
            for piece in encoded(part.documents(), tokenizer, first=number == 0):
                stream.write(piece.tokens)
                entry["tokens"] += len(piece.tokens)
                entry["stories"] += piece.documents
                entry["bytes"] += piece.bytes
                if piece.answers is not None:
                    mask = mask or files.enter_context(self._file(split, number, "mask"))
                    mask.write(piece.answers)
                    answers["tokens"] += int(piece.answers.sum())
                    answers["bytes"] += int(lengths[piece.tokens[piece.answers]].sum(dtype=np.int64))
                added(piece.documents, piece.bytes)
        entry["digest"] = stream.digest.hexdigest()
        if mask is not None:
            entry["answers"] = {**answers, "digest": mask.digest.hexdigest()}
        entry["part"] = part.key
        self.finish(split, number, entry)
        return entry

    @contextmanager
    def _file(self, split: str, number: int, ending: str) -> Iterator["_Written"]:
        path = self.folder / shard_name(split, number, ending)
        draft = draft_of(path)
        try:
            with draft.open("wb") as file:
                yield (written := _Written(file))
                written.finish()
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    @property
    def holds_shards(self) -> bool:
        """Whether a later build can go on from here."""
        return any(self._entries())

    def remove_entries(self) -> None:
        """The index has them now."""
        for path in self._entries():
            path.unlink()

    def _entries(self) -> Iterator[Path]:
        return self.folder.glob("*.[0-9]*.json")

    def clean(self) -> None:
        """Remove what killed builds have left half written."""
        for leftover in self.folder.glob("*.draft"):  # of all files, the index and the entries of shards among them
            leftover.unlink(missing_ok=True)

    def split_entry(self, split: str, parts: Iterable[Part], make: Callable[[int, Part], Entry], added: Added) -> Entry:
        """Make the shards of a split that are missing, in order. Returns the entry of the split. `added` is called for
        the shards that were there.

        Each shard is read once and verified. The digest of the split is that of one file with all its tokens, so it
        does not depend on how the split is divided. The only shard of a split loses its number and its list.

        Raises UserError if a shard does not read back as it was written.
        """
        entries, sums = [], {"bin": xxhash.xxh3_128(), "mask": xxhash.xxh3_128()}
        for number, part in enumerate(parts):
            entry = self.finished(split, number, part.key)
            after = entry and self._added(split, number, entry, sums)
            if entry and after:
                part.skip()
                added(entry["stories"], entry["bytes"])
            else:
                entry = make(number, part)
                after = self._added(split, number, entry, sums)
            if not after:
                name = self.folder / shard_name(split, number, "bin")
                raise UserError(f"{name}: does not read back as it was written; check the disk")
            entries.append(entry)
            sums = after
        whole: Entry = {key: sum(entry[key] for entry in entries) for key in ("tokens", "stories", "bytes")}
        whole["digest"] = sums["bin"].hexdigest()
        if "answers" in entries[0]:
            answers = [entry["answers"] for entry in entries]
            counts = {key: sum(one[key] for one in answers) for key in ("tokens", "bytes")}
            whole["answers"] = {**counts, "digest": sums["mask"].hexdigest()}
        if len(entries) > 1:
            return {**whole, "shards": entries}
        for ending in ("bin", "mask") if "answers" in whole else ("bin",):
            (self.folder / shard_name(split, 0, ending)).replace(self.folder / f"{split}.{ending}")
        return whole

    def _added(self, split: str, number: int, entry: Entry, sums: dict[str, Any]) -> dict[str, Any] | None:
        """The digests of all shards up to this one. None if the bytes of this one are not those of its entry."""
        sums = {ending: digest.copy() for ending, digest in sums.items()}
        for ending, expected in (("bin", entry), ("mask", entry.get("answers"))):
            if expected is not None:
                try:
                    found = digest_of(self.folder / shard_name(split, number, ending), also=sums[ending])
                except FileNotFoundError:
                    return None
                if found != expected["digest"]:
                    return None
        return sums


class _Written:
    """A file that is written and digested at once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, xxhash.xxh3_128()

    def write(self, array: np.ndarray) -> None:
        self._file.write(array.data)
        self.digest.update(array.data)

    def finish(self) -> None:
        """Bring the file to the disk."""
        to_disk(self._file)


def to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
