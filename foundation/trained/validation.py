"""The validation tokens of a run: where they are, and the mean loss over them.

`train.py` keeps the tokens of a text in its cache (MOE_JAX_CACHE, or the user's cache folder): CACHE/KEY/valid.bin,
with a manifest beside it. The run's checkpoint names the digest of that manifest, so the right folder is found, or
none.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from foundation.losses import IGNORE
from foundation.trained import Problem
from foundation.trained.tokens import SEPARATOR, Vocabulary

_MOST_LOGITS = 1 << 22


def cache_folder() -> Path:
    """Where `train.py` keeps prepared tokens."""
    given = os.environ.get("MOE_JAX_CACHE")
    if given:
        return Path(given)
    import platformdirs

    return platformdirs.user_cache_path("moe-jax")


def stored_stream(run: Path, trained_on: object) -> np.ndarray:
    """The validation tokens whose store has the digest that the checkpoint names.

    Raises Problem where the cache does not hold them.
    """
    import xxhash

    for path in sorted(cache_folder().glob("*/manifest.json")):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            content = {key: value for key, value in manifest.items() if key != "source"}
            digest = xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
            if trained_on in (digest, f"fingerprint:{manifest['fingerprint']}"):
                return np.fromfile(path.with_name("valid.bin"), np.dtype(manifest["dtype"]).newbyteorder("<"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # another program's folder
    raise Problem(
        f"{cache_folder()}: does not hold the run's validation tokens; `python -m moe_jax evaluate --run {run}` makes "
        "them, or give another text with --text FILE"
    )


def text_stream(path: Path, vocabulary: Vocabulary) -> np.ndarray:
    """The tokens of a file of documents: separator, document, separator, ..., separator.

    Raises Problem where there is no text.
    """
    try:
        documents = [part.strip() for part in path.read_text(encoding="utf-8").split(SEPARATOR)]
    except OSError as error:
        raise Problem(f"--text {path}: cannot be read ({error.strerror}); give a file") from None
    except UnicodeDecodeError as error:
        raise Problem(f"--text {path}: not UTF-8 at byte {error.start}; give it in UTF-8") from None
    ids = [vocabulary.separator]
    for document in filter(None, documents):
        ids += [*vocabulary.encode(document), vocabulary.separator]
    if len(ids) == 1:
        raise Problem(f"--text {path}: holds no text; give a file with words in it")
    return np.array(ids)


class Window(NamedTuple):
    """T tokens, and the T that follow; IGNORE where an earlier window has counted one, or the stream is over."""

    inputs: np.ndarray
    targets: np.ndarray


def windows(stream: np.ndarray, length: int) -> Iterator[Window]:
    """Windows that count every token after the first exactly once.

    They advance by half their length, and the later ones count only what is new, so that no token is without context.
    The last ends with the stream.
    """
    positions = len(stream) - 1
    begin = counted = 0
    while counted < positions:
        end = min(begin + length, positions)
        inputs, targets = np.zeros(length, np.int32), np.full(length, IGNORE, np.int32)
        inputs[: end - begin] = stream[begin:end]
        targets[counted - begin : end - begin] = stream[counted + 1 : end + 1]
        yield Window(inputs, targets)
        counted, begin = end, min(begin + length // 2, max(0, positions - length))


def mean_loss(
    total: Callable[[Array, Array], Float[Array, ""]],
    stream: np.ndarray,
    length: int,
    vocabulary: int,
    tell: Callable[[int, int], None],
) -> float:
    """Nats per predicted token. `total` sums the cross-entropies of a batch of windows; `tell` hears of progress."""
    rows = max(1, min(16, _MOST_LOGITS // (length * vocabulary)))
    found = list(windows(stream, length))
    empty = Window(np.zeros(length, np.int32), np.full(length, IGNORE, np.int32))
    nats = []
    for first in range(0, len(found), rows):
        batch = found[first : first + rows]
        batch += [empty] * (rows - len(batch))  # one shape, one program
        nats.append(float(total(*(jnp.asarray(np.stack(part)) for part in zip(*batch, strict=True)))))
        tell(min(first + rows, len(found)), len(found))
    return math.fsum(nats) / (len(stream) - 1)
