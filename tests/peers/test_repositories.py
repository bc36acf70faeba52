"""Our routing beside flaxformer and V-MoE, and our model beside the PyTorch repository that this project began from.

None of them is in a package registry, so their code is read from clones. Without them these tests skip:

    git clone https://github.com/google/flaxformer clones/flaxformer
    git clone https://github.com/google-research/vmoe clones/vmoe
    git clone https://github.com/jamclaug/llm-foundation clones/llm-foundation
    MOE_JAX_CLONES=clones uv run --extra peers pytest -m peers
"""

import functools
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import ModelConfig
from moe_jax.model.moe.balance import balance_loss, z_loss
from moe_jax.model.moe.layer import Mode
from moe_jax.model.moe.router import Routing, route
from moe_jax.model.transformer import merge
from tests.support import tiny
from tests.support.leaky import Priority, leaky_queue_positions

pytestmark = [pytest.mark.peers, pytest.mark.timeout(900)]
CLONES = os.environ.get("MOE_JAX_CLONES")

B, T, E, K = 3, 20, 5, 2


def load(path: str, monkeypatch: pytest.MonkeyPatch, **stubs: Any) -> ModuleType:
    """A module from its file in the clones. `stubs` are modules that it imports and that the functions which we call do
    not use; a dot in a module's name is written `__`."""
    file = Path(CLONES or "", path)
    if not CLONES or not file.exists():
        pytest.skip(f"needs a clone with {path} in the folder that MOE_JAX_CLONES names")
    for name, members in stubs.items():
        module = ModuleType(name.replace("__", "."))
        module.__dict__.update(members)
        module.__path__ = []  # a package too
        monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = importlib.util.spec_from_file_location("peer_" + file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, loaded.__name__, loaded)  # their dataclasses look for it there
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def flaxformer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    types = dict.fromkeys(("Array", "DType", "Initializer"), Any)
    path = "flaxformer/flaxformer/architectures/moe/routing.py"
    return load(
        path,
        monkeypatch,
        flaxformer={},
        flaxformer__components={"dense": SimpleNamespace()},
        flaxformer__types=types,
    )


@pytest.fixture
def vmoe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    partitioning = SimpleNamespace(with_sharding_constraint=None)
    # `import vmoe.partitioning` needs the package to have the module as an attribute.
    loaded = {"vmoe": {"partitioning": partitioning}, "vmoe__partitioning": vars(partitioning)}
    return load("vmoe/vmoe/moe.py", monkeypatch, **loaded)


def routing(seed: int, top_k: int = K) -> Routing:
    """A skewed routing of B sequences: some experts are wanted by far more tokens than others."""
    logits = np.random.default_rng(seed).normal(size=(B, T, E)) * 2 + np.linspace(2, -2, E)
    return route(jnp.asarray(logits, jnp.float32), top_k)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_losses_of_flaxformer(top_k: int, flaxformer: ModuleType) -> None:
    """Theirs counts every token once for each of its K experts, so it is K times ours."""
    ours = routing(0, top_k)
    theirs = flaxformer._load_balancing_loss(ours.probs, ours.expert_index)
    np.testing.assert_allclose(top_k * balance_loss(ours), theirs, rtol=1e-6)
    np.testing.assert_allclose(z_loss(ours), flaxformer._router_z_loss(ours.logits), rtol=1e-6)
    assert float(theirs) > 1.2 * top_k, "a balanced routing would be equal by accident"


RULES: list[Priority] = ["leaky-choice-major", "leaky-batch-priority"]


@pytest.mark.parametrize("rule", RULES)
def test_queues_of_flaxformer(rule: Priority, flaxformer: ModuleType) -> None:
    """The place of every choice in its expert's queue."""
    ours = routing(1)
    router = flaxformer.TokensChooseScatterRouter(
        router_weights=None,
        jitter_noise=0.0,
        dtype=jnp.float32,
        ignore_padding_tokens=False,
        num_selected_experts=K,
        batch_prioritized_routing=rule == "leaky-batch-priority",
    )
    theirs = router._compute_routing_instructions(ours.probs, None, T)
    np.testing.assert_array_equal(ours.expert_index, theirs.dispatch_indices[..., 0])
    np.testing.assert_array_equal(leaky_queue_positions(ours, rule), theirs.dispatch_indices[..., 1])


@pytest.mark.parametrize("rule", RULES)
def test_queues_of_vmoe(rule: Priority, vmoe: ModuleType) -> None:
    """The same, one sequence at a time: a group of theirs is a sequence of ours."""
    ours = routing(2)
    places = leaky_queue_positions(ours, rule)
    for b in range(B):
        _, expert, place = vmoe._get_top_experts_per_item_common(ours.probs[b], K, rule == "leaky-batch-priority")
        np.testing.assert_array_equal(ours.expert_index[b], expert)
        np.testing.assert_array_equal(places[b], place.max(-1))


