"""Kept plans: what a text of many gigabytes is, without reading it again.

    CACHE/texts/KEY.json      the plan of a text (`text_plan.py`), and which part of it validates

KEY is a digest of the path, size, inode and times of each file. While these are the same, the text is taken to be the
same. So a run on a prepared text of 3 GB starts without reading 3 GB. Only texts of more than one part are kept: a
smaller text is read at every start.

A file can be written twice within one tick of the file system's clock, and its times then do not change. So the plan of
a text is kept only if its files were at least two seconds old when their times were taken.

Importing this module imports only the standard library.
"""

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.config import DataFormat, UserError
from moe_jax.data import text_plan
from moe_jax.data.text_files import Span, SplitName
from moe_jax.data.text_plan import Spans, TextPart, TextPlan, changed, new_digest
from moe_jax.system.files import write_atomically
from moe_jax.system.json_text import json_text

_FORMAT = 1
_CLOCK_SECONDS = 2.0
"""Times of files are exact to this. FAT has the coarsest clock."""


@dataclass(frozen=True)
class Files:
    """The files of a text, and what the file system says of them."""

    source: str
    """The value of `--data`."""
    form: DataFormat
    paths: tuple[Path, ...]
    signature: tuple[Any, ...]
    """Split, path, size, device, inode and times of each file."""
    taken: float
    """When the signature was taken, in seconds since 1970."""

    @classmethod
    def of(cls, source: str, splits: dict[SplitName, list[Path]], form: DataFormat) -> "Files":
        """Raises UserError if a file cannot be looked at."""
        taken, paths, found = time.time(), [], []
        for split, files in splits.items():
            for path in files:
                try:
                    s = path.stat()
                except OSError as error:
                    raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
                paths.append(path)
                found.append(
                    (split, os.path.abspath(path), s.st_size, s.st_dev, s.st_ino, s.st_mtime_ns, s.st_ctime_ns)
                )
        return cls(source, form, tuple(paths), tuple(found), taken)

    @property
    def note(self) -> str:
        """The name of the kept plan."""
        described = json_text([_FORMAT, text_plan.PART_BYTES, self.form, self.signature])
        return f"{new_digest(described.encode()).hexdigest()}.json"

    @property
    def settled(self) -> bool:
        """Whether an edit from now on gives other times."""
        newest = max(max(mtime, ctime) for *_, mtime, ctime in self.signature)
        return newest / 1e9 < self.taken - _CLOCK_SECONDS

    def check_unchanged(self) -> None:
        """Raise UserError if a file has been changed since."""
        splits: dict[SplitName, list[Path]] = {}
        for path, (split, *_) in zip(self.paths, self.signature, strict=True):
            splits.setdefault(split, []).append(path)
        if Files.of(self.source, splits, self.form).signature != self.signature:
            raise changed(self.source)


type Splits = dict[SplitName, Spans]


def read_note(folder: Path, files: Files) -> tuple[Splits, TextPlan] | None:
    """The spans of both splits, and the plan. None if none is kept, or if it is damaged."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        saved = json.loads((folder / files.note).read_bytes())
        note = saved["note"]
        if saved["digest"] != new_digest(json_text(note).encode()).hexdigest():
            return None

        def spans(values: list[Any]) -> Spans:
            return tuple(Span(files.paths[number], start, stop) for number, start, stop in values)

        parts = {
            split: tuple(TextPart(files.source, files.form, spans(inner), key) for inner, key in values)
            for split, values in note["parts"].items()
        }
        return {split: spans(v) for split, v in note["spans"].items()}, TextPlan(note["fingerprint"], parts)
    return None


def write_note(folder: Path, files: Files, splits: Splits, plan: TextPlan) -> None:
    """Keep a plan of more than one part. A cache that cannot be written is no error: then the text is read again."""
    if not files.settled or all(len(parts) == 1 for parts in plan.parts.values()):
        return
    numbers = {path: number for number, path in enumerate(files.paths)}

    def values(spans: Spans) -> list[Any]:
        return [(numbers[span.path], span.start, span.stop) for span in spans]

    note = {
        "fingerprint": plan.fingerprint,
        "spans": {split: values(spans) for split, spans in splits.items()},
        "parts": {split: [(values(part.spans), part.key) for part in parts] for split, parts in plan.parts.items()},
    }
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        digest = new_digest(json_text(note).encode()).hexdigest()
        write_atomically(folder / files.note, json_text({"digest": digest, "note": note}))
