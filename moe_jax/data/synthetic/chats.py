"""Made conversations about the embedded stories: questions whose exact answers are in the text that is asked about.

A user gives the first sentence of a story and asks about it, and then asks once more. So a score can be exact: an
answer is right or wrong.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from moe_jax.data.synthetic.stories import generate
from moe_jax.system.files import json_text

type Split = Literal["train", "valid"]

_OPENING = re.compile(
    r"(?P<article>an?) (?P<trait>\w+) (?P<child>\w+) named (?P<name>\w+) \w+ on (?P<his>\w+) (?P<pattern>\w+) "
    r"(?P<clothes>\w+) and \w+ to the (?P<place>\w+)\."
)


def chats(seed: int, split: Split, count: int) -> Iterator[dict[str, Any]]:
    """Rows with `messages`, one a story. Each has two of three questions, in turn."""
    for number, story in enumerate(generate(seed, split, count)):
        opening = _OPENING.search(story)
        assert opening is not None, "the grammar has another opening now"
        name, his = opening["name"], opening["his"].capitalize()
        questions = [
            (f"Where did {name} go?", f"To the {opening['place']}."),
            (f"What did {name} put on?", f"{his} {opening['pattern']} {opening['clothes']}."),
            ("Who is it about?", f"{name}, {opening['article']} {opening['trait']} {opening['child']}."),
        ]
        turns = [questions[number % 3], questions[(number + 1) % 3]]
        turns[0] = (f"{story[: opening.end()]} {turns[0][0]}", turns[0][1])
        roles = ("user", "assistant")
        yield {"messages": [{"role": r, "content": c} for turn in turns for r, c in zip(roles, turn, strict=True)]}


def write_chats(path: str | Path, count: int = 4000, seed: int = 0, split: Split = "train") -> int:
    """Write `count` conversations into a file of JSON lines. Returns their number."""
    rows = [json_text(row) for row in chats(seed, split, count)]
    Path(path).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return len(rows)
