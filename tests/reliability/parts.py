"""Parts of a long form: an environment variable asks for one case again, or for some of them."""

import os


def cases(variable: str, seed: int, count: int) -> tuple[int, range]:
    """The seed and the numbers of the cases to run: `count` of them, unless the variable asks for "seed/number" or for
    "seed/first-last"."""
    asked = os.environ.get(variable)
    if not asked:
        return seed, range(count)
    given, _, part = asked.partition("/")
    first, _, last = part.partition("-")
    return int(given), range(int(first), int(last or first) + 1)
