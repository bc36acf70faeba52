"""The arrays of a checkpoint: in which form they are read, and the weights for other programs."""

import os
import stat
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from moe_jax.runs import arrays, manifest
from moe_jax.runs.arrays import WEIGHTS, named_leaves, read_arrays, write_arrays, write_weights
from moe_jax.runs.manifest import CheckpointCorrupted, Leaf

LEAVES = named_leaves(
    {
        "params": {"w": jnp.arange(6, dtype=jnp.float32).reshape(2, 3), "half": jnp.ones(3, jnp.bfloat16)},
        "step": jnp.int32(7),
    }
)


def described(leaves: dict[str, Any]) -> dict[str, Leaf]:
    return manifest.leaves_of(manifest.describe_leaves(leaves))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be read only."""
    folder = tmp_path_factory.mktemp("step")
    write_arrays(folder, LEAVES)
    write_weights(folder, LEAVES)
    return folder


def test_all_or_some_arrays_come_back(written: Path) -> None:
    for names in (list(LEAVES), ["step"], ["params.half", "params.w"]):
        found = read_arrays(written, described({name: LEAVES[name] for name in names}))
        assert sorted(found) == sorted(names)
        for name, array in found.items():
            assert array.dtype == LEAVES[name].dtype
            assert np.asarray(array).tobytes() == np.asarray(LEAVES[name]).tobytes()


def test_another_content_than_the_manifest_says_is_damage(written: Path) -> None:
    wanted = described(LEAVES) | {"step": Leaf((), "int32", "another")}
    with pytest.raises(CheckpointCorrupted, match=r"^step is not the array that was saved$"):
        read_arrays(written, wanted)


@pytest.mark.parametrize("leaf", [Leaf((3, 2), "float32", ""), Leaf((2, 3), "float16", ""), Leaf((6,), "float32", "")])
def test_another_form_than_the_manifest_says_is_refused_before_any_array_is_read(
    leaf: Leaf, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", lambda *_, **__: pytest.fail("read"))
    for others in (described(LEAVES), {}):
        with pytest.raises(CheckpointCorrupted, match=r"^params.w is (stored with another shape|not the array)"):
            read_arrays(written, others | {"params.w": leaf})
    with pytest.raises(CheckpointCorrupted, match="its arrays cannot be read"):
        read_arrays(written, {"absent": leaf})


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), MemoryError),
        (ValueError("RESOURCE_EXHAUSTED: too large"), ValueError),
        (ValueError("a wrong\n  checksum"), CheckpointCorrupted),
        (Exception("x" * 300), CheckpointCorrupted),
    ],
)
def test_too_little_memory_is_no_damage(
    error: Exception, kind: type[Exception], written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", fail)
    with pytest.raises(kind) as caught:
        read_arrays(written, described(LEAVES))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_parameters_are_read_without_orbax_and_no_file_of_weights_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command but a training reads the parameters alone."""
    weights = {name: leaf for name, leaf in LEAVES.items() if name.startswith("params.")}
    write_weights(tmp_path, LEAVES)
    assert sorted(read_arrays(tmp_path, described(weights))) == sorted(weights)
    whole = (tmp_path / WEIGHTS).read_bytes()
    for damaged in (b"", whole[:-1], b"\xff" * 8 + whole[8:], whole[:-1] + b"\x01"):
        (tmp_path / WEIGHTS).write_bytes(damaged)
        with pytest.raises(CheckpointCorrupted, match=r"its weights cannot be read|is not the array"):
            read_arrays(tmp_path, described(weights))
    (tmp_path / WEIGHTS).write_bytes(whole)
    read = arrays._part_of

    def cut(stored: Any, index: Any) -> np.ndarray:
        os.truncate(tmp_path / WEIGHTS, 0)
        return read(stored, index)

    monkeypatch.setattr(arrays, "_part_of", cut)  # after its header was read; a mapped file would end the process
    with pytest.raises(CheckpointCorrupted, match="its weights cannot be read"):
        read_arrays(tmp_path, described(weights))


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_weights_are_the_parameters_and_follow_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_weights(tmp_path, LEAVES | {"params.t": np.arange(6.0).reshape(2, 3).T})
    finally:
        os.umask(before)
    found = load_file(tmp_path / WEIGHTS)
    assert sorted(found) == ["half", "t", "w"]
    np.testing.assert_array_equal(found["t"], np.arange(6.0).reshape(2, 3).T)
    np.testing.assert_array_equal(found["w"], LEAVES["params.w"])
    assert stat.S_IMODE((tmp_path / WEIGHTS).stat().st_mode) == 0o666 & ~umask
    with pytest.raises(FileExistsError):
        write_weights(tmp_path, LEAVES)
