"""Dense to sparse: the same function at step 0, copies that part, and a run that remembers where it comes from."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import DataConfig, ExecutionConfig, ModelConfig, RoutingConfig, RunConfig, TrainConfig, UserError
from moe_jax.inference.slots import advance, prefill
from moe_jax.model.costs import training_flops
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import merge
from moe_jax.runs.catalog import load_config
from moe_jax.training.evaluate import Evaluation
from moe_jax.training.initial_weights import copy_dense_params
from moe_jax.training.run import finish, take_steps
from moe_jax.training.session import Session
from moe_jax.training.start import new_start
from tests.support import tiny
from tests.support.saved_run import resuming


def twins(**changes: Any) -> tuple[Any, Any, Any, Any]:
    """Definition and float64 parameters of a dense model, all random, and of the MoE made of it."""
    dense = tiny.config(dense="active", **changes)
    sparse = dataclasses.replace(dense, dense="none", expert_hidden=dense.dense_hidden)
    (dense_def, dense_params), (sparse_def, fresh) = (tiny.build(c, dtype="float64") for c in (dense, sparse))
    return dense_def, dense_params, sparse_def, copy_dense_params(fresh, dense_params)


@pytest.mark.parametrize(
    "changes",
    [
        {"capacity_factor": 4.0, "layers": 1},
        pytest.param(
            {"capacity_factor": 4.0, "top_k": 3, "activation": "gelu", "norm": "layernorm", "bias": True}
            | {"positions": "learned", "tied_head": False},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["swiglu, top-2", "gelu, top-3"],
)
def test_the_mixture_is_the_dense_function(changes: dict[str, Any], float64: None) -> None:
    """Evaluation, training without drops, prefill and decoding, of parameters without any structure. A token's K
    gates differ from each other, so it is their sum that counts."""
    dense_def, dense, sparse_def, sparse = twins(**changes)
    tokens = jnp.asarray(tiny.tokens(2, tiny.T))

    @functools.partial(jax.jit, static_argnums=0)
    def logits_of(graphdef: Any, params: Any) -> dict[str, Any]:
        model = merge(graphdef, params)
        read = prefill(graphdef, params, tokens, jnp.int32(3))
        found = {mode.value: model.logits(model(tokens, mode)[0]) for mode in (Mode.EVALUATE, Mode.TRAIN)}
        return found | {"prefill": read.logits, "decode": advance(graphdef, params, read, tokens[:, 3]).logits}

    ones, others = logits_of(dense_def, dense), logits_of(sparse_def, sparse)
    for name, one in ones.items():
        assert tiny.relative_error(one, others[name]) < 1e-12, name


# Whole runs


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict[str, Any]]:
    """The settings and the summary of a dense run of 6 steps."""
    folder = tmp_path_factory.mktemp("dense")
    (folder / "text.txt").write_text("<|endoftext|>".join(f"a cat sat on mat {i} with dog {i + 1}" for i in range(60)))
    model = ModelConfig(
        seq_len=16,
        layers=1,
        width=16,
        heads=2,
        experts=4,
        expert_hidden=8,
        dense="active",
        routing=RoutingConfig(capacity_factor=0.75),
    )
    config = RunConfig(
        out=str(folder / "run"),
        model=model,
        data=DataConfig(source=str(folder / "text.txt"), tokenizer="byte"),
        train=TrainConfig(steps=6, batch_size=4, log_every=3, eval_every=3, save_every=3),
        execution=ExecutionConfig(compute_dtype="float32"),
    )
    session = Session.open(config, new_start(config))
    score, losses = session.score, iter([1.0, 2.0])

    def best_at_step_3(*args: Any) -> Evaluation:
        """The second evaluation, at the last step, seems worse. So the best checkpoint is not the last."""
        scored = score(*args)
        return scored if len(args) == 2 else dataclasses.replace(scored, loss=next(losses))

    session.score = best_at_step_3
    take_steps(session)
    result = finish(session)
    assert result["best_step"] == 3
    return config, result


def whole(config: RunConfig) -> tuple[Session, dict[str, Any]]:
    session = Session.open(config, resuming(load_config(Path(config.out))) or new_start(config))
    take_steps(session)
    return session, finish(session)


def sparse(dense: RunConfig, out: Path, **train_changes: Any) -> RunConfig:
    config = new_start(RunConfig(upcycle=dense.out)).defaults
    return dataclasses.replace(config, out=str(out), train=dataclasses.replace(config.train, **train_changes))


@pytest.mark.runs
def test_a_run_starts_at_the_dense_loss_and_its_experts_part(
    dense: tuple[RunConfig, dict[str, Any]], tmp_path: Path
) -> None:
    before, result = dense
    config = sparse(before, tmp_path / "sparse")
    assert (config.model.dense, config.model.expert_hidden) == ("none", 17)  # 2 x 8 + 4 / 3 rounded
    session = Session.open(config, new_start(config))
    assert session.score(session.data.store.valid.stream).loss == pytest.approx(result["val_loss"], rel=1e-6)
    take_steps(session)
    experts = np.asarray(session.state.params["blocks"][0]["ffn"]["experts"]["w_in"])
    distance = np.abs(experts[:, None] - experts).max((-1, -2))
    assert (distance[~np.eye(4, dtype=bool)] > 1e-4).all()
    assert finish(session)["val_loss"] < result["val_loss"]


@pytest.mark.runs
def test_where_it_comes_from_is_written_down_and_kept(dense: tuple[RunConfig, dict[str, Any]], tmp_path: Path) -> None:
    before, result = dense
    out = tmp_path / "sparse"
    session, summary = whole(sparse(before, out))
    flops = training_flops(session.config, 6), training_flops(load_config(Path(before.out)), result["best_step"])
    assert (summary["training_flops"], summary["inherited_flops"]) == flops
    assert result["inherited_flops"] == 0
    config = load_config(out)
    assert config is not None
    assert config.upcycle == before.out
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=7))
    resumed, summary = whole(longer)
    assert resumed.resumed_from == 6
    assert summary["inherited_flops"] == flops[1]
    first, second = json.loads((out / "config.json").read_text())["history"]
    assert (first["upcycled_from"], first["step"]) == (before.out, result["best_step"])
    assert second["resumed_at_step"] == 6


@pytest.mark.runs
def test_another_text_is_refused(dense: tuple[RunConfig, dict[str, Any]], tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("<|endoftext|>".join(f"a cow sat on mat {i}" for i in range(60)))
    config = sparse(dense[0], tmp_path / "sparse")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(other)))
    with pytest.raises(UserError, match=r"--data .*other.txt: not the text"):
        Session.open(config, new_start(config))
    assert not (tmp_path / "sparse").exists()
