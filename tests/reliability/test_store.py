"""Token stores: preparations that are killed, and files that are damaged."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_jax.config import UserError
from moe_jax.data.documents import SEPARATOR
from moe_jax.data.token_store import open_store
from tests.reliability import runs
from tests.support import short_form

pytestmark = pytest.mark.reliability
KILLS_A_STORE = 4
PREPARE = """
import json, resource, sys, time
begin = time.monotonic()
from pathlib import Path
from moe_jax.config import DataConfig
from moe_jax.data.token_store import prepare_token_store
data = DataConfig(source=sys.argv[2], tokenizer=sys.argv[3], vocab_size=400)
store = prepare_token_store(data, cache=Path(sys.argv[1]), progress=False)
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "folder": str(store.folder), "digest": store.digest, "tokens": len(store.train.tokens),
    "seconds": time.monotonic() - begin, "processor": used.ru_utime + used.ru_stime,
}))
"""


def start(cache: Path, text: Path, tokenizer: str = "bpe") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREPARE, str(cache), str(text), tokenizer]
    environment = runs.environment(cache)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def prepared(cache: Path, text: Path, tokenizer: str = "bpe") -> dict[str, Any]:
    out, err = (process := start(cache, text, tokenizer)).communicate()
    assert process.returncode == 0, err
    return json.loads(out)


def content(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def write_words(path: Path, size: int) -> None:
    """Documents of 100 to 400 words, of a vocabulary of 20,000."""
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, length).tolist()) for length in rng.integers(2, 10, 20_000)]
    with path.open("wb") as file:
        while file.tell() < size:
            chosen = np.minimum(rng.zipf(1.2, 250_000), 20_000) - 1
            ends = np.cumsum(rng.integers(100, 401, 1000))
            documents = np.split(chosen, ends[ends < len(chosen)])
            texts = [b" ".join([words[i] for i in document.tolist()]) for document in documents]
            file.write(f".\n{SEPARATOR}\n".encode().join(texts) + f".\n{SEPARATOR}\n".encode())


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 MB."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    write_words(path, 2_000_000)
    return path


@pytest.fixture(scope="module")
def reference(large: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The store that nobody interrupts."""
    return prepared(tmp_path_factory.mktemp("reference"), large)


@pytest.mark.parametrize("seed", short_form([0, *range(100, 125)], [0]))
def test_a_killed_preparation_leaves_nothing_wrong(
    seed: int, large: Path, reference: dict[str, Any], tmp_path: Path
) -> None:
    """Killed at random moments, then not."""
    draw, hit = random.Random(seed), 0
    while hit < KILLS_A_STORE:
        process = start(tmp_path, large)
        time.sleep(draw.uniform(0, reference["seconds"]))
        hit += process.poll() is None
        process.kill()
        process.communicate()
        for folder in tmp_path.glob("*/manifest.json"):
            if folder.parent.suffix != ".partial":
                assert content(folder.parent) == content(reference["folder"])
    last = prepared(tmp_path, large)
    equal = content(last["folder"]) == content(reference["folder"]) and last["digest"] == reference["digest"]
    assert equal
    assert list(tmp_path.glob("*.partial")) == []


def test_every_flipped_bit_is_noticed_at_the_start(reference: dict[str, Any]) -> None:
    folder, draw = Path(reference["folder"]), random.Random(5)
    for name in ["train.bin", "valid.bin"] * 20:
        whole = (folder / name).read_bytes()
        place, bit = draw.randrange(len(whole)), draw.randrange(8)
        (folder / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        with pytest.raises(UserError, match=f"^{folder / name}: damaged, its digest does not match"):
            open_store(folder)
        (folder / name).write_bytes(whole)
    assert open_store(folder).digest == reference["digest"]
