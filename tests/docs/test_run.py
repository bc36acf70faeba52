"""Every line of code in README and docs is run, on a tiny run that stands for the real one.

One process runs them all, one after the other.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.docs.pages import COMMAND_LINES, PAGES, Block, blocks, words_of
from tests.reliability import runs

pytestmark = pytest.mark.reliability

NOT_RUN = {
    "--extra gpu-plan": "needs the extra gpu-plan; tests/benchmarks/test_record_plans.py runs it",
    "--extra gguf": "needs the package gguf; tests/interop runs it",
    "--extra peers": "needs PyTorch; tests/interop runs it",
    "pytest": "is what runs this",
    "python -m foundation": "takes minutes; tests/foundation runs the same checks",
    "moe-jax serve": "does not end by itself; tests/reliability/test_serve.py runs it",
    "certify": "takes minutes; tests/reliability/test_terminal.py runs it",
    "--num-processes": "needs a second process; tests/parallel/test_processes.py runs two",
    "benchmark.py": "takes minutes; tests/benchmarks runs each suite on a tiny model",
    "verify_resume.py": "takes a minute; tests/reliability/test_verify_resume.py runs it",
    "--run runs/book": "opens the run that the line above it trains; the same command is run on runs/nano",
    "moe-jax import": "downloads 13.8 GB; tests/interop/test_hub.py imports a tiny model from a server of its own",
    "--run olmoe": "opens the model that `import` makes; tests/interop/test_imported_run.py opens tiny ones",
    "doctor --gpu": "fails without an NVIDIA card; tests/planning/test_card.py invents one",
    "--resume": "resumes the real run; tests/reliability/test_kills.py resumes tiny ones",
    "--upcycle": "trains for minutes; tests/training/test_upcycle.py does it on a tiny model",
}
"""Part of a command line -> why it is only parsed (`test_pages.py`), and not run."""

PYTHON = [block for page in PAGES for block in blocks(page) if block.kind == "python"]


@pytest.fixture(scope="module")
def printed(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """`printed(words, place)`: what a command prints in a folder. It must succeed."""
    with runs.Commands(tmp_path_factory.mktemp("cache")) as commands:

        def run(words: list[str], place: Path = workplace) -> str:
            done = commands.run(words, place, "A cat\n")
            assert done.returncode == 0, done.stderr
            return done.stdout

        yield run


@pytest.mark.parametrize("block", PYTHON, ids=[f"{b.page}-{i}" for i, b in enumerate(PYTHON)])
def test_python(block: Block, printed: Callable[..., str]) -> None:
    assert printed(["-c", block.code]).strip()


@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if not any(part in line for part in NOT_RUN)])
def test_command(line: str, workplace: Path, printed: Callable[..., str], tmp_path: Path) -> None:
    """A command on a run is run whole, `sft` for four steps. Training is run as `--dry-run`, where the settings are
    resolved and sized."""
    words = [*words_of(line), *(["--steps", "4"] if " sft " in line else [])]
    if words[0] == "train.py":
        place = workplace if COMMAND_LINES[line] else tmp_path
        assert "dry run" in printed([str(runs.ROOT / "train.py"), *words[1:], "--dry-run"], place)
    else:
        script = [str(runs.ROOT / words[1])] if words[1].startswith("benchmarks/") else words[1:2]
        assert printed([*script, *words[2:]]).strip()


def test_each_reason_is_needed() -> None:
    for part in NOT_RUN:
        assert any(part in line for line in COMMAND_LINES), part
