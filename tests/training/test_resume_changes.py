"""A resumed run may be computed in another way, and must stay the same model on the same text."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_jax.config import DataConfig, ExecutionConfig, RunConfig, TrainConfig
from moe_jax.model import precision
from moe_jax.runs.catalog import load_config
from moe_jax.training.run import finish, take_steps
from moe_jax.training.session import Session
from moe_jax.training.start import resumed_run
from tests.support import tiny
from tests.support.saved_run import resuming


def run(folder: Path, steps: int, **execution: Any) -> Session:
    """Train to a step, from the newest checkpoint where there is one."""
    (folder / "text.txt").write_text("<|endoftext|>".join(f"a cat sat on mat {i}" for i in range(60)))
    config = RunConfig(
        out=str(folder / "run"),
        model=tiny.config(layers=1, width=16, vocab_size=257),
        data=DataConfig(source=str(folder / "text.txt"), tokenizer="byte", eval_tokens=64),
        train=TrainConfig(steps=steps, batch_size=2, warmup_steps=0, log_every=1, eval_every=2, save_every=2),
        execution=ExecutionConfig(**({"compute_dtype": "float32"} | execution)),
    )
    saved = load_config(folder / "run")
    if saved is not None:
        resumed_run(saved).check(config)
    session = Session.open(config, resuming(saved))
    take_steps(session)
    return session


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("execution", "rounding"), [({"remat": True}, 1e-5), ({"compute_dtype": "bfloat16"}, 2**-6)], ids=["remat", "dtype"]
)
def test_a_run_goes_on_in_another_execution(execution: dict[str, Any], rounding: float, tmp_path: Path) -> None:
    """Four steps, then two more, beside two more in the first execution: the same losses to the rounding of the
    arithmetic, and the change stands in config.json."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        run(tmp_path / name, 4)
    there, here = run(tmp_path / "one", 6), run(tmp_path / "other", 6, **execution)
    assert here.resumed_from == 4
    ((field, value),) = execution.items()
    assert getattr(here.config.execution, field) == value
    assert f"execution.{field} {getattr(there.config.execution, field)} -> {value}" in here.notes[0]
    lines = [(tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines() for name in ("one", "other")]
    losses = [[r["loss"] for r in map(json.loads, found) if r["step"] > 4] for found in lines]
    assert len(losses[0]) == 3  # two steps and the last evaluation
    np.testing.assert_allclose(losses[1], losses[0], rtol=rounding)
    (entry,) = json.loads((tmp_path / "other" / "run" / "config.json").read_text())["history"]
    assert entry["changed"][f"execution.{field}"] == [getattr(there.config.execution, field), value]
    assert finish(here)["precision"] == here.config.execution.compute_dtype


@pytest.mark.reliability
def test_a_run_on_another_machine_keeps_the_precision_that_auto_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second machine has units for bfloat16. A new run there takes them, and so does the old one if it is asked."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(precision, "cpu_bfloat16_units", lambda: "")
    assert run(tmp_path / "old", 2, compute_dtype="auto").programs.policy.compute == "float32"
    monkeypatch.setattr(precision, "cpu_bfloat16_units", lambda: "AMX")
    kept = run(tmp_path / "old", 4, compute_dtype="auto").programs.policy
    assert (kept.compute, kept.reason) == ("float32", "kept from the start of the run; --precision changes it")
    assert run(tmp_path / "new", 2, compute_dtype="auto").programs.policy.compute == "bfloat16"
    assert run(tmp_path / "old", 6, compute_dtype="bfloat16").programs.policy.compute == "bfloat16"
