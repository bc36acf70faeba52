"""The settings of the model: its shape, its routing policy, and the capacity rule (`capacity`)."""

import dataclasses
import math
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar, Literal

from moe_jax.config.rope import rotation_numbers
from moe_jax.config.section import ALWAYS, Origin, Section, setting

Norm = Literal["layernorm", "rmsnorm"]
Positions = Literal["learned", "rope"]
QKNorm = Literal["none", "head", "full"]
Activation = Literal["gelu", "swiglu"]
Dense = Literal["none", "active", "total"]
Dispatch = Literal["capacity", "blocks"]
Balancing = Literal["loss", "bias"]

_EXPERTS: tuple[Origin, ...] = ("resume", "tune", "import")
shape = partial(setting, kept=ALWAYS)
"""A setting that decides the function of given weights."""
expert_shape = partial(setting, kept=_EXPERTS)
"""The same of the experts. An upcycled run, whose weights have none, may choose it."""
in_training = partial(setting, kept=("resume",))
"""A setting that changes nothing in a forward pass of given weights without dropout."""


@dataclass(frozen=True)
class RoutingConfig(Section):
    """How a token finds its experts."""

    section_name: ClassVar[str] = "routing"

    top_k: int = expert_shape(2, "--top-k")
    """K, experts that a token is sent to."""
    capacity_factor: float = in_training(1.25, "--capacity-factor")
    """Slots of an expert for one sequence, divided by its fair share T * K / E of the (token, choice) pairs."""
    dispatch: Dispatch = in_training("capacity", "--dispatch")
    """How training brings tokens to experts. `capacity` gives each expert a fixed number of slots, and drops a (token,
    choice) pair that finds no free slot. `blocks` drops nothing. On a mesh with an `expert` axis it drops what exceeds
    `device_capacity_factor`."""
    balancing: Balancing = expert_shape("loss")
    """The method that keeps the load of the experts even: an auxiliary `loss`, or a `bias` for each expert. Training
    adjusts the bias, and it is added only when experts are chosen."""
    renormalise_gates: bool = expert_shape(True)
    """Divide the gates of a token by their sum over its K experts, so that they sum to 1. Without it a gate is the
    softmax probability of its expert among all experts (OLMoE). For K = 1 the gate is the probability in both cases."""
    device_capacity_factor: float = 2.0
    """With --dispatch blocks on a mesh with an `expert` axis of n devices: rows of a device for one sequence, divided
    by its fair share T * K / n of the (token, choice) pairs. Pairs beyond them are dropped. A factor of
    min(n, E / K) drops nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, usual in (("capacity_factor", 1.25), ("device_capacity_factor", 2)):
            value = getattr(self, name)
            self.check(math.isfinite(value) and value > 0, name, f"a finite number above 0 ({usual} is usual)")


@dataclass(frozen=True)
class ModelConfig(Section):
    """The shape of the model, and what else decides its forward pass."""

    section_name: ClassVar[str] = "model"

    vocab_size: int = shape(0, within=(0, 2**24))
    """V, token ids that the model knows. 0 takes the tokenizer's."""
    seq_len: int = setting(256, "--seq-len", kept=("resume", "tune", "upcycle"), within=(2, 2**20))
    """T, positions of one training sequence, and the longest context."""
    layers: int = shape(4, within=(1, 4096))
    """L, transformer blocks, each with attention and an MoE layer."""
    width: int = shape(128, within=(1, 2**17))
    """D, width of the residual stream."""
    heads: int = shape(4, within=(1, 2**17))
    """H, attention heads. Must divide the width, unless `head_size` is given."""
    kv_heads: int = shape(0, within=(0, 2**17))
    """KV, heads of the keys and values. Each serves a group of H / KV attention heads (grouped-query attention). With 0
    each attention head has its own."""
    head_size: int = shape(0, within=(0, 2**17))
    """A, width of an attention head. 0 is width / heads."""
    experts: int = expert_shape(8, "--experts", within=(1, 4096))
    """E, experts of a layer."""
    expert_hidden: int = expert_shape(128, within=(1, 2**17))
    """F, hidden width of one expert."""
    shared_experts: int = expert_shape(0, within=(0, 4096))
    """Further experts, without routing: every token passes through all of them."""
    shared_gate: bool = expert_shape(False)
    """Multiply the output of the shared experts with a gate of their own: the sigmoid of a product with the token, as
    Qwen does."""
    dense: Dense = expert_shape("none")
    """A dense baseline instead of the experts: one feed-forward network with as many parameters as the experts and the
    router, counted as `active` or as `total`. `none` keeps the experts."""
    activation: Activation = shape("swiglu")
    """Nonlinearity of an expert, which has two (gelu) or three (swiglu) matrices."""
    norm: Norm = shape("rmsnorm")
    """Normalisation before attention, experts and head."""
    norm_eps: float = shape(0.0)
    """Added to the mean square (or the variance) in every normalisation. 0 is 1e-6 for rmsnorm, 1e-5 for layernorm."""
    positions: Positions = shape("rope")
    """Learned absolute positions, or rotary ones."""
    rope_theta: float = shape(10_000.0, within=(1, 1e9))
    """Base of the rotary positions. A larger base rotates more slowly, for longer contexts."""
    rope_scaling: str = shape("")
    """A scaled rotation of a public model (`config/rope.py`), as JSON. Empty: none."""
    bias: bool = shape(False)
    """Biases in the attention projections and in LayerNorm. Experts, router and head have none."""
    qkv_bias: bool = shape(False)
    """Biases of queries, keys and values, and no others (Qwen)."""
    qk_norm: QKNorm = shape("none")
    """Normalise queries and keys (RMSNorm), which bounds the attention scores. `head` normalises each head by itself,
    `full` all heads together (OLMoE)."""
    tied_head: bool = shape(True)
    """The vocabulary head is the transposed token embedding."""
    scaled_embedding: bool = shape(False)
    """Multiply embedding rows by the square root of the width, so that the entries of the residual stream start at size
    1. For an untied head only: with a tied head every token would at first predict itself."""
    embedding_multiplier: float = shape(1.0, within=(1e-6, 1e6))
    """Multiply embedding rows. This factor and the next three are Granite's."""
    attention_multiplier: float = shape(0.0, within=(0, 1e6))
    """Multiply the products of queries and keys. 0 is 1 / sqrt(A)."""
    residual_multiplier: float = shape(1.0, within=(1e-6, 1e6))
    """Multiply what attention and experts add to the residual stream."""
    logits_scaling: float = shape(1.0, within=(1e-6, 1e6))
    """Divide the logits."""
    tie_value_output_init: bool = in_training(False)
    """Start each attention head as a copier: its output projection is its value projection transposed."""
    zero_init_residual: bool = in_training(False)
    """Start the output projections of attention and experts at zero, so that the residual stream starts as the
    embedding. The projections of `tie_value_output_init` stay as they are."""
    dropout: float = in_training(0.0)
    """Share of activations zeroed in training: embedding and each residual branch."""
    attention_dropout: float = in_training(0.0)
    """Share of attention weights zeroed in training."""
    routing: RoutingConfig = field(default_factory=RoutingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_heads()
        ok = self.positions == "rope" or self.rope_theta == 10_000
        self.check(ok, "rope_theta", "left out, since learned positions rotate nothing")
        self._check_scaling()
        ok = self.norm_eps == 0 or 1e-12 <= self.norm_eps <= 1
        self.check(ok, "norm_eps", "0, or between 1e-12 and 1")
        ok = self.shared_experts > 0 or not self.shared_gate
        self.check(ok, "shared_gate", "false without --model.shared-experts")
        ok = 1 <= self.routing.top_k <= self.experts
        self.routing.check(ok, "top_k", f"between 1 and --experts {self.experts}")
        for name in ("dropout", "attention_dropout"):
            self.check(0 <= getattr(self, name) < 1, name, "at least 0 and below 1")

    def _check_scaling(self) -> None:
        if not self.rope_scaling:
            return
        self.check(self.positions == "rope", "rope_scaling", "left out, since learned positions rotate nothing")
        try:
            kind, _ = rotation_numbers(self.rope_scaling)
        except ValueError as error:
            raise self.wrong("rope_scaling", f"must be {error}") from None
        self.check(kind != "yarn" or self.rope_theta > 1, "rope_theta", "above 1 with the rope_type yarn")

    def _check_heads(self) -> None:
        """Check heads, their width, and the heads of keys and values, against each other."""
        if not self.head_size:
            allowed = f"a divisor of --model.width {self.width}, unless --model.head-size is given"
            self.check(self.width % self.heads == 0, "heads", allowed)
        if self.positions == "rope" and self.head_width % 2:
            if not self.head_size:
                width = f"head width {self.width} / {self.heads} = {self.head_width}"
                raise self.wrong("heads", f"{width} is odd; RoPE needs an even head width")
            raise self.wrong("head_size", "must be even, which RoPE needs")
        divides = self.heads % self.key_value_heads == 0
        self.check(divides, "kv_heads", f"0, or a divisor of --model.heads {self.heads}")
        if self.tie_value_output_init:
            why = ", since --model.tie-value-output-init copies each head's value matrix; "
            why += "--model.no-tie-value-output-init turns that off"
            one_each = self.key_value_heads == self.heads
            self.check(one_each, "kv_heads", f"0 or --model.heads {self.heads}{why}")
            square = self.heads * self.head_width == self.width
            allowed = f"--model.width / --model.heads = {self.width} / {self.heads}, or 0{why}"
            self.check(square, "head_size", allowed)

    @property
    def head_width(self) -> int:
        """A, width of one attention head."""
        return self.head_size or self.width // self.heads

    @property
    def key_value_heads(self) -> int:
        """KV, heads of the keys and values."""
        return self.kv_heads or self.heads

    @property
    def capacity(self) -> int:
        """C, slots of one expert for one training sequence of T tokens: see `capacity`."""
        return capacity(self.seq_len, self.experts, self.routing.top_k, self.routing.capacity_factor)

    @property
    def multiplied(self) -> bool:
        """Whether one of Granite's factors changes something."""
        factors = self.embedding_multiplier, self.attention_multiplier, self.residual_multiplier, self.logits_scaling
        return factors != (1, 0, 1, 1)

    @property
    def dropless(self) -> bool:
        """Whether training drops nothing on one device. True for a dense baseline and for dispatch by blocks."""
        return self.dense != "none" or self.routing.dispatch == "blocks"

    @property
    def expert_matrices(self) -> int:
        """Matrices of an expert: two, or three with a gate."""
        return 3 if self.activation == "swiglu" else 2

    @property
    def dense_hidden(self) -> int:
        """Hidden width of the dense baseline's feed-forward network.

        The network has as many parameters as K (`active`) or E (`total`) experts, the shared experts and the router
        together, to within half the parameters of a hidden unit.
        """
        experts = self.routing.top_k if self.dense == "active" else self.experts
        return round((experts + self.shared_experts) * self.expert_hidden + self.experts / self.expert_matrices)

    def with_routing(self, **changes: Any) -> "ModelConfig":
        """The same shape under another routing policy."""
        return dataclasses.replace(self, routing=dataclasses.replace(self.routing, **changes))


def capacity(tokens: int, experts: int, top_k: int, capacity_factor: float) -> int:
    """Slots of one expert for a group of `tokens`: min(T, max(1, ceil(cf * T * K / E))).

    The arithmetic is exact. The factor is read as the decimal number that was typed: 1.1 means 11/10. The nearest
    binary number is slightly larger, and its product can round up to one slot more. An expert never needs more than T
    slots, because the K choices of a token are distinct.
    """
    exact = Fraction(str(capacity_factor)) * tokens * top_k / experts
    return min(tokens, max(1, math.ceil(exact)))
