"""Fine-tuning: only answers count, exactly; and a tuned run is a run like any other."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.cli.main import run_command
from moe_jax.config import RunConfig, TrainConfig, UserError
from moe_jax.data.batches import MaskedBatch
from moe_jax.inference.chat import RoleChat
from moe_jax.inference.decode import TextGenerator
from moe_jax.inference.sampling import Sampling
from moe_jax.model.kernels import cross_entropy
from moe_jax.model.kernels.cross_entropy import mean_cross_entropy, token_losses
from moe_jax.runs.catalog import load_config
from moe_jax.runs.checkpoint import CheckpointStore
from moe_jax.runs.load import open_run
from moe_jax.training.evaluate import evaluate, make_evaluation_step
from moe_jax.training.gradients import gradients
from moe_jax.training.run import finish, take_steps
from moe_jax.training.session import Session
from moe_jax.training.start import new_start
from tests.support import tiny, tuning
from tests.support.commands import refusal, sft_settings
from tests.support.saved_run import resuming

SAMPLES = True
"""Runs write samples (`conftest.py`)."""

CONFIG = TrainConfig(steps=10)

# The loss


@pytest.fixture(params=["one block", "several blocks"])
def weighted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The weighted cross-entropy, in each form."""
    if request.param == "several blocks":
        monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", 4 * tiny.V * 3)
    return lambda h, head, targets, w, scale=None: mean_cross_entropy(h, head, targets, scale, w)


def products(n: int = 11) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((n, 8), (8, tiny.V)))
    return hidden, head, jnp.asarray(rng.integers(0, tiny.V, n)), jnp.asarray(rng.random(n) < 0.4, jnp.float32) / 3


def test_masked_targets_change_no_bit(weighted: Any) -> None:
    """The loss and both gradients are the same to the last bit when the targets that do not count are others, and the
    gradient of their rows is exactly 0."""
    hidden, head, targets, weights = products()
    other = jnp.where(weights > 0, targets, (targets + 5) % tiny.V)
    both = [jax.value_and_grad(weighted, argnums=(0, 1))(hidden, head, t, weights) for t in (targets, other)]
    tiny.assert_same_bits(*both)
    d_hidden = np.asarray(both[0][1][0])
    assert (d_hidden[np.asarray(weights) == 0] == 0).all()
    assert (np.abs(d_hidden[np.asarray(weights) > 0]).max(1) > 0).all()


def test_the_weighted_sum_and_its_gradients(weighted: Any) -> None:
    """Against jax's own gradient of the plain formula; a loss scale changes neither."""
    hidden, head, targets, weights = products()

    def plain(h: jax.Array, w: jax.Array) -> jax.Array:
        return (token_losses(jnp.matmul(h, w, precision="highest"), targets) * weights).sum()

    def scaled(h: jax.Array, w: jax.Array, scale: jax.Array | None) -> jax.Array:
        return weighted(h, w, targets, weights, scale) * (1 if scale is None else scale)

    expected = jax.value_and_grad(plain, argnums=(0, 1))(hidden, head)
    for scale in (None, jnp.float32(64)):
        factor = 1 if scale is None else scale
        value, grads = jax.value_and_grad(scaled, (0, 1))(hidden, head, scale)
        assert tiny.relative_error(value / factor, expected[0]) < 1e-6
        for one, other in zip(grads, expected[1], strict=True):
            assert tiny.relative_error(one / factor, other) < 1e-5


@functools.lru_cache
def built() -> tuple[Any, Any]:
    return tiny.build(tiny.config(layers=1, width=16, capacity_factor=2.0))


