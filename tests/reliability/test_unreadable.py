"""What the system refuses to read is not damaged, and permissions are named."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import pytest

from moe_jax.cli.command import check_run_folder
from moe_jax.config import UserError, holds_run, load_config
from moe_jax.runs.checkpoint import CheckpointStore
from moe_jax.runs.doctor import examine
from moe_jax.runs.records import read_metrics
from tests.reliability import states

pytestmark = pytest.mark.reliability


@pytest.fixture
def two(tmp_path: Path) -> CheckpointStore:
    """The checkpoints of steps 1 and 2."""
    store = CheckpointStore(tmp_path)
    states.save(store, 1, 3.0)
    states.save(store, 2)
    return store


@contextmanager
def refusing(ending: str, number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within this context the system refuses to open files whose path ends so. As root, permissions refuse nothing."""
    original = Path.open

    def refuse(path: Path, *arguments: Any, **more: Any) -> Any:
        if str(path).endswith(ending):
            raise OSError(number, os.strerror(number), str(path))
        return original(path, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        yield


ERRORS = [errno.ESTALE, errno.EIO, errno.EACCES]


@pytest.mark.parametrize("number", ERRORS, ids=[errno.errorcode[n] for n in ERRORS])
@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors", "arrays/_METADATA"])
def test_a_read_error_is_no_damage(
    name: str, number: int, two: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest checkpoint is whole. It is neither renamed nor passed over for the one before it."""
    before = {p: p.read_bytes() for p in states.files(two.folder)}
    with refusing(f"step_00000002/{name}", number, monkeypatch):
        for use in (lambda: two.restore_newest(jax.eval_shape(states.state), lambda _: None), two.newest):
            with pytest.raises(OSError, match="step_00000002") as caught:
                use()
            assert caught.value.errno == number
        states_of = {f.what: f.state for f in examine(two.folder.parent, repair=True)}
        assert (states_of["step_00000001"], states_of["step_00000002"]) == ("good", "unreadable")
    assert {p: p.read_bytes() for p in states.files(two.folder)} == before


def test_an_error_of_the_disk_in_the_arrays_is_no_damage(two: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensorstore says it in the text of its error."""
    import orbax.checkpoint as ocp

    def fail(*_: object, **__: object) -> None:
        raise ValueError('DATA_LOSS: Error opening "zarr" driver: read failed [OS error 5: EIO Input/output error]')

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", fail)
    with pytest.raises(OSError, match="Input/output error"):
        two.restore_newest(jax.eval_shape(states.state), lambda _: None)
    assert sorted(p.name for p in two.folder.iterdir()) == ["step_00000001", "step_00000002"]


def test_every_file_of_a_checkpoint_follows_the_umask(tmp_path: Path) -> None:
    """A file that its owner alone may read makes the checkpoint look damaged to others."""
    before = os.umask(0o022)
    try:
        path = states.save(CheckpointStore(tmp_path), 1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in states.files(path)} == {0o644}


@pytest.mark.parametrize("look", [holds_run, load_config, lambda run: check_run_folder(str(run))])
def test_an_unreadable_folder_is_not_called_empty(
    look: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To make a new run there would be the wrong answer."""
    states.save(CheckpointStore(tmp_path), 1)
    listdir = os.listdir

    def refuse(path: Any = ".") -> Any:
        if str(path).endswith("checkpoints"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UserError, match=r"checkpoints: cannot be read \(Permission denied\)"):
        look(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with refusing("metrics.jsonl", errno.EACCES, monkeypatch), pytest.raises(PermissionError):
        read_metrics(tmp_path)
