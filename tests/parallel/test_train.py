"""Whole runs of `train.py --mesh`: saved, resumed on the same mesh, on one device and back."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moe_jax.cli.main import main, run_as
from moe_jax.runs.records import read_metrics
from tests.support import saved_run

pytestmark = pytest.mark.parallel

SETTINGS = (
    "--tokenizer byte --model.layers 1 --model.width 32 --model.heads 2 --model.expert-hidden 32 --seq-len 32 "
    "--experts 8 --batch-size 8 --data.eval-tokens 400 --eval-every 4 --save-every 4 --train.log-every 1 "
    "--precision float32 --model.dropout 0.1 --train.final-lr-ratio 1 --train.warmup-steps 0"
)
"""The learning rate stays the same, so that a run may be longer at a resume."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("<|endoftext|>".join(f"{saved_run.STORY}{i}" for i in range(80)))
    with saved_run.quick_training(folder / "cache") as patch:
        patch.setattr("moe_jax.inspection.report.report_run", lambda files: ["no report"])
        yield folder


def run(folder: Path, out: str, *flags: str) -> int:
    argv = [*SETTINGS.split(), "--data", str(folder / "text.txt"), "--out", str(folder / out), *flags]
    return main(lambda given: run_as("train", given, "train.py"), argv)


def last(folder: Path, out: str) -> tuple[dict[str, str], list[float]]:
    """The digests of the newest checkpoint, and the losses of the steps."""
    return saved_run.array_digests(saved_run.newest(folder / out)), [
        record["loss"] for record in read_metrics(folder / out)["train"]
    ]


def test_a_run_moves_between_meshes(text: Path) -> None:
    """Resumed on its mesh, a run has every bit of an uninterrupted run. Resumed on one device and then on another
    mesh, its losses stay close. No flag but --mesh says so."""
    mesh = ("--mesh", "fsdp=2,expert=4")
    assert run(text, "whole", *mesh, "--steps", "12") == 0
    expected, losses = last(text, "whole")
    assert len(losses) == 12
    assert run(text, "same", *mesh, "--steps", "4") == 0
    shutil.copytree(text / "same", text / "moved")
    assert run(text, "same", "--resume", "--steps", "12") == 0
    same, repeated = last(text, "same")
    assert same == expected
    assert repeated == losses
    assert run(text, "moved", "--resume", "--steps", "8", "--mesh", "data=1") == 0
    assert run(text, "moved", "--resume", "--steps", "12", "--mesh", "data=8") == 0
    np.testing.assert_allclose(last(text, "moved")[1], losses, atol=5e-6, rtol=0)
    saved = json.loads((text / "moved" / "config.json").read_text())
    assert saved["execution"]["mesh"] == "data=8"


@pytest.mark.parametrize(("mesh", "places"), [("data=4", 4), ("data=4,expert=4", 16)])
def test_a_mesh_of_other_devices_is_refused(
    mesh: str, places: int, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, and nothing is written."""
    assert run(text, "refused", "--mesh", mesh, "--batch-size", "16") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == (
        f"error: --mesh {mesh}: has {places} places, and JAX sees 8 devices (cpu); "
        "give a mesh whose product is 8, or data=1 for one device"
    )
    assert not (text / "refused").exists()
