"""Numbers that are not finite, wherever they come from, reach no checkpoint; and what else a run must shrug off."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import RunConfig, UserError
from moe_jax.runs.catalog import load_config
from moe_jax.runs.checkpoint import CheckpointStore, restore, stored_shapes
from moe_jax.system.random_keys import Purpose
from moe_jax.training import step as step_module
from moe_jax.training.run import take_steps
from moe_jax.training.session import Session
from moe_jax.training.state import TrainState
from tests.support import saved_run, short_form, tiny
from tests.support.saved_run import resuming
from tests.training.conftest import quick  # noqa: F401
from tests.training.test_run import configuration, records, run, text, timeless, uninterrupted  # noqa: F401

pytestmark = pytest.mark.reliability
NAN = np.float32("nan")


def poison(tree: Any, name: str) -> Any:
    """The tree with one NaN, in the first leaf whose path ends so."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    index = next(i for i, path in enumerate(paths) if path.endswith(name))
    values = [leaf for _, leaf in leaves]
    values[index] = jnp.array(values[index]).at[(0,) * values[index].ndim].set(NAN)
    return jax.tree_util.tree_unflatten(treedef, values)


def before_step(session: Session, step: int, change: Callable[[TrainState], TrainState]) -> None:
    """Change the state just before a step, once."""
    take = session.programs.step

    def changed(state: TrainState, batch: Any) -> Any:
        return take(change(state) if int(state.step) == step - 1 else state, batch)

    saved_run.replace_step(session, changed)


def finite_checkpoints(folder: Path) -> bool:
    arrays = [restore(c, stored_shapes(c)) for c in CheckpointStore(folder).list()]
    return all(np.isfinite(np.asarray(x, np.float64)).all() for tree in arrays for x in tree.values())


def watch(session: Session) -> dict[int, dict[str, Any]]:
    """Will hold a copy of the state before each step, by the number of steps taken."""
    take, kept = session.programs.step, {}

    def watched(state: TrainState, tokens: Any) -> Any:
        kept[int(state.step)] = jax.tree.map(np.array, dataclasses.asdict(state))
        return take(state, tokens)

    saved_run.replace_step(session, watched)
    return kept


def poison_gradients(monkeypatch: pytest.MonkeyPatch, config: RunConfig, first: int, last: int) -> None:
    """The gradient of the router holds a NaN at the steps from `first` to `last`, and the loss is as it was."""
    true = step_module.gradients

    def poisoned(graphdef: Any, params: Any, batch: Any, key: Any, *rest: Any, **named: Any) -> Any:
        grads, metrics = true(graphdef, params, batch, key, *rest, **named)
        # Only its key tells a step which one it is.
        keys = [
            step_module.purpose_key(config.train.seed, Purpose.DROPOUT, jnp.int32(i - 1))
            for i in range(first, last + 1)
        ]
        is_bad = jnp.stack([(jax.random.key_data(k) == jax.random.key_data(key)).all() for k in keys]).any()
        bad = poison(grads, "router")
        return jax.tree.map(lambda a, b: jnp.where(is_bad, a, b), bad, grads), metrics

    monkeypatch.setattr(step_module, "gradients", poisoned)


@pytest.mark.parametrize("source", ["bad data", "a gradient"])
def test_what_is_not_finite_skips_one_step(
    source: str,
    text: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At step 5, targets outside the vocabulary make the loss NaN; or a gradient holds a NaN though the loss is finite.
    The step changes nothing but its counters, and step 6 trains on."""
    config = configuration(text, tmp_path / "run", log_every=1)
    if source == "a gradient":
        poison_gradients(monkeypatch, config, 5, 5)
    session = Session.open(config)
    batch, kept = session.data.batch, watch(session)
    if source == "bad data":
        saved_run.replace_batch(session, lambda step: batch(step) + (10**6 if step == 4 else 0))
    take_steps(session)
    for name in ("params", "optimizer", "loss_scale"):
        tiny.assert_same_bits(kept[4][name], kept[5][name])
    assert [kept[step]["skipped"].item() for step in (4, 5, 6)] == [0, 1, 1]
    (bad,) = [r for r in records(tmp_path / "run") if r.get("skipped")]
    not_finite = {name for name in ("loss", "grad_norm") if bad[name] is None}
    assert (bad["step"], not_finite) == (5, {"loss"} if source == "bad data" else {"grad_norm"})
    pairs = zip(*(jax.tree.leaves(kept[step]["params"]) for step in (5, 6)), strict=True)
    assert not all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("where", "save_every"), short_form(itertools.product(("params", "optimizer"), (1, 6)), [("params", 1)])
)
def test_a_nan_in_the_state_stops_the_run_and_never_reaches_a_checkpoint(
    where: str,
    save_every: int,
    text: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: tuple[Session, dict[str, Any]],  # noqa: F811
) -> None:
    """The run goes on from the last checkpoint as if nothing had been."""
    monkeypatch.setattr("moe_jax.training.logging.MAX_SKIPPED_IN_A_ROW", 3)
    out = tmp_path / "run"
    config = configuration(text, out, save_every=save_every)
    session = Session.open(config)
    name = "router" if where == "params" else "embedding"
    before_step(session, 7, lambda s: dataclasses.replace(s, **{where: poison(getattr(s, where), name)}))
    with pytest.raises(UserError, match=r"not finite.*--resume"):
        take_steps(session)
    assert finite_checkpoints(out)
    again = Session.open(config, resuming(load_config(out)))
    assert again.resumed_from == 6
    take_steps(again)
    tiny.assert_same_bits(again.state, uninterrupted[0].state)
    assert timeless(out) == timeless(uninterrupted[0].folder.path)
