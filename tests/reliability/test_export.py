"""An export that is killed or that the disk refuses leaves nothing half: the folder is whole or absent, and the next
export of the same name removes what a killed one has left beside it."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_jax.config import UserError
from moe_jax.interop import export as module
from moe_jax.interop.architectures import ExportTarget
from moe_jax.interop.export import export
from moe_jax.interop.html import write_html
from moe_jax.interop.imported_run import import_run
from moe_jax.interop.pretrained import Pretrained
from moe_jax.interop.source import open_source
from moe_jax.runs import arrays
from moe_jax.runs.load import LoadedRun
from moe_jax.training.quantize import quantize_run
from tests.interop.saved import save
from tests.reliability import test_save
from tests.reliability.test_save import Snapshots, quota, refused

pytestmark = pytest.mark.reliability


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("place"), layers=1)


def not_at_hand(run: LoadedRun, progress: bool = True) -> None:
    raise UserError("the text is not scored here")


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_killed_at_every_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_save, "TRACED", tuple(str(m.__file__) for m in (module, arrays, shutil)))
    place = tmp_path / "place"
    place.mkdir()
    again = functools.partial(export, open_source(run), "hf", "float32", command="")
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


def exported(to: ExportTarget) -> Callable[[Path, Path], object]:
    return lambda run, out: export(open_source(run), to, "float32", out, "")


COMMANDS: dict[str, Callable[[Path, Path], object]] = {
    "export --to hf": exported("hf"),
    "export --to safetensors": exported("safetensors"),
    "export --to gguf": exported("gguf"),
    "export --to html": write_html,
    "quantize": lambda run, out: quantize_run(run, "int8", out),
    "import": lambda run, out: import_run(Pretrained.open(run.with_name("hf"), "SOURCE"), "int4", 40, out),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_leaves_nothing(command: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No size is enough for the weights, so every command must fail: with one line that says what the disk said, and
    nothing left, so that it can be given again."""
    if command.endswith("gguf"):
        pytest.importorskip("gguf", reason="needs the extra `gguf`")
    if command == "import" and not (source := run.with_name("hf")).exists():
        export(open_source(run), "hf", "bfloat16", source, "")
    monkeypatch.setattr(LoadedRun, "validation_text", not_at_hand)
    place, again = tmp_path / "place", COMMANDS[command]
    again(run, tmp_path / "whole" / "out")
    size = max(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
    for i in range(10):
        with quota(max(1, size * i // 10)):
            assert refused(lambda: again(run, place / "out"))
        assert not (place / "out").exists()
        assert [path for path in place.rglob("*") if path.is_file()] == []
    again(run, place / "out")
