"""Manifests: which of them could have been written by a save, and which damage of the files they find."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from ml_dtypes import bfloat16

from moe_jax.runs import manifest
from moe_jax.runs.manifest import CheckpointCorrupted, CheckpointUnreadable
from moe_jax.system.folders import Folder


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


# Digests


@pytest.mark.parametrize(
    "array",
    [np.arange(6, dtype=np.float32).reshape(2, 3), np.int32(7), np.zeros((0, 3)), np.ones((2, 2), bfloat16)],
    ids=["matrix", "scalar", "empty", "bfloat16"],
)
def test_an_arrays_digest_is_of_its_bytes(array: Any) -> None:
    assert manifest.array_digest(array) == xxh3(np.asarray(array).tobytes())


def test_an_arrays_digest_is_of_the_order_c() -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert manifest.array_digest(np.asfortranarray(matrix)) == manifest.array_digest(matrix)
    assert manifest.array_digest(matrix.T) == manifest.array_digest(np.ascontiguousarray(matrix.T))


@pytest.mark.parametrize("size", [0, 3, 4, 5, 8, 9])
def test_a_files_digest_is_of_all_its_bytes(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever part of it fits into one read."""
    monkeypatch.setattr(manifest, "_CHUNK", 4)
    (tmp_path / "file").write_bytes(bytes(range(size)))
    assert manifest.file_digest(tmp_path / "file") == xxh3(bytes(range(size)))


def test_files_are_described_below_their_folder_in_order(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "b").write_bytes(b"two")
    (tmp_path / "a").write_bytes(b"one1")
    found = manifest.describe_files(tmp_path)
    assert list(found.items()) == [("a", [4, xxh3(b"one1")]), ("inner/b", [3, xxh3(b"two")])]


def test_the_state_is_one_digest_of_all_leaves() -> None:
    one, two = np.arange(3, dtype=np.int32), np.ones((2, 1), np.float32)
    found = manifest.describe_leaves({"b": two, "a": one})
    assert found == manifest.describe_leaves({"a": one, "b": two})
    assert list(found["leaves"]) == ["a", "b"]
    assert found["leaves"]["b"] == [[2, 1], "float32", xxh3(two.tobytes())]
    others = [{"a": one, "c": two}, {"a": one, "b": two + 1}, {"a": one, "b": two.reshape(1, 2)}, {"a": one}]
    assert len({found["state"], *(manifest.describe_leaves(other)["state"] for other in others)}) == 5


def test_a_manifest_ends_with_the_digest_of_the_rest() -> None:
    text = manifest.render({"step": 1, "digest": "of earlier", "val_loss": None})
    body = '{\n "step": 1,\n "val_loss": null\n}'
    assert json.loads(text) == {"step": 1, "val_loss": None, "digest": xxh3(body.encode())}
    assert text == f'{body[:-2]},\n "digest": "{xxh3(body.encode())}"\n}}\n', "earlier manifests are compared with it"


# Reading


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert manifest.read(written(tmp_path)) == DOCUMENT | {
        "digest": json.loads(manifest.render(DOCUMENT))["digest"],
        "context": {},
    }
    assert manifest.leaves_of(DOCUMENT)["params.w"] == manifest.Leaf((2, 3), "float32", "d")


@pytest.mark.parametrize(
    "usual",
    [
        {"val_loss": None},
        {"val_loss": -1},
        {"elapsed": 0.5},
        {"elapsed": 2**63 - 1},
        {"leaves": {"w": [[2**38], "float32", "d"]}},  # 2**40 bytes
        {"leaves": {"w": [[2**40, 0], "float32", "d"]}},
        {"leaves": {"w": [[1] * 32, "bool", "d"]}},
        {"leaves": {}},
        {"files": {"a": [2**40, "d"]}},
        {"files": {}},
    ],
    ids=lambda usual: str(usual)[:50],
)
def test_what_a_save_can_write_is_read(usual: dict[str, Any], tmp_path: Path) -> None:
    assert manifest.read(written(tmp_path, **usual)).items() >= usual.items()


@pytest.mark.parametrize(
    "dtype",
    ["bool", "bfloat16", "float16", "float32", "float64"]
    + [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)],
)
def test_every_type_of_a_model_is_read(dtype: str, tmp_path: Path) -> None:
    leaves = {"w": [[1], dtype, "d"]}
    assert manifest.read(written(tmp_path, leaves=leaves))["leaves"] == leaves


