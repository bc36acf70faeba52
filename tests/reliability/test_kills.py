"""kill -9 at random moments of real runs: whatever is interrupted, the run ends as one that was never stopped.

The moments are drawn from the whole life of a process, its start included. Every bit is compared.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moe_jax.data.synthetic.talk import write_chats
from moe_jax.interop.export import export
from moe_jax.interop.source import open_source
from tests.reliability import runs
from tests.reliability.test_export import content
from tests.support import short_form

pytestmark = pytest.mark.reliability
KILLS_A_RUN = 4


class Run(NamedTuple):
    """A command that trains, and what it comes to when nobody stops it."""

    program: str
    words: Callable[[Path], list[str]]
    """The words of the command for a run in this folder."""
    result: dict[str, Any]
    seconds: float
    """How long an uninterrupted process takes, once everything is compiled."""


@pytest.fixture(scope="module")
def run(
    request: pytest.FixtureRequest,
    text: Path,
    cache: Path,
    whole: tuple[Path, dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """Training, or fine-tuning by LoRA."""
    folder = tmp_path_factory.mktemp("runs")
    program, words = "train.py", lambda out: runs.flags(text, out)
    if request.param == "sft":
        write_chats(folder / "chats.jsonl", 40)
        start = ["sft", "--run", str(whole[0]), "--data", str(folder / "chats.jsonl"), "--lora", "2", "--steps", "12"]
        start += ["--save-every", "2", "--eval-every", "4", "--train.log-every", "1"]
        program, words = runs.COMMANDS, lambda out: [*start, "--out", str(out)]
    begin = time.monotonic()
    ended = runs.complete(words(folder / "timed"), cache, program)
    assert ended.returncode == 0, ended.stderr
    result = runs.result(folder / "timed")
    assert request.param == "sft" or result == whole[1], "two uninterrupted runs differ"
    return Run(program, words, result, time.monotonic() - begin)


SEEDS = [("train", seed) for seed in (0, *range(100, 125))] + [("sft", seed) for seed in range(5)]


@pytest.mark.parametrize(("run", "seed"), short_form(SEEDS, [("train", 0)]), indirect=["run"], scope="module")
@pytest.mark.timeout(60 * 60)
def test_killed_four_times(run: Run, seed: int, cache: Path, tmp_path: Path) -> None:
    """What is left of a run takes less time than a whole one: where the process has ended before its moment comes, the
    next moments are drawn from half the time."""
    moments, hit = random.Random(seed), 0
    words, seconds = [*run.words(tmp_path / "run"), "--resume"], run.seconds
    while hit < KILLS_A_RUN:
        process = runs.start(words, cache, run.program)
        time.sleep(moments.uniform(0, seconds))
        alive = process.poll() is None
        hit, seconds = hit + alive, seconds if alive else seconds / 2
        process.kill()
        process.communicate()
    last = runs.complete(words, cache, run.program)
    assert last.returncode == 0, last.stderr
    assert runs.result(tmp_path / "run") == run.result


WRITERS = {
    "export": "export --run {run} --to hf --out {out}",
    "page": "export --run {run} --to html --out {out}.html",
    "import": "import {hf} --out {out}",
    "quantize": "quantize --run {run} --to int8 --out {out}",
}


@pytest.mark.parametrize(("name", "seed"), short_form([(n, s) for s in range(12) for n in WRITERS], [("export", 0)]))
def test_a_killed_writer_leaves_all_or_nothing(name: str, seed: int, whole: Any, cache: Path, tmp_path: Path) -> None:
    """Beside a hidden draft, which the next run of the command removes. Writing takes little of a process's time, so
    odd seeds wait for the draft, and kill soon after."""
    if name == "import":
        export(open_source(whole[0]), "hf", "bfloat16", tmp_path / "hf", "")
    words = WRITERS[name].format(run=whole[0], hf=tmp_path / "hf", out=tmp_path / "new" / "out").split()

    def write() -> dict[str, bytes]:
        ended = runs.complete(words, cache, runs.COMMANDS)
        assert ended.returncode == 0, ended.stderr
        return content(tmp_path / "new")

    (tmp_path / "new").mkdir()
    begin = time.monotonic()
    expected = write()
    seconds = time.monotonic() - begin
    (tmp_path / "new").rename(tmp_path / "expected")
    (tmp_path / "new").mkdir()
    process = runs.start(words, cache, runs.COMMANDS)
    while seed % 2 and process.poll() is None and not any((tmp_path / "new").iterdir()):
        time.sleep(1e-3)
    time.sleep(random.Random(seed).uniform(0, 0.05) if seed % 2 else random.Random(seed).uniform(seconds / 2, seconds))
    process.kill()
    process.communicate()
    left = {path: data for path, data in content(tmp_path / "new").items() if not path.startswith(".out")}
    assert left in ({}, expected)
    assert left or write() == expected
