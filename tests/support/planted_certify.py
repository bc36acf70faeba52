"""Bugs that a certificate must see, each with the name of the claim that fails."""

import dataclasses
from collections.abc import Callable, Iterator

from moe_jax.certify import Certificate, hlo
from moe_jax.certify.arithmetic import layer_arithmetic, router_values, step_arithmetic
from moe_jax.certify.causality import layer_causality, model_causality, writing_causality
from moe_jax.certify.model import compilations, initial_params
from moe_jax.config import DataConfig, ExecutionConfig, ModelConfig, RoutingConfig, RunConfig, TrainConfig
from moe_jax.inference import decode
from moe_jax.inference.decode import Decoder
from moe_jax.model import attention, transformer
from moe_jax.model.kernels import cached_attention, causal_attention, cross_entropy
from moe_jax.model.moe import layer, router
from moe_jax.model.transformer import abstract_model
from moe_jax.training import loss
from tests.support.planting import Bug


def small(routing: dict | None = None, **changes) -> ModelConfig:
    values = {"vocab_size": 50, "seq_len": 32, "layers": 2, "width": 32, "heads": 2, "experts": 8, "expert_hidden": 32}
    return ModelConfig(**(values | changes), routing=RoutingConfig(**(routing or {})))


def run_config(model: ModelConfig, compute_dtype: str = "float32") -> RunConfig:
    execution = ExecutionConfig(compute_dtype=compute_dtype)  # pyright: ignore[reportArgumentType]
    return RunConfig(model=model, data=DataConfig(), train=TrainConfig(steps=10), execution=execution)


def certificates(name: str) -> Iterator[Certificate]:
    """Those of the small model that are made together with the claim of this name."""
    kind, _, claim = name.partition(": ")
    config = run_config(small(layers=1, activation="swiglu"), "bfloat16" if "router" in claim else "float32")
    if "one layer," in claim:  # 80 slots
        yield layer_arithmetic(dataclasses.replace(config.model, seq_len=256))
    elif "values" in claim:
        yield router_values(config.model, initial_params(config), "float32")
    elif kind == "arithmetic":
        yield from step_arithmetic(config, batch_size=2)
    else:
        params, model = initial_params(config), config.model
        decoder = Decoder(abstract_model(model)[0], model.seq_len, model.vocab_size)
        if kind == "compilations":
            yield compilations(config, params, 2)
        elif claim.startswith("the whole model"):
            yield from model_causality(config, params)
        elif claim == "prefill and decoding":
            yield writing_causality(decoder, params, model.vocab_size)
        else:
            yield layer_causality(model, params["blocks"][0]["ffn"])


def claim(name: str) -> Callable[[], None]:
    """A check of one claim."""

    def check() -> None:
        (certificate,) = [c for c in certificates(name) if c.name == name]
        assert certificate.passed, certificate.found

    return check