KEYS = ("version", "step", "elapsed", "state", "files", "leaves", "context", "versions")
ODD: list[tuple[dict[str, Any], str]] = [
    *[({key: None}, "version None|no usable" if key != "version" else "usable") for key in KEYS],
    *[({key: True}, "usable|version") for key in KEYS],
    ({"val_loss": "1.5"}, "no usable 'val_loss'"),
    ({"step": 7.0}, "no usable 'step'"),
    ({"elapsed": 2**63}, "no usable 'elapsed'"),
    ({"elapsed": -(2**63)}, "no usable 'elapsed'"),
    ({"val_loss": 1e19}, "no usable 'val_loss'"),
    ({"val_loss": math.nan}, "no usable 'val_loss'"),
    ({"step": 8}, "it is a copy of step 8"),
    ({"files": {"a": [1]}}, "no usable 'files'"),
    ({"files": {"a": [1, "d", 2]}}, "no usable 'files'"),
    ({"files": {"a": ["1", "d"]}}, "no usable 'files'"),
    ({"files": {"a": [True, "d"]}}, "no usable 'files'"),
    ({"files": {"a": "1d"}}, "no usable 'files'"),
    ({"files": {"b": [1, "d"], "a": [1.0, "d"]}}, "no usable 'files'"),
    ({"files": {"a": [2**40, "d"], "b": [1, "d"]}}, "more than 1,099,511,627,776 bytes"),
    ({"leaves": {"w": [[2**38, 2], "float32", "d"]}}, "more than 1,099,511,627,776 bytes"),
    ({"leaves": {"w": [[2**38 + 1], "float32", "d"]}}, "more than 1,099,511,627,776 bytes"),
    ({"leaves": {"a": [[], "int32", "d"], "w": [[1] * 33, "float32", "d"]}}, "no usable entry for w"),
    ({"leaves": {"w": [[2**40 + 1, 0], "float32", "d"]}}, "no usable entry for w"),
    ({"leaves": {"w": [[-1], "float32", "d"]}}, "no usable entry for w"),
    ({"leaves": {"w": [[True], "float32", "d"]}}, "no usable entry for w"),
    ({"leaves": {"w": [[2.0], "float32", "d"]}}, "no usable entry for w"),
    ({"leaves": {"w": [2, "float32", "d"]}}, "no usable entry for w"),
    ({"leaves": {"w": [[2], "float128", "d"]}}, "no usable entry for w"),
    ({"leaves": {"w": [[2], ["float32"], "d"]}}, "no usable entry for w"),
    ({"leaves": {"w": [[2], "float32", 3]}}, "no usable entry for w"),
    ({"leaves": {"w": [[2], "float32"]}}, "no usable entry for w"),
    ({"leaves": {"w": [[2], "float32", "d", "d"]}}, "no usable entry for w"),
    ({"leaves": {"w": {"a": 1, "b": 2, "c": 3}}}, "no usable entry for w"),
    ({"leaves": {"w" * 100: "abc"}}, f"no usable entry for {'w' * 80}$"),
    ({"version": 4}, "of version 4, this program reads 2 and 3"),
]


