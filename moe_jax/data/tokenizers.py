"""Text to token ids and back: GPT-2's vocabulary, a byte-level BPE trained on the corpus, plain bytes, or the tokenizer
of a Hugging Face folder.

The first three are lossless: every entry of the vocabulary is a string of bytes. The entries of the ids of a text,
joined, are the UTF-8 bytes of the text. One more id, the separator, stands between documents. The separator has no
text: encoding never produces it (the characters `<|endoftext|>` inside a document are ordinary text), and `token_bytes`
counts it as 0 bytes. Decoding shows it as `<|endoftext|>`, so that samples can be split into documents.

A tokenizer is made from its definition, which is saved as JSON with its digest. That of `bpe` holds a list of merges.
Ids 0 to 255 are the bytes; merge (a, b) appends an entry, the bytes of entry a followed by the bytes of entry b. That
of `gpt2` holds no vocabulary, since tiktoken has it. That of `hf` holds the text of the folder's tokenizer.json,
unchanged: `hf_tokenizers.py` says how it is read, and what is not lossless in it.
"""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from moe_jax.config import DataConfig, UserError
from moe_jax.data import hf_tokenizers
from moe_jax.data.chat_templates import ChatTemplate, template_in
from moe_jax.data.documents import SEPARATOR
from moe_jax.system.files import json_text, read_json, write_atomically
from moe_jax.system.terminal import Report, document_progress

TRAINING_BYTES = 50_000_000
_LONGEST_WORD = 512
"""Bytes of a word that a `bpe` tokenizer learns from. Words of ordinary text are far shorter."""


type Encoder = Callable[[list[str]], list[Any]]


class Stream(NamedTuple):
    """Tokens, and which of them are learned and scored."""

    tokens: np.ndarray
    """int [N]. In a store uint16 or uint32."""
    answers: np.ndarray | None = None
    """bool [N]: the tokens that count. None if all of them do."""


class Tokenizer:
    """A vocabulary with its encoder. Made by `train_tokenizer`, `load_tokenizer` or `imported_tokenizer`."""

    kind: str
    """`gpt2`, `bpe`, `byte` or `hf`."""
    vocab_size: int
    """V, the separator included. A small corpus can give a `bpe` fewer entries than were asked for."""
    separator_id: int
    """The last id, V - 1. The id of an `hf` tokenizer lies anywhere."""
    digest: str
    """xxh3-128 of the tokenizer's definition. Equal digests mean equal ids for every text."""
    encode_batch: Encoder
    """The ids of each text. Each item is a list or an integer array."""
    template: ChatTemplate | None = None
    """How an imported model was taught conversations. Without it they have the form of `chats.py`."""

    def __init__(self, definition: dict[str, Any]) -> None:
        """Raises ValueError, LookupError or TypeError for what is no definition, and UserError if GPT-2's vocabulary
        cannot be downloaded, or a tokenizer of a folder is of a kind that is not known here."""
        match definition["kind"]:
            case "byte":
                entries, self.encode_batch = [bytes([i]) for i in range(256)], _encode_bytes
            case "gpt2":
                entries, self.encode_batch = _gpt2()
            case "bpe":
                entries, self.encode_batch = _bpe(definition["merges"])
            case "hf":
                entries, self.encode_batch = hf_tokenizers.vocabulary(definition["file"], definition["separator"])
            case kind:
                raise ValueError(f"unknown kind {kind!r}")
        self.kind, self.digest = definition["kind"], json_digest(definition)
        self._definition = definition
        self.separator_id = definition.get("separator", len(entries))
        self._entries = [*entries[: self.separator_id], SEPARATOR.encode(), *entries[self.separator_id + 1 :]]
        self.vocab_size = len(self._entries)
        if "template" in definition:
            file, settings = definition["file"], definition["settings"]
            self.template = ChatTemplate(definition["template"], file, settings, self.separator_id)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without a separator. Raises UserError if the text cannot be encoded in UTF-8."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text is not UTF-8 at character {error.start}; give it in UTF-8") from None
        return list(map(int, self.encode_batch([text])[0]))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids, joined. A separator gives `<|endoftext|>`. Raises UserError for an unknown id."""
        return b"".join([self._entry(int(i)) for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids. Bytes that are not UTF-8, such as a part of a character, become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def _entry(self, i: int) -> bytes:
        if not 0 <= i < self.vocab_size:
            raise UserError(f"token id {i} is outside the vocabulary of {self.vocab_size}; use the run's own tokenizer")
        return self._entries[i]

    def token_bytes(self) -> np.ndarray:
        """int32 [V]: bytes of text that each id stands for, 0 for the separator."""
        sizes = np.array([*map(len, self._entries)], dtype=np.int32)
        sizes[self.separator_id] = 0
        return sizes

    def to_dict(self) -> dict[str, Any]:
        """The definition and its digest, ready for JSON."""
        return {**self._definition, "digest": self.digest}

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as JSON. The file is whole or absent, never half written."""
        write_atomically(Path(path), json_text(self.to_dict()))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer that `save` wrote. Raises UserError if the file is missing or damaged."""
    try:
        definition = dict(read_json(Path(path)))
        if definition.pop("digest", None) != json_digest(definition):
            raise UserError("tokenizer: its digest does not match, so it is damaged; take the file from the run again")
        return Tokenizer(definition)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); fix that, or give the folder of a run") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{path}: not a tokenizer of a known kind; take the file from the run again") from None


def train_tokenizer(data: DataConfig, documents: Iterable[str] = (), progress: bool = False) -> Tokenizer:
    """The tokenizer that `data` asks for.

    A `bpe` tokenizer is trained on the first 50 MB of the documents. Equal documents give an equal tokenizer.

    Raises UserError if GPT-2's vocabulary cannot be downloaded, and for `hf`, which is not trained.
    """
    if data.tokenizer == "hf":
        raise UserError("--tokenizer hf: it comes with the folder of a model, and cannot be made from a text")
    if data.tokenizer == "gpt2":
        return Tokenizer({"kind": "gpt2", "vocab_size": 50_257})
    if data.tokenizer == "byte":
        return Tokenizer({"kind": "byte"})
    with document_progress(f"learning a tokenizer of {data.vocab_size:,} entries", progress) as report:
        return Tokenizer({"kind": "bpe", "merges": _learn_merges(_limited(documents, report), data.vocab_size)})


class StreamDecoder:
    """Decodes ids that arrive one at a time. A character is returned once all its bytes have arrived."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The characters that this id completes: none, one or several."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    @property
    def incomplete(self) -> bool:
        """Whether the last character waits for more bytes."""
        return bool(self._decoder.getstate()[0])

    def finish(self) -> str:
        """The rest of the text, to be called at the end: U+FFFD if the last character is incomplete, else ""."""
        return self._decoder.decode(b"", final=True)


