"""What a run is made of: frozen, validated dataclasses.

This module and `flags` import the standard library only, so that a wrong value is answered before jax is imported.
Every field is a flag, named `--section.field`; the most used ones have a short name too (`flags.SHORT_FLAGS`).
A wrong value raises `ConfigError`, whose text names the flag, the value and what is allowed.

The alphabet of the project, used in every annotation, einsum and comment:

    B batch    T positions    D model width    H heads    A width of a head    L layers    V vocabulary
    E experts  K experts per token             C capacity of an expert         F hidden width of an expert
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from moe_jax.flags import ConfigError, check, check_choices, check_fields

SCHEMA_VERSION = 1

Norm = Literal["layernorm", "rmsnorm"]
Positions = Literal["learned", "rope"]
Activation = Literal["gelu", "swiglu"]
Dispatch = Literal["gather", "einsum", "dense", "blocks"]
Dense = Literal["none", "active", "total"]
Priority = Literal["token", "leaky-choice-major", "leaky-batch-priority", "leaky-expert-choice"]
Decay = Literal["cosine", "linear"]
Balancing = Literal["loss", "bias"]
TokenizerKind = Literal["gpt2", "bpe", "byte"]
OptimizerKind = Literal["adamw", "adamw-bf16", "adamw-8bit", "adafactor", "muon"]
PrecisionKind = Literal["auto", "float32", "bfloat16", "float16"]
WeightKind = Literal["float32", "bfloat16"]
PresetName = Literal["nano", "story", "story-cpu", "story-4gb", "seed-158m", "max-4gb"]

NAMED_CORPORA = ("stories", "tinystories", "wikitext", "pg19")


class UserError(Exception):
    """A failure that the user can mend. One line: what is wrong, with the value, and what to do. Exit 1."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model, and how its tokens are routed."""

    vocab_size: int = 0
    """V, token ids that the model knows; 0 takes the tokenizer's."""
    seq_len: int = 256
    """T, positions of one training sequence and the longest context (short: --seq-len)."""
    layers: int = 4
    """L, transformer blocks, each with attention and an MoE layer."""
    width: int = 128
    """D, width of the residual stream."""
    heads: int = 4
    """H, attention heads; must divide the width."""
    experts: int = 8
    """E, experts of a layer (short: --experts)."""
    top_k: int = 2
    """K, experts that a token is sent to (short: --top-k)."""
    expert_hidden: int = 128
    """F, hidden width of one expert."""
    capacity_factor: float = 1.25
    """Slots of an expert over its fair share of the (token, choice) pairs of a sequence (short: --capacity-factor)."""
    norm: Norm = "rmsnorm"
    """Normalisation before attention, experts and head."""
    positions: Positions = "rope"
    """Learned absolute positions, or rotary ones."""
    activation: Activation = "swiglu"
    """What an expert computes between its two (gelu) or three (swiglu) matrices."""
    bias: bool = False
    """Biases in the attention projections and in LayerNorm. The experts, the router and the head have none."""
    tied_head: bool = True
    """The vocabulary head is the transposed token embedding."""
    copying_heads: bool = False
    """Attention heads start as copiers: a head's output projection is its value projection transposed."""
    scaled_embedding: bool = False
    """Embedding rows are looked up times the root of the width, so that the residual stream starts with entries of
    size 1. Under a tied head that makes every token predict itself at first; meant for an untied one."""
    ngrams: int = 1
    """Each token's embedding is summed with one of it and the token before, and so on up to this many tokens."""
    ngram_rows: int = 32_768
    """Rows of the table of each n-gram order; n-grams are sent to them by a hash."""
    quiet_branches: bool = False
    """Output projections of attention and experts start at zero, so that the residual stream starts as embedding; those
    of copying heads do not."""
    qk_norm: bool = False
    """Queries and keys are normalised by head, which bounds the attention scores."""
    dropout: float = 0.0
    """Share of activations zeroed in training: embedding and each residual branch."""
    attention_dropout: float = 0.0
    """Share of attention weights zeroed in training."""
    dispatch: Dispatch = "gather"
    """How training brings tokens to experts: `gather`; `einsum` and `dense` are slow references; `blocks` is
    dropless (short: --dispatch)."""
    dense: Dense = "none"
    """A dense twin instead of the MoE: one FFN with the `active` or the `total` parameters of experts and router."""
    priority: Priority = "token"
    """Who gets an expert's slots in training. Earlier tokens first, which is causal; the `leaky-` rules let later
    tokens decide what an earlier one gets, and are here for comparison only."""
    balancing: Balancing = "loss"
    """What keeps the load even: an auxiliary `loss`, or a `bias` on the choice of experts that training adjusts."""
    shared_experts: int = 0
    """Experts beside the routed ones that every token passes."""
    router_noise: float = 0.0
    """Standard deviation of the Gaussian noise on router logits in training; 1 / experts is usual, 0 is off."""
    router_jitter: float = 0.0
    """In training the router's input is multiplied by uniform numbers from [1 - jitter, 1 + jitter]."""
    eval_capacity_factor: float = 0.0
    """Capacity factor of evaluation; 0 drops nothing. Generation never drops."""

    def __post_init__(self) -> None:
        s = "model"
        check_choices(self, s)
        check_fields(self, s, ("vocab_size",), 0, 2**24)
        check_fields(self, s, ("seq_len",), 2, 2**20)
        check_fields(self, s, ("layers", "experts"), 1, 4096)
        check_fields(self, s, ("ngrams",), 1, 8)
        check_fields(self, s, ("ngram_rows",), 1, 2**24)
        check_fields(self, s, ("width", "heads", "expert_hidden"), 1, 2**17)
        check(self.width % self.heads == 0, s, "heads", self.heads, f"a divisor of --model.width {self.width}")
        if self.positions == "rope":
            even = (self.width // self.heads) % 2 == 0
            check(
                even,
                s,
                "heads",
                self.heads,
                f"such that a head (width {self.width} / heads) is even, for rope",
            )
        ok = 1 <= self.top_k <= self.experts
        check(ok, s, "top_k", self.top_k, f"between 1 and --experts {self.experts}")
        ok = math.isfinite(self.capacity_factor) and self.capacity_factor > 0
        check(ok, s, "capacity_factor", self.capacity_factor, "a finite number above 0 (1.25 is usual)")
        limited = self.priority == "token" or self.dispatch in ("gather", "einsum")
        check(limited, s, "priority", self.priority, f"token, for --dispatch {self.dispatch} gives everybody a place")
        for name in ("dropout", "attention_dropout"):
            check(0 <= getattr(self, name) < 1, s, name, getattr(self, name), "at least 0 and below 1")
        check_fields(self, s, ("shared_experts",), 0, 4096)
        check_fields(self, s, ("router_noise", "eval_capacity_factor"), 0, 1e6)
        check_fields(self, s, ("router_jitter",), 0, 1)

    @property
    def head_width(self) -> int:
        """A, width of one attention head."""
        return self.width // self.heads

    @property
    def capacity(self) -> int:
        """C, slots of one expert for one sequence of T tokens: see `capacity`."""
        return capacity(self.seq_len, self.experts, self.top_k, self.capacity_factor)

    @property
    def dropless(self) -> bool:
        """Training serves every choice: a dense twin, or a dispatch without capacity, whatever the capacity factor."""
        return self.dense != "none" or self.dispatch not in ("gather", "einsum")

    @property
    def dense_hidden(self) -> int:
        """Hidden width of the dense twin: its FFN has the parameters of K (`active`) or E (`total`) experts plus
        the shared experts' and the router's, to within half a hidden unit."""
        matrices = 3 if self.activation == "swiglu" else 2
        experts = self.top_k if self.dense == "active" else self.experts
        return round((experts + self.shared_experts) * self.expert_hidden + self.experts / matrices)


def capacity(tokens: int, experts: int, top_k: int, capacity_factor: float) -> int:
    """Slots of one expert for a group of `tokens`: min(T, max(1, ceil(cf * T * K / E))).

    Exact: the factor is read as the decimal that was typed, so that 1.1 means 11/10 and not the binary number
    next to it, whose product can round up to one slot more. No expert can need more than T slots, since the K
    choices of a token are distinct.
    """
    exact = Fraction(str(capacity_factor)) * tokens * top_k / experts
    return min(tokens, max(1, math.ceil(exact)))


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes tokens."""

    source: str = "stories"
    """`stories` (embedded), `tinystories`, `wikitext`, `pg19`, or a file or folder of your own (short: --data)."""
    tokenizer: TokenizerKind = "bpe"
    """`gpt2`, `bpe` (byte-level, trained on the training text), or `byte` (short: --tokenizer)."""
    vocab_size: int = 1024
    """Entries of a `bpe` tokenizer, the 256 bytes and the separator included."""
    stories: int = 60_000
    """Training stories that the embedded corpus generates."""
    stories_seed: int = 0
    """Seed of the embedded corpus."""
    eval_tokens: int = 65_536
    """Tokens of the fixed part of the validation stream that is scored while training; the end scores all of it."""

    def __post_init__(self) -> None:
        s = "data"
        check_choices(self, s)
        check(bool(self.source.strip()), s, "source", repr(self.source), "a corpus name or a path")
        check_fields(self, s, ("vocab_size",), 257, 2**20)
        check_fields(self, s, ("stories",), 1, 10**8)
        check_fields(self, s, ("stories_seed",), 0, 2**63 - 1)
        check_fields(self, s, ("eval_tokens",), 2, 65_536)


@dataclass(frozen=True)
class TrainConfig:
    """How the parameters are found."""

    steps: int = 1000
    """Optimizer steps of the whole run, and the horizon of the schedule (short: --steps)."""
    batch_size: int = 16
    """B, sequences of one micro-batch (short: --batch-size)."""
    grad_accum: int = 1
    """Micro-batches whose gradients are averaged into one step (short: --grad-accum)."""
    optimizer: OptimizerKind = "adamw"
    """AdamW; AdamW with a bfloat16 first moment, or with 8-bit moments; Adafactor; or Muon on the matrices of the
    blocks and AdamW on the rest (short: --optimizer)."""
    lr: float = 3e-3
    """Peak learning rate of AdamW and Adafactor (short: --lr)."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon."""
    muon_router: bool = False
    """Muon takes the routers too. Its steps move all experts' columns alike; a large step of AdamW moves them all
    along what tokens have in common, and the first steps then drop a fifth of the tokens."""
    final_lr: float = 0.0
    """Learning rate of the last step, as a share of the peak."""
    decay: Decay = "cosine"
    """How the learning rate falls from the warm-up to the last step."""
    warmup_steps: int = 50
    """Steps of linear warm-up; no more than a tenth of the run is taken."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; vectors (norms, biases) are not decayed."""
    clip: float = 1.0
    """Global norm that gradients are clipped to."""
    balance_coef: float = 0.01
    """Weight of the balance loss, which is 1 at perfect balance. None has it with `--model.balancing bias`."""
    balance_rate: float = 1e-3
    """Step of the routers' balance bias after each training step, with `--model.balancing bias`."""
    z_coef: float = 1e-3
    """Weight of the router's z-loss."""
    precision: PrecisionKind = "auto"
    """Compute precision; `auto` chooses from the device and says why (short: --precision)."""
    weights: WeightKind = "float32"
    """What matrices are stored in between steps. bfloat16 halves them and their gradients, and is rounded to at
    random, so that steps smaller than its spacing still count on average."""
    remat: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    seed: int = 0
    """Seed of the initial parameters, of the order of the data, of dropout and of samples (short: --seed)."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl and of the terminal."""
    eval_every: int = 200
    """Steps between evaluations, each with a sample of text (short: --eval-every)."""
    save_every: int = 200
    """Steps between checkpoints; the last step and the best evaluated step are always saved (short: --save-every)."""
    skip_spikes: bool = False
    """Skip a step whose loss is more than six standard deviations above its recent mean; it is logged either way."""
    patience: int = 0
    """Evaluations without improvement after which training stops early; 0 never stops."""

    def __post_init__(self) -> None:
        s = "train"
        check_choices(self, s)
        check_fields(self, s, ("steps",), 1, 10**9)
        check_fields(self, s, ("batch_size", "grad_accum"), 1, 2**16)
        check_fields(self, s, ("log_every", "eval_every", "save_every"), 1, 10**9)
        check_fields(self, s, ("warmup_steps", "patience"), 0, 10**9)
        check_fields(self, s, ("seed",), 0, 2**31 - 1)
        check_fields(self, s, ("lr", "muon_lr"), 1e-12, 1e3)
        check_fields(self, s, ("final_lr", "balance_coef", "balance_rate", "z_coef", "weight_decay"), 0, 1e3)
        check_fields(self, s, ("final_lr",), 0, 1)
        check_fields(self, s, ("beta1", "beta2"), 0, 0.999999)
        check_fields(self, s, ("eps",), 1e-30, 1)
        check_fields(self, s, ("clip",), 1e-6, 1e9)


@dataclass(frozen=True)
class RunConfig:
    """One run: what `train.py` is told, and what `config.json` holds."""

    preset: PresetName = "nano"
    """Where the other settings start from."""
    out: str = ""
    """Folder of the run; empty: runs/PRESET."""
    resume: bool = False
    """Go on from the newest good checkpoint of the folder."""
    upcycle: str = ""
    """Folder of a trained dense run: every expert starts as a copy of its FFN, and the whole as its function."""
    verify_resume: bool = False
    """Instead of training, show within a minute that a run killed and resumed here equals one never stopped."""
    deterministic: bool = False
    """On a GPU, use only programs that give the same bits each time, at some cost in speed; a CPU always does."""
    tensorboard: bool = False
    """Write TensorBoard event files as well (extra `tensorboard`)."""
    wandb: bool = False
    """Log to Weights & Biases as well (extra `wandb`)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_choices(self, "")

    @property
    def run_dir(self) -> str:
        """The folder of the run: --out, else runs/PRESET, with a word on what the model is where it is another one."""
        twin = "-upcycled" * bool(self.upcycle) if self.model.dense == "none" else f"-dense-{self.model.dense}"
        return self.out or f"runs/{self.preset}{twin}"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, with the version of its schema."""
        return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        """The inverse of `to_dict`. Keys that are no field (`versions`, `history`) are left to the caller.

        Raises UserError where the file was written by another schema, ConfigError where a value is wrong.
        """
        version = values.get("schema_version")
        if version != SCHEMA_VERSION:
            raise UserError(
                f"config.json has schema version {version}, this program reads {SCHEMA_VERSION}: "
                "use the version of moe-jax that wrote it, or start a new run in another folder"
            )
        sections = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
        top = {f.name for f in dataclasses.fields(cls)} - set(sections)
        return cls(
            **{k: v for k, v in values.items() if k in top},
            **{name: _section(kind, name, values.get(name, {})) for name, kind in sections.items()},
        )


def _section(kind: type, name: str, values: dict[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UserError(f"config.json: {name} has the unknown field {unknown[0]!r}; it was written by another version")
    return kind(**values)


def load_config(run: Path) -> RunConfig | None:
    """The saved configuration of a folder that holds a run, else None."""
    if not holds_run(run):
        return None
    try:
        return RunConfig.from_dict(json.loads((run / "config.json").read_text()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise UserError(
            f"{run / 'config.json'} cannot be read ({error}); "
            f"`python -m moe_jax doctor --run {run} --repair` takes it from a checkpoint"
        ) from error


def holds_run(run: Path) -> bool:
    """A folder holds a run once it has one complete checkpoint. Those appear by a rename, so a name is enough."""
    return any(p.is_dir() for p in run.glob("checkpoints/step_" + "[0-9]" * 8 + "*"))