@pytest.mark.parametrize(("odd", "said"), ODD, ids=lambda value: str(value)[:60])
def test_what_no_save_writes_is_refused(odd: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Its digest is right, as someone who means harm would write it."""
    with pytest.raises(CheckpointCorrupted, match=said):
        manifest.read(written(tmp_path, **odd))


@pytest.mark.parametrize("key", [*KEYS, "val_loss"])
def test_every_key_must_be_there(key: str, tmp_path: Path) -> None:
    document = {k: v for k, v in DOCUMENT.items() if k != key}
    folder = written(tmp_path)
    (folder / manifest.NAME).write_text(manifest.render(document))
    if key == "val_loss":  # an absent one reads as null
        assert "val_loss" not in manifest.read(folder)
        return
    with pytest.raises(CheckpointCorrupted, match=f"no usable '{key}'"):
        manifest.read(folder)


def test_a_folder_of_another_kind_may_have_another_name(tmp_path: Path) -> None:
    """A checkpoint that is being replaced is still the checkpoint of its step, and a damaged one has no step."""
    assert manifest.read(written(tmp_path, "step_00000007.replaced"))["step"] == 7
    assert manifest.read(written(tmp_path, "damaged_00000003"))["step"] == 7
    with pytest.raises(CheckpointCorrupted, match="it is a copy of step 7"):
        manifest.read(written(tmp_path, "step_00000008.replaced"))


def test_a_changed_a_long_and_a_linked_manifest_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path)
    path = folder / manifest.NAME
    text = path.read_text()
    for changed in (text.replace("1.5", "1.6"), text + "\n", "", "{", "[]", "7", "[" * 10**5, '{"version": 3}'):
        path.write_text(changed)
        with pytest.raises(CheckpointCorrupted, match="its manifest was changed"):
            manifest.read(folder)
    path.write_bytes(b"\xff")
    with pytest.raises(CheckpointCorrupted, match="its manifest was changed"):
        manifest.read(folder)
    path.write_text(text)
    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", len(text))
    manifest.read(folder)
    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", len(text) - 1)
    with pytest.raises(CheckpointCorrupted, match=f"its manifest has {len(text):,} bytes"):
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


def test_a_manifest_that_the_system_refuses_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(tmp_path / "step_00000007"))

    folder = written(tmp_path)
    monkeypatch.setattr(Folder, "read", refuse)
    with pytest.raises(CheckpointUnreadable, match=rf"^{folder}: cannot be read \(Input/output error\); nothing was"):
        manifest.read(folder)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EIO, "no luck", "/there"), "/there: cannot be read (no luck); "),
        (OSError("only words"), "/here: cannot be read (only words); "),
    ],
)
def test_an_unreadable_checkpoint_says_which_file_and_why(error: OSError, said: str) -> None:
    assert str(CheckpointUnreadable.because(Path("/here"), error)).startswith(said)


# Files


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("plain", "arrays/d/1", "weights.safetensors"):
        (tmp_path / "step" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "step" / name).write_bytes(name.encode())
    return tmp_path / "step"


def damage(folder: Path, expected: dict[str, Any]) -> str | None:
    return manifest.verify_files(folder, {"files": expected})


def other_content(path: Path) -> None:
    path.write_bytes(path.read_bytes()[::-1])


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("name", ["plain", "arrays/d/1", "weights.safetensors"])
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (Path.unlink, "is missing"),
        (other_content, "was changed"),
        (lambda path: path.write_bytes(b""), "was changed"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "was changed"),
        (a_folder, "is missing"),
        (a_link, "is a link"),
        (a_pipe, "is not a plain file"),
    ],
    ids=["missing", "changed", "empty", "longer", "folder", "link", "pipe"],
)
def test_the_first_damage_is_named(name: str, harm: Any, said: str, files: Path) -> None:
    expected = manifest.describe_files(files)
    assert damage(files, expected) is None
    (files / "unknown").write_bytes(b"not in the manifest")
    assert damage(files, expected) is None
    harm(files / name)
    assert damage(files, expected) == f"{name} {said}"


@pytest.mark.parametrize("content", [b"", b"plain and more"])
def test_no_file_is_read_before_all_sizes_are_right(
    content: bytes, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = manifest.describe_files(files)
    (files / "weights.safetensors").write_bytes(content)
    monkeypatch.setattr(manifest, "file_digest", lambda path: pytest.fail(f"{path} was read"))
    assert damage(files, expected) == "weights.safetensors was changed"


def test_a_folder_that_is_gone_is_damage(files: Path) -> None:
    expected = manifest.describe_files(files)
    assert damage(files / "nowhere", expected) == "nowhere is missing"
    assert damage(files / "plain", expected) == "plain is missing"


def test_a_large_file_must_be_one_that_holds_arrays(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax reads its other files whole."""
    expected = manifest.describe_files(files)
    monkeypatch.setattr(manifest, "MAX_METADATA_BYTES", 5)
    assert damage(files, expected) is None
    monkeypatch.setattr(manifest, "MAX_METADATA_BYTES", 4)
    assert damage(files, expected) == "plain has 5 bytes"


def test_a_file_that_the_system_refuses_is_no_damage(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    expected = manifest.describe_files(files)
    monkeypatch.setattr(manifest, "file_digest", refuse)
    with pytest.raises(CheckpointUnreadable, match=r"Permission denied"):
        damage(files, expected)
