"""Shared by the battery: a text, a cache of prepared data, and the run that nobody interrupts."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reliability import runs
from tests.reliability.served import Served, start
from tests.support import saved_run

# A program inherits ignored signals, and `nohup pytest` ignores SIGHUP. Handlers are not inherited: the runs that the
# tests start get the default.
for _number in (getattr(signal, name, None) for name in ("SIGHUP", "SIGINT")):
    if _number is not None and signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def commands(cache: Path) -> Iterator[runs.Commands]:
    with runs.Commands(cache) as commands:
        yield commands


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    runs.write_text(path)
    return path


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never trained. Nobody may change it."""
    return saved_run.save_run(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="session")
def whole(text: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder of the uninterrupted run, and what it came to."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    finished = runs.complete(runs.flags(text, out), cache)
    assert finished.returncode == 0, finished.stderr
    return out, runs.result(out)


@pytest.fixture(scope="module")
def served(whole: tuple[Path, dict[str, Any]], cache: Path) -> Iterator[Served]:
    """A server of that run, with three slots."""
    server = start(whole[0], cache, "--slots", "3")
    yield server
    server.process.terminate()
    assert server.process.wait(30) == 0
