"""The suite `peers`: both sides have one shape; and the process of Mixtral, with a stand-in for PyTorch.

`tests/peers` compares the real model with ours.
"""

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from moe_jax.benchmarks import mixtral, peers, suites
from moe_jax.benchmarks.mixtral import Shape
from moe_jax.benchmarks.request import BenchmarkRequest
from moe_jax.config import UserError
from moe_jax.config.presets import PRESETS, preset, with_vocabulary
from moe_jax.model import precision
from moe_jax.model.costs import count_parameters, totals
from moe_jax.system.machine import Measured
from tests.benchmarks.test_suites import config


@pytest.mark.parametrize(("taken", "compared"), [("float32", ["float32"]), ("bfloat16", ["float32", "bfloat16"])])
def test_both_sides_train_in_the_same_precisions(
    taken: str, compared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "choose_policy", lambda kind: precision.choose_policy(taken))
    assert peers.shape_of(peers.like_mixtral(config()), 3).training_precisions == compared


def test_a_precision_that_the_peer_has_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "choose_policy", lambda kind: precision.choose_policy("float16"))
    with pytest.raises(UserError, match="this device trains in float16"):
        peers.shape_of(peers.like_mixtral(config()), 3)


EVERYTHING = {
    "norm": "layernorm",
    "positions": "learned",
    "activation": "gelu",
    "bias": True,
    "tie_value_output_init": True,
    "scaled_embedding": True,
    "zero_init_residual": True,
    "qk_norm": "head",
    "norm_eps": 1e-3,
    "renormalise_gates": False,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "dense": "active",
    "balancing": "bias",
    "shared_experts": 1,
    "logit_noise": 0.1,
    "input_jitter": 0.1,
    "eval_capacity_factor": 1.0,
}


@pytest.mark.parametrize("name", [*PRESETS, "everything"])
def test_ours_has_the_parameters_of_mixtral(name: str) -> None:
    """Embedding, head and last norm; in a layer four projections, two of them narrower where queries share keys, a
    router, three matrices an expert and two norms."""
    given = config(**EVERYTHING) if name == "everything" else with_vocabulary(preset(name))
    ours = peers.like_mixtral(given)
    c = ours.model
    keys = c.width * c.key_value_heads // c.heads  # and values: their heads are as wide as the queries'
    attention = 2 * c.width * (c.width + keys)
    layer = attention + c.width * c.experts + 3 * c.experts * c.width * c.expert_hidden + 2 * c.width
    assert totals(count_parameters(c)).total == 2 * c.vocab_size * c.width + c.width + c.layers * layer
    assert peers.shape_of(ours, 8) == peers.shape_of(given, 8)
    assert (ours.train.optimizer, ours.train.param_dtype, ours.execution.remat) == ("adamw", "float32", False)


def test_ours_has_nothing_that_mixtral_has_not() -> None:
    plain = {"norm": "rmsnorm", "positions": "rope", "activation": "swiglu", "bias": False, "tied_head": False}
    assert peers.like_mixtral(config(**EVERYTHING)).model == config(**plain).model


class Pretended:
    """A peer that takes 1,000 s with one implementation of experts and 2,000 with the other; 600 s to train in
    bfloat16."""

    def __init__(self, parameters: int, precisions: list[str]) -> None:
        runs = [*(f"train-{precision}" for precision in precisions), "forward", "prefill", "decode"]
        names = [f"{name} {experts}" for name in runs for experts in mixtral.EXPERTS]
        self.about = {"candidates": names, "parameters": parameters, "versions": {"torch": "0"}}

    def run(self, name: str) -> Measured:
        return Measured((600 if "bfloat16" in name else 1000) * (1 if name.endswith("grouped_mm") else 2))


