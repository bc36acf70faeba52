"""tokenizer.json files of the forms that public models have, trained on a small text by the library `tokenizers`."""

import json
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

END = "<|endoftext|>"
TEXT = ["Once upon a time a dragon met a cat. They'll eat 12 cakes, naïve ones; 日本 😀 don't.\n\n  Twice!"] * 20
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = ("gpt2", "smollm", "qwen", "llama3", "olmo")
KINDS = (*BYTE_LEVEL, "llama2", "metaspace")


def made(kind: str, entries: int = 400) -> str:
    """The text of a tokenizer.json."""
    library = tokenizers.Tokenizer(models.BPE(byte_fallback=kind not in BYTE_LEVEL, unk_token=None))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = r"\p{N}{1,3}" if kind == "llama3" else r"\p{N}"
    cut = pre_tokenizers.Split(Regex(QWEN2.replace(r"|\p{N}|", f"|{digits}|")), "isolated")
    without_rule = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special, initial = [END, "<|im_start|>"], pre_tokenizers.ByteLevel.alphabet()
    if kind in ("gpt2", "olmo"):
        library.pre_tokenizer = plain
    elif kind == "smollm":
        library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    elif kind in ("qwen", "llama3"):
        library.pre_tokenizer = pre_tokenizers.Sequence([cut, without_rule])
    elif kind == "metaspace":
        library.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
    if kind == "qwen":
        library.normalizer = normalizers.NFC()
    if kind == "llama2":
        library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    if kind not in BYTE_LEVEL:
        library.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
        special, initial = [*special, *(f"<0x{byte:02X}>" for byte in range(256))], []
    else:
        library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries + 256 * (kind not in BYTE_LEVEL),
        special_tokens=special,
        initial_alphabet=initial,
        show_progress=False,
    )
    library.train_from_iterator(TEXT, trainer)
    if kind == "olmo":
        library.add_tokens([AddedToken("    ", normalized=False)])
    values = json.loads(library.to_str())
    if kind not in BYTE_LEVEL:  # bytes are ordinary entries in Llama's file
        values["added_tokens"] = [t for t in values["added_tokens"] if not t["content"].startswith("<0x")]
    return json.dumps(values, ensure_ascii=False, indent=1)


def end_of(file: str) -> int:
    """The id of END."""
    values: dict[str, Any] = json.loads(file)
    return values["model"]["vocab"][END]
