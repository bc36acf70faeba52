"""What the system refuses to read is not damaged, steps are numbers, and permissions are named."""

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import pytest

from moe_jax.cli.command import check_run_folder
from moe_jax.config import ConfigError, DataConfig, UserError, holds_run, load_config
from moe_jax.data.baselines import corpus_baselines
from moe_jax.data.token_store import prepare_token_store
from moe_jax.runs.checkpoint import CheckpointStore
from moe_jax.runs.doctor import examine
from moe_jax.runs.folder import RunFolder
from moe_jax.runs.records import read_metrics, read_snapshots
from moe_jax.runs.verify_resume import fingerprint
from tests.reliability import states
from tests.support import saved_run

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
    original, io_open = os.open, Path.open

    def refuse(path: Any, *arguments: Any, dir_fd: int | None = None, **more: Any) -> int:
        whole = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path) if dir_fd is not None else str(path)
        if whole.endswith(ending):
            raise OSError(number, os.strerror(number), str(path))
        return original(path, *arguments, dir_fd=dir_fd, **more)

    def refuse_path(path: Path, *arguments: Any, **more: Any) -> Any:
        if str(path).endswith(ending):
            raise OSError(number, os.strerror(number), str(path))
        return io_open(path, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        patch.setattr(Path, "open", refuse_path)
        yield


ERRORS = [errno.ESTALE, errno.EIO, errno.EACCES]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds the path of a descriptor in /proc")
@pytest.mark.parametrize("number", ERRORS, ids=[errno.errorcode[n] for n in ERRORS])
@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors", "arrays/_METADATA"])
def test_a_read_error_is_no_damage(name: str, number: int, two: CheckpointStore, monkeypatch) -> None:
    """The newest checkpoint is whole. It is neither renamed nor passed over for the one before it."""
    before = {p: p.read_bytes() for p in states.files(two.folder)}
    with refusing(f"step_00000002/{name}", number, monkeypatch):
        for use in (
            lambda: two.restore_newest(jax.eval_shape(states.state), lambda _: None),
            lambda: two.newest(),
            lambda: CheckpointStore(two.folder.parent).best() if name == "manifest.json" else two.newest(),
        ):
            with pytest.raises(UserError, match=os.strerror(number)) as caught:
                use()
            assert "\n" not in str(caught.value)
            assert "step_00000002" in str(caught.value)
        found = {f.what: f.state for f in examine(two.folder.parent, repair=True)}
        assert (found["step_00000001"], found["step_00000002"]) == ("good", "unreadable")
    assert {p: p.read_bytes() for p in states.files(two.folder)} == before
    assert two.newest().step == 2


def test_an_error_of_the_disk_in_the_arrays_is_no_damage(two: CheckpointStore, monkeypatch) -> None:
    """Tensorstore says it in the text of its error."""
    import orbax.checkpoint as ocp

    def fail(*_: object, **__: object) -> None:
        raise ValueError('DATA_LOSS: Error opening "zarr" driver: read failed [OS error 5: EIO Input/output error]')

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", fail)
    with pytest.raises(UserError, match="Input/output error"):
        two.restore_newest(jax.eval_shape(states.state), lambda _: None)
    assert sorted(p.name for p in two.folder.iterdir()) == ["step_00000001", "step_00000002"]


def test_a_checkpoint_set_aside_stays_when_another_is(two: CheckpointStore) -> None:
    """`doctor --help`: damaged checkpoints are renamed, never removed."""
    for number in range(3):
        folder = states.save(two, 3)
        (folder / "weights.safetensors").write_bytes(str(number).encode())
        two.say = lambda _: None
        restored = two.restore_newest(jax.eval_shape(states.state), lambda _: None)
        assert restored is not None
        assert restored[0].step == 2
    aside = sorted(p for p in two.folder.iterdir() if p.name.startswith("damaged_"))
    assert [p.name for p in aside] == ["damaged_00000003", "damaged_00000003.2", "damaged_00000003.3"]
    assert [(p / "weights.safetensors").read_text() for p in aside] == ["0", "1", "2"]


# Nine digits


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    """As text, step_100000000 comes before step_99999999, and was removed right after it was saved."""
    store = CheckpointStore(tmp_path, say=lambda _: None)
    for step in (99_999_998, 99_999_999, 100_000_000, 100_000_001):
        states.save(store, step)
    assert [c.step for c in store.list()] == [100_000_000, 100_000_001]
    assert store.newest().step == 100_000_001
    assert store.best().step == 100_000_001
    (store.folder / "step_100000001" / "weights.safetensors").write_bytes(b"")
    assert store.restore_newest(jax.eval_shape(states.state), lambda _: None)[0].step == 100_000_000
    assert (store.folder / "damaged_100000001").is_dir()


def test_a_damaged_checkpoint_of_eight_digits_is_newer_than_none_of_nine(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, say=lambda _: None)
    for step in (99_999_999, 100_000_000):
        states.save(store, step)
    (store.folder / "step_99999999" / "weights.safetensors").write_bytes(b"")
    store.restore_newest(jax.eval_shape(states.state), lambda _: None)
    assert (store.folder / "step_99999999").is_dir(), "an older one is left alone"


def test_traces_and_findings_of_nine_digits(tmp_path: Path) -> None:
    run = saved_run.save_run(tmp_path)
    trace = json.loads((run / "traces" / "step_00000040.json").read_text())
    for step in (99_999_999, 100_000_000):
        (run / "traces" / f"step_{step}.json").write_text(json.dumps(trace | {"step": step}))
    assert [t["step"] for t in read_snapshots(run)] == [20, 40, 99_999_999, 100_000_000]
    RunFolder(run).truncate_logs_after(99_999_999, 99_999_999)
    assert [t["step"] for t in read_snapshots(run)] == [20, 40, 99_999_999]
    store = CheckpointStore(run)
    for step in (99_999_999, 100_000_000):
        states.save(store, step)
    assert [f.what for f in examine(run, repair=False)][-5:-3] == ["step_99999999", "step_100000000"]
    (run / "samples.txt").write_text("")
    assert next(iter(fingerprint(run))) == "step 100000000"
    with pytest.raises(ConfigError, match=r"--step 7: .* it has 40, 99999999, 100000000"):
        check_run_folder(str(run), 7)


@pytest.mark.parametrize("name", ["step_²²²²²²²²", "step_1", "step_000000012", "step_99999999x", "step_٣٣٣٣٣٣٣٣"])
def test_other_names_are_no_steps(name: str, two: CheckpointStore) -> None:
    shutil.copytree(two.folder / "step_00000002", two.folder / name)
    assert [c.step for c in two.list()] == [1, 2]
    with pytest.raises(ConfigError, match=r"it has 1, 2$"):
        check_run_folder(str(two.folder.parent), 7)


# Permissions


def test_every_file_of_a_checkpoint_follows_the_umask(tmp_path: Path) -> None:
    """weights.safetensors was readable by its owner alone: to others, every checkpoint looked damaged."""
    before = os.umask(0o022)
    try:
        path = states.save(CheckpointStore(tmp_path), 1)
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in states.files(path)}
    assert set(modes.values()) == {0o644}, modes
    assert (path / "weights.safetensors").exists()


