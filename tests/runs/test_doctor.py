"""What the doctor finds in a mistreated run. It changes nothing."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_jax.data.tokenizers import Tokenizer
from moe_jax.runs import manifest
from moe_jax.runs.doctor import Finding, examine
from tests.support.saved_run import NAME, flip_a_bit, largest_file

FILES = ["config.json", "tokenizer.json"]


def contents(run: Path) -> dict[str, bytes]:
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}


def found(run: Path) -> dict[str, Finding]:
    """The findings by their subject."""
    before = contents(run)
    findings = examine(run)
    assert contents(run) == before
    return {f.what: f for f in findings}


def test_a_good_run_and_an_empty_folder(copied: Path, tmp_path: Path) -> None:
    folder = copied / "checkpoints" / NAME
    size = sum(size for size, _ in manifest.read(folder)["files"].values())
    assert list(found(copied).values()) == [
        Finding(NAME, "good", f"loss 1.0000 on the validation subset, {size / 1e6:,.1f} MB"),
        *[Finding(name, "good") for name in FILES],
    ]
    (empty := tmp_path / "empty").mkdir()
    assert [f.state for f in examine(empty)] == ["damaged", "damaged"]


def test_a_damaged_checkpoint_beside_a_good_one(copied: Path) -> None:
    new = copied / "checkpoints" / "step_00000050"
    shutil.copytree(copied / "checkpoints" / NAME, new)
    flip_a_bit(largest_file(new))
    assert {what: f.state for what, f in found(copied).items()} == {
        **dict.fromkeys([NAME, *FILES], "good"),
        "step_00000050": "damaged",
    }
    assert found(copied)["step_00000050"].detail.endswith("was changed")
    flip_a_bit(new / manifest.NAME)
    assert found(copied)["step_00000050"].detail == "its manifest was changed"


@pytest.mark.parametrize("text", [None, "{", "[]", '{"schema_version": 99}'])
def test_a_damaged_configuration(text: str | None, copied: Path) -> None:
    path = copied / "config.json"
    path.unlink() if text is None else path.write_text(text)
    assert found(copied)["config.json"].state == "damaged"


def other_tokenizer(path: Path) -> None:
    Tokenizer({"kind": "bpe", "merges": [[97, 98]]}, [bytes([i]) for i in range(256)] + [b"ab"], list).save(path)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (Path.unlink, "cannot be read"),
        (lambda path: path.write_text("{"), "not a tokenizer, so it is damaged"),
        (other_tokenizer, "not the one that the checkpoints were trained with"),
    ],
    ids=["gone", "cut", "other"],
)
def test_another_tokenizer_is_named(harm: Callable[[Path], Any], said: str, copied: Path) -> None:
    harm(copied / "tokenizer.json")
    finding = found(copied)["tokenizer.json"]
    assert (finding.state, said in finding.detail) == ("damaged", True)
