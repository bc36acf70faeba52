"""The weights of a checkpoint as safetensors: for other programs, and read without orbax."""

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from moe_jax.runs import arrays
from moe_jax.runs.arrays import WEIGHTS, is_weight, named_leaves, read_weights, weight_shapes, write_weights
from moe_jax.runs.manifest import CheckpointCorrupted

ROOT = Path(__file__).parents[2]
LEAVES = named_leaves(
    {
        "params": {"w": jnp.arange(6, dtype=jnp.float32).reshape(2, 3), "half": jnp.ones(3, jnp.bfloat16)},
        "adapters": {"w": {"a": jnp.zeros((2, 1))}},
        "step": jnp.int32(7),
    }
)
WEIGHT_LEAVES = {name: leaf for name, leaf in LEAVES.items() if is_weight(name)}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_weights_are_the_parameters_and_follow_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_weights(tmp_path, LEAVES | {"params.t": np.arange(6.0).reshape(2, 3).T})
    finally:
        os.umask(before)
    found = load_file(tmp_path / WEIGHTS)
    assert sorted(found) == ["adapters.w.a", "half", "t", "w"]
    np.testing.assert_array_equal(found["t"], np.arange(6.0).reshape(2, 3).T)
    np.testing.assert_array_equal(found["w"], LEAVES["params.w"])
    assert stat.S_IMODE((tmp_path / WEIGHTS).stat().st_mode) == 0o666 & ~umask
    with pytest.raises(FileExistsError):
        write_weights(tmp_path, LEAVES)


def test_shapes_and_arrays_come_back(tmp_path: Path) -> None:
    write_weights(tmp_path, LEAVES)
    shapes = weight_shapes(tmp_path / WEIGHTS)
    assert {n: (x.shape, x.dtype) for n, x in shapes.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in WEIGHT_LEAVES.items()
    }
    for name, array in read_weights(tmp_path / WEIGHTS, shapes).items():
        assert np.asarray(array).tobytes() == np.asarray(LEAVES[name]).tobytes()


def test_a_damaged_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is cut after its header was read: a mapped file would end the process."""
    write_weights(tmp_path, LEAVES)
    path = tmp_path / WEIGHTS
    shapes, intact = weight_shapes(path), path.read_bytes()
    for damaged in (b"", intact[:-1], b"\xff" * 8 + intact[8:]):
        path.write_bytes(damaged)
        for read in (lambda: weight_shapes(path), lambda: read_weights(path, shapes)):
            with pytest.raises(CheckpointCorrupted, match="its weights cannot be read"):
                read()
    path.write_bytes(intact)
    part = arrays._part_of

    def cut(stored: Any, index: Any) -> np.ndarray:
        os.truncate(path, 0)
        return part(stored, index)

    monkeypatch.setattr(arrays, "_part_of", cut)
    with pytest.raises(CheckpointCorrupted, match="its weights cannot be read"):
        read_weights(path, shapes)


def test_a_reader_does_not_import_orbax() -> None:
    code = "import sys, moe_jax.runs.load; print('orbax' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ended.stdout == "False\n"
