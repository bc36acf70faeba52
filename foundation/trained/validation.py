"""The validation tokens of a run: where they are, and the windows that they are scored in.

`train.py` keeps the tokens of a text in its cache (MOE_JAX_CACHE, or the user's cache folder): CACHE/KEY/valid.bin,
with a manifest beside it. The run's checkpoint names the digest of that manifest, so the right folder is found, or
none.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from foundation.losses import IGNORE
from foundation.trained import Problem
from foundation.trained.tokens import SEPARATOR, Vocabulary


def stored_stream(run: Path, trained_on: object) -> np.ndarray:
    """The validation tokens whose store has the digest that the checkpoint names.

    Raises Problem where the cache does not hold them.
    """
    import platformdirs
    import xxhash

    cache = Path(os.environ.get("MOE_JAX_CACHE") or platformdirs.user_cache_path("moe-jax"))
    for path in sorted(cache.glob("*/manifest.json")):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            content = {key: value for key, value in manifest.items() if key != "source"}
            digest = xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
            if trained_on in (digest, f"fingerprint:{manifest['fingerprint']}"):
                return np.fromfile(path.with_name("valid.bin"), np.dtype(manifest["dtype"]).newbyteorder("<"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # another program's folder
    raise Problem(
        f"{cache}: does not hold the run's validation tokens; `python -m moe_jax evaluate --run {run}` makes "
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


def windows(stream: np.ndarray, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(inputs, targets): windows that count every token after the first exactly once. A target is IGNORE where an
    earlier window has counted it, or the stream is over.

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
        yield inputs, targets
        counted, begin = end, min(begin + length // 2, max(0, positions - length))