@pytest.mark.parametrize("look", [holds_run, load_config, lambda run: check_run_folder(str(run))])
def test_an_unreadable_folder_is_not_called_empty(look: Callable[[Path], Any], tmp_path: Path, monkeypatch) -> None:
    """To make a new run there would be the wrong answer."""
    states.save(CheckpointStore(tmp_path), 1)
    scandir, listdir = os.scandir, os.listdir

    def refuse(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def listed(path: Any = ".") -> Any:
            whole = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)
            if whole.endswith("checkpoints"):
                raise PermissionError(errno.EACCES, "Permission denied", whole)
            return original(path)

        return listed

    monkeypatch.setattr(os, "scandir", refuse(scandir))
    monkeypatch.setattr(os, "listdir", refuse(listdir))
    with pytest.raises(UserError, match=r"checkpoints: cannot be read \(Permission denied\)"):
        look(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds the path of a descriptor in /proc")
def test_unreadable_metrics_are_not_missing(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with refusing("metrics.jsonl", errno.EACCES, monkeypatch), pytest.raises(PermissionError):
        read_metrics(tmp_path)


def test_a_whole_cache_that_cannot_be_written_is_usable(tmp_path: Path, monkeypatch) -> None:
    """Of another user, or on a disk that is mounted to be read."""
    data = DataConfig(source="stories", tokenizer="bpe", vocab_size=300, stories=60)
    cache = tmp_path / "cache"
    before = prepare_token_store(data, cache=cache, progress=False)
    baselines = corpus_baselines(data, before)
    (before.folder / "references.json").unlink()
    original = os.open

    def refuse(path: Any, flags: int, *arguments: Any, **more: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return original(path, flags, *arguments, **more)

    path_open = Path.open

    def refuse_path(path: Path, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        return path_open(path, mode, *arguments, **more) if mode in ("r", "rb") else refuse(path, os.O_WRONLY)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "mkdir", lambda path, **_: None if path.exists() else refuse(path, os.O_WRONLY))
    monkeypatch.setattr(Path, "open", refuse_path)
    after = prepare_token_store(data, cache=cache, progress=False)
    assert after.digest == before.digest
    assert corpus_baselines(data, after) == baselines