def token_pieces(tokenizer: Tokenizer, tokens: np.ndarray) -> list[str]:
    """The text of each token by itself. If its bytes are not whole characters, the bytes in hexadecimal, as <F0 9F>."""

    def piece(token: int) -> str:
        raw = tokenizer.decode_bytes([token])
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return f"<{raw.hex(' ').upper()}>"

    return [piece(int(t)) for t in tokens]


def imported_tokenizer(file: str, settings: str, separator_id: int | None, template: str = "") -> Tokenizer:
    """The tokenizer of a Hugging Face folder, from the texts of its tokenizer.json, tokenizer_config.json (perhaps
    empty) and chat_template.jinja.

    `separator_id` is the token that ends a text. Without it, and without a template, tokenizer_config.json may name
    them. Raises UserError if the tokenizer is of a kind that is not known here.
    """
    with hf_tokenizers.one_line("tokenizer_config.json: cannot be read"):
        values = dict(json.loads(settings or "{}"))
    if separator_id is None:
        separator_id = hf_tokenizers.end_of_text(file, values)
    definition = {"kind": "hf", "file": file, "settings": settings, "separator": separator_id}
    if found := template_in(values, template):
        definition["template"] = found
    tokenizer = Tokenizer(definition)
    hf_tokenizers.check_lossless(file, tokenizer.encode, tokenizer.decode)
    return tokenizer


def json_digest(values: Any) -> str:
    """xxh3-128 of a value's JSON, whatever the order of its keys."""
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


def _encode_bytes(texts: list[str]) -> list[np.ndarray]:
    return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]


def _gpt2() -> tuple[list[bytes], Encoder]:
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError as error:  # also every network error of requests
        raise UserError(
            f"the GPT-2 vocabulary cannot be downloaded ({type(error).__name__}); "
            "set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer bpe"
        ) from None
    entries = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    return entries, encoding.encode_ordinary_batch


# Byte-level BPE: trained by `tokenizers`, applied by tiktoken, which is three times as fast. Chapter 20 of `foundation`
# does both from scratch.

# The rule by which text is cut into words: GPT-2's, which the trainer uses too. A BPE entry never spans two words. The
# quantifiers are possessive, so that a megabyte of spaces is matched without backtracking.
_WORD = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def _learn_merges(texts: Iterable[str], vocab_size: int) -> list[list[int]]:
    """The pairs of ids to merge, most frequent first, for at most `vocab_size` entries with the separator."""
    import tokenizers

    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    # Learning takes time quadratic in the length of a word. So a longer word, such as a genome, counts as several.
    pieces = tokenizers.Regex(f".{{{_LONGEST_WORD}}}")
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
            tokenizers.pre_tokenizers.Split(pieces, behavior="isolated"),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=256,
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    ids = {character: byte for byte, character in hf_tokenizers.byte_alphabet().items()}
    merges = []
    for left, right in json.loads(library.to_str())["model"]["merges"]:
        if left + right not in ids:  # two different pairs can join to the same entry
            merges.append([ids[left], ids[right]])
            ids[left + right] = len(ids)
    return merges


def _bpe(merges: list[list[int]]) -> tuple[list[bytes], Encoder]:
    """The entries and the encoder of a list of merges."""
    import tiktoken

    entries = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        entries.append(entries[left] + entries[right])
    ids = {entry: i for i, entry in enumerate(entries)}
    encoding = tiktoken.Encoding("bpe", pat_str=_WORD, mergeable_ranks=ids, special_tokens={})
    return entries, encoding.encode_ordinary_batch


def _limited(documents: Iterable[str], report: Report) -> Iterator[str]:
    """The first documents, until they have at least TRAINING_BYTES bytes together."""
    size = 0
    for count, document in enumerate(documents, 1):
        yield document
        size += len(document.encode())
        report(count, size)
        if size >= TRAINING_BYTES:
            return
