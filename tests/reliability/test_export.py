"""An export that is killed or that the disk refuses leaves nothing half: the folder is whole or absent, and the next
export of the same name removes what a killed one has left beside it."""

import functools
import shutil
from pathlib import Path

import pytest

from moe_jax.interop import export as module
from moe_jax.interop.export import export
from moe_jax.interop.source import ExportSource, open_source
from moe_jax.runs import arrays
from tests.interop.saved import save
from tests.reliability import test_save
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
