"""How a run trains: on which text (`DataConfig`), and by which steps (`TrainConfig`).

A new corpus needs a name in `NAMED_CORPORA`. `data/corpora.py` says what else it needs. Standard library only.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from moe_jax.config.section import ALWAYS, Section, setting

TokenizerKind = Literal["gpt2", "bpe", "byte", "hf"]
DataFormat = Literal["text", "chat"]
Role = Literal["system", "user", "assistant"]
"""Who speaks in a conversation."""

NAMED_CORPORA = ("stories", "shakespeare", "tinystories", "wikitext", "pg19")


@dataclass(frozen=True)
class DataConfig(Section):
    """Which text, and how it becomes tokens."""

    section_name: ClassVar[str] = "data"

    source: str = setting("stories", "--data")
    """`stories` (embedded), `tinystories`, `wikitext`, `pg19`, or a file or folder of your own."""
    tokenizer: TokenizerKind = setting("bpe", "--tokenizer", kept=ALWAYS)
    """`gpt2`, `bpe` (byte-level, trained on the training text), `byte`, or `hf`: the tokenizer of the Hugging Face
    folder in --init-from or --upcycle."""
    vocab_size: int = setting(1024, kept=("resume", "tune", "upcycle"), within=(257, 2**20))
    """Entries of a `bpe` tokenizer, the 256 bytes and the separator included."""
    stories: int = setting(60_000, kept=("resume", "upcycle"), within=(1, 10**8))
    """Training stories that the embedded corpus generates."""
    stories_seed: ClassVar[int] = 0
    """Seed of the embedded corpus."""
    eval_tokens: int = setting(65_536, within=(2, 65_536))
    """Most tokens of the validation stream that are scored during training, always the same ones. At the end of a run
    the whole stream is scored."""
    format: DataFormat = setting("text", kept=("resume", "upcycle"))
    """What the files hold: `text`, or with the command `sft` conversations (`chat`), of which only the assistant's
    answers are learned and scored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(bool(self.source.strip()), "source", "a corpus name or a path")


# Steps

OptimizerKind = Literal["adamw", "adamw-bf16", "adamw-8bit", "adafactor", "muon"]
Schedule = Literal["cosine", "linear"]
ParamDtype = Literal["float32", "bfloat16"]

STATE_BYTES: dict[OptimizerKind, float] = {"adamw": 8, "adamw-bf16": 6, "adamw-8bit": 2, "adafactor": 0, "muon": 4}
"""Least bytes of optimizer state for each parameter."""
NEWTON_SCHULZ_STEPS = 5
"""Of one Muon step, as Jordan et al. 2024 and `optax` have it."""


