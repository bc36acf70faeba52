"""Checks of files, locks, random keys and the corpus digest, which must catch planted bugs."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax.system.files import locked, write_atomically
from moe_jax.system.random_keys import Purpose, purpose_key


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def check_keys() -> None:
    """A key is fold_in(fold_in(key(seed), purpose), step). Without a step it is the inner key."""
    for purpose in Purpose:
        for seed in (0, 7):
            inner = jax.random.fold_in(jax.random.key(seed), int(purpose))
            assert (bits(purpose_key(seed, purpose)) == bits(inner)).all()
            for step in (0, 1, 1000):
                expected = bits(jax.random.fold_in(inner, step))
                assert (bits(purpose_key(seed, purpose, step)) == expected).all()
                assert (bits(jax.jit(purpose_key, static_argnums=(0, 1))(seed, purpose, step)) == expected).all()


def bits(key: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(key))


def check_atomic_write() -> None:
    """If the disk is full, at the write or at the rename, the old content stays and no draft is left."""

    def full(*_: object, **where: object) -> None:
        raise OSError(28, "No space left on device")

    for function in ("os.fsync", "os.replace"):
        with folder() as where, pytest.MonkeyPatch.context() as patch:
            path = where / "state.json"
            write_atomically(path, "old")
            patch.setattr(function, full)
            try:
                write_atomically(path, "new, and longer")
            except OSError as error:
                assert error.errno == 28  # noqa: PT017, a planted bug must end in an AssertionError
            else:
                raise AssertionError("the error was swallowed")
            assert [file.name for file in where.iterdir()] == ["state.json"]
            assert path.read_text() == "old"


def check_lock() -> None:
    """A second holder is refused while the first holds the lock, and accepted afterwards. Locks belong to open files,
    so both holders may be in one process."""
    with folder() as where:
        with locked(where / "lock", wait=False):
            try:
                with locked(where / "lock", wait=False):
                    raise AssertionError("two holders at once")
            except BlockingIOError:
                pass
        with locked(where / "lock", wait=False):
            pass
