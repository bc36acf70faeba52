"""What the doctor does with weights whose arrays cannot be read. Whole runs are examined in `tests/reliability`."""

from pathlib import Path

import pytest

from moe_jax.runs import doctor
from moe_jax.runs.arrays import WEIGHTS
from moe_jax.runs.checkpoint import Checkpoint
from moe_jax.runs.manifest import CheckpointCorrupted


@pytest.mark.parametrize("files", [{}, {WEIGHTS: [1, "digest"]}], ids=["without weights", "with weights"])
def test_weights_are_not_made_from_arrays_that_cannot_be_read(
    files: dict[str, list[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digests of all other files are right, and still the arrays do not open. The old file stays as it is."""

    def unreadable(*_: object) -> None:
        raise CheckpointCorrupted("the arrays do not open")

    monkeypatch.setattr(doctor.manifest, "verify_files", lambda *_: None)
    monkeypatch.setattr(doctor.manifest, "leaves_of", lambda _: {})
    monkeypatch.setattr(doctor, "read_arrays", unreadable)
    (tmp_path / WEIGHTS).write_bytes(b"old")
    assert doctor._rebuild_weights(Checkpoint(tmp_path, 1, None, 0.0, {"files": files})) is False
    assert (tmp_path / WEIGHTS).read_bytes() == b"old"
