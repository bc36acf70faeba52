"""Imports and exports compute what the classes of transformers compute, without torch: against `by_numpy.py`."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_jax.config import ModelConfig
from moe_jax.interop import gguf_file, huggingface
from moe_jax.interop.architectures import architecture_of
from moe_jax.interop.huggingface import config_json
from moe_jax.interop.pretrained import Pretrained
from moe_jax.interop.source import open_source
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import abstract_model, merge
from moe_jax.runs.load import open_run
from tests.interop.by_numpy import logits_of
from tests.interop.made import LAYOUTS, SHAPE, byte_tokenizer
from tests.interop.saved import save
from tests.support import tiny

pytestmark = pytest.mark.interop

TOKENS = np.array([256, 79, 110, 101, 32, 97, 256, 100, 111])
UP_DOWN = ("gate_proj", "up_proj", "down_proj")


def random_tensors(config: dict[str, Any], fused: bool) -> dict[str, np.ndarray]:
    """The tensors that a class has; the scales of norms are near 1."""
    shapes = shapes_of(config, fused)
    rng = np.random.default_rng(0)
    return {
        name: (rng.normal(size=shape) * (0.3 if len(shape) > 1 else 0.2) + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


def shapes_of(config: dict[str, Any], fused: bool) -> dict[str, tuple[int, ...]]:
    """The names and shapes of its tensors, by hand. `fused`: experts in one tensor, where there are both forms."""
    kind, width, hidden = config["model_type"], config["hidden_size"], config["intermediate_size"]
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim", width // heads)
    experts, own = (
        config.get("num_experts", config.get("num_local_experts")),
        config.get("moe_intermediate_size", hidden),
    )
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    shapes["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        own_shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
            "self_attn.q_proj.weight": (heads * size, width),
            "self_attn.k_proj.weight": (keys * size, width),
            "self_attn.v_proj.weight": (keys * size, width),
            "self_attn.o_proj.weight": (width, heads * size),
        }
        if kind in ("qwen3", "qwen3_moe"):
            own_shapes |= {f"self_attn.{name}_norm.weight": (size,) for name in "qk"}
        if kind == "qwen2_moe" and config.get("qkv_bias", True):
            own_shapes |= {"self_attn.q_proj.bias": (heads * size,), "self_attn.k_proj.bias": (keys * size,)}
            own_shapes["self_attn.v_proj.bias"] = (keys * size,)
        if kind == "qwen2_moe":
            own_shapes["mlp.shared_expert_gate.weight"] = (1, width)
            shared = config["shared_expert_intermediate_size"]
            own_shapes |= {
                f"mlp.shared_expert.{n}.weight": (width, shared) if n == "down_proj" else (shared, width)
                for n in UP_DOWN
            }
        if kind == "olmoe":
            own_shapes |= {"self_attn.q_norm.weight": (heads * size,), "self_attn.k_norm.weight": (keys * size,)}
        if kind.startswith("granite"):
            own_shapes["block_sparse_moe.router.layer.weight"] = (experts, width)
            own_shapes["block_sparse_moe.input_linear.weight"] = (experts, 2 * own, width)
            own_shapes["block_sparse_moe.output_linear.weight"] = (experts, width, own)
            if shared := config.get("shared_intermediate_size"):
                own_shapes["shared_mlp.input_linear.weight"] = (2 * shared, width)
                own_shapes["shared_mlp.output_linear.weight"] = (width, shared)
        elif not experts:
            own_shapes |= {f"mlp.{n}.weight": (width, hidden) if n == "down_proj" else (hidden, width) for n in UP_DOWN}
        elif fused:
            own_shapes["mlp.gate.weight"] = (experts, width)
            own_shapes["mlp.experts.gate_up_proj"] = (experts, 2 * own, width)
            own_shapes["mlp.experts.down_proj"] = (experts, width, own)
        else:
            folder, names = ("block_sparse_moe", ("w1", "w3", "w2")) if kind == "mixtral" else ("mlp", UP_DOWN)
            own_shapes[f"{folder}.gate.weight"] = (experts, width)
            for n in names:
                shape = (width, own) if n in ("w2", "down_proj") else (own, width)
                own_shapes |= {f"{folder}.experts.{e}.{n}.weight": shape for e in range(experts)}
        shapes |= {f"{at}.{name}": shape for name, shape in own_shapes.items()}
    return shapes


SCALED = {"rope_scaling", "rope_parameters"}
"""Fields of a scaled rotation, which the NumPy classes do not compute. test_import_parity.py compares it with
transformers."""


@functools.partial(jax.jit, static_argnums=0)
def ours(graphdef: Any, params: Any, tokens: jax.Array) -> jax.Array:
    model = merge(graphdef, params)
    return model.logits(model(tokens[None], Mode.EVALUATE)[0])[0]


@pytest.mark.parametrize(
    ("name", "fused"),
    [(name, False) for name, layout in LAYOUTS.items() if not SCALED & layout.keys()]
    + [(name, True) for name in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe, tied")],
)
def test_an_import_computes_what_its_class_computes(name: str, fused: bool, tmp_path: Path) -> None:
    config = {"tie_word_embeddings": False} | SHAPE | {"model_type": name.partition(",")[0]} | LAYOUTS[name]
    tensors = random_tensors(config, fused)
    (tmp_path / "config.json").write_text(json.dumps(config))
    byte_tokenizer(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    opened = Pretrained.open(tmp_path, "--init-from")
    graphdef, shapes = abstract_model(opened.shape.model)
    found = ours(graphdef, opened.params(shapes)[0], jnp.asarray(TOKENS))
    assert tiny.relative_error(found, logits_of(config, tensors, TOKENS)) < 1e-4


EXPORTED: dict[str, dict[str, Any]] = {
    "mixtral": {"qk_norm": "none", "kv_heads": 2},
    "qwen3_moe": {"qk_norm": "head", "head_size": 24, "tied_head": True},
    "olmoe": {"qk_norm": "full", "renormalise_gates": False, "scaled_embedding": True, "tied_head": False},
    "qwen2_moe": {"qk_norm": "none", "shared_experts": 2, "shared_gate": True, "qkv_bias": True}
    | {"renormalise_gates": False},
    "ernie4_5_moe": {"qk_norm": "none", "balancing": "bias", "shared_experts": 2},
    "granitemoe": {"qk_norm": "none", "scaled_embedding": True, "tied_head": True, "embedding_multiplier": 0.5}
    | {"attention_multiplier": 0.4, "residual_multiplier": 0.22, "logits_scaling": 6.0},
    "granitemoeshared": {"qk_norm": "none", "residual_multiplier": 0.22, "shared_experts": 2, "tied_head": False},
    "llama": {"qk_norm": "none", "dense": "active", "tied_head": False, "kv_heads": 1},
    "qwen3": {"qk_norm": "head", "dense": "active", "norm_eps": 1e-3, "rope_theta": 500.0},
    "gpt2": {"norm": "layernorm", "positions": "learned", "activation": "gelu", "bias": True, "qk_norm": "none"}
    | {"dense": "active", "tied_head": True},
}


@pytest.fixture(scope="module", params=EXPORTED)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, np.ndarray]:
    """Class, export source and logits of a saved run."""
    run = save(tmp_path_factory.mktemp(request.param), layers=2, **EXPORTED[request.param])
    opened = open_run(run)
    graphdef = abstract_model(opened.config.model)[0]
    return request.param, open_source(run), np.asarray(ours(graphdef, opened.params, jnp.asarray(TOKENS)))


def test_an_export_computes_what_the_run_computes(exported: tuple[str, Any, np.ndarray]) -> None:
    name, source, expected = exported
    architecture = architecture_of(source.config.model)
    config = config_json(source, architecture, "float32")
    assert config["model_type"] == name
    found = logits_of(config, dict(huggingface.tensors(source, architecture)), TOKENS)
    assert tiny.relative_error(found, expected) < 1e-4


NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    **{f"ffn_{name}_shexp": f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")},
}
"""The name of a tensor in GGUF -> in the classes of `by_numpy.py`, but for experts."""


def test_a_gguf_file_holds_the_model(exported: tuple[str, Any, np.ndarray], tmp_path: Path) -> None:
    """Read with the package gguf, and computed in NumPy. Some architectures rotate the pairs (2i, 2i + 1) of a head."""
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    _, source, expected = exported
    architecture = architecture_of(source.config.model)
    if architecture.gguf is None:
        return
    gguf_file.write_gguf(tmp_path / "model.gguf", source, architecture, "a name", "float32")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors: dict[str, np.ndarray] = {}
    names = NAMES
    if architecture.gguf == "qwen2moe":
        names = {kind: theirs.replace("shared_experts", "shared_expert") for kind, theirs in NAMES.items()}
    ends = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for tensor in reader.tensors:
        head, _, rest = tensor.name.partition(".")
        if head != "blk":
            tensors[f"{ends[head]}.weight"] = tensor.data
            continue
        layer, kind, end = rest.split(".")
        at = f"model.layers.{layer}"
        if kind == "exp_probs_b":
            tensors[f"{at}.mlp.moe_statics.e_score_correction_bias"] = tensor.data[None]
        elif kind.endswith("_exps"):
            part = kind.removeprefix("ffn_").removesuffix("_exps")
            tensors |= {f"{at}.mlp.experts.{e}.{part}_proj.weight": w for e, w in enumerate(tensor.data)}
        else:
            tensors[f"{at}.{names[kind]}.{end}"] = tensor.data
    config = config_json(source, architecture, "float32")
    interleaved = architecture.gguf in ("llama", "granitemoe", "ernie4_5-moe")
    found = logits_of(config | {"rotates_pairs": interleaved}, tensors, TOKENS)
    assert tiny.relative_error(found, expected) < 1e-4
    assert_shape(reader, architecture.gguf, source.config.model)


def assert_shape(reader: Any, architecture: str, model: ModelConfig) -> None:
    """What llama.cpp is told of the model."""
    fields = {name: field.contents() for name, field in reader.fields.items()}
    named = {
        "context_length": model.seq_len,
        "embedding_length": model.width,
        "block_count": model.layers,
        "attention.head_count": model.heads,
        "attention.head_count_kv": model.key_value_heads,
        "attention.key_length": model.head_width,
        "attention.value_length": model.head_width,
        "rope.dimension_count": model.head_width,
        "rope.freq_base": model.rope_theta,
        "attention.layer_norm_rms_epsilon": model.norm_eps or 1e-6,
        "vocab_size": model.vocab_size,
        "feed_forward_length": model.dense_hidden if model.dense != "none" else model.expert_hidden,
    }
    if model.dense == "none":
        named |= {"expert_count": model.experts, "expert_used_count": model.routing.top_k}
        if architecture != "llama":
            named["expert_feed_forward_length"] = model.expert_hidden
    if architecture == "ernie4_5-moe":
        named |= {"expert_shared_count": 2, "expert_shared_feed_forward_length": 2 * model.expert_hidden}
        named |= {"interleave_moe_layer_step": 1, "leading_dense_block_count": 0}
    if architecture == "qwen2moe":
        named["expert_shared_feed_forward_length"] = 2 * model.expert_hidden
    if architecture == "granitemoe":
        scale = 0.5 * model.width**0.5  # the run's own multiplier, and that of a scaled embedding
        named |= {"embedding_scale": scale, "attention.scale": 0.4, "residual_scale": 0.22, "logit_scale": 6.0}
    found = {name.partition(".")[2]: fields[name] for name in fields if name.startswith(f"{architecture}.")}
    assert found == pytest.approx(named)
    assert (fields["general.architecture"], fields["general.name"]) == (architecture, "a name")
    own = {name.removeprefix("tokenizer.ggml."): fields[name] for name in fields if name.startswith("tokenizer.")}
    assert (own["model"], own["pre"], own["bos_token_id"], own["eos_token_id"]) == ("gpt2", "gpt-2", 256, 256)
    assert own["add_bos_token"] is True
    assert (len(own["tokens"]), len(own["token_type"]), own["tokens"][256]) == (257, 257, "<|endoftext|>")
    assert own["token_type"] == [gguf_file.NORMAL] * 256 + [gguf_file.CONTROL]
