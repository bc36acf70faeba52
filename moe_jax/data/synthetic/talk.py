"""Made conversations: questions about a story, whose answers stand in it, and the talk around them.

`chats` asks only what the first sentence of a story answers, so a score is exact. `talks` is what the shipped model
`nano-chat` has learned: it greets, tells a story, answers about a story, and says what the story does not say, and what
it does not know. That is everything else.
"""

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.data.synthetic import stories
from moe_jax.data.synthetic.grammar import Grammar
from moe_jax.data.synthetic.stories import Split
from moe_jax.system.files import json_text

type Turn = tuple[str, str]
"""A question and its answer."""

_OPENING = re.compile(
    r"(?P<article>an?) (?P<trait>\w+) (?P<child>\w+) named (?P<name>\w+) \w+ on (?P<his>\w+) (?P<pattern>\w+) "
    r"(?P<clothes>\w+) and \w+ to the (?P<place>\w+)\."
)


class Opening(NamedTuple):
    """The first sentence of a story, the child that it is about, and three questions with their answers."""

    text: str
    name: str
    child: str
    questions: list[Turn]


def opening_of(story: str) -> Opening:
    """The opening of a story that the grammar has written."""
    found = _OPENING.search(story)
    assert found is not None, "the grammar has another opening now"
    name, child, his = found["name"], found["child"], found["his"].capitalize()
    questions = [
        (f"Where did {name} go?", f"To the {found['place']}."),
        (f"What did {name} put on?", f"{his} {found['pattern']} {found['clothes']}."),
        ("Who is it about?", f"{name}, {found['article']} {found['trait']} {child}."),
    ]
    return Opening(story[: found.end()], name, child, questions)


def chats(seed: int, split: Split, count: int) -> Iterator[dict[str, Any]]:
    """Rows with `messages`, one a story: its first sentence with a question, then one more question. Each has two of
    three questions, in turn."""
    for number, story in enumerate(stories.generate(seed, split, count)):
        opening = opening_of(story)
        (first, answer), second = opening.questions[number % 3], opening.questions[(number + 1) % 3]
        yield _row([(f"{opening.text} {first}", answer), second])


def _row(turns: list[Turn]) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": r, "content": c} for turn in turns for r, c in zip(roles, turn, strict=True)]}


# Talk. Each of the first four rules is a question and its answer, with "^" between them.

_NUMBERS = stories.words("two three four five six seven eight nine ten 1 2 3 5 7 10 12 17 25 48 100")
_THINGS = (
    "car tree moon sun sea star computer phone king queen cat dog horse river town forest world war song film team "
    "doctor school heart atom ship plane train engine language planet bird shop island castle bridge"
)
_SLOTS = {
    "thing": stories.SLOTS["toy"],
    "other": stories.words(_THINGS),
    "land": stories.words("France Spain Italy Japan China India Peru Kenya Egypt Norway Canada Brazil Germany Poland"),
    "person": stories.words("Einstein Newton Shakespeare Mozart Napoleon Darwin Cleopatra Gandhi Picasso Plato"),
    "job": stories.words("poem letter program song joke recipe list essay speech email function summary report"),
    "number": _NUMBERS,
    "amount": _NUMBERS,
}
_RULES = {
    "hello": """
        [Hello|Hi|Hey|Good morning|Good day][|!|.|, how are you?|, who are you?|, what can you do?] ^ Hello! <can>
    """,
    "me": """
        [Who are you|What are you|What is your name|Are you a person|Are you a robot|What can you do|Help|
        What do you know|How do you work][?||.] ^ I am a very small language model. <can>
    """,
    "thanks": """
        [Thanks|Thank you|Thank you very much|Great|Good|Nice|Well done|Bye|Goodbye][!|.|] ^
        [You are welcome!|Any time!]
    """,
    "unknown": """
        [What <what>|How <how>|Who <who>|Where is <any>|When [did|was|will] <any> [born|die|come|begin|end]|
        Why [is|does] the {other} [so big|move|work|shine|exist|blue]|<please>|<said>][?||.] ^ I do not know that. <can>
    """,
    "can": "I can tell you a story, or answer questions about the first sentence of one.",
    "what": """
        is [the [capital|weather|name|price|colour|size|age|history|meaning] of <any>|<any>|{number} plus {amount}|
        love|time|life]|day is it|time is it|do you [like|think of] <any>
    """,
    "how": """
        much is {number} [plus|times|minus] {amount}|many {other}s are [there|in {land}]|
        [do I|can I|does one] [make|fix|buy|draw|find] {other.a}|[far|old|big] is <any>
    """,
    "who": """
        [is|was] {person}|[made|wrote|found|broke] <any>|[is|was] the [king|queen|president|inventor] of <any>
    """,
    "please": """
        Can you [write|make|give] me {job.a} about <any>|Write {job.a} [about <any>|for {person}|in {land}]|
        Translate this into [French|German|Latin]|Do you [like|know] <any>|Tell me [about <any>|a joke|the news]|
        Explain <any>|Is the {other} [bigger|older|better] than the {thing}|Which {other} is best|
        Solve {number} x = {amount}
    """,
    "said": """
        I [am|feel] [sad|happy|tired|bored|ill|angry|in love][| today| again]|I [like|hate|have|want] <any>|
        You are [nice|stupid|funny|wrong|great]|My {other} is [new|old|gone|ill]|It is [raining|late|cold] [here|now]
    """,
    "any": "[the {other}|{land}|{person}|{thing.a}|{other}s]",
}
_UNSAID = (
    "How old is {name}?", "What did {name} eat?", "Why did {name} go there?", "Who is the friend of {name}?",
    "How tall is {name}?", "What colour are the eyes of {name}?", "When did {name} come home?", "Did {name} sleep?",
    "What did {name} say?", "Where does {name} live?", "Is {name} rich?", "What is in the bag of {name}?",
)  # fmt: skip
"""Questions that no first sentence answers."""
_ASKED = (
    "Tell me a story.", "Tell me a story", "A story, please.", "Write a story.", "Can you tell me a story?",
    "Tell me a story about {name}.", "Tell me a story about a {child}.", "Write a story about {name}", "Another story!",
)  # fmt: skip
_WIDER = {
    "girl": "Alice Sara Eva Nina Lena Olga Rita Vera Amy Sue",
    "boy": "Paul Mark Erik Hans Carl Ivan Luis Noah Bob Jim",
    "clothes": "hat dress jacket crown sweater gloves socks shirt apron belt",
    "place": f"{_THINGS} beach city zoo farm kitchen station",
}
"""Words that no story has, for first sentences that are asked about. So the model learns to copy, and not only to
choose among the words of the grammar."""
WIDER_SHARE = 0.25
"""Of the first sentences that are asked about, so many may have these words."""
_KINDS = {"story": 3, "about": 5, "unknown": 4, "hello": 1, "me": 1, "thanks": 1}
"""What may be said -> how often, relative to the others."""


