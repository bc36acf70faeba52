"""Manifests: which of them could have been written by a save, and which damage of the files they find."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from ml_dtypes import bfloat16

from moe_jax.runs import manifest
from moe_jax.runs.manifest import CheckpointCorrupted


def xxh3(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


DOCUMENT: dict[str, Any] = {
    "version": 3,
    "step": 7,
    "val_loss": 1.5,
    "elapsed": 2,
    "files": {"arrays/d/1": [3, "d"]},
    "leaves": {"step": [[], "int32", "d"], "params.w": [[2, 3], "float32", "d"]},
    "state": "s",
    "context": {},
    "versions": {},
}


def written(folder: Path, name: str = "step_00000007", **changes: Any) -> Path:
    """A folder with a manifest whose digest is right."""
    (folder / name).mkdir()
    (folder / name / manifest.NAME).write_text(manifest.render(DOCUMENT | changes))
    return folder / name


@pytest.mark.parametrize(
    "array",
    [np.arange(6, dtype=np.float32).reshape(2, 3).T, np.int32(7), np.zeros((0, 3)), np.ones((2, 2), bfloat16)],
    ids=["matrix", "scalar", "empty", "bfloat16"],
)
def test_an_arrays_digest_is_of_its_bytes_in_the_order_c(array: Any) -> None:
    assert manifest.array_digest(array) == xxh3(np.asarray(array).tobytes())


def test_the_state_is_one_digest_of_all_leaves() -> None:
    one, two = np.arange(3, dtype=np.int32), np.ones((2, 1), np.float32)
    found = manifest.describe_leaves({"b": two, "a": one})
    assert found == manifest.describe_leaves({"a": one, "b": two})
    assert found["leaves"]["b"] == [[2, 1], "float32", xxh3(two.tobytes())]
    others = [{"a": one, "c": two}, {"a": one, "b": two + 1}, {"a": one, "b": two.reshape(1, 2)}, {"a": one}]
    assert len({found["state"], *(manifest.describe_leaves(other)["state"] for other in others)}) == 5


def test_a_manifest_ends_with_the_digest_of_the_rest(tmp_path: Path) -> None:
    text = manifest.render({"step": 1, "digest": "of earlier", "val_loss": None})
    body = '{\n "step": 1,\n "val_loss": null\n}'
    assert json.loads(text) == {"step": 1, "val_loss": None, "digest": xxh3(body.encode())}
    assert manifest.read(written(tmp_path)) == DOCUMENT | {"digest": json.loads(manifest.render(DOCUMENT))["digest"]}
    assert manifest.leaves_of(DOCUMENT)["params.w"] == manifest.Leaf((2, 3), "float32", "d")


UNUSUAL = "not what this program writes"
ODD: list[tuple[dict[str, Any], str]] = [
    *[({key: None}, UNUSUAL) for key in ("step", "elapsed", "files", "leaves", "context")],
    *[({"val_loss": odd}, UNUSUAL) for odd in ("1.5", 1e19, math.nan)],
    *[(odd, UNUSUAL) for odd in ({"step": 7.0}, {"elapsed": 2**63})],
    ({"step": 8}, "it is a copy of step 8"),
    *[({"files": {"b": [1, "d"], "a": odd}}, UNUSUAL) for odd in ([1], [1, "d", 2], [True, "d"], "xyz", [1.0, "d"])],
    ({"leaves": {"w": [[2**38, 2], "float32", "d"]}}, UNUSUAL),
    *[
        ({"leaves": {"a": [[], "int32", "d"], "w": odd}}, UNUSUAL)
        for odd in (
            *([[1] * 33, "float32", "d"], [[2**40 + 1, 0], "float32", "d"], [[-1], "float32", "d"]),
            *([[True], "float32", "d"], [[2.0], "float32", "d"], [2, "float32", "d"], [[2], "float128", "d"]),
            *([[2], ["float32"], "d"], [[2], "float32"], "x"),
        )
    ],
    ({"version": 4}, "of version 4, this program reads 3"),
]


@pytest.mark.parametrize(("odd", "said"), ODD, ids=lambda value: str(value)[:60])
def test_what_no_save_writes_is_refused(odd: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Its digest is right, as someone who means harm would write it."""
    with pytest.raises(CheckpointCorrupted, match=said):
        manifest.read(written(tmp_path, **odd))


def test_a_changed_a_long_and_a_linked_manifest_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path)
    path = folder / manifest.NAME
    text = path.read_text()
    for changed in (text.replace("1.5", "1.6"), text + "\n", "", "{", "[]", "7", "[" * 10**5, '{"version": 3}', "\xff"):
        path.write_bytes(changed.encode("latin-1"))
        with pytest.raises(CheckpointCorrupted, match="its manifest was changed"):
            manifest.read(folder)
    path.write_text(text)
    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", len(text) - 1)
    with pytest.raises(CheckpointCorrupted, match=rf"cannot be read \(has {len(text):,} bytes"):
        manifest.read(folder)
    monkeypatch.undo()
    (tmp_path / "step_00000009").symlink_to(folder)
    with pytest.raises(CheckpointCorrupted, match="is a link"):
        manifest.read(tmp_path / "step_00000009")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointCorrupted, match="is a link"):
        manifest.read(folder)
    path.unlink()
    with pytest.raises(CheckpointCorrupted, match="its manifest cannot be read"):
        manifest.read(folder)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("plain", "arrays/d/1", "weights.safetensors"):
        (tmp_path / "step" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "step" / name).write_bytes(name.encode())
    return tmp_path / "step"


def damage(folder: Path, expected: dict[str, Any]) -> str | None:
    return manifest.verify_files(folder, {"files": expected})


@pytest.mark.parametrize("name", ["arrays/d/1", "weights.safetensors"])
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (Path.unlink, "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[::-1]), "was changed"),
        (lambda path: path.write_bytes(b""), "was changed"),
    ],
    ids=["missing", "changed", "empty"],
)
def test_the_first_damage_is_named(name: str, harm: Any, said: str, files: Path) -> None:
    expected = manifest.describe_files(files)
    (files / "unknown").write_bytes(b"not in the manifest")
    assert damage(files, expected) is None
    harm(files / name)
    words = str(damage(files, expected))
    assert name.rpartition("/")[2] in words
    assert said in words


def test_links_that_the_manifest_does_not_name_and_names_outside_are_refused(files: Path, tmp_path: Path) -> None:
    """Orbax would follow the link. A name may not lead out of the folder."""
    (tmp_path / "outside").write_bytes(b"secret")
    for name in ("../outside", str(tmp_path / "outside"), "arrays/../../outside"):
        assert "outside of its folder" in str(damage(files, {name: [6, xxh3(b"secret")]}))
    expected = manifest.describe_files(files)
    (files / "arrays" / "link").symlink_to(tmp_path / "outside")
    assert damage(files, expected) == "arrays/link is a link"


def test_no_file_is_read_before_all_sizes_are_right(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = manifest.describe_files(files)
    monkeypatch.setattr(manifest, "file_digest", lambda path: pytest.fail(f"{path} was read"))
    (files / "weights.safetensors").write_bytes(b"")
    assert damage(files, expected) == "weights.safetensors was changed"
    assert damage(files / "nowhere", expected) == "1 is missing"
