"""One run, one process, one folder: locks, settings that do not fit, and nothing written anywhere else."""

import dataclasses
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from moe_jax.config import ModelConfig, RoutingConfig, RunConfig, UserError, load_config
from moe_jax.config.model import MESH_ROUTING
from moe_jax.config.section import typed
from moe_jax.training.session import Session
from tests.reliability import runs
from tests.reliability.test_save import small_disk
from tests.support.saved_run import resuming

pytestmark = pytest.mark.reliability


def test_two_processes_on_one_folder_and_a_killed_one(
    text: Path, cache: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The second is told who trains there, and the first does not notice. A killed process leaves no lock."""
    out = tmp_path / "run"
    first = runs.start(runs.flags(text, out), cache)
    while not (out / ".lock").exists() or not (out / ".lock").read_text().strip():
        time.sleep(0.01)
    second = runs.complete(runs.flags(text, out), cache)
    assert second.returncode == 1, second.stderr
    assert second.stderr == (
        f"error: --out {out}: process {first.pid} is training there; wait for it, or name another folder\n"
    )
    while first.poll() is None and not (out / "metrics.jsonl").exists():
        time.sleep(0.01)
    first.kill()
    first.communicate()
    resumed = runs.complete([*runs.flags(text, out), "--resume"], cache)
    assert resumed.returncode == 0, resumed.stderr
    assert runs.result(out) == whole[1]


def test_a_read_only_disk(text: Path, whole: tuple[Path, dict[str, Any]], cache: Path, tmp_path: Path) -> None:
    """A run there can be looked at and made to tell stories. To go on with it, or to begin one, is refused at once."""
    disk = tmp_path / "disk"
    with small_disk(disk, 2**26):
        shutil.copytree(whole[0], disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        looked = runs.complete(["doctor", "--run", str(disk / "run")], cache, runs.COMMANDS)
        told = runs.complete(["generate", "--run", str(disk / "run"), "--max-tokens", "5"], cache, runs.COMMANDS)
        more = runs.complete(["--out", str(disk / "run"), "--resume", "--steps", "14"], cache)
        new = runs.complete(runs.flags(text, disk / "new"), cache)
    assert looked.returncode == 0, looked.stdout + looked.stderr
    assert told.returncode == 0, told.stderr
    for refused in (more, new):
        assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1), refused.stderr
        assert "cannot be written (Read-only file system)" in refused.stderr


def tree(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def test_nothing_is_written_outside_the_run_and_the_caches(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HOME, the working folder and the folder of temporary files stay as they were."""
    for name in ("home", "cache", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    before = tree(text.parent)
    finished = runs.complete(runs.flags(text, tmp_path / "run"), tmp_path / "cache")
    assert finished.returncode == 0, finished.stderr
    outside = tree(tmp_path / "home") | tree(tmp_path / "tmp") | (tree(text.parent) - before)
    assert outside == set()
    assert {p.name for p in tmp_path.iterdir()} == {"home", "cache", "tmp", "run"}


OTHER: dict[str, Any] = {
    "seq_len": 32,
    "width": 32,
    "heads": 1,
    "kv_heads": 2,
    "head_size": 8,
    "experts": 8,
    "top_k": 1,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
"""Of the fields whose neighbouring value another field forbids."""


FIELDS = {
    f"{section}.{f.name}": f
    for section, owner in (("model", ModelConfig), ("routing", RoutingConfig))
    for f in dataclasses.fields(owner)
    if f.name not in ("routing", MESH_ROUTING)
}
"""Of the model and of its routing policy, but for the one that matters on a mesh only: that one may change."""


def edited(run: Path, field: str, value: Any) -> RunConfig:
    """The settings of a run after somebody wrote another value of a field into its `config.json`."""
    document = json.loads((run / "config.json").read_text())
    section, name = field.split(".")
    document[section][name] = value
    (run / "config.json").write_text(json.dumps(document))
    config = load_config(run)
    assert config is not None
    return config


def other(name: str, kind: Any, value: Any) -> Any:
    """A value that the field may have too."""
    if name in OTHER:
        return OTHER[name]
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != value)
    return not value if isinstance(value, bool) else value + 1


@pytest.mark.parametrize("field", FIELDS)
def test_a_checkpoint_of_another_model(
    field: str, whole: tuple[Path, dict[str, Any]], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody edited config.json. The error names the flag of the field, both values, and what to do."""
    monkeypatch.setenv("MOE_JAX_CACHE", str(cache))
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    section, name = field.split(".")
    there = json.loads((run / "config.json").read_text())[section][name]
    here = other(name, FIELDS[field].type, there)
    config = edited(run, field, here)
    with pytest.raises(UserError) as caught:
        Session.open(dataclasses.replace(config, out=str(run)), resuming(config))
    message = str(caught.value)
    assert message.startswith(f"{typed(section, name, here)}: ")
    assert f" was saved with {there}; " in message
    assert "start a new run with another --out" in message
