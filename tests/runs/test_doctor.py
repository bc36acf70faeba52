"""What the doctor finds in a mistreated run, and what it repairs. `tests/reliability` examines trained runs."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_jax.config import UserError, load_config
from moe_jax.runs import doctor, manifest
from moe_jax.runs.arrays import WEIGHTS
from moe_jax.runs.checkpoint import Checkpoint
from moe_jax.runs.doctor import Finding, examine
from moe_jax.runs.folder import locked_for_training
from moe_jax.runs.manifest import CheckpointCorrupted, CheckpointUnreadable
from moe_jax.system.folders import Folder
from tests.runs.test_checkpoint import flip_a_bit, largest_file
from tests.runs.test_load import edit_manifest
from tests.support import saved_run

NAME = f"step_{saved_run.STEP:08d}"
FILES = [NAME, "config.json", "tokenizer.json", "metrics.jsonl"]


def contents(run: Path) -> dict[str, bytes]:
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}


def found(run: Path, repair: bool = False) -> dict[str, Finding]:
    """The findings by their subject. What is only looked at does not change."""
    before = contents(run)
    findings = examine(run, repair)
    assert repair or contents(run) == before
    assert len({f.what for f in findings}) == len(findings)
    return {f.what: f for f in findings}


def second(run: Path, step: int = 50, **context: Any) -> Path:
    """A copy of the run's checkpoint under another step. Its arrays keep their digests."""
    old, new = run / "checkpoints" / NAME, run / "checkpoints" / f"step_{step:08d}"
    shutil.copytree(old, new)
    document = json.loads((new / manifest.NAME).read_text()) | {"step": step}
    document["context"] |= context
    (new / manifest.NAME).write_text(manifest.render(document))
    return new


# A whole run


def test_a_good_run(copied: Path) -> None:
    before = contents(copied)
    findings = examine(copied, repair=True)
    size = sum(len(content) for name, content in before.items() if NAME in name and not name.endswith(manifest.NAME))
    assert findings == [
        Finding(NAME, "good", f"loss 1.0000 on the validation subset, {size / 1e6:,.1f} MB"),
        *[Finding(name, "good") for name in FILES[1:3]],
        Finding("metrics.jsonl", "good", "5 records"),
    ]
    assert contents(copied) == before


def test_a_checkpoint_that_was_not_evaluated_says_so(copied: Path) -> None:
    path = copied / "checkpoints" / NAME / manifest.NAME
    path.write_text(manifest.render(json.loads(path.read_text()) | {"val_loss": None}))
    assert found(copied)[NAME].detail.startswith("not evaluated, ")


def test_a_folder_without_anything(tmp_path: Path) -> None:
    states = {f.what: (f.state, f.detail) for f in examine(tmp_path, repair=True)}
    assert list(states) == ["config.json", "tokenizer.json", "metrics.jsonl"]
    assert states["config.json"] == ("damaged", "No such file or directory")
    assert states["tokenizer.json"][0] == "damaged"
    assert "cannot be read" in states["tokenizer.json"][1]
    assert states["metrics.jsonl"] == ("good", "0 records")


# Checkpoints


def test_a_damaged_checkpoint_is_renamed_where_another_is_good(copied: Path) -> None:
    flip_a_bit(largest_file(second(copied) / "arrays"))  # not the weights, which can be written anew
    assert {what: f.state for what, f in found(copied).items()} == {
        **dict.fromkeys(FILES, "good"),
        "step_00000050": "damaged",
    }
    repaired = found(copied, repair=True)["step_00000050"]
    assert repaired.state == "repaired"
    assert repaired.detail.endswith("was changed: now called damaged_00000050")
    assert sorted(p.name for p in (copied / "checkpoints").iterdir()) == ["damaged_00000050", NAME]
    assert {f.state for f in examine(copied, repair=False)} == {"good"}


