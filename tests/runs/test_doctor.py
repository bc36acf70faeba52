"""What the doctor finds in a mistreated run, and what it repairs. `tests/reliability` examines trained runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_jax.config import load_config
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.runs import manifest
from moe_jax.runs.doctor import Finding, examine
from tests.support.saved_run import NAME, edit_manifest, flip_a_bit, largest_file

FILES = [NAME, "config.json", "tokenizer.json"]


def contents(run: Path) -> dict[str, bytes]:
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}


def found(run: Path, repair: bool = False) -> dict[str, Finding]:
    """The findings by their subject. What is only looked at does not change."""
    before = contents(run)
    findings = examine(run, repair)
    assert repair or contents(run) == before
    return {f.what: f for f in findings}


def second(run: Path, **context: Any) -> Path:
    """A copy of the run's checkpoint as step 50. Its arrays keep their digests."""
    new = run / "checkpoints" / "step_00000050"
    shutil.copytree(run / "checkpoints" / NAME, new)
    document = json.loads((new / manifest.NAME).read_text()) | {"step": 50}
    document["context"] |= context
    (new / manifest.NAME).write_text(manifest.render(document))
    return new


def test_a_good_run_and_an_empty_folder(copied: Path, tmp_path: Path) -> None:
    before = contents(copied)
    size = sum(len(content) for name, content in before.items() if NAME in name and not name.endswith(manifest.NAME))
    assert examine(copied, repair=True) == [
        Finding(NAME, "good", f"loss 1.0000 on the validation subset, {size / 1e6:,.1f} MB"),
        *[Finding(name, "good") for name in FILES[1:3]],
    ]
    assert contents(copied) == before
    (empty := tmp_path / "empty").mkdir()
    assert [f.state for f in examine(empty, repair=True)] == ["damaged", "damaged"]


def test_a_damaged_checkpoint_is_renamed_where_another_is_good(copied: Path) -> None:
    flip_a_bit(largest_file(second(copied)))
    (copied / "checkpoints" / "tmp_00000060").mkdir()  # of an interrupted save
    assert {what: f.state for what, f in found(copied).items()} == {
        **dict.fromkeys(FILES, "good"),
        "step_00000050": "damaged",
        "tmp_00000060": "damaged",
    }
    repaired = found(copied, repair=True)
    assert repaired["step_00000050"].state == repaired["tmp_00000060"].state == "repaired"
    assert repaired["step_00000050"].detail.endswith("was changed: now called damaged_00000050")
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


@pytest.mark.parametrize("text", [None, "{", "[]", '{"schema_version": 99}'])
def test_a_configuration_is_copied_from_the_newest_good_checkpoint(text: str | None, copied: Path) -> None:
    config = load_config(copied)
    path = copied / "config.json"
    path.unlink() if text is None else path.write_text(text)
    before = found(copied)["config.json"]
    assert (before.state, before.detail.endswith("; a good checkpoint holds a copy: --repair")) == ("damaged", True)
    assert found(copied, repair=True)["config.json"] == Finding(
        "config.json", "repaired", f"copied from {NAME}; the history of resumes is lost"
    )
    assert load_config(copied) == config
    edit_manifest(copied, config=None)
    path.write_text("{")
    assert found(copied, repair=True)["config.json"].state == "damaged", "there is no copy"


def other_tokenizer(path: Path) -> None:
    Tokenizer({"kind": "bpe", "merges": [[97, 98]]}, [bytes([i]) for i in range(256)] + [b"ab"], list).save(path)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (Path.unlink, "cannot be read"),
        (lambda path: path.write_text("{"), "not JSON"),
        (other_tokenizer, "not the one that the checkpoints were trained with"),
    ],
    ids=["gone", "cut", "other"],
)
def test_another_tokenizer_is_named(harm: Callable[[Path], Any], said: str, copied: Path) -> None:
    harm(copied / "tokenizer.json")
    finding = found(copied)["tokenizer.json"]
    assert (finding.state, said in finding.detail) == ("damaged", True)
