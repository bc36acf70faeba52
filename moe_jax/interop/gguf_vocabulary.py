"""The vocabulary of a tokenizer as GGUF holds it: words, their kinds, merges, and the rule that cuts text into words.

llama.cpp does not read a rule. It has its own code for the rules of known models, by name. So an imported tokenizer is
written only if its rule is one of those in `RULES`.
"""

from typing import Any, NamedTuple

from moe_jax.config import UserError
from moe_jax.data.hf_tokenizers import parse
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.interop.tokenizers import merges, spelled

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Kinds of tokens in GGUF. A user-defined token is found in a text before the text is cut."""
_GPT2 = {"type": "ByteLevel", "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _split(pattern: str) -> list[dict[str, Any]]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [cut, {"type": "ByteLevel", "use_regex": False}]


RULES: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_GPT2],
    "smollm": [_DIGITS, _GPT2],
    "qwen2": _split(_QWEN2),
    "llama-bpe": _split(_LLAMA3),
}
"""llama.cpp's name of a rule -> the parts of the pre-tokenizer that cut a text so."""


class GgufVocabulary(NamedTuple):
    """All that llama.cpp asks of a tokenizer."""

    words: list[str]
    """The word of each id."""
    kinds: list[int]
    merges: list[str]
    rule: str


def gguf_vocabulary(tokenizer: Tokenizer, size: int) -> GgufVocabulary:
    """The vocabulary of a model that knows `size` ids. Raises UserError if llama.cpp has no name for the rule."""
    if tokenizer.kind == "hf":
        return _imported(tokenizer.to_dict()["file"], size)
    words = spelled(tokenizer)
    kinds = [NORMAL] * (len(words) - 1) + [CONTROL]
    return _padded(dict(enumerate(words)), dict(enumerate(kinds)), merges(tokenizer), size, "gpt-2")


def _imported(file: str, size: int) -> GgufVocabulary:
    values = parse(file)
    words = {i: word for word, i in values["model"]["vocab"].items()}
    kinds = dict.fromkeys(words, NORMAL)
    for token in values.get("added_tokens") or []:
        words[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    pairs = values["model"].get("merges") or []
    joined = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in pairs]
    return _padded(words, kinds, joined, size, _rule(values.get("pre_tokenizer")))


def _rule(cut: Any) -> str:
    parts = cut.get("pretokenizers", []) if isinstance(cut, dict) and cut.get("type") == "Sequence" else [cut]
    compared = [
        {k: v for k, v in part.items() if k not in ("trim_offsets", "add_prefix_space")}
        for part in parts or []
        if isinstance(part, dict)
    ]
    # A file of an old version leaves `use_regex` out, which is true then.
    compared = [{"use_regex": True} | part if part.get("type") == "ByteLevel" else part for part in compared]
    for rule, known in RULES.items():
        if compared == known:
            return rule
    raise UserError(
        "--to gguf: llama.cpp has no name for the rule by which the imported tokenizer cuts text into words; known are "
        f"those of {', '.join(RULES)}; export to hf"
    )


def _padded(words: dict[int, str], kinds: dict[int, int], pairs: list[Any], size: int, rule: str) -> GgufVocabulary:
    """With a word for each id that the model knows and the tokenizer does not use."""
    all_words = [words.get(i, f"<|unused_{i}|>") for i in range(size)]
    return GgufVocabulary(
        all_words,
        [kinds.get(i, CONTROL) for i in range(size)],
        [f"{left} {right}" for left, right in pairs] or [NO_MERGE],
        rule,
    )


NO_MERGE = "\u0200 \u0200"
"""llama.cpp refuses a vocabulary without merges. These characters spell no byte, so this merge never happens."""