def test_peers_are_compared_by_their_faster_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same precision, and each in its faster one."""
    monkeypatch.setattr(peers, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(peers, "MIN_TURN_SECONDS", 0)
    monkeypatch.setattr(peers, "choose_policy", lambda kind: precision.choose_policy("bfloat16"))
    size = totals(count_parameters(peers.like_mixtral(config()).model)).total
    with_peer = lambda size: lambda shape: contextlib.nullcontext(Pretended(size, shape.training_precisions))  # noqa: E731
    monkeypatch.setattr(peers, "peer", with_peer(size))
    numbers, times = peers.compare(config(), 2, 1)
    for name in ("forward", "prefill", "decode"):
        assert numbers[f"{name}_ratio"] == pytest.approx(1000 / times[name].median)
    assert numbers["train_ratio_float32"] == pytest.approx(1000 / times["train-float32"].median)
    assert numbers["train_ratio_bfloat16"] == pytest.approx(600 / times["train-bfloat16"].median)
    ours = min(times["train-float32"].median, times["train-bfloat16"].median)
    assert numbers["train_ratio_best"] == pytest.approx(600 / ours)
    assert set(suites.RATIOS.values()) == {name for name in numbers if "_ratio" in name}
    json.dumps(numbers)


def test_a_ratio_below_one_says_that_ours_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = dict.fromkeys(suites.RATIOS.values(), 1.5) | {"train_ratio_bfloat16": None, "decode_ratio": 0.5}
    monkeypatch.setattr(peers, "compare", lambda *request: (numbers, {}))
    printed = io.StringIO()
    suites.against_peers(Console(file=printed, width=120), BenchmarkRequest(config(), 2, 1))
    lines = [line for line in printed.getvalue().splitlines() if " x " in line]
    assert len(lines) == len(numbers) - 1
    assert [line for line in lines if "SLOWER" in line] == ["decoding: 0.50 x as fast as Mixtral: ours is SLOWER"]


SHAPE = Shape(
    vocab_size=60,
    seq_len=16,
    layers=2,
    width=8,
    heads=2,
    key_value_heads=1,
    head_width=6,
    experts=4,
    top_k=3,
    expert_hidden=24,
    batch_size=5,
    prompt=7,
    aux_loss_coef=0.5,
    lr=0.25,
    beta1=0.75,
    beta2=0.875,
    weight_decay=0.125,
    max_grad_norm=2.0,
    threads=3,
    training_precisions=["bfloat16"],
)


class Model:
    """Records how it is called."""

    def __init__(self, config: Any, seen: list[Any]) -> None:
        self.config, self._seen = config, seen
        config._experts_implementation = ""

    def float(self) -> "Model":
        self._seen.append("float32")
        return self

    def parameters(self) -> list[Any]:
        return [SimpleNamespace(numel=lambda: 5), SimpleNamespace(numel=lambda: 6)]

    def train(self) -> None:
        self._seen.append("training mode")

    def eval(self) -> None:
        self._seen.append("evaluation mode")

    def set_experts_implementation(self, name: str) -> None:
        self.config._experts_implementation = name.replace("broken", "other")

    def __call__(self, tokens: tuple[int, ...], **options: Any) -> Any:
        options = {k: getattr(v, "name", v) for k, v in options.items()}
        self._seen.append(("called", tokens, options))
        loss = SimpleNamespace(backward=lambda: self._seen.append("backward"))
        return SimpleNamespace(loss=loss, logits="logits")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the program does with the stand-ins, in order. A tensor of tokens is its shape."""
    events: list[Any] = []

    @contextlib.contextmanager
    def inference() -> Iterator[None]:
        events.append("inference")
        yield

    @contextlib.contextmanager
    def autocast(*how: Any, enabled: bool) -> Iterator[None]:
        events.append((*how, enabled))
        yield

    def adamw(parameters: Any, **options: Any) -> Any:
        events.append(("adamw", options))
        return SimpleNamespace(step=lambda: events.append("step"), zero_grad=lambda: events.append("zero grad"))

    clip = lambda _, most: events.append(("clip", most))  # noqa: E731
    torch = SimpleNamespace(
        manual_seed=lambda seed: events.append(("seed", seed)),
        randint=lambda high, size: size if high == SHAPE.vocab_size else None,
        optim=SimpleNamespace(AdamW=adamw),
        nn=SimpleNamespace(utils=SimpleNamespace(clip_grad_norm_=clip)),
        inference_mode=inference,
        autocast=autocast,
        bfloat16="bf16",
        set_num_threads=lambda n: events.append(("threads", n)),
        __version__="1.2",
    )
    cache = SimpleNamespace(name="cache", crop=lambda n: events.append(("crop", n)))
    transformers = SimpleNamespace(
        MixtralConfig=lambda **values: SimpleNamespace(values=values),
        MixtralForCausalLM=lambda config: Model(config, events),
        DynamicCache=lambda config: cache,
        __version__="3.4",
    )
    for name, module in (("torch", torch), ("transformers", transformers)):
        monkeypatch.setitem(mixtral.sys.modules, name, module)
    return events