@pytest.mark.parametrize("where", ["manifest", "file", "array"])
def test_the_only_checkpoint_is_never_renamed(where: str, copied: Path) -> None:
    folder = copied / "checkpoints" / NAME
    if where == "manifest":
        flip_a_bit(folder / manifest.NAME)
    elif where == "file":
        flip_a_bit(largest_file(folder / "arrays"))
    else:  # all digests of files are right, and an array is not the one that was saved
        document = json.loads((folder / manifest.NAME).read_text())
        document["leaves"]["step"][2] = "0" * 32
        (folder / manifest.NAME).write_text(manifest.render(document))
    said = {"manifest": "its manifest was changed", "file": "was changed", "array": "step is not the array that was"}
    for repair in (False, True):
        finding = found(copied, repair)[NAME]
        assert finding.state == "damaged"
        assert said[where] in finding.detail
    assert [p.name for p in (copied / "checkpoints").iterdir()] == [NAME]


@pytest.mark.parametrize("harm", [flip_a_bit, Path.unlink], ids=["changed", "gone"])
def test_weights_are_written_anew_from_the_arrays(harm: Callable[[Path], None], copied: Path) -> None:
    path = copied / "checkpoints" / NAME / WEIGHTS
    whole = path.read_bytes()
    harm(path)
    assert found(copied)[NAME].state == "damaged"
    repaired = found(copied, repair=True)
    assert repaired[f"{NAME}/{WEIGHTS}"] == Finding(f"{NAME}/{WEIGHTS}", "repaired", "written anew from the arrays")
    assert repaired[NAME].state == "good"
    assert path.read_bytes() == whole


