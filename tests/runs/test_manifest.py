"""Manifests: which of them could have been written by a save, and which damage of the files they find."""

import json
from pathlib import Path
from typing import Any

import pytest
import xxhash

from moe_jax.runs import manifest
from moe_jax.runs.manifest import CheckpointCorrupted

DOCUMENT: dict[str, Any] = {
    "version": 4,
    "step": 7,
    "val_loss": 1.5,
    "elapsed": 2,
    "files": {"arrays/d/1": [3, "d"]},
    "context": {},
    "versions": {},
}


def written(folder: Path, **changes: Any) -> Path:
    """A folder with a manifest whose digest is right."""
    manifest.write(folder, DOCUMENT | changes)
    return folder


def test_a_manifest_ends_with_the_digest_of_the_rest(tmp_path: Path) -> None:
    text = manifest.render({"step": 1, "digest": "of earlier", "val_loss": None})
    body = '{\n "step": 1,\n "val_loss": null\n}'
    digest = xxhash.xxh3_128_hexdigest(body.encode())
    assert json.loads(text) == {"step": 1, "val_loss": None, "digest": digest}
    assert manifest.read(written(tmp_path)).items() >= DOCUMENT.items()
    assert manifest.read(written(tmp_path, version=3, leaves={}))["version"] == 3


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"files": {"../outside": [1, "d"]}}, "outside of its folder"),
        ({"files": {"/etc/hostname": [1, "d"]}}, "outside of its folder"),
        ({"version": 2}, "of version 2, this program reads 4"),
    ],
    ids=str,
)
def test_what_no_save_writes_is_refused(odd: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Its digest is right, as someone who means harm would write it."""
    with pytest.raises(CheckpointCorrupted, match=said):
        manifest.read(written(tmp_path, **odd))


def test_a_changed_and_a_missing_manifest_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path) / manifest.NAME
    text = path.read_text()
    for changed in (text.replace("1.5", "1.6"), text + "\n", "", "{", "[]", "7", "[" * 10**5, '{"version": 4}', "\xff"):
        path.write_bytes(changed.encode("latin-1"))
        with pytest.raises(CheckpointCorrupted, match="its manifest was changed"):
            manifest.read(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointCorrupted, match="its manifest is missing"):
        manifest.read(tmp_path)
