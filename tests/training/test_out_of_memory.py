"""A device without memory, wherever it shows: nothing that was trained is lost, and the next command can go on."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.config import RunConfig, UserError
from moe_jax.runs.checkpoint import CheckpointStore
from moe_jax.runs.load import open_run
from moe_jax.system.errors import is_out_of_memory
from moe_jax.training import evaluate
from moe_jax.training.fit import compiled_here, fit
from moe_jax.training.run import train
from moe_jax.training.session import Session
from moe_jax.training.start import Start
from tests.support import saved_run
from tests.training.test_fit import STEPS, asked, document, losses, setting

LACKED = (
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8589934592 bytes",
    "INTERNAL: Failed to load in-memory CUBIN: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
    "INTERNAL: Failed to create cuBLAS handle: CUBLAS_STATUS_NOT_INITIALIZED",
    "INTERNAL: cuBLAS error: CUBLAS_STATUS_ALLOC_FAILED",
    "INTERNAL: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED in cudnnCreate",
    "INTERNAL: CUDA error: Failed to instantiate CUDA graph: out of memory",
)
ERROR = jax.errors.JaxRuntimeError(LACKED[1])


def fails(*_: Any, **__: Any) -> Any:
    raise ERROR


def fails_inside(*_: Any, **__: Any) -> Any:
    raise jax.errors.JaxRuntimeError("INTERNAL: Failed to lower a dot to Triton")


@pytest.mark.parametrize("message", LACKED)
def test_memory_that_lies_outside_the_pool_counts_too(message: str) -> None:
    assert is_out_of_memory(jax.errors.JaxRuntimeError(message))
    assert not is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS"))


def test_a_setting_that_cannot_be_compiled_does_not_fit() -> None:
    """The compiler tries out kernels on the card. Another error of the compiler is not hidden."""
    assert compiled_here(SimpleNamespace(lower=lambda: SimpleNamespace(compile=fails))) == float("inf")
    assert compiled_here(SimpleNamespace(lower=lambda: SimpleNamespace(compile=fails_inside))) == float("inf")
    other = SimpleNamespace(lower=lambda: SimpleNamespace(compile=lambda: jax.jit(lambda: 1 / 0)()))
    with pytest.raises(ZeroDivisionError):
        compiled_here(other)


@pytest.mark.runs
def test_a_compiler_that_ends_the_process_is_not_asked_the_same_again(tmp_path: Path) -> None:
    """Each start takes the setting after the one at which the last start ended."""
    crash = f"""
import os, pathlib
from moe_jax.training import fit
from tests.training.test_fit import asked
fit.compiled_here = lambda *_: os.kill(os.getpid(), 11)
fit.fit(asked(pathlib.Path({str(tmp_path)!r}), 1000))
"""
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", crash], cwd=Path.cwd(), capture_output=True).returncode == -11
    assert setting(fit(asked(tmp_path, 1000)).config) == (16, 2, False)
    assert setting(fit(asked(tmp_path, 1000)).config) == (32, 1, False), "nothing ended the start before"


def test_a_later_step_leaves_what_came_before_and_the_resume_takes_the_next_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = Session.open

    def open_session(*arguments: Any) -> Session:
        session = opened(*arguments)
        step = session.programs.step
        if session.saved_step == 0:
            saved_run.replace_step(session, lambda s, batch: step(s, batch) if int(s.step) < 3 else fails())
        return session

    monkeypatch.setattr(Session, "open", staticmethod(open_session))
    config = asked(tmp_path)
    with saved_run.quick_training(tmp_path / "cache", samples=False):
        with pytest.raises(
            UserError, match=r"out of memory after step 3; step 3 is saved: .* go on with --resume, which"
        ):
            train(config, Start(config), lambda _: [])
        saved = RunConfig.from_dict(document(tmp_path))
        again = dataclasses.replace(saved, resume=True)
        assert train(again, Start(again, saved=saved), lambda _: []) == 0
    assert setting(RunConfig.from_dict(document(tmp_path))) == (8, 4, True)
    assert setting(saved) == setting(config) == (8, 4, False)
    assert "failed" not in document(tmp_path)["fitted"]
    assert len(losses(tmp_path)) == STEPS
    assert "with 8 x 4 sequences, adamw it ran out of memory" in capsys.readouterr().out


def test_an_evaluation_goes_on_one_row_at_a_time() -> None:
    shapes = []

    def step(params: Any, inputs: np.ndarray, targets: np.ndarray, start: Any, weights: np.ndarray) -> tuple[Any, Any]:
        shapes.append(len(inputs))
        return fails() if len(inputs) > 1 and len(shapes) > 1 else (weights.sum(), 0.0)

    tokens = np.arange(300)
    scored = evaluate.evaluate(step, {}, tokens, seq_len=8, token_bytes=np.ones(300, int))
    assert shapes[:3] == [16, 16, 1]
    assert scored.loss == 1, "each token once"


@pytest.mark.parametrize("where", ["evaluation", "sample", "report"])
def test_what_lies_between_the_steps(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An evaluation that fails with one row too ends the run; a run can do without the others."""
    config = asked(tmp_path)
    with saved_run.quick_training(tmp_path / "cache", samples=False):
        if where == "evaluation":
            monkeypatch.setattr("moe_jax.training.session.evaluate", fails)
            with pytest.raises(UserError, match=f"out of memory after step {STEPS}; step {STEPS} is saved"):
                train(config, Start(config), lambda _: [])
            assert [c.step for c in CheckpointStore(tmp_path / "run").list()] == [2, STEPS]
            return
        if where == "sample":
            monkeypatch.setattr(Session, "sample", fails)
        assert train(config, Start(config), fails if where == "report" else lambda _: []) == 0
    said = {"sample": "(no sample: the device is out of memory)", "report": "no report: the device is out of memory; "}
    assert said[where] in capsys.readouterr().out
    assert open_run(tmp_path / "run").checkpoint.step == STEPS
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best_step"] == STEPS
