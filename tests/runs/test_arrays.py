"""The arrays of a checkpoint: in which form they are read, and which errors are damage."""

import contextlib
import errno
import functools
import json
import logging
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

from moe_jax.runs import arrays, manifest
from moe_jax.runs.arrays import WEIGHTS, named_leaves, read_arrays, without_traces, write_arrays, write_weights
from moe_jax.runs.manifest import CheckpointCorrupted, CheckpointUnreadable, Leaf
from moe_jax.runs.safetensors_file import write_safetensors
from moe_jax.system.folders import Folder

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
    return folder


def test_all_or_some_arrays_come_back(written: Path) -> None:
    for names in (list(LEAVES), ["step"], ["params.half", "params.w"]):
        found = read_arrays(written, described({name: LEAVES[name] for name in names}))
        assert sorted(found) == sorted(names)
        for name, array in found.items():
            assert (array.dtype, np.asarray(array).tobytes()) == (
                LEAVES[name].dtype,
                np.asarray(LEAVES[name]).tobytes(),
            )


def test_another_content_than_the_manifest_says_is_damage(written: Path) -> None:
    wanted = described(LEAVES)
    wanted["step"] = Leaf((), "int32", "another")
    with pytest.raises(CheckpointCorrupted, match=r"^step is not the array that was saved$"):
        read_arrays(written, wanted)


@pytest.mark.parametrize("leaf", [Leaf((3, 2), "float32", ""), Leaf((2, 3), "float16", ""), Leaf((6,), "float32", "")])
def test_another_form_than_the_manifest_says_is_refused_before_any_array_is_read(
    leaf: Leaf, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", refuse)
    with pytest.raises(CheckpointCorrupted, match=r"^params.w is stored with another shape than its manifest gives"):
        read_arrays(written, described(LEAVES) | {"params.w": leaf})
    with pytest.raises(CheckpointCorrupted, match="its arrays cannot be read"):
        read_arrays(written, {"absent": leaf})


@pytest.mark.parametrize("about", [{}, {"use_ocdbt": False}, {"use_ocdbt": 1}, {"use_ocdbt": True, "use_zarr3": True}])
def test_another_format_is_refused(about: dict[str, Any], written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Folder, "read_json", lambda *_: about)
    with pytest.raises(CheckpointCorrupted, match="stored in another format"):
        read_arrays(written, described(LEAVES))


@pytest.mark.parametrize("zarr3", [{}, {"use_zarr3": False}, {"use_zarr3": None}])
def test_orbax_says_the_usual_format_in_three_ways(
    zarr3: dict[str, Any], written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Folder, "read_json", lambda *_: {"use_ocdbt": True} | zarr3)
    arrays._check_stored(written / arrays.ARRAYS, described(LEAVES))


def test_long_metadata_are_refused(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert arrays._MAX_METADATA_BYTES > 1000
    monkeypatch.setattr(arrays, "_MAX_METADATA_BYTES", 100)
    with pytest.raises(CheckpointCorrupted, match="stored with another shape"):
        read_arrays(written, described(LEAVES))


ZARR = {"shape": [4, 3], "chunks": [4, 3], "zarr_format": 2, "dtype": "<f4", "compressor": None, "filters": None}
LEAF = Leaf((4, 3), "float32", "")


@pytest.mark.parametrize("usual", [{}, {"chunks": [1, 1]}, {"chunks": [2, 3]}, {"filters": []}, {"dtype": "|i4"}])
def test_the_form_that_orbax_writes(usual: dict[str, Any]) -> None:
    assert arrays._fits(ZARR | usual, LEAF)
    without = {k: v for k, v in ZARR.items() if k not in ("compressor", "filters")}
    assert arrays._fits(without, LEAF)


@pytest.mark.parametrize(
    "odd",
    [
        {"shape": [3, 4]},
        {"shape": [4, 3, 1], "chunks": [4, 3, 1]},
        {"chunks": [5, 3]},
        {"chunks": [4, 4]},
        {"chunks": [0, 3]},
        {"chunks": [4, -1]},
        {"chunks": [4.0, 3]},
        {"chunks": [True, 3]},
        {"chunks": [4]},
        {"zarr_format": 3},
        {"compressor": {"id": "zstd"}},
        {"filters": [{"id": "delta"}]},
        {"dtype": "<f8"},
        {"dtype": "bfloat16"},
        {"dtype": "<c8"},
        {"dtype": "<f44"},
        {"dtype": [["a", "<f4"]]},
        {"dtype": ">f4"},
    ],
    ids=str,
)
def test_any_other_form_is_refused(odd: dict[str, Any]) -> None:
    """A chunk that is larger than its array would take any amount of memory."""
    assert not arrays._fits(ZARR | odd, LEAF)


def test_the_form_of_empty_arrays_scalars_and_bfloat16() -> None:
    assert arrays._fits(ZARR | {"shape": [0, 3], "chunks": [1, 3]}, Leaf((0, 3), "float32", ""))
    assert not arrays._fits(ZARR | {"shape": [0, 3], "chunks": [2, 3]}, Leaf((0, 3), "float32", ""))
    assert arrays._fits(ZARR | {"shape": [], "chunks": []}, Leaf((), "float32", ""))
    assert arrays._fits(ZARR | {"dtype": "bfloat16"}, Leaf((4, 3), "bfloat16", ""))
    assert arrays._fits(ZARR | {"dtype": "|b1"}, Leaf((4, 3), "bool", ""))


# Errors


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOENT, "x"),
        OSError(errno.ENOTDIR, "x"),
        OSError(errno.EINVAL, "x"),
        OSError(errno.EFBIG, "x"),
        OSError(errno.EISDIR, "x"),
        OSError(errno.ELOOP, "x"),
        OSError("without a number"),
        ValueError("a wrong\n  checksum"),
        ValueError("NOT_FOUND: [OS error 2: ENOENT]"),
    ],
    ids=repr,
)
def test_what_is_wrong_or_missing_is_damage(error: Exception) -> None:
    found = arrays._read_error(Path("step"), error)
    assert isinstance(found, CheckpointCorrupted)
    assert str(found) == f"its arrays cannot be read ({' '.join(str(error).split())})"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EIO, "x"), "Input/output error"),
        (PermissionError(errno.EACCES, "x"), "Permission denied"),
        (ValueError("UNKNOWN: read [OS error 5: EIO]"), "Input/output error"),
        (ValueError("[OS error 116: ESTALE]"), "Stale file handle"),
    ],
    ids=repr,
)
def test_what_the_system_refuses_is_no_damage(error: Exception, said: str) -> None:
    found = arrays._read_error(Path("step"), error)
    assert isinstance(found, CheckpointUnreadable)
    assert str(found).startswith(f"step: cannot be read ({said}); ")


