"""The program of the peer with a stand-in for PyTorch and transformers: which model it builds, and what it times.

`tests/peers` compares the real model with ours.
"""

import contextlib
import io
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from moe_jax.benchmarks import mixtral
from moe_jax.benchmarks.mixtral import Shape

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


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_training_step_is_that_of_the_shape(precision: str, seen: list[Any]) -> None:
    both = SHAPE._replace(training_precisions=["float32", "bfloat16"])
    runs = mixtral.candidates(both, mixtral.build(SHAPE))
    options = {"lr": 0.25, "betas": (0.75, 0.875), "weight_decay": 0.125, "fused": True}
    assert ("adamw", options) in seen
    seen.clear()
    runs[f"train-{precision}"]()
    assert seen == [
        "training mode",
        ("cpu", "bf16", precision == "bfloat16"),
        ("called", (5, 16), {"labels": (5, 16), "use_cache": False, "output_router_logits": True}),
        "backward",
        ("clip", 2.0),
        "step",
        "zero grad",
    ]


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


def test_experts_that_transformers_does_not_take_are_an_error(seen: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixtral.sys, "stdin", io.StringIO("forward broken\n"))
    with pytest.raises(ValueError, match="transformers uses other experts, not broken"):
        mixtral.serve(SHAPE)
