"""What a notebook does with a trained model: `moe_jax.load_run`, and the methods of `Run`."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax.api import Run
from moe_jax.config import ConfigError, DataConfig, ExecutionConfig, RunConfig, TrainConfig, UserError
from moe_jax.inference.decode import TextGenerator
from moe_jax.inference.sampling import Sampling
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import merge
from moe_jax.training.run import finish, take_steps
from moe_jax.training.session import Session
from tests.support import saved_run, tiny

pytestmark = pytest.mark.runs

T = 32
PROMPT = "the cat sat"


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with saved_run.quick_training(tmp_path_factory.mktemp("cache"), samples=False):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder and summary of a run of 60 steps on small sentences, with drops in training."""
    folder = tmp_path_factory.mktemp("api")
    rng = np.random.default_rng(0)
    words = ["the", "cat", "dog", "ran", "sat", "on", "a", "mat", "and", "then", "it", "was", "happy"]
    (folder / "text.txt").write_text("<|endoftext|>".join(" ".join(rng.choice(words, 12)) + "." for _ in range(80)))
    config = RunConfig(
        out=str(folder / "run"),
        model=tiny.config(seq_len=T, layers=2, width=16, vocab_size=0, expert_hidden=16, capacity_factor=0.75),
        data=DataConfig(source=str(folder / "text.txt"), tokenizer="byte", eval_tokens=200),
        train=TrainConfig(steps=60, batch_size=8, lr=2e-2, warmup_steps=5, eval_every=30, save_every=30),
        execution=ExecutionConfig(compute_dtype="float32"),
    )
    session = Session.open(config)
    take_steps(session)
    return session.folder.path, finish(session)


@pytest.fixture(scope="module")
def run(trained: tuple[Path, dict[str, Any]]) -> Run:
    return moe_jax.load_run(trained[0])


def generator(run: Run) -> TextGenerator:
    return TextGenerator(run.writer, run.params, run.tokenizer, run.config.model.seq_len)


def test_it_opens_the_best_checkpoint_or_the_one_of_a_step(trained: tuple[Path, dict[str, Any]], run: Run) -> None:
    folder, summary = trained
    assert isinstance(run, moe_jax.Run)
    assert run.checkpoint.step == summary["best_step"] == 60
    earlier = moe_jax.load_run(str(folder), step=30)
    assert earlier.checkpoint.step == 30
    assert earlier.evaluate().loss > run.evaluate().loss


SETTINGS = [
    {},
    {"temperature": 0.7, "seed": 3, "top_k": 5, "max_tokens": 20},
    {"temperature": 1.5, "top_p": 0.7, "seed": 2, "max_tokens": 20},
    {"temperature": 1.5, "min_p": 0.2, "max_tokens": 20},
    {"temperature": 1.0, "repetition_penalty": 1.8, "seed": 1, "max_tokens": 50},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_generate_is_the_text_generator(settings: dict[str, Any], run: Run) -> None:
    """Each setting is given by its name. Some texts are longer than the context of 32 tokens."""
    sampling = Sampling(**{k: v for k, v in settings.items() if k in Sampling._fields})
    seed, limit = settings.get("seed", 0), settings.get("max_tokens", 400)
    told = "".join(generator(run).pieces(PROMPT, sampling, seed=seed, limit=limit))
    assert run.generate(PROMPT, **settings) == PROMPT + told
    assert "".join(run.stream(PROMPT, sampling, seed=seed, max_tokens=limit)) == told
    assert run.generate(PROMPT, **settings) == PROMPT + told, "the same arguments give the same text"
    if settings:
        assert run.generate(PROMPT, max_tokens=limit) != PROMPT + told, (
            "the settings change nothing, so the case tests nothing"
        )


def test_logits_are_those_of_an_uncached_pass_row_by_row(run: Run) -> None:
    """Row i is the last row of a pass over the first i + 1 tokens alone, without padding."""
    tokens = [run.tokenizer.separator_id, *run.tokenizer.encode("a cat")]
    logits = run.logits("a cat")
    assert (logits.shape, logits.dtype) == ((len(tokens), run.config.model.vocab_size), np.float32)

    @jax.jit
    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        model = merge(run.graphdef, params)
        return model.logits(model(tokens, Mode.EVALUATE)[0])

    for i in (2, len(tokens) - 1):
        alone = forward(run.params, jnp.asarray([tokens[: i + 1]]))
        np.testing.assert_allclose(logits[i], alone[0, -1], atol=2e-5)
    assert len({row.tobytes() for row in logits}) == len(tokens)
    assert run._programs.logits._cache_size() == 1
    run.logits(PROMPT)
    assert run._programs.logits._cache_size() == 1


def test_ids_are_taken_as_they_are_and_values_are_checked(run: Run) -> None:
    ids = [run.tokenizer.separator_id, *run.tokenizer.encode("A cat")]
    np.testing.assert_array_equal(run.logits(ids), run.logits("A cat"))
    for wrong in (-1, run.config.model.vocab_size):
        with pytest.raises(UserError, match=f"token {wrong}: must be from 0 to {run.config.model.vocab_size - 1}"):
            run.logits([0, wrong])
    for name, value in (("temperature", -1.0), ("temperature", math.nan), ("top_p", 3.0), ("max_tokens", -3)):
        with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} {value}: must be between"):
            run.generate("A", **{name: value})