@pytest.mark.parametrize("error", [MemoryError(), ValueError("RESOURCE_EXHAUSTED: too large [OS error 2: ENOENT]")])
def test_too_little_memory_is_no_damage(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        arrays._read_error(Path("step"), error)
    assert caught.value is error


def test_a_long_error_is_cut() -> None:
    assert str(arrays._read_error(Path("step"), ValueError("x" * 300))) == f"its arrays cannot be read ({'x' * 200})"


# Silence


@pytest.fixture
def loggers() -> Iterator[list[logging.Logger]]:
    logs = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [log.level for log in logs]
    yield logs
    for log, level in zip(logs, before, strict=True):
        log.setLevel(level)


def test_other_programs_log_nothing_within_the_block(loggers: list[logging.Logger]) -> None:
    before = [log.level for log in loggers]
    with without_traces():
        within = [log.isEnabledFor(logging.ERROR) for log in loggers]
    assert within == [False, False]
    assert [log.level for log in loggers] == before


def test_after_an_error_they_stay_silent(loggers: list[logging.Logger]) -> None:
    """A thread that has not ended by then logs its own traceback of the same error."""
    with contextlib.suppress(ValueError), without_traces():
        raise ValueError
    assert [log.isEnabledFor(logging.ERROR) for log in loggers] == [False, False]


def test_threads_that_finish_late_are_silent_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their hook is set once: otherwise each checkpoint would put one more before the others."""
    told: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    monkeypatch.setattr(arrays, "_ignore_late_answers", functools.cache(arrays._ignore_late_answers.__wrapped__))
    with without_traces():
        pass
    hook = sys.unraisablehook
    with without_traces():
        pass
    late, other = (SimpleNamespace(exc_value=RuntimeError(text)) for text in ("Event loop is closed", "a bug"))
    hook(late)  # pyright: ignore[reportArgumentType]
    hook(other)  # pyright: ignore[reportArgumentType]
    assert told == [other]
    assert sys.unraisablehook is hook


# For other programs


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
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


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_bytes_are_those_of_the_library(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    """All dtypes, names in no order, no entries, no axes, an array that is not in C order."""
    draw = np.random.default_rng(0)
    kinds = ["bool", "uint8", "int8", "int16", "uint16", "float16", ml_dtypes.bfloat16]
    kinds += ["int32", "uint32", "float32", "float64", "int64", "uint64"]
    tensors = {f"{i % 5}.{np.dtype(k)}": draw.integers(0, 2, (3, 5)).astype(k) for i, k in enumerate(kinds)}
    tensors |= {"empty": np.zeros((0, 4), np.float32), "none": np.array(7, np.int32), "über": np.ones((2, 3)).T}
    whole = {name: np.ascontiguousarray(x) for name, x in tensors.items()} | {"none": tensors["none"]}
    save_file(whole, tmp_path / "theirs", metadata)
    write_safetensors(tmp_path / "ours", tensors, tensors.__getitem__, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_weights_that_are_there_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(b"old")
    with pytest.raises(FileExistsError):
        write_weights(tmp_path, LEAVES)
    assert (tmp_path / WEIGHTS).read_bytes() == b"old"


def test_names_are_dotted_paths() -> None:
    assert json.dumps(sorted(LEAVES)) == '["params.half", "params.w", "step"]'