# The repository that this project began from: `seed-158m` has its shape

SEED: dict[str, Any] = {"norm": "layernorm", "positions": "learned", "activation": "gelu", "bias": True}
SEED |= {"tied_head": False, "dispatch": "blocks", "width": 16, "vocab_size": 31, "seq_len": 12}


@pytest.fixture
def in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture
def seed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Its model, with a causal mask, which it lacks, and with the tanh form of GELU, which we have."""
    torch = pytest.importorskip("torch", reason="needs PyTorch: uv run --extra peers pytest -m peers")
    module = load("llm-foundation/models/sparse_moe/model.py", monkeypatch, config={"Config": SimpleNamespace})
    plain = torch.nn.MultiheadAttention.forward

    def causal(self: Any, query: Any, key: Any, value: Any) -> Any:
        later = torch.triu(torch.ones(query.shape[1], key.shape[1], dtype=torch.bool), 1)
        return plain(self, query, key, value, attn_mask=later, need_weights=False)

    monkeypatch.setattr(torch.nn.MultiheadAttention, "forward", causal)
    functions = SimpleNamespace(**vars(torch.nn.functional))
    functions.gelu = functools.partial(torch.nn.functional.gelu, approximate="tanh")
    monkeypatch.setattr(module, "F", functions)
    return module


def seed_names(params: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters under its names. A linear layer of PyTorch holds [out, in]."""
    yield "tok_emb.weight", np.asarray(params["embedding"])
    yield "pos_emb.weight", np.asarray(params["position"])
    yield "head.weight", np.asarray(params["head"]).T
    for name in ("scale", "bias"):
        theirs = "weight" if name == "scale" else "bias"
        yield f"ln_f.{theirs}", np.asarray(params["norm"][name])
        for n, block in params["blocks"].items():
            yield f"layers.{n}.ln1.{theirs}", np.asarray(block["attention_norm"][name])
            yield f"layers.{n}.ln2.{theirs}", np.asarray(block["ffn_norm"][name])
    for n, block in params["blocks"].items():
        attention, ffn = block["attention"], block["ffn"]
        yield f"layers.{n}.attn.in_proj_weight", np.asarray(attention["qkv"]).T
        yield f"layers.{n}.attn.in_proj_bias", np.asarray(attention["qkv_bias"])
        yield f"layers.{n}.attn.out_proj.weight", np.asarray(attention["out"]).T
        yield f"layers.{n}.attn.out_proj.bias", np.asarray(attention["out_bias"])
        yield f"layers.{n}.ffn.gate.weight", np.asarray(ffn["router"]).T
        yield f"layers.{n}.ffn.w1", np.asarray(ffn["experts"]["w_in"])
        yield f"layers.{n}.ffn.w2", np.asarray(ffn["experts"]["w_out"])


def seed_model(module: ModuleType, config: ModelConfig, params: dict[str, Any]) -> Any:
    """Its model with our weights, in float64, without dropout."""
    torch = pytest.importorskip("torch")
    shape = SimpleNamespace(
        vocab_size=config.vocab_size,
        max_len=config.seq_len,
        d_model=config.width,
        n_heads=config.heads,
        n_layers=config.layers,
        d_ff=config.expert_hidden,
        n_experts=config.experts,
        top_k=config.routing.top_k,
        dropout=0.0,
    )
    model = module.SparseMoETransformer(shape).double().train()
    model.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in seed_names(params)})
    return model


def test_the_seed(seed: ModuleType, in_float64: None) -> None:
    """Logits, loss, and the gradient of every parameter, in float64. Without drops on our side, since it has none."""
    torch = pytest.importorskip("torch")
    config = tiny.config(**SEED)
    graphdef, params = tiny.build(config, dtype="float64")
    tokens = tiny.tokens(2, config.seq_len + 1, vocabulary=config.vocab_size)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        model = merge(graphdef, params)
        logits = model.logits(model(jnp.asarray(inputs), Mode.TRAIN)[0])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
        return -picked.mean(), logits

    (ours, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    model = seed_model(seed, config, params)
    theirs = model(torch.from_numpy(inputs).long(), torch.from_numpy(targets.copy()).long())
    theirs["loss"].backward()
    assert tiny.relative_error(logits, theirs["logits"].detach().numpy()) < 4e-14
    assert abs(float(ours) - float(theirs["loss"].detach())) < 1e-13
    found = dict(seed_names(gradient))
    expected = {key: p.grad.numpy() for key, p in model.named_parameters()}
    assert set(found) == set(expected)
    floor = 1e-5 * max(np.abs(value).max() for value in expected.values())
    errors = {key: tiny.relative_error(value, expected[key], floor) for key, value in found.items()}
    assert max(errors.values()) < 1e-12, errors