def test_weights_that_cannot_be_written_are_said_and_the_checkpoint_stays(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk. The arrays are good, so the checkpoint is not renamed beside a good one."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    flip_a_bit(second(copied) / WEIGHTS)
    monkeypatch.setattr(doctor, "write_weights", full)
    finding = found(copied, repair=True)["step_00000050"]
    assert finding.state == "damaged"
    assert finding.detail.endswith("was changed; not repaired (No space left on device)")
    assert (copied / "checkpoints/step_00000050").is_dir()


def test_an_error_while_weights_are_written_anew_is_of_its_checkpoint(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise CheckpointUnreadable("Input/output error")

    flip_a_bit(second(copied) / WEIGHTS)
    monkeypatch.setattr(doctor, "_rebuild_weights", refuse)
    findings = found(copied, repair=True)
    assert findings["step_00000050"] == Finding("step_00000050", "unreadable", "Input/output error")
    assert findings[NAME].state == "good"


def test_weights_and_another_file_are_too_much(copied: Path) -> None:
    folder = copied / "checkpoints" / NAME
    flip_a_bit(folder / WEIGHTS)
    flip_a_bit(folder / "arrays" / "_CHECKPOINT_METADATA")  # the arrays themselves can be read
    before = contents(copied)
    assert found(copied, repair=True)[NAME].state == "damaged"
    assert contents(copied) == before


def test_an_unreadable_checkpoint_is_left_alone_and_the_others_are_examined(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second(copied)
    true = manifest.file_digest

    def refuse(path: Path) -> str:
        if NAME in path.parts:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return true(path)

    monkeypatch.setattr(manifest, "file_digest", refuse)
    findings = found(copied, repair=True)
    assert (findings[NAME].state, findings["step_00000050"].state) == ("unreadable", "good")
    assert "Permission denied" in findings[NAME].detail
    assert (copied / "checkpoints" / NAME).exists()


def test_what_an_interrupted_save_left_is_removed(copied: Path) -> None:
    for name in ("tmp_00000050_1", "tmp_00000050_2"):
        (copied / "checkpoints" / name).mkdir()
    what, detail = "tmp_00000050_1, tmp_00000050_2", "left by a save that was interrupted"
    assert found(copied)[what] == Finding(what, "damaged", detail)
    assert found(copied, repair=True)[what] == Finding(what, "repaired", detail)
    assert [p.name for p in (copied / "checkpoints").iterdir()] == [NAME]


def test_a_checkpoint_of_another_run_is_said_and_left_alone(copied: Path) -> None:
    """And it is not the source of a repair."""
    second(copied, run_id="0" * 16, config=None)
    (copied / "tokenizer.json").unlink()
    before = contents(copied)
    finding = found(copied)["step_00000050"]
    assert finding.state == "foreign"
    assert "was saved by another run" in finding.detail
    assert contents(copied) == before
    assert found(copied, repair=True)["tokenizer.json"].state == "repaired"


def test_without_an_id_in_the_configuration_the_oldest_checkpoint_says_whose_run_it_is(copied: Path) -> None:
    second(copied, run_id="0" * 16)
    (copied / "config.json").unlink()
    findings = found(copied, repair=True)
    assert (findings[NAME].state, findings["step_00000050"].state) == ("good", "foreign")
    own = json.loads((copied / "checkpoints" / NAME / manifest.NAME).read_text())["context"]["run_id"]
    assert json.loads((copied / "config.json").read_text())["run_id"] == own


# Files


@pytest.mark.parametrize("text", [None, "{", "[]", '{"schema_version": 99}'])
def test_a_configuration_is_copied_from_the_newest_good_checkpoint(text: str | None, copied: Path) -> None:
    config = load_config(copied)
    path = copied / "config.json"
    path.unlink() if text is None else path.write_text(text)
    before = found(copied)["config.json"]
    assert before.state == "damaged"
    assert before.detail.endswith("; a good checkpoint holds a copy: --repair")
    assert found(copied, repair=True)["config.json"] == Finding(
        "config.json", "repaired", f"copied from {NAME}; the history of resumes is lost"
    )
    assert load_config(copied) == config
    assert json.loads(path.read_text())["history"] == []


def test_a_configuration_without_a_copy_stays_damaged(copied: Path) -> None:
    edit_manifest(copied, config=None)
    (copied / "config.json").write_text("{")
    for repair in (False, True):
        finding = found(copied, repair)["config.json"]
        assert (finding.state, "--repair" in finding.detail) == ("damaged", False)
    assert (copied / "config.json").read_text() == "{"


def test_a_run_of_an_earlier_version_gets_an_id_with_its_configuration(copied: Path) -> None:
    edit_manifest(copied, run_id=None)
    (copied / "config.json").unlink()
    assert found(copied, repair=True)["config.json"].state == "repaired"
    assert len(json.loads((copied / "config.json").read_text())["run_id"]) == 16


def other_tokenizer(path: Path) -> None:
    definition = {"kind": "bpe", "merges": [[97, 98]]}
    path.write_text(json.dumps(definition | {"digest": doctor_digest(definition)}))


def doctor_digest(definition: dict[str, Any]) -> str:
    from moe_jax.data import tokenizers

    return tokenizers._digest(definition)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (Path.unlink, "cannot be read"),
        (lambda path: path.write_text("{"), "not JSON"),
        (other_tokenizer, "not the one that the checkpoints were trained with"),
    ],
    ids=["gone", "cut", "other"],
)
def test_a_tokenizer_is_made_again_from_the_data(harm: Callable[[Path], None], said: str, copied: Path) -> None:
    path = copied / "tokenizer.json"
    whole = path.read_bytes()
    harm(path)
    finding = found(copied)["tokenizer.json"]
    assert finding.state == "damaged"
    assert said in finding.detail
    assert "made again" not in finding.detail
    assert found(copied, repair=True)["tokenizer.json"] == Finding(
        "tokenizer.json", "repaired", "made again from the data, and equal to the original"
    )
    assert path.read_bytes() == whole


def test_a_tokenizer_whose_text_is_gone_stays(copied: Path) -> None:
    """The error names a flag that nobody has typed, so it is the cause and not the end of the command."""
    document = json.loads((copied / "checkpoints" / NAME / manifest.NAME).read_text())
    config = document["context"]["config"]
    edit_manifest(copied, config=config | {"data": config["data"] | {"source": str(copied / "gone.txt")}})
    (copied / "tokenizer.json").unlink()
    finding = found(copied, repair=True)["tokenizer.json"]
    assert finding.state == "damaged"
    assert "; it cannot be made again (" in finding.detail
    assert "gone.txt" in finding.detail


def test_a_tokenizer_that_cannot_be_made_again_stays(copied: Path) -> None:
    edit_manifest(copied, tokenizer="of another text")
    before = contents(copied)
    finding = found(copied, repair=True)["tokenizer.json"]
    assert finding.state == "damaged"
    assert finding.detail.endswith("; a tokenizer made again from the data differs too")
    assert contents(copied) == before


def test_a_checkpoint_that_names_no_tokenizer_takes_any(copied: Path) -> None:
    edit_manifest(copied, tokenizer=None)
    other_tokenizer(copied / "tokenizer.json")
    assert found(copied)["tokenizer.json"] == Finding("tokenizer.json", "good")


def test_lines_that_are_no_records_are_removed(copied: Path) -> None:
    path = copied / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"no record\r\n" + whole.replace(b"\n", b"\r\n") + b'{"step": 3')
    assert found(copied)["metrics.jsonl"] == Finding("metrics.jsonl", "damaged", "2 of 7 lines are not records")
    repaired = found(copied, repair=True)["metrics.jsonl"]
    assert repaired == Finding("metrics.jsonl", "repaired", "2 of 7 lines are not records")
    assert path.read_bytes() == whole


