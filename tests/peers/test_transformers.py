"""Our models beside Mixtral, Qwen3-MoE and GPT-2 of Hugging Face transformers, with the same weights, in PyTorch.

`uv run --extra peers pytest -m peers`. The two sides share nothing but the papers, so a paper misread shows here.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.benchmarks import mixtral as mixtral_program
from moe_jax.benchmarks.peers import like_mixtral, shape_of
from moe_jax.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from moe_jax.inference.decode import advance, prefill
from moe_jax.model.kernels.cross_entropy import mean_cross_entropy
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import merge
from tests.peers import weights
from tests.support import tiny

torch = pytest.importorskip("torch", reason="needs PyTorch: uv run --extra peers pytest -m peers")
transformers = pytest.importorskip("transformers", reason="needs transformers: uv run --extra peers pytest -m peers")
pytestmark = [
    pytest.mark.peers,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
]

B, T, V = 2, 24, 41
LLAMA = {"norm": "rmsnorm", "positions": "rope", "activation": "swiglu", "bias": False, "dispatch": "blocks"}
SHAPE = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA_SHAPE = SHAPE | {
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}


class Peer(NamedTuple):
    """A kind of model on both sides."""

    config: ModelConfig
    build: Callable[[], Any]
    names: Callable[[dict[str, Any]], Iterator[tuple[str, np.ndarray]]]


def config(**changes: Any) -> ModelConfig:
    return tiny.config(vocab_size=V, seq_len=T, width=16, experts=4, expert_hidden=12, tied_head=False, **changes)


DENSE = config(norm="layernorm", positions="learned", activation="gelu", bias=True, dense="active")


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**LLAMA_SHAPE, intermediate_size=12, num_local_experts=4)
    )


def qwen3_moe() -> Any:
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **LLAMA_SHAPE, moe_intermediate_size=12, num_experts=4, head_dim=8, norm_topk_prob=True
        )
    )


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=V,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=T,
            n_inner=DENSE.dense_hidden,
            tie_word_embeddings=False,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            bos_token_id=0,
            eos_token_id=0,
        )
    )


PEERS = {
    "mixtral": Peer(config(**LLAMA), mixtral, weights.llama_like),
    "qwen3-moe": Peer(config(**LLAMA, qk_norm="head"), qwen3_moe, weights.llama_like),
    "gpt2": Peer(DENSE, gpt2, weights.gpt2),
}


@functools.lru_cache
def both(name: str) -> tuple[Any, dict[str, Any], Any]:
    """Our graph definition and parameters, and their model with the same weights, in float32."""
    peer = PEERS[name]
    graphdef, params = tiny.build(peer.config)
    theirs = peer.build().float().eval()
    state = {key: torch.from_numpy(value.copy()) for key, value in peer.names(params)}
    # Names and shapes must be the same on both sides; theirs may have buffers too.
    assert set(state) == {key for key, _ in theirs.named_parameters()}
    theirs.load_state_dict(state, strict=False)
    return graphdef, params, theirs


@pytest.mark.parametrize("name", PEERS)
def test_cached_decoding(name: str) -> None:
    """A prompt of five tokens, then the rest one by one, each side with its own cache."""
    graphdef, params, theirs = both(name)
    tokens = tiny.tokens(1, T, vocabulary=V, seed=1)
    padded = np.zeros((1, T), np.int32)
    padded[0, :5] = tokens[0, :5]
    state = prefill(graphdef, params, padded, np.int32(5))
    ours = [np.asarray(state.logits[0])]
    step = jax.jit(functools.partial(advance, graphdef))
    for token in tokens[0, 5:-1]:
        state = step(params, state, jnp.array([token]))
        ours.append(np.asarray(state.logits[0]))
    expected, cache = [], None
    with torch.no_grad():
        for piece in (tokens[:, :5], *(tokens[:, n : n + 1] for n in range(5, T - 1))):
            out = theirs(torch.from_numpy(piece).long(), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            expected.append(out.logits[0, -1].numpy())
    assert tiny.relative_error(np.stack(ours), np.stack(expected)) < 4e-6


@pytest.mark.parametrize("name", PEERS)
def test_gradients(name: str) -> None:
    """Of the mean cross-entropy, for every parameter, in training mode. Nothing is dropped."""
    graphdef, params, theirs = both(name)
    tokens = tiny.tokens(B, T + 1, vocabulary=V, seed=2)

    @jax.jit
    @jax.value_and_grad
    def loss(params, tokens):
        model = merge(graphdef, params)
        hidden = model(tokens[:, :-1], Mode.TRAIN)[0]
        flat = hidden.reshape(-1, hidden.shape[-1])
        return mean_cross_entropy(flat, model.head_matrix(), tokens[:, 1:].reshape(-1))

    ours, gradient = loss(params, tokens)
    theirs.zero_grad()
    inputs, targets = torch.from_numpy(tokens[:, :-1]).long(), torch.from_numpy(tokens[:, 1:]).long()
    expected = torch.nn.functional.cross_entropy(theirs(inputs).logits.reshape(-1, V), targets.reshape(-1))
    expected.backward()
    assert abs(float(ours) - float(expected.detach())) < 1e-6 * float(expected.detach())
    found = dict(PEERS[name].names(gradient))
    of_theirs = {key: p.grad.numpy() for key, p in theirs.named_parameters()}
    if name == "gpt2":  # the feed-forward biases that our model does not have
        found = {key: value for key, value in found.items() if "mlp" not in key or "bias" not in key}
    floor = 1e-5 * max(np.abs(value).max() for value in of_theirs.values())
    errors = {key: tiny.relative_error(value, of_theirs[key], floor) for key, value in found.items()}
    assert max(errors.values()) < 1e-5, errors


def test_the_benchmark_trains_mixtral_in_the_named_precision() -> None:
    """The first loss of `benchmark.py peers`: bfloat16 differs from float32 by its rounding."""
    ours = RunConfig(model=config(**LLAMA), data=DataConfig(), train=TrainConfig(steps=10))
    shape = shape_of(like_mixtral(ours), batch_size=2)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        asked = shape._replace(training_precisions=[dtype])
        runs = mixtral_program.candidates(asked, mixtral_program.build(asked))
        losses[dtype] = float(runs[f"train-{dtype}"]().detach())
    assert 0 < abs(losses["bfloat16"] - losses["float32"]) < 0.01 * losses["float32"]
