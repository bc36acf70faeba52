"""What a run writes down, for a run in which nothing coincides: the best step is not the last, the number of steps is
no multiple of `eval_every`, two steps are skipped, and drops, rates and losses differ from step to step."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import DataConfig, ExecutionConfig, ModelConfig, RoutingConfig, RunConfig, TrainConfig
from moe_jax.data.tokenizers import Stream
from moe_jax.runs.checkpoint import restore
from moe_jax.training.evaluate import Evaluation
from moe_jax.training.run import finish, take_steps
from moe_jax.training.session import Session
from tests.support import saved_run

pytestmark = pytest.mark.runs

STEPS, SKIPPED, BEST = 11, (3, 6), 4


@dataclasses.dataclass
class Watched:
    """A finished run, and what was seen of each step and evaluation from outside."""

    session: Session
    result: dict[str, Any]
    rates: dict[int, float]
    """Step -> the rate that was applied: the largest change of a parameter."""
    drops: dict[int, float]
    losses: dict[int, float]
    """Step -> the loss that the evaluation of this step was told."""
    shown: str

    def records(self, split: str) -> list[dict[str, Any]]:
        lines = (self.session.folder.path / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["split"] == split]


def configuration(folder: Path) -> RunConfig:
    """Adam without running means moves every entry by the learning rate, so that the applied rate can be seen."""
    (folder / "text.txt").write_text("<|endoftext|>".join(f"the {n} cats sat on {n * n} mats" for n in range(300)))
    routing = RoutingConfig(top_k=2, capacity_factor=0.75)
    return RunConfig(
        out=str(folder / "run"),
        model=ModelConfig(seq_len=16, layers=1, width=16, heads=2, experts=4, expert_hidden=8, routing=routing),
        data=DataConfig(source=str(folder / "text.txt"), tokenizer="byte", eval_tokens=200),
        train=TrainConfig(
            steps=STEPS,
            batch_size=4,
            lr=1e-2,
            final_lr_ratio=0.1,
            beta1=0,
            beta2=0,
            eps=1e-30,
            weight_decay=0,
            log_every=1,
            eval_every=BEST,
            save_every=5,
        ),
        execution=ExecutionConfig(compute_dtype="float32"),
    )


def watched_step(session: Session, rates: dict[int, float], drops: dict[int, float]) -> Any:
    """The step of the session. In a skipped step the parameters are NaN, and come back unchanged afterwards."""
    step = session.programs.step

    def watched(state: Any, batch: Any) -> Any:
        now, before = int(state.step) + 1, jax.tree.map(np.array, state.params)
        if now in SKIPPED:
            state = dataclasses.replace(state, params=jax.tree.map(lambda p: p * jnp.nan, state.params))
        state, report = step(state, batch)
        if now in SKIPPED:
            return dataclasses.replace(state, params=jax.tree.map(jnp.asarray, before)), report
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True)
        rates[now] = max(float(np.abs(old - np.asarray(new)).max()) for old, new in pairs)
        drops[now] = float(report.metrics.drop_fraction)
        return state, report

    return watched


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("records")
    with saved_run.quick_training(folder / "cache") as patch:
        session = Session.open(configuration(folder))
        seen = Watched(session, {}, {}, {}, {}, "")
        saved_run.replace_step(session, watched_step(session, seen.rates, seen.drops))
        lines: list[str] = []
        patch.setattr("moe_jax.training.logging.StepLogger.say", lambda _, text: lines.append(text))
        score = session.score

        def told(stream: Stream) -> Evaluation:
            """The true score, with a loss that is lowest at step BEST."""
            step = int(session.state.step)
            seen.losses[step] = abs(step - BEST) + 1.5
            return dataclasses.replace(score(stream), loss=seen.losses[step])

        session.score = told
        take_steps(session)
        session.score = score
        seen.result, seen.shown = finish(session), "\n".join(lines)
        yield seen


def test_the_logged_rate_is_the_rate_of_the_step_and_was_applied(run: Watched) -> None:
    """Warm-up of 1 step from half the peak, then 9 steps of cosine from 1e-2 to 1e-3: the clock is the run's, which two
    skipped steps do not hold back."""
    logged = {record["step"]: record["lr"] for record in run.records("train")}
    expected = {1: 5e-3} | {n: 1e-2 * (0.1 + 0.45 * (1 + math.cos(math.pi * (n - 2) / 9))) for n in range(2, STEPS + 1)}
    assert logged == pytest.approx(expected, rel=1e-4)
    assert logged[STEPS] == pytest.approx(1e-3)
    assert run.rates == pytest.approx({n: rate for n, rate in expected.items() if n not in SKIPPED}, rel=2e-3)
    assert [record["step"] for record in run.records("train") if record["skipped"]] == list(SKIPPED)


def test_drops_are_those_of_all_steps(run: Watched) -> None:
    result, drops = run.result, list(run.drops.values())
    assert len(set(drops)) > 3
    assert len(drops) == STEPS - len(SKIPPED)
    assert result["train_drop_fraction"] == pytest.approx(np.mean(drops), rel=1e-9)


def test_the_best_checkpoint_is_scored_at_the_end(run: Watched) -> None:
    """The last parameters, and the checkpoint of step 8 or 11, have another loss."""
    session, best = run.session, run.session.checkpoints.best()
    assert best is not None
    assert (run.result["best_step"], best.step, best.val_loss) == (BEST, BEST, 1.5)
    params = restore(best, {"params": session.state.params})["params"]
    stream = session.data.store.valid.stream
    assert run.result["val_loss"] == session.score(stream, params).loss != session.score(stream).loss


def test_the_last_step_is_evaluated(run: Watched) -> None:
    assert [record["step"] for record in run.records("val")] == [4, 8, STEPS] == list(run.losses)
    assert run.session.counters.evaluated == STEPS


def test_each_loss_names_its_stream(run: Watched) -> None:
    """During training the fixed subset; at the end the whole validation stream."""
    whole, part = len(run.session.data.store.valid.tokens) - 1, len(run.session.data.subset().tokens) - 1
    assert part < whole
    assert {(record["stream"], record["tokens"]) for record in run.records("val")} == {("subset", part)}
    assert f"on {part} of {whole} validation tokens" in run.shown.replace(",", "")
    result = run.result
    assert (result["val_stream"], result["val_tokens"]) == ("whole", whole)
