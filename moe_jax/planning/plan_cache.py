"""What a plan has compiled, kept for later plans: one JSON file for each program, in the user's cache folder."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from moe_jax.system.files import cache_dir, json_text, write_atomically


def looked_up[T](
    parts: Sequence[str],
    make: Callable[[], T],
    to_json: Callable[[T], dict[str, Any]],
    from_json: Callable[[dict[str, Any]], T],
    ending: str = ".json",
) -> T:
    """What `make` returns; or what it returned in an earlier process for the same `parts`.

    `parts` name all that the result depends on: the program, the devices, the options, the compiler's version. A file
    that is damaged, or of an earlier form, is made again. So is one that could not be written.
    """
    path = cache_dir() / "plans" / (hashlib.sha256("\0".join(parts).encode()).hexdigest() + ending)
    with contextlib.suppress(Exception):  # whatever is wrong with the file, such as zlib.error
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    made = make()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json_text(to_json(made)), durable=False)
    return made
