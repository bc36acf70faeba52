"""What a run executes comes from one place, is compiled once, and computes the same with the plain cross-entropy."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.config import ComputeDtype, ExecutionConfig, RunConfig, TrainConfig
from moe_jax.training.loop import finish, train
from moe_jax.training.programs import Programs, RandomTokenTrainer
from moe_jax.training.session import Session
from tests.support import tiny
from tests.support.saved_run import resuming

CONFIG = RunConfig(
    model=tiny.config(layers=1, width=16),
    train=TrainConfig(steps=20, warmup_steps=0, lr=1e-2, beta1=0.5),
    execution=ExecutionConfig(compute_dtype="float32"),
)


def batch(seed: int = 3, micro_batches: int = 1) -> np.ndarray:
    return tiny.tokens(micro_batches, 2, tiny.T + 1, seed=seed)


def first_step(programs: Programs) -> tuple[Any, Any]:
    """(the first moments of AdamW, the report) of one step. The moments are (1 - beta1) x the clipped gradient."""
    state, report = programs.step(programs.state(programs.initial_params()), batch())
    return state.optimizer[0].mu, report


def test_the_plain_cross_entropy_gives_the_same_loss_and_gradients() -> None:
    """To a few float32 roundings: the two sum the same terms in another order."""
    ours, report = first_step(Programs.of(CONFIG))
    plain, plain_report = first_step(Programs.of(CONFIG, loss="reference"))
    assert float(report.metrics.loss) == pytest.approx(float(plain_report.metrics.loss), rel=1e-6)
    assert float(report.grad_norm) == pytest.approx(float(plain_report.grad_norm), rel=1e-6)
    errors = tiny.gradient_errors(ours, plain)
    assert max(errors.values()) < 1e-5, errors
    assert max(float(np.abs(g).max()) for g in jax.tree.leaves(plain)) > 1e-3


def test_float16_scales_the_loss_and_the_parameters_are_stored_as_asked() -> None:
    narrow = dataclasses.replace(
        CONFIG,
        train=dataclasses.replace(CONFIG.train, param_dtype="bfloat16"),
        execution=ExecutionConfig(compute_dtype="float16"),
    )
    programs = Programs.of(narrow)
    assert programs.policy.loss_scaling
    params = programs.initial_params()
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    assert shapes == programs.param_shapes
    assert {str(p.dtype) for p in jax.tree.leaves(params) if p.ndim >= 2} == {"bfloat16"}
    state = programs.state(params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), programs.state_shapes
    )
    assert float(state.loss_scale.scale) == 2.0**15
    assert float(Programs.of(CONFIG).state(params).loss_scale.scale) == 1


@pytest.mark.parametrize(
    ("precision", "units", "narrow"), [("bfloat16", "AMX", True), ("bfloat16", "", False), ("float32", "AMX", False)]
)
def test_muon_is_in_bfloat16_where_a_cpu_multiplies_it_fast(
    precision: ComputeDtype, units: str, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in a run in bfloat16 only. Then matrices of one size are one stack, with three products a step."""
    monkeypatch.setattr("moe_jax.training.programs.cpu_bfloat16_units", lambda: units)
    train = dataclasses.replace(CONFIG.train, optimizer="muon")
    execution = ExecutionConfig(compute_dtype=precision)
    programs = Programs.of(dataclasses.replace(CONFIG, train=train, execution=execution))
    shapes = programs.param_shapes
    step = jax.make_jaxpr(lambda p: programs.optimizer.update(p, programs.optimizer.init(p), p, step=0, taken=True)[0])
    products = [line for line in str(step(shapes)).splitlines() if "dot_general" in line]
    assert all(("bf16[" in line) == narrow for line in products)
    named = jax.tree_util.tree_leaves_with_path(shapes["blocks"])
    matrices = [p for path, p in named if p.ndim >= 2 and "router" not in jax.tree_util.keystr(path)]
    assert len(products) == 3 * len({tuple(sorted(p.shape[-2:])) for p in matrices} if narrow else matrices)


def run_config(folder: Path, steps: int) -> RunConfig:
    (folder / "text.txt").write_text("<|endoftext|>".join(f"a cat sat on mat {i}" for i in range(60)))
    data = dataclasses.replace(CONFIG.data, source=str(folder / "text.txt"), tokenizer="byte", eval_tokens=64)
    return dataclasses.replace(
        CONFIG,
        out=str(folder / "run"),
        model=dataclasses.replace(CONFIG.model, vocab_size=0),
        data=data,
        train=dataclasses.replace(CONFIG.train, steps=steps, batch_size=2, eval_every=2, save_every=2),
    )


def compilations(session: Session) -> dict[str, int]:
    programs = {
        "step": session.programs.step,
        "evaluation": session.programs.evaluation,
        "prefill": session.decoder.prefill,
        "decoding": session.decoder.write,
    }
    return {name: program._cache_size() for name, program in programs.items()}  # pyright: ignore


def test_a_whole_run_compiles_step_evaluation_and_decoding_once(tmp_path: Path) -> None:
    """Six steps, three evaluations with samples, saves, and the whole validation stream at the end. A resumed run
    begins with a state that came from a disk, and compiles once too."""
    session = Session.open(run_config(tmp_path, steps=6))
    assert compilations(session) == {"step": 0, "evaluation": 0, "prefill": 0, "decoding": 0}
    train(session)
    finish(session)
    assert compilations(session) == {"step": 1, "evaluation": 1, "prefill": 1, "decoding": 1}
    longer = dataclasses.replace(session.config, train=dataclasses.replace(session.config.train, steps=8))
    resumed = Session.open(longer, resuming(session.config))
    train(resumed)
    finish(resumed)
    assert compilations(resumed) == {"step": 1, "evaluation": 1, "prefill": 1, "decoding": 1}


def without_sources(hlo: str) -> str:
    """HLO text without the paths and lines of source files."""
    hlo = re.sub(r"^(FileNames|FunctionNames|FileLocations|StackFrames)\n(?:.+\n)*\n?", "", hlo, flags=re.MULTILINE)
    return re.sub(r", metadata=\{[^}]*\}", "", hlo)


def test_a_session_runs_the_program_that_is_counted_and_timed(tmp_path: Path) -> None:
    """What certificates, plans and benchmarks compile without running is the very program of a run."""
    session = Session.open(run_config(tmp_path, steps=2))
    trainer = RandomTokenTrainer.of(session.config, batch_size=2)
    own = session.programs.step.lower(session.state, session.data.batch(0)).compile()  # pyright: ignore
    timed = trainer.step.lower(trainer.state, trainer.batch).compile()  # pyright: ignore
    counted = Programs.of(session.config).compiled_step(2)
    own, timed, counted = (without_sources(program.as_text()) for program in (own, timed, counted))
    assert "fusion" in own
    assert own == counted == timed
