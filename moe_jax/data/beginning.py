"""A first look at the user's text, before jax is imported: what is surely wrong with it is said in the first second.

The first 8 MiB are read. What is wrong further on is found when the text is prepared. Importing this module imports
only the standard library.
"""

import codecs
from pathlib import Path

from moe_jax.config import NAMED_CORPORA, ConfigError, DataConfig, UserError
from moe_jax.data.chat_rows import conversations
from moe_jax.data.file_corpus import source_files
from moe_jax.data.json_lines import holds_json_lines, json_documents
from moe_jax.data.text_files import BYTE_ORDER_MARK, SEPARATOR, Span, not_utf8

LOOKED_AT = 8 << 20
"""Bytes, of all files together."""


def check_beginning(data: DataConfig, seq_len: int) -> None:
    """Raise ConfigError if the text at `data.source` is empty, too short for one context of `seq_len` tokens, not
    UTF-8, or has a row that cannot be read, as far as the first 8 MiB show. A corpus with a name is not looked at."""
    if data.source in NAMED_CORPORA and data.format == "text":
        return
    files, left = source_files(Path(data.source), data.format), LOOKED_AT
    for split, paths in files.items():
        size = sum(path.stat().st_size for path in paths)
        blank = bool(paths)
        for path in paths:
            blank &= _check_file(path, left, data)
            left = max(0, left - path.stat().st_size)
        if blank and size <= LOOKED_AT:
            where = paths[0] if len(paths) == 1 else data.source
            raise ConfigError(f"--data {where}: there is no text in it; give a longer one")
        # Every token takes at least one byte of the file. The first and the last separator need not be in the file.
        if split == "train" and size + 2 < seq_len + 1 and data.tokenizer != "hf":
            raise ConfigError(
                f"--data {data.source}: {size} bytes to train on, and a context of --seq-len {seq_len} needs "
                f"{seq_len + 1} tokens; give a longer text or a smaller --seq-len"
            )


def _check_file(path: Path, most: int, data: DataConfig) -> bool:
    """Whether a file is blank; False if it has more than `most` bytes. Raises ConfigError for what is wrong in the
    first `most` bytes."""
    try:
        with path.open("rb") as file:
            start = file.read(most)
    except OSError as error:
        raise ConfigError(f"--data {path}: cannot be read ({error.strerror}); check its permissions") from None
    all_of_it = len(start) == path.stat().st_size
    if not holds_json_lines(path):
        try:
            codecs.getincrementaldecoder("utf-8")().decode(start)  # the last character may be cut
        except UnicodeDecodeError as error:
            raise ConfigError(f"--data {not_utf8(path, error.start, error.reason)}") from None
        return all_of_it and not start.removeprefix(BYTE_ORDER_MARK).replace(SEPARATOR.encode(), b"").strip()
    whole = start if all_of_it else start[: start.rfind(b"\n") + 1]
    span = Span.of(path)
    read = conversations if data.format == "chat" else json_documents
    try:
        return not sum(1 for _ in read(span, [whole[span.start :]])) and all_of_it
    except UserError as error:
        raise ConfigError(f"--data {error}") from None
