r"""Conversations in tokens. Every turn is its role, a line end, its content, and the separator:

    separator   user\n  question  separator   assistant\n  answer  separator   separator   user\\n ...

The separator before a turn says that the next word is a role, and the separator behind it ends the turn. A conversation
has one more separator behind it, as every document has. Encoding never produces the separator, so no content can end
its turn or begin another: the characters `<|endoftext|>` and the word "assistant" inside a content are ordinary text.
Only the tokens of the assistant's contents, and the separators that end them, are learned and scored (`answers`). An
imported model has a chat template instead (`chat_templates.py`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.config import Role, UserError
from moe_jax.data.documents import ANSWERING, ROLES, Conversation, Message
from moe_jax.data.tokenizers import Stream, Tokenizer


def encode_chats(tokenizer: Tokenizer, chats: Sequence[Conversation]) -> list[Stream]:
    """The conversations in tokens, without the separators around them. A turn is cut into tokens as one text, as a
    chat template writes it elsewhere.

    Raises UserError if the tokenizer joins the line end after a role with the content behind it, and the errors of a
    chat template.
    """
    if (template := tokenizer.template) is not None:
        encoded = map(template.encode, chats)
        return [Stream(np.array(tokens, np.int64), np.array(learned)) for tokens, learned in encoded]
    turns = iter(tokenizer.encode_batch([f"{message.role}\n{message.content}" for chat in chats for message in chat]))
    heads: dict[Role, list[int]] = {role: tokenizer.encode(f"{role}\n") for role in ROLES}
    return [_joined(tokenizer, heads, [(message, next(turns)) for message in chat]) for chat in chats]


def _joined(tokenizer: Tokenizer, heads: dict[Role, list[int]], turns: list[tuple[Message, Any]]) -> Stream:
    """One conversation, from its turns and their ids."""
    tokens, answers = [], []
    for message, ids in turns:
        head, turn = heads[message.role], np.array([*ids, tokenizer.separator_id], np.int64)
        if turn[: len(head)].tolist() != head:
            raise UserError(
                f"the tokenizer joins the line end after {message.role!r} with the text {message.content[:40]!r}, so "
                "the answer has no beginning of its own; change how that text begins"
            )
        tokens.append(turn)
        answers.append(np.repeat([False, message.role == ANSWERING], [len(head), len(turn) - len(head)]))
    return Stream(np.concatenate(tokens), np.concatenate(answers))


def answer_prompt(tokenizer: Tokenizer, chat: Sequence[Message]) -> list[int]:
    """The tokens after which the model writes the assistant's next content: separator, all turns, "assistant\\n"; or
    what the chat template says."""
    if tokenizer.template is not None:
        return tokenizer.template.prompt(chat)
    said = encode_chats(tokenizer, [tuple(chat)])[0].tokens.tolist() if chat else []
    return [tokenizer.separator_id, *said, *tokenizer.encode(f"{ANSWERING}\n")]