def talks(seed: int, split: Split, count: int) -> Iterator[dict[str, Any]]:
    """Rows with `messages`: one to three things that a person may say or ask, each with its answer."""
    small = {kind: Grammar(_RULES | {"start": f"<{kind}>"}, _SLOTS) for kind in ("hello", "me", "thanks", "unknown")}
    for number in range(count):
        draw = random.Random(f"{seed} {split} {number} talk")
        turns: list[Turn] = []
        for kind in draw.choices(list(_KINDS), list(_KINDS.values()), k=draw.randint(1, 3)):
            story = stories.sample(seed, split, draw.randrange(10**6)).text
            if kind == "story":
                opening = opening_of(story)
                turns.append((draw.choice(_ASKED).format(name=opening.name, child=opening.child), story))
                turns += _questions(opening, draw)[: draw.randint(0, 1)]
            elif kind == "about":
                opening = opening_of(_with_wider_words(story, draw) if draw.random() < WIDER_SHARE else story)
                (first, answer), *more = _questions(opening, draw)
                turns += [(f"{opening.text} {first}", answer), *more[: draw.randint(0, 2)]]
            else:
                turns.append(_said(small[kind], draw.random))
        yield _row(turns)


def _questions(opening: Opening, draw: random.Random) -> list[Turn]:
    """Questions about a first sentence in any order, two of which it does not answer."""
    unsaid = [(question.format(name=opening.name), "The story does not say.") for question in draw.sample(_UNSAID, 2)]
    return draw.sample([*opening.questions, *unsaid], len(opening.questions) + len(unsaid))


def _with_wider_words(story: str, draw: random.Random) -> str:
    """The story with another name, clothes and place, each with probability 1/2."""
    found = _OPENING.search(story)
    assert found is not None
    for old, kind in ((found["name"], found["child"]), (found["clothes"], "clothes"), (found["place"], "place")):
        if draw.random() < 0.5:
            story = re.sub(rf"\b{old}\b", draw.choice(_WIDER[kind].split()), story)
    return story


def _said(grammar: Grammar, uniform: Callable[[], float]) -> Turn:
    question, answer = grammar.sample(uniform).text.split("^")
    return re.sub(r"\s+([?!.,])", r"\1", " ".join(question.split())), answer.strip()


def write_chats(path: str | Path, count: int = 4000, seed: int = 0, split: Split = "train") -> int:
    """Write `count` conversations of `chats` into a file of JSON lines. Returns their number."""
    return _write(path, chats(seed, split, count))


def write_talks(folder: str | Path, count: int = 30_000, seed: int = 0) -> int:
    """Write `count` conversations of `talks` for training, and 600 for validation, into a folder that `sft --data`
    takes. Returns their number."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    _write(Path(folder) / "valid.jsonl", talks(seed, "valid", stories.VALIDATION_STORIES))
    return _write(Path(folder) / "train.jsonl", talks(seed, "train", count))


def _write(path: str | Path, rows: Iterator[dict[str, Any]]) -> int:
    lines = [json_text(row) for row in rows]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)