def counted(m: int, b: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((m, b, tiny.T)) < 0.3


@functools.lru_cache
def gradient_of() -> Any:
    graphdef = built()[0]
    return jax.jit(lambda params, batch: gradients(graphdef, params, batch, jax.random.key(0), None, CONFIG))


def test_accumulated_is_the_whole_batch() -> None:
    """Four sequences at once, and as 2 x 2 with another number of answers in each half: the same loss and gradient. A
    mean of the two halves' means would weigh their answers differently."""
    whole = MaskedBatch.of(tiny.tokens(1, 4, tiny.T + 1), counted(2, 2).reshape(1, 4, -1))
    halves = MaskedBatch.of(whole.tokens.reshape(2, 2, -1), counted(2, 2))
    assert len({int(x) for x in counted(2, 2).sum((1, 2))}) == 2
    (one, first), (other, second) = (gradient_of()(built()[1], batch) for batch in (whole, halves))
    assert tiny.relative_error(first.loss, second.loss) < 1e-6
    assert int(first.answers) == int(second.answers * 2) == counted(2, 2).sum()
    assert max(tiny.gradient_errors(one, other).values()) < 1e-5


def test_a_batch_without_answers_has_loss_zero() -> None:
    batch = MaskedBatch.of(tiny.tokens(1, 4, tiny.T + 1), counted(1, 4) & False)
    grads, metrics = gradient_of()(built()[1], batch)
    assert (float(metrics.loss), float(metrics.answers)) == (0, 0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    assert (np.asarray(grads["norm"]["scale"]) == 0).all(), "the norm before the head has no other loss"


def test_evaluation_of_answers() -> None:
    """Against token losses of the windows' own logits: with all tokens marked it is the plain evaluation."""
    graphdef, params = built()
    tokens, step = tiny.tokens(60), make_evaluation_step(graphdef)
    score = functools.partial(evaluate, step, params, tokens, seq_len=tiny.T, token_bytes=np.ones(tiny.V, np.int64))
    plain, everything = score(), score(answers=np.ones(60, bool))
    assert everything.loss == pytest.approx(plain.loss, rel=1e-9)
    half = np.arange(60) % 2 == 0
    parts = [score(answers=mask) for mask in (half, ~half)]
    assert sum(p.loss * p.tokens for p in parts) == pytest.approx(plain.loss * plain.tokens, rel=1e-6)
    assert parts[0].bits_per_byte == pytest.approx(parts[0].loss / np.log(2) * parts[0].tokens / half.sum(), rel=1e-9)
    none = score(answers=np.zeros(60, bool))
    assert (none.loss, none.tokens, none.bits_per_byte, none.drop_fraction) == (0, 0, 0, 0)


# Whole runs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuning.base_run(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuning.write_conversations(tmp_path_factory.mktemp("data") / "chats.jsonl")


def run_of(config: RunConfig, saved: RunConfig | None = None) -> tuple[Session, dict[str, Any]]:
    session = Session.open(config, resuming(saved) or new_start(config))
    take_steps(session)
    return session, finish(session)


@pytest.fixture(scope="module")
def tuned(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, dict[str, Any]]:
    return run_of(tuning.settings(base, data, tmp_path_factory.mktemp("tuned") / "run"))


@pytest.mark.runs
def test_a_tuned_run_starts_at_its_base_and_says_what_it_scores(tuned: Any, base: Path) -> None:
    session, result = tuned
    start = open_run(base)
    first = session.score(session.data.store.valid.stream, start.params)
    assert result["val_loss"] < first.loss
    assert (result["val_stream"], result["val_tokens"]) == ("whole", first.tokens)
    assert first.tokens == session.data.store.valid.targets
    assert result["trigram_bits_per_byte"] is None
    assert session.config.model == start.config.model
    assert session.config.train.weight_decay == 0  # it would pull the weights of the base to zero
    assert session.origin is not None
    assert session.origin["tuned_from"] == str(base)
    samples = session.folder.samples.read_text()
    assert "\nassistant\n" in samples  # the separator between the turns is shown as a line end
    assert "endoftext" not in samples
    records = [json.loads(line) for line in (session.folder.path / "metrics.jsonl").read_text().splitlines()]
    assert all(r["answer_tokens"] > 0 for r in records if r["split"] == "train")
    assert {damage for _, damage in CheckpointStore(session.folder.path).examine()} == {None}
    assert load_config(session.folder.path) == dataclasses.replace(session.config, resume=False)


@pytest.mark.reliability
@pytest.mark.parametrize(
    "flags",
    [pytest.param((), marks=pytest.mark.slow), ("--lora", "2", "--train-router", "--grad-accum", "2")],
    ids=["whole", "lora"],
)
def test_resumed_is_uninterrupted_by_bits(flags: tuple[str, ...], base: Path, data: Path, tmp_path: Path) -> None:
    whole, _ = run_of(tuning.settings(base, data, tmp_path / "whole", *flags))
    part = tuning.settings(base, data, tmp_path / "part", *flags)
    session = Session.open(part, new_start(part))
    save = session.save

    def save_and_die(step: int, val_loss: float | None) -> None:
        save(step, val_loss)
        raise KeyboardInterrupt

    session.save = save_and_die
    with pytest.raises(KeyboardInterrupt):
        take_steps(session)
    saved = load_config(tmp_path / "part")
    assert saved is not None
    shutil.move(base, f"{base}.away")  # a resumed run does not need its base
    try:
        resumed, _ = run_of(dataclasses.replace(saved, resume=True), saved)
    finally:
        shutil.move(f"{base}.away", base)
    assert resumed.resumed_from == 3
    tiny.assert_same_bits(resumed.state, whole.state)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--run", "{base}", "--data", "{base}/config.json"], "must be JSON lines"),
        (["--run", "{base}", "--data", "{data}", "--train-router"], "--train-router True: must be left out"),
        (
            ["--run", "{base}", "--data", "{data}", "--lora", "2", "--optimizer", "muon"],
            "--optimizer muon: is for whole",
        ),
    ],
)
def test_wrong_settings_are_refused(flags: list[str], said: str, base: Path, data: Path, tmp_path: Path) -> None:
    given = [flag.format(base=base, data=data) for flag in flags]
    assert said in refusal(sft_settings, *given, "--out", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.reliability
@pytest.mark.parametrize(
    "flags", [(), pytest.param(("--lora", "16", "--lr", "2e-2"), marks=pytest.mark.slow)], ids=["whole", "lora"]
)
def test_it_learns_to_answer(flags: tuple[str, ...], data: Path, tmp_path: Path) -> None:
    """The exact answers to four questions: none before, all after. Asked as `chat` asks, each in a new conversation."""
    wide = tuning.base_run(tmp_path / "base", width=32, expert_hidden=32, layers=2)

    def right(run: Path) -> int:
        opened = open_run(run)
        generator = TextGenerator(opened.writer, opened.params, opened.tokenizer, opened.config.model.seq_len)
        given = {"seed": 0, "limit": 8, "context": 32}
        said = {}
        for question in tuning.ANSWERS:
            said[question] = "".join(RoleChat(generator, Sampling(0.0), **given).reply(question))
        return sum(said[question] == answer for question, answer in tuning.ANSWERS.items())

    assert right(wide) == 0
    lr = () if flags else ("--lr", "1e-2")
    steps = ("--steps", "200", "--eval-every", "100", "--save-every", "100", "--batch-size", "8")
    run_of(tuning.settings(wide, data, tmp_path / "run", *steps, *lr, *flags))
    assert right(tmp_path / "run") == len(tuning.ANSWERS)


@pytest.mark.runs
def test_evaluate_scores_the_answers_of_a_file(tuned: Any, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a tuned run. A plain run refuses conversations, and a tuned run still scores a plain text."""
    run = str(tuned[0].folder.path)
    found = []
    for given in ((), ("--data", str(data)), ("--data", str(data.parent / "plain.txt"))):
        (data.parent / "plain.txt").write_text("A plain text.")
        assert run_command(["evaluate", "--run", run, "--json", *given]) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert [f["scored"] for f in found] == ["answers", "answers", "all tokens"]
    assert found[0]["val_loss"] == tuned[1]["val_loss"]
    answers = sum(len(tuning.ANSWERS[name]) + 1 for name in [*tuning.ANSWERS] * 15)
    assert [f["tokens"] for f in found] == [tuned[1]["val_tokens"], answers, len("A plain text.") + 1]


def test_a_scored_part_without_an_answer_is_refused_at_the_start(base: Path, data: Path, tmp_path: Path) -> None:
    """The first token of an answer comes after more than two tokens of its question."""
    config = tuning.settings(base, data, tmp_path / "run", "--data.eval-tokens", "2")
    with pytest.raises(UserError, match=r"--data\.eval-tokens 2: no answer is in the first 2 validation tokens"):
        Session.open(config, new_start(config))


def test_conversations_shorter_than_a_window_are_padded_at_its_end(base: Path, tmp_path: Path) -> None:
    """Each row holds all of them. What follows does not count, and no later row differs."""
    path = tmp_path / "two.jsonl"
    path.write_text(
        2
        * (json.dumps({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ab"}]}) + "\n")
    )
    config = tuning.settings(base, path, tmp_path / "run", "--batch-size", "2", "--grad-accum", "1")
    data = Session.open(config, new_start(config)).data
    held, batch = data.store.train, data.batch(3)
    count, separator = len(held.tokens), data.store.tokenizer.separator_id
    assert count < config.model.seq_len
    assert batch.tokens.shape == (1, 2, config.model.seq_len + 1)
    for row, weights in zip(batch.tokens[0], batch.weights[0], strict=True):
        assert row.tolist() == [*held.tokens.tolist(), *[separator] * (len(row) - count)]
        np.testing.assert_array_equal(weights[: count - 1] > 0, held.answers[1:])
        assert not weights[count - 1 :].any()