def test_the_model_has_the_shape(seen: list[Any]) -> None:
    assert mixtral.build(SHAPE).config.values == {
        "vocab_size": 60,
        "hidden_size": 8,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "max_position_embeddings": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 3,
        "router_aux_loss_coef": 0.5,
        "tie_word_embeddings": False,
        "attn_implementation": "sdpa",
    }
    assert seen == [("seed", 0), "float32"]


def test_the_other_runs_and_the_half_full_cache(seen: list[Any]) -> None:
    cached = {"past_key_values": "cache", "use_cache": True}
    runs = mixtral.candidates(SHAPE, mixtral.build(SHAPE))
    assert ("called", (1, 8), cached | {"logits_to_keep": 1}) in seen
    calls = {
        "forward": ("called", (5, 16), {"use_cache": False}),
        "prefill": ("called", (1, 7), {"use_cache": True, "logits_to_keep": 1}),
        "decode": ("called", (1, 1), cached),
    }
    for name, call in calls.items():
        seen.clear()
        assert runs[name]() is not None
        assert seen == ["evaluation mode", "inference", call, *([("crop", -1)] if name == "decode" else [])]


def test_the_peer_says_what_it_is_and_times_what_it_is_asked(
    seen: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([1.0, 3.5, 10.0, 10.25])
    monkeypatch.setattr(mixtral.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(mixtral.sys, "stdin", io.StringIO("forward eager\ndecode grouped_mm\n"))
    mixtral.serve(SHAPE)
    about, *seconds = map(json.loads, capsys.readouterr().out.splitlines())
    names = ("train-bfloat16", "forward", "prefill", "decode")
    assert about == {
        "candidates": [f"{name} {experts}" for name in names for experts in ("eager", "grouped_mm")],
        "parameters": 11,
        "versions": {"torch": "1.2", "transformers": "3.4"},
    }
    assert seconds == [2.5, 0.25]
    assert seen[0] == ("threads", 3)


def test_a_peer_that_ends_says_with_which_status() -> None:
    process: Any = SimpleNamespace(stdout=io.StringIO(""), wait=lambda: 7)
    with pytest.raises(UserError, match="the peer, Mixtral in PyTorch, ended with status 7; its error is above"):
        peers.Peer(process)
    process = SimpleNamespace(stdout=io.StringIO(""), wait=lambda: -9)
    with pytest.raises(UserError, match="memory was full: take a smaller --batch-size"):
        peers.Peer(process)
    answers = io.StringIO('{"candidates": []}\n1.5\n')
    asked = io.StringIO()
    talking = peers.Peer(SimpleNamespace(stdout=answers, stdin=asked))  # pyright: ignore[reportArgumentType]
    assert talking.about == {"candidates": []}
    assert talking.run("train eager") == Measured(1.5)
    assert asked.getvalue() == "train eager\n"


def test_a_peer_is_killed_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/arguments\necho '{{\"pid\": '$$'}}'\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(peers.sys, "executable", str(program))
    monkeypatch.setattr(peers, "choose_policy", lambda _: SimpleNamespace(loss_scaling=False, compute="float32"))
    shape = peers.shape_of(config(), 3)
    with peers.peer(shape) as talking:
        assert Path(f"/proc/{talking.about['pid']}").exists() or sys.platform != "linux"
    assert talking._process.returncode == -9
    arguments = (tmp_path / "arguments").read_text()
    assert arguments.startswith("-W ignore::FutureWarning -m moe_jax.benchmarks.mixtral {")
    assert mixtral.Shape(**json.loads(arguments.partition("mixtral ")[2])) == shape