@dataclass(frozen=True)
class TrainConfig(Section):
    """How the model is trained."""

    section_name: ClassVar[str] = "train"

    steps: int = setting(1000, "--steps", within=(1, 10**9))
    """Optimizer steps of the whole run, and the horizon of the learning-rate schedule."""
    minutes: float = setting(0.0, "--minutes", within=(0, 1e6))
    """Train for about this time instead of `steps`: after 20 steps their number is set from the measured pace, once.
    0: as many as `steps` says."""
    batch_size: int = setting(16, "--batch-size", within=(1, 2**16))
    """B, sequences of one micro-batch."""
    grad_accum: int = setting(1, "--grad-accum", within=(1, 2**16))
    """Micro-batches whose gradients are averaged into one step."""
    optimizer: OptimizerKind = setting("adamw", "--optimizer", kept=("resume",))
    """AdamW; AdamW with a bfloat16 first moment, or with 8-bit moments; Adafactor; or Muon for the matrices of the
    blocks and AdamW for the rest."""
    lr: float = setting(3e-3, "--lr", within=(1e-12, 1e3))
    """Peak learning rate of AdamW and Adafactor. With Muon it is for the other parameters; the matrices of the blocks
    have `--train.muon-lr`."""
    muon_lr: float = setting(0.02, within=(1e-12, 1e3))
    """Peak learning rate of Muon."""
    muon_router: bool = False
    """Train the routers with Muon too. Large AdamW steps move all experts' columns in the direction that all tokens
    share: a fifth of the tokens is then dropped in the first steps. Muon moves all columns by about the same amount, in
    different directions."""
    lr_schedule: Schedule = "cosine"
    """How the learning rate falls, from the end of the warm-up to the last step. It follows the steps of the run: a
    skipped step does not hold it back."""
    final_lr_ratio: float = setting(0.0, within=(0, 1))
    """Learning rate of the last step, relative to the peak."""
    warmup_steps: int = setting(50, within=(0, 10**9))
    """Steps of linear warm-up. At most a tenth of `steps` is used, unless `minutes` sets their number."""
    beta1: float = setting(0.9, within=(0, 0.999999))
    """Decay of the running mean of gradients (first moment), per step."""
    beta2: float = setting(0.95, within=(0, 0.999999))
    """Decay of the running mean of squared gradients (second moment), per step."""
    eps: float = setting(1e-8, within=(1e-30, 1))
    """Added to the root of the second moment."""
    weight_decay: float = setting(0.1, within=(0, 1e3))
    """Decoupled decay of matrices. Vectors (norms, biases) are not decayed."""
    max_grad_norm: float = setting(1.0, within=(1e-6, 1e9))
    """Global norm that gradients are clipped to."""
    aux_loss_coef: float = setting(0.01, within=(0, 1e3))
    """Weight of the balance loss (1 at perfect balance, can be lower). Unused with `routing.balancing` = bias."""
    router_bias_lr: float = setting(1e-3, within=(0, 1e3))
    """Amount by which each balance bias changes after a training step, with `routing.balancing` = bias."""
    z_loss_coef: float = setting(1e-3, within=(0, 1e3))
    """Weight of the router's z-loss."""
    param_dtype: ParamDtype = setting("float32", kept=("resume",))
    """Dtype in which matrices are stored between steps. bfloat16 halves the memory of matrices and of their gradients.
    Updated bfloat16 matrices are rounded stochastically: an update smaller than the spacing of bfloat16 still counts on
    average."""
    seed: int = setting(0, "--seed", within=(0, 2**31 - 1))
    """Seed of the initial parameters, the order of the data, dropout and samples."""
    log_every: int = setting(10, within=(1, 10**9))
    """Steps between lines of metrics.jsonl and of the terminal."""
    eval_every: int = setting(200, "--eval-every", within=(1, 10**9))
    """Steps between evaluations. Each evaluation also writes a sample of text."""
    save_every: int = setting(200, "--save-every", within=(1, 10**9))
    """Steps between checkpoints. The last step and the best evaluated step are always saved."""
    patience: int = setting(0, within=(0, 10**9))
    """Stop early after this many evaluations in a row without improvement. 0 never stops early."""
    lora_rank: int = setting(0, "--lora", kept=("resume",), within=(0, 4096))
    """Fine-tuning by low-rank adapters (LoRA): their rank on the attention matrices. Each expert's matrices get
    adapters of rank / top-k, at least 1. The weights of the model stay as they are. 0 trains all weights."""
    lora_alpha: float = setting(0.0, kept=("resume",), within=(0, 1e6))
    """Adapters add (alpha / rank) A B to a matrix. 0 is twice the rank."""
    train_router: bool = setting(False, "--train-router", kept=("resume",))
    """With adapters, train the routers too. Without it every expert keeps its tokens, as far as it can."""

    def __post_init__(self) -> None:
        super().__post_init__()
        adapted = self.lora_rank > 0
        self.check(adapted or self.lora_alpha == 0, "lora_alpha", "left out; it is for --lora only")
        without = "left out; without --lora the routers are trained"
        self.check(adapted or not self.train_router, "train_router", without)

    @property
    def lora_scale(self) -> float:
        """alpha / rank, the factor of A B."""
        return (self.lora_alpha or 2 * self.lora_rank) / self.lora_rank