@pytest.mark.parametrize("name", FILES[1:])
def test_a_file_that_the_system_refuses_is_unreadable(name: str, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left alone, and the other files are examined."""
    true = Folder.open

    def refuse(folder: Folder, file: str, *limit: Any) -> Any:
        if file == name and folder.path == copied:
            raise OSError(errno.EIO, os.strerror(errno.EIO), name)
        return true(folder, file, *limit)

    monkeypatch.setattr(Folder, "open", refuse)
    before = contents(copied)
    findings = found(copied, repair=True)
    assert findings[name] == Finding(name, "unreadable", "Input/output error")
    assert {f.state for what, f in findings.items() if what != name} == {"good"} or name == "config.json"
    assert contents(copied) == before


def test_a_folder_that_another_process_took_is_not_repaired(copied: Path) -> None:
    (copied / "metrics.jsonl").write_text("no record\n")
    with locked_for_training(copied) as lock:
        assert {f.state for f in examine(copied, False, lock)} == {"good", "damaged"}
        (copied / ".lock").unlink()
        with pytest.raises(UserError, match="removed or made anew"):
            examine(copied, True, lock)
    assert (copied / "metrics.jsonl").read_text() == "no record\n"


# Weights, without a whole run


@pytest.mark.parametrize("files", [{}, {WEIGHTS: [1, "digest"]}], ids=["without weights", "with weights"])
def test_weights_are_not_made_from_arrays_that_cannot_be_read(
    files: dict[str, list[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digests of all other files are right, and still the arrays do not open. The old file stays as it is."""

    def unreadable(*_: object) -> None:
        raise CheckpointCorrupted("the arrays do not open")

    monkeypatch.setattr(doctor.manifest, "verify_files", lambda *_: None)
    monkeypatch.setattr(doctor.manifest, "leaves_of", lambda _: {})
    monkeypatch.setattr(doctor, "read_arrays", unreadable)
    (tmp_path / WEIGHTS).write_bytes(b"old")
    assert doctor._rebuild_weights(Checkpoint(tmp_path, 1, None, 0.0, {"files": files})) is False
    assert (tmp_path / WEIGHTS).read_bytes() == b"old"