def test_evaluate_on_the_runs_own_text_gives_the_summarys_numbers(
    trained: tuple[Path, dict[str, Any]], run: Run
) -> None:
    scored, summary = run.evaluate(), trained[1]
    assert scored.loss == summary["val_loss"]
    assert scored.bits_per_byte == summary["val_bits_per_byte"]
    assert (scored.tokens, scored.drop_fraction) == (summary["val_tokens"], summary["val_drop_fraction"])
    assert scored.bytes / scored.tokens == summary["val_bytes_per_token"]
    assert json.loads((trained[0] / "summary.json").read_text()) == summary


def test_an_expert_that_is_off_is_not_chosen_and_one_program_serves_all(run: Run) -> None:
    programs = set()
    for layer, e in ((0, 1), (1, 3)):
        quiet = run.switch_off(layer, e)
        trace = quiet.trace(PROMPT)
        assert e not in trace.expert_index[layer]
        assert e in trace.expert_index[1 - layer]
        np.testing.assert_allclose(trace.gate.sum(-1), 1, rtol=1e-5)
        quiet.logits(PROMPT)
        programs.add(id(quiet._programs))
    assert len(programs) == 1
    assert quiet._programs.logits._cache_size() == quiet._programs.trace._cache_size() == 1
    assert run.trace(PROMPT).expert_index.max() == 3, "the run itself is as before"


def test_switches_add_up_and_one_expert_can_be_forced(run: Run) -> None:
    both = run.switch_off(0, 1).switch_off(1, 0, 2)
    chosen = [set(layer.reshape(-1).tolist()) for layer in both.trace(PROMPT).expert_index]
    assert (chosen[0] & {1}, chosen[1]) == (set(), {1, 3})
    forced = run.force(1, 2).trace(PROMPT)
    assert (forced.expert_index[1, :, 0] == 2).all()
    np.testing.assert_array_equal(forced.gate[1], np.tile([1.0, 0.0], (len(forced.tokens), 1)))
    one, other = both.force(1, 3).logits(PROMPT), run.switch_off(0, 1).force(1, 3).logits(PROMPT)
    np.testing.assert_array_equal(one, other)
    assert np.abs(one - run.logits(PROMPT)).max() > 0.01


def test_a_switch_that_cannot_be_is_refused_in_one_line(run: Run) -> None:
    for switch, message in (
        (lambda: run.switch_off(2, 0), r"layer 2: must be between 0 and 1"),
        (lambda: run.switch_off(0, -1), r"expert -1: must be between 0 and 3"),
        (lambda: run.force(0, 4), r"expert 4: must be between 0 and 3"),
        (lambda: run.switch_off(1, 0, 1, 2, 3), r"layer 1: all its experts are switched off; leave one"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            switch()
        one_line(caught.value)


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


def test_errors_are_one_line_that_says_what_to_do(
    trained: tuple[Path, dict[str, Any]], run: Run, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"no run with a complete checkpoint there.*; or make a run") as caught:
        moe_jax.load_run(tmp_path)
    one_line(caught.value)
    with pytest.raises(UserError, match=r"--step 7: .* it has 30, 60") as caught:
        moe_jax.load_run(trained[0], step=7)
    one_line(caught.value)
    fits = "a" * (T - 1)
    assert run.logits(fits).shape[0] == T
    with pytest.raises(
        UserError, match=rf"{T + 1} tokens \(a text begins with a separator\), the context is {T}; shorten it"
    ) as caught:
        run.logits(fits + "a")
    one_line(caught.value)
    with pytest.raises(UserError, match="at most 16,384 can be shown") as caught:
        run.trace("a" * 16_384)
    one_line(caught.value)


def test_a_dense_baseline_has_nothing_to_trace(tmp_path: Path) -> None:
    dense = moe_jax.load_run(saved_run.save_run(tmp_path, dense="active"))
    with pytest.raises(UserError, match="dense baseline") as caught:
        dense.trace("a cat")
    one_line(caught.value)
    for switch in (lambda: dense.switch_off(0, 0), lambda: dense.force(0, 0), lambda: dense.ablation("a cat")):
        with pytest.raises(UserError, match="dense baseline"):
            switch()
    assert dense.logits("a cat").shape == (6, 257)
