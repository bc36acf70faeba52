"""Token stores in shards: killed, damaged, built by several processes at once, and as large as 3 GB."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_jax.config import UserError
from moe_jax.data.text_files import SEPARATOR
from moe_jax.data.token_store import open_store
from tests.reliability import runs
from tests.reliability.figures import Record, figure

pytestmark = [
    pytest.mark.reliability,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at other processes in /proc"),
]
KILLS_A_STORE = 4
PREPARE = """
import json, resource, sys, time
begin = time.monotonic()
from pathlib import Path
from moe_jax.config import DataConfig
from moe_jax.data import text_plan, token_store
from moe_jax.system import files
options = json.loads(sys.argv[2])
text_plan.PART_BYTES = options.get("part", text_plan.PART_BYTES)
if "cores" in options:
    token_store.usable_cores = lambda: options["cores"]
if options.get("no locks"):
    files.fcntl = None
data = DataConfig(source=options["text"], tokenizer=options["tokenizer"], vocab_size=400)
store = token_store.prepare_token_store(data, cache=Path(sys.argv[1]), progress=False)
own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
read = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
(peak,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
print(json.dumps({
    "folder": str(store.folder), "digest": store.digest, "tokens": len(store.train.tokens),
    "shards": len(store.train.tokens.shards), "seconds": time.monotonic() - begin,
    "processor": own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime,
    "peak": int(peak) / 1024, "peak of a worker": children.ru_maxrss / 1024, "read": int(read["rchar"]) / 1e6,
}))
"""


def start(cache: Path, text: Path, **options: Any) -> subprocess.Popen[str]:
    values = {"text": str(text), "tokenizer": "bpe", "part": 100_000, "cores": 2} | options
    values = {key: value for key, value in values.items() if value is not None}
    command = [sys.executable, "-c", PREPARE, str(cache), json.dumps(values)]
    environment = runs.environment(cache)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def prepared(cache: Path, text: Path, **options: Any) -> dict[str, Any]:
    out, err = (process := start(cache, text, **options)).communicate()
    assert process.returncode == 0, err
    return json.loads(out)


def content(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def workers(cache: Path) -> list[str]:
    """The processes that tokenize for a cache."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "moe_jax.data.shard_workers" in command and str(cache) in command:
            found.append(process.name)
    return found


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 MB: twenty parts of 100 kB."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    write_words(path, 2_000_000)
    return path


@pytest.fixture(scope="module")
def reference(large: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The store that nobody interrupts, made by one process."""
    return prepared(tmp_path_factory.mktemp("reference"), large, cores=1)


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


def finished(cache: Path) -> bool:
    """Whether a preparation that is not at its end has finished a shard."""
    return any(cache.glob("*.partial/train.*.json"))


def made(shard: Path) -> tuple[int, int]:
    """A shard's file on the disk, by its number and its time: a file that is written again has others. `shard` is the
    file or its entry."""
    status = shard.with_suffix(".bin").stat()
    return status.st_ino, status.st_mtime_ns


def check_kills(seed: int, large: Path, reference: dict[str, Any], cache: Path, seconds: float, record: Record) -> None:
    """Kill a preparation KILLS_A_STORE times at random moments, then let it finish. Every second moment is drawn from
    the time after a shard is finished."""
    random_moment, hit, went_on = random.Random(seed), 0, 0
    kept: dict[str, tuple[int, int]] = {}
    while hit < KILLS_A_STORE:
        process, moment = start(cache, large), random_moment.uniform(0, seconds)
        if hit % 2:
            while not finished(cache) and process.poll() is None:
                time.sleep(0.01)
            moment /= 8
        time.sleep(moment)
        alive = process.poll() is None
        process.kill()
        process.communicate()
        deadline = time.monotonic() + 60
        while workers(cache) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert workers(cache) == []
        if not alive or (hit % 2 and not finished(cache)):  # too late: begin anew
            shutil.rmtree(cache)
            cache.mkdir()
            kept.clear()
            seconds /= 2
            assert seconds > 1e-3, "no shard is finished before the end of the preparation"
            continue
        hit += 1
        went_on += finished(cache)
        held = {path.with_suffix(".bin").name: made(path) for path in cache.glob("*.partial/train.*.json")}
        assert {name: kept.get(name, file) for name, file in held.items()} == held, "a finished shard was made again"
        kept = held | kept
    found = prepared(cache, large)
    equal = content(found["folder"]) == content(reference["folder"]) and found["digest"] == reference["digest"]
    figure(record, "kill -9 of a preparation", hit)
    figure(record, "of them with finished shards to go on from", went_on)
    figure(record, "stores that differ from the uninterrupted one", int(not equal))
    assert equal
    assert went_on >= KILLS_A_STORE // 2
    assert kept
    assert {name: made(Path(found["folder"]) / name) for name in kept} == kept, "a finished shard was made again"
    assert list(cache.glob("*.partial")) == []


@pytest.fixture(scope="module")
def seconds(large: Path, reference: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> float:
    """How long a preparation takes here."""
    begin = time.monotonic()
    found = prepared(tmp_path_factory.mktemp("timed"), large)
    assert content(found["folder"]) == content(reference["folder"])
    return time.monotonic() - begin


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_preparation_goes_on(
    seed: int, large: Path, reference: dict[str, Any], seconds: float, tmp_path: Path, record_property: Record
) -> None:
    check_kills(seed, large, reference, tmp_path, seconds, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 125))
def test_a_hundred_killed_preparations_go_on(
    seed: int, large: Path, reference: dict[str, Any], seconds: float, tmp_path: Path, record_property: Record
) -> None:
    check_kills(seed, large, reference, tmp_path, seconds, record_property)


@pytest.mark.parametrize("no_locks", [False, True], ids=["locks", "no locks"])
def test_processes_that_prepare_at_the_same_time(
    no_locks: bool, large: Path, reference: dict[str, Any], tmp_path: Path
) -> None:
    started = [start(tmp_path, large, **{"no locks": no_locks}) for _ in range(3)]
    found = [(process.communicate(), process.returncode) for process in started]
    assert [status for _, status in found] == [0, 0, 0], found
    assert {json.loads(out)["digest"] for (out, _), _ in found} == {reference["digest"]}
    assert content(reference["folder"]).items() <= content(json.loads(found[0][0][0])["folder"]).items()
    assert list(tmp_path.glob("*.partial")) == []


def test_a_flipped_bit_in_any_shard_is_found_at_the_first_use(
    reference: dict[str, Any], record_property: Record
) -> None:
    """Each time in another place. No other shard is refused."""
    folder, draw = Path(reference["folder"]), random.Random(5)
    names = sorted(path.name for path in folder.glob("train.*.bin"))
    for turn in range(200):
        path = folder / names[turn % len(names)]
        whole = path.read_bytes()
        place, bit = draw.randrange(len(whole)), draw.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        try:
            tokens, said = open_store(folder).train.tokens, []
            ends = np.cumsum([shard.length for shard in tokens.shards])
            for shard, end in zip(tokens.shards, ends, strict=True):
                try:
                    tokens[int(end) - 1]
                except UserError as error:
                    said.append((shard.path.name, str(error)))
        finally:
            path.write_bytes(whole)
        assert [name for name, _ in said] == [path.name]
        assert said[0][1].startswith(f"{path}: damaged, its digest does not match")
    figure(record_property, "bits flipped in shards, all found", 200)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """`train.py` with small parts."""
    path = tmp_path / "train_small_parts.py"
    path.write_text(
        "import runpy\nfrom moe_jax.data import text_plan\ntext_plan.PART_BYTES = 600\n"
        f"runpy.run_path({str(runs.ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    return path


def test_a_run_on_shards_has_the_same_bits_and_names_a_damaged_one(
    program: Path, text: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The damaged shard ends the run at its first use. The same command with --resume makes the shard again."""
    (cache := tmp_path / "cache").mkdir()
    first = runs.complete(runs.flags(text, tmp_path / "first"), cache, str(program))
    assert first.returncode == 0, first.stderr
    assert runs.result(tmp_path / "first") == whole[1]
    (shard,) = cache.glob("*/train.00003.bin")
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    flags = [*runs.flags(text, tmp_path / "second"), "--resume"]
    damaged = runs.complete(flags, cache, str(program))
    assert damaged.returncode == 1
    said = (
        f"{shard}: damaged, its digest does not match; it was removed; start again: only this shard is prepared again"
    )
    assert [line for line in damaged.stderr.splitlines() if "damaged" in line] == [f"error: {said}"]
    assert "Traceback" not in damaged.stderr
    assert runs.complete(flags, cache, str(program)).returncode == 0
    assert runs.result(tmp_path / "second") == whole[1]


@pytest.fixture
def three_gigabytes(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    size = int(os.environ.get("MOE_JAX_TEXT_BYTES", 3_000_000_000))
    folder = tmp_path / "text"
    folder.mkdir()
    write_words(folder / "train.txt", size)
    runs.write_text(folder / "valid.txt")
    yield folder, size
    (folder / "train.txt").unlink()


@pytest.mark.slow
@pytest.mark.timeout(60 * 60)
@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_three_gigabytes(
    tokenizer: str, three_gigabytes: tuple[Path, int], tmp_path: Path, record_property: Record
) -> None:
    """Prepared by all cores. A run starts without reading it."""
    (cache := tmp_path / "cache").mkdir()
    text, size = three_gigabytes
    time.sleep(3)  # a text that was written a moment ago is read again at the next start
    options: dict[str, Any] = {"tokenizer": tokenizer, "part": None, "cores": None}
    first = prepared(cache, text, **options)
    again = prepared(cache, text, **options)
    short = tmp_path / "short"
    short.mkdir()
    for name in ("train.txt", "valid.txt"):
        runs.write_text(short / name)
    seconds: list[float] = []
    for number, source in enumerate((short, short, text)):  # the first compiles
        flags = runs.flags(source, tmp_path / f"run{number}", steps=1)
        begin = time.monotonic()
        run = runs.complete([*flags, f"--data.tokenizer={tokenizer}", "--data.vocab-size=400"], cache)
        seconds.append(time.monotonic() - begin)
        assert run.returncode == 0, run.stderr
    for name, value in (
        ("MB of text", size / 1e6),
        ("million tokens", first["tokens"] / 1e6),
        ("shards", first["shards"]),
        ("seconds to prepare", first["seconds"]),
        ("processor seconds to prepare", first["processor"]),
        ("MB of memory at most, first process", first["peak"]),
        ("MB of memory at most, each worker", first["peak of a worker"]),
        ("seconds to open it again", again["seconds"]),
        ("MB read to open it again", again["read"]),
        ("seconds of a run of one step", seconds[2]),
        ("seconds of a run of one step on a text of 4 kB", seconds[1]),
    ):
        figure(record_property, f"{tokenizer}: {name}", round(value, 1))
    assert first["digest"] == again["digest"]
    assert first["shards"] > 1
    assert again["read"] < 20
    assert max(first["peak"], first["peak of a worker"]) < (100 if tokenizer == "byte" else 2000)
