"""The arrays of a checkpoint: in which form they are read, and the weights for other programs."""

import contextlib
import functools
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
from moe_jax.runs.manifest import CheckpointCorrupted, Leaf
from moe_jax.runs.safetensors_file import write_safetensors

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
    with pytest.raises(CheckpointCorrupted, match=r"^params.w is stored with another shape than its manifest gives"):
        read_arrays(written, described(LEAVES) | {"params.w": leaf})
    with pytest.raises(CheckpointCorrupted, match="its arrays cannot be read"):
        read_arrays(written, {"absent": leaf})


def test_a_chunk_that_is_larger_than_its_array_is_refused() -> None:
    """It would take any amount of memory."""

    def stored(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Any:
        storage = SimpleNamespace(chunk_shape=chunk)
        entry = SimpleNamespace(shape=shape, dtype=np.dtype("float32"), storage=storage)
        return SimpleNamespace(item_metadata=SimpleNamespace(tree={"w": entry}))

    for shape, chunk in (((4, 3), (4, 3)), ((4, 3), (1, 2)), ((0, 3), (1, 3)), ((), ())):
        arrays._check_stored(stored(shape, chunk), {"w": Leaf(shape, "float32", "")})
    for shape, chunk in (((4, 3), (5, 3)), ((4, 3), (4, 2**40)), ((0, 3), (2, 3))):
        with pytest.raises(CheckpointCorrupted, match="another shape"):
            arrays._check_stored(stored(shape, chunk), {"w": Leaf(shape, "float32", "")})


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


@pytest.fixture
def loggers() -> Iterator[list[logging.Logger]]:
    logs = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [log.level for log in logs]
    yield logs
    for log, level in zip(logs, before, strict=True):
        log.setLevel(level)


def test_other_programs_log_nothing_within_the_block_and_after_an_error(loggers: list[logging.Logger]) -> None:
    """A thread that has not ended by then logs its own traceback of the same error."""
    before = [log.level for log in loggers]
    with without_traces():
        assert [log.isEnabledFor(logging.ERROR) for log in loggers] == [False, False]
    assert [log.level for log in loggers] == before
    with contextlib.suppress(ValueError), without_traces():
        raise ValueError
    assert [log.isEnabledFor(logging.ERROR) for log in loggers] == [False, False]


def test_threads_that_finish_late_are_silent_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their hook is set once: otherwise each checkpoint would put one more before the others."""
    told: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    monkeypatch.setattr(arrays, "_ignore_late_answers", functools.cache(arrays._ignore_late_answers.__wrapped__))
    with without_traces():
        hook = sys.unraisablehook
    with without_traces():
        assert sys.unraisablehook is hook
    late, other = (SimpleNamespace(exc_value=RuntimeError(text)) for text in ("Event loop is closed", "a bug"))
    hook(late)  # pyright: ignore[reportArgumentType]
    hook(other)  # pyright: ignore[reportArgumentType]
    assert told == [other]


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
