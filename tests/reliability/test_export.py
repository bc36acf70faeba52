"""An export that is killed or that the disk refuses leaves nothing half: the folder is whole or absent, and the next
export of the same name removes what a killed one has left beside it."""

import functools
import random
import shutil
import time
from pathlib import Path

import pytest

from moe_jax.interop import export as module
from moe_jax.interop.export import export
from moe_jax.interop.source import ExportSource, open_source
from moe_jax.runs import arrays
from tests.interop.saved import save
from tests.reliability import runs, test_save
from tests.reliability.test_save import Snapshots, quota, refused

pytestmark = pytest.mark.reliability


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ExportSource:
    return open_source(save(tmp_path_factory.mktemp("run"), layers=1))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_killed_at_every_line(source: ExportSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_save, "TRACED", tuple(str(m.__file__) for m in (module, arrays, shutil)))
    place = tmp_path / "place"
    place.mkdir()
    again = functools.partial(export, source, "hf", "float32", command="")
    with Snapshots(place, tmp_path / "snapshots") as snapshots:
        again(out=place / "out")
    whole = content(place)
    assert {name.partition("/")[0] for name in whole} == {"out"}
    assert len(snapshots.taken) > 8
    partial = []
    for snapshot in snapshots.taken:
        left = {name: text for name, text in content(snapshot).items() if not name.startswith(".out.")}
        assert left in ({}, whole), snapshot
        partial += [snapshot] if left == {} and list(snapshot.iterdir()) else []
    assert len(partial) > 5
    for snapshot in partial[:: max(1, len(partial) // 5)]:
        again(out=snapshot / "out")
        assert content(snapshot) == whole
        assert [p.name for p in snapshot.iterdir()] == ["out"]


def test_a_full_disk_at_twenty_places(source: ExportSource, tmp_path: Path) -> None:
    """No size is enough for the weights, so every export must fail: with one line, and nothing left."""
    export(source, "hf", "float32", tmp_path / "whole", "")
    size = (tmp_path / "whole" / "model.safetensors").stat().st_size
    for i in range(20):
        folder, room = tmp_path / str(i), size * i // 20
        with quota(max(1, room)):
            assert refused(lambda folder=folder: export(source, "hf", "float32", folder / "out", ""))
        assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_real_processes_killed_at_random(source: ExportSource, cache: Path, tmp_path: Path) -> None:
    run, moments = source.checkpoint.path.parents[1], random.Random(0)
    words = ["export", "--run", str(run), "--to", "hf", "--out", str(tmp_path / "out")]
    begin = time.monotonic()
    assert runs.complete(words, cache, runs.COMMANDS).returncode == 0
    seconds, whole = time.monotonic() - begin, content(tmp_path / "out")
    for _ in range(40):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        process = runs.start(words, cache, runs.COMMANDS)
        time.sleep(moments.uniform(0.6 * seconds, seconds))
        process.kill()
        process.communicate()
        assert not (tmp_path / "out").exists() or content(tmp_path / "out") == whole
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert runs.complete(words, cache, runs.COMMANDS).returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert content(tmp_path / "out") == whole