BEFORE = "before = jnp.cumsum(hits, axis=1) - hits"
FEED = "y, stats = block.ffn(block.ffn_norm(x), mode, trace)"
LAYER, STEP = "arithmetic: one layer, with gradients", "arithmetic: {} within the step"
BUGS = [
    Bug("certify: no causal mask", causal_attention.masked_softmax, claim("causality: the whole model")).edit(
        " + jnp.where(visible, 0, -jnp.inf).astype(scores.dtype)", ""
    ),
    Bug("certify: later tokens first", router.queue_positions, claim("causality: token priority, by capacity")).edit(
        BEFORE, "before = jnp.cumsum(hits[:, ::-1], axis=1)[:, ::-1] - hits"
    ),
    Bug(
        "certify: evaluation sees the next token",
        transformer.Block.__call__,
        claim("causality: the whole model in evaluation"),
    ).edit(FEED, FEED + "; y = y if mode is Mode.TRAIN else y + 1e-3 * jnp.roll(x, -1, axis=1)"),
    Bug(
        "certify: prefill sees the next token", transformer.Block.__call__, claim("causality: prefill and decoding")
    ).edit(FEED, FEED + "; y = y + 1e-3 * jnp.roll(x, -1, axis=1) if mode is Mode.GENERATE else y"),
    Bug(
        "certify: a decoded token sees the place behind it",
        cached_attention._one_head_at_a_time,
        claim("causality: prefill and decoding"),
    ).edit("position[:, 0] + 1", "position[:, 0] + 2"),
    Bug(
        "certify: the router multiplies in bfloat16", router.router_logits, claim("arithmetic: precision of the router")
    ).edit(
        "x.astype(dtype), kernel.astype(dtype), precision=dot_precision(dtype))",
        "x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)).astype(dtype)",
    ),
    Bug(
        "certify: the router multiplies in TF32", router.router_logits, claim("arithmetic: precision of the router")
    ).edit(", precision=dot_precision(dtype))", ")"),
    *(
        Bug(
            f"certify: the router rounds its {what} to bfloat16", where, claim("arithmetic: values of the router")
        ).edit(old, f"jax.lax.reduce_precision({old}, 8, 7)")
        for what, where, old in [
            ("input", router.router_logits, "x.astype(dtype)"),
            ("logits", router.route, "checkpoint_name(logits, DECISIONS)"),
            ("gates", router.route, "jnp.where(valid[..., None], gate, jnp.nan)"),
        ]
    ),
    Bug("certify: the head multiplies one block too many", cross_entropy.token_blocks, claim(STEP.format("head"))).edit(
        "return blocks, tokens // blocks", "return blocks + 1, tokens // blocks"
    ),
    Bug("certify: one slot of 80 too many", layer.MoE.dispatch_for, claim(LAYER)).edit(
        "return Capacity(", "return Capacity(1 + "
    ),
    Bug("certify: less than 1 % more work", layer.MoE.__call__, claim(LAYER)).edit(
        "y = jnp.where(routing.valid[..., None], y, jnp.nan)",
        """more = jnp.tanh(x[:, :8] @ self.experts.w_in[0]).sum(2, keepdims=True)
    y = jnp.where(routing.valid[..., None], y.at[:, :8].add(1e-9 * more), jnp.nan)""",
    ),
    Bug("certify: no product is seen", hlo.product, claim(LAYER)).edit(
        'instruction.opcode == "dot"', 'instruction.opcode == "dots"'
    ),
    Bug("certify: every expert on every token", layer.MoE.dispatch_for, claim(STEP.format("expert layers"))).edit(
        "return Capacity(capacity(tokens, experts, policy.top_k, policy.capacity_factor))",
        "from suites.all_experts import AllExperts; return AllExperts()",
    ),
    Bug(
        "certify: the output of attention is multiplied twice",
        attention.Attention.__call__,
        claim(STEP.format("attention")),
    ).edit(
        "return self._output(mixed.swapaxes(1, 2)), ",
        "return self._output(mixed.swapaxes(1, 2)) + 1e-6 * self._output(jnp.tanh(mixed).swapaxes(1, 2)), ",
    ),
    Bug("certify: the head is multiplied twice", loss.training_loss, claim(STEP.format("head"))).edit(
        "loss = mean_cross_entropy(hidden, head, targets, loss_scale, weights)",
        """loss = mean_cross_entropy(hidden, head, targets, loss_scale, weights)
        loss += 1e-6 * mean_cross_entropy(2 * hidden, head, targets, loss_scale, weights)""",
    ),
    Bug(
        "certify: products outside of the named parts",
        transformer.Transformer.__call__,
        claim("arithmetic: the whole step"),
    ).edit(
        "return self._final(x), ",
        "x = x + 1e-6 * jnp.tanh(x) @ self.blocks[0].ffn.router[...] @ self.blocks[0].ffn.router[...].T"
        "\n    return self._final(x), ",
    ),
    Bug("certify: prompts without padding", decode.Decoder.read, claim("compilations")).edit(
        "_padded(tokens, length)", "_padded(tokens, len(tokens))"
    ),
]
