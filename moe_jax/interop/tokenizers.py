"""The tokenizer of a run in the forms that transformers and llama.cpp read.

Our three kinds are byte-level BPEs: `byte` is one without merges. Ids stay the same. One thing differs: transformers
and llama.cpp read `<|endoftext|>` inside a text as the separator, our tokenizer never does. An imported tokenizer is
written back unchanged.
"""

import itertools
import json
import re
from typing import Any

from moe_jax.config import UserError
from moe_jax.data.chat_templates import template_in
from moe_jax.data.documents import SEPARATOR
from moe_jax.data.hf_tokenizers import byte_alphabet, library_of
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.system.files import json_text

_ALPHABET = byte_alphabet()


def spelled(tokenizer: Tokenizer) -> list[str]:
    """The entry of each id in GPT-2's alphabet, the separator last."""
    entries = (tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size - 1))
    return [*("".join(_ALPHABET[byte] for byte in entry) for entry in entries), SEPARATOR]


def merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The pairs that the tokenizer merges, in GPT-2's alphabet, the first learned first."""
    definition = tokenizer.to_dict()
    words = spelled(tokenizer)
    if definition["kind"] == "byte":
        return []
    if definition["kind"] == "bpe":
        return [(words[left], words[right]) for left, right in definition["merges"]]
    ranks = {word: i for i, word in enumerate(words[:-1])}
    return [_last_pair(word, ranks) for word in words[:-1] if len(word) > 1]


def _last_pair(word: str, ranks: dict[str, int]) -> tuple[str, str]:
    """The two parts that a BPE joins last to make an entry: what merging by lower ranks leaves of it."""
    parts = list(word)
    while len(parts) > 2:
        ranked = [(ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        _, i = min(candidate for candidate in ranked if candidate[0] < ranks[word])
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def tokenizer_files(tokenizer: Tokenizer, context: int, chat: bool = False) -> dict[str, str]:
    """Name -> content of the files of a tokenizer. Those of an imported one are the files that it came with. With
    `chat`, for a model that is tuned on conversations, the settings have our chat template."""
    definition = tokenizer.to_dict()
    if definition["kind"] == "hf":
        settings, template = definition["settings"], definition.get("template", "")
        values = json.loads(settings or "{}")
        if chat and not template:
            settings = json_text(values | {"chat_template": jinja(separator_text(tokenizer))}, indent=2) + "\n"
        files = {"tokenizer.json": definition["file"], "tokenizer_config.json": settings}
        if template and template_in(values, "") != template:
            files["chat_template.jinja"] = template
        return {name: content for name, content in files.items() if content}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SEPARATOR,
        "eos_token": SEPARATOR,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    if chat:
        config["chat_template"] = jinja(SEPARATOR)
    made = {"tokenizer.json": tokenizer_json(tokenizer), "tokenizer_config.json": config}
    return {name: json_text(content, indent=2) + "\n" for name, content in made.items()}


def separator_text(tokenizer: Tokenizer) -> str:
    """The separator as other programs write it: `<|endoftext|>`, or the token of an imported tokenizer."""
    definition = tokenizer.to_dict()
    if definition["kind"] != "hf":
        return SEPARATOR
    return library_of(definition["file"]).id_to_token(tokenizer.separator_id) or ""


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json, for the library `tokenizers`. A text gets the separator before it."""
    words, separator = spelled(tokenizer), tokenizer.separator_id
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"id": separator, "content": SEPARATOR, "special": True, "normalized": False}
    token = {"SpecialToken": {"id": SEPARATOR, "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special | {"single_word": False, "lstrip": False, "rstrip": False}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [token, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [token, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {SEPARATOR: {"id": SEPARATOR, "ids": [separator], "tokens": [SEPARATOR]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {word: i for i, word in enumerate(words)},
            "merges": [f"{left} {right}" for left, right in merges(tokenizer)],
        },
    }


# The role format of tuned runs (`data/chats.py`) as templates of other programs
#
# A turn is its role, a line end, its content and the separator. In transformers and llama.cpp a template gives a text,
# and the text is cut into tokens after that. There the characters of the separator (`<|endoftext|>`) inside a content
# would be read as the separator. So the template puts a space before the last two of them, and no content can end its
# turn or begin another.


def jinja(separator: str) -> str:
    """For `tokenizer_config.json`, and for `tokenizer.chat_template` in GGUF. Raises UserError for a separator that is
    not written as `<word>`: the turns, or a content with a space in it, could contain it."""
    if not re.fullmatch(r"<[^<>\s]+>", separator):
        raise UserError(f"the token {separator!r} ends texts, and a chat template cannot tell it from a turn")
    harmless = separator[:-2] + " " + separator[-2:]
    return (
        f"{{{{ {separator!r} }}}}{{% for message in messages %}}"
        "{{ message['role'] + '\\n' + "
        f"(message['content'] | trim | replace({separator!r}, {harmless!r})) + {separator!r} }}}}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
    )


def modelfile(tokenizer: Tokenizer, chat: bool) -> str:
    """The file of `ollama create NAME -f Modelfile`. The model goes on with the prompt; with `chat`, or with a template
    in model.gguf, it answers. ollama replaces nothing in a content: one with the separator in it ends its turn there.
    """
    file = "FROM ./model.gguf\n"
    if tokenizer.template is not None:
        return file
    if not chat:
        return file + 'TEMPLATE "{{ .Prompt }}"\n'
    separator = separator_text(tokenizer)
    turns = f"{{{{ range .Messages }}}}{{{{ .Role }}}}\n{{{{ .Content }}}}{separator}{{{{ end }}}}assistant\n"
    return f'{file}TEMPLATE """{turns}"""\nPARAMETER stop "{separator}"\n'
